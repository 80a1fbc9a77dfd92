"""What Elementwise computes, as data.

Operands:
    x, and y for functions of two: views of `shape`, of any types and strides; a stride of 0 broadcasts.
    out: a view of `shape` none of whose elements share memory.

Value: out = function(x) or function(x, y), element by element, in float32, or in int32 where all operands are integers; rounded
once, or cut off towards zero where out is an integer. "copy" is the identity: a cast, a transposition, a part of a concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Unary = Literal["copy", "relu", "gelu", "exp", "sqrt"]
Binary = Literal["add", "sub", "mul", "div", "maximum", "minimum"]
Function = Unary | Binary
"""Named as in numpy; gelu is the exact one."""

UNARY, BINARY = get_args(Unary), get_args(Binary)
INTEGER: tuple[Function, ...] = ("copy", "relu", "add", "sub", "mul", "maximum", "minimum")
"""Those that also take integers alone."""


@dataclass(frozen=True)
class View:
    """Where the elements of a tensor lie: strides per dimension (0 or negative, too) and the first element's offset, in elements."""

    dtype: str
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Elementwise:
    """The operation.

    Attributes:
        function: what is computed.
        shape: of all operands, once broadcast.
        inputs: x, or x and y.
        out: the output.

    Raises:
        ValueError: the function does not take these operands.
    """

    function: Function
    shape: tuple[int, ...]
    inputs: tuple[View, ...]
    out: View

    def __post_init__(self) -> None:
        if len(self.inputs) != (1 if self.function in UNARY else 2):
            raise ValueError(f"{self.function} of {len(self.inputs)} operands")
        if any(len(view.strides) != len(self.shape) for view in (*self.inputs, self.out)):
            raise ValueError(f"strides of another rank than the shape {self.shape}")
        if self.integer and self.function not in INTEGER:
            raise ValueError(f"{self.function} of integers")

    @property
    def integer(self) -> bool:
        """Whether it is computed in int32."""
        return all(view.dtype in ("uint8", "int32") for view in self.inputs)
