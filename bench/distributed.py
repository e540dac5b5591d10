"""`python -m bench.distributed`: the contrastive loss over ranks against eager all-gather.

The ranks are processes of this machine (gloo), which share its cores, and take the same turns. Two
eager versions gather v and t: "eager" forms both matrices of all pairs on each rank, as released
code does; "eager rows" the two rectangles of the rank's own rows, and sums gradients over ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import Tensor

from bench.cases import errors
from bench.measure import peak_memory
from bench.ops import contrastive_loss as page
from iv2kernels.distributed import _all_gather, _reduce_scatter, contrastive_loss
from iv2kernels.timing import median_ratio

# Of the gather mode, float32.
LEAST_X_EAGER, MOST_MEMORY_PERCENT = 3.0, 5.0


@dataclass
class Options:
    """Time the contrastive loss over ranks, forward with backward."""

    # Processes; each gets its share of the cores.
    ranks: int = 2
    # Rows on all ranks together.
    rows: int = 4096
    # Width of the features.
    width: int = 512
    # float32, bfloat16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # Turns of each candidate.
    rounds: int = 7
    # Write everything as JSON.
    json: Path | None = None


class _Rows(torch.autograd.Function):
    """All ranks' rows; backward takes the own slice of the gradient, summed over ranks or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_summed: bool) -> Tensor:
        ctx.is_summed = is_summed
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        own = dx.chunk(dist.get_world_size())[dist.get_rank()]
        if ctx.is_summed:
            own = torch.empty_like(own)
            _reduce_scatter(own, dx.contiguous())
        return own, None


def _gathered(x: Tensor) -> Tensor:
    rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    _all_gather(rows, x.contiguous())
    return rows


def _cross_entropy(logits: Tensor, ids: Tensor, others: Tensor) -> Tensor:
    same = (ids[:, None] == others).float()
    target = same / same.sum(1, keepdim=True)
    return -(target * logits.float().log_softmax(1)).sum(1).mean()


def eager(v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
    """Both matrices of all pairs, on each rank."""
    every = _gathered(ids)
    v, t = _Rows.apply(v, False), _Rows.apply(t, False)
    by_row, by_column = v @ t.T / temperature, t @ v.T / temperature
    return (_cross_entropy(by_row, every, every) + _cross_entropy(by_column, every, every)) / 2


def eager_rows(v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
    """The rows of this rank against all, both ways; the mean over ranks is the loss."""
    every = _gathered(ids)
    v_all, t_all = _Rows.apply(v, True), _Rows.apply(t, True)
    by_row, by_column = v @ t_all.T / temperature, t @ v_all.T / temperature
    return (_cross_entropy(by_row, ids, every) + _cross_entropy(by_column, ids, every)) / 2


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "eager rows": eager_rows,
    # with the gradients of "eager"
    "gather": partial(contrastive_loss, mode="gather", grad_mode="upstream"),
    "ring": partial(contrastive_loss, mode="ring", grad_mode="upstream"),
}


def _step(loss: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    value = loss(**leaves)
    return value.detach(), *torch.autograd.grad(value, [leaves[name] for name in page.WRT])


def _check(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """What is wrong is not timed. The two are rounded differently; see tests/test_distributed.py"""
    expected = calls["eager"]()
    for name in ("gather", "ring"):
        for got, value in zip(calls[name](), expected, strict=True):
            error, _ = errors(got, value)
            assert error < 0.05, f"{name}: error {error:.2e}"


def measure(options: Options, dtype: str) -> list[dict[str, Any]]:
    """A row for each candidate, the same on every rank but for the time between barriers."""
    whole = page.inputs((options.rows, options.width), getattr(torch, dtype))
    rank = dist.get_rank()
    inputs = {n: x.chunk(options.ranks)[rank] if x.dim() else x for n, x in whole.items()}
    calls = {name: partial(_step, loss, inputs) for name, loss in CANDIDATES.items()}
    _check(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    return [
        {
            "dtype": dtype,
            "candidate": name,
            "ms": 1e3 * statistics.median(times[name]),
            "memory_mb": memory[name],
            "x_eager": median_ratio(times["eager"], times[name]),
            "x_eager_rows": median_ratio(times["eager rows"], times[name]),
            "memory_percent": 100 * memory[name] / memory["eager"],
        }
        for name in calls
    ]


def show(row: dict[str, Any]) -> str:
    line = (
        f"{row['dtype']:9} {row['candidate']:11} {row['ms']:8.1f} ms {row['memory_mb']:8.1f} MB  "
        f"x_eager {row['x_eager']:5.2f}  x_eager_rows {row['x_eager_rows']:5.2f}  "
        f"memory {row['memory_percent']:5.1f} %"
    )
    if row["dtype"] == "float32" and row["candidate"] == "gather":
        met = row["x_eager"] >= LEAST_X_EAGER and row["memory_percent"] <= MOST_MEMORY_PERCENT
        goal = f"x_eager >= {LEAST_X_EAGER:g}, memory <= {MOST_MEMORY_PERCENT:g} %"
        line += f"  {goal}: {'met' if met else 'MISSED'}"
    return line


def _rank(rank: int, options: Options, meeting: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks
    )
    rows = []
    for dtype in options.dtypes:
        rows += measure(options, dtype)
        if rank == 0:
            for row in rows[-len(CANDIDATES) :]:
                print(show(row), flush=True)
    if rank == 0 and options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def main(options: Options) -> None:
    print(f"{options.ranks} ranks, {options.rows} rows of {options.width} in all")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (options, f"{folder}/meeting"), nprocs=options.ranks)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m bench.distributed"))
