"""DALI's clips against PyAV's frames and our own crop and resize; skipped without DALI."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import real_clip, with_display_matrix, write_video
from torch import Tensor

from iv2.config import DataConfig, TrainConfig
from iv2.config_json import from_dict, to_dict
from iv2.data import dali
from iv2.data.audio import SoundConfig
from iv2.data.clips import Sample, read_list, tsn_indices
from iv2.data.dali import Clip, augment, clip, load
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.decode import Backend, DecodeError, Video
from iv2.data.loader import Batches
from iv2.data.proxy import ProxyConfig, write_proxy
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import Box, CropConfig, View, draw_view, look
from iv2.distributed import World
from iv2.run_data import open_batches, read_sources
from iv2kernels.ops.patch_embed import IMAGENET_STD

VP9: dict[str, Any] = {
    "codec": "libvpx-vp9",
    "options": {"g": "12", "cpu-used": "8", "crf": "20"},
}
WHOLE = View(Box(0, 0, 48, 72), (24, 24))
# Of 255. The same frames: where the filter reaches over the edge of the box, DALI repeats the edge
# and we drop what is outside. Decoders turn colours into RGB differently, most where colours meet.
INSIDE_MOST, EDGE_MOST, DECODED_MEAN, DECODED_FRAME = 0.5, 12.0, 1.5, 3.0


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        dali.dynamic_mode()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of real clips, as `iv2 shard` writes them for DALI, and one of motion JPEGs."""
    folder = tmp_path_factory.mktemp("files")
    made = [folder / "bikes.webm", folder / "carphone.webm"]
    config = ProxyConfig(codec="vp9", size=128)
    for path, name in zip(made, ("bikes.mp4", "carphone_pristine.mp4"), strict=True):
        write_proxy(str(real_clip(name)), 0, 1, path, config)
    return [*made, write_video(folder / "bars.avi", 25, codec="mjpeg", options={"q": "4"})]


def draw(
    video: Video, config: CropConfig, seed: int, index: int, num_frames: int = 4
) -> tuple[list[int], View]:
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    info = video.info()
    indices = tsn_indices(info.num_frames, num_frames, rng)
    return indices, draw_view(config, info.height, info.width, rng)


def clips_of(files: Sequence[Path], config: CropConfig, seed: int = 0) -> list[Clip]:
    made = []
    for index, path in enumerate(files):
        with Video(path.read_bytes(), path.name) as video:
            made.append(clip(video, *draw(video, config, seed, index)))
    return made


def ours(files: Sequence[Path], clips: Sequence[Clip]) -> Tensor:  # [B, 3, T, h, w]
    shown = []
    for path, c in zip(files, clips, strict=True):
        with Video(path) as video:
            shown.append(look(video.frames(c.indices), c.view))
    return torch.stack(shown)


def levels(difference: Tensor) -> Tensor:
    """Of 255, from normalised values [B, 3, T, h, w]."""
    return 255 * difference.abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)


CROPS = [
    CropConfig("multiscale", 112),
    CropConfig("resized", 64, scale=(0.3, 1.0), interpolation="bicubic"),
    CropConfig("whole", 96, flip=1.0),
]


@pytest.mark.parametrize("config", CROPS, ids=lambda c: c.kind)
def test_clips_are_those_of_pyav(files: list[Path], config: CropConfig) -> None:
    clips = clips_of(files, config)
    got, expected = load(clips), ours(files, clips)
    assert got.shape == expected.shape == (3, 3, 4, config.size, config.size)
    assert got.dtype == torch.float32
    difference = levels(got - expected).mean((1, 3, 4))  # [B, T]
    print(f"decoded: mean {difference.mean():.3f}, worst frame {difference.max():.3f} of 255")
    assert difference.mean() < DECODED_MEAN
    assert difference.max() < DECODED_FRAME


@pytest.mark.parametrize("config", CROPS, ids=lambda c: c.kind)
def test_views_of_the_same_frames_are_ours(files: list[Path], config: CropConfig) -> None:
    clips, frames = clips_of(files, config, seed=1), []
    for path, c in zip(files, clips, strict=True):
        with Video(path) as video:
            frames.append(video.frames(c.indices))
    difference = levels(augment(frames, [c.view for c in clips]) - ours(files, clips))
    inside = difference[..., 2:-2, 2:-2]
    print(
        f"same frames: mean {difference.mean():.4f}, worst pixel {difference.max():.3f}, "
        f"inside {inside.max():.4f} of 255"
    )
    assert inside.max() < INSIDE_MOST
    assert difference.max() < EDGE_MOST


def test_a_clip_does_not_depend_on_its_batch(files: list[Path]) -> None:
    clips = clips_of(files, CROPS[0])
    every, again = load(clips), load(clips_of(files[1:], CROPS[0])[:1] + clips[::-1])
    assert torch.equal(again[1:].flip(0), every)
    assert not torch.equal(again[0], every[1])  # another sample number, another draw


def test_what_dali_cannot_take_is_refused(tmp_path: Path) -> None:
    h264 = write_video(tmp_path / "a.mp4", 5)
    vp9 = write_video(tmp_path / "b.mp4", 5, **VP9)
    turned = with_display_matrix(vp9, 0, -1, 1, 0)
    mirrored = with_display_matrix(vp9, 1, 0, 0, -1)
    for source, reason in (
        (h264, "codec must be one of vp8, vp9, mjpeg on a CPU, got h264"),
        (turned, "stored upright"),
        (mirrored, "stored upright"),
    ):
        with Video(source) as video, pytest.raises(DecodeError, match=reason):
            clip(video, [0, 1], WHOLE)
    with Video(vp9) as video:
        for bad in ([5], [-1], []):
            with pytest.raises(ValueError, match=r"clip: indices must be in \[0, 5\)"):
                clip(video, bad, WHOLE)


def test_a_bad_file_is_named_and_the_next_batch_comes(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.webm", 30, **VP9).read_bytes()
    good = Clip(data, (0, 5), WHOLE, "good")
    for bad in (
        Clip(b"junk" * 100, (0, 1), WHOLE, "bad"),
        Clip(data[: len(data) // 2], (0, 29), WHOLE, "bad"),  # DALI alone would give black frames
    ):
        with pytest.raises(DecodeError, match=r"^bad: DALI: "):
            load([good, bad, good])
    assert load([good]).shape == (1, 3, 2, 24, 24)


def test_batches_are_of_one_shape(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.webm", 10, **VP9).read_bytes()
    one = Clip(data, (0, 5), WHOLE, "one")
    with pytest.raises(ValueError, match=r"equally many frames, got \[1, 2\]"):
        load([one, Clip(data, (0,), WHOLE, "short")])
    with pytest.raises(ValueError, match="one size and interpolation"):
        load([one, Clip(data, (0, 5), View(Box(0, 0, 48, 72), (32, 32)), "large")])
    with pytest.raises(ValueError, match="equally many"):
        load([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(files: list[Path]) -> None:
    path = real_clip("bikes.mp4")  # H.264
    with Video(path) as video:
        made = clip(video, *draw(video, CROPS[0], 0, 0), device_id=0)
    got = load([made], device_id=0)
    assert got.device == torch.device("cuda", 0)
    difference = levels(got.cpu() - ours([path], [made])).mean((1, 3, 4))
    assert difference.max() < DECODED_FRAME


def damaged_from(path: Path, frame: int) -> None:
    """The index and the first frames are whole: only a decoder meets what is wrong."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for i, packet in enumerate(p for p in container.demux(video=0) if p.size):
            if i >= frame:
                place = data.index(bytes(packet))
                data[place : place + packet.size] = bytes(packet.size)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Parts of real clips as `iv2 shard --proxy vp9` writes them, with sound or without."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [
        {"path": str(real_clip(name)), "start": start, "end": start + 0.6, "label": i}
        for i, (name, start) in enumerate(
            [("bikes.mp4", 0), ("carphone_pristine.mp4", 0), ("bikes.mp4", 1), ("bikes.mp4", 2)]
        )
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ShardConfig(2, ProxyConfig(codec="vp9", size=128))
    write_shards(folder / "list.jsonl", folder / "out", config)
    return read_list(folder / "out")


class TestLoader:
    """Batches of `iv2.data.loader` with `ClipConfig.decoder` dali beside those of PyAV."""

    CLIP = ClipConfig(num_frames=4, crop=CropConfig("multiscale", 112))
    SOUND = replace(CLIP, sound=SoundConfig(seconds=1.0, num_frames=98), min_frames=1)

    @staticmethod
    def stream(
        samples: list[Sample], clip: ClipConfig, decoder: Backend | None, **options: Any
    ) -> Batches:
        return Batches(VideoDataset(samples, replace(clip, decoder=decoder)), 3, **options)

    @staticmethod
    def agree(got: dict[str, Any], expected: dict[str, Any]) -> None:
        """The same clips, and the same pictures but for what decoders differ by."""
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if name != "video":
                same = torch.equal(got[name], value) if torch.is_tensor(value) else None
                assert got[name] == value if same is None else same, name
        assert got["video"].shape == expected["video"].shape
        assert got["video"].dtype == torch.float32
        difference = levels(got["video"] - expected["video"]).mean((1, 3, 4))
        assert difference.mean() < DECODED_MEAN
        assert difference.max() < DECODED_FRAME

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_are_those_of_pyav(self, shards: list[Sample], workers: int) -> None:
        assert all(".tar/" in sample.path for sample in shards)
        pyav = self.stream(shards, self.CLIP, None)
        with self.stream(shards, self.CLIP, "dali", num_workers=workers) as batches:
            for _ in range(4):
                self.agree(next(batches), next(pyav))
            assert batches.skipped == {}

    def test_resume_is_exact(self, shards: list[Sample]) -> None:
        whole = list(itertools.islice(self.stream(shards, self.CLIP, "dali"), 5))
        with self.stream(shards, self.CLIP, "dali", num_workers=1) as left:
            for _ in range(2):
                next(left)
            state = json.loads(json.dumps(left.state_dict()))
        resumed = self.stream(shards, self.CLIP, "dali")
        resumed.load_state_dict(state)
        for expected in whole[2:]:
            batch = next(resumed)
            assert torch.equal(batch["video"], expected["video"])
            assert batch["paths"] == expected["paths"]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_bad_files_are_replaced_and_listed(
        self, shards: list[Sample], tmp_path: Path, workers: int
    ) -> None:
        """The same ones by the same others as with PyAV, whoever finds out."""
        text, late = tmp_path / "text.webm", tmp_path / "late.webm"
        text.write_text("no video" * 100)
        damaged_from(write_video(late, 40, **VP9), 20)
        samples = [*shards[:3], Sample(str(text), label=7), Sample(str(late), label=8), shards[3]]
        pyav = self.stream(samples, self.CLIP, None)
        with self.stream(samples, self.CLIP, "dali", num_workers=workers) as batches:
            for _ in range(6):
                self.agree(next(batches), next(pyav))
            assert set(batches.skipped) == set(pyav.skipped) == {str(text), str(late)}
            state = batches.state_dict()
        strict = self.stream(samples, self.CLIP, "dali", max_bad_fraction=0.2)
        with pytest.raises(RuntimeError, match="data: 2 of 6 clips cannot be used"):
            list(itertools.islice(strict, 6))
        again = self.stream(samples, self.CLIP, "dali")
        again.load_state_dict(state)
        self.agree(next(again), next(pyav))

    def test_what_dali_finds_alone(
        self, shards: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker saw nothing: the process that decodes replaces the clip, and knows it then."""
        bad = shards[1].path
        real = dali.load

        def refuse(clips: Sequence[Clip], **options: Any) -> Tensor:
            if any(c.name == bad for c in clips):
                raise DecodeError(bad, "DALI: no")
            return real(clips, **options)

        monkeypatch.setattr(dali, "load", refuse)
        batches = self.stream(shards, self.CLIP, "dali")
        seen = list(itertools.islice(batches, 4))
        assert batches.skipped == {bad: "DALI: no"}
        assert bad not in {path for batch in seen for path in batch["paths"]}
        torn = [*shards[:1], replace(shards[1], path="none.webm"), *shards[2:]]
        for expected, batch in zip(self.stream(torn, self.CLIP, "dali"), seen, strict=False):
            assert torch.equal(batch["video"], expected["video"])
            assert batch["sample_ids"].tolist() == expected["sample_ids"].tolist()

    def test_an_error_of_no_file_ends_the_run(
        self, shards: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = dali.load

        def refuse(clips: Sequence[Clip], **options: Any) -> Tensor:
            if len(clips) > 1:
                raise DecodeError("a.webm", "DALI: no memory")
            return real(clips, **options)

        monkeypatch.setattr(dali, "load", refuse)
        with pytest.raises(DecodeError, match="no memory"):
            next(self.stream(shards, self.CLIP, "dali"))

    def test_sounds_come_along(self, tmp_path: Path) -> None:
        world = write_toyworld(tmp_path / "world", 4, 0, size=64, num_frames=8)
        config = ShardConfig(4, ProxyConfig(codec="vp9", size=64))
        write_shards(world, tmp_path / "out", config)
        samples = read_list(tmp_path / "out", "audio_video")
        some = [self.stream(samples, self.SOUND, decoder) for decoder in ("dali", None)]
        got, expected = map(next, some)
        assert got["fbank"].abs().sum() > 0
        assert torch.equal(got["fbank"], expected["fbank"])
        assert got["video"].shape == expected["video"].shape == (3, 3, 4, 112, 112)

    def test_other_codecs_are_refused_and_kept_frames_too(self, tmp_path: Path) -> None:
        h264 = [Sample(str(write_video(tmp_path / "a.mp4", 9)))]
        with pytest.raises(RuntimeError, match="on a CPU, got h264"):
            next(self.stream(h264, self.CLIP, "dali"))
        with pytest.raises(ValueError, match="cache_bytes must be 0 for decoder dali, got 9"):
            VideoDataset(h264, replace(self.CLIP, decoder="dali"), cache_bytes=9)

    def test_a_run_says_so(self, shards: list[Sample], tmp_path: Path) -> None:
        folder = str(Path(shards[0].path).parents[1])
        clip = replace(self.CLIP, decoder="dali")
        config = TrainConfig(data=DataConfig(path=folder, clip=clip, batch_size=3, num_workers=1))
        assert from_dict(TrainConfig, to_dict(config)) == config
        plain = replace(config, data=replace(config.data, clip=self.CLIP))
        sources = read_sources(config)
        with open_batches(config, sources, World()) as got:
            with open_batches(plain, sources, World()) as expected:
                self.agree(next(got), next(expected))
            assert got.dataset.encoded

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self) -> None:
        samples = [Sample(str(real_clip("bikes.mp4")), start=i, end=i + 2.0) for i in range(4)]
        clip, device = replace(self.CLIP, decoder="dali"), torch.device("cuda", 0)
        batches = Batches(VideoDataset(samples, clip, device=device), 3, num_workers=2)
        pyav = self.stream(samples, self.CLIP, None)
        for _ in range(4):
            batch = next(batches)
            assert batch["video"].device == device
            on_cpu = {n: x.cpu() if torch.is_tensor(x) else x for n, x in batch.items()}
            self.agree(on_cpu, next(pyav))
        batches.close()
