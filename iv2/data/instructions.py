"""Questions on toy clips with their answers: conversations to train on, and held-out questions.

A training clip gives short conversations on what is seen, on what is seen and heard, and on a
caption that stands where the video would: from those a language model learns to read before there
is anything to see. A quarter of the rounds offer choices. A held-out clip gives one question a row,
some of them in wordings, and on pairs of shape and colour, that training does not have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from iv2.data.files import write_text
from iv2.data.speech import utterances
from iv2.data.synthetic import (
    COLOURS,
    FPS,
    MOTIONS,
    SAMPLE_RATE,
    SHAPES,
    SOUNDS,
    _check,
    _rng,
    encode,
)
from iv2.data.toy_scenes import Scene, draw_scene, render, sound
from iv2.data.toy_words import (
    NUMBERS,
    QUESTIONS,
    SPOKEN,
    TEXT_QUESTIONS,
    answer_word,
    caption_words,
    question_texts,
    vocabulary,
    wordings,
)
from iv2.models.language import VIDEO_END, VIDEO_START

# Raised whenever the same arguments would give other clips or questions.
VERSION = 3
QUESTION_KINDS = (
    *("shape", "colour", "motion", "heard", "said"),
    *("how_many", "before_after", "yes_no", "caption"),
)
# MVBench's protocol, in its own words: results are comparable only with these.
SYSTEM_PROMPT = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)
CHOICE_REQUEST = "Only give the best option."
CHOICE_PREFIX = "Best option:("
_VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "sound": SOUNDS,
    "word": SPOKEN,
}
# Rounds of a conversation, at most: of two on one thing the second is answered from the first.
_ROUNDS = 3
# Part of the captions that is asked for: one has more tokens than all other answers on a clip.
_CAPTIONS = 0.25
_STREAM = 21  # keeps these draws apart from those of the clips
# Held-out clips are those of another seed.
_HELD_OUT_SEED = 0x68656C64


@dataclass(frozen=True)
class Asked:
    """A question on a clip."""

    kind: str  # see QUESTION_KINDS
    question: str
    answer: str
    phrasing: str  # "seen" in training or "new"
    sound: bool = False  # it asks for what is heard
    choices: tuple[str, ...] = ()  # the answer among them; none for captions
    # what a caption should name, by attribute
    facts: dict[str, list[str]] = field(default_factory=dict)


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, as MVBench puts it."""
    options = "".join(f"({ascii_uppercase[i]}) {text}\n" for i, text in enumerate(choices))
    return f"Question: {question}\nOptions:\n{options}{CHOICE_REQUEST}"


def choice_answer(answer: str, choices: Sequence[str]) -> str:
    """The answer to a question with choices: ``Best option:(B) red``."""
    return f"{CHOICE_PREFIX}{ascii_uppercase[list(choices).index(answer)]}) {answer}"


@dataclass(frozen=True)
class _Target:
    """What is asked for, before it is put into words."""

    kind: str
    key: str  # of the wordings
    attribute: str  # whose value the answer is; empty: the answer as it is
    value: str
    fields: dict[str, str] = field(default_factory=dict)
    near: tuple[str, ...] = ()  # values that must be among the choices
    sound: bool = False


def ask(scene: Scene, seed: int, index: int, *, held_out: bool = False) -> list[Asked]:
    """One question of each kind that the scene has an answer to, in a drawn order.

    Args:
        scene: The clip.
        seed: Of the world.
        index: Of the clip; of two clips in a row, one has yes and the other no.
        held_out: Every other question in a wording kept from training.
    """
    rng = _rng(seed, _STREAM, index)
    targets = [*_seen(scene, rng), *_heard(scene, rng)]
    for stream, claims in enumerate((_claims_seen(scene), _claims_heard(scene))):
        if claims:
            truth = bool(_rng(seed, _STREAM + 1, stream, index // 2).random() < 0.5) ^ (index % 2)
            targets.append(_claim(claims, bool(truth), stream == 1, rng))
    asked = [
        _worded(target, held_out and (index + place) % 2 == 1, rng)
        for place, target in enumerate(targets)
    ]
    for place, key in enumerate(("caption", "caption with sound")):
        new = held_out and (index + place) % 2 == 1
        text, facts = caption(scene, place == 1, rng)
        question, phrasing = _phrase(key, {}, new, rng)
        asked.append(Asked("caption", question, text, phrasing, place == 1, facts=facts))
    return [asked[int(i)] for i in np.argsort(rng.random(len(asked)))]


def _seen(scene: Scene, rng: np.random.Generator) -> list[_Target]:
    """What the picture shows."""
    which = int(rng.random() * len(scene.movers))
    mover, others = scene.movers[which], scene.movers[1 - which : 2 - which]
    two = len(scene.movers) == 2
    other = others[0] if two else None
    near = (other.shape, other.colour, other.motions[0]) if other else ("", "", "")
    subject, whole = (mover.shape, f"{mover.colour} {mover.shape}") if two else ("shape", "shape")
    by_colour = {"colour": mover.colour}
    targets = [
        _Target(
            *("shape", "shape of a colour" if two else "shape", "shape", mover.shape),
            *(by_colour, near[:1]),
        ),
        _Target(
            *("colour", "colour of a shape" if two else "colour", "colour", mover.colour),
            *({"subject": subject}, near[1:2]),
        ),
    ]
    if scene.layout in ("one", "two_shapes"):
        targets.append(_Target("how_many", "how_many", "", NUMBERS[len(scene.movers) - 1]))
    if scene.layout == "two_motions":
        targets.append(_order("motion", mover.motions, rng))
    else:
        targets.append(
            _Target("motion", "motion", "motion", mover.motions[0], {"subject": whole}, near[2:])
        )
    return targets


def _heard(scene: Scene, rng: np.random.Generator) -> list[_Target]:
    targets = []
    if scene.layout == "two_sounds":
        targets.append(_order("sound", scene.sounds, rng))
    else:
        targets.append(_Target("heard", "heard", "sound", scene.sounds[0], sound=True))
    if scene.word is not None:
        targets.append(_Target("said", "said", "word", scene.word, sound=True))
    return targets


def _order(attribute: str, events: Sequence[str], rng: np.random.Generator) -> _Target:
    """First, last, before or after, of two events."""
    first, last = events
    keys = {
        f"first {attribute}": (first, last),
        f"last {attribute}": (last, first),
        f"{attribute} after": (last, first),
        f"{attribute} before": (first, last),
    }
    key = list(keys)[int(rng.random() * len(keys))]
    value, other = keys[key]
    fields = {attribute: answer_word(attribute, other)}
    return _Target("before_after", key, attribute, value, fields, (other,), attribute == "sound")


def _claims_seen(scene: Scene) -> dict[str, tuple[str, set[str], dict[str, str]]]:
    """By wordings: the attribute, its true values, and more to fill in."""
    mover = scene.movers[0]
    claims: dict[str, tuple[str, set[str], dict[str, str]]] = {
        "is shape": ("shape", {m.shape for m in scene.movers}, {}),
        "is colour": ("colour", {m.colour for m in scene.movers}, {}),
    }
    if scene.layout != "two_motions":
        two = len(scene.movers) == 2
        subject = f"{mover.colour} {mover.shape}" if two else "shape"
        claims["is motion"] = ("motion", {mover.motions[0]}, {"subject": subject})
    return claims


def _claims_heard(scene: Scene) -> dict[str, tuple[str, set[str], dict[str, str]]]:
    claims: dict[str, tuple[str, set[str], dict[str, str]]]
    claims = {"is sound": ("sound", set(scene.sounds), {})}
    if scene.word is not None:
        claims["is word"] = ("word", {scene.word}, {})
    return claims


def _claim(
    claims: dict[str, tuple[str, set[str], dict[str, str]]],
    truth: bool,
    heard: bool,
    rng: np.random.Generator,
) -> _Target:
    key = list(claims)[int(rng.random() * len(claims))]
    attribute, true, fields = claims[key]
    values = [value for value in _VALUES[attribute] if (value in true) == truth]
    value = values[int(rng.random() * len(values))]
    fields = {**fields, attribute: answer_word(attribute, value)}
    return _Target("yes_no", key, "", "yes" if truth else "no", fields, sound=heard)


def _phrase(
    key: str, fields: dict[str, str], new: bool, rng: np.random.Generator
) -> tuple[str, str]:
    some = QUESTIONS[key][new]
    return some[int(rng.random() * len(some))].format(**fields), "new" if new else "seen"


def _worded(target: _Target, new: bool, rng: np.random.Generator) -> Asked:
    question, phrasing = _phrase(target.key, target.fields, new, rng)
    if target.attribute:
        rest = [v for v in _VALUES[target.attribute] if v not in (target.value, *target.near)]
        drawn = [rest[int(i)] for i in np.argsort(rng.random(len(rest)))]
        near = [value for value in target.near if value]
        values = [target.value, *near, *drawn][:4]
        choices = [answer_word(target.attribute, value) for value in values]
        answer = answer_word(target.attribute, target.value)
    else:
        answer = target.value
        choices = list(NUMBERS) if target.kind == "how_many" else ["yes", "no"]
    choices = [choices[int(i)] for i in np.argsort(rng.random(len(choices)))]
    return Asked(target.kind, question, answer, phrasing, target.sound, tuple(choices))


def caption(
    scene: Scene, heard: bool, rng: np.random.Generator
) -> tuple[str, dict[str, list[str]]]:
    """A sentence on the scene, each value in one of its wordings, and what it names.

    Args:
        scene: The clip.
        heard: With its sounds and its word.
        rng: Draws the wordings.
    """

    def say(attribute: str, value: str) -> str:
        facts.setdefault(attribute, []).append(value)
        some = caption_words(attribute, value)
        return some[int(rng.random() * len(some))]

    facts: dict[str, list[str]] = {}
    clauses = []
    for mover in scene.movers:
        noun = f"{say('colour', mover.colour)} {say('shape', mover.shape)}"
        motions = [say("motion", motion) for motion in dict.fromkeys(mover.motions)]
        article = "an" if noun[0] in "aeiou" else "a"
        clauses.append(f"{article} {noun} {', then '.join(motions)}")
    behind = f"a {say('background', scene.background)} {say('tone', scene.tone)} background"
    text = f"{' and '.join(clauses)} over {behind}"
    if heard:
        text += f", with {', then '.join(say('sound', s) for s in dict.fromkeys(scene.sounds))}"
        if scene.word is not None:
            text += f" and a voice that says {say('word', scene.word)}"
    return text, facts


# ---- files


def train_rows(scene: Scene, path: str, seed: int, index: int) -> dict[str, list[dict[str, Any]]]:
    """The conversations on a training clip, by kind of media.

    Returns:
        `video`: on what is seen; `audio_video`: on what is heard, too; `text`: on as much, with a
        caption in the video's place.
    """
    asked = ask(scene, seed, index)
    rng = _rng(seed, _STREAM + 2, index)
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind in ("video", "audio_video", "text"):
        some = [one for one in asked if kind != "video" or not one.sound]
        some = [one for one in some if one.kind != "caption" or rng.random() < _CAPTIONS]
        count = -(-len(some) // _ROUNDS)
        rows[kind] = []
        for nth in range(count):
            part = some[nth::count]
            about = {"attributes": scene.attributes, "question_kinds": [one.kind for one in part]}
            messages = _messages(part, rng)
            row = {"path": path, "kind": kind, "messages": messages, **about}
            if kind == "text":
                del row["path"]
                told = caption(scene, True, rng)[0]
                first = messages[0]
                first["content"] = f"{VIDEO_START}{told}{VIDEO_END}\n{first['content']}"
            rows[kind].append(row)
    return rows


def _messages(rounds: Sequence[Asked], rng: np.random.Generator) -> list[dict[str, str]]:
    messages = []
    for one in rounds:
        question, answer = one.question, one.answer
        if rng.random() < 0.25 and one.choices:
            question = choice_prompt(question, one.choices)
            answer = choice_answer(answer, one.choices)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def held_out_rows(scene: Scene, path: str, seed: int, index: int) -> list[dict[str, Any]]:
    """The questions on a held-out clip, one a row."""
    return [
        {
            "path": path,
            "kind": "audio_video" if one.sound else "video",
            "messages": [
                {"role": "user", "content": one.question},
                {"role": "assistant", "content": one.answer},
            ],
            "question_kind": one.kind,
            "question": one.question,
            "answer": one.answer,
            "choices": list(one.choices),
            "facts": one.facts,
            "phrasing": one.phrasing,
            "combination": scene.combination,
            "attributes": scene.attributes,
        }
        for one in ask(scene, seed, index, held_out=True)
    ]


def text_rows() -> list[dict[str, Any]]:
    """Questions without a clip: which value another word means."""
    rows = []
    for attribute in ("shape", "colour"):
        for value, some in wordings(attribute).items():
            for wording in some[1:]:
                for question in TEXT_QUESTIONS:
                    messages = [
                        {"role": "user", "content": question.format(wording=wording)},
                        {"role": "assistant", "content": value},
                    ]
                    rows.append({"kind": "text", "messages": messages})
    return rows


def write_questions(
    out: Path,
    num: int,
    seed: int,
    *,
    size: int = 64,
    num_frames: int = 16,
    speech: bool = False,
    workers: int = 1,
) -> Path:
    """Write `num` training clips, a quarter as many held-out ones, and the questions on them.

    Args:
        out: Folder to write to. `list.jsonl` is written last: where it and a matching
            `world.json` exist, nothing is done.
        num: Number of training clips; the first clips of a larger world are the same.
        seed: Of the world; its held-out clips are drawn apart from the training clips.
        size: Side of the frames, pixels.
        num_frames: Frames in a clip, at 8 a second; at least a second for speech.
        speech: A voice says one of ten words in each (needs espeakng-loader, the extra `speech`).
        workers: Threads that render and encode.

    Returns:
        The path of `list.jsonl`: the training clips with `path`, `captions` (visual and av) and
        `attributes` (layout, shapes, events, background, tone, and word where one is spoken).
        Beside it are `instructions.jsonl` (conversations on what is seen),
        `instructions-sound.jsonl` (and heard), `instructions-described.jsonl` (on captions in the
        place of clips), `instructions-text.jsonl` (on words alone),
        `held-out.jsonl` (one question a row, of `question_kind`, with `answer`, `choices`,
        `phrasing` and `combination`, both "seen" in training or "new") and `vocab.txt`.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` holds another toy world.
        RuntimeError: speech is asked for and espeakng-loader is not installed.
    """
    limits = {"num": (num, 1), "size": (size, 16), "num_frames": (num_frames, 2)}
    _check(limits | {"scenes": (0, 0), "workers": (workers, 1)}, speech)
    out = Path(out)
    world = {"questions": VERSION, "num": num, "seed": seed, "size": size}
    world |= {"num_frames": num_frames, "fps": FPS, "speech": speech}
    listing, header = out / "list.jsonl", out / "world.json"
    if header.exists() and json.loads(header.read_text(encoding="utf-8")) != world:
        raise FileExistsError(f"toyworld: {out} holds another toy world; give an empty folder")
    if listing.exists() and header.exists():
        return listing
    for folder in ("videos", "held-out"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_text(header, json.dumps(world) + "\n")
    voices = utterances(SPOKEN, SAMPLE_RATE) if speech else {}

    def make(held_out: bool, index: int) -> tuple[Scene, str, int]:
        own = seed ^ _HELD_OUT_SEED if held_out else seed
        scene = draw_scene(own, index, speech=speech, held_out=held_out)
        frames = render(scene, own, index, size=size, num_frames=num_frames)
        name = f"{'held-out' if held_out else 'videos'}/{index:06d}.mp4"
        encode(out / name, frames, sound(scene, num_frames / FPS, own, index, voices), fps=FPS)
        return scene, name, own

    jobs = [(False, i) for i in range(num)] + [(True, i) for i in range(max(8, num // 4))]
    with ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(make, *zip(*jobs, strict=True)))
    lists: dict[str, list[dict[str, Any]]] = {"instructions-text": text_rows()}
    for (held_out, index), (scene, name, own) in zip(jobs, made, strict=True):
        if held_out:
            lists.setdefault("held-out", []).extend(held_out_rows(scene, name, own, index))
            continue
        rows = train_rows(scene, name, own, index)
        lists.setdefault("instructions", []).extend(rows["video"])
        lists.setdefault("instructions-sound", []).extend(rows["audio_video"])
        lists.setdefault("instructions-described", []).extend(rows["text"])
        rng = _rng(seed, _STREAM + 3, index)
        texts = {kind: caption(scene, kind == "av", rng)[0] for kind in ("visual", "av")}
        row = {"path": name, "captions": texts, "attributes": scene.attributes}
        lists.setdefault("list", []).append(row)
    write_text(out / "vocab.txt", "".join(f"{word}\n" for word in question_vocabulary()))
    for name in (*(name for name in lists if name != "list"), "list"):
        text = "".join(json.dumps(row) + "\n" for row in lists[name])
        write_text(out / f"{name}.jsonl", text)
    return listing


def question_vocabulary() -> list[str]:
    """WordPiece tokens of all questions, answers and captions."""
    prompts = [choice_prompt(" ".join(ascii_uppercase[:5]), "?.,-"), CHOICE_PREFIX, SYSTEM_PROMPT]
    return vocabulary([*question_texts(), *prompts])
