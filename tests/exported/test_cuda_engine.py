"""The engine's own logic, on a made-up GPU whose memory is the host's; and, on hardware, a real plan of the tiny model."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import smc
from smc.compiler.build import BuildRequest, build
from smc.compiler.targets import TARGETS
from smc.exported.engines import DeviceEngine, MatchingEngine, MatchRequest, cuda_program, engine_for
from smc.exported.engines.cuda_program import KernelCode, Plan, Program, Region, Resize, Step, encode_plan
from smc.exported.errors import BackendFailed, BadInput, BundleDamaged, BundleMismatch, OutOfMemory
from smc.exported.images import FramedImage, load_framed, load_view, to_unit_range
from smc.exported.manifest import BackendInfo, Manifest, TargetInfo
from smc.exported.manifest import Shape as ManifestShape
from smc.plugins.resize import reference
from tests.bundles import sample_manifest
from tests.conformance import DATA, relative_error
from tests.conftest import TINY_SHAPES

cudart = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from smc.exported.engines import cuda as engine_module  # noqa: E402  # it needs cuda-bindings
from smc.exported.engines import cuda_memory as cuda  # noqa: E402
from smc.exported.engines import cuda_resize  # noqa: E402
from smc.exported.engines.cuda import MAX_SESSIONS, CudaEngine  # noqa: E402
from tests.exported.test_cuda_memory import HostMemory  # noqa: E402

H200 = cuda.Device(0, "NVIDIA H200", "9.0", 141 << 30)
A40 = cuda.Device(1, "NVIDIA A40", "8.6", 48 << 30)
SUCCESS = cudart.cudaError_t.cudaSuccess

WIDE, HIGH = (32, 48), (48, 32)
"""(H, W) of the images that the made-up plan takes: two pairs at once."""
CHANNELS, DESCRIPTOR = 4, 8
ACROSS, DOWN = 0, 1
"""Its kernels, which resize images."""
REQUEST = MatchRequest(subsample=8)


# --- a plan without kernels, and a GPU that knows what its programs compute ------------------------------------------------------


def laid_out(start: int, **tensors: tuple[str, tuple[int, ...]]) -> tuple[dict[str, Region], int]:
    """Regions one behind the other, and where they end."""
    regions = {}
    for name, (dtype, shape) in tensors.items():
        regions[name] = Region("arena", start, dtype, shape)
        start += -(-math.prod(shape) * cuda_program.ITEMSIZES[dtype] // 256) * 256
    return regions, start


def encoder(shape: tuple[int, int], batch: int) -> Program:
    height, width = shape
    inputs, end = laid_out(0, image=("uint8", (batch, height, width, 3)))
    outputs, end = laid_out(end, features=("float16", (batch, height // 16, width // 16, CHANNELS)))
    return Program("encoder", inputs, outputs, end, ())


def decoder(shapes: Sequence[tuple[int, int]], batch: int) -> Program:
    grids = {f"features{i}": ("float16", (batch, h // 16, w // 16, CHANNELS)) for i, (h, w) in enumerate(shapes, 1)}
    inputs, end = laid_out(0, **grids)
    maps = {}
    for i, shape in enumerate(shapes, 1):
        for name, last in (("pts3d", (3,)), ("conf", ()), ("desc", (DESCRIPTOR,)), ("desc_conf", ())):
            maps[f"{name}{i}"] = ("float32", (batch, *shape, *last))
    outputs, end = laid_out(end + 512, **maps)
    return Program("decoder", inputs, outputs, end, ())


def describer(of: Program) -> Program:
    return msgspec.structs.replace(of, stage="describer", outputs={name: of.outputs[name] for name in of.outputs if "desc" in name})


def matcher(of: Program) -> Program:
    maps = {name: of.outputs[output] for name, output in zip(("desc1", "desc2"), ("desc1", "desc2"), strict=True)}
    inputs = {name: msgspec.structs.replace(region, shape=region.shape[1:]) for name, region in maps.items()}
    own, end = laid_out(of.arena_bytes, starts=("int32", (2, 256)))
    return Program("matcher", inputs | own, {}, end, ())


def made_up_plan() -> Plan:
    programs = [encoder(shape, batch) for shape in (WIDE, HIGH) for batch in (1, 2, 4)]
    for one in (WIDE, HIGH):
        for other in (WIDE, HIGH):
            decoders = [decoder((one, other), batch) for batch in (1, 2)]
            programs += [*decoders, describer(decoders[0]), matcher(decoders[0])]
    kernels = KernelCode("across", 0, 1, 128, 0), KernelCode("down", 1, 2, 128, 0)
    return Plan(kernels, tuple(programs), 5, Resize(ACROSS, DOWN, rows=4, bytes=64))


def made_up_files() -> dict[str, memoryview]:
    return {"plan.json": memoryview(encode_plan(made_up_plan())), "kernels.bin": memoryview(b"abc"), "weights.bin": memoryview(b"12345")}


def manifest() -> Manifest:
    return msgspec.structs.replace(
        sample_manifest({}),
        target=TargetInfo(gpu="a40", sm="8.6"),
        backend=BackendInfo(name="cuda", version="3.9"),
        shapes=[ManifestShape(height=height, width=width) for height, width in (WIDE, HIGH)],
        stages={"encoder": "plan.json", "decoder": "plan.json"},
    )


def view(base: int, region: Region) -> np.ndarray:
    dtype = np.dtype(region.dtype)
    raw = (ctypes.c_char * (math.prod(region.shape) * dtype.itemsize)).from_address(base + region.offset)
    return np.frombuffer(raw, dtype).reshape(region.shape)


def compute(program: Program, base: int) -> None:
    """Features are the images' patches' first bytes; every map is its pixel's number and its pair's features, first + 10 * second."""
    inputs = [view(base, region) for region in program.inputs.values()]
    outputs = {name: view(base, region) for name, region in program.outputs.items()}
    if program.stage == "encoder":
        outputs["features"][:] = inputs[0][:, ::16, ::16, :1]
    if program.stage not in ("decoder", "describer"):
        return
    pair = inputs[0].mean((1, 2, 3), np.float32) + 10 * inputs[1].mean((1, 2, 3), np.float32)
    for values in outputs.values():
        values[:] = np.arange(values[0].size, dtype=np.float32).reshape(values[0].shape) / 1000
        values += pair.reshape(-1, *[1] * (values.ndim - 1))


class FakeStream:
    """Does what is queued only when somebody waits: what a copy reads may not be gone by then."""

    def __init__(self, gpu: FakeGpu) -> None:
        gpu.check_device()
        gpu.streams += 1
        self.gpu, self.queue = gpu, list[Callable[[], object]]()

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self.gpu.check_device()
        self.queue.append(lambda: ctypes.memmove(to, source, nbytes))

    def synchronize(self) -> None:
        self.gpu.check_device()
        queue, self.queue = self.queue, []
        for step in queue:
            step()
        if self.gpu.broken:
            raise BackendFailed(self.gpu.broken)


class FakeGraph:
    def __init__(self, gpu: FakeGpu, program: Program, base: int) -> None:
        gpu.captures.append((program.stage, next(iter(program.inputs.values())).shape))
        self.gpu, self.program, self.base = gpu, program, base

    def launch(self, stream: FakeStream) -> None:
        batch = next(iter(self.program.inputs.values())).shape[0]
        self.gpu.launches.append((self.program.stage, batch))
        self.gpu.steps.append(self.program.steps)
        stream.queue.append(lambda: self.gpu.seen(self.program, self.base))
        stream.queue.append(lambda: compute(self.program, self.base))
        self.gpu.meanwhile()


def launch_resize(
    kernels: object, number: int, grid: tuple[int, int, int], arguments: Sequence[Any], stream: FakeStream, label: str
) -> None:
    """Do what the kernels of `smc.plugins.resize` do, for all of the result that the grid reaches."""
    source, first, weights, out, rows, extent, width, taps = (argument.value for argument in arguments)
    across = number == ACROSS

    def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        assert address % 16 == 0
        count = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * count).from_address(address), dtype).reshape(shape)

    def run() -> None:
        size = width if across else rows
        given = at(source, (rows, extent, 3) if across else (extent, width, 3), np.uint8)
        compute = reference.across if across else reference.down
        result = compute(given, at(first, (size,), np.int32), at(weights, (taps, size), np.int32))
        reached = at(out, (rows, width * 3), np.uint8)[: grid[1] * 4, : grid[0] * 64]
        reached[:] = result.reshape(rows, width * 3)[: grid[1] * 4, : grid[0] * 64]

    assert isinstance(stream, FakeStream)
    stream.queue.append(run)


class FakeMatcher:
    """One match, of the pixels (x=1, y=2) and (x=3, y=4); its confidence tells what the descriptors were."""

    def __init__(self, gpu: FakeGpu, program: Program, base: int, stream: FakeStream) -> None:
        self.gpu, self.program, self.base, self.stream = gpu, program, base, stream

    def fast_reciprocal_nn(self, *asked: Any) -> Any:
        return self._found("one way", *asked)

    def reciprocal_nn_both_ways(self, *asked: Any) -> Any:
        return self._found("both ways", *asked)

    def _found(self, *asked: Any) -> Any:
        self.gpu.asked.append(asked)
        self.stream.synchronize()
        if self.gpu.refused:
            raise BadInput(self.gpu.refused)
        desc1, desc2 = (view(self.base, self.program.inputs[name]) for name in ("desc1", "desc2"))
        return np.array([[1, 2]]), np.array([[3, 4]]), np.array([desc1[2, 1, 0] + desc2[4, 3, 0]])


class FakeGpu:
    """The second of two GPUs. Memory is what `memory` has."""

    def __init__(self) -> None:
        self.streams = 0
        self.captures: list[tuple[str, tuple[int, ...]]] = []
        self.launches: list[tuple[str, int]] = []
        self.steps: list[tuple[Step, ...]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.broken = self.refused = ""
        self.meanwhile: Callable[[], object] = lambda: None
        self.seen: Callable[[Program, int], object] = lambda program, base: None
        self.memory, self.pinned = HostMemory(), HostMemory()
        self._current = threading.local()

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        self._current.index = index
        yield
        self._current.index = None

    def check_device(self) -> None:
        assert self._current.index == A40.index

    def allocate(self, nbytes: int) -> tuple[object, int]:
        self.check_device()
        return self.memory.allocate(nbytes)

    def make_graph(self, program: Program, kernels: object, bases: dict[str, int], stream: FakeStream) -> FakeGraph:
        self.check_device()
        return FakeGraph(self, program, bases["arena"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    for name, value in {
        "devices": lambda: [H200, A40],
        "on_device": fake.on_device,
        "free_memory": lambda: 1000 - sum(map(len, fake.memory.blocks.values())),
        "device_pool": lambda: cuda.MemoryPool("GPU memory", fake.allocate, fake.memory.free),
        "pinned_pool": lambda: fake.pinned.pool(),
        "Stream": lambda: FakeStream(fake),
        "elapsed": lambda stream, enqueue: (enqueue(), stream.synchronize(), 6.0)[2],
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(engine_module, "capture", fake.make_graph)
    monkeypatch.setattr(
        engine_module, "CudaMatcher", lambda program, kernels, bases, stream, staging: FakeMatcher(fake, program, bases["arena"], stream)
    )
    monkeypatch.setattr(cuda_resize, "launch", launch_resize)
    monkeypatch.setattr(engine_module.Kernels, "__getitem__", lambda self, number: number)
    # DeviceArray.__array__ copies with this.
    monkeypatch.setattr(cudart, "cudaMemcpy", lambda to, source, nbytes, kind: (ctypes.memmove(to, source, nbytes), (SUCCESS,))[1])
    return fake


@pytest.fixture
def engine(gpu: FakeGpu) -> CudaEngine:
    return CudaEngine(made_up_files(), manifest())


@pytest.mark.parametrize(
    "left_out",
    [
        lambda program: program.stage == "matcher",
        lambda program: program.stage == "encoder" and program.inputs["image"].shape[0] == 1,
    ],
    ids=["no matching", "no single image"],
)
def test_plans_without_a_program_that_is_needed_are_damaged(gpu: FakeGpu, left_out: Callable[[Program], bool]) -> None:
    plan = made_up_plan()
    plan = msgspec.structs.replace(plan, programs=tuple(program for program in plan.programs if not left_out(program)))
    with pytest.raises(BundleDamaged, match="programs are missing"):
        CudaEngine(made_up_files() | {"plan.json": memoryview(encode_plan(plan))}, manifest())


@pytest.mark.parametrize("change", ["moved", "missing"])
def test_a_describer_leaves_what_is_matched_where_its_decoder_does(gpu: FakeGpu, change: str) -> None:
    plan = made_up_plan()
    programs = list(plan.programs)
    number = next(i for i, program in enumerate(programs) if program.stage == "describer")
    outputs = dict(programs[number].outputs)
    region = outputs.pop("desc_conf2")
    if change == "moved":
        outputs["desc_conf2"] = msgspec.structs.replace(region, offset=region.offset - 256)
    programs[number] = msgspec.structs.replace(programs[number], outputs=outputs)
    changed = msgspec.structs.replace(plan, programs=tuple(programs))
    with pytest.raises(BundleDamaged, match="a describer leaves what is matched elsewhere"):
        CudaEngine(made_up_files() | {"plan.json": memoryview(encode_plan(changed))}, manifest())


ODD_IMAGE = {"image": Region("arena", 0, "uint8", (1, 32, 48))}


@pytest.mark.parametrize("changes", [{"stage": "dreamer"}, {"outputs": {}}, {"inputs": ODD_IMAGE}])
def test_programs_that_no_engine_knows_are_damaged(gpu: FakeGpu, changes: dict[str, Any]) -> None:
    plan = made_up_plan()
    strange = msgspec.structs.replace(plan.programs[0], **changes)
    plan = msgspec.structs.replace(plan, programs=(strange, *plan.programs[1:]))
    with pytest.raises(BundleDamaged, match="does not know"):
        CudaEngine(made_up_files() | {"plan.json": memoryview(encode_plan(plan))}, manifest())


def images(*values: int, shape: tuple[int, int] = WIDE) -> np.ndarray:
    """An image of each value."""
    return np.repeat(np.array(values, np.uint8), 3 * shape[0] * shape[1]).reshape(-1, *shape, 3)


def framed(value: int, shape: tuple[int, int] = WIDE) -> FramedImage:
    """An image of one value that needs no resize."""
    return load_framed(images(value, shape=shape)[0], [shape])


def at(maps: Any, name: str, pair: int = 0) -> float:
    """A map's value at its first element, which tells the pair."""
    return float(np.asarray(maps[name])[pair].reshape(-1)[0])


# --- encoding and decoding ---------------------------------------------------------------------------------------------------


def test_encodes_and_decodes(gpu: FakeGpu, engine: CudaEngine) -> None:
    for value in (1, 2, 3):
        features1, features2 = engine.encode(images(value)), engine.encode(images(5, shape=HIGH))
        assert (features1.shape, features1.dtype) == ((1, 2, 3, CHANNELS), np.float16)
        np.testing.assert_array_equal(np.asarray(features1), np.float16(value))
        maps = engine.decode(features1, features2)
        assert {name: (values.shape, values.dtype) for name, values in maps.items() if name[-1] == "1"} == {
            "pts3d1": ((1, *WIDE, 3), np.float32),
            "conf1": ((1, *WIDE), np.float32),
            "desc1": ((1, *WIDE, DESCRIPTOR), np.float32),
            "desc_conf1": ((1, *WIDE), np.float32),
        }
        assert maps["conf2"].shape == (1, *HIGH)
        np.testing.assert_allclose(maps["conf1"][0].reshape(-1), value + 50 + np.arange(32 * 48) / 1000, rtol=1e-6)
    assert isinstance(engine, MatchingEngine)
    assert isinstance(engine, DeviceEngine)


def test_batches_are_done_by_the_programs_that_there_are(gpu: FakeGpu, engine: CudaEngine) -> None:
    features = engine.encode(images(*range(1, 8)))
    assert gpu.launches == [("encoder", 4), ("encoder", 2), ("encoder", 1)]
    np.testing.assert_array_equal(np.asarray(features)[:, 0, 0, 0], range(1, 8))
    gpu.launches.clear()
    for decode in (engine.decode, engine.decode_on_device):
        maps: Any = decode(features[:5], features[2:])
        assert gpu.launches[-3:] == [("decoder", 2), ("decoder", 2), ("decoder", 1)]
        assert maps["desc2"].shape == (5, *WIDE, DESCRIPTOR)
        for name in maps:
            assert [at(maps, name, pair) for pair in range(5)] == [pair + 1 + 10 * (pair + 3) for pair in range(5)]


def test_results_are_the_callers_own(gpu: FakeGpu, engine: CudaEngine) -> None:
    first, second = engine.encode(images(1)), engine.encode(images(2))
    np.testing.assert_array_equal(np.asarray(first), np.float16(1))
    maps, on_device = engine.decode(first, second), engine.decode_on_device(first, second)
    engine.decode(second, second)
    engine.decode_on_device(second, second)
    assert at(maps, "conf1") == at(on_device, "conf1") == 21


def test_images_are_converted_to_what_the_plan_takes(gpu: FakeGpu, engine: CudaEngine) -> None:
    np.testing.assert_array_equal(np.asarray(engine.encode(to_unit_range(images(51, 52))))[:, 0, 0, 0], [51, 52])
    every_other = np.repeat(images(9), 2, axis=2)[:, :, ::2]
    np.testing.assert_array_equal(np.asarray(engine.encode(every_other)), np.float16(9))
    with pytest.raises(BadInput, match="8-bit images"):
        engine.encode(np.full((1, 3, *WIDE), 0.1234, np.float32))


def test_shapes_that_the_plan_does_not_take_are_named_in_pixels(gpu: FakeGpu, engine: CudaEngine) -> None:
    message = "the plan takes images of 48x32; 32x48; found 96x64"
    for given in (images(1, shape=(64, 96)), to_unit_range(images(1, shape=(64, 96)))):
        with pytest.raises(BadInput, match=message) as caught:
            engine.encode(given)
    assert "--shape" in caught.value.fix
    with pytest.raises(BadInput, match=message):
        engine.match_images(framed(1), framed(1, shape=(64, 96)), REQUEST)


def test_features_that_make_no_pairs_are_refused(gpu: FakeGpu, engine: CudaEngine) -> None:
    features = engine.encode(images(1, 2))
    other = cuda.DeviceArray(HostMemory().pool(), (1, 5, 7, CHANNELS), np.float16)
    with pytest.raises(BadInput, match=r"features of \(5, 7, 4\) an image are not this plan's"):
        engine.decode(features[:1], other)
    typed = cuda.DeviceArray(HostMemory().pool(), features.shape, np.float32)
    with pytest.raises(BadInput, match="features2 is float32"):
        engine.decode(features, typed)
    with pytest.raises(BadInput, match="2 and of 1 images make no pairs"):
        engine.decode(features, features[:1])
    with pytest.raises(BadInput, match="0 and of 0 images make no pairs"):
        engine.decode(features[:0], features[:0])
    with pytest.raises(BadInput, match="one pair is matched at a time, found features of 2 and 1"):
        engine.match_features(features, features[:1], REQUEST)
    with pytest.raises(BadInput, match="no images"):
        engine.encode(images())


# --- images of any size ------------------------------------------------------------------------------------------------------

SIZES = {
    "smaller": (61, 41),
    "much smaller": (480, 320),
    "larger": (31, 20),
    "cropped at the sides": (60, 32),
    "cropped above and below": (64, 64),
    "as it is": (48, 32),
    "two pixels": (2, 1),
    "high": (320, 480),
    "tall, which Pillow may resize down first": (100, 300),
}
"""(width, height)."""


@pytest.mark.parametrize("name", SIZES)
def test_images_become_what_pillow_makes_of_them(gpu: FakeGpu, engine: CudaEngine, name: str) -> None:
    width, height = SIZES[name]
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = load_view(image, [WIDE, HIGH])
    inputs: list[np.ndarray] = []
    gpu.seen = lambda program, base: inputs.append(view(base, next(iter(program.inputs.values()))).copy())
    given = load_framed(image, [WIDE, HIGH])
    features = engine.encode_image(given)
    assert features.shape[0] == 1
    np.testing.assert_array_equal(inputs[0], wanted.rgb[None])
    inputs.clear()
    # Two, whose copies are all queued before the first is done.
    engine.match_images(given, load_framed(255 - image, [WIDE, HIGH]), REQUEST)
    np.testing.assert_array_equal(inputs[0], np.stack([wanted.rgb, load_view(255 - image, [WIDE, HIGH]).rgb]))


def test_what_was_queued_keeps_its_memory_where_a_launch_fails(gpu: FakeGpu, engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the second try finds other memory."""
    failures = [OutOfMemory("once")]

    def fail_once(kernels: object, number: int, *given: Any) -> None:
        if number == DOWN and failures:
            raise failures.pop()
        launch_resize(kernels, number, *given)

    monkeypatch.setattr(cuda_resize, "launch", fail_once)
    free: list[int] = []
    gpu.meanwhile = lambda: free.append(sum(len(blocks) for pool in (engine._memory, engine._staging) for blocks in pool._idle.values()))
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    wanted = np.asarray(CudaEngine(made_up_files(), manifest()).encode_image(load_framed(image, [WIDE])))
    np.testing.assert_array_equal(np.asarray(engine.encode_image(load_framed(image, [WIDE]))), wanted)
    assert not failures
    assert free[-1] == 0


def test_only_the_rows_that_a_crop_needs_are_copied(gpu: FakeGpu, engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = FakeStream.copy
    monkeypatch.setattr(FakeStream, "copy", lambda self, to, source, nbytes: (copied.append(nbytes), copy(self, to, source, nbytes)))
    engine.encode_image(load_framed(np.zeros((640, 64, 3), np.uint8), [WIDE]))
    assert max(copied) < 640 * 64 * 3 / 4


def test_a_plan_of_float32_images_has_them_resized_for_it(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cuda_resize, "launch")
    plan = made_up_plan()
    programs = list(plan.programs)
    for i, program in enumerate(programs):
        if program.stage == "encoder":
            batch, height, width, _ = program.inputs["image"].shape
            region = msgspec.structs.replace(
                program.inputs["image"], dtype="float32", shape=(batch, 3, height, width), offset=program.arena_bytes
            )
            arena = program.arena_bytes + 12 * batch * height * width
            programs[i] = msgspec.structs.replace(program, inputs={"image": region}, arena_bytes=arena)
    floats = msgspec.structs.replace(plan, programs=tuple(programs))
    engine = CudaEngine(made_up_files() | {"plan.json": memoryview(encode_plan(floats))}, manifest())
    inputs: list[np.ndarray] = []
    gpu.seen = lambda program, base: inputs.append(view(base, next(iter(program.inputs.values()))).copy())
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    monkeypatch.setattr(f"{__name__}.compute", lambda program, base: None)  # the made-up encoder takes bytes
    engine.encode_image(load_framed(image, [WIDE]))
    np.testing.assert_array_equal(inputs[0][0], load_view(image, [WIDE]).pixels)


def test_older_plans_neither_resize_nor_describe(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    wanted = np.asarray(CudaEngine(made_up_files(), manifest()).encode_image(load_framed(image, [WIDE])))
    plan = made_up_plan()
    older = msgspec.structs.replace(plan, resize=None, programs=tuple(one for one in plan.programs if one.stage != "describer"))
    monkeypatch.delattr(cuda_resize, "launch")
    engine = CudaEngine(made_up_files() | {"plan.json": memoryview(encode_plan(older))}, manifest())
    np.testing.assert_array_equal(np.asarray(engine.encode_image(load_framed(image, [WIDE]))), wanted)
    engine.match_images(framed(1), framed(2), REQUEST)
    assert gpu.launches[-1] == ("decoder", 1)  # the whole one, where there is no describer


def test_images_of_many_sizes_take_no_more_memory(gpu: FakeGpu, engine: CudaEngine) -> None:
    def encode(width: int) -> None:
        engine.encode_image(load_framed(np.zeros((2 * width // 3, width, 3), np.uint8), [WIDE]))

    encode(400)
    held = len(gpu.memory.blocks), len(gpu.pinned.blocks)
    for width in range(370, 400):
        encode(width)
    assert (len(gpu.memory.blocks), len(gpu.pinned.blocks)) == held


# --- matching ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "runs"), [(WIDE, [("encoder", 2)]), (HIGH, [("encoder", 1), ("encoder", 1)])])
def test_a_pair_is_matched_where_its_maps_are(gpu: FakeGpu, engine: CudaEngine, shape: tuple[int, int], runs: list[Any]) -> None:
    image1, image2 = framed(1), framed(5, shape)
    found = engine.match_images(image1, image2, REQUEST)
    assert gpu.launches == [*runs, ("describer", 1)]
    assert (found.xy1.tolist(), found.xy2.tolist()) == ([[1, 2]], [[3, 4]])
    width = shape[1]
    np.testing.assert_allclose(found.confidence, 102 + DESCRIPTOR * (2 * 48 + 1 + 4 * width + 3) / 1000, rtol=1e-6)
    assert found.points1 is None
    features = engine.encode_image(image1), engine.encode_image(image2)
    again = engine.match_features(*features, REQUEST)
    np.testing.assert_array_equal(again.confidence, found.confidence)


def test_requests_reach_the_matcher(gpu: FakeGpu, engine: CudaEngine) -> None:
    for request in (MatchRequest(3, pixel_tol=2.5), MatchRequest(4, both_ways=True)):
        engine.match_images(framed(1), framed(2), request)
    assert gpu.asked == [("one way", 3, 2.5), ("both ways", 4)]


def test_points_are_those_of_the_matches(gpu: FakeGpu, engine: CudaEngine) -> None:
    found = engine.match_images(framed(1), framed(2), MatchRequest(8, points3d=True))
    assert gpu.launches == [("encoder", 2), ("decoder", 1)]
    for points, (x, y) in ((found.points1, (1, 2)), (found.points2, (3, 4))):
        np.testing.assert_allclose(points, [21 + (3 * (48 * y + x) + np.arange(3)) / 1000], rtol=1e-6)  # type: ignore[arg-type]


def test_through_the_matcher(gpu: FakeGpu) -> None:
    found = smc.Matcher(engine_for(manifest(), made_up_files()), manifest())
    matches = found.match(images(1)[0], images(2)[0], points3d=True)
    assert matches.keypoints0.tolist() == [[1, 2]]
    assert found.match_features(found.encode(images(1)[0]), found.encode(images(2)[0])).confidence == matches.confidence
    views = to_unit_range(images(1)), to_unit_range(images(2, shape=HIGH))
    on_host, on_device = found.infer(*views), found.infer(*views, on_device=True)
    assert on_device.keys() == on_host.keys()
    for name, values in on_device.items():
        assert isinstance(values, cuda.DeviceArray)
        assert values.shape == on_host[name].shape
        np.testing.assert_array_equal(np.asarray(values), on_host[name])


# --- sessions and memory -----------------------------------------------------------------------------------------------------


def test_each_program_is_captured_once(gpu: FakeGpu, engine: CudaEngine) -> None:
    features = engine.encode(images(1))
    for _ in range(3):
        engine.decode(features, features)
        engine.decode(features, features)
    assert [stage for stage, _ in gpu.captures] == ["encoder", "decoder"]


def test_more_memory_drops_the_graphs_and_less_does_not(gpu: FakeGpu, engine: CudaEngine) -> None:
    engine.encode(images(1, 2))
    engine.encode(images(1))
    assert len(gpu.captures) == 2
    features = engine.encode(images(1, 2, 3, 4))  # larger than both
    for batch in (1, 2, 4):
        np.testing.assert_array_equal(np.asarray(engine.encode(images(*range(batch))))[:, 0, 0, 0], range(batch))
    assert [shape[0] for _, shape in gpu.captures] == [2, 1, 4, 1, 2]
    held = sum(map(len, gpu.memory.blocks.values()))
    engine.match_features(features[:1], features[1:2], REQUEST)
    grown = sum(map(len, gpu.memory.blocks.values()))
    assert grown - held < matcher(decoder((WIDE, WIDE), 1)).arena_bytes  # the memory from before is not kept beside


def test_the_matchers_memory_is_there_before_the_decoder_writes(gpu: FakeGpu, engine: CudaEngine) -> None:
    features = engine.encode(images(1))
    engine.decode(features, features)
    engine.match_features(features, features, REQUEST)
    engine.match_features(features, features, REQUEST)
    assert [stage for stage, _ in gpu.captures] == ["encoder", "decoder", "describer"]
    engine.decode(features, features)
    assert [stage for stage, _ in gpu.captures][3:] == ["decoder"]  # again in memory that is enough for both


def test_a_first_match_captures_nothing_twice(gpu: FakeGpu, engine: CudaEngine) -> None:
    for _ in range(2):
        engine.match_images(framed(1), framed(2), REQUEST)
    assert [stage for stage, _ in gpu.captures] == ["encoder", "describer"]


def test_matching_on_takes_no_more_memory(gpu: FakeGpu, engine: CudaEngine) -> None:
    def match_all() -> tuple[int, int]:
        for shape in (WIDE, HIGH):
            for points3d in (False, True):
                engine.match_images(framed(1), framed(2, shape=shape), MatchRequest(8, points3d=points3d))
            features = engine.encode(images(3, shape=shape))
            engine.decode(features, features)
            engine.decode_on_device(features, features)
        gc.collect()
        return len(gpu.memory.blocks), len(gpu.pinned.blocks)

    match_all()
    before = match_all()
    assert [match_all() for _ in range(5)] == [before] * 5


def test_an_engine_frees_everything_with_itself(gpu: FakeGpu) -> None:
    gc.disable()  # at once, not when Python looks for cycles
    try:
        engine = CudaEngine(made_up_files(), manifest())
        engine.match_images(framed(1), framed(2), REQUEST)
        features = engine.encode(images(1))
        del engine
        np.testing.assert_array_equal(np.asarray(features), np.float16(1))
        assert [len(block) for block in gpu.memory.blocks.values() if len(block) == features.nbytes]
        del features
        assert not gpu.memory.blocks
        assert not gpu.pinned.blocks
    finally:
        gc.enable()


def test_threads_get_sessions_of_their_own(gpu: FakeGpu, engine: CudaEngine) -> None:
    together = threading.Barrier(MAX_SESSIONS, timeout=20)
    gpu.meanwhile = lambda: together.wait()

    def work(value: int) -> float:
        return float(np.asarray(engine.encode(images(value)))[0, 0, 0, 0])

    with ThreadPoolExecutor(2 * MAX_SESSIONS) as pool:
        assert list(pool.map(work, range(3 * MAX_SESSIONS))) == list(range(3 * MAX_SESSIONS))
    assert len(gpu.captures) == MAX_SESSIONS
    assert gpu.streams == MAX_SESSIONS + 1  # one loaded the weights


def test_a_session_that_failed_is_not_used_again(gpu: FakeGpu, engine: CudaEngine) -> None:
    engine.encode(images(1))
    gpu.broken = "running on the GPU: an illegal memory access was encountered"
    with pytest.raises(BackendFailed, match="illegal memory access"):
        engine.encode(images(2))
    gpu.broken = ""
    np.testing.assert_array_equal(np.asarray(engine.encode(images(3))), np.float16(3))
    assert len(gpu.captures) == 2


def test_a_session_outlives_bad_input(gpu: FakeGpu, engine: CudaEngine) -> None:
    engine.match_images(framed(1), framed(2), REQUEST)
    captured = len(gpu.captures)
    gpu.refused = "descriptors hold NaN or infinite values"
    with pytest.raises(BadInput, match="NaN"):
        engine.match_images(framed(1), framed(2), REQUEST)
    with pytest.raises(BadInput, match="found 96x64"):
        engine.match_images(framed(1, shape=(64, 96)), framed(2), REQUEST)
    gpu.refused = ""
    engine.match_images(framed(1), framed(2), REQUEST)
    assert len(gpu.captures) == captured


def test_idle_sessions_make_room(gpu: FakeGpu, engine: CudaEngine) -> None:
    together = threading.Barrier(2, timeout=20)
    gpu.meanwhile = lambda: together.wait()
    with ThreadPoolExecutor(2) as pool:
        _ = list(pool.map(lambda value: engine.encode(images(value)), range(2)))
    gpu.meanwhile = lambda: None
    needed = decoder((WIDE, WIDE), 1).arena_bytes
    features = engine.encode(images(1))
    taken = sum(map(len, gpu.memory.blocks.values()))
    arena = encoder(WIDE, 1).arena_bytes
    gpu.memory.limit = taken + needed - 2 * arena  # enough without this session's arena and the other one's
    maps = engine.decode(features, features)
    assert at(maps, "conf1") == 11
    gpu.memory.limit = 0
    with pytest.raises(OutOfMemory, match=r"allocating GPU memory: .* bytes are needed, -?[\d,]+ are free"):
        engine.encode(images(1, 2))
    gpu.memory.limit = 1 << 30  # and the engine goes on working
    np.testing.assert_array_equal(np.asarray(engine.encode(images(1, 2)))[:, 0, 0, 0], [1, 2])


def test_memory_that_the_engine_takes(gpu: FakeGpu, engine: CudaEngine) -> None:
    assert engine.memory_bytes() == 5  # its weights
    engine.encode(images(1))
    assert engine.memory_bytes() == sum(map(len, gpu.memory.blocks.values()))


# --- timing ------------------------------------------------------------------------------------------------------------------


def test_sections_are_timed_on_what_was_run_last(gpu: FakeGpu, engine: CudaEngine) -> None:
    sections = {section.name: section.replay for section in engine.sections(1, WIDE)}
    assert list(sections) == ["encoder", "decoder", "describer", "matcher"]
    for replay in sections.values():
        with pytest.raises(BadInput, match="nothing to be timed on"):
            replay(3)
    engine.encode(images(1, 2))
    gpu.launches.clear()
    assert sections["encoder"](3) == 2  # of 6 seconds, by the stand-in's clock
    assert gpu.launches == [("encoder", 2)] * 3
    with pytest.raises(BadInput, match="the decoder has nothing"):
        sections["decoder"](1)
    for stage, points3d in (("describer", False), ("decoder", True)):
        engine.match_images(framed(1), framed(2), MatchRequest(8, points3d=points3d))
        gpu.launches.clear()
        assert sections["matcher"](2) == 3
        assert sections[stage](1) == 6
        assert [launched for launched, _ in gpu.launches] == ["matcher", "matcher", stage]
    with pytest.raises(BadInput, match="the encoder has nothing"):
        sections["encoder"](1)


def test_nothing_is_timed_in_memory_that_is_new(gpu: FakeGpu, engine: CudaEngine) -> None:
    encode = engine.sections(1, WIDE)[0].replay
    features = engine.encode(images(1, 2))
    held = len(gpu.memory.blocks)
    with pytest.raises(BadInput, match="the decoder has nothing"):
        engine.sections(1, WIDE)[1].replay(1)
    assert len(gpu.memory.blocks) == held  # and the session has not grown for it
    assert encode(1) == 6
    other = cuda.DeviceArray(HostMemory().pool(), (1, *features.shape[1:]), np.float32)
    with pytest.raises(BadInput, match="features2 is float32"):
        engine.match_features(features[:1], other, REQUEST)  # refused once the session has grown
    with pytest.raises(BadInput, match="the encoder has nothing"):
        encode(1)


def in_parts() -> dict[str, memoryview]:
    """The made-up plan with steps in its decoders, of two parts in two lanes."""
    plan = made_up_plan()
    parts = ("decoders", "heads", "decoders", "heads")
    steps = tuple(Step(0, (1 + i, 1, 1), (), part=part, lane=i % 2, waits=(i - 1,) if i else ()) for i, part in enumerate(parts))
    programs = tuple(msgspec.structs.replace(one, steps=steps) if one.stage == "decoder" else one for one in plan.programs)
    return made_up_files() | {"plan.json": memoryview(encode_plan(msgspec.structs.replace(plan, programs=programs)))}


def test_parts_of_a_stage_are_timed_one_launch_after_the_other(gpu: FakeGpu) -> None:
    engine = CudaEngine(in_parts(), manifest())
    sections = {section.name: section.replay for section in engine.sections(1, WIDE)}
    assert list(sections) == ["encoder", "decoder", "decoder/decoders", "decoder/heads", "describer", "matcher"]
    with pytest.raises(BadInput, match="the decoder has nothing to be timed on"):
        sections["decoder/heads"](1)
    for name, numbers in (("decoder", [1, 2, 3, 4]), ("decoder/decoders", [1, 3]), ("decoder/heads", [2, 4])):
        engine.match_images(framed(1), framed(2), MatchRequest(8, points3d=True))
        gpu.steps.clear()
        assert sections[name](2) == 3
        assert [[step.grid[0] for step in steps] for steps in gpu.steps] == [numbers] * 2
        assert name == "decoder" or all(step.lane == 0 and not step.waits for steps in gpu.steps for step in steps)
    with pytest.raises(BadInput, match="the matcher has nothing"):  # the heads by themselves made other maps
        sections["matcher"](1)
    captured = len(gpu.captures)
    assert {section.name: section.replay for section in engine.sections(1, WIDE)}["decoder/heads"](1) == 6
    assert len(gpu.captures) == captured, "captured once"


def test_sections_are_those_of_the_batch(gpu: FakeGpu, engine: CudaEngine) -> None:
    assert [section.name for section in engine.sections(2, HIGH)] == ["encoder", "decoder"]  # pairs are matched one at a time
    assert [section.name for section in engine.sections(8, HIGH)] == []
    assert engine.sections(1, (64, 96)) == []


# --- loading -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights.bin": b"1234"}, r"weights\.bin: 4 bytes, 5 were expected"),
        ({"kernels.bin": b"ab"}, r"kernels\.bin: 2 bytes, 3 were expected"),
        ({"plan.json": b"{}"}, r"plan\.json: "),
        ({"kernels.bin": None}, r"kernels\.bin as well"),
    ],
)
def test_files_that_are_no_plan(gpu: FakeGpu, change: dict[str, bytes | None], message: str) -> None:
    files = made_up_files()
    for name, content in change.items():
        del files[name]
        if content is not None:
            files[name] = memoryview(content)
    with pytest.raises(BundleDamaged, match=message):
        CudaEngine(files, manifest())


def test_the_gpu_is_one_of_the_plans_compute_capability(gpu: FakeGpu) -> None:
    other = msgspec.structs.replace(manifest(), target=TargetInfo(gpu="rtx4090", sm="8.9"))
    with pytest.raises(BundleMismatch, match=r"the plan is for rtx4090 \(sm 8\.9\), and this machine has NVIDIA H200"):
        CudaEngine(made_up_files(), other)


def test_no_memory_for_the_weights(gpu: FakeGpu) -> None:
    gpu.memory.limit = 4
    with pytest.raises(OutOfMemory, match="5 bytes are needed"):
        CudaEngine(made_up_files(), manifest())


# --- on hardware -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_bundle(module_tmp_path: Path) -> Path:
    """The tiny model for this machine's GPU, two pairs at once."""
    here = cuda.devices()[0].sm
    target = next((target.name for target in TARGETS.values() if target.sm == here), None)
    if target is None:
        pytest.skip(f"no target has this GPU's compute capability, {here}")
    pytest.importorskip("triton")
    config = str(DATA / "tiny_landscape.config.json")
    request = BuildRequest(
        gpu=target, backend="cuda", out=module_tmp_path / "bundle", random_seed=0, model=config, shapes=TINY_SHAPES, max_batch=2
    )
    return build(request).path


@pytest.fixture(scope="module")
def gpu_matcher(gpu_bundle: Path) -> smc.Matcher:
    return smc.load(gpu_bundle)


def scene(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """A smooth image under noise, uint8."""
    height, width = shape
    y, x = np.mgrid[:height, :width][..., None] / 16
    waves = 90 * np.sin(x + seed + np.arange(3)) * np.cos(y - seed)
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
    return np.clip(128 + waves + noise, 0, 255).astype(np.uint8)


PAIRS = [(one, other) for one in TINY_SHAPES for other in TINY_SHAPES]


def same(one: smc.Matches, other: smc.Matches) -> bool:
    first, second = one.arrays(), other.arrays()
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", PAIRS, ids=str)
def test_maps_are_those_of_onnxruntime(gpu_matcher: smc.Matcher, tiny_matcher: smc.Matcher, shapes: tuple[Any, Any]) -> None:
    views = [to_unit_range(scene(i, shape)[None]) for i, shape in enumerate(shapes)]
    found, wanted = gpu_matcher.infer(*views), tiny_matcher.infer(*views)
    assert found.keys() == wanted.keys()
    tolerance = gpu_matcher.manifest.verification.tolerance.relative
    for name, values in wanted.items():
        assert found[name].dtype == np.float32
        assert relative_error(found[name], values) < tolerance, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SIZES, "12 megapixels"])
def test_images_are_resized_as_pillow_does(gpu_matcher: smc.Matcher, name: str) -> None:
    """To the last bit: features of an image are those of what Pillow makes of it."""
    scale = 1 if name == "12 megapixels" else 3
    width, height = (scale * side for side in SIZES.get(name, (4000, 3000)))
    image, shapes = scene(1, (height, width)), gpu_matcher.manifest.input_shapes
    engine: Any = gpu_matcher._engine
    found, wanted = engine.encode_image(load_framed(image, shapes)), engine.encode(load_view(image, shapes).rgb[None])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"pixel_tol": 5}, {"both_ways": True}], ids=str)
def test_matches_are_those_of_the_maps(gpu_matcher: smc.Matcher, options: dict[str, Any]) -> None:
    """Matching on the GPU is exact: NumPy finds the same on the maps that the plan gives."""
    total = 0
    for shapes in PAIRS[:4]:
        one, other = (scene(i, shape) for i, shape in enumerate(shapes))
        found = gpu_matcher.match(one, other, points3d=True, **options)
        engine: Any = gpu_matcher._engine
        tokens = [engine.encode(np.stack([image])) for image in (one, other)]
        if one.shape == other.shape:  # as `match` does, in one batch
            both = engine.encode(np.stack([one, other]))
            tokens = [both[:1], both[1:]]
        wanted = gpu_matcher._match_on_host(*tokens, MatchRequest(8, options.get("pixel_tol", 0), options.get("both_ways", False), True))
        np.testing.assert_array_equal(found.keypoints0, wanted.xy1)
        np.testing.assert_array_equal(found.keypoints1, wanted.xy2)
        np.testing.assert_array_equal(found.confidence, wanted.confidence)
        np.testing.assert_array_equal(found.points0, wanted.points1)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.points1, wanted.points2)  # type: ignore[arg-type]
        total += len(found)
    assert total


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", PAIRS[:4], ids=str)
def test_points_change_no_match(gpu_matcher: smc.Matcher, shapes: tuple[Any, Any]) -> None:
    """With points all of the decoder runs, and without them what the matches need."""
    pair = [scene(i, shape) for i, shape in enumerate(shapes)]
    plain, with_points = gpu_matcher.match(*pair), gpu_matcher.match(*pair, points3d=True)
    assert len(plain.confidence) > 0
    for name in ("keypoints0", "keypoints1", "confidence"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(with_points, name))


@pytest.mark.gpu
def test_batches_give_what_single_pairs_give(gpu_matcher: smc.Matcher) -> None:
    """Three pairs, as two and one."""
    engine: Any = gpu_matcher._engine
    sides = [np.stack([scene(10 * side + i, TINY_SHAPES[0]) for i in range(3)]) for side in (1, 2)]
    maps = engine.decode(*(engine.encode(side) for side in sides))
    for pair in range(3):
        single = engine.decode(*(engine.encode(side[pair : pair + 1]) for side in sides))
        for name, values in single.items():
            assert relative_error(maps[name][pair], values[0]) < gpu_matcher.manifest.verification.tolerance.relative


@pytest.mark.gpu
def test_threads_at_once_give_the_same_bits_as_one_after_another(gpu_matcher: smc.Matcher) -> None:
    jobs = [(scene(i, shapes[0]), scene(i + 1, shapes[1])) for i, shapes in enumerate(PAIRS)]

    def run(job: tuple[Any, Any]) -> smc.Matches:
        return gpu_matcher.match(*job, points3d=True)

    in_series = list(map(run, jobs))
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(run, jobs * 3))
    assert all(same(one, other) for one, other in zip(in_series * 3, at_once, strict=True))


@pytest.mark.gpu
def test_two_hundred_matches_take_no_more_memory(gpu_matcher: smc.Matcher) -> None:
    engine: Any = gpu_matcher._engine
    jobs = [(scene(i, shapes[0]), scene(i + 1, shapes[1])) for i, shapes in enumerate(PAIRS)]
    for job in jobs:
        gpu_matcher.match(*job, points3d=True)
    before = engine.memory_bytes()
    for i in range(200):
        gpu_matcher.match(*jobs[i % len(jobs)], points3d=True)
    gc.collect()
    assert engine.memory_bytes() - before <= 4 << 20


@pytest.mark.gpu
def test_loading_again_and_again_takes_no_more_memory(gpu_bundle: Path) -> None:
    def free() -> int:
        matcher = smc.load(gpu_bundle)
        matcher.match(scene(0, TINY_SHAPES[0]), scene(1, TINY_SHAPES[0]))
        del matcher
        gc.collect()
        with cuda.on_device(cuda.devices()[0].index):
            return cuda.free_memory()

    free()
    before = free()
    for _ in range(3):
        left = free()
    assert before - left < 16 << 20  # its weights are 90 MB


@pytest.mark.gpu
def test_maps_on_the_gpu_are_read_in_place(gpu_matcher: smc.Matcher) -> None:
    views = [to_unit_range(scene(i, TINY_SHAPES[i])[None]) for i in range(2)]
    on_host, on_device = gpu_matcher.infer(*views), gpu_matcher.infer(*views, on_device=True)
    readers: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [(lambda array: array, np.asarray)]
    try:
        import torch

        if torch.cuda.is_available():
            readers += [(torch.from_dlpack, lambda seen: seen.cpu().numpy()), (torch.as_tensor, lambda seen: seen.cpu().numpy())]
    except ImportError:
        pass
    try:
        import cupy

        readers += [(cupy.from_dlpack, cupy.asnumpy), (cupy.asarray, cupy.asnumpy)]
    except ImportError:
        pass
    for name, values in on_device.items():
        for read, to_host in readers:
            np.testing.assert_array_equal(to_host(read(values)), on_host[name])


@pytest.mark.gpu
def test_sections_take_time(gpu_matcher: smc.Matcher) -> None:
    engine: Any = gpu_matcher._engine
    shape = TINY_SHAPES[0]
    one, other = scene(0, shape), scene(1, shape)
    for section in engine.sections(1, shape):
        if section.name == "encoder":
            engine.encode(np.stack([one, other]))
        else:
            gpu_matcher.match(one, other, points3d=section.name.startswith("decoder"))
        assert 1e-6 < section.replay(5) < 1
