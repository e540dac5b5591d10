from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, ON_GPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import gather_tokens as bench
from iv2kernels.ops import gather_tokens as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(**inputs):
    return k.gather_tokens(**inputs, impl=IMPL)


def example(shape, dtype, add=True):
    """Inputs with indices in any order, some of them twice."""
    samples, batch, tokens, keep, width = shape
    inputs = {
        "x": torch.randn(samples, tokens, width).to(dtype),
        "ids": torch.randint(tokens, (batch, keep)),
        "add": torch.randn(batch, keep, width).to(dtype) if add else None,
    }
    return inputs, ["x", "add"] if add else ["x"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", [(3, 3, 17, 9, 40), (1, 4, 33, 70, 93), (1, 1, 1, 1, 1)])
def test_matches_float64(isa, shape, add, dtype):
    inputs, wrt = example(shape, dtype, add)
    check(kernel, op.reference, inputs, wrt)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 2049, 417, 384), (1, 2, 2049, 411, 1408)])
def test_matches_float64_at_real_sizes(shape, dtype):
    inputs = bench.inputs(shape, dtype)
    check(kernel, op.reference, inputs, [name for name in ("x", "add") if inputs[name] is not None])


def test_without_a_sum_rows_are_copied_bit_by_bit():
    x = torch.randn(2, 9, 24).bfloat16()
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), 1e-40])
    ids = torch.arange(9, dtype=torch.int32).expand(2, 9)
    assert torch.equal(kernel(x=x, ids=ids).view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("flip", [False, True])
def test_mixed_dtypes_promote(dtypes, flip):
    x_dtype, add_dtype = (getattr(torch, name) for name in (dtypes[::-1] if flip else dtypes))
    inputs, wrt = example((1, 3, 20, 8, 24), torch.float32)
    inputs |= {"x": inputs["x"].to(x_dtype), "add": inputs["add"].to(add_dtype)}
    assert kernel(**inputs).dtype == torch.float32
    check(kernel, op.reference, inputs, wrt)
    wide = inputs | {"add": inputs["add"].double()}
    assert k.gather_tokens(**wide).dtype == torch.float64


@pytest.mark.parametrize("wrt", [("x",), ("add",)])
def test_partial_gradients(wrt):
    inputs, _ = example((2, 2, 9, 5, 16), torch.float32)
    check(kernel, op.reference, inputs, wrt)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, tokens, keep, width = integers(1, 4), integers(1, 40), integers(0, 50), integers(1, 70)
    shape = (data.draw(st.sampled_from([1, batch])), batch, tokens, keep, width)
    inputs, wrt = example(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans()))
    check(kernel, op.reference, inputs, wrt)


def test_strided_and_expanded_inputs():
    inputs, wrt = example((2, 2, 12, 7, 16), torch.float32)
    inputs["x"] = torch.randn(2, 24, 16)[:, ::2]
    check(kernel, op.reference, inputs, wrt)
    inputs["x"] = torch.randn(2, 16, 12).transpose(1, 2)
    check(kernel, op.reference, inputs, wrt)
    inputs["x"] = torch.randn(1, 12, 16).expand(2, -1, -1)
    inputs["ids"] = inputs["ids"].int().t().contiguous().t()
    inputs["add"] = torch.randn(1, 7, 16).expand(2, -1, -1)
    check(kernel, op.reference, inputs, wrt)
    x = torch.randn(2, 12, 16, requires_grad=True)
    kernel(x=x, ids=inputs["ids"]).sum().backward()  # an expanded gradient
    counts = torch.nn.functional.one_hot(inputs["ids"].long(), 12).sum(1)
    assert torch.equal(x.grad, counts[..., None].expand(2, 12, 16).float())


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs, wrt = example((1, 4, 50, 300, 96), torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, wrt))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs, wrt = example((1, 3, 20, 8, 24), torch.bfloat16)
    dy = torch.randn(3, 8, 24)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(op._fwd, (*inputs.values(), IMPL), test_utils=test)
        arguments = (dy, inputs["ids"], 1, 20, torch.bfloat16, IMPL)
        torch.library.opcheck(op._bwd, arguments, test_utils=test)
    expected = run(kernel, inputs, wrt)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, wrt)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs, _ = example((1, 3, 20, 8, 24), torch.float32)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(kernel(**inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(ON_CPU, reason="on the CPU it is an error")
def test_an_index_out_of_range_gives_a_row_of_nan():
    """And no gradient; nothing is read from where it points."""
    x, ids = torch.randn(2, 5, 8, requires_grad=True), torch.tensor([[0, 4], [1, 2]])
    good = k.gather_tokens(x, ids, impl=IMPL)
    for bad in (5, -1, 2**32):
        ids[1, 0] = bad
        y = k.gather_tokens(x, ids, impl=IMPL)
        assert y[1, 0].isnan().all()
        assert torch.equal(y.flatten(0, 1)[[0, 1, 3]], good.flatten(0, 1)[[0, 1, 3]])
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx[..., 0].tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]


@native_only
def test_an_index_out_of_range_is_an_error():
    x, ids = torch.randn(2, 5, 8), torch.tensor([[0, 4], [1, 2]])
    for bad in (5, -1, 2**32):
        with pytest.raises(ValueError, match=rf"gather_tokens: ids must be in \[0, 5\), got {bad}"):
            k.gather_tokens(x, ids.clone().fill_(bad), impl=IMPL)


def test_errors():
    x, ids = torch.randn(2, 5, 8), torch.tensor([[0, 4], [1, 2]])
    with pytest.raises(TypeError, match=r"tokens: x must be floating point, got torch\.int64"):
        k.gather_tokens(x.long(), ids)
    with pytest.raises(TypeError, match="add must be floating point"):
        k.gather_tokens(x, ids, add=x.long())
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch\.float32"):
        k.gather_tokens(x, ids.float())
    with pytest.raises(ValueError, match=r"ids must be \[B, M\], got \[2\]"):
        k.gather_tokens(x, ids[0])
    with pytest.raises(ValueError, match=r"x must be \[2 or 1, N, C\], got \[3, 5, 8\]"):
        k.gather_tokens(torch.randn(3, 5, 8), ids)
    with pytest.raises(ValueError, match=r"x must be \[2 or 1, N, C\], got \[5, 8\]"):
        k.gather_tokens(x[0], ids)
    with pytest.raises(ValueError, match=r"add must be \[2, 2, 8\], got \[2, 8\]"):
        k.gather_tokens(x, ids, add=x[:, 0])
    with pytest.raises(RuntimeError, match=f"{IMPL} cannot run: {IMPL} gather_tokens"):
        k.gather_tokens(x.double(), ids, impl=IMPL)


@pytest.mark.skipif(ON_GPU, reason="a GPU has no files that are all hole")
def test_offsets_beyond_int32(tmp_path):
    """Samples 2^31 elements and more apart, in a file that is all hole."""
    far = 2**31 + 40
    inputs, wrt = example((3, 3, 17, 9, 40), torch.bfloat16)
    expected = run(kernel, inputs, wrt)
    x = inputs["x"]
    storage = torch.from_file(
        str(tmp_path / "x"), shared=True, size=2 * far + x[0].numel(), dtype=x.dtype
    )
    inputs["x"] = storage.as_strided(x.shape, (far, 40, 1)).copy_(x)
    got = run(kernel, inputs, wrt)
    assert all(torch.equal(expected[name], got[name]) for name in got)
