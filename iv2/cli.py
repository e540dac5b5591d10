"""`iv2 <command>`: every command and its flags. Work is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from iv2.stages.dual_encoder import DualEncoder


@dataclass(frozen=True)
class ModelFlags:
    """Which model: that of a run, or published weights."""

    # Folder of a stage-2 or CLIP run.
    run: Path | None = None
    # Instead of a run: the recipe whose towers the weights are for.
    recipe: str = ""
    # A file to load, such as a published one.
    weights: Path | None = None
    # Folder with the vocabulary; that of the run by default.
    tokenizer: Path | None = None
    # Of a CLIP model: file of the frozen video encoder; that of the run by default.
    vision: Path | None = None
    # Of a CLIP model: file of the frozen text tower; that of the run by default.
    text: Path | None = None

    def load(self) -> tuple[DualEncoder, Any]:
        """The model, and the configuration of its run."""
        from iv2.stages.dual_encoder import load_dual_encoder

        return load_dual_encoder(
            self.run or "",
            recipe=self.recipe,
            weights=self.weights or "",
            tokenizer=self.tokenizer or "",
            vision=self.vision or "",
            text=self.text or "",
        )


# Its flags without a prefix.
Model = tyro.conf.OmitArgPrefixes[ModelFlags]


def info(json: bool = False) -> None:
    """Show versions, instruction sets, decoders, and which implementation each op would use.

    Args:
        json: Print JSON instead of text.
    """
    from iv2 import info as page

    print(page.as_json() if json else page.as_text())


def toyworld(
    out: tyro.conf.Positional[Path],
    num: int = 1000,
    seed: int = 0,
    size: int = 64,
    num_frames: int = 16,
    scenes: int = 0,
    speech: bool = False,
    questions: bool = False,
) -> None:
    """Write short videos of moving shapes, with sounds and captions, and their list.

    Args:
        out: Folder to write; an existing, equal world is kept.
        num: How many clips.
        seed: The same seed gives the same clips; take another one for held-out clips.
        size: Side of the frames in pixels.
        num_frames: Frames in a clip.
        scenes: How many pictures the clips share, told apart by sound and word; 0: each its own.
        speech: A voice says a word in each clip (pip install iv2[speech]).
        questions: Also clips of two shapes or two events, and conversations about all of them; a
            quarter as many held-out clips with questions on them.
    """
    import torch

    from iv2.data.instructions import write_questions
    from iv2.data.synthetic import write_toyworld

    if questions and scenes:
        raise ValueError(f"toyworld: scenes must be 0 with questions, got {scenes}")
    if questions:
        workers = torch.get_num_threads()
        shape = {"size": size, "num_frames": num_frames}
        print(write_questions(out, num, seed, **shape, speech=speech, workers=workers))
        return
    print(
        write_toyworld(
            out,
            num,
            seed,
            size=size,
            num_frames=num_frames,
            scenes=scenes,
            speech=speech,
            workers=torch.get_num_threads(),
        )
    )


def shard(
    listing: tyro.conf.Positional[Path],
    out: Path,
    proxy: Literal["h264", "vp9", "none"] = "h264",
    size: int = 256,
    gop: int = 16,
    sources_per_shard: int = 500,
    workers: int = 0,
) -> None:
    """Write the videos of a list as WebDataset tars, with small copies that are cheap to read.

    A killed run goes on where it was; a finished one does nothing. Train on OUT. Broken
    videos are in OUT/quarantine.jsonl with the reason, counts and checksums in OUT/manifest.json.
    With other captions of the same videos the tars of videos stay as they are.

    Args:
        listing: A list or a folder of videos, as `iv2 train --data.path` takes.
        out: Folder to write to.
        proxy: Codec of the copies, of each clip from its start to its end (vp9: DALI decodes it
            on CPUs), or none for the files themselves.
        size: Short side of the copies in pixels.
        gop: Frames of a copy from a keyframe to the next.
        sources_per_shard: Videos in a tar.
        workers: Threads that read and encode; 0: one a core.
    """
    import json
    import os

    from iv2.data.proxy import ProxyConfig
    from iv2.data.shards import ShardConfig, write_shards

    small = None if proxy == "none" else ProxyConfig(proxy, size, gop)
    manifest = write_shards(
        listing,
        out,
        ShardConfig(sources_per_shard, small),
        workers=workers or os.cpu_count() or 1,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    about = json.loads(manifest.read_text(encoding="utf-8"))
    print(
        f"{manifest.parent / 'list.jsonl'}: {about['clips']} clips, {about['hours']:.2f} h, "
        f"{about['bytes'] / 1e6:.0f} MB, {about['quarantined']} videos quarantined"
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
    """Train the three stages on the toy world and real clips; writes OUT/index.html.

    Args:
        out: Run folder; a second run continues where the first stopped.
    """
    from iv2.demo import DEMO, run

    print(run(DEMO, out))


def learn(stage: int = 1, out: Path | None = None) -> None:
    """The demo with more steps of one stage: some 60 to 90 minutes on 2 cores.

    Args:
        stage: Which stage (1, 2 or 3); the ones before it are trained for a short time.
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


def retrieval(
    data: Path,
    model: Model,
    media: Literal["vision", "audio", "audio_video"] = "vision",
    caption: Literal["visual", "audio", "speech", "av", "avs"] = "visual",
    wordings: Literal["first", "all", "paragraph"] = "first",
    k: int = 128,
    json: Path | None = None,
) -> None:
    """Zero-shot retrieval on a list: R@1/5/10 both ways by cosine, dual softmax and matching.

    Processes of torchrun share the work: torchrun --nproc-per-node 8 -m -- iv2 eval retrieval …

    Args:
        data: List of clips with captions.
        model: Which model.
        media: What is compared with the captions.
        caption: Their kind.
        wordings: Of clips with several captions: the first, all of them (MSVD, VATEX), or joined to
            a paragraph (DiDeMo, ActivityNet).
        k: How many are re-ranked by the matching head; 0: none.
        json: Write the table as JSON.
    """
    from iv2.distributed import world as join_world
    from iv2.eval import retrieval as page

    loaded = model.load()
    with join_world("cpu") as world:
        table = page.evaluate(*loaded, data, media, caption, wordings=wordings, k=k)
        if not world.is_main:
            return
    print(page.as_text(table))
    if json:
        json.write_text(dumps(table, indent=1) + "\n", encoding="utf-8")


def zero_shot(
    data: Path,
    attribute: str,
    model: Model,
    templates: tuple[str, ...] = ("a {}", "a video of a {}", "we see a {}"),
    media: Literal["vision", "audio", "audio_video"] = "vision",
) -> None:
    """Zero-shot classification of a list: scores are cosines, averaged over sentences.

    Args:
        data: List of clips with attributes.
        attribute: Which of them is the class.
        model: Which model.
        templates: Sentences with {} in the place of the class.
        media: What is classified.
    """
    from iv2.eval.retrieval import evaluate_zero_shot

    loaded = model.load()
    found = evaluate_zero_shot(*loaded, data, attribute, templates, media)
    print(
        f"{attribute}: {found['clips']} clips, {found['classes']} classes, "
        f"top-1 {found['top1']:.1f} %, top-5 {found['top5']:.1f} %"
    )


def qa(
    data: Path,
    format: Literal["toy", "mvbench", "egoschema", "perception-test", "next-qa", "movqa"] = "toy",
    choices: bool = True,
    run: Path | None = None,
    baselines: bool = False,
    replies: tuple[Path, ...] = (),
    ask: Path | None = None,
    json: Path | None = None,
) -> None:
    """Score answers to questions on videos: with choices in MVBench's protocol, or open ones.

    Args:
        data: Folder of the data set, or held-out.jsonl of a toy world.
        format: Of which data set it is.
        choices: Of the toy world: offer choices; --no-choices asks open questions and captions.
        run: Ask the model of a stage-3 run.
        baselines: Ask it without the video, with a grey one, shuffled frames, other videos too.
        replies: Score these files, one column each: lines of {"id", "reply"}.
        ask: Write what is to be put to another model, one question a line.
        json: Write the table as JSON.
    """
    from iv2.eval import qa as page
    from iv2.eval.questions import read_questions

    if not (ask or replies or run):
        raise ValueError("qa: --run, --replies or --ask must be given, got none")
    if ask:
        page.write_asked(ask, read_questions(format, data, choices=choices).questions)
    answers = {path.stem: page.replies_from(path) for path in replies}
    if run:
        from iv2.serve.chat import VideoChat

        model = page.chat_answers(VideoChat.load(run))
        answers |= page.with_baselines(model) if baselines else {"model": model}
    if answers:
        (table,) = page.evaluate_sets({format: data}, answers, choices=choices)
        print(page.as_text(table))
        if json:
            json.write_text(dumps(table, indent=1) + "\n", encoding="utf-8")


EVALUATIONS: dict[str, Callable[..., None]] = {
    "retrieval": retrieval,
    "zero-shot": zero_shot,
    "qa": qa,
}


def _eval(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in EVALUATIONS:
        given = argv[0] if argv else "nothing"
        raise ValueError(f"eval: what must be one of {', '.join(EVALUATIONS)}, got {given}")
    tyro.cli(EVALUATIONS[argv[0]], args=list(argv[1:]), prog=f"iv2 eval {argv[0]}")


def embed(
    source: tyro.conf.Positional[Path],
    out: Path,
    model: Model,
    media: Literal["vision", "audio", "audio_video"] = "vision",
    seconds: float = 10.0,
) -> None:
    """Embed a video, a folder of videos or a list, in segments; writes an index to search.

    Args:
        source: What to embed; videos that cannot be read are listed and left out.
        out: The index (.safetensors).
        model: Which model.
        media: What is embedded.
        seconds: Longest segment.
    """
    from iv2.serve.index import embed as embed_source

    stage, config = model.load()
    index = embed_source(stage, source, config.data.clip, seconds=seconds, media=media)
    index.save(out)
    print(f"{out}: {len(index.segments)} segments, {len(index.skipped)} videos skipped")
    for path, reason in index.skipped.items():
        print(f"  {path}: {reason}")


def search(
    query: tyro.conf.Positional[str],
    index: Path,
    model: Model,
    top: int = 5,
    sheet: Path | None = None,
    json: bool = False,
) -> None:
    """Search an index with a sentence: the best segments with their times, and a picture of them.

    Args:
        query: For example "a red triangle moving left".
        index: Written by `iv2 embed`, with the same model.
        model: Which model.
        top: How many segments.
        sheet: Write a contact sheet (PNG): four frames of each segment.
        json: Print JSON instead of text.
    """
    from iv2.serve.index import Index, contact_sheet
    from iv2.serve.index import search as search_index

    stage, _ = model.load()
    found = search_index(stage, Index.load(index), query, top)
    if json:
        print(dumps(found, indent=1))
    else:
        for row in found:
            print(f"{row['score']:6.3f}  {row['start']:8.2f} - {row['end']:.2f} s  {row['path']}")
    if sheet:
        contact_sheet(query, found, sheet)


def chat(
    video: tyro.conf.Positional[Path],
    run: Path,
    question: str = "",
    lm: Path | None = None,
    seconds: float = 0.0,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
) -> None:
    """Ask about a video: one question, or a dialogue that an empty line ends.

    Args:
        video: The video.
        run: Folder of a stage-3 run.
        question: The question; without one, each line of the terminal is a question.
        lm: Folder of the pretrained language model; that of the run by default.
        seconds: Longest segment; a longer video is seen in several. 0: as one.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 gives the likeliest answer; above, answers are drawn.
    """
    from iv2.serve.chat import VideoChat, dialogue

    loaded = VideoChat.load(run, lm=lm or "")
    loaded.seconds = seconds
    questions = [question] if question else iter(lambda: input("> "), "")
    dialogue(loaded, video, questions, max_new_tokens=max_new_tokens, temperature=temperature)


def caption(
    videos: tyro.conf.Positional[tuple[Path, ...]],
    run: Path,
    question: str = "describe the video",
    lm: Path | None = None,
    seconds: float = 0.0,
    max_new_tokens: int = 128,
    json: bool = False,
) -> None:
    """Describe videos, one line each.

    Args:
        videos: The videos.
        run: Folder of a stage-3 run.
        question: What is asked of each.
        lm: Folder of the pretrained language model; that of the run by default.
        seconds: Longest segment; a longer video is seen in several. 0: as one.
        max_new_tokens: Longest caption, in tokens.
        json: Print a JSON object a line instead of path and caption.
    """
    from iv2.serve.chat import VideoChat

    loaded = VideoChat.load(run, lm=lm or "")
    loaded.seconds = seconds
    for video in videos:
        text = loaded.ask(video, question, max_new_tokens=max_new_tokens)
        print(dumps({"path": str(video), "caption": text}) if json else f"{video}\t{text}")


def _serve(argv: Sequence[str]) -> None:
    from iv2.serve.http import Settings, serve

    serve(tyro.cli(Settings, args=list(argv), prog="iv2 serve"))


COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "info": ("versions, instruction sets, decoders, the choice per op", info),
    "toyworld": ("write videos of moving shapes with sounds and captions", toyworld),
    "shard": ("write the videos of a list as WebDataset tars", shard),
    "train": ("train a recipe: iv2 train stage1-tiny --data.path FOLDER", _train),
    "eval": (
        "evaluate a model on a list: iv2 eval retrieval, iv2 eval zero-shot, iv2 eval qa",
        _eval,
    ),
    "embed": ("embed a folder of videos: iv2 embed FOLDER --run RUN --out INDEX", embed),
    "search": ('find segments: iv2 search "a red bar" --run RUN --index INDEX', search),
    "chat": ("ask about a video: iv2 chat VIDEO --run RUN --question QUESTION", chat),
    "caption": ("describe videos: iv2 caption VIDEO... --run RUN", caption),
    "serve": ("answer OpenAI's clients over HTTP: iv2 serve --run RUN --embed-run RUN", _serve),
    "convert": ("rewrite a published checkpoint as safetensors", convert),
    "demo": ("the three stages on toy and real video in twenty minutes, one HTML page", demo),
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
        if name in ("train", "eval", "serve"):  # these read their arguments themselves
            command(rest)
        else:
            tyro.cli(command, args=rest, prog=f"iv2 {name}")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"iv2 {name}: {error}")
