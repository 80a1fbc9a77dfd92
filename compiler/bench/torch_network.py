"""The torch model as its users run it: precisions, attentions and compilers, in three stages that can be timed one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smc.compiler import model
from smc.compiler.bench.variants import Variant
from smc.compiler.config import ModelConfig

Levels = tuple[list[Tensor], list[Tensor]]
"""The tokens that the heads read, of either view."""

MOST_SHAPES = 64
"""Shapes and batches for which a stage is compiled; beyond torch's own limit of 8 it would quietly run without the compiler."""


class TorchNetwork:
    """The model on one device in one variant. Owns its process: it sets torch's switches and exchanges functions of `model`."""

    def __init__(self, config: ModelConfig, weights: str, variant: Variant, device: torch.device) -> None:
        """`weights` is a state dict in float32, as `torch.save` writes it."""
        self.config, self.variant, self.device = config, variant, device
        half = variant.precision == "float16"
        with torch.device("meta"):
            network = model.Mast3r(config)
        network.load_state_dict(torch.load(weights, map_location="cpu", mmap=True, weights_only=True), assign=True)
        self.network = network.eval().requires_grad_(False).to(device, torch.float16 if half else torch.float32)
        if half:
            for head in (network.downstream_head1, network.downstream_head2):
                head.dpt.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        _set_precision(tf32=variant.precision in ("tf32", "autocast"))
        # The original leaves cuDNN's choice to rules; who tunes torch has it time its kernels.
        torch.backends.cudnn.benchmark = half or variant.compile is not None
        _keep_tables(device, torch.float16 if half else torch.float32)
        if variant.flash:
            model.attention = _fused_attention
        # Not as a decorator of the stages: they would be one function to the compiler, which compiles a function a few times only.
        torch.set_grad_enabled(False)
        self._image_type = torch.float16 if half else torch.float32
        self.encode: Callable[[Tensor], Tensor] = self._stage(self._encode)
        self.decode: Callable[[Tensor, Tensor], Levels] = self._stage(self._decode)
        self.heads: Callable[[list[Tensor], list[Tensor], int, int], dict[str, Tensor]] = self._stage(self._heads)

    def prepare(self, rows: int, cols: int) -> None:
        """Make the rotation tables of a token grid: were they made in a compiled stage, its second run would compile it again."""
        config = self.config
        for dim, heads in ((config.enc_embed_dim, config.enc_num_heads), (config.dec_embed_dim, config.dec_num_heads)):
            model.rope_2d(rows, cols, dim // heads, config.rope_base)

    def upload(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(images).to(self.device)

    def begin(self) -> None:
        """Before every pair: CUDA graphs may now overwrite what the last one gave."""
        if self.variant.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.variant.compile is None:
            return function
        import torch._dynamo

        torch._dynamo.config.recompile_limit = MOST_SHAPES
        # Every shape and batch is compiled for itself, as it would be by who cares for speed.
        return torch.compile(function, mode=self.variant.compile, dynamic=False)

    def _autocast(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        if self.variant.precision != "autocast":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16, enabled=enabled)

    def _encode(self, rgb: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) on the device -> features (B, h, w, C)."""
        image = (rgb.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        with self._autocast(True):
            return self.network.encode(image.to(self._image_type))

    def _decode(self, features1: Tensor, features2: Tensor) -> Levels:
        with self._autocast(True):
            tokens1, tokens2 = self.network.decode_tokens(features1, features2)
        levels = self.config.dpt_hooks
        return [tokens1[i] for i in levels], [tokens2[i] for i in levels]

    def _heads(self, levels1: list[Tensor], levels2: list[Tensor], rows: int, cols: int) -> dict[str, Tensor]:
        """The eight maps of `model.Mast3r.decode`."""
        # The heads read levels by their place among all tokens; here they are already picked out.
        maps: dict[str, Tensor] = {}
        with self._autocast(False):
            for view, head, levels in ((1, self.network.downstream_head1, levels1), (2, self.network.downstream_head2, levels2)):
                if self.variant.precision == "autocast":
                    levels = [level.float() for level in levels]
                maps |= {f"{name}{view}": value for name, value in head(levels, rows, cols).items()}
        return maps


def _set_precision(tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def _keep_tables(device: torch.device, dtype: torch.dtype) -> None:
    """Have the model take its rotation tables from the device, where it was written to make them anew, on the CPU, for export."""
    tables: dict[tuple[int, int, int, float], model.Rotation] = {}
    make = model.rope_2d

    def kept(rows: int, cols: int, head_dim: int, base: float) -> model.Rotation:
        key = (rows, cols, head_dim, base)
        if key not in tables:
            cos, sin = make(rows, cols, head_dim, base)
            tables[key] = cos.to(device, dtype), sin.to(device, dtype)
        return tables[key]

    model.rope_2d = kept


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `model.attention`."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
