"""The contrastive loss over the rows of all ranks.

A rank compares its rows of v with all rows of t, a rectangle of the whole matrix. Statistics of its
rows are complete then; those of columns are joined over the ranks. Backward makes dv complete and a
part of dt, which is summed over the ranks. "gather" holds all of t, which comes in chunks of every
rank's rows: a chunk is compared while the next one is on its way, and in backward its dt is summed
while the next one is computed. In a "ring" t travels from rank to rank with its column statistics
and gradients, while the rows at hand are computed.

One code for gloo and NCCL, written to these rules; gloo is tested, NCCL was not run:
- Every rank starts the same collectives in the same order. What decides how many there are (the
  numbers of rows and of ranks, which inputs need gradients) is the same on each, and no value is.
- NCCL's collectives run on its own stream, which first waits for the stream that they are started
  on: what they read is complete, and what runs meanwhile must not touch what they read or write.
  Their ``wait`` lets the current stream wait, not the process. So a ``Gathering`` is waited for on
  the stream that began it, or on one that waits for that.
- What a collective reads or writes is kept until it was waited for: memory that is freed is used
  again in the order of the current stream alone.
- What a rank sends and receives at a step of the ring is one batch, in which no order is needed: it
  cannot wait for itself. Batches of a step are started in the same order on each rank.
- No value is read back from the GPU on the way, so that the process runs ahead. Two are before: how
  many rows the other ranks have, which goes over the CPU where the group has a backend for it
  ("cpu:gloo,cuda:nccl"), and the temperature, unless the Triton kernels give NaN for a wrong one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl
from iv2kernels.ops.contrastive_loss import check_pairs, check_temperature
from iv2kernels.ops.contrastive_loss import contrastive_loss as _local_loss

# PyTorch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Rows are gathered in chunks of so many or more on all ranks together, in so many chunks at most.
_CHUNK_ROWS = 1024
_MOST_CHUNKS = 4

Mode = Literal["gather", "ring", "local"]
GradMode = Literal["exact", "upstream"]


class Gathering:
    """Rows of all ranks on their way, in chunks; made by ``gather_async``."""

    def __init__(self, local: Tensor, chunks: list[Tensor], works: list[Any]) -> None:
        # chunks: [W, b, D], b rows of each rank
        self.local, self._chunks, self._works = local, chunks, works

    def arrived(self) -> Iterator[Tensor]:
        """The chunks [W, b, D], one after the other, each when it is there; without gradient."""
        for i, chunk in enumerate(self._chunks):
            if self._works[i] is not None:
                self._works[i].wait()
                self._works[i] = None
            yield chunk

    def wait(self) -> Tensor:
        """The rows [W * B, D], in the order of the ranks, without gradient."""
        chunks = list(self.arrived())
        return (chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)).flatten(0, 1)


def gather_async(
    x: Tensor,  # [B, D]
    group: dist.ProcessGroup | None = None,
) -> Gathering:
    """Start to gather the rows of all ranks, which each have as many: when a tower ends.

    Args:
        x: This rank's rows.
        group: The ranks; None: all.

    Raises:
        ValueError: Ranks have different numbers of rows.
    """
    if _size(group) > 1:
        _check_rows("gather_async: x", x, group)
    return _gather(x, group, _MOST_CHUNKS)


def contrastive_loss(
    v: Tensor | Gathering,  # [B, D]
    t: Tensor | Gathering,  # [B, D]
    temperature: Tensor,  # []
    *,
    ids: Tensor | None = None,  # [B]
    mode: Mode = "gather",
    grad_mode: GradMode = "exact",
    group: dist.ProcessGroup | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """``iv2kernels.contrastive_loss`` of the rows of all ranks, the same value on each.

    Gradients are made to be averaged over the ranks, as DistributedDataParallel does: "exact" gives
    W dloss/dv, so that the average is the gradient of the loss; "upstream" gives dloss/dv, as
    InternVideo2's all-gather does, 1 / W of it after averaging. The temperature's is whole in both.

    Args:
        v: Features of this rank, or their gathering under way, which is not needed.
        t: The same of the texts, whose gathering is waited for. Every rank has as many rows.
        temperature: As in the op, and the same on each rank. So must be what the loss is
            multiplied by, and which inputs need gradients.
        ids: int64, equal where rows match, on any rank. None: a row matches its own text alone.
        mode: "gather" compares the rows of all ranks and holds all of t; "ring" compares them with
            memory for a few chunks of t; "local" compares those of each rank alone.
        grad_mode: Which gradient.
        group: The ranks; None: all. Without process groups there is one.
        impl: Implementation of the op.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: mode or grad_mode is unknown, or ranks have different numbers of rows; and what
            the op raises (with the Triton kernels, a temperature that is wrong gives NaN).
    """
    for name, value, known in (
        ("mode", mode, ("gather", "ring", "local")),
        ("grad_mode", grad_mode, ("exact", "upstream")),
    ):
        if value not in known:
            raise ValueError(
                f"contrastive_loss: {name} must be one of {', '.join(known)}, got {value}"
            )
    gathering = t if isinstance(t, Gathering) else None
    was_checked = isinstance(v, Gathering) or gathering is not None
    v, t = (x.local if isinstance(x, Gathering) else x for x in (v, t))
    if mode == "local" or _size(group) == 1:
        return _local_loss(v, t, temperature, ids=ids, impl=impl)
    check_pairs("contrastive_loss", v, t, ids, temperature=temperature)
    name = dispatch.choose("contrastive_loss", v, impl)
    if name != "triton":
        check_temperature(float(temperature.detach()))
    if not was_checked:
        _check_rows("contrastive_loss: v", v, group)
    if len(v) == 0:
        return _local_loss(v, t, temperature, impl=impl)
    if ids is None:  # numbers of the rows among those of all ranks
        ids = torch.arange(len(v), device=v.device) + len(v) * dist.get_rank(group)
    labels = _gather(ids.long(), group)  # before t: the first chunk is compared by them
    if mode == "gather" and gathering is None:
        gathering = _gather(t, group, _MOST_CHUNKS)
    every = labels.wait()
    ordered = every.sort().values
    first = torch.searchsorted(ordered, every)
    counts = torch.searchsorted(ordered, every, right=True) - first
    chunks = gathering if mode == "gather" else None
    problem = _Problem(
        first.float(), 1 / counts.double(), chunks, grad_mode == "exact", name, group
    )
    # kernels are launched on the current device
    with torch.cuda.device(v.device) if v.is_cuda else nullcontext():
        return _Loss.apply(v, t, temperature, problem)  # type: ignore[no-any-return]


@dataclass
class _Problem:
    labels: Tensor  # [W * B] whole float32 numbers: ids of all ranks
    inverse_counts: Tensor  # [W * B] float64: 1 / the rows, on any rank, with the label of each row
    gathering: Gathering | None  # of all of t; None: in a ring
    exact: bool
    impl: str
    group: Any

    @property
    def size(self) -> int:
        """W."""
        return _size(self.group)

    def own(self, x: Tensor) -> Tensor:
        """The part of this rank of what all ranks have."""
        part: Tensor = x.chunk(self.size)[dist.get_rank(self.group)]
        return part

    def chunks(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """The gathered rows [W * b, D], with the labels of this rank's rows and of theirs."""
        assert self.gathering is not None
        first, labels = 0, self.labels.view(self.size, -1)
        for chunk in self.gathering.arrived():
            last = first + chunk.shape[1]
            yield chunk.flatten(0, 1), (self.own(self.labels), labels[:, first:last].flatten())
            first = last

    def own_columns(self, columns: list[Tensor]) -> Tensor:
        """Of what each chunk's columns have, [3, W * b], this rank's: [3, B]."""
        return torch.cat([torch.stack([self.own(x) for x in part]) for part in columns], 1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor, temperature: Tensor, problem: _Problem) -> Tensor:
        found = _gather_statistics if problem.gathering is not None else _ring_statistics
        rows, columns, own, positives = found(v, t, temperature, problem)
        positive = positives.double() * problem.own(problem.inverse_counts)
        total = (_losses(rows, positive) + _losses(own, positive)).sum()
        dist.all_reduce(total, group=problem.group)
        ctx.save_for_backward(v, t, temperature, rows, columns)
        ctx.problem = problem
        loss = total / (2 * len(problem.labels))
        return loss.to(torch.promote_types(v.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        v, t, temperature, rows, columns = ctx.saved_tensors
        problem, needs = ctx.problem, ctx.needs_input_grad
        part = _Part(dloss, temperature, rows, problem, list(needs[:2]))
        found = _gather_gradients if problem.gathering is not None else _ring_gradients
        dv, dt, dscale = found(v, t, columns, part)
        dist.all_reduce(dscale, group=problem.group)
        factor = problem.size if problem.exact else 1
        dtemperature = (-dscale / temperature.double().square()).to(temperature.dtype)
        grads = (dv.mul_(factor).to(v.dtype), dt.mul_(factor).to(t.dtype), dtemperature)
        return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), None)


# ---- statistics: [3, n] of rows or columns: maximum s, how often it occurs, and the sum of the
# other e^(s - maximum)


def _statistics(
    pair: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], temperature: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows [3, M] and the columns [3, N] of a rectangle; and sums [M] of its positives."""
    if impl != "reference":
        scale = 1 / float(temperature) if impl == "native" else temperature
        return _kernels(impl).statistics(pair, labels, scale)  # type: ignore[no-any-return]
    s = _logits(pair, temperature)
    found = []
    for axis in (1, 0):
        most = s.amax(axis, keepdim=True)
        ties = (s == most).sum(axis)
        rest = (s - most).exp().masked_fill(s == most, 0).sum(axis)
        found.append(torch.stack([most.squeeze(axis), ties.to(s.dtype), rest]))
    same = labels[0][:, None] == labels[1]
    return found[0], found[1], s.masked_fill(~same, 0).sum(1)


def _kernels(impl: str) -> Any:
    return importlib.import_module(f"iv2kernels.{impl}.contrastive_loss")


def _logits(pair: tuple[Tensor, Tensor], temperature: Tensor) -> Tensor:
    wide = torch.promote_types(pair[0].dtype, torch.float32)
    return pair[0].to(wide) @ pair[1].to(wide).T / temperature.to(wide)


def _against(terms: Tensor, most: Tensor) -> Tensor:
    """Occurrences and sums [2, n] counted from a maximum that is as high or higher."""
    own, ties, rest = terms
    shrunk = (ties + rest) * (own - most).exp()
    highest = own == most
    return torch.stack([torch.where(highest, ties, 0), torch.where(highest, rest, shrunk)])


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Statistics of two parts of the same rows or columns."""
    most = torch.maximum(first[0], second[0])
    return torch.cat([most[None], _against(first, most) + _against(second, most)])


def _join_ranks(terms: Tensor, group: Any) -> Tensor:
    most = terms[0].clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    sums = _against(terms, most)
    dist.all_reduce(sums, group=group)
    return torch.cat([most[None], sums])


def _losses(terms: Tensor, positive: Tensor) -> Tensor:
    """Log sum e^s - positive, float64: no sum beside the maximum is too small to count."""
    most, ties, rest = terms.double().unbind(0)
    return (most - positive) + ties.log() + torch.log1p(rest / ties)


# ---- gradients


@dataclass
class _Part:
    """Gradients of the rectangles of this rank's rows."""

    dloss: Tensor
    temperature: Tensor
    rows: Tensor  # [3, M], complete
    problem: _Problem
    needs: list[bool]  # of v and of t

    def gradients(
        self, pair: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of v, of t, empty where not needed, and of the scale; columns: [3, N], complete."""
        stats = [x for most, ties, rest in (self.rows, columns) for x in (most, 1 / (ties + rest))]
        dloss = self.dloss.double() / self.problem.size  # the mean is over the rows of all ranks
        target, impl = self.problem.own(self.problem.inverse_counts), self.problem.impl
        if impl != "reference":
            parts = (*labels, target.float(), torch.cat(stats))
            numbers: Any = (dloss, self.temperature)
            if impl == "native":
                numbers = (float(dloss), 1 / float(self.temperature))
            dv, dt, dscale = _kernels(impl).part_gradients(
                numbers[0], pair, parts, numbers[1], self.needs
            )
            return dv, dt, torch.as_tensor(dscale, dtype=torch.float64)
        s = _logits(pair, self.temperature)
        row_max, row_inverse, column_max, column_inverse = stats
        p = (s - row_max[:, None]).exp() * row_inverse[:, None]
        q = (s - column_max).exp() * column_inverse
        same = (labels[0][:, None] == labels[1]) * target.to(s.dtype)[:, None]
        ds = (p + q - 2 * same) * (dloss / (2 * len(s)))
        v, t = (x.to(s.dtype) for x in pair)
        temperature = self.temperature.to(s.dtype)
        dv = ds @ t / temperature if self.needs[0] else s.new_empty(0)
        dt = ds.T @ v / temperature if self.needs[1] else s.new_empty(0)
        return dv, dt, (ds * s).sum().double() * temperature.double()


# ---- the gathered rows, chunk by chunk


def _gather_statistics(
    v: Tensor, t: Tensor, temperature: Tensor, problem: _Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of this rank's rows, of all columns by chunk, of this rank's, and of its positives."""
    rows: Tensor | None = None
    positives = v.new_zeros(len(v), dtype=torch.promote_types(v.dtype, torch.float32))
    columns = []
    for chunk, labels in problem.chunks():
        more, column, positive = _statistics((v, chunk), labels, temperature, problem.impl)
        rows = more if rows is None else _join(rows, more)
        positives += positive
        columns.append(column)
    assert rows is not None
    every = _join_ranks(torch.cat(columns, 1), problem.group)
    sizes = [column.shape[1] for column in columns]
    return rows, every, problem.own_columns(list(every.split(sizes, 1))), positives


def _gather_gradients(
    v: Tensor, t: Tensor, columns: Tensor, part: _Part
) -> tuple[Tensor, Tensor, Tensor]:
    problem, first = part.problem, 0
    total: Tensor | None = None
    dscale = torch.zeros((), dtype=torch.float64, device=v.device)
    coming = []
    for chunk, labels in problem.chunks():
        last = first + len(chunk)
        dv, dt, more = part.gradients((v, chunk), labels, columns[:, first:last])
        total = dv if total is None else total.add_(dv)
        dscale += more
        if part.needs[1]:
            coming.append(_Sum(dt, problem))
        first = last
    assert total is not None
    return total, torch.cat([x.wait() for x in coming]) if coming else dt, dscale


class _Sum:
    """This rank's rows of a sum over the ranks, on its way."""

    def __init__(self, every: Tensor, problem: _Problem) -> None:
        self._every = every.contiguous()  # kept until it was read
        self._own = torch.empty_like(problem.own(self._every))
        self._work = _reduce_scatter(self._own, self._every, group=problem.group, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._own


# ---- the ring: at step k a rank holds the chunk of rank (own - k) mod W


def _ring_labels(problem: _Problem) -> list[tuple[Tensor, Tensor]]:
    """Labels of the rows and of the columns, by step."""
    chunks, rank = problem.labels.chunk(problem.size), dist.get_rank(problem.group)
    return [(chunks[rank], chunks[rank - k]) for k in range(problem.size)]


def _ring_statistics(
    v: Tensor, t: Tensor, temperature: Tensor, problem: _Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of this rank's rows, twice of its columns, which come home last, and of its positives."""
    found: tuple[Tensor, Tensor, Tensor] | None = None
    coming: _Shift | None = None
    for step, labels in enumerate(_ring_labels(problem), 1):
        ahead = _Shift([t], 0, problem.group) if step < problem.size else None
        rows, columns, positives = _statistics((v, t), labels, temperature, problem.impl)
        if found is not None:
            rows, positives = _join(found[0], rows), found[2] + positives
        if coming is not None:
            columns = _join(coming.wait()[0], columns)
        found = rows, columns, positives
        coming = _Shift([columns], 1, problem.group)
        if ahead is not None:
            (t,) = ahead.wait()
    assert found is not None
    assert coming is not None
    (own,) = coming.wait()
    return found[0], own, own, found[2]


def _ring_gradients(
    v: Tensor, t: Tensor, columns: Tensor, part: _Part
) -> tuple[Tensor, Tensor, Tensor]:
    problem = part.problem
    total: Tensor | None = None
    coming: _Shift | None = None
    dscale = torch.zeros((), dtype=torch.float64, device=v.device)
    for step, labels in enumerate(_ring_labels(problem), 1):
        ahead = _Shift([t, columns], 0, problem.group) if step < problem.size else None
        dv, dt, more = part.gradients((v, t), labels, columns)
        total = dv if total is None else total.add_(dv)
        dscale += more
        if part.needs[1]:
            if coming is not None:
                dt.add_(coming.wait()[0])
            coming = _Shift([dt], 2, problem.group)
        if ahead is not None:
            t, columns = ahead.wait()
    assert total is not None
    return total, dt if coming is None else coming.wait()[0], dscale


class _Shift:
    """Tensors on their way to the next rank, and those of the one before."""

    def __init__(self, tensors: list[Tensor], tag: int, group: dist.ProcessGroup | None) -> None:
        rank, size = dist.get_rank(group), _size(group)
        self._sent = [x.contiguous() for x in tensors]  # kept until they are
        self._received = [torch.empty_like(x) for x in self._sent]
        operations = []
        for i, (sent, received) in enumerate(zip(self._sent, self._received, strict=True), tag):
            for operation, x, peer in ((dist.isend, sent, 1), (dist.irecv, received, -1)):
                peer = (rank + peer) % size
                operations.append(dist.P2POp(operation, x, None, group, i, group_peer=peer))
        self._work = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """What the rank before has sent."""
        for work in self._work:
            work.wait()
        return self._received


def _gather(x: Tensor, group: dist.ProcessGroup | None, most_chunks: int = 1) -> Gathering:
    rows, size = x.detach().contiguous(), _size(group)
    if size == 1:
        return Gathering(x, [rows[None]], [None])
    count = min(most_chunks, max(size * len(rows) // _CHUNK_ROWS, 1))
    chunks, works = [], []
    for own in rows.chunk(count):
        out = rows.new_empty(size * len(own), *rows.shape[1:])
        works.append(_all_gather(out, own, group=group, async_op=True))
        chunks.append(out.view(size, *own.shape))
    return Gathering(x, chunks, works)


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _check_rows(where: str, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise unless every rank has as many rows: gloo would end the process, NCCL hang."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    count = torch.tensor([len(x)], device="cpu" if on_cpu else x.device)
    counts = _gather(count, group).wait().tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"{where} must have as many rows on each rank, got {counts}")
