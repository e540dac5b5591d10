"""The files of a CLIP model: one of the video encoder, one of the text tower, and its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from iv2.checkpoint import Report, best_prefix, load_weights, read_weights
from iv2.models.clip import ClipModel

_File = str | os.PathLike[str]


def load_clip(
    model: ClipModel,
    *,
    vision: _File = "",
    text: _File = "",
    clip: Sequence[_File] = (),
    may_be_fresh: Collection[str] = (),
) -> Report:
    """Load a model from several files, strictly: each parameter must be in one of them.

    Released CLIP files hold what was trained alone, so that they need the files that the towers
    came from. A later file has the last word. Position tables are adapted to the model's frames;
    decoders, tables of images and heads of the video file are not taken.

    Args:
        model: On any device but meta.
        vision: Of stage 2 or of fine-tuning, such as ``*_ft_k710_f8.pth``; empty for none.
        text: Of the text tower: MobileCLIP's, InternVL-C's, or a language model's, which may be a
            folder. LoRA is found under the names of old and new versions of peft. Empty for none.
        clip: Of CLIP models, whole or in part.
        may_be_fresh: Parameters that may be in no file.

    Returns:
        What was loaded; ``missing`` are the fresh parameters.

    Raises:
        CheckpointError: A file cannot be read.
        ValueError: A parameter is in no file, or has another size there; a file has none. They are
            named, and the model is left as it was.
    """
    own = model.state_dict()
    union: dict[str, Tensor] = {}
    files = [(kind, file) for kind, file in (("vision", vision), ("text", text)) if file]
    files += [("clip", file) for file in clip if file]
    for kind, file in files:
        found = _named_as_in(model, kind, _read(file))
        if not found.keys() & own.keys():
            raise ValueError(
                f"load_clip: {kind} must hold tensors of the model, got none in {os.fspath(file)}"
            )
        union |= found
    source = ", ".join(os.fspath(file) for _, file in files) or "nothing"
    # a fresh parameter is one that is nowhere, not one that does not fit
    fresh = [name for name in may_be_fresh if name not in union]
    return load_weights(model, union, source, allow_missing=fresh, prefix="")


def _named_as_in(model: ClipModel, kind: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are of its kind, as the model names them."""
    if kind == "vision":
        prefix = best_prefix(found, model.vision_encoder.state_dict())
        return {
            f"vision_encoder.{name[len(prefix) :]}": tensor
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
    tower = model.text_encoder
    names = {tower.plain_name(name): f"text_encoder.{name}" for name in tower.state_dict()}
    named = {}
    for name, tensor in found.items():
        if kind == "clip" and not name.startswith("text_encoder."):
            named[name] = tensor
        elif tower.plain_name(name) in names:
            named[names[tower.plain_name(name)]] = tensor
    return named


def _read(path: _File) -> dict[str, Tensor]:
    """The tensors of a file, or of all files of a language model's folder."""
    if not Path(path).is_dir():
        return read_weights(path)
    files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}
