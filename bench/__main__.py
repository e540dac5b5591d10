"""`python -m bench [op ...]`: every op against eager PyTorch, its torch.compile and libraries.

All candidates of a case take turns in one process. An implementation whose result is wrong is not
timed (tests/compare.py is the rule). A goal that is missed is printed as missed.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import base, plot
from bench.cases import Call, Case, accuracy, candidates, cases
from bench.measure import best, floor_seconds, peak_memory, peaks, spread, times_of
from iv2kernels import _C, dispatch
from iv2kernels.timing import median_ratio


@dataclass
class Options:
    """Time the ops against eager PyTorch, its torch.compile, and the strongest library call."""

    # Ops to time; none: all.
    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    # float32, bfloat16, float16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # Instruction sets of our kernels; none: the widest; all: every one that this machine runs.
    isas: tuple[str, ...] = ()
    # Time torch.compile of the reference too; compiling takes seconds for each case.
    compile: bool = True
    # Seconds spent on each case, at least.
    seconds: float = 1.0
    # Compare with the kernels of another commit instead: both in turn, each in its own process.
    base: str | None = None
    # Write everything as JSON.
    json: Path | None = None
    # Write the table as CSV.
    csv: Path | None = None
    # Folder for charts (PNG).
    plot: Path | None = None


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "isas": _C.available_isas(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": asked.stdout.strip() or None,
    }


def measure(case: Case, isas: Sequence[str], options: Options) -> list[Any]:
    """A row for each candidate of a case."""
    calls, rows, wrong = candidates(case, isas, compiled=options.compile), [], []
    error = {}
    for name in [n for n in calls if n not in ("compile", "library")]:
        error[name], why = accuracy(case, calls[name])
        if why is not None:
            wrong.append({**_head(case, name), "wrong": why})
            del calls[name]
    before = peaks()
    forward, both = times_of(calls, options.seconds)
    peak = best(before, peaks())
    flops, size = case.work()
    floor = floor_seconds((flops, size), case.dtype, peak)
    memory = {name: peak_memory(call.both) for name, call in calls.items()}
    for name, call in calls.items():
        seconds = statistics.median(forward[name])
        row = {
            **_head(case, name),
            "forward_ms": 1e3 * seconds,
            "forward_spread": spread(forward[name]),
            "both_ms": 1e3 * statistics.median(both[name]) if call.has_backward else None,
            "both_spread": spread(both[name]) if call.has_backward else None,
            "gflops": flops / seconds / 1e9,
            "gbs": size / seconds / 1e9,
            "peak_percent": 100 * floor / seconds,
            "peaks": peak,
            "memory_mb": memory[name],
            "memory_less": memory["eager"] / memory[name] if memory[name] else math.inf,
            "error": error.get(name),
        }
        for other in ("eager", "compile", "library"):
            if other in calls:
                row[f"x_{other}"] = median_ratio(forward[other], forward[name])
                row[f"x_{other}_both"] = median_ratio(both[other], both[name])
        row["goals"] = _judged(case, name, row, _rows(call))
        rows.append(row)
    return rows + wrong


def _head(case: Case, name: str) -> dict[str, Any]:
    return {
        "op": case.op,
        "shape": "x".join(str(n).replace(" ", "") for n in case.shape),
        "dtype": case.dtype,
        "candidate": name,
    }


def _rows(call: Call) -> int:
    """Of the first tensor, by which dispatch chooses."""
    return next(len(x) for x in call.inputs.values() if torch.is_tensor(x) and x.dim())


def _judged(case: Case, name: str, row: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """The goals of the case, for the candidate that dispatch would take."""
    stem = getattr(case.page, "STEM", case.op)
    chosen = dispatch.default(stem, "cpu", getattr(torch, case.dtype), rows)
    names = {"native": f"native {_C.available_isas()[-1]}", "reference": "eager"}
    if name != names.get(chosen, chosen):
        return []
    return [
        {"column": c, "least": least, "value": row[c], "met": row[c] >= least}
        for c, least in case.goals().items()
        if c in row
    ]


SHOWN = ("forward_ms", "both_ms", "peak_percent", "memory_mb", "error")


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['op']:24s} {row['shape']:24.24s} {row['dtype']:9s} {row['candidate']:19s}"
    if "wrong" in row:
        return f"{head} WRONG, not timed: {row['wrong']}"
    cells = [f"{row[c]:9.3g}" if row[c] is not None else f"{'-':>9s}" for c in SHOWN]
    ratios = [
        f"{row[f'x_{other}']:5.2f}/{row[f'x_{other}_both']:5.2f}"
        if f"x_{other}" in row
        else " " * 11
        for other in ("eager", "compile", "library")
    ]
    goals = [
        f"{g['column']} >= {g['least']:g} {'met' if g['met'] else 'MISSED'}" for g in row["goals"]
    ]
    return f"{head} {' '.join(cells)}  {'  '.join(ratios)}  {'; '.join(goals)}".rstrip()


def geometric_mean(rows: list[dict[str, Any]]) -> float | None:
    """Of x_eager_both of the candidates that dispatch would take."""
    widest = f"native {_C.available_isas()[-1]}"
    ours = [r["x_eager_both"] for r in rows if r["candidate"] == widest and "wrong" not in r]
    return math.exp(statistics.mean(map(math.log, ours))) if ours else None


def run_all(options: Options) -> Iterator[dict[str, Any]]:
    known = _C.available_isas()
    isas = known if options.isas == ("all",) else options.isas or known[-1:]
    for isa in isas:
        if isa not in known:
            raise ValueError(f"bench: isa must be one of {', '.join(known)} or all, got {isa}")
    before = _C.isa()
    try:
        for case in cases(options.ops, options.dtypes):
            yield from measure(case, isas, options)
    finally:
        dispatch.set_isa(before)


def main(options: Options) -> None:
    """Print the table, and its geometric mean last."""
    list(cases(options.ops, options.dtypes))  # names are checked before anything is timed
    if options.base is not None:
        base.compare(options.base, options.ops, options.dtypes, options.seconds)
        return
    about = machine()
    print(f"{about['cpu']}, {about['threads']} threads")
    print(
        f"{'op':24s} {'shape':24s} {'dtype':9s} {'candidate':19s} "
        + " ".join(f"{c:>9.9s}" for c in ("fwd ms", "both ms", "% peak", "MB", "error"))
        + "  x eager      x compile    x library (forward/both)"
    )
    rows = []
    for row in run_all(options):
        rows.append(row)
        print(show(row), flush=True)
    measured = [row["peaks"] for row in rows if "peaks" in row]
    about["peaks"] = best(*measured) if measured else {}
    found = ", ".join(f"{name} {value:.0f}" for name, value in about["peaks"].items())
    print(f"best GFLOP/s and GB/s measured meanwhile: {found}")
    mean = geometric_mean(rows)
    goals = [g for row in rows for g in row.get("goals", [])]
    if mean is not None:
        print(f"goals met: {sum(g['met'] for g in goals)} of {len(goals)}")
        print(f"geometric mean of x eager, forward and backward: {mean:.2f}")
    if options.json:
        content = {"machine": about, "rows": rows, "geometric_mean": mean}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.csv:
        columns = dict.fromkeys(c for row in rows for c in row)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            columns.pop("peaks", None)
            writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
        plot.write(rows, options.plot)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m bench"))
    except ValueError as error:
        sys.exit(str(error))
