"""The engine for plans of this project's own kernels: NVIDIA GPUs from compute capability 8.0, through the driver alone.

Weights and kernels are loaded once. What runs at the same time has its own stream and working memory (`_Session`); a program is captured
as one CUDA graph in each session that runs it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from smc.exported.engines import Files, Maps, MatchRequest, PairMatches
from smc.exported.engines import cuda_memory as cuda
from smc.exported.engines.cuda_launch import Kernels, capture
from smc.exported.engines.cuda_matching import CudaMatcher
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS, Program, Region, decode_plan
from smc.exported.engines.cuda_resize import Resizer
from smc.exported.engines.gpus import choose_device
from smc.exported.errors import BadInput, BundleDamaged, OutOfMemory, SmcError
from smc.exported.images import FramedImage, as_plan_input
from smc.exported.manifest import Manifest

MAX_SESSIONS = 4
"""Threads that run at once; more wait. Each takes the working memory of the largest program that it has run."""

Shape = tuple[int, int]
"""(H, W) of an image, in pixels."""

T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """A part of a plan's work that can be timed by itself: `replay(n)` runs it n times and returns the seconds each took, on the GPU.

    "decoder/decoders" and "decoder/heads" are the launches of the decoder that are for either, one after the other.
    """

    name: str
    replay: Callable[[int], float]


class CudaEngine:
    """A plan on one GPU. Features stay in its memory, and so do maps that are only matched."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        """Load a plan.

        Args:
            files: contents of the bundle's files; not needed after the constructor.
            manifest: the bundle's.

        Raises:
            NoTarget: a driver or a GPU is missing.
            BundleMismatch: the plan is for another GPU.
            BundleDamaged: it is no plan.
            OutOfMemory, BackendFailed: CUDA refused.
        """
        self._device = choose_device(cuda.devices(), manifest).index
        if missing := {PLAN, KERNELS, WEIGHTS} - files.keys():
            raise BundleDamaged(f"a cuda plan has {', '.join(sorted(missing))} as well, which the manifest does not list")
        plan = decode_plan(files[PLAN])
        for name, found, wanted in (
            (WEIGHTS, len(files[WEIGHTS]), plan.weights_bytes),
            (KERNELS, len(files[KERNELS]), max((kernel.offset + kernel.size for kernel in plan.kernels), default=0)),
        ):
            if found != wanted:
                raise BundleDamaged(f"{name}: {found:,} bytes, {wanted:,} were expected")
        self._programs: dict[tuple[str, tuple[Shape, ...]], dict[int, Program]] = {}
        self._image_shapes: dict[tuple[int, ...], Shape] = {}  # shape of an image's features -> the image's
        self._parts: dict[int, dict[str, Program]] = {}  # of programs that were timed
        for program in plan.programs:
            try:
                self._add(program)
            except (KeyError, ValueError, IndexError) as error:
                raise BundleDamaged(f"{PLAN}: a program of stage {program.stage!r} that this version does not know ({error})") from error
        self._check_complete()
        self._memory, self._staging = cuda.device_pool(), cuda.pinned_pool()
        self._idle: list[_Session] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_SESSIONS)
        self._kernels = Kernels(bytes(files[KERNELS]), plan.kernels)
        self._resizer = None if plan.resize is None else Resizer(plan.resize, self._kernels, self._memory, self._staging)
        with cuda.on_device(self._device):
            self._free_before = cuda.free_memory()
            self._weights = cuda.DeviceArray(self._memory, (plan.weights_bytes,), np.uint8)
            cuda.upload(cuda.Stream(), self._weights.address, files[WEIGHTS])

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> cuda.DeviceArray:
        """images -> features (B, rows, cols, C) on the GPU."""
        with self._session() as session:
            return self._encode(session, images)

    def encode_image(self, image: FramedImage) -> cuda.DeviceArray:
        """An image of any size -> its features, batch of one, on the GPU."""
        with self._session() as session:
            return self._encode(session, [image])

    def decode(self, features1: cuda.DeviceArray, features2: cuda.DeviceArray) -> Maps:
        """As `Engine.decode`; the maps are in page-locked memory."""
        maps = self._decode_pairs(features1, features2, partial(cuda.pinned_array, self._staging))
        return {name: values.astype(np.float32, copy=False) for name, values in maps.items()}

    def decode_on_device(self, features1: cuda.DeviceArray, features2: cuda.DeviceArray) -> dict[str, cuda.DeviceArray]:
        """As `decode`, with the maps left on the GPU, in the plan's types."""
        return self._decode_pairs(features1, features2, self._allocate)

    def match_images(self, image1: FramedImage, image2: FramedImage, request: MatchRequest) -> PairMatches:
        """Match two images of any size without coming back to the host in between."""
        shapes = image1.framing.shape, image2.framing.shape
        alike = shapes[0] == shapes[1]
        programs = [program for shape in shapes for program, _ in self._chunks("encoder", (shape,), 2 if alike else 1)]
        programs += self._matching(shapes, request)
        with self._session() as session:
            # For all at once: to grow on the way would make the encoder's graph invalid.
            self._with_room(lambda: session.reserve(max(programs, key=lambda program: program.arena_bytes), self._memory))
            if alike:
                both = self._encode(session, [image1, image2])
                return self._match(session, both[:1], both[1:], request)
            return self._match(session, self._encode(session, [image1]), self._encode(session, [image2]), request)

    def match_features(self, features1: cuda.DeviceArray, features2: cuda.DeviceArray, request: MatchRequest) -> PairMatches:
        """As `match_images`, from the features of one image each."""
        with self._session() as session:
            return self._match(session, features1, features2, request)

    def sections(self, batch: int, shape: Shape) -> list[Section]:
        """What can be timed for `batch` pairs of images of one shape, each straight after it was run with real input by the same thread."""
        pair = shape, shape
        wanted = (("encoder", (shape,), 2 * batch), *((stage, pair, batch) for stage in ("decoder", "describer", "matcher")))
        found = []
        for stage, shapes, count in wanted:
            program = self._programs.get((stage, shapes), {}).get(count)
            if program is not None:
                found.append(Section(stage, partial(self._replay, program, program)))
                parts = self._parts_of(program) if stage == "decoder" else {}
                found += [Section(f"{stage}/{name}", partial(self._replay, program, part)) for name, part in parts.items()]
        return found

    def memory_bytes(self) -> int:
        """GPU memory that this engine takes, and what CUDA took for it."""
        with cuda.on_device(self._device):
            return self._free_before - cuda.free_memory()

    def _add(self, program: Program) -> None:
        """File a program under the shapes of the images that it is for."""
        shapes: tuple[Shape, ...]
        if program.stage == "encoder":
            (image,), (features,) = program.inputs.values(), program.outputs.values()
            if len(image.shape) != 4 or image.shape[3 if image.dtype == "uint8" else 1] != 3:
                raise ValueError(f"images are {image.dtype} {image.shape}")
            shape = _shape(image.shape[2:4] if image.shape[1] == 3 else image.shape[1:3])
            if self._image_shapes.setdefault(features.shape[1:], shape) != shape:
                raise BundleDamaged(f"{PLAN}: features of two image shapes cannot be told apart")
            shapes, batch = (shape,), image.shape[0]
        elif program.stage in ("decoder", "describer"):
            maps = [program.outputs[name] for name in ("desc1", "desc2")]
            shapes, batch = tuple(_shape(region.shape[1:3]) for region in maps), maps[0].shape[0]
        elif program.stage == "matcher":
            shapes, batch = tuple(_shape(program.inputs[name].shape[:2]) for name in ("desc1", "desc2")), 1
        else:
            raise ValueError("no such stage")
        self._programs.setdefault((program.stage, shapes), {})[batch] = program

    def _check_complete(self) -> None:
        """Raise BundleDamaged unless every kind of program can take one, and what is decoded can be matched.

        Plans of before there were describers have none.
        """
        decoded, described, matched = (
            {shapes for stage, shapes in self._programs if stage == kind} for kind in ("decoder", "describer", "matcher")
        )
        if any(1 not in programs for programs in self._programs.values()) or decoded != matched or not described <= decoded:
            raise BundleDamaged(f"{PLAN}: programs are missing")
        for shapes in described:
            whole, described_maps = (self._programs[stage, shapes][1].outputs for stage in ("decoder", "describer"))
            if any(described_maps.get(name) != region for name, region in whole.items() if name.startswith("desc")):
                raise BundleDamaged(f"{PLAN}: a describer leaves what is matched elsewhere than its decoder, or not at all")

    def _encode(self, session: _Session, images: NDArray[Any] | Sequence[FramedImage]) -> cuda.DeviceArray:
        """Queue the encoder. Its features are there when the session is done, or for what comes after it on the session's stream."""
        if not len(images):
            raise BadInput("no images were given")
        first = images[0]
        if isinstance(first, FramedImage):
            shape = first.framing.shape
        else:
            shape = _shape(first.shape[:2] if first.dtype == np.uint8 else first.shape[1:])
        chunks = self._chunks("encoder", (shape,), len(images))
        (features,) = chunks[0][0].outputs.values()
        whole = self._allocate((len(images), *features.shape[1:]), features.dtype)
        for program, rows in chunks:
            self._with_room(partial(session.prepare, program, self._memory))
            ((_, pixels),) = program.inputs.items()
            for row, image in enumerate(images[rows]):
                self._put_image(session, pixels, row, image)
            session.run(program, {})
            (features,) = program.outputs.values()
            session.copy_out(features, whole[rows])
        return whole

    def _put_image(self, session: _Session, region: Region, row: int, image: NDArray[Any] | FramedImage) -> None:
        """Queue what makes an image a row of the encoder's input."""
        if isinstance(image, FramedImage):
            if self._resizer is not None and region.dtype == "uint8" and image.framing.is_resized:
                self._with_room(partial(session.resize, self._resizer, image, region, row))
                return
            image = image.render().rgb
        pixels = cuda.pinned_array(self._staging, region.shape[1:], region.dtype)
        pixels[:] = as_plan_input(image[None], pixels.dtype)[0]
        session.put(region, row, pixels)

    def _decode_pairs(self, features1: cuda.DeviceArray, features2: cuda.DeviceArray, make: Callable[..., Any]) -> dict[str, Any]:
        """Decode into arrays that `make` makes."""
        if not 0 < len(features1) == len(features2):
            raise BadInput(f"features of {len(features1)} and of {len(features2)} images make no pairs")
        chunks = self._chunks("decoder", self._shapes_of(features1, features2), len(features1))
        with self._session() as session:
            maps = {name: make((len(features1), *region.shape[1:]), region.dtype) for name, region in chunks[0][0].outputs.items()}
            for program, rows in chunks:
                self._run(session, program, dict(zip(program.inputs, (features1[rows], features2[rows]), strict=True)))
                for name, region in program.outputs.items():
                    session.copy_out(region, maps[name][rows])
        return maps

    def _match(self, session: _Session, features1: cuda.DeviceArray, features2: cuda.DeviceArray, request: MatchRequest) -> PairMatches:
        if not len(features1) == len(features2) == 1:
            raise BadInput(f"one pair is matched at a time, found features of {len(features1)} and {len(features2)} images")
        shapes = self._shapes_of(features1, features2)
        decoder, program = self._matching(shapes, request)
        self._with_room(lambda: session.reserve(program, self._memory))  # before the decoder writes what it reads
        self._run(session, decoder, dict(zip(decoder.inputs, (features1, features2), strict=True)))
        matcher = self._with_room(lambda: session.matcher(program, self._staging))
        if request.both_ways:
            xy1, xy2, confidence = matcher.reciprocal_nn_both_ways(request.subsample)
        else:
            xy1, xy2, confidence = matcher.fast_reciprocal_nn(request.subsample, request.pixel_tol)
        points: list[NDArray[np.float32]] = []
        if request.points3d:
            maps = []
            for name in ("pts3d1", "pts3d2"):
                region = decoder.outputs[name]
                maps.append(cuda.pinned_array(self._staging, region.shape, region.dtype))
                session.copy_out(region, maps[-1])
            session.finish()
            points = [values[0, xy[:, 1], xy[:, 0]] for values, xy in zip(maps, (xy1, xy2), strict=True)]
        return PairMatches(xy1, xy2, confidence, *points)

    def _matching(self, shapes: tuple[Shape, ...], request: MatchRequest) -> tuple[Program, Program]:
        """What decodes as much of a pair as is asked for, and what matches it. Raises BadInput: there is nothing for these shapes."""
        describes = not request.points3d and ("describer", shapes) in self._programs
        ((decoder, _),), ((matcher, _),) = (
            self._chunks(stage, shapes, 1) for stage in ("describer" if describes else "decoder", "matcher")
        )
        return decoder, matcher

    def _run(self, session: _Session, program: Program, inputs: dict[str, Any]) -> None:
        """Queue a program, whose outputs are then in the session's arena."""
        self._with_room(lambda: session.prepare(program, self._memory))
        session.run(program, inputs)

    def _chunks(self, stage: str, shapes: tuple[Shape, ...], count: int) -> list[tuple[Program, slice]]:
        """Programs that do `count` together, and which of them each does: by the largest batches that there are.

        Raises BadInput: there is none for these shapes.
        """
        programs = self._programs.get((stage, shapes))
        if programs is None:
            known = "; ".join(dict.fromkeys(_sizes(theirs) for kind, theirs in self._programs if kind == "encoder"))
            raise BadInput(f"the plan takes images of {known}; found {_sizes(shapes)}", fix="build it with that --shape")
        chunks: list[tuple[Program, slice]] = []
        done = 0
        while done < count:
            batch = max(size for size in programs if size <= count - done)  # 1 is among them
            chunks.append((programs[batch], slice(done, done + batch)))
            done += batch
        return chunks

    def _shapes_of(self, *features: cuda.DeviceArray) -> tuple[Shape, ...]:
        """The shapes of the images that features are of. Raises BadInput: another plan made them."""
        for given in features:
            if given.shape[1:] not in self._image_shapes:
                raise BadInput(f"features of {given.shape[1:]} an image are not this plan's", fix="encode the images with this bundle")
        return tuple(self._image_shapes[given.shape[1:]] for given in features)

    def _parts_of(self, program: Program) -> dict[str, Program]:
        """A program's steps by their parts, each part's one after the other. Made once: sessions know programs by their identity."""
        if id(program) not in self._parts:
            names = dict.fromkeys(step.part for step in program.steps if step.part)
            self._parts[id(program)] = {name: _part(program, name) for name in names}
        return self._parts[id(program)]

    def _replay(self, program: Program, timed: Program, count: int) -> float:
        """Time a program, or a part of it, after the program was run."""
        with self._session() as session:
            session.require(program)
            self._with_room(lambda: session.prepare(timed, self._memory))
            return session.time(program, timed, count)

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> cuda.DeviceArray:
        return self._with_room(lambda: cuda.DeviceArray(self._memory, shape, dtype))

    def _with_room(self, make: Callable[[], T]) -> T:
        """What `make` makes; where the GPU has no memory for it, idle sessions give theirs up."""
        try:
            return make()
        except OutOfMemory:
            with self._lock:
                self._idle.clear()
            self._memory.release()
            return make()

    @contextmanager
    def _session(self) -> Iterator[_Session]:
        """A session, the calling thread's own; afterwards all that was queued in it is done. One that failed is not used again."""
        with cuda.on_device(self._device), self._slots:
            with self._lock:
                session = self._idle.pop() if self._idle else None
            session = session or self._with_room(lambda: _Session(self._kernels, self._weights.address))
            try:
                yield session
                session.finish()
            except BadInput:
                session.finish()
                self._put_back(session)
                raise
            except BaseException:
                with suppress(SmcError):
                    session.finish()  # until then memory is in use
                raise
            self._put_back(session)

    def _put_back(self, session: _Session) -> None:
        with self._lock:
            self._idle.append(session)


class _Session:
    """A stream, working memory, and the graphs that were captured for both. For one thread at a time."""

    def __init__(self, kernels: Kernels, weights: int) -> None:
        self._kernels, self._weights = kernels, weights
        self._stream = cuda.Stream()
        self._arena: cuda.DeviceArray | None = None
        self._graphs: dict[int, cuda.Graph] = {}
        self._matchers: dict[int, CudaMatcher] = {}
        self._held: list[Any] = []  # what queued copies read
        self._whole: set[int] = set()  # programs whose inputs are in the arena still

    def reserve(self, program: Program, memory: cuda.MemoryPool) -> None:
        """Working memory for a program. More than before makes all graphs invalid: they hold its addresses."""
        if self._arena is None or self._arena.nbytes < program.arena_bytes:
            self.finish()
            self._graphs.clear()
            self._matchers.clear()
            self._whole.clear()
            self._arena = None
            memory.release()  # the old one is of a size that is not asked for again
            self._arena = cuda.DeviceArray(memory, (program.arena_bytes,), np.uint8)

    def prepare(self, program: Program, memory: cuda.MemoryPool) -> None:
        """Working memory and the graph for a program."""
        self.reserve(program, memory)
        if id(program) not in self._graphs:
            self._graphs[id(program)] = capture(program, self._kernels, self._bases, self._stream)

    def run(self, program: Program, inputs: dict[str, NDArray[Any] | cuda.DeviceArray]) -> None:
        """Queue copies of a prepared program's inputs, those that are not there yet, and the program."""
        for name, values in inputs.items():
            region = program.inputs[name]
            if tuple(values.shape) != region.shape or np.dtype(values.dtype).name != region.dtype:
                raise BadInput(f"{name} is {values.dtype} {values.shape}, {region.dtype} {region.shape} was expected")
            self._held.append(values)
            self._stream.copy(self._base + region.offset, _address(values), values.nbytes)
        self._graphs[id(program)].launch(self._stream)
        self._whole = {id(program)}

    def put(self, region: Region, row: int, values: NDArray[Any]) -> None:
        """Queue a copy of a row of an input of a prepared program."""
        self._whole.clear()
        self._held.append(values)
        self._stream.copy(self._base + region.offset + row * values.nbytes, values.ctypes.data, values.nbytes)

    def resize(self, resizer: Resizer, image: FramedImage, region: Region, row: int) -> None:
        """Queue what makes an image a row of an input, uint8 (B, H, W, 3), of a prepared program."""
        out = self._base + region.offset + row * math.prod(region.shape[1:])
        self._whole.clear()
        resizer.enqueue(image, out, self._stream, self._held)

    def matcher(self, program: Program, staging: cuda.MemoryPool) -> CudaMatcher:
        """The matching of what a decoder has left in the arena."""
        if id(program) not in self._matchers:
            self._matchers[id(program)] = CudaMatcher(program, self._kernels, self._bases, self._stream, staging)
        self._whole.add(id(program))  # its memory lies behind the decoder's
        return self._matchers[id(program)]

    def copy_out(self, region: Region, to: NDArray[Any] | cuda.DeviceArray) -> None:
        """Queue a copy of an output to memory that the caller keeps until the session is done."""
        self._stream.copy(_address(to), self._base + region.offset, to.nbytes)

    def finish(self) -> None:
        """Wait for everything queued. Raises BackendFailed if some of it failed."""
        self._stream.synchronize()
        self._held.clear()

    def require(self, program: Program) -> None:
        """Raise BadInput unless a program's inputs are in the arena: on anything else the matcher, whose are indices, would leave it."""
        if id(program) not in self._whole:
            raise BadInput(f"the {program.stage} has nothing to be timed on", fix="run it first")

    def time(self, program: Program, timed: Program, count: int) -> float:
        """Seconds that one of `count` replays of `timed` takes, a prepared program or a part of it, on what the program's last run left."""
        graph = self._graphs[id(timed)]
        if timed is not program:
            self._whole = {id(program)}  # a part by itself writes over what it would have been given, and its results are no maps

        def launch() -> None:
            for _ in range(count):
                graph.launch(self._stream)

        return cuda.elapsed(self._stream, launch) / count

    @property
    def _base(self) -> int:
        assert self._arena is not None
        return self._arena.address

    @property
    def _bases(self) -> dict[Any, int]:
        return {"arena": self._base, "weights": self._weights}


def _part(program: Program, name: str) -> Program:
    """The steps of one part of a program, one after the other."""
    steps = tuple(msgspec.structs.replace(step, lane=0, waits=()) for step in program.steps if step.part == name)
    return msgspec.structs.replace(program, steps=steps)


def _address(values: NDArray[Any] | cuda.DeviceArray) -> int:
    return values.address if isinstance(values, cuda.DeviceArray) else values.ctypes.data


def _shape(sizes: Sequence[int]) -> Shape:
    height, width = sizes
    return height, width


def _sizes(shapes: Sequence[Shape]) -> str:
    return " and ".join(f"{width}x{height}" for height, width in shapes)
