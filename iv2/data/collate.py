"""Samples become a batch; ``iv2.data.loader.Batches`` says what is in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Collate:
    """Puts the samples of one data set together.

    Args:
        kind: Of their media.
        labelled: Each has a label.
        tiled: Each video is in views [V, T, H, W, 3], of which clips have different numbers.
    """

    def __init__(self, kind: str, *, labelled: bool, tiled: bool) -> None:
        self.kind, self.labelled, self.tiled = kind, labelled, tiled

    def __call__(
        self,
        items: list[dict[str, Any]],
        video: Tensor | None = None,  # [B, 3, T, H, W]
    ) -> tuple[dict[str, Any], list[Any]]:
        """The batch, and what was skipped for it; the videos are those of the items, or given."""
        batch: dict[str, Any] = {} if video is None else {"video": video}
        if "video" in items[0]:
            videos = [item["video"] for item in items]
            batch["video"] = torch.cat(videos) if self.tiled else torch.stack(videos)
            if self.tiled:
                batch["views"] = [len(video) for video in videos]
        if "fbank" in items[0]:
            batch["fbank"] = torch.stack([item["fbank"] for item in items])
        batch |= {
            "kind": self.kind,
            "ids": torch.tensor([item["id"] for item in items]),
            "seeds": torch.tensor([item["seed"] for item in items]),
            "sample_ids": torch.tensor([item["sample_id"] for item in items]),
            "paths": [item["path"] for item in items],
            "captions": [item["captions"] for item in items],
            "messages": [item["messages"] for item in items],
            "attributes": [item["attributes"] for item in items],
        }
        if self.labelled:
            batch["labels"] = torch.tensor([item["label"] for item in items])
        return batch, [row for item in items for row in item["skipped"]]
