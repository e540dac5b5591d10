from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from iv2.data import synthetic
from iv2.data.decode import decode, probe
from iv2.data.synthetic import ATTRIBUTES, MOTIONS, Clip, draw_clip, render, states, write_toyworld


def clips(num: int, seed: int = 5) -> list[Clip]:
    return [draw_clip(seed, i) for i in range(num)]


def with_motion(clip: Clip, motion: str, start: np.ndarray | None = None) -> Clip:
    begin = clip.start if start is None else tuple(float(x) for x in start)
    return dataclasses.replace(clip, attributes={**clip.attributes, "motion": motion}, start=begin)


def test_files_and_list(tmp_path: Path) -> None:
    listing = write_toyworld(tmp_path / "w", 6, 3, size=48, num_frames=10, fps=5)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert len(rows) == 6
    for i, row in enumerate(rows):
        path = listing.parent / row["path"]
        info = probe(path)
        assert (info.num_frames, info.height, info.width, info.has_audio) == (10, 48, 48, True)
        assert info.fps == pytest.approx(5)
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.audio[0].codec_context.name == "aac"
        assert row["label"] == row["labels"]["motion"]
        assert row["labels"] == {
            name: ATTRIBUTES[name].index(value) for name, value in row["attributes"].items()
        }
        frames = render(draw_clip(3, i), 3, i, size=48, num_frames=10)
        error = decode(path, range(10)).numpy().astype(int) - frames
        assert abs(error).mean() < 5


def test_same_arguments_same_files(tmp_path: Path) -> None:
    one = write_toyworld(tmp_path / "1", 8, 7, workers=1)
    two = write_toyworld(tmp_path / "2", 8, 7, workers=2)
    more = write_toyworld(tmp_path / "3", 10, 7, workers=2)
    other = write_toyworld(tmp_path / "4", 8, 8)
    assert one.read_bytes() == two.read_bytes()
    assert more.read_bytes().startswith(one.read_bytes())
    assert one.read_bytes() != other.read_bytes()
    for path in sorted((tmp_path / "1" / "videos").iterdir()):
        assert path.read_bytes() == (tmp_path / "2" / "videos" / path.name).read_bytes()


def test_finished_world_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    listing = write_toyworld(tmp_path, 2, 1)
    video = tmp_path / "videos" / "000000.mp4"
    video.write_bytes(b"kept")
    assert write_toyworld(tmp_path, 2, 1) == listing
    assert video.read_bytes() == b"kept"
    listing.unlink()  # as if it had been interrupted
    write_toyworld(tmp_path, 2, 1)
    assert video.read_bytes() != b"kept"
    with pytest.raises(FileExistsError, match="another toy world"):
        write_toyworld(tmp_path, 3, 1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_frame_of_any_motion_is_a_frame_of_every_other_motion(motion: str) -> None:
    """Frame t of one motion is frame t of another whose start is shifted by a constant.

    Starts are uniform on the torus, so the shift leaves their distribution as it is.
    """
    clip = with_motion(draw_clip(0, 3), motion)
    state = states(clip, 16)
    frames = render(clip, 0, 3)
    for other in MOTIONS:
        for t in (0, 6, 15):
            path = states(with_motion(clip, other, np.zeros(4)), 16)
            twin = with_motion(clip, other, (state[t] - path[t]) % 1.0)
            difference = render(twin, 0, 3)[t].astype(int) - frames[t]
            # the distance table is read at the nearest cell: rounding may choose its neighbour
            assert abs(difference).mean() < 0.5


def test_starts_are_uniform_and_independent_of_the_motion() -> None:
    drawn = clips(4000)
    starts = np.array([clip.start for clip in drawn])
    motion = np.array([clip.labels["motion"] for clip in drawn])
    for label in range(8):
        for axis in range(4):
            counts = np.histogram(starts[motion == label, axis], bins=8, range=(0, 1))[0]
            chi2 = ((counts - 62.5) ** 2 / 62.5).sum()
            assert chi2 < 30  # 7 degrees of freedom: p = 1e-4


@pytest.mark.parametrize(
    ("motion", "opposite"),
    [
        ("left", "right"),
        ("up", "down"),
        ("clockwise", "counter-clockwise"),
        ("growing", "shrinking"),
    ],
)
def test_opposite_motions_are_time_reversed(motion: str, opposite: str) -> None:
    clip = with_motion(draw_clip(1, 2), motion)
    end = states(clip, 16)[-1]
    reverse = states(with_motion(clip, opposite, end), 16)[::-1]
    gap = abs(reverse - states(clip, 16))
    assert np.minimum(gap, 1 - gap).max() < 1e-5


def test_the_codec_leaves_no_trace_of_other_frames(tmp_path: Path) -> None:
    frames = render(draw_clip(0, 0), 0, 0)
    sound = np.zeros(32000, np.float32)
    synthetic.encode(tmp_path / "a.mp4", frames, sound, fps=8)
    synthetic.encode(tmp_path / "b.mp4", frames[::-1], sound, fps=8)
    forwards = decode(tmp_path / "a.mp4", range(16)).numpy()
    backwards = decode(tmp_path / "b.mp4", range(16)).numpy()
    assert np.array_equal(forwards, backwards[::-1])


def test_directions_are_as_named() -> None:
    def cover(*state: float) -> np.ndarray:
        return synthetic._coverage("triangle", np.array([state], np.float32), 64)[0]

    def centre(picture: np.ndarray, axis: int) -> float:
        return float(np.average(np.arange(64), weights=picture.sum(1 - axis)))

    still = cover(0.5, 0.5, 0.0, 0.3)
    assert still[:32].sum() < still[32:].sum()  # the triangle points up
    signs = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
    for motion, (axis, sign) in signs.items():
        clip = with_motion(draw_clip(0, 0), motion, np.array([0.5, 0.5, 0, 0.3]))
        later = cover(*states(clip, 16)[5])
        assert sign * (centre(later, axis) - centre(still, axis)) > 2
    for motion, turns in {"clockwise": -1, "counter-clockwise": 1}.items():
        clip = with_motion(draw_clip(0, 0), motion, np.array([0.5, 0.5, 0, 0.3]))
        clip = dataclasses.replace(clip, travel=0.25)
        turned = cover(*states(clip, 16)[-1])
        assert abs(turned - np.rot90(still, turns)).mean() < 0.01
    for motion, sign in {"growing": 1, "shrinking": -1}.items():
        clip = with_motion(draw_clip(0, 0), motion, np.array([0.5, 0.5, 0, 0.5]))
        assert sign * (cover(*states(clip, 16)[5]).sum() - cover(0.5, 0.5, 0, 0.5).sum()) > 20


def test_a_motion_is_large_and_never_ambiguous() -> None:
    for clip in clips(200):
        assert 0.3 < clip.travel < 0.5
        axis, sign = MOTIONS[clip.attributes["motion"]]
        state = states(clip, 16)[:, axis]
        for gap in (1, 5, 15):
            step = (sign * (state[gap:] - state[:-gap])) % 1.0
            assert ((step > 0) & (step < 0.5)).all()


def test_attributes_are_balanced_and_independent() -> None:
    drawn = clips(480)
    for name, values in ATTRIBUTES.items():
        counts = Counter(clip.attributes[name] for clip in drawn)
        assert set(counts) == set(values)
        assert set(counts.values()) == {480 // len(values)}
    pairs = Counter((clip.attributes["motion"], clip.attributes["sound"]) for clip in clips(4800))
    assert len(pairs) == 48
    assert sum((count - 100) ** 2 / 100 for count in pairs.values()) < 75  # p = 1e-4


def test_captions_say_what_is_there_in_several_ways() -> None:
    words = synthetic._WORDS
    for clip in clips(60):
        seen = [clip.caption, *clip.paraphrases]
        heard = [clip.audio_caption, *clip.audio_paraphrases]
        assert len(set(seen)) == 4
        assert len(set(heard)) == 4
        for name in ("motion", "shape", "colour", "background", "tone"):
            for text in seen:
                assert any(word in text for word in words[name][clip.attributes[name]])
        for text in heard:
            assert any(word in text for word in words["sound"][clip.attributes["sound"]])
    assert len({clip.caption for clip in clips(60)}) > 50


def test_sound_is_written_in_time_with_the_picture(tmp_path: Path) -> None:
    for i, sound in enumerate(synthetic.SOUNDS):
        wave = synthetic.synthesise(sound, 2.0, np.random.default_rng(i))
        assert wave.shape == (32000,)
        assert 0.05 < abs(wave).max() <= 1
        path = tmp_path / f"{sound}.mp4"
        synthetic.encode(path, render(draw_clip(0, i), 0, i), wave, fps=8)
        with av.open(str(path)) as container:
            parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        heard = np.concatenate(parts)[:32000]
        assert ((heard - wave) ** 2).sum() < 0.02 * (wave**2).sum()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num", 0, "num must be at least 1, got 0"),
        ("size", 8, "size must be at least 16, got 8"),
        ("size", 33, "size must be even, got 33"),
        ("num_frames", 0, "num_frames must be at least 1, got 0"),
        ("fps", 0, "fps must be at least 1, got 0"),
        ("workers", 0, "workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, name: str, value: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"toyworld: {expected}"):
        write_toyworld(tmp_path, **{"num": 1, "seed": 0, name: value})


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="shape must be one of"):
        synthetic._outline("square")
    with pytest.raises(ValueError, match="background must be one of"):
        synthetic._texture("plain", 16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="sound must be one of"):
        synthetic.synthesise("silence", 1.0, np.random.default_rng(0))
