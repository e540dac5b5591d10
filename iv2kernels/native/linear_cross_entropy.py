"""linear_cross_entropy: torch's GEMMs around csrc/cpu/linear_cross_entropy.cpp.

Chunks of rows go through logits, the kernel, dx and dweight one after the other. dweight is float32
from the first chunk to the last: float32 GEMMs add to it in place; bfloat16 ones, whose result is
bfloat16, fill a slice of the vocabulary at a time, which is then added. Few bfloat16 rows are one
chunk, and dweight is then bfloat16, which takes no more memory. float16 goes through
float32, slice by slice, where the machine has no float16 GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.library.linear import WIDEN, matmul_t
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.ops.linear_cross_entropy import dweight_dtype

# Bytes of a chunk of logits, and its fewest rows: a GEMM of fewer is bound by reading the weight.
_CHUNK_BYTES, _LEAST_ROWS = 14 << 20, 64
# Bytes of a float32 slice of the weight or of its gradient.
_SLICE_BYTES = 4 << 20
# Elements of a gradient that are scaled at a time.
_SCALED = 1 << 17


@dataclass
class _Problem:
    weight: Tensor  # [V, C]
    bias: Tensor | None  # [V]
    dweight: Tensor  # [V, C] float32, of x's dtype when there is one chunk, or empty
    dbias: Tensor  # [V] float32, or empty
    label_smoothing: float
    scale: float
    needs: list[bool]

    def slices(self) -> Iterator[slice]:
        """Of the vocabulary."""
        vocabulary, dim = self.weight.shape
        step = max(_SLICE_BYTES // (4 * max(dim, 1)), 1)
        return (slice(i, min(i + step, vocabulary)) for i in range(0, vocabulary, step))


def _check_target(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    if target.numel() == 0:
        return
    low, high = (int(end) for end in target.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: target must be in [0, {vocabulary}) or the ignore_index "
            f"{ignore_index}, got {low if low < 0 else high}"
        )


def _softmax(problem: _Problem, logits: Tensor, target: Tensor, losses: Tensor) -> None:
    """Write the losses, and the gradient of the logits over the logits."""
    stats = torch.empty(2, logits.shape[0])
    _C.linear_cross_entropy_fwd(
        ptr(logits),
        ptr(target),
        ptr(losses),
        ptr(problem.dbias) if problem.needs[2] else 0,
        ptr(stats),
        logits.shape[0],
        logits.shape[1],
        DTYPE[logits.dtype],
        int(any(problem.needs)),
        float(problem.label_smoothing),
        float(problem.scale),
        torch.get_num_threads(),
    )


def _chunk(
    problem: _Problem,
    x: Tensor,  # [M, C]
    target: Tensor,  # [M]
    losses: Tensor,  # [M] float64
    first: bool,
) -> Tensor:
    """The losses and gradients of some rows; dx is returned."""
    logits = matmul_t(x, problem.weight, problem.bias, long_chains=True)
    _softmax(problem, logits, target, losses)
    if problem.needs[1] and x.dtype == torch.float32:
        problem.dweight.addmm_(logits.t(), x, beta=0 if first else 1)
    elif problem.needs[1] and problem.dweight.dtype == x.dtype:
        torch.mm(logits.t(), x, out=problem.dweight)
    elif problem.needs[1]:
        for part in problem.slices():
            grad = torch.mm(logits[:, part].t(), x)
            problem.dweight[part].copy_(grad) if first else problem.dweight[part].add_(grad)
    # float32: MKL adds up the V terms in blocks and is twice as accurate as oneDNN
    return torch.mm(logits, problem.weight) if problem.needs[0] else x.new_empty(0)


def _wide_chunk(
    problem: _Problem, x: Tensor, target: Tensor, losses: Tensor, first: bool
) -> Tensor:
    """As _chunk, in float32."""
    wide, dtype = x.float(), x.dtype
    logits = torch.empty(x.shape[0], problem.weight.shape[0])
    for part in problem.slices():
        torch.mm(wide, problem.weight[part].float().t(), out=logits[:, part])
    if problem.bias is not None:
        logits += problem.bias
    _softmax(problem, logits, target, losses)
    if problem.needs[1] and problem.dweight.dtype == torch.float32:
        problem.dweight.addmm_(logits.t(), wide, beta=0 if first else 1)
    elif problem.needs[1]:  # the only chunk
        for part in problem.slices():
            problem.dweight[part].copy_(torch.mm(logits[:, part].t(), wide))
    if not problem.needs[0]:
        return x.new_empty(0)
    dx = torch.zeros_like(wide)
    for part in problem.slices():
        dx.addmm_(logits[:, part], problem.weight[part].float())
    return dx.to(dtype)


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of x, weight and bias divided by `unit`, and `unit`."""
    keep = target != ignore_index
    rows = int(keep.sum())
    ids = None if rows == len(target) else keep.nonzero().squeeze(1)
    target = (target if ids is None else target[ids]).contiguous()
    _check_target(target, weight.shape[0], ignore_index)
    wide = x.dtype in WIDEN
    row_bytes = max(weight.shape[0], 1) * (4 if wide else x.dtype.itemsize)
    chunks = -(-rows // max(_CHUNK_BYTES // row_bytes, _LEAST_ROWS))
    kept_in = dweight_dtype(x)
    if needs[1] and kept_in == torch.bfloat16:
        chunks = min(chunks, 1)
    # 1 / rows, times a power of two that the caller divides by, exactly: the logits' gradient
    # keeps the range of p - y
    power = 2.0 ** rows.bit_length() if mean else 1.0
    problem = _Problem(
        weight.contiguous(),
        bias,
        torch.empty(weight.shape if needs[1] else 0, dtype=kept_in),
        torch.zeros(weight.shape[0] if needs[2] else 0),
        label_smoothing,
        power / rows if mean and rows else power,
        needs,
    )
    make = torch.empty if ids is None else torch.zeros
    dx = make(x.shape if needs[0] else (0,), dtype=x.dtype)
    losses = torch.empty(rows, dtype=torch.float64)
    if rows == 0:
        problem.dweight.zero_()
    # oneDNN and MKL see float32 as it is, also under autocast
    with torch.autocast("cpu", enabled=False):
        for c in range(chunks):
            part = slice(rows * c // chunks, rows * (c + 1) // chunks)
            some = x[part].contiguous() if ids is None else x[ids[part]]
            run = _wide_chunk if wide else _chunk
            grad = run(problem, some, target[part], losses[part], c == 0)
            if needs[0]:
                dx[part if ids is None else ids[part]] = grad
    loss = losses.sum() / max(rows, 1) if mean else losses.sum()
    return loss.float(), dx, problem.dweight, problem.dbias, torch.tensor(1 / power)


def linear_cross_entropy_bwd(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times those of the loss, in x's dtype."""
    scale = float(dloss) * float(unit)

    def scaled(grad: Tensor) -> Tensor:
        # a slice at a time: torch would scale a float32 copy of it all before it converts
        out = torch.empty(grad.shape, dtype=dx.dtype)
        parts = zip(grad.view(-1).split(_SCALED), out.view(-1).split(_SCALED), strict=True)
        for part, to in parts:
            torch.mul(part, scale, out=to)
        return out

    return scaled(dx), scaled(dweight), scaled(dbias)
