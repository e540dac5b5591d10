from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import DEVICE, IMPL, ON_CPU
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import linear as bench
from iv2kernels.library import linear as library
from iv2kernels.ops import linear as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On the CPU there is no kernel of ours.
OURS = "torch" if ON_CPU else IMPL
FIRST = (417, 384, 384) if ON_CPU else (130, 96, 200)


def kernel(**inputs):
    return k.linear(**inputs, impl=OURS)


def reference(x, weight, bias=None):
    return op.reference(x, weight, bias)


@pytest.fixture(params=["as found", "without oneDNN", "without halves"] if ON_CPU else ["none"])
def onednn(request, monkeypatch):
    """The private op may be absent, or GEMMs of halves: torch's own choice must do as well."""
    if request.param == "without oneDNN":
        monkeypatch.setattr(library, "_ONEDNN", {})
    if request.param == "without halves":
        monkeypatch.setattr(library, "WIDEN", {torch.bfloat16, torch.float16})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [FIRST, (93, 88, 176), (3, 5, 7), (1, 1, 1)])
def test_matches_float64(onednn, shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), bench.WRT)


@pytest.mark.parametrize("wrt", [("x",), ("weight",), ("bias",), ("x", "weight")])
@pytest.mark.parametrize("has_bias", [True, False])
def test_partial_inputs_and_gradients(has_bias, wrt):
    inputs = bench.inputs((64, 96, 256), torch.float32)
    inputs["bias"] = inputs["bias"] if has_bias else None
    check(kernel, reference, inputs, [name for name in wrt if inputs[name] is not None])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(8, 130), st.integers(8, 200), st.sampled_from(DTYPES))
def test_any_shape(rows, c_in, c_out, dtype):
    check(kernel, reference, bench.inputs((rows, c_in, c_out), dtype), bench.WRT)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 40)])
def test_any_leading_axes(lead):
    inputs = bench.inputs((5, 96, 64), torch.float32)
    inputs["x"] = torch.randn(*lead, 96)
    expected, got = run(reference, inputs, bench.WRT), run(kernel, inputs, bench.WRT)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4)


def test_strided_and_expanded_inputs():
    inputs = bench.inputs((5, 96, 128), torch.float32)
    inputs["x"] = torch.randn(96, 200).t()
    inputs["weight"] = torch.randn(96, 256)[:, ::2].t()
    check(kernel, reference, inputs, bench.WRT)
    inputs["x"] = torch.randn(1, 40, 96).expand(3, 40, 96)
    check(kernel, reference, inputs, bench.WRT)
    x = torch.randn(200, 96, requires_grad=True)
    kernel(x=x, weight=inputs["weight"]).sum().backward()  # an expanded gradient
    torch.testing.assert_close(x.grad, inputs["weight"].sum(0).expand(200, 96))


def test_autocast_casts_like_torch():
    inputs = bench.inputs((64, 96, 128), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        check(kernel, reference, inputs, bench.WRT)
        y = kernel(**inputs | {"weight": inputs["weight"].bfloat16()})
        assert k.linear(inputs["x"].double(), inputs["weight"].double()).dtype == torch.float64
    assert y.dtype == torch.bfloat16


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((10, 96, 640), torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._fwd, (*inputs.values(), OURS), test_utils=tests)
    dy = torch.randn(10, 640)
    for needs in ([True] * 3, [False] * 3):
        args = (dy, inputs["x"], inputs["weight"], needs, OURS)
        torch.library.opcheck(op._bwd, args, test_utils=tests)
    expected = run(kernel, inputs, bench.WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = bench.inputs((2, 8, 8), torch.float32)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(kernel(**inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    with pytest.raises(TypeError, match=r"linear: x must be floating point, got torch.int64"):
        k.linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"weight must be \[C_out, 8\] for x \[2, 3, 8\], got"):
        k.linear(x, weight.t())
    with pytest.raises(ValueError, match=r"weight must be \[C_out, C_in\] for x \[\], got"):
        k.linear(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match=r"bias must be \[5\], got \[1\]"):
        k.linear(x, weight, bias[:1])
    with pytest.raises(TypeError, match=r"weight must be torch.float32, like x, got torch.bf"):
        k.linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match=r"bias must be torch.float32, like x, got torch.float16"):
        k.linear(x, weight, bias.half())
    with pytest.raises(RuntimeError, match=f"implementation {OURS} cannot run"):
        k.linear(x.double(), weight.double(), impl=OURS)
