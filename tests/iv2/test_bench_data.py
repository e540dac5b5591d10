"""What `python -m bench.data` compares gives the same frames, and its table is whole."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from media import numbers, write_video

from bench import data, data_looks
from bench.data_looks import looks, with_pytorch
from bench.data_ways import view_numbers, ways
from iv2.data.transforms import Box, View, look


def test_every_way_reads_the_same_frames(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", 40, height=240, width=360))
    views = view_numbers(path, 4)
    assert views == [[5, 15, 25, 35], [0, 10, 20, 30]]
    found = ways()
    assert {"decode all", "planned", "released, 2 views", "planned, 2 views"} <= found.keys()
    for name, way in found.items():
        read = way(path, views)
        assert [numbers(frames) for frames in read] == views[: 2 if "2 views" in name else 1]
        assert all(frames.shape == (4, 224, 336, 3) for frames in read)


def test_every_view_is_the_same():
    frames = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8)
    for flip in (False, True):
        view = View(Box(3, 5, 40, 60), (32, 24), flip)
        torch.testing.assert_close(
            with_pytorch(frames, view), look(frames, view), atol=1e-4, rtol=1e-4
        )


def test_torchvision_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "torchvision.transforms.v2", raising=False)
    rows, reason = looks([torch.zeros(2, 30, 30, 3, dtype=torch.uint8)], 1)
    assert list(rows) == ["fused", "PyTorch"]
    assert "not installed" in reason


def test_torchvision_is_called_as_it_is_documented(monkeypatch):
    """With its four functions written out."""
    F = torch.nn.functional

    def resized_crop(video, top, left, height, width, size, antialias):
        part = video[..., top : top + height, left : left + width].float()
        return F.interpolate(part, size, mode="bilinear", antialias=antialias).round().byte()

    def normalize(video, mean, std):
        return (video - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    functional = types.SimpleNamespace(
        resized_crop=resized_crop,
        horizontal_flip=lambda video: video.flip(-1),
        to_dtype=lambda video, dtype, scale: video.to(dtype) / 255,
        normalize=normalize,
    )
    v2 = types.SimpleNamespace(functional=functional)
    monkeypatch.setattr(data_looks, "torchvision_v2", lambda: (v2, ""))
    rows, reason = looks([torch.randint(0, 256, (2, 60, 80, 3), dtype=torch.uint8)], 1)
    assert not reason
    assert rows["torchvision v2"]["most_levels"] < 0.51  # rounded to whole levels
    assert rows["PyTorch"]["most_levels"] < 0.01
    assert rows["fused"]["x_fused"] == 1


def test_table(tmp_path, capsys):
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", 40)
    out = tmp_path / "rows.json"
    data.main(data.Options(data=tmp_path, frames=4, rounds=1, steps=0, json=out))
    found = json.loads(out.read_text())
    kinds = ("originals", "originals in a tar", "copies", "copies in a tar")
    assert list(found["rows"]) == [f"{kind}: {way}" for kind in kinds for way in ways()]
    for row in found["rows"].values():
        assert min(row.values()) > 0
    assert found["rows"]["originals: decode all"]["x_decode_all"] == pytest.approx(1)
    assert found["waiting"] is None
    printed = capsys.readouterr().out
    assert "copies in a tar: planned, 2 views" in printed
    assert "goal on copies: 5.0 x decode all of the originals" in printed
