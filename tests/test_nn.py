from __future__ import annotations

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import nn as tnn

import iv2kernels as k
from iv2kernels import nn


@torch.no_grad()
def randomize(module):
    for name, p in module.named_parameters():
        noise = torch.randn_like(p)
        p.copy_(1 + 0.2 * noise if "norm" in name and p.dim() == 1 else 0.3 * noise)
    return module


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_linear_is_torchs():
    layer = nn.Linear(12, 20)
    x = torch.randn(3, 5, 12)
    close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer(x.requires_grad_()).sum().requires_grad
    assert list(layer.state_dict()) == list(tnn.Linear(12, 20).state_dict())


def test_norms():
    norm, x = randomize(nn.RMSNorm(24)), torch.randn(2, 3, 24)
    close(norm(x), naive.rms(x, norm.weight))
    assert "24" in repr(norm)
    add = randomize(nn.AddRMSNorm(24))
    residual, scale, drop = torch.randn(2, 3, 24), torch.randn(24), torch.tensor([0.0, 2.0])
    y, r = add(x, residual, layer_scale=scale, drop_scale=drop)
    close(r, residual + drop[:, None, None] * scale * x)
    close(y, naive.rms(r, add.weight))
    y, r = add(x)
    close(r, x)
    close(y, naive.rms(x, add.weight))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_mlp(approximate):
    mlp, x = randomize(nn.Mlp(12, 40, approximate=approximate)), torch.randn(2, 3, 12)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate=approximate)
    close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))
    with pytest.raises(TypeError):
        nn.Mlp(12, 40)  # the flavour has no default


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention(qk_norm):
    attn, x = randomize(nn.Attention(32, 4, qk_norm=qk_norm)), torch.randn(2, 7, 32)
    q, key, v = F.linear(x, attn.qkv.weight).chunk(3, -1)
    if qk_norm:
        q, key = naive.rms(q, attn.q_norm.weight), naive.rms(key, attn.k_norm.weight)
    mixed = naive.softmax_attention(naive.split(q, 4), naive.split(key, 4), naive.split(v, 4))[0]
    close(attn(x), F.linear(naive.join(mixed), attn.proj.weight, attn.proj.bias))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads 5, got 32"):
        nn.Attention(32, 5)


def test_attention_pool_in_absorbed_form_is_exact():
    pool = randomize(nn.AttentionPool(32, 4, 10)).double()
    x = torch.randn(3, 9, 32, dtype=torch.float64, requires_grad=True)
    weights = dict(pool.named_parameters())
    pooled, probs = pool(x)
    expected, expected_probs = naive.pool(weights, x, 4)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(probs.double(), expected_probs)
    assert not probs.requires_grad
    inputs = [x, *weights.values()]
    got = torch.autograd.grad(pooled.sin().sum(), inputs)
    for name, a, b in zip(
        ["x", *weights], got, torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_attention_pool_takes_a_wider_stream():
    pool = randomize(nn.AttentionPool(32, 4, 10)).bfloat16()
    pooled, probs = pool(torch.randn(3, 9, 32))
    assert pooled.dtype == torch.bfloat16
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads 5, got 32"):
        nn.AttentionPool(32, 5, 10)


@pytest.mark.parametrize("tubelet", [1, 2])
def test_patch_embed(tubelet):
    embed = randomize(nn.PatchEmbed(16, patch_size=4, tubelet_size=tubelet))
    video = torch.randn(2, 3, 4, 8, 12)
    tokens = naive.patchify(video, embed.proj.weight, embed.proj.bias)
    close(embed(video), tokens)
    table, cls_token = torch.randn(1 + tokens.shape[1], 16), torch.randn(16)
    whole = torch.cat([cls_token.expand(2, 1, -1), tokens], 1) + table
    ids = torch.tensor([[0, 5, 7], [2, 3, 11]], dtype=torch.int32)
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids.long() + 1], 1)
    got = embed(video, pos_embed=table, cls_token=cls_token, ids_keep=ids)
    close(got, whole.gather(1, rows[..., None].expand(-1, -1, 16)))


def test_modules_follow_use():
    attn, x = nn.Attention(32, 4), torch.randn(2, 7, 32)
    with k.use("reference"):
        expected = attn(x)
    close(attn(x), expected)
