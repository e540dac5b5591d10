"""InternVideo2's encoder written out plainly from the published names, to compare with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def rms(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def softmax_attention(q, k, v):  # [..., N, D]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v, scores.softmax(-1)


def split(x, heads):  # [B, N, C] -> [B, heads, N, D]
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def join(x):  # [B, heads, N, D] -> [B, N, C]
    return torch.cat(x.unbind(1), dim=-1)


def patchify(video, weight, bias):  # [B, 3, T, H, W] -> [B, N, C]
    _, _, t, p, _ = weight.shape
    tokens = []
    for i in range(video.shape[2] // t):
        for row in range(video.shape[3] // p):
            for column in range(video.shape[4] // p):
                a, b, c = i * t, row * p, column * p
                piece = video[:, :, a : a + t, b : b + p, c : c + p]
                tokens.append(piece.flatten(1) @ weight.flatten(1).T + bias)
    return torch.stack(tokens, 1)


def block(state, x, heads, gelu, drop=(1.0, 1.0)):
    def get(name):
        return state[name]

    normed = rms(x, get("norm1.weight"))
    q, k, v = (normed @ get("attn.qkv.weight").T).chunk(3, dim=-1)
    q, k = rms(q, get("attn.q_norm.weight")), rms(k, get("attn.k_norm.weight"))
    mixed = join(softmax_attention(split(q, heads), split(k, heads), split(v, heads))[0])
    mixed = mixed @ get("attn.proj.weight").T + get("attn.proj.bias")
    x = x + drop[0] * get("ls1.gamma") * mixed
    hidden = rms(x, get("norm2.weight")) @ get("mlp.fc1.weight").T + get("mlp.fc1.bias")
    hidden = F.gelu(hidden, approximate=gelu)
    return x + drop[1] * get("ls2.gamma") * (hidden @ get("mlp.fc2.weight").T + get("mlp.fc2.bias"))


def pool(state, x, heads):
    def norm(x, which):
        weight, bias = state[f"norm1_{which}.weight"], state[f"norm1_{which}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def project(x, which):
        return x @ state[f"cross_attn.{which}.weight"].T + state[f"cross_attn.{which}_bias"]

    q = split(project(norm(x.mean(1, keepdim=True), "q"), "q"), heads)
    k, v = split(project(norm(x, "k"), "k"), heads), split(project(norm(x, "v"), "v"), heads)
    mixed, probs = softmax_attention(q, k, v)
    out = join(mixed) @ state["cross_attn.proj.weight"].T + state["cross_attn.proj.bias"]
    return out[:, 0], probs.mean(1)[:, 0]


def under(state, prefix):
    return {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}


def encode(state, config, video, ids_keep=None):
    """Features after each block, pooled vector, pooling probabilities."""
    x = patchify(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    if ids_keep is not None:
        rows = [torch.cat([s[:1], s[1:][ids.long()]]) for s, ids in zip(x, ids_keep, strict=True)]
        x = torch.stack(rows)
    layers = []
    gelu = "tanh" if config.gelu == "tanh" else "none"
    for i in range(config.depth):
        x = block(under(state, f"blocks.{i}."), x, config.num_heads, gelu)
        layers.append(x)
    pooled, probs = pool(under(state, "clip_projector."), x, config.attn_pool_num_heads)
    return layers, pooled, probs
