"""What a request to `iv2 serve` asks: its fields, its messages, its videos and pictures."""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from iv2.data.decode import DecodeError, Video, decode


class ApiError(Exception):
    """A request that is not answered: status, and an error in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        found = {"message": str(self), "type": kinds.get(self.status, kind)}
        return {"error": {**found, "param": self.param, "code": self.code}}


def refuse(param: str, expected: str, actual: Any, thing: str = "chat") -> ApiError:
    """A field that is not as it must be."""
    shown = actual if isinstance(actual, str) and len(actual) <= 200 else reprlib.repr(actual)
    return ApiError(400, f"{thing}: {param} must be {expected}, got {shown}", param=param)


@dataclass(frozen=True)
class MediaLimits:
    """Which videos and pictures are read."""

    # Folders whose files may be named by path.
    folders: tuple[Path, ...] = ()
    # Longest video, in seconds.
    seconds: float = 3600.0
    # Frames of a file.
    frames: int = 200_000
    # Pixels of a frame.
    pixels: int = 4096 * 4096
    # Videos and pictures of a request.
    files: int = 32


@dataclass(frozen=True)
class Asked:
    """A chat request."""

    question: str
    history: list[tuple[str, str]] = field(default_factory=list)
    system: str = ""
    # URLs of the one video, or of pictures.
    urls: list[str] = field(default_factory=list)
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    # A last piece of a stream with the counts.
    include_usage: bool = False


_MESSAGES, _LETTERS = 128, 400_000

# Fields that would change the answer, and their values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
}


def read_chat(payload: dict[str, Any]) -> Asked:
    """The fields of a chat request.

    Raises:
        ApiError: One is not as it must be.
    """
    for name, harmless in _UNSUPPORTED.items():
        if payload.get(name) not in harmless:
            expected = " or ".join("left out" if v is None else str(v) for v in harmless)
            raise refuse(name, expected, payload[name])
    options = payload.get("stream_options") or {}
    stop = payload.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(map(_is_words, stops)):
        raise refuse("stop", "a string or up to 4 of them, none empty", stop)
    most = "max_tokens" if payload.get("max_completion_tokens") is None else "max_completion_tokens"
    seed = payload.get("seed")
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
        raise refuse("seed", "a number of 64 bits", seed)
    stream = payload.get("stream") or False
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise refuse("stream", "true or false, its options an object", stream)
    top_p = _number(payload, "top_p", 1.0, 1.0)
    temperature = _number(payload, "temperature", 0.0, 2.0)
    if top_p <= 0:
        raise refuse("top_p", "above 0", top_p)
    return Asked(
        **_messages(payload.get("messages")),
        max_tokens=_count(payload, most, 128),
        temperature=temperature if temperature >= 0.01 else 0.0,  # below, logits overflow
        top_p=top_p,
        seed=seed,
        stops=tuple(stops),
        stream=stream,
        include_usage=options.get("include_usage") is True,
    )


def read_embeddings(payload: dict[str, Any]) -> list[tuple[str, str]]:
    """Inputs of an embeddings request: ("text", words) or ("media", URL).

    Raises:
        ApiError: One is neither a string nor a video or picture.
    """
    given = payload.get("input")
    rows = given if isinstance(given, list) else [given]
    if not 1 <= len(rows) <= 2048:
        raise refuse("input", "1 to 2048 inputs", f"{len(rows)}", "embeddings")
    if payload.get("encoding_format") not in (None, "float", "base64"):
        raise refuse("encoding_format", "float or base64", payload["encoding_format"], "embeddings")
    found = []
    for row in rows:
        if isinstance(row, str) and 0 < len(row) <= _LETTERS:
            found.append(("text", row))
            continue
        if not isinstance(row, dict):
            raise refuse("input", "strings, video_url or image_url objects", row, "embeddings")
        found.append(("media", _url(row, "input")))
    return found


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _number(payload: dict[str, Any], name: str, default: float, most: float) -> float:
    value = payload.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise refuse(name, f"a number from 0 to {most:g}", value)
    return float(value)


def _count(payload: dict[str, Any], name: str, default: int) -> int:
    value = payload.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise refuse(name, "a whole number above 0", value)
    return value


def _url(part: dict[str, Any], param: str) -> str:
    """Of a part {"type": "video_url", "video_url": {"url": ...}}, or of a picture."""
    kind = part.get("type")
    if kind not in ("video_url", "image_url"):
        raise refuse(param, "of type text, image_url or video_url", kind)
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise refuse(param, f'a part with {{"{kind}": {{"url": ...}}}}', url)
    return url


def _messages(messages: Any) -> dict[str, Any]:
    """System, history, question and URLs."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise refuse("messages", "a list of objects", messages)
    if len(messages) > _MESSAGES:  # early rounds that do not fit are left out one by one
        raise refuse("messages", f"at most {_MESSAGES}", len(messages))
    system: list[str] = []
    said: list[tuple[Any, str]] = []
    urls: list[str] = []
    videos = 0
    for message in messages:
        text, parts = _content(message.get("content"))
        kinds = [part["type"] for part in parts]
        if message.get("role") in ("system", "developer") and not said and not parts:
            system.append(text)
            continue
        if parts and (urls or message.get("role") != "user"):
            raise refuse("messages", "with pictures or a video in one user message", "more")
        urls += [_url(part, "messages") for part in parts]
        videos += kinds.count("video_url")
        said.append((message.get("role"), text))
    roles = [role for role, _ in said]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        expected = "a system message or none, then user and assistant in turn, the user's last"
        raise refuse("messages", expected, ", ".join(map(str, roles)) or "none")
    if videos and len(urls) > 1:
        raise refuse("messages", "with at most one video, or pictures alone", f"{len(urls)} parts")
    texts = [text for _, text in said]
    if sum(map(len, [*system, *texts])) > _LETTERS:
        raise refuse("messages", f"at most {_LETTERS} letters of text", "more")
    history = list(zip(texts[0:-1:2], texts[1::2], strict=True))
    return {
        "question": texts[-1],
        "history": history,
        "system": "\n".join(system),
        "urls": urls,
    }


def _content(content: Any) -> tuple[str, list[dict[str, Any]]]:
    """Text of a message, its parts joined, and its other parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
        raise refuse("messages", "with content that is text or a list of parts", content)
    texts = [p.get("text") for p in content if p.get("type") == "text"]
    if not all(isinstance(t, str) for t in texts):
        raise refuse("messages", "with text in the parts of type text", texts)
    others = [p for p in content if p.get("type") != "text"]
    for part in others:
        _url(part, "messages")
    return "\n".join(map(str, texts)), others


# ---- files


def media_file(url: str, folder: Path, limits: MediaLimits) -> Path:
    """The file of a URL: data is written into the folder, a path must be in an allowed one.

    Raises:
        ApiError: It is refused, or too large a video to read.
    """
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise refuse("url", "data:TYPE;base64,DATA", url)
        path = folder / f"media{len(list(folder.iterdir()))}"
        try:
            path.write_bytes(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError) as error:
            raise refuse("url", f"base64 ({error})", url) from error
    else:
        path = _allowed(url, limits.folders)
    _check_kind(path)
    try:
        with Video(path) as video:
            if video.num_frames > limits.frames:
                raise refuse("video", f"at most {limits.frames} frames", video.num_frames)
            found = video.info()
    except DecodeError as error:
        raise unreadable(error.reason) from error
    if found.duration > limits.seconds + 1e-6:
        raise refuse("video", f"at most {limits.seconds:g} seconds", f"{found.duration:.1f}")
    if found.width * found.height > limits.pixels:
        size = f"{found.width} x {found.height}"
        raise refuse("video", f"at most {limits.pixels} pixels a frame", size)
    return path


def unreadable(reason: str) -> ApiError:
    """A video that the decoder cannot read."""
    return refuse("video", f"one that can be decoded ({reason})", "a broken one")


def _allowed(url: str, folders: Sequence[Path]) -> Path:
    parts = urlsplit(url) if url.startswith("file:") else None
    if parts is not None and parts.netloc not in ("", "localhost"):
        raise refuse("url", "of this machine", url)
    name = url if parts is None else unquote(parts.path)
    if "://" in name or not name.startswith("/"):
        raise refuse("url", "data:TYPE;base64,DATA or an allowed path; URLs are not fetched", url)
    try:
        path = Path(name).resolve()  # behind links and ..
        if any(path.is_relative_to(f.resolve()) for f in folders) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, a loop
        pass
    # the same words whether it is there or not
    raise refuse("url", "a file in a folder that --allow-path names", name)


_MAGIC = (  # where and what
    *((0, m) for m in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"\x1aE\xdf\xa3")),
    *((4, b) for b in (b"ftyp", b"moov", b"wide", b"free", b"skip", b"mdat")),
    *((0, m) for m in (b"OggS\0", b"FLV\x01", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"0&\xb2u\x8e")),
    *((8, b) for b in (b"AVI ", b"WEBP")),
    (188, b"G"),  # packets of a transport stream
)
# Words of formats that make FFmpeg open other files or addresses.
_LEADING_ON = (b"c=in ip", b"<mpd", b"<compositionplaylist", b"#extm3u", b"ffconcat")


def _check_kind(path: Path) -> None:
    """Refuse what is no video or picture: playlists would make the decoder open other files."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    known = any(head[at : at + len(magic)] == magic for at, magic in _MAGIC)
    text = head.split(b"\0", 1)[0].lower()  # FFmpeg reads text up to there
    if not known or any(word in text for word in _LEADING_ON):
        raise refuse("video", "a video or picture of a known kind", f"{head[:8]!r}")


def source_of(paths: Sequence[Path], size: int) -> Path | torch.Tensor | None:
    """The one file, nothing, or pictures as the frames of a video, in the size of the first.

    Args:
        paths: The files.
        size: Longest short side of pictures that become frames; 0: 1024.

    Raises:
        ApiError: A picture cannot be decoded.
    """
    if len(paths) < 2:
        return paths[0] if paths else None
    try:
        frames = [decode(paths[0], [0], size or 1024)]
        height, width = frames[0].shape[1:3]
        frames += [decode(path, [0], (height, width)) for path in paths[1:]]
    except DecodeError as error:
        raise unreadable(error.reason) from error
    return torch.cat(frames)
