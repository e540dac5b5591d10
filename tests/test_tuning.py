from __future__ import annotations

import json
import time
from collections import namedtuple

import pytest
import torch
from torch._subclasses import FakeTensorMode

import iv2kernels
from iv2kernels import dispatch, tiles, tuning
from iv2kernels.native import add_rms_norm as native


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("IV2_TUNED", raising=False)
    monkeypatch.setattr(dispatch, "TUNED", {})
    monkeypatch.setattr(tiles, "CHOSEN", {})


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
NAME = "add_rms_norm cpu float32 2x16"


@pytest.mark.usefixtures("_slow_kernel")
def test_the_fastest_is_taken_and_stored():
    x = torch.ones(2, 16)
    assert dispatch.choose("add_rms_norm", x) == "native"
    gains = iv2kernels.tune(step, ops=["add_rms_norm"], seconds=0.2)
    row = gains[NAME]
    assert list(gains) == [NAME]
    assert row["native"] == pytest.approx(1)
    assert row["reference"] > 2
    assert dispatch.choose("add_rms_norm", x) == "reference"
    # another dtype or width keeps the default; what is asked for by name comes first
    assert dispatch.choose("add_rms_norm", x.bfloat16()) == "native"
    assert dispatch.choose("add_rms_norm", torch.ones(2, 15)) == "native"
    assert dispatch.choose("add_rms_norm", x, "native") == "native"
    dispatch.TUNED.clear()
    tuning.load()
    assert {KEY: (dispatch.Tuned(16, 2, "reference"),)} == dispatch.TUNED
    tuning.forget()
    tuning.load()
    assert not dispatch.TUNED


@pytest.mark.usefixtures("_slow_kernel")
def test_not_stored_when_not_asked():
    iv2kernels.tune(step, ops=["add_rms_norm"], seconds=0.1, store=False)
    assert dispatch.tuned(KEY, 16, 2) == "reference"
    assert not tuning.path().exists()


def test_every_op_of_the_step_is_tried():
    gains = iv2kernels.tune(step, seconds=0.05)
    assert set(gains) == {NAME, "linear cpu float32 2x16"}
    assert {"reference", "native"} <= gains[NAME].keys()
    assert {"reference", "torch"} <= gains["linear cpu float32 2x16"].keys()


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
    tuning.path().write_text(json.dumps({"another": {NAME: "reference"}}))
    tuning.load()
    assert not dispatch.TUNED
    wrong = {NAME: "triton", "x": "native", NAME[:-4] + "4x": "native", f"a {NAME}": "native"}
    wrong |= {NAME.replace("float32", "nothing"): "native", NAME.replace("2x", "3x"): "fast"}
    for content in ("{", "[1]", json.dumps({tuning._machine(): wrong})):
        tuning.path().write_text(content)
        tuning.load()
        assert not dispatch.TUNED
    tuning.path().write_text(json.dumps({tuning._machine(): {NAME: "reference"}}))
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


def test_between_two_sizes_the_larger_counts():
    size = dispatch.Tuned
    dispatch.TUNED[KEY] = (size(8, 5, "native"), size(16, 10, "native"), size(16, 40, "reference"))
    found = {rows: dispatch.tuned(KEY, 16, rows) for rows in (1, 10, 11, 40, 500)}
    assert list(found.values()) == ["native", "native", "reference", "reference", "reference"]
    assert dispatch.tuned(KEY, 15, 10) is None
    x = torch.ones(3, 10, 16)
    assert dispatch.choose("add_rms_norm", x) == "reference"
    # what does not take the other arguments is passed over
    refuses = {"reference": "no"}.get
    assert dispatch.choose("add_rms_norm", x, None, refuses) == "native"
    with pytest.raises(dispatch.UnsupportedError, match="implementation reference cannot run: no"):
        dispatch.choose("add_rms_norm", x, "reference", refuses)


def test_choices_by_size_compile_as_a_whole():
    dispatch.TUNED[KEY] = (
        dispatch.Tuned(16, 4, "reference"),
        dispatch.Tuned(16, 64, "native"),
    )
    weight = torch.ones(16)
    frames = []

    def backend(graph, _):
        frames.append([node.name for node in graph.graph.nodes if "add_rms_norm" in node.name])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: iv2kernels.rms_norm(x, weight), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (2, 3, 50, 60):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), iv2kernels.rms_norm(x, weight, impl="reference"))
    assert len(frames) == 2  # one on either side of four rows


# Seconds of a call on a GPU, as if measured.
SECONDS = {"reference": 9.0, "triton": 2.0, "torch": 1.5, "cudnn": 1.0, "flash_attn": 1.2}


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that say they are on a GPU, one whose cuDNN has no kernel for them."""
    calls = []

    def step():
        with FakeTensorMode():
            q = torch.empty(2, 417, 16, 88, dtype=torch.bfloat16, device="cuda")
        chosen = dispatch.choose("attention", q)
        calls.append(chosen)
        if chosen == "cudnn":
            raise RuntimeError("No available kernel")

    def clock(call):
        call()
        return SECONDS[calls[-1]]

    monkeypatch.setattr(dispatch, "_HAS_FLASH_ATTN", True)
    monkeypatch.setattr(dispatch, "_NATIVE_ON_CUDA", set())  # a build may have it
    monkeypatch.setattr(dispatch, "_NO_TRITON", {"cuda": None, "cpu": "no"})
    monkeypatch.setattr(tuning, "_clock", lambda device: {"cuda": clock}[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    return step


def test_tuning_on_a_gpu(gpu, monkeypatch):
    gains = tuning.tune(gpu, seconds=0)
    name = f"attention cuda bfloat16 {2 * 417 * 16}x88"
    assert gains == {
        name: {"triton": 1, "reference": 2 / 9, "torch": 2 / 1.5, "flash_attn": 2 / 1.2}
    }
    (machine,) = json.loads(tuning.path().read_text())
    assert machine.startswith("A GPU, torch ")
    key = ("attention", "cuda", torch.bfloat16)
    assert dispatch.tuned(key, 88, 100) == "flash_attn"
    # read when CUDA starts, and on a GPU of the same name alone
    later = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    dispatch.TUNED.clear()
    tuning.load()
    assert not dispatch.TUNED
    (start,) = later
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another")
    start()
    assert not dispatch.TUNED
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    start()
    assert dispatch.tuned(key, 88, 100) == "flash_attn"


def test_a_default_that_fails_is_an_error(gpu, monkeypatch):
    prefer = {"cuda": ("cudnn",)}
    monkeypatch.setitem(dispatch.PREFER, "attention", prefer)
    with pytest.raises(RuntimeError, match="No available kernel"):
        tuning.tune(gpu, seconds=0)
    assert not tuning.path().exists()


TILE = tiles.Knob("attention_forward", 88, torch.bfloat16)
Tile = namedtuple("Tile", "rows step warps stages")
SIZES = {Tile(128, 64, 8, 2): 3.0, Tile(64, 64, 4, 2): 2.0, Tile(512, 512, 8, 4): 1.0}


@pytest.fixture
def tiled(gpu, monkeypatch):
    """A step of one kernel whose last tile has no room; the fastest is another than the default."""
    default, *others = SIZES
    used = []

    def step():
        gpu()
        used.append(tiles.choose(TILE, default, others))
        if used[-1] == (512, 512, 8, 4):
            raise RuntimeError("out of resource: shared memory")

    def clock(call):
        call()
        return SIZES[used[-1]]

    monkeypatch.setattr(dispatch, "PREFER", {"attention": {"cuda": ("triton",)}})
    monkeypatch.setattr(dispatch, "_HAS", {("attention", "triton"): True})
    monkeypatch.setattr(tuning, "_clock", lambda device: clock)
    return step


def test_tiles_are_tried_on_a_gpu(tiled):
    gains = tuning.tune(tiled, seconds=0)
    assert gains["tile attention_forward 88 bfloat16"] == {"128x64x8x2": 1, "64x64x4x2": 1.5}
    assert tiles.CHOSEN == {TILE: (64, 64, 4, 2)}
    (stored,) = json.loads(tuning.path().read_text()).values()
    assert stored["tile attention_forward 88 bfloat16"] == [64, 64, 4, 2]
    tiles.CHOSEN.clear()
    tuning._take("cuda")
    assert tiles.CHOSEN == {TILE: (64, 64, 4, 2)}
    # a second time starts from what was found
    gains = tuning.tune(tiled, seconds=0)
    assert gains["tile attention_forward 88 bfloat16"] == {"128x64x8x2": 2 / 3, "64x64x4x2": 1}
    tuning.forget()
    assert not tiles.CHOSEN


def test_a_tile_of_another_kind_is_passed_over():
    default = Tile(1, 2, 3, 4)
    assert tiles.choose(TILE, default, []) == default
    tiles.CHOSEN[TILE] = (5, 6)
    assert tiles.choose(TILE, default, []) == default
    for name, sizes in (("tile x 8", [1]), ("tile x 8 nothing", [1]), ("tile x 8 float32", ["1"])):
        tuning._take_tile(name, sizes)
    assert list(tiles.CHOSEN) == [TILE]


def test_no_tile_is_tried_on_a_cpu():
    x = torch.ones(2, 16)

    def step():
        tiles.choose(TILE, Tile(1, 2, 3, 4), [Tile(5, 6, 7, 8)])
        return iv2kernels.rms_norm(x, torch.ones(16))

    gains = tuning.tune(step, seconds=0.01, store=False)
    assert list(gains) == [NAME]
