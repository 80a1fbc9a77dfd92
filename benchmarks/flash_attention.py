"""The FlashAttention kernel on a GPU against torch's FlashAttention and cuDNN's attention, with and without rotation of q and k.

    python benchmarks/flash_attention.py [--out benchmarks/results/flash_attention_h200]

Self-attention in float16 at the encoder's and the decoders' sizes, B x H x N x D. Ours reads q, k and v out of one packed
(B, N, 3, H, D) buffer, as the GEMM before it leaves them, and writes (B, N, H*D), as the GEMM after it wants them; the peers get
contiguous (B, H, N, D), their best case, and no copies are counted. Times are the median over replays of a CUDA graph of
LAUNCHES launches, divided by LAUNCHES. Errors are ||out - exact|| / ||exact|| against float64.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from smc.plugins.flash_attention.kernel import TILES, Tile, attend

SIZES = ((2, 16, 768, 64), (2, 12, 768, 64))
LAUNCHES, REPLAYS = 40, 50


@triton.jit
def rotate_kernel(qkv, cos, sin, out, n, H: tl.constexpr, D: tl.constexpr):  # noqa: N803
    """At most 16 heads. One program rotates token `pid` of q or k: packed (B, n, 3, H, D) -> (2, B, H, n, D)."""
    token, batch, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, half = tl.arange(0, 16)[:, None], tl.arange(0, D // 2)[None, :]
    source = qkv + ((batch * n + token) * 3 + which) * H * D + head * D + half
    x1 = tl.load(source, mask=head < H).to(tl.float32)
    x2 = tl.load(source + D // 2, mask=head < H).to(tl.float32)
    c, s = tl.load(cos + token * (D // 2) + half).to(tl.float32), tl.load(sin + token * (D // 2) + half).to(tl.float32)
    target = out + (((which * tl.num_programs(1) + batch) * H + head) * n + token) * D + half
    tl.store(target, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=head < H)
    tl.store(target + D // 2, (x1 * s + x2 * c).to(out.dtype.element_ty), mask=head < H)


def microseconds(run: Callable[[], Any]) -> float:
    """Median time of one run in a replayed CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    times = []
    for i in range(10 + REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 10:  # the clocks have risen by then
            times.append(1000 * start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def measure(batch: int, heads: int, tokens: int, head_size: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, head_size, device="cuda", dtype=torch.float16)
    q, k, v = qkv.unbind(2)
    angles = 3 * torch.randn(tokens, head_size // 2, device="cuda")
    scale = head_size**-0.5
    rotated = torch.empty(2, batch, heads, tokens, head_size, device="cuda", dtype=torch.float16)
    contiguous = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def rotate(tables: tuple[torch.Tensor, ...]) -> None:
        rotate_kernel[(tokens, batch, 2)](qkv, *tables[:2], rotated, tokens, H=heads, D=head_size)

    def exact(tables: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        operands = [x.transpose(1, 2).double() for x in (q, k, v)]
        if tables is not None:
            c, s = (x.double() for x in tables[:2])
            for i in range(2):
                x1, x2 = operands[i].chunk(2, dim=-1)
                operands[i] = torch.cat([x1 * c - x2 * s, x1 * s + x2 * c], dim=-1)
        weights = torch.softmax(scale * operands[0] @ operands[1].mT, dim=-1)
        return (weights @ operands[2]).transpose(1, 2).flatten(2)

    results: list[dict[str, Any]] = []

    def row(what: str, rotation: str, run: Callable[[], torch.Tensor], expected: torch.Tensor, tile: Tile | None = None) -> None:
        error = float((run().double() - expected).norm() / expected.norm())
        results.append({
            "size": f"{batch}x{heads}x{tokens}x{head_size}", "what": what, "rotation": rotation,
            "microseconds": round(microseconds(run), 2), "error": error, "tile": str(tile) if tile else "",
        })  # fmt: skip

    def ours(tile: Tile, tables: tuple[Any, ...], operands: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        out = torch.full((batch, tokens, heads * head_size), float("nan"), device="cuda", dtype=torch.float16)

        def run() -> torch.Tensor:
            attend(*operands, out, scale, tile, tables)
            return out

        return run

    half_tables = (angles.cos().half(), angles.sin().half())
    full_tables = (angles.cos(), angles.sin())
    plain, none = exact(None), (None,) * 4
    for tile in TILES:
        row("ours", "none", ours(tile, none, (q, k, v)), plain, tile)
    row("ours, operands (B, H, N, D)", "none", ours(TILES[0], none, tuple(x.transpose(1, 2) for x in contiguous)), plain, TILES[0])
    for name, tables in (("float16", half_tables), ("float32", full_tables)):
        for tile in TILES:
            row("ours, fused rotation", name, ours(tile, 2 * tables, (q, k, v)), exact(tables), tile)

    views = (*(x.transpose(1, 2) for x in rotated), v)
    attention = ours(TILES[0], none, views)

    def rotation_then_ours() -> torch.Tensor:
        rotate(half_tables)
        return attention()

    row("rotation kernel, then ours", "float16", rotation_then_ours, exact(half_tables), TILES[0])
    for name, backend in (("torch FlashAttention", SDPBackend.FLASH_ATTENTION), ("cuDNN attention", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):

            def rotation_then_peer() -> torch.Tensor:
                rotate(half_tables)
                return F.scaled_dot_product_attention(*rotated, contiguous[2])

            row(name, "none", lambda: F.scaled_dot_product_attention(*contiguous), plain.unflatten(2, (heads, -1)).transpose(1, 2))
            expected = exact(half_tables).unflatten(2, (heads, -1)).transpose(1, 2)
            row(f"rotation kernel, then {name}", "float16", rotation_then_peer, expected)
    return results


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = [
        "# FlashAttention kernel",
        "",
        f"{record['date']}, {record['gpu']}, driver {record['driver']}, torch {record['torch']}, Triton {record['triton']}.",
        f"`{record['command']}`",
        "",
        "Median microseconds of a launch in a replayed CUDA graph; error relative to float64. B x H x N x D, float16.",
        "",
        "| size | what | tables | µs | error | tile |",
        "|---|---|---|---|---|---|",
    ]
    for result in record["results"]:
        cells = (
            result["size"],
            result["what"],
            result["rotation"],
            f"{result['microseconds']:.1f}",
            f"{result['error']:.1e}",
            result["tile"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    record = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/flash_attention.py",
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.split("\n")[0],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "results": [result for size in SIZES for result in measure(*size)],
    }
    print(table(record))
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
