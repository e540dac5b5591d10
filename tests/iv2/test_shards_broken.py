"""Shards of many clips, some broken; full disks; shards that are lost, cut or lack captions."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import resource
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from media import numbers, picture, write_broken, write_video

from iv2.data.clips import read_list
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.decode import decode
from iv2.data.loader import Batches
from iv2.data.proxy import ProxyConfig
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.synthetic import write_toyworld
from iv2.data.transforms import CropConfig

# IV2_TEST_CLIPS=10000 pytest tests/iv2/test_shards_broken.py -k many_clips -s
MANY = int(os.environ.get("IV2_TEST_CLIPS", "1000"))
# Memory that may be added between the first shard and the last, in MB.
MOST_ADDED = 16
CLIP = ClipConfig(num_frames=4, sampling="interval", crop=CropConfig(size=16))
SMALL = ShardConfig(sources_per_shard=3, proxy=ProxyConfig(size=32, gop=4))

Row = dict[str, Any]


def write_number(path: Path, number: int) -> Path:
    """A clip of two frames that say its number."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 48, 72, "yuv420p"
        for part in (number % 512, number // 512):
            frame = av.VideoFrame.from_ndarray(picture(part, 48, 72), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def ways_to_be_broken(folder: Path) -> dict[str, tuple[Row, str]]:
    """Ten rows that cannot be used, and what their reasons must say."""
    broken = write_broken(folder)
    whole = write_video(folder / "whole.mp4", 40, container_options={"movflags": "faststart"})
    data = whole.read_bytes()
    cut, damaged, sub = (folder / f"{name}.mp4" for name in ("cut", "damaged", "folder"))
    cut.write_bytes(data[: len(data) * 3 // 4])
    start = data.find(b"mdat") + 4
    damaged.write_bytes(data[: start + 400] + b"\xa5" * (len(data) - start - 400))
    sub.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        tar.add(whole, "a.mp4")
    return {
        "empty": ({"path": str(broken["empty"])}, r"empty \(0 bytes\)"),
        "text": ({"path": str(broken["text"])}, "invalid data"),
        "without its index": ({"path": str(broken["truncated"])}, "invalid data"),
        "cut": ({"path": str(cut)}, r"truncated: \d+ of 40 frames"),
        "damaged": ({"path": str(damaged)}, "invalid data|cannot be decoded|damaged"),
        "sound alone": ({"path": str(broken["audio"])}, "no video stream"),
        "missing": ({"path": str(folder / "none.mp4")}, "no such file"),
        "a folder": ({"path": str(sub)}, "is a directory"),
        "not in its tar": ({"path": f"{folder}/x.tar/b.mp4"}, r"x\.tar must hold b\.mp4"),
        "outside": ({"path": str(whole), "start": 50.0, "end": 60.0}, r"no frames from 5\S+ to"),
    }


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_many_clips_one_in_a_hundred_broken(tmp_path: Path) -> None:
    """Every broken one is named with its reason; nothing is lost or there twice; memory is flat."""
    (tmp_path / "in").mkdir()
    ways = list(ways_to_be_broken(tmp_path / "broken").values())
    rows, reasons = [], []
    for i in range(MANY):
        if i % 100 == 37:
            row, reason = ways[i // 100 % len(ways)]
            if i >= 1000:  # each file a second time as another part of it, which is another source
                row = row | {"start": row.get("start", 0.0) + i / 1e4}
            reasons.append((row, reason))
        else:
            row = {"path": str(write_number(tmp_path / "in" / f"{i}.mp4", i))}
        rows.append({**row, "caption": f"clip {i}"})
    listing, out = tmp_path / "list.jsonl", tmp_path / "out"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    memory: list[float] = []
    config = ShardConfig(sources_per_shard=100, proxy=ProxyConfig(size=48))
    made = write_shards(listing, out, config, workers=2, say=lambda _: memory.append(resident()))
    print(f"\n{MANY} clips: {memory[0]:.0f} MB after the first shard, then {max(memory):.0f} MB")
    assert max(memory) - memory[0] < MOST_ADDED
    manifest = json.loads(made.read_text())
    bad = rows_of(out / "quarantine.jsonl")
    assert manifest["quarantined"] == len(bad) == len(reasons) == MANY // 100
    for found, (row, reason) in zip(bad, reasons, strict=True):
        assert {n: found[n] for n in ("path", "start", "end") if n in found} == row
        assert re.search(reason, found["error"]), (row, found["error"])
    assert manifest["clips"] == manifest["sources"] == MANY - MANY // 100
    members = []
    for shard in manifest["shards"]:
        assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
        with tarfile.open(out / shard["name"]) as tar:
            members += [f"{shard['name']}/{name}" for name in tar.getnames()]
    kept = rows_of(out / "list.jsonl")
    assert [row["path"] for row in kept] == members
    good = [i for i in range(MANY) if i % 100 != 37]
    assert [row["captions"]["visual"] for row in kept] == [f"clip {i}" for i in good]
    for i, row in zip(good, kept, strict=True):
        assert numbers(decode(f"{out}/{row['path']}", [0, 1])) == [i % 512, i // 512]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("world"), 12, 3, size=48, num_frames=16)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes fail behind so many bytes: as on a full disk, at any layer, with another word."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("proxy", [SMALL.proxy, None], ids=["copies", "originals"])
@pytest.mark.parametrize("what", ["a clip", "a tar"])
def test_a_write_that_fails_blames_no_clip_and_a_rerun_completes(
    world: Path, tmp_path: Path, what: str, proxy: ProxyConfig | None
) -> None:
    config = ShardConfig(4, proxy)
    made = json.loads(write_shards(world, tmp_path / "whole", config).read_text())
    last = made["shards"][-1]["name"]
    with tarfile.open(tmp_path / "whole" / last) as tar:
        largest = max(member.size for member in tar.getmembers())
    size = largest if what == "a clip" else (tmp_path / "whole" / last).stat().st_size
    out = tmp_path / "out"
    with no_file_above(size - 1), pytest.raises(OSError, match=r"File too large: .*\.partial"):
        write_shards(world, out, config)
    assert not (out / "manifest.json").exists()
    records = list(out.glob("*.work/*.json"))
    assert records or what == "a clip"
    assert not any("error" in json.loads(path.read_text()) for path in records)
    write_shards(world, out, config, workers=2)
    assert files(out) == files(tmp_path / "whole")


def shards(world: Path, out: Path) -> list[Row]:
    """Four shards of three clips, as they are; the rows of their list."""
    write_shards(world, out, ShardConfig(3, proxy=None))
    return rows_of(out / "list.jsonl")


def stream(out: Path, **options: Any) -> Batches:
    return Batches(VideoDataset(read_list(out / "list.jsonl"), CLIP), 4, **options)


def lose(tar: Path) -> None:
    tar.unlink()


def cut(tar: Path) -> None:
    """In the middle of the second of three."""
    with tarfile.open(tar) as members:
        second = members.getmembers()[1]
    shorter = tar.with_suffix(".shorter")
    shorter.write_bytes(tar.read_bytes()[: second.offset_data + second.size // 2])
    shorter.replace(tar)  # at once: a worker may be reading


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "reasons"),
    [
        (lose, ["no such file"] * 3),
        (cut, [r"video-000001\.tar: truncated in", "got 2 other files, the last of them cut off"]),
    ],
)
def test_a_shard_is_lost_under_a_running_loader(
    world: Path,
    tmp_path: Path,
    workers: int,
    harm: Callable[[Path], None],
    reasons: list[str],
) -> None:
    """Its clips are skipped and counted; a rerun makes the same shard, a resumed run goes on."""
    rows = shards(world, tmp_path)
    tar = tmp_path / "video-000001.tar"
    before, whole = tar.read_bytes(), list(itertools.islice(stream(tmp_path), 20))
    with stream(tmp_path, num_workers=workers) as batches:
        next(batches)
        harm(tar)
        seen = list(itertools.islice(batches, 11))
        lost = [str(tmp_path / row["path"]) for row in rows[6 - len(reasons) : 6]]
        assert sorted(batches.skipped) == lost
        for path, reason in zip(lost, reasons, strict=True):
            assert re.search(reason, batches.skipped[path]), batches.skipped[path]
        # the other clips are there, each in its place
        for expected, batch in zip(whole[1:12], seen, strict=True):
            for place, path in enumerate(expected["paths"]):
                if path not in lost:
                    assert batch["paths"][place] == path
                    assert torch.equal(batch["video"][place], expected["video"][place])
        assert not {path for batch in seen[6:] for path in batch["paths"]} & {*lost}
        state = json.loads(json.dumps(batches.state_dict()))
    with pytest.raises(RuntimeError, match="data: 2 of 12 clips cannot be used"):
        list(itertools.islice(stream(tmp_path, max_bad_fraction=0.1), 6))
    assert rows == shards(world, tmp_path)
    assert tar.read_bytes() == before
    resumed = stream(tmp_path, num_workers=workers)
    resumed.load_state_dict(state)
    for expected, batch in zip(whole[12:], resumed, strict=False):
        assert torch.equal(batch["video"], expected["video"])
        assert batch["paths"] == expected["paths"]
    resumed.close()


def rewrite(tar: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """A tar as another program may write it."""
    with tarfile.open(tar) as before:
        members = {m.name: before.extractfile(m).read() for m in before}
    change(members)
    with tarfile.open(tar, "w") as after:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            after.addfile(header, io.BytesIO(data))


class TestFolderOfShards:
    def test_it_is_its_list(self, world: Path, tmp_path: Path) -> None:
        rows = [json.loads(line) for line in world.read_text().splitlines()]
        for row in rows:
            row["path"] = str(world.parent / row["path"])
        parts = [{**rows[0], "start": float(i), "end": i + 1.0} for i in range(2)]
        (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows + parts))
        for config in (ShardConfig(5, proxy=None), SMALL):  # also several rows a file
            out = tmp_path / str(config.sources_per_shard)
            write_shards(tmp_path / "list.jsonl", out, config)
            joined = {repr(sample) for sample in read_list(out)}
            assert joined == {repr(sample) for sample in read_list(out / "list.jsonl")}
            assert len(joined) == 14
        assert {sample.kind for sample in read_list(out, "audio_video")} == {"audio_video"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda said: [said.pop(f"00000000{i}.json") for i in (3, 5)],
                r"captions-000001\.tar must hold .*, got none for 000000003\.mp4 and 1 more",
            ),
            (
                lambda said: said.update({"000000099.json": b"{}"}),
                r"video-000001\.tar must hold .*, got none for 000000099\.json",
            ),
            (
                lambda said: said.update({"000000003.json": b"{"}),
                r"captions-000001\.tar/000000003\.json must be JSON",
            ),
            (
                lambda said: said.update({"000000003.json": b'{"captions": {"smell": "a"}}'}),
                r"captions-000001\.tar/000000003\.json: captions must be strings",
            ),
        ],
        ids=["lacking", "too many", "not JSON", "no captions"],
    )
    def test_captions_that_do_not_fit(
        self, world: Path, tmp_path: Path, change: Callable[..., None], message: str
    ) -> None:
        shards(world, tmp_path)
        before = read_list(tmp_path)
        rewrite(tmp_path / "captions-000001.tar", change)
        with pytest.raises(ValueError, match=message):
            read_list(tmp_path)
        shards(world, tmp_path)
        assert read_list(tmp_path) == before

    def test_halves_and_ends_that_are_gone(self, world: Path, tmp_path: Path) -> None:
        shards(world, tmp_path)
        before = read_list(tmp_path)
        for name in ("video-000002.tar", "captions-000002.tar"):
            tar = tmp_path / name
            cut(tar)
            with pytest.raises(ValueError, match=f"{name} must be whole, got 2 files"):
                read_list(tmp_path)
            tar.write_text("none at all" * 100)
            with pytest.raises(ValueError, match=f"{name} must be a tar"):
                read_list(tmp_path)
            tar.unlink()
            with pytest.raises(FileNotFoundError, match=f"{name} must be there beside"):
                read_list(tmp_path)
            shards(world, tmp_path)
            assert read_list(tmp_path) == before

    def test_other_captions_by_others(self, world: Path, tmp_path: Path) -> None:
        """A program may replace the tars of captions; the videos and the list stay."""
        shards(world, tmp_path)
        one = json.dumps({"caption": ["something else", "and more"]}).encode()
        rewrite(
            tmp_path / "captions-000000.tar",
            lambda said: said.update({"000000001.json": one}),
        )
        samples = read_list(tmp_path)
        assert len(samples) == 12
        assert samples[1].caption == "something else"
        assert samples[0] == read_list(tmp_path / "list.jsonl")[0]
