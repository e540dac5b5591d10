"""Decoded clips in memory, so that small data sets are decoded once."""

import mmap
import multiprocessing
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FrameCache:
    """Decoded frames of short clips, in memory that forked workers share and fill.

    Memory is committed as it is written. A clip that no longer fits is decoded each time. Where
    workers are not forked, each has a cache of its own.
    """

    def __init__(self, num: int, max_bytes: int, max_frames: int = 64) -> None:
        self.max_frames = max_frames
        self._init = (num, max_bytes, max_frames)
        self._size = max_bytes
        self._frames = torch.frombuffer(mmap.mmap(-1, max(1, max_bytes)), dtype=torch.uint8)
        # Per clip: offset + 1 (0: absent, -1: being written), frames, height, width. The last row
        # holds the number of bytes used.
        table = mmap.mmap(-1, (num + 1) * 4 * 8)
        self._table = np.frombuffer(table, dtype=np.int64).reshape(num + 1, 4)
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameCache, self._init

    def get(self, index: int) -> Tensor | None:  # [T, H, W, 3]
        with self._lock:
            place, *shape = (int(x) for x in self._table[index])
        if place <= 0:
            return None
        size = shape[0] * shape[1] * shape[2] * 3
        return self._frames[place - 1 : place - 1 + size].view(*shape, 3)

    def put(self, index: int, frames: Tensor) -> None:
        size = frames.numel()
        with self._lock:
            used = int(self._table[-1, 0])
            if self._table[index, 0] or used + size > self._size:
                return
            self._table[index, 0] = -1
            self._table[-1, 0] = used + size
        self._frames[used : used + size] = frames.flatten()
        with self._lock:
            self._table[index] = (used + 1, *frames.shape[:3])


class SoundCache:
    """Sounds of this process as 16-bit numbers, as many as fit."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._waves: dict[int, Tensor] = {}

    def get(self, index: int) -> Tensor | None:  # int16 [samples]
        return self._waves.get(index)

    def put(self, index: int, wave: Tensor) -> None:
        if 2 * len(wave) <= self._left:
            self._left -= 2 * len(wave)
            self._waves[index] = wave
