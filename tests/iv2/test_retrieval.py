from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_stage2
import torch
from tiny_stage2 import RandomBatches, tiny_model, write_vocabulary

from iv2.eval import retrieval as page
from iv2.eval.retrieval import (
    cosines,
    dual_softmax,
    encode_media,
    encode_texts,
    group_ids,
    match_scores,
    recalls,
    retrieval,
    zero_shot,
)


def test_recalls_count_the_best_right_answer():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.9], [0.3, 0.3, 0.1]])
    ids = torch.tensor([0, 1, 2])
    # the second is second; the third comes after two that are better
    assert recalls(scores, ids, ids, (1, 2, 3)) == pytest.approx(
        {"r1": 100 / 3, "r2": 200 / 3, "r3": 100.0}
    )
    several = torch.tensor([0, 1, 1])  # two captions of one video
    assert recalls(scores[:2], ids[:2], several, (1,)) == {"r1": 100.0}


def test_a_tie_with_a_wrong_answer_is_lost():
    scores = torch.ones(2, 2)
    ids = torch.arange(2)
    assert recalls(scores, ids, ids, (1, 2)) == {"r1": 0.0, "r2": 100.0}


def test_a_query_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="each query must have a right answer"):
        recalls(torch.ones(1, 2), torch.tensor([5]), torch.tensor([1, 2]))


def test_dual_softmax():
    scores = torch.randn(3, 4)
    v2t, t2v = dual_softmax(scores)
    torch.testing.assert_close(v2t, scores * torch.softmax(scores, 0))
    torch.testing.assert_close(t2v.T, scores.T * torch.softmax(scores.T, 0))


def test_captions_that_read_alike_are_one_group():
    assert group_ids(["A red bar.", "a red bar", "a blue bar"]).tolist() == [0, 0, 1]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = write_vocabulary(tmp_path_factory.mktemp("vocabulary"))
    return tiny_model(folder).double().eval()


def encoded(stage, count=6):
    batches = [RandomBatches(3).batch(range(i, i + 3)) for i in range(0, count, 3)]
    captions = [tiny_stage2.caption(i) for i in range(count)]
    media = encode_media(stage, batches, "audio_video")
    return media, encode_texts(stage, captions, batch_size=4), captions


def test_match_scores_are_those_of_each_pair_alone(stage):
    media, texts, _ = encoded(stage)
    v2t, t2v = match_scores(stage, media, texts, "audio_video", k=2, chunk=5)
    scores = cosines(media, texts)
    assert (v2t > -100).sum(1).tolist() == [2] * 6
    assert (t2v > -100).sum(0).tolist() == [2] * 6
    for video, text in (v2t > -100).nonzero().tolist():
        assert scores[video, text] >= scores[video].topk(2).values[-1]
        pair = torch.tensor([[video, text]])
        alone = page._match(stage.model, media, texts, "audio_video", pair)
        torch.testing.assert_close(v2t[video, text].float(), alone[0], atol=1e-5, rtol=1e-5)
    both = (v2t > -100) & (t2v > -100)
    assert torch.equal(v2t[both], t2v[both])


def test_all_scores_side_by_side(stage):
    media, texts, captions = encoded(stage)
    ids = torch.arange(6)
    table = retrieval(stage, media, texts, ids, ids, kind="audio_video", k=3)
    assert set(table) == {"sim", "dsl", "match"}
    for row in table.values():
        assert set(row) >= {"v2t_r1", "t2v_r1", "v2t_r10", "r_mean"}
        assert row["v2t_r10"] == 100  # of six
    features_alone = encode_texts(stage, captions, keep_hidden=False)
    assert set(retrieval(stage, media, features_alone, ids, ids)) == {"sim", "dsl"}
    with pytest.raises(ValueError, match="media and texts must keep tokens"):
        match_scores(stage, media, features_alone)


def test_zero_shot_averages_cosines_over_templates(stage):
    media, _, _ = encoded(stage)
    scores = zero_shot(stage, media, ["red", "blue"], ["a {}", "{} b", "c {}"])
    texts = encode_texts(stage, ["a red", "red b", "c red"], keep_hidden=False)
    torch.testing.assert_close(scores[:, 0], cosines(media, texts).mean(1))
    assert scores.shape == (6, 2)


def test_a_clip_that_stands_in_for_a_broken_one_counts_once(stage):
    media, _, _ = encoded(stage)
    again = replace(media, sample_ids=[0, 1, 2, 1, 4, 5])
    once = page._each_once(again)
    assert once.sample_ids == [0, 1, 2, 4, 5]
    torch.testing.assert_close(once.features, media.features[[0, 1, 2, 4, 5]])
