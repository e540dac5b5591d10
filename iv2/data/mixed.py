"""Several lists in one run: each step takes a batch of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iv2.data.dataset import sample_key
from iv2.data.loader import Batches

_STREAM = 0x6D697865  # keeps these draws apart from those of the samples


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of all ranks' batches for each of another number of ranks.

    The position is all ranks' own; what could not be used is what any of them could not.
    """
    joined = dict(states[0])
    if "sources" in joined:
        parts = zip(*(state["sources"] for state in states), strict=True)
        joined["sources"] = [join_states(part) for part in parts]
    if "skipped" in joined:
        rows = {row[0]: row for state in states for row in state["skipped"]}
        joined["skipped"] = list(rows.values())
    return joined


class MixedBatches(Iterator[dict[str, Any]]):
    """Batches of several sources in a drawn order.

    Which source a step takes is a function of (seed, step) alone, so that all ranks agree without a
    message. The position of each source is part of the state.

    Args:
        sources: Of one batch size; closed with this one.
        weights: How often each is taken; None: as often as it is long.
        seed: Of the order.

    Raises:
        ValueError: There are no sources, or of several batch sizes, or a weight is not positive.
    """

    def __init__(
        self, sources: Sequence[Batches], weights: Sequence[float] | None = None, *, seed: int = 0
    ) -> None:
        sizes = {source.batch_size for source in sources}
        if len(sizes) != 1:
            raise ValueError(
                f"MixedBatches: sources must be of one batch size, got {sorted(sizes) or 'none'}"
            )
        self.sources, self.seed, self.step = list(sources), seed, 0
        weights = [len(s.dataset) for s in sources] if weights is None else weights
        if len(weights) != len(sources) or min(weights) <= 0:
            raise ValueError(
                f"MixedBatches: weights must be {len(sources)} positive numbers, got {weights}"
            )
        self.weights = [float(weight) for weight in weights]
        self._edges = np.cumsum(self.weights) / sum(self.weights)
        (self.batch_size,) = sizes

    def __next__(self) -> dict[str, Any]:
        source = self.sources[self.source_of(self.step)]
        self.step += 1
        return next(source)

    def source_of(self, step: int) -> int:
        """Which source a step takes."""
        draw = sample_key(self.seed, step, _STREAM) / 2**64
        return int(np.searchsorted(self._edges[:-1], draw, side="right"))

    def __enter__(self) -> MixedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers of all sources."""
        for source in self.sources:
            source.close()

    @property
    def dataset(self) -> range:
        """As long as all sources together."""
        return range(sum(len(source.dataset) for source in self.sources))

    @property
    def position(self) -> int:
        """Samples that all ranks together have been given."""
        return sum(source.position for source in self.sources)

    @property
    def skipped(self) -> dict[str, str]:
        """Path and reason of each clip that could not be used so far, on this rank."""
        return {path: why for source in self.sources for path, why in source.skipped.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step, what the order depends on, and the state of each source."""
        return {
            "step": self.step,
            "seed": self.seed,
            "weights": self.weights,
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: It was saved with other sources, or in another order.
        """
        if len(state["sources"]) != len(self.sources):
            raise ValueError(
                f"MixedBatches: sources must be {len(self.sources)} as in this run, "
                f"got {len(state['sources'])}"
            )
        for name, here in (("seed", self.seed), ("weights", self.weights)):
            if state[name] != here:
                raise ValueError(
                    f"MixedBatches: {name} must be {here} as in this run, got {state[name]}"
                )
        for source, one in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(one)
        self.step = state["step"]
