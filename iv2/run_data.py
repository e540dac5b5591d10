"""The data of a run: its lists, and the batches of each of its processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from iv2.config import SourceConfig, TrainConfig
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import VideoDataset
from iv2.data.loader import Batches
from iv2.data.mixed import MixedBatches
from iv2.distributed import World


def read_sources(config: TrainConfig) -> list[list[Sample]]:
    """The lists of a run, each of one kind.

    Raises:
        ValueError: There is none.
    """
    data = config.data
    sources = data.sources or (SourceConfig(data.path, data.kind),)
    if not all(source.path for source in sources):
        raise ValueError("train: data.path must be a folder of videos or a list, got nothing")
    if not data.sources:
        return [read_list(data.path, data.kind)]
    if data.path and not Path(data.path).is_dir():
        names = ", ".join(source.path for source in sources)
        raise ValueError(f"train: data.path must be the folder of {names}, got {data.path}")
    return [read_list(Path(data.path) / source.path, source.kind) for source in sources]


def open_batches(
    config: TrainConfig, sources: list[list[Sample]], world: World
) -> Batches | MixedBatches:
    """The batches of one process, on its device."""
    data = config.data
    described = data.sources or (SourceConfig(data.path, data.kind),)
    cached = sum(samples[0].kind != "text" for samples in sources)
    parts = [
        Batches(
            VideoDataset(
                samples,
                replace(data.clip, num_frames=source.num_frames or data.clip.num_frames),
                seed=config.seed,
                cache_bytes=data.cache_bytes // max(1, cached),
                name=source.path,
                device=world.device,
            ),
            data.batch_size,
            rank=world.rank,
            world=world.size,
            num_workers=math.ceil(data.num_workers / len(sources)),
            max_bad_fraction=data.max_bad_fraction,
        )
        for samples, source in zip(sources, described, strict=True)
    ]
    if not data.sources:
        return parts[0]
    weights = [s.weight or len(p.dataset) for s, p in zip(described, parts, strict=True)]
    return MixedBatches(parts, weights, seed=config.seed)
