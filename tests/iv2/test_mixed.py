from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from iv2.config import DataConfig, SourceConfig, TrainConfig
from iv2.data.audio import SoundConfig
from iv2.data.clips import Sample, read_list
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.loader import Batches
from iv2.data.mixed import MixedBatches, join_states
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig
from iv2.distributed import World
from iv2.run_data import open_batches, read_sources

SOUND = SoundConfig(seconds=1.0, num_frames=98)
CLIP = ClipConfig(
    num_frames=4,
    sampling="interval",
    crop=CropConfig(kind="centre", size=16, flip=0.0),
    sound=SOUND,
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return read_list(write_toyworld(tmp_path_factory.mktemp("toys"), 6, 0, size=16))


def of_kind(samples: list[Sample], kind: str) -> list[Sample]:
    return [replace(sample, kind=kind) for sample in samples]


def batch_of(samples: list[Sample], kind: str, **options) -> dict:
    dataset = VideoDataset(of_kind(samples, kind), CLIP, **options)
    return next(Batches(dataset, 4, max_bad_fraction=1.0))


def picture(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = 20
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((20, 20, 3), 200, np.uint8), "rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def silent(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_each_kind_has_its_media(toys: list[Sample]) -> None:
    video, audio, both = (batch_of(toys, kind) for kind in ("video", "audio", "audio_video"))
    assert [b["kind"] for b in (video, audio, both)] == ["video", "audio", "audio_video"]
    assert "fbank" not in video
    assert "video" not in audio
    assert audio["fbank"].shape == both["fbank"].shape == (4, 98, 64)
    assert torch.equal(both["video"], video["video"])  # the sound is drawn after the picture
    assert audio["fbank"].abs().sum((1, 2)).min() > 0


def test_caches_change_nothing(toys: list[Sample]) -> None:
    plain, cached = (
        Batches(VideoDataset(of_kind(toys, "audio_video"), CLIP, cache_bytes=size), 6)
        for size in (0, 1 << 24)
    )
    for _ in range(3):
        one, two = next(plain), next(cached)
        assert torch.equal(one["video"], two["video"])
        assert torch.equal(one["fbank"], two["fbank"])


def test_images(tmp_path: Path) -> None:
    sample = Sample(str(picture(tmp_path / "a.png")), kind="image")
    batch = next(Batches(VideoDataset([sample], CLIP), 1))
    assert batch["kind"] == "image"
    assert batch["video"].shape == (1, 3, 1, 16, 16)
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(sample.path).read_bytes()[:60])
    batches = Batches(VideoDataset([sample, Sample(str(torn), kind="image")], CLIP), 2)
    assert next(batches)["paths"] == [sample.path] * 2
    assert list(batches.skipped) == [str(torn)]


def test_what_lacks_sound_or_picture_is_skipped_and_listed(
    tmp_path: Path, toys: list[Sample]
) -> None:
    mute = Sample(str(silent(tmp_path / "mute.mp4")), kind="audio_video")
    batches = Batches(VideoDataset([*of_kind(toys, "audio_video"), mute], CLIP), 7)
    assert mute.path not in next(batches)["paths"]
    assert batches.skipped == {mute.path: "no sound"}
    dark = tmp_path / "dark.wav"
    with av.open(str(dark), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), "s16", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for kind, bad in (("audio_video", [str(dark)]), ("audio", [])):
        samples = [*of_kind(toys, kind), Sample(str(dark), kind=kind)]
        batches = Batches(VideoDataset(samples, CLIP), 7)
        next(batches)
        assert list(batches.skipped) == bad


def test_ids_differ_between_lists_and_are_shared_by_rows_of_one_id(toys: list[Sample]) -> None:
    named = [replace(s, id=str(i // 2)) for i, s in enumerate(toys)]
    ids = [VideoDataset(toys, CLIP, name=name).ids for name in ("a", "b")]
    assert len({*ids[0], *ids[1]}) == 12
    some = [toys[0], toys[1], replace(toys[2], id="0")]  # not the first row
    assert len(set(VideoDataset(some, CLIP, name="a").ids)) == 3
    grouped = VideoDataset(named, CLIP, name="a").ids
    assert len(set(grouped)) == 3
    assert grouped[0] == grouped[1] != grouped[2]
    batch = next(Batches(VideoDataset(named, CLIP, name="a"), 6))
    for number, place in zip(batch["ids"].tolist(), batch["sample_ids"].tolist(), strict=True):
        assert number == grouped[place]


def test_kinds_of_one_data_set_are_one(toys: list[Sample]) -> None:
    with pytest.raises(ValueError, match="samples must be of one kind, got audio, video"):
        VideoDataset([toys[0], *of_kind(toys[1:], "audio")], CLIP)
    with pytest.raises(ValueError, match="sound must be configured for audio, got None"):
        VideoDataset(of_kind(toys, "audio"), replace(CLIP, sound=None))


def mixed(
    toys: list[Sample], rank: int = 0, world: int = 1, size: int = 2, **options
) -> MixedBatches:
    sources = [
        Batches(VideoDataset(of_kind(toys, kind), CLIP, name=kind), size, rank=rank, world=world)
        for kind in ("video", "audio")
    ]
    return MixedBatches(sources, **options)


def test_ranks_take_the_same_source_in_each_step(toys: list[Sample]) -> None:
    first, second = (mixed(toys, rank, 2, seed=5) for rank in range(2))
    for _ in range(12):
        one, two = next(first), next(second)
        assert one["kind"] == two["kind"]
        assert not set(one["seeds"].tolist()) & set(two["seeds"].tolist())
    assert first.position == second.position == 48


def test_weights(toys: list[Sample]) -> None:
    batches = mixed(toys, weights=[3, 1], seed=1)
    counts = Counter(batches.source_of(step) for step in range(4000))
    assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03)
    orders = [[mixed(toys, seed=s).source_of(i) for i in range(50)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_resume_anywhere(toys: list[Sample]) -> None:
    straight, left = mixed(toys), mixed(toys)
    expected = [next(straight) for _ in range(9)]
    for _ in range(4):
        next(left)
    state = json.loads(json.dumps(left.state_dict()))
    resumed = mixed(toys)
    resumed.load_state_dict(state)
    for batch in expected[4:]:
        again = next(resumed)
        assert again["kind"] == batch["kind"]
        assert torch.equal(again["seeds"], batch["seeds"])
    with pytest.raises(ValueError, match="seed must be 3 as in this run, got 0"):
        mixed(toys, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"weights must be \[1.0, 2.0\] as in this run, got"):
        mixed(toys, weights=[1, 2]).load_state_dict(state)
    alone = MixedBatches(resumed.sources[:1])
    with pytest.raises(ValueError, match="sources must be 1 as in this run, got 2"):
        alone.load_state_dict(state)


def test_resume_with_another_number_of_ranks(toys: list[Sample]) -> None:
    """The same clips in each step; what either rank could not use is known to the one."""
    ranks = [mixed(toys, rank, 2) for rank in range(2)]
    for rank in ranks:
        for _ in range(3):
            next(rank)
    ranks[0].sources[0]._bad[1] = ("a.mp4", "torn")
    ranks[1].sources[0]._bad[2] = ("b.mp4", "torn")
    ranks[1].sources[1]._bad[3] = ("c.mp4", "no sound")
    states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
    one = mixed(toys, size=4)
    one.load_state_dict(join_states(states))
    assert one.skipped == {"a.mp4": "torn", "b.mp4": "torn", "c.mp4": "no sound"}
    for _ in range(6):
        left, right, both = next(ranks[0]), next(ranks[1]), next(one)
        assert torch.equal(both["seeds"], torch.cat([left["seeds"], right["seeds"]]))
        assert both["paths"] == left["paths"] + right["paths"]


def test_mixed_errors(toys: list[Sample]) -> None:
    with pytest.raises(ValueError, match="sources must be of one batch size, got none"):
        MixedBatches([])
    sizes = [Batches(VideoDataset(toys, CLIP), n) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"sources must be of one batch size, got \[1, 2\]"):
        MixedBatches(sizes)
    with pytest.raises(ValueError, match="weights must be 2 positive numbers, got"):
        mixed(toys, weights=[1, 0])


def test_sources_of_a_run(tmp_path: Path) -> None:
    listing = str(write_toyworld(tmp_path, 4, 0, size=16))
    sources = (
        SourceConfig(listing, "video", 2.0, num_frames=2),
        SourceConfig(listing, "audio_video"),
    )
    config = TrainConfig(data=DataConfig(sources=sources, clip=CLIP, batch_size=2, num_workers=0))
    found = read_sources(config)
    assert [samples[0].kind for samples in found] == ["video", "audio_video"]
    with open_batches(config, found, World()) as batches:
        assert len(batches.dataset) == 8
        shapes = {(b["kind"], b["video"].shape[2]) for b in (next(batches) for _ in range(8))}
        assert shapes == {("video", 2), ("audio_video", 4)}
    with pytest.raises(ValueError, match=r"data.path must be a folder of videos or a list"):
        read_sources(replace(config, data=DataConfig()))
