"""What runs on a GPU, op by op, at small sizes: for tests/gpu and for a sanitizer.

`python -m tests.gpu.kernels IMPL` runs each once, forward and backward.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch

from bench.cases import Call, Case, stem
from iv2kernels import dispatch

SMALL: dict[str, tuple[Any, ...]] = {
    "add_rms_norm": (2, 17, 384),
    "attention": (2, 93, 2, 88),
    "attention_blocks": (1, None, 1, 64),
    "attention_pool": (2, 17, 384, 16),
    "contrastive_loss": (130, 64),
    "distill_loss": (2, 17, 20, 384),
    "gather_tokens": (2, 2, 40, 17, 96),
    "hard_negatives": (130, 64),
    "linear": (70, 96, 200),
    "linear_cross_entropy": (70, 64, 400),
    "masks": (3, 2, 131, 17),
    "mlp": (52, 96, 384),
    "patch_embed": (2, 2, 28, 14, 64, 6),
    "rope3d": (2, 2, 3, 3, 7, 2, 16),
    "siglip_loss": (130, 64),
    "spatiotemporal_attention": (2, 93, 2, 88),
}


def case_of(op: str, device: str = "cuda") -> Case:
    dtype = "float32" if op == "masks" else "bfloat16"
    return Case(op, SMALL[op], dtype, device)


def kernels() -> list[tuple[str, str]]:
    """Ops and implementations that this build has for a GPU; blocks are ours alone."""
    return [
        (op, impl)
        for op in SMALL
        for impl in get_args(dispatch.Impl)
        if impl != "reference"
        and dispatch.why_not(stem(case_of(op).page), impl, "cuda", torch.bfloat16) is None
        and not (op == "attention_blocks" and impl != "triton")
    ]


def call_of(op: str, impl: str, device: str = "cuda") -> Call:
    """One of them with its inputs on the GPU."""
    case = case_of(op, device)
    function = case.call  # found here: torch.compile could not follow how
    return Call(lambda **inputs: function(**inputs, impl=impl), case.inputs(), case.wrt)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.kernels", description=__doc__)
    parser.add_argument("impl", choices=get_args(dispatch.Impl))
    chosen = parser.parse_args().impl
    for op, impl in kernels():
        if impl == chosen:
            call_of(op, impl).both()
            torch.cuda.synchronize()
            print(op)


if __name__ == "__main__":
    main()
