from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import DEVICE, IMPL, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import mlp as bench
from iv2kernels.ops import mlp as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(**inputs):
    return k.mlp(**inputs, impl=IMPL)


def reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate="tanh"):
    return op.reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(52, 96, 384), (9, 17, 33), (6, 8, 8)])
def test_matches_float64(isa, shape, dtype, approximate):
    check(kernel, reference, bench.inputs(shape, dtype) | {"approximate": approximate}, bench.WRT)


@at_real_size
def test_matches_float64_at_real_widths():
    for shape in ((417, 384, 1536), (17, 1408, 6144)):
        check(kernel, reference, bench.inputs(shape, torch.bfloat16), bench.WRT)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_over_its_whole_range(isa, dtype, approximate):
    """With identities for weights the op is GELU itself, and its derivative."""
    one = torch.eye(64, dtype=dtype)
    zero = torch.zeros(64, dtype=dtype)
    inputs = {"fc1_weight": one, "fc1_bias": zero, "fc2_weight": one, "fc2_bias": zero}
    inputs |= {"x": torch.linspace(-20, 20, 6400).view(100, 64).to(dtype)}
    check(kernel, reference, inputs | {"approximate": approximate}, ["x", "fc1_bias"])
    inputs["x"] = torch.tensor([0.0, -0.0, 6e4, -6e4]).to(dtype).repeat(1, 16)
    y = kernel(**inputs, approximate=approximate)
    expected = torch.tensor([0.0, 0.0, 6e4, 0.0]).repeat(1, 16)
    torch.testing.assert_close(y.float(), expected, atol=1e-6, rtol=5e-3)


@pytest.mark.parametrize("wrt", [(), *((name,) for name in bench.WRT), ("x", "fc2_weight")])
def test_partial_gradients(wrt):
    check(kernel, reference, bench.inputs((20, 96, 128), torch.float32), wrt)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(8, 100), st.integers(8, 200), st.sampled_from(DTYPES))
def test_any_shape(rows, width, hidden, dtype):
    check(kernel, reference, bench.inputs((rows, width, hidden), dtype), bench.WRT)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 10)])
def test_any_leading_axes(lead):
    inputs = bench.inputs((5, 24, 40), torch.float32)
    inputs["x"] = torch.randn(*lead, 24)
    expected, got = run(reference, inputs, bench.WRT), run(kernel, inputs, bench.WRT)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4)


def test_strided_and_expanded_inputs():
    inputs = bench.inputs((5, 96, 128), torch.float32)
    inputs["x"] = torch.randn(96, 60).t()
    inputs["fc1_weight"] = inputs["fc1_weight"].t().contiguous().t()
    check(kernel, reference, inputs, bench.WRT)
    x = torch.randn(60, 96, requires_grad=True)
    inputs["x"] = x
    (dx,) = torch.autograd.grad(kernel(**inputs).sum(), x)  # an expanded gradient
    (expected,) = torch.autograd.grad(reference(**inputs).sum(), x)
    torch.testing.assert_close(dx, expected, atol=1e-5, rtol=1e-4)


def test_another_output_width():
    inputs = bench.inputs((20, 64, 64), torch.float32)
    inputs |= {"fc2_weight": torch.randn(24, 64) / 8, "fc2_bias": torch.randn(24)}
    check(kernel, reference, inputs, bench.WRT)


def test_autocast_casts_like_torch():
    inputs = bench.inputs((20, 96, 128), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        check(kernel, reference, inputs, bench.WRT)
        assert kernel(**inputs).dtype == torch.bfloat16


@native_only
def test_threads_do_not_change_a_bit_of_the_bias_gradient(isa):
    # only there do sums of our own run over rows; the GEMMs are the library's
    inputs = bench.inputs((101, 96, 64), torch.float32)
    one, zero = torch.eye(96), torch.zeros(96)
    inputs = {"x": inputs["x"], "fc1_weight": one, "fc1_bias": zero}
    inputs |= {"fc2_weight": one, "fc2_bias": zero}
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, ["x", "fc1_bias"]))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((10, 24, 40), torch.float32)
    tests = ("test_schema", "test_faketensor")
    for save in (True, False):
        args = (*inputs.values(), "tanh", save, IMPL)
        torch.library.opcheck(op._fwd, args, test_utils=tests)
    dy, z = torch.randn(10, 24), torch.randn(10, 40)
    weights = (inputs["fc1_weight"], inputs["fc2_weight"])
    for needs in ([True] * 5, [False] * 5):
        args = (dy, inputs["x"], z, *weights, "none", needs, IMPL)
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
    inputs = bench.inputs((3, 8, 12), torch.float32)

    def raises(kind, match, **changed):
        with pytest.raises(kind, match=match):
            k.mlp(**inputs | changed)

    raises(TypeError, r"mlp: x must be floating point, got torch.int64", x=inputs["x"].long())
    raises(ValueError, "approximate must be tanh or none, got erf", approximate="erf")
    raises(ValueError, r"fc1_weight must be \[C_out, 7\] for x", x=torch.randn(3, 7))
    raises(ValueError, r"fc1_bias must be \[12\], got \[1\]", fc1_bias=torch.ones(1))
    raises(
        ValueError, r"fc2_weight must be \[C_out, 12\], got \[8, 9\]", fc2_weight=torch.ones(8, 9)
    )
    raises(ValueError, r"fc2_bias must be \[8\], got \[9\]", fc2_bias=torch.ones(9))
    half = inputs["fc2_weight"].bfloat16()
    raises(TypeError, r"fc2_weight must be torch.float32, like x, got torch.bf", fc2_weight=half)
    doubles = {name: value.double() for name, value in inputs.items()}
    raises(RuntimeError, f"{IMPL} cannot run: {IMPL} mlp", **doubles, impl=IMPL)
    assert k.mlp(**doubles).dtype == torch.float64
