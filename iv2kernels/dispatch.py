"""Which implementation of an op runs, and why.

An op has ``reference`` (plain PyTorch, autograd differentiates it) and may have ``native`` (csrc),
``triton``, and library calls: ``torch`` (on a GPU its SDPA's FlashAttention), ``cudnn`` and
``flash_attn``. The choice is, in this order: the ``impl=`` argument, ``use(...)``, the environment
variable ``IV2_IMPL``, what ``tune`` found on this machine, and the first row of ``PREFER`` that can
run. A choice made by name never falls back: it raises when it cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["reference", "native", "triton", "torch", "cudnn", "flash_attn"]

_C_ERROR: str | None = None
try:
    from iv2kernels import _C
except ImportError as error:  # a source tree that was not built, or an IV2_ISA this build lacks
    _C_ERROR = f"iv2kernels._C could not be imported ({error}); build it with `pip install -e .`"


class From(NamedTuple):
    """An implementation that is the fastest for tensors of so many rows, x.shape[0], or more."""

    rows: int
    impl: Impl


# The fastest first, by device type; a row enters with the benchmark row that justifies it (bench/).
# All for the CPU are for every instruction set but the scalar one; within "torch" the GEMM follows
# the CPU (iv2kernels/library/linear.py). Those for "cuda" are by static evidence, the bytes that a
# kernel moves and what it compiles to (tests/gates): no GPU has timed them.
PREFER: dict[str, dict[str, tuple[Impl | From, ...]]] = {
    "add_rms_norm": {"cpu": ("native",), "cuda": ("triton", "native")},
    "attention": {
        "cpu": ("native",),
        "cuda": ("triton", "torch", "cudnn", "flash_attn", "native"),
    },
    "spatiotemporal_attention": {"cpu": ("native",), "cuda": ("triton",)},
    # on a GPU eager's GEMM is the vendor's, and adds the bias itself
    "linear": {"cpu": ("torch",)},
    "linear_cross_entropy": {"cpu": ("native",)},
    "mlp": {"cpu": ("native",)},
    "patch_embed": {"cpu": ("native",), "cuda": ("triton", "native")},
    "gather_tokens": {"cpu": ("native",), "cuda": ("triton", "native")},
    "rope3d": {"cpu": ("native",), "cuda": ("triton",)},
    "attention_pool": {"cpu": ("native",)},
    "distill_loss": {"cpu": ("native",), "cuda": ("triton", "native")},
    "contrastive_loss": {"cpu": ("native",), "cuda": ("triton",)},
    # fewer rows, with backward: .80-.97 x eager at 256 and 512, .90-1.03 x at 1024 (AVX2), .92 x
    # (AVX-512); 1.04-1.16 x from 1536 on
    "siglip_loss": {"cpu": (From(1280, "native"),), "cuda": ("triton",)},
    "masks": {"cpu": ("native",), "cuda": ("native",)},
    "hard_negatives": {"cpu": ("native",), "cuda": ("triton",)},
    "resized_crop_normalize": {"cpu": ("native",)},
}

# Op, device type, dtype.
Key = tuple[str, str, torch.dtype]


class Tuned(NamedTuple):
    """What is the fastest for tensors of this size: x.shape[-1], and how many such rows."""

    width: int
    rows: int
    impl: Impl


# What iv2kernels/tuning.py found or read, of rising rows.
TUNED: dict[Key, tuple[Tuned, ...]] = {}

# Native kernels take these; float64 goes to the reference.
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedError(RuntimeError):
    """An implementation asked for by name runs here, but does not take such arguments."""


class _Choice(threading.local):
    impl: Impl | None = None


_choice = _Choice()


def _named(impl: str, where: str) -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f"{where} must be one of {', '.join(get_args(Impl))}, got {impl}")
    return impl  # type: ignore[return-value]


_ENV: Impl | None = (
    _named(os.environ["IV2_IMPL"], "IV2_IMPL") if os.environ.get("IV2_IMPL") else None
)


@contextmanager
def use(impl: Impl | None) -> Iterator[None]:
    """Run every op in this thread with one implementation; ``use(None)`` restores the default.

    Raises:
        ValueError: impl is not the name of an implementation.
    """
    before = _choice.impl
    _choice.impl = None if impl is None else _named(impl, "use: impl")
    try:
        yield
    finally:
        _choice.impl = before


# Those that are not ours: which op's calls are for which device. They share a file for each op.
LIBRARIES: dict[str, dict[str, str]] = {
    "torch": {"linear": "cpu", "attention": "cuda"},
    "cudnn": {"attention": "cuda"},
    "flash_attn": {"attention": "cuda"},
}


def _module(op: str, impl: str) -> str:
    return f"iv2kernels.{'library' if impl in LIBRARIES else impl}.{op}"


def _exists(op: str, impl: str) -> bool:
    if impl in LIBRARIES:
        return op in LIBRARIES[impl]
    return importlib.util.find_spec(_module(op, impl)) is not None


# Which modules this build has, read once: Dynamo can follow a dict, not an import.
_HAS: dict[tuple[str, str], bool] = {
    (op, impl): impl == "reference" or _exists(op, impl) for op in PREFER for impl in get_args(Impl)
}


def _triton_reasons() -> dict[str, str | None]:
    """By device type, the reason why Triton's kernels cannot run there; it is not imported here."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return dict.fromkeys(("cpu", "cuda"), "Triton is not installed: `pip install triton`")
    loaded = sys.modules.get("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and (
        loaded is None or type(loaded.language.sum).__name__ == "InterpretedFunction"
    )
    reason = "on the CPU they need TRITON_INTERPRET=1, set before triton is imported"
    return {
        "cuda": None,
        "cpu": None if interpreted else f"Triton's kernels are for GPUs: {reason}",
    }


# Read once, as `_HAS`.
_NO_TRITON = _triton_reasons()
_SCALAR_ONLY: list[bool] = [_C_ERROR is None and _C.isa() == "scalar"]


# Before iv2kernels.compat may put a package of that name over our ops.
_HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None

# What csrc/cuda must have for an op to be native on a GPU.
_ON_CUDA = {
    "add_rms_norm": ("add_rms_norm_fwd", "add_rms_norm_bwd"),
    "attention": ("attention_fwd", "attention_bwd"),
    "distill_loss": ("distill_loss_fwd", "distill_loss_bwd"),
    "gather_tokens": ("gather_tokens_fwd", "gather_tokens_bwd"),
    "masks": ("masks_draw",),
    "patch_embed": ("patch_embed_gather", "patch_embed_add", "patch_embed_bwd"),
}
_NATIVE_ON_CUDA = {
    op
    for op, kernels in _ON_CUDA.items()
    if _C_ERROR is None and set(kernels) <= set(_C.cuda_kernels())
}
# The dtypes of those that do not take all of NATIVE_DTYPES there.
_CUDA_DTYPES = {"attention": (torch.bfloat16, torch.float16)}


def why_not(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason why an implementation cannot run on such a tensor, or None when it can."""
    if impl == "reference":
        return None
    if not _HAS.get((op, impl), False):
        return f"{op} has no implementation {impl} in this build"
    if impl == "native" and _C_ERROR is not None:
        return _C_ERROR
    if impl in LIBRARIES:
        if LIBRARIES[impl][op] != device:
            return f"{op} calls {impl} for {LIBRARIES[impl][op]} tensors, got {device}"
        if impl == "flash_attn" and not _HAS_FLASH_ATTN:
            return "flash-attn is not installed"
    elif impl == "triton" and device in _NO_TRITON:
        if _NO_TRITON[device] is not None:
            return _NO_TRITON[device]
    elif device != "cpu" and not (impl == "native" and device == "cuda" and op in _NATIVE_ON_CUDA):
        return f"{op} has no {impl} kernel for {device} tensors in this build"
    if dtype not in NATIVE_DTYPES and dtype not in (torch.uint8, torch.int64):
        return f"{impl} {op} takes float32, bfloat16 or float16, got {dtype}"
    if impl == "native" and device == "cuda" and dtype not in _CUDA_DTYPES.get(op, (dtype,)):
        return f"native {op} takes bfloat16 or float16 on a GPU, got {dtype}"
    return None


Refuses = Callable[[str], "str | None"]


def choose(op: str, x: Tensor, impl: Impl | None = None, refuses: Refuses | None = None) -> Impl:
    """The implementation that runs ``op`` on tensors like ``x``.

    Args:
        op: Its row in ``PREFER``.
        x: The tensor that tells device, dtype and size.
        impl: Asked for by name.
        refuses: Gives the reason why an implementation does not take the other arguments, or None.

    Raises:
        ValueError: impl is not the name of an implementation.
        RuntimeError: impl, or the choice of ``use`` or ``IV2_IMPL``, cannot run here.
    """
    asked = impl or _choice.impl or _ENV
    if asked is not None:
        reason = why_not(op, _named(asked, f"{op}: impl"), x.device.type, x.dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: implementation {asked} cannot run: {reason}")
        reason = None if refuses is None else refuses(asked)
        if reason is not None:
            raise UnsupportedError(f"{op}: implementation {asked} cannot run: {reason}")
        return asked
    key = (op, x.device.type, x.dtype)
    if _recorders:
        for calls in _recorders:
            calls.append((key, *_size(x)))
    if TUNED:  # sizes are guards of compiled code: not looked at without need
        found = tuned(key, *_size(x)) if key in TUNED else None
        if found is not None and (refuses is None or refuses(found) is None):
            return found
    return default(*key, x.shape[0] if x.dim() else 1, refuses)


def _size(x: Tensor) -> tuple[int, int]:
    """Its last axis, and how many such rows."""
    return (x.shape[-1], x.shape[:-1].numel()) if x.dim() else (1, 1)


def tuned(key: Key, width: int, rows: int) -> Impl | None:
    """What was the fastest at this width, at the next larger number of rows or the largest."""
    found = None
    for entry in TUNED.get(key, ()):
        if entry.width == width:
            found = entry.impl
            if rows <= entry.rows:
                break
    return found


def default(
    op: str,
    device: str,
    dtype: torch.dtype,
    rows: int | None = None,
    refuses: Refuses | None = None,
) -> Impl:
    """The first row of ``PREFER`` that can run; rows None: for tensors of many rows."""
    for row in PREFER[op].get(device, ()):
        if isinstance(row, From):
            if rows is not None and rows < row.rows:
                continue
            candidate = row.impl
        else:
            candidate = row
        # The scalar build is for correctness; torch's own kernels are faster there.
        if candidate == "native" and device == "cpu" and _SCALAR_ONLY[0]:
            continue
        if why_not(op, candidate, device, dtype) is not None:
            continue
        if refuses is None or refuses(candidate) is None:
            return candidate
    return "reference"


# Key, width and rows.
Call = tuple[Key, int, int]
_recorders: list[list[Call]] = []


@contextmanager
def recording() -> Iterator[list[Call]]:
    """A list that every choice left to dispatch is appended to."""
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders.remove(calls)


def available(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Each implementation of ``op`` with "yes", or the reason why it cannot run.

    Raises:
        ValueError: there is no such op.
    """
    if op not in PREFER:
        raise ValueError(f"available: op must be one of {', '.join(PREFER)}, got {op}")
    return {name: why_not(op, name, device, dtype) or "yes" for name in get_args(Impl)}


def set_isa(name: str) -> None:
    """Switch the CPU kernels to another instruction set of this build (for tests and bench)."""
    _C.set_isa(name)
    _SCALAR_ONLY[0] = False  # a set chosen by name is used, also the scalar one


_LIBRARY = torch.library.Library("iv2kernels", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``<op>_fwd`` or ``<op>_bwd`` with torch.library and return it.

    The last argument of the schema is ``str impl``: the registered function calls the function of
    the same name in ``iv2kernels/<impl>/<op>.py`` with the arguments before it.
    """
    name = schema.split("(")[0]
    op = name.rsplit("_", 1)[0]

    def run(*args: Any) -> Any:
        module = importlib.import_module(_module(op, args[-1]))
        function = getattr(module, name)
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda:
            return function(*args[:-1])
        # kernels are launched on the current device, whatever tensors they get
        with torch.cuda.device(first.device):
            return function(*args[:-1])

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iv2kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.iv2kernels, name).default  # type: ignore[no-any-return]


class Function(torch.autograd.Function):
    """A ``torch.autograd.Function`` whose signature is read once.

    With a ``setup_context``, ``apply`` asks ``inspect.signature(forward)`` at every call, a third
    of what a small op costs.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
