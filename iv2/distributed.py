"""Processes of a run: started by torchrun, or one alone."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    # Number of this process.
    rank: int = 0
    # Processes in all.
    size: int = 1
    # Where this process computes.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def gather(self, value: T) -> list[T]:
        """A picklable value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, stage: nn.Module) -> nn.Module:
        """The stage with gradients averaged over the processes, which start from rank 0's."""
        if self.size == 1:
            return stage
        devices = [self.device] if self.device.type == "cuda" else None
        partial = not getattr(stage, "uses_all_parameters", True)
        return DistributedDataParallel(stage, device_ids=devices, find_unused_parameters=partial)


def joined() -> World:
    """This process in the group that ``world`` joined, if any; for what runs on the CPU."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def world(device: str = "") -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on CUDA, gloo elsewhere), or run alone.

    Args:
        device: "cpu", "cuda", or empty: CUDA where there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"world: device must be cpu on a machine without CUDA, got {device}")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "RANK" not in os.environ:
        yield World(device=place)
        return
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # What wraps a stage holds the group, whose threads abort a process that ends before them.
        gc.collect()
        dist.destroy_process_group()
