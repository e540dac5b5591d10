from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media import numbers, same_batch, write_broken, write_video

from iv2.data import dataset as dataset_module
from iv2.data.cache import FrameCache
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig, VideoDataset, sample_key
from iv2.data.decode import Video
from iv2.data.loader import Batches
from iv2.data.mixed import MixedBatches
from iv2.data.synthetic import write_toyworld
from iv2.data.tiles import tiles
from iv2.data.transforms import CropConfig

CONFIG = ClipConfig(num_frames=4, crop=CropConfig(size=16))
PLAIN = ClipConfig(
    num_frames=4, random=False, crop=CropConfig("whole", 48, flip=0.0), normalise=False
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("toys")
    return read_list(write_toyworld(folder, 10, 0, size=32, num_frames=8))


def take(batches: Batches, num: int) -> list[dict[str, Any]]:
    return list(itertools.islice(batches, num))


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    """Whether the batches agree to the last bit."""
    return len(one) == len(two) and all(map(same_batch, one, two))


def test_batch(toys: list[Sample]) -> None:
    batch = next(Batches(VideoDataset(toys, CONFIG), 3))
    assert batch["video"].shape == (3, 3, 4, 16, 16)
    assert batch["video"].dtype == torch.float32
    assert batch["video"].abs().max() < 3
    assert batch["kind"] == "video"
    for name in ("seeds", "sample_ids", "ids", "labels"):
        assert batch[name].shape == (3,)
        assert batch[name].dtype == torch.int64
    for place, index in enumerate(batch["sample_ids"].tolist()):
        assert batch["paths"][place] == toys[index].path
        assert batch["captions"][place] == toys[index].captions
        assert batch["attributes"][place] == toys[index].attributes
        assert batch["labels"][place] == toys[index].label
    unlabelled = VideoDataset([Sample(toys[0].path), toys[1]], CONFIG)
    assert "labels" not in next(Batches(unlabelled, 2))


def talk(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}]


def test_messages_travel_with_their_clips(toys: list[Sample]) -> None:
    samples = [replace(s, messages=talk(f"number {i}")) for i, s in enumerate(toys)]
    for batch in take(Batches(VideoDataset(samples, CONFIG), 3), 4):
        for index, messages in zip(batch["sample_ids"].tolist(), batch["messages"], strict=True):
            assert messages == talk(f"number {index}")
    assert next(Batches(VideoDataset(toys, CONFIG), 2))["messages"] == [[], []]


def test_batches_of_text_open_nothing() -> None:
    samples = [Sample("", kind="text", messages=talk(str(i))) for i in range(5)]
    for workers in (0, 1):
        dataset = VideoDataset(samples, CONFIG, cache_bytes=10**6)
        with Batches(dataset, 2, num_workers=workers, epochs=1, shuffle=False) as batches:
            found = list(batches)
        assert [m[1]["content"] for b in found for m in b["messages"]] == list("01234")
        assert {b["kind"] for b in found} == {"text"}
        assert all("video" not in b and "fbank" not in b for b in found)
        assert batches.skipped == {}


def test_text_and_video_take_turns(toys: list[Sample]) -> None:
    texts = [Sample("", kind="text", messages=talk(str(i))) for i in range(6)]
    sources = [Batches(VideoDataset(s, CONFIG), 2) for s in (toys, texts)]
    kinds = {b["kind"]: b for b in take(MixedBatches(sources, seed=1), 12)}
    assert set(kinds) == {"text", "video"}
    assert "video" in kinds["video"]
    assert "video" not in kinds["text"]


def test_a_position_is_of_one_list_of_texts() -> None:
    def batches(word: str) -> Batches:
        samples = [Sample("", kind="text", messages=talk(f"{word}{i}")) for i in range(4)]
        return Batches(VideoDataset(samples, CONFIG), 2)

    state = batches("a").state_dict()
    batches("a").load_state_dict(state)
    with pytest.raises(ValueError, match="digest must be"):
        batches("b").load_state_dict(state)


def test_what_a_stage_cannot_use_is_listed_and_counted(toys: list[Sample]) -> None:
    """Several conversations on one clip, and texts, are told apart by their rows."""
    samples = [replace(toys[0], messages=talk(f"number {i}")) for i in range(4)]

    def stream(**options: Any) -> Batches:
        dataset = VideoDataset(samples, CONFIG, name="asked.jsonl")
        return Batches(dataset, 2, shuffle=False, **({"max_bad_fraction": 1.0} | options))

    batches = stream()
    first = next(batches)
    assert first["unusable"] == {}
    first["unusable"][1] = "too long"
    named = {f"{toys[0].path} (row 2 of asked.jsonl)": "too long"}
    assert batches.skipped == named  # at once: a run's last batch has none after it
    second = next(batches)
    assert second["unusable"] == {}
    second["unusable"] |= {0: "far too long", 1: "too long"}
    state = json.loads(json.dumps(batches.state_dict()))
    assert [row[0] for row in state["skipped"]] == [1, 2, 3]
    again = stream()
    again.load_state_dict(state)
    assert again.skipped == batches.skipped
    assert list(again.skipped.values()) == ["too long", "far too long", "too long"]
    # what comes next does not change
    batches.load_state_dict(again.state_dict())
    plain = take(stream(), 3)
    assert same([next(batches)], plain[2:])
    # too many of them stop the run
    strict = stream(max_bad_fraction=0.4)
    next(strict)["unusable"] |= {0: "too long", 1: "too long"}
    with pytest.raises(RuntimeError, match=r"2 of 4 clips cannot be used.*\(row 2 of .*too long"):
        next(strict)
    texts = [Sample("", kind="text", messages=talk(str(i))) for i in range(2)]
    mixed = MixedBatches([Batches(VideoDataset(texts, CONFIG), 2, shuffle=False)])
    next(mixed)["unusable"][1] = "too long"
    assert mixed.skipped == {"row 2": "too long"}


def test_tiles_are_those_of_each_clip(tmp_path: Path) -> None:
    """Clips of one batch have different numbers of views: those that `iv2 chat` looks at."""
    sizes = {"wide": (32, 64), "square": (48, 48), "small": (24, 24), "high": (96, 32)}
    samples = [
        Sample(str(write_video(tmp_path / f"{name}.mp4", 12, height=height, width=width)))
        for name, (height, width) in sizes.items()
    ]
    config = replace(PLAIN, crop=CropConfig("whole", 24, flip=0.0), tiles=6)
    for workers in (0, 1):
        dataset = VideoDataset(samples, config, cache_bytes=10**6)
        with Batches(dataset, 4, shuffle=False, num_workers=workers) as batches:
            batch = next(batches)
        assert batch["views"] == [3, 5, 1, 4]
        assert batch["video"].shape == (13, 4, 24, 24, 3)
        assert batch["video"].dtype == torch.uint8
        assert len(batch["seeds"]) == 4
    whole = VideoDataset(samples, replace(PLAIN, crop=CropConfig("whole", 24, flip=0.0)))
    parts = torch.split(batch["video"], batch["views"])
    for index, (sample, part) in enumerate(zip(samples, parts, strict=True)):
        with Video(sample.path) as video:
            frames = video.frames([1, 4, 7, 10])
        assert torch.equal(part, tiles(frames, 6, 24))
        # the last view is the whole, here by another resize
        plain = whole.load(0, index)["video"].float()
        assert (part[-1].float() - plain).abs().mean() < 8
    assert "views" not in next(Batches(whole, 2))


def test_uint8_frames_are_those_of_the_rule(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, width=72)
    sample = Sample(str(path), start=2.0, end=4.4)  # frames 20 ... 43
    for cache in (0, 10**7):
        dataset = VideoDataset([sample], PLAIN, cache_bytes=cache)
        for _ in range(2):
            video = dataset.load(0, 0)["video"]
            assert video.shape == (4, 48, 48, 3)
            assert numbers(video) == [23, 29, 35, 41]


def test_each_epoch_has_every_clip_once_in_a_new_order(toys: list[Sample]) -> None:
    ids = torch.cat([b["sample_ids"] for b in take(Batches(VideoDataset(toys, CONFIG), 4), 5)])
    assert sorted(ids[:10].tolist()) == list(range(10))
    assert sorted(ids[10:].tolist()) == list(range(10))
    assert ids[:10].tolist() != ids[10:].tolist()
    other = take(Batches(VideoDataset(toys, CONFIG, seed=1), 10), 1)[0]["sample_ids"]
    assert other.tolist() != ids[:10].tolist()


def test_draws_differ_between_epochs_and_samples(toys: list[Sample]) -> None:
    dataset = VideoDataset(toys, CONFIG)
    seeds = {dataset.load(epoch, index)["seed"] for epoch in range(5) for index in range(10)}
    assert len(seeds) == 50
    videos = [dataset.load(epoch, 3)["video"] for epoch in range(4)]
    assert len({video.sum().item() for video in videos}) > 1
    assert torch.equal(videos[2], dataset.load(2, 3)["video"])


def test_workers_and_cache_change_nothing(toys: list[Sample]) -> None:
    reference = take(Batches(VideoDataset(toys, CONFIG), 3), 9)
    for workers, cache in ((0, 10**7), (1, 0), (2, 0), (2, 10**7), (2, 50_000)):
        dataset = VideoDataset(toys, CONFIG, cache_bytes=cache)
        with Batches(dataset, 3, num_workers=workers) as batches:
            assert same(take(batches, 9), reference)


def test_ranks_divide_the_global_batch(toys: list[Sample]) -> None:
    whole = take(Batches(VideoDataset(toys, CONFIG), 4), 6)
    parts = [take(Batches(VideoDataset(toys, CONFIG), 2, rank=r, world=2), 6) for r in (0, 1)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(one["video"], torch.cat([left["video"], right["video"]]))
        assert one["paths"] == left["paths"] + right["paths"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_anywhere(toys: list[Sample], workers: int) -> None:
    dataset = VideoDataset(toys, CONFIG, cache_bytes=10**7)
    whole = take(Batches(dataset, 3), 8)
    with Batches(dataset, 3, num_workers=workers) as first:
        take(first, 5)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["position"] == 15
    second = Batches(VideoDataset(toys, CONFIG), 3, num_workers=workers)
    second.load_state_dict(state)
    assert same(take(second, 3), whole[5:])
    second.load_state_dict(state)  # also in the middle of a stream
    assert same(take(second, 1), whole[5:6])
    second.close()
    assert same(take(second, 2), whole[6:])  # a closed stream goes on
    second.close()


def test_resume_with_another_number_of_ranks(toys: list[Sample]) -> None:
    whole = take(Batches(VideoDataset(toys, CONFIG), 4), 4)
    state = Batches(VideoDataset(toys, CONFIG), 4).state_dict() | {"position": 8}
    for rank in (0, 1):
        batches = Batches(VideoDataset(toys, CONFIG), 2, rank=rank, world=2)
        batches.load_state_dict(state)
        batch = next(batches)
        assert torch.equal(batch["video"], whole[2]["video"][2 * rank : 2 * rank + 2])


def test_resume_with_other_data_is_refused(toys: list[Sample]) -> None:
    state = Batches(VideoDataset(toys, CONFIG), 2).state_dict()
    for dataset, name in (
        (VideoDataset(toys, CONFIG, seed=1), "seed"),
        (VideoDataset(toys[:-1], CONFIG), "samples"),
        (VideoDataset(toys[::-1], CONFIG), "digest"),
    ):
        with pytest.raises(ValueError, match=f"Batches: {name} must be"):
            Batches(dataset, 2).load_state_dict(state)


def test_the_global_generator_is_left_alone(toys: list[Sample]) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        with Batches(VideoDataset(toys, CONFIG), 2, num_workers=workers) as batches:
            take(batches, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_in_list_order(toys: list[Sample], workers: int) -> None:
    batches = Batches(VideoDataset(toys, CONFIG), 4, shuffle=False, epochs=1, num_workers=workers)
    ids = [batch["sample_ids"].tolist() for batch in batches]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches.wait_seconds > 0
    batches.close()


def test_a_batch_may_be_larger_than_the_data(toys: list[Sample]) -> None:
    batch = next(Batches(VideoDataset(toys[:3], CONFIG), 8))
    assert batch["video"].shape[0] == 8
    assert len(set(batch["seeds"].tolist())) == 8


def broken_folder(folder: Path, good: int = 6) -> list[Sample]:
    write_broken(folder)
    for i in range(good):
        write_video(folder / f"good{i}.mp4", 12)
    return read_list(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_replaced_and_reported(tmp_path: Path, workers: int) -> None:
    samples = broken_folder(tmp_path)
    with Batches(VideoDataset(samples, CONFIG), 4, num_workers=workers) as batches:
        batches_seen = take(batches, 6)
        paths = {path for batch in batches_seen for path in batch["paths"]}
        assert paths == {s.path for s in samples if "good" in s.path}
        reasons = {Path(path).stem: reason for path, reason in batches.skipped.items()}
        assert set(reasons) == {"text", "truncated", "empty", "audio", "one"}
        assert reasons["one"] == "too short: 1 frame, need 4"
        assert reasons["audio"] == "no video stream"
        assert "empty" in reasons["empty"]
        state = batches.state_dict()
    fresh = Batches(VideoDataset(samples, CONFIG), 4)
    assert same(take(fresh, 6), batches_seen)  # in another process, with other failures known
    again = Batches(VideoDataset(samples, CONFIG), 4)
    again.load_state_dict(state)
    assert again.skipped == fresh.skipped


def test_a_short_clip_may_be_allowed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", 1)
    config = ClipConfig(num_frames=4, min_frames=1, crop=CropConfig(size=16))
    video = VideoDataset([Sample(str(path))], config).load(0, 0)["video"]
    assert torch.equal(video[:, 0], video[:, 3])


def test_times_without_frames_are_too_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12)
    samples = [Sample(str(path), start=5.0), Sample(str(path))]
    item = VideoDataset(samples, CONFIG).load(0, 0)
    assert item["sample_id"] == 1
    assert item["skipped"][0] == (0, str(path), "too short: 0 frames, need 4")


def test_too_many_broken_files_stop_the_run(tmp_path: Path) -> None:
    samples = broken_folder(tmp_path)
    batches = Batches(VideoDataset(samples, CONFIG), 4, max_bad_fraction=0.2)
    with pytest.raises(RuntimeError, match=r"data: [3-5] of 11 clips cannot be used, .* 20%"):
        take(batches, 6)


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    samples = [Sample(str(path)) for path in write_broken(tmp_path).values()]
    with pytest.raises(RuntimeError, match="data: 32 clips in a row cannot be read"):
        next(Batches(VideoDataset(samples, CONFIG), 1))


def test_videos_of_left_and_right_are_not_mirrored(toys: list[Sample]) -> None:
    always = ClipConfig(num_frames=4, random=False, crop=CropConfig("whole", 32, flip=1.0))
    plain = VideoDataset([toys[0]], always).load(0, 0)["video"]
    ssv2 = Sample(toys[0].path, attributes={"source": "ssv2"})
    kept = VideoDataset([ssv2], always).load(0, 0)["video"]
    assert torch.equal(kept, plain.flip(-1))


def test_short_side(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, height=96, width=144)
    config = ClipConfig(num_frames=4, short_side=24, crop=CropConfig("whole", 24), normalise=False)
    dataset = VideoDataset([Sample(str(path))], config, cache_bytes=10**6)
    assert dataset.load(0, 0)["video"].shape == (4, 24, 24, 3)
    assert dataset._cache is not None
    kept = dataset._cache.get(0)
    assert kept is not None
    assert kept.shape == (12, 24, 36, 3)


def test_rows_of_one_clip_are_decoded_once(toys: list[Sample], monkeypatch) -> None:
    """But another part of the file is another clip."""
    part = replace(toys[0], start=0.5, end=1.5)
    rows = [toys[0], toys[1], replace(toys[0], label=3), part]
    opened = []

    def video(path, **options):
        opened.append(path)
        return Video(path, **options)

    dataset, plain = (VideoDataset(rows, CONFIG, cache_bytes=n) for n in (10**7, 0))
    expected = [plain.load(0, i) for i in range(4)]
    monkeypatch.setattr(dataset_module, "Video", video)
    for epoch in range(2):
        for i in range(4):
            got = dataset.load(0, i)
            assert torch.equal(got["video"], expected[i]["video"])
        assert opened == [toys[0].path, toys[1].path, toys[0].path], epoch


def test_cache_is_bounded_and_shared_with_forked_processes() -> None:
    cache = FrameCache(4, 100)
    frames = torch.arange(48, dtype=torch.uint8).view(2, 2, 4, 3)
    if (child := os.fork()) == 0:
        cache.put(1, frames)
        os._exit(0)
    os.waitpid(child, 0)
    kept = cache.get(1)
    assert kept is not None
    assert torch.equal(kept, frames)
    cache.put(0, frames)
    cache.put(2, frames)  # 144 bytes in all
    assert cache.get(0) is not None
    assert cache.get(2) is None
    assert cache.get(3) is None
    cache.put(1, frames + 1)  # the first one stays
    assert torch.equal(kept, frames)
    assert pickle.loads(pickle.dumps(cache)).get(1) is None


def test_no_deadlock_after_parallel_work(toys: list[Sample]) -> None:
    """Forked workers run although OpenMP threads exist in the parent."""
    code = (
        "import sys, torch\n"
        "from iv2.data.clips import read_list\n"
        "from iv2.data.dataset import ClipConfig, VideoDataset\n"
        "from iv2.data.loader import Batches\n"
        "from iv2.data.transforms import CropConfig, View, Box, look\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(500, 500, requires_grad=True)\n"
        "(x @ x).exp().sum().backward()\n"
        "look(torch.zeros(8, 64, 64, 3, dtype=torch.uint8), View(Box(0, 0, 64, 64), (32, 32)))\n"
        "dataset = VideoDataset(read_list(sys.argv[1]), ClipConfig(4, crop=CropConfig(size=16)))\n"
        "batches = Batches(dataset, 2, num_workers=2)\n"
        "print(sum(next(batches)['video'].shape[0] for _ in range(5)))\n"
    )
    listing = Path(toys[0].path).parents[1] / "list.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", code, str(listing)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "10", result.stderr


def test_a_crash_in_a_worker_is_not_a_broken_clip(
    toys: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(dataset_module, "look", fail)
    with (
        Batches(VideoDataset(toys, CONFIG), 2, num_workers=1) as batches,
        pytest.raises(TypeError, match="a bug"),
    ):
        next(batches)


def test_keys_are_spread() -> None:
    parts = itertools.product((-1, 0, 1), range(10), range(10))
    keys = {sample_key(*part) for part in parts}
    assert len(keys) == 300
    assert all(0 <= key < 2**64 for key in keys)
    assert sample_key(1, 2) != sample_key(2, 1)
    assert sample_key(0, 1, 2) == 0xF4F373571B7FEB84  # runs must resume with later versions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Batches(d, 0), "batch_size must be at least 1, got 0"),
        (lambda d: Batches(d, 1, rank=1), r"rank must be in \[0, 1\), got 1"),
        (lambda d: Batches(d, 1, num_workers=-1), "num_workers must be >= 0, got -1"),
        (lambda d: VideoDataset([], CONFIG), "samples must be at least one clip, got none"),
        (lambda d: ClipConfig(sampling="x"), "sampling must be tsn, sparse or interval, got 'x'"),
        (lambda d: ClipConfig(num_frames=0), "num_frames must be at least 1, got 0"),
        (lambda d: ClipConfig(min_frames=-1), "min_frames must be >= 0, got -1"),
        (lambda d: ClipConfig(short_side=-1), "short_side must be >= 0, got -1"),
        (lambda d: replace(PLAIN, tiles=0), "tiles must be at least 1 or None, got 0"),
        (lambda d: replace(PLAIN, tiles=6, normalise=True), "tiles must be None unless .* got 6"),
        (lambda d: replace(CONFIG, tiles=6, normalise=False), "crop.kind is whole, crop.flip 0"),
        (
            lambda d: replace(CONFIG, short_side=9, decoder="dali"),
            "unless short_side is 0",
        ),
        (lambda d: replace(CONFIG, normalise=False, decoder="dali"), "normalise True and tiles"),
    ],
)
def test_bad_arguments(toys: list[Sample], make: Any, message: str) -> None:
    dataset = VideoDataset(toys, CONFIG)
    with pytest.raises(ValueError, match=message):
        make(dataset)


@pytest.mark.parametrize("sampling", ["tsn", "sparse", "interval"])
@pytest.mark.parametrize("random", [True, False])
def test_every_rule_loads(toys: list[Sample], sampling: Any, random: bool) -> None:
    config = ClipConfig(4, sampling, random, CropConfig(size=16))
    assert VideoDataset(toys, config).load(0, 0)["video"].shape == (3, 4, 16, 16)
