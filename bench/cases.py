"""The cases of the bench, one per op, shape and dtype, and the candidates that are timed on each.

A page ``bench/ops/<op>.py`` gives ``SHAPES``, ``WRT``, ``inputs`` and ``work``, and may give ``OP``
(the public name), ``DTYPES``, ``library(shape)``, which returns the strongest library call of the
same arguments, and ``goals(shape, dtype)``, the least value of columns of the table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import iv2kernels
from iv2kernels import dispatch

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from compare import assert_as_accurate, errors, run

OPS = sorted(p.stem for p in (Path(__file__).parent / "ops").glob("*.py") if p.stem != "__init__")


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[Any, ...]
    dtype: str

    @property
    def page(self) -> ModuleType:
        return importlib.import_module(f"bench.ops.{self.op}")

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def call(self) -> Callable[..., Any]:
        return getattr(iv2kernels, getattr(self.page, "OP", self.op))  # type: ignore[no-any-return]

    @property
    def wrt(self) -> tuple[str, ...]:
        return tuple(self.page.WRT)

    def inputs(self) -> dict[str, Any]:
        return self.page.inputs(self.shape, getattr(torch, self.dtype))  # type: ignore[no-any-return]

    def work(self) -> tuple[int, int]:
        """Flops and bytes of the forward pass."""
        return self.page.work(self.shape, getattr(torch, self.dtype))  # type: ignore[no-any-return]

    def goals(self) -> dict[str, float]:
        goals = getattr(self.page, "goals", None)
        return goals(self.shape, self.dtype) if goals else {}


@dataclass(frozen=True)
class Call:
    """A candidate with its inputs: the forward pass, and forward with backward."""

    function: Callable[..., Any]
    inputs: dict[str, Any]
    wrt: tuple[str, ...]
    isa: str | None = None

    @property
    def has_backward(self) -> bool:
        return bool(self.wrt)

    def _enter(self) -> None:
        if self.isa is not None:
            dispatch.set_isa(self.isa)

    def forward(self) -> Any:
        self._enter()
        with torch.no_grad():
            return self.function(**self.inputs)

    def both(self) -> Any:
        if not self.wrt:
            return self.forward()
        self._enter()
        leaves = {n: _leaf(v, n in self.wrt) for n, v in self.inputs.items()}
        out = self.function(**leaves)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        return torch.autograd.grad(
            outs, [leaves[n] for n in self.wrt], [torch.ones_like(o) for o in outs]
        )


def _leaf(value: Any, needs: bool) -> Any:
    if torch.is_tensor(value) and value.is_floating_point():
        return value.detach().requires_grad_(needs)
    return value


def cases(ops: Sequence[str], dtypes: Sequence[str]) -> Iterator[Case]:
    """All cases of some ops; of all when none is named.

    Raises:
        ValueError: There is no such op or dtype.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"bench: op must be one of {', '.join(OPS)}, got {op}")
    for dtype in dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"bench: dtype must be float32, bfloat16 or float16, got {dtype}")
    for op in ops or OPS:
        page = importlib.import_module(f"bench.ops.{op}")
        for dtype in getattr(page, "DTYPES", dtypes):
            for shape in page.SHAPES:
                yield Case(op, shape, dtype)


def candidates(case: Case, isas: Sequence[str], *, compiled: bool) -> dict[str, Call]:
    """What is timed: eager, its torch.compile, the library, and ours on each instruction set."""
    inputs, wrt = case.inputs(), case.wrt

    def ours(impl: str) -> Callable[..., Any]:
        return lambda **i: case.call(**i, impl=impl)

    found = {"eager": Call(ours("reference"), inputs, wrt)}
    if compiled:
        torch.compiler.reset()
        found["compile"] = Call(torch.compile(ours("reference"), dynamic=False), inputs, wrt)
    library = getattr(case.page, "library", None)
    if library is not None:
        found["library"] = Call(library(case.shape), inputs, wrt)
    known = dispatch.available(_stem(case), "cpu", getattr(torch, case.dtype))
    if known["torch"] == "yes":
        found["torch"] = Call(ours("torch"), inputs, wrt)
    if known["native"] == "yes":
        for isa in isas:
            found[f"native {isa}"] = Call(ours("native"), inputs, wrt, isa)
    return found


def _stem(case: Case) -> str:
    """The op's row in dispatch."""
    return getattr(case.page, "STEM", case.op)  # type: ignore[no-any-return]


def accuracy(case: Case, call: Call) -> tuple[float, str | None]:
    """The worst relative L2 error of outputs and gradients, and what breaks the accuracy rule."""
    inputs, wrt = call.inputs, call.wrt

    def eager(**i: Any) -> Any:
        return case.call(**i, impl="reference")

    call._enter()
    got, expected = run(call.function, inputs, wrt), run(eager, inputs, wrt)
    exact = inputs | {"dtype": torch.float64} if "dtype" in inputs else inputs
    truth = run(eager, exact, wrt, torch.float64)
    worst = 0.0
    for name, value in got.items():
        if not value.is_floating_point():
            continue
        try:
            assert_as_accurate(name, value, expected[name], truth[name])
        except AssertionError as error:
            return float("nan"), str(error)
        worst = max(worst, errors(value, truth[name])[0])
    return worst, None
