"""The budgets: what each kernel may take on each architecture, in budgets.json.

They only tighten. ``tighten`` takes what has become better and what is new; a budget that must be
loosened is deleted by hand, where a reviewer sees it, and taken anew. One that admits a spill says
how large it is, and with it only shrinks.
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
# No kernel spills or uses local memory, but for those whose budget admits it; and none adds in the
# order of who comes first.
ADMITTED = ("stack", "local")
ZERO = (*ADMITTED, "atomic")

Budgets = dict[str, Usage]


def load(path: Path = PATH) -> tuple[str, Budgets]:
    """The version of Triton that the budgets are of, and the budgets."""
    if not path.exists():
        return triton.__version__, {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.pop("triton"), found


def of(known: Budgets, op: str, arch: str, dtypes: Sequence[str]) -> set[str]:
    """The names of an op's budgets on an architecture: "op: kernel dtype #2, arch"."""
    ends = tuple(f" {dtype}" for dtype in dtypes)
    return {
        n
        for n in known
        if n.startswith(f"{op}: ")
        and n.endswith(f", {arch}")
        and n.removesuffix(f", {arch}").split(" #")[0].endswith(ends)
    }


def complaints(name: str, found: Usage, budget: Usage | None) -> list[str]:
    """What is wrong with a kernel. None may spill, and a multiprocessor must have room for it."""
    most, least = dict.fromkeys(ZERO, 0), {"blocks": 1}
    if budget is not None:
        most |= {key: budget[key] for key in COSTS}
        least |= {key: budget[key] for key in GAINS}
    wrong = [
        f"{name}: {key} must be {f'at most {limit}' if limit else 0}, got {found[key]}"
        for key, limit in most.items()
        if found[key] > limit
    ]
    return wrong + [
        f"{name}: {key} must be at least {limit}, got {found[key]}"
        for key, limit in least.items()
        if found[key] < limit
    ]


def may_be_taken(found: Usage, budget: Usage | None, admit: bool) -> bool:
    """Whether it may become a budget: a new spill must be admitted."""
    known = budget or dict.fromkeys(ZERO, 0)
    spills = any(found[key] > known[key] for key in ADMITTED)
    return found["blocks"] > 0 and not found["atomic"] and (admit or not spills)


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
