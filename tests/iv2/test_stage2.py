from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_stage2
import torch
import torch.nn.functional as F
from tiny_stage2 import CONFIG, VISION, RandomBatches, tiny_model, write_vocabulary

from iv2.config import Pairing, Stage2Config
from iv2.data.captions import mask_tokens
from iv2.models.audio import AUDIO
from iv2.models.stage2 import Seen, Stage2Model, Stage2ModelConfig
from iv2.models.text import TEXT
from iv2.models.vision import vision_config
from iv2.recipes import RECIPES
from iv2.stages.stage2 import _MLM_SALT, build_stage2
from iv2kernels import contrastive_loss, hard_negatives

NAMES = {
    f"{name}.{loss}"
    for name in ("vision_visual", "audio_audio", "audio_video_avs")
    for loss in ("vtc", "vtm", "mlm")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def test_every_pairing_has_its_losses_and_gradients(folder):
    stage = tiny_model(folder).train()
    batch = RandomBatches(6).batch(range(6))
    losses = stage(batch)
    assert set(losses) == set(stage.loss_weights) == NAMES
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    lacking = [n for n, p in stage.model.named_parameters() if p.grad is None]
    assert lacking == []
    assert all(torch.isfinite(p.grad).all() for p in stage.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("image", {"vision_visual"}),
        ("video", {"vision_visual"}),
        ("audio", {"audio_audio"}),
    ],
)
def test_a_batch_trains_what_it_has(folder, kind, names):
    stage = tiny_model(folder).train()
    losses = stage(RandomBatches(4).batch(range(4), kind))
    assert {name.split(".")[0] for name in losses} == names


def test_losses_are_those_of_each_pair_alone(folder):
    """The shared fusion pass against one caption and one video at a time, in float64."""
    config = replace(CONFIG, mask_ratio=0.0, pairings=(Pairing("audio_video", "avs"),))
    stage = tiny_model(folder, config).double().train()
    model, batch = stage.model, RandomBatches(5).batch(range(5))
    batch |= {"video": batch["video"].double(), "fbank": batch["fbank"].double()}
    batch["ids"][3] = batch["ids"][1]
    losses = stage(batch)

    text = stage.tokenizer.encode([tiny_stage2.caption(i) for i in range(5)], 32)
    masked, rows, targets = mask_tokens(
        text, batch["seeds"] + _MLM_SALT, stage.tokenizer, probability=0.5
    )
    seen = model.see(batch["video"], batch["fbank"])
    _, t = model.read(text)
    v = seen.features["audio_video"]
    expected = contrastive_loss(v, t, model.temp.float(), ids=batch["ids"])
    torch.testing.assert_close(losses["audio_video_avs.vtc"].double(), expected.double())

    def fused(packed, caption, video):
        one, tokens = packed.select(torch.tensor([caption]))
        only = Seen({k: x[video : video + 1] for k, x in seen.tokens.items()}, {})
        hidden = model.text_encoder.encode(packed)[tokens]
        keys_values = model.keys_values(only, "audio_video")
        return model.text_encoder.fuse(hidden, one, keys_values, torch.zeros(1, dtype=torch.long))

    salt = 0x6E656761
    texts, videos = hard_negatives(v, t, model.temp, batch["ids"], batch["seeds"] + salt)
    assert texts[1] != 3  # one id
    assert texts[3] != 1
    pairs = [(i, i, 1) for i in range(5)]
    pairs += [(j, int(videos[j]), 0) for j in range(5)] + [(int(texts[i]), i, 0) for i in range(5)]
    scores = torch.cat([model.avtm_head(fused(text, c, m)[:1]) for c, m, _ in pairs])
    expected = F.cross_entropy(scores.float(), torch.tensor([label for *_, label in pairs]))
    torch.testing.assert_close(losses["audio_video_avs.vtm"], expected)

    hidden = torch.cat([fused(masked, i, i) for i in range(5)])
    expected = model.text_encoder.mlm_loss(hidden[rows], targets)
    torch.testing.assert_close(losses["audio_video_avs.mlm"], expected)


def test_one_sample_has_no_negatives(folder):
    stage = tiny_model(folder).train()
    losses = stage(RandomBatches(1).batch(range(1)))
    assert losses["vision_visual.vtc"] == 0
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_captions_empty_and_in_another_script(folder):
    stage = tiny_model(folder).train()
    batch = RandomBatches(3).batch(range(3))
    batch["captions"][0]["visual"] = ""
    batch["captions"][1]["visual"] = "красный крест"
    assert all(torch.isfinite(loss) for loss in stage(batch).values())


def test_a_missing_caption_names_the_clip(folder):
    stage = tiny_model(folder)
    batch = RandomBatches(3).batch(range(3))
    del batch["captions"][2]["avs"]
    with pytest.raises(ValueError, match=r"captions must have the kind avs, got .*: clip2.mp4"):
        stage(batch)
    vision_alone = tiny_model(folder, replace(CONFIG, pairings=(Pairing(),)))
    with pytest.raises(ValueError, match="pairings must be for batches of kind audio, got none"):
        vision_alone(RandomBatches(2).batch(range(2), "audio"))


def test_training_reads_paraphrases_and_tests_do_not(folder, monkeypatch):
    stage = tiny_model(folder)
    batch = RandomBatches(2).batch(range(2))
    batch["attributes"] = [{"paraphrases": {"visual": ["b", "c"]}}, {}]
    read = []
    encode = stage.tokenizer.encode

    def look(captions, max_tokens):
        read.append(captions[0])
        return encode(captions, max_tokens)

    monkeypatch.setattr(stage.tokenizer, "encode", look)
    for seed in range(24):
        batch["seeds"] = torch.tensor([seed << 33, 1])
        stage.train()(batch)
    assert set(read) == {tiny_stage2.caption(0), "b", "c"}
    read.clear()
    stage.eval()(batch)
    assert set(read) == {tiny_stage2.caption(0)}


def test_frozen_towers(folder):
    stage = tiny_model(folder, replace(CONFIG, frozen=("vision_encoder", "vision_proj"))).train()
    sum(stage(RandomBatches(4).batch(range(4))).values()).backward()
    for name, p in stage.model.named_parameters():
        frozen = name.startswith(("vision_encoder.", "vision_proj."))
        assert (p.grad is None) == frozen, name
    assert not stage.model.vision_encoder.training
    assert stage.model.text_encoder.training


def test_temperature_stays_within_its_bounds(folder):
    stage = tiny_model(folder).train()
    batch = RandomBatches(3).batch(range(3))
    for value, kept in ((9.0, 0.5), (-1.0, 0.001)):
        with torch.no_grad():
            stage.model.temp.fill_(value)
        stage(batch)
        assert stage.model.temp.item() == pytest.approx(kept)


def test_errors(folder):
    with pytest.raises(ValueError, match="pairings must be of vision without an audio tower"):
        tiny_model(folder, audio=False)
    with pytest.raises(ValueError, match="match_audio must be set for the vtm of audio_audio"):
        tiny_model(folder, replace(CONFIG, joint=replace(CONFIG.joint, match_audio=False)))
    with pytest.raises(ValueError, match="frozen must name modules of the model, got nothing"):
        tiny_model(folder, replace(CONFIG, frozen=("nothing",)))
    with pytest.raises(ValueError, match="pairings must be given once each, got vision_visual, v"):
        Stage2Config(pairings=(Pairing(), Pairing()))
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 1"):
        Stage2Config(mask_ratio=1)
    with pytest.raises(ValueError, match="fusion_dim must be positive with audio, got 0"):
        Stage2Model(VISION, TEXT["tiny"], AUDIO["tiny"])
    with pytest.raises(ValueError, match="attn_pool_num_heads must be positive, got 0"):
        Stage2Model(replace(VISION, attn_pool_num_heads=0), TEXT["tiny"])
    with pytest.raises(ValueError, match="tokenizer must be a folder"):
        build_stage2(VISION, TEXT["tiny"], None, Stage2Config())
    small = replace(tiny_stage2.TEXT_TINY, vocab_size=10)
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's"):
        build_stage2(VISION, small, None, Stage2Config(tokenizer=str(folder)))


# ---- published structure


def meta_keys(**parts):
    with torch.device("meta"):
        model = Stage2Model(**parts)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def test_published_names_and_shapes_of_1b():
    keys = meta_keys(vision=vision_config("1b", "stage2"), text=TEXT["bert-large"])
    for name, shape in {
        "vision_encoder.pos_embed": (1, 1025, 1408),
        "vision_encoder.clip_img_pos_embed": (1, 257, 1408),
        "vision_encoder.final_clip_decoder.head.weight": (768, 768),
        "text_encoder.bert.embeddings.word_embeddings.weight": (30522, 1024),
        "text_encoder.bert.encoder.layer.18.attention.self.query.weight": (1024, 1024),
        "text_encoder.bert.encoder.layer.19.crossattention.self.key.weight": (1024, 1408),
        "text_encoder.bert.encoder.layer.23.crossattention.output.LayerNorm.bias": (1024,),
        "text_encoder.cls.predictions.transform.dense.weight": (1024, 1024),
        "text_encoder.cls.predictions.bias": (30522,),
        "vision_proj.weight": (512, 768),
        "text_proj.weight": (512, 1024),
        "temp": (),
        "itm_head.weight": (2, 1024),
    }.items():
        assert keys[name] == shape, name
    assert "text_encoder.bert.encoder.layer.18.crossattention.self.key.weight" not in keys
    assert not any(name.startswith(("audio", "av")) for name in keys)


def test_published_names_and_shapes_of_6b():
    keys = meta_keys(
        vision=vision_config("6b", "stage2"),
        text=TEXT["bert-large"],
        audio=AUDIO["beats"],
        config=Stage2ModelConfig(embed_dim=768, fusion_dim=768),
    )
    for name, shape in {
        "av_concat_vision_proj.0.weight": (768, 3200),
        "av_concat_vision_proj.1.weight": (768,),
        "av_concat_audio_proj.0.weight": (768, 768),
        "audio_proj.weight": (768, 768),
        "av_fusion.weight": (768, 1536),
        "avtm_head.weight": (2, 1024),
        "audio_encoder.post_extract_proj.weight": (768, 512),
        "text_encoder.bert.encoder.layer.19.crossattention.self.value.weight": (1024, 768),
        "vision_proj.weight": (768, 768),
    }.items():
        assert keys[name] == shape, name
    assert "vision_encoder.img_pos_embed" not in keys
    assert "atm_head.weight" not in keys


def test_recipes_say_which_steps_they_are():
    a, b = RECIPES["stage2-1b"], RECIPES["stage2-6b"]
    assert a.stage2.mask_ratio == 0.8
    assert not a.stage2.frozen
    assert b.stage2.mask_ratio == 0.0
    assert b.stage2.frozen == ("vision_encoder",)
    assert a.data.clip.num_frames == a.model.num_frames == 4


# ---- ranks


def start(run_dir, ranks, **flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(tiny_stage2.Path(tiny_stage2.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, tiny_stage2.__file__, str(run_dir), json.dumps(flags)],
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


def losses_of(run_dir):
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"] for line in lines]


def test_two_ranks_train_to_the_losses_of_one(folder, tmp_path):
    for name in ("one", "gather", "ring"):
        write_vocabulary(tmp_path)
        flags = {"gather": name} if name != "one" else {}
        for process in start(tmp_path / name, 1 if name == "one" else 2, **flags):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    one = losses_of(tmp_path / "one")
    for name in ("gather", "ring"):
        two = losses_of(tmp_path / name)
        assert len(two) == len(one) == 4
        for row, other in zip(one, two, strict=True):
            assert row == pytest.approx(other, rel=2e-4, abs=2e-5)


def test_a_rank_that_dies_ends_the_run_with_its_error(tmp_path):
    write_vocabulary(tmp_path)
    first, second = start(tmp_path / "run", 2, die=1, steps=50)
    _, errors = second.communicate(timeout=60)
    assert second.returncode != 0
    assert "rank 1 dies" in errors
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
