"""What `iv2 info` shows: this machine, this build, and which implementation each op would use."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from iv2kernels import dispatch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _native() -> dict[str, Any]:
    if dispatch._C_ERROR is not None:
        return {"built": False, "reason": dispatch._C_ERROR}
    from iv2kernels import _C

    return {
        "built": True,
        "isa": _C.isa(),
        "isa_available": _C.available_isas(),
        "isa_built": _C.built_isas(),
        **_C.build_info(),
    }


def _ops() -> dict[str, dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = {}
    for op in dispatch.PREFER:
        # masks take int64 seeds, the resize uint8 frames; the rest is floating point
        dtype = {"masks": torch.int64, "resized_crop_normalize": torch.uint8}.get(op, torch.float32)
        x = torch.empty(0, dtype=dtype, device=device)
        tuned = dispatch.TUNED.get((op, device, dtype), ())
        table[op] = {
            "uses": dispatch.choose(op, x),
            # where tune() found another than that, at some size
            "tuned": sorted({row.impl for row in tuned}),
            "implementations": dispatch.available(op, device, dtype),
        }
    return table


def gather() -> dict[str, Any]:
    """Everything the command shows, as JSON types."""
    packages = ("iv2", "torch", "numpy", "av", "safetensors", "triton", "nvidia-dali-cuda130")
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "platform": f"{sys.platform} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "native": _native(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_cuda": torch.version.cuda,
        "decoders": {
            name: _found(module)
            for name, module in (
                ("pyav", "av"),
                ("torchcodec", "torchcodec"),
                ("dali", "nvidia.dali"),
            )
        },
        "ops": _ops(),
    }


def as_json() -> str:
    """The page as JSON."""
    return json.dumps(gather(), indent=2)


def as_text() -> str:
    """The page as aligned text."""
    page = gather()
    native = page["native"]
    lines = [f"{name:20s} {value or '-'}" for name, value in page["versions"].items()]
    lines.append(f"{'platform':20s} {page['platform']}, {page['threads']} threads")
    if native["built"]:
        sets = ", ".join(native["isa_available"])
        lines.append(f"{'cpu kernels':20s} {native['isa']} (this machine runs {sets})")
        lines.append(f"{'cuda kernels':20s} {'built' if native['cuda'] else 'not built'}")
    else:
        lines.append(f"{'cpu kernels':20s} not built: {native['reason']}")
    lines.append(f"{'gpu':20s} {page['gpu'] or '-'}")
    found = [name for name, there in page["decoders"].items() if there]
    lines.append(f"{'decoders':20s} {', '.join(found)}")
    lines.append("")
    for op, row in page["ops"].items():
        known = dispatch.LIBRARIES
        reasons = [
            f"{name}: {why}"
            for name, why in row["implementations"].items()
            if why != "yes" and op in known.get(name, (op,))
        ]
        tuned = f", tuned: {' '.join(row['tuned'])}" if row["tuned"] else ""
        uses = f"{row['uses']}{tuned}"
        lines.append(f"{op:26s} {uses:18s} {'; '.join(reasons)}")
    return "\n".join(lines)
