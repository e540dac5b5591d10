"""The memory that a running loader holds, in all its processes, does not grow."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
from media import write_video

from iv2.data.clips import Sample
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.loader import Batches
from iv2.data.transforms import CropConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A batch of four clips of 8 frames takes BATCH MB, and its decoded frames 6 MB. After the first
# SETTLED batches, of NUM that come, there may be this many more at once beside those that wait.
NUM, SETTLED, SIDE, BATCH = 24, 6, 160, 4 * 8 * 3 * 160**2 * 4 / 1e6
MOST_ADDED = 2
CONFIG = ClipConfig(num_frames=8, crop=CropConfig(size=SIDE))


def resident(pid: int, *, shared: bool) -> float:
    """MB of a process without the files that it maps."""
    names = ("RssAnon", "RssShmem") if shared else ("RssAnon",)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in names) / 1e3  # kB


def under_way(pids: list[int]) -> float:
    """MB of batches in shared memory, which count as nobody's between two processes."""
    sizes: dict[int, int] = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(entry).startswith("/dev/shm/torch_"):
                    stat = entry.stat()
                    sizes[stat.st_ino] = stat.st_size
            except OSError:  # closed meanwhile
                continue
    return sum(sizes.values()) / 1e6


def processes() -> list[int]:
    """This one and its workers."""
    return [os.getpid(), *(c.pid for c in multiprocessing.active_children() if c.pid)]


def asleep(pid: int) -> bool:
    """Whether every thread of a process waits for something."""
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state.rpartition(")")[2].split()[0] == "S" for state in states)


def held() -> float:
    """MB of all processes and of what is on its way between them."""
    own, *workers = processes()
    return (
        resident(own, shared=True)
        + sum(resident(pid, shared=False) for pid in workers)
        + under_way([own, *workers])
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{i}.mp4" for i in range(8)]
    return [Sample(str(write_video(path, 12, height=240, width=256))) for path in paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow(samples: list[Sample], workers: int) -> None:
    """Whether the batches are used at once, or so slowly that the workers must wait."""
    # memory for some of the clips, so that others are decoded again and again
    dataset = VideoDataset(samples, CONFIG, cache_bytes=5_000_000)
    memory: list[float] = []
    with Batches(dataset, 4, num_workers=workers) as batches:
        for number in range(NUM):
            batch = next(batches)
            assert batch["video"].nbytes == BATCH * 1e6
            if number > NUM - 6:
                time.sleep(0.15)
            memory.append(held())
    settled = memory[SETTLED]
    print(f"\n{settled:.0f} MB, then {min(memory[SETTLED:]):.0f} to {max(memory):.0f} MB")
    assert max(memory) - settled < (MOST_ADDED + 2 * workers) * BATCH


def test_a_waiting_loader_holds_two_batches_a_worker(samples: list[Sample]) -> None:
    """However long nobody asks, beside the one that is used."""
    workers, before = 2, under_way([os.getpid()])  # what failed earlier may hold some
    with Batches(VideoDataset(samples, CONFIG), 4, num_workers=workers) as batches:
        batch = next(batches)
        pids = processes()
        assert len(pids) == 1 + workers
        most, until = 2 * workers * BATCH, time.monotonic() + 20
        quiet = 0
        while quiet < 5 and time.monotonic() < until:  # would more come?
            done = under_way(pids) - before >= most and all(map(asleep, pids[1:]))
            quiet = quiet + 1 if done else 0
            time.sleep(0.05)
        waiting = under_way(pids) - before
        print(f"\n{waiting / BATCH:.2f} batches under way")
        # and small tensors, such as the seeds
        assert most <= waiting < most + BATCH + 0.1, batch["kind"]
