"""`tune(step)`: measure the implementations of each op inside a step of yours, and keep the best.

``PREFER`` (iv2kernels/dispatch.py) was measured on the machines of ``bench/results``. Another
machine, or shapes far from the model's, may rank them otherwise.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl, Key
from iv2kernels.timing import interleaved, median_ratio

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

    The ops that ``step`` calls are found by running it. For one op after the other, the step is
    timed with each implementation that can run, in turn, and the fastest is taken if the whole step
    gains 1 % or more; later ops are timed with the choices made before. From then on, in this
    process and, when stored, in later ones on the same machine with as many threads, dispatch takes
    these choices on tensors of the same dtype. ``impl=``, ``use`` and ``IV2_IMPL`` still come
    first, and ``IV2_TUNED=0`` ignores what is stored.

    Args:
        step: What you want fast, at your shapes: a training step, an embedding. It is called some
            dozens of times. Code compiled by ``torch.compile`` keeps the choices it was traced
            with: tune the step before compiling it.
        ops: Ops to choose for; None: all that the step calls.
        seconds: Time for each op.
        store: Keep the choices on disk (``path()``); False: for this process only.

    Returns:
        By op (with device and dtype) and implementation, how many times faster the step is than
        with the default.

    Raises:
        ValueError: An op of that name does not exist, or the step calls none.
    """
    for op in ops or ():
        if op not in dispatch.PREFER:
            known = ", ".join(dispatch.PREFER)
            raise ValueError(f"tune: op must be one of {known}, got {op}")
    with dispatch.recording() as calls:
        step()
    keys = [key for key in dict.fromkeys(calls) if ops is None or key[0] in ops]
    if not keys:
        raise ValueError("tune: step must call at least one op, got none")
    results = {_name(key): _best(step, key, seconds) for key in keys}
    if store:
        _write(dispatch.TUNED)
    return results


def path() -> Path:
    """Where choices are stored: ``$XDG_CACHE_HOME`` or ``~/.cache``, iv2kernels/tuned.json."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "iv2kernels" / "tuned.json"


def forget() -> None:
    """Drop the choices of this process and those stored for this machine."""
    dispatch.TUNED.clear()
    _write({})


def load() -> None:
    """Take the choices stored for this machine, if any; a file that cannot be read counts as none.

    Called when the package is imported.
    """
    if os.environ.get("IV2_TUNED") == "0":
        return
    choices = _read().get(_machine(), {})
    for op in dispatch.PREFER:
        for dtype in (*dispatch.NATIVE_DTYPES, torch.float64, torch.int64, torch.uint8):
            key = (op, "cpu", dtype)
            impl = choices.get(_name(key))
            if impl is not None and dispatch.why_not(op, impl, "cpu", dtype) is None:
                dispatch.TUNED[key] = impl


def _best(step: Callable[[], Any], key: Key, seconds: float) -> dict[str, float]:
    """Try the implementations of one op; the best is left in ``TUNED``."""
    known = dispatch.available(*key)
    names = [name for name in get_args(Impl) if known[name] == "yes"]
    before = dispatch.TUNED.get(key) or dispatch.default(*key)

    def stepping(name: Impl) -> Callable[[], None]:
        def call() -> None:
            dispatch.TUNED[key] = name
            step()

        return call

    chosen = before
    try:
        times = interleaved({n: stepping(n) for n in names}, seconds, min_rounds=3)
        gains = {n: median_ratio(times[before], times[n]) for n in names}
        fastest = max(names, key=lambda name: gains[name])
        if gains[fastest] >= _LEAST_GAIN:
            chosen = fastest
    finally:
        dispatch.TUNED[key] = chosen
    return gains


def _name(key: Key) -> str:
    op, device, dtype = key
    return f"{op} {device} {str(dtype).removeprefix('torch.')}"


def _machine() -> str:
    """What a choice holds for."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    isa = "no kernels" if dispatch._C_ERROR is not None else _isa()
    return f"{cpu}, {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _isa() -> str:
    from iv2kernels import _C

    return _C.isa()


def _read() -> dict[str, dict[str, Impl]]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(choices: dict[Key, Impl]) -> None:
    every = _read() | {_machine(): {_name(key): impl for key, impl in choices.items()}}
    where = path()
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_suffix(".tmp")
    partial.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    partial.replace(where)
