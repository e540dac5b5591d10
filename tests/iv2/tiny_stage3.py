"""A tiny stage 3 on random videos. Also a program: python tiny_stage3.py RUN_DIR '{"steps": 4}'."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_stage2 import VISION, WORDS, write_vocabulary

from iv2 import distributed
from iv2.config import OptimConfig, Stage3Config, TrainConfig
from iv2.models.audio import AudioConfig
from iv2.models.language import LanguageConfig
from iv2.models.qformer import QFORMER
from iv2.stages.stage3 import Stage3, build_stage3
from iv2.train import train

QFORMER_TINY = replace(
    QFORMER["tiny"],
    vocab_size=64,
    embed_dim=32,
    depth=4,
    num_heads=2,
    mlp_dim=48,
    num_queries=2,
    num_extra_queries=3,
    num_hearing_queries=2,
)
CONFIG = Stage3Config(
    qformer=QFORMER_TINY, lm=LanguageConfig(weights="tiny", trained="full"), max_tokens=256
)


def write_language_model(folder: Path) -> Path:
    """A folder as transformers writes it: a tiny Llama with weights, tokenizer and template."""
    import transformers

    from iv2.models.language import tiny_tokenizer

    folder.mkdir(exist_ok=True)
    tokenizer = tiny_tokenizer(write_vocabulary(folder))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    sizes = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(sizes).save_pretrained(folder)
    return folder


def tiny_stage(
    folder: Path, config: Stage3Config = CONFIG, audio: AudioConfig | None = None, **lm
) -> Stage3:
    """With fresh weights, or the folder's language model; the folder has a vocabulary."""
    torch.manual_seed(0)
    config = replace(config, lm=replace(config.lm, folder=str(folder), **lm))
    return build_stage3(VISION, config, audio=audio)


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Questions and answers in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def batch_of(*messages: list[dict[str, str]], video: bool = True, size: int = 28) -> dict:
    generator = torch.Generator().manual_seed(7)
    shape = (len(messages), 4, size, size, 3)
    batch = {
        "kind": "video" if video else "text",
        "messages": list(messages),
        "seeds": torch.arange(len(messages)) + 1000,
        "paths": [f"clip{i}.mp4" if video else "" for i in range(len(messages))],
    }
    if video:
        batch["video"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return batch


class RandomBatches:
    """Samples that are a function of their number; a global batch is cut into the ranks' parts.

    Every third global batch is of text alone, unless all are videos.
    """

    def __init__(
        self, batch_size: int, rank: int = 0, world: int = 1, *, videos: bool = False
    ) -> None:
        self.videos = videos
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.position = 0
        self.dataset = range(32)
        self.skipped: dict[str, str] = {}

    def __next__(self) -> dict:
        first = self.position + self.rank * self.batch_size
        video = self.videos or self.position // (self.batch_size * self.world) % 3 != 1
        self.position += self.batch_size * self.world
        numbers = [i % 32 for i in range(first, first + self.batch_size)]
        # ranks have answers of different lengths
        rounds = [
            said("up", " ".join(WORDS[j % len(WORDS)] for j in range(1 + i))) for i in numbers
        ]
        batch = batch_of(*rounds, video=video)
        batch["seeds"] = torch.tensor([1000 + i for i in numbers])
        batch["captions"] = [{"visual": messages[-1]["content"]} for messages in rounds]
        batch["attributes"] = [{} for _ in rounds]
        if video:
            made = [torch.Generator().manual_seed(i) for i in numbers]
            batch["video"] = torch.stack(
                [
                    torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8, generator=g)
                    for g in made
                ]
            )
        return batch

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def main(
    run_dir: str, steps: int = 4, batch_size: int = 6, learns: str = "next_token", **lm: str
) -> None:
    torch.set_num_threads(1)
    with distributed.world("cpu") as world:
        folder = Path(run_dir).parent
        config = TrainConfig(
            stage="stage3",
            run_dir=run_dir,
            precision="float32",
            optim=OptimConfig(lr=1e-3, min_lr=1e-3, lr_batch=0, steps=steps, warmup_steps=1),
            stage3=replace(CONFIG, learns=learns),
        )
        stage = tiny_stage(folder, config.stage3, **lm)
        words = learns == "words"
        batches = RandomBatches(batch_size // world.size, world.rank, world.size, videos=words)
        train(stage, batches, config, world)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_vocabulary(Path(sys.argv[1]).parent)
    main(sys.argv[1], **json.loads(sys.argv[2]))
