"""Scores of captions by their words."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from iv2.eval import qa
from iv2.eval.captions import text_scores
from iv2.eval.questions import Question

SAME = "a red triangle moving left over a striped background"
NEAR = "a red triangle moving right over a dotted background"
OTHER = "we hear the sound of white noise while nobody speaks"


def test_bleu_and_chrf() -> None:
    pytest.importorskip("sacrebleu")
    perfect = text_scores([SAME, OTHER], [[SAME, OTHER], [OTHER, SAME]])
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["chrf"] == pytest.approx(100)
    wrong, near = text_scores([SAME], [[OTHER]]), text_scores([SAME], [[NEAR]])
    assert wrong["bleu"] < 10 < near["bleu"] < 90
    assert wrong["chrf"] < near["chrf"] < 100


def test_cider() -> None:
    pytest.importorskip("pycocoevalcap")
    truth = [[SAME], [OTHER], ["a blue bar grows"]]
    perfect = text_scores([SAME.upper() + ".", OTHER, "a blue bar grows"], truth)["cider"]
    assert perfect > 500  # in per cent of a scale of 10; short captions have few 4-grams
    near = text_scores([NEAR, OTHER, "a blue bar grows"], truth)["cider"]
    wrong = text_scores([OTHER, SAME, SAME], truth)["cider"]
    assert wrong < 50 < near < perfect
    assert text_scores([SAME], [[SAME]])["cider"] == 0


def test_cider_is_asked_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package: what it would be given, and what becomes of its answer."""
    given = []

    def compute(self: object, true: dict, said: dict) -> tuple[float, list[float]]:
        given.append((true, said))
        return 1.25, [1.0, 1.5]

    page = SimpleNamespace(Cider=type("Cider", (), {"compute_score": compute}))
    for name in ("pycocoevalcap", "pycocoevalcap.cider"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", page)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    found = text_scores(["A bar.", "b"], [["a Bar", "the bar!"], ["c", "d"]])
    assert found == {"cider": 125}
    assert given == [({0: ["a bar", "the bar"], 1: ["c", "d"]}, {0: ["a bar"], 1: ["b"]})]
    rows = [Question("?", SAME, "v.mp4", "caption", facts={"colour": ["red"]})]
    table = qa.evaluate("x", rows, {"m": lambda _: [SAME]})
    assert table["answers"]["m"]["captions"]["cider"] == 125
    assert "captions: cider" in qa.as_text(table)


def test_scores_without_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "pycocoevalcap", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    assert text_scores(["a"], [["a"]]) == {}


def test_references_are_equally_many() -> None:
    for references in ([[SAME]], [[SAME], [SAME, OTHER]]):
        with pytest.raises(ValueError, match="references must be equally many for each of 2"):
            text_scores([SAME, OTHER], references)
