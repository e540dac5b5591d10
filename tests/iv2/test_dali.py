"""DALI's clips against PyAV's frames and our own crop and resize; skipped without DALI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import real_clip, with_display_matrix, write_video
from torch import Tensor

from iv2.data import dali
from iv2.data.clips import tsn_indices
from iv2.data.dali import Clip, augment, clip, load
from iv2.data.decode import DecodeError, Video
from iv2.data.proxy import ProxyConfig, write_proxy
from iv2.data.transforms import Box, CropConfig, View, draw_view, look
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
