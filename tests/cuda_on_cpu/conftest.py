"""Native modules on the kernels of csrc/cuda, run on the CPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import SimpleNamespace

import builds
import pytest
import torch
from implementation import ON_CPU
from shim import ORDERS, Kernels, address

from iv2kernels import native

MODULES = [
    importlib.import_module(f"iv2kernels.native.{module.name}")
    for module in pkgutil.iter_modules(native.__path__)
]

# a list here takes the place of the one in tests/conftest.py
_CAN_RUN = builds.COMPILER and ON_CPU
collect_ignore = [] if _CAN_RUN else [p.name for p in builds.HERE.glob("test_*.py")]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernels], Kernels]:
    """Makes native modules call kernels on the shim instead of iv2kernels._C."""

    def use(kernels: Kernels) -> Kernels:
        replaced = {"_C": kernels, "ptr": address, "on_cuda": lambda x: True}
        for module in MODULES:
            for name, value in replaced.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        stream = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        return kernels

    return use


@pytest.fixture(params=ORDERS)
def on_cpu(request: pytest.FixtureRequest, use: Callable[[Kernels], Kernels]) -> Kernels:
    """The kernels, with the threads of a block in each order."""
    return use(Kernels(order=request.param))
