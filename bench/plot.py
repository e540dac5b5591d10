"""Charts of the bench's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """x_eager.png and peak.png: a bar for each case and instruction set of our kernels."""
    from matplotlib.figure import Figure

    ours = [r for r in rows if r["candidate"].startswith("native") and "wrong" not in r]
    labels = [f"{r['op']} {r['shape']} {r['dtype']}" for r in ours]
    for name, column, title, line in (
        ("x_eager", "x_eager_both", "times faster than eager, forward and backward", 1),
        ("peak", "peak_percent", "percent of what this machine reaches, forward", 100),
    ):
        figure = Figure(figsize=(9, 1 + 0.22 * max(1, len(ours))))
        axes = figure.subplots()
        axes.barh(labels, [r[column] for r in ours], color="#3b6ea5")
        least = {g["column"]: g["least"] for r in ours for g in r["goals"]}
        for i, row in enumerate(ours):
            for goal in row["goals"]:
                if goal["column"] == column:
                    axes.plot([goal["least"]] * 2, [i - 0.4, i + 0.4], color="#a3261b")
        axes.axvline(line, color="#888", linewidth=0.8)
        axes.set_title(title + (" (red: goal)" if column in least else ""))
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
