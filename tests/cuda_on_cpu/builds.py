"""Builds the kernels with the C++ compiler: a library for tests, programs for the sanitizers.

Objects are kept in build/cuda_on_cpu under a name made of their content: the source, every header,
the flags and the compiler. The engine is compiled without sanitizers, which it drives itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"

COMPILER = next((c for c in map(shutil.which, ("g++", "c++")) if c), None)
# Those of csrc/cuda that have kernels.
CUDA_FILES = [p for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if p.stem != "device"]
# Sets of kernels, each with its run_kernel.
SOURCES = {
    "kernels": [HERE / "registry.cpp", *CUDA_FILES],
    "faults": [HERE / "faults.cu"],
    "primitives": [HERE / "primitives.cu"],
}
ENGINE = [
    HERE / name for name in ("engine.cpp", "fiber.cpp", "warp.cpp", "traffic.cpp", "control.cpp")
]

# nvcc fuses multiply-adds where it likes: here none are, so that results do not depend on the
# machine's instruction set.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
COMMON = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *WARNINGS, f"-I{HERE}"]
# Of the kernels' objects, and of the engine's. Sanitized kernels are not optimised: that would drop
# reads whose value nobody needs, and take several times longer to compile.
FLAGS = {
    "plain": (["-O1"], ["-O2"]),
    "asan": (
        ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-O1", "-g1", "-DSHIM_ASAN"],
    ),
    "tsan": (["-O0", "-g1", "-fsanitize=thread"], ["-O1", "-g1", "-DSHIM_TSAN"]),
    "ucontext": (["-O1"], ["-O2", "-DSHIM_UCONTEXT"]),
}


@functools.cache
def _common_content() -> bytes:
    headers = [
        ROOT / "csrc" / "kernels.h",
        *HERE.glob("*.h"),
        *(ROOT / "csrc" / "cuda").glob("*.cuh"),
    ]
    digest = hashlib.sha256(_run(COMPILER or "", "--version").encode())
    for header in sorted(headers):
        digest.update(header.read_bytes())
    return digest.digest()


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def _made(name: str, content: bytes, flags: list[str], command: list[str | Path]) -> Path:
    """The cached file of that content, made by the command, whose last argument is its path."""
    digest = hashlib.sha256(content + _common_content() + "\0".join(flags).encode()).hexdigest()[
        :20
    ]
    target = CACHE / f"{digest}-{name}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        _run(*command, part)
        part.replace(target)
    return target


def _object(source: Path, flags: list[str]) -> Path:
    command = [COMPILER or "", *flags, "-x", "c++", "-c", source, "-o"]
    return _made(f"{source.stem}.o", source.read_bytes(), flags, command)


def _objects(kind: str, sources: list[Path]) -> list[Path]:
    ours, engines = FLAGS[kind]
    return [
        *(_object(source, [*COMMON, *ours]) for source in sources),
        *(_object(source, [*COMMON, *engines]) for source in ENGINE),
    ]


def _linked(name: str, objects: list[Path], flags: list[str]) -> Path:
    content = "\0".join(o.name for o in objects).encode()
    return _made(name, content, flags, [COMPILER or "", *flags, *objects, "-o"])


@functools.cache
def library(kind: str, kernels: str = "kernels") -> Path:
    """A shared library with run_kernel of a set of SOURCES."""
    return _linked(f"{kernels}-{kind}.so", _objects(kind, SOURCES[kernels]), ["-shared"])


@functools.cache
def program(kind: str, kernels: str = "kernels") -> Path:
    """The replay program of a set under a sanitizer, "asan" or "tsan"."""
    sanitizer = [flag for flag in FLAGS[kind][0] if flag.startswith("-fsanitize")]
    objects = _objects(kind, [HERE / "replay.cpp", *SOURCES[kernels]])
    return _linked(f"{kernels}-{kind}", objects, sanitizer)
