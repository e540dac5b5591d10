"""One rank of tests/test_distributed.py: python distributed_ranks.py RANK WORLD PORT OUT."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from bench.measure import peak_memory
from iv2kernels import distributed
from iv2kernels.distributed import contrastive_loss, gather_async

# Of all ranks: more than a strip and a block of the kernel (pair_tiles.h), in no whole number
ROWS, DIM = 600, 40
WRT = ("v", "t", "temperature")
Key = tuple[str, str, str, bool]


def inputs(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Tensor]:
    """Of all ranks together; some ids repeat, mostly on other ranks."""
    g = torch.Generator().manual_seed(0)
    pair = torch.randn(rows, DIM, generator=g)
    v, t = (normalize(pair + torch.randn(rows, DIM, generator=g), dim=1) for _ in range(2))
    ids = 2**40 + torch.randint(3 * rows, (rows,), generator=g)
    exact = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(0.07).to(exact)
    return {"v": v.to(dtype), "t": t.to(dtype), "temperature": tau, "ids": ids}


def cases() -> list[tuple[str, str, torch.dtype, bool]]:
    """mode, grad_mode, dtype, with ids"""
    return [
        (mode, grad_mode, dtype, with_ids)
        for mode in ("gather", "ring")
        for grad_mode in ("exact", "upstream")
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for with_ids in (True, False)
    ]


def share(whole: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    return {
        name: (x.chunk(world)[rank] if x.dim() else x).clone().requires_grad_(x.is_floating_point())
        for name, x in whole.items()
    }


def results(own: dict[str, Any], *, wrt: tuple[str, ...] = WRT, **options: Any) -> Any:
    """The loss, and gradients of twice the loss."""
    loss = contrastive_loss(**own, **options)
    return loss.detach(), *torch.autograd.grad(2 * loss, [own[name] for name in wrt])


def error_of(f: Any) -> str:
    try:
        f()
    except ValueError as error:
        return str(error)
    return "none"


def all_cases(rank: int, world: int) -> dict[Key, Any]:
    found = {}
    for mode, grad_mode, dtype, with_ids in cases():
        own = share(inputs(dtype), rank, world)
        if not with_ids:
            del own["ids"]
        key = (mode, grad_mode, str(dtype), with_ids)
        found[key] = results(own, mode=mode, grad_mode=grad_mode)
    return found


def others(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = share(inputs(torch.float32), rank, world)
    for mode in ("gather", "ring"):
        for wrt in (("t",), ("v", "temperature")):
            frozen = {n: x if n in wrt else x.detach() for n, x in own.items()}
            found[f"{' '.join(wrt)} {mode}"] = results(frozen, wrt=wrt, mode=mode)
        begun = {"v": gather_async(own["v"]), "t": gather_async(own["t"])}
        loss = contrastive_loss(**own | begun, mode=mode)
        grads = torch.autograd.grad(2 * loss, [own[name] for name in WRT])
        found[f"gathering {mode}"] = (loss.detach(), *grads)
        solved = own | {"t": own["v"], "temperature": torch.tensor(0.02)}
        del solved["ids"]
        found[f"solved {mode}"] = contrastive_loss(**solved, mode=mode).detach()
        spoilt = own["t"].detach().clone()
        if rank == world - 1:
            spoilt[3, 3] = torch.nan
        found[f"nan {mode}"] = contrastive_loss(**own | {"t": spoilt}, mode=mode).detach()
        empty = {name: x[:0] if x.dim() else x for name, x in own.items()}
        found[f"empty {mode}"] = contrastive_loss(**empty, mode=mode).detach()
    found["local"] = results(own, mode="local")
    if world > 1:
        x = torch.randn(3 + rank, DIM)
        found["uneven"] = error_of(lambda: contrastive_loss(x, x, own["temperature"]))
        found["uneven gathering"] = error_of(lambda: gather_async(x))
    found["gathered"] = gather_async(own["v"]).wait()
    if world == 4:  # two groups side by side
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        own = share(inputs(torch.float32), rank // 2, 2)
        for mode in ("gather", "ring"):
            found[f"group {mode}"] = results(own, mode=mode, group=groups[rank % 2])
    return found


def memory(rank: int, world: int) -> dict[str, list[float]]:
    """MB of the loss with its gradients, by mode: of 4096 rows on all ranks, and of 16384."""
    found: dict[str, list[float]] = {"gather": [], "ring": []}
    for mode, used in found.items():
        for rows in (4096, 16384):
            whole = inputs(torch.float32, rows)
            narrow = {name: x[:, :16] if x.dim() == 2 else x for name, x in whole.items()}
            own = share(narrow, rank, world)
            used.append(peak_memory(lambda own=own, mode=mode: results(own, mode=mode)))
    return found


def main() -> None:
    rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    distributed._CHUNK_ROWS = 150  # of ROWS, four chunks
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, as in conftest.py
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {"cases": all_cases(rank, world), **others(rank, world)}
    if world == 2:
        found["memory"] = memory(rank, world)
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
