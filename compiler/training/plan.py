"""The curriculum, as a function of the share of a run that is over, so that a run of any length goes through all of it; only the
learning rate's warm-up counts steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smc.compiler.scenes.draw import Difficulty

Shape = tuple[int, int]
"""(H, W) in pixels."""


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        until: the share of the run that is over at its end.
        shapes: taken in turn, step by step.
        pairs: a step.
        correspondences: a pair.
    """

    until: float
    shapes: tuple[Shape, ...]
    pairs: int
    correspondences: int


SMALL, LARGE = (192, 256), (384, 512)

PHASES = (
    Phase(until=0.7, shapes=(SMALL, SMALL, SMALL, SMALL[::-1]), pairs=128, correspondences=1024),
    Phase(until=1.0, shapes=(LARGE, LARGE, LARGE, LARGE[::-1]), pairs=32, correspondences=2048),
)
"""Most of the run at a quarter of the pixels, so four times the pairs: what a wide baseline looks like is learnt there. Then the
size that the model is used at; rotary embeddings carry over, descriptors must get used to finer texture and longer distances. A
step costs the same in both phases. One step in four is portrait."""

EASY_UNTIL, EASY_ANGLE, EASY_OVERLAP = 0.15, 15.0, 0.5
"""Views start 15 degrees apart with half of each image shared, where copying from the same place is nearly right, and reach the full
difficulty when 15% of the run is over."""

PEAK_LR, WARM_UP_STEPS, FINAL_LR = 1e-3, 200, 0.01
"""The learning rate rises to its peak over 200 steps, or the first tenth of a run of fewer than 2000, and falls along a cosine to 1% of
it at the end."""


def phase_at(progress: float, phases: tuple[Phase, ...]) -> Phase:
    return next((phase for phase in phases if progress < phase.until), phases[-1])


def difficulty_at(progress: float) -> Difficulty:
    hardest = Difficulty()
    ease = max(0.0, 1 - progress / EASY_UNTIL)
    return Difficulty(
        view_angle=hardest.view_angle + ease * (EASY_ANGLE - hardest.view_angle),
        overlap=(hardest.overlap[0] + ease * (EASY_OVERLAP - hardest.overlap[0]), hardest.overlap[1]),
    )


def lr_at(progress: float, step: int, steps: int | None) -> float:
    """Of a step, counted from 0; `steps` is the run's length where it goes by steps, None where it goes by time."""
    # By steps, not by the share of the run: compilation takes a good part of a short run's first minute.
    warm_up = WARM_UP_STEPS if steps is None else min(WARM_UP_STEPS, max(1, steps // 10))
    warm = min((step + 1) / warm_up, 1.0)
    return PEAK_LR * warm * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
