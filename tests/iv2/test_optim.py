from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from iv2.models.vision import build_encoder
from iv2.optim import AdamW, Schedule, layer_of, parameter_groups, spared_from_decay


def published_cosine(base, final, total, warmup):
    """As in the released code: numpy's linspace, then half a cosine."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(1, len(i))))
    return np.concatenate([np.linspace(0, base, warmup), cosine])


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (7, 0), (5, 1), (4, 4)])
def test_schedule_is_the_published_one(total, warmup):
    schedule = Schedule(2e-3, 1e-5, warmup, total)
    got = [schedule(step) for step in range(total)]
    np.testing.assert_allclose(got, published_cosine(2e-3, 1e-5, total, warmup), rtol=1e-12)


def test_layers_of_the_published_names():
    places = {
        "patch_embed.proj.weight": 0,
        "cls_token": 0,
        "pos_embed": 0,
        "img_pos_embed": 0,
        "pos_embed_spatial": 0,
        "blocks.0.norm1.weight": 1,
        "encoder.blocks.11.mlp.fc2.bias": 12,
        "clip_pos_embed": 13,
        "mae_pos_embed": 13,
        "clip_projector.norm1_q.weight": 13,
        "clip_decoder.0.head.weight": 13,
        "head.bias": 13,
    }
    assert {name: layer_of(name, 12) for name in places} == places


def test_groups_of_layer_decay():
    encoder = build_encoder("tiny", embed_dim=32, depth=3, num_heads=2, num_classes=5, num_frames=2)
    named = list(encoder.named_parameters())
    groups = parameter_groups(named, depth=3, weight_decay=0.05, layer_decay=0.5)
    scale = {name: g["lr_scale"] for g in groups for name in g["names"]}
    decay = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert scale.keys() == dict(named).keys()
    assert scale["head.weight"] == 1
    assert scale["blocks.2.attn.qkv.weight"] == 0.5
    assert scale["blocks.0.ls1.gamma"] == 0.125
    assert scale["pos_embed"] == 0.0625
    assert {n for n, d in decay.items() if d == 0} == encoder.no_weight_decay()
    assert {n for n, p in named if spared_from_decay(n, p)} == encoder.no_weight_decay()
    frozen = encoder.clip_projector.requires_grad_(False)
    names = {n for g in parameter_groups(named, depth=3, weight_decay=0.05) for n in g["names"]}
    assert len(names) == len(named) - len(list(frozen.parameters()))


def make(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)
    groups = parameter_groups(list(model.named_parameters()), depth=0, weight_decay=0.1)
    return model, AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def test_float32_equals_torch():
    model, ours = make(torch.float32)
    other, _ = make(torch.float32)
    weights = [p for p in other.parameters() if p.dim() > 1]
    rest = [p for p in other.parameters() if p.dim() == 1]
    theirs = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    for step in range(5):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        for m in (model, other):
            m(x).square().mean().backward()
        ours.collect()
        norm = ours.clip(0.5)
        theirs_norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        torch.testing.assert_close(norm, theirs_norm)
        ours.step(1e-2)
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_masters_keep_what_bfloat16_cannot():
    model, optimizer = make(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.has_masters
    for _ in range(3):
        model(torch.ones(4, 8, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.collect()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step(1e-6)  # far below half a unit of bfloat16 at these weights
    moved = [(m - p.float()).abs().max() for m, p in zip(optimizer.masters, before, strict=False)]
    assert max(moved) > 0
    for p, m in zip(optimizer.parameters, optimizer.masters, strict=True):
        assert torch.equal(p, m.to(torch.bfloat16))


def test_accumulation_is_summed_in_float32():
    model, optimizer = make(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    parts = []
    for i in range(3):
        model(x * (i + 1)).square().mean().backward()
        parts.append([p.grad.float() for p in optimizer.parameters])
        optimizer.collect()
    for i, master in enumerate(optimizer.masters):
        assert torch.equal(master.grad, sum(part[i] for part in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bitwise(dtype):
    x = torch.randn(4, 8).to(dtype)

    def go(model, optimizer, steps):
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.collect()
            optimizer.step(1e-2)

    straight, optimizer = make(dtype)
    go(straight, optimizer, 4)
    half, optimizer = make(dtype)
    go(half, optimizer, 2)
    state, weights = optimizer.state_dict(), half.state_dict()
    again, optimizer = make(dtype)
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    go(again, optimizer, 2)
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="groups must hold parameters, got none"):
        AdamW([], betas=(0.9, 0.98), eps=1e-6)
    _, optimizer = make(torch.float32)
    with pytest.raises(ValueError, match="state must hold the moments of 4 parameters, got 1"):
        optimizer.load_state_dict({"moments": {"0.weight": {}}, "masters": {}})
