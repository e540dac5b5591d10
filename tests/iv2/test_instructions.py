from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iv2.data.captions import Tokenizer
from iv2.data.clips import read_list
from iv2.data.instructions import (
    CHOICE_REQUEST,
    SYSTEM_PROMPT,
    choice_answer,
    choice_prompt,
    held_out_rows,
    text_rows,
    train_rows,
    write_questions,
)
from iv2.data.synthetic import COLOURS, SHAPES, SOUNDS, write_toyworld
from iv2.data.toy_questions import QUESTION_KINDS, ask
from iv2.data.toy_scenes import HELD_OUT, draw_scene
from iv2.data.toy_words import QUESTIONS, SPOKEN, wordings
from iv2.models.language import VIDEO_END, VIDEO_START

MOTIONS = {  # said here anew, so that a wrong table is noticed
    "moving left": "left",
    "moving right": "right",
    "moving up": "up",
    "moving down": "down",
    "turning counter-clockwise": "counter-clockwise",
    "turning clockwise": "clockwise",
    "growing": "growing",
    "shrinking": "shrinking",
}


def one_of(values: Any, text: str) -> str | None:
    """The value that a text names, as whole words."""
    found = [v for v in values if re.search(rf"(?<![\w-]){re.escape(v)}(?![\w-])", text)]
    assert len(found) <= 1, (found, text)
    return found[0] if found else None


def oracle(question: str, about: dict[str, Any]) -> str:
    """The short answer, from the words of the question and the attributes alone."""
    shapes, events = about["shapes"], about["events"]
    text = question.lower().rstrip("?.")
    shape, colour = one_of(SHAPES, text), one_of(COLOURS, text)
    motion, heard, word = one_of(MOTIONS, text), one_of(SOUNDS, text), one_of(SPOKEN, text)
    chosen = [
        i
        for i, s in enumerate(shapes)
        if shape in (None, s["shape"]) and colour in (None, s["colour"])
    ]
    if re.match(r"(is|do)\b", text):
        if word:
            return "yes" if about["word"] == word else "no"
        if heard:
            return "yes" if heard in [e["sound"] for e in events] else "no"
        if motion:
            (event,) = {json.dumps(e["motions"]) for e in events}
            there = any(json.loads(event)[i] == MOTIONS[motion] for i in chosen)
            return "yes" if there else "no"
        return "yes" if chosen else "no"
    if "how many" in text or "number of shapes" in text:
        return {1: "one", 2: "two"}[len(shapes)]
    if "word" in text:
        return about["word"]
    order = {"first": 0, "last": 1}
    place = next((order[w] for w in order if w in text.split()), None)
    if "hear" in text or "sound" in text:
        sounds = [e["sound"] for e in events]
        if place is None and ("after" in text or "before" in text):
            place = sounds.index(heard) + (1 if "after" in text else -1)
            assert place in (0, 1)
        return sounds[place] if place is not None else sounds[0]
    assert len(chosen) == 1, question
    names = {value: key for key, value in MOTIONS.items()}
    motions = [names[e["motions"][chosen[0]]] for e in events]
    if place is None and ("after" in text or "before" in text):
        place = motions.index(motion) + (1 if "after" in text else -1)
        assert place in (0, 1)
    if place is not None:
        return motions[place]
    if re.search(r"\b(move|moving|motion|do)\b", re.sub("do you", "", text)):
        assert len(set(motions)) == 1
        return motions[0]
    if "colour" in text:
        return shapes[chosen[0]]["colour"]
    assert "shape" in text
    return shapes[chosen[0]]["shape"]


@cache
def train(num: int, seed: int = 2, speech: bool = True) -> list[dict[str, Any]]:
    rows = []
    for i in range(num):
        scene = draw_scene(seed, i, speech=speech)
        for some in train_rows(scene, f"{i}.mp4", seed, i).values():
            rows += some
    return rows


@cache
def held_out(num: int, seed: int = 2, speech: bool = True) -> list[dict[str, Any]]:
    rows = []
    for i in range(num):
        scene = draw_scene(seed, i, speech=speech, held_out=True)
        rows += held_out_rows(scene, f"{i}.mp4", seed, i)
    return rows


def rounds(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Kind, question, answer and attributes of each round, choices taken off."""
    found = []
    for row in rows:
        pairs = zip(row["messages"][::2], row["messages"][1::2], strict=True)
        for kind, (asked, told) in zip(row["question_kinds"], pairs, strict=True):
            question, answer = asked["content"], told["content"]
            question = question.split(f"{VIDEO_END}\n")[-1]  # behind a description
            if question.startswith("Question: "):
                lines = question.split("\n")
                assert lines[1] == "Options:"
                assert lines[-1] == CHOICE_REQUEST
                options = dict(re.fullmatch(r"\((\w)\) (.*)", o).groups() for o in lines[2:-1])
                letter, answer = re.fullmatch(r"Best option:\((\w)\) (.*)", answer).groups()
                assert options[letter] == answer
                assert len(set(options.values())) == len(options) >= 2
                question = lines[0].removeprefix("Question: ")
            found.append((kind, question, answer, row["attributes"]))
    return found


def test_answers_are_right() -> None:
    told = Counter()
    for kind, question, answer, about in rounds(train(400)):
        if kind != "caption":
            assert oracle(question, about) == answer, (question, about)
            told[kind] += 1
    for row in held_out(400):
        if row["question_kind"] != "caption":
            assert oracle(row["question"], row["attributes"]) == row["answer"], row
            assert row["messages"][-1]["content"] == row["answer"]
            told[row["question_kind"]] += 1
    assert set(told) == set(QUESTION_KINDS) - {"caption"}
    assert min(told.values()) > 100


def test_captions_say_what_is_there() -> None:
    for row in held_out(200):
        if row["question_kind"] != "caption":
            continue
        about, facts = row["attributes"], row["facts"]
        assert facts["shape"] == [s["shape"] for s in about["shapes"]]
        assert facts["colour"] == [s["colour"] for s in about["shapes"]]
        motions = [e["motions"] for e in about["events"]]
        moved = [list(dict.fromkeys(m)) for m in zip(*motions, strict=True)]
        assert facts["motion"] == [m for some in moved for m in some]
        sounds = list(dict.fromkeys(e["sound"] for e in about["events"]))
        heard = row["kind"] == "audio_video"
        assert facts.get("sound", []) == (sounds if heard else [])
        assert facts.get("word", []) == ([about["word"]] if heard else [])
        assert ("a voice that says" in row["answer"]) == heard
        assert (facts["background"], facts["tone"]) == ([about["background"]], [about["tone"]])


def test_questions_fit_their_media() -> None:
    """Those on a video alone ask for nothing heard."""
    for row in [*train(80), *held_out(80)]:
        for message in row["messages"]:
            text = message["content"]
            if row["kind"] == "video":
                assert not re.search(r"\b(hear|heard|sound|said|says|word)\b", text), text
    assert {row["kind"] for row in train(5)} == {"video", "audio_video", "text"}
    silent = train(60, speech=False)
    assert not any("said" in row["question_kinds"] for row in silent)
    assert {row["kind"] for row in silent} == {"video", "audio_video", "text"}


def is_described(row: dict[str, Any]) -> bool:
    """With a whole caption in the video's place."""
    return "background" in row["messages"][0]["content"].split(VIDEO_END)[0]


def test_descriptions_tell_what_is_asked() -> None:
    """A caption stands in the place of the video, at the beginning."""
    told = Counter()
    for row in train(200):
        if not is_described(row):
            continue
        assert "path" not in row
        first, *later = (message["content"] for message in row["messages"])
        described, _ = first.removeprefix(VIDEO_START).split(f"{VIDEO_END}\n")
        assert not any(VIDEO_START in text for text in later)
        about = row["attributes"]
        assert f"says {about['word']}" in described
        for event in about["events"]:
            assert any(text in described for text in wordings("sound")[event["sound"]])
        told[len(row["messages"]) // 2] += 1
    assert set(told) <= {1, 2, 3}
    assert told[3] > sum(told.values()) / 2


def test_short_descriptions_tell_what_is_asked_and_little_else() -> None:
    every: dict[str, tuple[str, ...]] = {}
    for attribute in ("shape", "colour", "motion", "sound", "word"):
        for some in wordings(attribute).values():
            every[some[0]] = some
    told = Counter()
    for row in train(200):
        first = row["messages"][0]["content"]
        if row["kind"] != "text" or is_described(row):
            continue
        assert "path" not in row
        described = first.removeprefix(VIDEO_START).split(VIDEO_END)[0]
        assert 1 <= len(described.split()) <= 18
        ((kind, question, answer, _),) = rounds([row])
        told[kind] += 1
        if kind == "how_many":
            assert len(re.findall(r"\ban?\b", described)) == ("one", "two").index(answer) + 1
        elif kind == "yes_no":
            # the motion of a shape; else the longest, since one name may be part of another
            moves = {some[0] for some in wordings("motion").values()}
            asked_for = [v for v in every if f" {v}" in question]
            value = max(asked_for, key=lambda v: (v in moves, len(v)))
            named = any(re.search(rf"\b{re.escape(text)}\b", described) for text in every[value])
            # the other of two shapes may move as it is asked
            other = value in moves and len(row["attributes"]["shapes"]) > 1
            assert named if answer == "yes" else not named or other, (described, question)
        else:
            assert any(text in described for text in every[answer]), (described, question)
    assert set(told) == set(QUESTION_KINDS) - {"caption"}


def test_captions_are_a_quarter() -> None:
    kinds = Counter((row["kind"], k) for row in train(1000) for k in row["question_kinds"])
    for kind, captions in (("video", 1), ("audio_video", 2), ("text", 2)):
        assert kinds[kind, "caption"] / (1000 * captions) == pytest.approx(0.25, abs=0.03)
        assert kinds[kind, "shape"] == (2000 if kind == "text" else 1000)


def test_wordings_are_held_out() -> None:
    asked = {question for _, question, _, _ in rounds(train(1000))}
    rows = held_out(1000)
    new = {row["question"] for row in rows if row["phrasing"] == "new"}
    seen = {row["question"] for row in rows if row["phrasing"] == "seen"}
    assert not new & asked
    assert not new & seen
    # what is not new was asked in training, but for rare values
    known = [row["question"] in asked for row in rows if row["phrasing"] == "seen"]
    assert sum(known) > 0.95 * len(known)
    counts = Counter((row["question_kind"], row["phrasing"]) for row in rows)
    for kind in QUESTION_KINDS:
        assert 0.4 < counts[kind, "new"] / (counts[kind, "new"] + counts[kind, "seen"]) < 0.6, kind
    every = {(q.split("{")[0], key) for key, (_, some) in QUESTIONS.items() for q in some}
    assert all(any(text.startswith(start) for text in new) for start, _ in every)


def test_new_wordings_use_known_words() -> None:
    def words(texts: Any) -> set[str]:
        return {w for text in texts for w in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", text))}

    known = words(text for some, _ in QUESTIONS.values() for text in some)
    assert words(text for _, some in QUESTIONS.values() for text in some) <= known
    for seen, new in QUESTIONS.values():
        assert not set(seen) & set(new)
        assert min(len(seen), len(new)) >= 2


def test_combinations_are_held_out() -> None:
    pairs = set(HELD_OUT.items())
    for row in train(1000):
        assert not {(s["shape"], s["colour"]) for s in row["attributes"]["shapes"]} & pairs
    counts = Counter()
    for row in held_out(400):
        shown = {(s["shape"], s["colour"]) for s in row["attributes"]["shapes"]} & pairs
        assert row["combination"] == ("new" if shown else "seen")
        counts[row["combination"], row["phrasing"]] += 1
    assert len(counts) == 4
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_yes_and_no_are_balanced() -> None:
    whole = [r for r in train(1000) if r["kind"] != "text" or is_described(r)]
    told = [(k, q, a, r) for k, q, a, r in rounds(whole) if k == "yes_no"]
    counts = Counter(answer for _, _, answer, _ in told)
    # one of each two clips; seen alone, and seen and heard twice
    assert counts["yes"] == counts["no"] == 2500
    words = [r for r in train(1000) if r["kind"] == "text" and not is_described(r)]
    counts = Counter(answer for kind, _, answer, _ in rounds(words) if kind == "yes_no")
    # of each attribute once; a clip with two motions is not asked for one
    assert counts["yes"] == counts["no"] == 4750
    for row_counts in (
        Counter(
            (r["phrasing"], r["answer"]) for r in held_out(1000) if r["question_kind"] == "yes_no"
        ),
        Counter((r["layout"], a) for _, _, a, r in told),
        Counter((q.split()[0], a) for _, q, a, _ in told),
    ):
        for group in {key for key, _ in row_counts}:
            yes, no = row_counts[group, "yes"], row_counts[group, "no"]
            assert 0.4 < yes / (yes + no) < 0.6, (group, yes, no)
    many = Counter(a for k, _, a, _ in rounds(train(1000)) if k == "how_many")
    assert many["one"] == many["two"]


def test_choices() -> None:
    places: Counter[tuple[str, int]] = Counter()
    for row in held_out(600):
        kind, choices = row["question_kind"], row["choices"]
        if kind == "caption":
            assert choices == []
            continue
        expected = {"yes_no": 2, "how_many": 3}.get(kind, 4)
        assert len(set(choices)) == len(choices) == expected
        places[kind, choices.index(row["answer"])] += 1
        if kind == "before_after":  # the other event is among them
            events = row["attributes"]["events"]
            if row["kind"] == "audio_video":
                assert {e["sound"] for e in events} <= set(choices)
            else:
                names = {value: key for key, value in MOTIONS.items()}
                assert {names[e["motions"][0]] for e in events} <= set(choices)
        if kind in ("shape", "colour") and row["attributes"]["layout"] == "two_shapes":
            assert {s[kind] for s in row["attributes"]["shapes"]} <= set(choices)
    for kind in {kind for kind, _ in places}:
        some = [n for (k, _), n in places.items() if k == kind]
        assert len(some) == {"yes_no": 2, "how_many": 3}.get(kind, 4)
        assert min(some) > 0.6 * max(some), (kind, some)  # no place is more often right
    asked = sum("Question: " in m["content"] for row in train(200) for m in row["messages"])
    total = sum(len(row["question_kinds"]) for row in train(200))
    assert 0.12 < asked / total < 0.3


def test_questions_without_a_clip() -> None:
    told = {r["messages"][0]["content"]: r["messages"][1]["content"] for r in text_rows()}
    assert len(told) == len(text_rows()) == 2 * (4 + 6)  # another word for each shape and colour
    assert told["what is another word for scarlet?"] == "red"
    assert told["tell another word for plus sign."] == "cross"
    assert set(told.values()) == {*SHAPES, *COLOURS}
    assert not [q for q, answer in told.items() if answer in q.split()]


def test_prompts_are_those_of_the_protocol() -> None:
    assert choice_prompt("which?", ["a", "b"]) == (
        "Question: which?\nOptions:\n(A) a\n(B) b\nOnly give the best option."
    )
    assert choice_answer("b", ["a", "b"]) == "Best option:(B) b"


def test_same_seed_same_questions() -> None:
    assert train.__wrapped__(20) == train.__wrapped__(20)
    assert train(20) != train(20, seed=3)
    assert held_out.__wrapped__(20) == held_out.__wrapped__(20)
    assert train(30)[: len(train(20))] == train(20)
    scene = draw_scene(2, 0, speech=True)
    assert ask(scene, 2, 0) == ask(scene, 2, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    return write_questions(folder, 12, 5, size=32, num_frames=8).parent


def test_files(world: Path, tmp_path: Path) -> None:
    again = write_questions(tmp_path / "2", 12, 5, size=32, num_frames=8, workers=2).parent
    more = write_questions(tmp_path / "3", 13, 5, size=32, num_frames=8).parent
    files = {str(p.relative_to(world)) for p in world.rglob("*") if p.is_file()}
    assert len([f for f in files if f.endswith(".mp4")]) == 12 + 8
    assert files == {str(p.relative_to(again)) for p in again.rglob("*") if p.is_file()}
    for name in files:
        assert (world / name).read_bytes() == (again / name).read_bytes(), name
    for name in (
        "list",
        "instructions",
        "instructions-sound",
        "instructions-described",
        "instructions-words",
    ):
        longer = (more / f"{name}.jsonl").read_bytes()
        assert longer.startswith((world / f"{name}.jsonl").read_bytes())
        assert len(longer) > len((world / f"{name}.jsonl").read_bytes())
    videos = {(world / f).read_bytes() for f in files if f.endswith(".mp4")}
    assert len(videos) == 20  # held-out clips are no training clips


def test_lists_can_be_read(world: Path) -> None:
    for name, kinds, rows in (
        ("list", {"video"}, 12),
        ("instructions", {"video"}, None),
        ("instructions-sound", {"audio_video"}, None),
        ("instructions-described", {"text"}, None),
        ("instructions-words", {"text"}, None),
        ("instructions-text", {"text"}, len(text_rows())),
        ("held-out", {"video", "audio_video"}, None),
    ):
        samples = read_list(world / f"{name}.jsonl")
        assert {s.kind for s in samples} == kinds
        assert len(samples) >= 12 if rows is None else len(samples) == rows
        for sample in samples:
            assert sample.kind == "text" or Path(sample.path).is_file()
            assert bool(sample.messages) == (name != "list")
    shown = {s.path for s in read_list(world / "instructions.jsonl")}
    assert not shown & {s.path for s in read_list(world / "held-out.jsonl")}
    for sample in read_list(world / "list.jsonl"):
        assert set(sample.captions) == {"visual", "av"}
        assert {"layout", "shapes", "events"} <= set(sample.attributes)


def test_the_vocabulary_has_every_word(world: Path) -> None:
    tokenizer = Tokenizer(world)
    tokens = (world / "vocab.txt").read_text().splitlines()
    assert len(set(tokens)) == len(tokens)
    texts = [
        m["content"] for r in [*train(150), *held_out(150), *text_rows()] for m in r["messages"]
    ]
    texts += [SYSTEM_PROMPT, *(t for some in QUESTIONS.values() for part in some for t in part)]
    marks = f"{VIDEO_START}|{VIDEO_END}"  # which language models add themselves
    texts = [re.sub(rf"{{\w+}}|{marks}", " ", text) for text in texts]
    packed = tokenizer.encode(texts, 512)
    used = {tokens[i] for i in np.unique(packed.ids.numpy())}
    assert "[UNK]" not in used
    assert not {token for token in used if token.startswith("##")}  # nothing is spelt
    assert {"?", "(", ":", "best", "after"} <= used


def test_finished_world_is_kept_and_another_is_refused(world: Path, tmp_path: Path) -> None:
    listing = write_questions(tmp_path, 1, 1, size=16, num_frames=2)
    (tmp_path / "videos" / "000000.mp4").write_bytes(b"kept")
    assert write_questions(tmp_path, 1, 1, size=16, num_frames=2) == listing
    assert (tmp_path / "videos" / "000000.mp4").read_bytes() == b"kept"
    for other in (lambda: write_questions(tmp_path, 2, 1), lambda: write_toyworld(tmp_path, 1, 1)):
        with pytest.raises(FileExistsError, match="another toy world"):
            other()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num", 0, "num must be at least 1, got 0"),
        ("size", 8, "size must be at least 16, got 8"),
        ("size", 33, "size must be even, got 33"),
        ("num_frames", 1, "num_frames must be at least 2, got 1"),
        ("workers", 0, "workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, name: str, value: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"toyworld: {expected}"):
        write_questions(tmp_path, **{"num": 1, "seed": 0, name: value})


def test_speech_needs_a_second(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_frames must be at least 8 for speech, got 4"):
        write_questions(tmp_path, 1, 0, num_frames=4, speech=True)


def test_other_worlds_are_as_ever(tmp_path: Path) -> None:
    """The list and vocabulary of version 6: learnt models and results depend on them."""
    listing = write_toyworld(tmp_path, 8, 7, size=64)
    for path, digest in (
        (listing, "107a9cf9db8c67cb5879da26892583d32ef6f9293fe6625aed6daa1b9024a8ef"),
        (
            tmp_path / "vocab.txt",
            "42561aaa6ce19e4ef23ae095e77bc96f9f61e8c2b5ea8bbbe95ad2f85c56b971",
        ),
    ):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
