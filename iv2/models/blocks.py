"""The transformer block, the decoders of distillation, and drop path keyed by sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from iv2kernels import mlp, rms_norm
from iv2kernels.nn import AddRMSNorm, Attention, Linear, Mlp


class LayerScale(nn.Module):
    """A gain per channel of a branch; ``AddRMSNorm`` multiplies it in float32."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))


class Block(nn.Module):
    """Pre-norm block on a residual stream that carries its last branch unadded.

    The norm of a block adds what the block before it left: the scaled branch, so that LayerScale,
    drop path, residual add and norm are one pass. Hence the arguments about the previous block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        qk_norm: bool,
        layer_scale: float,
        approximate: Literal["tanh", "none"],
    ) -> None:
        super().__init__()
        self.norm1 = AddRMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = AddRMSNorm(dim)
        self.mlp = Mlp(dim, hidden_dim, approximate=approximate)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self,
        branch: Tensor | None,  # [B, N, C], None at the first block
        residual: Tensor,  # [B, N, C]
        last_scale: Tensor | None,  # [C], LayerScale of branch
        last_drop: Tensor | None,  # [B], drop-path scale of branch
        drop: Tensor | None,  # [B], drop-path scale of the attention of this block
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Returns:
            The stream at its entrance (the feature of the block before), the stream after its
            attention, and the output of its MLP, which is still to be scaled and added.
        """
        if branch is None:
            entrance = residual
            weight = self.norm1.weight
            x = rms_norm(residual, weight, eps=self.norm1.eps).to(weight.dtype)
        else:
            x, entrance = self.norm1(branch, residual, layer_scale=last_scale, drop_scale=last_drop)
        x, middle = self.norm2(self.attn(x), entrance, layer_scale=self.ls1.gamma, drop_scale=drop)
        return entrance, middle, self.mlp(x)


def add_branch(
    branch: Tensor,  # [B, N, C]
    residual: Tensor,  # [B, N, C]
    layer_scale: Tensor,  # [C]
    drop_scale: Tensor | None,  # [B]
) -> Tensor:
    """What a norm would add, for the last block, which no norm follows."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    scale = layer_scale.to(wide)
    if drop_scale is not None:
        scale = scale * drop_scale.to(wide)[:, None, None]
    return torch.addcmul(residual.to(wide), branch.to(wide), scale).to(residual.dtype)


class LinearDecoder(nn.Module):
    """Linear head of a distillation target.

    ``norm`` holds the LayerNorm that belongs to it; ``iv2kernels.distill_loss`` applies it, with
    the L2 norm and the cosine, so that the normalised prediction is never stored.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.head = Linear(dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., D]
        y: Tensor = self.head(x)
        return y


class MlpDecoder(nn.Module):
    """Two-layer head with exact (erf) GELU; otherwise as ``LinearDecoder``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        # Called through the op; the container gives the published names head.0 and head.2.
        self.head = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, out_dim))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., D]
        fc1, fc2 = self.head[0], self.head[2]
        assert isinstance(fc1, Linear)
        assert isinstance(fc2, Linear)
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate="none")


DECODERS: dict[str, type[LinearDecoder] | type[MlpDecoder]] = {
    "linear": LinearDecoder,
    "mlp": MlpDecoder,
}


_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_SALT = 0x64726F70  # keeps these draws apart from the masks, which Philox draws from the same seeds


def uniform_by_seed(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but the seed and their place (splitmix64).

    Args:
        seeds: [B] int64.
        count: Numbers per seed.

    Returns:
        [count, B] float32.
    """
    place = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64) + _SALT
    x = seeds[None] + place[:, None] * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return _shift(x ^ _shift(x, 31), 40).float() * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift of int64 is arithmetic


def drop_path_scales(
    rates: list[float],  # by block
    batch: int,
    device: torch.device,
    seeds: Tensor | None = None,  # [B] int64
) -> Tensor:
    """Drop-path scales of both branches of every block: 0, or 1 / keep probability.

    With seeds the draws belong to the samples, whatever batch or process they are in; without, they
    come from torch's generator.

    Returns:
        [depth, 2, B] float32.
    """
    count = 2 * len(rates)
    draws = (
        torch.rand(count, batch, device=device)
        if seeds is None
        else uniform_by_seed(seeds.to(device), count)
    )
    keep = 1 - torch.tensor(rates, device=device).repeat_interleave(2)[:, None]
    return ((draws < keep) / keep).view(len(rates), 2, batch)
