"""Weights in and out of files: published ones, safetensors, and the checkpoints of a run."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iv2.models.positions import (
    Grid,
    guess_grid,
    resize_space,
    resize_table,
    resize_time,
    square_grid,
)

# Where files of other models keep the encoder: stage 2 and CLIP, VideoMAE and our stages, InternVL.
PREFIXES = ("", "vision_encoder.", "encoder.", "student.", "visual.")
# Wrappers around the weights (DeepSpeed, DDP, ours) and in front of each name (DDP, compile).
_WRAPPERS = ("module", "model", "state_dict")
_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
_NAME_WRAPPERS = ("module.", "_orig_mod.")


class CheckpointError(RuntimeError):
    """A file that cannot be read or written; the message begins with its path."""

    def __init__(self, path: str | os.PathLike[str], reason: object) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = Path(path)


@dataclass(frozen=True)
class Report:
    """What ``load_checkpoint`` did; names are those of the model, but for ``unexpected``."""

    # The file.
    path: Path
    # What was stripped from the names in the file.
    prefix: str
    # Parameters and buffers taken from the file.
    loaded: tuple[str, ...]
    # Those the file does not have (or has in another size), all allowed by name.
    missing: tuple[str, ...]
    # Names in the file that the model does not have.
    unexpected: tuple[str, ...]
    # Those interpolated or inflated: name -> (shape in the file, shape in the model).
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected"):
            names = getattr(self, what)
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        lines += [f"{n}: {list(old)} -> {list(new)}" for n, (old, new) in self.reshaped.items()]
        return "\n  ".join(lines)


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    allow_missing: Iterable[str] = (),
    prefix: str | None = None,
    num_frames: int | None = None,
) -> Report:
    """Load weights into a model, and leave nothing random that was not named.

    Reads .pth, .pt and .bin (without running code from the file) and .safetensors; unwraps
    "module" and "model"; strips the prefix of stage-1, stage-2, CLIP and teacher files; adapts
    position tables to the model's frame count (linear) and resolution (bicubic), and patch weights
    to its tubelets. A model on the meta device takes over the tensors of the file.

    Args:
        model: Any module. Tables are adapted where their owner has ``config.grid``.
        path: The file.
        allow_missing: Names, or patterns such as "head.*", that may keep their values although
            the file lacks them or has them in another size.
        prefix: What to strip from names in the file; names without it are unexpected. None takes
            the one of ``PREFIXES`` that fits most names.
        num_frames: Temporal length (frames / tubelet) of the tables in the file. None infers it
            from the number of rows.

    Returns:
        What was loaded, missing, unexpected and reshaped.

    Raises:
        CheckpointError: The file cannot be read.
        ValueError: Tensors are missing or have other sizes; they are named, and the model is
            left as it was.
    """
    return load_weights(
        model,
        read_weights(path),
        path,
        allow_missing=allow_missing,
        prefix=prefix,
        num_frames=num_frames,
    )


def load_weights(
    model: nn.Module,
    found: Mapping[str, Tensor],
    source: str | os.PathLike[str],
    *,
    allow_missing: Iterable[str] = (),
    prefix: str | None = None,
    num_frames: int | None = None,
) -> Report:
    """``load_checkpoint`` of tensors by name; ``source`` is what messages call them."""
    own = model.state_dict()
    prefix = best_prefix(found, own) if prefix is None else prefix
    stripped = {name[len(prefix) :]: t for name, t in found.items() if name.startswith(prefix)}
    ready: dict[str, Tensor] = {}
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    misfits: dict[str, str] = {}
    for name in own.keys() & stripped.keys():
        shape, there = tuple(own[name].shape), stripped[name]
        try:
            ready[name] = _fit(model, name, there, shape, num_frames)
        except ValueError as error:
            misfits[name] = str(error)
        else:
            if tuple(there.shape) != shape:
                reshaped[name] = (tuple(there.shape), shape)
    allowed = tuple(allow_missing)
    missing = tuple(n for n in own if n not in ready)
    _check_complete(source, own, missing, misfits, allowed)
    _assign(model, own, ready, missing)
    unexpected = tuple(n for n in found if n[len(prefix) :] not in own or not n.startswith(prefix))
    loaded = tuple(n for n in own if n in ready)
    return Report(Path(source), prefix, loaded, missing, unexpected, reshaped)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, unwrapped from "module" or "model".

    Raises:
        CheckpointError: The file cannot be read or holds no tensors.
    """
    content = _read(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(path, f"holds no tensors by name but a {type(content).__name__}")
    weights = {str(n): t for n, t in content.items() if isinstance(t, Tensor)}
    if not weights:
        raise CheckpointError(path, "holds no tensors by name")
    for wrapper in _NAME_WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name[len(wrapper) :]: t for name, t in weights.items()}
    return {_plain_name(name): t for name, t in weights.items()}


def _plain_name(name: str) -> str:
    """Weight norm has other names where newer PyTorch saved it."""
    for new, old in _WEIGHT_NORM.items():
        name = name.replace(new, old)
    return name


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """Write the weights of any readable file as .safetensors, under the names they have.

    Args:
        source: The file to read.
        out: The file to write; it appears only when it is complete.
        dtype: Floating-point tensors are cast to it; None keeps theirs.

    Returns:
        The names written.

    Raises:
        CheckpointError: A file cannot be read or written.
        ValueError: out does not end in .safetensors.
    """
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"convert: out must end in .safetensors, got {os.fspath(out)}")
    weights = read_weights(source)
    save_weights(weights, out, dtype=dtype)
    return tuple(weights)


def save_weights(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors by name, as .safetensors or, for other endings, as torch.save does.

    Raises:
        CheckpointError: The file cannot be written; one of that name that was there is kept.
    """
    tensors = {
        # A copy of its own: safetensors refuses views and tensors that share memory.
        name: t.detach().to("cpu", dtype if t.is_floating_point() else None).clone()
        for name, t in weights.items()
    }
    if Path(path).suffix != ".safetensors":
        _write_atomically(path, lambda target: torch.save(tensors, target))
        return
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in tensors.items()}
    _write_atomically(path, lambda target: save_file(tensors, target, metadata={"format": "pt"}))


def save_training_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write everything a run needs to go on.

    The file appears under its name only when it is complete and on the disk; a run killed at any
    moment leaves the previous file intact.

    Args:
        path: The file.
        state: Nested dicts, lists and tuples of tensors, numbers, strings, bytes and None: what
            can be loaded without running code.

    Raises:
        CheckpointError: The file cannot be written; one of that name that was there is kept.
        TypeError: state holds anything else.
    """
    _check_plain(state, "state")
    _write_atomically(path, lambda target: torch.save(dict(state), target))


def load_training_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``save_training_checkpoint`` wrote, onto the CPU.

    Raises:
        CheckpointError: The file cannot be read, or is no such checkpoint.
    """
    state = _read(path, mmap=False)
    if not isinstance(state, dict):
        raise CheckpointError(path, f"is no training checkpoint but a {type(state).__name__}")
    return state


def _read(path: str | os.PathLike[str], *, mmap: bool = True) -> Any:
    path = os.fspath(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        # Training scripts leave their parsed arguments, plain data, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=mmap and zipfile.is_zipfile(path),
            )
    except Exception as error:  # each reader has its own set of errors for a broken file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(path, f"cannot be read: {reason}") from error


def _write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:  # torch and safetensors turn OSError into their own kinds
        raise CheckpointError(path, f"cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif value is not None and not isinstance(value, Tensor | bool | int | float | str | bytes):
        raise TypeError(
            f"save_training_checkpoint: {where} must be a tensor, a number, a string, None, or a "
            f"dict, list or tuple of them, got {type(value).__name__}"
        )


def best_prefix(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What of ``PREFIXES`` stands in front of most of a model's names in a file."""

    def matches(prefix: str) -> int:
        return sum(n.startswith(prefix) and n[len(prefix) :] in own for n in found)

    return max(PREFIXES, key=matches)


def _fit(
    model: nn.Module, name: str, there: Tensor, shape: tuple[int, ...], num_frames: int | None
) -> Tensor:
    """The tensor in the model's shape, or a ValueError that says why it cannot be."""
    owner_name, _, leaf = name.rpartition(".")
    # Equal rows may still be another grid: 4 frames of 32x32 patches or 16 of 16x16.
    if tuple(there.shape) == shape and not (num_frames and leaf.endswith("pos_embed")):
        return there
    if leaf == "weight" and owner_name.endswith("patch_embed.proj") and len(shape) == 5:
        inflated = _inflate(there, shape)
        if inflated is not None:
            return inflated
    grid = getattr(getattr(model.get_submodule(owner_name), "config", None), "grid", None)
    if grid is not None and "pos_embed" in leaf and there.dim() == 3 and there.shape[2] == shape[2]:
        return _resize(leaf, there, grid, num_frames)
    raise ValueError(f"must be {list(shape)}, got {list(there.shape)}")


def _inflate(there: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Patch weights of images [C,3,p,p] (or tubelets of one) at the middle frame of a tubelet."""
    flat = there.squeeze(2) if there.dim() == 5 and there.shape[2] == 1 else there
    if flat.dim() != 4 or tuple(flat.shape) != (*shape[:2], *shape[3:]):
        return None
    inflated = flat.new_zeros(shape)
    inflated[:, :, shape[2] // 2] = flat
    return inflated


def _resize(leaf: str, there: Tensor, grid: Grid, num_frames: int | None) -> Tensor:
    rows = there.shape[1]
    if leaf.endswith("pos_embed_temporal"):
        return resize_time(there.transpose(0, 1), grid[0]).transpose(0, 1)
    if "img_pos_embed" in leaf:
        num_frames, grid = 1, (1, *grid[1:])
    cls_row = not leaf.startswith("mae_") and not leaf.endswith("_spatial")
    patches = rows - int(cls_row)
    if leaf.endswith("pos_embed_spatial"):
        num_frames, grid = 1, (1, *grid[1:])
    old = square_grid(patches, num_frames) if num_frames else guess_grid(patches, grid)
    if old is None:
        given = (
            f"do not fit num_frames={num_frames}"
            if num_frames
            else "fit no or several grids: give num_frames"
        )
        raise ValueError(f"has {patches} patch rows, which {given}")
    if leaf.endswith("pos_embed_spatial"):
        return resize_space(there, old[1:], grid[1:])
    return resize_table(there, old, grid, cls_row=cls_row)


def _check_complete(
    path: str | os.PathLike[str],
    own: Mapping[str, Tensor],
    missing: tuple[str, ...],
    misfits: Mapping[str, str],
    allowed: tuple[str, ...],
) -> None:
    refused = [n for n in missing if not any(fnmatchcase(n, a) for a in allowed)]
    wrong = [f"{n} {misfits[n]}" for n in refused if n in misfits]
    absent = [n for n in refused if n not in misfits]
    if wrong or absent:
        parts = [f"{len(wrong)} tensors differ: {_some(wrong, '; ')}"] if wrong else []
        parts += [f"{len(absent)} are missing: {_some(absent)}"] if absent else []
        raise ValueError(
            f"load_checkpoint: {os.fspath(path)} must fit the model (of {len(own)} tensors, "
            f"{'; '.join(parts)})"
        )


@torch.no_grad()
def _assign(
    model: nn.Module,
    own: Mapping[str, Tensor],
    ready: Mapping[str, Tensor],
    missing: tuple[str, ...],
) -> None:
    if not any(t.is_meta for t in own.values()):
        for name, value in ready.items():
            own[name].copy_(value)
        return
    lost = [n for n in missing if own[n].is_meta]
    if lost:
        raise ValueError(
            "load_checkpoint: a model on the meta device must find all its tensors in the file, "
            f"got none for {_some(lost)}"
        )
    cast = {n: t.to(own[n].dtype) for n, t in ready.items()}
    model.load_state_dict(cast, strict=False, assign=True)


def _some(names: Iterable[str], separator: str = ", ", limit: int = 8) -> str:
    names = list(names)
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
