"""Videos of high resolution: tiles in the grid of the nearest aspect ratio, and the whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_grid(height: int, width: int, most: int = 6, side: int = 224) -> tuple[int, int]:
    """Rows and columns of the grid, of at most ``most`` tiles, whose aspect ratio is nearest.

    Of grids of one ratio it is the largest that the frames fill at least half.

    Raises:
        ValueError: most or a length is not positive.
    """
    for name, value in (("height", height), ("width", width), ("most", most), ("side", side)):
        if value < 1:
            raise ValueError(f"tile_grid: {name} must be positive, got {value}")
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    nearest = min(abs(width / height - c / r) for r, c in grids)
    alike = [(r, c) for r, c in grids if abs(width / height - c / r) <= nearest + 1e-9]
    filled = [(r, c) for r, c in alike if height * width >= r * c * side * side / 2]
    return max(filled, key=lambda g: g[0] * g[1]) if filled else min(alike)


def tiles(
    frames: Tensor,  # uint8 [T, H, W, 3]
    most: int = 6,
    side: int = 224,
) -> Tensor:
    """Views uint8 [V, T, side, side, 3]: the tiles row by row, then the whole video.

    Frames are resized to the grid without padding, so that their aspect ratio changes a little. A
    grid of one tile would be the whole video twice: it is one view.

    Args:
        frames: The video.
        most: Most tiles.
        side: Of a tile, in pixels.

    Raises:
        TypeError: frames are not uint8.
        ValueError: frames are not [T, H, W, 3], or most or side is not positive.
    """
    if frames.dtype != torch.uint8:
        raise TypeError(f"tiles: frames must be uint8, got {frames.dtype}")
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"tiles: frames must be [T, H, W, 3], got {list(frames.shape)}")
    rows, columns = tile_grid(frames.shape[1], frames.shape[2], most, side)
    whole = _resize(frames, side, side)[None]
    if rows * columns == 1:
        return whole
    large = _resize(frames, rows * side, columns * side)
    cut = large.view(-1, rows, side, columns, side, 3).permute(1, 3, 0, 2, 4, 5)
    return torch.cat([cut.flatten(0, 1), whole])


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    pixels = frames.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
