"""What FlashAttention computes, as data: the custom ONNX operation's name, operands, attributes and limits.

    smc::FlashAttention        (q, k, v) -> out
    smc::RotaryFlashAttention  (q, k, v, cos_q, sin_q, cos_k, sin_k) -> out

Operands:
    q: (B, N, Cq), k: (B, M, Ck), v: (B, M, Cv), float16 or bfloat16, all alike. B, N, M >= 1. Head h of q is its channels
        q_offset + h * head_size and the head_size - 1 that follow; likewise for k and v. One packed tensor of q, k and v can so
        be passed three times with three offsets. Channel counts and offsets are multiples of 16.
    cos_q, sin_q: (N, head_size / 2), cos_k, sin_k: (M, head_size / 2), float32 or float16, all alike.
    out: (B, N, num_heads * head_size), of q's type.

Value, with q_h, k_h, v_h the heads:
    out_h = softmax(scale * R_q(q_h) R_k(k_h)^T) v_h
R rotates the halves x1, x2 of each row as ONNX's RotaryEmbedding does when not interleaved, [x1 cos - x2 sin, x1 sin + x2 cos];
without tables it is the identity. Rotation, scores, softmax and sums are in float32; operands of the two products (rotated q and
k, softmax weights before division by their sum) are rounded to q's type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DOMAIN = "smc"
NAME = "FlashAttention"
ROTARY_NAME = "RotaryFlashAttention"
HEAD_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class FlashAttention:
    """The operation's attributes, named as in ONNX.

    Attributes:
        num_heads: heads of q, k and v.
        head_size: 32, 64 or 128.
        scale: of the scores; positive and finite.
        q_offset, k_offset, v_offset: the first channel of head 0 in each operand; multiples of 16.

    Raises:
        ValueError: an attribute is outside these limits.
    """

    num_heads: int
    head_size: int
    scale: float
    q_offset: int = 0
    k_offset: int = 0
    v_offset: int = 0

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads is {self.num_heads}; at least 1 is needed")
        if self.head_size not in HEAD_SIZES:
            raise ValueError(f"head_size is {self.head_size}; the kernel takes {', '.join(map(str, HEAD_SIZES))}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale is {self.scale}; a positive finite number is needed")
        for name in ("q_offset", "k_offset", "v_offset"):
            offset = getattr(self, name)
            if offset < 0 or offset % 16:
                raise ValueError(f"{name} is {offset}; a multiple of 16, not negative, is needed")
