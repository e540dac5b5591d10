"""Batches of clips in a fixed order that can be left and taken up again anywhere.

The stream of samples is endless: position p is place p mod N of the order of epoch p div N, and a
global batch is the next world x batch_size positions, a contiguous part for each rank. What a
sample looks like is a function of (seed, epoch, sample number) alone. The number of worker
processes, the cache and earlier failures therefore change nothing, and the whole state is the
position.

A clip that cannot be read, or is too short, gives its place to another one, which depends on (seed,
sample number) only; it is counted and reported, and too many of them stop the run. So are samples
that the stage finds it cannot use.

Workers are forked, so that they start in milliseconds and share the cache; each runs with one
thread, where neither PyTorch nor the kernels enter a parallel region. Two batches a worker are
loaded ahead of the one asked for, and no more, which bounds the memory. DALI decodes in the process
that asks for the batches, what the workers have read and checked.

Batches for a GPU come from pinned memory, each copied while the one before is used; the position
is that of what was given.
"""

import ctypes
import hashlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iv2.data import dali
from iv2.data.ahead import Fetched, ahead, lane_to
from iv2.data.clips import Sample
from iv2.data.collate import Collate
from iv2.data.dataset import VideoDataset, random_stream, sample_key
from iv2.data.decode import DecodeError


class Batches(Iterator[dict[str, Any]]):
    """The stream of one rank's batches.

    A batch is a dict: `kind`; `video` float32 [B, 3, T, H, W] (or uint8, see `ClipConfig`) and
    `fbank` float32 [B, F, bins], as the kind has them; `seeds`, `sample_ids` and `ids` int64 [B];
    `paths`, `captions` (dicts by kind), `messages` and `attributes` lists; and `labels` int64 [B]
    where every clip of the data set has one. Batches of kind text have neither video nor fbank.
    With tiles, `video` is uint8 [sum of V, T, H, W, 3], clip after clip, and `views` the list of
    the V. `unusable` is an empty dict: a stage that cannot use a sample puts the reason there under
    the sample's place in the batch.

    Attributes:
        position: Samples that all ranks together have been given.
        wait_seconds: Time spent waiting for data in `next`.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        max_bad_fraction: float = 0.5,
    ) -> None:
        """Set up the stream; workers start with the first batch.

        Args:
            dataset: The clips.
            batch_size: Samples in a batch of this rank.
            rank: Of this process.
            world: Number of processes.
            num_workers: Worker processes; 0 loads in this one.
            epochs: Passes over the data, the last batch cut short; None: endless.
            shuffle: Draw the order of each epoch; False keeps the list's.
            max_bad_fraction: Share of unreadable clips above which the run is stopped.
        """
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"Batches: rank must be in [0, {world}), got {rank}")
        if num_workers < 0:
            raise ValueError(f"Batches: num_workers must be >= 0, got {num_workers}")
        self.dataset, self.batch_size, self.rank, self.world = dataset, batch_size, rank, world
        self.num_workers, self.epochs, self.shuffle = num_workers, epochs, shuffle
        self.max_bad_fraction = max_bad_fraction
        self.position = 0
        self.wait_seconds = 0.0
        self._bad: dict[int, tuple[str, str]] = {}
        self._last: dict[str, Any] | None = None
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None
        self._batches: Iterator[Fetched] | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        started = time.perf_counter()
        if self._batches is None:
            self._batches = self._start()
        self._hear_stage()
        batch: dict[str, Any]
        batch, skipped = next(self._batches)
        batch["unusable"] = {}
        self._last = {name: batch[name] for name in ("sample_ids", "paths", "unusable")}
        self.wait_seconds += time.perf_counter() - started
        self.position += self.batch_size * self.world
        for index, path, reason in skipped:
            self._bad.setdefault(index, (path, reason))
        self._check_bad()
        return batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; the next batch starts them again."""
        self._batches = None

    @property
    def skipped(self) -> dict[str, str]:
        """Path and reason of each clip that could not be used so far, on this rank.

        What the stage could not use is told from other rows on the clip by its row in the list.
        """
        self._hear_stage()
        return dict(self._bad.values())

    def state_dict(self) -> dict[str, Any]:
        """The position, what it refers to, and the report so far."""
        self._hear_stage()
        return {
            "position": self.position,
            "seed": self.dataset.seed,
            "samples": len(self.dataset),
            "digest": _digest(self.dataset.samples),
            "skipped": [[index, *row] for index, row in self._bad.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: it was saved with another seed or another list.
        """
        here = self.state_dict()
        for name in ("seed", "samples", "digest"):
            if state[name] != here[name]:
                raise ValueError(
                    f"Batches: {name} must be {here[name]} as in this run, got {state[name]}"
                )
        self.close()
        self.position, self._last = state["position"], None
        self._bad = {index: (path, reason) for index, path, reason in state["skipped"]}

    def _start(self) -> Iterator[Fetched]:
        """Workers that begin at the current position."""
        options: dict[str, Any] = {}
        if self.num_workers:
            method = "fork" if sys.platform == "linux" else "spawn"
            options = {"multiprocessing_context": method, "prefetch_factor": 2}
            options["worker_init_fn"] = _own_memory
        dataset, device = self.dataset, self.dataset.device
        collate = Collate(dataset.kind, labelled=dataset.labelled, tiled=bool(dataset.config.tiles))
        loader: DataLoader[Any] = DataLoader(
            _Keyed(dataset),
            batch_sampler=_Requests(self),
            num_workers=self.num_workers,
            collate_fn=list if dataset.encoded else collate,
            pin_memory=device.type == "cuda",
            # The loader draws a seed for its workers: not from the run's generator.
            generator=torch.Generator(),
            **options,
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; the workers take no lock of theirs.
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            loaded: Iterator[Any] = iter(loader)
        if dataset.encoded:
            loaded = (collate(*_decoded(dataset, items)) for items in loaded)
        return ahead(loaded, lane_to(device))

    def _hear_stage(self) -> None:
        """Take down which samples of the last batch the stage could not use."""
        if self._last is None:
            return
        for place, reason in self._last["unusable"].items():
            index, path = int(self._last["sample_ids"][place]), self._last["paths"][place]
            row = " of ".join(filter(None, (f"row {index + 1}", Path(self.dataset.name).name)))
            self._bad.setdefault(index, (f"{path} ({row})" if path else row, reason))

    def _check_bad(self) -> None:
        bad, total = len(self._bad), len(self.dataset)
        if bad > self.max_bad_fraction * total:
            path, reason = next(reversed(self._bad.values()))
            raise RuntimeError(
                f"data: {bad} of {total} clips cannot be used, more than the permitted "
                f"{self.max_bad_fraction:.0%}; the last one is {path}: {reason}"
            )

    def _request(self, position: int) -> tuple[int, int]:
        """Epoch and sample number of a position in the stream."""
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return epoch, place
        if self._order is None or self._order[0] != epoch:
            key = sample_key(self.dataset.seed, epoch, -1)
            draws = random_stream(key).random(len(self.dataset))
            self._order = epoch, np.argsort(draws, kind="stable")
        return epoch, int(self._order[1][place])


class _Requests:
    """What to load from now on: a list of (epoch, sample number) for each batch."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        at = self._batches
        end = sys.maxsize if at.epochs is None else at.epochs * len(at.dataset)
        position = at.position
        while True:
            first = position + at.rank * at.batch_size
            last = min(first + at.batch_size, end)
            if first >= last:
                return
            yield [at._request(p) for p in range(first, last)]
            position += at.batch_size * at.world


def _decoded(
    dataset: VideoDataset, items: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Tensor]:  # [B, 3, T, H, W]
    """The samples and their video, decoded by DALI; others in place of those that it cannot."""
    while True:
        try:
            return items, dali.load([item["clip"] for item in items], device_id=dataset.gpu)
        except DecodeError:
            usable = [_unless_broken(dataset, item) for item in items]
            if all(one is other for one, other in zip(usable, items, strict=True)):
                raise  # no file alone is to blame
            items = usable


def _unless_broken(dataset: VideoDataset, item: dict[str, Any]) -> dict[str, Any]:
    """The sample, or what takes its place."""
    try:
        dali.load([item["clip"]], device_id=dataset.gpu)
    except DecodeError as error:
        return dataset.replace(item, error.reason)
    return item


class _Keyed(Dataset[dict[str, Any]]):
    def __init__(self, dataset: VideoDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: tuple[int, int]) -> dict[str, Any]:
        return self._dataset.load(*request)


_M_MMAP_THRESHOLD = -3  # in malloc.h


def _own_memory(worker: int) -> None:
    """In a worker, memory of their own for large tensors, which goes back when they are freed.

    Some versions of glibc (2.36 is one) do not find a freed aligned block again for another one of
    its size: the heap of a worker grew by some thirty batches.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in musl
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _digest(samples: list[Sample]) -> str:
    """Names the list; a folder may move."""
    names = hashlib.blake2b(digest_size=8)
    for sample in samples:
        names.update(repr((Path(sample.path).name, sample.start, sample.end)).encode())
        if sample.messages:
            names.update(repr([(m["role"], m["content"]) for m in sample.messages]).encode())
    return names.hexdigest()
