from __future__ import annotations

import pytest
import torch
from compare import check, run
from shim import Kernels

import iv2kernels as k
from bench.ops import attention as bench
from iv2kernels.ops import attention as op

DTYPES = [torch.bfloat16, torch.float16]
WRT = list(bench.WRT)


def pair(causal=False, scale=0.3, packed=None, return_lse=True):
    """The kernel and its definition, with the same options."""

    def kernel(q, k, v):
        options = {"causal": causal, "scale": scale, "packed": packed}
        return op.attention(q, k, v, **options, return_lse=return_lse, impl="native")

    def reference(q, k, v):
        o, lse = op.reference(q, k, v, causal, scale, packed)
        return (o, lse) if return_lse else o

    return kernel, reference


def random(dtype, q_shape, k_shape):
    g = torch.Generator().manual_seed(1)
    shapes = {"q": q_shape, "k": k_shape, "v": k_shape}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


# one tile and part of it, several of queries and of keys, warps without a query
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_len", "k_len", "heads", "kv_heads", "head_dim"),
    [
        (9, 21, 1, 1, 64),
        (35, 131, 2, 1, 64),
        (33, 93, 2, 2, 88),
        (131, 133, 1, 1, 88),
        (37, 45, 4, 2, 128),
    ],
)
def test_matches_float64(on_cpu, dtype, q_len, k_len, heads, kv_heads, head_dim, causal):
    inputs = random(dtype, (2, q_len, heads, head_dim), (2, k_len, kv_heads, head_dim))
    check(*pair(causal), inputs, WRT)


@pytest.mark.parametrize("head_dim", [64, 88, 128])
@pytest.mark.parametrize("scale", [-0.2, 0.0, 4.0])
def test_strided_views_and_scales(on_cpu, head_dim, scale):
    check(*pair(scale=scale), bench.inputs((1, 70, 2, head_dim), torch.bfloat16), WRT)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(on_cpu, causal):
    cu_q = torch.tensor([0, 70, 70, 71, 90], dtype=torch.int32)
    cu_k = torch.tensor([0, 80, 90, 100, 140], dtype=torch.int32)
    packed = k.Packed(cu_q, 70, cu_k, 80)
    inputs = random(torch.bfloat16, (90, 4, 88), (140, 2, 88))
    check(*pair(causal, packed=packed), inputs, WRT)


def test_queries_that_see_no_key(on_cpu):
    starts = torch.tensor([0, 40, 75], dtype=torch.int32), torch.tensor([0, 0, 9])
    packed = k.Packed(starts[0], 40, starts[1].int(), 9)
    kernel, reference = pair(causal=True, packed=packed)
    inputs = random(torch.bfloat16, (75, 1, 64), (9, 1, 64))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    (o, lse), (expected, expected_lse) = kernel(**inputs), reference(**inputs)
    assert (o[:66] == 0).all()
    assert (lse[:, :66] == -torch.inf).all()
    torch.testing.assert_close(lse, expected_lse, atol=0.05, rtol=0.02)
    torch.testing.assert_close(o, expected, atol=0.05, rtol=0.02)
    grads = torch.autograd.grad(o.float().square().sum(), list(inputs.values()))
    assert (grads[0][:66] == 0).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", WRT)
def test_partial_gradients_of_one_output(on_cpu, name):
    inputs = random(torch.bfloat16, (1, 9, 2, 64), (1, 11, 2, 64))
    check(*pair(return_lse=False), inputs, [name])
    kernel, reference = pair()
    check(lambda **x: kernel(**x)[1], lambda **x: reference(**x)[1], inputs, ["q", "k"])


def test_rows_that_are_not_aligned(on_cpu):
    inputs = random(torch.bfloat16, (1, 20, 1, 65), (1, 20, 1, 65))
    inputs = {name: x[..., 1:] for name, x in inputs.items()}
    check(*pair(), inputs, WRT)
    q, key, v = (x.clone().requires_grad_() for x in inputs.values())
    o = pair(return_lse=False)[0](q, key, v)
    d_o = torch.randn(o.numel() + 1).bfloat16()
    aligned, shifted = (
        torch.autograd.grad(o, (q, key, v), grad, retain_graph=True)
        for grad in (d_o[1:].clone().view_as(o), d_o[1:].view_as(o))
    )
    assert all(map(torch.equal, aligned, shifted))


def test_nan_is_not_hidden(on_cpu):
    inputs = random(torch.bfloat16, (1, 3, 1, 64), (1, 5, 1, 64))
    inputs["q"][0, 1, 0, 7] = torch.nan
    o, lse = pair()[0](**inputs)
    assert torch.isnan(o[0, 1]).all()
    assert torch.isnan(lse).tolist() == [[[False, True, False]]]


def test_order_of_threads_does_not_change_a_bit(use):
    inputs = random(torch.bfloat16, (1, 140, 2, 88), (1, 70, 1, 88))
    results = []
    for order in ("forward", "reverse", "random"):
        use(Kernels(order=order))
        results.append(run(pair()[0], inputs, WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("head_dim", [64, 88, 128])
def test_under_sanitizers(use, sanitizer, head_dim):
    use(Kernels(sanitizer, order="random"))
    check(
        *pair(causal=True), random(torch.bfloat16, (1, 37, 2, head_dim), (1, 67, 1, head_dim)), WRT
    )


# q, o and their like are read and written once, k and v once for each of the two heads they serve;
# a row of head_dim 88 is not made of whole sectors of 32 bytes
@pytest.mark.parametrize("head_dim", [64, 88, 128])
def test_moves_and_multiplies_what_it_must(use, head_dim):
    kernels = use(Kernels())
    inputs = random(torch.bfloat16, (1, 64, 2, head_dim), (1, 192, 1, head_dim))
    leaves = [x.requires_grad_() for x in inputs.values()]
    outputs = []
    forward = kernels.counted(lambda: outputs.append(pair(return_lse=False)[0](**inputs)))
    d_o = torch.randn_like(outputs[0])
    backward = kernels.counted(lambda: torch.autograd.grad(outputs, leaves, d_o))
    row, stats, spare = 2 * head_dim, 4 * 2 * 64, 1.1 if head_dim == 88 else 1
    queries, keys = 2 * 64 * row, 192 * row
    assert forward.moved <= spare * (2 * queries + 2 * 2 * keys + stats)
    # q, do, o, dq, lse and delta, then q, do, lse and delta for each block of keys
    blocks = 3
    first, second = 4 * queries + 2 * 2 * keys + 2 * stats, 2 * queries + 2 * stats
    assert backward.moved <= spare * (first + blocks * second + 4 * keys)
    assert forward.bank_conflicts == backward.bank_conflicts == 0
    product = 2 * 64 * 192 * head_dim / (16 * 8 * 16)
    assert 2 * product <= forward.matrix_products <= 1.05 * 2 * product
    assert 7 * product <= backward.matrix_products <= 1.06 * 7 * product
