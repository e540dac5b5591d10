"""Supervised classification: fine-tuning, and the training of the small teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.config import FinetuneConfig
from iv2.data.clips import Sample
from iv2.models.teachers import Teacher, build_teacher
from iv2.models.vision import VisionConfig, VisionEncoder

# Name of the only head where a list has a `label` and no attributes are asked for.
LABEL = "label"

Classes = Mapping[str, Sequence[Any]]


class Finetune(nn.Module):
    """Cross-entropy of one or several attributes of a clip, whose heads share one linear layer.

    Args:
        model: Its ``logits`` are the scores of all classes, attribute after attribute.
        classes: Values of each attribute, in the order of their scores.
        label_smoothing: Share of the target that is spread over all classes.
    """

    def __init__(
        self, model: VisionEncoder | Teacher, classes: Classes, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = {name: list(values) for name, values in classes.items()}
        self.label_smoothing = label_smoothing
        self.loss_weights = dict.fromkeys(self.classes, 1.0)
        self._index = {
            name: {value: i for i, value in enumerate(values)}
            for name, values in self.classes.items()
        }

    @property
    def trained(self) -> nn.Module:
        """What is trained and saved."""
        return self.model

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage."""
        return {"classes": self.classes}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy by attribute.

        Args:
            batch: ``video``, ``seeds``, and ``attributes`` (dicts) or ``labels`` (int64 [B]).
        """
        scores = self.scores(batch)
        targets = self.targets(batch)
        return {
            name: F.cross_entropy(
                scores[name].float(), targets[name], label_smoothing=self.label_smoothing
            )
            for name in scores
        }

    def scores(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scores [B, classes] by attribute."""
        video = batch["video"]
        if isinstance(self.model, VisionEncoder):
            logits = self.model.logits(video, seeds=batch["seeds"])
        else:
            logits = self.model.logits(video)
        parts = torch.split(logits, [len(v) for v in self.classes.values()], dim=1)
        return dict(zip(self.classes, parts, strict=True))

    def targets(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Class numbers [B] by attribute.

        Raises:
            ValueError: A clip lacks an attribute or has an unknown value of it; it is named.
        """
        device = batch["video"].device
        if LABEL in self.classes and "labels" in batch:
            values = {LABEL: batch["labels"].tolist()}
        else:
            values = {name: [a.get(name) for a in batch["attributes"]] for name in self.classes}
        numbers = {}
        for name, row in values.items():
            index = self._index[name]
            for value, path in zip(row, batch["paths"], strict=True):
                if value not in index:
                    known = ", ".join(map(str, self.classes[name]))
                    raise ValueError(
                        f"Finetune: {name} must be one of {known}, got {value}: {path}"
                    )
            numbers[name] = torch.tensor([index[value] for value in row], device=device)
        return numbers

    @torch.no_grad()
    def count_correct(self, batch: dict[str, Any]) -> dict[str, int]:
        """Clips of a batch whose best score is the right one, by attribute."""
        targets = self.targets(batch)
        return {
            name: int((scores.argmax(1) == targets[name]).sum())
            for name, scores in self.scores(batch).items()
        }


def find_classes(samples: Sequence[Sample], attributes: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each attribute in a list, sorted, so that every process has the same order.

    Args:
        samples: Clips.
        attributes: Names; empty takes the label, whose classes are 0 … largest.

    Raises:
        ValueError: A clip lacks one, or there are fewer than two values.
    """
    classes: dict[str, list[Any]] = {}
    for name in attributes or (LABEL,):
        found: list[Any] = [s.label if name == LABEL else s.attributes.get(name) for s in samples]
        for sample, value in zip(samples, found, strict=True):
            if value is None:
                raise ValueError(f"find_classes: {name} must be given for each clip: {sample.path}")
        if name == LABEL:
            classes[name] = list(range(max(found) + 1))
        else:
            classes[name] = sorted(set(found), key=lambda value: (str(type(value)), value))
        if len(classes[name]) < 2:
            raise ValueError(f"find_classes: {name} must have two values or more, got {set(found)}")
    return classes


def build_finetune(
    model: VisionConfig,
    config: FinetuneConfig,
    classes: Classes,
    device: torch.device | str = "cpu",
) -> Finetune:
    """Build an encoder, or a small teacher, with a head for the classes and fresh weights."""
    num_classes = sum(len(values) for values in classes.values())
    network: VisionEncoder | Teacher
    if config.teacher:
        network = build_teacher(config.teacher, num_classes=num_classes)
    else:
        network = VisionEncoder(replace(model, num_classes=num_classes))
    return Finetune(network.to(device), classes, label_smoothing=config.label_smoothing)
