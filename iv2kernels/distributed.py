"""The contrastive loss over the rows of all ranks.

A rank compares its rows of v with all rows of t, a rectangle of the whole matrix. Statistics of its
rows are complete then; those of columns are joined over the ranks. Backward makes dv complete and a
part of dt, which is summed over the ranks. "gather" holds all of t; in a "ring" chunks of t travel
from rank to rank with their column statistics and gradients, while the chunk at hand is computed.
"""

from __future__ import annotations

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

Mode = Literal["gather", "ring", "local"]
GradMode = Literal["exact", "upstream"]


class Gathering:
    """Rows of all ranks on their way; made by ``gather_async``."""

    def __init__(self, local: Tensor, rows: Tensor, work: Any) -> None:
        self.local, self._rows, self._work = local, rows, work

    def wait(self) -> Tensor:
        """The rows [W * B, D], in the order of the ranks, without gradient."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows


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
    return _gather(x, group)


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
            the op raises.
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
    check_temperature(float(temperature.detach()))
    name = dispatch.choose("contrastive_loss", v, impl)
    if not was_checked:
        _check_rows("contrastive_loss: v", v, group)
    if len(v) == 0:
        return _local_loss(v, t, temperature, impl=impl)
    if mode == "gather" and gathering is None:
        gathering = _gather(t, group)
    if ids is None:  # numbers of the rows among those of all ranks
        ids = torch.arange(len(v), device=v.device) + len(v) * dist.get_rank(group)
    labels: Tensor = torch.unique(_gather(ids.long(), group).wait(), return_inverse=True)[1]
    rows = gathering.wait() if gathering is not None and mode == "gather" else None
    problem = _Problem(labels.float(), rows, grad_mode == "exact", name, group)
    return _Loss.apply(v, t, temperature, problem)  # type: ignore[no-any-return]


@dataclass
class _Problem:
    labels: Tensor  # [W * B] whole float32 numbers: ids of all ranks
    rows: Tensor | None  # [W * B, D] all of t; None: in a ring
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

    @property
    def inverse_counts(self) -> Tensor:
        """[B] float64: 1 / the rows, on any rank, with the label of each row."""
        counts = torch.bincount(self.labels.long())[self.labels.long()]
        return 1 / self.own(counts).double()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor, temperature: Tensor, problem: _Problem) -> Tensor:
        scale = 1 / float(temperature)
        if problem.rows is not None:
            labels = (problem.own(problem.labels), problem.labels)
            rows, columns, positives = _statistics((v, problem.rows), labels, scale, problem.impl)
            columns = _join_ranks(columns, problem.group)
            own = torch.stack([problem.own(x) for x in columns])
        else:
            rows, own, positives = _ring_statistics(v, t, scale, problem)
            columns = own
        positive = positives.double() * problem.inverse_counts
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
        part = _Part(float(dloss), 1 / float(temperature), rows, problem, list(needs[:2]))
        if problem.rows is not None:
            labels = (problem.own(problem.labels), problem.labels)
            dv, dt, dscale = part.gradients((v, problem.rows), labels, columns)
            dt = _sum_own(dt, problem) if needs[1] else dt
        else:
            dv, dt, dscale = _ring_gradients(v, t, columns, part)
        total = torch.tensor(dscale, dtype=torch.float64, device=v.device)
        dist.all_reduce(total, group=problem.group)
        factor = problem.size if problem.exact else 1
        dtemperature = torch.full_like(temperature, -float(total) * part.scale**2)
        grads = (dv.mul_(factor).to(v.dtype), dt.mul_(factor).to(t.dtype), dtemperature)
        return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), None)


# ---- statistics: [3, n] of rows or columns: maximum s, how often it occurs, and the sum of the
# other e^(s - maximum)


def _statistics(
    pair: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows [3, M] and the columns [3, N] of a rectangle; and sums [M] of its positives."""
    if impl == "native":
        from iv2kernels.native.contrastive_loss import statistics

        return statistics(pair, labels, scale)
    s = _logits(pair, scale)
    found = []
    for axis in (1, 0):
        most = s.amax(axis, keepdim=True)
        ties = (s == most).sum(axis)
        rest = (s - most).exp().masked_fill(s == most, 0).sum(axis)
        found.append(torch.stack([most.squeeze(axis), ties.to(s.dtype), rest]))
    same = labels[0][:, None] == labels[1]
    return found[0], found[1], s.masked_fill(~same, 0).sum(1)


def _logits(pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    wide = torch.promote_types(pair[0].dtype, torch.float32)
    return pair[0].to(wide) @ pair[1].to(wide).T * scale


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

    dloss: float
    scale: float
    rows: Tensor  # [3, M], complete
    problem: _Problem
    needs: list[bool]  # of v and of t

    def gradients(
        self, pair: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], columns: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Of v, of t, empty where not needed, and of the scale; columns: [3, N], complete."""
        stats = [x for most, ties, rest in (self.rows, columns) for x in (most, 1 / (ties + rest))]
        dloss = self.dloss / self.problem.size  # the mean is over the rows of all ranks
        target = self.problem.inverse_counts
        if self.problem.impl == "native":
            from iv2kernels.native.contrastive_loss import part_gradients

            parts = (*labels, target.float(), torch.cat(stats))
            return part_gradients(dloss, pair, parts, self.scale, self.needs)
        s = _logits(pair, self.scale)
        row_max, row_inverse, column_max, column_inverse = stats
        p = (s - row_max[:, None]).exp() * row_inverse[:, None]
        q = (s - column_max).exp() * column_inverse
        same = (labels[0][:, None] == labels[1]) * target.to(s.dtype)[:, None]
        ds = (p + q - 2 * same) * (dloss / (2 * len(s)))
        v, t = (x.to(s.dtype) for x in pair)
        dv = ds @ t * self.scale if self.needs[0] else s.new_empty(0)
        dt = ds.T @ v * self.scale if self.needs[1] else s.new_empty(0)
        return dv, dt, float((ds * s).sum()) / self.scale


def _sum_own(dt_all: Tensor, problem: _Problem) -> Tensor:
    """This rank's rows of the sum over the ranks."""
    dt_all = dt_all.contiguous()
    out = torch.empty_like(problem.own(dt_all))
    _reduce_scatter(out, dt_all, group=problem.group)
    return out


# ---- the ring: at step k a rank holds the chunk of rank (own - k) mod W


def _ring_labels(problem: _Problem) -> list[tuple[Tensor, Tensor]]:
    """Labels of the rows and of the columns, by step."""
    chunks, rank = problem.labels.chunk(problem.size), dist.get_rank(problem.group)
    return [(chunks[rank], chunks[rank - k]) for k in range(problem.size)]


def _ring_statistics(
    v: Tensor, t: Tensor, scale: float, problem: _Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's rows, of its columns, which come home last, and of its positives."""
    found: tuple[Tensor, Tensor, Tensor] | None = None
    coming: _Shift | None = None
    for step, labels in enumerate(_ring_labels(problem), 1):
        ahead = _Shift([t], 0, problem.group) if step < problem.size else None
        rows, columns, positives = _statistics((v, t), labels, scale, problem.impl)
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
    return found[0], coming.wait()[0], found[2]


def _ring_gradients(
    v: Tensor, t: Tensor, columns: Tensor, part: _Part
) -> tuple[Tensor, Tensor, float]:
    problem = part.problem
    total: Tensor | None = None
    coming: _Shift | None = None
    dscale = 0.0
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


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Gathering:
    rows = x.detach().contiguous()
    if _size(group) == 1:
        return Gathering(x, rows, None)
    out = rows.new_empty(_size(group) * rows.shape[0], *rows.shape[1:])
    return Gathering(x, out, _all_gather(out, rows, group=group, async_op=True))


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _check_rows(where: str, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise unless every rank has as many rows: gloo would end the process, NCCL hang."""
    counts = _gather(torch.tensor([len(x)], device=x.device), group).wait().tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"{where} must have as many rows on each rank, got {counts}")
