from __future__ import annotations

import pytest
import torch
from compare import check, run
from shim import Kernels

import iv2kernels as k
from iv2kernels.ops import gather_tokens as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(**inputs):
    return k.gather_tokens(**inputs, impl="native")


def example(shape, dtype, add=True):
    """Inputs with indices in any order, some of them twice."""
    samples, batch, tokens, keep, width = shape
    inputs = {
        "x": torch.randn(samples, tokens, width).to(dtype),
        "ids": torch.randint(tokens, (batch, keep)),
        "add": torch.randn(batch, keep, width).to(dtype) if add else None,
    }
    return inputs, ["x", "add"] if add else ["x"]


# a table for all, elements, two slabs of columns, one of anything
SHAPES = [(3, 3, 17, 9, 40), (1, 4, 33, 70, 93), (2, 2, 5, 3, 2304), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(on_cpu, shape, add, dtype):
    inputs, wrt = example(shape, dtype, add)
    check(native, op.reference, inputs, wrt)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("flip", [False, True])
def test_mixed_dtypes(on_cpu, dtypes, flip):
    x_dtype, add_dtype = (getattr(torch, name) for name in (dtypes[::-1] if flip else dtypes))
    inputs, wrt = example((1, 3, 20, 8, 24), torch.float32)
    inputs |= {"x": inputs["x"].to(x_dtype), "add": inputs["add"].to(add_dtype)}
    check(native, op.reference, inputs, wrt)


def test_without_a_sum_rows_are_copied_bit_by_bit(on_cpu):
    x = torch.randn(2, 9, 24).bfloat16()
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), 1e-40])
    ids = torch.arange(9, dtype=torch.int32).expand(2, 9)
    assert torch.equal(native(x=x, ids=ids).view(torch.int16), x.view(torch.int16))


def test_strided_inputs(on_cpu):
    inputs, wrt = example((2, 2, 12, 7, 16), torch.float32)
    for x in (torch.randn(2, 24, 16)[:, ::2], torch.randn(2, 16, 12).transpose(1, 2)):
        check(native, op.reference, inputs | {"x": x}, wrt)
    check(native, op.reference, inputs | {"x": torch.randn(2, 12, 20)[..., 1:17]}, wrt)


def test_an_index_out_of_range_gives_nan_and_no_gradient(on_cpu):
    x = torch.randn(1, 5, 24, requires_grad=True)
    ids = torch.tensor([[0, 5, -1], [4, 2**31 - 1, 0]])
    y = native(x=x, ids=ids)
    assert y[0, 1:3].isnan().all()
    assert y[1, 1].isnan().all()
    assert torch.equal(y[:, 0], x[0, [0, 4]])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[0, :, 0].tolist() == [2, 0, 0, 0, 1]


def test_order_of_threads_does_not_change_a_bit(use):
    inputs, wrt = example((1, 4, 5, 300, 96), torch.float32)
    results = []
    for order in ("forward", "random"):
        use(Kernels(order=order))
        results.append(run(native, inputs, wrt))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_under_sanitizers(use, sanitizer):
    use(Kernels(sanitizer, order="random"))
    for shape in ((2, 2, 3, 4, 264), (1, 2, 5, 7, 37)):
        inputs, wrt = example(shape, torch.bfloat16)
        check(native, op.reference, inputs, wrt)
    inputs, wrt = example((2, 2, 4, 5, 16), torch.float32, add=False)
    inputs["x"] = torch.randn(2, 8, 16)[:, ::2]
    check(native, op.reference, inputs, wrt)


def test_moves_what_it_must(use):
    kernels = use(Kernels())
    batch, tokens, keep, width = 2, 40, 10, 384
    inputs, _ = example((batch, batch, tokens, keep, width), torch.bfloat16)
    x, row = inputs["x"].requires_grad_(), 2 * width
    outputs = []
    forward = kernels.counted(lambda: outputs.append(native(**inputs)))
    assert forward.moved <= 1.02 * batch * keep * 3 * row
    dy = torch.randn_like(outputs[0])
    backward = kernels.counted(lambda: torch.autograd.grad(outputs, [x], [dy]))
    assert backward.moved <= 1.02 * batch * (keep + tokens) * row
