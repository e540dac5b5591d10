"""Scenes are judged by their pixels: shapes are found again by colour, and followed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from iv2.data import synthetic
from iv2.data.synthetic import COLOURS, MOTIONS, SHAPES, SOUNDS
from iv2.data.toy_scenes import HELD_OUT, LAYOUTS, Scene, draw_scene, render, sound, states

SIZE, FRAMES = 96, 17


def scenes(layout: str, num: int, seed: int = 3, held_out: bool = False) -> list[tuple[int, Scene]]:
    drawn = ((i, draw_scene(seed, i, held_out=held_out)) for i in range(10_000))
    found = ((i, scene) for i, scene in drawn if scene.layout == layout)
    return [next(found) for _ in range(num)]


def seen(frames: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels have the colour, [T, H, W]."""
    distance = np.linalg.norm(frames / 255 - np.array(COLOURS[colour]), axis=-1)
    return distance < 0.22


def shift(one: np.ndarray, two: np.ndarray) -> tuple[int, int, float]:
    """By how many pixels right and down one mask moves to be most like another, and how like."""
    spectra = np.fft.rfft2(two.astype(float)) * np.conj(np.fft.rfft2(one.astype(float)))
    common = np.fft.irfft2(spectra, one.shape)
    down, right = np.unravel_index(int(common.argmax()), one.shape)
    both = float(common.max())
    right, down = ((int(x) + SIZE // 2) % SIZE - SIZE // 2 for x in (right, down))
    return right, down, both / (one.sum() + two.sum() - both)


def motion_of(mask: np.ndarray) -> str:
    """The motion that the pixels show; which way a shape turns is not told."""
    areas = mask.sum((1, 2))
    # a size that wraps around jumps once
    growth = float(np.median(areas[2:] / areas[:-2]))
    if growth > 1.05:
        return "growing"
    if growth < 0.95:
        return "shrinking"
    right, down, like = shift(mask[0], mask[-1])
    if max(abs(right), abs(down)) < 8 or like < 0.8:
        return "turning"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def shown(motion: str) -> str:
    return "turning" if "clockwise" in motion else motion


def test_two_shapes_are_both_there_and_move_each_its_own_way() -> None:
    told = Counter()
    for index, scene in scenes("two_shapes", 60):
        frames = render(scene, 3, index, size=SIZE, num_frames=FRAMES)
        one, two = scene.movers
        assert len({one.shape, two.shape}) == len({one.colour, two.colour}) == 2
        assert one.motions != two.motions
        masks = [seen(frames, m.colour) for m in scene.movers]
        for mover, mask in zip(scene.movers, masks, strict=True):
            assert mask.sum((1, 2)).min() > 80  # of 9216 pixels, in each frame
            told[mover.motions[0], motion_of(mask)] += 1
        # apart: no pixel of one is next to one of the other
        near = np.zeros_like(masks[0])
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                near |= np.roll(masks[0], (dy, dx), (1, 2))
        assert not (near & masks[1]).any()
    for (motion, pixels), count in told.items():
        assert shown(motion) == pixels, (motion, pixels, count)
    assert {motion for motion, _ in told} == set(MOTIONS)


def test_one_shape_is_one() -> None:
    for layout in ("one", "two_motions", "two_sounds"):
        for index, scene in scenes(layout, 12):
            frames = render(scene, 3, index, size=SIZE, num_frames=FRAMES)
            (mover,) = scene.movers
            for colour in COLOURS:
                most = seen(frames, colour).sum((1, 2)).max()
                assert (most > 80) == (colour == mover.colour), (layout, colour)


def test_the_motion_changes_half_way() -> None:
    told = Counter()
    for index, scene in scenes("two_motions", 60):
        frames = render(scene, 3, index, size=SIZE, num_frames=FRAMES)
        (mover,) = scene.movers
        assert mover.motions[0] != mover.motions[1]
        mask = seen(frames, mover.colour)
        half = FRAMES // 2
        for motion, part in zip(mover.motions, (mask[: half + 1], mask[half:]), strict=True):
            told[motion, motion_of(part)] += 1
    for (motion, pixels), count in told.items():
        assert shown(motion) == pixels, (motion, pixels, count)
    assert {motion for motion, _ in told} == set(MOTIONS)


def test_a_motion_alone_goes_on_and_turns_the_way_it_says() -> None:
    for layout in ("one", "two_sounds"):
        for index, scene in scenes(layout, 20):
            frames = render(scene, 3, index, size=SIZE, num_frames=FRAMES)
            (mover,) = scene.movers
            mask = seen(frames, mover.colour)
            half = FRAMES // 2
            found = {motion_of(part) for part in (mask, mask[: half + 1], mask[half:])}
            assert found == {shown(mover.motions[0])}
    # which way it turns, pixels of a symmetric shape do not tell: as the single-shape clips do
    turning = [(i, s) for i, s in scenes("two_motions", 80) if "clockwise" in s.movers[0].motions]
    index, scene = turning[0]
    (mover,) = scene.movers
    angles = synthetic.states(
        synthetic.Clip({"motion": "clockwise"}, mover.start, mover.travel, 0.1, {}), 3
    )[:, 2]
    part = mover.motions.index("clockwise")
    ours = states(mover, 5)[2 * part : 2 * part + 3, 2]
    assert ours == pytest.approx(angles, abs=1e-5)


def test_no_shuffled_clip_tells_which_way_a_shape_turns() -> None:
    for layout in ("one", "two_motions", "two_shapes"):
        for _, scene in scenes(layout, 40):
            for mover in scene.movers:
                turns = (states(mover, 33)[:, 2].astype(np.float64) + 0.5) % 1.0 - 0.5
                assert abs(turns.min() + turns.max()) / 2 <= synthetic.TILT + 1e-6


def spectrum(wave: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.rfft(wave)) ** 2
    bands = np.log(1e-6 + np.add.reduceat(power, np.linspace(0, len(power), 33).astype(int)[:-1]))
    loud = (wave.reshape(-1, 160) ** 2).mean(1)
    return np.append(bands - bands.mean(), 10 * np.log(loud.std() / loud.mean()))


def test_the_sound_changes_half_way() -> None:
    known = {
        name: np.stack(
            [
                spectrum(synthetic.synthesise(name, 1.0, np.random.default_rng(1000 + i)))
                for i in range(60)
            ]
        )
        for name in SOUNDS
    }

    def likely(wave: np.ndarray, name: str) -> float:
        """Log-likelihood of independent normal features."""
        mean, spread = known[name].mean(0), known[name].std(0) + 0.3
        return float((-(((spectrum(wave) - mean) / spread) ** 2) / 2 - np.log(spread)).sum())

    right, tried = 0, 0
    for index, scene in scenes("two_sounds", 60):
        one, two = scene.sounds
        assert one != two
        wave = sound(scene, 2.0, 3, index, {})
        assert wave.shape == (32_000,)
        for part, name, other in ((wave[:16_000], one, two), (wave[16_000:], two, one)):
            right += likely(part, name) > likely(part, other)
            tried += 1
    assert right > 0.95 * tried
    _, scene = scenes("one", 1)[0]
    assert len(scene.sounds) == 1


def test_training_never_shows_what_is_held_out() -> None:
    train = [draw_scene(9, i) for i in range(2000)]
    pairs = Counter((m.shape, m.colour) for scene in train for m in scene.movers)
    assert not set(HELD_OUT.items()) & set(pairs)
    assert len(pairs) == 4 * 6 - 4  # every other pair is shown
    assert min(pairs.values()) > 40
    assert {scene.combination for scene in train} == {"seen"}
    assert set(HELD_OUT) == set(SHAPES)
    held = [draw_scene(9, i, held_out=True) for i in range(400)]
    for scene in held:
        new = any(HELD_OUT[m.shape] == m.colour for m in scene.movers)
        assert scene.combination == ("new" if new else "seen")
    counts = Counter((scene.layout, scene.combination) for scene in held)
    assert set(counts.values()) == {50}  # each layout with both
    shown = {(s.movers[0].shape, s.movers[0].colour) for s in held if s.combination == "new"}
    assert shown == set(HELD_OUT.items())


def test_layouts_and_values_are_balanced() -> None:
    drawn = [draw_scene(4, i) for i in range(2400)]
    assert set(Counter(s.layout for s in drawn).values()) == {600}
    assert set(Counter(s.movers[0].motions[0] for s in drawn).values()) == {300}
    assert set(Counter(s.sounds[0] for s in drawn).values()) == {400}
    second = Counter(s.movers[0].motions[1] for s in drawn if s.layout == "two_motions")
    assert set(second) == set(MOTIONS)
    assert max(second.values()) < 2 * min(second.values())
    assert {s.sounds[1] for s in drawn if s.layout == "two_sounds"} == set(SOUNDS)
    assert {s.layout for s in drawn[:4]} == set(LAYOUTS)


def test_attributes_tell_all() -> None:
    for layout, shapes, events in (
        ("one", 1, 1),
        ("two_shapes", 2, 1),
        ("two_motions", 1, 2),
        ("two_sounds", 1, 2),
    ):
        _, scene = scenes(layout, 1)[0]
        about = scene.attributes
        assert about["layout"] == layout
        assert about["shapes"] == [{"shape": m.shape, "colour": m.colour} for m in scene.movers]
        assert (len(about["shapes"]), len(about["events"])) == (shapes, events)
        for number, event in enumerate(about["events"]):
            assert event["sound"] == scene.sounds[number]
            assert event["motions"] == [m.motions[number] for m in scene.movers]
        assert (about["background"], about["tone"]) == (scene.background, scene.tone)
        assert "word" not in about
    assert draw_scene(3, 0, speech=True).attributes["word"] in synthetic.SPOKEN


def test_a_scene_is_a_function_of_its_number() -> None:
    assert draw_scene(5, 7) == draw_scene(5, 7)
    assert draw_scene(5, 7) != draw_scene(6, 7)
    scene = draw_scene(5, 7)
    assert np.array_equal(render(scene, 5, 7), render(scene, 5, 7))
    assert np.array_equal(sound(scene, 1.0, 5, 7, {}), sound(scene, 1.0, 5, 7, {}))
