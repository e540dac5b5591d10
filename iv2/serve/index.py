"""`iv2 embed` and `iv2 search`: a file of embeddings of video segments, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iv2.checkpoint import CheckpointError
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig
from iv2.data.decode import DecodeError, Video, probe
from iv2.eval.features import ordered_batches
from iv2.eval.retrieval import encode_media, encode_texts
from iv2.models.stage2 import Media
from iv2.stages.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Segment:
    """A part of a video."""

    # File.
    path: str
    # Seconds.
    start: float
    # Seconds, exclusive.
    end: float


@dataclass(frozen=True)
class Index:
    """Embedded segments."""

    # [S, D] of length one, float32.
    features: Tensor
    segments: list[Segment]
    # Path and reason of what could not be read.
    skipped: dict[str, str]

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file; the segments are JSON in its header."""
        from safetensors.torch import save_file

        header = {
            "segments": json.dumps([asdict(s) for s in self.segments]),
            "skipped": json.dumps(self.skipped),
        }
        save_file({"features": self.features.contiguous()}, str(path), metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: The file cannot be read or is no index.
        """
        from safetensors import safe_open

        try:
            with safe_open(str(path), "pt") as file:
                header = file.metadata() or {}
                segments = [Segment(**row) for row in json.loads(header["segments"])]
                return cls(file.get_tensor("features"), segments, json.loads(header["skipped"]))
        except Exception as error:  # each layer has its own kind
            raise CheckpointError(path, f"is no index of iv2 embed: {error}") from error


def cut(paths: Sequence[Sample], seconds: float) -> tuple[list[Sample], dict[str, str]]:
    """Segments of equal length, at most ``seconds`` each, and what cannot be opened."""
    segments: list[Sample] = []
    broken: dict[str, str] = {}
    for sample in paths:
        try:
            duration = probe(sample.path).duration
        except DecodeError as error:
            broken[sample.path] = error.reason
            continue
        start = sample.start or 0.0
        length = (sample.end or duration) - start
        count = max(1, round(length / seconds))
        for i in range(count):
            edges = (start + length * i / count, start + length * (i + 1) / count)
            segments.append(replace(sample, start=edges[0], end=edges[1]))
    return segments, broken


def embed(
    stage: DualEncoder,
    source: str | Path,
    clip: ClipConfig,
    *,
    seconds: float = 10.0,
    media: Media = "vision",
    batch_size: int = 16,
) -> Index:
    """Embed every segment of a folder of videos or of a list.

    Args:
        stage: The model.
        source: As ``read_list`` takes it, or a video.
        clip: Frames and size that the model was trained with.
        seconds: Longest segment.
        media: What is embedded; "audio_video" needs sound in each.
        batch_size: Segments in a pass.

    Raises:
        ValueError: No segment can be read; the reason of the first is named.
    """
    source = Path(source)
    single = source.is_file() and source.suffix.lower() not in (".jsonl", ".json", ".csv")
    samples = [Sample(str(source))] if single else read_list(source)
    segments, skipped = cut(samples, seconds)
    kinds = {"vision": "video"}
    segments = [replace(s, kind=kinds.get(media, media)) for s in segments]
    kept, features = [], []
    # one by one where a batch breaks: a replacement would be embedded in a broken clip's place
    for segment in segments:
        try:
            kept.append((segment, _one(stage, segment, clip, media)))
        except RuntimeError as error:
            skipped[segment.path] = str(error)
    if not kept:
        reason = next(iter(skipped.values()), "nothing there")
        raise ValueError(f"embed: source must hold videos that can be read, got {source}: {reason}")
    features = [feature for _, feature in kept]
    rows = [Segment(s.path, float(s.start or 0), float(s.end or 0)) for s, _ in kept]
    return Index(torch.cat(features), rows, skipped)


def _one(stage: DualEncoder, segment: Sample, clip: ClipConfig, media: Media) -> Tensor:
    device = stage.model.temp.device
    batches = ordered_batches([segment], replace(clip, min_frames=1), 1, crop="whole")
    return encode_media(stage, batches, media, keep_tokens=False, device=device).features


def search(stage: DualEncoder, index: Index, query: str, top: int = 5) -> list[dict[str, Any]]:
    """The best segments for a sentence: path, start, end and cosine, best first.

    Raises:
        ValueError: The index is of another width than the model's.
    """
    found = encode_texts(stage, [query], keep_hidden=False).features
    if found.shape[1] != index.features.shape[1]:
        raise ValueError(
            f"search: index must be of width {found.shape[1]} like the model, "
            f"got {index.features.shape[1]}"
        )
    scores = (index.features @ found.T)[:, 0]
    best = scores.topk(min(top, len(scores)))
    return [
        {**asdict(index.segments[i]), "score": score}
        for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def contact_sheet(query: str, found: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw four frames of each result, with its score and times, as a PNG."""
    from iv2.report import plot_frames, save_figure

    rows = []
    for row in found:
        with Video(row["path"]) as video:
            low, high = video.frame_range(row["start"], row["end"])
            numbers = [low + (high - low) * (2 * i + 1) // 8 for i in range(4)]
            frames = video.frames(numbers, 160)
        title = (
            f"{row['score']:.3f}   {row['start']:.1f}-{row['end']:.1f} s   {Path(row['path']).name}"
        )
        rows.append((title, frames.numpy()))
    save_figure(plot_frames(query, rows), path)
