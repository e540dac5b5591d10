"""Stage 1: a student that sees a fifth of a clip predicts what frozen teachers make of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iv2.config import Stage1Config
from iv2.models.teachers import TEACHERS, Teacher, TeacherOutput, build_teacher, join_outputs
from iv2.models.vision import Predictions, VisionConfig, VisionEncoder
from iv2kernels import attention_guided_mask, distill_loss, random_mask, tube_mask

# Between the drop-path keys of two masks of the same clip.
_MASK_SALT = 0x5DEECE66D

# What clip_teacher and mae_teacher give.
Targets = tuple[TeacherOutput | None, TeacherOutput | None]


class Stage1(nn.Module):
    """Masked distillation; with a single teacher it is the recipe of the small models.

    The teachers are no submodules: they are neither trained, saved, nor seen by DDP.

    Args:
        student: Its decoders must fit the teachers (``fit_decoders``).
        config: Masks and weights.
        clip_teacher: Gives the masks, and the targets of clip_decoder and final_clip_decoder.
        mae_teacher: Gives the targets of mae_decoder. Its tubelets set which frames the student
            sees: with tubelets of 2 and a student of single frames, every second one. All three
            then have equally many tokens; of a student's tubelet clip_teacher sees the first frame.

    Raises:
        ValueError: A decoder does not fit its teacher.
    """

    def __init__(
        self,
        student: VisionEncoder,
        config: Stage1Config,
        clip_teacher: Teacher | None = None,
        mae_teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.config = config
        self._teachers = (clip_teacher, mae_teacher)  # a tuple, so that they are not registered
        for teacher in self._teachers:
            if teacher is not None:
                teacher.freeze()
        self.stride, self.image_stride = self._strides()
        cached = config.teacher_cache_bytes
        self._cache = TargetCache(self._ask, cached) if cached else None
        self.loss_weights: dict[str, float] = {}
        if clip_teacher is not None:
            self.loss_weights["clip"] = config.clip_weight
            if clip_teacher.pooled_dim:
                self.loss_weights["clip_pooled"] = config.clip_pooled_weight
        if mae_teacher is not None:
            self.loss_weights["mae"] = config.mae_weight
        self._check_decoders()
        if student.config.attn_pool_num_heads and "clip_pooled" not in self.loss_weights:
            student.clip_projector.requires_grad_(False)  # nothing trains it

    @property
    def trained(self) -> VisionEncoder:
        """What is trained and saved."""
        return self.student

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says about the stage."""
        return {}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses by name, unweighted, mean over the masks.

        Args:
            batch: ``video`` (uint8 [B,T,H,W,3] or float [B,3,T,H,W]) and ``seeds`` (int64 [B]).
        """
        video, seeds = batch["video"], batch["seeds"]
        seen = every_frame(video, self.stride)
        first, second = self.targets(video, seen)
        sums: dict[str, Tensor] = {}
        for stream in range(self.config.num_masks):
            ids_keep = self.masks(seen, seeds, first, stream)
            predictions = self.student.predict(seen, ids_keep, seeds=seeds + stream * _MASK_SALT)
            for name, loss in self._losses(predictions, ids_keep, first, second).items():
                sums[name] = sums[name] + loss if name in sums else loss
        return {name: total / self.config.num_masks for name, total in sums.items()}

    @torch.no_grad()
    def targets(
        self,
        video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        seen: Tensor | None = None,  # the student's frames of it
    ) -> Targets:
        """What the teachers give for a batch; the first sees frames of the student's."""
        if self._cache is not None:
            return self._cache(video)
        return self._ask(video, seen)

    def _ask(self, video: Tensor, seen: Tensor | None = None) -> Targets:
        clip_teacher, mae_teacher = self._teachers
        seen = every_frame(video, self.stride) if seen is None else seen
        with torch.autocast(video.device.type, enabled=False):
            first = None if clip_teacher is None else clip_teacher(self.images(seen))
            second = None if mae_teacher is None else mae_teacher(video)
        return first, second

    def images(self, seen: Tensor) -> Tensor:
        """What clip_teacher sees of the student's video: as many tubelets as the student has."""
        return every_frame(seen, self.image_stride)

    def masks(
        self,
        seen: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        seeds: Tensor,  # [B]
        first: TeacherOutput | None,
        stream: int = 0,
    ) -> Tensor:
        """Visible patches [B, N_keep] of the student's video."""
        config, (frames, height, width) = self.config, self.student.grid_of(seen)
        per_frame = height * width
        per_clip = frames * per_frame
        if config.mask == "tube":
            return tube_mask(
                seeds, frames, per_frame, num_kept(per_frame, config.mask_ratio), stream=stream
            )
        if config.mask == "random":
            return random_mask(
                seeds, per_clip, num_kept(per_clip, config.mask_ratio), stream=stream
            )
        if first is None or first.attention is None:
            raise ValueError(
                "Stage1: mask must be tube or random without a pooling map, got attention"
            )
        if first.attention[0].numel() != per_clip:
            raise ValueError(
                f"Stage1: clip_teacher must see the student's {per_clip} patches "
                f"({frames} x {height} x {width}), got {first.attention[0].numel()}"
            )
        rows = frames if config.mask_window == "frame" else 1
        # A NaN is for the loss to show, since the loop then names the clips.
        weights = first.attention.nan_to_num(0.0, 0.0).reshape(len(seeds), rows, -1)
        keep = num_kept(weights.shape[2], config.mask_ratio)
        return attention_guided_mask(seeds, weights, keep, stream=stream)

    def _losses(
        self,
        predictions: Predictions,
        ids_keep: Tensor,  # [B, N_keep]
        first: TeacherOutput | None,
        second: TeacherOutput | None,
    ) -> dict[str, Tensor]:
        student, losses = self.student, {}
        if first is not None:
            losses["clip"] = _layers_loss(predictions.clip, student.clip_decoder, first, ids_keep)
            if first.pooled is not None and predictions.final is not None:
                norm = student.final_clip_decoder.norm
                losses["clip_pooled"] = distill_loss(
                    predictions.final[:, None],
                    first.pooled[:, None],
                    norm.weight,
                    norm.bias,
                    eps=norm.eps,
                )
        if second is not None:
            losses["mae"] = _layers_loss(predictions.mae, student.mae_decoder, second, ids_keep)
        return losses

    def _strides(self) -> tuple[int, int]:
        """Of the student's frames among those given, and of clip_teacher's among the student's."""
        own = self.student.config.tubelet_size
        sizes: list[int] = []
        for teacher in self._teachers:
            encoder: Any = None if teacher is None else teacher.encoder
            sizes.append(own if encoder is None else encoder.config.tubelet_size)
        image, video = sizes
        if own % image or video % own:
            raise ValueError(
                f"Stage1: the student's tubelets of {own} must be a multiple of those of "
                f"clip_teacher, and divide those of mae_teacher, got {image} and {video}"
            )
        return video // own, own // image

    def _check_decoders(self) -> None:
        have = self.student.config
        want = fit_decoders(have, *self._teachers)
        for name in _DECODER_FIELDS:
            if getattr(have, name) != getattr(want, name):
                raise ValueError(
                    f"Stage1: {name} of the student must be {getattr(want, name)} for these "
                    f"teachers, got {getattr(have, name)}"
                )


class TargetCache:
    """Targets of clips that come again, by what the clips hold.

    Args:
        ask: Gives the targets of a batch.
        max_bytes: Memory; when it is full, clips that are not in it are asked for each time.
    """

    def __init__(self, ask: Callable[[Tensor], Targets], max_bytes: int) -> None:
        self._ask, self._left = ask, max_bytes
        self._kept: dict[bytes, Targets] = {}

    def __call__(self, video: Tensor) -> Targets:  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
        keys = [_content(clip) for clip in video]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: place for place, key in enumerate(keys) if key not in found}
        if new:
            asked = self._ask(video[list(new.values())])
            for place, key in enumerate(new):
                found[key] = (_row(asked[0], place), _row(asked[1], place))
                self._keep(key, found[key])
        first, second = zip(*(found[key] for key in keys), strict=True)
        return _join(first), _join(second)

    def _keep(self, key: bytes, targets: Targets) -> None:
        size = sum(output.num_bytes for output in targets if output is not None)
        if size <= self._left:
            self._left -= size
            self._kept[key] = targets


def _content(clip: Tensor) -> bytes:
    values = clip.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).digest()


def _row(output: TeacherOutput | None, place: int) -> TeacherOutput | None:
    return None if output is None else output.row(place)


def _join(parts: tuple[TeacherOutput | None, ...]) -> TeacherOutput | None:
    found = [part for part in parts if part is not None]
    return join_outputs(found) if found else None


_DECODER_FIELDS = (
    "clip_return_layer",
    "clip_teacher_embed_dim",
    "clip_teacher_final_dim",
    "mae_return_layer",
    "mae_teacher_embed_dim",
)


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Visible tokens of a number, rounded as published."""
    return num_tokens - int(num_tokens * mask_ratio)


def every_frame(video: Tensor, stride: int) -> Tensor:
    """Frames 0, stride, 2 stride, … of uint8 [B, T, H, W, 3] or float [B, 3, T, H, W]."""
    if stride == 1:
        return video
    # Contiguous, since both a teacher and the student read it, by patches.
    return (
        video[:, ::stride] if video.dtype == torch.uint8 else video[:, :, ::stride]
    ).contiguous()


def fit_decoders(
    config: VisionConfig, clip_teacher: Teacher | None, mae_teacher: Teacher | None
) -> VisionConfig:
    """The student's configuration with decoders as many, and as wide, as the teachers' layers."""
    fields: dict[str, int] = {"clip_return_layer": 0, "mae_return_layer": 0}
    if clip_teacher is not None:
        fields |= {
            "clip_return_layer": len(clip_teacher.layers),
            "clip_teacher_embed_dim": clip_teacher.embed_dim,
            "clip_teacher_final_dim": clip_teacher.pooled_dim,
        }
    if mae_teacher is not None:
        fields |= {
            "mae_return_layer": len(mae_teacher.layers),
            "mae_teacher_embed_dim": mae_teacher.embed_dim,
        }
    return replace(config, **fields)  # type: ignore[arg-type]


def build_stage1(
    model: VisionConfig, config: Stage1Config, device: torch.device | str = "cpu"
) -> Stage1:
    """Load the teachers and build a student with fresh weights and decoders that fit them.

    Raises:
        ValueError: A teacher is unknown or has no file.
        CheckpointError: A file cannot be read.
    """
    teachers = [
        _load(what, name, path, model, config, device)
        for what, name, path in (
            ("clip_teacher", config.clip_teacher, config.clip_teacher_path),
            ("mae_teacher", config.mae_teacher, config.mae_teacher_path),
        )
    ]
    student = VisionEncoder(fit_decoders(model, *teachers)).to(device)
    return Stage1(student, config, *teachers)


def _load(
    what: str,
    name: str,
    path: str,
    model: VisionConfig,
    config: Stage1Config,
    device: torch.device | str,
) -> Teacher | None:
    if not name:
        return None
    if name not in TEACHERS:
        raise ValueError(f"Stage1Config: {what} must be one of {', '.join(TEACHERS)}, got {name}")
    if not path:
        raise ValueError(f"Stage1Config: {what}_path must be the file of {name}, got nothing")
    # As many patches a frame as the student has; published files are for 224 pixels.
    own = TEACHERS[name][1]
    img_size = model.img_size // model.patch_size * own.patch_size
    with torch.device("meta"):
        teacher = build_teacher(name, img_size=img_size).to(getattr(torch, config.teacher_dtype))
    teacher.load(path, num_frames=1 if own.num_frames == 1 else None)
    return teacher.to(device).freeze()


def _layers_loss(
    predictions: list[Tensor],  # [B, M, D] by layer
    decoders: nn.ModuleList,
    teacher: TeacherOutput,
    ids_keep: Tensor,  # [B, N_keep]
) -> Tensor:
    """Mean over the layers; each pairs with the teacher's layer of the same place."""
    rows = teacher.rows(ids_keep)
    norms: list[Any] = [decoder.norm for decoder in decoders]
    losses = [
        distill_loss(x, target, norm.weight, norm.bias, ids=rows, eps=norm.eps)
        for x, target, norm in zip(predictions, teacher.tokens, norms, strict=True)
    ]
    return torch.stack(losses).mean()
