"""`python -m tests.gpu` where there is no GPU: what it would run, and how it counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as gpu
from tests.gpu.__main__ import Job

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_op_with_its_implementations(monkeypatch):
    pairs = [("add_rms_norm", "native"), ("mlp", "triton"), ("attention", "cudnn")]
    monkeypatch.setattr(gpu, "kernels", lambda: pairs)
    found = {job.name: job for job in gpu.jobs()}
    assert list(found) == [
        *("compute-sanitizer", "tests/gpu", "tests/ops/test_mlp.py triton"),
        *("tests/ops/test_add_rms_norm.py native", "tests/ops/test_attention.py cudnn"),
    ]
    triton = found["tests/ops/test_mlp.py triton"]
    assert triton.environment == {"IV2_TEST_GPU": "triton"}
    assert triton.arguments[-2:] == ["-k", "not any_shape"]
    assert "-k" not in found["tests/ops/test_add_rms_norm.py native"].arguments
    files = [a for job in found.values() for a in job.arguments if a.startswith("tests/")]
    assert all((gpu.ROOT / file).exists() for file in files)


def test_what_fails_and_what_does_not_end_in_time_counts(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    code = {
        "right": "import os; print('3 passed on', os.environ['PLACE'])",
        "wrong": "print('1 failed'); raise SystemExit(1)",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
    }
    todo = [Job(name, ["-c", text], {"PLACE": "it"}) for name, text in code.items()]
    monkeypatch.setattr(gpu, "jobs", lambda: todo[:1])
    assert gpu.main(["--minutes", "1"]) == 0
    assert "passed    right" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "jobs", lambda: todo[1:])
    assert gpu.main(["--minutes", "0.02", "--processes", "2"]) == 1
    printed = capsys.readouterr().out
    assert "failed    wrong" in printed
    assert "    1 failed" in printed
    assert "not done  slow" in printed
    assert Job("late", ["-c", ""]).run(0.0) == ("not done", "")


@needs_none
def test_without_a_gpu_nothing_is_run(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().out == "no GPU: nothing was run\n"


@needs_none
def test_tests_of_a_gpu_are_collected_and_skipped():
    done = python("-m", "pytest", "-rs", "tests/gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout
    assert "passed" not in done.stdout
    pytest.importorskip("triton.language")
    done = python("-m", "pytest", "-rs", "tests/ops/test_rope3d.py", IV2_TEST_GPU="triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in done.stdout
    assert "passed" not in done.stdout
    done = python("-m", "pytest", "tests/ops/test_rope3d.py", IV2_TEST_GPU="fast")
    assert "IV2_TEST_GPU=fast names no implementation" in done.stdout + done.stderr
