"""Batches whose clips are in tiles of their own aspect ratios."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from media import write_video
from tiny_stage2 import AUDIO_TINY, VISION
from tiny_stage3 import CONFIG, batch_of, said, tiny_stage

from iv2 import train as loop
from iv2.config import DataConfig, OptimConfig, TrainConfig
from iv2.data.clips import Sample
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.tiles import tiles
from iv2.data.transforms import CropConfig
from iv2.recipes import RECIPES
from iv2.serve.chat import VideoChat

ROUNDS = said("red bar", "green cross", "up", "left", system="blue")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("heard", [False, True])
def test_clips_of_a_batch_may_have_different_tiles(folder, heard):
    """As loaded: each clip's loss is what it is alone, and the drop paths of its views differ."""
    stage = tiny_stage(folder, replace(CONFIG, tiles=6), AUDIO_TINY if heard else None).eval()
    rounds = [ROUNDS, said("up", "down left"), said("bar", "red green")]
    large = batch_of(*rounds, size=56)
    frames = [large["video"][0], large["video"][1, :, :28], large["video"][2, :, :28, :28]]
    cut = [tiles(one, 6, 28) for one in frames]
    batch = {**large, "video": torch.cat(cut), "views": [5, 3, 1]}
    if heard:
        generator = torch.Generator().manual_seed(1)
        batch["fbank"] = torch.randn(3, 64, 64, generator=generator)
    assert [len(one) for one in cut] == batch["views"]
    alone, tokens = [], []
    for i, some in enumerate(cut):
        one = {**batch_of(rounds[i]), "video": some, "views": [len(some)]}
        if heard:
            one["fbank"] = batch["fbank"][i : i + 1]
        alone.append(stage(one)["next_token"])
        tokens.append(sum(stage.conversation.tokens(rounds[i]).is_answer))
    wanted = sum(a * n for a, n in zip(alone, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(stage(batch)["next_token"], wanted, rtol=1e-4, atol=1e-5)
    # the stage cuts clips of one size itself: the same
    square = {**large, "video": torch.cat([tiles(f, 6, 28) for f in large["video"]])}
    a, b = stage(large)["next_token"], stage({**square, "views": [5, 5, 5]})["next_token"]
    assert torch.equal(a, b)
    seen = []
    embed = stage.model.embed_video
    stage.model.embed_video = lambda *a, **k: (seen.append(k["seeds"]), embed(*a, **k))[1]
    stage.train()(batch)
    place = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0])
    clip = torch.tensor([1000] * 5 + [1001] * 3 + [1002])
    assert torch.equal(seen[0], clip + (place << 40))


def test_one_of_several_with_different_tiles_may_be_left_out(folder):
    stage = tiny_stage(folder, replace(CONFIG, tiles=6, max_tokens=40)).eval()
    large = batch_of(said("up", "down"), said("up", "left"), size=56)["video"]
    cut = [tiles(large[0], 6, 28), tiles(large[1, :, :28], 6, 28)]
    batch = batch_of(said("up", "down " * 20), said("up", "left"))
    batch |= {"video": torch.cat(cut), "views": [5, 3], "unusable": {}}
    with pytest.warns(UserWarning, match=r"clip0\.mp4 is skipped"):
        loss = stage(batch)["next_token"]
    assert list(batch["unusable"]) == [0]
    rest = {**batch_of(said("up", "left")), "video": cut[1], "views": [3]}
    torch.testing.assert_close(loss, stage(rest)["next_token"])


CLIP = ClipConfig(
    num_frames=4,
    sampling="interval",
    crop=CropConfig("whole", 28, flip=0.0),
    min_frames=1,
    normalise=False,
    tiles=6,
)


def test_a_run_of_clips_of_different_shapes(folder, tmp_path):
    """With a conversation that is too long: it is listed beside the broken files."""
    sizes = {"wide": (32, 64), "square": (56, 56), "high": (96, 32)}
    rows = []
    for name, (height, width) in sizes.items():
        write_video(tmp_path / f"{name}.mp4", 12, height=height, width=width)
        rows.append({"path": f"{name}.mp4", "messages": said("up", "down")})
    rows += [rows[0] | {"messages": said("up", "down " * 300)}, rows[1] | {"path": "none.mp4"}]
    listing = tmp_path / "asked.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        stage="stage3",
        run_dir=str(tmp_path / "run"),
        precision="float32",
        model=VISION,
        data=DataConfig(
            path=str(listing), clip=CLIP, batch_size=3, num_workers=0, max_bad_fraction=0.5
        ),
        optim=OptimConfig(lr=1e-3, min_lr=1e-3, lr_batch=0, steps=4, warmup_steps=1),
        stage3=replace(CONFIG, tiles=6, lm=replace(CONFIG.lm, folder=str(folder)), max_tokens=256),
    )
    with pytest.warns(UserWarning, match=r"wide\.mp4 is skipped"):
        assert loop.run(config).step == 4
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    found = {row["path"]: row["reason"] for row in map(json.loads, lines)}
    named = f"{tmp_path}/wide.mp4 (row 4 of asked.jsonl)"
    assert set(found) == {f"{tmp_path}/none.mp4", named}
    assert found[named].startswith("Conversation: messages must be at most 256 tokens, got 3")


def test_chat_sees_what_training_saw(folder, tmp_path):
    path = write_video(tmp_path / "wide.mp4", 12, height=32, width=64)
    chat = VideoChat(tiny_stage(folder, replace(CONFIG, tiles=6)).eval(), CLIP)
    dataset = VideoDataset([Sample(str(path))], replace(CLIP, random=False))
    assert torch.equal(chat.views(path).pixels, dataset.load(0, 0)["video"])


def test_recipes_cut_for_training_as_for_chat():
    for name in ("stage3-hd", "stage3-hd-f16"):
        config = RECIPES[name]
        assert config.data.clip.tiles == config.stage3.tiles == 6
        assert config.data.clip.crop.size == config.model.img_size == 224
