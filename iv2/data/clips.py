"""Which clips there are, and which frames of a clip are taken.

The sampling rules work on frame numbers 0 … n-1 of a clip and leave out the slips of the released
InternVideo2 code: its stage 1 subtracts one from numbers that already start at 0, so that -1 reads
the last frame, and its stage 2 never draws the last frame of an interval.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iv2.data.files import is_far
from iv2.data.joined import is_sharded, rows_of_shards

VIDEO_SUFFIXES = frozenset(
    (
        ".avi",
        ".flv",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    )
)
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
AUDIO_SUFFIXES = frozenset((".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".wma"))

MEDIA_KINDS = ("image", "video", "audio", "audio_video")
# Of the rows of a list: a row of text has messages and no media.
KINDS = (*MEDIA_KINDS, "text")
# What a folder is searched for by kind; videos have sound too.
_SUFFIXES = {
    "image": ("images", IMAGE_SUFFIXES),
    "video": ("videos", VIDEO_SUFFIXES),
    "audio": ("sounds", AUDIO_SUFFIXES | VIDEO_SUFFIXES),
    "audio_video": ("videos", VIDEO_SUFFIXES),
}
# What a caption tells of: what is seen, heard, said, seen and heard, or all three.
CAPTION_KINDS = ("visual", "audio", "speech", "av", "avs")


@dataclass(frozen=True)
class Sample:
    """One clip of a list."""

    path: str  # of the video, image or sound; empty for text
    start: float | None = None  # seconds; None: from the beginning
    end: float | None = None  # seconds, exclusive; None: to the end
    captions: dict[str, str] = field(default_factory=dict)  # by kind, see CAPTION_KINDS
    label: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)  # `attributes` and unknown columns
    kind: str = "video"  # of the media, see KINDS
    id: str | None = None  # rows of one id, within a list, are the same to the contrastive loss
    # a conversation: {"role", "content"}, the last one the assistant's; empty: none
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def caption(self) -> str | None:
        """What is seen."""
        return self.captions.get("visual")


def read_list(path: str | Path, kind: str = "") -> list[Sample]:
    """Read a folder of files, or a list of clips.

    Args:
        path: A folder of shards (see iv2.data.joined), another folder (searched through, ordered
            by name), or a file: JSON lines (.jsonl), a JSON array of objects (.json), or a table
            with a header (.csv). Each row has `path` (relative to the folder of the list, absolute,
            or an address; in a tar as in a folder: see iv2.data.files) and optionally `start`,
            `end` (seconds), `captions` (an object by kind: visual, audio, speech, av, avs) or
            `caption` (a visual one), each a string or a list of them, of which all but the first go
            to `attributes["paraphrases"]`, `label` (an integer), `kind` (image, video, audio,
            audio_video, text), `id`, `attributes` (an object) and `messages` (see
            `check_messages`; not in tables). A row of kind text has `messages` and needs no
            `path`. Further columns are kept in the sample's `attributes`.
        kind: What all of it is read as, and so which files of a folder are taken; empty: as the
            rows say, and the videos of a folder. Clips with messages may be read as text.

    Raises:
        FileNotFoundError: `path` does not exist, or half of a shard.
        ValueError: no clips, another kind of file, a row that cannot be used, with its line, or a
            shard that is not whole.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"read_list: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_list: path must be a folder or a list, got {path}")
    if path.is_dir() and is_sharded(path):
        rows = rows_of_shards(path)
        samples = [_sample(path / "list.jsonl", place, row, kind) for place, row in rows]
        expected = "a folder of shards with at least one clip"
    elif path.is_dir():
        if kind == "text":
            raise ValueError(f"read_list: path must be a list for kind text, got {path}")
        kind = kind or "video"
        contents, suffixes = _SUFFIXES[kind]
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
        samples = [Sample(str(p), kind=kind) for p in files if p.is_file()]
        expected = f"a folder with {contents} ({', '.join(sorted(suffixes))})"
    else:
        samples = [_sample(path, place, row, kind) for place, row in _rows(path)]
        expected = "a list with at least one clip"
    if not samples:
        raise ValueError(f"read_list: path must be {expected}, got {path}")
    return samples


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a list file, with where each is: 'file:line'."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _json(line, f"{path}:{number}")
    elif suffix == ".json":
        rows = _json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path}: the file must be a JSON array, got {type(rows).__name__}")
        yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows, 1))
    elif suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            if "path" not in (table.fieldnames or ()):
                names = ", ".join(table.fieldnames or ()) or "nothing"
                raise ValueError(f"{path}:1: the header must name a column 'path', got {names}")
            for row in table:
                if None in row:
                    raise ValueError(f"{path}:{table.line_num}: more cells than the header has")
                yield f"{path}:{table.line_num}", {k: v for k, v in row.items() if v}
    else:
        raise ValueError(f"read_list: path must be a folder, .jsonl, .json or .csv, got {path}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{place}: not JSON: {e.msg} at column {e.colno}") from e


def _sample(listing: Path, place: str, row: Any, kind: str) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object, got {type(row).__name__}")
    row = dict(row)
    own = row.pop("kind", None) or "video"
    kind = kind or own
    if own not in KINDS:
        raise ValueError(f"{place}: kind must be one of {', '.join(KINDS)}, got {own!r}")
    messages = row.pop("messages", None)
    if messages is not None:
        check_messages(place, messages)
    video = row.pop("path", None)
    if kind == "text":
        if messages is None:
            raise ValueError(f"{place}: messages must be given for text, got none")
        if own == "text" and video is not None:
            raise ValueError(f"{place}: path must be left out for text, got {video!r}")
        video = ""
    elif not isinstance(video, str) or not video:
        raise ValueError(f"{place}: path must be a string, got {video!r}")
    start, end = _number(place, row, "start", float), _number(place, row, "end", float)
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise ValueError(f"{place}: 0 <= start < end must hold, got start {start} and end {end}")
    (captions, others), name = _captions(place, row), row.pop("id", None)
    if name is not None and type(name) not in (str, int):
        raise ValueError(f"{place}: id must be a string or an integer, got {name!r}")
    label = _number(place, row, "label", int)
    attributes = row.pop("attributes", None) or {}
    if not isinstance(attributes, dict):
        raise ValueError(f"{place}: attributes must be an object, got {attributes!r}")
    if others:
        attributes = {**attributes, "paraphrases": others}
    return Sample(
        video if is_far(video) or not video else str(listing.parent / video),
        start,
        end,
        captions,
        label,
        {**attributes, **row},
        kind,
        None if name is None else str(name),
        messages or [],
    )


def check_messages(place: str, messages: Any) -> None:
    """A conversation: perhaps a system message, then user and assistant in turns, to an answer.

    Args:
        place: What errors begin with, such as the file and line.
        messages: A list of {"role": ..., "content": ...}, both strings.

    Raises:
        ValueError: It is not one; the message says which turn is wrong.
    """
    if not isinstance(messages, list) or not messages:
        got = "none" if messages == [] else type(messages).__name__
        raise ValueError(f"{place}: messages must be a list of at least one turn, got {got}")
    for number, turn in enumerate(messages, 1):
        where = f"{place}: messages[{number}]"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            got = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
            raise ValueError(f"{where} must be an object of role and content, got {got}")
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise ValueError(f"{where}: content must be text, got {turn['content']!r}")
    system = messages[0]["role"] == "system"
    for number, turn in enumerate(messages, 1):
        expected = ("assistant", "user")[(number + system) % 2]
        if turn["role"] != expected and not (system and number == 1):
            raise ValueError(
                f"{place}: messages[{number}]: role must be {expected}, got {turn['role']!r}"
            )
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: messages must end with the assistant's, got {messages[-1]['role']}"
        )


def _captions(place: str, row: dict[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The first caption of each kind, and the others."""
    caption, captions = row.pop("caption", None), row.pop("captions", None) or {}
    if not isinstance(captions, dict):
        raise ValueError(f"{place}: captions must be an object by kind, got {captions!r}")
    if caption is not None:
        captions = {"visual": caption, **captions}
    firsts, others = {}, {}
    for kind, texts in captions.items():
        every = [texts] if isinstance(texts, str) else texts
        good = isinstance(every, list) and every and all(isinstance(text, str) for text in every)
        if kind not in CAPTION_KINDS or not good:
            raise ValueError(
                f"{place}: captions must be strings, or lists of them, by kind "
                f"({', '.join(CAPTION_KINDS)}), got {kind}: {texts!r}"
            )
        firsts[kind] = every[0]
        if every[1:]:
            others[kind] = every[1:]
    return firsts, others


def _number(place: str, row: dict[str, Any], name: str, kind: type) -> Any:
    value = row.pop(name, None)
    if value is None:
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    exact = isinstance(value, str) or number == value
    if number is None or not exact or not np.isfinite(number):
        word = "an integer" if kind is int else "a number"
        raise ValueError(f"{place}: {name} must be {word}, got {value!r}")
    return number


# ---- frame numbers


def tsn_indices(
    n: int, num_frames: int, rng: np.random.Generator | None = None, *, span: int = 1
) -> list[int]:
    """Stage 1: cut the clip into equal segments of whole frames, take one frame of each.

    The segments have (n - span + 1) // num_frames frames; what remains at the end is not used, as
    in the released code.

    Args:
        n: Frames in the clip.
        num_frames: Frames to take.
        rng: Draws the place inside each segment; None takes the middle.
        span: Frames that each place must leave before the end of the clip, itself included.

    Returns:
        Ascending frame numbers. A clip shorter than `num_frames` repeats frames, evenly spread
        (the released code takes frame 0 each time).
    """
    _check("tsn_indices", n, num_frames)
    segment = (n - span + 1) // num_frames
    if segment <= 0:
        return [min(n - 1, i * n // num_frames) for i in range(num_frames)]
    draws = np.full(num_frames, 0.5) if rng is None else rng.random(num_frames)
    return [i * segment + int(u * segment) for i, u in enumerate(draws)]


def sparse_indices(n: int, num_frames: int, rng: np.random.Generator) -> list[int]:
    """Fine-tuning, training: a frame of each of num_frames equal parts of [0, n - 1].

    Part i reaches from round(s i) to round(s (i + 1)), both included; s = (n - 1) / num_frames.
    """
    _check("sparse_indices", n, num_frames)
    edges = [round((n - 1) / num_frames * i) for i in range(num_frames + 1)]
    draws = rng.random(num_frames)
    spans = zip(edges[:-1], edges[1:], draws, strict=True)
    return [min(low + int(u * (high - low + 1)), n - 1) for low, high, u in spans]


def sparse_test_indices(
    n: int, num_frames: int, segment: int = 0, num_segments: int = 1
) -> list[int]:
    """Fine-tuning, test: view `segment` of `num_segments`, each with other frames of the parts.

    Frame i of the view is round(s i) + int(s / (num_segments + 1) * (segment + 1)), s as in
    `sparse_indices`.
    """
    _check("sparse_test_indices", n, num_frames)
    if not 0 <= segment < num_segments:
        raise ValueError(
            f"sparse_test_indices: segment must be in [0, {num_segments}), got {segment}"
        )
    part = (n - 1) / num_frames
    shift = int(part / (num_segments + 1) * (segment + 1))
    return [min(round(part * i) + shift, n - 1) for i in range(num_frames)]


def interval_indices(n: int, num_frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """Stage 2: a frame of each interval between int(linspace(0, n, num_frames + 1)).

    Args:
        n: Frames in the clip.
        num_frames: Frames to take.
        rng: Draws any frame of the interval ("rand"); None takes the middle one ("middle").

    Returns:
        Ascending frame numbers; a shorter clip gives all its frames and repeats the last.
    """
    _check("interval_indices", n, num_frames)
    taken = min(n, num_frames)
    edges = np.linspace(0, n, taken + 1).astype(int)
    low, high = edges[:-1], edges[1:] - 1
    if rng is None:
        places = (low + high) // 2
    else:
        places = low + (rng.random(taken) * (high - low + 1)).astype(int)
    return [int(p) for p in places] + [int(places[-1])] * (num_frames - taken)


def _check(name: str, n: int, num_frames: int) -> None:
    if n < 1:
        raise ValueError(f"{name}: n must be at least 1, got {n}")
    if num_frames < 1:
        raise ValueError(f"{name}: num_frames must be at least 1, got {num_frames}")
