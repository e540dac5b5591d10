"""The stage-2 model: video, audio and text towers, their shared space, and the fusion layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.models.audio import AudioConfig, AudioEncoder
from iv2.models.text import PackedText, TextConfig, TextEncoder
from iv2.models.vision import VisionConfig, VisionEncoder
from iv2kernels.nn import Linear

Media = Literal["vision", "audio", "audio_video"]

# Keys and values of media tokens, [B, N, heads, head_dim] each, by fusion layer.
KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage2ModelConfig:
    """What joins the towers."""

    # Width of the shared space in which video, audio and text are compared.
    embed_dim: int = 512
    # Width to which media tokens are projected for the fusion layers; 0: they take the raw tokens
    # of the video (published: 0 for 1B, 768 for 6B). Audio needs it.
    fusion_dim: int = 0
    # Initial temperature.
    temperature: float = 0.07
    # Bounds of the learnt temperature.
    temperature_range: tuple[float, float] = (0.001, 0.5)
    # Build the head that matches audio alone with text, which published files lack.
    match_audio: bool = False


@dataclass(frozen=True)
class Seen:
    """What the towers make of the media of a batch."""

    # [B, N, C] for the fusion layers, by tower: "vision", "audio".
    tokens: dict[str, Tensor]
    # [B, embed_dim] of length one, by what is compared: "vision", "audio", "audio_video".
    features: dict[Media, Tensor]


class Stage2Model(nn.Module):
    """Towers, projections and heads, under the names of published files.

    Args:
        vision: The video encoder; it needs its pooling head.
        text: The text tower; ``media_dim`` is set to the width of the media tokens.
        audio: The audio tower, or None.
        config: What joins them.

    Raises:
        ValueError: Audio is given without fusion_dim, or the video encoder has no pooling head.
    """

    def __init__(
        self,
        vision: VisionConfig,
        text: TextConfig,
        audio: AudioConfig | None = None,
        config: Stage2ModelConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or Stage2ModelConfig()
        if not vision.attn_pool_num_heads:
            raise ValueError("Stage2Model: vision.attn_pool_num_heads must be positive, got 0")
        if audio is not None and not config.fusion_dim:
            raise ValueError("Stage2Model: fusion_dim must be positive with audio, got 0")
        width = config.fusion_dim or vision.embed_dim
        self.vision_encoder = VisionEncoder(vision)
        self.text_encoder = TextEncoder(replace(text, media_dim=width))
        self.vision_proj = Linear(vision.clip_embed_dim, config.embed_dim)
        self.text_proj = Linear(text.embed_dim, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = Linear(text.embed_dim, 2)
        if config.fusion_dim:
            self.av_concat_vision_proj = nn.Sequential(
                Linear(vision.embed_dim, width), nn.LayerNorm(width)
            )
        self.has_audio = audio is not None
        if audio is not None:
            self.audio_encoder = AudioEncoder(audio)
            self.audio_proj = Linear(audio.embed_dim, config.embed_dim)
            self.av_concat_audio_proj = nn.Sequential(
                Linear(audio.embed_dim, width), nn.LayerNorm(width)
            )
            self.av_fusion = Linear(2 * config.embed_dim, config.embed_dim)
            self.avtm_head = Linear(text.embed_dim, 2)
            if config.match_audio:
                self.atm_head = Linear(text.embed_dim, 2)
        for name in ("vision_proj", "text_proj", "itm_head", "audio_proj", "av_fusion"):
            self._init_linear(name)
        for name in ("avtm_head", "atm_head", "av_concat_vision_proj.0", "av_concat_audio_proj.0"):
            self._init_linear(name)

    def _init_linear(self, name: str) -> None:
        layer = dict(self.named_modules()).get(name)
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature within its bounds, as published at each training step."""
        self.temp.clamp_(*self.config.temperature_range)

    def see(
        self,
        video: Tensor | None = None,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        fbank: Tensor | None = None,  # [B, F, bins]
        ids_keep: Tensor | None = None,  # [B, N_keep]
        *,
        seeds: Tensor | None = None,  # [B]
    ) -> Seen:
        """Run the towers on what there is of video and sound.

        Args:
            video: Frames or normalised video.
            fbank: Filter banks, if the model has an audio tower.
            ids_keep: Visible patches; None shows all.
            seeds: int64, keys of drop path.

        Raises:
            ValueError: There is neither video nor sound, or sound without an audio tower.
        """
        if video is None and fbank is None:
            raise ValueError("Stage2Model: video or fbank must be given, got neither")
        if fbank is not None and not self.has_audio:
            raise ValueError("Stage2Model: fbank must be None without an audio tower, got a tensor")
        tokens: dict[str, Tensor] = {}
        found: dict[Media, Tensor] = {}
        if video is not None:
            out = self.vision_encoder(video, ids_keep, seeds=seeds)
            x = out.tokens.to(self.vision_proj.weight.dtype)
            tokens["vision"] = self.av_concat_vision_proj(x) if self.config.fusion_dim else x
            found["vision"] = self.vision_proj(out.pooled.to(x.dtype))
        if fbank is not None:
            heard = self.audio_encoder(fbank)
            tokens["audio"] = self.av_concat_audio_proj(heard)
            found["audio"] = self.audio_proj(heard.mean(1))
        if len(found) == 2:
            both = torch.cat([found["audio"], found["vision"]], dim=1)  # audio first, as published
            found["audio_video"] = self.av_fusion(both)
        return Seen(tokens, {name: _unit(x) for name, x in found.items()})

    def read(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """Hidden states [total, C] below the fusion layers, and features [B, embed_dim]."""
        hidden = self.text_encoder.encode(text)
        return hidden, self.text_features(hidden[text.firsts])

    def text_features(self, first: Tensor) -> Tensor:
        """Features [B, embed_dim] of length one from the [CLS] rows [B, C]."""
        return _unit(self.text_proj(first))

    def keys_values(self, seen: Seen, media: Media) -> KeysValues:
        """Keys and values of all fusion layers; those of audio stand before those of the video."""
        towers = ("audio", "vision") if media == "audio_video" else (media,)
        parts = [self.text_encoder.project_media(seen.tokens[tower]) for tower in towers]
        return join_keys_values(parts)

    def match_scores(
        self,
        fused: Tensor,  # [R, C], the [CLS] rows
        media: Media,
    ) -> Tensor:
        """Logits [R, 2] of (no match, match).

        Raises:
            ValueError: The model has no head for these media.
        """
        name = {"vision": "itm_head", "audio": "atm_head", "audio_video": "avtm_head"}[media]
        if not hasattr(self, name):
            raise ValueError(f"Stage2Model: media must have a matching head, got {media}")
        scores: Tensor = getattr(self, name)(fused)
        return scores


def join_keys_values(parts: list[KeysValues]) -> KeysValues:
    """Keys and values of several towers as those of one sequence."""
    if len(parts) == 1:
        return parts[0]
    return [
        (torch.cat([k for k, _ in layer], dim=1), torch.cat([v for _, v in layer], dim=1))
        for layer in zip(*parts, strict=True)
    ]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
