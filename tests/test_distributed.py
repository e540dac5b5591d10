from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import distributed_ranks as ranks
import pytest
import torch
from compare import assert_as_accurate

import iv2kernels as k
from iv2kernels.distributed import contrastive_loss, gather_async
from iv2kernels.ops.contrastive_loss import reference

NAMES = ("loss", "dv", "dt", "dtemperature")


@cache
def found(world: int) -> list[dict]:
    """What each of the ranks has found; they are started once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(ranks.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as out:
        processes = [
            subprocess.Popen(
                [sys.executable, ranks.__file__, str(rank), str(world), port, out],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        return [torch.load(f"{out}/{rank}.pt", weights_only=False) for rank in range(world)]


@cache
def whole(dtype, with_ids, precise=None):
    """One process with all rows; with ``precise`` in that dtype, of inputs rounded to dtype."""
    every = ranks.inputs(dtype)
    if precise:
        every = {n: x.to(precise) if x.is_floating_point() else x for n, x in every.items()}
    own = ranks.share(every, 0, 1)
    loss = reference(own["v"], own["t"], own["temperature"], own["ids"] if with_ids else None)
    return (loss.detach(), *torch.autograd.grad(2 * loss, [own[x] for x in ranks.WRT]))


def joined(results, factor=1):
    """The results of ranks as one's, after checking that they agree."""
    loss, dv, dt, dtau = zip(*results, strict=True)
    assert all(torch.equal(x, loss[0]) for x in loss)
    assert all(torch.equal(x, dtau[0]) for x in dtau)
    return loss[0], torch.cat(dv) / factor, torch.cat(dt) / factor, dtau[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_equal_one_process(world):
    for mode, grad_mode, dtype, with_ids in ranks.cases():
        key = (mode, grad_mode, str(dtype), with_ids)
        factor = world if grad_mode == "exact" else 1
        got = joined([rank["cases"][key] for rank in found(world)], factor)
        exact, eager = whole(dtype, with_ids, torch.float64), whole(dtype, with_ids)
        for name, *values in zip(NAMES, got, eager, exact, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(values[0], values[2], rtol=1e-12, atol=1e-15)
            else:
                assert_as_accurate(f"{key} {name}", *values)


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("world", [2, 4])
def test_what_else_ranks_do(world, mode):
    key = (mode, "exact", "torch.float32", True)
    rows = ranks.inputs(torch.float32)
    rows |= {"t": rows["v"], "temperature": torch.tensor(0.02), "ids": None}
    solved = reference(**{n: x if x is None else x.double() for n, x in rows.items()})
    for rank in found(world):
        loss, dv, dt, dtau = rank["cases"][key]
        for got, expected in (
            (rank[f"gathering {mode}"], (loss, dv, dt, dtau)),
            (rank[f"t {mode}"], (loss, dt)),
            (rank[f"v temperature {mode}"], (loss, dv, dtau)),
        ):
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        # far below what two float32 logarithms differ by
        torch.testing.assert_close(rank[f"solved {mode}"].double(), solved, rtol=1e-5, atol=0)
        assert rank[f"nan {mode}"].isnan()
        assert rank[f"empty {mode}"].isnan()


def test_local_compares_a_rank_alone():
    for i, rank in enumerate(found(2)):
        own = ranks.share(ranks.inputs(torch.float32), i, 2)
        loss = k.contrastive_loss(**own)
        grads = torch.autograd.grad(2 * loss, [own[name] for name in ranks.WRT])
        for got, expected in zip(rank["local"], (loss, *grads), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_groups_side_by_side(mode):
    key = (mode, "exact", "torch.float32", True)
    for i, rank in enumerate(found(4)):
        expected = found(2)[i // 2]["cases"][key]
        for got, value in zip(rank[f"group {mode}"], expected, strict=True):
            assert torch.equal(got, value)


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_rows_raise(world):
    counts = list(range(3, 3 + world))
    for rank in found(world):
        for name, where in (("", "contrastive_loss: v"), (" gathering", "gather_async: x")):
            assert rank[f"uneven{name}"] == (
                f"{where} must have as many rows on each rank, got {counts}"
            )


@pytest.mark.parametrize("world", [2, 4])
def test_chunks_are_put_together_in_the_order_of_the_ranks(world):
    for rank in found(world):
        assert torch.equal(rank["gathered"], ranks.inputs(torch.float32)["v"])


def test_memory_is_linear_in_the_batch():
    for rank in found(2):
        for small, large in rank["memory"].values():
            assert large < 4.2 * small
            assert large * 1e6 < 0.05 * 16384**2 * 4  # of one matrix


def test_without_a_group():
    every = ranks.inputs(torch.float32)
    expected = k.contrastive_loss(**every)
    for mode in ("gather", "ring", "local"):
        assert torch.equal(contrastive_loss(**every, mode=mode), expected)
        begun = every | {"v": gather_async(every["v"]), "t": gather_async(every["t"])}
        assert torch.equal(contrastive_loss(**begun, mode=mode), expected)
    assert torch.equal(gather_async(every["v"]).wait(), every["v"])
    assert contrastive_loss(**every, impl="reference") == k.contrastive_loss(
        **every, impl="reference"
    )


def test_errors():
    every = ranks.inputs(torch.float32)
    with pytest.raises(ValueError, match="mode must be one of gather, ring, local, got star"):
        contrastive_loss(**every, mode="star")
    with pytest.raises(ValueError, match="grad_mode must be one of exact, upstream, got half"):
        contrastive_loss(**every, grad_mode="half")
