"""What every test has: two threads, a fixed seed, poisoned memory, each instruction set."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import settings
from implementation import IMPL, ON_CPU, ON_GPU, Placed

import iv2kernels
from iv2kernels import _C, dispatch

ISAS = _C.available_isas()

_TESTS = Path(__file__).parent
_HAS_GPU = torch.cuda.is_available()


def _is_about(page: str) -> bool:
    """Whether the ops' tests in a file are about something that this implementation has."""
    op = page.removeprefix("test_")
    if not ON_GPU:
        return dispatch._exists(op, IMPL)
    op = "attention" if op == "attention_blocks" else op
    return op in dispatch.PREFER and dispatch.why_not(op, IMPL, "cuda", torch.bfloat16) is None


collect_ignore = [_TESTS / "triton"]
if not ON_CPU:
    # the op's tests, of the ops that have such a kernel, and the interpreter's
    _folders = ("ops",) if ON_GPU else ("ops", "triton")
    collect_ignore = [
        *(p for p in _TESTS.glob("*/test_*.py") if p.parent.name not in _folders),
        *(p for p in _TESTS.glob("ops/test_*.py") if not _is_about(p.stem)),
        *_TESTS.glob("test_*.py"),
    ]
if _HAS_GPU:
    # what cuBLAS asks for where results must be the same again, before it is loaded
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if ON_GPU:
    assert IMPL in get_args(iv2kernels.Impl), f"IV2_TEST_GPU={IMPL} names no implementation"
    if _HAS_GPU:
        _mode, _compile = Placed("cuda"), torch.compile
        _mode.__enter__()
        torch.compile = lambda f, **options: _mode.outside(_compile(f, **options))
elif not ON_CPU:
    from tests.triton import interpreter

    interpreter.install()

# `make sanitize` must not pass on a build that checks nothing.
if _expected := os.environ.get("IV2_TEST_BUILD"):
    assert Path(_C.__file__).is_relative_to(Path(_expected).resolve()), _C.__file__

# The same examples in every run: a failure is of the change, not of luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU:
            item.add_marker("gpu")
            if "_errors" in item.name:
                item.add_marker(pytest.mark.skip(reason="about checks before any kernel"))
        if not _HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """What an implementation says it does not take is no failure of it, but for a test of that."""
    try:
        return (yield)
    except dispatch.UnsupportedError as error:
        if item.get_closest_marker("gpu") is None:
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _steady(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # torch.empty gives NaN: a kernel that reads what nobody wrote is seen
    on_gpu = request.node.get_closest_marker("gpu") is not None
    # there not all that the definitions call is
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS if ON_CPU else [IMPL])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after the other."""
    if not ON_CPU:
        yield request.param
        return
    before = _C.isa()
    iv2kernels.set_isa(request.param)
    yield request.param
    iv2kernels.set_isa(before)
