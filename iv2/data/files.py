"""Media files by path: on disk, inside a tar as in a folder, or far away.

``clips/video-000000.tar/000000012.mp4`` is a member of an uncompressed tar, as `iv2 shard` or
WebDataset writes it. An address with a scheme, such as ``s3://bucket/a.mp4``, is opened by fsspec,
whose package for the scheme must be installed.
"""

from __future__ import annotations

import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

_TAR = ".tar/"


def readable(path: str | Path) -> str | BinaryIO:
    """What a decoder can open: the path of a file on disk, else an open file.

    Raises:
        OSError: There is no such file or member, or the tar is damaged.
    """
    text = str(path)
    head, found, name = text.partition(_TAR)
    tar = head + _TAR[:-1]
    if found and not os.path.isdir(tar):
        return io.BytesIO(_member(tar, name))
    return _far(text) if is_far(text) else text


def is_far(path: str) -> bool:
    """Whether a path is an address with a scheme."""
    return "://" in path


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        OSError: It cannot be written; what was there is kept.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _far(address: str) -> BinaryIO:
    import fsspec

    return cast("BinaryIO", fsspec.open(address, "rb").open())


def _member(tar: str, name: str) -> bytes:
    if is_far(tar):
        members = _members_far(tar)
    else:
        stat = os.stat(tar)
        members = _members(tar, stat.st_mtime_ns, stat.st_size)
    if name not in members:
        cut = "" if members.whole else ", the last of them cut off"
        raise FileNotFoundError(f"{tar} must hold {name}, got {len(members)} other files{cut}")
    offset, size = members[name]
    with _far(tar) if is_far(tar) else open(tar, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{tar}: truncated in {name}")
    return data


class Members(dict[str, tuple[int, int]]):
    """Offset and size of each file of a tar, and whether the tar is whole."""

    whole = True


@lru_cache(maxsize=1024)
def _members(tar: str, changed: int, size: int) -> Members:
    """Where each member's bytes are; read again when the file has changed."""
    with open(tar, "rb") as file:
        return members_of(file)


@lru_cache(maxsize=1024)
def _members_far(tar: str) -> Members:
    with _far(tar) as file:
        return members_of(file)


def members_of(file: BinaryIO) -> Members:
    """The members of an open tar; of a truncated one those before the end, and the cut one.

    Raises:
        OSError: It is none, or damaged at its start.
    """
    found = Members()
    try:
        with tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                if member.isfile():
                    found[member.name] = member.offset_data, member.size
    except tarfile.TarError as error:
        if not found:
            raise OSError(f"not an uncompressed tar: {error}") from error
        found.whole = False
    return found
