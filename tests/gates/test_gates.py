"""The gates in short: one op on one architecture, and that what they look for is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language")

from tests.gates import budgets

ROOT = Path(__file__).parent.parent.parent
GOOD = {
    "registers": 64,
    "stack": 0,
    "shared": 1024,
    "warps": 4,
    "blocks": 8,
    "tensor": 16,
    "async": 4,
    "local": 0,
    "global": 8,
    "wide": 8,
    "atomic": 0,
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_of_an_op_keep_their_budgets():
    done = python("-m", "tests.gates", "add_rms_norm", "--arch", "sm_90")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "add_rms_norm_fwd" in done.stdout
    assert "add_rms_norm_bwd" in done.stdout


def test_a_kernel_that_spills_and_one_that_adds_atomically_are_seen():
    done = python("-m", "tests.gates.planted")
    assert done.returncode == 0, done.stderr[-4000:]
    spilling, adding = done.stdout.splitlines()
    assert "local must be 0" in spilling
    assert "atomic must be 0" in adding
    assert "local" not in adding


@pytest.mark.parametrize(
    ("key", "worse"), [("registers", 65), ("shared", 2048), ("blocks", 7), ("tensor", 0)]
)
def test_a_kernel_that_takes_more_is_seen_and_a_budget_only_tightens(key, worse):
    bad = GOOD | {key: worse}
    (complaint,) = budgets.complaints("kernel, sm_90", bad, GOOD)
    assert f"kernel, sm_90: {key} must be at " in complaint
    assert budgets.complaints("kernel", GOOD, GOOD) == budgets.complaints("k", GOOD, bad) == []
    assert budgets.tighter(bad, GOOD) == budgets.tighter(GOOD, bad) == GOOD
    assert budgets.tighter(bad, None) == bad


def test_an_op_has_budgets_of_its_own_for_a_kernel_that_ops_share():
    known = dict.fromkeys(["a: k, sm_80", "a: k, sm_90", "b: k, sm_90", "ab: k, sm_90"], GOOD)
    assert budgets.of(known, ["a"], ["sm_90", "sm_100"]) == {"a: k, sm_90"}
    assert budgets.of(known, ["a", "b"], ["sm_80"]) == {"a: k, sm_80"}


@pytest.mark.parametrize("key", budgets.ZERO)
def test_spills_and_atomics_need_no_budget_to_be_seen(key):
    (complaint,) = budgets.complaints("kernel", GOOD | {key: 1}, None)
    assert complaint == f"kernel: {key} must be 0, got 1"


def test_budgets_are_one_line_each(tmp_path):
    path = tmp_path / "budgets.json"
    budgets.save({"b, sm_90": GOOD, "a, sm_80": GOOD}, path)
    lines = path.read_text().splitlines()
    assert [line[:9] for line in lines[2:4]] == ['"a, sm_80', '"b, sm_90']
    assert budgets.load(path)[1] == {"a, sm_80": GOOD, "b, sm_90": GOOD}
    assert json.loads(path.read_text())["triton"] == budgets.load(path)[0]
