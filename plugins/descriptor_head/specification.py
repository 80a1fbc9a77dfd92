"""What DescriptorHead computes, as data: pixel shuffle, norm, division and confidence of mast3r/catmlp_dpt_head.py in one.

Operands:
    f: (groups, batch * h * w, (channels + 1) * patch * patch), strided rows and groups, columns in the order (channel, i, j); float16,
        bfloat16 or float32. Row (b, y, x) is the token of patch (y, x) of image b.
    desc: (groups * batch, h * patch, w * patch, channels) contiguous float32.
    desc_conf: (groups * batch, h * patch, w * patch) contiguous float32.
    desc16: (groups * batch, h * patch, w * patch, padded) contiguous float16, with `padded` the power of two from `channels` on; optional.

Value, at pixel (y * patch + i, x * patch + j) of image (group, b), with f_c the row's column (c, i, j):
    norm = sqrt(sum of f_c^2 over c < channels), at least `least_norm` if that is given
    desc = f_c / norm for c < channels
    desc_conf = confidence + exp(f_channels)
    desc16 = desc for c < channels, 0 from there
in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DescriptorHead:
    """The operation's shapes, strides (in elements), types and constants, as above.

    Attributes:
        groups, batch, h, w: tokens are groups x batch x h x w.
        channels: of a descriptor.
        patch: pixels along a token's side.
        dtype: of f, as numpy names it.
        f_row, f_group, f_offset: from token to token, from group to group, and of the first element.
        confidence: what desc_conf starts from.
        least_norm: what the norm is raised to; None for no such limit.
        desc16: whether it is wanted.
    """

    groups: int
    batch: int
    h: int
    w: int
    channels: int
    patch: int
    dtype: str
    f_row: int
    f_group: int
    confidence: float
    least_norm: float | None = None
    desc16: bool = False
    f_offset: int = 0

    @property
    def padded(self) -> int:
        """Channels of desc16."""
        return 1 << (self.channels - 1).bit_length()
