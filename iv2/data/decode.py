"""Frames of a video file by number, through PyAV (FFmpeg): the only place that knows a decoder.

Frame numbers are presentation order. Opening a video reads its packets without decoding them; their
timestamps say which frames exist and where the keyframes are, whatever the header claims. The
wanted frames are then reached by decoding on or by seeking to a keyframe, whichever decodes fewer
frames, and are recognised by their timestamps, so that both ways give the same frames. Where a
seek lands in the wrong place (damaged indices), the file is decoded from its start.
"""

import io
import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from iv2.data.files import readable

Source = str | Path | bytes
# Side(s) of decoded frames: (height, width), or the short side, which never enlarges.
Size = tuple[int, int] | int | None

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


def probe(source: Source) -> VideoInfo:
    """Read what a video holds; decodes one frame.

    Raises:
        DecodeError: not a readable video.
    """
    with Video(source) as video:
        return video.info()


def decode(source: Source, indices: Sequence[int], size: Size = None) -> Tensor:  # [T, H, W, 3]
    """Decode frames of a video.

    Args:
        source: Path, or the file's bytes.
        indices: Frame numbers from 0 in presentation order, in any order, with repetitions.
        size: (height, width) to scale to, or the length of the short side (never enlarged), or
            None for the size as displayed.

    Returns:
        uint8 RGB frames in the order of `indices`.

    Raises:
        DecodeError: not a readable video, or damaged where it was needed.
        ValueError: a number is not in [0, num_frames).
    """
    with Video(source) as video:
        return video.frames(indices, size)


class Video:
    """An open video file: the frame index, and frames by number.

    Attributes:
        path: Name in messages.
        times: Presentation time of each frame in seconds, 0 for the first.
        decoded: Number of frames decoded so far.
    """

    def __init__(self, source: Source, name: str | None = None) -> None:
        """Open `source` and index its frames; `name` is used in messages for bytes."""
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
        (height, width), rotation = self._frame_shape()
        rate = self._stream.average_rate
        gaps = self.times[-1] / max(1, self.num_frames - 1)
        fps = 1 / gaps if gaps > 0 else float(rate or 0)
        return VideoInfo(
            num_frames=self.num_frames,
            fps=fps,
            duration=self.times[-1] + (1 / fps if fps else 0.0),
            width=width,
            height=height,
            rotation=rotation,
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
        try:
            found = self._collect(wanted)
        except FFmpegError as e:
            raise DecodeError(self.path, _reason(e)) from e
        first = found[wanted[0]]
        converter = VideoReformatter()  # shared: setting one up costs more than a small frame
        pixels = {i: _pixels(frame, size, first, converter) for i, frame in found.items()}
        out = torch.empty((len(indices), *pixels[wanted[0]].shape), dtype=torch.uint8)
        view = out.numpy()
        for place, i in enumerate(indices):
            view[place] = pixels[int(i)]
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
                yield _pixels(frame, size, first, converter)
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

    def _frame_shape(self) -> tuple[tuple[int, int], int]:
        try:
            frame = self._collect([0])[0]
        except FFmpegError as e:
            raise DecodeError(self.path, _reason(e)) from e
        matrix = _display_matrix(frame)
        a, b = matrix[:2]
        shape = (frame.height, frame.width) if a else (frame.width, frame.height)
        return shape, round(math.degrees(math.atan2(-b, a))) % 360

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


def _pixels(
    frame: Any, size: Size, first: Any, converter: VideoReformatter
) -> NDArray[np.uint8]:  # [H, W, 3]
    """RGB pixels the right way up; all frames of a file take the size of the first."""
    matrix = _display_matrix(first)
    height, width = first.height, first.width
    if isinstance(size, int):
        scale = min(1.0, size / min(height, width))
        height, width = round(height * scale), round(width * scale)
    elif size is not None:
        height, width = size if matrix[0] or matrix[3] else size[::-1]
    resized = (height, width) != (frame.height, frame.width)
    rgb = converter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation="AREA" if resized else "BILINEAR",
        threads=1,
    )
    return _upright(rgb.to_ndarray(), matrix)


# Display matrices of 0, 90, 180 and 270 degrees counter-clockwise.
_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Signs (a, b, c, d): a coded point (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV does not know the EXIF data of a photo; without the matrix, mirroring is not seen.
        return _TURNS[round(frame.rotation / 90) % 4]
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (1 if a >= 0 else -1), 0, 0, (1 if d >= 0 else -1)
    return 0, (1 if b >= 0 else -1), (1 if c >= 0 else -1), 0


def _upright(picture: NDArray[Any], matrix: tuple[int, int, int, int]) -> NDArray[Any]:
    """Turn and mirror a coded picture [H, W, ...] into the displayed one."""
    a, b, c, d = matrix
    if not a:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::d, ::a]


def _reason(error: Exception) -> str:
    """FFmpeg's words, without the path that PyAV repeats."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{text[:1].lower()}{text[1:]}"
