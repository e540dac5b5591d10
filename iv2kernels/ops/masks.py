"""Which tokens the student sees: random, tube and attention-guided masks as index tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def _keep(seeds, weights, num_keep, stream):
    out = []
    for b in range(len(seeds)):
        g = torch.Generator().manual_seed((int(seeds[b]) * 1000003 + stream) % (2**62))
        e = torch.empty(weights.shape[1:]).exponential_(generator=g)
        ids = (weights[b].float().clamp_min(1e-30) / e).topk(num_keep, -1).indices.sort(-1).values
        out.append((ids + torch.arange(weights.shape[1])[:, None] * weights.shape[2]).flatten())
    return torch.stack(out).int()


def random_mask(seeds, num_tokens, num_keep, *, stream=0, impl=None):
    return _keep(seeds, torch.ones(len(seeds), 1, num_tokens), num_keep, stream)


def tube_mask(seeds, num_frames, tokens_per_frame, keep_per_frame, *, stream=0, impl=None):
    ids = _keep(seeds, torch.ones(len(seeds), 1, tokens_per_frame), keep_per_frame, stream)
    return (ids[:, None] + (torch.arange(num_frames) * tokens_per_frame)[None, :, None]).flatten(1).int()


def attention_guided_mask(seeds, weights, num_keep, *, stream=0, impl=None):
    return _keep(seeds, weights, num_keep, stream)
