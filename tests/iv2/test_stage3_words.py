"""The words of captions in the embeddings of a video."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny_stage3
import torch
from test_stage3_learns import start
from tiny_stage2 import AUDIO_TINY, write_vocabulary
from tiny_stage3 import CONFIG, batch_of, said, tiny_stage

from iv2.recipes import RECIPES
from iv2.stages.words import words_loss

WORDS = replace(CONFIG, learns="words")

pytestmark = pytest.mark.usefixtures("one_thread")


def captioned(*texts, heard=0):
    batch = batch_of(*([] for _ in texts))
    del batch["messages"]
    kind = "av" if heard else "visual"
    batch["captions"] = [{kind: text} for text in texts]
    batch["attributes"] = [{} for _ in texts]
    if heard:
        batch["fbank"] = torch.randn(len(texts), heard, AUDIO_TINY.num_mel_bins)
    return batch


def test_the_formula_word_by_word():
    torch.manual_seed(0)
    found = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 4, dtype=torch.float64)
    captions = [[1, 5, 5, 8], [1, 5], [1, 2, 8]]  # 1 is in all: it tells nothing
    loss = words_loss(found, table, captions)
    weights = {2: math.log(3), 5: math.log(3 / 2), 8: math.log(3 / 2), 1: 0.0}
    total = 0.0
    for one, words in zip(found.detach(), captions, strict=True):
        scores = {w: math.log(sum(math.exp(float(q @ table[w])) for q in one)) for w in weights}
        log_sum = math.log(sum(math.exp(s) for s in scores.values()))
        some = set(words)
        whole = sum(weights[w] for w in some)
        total -= sum(weights[w] / whole * (scores[w] - log_sum) for w in some)
    assert loss.item() == pytest.approx(total / 3, rel=1e-6)  # the scores are float32
    assert torch.autograd.gradcheck(
        lambda x: words_loss(x, table, captions), found, eps=1e-3, atol=1e-3
    )


def test_captions_that_tell_nothing_and_wrong_numbers():
    found, table = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    loss = words_loss(found, table, [[1, 2], [2, 1]])
    loss.backward()
    assert loss.item() == 0
    assert not found.grad.any()
    half = words_loss(found, table, [[1, 2], [1]])
    assert half.isfinite()
    assert half > 0
    with pytest.raises(ValueError, match="captions must be one a video, 2, got 1"):
        words_loss(found, table, [[1]])


def test_a_model_that_has_the_words_has_no_loss():
    table = 30 * torch.eye(6)
    found = torch.stack([table[[1, 2]], table[[3, 4]]])
    right = words_loss(found, table, [[1, 2], [3, 4]])
    assert right.item() == pytest.approx(math.log(2), abs=1e-4)  # two words share the certainty
    assert words_loss(found.flip(0), table, [[1, 2], [3, 4]]) > 100


@pytest.mark.parametrize("heard", [0, 64])
def test_the_towers_learn_and_the_language_model_does_not(folder, heard):
    audio = AUDIO_TINY if heard else None
    stage = tiny_stage(folder, WORDS, audio=audio, weights="tiny", trained="frozen").train()
    batch = captioned("a red bar up", "a green cross", "a blue bar left", heard=heard)
    losses = stage(batch)
    assert stage.loss_weights == {"words": 1.0}
    assert list(losses) == ["words"]
    losses["words"].backward()
    model = stage.model
    assert all(p.grad is None for p in model.lm.parameters())
    for part in ("vision_encoder.blocks.0.mlp.fc1", "project_up"):
        assert model.get_submodule(part).weight.grad.abs().sum() > 0
    assert model.query_tokens.grad.abs().sum() > 0
    assert (not heard) or model.audio_up[0].weight.grad.abs().sum() > 0
    # as if written out
    stage.eval()
    texts = [c["av" if heard else "visual"] for c in batch["captions"]]
    ids = stage.language_tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = model.embed_video(batch["video"], fbank=batch.get("fbank"))
    table = model.lm.get_input_embeddings().weight
    torch.testing.assert_close(stage(batch)["words"], words_loss(found, table, ids))


def test_words_are_found_by_heart(folder):
    stage = tiny_stage(folder, WORDS, weights="tiny", trained="frozen").train()
    texts = ("red bar up", "green cross left", "blue bar", "red cross up")
    batch = captioned(*texts)
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        loss = stage(batch)["words"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.6
    stage.eval()
    with torch.no_grad():
        found = stage.see(batch["video"][:, None], [said("")] * 4)
    scores = (found @ stage.model.lm.get_input_embeddings().weight.T).logsumexp(1)
    names = stage.language_tokenizer.convert_ids_to_tokens
    for text, row in zip(texts, scores, strict=True):
        words = set(text.split())
        assert set(names(row.topk(len(words)).indices.tolist())) == words


def test_what_cannot_be_learnt_from_says_so(folder):
    stage = tiny_stage(folder, WORDS)
    batch = captioned("red bar", "blue bar")
    with pytest.raises(ValueError, match=r"must have the kind visual, got none: clip1.mp4"):
        stage(batch | {"captions": [{"visual": "red bar"}, {}]})
    with pytest.raises(ValueError, match="must have one view a sample where words are learnt"):
        stage(batch | {"views": [1, 1]})
    del batch["video"]
    with pytest.raises(ValueError, match="must have one view a sample where words are learnt"):
        stage(batch)


def test_two_ranks_have_the_losses_of_one(tmp_path):
    write_vocabulary(tmp_path)
    processes = start(tmp_path / "two", 2, learns="words")
    tiny_stage3.main(str(tmp_path / "one"), learns="words")
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    rows = {
        name: [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    one, two = ([row["losses"]["words"] for row in rows[name]] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-4)
    assert one[0] != pytest.approx(one[3], rel=1e-2)


def test_the_recipe():
    recipe = RECIPES["stage3-tiny-align"]
    assert recipe.stage3.learns == "words"
    assert recipe.stage3.lm.trained == "frozen"
    assert {s.path for s in recipe.data.sources} == {"list.jsonl"}
    assert {s.kind for s in recipe.data.sources} == {"video", "audio_video"}
