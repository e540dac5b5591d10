"""attention by a library's kernels on a GPU: what ours are measured against, and tune may choose.

PyTorch's SDPA, held to its FlashAttention (``torch``) or to cuDNN (``cudnn``), and the flash-attn
package; autograd differentiates them, as it does the reference. They take less than ours:
``refuses`` says what not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from iv2kernels.ops.attention import Packed

_BACKENDS = {"torch": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_LARGEST_HEAD_DIM = {"torch": 256, "cudnn": 128, "flash_attn": 256}


def refuses(impl: str, q: Tensor, k: Tensor, causal: bool, packed: Packed | None) -> str | None:
    """The reason why a library does not take these, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16, got {q.dtype}"
    largest, head_dim = _LARGEST_HEAD_DIM[impl], q.shape[-1]
    if head_dim % 8 or head_dim > largest:
        return f"it takes head_dim up to {largest} in steps of 8, got {head_dim}"
    if packed is not None and (
        impl != "flash_attn" or (causal and packed.cu_seqlens_k is not None)
    ):
        return "it does not take such packed sequences"
    if causal and packed is None and q.shape[1] != k.shape[1]:
        # they differ in which end of the shorter side they align
        return f"causal must be over equal lengths, got {q.shape[1]} and {k.shape[1]}"
    return "it does not take empty tensors" if q.numel() == 0 or k.numel() == 0 else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    packed: Packed | None,
    impl: str,
) -> Tensor:
    """See iv2kernels/ops/attention.py."""
    if impl == "flash_attn":
        return _flash_attn(q, k, v, causal, scale, packed)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(_BACKENDS[impl]):
        o = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, packed: Packed | None
) -> Tensor:
    import flash_attn

    options: dict[str, Any] = {"causal": causal, "softmax_scale": scale}
    if packed is None:
        return flash_attn.flash_attn_func(q, k, v, **options)  # type: ignore[no-any-return]
    starts, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    k_starts = starts if packed.cu_seqlens_k is None else packed.cu_seqlens_k
    k_longest = longest if packed.max_seqlen_k is None else packed.max_seqlen_k
    return flash_attn.flash_attn_varlen_func(  # type: ignore[no-any-return]
        q, k, v, starts, k_starts, longest, k_longest, **options
    )
