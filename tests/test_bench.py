from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import iv2kernels as k
from bench import distributed, steps
from bench.cases import Call, Case, accuracy, candidates, cases
from bench.measure import floor_seconds, peak_memory, spread
from iv2kernels import _C, dispatch
from iv2kernels.native import add_rms_norm as native
from iv2kernels.timing import wall

CASE = Case("add_rms_norm", (2, 30, 64), "float32")
WIDEST = f"native {_C.available_isas()[-1]}"


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(CASE.page, "SHAPES", [CASE.shape])
    monkeypatch.setattr(
        bench, "peaks", lambda device: {"float32": 100.0, "bfloat16": 200.0, "copy": 20.0}
    )


def options(**changed):
    given = {"ops": ("add_rms_norm",), "dtypes": ("float32",), "seconds": 0.02, "compile": False}
    return bench.Options(**given | changed)


@pytest.mark.usefixtures("_small")
def test_table_json_csv_and_charts(tmp_path, capsys):
    before = _C.isa()
    bench.main(
        options(
            isas=("all",), json=tmp_path / "a.json", csv=tmp_path / "a.csv", plot=tmp_path / "plots"
        )
    )
    assert _C.isa() == before
    found = json.loads((tmp_path / "a.json").read_text())
    rows = {row["candidate"]: row for row in found["rows"]}
    assert set(rows) == {"eager", *(f"native {isa}" for isa in _C.available_isas())}
    ours = rows[WIDEST]
    assert ours["both_ms"] > ours["forward_ms"] > 0
    assert ours["x_eager_both"] > 0
    assert 0 < ours["error"] < 1e-6
    assert {g["column"] for g in ours["goals"]} == {"x_eager_both"}
    assert rows["eager"]["x_eager"] == 1
    assert not rows["eager"]["goals"]
    assert found["machine"]["peaks"]["copy"] == 20
    assert found["geometric_mean"] == pytest.approx(ours["x_eager_both"])
    with (tmp_path / "a.csv").open() as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == list(rows)
    for name in ("x_eager", "peak"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "x_eager_both >= 5" in printed
    assert printed.rstrip().splitlines()[-1].startswith("geometric mean of x eager")


def on_a_gpu(monkeypatch):
    """Where there is none: tensors stay here, so that no kernel for GPUs takes them."""
    answers = {"is_available": True, "get_device_name": "NVIDIA A1 80GB (PCIe)"}
    answers |= {"memory_allocated": 1e6, "max_memory_allocated": 6e6}
    answers |= dict.fromkeys(("reset_peak_memory_stats", "empty_cache"))
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr("bench.cases.on_device", lambda inputs, device: inputs)
    monkeypatch.setattr(bench, "clock_for", lambda device: wall)
    monkeypatch.setattr(CASE.page, "GPU_SHAPES", [CASE.shape])
    monkeypatch.setattr(dispatch, "_NO_TRITON", {"cuda": None, "cpu": "Triton is for GPUs"})


@pytest.mark.usefixtures("_small")
def test_a_gpu_s_table(monkeypatch, tmp_path, capsys):
    on_a_gpu(monkeypatch)
    bench.main(options(device="cuda", csv=tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open() as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file)}
    assert {"eager", "triton"} <= rows.keys()
    assert not any(name.startswith("native ") for name in rows)
    assert float(rows["eager"]["forward_ms"]) > 0
    assert float(rows["eager"]["memory_mb"]) == 5
    assert rows["eager"]["gpu"] == "NVIDIA A1 80GB (PCIe)"
    assert rows["eager"]["torch"] == torch.__version__
    assert "cannot run: Triton is for GPUs" in rows["triton"]["wrong"]
    assert not rows["triton"]["forward_ms"]
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA A1 80GB (PCIe)\n")
    assert "RuntimeError: add_rms_norm: implementation triton cannot run" in printed
    assert bench.gpu_csv("NVIDIA A1 80GB (PCIe)").name == "nvidia-a1-80gb-pcie.csv"
    bench.main(options(device="cuda", csv=tmp_path / "a.csv", minutes=0.0))
    assert "not timed, 0 minutes are over: 1 cases from add_rms_norm" in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_a_gpu_too_small_is_told(monkeypatch, tmp_path, capsys):
    on_a_gpu(monkeypatch)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench, "candidates", full)
    bench.main(options(device="cuda", csv=tmp_path / "a.csv"))
    assert "WRONG, not timed: out of memory" in capsys.readouterr().out


def test_a_library_without_a_kernel_is_no_candidate(monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(dispatch, "_NATIVE_ON_CUDA", set())  # a build may have it
    case = Case("attention", (1, 9, 1, 64), "bfloat16", "cuda")
    calls = candidates(case, [], compiled=False)  # the tensors are a CPU's: no library takes them
    assert set(calls) == {"eager", "library", "triton"}


@pytest.mark.usefixtures("_small")
def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    right = native.add_rms_norm_fwd

    def wrong(*args):
        y, *rest = right(*args)
        return (y * 1.001, *rest)

    monkeypatch.setattr(native, "add_rms_norm_fwd", wrong)
    bench.main(options())
    printed = capsys.readouterr().out
    (line,) = (x for x in printed.splitlines() if WIDEST in x)
    assert "WRONG, not timed: output 0: error" in line
    assert "geometric mean" not in printed


def test_compile_is_a_candidate_and_right():
    calls = candidates(CASE, [], compiled=True)
    assert list(calls) == ["eager", "compile"]
    y, _ = calls["compile"].forward()
    torch.testing.assert_close(y, calls["eager"].forward()[0])


def test_libraries_compute_the_same():
    for op, shape in (
        ("attention", (1, 33, 2, 16)),
        ("linear_cross_entropy", (20, 16, 50)),
        ("patch_embed", (2, 2, 28, 14, 32, 6)),
    ):
        calls = candidates(Case(op, shape, "float32"), [], compiled=False)
        got, expected = calls["library"].forward(), calls["eager"].forward()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert accuracy(Case(op, shape, "float32"), calls["eager"])[1] is None


def test_every_page_makes_cases_and_goals():
    found = list(cases((), ("float32", "bfloat16")))
    assert {case.op for case in found} == set(bench.base.iv2kernels.dispatch.PREFER) | {
        "attention_blocks"
    }
    columns = {"x_eager", "x_eager_both", "x_compile_both", "x_library", "x_library_both"}
    columns |= {"peak_percent", "memory_less"}
    for case in found:
        assert set(case.goals()) <= columns
        assert min(case.work()) >= 0


def test_peak_memory_counts_what_is_held_at_once():
    def call(n):
        x = torch.empty(n << 18)  # 4 bytes each: n MiB
        y = x + 1
        del x
        return y.sum()

    mib = 2**20 / 1e6
    assert peak_memory(lambda: call(8)) == pytest.approx(16 * mib, rel=0.01)
    assert peak_memory(lambda: None) == 0


def test_floor_and_spread():
    machine = {"float32": 100.0, "bfloat16": 400.0, "copy": 10.0}
    assert floor_seconds((10**9, 10**6), "float32", machine) == pytest.approx(0.01)
    assert floor_seconds((10**9, 10**6), "bfloat16", machine) == pytest.approx(0.0025)
    assert floor_seconds((0, 10**8), "bfloat16", machine) == pytest.approx(0.01)
    assert spread([1.0] * 9) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(100)


def test_a_call_without_gradients_is_forward_alone():
    call = Call(lambda x: x + 1, {"x": torch.ones(2)}, ())
    assert not call.has_backward
    assert torch.equal(call.both(), call.forward())


def test_steps(monkeypatch):
    def build(name, dtype):
        x, weight = torch.randn(64, 32).to(dtype), torch.randn(16, 32).to(dtype)
        return lambda: k.linear(x, weight)

    monkeypatch.setattr(steps, "build", build)
    rates = iter([{"bfloat16": 90.0}, {"bfloat16": 100.0}])
    monkeypatch.setattr(steps, "peaks", lambda: next(rates))
    row = steps.measure("stage1-s", "bfloat16", steps.Options(rounds=3))
    assert row["gflop"] == pytest.approx(2 * 64 * 32 * 16 / 1e9)
    assert row["x_eager"] > 0
    assert {g["column"] for g in row["goals"]} == {"x_eager", "floor_percent", "memory"}
    seconds = 2e-9 * 64 * 32 * 16 / 100
    assert row["floor_percent"] == pytest.approx(100 * seconds / row["ours_s"])
    assert "of the floor at 100 GFLOP/s" in steps.show(row)


def test_errors():
    for changed, match in (
        ({"ops": ("nothing",)}, "op must be one of add_rms_norm, .* got nothing"),
        ({"dtypes": ("int8",)}, "dtype must be float32, bfloat16 or float16, got int8"),
        ({"device": "tpu"}, "device must be cpu or cuda, got tpu"),
        ({"base": "no-such-commit"}, "base must be a commit of this repository, got no-such"),
    ):
        with pytest.raises(ValueError, match=match):
            bench.main(options(**changed))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match="device must be one of this machine, got cuda and no GPU"):
        bench.main(options(device="cuda"))


def test_from_the_command_line():
    for module, text in (
        ("bench", "bench: op must be one of add_rms_norm"),
        ("bench.steps", "bench.steps: step must be one of encoder-s"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, "nothing"],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert text in done.stderr


def test_ranks_are_timed_in_turns(tmp_path):
    options = distributed.Options(rows=64, width=16, rounds=2, json=tmp_path / "rows.json")
    distributed.main(options)
    rows = json.loads(options.json.read_text())
    assert [row["candidate"] for row in rows] == 2 * list(distributed.CANDIDATES)
    assert all(row["ms"] > 0 and row["memory_mb"] > 0 for row in rows)
