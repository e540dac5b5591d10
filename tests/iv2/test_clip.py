from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace

import pytest
import tiny_stage2
import torch
import torch.nn.functional as F
from tiny_clip import CONFIG, TEXT_TINY, tiny_stage
from tiny_stage2 import VISION, RandomBatches, write_vocabulary

from iv2.config import ClipStageConfig
from iv2.models.clip import ClipModel, ClipModelConfig
from iv2.models.clip_text import ClipTextConfig, ClipTextEncoder
from iv2.models.clip_tokens import ClipTokenizer, clip_tokenizer
from iv2.models.text import PackedText
from iv2.models.vision import VisionEncoder, vision_config
from iv2.recipes import RECIPES
from iv2.stages.clip import build_clip_stage
from iv2kernels import contrastive_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


# ---- published structure


LAYER = {
    "pre_norm_mha.0.weight": (512,),
    "pre_norm_mha.0.bias": (512,),
    "pre_norm_mha.1.qkv_proj.weight": (1536, 512),
    "pre_norm_mha.1.qkv_proj.bias": (1536,),
    "pre_norm_mha.1.out_proj.weight": (512, 512),
    "pre_norm_mha.1.out_proj.bias": (512,),
    "pre_norm_ffn.0.weight": (512,),
    "pre_norm_ffn.0.bias": (512,),
    "pre_norm_ffn.1.weight": (2048, 512),
    "pre_norm_ffn.1.bias": (2048,),
    "pre_norm_ffn.4.weight": (512, 2048),
    "pre_norm_ffn.4.bias": (512,),
}
MOBILECLIP = {
    "embedding_layer.weight": (49408, 512),
    "positional_embedding.pos_embed.pos_embed": (1, 1, 77, 512),
    "final_layer_norm.weight": (512,),
    "final_layer_norm.bias": (512,),
    "projection_layer": (512, 512),
} | {f"transformer.{i}.{name}": shape for i in range(12) for name, shape in LAYER.items()}


@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [("clip-s", 384, 23.043840), ("clip-b", 768, 89.438976), ("clip-l", 1024, 308.929280)],
)
def test_published_names_and_shapes_of_the_small_models(name, width, millions):
    recipe = RECIPES[name]
    with torch.device("meta"):
        tower = ClipTextEncoder(recipe.clip.joint.text)
        model = ClipModel(recipe.model, tower, recipe.clip.joint)
    keys = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    vision = {n: s for n, s in keys.items() if n.startswith("vision_encoder.")}
    assert sum(torch.Size(s).numel() for s in vision.values()) == round(millions * 1e6)
    assert vision["vision_encoder.pos_embed"] == (1, 2049, width)
    assert not any("img_pos_embed" in n or "decoder" in n or "clip_pos" in n for n in vision)
    assert {n: s for n, s in keys.items() if n not in vision} == {
        "temp": (),
        "vision_align.0.weight": (768,),
        "vision_align.0.bias": (768,),
        "vision_align.1.weight": (512, 768),
        "vision_align.1.bias": (512,),
    } | {f"text_encoder.{n}": s for n, s in MOBILECLIP.items()}


class Tower(torch.nn.Module):
    """A text tower of a width alone."""

    embed_dim = 768


@pytest.mark.parametrize(
    ("name", "millions", "drop"), [("clip-1b", 1020.708608, 0.3), ("clip-6b", 5941.735168, 0.35)]
)
def test_published_vision_of_the_large_models(name, millions, drop):
    recipe = RECIPES[name]
    with torch.device("meta"):
        model = ClipModel(recipe.model, Tower(), recipe.clip.joint)
    keys = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert keys.pop("temp") == ()
    assert all(n.startswith("vision_encoder.") for n in keys)
    assert sum(torch.Size(s).numel() for s in keys.values()) == round(millions * 1e6)
    assert keys["vision_encoder.clip_projector.cross_attn.proj.weight"][0] == 768
    assert (recipe.model.drop_path, recipe.model.layer_scale) == (drop, 0.1)


def test_recipes_train_what_was_trained():
    for name in ("clip-1b", "clip-6b", "clip-s", "clip-b", "clip-l"):
        recipe = RECIPES[name]
        align = {"vision_align"} if name[-2] == "-" else set()
        assert set(recipe.clip.trained) == {"vision_encoder.clip_projector", "temp"} | align
        assert recipe.clip.joint.temperature == recipe.clip.joint.min_temperature == 0.01
        assert recipe.data.clip.num_frames == recipe.model.num_frames == 8
        assert (recipe.optim.lr, recipe.optim.weight_decay) == (4e-4, 0.2)
        assert recipe.optim.max_grad_norm == 0
    assert RECIPES["clip-s"].model.drop_path == 0
    assert RECIPES["clip-1b"].clip.max_tokens == 80
    assert RECIPES["clip-6b"].optim.epochs == 1


# ---- the small text tower


def naive_features(state, captions, config):
    """CLIP's text transformer on padded captions, in plain PyTorch."""
    length = config.max_positions
    ids = torch.tensor([[*c, *[0] * (length - len(c))] for c in captions])
    x = state["embedding_layer.weight"][ids]
    x = x + state["positional_embedding.pos_embed.pos_embed"][0]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i in range(config.depth):
        at = f"transformer.{i}.pre_norm"
        qkv = linear(norm(x, f"{at}_mha.0"), f"{at}_mha.1.qkv_proj")
        q, k, v = (
            part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        o = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(o.transpose(1, 2).flatten(2), f"{at}_mha.1.out_proj")
        hidden = F.gelu(linear(norm(x, f"{at}_ffn.0"), f"{at}_ffn.1"))
        x = x + linear(hidden, f"{at}_ffn.4")
    last = norm(x, "final_layer_norm")[torch.arange(len(ids)), ids.argmax(1)]
    return last @ state["projection_layer"]


def packed(captions):
    lengths = torch.tensor([0, *map(len, captions)])
    ids = torch.tensor([i for c in captions for i in c])
    return PackedText(ids, lengths.cumsum(0).int(), int(lengths.max()))


@torch.no_grad()
def randomize(module):
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.copy_(0.4 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_small_tower_is_the_naive_one_in_float64(checkpoint):
    config = replace(TEXT_TINY, checkpoint=checkpoint)
    tower = ClipTextEncoder(config)
    randomize(tower)
    tower.double()
    end = config.vocab_size - 1  # the highest number, as published
    captions = [[62, 5, 9, end], [62, end], [62, *range(1, 31), end]]
    state = {n: p.detach().clone().requires_grad_() for n, p in tower.state_dict().items()}
    expected = naive_features(state, captions, config)
    found = tower(packed(captions))
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, p in tower.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_the_small_tower_sees_order_and_every_token(folder):
    tower = ClipTextEncoder(TEXT_TINY, clip_tokenizer(folder))
    text = tower.tokenizer.encode(["red bar", "bar red", "green bar"], 32)
    a, b, c = tower(text)
    assert not torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(a, c, atol=1e-4)


# ---- tokens

MERGES = [("r", "e"), ("re", "d</w>"), ("b", "a")]


def write_merges(folder, kind):
    """The same byte pairs in each form that is read."""
    folder.mkdir()
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    published = '"bpe_simple_vocab_16e6.txt#version: 0.2\n' + lines
    if kind == "gz":
        with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
            file.write(published)
    elif kind == "txt":
        (folder / "bpe_simple_vocab_16e6.txt").write_text(published, encoding="utf-8")
    else:
        write_merges(folder / "source", "txt")
        made = ClipTokenizer(folder / "source")._tokenizer
        if kind == "json":
            made.save(str(folder / "tokenizer.json"))
        else:
            vocabulary = json.dumps(made.get_vocab())
            (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
            (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["txt", "gz", "pair", "json"])
def test_byte_pairs(kind, tmp_path):
    tokenizer = clip_tokenizer(write_merges(tmp_path / "a", kind))
    assert tokenizer.vocab_size == 512 + len(MERGES) + 2
    start, end = 512 + len(MERGES), 513 + len(MERGES)
    text = tokenizer.encode(["Red  BAR!", "a's 12", "", "é"], 77)
    rows = [text.ids[a:b].tolist() for a, b in text.cu_seqlens.unfold(0, 2, 1).tolist()]
    letter = {c: ord(c) - ord("!") for c in "!abrs'12"}
    assert rows == [
        [start, 513, 514, 256 + letter["r"], 256 + letter["!"], end],
        # 320 is a word's "a" in the published vocabulary, too
        [start, 320, letter["'"], 256 + letter["s"], 256 + letter["1"], 256 + letter["2"], end],
        [start, end],
        [start, 0xC3 - 0xAE + 106, 256 + 0xA9 - 0xA1 + 94, end],  # two bytes, printable themselves
    ]
    cut = tokenizer.encode(["red red red red"], 4)
    assert cut.ids.tolist() == [start, 513, 513, end]
    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "b")
    again = clip_tokenizer(tmp_path / "b").encode(["Red  BAR!"])
    assert again.ids.tolist() == rows[0]


def test_token_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"folder must hold tokenizer\.json, vocab"):
        clip_tokenizer(tmp_path)
    tokenizer = ClipTokenizer(write_merges(tmp_path / "a", "txt"))
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(ValueError, match="captions must be at least one, got none"):
        tokenizer.encode([])
    write_merges(tmp_path / "b", "pair")
    (tmp_path / "b" / "vocab.json").write_text('{"r": 0, "e": 1, "re": 2}')
    (tmp_path / "b" / "merges.txt").write_text("r e\n")
    with pytest.raises(ValueError, match=r"vocabulary must have <\|startoftext\|>"):
        ClipTokenizer(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"pip install iv2\[stage2\]"):
        ClipTokenizer(tmp_path / "a")


# ---- the model


def test_video_features_are_pooled_aligned_and_of_length_one(folder):
    model = tiny_stage(folder).model.double().eval()
    video = RandomBatches(3).batch(range(3))["video"].double()
    with torch.no_grad():
        pooled = model.vision_encoder(video).pooled
        aligned = F.linear(
            F.layer_norm(pooled, (16,)), model.vision_align[1].weight, model.vision_align[1].bias
        )
        found = model.encode_video(video)
    assert found.dtype == torch.float32
    assert found.shape == (3, 24)
    torch.testing.assert_close(found, F.normalize(aligned, dim=1).float())
    plain = ClipModel(VISION, Narrow(), replace(CONFIG.joint, align=False)).double()
    assert not hasattr(plain, "vision_align")
    plain.vision_encoder.load_state_dict(model.vision_encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_video(video), F.normalize(pooled, dim=1).float())


class Narrow(Tower):
    embed_dim = 16


def test_an_image_takes_the_mean_of_the_table_over_time(folder):
    model = tiny_stage(folder).model.double().eval()
    vision = model.vision_encoder
    randomize(vision)
    image = RandomBatches(2).batch(range(2), "image")["video"].double()
    single = VisionEncoder(replace(VISION, num_frames=1)).double()
    state = vision.state_dict()
    table = state["pos_embed"]
    body = table[:, 1:].unflatten(1, (4, -1)).mean(1)
    single.load_state_dict(state | {"pos_embed": torch.cat([table[:, :1], body], 1)})
    with torch.no_grad():
        expected = F.normalize(model.vision_align(single(image).pooled), dim=1)
        torch.testing.assert_close(model.encode_video(image), expected.float())


def test_model_errors(folder):
    joint = CONFIG.joint
    with pytest.raises(ValueError, match="attn_pool_num_heads must be positive, got 0"):
        ClipModel(replace(VISION, attn_pool_num_heads=0), ClipTextEncoder(TEXT_TINY), joint)
    with pytest.raises(ValueError, match="clip_embed_dim must be the text tower's 24 without"):
        ClipModel(VISION, ClipTextEncoder(TEXT_TINY), replace(joint, align=False))
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 30"):
        ClipTextConfig(embed_dim=30)
    tokenizer = clip_tokenizer(folder)
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's"):
        ClipTextEncoder(replace(TEXT_TINY, vocab_size=8), tokenizer)
    with pytest.raises(ValueError, match="tokenizer must be given for captions, got None"):
        _ = ClipTextEncoder(TEXT_TINY).tokenizer
    with pytest.raises(ValueError, match="text must be at most 32 tokens long, got 40"):
        ClipTextEncoder(TEXT_TINY)(packed([[1] * 40]))


# ---- the stage


def test_the_loss_is_the_contrastive_one(folder):
    stage = tiny_stage(folder).double()
    batch = RandomBatches(5).batch(range(5))
    batch["video"] = batch["video"].double()
    batch["ids"][3] = batch["ids"][1]
    losses = stage.eval()(batch)
    assert list(losses) == list(stage.loss_weights) == ["vision_visual.vtc"]
    with torch.no_grad():
        v = stage.model.encode_video(batch["video"])
        captions = [tiny_stage2.caption(i) for i in range(5)]
        t = stage.model.encode_text(stage.tokenizer.encode(captions, 32))
        s = v @ t.T / stage.model.temp
        same = (batch["ids"][:, None] == batch["ids"]).float()
        target = same / same.sum(1, keepdim=True)
        expected = -(target * (s.log_softmax(1) + s.T.log_softmax(1))).sum(1).mean() / 2
    torch.testing.assert_close(losses["vision_visual.vtc"].double(), expected.double())
    torch.testing.assert_close(
        losses["vision_visual.vtc"], contrastive_loss(v, t, stage.model.temp, ids=batch["ids"])
    )


@pytest.mark.parametrize(
    "trained",
    [
        CONFIG.trained,
        ("vision_encoder.clip_projector", "temp"),
        ("vision_encoder", "text_encoder.projection_layer"),
        ("*.clip_projector.*_bias", "vision_align.1.weight"),
    ],
)
def test_only_what_is_trained_gets_gradients(folder, trained):
    stage = tiny_stage(folder, trained=trained).train()
    blocks, layers = [], []
    stage.model.vision_encoder.blocks[1].register_forward_hook(
        lambda *_: blocks.append(torch.is_grad_enabled())
    )
    stage.model.text_encoder.transformer[1].register_forward_hook(
        lambda *_: layers.append(torch.is_grad_enabled())
    )
    sum(stage(RandomBatches(4).batch(range(4))).values()).backward()
    wanted = {
        CONFIG.trained: lambda n: not n.startswith("vision_encoder.") or "clip_projector" in n,
        ("vision_encoder.clip_projector", "temp"): lambda n: "clip_projector" in n or n == "temp",
        ("vision_encoder", "text_encoder.projection_layer"): lambda n: (
            n.startswith("vision_encoder.") or n.endswith("projection_layer")
        ),
        ("*.clip_projector.*_bias", "vision_align.1.weight"): lambda n: (
            n.endswith(("q_bias", "k_bias", "v_bias")) or n == "vision_align.1.weight"
        ),
    }[trained]
    for name, p in stage.model.named_parameters():
        assert (p.grad is not None) == wanted(name), name
        assert (name in stage.elsewhere) == (not wanted(name)), name
    # nothing of a frozen part is kept for backward
    assert blocks == ["vision_encoder" in trained]
    assert layers == [any(name.startswith("text_encoder") for name in trained)]


def test_frozen_towers_are_in_evaluation_mode(folder):
    frozen_text = tiny_stage(folder, trained=("vision_encoder.clip_projector",)).train()
    assert not frozen_text.model.text_encoder.training
    assert frozen_text.model.vision_encoder.training
    frozen_vision = tiny_stage(folder, trained=("text_encoder",)).train()
    assert frozen_vision.model.text_encoder.training
    assert not frozen_vision.model.vision_encoder.training
    assert not frozen_vision.eval().model.text_encoder.training


def test_drop_path_of_the_frozen_blocks_is_on_while_the_head_is_trained(folder):
    config = replace(CONFIG, tokenizer=str(folder))
    stage = build_clip_stage(replace(VISION, drop_path=0.9, layer_scale=1.0), config)
    batch = RandomBatches(6).batch(range(6))
    seen = [stage.train().see(batch, {"vision"}).features["vision"] for _ in range(2)]
    torch.testing.assert_close(seen[0], seen[1])  # keyed by the seeds
    unmasked = stage.eval().see(batch, {"vision"}).features["vision"]
    assert not torch.allclose(seen[0], unmasked, atol=1e-3)


def test_the_temperature_has_a_lower_bound(folder):
    stage = tiny_stage(folder).train()
    batch = RandomBatches(3).batch(range(3))
    for value, kept in ((1e-4, 0.01), (-1.0, 0.01), (0.3, 0.3)):
        with torch.no_grad():
            stage.model.temp.fill_(value)
        stage(batch)
        assert stage.model.temp.item() == pytest.approx(kept)
    with torch.no_grad():
        stage.model.temp.fill_(0.005)
    stage.eval()(batch)
    assert stage.model.temp.item() == pytest.approx(0.005)


def test_training_reads_paraphrases_and_tests_do_not(folder, monkeypatch):
    stage = tiny_stage(folder)
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


def test_the_loss_is_over_the_ranks_as_configured(folder, monkeypatch):
    from iv2.stages import clip

    seen = []

    def look(v, t, *_, ids, mode, grad_mode):
        seen.append((isinstance(t, torch.Tensor), mode, grad_mode))
        return v.sum()

    monkeypatch.setattr(clip, "contrastive_loss", look)
    batch = RandomBatches(2).batch(range(2))
    for mode, grad_mode in (("gather", "exact"), ("ring", "upstream"), ("local", "exact")):
        tiny_stage(folder, gather=mode, grad_mode=grad_mode)(batch)
    # gathered features travel while the video encoder runs
    assert seen == [
        (False, "gather", "exact"),
        (True, "ring", "upstream"),
        (True, "local", "exact"),
    ]


def test_stage_errors(folder):
    with pytest.raises(ValueError, match="trained must name parts of the model, got nothing"):
        tiny_stage(folder, trained=("temp", "nothing"))
    with pytest.raises(ValueError, match="trained must name at least one module, got none"):
        ClipStageConfig(trained=())
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        ClipStageConfig(max_tokens=1)
    with pytest.raises(ValueError, match="max_tokens must be at most max_positions 77, got 80"):
        ClipStageConfig(max_tokens=80)
    with pytest.raises(ValueError, match="tokenizer must be a folder with a vocabulary, got no"):
        build_clip_stage(VISION, CONFIG)
    stage = tiny_stage(folder)
    batch = RandomBatches(3).batch(range(3))
    with pytest.raises(ValueError, match="media must be vision, got audio, vision"):
        stage.see(batch, {"vision", "audio"})
    with pytest.raises(ValueError, match="media must be vision, got audio"):
        stage(RandomBatches(2).batch(range(2), "audio"))
    del batch["captions"][2]["visual"]
    with pytest.raises(ValueError, match=r"captions must have the kind visual, got .*: clip2.mp4"):
        stage(batch)


def test_vision_presets_of_clip_are_those_of_the_recipes():
    assert vision_config("1b", "clip", drop_path=0.3) == RECIPES["clip-1b"].model
    assert ClipModelConfig().temperature == 0.01
