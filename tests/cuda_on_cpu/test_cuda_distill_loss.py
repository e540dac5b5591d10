from __future__ import annotations

import pytest
import torch
from compare import check, run
from shim import Kernels

import iv2kernels as k
from bench.ops import distill_loss as bench
from iv2kernels.ops import distill_loss as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# What compare.run weighs a scalar by. Divided by it the loss has the gradient 1, and dx, which is
# saved in x.dtype, is rounded once, as in eager; test_a_scaled_loss has other gradients.
WEIGHT = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = WEIGHT.to(torch.bfloat16).item()


def native(**inputs):
    return k.distill_loss(**inputs, impl="native") / WEIGHT


def reference(x, target, norm_weight, norm_bias, ids=None, eps=1e-5):
    return op.reference(x, target, norm_weight, norm_bias, ids, eps) / WEIGHT


# one and two packs a thread, elements
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 9, 12, 384), (1, 13, 20, 3200), (3, 5, 7, 17), (2, 9, 4, 88)]
)
def test_matches_float64(on_cpu, shape, dtype):
    check(native, reference, bench.inputs(shape, dtype), bench.WRT)


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(on_cpu, dtype, target_dtype):
    inputs = bench.inputs((2, 9, 12, 40), dtype)
    inputs["target"] = inputs["target"].to(target_dtype)
    inputs |= {name: inputs[name].float() for name in ("norm_weight", "norm_bias")}
    check(native, reference, inputs, bench.WRT)


def test_rows_longer_than_registers_hold(on_cpu):
    check(native, reference, bench.inputs((1, 9, 9, 4100), torch.float32), bench.WRT)


@pytest.mark.parametrize("wrt", [(), ("x",), ("norm_weight",), ("norm_bias",), ("x", "norm_bias")])
@pytest.mark.parametrize("ids_dtype", [None, torch.int32, torch.int64])
def test_partial_gradients(on_cpu, wrt, ids_dtype):
    inputs = bench.inputs((2, 6, 6, 24), torch.float32)
    inputs["ids"] = None if ids_dtype is None else inputs["ids"].to(ids_dtype)
    check(native, reference, inputs, wrt)


def test_rows_of_zeros(on_cpu):
    inputs = bench.inputs((2, 20, 20, 96), torch.bfloat16)
    inputs["norm_bias"].zero_()
    inputs["x"][0, ::2] = 0
    inputs["target"][1] = 0
    check(native, reference, inputs, bench.WRT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_loss(on_cpu, dtype):
    inputs = bench.inputs((2, 60, 70, 96), dtype)
    check(lambda **i: native(**i) * 0.37, lambda **i: reference(**i) * 0.37, inputs, bench.WRT)


def test_an_index_out_of_range_gives_nan(on_cpu):
    inputs = bench.inputs((2, 5, 7, 16), torch.float32)
    inputs["ids"][1, 2] = 7
    assert native(**inputs).isnan()


def test_order_of_threads_does_not_change_a_bit(use):
    inputs = bench.inputs((2, 21, 24, 96), torch.bfloat16)
    results = []
    for order in ("forward", "random"):
        use(Kernels(order=order))
        results.append(run(native, inputs, bench.WRT))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 5, 5, 21)])
def test_under_sanitizers(use, sanitizer, shape):
    use(Kernels(sanitizer, order="random"))
    check(native, reference, bench.inputs(shape, torch.bfloat16), bench.WRT)


def test_moves_what_it_must(use):
    kernels = use(Kernels())
    rows, dim = 8192, 256  # chunks of 16 rows
    inputs = bench.inputs((1, rows, rows, dim), torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in bench.WRT]
    losses, row = [], 2 * dim
    forward = kernels.counted(lambda: losses.append(native(**inputs)))
    # x, the target's row, dx; two vectors of sums a chunk, written in half sectors and read again
    assert forward.moved <= 1.02 * rows * (3 * row + 8 + 6 * 4 * dim / 16)
    only_x = [value.detach() for value in leaves[1:]]
    inputs |= {"norm_weight": only_x[0], "norm_bias": only_x[1]}
    forward = kernels.counted(lambda: losses.append(native(**inputs)))
    assert forward.moved <= 1.1 * rows * (3 * row + 8)
    backward = kernels.counted(lambda: torch.autograd.grad(losses[1], leaves[:1]))
    assert backward.moved <= 1.02 * rows * 2 * row
