"""Runs of stage 3 from files to answers: what changes, what is saved, resuming, generation, CLI."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_stage2 import VISION, write_vocabulary
from tiny_stage3 import CONFIG, QFORMER_TINY, batch_of, said, tiny_stage, write_language_model

from iv2 import cli
from iv2 import train as loop
from iv2.checkpoint import load_training_checkpoint, read_weights, save_weights
from iv2.config import DataConfig, OptimConfig, Stage3Config, TrainConfig
from iv2.data.dataset import ClipConfig
from iv2.data.decode import Video
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig
from iv2.models.language import LanguageConfig, base
from iv2.models.vision import VisionEncoder
from iv2.recipes import RECIPES
from iv2.serve.chat import VideoChat, dialogue
from iv2.stages.stage3 import load_stage3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six clips with conversations, an encoder's file, and a language model's folder."""
    folder = tmp_path_factory.mktemp("stage3")
    listing = write_toyworld(folder / "world", 6, 0, size=28, num_frames=8)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    asked = listing.parent / "asked.jsonl"
    with asked.open("w") as file:
        for row in rows:
            shape, colour = row["attributes"]["shape"], row["attributes"]["colour"]
            messages = said("what is it", shape, "of what colour", f"it is {colour}")
            file.write(json.dumps({"path": row["path"], "kind": "video", "messages": messages}))
            file.write("\n")
    texts = listing.parent / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"kind": "text", "messages": said("a", w)}) + "\n" for w in "bcde")
    )
    torch.manual_seed(1)
    save_weights(VisionEncoder(VISION).state_dict(), folder / "encoder.safetensors")
    write_language_model(folder / "lm")
    return folder, asked


def run_config(world, name, lm=None, stage3=None, **changes):
    folder, asked = world
    crop = CropConfig(kind="centre", size=28, flip=0.0)
    config = TrainConfig(
        stage="stage3",
        run_dir=str(folder / name),
        precision="float32",
        model=VISION,
        data=DataConfig(
            path=str(asked),
            clip=ClipConfig(num_frames=4, sampling="interval", crop=crop, min_frames=1),
            batch_size=3,
            num_workers=0,
        ),
        optim=OptimConfig(lr=3e-3, min_lr=3e-3, lr_batch=0, steps=4, warmup_steps=1),
        stage3=Stage3Config(
            qformer=QFORMER_TINY,
            lm=lm or LanguageConfig(str(folder / "lm"), trained="lora", lora_layers=("q_proj",)),
            max_tokens=200,
            vision_init=str(folder / "encoder.safetensors"),
            **(stage3 or {}),
        ),
        save_every=2,
    )
    return replace(config, **changes)


def run_and_keep(config):
    """The stage of a run as it is in memory, and its weights before the first step."""
    stages, before = [], {}
    build = loop.build_stage

    def keep(*arguments):
        stage, made = build(*arguments)
        load = stage.load_towers

        def load_and_copy():
            load()
            before.update({n: t.clone() for n, t in stage.model.state_dict().items()})

        stage.load_towers = load_and_copy
        stages.append(stage)
        return stage, made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_stage", keep)
        result = loop.run(config)
    assert result.step == config.optim.steps
    return stages[0], before


@pytest.fixture(scope="module")
def trained(world):
    torch.set_num_threads(1)
    config = run_config(world, "run", stage3={"frozen": ("vision_encoder",)})
    return config, *run_and_keep(config)


def is_trained(name):
    return ".lora_" in name if name.startswith("lm.") else not name.startswith("vision_encoder.")


def test_a_run_changes_what_is_trained_and_nothing_else(trained, world):
    _, stage, before = trained
    for name, tensor in stage.model.state_dict().items():
        text = name.startswith("qformer.") and (
            ".word_" in name or ".position_" in name or ".intermediate.d" in name
        )
        text |= (
            name.startswith("qformer.bert.encoder")
            and ".output." in name
            and not any(part in name for part in ("attention.", "_query"))
        )
        # no instruction is read here; key biases cancel in the softmax
        idle = text or name.endswith("self.key.bias")
        assert torch.equal(tensor, before[name]) != is_trained(name) or idle, name
        if text:
            assert torch.equal(tensor, before[name]), name
    encoder = read_weights(world[0] / "encoder.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(stage.model.vision_encoder.state_dict()[name], encoder[name])
    log = (world[0] / "run" / "log.jsonl").read_text().splitlines()
    assert [list(json.loads(line)["losses"]) for line in log] == [["next_token"]] * 4
    assert stage.skipped == {}


def test_frozen_weights_of_the_language_model_stay_in_its_folder(trained, world):
    _, stage, _ = trained
    wanted = {n for n in stage.model.state_dict() if not n.startswith("lm.") or ".lora_" in n}
    run_dir = world[0] / "run"
    assert set(read_weights(run_dir / "model.safetensors")) == wanted
    state = load_training_checkpoint(run_dir / "checkpoints" / "step_00000004.pt")
    assert set(state["model"]) == wanted


def test_a_run_comes_back_whole(trained, world, tmp_path):
    config, stage, _ = trained
    again, there = load_stage3(config.run_dir)
    assert there.stage3 == config.stage3
    assert not again.training
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    # somewhere else, with the language model's folder given by name
    shutil.copytree(config.run_dir, tmp_path / "moved")
    text = (tmp_path / "moved" / "config.json").read_text()
    gone = text.replace(str(world[0] / "lm"), str(tmp_path / "gone"))
    (tmp_path / "moved" / "config.json").write_text(gone)
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json .*gone"):
        load_stage3(tmp_path / "moved")
    again, _ = load_stage3(tmp_path / "moved", lm=world[0] / "lm")
    name = "lm.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert torch.equal(again.model.state_dict()[name], stage.model.state_dict()[name])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="run must be of stage3, got stage1"):
        load_stage3(tmp_path)


def test_a_run_goes_on_as_if_it_had_not_stopped(trained, world):
    config, stage, _ = trained
    again = world[0] / "again"
    shutil.copytree(config.run_dir, again)
    (again / "checkpoints" / "step_00000004.pt").unlink()
    (again / "model.safetensors").unlink()
    result = loop.run(replace(config, run_dir=str(again)))
    assert (result.first_step, result.step) == (2, 4)
    saved = read_weights(again / "model.safetensors")
    assert len(saved) > 100
    for name, tensor in saved.items():
        assert torch.equal(tensor, stage.model.state_dict()[name]), name


def test_parts_have_their_own_learning_rates(world):
    """Adam's first step is as long as the rate, whatever the gradient."""
    config = run_config(world, "rates", LanguageConfig(str(world[1].parent), "tiny", "full"))
    optim = OptimConfig(
        lr=1e-3,
        min_lr=1e-3,
        lr_batch=0,
        steps=1,
        warmup_steps=0,
        weight_decay=0.0,
        eps=1e-12,
        max_grad_norm=0.0,
        vision_lr_scale=0.5,
        lm_lr_scale=0.1,
        warmup_epochs=0,
    )
    stage, before = run_and_keep(replace(config, optim=optim))
    state = stage.model.state_dict()
    for name, rate in (
        ("vision_encoder.blocks.0.mlp.fc1.weight", 5e-4),
        ("qformer.bert.encoder.layer.0.attention.self.query.weight", 1e-3),
        ("project_up.weight", 1e-3),
        ("lm.model.layers.0.mlp.up_proj.weight", 1e-4),
    ):
        step = (state[name] - before[name]).abs()
        assert step.max() == pytest.approx(rate, rel=2e-2), name
    # all of a model that comes from no folder is saved
    saved = read_weights(world[0] / "rates" / "model.safetensors")
    assert set(saved) == set(state)
    again, _ = load_stage3(world[0] / "rates")
    assert torch.equal(again.model.lm.lm_head.weight, state["lm.lm_head.weight"])


def test_texts_alone_train_the_language_model(world):
    folder, asked = world
    config = run_config(world, "texts", LanguageConfig(str(asked.parent), "tiny", "full"))
    data = replace(config.data, path=str(asked.parent / "texts.jsonl"), batch_size=2)
    stage, before = run_and_keep(replace(config, data=data))
    for name, tensor in stage.model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == name.startswith("lm."), name
    log = (folder / "texts" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_other_precisions_run(world, precision):
    config = run_config(world, precision, precision=precision)
    config = replace(config, optim=replace(config.optim, steps=2))
    stage, _ = run_and_keep(config)
    narrow = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {p.dtype for p in stage.model.parameters()} == {narrow}
    row = json.loads((world[0] / precision / "log.jsonl").read_text().splitlines()[-1])
    assert 1 < row["loss"] < 8


def test_recipes_are_the_published_numbers():
    rows = {  # lr, of the video encoder, of the language model, clips a step, frames
        "stage3-align": (1e-4, 4e-5, 4e-5, 2048, 4, 32),
        "stage3-instruct": (2e-5, 2e-5, 2e-5, 256, 8, 32),
        "stage3-hd": (2e-5, 1e-5, 1e-5, 1024, 8, 64),
        "stage3-hd-f16": (1e-5, 1e-5, 1e-5, 1024, 16, 64),
    }
    for name, (lr, vision, lm, batch, frames, gpus) in rows.items():
        config = RECIPES[name]
        assert config.optim.lr == lr
        assert config.optim.lr * config.optim.vision_lr_scale == pytest.approx(vision)
        assert config.optim.lr * config.optim.lm_lr_scale == pytest.approx(lm)
        assert config.data.batch_size * config.optim.accumulate * gpus == batch
        assert config.data.clip.num_frames == config.model.num_frames == frames
        assert config.optim.min_lr == pytest.approx(0.05 * lr)
    with pytest.raises(ValueError, match="init must be empty for stage stage3"):
        loop.build_stage(replace(RECIPES["stage3-tiny"], init="a.pt"), [])


# ---- generation


def greedy(stage, tokens, video, count):
    """The likeliest token each time, from the whole sequence anew: no cache, no padding."""
    ids = torch.tensor([tokens.ids])
    embeds = stage.model.embed_text(ids, video, torch.tensor([tokens.in_video]))
    table, made = base(stage.model.lm).get_input_embeddings(), []
    for _ in range(count):
        logits = base(stage.model.lm)(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in stage.conversation.stop_ids:
            break
        embeds = torch.cat([embeds, table(torch.tensor([[made[-1]]]))], dim=1)
    return made


@pytest.fixture(scope="module")
def chat(world):
    """A language model that says different things about different videos."""
    stage = tiny_stage(world[0] / "lm", weights="pretrained").eval()
    with torch.no_grad():
        stage.model.lm.lm_head.weight.mul_(20)
        for parameter in stage.model.lm.model.layers.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        stage.model.project_up.weight.mul_(100)
        stage.model.vision_encoder.patch_embed.proj.weight.mul_(30)
        for name, parameter in stage.model.qformer.named_parameters():
            parameter.mul_(100 if "crossattention.self.value.weight" in name else 1)
        stage.model.lm.lm_head.weight[stage.conversation.stop_ids] *= 0.05
    clip = ClipConfig(num_frames=4, sampling="interval", crop=CropConfig("whole", 28))
    return VideoChat(stage, clip)


def videos(world, count):
    return sorted((world[1].parent).rglob("*.mp4"))[:count]


@torch.no_grad()
def test_generation_with_the_cache_is_argmax_without_it(chat, world):
    stage = chat.stage
    first, second = videos(world, 2)
    asked = "red bar left"
    pairs = [(first, asked), (second, asked), (None, "green"), (first, "two bell hum left right")]
    batched = chat.answers(pairs, max_new_tokens=12)
    for (video, question), text in zip(pairs, batched, strict=True):
        tokens, seen = chat.prompt(chat.views(video), question, (), 12)
        made = greedy(stage, tokens, seen, 12)
        assert len(made) > 2
        assert text == stage.language_tokenizer.decode(made, skip_special_tokens=True).strip()
        assert chat.ask(video, question, max_new_tokens=12) == text
    assert len(set(batched)) == 4  # otherwise this would say nothing of video or question


def test_answers_end_where_the_answer_ends(chat, world):
    stage = chat.stage
    stop = stage.conversation.stop_ids[0]
    with torch.no_grad():
        kept = stage.model.lm.lm_head.weight[stop].clone()
        stage.model.lm.lm_head.weight[stop] = stage.model.lm.lm_head.weight.sum(0) * 5
    try:
        found = chat.answers([(v, "up") for v in videos(world, 3)], max_new_tokens=30)
        lengths = [len(text.split()) for text in found]
        assert min(lengths) < 28
    finally:
        with torch.no_grad():
            stage.model.lm.lm_head.weight[stop] = kept


def test_streaming_gives_the_answer_in_pieces(chat, world):
    (video,) = videos(world, 1)
    pieces = []
    whole = chat.ask(video, "red bar left", max_new_tokens=12, stream=pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces).strip() == whole


def test_sampling_draws_with_torchs_generator(chat, world):
    (video,) = videos(world, 1)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(chat.ask(video, "red", max_new_tokens=12, temperature=20.0))
    assert drawn[0] == drawn[1] != drawn[2]


def test_history_is_seen_and_early_rounds_leave_when_there_is_no_room(chat, world):
    (video,) = videos(world, 1)
    views = chat.views(video)
    history = [("red", "bar"), ("green", "cross")]
    tokens, seen = chat.prompt(views, "up", history, 12)
    assert tokens.dropped == 0
    assert seen.shape == (1, 5, 32)
    names = chat.stage.language_tokenizer.convert_ids_to_tokens(tokens.ids)
    assert [n for n in names if n in ("red", "bar", "green", "cross", "up")] == [
        *("red", "bar", "green", "cross", "up")
    ]
    room = base(chat.stage.model.lm).config.max_position_embeddings
    tokens, _ = chat.prompt(views, "up", history, room - len(tokens) + 1)
    assert tokens.dropped == 1
    with pytest.raises(ValueError, match=r"max_new_tokens must be below .* 512, got 512"):
        chat.ask(video, "up", max_new_tokens=512)


def test_long_videos_are_seen_in_segments(chat, world):
    (video,) = videos(world, 1)
    with Video(str(video)) as file:
        duration, frames = file.info().duration, file.frames(range(file.num_frames))
    parts = VideoChat(chat.stage, chat.clip, seconds=duration / 2)
    views = parts.views(video)
    assert views.pixels.shape[0] == 2
    half = len(frames) // 2
    for i, part in enumerate((frames[:half], frames[half:])):
        assert torch.equal(views.pixels[i : i + 1], chat.views(part).pixels)
    assert views.note == (
        f"The video is in 2 segments, of seconds 0.0-{duration / 2:.1f}, "
        f"{duration / 2:.1f}-{duration:.1f}."
    )
    tokens, seen = parts.prompt(views, "up", (), 12)
    assert sum(tokens.in_video) == 10
    assert len(seen) == 2
    assert chat.views(video).note == ""
    # frames as they are
    assert torch.equal(chat.views(frames).pixels, chat.views(video).pixels)


def test_frames_are_those_of_training(world):
    """What the loader gives without draws is what the model is asked about."""
    from iv2.data.clips import read_list
    from iv2.data.dataset import VideoDataset

    clip = ClipConfig(num_frames=4, sampling="interval", random=False, crop=CropConfig("whole", 28))
    sample = read_list(world[1])[0]
    wanted = VideoDataset([sample], replace(clip, crop=replace(clip.crop, flip=0.0))).load(0, 0)
    found = VideoChat(tiny_stage(world[0] / "lm"), clip).views(sample.path)
    torch.testing.assert_close(found.pixels[0], wanted["video"])


def test_tiles_of_a_large_video(world):
    stage = tiny_stage(world[0] / "lm", replace(CONFIG, tiles=6)).eval()
    chat = VideoChat(stage, ClipConfig(num_frames=4, sampling="interval"))
    frames = batch_of(said("a"), size=56)["video"][0]
    views = chat.views(frames[:, :28])
    assert views.pixels.shape == (3, 4, 28, 28, 3)
    assert isinstance(chat.ask(frames, "up", max_new_tokens=3), str)


def test_commands(trained, world, capsys):
    config, *_ = trained
    first, second = videos(world, 2)
    run = ["--run", config.run_dir, "--max-new-tokens", "5"]
    expected = [
        VideoChat.load(config.run_dir).ask(v, "up", max_new_tokens=5) for v in (first, second)
    ]
    capsys.readouterr()
    cli.main(["chat", str(first), *run, "--question", "up"])
    assert capsys.readouterr().out.strip() == expected[0]
    cli.main(["caption", str(first), str(second), *run, "--question", "up"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{v}\t{t}" for v, t in zip((first, second), expected, strict=True)]
    cli.main(["caption", str(first), *run, "--question", "up", "--json"])
    assert json.loads(capsys.readouterr().out) == {"path": str(first), "caption": expected[0]}
    asked = iter(["up", "down", ""])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda prompt: next(asked))
        cli.main(["chat", str(first), *run])
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == expected[0]
    assert next(asked, None) is None
    with pytest.raises(SystemExit, match=r"iv2 chat: .*none"):
        cli.main(["chat", str(first), "--run", "none", "--question", "up"])


def test_a_dialogue_remembers(chat, world, capsys):
    (video,) = videos(world, 1)
    dialogue(chat, video, ["red", "up"], max_new_tokens=8)
    one, two = (line.strip() for line in capsys.readouterr().out.splitlines())
    assert one == chat.ask(video, "red", max_new_tokens=8)
    assert two == chat.ask(video, "up", [("red", one)], max_new_tokens=8)


def test_a_vocabulary_alone_makes_a_language_model(tmp_path):
    stage = tiny_stage(write_vocabulary(tmp_path))
    assert base(stage.model.lm).config.vocab_size == len(stage.language_tokenizer) == 39
