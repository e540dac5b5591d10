"""`iv2 <command>`: every command and its flags. Work is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro


def info(json: bool = False) -> None:
    """Show versions, instruction sets, decoders, and which implementation each op would use.

    Args:
        json: Print JSON instead of text.
    """
    from iv2 import info as page

    print(page.as_json() if json else page.as_text())


def toyworld(
    out: Path, num: int = 1000, seed: int = 0, size: int = 64, num_frames: int = 16
) -> None:
    """Write short videos of moving shapes, with sounds and captions, and their list.

    Args:
        out: Folder to write; an existing, equal world is kept.
        num: How many clips.
        seed: The same seed gives the same clips; take another one for held-out clips.
        size: Side of the frames in pixels.
        num_frames: Frames in a clip.
    """
    import torch

    from iv2.data.synthetic import write_toyworld

    print(
        write_toyworld(
            out, num, seed, size=size, num_frames=num_frames, workers=torch.get_num_threads()
        )
    )


def convert(source: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path]) -> None:
    """Rewrite a published checkpoint (.pth, .pt, .bin) as .safetensors.

    Args:
        source: The file to read; pickled code in it is refused.
        target: The .safetensors file to write.
    """
    from iv2.checkpoint import convert as run

    run(source, target)
    print(target)


def demo(out: Path = Path("runs/demo")) -> None:
    """Train on the toy world and on real clips within ten minutes; writes OUT/index.html.

    Args:
        out: Run folder; a second run continues where the first stopped.
    """
    from iv2.demo import DEMO, run

    print(run(DEMO, out))


def learn(stage: int = 1, out: Path | None = None) -> None:
    """The demo with the budget to reach its goals: stage 1 in at most 60 minutes on 2 cores.

    Args:
        stage: Which stage (1).
        out: Run folder, runs/learn-stage<N> by default; a killed run continues.
    """
    from iv2.demo import LEARN, run

    if stage not in LEARN:
        raise ValueError(f"learn: stage must be one of {', '.join(map(str, LEARN))}, got {stage}")
    print(run(LEARN[stage], out or Path(f"runs/learn-stage{stage}")))


def _train(argv: Sequence[str]) -> None:
    from iv2.config import TrainConfig
    from iv2.recipes import RECIPES
    from iv2.train import run

    choices = {name: (f"{name}", config) for name, config in RECIPES.items()}
    if argv and not argv[0].startswith("-") and argv[0] not in RECIPES:
        raise ValueError(f"train: recipe must be one of {', '.join(RECIPES)}, got {argv[0]}")
    config: TrainConfig = tyro.extras.overridable_config_cli(choices, args=argv, prog="iv2 train")
    run(config)


COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "info": ("versions, instruction sets, decoders, the choice per op", info),
    "toyworld": ("write videos of moving shapes with sounds and captions", toyworld),
    "train": ("train a recipe: iv2 train stage1-tiny --data.path FOLDER", _train),
    "convert": ("rewrite a published checkpoint as safetensors", convert),
    "demo": ("stage 1 on toy and real video in ten minutes, one HTML page", demo),
    "learn": ("the demo with the budget to reach its goals", learn),
}


def _usage() -> str:
    rows = "\n".join(f"  {name:10s} {text}" for name, (text, _) in COMMANDS.items())
    return (
        f"usage: iv2 COMMAND [OPTIONS]\n\ncommands:\n{rows}\n\n`iv2 COMMAND --help` explains each."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; errors end with one line and status 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"iv2: command must be one of {', '.join(COMMANDS)}, got {name}")
    command = COMMANDS[name][1]
    try:
        if name == "train":
            _train(rest)
        else:
            tyro.cli(command, args=rest, prog=f"iv2 {name}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"iv2 {name}: {error}")
