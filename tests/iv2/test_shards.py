"""Shards: small copies in step with the originals, tars, killed runs, captions apart."""

from __future__ import annotations

import errno
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import numbers, write_broken, write_video

from iv2 import cli
from iv2.data import shards
from iv2.data.audio import SoundConfig, read_sound
from iv2.data.clips import read_list
from iv2.data.dataset import ClipConfig, VideoDataset
from iv2.data.decode import DecodeError, Video, decode
from iv2.data.files import readable, write_text
from iv2.data.loader import Batches
from iv2.data.proxy import ProxyConfig, write_proxy
from iv2.data.shards import ShardConfig, write_shards
from iv2.data.synthetic import write_toyworld

SMALL = ShardConfig(sources_per_shard=3, proxy=ProxyConfig(size=32, gop=4))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_toyworld(tmp_path_factory.mktemp("world"), 5, 3, size=48, num_frames=16)


@pytest.fixture
def listing(world, tmp_path):
    """Three whole clips, two parts of one, and broken files."""
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    for row in rows:
        row["path"] = str(world.parent / row["path"])
    broken = write_broken(tmp_path / "broken")
    parts = [
        {**rows[4], "start": 0.0, "end": 1.0, "label": 1},
        {**rows[4], "start": 1.0, "end": 2.0},
    ]
    bad = [{"path": str(broken[name])} for name in ("truncated", "text")]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows[:3], bad[0], *parts, bad[1]]))
    return path


class TestProxy:
    @pytest.mark.parametrize("codec", ["h264", "vp9"])
    @pytest.mark.parametrize("part", [(None, None), (1.0, 3.0)])
    def test_frames_and_times_are_the_originals(self, tmp_path, codec, part):
        times = [0, 1, 2, 4, 5, 9, *range(10, 60)]  # tenths of a second, uneven
        options = {"bf": "2", "g": "30"}
        source = write_video(
            tmp_path / "a.mp4", len(times), pts=times, height=80, width=120, options=options
        )
        config = ProxyConfig(codec, size=40, gop=8)
        copy = tmp_path / f"b{config.suffix}"
        write_proxy(str(source), *part, copy, config)
        with Video(str(source)) as video:
            low, high = video.frame_range(*part)
            expected = np.array(video.times[low:high]) - video.times[low]
        assert 5 < high - low <= len(times)
        with Video(str(copy)) as video:
            np.testing.assert_allclose(video.times, expected, atol=2e-3)
            frames = video.frames(range(video.num_frames))
            assert [len(video._keys), video._keys[0]] == [-(-(high - low) // 8), video._coded[0]]
        assert frames.shape[1:3] == (40, 60)
        assert numbers(frames) == list(range(low, high))
        with av.open(str(copy)) as container:
            stamps = [(p.pts, p.dts) for p in container.demux(video=0) if p.size]
        assert stamps == sorted(stamps)  # none out of order

    @pytest.mark.parametrize("codec", ["h264", "vp9"])
    @pytest.mark.parametrize("part", [(None, None), (0.5, 1.5)])
    def test_sound_stays_in_step(self, tmp_path, world, codec, part):
        source = read_list(world)[1].path
        config = ProxyConfig(codec, size=32)
        copy = tmp_path / f"a{config.suffix}"
        write_proxy(source, *part, copy, config)
        rate = SoundConfig(sample_rate=16_000)
        before, after = read_sound(source, *part, rate), read_sound(copy, None, None, rate)
        assert abs(len(before) - len(after)) < 0.1 * 16_000
        n = min(len(before), len(after))
        spectra = torch.fft.rfft(torch.stack([before[:n], after[:n]]), 2 * n)
        likeness = torch.fft.irfft(spectra[0].conj() * spectra[1])
        lag = int(likeness.argmax())
        assert min(lag, 2 * n - lag) <= 32  # 2 ms
        assert likeness.max() > 0.8 * before[:n].norm() * after[:n].norm()

    def test_a_silent_video_has_a_silent_copy(self, tmp_path):
        write_proxy(
            str(write_video(tmp_path / "a.mp4", 9)), None, None, tmp_path / "b.mp4", ProxyConfig()
        )
        with Video(str(tmp_path / "b.mp4")) as video:
            assert (video.num_frames, video.info().has_audio) == (9, False)

    def test_refused(self, tmp_path):
        source = str(write_video(tmp_path / "a.mp4", 9))
        with pytest.raises(DecodeError, match=r"no frames from 50\.0 to 60\.0 s"):
            write_proxy(source, 50.0, 60.0, tmp_path / "b.mp4", ProxyConfig())
        with pytest.raises(ValueError, match="codec must be one of h264, vp9, got av1"):
            ProxyConfig("av1")
        with pytest.raises(ValueError, match="gop must be at least 1, got 0"):
            ProxyConfig(gop=0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_hold_the_clips(listing, tmp_path):
    out = tmp_path / "out"
    manifest = json.loads(write_shards(listing, out, SMALL, workers=2).read_text())
    assert [shard["members"] for shard in manifest["shards"]] == [3, 2, 0]
    assert (manifest["clips"], manifest["sources"], manifest["quarantined"]) == (5, 5, 2)
    assert manifest["hours"] == pytest.approx((3 * 2 + 2 * 1) / 3600, abs=1e-4)
    with tarfile.open(out / "video-000001.tar") as tar:
        assert tar.getnames() == ["000000004.mp4", "000000005.mp4"]
    with tarfile.open(out / "captions-000001.tar") as tar:  # joined by name
        assert tar.getnames() == ["000000004.json", "000000005.json"]
        said = json.load(tar.extractfile("000000004.json"))
    before, after = read_list(listing), read_list(out / "list.jsonl")
    good = [before[i] for i in (0, 1, 2, 4, 5)]
    assert said["captions"]["visual"][0] == good[3].captions["visual"]
    assert "start" not in said  # the member is that part
    for old, new in zip(good, after, strict=True):
        assert (new.captions, new.label, new.kind) == (old.captions, old.label, old.kind)
        assert new.attributes == old.attributes
        with Video(old.path) as a, Video(new.path) as b:
            low, high = a.frame_range(old.start, old.end)
            assert b.num_frames == high - low
            shown = a.frames([low, high - 1], (32, 32)).float()
            assert (b.frames([0, high - low - 1]).float() - shown).abs().mean() < 6
    bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in bad] == ["truncated.mp4", "text.mp4"]
    assert all(row["error"] for row in bad)
    assert not list(out.glob("*.work")) + list(out.glob("*.partial"))


def test_a_finished_run_does_nothing_and_others_are_refused(listing, tmp_path):
    out = tmp_path / "out"
    write_shards(listing, out, SMALL)
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    write_shards(listing, out, SMALL)
    assert stamps == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="other videos or options"):
        write_shards(listing, out, ShardConfig(3, ProxyConfig(size=16)))


def test_other_captions_leave_the_videos(listing, tmp_path):
    out = tmp_path / "out"
    write_shards(listing, out, SMALL)
    before = files(out)
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    rows[0]["captions"] = {"visual": ["something else", "and more"]}
    rows[0].pop("paraphrases")
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("video-*")}
    write_shards(listing, out, SMALL)
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("video-*")}
    changed = {name for name, data in files(out).items() if before[name] != data}
    assert {name for name in changed if "/.nv-meta/" not in name} == {
        *("captions-000000.tar", "captions-000000.tar.idx", "list.jsonl", "manifest.json")
    }
    sample = read_list(out / "list.jsonl")[0]
    assert sample.caption == "something else"
    assert sample.attributes["paraphrases"] == {"visual": ["and more"]}


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_killed_run_goes_on(listing, tmp_path, monkeypatch, stop):
    write_shards(listing, tmp_path / "whole", SMALL)
    encoded = []

    def counted(source, *args):
        if len(encoded) == stop:
            raise KeyboardInterrupt
        encoded.append(source)
        write_proxy(source, *args)

    monkeypatch.setattr(shards, "write_proxy", counted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(listing, tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    first, stop = list(encoded), 99
    write_shards(listing, tmp_path / "out", SMALL)
    # nothing whole is made again
    assert len(encoded) == len(read_list(listing))
    assert encoded[: len(first)] == first
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_ends_the_run_and_blames_no_video(listing, tmp_path, monkeypatch):
    source = str(write_video(tmp_path / "a.mp4", 9))
    with pytest.raises(OSError, match="No space left"):
        write_proxy(source, None, None, Path("/dev/full"), ProxyConfig())

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_proxy", full)
        with pytest.raises(OSError, match="No space left"):
            write_shards(listing, tmp_path / "out", SMALL)
    manifest = json.loads(write_shards(listing, tmp_path / "out", SMALL).read_text())
    assert (manifest["sources"], manifest["quarantined"]) == (5, 2)


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(self, text, **options):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_broken_and_missing_files_are_quarantined_when_copied(listing, tmp_path):
    with listing.open("a") as rows:
        rows.write(json.dumps({"path": "none.mp4"}) + "\n")
    manifest = write_shards(listing, tmp_path / "out", ShardConfig(9, proxy=None))
    assert json.loads(manifest.read_text())["quarantined"] == 3


def test_training_on_tars_is_training_on_files(world, tmp_path):
    """Without small copies the batches are the same, in the same order."""
    write_shards(world, tmp_path, ShardConfig(2, proxy=None))
    clip = ClipConfig(num_frames=4, sampling="interval", min_frames=1)
    some = []
    for listing in (world, tmp_path / "list.jsonl"):
        batches = iter(Batches(VideoDataset(read_list(listing), clip), 2))
        some.append([next(batches) for _ in range(3)])
    for a, b in zip(*some, strict=True):
        assert torch.equal(a["video"], b["video"])
        assert [Path(p).name[-10:] for p in a["paths"]] == [Path(p).name[-10:] for p in b["paths"]]
        assert all(".tar/" in path for path in b["paths"])


class TestPathsInTars:
    @pytest.fixture
    def tar(self, tmp_path):
        write_video(tmp_path / "a.mp4", 5)
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(tmp_path / "a.mp4", "in/a.mp4")
        return tmp_path / "x.tar"

    def test_members_are_read(self, tar):
        assert numbers(decode(f"{tar}/in/a.mp4", [3, 1])) == [3, 1]
        write_video(tar.parent / "b.mp4", 7)
        with tarfile.open(tar, "a") as more:
            more.add(tar.parent / "b.mp4", "b.mp4")
        assert numbers(decode(f"{tar}/b.mp4", [6])) == [6]  # the index is not the old one

    def test_what_is_wrong_is_said(self, tar):
        with pytest.raises(DecodeError, match=r"x\.tar must hold b\.mp4, got 1 other files"):
            decode(f"{tar}/b.mp4", [0])
        with pytest.raises(DecodeError, match="no such file"):
            decode(f"{tar.parent}/y.tar/b.mp4", [0])
        data = tar.read_bytes()
        tar.write_bytes(data[:700])
        with pytest.raises(DecodeError, match=r"truncated in in/a\.mp4|tar"):
            decode(f"{tar}/in/a.mp4", [0])
        (tar.parent / "z.tar").write_text("none at all" * 100)
        with pytest.raises(DecodeError, match="not an uncompressed tar"):
            decode(f"{tar.parent}/z.tar/a.mp4", [0])

    def test_a_folder_may_be_called_so(self, tar):
        (tar.parent / "f.tar").mkdir()
        (tar.parent / "a.mp4").rename(tar.parent / "f.tar" / "a.mp4")
        assert isinstance(readable(tar.parent / "f.tar" / "a.mp4"), str)
        assert numbers(decode(tar.parent / "f.tar" / "a.mp4", [2])) == [2]

    def test_addresses(self, tar, tmp_path):
        import fsspec

        memory = fsspec.filesystem("memory")
        memory.pipe("/there/a.mp4", (tar.parent / "a.mp4").read_bytes())
        memory.pipe("/there/x.tar", tar.read_bytes())
        listing = tmp_path / "list.jsonl"
        listing.write_text('{"path": "memory://there/x.tar/in/a.mp4"}\n')
        (sample,) = read_list(listing)
        assert numbers(decode(sample.path, [4])) == [4]
        assert numbers(decode("memory://there/a.mp4", [2])) == [2]
        with pytest.raises(DecodeError):
            decode("memory://there/none.mp4", [2])


def test_command(listing, tmp_path, capsys):
    cli.main(["shard", str(listing), "--out", str(tmp_path / "out"), "--size", "32"])
    said = capsys.readouterr()
    assert "list.jsonl: 5 clips, 0.00 h" in said.out
    assert "2 videos quarantined" in said.out
    assert "video-000000.tar: 5 sources, 0.00 h, 2 bad" in said.err
    assert len(read_list(tmp_path / "out" / "list.jsonl")) == 5
    (tmp_path / "i.jsonl").write_text('{"path": "a.png", "kind": "image"}\n')
    with pytest.raises(SystemExit, match="rows must be videos, got image"):
        cli.main(["shard", str(tmp_path / "i.jsonl"), "--out", str(tmp_path / "o")])
