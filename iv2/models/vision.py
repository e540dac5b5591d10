"""The video encoder: one class for student, teacher trunk, stage 2, CLIP, fine-tuning, features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iv2.models.blocks import DECODERS, Block, add_branch, drop_path_scales
from iv2.models.positions import (
    Grid,
    resize_space,
    resize_table,
    resize_time,
    sincos,
    sincos_space,
    sincos_space_time,
)
from iv2.models.vision_config import PRESETS, VISION, VisionConfig, return_layers, vision_config
from iv2kernels import gather_tokens
from iv2kernels.nn import AttentionPool, Linear, PatchEmbed

__all__ = [
    "PRESETS",
    "VISION",
    "Predictions",
    "VisionConfig",
    "VisionEncoder",
    "VisionFeatures",
    "VisionOutput",
    "build_encoder",
    "return_layers",
    "vision_config",
    "with_cls",
]


def build_encoder(size: str, preset: str | None = None, **overrides: Any) -> VisionEncoder:
    """Build a video encoder with fresh weights.

    Examples::

        encoder = build_encoder("1b", num_frames=8)
        student = build_encoder("6b", "stage1", drop_path=0.3, checkpoint_num=48)

    Args and errors are those of ``vision_config``.
    """
    return VisionEncoder(vision_config(size, preset, **overrides))


@dataclass(frozen=True)
class VisionOutput:
    """What an encoder gives for a batch. N counts the CLS token and the visible patches."""

    # [B, N, C] after the last block, without a final norm.
    tokens: Tensor
    # Pooled vectors [B, clip_embed_dim], None without the head.
    pooled: Tensor | None
    # Attention of the pooling query, mean over its heads, [B, N] float32 without gradient.
    attention: Tensor | None
    # [B, N, C] after each block asked for, by its index, ascending.
    layers: dict[int, Tensor]


@dataclass(frozen=True)
class Predictions:
    """Outputs of the decoders, before their LayerNorm (``decoder.norm``), for ``distill_loss``."""

    # By layer, ascending: [B, N, clip_teacher_embed_dim], the CLS token first.
    clip: list[Tensor]
    # [B, clip_teacher_final_dim].
    final: Tensor | None
    # By layer, ascending: [B, N - 1, mae_teacher_embed_dim].
    mae: list[Tensor]


@dataclass(frozen=True)
class VisionFeatures:
    """Features by name."""

    # "blocks.{i}": [B, N, C] after block i, the CLS token first, then the (visible) patches.
    tokens: dict[str, Tensor]
    # [B, clip_embed_dim], None without the head or when it was not asked for.
    pooled: Tensor | None
    # Tubelets and patches (T, h, w) of the video.
    grid: Grid


class VisionEncoder(nn.Module):
    """InternVideo2's plain joint space-time ViT."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = c = config
        dim = c.embed_dim
        self.patch_embed = PatchEmbed(dim, patch_size=c.patch_size, tubelet_size=c.tubelet_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self._add_tables("")
        self.blocks = nn.ModuleList(
            Block(
                dim,
                c.num_heads,
                int(dim * c.mlp_ratio),
                qk_norm=c.qk_norm,
                layer_scale=c.layer_scale,
                approximate="tanh" if c.gelu == "tanh" else "none",
            )
            for _ in range(c.depth)
        )
        if c.attn_pool_num_heads:
            self.clip_projector = AttentionPool(dim, c.attn_pool_num_heads, c.clip_embed_dim)
        self._add_decoders()
        if c.num_classes:
            self.fc_norm = nn.LayerNorm(c.clip_embed_dim)
            self.fc_dropout = nn.Dropout(c.fc_drop_rate)
            self.head = Linear(c.clip_embed_dim, c.num_classes)
        self.reset_parameters()

    def _add_decoders(self) -> None:
        c, decoder = self.config, DECODERS[self.config.clip_decoder]
        if c.clip_return_layer:
            self._add_tables("clip_")
            self.clip_decoder = nn.ModuleList(
                decoder(c.embed_dim, c.clip_teacher_embed_dim) for _ in range(c.clip_return_layer)
            )
            if c.clip_teacher_final_dim and c.attn_pool_num_heads:
                self.final_clip_decoder = decoder(c.clip_embed_dim, c.clip_teacher_final_dim)
        if c.mae_return_layer:
            self._add_tables("mae_")
            self.mae_decoder = nn.ModuleList(
                DECODERS["mlp"](c.embed_dim, c.mae_teacher_embed_dim)
                for _ in range(c.mae_return_layer)
            )

    def _add_tables(self, prefix: str) -> None:
        """Register the tables of one use: "" for the tokens, "clip_", "mae_" for the decoders."""
        c, rows = self.config, int(prefix != "mae_")
        frames, height, width = c.grid
        shapes = {f"{prefix}pos_embed": rows + math.prod(c.grid)}
        if c.sep_pos_embed:
            shapes = {
                f"{prefix}pos_embed_spatial": height * width,
                f"{prefix}pos_embed_temporal": frames,
            } | ({f"{prefix}pos_embed_cls": 1} if rows else {})
        elif c.sep_image_video_pos_embed and rows:
            shapes[f"{prefix}img_pos_embed"] = 1 + height * width
        for name, size in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, size, c.embed_dim)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published (the convolution keeps PyTorch's default)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                weight.div_(math.sqrt(2 * (i + 1)))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for name, parameter in self.named_parameters(recurse=False):
            if "pos_embed" in name:
                table = self._initial_table(name)
                parameter[0, parameter.shape[1] - len(table) :] = table.to(parameter.dtype)
        if self.config.num_classes:
            self.head.weight.mul_(self.config.init_scale)
            self.head.bias.mul_(self.config.init_scale)

    def _initial_table(self, name: str) -> Tensor:
        """The rows after the CLS row, which stays zero."""
        dim, (frames, height, width) = self.config.embed_dim, self.config.grid
        if name.endswith("_cls"):
            return torch.zeros(0, dim)
        if name.endswith("_spatial"):
            return sincos_space(dim, height, width)
        if name.endswith("_temporal"):
            return sincos(dim, torch.arange(frames))
        return sincos_space_time(dim, (1 if "img" in name else frames, height, width))

    def no_weight_decay(self) -> frozenset[str]:
        """Names of the parameters that weight decay must spare: 1-D, biases, tables, CLS."""
        return frozenset(
            name
            for name, p in self.named_parameters()
            if p.dim() <= 1 or "pos_embed" in name or name == "cls_token"
        )

    def grid_of(self, video: Tensor) -> Grid:
        """Tubelets and patches (T, h, w) of a video, uint8 [B,T,H,W,3] or float [B,3,T,H,W]."""
        c = self.config
        if video.dim() != 5:
            raise ValueError(
                "VisionEncoder: video must be [B, T, H, W, 3] uint8 or [B, 3, T, H, W] float, "
                f"got {list(video.shape)}"
            )
        axis = 1 if video.dtype == torch.uint8 else 2
        frames, height, width = video.shape[axis : axis + 3]
        if frames % c.tubelet_size or height % c.patch_size or width % c.patch_size:
            raise ValueError(
                f"VisionEncoder: video must be divisible by tubelets of {c.tubelet_size} frames "
                f"and patches of {c.patch_size} pixels, got {frames} frames of {height}x{width}"
            )
        return (frames // c.tubelet_size, height // c.patch_size, width // c.patch_size)

    def position(self, grid: Grid, prefix: Literal["", "clip_", "mae_"] = "") -> Tensor:
        """The position table of one use for any grid, [(1+)T*h*w, C], the CLS row first.

        A single frame takes the image table or, where there is none, the mean over time. "mae_"
        has no CLS row.
        """
        old, cls_row = self.config.grid, prefix != "mae_"
        if self.config.sep_pos_embed:
            return self._separate_position(grid, prefix, cls_row)
        if grid[0] == 1 and cls_row and self.config.sep_image_video_pos_embed:
            image = self.get_parameter(f"{prefix}img_pos_embed")
            return resize_table(image, (1, *old[1:]), grid)[0]
        table: Tensor = self.get_parameter(f"{prefix}pos_embed")
        if grid[0] == 1 and old[0] > 1:
            first = int(cls_row)
            body = table[:, first:].reshape(1, old[0], -1, table.shape[2]).mean(1)
            table, old = torch.cat([table[:, :first], body], dim=1), (1, *old[1:])
        return resize_table(table, old, grid, cls_row=cls_row)[0]

    def _separate_position(self, grid: Grid, prefix: str, cls_row: bool) -> Tensor:
        old, frames = self.config.grid, grid[0]
        space: Tensor = self.get_parameter(f"{prefix}pos_embed_spatial")
        time: Tensor = self.get_parameter(f"{prefix}pos_embed_temporal")
        space = resize_space(space, old[1:], grid[1:])[0]
        time = resize_time(time.transpose(0, 1), frames) if frames > 1 else time.mean(1)[None]
        table = (time.view(frames, 1, -1) + space).flatten(0, 1)
        if not cls_row:
            return table
        return torch.cat([self.get_parameter(f"{prefix}pos_embed_cls")[0], table])

    def forward(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        ids_keep: Tensor | None = None,  # [B, N_keep]
        *,
        seeds: Tensor | None = None,  # [B]
        layers: Sequence[int] = (),
        pool: bool = True,
    ) -> VisionOutput:
        """Encode a batch.

        Args:
            video: Frames or normalised video, of any length and size that the patches divide.
            ids_keep: Visible patches, as indices without the CLS row; None shows all.
            seeds: int64, the samples' keys for drop path; None takes torch's generator.
            layers: Blocks whose output to return; negative ones count from the end.
            pool: Run the pooling head, if there is one.
        """
        wanted = self._indices(layers)
        x = self._embed(video, ids_keep)
        kept: dict[int, Tensor] = {}
        x = self._run_blocks(x, len(self.blocks), wanted, kept, self._drops(x, seeds))
        pooled, attention = None, None
        if pool and self.config.attn_pool_num_heads:
            pooled, attention = self.clip_projector(x)
        return VisionOutput(x, pooled, attention, kept)

    def predict(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        ids_keep: Tensor | None = None,  # [B, N_keep]
        *,
        seeds: Tensor | None = None,  # [B]
    ) -> Predictions:
        """Encode a batch and run the decoders; the arguments are those of ``forward``."""
        c, grid = self.config, self.grid_of(video)
        has_final = hasattr(self, "final_clip_decoder")
        layers = c.clip_layers + c.mae_layers
        out = self(video, ids_keep, seeds=seeds, layers=layers, pool=has_final)
        clip: list[Tensor] = []
        mae: list[Tensor] = []
        if c.clip_layers:
            table, rows = self.position(grid, "clip_"), with_cls(ids_keep)
            for i, decoder in zip(c.clip_layers, self.clip_decoder, strict=True):
                clip.append(decoder(_add_position(out.layers[i], table, rows)))
        if c.mae_layers:
            table = self.position(grid, "mae_")
            for i, decoder in zip(c.mae_layers, self.mae_decoder, strict=True):
                mae.append(decoder(_add_position(out.layers[i][:, 1:], table, ids_keep)))
        return Predictions(clip, self.final_clip_decoder(out.pooled) if has_final else None, mae)

    def logits(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        *,
        seeds: Tensor | None = None,  # [B]
    ) -> Tensor:
        """Class scores [B, num_classes] of the fine-tuning head."""
        if not self.config.num_classes:
            raise ValueError("VisionEncoder: num_classes must be positive for logits, got 0")
        pooled = self(video, seeds=seeds).pooled
        scores: Tensor = self.head(self.fc_dropout(self.fc_norm(pooled)))
        return scores

    def features(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        layers: Sequence[int] = (-1,),
        ids_keep: Tensor | None = None,  # [B, N_keep]
        *,
        pool: bool = True,
    ) -> VisionFeatures:
        """Features of a batch, without drop path, for any frame count and resolution.

        Without ``pool`` the blocks behind the last of ``layers`` are not run.

        Args:
            video: Frames or normalised video.
            layers: Blocks whose output to return, from 0; negative ones count from the end.
            ids_keep: Visible patches, as indices without the CLS row; None shows all.
            pool: Give the pooled vectors too, where the encoder has the head.

        Raises:
            ValueError: There is no such layer, or patches or tubelets do not divide the video.
        """
        wanted, grid = self._indices(layers), self.grid_of(video)
        pool = pool and bool(self.config.attn_pool_num_heads)
        depth = len(self.blocks) if pool or not wanted else max(wanted) + 1
        kept: dict[int, Tensor] = {}
        x = self._run_blocks(self._embed(video, ids_keep), depth, wanted, kept, None)
        pooled = self.clip_projector(x)[0] if pool else None
        return VisionFeatures({f"blocks.{i}": kept[i] for i in sorted(kept)}, pooled, grid)

    def _indices(self, layers: Sequence[int]) -> frozenset[int]:
        depth = len(self.blocks)
        for i in layers:
            if not -depth <= i < depth:
                raise ValueError(f"VisionEncoder: layers must be in [{-depth}, {depth}), got {i}")
        return frozenset(i % depth for i in layers)

    def _embed(self, video: Tensor, ids_keep: Tensor | None) -> Tensor:
        tokens: Tensor = self.patch_embed(
            video,
            pos_embed=self.position(self.grid_of(video)),
            cls_token=self.cls_token[0, 0],
            ids_keep=ids_keep,
        )
        return tokens

    def _drops(self, x: Tensor, seeds: Tensor | None) -> Tensor | None:  # -> [depth, 2, B]
        if not self.training or not self.config.drop_path:
            return None
        rates = torch.linspace(0, self.config.drop_path, self.config.depth).tolist()
        return drop_path_scales(rates, x.shape[0], x.device, seeds)

    def _run_blocks(
        self,
        x: Tensor,  # [B, N, C]
        depth: int,
        wanted: frozenset[int],
        kept: dict[int, Tensor],
        drops: Tensor | None,  # [depth, 2, B]
    ) -> Tensor:
        """Run the first blocks; put the outputs of the wanted ones into kept."""
        residual = x.float() if self.config.residual_dtype == "float32" else x
        branch: Tensor | None = None
        scale: Tensor | None = None
        drop: Tensor | None = None
        for i in range(depth):
            block = self.blocks[i]
            assert isinstance(block, Block)
            attn_drop, mlp_drop = (None, None) if drops is None else drops[i]
            arguments = (branch, residual, scale, drop, attn_drop)
            if i < self.config.checkpoint_num and torch.is_grad_enabled():
                # Drop path is drawn outside, so no random state has to be kept.
                entrance, residual, branch = checkpoint(
                    block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                entrance, residual, branch = block(*arguments)
            scale, drop = block.ls2.gamma, mlp_drop
            if i - 1 in wanted:
                kept[i - 1] = entrance
        if branch is None or scale is None:
            return residual
        x = add_branch(branch, residual, scale, drop)
        if depth - 1 in wanted:
            kept[depth - 1] = x
        return x


def with_cls(ids_keep: Tensor | None) -> Tensor | None:
    """Rows of a table that begins with CLS: [B, N] patch indices -> [B, 1+N]."""
    return None if ids_keep is None else nn.functional.pad(ids_keep + 1, (1, 0))


def _add_position(
    feature: Tensor,  # [B, M, C]
    table: Tensor,  # [N, C]
    rows: Tensor | None,  # [B, M]
) -> Tensor:
    feature = feature.to(table.dtype)
    return feature + table if rows is None else gather_tokens(table[None], rows, add=feature)
