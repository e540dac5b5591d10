from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import _muon

from iv2.models.vision import build_encoder
from iv2.optim import (
    Optimizer,
    Schedule,
    is_matrix,
    layer_of,
    orthogonal,
    parameter_groups,
    spared_from_decay,
)


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


def test_matrices_are_the_linear_layers_of_blocks():
    of_blocks = (
        *("blocks.0.attn.qkv.weight", "vision_encoder.blocks.11.mlp.fc2.weight"),
        "text_encoder.bert.encoder.layer.3.attention.self.query.weight",
        *("audio_encoder.encoder.layers.2.fc1.weight", "lm.model.layers.0.mlp.up_proj.weight"),
    )
    others = (
        *("patch_embed.proj.weight", "head.weight", "clip_decoder.0.head.weight", "pos_embed"),
        *("bert.embeddings.word_embeddings.weight", "lm.model.embed_tokens.weight"),
        "audio_encoder.encoder.layers.0.self_attn.relative_attention_bias.weight",
        "lm.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    )
    matrix = torch.zeros(2, 2)
    assert all(is_matrix(name, matrix) for name in of_blocks)
    assert not any(is_matrix(name, matrix) for name in others)
    assert not is_matrix("blocks.0.norm1.weight", torch.zeros(2))


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 64, 16), (16, 64)])
def test_orthogonal_has_the_directions_and_even_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    assert s.min() < 0.2 * s.max() or shape != (3, 24, 24)
    found = u.mT @ orthogonal(x).double() @ vt.mT  # in the basis of x: diagonal
    values = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert values.max() < 1.25
    assert values[s > 0.1 * s.amax(-1, keepdim=True)].min() > 0.65


def test_orthogonal_lifts_what_is_a_hundredth_of_the_largest():
    draws = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, v = torch.linalg.qr(draws).Q
    values = torch.linalg.svdvals(orthogonal(u * torch.logspace(0, -2, 16) @ v).double())
    assert values.min() > 0.65
    assert values.max() < 1.25


class Blocks(nn.Module):
    """A model whose names are those of an encoder."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def make(dtype, muon_lr_scale=0.0):
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    groups = parameter_groups(
        list(model.named_parameters()), depth=0, weight_decay=0.1, muon_lr_scale=muon_lr_scale
    )
    return model, Optimizer(groups, betas=(0.9, 0.98), eps=1e-6)


def torch_adamw(parameters):
    """At the rate, betas and decays of ``make``."""
    weights, rest = ([p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.98),
        eps=1e-6,
    )


def assert_alike(model, ours, other, theirs):
    """Five steps with clipped gradients: the same norms and weights."""
    for step in range(5):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        for m in (model, other):
            m(x).square().mean().backward()
        ours.collect()
        norm = ours.clip(0.5)
        theirs_norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        torch.testing.assert_close(norm, theirs_norm)
        ours.step(1e-2)
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_is_torchs_but_for_its_precision(monkeypatch):
    """torch's iterates in bfloat16, here in float32."""
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda grad, *_: orthogonal(grad))
    model, ours = make(torch.float32, muon_lr_scale=2.0)
    other, _ = make(torch.float32)
    matrices = [block.weight for block in other.blocks]
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in other.parameters() if all(p is not m for m in matrices)]
    assert_alike(model, ours, other, [muon, torch_adamw(rest)])


def test_a_matrix_without_gradient_stays():
    model, _ = make(torch.float32)
    before = model.blocks[2].weight.detach().clone()
    model.blocks[0](torch.ones(2, 8)).square().mean().backward()
    matrices = [block.weight for block in model.blocks]
    group = {"params": matrices, "names": list("abc"), "weight_decay": 0.0, "lr_scale": 1.0}
    optimizer = Optimizer([group | {"muon": True}], betas=(0.9, 0.98), eps=1e-6)  # no AdamW at all
    optimizer.step(1e-2)
    assert torch.equal(model.blocks[2].weight, before)
    assert model.blocks[0].weight.grad is None


def test_float32_equals_torch():
    model, ours = make(torch.float32)
    other, _ = make(torch.float32)
    assert_alike(model, ours, other, [torch_adamw(list(other.parameters()))])


def test_masters_keep_what_bfloat16_cannot():
    model, optimizer = make(torch.bfloat16)
    before = [p.detach().clone() for p in optimizer.parameters]
    assert optimizer.has_masters
    for _ in range(3):
        model(torch.ones(4, 8, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.collect()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step(1e-6)  # far below half a unit of bfloat16 at these weights
    moved = [(m - p.float()).abs().max() for m, p in zip(optimizer.masters, before, strict=True)]
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


@pytest.mark.parametrize("muon_lr_scale", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bitwise(dtype, muon_lr_scale):
    x = torch.randn(4, 8).to(dtype)

    def go(model, optimizer, steps):
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.collect()
            optimizer.step(1e-2)

    straight, optimizer = make(dtype, muon_lr_scale)
    go(straight, optimizer, 4)
    half, optimizer = make(dtype, muon_lr_scale)
    go(half, optimizer, 2)
    state, weights = optimizer.state_dict(), half.state_dict()
    again, optimizer = make(dtype, muon_lr_scale)
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    go(again, optimizer, 2)
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="groups must hold parameters, got none"):
        Optimizer([], betas=(0.9, 0.98), eps=1e-6)
    _, optimizer = make(torch.float32)
    with pytest.raises(ValueError, match="state must hold the moments of 8 parameters, got 1"):
        optimizer.load_state_dict({"moments": {"head.weight": {}}, "masters": {}})
