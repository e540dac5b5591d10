from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from iv2 import cli, demo, demo_stage3, demo_steps, report
from iv2.checkpoint import read_weights, save_weights
from iv2.demo_stage2 import DEMO2
from iv2.demo_stage3 import DEMO3, LEARN3, Budget3
from iv2.models.stage2 import Stage2Model
from iv2.recipes import RECIPES

# The numbers do not matter here: where each run starts from, who is asked what, and what the page
# says, does.
BUDGET = Budget3(
    clips=4,
    word_steps=1,
    text_steps=2,
    align_steps=1,
    steps=1,
    batch_size=2,
    questions=12,
    compare=True,
    goal=85.0,
    motion_goal=20.0,
)
COLUMNS = ["model", "text only", "shuffled frames", "other videos", "from random encoders"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("skvideo")
    pytest.importorskip("espeakng_loader")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo_stage3, "_LONGEST", 8)
    out = tmp_path_factory.mktemp("demo")
    recipe = RECIPES["stage2-tiny-av"]
    torch.manual_seed(11)
    second = Stage2Model(recipe.model, recipe.text, recipe.audio, recipe.stage2.joint)
    save_weights(second.state_dict(), out / "second.safetensors")
    weights = str(out / "second.safetensors")
    done = demo_stage3.run(BUDGET, out, weights)
    yield out, done
    patch.undo()


def test_results(finished):
    out, results = finished
    assert results["runs"] == [
        *("stage3-words", "stage3-text"),
        *("stage3-align", "stage3", "stage3-align-random", "stage3-random"),
    ]
    for form in ("open", "choices"):
        table = results[form]["table"]
        assert list(table["answers"]) == COLUMNS
        assert table["questions"] >= 12
        assert {"phrasing seen", "combination seen"} <= set(table["answers"]["model"]["tags"])
        assert (table["chance"] is None) == (form == "open")
    assert "caption" in results["open"]["table"]["counts"]
    assert "heard" in results["open"]["table"]["counts"]
    total = results["open"]["table"]["answers"]["model"]["total"]
    assert results["goals"][0] == {
        "what": "open questions, total",
        "goal": 85.0,
        "value": total,
        "met": total >= 85,
    }
    assert json.loads((out / "qa-open.json").read_text()) == results["open"]
    replies = [row["reply"] for row in results["choices"]["dialogues"]]
    assert replies
    assert all(reply.startswith("Best option:(") for reply in replies)


def test_runs_start_from_stage_2_and_from_nothing(finished):
    out, _ = finished
    second = read_weights(out / "second.safetensors")
    reads = read_weights(out / "stage3-text" / "model.safetensors")
    for name, is_near in (("stage3", True), ("stage3-random", False)):
        saved = read_weights(out / name / "model.safetensors")
        for tower in (
            "vision_encoder.blocks.0.attn.qkv.weight",
            "audio_encoder.encoder.layers.0.fc1.weight",
        ):
            gap = (saved[tower] - second[tower]).abs().max()
            assert (gap < 5e-3) == is_near, (name, tower)  # a step of Adam
        for layer, tensor in reads.items():
            if layer.startswith("lm."):  # of both
                assert (saved[layer] - tensor).abs().max() < 5e-3, (name, layer)
    config = json.loads((out / "stage3" / "config.json").read_text())
    assert config["data"]["path"] == str(out / "questions")
    assert config["stage3"]["chat_init"] == str(out / "stage3-align" / "model.safetensors")
    align = json.loads((out / "stage3-align" / "config.json").read_text())
    assert align["stage3"]["vision_init"] == align["stage3"]["audio_init"]
    assert align["stage3"]["lm_init"] == str(out / "stage3-text" / "model.safetensors")


def test_the_lead_over_the_best_baseline(finished, monkeypatch):
    """What was trained is not trained again; the goal is that of the short budget."""
    out, results = finished
    tables = json.loads((out / "qa-open.json").read_text())
    totals = {"model": 50.0, "text only": 20.0, "shuffled frames": 45.0, "other videos": 36.0}
    for name, total in totals.items():
        tables["table"]["answers"][name]["total"] = total
        tables["table"]["answers"][name]["tasks"]["motion"] = 2 * total
    (out / "qa-open.json").write_text(json.dumps(tables))
    monkeypatch.setattr(demo_steps, "train_run", None)
    short = replace(BUDGET, compare=False, goal=15.0)
    found = demo_stage3.run(short, out, "x")
    assert found["runs"] == ["stage3-words", "stage3-text", "stage3-align", "stage3"]
    assert "choices" not in found
    assert [row["value"] for row in found["goals"]] == [14, 10]  # the order of frames apart
    assert [row["met"] for row in found["goals"]] == [False, False]
    (out / "qa-open.json").write_text(json.dumps(results["open"]))


def test_dialogues_are_right_and_wrong_of_all_kinds():
    question = demo_stage3.Question
    rows = [question("?", "red", "a.mp4", "colour", id=str(i)) for i in range(9)]
    rows += [question("?", "bar", "b.mp4", "shape"), question("?", "bar", "b.mp4", "shape")]
    rows += [question("?", "x", "c.mp4", "caption", facts={"colour": ["red"]})]
    found = demo_stage3._dialogues(rows, ["red"] * 5 + ["blue"] * 4 + ["bar", "cross", "red"])
    kinds = [(row["kind"], row["right"]) for row in found]
    assert kinds[:2] == [("colour", True), ("shape", True)]
    assert kinds.count(("colour", True)) == 3
    assert kinds[4:6] == [("colour", False), ("shape", False)]
    assert kinds[8:] == [("caption", None)]


def test_page(finished):
    out, results = finished
    page = report.Page("x")
    demo_stage3.page(results, out, page)
    page.write(out / "index.html")
    html = (out / "index.html").read_text(encoding="utf-8")
    texts = ("from random encoders", "phrasing seen", "open questions, total", "bikes.mp4")
    for text in (*texts, "choices questions", "how many shapes are there?", "wrong: "):
        assert text in html
    shown = results["open"]["dialogues"]
    assert html.count("data:image/png") == 1 + len(shown) + 1  # losses, clips, the real clip


def test_who_has_a_stage_3(tmp_path):
    assert demo.DEMO.stage3 == DEMO3
    assert [budget.stage3 for budget in demo.LEARN.values()] == [None, None, LEARN3]
    assert demo.LEARN[3].stage2.separate_steps == 0
    assert LEARN3.compare
    assert not DEMO3.compare
    assert demo.DEMO.stage2 == DEMO2
    with pytest.raises(SystemExit, match="stage must be one of 1, 2, 3, got 4"):
        cli.main(["learn", "--stage", "4"])
