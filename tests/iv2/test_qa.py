from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from media import numbers, write_video

from iv2 import cli
from iv2.data.audio import SoundConfig, read_fbank
from iv2.data.instructions import SYSTEM_PROMPT, choice_prompt, write_questions
from iv2.eval.qa import (
    Shown,
    as_text,
    caption_score,
    chat_answers,
    chosen,
    evaluate,
    evaluate_sets,
    load_frames,
    middle_indices,
    named,
    normalise,
    other_frames,
    other_videos,
    replies_from,
    score,
    text_only,
    with_baselines,
    write_asked,
)
from iv2.eval.questions import Question, read_questions


def choice(answer: str = "b", task: str = "t", **more) -> Question:
    return Question("which?", answer, "v.mp4", task, choices=("a", "b", "c"), **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    return write_questions(folder, 4, 5, size=32, num_frames=16).parent


# ---- choices


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("B) the green one", 1),
        ("b)", 1),
        ("B", 1),
        ("B.", 1),
        ("(C) that one", 2),
        ("Best option:(A) x", 0),
        ("best option: (A", 0),
        ("A: x\n(B) y", 0),  # the first line alone
        ("  C, since", 2),
        ("Best option:( b ) red", 1),  # as tokenizers of words write it
        ("best option : ( c )", 2),
        ("", None),
        ("\n", None),
        ("D) out of range", None),
        ("a bar in red", None),  # an article
        ("( a bar", None),
        ("Both", None),
        ("the second", None),
        ("the answer is B", None),
        ("1", None),
        ("é)", None),
        ("?? (B)", None),
    ],
)
def test_the_letter_of_a_reply(reply: str, number: int | None) -> None:
    assert chosen(reply, choice()) == number


def test_accuracies() -> None:
    rows = [choice("a", "one"), choice("b", "one"), choice("c", "one"), choice("b", "two")]
    found = score(rows, ["A) a", "A)", "hm", "(B) b"])
    assert found["tasks"] == pytest.approx({"one": 100 / 3, "two": 100})
    assert found["mean"] == pytest.approx(200 / 3)  # over tasks
    assert found["total"] == 50  # over questions
    assert found["unreadable"] == 1
    assert score(rows, ["C", "C", "A", "A"])["total"] == 0
    tags = [{"phrasing": p} for p in ("seen", "seen", "new", "new")]
    tagged = [replace(row, tags=tag) for row, tag in zip(rows, tags, strict=True)]
    found = score(tagged, ["A", "A", "A", "B"])
    assert found["tags"] == {"phrasing seen": 50, "phrasing new": 50}
    with pytest.raises(ValueError, match="replies must be 4, one a question, got 3"):
        score(rows, ["A"] * 3)
    with pytest.raises(ValueError, match="replies must be 4"):
        score(rows, "ABCD")
    with pytest.raises(TypeError, match="replies must be strings, got int"):
        score(rows, ["A", "B", "C", 1])  # type: ignore[list-item]


# ---- open questions


@pytest.mark.parametrize(
    ("task", "reply", "answer", "right"),
    [
        ("shape", "The triangle.", "triangle", True),
        ("shape", "a three-sided shape", "triangle", True),
        ("shape", "bar", "triangle", False),
        ("shape", "triangle or bar", "triangle", False),
        ("shape", "red triangle", "triangle", False),
        ("shape", "", "triangle", False),
        ("colour", "Scarlet!", "red", True),
        ("colour", "blue", "red", False),
        ("colour", "red\nblue", "red", True),
        ("motion", "drifting leftwards", "moving left", True),
        ("motion", "left", "moving left", True),
        ("motion", "spinning to the left", "moving left", False),
        ("motion", "rotating anticlockwise", "turning counter-clockwise", True),
        ("motion", "turning clockwise", "turning counter-clockwise", False),
        ("motion", "moving", "moving left", False),
        ("heard", "a wailing siren", "siren", True),
        ("heard", "the bell", "siren", False),
        ("said", "Tiger", "tiger", True),
        ("said", "tigers", "tiger", False),
        ("how_many", "2", "two", True),
        ("how_many", "two", "two", True),
        ("how_many", "one", "two", False),
        ("how_many", "0", "two", False),
        ("yes_no", "Yes, it is.", "yes", True),
        ("yes_no", "no", "yes", False),
        ("yes_no", "yes or no", "yes", False),
        ("yes_no", "maybe", "yes", False),
        ("yes_no", "yesterday", "yes", False),
        ("before_after", "sinking", "moving down", True),
        ("before_after", "white noise", "hiss", True),
        ("before_after", "hum", "hiss", False),
        ("other", "A cup of tea.", "cup of tea", True),
        ("other", "scarlet", "red", False),  # only the toy world's kinds know words
    ],
)
def test_open_answers(task: str, reply: str, answer: str, right: bool) -> None:
    assert (normalise(task, reply) == normalise(task, answer)) == right
    found = score([Question("?", answer, "v.mp4", task)], [reply])
    assert found["total"] == 100 * right


# ---- captions

FACTS = {"colour": ["red"], "shape": ["triangle"], "motion": ["left"], "tone": ["navy"]}


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a red triangle moving left over a navy background", (4, 4, 4)),
        ("a scarlet three-sided shape drifting leftwards, dark blue behind", (4, 4, 4)),
        ("a blue bar moving left over a navy background", (2, 4, 4)),
        ("a red red triangle", (2, 4, 3)),  # once is enough
        ("something happens", (0, 4, 0)),
        ("", (0, 4, 0)),
        # all that there is, to be safe
        ("red green blue yellow triangle bar moving left moving right navy brown", (4, 4, 10)),
        ("a red triangle moving left, navy, with white noise", (4, 4, 4)),  # sounds are left open
        ("redder triangles", (0, 4, 0)),
    ],
)
def test_captions_by_what_they_name(text: str, counts: tuple[int, int, int]) -> None:
    assert caption_score(text, FACTS) == counts


def test_long_names_are_not_taken_for_short_ones() -> None:
    assert set(named("a dark blue wall")) == {("tone", "navy")}
    assert set(named("white noise")) == {("sound", "hiss")}
    assert set(named("turning counter-clockwise")) == {("motion", "counter-clockwise")}
    assert named("a red bar and a red cross")["colour", "red"] == 2
    two = {"colour": ["red", "red"], "shape": ["bar", "cross"]}
    assert caption_score("a red bar and a cross", two) == (3, 4, 3)


def by_facts(captions: dict[str, float]) -> dict[str, float]:
    return {name: captions[name] for name in ("recall", "precision")}


def test_captions_are_scored_apart() -> None:
    rows = [
        Question("?", "x", "v.mp4", "caption", facts=FACTS),
        Question("?", "red", "v.mp4", "colour"),
    ]
    found = score(rows, ["a red triangle moving right", "red"])
    assert by_facts(found["captions"]) == pytest.approx({"recall": 50, "precision": 200 / 3})
    assert (found["total"], found["tasks"]) == (100, {"colour": 100})
    assert score(rows[1:], ["red"])["captions"] == {}
    assert by_facts(score(rows[:1], ["hm"])["captions"]) == {"recall": 0, "precision": 0}
    assert score(rows[:1], ["hm"])["total"] is None
    assert as_text(evaluate("x", rows[:1], {"m": lambda _: ["red"]})).count("25.0") == 1


# ---- frames


def test_middle_frames() -> None:
    assert middle_indices(161) == [5 + 10 * i for i in range(16)]
    assert middle_indices(17) == list(range(16))
    assert middle_indices(33, 4) == [4, 12, 20, 28]
    for n in (1, 2, 5, 15, 16, 40, 999):
        found = middle_indices(n)
        assert len(found) == 16
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < n
    with pytest.raises(ValueError, match="must be at least 1, got 0, 16"):
        middle_indices(0)


def test_frames_of_a_question(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, width=72)
    question = Question("?", "x", str(path), "t")
    assert numbers(load_frames(question, 4)) == middle_indices(60, 4) == [7, 22, 37, 51]
    part = replace(question, start=2.0, end=4.4)  # frames 20 ... 43
    assert numbers(load_frames(part, 4)) == [20 + i for i in middle_indices(24, 4)]
    shuffled = replace(question, frames="shuffled")
    for num in (2, 3, 16):
        found = numbers(load_frames(shuffled, num))
        assert sorted(found) == middle_indices(60, num)
        assert found != middle_indices(60, num)
        assert found == numbers(load_frames(shuffled, num))
    grey = load_frames(replace(question, frames="grey"), 4)
    assert grey.shape == load_frames(question, 4).shape
    assert grey.dtype == torch.uint8
    assert (grey == 128).all()
    for hidden in (replace(question, path=""), replace(question, kind="text")):
        with pytest.raises(ValueError, match="question must have a video, got none"):
            load_frames(hidden)


# ---- answering functions


def test_answers_are_hidden_and_baselines_see_what_they_may() -> None:
    rows = [choice(task=str(i), id=str(i)) for i in range(3)]
    rows = [replace(r, path=f"{i // 2}.mp4", start=1.0, end=2.0) for i, r in enumerate(rows)]
    rows.append(Question("?", "secret", "2.mp4", "open", facts=FACTS))
    asked: dict[str, list[Question]] = {}

    def model(questions: Sequence[Question]) -> list[str]:
        asked[str(len(asked))] = list(questions)
        return ["B"] * len(questions)

    table = evaluate("x", rows, with_baselines(model))
    assert list(table["answers"]) == [
        *("model", "text only", "grey video", "shuffled frames", "other videos"),
    ]
    plain, text, grey, shuffled, others = asked.values()
    for some in asked.values():
        assert all(q.answer == "" and q.facts == {} for q in some)
        assert [q.text for q in some] == [q.text for q in rows]
    assert [q.path for q in plain] == ["0.mp4", "0.mp4", "1.mp4", "2.mp4"]
    assert {(q.path, q.kind) for q in text} == {("", "text")}
    assert {q.frames for q in plain} == {""}
    assert ({q.frames for q in grey}, {q.frames for q in shuffled}) == ({"grey"}, {"shuffled"})
    assert [q.path for q in others] == ["1.mp4", "1.mp4", "2.mp4", "0.mp4"]
    assert {(q.start, q.end) for q in others} == {(None, None)}
    assert table["counts"] == {"0": 1, "1": 1, "2": 1, "open": 1}
    assert table["chance"] == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="rows must be on two videos, got 1"):
        other_videos(model)(rows[:2])
    with pytest.raises(ValueError, match="questions must be at least one, got none"):
        evaluate("x", [], {"m": model})
    with pytest.raises(ValueError, match="replies must be 4, one a question, got 1"):
        evaluate("x", rows, {"m": lambda _: ["B"]})


def test_one_who_watches_beats_one_who_does_not(world: Path) -> None:
    """An answering function that really looks: at colours, in the frames that it is given."""
    listing = world / "held-out.jsonl"
    every = read_questions("toy", listing, choices=False).questions
    questions = [q for q in every if q.task == "colour" and "shape?" in q.text]
    colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0.3, 1), "yellow": (1, 1, 0)}
    colours |= {"pink": (1, 0.4, 0.9), "white": (1, 1, 1)}

    def look(rows: Sequence[Question]) -> list[str]:
        replies = []
        for row in rows:
            if not row.path:
                replies.append("red")
                continue
            frames = load_frames(row).float().flatten(0, 2) / 255
            brightest = frames[frames.amax(1) > 0.7 * frames.max()].mean(0)
            gaps = {c: (brightest - torch.tensor(rgb)).norm() for c, rgb in colours.items()}
            replies.append(min(gaps, key=gaps.__getitem__))
        return replies

    table = evaluate("toy", questions, with_baselines(look))
    totals = {name: column["total"] for name, column in table["answers"].items()}
    assert totals["model"] >= 80
    assert totals["shuffled frames"] == totals["model"]  # colours need no order
    assert max(totals["text only"], totals["grey video"], totals["other videos"]) <= 60


def test_the_toy_world_is_scored_as_a_whole(world: Path) -> None:
    listing = world / "held-out.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    truth = {str(i): row["answer"] for i, row in enumerate(rows, 1)}

    def knows(questions: Sequence[Question]) -> list[str]:
        return [
            f"({'ABCD'[q.choices.index(truth[q.id])]}) it is" if q.choices else truth[q.id]
            for q in questions
        ]

    def guesses(questions: Sequence[Question]) -> list[str]:
        return ["A" if q.choices else "yes" for q in questions]

    answers = {"knows": knows, "guesses": guesses}
    for choices in (True, False):
        (table,) = evaluate_sets({"toy": listing}, answers, choices=choices)
        right = table["answers"]["knows"]
        assert set(right["tasks"].values()) == {100}
        assert (right["mean"], right["total"], right["unreadable"]) == (100, 100, 0)
        assert set(right["tags"].values()) == {100}
        assert len(right["tags"]) == 4
        assert table["answers"]["guesses"]["total"] < 60
        if not choices:
            assert by_facts(right["captions"]) == {"recall": 100, "precision": 100}
            if "bleu" in right["captions"]:  # sacrebleu is of an extra
                assert right["captions"]["bleu"] == pytest.approx(100)
                assert table["answers"]["guesses"]["captions"]["bleu"] < 10
            assert table["answers"]["guesses"]["captions"]["recall"] == 0
        text = as_text(table)
        assert all(task in text for task in table["counts"] if task != "caption")
        assert "knows" in text
        assert "combination new" in text
        json.dumps(table)
    assert "motion" in table["answers"]["knows"]["tasks"]


def test_sets_that_are_not_there(tmp_path: Path, world: Path) -> None:
    sets = {"mvbench": tmp_path, "toy": world / "held-out.jsonl", "egoschema": tmp_path / "no"}
    first, toy, last = evaluate_sets(sets, {"m": lambda rows: ["A"] * len(rows)})
    assert as_text(first).startswith("mvbench: not run: mvbench: ")
    assert "action_sequence.json" in first["not_run"]
    assert "subset_answers.json" in as_text(last)
    assert toy["questions"] > 20
    assert "answers" not in first


def test_single_baselines() -> None:
    rows = [choice()]
    seen: list[Question] = []

    def model(questions: Sequence[Question]) -> list[str]:
        seen.extend(questions)
        return ["x"]

    assert text_only(model)(rows) == other_frames(model, "grey")(rows) == ["x"]
    assert [(q.path, q.kind, q.frames) for q in seen] == [
        ("", "text", ""),
        ("v.mp4", "video", "grey"),
    ]


class FakeChat:
    system = "be kind"

    def __init__(self, sound: SoundConfig | None = None) -> None:
        self.sound = sound
        self.asked: list[tuple[str, Shown, str]] = []
        self.prefixes: list[str] = []

    def answers(
        self, pairs: Sequence[tuple[Shown, str]], *, prefix: str = "", max_new_tokens: int = 128
    ) -> list[str]:
        self.asked += [(self.system, shown, text) for shown, text in pairs]
        self.prefixes += [prefix] * len(pairs)
        self.longest = max_new_tokens
        return [f"{len(self.asked)}" for _ in pairs]


def test_a_chat_model_sees_16_frames_and_the_protocol(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", 60, width=72))
    rows = [replace(choice(), path=path), Question("what?", "x", path, "t"), choice()]
    rows[2] = replace(rows[2], path="", kind="text")
    chat = FakeChat()
    assert len(chat_answers(chat, batch_size=2, max_new_tokens=9)(rows)) == 3
    assert chat.longest == 9
    (system, frames, text), (plain, again, what), (_, nothing, _) = chat.asked
    assert numbers(frames) == numbers(again) == middle_indices(60)
    assert nothing is None
    assert (plain, what) == ("be kind", "what?")
    assert system == SYSTEM_PROMPT.strip()
    assert text == choice_prompt("which?", ("a", "b", "c"))
    assert chat.system == "be kind"
    assert chat.prefixes == ["Best option:(", "", "Best option:("]
    chat.answers = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        chat_answers(chat)(rows[:1])
    assert chat.system == "be kind"  # also after an error


def test_sounds_are_heard_where_they_are_asked_for(world: Path) -> None:
    config = SoundConfig(seconds=2.0, num_frames=198)
    every = read_questions("toy", world / "held-out.jsonl", choices=False).questions
    heard = next(q for q in every if q.kind == "audio_video")
    seen = next(q for q in every if q.kind == "video")
    after = next(q for q in every if q.path != heard.path and q.kind == "audio_video")
    chat = FakeChat(config)
    for run in with_baselines(chat_answers(chat)).values():
        run([heard, seen, after])
    shown = [what for _, what, _ in chat.asked]
    plain, text, grey, shuffled, others = (shown[i : i + 3] for i in range(0, 15, 3))
    assert text == [None] * 3
    own, other = (read_fbank(q.path, None, None, config) for q in (heard, after))
    assert own is not None
    assert not torch.equal(own, other)
    for column, wanted in ((plain, own), (grey, own), (shuffled, own), (others, other)):
        assert torch.equal(column[0][1], wanted)
        assert isinstance(column[1], torch.Tensor)  # asked about what is seen
    assert torch.equal(plain[0][0], load_frames(heard))
    assert (grey[0][0] == 128).all()
    assert torch.equal(shuffled[0][0], load_frames(replace(heard, frames="shuffled")))
    assert torch.equal(others[0][0], load_frames(after))
    deaf = FakeChat()
    chat_answers(deaf)([heard])
    assert torch.equal(deaf.asked[0][1], load_frames(heard))


def test_files_without_sound_are_seen_alone(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", 20, width=72))
    chat = FakeChat(SoundConfig())
    chat_answers(chat)([Question("?", "x", path, "t", kind="audio_video")])
    assert isinstance(chat.asked[0][1], torch.Tensor)


# ---- files


def test_replies_of_another_program(world: Path, tmp_path: Path, capsys) -> None:
    listing, asked, table = world / "held-out.jsonl", tmp_path / "asked.jsonl", tmp_path / "t.json"
    cli.main(["eval", "qa", "--data", str(listing), "--ask", str(asked)])
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    assert {"id", "path", "start", "end", "kind", "messages", "prefix"} == set(rows[0])
    assert rows[0]["messages"][0]["role"] == "system"
    assert not any("answer" in row for row in rows)
    replies = tmp_path / "always-a.jsonl"
    replies.write_text("".join(json.dumps({"id": r["id"], "reply": "A)"}) + "\n" for r in rows))
    command = ["eval", "qa", "--data", str(listing), "--replies", str(replies)]
    cli.main([*command, "--json", str(table)])
    out = capsys.readouterr().out
    assert "always-a" in out
    saved = json.loads(table.read_text())
    assert saved["questions"] == len(rows)
    assert 0 < saved["answers"]["always-a"]["total"] < 60
    with pytest.raises(SystemExit, match="replies must be to every question, got none to"):
        cli.main([*command, "--no-choices"])
    cli.main(["eval", "qa", "--format", "movqa", *command[2:-2], "--replies", str(replies)])
    assert "movqa: not run: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--run, --replies or --ask must be given, got none"):
        cli.main(["eval", "qa", "--data", str(listing)])


def test_reply_files_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for text in ("x", "[1]", '{"id": 1}', "3"):
        path.write_text('{"id": 1, "reply": "A"}\n' + text + "\n")
        with pytest.raises(ValueError, match=r"r\.jsonl:2: a line must be an object of id and"):
            replies_from(path)
    path.write_text('{"id": 1, "reply": "A"}\n')
    assert replies_from(path)([choice(id="1")]) == ["A"]
    write_asked(path, [choice(id="7")])
    assert json.loads(path.read_text())["id"] == "7"
