"""InternVideo2: a video encoder, its training stages and its data, over ``iv2kernels``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iv2.checkpoint import load_checkpoint
    from iv2.models.vision import build_encoder

__all__ = ["build_encoder", "load_checkpoint"]

_HOME = {"build_encoder": "iv2.models.vision", "load_checkpoint": "iv2.checkpoint"}


def __getattr__(name: str) -> Any:
    # Lazily, so that `iv2 --help` and data workers do not pay for the models.
    if name not in _HOME:
        raise AttributeError(f"module 'iv2' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
