"""What Triton makes of the attention kernels for a Hopper GPU, counted in the compiled code: no GPU is needed.

    .venv/bin/python benchmarks/attention_code.py [--head-dim 128] [--candidates first] [--json FILE]

For every candidate of tiles, and of its two loops for the one over whole tiles and the one over those that a document's
edge or the diagonal cuts: matmul instructions of a step; all instructions, special functions (exponentials and roots)
and spilled values a score. docs/kernels.md says what follows from them.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from reporting import parser, report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepaudio_train.models.step1.kernels import sqrt_alibi
from stepaudio_train.models.step1.kernels.launch import TILES, Tiles

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_HOPPER = GPUTarget("cuda", 90, 32)
_FLOAT32 = ("slopes_ptr", "log_total_ptr", "delta_ptr", "dk_ptr", "dv_ptr")
_INT32 = ("starts_ptr", "ends_ptr")
# The compiler is told that they are multiples of 16, as it finds at a launch.
_ODD = ("num_groups", "heads_per_program")


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--head-dim", type=int, default=64, choices=(16, 32, 64, 128))
    options.add_argument("--candidates", default="all", choices=("all", "first"), help="tiles of each kernel")
    chosen = options.parse_args()
    by_kernel = next(tiles for most, tiles in TILES.items() if chosen.head_dim <= most)
    last = 1 if chosen.candidates == "first" else None
    rows = [
        row
        for name, candidates in by_kernel.items()
        for tiles in candidates[:last]
        for row in _count(name, tiles, chosen.head_dim)
    ]
    report(
        f"Attention kernels, head dim {chosen.head_dim}, bf16, sm_90, Triton {triton.__version__}", rows, chosen.json
    )


def _count(name: str, tiles: Tiles, head_dim: int) -> Iterator[dict[str, Any]]:
    compiled = _compile(name, tiles, head_dim)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    scores = tiles.heads * tiles.block_m * tiles.block_n / (32 * tiles.num_warps)
    for loop, body in zip(("whole", "cut"), sorted(_loops(code), key=len), strict=True):
        yield {
            "kernel": name.removesuffix("_kernel"),
            "heads, queries, keys, warps": f"{tiles.heads}, {tiles.block_m}, {tiles.block_n}, {tiles.num_warps}",
            "registers": int(registers),
            "shared KiB": compiled.metadata.shared / 1024,
            "tiles": loop,
            "matmuls": _number(body, "HGMMA"),
            "instructions": len(body) / scores,
            "special": _number(body, "MUFU") / scores,
            "spilled": _number(body, "LDL", "STL") / scores,
        }


def _compile(name: str, tiles: Tiles, head_dim: int) -> Any:
    kernel = getattr(sqrt_alibi, name)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    constants = {"HEADS": tiles.heads, "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    signature: dict[str, Any] = {}
    even: dict[tuple[int, ...], Any] = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument.endswith("_strides"):
            signature[argument] = ("i32",) * 3
            even |= {(place, i): [["tt.divisibility", 16]] for i in range(3)}
            continue
        pointed = "fp32" if argument in _FLOAT32 else "i32" if argument in _INT32 else "bf16"
        signature[argument] = f"*{pointed}" if argument.endswith("_ptr") else "i32"
        if argument not in _ODD:
            even[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values, even), target=_HOPPER, options=options)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> Iterator[list[str]]:
    """Names of the instructions of every innermost loop that has matmuls."""
    labels: dict[str, int] = {}
    names: list[str] = []
    starts: list[int] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            names.append(found[1])
            back = re.search(r"(\.L_x_\w+)", found[2])
            if found[1] == "BRA" and back and back[1] in labels:
                start = labels[back[1]]
                if _number(names[start:], "HGMMA") and not any(start <= inner for inner in starts):
                    yield names[start:]
                    starts.append(start)


def _number(names: list[str], *wanted: str) -> int:
    return sum(name in wanted for name in names)


if __name__ == "__main__":
    main()
