"""Frames of a video file by number: with its backends, the only place that knows a decoder.

Frame numbers are presentation order. Opening a video reads its packets without decoding them; their
timestamps say which frames exist and where the keyframes are, whatever the header claims. The
wanted frames are then reached by decoding on or by seeking to a keyframe, whichever decodes fewer
frames, and are recognised by their timestamps, so that both ways give the same frames. Where a
seek lands in the wrong place (damaged indices), the file is decoded from its start.

All this is PyAV (FFmpeg), which `python -m bench.data` found no slower on CPUs than torchcodec and
which needs no FFmpeg of the system's: it is what decodes unless another backend is asked for by
name. `iv2.data.torchcodec` and `iv2.data.dali` decode the numbers of the same index.
"""

import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from iv2.data.files import readable
from iv2.data.upright import Matrix, Size, display_matrix, pixels, resize, upright

Backend = Literal["pyav", "torchcodec", "dali"]
Source = str | Path | bytes

# Frames whose decoding costs as much as a seek; where frames are reordered, two more are lost.
_SEEK_COST = 0


class DecodeError(Exception):
    """A video that cannot be read, with where it is and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    num_frames: int  # counted, not what the header claims
    fps: float  # average over the file
    duration: float  # seconds, of the pictures
    width: int  # as displayed, after rotation
    height: int
    rotation: int  # degrees the coded picture is turned counter-clockwise for display
    has_audio: bool


@dataclass(frozen=True)
class Coding:
    """What decides which decoders can read a video."""

    codec: str  # FFmpeg's name, such as h264 or vp9
    pixel_format: str  # FFmpeg's, such as yuv420p
    stamped: bool  # frames can be told by their timestamps
    hidden: int  # frames that are decoded but not shown, after an edit
    matrix: Matrix  # how a picture is turned for display


def probe(source: Source) -> VideoInfo:
    """Read what a video holds; decodes one frame.

    Raises:
        DecodeError: not a readable video.
    """
    with Video(source) as video:
        return video.info()


def decode(
    source: Source, indices: Sequence[int], size: Size = None, *, backend: Backend | None = None
) -> Tensor:  # [T, H, W, 3]
    """Decode frames of a video.

    Args:
        source: Path, or the file's bytes.
        indices: Frame numbers from 0 in presentation order, in any order, with repetitions.
        size: (height, width) to scale to, or the length of the short side (never enlarged), or
            None for the size as displayed.
        backend: What decodes: pyav (None), torchcodec, or dali, which knows few codecs.

    Returns:
        uint8 RGB frames in the order of `indices`.

    Raises:
        DecodeError: not a readable video, or damaged where it was needed, or not for this backend.
        ValueError: a number is not in [0, num_frames), or there is no such backend.
        RuntimeError: the backend is not installed.
    """
    with Video(source, backend=backend) as video:
        return video.frames(indices, size)


class Video:
    """An open video file: the frame index, and frames by number.

    Attributes:
        path: Name in messages.
        times: Presentation time of each frame in seconds, 0 for the first.
        decoded: Number of frames that PyAV decoded so far.
    """

    def __init__(
        self, source: Source, name: str | None = None, *, backend: Backend | None = None
    ) -> None:
        """Open `source` and index its frames.

        Args:
            source: Path, or the file's bytes.
            name: Used in messages for bytes.
            backend: What decodes in `frames`; see `decode`.
        """
        self._backend = checked_backend(backend)
        self.path = name or ("<bytes>" if isinstance(source, bytes) else str(source))
        self.decoded = 0
        self._source = source
        self._container: Any = None
        try:
            self._open()
            self._index()
        except (FFmpegError, OSError) as e:
            self.close()
            raise DecodeError(self.path, _reason(e)) from e
        except DecodeError:
            self.close()
            raise

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def info(self) -> VideoInfo:
        """What the file holds; decodes one frame."""
        frame = self._first
        a, b = display_matrix(frame)[:2]
        height, width = (frame.height, frame.width) if a else (frame.width, frame.height)
        rate = self._stream.average_rate
        gaps = self.times[-1] / max(1, self.num_frames - 1)
        fps = 1 / gaps if gaps > 0 else float(rate or 0)
        return VideoInfo(
            num_frames=self.num_frames,
            fps=fps,
            duration=self.times[-1] + (1 / fps if fps else 0.0),
            width=width,
            height=height,
            rotation=round(math.degrees(math.atan2(-b, a))) % 360,
            has_audio=bool(self._container.streams.audio),
        )

    def frame_range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """Numbers [low, high) of the frames shown in the seconds [start, end)."""
        # Half a millisecond of slack: times in lists are rounded.
        low = 0 if start is None else bisect_left(self.times, start - 5e-4)
        high = self.num_frames if end is None else bisect_left(self.times, end - 5e-4)
        return low, max(low, high)

    def frames(self, indices: Sequence[int], size: Size = None) -> Tensor:  # [T, H, W, 3]
        """Decode frames; see `decode`."""
        wanted = sorted({int(i) for i in indices})
        if not wanted:
            raise ValueError("decode: indices must be at least one frame number, got none")
        if wanted[0] < 0 or wanted[-1] >= self.num_frames:
            bad = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise ValueError(
                f"decode: indices must be in [0, {self.num_frames}) for {self.path}, got {bad}"
            )
        if self._backend != "pyav":
            places = [bisect_left(wanted, int(i)) for i in indices]
            return resize(self._elsewhere(wanted), size)[places]
        try:
            found = self._collect(wanted)
        except FFmpegError as e:
            raise DecodeError(self.path, _reason(e)) from e
        first = found[wanted[0]]
        converter = VideoReformatter()  # shared: setting one up costs more than a small frame
        rows = {i: pixels(frame, size, first, converter) for i, frame in found.items()}
        out = torch.empty((len(indices), *rows[wanted[0]].shape), dtype=torch.uint8)
        view = out.numpy()
        for place, i in enumerate(indices):
            view[place] = rows[int(i)]
        return out

    def stream(
        self, low: int, high: int, size: Size = None
    ) -> Iterator[NDArray[np.uint8]]:  # [H, W, 3]
        """Frames low to high - 1, one after the other, each decoded once.

        Raises:
            DecodeError: Damaged on the way.
        """
        numbers = {self._shown[i]: i for i in range(low, high)}
        due, first, converter = low, None, VideoReformatter()
        try:
            if self._coded:
                place = bisect_right(self._keys, self._shown[low])
                start = self._keys[place - 1] if place else self._coded[0]
                self._container.seek(start, stream=self._stream)
            else:
                self._container.close()
                self._open()
            for count, frame in enumerate(self._container.decode(self._stream)):
                number = numbers.get(frame.pts if self._coded else count)
                if number is None:
                    continue
                if number != due or frame.is_corrupt:
                    break
                first = first or frame
                yield pixels(frame, size, first, converter)
                due += 1
                if due == high:
                    return
        except FFmpegError as e:
            raise DecodeError(self.path, _reason(e)) from e
        raise DecodeError(self.path, f"frame {due} of {self.num_frames} cannot be decoded")

    def _open(self) -> None:
        source: Any = self._source
        if isinstance(source, bytes):
            if not source:
                raise DecodeError(self.path, "empty (0 bytes)")
            source = io.BytesIO(source)
        elif Path(source).is_file() and Path(source).stat().st_size == 0:
            raise DecodeError(self.path, "empty (0 bytes)")
        else:
            source = readable(source)
        self._container = av.open(source, metadata_errors="ignore")
        # an attached picture is the cover art of an audio file
        streams = [
            s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise DecodeError(self.path, "no video stream")
        self._stream = streams[0]
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1

    def _index(self) -> None:
        """Read all packets: which frames there are, and where decoding can start."""
        pts: list[int | None] = []
        keys: list[int | None] = []
        hidden = set()
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
            if packet.is_discard:
                hidden.add(packet.pts)
        self._check_whole(len(pts))
        unit = float(self._stream.time_base or 0)
        known = [p for p in pts if p is not None]
        if not pts:
            raise DecodeError(self.path, "no frames")
        if len(set(known)) < len(pts) or not unit:
            self._count_frames()
            return
        self._coded = sorted(known)  # timestamps of all frames, shown or not
        self._keys = sorted(k for k in keys if k is not None)
        self._shown = [p for p in self._coded if p not in hidden]
        if not self._shown:
            raise DecodeError(self.path, "no frames")
        self.times = [(p - self._shown[0]) * unit for p in self._shown]

    def _check_whole(self, packets: int) -> None:
        """Refuse a file whose own index points behind its end."""
        entries: Any = getattr(self._stream, "index_entries", ())
        if len(entries) and entries[-1].pos + entries[-1].size > self._container.size:
            raise DecodeError(self.path, f"truncated: {packets} of {len(entries)} frames")

    def _count_frames(self) -> None:
        """Index a file whose packets carry no usable timestamps, by decoding it."""
        self._open()
        self._coded, self._keys = [], []
        count = sum(1 for _ in self._container.decode(self._stream))
        if not count:
            raise DecodeError(self.path, "no frames")
        rate = float(self._stream.average_rate or 25)
        self._shown = list(range(count))
        self.times = [i / rate for i in range(count)]

    @cached_property
    def coding(self) -> Coding:
        """What another decoder must cope with; decodes one frame."""
        context = self._stream.codec_context
        return Coding(
            codec=context.codec.canonical_name,
            pixel_format=str(context.pix_fmt),
            stamped=bool(self._coded),
            hidden=len(self._coded) - len(self._shown) if self._coded else 0,
            matrix=display_matrix(self._first),
        )

    def source_bytes(self) -> bytes:
        """The file."""
        if isinstance(self._source, bytes):
            return self._source
        file = readable(self._source)
        with open(file, "rb") if isinstance(file, str) else file as opened:
            return opened.read()

    def _elsewhere(self, wanted: list[int]) -> Tensor:  # [T, H, W, 3]
        """The frames with these sorted numbers, as displayed, from another decoder."""
        if self._backend == "dali":
            from iv2.data import dali

            return torch.from_numpy(
                np.ascontiguousarray(
                    upright(dali.read_frames(self, wanted).numpy(), self.coding.matrix)
                )
            )
        from iv2.data import torchcodec

        if not self._coded:
            raise DecodeError(self.path, "torchcodec needs frames with timestamps")
        unit = float(self._stream.time_base or 0)
        times = [self._shown[i] * unit for i in wanted]
        place = (self.path, self._stream.index)
        frames, turned = torchcodec.read_frames(self._source, place, wanted, times)
        if turned:
            a, b, c, d = self.coding.matrix
            if a * d - b * c < 0:  # torchcodec knows turns alone: turned, but not mirrored
                frames = frames.flip(1 if a else 2)
        return frames

    @cached_property
    def _first(self) -> Any:
        """The first frame, not yet converted."""
        try:
            return self._collect([0])[0]
        except FFmpegError as e:
            raise DecodeError(self.path, _reason(e)) from e

    def _collect(self, wanted: list[int]) -> dict[int, Any]:
        """The frames with these sorted numbers, not yet converted."""
        if not self._coded:
            return self._through(wanted, by_count=True)
        found: dict[int, Any] = {}
        coded = [bisect_left(self._coded, self._shown[i]) for i in wanted]
        keys = [bisect_left(self._coded, k) for k in self._keys]
        delay = getattr(self._stream.codec_context, "has_b_frames", False)
        runs = plan(coded, keys, seek_cost=_SEEK_COST + 2 * bool(delay))
        done = 0
        for start, count in runs:
            part = wanted[done : done + count]
            done += count
            self._container.seek(self._coded[start], stream=self._stream)
            found |= self._take(part)
            if len(found) < done:
                return self._through(wanted)
        return found

    def _through(self, wanted: list[int], by_count: bool = False) -> dict[int, Any]:
        """Decode from the start of the file, afresh."""
        self._container.close()
        self._open()
        found = self._take(wanted, by_count)
        if len(found) < len(wanted):
            missing = next(i for i in wanted if i not in found)
            raise DecodeError(self.path, f"frame {missing} of {self.num_frames} cannot be decoded")
        return found

    def _take(self, wanted: list[int], by_count: bool = False) -> dict[int, Any]:
        """Decode on until the wanted frames have passed; those that came."""
        found: dict[int, Any] = {}
        numbers = {(i if by_count else self._shown[i]): i for i in wanted}
        last = max(numbers)
        for count, frame in enumerate(self._container.decode(self._stream)):
            self.decoded += 1
            stamp = count if by_count else frame.pts
            if stamp in numbers:
                if frame.is_corrupt:
                    raise DecodeError(self.path, f"frame {numbers[stamp]} is damaged")
                found[numbers[stamp]] = frame
            if stamp is not None and stamp >= last:
                break
        return found


def checked_backend(backend: Backend | None) -> Backend:
    """The backend to use, which is installed; None is pyav.

    Raises:
        ValueError: There is none of this name.
        RuntimeError: It is not installed.
    """
    backend = backend or "pyav"
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"decode: backend must be one of {names}, got {backend!r}")
    if backend == "torchcodec":
        from iv2.data import torchcodec

        torchcodec.decoder_class()
    elif backend == "dali":
        from iv2.data import dali

        dali.dynamic_mode()
    return backend


def plan(
    wanted: Sequence[int], keys: Sequence[int], *, seek_cost: int = _SEEK_COST
) -> list[tuple[int, int]]:
    """Choose between decoding on and seeking so that the fewest frames are decoded.

    Args:
        wanted: Sorted frame numbers.
        keys: Sorted numbers of the frames where decoding can start.
        seek_cost: Number of frames whose decoding costs as much as a seek.

    Returns:
        Runs (frame to seek to, how many of the wanted frames to take from there).
    """
    runs: list[tuple[int, int]] = []
    at = -1  # last frame decoded
    for frame in wanted:
        place = bisect_right(keys, frame)
        key = keys[place - 1] if place else 0
        if not runs or key - at - 1 > seek_cost:
            runs.append((key, 1))
        else:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        at = frame
    return runs


def _reason(error: Exception) -> str:
    """FFmpeg's words, without the path that PyAV repeats."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{text[:1].lower()}{text[1:]}"
