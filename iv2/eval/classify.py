"""Probes: how well a frozen encoder's features tell classes apart; and accuracy of a classifier.

Both probes are deterministic. The linear one is convex and starts from zero; the attentive one
draws its start and its batches from a generator with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2.eval.features import Features
from iv2.optim import Schedule
from iv2.stages.finetune import Finetune
from iv2kernels import attention_pool

L2S = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)


@dataclass(frozen=True)
class Probe:
    """Result of a probe."""

    # Share of test clips whose class was found, in [0, 1].
    accuracy: float
    # L2 penalty that did best on a part of the training clips (linear), or weight decay.
    penalty: float


def probe(
    train: Features,
    test: Features,
    attributes: Sequence[str],
    *,
    kind: str = "linear",
    layer: str | None = None,
    seed: int = 0,
    steps: int = 400,
) -> dict[str, Probe]:
    """Probe features for several attributes.

    Args:
        train: Features to learn from.
        test: Features of other clips, by the same encoder.
        attributes: What to find.
        kind: "linear", on the CLS token beside the mean of the patches, or "attentive", on all
            tokens (``extract`` with ``keep_tokens``).
        layer: "blocks.{i}"; None takes the last one extracted.
        seed: Of the validation split and the attentive probe.
        steps: Steps of the attentive probe.

    Returns:
        A result by attribute.
    """
    if kind not in ("linear", "attentive"):
        raise ValueError(f"probe: kind must be linear or attentive, got {kind}")
    names = [name.removesuffix(".cls") for name in train.vectors if name.endswith(".cls")]
    layer = layer or names[-1]
    results = {}
    for attribute in attributes:
        y, y_test = encode_labels(train.values(attribute), test.values(attribute))
        if kind == "linear":
            x, x_test = (f.cat(f"{layer}.cls", f"{layer}.mean") for f in (train, test))
            results[attribute] = linear_probe(x, y, x_test, y_test, seed=seed)
            continue
        if layer not in train.tokens or layer not in test.tokens:
            known = ", ".join(train.tokens) or "none"
            raise ValueError(f"probe: layer must have its tokens kept ({known}), got {layer}")
        results[attribute] = attentive_probe(
            train.tokens[layer], y, test.tokens[layer], y_test, seed=seed, steps=steps
        )
    return results


def encode_labels(train: Sequence[Any], test: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Class numbers, by the sorted values of the training clips; -1 for others in the test."""
    index = {value: i for i, value in enumerate(sorted(set(train), key=str))}
    numbers = [torch.tensor([index.get(v, -1) for v in values]) for values in (train, test)]
    return numbers[0], numbers[1]


def split(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to learn from and to validate on, each class in the same proportion.

    Args:
        y: [N] int64 classes.
        fraction: Part to validate on.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    held: list[Tensor] = []
    for value in torch.unique(y):
        rows = order[y[order] == value]
        held.append(rows[: int(len(rows) * fraction)])
    chosen = torch.zeros(len(y), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def linear_probe(
    x: Tensor,  # [N, C]
    y: Tensor,  # [N]
    x_test: Tensor,  # [N', C]
    y_test: Tensor,  # [N']
    *,
    l2s: Sequence[float] = L2S,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression on standardised features.

    The L2 penalty is the one with the least cross-entropy on a fifth of the training clips; then
    all of them are used.
    """
    mean, std = x.double().mean(0), x.double().std(0).clamp_min(1e-6)
    x, x_test = (x.double() - mean) / std, (x_test.double() - mean) / std
    num_classes = int(y.max()) + 1
    fit, held = split(y, 0.2, seed)
    weight = x.new_zeros(num_classes, x.shape[1] + 1)
    best = (float("inf"), max(l2s))
    for l2 in sorted(l2s, reverse=True):  # each starts from the solution before it
        weight = fit_logistic(x[fit], y[fit], weight, l2)
        best = min(best, (F.cross_entropy(_scores(x[held], weight), y[held]).item(), l2))
    weight = fit_logistic(x, y, torch.zeros_like(weight), best[1])
    return Probe(_accuracy(_scores(x_test, weight), y_test), best[1])


def fit_logistic(
    x: Tensor,  # [N, C]
    y: Tensor,  # [N]
    start: Tensor,  # [classes, C + 1], the bias last
    l2: float,
) -> Tensor:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2; the bias is not penalised."""
    weight = start.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [weight], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = F.cross_entropy(_scores(x, weight), y) + 0.5 * l2 * weight[:, :-1].square().sum()
        torch.autograd.backward(value)
        return value

    lbfgs.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:, :-1].T + weight[:, -1]


class AttentiveHead(nn.Module):
    """A learnt query in each of a few heads pools the tokens; a linear layer classifies.

    The query holds the key projection already (the absorbed form of ``attention_pool``).
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int = 4) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_heads, dim))
        self.head = nn.Linear(num_heads * dim, num_classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, classes]
        query = self.query[None].expand(len(x), -1, -1).to(x.dtype)
        z, _ = attention_pool(x, query.contiguous())
        scores: Tensor = self.head(z.flatten(1))
        return scores


def attentive_probe(
    x: Tensor,  # [N, tokens, C]
    y: Tensor,  # [N]
    x_test: Tensor,  # [N', tokens, C]
    y_test: Tensor,  # [N']
    *,
    steps: int = 400,
    batch_size: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> Probe:
    """Train an ``AttentiveHead`` on cached tokens with AdamW and a cosine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentiveHead(x.shape[2], int(y.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = Schedule(lr, 0.0, steps // 10, steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        loss = F.cross_entropy(head(x[rows]), y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return Probe(_accuracy(_in_parts(head, x_test), y_test), weight_decay)


@torch.no_grad()
def _in_parts(head: AttentiveHead, x: Tensor) -> Tensor:
    return torch.cat([head(part) for part in torch.split(x, 256)])


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return (scores.argmax(1) == y).double().mean().item()


@torch.no_grad()
def accuracy(stage: Finetune, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of a classifier over all clips of an iterable that ends, by attribute."""
    was_training = stage.training
    stage.eval()
    correct: dict[str, int] = dict.fromkeys(stage.classes, 0)
    total = 0
    for batch in batches:
        total += len(batch["paths"])
        for name, count in stage.count_correct(batch).items():
            correct[name] += count
    stage.train(was_training)
    if not total:
        raise ValueError("accuracy: batches must hold at least one batch, got none")
    return {name: count / total for name, count in correct.items()}
