"""Each reader on a small file as its data set publishes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iv2.data.instructions import SYSTEM_PROMPT, write_questions
from iv2.eval.questions import MVBENCH, read_questions


def put(path: Path, content: Any = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def mvbench(root: Path) -> None:
    rows = [
        {
            "video": "ABC12.mp4",
            "question": "What happened after the person took the food?",
            "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup."],
            "answer": "Put down the cup.",
            "start": 7.9,
            "end": 18.0,
        },
        {
            "video": "GONE.mp4",
            "question": "And then?",
            "candidates": ["a", "b"],
            "answer": "a",
            "start": 0,
            "end": 2,
        },
    ]
    put(root / "json/action_sequence.json", rows)
    put(root / "video/star/Charades_v1_480/ABC12.mp4")
    row = {"video": "v/1.mp4", "question": "Left?", "candidates": ["Up", "Down"], "answer": "Down"}
    put(root / "json/moving_direction.json", [row])
    put(root / "video/clevrer/video_validation/v/1.mp4")


def test_mvbench(tmp_path: Path) -> None:
    mvbench(tmp_path)
    found = read_questions("mvbench", tmp_path)
    one, two = found.questions
    assert one.text == "What happened after the person took the food?"
    assert one.choices == ("Ate the medicine.", "Tidied up the blanket.", "Put down the cup.")
    assert (one.answer, one.task) == ("Put down the cup.", "action_sequence")
    assert (one.start, one.end) == (7.9, 18.0)
    assert one.path == str(tmp_path / "video/star/Charades_v1_480/ABC12.mp4")
    assert (two.answer, two.task, two.start, two.end) == ("Down", "moving_direction", None, None)
    assert one.id != two.id
    gone = str(tmp_path / "video/star/Charades_v1_480/GONE.mp4")
    others = [str(tmp_path / f"json/{task}.json") for task in MVBENCH]
    there = {"action_sequence", "moving_direction"}
    assert set(found.missing) == {gone} | {o for o in others if Path(o).stem not in there}
    assert len(MVBENCH) == 20


def test_how_a_question_is_put(tmp_path: Path) -> None:
    mvbench(tmp_path)
    question = read_questions("mvbench", tmp_path).questions[0]
    assert question.messages == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {
            "role": "user",
            "content": "Question: What happened after the person took the food?\nOptions:\n"
            "(A) Ate the medicine.\n(B) Tidied up the blanket.\n(C) Put down the cup.\n"
            "Only give the best option.",
        },
    ]
    assert question.prefix == "Best option:("


def test_egoschema(tmp_path: Path) -> None:
    def row(uid: str) -> dict[str, str]:
        options = {f"option {i}": f"C does {i}" for i in range(5)}
        return {"q_uid": uid, "google_drive_id": "x", "question": "What is C doing?", **options}

    put(tmp_path / "questions.json", [row("aa-1"), row("bb-2"), row("cc-3")])
    put(tmp_path / "subset_answers.json", {"aa-1": 0, "cc-3": 4})
    for uid in ("aa-1", "bb-2", "cc-3"):
        put(tmp_path / f"videos/{uid}.mp4")
    one, two = read_questions("egoschema", tmp_path).questions
    assert (one.id, one.answer, two.id, two.answer) == ("aa-1", "C does 0", "cc-3", "C does 4")
    assert one.choices == tuple(f"C does {i}" for i in range(5))
    assert one.path == str(tmp_path / "videos/aa-1.mp4")
    (tmp_path / "subset_answers.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"subset_answers\.json"):
        read_questions("egoschema", tmp_path)


def test_perception_test(tmp_path: Path) -> None:
    question = {
        "id": 7,
        "question": "What does the person open?",
        "options": ["a door", "a cup", "a window"],
        "answer_id": 1,
        "area": "semantics",
        "reasoning": "descriptive",
        "tag": ["action recognition"],
    }
    video = {"metadata": {"video_id": "video_8"}, "mc_question": [question]}
    put(tmp_path / "all_valid.json", {"video_8": video})
    put(tmp_path / "videos/video_8.mp4")
    (one,) = read_questions("perception-test", tmp_path).questions
    assert (one.text, one.answer, one.task) == ("What does the person open?", "a cup", "semantics")
    assert one.choices == ("a door", "a cup", "a window")
    assert (one.tags, one.id) == ({"reasoning": "descriptive"}, "video_8/7")
    assert one.path == str(tmp_path / "videos/video_8.mp4")


NEXT_QA = (
    "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    "4010069381,369,640,480,how do the two man play,0,6,CH,roll the handle,tap,strum,hit,pat\n"
    '4010069382,369,640,480,"why, then",3,7,CW,fun,rest,"sit, stand",no,yes\n'
)


def test_next_qa(tmp_path: Path) -> None:
    put(tmp_path / "val.csv", NEXT_QA)
    put(tmp_path / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    put(tmp_path / "videos/1164/4010069381.mp4")
    put(tmp_path / "videos/4010069382.mp4")
    one, two = read_questions("next-qa", tmp_path).questions
    assert (one.text, one.answer, one.task) == ("how do the two man play", "roll the handle", "CH")
    assert one.path == str(tmp_path / "videos/1164/4010069381.mp4")
    assert (two.text, two.answer, two.id) == ("why, then", "no", "4010069382/7")
    assert two.choices == ("fun", "rest", "sit, stand", "no", "yes")


def test_movqa(tmp_path: Path) -> None:
    options = ["run", "jump", "fly", "swim", "sing"]
    lettered = dict(zip("ABCDE", options, strict=True))
    common = {"question": "What next?", "type": "temporal"}
    rows = [
        {**common, "video": "m1", "options": options, "answer": 2, "start": 3, "end": 9},
        {**common, "video": "m1.mkv", "options": lettered, "answer": "D"},
        {**common, "video": "m1", "options": options, "answer": "sing"},
    ]
    put(tmp_path / "questions.json", rows)
    put(tmp_path / "videos/m1.mp4")
    put(tmp_path / "videos/m1.mkv")
    one, two, three = read_questions("movqa", tmp_path).questions
    assert [q.answer for q in (one, two, three)] == ["fly", "swim", "sing"]
    assert [(q.start, q.end) for q in (one, two)] == [(3, 9), (None, None)]
    assert two.path == str(tmp_path / "videos/m1.mkv")
    assert two.choices == tuple(options)
    assert one.task == "temporal"


def test_toy(tmp_path: Path) -> None:
    listing = write_questions(tmp_path, 1, 0, size=16, num_frames=2).parent / "held-out.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    some = read_questions("toy", listing).questions
    every = read_questions("toy", listing, choices=False).questions
    assert len(every) == len(rows) > len(some) > 0
    assert {q.task for q in every} - {q.task for q in some} == {"caption"}
    assert all(not q.choices and not q.prefix for q in every)
    for question, row in zip(every, rows, strict=True):
        assert question.messages == row["messages"][:1]
        assert (question.answer, question.task) == (row["answer"], row["question_kind"])
        assert question.tags == {k: row[k] for k in ("phrasing", "combination")}
        assert (question.facts, question.kind) == (row["facts"], row["kind"])
    by_id = {q.id: q for q in every}
    for question in some:
        row = by_id[question.id]
        assert (question.text, question.answer) == (row.text, row.answer)
        assert question.answer in question.choices


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("egoschema", "questions.json", "[{", r"questions\.json:1: not JSON"),
        ("egoschema", "questions.json", {}, "must be a JSON array, got dict"),
        ("egoschema", "questions.json", ["x"], "item 1: a row must be an object, got str"),
        ("egoschema", "questions.json", [{"q_uid": "a"}], "item 1: question must be given"),
        ("perception-test", "all_valid.json", [], "must be a JSON object, got list"),
        ("perception-test", "all_valid.json", {"v": {}}, "v: mc_question must be given"),
        (
            "mvbench",
            "json/state_change.json",
            [{"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "z"}],
            r"item 1: answer must be one of \['x', 'y'\], got 'z'",
        ),
        (
            "mvbench",
            "json/state_change.json",
            [{"video": "a", "question": "q", "candidates": ["x"], "answer": "x"}],
            r"item 1: choices must be at least two, got \['x'\]",
        ),
        (
            "mvbench",
            "json/action_sequence.json",
            [{"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "x"}],
            "item 1: start must be given",
        ),
        (
            "movqa",
            "questions.json",
            [{"video": "a", "question": "q", "options": ["x", "y"], "answer": 2, "type": "t"}],
            r"answer must be one of \['x', 'y'\], got 2",
        ),
        ("next-qa", "test.csv", NEXT_QA.replace(",3,7", ",x,7"), r"test\.csv:3: answer must be"),
        ("next-qa", "val.csv", NEXT_QA.replace(",a4", ",b4"), r"val\.csv:2: a4 must be given"),
    ],
)
def test_files_that_are_wrong(
    tmp_path: Path, name: str, file: str, content: Any, message: str
) -> None:
    put(tmp_path / "subset_answers.json", {"a": 1})
    put(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        read_questions(name, tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be one of mvbench, .*, toy, got vqa"):
        read_questions("vqa", tmp_path)
    for name, file in (
        ("mvbench", r"json/action_sequence\.json \(of 20 things missing\)"),
        ("egoschema", r"subset_answers\.json"),
        ("perception-test", r"mc_question_valid\.json or all_valid\.json"),
        ("next-qa", r"test\.csv or val\.csv"),
        ("movqa", r"questions\.json"),
    ):
        with pytest.raises(FileNotFoundError, match=file):
            read_questions(name, tmp_path)
    put(tmp_path / "val.csv", NEXT_QA)
    with pytest.raises(FileNotFoundError, match=r"4010069381\.mp4 \(of 2 things missing\)"):
        read_questions("next-qa", tmp_path)
    put(tmp_path / "questions.json", [])
    with pytest.raises(FileNotFoundError, match="movqa: questions in"):
        read_questions("movqa", tmp_path)
