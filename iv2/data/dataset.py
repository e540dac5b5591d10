"""Clips by number: what is read of each, and how chance is drawn.

What a sample looks like is a function of (seed, epoch, sample number) alone. A clip that cannot be
read, or is too short, gives its place to another one, which depends on (seed, sample number) only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from iv2.data import dali
from iv2.data.audio import SoundConfig, cut, fbank, read_sound, sixteen_bits
from iv2.data.cache import FrameCache, SoundCache
from iv2.data.clips import (
    Sample,
    interval_indices,
    sparse_indices,
    sparse_test_indices,
    tsn_indices,
)
from iv2.data.decode import Backend, DecodeError, Video, checked_backend
from iv2.data.tiles import tiles
from iv2.data.transforms import CropConfig, View, draw_view, look

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
    # what decodes videos: pyav (None) or torchcodec in the workers, or dali, which also cuts and
    # resizes, where the batches are wanted: on the GPU, or on a CPU for VP8, VP9 and MJPEG alone
    decoder: Backend | None = None

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
        if self.decoder == "dali" and (self.short_side or not self.normalise or self.tiles):
            raise ValueError(
                "ClipConfig: decoder must be pyav or torchcodec unless short_side is 0, normalise "
                "True and tiles None, got dali"
            )
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


def random_stream(key: int) -> np.random.Generator:
    """The numbers that are drawn for a key."""
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
        device: torch.device | str = "cpu",
    ) -> None:
        """Describe the clips; nothing is opened yet.

        Args:
            samples: The clips.
            config: What is taken of each.
            seed: Of all draws, and of the order in `Batches`.
            cache_bytes: Memory for decoded frames of short clips (at most 64 frames), and a quarter
                of it for sounds; 0: none.
            name: Of the list; ids of the clips of lists of other names differ.
            device: Where `Batches` puts the batches.

        Raises:
            ValueError: there are no clips, they are of several kinds, or of one with sound and the
                configuration says nothing of sounds; or frames are to be kept that DALI decodes.
            RuntimeError: the decoder is not installed.
        """
        if not samples:
            raise ValueError("VideoDataset: samples must be at least one clip, got none")
        self.samples = list(samples)
        self.config, self.name, self.device = config, name, torch.device(device)
        kinds = sorted({sample.kind for sample in self.samples})
        if len(kinds) > 1:
            raise ValueError(
                f"VideoDataset: samples must be of one kind, got {', '.join(kinds)}; "
                "give each kind its own source"
            )
        (self.kind,) = kinds
        if self.kind.startswith("audio") and config.sound is None:
            raise ValueError(f"VideoDataset: sound must be configured for {self.kind}, got None")
        # Decoders of videos: of images and sounds there is one.
        moving = self.kind in ("video", "audio_video")
        self._backend = checked_backend(config.decoder) if moving else "pyav"
        if self.encoded and cache_bytes:
            raise ValueError(
                f"VideoDataset: cache_bytes must be 0 for decoder dali, got {cache_bytes}"
            )
        # Found out here: workers must not ask CUDA.
        self.gpu = dali.gpu_of(self.device) if self.encoded else None
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

    @property
    def encoded(self) -> bool:
        """Whether samples have a `clip` for DALI instead of a `video`."""
        return self._backend == "dali"

    def load(self, epoch: int, index: int) -> dict[str, Any]:
        """Sample `index` as seen in `epoch`, or its replacement.

        Returns:
            video (with tiles uint8 [V, T, H, W, 3]; where DALI decodes, clip) and fbank, as the
            kind has them, and place (epoch, index), seed (from it), sample_id (of the clip shown),
            id, path, label, captions, messages, attributes; skipped, a list of (sample_id, path,
            reason).

        Raises:
            RuntimeError: too many clips in a row cannot be read.
        """
        key = sample_key(self.seed, epoch, index)
        skipped: list[tuple[int, str, str]] = []
        chosen = index
        for attempt in range(_TRIES):
            sample = self.samples[chosen]
            try:
                media = self._read(chosen, random_stream(key))
            except DecodeError as e:
                self._bad[chosen] = e.reason
                skipped.append((chosen, sample.path, e.reason))
                chosen = sample_key(self.seed, index, attempt, 1) % len(self.samples)
                continue
            return {
                **media,
                "place": (epoch, index),
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

    def replace(self, item: dict[str, Any], reason: str) -> dict[str, Any]:
        """What takes the place of a sample that turns out to be broken."""
        self._bad[item["sample_id"]] = reason
        return self.load(*item["place"])

    def _read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The frames, the crop and the sound of one clip, drawn from `rng` in this order."""
        if index in self._bad:
            raise DecodeError(self.samples[index].path, self._bad[index])
        media: dict[str, Any] = {}
        if self.encoded:
            media["clip"] = self._undecoded(index, rng)
        elif self.kind not in ("audio", "text"):
            media["video"] = self._look(index, rng)
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
        view = self._view(index, frames.shape[1], frames.shape[2], rng)
        return look(frames, view, dtype=torch.float32 if self.config.normalise else torch.uint8)

    def _view(self, index: int, height: int, width: int, rng: np.random.Generator) -> View:
        # The released code does not mirror Something-Something either: it tells left from right.
        may_flip = self.samples[index].attributes.get("source") != "ssv2"
        return draw_view(self.config.crop, height, width, rng, may_flip=may_flip)

    def _decode(self, index: int, rng: np.random.Generator) -> Tensor:  # [T, H, W, 3]
        with Video(self.samples[index].path, backend=self._backend) as video:
            low, high = self._range(index, video)
            size = self.config.short_side or None
            if self._cache is None or high - low > self._cache.max_frames:
                return video.frames([low + i for i in self._numbers(high - low, rng)], size)
            whole = video.frames(range(low, high), size)
        self._cache.put(self._clips[index], whole)
        return whole[self._numbers(whole, rng)]

    def _undecoded(self, index: int, rng: np.random.Generator) -> dali.Clip:
        """The file and what is to be shown of it, the draws being those of `_look`."""
        with Video(self.samples[index].path) as video:
            low, high = self._range(index, video)
            numbers = [low + i for i in self._numbers(high - low, rng)]
            info = video.info()
            view = self._view(index, info.height, info.width, rng)
            return dali.clip(video, numbers, view, device_id=self.gpu)

    def _range(self, index: int, video: Video) -> tuple[int, int]:
        """Numbers [low, high) of the clip's frames, which are enough."""
        low, high = video.frame_range(self.samples[index].start, self.samples[index].end)
        least = 1 if self.kind == "image" else self.config.min_frames or self.config.num_frames
        if high - low < least:
            frames = "frame" if high - low == 1 else "frames"
            raise DecodeError(
                self.samples[index].path, f"too short: {high - low} {frames}, need {least}"
            )
        return low, high

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


def _sample_id(name: str, row: str) -> int:
    """A 63-bit number of a row of a list."""
    text = f"{name}\0{row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
