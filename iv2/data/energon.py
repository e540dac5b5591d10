"""Shards as data sets of megatron-energon, which reads them without its own `prepare`.

::

    OUT/.nv-meta/             the tars of videos: a sample each, by its number
    OUT/captions/.nv-meta/    the tars of captions, of which a sample's are `NUMBER.json`
    OUT/*.tar.idx             where the samples of a tar begin

The two are joined by a metadataset of energon's that names the second as `aux` of the first, and a
cooker that looks up `sample["__key__"] + ".json"` there.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import tarfile
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from iv2.data.files import write_text

# The release whose files these are like.
_VERSION = "7.4.1"
_BLOCK = 512  # bytes of a tar; each file begins a new one
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER, sample_key TEXT, sample_index INTEGER,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,
    content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDICES = """
CREATE INDEX idx_samples_sample_key ON samples(sample_key);
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq
    ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name,
    content_byte_offset, content_byte_size);
"""


def describe(folder: Path, tars: Sequence[Path], name: str) -> None:
    """Make a folder a data set of these tars, each of which holds one file a sample.

    Args:
        folder: For ``.nv-meta``.
        tars: With at least one sample each, in the folder or above it.
        name: Of what is in the tars; a folder that has it is left as it is.

    Raises:
        OSError: A file cannot be written.
    """
    meta, number = folder / ".nv-meta", str(uuid.uuid5(uuid.NAMESPACE_OID, name))
    done = meta / "index.uuid"
    if done.exists() and done.read_text(encoding="utf-8") == number:
        return
    meta.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    index = meta / "index.sqlite"
    index.unlink(missing_ok=True)
    counts = {}
    try:
        with closing(sqlite3.connect(index)) as base, base:
            base.executescript(_TABLES)
            for i, tar in enumerate(tars):
                place = tar.name if tar.parent == folder else f"../{tar.name}"
                counts[place] = _add(base, i, tar)
            base.executescript(_INDICES)
    except sqlite3.Error as error:
        raise OSError(f"{index}: {error}") from error
    info = {"energon_version": _VERSION, "shard_counts": counts}
    write_text(meta / ".info.json", json.dumps(info, indent=1) + "\n")
    # JSON is YAML.
    splits = {"exclude": [], "split_parts": {"train": list(counts), "val": [], "test": []}}
    write_text(meta / "split.yaml", json.dumps(splits, indent=1) + "\n")
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_text(meta / "dataset.yaml", json.dumps(kind, indent=1) + "\n")
    write_text(done, number)


def is_described(folder: Path) -> bool:
    """Whether `describe` has ended there."""
    return (folder / ".nv-meta" / "index.uuid").exists()


def _add(base: sqlite3.Connection, number: int, tar: Path) -> int:
    """Add the samples of a tar to the index, and write the tar's own; how many there are."""
    with tarfile.open(tar, "r:") as opened:
        members = opened.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // _BLOCK) * _BLOCK
    offsets = [*(member.offset for member in members), end]
    tar.with_suffix(".tar.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    names = [member.name.partition(".") for member in members]
    base.executemany(
        "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
        [
            (number, key, i, offsets[i], offsets[i + 1] - offsets[i])
            for i, (key, _, _) in enumerate(names)
        ],
    )
    base.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        [
            (number, i, part, member.offset_data, member.size)
            for i, (member, (_, _, part)) in enumerate(zip(members, names, strict=True))
        ],
    )
    return len(members)
