"""Stage 2: contrastive, matching and masked-language losses between media and captions.

A pairing is a kind of media with a kind of caption, and a batch trains the pairings it has both
for. A pairing's four groups of fusion rows - matches, two kinds of hard negatives, masked captions
- are one pass through the fusion layers: rows that look at the same video lie side by side and
share its keys and values, which are projected once a video for all pairings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.checkpoint import load_checkpoint
from iv2.config import Pairing, Stage2Config, TrainConfig
from iv2.data.captions import Tokenizer, choose_captions, mask_tokens
from iv2.models.audio import AudioConfig
from iv2.models.stage2 import KeysValues, Media, Seen, Stage2Model, join_keys_values
from iv2.models.text import PackedText, TextConfig
from iv2.models.vision import VisionConfig
from iv2.stages.stage1 import num_kept
from iv2kernels import hard_negatives, random_mask
from iv2kernels.distributed import Gathering, contrastive_loss, gather_async

# Towers of each kind of media, in the order of their keys and values.
_TOWERS: dict[Media, tuple[str, ...]] = {
    "vision": ("vision",),
    "audio": ("audio",),
    "audio_video": ("audio", "vision"),
}
_MEDIA_OF_KIND: dict[str, tuple[Media, ...]] = {
    "image": ("vision",),
    "video": ("vision",),
    "audio": ("audio",),
    "audio_video": ("vision", "audio", "audio_video"),
}
# By tower: what files to start from may lack.
_TOWER_FILES = {
    "vision": ("img_pos_embed", "clip_img_pos_embed", "clip_decoder.*", "final_clip_decoder.*"),
    "text": ("*.crossattention.*", "cls.*"),
    "audio": (),
}
# Apart from the draws of other parts, which use the same seeds.
_NEGATIVES_SALT, _MLM_SALT = 0x6E656761, 0x6D6C6D


@dataclass(frozen=True)
class _Read:
    """The captions of one kind: B as they are and, for MLM, the same B masked."""

    text: PackedText  # of B or 2 B captions
    hidden: Tensor  # [total, C] below the fusion layers
    features: Tensor  # [B, D]
    masked_rows: Tensor | None  # [M] of text: masked tokens, in its second half
    targets: Tensor | None  # [M]
    gathering: Gathering | None  # of features, where all ranks' are compared at once


class Stage2(nn.Module):
    """Losses of stage 2; ``config.pairings`` says which.

    Over several processes the contrastive loss compares all ranks' rows and means are over all
    ranks' counts, so that averaged gradients are those of one process with the whole batch; hard
    negatives come from groups of ``config.negatives_group`` neighbouring rows.

    Args:
        model: The towers.
        tokenizer: Of the text tower.
        config: Pairings, masks, what is frozen.

    Raises:
        ValueError: A pairing needs an audio tower that the model lacks, or frozen names no module.
    """

    def __init__(self, model: Stage2Model, tokenizer: Tokenizer, config: Stage2Config) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.loss_weights = {
            f"{pairing.name}.{loss}": getattr(pairing, loss)
            for pairing in config.pairings
            for loss in ("vtc", "vtm", "mlm")
            if getattr(pairing, loss) > 0
        }
        for pairing in config.pairings:
            if "audio" in _TOWERS[pairing.media] and not model.has_audio:
                raise ValueError(
                    f"Stage2: pairings must be of vision without an audio tower, got {pairing.name}"
                )
            if pairing.vtm and pairing.media == "audio" and not model.config.match_audio:
                raise ValueError(f"Stage2: match_audio must be set for the vtm of {pairing.name}")
        for name in config.frozen:
            if name not in dict(model.named_modules()):
                raise ValueError(f"Stage2: frozen must name modules of the model, got {name}")
            model.get_submodule(name).requires_grad_(False)

    # Steps may leave towers out: a batch of sounds has no video.
    uses_all_parameters = False

    def load_towers(self) -> None:
        """Load the files of ``config.{vision, text, audio}_init``, strictly but for what they lack.

        Stage 1 has no tables for images and no projections, BERT no cross-attention.

        Raises:
            CheckpointError: A file cannot be read.
            ValueError: A file does not fit its tower.
        """
        for tower, lacks in _TOWER_FILES.items():
            path = getattr(self.config, f"{tower}_init")
            if path:
                module = self.model.get_submodule(f"{tower}_encoder")
                load_checkpoint(module, path, allow_missing=lacks)

    @property
    def trained(self) -> Stage2Model:
        """What is trained and saved."""
        return self.model

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage."""
        return {}

    def train(self, mode: bool = True) -> Stage2:
        """As torch's; frozen modules stay in evaluation mode."""
        super().train(mode)
        for name in self.config.frozen:
            self.model.get_submodule(name).eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses by name, ``{media}_{caption}.{vtc, vtm, mlm}``, unweighted.

        Args:
            batch: ``kind``, ``video`` and ``fbank`` as there are, ``captions`` (a dict by kind for
                each sample), ``ids``, ``seeds`` and ``paths``.

        Raises:
            ValueError: A sample has no caption of a kind that is trained, or no pairing is for
                such batches.
        """
        if self.training:
            self.model.clamp_temperature()
        media = _MEDIA_OF_KIND[batch["kind"]]
        pairings = [p for p in self.config.pairings if p.media in media]
        if not pairings:
            raise ValueError(
                f"Stage2: pairings must be for batches of kind {batch['kind']}, got none"
            )
        # text first: its features travel to the other ranks while the other towers run
        reads = {
            caption: self._read(batch, caption, [p for p in pairings if p.caption == caption])
            for caption in dict.fromkeys(p.caption for p in pairings)
        }
        seen = self.see(batch, {tower for p in pairings for tower in _TOWERS[p.media]})
        towers = {
            tower: self.model.text_encoder.project_media(tokens)
            for tower, tokens in seen.tokens.items()
            if any(tower in _TOWERS[p.media] and (p.vtm or p.mlm) for p in pairings)
        }
        losses: dict[str, Tensor] = {}
        for pairing in pairings:
            keys_values = [towers[t] for t in _TOWERS[pairing.media] if t in towers]
            losses |= self._losses(pairing, batch, seen, reads[pairing.caption], keys_values)
        return losses

    def see(self, batch: dict[str, Any], towers: set[str]) -> Seen:
        """Run the towers that are wanted on a batch, the video masked in training."""
        video = batch["video"] if "vision" in towers else None
        fbank = batch["fbank"] if "audio" in towers else None
        ids_keep = None
        if video is not None and self.training:
            ids_keep = self._visible(video, batch["seeds"], batch["kind"])
        return self.model.see(
            video, fbank, ids_keep, seeds=batch["seeds"] if self.training else None
        )

    def _visible(self, video: Tensor, seeds: Tensor, kind: str) -> Tensor | None:
        config = self.config
        ratio = config.image_mask_ratio if kind == "image" else config.mask_ratio
        frames, height, width = self.model.vision_encoder.grid_of(video)
        tokens = frames * height * width
        return random_mask(seeds, tokens, num_kept(tokens, ratio)) if ratio else None

    def _read(self, batch: dict[str, Any], kind: str, pairings: list[Pairing]) -> _Read:
        """Captions of a kind, and their features on the way to the other ranks."""
        device, config = batch["seeds"].device, self.config
        captions = choose_captions(batch, kind, training=self.training)
        text = self.tokenizer.encode(captions, config.max_tokens).to(device)
        count, rows, targets = len(text), None, None
        if any(pairing.mlm for pairing in pairings):
            hidden_text, rows, targets = mask_tokens(
                text,
                batch["seeds"] + _MLM_SALT,
                self.tokenizer,
                probability=config.mlm_probability,
            )
            rows = rows + len(text.ids)
            text = join_texts(text, hidden_text)
        hidden = self.model.text_encoder.encode(text)
        features = self.model.text_features(hidden[text.firsts[:count]])
        compared = any(pairing.vtc for pairing in pairings) and config.gather == "gather"
        gathering = gather_async(features) if compared else None
        return _Read(text, hidden, features, rows, targets, gathering)

    def _losses(
        self,
        pairing: Pairing,
        batch: dict[str, Any],
        seen: Seen,
        read: _Read,
        keys_values: list[KeysValues],
    ) -> dict[str, Tensor]:
        name, features = pairing.name, seen.features[pairing.media]
        losses: dict[str, Tensor] = {}
        if pairing.vtc:
            losses[f"{name}.vtc"] = contrastive_loss(
                features,
                read.gathering or read.features,
                self.model.temp.float(),
                ids=batch["ids"],
                mode=self.config.gather,
                grad_mode=self.config.grad_mode,
            )
        if pairing.vtm or pairing.mlm:
            negatives = self._negatives(features, read.features, batch) if pairing.vtm else None
            losses |= self._fusion_losses(pairing, join_keys_values(keys_values), read, negatives)
        return losses

    def _negatives(self, v: Tensor, t: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """For each video the row of another text, for each text that of another video; or -1."""
        size = self.config.negatives_group or len(v)
        seeds, drawn = batch["seeds"] + _NEGATIVES_SALT, []
        for first in range(0, len(v), size):
            rows = slice(first, first + size)
            found = hard_negatives(
                v[rows], t[rows], self.model.temp, batch["ids"][rows], seeds[rows]
            )
            drawn.append([torch.where(x >= 0, x + first, x).long() for x in found])
        texts, videos = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return texts, videos

    def _fusion_losses(
        self,
        pairing: Pairing,
        keys_values: KeysValues,
        read: _Read,
        negatives: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        batch = len(read.features)
        every = torch.arange(batch, device=read.features.device)
        texts, videos, labels = [], [], []
        if negatives is not None:
            negative_texts, negative_videos = negatives
            has_text, has_video = negative_texts >= 0, negative_videos >= 0
            texts = [every, every[has_video], negative_texts[has_text]]
            videos = [every, negative_videos[has_video], every[has_text]]
            labels = [torch.ones_like(every), *(torch.zeros_like(x) for x in texts[1:])]
        num_match = sum(map(len, texts))
        use_masked = pairing.mlm and read.masked_rows is not None
        if use_masked:
            texts, videos = [*texts, every + batch], [*videos, every]
        fused, text, place = self._fuse(read, keys_values, torch.cat(texts), torch.cat(videos))
        losses = {}
        if negatives is not None:
            scores = self.model.match_scores(fused[text.firsts[place[:num_match]]], pairing.media)
            loss = F.cross_entropy(scores.float(), torch.cat(labels))
            losses[f"{pairing.name}.vtm"] = share_of_mean(loss, num_match)
        if use_masked:
            rows, targets = read.masked_rows, read.targets
            assert rows is not None
            assert targets is not None
            cu = read.text.cu_seqlens.long()
            caption = torch.bucketize(rows, cu, right=True) - 1  # in the second half
            start = text.cu_seqlens.long()[place[num_match + caption - batch]]
            loss = self.model.text_encoder.mlm_loss(fused[start + rows - cu[caption]], targets)
            losses[f"{pairing.name}.mlm"] = share_of_mean(loss, len(targets))
        return losses

    def _fuse(
        self, read: _Read, keys_values: KeysValues, texts: Tensor, videos: Tensor
    ) -> tuple[Tensor, PackedText, Tensor]:
        """Fused states of (text, video) rows, their packing, and where in it each row is."""
        order = torch.argsort(videos, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        text, tokens = read.text.select(texts[order])
        fused = self.model.text_encoder.fuse(read.hidden[tokens], text, keys_values, videos[order])
        return fused, text, place


def join_texts(first: PackedText, second: PackedText) -> PackedText:
    """The sequences of one packing after those of another."""
    return PackedText(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]]),
        max(first.max_seqlen, second.max_seqlen),
    )


def share_of_mean(mean: Tensor, count: int) -> Tensor:
    """A rank's mean over ``count`` rows, scaled so that the ranks' average is the mean over all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mean
    total = torch.tensor(float(count), device=mean.device)
    dist.all_reduce(total)
    return mean * (count * dist.get_world_size() / total.clamp(min=1))


def build_stage2(
    vision: VisionConfig,
    text: TextConfig,
    audio: AudioConfig | None,
    config: Stage2Config,
    device: torch.device | str = "cpu",
) -> Stage2:
    """Build the towers with fresh weights; the vocabulary is the tokenizer's.

    Raises:
        ValueError: ``config.tokenizer`` is not given.
        FileNotFoundError: There is no tokenizer.
    """
    if not config.tokenizer:
        raise ValueError("Stage2Config: tokenizer must be a folder with vocab.txt, got nothing")
    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"Stage2: text.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {text.vocab_size}"
        )
    model = Stage2Model(vision, text, audio, config.joint).to(device)
    return Stage2(model, tokenizer, config)


def load_stage2(
    run_dir: str | Path = "",
    *,
    recipe: str = "",
    weights: str | Path = "",
    tokenizer: str | Path = "",
    device: torch.device | str = "cpu",
) -> tuple[Stage2, TrainConfig]:
    """A trained stage 2, in evaluation mode: that of a run, or published weights.

    Args:
        run_dir: Folder of a run; its model.safetensors is loaded unless weights are given.
        recipe: Without a run: the recipe whose towers the weights are for, such as stage2-1b.
        weights: A file to load, strictly.
        tokenizer: Folder with the vocabulary; empty takes the run's.
        device: Where it runs.

    Raises:
        ValueError: Neither a run nor a recipe with weights is given, or the run is no stage 2.
        FileNotFoundError: A file is not there.
        CheckpointError: The weights cannot be read.
    """
    from iv2.config import from_json
    from iv2.recipes import recipe as recipe_by_name

    if run_dir:
        config = from_json(Path(run_dir) / "config.json")
        weights = weights or Path(run_dir) / "model.safetensors"
        tokenizer = tokenizer or run_dir
    elif recipe and weights:
        config = recipe_by_name(recipe)
    else:
        raise ValueError("load_stage2: run must be given, or recipe and weights, got neither")
    if config.stage != "stage2":
        raise ValueError(f"load_stage2: run must be of stage2, got {config.stage}")
    config = replace(
        config,
        stage2=replace(
            config.stage2, tokenizer=str(tokenizer or config.stage2.tokenizer), frozen=()
        ),
    )
    stage = build_stage2(config.model, config.text, config.audio, config.stage2, device)
    load_checkpoint(stage.model, weights, prefix="")
    return stage.eval(), config
