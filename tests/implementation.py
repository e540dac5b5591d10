"""Which implementation the tests of an op are about, and where.

`pytest` tests the native kernels. `TRITON_INTERPRET=1 pytest` runs the same files on the Triton
kernels, in Triton's interpreter on the CPU, with what tests/triton/interpreter.py adds to it.
`IV2_TEST_GPU=triton pytest tests/ops` runs them on a GPU, with the implementation that it names:
triton, native (csrc/cuda), or a library's by its name in iv2kernels/dispatch.py. What a test makes
there lies on the GPU; what the package makes lies where the package puts it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU_IMPL = os.environ.get("IV2_TEST_GPU")
ON_GPU = GPU_IMPL is not None
DEVICE = "cuda" if ON_GPU else "cpu"
_INTERPRETED = not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"

IMPL = GPU_IMPL or ("triton" if _INTERPRETED else "native")
# The CPU's own kernels: the fast ones, whose tests may be large, and which check values.
ON_CPU = not ON_GPU and not _INTERPRETED

# For tests of threads, of value checks and of sizes that take the interpreter minutes.
native_only = pytest.mark.skipif(not ON_CPU, reason="about the CPU's kernels")
at_real_size = pytest.mark.skipif(_INTERPRETED, reason="takes Triton's interpreter minutes")

_MAKERS = {
    *(torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace),
    *(torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor),
    *(torch.logspace, torch.zeros),
}
_ROOT = Path(__file__).resolve().parent.parent
_OURS = tuple(str(_ROOT / name) + os.sep for name in ("tests", "bench"))


class Placed(TorchFunctionMode):
    """Puts what tests and bench pages make on a device, drawn on the CPU: the same numbers.

    Not what the package makes: there a forgotten ``device=`` must show.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        makes = func in _MAKERS and kwargs.get("device") is None
        if not makes or not sys._getframe(1).f_code.co_filename.startswith(_OURS):
            return func(*args, **kwargs)
        needs = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(needs)

    def outside(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """F without the mode, into which torch.compile could not look."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.__exit__(None, None, None)
            try:
                return f(*args, **kwargs)
            finally:
                self.__enter__()

        return call
