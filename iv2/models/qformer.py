"""Q-Former: learnt queries that read the tokens of a video, beside the words of an instruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iv2.models.text import AddNorm, BertAttention, PackedText
from iv2kernels import Packed
from iv2kernels.nn import Linear


@dataclass(frozen=True)
class QFormerConfig:
    """BERT-base whose every second layer looks at a video."""

    # Words of instructions known; published: those of BERT and one more.
    vocab_size: int = 30523
    # Width.
    embed_dim: int = 768
    # Layers.
    depth: int = 12
    # Heads.
    num_heads: int = 12
    # Width of the MLPs.
    mlp_dim: int = 3072
    # Of so many layers the first looks at the video.
    cross_every: int = 2
    # Width of the video's tokens.
    media_dim: int = 1408
    # Queries, as in BLIP-2.
    num_queries: int = 32
    # More queries, as VideoChat2 added.
    num_extra_queries: int = 64
    # Of all these, the last ones, which hear where there is sound, and then see nothing: queries
    # that may look at both soon look at pictures alone. Published models hear nothing.
    num_hearing_queries: int = 32
    # Longest instruction, in tokens.
    max_positions: int = 512
    # Dropout of embeddings and branches.
    dropout: float = 0.1
    # Dropout of the attention's probabilities.
    attn_dropout: float = 0.1
    # Drop-path rate of the last layer; it grows linearly from 0 at the first.
    drop_path: float = 0.2
    # Added to the variance in LayerNorm.
    layer_norm_eps: float = 1e-12
    # Standard deviation of the weights at the start; BERT's is 0.02.
    init_std: float = 0.02
    # Recompute layers in backward.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for what, good, expected in (
            ("embed_dim", self.embed_dim % self.num_heads == 0, "a multiple of num_heads"),
            ("cross_every", self.cross_every > 0, "positive"),
            ("num_queries", self.num_queries > 0, "positive"),
            ("num_extra_queries", self.num_extra_queries >= 0, ">= 0"),
            ("num_hearing_queries", self.num_hearing_queries > 0, "positive"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("attn_dropout", 0 <= self.attn_dropout < 1, "in [0, 1)"),
            ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(
                    f"QFormerConfig: {what} must be {expected}, got {getattr(self, what)}"
                )


QFORMER: dict[str, QFormerConfig] = {
    "base": QFormerConfig(),
    "tiny": QFormerConfig(
        vocab_size=1000,
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_dim=512,
        media_dim=128,
        num_queries=4,
        num_extra_queries=12,
        num_hearing_queries=8,
        dropout=0.0,
        attn_dropout=0.0,
        drop_path=0.0,
        # From nothing, and narrow: with BERT's the video is not heard for hundreds of steps.
        init_std=0.08,
    ),
}


@dataclass(frozen=True)
class _Rows:
    """Which rows of a packing are queries, which are words."""

    packed: Packed
    # [B * Q] int64, ascending.
    queries: Tensor
    # [rows of words] int64, ascending.
    words: Tensor


class _Layer(nn.Module):
    def __init__(self, config: QFormerConfig, *, cross: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config, config.embed_dim)
        if cross:
            self.crossattention = BertAttention(config, config.media_dim)
        self.intermediate = nn.ModuleDict({"dense": Linear(config.embed_dim, config.mlp_dim)})
        self.output = AddNorm(config.mlp_dim, config)
        self.intermediate_query = nn.ModuleDict({"dense": Linear(config.embed_dim, config.mlp_dim)})
        self.output_query = AddNorm(config.mlp_dim, config)
        self.cross = cross

    def forward(
        self,
        x: Tensor,  # [total, C]
        media: Tensor,  # [B, N, media_dim]
        rows: _Rows,
        across: Packed,
        scales: list[Tensor] | None,  # 3 of [B]: of attention, cross-attention, MLP
    ) -> Tensor:
        sizes = rows.packed.cu_seqlens_q.diff().long()
        per_row = _spread(scales, sizes, len(x))
        x = self.attention(x, rows.packed, None, per_row[0])
        per_query = [None if s is None else s[rows.queries] for s in per_row]
        q = x[rows.queries]
        if self.cross:
            look = self.crossattention
            keys, values = look.heads(look.self.key(media)), look.heads(look.self.value(media))
            q = look(q, across, (keys, values), per_query[1])
        q = self.output_query(F.gelu(self.intermediate_query["dense"](q)), q, per_query[2])
        if not len(rows.words):
            alone: Tensor = q
            return alone
        w, scale = x[rows.words], per_row[2]
        scale = None if scale is None else scale[rows.words]
        w = self.output(F.gelu(self.intermediate["dense"](w)), w, scale)
        order = torch.cat([rows.queries, rows.words]).argsort()
        y: Tensor = torch.cat([q, w])[order]
        return y


def _spread(scales: list[Tensor] | None, sizes: Tensor, total: int) -> list[Tensor | None]:
    """Factors of samples as factors [total, 1] of rows."""
    if scales is None:
        return [None, None, None]
    return [s.repeat_interleave(sizes, output_size=total)[:, None] for s in scales]


class _Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embeddings = nn.Embedding(config.max_positions, config.embed_dim)
        self.LayerNorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)


class _Bert(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(
            _Layer(config, cross=i % config.cross_every == 0) for i in range(config.depth)
        )
        self.encoder = nn.ModuleDict({"layer": layers})


class QFormer(nn.Module):
    """Post-norm BERT in which queries attend to each other, to words and, in some layers, to media.

    Queries and words share the self-attention; MLPs are apart, and words do not look at the media.
    Each sample is one packed sequence, its queries before its words. With dropout of the attention
    PyTorch's kernel runs on padded sequences; without it, ``iv2kernels.attention`` on packed ones.
    The names are those of published files below ``qformer.``.

    Li et al., BLIP-2, 2023, arXiv:2301.12597; Dai et al., InstructBLIP, 2023, arXiv:2305.06500.

    Args:
        config: Sizes.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = _Bert(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as BERT does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.bert.embeddings.word_embeddings.weight[0] = 0

    def forward(
        self,
        queries: Tensor,  # [1 or B, Q, C]
        media: Tensor,  # [B, N, media_dim]
        text: PackedText | None = None,
    ) -> Tensor:
        """What the queries found, [B, Q, C].

        Args:
            queries: The learnt queries.
            media: Tokens of the videos.
            text: An instruction for each, or None.

        Raises:
            ValueError: The instructions are not one a video, or one is too long.
        """
        batch, tokens = media.shape[:2]
        self._check(text, batch)
        x = queries.expand(batch, -1, -1)
        count = x.shape[1]
        rows = _rows(batch, count, text, media.device)
        embeddings = self.bert.embeddings
        if text is None:
            x = x.flatten(0, 1)
        else:
            words = embeddings.word_embeddings(text.ids)
            words = words + embeddings.position_embeddings(text.positions)
            order = torch.cat([rows.queries, rows.words]).argsort()
            x = torch.cat([x.flatten(0, 1).to(words.dtype), words])[order]
        x = F.dropout(embeddings.LayerNorm(x), self.config.dropout, self.training)
        steps = torch.arange(batch + 1, dtype=torch.int32, device=media.device)
        across = Packed(steps * count, count, steps * tokens, tokens)
        layers = self.bert.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        rates = torch.linspace(0, self.config.drop_path, len(layers)).tolist()
        for layer, rate in zip(layers, rates, strict=True):
            arguments = (x, media, rows, across, self._drops(rate, media))
            if self.config.checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x[rows.queries].view(batch, count, -1)

    def _drops(self, rate: float, media: Tensor) -> list[Tensor] | None:
        if not self.training or not rate:
            return None
        kept = torch.full((3, media.shape[0]), 1 - rate, device=media.device)
        return list((torch.bernoulli(kept) / (1 - rate)).to(media.dtype))

    def _check(self, text: PackedText | None, batch: int) -> None:
        if text is None:
            return
        if len(text) != batch:
            raise ValueError(f"QFormer: text must be {batch} sequences, got {len(text)}")
        if text.max_seqlen > self.config.max_positions:
            raise ValueError(
                f"QFormer: text must be at most {self.config.max_positions} tokens long, "
                f"got {text.max_seqlen}"
            )


def _rows(batch: int, count: int, text: PackedText | None, device: torch.device) -> _Rows:
    every = torch.arange(batch + 1, dtype=torch.int32, device=device)
    cu, longest = every * count, count
    if text is not None:
        cu, longest = cu + text.cu_seqlens.to(device), count + text.max_seqlen
    queries = (cu[:-1, None].long() + torch.arange(count, device=device)).flatten()
    words = torch.empty(0, dtype=torch.int64, device=device)
    if text is not None:
        lengths = text.cu_seqlens.diff().long().to(device)
        before = (every[1:].long() * count).repeat_interleave(lengths, output_size=len(text.ids))
        words = before + torch.arange(len(text.ids), device=device)
    return _Rows(Packed(cu, longest), queries, words)
