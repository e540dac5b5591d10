from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import RandomBatches, rows, stage1, tiny_config

from iv2 import checkpoint
from iv2.checkpoint import CheckpointError, load_checkpoint, load_training_checkpoint, read_weights
from iv2.config import from_json
from iv2.data.synthetic import write_toyworld
from iv2.models.vision import VisionEncoder
from iv2.recipes import RECIPES
from iv2.run_folder import Log, Progress, checkpoints, latest_checkpoint, read_log
from iv2.train import NonFiniteLossError, run, train

pytestmark = pytest.mark.usefixtures("one_thread")


ROOT = Path(tiny_run.__file__).parents[2]


def start(run_dir, ranks=0, **flags):
    """The program of tiny_run, alone or in several processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, tiny_run.__file__, str(run_dir), json.dumps(flags)]
    return [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(1, ranks))
    ]


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize("muon_lr_scale", [0.0, 1.0])
def test_killed_run_goes_on_bitwise(tmp_path, muon_lr_scale):
    flags = {"precision": "bfloat16", "muon_lr_scale": muon_lr_scale}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = start(straight, **flags)
    part = start(killed, kill_at=5, **flags)  # after a checkpoint at 4, and a line more
    finish(whole)
    part[0].communicate(timeout=120)
    assert part[0].returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss')  # torn by the kill
    finish(start(killed, **flags))
    assert rows(killed) == rows(straight)
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5, 6]
    ends = [load_training_checkpoint(latest_checkpoint(d)) for d in (straight, killed)]
    assert_same(*(end | {"config": None} for end in ends))
    moments = ends[0]["optimizer"]["moments"]["blocks.0.attn.qkv.weight"]
    assert ("momentum" in moments) == (muon_lr_scale > 0)
    assert_same(*(read_weights(d / "model.safetensors") for d in (straight, killed)))


def assert_same(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("muon_lr_scale", [0.0, 1.0])
def test_two_processes_equal_one(tmp_path, muon_lr_scale):
    accumulate = 2  # the first backward of a step stays local, the second one is averaged
    flags = {"steps": 4, "muon_lr_scale": muon_lr_scale}
    # A step is cut into micro-batches after it is cut into ranks, so the whole of it is the same.
    size = 4 // accumulate
    two = start(tmp_path / "two", ranks=2, batch_size=size, accumulate=accumulate, **flags)
    train(stage1(), RandomBatches(8), tiny_config(tmp_path / "one", **flags))
    finish(two)
    for one, both in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["losses"] == pytest.approx(both["losses"], rel=2e-5)
        assert one["grad_norm"] == pytest.approx(both["grad_norm"], rel=2e-4)
        assert one["epoch"] == both["epoch"]
    one, both = (read_weights(tmp_path / d / "model.safetensors") for d in ("one", "two"))
    for name in one:
        # AdamW divides by the root of tiny second moments, so a last bit can become a small step.
        torch.testing.assert_close(one[name], both[name], rtol=1e-3, atol=2e-4)


def test_log_and_folder(tmp_path):
    config = replace(tiny_config(tmp_path / "run"), keep_checkpoints=2)
    result = train(stage1(), RandomBatches(4), config)
    found = read_log(config.run_dir)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[0]["lr"] == 0
    assert found[1]["lr"] == 1e-2
    last = found[-1]
    assert last["loss"] == pytest.approx(sum(last["losses"].values()))
    assert last["losses"] == result.losses
    assert last["losses"].keys() == {"clip", "clip_pooled", "mae"}
    assert last["epoch"] == 6 * 4 / 32
    assert last["samples_per_s"] > 0
    assert last["data_s"] > 0
    assert found[-1]["loss"] < found[0]["loss"]
    assert sorted(p.name for p in checkpoints(config.run_dir)) == [
        "step_00000004.pt",
        "step_00000006.pt",
    ]
    assert from_json(tmp_path / "run" / "config.json") == config
    student = VisionEncoder(stage1().student.config)
    report = load_checkpoint(student, latest_checkpoint(config.run_dir))
    assert not report.missing
    assert not report.unexpected
    again = train(stage1(), RandomBatches(4), config)
    assert (again.first_step, again.step, again.losses) == (6, 6, {})


def test_loss_weights_count(tmp_path):
    config = tiny_config(tmp_path, steps=1)
    stage = stage1(replace(config.stage1, mask_ratio=0.5, mae_weight=3.0, clip_weight=0.5))
    losses = train(stage, RandomBatches(4), config).losses
    expected = 0.5 * losses["clip"] + losses["clip_pooled"] + 3 * losses["mae"]
    assert rows(tmp_path)[0]["loss"] == pytest.approx(expected)


def test_accumulation_equals_one_batch(tmp_path):
    train(stage1(), RandomBatches(8), tiny_config(tmp_path / "one"))
    train(stage1(), RandomBatches(2), tiny_config(tmp_path / "four", accumulate=4))
    for one, four in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        assert one["losses"] == pytest.approx(four["losses"], rel=2e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=2e-4)


def test_learning_rate_follows_the_global_batch(tmp_path):
    train(stage1(), RandomBatches(4), tiny_config(tmp_path, lr_batch=16, accumulate=2, steps=2))
    assert rows(tmp_path)[1]["lr"] == 1e-2 * 8 / 16


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_precisions_learn(tmp_path, precision):
    config = replace(tiny_config(tmp_path, steps=20, lr=3e-3), precision=precision, save_every=99)
    stage = stage1()
    train(stage, RandomBatches(4), config)
    found = rows(tmp_path)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    dtypes = {p.dtype for p in stage.student.parameters()}
    assert dtypes == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


def test_default_and_reference_curves_agree(tmp_path):
    import iv2kernels

    config = tiny_config(tmp_path / "default", steps=20, lr=3e-3)
    train(stage1(), RandomBatches(4), config)
    with iv2kernels.use("reference"):
        train(stage1(), RandomBatches(4), replace(config, run_dir=str(tmp_path / "reference")))
    pairs = zip(rows(tmp_path / "default"), rows(tmp_path / "reference"), strict=True)
    for default, reference in pairs:
        assert default["loss"] == pytest.approx(reference["loss"], rel=2e-2)


def test_nan_names_the_clips(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(NonFiniteLossError) as caught:
        train(stage1(), RandomBatches(4, bad=14), config)
    message = str(caught.value)
    assert "loss must be finite, got clip nan" in message
    assert "at step 4" in message
    assert "clip12.mp4 seed 1012; clip13.mp4 seed 1013; clip14.mp4 seed 1014" in message
    content = json.loads((tmp_path / "nonfinite.json").read_text())
    assert content["step"] == 4
    assert content["clips"][2] == {"path": "clip14.mp4", "seed": 1014}
    weights = load_training_checkpoint(latest_checkpoint(tmp_path))["model"]
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_nan_stops_all_processes(tmp_path):
    processes = start(tmp_path, ranks=2, batch_size=2, bad=6)  # in the part of rank 1
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes)
    for error in errors:
        assert "NonFiniteLossError" in error
        assert "clip6.mp4 seed 1006" in error


def test_another_configuration_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    train(stage1(), RandomBatches(4), replace(config, optim=replace(config.optim, steps=2)))
    with pytest.raises(
        ValueError,
        match="configuration must equal that of .*step_00000002.pt, got "
        r"optim.steps 6 \(there 2\); take another run_dir",
    ):
        train(stage1(), RandomBatches(4), config)


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path):
    """From 2 to 1, with twice the batch, and back; the parts of a step are those of its end."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(start(whole, ranks=2, batch_size=2))
    stopped = start(moved, ranks=2, batch_size=2, kill_at=6)  # after the checkpoint at 2
    for process in stopped:
        process.communicate(timeout=120)
    for path in checkpoints(moved):
        if path.stem != "step_00000002":
            path.unlink()
    stopped = start(moved, batch_size=4, kill_at=5)  # after the checkpoint at 4
    stopped[0].communicate(timeout=120)
    assert latest_checkpoint(moved).stem == "step_00000004"
    finish(start(moved, ranks=2, batch_size=2))
    assert len(rows(whole)) == 6
    for one, other in zip(rows(whole), rows(moved), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert one["epoch"] == other["epoch"]


def test_another_number_of_samples_a_step_is_refused(tmp_path):
    train(stage1(), RandomBatches(4), tiny_config(tmp_path))
    path = latest_checkpoint(tmp_path)
    state = load_training_checkpoint(path)
    checkpoint.save_training_checkpoint(path, state | {"ranks": state["ranks"] * 3})
    train(stage1(), RandomBatches(4), tiny_config(tmp_path))  # 4 of one process, as of three
    with pytest.raises(
        ValueError,
        match="samples of a step must equal that of .*, "
        r"got 6 with 1 processes \(there 4 with 3\)",
    ):
        train(stage1(), RandomBatches(6), tiny_config(tmp_path))


def test_broken_checkpoint_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step_00000002.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"step_00000002\.pt: cannot be read"):
        train(stage1(), RandomBatches(4), tiny_config(tmp_path))
    checkpoint.save_training_checkpoint(folder / "step_00000004.pt", {"model": {}})
    with pytest.raises(CheckpointError, match=r"step_00000004\.pt: is no checkpoint of a run"):
        train(stage1(), RandomBatches(4), tiny_config(tmp_path))


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    config = replace(tiny_config(tmp_path), keep_checkpoints=1)
    train(stage1(), RandomBatches(4), config)  # what an undisturbed run leaves
    straight = rows(tmp_path)
    config = replace(config, run_dir=str(tmp_path / "full"))
    real = torch.save
    calls = 0

    def full(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(arguments[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step_00000004\.pt: .*No space left on device"):
        train(stage1(), RandomBatches(4), config)
    folder = Path(config.run_dir) / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000002.pt"]
    monkeypatch.undo()
    train(stage1(), RandomBatches(4), config)
    assert rows(config.run_dir) == straight


def test_full_disk_of_the_log(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log._file.close()
    log._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
        log.write({"step": 1})
    with pytest.raises(OSError, match="No space left on device"):
        log._file.close()


def test_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        train(stage1(), RandomBatches(4), tiny_config(tmp_path / "file" / "run"))


def test_progress_is_for_terminals(capsys, monkeypatch):
    row = {"step": 1, "step_s": 0.5, "data_s": 0.1, "loss": 1.0, "lr": 1e-3, "samples_per_s": 3.0}
    with Progress(2, enabled=True) as progress:
        progress.show(row)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(2, enabled=True) as progress:
        progress.show(row)
    assert "1/2  loss 1.0000  lr 1.00e-03  3.0 samples/s  data 20%" in capsys.readouterr().err


def tiny_recipe(name, tmp_path, world):
    config = RECIPES[name]
    return replace(
        config,
        run_dir=str(tmp_path / name),
        data=replace(config.data, path=str(world), batch_size=4, num_workers=0, cache_bytes=0),
        optim=replace(config.optim, steps=2, warmup_steps=1),
    )


def test_recipes_from_files_to_student(tmp_path):
    """The tiny teachers, then stage 1 with them, on real files of which some are broken."""
    world = tmp_path / "toy"
    listing = write_toyworld(world, 12, 0, size=56, num_frames=16, workers=1)
    for name in ("teacher-image-tiny", "teacher-video-tiny"):
        config = tiny_recipe(name, tmp_path, listing)
        result = run(config)
        assert result.step == 2
        state = load_training_checkpoint(latest_checkpoint(config.run_dir))
        assert set(config.finetune.attributes) == state["stage"]["classes"].keys()
    (world / "broken.mp4").write_text("no video")
    (world / "empty.mp4").write_bytes(b"")
    config = tiny_recipe("stage1-tiny", tmp_path, world)  # the folder this time
    config = replace(
        config,
        data=replace(config.data, batch_size=14, max_bad_fraction=0.5),
        stage1=replace(
            config.stage1,
            clip_teacher_path=str(tmp_path / "teacher-image-tiny" / "model.safetensors"),
            mae_teacher_path=str(tmp_path / "teacher-video-tiny" / "model.safetensors"),
        ),
    )
    run(config)
    lines = (tmp_path / "stage1-tiny" / "skipped.jsonl").read_text().splitlines()
    skipped = {Path(row["path"]).name: row["reason"] for row in map(json.loads, lines)}
    assert skipped.keys() == {"broken.mp4", "empty.mp4"}
    assert all(skipped.values())
    stored = from_json(tmp_path / "stage1-tiny" / "config.json")
    assert stored.model.clip_return_layer == 2
    assert stored.model.mae_return_layer == 4
    # From these weights; the heads are other ones.
    supervised = tiny_recipe("supervised-tiny", tmp_path, listing)
    supervised = replace(
        supervised,
        init=str(latest_checkpoint(config.run_dir)),
        init_allow_missing=("fc_norm.*", "head.*"),
        model=replace(supervised.model, num_frames=8),
    )
    assert run(supervised).losses.keys() == {"motion", "colour", "background", "shape"}


def test_data_must_be_given():
    with pytest.raises(ValueError, match=r"data\.path must be a folder of videos or a list"):
        run(RECIPES["stage1-tiny"])
