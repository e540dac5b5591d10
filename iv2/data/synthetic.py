"""The toy world: real mp4 files in which one coloured shape moves while a sound plays.

Over the sound a voice may say a word, which the picture does not show.

The state of the shape is a point on a torus: column, row, angle and size, each in [0, 1) and each
wrapping around. A motion adds a constant speed to one of the four coordinates. Column, row and size
start at a point drawn uniformly, and a uniform point shifted by a constant is uniform again: they
have the same distribution in each frame under all eight motions. Angles are near upright, since at
any angle a small encoder needs far more clips to tell shapes apart (41 % against 85 % after 600
steps), and a shape that turns is upright half-way: a frame may tell that it turns, not which way.
Opposite motions are each other's time reversal. The video is coded intra-only at a constant
quantiser, so the codec adds no trace of the neighbouring frames either. Motion has to be read from
several frames.

A motion covers less than half a turn of its coordinate within a clip, so that the sign of the
change is the same for every pair of frames and a small model can learn it in minutes.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from iv2.data.files import write_text
from iv2.data.speech import utterances
from iv2.data.toy_words import SPOKEN, captions, vocabulary

Floats = NDArray[np.float32]

# Raised whenever the same arguments would give other clips.
VERSION = 7

# Coordinate of (column, row, angle, size) that moves, and its sign. Rows grow downwards.
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "clockwise": (2, 1),
    "counter-clockwise": (2, -1),
    "growing": (3, 1),
    "shrinking": (3, -1),
}
SHAPES = ("triangle", "bar", "cross", "corner")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.18, 0.18),
    "green": (0.20, 0.85, 0.30),
    "blue": (0.25, 0.45, 1.00),
    "yellow": (0.98, 0.90, 0.20),
    "pink": (0.98, 0.40, 0.85),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = ("stripes", "checks", "dots", "clouds")
TONES: dict[str, tuple[float, float, float]] = {
    "navy": (0.12, 0.16, 0.32),
    "forest": (0.12, 0.28, 0.17),
    "brown": (0.30, 0.20, 0.13),
    "grey": (0.24, 0.24, 0.25),
}
SOUNDS = ("beeps", "hum", "siren", "clicks", "hiss", "bell")

# What is drawn for each clip, with the number of values; each is balanced over the clips.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "motion": tuple(MOTIONS),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": BACKGROUNDS,
    "tone": tuple(TONES),
    "sound": SOUNDS,
    "word": SPOKEN,
}

# Of the 3072 combinations of what is seen.
MOST_SCENES = 1000
SAMPLE_RATE = 16_000
FPS = 8
# Diameters as fractions of the frame; the size coordinate is logarithmic between them.
SMALLEST, LARGEST = 0.3, 0.75
TILT = 0.04  # of a shape, turns to either side, at most
# Part of its torus coordinate that a motion covers over the whole clip.
TRAVEL = (0.36, 0.49)

_TABLE = 256  # side of a shape's distance table
_TABLE_HALF = 0.75  # the table covers [-_TABLE_HALF, _TABLE_HALF], in diameters


@dataclass(frozen=True)
class Clip:
    """One clip before it is rendered: names of the attributes, and the numbers behind them."""

    attributes: dict[str, str]
    start: tuple[float, float, float, float]  # column, row, angle, size, each in [0, 1)
    travel: float  # part of the moving coordinate covered over the whole clip
    contrast: float  # of the texture
    captions: dict[str, list[str]]  # wordings by kind: visual, audio, av and, spoken, speech, avs

    @property
    def labels(self) -> dict[str, int]:
        """The attributes as class numbers."""
        return {name: ATTRIBUTES[name].index(value) for name, value in self.attributes.items()}


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *stream])))


def draw_clip(seed: int, index: int, *, scenes: int = 0, speech: bool = False) -> Clip:
    """Draw clip `index` of the world `seed`; it does not depend on how many clips there are.

    Args:
        seed: Of the world.
        index: Of the clip.
        scenes: If not 0: clips share so many pictures (all that is seen but for places and speed);
            clips of one picture differ in sound or word.
        speech: Whether a word is spoken.
    """
    attributes = _attributes(seed, index)
    if scenes:
        turn, scene = divmod(index, scenes)
        words = len(SPOKEN) if speech else 1
        pairs = np.argsort(_rng(seed, 5, scene).random(len(SOUNDS) * words))
        sound, word = divmod(int(pairs[turn % len(pairs)]), words)
        attributes = _pictures(seed, scenes)[scene] | {"sound": SOUNDS[sound], "word": SPOKEN[word]}
    if not speech:
        del attributes["word"]
    rng = _rng(seed, 2, index)
    column, row, angle, size, travel, contrast = (float(u) for u in rng.random(6))
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * travel
    return Clip(
        attributes=attributes,
        start=(column, row, start_angle(angle, [attributes["motion"]], travel), size),
        travel=travel,
        contrast=0.10 + 0.08 * contrast,
        captions=captions(attributes, rng),
    )


def start_angle(u: float, motions: Sequence[str], travel: float) -> float:
    """The angle at which a shape starts, in turns in [0, 1), drawn by u in [0, 1).

    Upright, but for a tilt, or as far on one side of that as it turns to the other: which way it
    turns is not to be seen in any frame.
    """
    steps = [MOTIONS[motion][1] * travel * (MOTIONS[motion][0] == 2) for motion in motions]
    angles = list(accumulate(steps, initial=0.0))
    return ((2 * u - 1) * TILT - (min(angles) + max(angles)) / 2) % 1.0


def _attributes(seed: int, index: int) -> dict[str, str]:
    attributes = {}
    for stream, (name, values) in enumerate(ATTRIBUTES.items()):
        # A fresh permutation of the values for each run of len(values) clips: balanced, and
        # independent between attributes.
        block, place = divmod(index, len(values))
        order = np.argsort(_rng(seed, 1, stream, block).random(len(values)))
        attributes[name] = values[int(order[place])]
    return attributes


@cache
def _pictures(seed: int, scenes: int) -> tuple[dict[str, str], ...]:
    """What is seen in each scene: the first so many different draws."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    index = 0
    while len(found) < scenes:
        seen = _attributes(seed, index)
        del seen["sound"], seen["word"]
        found.setdefault(tuple(seen.values()), seen)
        index += 1
    return tuple(found.values())


# ---- pictures


def states(clip: Clip, num_frames: int) -> Floats:  # [T, 4]
    """Column, row, angle and size of the shape in each frame, in [0, 1)."""
    axis, sign = MOTIONS[clip.attributes["motion"]]
    state = np.tile(np.asarray(clip.start, np.float64), (num_frames, 1))
    state[:, axis] += sign * clip.travel * np.arange(num_frames) / max(1, num_frames - 1)
    return np.asarray(state % 1.0, np.float32)


def _outline(shape: str) -> NDArray[np.float64]:  # [vertices, 2]
    """Corners of a shape: (right, down) pairs.

    Some are symmetric; within a clip they turn by less than half a turn, a little each frame.
    """
    if shape == "triangle":
        points = np.array([(0, -1.2), (0.75, 0.8), (-0.75, 0.8)])
    elif shape == "bar":
        points = np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
    elif shape == "cross":
        arm = [(-0.3, -1), (0.3, -1), (0.3, -0.3)]
        turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        points = np.array([(a * x + b * y, c * x + d * y) for a, b, c, d in turns for x, y in arm])
    elif shape == "corner":
        points = np.array([(-0.7, -1), (-0.1, -1), (-0.1, 0.4), (0.7, 0.4), (0.7, 1), (-0.7, 1)])
    else:
        raise ValueError(f"toyworld: shape must be one of {SHAPES}, got {shape!r}")
    centred: NDArray[np.float64] = points - (points.max(0) + points.min(0)) / 2
    return centred / (2 * float(np.linalg.norm(centred, axis=1).max()))


@cache
def _distance_table(shape: str) -> Floats:  # [_TABLE * _TABLE]
    """Signed distance to the outline, in diameters, negative inside."""
    points = _outline(shape)
    axis = (np.arange(_TABLE) + 0.5) / _TABLE * 2 * _TABLE_HALF - _TABLE_HALF
    right, down = np.meshgrid(axis, axis)
    nearest = np.full(right.shape, np.inf)
    inside = np.zeros(right.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((right - ax) * ex + (down - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(right - ax - along * ex, down - ay - along * ey))
        if ay != by:
            crosses = (ay > down) != (by > down)
            inside ^= crosses & (right < ax + (down - ay) * ex / ey)
    return np.where(inside, -nearest, nearest).ravel().astype(np.float32)


def _coverage(shape: str, state: Floats, size: int) -> Floats:  # [T, size, size]
    """How much of each pixel the shape covers, in [0, 1], with wrap-around at the edges."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx = (pixels - state[:, 0:1] + 0.5) % 1.0 - 0.5  # [T, size]
    dy = (pixels - state[:, 1:2] + 0.5) % 1.0 - 0.5
    diameter = SMALLEST * (LARGEST / SMALLEST) ** state[:, 3:4]
    scale = _TABLE / (2 * _TABLE_HALF) / diameter
    cos, sin = np.cos(2 * math.pi * state[:, 2:3]), np.sin(2 * math.pi * state[:, 2:3])
    column = (scale * cos * dx)[:, None, :] + (scale * sin * dy)[:, :, None]
    row = (scale * cos * dy)[:, :, None] - (scale * sin * dx)[:, None, :]
    for index in (column, row):
        index += _TABLE / 2
        np.clip(index, 0, _TABLE - 1, out=index)
    cell = row.astype(np.int32) * _TABLE + column.astype(np.int32)
    cover: Floats = _distance_table(shape)[cell]
    cover *= -size * diameter[:, :, None]
    cover += 0.5
    return cover.clip(0, 1)


def _texture(kind: str, size: int, rng: np.random.Generator) -> Floats:  # [size, size]
    """A static pattern in [-1, 1]; wavelengths are parts of the frame, not pixels."""
    turn, period, phase_x, phase_y = rng.random(4)
    axis = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    turn, period = turn * math.pi, 0.12 + 0.12 * period
    u = np.sin(2 * math.pi * ((math.cos(turn) * x + math.sin(turn) * y) / period + phase_x))
    v = np.sin(2 * math.pi * ((math.cos(turn) * y - math.sin(turn) * x) / period + phase_y))
    if kind == "stripes":
        pattern = np.clip(2 * u, -1, 1)
    elif kind == "checks":
        pattern = np.clip(4 * u * v, -1, 1)
    elif kind == "dots":
        pattern = np.clip(3 * (u + v) - 2, -1, 1)
    elif kind == "clouds":
        grid = 2 * rng.random((9, 9)) - 1
        place = axis * 8
        low = place.astype(int)
        part = place - low
        rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
        pattern = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    else:
        raise ValueError(f"toyworld: background must be one of {BACKGROUNDS}, got {kind!r}")
    return np.asarray(pattern, np.float32)


def render(
    clip: Clip, seed: int, index: int, *, size: int = 64, num_frames: int = 16
) -> NDArray[np.uint8]:  # [T, size, size, 3]
    """Draw the frames of one clip, before any compression."""
    names = clip.attributes
    rng = _rng(seed, 3, index)
    light = (0.92 + 0.16 * rng.random(3)).astype(np.float32)
    pattern = _texture(names["background"], size, rng)[..., None] * clip.contrast
    back = np.array(TONES[names["tone"]], np.float32) + pattern  # [size, size, 3]
    front = np.array(COLOURS[names["colour"]], np.float32)
    back, front = back * light * 255, np.clip(front * light, 0, 1) * 255
    cover = _coverage(names["shape"], states(clip, num_frames), size)
    frames = cover[..., None] * (front - back)
    frames += back + np.float32(0.5)
    return np.asarray(frames.clip(0, 255), np.uint8)


# ---- sounds


def synthesise(
    sound: str, seconds: float, rng: np.random.Generator, *, sample_rate: int = SAMPLE_RATE
) -> Floats:  # [samples]
    """One of the six sounds, mono, in [-1, 1]; pitch, phase, rate and loudness are drawn."""
    pitch, phase, rate, loudness = rng.random(4)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    beat = (t * (2.5 + 2 * rate) + phase) % 1.0  # place within the current repetition
    if sound == "beeps":
        wave = np.sin(2 * math.pi * (800 + 500 * pitch) * t) * (beat < 0.4)
    elif sound == "hum":
        tone = 2 * math.pi * (90 + 60 * pitch) * t
        wave = (np.sin(tone) + 0.6 * np.sin(2 * tone) + 0.4 * np.sin(3 * tone)) / 2
    elif sound == "siren":
        sweep = np.sin(2 * math.pi * (t * (0.7 + 0.6 * rate) + phase))
        wave = np.sin(2 * math.pi * np.cumsum((700 + 300 * pitch) * 2**sweep) / sample_rate)
    elif sound == "clicks":
        wave = np.exp(-beat * 60) * (2 * rng.random(len(t)) - 1)
    elif sound == "hiss":
        wave = (2 * rng.random(len(t)) - 1) * 0.7
    elif sound == "bell":
        strike = (t * (0.8 + 0.4 * rate) + phase) % 1.0
        partials = (1.0, 2.0, 2.4, 3.0, 4.2)
        tones = [
            np.sin(2 * math.pi * (350 + 250 * pitch) * p * t) * np.exp(-3 * p**0.5 * strike)
            for p in partials
        ]
        wave = np.sum(tones, 0) / 3
    else:
        raise ValueError(f"toyworld: sound must be one of {SOUNDS}, got {sound!r}")
    return np.asarray(np.clip(wave * (0.3 + 0.4 * loudness), -1, 1), np.float32)


# ---- files


def encode(
    path: Path,
    frames: NDArray[np.uint8],  # [T, H, W, 3]
    sound: Floats,  # [samples]
    *,
    fps: int,
    sample_rate: int = SAMPLE_RATE,
) -> None:
    """Write an mp4 file: H.264, intra-only at a constant quantiser, and AAC."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "bitexact"}) as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "veryfast", "tune": "zerolatency", "qp": "20", "g": "1"}
        video.thread_count = 1
        audio = container.add_stream("aac", rate=sample_rate, layout="mono")
        # A constant quantiser: the search for a constant bit rate costs three times as much.
        audio.options = {"aac_coder": "fast", "flags": "+qscale", "global_quality": "236"}
        audio.options |= {"aac_tns": "0", "aac_pns": "0"}
        converter = VideoReformatter()
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(video.encode(converter.reformat(rgb, format="yuv420p", threads=1)))
        container.mux(video.encode())
        block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        block.sample_rate, block.pts = sample_rate, 0
        resampler = av.AudioResampler("fltp", "mono", sample_rate, frame_size=1024)
        for part in [*resampler.resample(block), *resampler.resample(None)]:
            container.mux(audio.encode(part))
        container.mux(audio.encode())


def add_speech(wave: Floats, spoken: Floats, rng: np.random.Generator) -> Floats:
    """Put a spoken word at a drawn time over a sound, which is turned down under it."""
    spoken = spoken[: len(wave)]
    first = int(rng.random() * (len(wave) - len(spoken) + 1))
    wave = wave.copy()
    part = wave[first : first + len(spoken)]
    part *= 0.25
    part += 0.8 * spoken
    return np.clip(wave, -1, 1)


def write_toyworld(
    out: Path,
    num: int,
    seed: int,
    *,
    size: int = 64,
    num_frames: int = 16,
    scenes: int = 0,
    speech: bool = False,
    workers: int = 1,
) -> Path:
    """Write `num` clips and their list; the same arguments give the same clips and list.

    Args:
        out: Folder to write to. `list.jsonl` is written last: where it and a matching
            `world.json` exist, nothing is done.
        num: Number of clips. The first clips of a larger world are the same.
        seed: Of the world; use another one for held-out clips.
        size: Side of the frames, pixels.
        num_frames: Frames in a clip, at 8 a second; at least a second for speech.
        scenes: How many different pictures the clips share, told apart by sound and word alone; 0:
            each has its own. A scene has at most 60 clips, or 6 without speech.
        speech: A voice says one of ten words in each (needs espeakng-loader, the extra `speech`).
        workers: Threads that render and encode.

    Returns:
        The path of `list.jsonl`: one line per clip with `path` (relative), `captions` by kind
        (visual, audio and av; speech and avs where a word is spoken), `paraphrases` of each,
        `attributes` by name, the same as class numbers in `labels`, `label`, the motion's, and
        `scene`, the number of a shared picture.
        Beside it `vocab.txt` is the WordPiece vocabulary of the captions.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` holds another toy world.
        RuntimeError: speech is asked for and espeakng-loader is not installed.
    """
    limits = {"num": (num, 1), "size": (size, 16), "num_frames": (num_frames, 1)}
    _check(limits | {"scenes": (scenes, 0), "workers": (workers, 1)}, speech)
    out = Path(out)
    world = {"version": VERSION, "num": num, "seed": seed, "size": size}
    world |= {"num_frames": num_frames, "fps": FPS, "scenes": scenes, "speech": speech}
    listing, header = out / "list.jsonl", out / "world.json"
    if header.exists() and json.loads(header.read_text(encoding="utf-8")) != world:
        raise FileExistsError(f"toyworld: {out} holds another toy world; give an empty folder")
    if listing.exists() and header.exists():
        return listing
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_text(header, json.dumps(world) + "\n")
    voices = utterances(SPOKEN, SAMPLE_RATE) if speech else {}

    def make(index: int) -> dict[str, Any]:
        clip = draw_clip(seed, index, scenes=scenes, speech=speech)
        frames = render(clip, seed, index, size=size, num_frames=num_frames)
        rng = _rng(seed, 4, index)
        sound = synthesise(clip.attributes["sound"], num_frames / FPS, rng)
        if speech:
            choices = voices[clip.attributes["word"]]
            sound = add_speech(sound, choices[int(rng.random() * len(choices))], rng)
        name = f"videos/{index:06d}.mp4"
        encode(out / name, frames, sound, fps=FPS)
        shared = {"scene": index % scenes} if scenes else {}
        return {
            "path": name,
            "captions": {kind: wordings[0] for kind, wordings in clip.captions.items()},
            "paraphrases": {kind: wordings[1:] for kind, wordings in clip.captions.items()},
            "attributes": clip.attributes,
            "labels": clip.labels,
            "label": clip.labels["motion"],
            "start_state": clip.start,
            "travel": clip.travel,
            **shared,
        }

    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(make, range(num)))
    write_text(out / "vocab.txt", "".join(f"{token}\n" for token in vocabulary()))
    write_text(listing, "".join(json.dumps(row) + "\n" for row in rows))
    return listing


def _check(limits: dict[str, tuple[int, int]], speech: bool) -> None:
    """Refuse arguments below their least value, or that do not go together."""
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"toyworld: {name} must be at least {least}, got {value}")
    num, size, num_frames, scenes = (limits[n][0] for n in ("num", "size", "num_frames", "scenes"))
    if size % 2:
        raise ValueError(f"toyworld: size must be even, got {size}")
    if speech and num_frames < FPS:
        raise ValueError(
            f"toyworld: num_frames must be at least {FPS} for speech, got {num_frames}"
        )
    if scenes > MOST_SCENES:
        raise ValueError(f"toyworld: scenes must be at most {MOST_SCENES}, got {scenes}")
    most = len(SOUNDS) * (len(SPOKEN) if speech else 1)
    if scenes and num > scenes * most:
        raise ValueError(
            f"toyworld: num must be at most {scenes * most}, {most} clips a scene, got {num}"
        )
