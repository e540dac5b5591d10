"""`python -m tests.gates [OP ...]`: compile the ops' Triton kernels, and hold them to budgets.

Nothing runs on a GPU: the figures are of the machine code, and no times.
"""

from __future__ import annotations

import argparse
import sys

import triton

from bench.cases import OPS
from iv2kernels import dispatch
from tests.gates import budgets
from tests.gates.compiling import ARCHS, launches
from tests.gates.resources import LIMITS, Usage, usage

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


def main() -> int:
    """The number of complaints, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[*_with_kernels(), []], default=[])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--tighten", action="store_true", help="write what is new or better")
    options = parser.parse_args()
    version, known = budgets.load()
    comparable = version == triton.__version__
    if not comparable:
        print(f"budgets are of Triton {version}, this is {triton.__version__}: only zeros count")
    print(f"{'kernel':88s} {'arch':7s} {_COLUMNS}")
    wrong, measured, launched = [], {}, set()
    ops = options.ops or _with_kernels()
    for arch in options.arch:
        for launch in launches(arch, ops):
            found = usage(arch, launch.compiled)
            name = f"{launch.name}, {arch}"
            launched.add(name)
            if not any(found[key] for key in budgets.ZERO):
                measured[name] = budgets.tighter(found, known.get(name))
            if options.tighten:  # at once: the next takes its time, and others may write meanwhile
                budgets.save(budgets.load()[1] | measured)
            print(_row(launch.name, arch, found), flush=True)
            budget = known.get(name) if comparable else None
            if comparable and budget is None and not options.tighten:
                wrong.append(f"{name}: has no budget; run with --tighten to take it")
            wrong += budgets.complaints(name, found, budget)
    unused = budgets.of(known, ops, options.arch) - launched
    if options.tighten:
        budgets.save({n: b for n, b in budgets.load()[1].items() if n not in unused})
    else:
        wrong += [f"{name}: has a budget, but nothing launches it" for name in sorted(unused)]
    print("\n".join(wrong))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
