"""The cases of the bench, one per op, shape and dtype, and the candidates that are timed on each.

A page ``bench/ops/<op>.py`` gives ``SHAPES``, ``WRT``, ``inputs`` and ``work``, and may give ``OP``
(the public name), ``DTYPES``, ``GPU_SHAPES`` (for a GPU, in place of ``SHAPES``),
``backward_work`` (as ``work``, of the backward pass alone), ``library(shape)``, which returns the
strongest library call of the same arguments, and ``goals(shape, dtype)``, the least value of
columns of the table on a CPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

import iv2kernels
from iv2kernels import _C, dispatch

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from compare import assert_as_accurate, errors, run

OPS = sorted(p.stem for p in (Path(__file__).parent / "ops").glob("*.py") if p.stem != "__init__")


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[Any, ...]
    dtype: str
    device: str = "cpu"

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
        return on_device(self.page.inputs(self.shape, getattr(torch, self.dtype)), self.device)

    def work(self) -> tuple[int, int]:
        """Flops and bytes of the forward pass."""
        return self.page.work(self.shape, getattr(torch, self.dtype))  # type: ignore[no-any-return]

    def goals(self) -> dict[str, float]:
        goals = getattr(self.page, "goals", None)
        return goals(self.shape, self.dtype) if goals and self.device == "cpu" else {}

    def default(self, rows: int) -> str:
        """The candidate that dispatch would take for a first tensor of so many rows."""
        chosen = dispatch.default(stem(self.page), self.device, getattr(torch, self.dtype), rows)
        if chosen == "native" and self.device == "cpu":
            return f"native {_C.available_isas()[-1]}"
        return "eager" if chosen == "reference" else chosen


def stem(page: ModuleType) -> str:
    """The op's row in dispatch."""
    return getattr(page, "STEM", page.__name__.rsplit(".", 1)[1])  # type: ignore[no-any-return]


def on_device(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments on a device, views of one tensor there as here; lists of blocks stay."""
    if device == "cpu":
        return inputs
    bases: dict[int, torch.Tensor] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, iv2kernels.Rope3d) and value.ids is not None:
            return replace(value, ids=moved(value.ids))
        if not torch.is_tensor(value):
            return value
        if value._base is None:
            return value.to(device)
        base = bases.setdefault(id(value._base), value._base.to(device))
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: moved(value) for name, value in inputs.items()}


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


def cases(ops: Sequence[str], dtypes: Sequence[str], device: str = "cpu") -> Iterator[Case]:
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
        known = dispatch.available(stem(page), device, torch.bfloat16)
        if device != "cpu" and "yes" not in [known[impl] for impl in known if impl != "reference"]:
            continue  # no kernel there
        shapes = page.SHAPES if device == "cpu" else getattr(page, "GPU_SHAPES", page.SHAPES)
        for dtype in getattr(page, "DTYPES", dtypes):
            for shape in shapes:
                yield Case(op, shape, dtype, device)


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
    known = dispatch.available(stem(case.page), case.device, getattr(torch, case.dtype))
    for impl in get_args(dispatch.Impl):
        if impl == "reference" or known[impl] != "yes":
            continue
        if impl == "native" and case.device == "cpu":
            for isa in isas:
                found[f"native {isa}"] = Call(ours(impl), inputs, wrt, isa)
        elif _takes(ours(impl), inputs, impl):
            found[impl] = Call(ours(impl), inputs, wrt)
    return found


def _takes(call: Callable[..., Any], inputs: dict[str, Any], impl: str) -> bool:
    """Whether an implementation takes these arguments; a library may have no kernel for a GPU."""
    try:
        call(**inputs)
    except RuntimeError as error:
        return impl not in dispatch.LIBRARIES and not isinstance(error, dispatch.UnsupportedError)
    return True


def accuracy(case: Case, call: Call) -> tuple[float, str | None]:
    """The worst relative L2 error of outputs and gradients, and what breaks the accuracy rule."""
    inputs, wrt = call.inputs, call.wrt

    def eager(**i: Any) -> Any:
        return case.call(**i, impl="reference")

    call._enter()
    exact = inputs | {"dtype": torch.float64} if "dtype" in inputs else inputs
    try:
        got = run(call.function, inputs, wrt)
    except RuntimeError as error:
        return float("nan"), f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expected, truth = run(eager, inputs, wrt), run(eager, exact, wrt, torch.float64)
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
