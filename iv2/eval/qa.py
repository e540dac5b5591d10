"""Question answering: open questions, choices in MVBench's protocol, captions, and baselines.

An answering function takes questions, their answers hidden, and gives a reply to each. Baselines
are answering functions too, made of the model's: without the video, with a grey one, with its
frames in another order, or with the videos of other questions. What they get right needs no video,
or no order of its frames. Questions of kind audio_video are heard as well: grey and shuffled videos
keep their sound, other videos come with their own, and without a video nothing is heard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from iv2.data.audio import SoundConfig, read_fbank
from iv2.data.captions import clean_caption
from iv2.data.decode import Video
from iv2.data.instructions import SYSTEM_PROMPT
from iv2.data.toy_words import NUMBERS, answer_word, wordings
from iv2.eval.captions import text_scores
from iv2.eval.questions import Question, QuestionSet, read_questions

Answer = Callable[[Sequence[Question]], Sequence[str]]

NUM_FRAMES = 16  # in MVBench's protocol
# Whose values answer a kind of toy question.
_ATTRIBUTES = {
    "shape": ("shape",),
    "colour": ("colour",),
    "motion": ("motion",),
    "heard": ("sound",),
    "said": ("word",),
    "before_after": ("motion", "sound"),
}
_CAPTIONED = ("shape", "colour", "motion", "background", "tone", "sound", "word")
_ARTICLES = re.compile(r"^(?:(?:a|an|the|it is|it s|its) )+")
# Tokenizers of words put blanks around brackets and colons.
_BEST = re.compile(r"^best option\s*:?\s*", re.IGNORECASE)
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*(?:[).:,]|$)")


# ---- frames


def middle_indices(n: int, num_frames: int = NUM_FRAMES) -> list[int]:
    """Frame numbers as MVBench takes them: the middle of each of num_frames equal parts.

    Part i of [0, n - 1] begins at round(s i), s = (n - 1) / num_frames, and its middle is s / 2
    further, rounded down.
    """
    if n < 1 or num_frames < 1:
        raise ValueError(
            f"middle_indices: n and num_frames must be at least 1, got {n}, {num_frames}"
        )
    part = (n - 1) / num_frames
    return [min(n - 1, int(part / 2 + round(part * i))) for i in range(num_frames)]


def load_frames(question: Question, num_frames: int = NUM_FRAMES) -> Tensor:  # [T, H, W, 3]
    """The frames that a question is on, uint8: in order, all grey, or in a drawn order.

    Raises:
        ValueError: No video is shown.
    """
    if not question.path or question.kind == "text":
        raise ValueError(f"load_frames: question must have a video, got none: {question.id}")
    with Video(question.path) as video:
        low, high = video.frame_range(question.start, question.end)
        frames = video.frames([low + i for i in middle_indices(high - low, num_frames)])
    if question.frames == "grey":
        return torch.full_like(frames, 128)
    if question.frames == "shuffled":
        # Never the order that it is in, as soon as there are two frames.
        order = np.random.default_rng(list(question.path.encode())).permutation(num_frames)
        if num_frames > 1 and (order == np.arange(num_frames)).all():
            order = order[::-1]
        return frames[order.copy()]
    return frames


# ---- baselines


def text_only(answer: Answer) -> Answer:
    """No video is shown."""
    return lambda rows: answer([replace(row, path="", kind="text") for row in rows])


def other_frames(answer: Answer, frames: Literal["grey", "shuffled"]) -> Answer:
    """A grey video, or its frames in another order: ``load_frames`` gives them."""
    return lambda rows: answer([replace(row, frames=frames) for row in rows])


def other_videos(answer: Answer) -> Answer:
    """Each video's questions are put to the next video of the set.

    Raises:
        ValueError: There is one video only.
    """

    def run(rows: Sequence[Question]) -> Sequence[str]:
        paths = list(dict.fromkeys(row.path for row in rows))
        if len(paths) < 2:
            raise ValueError(f"other_videos: rows must be on two videos, got {len(paths)}")
        following = dict(zip(paths, paths[1:] + paths[:1], strict=True))
        # A part of one video is no part of another.
        return answer([replace(r, path=following[r.path], start=None, end=None) for r in rows])

    return run


def with_baselines(answer: Answer, name: str = "model") -> dict[str, Answer]:
    """An answering function and all its baselines, for ``evaluate``."""
    return {
        name: answer,
        "text only": text_only(answer),
        "grey video": other_frames(answer, "grey"),
        "shuffled frames": other_frames(answer, "shuffled"),
        "other videos": other_videos(answer),
    }


# ---- scores


def chosen(reply: str, question: Question) -> int | None:
    """The number of the choice that a reply names by its letter; None: it names none.

    Only the first line counts, with or without "Best option:" before it. A letter ends there or is
    followed by a bracket, a full stop, a colon or a comma: "A red bar" names no choice.
    """
    line = reply.strip().split("\n")[0].strip()
    found = _LETTER.match(_BEST.sub("", line))
    if found is None:
        return None
    number = ascii_uppercase.index(found[1].upper())
    return number if number < len(question.choices) else None


@cache
def _names(attributes: tuple[str, ...]) -> dict[str, str]:
    """The short answer for each thing that a value may be called."""
    found = {}
    for attribute in attributes:
        for value, some in wordings(attribute).items():
            for text in (value, *some):
                found[_ARTICLES.sub("", clean_caption(text))] = clean_caption(
                    answer_word(attribute, value)
                )
    return found


def normalise(task: str, text: str) -> str:
    """What a reply to an open question says, without its wording.

    Punctuation, case and articles never count. Of the toy world's kinds of questions, any word for
    a value is its short answer; a number may be digits; yes or no may be part of a sentence.
    """
    plain = _ARTICLES.sub("", clean_caption(text.strip().split("\n")[0] if text.strip() else ""))
    if task == "yes_no":
        said = {word for word in plain.split() if word in ("yes", "no")}
        return said.pop() if len(said) == 1 else plain
    if task == "how_many":
        return NUMBERS[int(plain) - 1] if plain in ("1", "2", "3") else plain
    return _names(_ATTRIBUTES[task]).get(plain, plain) if task in _ATTRIBUTES else plain


@cache
def _caption_names() -> list[tuple[str, str, str]]:
    """Wordings, the longest first, with attribute and value: "dark blue" is no blue."""
    rows = []
    for attribute in _CAPTIONED:
        for value, some in wordings(attribute).items():
            rows += [(clean_caption(text), attribute, value) for text in dict.fromkeys(some)]
    return sorted(rows, key=lambda row: (-len(row[0]), row))


def named(text: str) -> Counter[tuple[str, str]]:
    """The values of attributes that a caption names, each as often as it does."""
    found: Counter[tuple[str, str]] = Counter()
    rest = f" {clean_caption(text)} "
    for wording, attribute, value in _caption_names():
        while f" {wording} " in rest:
            rest = rest.replace(f" {wording} ", " | ", 1)
            found[attribute, value] += 1
    return found


def caption_score(text: str, facts: Mapping[str, Sequence[str]]) -> tuple[int, int, int]:
    """How many of the facts a caption names, how many there are, and how many it names in all.

    Attributes that the facts leave open, such as sounds, are not counted.
    """
    true = Counter((name, value) for name, values in facts.items() for value in values)
    said = Counter({key: n for key, n in named(text).items() if key[0] in facts})
    return (true & said).total(), true.total(), said.total()


def _share(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)


def score(questions: Sequence[Question], replies: Sequence[str]) -> dict[str, Any]:
    """Accuracy of replies in per cent: of each task, their mean, in total, and by tags.

    Returns:
        ``tasks``, ``mean`` (over tasks), ``total`` (over questions), ``tags``, ``unreadable`` (the
        replies that name no choice), and ``captions``: recall and precision of what they name, and
        the ``text_scores`` against the one true caption. Captions are no part of the accuracies.
    """
    if isinstance(replies, str) or len(replies) != len(questions):
        raise ValueError(
            f"qa: replies must be {len(questions)}, one a question, got {len(replies)}"
        )
    rights: dict[str, dict[str, list[bool]]] = {"tasks": {}, "tags": {}}
    unreadable = 0
    captions, told = [0, 0, 0], []
    for question, reply in zip(questions, replies, strict=True):
        if not isinstance(reply, str):
            raise TypeError(f"qa: replies must be strings, got {type(reply).__name__}")
        if question.facts:
            counts = caption_score(reply, question.facts)
            captions = [a + b for a, b in zip(captions, counts, strict=True)]
            told.append((reply, [question.answer]))
            continue
        if question.choices:
            number = chosen(reply, question)
            unreadable += number is None
            right = number is not None and question.choices[number] == question.answer
        else:
            task = question.task
            right = normalise(task, reply) == normalise(task, question.answer)
        rights["tasks"].setdefault(question.task, []).append(right)
        for name, value in question.tags.items():
            rights["tags"].setdefault(f"{name} {value}", []).append(right)
    tasks = {task: _share(some) for task, some in sorted(rights["tasks"].items())}
    every = [right for some in rights["tasks"].values() for right in some]
    hit, true, said = captions
    found = {"recall": 100.0 * hit / true, "precision": 100.0 * hit / max(1, said)} if true else {}
    if told:
        found |= text_scores(*zip(*told, strict=True))
    return {
        "tasks": tasks,
        "mean": sum(tasks.values()) / len(tasks) if tasks else None,
        "total": _share(every) if every else None,
        "tags": {tag: _share(some) for tag, some in sorted(rights["tags"].items())},
        "unreadable": unreadable,
        "captions": found,
    }


def evaluate(
    name: str, questions: QuestionSet | Sequence[Question], answers: Mapping[str, Answer]
) -> dict[str, Any]:
    """Put the questions to each answering function; their answers are hidden.

    Args:
        name: Of the set, for the table.
        questions: The set.
        answers: By name, such as ``with_baselines`` gives.

    Raises:
        ValueError: There are no questions, or an answering function does not reply to each.
    """
    missing = questions.missing if isinstance(questions, QuestionSet) else []
    rows = list(questions.questions if isinstance(questions, QuestionSet) else questions)
    if not rows:
        raise ValueError("qa: questions must be at least one, got none")
    hidden = [replace(row, answer="", facts={}) for row in rows]
    table = {column: score(rows, answer(hidden)) for column, answer in answers.items()}
    offered = [len(row.choices) for row in rows if row.choices]
    return {
        "set": name,
        "questions": len(rows),
        "counts": dict(sorted(Counter(row.task for row in rows).items())),
        "chance": 100.0 * sum(1 / n for n in offered) / len(offered) if offered else None,
        "missing": missing,
        "answers": table,
    }


def evaluate_sets(
    sets: Mapping[str, str | Path], answers: Mapping[str, Answer], *, choices: bool = True
) -> list[dict[str, Any]]:
    """Evaluate each set whose files are there.

    Args:
        sets: Folder or file by the name of its format, see ``read_questions``.
        answers: Answering functions by name.
        choices: For toy: see ``read_questions``.

    Returns:
        The table of each set; {"set", "not_run": what is missing} where its files are not there.
    """
    tables = []
    for name, path in sets.items():
        try:
            questions = read_questions(name, path, choices=choices)
        except FileNotFoundError as error:
            tables.append({"set": name, "not_run": str(error)})
            continue
        tables.append(evaluate(name, questions, answers))
    return tables


# ---- models


# Frames [T, H, W, 3], those with the filter banks [F, bins] of their sound, or nothing.
Shown = Tensor | tuple[Tensor, Tensor] | None


class Chat(Protocol):
    """What answers about frames and sounds, such as ``iv2.serve.chat.VideoChat``."""

    system: str

    @property
    def sound(self) -> SoundConfig | None:
        """What it hears; None: nothing."""

    def answers(
        self, pairs: Sequence[tuple[Shown, str]], *, prefix: str = "", max_new_tokens: int = 128
    ) -> list[str]:
        """A reply to each, which begins with the prefix."""


def chat_answers(chat: Chat, *, batch_size: int = 8, max_new_tokens: int = 128) -> Answer:
    """An answering function of a chat model, which sees the 16 frames of ``load_frames``.

    ``Question.prefix`` is put into its mouth. If it hears at all, questions of kind audio_video are
    heard where the file has a sound; those of kind video are not.
    """

    def answer(rows: Sequence[Question]) -> list[str]:
        replies: list[str] = []
        before = chat.system
        try:
            for first in range(0, len(rows), batch_size):
                for (offered, prefix), some in groupby(rows[first : first + batch_size], _how):
                    chat.system = SYSTEM_PROMPT.strip() if offered else before
                    pairs = [(_shown(row, chat.sound), row.messages[-1]["content"]) for row in some]
                    replies += chat.answers(pairs, prefix=prefix, max_new_tokens=max_new_tokens)
        finally:
            chat.system = before
        return replies

    return answer


def _how(question: Question) -> tuple[bool, str]:
    return bool(question.choices), question.prefix


def _shown(question: Question, sound: SoundConfig | None) -> Shown:
    if not question.path or question.kind == "text":
        return None
    frames = load_frames(question)
    if sound is None or question.kind != "audio_video":
        return frames
    fbank = read_fbank(question.path, question.start, question.end, sound)
    return frames if fbank is None else (frames, fbank)


# ---- replies of another program


def write_asked(path: Path, questions: Sequence[Question]) -> None:
    """Write what is put to a model, one question a line, without the answers."""
    rows = (
        {
            "id": question.id,
            "path": question.path,
            "start": question.start,
            "end": question.end,
            "kind": question.kind,
            "messages": question.messages,
            "prefix": question.prefix,
        }
        for question in questions
    )
    path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")


def replies_from(path: Path) -> Answer:
    """An answering function that looks replies up in a file: lines of {"id", "reply"}.

    Raises:
        ValueError: A line is not one; later, a question has no reply.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = loads(line)
            name, reply = row["id"], row["reply"]
        except (JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: a line must be an object of id and reply, got {line[:80]!r}"
            ) from error
        found[str(name)] = reply

    def answer(rows: Sequence[Question]) -> list[str]:
        for row in rows:
            if row.id not in found:
                raise ValueError(f"{path}: replies must be to every question, got none to {row.id}")
        return [found[row.id] for row in rows]

    return answer


def as_text(table: Mapping[str, Any]) -> str:
    """A table of ``evaluate`` or ``evaluate_sets`` for a terminal."""
    if "not_run" in table:
        return f"{table['set']}: not run: {table['not_run']}"
    columns: dict[str, dict[str, Any]] = table["answers"]
    head = f"{table['set']}: {table['questions']} questions"
    if table["chance"] is not None:
        head += f", chance {table['chance']:.1f} %"
    if table["missing"]:
        head += f", {len(table['missing'])} videos or files missing"
    first = next(iter(columns.values()))
    rows: list[tuple[str, tuple[str, ...]]] = [(task, ("tasks", task)) for task in first["tasks"]]
    rows += [("mean over tasks", ("mean",)), ("total", ("total",))] if first["tasks"] else []
    rows += [(tag, ("tags", tag)) for tag in first["tags"]]
    rows += [(f"captions: {name}", ("captions", name)) for name in first["captions"]]
    rows += [("unreadable replies", ("unreadable",))]
    width = max(len(label) for label, _ in rows) + 2
    lines = [head, " " * width + "".join(f"{name:>17s}" for name in columns)]
    for label, keys in rows:
        cells = []
        for column in columns.values():
            value: Any = column
            for key in keys:
                value = value[key]
            cells.append(f"{value:17d}" if isinstance(value, int) else f"{value:17.1f}")
        lines.append(f"{label:{width}s}" + "".join(cells))
    return "\n".join(lines)
