"""A tiny stage 2 on random media. Also a program: python tiny_stage2.py RUN_DIR '{"steps": 4}'."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from iv2 import distributed
from iv2.config import OptimConfig, Pairing, Stage2Config, TrainConfig
from iv2.data.captions import Tokenizer
from iv2.models.audio import AUDIO
from iv2.models.stage2 import Stage2Model, Stage2ModelConfig
from iv2.models.text import TEXT
from iv2.models.vision import vision_config
from iv2.stages.stage2 import Stage2
from iv2.train import train

WORDS = (
    "red",
    "green",
    "blue",
    "bar",
    "cross",
    "left",
    "right",
    "up",
    "bell",
    "hum",
    "seven",
    "two",
)
VISION = vision_config(
    "tiny",
    embed_dim=32,
    depth=2,
    num_heads=2,
    img_size=28,
    num_frames=4,
    attn_pool_num_heads=2,
    clip_embed_dim=16,
)
TEXT_TINY = replace(
    TEXT["tiny"], vocab_size=64, embed_dim=32, depth=4, num_heads=2, mlp_dim=48, fusion_layer=2
)
AUDIO_TINY = replace(AUDIO["tiny"], embed_dim=32, depth=2, num_heads=2, mlp_dim=48)
PAIRINGS = (
    Pairing("vision", "visual"),
    Pairing("audio", "audio"),
    Pairing("audio_video", "avs"),
)
CONFIG = Stage2Config(
    pairings=PAIRINGS,
    joint=Stage2ModelConfig(embed_dim=16, fusion_dim=24, match_audio=True),
    mask_ratio=0.5,
)


def write_vocabulary(folder: Path) -> Path:
    """Special tokens, letters, and a few words."""
    letters = [chr(ord("a") + i) for i in range(16)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


def caption(i: int) -> str:
    """Different lengths, different words."""
    return " ".join(WORDS[(i * 5 + j * (i + 1)) % len(WORDS)] for j in range(2 + i % 4))


def tiny_model(folder: Path, config: Stage2Config = CONFIG, audio: bool = True) -> Stage2:
    torch.manual_seed(0)
    model = Stage2Model(VISION, TEXT_TINY, AUDIO_TINY if audio else None, config.joint)
    return Stage2(model, Tokenizer(folder), config)


class RandomBatches:
    """Samples that are a function of their number; a global batch is cut into the ranks' parts."""

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.position = 0
        self.dataset = range(32)
        self.skipped: dict[str, str] = {}

    def __next__(self) -> dict:
        first = self.position + self.rank * self.batch_size
        self.position += self.batch_size * self.world
        return self.batch(range(first, first + self.batch_size))

    def batch(self, numbers: range, kind: str = "audio_video") -> dict:
        def draw(i: int, *shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(i % 32))

        frames = 1 if kind == "image" else 4
        found = {
            "kind": kind,
            "captions": [
                dict.fromkeys(("visual", "audio", "speech", "av", "avs"), caption(i % 32))
                for i in numbers
            ],
            "attributes": [{} for _ in numbers],
            "ids": torch.tensor([i % 32 for i in numbers]),
            "seeds": torch.tensor([1000 + 7 * i for i in numbers]),
            "sample_ids": torch.tensor([i % 32 for i in numbers]),
            "paths": [f"clip{i}.mp4" for i in numbers],
        }
        if kind != "audio":
            found["video"] = torch.stack([draw(i, 3, frames, 28, 28) for i in numbers])
        if kind.startswith("audio"):
            found["fbank"] = torch.stack([draw(i + 50, 64, 64) for i in numbers])
        return found

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def main(
    run_dir: str, steps: int = 4, batch_size: int = 8, die: int = -1, gather: str = "gather"
) -> None:
    torch.set_num_threads(1)
    with distributed.world("cpu") as world:
        if die == world.rank:
            raise RuntimeError(f"rank {die} dies")
        folder = Path(run_dir).parent
        config = TrainConfig(
            stage="stage2",
            run_dir=run_dir,
            precision="float32",
            optim=OptimConfig(lr=1e-3, min_lr=1e-3, lr_batch=0, steps=steps, warmup_steps=1),
            stage2=replace(CONFIG, gather=gather, negatives_group=batch_size // 2),  # type: ignore[arg-type]
        )
        stage = tiny_model(folder, config.stage2)
        batches = RandomBatches(batch_size // world.size, world.rank, world.size)
        train(stage, batches, config, world)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], **json.loads(sys.argv[2]))
