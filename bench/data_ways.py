"""Ways to read the frames of a video that `bench.data` compares, and worker processes for them.

A way takes a path, on disk or in a tar, and the frame numbers of each view; it scales to a short
side of 224 with one thread. Ways of one view take the first.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from iv2.data import torchcodec
from iv2.data.decode import decode, probe
from iv2.data.files import readable
from iv2.data.upright import by_short_side
from iv2kernels import resized_crop_normalize

SIDE, VIEWS = 224, 2
Numbers = Sequence[Sequence[int]]  # frame numbers of each view
Way = Callable[[str, Numbers], list[Tensor]]  # uint8 [T, H, W, 3] of each view


def decode_all(path: str, indices: Sequence[int], *, whole: bool = False) -> Tensor:  # [T, H, W, 3]
    """Every frame up to the last wanted one, or to the end of the file."""
    wanted, found, converter = set(indices), {}, VideoReformatter()
    with av.open(readable(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                height, width = by_short_side(frame.height, frame.width, SIDE)
                rgb = converter.reformat(frame, width, height, "rgb24", interpolation="AREA")
                found[number] = torch.from_numpy(rgb.to_ndarray())
            if number == max(wanted) and not whole:
                break
    return torch.stack([found[i] for i in indices])


def planned(path: str, indices: Sequence[int]) -> Tensor:  # [T, H, W, 3]
    """As the loader reads."""
    return decode(path, indices, SIDE)


def released(path: str, views: Numbers) -> list[Tensor]:
    """As the released loader: the file is opened and decoded to its end again for each view."""
    return [decode_all(path, indices, whole=True) for indices in views]


def together(path: str, views: Numbers) -> list[Tensor]:
    """All views from one planned decode."""
    frames = planned(path, [i for indices in views for i in indices])
    return list(frames.split([len(indices) for indices in views]))


def _first(reader: Callable[[str, Sequence[int]], Tensor], path: str, views: Numbers) -> Any:
    return [reader(path, views[0])]


def _torchcodec_alone(path: str, indices: Sequence[int], *, mode: str) -> Tensor:  # [T, H, W, 3]
    decoder = torchcodec.decoder_class()(
        readable(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode
    )
    frames = decoder.get_frames_at(list(indices)).data  # [T, H, W, 3]
    height, width = frames.shape[1:3]
    size, box = by_short_side(height, width, SIDE), (0, 0, height, width)
    return resized_crop_normalize(frames.contiguous(), box, size, dtype=torch.uint8)


def ways() -> dict[str, Way]:
    """By name, those that can run here; the base is the first."""
    one = {"decode all": decode_all, "planned": planned}
    try:
        torchcodec.decoder_class()
    except RuntimeError:
        pass
    else:
        one["torchcodec"] = partial(decode, size=SIDE, backend="torchcodec")
        one["torchcodec alone"] = partial(_torchcodec_alone, mode="approximate")
        one["torchcodec alone, exact"] = partial(_torchcodec_alone, mode="exact")
    found: dict[str, Way] = {name: partial(_first, reader) for name, reader in one.items()}
    return found | {"released, 2 views": released, "planned, 2 views": together}


def view_numbers(path: str, count: int) -> Numbers:
    """For each view, `count` evenly spaced frames; the first view's are in the middles."""
    n = probe(path).num_frames
    return [
        [min(n - 1, (4 * i + first) * n // (4 * count)) for i in range(count)] for first in (2, 0)
    ]


def turn(way: Way, numbers: dict[str, Numbers]) -> None:
    """Read all files once."""
    for path, views in numbers.items():
        way(path, views)


# What the workers know when they are forked: a call cannot be sent to them.
_CALLS: dict[str, Callable[[], object]] = {}


def _call(name: str) -> None:
    _CALLS[name]()


class Workers:
    """Processes of one thread, each of which makes every call."""

    def __init__(self, calls: dict[str, Callable[[], object]], count: int) -> None:
        _CALLS.update(calls)
        fork = multiprocessing.get_context("fork")
        self._pools = [ProcessPoolExecutor(1, fork) for _ in range(count)]

    def call(self, name: str) -> None:
        """Until the last of them has done it."""
        for done in [pool.submit(_call, name) for pool in self._pools]:
            done.result()

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
