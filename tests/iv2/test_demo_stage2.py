from __future__ import annotations

import json

import pytest

from iv2 import demo_stage2, report
from iv2.demo_stage2 import ABLATION, Budget2

# The numbers do not matter here: that each run starts from the one before, and what the page says,
# does.
BUDGET = Budget2(
    clips=8, speech_steps=1, steps=1, batch_size=4, separate_steps=1, reranked=8, goal=20.0
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("skvideo")
    pytest.importorskip("espeakng_loader")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo_stage2, "_SCENES", 3)
    patch.setattr(demo_stage2, "_PER_SCENE", 2)
    out = tmp_path_factory.mktemp("demo")
    yield out, demo_stage2.run(BUDGET, out, "")
    patch.undo()


def test_results(finished):
    _, results = finished
    tables = results["retrieval"]
    assert set(tables) == {"untrained", "stage2", "stage2-visual", "stage2-av"}
    assert [row["caption"] for row in tables["stage2"]] == [caption for _, caption in ABLATION]
    assert [row["caption"] for row in tables["stage2-av"]] == ["av"]
    by_caption = {row["caption"]: row["different"] for row in tables["stage2"]}
    assert by_caption["visual"] == 3  # pictures are shared
    assert by_caption["avs"] == 6  # and what is heard and said tells clips apart
    best = max(tables["stage2"][2]["scores"][s]["t2v_r1"] for s in ("sim", "match"))
    assert results["goal"]["value"] == best
    assert results["goal"]["met"] == (best >= 20.0)


def test_runs_start_from_the_one_before(finished):
    out, _ = finished
    whole = json.loads((out / "stage2" / "config.json").read_text())
    assert whole["init"] == str(out / "stage2-speech" / "model.safetensors")
    speech = json.loads((out / "stage2-speech" / "config.json").read_text())
    assert speech["data"]["kind"] == "audio"
    assert [p["caption"] for p in speech["stage2"]["pairings"]] == ["speech"]
    assert json.loads((out / "stage2-av" / "config.json").read_text())["init"] == ""


def test_page(finished):
    out, results = finished
    page = report.Page("x")
    demo_stage2.page(results, out, page)
    page.write(out / "index.html")
    html = (out / "index.html").read_text(encoding="utf-8")
    for text in ("stage2-visual", "untrained", "AVS text-to-video R@1", "people ride bikes"):
        assert text in html
