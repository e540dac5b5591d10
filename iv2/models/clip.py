"""The CLIP variant of stage 2: a video encoder and a text tower in one space, nothing between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.models.clip_text import ClipTextConfig, ClipTextEncoder, TextTower
from iv2.models.clip_tokens import clip_tokenizer
from iv2.models.llama_text import LlamaTextConfig, LlamaTextEncoder
from iv2.models.text import PackedText
from iv2.models.vision import VisionConfig, VisionEncoder
from iv2kernels.nn import Linear


@dataclass(frozen=True)
class ClipModelConfig:
    """The text tower, and what joins the towers."""

    # The text tower, unless llama is given.
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    # A language model with LoRA instead, as in the 1B and 6B models.
    llama: LlamaTextConfig | None = None
    # LayerNorm and a linear layer from the pooled vector to the features, as in S, B and L;
    # without them the pooled vector is the feature.
    align: bool = False
    # Initial temperature.
    temperature: float = 0.01
    # Lowest learnt temperature.
    min_temperature: float = 0.01


class ClipModel(nn.Module):
    """Video and text features of one space, under the names of published files.

    A single frame takes the mean over time of the video's position table, as published.

    Args:
        vision: The video encoder; it needs its pooling head.
        text_encoder: The text tower, a module.
        config: What joins them.

    Raises:
        ValueError: The video encoder has no pooling head, or the widths of the towers differ.
    """

    def __init__(
        self, vision: VisionConfig, text_encoder: TextTower, config: ClipModelConfig
    ) -> None:
        super().__init__()
        self.config = config
        width = text_encoder.embed_dim
        if not vision.attn_pool_num_heads:
            raise ValueError("ClipModel: vision.attn_pool_num_heads must be positive, got 0")
        if not config.align and vision.clip_embed_dim != width:
            raise ValueError(
                f"ClipModel: vision.clip_embed_dim must be the text tower's {width} without "
                f"align, got {vision.clip_embed_dim}"
            )
        self.vision_encoder = VisionEncoder(vision)
        if config.align:
            self.vision_align = nn.Sequential(
                nn.LayerNorm(vision.clip_embed_dim), Linear(vision.clip_embed_dim, width)
            )
            projection = self.vision_align[1]
            assert isinstance(projection, Linear)
            nn.init.trunc_normal_(projection.weight, std=vision.clip_embed_dim**-0.5)
            nn.init.zeros_(projection.bias)
        assert isinstance(text_encoder, nn.Module)
        self.text_encoder = text_encoder
        self.temp = nn.Parameter(torch.tensor(config.temperature))

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature above its bound, as published at each training step."""
        self.temp.clamp_(min=self.config.min_temperature)

    def encode_video(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        *,
        seeds: Tensor | None = None,  # [B]
    ) -> Tensor:
        """Features [B, D] of length one, float32.

        Where no parameter below the pooling head is trained, nothing of it is kept for backward.

        Args:
            video: Frames or normalised video.
            seeds: int64, keys of drop path.
        """
        vision = self.vision_encoder
        trunk_is_trained = any(
            p.requires_grad
            for name, p in vision.named_parameters()
            if not name.startswith("clip_projector.")
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and trunk_is_trained):
            tokens = vision(video, seeds=seeds, pool=False).tokens
        x = vision.clip_projector(tokens)[0]
        if self.config.align:
            x = self.vision_align(x)
        return F.normalize(x.float(), dim=-1)

    def encode_text(self, text: PackedText) -> Tensor:
        """Features [B, D] of length one, float32; a frozen tower keeps nothing for backward."""
        tower = self.text_encoder
        is_trained = any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            return F.normalize(tower(text).float(), dim=-1)

    def read(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """As the model of stage 2; there are no hidden states for fusion layers: they are empty."""
        features = self.encode_text(text)
        return features.new_empty(0), features


def build_clip(vision: VisionConfig, config: ClipModelConfig, tokenizer: str | Path) -> ClipModel:
    """Build the model with fresh weights.

    Args:
        vision: The video encoder.
        config: The text tower, and what joins the towers.
        tokenizer: Folder with the vocabulary; of a LLaMA also its config.json.

    Raises: as the parts.
    """
    tower: TextTower
    if config.llama is not None:
        tower = LlamaTextEncoder(config.llama, tokenizer)
    else:
        tower = ClipTextEncoder(config.text, clip_tokenizer(tokenizer))
    return ClipModel(vision, tower, config)
