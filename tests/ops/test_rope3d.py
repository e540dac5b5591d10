from __future__ import annotations

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import rope3d as bench
from iv2kernels.ops import rope3d as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(x, rope):
    return k.rope3d(x, rope, impl=IMPL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5, 60, 3, 64), (1, 2, 7, 3, 17, 2, 88), (3, 5, 1, 2, 4, 1, 6)]
)
def test_matches_float64(isa, shape, dtype):
    check(kernel, op.reference, bench.inputs(shape, dtype), bench.WRT)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", bench.SHAPES)
def test_matches_float64_at_real_shapes(shape, dtype):
    check(kernel, op.reference, bench.inputs(shape, dtype), bench.WRT)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(3, 80).map(lambda n: 2 * n),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_any_grid(grid, head_dim, cls_token, dtype):
    tokens = grid[0] * grid[1] * grid[2] + cls_token
    x = torch.randn(2, tokens, 2, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = {"x": x, "rope": k.Rope3d(grid, cls_token=cls_token, theta=100.0)}
    check_or_close(kernel, op.reference, inputs, bench.WRT, x.numel() >= 4096)


def test_scores_depend_on_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, key = (torch.randn(1, 1, 1, 36, generator=g, dtype=torch.float64) for _ in range(2))
    grid = (4, 5, 6)
    turned = [k.rope3d(v.expand(1, 120, 1, 36), k.Rope3d(grid)).view(*grid, 36) for v in (q, key)]
    near = turned[0][1, 1, 2] @ turned[1][2, 3, 1]
    moved = turned[0][2, 2, 5] @ turned[1][3, 4, 4]
    torch.testing.assert_close(near, moved, atol=1e-12, rtol=1e-12)
    for other in (turned[1][3, 3, 1], turned[1][2, 4, 1], turned[1][2, 3, 2]):
        assert (turned[0][1, 1, 2] @ other - near).abs() > 1e-3


def test_cls_is_not_rotated_and_ids_pick_places():
    grid, x = (2, 3, 4), torch.randn(2, 25, 3, 18)
    whole = kernel(x, k.Rope3d(grid, cls_token=True))
    assert torch.equal(whole[:, 0], x[:, 0])
    ids = torch.tensor([[0, 5, 23], [3, 4, 11]])
    rows = 1 + ids[..., None, None].expand(-1, -1, 3, 18)
    some = kernel(x.gather(1, rows), k.Rope3d(grid, ids))
    assert torch.equal(some, whole.gather(1, rows))


def test_axes_share_the_channels():
    assert [op.axis_pairs(n) for n in (64, 88, 128, 6)] == [
        (12, 10, 10),
        (16, 14, 14),
        (22, 21, 21),
        (1, 1, 1),
    ]


def test_strided_and_expanded_inputs():
    rope = k.Rope3d((2, 3, 4))
    inputs = {"x": torch.randn(2, 32, 2, 24).permute(0, 3, 2, 1), "rope": rope}
    check(kernel, op.reference, inputs, bench.WRT)
    x = torch.randn(1, 24, 1, 32).expand(2, -1, 3, -1).requires_grad_()
    (got,) = torch.autograd.grad(kernel(x, rope).sum(), x)  # an expanded gradient
    (expected,) = torch.autograd.grad(op.reference(x, rope).sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_empty():
    for batch, heads in ((0, 2), (2, 0)):
        x = torch.randn(batch, 6, heads, 8, requires_grad=True)
        y = kernel(x, k.Rope3d((1, 2, 3)))
        assert y.shape == x.shape
        y.sum().backward()


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((3, 8, 16, 16, 416, 4, 64), torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((2, 2, 3, 3, 7, 2, 16), torch.float32)
    x, rope = inputs["x"], inputs["rope"]
    for ids in (rope.ids, None):
        tokens = x if ids is not None else torch.randn(2, 19, 2, 16)
        args = (tokens, ids, [2, 3, 3], True, 100.0, IMPL)
        for call in (op._fwd, op._bwd):
            torch.library.opcheck(call, args, test_utils=("test_schema", "test_faketensor"))
    expected = run(kernel, inputs, bench.WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda x, rope: checkpoint(kernel, x, rope, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    x = torch.randn(1, 6, 1, 8, requires_grad=True)
    y = kernel(x, k.Rope3d((1, 2, 3)))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@native_only
def test_an_index_out_of_range_is_an_error():
    for wrong in (-1, 6):
        ids = torch.full((2, 6), wrong)
        with pytest.raises(ValueError, match=rf"rope3d: ids must be in \[0, 6\), got {wrong}"):
            kernel(torch.randn(2, 6, 1, 8), k.Rope3d((1, 2, 3), ids))


def test_errors():
    x, rope = torch.randn(2, 6, 1, 8), k.Rope3d((1, 2, 3))
    with pytest.raises(TypeError, match="x must be floating point, got torch"):
        k.rope3d(x.long(), rope)
    for bad in (x[0], x[..., :7], x[..., :4]):
        with pytest.raises(ValueError, match=r"x must be \[B, N, heads, head_dim\] with an even"):
            k.rope3d(bad, rope)
    with pytest.raises(ValueError, match="x must have the 7 tokens of rope, got 6"):
        k.rope3d(x, k.Rope3d((1, 2, 3), cls_token=True))
    with pytest.raises(ValueError, match="ids must be of 2 samples like x, got 3"):
        k.rope3d(x, k.Rope3d((1, 2, 9), torch.zeros(3, 6, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), each at least 1, got"):
        k.Rope3d((0, 2, 3))
    with pytest.raises(ValueError, match="theta must be positive, got 0"):
        k.Rope3d((1, 2, 3), theta=0)
    with pytest.raises(ValueError, match=r"ids must be \[B, M\], got \[6\]"):
        k.Rope3d((1, 2, 3), torch.arange(6))
    with pytest.raises(TypeError, match="ids must be int32 or int64, got torch"):
        k.Rope3d((1, 2, 3), torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match=f"implementation {IMPL} cannot run"):
        k.rope3d(x.double(), rope, impl=IMPL)
