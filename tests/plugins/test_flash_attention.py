"""The FlashAttention kernel: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

from smc.plugins.flash_attention import onnx_function, reference
from smc.plugins.flash_attention.specification import DOMAIN, HEAD_SIZES, FlashAttention
from tests.plugins.attention_cases import SMALL, Case, errors, operands
from tests.plugins.interpreting import run_cases

triton = pytest.importorskip("triton")

from smc.plugins.flash_attention import aot  # noqa: E402
from smc.plugins.flash_attention.kernel import TILES, Tile  # noqa: E402

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
OPERATION = FlashAttention(num_heads=2, head_size=64, scale=0.125)


# The specification and the reference


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_size": 48}, "head_size is 48; the kernel takes 32, 64, 128"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"k_offset": 8}, "k_offset is 8"),
        ({"v_offset": -16}, "v_offset is -16"),
    ],
)
def test_attributes_out_of_bounds_are_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FlashAttention(**{"num_heads": 2, "head_size": 64, "scale": 0.125} | attributes)


def test_the_reference_is_torchs_attention() -> None:
    q, k, v = (torch.randn(2, rows, 2, 64, dtype=torch.float64) for rows in (5, 7, 7))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3).transpose(1, 2).flatten(2)
    out = reference.flash_attention(FlashAttention(2, 64, 0.3), *(x.flatten(2) for x in (q, k, v)))
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)


def test_offsets_read_one_packed_tensor() -> None:
    packed = np.random.default_rng(0).standard_normal((1, 5, 3 * 128))
    q, k, v = np.split(packed, 3, axis=2)
    operation = FlashAttention(2, 64, 0.125, q_offset=0, k_offset=128, v_offset=256)
    np.testing.assert_array_equal(
        reference.flash_attention(operation, packed, packed, packed), reference.flash_attention(OPERATION, q, k, v)
    )


def test_the_rotation_is_that_of_onnx() -> None:
    random = np.random.default_rng(1)
    q, k = (random.standard_normal((1, 6, 128)).astype(np.float32) for _ in range(2))
    cos, sin = (random.standard_normal((6, 32)).astype(np.float32) for _ in range(2))
    nodes = [onnx.helper.make_node("RotaryEmbedding", [x, "cos", "sin"], [f"{x}_rotated"], num_heads=2) for x in ("q", "k")]
    outputs = [onnx.helper.make_tensor_value_info(f"{x}_rotated", onnx.TensorProto.FLOAT, q.shape) for x in ("q", "k")]
    inputs = {"q": q, "k": k, "cos": cos[None], "sin": sin[None]}
    rotated = _run(_model(nodes, inputs, outputs), inputs)
    np.testing.assert_allclose(
        reference.flash_attention(OPERATION, q, k, k, cos, sin, cos, sin),
        reference.flash_attention(OPERATION, *rotated, k),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("rotary", [False, True])
def test_the_onnx_function_is_the_operation(rotary: bool) -> None:
    random = np.random.default_rng(2)
    shapes = {"q": (2, 5, 384), "k": (2, 7, 288), "v": (2, 7, 128)}
    if rotary:
        shapes |= {"cos_q": (5, 32), "sin_q": (5, 32), "cos_k": (7, 32), "sin_k": (7, 32)}
    inputs = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    operation = FlashAttention(2, 64, 0.3, q_offset=128, k_offset=16)
    function = onnx_function.flash_attention(rotary)
    node = onnx.helper.make_node(function.name, list(inputs), ["out"], domain=DOMAIN, **asdict(operation))
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["batch", "n", "channels"])
    model = _model([node], inputs, [out], functions=[function])
    onnx.checker.check_model(model, full_check=True)
    expected = reference.flash_attention(operation, *inputs.values())
    np.testing.assert_allclose(_run(model, inputs)[0], expected, rtol=1e-4, atol=1e-5)


def _model(nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: list[onnx.ValueInfoProto], **more: Any) -> onnx.ModelProto:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
    versions = [onnx.helper.make_opsetid("", onnx_function.OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "test", values, outputs), opset_imports=versions, ir_version=10, **more)


def _run(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


# The kernel's arithmetic, on the CPU


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, float]]:
    """Errors of the small cases."""
    return run_cases("attention_cases")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(interpreted: dict[str, tuple[float, float]], case: Case) -> None:
    ours, torchs = interpreted[case.name]
    assert ours <= 2 * torchs


# Ahead of time, with no GPU


@pytest.mark.parametrize("sm", [80, 86, 90, 120])
def test_compiles_for_any_gpu(sm: int) -> None:
    built = aot.compile_for(sm, OPERATION, TILES[1])
    assert built.cubin[:4] == b"\x7fELF"
    assert built.threads == 128
    assert aot.fits(built, sm)
    assert re.search(rf"\.target sm_{sm}", built.ptx)
    assert ("wgmma" in built.ptx) == (sm == 90)


@pytest.mark.parametrize(("tables", "pointers"), [(None, 4), ("float32", 8), ("float16", 8)])
def test_the_ptx_takes_the_documented_arguments(tmp_path: Path, tables: Any, pointers: int) -> None:
    built = aot.compile_for(86, OPERATION, TILES[2], "bfloat16", tables)
    parameters = re.findall(r"^\s*\.param \.(u64|u32)", built.ptx, re.MULTILINE)
    assert parameters == ["u64"] * (pointers - 1) + ["u32"] * 14 + ["u64"]
    assert len(aot.sizes(OPERATION, 5, 7, 128, 128, 128)) == 14
    (tmp_path / "kernel.ptx").write_text(built.ptx)
    subprocess.run([PTXAS, "-arch=sm_86", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"], check=True)


def test_a_scratch_argument_in_use_is_not_dropped() -> None:
    ptx = ".param .u64 f_param_0,\n.param .u64 f_param_1,\n.param .u64 f_param_2\n)\nld.param.u64 %rd1, [f_param_1];\n"
    with pytest.raises(ValueError, match="f_param_1 of f is not the unused scratch argument"):
        aot._without_scratch_arguments(ptx, "f")


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_smallest_tile_fits_every_gpu(head_size: int) -> None:
    assert aot.fits(aot.compile_for(86, FlashAttention(2, head_size, 0.125), TILES[-1], tables="float32"), 86)


def test_launch_numbers() -> None:
    operation = FlashAttention(12, 64, 0.125)
    assert aot.grid(operation, TILES[0], 2, 769) == (13, 12, 2)
    assert aot.sizes(operation, 5, 7, 768, 1536, 2304) == (5, 7, 3840, 768, 64, 10752, 1536, 64, 16128, 2304, 64, 3840, 768, 64)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_plugin_says_what_to_install() -> None:
    from smc.plugins.flash_attention.tensorrt_plugin import register

    with pytest.raises(ImportError, match="pip install 'tensorrt>=11'"):
        register(90)


# On a GPU

LENGTHS = [(1, 1), (1, 300), (127, 1), (64, 64), (129, 65), (255, 513), (768, 768)]
WIDE = [
    Case(n, m, batch=2, heads=3, head_size=head_size, dtype=dtype, layout=layout, tables=tables)
    for (n, m), head_size, dtype, (layout, tables) in itertools.product(
        LENGTHS,
        HEAD_SIZES,
        (torch.float16, torch.bfloat16),
        (("bnhd", None), ("bhnd", None), ("packed", None), ("bnhd", torch.float32), ("packed", torch.float16)),
    )
    if layout != "packed" or n == m
] + [Case(200, 300, values=values, dtype=dtype) for values in ("large", "dominated") for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_on_the_gpu(case: Case) -> None:
    ours, torchs = errors(case, "cuda", TILES[1] if case.head_size < 128 else TILES[2])
    assert ours <= 2 * torchs


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tables", [None, torch.float16])
def test_every_tile_on_the_gpu(tile: Tile, tables: torch.dtype | None) -> None:
    ours, torchs = errors(Case(200, 333, tables=tables), "cuda", tile)
    assert ours <= 2 * torchs


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["cubin", "ptx"])
@pytest.mark.parametrize("tables", [None, "float32"])
def test_ahead_of_time_kernel_runs_through_the_driver(form: str, tables: Any) -> None:
    case = Case(200, 333, tables=torch.float32 if tables else None)
    (q, k, v), table_operands = operands(case, "cuda")
    major, minor = torch.cuda.get_device_capability()
    built = aot.compile_for(10 * major + minor, OPERATION, TILES[1], tables=tables)
    out = torch.full((1, 200, 128), float("nan"), device="cuda", dtype=torch.float16)
    pointers = [x.data_ptr() for x in (q, k, v, *table_operands) if x is not None]
    scratch = [0, 0] if form == "cubin" else []
    launch(
        built,
        form,
        aot.grid(OPERATION, built.tile, 1, 200),
        pointers,
        aot.sizes(OPERATION, 200, 333, 128, 128, 128),
        [out.data_ptr(), *scratch],
    )
    exact = reference.flash_attention(
        OPERATION, *(x.double().cpu().flatten(2) for x in (q, k, v)), *(t if t is None else t.cpu() for t in table_operands)
    )
    assert np.linalg.norm(out.double().cpu().numpy() - exact) < 1e-3 * np.linalg.norm(exact)


def launch(
    built: aot.Compiled, form: str, blocks: tuple[int, int, int], first: list[int], numbers: tuple[int, ...], last: list[int]
) -> None:
    """Run a kernel through the CUDA driver on torch's stream and wait for it."""
    driver = pytest.importorskip("cuda.bindings.driver")

    def call(function: Any, *arguments: Any) -> Any:
        status, *results = function(*arguments)
        assert status == driver.CUresult.CUDA_SUCCESS, status
        return results[0] if results else None

    module = call(driver.cuModuleLoadData, built.cubin if form == "cubin" else built.ptx.encode() + b"\0")
    function = call(driver.cuModuleGetFunction, module, built.name.encode())
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call(driver.cuFuncSetAttribute, function, limit, built.shared_memory)
    values = (*first, *numbers, *last)
    types = (ctypes.c_void_p,) * len(first) + (ctypes.c_int32,) * len(numbers) + (ctypes.c_void_p,) * len(last)
    stream = torch.cuda.current_stream().cuda_stream
    call(driver.cuLaunchKernel, function, *blocks, built.threads, 1, 1, built.shared_memory, stream, (values, types), 0)
    torch.cuda.synchronize()
