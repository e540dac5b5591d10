from __future__ import annotations

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import attention_pool as bench
from iv2kernels.ops import attention_pool as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(**inputs):
    return k.attention_pool(**inputs, impl=IMPL)


def reference(x, query, eps=1e-5):
    return op.reference(x, query, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 52, 384, 16), (3, 5, 17, 3), (1, 93, 300, 25), (2, 3, 8, 4)])
def test_matches_float64(isa, shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), bench.WRT)


@at_real_size
@pytest.mark.parametrize("shape", [(1, 417, 1408, 16), (1, 129, 3200, 16), (1, 2049, 384, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_real_widths(shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), bench.WRT)


@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, query_dtype):
    inputs = bench.inputs((4, 93, 320, 8), dtype)
    inputs["query"] = inputs["query"].to(query_dtype)
    check(kernel, reference, inputs, bench.WRT)
    z, probs = kernel(**inputs)
    assert (z.dtype, probs.dtype) == (dtype, torch.float32)


def test_large_logits_and_equal_values(isa):
    inputs = bench.inputs((2, 20, 64, 4), torch.float32)
    inputs["query"] *= 40  # one token takes nearly all
    inputs["x"][0, 3] = 7  # no variance
    check(kernel, reference, inputs, bench.WRT)
    assert kernel(**inputs)[1].sum(1).allclose(torch.ones(2))


@pytest.mark.parametrize("wrt", [(), ("x",), ("query",)])
def test_partial_gradients(wrt):
    check(kernel, reference, bench.inputs((2, 11, 24, 5), torch.float32), wrt)


def test_probs_have_no_gradient():
    inputs = bench.inputs((2, 11, 24, 5), torch.float32)
    z, probs = kernel(**inputs | {"x": inputs["x"].requires_grad_()})
    assert z.requires_grad
    assert not probs.requires_grad


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(8, 300),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
)
def test_any_shape(batch, tokens, width, heads, dtype):
    inputs = bench.inputs((batch, tokens, width, heads), dtype)
    check_or_close(kernel, reference, inputs, bench.WRT, heads * width >= 256)


@pytest.mark.parametrize("shape", [(2, 0, 8, 3), (0, 5, 8, 3), (2, 5, 8, 0)])
def test_empty(shape):
    results = run(kernel, bench.inputs(shape, torch.float32), bench.WRT)
    assert results["output 0"].shape == (shape[0], shape[3], shape[2])
    assert all(value.eq(0).all() for value in results.values())


def test_strided_and_expanded_inputs():
    inputs = bench.inputs((4, 93, 320, 8), torch.float32)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["query"] = inputs["query"][:1].expand(4, 8, 320)
    check(kernel, reference, inputs, bench.WRT)
    query = inputs["query"].clone().requires_grad_()
    inputs["query"] = query
    (got,) = torch.autograd.grad(kernel(**inputs)[0].sum(), query)  # an expanded gradient
    (expected,) = torch.autograd.grad(reference(**inputs)[0].sum(), query)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((2, 101, 300, 20), torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((2, 5, 16, 3), torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._fwd, (*inputs.values(), 1e-5, IMPL), test_utils=tests)
    z, _, *kept = op._fwd(*inputs.values(), 1e-5, IMPL)
    for needs in ([True, True], [False, False]):
        args = (z, *inputs.values(), *kept, needs, IMPL)
        torch.library.opcheck(op._bwd, args, test_utils=tests)
    expected = run(kernel, inputs, bench.WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = bench.inputs((1, 4, 8, 2), torch.float32)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(kernel(**inputs)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors():
    x, query = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match=r"attention_pool: x must be floating point, got torch.int"):
        k.attention_pool(x.int(), query)
    with pytest.raises(TypeError, match="query must be floating point"):
        k.attention_pool(x, query.int())
    with pytest.raises(ValueError, match=r"x must be \[B, N, C\], got \[5, 8\]"):
        k.attention_pool(x[0], query)
    with pytest.raises(ValueError, match=r"query must be \[2, heads, 8\], got \[2, 3, 7\]"):
        k.attention_pool(x, query[..., 1:])
    with pytest.raises(RuntimeError, match=f"{IMPL} cannot run: {IMPL} attention_pool"):
        k.attention_pool(x.double(), query.double(), impl=IMPL)
