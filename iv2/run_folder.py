"""The files of a run: config.json, log.jsonl, skipped.jsonl, checkpoints/step_*.pt, the progress.

Small files appear whole or not at all; every error names the file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iv2.data.files import write_text


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of a run with the most steps, None where there is none."""
    return max(checkpoints(run_dir), key=step_of, default=None)


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a run, in no order."""
    folder = Path(run_dir) / "checkpoints"
    return [p for p in folder.glob("step_*.pt") if p.stem.removeprefix("step_").isdecimal()]


def step_of(checkpoint: Path) -> int:
    """Steps done when a checkpoint was written."""
    return int(checkpoint.stem.removeprefix("step_"))


class Log:
    """log.jsonl: one JSON line a step, in the file as soon as it is written.

    Args:
        path: The file. Lines of later steps than ``step``, and a torn last line, are dropped.
        step: The step that the run is at.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            if kept != lines:
                write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_log(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl; a torn last one is left out."""
    text = (Path(run_dir) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Progress:
    """A line on a terminal that is written over; nothing where stderr is no terminal."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self.total, self.enabled = total, enabled and sys.stderr.isatty()
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\n")

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a line of the log."""
        now = time.monotonic()
        if not self.enabled or (now - self._shown < 0.2 and row["step"] < self.total):
            return
        self._shown = now
        left = int((self.total - row["step"]) * row["step_s"])
        waiting = row["data_s"] / max(row["step_s"], 1e-9)
        done = 24 * row["step"] // self.total
        sys.stderr.write(
            f"\r{'#' * done:.<24} {row['step']}/{self.total}  loss {row['loss']:.4f}  "
            f"lr {row['lr']:.2e}  {row['samples_per_s']:.1f} samples/s  data {waiting:.0%}  "
            f"{left // 60}:{left % 60:02d} left \x1b[K"
        )
        sys.stderr.flush()
