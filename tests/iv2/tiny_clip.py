"""A tiny CLIP stage on random media. Also a program: python tiny_clip.py RUN_DIR '{"steps": 4}'."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_stage2 import VISION, RandomBatches, write_vocabulary

from iv2 import distributed
from iv2.config import ClipStageConfig, OptimConfig, TrainConfig
from iv2.models.clip import ClipModelConfig
from iv2.models.clip_text import ClipTextConfig
from iv2.stages.clip import ClipStage, build_clip_stage
from iv2.train import train

TEXT_TINY = ClipTextConfig(
    vocab_size=64, embed_dim=32, depth=2, num_heads=2, mlp_dim=48, out_dim=24, max_positions=32
)
CONFIG = ClipStageConfig(
    joint=ClipModelConfig(text=TEXT_TINY, align=True, temperature=0.07),
    max_tokens=32,
    trained=("text_encoder", "vision_align", "vision_encoder.clip_projector", "temp"),
)


def write_language_model(folder: Path) -> Path:
    """A folder as transformers writes it: config.json, weights and tokenizer of a tiny LLaMA."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "summarize", ":", "red", "green", "bar", "cross", "left"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
    )
    transformers.LlamaForCausalLM(sizes).save_pretrained(folder)
    return folder


def tiny_stage(folder: Path, **changes) -> ClipStage:
    """With fresh weights; the folder has a vocabulary."""
    torch.manual_seed(0)
    return build_clip_stage(VISION, replace(CONFIG, tokenizer=str(folder), **changes))


def main(
    run_dir: str,
    steps: int = 4,
    batch_size: int = 8,
    gather: str = "gather",
    grad_mode: str = "exact",
) -> None:
    torch.set_num_threads(1)
    with distributed.world("cpu") as world:
        folder = Path(run_dir).parent
        clip = replace(CONFIG, gather=gather, grad_mode=grad_mode)  # type: ignore[arg-type]
        config = TrainConfig(
            stage="clip",
            run_dir=run_dir,
            precision="float32",
            optim=OptimConfig(lr=1e-3, min_lr=1e-3, lr_batch=0, steps=steps, warmup_steps=1),
            clip=clip,
        )
        stage = tiny_stage(folder, gather=gather, grad_mode=grad_mode)
        batches = RandomBatches(batch_size // world.size, world.rank, world.size)
        train(stage, batches, config, world)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_vocabulary(Path(sys.argv[1]).parent)
    main(sys.argv[1], **json.loads(sys.argv[2]))
