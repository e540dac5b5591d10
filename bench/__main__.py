"""`python -m bench [op ...]`: every op against eager PyTorch, its torch.compile and libraries.

All candidates of a case take turns in one process. An implementation whose result is wrong is not
timed (tests/compare.py is the rule). A goal that is missed is printed as missed.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import base, plot
from bench.cases import Call, Case, accuracy, candidates, cases
from bench.measure import best, clock_for, floor_seconds, peak_memory, peaks, spread, times_of
from iv2kernels import _C, dispatch
from iv2kernels.timing import median_ratio


@dataclass
class Options:
    """Time the ops against eager PyTorch, its torch.compile, and the strongest library call."""

    # Ops to time; none: all.
    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    # float32, bfloat16, float16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # cpu, or cuda: the cases of a GPU, timed by events, written to results/<gpu>.csv
    device: str = "cpu"
    # Start no new case after so many minutes.
    minutes: float = math.inf
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


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers hold for."""
    if device != "cpu":
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        return {"gpu": torch.cuda.get_device_name(), **versions, "commit": _commit()}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "isas": _C.available_isas(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None


def measure(case: Case, isas: Sequence[str], options: Options) -> list[Any]:
    """A row for each candidate of a case."""
    calls, rows, wrong = candidates(case, isas, compiled=options.compile), [], []
    error = {}
    for name in [n for n in calls if n not in ("compile", "library")]:
        error[name], why = accuracy(case, calls[name])
        if why is not None:
            wrong.append({**_head(case, name), "wrong": why})
            del calls[name]
    before = peaks(case.device)
    forward, both = times_of(calls, options.seconds, clock_for(case.device))
    peak = best(before, peaks(case.device))
    flops, size = case.work()
    floor = floor_seconds((flops, size), case.dtype, peak)
    memory = {name: peak_memory(call.both, case.device) for name, call in calls.items()}
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
        peers = () if case.device == "cpu" else tuple(dispatch.LIBRARIES)
        for other in ("eager", "compile", "library", *peers):
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
    if name != case.default(rows):
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


def geometric_mean(rows: list[dict[str, Any]], device: str = "cpu") -> float | None:
    """Of x_eager_both of the kernels that dispatch prefers."""
    ours = f"native {_C.available_isas()[-1]}" if device == "cpu" else "triton"
    ours = [r["x_eager_both"] for r in rows if r["candidate"] == ours and "wrong" not in r]
    return math.exp(statistics.mean(map(math.log, ours))) if ours else None


def run_all(options: Options) -> Iterator[dict[str, Any]]:
    began, left = time.monotonic(), []
    known = _C.available_isas()
    isas = known if options.isas == ("all",) else options.isas or known[-1:]
    for isa in isas:
        if isa not in known:
            raise ValueError(f"bench: isa must be one of {', '.join(known)} or all, got {isa}")
    before = _C.isa()
    try:
        for case in cases(options.ops, options.dtypes, options.device):
            if time.monotonic() - began > 60 * options.minutes:
                left.append(case)
                continue
            yield from _measured(case, isas, options)
    finally:
        dispatch.set_isa(before)
    if left:
        print(
            f"not timed, {options.minutes:g} minutes are over: {len(left)} cases "
            f"from {left[0].name}"
        )


def _measured(case: Case, isas: Sequence[str], options: Options) -> list[Any]:
    if case.device == "cpu":
        return measure(case, isas, options)
    try:
        return measure(case, isas, options)
    except torch.OutOfMemoryError:
        return [{**_head(case, "all"), "wrong": "out of memory"}]
    finally:
        torch.cuda.empty_cache()


def main(options: Options) -> None:
    """Print the table, and its geometric mean last."""
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device must be one of this machine, got cuda and no GPU")
    # names are checked before anything is timed
    list(cases(options.ops, options.dtypes, options.device))
    if options.base is not None:
        base.compare(options.base, options.ops, options.dtypes, options.seconds)
        return
    about = machine(options.device)
    print(about.get("gpu") or f"{about['cpu']}, {about['threads']} threads")
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
    mean = geometric_mean(rows, options.device)
    goals = [g for row in rows for g in row.get("goals", [])]
    if mean is not None:
        print(f"goals met: {sum(g['met'] for g in goals)} of {len(goals)}")
        print(f"geometric mean of x eager, forward and backward: {mean:.2f}")
    if options.json:
        content = {"machine": about, "rows": rows, "geometric_mean": mean}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if "gpu" in about:
        write_csv(rows, options.csv or gpu_csv(about["gpu"]), about)
    elif options.csv:
        write_csv(rows, options.csv, {})
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
        plot.write(rows, options.plot)


def gpu_csv(name: str) -> Path:
    """results/nvidia-h100-80gb-hbm3.csv for "NVIDIA H100 80GB HBM3"."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{stem}.csv"


def write_csv(rows: list[dict[str, Any]], path: Path, about: dict[str, Any]) -> None:
    """The table, every row with what it holds for."""
    about = {name: value for name, value in about.items() if name != "peaks"}
    columns = dict.fromkeys([*(c for row in rows for c in row if c != "peaks"), *about])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | about for row in rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m bench"))
    except ValueError as error:
        sys.exit(str(error))
