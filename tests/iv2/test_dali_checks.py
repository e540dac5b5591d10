"""Codec and health are known before DALI is given a file: these need no DALI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media import with_display_matrix, write_broken, write_video
from test_decode_backends import edited, ten_bits

from iv2.data import dali
from iv2.data.clips import Sample
from iv2.data.dali import clip
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.decode import DecodeError, Video
from iv2.data.transforms import Box, View

VP9: dict[str, Any] = {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}}
VIEW = View(Box(0, 0, 48, 72), (24, 24))


@pytest.fixture(autouse=True)
def _never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("DALI was given a file")

    monkeypatch.setattr(dali, "_decoded", asked)
    monkeypatch.setattr(dali, "dynamic_mode", lambda: None)


def full_colour(path: Path) -> Path:
    """H.264 with colours in every pixel, which no GPU's decoder takes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 72, "yuv444p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 72, 3), np.uint8))
        container.mux([*stream.encode(frame.reformat(format="yuv444p")), *stream.encode()])
    return path


def taken(path: Path, device_id: int | None) -> bytes:
    with Video(path) as video:
        return clip(video, [0], VIEW, device_id=device_id).data


def test_what_each_device_takes(tmp_path: Path) -> None:
    h264, vp9 = write_video(tmp_path / "a.mp4", 20), write_video(tmp_path / "a.webm", 20, **VP9)
    jpegs, ten = write_video(tmp_path / "a.avi", 20, codec="mjpeg"), ten_bits(tmp_path / "b.mp4")
    for path, device_ids in ((h264, [0]), (ten, [0]), (vp9, [None, 0]), (jpegs, [None, 0])):
        for device_id in device_ids:
            assert taken(path, device_id) == path.read_bytes()
    flash = write_video(tmp_path / "a.flv", 20, codec="flv")
    for path, device_id, reason in (
        (h264, None, "codec must be one of vp8, vp9, mjpeg on a CPU, got h264"),
        (flash, 0, "on a GPU, got flv1"),
        (full_colour(tmp_path / "c.mp4"), 0, "pixels must be .*, got yuv444p"),
        (edited(write_video(tmp_path / "d.mp4", 20)), 0, "no frame must be hidden .*, got 5"),
    ):
        with pytest.raises(DecodeError, match=f"DALI: .*{reason}"):
            taken(path, device_id)
    turned = tmp_path / "e.mp4"
    turned.write_bytes(with_display_matrix(h264, 0, 1, -1, 0))
    with pytest.raises(DecodeError, match="stored upright"):
        taken(turned, 0)


def test_a_broken_file_never_comes_so_far(tmp_path: Path) -> None:
    """Each gives its place to the whole one, in the worker."""
    broken = write_broken(tmp_path / "broken")
    whole = write_video(tmp_path / "whole.webm", 40, **VP9)
    front = write_video(tmp_path / "front.mp4", 40, container_options={"movflags": "faststart"})
    front.write_bytes(front.read_bytes()[: front.stat().st_size * 3 // 4])
    wrong = {**broken, "cut": front, "h264": write_video(tmp_path / "h.mp4", 40)}
    samples = [Sample(str(path)) for path in (*wrong.values(), *[whole] * 8)]
    dataset = VideoDataset(samples, ClipConfig(num_frames=4, decoder="dali"))
    reasons = {
        "text": "invalid data",
        "truncated": "invalid data",
        "empty": r"empty \(0 bytes\)",
        "audio": "no video stream",
        "one": "too short: 1 frame, need 4",
        "cut": r"truncated: \d+ of 40 frames",
        "h264": "codec must be one of vp8, vp9, mjpeg on a CPU, got h264",
    }
    for number, name in enumerate(wrong):
        item = dataset.load(0, number)
        assert item["clip"].name == str(whole)
        row, path, reason = item["skipped"][0]
        assert (row, path) == (number, str(wrong[name]))
        assert re.search(reasons[name], reason), reason
