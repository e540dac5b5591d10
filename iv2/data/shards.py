"""Shards: tars of videos, and tars of what is said of them, as WebDataset names their members.

::

    OUT/video-000000.tar      000000000.mp4, 000000001.mp4, ...
    OUT/captions-000000.tar   000000000.json, ...: captions, attributes, times, ids, conversations
    OUT/video-000000.json     what became of each source; checksum of the tar
    OUT/list.jsonl            a row for each clip, as `iv2.data.clips.read_list` reads it
    OUT/quarantine.jsonl      sources that cannot be read, and why
    OUT/manifest.json         written last: counts, hours, bytes, checksums, options
    OUT/.nv-meta, ...         for megatron-energon: see `iv2.data.energon`

Captions have tars of their own, so that other captions of the same clips leave the videos as they
are. Each source has a record, written when its file is whole: a killed run goes on where it was,
and a finished one does nothing, unless a tar is gone, one of videos has another length or one of
captions other contents: that one is made again. The same list and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from iv2.data import energon
from iv2.data.clips import Sample, read_list
from iv2.data.decode import DecodeError, Video
from iv2.data.files import readable, write_text
from iv2.data.joined import captions_of
from iv2.data.proxy import ProxyConfig, write_proxy

VERSION = 1


@dataclass(frozen=True)
class ShardConfig:
    """How a list becomes shards."""

    # sources in a tar
    sources_per_shard: int = 500
    # a small copy of each clip; None: the files as they are
    proxy: ProxyConfig | None = field(default_factory=ProxyConfig)

    def __post_init__(self) -> None:
        if self.sources_per_shard < 1:
            raise ValueError(
                f"ShardConfig: sources_per_shard must be at least 1, got {self.sources_per_shard}"
            )


@dataclass(frozen=True)
class _Source:
    """What becomes one member: a file, or with a proxy the part that a clip shows."""

    path: str
    start: float | None
    end: float | None


def write_shards(
    listing: Path,
    out: Path,
    config: ShardConfig,
    *,
    workers: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the clips of a list as shards; returns the path of the manifest.

    Args:
        listing: A list or a folder of videos; see `read_list`.
        out: Folder to write to.
        config: How.
        workers: Threads that read and encode.
        say: Takes a line for each shard.

    Raises:
        ValueError: The list cannot be used, or a row of it is not a video.
        FileExistsError: `out` holds shards of other videos or options.
    """
    samples = read_list(listing)
    for sample in samples:
        if sample.kind not in ("video", "audio_video"):
            raise ValueError(f"shard: rows must be videos, got {sample.kind}: {sample.path}")
    sources = _sources(samples, config)
    _claim(out, list(sources), config)
    manifest, wanted = out / "manifest.json", _digest(map(repr, samples))
    if _finished(out, wanted):
        return manifest
    manifest.unlink(missing_ok=True)
    infos: list[dict[str, Any]] = []  # without the records: there may be millions
    clips = 0
    with _growing(out / "list.jsonl") as rows, _growing(out / "quarantine.jsonl") as bad:
        for number, group in enumerate(_groups(sources, config.sources_per_shard)):
            first = number * config.sources_per_shard
            info = _shard(out, number, first, [source for source, _ in group], config, workers)
            said = _said_of(group, info)
            captions = out / captions_of(info["name"])
            info["captions"] = _write_tar(captions, _captions(said))
            for record, own in said:
                place = {"path": f"{info['name']}/{record['member']}"}
                rows.write(_lines(place | row for row in own))
                clips += len(own)
            broken = [record for record in info.pop("records") if "error" in record]
            bad.write(_lines(broken))
            infos.append(info | {"sources": len(said), "quarantined": len(broken)})
            hours = info["seconds"] / 3600
            say(f"{info['name']}: {len(said)} sources, {hours:.2f} h, {len(broken)} bad")
    _describe(out, [info for info in infos if info["members"]])
    about = {"rows": wanted, **_manifest(infos, clips, config)}
    write_text(manifest, json.dumps(about, indent=2) + "\n")
    return manifest


def _finished(out: Path, rows: str) -> bool:
    """Whether a run with these rows has ended, and nothing is lost since."""
    names = ("manifest.json", "list.jsonl", "quarantine.jsonl")
    if not all((out / name).exists() for name in names):
        return False
    if not (energon.is_described(out) and energon.is_described(out / "captions")):
        return False
    about = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    if about["rows"] != rows:
        return False
    for shard in about["shards"]:
        captions = out / captions_of(shard["name"])
        if not (_has(out / shard["name"], shard["bytes"]) and captions.exists()):
            return False
        if _checksum(captions) != shard["captions"]["sha256"]:  # of small tars the length is one
            return False
    return True


def _describe(out: Path, infos: list[dict[str, Any]]) -> None:
    """Make the shards data sets for megatron-energon."""
    videos = [out / info["name"] for info in infos]
    energon.describe(out, videos, _digest(info["sha256"] for info in infos))
    captions = [out / captions_of(info["name"]) for info in infos]
    said = _digest(info["captions"]["sha256"] for info in infos)
    energon.describe(out / "captions", captions, said)


@contextmanager
def _growing(path: Path) -> Iterator[TextIO]:
    """A text that is at its place once all of it is written."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


def _has(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _groups(
    sources: dict[_Source, list[Sample]], size: int
) -> Iterator[list[tuple[_Source, list[Sample]]]]:
    rows = iter(sources.items())
    while group := list(islice(rows, size)):
        yield group


def _sources(samples: list[Sample], config: ShardConfig) -> dict[_Source, list[Sample]]:
    """The rows of each source, in the order of the list."""
    found: dict[_Source, list[Sample]] = {}
    for sample in samples:
        part = (sample.start, sample.end) if config.proxy else (None, None)
        found.setdefault(_Source(sample.path, *part), []).append(sample)
    return found


def _claim(out: Path, sources: list[_Source], config: ShardConfig) -> None:
    """The folder is ours, or belongs to the same sources and options."""
    options = asdict(config)
    header = {"shards": VERSION, "sources": _digest(map(repr, sources)), "options": options}
    path = out / "options.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != header:
            raise FileExistsError(
                f"shard: {out} holds shards of other videos or options; give an empty folder"
            )
    else:
        write_text(path, json.dumps(header, indent=2) + "\n")


# ---- one shard


def _shard(
    out: Path,
    number: int,
    first: int,
    sources: list[_Source],
    config: ShardConfig,
    workers: int,
) -> dict[str, Any]:
    """Make the tar of some sources, unless it is there; what became of them."""
    name = f"video-{number:06d}"
    done = out / f"{name}.json"
    work = out / f"{name}.work"
    if done.exists():
        info: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        if _has(out / f"{name}.tar", info["bytes"]):
            shutil.rmtree(work, ignore_errors=True)  # of a run that ended in between
            return info
        done.unlink()
    work.mkdir(exist_ok=True)
    keys = [_key(first + i) for i in range(len(sources))]
    with ThreadPoolExecutor(workers) as pool:
        records = list(pool.map(lambda k, s: _record(work, k, s, config), keys, sources))
    good = [r for r in records if "error" not in r]
    tar = _write_tar(out / f"{name}.tar", ((r["member"], work / r["member"]) for r in good))
    info = {"name": f"{name}.tar", **tar}
    info |= {"seconds": sum(r["seconds"] for r in good), "records": records}
    write_text(done, json.dumps(info, indent=1) + "\n")
    shutil.rmtree(work)
    return info


def _key(number: int) -> str:
    return f"{number:09d}"


def _record(work: Path, key: str, source: _Source, config: ShardConfig) -> dict[str, Any]:
    """Copy or encode a source, unless its record is there."""
    path = work / f"{key}.json"
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    about = {name: value for name, value in asdict(source).items() if value is not None}
    try:
        record = {"key": key, **about, **_store(work, key, source, config)}
    except DecodeError as error:  # a full disk is no fault of the source: it ends the run
        record = {"key": key, **about, "error": error.reason}
    write_text(path, json.dumps(record))
    return record


def _store(work: Path, key: str, source: _Source, config: ShardConfig) -> dict[str, Any]:
    """Write the member; what it holds, all of whose frames could be decoded."""
    partial = work / f"{key}.partial"
    if config.proxy:
        suffix = config.proxy.suffix
        write_proxy(source.path, source.start, source.end, partial, config.proxy)
    else:
        suffix = Path(source.path).suffix.lower()
        with Video(source.path) as video:  # what is copied must be whole; of a proxy it was read
            for _ in video.stream(0, video.num_frames, 16):
                pass
        opened = readable(source.path)
        if isinstance(opened, str):
            shutil.copyfile(opened, partial)
        else:
            with opened, partial.open("wb") as copy:
                shutil.copyfileobj(opened, copy, 1 << 20)
    with Video(str(partial), source.path) as video:
        info = video.info()
    member = work / f"{key}{suffix}"
    partial.replace(member)
    return {
        "member": member.name,
        "seconds": round(info.duration, 3),
        "num_frames": info.num_frames,
        "fps": round(info.fps, 3),
        "width": info.width,
        "height": info.height,
        "has_audio": info.has_audio,
        "bytes": member.stat().st_size,
        "sha256": _checksum(member),
    }


def _write_tar(path: Path, members: Iterable[tuple[str, bytes | Path]]) -> dict[str, Any]:
    """An uncompressed tar of the members, the same for the same members; its size and checksum."""
    partial = path.with_suffix(".partial")
    count = 0
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data) if isinstance(data, bytes) else data.stat().st_size
                with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
                    tar.addfile(header, file)
                count += 1
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(partial)) from error
    checksum = _checksum(partial)
    partial.replace(path)
    return {"members": count, "bytes": path.stat().st_size, "sha256": checksum}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- what is said of the clips


def _said_of(
    group: list[tuple[_Source, list[Sample]]], info: dict[str, Any]
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The record of each source that could be read, and the rows of its clips."""
    return [
        (record, [_said(sample, record) for sample in own])
        for record, (_, own) in zip(info["records"], group, strict=True)
        if "error" not in record
    ]


def _captions(
    said: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]],
) -> Iterator[tuple[str, bytes]]:
    """A JSON file for each source: an object, or a list of one a clip where there are several."""
    for record, rows in said:
        text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=1)
        yield f"{record['key']}.json", text.encode()


def _said(sample: Sample, record: dict[str, Any]) -> dict[str, Any]:
    """A row of a list without its path."""
    row = {name: value for name, value in asdict(sample).items() if value not in (None, {}, [])}
    del row["path"]
    others = row.get("attributes", {}).get("paraphrases", {})
    for kind in others.keys() & row.get("captions", {}).keys():  # as lists have them
        row["captions"][kind] = [row["captions"][kind], *others.pop(kind)]
    if "paraphrases" in row.get("attributes", {}) and not others:
        del row["attributes"]["paraphrases"]
    if "start" in record or "end" in record:  # the member is that part
        row.pop("start", None)
        row.pop("end", None)
    return {name: value for name, value in row.items() if value not in ({}, [])}


def _manifest(infos: list[dict[str, Any]], clips: int, config: ShardConfig) -> dict[str, Any]:
    kept = ("name", "members", "bytes", "sha256", "seconds", "captions")
    return {
        "clips": clips,
        "sources": sum(info["sources"] for info in infos),
        "quarantined": sum(info["quarantined"] for info in infos),
        "hours": round(sum(info["seconds"] for info in infos) / 3600, 4),
        "bytes": sum(info["bytes"] for info in infos),
        "options": asdict(config),
        "shards": [{name: info[name] for name in kept} for info in infos],
    }


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
