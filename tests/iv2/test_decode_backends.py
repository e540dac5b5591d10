"""The other decoders against PyAV; skipped where they are not installed."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import pytest
import torch
from media import numbers, picture, real_clip, with_display_matrix, write_video

from iv2.data.clips import Sample
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.decode import Backend, DecodeError, Video, decode
from iv2.data.loader import Batches
from iv2.data.transforms import CropConfig

X264 = {"x264-params": "scenecut=0:threads=1"}
VP9 = {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8", "crf": "20"}}
UNEVEN = [0, 1, 2, 10, 11, 30, 31, 45, 46, 47, *range(60, 80)]
MOST = 3  # mean difference, of 255


def installed(name: Backend) -> Backend:
    from iv2.data import dali, torchcodec

    try:
        dali.dynamic_mode() if name == "dali" else torchcodec.decoder_class()
    except RuntimeError as error:
        pytest.skip(str(error))
    return name


def ten_bits(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options=X264)
        stream.height, stream.width, stream.pix_fmt = 48, 72, "yuv420p10le"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(picture(i, 48, 72), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        container.mux(stream.encode())
    return path


def edited(path: Path) -> Path:
    """The edit list of an mp4 moved on by five frames: they are decoded but not shown."""
    data = bytearray(path.read_bytes())
    place = data.find(b"elst") + 4 + 8 + 4  # version, count, duration
    (start,) = struct.unpack_from(">i", data, place)
    with Video(path) as video, av.open(str(path)) as container:
        base = container.streams.video[0].time_base
        assert base is not None
        frame = round(video.times[1] / float(base))
    struct.pack_into(">i", data, place, start + 5 * frame)
    path.write_bytes(data)
    return path


def turned(path: Path, *matrix: int) -> Path:
    path.write_bytes(with_display_matrix(path, *matrix))
    return path


def plain(codec: str = "libx264", num: int = 30, **more: Any) -> Callable[[Path], Path]:
    options = {"g": "12", "bf": "3", **X264} if codec == "libx264" else {}
    return lambda path: write_video(path, num, codec=codec, **{"options": options} | more)


FILES: dict[str, Callable[[Path], Path]] = {
    "b-frames.mp4": plain(),
    "one-key.mp4": plain(options={"g": "300", "bf": "2", **X264}),
    "open-gop.mkv": plain(
        options={"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0:threads=1"}
    ),
    "mpeg4.mp4": plain("mpeg4", options={"g": "12", "bf": "2", "b": "2M"}),
    "uneven.mp4": plain(pts=UNEVEN),
    "edited.mp4": lambda path: edited(plain()(path)),
    "turned.mp4": lambda path: turned(plain()(path), 0, 1, -1, 0),
    "mirrored.mp4": lambda path: turned(plain()(path), -1, 0, 0, 1),
    "mirrored-up.mp4": lambda path: turned(plain()(path), 1, 0, 0, -1),
    "transposed.mp4": lambda path: turned(plain()(path), 0, 1, 1, 0),
    "ten-bits.mp4": ten_bits,
}
# Of these, torchcodec 0.13 gives wrong frames, or loses some, with FFmpeg 5.
DIFFICULT: dict[str, Callable[[Path], Path]] = {
    "refresh.mp4": plain(options={"g": "10", "x264-params": "intra-refresh=1:threads=1"}),
    "b-frames.ts": plain(),
    "mpeg4.avi": plain("mpeg4", options={"g": "12", "bf": "2", "b": "2M"}),
}
DALI_FILES: dict[str, Callable[[Path], Path]] = {
    "vp9.webm": plain(**VP9),
    "vp8.webm": plain(
        "libvpx", options={"g": "12", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "16"}
    ),
    "mjpeg.avi": plain("mjpeg", options={"q": "4"}),
    "odd.webm": plain(**VP9, height=37, width=75),
    "uneven.webm": plain(**VP9, pts=UNEVEN),
    "turned-vp9.mp4": lambda path: turned(plain(**VP9)(path), 0, -1, 1, 0),
    "mirrored-vp9.mp4": lambda path: turned(plain(**VP9)(path), -1, 0, 0, 1),
}
CASES = [("torchcodec", name) for name in (FILES | DALI_FILES)]
CASES += [("dali", name) for name in DALI_FILES]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_the_same_frames(tmp_path: Path, backend: Backend, name: str) -> None:
    installed(backend)
    path = (FILES | DALI_FILES)[name](tmp_path / name)
    with Video(path) as video, Video(path, backend=backend) as other:
        assert other.times == video.times
        last = video.num_frames - 1
        assert (name == "edited.mp4") == (video.num_frames < 30) == (video.coding.hidden > 0)
        for indices in ([last], [7, 3, 3, 20, 0], list(range(video.num_frames))):
            expected, got = video.frames(indices), other.frames(indices)
            assert got.dtype == torch.uint8
            assert got.shape == expected.shape
            difference = (got.float() - expected.float()).abs().mean((1, 2, 3))
            assert difference.max() < MOST
            if "turned" not in name and "mirrored" not in name and "transposed" not in name:
                assert numbers(got) == numbers(expected)


@pytest.mark.parametrize("name", sorted(DIFFICULT))
def test_the_right_frames_or_none(tmp_path: Path, name: str) -> None:
    backend = installed("torchcodec")
    path = DIFFICULT[name](tmp_path / name)
    for indices in ([29], [0, 3, 7, 20]):
        try:
            got = decode(path, indices, backend=backend)
        except DecodeError as error:
            assert error.reason.startswith("torchcodec: ")  # noqa: PT017
        else:
            assert numbers(got) == indices


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4"])
@pytest.mark.parametrize("size", [None, 64, (48, 80)])
def test_real_clips(name: str, size: int | tuple[int, int] | None) -> None:
    backend = installed("torchcodec")
    path = real_clip(name)
    with Video(path) as video:
        last = video.num_frames - 1
        expected = video.frames([last // 2, 3], size)
    got = decode(path.read_bytes(), [last // 2, 3], size, backend=backend)
    assert got.shape == expected.shape
    assert (got.float() - expected.float()).abs().mean((1, 2, 3)).max() < MOST


@pytest.mark.parametrize("backend", ["torchcodec", "dali"])
def test_errors_are_those_of_pyav(tmp_path: Path, backend: Backend) -> None:
    installed(backend)
    path = plain(**VP9)(tmp_path / "a.webm")
    with pytest.raises(ValueError, match=r"decode: indices must be in \[0, 30\)"):
        decode(path, [30], backend=backend)
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 20, encoding="utf-8")
    with pytest.raises(DecodeError, match="invalid data"):
        decode(tmp_path / "text.mp4", [0], backend=backend)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    backend = installed("torchcodec")
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "12", **X264})
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + len(data) // 4
    data[start : start + 600] = bytes(600)
    with pytest.raises(DecodeError, match="torchcodec"):
        decode(bytes(data), range(60), backend=backend)


@pytest.mark.parametrize(
    ("backend", "modules", "extra"),
    [
        ("torchcodec", ("torchcodec", "torchcodec.decoders"), "video"),
        ("dali", ("nvidia", "nvidia.dali", "nvidia.dali.experimental.dynamic"), "dali"),
    ],
)
def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, modules: tuple[str, ...], extra: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    clip, samples = ClipConfig(decoder=backend), [Sample(str(real_clip("bikes.mp4")))]
    for use in (
        lambda: decode(real_clip("bikes.mp4"), [0], backend=backend),
        lambda: VideoDataset(samples, clip),  # before a worker starts
    ):
        with pytest.raises(RuntimeError, match=rf"backend {backend} must be .*iv2\[{extra}\]"):
            use()
    VideoDataset([replace(samples[0], kind="image")], clip)  # images are PyAV's


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of pyav, torchcodec, dali, got"):
        decode(real_clip("bikes.mp4"), [0], backend=cast("Backend", "decord"))


@pytest.mark.parametrize("cache_bytes", [0, 10**8])
def test_the_loader_decodes_with_torchcodec(tmp_path: Path, cache_bytes: int) -> None:
    """The same clips as with PyAV, and the same ones skipped."""
    backend = installed("torchcodec")
    (tmp_path / "text.mp4").write_text("no video" * 99)
    paths = [real_clip("bikes.mp4"), plain()(tmp_path / "a.mp4"), tmp_path / "text.mp4"]
    samples = [Sample(str(path), end=2.0) for path in paths]
    clip = ClipConfig(num_frames=4, crop=CropConfig(size=64), normalise=False, short_side=96)
    pyav, ours = (
        Batches(VideoDataset(samples, replace(clip, decoder=d), cache_bytes=cache_bytes), 3)
        for d in (None, backend)
    )
    differ = False
    for _ in range(3):
        expected, got = next(pyav), next(ours)
        assert got["paths"] == expected["paths"]
        difference = (got["video"].float() - expected["video"].float()).abs()
        assert difference.mean((1, 2, 3, 4)).max() <= MOST
        differ |= bool(difference.any())
    assert differ  # by rounding: another decoder was at work
    assert ours.skipped == pyav.skipped
    assert [Path(path).name for path in ours.skipped] == ["text.mp4"]
