"""What the ops' kernels take, several ops at a time: Triton compiles in one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import torch

from tests.gates.compiling import launches
from tests.gates.resources import Usage, usage

T = TypeVar("T")
R = TypeVar("R")


class Task(NamedTuple):
    """The kernels of an op for an architecture, launched on tensors of some dtypes."""

    arch: str
    op: str
    dtypes: tuple[str, ...]


def cores() -> int:
    """How many processes keep this machine busy."""
    return len(os.sched_getaffinity(0))


def measure(task: Task) -> list[tuple[str, Usage]]:
    """The kernels of a task by name, each once."""
    found = launches(task.arch, [task.op], task.dtypes)
    return [(launch.name, usage(task.arch, launch.compiled)) for launch in found]


def spread(work: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Iterator[tuple[T, R]]:
    """Each task with its result, in their order; `jobs` at a time, each in one thread."""
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from ((task, work(task)) for task in tasks)
        return
    context = get_context("spawn")  # a process that has run torch's threads must not fork
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield from zip(tasks, pool.map(work, tasks), strict=True)
