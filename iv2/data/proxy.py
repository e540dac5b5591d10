"""Small copies of videos that are cheap to take single frames from.

The short side is 256 pixels, a keyframe comes every 16 frames, and no frame is stored out of order:
eight frames from anywhere in such a file cost about a sixth of what they cost in the original, at
half the bytes. The sound, mono, stays in step: both begin where the clip begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from iv2.data.audio import SoundConfig, read_sound
from iv2.data.decode import DecodeError, Video

# Of the written timestamps, which need not be equally far apart.
_TICKS = 90_000
# Codec of the pictures and its options, codec and rate of the sound, by codec.
_H264 = {"preset": "veryfast", "crf": "23", "bf": "0", "sc_threshold": "0"}
_VP9 = {"crf": "34", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "0"}
_CODECS: dict[str, tuple[str, dict[str, str], str, int, str]] = {
    "h264": ("libx264", _H264, "aac", 16_000, "mp4"),
    "vp9": (
        "libvpx-vp9",
        _VP9 | {"auto-alt-ref": "0", "lag-in-frames": "0"},
        "libopus",
        48_000,
        "webm",
    ),
}


@dataclass(frozen=True)
class ProxyConfig:
    """What a copy is like."""

    # h264, or vp9, which DALI decodes on CPUs
    codec: Literal["h264", "vp9"] = "h264"
    # short side in pixels; smaller videos keep theirs
    size: int = 256
    # frames from a keyframe to the next
    gop: int = 16

    def __post_init__(self) -> None:
        if self.codec not in _CODECS:
            raise ValueError(
                f"ProxyConfig: codec must be one of {', '.join(_CODECS)}, got {self.codec}"
            )
        for name, least in (("size", 16), ("gop", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"ProxyConfig: {name} must be at least {least}, got {getattr(self, name)}"
                )

    @property
    def suffix(self) -> str:
        """Of the files: .mp4 or .webm."""
        return f".{_CODECS[self.codec][4]}"


def write_proxy(
    source: str, start: float | None, end: float | None, out: Path, config: ProxyConfig
) -> None:
    """Write a copy of a clip, from `start` to `end` seconds or whole.

    Raises:
        DecodeError: The clip cannot be read whole, or has no frame.
        OSError: The copy cannot be written.
    """
    name, options, sound_name, rate, container_name = _CODECS[config.codec]
    with Video(source) as video:  # says more of a broken file than the sound does
        wave = read_sound(source, start, end, SoundConfig(sample_rate=rate))
        low, high = video.frame_range(start, end)
        if low == high:
            raise DecodeError(source, f"no frames from {start} to {end} s")
        times = [round((t - video.times[low]) * _TICKS) for t in video.times[low:high]]
        frames = video.stream(low, high, config.size)
        try:
            first = next(frames)
            height, width = (n // 2 * 2 for n in first.shape[:2])
            fps = _fps(times)
            with av.open(
                str(out), "w", format=container_name, options={"fflags": "bitexact"}
            ) as to:
                pictures = to.add_stream(name, rate=max(1, round(fps)))
                pictures.height, pictures.width, pictures.pix_fmt = height, width, "yuv420p"
                pictures.options = {**options, "g": str(config.gop), "keyint_min": str(config.gop)}
                pictures.codec_context.time_base = Fraction(1, _TICKS)
                pictures.thread_count = 1
                sound = None
                if wave is not None and len(wave):
                    sound = to.add_stream(sound_name, rate=rate, layout="mono")
                _mux_pictures(to, pictures, _chain(first, frames), times)
                if sound is not None and wave is not None:
                    _mux_sound(to, sound, wave.numpy())
        except FFmpegError as error:
            if isinstance(error, OSError):  # a full disk, say, which is not the clip's fault
                raise
            raise DecodeError(source, f"no copy can be written: {error}") from error


def _fps(times: list[int]) -> float:
    """Average rate, for the encoder's settings."""
    return (len(times) - 1) * _TICKS / times[-1] if times[-1] else 25.0


def _chain(
    first: NDArray[np.uint8], rest: Iterator[NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    yield first
    yield from rest


def _mux_pictures(
    to: Any, stream: Any, frames: Iterator[NDArray[np.uint8]], times: list[int]
) -> None:
    converter = VideoReformatter()
    for pixels, time in zip(frames, times, strict=True):
        rgb = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(pixels[: stream.height, : stream.width]), format="rgb24"
        )
        frame = converter.reformat(rgb, format="yuv420p", threads=1)
        frame.pts, frame.time_base = time, Fraction(1, _TICKS)
        to.mux(stream.encode(frame))
    to.mux(stream.encode())


def _mux_sound(to: Any, stream: Any, wave: NDArray[np.float32]) -> None:
    rate = stream.rate
    block = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    block.sample_rate, block.pts = rate, 0
    size = stream.codec_context.frame_size or 1024
    resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=size)
    for part in [*resampler.resample(block), *resampler.resample(None)]:
        to.mux(stream.encode(part))
    to.mux(stream.encode())
