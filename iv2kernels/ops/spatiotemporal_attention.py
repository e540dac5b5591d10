"""The attention of InternVideo2's block: packed qkv, RMSNorm of q and k over all heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl


from iv2kernels.ops import attention as attention_op
from iv2kernels.ops.add_rms_norm import reference as _norm


def spatiotemporal_attention(qkv, q_weight=None, k_weight=None, *, scale=None, eps=1e-6, impl=None):
    return reference(qkv, q_weight, k_weight, qkv.shape[-1] ** -0.5 if scale is None else scale, eps)


def reference(qkv, q_weight, k_weight, scale, eps):
    """The definition."""
    q, k, v = qkv.unbind(2)
    if q_weight is not None:
        q = _norm(q.flatten(2), None, q_weight, None, None, eps)[0].view_as(q)
        k = _norm(k.flatten(2), None, k_weight, None, None, eps)[0].view_as(k)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return o.transpose(1, 2).flatten(2)
