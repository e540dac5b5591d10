"""Fused ops for video transformers, on CPUs and GPUs, with plain-PyTorch definitions.

The page about an op is ``iv2kernels/ops/<op>.py``. ``iv2kernels.nn`` has drop-in modules.
"""

# torch first: its OpenMP runtime is the one that the kernels then share.
import torch  # noqa: F401

from iv2kernels.dispatch import Impl, available, set_isa, use
from iv2kernels.ops.add_rms_norm import add_rms_norm, rms_norm
from iv2kernels.ops.attention import Packed, attention
from iv2kernels.ops.attention_blocks import (
    BlockMask,
    all_blocks,
    per_frame,
    per_tube,
    spacetime_window,
)
from iv2kernels.ops.attention_pool import attention_pool
from iv2kernels.ops.contrastive_loss import contrastive_loss
from iv2kernels.ops.distill_loss import distill_loss
from iv2kernels.ops.gather_tokens import gather_tokens
from iv2kernels.ops.hard_negatives import hard_negatives
from iv2kernels.ops.linear import linear
from iv2kernels.ops.linear_cross_entropy import linear_cross_entropy
from iv2kernels.ops.masks import attention_guided_mask, random_mask, tube_mask
from iv2kernels.ops.mlp import mlp
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD, patch_embed
from iv2kernels.ops.resized_crop_normalize import resized_crop_normalize
from iv2kernels.ops.rope3d import Rope3d, rope3d
from iv2kernels.ops.siglip_loss import siglip_loss
from iv2kernels.ops.spatiotemporal_attention import spatiotemporal_attention
from iv2kernels.tuning import load as _load_tuned
from iv2kernels.tuning import tune

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BlockMask",
    "Impl",
    "Packed",
    "Rope3d",
    "add_rms_norm",
    "all_blocks",
    "attention",
    "attention_guided_mask",
    "attention_pool",
    "available",
    "contrastive_loss",
    "distill_loss",
    "gather_tokens",
    "hard_negatives",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "patch_embed",
    "per_frame",
    "per_tube",
    "random_mask",
    "resized_crop_normalize",
    "rms_norm",
    "rope3d",
    "set_isa",
    "siglip_loss",
    "spacetime_window",
    "spatiotemporal_attention",
    "tube_mask",
    "tune",
    "use",
]

_load_tuned()
