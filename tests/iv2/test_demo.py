from __future__ import annotations

import json
from dataclasses import replace

import pytest

from iv2 import demo, demo_stage2, demo_stage3

# The numbers do not matter here: that each step is done once, and that the page says it, does.
BUDGET = replace(
    demo.LEARN[1],
    clips=64,
    image_teacher_steps=2,
    video_teacher_steps=2,
    stage1_steps=2,
    supervised_steps=2,
)
SPEED = {
    "float32": {"native_s": 2.0, "reference_s": 3.0, "ratio": 1.5},
    "bfloat16": {"native_s": 2.0, "reference_s": 2.0, "ratio": 1.0},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("skvideo")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "_HELD_OUT", 32)
    patch.setattr(demo, "_PROBE_STEPS", 2)
    out = tmp_path_factory.mktemp("demo")
    (out / "speed.json").write_text(json.dumps(SPEED))  # a step that was done: not timed again
    yield out, demo.run(BUDGET, out)
    patch.undo()


def test_page_and_results(finished):
    out, page = finished
    results = json.loads((out / "results.json").read_text())
    students = ["stage1", "stage1, image teacher only", "stage1, video teacher only"]
    assert list(results["probe"]["accuracy"]) == ["random", *students, "supervised"]
    for row in results["probe"]["goals"]:
        kinds = results["probe"]["accuracy"]["stage1"].values()
        assert row["value"] == max(kind[row["attribute"]] for kind in kinds)
        assert row["met"] == (row["value"] >= row["goal"])
    assert [results["speed"][d]["met"] for d in ("float32", "bfloat16")] == [True, False]
    html = page.read_text(encoding="utf-8")
    for text in (*students, "Losses", "A masked clip", "data:image/png"):
        assert text in html
    assert "<script src" not in html  # one file, nothing fetched


def test_a_second_run_does_nothing_again(finished):
    out, page = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(before) > 5
    assert demo.run(BUDGET, out) == page
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


def test_stage_3_starts_from_stage_2(finished, monkeypatch):
    out, page = finished
    called = []

    def run(budget, folder, weights, *rest):
        called.append((budget, folder, weights))
        return {"stage": len(called) + 1}

    for part, word in ((demo_stage2, "two"), (demo_stage3, "three")):
        monkeypatch.setattr(part, "run", run)
        monkeypatch.setattr(part, "page", lambda found, o, p, word=word: p.text(f"{word} {found}"))
    third = demo.LEARN[3]
    demo.run(replace(BUDGET, stage2=third.stage2, stage3=third.stage3), out)
    assert called == [
        (third.stage2, out, str(out / "stage1" / "model.safetensors")),
        (third.stage3, out, str(out / "stage2" / "model.safetensors")),
    ]
    assert json.loads((out / "results.json").read_text())["stage3"] == {"stage": 3}
    html = page.read_text(encoding="utf-8")
    for text in ("iv2: stages 1, 2 and 3", "two {", "three {"):
        assert text in html
    with pytest.raises(ValueError, match="stage2 must be given for stage3"):
        replace(BUDGET, stage3=third.stage3)
