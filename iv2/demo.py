"""`iv2 demo` and `iv2 learn`: the stages on the toy world and real clips, on one page.

Each step leaves a file in the run folder and is skipped when it is there: a killed run goes on.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iv2 import demo_stage2, demo_stage3, report, speed
from iv2.checkpoint import load_checkpoint
from iv2.config import TrainConfig
from iv2.data.clips import read_list
from iv2.data.dataset import VideoDataset
from iv2.data.decode import decode
from iv2.data.decode import probe as probe_video
from iv2.data.loader import Batches
from iv2.data.synthetic import write_toyworld
from iv2.demo_stage2 import DEMO2, LEARN2, Budget2
from iv2.demo_stage3 import DEMO3, LEARN3, Budget3
from iv2.demo_steps import once, precision, real_clips, say, sized, train
from iv2.eval.classify import probe
from iv2.eval.features import extract, ordered_batches, without_chance
from iv2.models.vision import VisionEncoder
from iv2.recipes import RECIPES
from iv2.stages.stage1 import build_stage1, every_frame

ATTRIBUTES = ("motion", "colour", "background", "shape")
_HELD_OUT = 512  # clips of another seed, on which the probes are tested
_PROBE_STEPS = 300  # of the attentive probe


@dataclass(frozen=True)
class Budget:
    """How much is trained, and what is compared."""

    clips: int  # toy clips to train on
    image_teacher_steps: int
    video_teacher_steps: int
    stage1_steps: int
    supervised_steps: int  # 0: no supervised encoder
    single_teachers: bool  # students with one teacher only, too
    goals: dict[str, float]  # accuracy, or margin over the random encoder, of the stage-1 student
    goal_is_margin: bool
    probe_clips: int  # that the probes learn from
    speed_rounds: int
    stage2: Budget2 | None = None
    stage3: Budget3 | None = None  # it starts from stage 2

    def __post_init__(self) -> None:
        if self.stage3 is not None and self.stage2 is None:
            raise ValueError("Budget: stage2 must be given for stage3, got none")


DEMO = Budget(
    clips=1200,
    image_teacher_steps=200,
    video_teacher_steps=250,
    stage1_steps=450,
    supervised_steps=0,
    single_teachers=False,
    goals={"motion": 0.15, "background": 0.10},
    goal_is_margin=True,
    probe_clips=600,
    speed_rounds=1,
    stage2=DEMO2,
    stage3=DEMO3,
)
# A short stage 1, and a short stage 2, are what later stages start from.
_BEFORE = replace(
    DEMO,
    clips=2000,
    image_teacher_steps=600,
    video_teacher_steps=600,
    stage1_steps=1200,
    probe_clips=1500,
    stage3=None,
)
LEARN: dict[int, Budget] = {
    1: replace(
        _BEFORE,
        clips=6000,
        image_teacher_steps=1500,
        video_teacher_steps=2500,
        stage1_steps=3500,
        supervised_steps=1500,
        single_teachers=True,
        speed_rounds=3,
        goals={"motion": 0.85, "colour": 0.85, "background": 0.85},
        goal_is_margin=False,
        stage2=None,
    ),
    2: replace(_BEFORE, stage2=LEARN2),
    3: replace(
        _BEFORE,
        stage1_steps=2000,
        stage2=replace(DEMO2, clips=2000, speech_steps=200, steps=320, reranked=64),
        stage3=LEARN3,
    ),
}


def run(budget: Budget, out: Path) -> Path:
    """Do every step that is not done yet; returns the path of the page."""
    began = time.monotonic()
    out = out.resolve()  # paths in lists are relative to the list
    out.mkdir(parents=True, exist_ok=True)
    world, held_out, clips = _data(budget, out)
    image = _teacher("image", budget.image_teacher_steps, out, world)
    video = _teacher("video", budget.video_teacher_steps, out, world)
    students = _students(budget, out, clips)
    if budget.supervised_steps:
        students["supervised"] = _supervised(budget, out, world)
    train([image, video, *students.values()])
    probes = once(
        out / "probes.json",
        lambda: _probe_all(students, world, held_out, budget.probe_clips),
    )
    steps = once(out / "speed.json", lambda: _speed(budget.speed_rounds))
    second = third = None
    if budget.stage2 is not None:
        student = str(out / "stage1" / "model.safetensors")
        second = demo_stage2.run(budget.stage2, out, student)
    if budget.stage3 is not None:
        weights = str(out / "stage2" / "model.safetensors")
        third = demo_stage3.run(budget.stage3, out, weights)
    # Over the calls that came this far; what a killed one had spent is not known.
    path = out / "results.json"
    before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
    results = _results(budget, probes, steps, before + time.monotonic() - began)
    if second is not None:
        results["stage2"] = second
    if third is not None:
        results["stage3"] = third
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = out / "index.html"
    content = _page(results, students, out, held_out, clips)
    if second is not None:
        demo_stage2.page(second, out, content)
    if third is not None:
        demo_stage3.page(third, out, content)
    content.write(page)
    return page.resolve()


def _data(budget: Budget, out: Path) -> tuple[Path, Path, Path]:
    """Lists: toy clips, held-out toy clips of another seed, and toy with real clips."""
    say(f"writing {budget.clips} + {_HELD_OUT} toy clips")
    workers = torch.get_num_threads()
    world = write_toyworld(out / "toyworld", budget.clips, 0, workers=workers)
    held_out = write_toyworld(out / "toyworld-held-out", _HELD_OUT, 1, workers=workers)
    rows: list[dict[str, Any]] = [{"path": sample.path} for sample in read_list(world)]
    # A real clip is read as segments of two seconds, so that all of it is seen.
    for path in real_clips():
        seconds = probe_video(path).duration
        starts = range(0, max(1, int(seconds) - 1), 2)
        rows += [{"path": str(path), "start": s, "end": min(s + 2.0, seconds)} for s in starts]
    mixed = out / "clips.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return world, held_out, mixed


def _teacher(kind: str, steps: int, out: Path, data: Path) -> TrainConfig:
    name = f"teacher-{kind}-tiny"
    return sized(RECIPES[name], out / name, data, steps, _warmup(steps))


def _supervised(budget: Budget, out: Path, data: Path) -> TrainConfig:
    recipe = RECIPES["supervised-tiny"]
    steps = budget.supervised_steps
    return sized(recipe, out / "supervised-tiny", data, steps, _warmup(steps))


def _warmup(steps: int) -> int:
    return min(100, steps // 4)


def _students(budget: Budget, out: Path, data: Path) -> dict[str, TrainConfig]:
    recipe = RECIPES["stage1-tiny"]
    both = replace(
        recipe.stage1,
        teacher_dtype=precision(),
        clip_teacher_path=str(out / "teacher-image-tiny" / "model.safetensors"),
        mae_teacher_path=str(out / "teacher-video-tiny" / "model.safetensors"),
    )
    kinds = {"stage1": both}
    if budget.single_teachers:
        kinds["stage1, image teacher only"] = replace(both, mae_teacher="")
        kinds["stage1, video teacher only"] = replace(both, clip_teacher="", mask="random")
    configs = {}
    for name, stage1 in kinds.items():
        folder = out / name.replace(", ", "-").replace(" ", "-")
        steps = budget.stage1_steps
        configs[name] = sized(replace(recipe, stage1=stage1), folder, data, steps, _warmup(steps))
    return configs


def _encoder(name: str, students: dict[str, TrainConfig]) -> VisionEncoder:
    """A trained encoder without its heads and decoders, or the random one."""
    torch.manual_seed(0)
    model = RECIPES["stage1-tiny"].model
    encoder = VisionEncoder(replace(model, clip_return_layer=0, mae_return_layer=0))
    if name != "random":
        load_checkpoint(encoder, Path(students[name].run_dir) / "model.safetensors")
    return encoder.eval()


def _probe_all(
    students: dict[str, TrainConfig], world: Path, held_out: Path, clips: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by encoder, probe and attribute."""
    train, test = read_list(world)[:clips], read_list(held_out)
    clip = RECIPES["supervised-tiny"].data.clip
    # Decoded once; each encoder sees the same.
    learning, judging = (list(ordered_batches(s, clip, 64)) for s in (train, test))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("random", *students):
        say(f"probing {name}")
        encoder = _encoder(name, students)
        learn, judge = (extract(encoder, b, keep_tokens=True) for b in (learning, judging))
        table[name] = {
            kind: {
                attribute: result.accuracy
                for attribute, result in probe(
                    learn, judge, ATTRIBUTES, kind=kind, steps=_PROBE_STEPS
                ).items()
            }
            for kind in ("linear", "attentive")
        }
    return table


def _speed(rounds: int) -> dict[str, dict[str, float]]:
    rows = {}
    # Without bfloat16 in hardware PyTorch's step takes minutes.
    halves = (torch.bfloat16,) if precision() == "bfloat16" else ()
    for dtype in (torch.float32, *halves):
        name = str(dtype).removeprefix("torch.")
        say(f"timing the stage-1 step of S/14, 417 tokens, batch 4, {name}")
        rows[name] = speed.compare(speed.Step("s", 4, dtype), rounds)
    return rows


def _results(
    budget: Budget, probes: dict[str, Any], steps: dict[str, Any], seconds: float
) -> dict[str, Any]:
    goals = []
    for attribute, goal in budget.goals.items():
        best = {
            name: max(probes[name][kind][attribute] for kind in probes[name])
            for name in ("random", "stage1")
        }
        value = best["stage1"] - best["random"] if budget.goal_is_margin else best["stage1"]
        what = "above the random encoder" if budget.goal_is_margin else "accuracy"
        goals.append(
            {
                "attribute": attribute,
                "what": what,
                "goal": goal,
                "value": value,
                "met": value >= goal,
            }
        )
    return {
        "probe": {"accuracy": probes, "goals": goals, "met": all(row["met"] for row in goals)},
        "speed": {
            dtype: {**row, "goal": 1.2, "value": row["ratio"], "met": row["ratio"] >= 1.2}
            for dtype, row in steps.items()
        },
        "budget": asdict(budget),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "precision": precision(),
            "torch": torch.__version__,
        },
        "command": " ".join(["iv2", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
    }


def _page(
    results: dict[str, Any],
    students: dict[str, TrainConfig],
    out: Path,
    held_out: Path,
    clips: Path,
) -> report.Page:
    stages = "1 and 2" if results["budget"]["stage3"] is None else "1, 2 and 3"
    page = report.Page(f"iv2: stages {stages} on toy and real video")
    machine = results["machine"]
    page.text(
        f"{results['command']}: {results['seconds']:.0f} s (without calls that were cut short), "
        f"{machine['threads']} threads, torch {machine['torch']}."
    )
    page.heading("What the frozen encoder knows: probes on held-out clips of another seed")
    probes = results["probe"]["accuracy"]
    kinds = [(name, kind) for name in probes for kind in probes[name]]
    page.table(
        ("encoder", "probe", *ATTRIBUTES),
        [(name, kind, *(probes[name][kind][a] for a in ATTRIBUTES)) for name, kind in kinds],
    )
    chance = {"motion": 1 / 8, "colour": 1 / 6, "background": 1 / 4, "shape": 1 / 4}
    bars = {name: probes[name]["attentive"] for name in probes}
    page.figure(report.plot_bars(bars, chance), "probe accuracy by encoder and attribute")
    page.text("Bars: attentive probe; dotted lines: chance.")
    page.table(
        ("goal", "", "wanted", "got", ""),
        [
            (g["attribute"], g["what"], g["goal"], g["value"], g["met"])
            for g in results["probe"]["goals"]
        ],
    )
    page.heading("Losses")
    folders = {n: out / n for n in ("teacher-image-tiny", "teacher-video-tiny", "stage1")}
    page.figure(report.plot_losses({n: _log(f) for n, f in folders.items()}), "losses")
    page.heading("A masked clip: what the student sees")
    _mask_picture(page, students["stage1"], held_out)
    page.heading("Features of a real clip")
    _feature_picture(page, students)
    page.heading("Speed of the same step, our kernels against plain PyTorch")
    page.text("Stage-1 student S/14: 417 tokens, batch 4, both decoders, backward, optimizer.")
    page.table(
        ("dtype", "kernels, s", "PyTorch, s", "times faster", "wanted", ""),
        [
            (d, r["native_s"], r["reference_s"], r["value"], r["goal"], r["met"])
            for d, r in results["speed"].items()
        ],
    )
    skipped = [line for f in out.glob("*/skipped.jsonl") for line in f.read_text().splitlines()]
    page.heading("Skipped clips")
    page.text(f"{len(skipped)} of {len(read_list(clips))}")
    if skipped:
        page.code("\n".join(skipped[:20]))
    return page


def _log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _mask_picture(page: report.Page, config: TrainConfig, held_out: Path) -> None:
    stage = build_stage1(config.model, config.stage1)
    clip = replace(without_chance(config.data.clip), normalise=False)
    batch = next(Batches(VideoDataset(read_list(held_out)[:4], clip), 4, shuffle=False))
    seen = every_frame(batch["video"], stage.stride)
    first, _ = stage.targets(batch["video"])
    assert first is not None
    assert first.attention is not None
    ids = stage.masks(seen, batch["seeds"], first)
    frames, height, width = stage.student.grid_of(seen)
    visible = torch.zeros(frames * height * width, dtype=torch.bool)
    visible[ids[0].long()] = True
    grid = (frames, height, width)
    page.figure(
        report.plot_masks(
            stage.images(seen)[0].numpy(),
            first.attention[0].float().view(grid).numpy(),
            visible.view(grid).numpy(),
        ),
        "frames, the teacher's attention, and the visible patches",
    )
    page.text(f"{ids.shape[1]} of {visible.numel()} patches are visible.")


def _feature_picture(page: report.Page, students: dict[str, TrainConfig]) -> None:
    path = next(p for p in real_clips() if "bikes" in p.name)
    info = probe_video(path)
    encoder = _encoder("stage1", students)
    per_token = encoder.config.tubelet_size
    indices = torch.linspace(0, info.num_frames - 1, 8 * per_token).long().tolist()
    frames = decode(path, indices, size=(112, 112))
    with torch.no_grad():
        found = encoder.features(frames[None], layers=[-1])
    tokens = next(iter(found.tokens.values()))[0, 1:].float().view(*found.grid, -1)
    page.figure(
        report.plot_features(frames[::per_token].numpy(), tokens.numpy()),
        "a real clip and its features",
    )
    page.text(
        f"{path.name}: the three main directions of the last layer's tokens, as colours, from the "
        "trained student at twice its training resolution."
    )
