"""Stage 3: next-token prediction of answers, through a language model that reads a video.

Texts of different lengths are packed end to end. The language model gives hidden states, and
only those from which an answer's tokens are predicted meet its head: logits are never stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iv2.checkpoint import load_checkpoint, load_weights, read_weights
from iv2.config import Stage3Config
from iv2.data.captions import Tokenizer, choose_captions
from iv2.data.tiles import tiles
from iv2.models.audio import AudioConfig
from iv2.models.language import (
    Language,
    base,
    build_language,
    hidden_states,
    next_token_loss,
    save_language,
)
from iv2.models.stage3 import VideoChatModel, load_video_chat
from iv2.models.text import PackedText
from iv2.models.vision_config import VisionConfig
from iv2.stages.conversation import Conversation, ConversationTooLongError, Tokens
from iv2.stages.stage2 import share_of_mean
from iv2.stages.words import words_loss
from iv2kernels import Packed

# The trunk of stage 2 has more than is needed; tables of images may be absent.
_VISION_LACKS = ("img_pos_embed",)
# What stands between the towers.
_BRIDGE = (
    *("qformer.", "query_tokens", "extra_query_tokens"),
    *("vision_layernorm.", "audio_up.", "project_up."),
)


class _Saved:
    """What a run keeps beside its weights."""

    def __init__(self, language: Language, words: Tokenizer | None) -> None:
        self.language, self.words = language, words

    def save(self, folder: str | Path) -> None:
        """Write the tokenizers, and the config.json of the language model."""
        save_language(self.language.lm, self.language.tokenizer, folder)
        if self.words is not None:
            self.words.save(folder)


class Stage3(nn.Module):
    """The mean loss of all answers' tokens; over several processes, of all ranks'.

    A conversation whose last round alone is longer than ``config.max_tokens`` is left out, with a
    warning, and listed in ``skipped`` and in the batch's ``unusable``; early rounds that do not fit
    are counted in ``dropped_rounds``.

    Args:
        model: Video encoder, Q-Former and language model.
        language: That language model and its tokenizer.
        config: What is trained, and how long texts may be.
        words: Tokenizer of the Q-Former's instructions, if it reads them.

    Raises:
        ValueError: frozen names no module, or the chat template cannot be used.
    """

    # Steps may leave the video encoder out: a batch of texts has no video.
    uses_all_parameters = False

    def __init__(
        self,
        model: VideoChatModel,
        language: Language,
        config: Stage3Config,
        words: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.words = model, config, words
        self.language_tokenizer = language.tokenizer
        self.loss_weights = {config.learns: 1.0}
        self.conversation = Conversation(language.tokenizer, config.lm.format, model.num_queries)
        self.skipped: dict[str, str] = {}
        self.dropped_rounds = 0
        parts = dict(model.named_modules()) | dict(model.named_parameters())
        for name in config.frozen:
            if name not in parts or name.split(".")[0] == "lm":
                raise ValueError(f"Stage3: frozen must name parts of the model but lm, got {name}")
            parts[name].requires_grad_(False)

    @property
    def tokenizer(self) -> _Saved:
        """What a run keeps beside its weights."""
        return _Saved(Language(self.model.lm, self.language_tokenizer), self.words)

    @property
    def trained(self) -> VideoChatModel:
        """What is trained, among what is not."""
        return self.model

    @property
    def elsewhere(self) -> frozenset[str]:
        """Parameters that a run does not save: frozen ones of a language model with own files."""
        if self.config.lm.weights != "pretrained":
            return frozenset()
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(n for n, p in named if n.startswith("lm.") and not p.requires_grad)

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage."""
        return {}

    def load_towers(self) -> None:
        """Load ``config.{vision, audio, qformer, lm, chat}_init`` strictly; the last wins.

        Raises:
            CheckpointError: A file cannot be read.
            ValueError: A file does not fit, or is one of an audio tower that the model lacks.
        """
        config, model = self.config, self.model
        if config.vision_init:
            load_checkpoint(model.vision_encoder, config.vision_init, allow_missing=_VISION_LACKS)
        if config.audio_init:
            if model.audio_encoder is None:
                raise ValueError(
                    "Stage3: audio_init must be empty without an audio tower, "
                    f"got {config.audio_init}"
                )
            weights = read_weights(config.audio_init)
            inside = any(name.startswith("audio_encoder.") for name in weights)
            prefix = "audio_encoder." if inside else None
            load_weights(model.audio_encoder, weights, config.audio_init, prefix=prefix)
        if config.qformer_init:
            load_video_chat(model, config.qformer_init, may_be_deaf=True, parts=_BRIDGE)
        if config.lm_init:
            load_video_chat(model, config.lm_init, may_be_deaf=True, parts=("lm.",))
        if config.chat_init:
            load_video_chat(
                model,
                config.chat_init,
                elsewhere=self.elsewhere,
                lm_has_files=config.lm.weights == "pretrained",
                may_be_deaf=True,
            )

    def train(self, mode: bool = True) -> Stage3:
        """As torch's; what is not trained at all stays in evaluation mode."""
        super().train(mode)
        model = self.model
        for part in (model.vision_encoder, model.audio_encoder, model.qformer, model.lm):
            if part is not None and not any(
                parameter.requires_grad for parameter in part.parameters()
            ):
                part.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss by name, ``next_token`` or ``words``.

        Args:
            batch: ``messages`` (a conversation for each sample), or ``captions``, ``video`` unless
                it is of text alone, ``views`` where that is tiles already, ``fbank`` where it is
                heard too, ``seeds``, ``paths``, and perhaps ``unusable``: ``Batches`` describes
                them.

        Raises:
            ValueError: A conversation is none, or a caption is missing; its sample is named. There
                is sound without video, or without an audio tower.
        """
        if self.config.learns == "words":
            return {"words": self._words(batch)}
        device = self.model.project_up.weight.device
        (views, counts), fbank = self._views(batch), batch.get("fbank")
        if fbank is not None and views is None:
            raise ValueError("Stage3: batch must have video beside fbank, got none")
        chosen, rows = self._tokens(batch, counts)
        if not rows:  # every rank must have a gradient
            nothing = self.model.project_up.weight.sum() * 0
            return {"next_token": share_of_mean(nothing.float(), 0)}
        ids, in_video, targets, cu = (x.to(device) for x in _pack(rows))
        found = None
        if views is not None:
            kept = torch.tensor(chosen, device=views.device)
            own = torch.split(torch.arange(len(views), device=views.device), counts)
            messages = [batch["messages"][i] for i in chosen]
            seeds = batch["seeds"][kept] if self.training else None
            heard = None if fbank is None else fbank[kept]
            seen = views[torch.cat([own[i] for i in chosen])]
            found = self._see(seen, [counts[i] for i in chosen], messages, seeds, heard)
        inputs = self.model.embed_text(ids, found, in_video)
        hidden = hidden_states(self.model.lm, inputs, Packed(cu, max(map(len, rows))))
        learnt = targets >= 0
        loss = next_token_loss(self.model.lm, hidden[learnt], targets[learnt])
        return {"next_token": share_of_mean(loss, int(learnt.sum()))}

    def _words(self, batch: dict[str, Any]) -> Tensor:
        if "video" not in batch or "views" in batch or self.config.tiles:
            raise ValueError("Stage3: batch must have one view a sample where words are learnt")
        kind = "av" if "fbank" in batch else "visual"
        captions = choose_captions(batch, kind, training=self.training)
        words = self.language_tokenizer(captions, add_special_tokens=False)["input_ids"]
        seeds = batch["seeds"] if self.training else None
        found = self.see(batch["video"][:, None], [()] * len(captions), seeds, batch.get("fbank"))
        table = base(self.model.lm).get_input_embeddings().weight
        return words_loss(found, table, words)

    def see(
        self,
        views: Tensor,  # uint8 [B, V, T, H, W, 3] | float [B, V, 3, T, H, W]
        messages: Sequence[Sequence[dict[str, str]]],
        seeds: Tensor | None = None,  # [B]
        fbank: Tensor | None = None,  # [B, F, bins] | [B * V, F, bins]
    ) -> Tensor:
        """Embeddings [B * V, Q, C] of the views of each sample's video.

        Args:
            views: Tiles, segments, or the video itself.
            messages: The conversations, for the Q-Former's instructions.
            seeds: int64, keys of drop path.
            fbank: The sound of each sample, or of each view.
        """
        return self._see(views.flatten(0, 1), [views.shape[1]] * len(views), messages, seeds, fbank)

    def _see(
        self,
        views: Tensor,  # uint8 [sum of V, T, H, W, 3] | float [sum of V, 3, T, H, W]
        counts: Sequence[int],  # V of each sample
        messages: Sequence[Sequence[dict[str, str]]],
        seeds: Tensor | None,  # [B]
        fbank: Tensor | None,  # [B, F, bins], or of each view where V are equal
    ) -> Tensor:
        """Embeddings [sum of V, Q, C]."""
        each = torch.tensor(counts, device=views.device)
        if seeds is not None:
            number = torch.cat([torch.arange(n, device=seeds.device) for n in counts])
            seeds = seeds.repeat_interleave(each) + (number << 40)
        # of equally many views the model itself gives each its sound, which it embeds once
        if fbank is not None and len(set(counts)) > 1:
            fbank = fbank.repeat_interleave(each, 0)
        text = self._instructions(messages, counts)
        text = None if text is None else text.to(views.device)
        return self.model.embed_video(views, text, fbank=fbank, seeds=seeds)

    def _views(self, batch: dict[str, Any]) -> tuple[Tensor | None, list[int]]:
        """What is seen of all samples [sum of V, ...], and how many views each has."""
        video = batch.get("video")
        if video is None:
            return None, [0] * len(batch["messages"])
        if "views" in batch:
            return video, batch["views"]
        if not self.config.tiles:
            return video, [1] * len(video)
        if video.dtype != torch.uint8:
            raise TypeError(
                "Stage3: video must be uint8 to be cut into tiles (data.clip.normalise False), "
                f"got {video.dtype}"
            )
        side = self.model.vision_encoder.config.img_size
        cut = [tiles(frames, self.config.tiles, side) for frames in video]
        return torch.cat(cut), [len(some) for some in cut]

    def _tokens(
        self, batch: dict[str, Any], views: Sequence[int]
    ) -> tuple[list[int], list[Tokens]]:
        """Numbers of the samples that fit, and their tokens."""
        chosen, rows = [], []
        most, unusable = self.config.max_tokens, batch.get("unusable", {})
        for i, messages in enumerate(batch["messages"]):
            path = batch["paths"][i] or f"text with seed {int(batch['seeds'][i])}"
            try:
                found = self.conversation.tokens(messages, views[i], max_tokens=most)
            except ConversationTooLongError as error:
                if path not in self.skipped:
                    warnings.warn(f"stage3: {path} is skipped: {error}", stacklevel=2)
                self.skipped[path] = unusable[i] = str(error)
                continue
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if not any(found.is_answer):
                raise ValueError(f"{path}: Stage3: messages must hold an answer, got none")
            self.dropped_rounds += found.dropped
            chosen.append(i)
            rows.append(found)
        return chosen, rows

    def _instructions(
        self, messages: Sequence[Sequence[dict[str, str]]], views: Sequence[int]
    ) -> PackedText | None:
        """What the Q-Former reads, once a view; of long ones the beginning is cut, as published."""
        if self.words is None or self.config.instruction == "none":
            return None
        role = {"system": "system", "question": "user"}[self.config.instruction]
        texts = []
        for conversation, count in zip(messages, views, strict=True):
            said = [m["content"] for m in conversation if m["role"] == role]
            texts += [said[0] if said else ""] * count
        text = self.words.encode(texts, max_tokens=1 << 20)
        most = self.model.qformer.config.max_positions
        parts = [
            row if len(row) <= most else torch.cat([row[:1], row[1 - most :]])
            for row in torch.split(text.ids, text.cu_seqlens.diff().tolist())
        ]
        lengths = torch.tensor([0, *map(len, parts)])
        return PackedText(torch.cat(parts), lengths.cumsum(0).int(), int(lengths.max()))


def _pack(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, where videos stand, the token to predict next or -1, each [T]; where rows begin."""
    ids = [i for row in rows for i in row.ids]
    in_video = [place for row in rows for place in row.in_video]
    targets = [
        token if learnt else -1
        for row in rows
        for token, learnt in zip((*row.ids[1:], 0), (*row.is_answer[1:], False), strict=True)
    ]
    cu = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return torch.tensor(ids), torch.tensor(in_video), torch.tensor(targets), cu


def build_stage3(
    vision: VisionConfig,
    config: Stage3Config,
    device: torch.device | str = "cpu",
    *,
    saved: str | Path = "",
    dtype: torch.dtype = torch.float32,
    audio: AudioConfig | None = None,
) -> Stage3:
    """Build the model; a pretrained language model comes from its folder, all else is fresh.

    Args:
        vision: The whole video encoder, as it was trained.
        config: Q-Former, language model, what is trained.
        device: Where it runs.
        saved: Folder in which a run keeps the tokenizer and config.json of its language model.
        dtype: Of the language model's parameters.
        audio: The audio tower, or None.

    Raises:
        ValueError: No language model is named, or instructions have no tokenizer.
        FileNotFoundError: A folder is not there.
        RuntimeError: transformers, peft or gguf is not installed.
    """
    words = None
    if config.instruction != "none":
        if not config.qformer_tokenizer:
            raise ValueError(
                "Stage3Config: qformer_tokenizer must be a folder with vocab.txt for instructions, "
                "got nothing"
            )
        words = Tokenizer(config.qformer_tokenizer)
        if words.vocab_size > config.qformer.vocab_size:
            raise ValueError(
                f"Stage3: qformer.vocab_size must be at least the tokenizer's {words.vocab_size}, "
                f"got {config.qformer.vocab_size}"
            )
    language = build_language(config.lm, saved, dtype)
    model = VideoChatModel(vision, config.qformer, language.lm, config.skip_blocks, audio)
    return Stage3(model.to(device), language, config, words)


def load_stage3(
    run_dir: str | Path,
    *,
    weights: str | Path = "",
    lm: str | Path = "",
    device: torch.device | str = "cpu",
) -> tuple[Stage3, Any]:
    """The stage 3 of a run, in evaluation mode, and the run's configuration.

    Args:
        run_dir: Folder of the run.
        weights: A file to load instead of its model.safetensors.
        lm: Folder of the pretrained language model; empty takes the run's.
        device: Where it runs.

    Raises:
        ValueError: The run is of another stage, or a file does not fit.
        FileNotFoundError: A file is not there.
        CheckpointError: The weights cannot be read.
    """
    from iv2.config import from_json
    from iv2.models.language import SAVED

    config = from_json(Path(run_dir) / "config.json")
    if config.stage != "stage3":
        raise ValueError(f"load_stage3: run must be of stage3, got {config.stage}")
    own = config.stage3
    if lm:
        own = replace(own, lm=replace(own.lm, folder=str(lm)))
    if own.instruction != "none":
        own = replace(own, qformer_tokenizer=str(run_dir))
    saved = Path(run_dir) / SAVED
    saved_lm = saved if saved.is_dir() else ""
    stage = build_stage3(config.model, own, device, saved=saved_lm, audio=config.audio)
    load_video_chat(
        stage.model, weights or Path(run_dir) / "model.safetensors", elsewhere=stage.elsewhere
    )
    return stage.eval(), replace(config, stage3=own)
