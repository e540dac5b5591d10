"""What `iv2 serve` refuses, and that it goes on: asked by OpenAI's client, and by bad sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from media import write_video
from tiny_http import (
    WAIT,
    asked,
    data_url,
    held,
    load,
    raw,
    served,
    text_of,
    until,
    video_part,
    write_world,
)

from iv2.data.decode import DecodeError, Video, probe
from iv2.serve import engine, http
from iv2.serve.http import Settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def models(world):
    return load(world)


@pytest.fixture(scope="module")
def here(world, models):
    """Most tests' server."""
    with served(world, models, allow_path=(world / "videos",)) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    yield
    if "here" in request.fixturenames:
        here = request.getfixturevalue("here")
        until(lambda: here.state.open_requests == 0)
        assert here.state.worker.is_alive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n must be left out or 1, got 2"),
        ({"logprobs": True}, "logprobs must be"),
        ({"temperature": 3}, "temperature must be a number from 0 to 2, got 3"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number above 0, got 0"),
        ({"max_tokens": 10**6}, "max_new_tokens must be below the language model's .* got 1000000"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": list("abcde")}, "stop must be"),
        ({"question": "up " * 5000}, "at most"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the user's last, got assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "with content that is text"),
    ],
)
def test_fields(here, options, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        asked(here, **options)
    assert caught.value.body["type"] == "invalid_request_error"
    assert text_of(asked(here)) != ""


def test_too_long_has_its_code(here):
    with pytest.raises(openai.BadRequestError) as caught:
        asked(here, question="up " * 5000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_broken_videos_are_refused_with_the_reason(here, tmp_path, world):
    good = (world / "videos" / "0.mp4").read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(good[: len(good) // 2])
    whole = decode_reason(broken)
    with pytest.raises(openai.BadRequestError) as caught:
        asked(here, video_part(data_url(broken)))
    assert whole in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "/tmp" not in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        here.client.embeddings.create(model="embed", input=[video_part(data_url(broken))])
    assert whole in str(caught.value)
    for url in ("data:video/mp4;base64,@@", "data:video/mp4,abc", "data:video/mp4;base64,"):
        with pytest.raises(openai.BadRequestError, match="must be"):
            asked(here, video_part(url))
    assert text_of(asked(here, video_part(data_url(world / "videos" / "0.mp4"))))


def test_a_video_damaged_where_it_is_looked_at(here, world, tmp_path):
    """It can be opened; its frames cannot be decoded."""
    good = (world / "videos" / "0.mp4").read_bytes()
    start, size = good.index(b"mdat") + 4, int.from_bytes(good[good.index(b"mdat") - 4 :][:4])
    noise = np.random.default_rng(0).integers(0, 256, size - 8, dtype=np.uint8).tobytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(good[:start] + noise + good[start + len(noise) :])
    part = video_part(data_url(broken))
    with Video(str(broken)) as video:
        assert video.num_frames == 12
    for call in (
        lambda: asked(here, part, stream=True),
        lambda: here.client.embeddings.create(model="embed", input=[part]),
    ):
        with pytest.raises(openai.BadRequestError, match="one that can be decoded"):
            call()
    assert text_of(asked(here))


def decode_reason(path) -> str:
    with pytest.raises(DecodeError) as caught:
        probe(path)
    return caught.value.reason


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"GIF89a\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        b"<!--ftyp--><MPD profiles='urn:mpeg:dash:profile:isoff-main'></MPD>",
        b"no video at all",
    ],
)
def test_files_that_lead_elsewhere_are_no_videos(here, tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(openai.BadRequestError, match="a video or picture of a known kind"):
        asked(here, video_part(data_url(path)))


def test_paths_are_read_only_in_allowed_folders(here, tmp_path, world):
    videos = world / "videos"
    inside, outside = videos / "0.mp4", world / "outside.mp4"
    outside.write_bytes(inside.read_bytes())
    (videos / "link.mp4").symlink_to(outside)
    (videos / "good.mp4").symlink_to(videos / "1.mp4")
    (world / "videos-too").mkdir()
    (world / "videos-too" / "0.mp4").write_bytes(inside.read_bytes())
    expected = text_of(asked(here, video_part(data_url(inside))))
    for url in (
        inside,
        f"file://{inside}",
        f"file://localhost{inside}",
        f"{videos}/../videos/0.mp4",
    ):
        assert text_of(asked(here, video_part(url))) == expected
    assert text_of(asked(here, video_part(videos / "good.mp4"))) != expected
    messages = set()
    for url in (
        outside,
        f"file://{outside}",
        f"{videos}/../outside.mp4",
        f"file://{videos}/%2e%2e/outside.mp4",
        videos / "link.mp4",
        world / "videos-too" / "0.mp4",
        world / "nothing.mp4",
        videos / "nothing.mp4",
        videos,
        "/etc/passwd",
        f"{inside}\0",
        "/dev/zero",
    ):
        with pytest.raises(openai.BadRequestError, match="a folder that --allow-path names") as e:
            asked(here, video_part(url))
        messages.add(e.value.body["message"].split(", got")[0])
    assert len(messages) == 1  # nothing is learnt of what is there
    for url in ("http://127.0.0.1/a.mp4", "https://a/b", "ftp://a/b", "0.mp4", "file://a/b.mp4"):
        with pytest.raises(openai.BadRequestError, match="url must be"):
            asked(here, video_part(url))


def test_large_videos_and_many(world, models, tmp_path):
    long = write_video(tmp_path / "long.mp4", 30)
    part = video_part(data_url(long))
    for limits, message in (
        ({"max_frames": 29}, "at most 29 frames, got 30"),
        ({"max_seconds": 2.5}, "at most 2.5 seconds, got 3.0"),
        ({"max_pixels": 48 * 72 - 1}, "at most 3455 pixels a frame, got 72 x 48"),
    ):
        with served(world, models, **limits) as here:
            with pytest.raises(openai.BadRequestError, match=message):
                asked(here, part)
            with pytest.raises(openai.BadRequestError, match=r"got 2|at most one video"):
                asked(here, part, part)
    with served(world, models, max_frames=30, max_seconds=3.0, max_pixels=48 * 72) as here:
        assert text_of(asked(here, part))


def test_large_requests_are_refused_at_once(here, world):
    begun = time.monotonic()
    status, body, _ = raw(here, "Content-Length: 2000000000")
    assert "413" in status
    assert body["error"]["message"] == "a request must be at most 64 MB"
    assert time.monotonic() - begun < 5
    with pytest.raises(AssertionError):  # the check below is able to fail
        assert "413" in raw(here, "Content-Length: 2", iter([b"{}"]))[0]


def test_an_endless_request_is_refused(world, models):
    with served(world, models, max_mb=1.0) as here:

        def endless() -> Iterator[bytes]:
            while True:
                yield b"10000\r\n" + b" " * 65536 + b"\r\n"

        status, body, sent = raw(here, "Transfer-Encoding: chunked", endless())
        assert "413" in status
        assert body["error"]["type"] == "invalid_request_error"
        assert 1e6 < sent < 40e6
        assert text_of(asked(here))
        # one that is large enough is told so by the client too
        with pytest.raises(openai.APIStatusError) as caught:
            asked(here, question="a" * 2_000_000)
        assert caught.value.status_code == 413


def test_other_bodies(here):
    for body, message in (
        (b"{", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff", "must be JSON"),
    ):
        status, found, _ = raw(here, f"Content-Length: {len(body)}", iter([body]))
        assert "400" in status
        assert message in found["error"]["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        here.client.post(
            "/chat/completions",
            cast_to=object,
            body={"model": "chat"},
            options={"headers": {"Content-Type": "text/plain"}},
        )
    assert caught.value.status_code == 415


def test_keys(world, models, monkeypatch):
    with served(world, models, api_key="right") as here:
        assert text_of(asked(here))
        for key in ("wrong", "righ", "rightt", "Bearer"):
            with openai.OpenAI(base_url=here.url, api_key=key, max_retries=0) as wrong:
                for call in (
                    lambda c: c.models.list(),
                    lambda c: c.embeddings.create(model="embed", input="a"),
                    lambda c: asked(SimpleNamespace(client=c)),
                ):
                    with pytest.raises(openai.AuthenticationError) as caught:
                        call(wrong)
                    assert caught.value.code == "invalid_api_key"
        status, _, _ = raw(here, "Content-Length: 2000000000")
        assert "401" in status
    monkeypatch.setenv("IV2_API_KEY", "other")
    server = http.build_app(Settings()).state.server
    assert server.key == "other"
    server.worker.stop()
    assert not server.worker.is_alive


def test_a_full_queue(world, models):
    with served(world, models, max_waiting=3) as here, ThreadPoolExecutor(3) as pool:
        with held(here):
            waiting = [pool.submit(asked, here) for _ in range(3)]
            until(lambda: here.state.open_requests == 3)
            with pytest.raises(openai.RateLimitError) as caught:
                asked(here)
            assert caught.value.code == "queue_full"
            assert caught.value.response.headers["retry-after"] == "1"
        assert len({text_of(w.result(WAIT)) for w in waiting}) == 1
        assert text_of(asked(here))


def test_time_is_limited(world, models, monkeypatch):
    with served(world, models) as here:

        def limit(seconds: float) -> None:
            here.state.settings = replace(here.state.settings, timeout=seconds)

        limit(0.3)
        for options in ({}, {"stream": True}):
            with held(here), pytest.raises(openai.APIStatusError) as caught:
                asked(here, **options)
            assert caught.value.status_code == 504
            assert caught.value.body["type"] == "timeout_error"
        # a body that does not come
        status, _, _ = raw(here, "Content-Length: 10")
        assert "504" in status
        # in the midst of a stream, and generation ends with it
        limit(1.5)
        taken = slowly(monkeypatch, 0.01)
        pieces = []
        with pytest.raises(openai.APIError, match="took too long"):
            pieces.extend(asked(here, max_tokens=400, stream=True))
        assert len(pieces) > 2
        limit(WAIT)
        assert text_of(asked(here, max_tokens=2))
        assert 2 < len(taken) < 200


def slowly(monkeypatch, seconds: float) -> list[int]:
    """Tokens take their time; the list grows with each."""
    taken: list[int] = []
    take = engine._Row.take

    def slow(self, token):
        taken.append(token)
        time.sleep(seconds)
        return take(self, token)

    monkeypatch.setattr(engine._Row, "take", slow)
    return taken


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(here, monkeypatch, stream):
    taken = slowly(monkeypatch, 0.005)
    body = {"model": "chat", "messages": [{"role": "user", "content": "up"}]}
    text = json.dumps({**body, "max_tokens": 450, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", here.port), timeout=WAIT) as link:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
        link.sendall(f"{head}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        until(lambda: len(taken) > 5)
    until(lambda: here.state.open_requests == 0)
    count = len(taken)
    assert count < 300
    assert text_of(asked(here, max_tokens=2))
    assert len(taken) <= count + 4


def test_no_cancellation_is_lost():
    """One that meets an event, as asyncio.wait_for of Python 3.11 loses it."""

    async def cancelled(turns: int) -> bool:
        told = http._Told(time.monotonic() + WAIT)
        task = asyncio.ensure_future(told.next())
        for _ in range(4):
            await asyncio.sleep(0)
        told._queue.put_nowait("piece")
        for _ in range(turns):
            await asyncio.sleep(0)
        lost = task.done()
        task.cancel()
        await asyncio.wait({task})
        return lost or task.cancelled()

    assert all(asyncio.run(cancelled(turns)) for turns in range(6))


def test_failures_are_logged_and_not_told(here, monkeypatch, caplog):
    def fail(chat, jobs):
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "_answer", fail)
    for stream in (False, True):
        caplog.clear()
        with caplog.at_level(logging.ERROR), pytest.raises(openai.InternalServerError) as caught:
            asked(here, stream=stream)
        assert "secret" not in caught.value.response.text
        assert "Traceback" not in caught.value.response.text
        assert caught.value.body["type"] == "server_error"
        until(lambda: "secret" in caplog.text)
        assert "Traceback" in caplog.text

    def fail_later(chat, jobs):
        jobs[0].tell("first")
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "_answer", fail_later)
    caplog.clear()
    with pytest.raises(openai.APIError, match="its log says why") as error:
        list(asked(here, stream=True))
    assert "secret" not in str(error.value)
    until(lambda: "secret" in caplog.text)
    monkeypatch.undo()
    assert text_of(asked(here))
