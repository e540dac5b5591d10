"""The cases of the bench under pytest-benchmark: `pytest bench`, `pytest bench -k attention`."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Case, candidates, cases
from iv2kernels import _C

CASES = list(cases((), ("float32", "bfloat16")))


@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_op(benchmark: Any, case: Case, part: str) -> None:
    isa = _C.available_isas()[-1]
    calls = candidates(case, [isa], compiled=False)
    call = calls.get(f"native {isa}", calls.get("torch", calls["eager"]))
    if part == "both" and not call.has_backward:
        pytest.skip("has no backward pass")
    benchmark.group = case.name
    benchmark(call.forward if part == "forward" else call.both)
