from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import distill_loss as bench
from iv2kernels.ops import distill_loss as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# What compare.run weighs a scalar by. Divided by it the loss has the gradient 1, and dx, which is
# saved in x.dtype, is rounded once, as in eager; test_a_scaled_loss has other gradients.
WEIGHT = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = WEIGHT.to(torch.bfloat16).item()


def kernel(**inputs):
    return k.distill_loss(**inputs, impl=IMPL) / WEIGHT


def reference(x, target, norm_weight, norm_bias, ids=None, eps=1e-5):
    return op.reference(x, target, norm_weight, norm_bias, ids, eps) / WEIGHT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 52, 64, 384), (3, 5, 7, 17), (2, 9, 4, 88)])
def test_matches_float64(isa, shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), bench.WRT)


@at_real_size
@pytest.mark.parametrize("shape", [(1, 416, 416, 1408), (1, 101, 417, 3200)])
def test_matches_float64_at_real_widths(shape):
    check(kernel, reference, bench.inputs(shape, torch.bfloat16), bench.WRT)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(isa, dtype, target_dtype):
    inputs = bench.inputs((2, 9, 12, 40), dtype)
    inputs["target"] = inputs["target"].to(target_dtype)
    inputs |= {name: inputs[name].float() for name in ("norm_weight", "norm_bias")}
    check(kernel, reference, inputs, bench.WRT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros(isa, dtype):
    inputs = bench.inputs((2, 20, 20, 96), dtype)
    inputs["norm_bias"].zero_()
    inputs["x"][0, ::2] = 0
    inputs["target"][1] = 0
    check(kernel, reference, inputs, bench.WRT)


@pytest.mark.parametrize("wrt", [(), ("x",), ("norm_weight",), ("norm_bias",), ("x", "norm_bias")])
@pytest.mark.parametrize("ids_dtype", [None, torch.int32, torch.int64])
def test_partial_gradients(wrt, ids_dtype):
    inputs = bench.inputs((2, 6, 6, 24), torch.float32)
    inputs["ids"] = None if ids_dtype is None else inputs["ids"].to(ids_dtype)
    check(kernel, reference, inputs, wrt)


@settings(max_examples=25 if ON_CPU else 6, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(4, 40),
    st.integers(1, 30),
    st.integers(8, 130),
    st.sampled_from(DTYPES),
)
def test_any_shape(batch, rows, tokens, width, dtype):
    check(kernel, reference, bench.inputs((batch, rows, tokens, width), dtype), bench.WRT)


def test_no_rows():
    inputs = bench.inputs((2, 0, 3, 8), torch.float32)
    results = run(kernel, inputs, bench.WRT)
    assert results["output 0"].isnan()
    assert results["dx"].shape == (2, 0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_loss(dtype):
    inputs = bench.inputs((4, 101, 120, 96), dtype)
    check(lambda **i: kernel(**i) * 0.37, lambda **i: reference(**i) * 0.37, inputs, bench.WRT)


def test_strided_inputs():
    inputs = bench.inputs((2, 6, 8, 32), torch.float32)
    inputs["x"] = torch.randn(2, 32, 6).transpose(1, 2)
    inputs["target"] = torch.randn(1, 8, 32).expand(2, 8, 32)
    inputs["ids"] = inputs["ids"].t().contiguous().t()
    check(kernel, reference, inputs, bench.WRT)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((4, 101, 120, 96), torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((2, 5, 7, 16), torch.float32)
    for needs in ([True, True], [False, False]):
        args = (*inputs.values(), 1e-5, needs, IMPL)
        torch.library.opcheck(op._fwd, args, test_utils=("test_schema", "test_faketensor"))
    args = (torch.tensor(0.5), torch.randn(2, 5, 16), torch.randn(16), torch.randn(16), 10, 16)
    torch.library.opcheck(op._bwd, (*args, IMPL), test_utils=("test_schema", "test_faketensor"))
    expected = run(kernel, inputs, bench.WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = bench.inputs((1, 2, 2, 8), torch.float32)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(kernel(**inputs).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(ON_CPU, reason="on the CPU it is an error")
def test_an_index_out_of_range_makes_the_loss_nan():
    inputs = bench.inputs((2, 5, 7, 16), torch.float32)
    for bad in (7, -1):
        ids = inputs["ids"].clone()
        ids[1, 2] = bad
        assert k.distill_loss(**inputs | {"ids": ids}, impl=IMPL).isnan()


def test_errors():
    inputs = bench.inputs((2, 5, 7, 16), torch.float32)

    def raises(kind, match, **changed):
        with pytest.raises(kind, match=match):
            k.distill_loss(**inputs | changed)

    x, target, ids = inputs["x"], inputs["target"], inputs["ids"]
    raises(TypeError, "x must be floating point, got torch.int64", x=x.long())
    raises(TypeError, "target must be floating point", target=target.int())
    raises(TypeError, "target must be detached", target=target.clone().requires_grad_())
    raises(ValueError, r"x must be \[B, M, D\], got \[2, 5\]", x=x[..., 0])
    raises(ValueError, r"target must be \[2, N, 16\], got \[2, 7, 15\]", target=target[..., 1:])
    raises(ValueError, r"target must be \[2, 5, 16\], got \[2, 7, 16\]", ids=None)
    raises(ValueError, r"norm_weight must be \[16\], got \[1\]", norm_weight=torch.ones(1))
    raises(ValueError, r"norm_bias must be \[16\], got \[\]", norm_bias=torch.tensor(1.0))
    raises(TypeError, "ids must be int32 or int64, got torch.float32", ids=ids.float())
    raises(ValueError, r"ids must be \[2, 5\], got \[2, 4\]", ids=ids[:, 1:])
    raises(ValueError, r"ids must be in \[0, 7\), got 7", ids=torch.full_like(ids, 7))
    raises(ValueError, r"ids must be in \[0, 7\), got -1", ids=ids - 1 - ids.min())
    raises(RuntimeError, f"{IMPL} cannot run: {IMPL} distill_loss", x=x.double(), impl=IMPL)
