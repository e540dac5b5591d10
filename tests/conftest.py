"""What every test has: two threads, a fixed seed, poisoned memory, each instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import iv2kernels
from iv2kernels import _C

ISAS = _C.available_isas()

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


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after the other."""
    before = _C.isa()
    iv2kernels.set_isa(request.param)
    yield request.param
    iv2kernels.set_isa(before)
