from __future__ import annotations

import json
import time

import pytest
import torch

import iv2kernels
from iv2kernels import dispatch, tuning
from iv2kernels.native import add_rms_norm as native


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("IV2_TUNED", raising=False)
    before = dict(dispatch.TUNED)
    dispatch.TUNED.clear()
    yield
    dispatch.TUNED.clear()
    dispatch.TUNED.update(before)


@pytest.fixture
def _slow_kernel(monkeypatch):
    """A native add_rms_norm that waits: tune must turn away from it."""
    fast = native.add_rms_norm_fwd

    def slow(*args):
        time.sleep(0.02)
        return fast(*args)

    monkeypatch.setattr(native, "add_rms_norm_fwd", slow)


def step():
    x = torch.ones(2, 16)
    return iv2kernels.rms_norm(x, torch.ones(16)), iv2kernels.linear(x, torch.ones(8, 16))


KEY = ("add_rms_norm", "cpu", torch.float32)


@pytest.mark.usefixtures("_slow_kernel")
def test_the_fastest_is_taken_and_stored():
    x = torch.ones(2, 16)
    assert dispatch.choose("add_rms_norm", x) == "native"
    gains = iv2kernels.tune(step, ops=["add_rms_norm"], seconds=0.2)
    row = gains["add_rms_norm cpu float32"]
    assert list(gains) == ["add_rms_norm cpu float32"]
    assert row["native"] == pytest.approx(1)
    assert row["reference"] > 2
    assert dispatch.choose("add_rms_norm", x) == "reference"
    # another dtype keeps the default; what is asked for by name comes first
    assert dispatch.choose("add_rms_norm", x.bfloat16()) == "native"
    assert dispatch.choose("add_rms_norm", x, "native") == "native"
    dispatch.TUNED.clear()
    tuning.load()
    assert {KEY: "reference"} == dispatch.TUNED
    tuning.forget()
    tuning.load()
    assert not dispatch.TUNED


@pytest.mark.usefixtures("_slow_kernel")
def test_not_stored_when_not_asked():
    iv2kernels.tune(step, ops=["add_rms_norm"], seconds=0.1, store=False)
    assert dispatch.TUNED[KEY] == "reference"
    assert not tuning.path().exists()


def test_every_op_of_the_step_is_tried():
    gains = iv2kernels.tune(step, seconds=0.05)
    assert set(gains) == {"add_rms_norm cpu float32", "linear cpu float32"}
    assert {"reference", "native"} <= gains["add_rms_norm cpu float32"].keys()
    assert {"reference", "torch"} <= gains["linear cpu float32"].keys()


def test_a_failing_step_leaves_the_choice_as_it_was():
    calls = []

    def fails():
        calls.append(step())
        if len(calls) > 2:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        iv2kernels.tune(fails, ops=["add_rms_norm"])
    assert dispatch.choose("add_rms_norm", torch.ones(2, 16)) == "native"
    assert not tuning.path().exists()


def test_other_machines_and_broken_files_do_not_count(monkeypatch):
    tuning.path().parent.mkdir(parents=True)
    name = "add_rms_norm cpu float32"
    tuning.path().write_text(json.dumps({"another": {name: "reference"}}))
    tuning.load()
    assert not dispatch.TUNED
    for content in ("{", "[1]", json.dumps({tuning._machine(): {name: "triton", "x": "native"}})):
        tuning.path().write_text(content)
        tuning.load()
        assert not dispatch.TUNED
    tuning.path().write_text(json.dumps({tuning._machine(): {name: "reference"}}))
    monkeypatch.setenv("IV2_TUNED", "0")
    tuning.load()
    assert not dispatch.TUNED


def test_errors():
    with pytest.raises(ValueError, match=r"tune: op must be one of add_rms_norm, .*got no_op"):
        iv2kernels.tune(step, ops=["no_op"])
    with pytest.raises(ValueError, match="step must call at least one op, got none"):
        iv2kernels.tune(lambda: None)
    with pytest.raises(ValueError, match="step must call at least one op, got none"):
        iv2kernels.tune(step, ops=["mlp"])
