"""Position tables: their initial values, and how they follow another length or resolution.

A table is [1, (1+)T*h*w, C], time-major, then row, then column; the CLS row, when there is one, is
the first. A grid is (T, h, w), counted in tubelets and patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]


def sincos(dim: int, positions: Tensor) -> Tensor:
    """One-dimensional code: all sines, then all cosines.

    Args:
        dim: Even width of the code.
        positions: [P], in steps of one.

    Returns:
        [P, dim] float64.
    """
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_space(dim: int, height: int, width: int) -> Tensor:
    """Two-dimensional code [height*width, dim]: the column in the first half, then the row."""
    rows = sincos(dim // 2, torch.arange(height)).repeat_interleave(width, dim=0)
    columns = sincos(dim // 2, torch.arange(width)).repeat(height, 1)
    return torch.cat([columns, rows], dim=1)


def sincos_space_time(dim: int, grid: Grid) -> Tensor:
    """Joint code [T*h*w, dim]: time in the first quarter of the channels, space in the rest."""
    frames, height, width = grid
    time = sincos(dim // 4, torch.arange(frames)).repeat_interleave(height * width, dim=0)
    space = sincos_space(dim - dim // 4, height, width).repeat(frames, 1)
    return torch.cat([time, space], dim=1)


def sinusoid(dim: int, num_tokens: int) -> Tensor:
    """VideoMAE's fixed table [num_tokens, dim]: sine and cosine interleaved along the channels."""
    exponent = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor") * (2 / dim)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] / 10000.0**exponent
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())


def resize_time(table: Tensor, frames: int) -> Tensor:
    """Linear interpolation [T, P, C] -> [frames, P, C]."""
    if table.shape[0] == frames:
        return table
    resized = F.interpolate(
        table.permute(1, 2, 0).float(), size=frames, mode="linear", align_corners=False
    )
    return resized.permute(2, 0, 1).to(table.dtype)


def resize_space(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic interpolation [T, h*w, C] -> [T, h'*w', C], frame by frame."""
    if old == new:
        return table
    frames, _, dim = table.shape
    planes = table.reshape(frames, *old, dim).permute(0, 3, 1, 2).float()
    resized = F.interpolate(planes, size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(frames, new[0] * new[1], dim).to(table.dtype)


def resize_table(
    table: Tensor,  # [1, (1+)T*h*w, C]
    old: Grid,
    new: Grid,
    *,
    cls_row: bool = True,
) -> Tensor:
    """Interpolate a joint table to another grid: time first, then space; the CLS row is kept.

    Returns:
        [1, (1+)T'*h'*w', C] in the dtype of the table; the table itself when the grids agree.
    """
    if old == new:
        return table
    first = int(cls_row)
    if table.shape[1] != first + math.prod(old):
        raise ValueError(
            f"resize_table: table must have {first + math.prod(old)} rows for the grid {old}, "
            f"got {table.shape[1]}"
        )
    body = table[0, first:].reshape(old[0], old[1] * old[2], -1)
    body = resize_space(resize_time(body, new[0]), old[1:], new[1:])
    return torch.cat([table[:, :first], body.reshape(1, -1, table.shape[2])], dim=1)


def guess_grid(num_rows: int, like: Grid) -> Grid | None:
    """The grid of a table with num_rows patch rows, when it can be told without asking.

    Published tables have 16x16 patches in 1, 4, 8 or 16 frames. Any other table must fit exactly
    one of: the model's frame count, or its patches per frame. None: the caller must say.
    """
    frames, height, width = like
    if num_rows == math.prod(like):
        return like
    if num_rows in (256, 1024, 2048, 4096) and height * width >= 256:
        return (num_rows // 256, 16, 16)
    same_frames = square_grid(num_rows, frames)
    whole, rest = divmod(num_rows, height * width)
    same_space = (whole, height, width) if rest == 0 else None
    return None if same_frames and same_space else same_frames or same_space


def square_grid(num_rows: int, frames: int) -> Grid | None:
    """The grid of num_rows patch rows in the given number of frames, if each is a square."""
    side = math.isqrt(num_rows // frames)
    return (frames, side, side) if side and frames * side * side == num_rows else None
