from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import iv2kernels as k
from bench.ops import resized_crop_normalize as bench
from iv2kernels.ops import resized_crop_normalize as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def check(frames, box, size, *, flip=False, interpolation="bilinear", dtype=torch.float32):
    arguments = (frames, box, size)
    options = {"flip": flip, "interpolation": interpolation}
    got = k.resized_crop_normalize(*arguments, **options, dtype=dtype, impl="native")
    eager = op.reference(*arguments, **options, dtype=dtype)
    assert got.shape == eager.shape
    assert got.dtype == dtype
    truth = op.reference(*arguments, **options, dtype=torch.float64)
    assert_as_accurate(f"{box} -> {size} {options}", got, eager, truth)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 60, 47), (32, 32)),  # smaller
        ((7, 5, 20, 30), (41, 50)),  # larger
        ((3, 1, 57, 9), (11, 33)),  # both
        ((9, 11, 24, 24), (24, 24)),  # a plain crop
        ((59, 46, 1, 1), (3, 2)),  # the last pixel
        ((0, 0, 60, 47), (1, 1)),
    ],
)
def test_matches_float64(isa, box, size, interpolation, flip):
    check(pixels(3, 60, 47, 3), box, size, interpolation=interpolation, flip=flip)


@pytest.mark.parametrize("shape", bench.SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_real_sizes(shape, dtype):
    inputs = bench.inputs((2, *shape[1:]), dtype)
    check(**inputs)
    check(**inputs, interpolation="bicubic", flip=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    height, width = integers(1, 90), integers(1, 90)
    top, left = integers(0, height - 1), integers(0, width - 1)
    box = (top, left, integers(1, height - top), integers(1, width - left))
    check(
        pixels(integers(1, 3), height, width, 3),
        box,
        (integers(1, 70), integers(1, 70)),
        flip=data.draw(st.booleans()),
        interpolation=data.draw(st.sampled_from(["bilinear", "bicubic"])),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_bytes_are_rounded(isa, interpolation):
    frames, box, size = pixels(2, 50, 60, 3), (3, 4, 40, 44), (24, 56)
    options = {"interpolation": interpolation, "dtype": torch.uint8}
    got = k.resized_crop_normalize(frames, box, size, **options, impl="native")
    assert got.shape == (2, 24, 56, 3)
    truth = op.reference(frames, box, size, False, interpolation, torch.float64)
    mean, std = torch.tensor([k.IMAGENET_MEAN, k.IMAGENET_STD], dtype=torch.float64)
    truth = (truth.permute(1, 2, 3, 0) * std + mean) * 255
    assert (got - truth).abs().max() < 0.5001
    whole = k.resized_crop_normalize(frames, (3, 4, 40, 44), (40, 44), **options, impl="native")
    assert torch.equal(whole, frames[:, 3:43, 4:48])
    mirrored = k.resized_crop_normalize(frames, box, size, **options, flip=True, impl="native")
    assert torch.equal(mirrored, got.flip(2))


def test_overshoot_is_cut_to_the_range_of_bytes(isa):
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    frames[:, :, 8:] = 255
    arguments = (frames, (0, 0, 16, 16), (16, 64))
    got = k.resized_crop_normalize(*arguments, interpolation="bicubic", impl="native")
    low, high = (op.reference(frames, (0, x, 1, 1), (1, 1), False, "bilinear", torch.float32)
                 for x in (0, 15))  # fmt: skip
    torch.testing.assert_close(got.amin((1, 2, 3)), low.flatten())
    torch.testing.assert_close(got.amax((1, 2, 3)), high.flatten())


def test_strided_frames_are_the_same():
    frames = pixels(6, 40, 50, 3)
    arguments = ((2, 3, 30, 40), (20, 20))
    expected = k.resized_crop_normalize(frames[::2].contiguous(), *arguments, impl="native")
    for strided in (
        frames[::2],
        frames.repeat_interleave(2, 1)[::2, ::2],
        frames.repeat_interleave(2, 2)[::2, :, ::2],
        frames[::2].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    ):
        assert torch.equal(expected, k.resized_crop_normalize(strided, *arguments, impl="native"))
    assert k.resized_crop_normalize(frames[:0], *arguments, impl="native").shape == (3, 0, 20, 20)


def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((3, *bench.SHAPES[0][1:]), torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(k.resized_crop_normalize(**inputs, impl="native"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck_and_compile():
    frames, box, size = pixels(2, 20, 30, 3), [1, 2, 15, 20], [8, 8]
    for test in ("test_schema", "test_faketensor"):
        for dtype in (torch.uint8, torch.float32):
            arguments = (frames, box, size, True, "bicubic", dtype, "native")
            torch.library.opcheck(op._fwd, arguments, test_utils=test)

    def f(frames):
        return k.resized_crop_normalize(frames, (1, 2, 15, 20), (8, 8)) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(frames), compiled(frames))


def test_errors():
    frames, size = pixels(2, 20, 30, 3), (8, 8)
    for box in ((-1, 0, 5, 5), (0, -1, 5, 5), (16, 0, 5, 5), (0, 26, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match="must be inside the frame of 20 x 30, got"):
            k.resized_crop_normalize(frames, box, size)
    with pytest.raises(ValueError, match=r"both positive, got \(0, 0, 5, 5\) and \(0, 8\)"):
        k.resized_crop_normalize(frames, (0, 0, 5, 5), (0, 8))
    with pytest.raises(TypeError, match=r"frames must be uint8, got torch\.float32"):
        k.resized_crop_normalize(frames.float(), (0, 0, 5, 5), size)
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\], got \[20, 30, 3\]"):
        k.resized_crop_normalize(frames[0], (0, 0, 5, 5), size)
    with pytest.raises(ValueError, match="must be one of bilinear, bicubic, got area"):
        k.resized_crop_normalize(frames, (0, 0, 5, 5), size, interpolation="area")
    with pytest.raises(RuntimeError, match="native cannot run: native resized_crop_normalize"):
        k.resized_crop_normalize(frames, (0, 0, 5, 5), size, dtype=torch.float64, impl="native")
    assert k.resized_crop_normalize(
        frames, (0, 0, 5, 5), size, dtype=torch.float64
    ).is_floating_point()
    with pytest.raises(TypeError, match=r"dtype must be one of torch\.float32, .* torch\.int64"):
        k.resized_crop_normalize(frames, (0, 0, 5, 5), size, dtype=torch.int64)
