from __future__ import annotations

import pytest
import torch
from shim import Kernels

import iv2kernels as k
from bench.ops import masks as bench

SEEDS = torch.tensor([0, -1, 2**63 - 1, 0x1234567800000000])


def both(f, *args, **kwargs):
    """What every implementation draws: the same bits."""
    native, reference = (f(*args, **kwargs, impl=impl) for impl in ("native", "reference"))
    assert native.dtype == reference.dtype == torch.int32
    assert torch.equal(native, reference)
    return native


def weights(*shape):
    """Rows with zeros, denormals and twelve orders of magnitude."""
    w = torch.rand(shape).pow(9)
    w[..., ::5] = 0
    w[..., 1::7] = 1e-40
    return w


# less than a thread's four tokens, a warp's, one round of the block's, more than one
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 1), (1, 1, 131, 17), (2, 2, 256, 52), (1, 1, 2048, 410)]
)
def test_draws_the_same_bits(on_cpu, shape):
    _, rows, tokens, keep = shape
    both(k.attention_guided_mask, **bench.inputs(shape, torch.float32))
    both(k.attention_guided_mask, SEEDS[:2], weights(2, rows, tokens), keep, stream=2**40 + 3)
    both(k.random_mask, SEEDS, tokens, keep, stream=7)
    both(k.tube_mask, SEEDS, 3, tokens, keep)


@pytest.mark.parametrize("keep", [0, 1, 39, 40])
def test_all_numbers_of_kept_tokens(on_cpu, keep):
    both(k.attention_guided_mask, SEEDS, weights(4, 2, 40), keep)


def test_ties_go_to_the_lower_index(on_cpu):
    w = torch.zeros(2, 1, 1500)
    w[..., ::3] = torch.inf  # no weight, but equal keys of 0
    w = w.clamp_max(torch.finfo(torch.float32).max)
    both(k.attention_guided_mask, SEEDS[:2], w, 700)
    both(k.attention_guided_mask, SEEDS[:2], torch.full((2, 1, 1500), 3e38), 700)


def test_a_bad_weight_gives_no_index(on_cpu):
    for bad in (torch.nan, torch.inf, -1.0):
        w = torch.rand(2, 2, 200)
        w[1, 1, 199] = bad
        ids = k.attention_guided_mask(SEEDS[:2], w, 3, impl="native")
        assert (ids[1, 3:] == -1).all()
        assert (ids[0] >= 0).all()
        assert (ids[1, :3] >= 0).all()


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_under_sanitizers(use, sanitizer):
    use(Kernels(sanitizer, order="random"))
    both(k.attention_guided_mask, SEEDS[:2], weights(2, 2, 131), 17)
    both(k.tube_mask, SEEDS[:2], 2, 1030, 300)
