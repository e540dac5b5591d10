from __future__ import annotations

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import contrastive_loss as bench
from iv2kernels.ops import contrastive_loss as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(**inputs):
    return k.contrastive_loss(**inputs, impl="native")


def reference(v, t, temperature, ids=None):
    return op.reference(v, t, temperature, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(330, 64), (65, 93), (17, 512)])
def test_matches_float64(isa, shape, dtype):
    check(native, reference, bench.inputs(shape, dtype), bench.WRT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_at_a_real_size(dtype):
    check(native, reference, bench.inputs((1024, 512), dtype), bench.WRT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [None, 1, 5, 100])
def test_ids(isa, distinct, dtype):
    inputs = bench.inputs((300, 40), dtype)
    # far apart: no float32 holds them
    ids = None if distinct is None else 2**40 + torch.randint(distinct, (300,))
    check(native, reference, inputs | {"ids": ids}, bench.WRT)


def test_ids_none_is_one_id_a_row():
    inputs = bench.inputs((70, 24), torch.float32)
    without = run(native, inputs | {"ids": None}, bench.WRT)
    for ids in (torch.arange(70), torch.arange(70, dtype=torch.int32).flip(0)):
        given_ids = run(native, inputs | {"ids": ids}, bench.WRT)
        assert all(torch.equal(without[name], given_ids[name]) for name in without)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 20.0])
def test_temperatures(isa, temperature):
    inputs = bench.inputs((280, 64), torch.float32)
    inputs["temperature"] = torch.tensor(temperature)
    check(native, reference, inputs, bench.WRT)


def test_a_solved_batch(isa):
    # Every row finds its own: the loss is about e^-7 and not what two large numbers differ by.
    inputs = bench.inputs((270, 512), torch.float32)
    inputs |= {"t": inputs["v"].clone(), "temperature": torch.tensor(0.05), "ids": None}
    check(native, reference, inputs, bench.WRT)


def test_one_row(isa):
    for dtype in DTYPES:
        results = run(native, bench.inputs((1, 33), dtype), bench.WRT)
        assert all((value == 0).all() for value in results.values())
        assert results["dv"].shape == (1, 33)


def test_no_rows():
    results = run(native, bench.inputs((0, 8), torch.float32), bench.WRT)
    assert results["output 0"].isnan()
    assert results["dv"].shape == results["dt"].shape == (0, 8)


def test_nan_is_not_hidden(isa):
    inputs = bench.inputs((90, 32), torch.float32)
    inputs["t"][70, 3] = torch.nan
    results = run(native, inputs, bench.WRT)
    assert all(results[name].isnan().any() for name in results)


@pytest.mark.parametrize("wrt", [(), ("v",), ("t",), ("temperature",), ("v", "temperature")])
def test_partial_gradients(wrt):
    check(native, reference, bench.inputs((70, 24), torch.float32), wrt)


def test_a_float32_temperature_with_bfloat16_features(isa):
    inputs = bench.inputs((90, 40), torch.bfloat16) | {"temperature": torch.tensor(0.07)}
    check(native, reference, inputs, bench.WRT)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 150), st.sampled_from(DTYPES))
def test_any_shape(rows, width, dtype):
    inputs = bench.inputs((rows, width), dtype)
    check_or_close(native, reference, inputs, bench.WRT, rows >= 32 and width >= 16)


def test_strided_inputs():
    inputs = bench.inputs((70, 32), torch.float32)
    inputs["v"] = inputs["v"].t().contiguous().t()
    inputs["t"] = torch.nn.functional.normalize(torch.randn(32), dim=0).expand(70, 32)
    inputs["ids"] = inputs["ids"].repeat_interleave(2)[::2]
    check(native, reference, inputs, bench.WRT)


def test_threads_do_not_change_a_bit(isa):
    inputs = bench.inputs((600, 72), torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(native, inputs, bench.WRT))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_no_matrix_of_all_pairs():
    rows = 3000
    inputs = bench.inputs((rows, 32), torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(native, inputs, bench.WRT)
    largest = max(event.self_cpu_memory_usage for event in recorded.events())
    assert 4 * 256 * rows < largest < rows * rows


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((5, 16), torch.float32)
    v, t, temperature, ids = inputs.values()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._fwd, (v, t, temperature, ids, "native"), test_utils=utils)
    _, stats = op._fwd(v, t, temperature, ids, "native")
    for needs in ([True, True], [False, True]):
        args = (torch.tensor(0.5), v, t, temperature, stats, needs, "native")
        torch.library.opcheck(op._bwd, args, test_utils=utils)
    expected = run(native, inputs, bench.WRT)
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(native, **i, use_reentrant=False)):
        got = run(f, inputs, bench.WRT)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_double_backward_raises():
    inputs = bench.inputs((4, 8), torch.float32)
    v = inputs["v"].requires_grad_()
    (dv,) = torch.autograd.grad(native(**inputs).square(), v, create_graph=True)
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
    raises(RuntimeError, "native cannot run: native contrastive_loss", **doubles, impl="native")
