"""What Triton's interpreter lacks as a judge of kernels: bfloat16, and a watch on memory.

The interpreter keeps bfloat16 as bit patterns in uint16 and computes with those as integers. Here
arithmetic on bfloat16 runs in float32 and is rounded to nearest even, as on a GPU.

Programs run one after the other, so that a race between them never shows. Here every access is
looked up: it must lie within a tensor that the launch was given, and within one launch no program
may touch what another one has written, nor write what another one has read, but for atomics. Both
are installed once, for the whole process, by ``install``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Builder = interpreter.InterpreterBuilder


def install() -> None:
    """Repair bfloat16 and watch memory, from now on."""
    _patch_language_once()
    _repair_bfloat16()
    _watch_memory()


def _patch_language_once() -> None:
    """Triton patches its language for each launch and each call within: most of a test's time."""
    patch, patched = interpreter._patch_lang, set()

    def _patch_lang(function: Any) -> Any:
        modules = {id(m) for m in function.__globals__.values() if m is tl or m is tl.core}
        if not modules or not modules <= patched:
            patch(function)
            patched.update(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_lang


def _is_bfloat16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _widened(x: Any) -> Any:
    if not isinstance(x, TensorHandle) or not _is_bfloat16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(x: TensorHandle) -> TensorHandle:
    values = np.ascontiguousarray(x.data, np.float32).reshape(np.shape(x.data))
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _repair_bfloat16() -> None:
    def in_float32(name: str) -> None:
        """Run a method of the builder on float32, and round what it gives."""
        method = getattr(Builder, name)

        def run(self: Any, *args: Any) -> TensorHandle:
            if not any(isinstance(a, TensorHandle) and _is_bfloat16(a) for a in args):
                return method(self, *args)
            out = method(self, *map(_widened, args))
            return out if out.data.dtype == np.bool_ else _narrowed(out)

        setattr(Builder, name, run)

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt"):
        in_float32(name)

    dot, cast, fp_to_fp = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if a.dtype.scalar == b.dtype.scalar == c.dtype.scalar == tl.float32:
            return TensorHandle(_fma_chain(a.data, b.data, c.data), tl.float32)
        return dot(self, _widened(a), _widened(b), c, *rest)

    def converted(self: Any, x: TensorHandle, to: Any) -> TensorHandle | None:
        if to.scalar == tl.bfloat16 and not _is_bfloat16(x):
            return _narrowed(x)
        if _is_bfloat16(x) and to.scalar != tl.bfloat16:
            return cast(self, _widened(x), to)
        return None

    def cast_impl(self: Any, x: TensorHandle, to: Any) -> TensorHandle:
        out = converted(self, x, to)
        return cast(self, x, to) if out is None else out

    def create_fp_to_fp(self: Any, x: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        out = converted(self, x, to)
        return fp_to_fp(self, x, to, rounding) if out is None else out

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        _refuse_bfloat16(reduction)


def _fma_chain(
    a: np.ndarray,  # [..., M, K]
    b: np.ndarray,  # [..., K, N]
    c: np.ndarray,  # [..., M, N]
) -> np.ndarray:
    """a @ b + c in float32 as without tensor cores: along K one fused multiply-add after another.

    NumPy's product of the transposed matrices rounds otherwise than its transpose does, and two
    kernels that must agree on a score would not.
    """
    wide_a, wide_b, total = a.astype(np.float64), b.astype(np.float64), c.astype(np.float32)
    for i in range(a.shape[-1]):  # the product is exact in float64
        product = wide_a[..., :, i, None] * wide_b[..., None, i, :]
        total = (product + total).astype(np.float32)
    return total


def _refuse_bfloat16(reduction: Any) -> None:
    reduce = reduction.apply_impl

    def apply_impl(self: Any, inputs: Any) -> Any:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise NotImplementedError("a reduction of bfloat16: convert to float32 first")
        return reduce(self, inputs)

    reduction.apply_impl = apply_impl


class MemoryFault(Exception):
    """An access that no GPU promises to do right."""


@dataclass
class Traffic:
    """Bytes that launches loaded and stored.

    Attributes:
        total: Of every access; a GPU's caches may serve some of them.
        distinct: Of the elements that a launch touched, each counted once to load and to store.
    """

    total: int = 0
    distinct: int = 0


@dataclass
class _Region:
    """A tensor of a launch; by element, 1 + the program that last did this to it, or 0."""

    low: int
    high: int
    size: int
    stored: np.ndarray = field(init=False)
    loaded: np.ndarray = field(init=False)
    added: np.ndarray = field(init=False)  # by an atomic
    shared: np.ndarray = field(init=False)  # loaded by more than one

    def __post_init__(self) -> None:
        count = -(-(self.high - self.low) // self.size)
        self.stored, self.loaded, self.added = (np.zeros(count, np.int32) for _ in range(3))
        self.shared = np.zeros(count, bool)

    def note(self, kind: str, at: np.ndarray, me: int) -> str | None:
        """Note an access to elements, and name what is wrong with it."""

        def others(table: np.ndarray) -> bool:
            return bool(((table[at] != 0) & (table[at] != me)).any())

        if kind == "load":
            if others(self.stored) or others(self.added):
                return "loads what another program of this launch wrote"
            self.shared[at] |= (self.loaded[at] != 0) & (self.loaded[at] != me)
            self.loaded[at] = me
            return None
        if others(self.stored):
            return "writes where another program of this launch wrote"
        if others(self.loaded) or self.shared[at].any():
            return "writes what another program of this launch loaded"
        if kind == "atomic":
            self.added[at] = me
            return None
        if others(self.added):
            return "writes where another program of this launch added"
        if np.unique(at).size != at.size:
            return "stores two lanes to one address"
        self.stored[at] = me
        return None


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
            continue
        value = getattr(value, "base", value) if not hasattr(value, "data_ptr") else value
        if hasattr(value, "data_ptr") and math.prod(value.shape):
            yield value


class _Launch:
    def __init__(self, arguments: list[Any]) -> None:
        spans = []
        for x in _tensors(arguments):
            extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            low = x.data_ptr()
            spans.append((low, low + extent * x.element_size(), x.element_size()))
        merged: list[tuple[int, int, int]] = []
        for low, high, size in sorted(spans):
            if merged and low < merged[-1][1]:  # views of one buffer
                start, end, least = merged.pop()
                merged.append((start, max(end, high), min(least, size)))
            else:
                merged.append((low, high, size))
        self.regions = [_Region(*span) for span in merged]
        self.lows = np.array([r.low for r in self.regions], np.int64)
        self.highs = np.array([r.high for r in self.regions], np.int64)
        self.total = 0

    def access(self, kind: str, grid: Any, pointers: TensorHandle, mask: TensorHandle) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape)
        at = pointers.data[active].astype(np.int64).ravel()
        if not at.size:
            return
        self.total += at.size * width
        program = grid.grid_idx
        where = np.searchsorted(self.lows, at, "right") - 1
        outside = (where < 0) | (at + width > self.highs[where])
        if outside.any():
            first = int(at[np.argmax(outside)])
            nearest = int(self.lows[np.argmin(np.abs(self.lows - first))])
            raise MemoryFault(
                f"program {program} {kind}s out of bounds in {int(outside.sum())} lanes, the first "
                f"at byte {first - nearest} of the nearest tensor"
            )
        x, y, z = program
        me = 1 + x + grid.grid_dim[0] * (y + grid.grid_dim[1] * z)
        for i in np.unique(where):
            region = self.regions[i]
            start = (at[where == i] - region.low) // region.size
            parts = np.arange(-(-width // region.size))
            fault = region.note(kind, (start[:, None] + parts).ravel(), me)
            if fault is not None:
                raise MemoryFault(f"program {program} {fault}")

    def distinct(self) -> int:
        """Bytes touched, once to load and once to store."""
        count = 0
        for r in self.regions:
            written = np.count_nonzero(r.stored) + np.count_nonzero(r.added)
            count += r.size * int(np.count_nonzero(r.loaded) + written)
        return count


_launch = _Launch([])
_watchers: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes of the launches within."""
    moved = Traffic()
    _watchers.append(moved)
    try:
        yield moved
    finally:
        _watchers.remove(moved)


def _watch_memory() -> None:
    executor = interpreter.GridExecutor
    prepare, call = executor._init_args_hst, executor.__call__

    def _init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        global _launch
        prepared = prepare(self, args, kwargs)
        _launch = _Launch([*prepared[0], *prepared[1].values()])
        return prepared

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):  # a GPU gives inf and NaN without a word
            result = call(self, *args, **kwargs)
        for moved in _watchers:
            moved.total += _launch.total
            moved.distinct += _launch.distinct()
        return result

    executor._init_args_hst, executor.__call__ = _init_args_hst, __call__

    def watch(name: str, kind: str, pointers: int, mask: int) -> None:
        method: Callable[..., Any] = getattr(Builder, name)

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            _launch.access(kind, self, args[pointers], args[mask])
            return method(self, *args, **kwargs)

        setattr(Builder, name, run)

    watch("create_masked_load", "load", 0, 1)
    watch("create_masked_store", "store", 0, 2)
    watch("create_atomic_rmw", "atomic", 1, 3)
