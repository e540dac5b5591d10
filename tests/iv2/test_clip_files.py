"""The files of CLIP models, and the language model as a text tower."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import CONFIG, TEXT_TINY, write_language_model
from tiny_stage2 import VISION, RandomBatches, write_vocabulary

from iv2.checkpoint import CheckpointError, save_weights
from iv2.models.clip import ClipModel, ClipModelConfig, build_clip
from iv2.models.clip_files import load_clip
from iv2.models.clip_text import ClipTextEncoder
from iv2.models.llama_text import LlamaTextConfig, LlamaTextEncoder, LlamaTokenizer
from iv2.models.positions import resize_table
from iv2.models.vision import VisionEncoder
from iv2.stages.clip import build_clip_stage

LLAMA = LlamaTextConfig(out_dim=16, lora_rank=2, lora_alpha=4)
EIGHT = replace(VISION, num_frames=8)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def randomize(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
    return module


def fresh(vision=EIGHT):
    torch.manual_seed(0)
    return ClipModel(vision, ClipTextEncoder(TEXT_TINY), CONFIG.joint)


def write(path, state):
    save_weights(state, path)
    return path


def under(prefix, module):
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


# ---- the union of files


@pytest.fixture
def files(tmp_path):
    """A file of stage 2 with 4 frames, one of MobileCLIP, and one of what CLIP trained."""
    decoders = {"clip_return_layer": 1, "clip_teacher_embed_dim": 8, "clip_teacher_final_dim": 8}
    stage2 = replace(VISION, sep_image_video_pos_embed=True, **decoders)
    vision = randomize(VisionEncoder(stage2), 1)
    text = randomize(ClipTextEncoder(TEXT_TINY), 2)
    trained = randomize(fresh(), 3)
    others = {"temp": torch.tensor(0.07), "text_encoder.bert.x": torch.ones(2)}
    own = ("vision_encoder.clip_projector.", "vision_align.", "temp")
    state = trained.state_dict()
    return {
        "vision": write(tmp_path / "stage2.pt", under("vision_encoder.", vision) | others),
        "text": write(
            tmp_path / "mobileclip.pt",
            under("text_encoder.", text) | {"image_encoder.a": torch.ones(1)},
        ),
        "clip": write(
            tmp_path / "clip.safetensors", {n: t for n, t in state.items() if n.startswith(own)}
        ),
        "modules": (vision, text, trained),
    }


def test_three_files_make_a_model(files):
    vision, text, trained = files["modules"]
    model = fresh()
    report = load_clip(model, vision=files["vision"], text=files["text"], clip=("", files["clip"]))
    state = model.state_dict()
    assert report.missing == ()
    assert set(report.loaded) == set(state)
    for name, tensor in vision.state_dict().items():
        if name == "pos_embed":
            tensor = resize_table(tensor, (4, 2, 2), (8, 2, 2), cls_row=True)
            assert tensor.shape[1] == 1 + 8 * 4
        if f"vision_encoder.{name}" in state and not name.startswith("clip_projector"):
            assert torch.equal(state[f"vision_encoder.{name}"], tensor), name
    for name, tensor in text.state_dict().items():
        assert torch.equal(state[f"text_encoder.{name}"], tensor), name
    for name, tensor in trained.state_dict().items():
        if name.startswith(("vision_encoder.clip_projector.", "vision_align.", "temp")):
            assert torch.equal(state[name], tensor), name
    assert list(report.reshaped) == ["vision_encoder.pos_embed"]
    assert "vision_encoder.clip_decoder.0.head.weight" in report.unexpected


def test_a_fine_tuned_file_gives_the_encoder_and_its_pooling_head(files, tmp_path):
    tuned = randomize(VisionEncoder(replace(EIGHT, num_classes=3)), 7)
    path = tmp_path / "S14_ft_k710_f8.pth"
    torch.save({"module": tuned.state_dict()}, path)
    model = fresh()
    before = model.vision_align[1].weight.clone()
    align = [n for n in model.state_dict() if n.startswith("vision_align") or n == "temp"]
    report = load_clip(model, vision=path, text=files["text"], may_be_fresh=align)
    assert sorted(report.missing) == sorted(align)
    assert sorted(report.unexpected)[-4:] == [
        "vision_encoder.fc_norm.bias",
        "vision_encoder.fc_norm.weight",
        "vision_encoder.head.bias",
        "vision_encoder.head.weight",
    ]
    for name, tensor in model.vision_encoder.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name
    assert torch.equal(model.vision_align[1].weight, before)


def test_what_is_in_no_file_is_named(files):
    model = fresh()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"stage2\.pt, .*clip\.safetensors must fit the model .*"):
        load_clip(model, vision=files["vision"], clip=(files["clip"],))
    with pytest.raises(ValueError, match=r"29 are missing: .*text_encoder\.") as error:
        load_clip(model, vision=files["vision"], clip=(files["clip"],))
    assert "vision_" not in str(error.value).split("missing")[1]
    # the temperature of stage 2 is not that of CLIP
    with pytest.raises(ValueError, match=r"5 are missing: temp, vision_align"):
        load_clip(model, vision=files["vision"], text=files["text"])
    with pytest.raises(ValueError, match="nothing must fit the model"):
        load_clip(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_file_without_use_is_an_error(files, tmp_path):
    model = fresh()
    with pytest.raises(
        ValueError, match=r"text must hold tensors of the model, got none in .*clip"
    ):
        load_clip(model, vision=files["vision"], text=files["clip"])
    other = write(tmp_path / "other.pt", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="clip must hold tensors of the model, got none"):
        load_clip(model, vision=files["vision"], text=files["text"], clip=(other,))
    with pytest.raises(CheckpointError, match=r"gone\.pt: cannot be read"):
        load_clip(model, vision=tmp_path / "gone.pt")


def test_a_fresh_parameter_may_be_absent_and_not_of_another_size(files, tmp_path):
    model = fresh()
    wrong = write(tmp_path / "wrong.pt", {"vision_align.1.weight": torch.ones(24, 15)})
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"vision_align.1.weight must be \[24, 16\], got \[24, 15"):
        load_clip(
            model, vision=files["vision"], text=files["text"], clip=(wrong,), may_be_fresh=names
        )


def test_towers_that_are_frozen_need_their_files(files, vocabulary):
    config = replace(
        CONFIG,
        tokenizer=str(vocabulary),
        trained=("vision_encoder.clip_projector", "vision_align", "temp"),
        vision_init=str(files["vision"]),
    )
    stage = build_clip_stage(EIGHT, config)
    with pytest.raises(ValueError, match=r"29 are missing: .*text_encoder\."):
        stage.load_towers()
    stage = build_clip_stage(EIGHT, replace(config, text_init=str(files["text"])))
    report = stage.load_towers()
    assert set(report.missing) == {
        n for n in stage.model.state_dict() if n.startswith(("vision_align.", "temp"))
    }


# ---- the language model


def test_a_folder_of_transformers_is_read(language_model):
    import transformers

    expected = transformers.AutoModelForCausalLM.from_pretrained(language_model).double().eval()
    model = ClipModel(VISION, LlamaTextEncoder(LLAMA, language_model), ClipModelConfig())
    free = [n for n in model.state_dict() if not n.startswith("text_encoder.transformer.")]
    free += [n for n in model.state_dict() if "lora_" in n]
    load_clip(model, text=language_model, may_be_fresh=free)
    tower = model.text_encoder.double().eval()
    text = tower.tokenizer.encode(["red bar", "green cross left bar bar", ""], 7)
    rows = [[1, 3, 4, 5, 7, 2], [1, 3, 4, 6, 8, 9, 2], [1, 3, 4, 2]]
    assert text.ids.tolist() == [i for row in rows for i in row]
    found = tower(text)
    for row, feature in zip(rows, found, strict=True):
        hidden = expected.model(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(feature, (hidden @ tower.text_projection)[0, -1])


def peft_names(state):
    """Names as older and newer versions of peft save them, and as adapters alone are saved."""
    old = {n.replace(".base_layer.", "."): t for n, t in state.items()}
    inside = {n: t for n, t in state.items() if n.startswith("transformer.")}
    whole = {f"base_model.model.model.{n.split('.', 1)[1]}": t for n, t in inside.items()}
    return {
        "new": state,
        "old": old,
        "released": {f"text_encoder.{n}": t for n, t in old.items()},
        "peft": whole | {"text_projection": state["text_projection"]},
        "adapter": {
            n.replace(".default.", ".").replace(".base_layer.", "."): t for n, t in whole.items()
        }
        | {"text_projection": state["text_projection"]},
    }


@pytest.mark.parametrize("kind", ["new", "old", "released", "peft", "adapter"])
def test_both_namings_of_peft_load(language_model, kind, tmp_path):
    source = randomize(LlamaTextEncoder(LLAMA, language_model), 4)
    names = peft_names(source.state_dict())
    if kind != "new":
        assert set(names[kind]) != set(names["new"])
    path = write(tmp_path / "text.pt", names[kind] | {"lm_head.weight": torch.ones(2)})
    model = ClipModel(VISION, LlamaTextEncoder(LLAMA, language_model), ClipModelConfig())
    free = [n for n in model.state_dict() if not n.startswith("text_encoder.")]
    as_clip = kind == "released"
    files = {"clip": (path,)} if as_clip else {"text": path}
    report = load_clip(model, **files, may_be_fresh=free)
    assert len(report.loaded) == len(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.text_encoder.state_dict()[name], tensor), name


def test_lora_is_trained_by_its_name_and_drops_out_only_then(language_model):
    joint = ClipModelConfig(llama=replace(LLAMA, lora_dropout=0.5))
    config = replace(CONFIG, joint=joint, tokenizer=str(language_model), trained=("*.lora_?.*",))
    stage = build_clip_stage(VISION, config)
    randomize(stage.model.text_encoder, 6)
    text = stage.tokenizer.encode(["red bar", "green cross"], 20)
    stage.train()
    torch.manual_seed(0)
    first, second = (stage.model.encode_text(text) for _ in range(2))
    assert not torch.allclose(first, second)
    stage.eval()
    assert torch.equal(stage.model.encode_text(text), stage.model.encode_text(text))
    stage.train()
    batch = RandomBatches(4).batch(range(4))
    sum(stage(batch).values()).backward()
    for name, p in stage.model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
    frozen = build_clip_stage(VISION, replace(config, trained=("temp",))).train()
    randomize(frozen.model.text_encoder, 6)
    assert torch.equal(frozen.model.encode_text(text), frozen.model.encode_text(text))


def test_lora_adds_a_product_of_low_rank(language_model):
    tower = randomize(LlamaTextEncoder(LLAMA, language_model), 8).double().eval()
    text = tower.tokenizer.encode(["red bar", "left"], 20)
    plain = LlamaTextEncoder(replace(LLAMA, lora_rank=0), language_model).double().eval()
    state = {n.replace(".base_layer.", "."): t for n, t in tower.state_dict().items()}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            at = f"transformer.layers.{layer}.self_attn.{name}"
            a, b = (state.pop(f"{at}.lora_{x}.default.weight") for x in "AB")
            state[f"{at}.weight"] = state[f"{at}.weight"] + LLAMA.lora_alpha / 2 * b @ a
    plain.load_state_dict(state)
    torch.testing.assert_close(tower(text), plain(text))


def test_rotary_frequencies_stay_exact_in_bfloat16(language_model):
    tower = LlamaTextEncoder(LLAMA, language_model)
    exact = {n: b.clone() for n, b in tower.named_buffers()}
    assert exact
    tower.to(torch.bfloat16)
    assert tower.text_projection.dtype == torch.bfloat16
    for name, buffer in tower.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, exact[name]), name
    assert tower(tower.tokenizer.encode(["red bar"], 20)).dtype == torch.bfloat16


def test_a_run_keeps_the_folder_beside_its_own_config(language_model, tmp_path):
    (tmp_path / "config.json").write_text("that of the run")
    joint = ClipModelConfig(llama=LLAMA)
    tower = build_clip(VISION, joint, language_model).text_encoder
    tower.tokenizer.save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "that of the run"
    again = build_clip(VISION, joint, tmp_path).text_encoder
    captions = ["red bar", "left"]
    assert torch.equal(
        again.tokenizer.encode(captions, 20).ids, tower.tokenizer.encode(captions, 20).ids
    )
    assert again.tokenizer.prompt == "summarize:"


def test_language_model_errors(language_model, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(FileNotFoundError, match=r"folder must hold config\.json and a tokenizer"):
        LlamaTextEncoder(LLAMA, tmp_path)
    with pytest.raises(ValueError, match="captions must be at least one, got none"):
        LlamaTokenizer(language_model).encode([])
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoConfig.from_pretrained(language_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there must be an end-of-text token, got none"):
        LlamaTokenizer(tmp_path)
    for package in ("peft", "transformers"):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            with pytest.raises(RuntimeError, match=r"pip install iv2\[clip\]"):
                LlamaTextEncoder(LLAMA, language_model)


def test_text_of_the_language_model_is_compared_with_video(language_model):
    joint = ClipModelConfig(llama=LLAMA)
    trained = ("vision_encoder.clip_projector", "temp")
    config = replace(
        CONFIG, joint=joint, tokenizer=str(language_model), trained=trained, max_tokens=80
    )
    stage = build_clip_stage(VISION, config).train()
    batch = RandomBatches(3).batch(range(3))
    stage(batch)["vision_visual.vtc"].backward()
    assert {n for n, p in stage.model.named_parameters() if p.grad is None} == stage.elsewhere
    assert not stage.model.text_encoder.training
    features = stage.model.encode_text(stage.tokenizer.encode(["red", "bar"], 80))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert F.cosine_similarity(features[:1], features[1:]) < 0.9999
