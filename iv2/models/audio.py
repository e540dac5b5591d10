"""BEATs: a transformer over patches of a mel spectrogram."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2kernels.nn import Linear


@dataclass(frozen=True)
class AudioConfig:
    """BEATs as published (iteration 3 and later)."""

    # Width.
    embed_dim: int = 768
    # Layers.
    depth: int = 12
    # Heads.
    num_heads: int = 12
    # Width of the MLPs.
    mlp_dim: int = 3072
    # Width of the patch embedding.
    patch_dim: int = 512
    # Side of a patch, in frames and bins.
    patch_size: int = 16
    # Bins of the spectrogram; InternVideo2 feeds 64, BEATs was trained with 128.
    num_mel_bins: int = 64
    # Kernel of the convolution that tells positions.
    conv_pos: int = 128
    # Its groups.
    conv_pos_groups: int = 16
    # Buckets of relative positions, and the distance from which they are alike.
    num_buckets: int = 320
    max_distance: int = 800
    # Dropout of embeddings and branches. The released code leaves it on though the tower is frozen;
    # here it follows the mode of the module.
    dropout: float = 0.1
    # Dropout of the attention's probabilities.
    attn_dropout: float = 0.1

    def __post_init__(self) -> None:
        for what, good, expected in (
            ("embed_dim", self.embed_dim % self.num_heads == 0, "a multiple of num_heads"),
            ("conv_pos_groups", self.embed_dim % self.conv_pos_groups == 0, "a divisor of C"),
            ("num_mel_bins", self.num_mel_bins % self.patch_size == 0, "a multiple of patch_size"),
        ):
            if not good:
                raise ValueError(
                    f"AudioConfig: {what} must be {expected}, got {getattr(self, what)}"
                )


AUDIO: dict[str, AudioConfig] = {
    "beats": AudioConfig(),
    "tiny": AudioConfig(
        embed_dim=128,
        depth=3,
        num_heads=4,
        mlp_dim=512,
        patch_dim=128,
        conv_pos=16,
        conv_pos_groups=16,
        num_buckets=64,
        max_distance=128,
        dropout=0.0,
        attn_dropout=0.0,
    ),
}


class _PositionConv(nn.Module):
    """Grouped convolution along the tokens with weight norm over the kernel's places, and GELU."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dim, kernel, groups = config.embed_dim, config.conv_pos, config.conv_pos_groups
        weight = torch.empty(dim, dim // groups, kernel)
        nn.init.normal_(weight, std=math.sqrt(4 / (kernel * dim)))
        self.weight_g = nn.Parameter(weight.pow(2).sum((0, 1), keepdim=True).sqrt())
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.groups, self.kernel = groups, kernel

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        v = self.weight_v
        weight = v * (self.weight_g / v.pow(2).sum((0, 1), keepdim=True).sqrt())
        y = F.conv1d(
            x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups
        )
        if self.kernel % 2 == 0:
            y = y[:, :, :-1]
        return F.gelu(y).transpose(1, 2)


class _SelfAttention(nn.Module):
    """Attention whose relative position bias is gated by the query."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.num_heads, self.dropout = heads, config.attn_dropout
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self.grep_linear = nn.Linear(dim // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        bias: Tensor,  # [heads, N, N]
    ) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # two gates a query and head, of four numbers each
        parts = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1, dtype=torch.float32)
        a, b = parts.sigmoid().chunk(2, -1)
        gate = a * (b * self.grep_a - 1.0) + 2.0  # [B, heads, N, 1]
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=(gate * bias).to(q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        y: Tensor = self.out_proj(o.transpose(1, 2).flatten(2))
        return y


class _Layer(nn.Module):
    """Post-norm layer with a stronger residual (DeepNorm)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.self_attn = _SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = config.dropout
        self.alpha = (2 * config.depth) ** 0.25

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        branch = F.dropout(self.self_attn(x, bias), self.dropout, self.training)
        x = self.self_attn_layer_norm(x * self.alpha + branch)
        branch = F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)
        y: Tensor = self.final_layer_norm(x * self.alpha + branch)
        return y


class _Encoder(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = nn.ModuleList([_PositionConv(config)])
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        table = nn.Embedding(config.num_buckets, config.num_heads)
        for layer in self.layers:  # one table, under the name that each layer has in files
            layer.self_attn.relative_attention_bias = table  # type: ignore[union-attr]
        self.layer_norm = nn.LayerNorm(config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.pos_conv[0](x))
        x = F.dropout(x, self.config.dropout, self.training)
        attn: Any = self.layers[0].self_attn
        buckets = relative_buckets(x.shape[1], self.config.num_buckets, self.config.max_distance)
        bias = attn.relative_attention_bias(buckets.to(x.device)).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def relative_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> Tensor:
    """T5's buckets [N, N] of key minus query: half for each direction, then half of it exact."""
    place = torch.arange(num_tokens)
    relative = place[None] - place[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, large)


class AudioEncoder(nn.Module):
    """BEATs; the names are those of published files.

    The attention runs on PyTorch's kernel, since ours takes no bias.

    Chen et al., BEATs, 2022, arXiv:2212.09058.

    Args:
        config: Sizes.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_dim, patch, patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.patch_dim)
        self.post_extract_proj = Linear(config.patch_dim, config.embed_dim)
        self.encoder = _Encoder(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as a DeepNorm transformer: branches shrink with the depth."""
        beta = (8 * self.config.depth) ** -0.25
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                shrunk = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                nn.init.xavier_normal_(module.weight, gain=beta if shrunk else 1.0)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        fbank: Tensor,  # [B, F, bins]
    ) -> Tensor:
        """Tokens [B, (F / 16) * (bins / 16), C], time first.

        Raises:
            ValueError: fbank is not [B, F, bins] with at least one patch.
        """
        size, bins = self.config.patch_size, self.config.num_mel_bins
        if fbank.dim() != 3 or fbank.shape[2] != bins or fbank.shape[1] < size:
            raise ValueError(
                f"AudioEncoder: fbank must be [B, F, {bins}] with F of at least {size}, "
                f"got {list(fbank.shape)}"
            )
        x = self.patch_embedding(fbank[:, None].to(self.patch_embedding.weight.dtype))
        x = self.layer_norm(x.flatten(2).transpose(1, 2))
        y: Tensor = self.encoder(self.post_extract_proj(x))
        return y
