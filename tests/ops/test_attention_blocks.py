from __future__ import annotations

import pytest
import torch
from compare import check, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import attention as bench
from iv2kernels import _C
from iv2kernels.ops import attention as page
from iv2kernels.ops import attention_blocks as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WRT = list(bench.WRT)
NATIVE = ON_CPU
# Triton's interpreter takes some 20 ms a program: it gets fewer dtypes and samples.
BATCH = 2 if NATIVE else 1


def pair(blocks, scale=0.3):
    """The kernel and its definition, with the same lists."""

    def kernel(q, k, v):
        return page.attention(q, k, v, scale=scale, blocks=blocks, return_lse=True, impl=IMPL)

    def reference(q, k, v):
        return page.reference(q, k, v, False, scale, None, blocks)

    return kernel, reference


def random(dtype, q_shape, k_shape):
    g = torch.Generator().manual_seed(1)
    shapes = {"q": q_shape, "k": k_shape, "v": k_shape}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def lists(q_starts, k_starts, seen):
    offsets = torch.tensor([0, *map(len, seen)]).cumsum(0)
    indices = [j for keys in seen for j in keys]
    return k.BlockMask(
        *(torch.as_tensor(x).int().cpu() for x in (q_starts, k_starts, offsets, indices))
    )


# Blocks of odd sizes; key block 2 is seen by nobody.
ODD = lists(
    [0, 1, 70, 75, 140],
    [0, 33, 34, 50, 121, 200],
    [[0, 1, 3, 4], [3], [0, 4], [1, 4]],
)


@pytest.mark.parametrize("dtype", DTYPES if NATIVE else DTYPES[:2])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((2, 2) if NATIVE else (1, 1), 88), ((3, 1) if NATIVE else (2, 1), 24)]
)
def test_odd_blocks_match_float64(isa, dtype, heads, head_dim):
    inputs = random(dtype, (BATCH, 140, heads[0], head_dim), (BATCH, 200, heads[1], head_dim))
    check(*pair(ODD, head_dim**-0.5), inputs, WRT)


def test_keys_that_nobody_sees_have_no_gradient():
    inputs = random(torch.float32, (1, 140, 2, 16), (1, 200, 2, 16))
    grads = run(pair(ODD)[0], inputs, WRT)
    assert (grads["dk"][:, 34:50] == 0).all()
    assert (grads["dv"][:, 34:50] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "blocks",
    [
        k.per_frame((3, 5, 7), cls_token=True),
        k.per_tube((4, 5, 6), cls_token=True),
        k.spacetime_window((4, 5, 7), 1, 1),
        k.spacetime_window((5, 4, 8), 1, cls_token=True),
        k.all_blocks(150, 31),
    ],
    ids=["frame", "tube", "window", "frames", "all"],
)
def test_patterns_match_float64(isa, dtype, blocks):
    n = blocks.num_queries
    check(*pair(blocks), random(dtype, (1, n, BATCH, 64), (1, n, BATCH, 64)), WRT)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_length_in_strided_views(dtype):
    blocks = k.per_frame((4, 16, 16), cls_token=True)
    check(*pair(blocks, 88**-0.5), bench.inputs((1, 1025, 2, 88), dtype), WRT)


@settings(max_examples=15 if NATIVE else 3, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(_C.available_isas()))
def test_any_lists(data, dtype, isa):
    sizes = st.lists(st.integers(1, 90 if NATIVE else 50), min_size=1, max_size=5)
    q_sizes, k_sizes = data.draw(sizes), data.draw(sizes)
    keys = st.sets(st.integers(0, len(k_sizes) - 1), min_size=1).map(sorted)
    seen = [data.draw(keys) for _ in q_sizes]
    starts = [torch.tensor([0, *x]).cumsum(0) for x in (q_sizes, k_sizes)]
    blocks = lists(*starts, seen)
    inputs = random(dtype, (BATCH, blocks.num_queries, 2, 40), (BATCH, blocks.num_keys, 2, 40))
    before = _C.isa()
    k.set_isa(isa)
    try:
        kernel, reference = pair(blocks)
        got, truth = run(kernel, inputs, WRT), run(reference, inputs, WRT, torch.float64)
        for name, value in got.items():
            tolerance = 40 * torch.finfo(dtype).eps * (1 + truth[name].abs().max().item())
            torch.testing.assert_close(value.double(), truth[name].double(), atol=tolerance, rtol=0)
    finally:
        k.set_isa(before)


def test_masks_are_what_they_say():
    t, y, x = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(5), indexing="ij")
    t, y, place = t.flatten(), y.flatten(), (5 * y + x).flatten()
    grid = (3, 4, 5)
    same_frame = t[:, None] == t
    assert torch.equal(k.per_frame(grid).dense(), same_frame)
    with_cls = k.per_frame(grid, cls_token=True)
    dense = with_cls.dense()
    assert dense[0].all()
    assert dense[:, 0].all()
    assert torch.equal(dense[1:, 1:], same_frame)
    order = torch.arange(60).view(3, 20).T.flatten()  # tube order
    same_place = place[order][:, None] == place[order]
    assert torch.equal(k.per_tube(grid).dense(), same_place)
    near = (t[:, None] - t).abs() <= 1
    assert torch.equal(k.spacetime_window(grid, 1).dense(), near)
    near &= (y[:, None] - y).abs() <= 2
    window = k.spacetime_window(grid, 1, 2)
    assert torch.equal(window.dense(), near)
    assert window.density == near.double().mean().item()
    assert k.all_blocks(7, 3, cls_token=True).dense().all()
    assert k.all_blocks(7, 3).q_starts.tolist() == [0, 3, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_are_dense_attention(isa, dtype):
    # Blocks of 48 queries and lists that merge to one run are the native tiles of the dense op.
    n = 300 if NATIVE else 130
    inputs = random(dtype, (BATCH, n, BATCH, 32), (BATCH, n, BATCH, 32))
    got = run(pair(k.all_blocks(n, 48))[0], inputs, WRT)
    expected = run(
        lambda **x: page.attention(**x, scale=0.3, return_lse=True, impl=IMPL), inputs, WRT
    )
    close = {"atol": 2e-2, "rtol": 1e-2}
    for name in ("output 0", "output 1"):
        torch.testing.assert_close(
            got[name], expected[name], **({"atol": 0, "rtol": 0} if NATIVE else close)
        )
    got = run(pair(k.all_blocks(n, 64))[0], inputs, WRT)
    for name in ("dk", "dv", "dq"):
        torch.testing.assert_close(got[name], expected[name], **close)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(isa, dtype):
    blocks = k.spacetime_window((8, 13, 13), 4, cls_token=True)  # few heads: the keys are split
    n = blocks.num_queries
    inputs = random(dtype, (1, n, 2, 24), (1, n, 1, 24))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(pair(blocks)[0], inputs, WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("name", WRT)
def test_partial_gradients(name):
    check(*pair(ODD), random(torch.float32, (1, 140, 2, 16), (1, 200, 2, 16)), [name])


def test_empty_batch():
    check(*pair(ODD), random(torch.float32, (0, 140, 2, 16), (0, 200, 2, 16)), WRT)


def test_opcheck_compile_and_checkpoint():
    inputs = random(torch.float32, (2, 140, 2, 16), (2, 200, 2, 16))
    ordered = (*inputs.values(), ODD.q_blocks, ODD.runs, ODD.pairs, 0.3, IMPL)
    torch.library.opcheck(op._fwd, ordered, test_utils="test_schema")
    torch.library.opcheck(op._fwd, ordered, test_utils="test_faketensor")
    kernel = pair(ODD)[0]
    expected = run(kernel, inputs, WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")

    def checkpointed(**args):
        return checkpoint(kernel, **args, use_reentrant=False)

    for f in (compiled, checkpointed):
        got = run(f, inputs, WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    o = k.attention(q, q, q, blocks=k.all_blocks(4, 2), impl=IMPL)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_errors_of_attention():
    x, blocks = torch.randn(1, 6, 2, 8), k.all_blocks(6, 2)
    with pytest.raises(ValueError, match="blocks must be given without causal, got both"):
        k.attention(x, x, x, causal=True, blocks=blocks)
    packed = k.Packed(torch.tensor([0, 6]).int(), 6)
    with pytest.raises(ValueError, match="blocks must be given without packed, got both"):
        k.attention(x[0], x[0], x[0], packed=packed, blocks=blocks)
    with pytest.raises(ValueError, match="blocks must be of 6 queries and 6 keys, got 7 and 7"):
        k.attention(x, x, x, blocks=k.all_blocks(7, 2))


def test_errors_of_lists():
    starts = torch.tensor([0, 2]).int()
    with pytest.raises(TypeError, match=r"BlockMask: indices must be int32, got torch.int64"):
        k.BlockMask(starts, starts, torch.tensor([0, 1]).int(), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"q_starts must be a list of blocks, got \[1\]"):
        lists([0], [0, 2], [])
    with pytest.raises(ValueError, match="k_starts must rise from 0"):
        lists([0, 2], [0, 2, 2], [[0]])
    with pytest.raises(ValueError, match="offsets must rise from 0"):
        lists([0, 2, 4], [0, 2], [[0], []])
    with pytest.raises(ValueError, match=r"offsets must be \[2\] and end at the 2 indices"):
        lists([0, 2], [0, 2], [[0], [0]])
    with pytest.raises(ValueError, match=r"indices must be in \[0, 2\), got \[2\]"):
        lists([0, 2], [0, 2, 4], [[2]])
    with pytest.raises(ValueError, match="indices must rise within a query block"):
        lists([0, 2, 4], [0, 2, 4], [[0], [1, 1]])
    with pytest.raises(ValueError, match=r"per_frame: grid must be \(T, H, W\)"):
        k.per_frame((1, 0, 2))
    with pytest.raises(ValueError, match=r"per_tube: grid must be \(T, H, W\)"):
        k.per_tube((1, 2))
    with pytest.raises(ValueError, match=r"spacetime_window: grid must be \(T, H, W\)"):
        k.spacetime_window((0, 1, 2), 1)
    with pytest.raises(ValueError, match="frames and rows must not be negative, got -1 and None"):
        k.spacetime_window((1, 1, 2), -1)
    with pytest.raises(ValueError, match="tokens and block_size must be at least 1, got 4 and 0"):
        k.all_blocks(4, 0)
