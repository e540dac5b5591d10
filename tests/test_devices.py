"""What would go wrong on a GPU and shows without one: tensors that lie on the CPU among its own.

Inputs are on "meta", which stands for the GPU here; definitions and the Python of kernels run on
them, and no operator may see both. BlockMask's lists are meant to be on the CPU.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementation import Placed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases import OPS, Call, Case, on_device
from iv2kernels import dispatch, native, ops
from tests.gpu.kernels import SMALL, call_of, case_of

PAGES = [
    importlib.import_module(f"iv2kernels.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)
]
NATIVE = [
    importlib.import_module(f"iv2kernels.native.{m.name}")
    for m in pkgutil.iter_modules(native.__path__)
]


GPU = "meta"
# On a GPU too these take what lies elsewhere: copies, and indices, which are copied.
_ACROSS = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor")


class OneDevice(TorchDispatchMode):
    """Every operator's tensors lie on one device; a CPU's number may join a GPU's tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.dim()]
        across = func._schema.name in _ACROSS or func.name() in _ACROSS
        devices = {x.device.type for x in tensors}
        assert across or len(devices) < 2, f"{func} of tensors on {sorted(devices)}"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _no_values(monkeypatch):
    """There are none to check."""
    monkeypatch.setattr("iv2kernels.ops.hard_negatives.check_values", lambda *_: None)
    monkeypatch.setattr("iv2kernels.ops.masks.check_weights", lambda *_: None)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # asks for its kind


def inputs_of(case: Case) -> dict[str, Any]:
    inputs = on_device(case.inputs(), GPU)
    if "temperature" in inputs and not torch.is_tensor(inputs["temperature"]):
        inputs["temperature"] = torch.empty((), device=GPU)
    return inputs


def outputs_and_gradients(case: Case, impl: str) -> list[Tensor]:
    inputs = inputs_of(case)
    leaves = {
        name: x.detach().requires_grad_(name in case.wrt)
        if torch.is_tensor(x) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    out = case.call(**leaves, impl=impl)
    outs = out if isinstance(out, tuple) else (out,)
    if not case.wrt:
        return list(outs)
    wanted = [leaves[name] for name in case.wrt]
    differentiable = [o for o in outs if o.requires_grad]
    ones = [torch.ones_like(o) for o in differentiable]
    return [*outs, *torch.autograd.grad(differentiable, wanted, ones)]


@pytest.mark.parametrize("op", SMALL)
def test_definitions_stay_on_the_gpu(op, monkeypatch):
    # what they read of a GPU
    monkeypatch.setattr(torch.Tensor, "item", lambda x: 1.0)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: 1.0)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype))
    with OneDevice():
        found = outputs_and_gradients(case_of(op, "cpu"), "reference")
    assert found
    assert all(x.is_meta for x in found)


class Address(int):
    """In the place of a tensor's first element's."""

    tensor: Tensor

    @classmethod
    def of(cls, x: Tensor | None) -> int:
        found = cls(0)
        if x is None:
            return 0
        found.tensor = x
        return found


class Recorder:
    """In the place of iv2kernels._C: keeps the tensors that kernels are given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def cuda_row_chunks(self, rows: int) -> int:
        return math.ceil(rows / 32)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*fields: Any) -> None:
            assert fields[-2:] == (0, 7), "neither the CPU's threads, nor another stream"
            self.given += [x.tensor for x in fields if isinstance(x, Address)]

        return launch


@pytest.fixture
def recorder(monkeypatch):
    """Ops call the Python of their kernels at once, and that the recorder."""
    found = Recorder()

    def direct(call: Any) -> Callable[..., Any]:
        name = call._schema.name.split("::")[1]
        op = name.rsplit("_", 1)[0]

        def run(*args: Any) -> Any:
            return getattr(importlib.import_module(dispatch._module(op, args[-1])), name)(
                *args[:-1]
            )

        return run

    for page in PAGES:
        for name, value in list(vars(page).items()):
            if isinstance(value, torch._ops.OpOverload) and value.namespace == "iv2kernels":
                monkeypatch.setattr(page, name, direct(value))
    for module in NATIVE:
        for name, value in (
            ("_C", found),
            ("ptr", Address.of),
            ("place", lambda x: (0, 7)),
            ("on_cuda", lambda x: True),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return found


@pytest.mark.parametrize("op", dispatch._ON_CUDA)
def test_cuda_kernels_are_given_what_is_on_the_gpu(op, recorder):
    with OneDevice():
        found = outputs_and_gradients(case_of(op, "cpu"), "native")
    assert recorder.given
    assert all(x.is_meta for x in (*recorder.given, *found))


@pytest.mark.parametrize("op", [op for op in SMALL if op != "masks"])
def test_triton_kernels_are_given_what_is_on_the_gpu(op, recorder, monkeypatch):
    triton = pytest.importorskip("triton")

    def run(self: Any, *args: Any, **options: Any) -> None:
        recorder.given += [x for x in (*args, *options.values()) if torch.is_tensor(x)]

    monkeypatch.setattr(triton.JITFunction, "run", run)
    with OneDevice():
        found = outputs_and_gradients(case_of(op, "cpu"), "triton")
    assert recorder.given
    assert all(x.is_meta for x in (*recorder.given, *found))


@pytest.mark.parametrize("op", ["add_rms_norm", "attention", "attention_blocks", "rope3d"])
def test_the_calls_of_tests_gpu_compile_as_a_whole(op):
    call = call_of(op, "native", "cpu")
    compiled = Call(
        torch.compile(call.function, fullgraph=True, backend="aot_eager"), call.inputs, call.wrt
    )
    for part in ("forward", "both"):
        got, expected = (getattr(c, part)() for c in (compiled, call))
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_every_op_with_a_kernel_has_a_small_case():
    assert set(SMALL) == set(OPS) - {"resized_crop_normalize"}


def test_what_tests_make_is_placed_and_what_the_package_makes_is_not():
    with Placed("meta") as mode:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, generator=g, requires_grad=True)
        assert x.is_meta
        assert x.is_leaf
        assert x.requires_grad
        assert torch.tensor([1, 2]).is_meta
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert case_of("add_rms_norm", "cpu").inputs()["weight"].is_meta
        # of the package: iv2kernels/ops/rope3d.py
        assert importlib.import_module("iv2kernels.ops.rope3d").axis_angles(2, 3, 9.0).is_cpu
        assert mode.outside(lambda: torch.ones(2))().is_cpu
        assert torch.ones(2).is_meta
    assert torch.ones(2).is_cpu


def test_views_of_one_tensor_are_views_of_one_there():
    inputs = case_of("attention", "cpu").inputs()
    moved = on_device(inputs, GPU)
    assert [x.stride() for x in moved.values()] == [x.stride() for x in inputs.values()]
    assert len({id(x._base) for x in moved.values()}) == 1
    assert on_device(case_of("rope3d", "cpu").inputs(), GPU)["rope"].ids.is_meta
