"""Drop-in modules over the ops, with the parameter names of the published InternVideo2 files."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2kernels.ops.add_rms_norm import add_rms_norm, rms_norm
from iv2kernels.ops.attention_pool import attention_pool
from iv2kernels.ops.linear import linear
from iv2kernels.ops.mlp import mlp
from iv2kernels.ops.patch_embed import patch_embed
from iv2kernels.ops.spatiotemporal_attention import spatiotemporal_attention


class Linear(nn.Linear):
    """``torch.nn.Linear`` that runs ``iv2kernels.linear``."""

    def forward(self, x: Tensor) -> Tensor:  # [..., C_in] -> [..., C_out]
        """Apply ``x weightᵀ + bias``."""
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis, in float32, with a gain.

    Args:
        dim: Width C.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        """Normalise x."""
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the width and eps."""
        return f"{self.weight.numel()}, eps={self.eps}"


class AddRMSNorm(RMSNorm):
    """Residual add with LayerScale and drop path, then RMSNorm; both results are returned.

    Replaces flash_attn.ops.rms_norm.DropoutAddRMSNorm(prenorm=True) at dropout 0.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [..., C]
        residual: Tensor | None = None,  # [..., C]
        *,
        layer_scale: Tensor | None = None,  # [C]
        drop_scale: Tensor | None = None,  # [B], 0 or 1/keep
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the new residual stream (see ``add_rms_norm``)."""
        return add_rms_norm(
            x,
            residual,
            self.weight,
            layer_scale=layer_scale,
            drop_scale=drop_scale,
            eps=self.eps,
        )


class Mlp(nn.Module):
    """``fc1``, GELU, ``fc2``.

    Args:
        dim: Width C in and out.
        hidden_dim: Width between the two layers.
        approximate: GELU flavour, named as in torch: "tanh" (published InternVideo2 weights), or
            "none", the exact erf form. There is no default, since a wrong one is not seen.
    """

    def __init__(self, dim: int, hidden_dim: int, *, approximate: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        """Apply the two layers."""
        return mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            approximate=self.approximate,
        )


class Attention(nn.Module):
    """Joint space-time self-attention with RMSNorm of q and k over the full width.

    Args:
        dim: Width C; C / num_heads is the head width.
        num_heads: Number of heads.
        qk_norm: Normalise q and k, all heads together, before the head split.
        eps: eps of these norms.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qk_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"Attention: dim must be a multiple of num_heads {num_heads}, got {dim}"
            )
        self.num_heads = num_heads
        self.eps = eps
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(dim, eps) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        """Attend among the tokens of each sample."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        y: Tensor = self.proj(spatiotemporal_attention(qkv, q_weight, k_weight, eps=self.eps))
        return y


class _PoolAttention(nn.Module):
    """The projections of ``AttentionPool``: weights without bias, biases as separate parameters."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.q = Linear(dim, dim, bias=False)
        self.k = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, out_dim)


class AttentionPool(nn.Module):
    """Pool tokens with one query, their mean, by multi-head attention.

    Equivalent to, with m the mean of the tokens::

        q, k, v = Wq norm1_q(m) + q_bias, Wk norm1_k(x) + k_bias, Wv norm1_v(x) + v_bias
        p = softmax(head_dim**-0.5 * q k^T)                     # per head
        pooled = proj(p v)

    It is computed in absorbed form: Wk moves to the query side and Wv behind the weighted sum, so
    that no key or value of a token is ever formed. ``k_bias`` and ``norm1_k.bias`` shift all logits
    of a head alike and cancel in the softmax: their gradient is exactly zero.

    Args:
        dim: Width C of the tokens.
        num_heads: Number of heads.
        out_dim: Width of the pooled vector.
        eps: eps of the three LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, out_dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"AttentionPool: dim must be a multiple of num_heads {num_heads}, got {dim}"
            )
        self.num_heads = num_heads
        self.eps = eps
        self.norm1_q = nn.LayerNorm(dim, eps)
        self.norm1_k = nn.LayerNorm(dim, eps)
        self.norm1_v = nn.LayerNorm(dim, eps)
        self.cross_attn = _PoolAttention(dim, out_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pool tokens.

        Args:
            x: [B, N, C]; its dtype may be wider than that of the parameters.

        Returns:
            The pooled vector [B, out_dim] in the dtype of the parameters, and the attention of the
            query averaged over the heads, [B, N] float32, without gradient.
        """
        z, probs = attention_pool(x, self._absorbed_query(x), eps=self.eps)
        return self._project(z), probs

    def _absorbed_query(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, heads, C]
        attn, dtype = self.cross_attn, self.cross_attn.q.weight.dtype
        dim = x.shape[2]
        head_dim = dim // self.num_heads
        mean = F.layer_norm(
            x.mean(1).to(dtype), (dim,), self.norm1_q.weight, self.norm1_q.bias, self.eps
        )
        q: Tensor = attn.q(mean) + attn.q_bias
        # The biases that cancel stay in the graph: DDP waits for the gradient of each parameter.
        q = q + 0.0 * (attn.k_bias + self.norm1_k.bias)
        heads = q.view(-1, self.num_heads, head_dim).transpose(0, 1)  # [heads, B, head_dim]
        absorbed = heads @ attn.k.weight.view(self.num_heads, head_dim, dim)
        scaled: Tensor = absorbed.transpose(0, 1) * (self.norm1_k.weight * head_dim**-0.5)
        return scaled.to(x.dtype)

    def _project(self, z: Tensor) -> Tensor:  # [B, heads, C] -> [B, out_dim]
        attn, dtype = self.cross_attn, self.cross_attn.v.weight.dtype
        batch, heads, dim = z.shape
        # A head's probabilities sum to one, so that the LayerNorm's bias and v_bias pass through.
        affine = z.to(dtype) * self.norm1_v.weight + self.norm1_v.bias
        per_head = attn.v.weight.view(heads, dim // heads, dim).transpose(1, 2)
        values = affine.transpose(0, 1) @ per_head  # [heads, B, head_dim]
        values = values.transpose(0, 1).reshape(batch, dim)
        pooled: Tensor = attn.proj(values + attn.v_bias)
        return pooled


class PatchEmbed(nn.Module):
    """Tubelets of a video to tokens, for the visible patches only.

    Args:
        dim: Width C.
        patch_size: Side p of a patch in pixels.
        tubelet_size: Frames t in a tubelet.
    """

    def __init__(self, dim: int, *, patch_size: int = 14, tubelet_size: int = 1) -> None:
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        # Never called: it gives the published names, shapes and initialisation.
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        *,
        pos_embed: Tensor | None = None,  # [(1+)N, C]
        cls_token: Tensor | None = None,  # [C]
        ids_keep: Tensor | None = None,  # [B, N_keep]
    ) -> Tensor:
        """Embed the visible patches and add their positions (see ``patch_embed``)."""
        return patch_embed(
            video,
            self.proj.weight,
            self.proj.bias,
            pos_embed=pos_embed,
            cls_token=cls_token,
            ids_keep=ids_keep,
        )
