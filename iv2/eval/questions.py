"""Questions on videos from the files of public data sets and of the toy world, all as one class.

A set is a folder as its data set publishes it. Only files are read here; which video a question is
on is a path, and questions whose video is not there are left out and listed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from iv2.data.clips import VIDEO_SUFFIXES, read_list
from iv2.data.instructions import CHOICE_PREFIX, SYSTEM_PROMPT, choice_prompt


@dataclass(frozen=True)
class Question:
    """A question on a clip, and how it is to be put to a model."""

    text: str
    answer: str  # one of the choices where there are any; empty where it is hidden
    path: str  # of the video; empty: none is shown
    task: str  # results are given for each
    id: str = ""  # within its set
    start: float | None = None  # seconds; None: from the beginning
    end: float | None = None  # seconds; None: to the end
    choices: tuple[str, ...] = ()  # empty: an open question
    kind: str = "video"  # of the media: video, audio_video, or text where no video is shown
    frames: Literal["", "grey", "shuffled"] = ""  # instead of the frames as they are
    tags: dict[str, str] = field(default_factory=dict)  # results are given for each value too
    # what a caption should name, by attribute
    facts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What is put to the model; with choices, in MVBench's words."""
        if not self.choices:
            return [{"role": "user", "content": self.text}]
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": choice_prompt(self.text, self.choices)},
        ]

    @property
    def prefix(self) -> str:
        """What the answer begins with, before the model goes on."""
        return CHOICE_PREFIX if self.choices else ""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a set whose videos are there."""

    name: str
    questions: list[Question]
    missing: list[str]  # what is not there


# Folder of the videos of each task, below "video"; True: only a part of each video is asked about.
MVBENCH: dict[str, tuple[str, bool]] = {
    "action_sequence": ("star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "moving_direction": ("clevrer/video_validation", False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": ("perception/videos", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "state_change": ("perception/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": ("perception/videos", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", False),
}


def read_questions(name: str, path: str | Path, *, choices: bool = True) -> QuestionSet:
    """Read a set.

    Args:
        name: Of the format: mvbench, egoschema, perception-test, next-qa, movqa or toy.
        path: The folder of the data set, or for toy the file ``held-out.jsonl``.
        choices: For toy: offer the choices; False asks open questions, captions among them.

    Raises:
        FileNotFoundError: A file that the set needs, or every video, is not there.
        ValueError: There is no such format, or a file is not in it.
    """
    if name not in READERS and name != "toy":
        raise ValueError(f"questions: name must be one of {', '.join(READERS)}, toy, got {name}")
    path = Path(path)
    read = _toy(path, choices) if name == "toy" else READERS[name](path)
    there: list[Question] = []
    missing: list[str] = []
    for question in read:
        if isinstance(question, str):
            missing.append(question)
        elif Path(question.path).is_file():
            there.append(question)
        else:
            missing.append(question.path)
    if not there:
        first = missing[0] if missing else f"questions in {path}"
        raise FileNotFoundError(f"{name}: {first} (of {len(missing)} things missing)")
    return QuestionSet(name, there, list(dict.fromkeys(missing)))


def _mvbench(root: Path) -> Iterator[Question | str]:
    """json/TASK.json: rows of video, question, candidates, answer (a text), perhaps start, end."""
    for task, (folder, part) in MVBENCH.items():
        listing = root / "json" / f"{task}.json"
        if not listing.is_file():
            yield str(listing)
            continue
        for number, row in enumerate(_array(listing), 1):
            place = f"{listing}: item {number}"
            video, text, candidates, answer = _fields(
                place, row, "video", "question", "candidates", "answer"
            )
            start, end = _fields(place, row, "start", "end") if part else (None, None)
            yield _multiple(
                place,
                text,
                candidates,
                answer,
                path=str(root / "video" / folder / video),
                task=task,
                start=start,
                end=end,
                id=f"{task}/{number}",
            )


def _egoschema(root: Path) -> Iterator[Question | str]:
    """questions.json and subset_answers.json, a number by q_uid; others' answers are not public."""
    answers = _object(_need(root, "subset_answers.json"))
    listing = _need(root, "questions.json")
    for number, row in enumerate(_array(listing), 1):
        place = f"{listing}: item {number}"
        uid, text = _fields(place, row, "q_uid", "question")
        if uid in answers:
            options = _fields(place, row, *(f"option {i}" for i in range(5)))
            path = str(root / "videos" / f"{uid}.mp4")
            yield _multiple(place, text, options, answers[uid], path=path, task="all", id=uid)


def _perception_test(root: Path) -> Iterator[Question | str]:
    """Videos by id, each with mc_question: rows of id, question, options, answer_id, area."""
    listing = _need(root, "mc_question_valid.json", "all_valid.json")
    for video, about in _object(listing).items():
        (rows,) = _fields(f"{listing}: {video}", about, "mc_question")
        for row in rows:
            place = f"{listing}: {video}"
            number, text, options, answer, area = _fields(
                place, row, "id", "question", "options", "answer_id", "area"
            )
            tags = {"reasoning": str(row["reasoning"])} if "reasoning" in row else {}
            path = str(root / "videos" / f"{video}.mp4")
            name = f"{video}/{number}"
            yield _multiple(
                place, text, options, answer, path=path, task=str(area), id=name, tags=tags
            )


def _next_qa(root: Path) -> Iterator[Question | str]:
    """A table of video, question, answer (a number), qid, type, a0 ... a4; a map to files."""
    listing = _need(root, "test.csv", "val.csv")
    map_file = root / "map_vid_vidorID.json"
    files = _object(map_file) if map_file.is_file() else {}
    with listing.open(encoding="utf-8", newline="") as lines:
        for row in (table := csv.DictReader(lines)):
            place = f"{listing}:{table.line_num}"
            video, text, answer, qid, kind = _fields(
                place, row, "video", "question", "answer", "qid", "type"
            )
            options = _fields(place, row, *(f"a{i}" for i in range(5)))
            if not str(answer).isdigit():
                raise ValueError(f"{place}: answer must be the number of a choice, got {answer!r}")
            path = str(root / "videos" / f"{files.get(video, video)}.mp4")
            name = f"{video}/{qid}"
            yield _multiple(place, text, options, int(answer), path=path, task=kind, id=name)


def _movqa(root: Path) -> Iterator[Question | str]:
    """questions.json: rows of video, question, options, answer, type, perhaps start and end.

    MoVQA's own layout is not published; this one holds its content: a movie, perhaps a part of it,
    five options, and the type of the question. The answer is a number, a letter or a text.
    """
    listing = _need(root, "questions.json")
    for number, row in enumerate(_array(listing), 1):
        place = f"{listing}: item {number}"
        video, text, options, answer, kind = _fields(
            place, row, "video", "question", "options", "answer", "type"
        )
        if isinstance(options, dict):
            options = [options[letter] for letter in sorted(options)]
        letters = list(ascii_uppercase[: len(options)])
        if answer not in options and answer in letters:
            answer = letters.index(answer)
        name = video if Path(video).suffix.lower() in VIDEO_SUFFIXES else f"{video}.mp4"
        yield _multiple(
            place,
            text,
            options,
            answer,
            path=str(root / "videos" / name),
            task=kind,
            start=row.get("start"),
            end=row.get("end"),
            id=str(number),
        )


def _toy(listing: Path, choices: bool) -> Iterator[Question]:
    """``held-out.jsonl`` of ``iv2 toyworld --questions``."""
    for number, sample in enumerate(read_list(listing), 1):
        place, row = f"{listing}:{number}", sample.attributes
        text, answer, kind, options, facts, phrasing, combination = _fields(
            place,
            row,
            *("question", "answer", "question_kind", "choices", "facts"),
            *("phrasing", "combination"),
        )
        if choices and not options:
            continue
        yield Question(
            text,
            answer,
            sample.path,
            kind,
            id=str(number),
            choices=tuple(options) if choices else (),
            kind=sample.kind,
            tags={"phrasing": phrasing, "combination": combination},
            facts=facts,
        )


READERS: dict[str, Callable[[Path], Iterator[Question | str]]] = {
    "mvbench": _mvbench,
    "egoschema": _egoschema,
    "perception-test": _perception_test,
    "next-qa": _next_qa,
    "movqa": _movqa,
}


def _multiple(place: str, text: str, options: Any, answer: Any, **more: Any) -> Question:
    """A question with choices; the answer is one's number or text."""
    if not isinstance(options, (list, tuple)) or len(options) < 2:
        raise ValueError(f"{place}: choices must be at least two, got {options!r}")
    options = [str(option) for option in options]
    if type(answer) is int and 0 <= answer < len(options):
        answer = options[answer]
    if answer not in options:
        raise ValueError(f"{place}: answer must be one of {options}, got {answer!r}")
    return Question(str(text), answer, choices=tuple(options), **more)


def _need(root: Path, *names: str) -> Path:
    """The first of the files that is there."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{root / ' or '.join(names)}")


def _fields(place: str, row: Any, *names: str) -> list[Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object, got {type(row).__name__}")
    for name in names:
        if row.get(name) is None:
            raise ValueError(f"{place}: {name} must be given, got none")
    return [row[name] for name in names]


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error


def _array(path: Path) -> list[Any]:
    rows = _load(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: the file must be a JSON array, got {type(rows).__name__}")
    return rows


def _object(path: Path) -> dict[str, Any]:
    rows = _load(path)
    if not isinstance(rows, dict):
        raise ValueError(f"{path}: the file must be a JSON object, got {type(rows).__name__}")
    return rows
