"""`python -m tests.gates [OP ...]`: compile the ops' Triton kernels, and hold them to budgets.

Nothing runs on a GPU: the figures are of the machine code, and no times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import triton

from bench.cases import OPS
from iv2kernels import dispatch
from tests.gates import budgets
from tests.gates.compiling import ARCHS, DTYPES, FULL, dtypes_of
from tests.gates.measuring import Task, cores, measure, spread
from tests.gates.resources import LIMITS, Usage

_COLUMNS = "registers  shared warps blocks occ% tensor async wide/all  local"


def _with_kernels() -> list[str]:
    return [op for op in OPS if dispatch._exists(op, "triton")]


def _row(name: str, arch: str, found: Usage) -> str:
    occupancy = 100 * found["blocks"] * found["warps"] // LIMITS[arch].warps
    return (
        f"{name:88s} {arch:7s} {found['registers']:9d} {found['shared']:7d} {found['warps']:5d} "
        f"{found['blocks']:6d} {occupancy:4d} {found['tensor']:6d} {found['async']:5d} "
        f"{found['wide']:4d}/{found['global']:<4d} {found['local']:5d}"
    )


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[*_with_kernels(), []], default=[])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help=f"bfloat16 but on {FULL}")
    parser.add_argument("--jobs", type=int, default=cores(), help="ops at a time")
    parser.add_argument("--tighten", action="store_true", help="write what is new or better")
    parser.add_argument("--admit", action="store_true", help="with --tighten: write spills, too")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """The number of complaints, at most 1."""
    options = _options(given)
    version, known = budgets.load()
    comparable = version == triton.__version__
    if not comparable:
        print(f"budgets are of Triton {version}, this is {triton.__version__}: only zeros count")
    print(f"{'kernel':88s} {'arch':7s} {_COLUMNS}")
    tasks = [
        Task(arch, op, tuple(options.dtypes or dtypes_of(arch)))
        for arch in options.arch
        for op in options.ops or _with_kernels()
    ]
    wrong = []
    spills: dict[str, list[bool]] = {arch: [] for arch in options.arch}
    for task, kernels in spread(measure, tasks, options.jobs):
        taken = {}
        unused = budgets.of(known, task.op, task.arch, task.dtypes)
        for kernel, found in kernels:
            name = f"{kernel}, {task.arch}"
            unused.discard(name)
            spills[task.arch].append(any(found[key] for key in budgets.ADMITTED))
            budget = known.get(name) if comparable else None
            print(_row(kernel, task.arch, found), flush=True)
            if options.tighten and budgets.may_be_taken(found, budget, options.admit):
                taken[name] = budgets.tighter(found, budget)
            if comparable and budget is None and not options.tighten:
                wrong.append(f"{name}: has no budget; run with --tighten to take it")
            wrong += budgets.complaints(name, found, taken.get(name, budget))
        if options.tighten:  # at once: the next takes its time, and others may write meanwhile
            kept = {n: b for n, b in budgets.load()[1].items() if n not in unused}
            budgets.save(kept | taken)
        else:
            wrong += [f"{name}: has a budget, but nothing launches it" for name in sorted(unused)]
    for arch, of_kernels in spills.items():
        print(f"{arch}: {sum(of_kernels)} of {len(of_kernels)} kernels spill")
    print("\n".join(wrong))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
