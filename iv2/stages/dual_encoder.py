"""What retrieval, embedding and search need of a model; the one place that tells the stages apart.

``iv2.stages.stage2.Stage2`` and ``iv2.stages.clip.ClipStage`` are dual encoders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from iv2.models.clip_files import load_clip
from iv2.models.clip_text import TextTokenizer
from iv2.models.stage2 import Seen

if TYPE_CHECKING:
    from iv2.config import TrainConfig


class DualEncoder(Protocol):
    """Media and captions in one space. Without tokens in ``see`` nothing can be re-ranked."""

    config: Any  # with max_tokens

    @property
    def model(self) -> Any:
        """The towers: ``read`` gives features of captions, ``temp`` is the temperature."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    def see(self, batch: dict[str, Any], towers: set[str]) -> Seen:
        """Features and tokens of a batch."""

    def eval(self) -> Any: ...


def load_dual_encoder(
    run_dir: str | Path = "",
    *,
    recipe: str = "",
    weights: str | Path = "",
    tokenizer: str | Path = "",
    vision: str | Path = "",
    text: str | Path = "",
    device: torch.device | str = "cpu",
) -> tuple[DualEncoder, TrainConfig]:
    """A trained stage 2 or CLIP model, in evaluation mode: that of a run, or published weights.

    Args:
        run_dir: Folder of a run; its model.safetensors is loaded unless weights are given.
        recipe: Without a run: the recipe whose towers the weights are for, such as clip-1b.
        weights: A file to load; of a CLIP model it may hold what was trained alone.
        tokenizer: Folder with the vocabulary; empty takes the run's.
        vision: Of a CLIP model: the file of the frozen video encoder; empty takes the run's.
        text: Of a CLIP model: the file of the frozen text tower; empty takes the run's.
        device: Where it runs.

    Raises:
        ValueError: Neither a run nor a recipe with weights is given; the run is of another stage;
            or a parameter is in none of the files.
        FileNotFoundError: A file is not there.
        CheckpointError: The weights cannot be read.
    """
    from iv2.config import from_json
    from iv2.recipes import recipe as recipe_by_name
    from iv2.stages.clip import build_clip_stage
    from iv2.stages.stage2 import load_stage2

    if run_dir:
        config = from_json(Path(run_dir) / "config.json")
    elif recipe and weights:
        config = recipe_by_name(recipe)
    else:
        raise ValueError("load_dual_encoder: run must be given, or recipe and weights, got neither")
    if config.stage == "stage2":
        if vision or text:
            raise ValueError(
                "load_dual_encoder: vision and text must be empty for a stage 2, whose weights are "
                f"one file, got {vision or text}"
            )
        return load_stage2(
            run_dir, recipe=recipe, weights=weights, tokenizer=tokenizer, device=device
        )
    if config.stage != "clip":
        raise ValueError(f"load_dual_encoder: run must be of stage2 or clip, got {config.stage}")
    folder = tokenizer or run_dir or config.clip.tokenizer
    config = replace(config, clip=replace(config.clip, tokenizer=str(folder)))
    stage = build_clip_stage(config.model, config.clip, device)
    own = weights or Path(run_dir) / "model.safetensors"
    load_clip(
        stage.model,
        vision=vision or config.clip.vision_init,
        text=text or config.clip.text_init,
        clip=(config.clip.clip_init, own),
    )
    return stage.eval(), config
