"""Batches on a GPU, each copied there while the one before is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Fetched = tuple[dict[str, Any], list[Any]]  # a batch, and what was skipped for it


class Lane(Protocol):
    """A way to a device beside that of the computation."""

    def begin(self, fetch: Callable[[], Fetched]) -> Any:
        """Fetch a batch and begin its copy; says what is under way."""

    def receive(self, under_way: Any) -> Fetched:
        """The batch, which the computation begun from now on waits for."""


class CudaLane:
    """A stream of its own: copies from pinned memory run beside the kernels of other streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, fetch: Callable[[], Fetched]) -> tuple[Fetched, torch.cuda.Event]:
        with torch.cuda.stream(self.stream):  # so is what DALI decodes
            batch, skipped = fetch()
            there = {
                name: x.to(self.device, non_blocking=True) if torch.is_tensor(x) else x
                for name, x in batch.items()
            }
        return (there, skipped), self.stream.record_event()

    def receive(self, under_way: tuple[Fetched, torch.cuda.Event]) -> Fetched:
        (batch, skipped), copied = under_way
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for x in batch.values():
            if torch.is_tensor(x):
                x.record_stream(stream)  # else its memory is free when ours has no use for it
        return batch, skipped


def lane_to(device: torch.device) -> Lane | None:
    """The way to a device; None: there is nothing to copy."""
    return CudaLane(device) if device.type == "cuda" else None


def ahead(batches: Iterator[Fetched], lane: Lane | None) -> Iterator[Fetched]:
    """The same batches, each fetched and begun to be copied before the one before it is given.

    At most two are on the device for it: the one in use and the next. An error in fetching one is
    raised in its turn.
    """
    if lane is None:
        return batches
    return _ahead(batches, lane)


def _ahead(batches: Iterator[Fetched], lane: Lane) -> Iterator[Fetched]:
    under_way: Any = None
    while True:
        error: Exception | None = None
        following: Any = None
        try:
            following = lane.begin(lambda: next(batches))
        except Exception as e:  # StopIteration too
            error = e
        if under_way is not None:
            yield lane.receive(under_way)
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        under_way = following
