from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import (
    numbers,
    real_clip,
    with_display_matrix,
    write_audio,
    write_broken,
    write_video,
)
from torch import Tensor

from iv2.data.decode import DecodeError, Video, decode, plan, probe

X264 = {"x264-params": "scenecut=0:threads=1"}
FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"g": "12", "bf": "3", **X264}},
    "h264-one-key.mp4": {"options": {"g": "300", "bf": "2", **X264}},
    "h264-intra.mp4": {"options": {"g": "1", **X264}},
    "h264-open-gop.mkv": {"options": {"g": "10", "bf": "3", "x264-params": "open-gop=1:threads=1"}},
    "h264-refresh.mp4": {"options": {"g": "10", "x264-params": "intra-refresh=1:threads=1"}},
    "h264-live.mkv": {"options": {"g": "12", **X264}, "container_options": {"live": "1"}},
    "h264.ts": {"options": {"g": "12", "bf": "2", **X264}},
    "h264.h264": {"options": {"g": "12", "bf": "2", **X264}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0:keyint=10:pools=1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "2M"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "4M"}, "rate": 25},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8", "crf": "20"}},
    "vp8.webm": {
        "codec": "libvpx",
        "options": {"g": "30", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "16"},
    },
    "mjpeg.avi": {"codec": "mjpeg", "options": {"q": "4"}},
}


def make(folder: Path, name: str) -> Path:
    return write_video(folder / name, 60, **FILES[name])


@pytest.mark.parametrize("name", sorted(FILES))
def test_any_frames_in_any_order(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name)
    with Video(path) as video:
        assert video.num_frames == 60
        assert numbers(video.frames(range(60))) == list(range(60))
        for indices in ([59], [0], [31, 30, 2, 2, 57], [11, 12, 13], list(range(3, 60, 8))):
            assert numbers(video.frames(indices)) == indices


@pytest.mark.parametrize("name", sorted(FILES))
def test_seeking_and_decoding_through_give_the_same_pixels(tmp_path: Path, name: str) -> None:
    data = make(tmp_path, name).read_bytes()
    every = decode(data, range(60))
    for index in (0, 7, 24, 58):
        assert torch.equal(decode(data, [index])[0], every[index])


@pytest.mark.parametrize(
    "name", ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"]
)
def test_real_clips_against_a_plain_decode(name: str) -> None:
    path = real_clip(name)
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        wanted = sorted({0, count // 3, count // 2, count - 1})
        plain = {
            i: frame.to_ndarray(format="rgb24")
            for i, frame in enumerate(container.decode(video=0))
            if i in wanted
        }
    assert probe(path).num_frames == count
    got = decode(path, wanted)
    for row, i in zip(got.numpy(), wanted, strict=True):
        assert np.array_equal(row, plain[i])


def test_real_clip_with_shots_seeks() -> None:
    with Video(real_clip("bikes.mp4")) as video:
        video.frames([10, 240])
        assert video.decoded < 100


def test_plan_decodes_the_fewest_frames() -> None:
    assert plan([0, 1, 2], [0]) == [(0, 3)]
    assert plan([5, 25, 26, 49], [0, 10, 20, 30, 40]) == [(0, 1), (20, 2), (40, 1)]
    assert plan([9, 10], [0, 10]) == [(0, 2)]  # the next frame comes anyway
    assert plan([8, 10], [0, 10]) == [(0, 1), (10, 1)]
    assert plan([8, 10], [0, 10], seek_cost=1) == [(0, 2)]
    assert plan([3], [5]) == [(0, 1)]  # a file that does not begin with a keyframe


def test_probe(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", 25))
    assert (info.num_frames, info.width, info.height, info.rotation) == (25, 72, 48, 0)
    assert info.fps == pytest.approx(10)
    assert info.duration == pytest.approx(2.5)
    assert not info.has_audio
    assert probe(real_clip("bigbuckbunny.mp4")).has_audio


def test_one_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", 1)
    assert probe(path).num_frames == 1
    assert numbers(decode(path, [0, 0])) == [0, 0]


def test_header_claims_more_frames_than_there_are(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", 20, codec="mjpeg")
    data = bytearray(path.read_bytes())
    main, stream = data.find(b"avih") + 8 + 16, data.find(b"strh") + 8 + 32
    assert data[main : main + 4] == data[stream : stream + 4] == bytes([20, 0, 0, 0])
    data[main : main + 2] = data[stream : stream + 2] = (444).to_bytes(2, "little")
    assert probe(bytes(data)).num_frames == 20
    assert numbers(decode(bytes(data), [19])) == [19]


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2), ((0, 1, -1, 0), 3), ((1, 0, 0, 1), 0)],
)
def test_rotation(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    upright = decode(path, [1])[0]
    data = with_display_matrix(path, *matrix)
    turned = decode(data, [1])[0]
    assert torch.equal(turned, torch.rot90(upright, turns))
    info = probe(data)
    assert (info.height, info.width) == tuple(turned.shape[:2])
    assert info.rotation == turns * 90
    assert decode(data, [1], (30, 20)).shape == (1, 30, 20, 3)
    with av.open(io.BytesIO(data)) as container:
        assert next(container.decode(video=0)).rotation % 360 == info.rotation


@pytest.mark.parametrize(
    ("matrix", "mirror"),
    [
        ((-1, 0, 0, 1), lambda x: x.flip(1)),
        ((1, 0, 0, -1), lambda x: x.flip(0)),
        ((0, 1, 1, 0), lambda x: x.transpose(0, 1)),
    ],
)
def test_mirrored_display(
    tmp_path: Path, matrix: tuple[int, int, int, int], mirror: Callable[[Tensor], Tensor]
) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    upright = decode(path, [1])[0]
    assert torch.equal(decode(with_display_matrix(path, *matrix), [1])[0], mirror(upright))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_photos_with_exif(tmp_path: Path, orientation: int, turns: int) -> None:
    picture = torch.full((40, 60, 3), 40, dtype=torch.uint8)
    picture[:20] = 200
    picture[:, :15, 0] = 255
    path = tmp_path / "a.jpg"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("mjpeg", rate=1, options={"qscale": "1"})
        stream.height, stream.width, stream.pix_fmt = 40, 60, "yuvj444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    tags = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    header = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    data = path.read_bytes()
    path.write_bytes(data[:2] + header + data[2:])
    shown = decode(path, [0])[0]
    expected = torch.rot90(picture, turns)
    assert shown.shape == expected.shape
    assert (shown.float() - expected.float()).abs().mean() < 3
    assert probe(path).rotation == turns * 90


def test_odd_sides(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mkv", 4, codec="ffv1", height=37, width=75)
    frames = decode(path, [3, 1])
    assert frames.shape == (2, 37, 75, 3)
    assert numbers(frames) == [3, 1]


def test_uneven_frame_rate(tmp_path: Path) -> None:
    pts = [0, 1, 2, 10, 11, 30, 31, 45, 46, 47]
    path = write_video(tmp_path / "vfr.mp4", 10, pts=pts, options={"g": "4", **X264})
    with Video(path) as video:
        assert video.times == pytest.approx([p / 10 for p in pts])
        assert video.frame_range(None, None) == (0, 10)
        assert video.frame_range(1.0, 3.1) == (3, 6)
        assert video.frame_range(9.0, 10.0) == (10, 10)
        assert numbers(video.frames([8, 3, 5])) == [8, 3, 5]


def test_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    assert decode(path, [0], (24, 24)).shape == (1, 24, 24, 3)
    assert decode(path, [0], 24).shape == (1, 24, 36, 3)
    assert decode(path, [0], 400).shape == (1, 48, 72, 3)
    assert numbers(decode(path, [2, 1], 24)) == [2, 1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text", "invalid data"),
        ("truncated", "invalid data"),
        ("empty", "empty"),
        ("audio", "no video stream"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, reason: str) -> None:
    path = write_broken(tmp_path)[name]
    for call in (lambda: probe(path), lambda: decode(path, [0])):
        with pytest.raises(DecodeError, match=reason) as caught:
            call()
        assert caught.value.path == str(path)
        assert str(caught.value) == f"{path}: {caught.value.reason}"
    with pytest.raises(DecodeError, match=reason):
        decode(path.read_bytes(), [0])


def test_truncated_with_the_index_in_front(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, container_options={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[:-2000])
    for source in (path, path.read_bytes()):
        with pytest.raises(DecodeError, match=r"truncated: [0-9]+ of 60 frames"):
            decode(source, [0])


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "12", **X264})
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + len(data) // 4
    data[start : start + 600] = bytes(600)
    with pytest.raises(DecodeError):
        decode(bytes(data), range(60))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="no such file"):
        probe(tmp_path / "absent.mp4")
    with pytest.raises(DecodeError):
        probe(tmp_path)


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.mp4")
    cover = tmp_path / "cover.mp4"
    with av.open(str(path)) as source, av.open(str(cover), "w") as target:
        audio = target.add_stream_from_template(source.streams.audio[0])
        art = target.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt = 16, 16, "yuvj420p"
        art.disposition = 0x400
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        target.mux(art.encode(frame))
        target.mux(art.encode())
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = audio
                target.mux(packet)
    with pytest.raises(DecodeError, match="no video stream"):
        probe(cover)


@pytest.mark.parametrize("indices", [[3], [-1], [0, 7]])
def test_numbers_out_of_range(tmp_path: Path, indices: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(ValueError, match=r"decode: indices must be in \[0, 3\)"):
        decode(path, indices)


def test_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none"):
        decode(write_video(tmp_path / "a.mp4", 3), [])


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "no frames")))
    assert (error.path, error.reason) == ("a.mp4", "no frames")
