"""Stage 3 with an audio tower: what is heard and trained, files, runs; answers that are begun."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from media import write_video
from tiny_stage2 import AUDIO_TINY, VISION, tiny_model, write_vocabulary
from tiny_stage3 import CONFIG, QFORMER_TINY, batch_of, said, tiny_stage

from iv2 import train as loop
from iv2.checkpoint import read_weights, save_weights
from iv2.config import DataConfig, OptimConfig, SourceConfig, Stage3Config, TrainConfig
from iv2.data.audio import SoundConfig, read_fbank
from iv2.data.dataset import ClipConfig
from iv2.data.instructions import write_questions
from iv2.data.synthetic import encode
from iv2.data.transforms import CropConfig
from iv2.models.audio import AudioEncoder
from iv2.models.language import LanguageConfig, base, tiny_tokenizer
from iv2.models.stage3 import load_video_chat
from iv2.recipes import RECIPES
from iv2.serve.chat import VideoChat
from iv2.stages.conversation import Conversation, ConversationTooLongError
from iv2.stages.stage3 import Stage3

SOUND = SoundConfig(seconds=1.0, num_frames=64)
HEARING = ("audio_encoder.", "audio_up.")

pytestmark = pytest.mark.usefixtures("one_thread")


def with_sound(batch, seed=3):
    generator = torch.Generator().manual_seed(seed)
    fbank = torch.randn(len(batch["messages"]), 64, 64, generator=generator)
    return {**batch, "kind": "audio_video", "fbank": fbank}


def hears(name):
    return name.startswith(HEARING)


# ---- the loss


def test_the_sound_matters_and_each_row_hears_its_own(folder):
    stage = tiny_stage(folder, audio=AUDIO_TINY).eval()
    batch = batch_of(said("up", "down"), said("up", "down"))
    first, same, other = (with_sound(batch, seed) for seed in (3, 3, 4))
    losses = [stage(b)["next_token"].item() for b in (first, same, other, batch)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-5
    assert abs(losses[0] - losses[3]) > 1e-5
    views = batch["video"][:1, None].expand(2, -1, -1, -1, -1, -1)  # one video twice
    a, b = stage.see(views, batch["messages"], fbank=first["fbank"])
    assert (a - b).abs().max() > 1e-4
    turned = stage.see(views, batch["messages"], fbank=first["fbank"].flip(0))
    torch.testing.assert_close(turned, torch.stack([b, a]))


def test_some_queries_hear_and_the_others_see(folder):
    stage = tiny_stage(folder, audio=AUDIO_TINY).eval()
    model, batch = stage.model, with_sound(batch_of(said("up", "down")))
    count = model.num_queries - model.qformer.config.num_hearing_queries
    before = model.embed_video(batch["video"], fbank=batch["fbank"])
    deaf = model.embed_video(batch["video"], fbank=batch["fbank"] + 1)
    blind = model.embed_video(255 - batch["video"], fbank=batch["fbank"])
    assert torch.equal(before[:, :count], deaf[:, :count])
    assert torch.equal(before[:, count:], blind[:, count:])
    assert (before[:, count:] - deaf[:, count:]).abs().min(2).values.max() > 0
    assert not torch.equal(before[:, :count], blind[:, :count])
    config = replace(CONFIG, qformer=replace(QFORMER_TINY, num_hearing_queries=5))
    with pytest.raises(ValueError, match="num_hearing_queries must be below 5, all that there are"):
        tiny_stage(folder, config, audio=AUDIO_TINY)


def test_tiles_share_the_sound_of_their_clip(folder):
    stage = tiny_stage(folder, replace(CONFIG, tiles=6), audio=AUDIO_TINY).eval()
    batch = with_sound(batch_of(said("up", "down"), said("up", "left"), size=56))
    runs = []
    stage.model.audio_encoder.register_forward_pre_hook(lambda m, i: runs.append(len(i[0])))
    views = stage._views(batch)[0].unflatten(0, (2, 5))
    once = stage.see(views, batch["messages"], fbank=batch["fbank"])
    each = stage.see(views, batch["messages"], fbank=batch["fbank"].repeat_interleave(5, 0))
    assert runs == [2, 10]
    torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-5)
    assert stage(batch)["next_token"].isfinite()


def test_what_of_the_hearing_is_trained(folder):
    rounds = said("red bar", "green cross")
    for frozen in ((), ("audio_encoder",)):
        stage = tiny_stage(folder, replace(CONFIG, frozen=frozen), audio=AUDIO_TINY).train()
        model = stage.model
        assert model.audio_encoder.training == (not frozen)
        stage(batch_of(rounds))["next_token"].backward()  # nothing is heard
        assert all(p.grad is None for n, p in model.named_parameters() if hears(n))
        assert model.project_up.weight.grad.any()
        stage.zero_grad()
        stage(with_sound(batch_of(rounds)))["next_token"].backward()
        grads = {n: p.grad for n, p in model.named_parameters() if hears(n)}
        assert all(grads[f"audio_up.{n}"].any() for n in ("0.weight", "0.bias", "1.weight"))
        inside = {n: g for n, g in grads.items() if n.startswith("audio_encoder.")}
        assert len(inside) > 20
        for name, grad in inside.items():
            assert (grad is None) if frozen else grad.any() or "k_proj.bias" in name, name


def test_sounds_that_cannot_be_heard(folder):
    deaf, stage = tiny_stage(folder), tiny_stage(folder, audio=AUDIO_TINY)
    batch = with_sound(batch_of(said("up", "down"), said("up", "left")))
    with pytest.raises(ValueError, match="fbank must be None without an audio tower"):
        deaf(batch)
    with pytest.raises(ValueError, match="batch must have video beside fbank"):
        stage({**batch, "video": None})
    with pytest.raises(ValueError, match="fbank must be of 2 videos or of a whole share of them"):
        stage.model.embed_video(batch["video"], fbank=batch["fbank"][[0, 1, 1]])
    with pytest.raises(ValueError, match="frozen must name parts of the model but lm, got audio"):
        tiny_stage(folder, replace(CONFIG, frozen=("audio_encoder",)))
    with pytest.raises(ValueError, match="audio_init must be empty without an audio tower, got a"):
        tiny_stage(folder, replace(CONFIG, audio_init="a.pt")).load_towers()


# ---- files


def filled(stage, value):
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if hears(name) or name == "query_tokens":
                parameter.fill_(value)
    return stage.model.state_dict()


def test_files_with_and_without_hearing(folder, tmp_path):
    deaf, stage = tiny_stage(folder), tiny_stage(folder, audio=AUDIO_TINY)
    own = stage.model.state_dict()
    assert {n for n in own if not hears(n)} == set(deaf.model.state_dict())
    save_weights(deaf.model.state_dict(), tmp_path / "deaf.pt")
    save_weights(filled(stage, 3.0), tmp_path / "whole.pt")
    again = tiny_stage(folder, audio=AUDIO_TINY)
    load_video_chat(again.model, tmp_path / "whole.pt")
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"are missing: .*audio_encoder\."):
        load_video_chat(again.model, tmp_path / "deaf.pt")
    load_video_chat(again.model, tmp_path / "deaf.pt", may_be_deaf=True)
    state = again.model.state_dict()
    assert torch.equal(state["query_tokens"], deaf.model.query_tokens)
    assert (state["audio_up.0.weight"] == 3).all()
    # half of it is none of it
    half = {n: t for n, t in stage.model.state_dict().items() if n != "audio_up.0.bias"}
    save_weights(half, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"1 are missing: audio_up\.0\.bias"):
        load_video_chat(again.model, tmp_path / "half.pt", may_be_deaf=True)


def test_files_to_hear_from(folder, tmp_path):
    second = tiny_model(folder).model
    save_weights(second.state_dict(), tmp_path / "second.pt")
    torch.manual_seed(8)
    alone = AudioEncoder(AUDIO_TINY)
    save_weights(alone.state_dict(), tmp_path / "alone.pt")
    for path, wanted in (("second.pt", second.audio_encoder), ("alone.pt", alone)):
        config = replace(CONFIG, audio_init=str(tmp_path / path))
        stage = tiny_stage(folder, config, audio=AUDIO_TINY)
        up = stage.model.audio_up[0].weight.clone()
        stage.load_towers()
        found = stage.model.audio_encoder.state_dict()
        assert all(torch.equal(found[n], t) for n, t in wanted.state_dict().items())
        assert torch.equal(stage.model.audio_up[0].weight, up)
    name = "encoder.layers.1.fc1.weight"
    less = {n: t for n, t in second.state_dict().items() if n != f"audio_encoder.{name}"}
    save_weights(less, tmp_path / "less.pt")
    lacking = replace(CONFIG, audio_init=str(tmp_path / "less.pt"))
    with pytest.raises(ValueError, match=f"1 are missing: {name}"):
        tiny_stage(folder, lacking, audio=AUDIO_TINY).load_towers()
    # another stage 3 has the last word, as far as it hears
    save_weights(tiny_stage(folder).model.state_dict(), tmp_path / "deaf.pt")
    save_weights(filled(tiny_stage(folder, audio=AUDIO_TINY), 3.0), tmp_path / "whole.pt")
    weight = f"audio_encoder.{name}"
    for path, wanted in (("deaf.pt", alone.get_parameter(name)), ("whole.pt", torch.tensor(3.0))):
        both = replace(config, chat_init=str(tmp_path / path))
        stage = tiny_stage(folder, both, audio=AUDIO_TINY)
        stage.load_towers()
        found = stage.model.get_parameter(weight)
        assert torch.equal(found, wanted.expand_as(found))
    bridge = replace(config, qformer_init=str(tmp_path / "whole.pt"))
    stage = tiny_stage(folder, bridge, audio=AUDIO_TINY)
    stage.load_towers()
    assert (stage.model.audio_up[0].weight == 3).all()
    assert torch.equal(stage.model.get_parameter(weight), alone.get_parameter(name))


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the three lists of a folder, the kinds of its batches, and its first weights."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    lists = write_questions(out / "world", 4, 5, size=32, num_frames=8).parent
    save_weights(tiny_model(write_vocabulary(out)).model.state_dict(), out / "second.pt")
    crop = CropConfig(kind="centre", size=28, flip=0.0)
    sources = RECIPES["stage3-tiny"].data.sources
    config = TrainConfig(
        stage="stage3",
        run_dir=str(out / "run"),
        precision="float32",
        model=VISION,
        audio=AUDIO_TINY,
        data=DataConfig(
            path=str(lists),
            sources=tuple(replace(source, weight=1.0) for source in sources),
            clip=ClipConfig(
                num_frames=4, sampling="interval", crop=crop, min_frames=1, sound=SOUND
            ),
            batch_size=2,
            num_workers=0,
        ),
        optim=OptimConfig(
            lr=1e-3, min_lr=1e-3, lr_batch=0, steps=10, warmup_steps=1, audio_lr_scale=0.1
        ),
        stage3=Stage3Config(
            qformer=QFORMER_TINY,
            lm=LanguageConfig(str(lists), "tiny", "full"),
            max_tokens=512,
            audio_init=str(out / "second.pt"),
        ),
    )
    kinds, forward = [], Stage3.forward

    def noting(stage, batch):
        kinds.append((batch["kind"], "video" in batch, "fbank" in batch))
        return forward(stage, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage3, "forward", noting)
        loop.run(config)
    return config, kinds, out


def test_a_run_takes_seen_heard_and_read_batches(run):
    _, kinds, out = run
    assert set(kinds) == {
        *(("video", True, False), ("audio_video", True, True), ("text", False, False)),
    }
    log = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 10
    assert all(np.isfinite(row["loss"]) for row in log)
    saved, started = (
        read_weights(out / "run" / "model.safetensors"),
        read_weights(out / "second.pt"),
    )
    name = "audio_encoder.encoder.layers.0.fc1.weight"
    step = (saved[name] - started[name]).abs().max()
    heard = sum(kind == "audio_video" for kind, *_ in kinds)
    assert 0 < step < 1.1e-4 * heard  # from stage 2's, and trained, at a rate of its own
    assert {"audio_up.0.weight", "audio_up.1.bias"} <= set(saved)
    chat = VideoChat.load(out / "run")
    assert chat.sound == SOUND
    assert torch.equal(chat.stage.model.get_parameter(name), saved[name])
    # a file of a run that hears must have all of it
    lacking = {n: t for n, t in saved.items() if not hears(n)}
    save_weights(lacking, out / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"are missing: .*audio_encoder\."):
        VideoChat.load(out / "run", weights=out / "lacking.safetensors")


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_other_precisions_hear(run, precision):
    config, _, out = run
    optim = replace(config.optim, steps=2)
    data = replace(config.data, sources=config.data.sources[2:3])
    loop.run(
        replace(config, run_dir=str(out / precision), precision=precision, optim=optim, data=data)
    )
    row = json.loads((out / precision / "log.jsonl").read_text().splitlines()[-1])
    assert 1 < row["loss"] < 8
    chat = VideoChat.load(out / precision, dtype=torch.bfloat16)
    shown = (torch.zeros(8, 28, 28, 3, dtype=torch.uint8), torch.zeros(64, 64))
    assert isinstance(chat.ask(shown, "what do you hear?", max_new_tokens=3), str)


def test_lists_are_named_by_their_folder(run):
    config, _, out = run
    data = replace(config.data, path=str(out / "world" / "instructions.jsonl"))
    with pytest.raises(ValueError, match=r"data\.path must be the folder of instructions\.jsonl, "):
        loop.run(replace(config, run_dir=str(out / "other"), data=data))
    assert SourceConfig("a.jsonl", kind="text").kind == "text"


def test_the_tiny_recipe_hears_as_stage_2_does():
    tiny, second = RECIPES["stage3-tiny"], RECIPES["stage2-tiny-av"]
    assert tiny.audio == second.audio
    assert tiny.model == second.model
    assert tiny.data.clip == second.data.clip
    assert RECIPES["stage3-smollm2"].audio is None
    assert not RECIPES["stage3-smollm2"].data.sources


# ---- answers


@pytest.fixture(scope="module")
def chat(folder):
    """Says different things about different sounds."""
    stage = tiny_stage(folder, audio=AUDIO_TINY).eval()
    with torch.no_grad():
        stage.model.lm.lm_head.weight.mul_(20)
        for parameter in stage.model.lm.model.layers.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        stage.model.project_up.weight.mul_(100)
        stage.model.audio_up[1].weight.mul_(30)
        for name, parameter in stage.model.qformer.named_parameters():
            parameter.mul_(100 if "crossattention.self.value.weight" in name else 1)
        stage.model.lm.lm_head.weight[stage.conversation.stop_ids] *= 0.05
    clip = ClipConfig(num_frames=4, sampling="interval", crop=CropConfig("whole", 28), sound=SOUND)
    return VideoChat(stage, clip)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same pictures with two sounds, two seconds long; in the first only one is heard."""
    out = tmp_path_factory.mktemp("files")
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    time = np.arange(32_000, dtype=np.float32) / 16_000
    for name, pitch in (("low.mp4", 200), ("high.mp4", 2000)):
        sound = np.sin(2 * np.pi * pitch * time).astype(np.float32) * 0.5
        if name == "low.mp4":
            sound[16_000:] = 0
        encode(out / name, frames, sound, fps=8)
    return out / "low.mp4", out / "high.mp4"


def test_a_chat_hears(chat, files, folder, tmp_path):
    low, high = files
    seen = [chat.views(path) for path in files]
    assert torch.equal(seen[0].pixels, seen[1].pixels)
    for path, views in zip(files, seen, strict=True):
        assert torch.equal(views.sounds[0], read_fbank(path, None, None, SOUND))
    replies = chat.answers([(low, "red bar"), (high, "red bar")], max_new_tokens=12)
    assert replies[0] != replies[1]
    assert [chat.ask(path, "red bar", max_new_tokens=12) for path in files] == replies
    # frames with their sound are what the file is
    pictures = torch.zeros(16, 28, 28, 3, dtype=torch.uint8)
    sounds = [views.sounds[0] for views in seen]
    one, two = chat.answers([((pictures, s), "red bar") for s in sounds], max_new_tokens=12)
    assert one != two
    assert chat.views(pictures).sounds is None
    assert chat.views(write_video(tmp_path / "silent.mp4", 20)).sounds is None
    deaf = VideoChat(tiny_stage(folder).eval(), chat.clip)
    assert deaf.views(low).sounds is None
    assert torch.equal(deaf.views(low).pixels, seen[0].pixels)
    with pytest.raises(ValueError, match="video must be without sound for this model"):
        deaf.ask((pictures, sounds[0]), "red bar")


def test_each_segment_has_its_own_sound(chat, files):
    low, high = files
    parts = VideoChat(chat.stage, chat.clip, seconds=1.0)
    views = parts.views(low)
    assert views.note
    assert len(views.sounds) == len(views.pixels) == 2
    assert torch.equal(views.sounds[0], read_fbank(low, None, 1.0, SOUND))
    assert torch.equal(views.sounds[1], read_fbank(low, 1.0, None, SOUND))
    assert views.sounds[0].mean() > views.sounds[1].mean() + 0.1  # the second is silent
    # the first segment sounds as it does alone, the second not
    found = parts.prompt(views, "red bar", (), 12)[1]
    swapped = replace(views, sounds=views.sounds[[0, 0]])
    other = parts.prompt(swapped, "red bar", (), 12)[1]
    assert torch.equal(found[0], other[0])
    assert (found[1] - other[1]).abs().max() > 1e-3
    assert parts.ask(high, "red bar", max_new_tokens=3)


@torch.no_grad()
def test_a_begun_answer_is_gone_on_with(chat, files):
    stage, prefix = chat.stage, "red bell"
    tokenizer, model = stage.language_tokenizer, stage.model
    pairs = [(files[0], "red bar"), (files[1], "two hum left right"), (None, "up")]
    free = chat.answers(pairs, max_new_tokens=8)
    begun = chat.answers(pairs, prefix=prefix, max_new_tokens=8)
    for (video, question), reply in zip(pairs, begun, strict=True):
        tokens, seen = chat.prompt(chat.views(video), question, (), 8)
        ids = tokens.ids + tokenizer(prefix, add_special_tokens=False)["input_ids"]
        places = tokens.in_video + [False] * (len(ids) - len(tokens))
        made = len(ids)
        for _ in range(8):  # the likeliest token each time, without a cache
            embeds = model.embed_text(torch.tensor([ids]), seen, torch.tensor([places]))
            best = int(base(model.lm)(inputs_embeds=embeds).logits[0, -1].argmax())
            if best in stage.conversation.stop_ids:
                break
            ids, places = [*ids, best], [*places, False]
        rest = tokenizer.decode(ids[made:], skip_special_tokens=True)
        assert len(ids) > made + 1
        assert reply == f"{prefix} {rest}".strip()
    assert not any(text.startswith(prefix) for text in free)
    assert chat.answers([], prefix=prefix) == []


@pytest.mark.parametrize("template", ["chat", "mistral"])
def test_a_begun_answer_is_that_of_training(folder, template):
    conversation = Conversation(tiny_tokenizer(folder), template, num_queries=2)
    rounds = said("red", "up", "green bar", "left right bell", system="blue")
    whole = conversation.tokens(rounds, 1)
    begun = conversation.tokens(rounds[:-1], 1, prefix="left right")
    assert begun.ids == whole.ids[: len(begun)]
    assert begun.in_video == whole.in_video[: len(begun)]
    assert not any(begun.is_answer[-2:])
    assert len(begun) == len(conversation.tokens(rounds[:-1], 1)) + 2
    assert rounds == said("red", "up", "green bar", "left right bell", system="blue")
    last = conversation.tokens([rounds[0], rounds[-2]], 1, prefix="left right")
    assert conversation.tokens(rounds[:-1], 1, prefix="left right", max_tokens=len(last)) == (
        replace(last, dropped=1)
    )
    with pytest.raises(ConversationTooLongError):
        conversation.tokens(rounds[:-1], 1, prefix="left right", max_tokens=len(last) - 1)
    with pytest.raises(ValueError, match="prefix must be empty after an answer, got 'up'"):
        conversation.tokens(rounds, 1, prefix="up")
