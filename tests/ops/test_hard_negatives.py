from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, ON_GPU, at_real_size, native_only

import iv2kernels as k
from bench.ops import hard_negatives as bench
from iv2kernels.ops import hard_negatives as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 333 if ON_CPU else 130  # of several tiles


def keys_of(v, t, temperature, ids, seeds):
    """Score plus noise of both directions in float64, -inf where ids agree."""
    scores = v.double() @ t.double().T / temperature / math.log(2)
    noise = op.gumbel(seeds, len(v)).double()
    same = torch.eye(len(v), dtype=torch.bool) if ids is None else ids[:, None] == ids
    both = scores + noise[:, 0], scores.T + noise[:, 1]
    return [keys.masked_fill(same, -torch.inf) for keys in both]


def check(impl=IMPL, **inputs):
    """Every draw has the largest key, to rounding of the scores; -1 where there is none."""
    drawn = k.hard_negatives(**inputs, impl=impl)
    for got, keys in zip(drawn, keys_of(**inputs), strict=True):
        assert got.dtype == torch.int32
        largest = keys.max(1).values
        alone = largest == -torch.inf
        assert torch.equal(got == -1, alone)
        chosen = keys.gather(1, got.long().clamp_min(0)[:, None])[:, 0]
        assert (chosen[~alone] >= largest[~alone] - 1e-4).all()
    return drawn


def random_inputs(batch, width, dtype=torch.float32, classes=None):
    v, t = torch.randn(2, batch, width).to(dtype).unbind(0)
    ids = None if classes is None else torch.randint(classes, (batch,)) * 2**40 - 7
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,))
    return {"v": v, "t": t, "temperature": 2.0, "ids": ids, "seeds": seeds}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (66, 24), (ROWS, 17)])
def test_draws_the_largest_key(isa, shape, dtype):
    check(**random_inputs(*shape, dtype))
    check(**random_inputs(*shape, dtype, classes=2))
    check(**random_inputs(*shape, dtype, classes=shape[0]))


@at_real_size
def test_real_width():
    inputs = bench.inputs((260, 512), torch.bfloat16)
    check(**inputs)
    check("reference", **inputs)


@settings(max_examples=12 if ON_CPU else 5, deadline=None)
@given(st.integers(1, ROWS), st.integers(0, 40), st.sampled_from([None, 1, 3, 100]))
def test_any_shape(batch, width, classes):
    check(**random_inputs(batch, width, classes=classes))
    check("reference", **random_inputs(batch, width, classes=classes))


def test_implementations_agree_where_scores_are_well_separated(isa):
    batch = 200
    v = torch.eye(batch)
    t = torch.randint(-8, 9, (batch, batch)).float()  # every score is exact
    inputs = {"v": v, "t": t, "temperature": 4.0, "seeds": torch.arange(batch) - 3}
    inputs["ids"] = torch.randint(40, (batch,))
    impls = (IMPL, "reference" if ON_GPU else "native", "reference")
    kernel, native, reference = (k.hard_negatives(**inputs, impl=i) for i in impls)
    gaps = [keys.topk(2).values.diff().abs().min() for keys in keys_of(**inputs)]
    assert min(gaps) > 1e-6
    for a, b, c in zip(kernel, native, reference, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert (inputs["ids"][a.long()] != inputs["ids"]).all()
    tensor = inputs | {"temperature": torch.tensor(4.0, requires_grad=True)}
    for a, b in zip(k.hard_negatives(**tensor, impl=IMPL), kernel, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(IMPL != "triton", reason="about the strips of Triton's kernels")
def test_strips_do_not_change_a_draw(monkeypatch):
    inputs = random_inputs(ROWS, 9, classes=30)
    expected = k.hard_negatives(**inputs, impl=IMPL)
    monkeypatch.setattr("iv2kernels.triton.hard_negatives.STRIP", 64)
    for a, b in zip(k.hard_negatives(**inputs, impl=IMPL), expected, strict=True):
        assert torch.equal(a, b)


def test_the_draws_of_these_seeds_never_change():
    zeros = torch.zeros(9, 4)
    neg_t, neg_v = k.hard_negatives(zeros, zeros, 1.0, None, torch.arange(9), impl=IMPL)
    keys = keys_of(zeros, zeros, 1.0, None, torch.arange(9))
    assert neg_t.tolist() == keys[0].argmax(1).tolist() == NEG_T
    assert neg_v.tolist() == keys[1].argmax(1).tolist() == NEG_V


NEG_T = [7, 2, 6, 0, 6, 8, 3, 8, 2]
NEG_V = [4, 0, 4, 7, 0, 0, 3, 0, 5]


@native_only
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_the_distribution_is_softmax(impl):
    draws, batch, temperature = 6000, 6, 0.5
    g = torch.Generator().manual_seed(3)
    v, t = torch.randn(2, batch, 4, generator=g).mul(0.5).unbind(0)
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    same = ids[:, None] == ids
    scores = v @ t.T / temperature
    counts = torch.zeros(2, batch, batch)
    for i in range(draws):
        seeds = torch.arange(batch) + batch * i
        for j, got in enumerate(k.hard_negatives(v, t, temperature, ids, seeds, impl=impl)):
            counts[j, torch.arange(batch), got.long()] += 1
    for seen, logits in zip(counts, (scores, scores.T), strict=True):
        p = logits.masked_fill(same, -torch.inf).softmax(1)
        assert (seen[same] == 0).all()
        chi_square = ((seen - draws * p).square() / (draws * p))[~same].sum()
        freedom = int((~same).sum()) - batch
        assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5


@native_only
def test_neighbouring_seeds_and_directions_are_independent():
    batch = 4096
    zeros, seeds = torch.zeros(batch, 1), torch.arange(batch)
    neg_t, neg_v = k.hard_negatives(zeros, zeros, 1.0, None, seeds)
    for a, b in ((neg_t, neg_v), (neg_t[1:], neg_t[:-1]), (neg_v[1:], neg_v[:-1])):
        assert (a == b).sum() < 8  # one is expected
    for drawn in (neg_t, neg_v):
        mean = drawn.double().mean() / batch
        assert abs(mean - 0.5) < 4.5 * (1 / 12 / batch) ** 0.5


def test_rows_without_another_id():
    for impl in (IMPL, "reference"):
        for batch, ids in ((1, None), (3, torch.full((3,), 9))):
            x, seeds = torch.randn(batch, 4), torch.arange(batch)
            for got in k.hard_negatives(x, x, 1.0, ids, seeds, impl=impl):
                assert got.tolist() == [-1] * batch
        empty = torch.zeros(0, 4)
        for got in k.hard_negatives(empty, empty, 1.0, None, torch.arange(0), impl=impl):
            assert got.shape == (0,)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = random_inputs(700, 20, classes=300)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(torch.stack(k.hard_negatives(**inputs, impl=IMPL)))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_inputs_and_no_gradient():
    inputs = random_inputs(40, 8, classes=20)
    strided = {
        n: torch.stack([x, x], -1)[..., 0] if torch.is_tensor(x) else x for n, x in inputs.items()
    }
    strided["v"] = strided["v"].requires_grad_()
    expected = k.hard_negatives(**inputs, impl=IMPL)
    for a, b in zip(k.hard_negatives(**strided, impl=IMPL), expected, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_opcheck_and_compile():
    inputs = random_inputs(20, 8, classes=9)
    args = (*(inputs | {"temperature": torch.tensor(2.0)}).values(), IMPL)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(op._hard_negatives_draw, args, test_utils=test)

    def kernel(v, t, ids, seeds):
        return k.hard_negatives(v, t, 0.5, ids, seeds, impl=IMPL)

    args = [inputs[n] for n in ("v", "t", "ids", "seeds")]
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for a, b in zip(kernel(*args), compiled(*args), strict=True):
        assert torch.equal(a, b)


@native_only
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_bad_values(impl):
    inputs = random_inputs(4, 3)
    for name, bad in (("v", math.nan), ("t", math.inf)):
        x = inputs[name].clone()
        x[3, 2] = bad
        with pytest.raises(ValueError, match=f"hard_negatives: {name} must be finite, got {bad}"):
            k.hard_negatives(**inputs | {name: x}, impl=impl)
    for bad in (0.0, -1.0, math.nan, torch.tensor(math.inf)):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            k.hard_negatives(**inputs | {"temperature": bad}, impl=impl)


def test_errors():
    inputs = random_inputs(4, 3, classes=3)

    def raises(kind, match, **changed):
        with pytest.raises(kind, match=f"hard_negatives: {match}"):
            k.hard_negatives(**inputs | changed)

    v, ids, seeds = inputs["v"], inputs["ids"], inputs["seeds"]
    raises(TypeError, "v must be floating point, got torch.int64", v=v.long())
    raises(TypeError, "t must be floating point, got torch.int64", t=v.long())
    raises(TypeError, "temperature must be floating", temperature=torch.tensor(1))
    raises(ValueError, r"v must be \[B, D\], got \[4\]", v=v[:, 0])
    raises(ValueError, r"t must be \[4, 3\] like v, got \[4, 2\]", t=v[:, 1:])
    raises(ValueError, r"temperature must be a number or \[\], got \[1\]", temperature=v[0, :1])
    raises(TypeError, "ids must be int64, got torch.int32", ids=ids.int())
    raises(ValueError, r"ids must be \[4\], got \[3\]", ids=ids[1:])
    raises(TypeError, "seeds must be int64, got torch.float32", seeds=seeds.float())
    raises(ValueError, r"seeds must be \[4\], got \[4, 1\]", seeds=seeds[:, None])
    raises(ValueError, "ids must be on cpu like v, got meta", ids=ids.to("meta"))
    raises(RuntimeError, f"implementation {IMPL} cannot run", v=v.double(), impl=IMPL)
