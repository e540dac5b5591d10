from __future__ import annotations

import importlib

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import contrastive_loss as bench
from iv2kernels.ops import contrastive_loss as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 300 if ON_CPU else 130  # of several tiles


def kernel(**inputs):
    return k.contrastive_loss(**inputs, impl=IMPL)


def reference(v, t, temperature, ids=None):
    return op.reference(v, t, temperature, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(ROWS + 30, 64), (65, 93), (17, 512)])
def test_matches_float64(isa, shape, dtype):
    check(kernel, reference, bench.inputs(shape, dtype), bench.WRT)


@at_real_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_a_real_size(dtype):
    check(kernel, reference, bench.inputs((1024, 512), dtype), bench.WRT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [None, 1, 5, 100])
def test_ids(isa, distinct, dtype):
    inputs = bench.inputs((ROWS, 40), dtype)
    # far apart: no float32 holds them
    ids = None if distinct is None else 2**40 + torch.randint(distinct, (ROWS,))
    check(kernel, reference, inputs | {"ids": ids}, bench.WRT)


def test_ids_none_is_one_id_a_row():
    inputs = bench.inputs((70, 24), torch.float32)
    without = run(kernel, inputs | {"ids": None}, bench.WRT)
    for ids in (torch.arange(70), torch.arange(70, dtype=torch.int32).flip(0)):
        given_ids = run(kernel, inputs | {"ids": ids}, bench.WRT)
        assert all(torch.equal(without[name], given_ids[name]) for name in without)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 20.0])
def test_temperatures(isa, temperature):
    inputs = bench.inputs((ROWS - 20, 64), torch.float32)
    inputs["temperature"] = torch.tensor(temperature)
    check(kernel, reference, inputs, bench.WRT)


def test_a_solved_batch(isa):
    # Every row finds its own: the loss is about e^-7 and not what two large numbers differ by.
    inputs = bench.inputs((ROWS - 30, 512), torch.float32)
    inputs |= {"t": inputs["v"].clone(), "temperature": torch.tensor(0.05), "ids": None}
    check(kernel, reference, inputs, bench.WRT)


def test_one_row(isa):
    for dtype in DTYPES:
        results = run(kernel, bench.inputs((1, 33), dtype), bench.WRT)
        assert all((value == 0).all() for value in results.values())
        assert results["dv"].shape == (1, 33)


def test_no_rows():
    results = run(kernel, bench.inputs((0, 8), torch.float32), bench.WRT)
    assert results["output 0"].isnan()
    assert results["dv"].shape == results["dt"].shape == (0, 8)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Triton's interpreter
def test_nan_is_not_hidden(isa):
    inputs = bench.inputs((90, 32), torch.float32)
    inputs["t"][70, 3] = torch.nan
    results = run(kernel, inputs, bench.WRT)
    assert all(results[name].isnan().any() for name in results)


@pytest.mark.parametrize("wrt", [(), ("v",), ("t",), ("temperature",), ("v", "temperature")])
def test_partial_gradients(wrt):
    check(kernel, reference, bench.inputs((70, 24), torch.float32), wrt)


def test_a_float32_temperature_with_bfloat16_features(isa):
    inputs = bench.inputs((90, 40), torch.bfloat16) | {"temperature": torch.tensor(0.07)}
    check(kernel, reference, inputs, bench.WRT)


@settings(max_examples=25 if ON_CPU else 6, deadline=None)
@given(st.integers(1, ROWS + 100), st.integers(1, 150), st.sampled_from(DTYPES))
def test_any_shape(rows, width, dtype):
    inputs = bench.inputs((rows, width), dtype)
    check_or_close(kernel, reference, inputs, bench.WRT, rows >= 32 and width >= 16)


def test_strided_inputs():
    inputs = bench.inputs((70, 32), torch.float32)
    inputs["v"] = inputs["v"].t().contiguous().t()
    inputs["t"] = torch.nn.functional.normalize(torch.randn(32), dim=0).expand(70, 32)
    inputs["ids"] = inputs["ids"].repeat_interleave(2)[::2]
    check(kernel, reference, inputs, bench.WRT)


@native_only
def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((600, 72), torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(kernel, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@native_only
def test_no_matrix_of_all_pairs():
    rows = 3000
    inputs = bench.inputs((rows, 32), torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(kernel, inputs, bench.WRT)
    largest = max(event.self_cpu_memory_usage for event in recorded.events())
    assert 4 * 256 * rows < largest < rows * rows


@pytest.mark.skipif(IMPL != "triton", reason="about the strips of Triton's kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips(monkeypatch, dtype):
    monkeypatch.setattr("iv2kernels.triton.contrastive_loss.STRIP", 64)
    monkeypatch.setattr("iv2kernels.triton.pair_tiles.GRADIENT_STRIP", 64)
    check(kernel, reference, bench.inputs((ROWS, 40), dtype), bench.WRT)


RECTANGLES = [(70, 300), (300, 70), (257, 1)] if ON_CPU else [(70, 130), (130, 70)]


@pytest.mark.parametrize("shape", RECTANGLES)
def test_rectangles(isa, shape):
    """Parts of a larger loss, of which distributed.py makes it, against a dense matrix."""
    kernels = importlib.import_module(f"iv2kernels.{IMPL}.contrastive_loss")
    rows, columns = shape
    g = torch.Generator().manual_seed(3)
    v, t = torch.randn(rows, 33, generator=g), torch.randn(columns, 33, generator=g)
    labels, others = (torch.randint(9, (n,), generator=g).float() for n in shape)
    temperature, dloss = torch.tensor(3.5), torch.tensor(0.7)
    numbers = (0.7, 1 / 3.5) if ON_CPU else (dloss, temperature)
    of_rows, of_columns, positives = kernels.statistics((v, t), (labels, others), numbers[1])
    s = v.double() @ t.double().T / 3.5
    same = labels[:, None] == others
    torch.testing.assert_close(positives.double(), (s * same).sum(1), atol=1e-4, rtol=1e-5)
    for terms, axis in ((of_rows, 1), (of_columns, 0)):
        most, ties, rest = terms.double()
        assert (ties >= 1).all()
        torch.testing.assert_close(most, s.amax(axis), atol=1e-5, rtol=1e-5)
        sums = most + (ties + rest).log()
        torch.testing.assert_close(sums, s.logsumexp(axis), atol=1e-5, rtol=1e-5)
    stats = [x for terms in (of_rows, of_columns) for x in (terms[0], 1 / (terms[1] + terms[2]))]
    counts = torch.rand(rows, generator=g)
    parts = (labels, others, counts, torch.cat(stats))
    got = kernels.part_gradients(numbers[0], (v, t), parts, numbers[1], [True, True])
    ds = s.softmax(1) + s.softmax(0) - 2 * same * counts.double()[:, None]
    ds *= 0.7 / (2 * rows)
    expected = ds @ t.double() / 3.5, ds.T @ v.double() / 3.5
    for grad, truth in zip(got[:2], expected, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), truth, atol=1e-6, rtol=1e-4)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((5, 16), torch.float32)
    v, t, temperature, ids = inputs.values()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._fwd, (v, t, temperature, ids, IMPL), test_utils=utils)
    _, stats = op._fwd(v, t, temperature, ids, IMPL)
    for needs in ([True, True], [False, True]):
        args = (torch.tensor(0.5), v, t, temperature, stats, needs, IMPL)
        torch.library.opcheck(op._bwd, args, test_utils=utils)
    expected = run(kernel, inputs, bench.WRT)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = bench.inputs((4, 8), torch.float32)
    v = inputs["v"].requires_grad_()
    (dv,) = torch.autograd.grad(kernel(**inputs).square(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


def test_errors():
    inputs = bench.inputs((5, 16), torch.float32)

    def raises(kind, match, **changed):
        with pytest.raises(kind, match=match):
            k.contrastive_loss(**inputs | changed)

    v, t, ids, temperature = (inputs[name] for name in ("v", "t", "ids", "temperature"))
    raises(ValueError, r"v must be \[B, D\] with D > 0, got \[5\]", v=v[:, 0])
    raises(ValueError, r"v must be \[B, D\] with D > 0, got \[5, 0\]", v=v[:, :0])
    raises(ValueError, r"t must be \[5, 16\], got \[4, 16\]", t=t[1:])
    raises(ValueError, r"temperature must be a scalar, got \[1\]", temperature=temperature[None])
    raises(ValueError, r"ids must be \[5\], got \[4\]", ids=ids[1:])
    raises(TypeError, "v must be floating point, got torch.int64", v=v.long(), t=t.long())
    raises(TypeError, "temperature must be floating point", temperature=torch.tensor(1))
    raises(TypeError, "t must be torch.float32, got torch.bfloat16", t=t.bfloat16())
    raises(TypeError, "ids must be int32 or int64, got torch.float32", ids=ids.float())
    for impl in ("native", "reference"):
        for value in (torch.nan, 0.0, -1.0, torch.inf):
            match = f"temperature must be positive and finite, got {value:g}"
            raises(ValueError, match, temperature=torch.tensor(value), impl=impl)
    doubles = {"v": v.double(), "t": t.double()}
    raises(RuntimeError, f"{IMPL} cannot run: {IMPL} contrastive_loss", **doubles, impl=IMPL)
