"""`python -m bench.steps`: whole steps, our kernels against eager PyTorch and its torch.compile.

Steps of stage 3 are also run with stored logits in place of ``linear_cross_entropy``, all else
being ours; ``stage3-loss-*`` are that loss alone, forward and backward, at sizes of real models.

GFLOP are counted on the reference by ``torch.utils.flop_counter`` (two for each multiply and add of
GEMMs, convolutions and attention, forward and backward). The floor is their time at the best GEMM
rate that is measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import iv2kernels
from bench.measure import best, peak_memory, peaks
from iv2 import speed
from iv2.models.vision import VISION, VisionEncoder
from iv2kernels.timing import interleaved, median_ratio

GOALS = {
    "float32": {"x_eager": 2.5, "floor_percent": 75},
    "bfloat16": {"x_eager": 1.6, "x_compile": 1.3, "floor_percent": 75},
}
STEPS = (
    *("encoder-s", "stage1-s", "stage1-1b-slice"),
    *("stage3-tiny", "stage3-loss-smollm2", "stage3-loss-mistral", "stage3-loss-mistral-lora"),
)


@dataclass
class Options:
    """Time whole steps with our kernels and with eager PyTorch."""

    # encoder-s: forward of S at 2049 tokens; stage1-s: student step of S at 417 tokens, batch 4,
    # both decoders, optimizer; stage1-1b-slice: the same of two layers of 1B, batch 2; stage3-tiny:
    # 32 conversations on clips with sound, optimizer (needs the extra stage3, as those below);
    # stage3-loss-smollm2: 1024 tokens of answers, vocabulary 49,152 of width 576, head frozen;
    # stage3-loss-mistral: 512 tokens, 32,000 of 4096, head frozen, and -lora: with LoRA on it.
    steps: tyro.conf.Positional[tuple[str, ...]] = STEPS
    # float32, bfloat16
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # Rounds of each candidate.
    rounds: int = 5
    # Time torch.compile of the eager model too.
    compile: bool = False
    # Write everything as JSON.
    json: Path | None = None


def build(name: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A step by name.

    Raises:
        ValueError: There is no such step.
    """
    if name == "encoder-s":
        torch.manual_seed(0)
        encoder = VisionEncoder(VISION["s"]).to(dtype).eval()
        video = torch.randn(1, 3, 8, 224, 224).to(dtype)

        def forward() -> Any:
            with torch.no_grad():
                return encoder.features(video)

        return forward
    if name == "stage1-s":
        return speed.Step("s", 4, dtype)
    if name == "stage1-1b-slice":
        return speed.Step("1b", 2, dtype, depth=2)
    if name in STEPS:
        from bench import stage3  # transformers and peft are of an extra

        if name == "stage3-tiny":
            return stage3.Step(dtype)
        return stage3.Loss(stage3.HEADS[name.removeprefix("stage3-")], dtype)
    raise ValueError(f"bench.steps: step must be one of {', '.join(STEPS)}, got {name}")


def referenced(step: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with iv2kernels.use("reference"):
            return step()

    return call


def measure(name: str, dtype: str, options: Options) -> dict[str, Any]:
    """One row: seconds of each, ratios, share of the floor, memory."""
    step = build(name, getattr(torch, dtype))
    eager = referenced(step)
    with FlopCounterMode(display=False) as counter:
        eager()
    flops = counter.get_total_flops()
    candidates = {"ours": step, "eager": eager}
    if hasattr(step, "logits"):
        candidates["logits"] = step.logits
    if options.compile:
        candidates["compile"] = torch.compile(eager)
    before = peaks()
    times = interleaved(candidates, 0, options.rounds)
    peak = best(before, peaks())
    row: dict[str, Any] = {"step": name, "dtype": dtype, "gflop": flops / 1e9, "peaks": peak}
    for other, seconds in times.items():
        row[f"{other}_s"] = statistics.median(seconds)
        row[f"{other}_mb"] = peak_memory(candidates[other])
        if other != "ours":
            row[f"x_{other}"] = median_ratio(seconds, times["ours"])
    row["floor_percent"] = 100 * flops / peak[dtype] / 1e9 / row["ours_s"]
    row["goals"] = [
        {"column": c, "least": least, "value": row[c], "met": row[c] >= least}
        for c, least in (GOALS[dtype] if name == "stage1-s" else {}).items()
        if c in row
    ]
    if name == "stage1-s":
        share = row["ours_mb"] / row["eager_mb"]
        row["goals"].append({"column": "memory", "most": 0.6, "value": share, "met": share <= 0.6})
    return row


def show(row: dict[str, Any]) -> str:
    parts = [f"{row['step']} {row['dtype']}: {row['gflop']:.0f} GFLOP"]
    parts += [
        f"{other} {row[f'{other}_s']:.3f} s {row[f'{other}_mb']:.0f} MB"
        for other in ("ours", "eager", "logits", "compile")
        if f"{other}_s" in row
    ]
    others = ("eager", "logits", "compile")
    parts += [f"x {o} {row[f'x_{o}']:.2f}" for o in others if f"x_{o}" in row]
    parts.append(
        f"{row['floor_percent']:.0f} % of the floor at {row['peaks'][row['dtype']]:.0f} GFLOP/s"
    )
    parts += [f"{g['column']} {'met' if g['met'] else 'MISSED'}" for g in row["goals"]]
    return "; ".join(parts)


def main(options: Options) -> None:
    print(f"{torch.get_num_threads()} threads")
    rows = []
    for name in options.steps:
        for dtype in options.dtypes:
            rows.append(measure(name, dtype, options))
            print(show(rows[-1]), flush=True)
    if options.json:
        content = {"peaks": best(*(row["peaks"] for row in rows)), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m bench.steps"))
    except ValueError as error:
        sys.exit(str(error))
