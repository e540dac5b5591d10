from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import add_rms_norm as bench
from iv2kernels.ops import add_rms_norm as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL = bench.SHAPES[:1] if ON_CPU else [(2, 17, 384)]


def kernel(**inputs):
    return k.add_rms_norm(**inputs, impl=IMPL)


def reference(x, residual, weight, layer_scale=None, drop_scale=None, eps=1e-6):
    return op.reference(x, residual, weight, layer_scale, drop_scale, eps)


def with_all(shape, dtype):
    inputs = bench.inputs(shape, dtype)
    return inputs, [name for name in bench.WRT if inputs[name] is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*REAL, (3, 5, 17), (1, 1, 1), (2, 93, 88)])
def test_matches_float64(isa, shape, dtype):
    inputs, wrt = with_all(shape, dtype)
    check(kernel, reference, inputs, wrt)


@at_real_size
def test_matches_float64_at_1b():
    inputs, wrt = with_all((1, 417, 1408), torch.bfloat16)
    check(kernel, reference, inputs, wrt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_keep_the_residual_stream(isa, dtype):
    inputs, wrt = with_all((2, 9, 40), dtype)
    inputs |= {name: inputs[name].float() for name in ("residual", "weight", "layer_scale")}
    check(kernel, reference, inputs, wrt)
    y, r = kernel(**inputs)
    assert y.dtype == dtype
    assert r.dtype == torch.float32


@pytest.mark.parametrize("missing", [(), ("residual",), ("layer_scale",), ("drop_scale",)])
@pytest.mark.parametrize("wrt", [("x",), ("weight",), ("residual", "layer_scale")])
def test_partial_inputs_and_gradients(missing, wrt):
    inputs, _ = with_all((2, 7, 24), torch.float32)
    inputs |= dict.fromkeys(missing)
    check(kernel, reference, inputs, [name for name in wrt if inputs[name] is not None])


def test_rms_norm_is_the_special_case():
    inputs = {"x": torch.randn(3, 50), "weight": torch.randn(50)}
    check(
        lambda **i: k.rms_norm(**i, impl=IMPL),
        lambda x, weight: reference(x, None, weight)[0],
        inputs,
        ["x", "weight"],
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 130), st.sampled_from(DTYPES))
def test_any_shape(batch, tokens, width, dtype):
    inputs, wrt = with_all((batch, tokens, width), dtype)
    check(kernel, reference, inputs, wrt)


def test_strided_and_expanded_inputs():
    inputs, wrt = with_all((2, 6, 32), torch.float32)
    inputs["x"] = torch.randn(2, 32, 6).transpose(1, 2)
    inputs["residual"] = torch.randn(1, 6, 32).expand(2, 6, 32)
    check(kernel, reference, inputs, wrt)
    x = torch.randn(2, 6, 32, requires_grad=True)
    k.rms_norm(x, torch.ones(32), impl=IMPL).sum().backward()  # an expanded gradient
    expected = torch.autograd.grad(reference(x, None, torch.ones(32))[0].sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-4)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs, wrt = with_all((4, 101, 96), torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, wrt))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs, wrt = with_all((2, 5, 16), torch.float32)
    ordered = [inputs[name] for name in ("x", "residual", "weight", "layer_scale", "drop_scale")]
    torch.library.opcheck(op._fwd, (*ordered, 1e-6, IMPL), test_utils="test_schema")
    torch.library.opcheck(op._fwd, (*ordered, 1e-6, IMPL), test_utils="test_faketensor")
    expected = run(kernel, inputs, wrt)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, wrt)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(
        k.rms_norm(x, torch.ones(8), impl=IMPL).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors():
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        k.add_rms_norm(x.long(), None, weight)
    with pytest.raises(
        ValueError, match=r"residual must be shaped like x \[2, 3, 8\], got \[2, 3\]"
    ):
        k.add_rms_norm(x, x[..., 0], weight)
    with pytest.raises(ValueError, match=r"weight must be \[8\], got \[7\]"):
        k.add_rms_norm(x, None, weight[:7])
    with pytest.raises(ValueError, match=r"layer_scale must be \[8\], got \[1\]"):
        k.add_rms_norm(x, None, weight, layer_scale=weight[:1])
    with pytest.raises(ValueError, match=r"drop_scale must be \[2\], got \[3\]"):
        k.add_rms_norm(x, None, weight, drop_scale=torch.ones(3))
    with pytest.raises(ValueError, match="rms_norm: x must be"):
        k.rms_norm(torch.tensor(1.0), weight)
    with pytest.raises(RuntimeError, match=f"{IMPL} cannot run: {IMPL} add_rms_norm takes"):
        k.rms_norm(x.double(), weight, impl=IMPL)
    with pytest.raises(ValueError, match="impl must be one of reference, native"):
        k.rms_norm(x, weight, impl="fast")
