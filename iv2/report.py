"""One self-contained HTML page: plots and tables of a run, no file beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .met { color: #176d2c; } .missed { color: #a3261b; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .85rem; }
"""


@dataclass
class Page:
    """Parts of the page, in order."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Numbers are right-aligned; True and False read as met and missed."""
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def figure(self, figure: Any, alt: str) -> None:
        """A matplotlib figure, as a PNG inside the page."""
        buffer = io.BytesIO()
        save_figure(figure, buffer, format="png", dpi=110, bbox_inches="tight")
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self, path: Path) -> None:
        title = html.escape(self.title)
        path.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(self.parts)}</html>\n",
            encoding="utf-8",
        )


def save_figure(figure: Any, to: Any, **options: Any) -> None:
    """Write a matplotlib figure to a file, and let go of it: pyplot keeps what is not closed."""
    from matplotlib import pyplot

    figure.savefig(to, **options)
    pyplot.close(figure)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return f'<td class="{"met" if value else "missed"}">{"met" if value else "missed"}</td>'
    if isinstance(value, int | float):
        text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
        return f'<td class="number">{text}</td>'
    return f"<td>{html.escape('-' if value is None else str(value))}</td>"


def _subplots(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, squeeze=False, **options)


def plot_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Losses by name over the steps, one panel per run."""
    figure, axes = _subplots(1, len(logs), figsize=(4.2 * len(logs), 3.2))
    for axis, (title, rows) in zip(axes[0], logs.items(), strict=True):
        steps = [row["step"] for row in rows]
        for name in rows[0]["losses"] if rows else ():
            values = np.array([row["losses"][name] for row in rows])
            width = max(1, len(values) // 50)  # running mean
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], smooth, label=name)
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.legend(fontsize=8)
    return figure


def plot_masks(
    frames: NDArray[np.uint8],  # [T, H, W, 3]
    attention: NDArray[np.float32],  # [T, h, w]
    visible: NDArray[np.bool_],  # [T, h, w]
) -> Any:
    """Frames, the teacher's pooling map, and what the student sees."""
    num_frames, height, width, _ = frames.shape
    figure, axes = _subplots(3, num_frames, figsize=(1.3 * num_frames, 4.2))
    patch = (height // visible.shape[1], width // visible.shape[2])
    for t in range(num_frames):
        seen = visible[t].repeat(patch[0], 0).repeat(patch[1], 1)[..., None]
        axes[0, t].imshow(frames[t])
        axes[1, t].imshow(attention[t], cmap="magma", vmin=0, vmax=float(attention.max()))
        axes[2, t].imshow(np.where(seen, frames[t], 235).astype(np.uint8))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for row, label in enumerate(("frame", "teacher's attention", "visible")):
        axes[row, 0].set_ylabel(label, fontsize=8)
    return figure


def plot_features(
    frames: NDArray[np.uint8],  # [T, H, W, 3]
    tokens: NDArray[np.float32],  # [T, h, w, C]
) -> Any:
    """Frames, and the first three principal components of the tokens as red, green and blue."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].T
    low, high = np.percentile(parts, [2, 98], axis=0)
    colours = np.clip((parts - low) / np.maximum(high - low, 1e-6), 0, 1)
    colours = colours.reshape(*tokens.shape[:3], 3)
    figure, axes = _subplots(2, len(frames), figsize=(1.3 * len(frames), 2.8))
    for t in range(len(frames)):
        axes[0, t].imshow(frames[t])
        axes[1, t].imshow(colours[t])
    for axis in axes.flat:
        axis.axis("off")
    return figure


def plot_frames(title: str, rows: Sequence[tuple[str, NDArray[np.uint8]]]) -> Any:
    """Frames [T, H, W, 3] of several videos, a row and a heading each."""
    columns = max(len(frames) for _, frames in rows)
    figure, axes = _subplots(len(rows), columns, figsize=(2 * columns, 1.9 * len(rows) + 0.5))
    figure.suptitle(title)
    for line, (heading, frames) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, frame in zip(line, frames, strict=False):
            axis.imshow(frame)
        line[0].set_title(heading, fontsize=8, loc="left")
    return figure


def plot_bars(groups: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]) -> Any:
    """Accuracies: one cluster per attribute, one bar per encoder, chance as a line."""
    figure, axes = _subplots(1, 1, figsize=(8, 3.4))
    axis = axes[0, 0]
    attributes = list(chance)
    width = 0.8 / max(1, len(groups))
    for i, (name, scores) in enumerate(groups.items()):
        places = np.arange(len(attributes)) + i * width
        axis.bar(places, [scores.get(a, 0.0) for a in attributes], width, label=name)
    for j, attribute in enumerate(attributes):
        axis.hlines(chance[attribute], j - width / 2, j + 0.8 - width / 2, "k", "dotted")
    axis.set_xticks(np.arange(len(attributes)) + 0.4 - width / 2, attributes)
    axis.set(ylim=(0, 1), ylabel="accuracy")
    axis.legend(fontsize=8, ncols=2)
    return figure
