"""`python -m tests.gates.report`: bounds of time as a table, and all budgets as one page.

The page, build/gates.html, shows for each kernel and architecture what it takes of a multiprocessor
and the least time that each op can take there. No GPU is asked: nothing on it is a measurement.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases import OPS
from tests.gates import cuda_resources
from tests.gates.bounds import DATASHEETS, Bound, bounds

ROOT = Path(__file__).resolve().parents[2]
# Frames are resized where they are decoded.
ON_GPUS = [op for op in OPS if op != "resized_crop_normalize"]
DTYPES = ("bfloat16", "float32")
# Most that a thread and a block may have.
REGISTERS, SHARED = 255, 227 << 10

STYLE = """body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left}td.bar{width:220px;padding:0 10px}
td.bar div{height:10px;background:#3b6ea5}h2{margin-top:2em}"""


def line(found: Bound) -> str:
    """Of the table."""
    return (
        f"{found.op:26s} {found.shape:26s} {found.dtype:9s} {found.part:9s} "
        f"{found.microseconds:10.1f} {found.by}"
    )


def _bar(share: float) -> str:
    return f'<div style="width:{100 * min(share, 1):.0f}%"></div>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="bar">{c}</td>' if c.startswith("<div") else f"<td>{c}</td>" for c in r
        )
        + "</tr>"
        for r in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _of_bounds(arch: str) -> str:
    found = list(bounds(arch, ON_GPUS, DTYPES))
    longest = max(row.microseconds for row in found)
    rows = [
        [
            *(html.escape(row.op), row.shape, row.dtype, row.part),
            *(f"{row.microseconds:.1f}", _bar(row.microseconds / longest), row.by),
        ]
        for row in found
    ]
    columns = ("op", "shape", "dtype", "pass", "at least µs", "", "bound by")
    return f"<h2>{arch}: no less than this, by the {DATASHEETS[arch].name}</h2>" + _table(
        columns, rows
    )


def _of_budgets(title: str, known: dict[str, dict[str, int]]) -> str:
    rows = []
    for name, usage in sorted(known.items()):
        registers, shared = usage["registers"], usage["shared"]
        wide = f"{usage['wide']} of {usage['global']}"
        rows.append(
            [
                *(html.escape(name), str(registers), _bar(registers / REGISTERS)),
                *(str(shared), _bar(shared / SHARED), str(usage["tensor"]), str(usage["async"])),
                *(wide, str(usage["local"])),
            ]
        )
    columns = ("kernel, architecture", "registers", "", "shared bytes", "", "tensor instructions")
    columns += ("asynchronous copies", "accesses of 16 bytes", "local")
    return f"<h2>{title}</h2>" + _table(columns, rows)


def page() -> str:
    """All of it as HTML."""
    parts = [_of_bounds(arch) for arch in DATASHEETS]
    version, known = cuda_resources.load()
    parts.append(_of_budgets(f"Budgets of csrc/cuda, nvcc {version}", known))
    try:
        from tests.gates import budgets
    except ModuleNotFoundError:  # Triton
        pass
    else:
        version, known = budgets.load()
        parts.append(_of_budgets(f"Budgets of Triton's kernels, Triton {version}", known))
    told = "Counted in machine code or computed from datasheets: nothing here was measured."
    return (
        f'<!doctype html><meta charset="utf-8"><title>gates</title><style>{STYLE}</style>'
        f"<h1>GPU kernels</h1><p>{told}</p>" + "".join(parts)
    )


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates.report", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[*ON_GPUS, []], default=[])
    parser.add_argument("--arch", nargs="+", choices=list(DATASHEETS), default=["sm_80", "sm_90"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gates.html")
    options = parser.parse_args(given)
    for arch in options.arch:
        print(f"{arch}: bounds by the {DATASHEETS[arch].name}, in µs; no measurement")
        for found in bounds(arch, options.ops or ON_GPUS, DTYPES):
            print(line(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(), encoding="utf-8")
    print(f"all architectures and budgets: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
