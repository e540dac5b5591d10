"""The steps of stage 3 that bench.steps times: both losses are one, and rows say what they took."""

from __future__ import annotations

import pytest
import torch

from bench import stage3, steps
from iv2.models.language import next_token_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_logits_give_the_same_loss_and_gradients(lora, dtype):
    step = stage3.Loss(stage3.Head(20, 16, 50, lora), dtype)
    ours, stored = step(), step.logits()
    assert len(ours) == len(stored) == (4 if lora else 2)
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    for a, b in zip(ours, stored, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **close)
    assert 0 < ours[0] < 4  # below that of guesses, log 50
    assert ours[1].any()


def test_the_sizes_are_those_of_recipes_and_models():
    for name in steps.STEPS:
        if name.startswith("stage3-loss-"):
            assert name.removeprefix("stage3-") in stage3.HEADS
    assert stage3.HEADS["loss-mistral-lora"].lora


def test_a_whole_step():
    step = stage3.Step(torch.float32)
    assert {len(step.batch[name]) for name in ("video", "fbank", "messages")} == {32}
    step.batch = {name: values[:2] for name, values in step.batch.items()}
    step.stage.eval()  # no drop path, no dropout
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[2]))
        return stored(*arguments)

    stored = stage3.stored_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage3, "stored_logits", counted)
        step.logits()
    assert len(calls) == 1
    assert calls[0] > 20
    step()
    assert stage3.stage3.next_token_loss is next_token_loss
    loss = step.stage(step.batch)["next_token"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage3.stage3, "next_token_loss", stored)
        torch.testing.assert_close(step.stage(step.batch)["next_token"], loss)


def test_a_row_has_both(monkeypatch):
    small = stage3.Loss(stage3.Head(2048, 16, 8192), torch.float32)
    monkeypatch.setattr(steps, "build", lambda name, dtype: small)
    monkeypatch.setattr(steps, "peaks", lambda: {"float32": 100.0})
    row = steps.measure("stage3-loss-smollm2", "float32", steps.Options(rounds=3))
    assert row["x_logits"] > 0
    logits = 2048 * 8192 * 4 / 1e6
    assert row["ours_mb"] < logits < row["logits_mb"]
    assert "logits" in steps.show(row)
    assert not row["goals"]
