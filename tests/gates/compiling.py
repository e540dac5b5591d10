"""The kernels that an op launches, compiled for a GPU that is not there.

Within ``compiling`` a Triton kernel is not launched but compiled, by Triton's own launch path with
the very arguments of the launch: dtypes, alignment, constants, warps and stages are those that a
user's GPU would get, and there is no second list of them to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.cases import Call, Case, cases
from iv2kernels import dispatch

ARCHS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bfloat16", "float32")
# Here all kernels have budgets; elsewhere those of what training runs in, in half the time.
FULL = "sm_90"
# Shapes beyond those of the bench page, by op; and which of them are compiled elsewhere, too.
EXTRA: dict[str, list[tuple[Any, ...]]] = {
    "attention": [(1, 129, 2, head_dim) for head_dim in (80, 96, 128, 200)],
}
EXTRA_ELSEWHERE = {"attention": [(1, 129, 2, 128)]}


@dataclass(frozen=True)
class Launch:
    """A compiled kernel, by a name that tells its constants."""

    name: str
    compiled: Any


class _Gpu:
    """What Triton asks a driver before it launches."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return ARCHS[self.arch]

    def get_current_device(self) -> int:
        return list(ARCHS).index(self.arch)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: str) -> Iterator[list[Launch]]:
    """Compile what is launched within, for one of ``ARCHS``; the list has each kernel once."""
    found: dict[str, Launch] = {}
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, **options: Any) -> None:
        kernel = run(self, *args, **{**options, "warmup": True})
        constants = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper())
        name = self.__name__.strip("_").removesuffix("_kernel")
        found[kernel.hash] = Launch(f"{name} {constants}".strip(), kernel)

    driver.set_active(_Gpu(arch))
    try:
        with mock.patch.object(JITFunction, "run", compiled):
            launches: list[Launch] = []
            yield launches
            launches.extend(found.values())
    finally:
        driver._active = None


def dtypes_of(arch: str) -> tuple[str, ...]:
    """Those whose kernels have budgets on an architecture."""
    return DTYPES if arch == FULL else DTYPES[:1]


def launches(arch: str, ops: Sequence[str], dtypes: Sequence[str]) -> Iterator[Launch]:
    """What the ops launch at the shapes of their bench pages, forward and backward, each once."""
    seen: dict[str, list[str]] = {}  # by op too: ops share kernels, and are compiled in any order
    with mock.patch.object(dispatch, "why_not", return_value=None):
        more = EXTRA if arch == FULL else EXTRA_ELSEWHERE
        extra = [Case(o, shape, d) for o in ops for shape in more.get(o, ()) for d in dtypes]
        for case in [*cases(ops, dtypes), *extra]:
            call = Call(
                lambda case=case, **i: case.call(**i, impl="triton"), case.inputs(), case.wrt
            )
            with compiling(arch) as some:
                call.both()
            for launch in some:
                name, compiled = f"{case.op}: {launch.name} {case.dtype}", launch.compiled
                hashes = seen.setdefault(name, [])
                if compiled.hash in hashes:
                    continue
                hashes.append(compiled.hash)
                # the same constants, but another argument is None or lies elsewhere
                yield Launch(name if len(hashes) == 1 else f"{name} #{len(hashes)}", compiled)
