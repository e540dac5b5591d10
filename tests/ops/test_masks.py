from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import native_only

import iv2kernels as k
from bench.ops import masks as bench
from iv2kernels.ops import masks as op

SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x1234567800000000])


def both(f, *args, **kwargs):
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


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    counter, key = ([torch.tensor(word) for word in x] for x in (counter, key))
    assert [int(word) for word in op.philox_rounds(counter, key)] == words


def test_logarithm_is_accurate_over_its_whole_domain():
    words = torch.cat([torch.arange(4096), torch.arange(2**23 - 4096, 2**23)])
    words = torch.cat([words, torch.randint(2**23, (100_000,))])
    u = (words.float() + 0.5) * 2.0**-23
    assert u.min() > 0
    assert u.max() < 1
    torch.testing.assert_close(
        op.minus_log2(u).double(), -torch.log2(u.double()), rtol=2.5e-7, atol=0
    )


@pytest.mark.parametrize("shape", [*bench.SHAPES, (2, 3, 1, 1), (1, 1, 131, 17), (3, 2, 128, 128)])
def test_every_implementation_draws_the_same_bits(isa, shape):
    inputs = bench.inputs(shape, torch.float32)
    ids = both(k.attention_guided_mask, **inputs)
    batch, rows, tokens, keep = shape
    assert ids.shape == (batch, rows * keep)
    assert (ids.diff(dim=1) > 0).all()
    assert (ids.view(batch, rows, keep) // tokens == torch.arange(rows)[:, None]).all()
    both(k.attention_guided_mask, SEEDS, weights(6, 2, tokens), keep, stream=2**40 + 3)
    both(k.random_mask, SEEDS, tokens, keep, stream=7)
    both(k.tube_mask, SEEDS, 3, tokens, keep)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, rows, tokens = integers(0, 4), integers(1, 4), integers(1, 300)
    seeds = torch.tensor([integers(-(2**63), 2**63 - 1) for _ in range(batch)], dtype=torch.int64)
    keep, stream = integers(0, tokens), integers(0, 2**63 - 1)
    both(k.attention_guided_mask, seeds, weights(batch, rows, tokens), keep, stream=stream)
    both(k.random_mask, seeds, tokens, keep, stream=stream)


def test_the_masks_of_these_seeds_never_change():
    # Resumed runs, other machines and other versions must see the same tokens.
    assert k.random_mask(SEEDS[:3], 256, 6).tolist() == [
        [94, 134, 140, 193, 237, 246],
        [34, 49, 175, 203, 209, 255],
        [46, 141, 156, 171, 179, 189],
    ]
    ids = k.attention_guided_mask(SEEDS[1:2], torch.arange(20.0).view(1, 2, 10), 4, stream=9)
    assert ids.tolist() == [[3, 4, 5, 8, 10, 14, 16, 19]]


def test_a_mask_depends_on_its_own_seed_alone():
    w = weights(6, 4, 50)
    alone = [k.attention_guided_mask(SEEDS[i : i + 1], w[i : i + 1], 9) for i in range(6)]
    assert torch.equal(k.attention_guided_mask(SEEDS, w, 9), torch.cat(alone))
    ones = torch.ones(6, 1, 50)
    assert torch.equal(k.attention_guided_mask(SEEDS, ones, 9), k.random_mask(SEEDS, 50, 9))
    tube = k.tube_mask(SEEDS, 3, 50, 9).view(6, 3, 9)
    assert torch.equal(tube[:, 0], k.random_mask(SEEDS, 50, 9))
    assert torch.equal(tube - tube[:, :1], torch.tensor([0, 50, 100])[:, None].expand(6, 3, 9))


def test_zero_weights_come_last():
    w = torch.zeros(64, 1, 40)
    w[..., 10:20] = 1e-38
    ids = both(k.attention_guided_mask, torch.arange(64), w, 5)
    assert ((ids >= 10) & (ids < 20)).all()
    ids = both(k.attention_guided_mask, torch.arange(64), w, 14)
    assert (((ids >= 10) & (ids < 20)).sum(1) == 10).all()
    assert len(ids.unique()) == 40  # the four others are drawn at random


def test_random_inclusion_is_uniform_and_pairs_are_independent():
    draws, tokens, keep = 20_000, 20, 7
    ids = k.random_mask(torch.arange(draws), tokens, keep).long()
    shown = torch.zeros(draws, tokens, dtype=torch.float64).scatter_(1, ids, 1.0)
    p = keep / tokens
    assert (shown.mean(0) - p).abs().max() < 4.5 * (p * (1 - p) / draws) ** 0.5
    pairs = (shown.T @ shown / draws)[~torch.eye(tokens, dtype=torch.bool)]
    q = p * (keep - 1) / (tokens - 1)
    assert (pairs - q).abs().max() < 5 * (q * (1 - q) / draws) ** 0.5


def exact_inclusion(w, keep):
    """Probability that each item is among the first `keep` of successive weighted draws."""
    result = torch.zeros(len(w), dtype=torch.float64)
    for order in itertools.permutations(range(len(w)), keep):
        left, probability = float(sum(w)), 1.0
        for i in order:
            probability *= w[i] / left
            left -= w[i]
        result[list(order)] += probability
    return result


def test_weighted_inclusion_is_that_of_successive_draws():
    draws, keep = 40_000, 3
    w = [0.05, 0.1, 1.0, 2.0, 3.0, 0.5]
    p = exact_inclusion(w, keep)
    ids = k.attention_guided_mask(torch.arange(draws), torch.tensor(w).expand(draws, 1, 6), keep)
    seen = torch.bincount(ids.flatten(), minlength=6) / draws
    assert ((seen - p).abs() < 4.5 * (p * (1 - p) / draws).sqrt()).all()


def test_weighted_inclusion_is_that_of_multinomial():
    draws = 20_000
    w = torch.randn(256).softmax(0)
    ids = k.attention_guided_mask(torch.arange(draws), w.expand(draws, 1, 256), 52)
    theirs = torch.multinomial(w.expand(draws, 256), 52)
    seen, expected = (torch.bincount(x.flatten(), minlength=256) / draws for x in (ids, theirs))
    spread = (2 * expected * (1 - expected) / draws).sqrt()
    assert ((seen - expected).abs() < 5 * spread).all()


@pytest.mark.parametrize("what", ["streams", "neighbouring seeds", "frames"])
def test_draws_are_independent(what):
    draws, tokens, keep = 8192, 64, 16
    seeds = torch.arange(draws)
    if what == "streams":
        a = k.random_mask(seeds, tokens, keep, stream=0)
        b = k.random_mask(seeds, tokens, keep, stream=1)
    elif what == "neighbouring seeds":
        a = k.random_mask(seeds, tokens, keep)
        b = k.random_mask(seeds + 1, tokens, keep)
    else:
        ids = k.attention_guided_mask(seeds, torch.ones(draws, 2, tokens), keep)
        a, b = ids[:, :keep], ids[:, keep:] - tokens
    shown_a, shown_b = (torch.zeros(draws, tokens).scatter_(1, x.long(), 1.0) for x in (a, b))
    shared = (shown_a * shown_b).sum(1)  # hypergeometric
    mean = keep**2 / tokens
    variance = mean * (1 - keep / tokens) * (tokens - keep) / (tokens - 1)
    assert abs(shared.mean() - mean) < 4.5 * (variance / draws) ** 0.5
    assert abs(shared.var() / variance - 1) < 0.1


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs(bench.SHAPES[0], torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(k.attention_guided_mask(**inputs, impl="native"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_and_low_precision_weights():
    seeds = torch.arange(12)[::2]
    assert torch.equal(k.random_mask(seeds, 30, 4), k.random_mask(seeds.contiguous(), 30, 4))
    w = torch.rand(6, 30, 2).transpose(1, 2)
    both(k.attention_guided_mask, seeds, w, 4)
    both(k.attention_guided_mask, seeds, w[:1].expand(6, -1, -1), 4)
    both(k.attention_guided_mask, seeds, w.bfloat16(), 4)


def test_weights_get_no_gradient():
    w = torch.rand(2, 1, 9, requires_grad=True)
    assert not k.attention_guided_mask(SEEDS[:2], w, 4).requires_grad


def test_opcheck_and_compile():
    w = torch.rand(6, 2, 33)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(op._masks_draw, (SEEDS, w, 33, 5, 1, 3, "native"), test_utils=test)
        torch.library.opcheck(op._masks_draw, (SEEDS, None, 33, 5, 4, 3, "native"), test_utils=test)

    def masks(seeds, weights):
        return k.tube_mask(seeds, 4, 33, 5), k.attention_guided_mask(seeds, weights, 5)

    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    for a, b in zip(masks(SEEDS, w), compiled(SEEDS, w), strict=True):
        assert torch.equal(a, b)


@native_only
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_weights(impl, bad):
    w = torch.rand(2, 2, 200)
    w[1, 1, 199] = bad
    message = rf"attention_guided_mask: weights must be finite and not negative, got {bad}"
    with pytest.raises(ValueError, match=message):
        k.attention_guided_mask(SEEDS[:2], w, 3, impl=impl)


def test_errors():
    w = torch.rand(6, 2, 8)
    with pytest.raises(TypeError, match=r"random_mask: seeds must be int64, got torch\.int32"):
        k.random_mask(SEEDS.int(), 8, 2)
    with pytest.raises(ValueError, match=r"random_mask: seeds must be \[B\], got \[6, 1\]"):
        k.random_mask(SEEDS[:, None], 8, 2)
    with pytest.raises(ValueError, match=r"random_mask: num_keep must be in \[0, 8\], got 9"):
        k.random_mask(SEEDS, 8, 9)
    with pytest.raises(ValueError, match=r"tube_mask: keep_per_frame must be in \[0, 8\], got -1"):
        k.tube_mask(SEEDS, 2, 8, -1)
    with pytest.raises(ValueError, match="tube_mask: num_frames must be at least 1, got 0"):
        k.tube_mask(SEEDS, 0, 8, 2)
    with pytest.raises(ValueError, match=r"random_mask: stream must be in \[0, 2\*\*63\), got -1"):
        k.random_mask(SEEDS, 8, 2, stream=-1)
    with pytest.raises(ValueError, match=r"weights must be \[B, F, N\] .* \[6\], got \[6, 8\]"):
        k.attention_guided_mask(SEEDS, w[:, 0], 2)
    with pytest.raises(ValueError, match=r"weights must be \[B, F, N\] .* \[6\], got \[5, 2, 8\]"):
        k.attention_guided_mask(SEEDS, w[:5], 2)
    with pytest.raises(TypeError, match=r"weights must be floating point, got torch\.int64"):
        k.attention_guided_mask(SEEDS, w.long(), 2)
    with pytest.raises(
        ValueError, match=rf"weights must be on {SEEDS.device}, like seeds, got meta"
    ):
        k.attention_guided_mask(SEEDS, w.to("meta"), 2)
    with pytest.raises(RuntimeError, match="implementation torch cannot run: masks has no"):
        k.random_mask(SEEDS, 8, 2, impl="torch")
