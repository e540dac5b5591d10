"""Text towers of the CLIP variant behind one interface, and the small one: CLIP's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iv2.data.captions import Tokenizer
from iv2.models.clip_tokens import ClipTokenizer
from iv2.models.text import PackedText
from iv2kernels import Packed, attention, mlp
from iv2kernels.nn import Linear


class TextTokenizer(Protocol):
    """What is known of a tokenizer: ``iv2.data.captions.Tokenizer`` is one."""

    def encode(self, captions: Sequence[str], max_tokens: int) -> PackedText:
        """Captions as tokens, the longer ones cut."""

    def save(self, folder: str | Path) -> None:
        """Write what the tower is made from, but for its weights, into a folder."""


class TextTower(Protocol):
    """What the CLIP model knows of its text tower, a ``torch.nn.Module``."""

    # Width D of the features.
    embed_dim: int

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of its captions."""

    def __call__(self, text: PackedText) -> Tensor:
        """Features [B, D], of any length."""

    def plain_name(self, name: str) -> str:
        """A name in a file or in the tower, without what differs between files."""


@dataclass(frozen=True)
class ClipTextConfig:
    """CLIP's causal transformer, with the sizes of MobileCLIP-B."""

    # Tokens known.
    vocab_size: int = 49408
    # Width.
    embed_dim: int = 512
    # Layers.
    depth: int = 12
    # Heads.
    num_heads: int = 8
    # Width of the MLPs.
    mlp_dim: int = 2048
    # Width of the features.
    out_dim: int = 512
    # Longest caption, in tokens with those for start and end.
    max_positions: int = 77
    # Recompute layers in backward.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"ClipTextConfig: embed_dim must be a multiple of num_heads, got {self.embed_dim}"
            )


CLIP_TEXT: dict[str, ClipTextConfig] = {
    "mobileclip-b": ClipTextConfig(),
    "tiny": ClipTextConfig(
        vocab_size=1000, embed_dim=128, depth=3, num_heads=4, mlp_dim=512, out_dim=128
    ),
}


class _Attention(nn.Module):
    """Causal self-attention over packed sequences."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = Linear(config.embed_dim, 3 * config.embed_dim)
        self.out_proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [total, C]
        q, k, v = self.qkv_proj(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        o = attention(q, k, v, causal=True, packed=packed)
        assert isinstance(o, Tensor)
        y: Tensor = self.out_proj(o.flatten(1))
        return y


class _Layer(nn.Module):
    """Pre-norm attention and MLP.

    The containers give the published names; at the numbers left out stand GELU and dropouts of 0.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.pre_norm_mha = nn.ModuleList([nn.LayerNorm(dim), _Attention(config)])
        self.pre_norm_ffn = nn.ModuleDict(
            {"0": nn.LayerNorm(dim), "1": Linear(dim, config.mlp_dim)}
            | {"4": Linear(config.mlp_dim, dim)}
        )

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [total, C]
        norm, attend = self.pre_norm_mha
        x = x + attend(norm(x), packed)
        fc1, fc2 = self.pre_norm_ffn["1"], self.pre_norm_ffn["4"]
        assert isinstance(fc1, Linear)
        assert isinstance(fc2, Linear)
        y = self.pre_norm_ffn["0"](x)
        return x + mlp(y, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate="none")


class _Table(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, 1, config.max_positions, config.embed_dim))


class ClipTextEncoder(nn.Module):
    """CLIP's text transformer over packed captions: the feature is that of the last token.

    Equal to the published towers on padded captions: no token sees what comes after it, and the
    last one, the end of the caption, is what they pick. GELU is the exact one. The names are those
    of MobileCLIP, whose towers the small InternVideo2-CLIP models have.

    Radford et al., CLIP, 2021, arXiv:2103.00020; Vasu et al., MobileCLIP, 2023, arXiv:2311.17049.

    Args:
        config: Sizes.
        tokenizer: Of the captions; without it only tokens can be read.
    """

    def __init__(
        self, config: ClipTextConfig, tokenizer: ClipTokenizer | Tokenizer | None = None
    ) -> None:
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                "ClipTextEncoder: vocab_size must be at least the tokenizer's "
                f"{tokenizer.vocab_size}, got {config.vocab_size}"
            )
        self.config, self._tokenizer = config, tokenizer
        self.embed_dim = config.out_dim
        self.embedding_layer = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positional_embedding = nn.ModuleDict({"pos_embed": _Table(config)})
        self.transformer = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.final_layer_norm = nn.LayerNorm(config.embed_dim)
        self.projection_layer = nn.Parameter(torch.empty(config.embed_dim, config.out_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as CLIP does."""
        dim, depth = self.config.embed_dim, self.config.depth
        nn.init.normal_(self.embedding_layer.weight, std=0.02)
        nn.init.normal_(self._table, std=0.01)
        nn.init.normal_(self.projection_layer, std=dim**-0.5)
        ends = (dim**-0.5) * (2 * depth) ** -0.5
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("qkv_proj"):
                    std = dim**-0.5
                else:
                    std = (2 * dim) ** -0.5 if name.endswith("ffn.1") else ends
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    @property
    def _table(self) -> Tensor:
        table = self.positional_embedding["pos_embed"]
        assert isinstance(table, _Table)
        return table.pos_embed

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of its captions.

        Raises:
            ValueError: The tower was made without.
        """
        if self._tokenizer is None:
            raise ValueError("ClipTextEncoder: tokenizer must be given for captions, got None")
        return self._tokenizer

    def forward(self, text: PackedText) -> Tensor:
        """Features [B, out_dim].

        Raises:
            ValueError: A caption is longer than ``config.max_positions``.
        """
        longest = self.config.max_positions
        if text.max_seqlen > longest:
            raise ValueError(
                f"ClipTextEncoder: text must be at most {longest} tokens long, "
                f"got {text.max_seqlen}"
            )
        packed = Packed(text.cu_seqlens, text.max_seqlen)
        x = self.embedding_layer(text.ids) + self._table[0, 0][text.positions]
        for layer in self.transformer:
            if self.config.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, packed, use_reentrant=False)
            else:
                x = layer(x, packed)
        last = self.final_layer_norm(x[text.cu_seqlens[1:].long() - 1])
        features: Tensor = last @ self.projection_layer
        return features

    def plain_name(self, name: str) -> str:
        """A name in a file or in the tower, without what differs between files."""
        return name.removeprefix("text_encoder.")
