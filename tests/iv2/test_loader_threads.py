"""Without workers the files of a batch are read by several threads, and nothing else changes."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media import same_batch, write_broken, write_video

from iv2.data import dataset as dataset_module
from iv2.data.audio import SoundConfig
from iv2.data.cache import SoundCache
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.loader import Batches
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig, look

CLIP = ClipConfig(
    num_frames=4, crop=CropConfig(size=16), sound=SoundConfig(seconds=0.5, num_frames=48)
)
TILED = replace(CLIP, crop=CropConfig("whole", 24, flip=0.0), normalise=False, tiles=4)
NAME = "iv2-read"  # of the threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten toy clips and five broken files."""
    folder = tmp_path_factory.mktemp("clips")
    write_toyworld(folder, 10, 0, size=32, num_frames=8)
    write_broken(folder / "broken")
    return folder


def samples(folder: Path, kind: str) -> list[Sample]:
    toys = read_list(folder / "list.jsonl", kind)
    broken = [Sample(str(path), kind=toys[0].kind) for path in (folder / "broken").iterdir()]
    return [*toys[:4], *sorted(broken, key=lambda s: s.path), *toys[4:]]


def stream(clips: list[Sample], threads: int, clip: ClipConfig = CLIP, **options: Any) -> Batches:
    """Batches of four; the threads are started by the first."""
    torch.set_num_threads(threads)
    return Batches(VideoDataset(clips, clip, **options), 4)


_OTHERS: set[threading.Thread] = set()  # of streams that earlier tests have not dropped


@pytest.fixture(autouse=True)
def others() -> None:
    _OTHERS.clear()
    _OTHERS.update(threading.enumerate())


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(NAME) and t not in _OTHERS]


@pytest.mark.parametrize("cache", [0, 200_000, 10**7])
@pytest.mark.parametrize(
    ("kind", "clip"), [("video", CLIP), ("audio_video", CLIP), ("video", TILED)]
)
def test_threads_change_nothing(folder: Path, kind: str, clip: ClipConfig, cache: int) -> None:
    """To the last bit, broken clips and the report of them included."""
    clips, taken = samples(folder, kind), []
    for threads in (1, 3):
        with stream(clips, threads, clip, cache_bytes=cache) as batches:
            found = list(itertools.islice(batches, 9))
            assert len(readers()) == (0 if threads == 1 else threads)
            taken.append((found, list(batches.skipped.items()), batches.state_dict()))
    assert all(same_batch(a, b) for a, b in zip(taken[0][0], taken[1][0], strict=True))
    assert taken[0][1:] == taken[1][1:]
    assert len(taken[0][1]) == 5


def test_clips_are_read_side_by_side_and_computed_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, computed = threading.Barrier(2, timeout=20), []
    fetch = VideoDataset.fetch

    def met(self: VideoDataset, epoch: int, index: int) -> dict[str, Any]:
        meeting.wait()  # for another clip, which one thread would never read
        assert threading.current_thread().name.startswith(NAME)
        return fetch(self, epoch, index)

    def here(*arguments: Any, **options: Any) -> torch.Tensor:
        computed.append(threading.current_thread())
        return look(*arguments, **options)

    monkeypatch.setattr(VideoDataset, "fetch", met)
    monkeypatch.setattr(dataset_module, "look", here)
    clips = read_list(folder / "list.jsonl")
    with stream(clips, 2) as batches:
        next(batches)
    assert computed == [threading.main_thread()] * 4


def test_what_is_kept_needs_no_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = read_list(folder / "list.jsonl", "audio_video")[:4]
    used: list[str] = []
    fetch = VideoDataset.fetch

    def noted(self: VideoDataset, epoch: int, index: int) -> dict[str, Any]:
        used.append(threading.current_thread().name.partition("_")[0])
        return fetch(self, epoch, index)

    monkeypatch.setattr(VideoDataset, "fetch", noted)
    main = threading.current_thread().name
    with stream(clips, 2, cache_bytes=10**7) as batches:
        for name in (NAME, main, main):
            next(batches)
            assert used == [name] * 4
            used.clear()
    texts = [Sample("", kind="text") for _ in range(8)]
    with stream(texts, 2) as batches:
        next(batches)
    assert used == [main] * 4


def test_only_the_readers_have_one_thread_each(folder: Path) -> None:
    def asked(numbers: list[int]) -> threading.Thread:
        thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return thread

    counts: list[int] = []
    with stream(read_list(folder / "list.jsonl"), 2) as batches:
        next(batches)
        keyed = batches._batches._dataset  # type: ignore[union-attr]
        assert set(keyed._readers.map(lambda _: torch.get_num_threads(), range(8))) == {1}
        asked(counts)
        assert counts == [2]
        assert torch.get_num_threads() == 2
        assert len(readers()) == 2
    del keyed
    until = time.monotonic() + 20
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    assert readers() == []


def test_an_error_is_that_of_the_first_clip_that_has_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = VideoDataset._read

    def torn(self: VideoDataset, index: int, rng: Any) -> dict[str, Any]:
        if index in (1, 2):
            time.sleep(0.1 * (index == 1))
            raise TypeError(f"a bug in {index}")
        return read(self, index, rng)

    monkeypatch.setattr(VideoDataset, "_read", torn)
    clips = read_list(folder / "list.jsonl")
    torch.set_num_threads(3)
    batches = Batches(VideoDataset(clips, CLIP), 4, shuffle=False)
    with pytest.raises(TypeError, match="a bug in 1"):
        next(batches)
    monkeypatch.undo()
    broken = [Sample(str(path)) for path in (folder / "broken").iterdir()]
    with pytest.raises(RuntimeError, match="data: 32 clips in a row cannot be read"):
        next(stream(broken, 3))


def test_a_sound_counts_once() -> None:
    cache, wave = SoundCache(100), torch.arange(20, dtype=torch.int16)
    for index in (0, 0, 1, 2):  # of which two fit
        cache.put(index, wave)
    assert [cache.get(index) is not None for index in range(3)] == [True, True, False]
    sent = pickle.loads(pickle.dumps(cache))  # as to a worker that is not forked
    assert sent.get(0) is None
    sent.put(2, wave)
    assert torch.equal(sent.get(2), wave)


def test_a_clip_in_several_places_of_a_batch(tmp_path: Path) -> None:
    """Several threads may read and keep it at once."""
    one = Sample(str(write_video(tmp_path / "a.mp4", 12)))
    rows = [one] * 8
    plain = list(itertools.islice(stream(rows, 1), 4))
    with stream(rows, 3, cache_bytes=10**7) as batches:
        assert all(same_batch(next(batches), expected) for expected in plain)
