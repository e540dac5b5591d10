"""What every test has: two threads, a fixed seed, poisoned memory, each instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from implementation import IMPL

import iv2kernels
from iv2kernels import _C

ISAS = _C.available_isas()

_TESTS = Path(__file__).parent
if IMPL == "triton":
    from tests.triton import interpreter

    interpreter.install()
    # the op's tests, of the ops that have a Triton kernel, and the interpreter's
    _kernels = (Path(iv2kernels.__file__).parent / "triton").glob("*.py")
    _kept = {f"test_{file.name}" for file in _kernels}
    collect_ignore = [
        *(p for p in _TESTS.glob("*/test_*.py") if p.parent.name not in ("ops", "triton")),
        *(p for p in _TESTS.glob("ops/test_*.py") if p.name not in _kept),
        *_TESTS.glob("test_*.py"),
    ]
else:
    collect_ignore = [_TESTS / "triton"]

# `make sanitize` must not pass on a build that checks nothing.
if _expected := os.environ.get("IV2_TEST_BUILD"):
    assert Path(_C.__file__).is_relative_to(Path(_expected).resolve()), _C.__file__

# The same examples in every run: a failure is of the change, not of luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # torch.empty gives NaN: a kernel that reads what nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS if IMPL == "native" else ["triton"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after the other."""
    if IMPL != "native":
        yield request.param
        return
    before = _C.isa()
    iv2kernels.set_isa(request.param)
    yield request.param
    iv2kernels.set_isa(before)
