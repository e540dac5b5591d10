"""Steps of stage 3 for ``bench.steps``: the loss as the model takes it, and a whole tiny step.

Each can be called with the logits of all answers stored and given to F.cross_entropy instead of
``linear_cross_entropy``, all else being the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iv2.data.instructions import question_vocabulary, train_rows
from iv2.data.toy_scenes import draw_scene
from iv2.models import language
from iv2.optim import Optimizer, parameter_groups
from iv2.recipes import RECIPES
from iv2.stages import stage3


@dataclass(frozen=True)
class Head:
    """The head of a language model and the tokens of answers in a batch."""

    rows: int
    width: int
    vocabulary: int
    # LoRA on the head; the rest of it is frozen in any case
    lora: bool = False


# SmolLM2-135M, whose head has no LoRA; Mistral-7B as aligned (frozen) and as instructed (LoRA)
HEADS = {
    "loss-smollm2": Head(1024, 576, 49152),
    "loss-mistral": Head(512, 4096, 32000),
    "loss-mistral-lora": Head(512, 4096, 32000, lora=True),
}


def stored_logits(
    lm: nn.Module,
    hidden: Tensor,  # [M, C]
    targets: Tensor,  # [M]
) -> Tensor:
    """``next_token_loss`` with logits [M, V]; the softmax in float32, as everywhere."""
    head: Any = language.base(lm).get_output_embeddings()
    return F.cross_entropy(head(hidden).float(), targets)


class _Model(nn.Module):
    """What ``next_token_loss`` knows of a language model."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.lm_head = nn.Linear(head.width, head.vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Loss:
    """From the hidden states of the answers to the gradients of them and of the head's LoRA."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = _Model(head).requires_grad_(False)
        if head.lora:
            config = RECIPES["stage3-instruct"].stage3.lm
            lora = peft.LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=["lm_head"]
            )
            peft.inject_adapter_in_model(lora, self.model)
        self.model.to(dtype)
        self.wrt = [p for p in self.model.parameters() if p.requires_grad]
        self.targets = torch.randint(head.vocabulary, (head.rows,))
        # rows that lean towards their token, as in training: its logit is 8, others are around 0
        name = "lm_head.base_layer.weight" if head.lora else "lm_head.weight"
        own = self.model.get_parameter(name)[self.targets].float()
        lean = 8 * own / own.square().sum(1, keepdim=True)
        self.hidden = (lean + torch.randn(head.rows, head.width)).to(dtype).requires_grad_()

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run(language.next_token_loss)

    def logits(self) -> tuple[Tensor, ...]:
        return self._run(stored_logits)

    def _run(self, loss: Any) -> tuple[Tensor, ...]:
        value = loss(self.model, self.hidden, self.targets)
        return (value.detach(), *torch.autograd.grad(value, [self.hidden, *self.wrt]))


class Step:
    """Forward, backward and optimizer step of the recipe stage3-tiny on clips with sound.

    The conversations are those of the toy world, the pixels and sounds are noise.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = RECIPES["stage3-tiny"]
        with tempfile.TemporaryDirectory() as folder:
            words = "".join(f"{word}\n" for word in question_vocabulary())
            (Path(folder) / "vocab.txt").write_text(words, encoding="utf-8")
            own = replace(config.stage3, lm=replace(config.stage3.lm, folder=folder))
            self.stage = stage3.build_stage3(config.model, own, dtype=dtype, audio=config.audio)
        self.stage.model.to(dtype)
        self.stage.train()
        self.optimizer = Optimizer(
            parameter_groups(
                list(self.stage.model.named_parameters()),
                depth=config.model.depth,
                weight_decay=config.optim.weight_decay,
                layer_decay=1.0,
            ),
            betas=config.optim.betas,
            eps=config.optim.eps,
        )
        clip, count = config.data.clip, config.data.batch_size
        assert clip.sound is not None
        side = clip.crop.size
        self.batch: dict[str, Any] = {
            "video": torch.randn(count, 3, clip.num_frames, side, side),
            "fbank": torch.randn(count, clip.sound.num_frames, clip.sound.num_mel_bins),
            "messages": [
                train_rows(draw_scene(0, i), "", 0, i)["audio_video"][0]["messages"]
                for i in range(count)
            ],
            "seeds": torch.arange(count),
            "paths": [f"{i}.mp4" for i in range(count)],
        }

    def __call__(self) -> None:
        self.stage(self.batch)["next_token"].backward()
        self.optimizer.collect()
        self.optimizer.clip(1.0)
        self.optimizer.step(1e-9)

    def logits(self) -> None:
        with patch.object(stage3, "next_token_loss", stored_logits):
            self()
