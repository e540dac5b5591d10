"""AdamW as published, Muon for matrices; groups, schedule, float32 masters of bf16 weights.

A learning rate is a function of the step number alone, so that nothing has to be kept of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then half a cosine, by step."""

    # Highest learning rate.
    peak: float
    # Learning rate at the end.
    minimum: float
    # Steps of warm-up; the last of them has the highest rate.
    warmup_steps: int
    # Steps of the whole run.
    total_steps: int

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps - 1)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(math.pi * progress))


_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
# Linear layers of transformer blocks: what Muon is for. Not tables, heads, or LoRA's thin factors.
_MATRIX = re.compile(r"(?:^|\.)(?:blocks|layers?)\.\d+\.(?!.*(?:embedding|_bias|lora_)).*weight$")
# Of Muon's momentum, and of its Newton-Schulz iteration: Jordan's.
_MOMENTUM = 0.95
_ITERATION = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The tables of the decoders belong to the decoders.
_EMBEDDING = re.compile(r"(?:^|\.)(?:patch_embed\..*|cls_token|(?:img_)?pos_embed\w*)$")


def num_blocks(module: nn.Module) -> int:
    """Blocks of the encoder in a module, 0 without one."""
    lists = (
        len(child)
        for name, child in module.named_modules()
        if name.split(".")[-1] == "blocks" and isinstance(child, nn.ModuleList)
    )
    return max(lists, default=0)


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 embeddings, i + 1 block i, depth + 1 what comes after the blocks."""
    block = _BLOCK.search(name)
    if block:
        return int(block[1]) + 1
    return 0 if _EMBEDDING.search(name) else depth + 1


def spared_from_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay must spare it: 1-D, biases, position tables, CLS token."""
    return parameter.dim() <= 1 or "pos_embed" in name or name.endswith("cls_token")


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it is the weight of a linear layer in a transformer block."""
    return parameter.dim() == 2 and _MATRIX.search(name) is not None


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    depth: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr_scales: Mapping[str, float] | None = None,
    muon_lr_scale: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for the optimizer: by weight decay, by part, by kind and, with layer decay, by layer.

    Args:
        named_parameters: Those that need no gradient are left out.
        depth: Blocks of the encoder.
        weight_decay: For all but what ``spared_from_decay`` names.
        layer_decay: Factor of the learning rate from one layer to the one before.
        lr_scales: Factor of the learning rate of parts, by what their names begin with.
        muon_lr_scale: Another factor, for the matrices of blocks; 0 leaves them to AdamW.

    Returns:
        Dicts with ``params``, ``names``, ``weight_decay``, ``lr_scale`` and ``muon``, last layer
        first.
    """
    groups: dict[tuple[int, float, bool, bool], dict[str, Any]] = {}
    parts = lr_scales or {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        below = 0 if layer_decay == 1 else depth + 1 - layer_of(name, depth)
        spared = spared_from_decay(name, parameter)
        scale = next((s for part, s in parts.items() if name.startswith(part)), 1.0)
        muon = muon_lr_scale > 0 and is_matrix(name, parameter)
        scale *= muon_lr_scale if muon else 1.0
        group = groups.setdefault(
            (below, scale, spared, muon),
            {
                "params": [],
                "names": [],
                "weight_decay": 0.0 if spared else weight_decay,
                "lr_scale": scale * layer_decay**below,
                "muon": muon,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def orthogonal(x: Tensor) -> Tensor:  # [..., M, N]
    """Nearly U V^T of each matrix U S V^T: from .65 to 1.25 where S is a hundredth of its largest.

    Five steps of X <- aX + (bA + cA^2)X with A = X X^T, in bfloat16 on a GPU. Source: K. Jordan,
    Muon (2024).
    """
    a, b, c = _ITERATION
    tall = x.shape[-2] > x.shape[-1]
    y: Tensor = x.mT if tall else x
    y = y.bfloat16() if y.is_cuda else y.float()
    y = y / y.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


class Optimizer:
    """torch's fused AdamW, and Muon, over float32 masters of whatever parameters are narrower.

    Parameters that are float32 are their own masters. Gradients are gathered in float32 by
    ``collect``, once per backward: with accumulation, nothing is summed in bfloat16.

    Muon moves an M x N matrix by lr 0.2 sqrt(max(M, N)) ``orthogonal(g + 0.95 m)``, where the
    momentum is m <- 0.95 m + g: about as far as AdamW would at this rate (arXiv 2502.16982, 2.2).

    Args:
        groups: From ``parameter_groups``; those with ``muon`` are updated by Muon.
        betas: Decay of AdamW's two moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        self.names: list[str] = [name for group in groups for name in group["names"]]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        if not self.parameters:
            raise ValueError("Optimizer: groups must hold parameters, got none")
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        pairs = list(zip(self.parameters, self.masters, strict=True))
        self._narrow = [(p, m) for p, m in pairs if p is not m]
        by_parameter = dict(pairs)
        rows = [{**group, "params": [by_parameter[p] for p in group["params"]]} for group in groups]
        self._muon = [row for row in rows if row["muon"]]
        self._momentum: dict[Tensor, Tensor] = {
            p: torch.zeros_like(p, requires_grad=False) for row in self._muon for p in row["params"]
        }
        rest = [row for row in rows if not row["muon"]]
        self._adamw = torch.optim.AdamW(
            rest or [{"params": [], "lr_scale": 1.0}], betas=betas, eps=eps, fused=True
        )

    @property
    def has_masters(self) -> bool:
        """Whether any parameter is narrower than float32."""
        return bool(self._narrow)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of narrow parameters to their masters' and drop them."""
        for parameter, master in self._narrow:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of at most max_norm (0: leave them).

        Returns:
            The norm before, float32.
        """
        limit = max_norm or math.inf
        return nn.utils.clip_grad_norm_(self.masters, limit)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters with a learning rate and drop all gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._adamw.step()
        for group in self._muon:
            self._step_muon(group, lr * group["lr_scale"])
        for master in self.masters:
            master.grad = None
        if self._narrow:
            torch._foreach_copy_([p for p, _ in self._narrow], [m for _, m in self._narrow])

    def _step_muon(self, group: dict[str, Any], lr: float) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for master in group["params"]:
            if master.grad is not None:
                shapes.setdefault(master.shape, []).append(master)
        for shape, masters in shapes.items():  # those of a shape at once: fewer, larger products
            momenta = [self._momentum[m] for m in masters]
            grads = [m.grad for m in masters if m.grad is not None]
            torch._foreach_mul_(momenta, _MOMENTUM)
            torch._foreach_add_(momenta, grads)
            ahead = torch._foreach_add(grads, momenta, alpha=_MOMENTUM)
            updates = list(orthogonal(torch.stack(ahead)).float().unbind())
            torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(masters, updates, alpha=-lr * 0.2 * math.sqrt(max(shape)))

    def state_dict(self) -> dict[str, Any]:
        """Moments, step counts and masters, by parameter name."""
        state: dict[str, Any] = {"masters": {}, "moments": {}}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            momentum = self._momentum.get(master)
            state["moments"][name] = (
                dict(self._adamw.state[master]) if momentum is None else {"momentum": momentum}
            )
            if master is not parameter:
                state["masters"][name] = master.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            ValueError: The state is of other parameters.
        """
        wrong = set(self.names) ^ set(state["moments"])
        if wrong:
            raise ValueError(
                f"Optimizer: state must hold the moments of {len(self.names)} parameters, got "
                f"{len(state['moments'])}; {', '.join(sorted(wrong)[:5])} are in one of them only"
            )
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.copy_(state["masters"][name])
            moments = state["moments"][name]
            if master in self._momentum:
                self._momentum[master].copy_(moments["momentum"])
            else:
                self._adamw.state[master] = {
                    key: value.to(master.device, copy=True) for key, value in moments.items()
                }
