"""Questions on toy clips with their answers: conversations to train on, and held-out questions.

A training clip gives short conversations on what is seen, on what is seen and heard, and on a
caption that stands where the video would: from those a language model learns to read before there
is anything to see. It learns to compare from captions of a few words: whether two words mean the
same is not found where they stand among fifty others. A quarter of the rounds offer choices. A
held-out clip gives one question a row, some of them in wordings, and on pairs of shape and colour,
that training does not have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from iv2.data.files import write_text
from iv2.data.speech import utterances
from iv2.data.synthetic import FPS, SAMPLE_RATE, _check, _rng, encode
from iv2.data.toy_questions import STREAM, Asked, ask, caption, every_claim
from iv2.data.toy_scenes import Scene, draw_scene, render, sound
from iv2.data.toy_words import SPOKEN, TEXT_QUESTIONS, question_texts, vocabulary, wordings
from iv2.models.language import VIDEO_END, VIDEO_START

# Raised whenever the same arguments would give other clips or questions.
VERSION = 5
# MVBench's protocol, in its own words: results are comparable only with these.
SYSTEM_PROMPT = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)
CHOICE_REQUEST = "Only give the best option."
CHOICE_PREFIX = "Best option:("
# Rounds of a conversation, at most: of two on one thing the second is answered from the first.
_ROUNDS = 3
# Part of the captions that is asked for: one has more tokens than all other answers on a clip.
_CAPTIONS = 0.25
# Captions of a kind on a training clip.
_WORDINGS = 4
# Held-out clips are those of another seed.
_HELD_OUT_SEED = 0x68656C64


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, as MVBench puts it."""
    options = "".join(f"({ascii_uppercase[i]}) {text}\n" for i, text in enumerate(choices))
    return f"Question: {question}\nOptions:\n{options}{CHOICE_REQUEST}"


def choice_answer(answer: str, choices: Sequence[str]) -> str:
    """The answer to a question with choices: ``Best option:(B) red``."""
    return f"{CHOICE_PREFIX}{ascii_uppercase[list(choices).index(answer)]}) {answer}"


def train_rows(scene: Scene, path: str, seed: int, index: int) -> dict[str, list[dict[str, Any]]]:
    """The conversations on a training clip, by kind of media.

    Returns:
        `video`: on what is seen; `audio_video`: on what is heard, too; `text`: on as much, with a
        caption in the video's place; `words`: one question each, with no more of a caption than
        answers it.
    """
    asked = ask(scene, seed, index)
    rng = _rng(seed, STREAM + 2, index)
    rows: dict[str, list[dict[str, Any]]] = {}

    def row(kind: str, rounds: Sequence[Asked], told: str = "") -> dict[str, Any]:
        """A conversation; behind that part of a caption, where one is told."""
        messages = _messages(rounds, rng)
        if told:
            text, first = caption(scene, told, rng)[0], messages[0]
            first["content"] = f"{VIDEO_START}{text}{VIDEO_END}\n{first['content']}"
        return {
            **({} if told else {"path": path}),
            "kind": kind,
            "messages": messages,
            "attributes": scene.attributes,
            "question_kinds": [one.kind for one in rounds],
        }

    for kind, told in (("video", ""), ("audio_video", ""), ("text", "all")):
        some = [one for one in asked if kind != "video" or not one.sound]
        some = [one for one in some if one.kind != "caption" or rng.random() < _CAPTIONS]
        count = -(-len(some) // _ROUNDS)
        rows[kind] = [row(kind, some[nth::count], told) for nth in range(count)]
    some = [one for one in asked if one.kind not in ("caption", "yes_no")]
    some += every_claim(scene, rng)
    rows["words"] = [row("text", [one], one.about) for one in some]
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
        The path of `list.jsonl`: the training clips with `path`, `captions` (visual and av, four
        wordings of each) and `attributes` (layout, shapes, events, background, tone, and word where
        one is spoken). Beside it are `instructions.jsonl` (conversations on what is seen),
        `instructions-sound.jsonl` (and heard), `instructions-described.jsonl` (on captions in the
        place of clips), `instructions-words.jsonl` (on the part of a caption that answers),
        `instructions-text.jsonl` (which word means which),
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
        lists.setdefault("instructions-words", []).extend(rows["words"])
        rng = _rng(seed, STREAM + 3, index)
        parts = {"visual": "seen", "av": "all"}
        texts = {
            kind: [caption(scene, part, rng)[0] for _ in range(_WORDINGS)]
            for kind, part in parts.items()
        }
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
