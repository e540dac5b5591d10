"""Text-to-video and video-to-text retrieval: cosines, dual softmax, and re-ranking by matching.

Scores are matrices [V, T] of V media with T captions. Ids tell what belongs together: any number of
media and captions may share one, and the best of several right answers counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from iv2.config import TrainConfig
from iv2.data.captions import clean_caption
from iv2.data.clips import Sample, read_list
from iv2.distributed import World, joined
from iv2.eval.features import ordered_batches
from iv2.models.stage2 import Media, Seen, Stage2Model
from iv2.models.text import PackedText
from iv2.stages.dual_encoder import DualEncoder

# What a pair that was not re-ranked scores.
_UNSCORED = -100.0
_MEDIA_BATCH = 32


@dataclass(frozen=True)
class MediaSet:
    """Encoded media, on the CPU."""

    # [V, D] of length one.
    features: Tensor
    # [V, N, C] for the fusion layers, by tower; empty without re-ranking.
    tokens: dict[str, Tensor]
    # Files.
    paths: list[str]
    # Their numbers in the list; a clip that cannot be read is another one's again.
    sample_ids: list[int]


@dataclass(frozen=True)
class TextSet:
    """Encoded captions, on the CPU."""

    # [T, D] of length one.
    features: Tensor
    # The captions as tokens, and their hidden states [total, C]; None without re-ranking.
    text: PackedText | None
    hidden: Tensor | None


@torch.no_grad()
def encode_media(
    stage: DualEncoder,
    batches: Iterable[dict[str, Any]],
    media: Media = "vision",
    *,
    keep_tokens: bool = True,
    device: torch.device | str = "cpu",
) -> MediaSet:
    """Run the towers, unmasked, over batches that end.

    Args:
        stage: In evaluation mode afterwards.
        batches: For example ``iv2.eval.features.ordered_batches``.
        media: What is compared.
        keep_tokens: Keep the tokens for ``match_scores``: V * N * C numbers.
        device: Where the model is.
    """
    stage.eval()
    towers = {"audio_video": {"vision", "audio"}}.get(media, {media})
    features: list[Tensor] = []
    tokens: dict[str, list[Tensor]] = {}
    paths: list[str] = []
    numbers: list[int] = []
    for batch in batches:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        seen = stage.see(moved, towers)
        features.append(seen.features[media].cpu())
        for tower, x in seen.tokens.items() if keep_tokens else ():
            tokens.setdefault(tower, []).append(x.cpu())
        paths += batch["paths"]
        numbers += batch["sample_ids"].tolist()
    if not paths:
        raise ValueError("encode_media: batches must hold at least one batch, got none")
    joined = {tower: torch.cat(x) for tower, x in tokens.items()}
    return MediaSet(torch.cat(features), joined, paths, numbers)


@torch.no_grad()
def encode_texts(
    stage: DualEncoder,
    captions: Sequence[str],
    *,
    batch_size: int = 256,
    keep_hidden: bool = True,
) -> TextSet:
    """Encode captions, cleaned as in training."""
    stage.eval()
    model, device = stage.model, stage.model.temp.device
    cleaned = [clean_caption(caption) for caption in captions]
    text = stage.tokenizer.encode(cleaned, stage.config.max_tokens)
    features, hidden = [], []
    for first in range(0, len(captions), batch_size):
        rows = torch.arange(first, min(first + batch_size, len(captions)))
        states, found = model.read(text.select(rows)[0].to(device))
        features.append(found.cpu())
        if keep_hidden:
            hidden.append(states.cpu())
    if not features:
        raise ValueError("encode_texts: captions must be at least one, got none")
    if not keep_hidden:
        return TextSet(torch.cat(features), None, None)
    return TextSet(torch.cat(features), text, torch.cat(hidden))


def cosines(media: MediaSet, texts: TextSet) -> Tensor:
    """Cosine similarities [V, T]."""
    return media.features @ texts.features.T


def dual_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores times their softmax over the other side, as published (temperature 1).

    It looks at the whole test set at once, so it is no retrieval of a single query.

    Returns:
        For video-to-text and for text-to-video, [V, T] both.
    """
    return scores * scores.softmax(0), scores * scores.softmax(1)


@torch.no_grad()
def match_scores(
    stage: DualEncoder,
    media: MediaSet,
    texts: TextSet,
    kind: Media = "vision",
    *,
    k: int = 128,
    chunk: int = 256,
    world: World | None = None,
) -> tuple[Tensor, Tensor]:
    """Re-rank by the matching head: each video's k best captions, and each caption's k best videos.

    A pair is scored once, and the keys and values of a video are projected once for all of its
    pairs.

    Args:
        stage: The model.
        media: With tokens.
        texts: With hidden states.
        kind: What the media are.
        k: How many are re-ranked.
        chunk: Pairs in a pass.
        world: Its ranks share the videos.

    Returns:
        Logits of a match for video-to-text and for text-to-video, [V, T] both; -100 beyond k.
    """
    world = world or World()
    if texts.text is None or texts.hidden is None or not media.tokens:
        raise ValueError("match_scores: media and texts must keep tokens, got features alone")
    scores = cosines(media, texts)
    by_video, by_text = (
        torch.zeros_like(scores, dtype=torch.bool).scatter_(
            axis, scores.topk(min(k, scores.shape[axis]), axis).indices, True
        )
        for axis in (1, 0)
    )
    logits = torch.zeros_like(scores)
    pairs = (by_video | by_text).nonzero()  # sorted by video
    pairs = pairs[pairs[:, 0] % world.size == world.rank]
    for first in range(0, len(pairs), chunk):
        some = pairs[first : first + chunk]
        logits[some[:, 0], some[:, 1]] = _match(stage.model, media, texts, kind, some)
    if world.size > 1:
        dist.all_reduce(logits)  # each pair is one rank's
    unscored = torch.tensor(_UNSCORED)
    return torch.where(by_video, logits, unscored), torch.where(by_text, logits, unscored)


def _match(
    model: Stage2Model,
    media: MediaSet,
    texts: TextSet,
    kind: Media,
    pairs: Tensor,  # [P, 2] of video and text, sorted by video
) -> Tensor:  # [P]
    assert texts.text is not None
    assert texts.hidden is not None
    device = model.temp.device
    videos, local = torch.unique_consecutive(pairs[:, 0], return_inverse=True)
    tokens = {tower: x[videos].to(device) for tower, x in media.tokens.items()}
    keys_values = model.keys_values(Seen(tokens, {}), kind)
    text, rows = texts.text.select(pairs[:, 1])
    text = text.to(device)
    hidden = texts.hidden[rows].to(device)
    fused = model.text_encoder.fuse(hidden, text, keys_values, local.to(device))
    return model.match_scores(fused[text.firsts], kind)[:, 1].float().cpu()


def recalls(
    scores: Tensor,  # [queries, candidates]
    query_ids: Tensor,  # [queries]
    candidate_ids: Tensor,  # [candidates]
    at: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Percent of queries with a right answer among the first k.

    A wrong candidate that scores as much as the best right one stands before it.

    Raises:
        ValueError: A query has no right answer.
    """
    right = query_ids[:, None] == candidate_ids[None]
    if not right.any(1).all():
        raise ValueError("recalls: each query must have a right answer, got one without")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    rank = ((scores >= best) & ~right).sum(1)
    return {f"r{k}": 100.0 * (rank < k).float().mean().item() for k in at}


def retrieval(
    stage: DualEncoder,
    media: MediaSet,
    texts: TextSet,
    media_ids: Tensor,  # [V]
    text_ids: Tensor,  # [T]
    *,
    kind: Media = "vision",
    k: int = 128,
    world: World | None = None,
) -> dict[str, dict[str, float]]:
    """Recalls by score ("sim", "dsl" and, with tokens, "match"), in percent.

    Returns:
        ``{"sim": {"v2t_r1": …, "t2v_r1": …, …, "r_mean": …}, …}``.
    """
    plain = cosines(media, texts)
    tables = {"sim": (plain, plain), "dsl": dual_softmax(plain)}
    if media.tokens and texts.text is not None:
        tables["match"] = match_scores(stage, media, texts, kind, k=k, world=world)
    found = {}
    for name, (v2t, t2v) in tables.items():
        ways = {
            "v2t": recalls(v2t, media_ids, text_ids),
            "t2v": recalls(t2v.T, text_ids, media_ids),
        }
        row = {f"{way}_{key}": value for way, r in ways.items() for key, value in r.items()}
        found[name] = row | {"r_mean": sum(row.values()) / len(row)}
    return found


def group_ids(captions: Sequence[str]) -> Tensor:
    """The same number for the same caption: media that share one are right for each other."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(clean_caption(c), len(seen)) for c in captions])


def zero_shot(
    stage: DualEncoder,
    media: MediaSet,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Scores [V, classes]: the mean over the templates of the cosines, as published.

    Args:
        stage: The model.
        media: What is to be classified.
        classes: Names.
        templates: Sentences with {} in the place of the name.
    """
    sentences = [template.format(name) for name in classes for template in templates]
    texts = encode_texts(stage, sentences, keep_hidden=False)
    return cosines(media, texts).view(len(media.paths), len(classes), len(templates)).mean(2)


Wordings = Literal["first", "all", "paragraph"]


def evaluate(
    stage: DualEncoder,
    config: TrainConfig,
    data: str | Path,
    media: Media = "vision",
    caption: str = "visual",
    *,
    wordings: Wordings = "first",
    k: int = 128,
    same: Sequence[str] = (),
) -> dict[str, Any]:
    """Retrieval on a list of clips, seen as in tests; ranks share clips and pairs to re-rank.

    Clips that share a caption are right for each other, and those that are equal in all the
    attributes of ``same``, whose captions may say it in other words; the table says how many
    different ones there are.

    Args:
        stage: The model.
        config: Of its run: how clips are read.
        data: The list.
        media: What is compared with the captions.
        caption: Their kind.
        wordings: Of a clip with several captions of the kind: the first is the query; "all" are
            queries, each of them right for the clip (MSVD, VATEX); or a "paragraph" of them
            (DiDeMo, ActivityNet).
        k: How many are re-ranked; 0: none.
        same: Attributes.

    Raises:
        ValueError: A clip has no such caption.
    """
    world = joined()
    kind = {"vision": "video"}.get(media, media)
    samples = read_list(data, kind)
    for sample in samples:
        if caption not in sample.captions:
            raise ValueError(f"retrieval: captions must have the kind {caption}: {sample.path}")
    seen, skipped = _encode_shared(stage, config, samples, media, k > 0, world)
    shown = [samples[i] for i in seen.sample_ids]
    if same:
        meant = [repr([sample.attributes.get(name) for name in same]) for sample in shown]
    else:
        meant = [sample.captions[caption] for sample in shown]
    media_ids = group_ids(meant)
    # each sentence once for a group
    queries = {
        (group, text): None
        for group, sample in zip(media_ids.tolist(), shown, strict=True)
        for text in _wordings(sample, caption, wordings)
    }
    texts = encode_texts(stage, [text for _, text in queries], keep_hidden=k > 0)
    text_ids = torch.tensor([group for group, _ in queries])
    table = retrieval(stage, seen, texts, media_ids, text_ids, kind=media, k=k, world=world)
    return {
        "media": media,
        "caption": caption,
        "clips": len(shown),
        "captions": len(queries),
        "different": len(set(media_ids.tolist())),
        "skipped": skipped,
        "scores": table,
    }


def _wordings(sample: Sample, caption: str, wordings: Wordings) -> list[str]:
    first = sample.captions[caption]
    if wordings == "first":
        return [first]
    every = [first, *sample.attributes.get("paraphrases", {}).get(caption, [])]
    every = list(dict.fromkeys(every))
    return every if wordings == "all" else [" ".join(every)]


def _encode_shared(
    stage: DualEncoder,
    config: TrainConfig,
    samples: Sequence[Sample],
    media: Media,
    keep_tokens: bool,
    world: World,
) -> tuple[MediaSet, dict[str, str]]:
    """All clips in the order of the list, each encoded by one rank; and what cannot be read."""
    own = samples[world.rank :: world.size]
    batches = ordered_batches(own, config.data.clip, _MEDIA_BATCH, crop="whole") if own else None
    parts: list[tuple[MediaSet, dict[str, str]] | None] = [None]
    if batches is not None:
        found = _each_once(encode_media(stage, batches, media, keep_tokens=keep_tokens))
        ids = [world.rank + world.size * i for i in found.sample_ids]
        parts = [(replace(found, sample_ids=ids), batches.skipped)]
    sets = [part for part in world.gather(parts[0]) if part is not None]
    skipped = {path: reason for _, some in sets for path, reason in some.items()}
    return _in_order([found for found, _ in sets]), skipped


def _in_order(parts: Sequence[MediaSet]) -> MediaSet:
    """Several sets as one, by number of sample."""
    numbers = [i for part in parts for i in part.sample_ids]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    paths = [path for part in parts for path in part.paths]
    return MediaSet(
        torch.cat([part.features for part in parts])[order],
        {
            tower: torch.cat([part.tokens[tower] for part in parts])[order]
            for tower in parts[0].tokens
        },
        [paths[i] for i in order],
        [numbers[i] for i in order],
    )


def evaluate_zero_shot(
    stage: DualEncoder,
    config: TrainConfig,
    data: str | Path,
    attribute: str,
    templates: Sequence[str],
    media: Media = "vision",
    *,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Classify the clips of a list by an attribute, whose values are put into sentences.

    Raises:
        ValueError: A clip lacks the attribute, or a template has no {}.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"zero-shot: template must have {{}} for the class, got {template!r}")
    kind = {"vision": "video"}.get(media, media)
    samples = read_list(data, kind)
    for sample in samples:
        if attribute not in sample.attributes:
            raise ValueError(f"zero-shot: {attribute} must be given for each clip: {sample.path}")
    classes = sorted({str(s.attributes[attribute]) for s in samples})
    batches = ordered_batches(samples, config.data.clip, batch_size, crop="whole")
    seen = _each_once(encode_media(stage, batches, media, keep_tokens=False))
    truth = [classes.index(str(samples[i].attributes[attribute])) for i in seen.sample_ids]
    ranked = zero_shot(stage, seen, classes, templates).argsort(1, descending=True)
    right = ranked == torch.tensor(truth)[:, None]
    return {
        "attribute": attribute,
        "clips": len(truth),
        "classes": len(classes),
        "top1": 100.0 * right[:, :1].any(1).float().mean().item(),
        "top5": 100.0 * right[:, :5].any(1).float().mean().item(),
        "skipped": batches.skipped,
    }


def _each_once(media: MediaSet) -> MediaSet:
    """Without the clips that stand in for broken ones."""
    first = {number: row for row, number in reversed(list(enumerate(media.sample_ids)))}
    rows = sorted(first.values())
    tokens = {tower: x[rows] for tower, x in media.tokens.items()}
    ids = [media.sample_ids[r] for r in rows]
    return MediaSet(media.features[rows], tokens, [media.paths[r] for r in rows], ids)


def as_text(table: dict[str, Any]) -> str:
    """The table of ``evaluate`` for a terminal."""
    rows = table["scores"]
    columns = list(next(iter(rows.values())))
    lines = [
        f"{table['media']} and {table['caption']} captions: {table['clips']} clips, "
        f"{table['different']} different",
        f"{'':8s}" + "".join(f"{c:>9s}" for c in columns),
    ]
    lines += [
        f"{name:8s}" + "".join(f"{row[c]:9.1f}" for c in columns) for name, row in rows.items()
    ]
    return "\n".join(lines)
