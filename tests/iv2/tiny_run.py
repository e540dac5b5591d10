"""A tiny run without files to decode: stage 1 on random clips. Also a program, to be killed.

python tiny_run.py RUN_DIR '{"steps": 8, ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from iv2 import distributed
from iv2.config import OptimConfig, Stage1Config, TrainConfig
from iv2.models.teachers import build_teacher
from iv2.models.vision import VisionEncoder, vision_config
from iv2.stages.stage1 import Stage1, fit_decoders
from iv2.train import train

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28}
MODEL = vision_config(
    "tiny",
    **SMALL,
    attn_pool_num_heads=2,
    clip_embed_dim=16,
    num_frames=2,
    drop_path=0.3,
    layer_scale=0.5,
)


class RandomBatches:
    """Clips that are a function of their number; a global batch is cut into the ranks' parts."""

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1, bad: int = -1) -> None:
        self.batch_size, self.rank, self.world, self.bad = batch_size, rank, world, bad
        self.position = 0
        self.dataset = range(32)
        self.skipped: dict[str, str] = {}
        self.kill_at = 0

    def __next__(self) -> dict:
        if self.kill_at and self.position >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        first = self.position + self.rank * self.batch_size
        clips = range(first, first + self.batch_size)
        self.position += self.batch_size * self.world
        video = torch.stack([self.clip(i) for i in clips])
        if self.bad in clips:
            video[self.bad - first, 0, 0, 0, 0] = torch.nan
        return {
            "video": video,
            "seeds": torch.tensor([1000 + i for i in clips]),
            "paths": [f"clip{i}.mp4" for i in clips],
        }

    def clip(self, i: int) -> torch.Tensor:
        return torch.randn(3, 4, 28, 28, generator=torch.Generator().manual_seed(i % 32))

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def teachers(clip: bool = True, mae: bool = True) -> tuple:
    torch.manual_seed(7)
    pool = {"attn_pool_num_heads": 2, "clip_embed_dim": 24}
    first = build_teacher("teacher-image-tiny", (0, 1), **SMALL, **pool) if clip else None
    second = build_teacher("teacher-video-tiny", (0, 1), **SMALL, num_frames=4) if mae else None
    return first, second


def stage1(
    config: Stage1Config | None = None, dtype: torch.dtype = torch.float32, **which
) -> Stage1:
    pair = teachers(**which)
    torch.manual_seed(0)
    student = VisionEncoder(fit_decoders(MODEL, *pair)).to(dtype)
    return Stage1(student, config or Stage1Config(mask_ratio=0.5), *pair)


def tiny_config(run_dir: Path | str, **optim) -> TrainConfig:
    fields = {"lr": 1e-2, "min_lr": 1e-4, "lr_batch": 0, "steps": 6, "warmup_steps": 2} | optim
    return TrainConfig(
        run_dir=str(run_dir), precision="float32", save_every=2, optim=OptimConfig(**fields)
    )


def rows(run_dir: Path | str) -> list[dict]:
    """The log without what a clock says."""
    lines = (Path(run_dir) / "log.jsonl").read_text().splitlines()
    clock = ("samples_per_s", "data_s", "step_s")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def main() -> None:
    torch.set_num_threads(1)
    run_dir, flags = sys.argv[1], json.loads(sys.argv[2])
    kill_at, batch_size = flags.pop("kill_at", 0), flags.pop("batch_size", 4)
    precision, bad = flags.pop("precision", "float32"), flags.pop("bad", -1)
    with distributed.world("cpu") as world:
        batches = RandomBatches(batch_size, world.rank, world.size, bad)
        batches.kill_at = kill_at * batch_size
        config = replace(tiny_config(run_dir, **flags), precision=precision)
        train(stage1(), batches, config, world)


if __name__ == "__main__":
    main()
