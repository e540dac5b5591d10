"""`iv2 serve` asked by OpenAI's own client: answers, streams, embeddings, the command."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import av
import openai
import pytest
import torch
import uvicorn
from tiny_http import (
    WAIT,
    asked,
    data_url,
    held,
    image_part,
    load,
    served,
    text_of,
    until,
    video_part,
    write_world,
)

from iv2 import cli
from iv2.data.decode import decode
from iv2.eval.retrieval import encode_texts
from iv2.serve import engine
from iv2.serve.chat import VideoChat
from iv2.serve.index import embed


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


def test_chat_about_a_video_is_what_videochat_says(here, models, world):
    chat, _ = models
    answers = set()
    for name in ("0.mp4", "1.mp4"):
        path = world / "videos" / name
        found = asked(here, video_part(data_url(path)))
        expected = chat.ask(path, "red bar left", max_new_tokens=12)
        assert text_of(found) == expected
        answers.add(expected)
    answers.add(text_of(asked(here)))
    assert text_of(asked(here)) == chat.ask(None, "red bar left", max_new_tokens=12)
    assert len(answers) == 3  # otherwise the video would not be seen
    assert found.model == "chat"
    assert found.choices[0].finish_reason == "length"
    prompt, _ = chat.prompt(chat.views(path), "red bar left", (), 12)
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == 12 + len(prompt)


def test_system_and_history_are_seen(here, models, world):
    chat, _ = models
    path = world / "videos" / "0.mp4"
    messages = [
        {"role": "system", "content": "green cross"},
        {"role": "user", "content": [video_part(data_url(path)), {"type": "text", "text": "red"}]},
        {"role": "assistant", "content": "bar"},
        {"role": "user", "content": "up"},
    ]
    found = here.client.chat.completions.create(
        model="chat", messages=messages, max_completion_tokens=9
    )
    own = VideoChat(chat.stage, chat.clip, system="green cross")
    expected = own.ask(path, "up", [("red", "bar")], max_new_tokens=9)
    assert text_of(found) == expected
    assert expected != chat.ask(path, "up", [("red", "bar")], max_new_tokens=9)
    assert expected != own.ask(path, "up", max_new_tokens=9)


def test_a_stream_is_the_answer_in_pieces(here, world):
    part = video_part(data_url(world / "videos" / "1.mp4"))
    whole = asked(here, part)
    usage = {"include_usage": True}
    chunks = list(asked(here, part, stream=True, stream_options=usage))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == text_of(whole)
    assert sum(map(bool, pieces)) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    with here.client.chat.completions.with_streaming_response.create(
        model="chat", messages=[{"role": "user", "content": "up"}], max_tokens=3, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
        assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_pictures(here, models, tmp_path, world):
    chat, _ = models
    frames = decode(world / "videos" / "0.mp4", [1, 9])
    paths = []
    for i, frame in enumerate(frames):
        paths.append(tmp_path / f"{i}.png")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy())))
    one, two = (image_part(data_url(path, "image/png")) for path in paths)
    first = text_of(asked(here, one))
    assert first == chat.ask(frames[:1], "red bar left", max_new_tokens=12)
    # several are the frames of a video
    both = text_of(asked(here, one, two))
    assert both == chat.ask(frames, "red bar left", max_new_tokens=12)
    assert both != first


def test_stops(here, models):
    whole = text_of(asked(here))
    first, *rest = whole.split()
    word = next(w for w in rest if len(w) > 2 and w not in first)
    # in a word, and over several, of which the first must not be given away before the last comes
    for stop in (word, word[1:], " ".join(rest[:4]), f"{rest[0]} {rest[1]} nothing {rest[2]}"):
        given = ["zzz", stop] if stop == word else stop
        wanted = whole.partition(stop)[0].rstrip()
        found = asked(here, stop=given)
        assert text_of(found) == wanted
        assert found.choices[0].finish_reason == ("stop" if stop in whole else "length")
        pieces = [c.choices[0].delta.content or "" for c in asked(here, stop=given, stream=True)]
        assert "".join(pieces) == wanted
        assert (found.usage.completion_tokens < 12) == (stop in whole)


def test_sampling(here):
    drawn = [text_of(asked(here, temperature=2.0, seed=s, max_tokens=20)) for s in (1, 1, 2)]
    greedy = text_of(asked(here, max_tokens=20))
    assert drawn[0] == drawn[1] != drawn[2]
    # of the likeliest token alone nothing else can be drawn
    assert text_of(asked(here, temperature=2.0, top_p=1e-6, max_tokens=20)) == greedy
    assert greedy not in drawn


def test_32_at_once_are_all_answered_in_batches(here, models, monkeypatch):
    chat, _ = models
    words = ("red", "green", "bar", "cross", "left", "right", "up", "bell")
    questions = [f"{words[i % 8]} {words[i // 8]} {words[(i * 3) % 8]}" for i in range(32)]
    sizes = []
    answer = engine._answer

    def counted(chat, jobs):
        sizes.append(len(jobs))
        answer(chat, jobs)

    monkeypatch.setattr(engine, "_answer", counted)
    with ThreadPoolExecutor(32) as pool:
        with held(here):
            waiting = [pool.submit(asked, here, question=q) for q in questions]
            until(lambda: len(here.state.worker._jobs) == 32)
        found = [text_of(w.result(WAIT)) for w in waiting]
    assert sizes == [8] * 4
    assert found == [chat.ask(None, q, max_new_tokens=12) for q in questions]
    assert len(set(found)) > 16


# ---- embeddings, models, health


def test_embeddings_of_words_and_videos(here, models, world):
    stage, config = models[1]
    texts = ["a red bar", "green cross left"]
    path = world / "videos" / "0.mp4"
    expected = encode_texts(stage, texts, keep_hidden=False).features
    seen = embed(stage, path, config.data.clip).features
    create = here.client.embeddings.create
    # the client asks for base64 unless told otherwise
    found = create(model="embed", input=texts)
    torch.testing.assert_close(torch.tensor([d.embedding for d in found.data]), expected)
    assert [d.index for d in found.data] == [0, 1]
    assert found.usage.prompt_tokens == len(stage.tokenizer.encode(texts, 32).ids)
    mixed = [texts[1], video_part(data_url(path)), texts[0]]
    found = create(model="embed", input=mixed, encoding_format="float")
    rows = torch.tensor([d.embedding for d in found.data])
    torch.testing.assert_close(rows, torch.stack([expected[1], seen[0], expected[0]]))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    alone = create(model="embed", input=texts[0], dimensions=16).data[0].embedding
    torch.testing.assert_close(torch.tensor(alone), expected[0])
    for wrong in ([1, 2], [], "", [video_part("http://a/b.mp4")]):
        with pytest.raises(openai.BadRequestError, match=r"must be .*, got"):
            create(model="embed", input=wrong)
    with pytest.raises(openai.BadRequestError, match="dimensions must be 16, got 8"):
        create(model="embed", input="a", dimensions=8)
    with pytest.raises(openai.NotFoundError):
        create(model="chat", input="a")


def test_models_and_health(here):
    assert [m.id for m in here.client.models.list()] == ["chat", "embed"]
    assert here.client.models.retrieve("embed").id == "embed"
    for call in (lambda: here.client.models.retrieve("gpt"), lambda: asked(here, model="gpt")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        here.client.post("/nothing", cast_to=object, body={})
    health = here.client.get("/../health", cast_to=object)
    assert health == {"status": "ok", "requests": 0}


def test_command(world, monkeypatch):
    started = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.append((app, options)))
    monkeypatch.setenv("IV2_API_KEY", "")
    runs = ["--run", str(world / "chat"), "--embed-run", str(world / "embed")]
    cli.main(["serve", *runs, "--port", "0", "--max-mb", "3", "--allow-path", str(world), "/a"])
    ((app, options),) = started
    server = app.state.server
    assert server.names == {"chat": "chat", "embed": "embeddings"}
    assert options["host"] == "127.0.0.1"
    assert server.settings.max_mb == 3
    assert [str(p) for p in server.limits.folders] == [str(world), "/a"]
    server.worker.stop()
    with pytest.raises(SystemExit, match="run or embed_run must be given, got neither"):
        cli.main(["serve"])
    for name in ("iv2.serve.http", "fastapi"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit, match=r"pip install iv2\[serve\]"):
        cli.main(["serve", *runs])
