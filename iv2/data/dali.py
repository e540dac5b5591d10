"""Videos as batches of clips by DALI: decoded, cut, resized, flipped and normalised on a GPU.

A plain function on a batch of files in memory, in DALI's dynamic mode: the loader that calls it
(`ClipConfig.decoder` dali) keeps the whole state, since DALI cannot save that of its decoder. Frame
numbers and views are drawn outside, so that a sample stays a function of (seed, sample number)::

    with Video(data, name) as video:
        low, high = video.frame_range(None, None)
        indices = tsn_indices(high - low, 8, rng)
        info = video.info()
        view = draw_view(config, info.height, info.width, rng)
        clips.append(clip(video, indices, view, device_id=0))
    video = load(clips, device_id=0)  # [B, 3, T, h, w] on the GPU

`device_id=None` runs the same operators on the CPU, where DALI decodes VP8, VP9 and MJPEG alone,
from the start of the file. Frames of other codecs go into `augment`.

A decoder is given a file only after `clip` has read its index and codec and decoded a frame: DALI
says nothing of frames that a truncated file lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iv2.data.decode import DecodeError, Video
from iv2.data.transforms import View
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD

_CPU_CODECS = ("vp8", "vp9", "mjpeg")
_GPU_CODECS = (*_CPU_CODECS, "h264", "hevc", "av1", "mpeg4")
# What a GPU's decoder knows: brightness whole, colour halved both ways.
_GPU_FORMATS = ("yuv420p", "yuvj420p", "yuv420p10le")


@dataclass(frozen=True)
class Clip:
    """What is shown of a file that DALI can decode; made by `clip`."""

    data: bytes
    indices: tuple[int, ...]
    view: View
    name: str  # in messages


def dynamic_mode() -> Any:
    """DALI's module of functions.

    Raises:
        RuntimeError: DALI is not installed.
    """
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f'decode: backend dali must be installed, with pip install "iv2[dali]", got {error}'
        ) from error
    return ndd


def gpu_of(device: torch.device) -> int | None:
    """The number of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def clip(video: Video, indices: Sequence[int], view: View, *, device_id: int | None = None) -> Clip:
    """Check a file and say what is shown of it.

    Args:
        video: The open file.
        indices: Frame numbers, in any order.
        view: Of the frames as displayed.
        device_id: The GPU that will decode it; None: the CPU.

    Raises:
        DecodeError: DALI cannot decode it there, or would show it turned.
        ValueError: A frame number is out of range.
    """
    _check(video, device_id, turned=False)
    outside = [i for i in indices if not 0 <= i < video.num_frames]
    if outside or not len(indices):
        raise ValueError(
            f"clip: indices must be in [0, {video.num_frames}) for {video.path}, "
            f"got {outside[0] if outside else 'none'}"
        )
    return Clip(video.source_bytes(), tuple(int(i) for i in indices), view, video.path)


def load(clips: Sequence[Clip], *, device_id: int | None = None) -> Tensor:  # [B, 3, T, h, w]
    """Decode a batch and show each clip's view.

    Args:
        clips: With equally many frames, and views of one size and interpolation.
        device_id: The GPU that does all of it; None: the CPU.

    Returns:
        float32, normalised with ImageNet's mean and deviation, there.

    Raises:
        ValueError: Numbers of frames, sizes or interpolations differ.
        DecodeError: One of the files cannot be decoded; it is named.
        RuntimeError: DALI is not installed, or there is no such GPU.
    """
    lengths = sorted({len(c.indices) for c in clips})
    if len(lengths) != 1:
        raise ValueError(f"load: clips must have equally many frames, got {lengths}")
    try:
        frames = _decoded([(c.data, c.indices) for c in clips], device_id)
    except RuntimeError as error:
        for c in clips:  # which one?
            try:
                _decoded([(c.data, c.indices)], device_id)
            except RuntimeError as reason:
                raise DecodeError(c.name, f"DALI: {_last_line(reason)}") from error
        raise
    return _shown(frames, [c.view for c in clips])


def augment(
    frames: Sequence[Tensor],  # uint8 [T, H, W, 3] each
    views: Sequence[View],
    *,
    device_id: int | None = None,
) -> Tensor:  # [B, 3, T, h, w]
    """Show views of frames decoded elsewhere; see `load`.

    Equals `iv2.data.transforms.look` but for the outermost pixels of a reduced box, where DALI's
    filter repeats the edge.
    """
    ndd = dynamic_mode()
    batch = ndd.as_batch([each.contiguous().numpy() for each in frames], layout="FHWC")
    return _shown(batch if device_id is None else batch.to_device(_device(device_id)), views)


def read_frames(video: Video, indices: Sequence[int]) -> Tensor:  # uint8 [T, H, W, 3]
    """Frames of one file as coded, in memory; a GPU decodes them where there is one.

    Raises:
        DecodeError: DALI cannot decode it here.
    """
    device_id = torch.cuda.current_device() if torch.cuda.is_available() else None
    _check(video, device_id, turned=True)
    try:
        frames = _decoded([(video.source_bytes(), indices)], device_id).cpu()
    except RuntimeError as error:
        raise DecodeError(video.path, f"DALI: {_last_line(error)}") from error
    return _torch(frames)[0]


def _check(video: Video, device_id: int | None, *, turned: bool) -> None:
    """Refuse what DALI cannot decode, or decodes into something else."""
    coding = video.coding
    known = _CPU_CODECS if device_id is None else _GPU_CODECS
    place = "CPU" if device_id is None else "GPU"
    reason = ""
    if coding.codec not in known:
        reason = f"codec must be one of {', '.join(known)} on a {place}, got {coding.codec}"
    elif device_id is not None and coding.pixel_format not in _GPU_FORMATS:
        reason = f"pixels must be one of {', '.join(_GPU_FORMATS)}, got {coding.pixel_format}"
    elif not coding.stamped:
        reason = "frames must have timestamps, got none"
    elif coding.hidden:
        reason = f"no frame must be hidden by an edit, got {coding.hidden}"
    elif not turned and coding.matrix != (1, 0, 0, 1):
        reason = "frames must be stored upright, got a turned or mirrored display"
    if reason:
        raise DecodeError(video.path, f"DALI: {reason}")


def _device(device_id: int) -> Any:
    return dynamic_mode().Device("gpu", device_id)


def _decoded(files: Sequence[tuple[bytes, Sequence[int]]], device_id: int | None) -> Any:
    """A batch of frames [T, H, W, 3] of files' bytes and frame numbers."""
    ndd = dynamic_mode()
    encoded = ndd.as_batch([np.frombuffer(data, np.uint8) for data, _ in files])
    numbers = ndd.as_batch([np.asarray(indices, np.int32) for _, indices in files])
    device = "cpu" if device_id is None else _device(device_id)
    # Without a pad mode, frames behind the end come as black ones.
    frames = ndd.decoders.video(encoded, frames=numbers, pad_mode="none", device=device)
    return frames.evaluate()


def _shown(
    frames: Any,  # a batch of uint8 [T, H, W, 3]
    views: Sequence[View],
) -> Tensor:  # [B, 3, T, h, w]
    """Cut, resize, flip and normalise, as `iv2.data.transforms.look` does."""
    ndd = dynamic_mode()
    from nvidia.dali import types

    kinds = {(view.size, view.interpolation) for view in views}
    if len(kinds) != 1:
        raise ValueError(f"load: views must be of one size and interpolation, got {sorted(kinds)}")
    (((height, width), interpolation),) = kinds
    boxes = [view.box for view in views]
    # Cut before the resize, whose filter would look over the edge of the box.
    cut = ndd.slice(
        frames,
        ndd.as_batch([np.array([box.top, box.left], np.int32) for box in boxes]),
        ndd.as_batch([np.array([box.height, box.width], np.int32) for box in boxes]),
        axis_names="HW",
    )
    cubic = interpolation == "bicubic"
    small = ndd.resize(
        cut,
        resize_y=height,
        resize_x=width,
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=True,
        dtype=ndd.float32,
    )
    if cubic:  # which overshoots
        small = ndd.math.clamp(small, 0.0, 255.0)
    shown = ndd.crop_mirror_normalize(
        small,
        mirror=ndd.as_batch([np.int32(view.flip) for view in views]),
        mean=[255 * mean for mean in IMAGENET_MEAN],
        std=[255 * deviation for deviation in IMAGENET_STD],
        output_layout="CFHW",
        dtype=ndd.float32,
    )
    return _torch(shown)


def _torch(batch: Any) -> Tensor:
    """A batch of equal shapes as one tensor, which shares no memory with DALI's."""
    tensor: Tensor = batch.torch(copy=True)
    return tensor


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
