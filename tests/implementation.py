"""Which implementation the tests of an op are about.

`pytest` tests the native kernels. `TRITON_INTERPRET=1 pytest` runs the same files on the Triton
kernels, in Triton's interpreter on the CPU, with what tests/triton/interpreter.py adds to it.
"""

from __future__ import annotations

import os

import pytest

IMPL = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "native"

# For tests of threads, of value checks and of sizes that take the interpreter minutes.
native_only = pytest.mark.skipif(IMPL != "native", reason="about the CPU's kernels")
