"""Sizes of the video encoder, and what the published files of each kind add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from iv2.models.positions import Grid


@dataclass(frozen=True)
class VisionConfig:
    """A video encoder; the words are those of the published code."""

    # Width C of the tokens, a multiple of 16.
    embed_dim: int = 1408
    # Number of blocks.
    depth: int = 40
    # Attention heads in a block.
    num_heads: int = 16
    # Hidden width of the MLP over embed_dim.
    mlp_ratio: float = 48 / 11
    # Side of the frames in pixels, for the position tables; other sizes interpolate them.
    img_size: int = 224
    # Side of a patch in pixels.
    patch_size: int = 14
    # Frames in a tubelet.
    tubelet_size: int = 1
    # Frames of the position tables; other counts interpolate them.
    num_frames: int = 8
    # RMSNorm of q and k over the full width.
    qk_norm: bool = True
    # Initial LayerScale: 1e-5 in training, 0.1 in the CLIP models and the InternVL teacher.
    layer_scale: float = 1e-5
    # Standard deviation of the linear weights at the start; the published models have 0.02.
    init_std: float = 0.02
    # GELU of the blocks. Published weights need tanh.
    gelu: Literal["tanh", "erf"] = "tanh"
    # Drop-path rate of the last block; it grows linearly from 0 at the first.
    drop_path: float = 0.0
    # dtype of the residual stream: that of the parameters, or float32.
    residual_dtype: Literal["same", "float32"] = "same"
    # Blocks, from the first, whose activations are recomputed in backward.
    checkpoint_num: int = 0
    # Position tables as a sum of a spatial and a temporal one.
    sep_pos_embed: bool = False
    # Own tables for images (one frame); otherwise the mean over time serves.
    sep_image_video_pos_embed: bool = False
    # Heads of the attention-pool head; 0 builds none.
    attn_pool_num_heads: int = 16
    # Width of the pooled vector.
    clip_embed_dim: int = 768
    # Layers with a decoder towards the first teacher; 0 builds none.
    clip_return_layer: int = 0
    # Distance of these layers, counted from the last.
    clip_return_interval: float = 1.0
    # Decoders of these layers and of the pooled vector.
    clip_decoder: Literal["linear", "mlp"] = "linear"
    # Width of the tokens of the first teacher.
    clip_teacher_embed_dim: int = 3200
    # Width of the pooled vector of the first teacher; 0 builds no decoder for it.
    clip_teacher_final_dim: int = 768
    # Layers with a decoder towards the second teacher; 0 builds none.
    mae_return_layer: int = 0
    # Distance of these layers, counted from the last.
    mae_return_interval: float = 1.0
    # Width of the tokens of the second teacher.
    mae_teacher_embed_dim: int = 1408
    # Classes of the fine-tuning head; 0 builds none.
    num_classes: int = 0
    # Dropout before the fine-tuning head.
    fc_drop_rate: float = 0.0
    # Factor of the initial weights of the fine-tuning head.
    init_scale: float = 1e-3

    def __post_init__(self) -> None:
        pool = max(1, self.attn_pool_num_heads)
        for what, good, expected in (
            ("embed_dim", self.embed_dim % 16 == 0, "a multiple of 16"),
            ("num_heads", self.embed_dim % self.num_heads == 0, "a divisor of embed_dim"),
            ("attn_pool_num_heads", self.embed_dim % pool == 0, "a divisor of embed_dim"),
            ("img_size", self.img_size % self.patch_size == 0, "a multiple of patch_size"),
            ("num_frames", self.num_frames % self.tubelet_size == 0, "a multiple of tubelet_size"),
            ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"),
            ("gelu", self.gelu in ("tanh", "erf"), "tanh or erf"),
            ("clip_decoder", self.clip_decoder in ("linear", "mlp"), "linear or mlp"),
            ("clip_return_layer", min(self.clip_layers, default=0) >= 0, "within depth"),
            ("mae_return_layer", min(self.mae_layers, default=0) >= 0, "within depth"),
            ("num_classes", not self.num_classes or self.attn_pool_num_heads, "0 without a pool"),
        ):
            if not good:
                raise ValueError(
                    f"VisionConfig: {what} must be {expected}, got {getattr(self, what)}"
                )

    @property
    def grid(self) -> Grid:
        """Tubelets and patches (T, h, w) of the position tables."""
        side = self.img_size // self.patch_size
        return (self.num_frames // self.tubelet_size, side, side)

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """Blocks, ascending, whose features the clip_decoders take."""
        return return_layers(self.depth, self.clip_return_layer, self.clip_return_interval)

    @property
    def mae_layers(self) -> tuple[int, ...]:
        """Blocks, ascending, whose features the mae_decoders take."""
        return return_layers(self.depth, self.mae_return_layer, self.mae_return_interval)


def return_layers(depth: int, count: int, interval: float) -> tuple[int, ...]:
    """The published choice of layers, ``depth - int(i * interval) - 1``, in ascending order."""
    return tuple(sorted(depth - int(i * interval) - 1 for i in range(count)))


VISION: dict[str, VisionConfig] = {
    "tiny": VisionConfig(
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_ratio=4,
        img_size=56,
        clip_embed_dim=128,
        # Four narrow blocks need no taming: published values would cost most of a short run.
        layer_scale=1.0,
        init_std=0.08,
    ),
    "s": VisionConfig(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4),
    "b": VisionConfig(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4),
    "l": VisionConfig(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4),
    "1b": VisionConfig(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
    "6b": VisionConfig(embed_dim=3200, depth=48, num_heads=25, mlp_ratio=4),
}

# What the published files of each kind hold beyond the trunk.
PRESETS: dict[str, dict[str, Any]] = {
    "stage1": {"clip_return_layer": 6, "mae_return_layer": 4},
    "distill": {
        "clip_return_layer": 6,
        "clip_decoder": "mlp",
        "clip_teacher_embed_dim": 1408,
    },
    "stage2": {"clip_return_layer": 6, "num_frames": 4},
    "clip": {"layer_scale": 0.1},
    "finetune": {"num_classes": 400},
}


def vision_config(size: str, preset: str | None = None, **overrides: Any) -> VisionConfig:
    """The configuration of a size, as a published kind of model, with fields replaced.

    Args:
        size: A key of ``VISION``: tiny, s, b, l, 1b, 6b.
        preset: A key of ``PRESETS`` (stage1, distill, stage2, clip, finetune), or None: the trunk
            with its pooling head.
        **overrides: Fields of ``VisionConfig``.

    Raises:
        ValueError: There is no such size or preset.
    """
    for what, name, known in (("size", size, VISION), ("preset", preset, PRESETS)):
        if name is not None and name not in known:
            raise ValueError(f"vision_config: {what} must be one of {', '.join(known)}, got {name}")
    fields = {} if preset is None else dict(PRESETS[preset])
    if (size, preset) == ("1b", "stage2"):  # the 6B model of stage 2 shares its tables
        fields["sep_image_video_pos_embed"] = True
    return replace(VISION[size], **(fields | overrides))
