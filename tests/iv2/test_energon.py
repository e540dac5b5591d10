"""Shards as data sets of megatron-energon; what it reads itself is skipped without it."""

from __future__ import annotations

import itertools
import json
import sqlite3
import struct
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from iv2.data.clips import read_list
from iv2.data.decode import Video
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.synthetic import write_toyworld

# energon asks for pinned memory on any machine
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven clips in shards of four, after one of none: its clips are broken."""
    folder = tmp_path_factory.mktemp("shards")
    world = write_toyworld(folder / "world", 11, 0, size=32, num_frames=8)
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    for row in rows:
        row["path"] = str(world.parent / row["path"])
    rows = [{"path": f"none{i}.mp4"} for i in range(4)] + rows
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(folder / "list.jsonl", folder / "out", ShardConfig(4, proxy=None))
    return folder / "out"


@pytest.mark.parametrize("kind", ["video", "captions"])
def test_the_index_leads_to_each_file(out: Path, kind: str) -> None:
    folder = out if kind == "video" else out / "captions"
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    tars = [folder / name for name in info["shard_counts"]]
    assert [tar.name for tar in tars] == [f"{kind}-00000{i}.tar" for i in (1, 2, 3)]
    assert list(info["shard_counts"].values()) == [4, 4, 3]
    splits = json.loads((folder / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    assert splits["train"] == list(info["shard_counts"])
    with closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as base:
        samples = base.execute("SELECT * FROM samples").fetchall()
        parts = base.execute("SELECT * FROM sample_parts").fetchall()
    expected = []
    for number, tar in enumerate(tars):
        with tarfile.open(tar) as opened:
            expected += [(number, m.name, opened.extractfile(m).read()) for m in opened]
            offsets = [m.offset for m in opened.getmembers()]
        index = tar.with_suffix(".tar.idx").read_bytes()
        *starts, end = struct.unpack(f"<{len(index) // 8}Q", index)
        assert starts == offsets
        data = tar.read_bytes()
        assert not any(data[end:])  # nothing but the end of the tar
        assert any(data[end - 512 : end])
    found = []
    for (tar_id, key, i, offset, size), part in zip(samples, parts, strict=True):
        assert part[:2] == (tar_id, i)
        data = tars[tar_id].read_bytes()
        begin = part[3]
        assert offset < begin < begin + part[4] <= offset + size
        found.append((tar_id, f"{key}.{part[2]}", data[begin : begin + part[4]]))
    assert found == expected


def loader(out: Path, rank: int = 0, world: int = 1, workers: int = 1) -> Any:
    """energon's, of one rank, with captions joined to videos."""
    energon = pytest.importorskip("megatron.energon")

    @energon.stateless
    def cook(sample: dict[str, Any], captions: Any) -> Any:
        said = captions.get(sample["__key__"] + ".json", sample)
        said = json.loads(said) if isinstance(said, bytes) else said
        return energon.CrudeSample(
            {
                **energon.basic_sample_keys(sample),
                "mp4": sample["mp4"],
                "caption": said["captions"]["visual"],
            }
        )

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None  # bytes as they are

        def __init__(self) -> None:
            super().__init__()
            self.cookers = [energon.Cooker(cook)]

        def batch(self, samples: list[Any]) -> list[Any]:
            return [(s["__key__"], s["caption"], s["mp4"]) for s in samples]

    meta = out / "both.yaml"
    meta.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
        f"    path: {out}\n    aux:\n      captions: {out / 'captions'}\n"
    )
    data = energon.get_train_dataset(
        meta,
        batch_size=2,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=energon.WorkerConfig(rank=rank, world_size=world, num_workers=workers),
        task_encoder=Encoder(),
    )
    return energon.get_savable_loader(data)


def take(batches: Any, num: int) -> list[Any]:
    return list(itertools.islice(batches, num))


def test_energon_joins_videos_and_captions(out: Path) -> None:
    found = [row for batch in take(loader(out), 11) for row in batch]
    assert len({key for key, _, _ in found}) == 11  # two passes of eleven
    samples = {Path(sample.path).stem: sample for sample in read_list(out)}
    for key, caption, data in found:
        sample = samples[key.rpartition("/")[2]]
        assert caption[0] == sample.caption
        assert data == Video(sample.path).source_bytes()


def test_energon_goes_on_where_it_was(out: Path) -> None:
    left = loader(out)
    batches = iter(left)
    take(batches, 3)
    state = left.save_state_rank()
    expected = take(batches, 6)
    again = loader(out)
    again.restore_state_rank(state)
    assert take(again, 6) == expected


def test_energon_gives_two_ranks_what_one_with_two_workers_gets(out: Path) -> None:
    one = take(loader(out, workers=2), 6)
    two = [take(loader(out, rank, 2), 3) for rank in range(2)]
    assert one == [batch for both in zip(*two, strict=True) for batch in both]
