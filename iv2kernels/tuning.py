"""`tune(step)`: measure the implementations of each op inside a step of yours, and keep the best.

``PREFER`` (iv2kernels/dispatch.py) was measured on the machines of ``bench/results``. Another
machine, or shapes far from the model's, may rank them otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from iv2kernels import dispatch, tiles
from iv2kernels.dispatch import Call, Impl, Tuned
from iv2kernels.tiles import Knob, Sizes
from iv2kernels.timing import Clock, CudaClock, interleaved, median_ratio, wall

# What another implementation must gain on the whole step before it replaces the default.
_LEAST_GAIN = 1.01


def tune(
    step: Callable[[], Any],
    *,
    ops: Sequence[str] | None = None,
    seconds: float = 2.0,
    store: bool = True,
) -> dict[str, dict[str, float]]:
    """Choose the implementation of each op by timing your own code with each.

    The ops that ``step`` calls, and the sizes of their tensors, are found by running it. For one
    after the other, the step is timed with each implementation that can run, in turn, and the
    fastest is taken if the whole step gains 1 % or more; later ones are timed with the choices made
    before. On a GPU the tiles of Triton's kernels follow, a few for each. From then on, in this
    process and, when stored, in later ones on the same machine (GPU, or CPU with as many threads)
    with the same versions, dispatch takes these choices on tensors of the same dtype and width;
    between two sizes that of the larger counts. ``impl=``, ``use`` and ``IV2_IMPL`` still come
    first, and ``IV2_TUNED=0`` ignores what is stored.

    Args:
        step: What you want fast, at your shapes: a training step, an embedding. It is called some
            dozens of times. Code compiled by ``torch.compile`` keeps the choices it was traced
            with: tune the step before compiling it.
        ops: Ops to choose for; None: all that the step calls.
        seconds: Time for each op and size.
        store: Keep the choices on disk (``path()``); False: for this process only.

    Returns:
        By op (with device, dtype and size) and implementation, how many times faster the step is
        than with the default; an implementation that failed is not listed.

    Raises:
        ValueError: An op of that name does not exist, or the step calls none.
    """
    for op in ops or ():
        if op not in dispatch.PREFER:
            known = ", ".join(dispatch.PREFER)
            raise ValueError(f"tune: op must be one of {known}, got {op}")
    with dispatch.recording() as seen:
        step()
    calls = [call for call in dict.fromkeys(seen) if ops is None or call[0][0] in ops]
    if not calls:
        raise ValueError("tune: step must call at least one op, got none")
    results = {_name(call): _best(step, call, seconds) for call in calls}
    devices = {call[0][1] for call in calls}
    for device in devices - {"cpu"}:
        with tiles.recording() as knobs:
            step()
        for knob, sizes in knobs.items():
            if len(sizes) > 1:
                results[_tile_name(knob)] = _best_tile(step, knob, sizes, device, seconds)
    if store:
        _write(devices)
    return results


def path() -> Path:
    """Where choices are stored: ``$XDG_CACHE_HOME`` or ``~/.cache``, iv2kernels/tuned.json."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "iv2kernels" / "tuned.json"


def forget() -> None:
    """Drop the choices of this process and those stored for this machine."""
    dispatch.TUNED.clear()
    tiles.CHOSEN.clear()
    _write(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))


def load() -> None:
    """Take the choices stored for this machine, if any; a file that cannot be read counts as none.

    Called when the package is imported. Those for a GPU are taken when CUDA is first used: asking
    for the GPU's name would start it.
    """
    if os.environ.get("IV2_TUNED") == "0" or not _read():
        return
    _take("cpu")
    torch.cuda._lazy_call(partial(_take, "cuda"))


def _take(device: str) -> None:
    for name, impl in _read().get(_machine(device), {}).items():
        if isinstance(impl, list):
            _take_tile(name, impl)
            continue
        call = _call(name)
        if call is None or call[0][1] != device or impl not in get_args(Impl):
            continue
        (op, _, dtype), *_ = call
        if op in dispatch.PREFER and dispatch.why_not(op, impl, device, dtype) is None:
            _put(call, impl)


def _put(call: Call, impl: Impl) -> None:
    key, width, rows = call
    known = dispatch.TUNED.get(key, ())
    others = [row for row in known if (row.width, row.rows) != (width, rows)]
    found = sorted([*others, Tuned(width, rows, impl)], key=lambda row: row.rows)
    dispatch.TUNED[key] = tuple(found)


def _best(step: Callable[[], Any], call: Call, seconds: float) -> dict[str, float]:
    """Try the implementations of one op; the best is left in ``TUNED``."""
    key, _, rows = call
    known = dispatch.available(*key)
    settings = {name: partial(_put, call, name) for name in get_args(Impl) if known[name] == "yes"}
    before = dispatch.tuned(*call) or dispatch.default(*key, rows)
    return _fastest(step, settings, before, key[1], seconds)


def _best_tile(
    step: Callable[[], Any], knob: Knob, sizes: list[Sizes], device: str, seconds: float
) -> dict[str, float]:
    """Try the tiles of one kernel; the best is left in ``CHOSEN``."""
    settings = {
        "x".join(map(str, tile)): partial(tiles.CHOSEN.__setitem__, knob, tile) for tile in sizes
    }
    before = "x".join(map(str, tiles.CHOSEN.get(knob, sizes[0])))
    return _fastest(step, settings, before, device, seconds)


def _fastest(
    step: Callable[[], Any],
    settings: Mapping[str, Callable[[], None]],
    before: str,
    device: str,
    seconds: float,
) -> dict[str, float]:
    """How many times faster the step is than before with each setting; the fastest is left set."""

    def stepping(name: str) -> Callable[[], None]:
        def run() -> None:
            settings[name]()
            step()

        return run

    def runs(name: str) -> bool:
        # a library has no kernel for every GPU, and a GPU no room for every tile
        try:
            stepping(name)()
        except _failures():
            return False
        return True

    chosen = before
    try:
        names = list(settings)
        if device != "cpu":
            names = [name for name in names if name == before or runs(name)]
        steps = {name: stepping(name) for name in names}
        times = interleaved(steps, seconds, 3, _clock(device))
        gains = {name: median_ratio(times[before], times[name]) for name in names}
        fastest = max(names, key=lambda name: gains[name])
        if gains[fastest] >= _LEAST_GAIN:
            chosen = fastest
    finally:
        settings[chosen]()
    return gains


def _failures() -> tuple[type[Exception], ...]:
    triton = sys.modules.get("triton")
    return (RuntimeError,) if triton is None else (RuntimeError, triton.TritonError)


def _clock(device: str) -> Clock:
    return wall if device == "cpu" else CudaClock()


def _name(call: Call) -> str:
    (op, device, dtype), width, rows = call
    return f"{op} {device} {str(dtype).removeprefix('torch.')} {rows}x{width}"


def _call(name: str) -> Call | None:
    """The reverse of ``_name``; None for what is no such name."""
    found = re.fullmatch(r"(\w+) (\w+) (\w+) (\d+)x(\d+)", name)
    dtype = getattr(torch, found[3], None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        return None
    return (found[1], found[2], dtype), int(found[5]), int(found[4])


def _tile_name(knob: Knob) -> str:
    return f"tile {knob.kernel} {knob.width} {str(knob.dtype).removeprefix('torch.')}"


def _take_tile(name: str, sizes: list[Any]) -> None:
    found = re.fullmatch(r"tile (\w+) (\d+) (\w+)", name)
    dtype = getattr(torch, found[3], None) if found else None
    if found and isinstance(dtype, torch.dtype) and all(type(size) is int for size in sizes):
        tiles.CHOSEN[Knob(found[1], int(found[2]), dtype)] = tuple(sizes)


def _machine(device: str = "cpu") -> str:
    """What a choice holds for."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "iv2"))
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, {versions}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    isa = "no kernels" if dispatch._C_ERROR is not None else _isa()
    return f"{cpu}, {isa}, {torch.get_num_threads()} threads, {versions}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _isa() -> str:
    from iv2kernels import _C

    return _C.isa()


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(devices: Iterable[str]) -> None:
    """Store what ``TUNED`` has for these."""
    every = _read()
    for device in devices:
        every[_machine(device)] = {
            _name((key, row.width, row.rows)): row.impl
            for key, rows in dispatch.TUNED.items()
            for row in rows
            if key[1] == device
        }
        if device != "cpu":
            every[_machine(device)] |= {
                _tile_name(knob): list(tile) for knob, tile in tiles.CHOSEN.items()
            }
    where = path()
    where.parent.mkdir(parents=True, exist_ok=True)
    partial_file = where.with_suffix(".tmp")
    partial_file.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    partial_file.replace(where)
