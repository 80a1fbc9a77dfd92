"""Times, errors and memory of the torch model: the peers, and the first steps of the ablation."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smc.compiler.bench import records
from smc.compiler.bench.inputs import ImagePair, grid_matches, image_pairs, view_pairs
from smc.compiler.bench.records import Memory, Result, Shape, Timing
from smc.compiler.bench.references import check_accuracy
from smc.compiler.bench.sampling import RUNS, sample, wall
from smc.compiler.bench.tasks import TorchTask, WeightsTask
from smc.compiler.bench.torch_matching import pixel_confidence, reciprocal_matches
from smc.compiler.bench.torch_network import TorchNetwork
from smc.compiler.bench.variants import VARIANTS
from smc.compiler.config import ModelConfig
from smc.exported.errors import UsageError
from smc.exported.images import PATCH, View

Found = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Of each pair, the pixels in either image that match."""


def write_weights(task: WeightsTask) -> None:
    from smc.compiler.checkpoint import load_checkpoint, random_weights

    if task.checkpoint is not None:
        weights = load_checkpoint(Path(task.checkpoint))
        if weights.sha256 != task.sha256:
            raise UsageError(f"{task.checkpoint} is not the checkpoint that the bundle was built from")
    else:
        assert task.seed is not None
        weights = random_weights(ModelConfig.from_fields(task.config), task.seed)
    torch.save(weights.tensors, task.out)


def measure_torch(task: TorchTask, result: Result, save: Callable[[], None]) -> None:
    """Measure a variant of the torch model. `save` keeps what `result` holds so far."""
    device = torch.device(task.on)
    result.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result.versions = {"torch": str(torch.__version__)}
    torch.zeros(1, device=device)  # the context, which is not counted
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else None
    network = TorchNetwork(ModelConfig.from_fields(task.config), task.weights, VARIANTS[task.variant], device)
    work = task.work
    for shape in work.shapes:
        pairs = image_pairs(work.seed, shape, max(work.batches))
        for batch in work.batches:
            _measure_batch(_Batch(network, shape, pairs[:batch]), task, result)
            used = None if free is None else free - torch.cuda.mem_get_info()[0]
            result.memory.append(Memory(shape, batch, used, None, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            save()


class _Batch:
    """The stages for one batch, each as a call that works on what the stage before it gives."""

    def __init__(self, network: TorchNetwork, shape: Shape, pairs: list[ImagePair]) -> None:
        self.network, self.shape, self.pairs, self.size = network, shape, pairs, len(pairs)
        self.rows, self.cols = shape[0] // PATCH, shape[1] // PATCH
        network.prepare(self.rows, self.cols)

    def image_in(self) -> list[tuple[View, View]]:
        return view_pairs(self.pairs, self.shape)

    def stack(self, views: list[tuple[View, View]]) -> NDArray[np.uint8]:
        """All first images, then all second ones."""
        return np.stack([pair[i].rgb for i in (0, 1) for pair in views])

    def encode(self, rgb: Tensor) -> Tensor:
        return self.network.encode(rgb)

    def decode(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.network.decode(features[: self.size], features[self.size :])

    def heads(self, levels: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
        return self.network.heads(*levels, self.rows, self.cols)

    def maps(self, rgb: Tensor) -> dict[str, Tensor]:
        self.network.begin()
        return self.heads(self.decode(self.encode(rgb)))

    def matching(self, maps: dict[str, Tensor]) -> Found:
        found = []
        for i in range(self.size):
            xy1, xy2 = reciprocal_matches(maps["desc1"][i], maps["desc2"][i])
            pixel_confidence(xy1, xy2, maps["desc_conf1"][i], maps["desc_conf2"][i])
            found.append((xy1, xy2))
        return found

    def matches_out(self, views: list[tuple[View, View]], found: Found) -> None:
        for pair, sides in zip(views, found, strict=True):
            for view, xy in zip(pair, sides, strict=True):
                view.framing.to_image(xy)

    def end_to_end(self) -> None:
        views = self.image_in()
        maps = self.maps(self.network.upload(self.stack(views)))
        self.matches_out(views, self.matching(maps))


def _measure_batch(batch: _Batch, task: TorchTask, result: Result) -> None:
    network, work = batch.network, task.work
    views = batch.image_in()
    images = batch.stack(views)
    start = time.perf_counter()
    rgb = network.upload(images)
    maps = batch.maps(rgb)
    network.synchronize()
    if result.first_result is None:
        result.first_result = time.perf_counter() - start
    for _ in range(2):  # CUDA graphs are replayed from the third run on: those outputs are compared
        maps = batch.maps(rgb)
    result.accuracy += check_accuracy(work, batch.shape, batch.size, {name: value.float().cpu().numpy() for name, value in maps.items()})

    # Copies, since a compiled stage's outputs are overwritten by its next run.
    network.begin()
    features = batch.encode(rgb).clone()
    network.begin()
    side1, side2 = batch.decode(features)
    levels = ([level.clone() for level in side1], [level.clone() for level in side2])
    network.begin()
    maps = {name: value.clone() for name, value in batch.heads(levels).items()}
    found = [(grid_matches(batch.shape),) * 2] * batch.size

    def encode() -> None:
        network.begin()
        batch.encode(rgb)

    def upload_and_encode() -> None:  # as a plan's encoder: from images in the host's memory
        network.begin()
        batch.encode(network.upload(images))

    def decode() -> None:
        network.begin()
        batch.decode(features)

    def heads() -> None:
        network.begin()
        batch.heads(levels)

    def add(clock: records.Clock, stage: str, run: Callable[[], float]) -> None:
        result.timings.append(Timing(batch.shape, batch.size, clock, stage, sample(run, work.repeat)))

    add("wall", records.IMAGE_IN, wall(batch.image_in))
    add("wall", records.ENCODER, wall(upload_and_encode, network.synchronize))
    add("wall", records.DECODERS, wall(decode, network.synchronize))
    add("wall", records.HEADS, wall(heads, network.synchronize))
    add("wall", records.MATCHING, wall(lambda: batch.matching(maps), network.synchronize))
    add("wall", records.MATCHES_OUT, wall(lambda: batch.matches_out(views, found)))
    add("wall", records.END_TO_END, wall(batch.end_to_end, network.synchronize))
    if network.device.type == "cuda":
        add("device", records.ENCODER, lambda: _device_seconds(encode))
        add("device", records.DECODERS, lambda: _device_seconds(decode))
        add("device", records.HEADS, lambda: _device_seconds(heads))


def _device_seconds(run: Callable[[], object]) -> float:
    """Seconds of one run by the GPU's events, runs queued one after the other."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(RUNS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / RUNS
