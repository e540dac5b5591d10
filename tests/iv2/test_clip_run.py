"""Runs of the CLIP stage from files to retrieval, embedding and search."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_clip
import torch

from iv2 import cli
from iv2 import train as loop
from iv2.checkpoint import (
    CheckpointError,
    load_training_checkpoint,
    read_weights,
    save_training_checkpoint,
    save_weights,
)
from iv2.config import TrainConfig, from_json, to_json
from iv2.data.clips import read_list
from iv2.data.synthetic import write_toyworld
from iv2.eval.retrieval import cosines, encode_media, encode_texts, evaluate, match_scores
from iv2.models.clip import ClipModelConfig
from iv2.models.llama_text import LlamaTextConfig
from iv2.models.vision import VisionEncoder
from iv2.recipes import RECIPES
from iv2.serve.index import Index, embed, search
from iv2.stages.dual_encoder import load_dual_encoder

RECIPE = RECIPES["clip-tiny"]

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_config(folder, listing, **changes):
    config = replace(
        RECIPE,
        run_dir=str(folder / "run"),
        data=replace(RECIPE.data, path=str(listing), batch_size=3),
        optim=replace(RECIPE.optim, steps=4, warmup_steps=1),
        save_every=2,
        clip=replace(
            RECIPE.clip,
            tokenizer=str(listing.parent),
            vision_init=str(folder / "encoder.safetensors"),
        ),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    # of a stage 1, with twice the frames
    encoder = VisionEncoder(RECIPES["stage1-tiny"].model)
    save_weights(encoder.state_dict(), folder / "encoder.safetensors")
    return folder, write_toyworld(folder / "world", 6, 0, size=56)


@pytest.fixture(scope="module")
def trained(world):
    """A run of four steps, its list, its model as it is in memory, and that before."""
    torch.set_num_threads(1)
    folder, listing = world
    stages, before = [], {}
    build = loop.build_stage

    def keep(*arguments):
        stage, config = build(*arguments)
        load = stage.load_towers

        def load_and_copy():
            report = load()
            before.update({n: t.clone() for n, t in stage.model.state_dict().items()})
            return report

        stage.load_towers = load_and_copy
        stages.append(stage)
        return stage, config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_stage", keep)
        result = loop.run(tiny_config(folder, listing))
    assert result.step == 4
    return folder / "run", listing, stages[0].model, before


def is_trained(name):
    return not name.startswith("vision_encoder.") or "clip_projector" in name


def test_a_run_changes_what_is_trained_and_nothing_else(trained, world):
    run_dir, _, model, before = trained
    encoder = read_weights(world[0] / "encoder.safetensors")
    for name, tensor in model.state_dict().items():
        # these cancel in the softmax, their gradients are zero
        idle = name.endswith(("clip_projector.norm1_k.bias", "cross_attn.k_bias"))
        assert torch.equal(tensor, before[name]) != is_trained(name) or idle, name
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.vision_encoder.state_dict()[name], encoder[name])
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [list(row["losses"]) for row in rows] == [["vision_visual.vtc"]] * 4


def test_a_run_saves_what_is_trained(trained):
    run_dir, _, model, _ = trained
    wanted = {n for n in model.state_dict() if is_trained(n)}
    saved = read_weights(run_dir / "model.safetensors")
    assert set(saved) == wanted
    state = load_training_checkpoint(run_dir / "checkpoints" / "step_00000004.pt")
    assert set(state["model"]) == wanted
    for name in wanted:
        assert torch.equal(saved[name], model.state_dict()[name]), name


def test_a_run_comes_back_whole(trained, world, tmp_path):
    run_dir, _, model, _ = trained
    stage, config = load_dual_encoder(run_dir)
    assert config.stage == "clip"
    assert not stage.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], tensor), name
    # somewhere else, with the encoder's file given by name
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    text = (moved / "config.json").read_text()
    (moved / "config.json").write_text(text.replace(str(world[0]), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match=r"gone/encoder\.safetensors: cannot be read"):
        load_dual_encoder(moved)
    again, _ = load_dual_encoder(moved, vision=world[0] / "encoder.safetensors")
    assert torch.equal(again.model.temp, model.temp)
    without = from_json(run_dir / "config.json")
    without = replace(without, clip=replace(without.clip, vision_init=""))
    (moved / "config.json").write_text(to_json(without))
    with pytest.raises(ValueError, match=r"are missing: .*vision_encoder\.") as error:
        load_dual_encoder(moved)
    assert "clip_projector" not in str(error.value)


def test_a_run_goes_on_as_if_it_had_not_stopped(trained, world):
    run_dir, listing, model, _ = trained
    folder = world[0]
    again = folder / "again"
    shutil.copytree(run_dir, again)
    (again / "checkpoints" / "step_00000004.pt").unlink()
    (again / "model.safetensors").unlink()
    result = loop.run(tiny_config(folder, listing, run_dir=str(again)))
    assert (result.first_step, result.step) == (2, 4)
    saved = read_weights(again / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    (again / "checkpoints" / "step_00000004.pt").unlink()
    config = tiny_config(folder, listing, run_dir=str(again))
    config = replace(config, clip=replace(config.clip, vision_init=""))
    with pytest.raises(ValueError, match=r"nothing must fit the model .* are missing"):
        loop.run(config)


@pytest.mark.parametrize("change", ["temp", "vision_encoder.cls_token"])
def test_a_checkpoint_of_other_weights_is_refused(trained, world, tmp_path, change):
    """One lacks a trained parameter, one has a frozen one."""
    run_dir, listing, model, _ = trained
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    path = again / "checkpoints" / "step_00000004.pt"
    state = load_training_checkpoint(path)
    if state["model"].pop(change, None) is None:
        state["model"][change] = model.state_dict()[change]
    save_training_checkpoint(path, state)
    with pytest.raises(ValueError, match=rf"weights must equal that of .*, got {change}"):
        loop.run(tiny_config(world[0], listing, run_dir=str(again)))


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_a_run_in_less_precision(trained, world, precision):
    folder, listing = world
    run_dir = folder / precision
    config = tiny_config(folder, listing, run_dir=str(run_dir), precision=precision)
    result = loop.run(replace(config, optim=replace(config.optim, steps=1)))
    exact = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[0])["losses"]
    assert result.losses == pytest.approx(exact, rel=0.05)
    saved = read_weights(run_dir / "model.safetensors")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {t.dtype for t in saved.values()} == {dtype}
    stage, _ = load_dual_encoder(run_dir)
    assert stage.model.temp.dtype == torch.float32


def test_the_encoder_of_a_run_of_stage_2_serves(world, tmp_path):
    """stage2-tiny writes a whole model: the encoder and its pooling head are taken, no more."""
    folder, listing = world
    torch.manual_seed(2)
    recipe = RECIPES["stage2-tiny"]
    from iv2.models.stage2 import Stage2Model

    stage2 = Stage2Model(recipe.model, recipe.text, None, recipe.stage2.joint)
    save_weights(stage2.state_dict(), tmp_path / "model.safetensors")
    config = tiny_config(folder, listing)
    config = replace(
        config, clip=replace(config.clip, vision_init=str(tmp_path / "model.safetensors"))
    )
    stage, _ = loop.build_stage(config, [])
    stage.load_towers()
    for name, tensor in stage2.vision_encoder.state_dict().items():
        assert torch.equal(stage.model.vision_encoder.state_dict()[name], tensor), name
    assert stage.model.temp.item() == pytest.approx(0.07)


def test_a_run_with_a_language_model(world, tmp_path):
    """Its LoRA and projections are trained; its folder and the encoder's file hold the rest."""
    folder, listing = world
    source = tiny_clip.write_language_model(tmp_path / "llama")
    clip = replace(
        tiny_config(folder, listing).clip,
        joint=ClipModelConfig(llama=LlamaTextConfig(out_dim=128, lora_rank=2)),
        tokenizer=str(source),
        text_init=str(source),
        max_tokens=80,
        trained=("*.lora_?.*", "*.text_projection", "vision_encoder.clip_projector", "temp"),
    )
    config = tiny_config(folder, listing, run_dir=str(tmp_path / "run"), clip=clip)
    loop.run(config)
    saved = read_weights(tmp_path / "run" / "model.safetensors")
    assert sum("lora_" in name for name in saved) == 2 * 2 * 2
    parts = ("lora_", "text_projection", "clip_projector", "temp")
    assert all(any(part in name for part in parts) for name in saved)
    ups = [name for name in saved if ".lora_B." in name]
    assert all(saved[name].abs().max() > 0 for name in ups)  # they begin at zero
    stage, loaded = load_dual_encoder(tmp_path / "run")
    assert loaded.stage == "clip"
    state, given = stage.model.state_dict(), read_weights(source / "model.safetensors")
    name = "layers.1.self_attn.q_proj"
    frozen = state[f"text_encoder.transformer.{name}.base_layer.weight"]
    assert torch.equal(frozen, given[f"model.{name}.weight"])
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    features = encode_texts(stage, ["red bar", "green cross"]).features
    assert features.shape == (2, 128)


# ---- evaluation


def test_features_are_those_of_the_model(trained):
    run_dir, listing, _, _ = trained
    stage, config = load_dual_encoder(run_dir)
    table = evaluate(stage, config, listing, k=128)
    assert set(table["scores"]) == {"sim", "dsl"}
    assert table["clips"] == 6
    from iv2.eval.features import ordered_batches

    samples = read_list(listing, "video")
    batches = list(ordered_batches(samples, config.data.clip, 3, crop="whole"))
    media = encode_media(stage, batches)
    texts = encode_texts(stage, ["A red bar, moving.", "a blue cross"])
    with torch.no_grad():
        v = stage.model.encode_video(torch.cat([b["video"] for b in batches]))
        t = stage.model.encode_text(stage.tokenizer.encode(["a red bar moving", "a blue cross"]))
    torch.testing.assert_close(cosines(media, texts), v @ t.T)
    with pytest.raises(ValueError, match="media and texts must keep tokens, got features alone"):
        match_scores(stage, media, texts)
    with pytest.raises(ValueError, match="media must be vision, got audio"):
        encode_media(stage, batches, "audio")


def test_embed_and_search(trained, tmp_path):
    run_dir, listing, _, _ = trained
    stage, config = load_dual_encoder(run_dir)
    index = embed(stage, listing, config.data.clip, seconds=1.0)
    assert len(index.segments) == 12
    torch.testing.assert_close(index.features.norm(dim=1), torch.ones(12))
    index.save(tmp_path / "i.safetensors")
    found = search(stage, Index.load(tmp_path / "i.safetensors"), "a red bar moving left", top=3)
    query = encode_texts(stage, ["a red bar moving left"]).features
    best = (index.features @ query.T)[:, 0].sort(descending=True)
    assert [row["score"] for row in found] == pytest.approx(best.values[:3].tolist())
    assert [row["path"] for row in found] == [index.segments[i].path for i in best.indices[:3]]


def test_from_the_command_line(trained, tmp_path, capsys):
    run_dir, listing, _, _ = trained
    index, table, flags = tmp_path / "i.safetensors", tmp_path / "t.json", ["--run", str(run_dir)]
    cli.main(["embed", str(listing), "--out", str(index), *flags])
    assert "6 segments, 0 videos skipped" in capsys.readouterr().out
    cli.main(["search", "a bar", "--index", str(index), *flags, "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 5
    cli.main(["eval", "retrieval", "--data", str(listing), "--json", str(table), *flags])
    assert "vision and visual captions: 6 clips" in capsys.readouterr().out
    assert set(json.loads(table.read_text())["scores"]) == {"sim", "dsl"}
    cli.main(["eval", "zero-shot", "--data", str(listing), "--attribute", "shape", *flags])
    assert "shape: 6 clips, 4 classes, top-1" in capsys.readouterr().out
    by_recipe = ["--recipe", "clip-tiny", "--weights", str(run_dir / "model.safetensors")]
    by_recipe += [
        "--tokenizer",
        str(run_dir),
        "--vision",
        str(run_dir.parent / "encoder.safetensors"),
    ]
    cli.main(["search", "a bar", "--index", str(index), *by_recipe, "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 5
    with pytest.raises(SystemExit, match="run must be given, or recipe and weights, got neither"):
        cli.main(["search", "a bar", "--index", str(index)])
    with pytest.raises(SystemExit, match="sound must be configured for audio"):
        cli.main(["embed", str(listing), "--out", str(index), "--media", "audio", *flags])


def test_other_runs_are_refused(world, tmp_path):
    (tmp_path / "config.json").write_text(to_json(TrainConfig()))
    with pytest.raises(ValueError, match="run must be of stage2 or clip, got stage1"):
        load_dual_encoder(tmp_path)
    (tmp_path / "config.json").write_text(to_json(RECIPES["stage2-tiny"]))
    with pytest.raises(ValueError, match="vision and text must be empty for a stage 2"):
        load_dual_encoder(tmp_path, vision=tmp_path)
    folder, listing = world
    config = tiny_config(folder, listing, run_dir=str(tmp_path / "r"), init="a.pt")
    with pytest.raises(ValueError, match=r"init must be empty for stage clip, .*, got a\.pt"):
        loop.run(config)


# ---- ranks


def start(run_dir, ranks, **flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(tiny_clip.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, tiny_clip.__file__, str(run_dir), json.dumps(flags)],
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


def losses_of(run_dir):
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"]["vision_visual.vtc"] for line in lines]


def test_two_ranks_train_to_the_losses_of_one(tmp_path):
    runs = {"one": {}, "gather": {}, "ring": {"gather": "ring"}}
    for name, flags in runs.items():
        for process in start(tmp_path / name, 1 if name == "one" else 2, **flags):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    one = losses_of(tmp_path / "one")
    assert len(one) == 4
    assert losses_of(tmp_path / "gather") == pytest.approx(one, rel=2e-4)
    assert losses_of(tmp_path / "ring") == pytest.approx(one, rel=2e-4)
    assert one[0] != pytest.approx(one[3], rel=1e-3)  # it has learnt something
