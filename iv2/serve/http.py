"""`iv2 serve`: chat and embeddings over HTTP, as OpenAI's clients ask for them.

A request is read, its video decoded in one of two threads, and its work put before the thread that
runs the models (``iv2.serve.engine``); what is told from there comes back through a queue.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iv2.serve.asked import (
    ApiError,
    Asked,
    MediaLimits,
    media_file,
    read_chat,
    read_embeddings,
    refuse,
    source_of,
    unreadable,
)
from iv2.serve.engine import Finished, Job, Worker, chat_job, embed_job

try:
    import anyio
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise RuntimeError("serve: fastapi must be installed: pip install iv2[serve]") from error

from iv2.data.decode import DecodeError
from iv2.serve.chat import VideoChat, Views
from iv2.stages.dual_encoder import DualEncoder, load_dual_encoder

_log = logging.getLogger("uvicorn.error")
_GONE = 499  # the client has left; nobody reads this


@dataclass(frozen=True)
class Settings:
    """Answer chat and embeddings requests of OpenAI's clients over HTTP."""

    # Folder of a stage-3 run, for chat.
    run: Path | None = None
    # Folder of a stage-2 or CLIP run, for embeddings.
    embed_run: Path | None = None
    # Folder of the pretrained language model; that of the run by default.
    lm: Path | None = None
    # Longest segment; a longer video is seen in several. 0: as one.
    seconds: float = 0.0
    # Where the models run.
    device: str = "cpu"
    # Address to listen at; others than this machine can reach 0.0.0.0.
    host: str = "127.0.0.1"
    # Port; 0 takes a free one.
    port: int = 8000
    # Clients must send it; the environment variable IV2_API_KEY by default, empty: none.
    api_key: str = ""
    # Folders whose files requests may name by path; none by default.
    allow_path: tuple[Path, ...] = ()
    # Largest request, in MB.
    max_mb: float = 64.0
    # Most seconds for a request.
    timeout: float = 120.0
    # Most requests at once, those being answered included; more are refused with 429.
    max_waiting: int = 64
    # Most questions answered as one batch.
    batch: int = 8
    # Longest video, in seconds.
    max_seconds: float = 3600.0
    # Most frames of a video.
    max_frames: int = 200_000
    # Most pixels of a frame.
    max_pixels: int = 4096 * 4096


def serve(settings: Settings) -> None:
    """Load the models and answer requests until interrupted.

    Raises:
        ValueError: No run is given, or a run cannot be used.
    """
    if not (settings.run or settings.embed_run):
        raise ValueError("serve: run or embed_run must be given, got neither")
    chat = encoder = None
    if settings.run:
        chat = VideoChat.load(settings.run, lm=settings.lm or "", device=settings.device)
        chat.seconds = settings.seconds
    if settings.embed_run:
        encoder = load_dual_encoder(settings.embed_run, device=settings.device)
    app = build_app(settings, chat, encoder)
    uvicorn.run(app, host=settings.host, port=settings.port, timeout_graceful_shutdown=5)


def build_app(
    settings: Settings,
    chat: VideoChat | None = None,
    encoder: tuple[DualEncoder, Any] | None = None,
) -> FastAPI:
    """The application; its models have the names of the folders of their runs.

    Args:
        settings: Limits, key and names; the models are not loaded from there.
        chat: Answers chat requests.
        encoder: As ``load_dual_encoder`` gives it; answers embeddings requests.
    """
    server = _Server(settings, chat, encoder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.stop()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_route("/health", server.health)
    app.add_route("/v1/models", server.models)
    app.add_route("/v1/models/{name}", server.models)
    for path, work in (("chat/completions", server.chat), ("embeddings", server.embeddings)):
        app.add_route(f"/v1/{path}", partial(server.answer, work=work), methods=["POST"])

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _Refusal(error, request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _Refusal(ApiError(error.status_code, str(error.detail)), request)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # starlette raises it again for the log
        return _Refusal(ApiError(500, "the server failed; its log says why"), request)

    return app


class _Refusal(JSONResponse):
    """An error; what the client still sends is read for a second, or it would not read this."""

    def __init__(self, error: ApiError, request: Request) -> None:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
        super().__init__(error.body(), error.status, headers.get(error.status))
        self._request = request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with anyio.move_on_after(1.0):
            while not getattr(self._request.state, "is_read", False):
                message = await receive()
                if not message.get("more_body"):
                    break
        await send({"type": "http.response.body", "body": b""})


class _Stream(StreamingResponse):
    """Server-sent events; `close` is called however it ends, begun or not."""

    def __init__(
        self, events: AsyncIterator[str], close: Callable[[], None], deadline: float
    ) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self.closing, self._deadline = [close], deadline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:  # a client that reads nothing ends too
            with anyio.move_on_after(max(0.0, self._deadline - time.monotonic()) + 5):
                await super().__call__(scope, receive, send)
        finally:
            for close in self.closing:
                close()


class _Told:
    """What the models' thread tells of one job, on the event loop."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.job: Job | None = None
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, event: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Any:
        event = await _within(self.deadline, self._queue.get())
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        if self.job:
            self.job.cancelled = True


async def _within(deadline: float, work: Awaitable[Any]) -> Any:
    try:
        # not asyncio.wait_for, which loses a cancellation that meets a result before Python 3.12
        with anyio.fail_after(max(0.0, deadline - time.monotonic())):
            return await work
    except TimeoutError:
        raise ApiError(504, "the request took too long", code="timeout") from None


class _Server:
    """The state of an application, and its endpoints."""

    def __init__(
        self,
        settings: Settings,
        chat: VideoChat | None,
        encoder: tuple[DualEncoder, Any] | None,
    ) -> None:
        self.settings, self.chat_model, self.encoder = settings, chat, encoder
        self.names: dict[str, str] = {}  # of a model: what it does
        if chat:
            self.names[(settings.run or Path("chat")).resolve().name] = "chat"
        if encoder:
            name = (settings.embed_run or Path("embed")).resolve().name
            self.names[name if name not in self.names else f"{name}-embed"] = "embeddings"
        self.key = settings.api_key or os.environ.get("IV2_API_KEY", "")
        if not self.key and settings.host not in ("127.0.0.1", "localhost", "::1"):
            _log.warning("serve: others can reach %s, and there is no API key", settings.host)
        self.limits = MediaLimits(
            settings.allow_path, settings.max_seconds, settings.max_frames, settings.max_pixels
        )
        self.worker = Worker(settings.batch)
        self.open_requests = 0
        self.created = int(time.time())
        self._decoders = anyio.CapacityLimiter(2)

    # ---- endpoints

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive
        body = {"status": "ok" if alive else "stopped", "requests": self.open_requests}
        return JSONResponse(body, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        about = {"object": "model", "created": self.created, "owned_by": "iv2"}
        name = request.path_params.get("name")
        if name is not None:
            self._check_model(name)
            return JSONResponse({"id": name, **about})
        return JSONResponse({"object": "list", "data": [{"id": n, **about} for n in self.names]})

    async def answer(self, request: Request, work: Callable[..., Awaitable[Response]]) -> Response:
        """A request to a model: what is refused at once, then ``work``, within the limits."""
        self._authorise(request)
        if self.open_requests >= self.settings.max_waiting:
            raise ApiError(429, "too many requests wait; try again", code="queue_full")
        deadline = time.monotonic() + self.settings.timeout
        self.open_requests += 1
        response = None
        try:
            payload = await _within(deadline, self._payload(request))
            task = asyncio.ensure_future(work(payload, deadline))
            response = await self._unless_gone(request, task)
            return response
        except DecodeError as error:
            raise unreadable(error.reason) from error
        finally:
            if isinstance(response, _Stream):
                response.closing.append(self._close)
            else:
                self._close()

    def _close(self) -> None:
        self.open_requests -= 1

    async def chat(self, payload: dict[str, Any], deadline: float) -> Response:
        self._check_model(payload.get("model"), "chat")
        chat = self.chat_model
        assert chat is not None
        asked = read_chat(payload)
        views = await _within(deadline, self._decoding(self._views, chat, asked))
        about: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        about["model"] = payload["model"]
        payload.clear()  # the video need not wait in the queue
        asked = replace(asked, urls=[])
        told = _Told(deadline)
        told.job = chat_job(chat, asked, views, told.tell, deadline)
        try:
            self.worker.put(told.job)
            first = await told.next()  # an error before it has a status of its own
            if asked.stream:
                events = _events(told, first, about, asked.include_usage)
                return _Stream(events, told.cancel, deadline)
            text = ""
            while not isinstance(first, Finished):
                text, first = text + first, await told.next()
        except BaseException:
            told.cancel()
            raise
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": first.reason, "logprobs": None}
        usage = _usage(first)
        return JSONResponse(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def embeddings(self, payload: dict[str, Any], deadline: float) -> Response:
        self._check_model(payload.get("model"), "embeddings")
        assert self.encoder is not None
        rows = read_embeddings(payload)
        if sum(kind == "media" for kind, _ in rows) > self.limits.files:
            raise refuse("input", f"at most {self.limits.files} files", "more", "embeddings")
        told = _Told(deadline)
        with TemporaryDirectory(prefix="iv2-serve-") as folder:
            files = partial(self._files, folder=Path(folder))
            urls = [url for kind, url in rows if kind == "media"]
            paths = iter(await _within(deadline, self._decoding(files, urls)))
            inputs = [next(paths) if kind == "media" else row for kind, row in rows]
            told.job = embed_job(self.encoder, inputs, told.tell, deadline)
            try:
                self.worker.put(told.job)
                features, tokens = await told.next()
            finally:
                told.cancel()
        width = features.shape[1]
        if payload.get("dimensions") not in (None, width):
            raise refuse("dimensions", f"{width}", payload["dimensions"], "embeddings")
        packed = payload.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _packed(x) if packed else x.tolist()}
            for i, x in enumerate(features)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse(
            {"object": "list", "data": data, "model": payload["model"], "usage": usage}
        )

    # ---- what they need

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise ApiError(401, "the API key must be that of the server", code="invalid_api_key")

    def _check_model(self, name: Any, work: str = "") -> None:
        known = [n for n, does in self.names.items() if work in ("", does)]
        if name not in known:
            error = refuse("model", f"one of {', '.join(known) or 'none'}", name, work or "models")
            raise ApiError(404, str(error), param="model", code="model_not_found")

    async def _payload(self, request: Request) -> dict[str, Any]:
        """The body, of which no more is ever held than is allowed."""
        most = int(self.settings.max_mb * 1e6)
        too_large = ApiError(413, f"a request must be at most {self.settings.max_mb:g} MB")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        # a page in a browser cannot send this kind without being asked about it first
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise ApiError(415, "the content type must be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        request.state.is_read = True
        try:
            payload = await anyio.to_thread.run_sync(json.loads, body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body must be JSON: {error}") from error
        if not isinstance(payload, dict):
            raise ApiError(400, "the body must be a JSON object")
        return payload

    async def _unless_gone(self, request: Request, task: asyncio.Future[Response]) -> Response:
        """The response, or none for a client that goes away first."""
        gone = asyncio.ensure_future(request.receive())  # nothing else comes after the body
        both: tuple[asyncio.Future[Any], ...] = (task, gone)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return Response(status_code=_GONE)
            return task.result()
        finally:
            for each in both:
                if not each.done():
                    each.cancel()
                    await asyncio.wait({each})

    async def _decoding(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """In a thread; one whose request is over goes on to its end, in its place of the two."""
        run = anyio.to_thread.run_sync
        return await run(work, *arguments, abandon_on_cancel=True, limiter=self._decoders)

    def _files(self, urls: list[str], folder: Path) -> list[Path]:
        return [media_file(url, folder, self.limits) for url in urls]

    def _views(self, chat: VideoChat, asked: Asked) -> Views | None:
        if len(asked.urls) > self.limits.files:
            raise refuse("messages", f"with at most {self.limits.files} pictures", "more")
        with TemporaryDirectory(prefix="iv2-serve-") as folder:
            size = 0 if chat.stage.config.tiles else chat.clip.short_side
            return chat.views(source_of(self._files(asked.urls, Path(folder)), size))


async def _events(
    told: _Told, event: Any, about: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of an answer, from its first piece."""
    about = {**about, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**about, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        while not isinstance(event, Finished):
            yield chunk({"content": event})
            event = await told.next()
    except Exception as error:
        if not isinstance(error, ApiError):
            _log.exception("serve: an answer failed")
            error = ApiError(500, "the server failed; its log says why")
        yield _event(error.body())
        return
    yield chunk({}, event.reason)
    if include_usage:
        yield _event({**about, "choices": [], "usage": _usage(event)})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(end: Finished) -> dict[str, int]:
    used = {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens}
    return {**used, "total_tokens": sum(used.values())}


def _packed(row: Any) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
