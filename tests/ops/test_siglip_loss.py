from __future__ import annotations

import pytest
import torch
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import IMPL, ON_CPU, at_real_size, native_only
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import siglip_loss as bench
from iv2kernels.ops import siglip_loss as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 300 if ON_CPU else 130  # of several tiles


def kernel(**inputs):
    return k.siglip_loss(**inputs, impl=IMPL)


def reference(v, t, scale, bias, ids=None):
    return op.reference(v, t, scale, bias, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(ROWS + 30, 64), (65, 93), (17, 512), (1, 33)])
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
    ids = None if distinct is None else 2**40 + torch.randint(distinct, (ROWS,))
    check(kernel, reference, inputs | {"ids": ids}, bench.WRT)


def test_ids_none_is_one_id_a_row():
    inputs = bench.inputs((70, 24), torch.float32)
    without = run(kernel, inputs | {"ids": None}, bench.WRT)
    for ids in (torch.arange(70), torch.arange(70, dtype=torch.int32).flip(0)):
        given_ids = run(kernel, inputs | {"ids": ids}, bench.WRT)
        assert all(torch.equal(without[name], given_ids[name]) for name in without)


@pytest.mark.parametrize(
    ("scale", "bias"), [(100.0, -5.0), (-3.0, 20.0), (0.0, 0.0), (40.0, -90.0)]
)
def test_logits_of_any_size(isa, scale, bias):
    inputs = bench.inputs((ROWS - 20, 64), torch.float32)
    inputs |= {"scale": torch.tensor(scale), "bias": torch.tensor(bias)}
    check(kernel, reference, inputs, bench.WRT)


def test_no_rows():
    results = run(kernel, bench.inputs((0, 8), torch.float32), bench.WRT)
    assert results["output 0"].isnan()
    assert results["dv"].shape == results["dt"].shape == (0, 8)


def test_nan_is_not_hidden(isa):
    inputs = bench.inputs((90, 32), torch.float32)
    inputs["t"][70, 3] = torch.nan
    results = run(kernel, inputs, bench.WRT)
    assert all(results[name].isnan().any() for name in results)


@pytest.mark.parametrize("wrt", [(), ("v",), ("t",), ("scale",), ("bias",), ("t", "bias")])
def test_partial_gradients(wrt):
    check(kernel, reference, bench.inputs((70, 24), torch.float32), wrt)


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
    monkeypatch.setattr("iv2kernels.triton.pair_tiles.GRADIENT_STRIP", 64)
    check(kernel, reference, bench.inputs((ROWS, 40), dtype), bench.WRT)


def test_opcheck_compile_and_checkpoint():
    inputs = bench.inputs((5, 16), torch.float32)
    v, t, scale, bias, ids = (inputs[n] for n in ("v", "t", "scale", "bias", "ids"))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._fwd, (v, t, scale, bias, ids, IMPL), test_utils=utils)
    _, labels = op._fwd(v, t, scale, bias, ids, IMPL)
    for needs in ([True, True], [False, True]):
        args = (torch.tensor(0.5), v, t, scale, bias, labels, needs, IMPL)
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
            k.siglip_loss(**inputs | changed)

    v, t, ids = (inputs[name] for name in ("v", "t", "ids"))
    raises(ValueError, r"v must be \[B, D\] with D > 0, got \[5\]", v=v[:, 0])
    raises(ValueError, r"t must be \[5, 16\], got \[5, 15\]", t=t[:, 1:])
    raises(ValueError, r"scale must be a scalar, got \[1\]", scale=torch.ones(1))
    raises(ValueError, r"bias must be a scalar, got \[1\]", bias=torch.ones(1))
    raises(ValueError, r"ids must be \[5\], got \[4\]", ids=ids[1:])
    raises(TypeError, "v must be floating point, got torch.int64", v=v.long(), t=t.long())
    raises(TypeError, "scale must be floating point", scale=torch.tensor(1))
    raises(TypeError, "bias must be floating point", bias=torch.tensor(1))
    raises(TypeError, "t must be torch.float32, got torch.bfloat16", t=t.bfloat16())
    raises(TypeError, "ids must be int32 or int64, got torch.float32", ids=ids.float())
    doubles = {"v": v.double(), "t": t.double()}
    raises(RuntimeError, f"{IMPL} cannot run: {IMPL} siglip_loss", **doubles, impl=IMPL)
