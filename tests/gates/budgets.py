"""The budgets: what each kernel may take on each architecture, in budgets.json.

They only tighten. ``tighten`` takes what has become better and what is new; a budget that must be
loosened is deleted by hand, where a reviewer sees it, and taken anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import triton

from tests.gates.resources import Usage

PATH = Path(__file__).parent / "budgets.json"

# More is worse, more is better; the number of warps and of global accesses says nothing by itself.
COSTS = ("registers", "stack", "shared", "local", "atomic")
GAINS = ("blocks", "tensor", "async", "wide")
# No kernel spills or uses local memory, and none adds in the order of who comes first.
ZERO = ("stack", "local", "atomic")

Budgets = dict[str, Usage]


def load(path: Path = PATH) -> tuple[str, Budgets]:
    """The version of Triton that the budgets are of, and the budgets."""
    if not path.exists():
        return triton.__version__, {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.pop("triton"), found


def of(known: Budgets, ops: Sequence[str], archs: Sequence[str]) -> set[str]:
    """The names of the budgets of some ops on some architectures: "op: kernel, arch"."""
    return {n for n in known if n.split(": ")[0] in ops and n.split(", ")[-1] in archs}


def complaints(name: str, found: Usage, budget: Usage | None) -> list[str]:
    """What is wrong with a kernel."""
    wrong = [f"{name}: {key} must be 0, got {found[key]}" for key in ZERO if found[key]]
    if budget is None:
        return wrong
    for keys, sign, most in ((COSTS, 1, "at most"), (GAINS, -1, "at least")):
        wrong += [
            f"{name}: {key} must be {most} {budget[key]}, got {found[key]}"
            for key in keys
            if sign * found[key] > sign * budget[key]
        ]
    return wrong


def tighter(found: Usage, budget: Usage | None) -> Usage:
    """The better of both."""
    if budget is None:
        return found
    costs = {key: min(found[key], budget[key]) for key in COSTS}
    return found | costs | {key: max(found[key], budget[key]) for key in GAINS}


def save(budgets: Budgets, path: Path = PATH) -> None:
    """One line for each kernel and architecture."""
    lines = [f'"triton": {json.dumps(triton.__version__)}']
    for name, budget in sorted(budgets.items()):
        lines.append(f"{json.dumps(name)}: {json.dumps(budget, sort_keys=True)}")
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(path)  # another run may be reading
