"""The operations as ONNX functions: bodies of standard operations, with which any ONNX runtime runs a graph that holds them."""

from __future__ import annotations

from onnx import FunctionProto, parser

from smc.plugins.flash_attention.specification import DOMAIN, NAME, ROTARY_NAME

OPSET = 23
_ATTRIBUTES = "num_heads, head_size, scale, q_offset, k_offset, v_offset"


def flash_attention(rotary: bool) -> FunctionProto:
    """The function smc::FlashAttention or, with `rotary`, smc::RotaryFlashAttention, for a model of opset 23 and smc 1."""
    operands = ["q", "k", "v"]
    body = [
        "heads = Constant<value_int: int = @num_heads>()",
        "size = Constant<value_int: int = @head_size>()",
        "channels = Mul(heads, size)",
        "axis = Constant<value_ints = [0]>()",
        "one = Constant<value_int = 1>()",
        "size_1 = Unsqueeze(size, axis)",
        "flat = Constant<value_ints = [0, 0, -1]>()",
        "split = Concat<axis = 0>(flat, size_1)",
    ]
    for x in operands:
        body += [
            f"{x}_first = Constant<value_int: int = @{x}_offset>()",
            f"{x}_end = Add({x}_first, channels)",
            f"{x}_channels = Range({x}_first, {x}_end, one)",
            f"{x}_own = Gather<axis = 2>({x}, {x}_channels)",
            f"{x}_split = Reshape({x}_own, split)",
            f"{x}_heads = Transpose<perm = [0, 2, 1, 3]>({x}_split)",
        ]
    used = [f"{x}_heads" for x in operands]
    if rotary:
        operands += ["cos_q", "sin_q", "cos_k", "sin_k"]
        for x in ("q", "k"):
            body += [f"{x}_tokens = Shape<start = 0, end = 1>({x})", f"{x}_ones = Constant<value_ints = [1, 1]>()"]
            body += [f"{x}_tile = Concat<axis = 0>({x}_tokens, {x}_ones)"]
            for t in ("cos", "sin"):
                body += [
                    f"{t}_{x}_typed = CastLike({t}_{x}, {x})",
                    f"{t}_{x}_once = Unsqueeze({t}_{x}_typed, axis)",
                    f"{t}_{x}_batch = Expand({t}_{x}_once, {x}_tile)",
                ]
            body += [f"{x}_rotated = RotaryEmbedding({x}_heads, cos_{x}_batch, sin_{x}_batch)"]
        used[:2] = ["q_rotated", "k_rotated"]
    # Four-dimensional: shape inference of the three-dimensional form does not see attributes that refer to the function's.
    body += [
        f"attended = Attention<scale: float = @scale, softmax_precision = 1>({', '.join(used)})",
        "merged = Transpose<perm = [0, 2, 1, 3]>(attended)",
        "out = Reshape(merged, flat)",
    ]
    lines = "\n".join(f"  {line}" for line in body)
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{ROTARY_NAME if rotary else NAME} <{_ATTRIBUTES}> ({', '.join(operands)}) => (out)\n{{\n{lines}\n}}"
    )
