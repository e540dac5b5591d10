"""The stage-3 model: video encoder, perhaps an audio tower, Q-Former and language model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iv2.checkpoint import Report, load_weights, read_weights
from iv2.models.audio import AudioConfig, AudioEncoder
from iv2.models.language import base, plain_name
from iv2.models.qformer import QFormer, QFormerConfig
from iv2.models.text import PackedText
from iv2.models.vision import VisionEncoder
from iv2.models.vision_config import VisionConfig
from iv2kernels.nn import Linear

# Names of what hears; published files have none of it.
_HEARING = ("audio_encoder.", "audio_up.")


def trunk_config(config: VisionConfig, skip: int = 1) -> VisionConfig:
    """A video encoder without its last blocks, its heads and decoders.

    The drop-path rates of the blocks that stay are those of the whole encoder.

    Raises:
        ValueError: No block would be left.
    """
    depth = config.depth - skip
    if skip < 0 or depth < 1:
        raise ValueError(f"trunk_config: skip must be in [0, {config.depth}), got {skip}")
    rate = config.drop_path * (depth - 1) / max(1, config.depth - 1)
    return replace(
        config,
        depth=depth,
        drop_path=rate,
        checkpoint_num=min(config.checkpoint_num, depth),
        attn_pool_num_heads=0,
        clip_return_layer=0,
        mae_return_layer=0,
        num_classes=0,
    )


class VideoChatModel(nn.Module):
    """Video encoder, Q-Former and language model, under the names of published files.

    With an audio tower some of the queries read its tokens instead of the video's, where there is
    sound; published models have none.

    Args:
        vision: The whole video encoder, as it was trained.
        qformer: Sizes; ``media_dim`` is set to the width of the video encoder.
        lm: A causal model of transformers, or of peft around it.
        skip_blocks: How many of the last blocks of the video encoder are left out.
        audio: The audio tower, or None.

    Raises:
        ValueError: No block would be left, or all queries would hear.
    """

    def __init__(
        self,
        vision: VisionConfig,
        qformer: QFormerConfig,
        lm: nn.Module,
        skip_blocks: int = 1,
        audio: AudioConfig | None = None,
    ) -> None:
        super().__init__()
        width = vision.embed_dim
        self.vision_encoder = VisionEncoder(trunk_config(vision, skip_blocks))
        self.vision_layernorm = nn.LayerNorm(width, eps=1e-12)
        self.qformer = QFormer(replace(qformer, media_dim=width))
        self.query_tokens = nn.Parameter(torch.zeros(1, qformer.num_queries, qformer.embed_dim))
        nn.init.normal_(self.query_tokens, std=0.02)
        if qformer.num_extra_queries:
            # Published ones start at zero, where LayerNorm has gradients of 1e6 and where, without
            # dropout, all of them stay one query for ever.
            shape = (1, qformer.num_extra_queries, qformer.embed_dim)
            self.extra_query_tokens = nn.Parameter(torch.zeros(shape))
            nn.init.normal_(self.extra_query_tokens, std=0.02)
        self.project_up = Linear(qformer.embed_dim, base(lm).config.hidden_size)
        hearing = qformer.num_hearing_queries
        if audio is not None and hearing >= self.num_queries:
            raise ValueError(
                f"VideoChatModel: num_hearing_queries must be below {self.num_queries}, all that "
                f"there are, got {hearing}"
            )
        self.audio_encoder = None if audio is None else AudioEncoder(audio)
        if audio is not None:
            self.audio_up = nn.Sequential(Linear(audio.embed_dim, width), nn.LayerNorm(width))
        self.lm = lm

    @property
    def num_queries(self) -> int:
        """Embeddings that a view of a video becomes."""
        config = self.qformer.config
        return config.num_queries + config.num_extra_queries

    def embed_video(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        instruction: PackedText | None = None,
        *,
        fbank: Tensor | None = None,  # [B, F, bins]
        seeds: Tensor | None = None,  # [B]
    ) -> Tensor:
        """Embeddings [B, Q, C of the language model] in the places of words.

        Where nothing of a tower is trained, nothing of it is kept for backward.

        Args:
            video: Frames or normalised video.
            instruction: What the Q-Former reads beside each, or None.
            fbank: Filter banks of their sounds, or of fewer: each is that of as many videos.
            seeds: int64, keys of drop path.

        Raises:
            ValueError: There is sound without an audio tower, or of no whole share of the videos.
        """
        with _grad_if_trained(self.vision_encoder):
            tokens = self.vision_encoder(video, seeds=seeds).tokens
        media = self.vision_layernorm(tokens.to(self.vision_layernorm.weight.dtype))
        queries: Tensor = self.query_tokens
        if self.qformer.config.num_extra_queries:
            queries = torch.cat([queries, self.extra_query_tokens], dim=1)
        if fbank is None:
            found = self.qformer(queries, media, instruction)
        else:
            heard = self._listen(fbank, len(media)).to(media.dtype)
            count = self.num_queries - self.qformer.config.num_hearing_queries
            looking = self.qformer(queries[:, :count], media, instruction)
            hearing = self.qformer(queries[:, count:], heard, instruction)
            found = torch.cat([looking, hearing], dim=1)
        embeddings: Tensor = self.project_up(found)
        return embeddings

    def _listen(self, fbank: Tensor, videos: int) -> Tensor:
        """Tokens [B, N, C] of sounds, each as often as there are videos to it."""
        if self.audio_encoder is None:
            raise ValueError("VideoChatModel: fbank must be None without an audio tower, got some")
        if not len(fbank) or videos % len(fbank):
            raise ValueError(
                f"VideoChatModel: fbank must be of {videos} videos or of a whole share of them, "
                f"got {len(fbank)}"
            )
        with _grad_if_trained(self.audio_encoder):
            tokens = self.audio_encoder(fbank)
        heard: Tensor = self.audio_up(tokens)
        return heard.repeat_interleave(videos // len(fbank), 0)

    def embed_text(
        self,
        ids: Tensor,  # [..., L] int64
        video: Tensor | None = None,  # [V, Q, C]
        in_video: Tensor | None = None,  # [..., L] bool
    ) -> Tensor:
        """Inputs [..., L, C] of the language model, the embeddings of videos in their places.

        Raises:
            ValueError: There are more or fewer places than embeddings.
        """
        table = base(self.lm).get_input_embeddings()
        words: Tensor = table(ids)
        if in_video is None:
            return words
        places = int(in_video.sum())
        count = 0 if video is None else video.shape[0] * video.shape[1]
        if places != count:
            raise ValueError(
                f"VideoChatModel: places must be as many as embeddings, {count}, got {places}"
            )
        if video is None:
            return words
        rows = video.reshape(count, -1).to(words.dtype)
        return words.masked_scatter(in_video[..., None], rows)

    def _apply(self, fn: Any, recurse: bool = True) -> VideoChatModel:
        """As torch's; the frequencies of rotary embedding, which are buffers, stay float32."""
        owners = [m for m in self.lm.modules() if next(m.buffers(recurse=False), None) is not None]
        kept = [dict(module.named_buffers(recurse=False)) for module in owners]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, buffers in zip(owners, kept, strict=True):
            for name, exact in buffers.items():
                setattr(module, name, exact.to(module.get_buffer(name).device))
        return self


def _grad_if_trained(tower: nn.Module) -> torch.set_grad_enabled:
    is_trained = any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


def load_video_chat(
    model: VideoChatModel,
    path: str | Path,
    *,
    elsewhere: Collection[str] = (),
    lm_has_files: bool = False,
    may_be_deaf: bool = False,
    parts: tuple[str, ...] = (),
) -> Report:
    """Load a published file, or that of a run, strictly but for what is ``elsewhere``.

    LoRA and the layers below it are found under the names of old and new versions of peft. A file
    without LoRA leaves it as it is.

    Args:
        model: On any device but meta, unless the file has everything.
        path: The file.
        elsewhere: Weights that have other files. Those the file has all the same must be equal.
        lm_has_files: The language model came from its own files: what is absent of it stays.
        may_be_deaf: Of a file without any of the audio tower, the model's own stays.
        parts: How the names begin that are taken; empty: all.

    Raises:
        CheckpointError: The file cannot be read.
        ValueError: Tensors are missing or have other sizes, or frozen ones differ.
    """
    own = model.state_dict()
    names = {plain_name(name): name for name in own}
    found = {names.get(plain_name(n), n): t for n, t in read_weights(path).items()}
    if parts:
        found = {name: tensor for name, tensor in found.items() if name.startswith(parts)}
    changed = [
        name
        for name in elsewhere
        if name in found and not torch.equal(found[name].to(own[name]), own[name])
    ]
    if changed:
        raise ValueError(
            f"load_video_chat: {path} must have the language model of lm.folder, which is frozen "
            f"and not saved, got other values of {', '.join(sorted(changed)[:4])}"
        )
    may_miss = set(elsewhere)
    lora = {n for n in own if n.startswith("lm.") and ".lora_" in n}
    if not lora & found.keys():  # it starts as nothing
        may_miss |= lora
    if lm_has_files:
        may_miss |= {n for n in own if n.startswith("lm.")} - lora
    hearing = {name for name in own if name.startswith(_HEARING)}
    if may_be_deaf and not hearing & found.keys():
        may_miss |= hearing
    if parts:
        may_miss |= {name for name in own if not name.startswith(parts)}
    return load_weights(model, found, path, prefix="", allow_missing=may_miss)
