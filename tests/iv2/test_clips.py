from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iv2.data.clips import (
    Sample,
    interval_indices,
    read_list,
    sparse_indices,
    sparse_test_indices,
    tsn_indices,
)
from iv2.data.synthetic import write_toyworld


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_folder_is_searched_through(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MP4", "sub/deep/c.webm", "notes.txt", "sub/d.avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [str(Path(s.path).relative_to(tmp_path)) for s in read_list(tmp_path)]
    assert names == ["a.MP4", "b.mp4", "sub/d.avi", "sub/deep/c.webm"]


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.JPG", "c.png", "d.wav", "e.txt", "sub/f.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for kind, expected in (
        ("", ["a.mp4"]),
        ("video", ["a.mp4"]),
        ("audio_video", ["a.mp4"]),
        ("image", ["b.JPG", "c.png"]),
        ("audio", ["a.mp4", "d.wav", "sub/f.flac"]),
    ):
        samples = read_list(tmp_path, kind)
        assert [str(Path(s.path).relative_to(tmp_path)) for s in samples] == expected
        assert {s.kind for s in samples} == {kind or "video"}
    with pytest.raises(ValueError, match=r"must be a folder with images \(.bmp, .* got .*sub"):
        read_list(tmp_path / "sub", "image")
    with pytest.raises(ValueError, match=r"kind must be one of image, .*, got 'film'"):
        read_list(tmp_path, "film")


def test_the_kind_asked_for_is_that_of_all_rows(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"path": "a.mp4", "kind": "audio"}\n{"path": "b.mp4"}\n')
    assert [s.kind for s in read_list(tmp_path / "l.jsonl")] == ["audio", "video"]
    samples = read_list(tmp_path / "l.jsonl", "audio_video")
    assert [s.kind for s in samples] == ["audio_video"] * 2


EXPECTED = [
    Sample("{}/v/a.mp4", 1.5, 4.0, {"visual": "a dog, running"}, 3, {"source": "x"}),
    Sample("/abs/b.mp4"),
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "l.jsonl",
            '{"path": "v/a.mp4", "start": 1.5, "end": 4, "caption": "a dog, running", "label": 3, '
            '"attributes": {"source": "x"}}\n\n{"path": "/abs/b.mp4"}\n',
        ),
        (
            "l.json",
            '[{"path": "v/a.mp4", "start": 1.5, "end": 4.0, "caption": "a dog, running", '
            '"label": 3, "source": "x"}, {"path": "/abs/b.mp4", "label": null}]',
        ),
        (
            "l.csv",
            "path,start,end,caption,label,source\n"
            'v/a.mp4,1.5,4,"a dog, running",3,x\n/abs/b.mp4,,,,,\n',
        ),
    ],
)
def test_lists(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    samples = read_list(tmp_path / name)
    first = EXPECTED[0]
    assert samples[0].path == str(tmp_path / "v/a.mp4")
    assert (samples[0].start, samples[0].end) == (first.start, first.end)
    assert (samples[0].caption, samples[0].label) == (first.caption, first.label)
    assert samples[0].attributes == first.attributes
    assert samples[1] == EXPECTED[1]


def test_toyworld_list(tmp_path: Path) -> None:
    samples = read_list(write_toyworld(tmp_path, 3, 0, size=16, num_frames=2))
    assert len(samples) == 3
    assert Path(samples[0].path).is_file()
    assert samples[0].label == samples[0].attributes["labels"]["motion"]
    assert {"motion", "shape", "colour", "sound", "paraphrases"} <= set(samples[0].attributes)
    assert set(samples[0].captions) == {"visual", "audio", "av"}
    assert samples[0].caption == samples[0].captions["visual"]


def test_captions_kinds_and_ids(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(
        '{"path": "a.mp4", "kind": "audio_video", "id": 7, "caption": "x", '
        '"captions": {"avs": "y"}}\n'
    )
    (sample,) = read_list(tmp_path / "l.jsonl")
    assert sample.captions == {"visual": "x", "avs": "y"}
    assert (sample.kind, sample.id) == ("audio_video", "7")
    assert sample.attributes == {}
    for row, message in (
        (
            {"kind": "film"},
            "kind must be one of image, video, audio, audio_video, text, got 'film'",
        ),
        ({"captions": ["x"]}, "captions must be an object by kind, got"),
        ({"captions": {"sung": "x"}}, r"captions must be strings, .* \(visual, .* got sung"),
        ({"id": [3]}, r"id must be a string or an integer, got \[3\]"),
        ({"captions": {"av": 3}}, "captions must be strings, .* got av: 3"),
        ({"caption": []}, r"captions must be strings, or lists of them, .* got visual: \[\]"),
        ({"captions": {"av": ["x", 3]}}, "captions must be strings, .* got av: "),
    ):
        (tmp_path / "l.jsonl").write_text(json.dumps({"path": "a.mp4", **row}) + "\n")
        with pytest.raises(ValueError, match=message):
            read_list(tmp_path / "l.jsonl")


def test_several_captions_of_a_clip(tmp_path: Path) -> None:
    row = {"path": "a.mp4", "caption": ["x", "y", "z"], "captions": {"audio": "s"}, "by": "me"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row))
    (sample,) = read_list(tmp_path / "l.jsonl")
    assert sample.captions == {"visual": "x", "audio": "s"}
    assert sample.attributes == {"by": "me", "paraphrases": {"visual": ["y", "z"]}}


USER, REPLY = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog"}
SYSTEM = {"role": "system", "content": "be brief"}


def test_messages_and_rows_of_text(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "kind": "audio_video", "messages": [USER, REPLY, USER, REPLY], "x": 1},
        {"kind": "text", "messages": [SYSTEM, USER, REPLY]},
        {"path": "b.mp4"},
    ]
    listing = tmp_path / "l.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three = read_list(listing)
    assert (one.messages, one.kind) == ([USER, REPLY, USER, REPLY], "audio_video")
    assert one.attributes == {"x": 1}
    assert (two.path, two.kind, two.messages) == ("", "text", [SYSTEM, USER, REPLY])
    assert three.messages == []
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    texts = read_list(listing, "text")  # conversations on a clip, without it
    assert [(s.path, s.kind) for s in texts] == [("", "text")] * 2
    assert texts[0].messages == [USER, REPLY, USER, REPLY]
    with pytest.raises(ValueError, match=r"l.jsonl:2: path must be a string, got None"):
        read_list(listing, "video")
    with pytest.raises(ValueError, match="path must be a list for kind text, got"):
        read_list(tmp_path, "text")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages must be a list of at least one turn, got none"),
        ({"messages": "hello"}, "messages must be a list of at least one turn, got str"),
        ({"messages": ["hello"]}, r"messages\[1\] must be an object of role and content, got str"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            r"messages\[2\] must be an object of role and content, got role",
        ),
        (
            {"messages": [USER, {**REPLY, "name": "x"}]},
            r"messages\[2\] must be an object of role and content, got role, content, name",
        ),
        (
            {"messages": [USER, {**REPLY, "content": " "}]},
            r"messages\[2\]: content must be text, got ' '",
        ),
        (
            {"messages": [USER, {**REPLY, "content": None}]},
            r"messages\[2\]: content must be text, got None",
        ),
        ({"messages": [REPLY]}, r"messages\[1\]: role must be user, got 'assistant'"),
        (
            {"messages": [USER, USER, REPLY]},
            r"messages\[2\]: role must be assistant, got 'user'",
        ),
        (
            {"messages": [SYSTEM, USER, REPLY, REPLY]},
            r"messages\[4\]: role must be user, got 'assistant'",
        ),
        (
            {"messages": [USER, SYSTEM, REPLY]},
            r"messages\[2\]: role must be assistant, got 'system'",
        ),
        ({"messages": [USER]}, "messages must end with the assistant's, got user"),
        ({"messages": [SYSTEM]}, "messages must end with the assistant's, got system"),
        ({"kind": "text"}, "messages must be given for text, got none"),
        (
            {"kind": "text", "path": "a.mp4", "messages": [USER, REPLY]},
            "path must be left out for text, got 'a.mp4'",
        ),
    ],
)
def test_wrong_messages_are_told_with_their_line(tmp_path: Path, row: dict, message: str) -> None:
    first = {"path": "a.mp4", "messages": [USER, REPLY]}
    row = row if "kind" in row else {"path": "b.mp4", **row}
    listing = tmp_path / "l.jsonl"
    listing.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"l\.jsonl:2: {message}$"):
        read_list(listing)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", '{"path": "a.mp4"}\n{"path": \n', r"l.jsonl:2: not JSON"),
        ("l.jsonl", '\n["a.mp4"]\n', r"l.jsonl:2: a row must be an object, got list"),
        ("l.jsonl", '{"caption": "x"}', r"l.jsonl:1: path must be a string, got None"),
        ("l.jsonl", '{"path": 3}', r"l.jsonl:1: path must be a string, got 3"),
        ("l.jsonl", '{"path": "a", "start": "x"}', r":1: start must be a number, got 'x'"),
        ("l.jsonl", '{"path": "a", "start": NaN}', r":1: start must be a number, got nan"),
        ("l.jsonl", '{"path": "a", "label": 1.5}', r":1: label must be an integer, got 1.5"),
        (
            "l.jsonl",
            '{"path": "a", "caption": 1}',
            r":1: captions must be .* got visual: 1",
        ),
        ("l.jsonl", '{"path": "a", "attributes": 1}', r":1: attributes must be an object, got 1"),
        ("l.jsonl", '{"path": "a", "start": 2, "end": 1}', r"0 <= start < end must hold"),
        ("l.jsonl", '{"path": "a", "start": -1}', r"0 <= start < end must hold"),
        ("l.json", '{"path": "a.mp4"}', r"l.json: the file must be a JSON array, got dict"),
        ("l.json", '[{"path": "a"}, {"path": "b", "end": "z"}]', r"l.json: item 2: end must be"),
        ("l.csv", "file,label\na.mp4,1\n", r"l.csv:1: the header must name a column 'path'"),
        ("l.csv", "path,label\na.mp4,1\nb.mp4,dog\n", r"l.csv:3: label must be an integer"),
        ("l.csv", "path\na.mp4,1\n", r"l.csv:2: more cells than the header has"),
        ("l.csv", "path,label\n,1\n", r"l.csv:2: path must be a string, got None"),
        ("l.jsonl", "", r"a list with at least one clip, got .*l.jsonl"),
        ("l.txt", "a.mp4\n", r"must be a folder, .jsonl, .json or .csv, got .*l.txt"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / name)


def test_no_videos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder with videos"):
        read_list(tmp_path)
    with pytest.raises(FileNotFoundError, match="read_list: path must be"):
        read_list(tmp_path / "absent")


def drawn(rule: Callable[[np.random.Generator], list[int]], times: int = 400) -> list[set[int]]:
    """Which numbers each place takes."""
    rows = [rule(rng(seed)) for seed in range(times)]
    return [set(column) for column in zip(*rows, strict=True)]


def test_tsn() -> None:
    # 19 frames in 4 segments of 4; the last three are never taken
    assert drawn(lambda r: tsn_indices(19, 4, r)) == [
        set(range(low, low + 4)) for low in (0, 4, 8, 12)
    ]
    assert tsn_indices(19, 4) == [2, 6, 10, 14]
    assert drawn(lambda r: tsn_indices(19, 4, r, span=8)) == [
        set(range(low, low + 3)) for low in (0, 3, 6, 9)
    ]
    assert tsn_indices(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert tsn_indices(1, 4, rng()) == [0, 0, 0, 0]


def test_sparse() -> None:
    # 10 frames: s = 2.25, edges 0, 2, 4 (half to even), 7, 9, ends included
    expected = [{0, 1, 2}, {2, 3, 4}, {4, 5, 6, 7}, {7, 8, 9}]
    assert drawn(lambda r: sparse_indices(10, 4, r)) == expected
    assert sparse_indices(1, 4, rng()) == [0, 0, 0, 0]
    for seed in range(50):
        assert max(sparse_indices(5, 8, rng(seed))) <= 4


def test_sparse_views() -> None:
    # 101 frames, 8 parts of 12.5; four views are 2, 5, 7 and 10 frames into each part
    base = [0, 12, 25, 38, 50, 62, 75, 88]
    for view, shift in enumerate((2, 5, 7, 10)):
        expected = [min(b + shift, 100) for b in base]
        assert sparse_test_indices(101, 8, view, 4) == expected
    assert sparse_test_indices(101, 8) == [b + 6 for b in base]
    assert sparse_test_indices(1, 4, 1, 2) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"segment must be in \[0, 4\), got 4"):
        sparse_test_indices(101, 8, 4, 4)


def test_intervals() -> None:
    # 10 frames: edges 0, 2, 5, 7, 10
    assert drawn(lambda r: interval_indices(10, 4, r)) == [{0, 1}, {2, 3, 4}, {5, 6}, {7, 8, 9}]
    assert interval_indices(10, 4) == [0, 3, 5, 8]
    assert interval_indices(3, 5, rng()) == [0, 1, 2, 2, 2]
    assert interval_indices(1, 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "rule",
    [
        lambda n, t: tsn_indices(n, t, rng()),
        lambda n, t: sparse_indices(n, t, rng()),
        lambda n, t: sparse_test_indices(n, t, 0, 1),
        lambda n, t: interval_indices(n, t, rng()),
    ],
)
def test_every_rule_stays_inside(rule: Callable[[int, int], list[int]]) -> None:
    for n in range(1, 40):
        indices = rule(n, 8)
        assert len(indices) == 8
        assert indices == sorted(indices)
        assert indices[0] >= 0
        assert indices[-1] < n
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        rule(0, 8)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        rule(8, 0)
