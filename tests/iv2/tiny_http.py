"""A server of tiny runs on a free port, and ways to ask it."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import openai
import torch
import uvicorn
from tiny_stage2 import AUDIO_TINY, TEXT_TINY, VISION, tiny_model, write_vocabulary
from tiny_stage2 import CONFIG as STAGE2
from tiny_stage3 import CONFIG, tiny_stage

from iv2.checkpoint import save_weights
from iv2.config import DataConfig, TrainConfig, to_json
from iv2.data.dataset import ClipConfig
from iv2.data.transforms import CropConfig
from iv2.serve import engine, http
from iv2.serve.chat import VideoChat
from iv2.serve.http import Settings
from iv2.stages.dual_encoder import load_dual_encoder

WAIT = 60  # seconds, for what takes milliseconds


def write_world(folder: Path) -> Path:
    """A stage-3 run whose answers depend on all they should, a stage-2 run, videos."""
    torch.set_num_threads(1)
    write_vocabulary(folder)
    for name in ("chat", "embed", "videos"):
        (folder / name).mkdir()
    own = replace(CONFIG, lm=replace(CONFIG.lm, folder=str(folder)))
    clip = ClipConfig(num_frames=4, sampling="interval", crop=CropConfig("whole", 28), min_frames=1)
    data = DataConfig(clip=clip)
    stage = tiny_stage(folder)
    with torch.no_grad():
        stage.model.lm.lm_head.weight.mul_(20)
        for parameter in stage.model.lm.model.layers.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        stage.model.project_up.weight.mul_(100)
        stage.model.vision_encoder.patch_embed.proj.weight.mul_(30)
        for name, parameter in stage.model.qformer.named_parameters():
            parameter.mul_(100 if "crossattention.self.value.weight" in name else 1)
        stage.model.lm.lm_head.weight[stage.conversation.stop_ids] *= 0.05
    chat = TrainConfig(stage="stage3", model=VISION, data=data, stage3=own)
    (folder / "chat" / "config.json").write_text(to_json(chat))
    save_weights(stage.model.state_dict(), folder / "chat" / "model.safetensors")
    towers = TrainConfig(
        stage="stage2", model=VISION, text=TEXT_TINY, audio=AUDIO_TINY, data=data, stage2=STAGE2
    )
    (folder / "embed" / "config.json").write_text(to_json(towers))
    save_weights(tiny_model(folder).model.state_dict(), folder / "embed" / "model.safetensors")
    write_vocabulary(folder / "embed")
    for i, colour in enumerate((0, 120)):
        path = folder / "videos" / f"{i}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for number in range(12):
                pixels = np.full((48, 64, 3), colour, np.uint8)
                pixels[:, number * 5 : number * 5 + 8] = (255, 255 - colour, number * 20)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
    return folder


def load(world: Path):
    return VideoChat.load(world / "chat"), load_dual_encoder(world / "embed")


@contextmanager
def served(world, models, **settings) -> Iterator[SimpleNamespace]:
    """A server on a free port: its state, port, and a client."""
    settings = Settings(run=world / "chat", embed_run=world / "embed", **settings)
    app = http.build_app(settings, *models)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    key = settings.api_key or "none"
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=WAIT)
    try:
        with client:
            yield SimpleNamespace(state=app.state.server, port=port, client=client, url=url)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()


def until(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def data_url(path, kind="video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video_part(url) -> dict:
    return {"type": "video_url", "video_url": {"url": str(url)}}


def image_part(url) -> dict:
    return {"type": "image_url", "image_url": {"url": str(url)}}


def asked(here, *parts, question="red bar left", **options):
    content = [*parts, {"type": "text", "text": question}] if parts else question
    options = {"max_tokens": 12, "model": "chat", **options}
    messages = [{"role": "user", "content": content}]
    return here.client.chat.completions.create(**{"messages": messages, **options})


def text_of(completion) -> str:
    return completion.choices[0].message.content


@contextmanager
def held(here) -> Iterator[None]:
    """The models' thread is busy."""
    gate, begun = threading.Event(), threading.Event()

    def run(jobs) -> None:
        begun.set()
        gate.wait(WAIT)

    here.state.worker.put(engine.Job(run, lambda event: None, time.monotonic() + WAIT))
    assert begun.wait(WAIT)
    try:
        yield
    finally:
        gate.set()


def raw(here, head: str, body: Iterator[bytes] | None = None) -> tuple[str, dict, int]:
    """Status line, JSON and bytes sent of a request that is sent until it is answered."""
    sent = 0
    body = body or iter(())
    with socket.create_connection(("127.0.0.1", here.port), timeout=WAIT) as link:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
        link.sendall("\r\n".join([*lines, head, "", ""]).encode())
        link.setblocking(False)
        found = b""
        end = time.monotonic() + WAIT
        while b"}}" not in found:
            assert time.monotonic() < end
            try:
                found += link.recv(65536)
                continue
            except BlockingIOError:
                pass
            piece = next(body, b"")
            link.setblocking(True)
            try:
                link.sendall(piece)
            finally:
                link.setblocking(False)
            sent += len(piece)
            if not piece:
                time.sleep(0.002)
    status, _, rest = found.partition(b"\r\n")
    return status.decode(), json.loads(rest[rest.index(b"{") :]), sent
