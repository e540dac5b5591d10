"""Frozen teachers of distillation, real and small, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.checkpoint import Report, load_checkpoint
from iv2.models.positions import Grid, sincos_space_time, sinusoid
from iv2.models.vision import VISION, VisionConfig, VisionEncoder, return_layers
from iv2kernels import attention, linear, spatiotemporal_attention
from iv2kernels.nn import Linear, Mlp, PatchEmbed, RMSNorm


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher gives for a batch, without gradient.

    The features stay where the teacher left them: ``rows`` says in which row of ``tokens`` a
    visible patch of the student is, and ``distill_loss`` gathers by it.
    """

    # By layer, ascending: [B, R, D].
    tokens: list[Tensor]
    # Pooled vectors [B, D'], None without a pooling head.
    pooled: Tensor | None
    # Weights [B, F, N] float32 for attention_guided_mask: by frame, or F = 1 for the whole clip.
    attention: Tensor | None
    # Patches per frame where each frame has a CLS row of its own (the first is their mean), None
    # where one CLS row or none comes first.
    patches_per_frame: int | None
    # Whether the first row is a CLS row.
    has_cls: bool

    def rows(self, ids_keep: Tensor) -> Tensor:
        """Rows of ``tokens`` for the student's visible tokens.

        Args:
            ids_keep: [B, N_keep] patch indices, time-major.

        Returns:
            [B, (1+)N_keep] of the same dtype; row 0, CLS, comes first where the teacher has it.
        """
        rows = ids_keep + int(self.has_cls)
        if self.patches_per_frame is not None:
            rows = rows + torch.div(ids_keep, self.patches_per_frame, rounding_mode="floor")
        return F.pad(rows, (1, 0)) if self.has_cls else rows

    def row(self, place: int) -> TeacherOutput:
        """A copy of what is of one clip, as a batch of one."""

        def one(x: Tensor) -> Tensor:
            return x[place : place + 1].clone()

        return replace(
            self,
            tokens=[one(x) for x in self.tokens],
            pooled=None if self.pooled is None else one(self.pooled),
            attention=None if self.attention is None else one(self.attention),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (*self.tokens, self.pooled, self.attention)
        return sum(x.nbytes for x in tensors if x is not None)


def join_outputs(parts: Sequence[TeacherOutput]) -> TeacherOutput:
    """The output for a batch from those for its parts, in order."""
    first = parts[0]
    return replace(
        first,
        tokens=[torch.cat(layer) for layer in zip(*(p.tokens for p in parts), strict=True)],
        pooled=_joined([p.pooled for p in parts]),
        attention=_joined([p.attention for p in parts]),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [x for x in parts if x is not None]
    return torch.cat(found) if found else None


class Teacher(nn.Module):
    """A teacher: ``forward`` distils, ``logits`` serves its supervised training.

    Attributes:
        layers: Blocks, ascending, whose features are the targets.
        embed_dim: Width of these features.
        pooled_dim: Width of the pooled vector, 0 without one.
    """

    layers: tuple[int, ...]
    embed_dim: int
    pooled_dim: int

    @torch.no_grad()
    def forward(self, video: Tensor) -> TeacherOutput:  # uint8 [B,T,H,W,3] | float [B,3,T,H,W]
        """Targets of a batch; videos of another size than the teacher's are resized."""
        raise NotImplementedError

    def logits(self, video: Tensor) -> Tensor:  # -> [B, num_classes]
        """Class scores of the supervised head, with gradient."""
        raise NotImplementedError

    def load(self, path: str | os.PathLike[str], **options: Any) -> Report:
        """Load the published file of this teacher; ``options`` are those of load_checkpoint."""
        raise NotImplementedError

    def freeze(self) -> Teacher:
        """Set evaluation mode and stop gradients."""
        return self.eval().requires_grad_(False)


class EncoderTeacher(Teacher):
    """A ``VisionEncoder`` that sees the whole clip: the stage-2 1B teacher of the small models."""

    def __init__(self, config: VisionConfig, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.layers, self.embed_dim = layers, config.embed_dim
        self.pooled_dim = config.clip_embed_dim

    @torch.no_grad()
    def forward(self, video: Tensor) -> TeacherOutput:
        video = resize_video(video, self.encoder.config.img_size)
        out = self.encoder(video, layers=self.layers)
        dtype = self.encoder.cls_token.dtype
        tokens = [out.layers[i].to(dtype) for i in self.layers]
        return TeacherOutput(tokens, out.pooled, out.attention[:, None, 1:], None, True)

    def logits(self, video: Tensor) -> Tensor:
        return self.encoder.logits(resize_video(video, self.encoder.config.img_size))

    def load(self, path: str | os.PathLike[str], **options: Any) -> Report:
        return load_checkpoint(self.encoder, path, **options)


class InternVLTeacher(EncoderTeacher):
    """A ``VisionEncoder`` that sees one frame at a time: InternVL's vision tower.

    The CLS token of a clip is the mean over its frames, and so is the pooled vector.
    """

    @torch.no_grad()
    def forward(self, video: Tensor) -> TeacherOutput:
        frames, count = self._frames(video)
        out = self.encoder(frames, layers=self.layers)
        dtype = self.encoder.cls_token.dtype
        tokens = []
        for i in self.layers:
            # Frames end to end, each with its CLS row: nothing is copied to join them.
            clip = out.layers[i].to(dtype).unflatten(0, (-1, count))
            clip[:, 0, 0] = clip[:, :, 0].mean(1)
            tokens.append(clip.flatten(1, 2))
        pooled = out.pooled.unflatten(0, (-1, count)).mean(1)
        weights = out.attention.unflatten(0, (-1, count))[:, :, 1:]
        return TeacherOutput(tokens, pooled, weights, weights.shape[2], True)

    def logits(self, video: Tensor) -> Tensor:
        frames, count = self._frames(video)
        pooled = self.encoder(frames).pooled.unflatten(0, (-1, count)).mean(1)
        scores: Tensor = self.encoder.head(self.encoder.fc_norm(pooled))
        return scores

    def _frames(self, video: Tensor) -> tuple[Tensor, int]:
        """[B * T] clips of one frame, and T."""
        video = resize_video(video, self.encoder.config.img_size)
        if video.dtype == torch.uint8:
            return video.flatten(0, 1)[:, None], video.shape[1]
        return video.transpose(1, 2).flatten(0, 1)[:, :, None], video.shape[2]


@dataclass(frozen=True)
class VideoMAEConfig:
    """A VideoMAEv2 encoder."""

    # Width C of the tokens.
    embed_dim: int = 1408
    # Number of blocks.
    depth: int = 40
    # Attention heads in a block.
    num_heads: int = 16
    # Hidden width of the MLP over embed_dim.
    mlp_ratio: float = 48 / 11
    # Side of the frames in pixels; others are resized.
    img_size: int = 224
    # Side of a patch in pixels.
    patch_size: int = 14
    # Frames in a tubelet.
    tubelet_size: int = 2
    # Frames of a clip.
    num_frames: int = 16
    # RMSNorm of q and k over all heads; the published model has none.
    qk_norm: bool = False
    # Fixed position table: over the token number, as published, or sin-cos in time, row and column.
    pos_table: Literal["sinusoid", "sincos"] = "sinusoid"
    # Attention among the heads of a token, as the released code computes it by mistake.
    as_released: bool = False
    # Classes of the supervised head; 0 builds none.
    num_classes: int = 0

    @property
    def grid(self) -> Grid:
        """Tubelets and patches (T, h, w)."""
        side = self.img_size // self.patch_size
        return (self.num_frames // self.tubelet_size, side, side)


class _MAEAttention(nn.Module):
    """Attention with a bias of q and v, and none of k."""

    def __init__(self, dim: int, num_heads: int, as_released: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.as_released = num_heads, as_released
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.q_norm = RMSNorm(dim) if qk_norm else None
        self.k_norm = RMSNorm(dim) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        batch, tokens, dim = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias).view(batch, tokens, 3, self.num_heads, -1)
        if self.as_released:
            # [B, heads, N, D] handed to a kernel that reads [B, N, heads, D], and flattened so.
            q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
            o = attention(q, k, v)
            assert isinstance(o, Tensor)  # a pair only with return_lse
            mixed = o.reshape(batch, tokens, dim)
        else:
            norms = [None if n is None else n.weight for n in (self.q_norm, self.k_norm)]
            mixed = spatiotemporal_attention(qkv, *norms)
        y: Tensor = self.proj(mixed)
        return y


class _MAEBlock(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = _MAEAttention(dim, config.num_heads, config.as_released, config.qk_norm)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), approximate="none")

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class VideoMAEEncoder(nn.Module):
    """VideoMAEv2's encoder: tubelets, no CLS token, a fixed table, LayerNorm."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(
            dim, patch_size=config.patch_size, tubelet_size=config.tubelet_size
        )
        self.blocks = nn.ModuleList(_MAEBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self._table: Tensor | None = None  # not in published files, and cheap to make
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the released code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position(self, num_tokens: int) -> Tensor:
        """The fixed table [N, C] in the dtype of the weights."""
        weight = self.patch_embed.proj.weight
        table = self._table
        if (
            table is None
            or len(table) != num_tokens
            or table.device != weight.device
            or table.dtype != weight.dtype
        ):
            dim, (_, height, width) = self.config.embed_dim, self.config.grid
            if self.config.pos_table == "sinusoid":
                table = sinusoid(dim, num_tokens).to(weight)
            else:
                per_frame = height * width
                table = sincos_space_time(dim, (num_tokens // per_frame, height, width)).to(weight)
            self._table = table
        return table

    def forward(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        layers: tuple[int, ...],
    ) -> list[Tensor]:
        """Features [B, N, C] after the blocks asked for; the last block's are normalised."""
        grid_tokens = self._num_tokens(video)
        x = self.patch_embed(video, pos_embed=self.position(grid_tokens))
        kept = []
        for i in range(max(layers) + 1):
            x = self.blocks[i](x)
            if i in layers:
                kept.append(self.norm(x) if i == len(self.blocks) - 1 else x)
        return kept

    def _num_tokens(self, video: Tensor) -> int:
        c = self.config
        axis = 1 if video.dtype == torch.uint8 else 2
        frames, height, width = video.shape[axis : axis + 3]
        if frames % c.tubelet_size:
            raise ValueError(
                f"VideoMAEEncoder: video must have a multiple of {c.tubelet_size} frames, "
                f"got {frames}"
            )
        return frames // c.tubelet_size * (height // c.patch_size) * (width // c.patch_size)


class VideoMAETeacher(Teacher):
    """VideoMAEv2-g, or a small model of its kind."""

    def __init__(self, config: VideoMAEConfig, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = VideoMAEEncoder(config)
        self.layers, self.embed_dim, self.pooled_dim = layers, config.embed_dim, 0
        if config.num_classes:
            self.head = Linear(config.embed_dim, config.num_classes)

    @torch.no_grad()
    def forward(self, video: Tensor) -> TeacherOutput:
        video = resize_video(video, self.encoder.config.img_size)
        return TeacherOutput(self.encoder(video, self.layers), None, None, None, False)

    def logits(self, video: Tensor) -> Tensor:
        video = resize_video(video, self.encoder.config.img_size)
        last = self.encoder(video, (self.encoder.config.depth - 1,))[0]
        scores: Tensor = self.head(last.mean(1))
        return scores

    def load(self, path: str | os.PathLike[str], **options: Any) -> Report:
        if self.encoder.config.num_classes:
            return load_checkpoint(self, path, **options)
        return load_checkpoint(self.encoder, path, **options)


def resize_video(video: Tensor, size: int) -> Tensor:
    """Bicubic resize of the frames to a square of the given side, when they are not that already.

    Args:
        video: uint8 [B, T, H, W, 3] or float [B, 3, T, H, W].
        size: Pixels.
    """
    integer = video.dtype == torch.uint8
    height, width = video.shape[2:4] if integer else video.shape[3:5]
    if (height, width) == (size, size):
        return video
    planes = video.movedim(-1, 1).float() if integer else video  # [B, 3, T, H, W]
    resized = F.interpolate(
        planes.flatten(0, 2)[:, None], size=(size, size), mode="bicubic", align_corners=False
    ).view(*planes.shape[:3], size, size)
    return resized.round().clamp(0, 255).byte().movedim(1, -1) if integer else resized


_TINY = VISION["tiny"]

# Name -> class, configuration, blocks whose features are the targets.
TEACHERS: dict[str, tuple[type[Any], VisionConfig | VideoMAEConfig, tuple[int, ...]]] = {
    "internvl-6b": (
        InternVLTeacher,
        # Under autocast the released stream is float32: its position table promotes it.
        replace(VISION["6b"], num_frames=1, layer_scale=0.1, residual_dtype="float32"),
        return_layers(48, 6, 1),
    ),
    "videomae-g": (VideoMAETeacher, VideoMAEConfig(), return_layers(40, 4, 1)),
    "stage2-1b": (EncoderTeacher, VISION["1b"], return_layers(40, 6, 3.34)),
    "teacher-image-tiny": (
        InternVLTeacher,
        replace(_TINY, num_frames=1),
        return_layers(_TINY.depth, 2, 1),
    ),
    "teacher-video-tiny": (
        VideoMAETeacher,
        VideoMAEConfig(
            embed_dim=_TINY.embed_dim,
            depth=_TINY.depth,
            num_heads=_TINY.num_heads,
            mlp_ratio=_TINY.mlp_ratio,
            img_size=_TINY.img_size,
            qk_norm=True,
            pos_table="sincos",
        ),
        # All blocks: what the first ones say of neighbouring frames leads the student to motion.
        return_layers(_TINY.depth, _TINY.depth, 1),
    ),
}


def build_teacher(name: str, layers: tuple[int, ...] | None = None, **overrides: Any) -> Teacher:
    """Build a teacher with fresh weights, trainable.

    Args:
        name: A key of ``TEACHERS``.
        layers: Blocks whose features are the targets, ascending; None takes the published ones.
        **overrides: Fields of its configuration.

    Raises:
        ValueError: There is no such teacher.
    """
    if name not in TEACHERS:
        raise ValueError(f"build_teacher: name must be one of {', '.join(TEACHERS)}, got {name}")
    kind, config, published = TEACHERS[name]
    teacher: Teacher = kind(replace(config, **overrides), layers or published)
    return teacher


def load_teacher(
    name: str,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> Teacher:
    """Build a teacher from its published file, frozen, converted to the dtype once.

    Args:
        name: A key of ``TEACHERS``.
        path: The published file of it, or one in that format.
        dtype: Of the weights and the features.
        device: Where it runs.
        **overrides: Fields of its configuration, or ``layers``.

    Raises:
        CheckpointError: The file cannot be read.
        ValueError: There is no such teacher, or the file does not fit it.
    """
    with torch.device("meta"):
        teacher = build_teacher(name, **overrides).to(dtype)
    teacher.load(path)
    return teacher.to(device).freeze()
