"""The gate of csrc/cuda in short: one file, and that what it looks for is seen."""

from __future__ import annotations

import json

import pytest

from tests.gates import cuda_resources as gate

GOOD = {
    "registers": 64,
    "stack": 0,
    "shared": 1024,
    "tensor": 16,
    "async": 4,
    "local": 0,
    "global": 8,
    "wide": 8,
}
needs_tools = pytest.mark.skipif(
    not all(map(gate.tool, ("nvcc", "cuobjdump", "c++filt"))),
    reason="reads machine code: needs nvcc, cuobjdump and c++filt",
)

PLANTED = """
__global__ void __launch_bounds__(256) spilling(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i];
  for (int i = 0; i < n; ++i) local[i % 64] += local[i * 7 % 64];
  for (int i = 0; i < 64; ++i) x[i] = local[i];
}
__global__ void wide(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""


@needs_tools
def test_a_file_keeps_its_budgets(tmp_path):
    known = gate.load()[1]
    found = dict(gate.usages(gate.compile_cubin(gate.FILES["masks"], "sm_80", tmp_path)))
    assert set(found) == {"draw_kernel"}
    name = "masks draw_kernel, sm_80"
    assert gate.complaints(name, found["draw_kernel"], known[name]) == []


@needs_tools
def test_local_memory_and_wide_words_are_seen(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    found = dict(gate.usages(gate.compile_cubin(source, "sm_90a", tmp_path)))
    complaints = gate.complaints("spilling", found["spilling"], None)
    assert any("local must be 0" in complaint for complaint in complaints)
    assert any("stack must be 0" in complaint for complaint in complaints)
    assert gate.complaints("wide", found["wide"], None) == []
    assert found["wide"]["wide"] == found["wide"]["global"] == 2


@pytest.mark.parametrize(
    ("key", "worse"), [("registers", 65), ("shared", 2048), ("tensor", 0), ("wide", 7)]
)
def test_a_kernel_that_takes_more_is_seen_and_a_budget_only_tightens(key, worse):
    bad = GOOD | {key: worse}
    (complaint,) = gate.complaints("kernel, sm_80", bad, GOOD)
    assert complaint.startswith(f"kernel, sm_80: {key} must be at ")
    assert gate.complaints("kernel", GOOD, GOOD) == gate.complaints("kernel", GOOD, bad) == []
    assert gate.tighter(bad, GOOD) == gate.tighter(GOOD, bad) == GOOD
    assert gate.tighter(bad, None) == bad


def test_the_gate_tells_kernel_architecture_figure_and_budget(monkeypatch, capsys):
    name, kernel = "masks draw_kernel<float>, sm_90a", "draw_kernel<float>"

    def judged(found, known, *arguments):
        saved = []
        monkeypatch.setattr(gate, "load", lambda: ("13.0", known))
        monkeypatch.setattr(gate, "save", lambda version, budgets: saved.append(budgets))
        monkeypatch.setattr(gate, "measure", lambda task: list(found.items()))
        monkeypatch.setattr(gate, "tool", lambda name: name)
        monkeypatch.setattr(gate, "run", lambda *command: "release 13.0, V13.0.1")
        status = gate.main(["masks", "--arch", "sm_90a", *arguments])
        lines = [li for li in capsys.readouterr().out.splitlines() if ", sm_90a: " in li]
        return status, lines, saved

    assert judged({kernel: GOOD}, {name: GOOD}) == (0, [], [])
    for key, got, told in (
        ("registers", 65, "registers must be at most 64, got 65"),
        ("local", 2, "local must be 0, got 2"),
        ("stack", 8, "stack must be 0, got 8"),
        ("tensor", 0, "tensor must be at least 16, got 0"),
    ):
        status, lines, _ = judged({kernel: GOOD | {key: got}}, {name: GOOD})
        assert (status, lines) == (1, [f"{name}: {told}"])
    status, lines, _ = judged({kernel: GOOD}, {})
    assert (status, lines) == (1, [f"{name}: has no budget; run with --tighten to take it"])
    other = {"masks k, sm_80": GOOD, "masks_2 k, sm_90a": GOOD}
    status, lines, _ = judged({}, other | {name: GOOD})
    assert (status, lines) == (1, [f"{name}: has a budget, but no kernel"])
    taken = judged({kernel: GOOD}, other | {"masks old, sm_90a": GOOD}, "--tighten")
    assert taken == (0, [], [other | {name: GOOD}])


def test_budgets_are_one_line_each(tmp_path):
    path = tmp_path / "budgets.json"
    gate.save("13.0", {"b, sm_90a": GOOD, "a, sm_80": GOOD}, path)
    assert [line[:9] for line in path.read_text().splitlines()[2:4]] == ['"a, sm_80', '"b, sm_90']
    assert gate.load(path) == ("13.0", {"a, sm_80": GOOD, "b, sm_90a": GOOD})
    assert json.loads(path.read_text())["nvcc"] == "13.0"
