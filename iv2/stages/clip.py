"""The CLIP variant of stage 2: the contrastive loss between videos and captions, unmasked.

Most of both towers is frozen. A frozen text tower is in evaluation mode and keeps nothing for
backward; the released code leaves it in training mode, where the dropout of LoRA, 0.1, disturbs
its features. Below the pooling head the video encoder keeps nothing either, but its drop path
works as published while the head is trained; ``model.drop_path 0`` turns it off.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from iv2.checkpoint import Report
from iv2.config import ClipStageConfig
from iv2.data.captions import choose_captions
from iv2.models.clip import ClipModel, build_clip
from iv2.models.clip_files import load_clip
from iv2.models.clip_text import TextTokenizer
from iv2.models.stage2 import Seen
from iv2.models.vision import VisionConfig
from iv2kernels.distributed import contrastive_loss, gather_async


class ClipStage(nn.Module):
    """The contrastive loss; over several processes, that of all ranks' rows.

    Args:
        model: The towers; all but what ``config.trained`` names is frozen.
        config: What is trained, and on which captions.

    Raises:
        ValueError: trained names nothing of the model.
    """

    def __init__(self, model: ClipModel, config: ClipStageConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.loss_weights = {f"vision_{config.caption}.vtc": 1.0}
        names = [name for name, _ in model.named_parameters()]
        for wanted in config.trained:
            if not any(_is_part(name, wanted) for name in names):
                raise ValueError(f"ClipStage: trained must name parts of the model, got {wanted}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(_is_part(name, wanted) for wanted in config.trained))

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the text tower."""
        tokenizer: TextTokenizer = self.model.text_encoder.tokenizer
        return tokenizer

    @property
    def trained(self) -> ClipModel:
        """What is trained, among what is not."""
        return self.model

    @property
    def elsewhere(self) -> frozenset[str]:
        """Parameters that a run does not save: the frozen ones are in files of their own."""
        named = self.model.named_parameters()
        return frozenset(name for name, parameter in named if not parameter.requires_grad)

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage."""
        return {}

    def load_towers(self) -> Report:
        """Load the files of ``config.{vision, text, clip}_init``; only the trained may be in none.

        Raises:
            CheckpointError: A file cannot be read.
            ValueError: A frozen parameter is in no file, or a file does not fit.
        """
        config = self.config
        return load_clip(
            self.model,
            vision=config.vision_init,
            text=config.text_init,
            clip=(config.clip_init,),
            may_be_fresh={n for n, p in self.model.named_parameters() if p.requires_grad},
        )

    def train(self, mode: bool = True) -> ClipStage:
        """As torch's; a tower of which nothing is trained stays in evaluation mode."""
        super().train(mode)
        for tower in (self.model.vision_encoder, self.model.text_encoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss by name, ``vision_{caption}.vtc``.

        Args:
            batch: ``video``, ``captions`` (a dict by kind for each sample), ``attributes``,
                ``ids``, ``seeds`` and ``paths``.

        Raises:
            ValueError: There is no video, or a sample has no such caption.
        """
        if self.training:
            self.model.clamp_temperature()
        # text first: its features travel to the other ranks while the video encoder runs
        captions = choose_captions(batch, self.config.caption, training=self.training)
        text = self.tokenizer.encode(captions, self.config.max_tokens)
        t = self.model.encode_text(text.to(batch["seeds"].device))
        gathering = gather_async(t) if self.config.gather == "gather" else None
        v = self.see(batch, {"vision"}).features["vision"]
        loss = contrastive_loss(
            v,
            gathering or t,
            self.model.temp.float(),
            ids=batch["ids"],
            mode=self.config.gather,
            grad_mode=self.config.grad_mode,
        )
        return {f"vision_{self.config.caption}.vtc": loss}

    def see(self, batch: dict[str, Any], towers: set[str]) -> Seen:
        """Features of a batch; there are no tokens for fusion layers.

        Raises:
            ValueError: Other towers than that of the video are asked for, or there is no video.
        """
        if towers != {"vision"} or "video" not in batch:
            got = ", ".join(sorted(towers)) if "video" in batch else batch.get("kind", "no video")
            raise ValueError(f"ClipStage: media must be vision, got {got}")
        seeds = batch["seeds"] if self.training else None
        return Seen({}, {"vision": self.model.encode_video(batch["video"], seeds=seeds)})


def _is_part(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}.") or fnmatchcase(name, wanted)


def build_clip_stage(
    vision: VisionConfig, config: ClipStageConfig, device: torch.device | str = "cpu"
) -> ClipStage:
    """Build the towers with fresh weights.

    Raises:
        ValueError: ``config.tokenizer`` is not given.
        FileNotFoundError: There is no tokenizer.
        RuntimeError: A LLaMA is asked for, and transformers or peft is not installed.
    """
    if not config.tokenizer:
        raise ValueError(
            "ClipStageConfig: tokenizer must be a folder with a vocabulary, got nothing"
        )
    return ClipStage(build_clip(vision, config.joint, config.tokenizer).to(device), config)
