"""torchcodec as a decoder of `iv2.data.decode`: `backend="torchcodec"`.

It seeks by the average frame rate that the header claims, without reading the file first. Where the
frames that come are not those of the index, by their timestamps, it reads the file and seeks
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from iv2.data.files import readable

if TYPE_CHECKING:
    from iv2.data.decode import Source

# Seconds by which timestamps that are the same may differ in floating point.
_ROUNDING = 1e-6


def decoder_class() -> Any:
    """The class VideoDecoder of torchcodec.

    Raises:
        RuntimeError: It cannot be loaded: it, or FFmpeg's libraries, are not installed.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(
            'decode: backend torchcodec must be installed, with pip install "iv2[video]" and the '
            f"system's FFmpeg libraries (apt-get install ffmpeg), got {_first_line(error)}"
        ) from error
    return VideoDecoder


def read_frames(
    source: Source,
    place: tuple[str, int],
    wanted: Sequence[int],
    times: Sequence[float],
) -> tuple[Tensor, bool]:
    """Decode frames with one thread.

    Args:
        source: The file.
        place: Its name in messages, and the number of the video's stream.
        wanted: Sorted frame numbers.
        times: The timestamp that each must have, in seconds.

    Returns:
        uint8 [T, H, W, 3], turned but not mirrored for display, and whether it may have been.

    Raises:
        DecodeError: No way of seeking gives these frames.
    """
    from iv2.data.decode import DecodeError

    path, stream = place
    reason = ""
    modes: tuple[Literal["approximate", "exact"], ...] = ("approximate", "exact")
    for mode in modes:
        try:
            decoder = decoder_class()(
                source if isinstance(source, bytes) else readable(source),
                stream_index=stream,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                seek_mode=mode,
            )
            batch = decoder.get_frames_at(list(wanted))
        except (IndexError, RuntimeError, ValueError) as error:
            reason = _first_line(error)
            continue
        came = batch.pts_seconds.tolist()
        wrong = [
            number
            for number, time, expected in zip(wanted, came, times, strict=True)
            if abs(time - expected) > _ROUNDING
        ]
        if not wrong:
            return batch.data, decoder.metadata.rotation is not None
        reason = f"another frame comes for frame {wrong[0]}"
    raise DecodeError(path, f"torchcodec: {reason}")


def _first_line(error: Exception) -> str:
    """The message without the place in torchcodec's own source."""
    return (str(error).strip() or repr(error)).splitlines()[0].rsplit(".cpp:", 1)[-1]
