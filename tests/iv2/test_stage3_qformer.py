"""The Q-Former against a plain float64 rewriting, its drops, and the published names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_stage3 import QFORMER_TINY

from iv2.models.qformer import QFORMER, QFormer
from iv2.models.text import PackedText

CONFIG = replace(QFORMER_TINY, media_dim=24)


def text_of(*lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.arange(int(cu[-1])) % 60 + 1
    return PackedText(ids, cu, max(lengths))


def made(**changes):
    torch.manual_seed(3)
    model = QFormer(replace(CONFIG, **changes))
    with torch.no_grad():  # biases and norms that do something, scores that are not all alike
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


def plain(state, queries, media, words):
    """One sample, dense, in float64, from the names of the file alone."""
    s = {name: t.double() for name, t in state.items()}

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * s[f"{name}.LayerNorm.weight"] + s[f"{name}.LayerNorm.bias"]

    def attend(name, x, source):
        heads = CONFIG.num_heads
        q = linear(f"{name}.self.query", x).unflatten(-1, (heads, -1)).transpose(0, 1)
        k = linear(f"{name}.self.key", source).unflatten(-1, (heads, -1)).transpose(0, 1)
        v = linear(f"{name}.self.value", source).unflatten(-1, (heads, -1)).transpose(0, 1)
        p = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        o = (p @ v).transpose(0, 1).flatten(1)
        return norm(f"{name}.output", linear(f"{name}.output.dense", o) + x)

    def mlp(inner, outer, x):
        h = linear(f"{inner}.dense", x)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        return norm(outer, linear(f"{outer}.dense", h) + x)

    count = len(queries)
    w = s["bert.embeddings.word_embeddings.weight"][words]
    w = w + s["bert.embeddings.position_embeddings.weight"][: len(words)]
    x = norm("bert.embeddings", torch.cat([queries, w]))
    for i in range(CONFIG.depth):
        name = f"bert.encoder.layer.{i}"
        x = attend(f"{name}.attention", x, x)
        q, w = x[:count], x[count:]
        if i % 2 == 0:
            q = attend(f"{name}.crossattention", q, media)
        q = mlp(f"{name}.intermediate_query", f"{name}.output_query", q)
        w = mlp(f"{name}.intermediate", f"{name}.output", w)
        x = torch.cat([q, w])
    return x[:count]


@pytest.mark.parametrize("lengths", [None, (3, 7, 1)])
def test_it_is_the_plain_rewriting(lengths):
    model = made()
    queries, media = torch.randn(1, 5, 32), torch.randn(3, 9, 24)
    text = None if lengths is None else text_of(*lengths)
    found = model(queries, media, text)
    assert found.shape == (3, 5, 32)
    words = text.ids.split(lengths) if lengths else [torch.empty(0, dtype=torch.int64)] * 3
    for b in range(3):
        wanted = plain(model.state_dict(), queries[0].double(), media[b].double(), words[b])
        torch.testing.assert_close(found[b].double(), wanted, rtol=1e-4, atol=1e-5)
    # it can tell videos apart, so that the comparison says something
    assert (found[0] - found[1]).abs().max() > 0.05


def test_words_matter_and_only_their_own_samples():
    model = made()
    queries, media = torch.randn(1, 5, 32), torch.randn(2, 9, 24)
    a, b = text_of(4, 4), text_of(4, 4)
    b.ids[5] = 60
    one, two = model(queries, media, a), model(queries, media, b)
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1], two[1], atol=1e-4)


def test_padded_attention_with_dropout_is_packed_without():
    """A rate that drops next to nothing, through the other code."""
    queries, media, text = torch.randn(1, 5, 32), torch.randn(3, 9, 24), text_of(3, 7, 1)
    wanted = made()(queries, media, text)
    model = made(attn_dropout=1e-7).train()
    torch.testing.assert_close(model(queries, media, text), wanted, rtol=1e-4, atol=1e-5)


def test_drops_are_in_training_alone():
    model = made(dropout=0.2, drop_path=0.5)
    queries, media = torch.randn(1, 5, 32), torch.randn(3, 9, 24)
    assert torch.equal(model(queries, media), model(queries, media))
    model.train()
    assert not torch.allclose(model(queries, media), model(queries, media))
    model = made(drop_path=0.5).train()
    assert not torch.allclose(model(queries, media), model(queries, media))


def test_recomputed_layers_have_the_same_gradients():
    queries, media, text = torch.randn(1, 5, 32), torch.randn(2, 9, 24), text_of(3, 2)
    grads = []
    for again in (False, True):
        model = made(checkpoint=again, drop_path=0.4).train()
        torch.manual_seed(1)
        model(queries, media, text).pow(2).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None)
        if grad is not None:
            torch.testing.assert_close(grad, grads[1][name])


def test_published_names_and_shapes():
    with torch.device("meta"):
        state = QFormer(QFORMER["base"]).state_dict()
    wanted = {
        "bert.embeddings.word_embeddings.weight": (30523, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.LayerNorm.weight": (768,),
        "bert.embeddings.LayerNorm.bias": (768,),
    }
    for i in range(12):
        layer = f"bert.encoder.layer.{i}"
        blocks = {"attention": 768} | ({"crossattention": 1408} if i % 2 == 0 else {})
        for block, width in blocks.items():
            for part, inner in (("query", 768), ("key", width), ("value", width)):
                wanted[f"{layer}.{block}.self.{part}.weight"] = (768, inner)
                wanted[f"{layer}.{block}.self.{part}.bias"] = (768,)
            wanted[f"{layer}.{block}.output.dense.weight"] = (768, 768)
            wanted[f"{layer}.{block}.output.dense.bias"] = (768,)
            wanted[f"{layer}.{block}.output.LayerNorm.weight"] = (768,)
            wanted[f"{layer}.{block}.output.LayerNorm.bias"] = (768,)
        for suffix in ("", "_query"):
            wanted[f"{layer}.intermediate{suffix}.dense.weight"] = (3072, 768)
            wanted[f"{layer}.intermediate{suffix}.dense.bias"] = (3072,)
            wanted[f"{layer}.output{suffix}.dense.weight"] = (768, 3072)
            wanted[f"{layer}.output{suffix}.dense.bias"] = (768,)
            wanted[f"{layer}.output{suffix}.LayerNorm.weight"] = (768,)
            wanted[f"{layer}.output{suffix}.LayerNorm.bias"] = (768,)
    assert {name: tuple(t.shape) for name, t in state.items()} == wanted


def test_bad_instructions_are_refused():
    model, media = made(), torch.randn(2, 9, 24)
    with pytest.raises(ValueError, match="text must be 2 sequences, got 1"):
        model(torch.randn(1, 5, 32), media, text_of(4))
    with pytest.raises(ValueError, match="at most 512 tokens long, got 513"):
        model(torch.randn(1, 5, 32), media, text_of(4, 513))
