from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_stage2 import TEXT_TINY, caption, write_vocabulary

from iv2.checkpoint import load_checkpoint, save_weights
from iv2.data.captions import Tokenizer, clean_caption, mask_tokens
from iv2.models.text import TEXT, PackedText, TextConfig, TextEncoder


def packed(*lengths: int, seed: int = 0) -> PackedText:
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedText(torch.randint(5, 40, (sum(lengths),), generator=g), cu, max(lengths))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(replace(TEXT_TINY, media_dim=20)).eval()


def test_packing():
    text = packed(3, 1, 4)
    assert len(text) == 3
    assert text.firsts.tolist() == [0, 3, 4]
    assert text.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    some, tokens = text.select(torch.tensor([2, 0, 2]))
    assert tokens.tolist() == [4, 5, 6, 7, 0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(some.ids, text.ids[tokens])
    assert some.cu_seqlens.tolist() == [0, 4, 7, 11]


# ---- the tower


def naive(encoder, ids, media=None):
    """One sequence through all layers, from the weights alone."""
    c, p = encoder.config, {n: t.detach() for n, t in encoder.state_dict().items()}

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x, name):
        weight, bias = p[f"{name}.LayerNorm.weight"], p[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, (c.embed_dim,), weight, bias, c.layer_norm_eps)

    def attend(x, y, name):
        split = (c.num_heads, c.embed_dim // c.num_heads)
        q, k, v = (
            linear(z, f"{name}.self.{part}").unflatten(-1, split).transpose(0, 1)
            for z, part in ((x, "query"), (y, "key"), (y, "value"))
        )
        weights = torch.softmax(q @ k.transpose(1, 2) / split[1] ** 0.5, -1)
        out = linear((weights @ v).transpose(0, 1).flatten(1), f"{name}.output.dense")
        return norm(out + x, f"{name}.output")

    table = "bert.embeddings"
    x = p[f"{table}.word_embeddings.weight"][ids]
    x = x + p[f"{table}.position_embeddings.weight"][: len(ids)]
    x = norm(x + p[f"{table}.token_type_embeddings.weight"][0], table)
    for i in range(c.depth):
        name = f"bert.encoder.layer.{i}"
        if i == c.fusion_layer and media is None:
            return x
        x = attend(x, x, f"{name}.attention")
        if i >= c.fusion_layer:
            x = attend(x, media, f"{name}.crossattention")
        inner = F.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(linear(inner, f"{name}.output.dense") + x, f"{name}.output")
    return x


def test_packed_sequences_are_those_of_each_alone(encoder):
    encoder = encoder.double()
    text, media = packed(3, 6, 2, 5, 4), torch.randn(3, 7, 20, dtype=torch.float64)
    hidden = encoder.encode(text)
    media_ids = torch.tensor([0, 0, 2, 2, 2])  # nothing looks at the second
    fused = encoder.fuse(hidden, text, encoder.project_media(media), media_ids)
    for i in range(5):
        rows = slice(int(text.cu_seqlens[i]), int(text.cu_seqlens[i + 1]))
        torch.testing.assert_close(hidden[rows], naive(encoder, text.ids[rows]))
        expected = naive(encoder, text.ids[rows], media[media_ids[i]])
        torch.testing.assert_close(fused[rows], expected)


def test_gradients_with_and_without_checkpointing(encoder):
    text, media = packed(3, 6, 2), torch.randn(2, 7, 20)
    found = []
    for keep in (False, True):
        encoder.config = replace(encoder.config, checkpoint=keep)
        encoder.train().zero_grad()
        hidden = encoder.encode(text)
        kv = encoder.project_media(media)
        encoder.fuse(hidden, text, kv, torch.tensor([0, 1, 1])).square().sum().backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


def test_attention_dropout_runs_padded_and_keeps_the_mean(encoder):
    """With dropout so small that nothing is dropped, the padded path is the packed one."""
    text, media = packed(3, 6, 2), torch.randn(2, 7, 20)
    ids = torch.tensor([0, 1, 1])

    def run():
        hidden = encoder.encode(text)
        return encoder.fuse(hidden, text, encoder.project_media(media), ids)

    expected = run()
    for module in encoder.modules():
        if type(module).__name__ == "BertAttention":
            module.dropout = 1e-9
    encoder.train()
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
    for module in encoder.modules():
        if type(module).__name__ == "BertAttention":
            module.dropout = 0.5
    assert not torch.allclose(run(), expected, atol=1e-2)


def test_mlm_loss_is_cross_entropy_with_tied_words(encoder):
    hidden, targets = torch.randn(9, 32), torch.randint(64, (9,))
    head = encoder.cls["predictions"]
    assert head.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        head.bias.normal_()
    logits = F.linear(head.transform(hidden), head.decoder.weight, head.bias)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(encoder.mlm_loss(hidden, targets), expected)
    assert encoder.mlm_loss(hidden[:0], targets[:0]) == 0


def test_files_load_strictly(encoder, tmp_path):
    file = tmp_path / "text.pt"
    weights = encoder.state_dict()
    assert {"cls.predictions.bias", "cls.predictions.decoder.weight"} <= weights.keys()
    positions = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    save_weights(weights | positions, file)
    other = TextEncoder(encoder.config)
    report = load_checkpoint(other, file)
    assert report.missing == ()
    assert report.unexpected == ("bert.embeddings.position_ids",)
    for name, value in other.state_dict().items():
        assert torch.equal(value, weights[name])
    assert other.cls["predictions"].bias is other.cls["predictions"].decoder.bias


def test_same_as_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        layer_norm_eps=1e-12,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval().double()
    ours = TextEncoder(replace(TEXT_TINY, fusion_layer=3), mlm=False).double().eval()
    weights = {f"bert.{n}": t for n, t in model.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert all(name.startswith("bert.encoder.layer.3.") for name in missing)
    assert not [name for name in unexpected if "position_ids" not in name]
    text = packed(5, 2, 7)
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.arange(7) < text.cu_seqlens.diff()[:, None]
    padded[mask] = text.ids
    with torch.no_grad():
        expected = model(padded, attention_mask=mask.long()).last_hidden_state[mask]
        torch.testing.assert_close(ours.encode(text), expected)


def test_config_errors(encoder):
    for changed, match in (
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads, got 1024"),
        ({"fusion_layer": 24}, r"fusion_layer must be in \(0, depth\), got 24"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=match):
            TextConfig(**changed)
    with pytest.raises(ValueError, match="text must be at most 512 tokens long, got 513"):
        encoder.encode(packed(513))
    assert TEXT["bert-large"].fusion_layer == 19


def test_fuse_errors(encoder):
    text, media = packed(3, 2), encoder.project_media(torch.randn(2, 7, 20))
    hidden = encoder.encode(text)
    with pytest.raises(ValueError, match="media_ids must be 2, one a text, got 1"):
        encoder.fuse(hidden, text, media, torch.tensor([0]))
    for ids in ([1, 0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"media_ids must be in \[0, 2\) and not decrease"):
            encoder.fuse(hidden, text, media, torch.tensor(ids))


# ---- captions


def test_cleaning():
    text = 'A "Red" bar, (moving-left)/up: <person> ~it\'s;  *#!? '
    assert clean_caption(text) == "a red bar moving left up person its"


def test_tokens(tokenizer):
    text = tokenizer.encode(["red bar", "", "red " * 40, "bad"], max_tokens=6)
    assert text.cu_seqlens.tolist() == [0, 4, 6, 12, 15]
    assert text.ids[text.firsts].tolist() == [tokenizer.cls_id] * 4
    ends = text.cu_seqlens[1:].long() - 1
    assert text.ids[ends].tolist() == [tokenizer.sep_id] * 4
    assert text.max_seqlen == 6
    assert tokenizer.decode(text.ids[:4]) == "red bar"


def test_tokenizer_json_is_the_same(tokenizer, tmp_path):
    tokenizer._tokenizer.save(str(tmp_path / "tokenizer.json"))
    other, captions = Tokenizer(tmp_path), ["red bar", "", "красный", "Bár, red"]
    one, two = tokenizer.encode(captions), other.encode(captions)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.cu_seqlens, two.cu_seqlens)
    assert other.vocab_size == tokenizer.vocab_size


def test_word_pieces_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_vocabulary(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(str(tmp_path))
    captions = ["red bar", "", "красный red", "Rêd,bar 日本"]
    text = tokenizer.encode(captions)
    expected = theirs(captions)["input_ids"]
    assert [part.tolist() for part in text.ids.split(text.cu_seqlens.diff().tolist())] == expected


def test_tokenizer_errors(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"folder must hold vocab.txt or tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[SEP]\n[MASK]\nred\n")
    with pytest.raises(ValueError, match=r"the vocabulary must have \[CLS\]"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="captions must be at least one, got none"):
        tokenizer.encode([])
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        tokenizer.encode(["red"], 1)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"pip install iv2\[stage2\]"):
        Tokenizer(tmp_path)


def test_masking(tokenizer):
    text = tokenizer.encode([caption(i) for i in range(400)])
    seeds = torch.arange(400) * 7919
    masked, rows, targets = mask_tokens(text, seeds, tokenizer)
    assert torch.equal(targets, text.ids[rows])
    assert not (targets == tokenizer.cls_id).any()
    assert (targets == tokenizer.sep_id).any()
    may = text.ids != tokenizer.cls_id
    assert len(rows) / may.sum() == pytest.approx(0.5, abs=0.04)
    now = masked.ids[rows]
    assert (now == tokenizer.mask_id).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (now == targets).float().mean() == pytest.approx(0.1, abs=0.04)
    kept = torch.ones(len(text.ids), dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(masked.ids[kept], text.ids[kept])


def test_masks_belong_to_the_seed_and_not_to_the_batch(tokenizer):
    captions = [caption(i) for i in range(6)]
    seeds = torch.arange(6) * 7919
    whole, *_ = mask_tokens(tokenizer.encode(captions), seeds, tokenizer)
    for i in range(6):
        alone, *_ = mask_tokens(tokenizer.encode(captions[i : i + 1]), seeds[i : i + 1], tokenizer)
        first, last = whole.cu_seqlens[i : i + 2].tolist()
        assert torch.equal(alone.ids, whole.ids[first:last])
