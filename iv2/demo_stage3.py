"""Stage 3 of `iv2 demo` and `iv2 learn`: questions on toy clips with sound and speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iv2 import report
from iv2.config import TrainConfig
from iv2.data.decode import DecodeError, Video
from iv2.data.instructions import write_questions
from iv2.demo_steps import once, real_clips, say, sized, train
from iv2.eval import qa
from iv2.eval.questions import Question, read_questions
from iv2.recipes import RECIPES
from iv2.run_folder import read_log
from iv2.serve.chat import VideoChat

_AT_ONCE = 64
# Tokens of an answer; captions take some forty.
_LONGEST = 64
# Dialogues on the page that are right, and as many that are wrong.
_SHOWN = 4
# Put to a real clip; nothing of the like was in training.
_ASKED_OF_REAL = ("describe the video.", "how many shapes are there?", "what do you hear?")


@dataclass(frozen=True)
class Budget3:
    """How much is trained."""

    clips: int
    # Of the language model alone, reading captions in the place of videos: short ones, then all.
    word_steps: int
    text_steps: int
    # Of what stands between the towers and the language model, which finds the words of captions.
    align_steps: int
    steps: int
    batch_size: int
    # Held-out questions of either form: all on the first clips.
    questions: int
    # Also from random encoders, with choices, and the goal is the accuracy itself.
    compare: bool
    # Accuracy of open questions in per cent: the total, or its lead over who sees another video or
    # none.
    goal: float
    # Its lead on motions over who sees the frames in another order; all else is then as it was.
    motion_goal: float


DEMO3 = Budget3(
    clips=1000,
    word_steps=80,
    text_steps=120,
    align_steps=100,
    steps=70,
    batch_size=32,
    questions=300,
    compare=False,
    goal=15.0,
    motion_goal=5.0,
)
LEARN3 = Budget3(
    clips=4000,
    word_steps=200,
    text_steps=800,
    align_steps=500,
    steps=700,
    batch_size=32,
    questions=600,
    compare=True,
    goal=85.0,
    motion_goal=20.0,
)


def world(budget: Budget3, out: Path) -> Path:
    """The folder of training clips, held-out clips and the questions on both."""
    workers = torch.get_num_threads()
    return write_questions(out / "questions", budget.clips, 20, speech=True, workers=workers).parent


def configs(
    budget: Budget3, out: Path, folder: Path, stage2_weights: str
) -> dict[str, TrainConfig]:
    """The runs in order: the language model, then the towers before it, of stage 2 or random."""

    def of(recipe: str, name: str, steps: int, batch_size: int = 0, **stage3: Any) -> TrainConfig:
        base = sized(RECIPES[recipe], out / name, folder, steps, steps // 10, batch_size)
        lm = replace(base.stage3.lm, folder=str(folder))
        return replace(base, stage3=replace(base.stage3, lm=lm, **stage3))

    starts = {"": stage2_weights}
    if budget.compare:
        starts["-random"] = ""
    words, reads = (str(out / f"stage3-{name}" / "model.safetensors") for name in ("words", "text"))
    runs = {
        "stage3-words": of("stage3-tiny-words", "stage3-words", budget.word_steps),
        "stage3-text": of("stage3-tiny-text", "stage3-text", budget.text_steps, lm_init=words),
    }
    for name, start in starts.items():
        inits = {"vision_init": start, "audio_init": start, "lm_init": reads}
        align = f"stage3-align{name}"
        runs[align] = of("stage3-tiny-align", align, budget.align_steps, budget.batch_size, **inits)
        aligned = str(out / align / "model.safetensors")
        runs[f"stage3{name}"] = of(
            "stage3-tiny", f"stage3{name}", budget.steps, budget.batch_size, chat_init=aligned
        )
    return runs


def run(budget: Budget3, out: Path, stage2_weights: str) -> dict[str, Any]:
    """Train and evaluate what is not done yet; returns the results of stage 3."""
    say(f"writing {budget.clips} + {max(8, budget.clips // 4)} toy clips with questions")
    folder = world(budget, out)
    runs = configs(budget, out, folder, stage2_weights)
    train(runs.values())
    listing = folder / "held-out.jsonl"
    found: dict[str, Any] = {}
    for form in ("open", "choices") if budget.compare else ("open",):
        say(f"asking {form} questions")
        found[form] = once(
            out / f"qa-{form}.json",
            lambda form=form: _evaluate(runs, listing, budget.questions, choices=form == "choices"),  # type: ignore[misc]
        )
    return {
        **found,
        "real": once(out / "qa-real.json", lambda: _ask_of_real(runs["stage3"])),
        "runs": list(runs),
        "goals": _goals(budget, found["open"]["table"]["answers"]),
    }


_SHUFFLED = "shuffled frames"
_UNSEEN = ("text only", "other videos")


def _goals(budget: Budget3, answers: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted of the open questions, and what came out."""
    total = answers["model"]["total"]
    lead = total - max(answers[name]["total"] for name in _UNSEEN)
    motion = _motion(answers["model"]) - _motion(answers[_SHUFFLED])
    first = "open questions, total" + (
        "" if budget.compare else ", above the best without the clip"
    )
    rows = (
        (first, budget.goal, total if budget.compare else lead),
        ("questions on motion, above shuffled frames", budget.motion_goal, motion),
    )
    return [
        {"what": what, "goal": goal, "value": value, "met": value >= goal}
        for what, goal, value in rows
    ]


def _motion(column: dict[str, Any]) -> float:
    return float(column["tasks"].get("motion", 0.0))


def _evaluate(
    runs: dict[str, TrainConfig], listing: Path, most: int, *, choices: bool
) -> dict[str, Any]:
    """A table of the model, its baselines and other runs, and the model's dialogues."""
    questions = _first(read_questions("toy", listing, choices=choices).questions, most)
    answer = _answers(runs["stage3"])
    replies: list[str] = []

    def keeping(rows: Sequence[Question]) -> Sequence[str]:
        replies.extend(answer(rows))
        return replies

    columns: dict[str, qa.Answer] = {
        "model": keeping,
        "text only": qa.text_only(answer),
        _SHUFFLED: qa.other_frames(answer, "shuffled"),
        "other videos": qa.other_videos(answer),
    }
    if "stage3-random" in runs:
        columns["from random encoders"] = _answers(runs["stage3-random"])
    table = qa.evaluate("toy", questions, columns)
    return {"table": table, "dialogues": _dialogues(questions, replies)}


def _answers(config: TrainConfig) -> qa.Answer:
    chat = VideoChat.load(config.run_dir)
    return qa.chat_answers(chat, batch_size=_AT_ONCE, max_new_tokens=_LONGEST)


def _first(questions: Sequence[Question], most: int) -> list[Question]:
    """All questions on the first clips, at least two, until they are enough."""
    chosen: list[Question] = []
    paths: set[str] = set()
    for question in questions:
        if question.path not in paths and len(chosen) >= most and len(paths) > 1:
            break
        paths.add(question.path)
        chosen.append(question)
    return chosen


def _dialogues(questions: Sequence[Question], replies: Sequence[str]) -> list[dict[str, Any]]:
    """Right ones and wrong ones, of as many kinds as there are, and a caption."""
    some: dict[bool | None, dict[tuple[str, int], dict[str, Any]]] = {True: {}, False: {}, None: {}}
    for question, reply in zip(questions, replies, strict=True):
        right = None if question.facts else qa.score([question], [reply])["total"] == 100
        row = {
            "path": question.path,
            "kind": question.task,
            "question": question.text,
            "choices": list(question.choices),
            "answer": question.answer,
            "reply": reply,
            "right": right,
        }
        # one of each kind before the second of any
        nth = sum(kind == question.task for kind, _ in some[right])
        some[right][question.task, nth] = row
    found: list[dict[str, Any]] = []
    for right, most in ((True, _SHOWN), (False, _SHOWN), (None, 1)):
        rows = sorted(some[right].items(), key=lambda item: item[0][1])
        found += [row for _, row in rows[:most]]
    return found


def _ask_of_real(config: TrainConfig) -> dict[str, Any]:
    """A dialogue about a real clip."""
    path = next(path for path in real_clips() if "bikes" in path.name)
    chat = VideoChat.load(config.run_dir)
    history: list[tuple[str, str]] = []
    for question in _ASKED_OF_REAL:
        reply = chat.ask(path, question, history, max_new_tokens=40)
        history.append((question, reply))
    return {"path": str(path), "dialogue": history}


# ---- the page


def page(results: dict[str, Any], out: Path, page: report.Page) -> None:
    """Add stage 3 to a page."""
    page.heading("Stage 3: questions on held-out toy clips with sounds and speech")
    page.text(
        "Correct answers in per cent. Text only: nothing is seen or heard; shuffled frames keep "
        "the sound, and all but motions; other videos come with their own. New: phrasings, or "
        "combinations of values, that were not in training."
    )
    for form in ("open", "choices"):
        if form in results:
            _table(results[form]["table"], form, page)
    if "stage3-random" in results["runs"]:
        page.text(
            "From random encoders: as many steps of stage 3 without stages 1 and 2 before it. What "
            "the model has above it is what they are worth here."
        )
    keys = ("what", "goal", "value", "met")
    rows = [tuple(goal[key] for key in keys) for goal in results["goals"]]
    page.table(("goal", "wanted", "got", ""), rows)
    page.figure(
        report.plot_losses({name: read_log(out / name) for name in results["runs"]}), "losses"
    )
    page.heading("Stage 3: dialogues on held-out clips, right and wrong")
    for row in results["open"]["dialogues"]:
        verdict = {True: "right", False: "wrong", None: "a caption"}[row["right"]]
        said = f"{row['question']} - {row['reply']}"
        _strip(Path(row["path"]), f"{verdict}: {said} (true: {row['answer']})", page)
    page.heading("Stage 3: a dialogue on a real clip, as it is")
    real = results["real"]
    _strip(Path(real["path"]), Path(real["path"]).name, page)
    page.text("The model knows the words and things of the toy world alone.")
    page.table(("question", "reply"), real["dialogue"])


def _table(table: dict[str, Any], form: str, page: report.Page) -> None:
    columns = table["answers"]
    first = columns["model"]
    keys = [("tasks", task) for task in first["tasks"]] + [("tags", tag) for tag in first["tags"]]
    rows: list[tuple[Any, ...]] = [
        (name, table["counts"].get(name), *(column[group][name] for column in columns.values()))
        for group, name in keys
    ]
    rows.append(("total", None, *(column["total"] for column in columns.values())))
    for name in first["captions"]:
        cells = (column["captions"][name] for column in columns.values())
        rows.append((f"caption: {name}", table["counts"]["caption"], *cells))
    header = (f"{form} questions", "number", *columns)
    page.table(header, rows)
    if table["chance"] is not None:
        page.text(f"Chance: {table['chance']:.1f} %.")


def _strip(path: Path, heading: str, page: report.Page) -> None:
    """Four frames of a clip."""
    try:
        with Video(str(path)) as video:
            frames = video.frames(qa.middle_indices(video.num_frames, 4))
    except DecodeError as error:  # the page is about what was said
        page.text(f"{heading} ({error})")
        return
    page.text(heading)
    page.figure(report.plot_frames("", [(path.name, frames.numpy())]), heading)
