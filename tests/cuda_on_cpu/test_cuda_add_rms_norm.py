from __future__ import annotations

import pytest
import torch
from compare import check, run
from shim import Kernels

import iv2kernels as k
from bench.ops import add_rms_norm as bench
from iv2kernels.ops import add_rms_norm as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(**inputs):
    return k.add_rms_norm(**inputs, impl="native")


def reference(x, residual, weight, layer_scale=None, drop_scale=None, eps=1e-6):
    return op.reference(x, residual, weight, layer_scale, drop_scale, eps)


def wrt_of(inputs):
    return [name for name in bench.WRT if inputs[name] is not None]


# one and two packs a thread, elements, one thread's worth, more rows than a chunk has
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 384), (1, 3, 3200), (2, 5, 93), (1, 1, 1), (3, 13, 24)])
def test_matches_float64(on_cpu, shape, dtype):
    inputs = bench.inputs(shape, dtype)
    check(native, reference, inputs, bench.WRT)


def test_rows_longer_than_registers_hold(on_cpu):
    inputs = bench.inputs((1, 2, 4100), torch.float32)
    check(native, reference, inputs, bench.WRT)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(on_cpu, dtype, residual):
    inputs = bench.inputs((2, 5, 40), dtype)
    inputs |= {"residual": inputs["residual"].to(residual), "weight": inputs["weight"].float()}
    check(native, reference, inputs, bench.WRT)


@pytest.mark.parametrize("missing", [("residual",), ("layer_scale",), ("drop_scale",)])
@pytest.mark.parametrize("wrt", [("x",), ("weight",), ("residual", "layer_scale")])
def test_partial_inputs_and_gradients(on_cpu, missing, wrt):
    inputs = bench.inputs((2, 7, 24), torch.float32) | dict.fromkeys(missing)
    check(native, reference, inputs, [name for name in wrt if inputs[name] is not None])


def test_unaligned_rows(on_cpu):
    inputs = bench.inputs((2, 3, 64), torch.bfloat16)
    storage = torch.empty(inputs["x"].numel() + 1, dtype=torch.bfloat16)
    inputs["x"] = storage[1:].view(2, 3, 64).copy_(inputs["x"])
    check(native, reference, inputs, bench.WRT)


def test_order_of_threads_does_not_change_a_bit(use):
    inputs = bench.inputs((2, 21, 96), torch.bfloat16)
    results = []
    for order in ("forward", "reverse", "random"):
        use(Kernels(order=order))
        results.append(run(native, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 5, 21)])
def test_under_sanitizers(use, sanitizer, shape):
    use(Kernels(sanitizer, order="random"))
    check(native, reference, bench.inputs(shape, torch.bfloat16), bench.WRT)


def moved(use, rows, dim):
    """Of forward and of backward, over what they must; bfloat16."""
    kernels = use(Kernels())
    inputs = bench.inputs((1, rows, dim), torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in bench.WRT]
    outputs = []
    forward = kernels.counted(lambda: outputs.extend(native(**inputs)))
    grads = [torch.randn_like(y) for y in outputs]
    backward = kernels.counted(lambda: torch.autograd.grad(outputs, leaves, grads))
    row, vectors = 2 * dim, 2 * 4 * dim
    # x, residual, y, r, rstd; dy, dr, r, x, rstd, dx, dresidual
    return (
        forward.moved / (rows * (4 * row + 4) + vectors),
        backward.moved / (rows * (6 * row + 4) + 2 * vectors),
    )


def test_moves_what_it_must(use):
    forward, _ = moved(use, 64, 1408)
    assert forward <= 1.02
    _, backward = moved(use, 16384, 128)  # chunks of 32 rows
    assert backward <= 1.1
