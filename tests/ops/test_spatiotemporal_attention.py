from __future__ import annotations

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import spatiotemporal_attention as bench
from iv2kernels import _C
from iv2kernels.ops import spatiotemporal_attention as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WRT = list(bench.WRT)
NATIVE = ON_CPU
# Triton's interpreter takes some 20 ms a program: it gets fewer dtypes, samples and heads.
SOME = DTYPES if NATIVE else DTYPES[:2]
BATCH = 2 if NATIVE else 1


def kernel(**inputs):
    return k.spatiotemporal_attention(**inputs, impl=IMPL)


def reference(qkv, q_weight=None, k_weight=None, scale=None, eps=1e-6, **options):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return op.reference(qkv, q_weight, k_weight, scale, eps, **options)


def patterns(cls_token):
    return {
        "frame": k.per_frame((3, 5, 7), cls_token=cls_token),
        "tube": k.per_tube((9, 2, 4), cls_token=cls_token),
        "window": k.spacetime_window((4, 5, 7), 1, 1, cls_token=cls_token),
        "frames": k.spacetime_window((5, 4, 8), 1, cls_token=cls_token),
        "visible": k.per_frame((4, 1, 52), cls_token=cls_token),
    }


PATTERNS = [(name, cls_token) for name in patterns(False) for cls_token in (False, True)]
if not NATIVE:
    PATTERNS = [("frame", True), ("tube", False), ("window", True)]


def with_blocks(f, blocks):
    return lambda **inputs: f(**inputs, blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 17, 3, 8), (1, 93, 2, 88), (1, 65, 1, 20)])
def test_matches_float64(isa, shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), WRT)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 417, 6, 64), (1, 206, 4, 88), (1, 1025, 1, 128)])
def test_matches_float64_at_real_shapes(shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), WRT)


@pytest.mark.parametrize("dtype", SOME)
def test_without_norm(isa, dtype):
    inputs = bench.inputs((BATCH, 70, 3, 24), dtype)
    check(kernel, reference, {"qkv": inputs["qkv"]}, ["qkv"])


@pytest.mark.parametrize("dtype", SOME)
@pytest.mark.parametrize(("name", "cls_token"), PATTERNS)
def test_patterns_match_float64(isa, name, cls_token, dtype):
    blocks = patterns(cls_token)[name]
    inputs = bench.inputs((BATCH, blocks.num_queries, 3 if NATIVE else 1, 24), dtype)
    check(with_blocks(kernel, blocks), with_blocks(reference, blocks), inputs, WRT)


@pytest.mark.parametrize("dtype", SOME)
def test_patterns_without_norm(dtype):
    blocks = patterns(True)["window"]
    inputs = {"qkv": bench.inputs((BATCH, blocks.num_queries, BATCH, 64), dtype)["qkv"]}
    check(with_blocks(kernel, blocks), with_blocks(reference, blocks), inputs, ["qkv"])


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 88])
def test_a_pattern_at_a_real_shape(head_dim, dtype):
    blocks = k.spacetime_window((8, 16, 16), 1, 4, cls_token=True)
    inputs = bench.inputs((1, 2049, 1, head_dim), dtype)
    check(with_blocks(kernel, blocks), with_blocks(reference, blocks), inputs, WRT)


@pytest.mark.parametrize("dtype", DTYPES if NATIVE else DTYPES[1:2])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_rotary(isa, dtype, norm, sparse):
    grid = (4, 5, 7)
    options = {"rope": k.Rope3d(grid, cls_token=True)}
    if sparse:
        options["blocks"] = k.per_frame(grid, cls_token=True)
    inputs = bench.inputs((BATCH, 141, 2, 32), dtype)
    inputs = inputs if norm else {"qkv": inputs["qkv"]}
    check(
        lambda **i: kernel(**i, **options),
        lambda **i: reference(**i, **options),
        inputs,
        list(inputs),
    )


def test_a_list_of_everything_is_no_list():
    tokens = 150 if NATIVE else 90
    inputs = bench.inputs((BATCH, tokens, BATCH, 32), torch.float32)
    results = run(with_blocks(kernel, k.all_blocks(tokens, 48)), inputs, WRT)
    for name, value in run(kernel, inputs, WRT).items():
        torch.testing.assert_close(results[name], value, atol=1e-5, rtol=1e-4)


def test_outlier_channels_and_scales():
    # Trained networks have channels of very different size, in qkv and in the weights.
    inputs = bench.inputs((1, 130 if NATIVE else 70, 4, 32), torch.bfloat16)
    size = torch.logspace(-2, 1, 128)
    inputs["qkv"] = (inputs["qkv"] * size.roll(7).view(4, 32)).bfloat16()
    inputs["q_weight"] = (inputs["q_weight"] * size).bfloat16()
    inputs["k_weight"] = (inputs["k_weight"] / size.sqrt()).bfloat16()
    check(kernel, reference, inputs, WRT)
    check(
        lambda **i: kernel(**i, scale=0.05, eps=0.1),
        lambda **i: reference(**i, scale=0.05, eps=0.1),
        inputs,
        WRT,
    )


@pytest.mark.parametrize("wrt", [["qkv"], ["q_weight"], ["k_weight"]])
def test_partial_gradients_and_wide_weights(wrt):
    inputs = bench.inputs((1, 40, 2, 16), torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("q_weight", "k_weight")}
    check(kernel, reference, inputs, wrt)


@settings(max_examples=20 if NATIVE else 3, deadline=None)
@given(
    st.integers(1, 3 if NATIVE else 1),
    st.integers(1, 140 if NATIVE else 80),
    st.integers(1, 4 if NATIVE else 2),
    st.integers(1, 16).map(lambda n: 8 * n),
    st.sampled_from(DTYPES),
    st.sampled_from(_C.available_isas()),
)
def test_any_shape(batch, tokens, heads, head_dim, dtype, isa):
    before = _C.isa()
    k.set_isa(isa)
    try:
        inputs = bench.inputs((batch, tokens, heads, head_dim), dtype)
        check_or_close(kernel, reference, inputs, WRT, tokens >= 32 and heads * head_dim >= 64)
    finally:
        k.set_isa(before)


def test_strided_and_expanded_inputs():
    inputs = bench.inputs((2, 40, 2, 16), torch.float32)
    inputs["qkv"] = torch.randn(2, 40, 16, 2, 3).permute(0, 1, 4, 3, 2)
    check(kernel, reference, inputs, WRT)
    check(kernel, reference, {"qkv": inputs["qkv"]}, ["qkv"])
    qkv = torch.randn(1, 40, 3, 2, 16).expand(2, -1, -1, -1, -1).requires_grad_()
    (got,) = torch.autograd.grad(kernel(qkv=qkv).sum(), qkv)  # an expanded gradient
    (expected,) = torch.autograd.grad(reference(qkv).sum(), qkv)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_empty():
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        inputs = {n: x.requires_grad_() for n, x in bench.inputs(shape, torch.float32).items()}
        o = kernel(**inputs)
        assert o.shape == (*shape[:2], 16)
        o.sum().backward()
        assert all((x.grad == 0).all() for x in inputs.values())


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(isa, dtype):
    inputs = bench.inputs((1, 1100, 1, 24), dtype)  # one head: the keys are split
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit_of_a_pattern(dtype):
    blocks = k.spacetime_window((8, 10, 14), 2, cls_token=True)
    inputs = bench.inputs((1, 1121, 1, 24), dtype)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(with_blocks(kernel, blocks), inputs, WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_opcheck_compile_and_checkpoint_of_a_pattern():
    blocks = k.per_frame((2, 2, 3), cls_token=True)
    inputs = bench.inputs((2, 13, 2, 16), torch.float32)
    utils = ("test_schema", "test_faketensor")
    pairs = blocks.pairs
    args = (*inputs.values(), [blocks.q_blocks, blocks.runs], pairs, 0.3, 1e-6, IMPL)
    torch.library.opcheck(op._fwd, args, test_utils=utils)
    o, lse, rstd = op._fwd(*args)
    saved = (torch.randn(o.shape), *inputs.values(), o, lse, rstd)
    args = (*saved, [blocks.k_blocks, blocks.runs], pairs, 0.3, IMPL)
    torch.library.opcheck(op._bwd, args, test_utils=utils)
    f = with_blocks(kernel, blocks)
    expected = run(f, inputs, WRT)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for g in (compiled, lambda **i: checkpoint(f, **i, use_reentrant=False)):
        got = run(g, inputs, WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((2, 9, 2, 16), torch.float32)
    for args in (inputs, {"qkv": inputs["qkv"]}):
        wrt = list(args)
        ordered = (*args.values(), *(None,) * (3 - len(args)), [], 0, 0.3, 1e-6, IMPL)
        torch.library.opcheck(op._fwd, ordered, test_utils="test_schema")
        torch.library.opcheck(op._fwd, ordered, test_utils="test_faketensor")
        expected = run(kernel, args, wrt)
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
            got = run(f, args, wrt)
            assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    qkv = torch.randn(1, 4, 3, 1, 8, requires_grad=True)
    (dqkv,) = torch.autograd.grad(kernel(qkv=qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dqkv.sum().backward()


def test_errors():
    qkv, weight = torch.randn(2, 5, 3, 2, 8), torch.ones(16)
    with pytest.raises(TypeError, match=r"qkv must be floating point, got torch.int64"):
        k.spatiotemporal_attention(qkv.long())
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3, heads, head_dim\], got \[2, 5"):
        k.spatiotemporal_attention(qkv[:, :, :2])
    with pytest.raises(ValueError, match="k_weight must be given with the other weight, got None"):
        k.spatiotemporal_attention(qkv, weight)
    with pytest.raises(ValueError, match="q_weight must be given with the other weight, got None"):
        k.spatiotemporal_attention(qkv, None, weight)
    with pytest.raises(ValueError, match=r"k_weight must be \[16\], got \[8\]"):
        k.spatiotemporal_attention(qkv, weight, weight[:8])
    with pytest.raises(ValueError, match="blocks must be of 5 tokens, got 6 queries and 6 keys"):
        k.spatiotemporal_attention(qkv, blocks=k.per_frame((2, 1, 3)))
    with pytest.raises(RuntimeError, match=f"implementation {IMPL} cannot run"):
        k.spatiotemporal_attention(qkv.double(), impl=IMPL)


@pytest.mark.parametrize("impl", [IMPL, "reference"])
def test_rotary_errors(impl):
    qkv = torch.randn(2, 5, 3, 2, 8)
    for rope, message in (
        (k.Rope3d((1, 1, 1)), "x must have the 1 tokens of rope, got 5"),
        (k.Rope3d((1, 2, 3)), "x must have the 6 tokens of rope, got 5"),
        (k.Rope3d((1, 1, 5), torch.arange(5)[None]), "ids must be of 2 samples like x, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            k.spatiotemporal_attention(qkv, rope=rope, impl=impl)
    with pytest.raises(ValueError, match="with an even head_dim from 6 to 512"):
        k.spatiotemporal_attention(qkv[..., :4], rope=k.Rope3d((1, 1, 5)), impl=impl)
