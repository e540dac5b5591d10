"""AdamW as published: parameter groups, layer decay, schedule, and float32 masters of bf16 weights.

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


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    depth: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: by weight decay, by part and, with layer decay, by layer.

    Args:
        named_parameters: Those that need no gradient are left out.
        depth: Blocks of the encoder.
        weight_decay: For all but what ``spared_from_decay`` names.
        layer_decay: Factor of the learning rate from one layer to the one before.
        lr_scales: Factor of the learning rate of parts, by what their names begin with.

    Returns:
        Dicts with ``params``, ``names``, ``weight_decay`` and ``lr_scale``, last layer first.
    """
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    parts = lr_scales or {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        below = 0 if layer_decay == 1 else depth + 1 - layer_of(name, depth)
        spared = spared_from_decay(name, parameter)
        scale = next((s for part, s in parts.items() if name.startswith(part)), 1.0)
        group = groups.setdefault(
            (below, scale, spared),
            {
                "params": [],
                "names": [],
                "weight_decay": 0.0 if spared else weight_decay,
                "lr_scale": scale * layer_decay**below,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


class AdamW:
    """torch's fused AdamW over float32 masters of whatever parameters are narrower.

    Parameters that are float32 are their own masters. Gradients are gathered in float32 by
    ``collect``, once per backward: with accumulation, nothing is summed in bfloat16.

    Args:
        groups: From ``parameter_groups``.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        self.names: list[str] = [name for group in groups for name in group["names"]]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        if not self.parameters:
            raise ValueError("AdamW: groups must hold parameters, got none")
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        pairs = list(zip(self.parameters, self.masters, strict=True))
        self._narrow = [(p, m) for p, m in pairs if p is not m]
        by_parameter = dict(pairs)
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [by_parameter[p] for p in group["params"]],
                    "weight_decay": group["weight_decay"],
                    "lr_scale": group["lr_scale"],
                }
                for group in groups
            ],
            betas=betas,
            eps=eps,
            fused=True,
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
        self._adamw.zero_grad(set_to_none=True)
        if self._narrow:
            torch._foreach_copy_([p for p, _ in self._narrow], [m for _, m in self._narrow])

    def state_dict(self) -> dict[str, Any]:
        """Moments, step counts and masters, by parameter name."""
        state: dict[str, Any] = {"masters": {}, "moments": {}}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            state["moments"][name] = dict(self._adamw.state[master])
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
                f"AdamW: state must hold the moments of {len(self.names)} parameters, got "
                f"{len(state['moments'])}; {', '.join(sorted(wrong)[:5])} are in one of them only"
            )
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.copy_(state["masters"][name])
            self._adamw.state[master] = {
                key: value.to(master.device, copy=True)
                for key, value in state["moments"][name].items()
            }
