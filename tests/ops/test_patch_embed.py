from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate, check, errors, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import DEVICE, IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import patch_embed as bench
from iv2kernels.ops import patch_embed as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("video", *bench.WRT)


def kernel(**inputs):
    return k.patch_embed(**inputs, impl=IMPL)


def reference(video, weight, bias, pos_embed=None, cls_token=None, ids_keep=None):
    return op.reference(video, weight, bias, pos_embed, cls_token, ids_keep)


def example(dtype, *, batch=2, grid=(2, 3, 4), tubelet=2, patch=5, width=40, keep=7):
    t, h, w = grid
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    return {
        "video": random(batch, 3, t * tubelet, h * patch, w * patch),
        "weight": random(width, 3, tubelet, patch, patch),
        "bias": random(width),
        "pos_embed": random(1 + t * h * w, width),
        "cls_token": random(width),
        "ids_keep": torch.stack([torch.randperm(t * h * w)[:keep] for _ in range(batch)]),
    }


def as_bytes(inputs):
    batch, _, frames, height, width = inputs["video"].shape
    size = (batch, frames, height, width, 3)
    return inputs | {"video": torch.randint(256, size, dtype=torch.uint8)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tubelet": 1, "patch": 14, "width": 48},
        {"tubelet": 1, "patch": 16, "width": 17},
        {"batch": 1, "grid": (1, 1, 1), "tubelet": 1, "patch": 1, "width": 1, "keep": 1},
    ],
)
def test_matches_float64(isa, sizes, dtype):
    inputs = example(dtype, **sizes)
    check(kernel, reference, inputs, ALL)
    check(kernel, reference, as_bytes(inputs), bench.WRT)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_real_sizes(dtype):
    inputs = bench.inputs(bench.SHAPES[0], dtype)
    check(kernel, reference, inputs, bench.WRT)
    inputs = bench.inputs((1, 2, 224, 14, 1408, None), dtype)
    check(kernel, reference, as_bytes(inputs), bench.WRT)


@pytest.mark.parametrize("missing", [("cls_token",), ("pos_embed",), ("ids_keep",), ("both",), ALL])
@pytest.mark.parametrize("wrt", [("weight",), ("bias", "video"), ("pos_embed",), ("cls_token",)])
def test_partial_inputs_and_gradients(missing, wrt):
    inputs = example(torch.float32)
    if missing == ALL:
        inputs["ids_keep"] = None
    if missing in (("both",), ALL):
        missing = ("cls_token", "pos_embed")
    inputs |= dict.fromkeys(missing)
    if missing == ("cls_token",):
        inputs["pos_embed"] = inputs["pos_embed"][1:]
    check(kernel, reference, inputs, [name for name in wrt if inputs[name] is not None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(isa, dtype):
    inputs = example(dtype)
    state = ("video", "bias", "pos_embed", "cls_token")
    wide = inputs | {name: inputs[name].float() for name in state}
    assert kernel(**wide).dtype == dtype
    got, eager = run(kernel, wide, ALL), run(reference, wide, ALL)
    truth = run(reference, wide, ALL, torch.float64)
    for name, value in got.items():
        assert value.dtype == eager[name].dtype
        assert_as_accurate(name, value, eager[name], truth[name])
    double = inputs | {"video": inputs["video"].double()}
    assert torch.equal(kernel(**double), kernel(**inputs))


@settings(max_examples=20 if ON_CPU else 8, deadline=None)
@given(st.data())
def test_any_shape(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    grid = (integers(1, 3), integers(1, 4), integers(1, 4))
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    floats = example(
        dtype,
        batch=integers(1, 3),
        grid=grid,
        tubelet=integers(1, 3),
        patch=integers(1, 18),
        width=integers(1, 50),
        keep=integers(1, grid[0] * grid[1] * grid[2]),
    )
    # Over a few numbers one rounding decides about the ratio to eager's error: a bound instead.
    # A GPU adds up to 2,916 products one after the other, in float32 too.
    exact = 1e-6 if ON_CPU else 2e-5
    bound = exact if dtype == torch.float32 else 1.5e-2
    for inputs, wrt in ((floats, ALL), (as_bytes(floats), bench.WRT)):
        got, truth = run(kernel, inputs, wrt), run(reference, inputs, wrt, torch.float64)
        for name, value in got.items():
            assert errors(value, truth[name])[0] < bound, name


def test_strided_videos_are_the_same():
    inputs = example(torch.float32, grid=(4, 3, 4), tubelet=1)
    video = torch.randn(2, 3, 8, 15, 20)
    expected = kernel(**inputs | {"video": video[:, :, ::2].contiguous()})
    assert torch.equal(expected, kernel(**inputs | {"video": video[:, :, ::2]}))
    wide = video[:, :, ::2].repeat_interleave(2, -1)
    assert torch.equal(expected, kernel(**inputs | {"video": wide[..., ::2]}))
    frames = torch.randint(256, (2, 8, 30, 40, 3), dtype=torch.uint8)
    cropped = frames[:, ::2, 3:18, 7:27]
    expected = kernel(**inputs | {"video": cropped.contiguous()})
    assert torch.equal(expected, kernel(**inputs | {"video": cropped}))
    again = kernel(**inputs | flipped(inputs, cropped))
    torch.testing.assert_close(expected.flip(0), again, atol=1e-4, rtol=1e-5)
    check(kernel, reference, inputs | {"video": video[:, :, ::2]}, ALL)
    inputs["weight"] = inputs["weight"].transpose(3, 4)
    inputs["pos_embed"] = torch.randn(40, 49).t()
    check(kernel, reference, inputs, ALL)


def flipped(inputs, frames):
    """The batch in reverse order, through an odd layout."""
    channels_first = frames.flip(0).permute(0, 4, 1, 2, 3).contiguous()
    return {"video": channels_first.permute(0, 2, 3, 4, 1), "ids_keep": inputs["ids_keep"].flip(0)}


def test_a_repeated_index_is_summed_and_an_expanded_gradient_is_read():
    inputs = example(torch.float32)
    inputs["ids_keep"] = torch.tensor([[3, 3, 0], [3, 5, 5]], dtype=torch.int32)
    check(kernel, reference, inputs, ALL)
    table = inputs["pos_embed"].requires_grad_()
    (got,) = torch.autograd.grad(kernel(**inputs).sum(), table)
    assert got[:, 0].tolist() == [2, 1, 0, 0, 3, 0, 2, *[0] * 18]


def test_no_token_kept_and_no_sample():
    inputs = example(torch.float32, keep=0)
    check(kernel, reference, inputs, ("pos_embed", "cls_token"))
    assert kernel(**inputs).shape == (2, 1, 40)
    got = run(kernel, inputs, ("weight", "bias"))
    assert all(got[name].eq(0).all() for name in ("dweight", "dbias"))
    inputs = example(torch.float32)
    inputs |= {"video": inputs["video"][:0], "ids_keep": inputs["ids_keep"][:0]}
    got = run(kernel, inputs, ALL)
    assert got["output 0"].shape == (0, 8, 40)
    assert all(got[f"d{name}"].eq(0).all() for name in ALL)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = example(torch.float32, batch=4, grid=(4, 4, 4), keep=50)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, ("bias", "pos_embed", "cls_token")))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other if name[0] == "d")


def test_opcheck_compile_and_checkpoint():
    inputs = example(torch.float32)
    dy = torch.randn(2, 8, 40)
    arguments = (dy, inputs["video"], inputs["weight"], inputs["ids_keep"], True, torch.float32)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(op._fwd, (*inputs.values(), IMPL), test_utils=test)
        for needs in ([True] * 5, [False] * 5):
            torch.library.opcheck(op._bwd, (*arguments, needs, IMPL), test_utils=test)
    expected = run(kernel, inputs, ALL)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, ALL)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = example(torch.float32)
    weight = inputs["weight"].requires_grad_()
    (dweight,) = torch.autograd.grad(kernel(**inputs).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dweight.sum().backward()


def test_autocast_leaves_the_dtype():
    inputs = example(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = kernel(**inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, kernel(**inputs), atol=0.3, rtol=0.03)


def test_an_index_out_of_range_is_an_error_or_a_row_of_nan():
    inputs = example(torch.float32)
    if not ON_CPU:
        ids = torch.tensor([[0, 3, 5], [1, 2, 4]])
        good = kernel(**inputs | {"ids_keep": ids})
        for bad in (24, -1):
            ids[1, 1] = bad
            out = kernel(**inputs | {"ids_keep": ids})
            wrong = out.isnan()
            assert wrong[1, -2].all()
            assert wrong.sum() == out.shape[2]
            assert torch.equal(out[~wrong], good[~wrong])
        return
    for bad in (24, -1):
        with pytest.raises(ValueError, match=rf"ids_keep must be in \[0, 24\), got {bad}"):
            kernel(**inputs | {"ids_keep": torch.full((2, 3), bad)})


def test_errors():
    good = example(torch.float32)

    def call(**changes):
        k.patch_embed(**good | changes, impl=IMPL)

    with pytest.raises(TypeError, match=r"video must be uint8 or floating point, got torch\.int64"):
        call(video=good["video"].long())
    with pytest.raises(TypeError, match="weight must be floating point"):
        call(weight=good["weight"].long())
    with pytest.raises(TypeError, match=r"ids_keep must be int32 or int64, got torch\.float32"):
        call(ids_keep=good["ids_keep"].float())
    with pytest.raises(ValueError, match=r"weight must be \[C, 3, t, p, p\], got \[40, 3, 2, 5"):
        call(weight=good["weight"][..., 1:])
    with pytest.raises(ValueError, match=r"video must be \[B, 3, T, H, W\], got \[2, 2, 4"):
        call(video=good["video"][:, 1:])
    with pytest.raises(ValueError, match=r"video must be \[B, T, H, W, 3\], got \[2, 3, 4"):
        call(video=good["video"].byte())
    with pytest.raises(ValueError, match="T of video must be a multiple of 2, got 3"):
        call(video=good["video"][:, :, 1:])
    with pytest.raises(ValueError, match="W of video must be a multiple of 5, got 19"):
        call(video=good["video"][..., 1:])
    with pytest.raises(ValueError, match=r"bias must be \[40\], got \[39\]"):
        call(bias=good["bias"][1:])
    with pytest.raises(ValueError, match=r"cls_token must be \[40\], got \[1, 40\]"):
        call(cls_token=good["cls_token"][None])
    with pytest.raises(ValueError, match=r"pos_embed must be \[25, 40\], got \[24, 40\]"):
        call(pos_embed=good["pos_embed"][1:])
    with pytest.raises(ValueError, match=r"pos_embed must be \[24, 40\], got \[25, 40\]"):
        call(cls_token=None)
    with pytest.raises(ValueError, match=r"ids_keep must be \[2, N_keep\], got \[1, 7\]"):
        call(ids_keep=good["ids_keep"][:1])
    with pytest.raises(RuntimeError, match=f"{IMPL} cannot run: {IMPL} patch_embed"):
        call(weight=good["weight"].double())
