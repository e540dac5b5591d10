"""Toy clips to ask about: one shape, two shapes at once, or two events one after the other.

A scene of one shape and one event is as in ``iv2.data.synthetic``. Two shapes are smaller and
start so that they never meet; with them a single frame tells a little of a growing or shrinking
shape, which it does not otherwise. Some pairs of shape and colour are kept for held-out clips.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iv2.data.synthetic import (
    COLOURS,
    LARGEST,
    MOTIONS,
    SHAPES,
    SMALLEST,
    SOUNDS,
    TONES,
    TRAVEL,
    Floats,
    _attributes,
    _coverage,
    _rng,
    _texture,
    add_speech,
    start_angle,
    synthesise,
)

LAYOUTS = ("one", "two_shapes", "two_motions", "two_sounds")
# Pairs that no training clip shows: one colour for each shape.
HELD_OUT = {"triangle": "red", "bar": "green", "cross": "blue", "corner": "yellow"}
# Part of its coordinate that each of two different motions in a row covers.
_TRAVEL_EACH = (0.28, 0.38)
_GAP = 0.02  # of the frame, at least, between two shapes
_STREAM = 11  # keeps these draws apart from those of the single-shape clips


@dataclass(frozen=True)
class Mover:
    """A shape with its way."""

    shape: str
    colour: str
    motions: tuple[str, ...]  # one an event
    start: tuple[float, float, float, float]  # column, row, angle, size, each in [0, 1)
    travel: float  # part of the moving coordinate covered in an event


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered; events are of equal length."""

    layout: str
    movers: tuple[Mover, ...]
    sounds: tuple[str, ...]  # one an event
    background: str
    tone: str
    word: str | None  # that a voice says
    contrast: float

    @property
    def attributes(self) -> dict[str, Any]:
        """All that can be asked, for the row of a list."""
        said = {} if self.word is None else {"word": self.word}
        motions = zip(*(mover.motions for mover in self.movers), strict=True)
        events = zip(motions, self.sounds, strict=True)
        return {
            "layout": self.layout,
            "shapes": [{"shape": m.shape, "colour": m.colour} for m in self.movers],
            "events": [{"motions": list(each), "sound": sound} for each, sound in events],
            "background": self.background,
            "tone": self.tone,
            **said,
        }

    @property
    def combination(self) -> str:
        """Whether a pair of shape and colour is one that training clips do not show."""
        return "new" if any(HELD_OUT[m.shape] == m.colour for m in self.movers) else "seen"


def draw_scene(seed: int, index: int, *, speech: bool = False, held_out: bool = False) -> Scene:
    """Draw scene `index` of the world `seed`; it does not depend on how many there are.

    Args:
        seed: Of the world.
        index: Of the scene.
        speech: Whether a word is spoken.
        held_out: Every other four scenes show a pair of shape and colour kept from training.
    """
    rng, names = _rng(seed, _STREAM, index), _attributes(seed, index)
    order = np.argsort(_rng(seed, _STREAM + 1, index // len(LAYOUTS)).random(len(LAYOUTS)))
    layout = LAYOUTS[int(order[index % len(LAYOUTS)])]
    new = held_out and index // len(LAYOUTS) % 2 == 1
    events = 2 if layout in ("two_motions", "two_sounds") else 1
    motions, sounds = [names["motion"]] * events, [names["sound"]] * events
    if layout == "two_motions":
        motions[1] = _another(MOTIONS, {motions[0]}, rng)
    if layout == "two_sounds":
        sounds[1] = _another(SOUNDS, {sounds[0]}, rng)
    colour = HELD_OUT[names["shape"]] if new else names["colour"]
    if not new and HELD_OUT[names["shape"]] == colour:
        colour = _another(COLOURS, {colour}, rng)
    low, high = _TRAVEL_EACH if layout == "two_motions" else (t / events for t in TRAVEL)
    travel, contrast = low + (high - low) * rng.random(), 0.10 + 0.08 * rng.random()
    column, row, angle, size = (float(u) for u in rng.random(4))
    start = (column, row, start_angle(angle, motions, travel), size)
    first = Mover(names["shape"], colour, tuple(motions), start, travel)
    movers = (first,) if layout != "two_shapes" else _pair(first, rng)
    word = names["word"] if speech else None
    return Scene(
        layout, movers, tuple(sounds), names["background"], names["tone"], word, float(contrast)
    )


def _another(values: Iterable[str], taken: set[str], rng: np.random.Generator) -> str:
    rest = [value for value in values if value not in taken]
    return rest[int(rng.random() * len(rest))]


def _pair(first: Mover, rng: np.random.Generator) -> tuple[Mover, Mover]:
    """The shape beside another one of another colour and motion, which it never meets."""
    shape = _another(SHAPES, {first.shape}, rng)
    colour = _another(COLOURS, {first.colour, HELD_OUT[shape]}, rng)
    motion = _another(MOTIONS, set(first.motions), rng)
    low, high = TRAVEL
    for _ in range(10_000):
        draws = rng.random(9)
        one = _placed(first.shape, first.colour, first.motions, draws[:4], first.travel)
        travel = float(low + (high - low) * draws[8])
        two = _placed(shape, colour, (motion,), draws[4:8], travel)
        if _apart(one, two):
            return one, two
    raise AssertionError("two small shapes find places")


def _placed(
    shape: str, colour: str, motions: tuple[str, ...], draws: NDArray[np.float64], travel: float
) -> Mover:
    """A shape that stays small, whatever its motion."""
    low, span = {"growing": (0.0, 0.08), "shrinking": (0.5, 0.08)}.get(motions[0], (0.0, 0.5))
    column, row, angle, size = (float(u) for u in draws)
    start = (column, row, start_angle(angle, motions, travel), low + span * size)
    return Mover(shape, colour, motions, start, travel)


def _apart(one: Mover, two: Mover) -> bool:
    a, b = states(one, 33), states(two, 33)
    offset = np.abs((a[:, :2] - b[:, :2] + 0.5) % 1.0 - 0.5)
    radii = sum(SMALLEST * (LARGEST / SMALLEST) ** s[:, 3] / 2 for s in (a, b))
    return bool((np.hypot(offset[:, 0], offset[:, 1]) > radii + _GAP).all())


def states(mover: Mover, num_frames: int) -> Floats:  # [T, 4]
    """Column, row, angle and size of the shape in each frame, in [0, 1)."""
    state = np.tile(np.asarray(mover.start, np.float64), (num_frames, 1))
    events = len(mover.motions)
    progress = np.arange(num_frames) / max(1, num_frames - 1) * events
    for event, motion in enumerate(mover.motions):
        axis, sign = MOTIONS[motion]
        state[:, axis] += sign * mover.travel * (progress - event).clip(0, 1)
    return np.asarray(state % 1.0, np.float32)


def render(
    scene: Scene, seed: int, index: int, *, size: int = 64, num_frames: int = 16
) -> NDArray[np.uint8]:  # [T, size, size, 3]
    """Draw the frames of one scene, before any compression."""
    rng = _rng(seed, _STREAM + 2, index)
    light = (0.92 + 0.16 * rng.random(3)).astype(np.float32)
    pattern = _texture(scene.background, size, rng)[..., None] * scene.contrast
    back = (np.array(TONES[scene.tone], np.float32) + pattern) * light * 255
    frames = np.repeat(back[None].astype(np.float32), num_frames, 0)
    for mover in scene.movers:
        front = np.clip(np.array(COLOURS[mover.colour], np.float32) * light, 0, 1) * 255
        cover = _coverage(mover.shape, states(mover, num_frames), size)
        frames += cover[..., None] * (front - frames)
    return np.asarray((frames + np.float32(0.5)).clip(0, 255), np.uint8)


def sound(
    scene: Scene, seconds: float, seed: int, index: int, voices: dict[str, Any]
) -> Floats:  # [samples]
    """What is heard: the sound of each event in its part of the clip, and the word."""
    rng = _rng(seed, _STREAM + 3, index)
    if len(set(scene.sounds)) == 1:
        wave = synthesise(scene.sounds[0], seconds, rng)
    else:
        part = seconds / len(scene.sounds)
        wave = np.concatenate([synthesise(name, part, rng) for name in scene.sounds])
    if scene.word is None:
        return wave
    choices = voices[scene.word]
    return add_speech(wave, choices[int(rng.random() * len(choices))], rng)
