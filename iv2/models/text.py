"""BERT as a text tower and, in its last layers, with cross-attention to media tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iv2kernels import Packed, attention, linear_cross_entropy
from iv2kernels.nn import Linear


@dataclass(frozen=True)
class PackedText:
    """Token sequences end to end, without padding."""

    # [total] int64, token numbers.
    ids: Tensor
    # [B + 1] int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
    cu_seqlens: Tensor
    # The longest sequence, or more.
    max_seqlen: int

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def firsts(self) -> Tensor:
        """Rows [B] int64 of the first tokens."""
        return self.cu_seqlens[:-1].long()

    @property
    def positions(self) -> Tensor:
        """Place [total] int64 of each token in its sequence."""
        lengths = self.cu_seqlens.diff().long()
        every = torch.arange(len(self.ids), device=self.ids.device)
        return every - self.firsts.repeat_interleave(lengths, output_size=len(self.ids))

    def to(self, device: torch.device | str) -> PackedText:
        """The same on a device."""
        return PackedText(self.ids.to(device), self.cu_seqlens.to(device), self.max_seqlen)

    def select(
        self,
        rows: Tensor,  # [R] int64
    ) -> tuple[PackedText, Tensor]:
        """The sequences ``rows``, in that order and as often as they are named.

        Returns:
            Them, and their tokens' rows [total'] in this packing.
        """
        rows = rows.to(self.cu_seqlens.device)
        lengths = self.cu_seqlens.diff().long()[rows]
        cu = F.pad(lengths.cumsum(0), (1, 0))
        shift = self.firsts[rows] - cu[:-1]
        tokens = torch.arange(int(cu[-1]), device=cu.device) + shift.repeat_interleave(lengths)
        return PackedText(self.ids[tokens], cu.int(), self.max_seqlen), tokens


@dataclass(frozen=True)
class TextConfig:
    """BERT, whose layers from fusion_layer on look at media."""

    # Tokens known.
    vocab_size: int = 30522
    # Width.
    embed_dim: int = 1024
    # Layers.
    depth: int = 24
    # Heads.
    num_heads: int = 16
    # Width of the MLPs.
    mlp_dim: int = 4096
    # First layer with cross-attention.
    fusion_layer: int = 19
    # Width of the media tokens.
    media_dim: int = 1408
    # Longest sequence.
    max_positions: int = 512
    # Dropout of embeddings and branches.
    dropout: float = 0.1
    # Dropout of the attention's probabilities.
    attn_dropout: float = 0.1
    # Added to the variance in LayerNorm.
    layer_norm_eps: float = 1e-12
    # Recompute layers in backward.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for what, good, expected in (
            ("embed_dim", self.embed_dim % self.num_heads == 0, "a multiple of num_heads"),
            ("fusion_layer", 0 < self.fusion_layer < self.depth, "in (0, depth)"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("attn_dropout", 0 <= self.attn_dropout < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(
                    f"TextConfig: {what} must be {expected}, got {getattr(self, what)}"
                )


TEXT: dict[str, TextConfig] = {
    "bert-large": TextConfig(),
    "tiny": TextConfig(
        vocab_size=1000,
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_dim=512,
        fusion_layer=2,
        media_dim=128,
        dropout=0.0,
        attn_dropout=0.0,
    ),
}


class BertSizes(Protocol):
    """What the parts of BERT know of a configuration; the Q-Former's is another."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def attn_dropout(self) -> float: ...
    @property
    def layer_norm_eps(self) -> float: ...


class _Projections(nn.Module):
    """query, key and value; of tokens, or key and value of media."""

    def __init__(self, dim: int, media_dim: int) -> None:
        super().__init__()
        self.query = Linear(dim, dim)
        self.key = Linear(media_dim, dim)
        self.value = Linear(media_dim, dim)


class AddNorm(nn.Module):
    """The end of a branch: linear layer, dropout, drop path, residual, LayerNorm."""

    def __init__(self, in_dim: int, config: BertSizes) -> None:
        super().__init__()
        self.dense = Linear(in_dim, config.embed_dim)
        self.LayerNorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(
        self,
        branch: Tensor,  # [total, in_dim]
        x: Tensor,  # [total, C]
        scale: Tensor | None = None,  # [total, 1], of drop path
    ) -> Tensor:
        y = F.dropout(self.dense(branch), self.dropout, self.training)
        out: Tensor = self.LayerNorm((y if scale is None else y * scale) + x)
        return out


class BertAttention(nn.Module):
    """Post-norm attention over packed sequences."""

    def __init__(self, config: BertSizes, media_dim: int) -> None:
        super().__init__()
        # `self` and `output` are the published names.
        self.self = _Projections(config.embed_dim, media_dim)
        self.output = AddNorm(config.embed_dim, config)
        self.num_heads, self.dropout = config.num_heads, config.attn_dropout

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def forward(
        self,
        x: Tensor,  # [total, C]
        packed: Packed,
        media: tuple[Tensor, Tensor] | None,  # keys and values [B, N, heads, head_dim]
        scale: Tensor | None = None,  # [total, 1], of drop path
    ) -> Tensor:
        q = self.heads(self.self.query(x))
        if media is None:
            k, v = self.heads(self.self.key(x)), self.heads(self.self.value(x))
        else:
            k, v = (part.flatten(0, 1) for part in media)
        dropout = self.dropout if self.training else 0.0
        if dropout:
            o = _padded_attention(q, k, v, packed, dropout)
        else:
            o = attention(q, k, v, packed=packed)  # type: ignore[assignment]
        y: Tensor = self.output(o.flatten(1), x, scale)
        return y


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, dropout: float) -> Tensor:
    """PyTorch's attention on padded sequences, which drops probabilities; the op does not."""
    cu_q = packed.cu_seqlens_q.long()
    cu_k = cu_q if packed.cu_seqlens_k is None else packed.cu_seqlens_k.long()
    inside_q, inside_k = (
        torch.arange(int(cu.diff().max()), device=cu.device) < cu.diff()[:, None]
        for cu in (cu_q, cu_k)
    )

    def pad(x: Tensor, inside: Tensor) -> Tensor:  # [B, heads, longest, head_dim]
        padded = x.new_zeros(*inside.shape, *x.shape[1:])
        padded[inside] = x
        return padded.transpose(1, 2)

    seen = inside_k[:, None, None]
    o = F.scaled_dot_product_attention(
        pad(q, inside_q), pad(k, inside_k), pad(v, inside_k), attn_mask=seen, dropout_p=dropout
    )
    return o.transpose(1, 2)[inside_q]


class _Layer(nn.Module):
    def __init__(self, config: TextConfig, *, fusion: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config, config.embed_dim)
        if fusion:
            self.crossattention = BertAttention(config, config.media_dim)
        self.intermediate = nn.ModuleDict({"dense": Linear(config.embed_dim, config.mlp_dim)})
        self.output = AddNorm(config.mlp_dim, config)

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        across: Packed | None = None,
        media: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x = self.attention(x, packed, None)
        if across is not None:
            x = self.crossattention(x, across, media)
        y: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return y


class _Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embed_dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.embed_dim)
        self.token_type_embeddings = nn.Embedding(2, config.embed_dim)
        self.LayerNorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, text: PackedText) -> Tensor:
        x = self.word_embeddings(text.ids) + self.position_embeddings(text.positions)
        x = self.LayerNorm(x + self.token_type_embeddings.weight[0])
        return F.dropout(x, self.dropout, self.training)


class _Bert(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(
            _Layer(config, fusion=i >= config.fusion_layer) for i in range(config.depth)
        )
        self.encoder = nn.ModuleDict({"layer": layers})


class _Transform(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = Linear(config.embed_dim, config.embed_dim)
        self.LayerNorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return y


class _Predictions(nn.Module):
    """The masked-language head; its decoder is the table of word embeddings."""

    def __init__(self, config: TextConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.embed_dim, config.vocab_size)
        self.decoder.weight = words.weight
        self.bias = self.decoder.bias


class TextEncoder(nn.Module):
    """Post-norm BERT over packed sequences; the names are those of published files.

    Layers below ``fusion_layer`` read text alone (``encode``), those above read it beside media
    (``fuse``). All texts that look at one video are one sequence of queries in cross-attention, so
    keys and values exist once a video. With dropout of the attention PyTorch's kernel runs on
    padded sequences, with its own generator; without it, ``iv2kernels.attention`` on packed ones.

    Devlin et al., BERT, 2018, arXiv:1810.04805; Li et al., Align before Fuse, 2021,
    arXiv:2107.07651.

    Args:
        config: Sizes.
        mlm: Build the masked-language head.
    """

    def __init__(self, config: TextConfig, *, mlm: bool = True) -> None:
        super().__init__()
        self.config = config
        self.bert = _Bert(config)
        if mlm:
            words = self.bert.embeddings.word_embeddings
            self.cls = nn.ModuleDict({"predictions": _Predictions(config, words)})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as BERT does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.bert.embeddings.word_embeddings.weight[0] = 0

    @property
    def layers(self) -> nn.ModuleList:
        """Of the tower, first to last."""
        layers = self.bert.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def encode(self, text: PackedText) -> Tensor:
        """Hidden states [total, C] of text alone.

        Raises:
            ValueError: A sequence is longer than ``max_positions``.
        """
        if text.max_seqlen > self.config.max_positions:
            raise ValueError(
                f"TextEncoder: text must be at most {self.config.max_positions} tokens long, "
                f"got {text.max_seqlen}"
            )
        packed = Packed(text.cu_seqlens, text.max_seqlen)
        x: Tensor = self.bert.embeddings(text)
        for layer in self.layers[: self.config.fusion_layer]:
            x = self._run(layer, x, packed)
        return x

    def project_media(
        self,
        media: Tensor,  # [B, N, media_dim]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, N, heads, head_dim] of each fusion layer."""
        found = []
        for layer in self.layers[self.config.fusion_layer :]:
            assert isinstance(layer, _Layer)
            across = layer.crossattention
            key, value = across.self.key(media), across.self.value(media)
            found.append((across.heads(key), across.heads(value)))
        return found

    def fuse(
        self,
        hidden: Tensor,  # [total, C]
        text: PackedText,
        media: list[tuple[Tensor, Tensor]],
        media_ids: Tensor,  # [R] int64
    ) -> Tensor:
        """Hidden states [total, C] of texts that look at media.

        Args:
            hidden: From ``encode``.
            text: R sequences.
            media: From ``project_media``.
            media_ids: Which of the B media each text looks at, without decreasing.

        Raises:
            ValueError: media_ids are not one a text, decrease, or name none of the media.
        """
        keys = media[0][0]
        batch, tokens = keys.shape[:2]
        if len(media_ids) != len(text):
            raise ValueError(
                f"TextEncoder: media_ids must be {len(text)}, one a text, got {len(media_ids)}"
            )
        if (F.pad(media_ids, (1, 0)).diff() < 0).any() or (media_ids >= batch).any():
            raise ValueError(
                f"TextEncoder: media_ids must be in [0, {batch}) and not decrease, "
                f"got {media_ids.tolist()}"
            )
        # rows of text before each of the media: the queries of one lie side by side
        edges = torch.searchsorted(media_ids, torch.arange(batch + 1, device=media_ids.device))
        cu_q = text.cu_seqlens[edges]
        cu_k = torch.arange(batch + 1, dtype=torch.int32, device=keys.device) * tokens
        packed = Packed(text.cu_seqlens, text.max_seqlen)
        across = Packed(cu_q, int(cu_q.diff().max()), cu_k, tokens)
        for layer, kv in zip(self.layers[self.config.fusion_layer :], media, strict=True):
            hidden = self._run(layer, hidden, packed, across, kv)
        return hidden

    def _run(self, layer: nn.Module, *arguments: object) -> Tensor:
        if self.config.checkpoint and self.training and torch.is_grad_enabled():
            kept: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
            return kept
        y: Tensor = layer(*arguments)
        return y

    def mlm_loss(
        self,
        hidden: Tensor,  # [M, C]
        targets: Tensor,  # [M]
    ) -> Tensor:
        """Mean cross-entropy of the masked tokens; 0 without any. Logits are not stored."""
        head = self.cls["predictions"]
        assert isinstance(head, _Predictions)
        x = head.transform(hidden)
        return linear_cross_entropy(x, head.decoder.weight, targets, bias=head.bias)
