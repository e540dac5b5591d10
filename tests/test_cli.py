from __future__ import annotations

import json

import pytest
import torch

from iv2 import cli
from iv2.checkpoint import read_weights


def test_info_says_what_runs(capsys):
    cli.main(["info", "--json"])
    page = json.loads(capsys.readouterr().out)
    assert page["ops"]["attention"]["uses"] == "native"
    assert page["native"]["isa"] in page["native"]["isa_available"]
    assert page["decoders"]["pyav"] is True
    cli.main(["info"])
    assert "cpu kernels" in capsys.readouterr().out


def test_usage_and_unknown_names(capsys):
    cli.main([])
    assert "toyworld" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="command must be one of info, toyworld"):
        cli.main(["fly"])
    with pytest.raises(SystemExit, match="recipe must be one of stage1-1b, stage1-6b"):
        cli.main(["train", "stage9"])
    with pytest.raises(SystemExit, match="stage must be one of 1, 2, 3, got 4"):
        cli.main(["learn", "--stage", "4"])


def test_convert(tmp_path, capsys):
    torch.save({"module": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")])
    assert torch.equal(read_weights(tmp_path / "a.safetensors")["a"], torch.ones(2))
    with pytest.raises(SystemExit, match=r"none\.pth"):
        cli.main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "b.safetensors")])


def test_toyworld_with_questions(tmp_path, capsys):
    out = tmp_path / "toy"
    small = ["--num", "2", "--size", "16", "--num-frames", "2"]
    cli.main(["toyworld", str(out), "--questions", *small])
    assert capsys.readouterr().out.strip() == str(out / "list.jsonl")
    rows = [json.loads(line) for line in (out / "instructions.jsonl").read_text().splitlines()]
    assert {row["messages"][0]["role"] for row in rows} == {"user"}
    assert {row["path"] for row in rows} == {"videos/000000.mp4", "videos/000001.mp4"}
    assert (out / "held-out.jsonl").exists()
    with pytest.raises(SystemExit, match="scenes must be 0 with questions, got 1"):
        cli.main(["toyworld", str(out), "--questions", "--scenes", "1", *small])


def test_toyworld_and_training_on_a_folder_with_broken_files(tmp_path, capsys):
    out = tmp_path / "toy"
    cli.main(["toyworld", str(out), "--num", "12"])
    for kind in ("image", "video"):
        name = f"teacher-{kind}-tiny"
        flags = ["--optim.steps", "1", "--data.batch-size", "4", "--data.num-workers", "0"]
        run = ["train", name, "--data.path", str(out / "list.jsonl"), *flags]
        cli.main([*run, "--run-dir", str(tmp_path / name)])
    (out / "videos" / "words.mp4").write_text("not a video")
    flags += ["--stage1.clip-teacher-path", str(tmp_path / "teacher-image-tiny/model.safetensors")]
    flags += ["--stage1.mae-teacher-path", str(tmp_path / "teacher-video-tiny/model.safetensors")]
    flags += ["--optim.steps", "4", "--run-dir", str(tmp_path / "run")]
    cli.main(["train", "stage1-tiny", "--data.path", str(out / "videos"), *flags])
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]["losses"]) == {"clip", "clip_pooled", "mae"}
    skipped = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "words.mp4" in skipped
