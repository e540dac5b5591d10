"""`python -m tests.gates.space`: compile every tile that tune() may choose; none may spill.

The default tiles have budgets (`python -m tests.gates`). The others have only this one: no stack
and no local memory. One that fails leaves the search space.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

from bench.cases import Call, Case
from iv2kernels import dispatch, tiles
from tests.gates.compiling import ARCHS, Launch, compiling
from tests.gates.measuring import cores, spread
from tests.gates.resources import Usage, usage

# Each with every alternative of the kernels that it launches.
CASES = [
    *(Case("attention", (1, 129, 2, head_dim), "bfloat16") for head_dim in (64, 88, 128)),
    *(Case("spatiotemporal_attention", (1, 129, 2, n), "bfloat16") for n in (64, 88, 128)),
    Case("linear", (4 * 417, 384, 1152), "bfloat16"),
]


def call_of(case: Case) -> Call:
    return Call(lambda **i: case.call(**i, impl="triton"), case.inputs(), case.wrt)


def alternatives(case: Case, arch: str) -> Iterator[tuple[Case, Launch]]:
    """What a case launches with the first alternative of each kernel, with the second, ..."""
    call = call_of(case)
    with mock.patch.object(dispatch, "why_not", return_value=None):
        with tiles.recording() as seen, compiling(arch):
            call.both()
        for i in range(1, max(map(len, seen.values()))):
            chosen = {knob: sizes[i] for knob, sizes in seen.items() if i < len(sizes)}
            with mock.patch.dict(tiles.CHOSEN, chosen), compiling(arch) as launches:
                call.both()
            for launch in launches:
                if not launch.name.startswith("spatiotemporal_attention_norm"):
                    yield case, launch


def measure(task: tuple[str, Case]) -> list[tuple[str, Usage]]:
    """What a case launches on an architecture beside the default, by name."""
    arch, case = task
    return [(launch.name, usage(arch, launch.compiled)) for _, launch in alternatives(case, arch)]


def complaint(case: Case, kernel: str, arch: str, found: Usage) -> str | None:
    """None for a tile that may stay."""
    if not found["local"] and not found["stack"]:
        return None
    return (
        f"{case.name}, {arch}: {kernel} must not spill, got {found['stack']} bytes of stack "
        f"and {found['local']} accesses to them"
    )


def main(given: Sequence[str] | None = None) -> int:
    """The number of tiles that spill, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.gates.space", description=__doc__)
    ops = sorted({case.op for case in CASES})
    parser.add_argument("ops", nargs="*", choices=[*ops, []], default=[])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["sm_80", "sm_90"])
    parser.add_argument("--jobs", type=int, default=cores(), help="cases at a time")
    options = parser.parse_args(given)
    chosen = [case for case in CASES if not options.ops or case.op in options.ops]
    tasks = [(arch, case) for arch in options.arch for case in chosen]
    wrong = []
    for (arch, case), kernels in spread(measure, tasks, options.jobs):
        for kernel, found in kernels:
            print(
                f"{case.name:52s} {arch:6s} {kernel[-100:]:100s} w{found['warps']} "
                f"{found['registers']:4d} {found['shared']:7d} {found['local']:5d}",
                flush=True,
            )
            wrong.append(complaint(case, kernel, arch, found))
    wrong = [text for text in wrong if text]
    print("\n".join(wrong))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
