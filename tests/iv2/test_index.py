from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from media import write_broken

from iv2 import cli
from iv2.checkpoint import CheckpointError
from iv2.config import DataConfig, Stage2Config, TrainConfig
from iv2.data.clips import Sample, read_list
from iv2.data.synthetic import write_toyworld
from iv2.eval.features import ordered_batches
from iv2.eval.retrieval import encode_media, encode_texts, evaluate, retrieval
from iv2.models.stage2 import Stage2ModelConfig
from iv2.recipes import RECIPES
from iv2.serve.index import Index, Segment, cut, embed, search
from iv2.stages.stage2 import load_stage2
from iv2.train import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of one step, and its list."""
    folder = tmp_path_factory.mktemp("stage2")
    listing = write_toyworld(folder / "world", 6, 0, size=56)
    recipe = RECIPES["stage2-tiny-av"]
    pairings = tuple(p for p in recipe.stage2.pairings if p.caption in ("visual", "audio"))
    config = replace(
        recipe,
        run_dir=str(folder / "run"),
        data=replace(recipe.data, path=str(listing), batch_size=3, cache_bytes=0),
        optim=replace(recipe.optim, steps=1, warmup_steps=1),
        stage2=replace(recipe.stage2, pairings=pairings, tokenizer=str(listing.parent)),
    )
    run(config)
    return folder / "run", listing


def test_segments_are_equal_and_cover_the_video(trained, tmp_path) -> None:
    _, listing = trained
    path = read_list(listing)[0].path  # two seconds
    segments, broken = cut([Sample(path), Sample(path, 0.5, 1.0)], 0.7)
    times = [(s.start, s.end) for s in segments]
    for found, expected in zip(times, [(0, 2 / 3), (2 / 3, 4 / 3), (4 / 3, 2)], strict=False):
        assert found == pytest.approx(expected)
    assert times[3:] == [(0.5, 1.0)]
    assert broken == {}
    bad = write_broken(tmp_path)
    _, broken = cut([Sample(str(p)) for p in bad.values()], 1.0)
    assert broken


def test_embed_and_search(trained, tmp_path) -> None:
    run_dir, listing = trained
    stage, config = load_stage2(run_dir)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    rows = [{"path": s.path} for s in read_list(listing)[:3]] + [{"path": str(bad)}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    index = embed(stage, tmp_path / "l.jsonl", config.data.clip, seconds=1.0)
    assert len(index.segments) == 6
    assert list(index.skipped) == [str(bad)]
    torch.testing.assert_close(index.features.norm(dim=1), torch.ones(6))
    index.save(tmp_path / "i.safetensors")
    again = Index.load(tmp_path / "i.safetensors")
    assert again.segments == index.segments
    assert again.skipped == index.skipped
    found = search(stage, again, "a red bar moving left", top=4)
    assert len(found) == 4
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    whole = search(stage, again, "a red bar moving left", top=99)
    assert {(r["path"], r["start"]) for r in whole} == {(s.path, s.start) for s in index.segments}
    with_sound = embed(stage, rows[0]["path"], config.data.clip, media="audio_video")
    assert len(with_sound.segments) == 1


def test_index_errors(trained, tmp_path) -> None:
    run_dir, _ = trained
    stage, config = load_stage2(run_dir)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="source must hold videos that can be read, got"):
        embed(stage, tmp_path, config.data.clip)
    with pytest.raises(CheckpointError, match="is no index of iv2 embed"):
        Index.load(tmp_path / "bad.mp4")
    narrow = Index(torch.ones(1, 7), [Segment("a", 0, 1)], {})
    with pytest.raises(ValueError, match="index must be of width 128 like the model, got 7"):
        search(stage, narrow, "a")


def test_from_the_command_line(trained, tmp_path, capsys) -> None:
    run_dir, listing = trained
    index, sheet, table = tmp_path / "i.safetensors", tmp_path / "s.png", tmp_path / "t.json"
    flags = ["--run", str(run_dir)]
    cli.main(["embed", str(listing), "--out", str(index), *flags])
    assert "6 segments, 0 videos skipped" in capsys.readouterr().out
    cli.main(["search", "a bar", "--index", str(index), "--sheet", str(sheet), *flags, "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 5
    assert sheet.read_bytes().startswith(b"\x89PNG")
    data = ["--data", str(listing), "--json", str(table), "--k", "3"]
    cli.main(["eval", "retrieval", *data, "--media", "audio_video", "--caption", "av", *flags])
    assert "audio_video and av captions: 6 clips" in capsys.readouterr().out
    assert set(json.loads(table.read_text())["scores"]) == {"sim", "dsl", "match"}
    with pytest.raises(SystemExit, match=r"captions must have the kind speech: .*000000.mp4"):
        cli.main(["eval", "retrieval", *data, "--caption", "speech", *flags])
    shape = ["eval", "zero-shot", "--data", str(listing), "--attribute"]
    cli.main([*shape, "shape", *flags])
    assert "shape: 6 clips, 4 classes, top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"age must be given for each clip: .*000000.mp4"):
        cli.main([*shape, "age", *flags])
    with pytest.raises(SystemExit, match=r"template must have \{\} for the class, got 'a shape'"):
        cli.main([*shape, "shape", *flags, "--templates", "a shape"])
    with pytest.raises(
        SystemExit, match=r"what must be one of retrieval, zero-shot, .*got nothing"
    ):
        cli.main(["eval"])
    with pytest.raises(SystemExit, match="run must be given, or recipe and weights, got neither"):
        cli.main(["search", "a bar", "--index", str(index)])


def test_several_wordings(trained, tmp_path) -> None:
    """All captions of a clip are right for it; a paragraph is one query."""
    run_dir, listing = trained
    paths = [sample.path for sample in read_list(listing)[:3]]
    told = [["a red bar", "a bar"], ["a blue cross", "a red bar"], "a green corner"]
    rows = [{"path": path, "caption": x} for path, x in zip(paths, told, strict=True)]
    data = tmp_path / "l.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage, config = load_stage2(run_dir)
    tables = {
        wordings: evaluate(stage, config, data, wordings=wordings, k=2)
        for wordings in ("first", "all", "paragraph")
    }
    assert {w: t["captions"] for w, t in tables.items()} == {"first": 3, "all": 5, "paragraph": 3}
    assert all(t["clips"] == t["different"] == 3 for t in tables.values())
    # by hand
    media = encode_media(stage, ordered_batches(read_list(data), config.data.clip, 3, crop="whole"))
    for wordings, sentences, owners in (
        ("all", [*told[0], *told[1], told[2]], [0, 0, 1, 1, 2]),
        ("paragraph", [" ".join(told[0]), " ".join(told[1]), told[2]], [0, 1, 2]),
    ):
        texts = encode_texts(stage, sentences)
        expected = retrieval(stage, media, texts, torch.arange(3), torch.tensor(owners), k=2)
        assert tables[wordings]["scores"] == expected


def test_ranks_share_the_work(trained, tmp_path) -> None:
    run_dir, listing = trained
    flags = ["--data", listing, "--media", "audio_video", "--caption", "av", "--k", "3"]
    command = ["eval", "retrieval", *flags, "--run", run_dir, "--json"]
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--standalone",
        "-m",
        "--",
        "iv2",
    ]
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    cli.main([*map(str, command), str(alone)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launch, *map(str, command), str(shared)],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert json.loads(shared.read_text()) == json.loads(alone.read_text())


def test_stage_1_hands_over_to_fewer_frames(trained, tmp_path) -> None:
    """Tables of 16 frames become those of 8, and towers start from their own files."""
    from iv2.checkpoint import save_weights
    from iv2.models.vision import VisionEncoder
    from iv2.stages.stage2 import build_stage2

    _, listing = trained
    torch.manual_seed(1)
    student = VisionEncoder(RECIPES["stage1-tiny"].model)
    save_weights(student.state_dict(), tmp_path / "stage1.safetensors")
    recipe = RECIPES["stage2-tiny"]
    config = Stage2Config(
        joint=Stage2ModelConfig(embed_dim=16, fusion_dim=16),
        tokenizer=str(listing.parent),
        vision_init=str(tmp_path / "stage1.safetensors"),
    )
    stage = build_stage2(recipe.model, recipe.text, None, config)
    stage.load_towers()
    vision = stage.model.vision_encoder
    assert torch.equal(vision.blocks[0].attn.qkv.weight, student.blocks[0].attn.qkv.weight)
    assert student.pos_embed.shape[1] == 1 + 8 * 16
    assert vision.pos_embed.shape[1] == 1 + 4 * 16


def test_a_run_of_another_stage_is_refused(tmp_path) -> None:
    from iv2.config import to_json

    (tmp_path / "config.json").write_text(to_json(TrainConfig(data=DataConfig())))
    with pytest.raises(ValueError, match="run must be of stage2, got stage1"):
        load_stage2(tmp_path)
