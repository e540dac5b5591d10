"""The clips of a folder of shards: each video joined by name with what is said of it.

The tars of captions may be others than those that `iv2 shard` wrote, made by anything that writes
WebDataset's names: a JSON file for each video, an object or a list of one a clip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iv2.data.files import Members, members_of

_VIDEOS = "video-[0-9]*.tar"


def captions_of(videos: str) -> str:
    """The name of the tar with the captions of a tar of videos."""
    return videos.replace("video-", "captions-")


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds shards."""
    return any(folder.glob(_VIDEOS)) or any(folder.glob(captions_of(_VIDEOS)))


def rows_of_shards(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as in a list, with where each is; in the order of the shards.

    Raises:
        FileNotFoundError: A tar of videos or of captions lacks its other half.
        ValueError: A tar is none or truncated, or its other half lacks one of its names.
    """
    numbers = {path.name.partition("-")[2] for path in folder.glob(_VIDEOS)}
    numbers |= {path.name.partition("-")[2] for path in folder.glob(captions_of(_VIDEOS))}
    for number in sorted(numbers):
        videos, captions = folder / f"video-{number}", folder / f"captions-{number}"
        for tar, other in ((videos, captions), (captions, videos)):
            if not tar.exists():
                raise FileNotFoundError(f"{tar} must be there beside {other.name}, got no file")
        members = {Path(name).stem: name for name in _members(videos)}
        places = _members(captions)
        said = {Path(name).stem: name for name in places}
        for tar, own, others in ((captions, said, members), (videos, members, said)):
            lacking = [others[stem] for stem in others if stem not in own]
            if lacking:
                more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
                raise ValueError(
                    f"{tar} must hold a file of each name in its other half, got none for "
                    f"{lacking[0]}{more}"
                )
        with captions.open("rb") as file:
            for stem, name in members.items():
                offset, size = places[said[stem]]
                file.seek(offset)
                where = f"{captions}/{said[stem]}"
                rows = _json(file.read(size), where)
                for row in rows if isinstance(rows, list) else [rows]:
                    yield where, {"path": f"{videos.name}/{name}", **row}


def _members(tar: Path) -> Members:
    try:
        with tar.open("rb") as file:
            members = members_of(file)
    except OSError as error:
        raise ValueError(f"{tar} must be a tar, got {error}") from error
    if not members.whole:
        raise ValueError(f"{tar} must be whole, got {len(members)} files, the last cut off")
    return members


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{where} must be JSON, got {error}") from error
