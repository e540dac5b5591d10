from __future__ import annotations

import pytest
import torch
from compare import check
from shim import Kernels

import iv2kernels as k
from bench.ops import patch_embed as bench
from iv2kernels.ops import patch_embed as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("video", *bench.WRT)


def native(**inputs):
    return k.patch_embed(**inputs, impl="native")


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


# elements, pairs and fours of pixels; widths of packs and not
SIZES = [
    {},
    {"tubelet": 1, "patch": 14, "width": 48},
    {"tubelet": 1, "patch": 16, "width": 17},
    {"batch": 1, "grid": (1, 1, 1), "tubelet": 1, "patch": 1, "width": 1, "keep": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_float64(on_cpu, sizes, dtype):
    inputs = example(dtype, **sizes)
    check(native, reference, inputs, ALL)
    check(native, reference, as_bytes(inputs), bench.WRT)


def test_float16(on_cpu):
    inputs = example(torch.float16, tubelet=1, patch=14, width=48)
    check(native, reference, inputs, ALL)
    check(native, reference, as_bytes(inputs), bench.WRT)


@pytest.mark.parametrize("without", [("bias",), ("pos_embed",), ("cls_token",), ("ids_keep",)])
def test_partial_inputs(on_cpu, without):
    inputs = example(torch.float32) | dict.fromkeys(without)
    if "cls_token" in without:
        inputs["pos_embed"] = inputs["pos_embed"][1:]
    wrt = [name for name in ALL if inputs[name] is not None]
    check(native, reference, inputs, wrt)


def test_mixed_dtypes(on_cpu):
    inputs = example(torch.bfloat16, width=48)
    inputs |= {name: inputs[name].float() for name in ("pos_embed", "bias", "cls_token")}
    check(native, reference, inputs, ALL)
    inputs["video"] = inputs["video"].half()
    check(native, reference, inputs, bench.WRT)


def test_strided_videos(on_cpu):
    inputs = example(torch.float32, grid=(2, 3, 4))
    check(native, reference, inputs | {"video": torch.randn(2, 3, 8, 15, 20)[:, :, ::2]}, ALL)
    inputs = as_bytes(inputs)
    cropped = torch.randint(256, (2, 4, 17, 26, 3), dtype=torch.uint8)[:, :, 1:16, 3:23]
    check(native, reference, inputs | {"video": cropped}, bench.WRT)


def test_an_index_out_of_range_gives_nan(on_cpu):
    inputs = example(torch.float32)
    sound = native(**inputs)
    inputs["ids_keep"][0, 1], inputs["ids_keep"][1, 6] = 24, -1
    y = native(**inputs)
    assert y.isnan().all(-1).nonzero().tolist() == [[0, 2], [1, 7]]
    assert torch.equal(y[~y.isnan()], sound[~y.isnan()])


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_under_sanitizers(use, sanitizer):
    use(Kernels(sanitizer, order="random"))
    few = {"batch": 1, "keep": 2}
    for sizes in ({"grid": (1, 2, 2)}, {"grid": (1, 1, 3), "tubelet": 1, "patch": 14, "width": 48}):
        inputs = example(torch.bfloat16, **few, **sizes)
        check(native, reference, inputs, ALL)
        check(native, reference, as_bytes(inputs), bench.WRT)


def sectors(video, tokens, patch, columns):
    """Sectors of 32 bytes that lines of these patches of a [1, 1, H, W, 3] video touch."""
    touched = set()
    for token in tokens:
        for line in range(patch):
            row, column = token // columns * patch + line, token % columns * patch
            first = video.data_ptr() + (row * video.shape[3] + column) * 3
            touched |= set(range(first // 32, (first + 3 * patch - 1) // 32 + 1))
    return len(touched)


def test_moves_what_it_must(use):
    kernels = use(Kernels())
    inputs = as_bytes(
        example(torch.bfloat16, batch=1, grid=(1, 8, 8), tubelet=1, patch=14, width=8, keep=16)
    )
    inputs["cls_token"], inputs["pos_embed"] = None, None
    depth, table = 3 * 14 * 14, 3 * 256 * 2
    read = 32 * sectors(inputs["video"], inputs["ids_keep"][0].tolist(), 14, 8)
    moved = kernels.counted(lambda: native(**inputs)).moved
    rows = 16 * 2 * (depth + 2 * 8)  # tubelets; the embedded rows, read and written
    assert moved <= 1.1 * (read + table + rows + 4 * 8)
