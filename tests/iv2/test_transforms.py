from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import numbers, write_video

from iv2.data import transforms
from iv2.data.clips import sparse_test_indices
from iv2.data.decode import Video
from iv2.data.transforms import (
    Box,
    CropConfig,
    View,
    draw_view,
    look,
    multi_scale_crop,
    multi_view,
    random_resized_crop,
    sliding_crops,
)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def inside(box: Box, height: int, width: int) -> bool:
    return (
        0 <= box.top <= box.top + box.height <= height
        and 0 <= box.left <= box.left + box.width <= width
        and min(box.height, box.width) > 0
    )


def test_multi_scale_crop() -> None:
    boxes = [multi_scale_crop(256, 340, 224, rng(seed)) for seed in range(3000)]
    assert all(inside(box, 256, 340) for box in boxes)
    # 256 x (1, .875, .75, .66) = 256, 224, 192, 168; neighbours may be paired
    sides = [256, 224, 192, 168]
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert {(box.height, box.width) for box in boxes} == pairs
    places = {(box.top, box.left) for box in boxes if (box.height, box.width) == (168, 168)}
    rows, columns = (256 - 168) // 4, (340 - 168) // 4
    assert places == {
        (r * rows, c * columns)
        for r, c in [
            *((0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4), (4, 0), (4, 2), (4, 4)),
            *((1, 1), (1, 3), (3, 1), (3, 3)),
        ]
    }


def test_multi_scale_crop_takes_the_size_when_close() -> None:
    # 226 x (1, .875, ...): 226 is within two pixels of 224
    sides = {multi_scale_crop(226, 226, 224, rng(seed)).height for seed in range(200)}
    assert sides == {224, 197, 169, 149}
    # but never more than there is
    assert all(inside(multi_scale_crop(222, 300, 224, rng(s)), 222, 300) for s in range(200))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (37, 75), (720, 1280)])
def test_random_boxes_stay_inside(height: int, width: int) -> None:
    for seed in range(300):
        assert inside(multi_scale_crop(height, width, 224, rng(seed)), height, width)
        assert inside(random_resized_crop(height, width, rng(seed)), height, width)


def test_random_resized_crop() -> None:
    boxes = [random_resized_crop(300, 400, rng(seed), scale=(0.25, 0.5)) for seed in range(2000)]
    areas = np.array([box.height * box.width / 120000 for box in boxes])
    shapes = np.array([math.log(box.width / box.height) for box in boxes])
    assert areas.min() > 0.245
    assert areas.max() < 0.505
    assert abs(areas.mean() - 0.375) < 0.01
    assert abs(shapes).max() < math.log(4 / 3) + 0.02
    assert abs(shapes.mean()) < 0.02
    assert {box.top for box in boxes} >= set(range(0, 60))


def test_random_resized_crop_falls_back_to_the_centre() -> None:
    assert random_resized_crop(10, 1000, rng(0), scale=(1, 1)) == Box(0, 493, 10, 13)
    assert random_resized_crop(1000, 10, rng(0), scale=(1, 1)) == Box(493, 0, 13, 10)


def test_sliding_crops() -> None:
    assert sliding_crops(240, 320, 3) == [
        Box(0, 0, 240, 240), Box(0, 40, 240, 240), Box(0, 80, 240, 240)
    ]  # fmt: skip
    assert sliding_crops(320, 240, 1) == [Box(40, 0, 240, 240)]
    assert sliding_crops(256, 256, 2) == [Box(0, 0, 256, 256)] * 2
    # resize to 256, cut 224
    assert sliding_crops(512, 512, 1, zoom=256 / 224) == [Box(32, 32, 448, 448)]
    assert sliding_crops(512, 1024, 3, zoom=256 / 224)[2] == Box(32, 576, 448, 448)
    with pytest.raises(ValueError, match="num_crops must be at least 1, got 0"):
        sliding_crops(2, 2, 0)
    with pytest.raises(ValueError, match=r"zoom must be at least 1, got 0.5"):
        sliding_crops(2, 2, 1, zoom=0.5)


def test_draw_view() -> None:
    views = [draw_view(CropConfig(), 100, 120, rng(seed)) for seed in range(400)]
    assert 150 < sum(view.flip for view in views) < 250
    assert all(view.size == (224, 224) for view in views)
    assert views[7] == draw_view(CropConfig(), 100, 120, rng(7))
    still = [draw_view(CropConfig(), 100, 120, rng(s), may_flip=False) for s in range(400)]
    assert not any(view.flip for view in still)
    assert [view.box for view in still] == [view.box for view in views]
    assert draw_view(CropConfig("whole", 8), 10, 20, rng(0)).box == Box(0, 0, 10, 20)
    assert draw_view(CropConfig("centre", 8), 10, 20, rng(0)).box == Box(0, 5, 10, 10)
    wide = CropConfig("resized", scale=(0.5, 1.0), interpolation="bicubic")
    view = draw_view(wide, 100, 100, rng(1))
    assert view.interpolation == "bicubic"
    assert view.box.height * view.box.width > 4900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "round"}, "kind must be multiscale, resized, centre or whole, got 'round'"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"flip": 2.0}, r"flip must be in \[0, 1\], got 2.0"),
        ({"scale": (0.0, 1.0)}, "scale must be 0 < low <= high <= 1"),
        ({"ratio": (2.0, 1.0)}, "ratio must be 0 < low <= high"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CropConfig: {message}"):
        CropConfig(**options)


def test_look_is_one_call_of_the_kernel() -> None:
    frames = torch.randint(0, 256, (3, 20, 30, 3), dtype=torch.uint8)
    view = View(Box(2, 4, 16, 16), (8, 8), flip=True)
    seen = look(frames, view)
    assert seen.shape == (3, 3, 8, 8)
    raw = look(frames, view, dtype=torch.uint8)
    assert raw.shape == (3, 8, 8, 3)
    whole = look(frames, View(Box(0, 0, 20, 30), (20, 30), flip=True), dtype=torch.uint8)
    assert torch.equal(whole, frames.flip(2))


def test_all_views_from_one_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 60, height=48, width=96, options={"g": "300"})
    with Video(path) as video:
        views = multi_view(video, 8, 48, num_segments=4, num_crops=3)
        assert video.decoded <= 60
        assert views.shape == (12, 3, 8, 48, 48)
        for segment in range(4):
            indices = sparse_test_indices(60, 8, segment, 4)
            frames = video.frames(indices)
            assert numbers(frames) == indices
            for crop, left in enumerate((0, 24, 48)):
                expected = look(frames, View(Box(0, left, 48, 48), (48, 48)))
                torch.testing.assert_close(views[segment * 3 + crop], expected)
        calls: list[View] = []
        real = look
        monkeypatch.setattr(
            transforms, "look", lambda frames, view: (calls.append(view), real(frames, view))[1]
        )
        part = multi_view(video, 4, 32, num_segments=2, num_crops=1, frame_range=(20, 40))
        assert part.shape == (2, 3, 4, 32, 32)
        assert len(calls) == 1
