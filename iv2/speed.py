"""Time of a whole stage-1 student step, our kernels against plain PyTorch, in one process."""

from __future__ import annotations

import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import iv2kernels
from iv2.config import Stage1Config
from iv2.models.teachers import Teacher, TeacherOutput
from iv2.models.vision import VISION, VisionEncoder
from iv2.optim import Optimizer, parameter_groups
from iv2.stages.stage1 import Stage1, fit_decoders
from iv2kernels.timing import interleaved, median_ratio


class _FixedTeacher(Teacher):
    """Gives the same random targets each time: what is timed is the student."""

    def __init__(
        self, output: TeacherOutput, tubelet_size: int, pooled_dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(config=SimpleNamespace(tubelet_size=tubelet_size))
        self.output, self.pooled_dim = output, pooled_dim
        self.layers = tuple(range(len(output.tokens)))
        self.embed_dim = output.tokens[0].shape[-1]

    def forward(self, video: Tensor) -> TeacherOutput:
        return self.output


class Step:
    """Forward, backward and optimizer step of a stage-1 student, as published but for its size.

    Both groups of decoders are there: 6 layers to InternVL's 3200 and 4 to VideoMAEv2's 1408, or as
    many as there are.
    """

    def __init__(
        self,
        size: str,
        batch: int,
        dtype: torch.dtype,
        *,
        frames: int = 8,
        depth: int | None = None,  # other than that of the size
    ) -> None:
        torch.manual_seed(0)
        tokens = frames * 256
        model = VISION[size] if depth is None else replace(VISION[size], depth=depth)
        layers = min(6, model.depth), min(4, model.depth)
        rows = [torch.randn(batch, 1 + tokens, 3200).to(dtype) for _ in range(layers[0])]
        first = TeacherOutput(
            rows, torch.randn(batch, 768).to(dtype), torch.rand(batch, frames, 256), None, True
        )
        rows = [torch.randn(batch, tokens, 1408).to(dtype) for _ in range(layers[1])]
        second = TeacherOutput(rows, None, None, None, False)
        teachers = (_FixedTeacher(first, 1, 768, dtype), _FixedTeacher(second, 2, 0, dtype))
        student = VisionEncoder(fit_decoders(model, *teachers)).to(dtype)
        self.stage = Stage1(student, Stage1Config(), *teachers)
        self.optimizer = Optimizer(
            parameter_groups(
                list(student.named_parameters()),
                depth=len(student.blocks),
                weight_decay=0.05,
                layer_decay=1.0,
            ),
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        video = torch.randint(0, 256, (batch, 2 * frames, 224, 224, 3), dtype=torch.uint8)
        self.batch: dict[str, Any] = {"video": video, "seeds": torch.arange(batch)}

    def losses_and_grads(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One forward and backward pass; gradients by parameter name, and then dropped."""
        losses = self.stage(self.batch)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        named = self.stage.student.named_parameters()
        grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
        for p in self.stage.student.parameters():
            p.grad = None
        return {name: loss.detach() for name, loss in losses.items()}, grads

    def __call__(self) -> None:
        losses = self.stage(self.batch)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        self.optimizer.collect()
        self.optimizer.clip(3.0)
        self.optimizer.step(1e-9)


def compare(step: Step, rounds: int = 5) -> dict[str, float]:
    """Median seconds with the default kernels and with ``use("reference")``, taken in turn."""

    def reference() -> None:
        with iv2kernels.use("reference"):
            step()

    times = interleaved({"native": step, "reference": reference}, seconds=0, min_rounds=rounds)
    return {
        "native_s": statistics.median(times["native"]),
        "reference_s": statistics.median(times["reference"]),
        "ratio": median_ratio(times["reference"], times["native"]),
    }
