"""The ways to run the torch model that are measured. Needs no torch, so that the report can name what is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """A way to run the torch model.

    Attributes:
        name, title: see `records.Contestant`.
        precision: "float32", strictly; "tf32": float32 whose products may be rounded to TF32, as the original is shipped;
            "autocast": float16 by torch's rules, heads in TF32, as the original's `amp` option; "float16": weights and all.
        flash: torch's fused attention in place of products and a softmax.
        compile: a mode of `torch.compile`, None for eager. "reduce-overhead" replays CUDA graphs.
    """

    name: str
    title: str
    precision: Literal["float32", "tf32", "autocast", "float16"]
    flash: bool = False
    compile: Literal["default", "reduce-overhead"] | None = None


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("eager-float32", "torch, strict float32", "float32"),
        Variant("eager-tf32", "torch, TF32 (the original as shipped)", "tf32"),
        Variant("eager-autocast", "torch, autocast float16", "autocast"),
        Variant("eager-float16", "torch, all float16, fused attention, channels_last", "float16", flash=True),
        Variant("compile", "torch.compile, autocast float16, fused attention", "autocast", flash=True, compile="default"),
        Variant(
            "compile-graphs",
            "torch.compile with CUDA graphs, autocast float16, fused attention",
            "autocast",
            flash=True,
            compile="reduce-overhead",
        ),
        Variant(
            "compile-graphs-float16",
            "torch.compile with CUDA graphs, all float16, fused attention, channels_last",
            "float16",
            flash=True,
            compile="reduce-overhead",
        ),
        Variant("eager-float32-flash", "torch, strict float32, fused attention", "float32", flash=True),
    )
}

REFERENCE = "eager-float32"
"""What errors are measured against."""

ABLATION_ONLY = ("eager-float32-flash",)
