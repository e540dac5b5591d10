"""The gates in short: one op on one architecture, and that what they look for is seen.

Most of it is told to the gate as if it had been measured, and nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton.language")

import torch
import triton

from iv2kernels.triton.attention_tiles import tiles_for
from tests.gates import __main__ as gate
from tests.gates import budgets, resources
from tests.gates.compiling import ARCHS, DTYPES, FULL, compiling, dtypes_of

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
KERNEL = "gather_tokens: gather_tokens_fwd C=384 bfloat16"


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


@pytest.fixture
def judged(monkeypatch, capsys):
    """The gate over kernels that were measured before: its status, its last lines, its budgets."""

    def run(found, known, *arguments, arch="sm_120", version=triton.__version__):
        known = dict(known)
        monkeypatch.setattr(budgets, "load", lambda: (version, dict(known)))
        monkeypatch.setattr(budgets, "save", lambda new: (known.clear(), known.update(new)))
        monkeypatch.setattr(gate, "measure", lambda task: list(found.items()))
        status = gate.main(["gather_tokens", "--arch", arch, *arguments])
        lines = capsys.readouterr().out.splitlines()
        return status, [line for line in lines if f", {arch}: " in line], known

    return run


@pytest.mark.parametrize(
    ("key", "got", "told"),
    [
        ("registers", 65, "registers must be at most 64, got 65"),
        ("shared", 2048, "shared must be at most 1024, got 2048"),
        ("local", 3, "local must be 0, got 3"),
        ("stack", 16, "stack must be 0, got 16"),
        ("atomic", 1, "atomic must be 0, got 1"),
        ("tensor", 0, "tensor must be at least 16, got 0"),
        ("async", 3, "async must be at least 4, got 3"),
        ("wide", 7, "wide must be at least 8, got 7"),
        ("blocks", 0, "blocks must be at least 8, got 0"),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_figure_that_is_worse_fails_the_gate_and_is_told(judged, arch, key, got, told):
    known = {f"{KERNEL}, {arch}": GOOD}
    assert judged({KERNEL: GOOD}, known, arch=arch)[:2] == (0, [])
    status, lines, after = judged({KERNEL: GOOD | {key: got}}, known, arch=arch)
    assert (status, lines) == (1, [f"{KERNEL}, {arch}: {told}"])
    assert after == known
    # nor does --tighten take it
    status, lines, after = judged({KERNEL: GOOD | {key: got}}, known, "--tighten", arch=arch)
    assert (status, lines, after) == (1, [f"{KERNEL}, {arch}: {told}"], known)


def test_a_kernel_without_a_budget_and_a_budget_without_a_kernel_fail_the_gate(judged):
    status, lines, _ = judged({KERNEL: GOOD}, {f"{KERNEL}, sm_80": GOOD})
    assert status == 1
    assert lines == [f"{KERNEL}, sm_120: has no budget; run with --tighten to take it"]
    status, lines, _ = judged({}, {f"{KERNEL}, sm_120": GOOD})
    assert (status, lines) == (1, [f"{KERNEL}, sm_120: has a budget, but nothing launches it"])
    other = {"gather_tokens: k float32 #2, sm_120": GOOD, "rope3d: k bfloat16, sm_120": GOOD}
    status, lines, after = judged({KERNEL: GOOD}, other, "--tighten")
    assert (status, lines, after) == (0, [], other | {f"{KERNEL}, sm_120": GOOD})


def test_a_kernel_that_no_multiprocessor_has_room_for_fails_the_gate(judged):
    status, lines, after = judged({KERNEL: GOOD | {"blocks": 0}}, {}, "--tighten", "--admit")
    assert status == 1
    assert lines == [f"{KERNEL}, sm_120: blocks must be at least 1, got 0"]
    assert after == {}


def test_a_spill_is_admitted_once_and_then_only_shrinks(judged):
    name, spilling = f"{KERNEL}, sm_120", GOOD | {"local": 8, "stack": 32}
    told = [f"{name}: stack must be 0, got 32", f"{name}: local must be 0, got 8"]
    assert judged({KERNEL: spilling}, {}, "--tighten") == (1, told, {})
    admitted = {name: spilling}
    assert judged({KERNEL: spilling}, {}, "--tighten", "--admit") == (0, [], admitted)
    assert judged({KERNEL: spilling}, admitted) == (0, [], admitted)
    status, lines, _ = judged({KERNEL: spilling | {"local": 9}}, admitted)
    assert (status, lines) == (1, [f"{name}: local must be at most 8, got 9"])
    assert judged({KERNEL: GOOD}, admitted, "--tighten") == (0, [], {name: GOOD})
    adding = {KERNEL: GOOD | {"atomic": 1}}
    assert judged(adding, {}, "--tighten", "--admit")[2] == {}


def test_budgets_of_another_triton_are_not_compared_but_spills_are_seen(judged):
    known = {f"{KERNEL}, sm_120": GOOD}
    worse = GOOD | {"registers": 200}
    assert judged({KERNEL: worse}, known, version="0")[:2] == (0, [])
    status, lines, _ = judged({KERNEL: worse | {"local": 1}}, known, version="0")
    assert (status, lines) == (1, [f"{KERNEL}, sm_120: local must be 0, got 1"])


def test_instructions_are_told_apart():
    nvidia = "HMMA.16816.F32.BF16 HGMMA.64x64x16.F32.BF16 UTCHMMA UTCQMMA.2CTA IMAD.WIDE LDL.64 STL"
    nvidia += " LDG.E.128 LDG.E STG.E.128 LDGSTS.E.BYPASS.128 LDSM.16.MT88.4 RED.E.ADD ATOMS.ADD"
    assert resources._count(nvidia.split(), resources._NVIDIA) == {
        **{"tensor": 4, "async": 1, "local": 2, "global": 4, "wide": 3, "atomic": 1}
    }
    amd = "v_mfma_f32_32x32x8_bf16_1k v_add_f32_e32 scratch_load_dword scratch_store_dwordx4"
    amd += " global_load_dwordx4 buffer_load_dword global_load_lds_dword global_atomic_add_f32"
    assert resources._count(amd.split(), resources._AMD) == {
        **{"tensor": 1, "async": 1, "local": 2, "global": 3, "wide": 1, "atomic": 1}
    }


def test_spilled_vector_registers_are_local_and_scalar_ones_only_on_the_stack():
    fields = {"vgpr_count": 96, "private_segment_fixed_size": 0, "vgpr_spill_count": 0}

    def read(**others):
        told = "\n".join(f"    .{n}:  {v}" for n, v in (fields | others).items())
        code = f"\tv_mfma_f32_32x32x8_bf16 v0, v1\n\ts_endpgm\n{told}\n"
        return resources._amd(SimpleNamespace(asm={"amdgcn": code}))

    found = read(sgpr_spill_count=25)
    assert (found["registers"], found["tensor"]) == (96, 1)
    assert found["local"] == found["stack"] == 0
    assert read(sgpr_spill_count=0, vgpr_spill_count=3)["local"] == 3
    assert read(private_segment_fixed_size=8)["stack"] == 8


def test_blocks_at_once_follow_from_registers_and_shared_memory():
    found = GOOD | {"warps": 8, "shared": 98304, "registers": 128}
    counts = {arch: resources.blocks(arch, found) for arch in ARCHS}
    # 99328 bytes with the driver's: one in 100 KiB; AMD has 64 KiB, and takes none
    assert counts == {"sm_80": 1, "sm_90": 2, "sm_100": 2, "sm_120": 1, "gfx942": 0}
    assert resources.blocks("sm_90", found | {"registers": 255}) == 1
    assert resources.blocks("sm_120", found | {"shared": 100 << 10}) == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_follow_the_gpu_that_is_compiled_for(monkeypatch, arch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with compiling(arch):
        found = [tiles_for(width, torch.bfloat16).dkdv for width in (64, 88, 128)]
    if arch in ("sm_80", "sm_120"):
        assert found == [(64, 32, 4, 2), (64, 16, 8, 2), (64, 32, 8, 2)]
    else:
        assert found == [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)]


def test_every_budget_is_of_what_is_compiled_on_its_architecture():
    known = budgets.load()[1]
    names = set().union(
        *(
            budgets.of(known, op, arch, dtypes_of(arch))
            for op in gate._with_kernels()
            for arch in ARCHS
        )
    )
    assert names == set(known)
    assert dtypes_of(FULL) == DTYPES


def test_an_op_has_budgets_of_its_own_for_a_kernel_that_ops_share():
    names = ["a: k bfloat16, sm_80", "a: k bfloat16 #2, sm_90", "b: k bfloat16, sm_90"]
    names += ["ab: k bfloat16, sm_90", "a: k float32, sm_90", "a: k bfloat16, sm_900"]
    known = dict.fromkeys(names, GOOD)
    assert budgets.of(known, "a", "sm_90", ["bfloat16"]) == {names[1]}
    assert budgets.of(known, "a", "sm_90", DTYPES) == {names[1], names[4]}
    assert budgets.of(known, "b", "sm_80", DTYPES) == set()


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
