"""The next batch is on its way while one is used, and nothing else changes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from media import same_batch, write_broken, write_video

from iv2.data import loader
from iv2.data.ahead import Fetched, ahead, lane_to
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.loader import Batches
from iv2.data.mixed import MixedBatches
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig

CLIP = ClipConfig(num_frames=4, crop=CropConfig(size=16))


class Recorded:
    """A lane to this same memory that writes down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, fetch: Callable[[], Fetched]) -> Fetched:
        found = fetch()
        self.events.append(f"begin {found[0]['n']}" if "n" in found[0] else "begin")
        return found

    def receive(self, under_way: Fetched) -> Fetched:
        self.events.append(f"receive {under_way[0]['n']}" if "n" in under_way[0] else "receive")
        return under_way


def numbered(num: int) -> Iterator[Fetched]:
    for n in range(num):
        yield {"n": n}, []


def test_each_is_begun_before_the_one_before_is_given() -> None:
    lane = Recorded()
    batches = ahead(numbered(3), lane)
    for n in range(3):
        assert next(batches)[0]["n"] == n
        lane.events.append(f"use {n}")
    assert list(batches) == []
    assert lane.events == [
        *("begin 0", "begin 1", "receive 0", "use 0"),
        *("begin 2", "receive 1", "use 1", "receive 2", "use 2"),
    ]


@pytest.mark.parametrize("num", [0, 1])
def test_few(num: int) -> None:
    assert [batch["n"] for batch, _ in ahead(numbered(num), Recorded())] == list(range(num))


def test_an_error_comes_in_its_turn() -> None:
    def broken() -> Iterator[Fetched]:
        yield from numbered(2)
        raise RuntimeError("torn")

    batches = ahead(broken(), Recorded())
    assert [next(batches)[0]["n"] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="torn"):
        next(batches)


def test_a_cpu_needs_none() -> None:
    """A batch is not even fetched before it is asked for."""
    batches = numbered(2)
    assert lane_to(torch.device("cpu")) is None
    assert ahead(batches, None) is batches


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Ten clips, and broken ones among them."""
    folder = tmp_path_factory.mktemp("clips")
    toys = read_list(write_toyworld(folder, 10, 0, size=32, num_frames=8))
    broken = [Sample(str(path)) for path in write_broken(folder / "broken").values()]
    return [*toys[:4], *broken, *toys[4:]]


def stream(samples: list[Sample], **options: Any) -> Batches:
    return Batches(VideoDataset(samples, CLIP), 3, **options)


@pytest.fixture
def on_a_lane(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    lane = Recorded()
    monkeypatch.setattr(loader, "lane_to", lambda device: lane)
    return lane


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_loaded_than_two_batches_a_worker(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """However long nobody asks: memory is bounded by that."""
    loaded = multiprocessing.get_context("fork").Value("i", 0)
    load = VideoDataset.load

    def counted(self: VideoDataset, epoch: int, index: int) -> dict[str, Any]:
        with loaded.get_lock():
            loaded.value += 1
        return load(self, epoch, index)

    monkeypatch.setattr(VideoDataset, "load", counted)
    with Batches(VideoDataset(samples, CLIP), 2, num_workers=workers) as batches:
        for given in (1, 2, 3):
            next(batches)
            most, until = 2 * (given + 2 * workers), time.monotonic() + 20
            while loaded.value < most and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)  # would more come?
            assert loaded.value == most


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_left_and_taken_up_anywhere(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    plain, skipped = stream(samples), []
    whole = []
    for _ in range(9):
        whole.append(next(plain))
        skipped.append(plain.skipped)
    lane = Recorded()
    monkeypatch.setattr(loader, "lane_to", lambda device: lane)
    for stop in (1, 4):
        with stream(samples, num_workers=workers) as first:
            for n in range(stop):
                assert same_batch(next(first), whole[n])
                # what is broken in the next batch is not yet known, as without the lane
                assert first.skipped == skipped[n]
            state = json.loads(json.dumps(first.state_dict()))
        assert state["position"] == 3 * stop
        with stream(samples, num_workers=workers) as second:
            second.load_state_dict(state)
            assert all(same_batch(next(second), batch) for batch in whole[stop:])
            assert second.skipped == skipped[-1]
    assert lane.events.count("begin") > lane.events.count("receive")


def test_what_a_stage_cannot_use_is_that_of_its_batch(
    samples: list[Sample], on_a_lane: Recorded
) -> None:
    batches = stream(samples[:4], shuffle=False)
    first, named = next(batches), samples[1].path
    first["unusable"][1] = "too long"
    assert batches.skipped == {f"{named} (row 2)": "too long"}
    assert next(batches)["unusable"] == {}
    assert on_a_lane.events.count("begin") == 3


def test_one_pass_ends(samples: list[Sample], on_a_lane: Recorded) -> None:
    batches = stream(samples[:4], shuffle=False, epochs=1)
    assert [batch["sample_ids"].tolist() for batch in batches] == [[0, 1, 2], [3]]


def test_sources_take_turns(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [Sample(str(write_video(tmp_path / f"{i}.mp4", 9))) for i in range(4)]

    def mixed() -> MixedBatches:
        return MixedBatches([stream(samples), stream(long)], [1, 1], seed=2)

    plain = list(itertools.islice(mixed(), 8))
    monkeypatch.setattr(loader, "lane_to", lambda device: Recorded())
    batches = mixed()
    for n, expected in enumerate(plain):
        assert same_batch(next(batches), expected)
        if n == 3:
            state = json.loads(json.dumps(batches.state_dict()))
    again = mixed()
    again.load_state_dict(state)
    assert all(same_batch(next(again), expected) for expected in plain[4:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(samples: list[Sample], workers: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    dataset = VideoDataset(samples, CLIP, device=device)
    with Batches(dataset, 3, num_workers=workers) as batches:
        for expected in itertools.islice(stream(samples), 6):
            batch = next(batches)
            busy = torch.randn(2048, 2048, device=device)
            for _ in range(20):  # while which the next batch is copied
                busy = busy @ busy / 2048
            assert {batch[name].device for name in ("video", "seeds", "ids")} == {device}
            assert same_batch(
                {n: x.cpu() if torch.is_tensor(x) else x for n, x in batch.items()}, expected
            )
