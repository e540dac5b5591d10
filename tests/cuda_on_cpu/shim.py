"""Runs kernels of csrc/cuda on the CPU, in the place of iv2kernels._C.

``Kernels`` has the functions of ``_C`` that native modules call, with the arguments of a launch on
a GPU. In the library the kernels work on the tensors themselves; under a sanitizer every call is a
program of its own, on copies of exactly the tensors' sizes.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builds
import torch
from torch import Tensor

ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class Failed(Exception):
    """The engine stopped the kernel, or a sanitizer has a complaint."""


@dataclass
class Counters:
    """See engine.h."""

    read: int
    read_cached: int
    written: int
    bank_conflicts: int
    barriers: int
    matrix_products: int
    shared_bytes: int

    @property
    def moved(self) -> int:
        return self.read + self.read_cached + self.written


class Address(int):
    """The address of a tensor's first element, and the tensor."""

    tensor: Tensor | None = None


def address(x: Tensor | None) -> Address:
    """Takes the place of iv2kernels.native.memory.ptr."""
    result = Address(0 if x is None else x.data_ptr())
    result.tensor = x
    return result


def _field(value: float | None) -> int:
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return 0 if value is None else int(value)


class Kernels:
    def __init__(
        self, kind: str = "plain", order: str = "forward", kernels: str = "kernels"
    ) -> None:
        self.kind, self.order, self.kernels = kind, order, kernels
        self.is_sanitized = kind in ("asan", "tsan")
        library = builds.library("plain" if self.is_sanitized else kind, kernels)
        self._library = ctypes.CDLL(str(library))
        self._library.shim_error.restype = ctypes.c_char_p
        self._library.shim_configure(ORDERS[order], 1, 0)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *fields: self.launch(name, *fields)

    def cuda_row_chunks(self, rows: int) -> int:
        """Of csrc/kernels.h."""
        return int(self._library.cuda_row_chunks(ctypes.c_int64(rows)))

    def launch(self, name: str, *fields: float | None) -> None:
        """A kernel with its struct's fields and the stream, as _C takes them."""
        if self.is_sanitized:
            self._replay(name, fields[:-1])
            return
        words = (ctypes.c_int64 * (len(fields) - 1))(*map(_field, fields[:-1]))
        if self._library.run_kernel(name.encode(), words, ctypes.c_int64(len(words))):
            raise Failed(f"{name}: {self._library.shim_error().decode()}")

    def counted(self, f: Callable[[], Any]) -> Counters:
        """What the kernels that f calls move."""
        values = (ctypes.c_uint64 * 7)()
        self._library.shim_configure(ORDERS[self.order], 1, 1)
        self._library.shim_counters(values)
        f()
        self._library.shim_counters(values)
        self._library.shim_configure(ORDERS[self.order], 1, 0)
        return Counters(*values)

    def _replay(self, name: str, fields: tuple[float | None, ...]) -> None:
        buffers: dict[int, tuple[int, Tensor]] = {}
        words = []
        for field in fields:
            tensor = field.tensor if isinstance(field, Address) else None
            if tensor is None or tensor.numel() == 0:
                words += [0, _field(field)]
            else:
                index, _ = buffers.setdefault(int(field or 0), (len(buffers), _bytes_of(tensor)))
                words += [1, index]
        call = struct.pack("<qq", ORDERS[self.order], len(name)) + name.encode()
        call += struct.pack("<q", len(buffers))
        for start, (_, data) in buffers.items():
            call += struct.pack("<qq", start % 16, data.numel()) + data.numpy().tobytes()
        call += struct.pack(f"<{1 + len(words)}q", len(fields), *words)
        with tempfile.TemporaryDirectory() as folder:
            call_file, result_file = Path(folder) / "call", Path(folder) / "result"
            call_file.write_bytes(call)
            done = subprocess.run(
                [builds.program(self.kind, self.kernels), call_file, result_file],
                capture_output=True,
                text=True,
                check=False,
                env={"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_signal_unsafe=0"},
            )
            if done.returncode != 0:
                raise Failed(f"{name}: {done.stderr}")
            result = torch.frombuffer(bytearray(result_file.read_bytes()), dtype=torch.uint8)
        for _, data in buffers.values():
            data.copy_(result[: data.numel()])
            result = result[data.numel() :]


def _bytes_of(x: Tensor) -> Tensor:
    """The memory from the first element of a strided tensor to its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((extent,), (1,)).view(torch.uint8)
