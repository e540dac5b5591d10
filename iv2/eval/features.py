"""Features of a frozen encoder over a list of clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from iv2.data.clips import Sample
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.loader import Batches
from iv2.data.transforms import CropKind
from iv2.models.vision import VisionEncoder


@dataclass
class Features:
    """Features of N clips, float32 on the CPU, in the order in which the clips came."""

    # [N, C] by name: "pooled" where there is a pooling head, "blocks.{i}.cls", "blocks.{i}.mean"
    # (of the patches) for each layer.
    vectors: dict[str, Tensor] = field(default_factory=dict)
    # [N, 1 + patches, C] by "blocks.{i}", the CLS token first; empty unless asked for.
    tokens: dict[str, Tensor] = field(default_factory=dict)
    # Files of the clips.
    paths: list[str] = field(default_factory=list)
    # Attributes of the clips; "label" too where there is one.
    attributes: list[dict[str, Any]] = field(default_factory=list)

    def cat(self, *names: str) -> Tensor:
        """Vectors side by side.

        Raises:
            ValueError: There is no such vector.
        """
        for name in names:
            if name not in self.vectors:
                raise ValueError(
                    f"Features: name must be one of {', '.join(self.vectors)}, got {name}"
                )
        return torch.cat([self.vectors[name] for name in names], dim=1)

    def values(self, attribute: str) -> list[Any]:
        """An attribute of each clip.

        Raises:
            ValueError: A clip lacks it.
        """
        for path, attributes in zip(self.paths, self.attributes, strict=True):
            if attribute not in attributes:
                raise ValueError(f"Features: {attribute} must be given for each clip: {path}")
        return [attributes[attribute] for attributes in self.attributes]


def without_chance(config: ClipConfig, crop: CropKind = "centre") -> ClipConfig:
    """The same clips as tests see them: middle frames, one crop, no flip, any codec.

    Args:
        config: As in training.
        crop: "centre", or "whole", which stage 2 squeezes into a square.
    """
    plain = replace(config.crop, kind=crop, flip=0.0)
    return replace(config, random=False, crop=plain, decoder=None)


def ordered_batches(
    samples: Sequence[Sample],
    clip: ClipConfig,
    batch_size: int,
    num_workers: int = 0,
    crop: CropKind = "centre",
) -> Batches:
    """One pass over the clips in the order of the list, seen as in tests."""
    dataset = VideoDataset(samples, without_chance(clip, crop))
    return Batches(dataset, batch_size, num_workers=num_workers, epochs=1, shuffle=False)


@torch.no_grad()
def extract(
    encoder: VisionEncoder,
    batches: Iterable[dict[str, Any]],
    *,
    layers: Sequence[int] = (-1,),
    keep_tokens: bool = False,
    device: torch.device | str = "cpu",
) -> Features:
    """Features of all clips of an iterable that ends.

    Args:
        encoder: On the device; it is run in evaluation mode.
        batches: For example from ``ordered_batches``.
        layers: Blocks whose output to take; negative ones count from the end.
        keep_tokens: Keep all tokens too, for attentive probes: tokens x C x 4 bytes a clip.
        device: Where the encoder is.

    Raises:
        ValueError: There are no batches.
    """
    was_training = encoder.training
    encoder.eval()
    parts: dict[str, list[Tensor]] = {}
    tokens: dict[str, list[Tensor]] = {}
    found = Features()
    for batch in batches:
        out = encoder.features(batch["video"].to(device), layers)
        vectors = {} if out.pooled is None else {"pooled": out.pooled}
        for name, x in out.tokens.items():
            vectors |= {f"{name}.cls": x[:, 0], f"{name}.mean": x[:, 1:].float().mean(1)}
            if keep_tokens:
                tokens.setdefault(name, []).append(x.float().cpu())
        for name, x in vectors.items():
            parts.setdefault(name, []).append(x.float().cpu())
        found.paths += batch["paths"]
        found.attributes += _attributes(batch)
    encoder.train(was_training)
    if not found.paths:
        raise ValueError("extract: batches must hold at least one batch, got none")
    found.vectors = {name: torch.cat(x) for name, x in parts.items()}
    found.tokens = {name: torch.cat(x) for name, x in tokens.items()}
    return found


def _attributes(batch: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [dict(row) for row in batch.get("attributes", [{}] * len(batch["paths"]))]
    if "labels" in batch:
        for row, label in zip(rows, batch["labels"].tolist(), strict=True):
            row.setdefault("label", label)
    return rows
