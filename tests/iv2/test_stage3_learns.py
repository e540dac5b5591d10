"""Stage 3 learns what only the video says; two ranks are one; recomputing changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_stage3
import torch
from tiny_stage2 import VISION, write_vocabulary
from tiny_stage3 import CONFIG, QFORMER_TINY, batch_of, said, tiny_stage, write_language_model

from iv2 import train as loop
from iv2.config import DataConfig, OptimConfig, Stage3Config, TrainConfig
from iv2.data.dataset import ClipConfig
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig
from iv2.models.language import LanguageConfig, base
from iv2.serve.chat import VideoChat

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns_what_only_the_video_says(tmp_path):
    """Six clips by heart: the questions are the same, the answers are not."""
    listing = write_toyworld(tmp_path / "world", 6, 0, size=28, num_frames=8)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    asked, answers = listing.parent / "asked.jsonl", {}
    with asked.open("w") as file:
        for row in rows:
            a = row["attributes"]
            text = f"a {a['colour']} {a['shape']} over {a['background']}"
            answers[str(listing.parent / row["path"])] = text
            messages = said("describe the video", text)
            file.write(json.dumps({"path": row["path"], "messages": messages}) + "\n")
    assert len(set(answers.values())) >= 5
    crop = CropConfig(kind="centre", size=28, flip=0.0)
    clip = ClipConfig(num_frames=4, sampling="interval", random=False, crop=crop, min_frames=1)
    config = TrainConfig(
        stage="stage3",
        run_dir=str(tmp_path / "run"),
        precision="float32",
        model=replace(VISION, layer_scale=1.0, init_std=0.08),
        data=DataConfig(
            path=str(asked), clip=clip, batch_size=6, num_workers=0, cache_bytes=1 << 24
        ),
        optim=OptimConfig(
            lr=1e-3, min_lr=3e-4, lr_batch=0, steps=120, warmup_steps=10, weight_decay=0.0
        ),
        stage3=Stage3Config(
            qformer=QFORMER_TINY,
            lm=LanguageConfig(str(listing.parent), weights="tiny", trained="full"),
        ),
        save_every=1000,
    )
    result = loop.run(config)
    assert result.losses["next_token"] < 0.07
    chat = VideoChat.load(tmp_path / "run")
    found = chat.answers([(path, "describe the video") for path in answers], max_new_tokens=12)
    assert found == list(answers.values())


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(run_dir, ranks, **flags):
    run_dir.parent.mkdir(exist_ok=True)
    root, port = str(Path(__file__).parents[2]), free_port()
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, tiny_stage3.__file__, str(run_dir), json.dumps(flags)],
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


def test_two_ranks_train_to_the_losses_of_one(tmp_path):
    losses = {}
    write_vocabulary(tmp_path)
    processes = start(tmp_path / "two", 2)
    tiny_stage3.main(str(tmp_path / "one"))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for name in ("one", "two"):
        rows = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["losses"]["next_token"] for row in rows]
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=2e-4)
    assert losses["one"][0] != pytest.approx(losses["one"][3], rel=1e-2)  # it has learnt


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_recomputed_layers_have_the_same_gradients(tmp_path, trained):
    lm = write_language_model(tmp_path / "lm")
    grads = []
    for again in (False, True):
        config = replace(CONFIG, qformer=replace(QFORMER_TINY, checkpoint=again))
        stage = tiny_stage(
            lm, config, weights="pretrained", trained=trained, checkpoint=again, lora_dropout=0.0
        ).train()
        layer = base(stage.model.lm).model.layers[0]
        calls = []
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        stage(batch_of(said("up", "red bar")))["next_token"].backward()
        assert len(calls) == 1 + again
        grads.append({n: p.grad for n, p in stage.model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_a_skipped_batch_still_has_gradients(tmp_path):
    """A rank without a single conversation that fits takes part in the step."""
    stage = tiny_stage(write_vocabulary(tmp_path), replace(CONFIG, max_tokens=8)).train()
    with pytest.warns(UserWarning, match="is skipped"):
        loss = stage(batch_of(said("up", "red bar")))["next_token"]
    loss.backward()
    assert stage.model.project_up.weight.grad is not None
    assert not stage.model.project_up.weight.grad.any()
