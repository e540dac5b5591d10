from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from iv2.data import speech, synthetic, toy_words
from iv2.data.audio import SoundConfig, fbank
from iv2.data.captions import Tokenizer, clean_caption
from iv2.data.decode import decode, probe
from iv2.data.speech import utterances
from iv2.data.synthetic import ATTRIBUTES, MOTIONS, Clip, draw_clip, render, states, write_toyworld


def clips(num: int, seed: int = 5) -> list[Clip]:
    return [draw_clip(seed, i) for i in range(num)]


def with_motion(clip: Clip, motion: str, start: np.ndarray | None = None) -> Clip:
    begin = clip.start if start is None else tuple(float(x) for x in start)
    return dataclasses.replace(clip, attributes={**clip.attributes, "motion": motion}, start=begin)


def test_files_and_list(tmp_path: Path) -> None:
    listing = write_toyworld(tmp_path / "w", 6, 3, size=48, num_frames=10)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert len(rows) == 6
    for i, row in enumerate(rows):
        path = listing.parent / row["path"]
        info = probe(path)
        assert (info.num_frames, info.height, info.width, info.has_audio) == (10, 48, 48, True)
        assert info.fps == pytest.approx(8)
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

    But for angles, starts are uniform, so the shift leaves their distribution as it is.
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
        for axis in (0, 1, 3):
            counts = np.histogram(starts[motion == label, axis], bins=8, range=(0, 1))[0]
            chi2 = ((counts - 62.5) ** 2 / 62.5).sum()
            assert chi2 < 30  # 7 degrees of freedom: p = 1e-4


def test_shapes_are_upright_half_way_so_that_no_frame_tells_which_way_they_turn() -> None:
    angles: dict[str, list[float]] = {}
    for clip in clips(400):
        turns = (states(clip, 16)[:, 2].astype(np.float64) + 0.5) % 1.0 - 0.5
        assert abs(turns.min() + turns.max()) / 2 <= synthetic.TILT + 1e-6
        if "clockwise" not in clip.attributes["motion"]:
            assert abs(turns).max() <= synthetic.TILT + 1e-6
        angles.setdefault(clip.attributes["motion"], []).extend(turns)
    one, other = (np.sort(angles[name]) for name in ("clockwise", "counter-clockwise"))
    assert one[-1] - one[0] > 0.4
    assert np.interp(np.linspace(0, 1, 9), np.linspace(0, 1, len(one)), one) == pytest.approx(
        np.interp(np.linspace(0, 1, 9), np.linspace(0, 1, len(other)), other), abs=0.05
    )


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
        if name == "word":  # only where it is spoken
            continue
        counts = Counter(clip.attributes[name] for clip in drawn)
        assert set(counts) == set(values)
        assert set(counts.values()) == {480 // len(values)}
    pairs = Counter((clip.attributes["motion"], clip.attributes["sound"]) for clip in clips(4800))
    assert len(pairs) == 48
    assert sum((count - 100) ** 2 / 100 for count in pairs.values()) < 75  # p = 1e-4


def test_captions_say_what_is_there_in_several_ways() -> None:
    words, seen = toy_words._WORDS, ("motion", "shape", "colour", "background", "tone")
    told = {"visual": seen, "audio": ("sound",), "speech": ("word",)}
    told |= {"av": (*seen, "sound"), "avs": (*seen, "sound", "word")}
    for i in range(60):
        clip = draw_clip(5, i, speech=True)
        assert set(clip.captions) == set(told)
        for kind, wordings in clip.captions.items():
            assert len(set(wordings)) == 4
            for text in wordings:
                for name, values in words.items():
                    said = any(word in text for word in values[clip.attributes[name]])
                    assert said or name not in told[kind], (kind, text)
    assert set(draw_clip(5, 0).captions) == {"visual", "audio", "av"}
    assert len({clip.captions["visual"][0] for clip in clips(60)}) > 50


def test_scenes_share_the_picture_and_differ_in_sound_or_word() -> None:
    drawn = [draw_clip(2, i, scenes=4, speech=True) for i in range(4 * 60)]
    seen = ("motion", "shape", "colour", "background", "tone")
    for scene in range(4):
        some = [clip.attributes for clip in drawn[scene::4]]
        assert len({tuple(a[name] for name in seen) for a in some}) == 1
        assert len({(a["sound"], a["word"]) for a in some}) == 60
    assert len({clip.start for clip in drawn}) == 240
    mute = [draw_clip(2, i, scenes=4) for i in range(4 * 6)]
    assert len({clip.attributes["sound"] for clip in mute[1::4]}) == 6


def test_scenes_are_different() -> None:
    seen = ("motion", "shape", "colour", "background", "tone")
    first = [draw_clip(1, i, scenes=40) for i in range(40)]
    assert len({tuple(draw_clip(1, i).attributes[name] for name in seen) for i in range(40)}) == 39
    assert len({tuple(clip.attributes[name] for name in seen) for clip in first}) == 40
    fewer = draw_clip(1, 3, scenes=10)
    assert all(fewer.attributes[name] == first[3].attributes[name] for name in seen)


def test_rows_say_which_scene_they_show(tmp_path: Path) -> None:
    listing = write_toyworld(tmp_path, 5, 0, size=16, num_frames=2, scenes=3)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [row["scene"] for row in rows] == [0, 1, 2, 0, 1]
    assert all(row["attributes"].keys() == rows[0]["attributes"].keys() for row in rows)
    assert "word" not in rows[0]["attributes"]


def test_captions_fit_the_text_tower() -> None:
    """Of the small recipes: 40 tokens with [CLS] and [SEP]."""
    for i in range(200):
        for wordings in draw_clip(3, i, speech=True).captions.values():
            assert max(len(clean_caption(text).split()) for text in wordings) <= 38


def test_every_word_of_a_caption_is_in_the_vocabulary(tmp_path: Path) -> None:
    words = set(toy_words.vocabulary())
    for i in range(80):
        for wordings in draw_clip(5, i, speech=True).captions.values():
            assert {w for text in wordings for w in clean_caption(text).split()} <= words
    write_toyworld(tmp_path, 1, 0, size=16, num_frames=2)
    text = Tokenizer(tmp_path).encode(["zebra 7"])
    assert len(text.ids) == 2 + 5 + 1  # spelt


def test_speech_is_heard_and_says_different_words(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    spoken = utterances(toy_words.SPOKEN, 16_000)
    assert set(spoken) == set(toy_words.SPOKEN)
    for waves in spoken.values():
        assert len(waves) == 8
        for wave in waves:
            assert 0.2 < len(wave) / 16_000 < 1.2
            assert abs(wave).max() == pytest.approx(1)
    quiet = np.full(32_000, 0.2, np.float32)
    word = spoken["seven"][0]
    mixed = synthetic.add_speech(quiet, word, np.random.default_rng(0))
    changed = np.flatnonzero(mixed != quiet)
    for sound in synthetic.SOUNDS:
        ratios = []
        for i, said in enumerate(toy_words.SPOKEN):
            under = synthetic.synthesise(sound, 2.0, np.random.default_rng(i))
            heard = synthetic.add_speech(under, spoken[said][0], np.random.default_rng(i))
            place = np.flatnonzero(heard != under)
            turned_down = 0.25 * under[place]
            voice = heard[place] - turned_down
            ratios.append((voice**2).mean() / (turned_down**2).mean())
        assert np.median(ratios) > 1.5, sound
    assert len(changed) == pytest.approx(len(word), rel=0.05)
    assert abs(mixed).max() > 0.6
    one = write_toyworld(tmp_path / "1", 3, 7, size=16, num_frames=16, speech=True)
    two = write_toyworld(tmp_path / "2", 3, 7, size=16, num_frames=16, speech=True, workers=2)
    assert one.read_bytes() == two.read_bytes()
    for path in sorted((tmp_path / "1" / "videos").iterdir()):
        assert path.read_bytes() == (tmp_path / "2" / "videos" / path.name).read_bytes()


def test_speech_is_the_same_each_time_and_differs_by_word() -> None:
    pytest.importorskip("espeakng_loader")
    once = utterances(("seven", "coffee"), 16_000)
    utterances.cache_clear()
    again = utterances(("seven", "coffee"), 16_000)
    for word, waves in once.items():
        assert all(np.array_equal(a, b) for a, b in zip(waves, again[word], strict=True))
    config = SoundConfig(num_frames=48)

    def spectrum(wave: np.ndarray) -> np.ndarray:
        return fbank(torch.from_numpy(wave), config).numpy().ravel()

    # two speeds of a voice are closer than two words at one speed
    seven, faster, coffee = (spectrum(w) for w in (*again["seven"][:2], again["coffee"][0]))
    assert np.corrcoef(seven, faster)[0, 1] > np.corrcoef(seven, coffee)[0, 1]


def test_a_failure_of_espeak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(speech, "_CHILD", "raise OSError('no voice today')")
    with pytest.raises(RuntimeError, match=r"espeak must speak: (?s:.*)no voice today"):
        utterances(("nothing",), 16_000)


def test_speech_without_its_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    utterances.cache_clear()
    with pytest.raises(RuntimeError, match=r"pip install iv2\[speech\]"):
        write_toyworld(tmp_path, 1, 0, speech=True)


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
        ("scenes", -1, "scenes must be at least 0, got -1"),
        ("scenes", 1001, "scenes must be at most 1000, got 1001"),
        ("workers", 0, "workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, name: str, value: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"toyworld: {expected}"):
        write_toyworld(tmp_path, **{"num": 1, "seed": 0, name: value})


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num must be at most 12, 6 clips a scene, got 13"):
        write_toyworld(tmp_path, 13, 0, scenes=2)
    with pytest.raises(ValueError, match="num must be at most 120, 60 clips a scene, got 121"):
        write_toyworld(tmp_path, 121, 0, scenes=2, speech=True)
    with pytest.raises(ValueError, match="num_frames must be at least 8 for speech, got 7"):
        write_toyworld(tmp_path, 1, 0, num_frames=7, speech=True)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="shape must be one of"):
        synthetic._outline("square")
    with pytest.raises(ValueError, match="background must be one of"):
        synthetic._texture("plain", 16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="sound must be one of"):
        synthetic.synthesise("silence", 1.0, np.random.default_rng(0))
