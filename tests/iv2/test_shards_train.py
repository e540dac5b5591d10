"""Stage 1 from a folder of shards, killed twice: the run goes on as if it had never stopped."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from tiny_run import rows

from iv2.checkpoint import load_training_checkpoint, read_weights, save_weights
from iv2.data.proxy import ProxyConfig
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.synthetic import write_toyworld
from iv2.models.teachers import build_teacher
from iv2.run_folder import latest_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 8
# `iv2 train` that is killed right after the line of a step is in the log; 0: never.
PROGRAM = """
import os, signal, sys
from iv2 import cli, run_folder

write, last = run_folder.Log.write, int(sys.argv[1])

def deadly(log, row):
    write(log, row)
    if row["step"] == last:
        os.kill(os.getpid(), signal.SIGKILL)

run_folder.Log.write = deadly
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of ten clips, of which one was damaged since; and two teachers."""
    folder = tmp_path_factory.mktemp("world")
    listing = write_toyworld(folder / "toy", 10, 3, size=48, num_frames=16)
    write_shards(listing, folder / "shards", ShardConfig(4, ProxyConfig(size=48, gop=4)))
    damage(folder / "shards" / "video-000001.tar")
    torch.manual_seed(1)
    for name in ("teacher-image-tiny", "teacher-video-tiny"):
        save_weights(build_teacher(name).state_dict(), folder / f"{name}.safetensors")
    return folder


def damage(tar: Path) -> None:
    """Zeros in place of the second member."""
    with tarfile.open(tar) as members:
        member = members.getmembers()[1]
    content = io.BytesIO(tar.read_bytes())
    content.seek(member.offset_data)
    content.write(bytes(member.size))
    tar.write_bytes(content.getvalue())


def start(folder: Path, run_dir: Path, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = ["train", "stage1-tiny", "--run-dir", run_dir, "--device", "cpu"]
    arguments += ["--data.path", folder / "shards", "--data.batch-size", 3]
    arguments += ["--data.num-workers", 2, "--data.cache-bytes", 0]
    arguments += ["--data.clip.crop.kind", "resized", "--data.clip.crop.flip", 0.5]
    arguments += ["--data.max-bad-fraction", 0.2, "--save-every", 2, "--optim.steps", STEPS]
    arguments += ["--optim.warmup-steps", 1, "--stage1.teacher-cache-bytes", 0]
    for kind, name in (("clip", "image"), ("mae", "video")):
        path = folder / f"teacher-{name}-tiny.safetensors"
        arguments += [f"--stage1.{kind}-teacher-path", path]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(kill_at), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_run_from_shards_killed_twice_is_an_unbroken_one(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(folder, whole)
    assert done.returncode == 0, done.stderr
    for step, checkpoint in ((3, 2), (7, 6)):  # a line more than the checkpoint has
        done = start(folder, killed, kill_at=step)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [row["step"] for row in rows(killed)] == list(range(1, step + 1))
        assert latest_checkpoint(killed).stem == f"step_{checkpoint:08d}"
    done = start(folder, killed)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert rows(killed) == rows(whole)
    skipped = [(run / "skipped.jsonl").read_text() for run in (whole, killed)]
    assert "video-000001.tar/000000005.mp4" in skipped[0]
    assert skipped[0] == skipped[1]
    weights = [read_weights(run / "model.safetensors") for run in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    states = [load_training_checkpoint(latest_checkpoint(run)) for run in (whole, killed)]
    (left,), (other,) = ([rank["data"] for rank in state["ranks"]] for state in states)
    assert left == other
    assert left["position"] == 3 * STEPS
