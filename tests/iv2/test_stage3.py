"""Stage 3: the loss against full logits, what is trained, files, and the published names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_stage2 import VISION
from tiny_stage3 import CONFIG, batch_of, said, tiny_stage, write_language_model

from iv2.checkpoint import load_checkpoint, save_weights
from iv2.models import language
from iv2.models.language import LanguageConfig, base, build_language
from iv2.models.qformer import QFORMER
from iv2.models.stage3 import VideoChatModel, load_video_chat, trunk_config
from iv2.models.vision import VisionEncoder, vision_config
from iv2kernels import Packed, attention

ROUNDS = said("red bar", "green cross", "up", "left", system="blue")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("lm"))


def cross_entropy(stage, batch):
    """Sample by sample without padding: transformers' logits of everything, float32."""
    total, count = torch.zeros(()), 0
    views = None if "video" not in batch else batch["video"][:, None]
    for i, messages in enumerate(batch["messages"]):
        tokens = stage.conversation.tokens(messages, 0 if views is None else 1)
        ids = torch.tensor([tokens.ids])
        embeds = base(stage.model.lm).get_input_embeddings()(ids)
        if views is not None:
            video = stage.see(views[i : i + 1], [messages])
            assert len(video) == 1
            place = tokens.in_video.index(True)
            embeds = torch.cat(
                [embeds[:, :place], video, embeds[:, place + video.shape[1] :]], dim=1
            )
        logits = stage.model.lm(inputs_embeds=embeds).logits[0]
        for j in range(1, len(tokens)):
            if tokens.is_answer[j]:
                total = total + F.cross_entropy(logits[j - 1 : j], ids[0, j : j + 1])[None].sum()
                count += 1
    return total / count


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_the_loss_is_that_of_the_full_logits(folder, lm_folder, monkeypatch, video, trained):
    monkeypatch.setattr(language, "_LOGIT_ROWS", 4)
    stage = (
        tiny_stage(folder)
        if trained == "full"
        else tiny_stage(lm_folder, weights="pretrained", trained="lora", lora_dropout=0.0)
    ).eval()
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_B" in name:  # they start at zero: then LoRA of the head would not show
                parameter.normal_(std=0.3)
    batch = batch_of(ROUNDS, said("up", "down"), said("bar", "red green blue left"), video=video)
    loss = stage(batch)["next_token"]
    wanted = cross_entropy(stage, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    named = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    expected = torch.autograd.grad(wanted, list(named.values()), allow_unused=True)
    some = 0
    for name, a, b in zip(named, found, expected, strict=True):
        if b is None:
            assert a is None or not a.any(), name
            continue
        some += 1
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6, msg=name)
    assert some > (30 if video else 10)


def test_the_video_matters_and_each_row_sees_its_own(folder):
    stage = tiny_stage(folder).eval()
    batch = batch_of(said("up", "down"), said("up", "down"))
    one = stage(batch)["next_token"]
    other = {**batch, "video": batch["video"].flip(0)}
    torch.testing.assert_close(stage(other)["next_token"], one)  # two equal rows change places
    other["video"] = 255 - batch["video"]
    assert (stage(other)["next_token"] - one).abs() > 1e-5


def test_what_is_asked_does_not_count(lm_folder):
    """Gradients of the head reach what is predicted for answers alone."""
    stage = tiny_stage(lm_folder, weights="fresh").eval()
    stage(batch_of(ROUNDS))["next_token"].backward()
    tokenizer = stage.language_tokenizer
    learnt = set(tokenizer.convert_tokens_to_ids(["green", "cross", "left", "<|end|>"]))
    grad = stage.model.lm.lm_head.weight.grad
    hidden_rows = grad.abs().sum(1)
    # the softmax pushes every word down; the learnt ones alone are pulled up somewhere
    others = [i for i in range(len(hidden_rows)) if i not in learnt]
    assert hidden_rows[sorted(learnt)].min() > hidden_rows[others].max()


def test_only_what_is_named_gets_gradients(folder, lm_folder):
    layers = ("q_proj", "lm_head")
    config = replace(CONFIG, frozen=("vision_encoder", "query_tokens"))
    stage = tiny_stage(
        lm_folder, config, weights="pretrained", trained="lora", lora_layers=layers
    ).train()
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    stage(batch_of(ROUNDS))["next_token"].backward()
    model = stage.model
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    lora = {n for n in with_grad if n.startswith("lm.")}
    assert lora == {
        f"lm.base_model.model.{part}.lora_{x}.default.weight"
        for part in (
            *(f"model.layers.{i}.self_attn.q_proj" for i in range(2)),
            "lm_head",
        )
        for x in "AB"
    }
    assert all(model.get_parameter(n).grad.any() for n in lora)
    rest = with_grad - lora
    assert not any(n.startswith(("vision_encoder.", "query_tokens")) for n in rest)
    assert {"extra_query_tokens", "project_up.weight", "vision_layernorm.weight"} <= rest
    assert not model.vision_encoder.training
    assert model.qformer.training
    assert model.lm.training
    # the frozen language model is in evaluation mode, and hands gradients on
    stage = tiny_stage(lm_folder, weights="pretrained", trained="frozen").train()
    assert not stage.model.lm.training
    stage(batch_of(ROUNDS))["next_token"].backward()
    assert all(p.grad is None for p in stage.model.lm.parameters())
    assert stage.model.vision_encoder.cls_token.grad.any()
    assert stage.elsewhere == {n for n in stage.model.state_dict() if n.startswith("lm.")}
    assert not tiny_stage(folder, trained="frozen").elsewhere  # it is nowhere else


def test_fresh_queries_differ_and_have_tame_gradients(folder):
    stage = tiny_stage(folder).eval()
    queries = torch.cat([stage.model.query_tokens, stage.model.extra_query_tokens], 1)[0]
    assert torch.cdist(queries, queries).fill_diagonal_(1.0).min() > 0.01
    stage(batch_of(ROUNDS))["next_token"].backward()
    assert 0 < stage.model.extra_query_tokens.grad.norm() < 100


def test_a_frozen_encoder_keeps_nothing(folder):
    stage = tiny_stage(folder, replace(CONFIG, frozen=("vision_encoder",))).train()
    seen = []
    stage.model.vision_encoder.register_forward_hook(lambda m, i, o: seen.append(o.tokens))
    stage(batch_of(ROUNDS))
    assert not seen[0].requires_grad
    with pytest.raises(ValueError, match="frozen must name parts of the model but lm, got lm"):
        tiny_stage(folder, replace(CONFIG, frozen=("lm",)))


def test_tiles_have_their_own_spans(folder):
    stage = tiny_stage(folder, replace(CONFIG, tiles=6)).eval()
    batch = batch_of(ROUNDS, said("up", "down"), size=56)
    seen = []
    stage.model.vision_encoder.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape))
    loss = stage(batch)["next_token"]
    assert seen == [(2 * 5, 4, 28, 28, 3)]
    assert stage.conversation.tokens(ROUNDS, 5).in_video.count(True) == 5 * 5
    # the order of the embeddings: samples, then views
    flat, counts = stage._views(batch)
    assert counts == [5, 5]
    views = flat.unflatten(0, (2, 5))
    one = stage.see(views, batch["messages"])
    alone = stage.see(views[1:, 2:3], batch["messages"][1:])
    torch.testing.assert_close(one[7:8], alone, rtol=1e-4, atol=1e-5)
    assert loss.isfinite()
    with pytest.raises(TypeError, match=r"uint8 to be cut into tiles .*float32"):
        stage({**batch, "video": batch["video"].float()})


def test_long_conversations_are_skipped_with_a_word(folder):
    stage = tiny_stage(folder, replace(CONFIG, max_tokens=16)).eval()
    batch = batch_of(said("up", "down"), said("up", " ".join(["left"] * 20)))
    batch["unusable"] = {}
    with pytest.warns(UserWarning, match=r"clip1\.mp4 is skipped: .* at most 16 tokens, got 32"):
        loss = stage(batch)["next_token"]
    assert set(stage.skipped) == {"clip1.mp4"}
    assert batch["unusable"] == {1: stage.skipped["clip1.mp4"]}  # for the list of the run
    first = {**batch_of(said("up", "down")), "video": batch["video"][:1]}
    torch.testing.assert_close(loss, stage(first)["next_token"])
    # early rounds are left out and counted
    stage(batch_of(said("up", "down", "red", "bar", "left", "right")))
    assert stage.dropped_rounds == 2
    with pytest.warns(UserWarning, match="clip0"):
        nothing = stage(batch_of(said("up", " ".join(["left"] * 20))))["next_token"]
    assert nothing == 0
    nothing.backward()
    with pytest.raises(ValueError, match=r"clip0\.mp4: Stage3: messages must hold an answer"):
        stage(batch_of(said("up")))
    with pytest.raises(ValueError, match=r"clip0\.mp4: Conversation: roles"):
        stage(batch_of(said()))


def test_the_q_former_reads_what_it_is_told(folder):
    told = replace(CONFIG, instruction="question", qformer_tokenizer=str(folder))
    stage = tiny_stage(folder, told).eval()
    batch = batch_of(said("up", "down"))
    views = batch["video"][:, None]
    a, b = (stage.see(views, [said(q, "down")]) for q in ("up", "red bar"))
    assert (a - b).abs().max() > 1e-5
    plain = tiny_stage(folder).eval()
    a, b = (plain.see(views, [said(q, "down")]) for q in ("up", "red bar"))
    assert torch.equal(a, b)
    # the end of a long one is kept
    text = stage._instructions([said("up " * 700 + "red", "down")], [1])
    assert text.max_seqlen == 512
    ids = {n: stage.words._tokenizer.token_to_id(n) for n in ("[CLS]", "red", "[SEP]")}
    assert [text.ids[0], *text.ids[-2:]] == [ids["[CLS]"], ids["red"], ids["[SEP]"]]
    system = tiny_stage(folder, replace(told, instruction="system"))
    text = system._instructions([said("up", "down", system="red"), said("up", "down")], [2, 1])
    assert text.cu_seqlens.tolist() == [0, 3, 6, 8]
    with pytest.raises(ValueError, match="qformer_tokenizer must be a folder"):
        tiny_stage(folder, replace(told, qformer_tokenizer=""))


def test_the_trunk_is_all_but_the_last_block():
    torch.manual_seed(0)
    whole = VisionEncoder(vision_config("tiny", depth=3, drop_path=0.2)).eval()
    config = trunk_config(whole.config)
    trunk = VisionEncoder(config).eval()
    found = trunk.load_state_dict(whole.state_dict(), strict=False)
    assert not found.missing_keys
    assert all(n.startswith(("blocks.2.", "clip_projector.")) for n in found.unexpected_keys)
    video = torch.randint(0, 256, (1, 8, 56, 56, 3), dtype=torch.uint8)
    wanted = whole(video, layers=(-2,), pool=False).layers[1]
    torch.testing.assert_close(trunk(video).tokens, wanted)
    # drop path of the blocks that stay: linspace(0, 0.2, 3) without the last
    assert config.drop_path == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"skip must be in \[0, 3\), got 3"):
        trunk_config(whole.config, 3)


def published(lm, lora):
    """Names of a published file: the parts that its authors' code builds, of a tiny language model.

    ``lora`` says where peft puts the plain weights: old versions have no base_layer.
    """
    with torch.device("meta"):
        vision = VisionEncoder(trunk_config(vision_config("1b", "stage2", num_frames=8)))
    names = {f"vision_encoder.{n}": t.shape for n, t in vision.state_dict().items()}
    assert "vision_encoder.blocks.38.attn.qkv.weight" in names
    assert "vision_encoder.blocks.39.attn.qkv.weight" not in names
    names |= {
        "vision_layernorm.weight": (1408,),
        "vision_layernorm.bias": (1408,),
        "query_tokens": (1, 32, 768),
        "extra_query_tokens": (1, 64, 768),
        "project_up.weight": (32, 768),
        "project_up.bias": (32,),
        "project_down.weight": (768, 32),  # published, and used by nothing
        "project_down.bias": (768,),
        "qformer.bert.embeddings.position_ids": (1, 512),
    }
    with torch.device("meta"):
        from iv2.models.qformer import QFormer

        qformer = QFormer(QFORMER["base"])
    names |= {f"qformer.{n}": t.shape for n, t in qformer.state_dict().items()}
    for name, tensor in lm.state_dict().items():
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part.endswith("_proj") or part == "lm_head":
            owner = name.removesuffix(".weight")
            inner = ".base_layer" if lora == "new" else ""
            names[f"lm.base_model.model.{owner}{inner}.weight"] = tensor.shape
            middle = ".default"
            names[f"lm.base_model.model.{owner}.lora_A{middle}.weight"] = (16, tensor.shape[1])
            names[f"lm.base_model.model.{owner}.lora_B{middle}.weight"] = (tensor.shape[0], 16)
        else:
            names[f"lm.base_model.model.{name}"] = tensor.shape
    return names


@pytest.mark.parametrize("lora", ["old", "new"])
def test_published_names_load_strictly(lm_folder, tmp_path, lora):
    config = LanguageConfig(str(lm_folder), trained="lora")
    plain = build_language(replace(config, trained="frozen")).lm
    names = published(plain, lora)
    with torch.device("meta"):
        lm = build_language(replace(config, weights="fresh")).lm
        vision = vision_config("1b", "stage2", num_frames=8)
        model = VideoChatModel(vision, QFORMER["base"], lm)
    # 1.2 billion zeros that take no memory, which a file could not hold
    tensors = {n: torch.zeros(()).expand(s) for n, s in names.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iv2.models.stage3.read_weights", lambda path: tensors)
        report = load_video_chat(model, tmp_path / "published.pt")
        assert not report.missing
        assert set(report.unexpected) == {
            "project_down.weight",
            "project_down.bias",
            "qformer.bert.embeddings.position_ids",
        }
        for lacking in (
            "vision_layernorm.weight",
            "qformer.bert.encoder.layer.3.output_query.dense.bias",
        ):
            fewer = {n: t for n, t in tensors.items() if n != lacking}
            patch.setattr("iv2.models.stage3.read_weights", lambda path, found=fewer: found)
            with pytest.raises(ValueError, match=f"1 are missing: {lacking}"):
                load_video_chat(model, tmp_path / "published.pt")


def test_files_to_start_from(folder, lm_folder, tmp_path):
    torch.manual_seed(9)
    whole = VisionEncoder(VISION)
    save_weights(
        {f"vision_encoder.{n}": t for n, t in whole.state_dict().items()}, tmp_path / "v.pt"
    )
    aligned = tiny_stage(lm_folder, weights="pretrained", trained="frozen")
    with torch.no_grad():
        aligned.model.query_tokens.fill_(3.0)
    kept = {n: t for n, t in aligned.model.state_dict().items() if n not in aligned.elsewhere}
    save_weights(kept, tmp_path / "aligned.pt")
    config = replace(
        CONFIG,
        vision_init=str(tmp_path / "v.pt"),
        qformer_init=str(tmp_path / "aligned.pt"),
    )
    stage = tiny_stage(folder, config)
    with pytest.raises(ValueError, match=r"2 tensors differ: project_up"):
        stage.load_towers()  # another language model's width
    stage = tiny_stage(lm_folder, config, weights="pretrained", trained="lora")
    stage.load_towers()
    state = stage.model.state_dict()
    assert torch.equal(
        state["vision_encoder.blocks.0.attn.qkv.weight"], whole.blocks[0].attn.qkv.weight
    )
    assert (state["query_tokens"] == 3).all()
    # the next step starts from the last one's run: LoRA is new, the frozen weights in their folder
    config = replace(CONFIG, chat_init=str(tmp_path / "aligned.pt"))
    for trained in ("lora", "full", "frozen"):
        stage = tiny_stage(lm_folder, config, weights="pretrained", trained=trained)
        stage.load_towers()
        assert (stage.model.query_tokens == 3).all()
        torch.testing.assert_close(
            stage.model.vision_encoder.cls_token, aligned.model.vision_encoder.cls_token
        )
    # frozen weights that are not the folder's would be lost with the run
    full = dict(aligned.model.state_dict())
    save_weights(full, tmp_path / "same.pt")
    replace_chat = replace(CONFIG, chat_init=str(tmp_path / "same.pt"))
    tiny_stage(lm_folder, replace_chat, weights="pretrained", trained="frozen").load_towers()
    full["lm.model.norm.weight"] = full["lm.model.norm.weight"] + 1
    save_weights(full, tmp_path / "same.pt")
    with pytest.raises(ValueError, match=r"got other values of lm\.model\.norm\.weight"):
        tiny_stage(lm_folder, replace_chat, weights="pretrained", trained="frozen").load_towers()


def test_a_language_model_to_start_from(folder, tmp_path):
    read = tiny_stage(folder)
    with torch.no_grad():
        for parameter in read.model.parameters():
            parameter.fill_(0.25)
    save_weights(read.model.state_dict(), tmp_path / "read.pt")
    stage = tiny_stage(folder, replace(CONFIG, lm_init=str(tmp_path / "read.pt")))
    stage.load_towers()
    for name, parameter in stage.model.named_parameters():
        assert (parameter == 0.25).all() == name.startswith("lm."), name


class TestPackedSequences:
    """Of one text after another none sees the others, whichever way it is done."""

    LENGTHS = (5, 1, 9)

    def inputs(self, lm):
        torch.manual_seed(2)
        cu = torch.tensor([0, *self.LENGTHS]).cumsum(0).int()
        return torch.randn(sum(self.LENGTHS), lm.config.hidden_size), Packed(cu, max(self.LENGTHS))

    def alone(self, lm, x):
        """By transformers, each by itself."""
        lm.set_attn_implementation("eager")
        rows = [lm.model(inputs_embeds=row[None]) for row in torch.split(x, self.LENGTHS)]
        lm.set_attn_implementation("iv2")
        return torch.cat([row.last_hidden_state[0] for row in rows])

    @pytest.mark.parametrize("window", [None, 9, 8])
    def test_each_sees_itself_alone(self, lm_folder, monkeypatch, window):
        lm = build_language(LanguageConfig(str(lm_folder))).lm
        assert lm.config.num_key_value_heads < lm.config.num_attention_heads
        calls = []

        def counted(*args, **options):
            calls.append(options["packed"])
            return attention(*args, **options)

        monkeypatch.setattr(language, "attention", counted)
        x, packed = self.inputs(lm)
        expected = self.alone(lm, x)
        lm.config.sliding_window = window  # Llama has none: it is what is asked, not what is done
        torch.testing.assert_close(language.hidden_states(lm, x, packed), expected)
        assert len(calls) == (0 if window == 8 else lm.config.num_hidden_layers)

    def test_what_ours_does_not_do_is_padded(self, lm_folder, monkeypatch):
        lm = build_language(LanguageConfig(str(lm_folder))).lm
        x, packed = self.inputs(lm)
        expected = self.alone(lm, x)
        monkeypatch.setattr(language, "attention", None)
        for changed in ("attn_logit_softcapping", "sdpa", "attention_dropout"):
            with monkeypatch.context() as patch:
                if changed == "sdpa":
                    lm.set_attn_implementation("sdpa")
                else:
                    patch.setattr(lm.config, changed, 0.5, raising=False)
                lm.train(changed == "attention_dropout")
                for layer in lm.model.layers:
                    layer.self_attn.attention_dropout = 0.0  # so that the results compare
                torch.testing.assert_close(language.hidden_states(lm, x, packed), expected)
            lm.set_attn_implementation("iv2")

    def test_generation_is_that_of_transformers(self, lm_folder):
        lm = build_language(LanguageConfig(str(lm_folder))).lm.eval()
        ids = torch.tensor([[1, 2, 7, 8, 9], [0, 0, 3, 4, 5]])
        seen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        found = []
        for name in ("iv2", "eager"):
            lm.set_attn_implementation(name)
            found.append(lm.generate(ids, attention_mask=seen, max_new_tokens=8, do_sample=False))
        assert torch.equal(*found)


def test_rotary_frequencies_stay_exact(lm_folder):
    stage = tiny_stage(lm_folder, weights="pretrained")
    exact = stage.model.lm.model.rotary_emb.inv_freq.clone()
    stage.model.to(torch.bfloat16)
    assert stage.model.lm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(stage.model.lm.model.rotary_emb.inv_freq, exact)
    loss = stage.train()(batch_of(ROUNDS))["next_token"]
    assert loss.isfinite()
    loss.backward()


def test_language_models_that_cannot_be_used(tmp_path, lm_folder):
    with pytest.raises(ValueError, match="folder must be that of a language model, got nothing"):
        build_language(LanguageConfig())
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json and a tokenizer"):
        build_language(LanguageConfig(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"must be a \.gguf file"):
        build_language(LanguageConfig(str(tmp_path / "none.gguf")))
    with pytest.raises(FileNotFoundError, match=r"must hold vocab\.txt"):
        build_language(LanguageConfig(str(tmp_path), weights="tiny"))
    text = json.loads((lm_folder / "config.json").read_text())
    for file in lm_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(text | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match=r"final_logit_softcapping .* must be None, got 30"):
        build_language(LanguageConfig(str(tmp_path)))


def test_a_stage2_file_loads_into_the_trunk(tmp_path):
    whole = VisionEncoder(vision_config("tiny", "stage2", depth=3, clip_return_layer=2))
    save_weights(
        {f"vision_encoder.{n}": t for n, t in whole.state_dict().items()}, tmp_path / "a.pt"
    )
    trunk = VisionEncoder(trunk_config(replace(whole.config, num_frames=8)))
    report = load_checkpoint(trunk, tmp_path / "a.pt")
    assert list(report.reshaped) == ["pos_embed"]  # 4 frames to 8
    assert torch.equal(trunk.blocks[1].mlp.fc1.weight, whole.blocks[1].mlp.fc1.weight)
