"""Sound from video and audio files, and its mel filter banks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from torch import Tensor

from iv2.data.decode import DecodeError
from iv2.data.files import readable

# Mean and twice the standard deviation of the logarithms, as BEATs was trained.
_MEAN, _SCALE = 15.41663, 2 * 6.55582
_LOWEST, _HIGHEST = 20.0, 8000.0  # Hz
_TINY = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class SoundConfig:
    """What is taken of a sound."""

    # Hz
    sample_rate: int = 16_000
    # longest window, seconds
    seconds: float = 10.0
    # bins of the mel spectrogram
    num_mel_bins: int = 64
    # frames of 10 ms, padded with zeros or cut to
    num_frames: int = 998


def read_sound(
    path: str | Path, start: float | None, end: float | None, config: SoundConfig
) -> Tensor | None:
    """Read mono sound from a video or an audio file.

    Args:
        path: The file.
        start: Seconds from the first picture, or without any from the first sound; None: 0.
        end: Seconds, exclusive; None: to the end.
        config: The sample rate.

    Returns:
        float32 [samples] in [-1, 1], or None where the file has no sound.

    Raises:
        DecodeError: The file cannot be read.
    """
    first = start or 0.0
    parts: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    began: float | None = None
    try:
        with av.open(readable(path)) as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            zero = _beginning(container, stream)
            if first > 1 and stream.time_base is not None:
                # a second early: the first frames after a seek may lack what they build on
                container.seek(int((zero + first - 1) / stream.time_base), stream=stream)
            resampler = av.AudioResampler("fltp", "mono", config.sample_rate)
            for frame in _frames(container, stream, sought=first > 1):
                time = float(frame.time or 0.0) - zero
                if end is not None and time >= end:
                    break
                began = time if began is None else began
                parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
            if parts:
                parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    except (FFmpegError, OSError) as error:
        raise DecodeError(str(path), f"no sound can be read: {error}") from error
    if not parts or began is None:
        return torch.zeros(0)
    wave = torch.from_numpy(np.concatenate(parts))
    low = round((first - began) * config.sample_rate)
    if low < 0:  # it begins after the pictures, or the part
        wave, began, low = F.pad(wave, (-low, 0)), first, 0
    high = len(wave) if end is None else round((end - began) * config.sample_rate)
    return wave[low : max(low, high)].clamp(-1, 1)


def _beginning(container: Any, stream: Any) -> float:
    """Seconds by the file's clock where the pictures begin, or without any the sound."""
    pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    first = pictures[0] if pictures else stream
    if first.start_time is None or first.time_base is None:
        return 0.0
    return float(first.start_time * first.time_base)


def _frames(container: Any, stream: Any, *, sought: bool) -> Iterator[Any]:
    """Frames from here on; after a seek without the packets before the first that is whole."""
    broken: FFmpegError | None = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError as error:
            if not sought:
                raise
            broken = error
            continue
        if frames:
            sought, broken = False, None
        yield from frames
    if broken:
        raise broken


def cut(wave: Tensor, config: SoundConfig, rng: np.random.Generator | None = None) -> Tensor:
    """A window of ``config.seconds``: a drawn one, or without rng the first; shorter is kept."""
    length = round(config.seconds * config.sample_rate)
    free = len(wave) - length
    if free <= 0:
        return wave
    low = 0 if rng is None else int(rng.random() * (free + 1))
    return wave[low : low + length]


def sixteen_bits(wave: Tensor) -> Tensor:
    """int16 [samples], as sounds are kept."""
    return (wave * 2**15).clamp(-(2**15), 2**15 - 1).to(torch.int16)


def read_fbank(
    path: str | Path, start: float | None, end: float | None, config: SoundConfig
) -> Tensor | None:
    """Filter banks [num_frames, num_mel_bins] of a file, as runs see them without draws.

    Of what is longer than ``config.seconds`` the first window is heard.

    Args:
        path: The file.
        start: Seconds; None: from the beginning.
        end: Seconds, exclusive; None: to the end.
        config: Rate, window, bins and frames.

    Returns:
        The filter banks, or None where there is no sound.

    Raises:
        DecodeError: The file cannot be read.
    """
    wave = read_sound(path, start, end, config)
    if wave is None or len(wave) == 0:
        return None
    return fbank(cut(sixteen_bits(wave), config).float() / 2**15, config)


def fbank(wave: Tensor, config: SoundConfig) -> Tensor:
    """Kaldi's log mel filter banks as BEATs takes them: [num_frames, num_mel_bins] float32.

    Windows of 25 ms every 10 ms, mean removed, pre-emphasis .97, Povey's window, power spectrum,
    triangles between 20 Hz and 8 kHz on the mel scale, natural logarithm, then
    (x - 15.41663) / 13.11164; frames beyond the sound are zero.

    Args:
        wave: float32 [samples] in [-1, 1].
        config: Rate, bins and frames.
    """
    window = config.sample_rate * 25 // 1000
    step = config.sample_rate * 10 // 1000
    out = torch.zeros(config.num_frames, config.num_mel_bins)
    if len(wave) < window:
        return out
    needed = window + step * (config.num_frames - 1)
    frames = (wave[:needed] * 2**15).unfold(0, window, step)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    shape, triangles = _tables(config.sample_rate, config.num_mel_bins, window)
    size = 2 * (triangles.shape[1])
    spectrum = torch.fft.rfft((frames - 0.97 * before) * shape, n=size)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (power[:, :-1] @ triangles.T).clamp(min=_TINY).log()
    out[: len(mel)] = (mel - _MEAN) / _SCALE
    return out


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


@cache
def _tables(rate: int, bins: int, window: int) -> tuple[Tensor, Tensor]:
    """Povey's window [window], and triangles [bins, FFT size / 2]."""
    place = torch.arange(window, dtype=torch.float64)
    shape = (0.5 - 0.5 * torch.cos(2 * math.pi * place / (window - 1))) ** 0.85
    size = 1 << (window - 1).bit_length()
    ends = _mel(torch.tensor([_LOWEST, min(_HIGHEST, rate / 2)], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64)
    at = _mel(torch.arange(size // 2, dtype=torch.float64) * rate / size)
    low, mid, high = (edges[i : i + bins, None] for i in range(3))
    triangles = torch.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clamp(min=0)
    return shape.float(), triangles.float()
