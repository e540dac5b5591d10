"""`python -m bench [op ...]`: every op's implementations against eager PyTorch, at real shapes.

An implementation whose result is wrong on the input is not timed (tests/compare.py is the rule).
"""

from __future__ import annotations

import csv
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import iv2kernels
from iv2kernels import dispatch
from iv2kernels.timing import interleaved, median_ratio

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from compare import assert_as_accurate, run

OPS = sorted(p.stem for p in (Path(__file__).parent / "ops").glob("*.py") if p.stem != "__init__")
COLUMNS = ("op", "impl", "shape", "dtype", "forward_ms", "both_ms", "x_eager", "x_eager_both")


@dataclass
class Options:
    """Time the ops against eager PyTorch."""

    # Ops to time; none: all.
    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    # dtypes
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # Seconds spent on each row.
    seconds: float = 1.0
    # Write the table as CSV too.
    csv: Path | None = None


def peaks(seconds: float = 0.3) -> dict[str, float]:
    """What this machine reaches now: GEMM GFLOP/s by dtype, and GB/s of a copy."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        best = min(interleaved({"gemm": lambda a=a, b=b: a @ b}, seconds)["gemm"])
        found[str(dtype).removeprefix("torch.")] = 2 * 1536**3 / best / 1e9
    x = torch.randn(16 << 20)
    y = torch.empty_like(x)
    best = min(interleaved({"copy": lambda: y.copy_(x)}, seconds)["copy"])
    found["copy"] = 2 * x.nbytes / best / 1e9
    return found


def candidates(op: str, dtype: torch.dtype) -> list[str]:
    """Implementations of an op that run here, the reference first."""
    known = dispatch.available(op, "cpu", dtype)
    return ["reference", *(n for n in ("native", "torch") if known[n] == "yes")]


def calls(
    op: Callable[..., Any], inputs: dict[str, Any], wrt: tuple[str, ...], impl: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward pass, and forward with backward, of one implementation."""

    def forward() -> Any:
        with torch.no_grad():
            return op(**inputs, impl=impl)

    if not wrt:
        return forward, forward
    leaves = {
        n: v.detach().requires_grad_(n in wrt)
        if torch.is_tensor(v) and v.is_floating_point()
        else v
        for n, v in inputs.items()
    }

    def both() -> Any:
        out = op(**leaves, impl=impl)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        return torch.autograd.grad(
            outs, [leaves[n] for n in wrt], [torch.ones_like(o) for o in outs]
        )

    return forward, both


def is_right(
    op: Callable[..., Any], inputs: dict[str, Any], wrt: tuple[str, ...], impl: str
) -> bool:
    """Whether the implementation passes the accuracy rule on this input."""
    got = run(lambda **i: op(**i, impl=impl), inputs, wrt)
    eager = run(lambda **i: op(**i, impl="reference"), inputs, wrt)
    exact = inputs | {"dtype": torch.float64} if "dtype" in inputs else inputs
    truth = run(lambda **i: op(**i, impl="reference"), exact, wrt, torch.float64)
    try:
        for name, value in got.items():
            if value.is_floating_point():
                assert_as_accurate(name, value, eager[name], truth[name])
    except AssertionError as error:
        print(f"{impl} is wrong and not timed: {error}")
        return False
    return True


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """One row per op, shape, dtype and implementation."""
    for stem in options.ops or OPS:
        if stem not in OPS:
            raise ValueError(f"bench: op must be one of {', '.join(OPS)}, got {stem}")
        page = importlib.import_module(f"bench.ops.{stem}")
        op = getattr(iv2kernels, getattr(page, "OP", stem))
        for dtype_name in getattr(page, "DTYPES", options.dtypes):
            dtype = getattr(torch, dtype_name)
            for shape in page.SHAPES:
                inputs, wrt = page.inputs(shape, dtype), tuple(page.WRT)
                names = [
                    n
                    for n in candidates(stem, dtype)
                    if n == "reference" or is_right(op, inputs, wrt, n)
                ]
                pairs = {n: calls(op, inputs, wrt, n) for n in names}
                forward = interleaved({n: p[0] for n, p in pairs.items()}, options.seconds / 2)
                both = interleaved({n: p[1] for n, p in pairs.items()}, options.seconds)
                for name in names:
                    yield {
                        "op": stem,
                        "impl": name,
                        "shape": "x".join(map(str, shape)),
                        "dtype": dtype_name,
                        "forward_ms": statistics.median(forward[name]) * 1e3,
                        "both_ms": statistics.median(both[name]) * 1e3,
                        "x_eager": median_ratio(forward["reference"], forward[name]),
                        "x_eager_both": median_ratio(both["reference"], both[name]),
                    }


def main(options: Options) -> None:
    """Print the table, and its geometric mean last."""
    found = ", ".join(f"{name} {value:.0f}" for name, value in peaks().items())
    print(f"{torch.get_num_threads()} threads; measured GFLOP/s and GB/s: {found}")
    print("  ".join(f"{c:>14s}" for c in COLUMNS))
    table = []
    for row in rows(options):
        table.append(row)
        cells = (f"{v:14.3f}" if isinstance(v, float) else f"{v:>14s}" for v in row.values())
        print("  ".join(cells), flush=True)
    ours = [row["x_eager_both"] for row in table if row["impl"] != "reference"]
    if ours:
        print(
            f"geometric mean of x_eager_both: {math.exp(statistics.mean(map(math.log, ours))):.2f}"
        )
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m bench"))
    except ValueError as error:
        sys.exit(str(error))
