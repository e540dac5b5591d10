"""From decoded pictures to frames: RGB, at a size, turned and mirrored as they are to be shown."""

import struct
from typing import Any

import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

# Side(s) of decoded frames: (height, width), or the short side, which never enlarges.
Size = tuple[int, int] | int | None
# Signs (a, b, c, d): a coded point (x, y) is shown at (a x + c y, b x + d y).
Matrix = tuple[int, int, int, int]


def by_short_side(height: int, width: int, most: int) -> tuple[int, int]:
    """Height and width where the shorter of the two is reduced to `most`, never enlarged."""
    scale = min(1.0, most / min(height, width))
    return round(height * scale), round(width * scale)


def pixels(
    frame: Any, size: Size, first: Any, converter: VideoReformatter
) -> NDArray[np.uint8]:  # [H, W, 3]
    """RGB pixels the right way up; all frames of a file take the size of the first."""
    matrix = display_matrix(first)
    height, width = first.height, first.width
    if isinstance(size, int):
        height, width = by_short_side(height, width, size)
    elif size is not None:
        height, width = size if matrix[0] or matrix[3] else size[::-1]
    resized = (height, width) != (frame.height, frame.width)
    rgb = converter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation="AREA" if resized else "BILINEAR",
        threads=1,
    )
    return upright(rgb.to_ndarray(), matrix)


# Display matrices of 0, 90, 180 and 270 degrees counter-clockwise.
_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))


def display_matrix(frame: Any) -> Matrix:
    """How a picture is turned and mirrored for display."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV does not know the EXIF data of a photo; without the matrix, mirroring is not seen.
        return _TURNS[round(frame.rotation / 90) % 4]
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (1 if a >= 0 else -1), 0, 0, (1 if d >= 0 else -1)
    return 0, (1 if b >= 0 else -1), (1 if c >= 0 else -1), 0


def upright(picture: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
    """Turn and mirror coded pictures [..., H, W, 3] into the displayed ones."""
    a, b, c, d = matrix
    if not a:
        picture, a, d = picture.swapaxes(-3, -2), c, b
    return picture[..., ::d, ::a, :]


def resize(
    frames: Tensor,  # uint8 [T, H, W, 3]
    size: Size,
) -> Tensor:  # [T, h, w, 3]
    """What `pixels` does with a size, for frames as displayed."""
    height, width = frames.shape[1:3]
    if isinstance(size, int):
        size = by_short_side(height, width, size)
    if size is None or tuple(size) == (height, width):
        return frames
    converter = VideoReformatter()
    rows = [
        converter.reformat(
            VideoFrame.from_ndarray(row, format="rgb24"),
            width=size[1],
            height=size[0],
            format="rgb24",
            interpolation="AREA",
            threads=1,
        ).to_ndarray()
        for row in frames.contiguous().numpy()
    ]
    return torch.from_numpy(np.stack(rows))
