"""Captions against true ones by their words."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from iv2.data.captions import clean_caption


def text_scores(replies: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and chrF by sacrebleu, CIDEr by pycocoevalcap, whichever is installed; in per cent.

    CIDEr's weights of words come from the references, so that of one clip it is 0; words are those
    of ``clean_caption``, since the published tokenizer is a Java program. pycocoevalcap is 100 MB,
    most of it Java, and so in no extra: pip install --no-deps pycocoevalcap. METEOR needs Java, or
    WordNet's files, which no package has.

    Args:
        replies: The captions.
        references: For each of them, as many true ones as for every other.

    Returns:
        ``bleu`` and ``chrf``, and ``cider``.

    Raises:
        ValueError: The numbers of references differ.
    """
    if len(references) != len(replies) or len({len(some) for some in references}) != 1:
        raise ValueError(
            "text_scores: references must be equally many for each of "
            f"{len(replies)} replies, got {[len(some) for some in references]}"
        )
    found = {}
    if sacrebleu := _installed("sacrebleu"):
        columns = [list(column) for column in zip(*references, strict=True)]
        found["bleu"] = float(sacrebleu.corpus_bleu(list(replies), columns).score)
        found["chrf"] = float(sacrebleu.corpus_chrf(list(replies), columns).score)
    if cider := _installed("pycocoevalcap.cider.cider"):
        true = {i: [clean_caption(text) for text in some] for i, some in enumerate(references)}
        said = {i: [clean_caption(text)] for i, text in enumerate(replies)}
        mean, _ = cider.Cider().compute_score(true, said)
        found["cider"] = 100.0 * float(mean)
    return found


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None
