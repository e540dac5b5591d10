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
thread, where neither PyTorch nor the kernels enter a parallel region.
"""

import hashlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iv2.data.audio import SoundConfig, cut, fbank, read_sound, sixteen_bits
from iv2.data.cache import FrameCache, SoundCache
from iv2.data.clips import (
    Sample,
    interval_indices,
    sparse_indices,
    sparse_test_indices,
    tsn_indices,
)
from iv2.data.collate import Collate
from iv2.data.decode import DecodeError, Video
from iv2.data.tiles import tiles
from iv2.data.transforms import CropConfig, draw_view, look

_TRIES = 32  # replacements tried in a row before giving up


@dataclass(frozen=True)
class ClipConfig:
    """What is taken of each clip."""

    # frames
    num_frames: int = 8
    # tsn (stage 1), sparse (fine-tuning) or interval (stage 2)
    sampling: Literal["tsn", "sparse", "interval"] = "tsn"
    # draw the frames inside their parts of the clip; False takes the middle ones
    random: bool = True
    # the crop
    crop: CropConfig = field(default_factory=CropConfig)
    # clips with fewer frames are skipped; 0 means num_frames
    min_frames: int = 0
    # scale down to this short side while decoding, pixels; 0 keeps the size
    short_side: int = 0
    # the sound, where the media have one
    sound: SoundConfig | None = None
    # normalised float32 [B, 3, T, H, W]; False: uint8 [B, T, H, W, 3], for patch_embed
    normalise: bool = True
    # most tiles of crop.size in the grid of each clip's own aspect ratio, beside the whole; None:
    # the whole alone
    tiles: int | None = None

    def __post_init__(self) -> None:
        if self.sampling not in ("tsn", "sparse", "interval"):
            raise ValueError(
                f"ClipConfig: sampling must be tsn, sparse or interval, got {self.sampling!r}"
            )
        if self.num_frames < 1:
            raise ValueError(f"ClipConfig: num_frames must be at least 1, got {self.num_frames}")
        for name in ("min_frames", "short_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"ClipConfig: {name} must be >= 0, got {getattr(self, name)}")
        if self.tiles is None:
            return
        if self.tiles < 1:
            raise ValueError(f"ClipConfig: tiles must be at least 1 or None, got {self.tiles}")
        if self.crop.kind != "whole" or self.crop.flip or self.normalise:
            raise ValueError(
                "ClipConfig: tiles must be None unless crop.kind is whole, crop.flip 0 and "
                f"normalise False, got {self.tiles}"
            )


def sample_key(*parts: int) -> int:
    """A 64-bit hash of whole numbers, such as (seed, epoch, sample number)."""
    key = 0
    for part in parts:  # one round of splitmix64 each
        key = (key + 0x9E3779B97F4A7C15 + (part & _MASK)) & _MASK
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key


_MASK = 2**64 - 1


def _rng(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


class VideoDataset:
    """Clips as tensors; which frames and which crop are drawn from (seed, epoch, index)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        config: ClipConfig,
        *,
        seed: int = 0,
        cache_bytes: int = 0,
        name: str = "",
    ) -> None:
        """Describe the clips; nothing is opened yet.

        Args:
            samples: The clips.
            config: What is taken of each.
            seed: Of all draws, and of the order in `Batches`.
            cache_bytes: Memory for decoded frames of short clips (at most 64 frames), and a quarter
                of it for sounds; 0: none.
            name: Of the list; ids of the clips of lists of other names differ.

        Raises:
            ValueError: there are no clips, they are of several kinds, or of one with sound and the
                configuration says nothing of sounds.
        """
        if not samples:
            raise ValueError("VideoDataset: samples must be at least one clip, got none")
        self.samples = list(samples)
        self.config, self.name = config, name
        kinds = sorted({sample.kind for sample in self.samples})
        if len(kinds) > 1:
            raise ValueError(
                f"VideoDataset: samples must be of one kind, got {', '.join(kinds)}; "
                "give each kind its own source"
            )
        (self.kind,) = kinds
        if self.kind.startswith("audio") and config.sound is None:
            raise ValueError(f"VideoDataset: sound must be configured for {self.kind}, got None")
        # A row's own id is never a number of another row.
        rows = (f"={s.id}" if s.id else str(i) for i, s in enumerate(self.samples))
        self.ids = [_sample_id(name, row) for row in rows]
        # Several rows may be of one clip, which is kept once.
        clips: dict[tuple[Any, ...], int] = {}
        spans = ((s.path, s.start, s.end) for s in self.samples)
        self._clips = [clips.setdefault(span, len(clips)) for span in spans]
        self._sounds = SoundCache(cache_bytes // 4)
        self.seed = seed
        self.labelled = all(sample.label is not None for sample in self.samples)
        cached = cache_bytes and self.kind != "text"
        self._cache = FrameCache(len(clips), cache_bytes) if cached else None
        self._bad: dict[int, str] = {}  # known here, so that it is not opened again

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, epoch: int, index: int) -> dict[str, Any]:
        """Sample `index` as seen in `epoch`, or its replacement.

        Returns:
            video (with tiles uint8 [V, T, H, W, 3]) and fbank, as the kind has them, and seed (from
            the place asked for), sample_id (of the clip shown), id, path, label, captions,
            messages, attributes; skipped, a list of (sample_id, path, reason).

        Raises:
            RuntimeError: too many clips in a row cannot be read.
        """
        key = sample_key(self.seed, epoch, index)
        skipped: list[tuple[int, str, str]] = []
        chosen = index
        for attempt in range(_TRIES):
            sample = self.samples[chosen]
            try:
                media = self._read(chosen, _rng(key))
            except DecodeError as e:
                self._bad[chosen] = e.reason
                skipped.append((chosen, sample.path, e.reason))
                chosen = sample_key(self.seed, index, attempt, 1) % len(self.samples)
                continue
            return {
                **media,
                "seed": key - 2**64 if key >= 2**63 else key,
                "sample_id": chosen,
                "id": self.ids[chosen],
                "path": sample.path,
                "label": sample.label,
                "captions": sample.captions,
                "messages": sample.messages,
                "attributes": sample.attributes,
                "skipped": skipped,
            }
        raise RuntimeError(
            f"data: {_TRIES} clips in a row cannot be read; the last one is {sample.path}: "
            f"{skipped[-1][2]}"
        )

    def _read(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """The frames, the crop and the sound of one clip, drawn from `rng` in this order."""
        if index in self._bad:
            raise DecodeError(self.samples[index].path, self._bad[index])
        media = {} if self.kind in ("audio", "text") else {"video": self._look(index, rng)}
        if self.kind.startswith("audio"):
            media["fbank"] = self._listen(index, rng)
        return media

    def _listen(self, index: int, rng: np.random.Generator) -> Tensor:  # [F, bins]
        sample, config = self.samples[index], self.config.sound
        assert config is not None
        wave = self._sounds.get(self._clips[index])
        if wave is None:
            found = read_sound(sample.path, sample.start, sample.end, config)
            if found is None or len(found) == 0:
                raise DecodeError(sample.path, "no sound")
            wave = sixteen_bits(found)  # cached or not
            self._sounds.put(self._clips[index], wave)
        wave = cut(wave, config, rng if self.config.random else None)
        return fbank(wave.float() / 2**15, config)

    def _look(self, index: int, rng: np.random.Generator) -> Tensor:
        frames = self._cache.get(self._clips[index]) if self._cache else None
        frames = self._decode(index, rng) if frames is None else frames[self._numbers(frames, rng)]
        if self.config.tiles:
            return tiles(frames, self.config.tiles, self.config.crop.size)
        # The released code does not mirror Something-Something either: it tells left from right.
        may_flip = self.samples[index].attributes.get("source") != "ssv2"
        view = draw_view(self.config.crop, frames.shape[1], frames.shape[2], rng, may_flip=may_flip)
        return look(frames, view, dtype=torch.float32 if self.config.normalise else torch.uint8)

    def _decode(self, index: int, rng: np.random.Generator) -> Tensor:  # [T, H, W, 3]
        sample, config = self.samples[index], self.config
        with Video(sample.path) as video:
            low, high = video.frame_range(sample.start, sample.end)
            image = self.kind == "image"
            least = 1 if image else config.min_frames or config.num_frames
            if high - low < least:
                frames = "frame" if high - low == 1 else "frames"
                raise DecodeError(sample.path, f"too short: {high - low} {frames}, need {least}")
            size = config.short_side or None
            if self._cache is None or high - low > self._cache.max_frames:
                return video.frames([low + i for i in self._numbers(high - low, rng)], size)
            whole = video.frames(range(low, high), size)
        self._cache.put(self._clips[index], whole)
        return whole[self._numbers(whole, rng)]

    def _numbers(self, frames: Tensor | int, rng: np.random.Generator) -> list[int]:
        """Frame numbers within the clip, by the configured rule."""
        n = frames if isinstance(frames, int) else len(frames)
        config = self.config
        if self.kind == "image":
            return [0]
        if config.sampling == "tsn":
            return tsn_indices(n, config.num_frames, rng if config.random else None)
        if config.sampling == "interval":
            return interval_indices(n, config.num_frames, rng if config.random else None)
        if config.random:
            return sparse_indices(n, config.num_frames, rng)
        return sparse_test_indices(n, config.num_frames)


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
        self._batches: Iterator[Any] | None = None

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

    def _start(self) -> Iterator[Any]:
        """Workers that begin at the current position."""
        options: dict[str, Any] = {}
        if self.num_workers:
            method = "fork" if sys.platform == "linux" else "spawn"
            options = {"multiprocessing_context": method, "prefetch_factor": 2}
        loader: DataLoader[Any] = DataLoader(
            _Keyed(self.dataset),
            batch_sampler=_Requests(self),
            num_workers=self.num_workers,
            collate_fn=Collate(
                self.dataset.kind,
                labelled=self.dataset.labelled,
                tiled=bool(self.dataset.config.tiles),
            ),
            # The loader draws a seed for its workers: not from the run's generator.
            generator=torch.Generator(),
            **options,
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; the workers take no lock of theirs.
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            return iter(loader)

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
            draws = _rng(sample_key(self.dataset.seed, epoch, -1)).random(len(self.dataset))
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


class _Keyed(Dataset[dict[str, Any]]):
    def __init__(self, dataset: VideoDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: tuple[int, int]) -> dict[str, Any]:
        return self._dataset.load(*request)


def _sample_id(name: str, row: str) -> int:
    """A 63-bit number of a row of a list."""
    text = f"{name}\0{row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _digest(samples: list[Sample]) -> str:
    """Names the list; a folder may move."""
    names = hashlib.blake2b(digest_size=8)
    for sample in samples:
        names.update(repr((Path(sample.path).name, sample.start, sample.end)).encode())
        if sample.messages:
            names.update(repr([(m["role"], m["content"]) for m in sample.messages]).encode())
    return names.hexdigest()
