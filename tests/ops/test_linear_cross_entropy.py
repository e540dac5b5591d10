from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from compare import check, check_or_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation import DEVICE, IMPL, ON_CPU, at_real_size, native_only
from torch.utils.checkpoint import checkpoint

import iv2kernels as k
from bench.ops import linear_cross_entropy as bench
from iv2kernels.ops import linear_cross_entropy as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("x", "weight", "bias")
kernels = importlib.import_module(f"iv2kernels.{IMPL}.linear_cross_entropy")

SOME = (101, 64, 1033) if ON_CPU else (70, 64, 400)

# What compare.run weighs a scalar by. Divided by it the loss has the gradient 1, and dx, which is
# saved in x.dtype, is rounded once, as in eager; test_a_scaled_loss has another gradient.
WEIGHT = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = WEIGHT.to(torch.bfloat16).item()


def kernel(**inputs):
    return k.linear_cross_entropy(**inputs, impl=IMPL) / WEIGHT


def reference(**inputs):
    return k.linear_cross_entropy(**inputs, impl="reference") / WEIGHT


def make(shape, dtype, ignored=0.0):
    inputs = bench.inputs(shape, dtype)
    g = torch.Generator().manual_seed(1)
    inputs["bias"] = (0.5 * torch.randn(shape[2], generator=g)).to(dtype)
    inputs["target"][torch.rand(shape[0], generator=g) < ignored] = -100
    return inputs


@pytest.fixture
def small_chunks(monkeypatch):
    if IMPL == "triton":
        monkeypatch.setattr(kernels, "_SCRATCH_BYTES", 1)
        monkeypatch.setattr(kernels, "_LEAST_COLUMNS", 256)
        return
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 24)
    monkeypatch.setattr(kernels, "_SLICE_BYTES", 4 * 64 * 100)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(isa, small_chunks, dtype, ignored, options):
    inputs = make(SOME, dtype, ignored) | options
    check(kernel, reference, inputs, ALL)


@native_only
@pytest.mark.parametrize("shape", [(101, 64, 1033), (50, 64, 300)])
def test_without_gemms_of_halves(monkeypatch, small_chunks, shape):
    monkeypatch.setattr(kernels, "WIDEN", {torch.bfloat16, torch.float16})
    check(kernel, reference, make(shape, torch.bfloat16, 0.4), ALL)


@at_real_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_at_real_sizes(dtype):
    check(kernel, reference, make((96, 128, 30522), dtype, 0.1), ALL)


def test_the_mean_is_torch_s():
    inputs = make((50, 16, 70), torch.float32, 0.3)
    logits = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    expected = F.cross_entropy(logits, inputs["target"], label_smoothing=0.2)
    for impl in ("reference", IMPL):
        got = k.linear_cross_entropy(**inputs, label_smoothing=0.2, impl=impl)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wrt", [(), ("x",), ("weight",), ("bias",), ("x", "bias")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_gradients(small_chunks, wrt, dtype):
    check(kernel, reference, make((60, 64, 300), dtype, 0.2), wrt)


@settings(max_examples=25 if ON_CPU else 8)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 1300 if ON_CPU else 300),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_any_shape(rows, width, vocabulary, smooth, dtype):
    inputs = make((rows, width, vocabulary), dtype, 0.2)
    inputs["label_smoothing"] = 0.1 * smooth
    check_or_close(kernel, reference, inputs, ALL, min(rows, width) > 16 and vocabulary > 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_loss(dtype):
    inputs = make((200, 64, 500), dtype)
    check(lambda **i: kernel(**i) * 0.37, lambda **i: reference(**i) * 0.37, inputs, ALL)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("impl", [IMPL, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 5])
def test_all_rows_ignored(rows, dtype, impl, reduction):
    inputs = make((rows, 8, 11), dtype) | {"reduction": reduction}
    inputs["target"].fill_(-100)
    results = run(lambda **i: k.linear_cross_entropy(**i, impl=impl), inputs, ALL)
    assert all((value == 0).all() for value in results.values())
    assert results["dx"].shape == (rows, 8)


def test_a_class_may_be_the_ignored_one():
    inputs = make((40, 24, 90), torch.float32) | {"ignore_index": 3}
    inputs["target"][::3] = 3
    check(kernel, reference, inputs, ALL)


def test_strided_inputs():
    inputs = make((60, 48, 200), torch.float32, 0.2)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["target"] = inputs["target"].repeat_interleave(2)[::2]
    check(kernel, reference, inputs, ALL)
    inputs["target"] = torch.tensor(7).expand(60)
    check(kernel, reference, inputs, ALL)


def test_large_and_masked_logits(isa):
    inputs = make((40, 32, 700), torch.float32)
    inputs["x"] *= 300
    inputs["bias"][600:] = -torch.inf
    inputs["target"] %= 600
    check(kernel, reference, inputs, ("x", "bias"))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Triton's interpreter
def test_nan_is_not_hidden(isa):
    inputs = make((4, 32, 700), torch.float32)
    inputs["x"][2, 3] = torch.nan
    inputs = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in inputs.items()}
    loss = kernel(**inputs)
    loss.backward()
    assert loss.isnan()
    assert inputs["x"].grad[2].isnan().all()
    assert inputs["x"].grad[[0, 1, 3]].isfinite().all()


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(isa, dtype):
    logits = torch.randn(37, 1733).to(dtype)
    target = torch.randint(1733, (37,))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        none = torch.empty(0)
        problem = kernels._Problem(none, None, none, torch.zeros(1733), 0.1, 1.5, [True] * 3)
        d, losses = logits.clone(), torch.empty(37, dtype=torch.float64)
        kernels._softmax(problem, d, target, losses)
        results.append((d, losses, problem.dbias))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# bfloat16 with no more rows than columns is one chunk
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 12])
def test_opcheck_compile_and_checkpoint(rows, dtype):
    inputs = make((rows, 16, 33), dtype, 0.2)
    x, weight, target, bias = inputs.values()
    tests = ("test_schema", "test_faketensor")
    for needs in ([True] * 3, [False] * 3):
        args = (x, weight, bias, target, -100, 0.1, True, needs, IMPL)
        torch.library.opcheck(op._fwd, args, test_utils=tests)
    args = (
        torch.tensor(0.5),
        *op._fwd(x, weight, bias, target, -100, 0.1, True, [True] * 3, IMPL)[1:],
    )
    torch.library.opcheck(op._bwd, (*args, IMPL), test_utils=tests)
    expected = run(kernel, inputs, ALL)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda **i: checkpoint(kernel, **i, use_reentrant=False)):
        got = run(f, inputs, ALL)
        assert all(torch.equal(expected[name], got[name]) for name in got)


def test_backward_twice_and_double_backward():
    inputs = make((5, 8, 9), torch.float32)
    x = inputs["x"].requires_grad_()
    loss = kernel(**inputs)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (dx,) = torch.autograd.grad(kernel(**inputs).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = make((40, 32, 300), torch.float32)
    with torch.autocast(DEVICE, dtype):
        got = run(kernel, inputs, ALL)
    narrow = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    expected = run(kernel, narrow, ALL)
    assert all(torch.equal(got[name], expected[name].float()) for name in got)


@native_only
def test_a_target_out_of_range_is_an_error():
    x, weight, target, _ = make((5, 8, 9), torch.float32).values()
    for bad, ignored in ((9, -100), (-1, -100), (-100, -1)):
        with pytest.raises(
            ValueError, match=rf"target must be in \[0, 9\) or .* {ignored}, got {bad}"
        ):
            k.linear_cross_entropy(x, weight, target * 0 + bad, ignore_index=ignored, impl="native")


def test_errors():
    inputs = make((5, 8, 9), torch.float32)

    def raises(kind, match, **changed):
        with pytest.raises(kind, match=match):
            k.linear_cross_entropy(**inputs | {"impl": IMPL} | changed)

    x, weight, target, bias = inputs.values()
    raises(TypeError, "x must be floating point, got torch.int64", x=x.long())
    raises(
        TypeError, "weight must be torch.float32, like x, got torch.bf", weight=weight.bfloat16()
    )
    raises(TypeError, "target must be int64, got torch.int32", target=target.int())
    raises(ValueError, r"x must be \[N, C\], got \[1, 5, 8\]", x=x[None])
    raises(ValueError, r"weight must be \[C_out, 8\]", weight=weight[:, 1:])
    raises(ValueError, r"bias must be \[9\], got \[8\]", bias=bias[1:])
    raises(ValueError, r"target must be \[5\], got \[4\]", target=target[1:])
    raises(ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", label_smoothing=1.5)
    raises(ValueError, "reduction must be mean or sum, got none", reduction="none")
    raises(RuntimeError, f"{IMPL} cannot run", x=x.double(), weight=weight.double(), bias=None)
