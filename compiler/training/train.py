"""The training loop."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from smc.compiler.checkpoint import load_checkpoint
from smc.compiler.config import ModelConfig
from smc.compiler.model import Mast3r
from smc.compiler.output_files import writing
from smc.compiler.packages import require_packages
from smc.compiler.scenes import photographs
from smc.compiler.scenes.draw import Difficulty
from smc.compiler.scenes.geometry import pixel_grid
from smc.compiler.scenes.pairs import HELD_OUT_SEED, PairBatch, draw_batch
from smc.compiler.scenes.textures import Textures, draw_textures
from smc.compiler.training.losses import MATCHING_WEIGHT, at_pixels, draw_correspondences, matching_loss, points_loss
from smc.compiler.training.network import compile_parts, forward, initialise, trainable_functions
from smc.compiler.training.plan import PHASES, Phase, Shape, difficulty_at, lr_at, phase_at
from smc.compiler.training.state import RECORD, append_log, load_state, machine, save_model, save_state, write_json
from smc.exported.errors import BadInput, NoTarget, UsageError

WEIGHT_DECAY, BETAS, LARGEST_GRADIENT = 0.05, (0.9, 0.95), 1.0

AVERAGE_OVER = 1000
"""Steps over which the weights are averaged; what is written and evaluated is the average, which is steadier than the last step's."""

CHECKED_PIXELS = 3.0
"""A match is right if it is this near to the truth."""

STEP_BITS = 28
"""Of a draw's seed; the run's seed is above them."""

SEEDS = HELD_OUT_SEED >> STEP_BITS
"""Seeds of runs: the draws of larger ones would be those of the held-out scenes."""

GRID_STEP = 16
"""Of the points whose matches are checked, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A run.

    Attributes:
        out: its folder; a run that was cut goes on from what is there.
        config: the model.
        photographs: packed photographs, `training` and `held-out`; None for textures of noise alone.
        minutes: length of the run, start-up and earlier parts included; None to go by `steps`.
        steps: its length where there is no time limit.
        start: a checkpoint's folder, whose weights the run begins with; then views are far apart from the first step. None for
            random weights.
        seed: of the random weights and of every step's scenes.
        device: "cuda" or "cpu".
        compile: whether to compile the network.
        phases: the curriculum.
        textures, texture_side: how many are in use at a time, and their size.
        refresh: steps after which new textures are drawn.
        save_minutes, evaluate_steps, log_steps: how often.
        evaluated: pairs of the fixed held-out batch.

    Raises UsageError for a length that is none, and for a seed that is out of range.
    """

    out: Path
    config: ModelConfig
    photographs: Path | None
    minutes: float | None = None
    steps: int | None = None
    start: Path | None = None
    seed: int = 0
    device: str = "cuda"
    compile: bool = True
    phases: tuple[Phase, ...] = PHASES
    textures: int = 384
    texture_side: int = 512
    refresh: int = 200
    save_minutes: float = 2.0
    evaluate_steps: int = 1000
    log_steps: int = 25
    evaluated: int = 64

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise UsageError("a run is limited by minutes or by steps, one of the two")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"a run of {self.minutes} minutes: a finite number above 0 was expected")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"a run of {self.steps} steps: at least 1 was expected")
        if not self.save_minutes >= 0:
            raise UsageError(f"to save every {self.save_minutes} minutes: 0 or more was expected")
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"the seed {self.seed} is not from 0 to {SEEDS - 1}, whose scenes are for training")


class Run:
    """One run, from its start or from where it was cut."""

    def __init__(self, options: Options, started: float | None = None) -> None:
        """`started`: the `time.monotonic` from which this part of the run is counted.

        Raises:
            NoTarget: there is no GPU, or no Triton to use it.
            CannotWrite, DiskError: the folder cannot be made.
            InputMissing, BadImage: the photographs are absent or cannot be read.
            BadInput: the folder holds another run, or the checkpoint to start with another model.
            And what `load_checkpoint` raises.
        """
        if options.device == "cuda":
            if not torch.cuda.is_available():
                raise NoTarget("torch finds no GPU to train on", fix="to try it out on the CPU: --device cpu")
            require_packages("training on a GPU", ("triton",))
        self.options = options
        self.device = torch.device(options.device)
        self._started = time.monotonic() if started is None else started
        with writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            # Of convolutions alone: rays and projections are products, and TF32 would move them by a fifth of a pixel.
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True

        torch.manual_seed(options.seed)
        network = Mast3r(options.config)
        initialise(network)
        self._origin: dict[str, Any] | None = None
        if options.start is not None:
            self._origin = self._begin_with(options.start, network)
        self.network = network.to(self.device)
        self.average = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            betas=BETAS,
            fused=self.device.type == "cuda",
        )
        self.step, self.pairs, self._earlier, self.skipped = 0, 0, 0.0, 0
        self._resume()
        if options.compile:
            compile_parts(self.network)

        folder = options.photographs
        self._photographs = None if folder is None else photographs.load(folder / "training", self.device)
        self._textures: tuple[int, Textures] | None = None
        self._drawn: tuple[int, PairBatch] | None = None
        self._held_out: dict[Shape, PairBatch] = {}
        # Scenes are drawn on a stream of their own: their making overlaps with training, and waiting for it does not wait for that.
        self._stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    @property
    def elapsed(self) -> float:
        """Seconds, earlier parts included."""
        return self._earlier + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """The share of the run that is over."""
        options = self.options
        return self.elapsed / (60 * options.minutes) if options.minutes is not None else self.step / (options.steps or 1)

    def train(self, say: Callable[[str], None] = print, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end, or `stop_after` steps from here, and return the record that is then in `training.json`."""
        options = self.options
        last = None if stop_after is None else self.step + stop_after
        saved = time.monotonic()
        with trainable_functions(self.device):
            batch = self._draw(self.step)
            while self.progress < 1 and self.step != last:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr_at(self.progress, self.step, options.steps)
                losses = self._backward(batch)
                self.pairs += len(batch.overlap)
                batch = self._draw(self.step + 1)  # while the GPU works on this one
                self._update(losses)
                self.step += 1
                if self.step % options.log_steps == 0:
                    self._log(losses, say)
                if self.step % options.evaluate_steps == 0 and self.progress < 1:
                    self._evaluate(say)
                if time.monotonic() - saved > 60 * options.save_minutes:
                    self.save()
                    saved = time.monotonic()
            metrics = self._evaluate(say)
        return self.save(metrics)

    def save(self, metrics: dict[str, float] | None = None) -> dict[str, Any]:
        """Write everything there is to the run's folder."""
        options = self.options
        size = save_model(options.out, options.config, self.average)
        record = {
            "seed": options.seed,
            "start": self._origin,
            "steps": self.step,
            "pairs": self.pairs,
            "minutes": round(self.elapsed / 60, 2),
            "skipped_steps": self.skipped,
            **machine(self.device),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "weights_bytes": size,
            "photographs": 0 if self._photographs is None else len(self._photographs),
            "phases": [dataclasses.asdict(phase) for phase in options.phases],
            "held_out": metrics,
        }
        write_json(options.out / RECORD, record)
        save_state(
            options.out,
            {
                "config": options.config.to_json(),
                "seed": options.seed,
                "start": self._origin,
                "step": self.step,
                "pairs": self.pairs,
                "elapsed": self.elapsed,
                "skipped": self.skipped,
                "network": self.network.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
            },
        )
        return record

    def _resume(self) -> None:
        state = load_state(self.options.out, self.device)
        if state is None:
            return
        own = {"config": self.options.config.to_json(), "seed": self.options.seed, "start": self._origin}
        if any(state.get(name) != value for name, value in own.items()):
            raise BadInput(
                f"{self.options.out} holds a run of another model, seed or start",
                fix="give another --out, or that run's own --model, --seed and --start",
            )
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.pairs, self.skipped, self._earlier = (state[name] for name in ("step", "pairs", "skipped", "elapsed"))

    def _begin_with(self, folder: Path, network: Mast3r) -> dict[str, Any]:
        """Load a checkpoint into the network. Returns what the record says of it: its sum, and its own record where it has one."""
        weights = load_checkpoint(folder)
        if weights.config != self.options.config:
            raise BadInput(f"{folder} holds another model", fix="give the --model that it was trained as")
        network.load_state_dict(weights.tensors)
        record = folder / RECORD
        return {"sha256": weights.sha256, "training": json.loads(record.read_text()) if record.exists() else None}

    def _generator(self, seed: int) -> Generator:
        return Generator(self.device).manual_seed(seed)

    def _seed(self, step: int, purpose: int) -> int:
        """Of one step's draws: a run that goes on draws what it would have drawn."""
        return (self.options.seed << STEP_BITS) + 4 * step + purpose

    def _draw(self, step: int) -> PairBatch:
        if self._stream is None:
            return self._draw_now(step)
        with torch.cuda.stream(self._stream):
            return self._draw_now(step)

    def _draw_now(self, step: int) -> PairBatch:
        """Every pair serves two steps running, the second time the other way round: to the model, whose views differ, another pair."""
        first = step - step % 2
        if self._drawn is None or self._drawn[0] != first:
            self._drawn = first, self._draw_new(first)
        return self._drawn[1] if step == first else self._drawn[1].swapped()

    def _draw_new(self, step: int) -> PairBatch:
        options = self.options
        epoch = step // options.refresh
        if self._textures is None or self._textures[0] != epoch:
            generator = self._generator(self._seed(epoch, 1))
            self._textures = epoch, draw_textures(generator, self._photographs, options.textures, options.texture_side)
        phase = phase_at(self.progress, options.phases)
        height, width = phase.shapes[step // 2 % len(phase.shapes)]
        generator = self._generator(self._seed(step, 0))
        return draw_batch(generator, self._textures[1], phase.pairs, height, width, self._difficulty(), options.compile)

    def _difficulty(self) -> Difficulty:
        return difficulty_at(self.progress) if self.options.start is None else Difficulty()

    def _backward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Gradients of one batch; the losses."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            for tensor in _tensors(batch):
                tensor.record_stream(torch.cuda.current_stream())
        # By the batch's own size: time may have moved the run into its next phase since it was drawn.
        phase = next(phase for phase in self.options.phases if batch.shape in phase.shapes)
        first, second, real = draw_correspondences(self._generator(self._seed(self.step, 2)), batch, phase.correspondences)
        self.optimizer.zero_grad(set_to_none=True)
        maps = forward(self.network, batch.images)
        points, distance = points_loss((maps["pts3d1"], maps["pts3d2"]), (maps["conf1"], maps["conf2"]), batch.points, batch.valid)
        matching, nce = matching_loss(
            at_pixels(maps["desc1"], first),
            at_pixels(maps["desc2"], second),
            at_pixels(maps["desc_conf1"][..., None], first)[..., 0],
            at_pixels(maps["desc_conf2"][..., None], second)[..., 0],
            (first, second),
            real,
        )
        total = points + MATCHING_WEIGHT * matching
        total.backward()
        return {"loss": total.detach(), "points": points.detach(), "distance": distance, "matching": matching.detach(), "nce": nce}

    def _update(self, losses: dict[str, Tensor]) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        losses["gradient"] = norm
        if not torch.isfinite(norm):
            self.skipped += 1
            return
        self.optimizer.step()
        # The first steps' average forgets faster, or it would hold on to the random start.
        share = max(1 / AVERAGE_OVER, 9 / (self.step + 10))
        weights = self.network.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], share)

    def _log(self, losses: dict[str, Tensor], say: Callable[[str], None]) -> None:
        entry = {
            "step": self.step,
            "pairs": self.pairs,
            "seconds": round(self.elapsed, 2),
            "progress": round(self.progress, 4),
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: round(float(value), 5) for name, value in losses.items()},
        }
        append_log(self.options.out, entry)
        say(" ".join(f"{name} {value:g}" for name, value in entry.items()))

    def _evaluate(self, say: Callable[[str], None]) -> dict[str, float]:
        """Of the averaged weights, on the fixed held-out batch of the present phase's first shape."""
        shape = phase_at(min(self.progress, 1.0), self.options.phases).shapes[0]
        if shape not in self._held_out:
            self._held_out[shape] = self._draw_held_out(shape)
        own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            # Compiled parts would be compiled anew for these shapes and for running without gradients.
            with torch.compiler.set_stance("force_eager"):
                metrics = evaluate(self.network, self._held_out[shape])
        finally:
            self.network.load_state_dict(own)
        append_log(self.options.out, {"step": self.step, "seconds": round(self.elapsed, 2), "shape": list(shape), **metrics})
        say(f"step {self.step}, held out at {shape[1]}x{shape[0]}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def _draw_held_out(self, shape: Shape) -> PairBatch:
        options = self.options
        folder = options.photographs
        held_out = None if folder is None else photographs.load(folder / "held-out", self.device)
        generator = self._generator(HELD_OUT_SEED)
        textures = draw_textures(generator, held_out, min(options.textures, 128), options.texture_side)
        return draw_batch(generator, textures, options.evaluated, *shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@torch.no_grad()
def evaluate(network: Mast3r, batch: PairBatch) -> dict[str, float]:
    """Of a batch: the share of a grid's visible points whose most similar descriptor in all of image 2 is within `CHECKED_PIXELS` of
    the truth ("recall"), the median distance in pixels, and the mean normalised distance of 3D points."""
    height, width = batch.shape
    pairs = len(batch.overlap)
    xy = pixel_grid(height, width, max(1, height // GRID_STEP), max(1, width // GRID_STEP), batch.overlap.device).round()
    xy = xy.expand(pairs, -1, -1)
    truth, visible = batch.warp(xy)
    index = (xy[..., 1] * width + xy[..., 0]).long()
    errors, distances = [], []
    for start in range(0, pairs, 16):
        part = slice(start, start + 16)
        maps = forward(network, (batch.images[0][part], batch.images[1][part]))
        _, distance = points_loss(
            (maps["pts3d1"], maps["pts3d2"]),
            (maps["conf1"], maps["conf2"]),
            (batch.points[0][part], batch.points[1][part]),
            (batch.valid[0][part], batch.valid[1][part]),
        )
        distances.append(distance)
        for i in range(len(maps["desc1"])):
            best = (at_pixels(maps["desc1"][i : i + 1], index[:1])[0] @ maps["desc2"][i].flatten(0, 1).T).argmax(1)
            found = torch.stack([best % width, best // width], dim=-1).float()
            errors.append((found - truth[start + i]).norm(dim=-1)[visible[start + i]])
    error = torch.cat(errors)
    return {
        "recall": float((error <= CHECKED_PIXELS).float().mean()),
        "median_pixels": float(error.median()),
        "distance": float(torch.stack(distances).mean()),
    }
