"""The one thread of `iv2 serve` that runs models: its queue, answers in batches, embeddings."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iv2.eval.retrieval import encode_texts
from iv2.serve.asked import ApiError, Asked, unreadable
from iv2.serve.chat import Prompt, Sampling, VideoChat, Views
from iv2.serve.index import embed
from iv2.stages.conversation import ConversationTooLongError
from iv2.stages.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Finished:
    """The last thing told of an answer."""

    # "stop" or "length".
    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class Job:
    """Work for the thread."""

    # Called with [self] and others of an equal key.
    run: Callable[[list[Any]], None]
    # Takes pieces of the answer, at last what it ends with; an exception if it failed.
    tell: Callable[[Any], None]
    # On the clock of time.monotonic; nothing is done for it afterwards.
    deadline: float
    # None: alone.
    key: Hashable = None
    cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.cancelled or time.monotonic() > self.deadline


@dataclass(eq=False)
class ChatJob(Job):
    """A question to answer."""

    asked: Asked = field(default_factory=lambda: Asked(""))
    views: Views | None = None


class Worker:
    """A thread that does jobs in the order they came; those of equal keys together.

    Args:
        batch: Most jobs done together.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._jobs: deque[Job] = deque()
        self._taken: list[Job] = []
        self._ready = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="iv2-serve", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, job: Job) -> None:
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def stop(self) -> None:
        """End; answers at hand stop where they are."""
        with self._ready:
            self._open = False
            for job in (*self._taken, *self._jobs):
                job.cancelled = True
            self._ready.notify()
        self._thread.join(5)

    def _work(self) -> None:
        while jobs := self._take():
            try:
                jobs[0].run(jobs)
            except Exception as error:
                for job in jobs:
                    job.tell(error)

    def _take(self) -> list[Job]:
        with self._ready:
            while self._open:
                waiting = [job for job in self._jobs if not job.is_over]
                if waiting:
                    first = waiting[0]
                    same = [job for job in waiting[1:] if job.key == first.key is not None]
                    taken = [first, *same[: self.batch - 1]]
                    self._jobs = deque(job for job in waiting if job not in taken)
                    self._taken = taken
                    return taken
                self._jobs.clear()
                self._ready.wait()
        return []


# ---- answers


def chat_job(
    chat: VideoChat,
    asked: Asked,
    views: Views | None,
    tell: Callable[[Any], None],
    deadline: float,
) -> ChatJob:
    """An answer to a question; only requests without a seed share a batch."""
    # of one length, so that no row is driven behind the end of its positions
    key = (asked.max_tokens, asked.temperature, asked.top_p) if asked.seed is None else None
    return ChatJob(partial(_answer, chat), tell, deadline, key, asked=asked, views=views)


@torch.no_grad()
def _answer(chat: VideoChat, jobs: list[ChatJob]) -> None:
    """Prompts, and generation as one batch. What is wrong with one job ends that alone."""
    prompts, rows = [], []
    for job in jobs:
        asked, own = job.asked, copy(chat)
        own.system = asked.system or chat.system
        try:
            prompt = own.prompt(job.views, asked.question, asked.history, asked.max_tokens)
        except ConversationTooLongError as error:
            code = "context_length_exceeded"
            job.tell(ApiError(400, str(error), param="messages", code=code))
        except ValueError as error:
            job.tell(ApiError(400, str(error)))
        except Exception as error:
            job.tell(error)
        else:
            prompts.append(prompt)
            rows.append(_Row(job, chat, len(prompt[0])))
    if not rows:
        return
    seed = rows[0].job.asked.seed
    if seed is None:
        _generate(chat, prompts, rows)
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _generate(chat, prompts, rows)


def _generate(chat: VideoChat, prompts: list[Prompt], rows: list[_Row]) -> None:
    """All answers, each row watched as it grows."""
    asked = rows[0].job.asked
    sampling = Sampling(asked.max_tokens, asked.temperature, asked.top_p)
    chat.generate(prompts, sampling, stopping_criteria=[_Watch(rows)])
    for each in rows:
        each.end("length")


class _Watch:
    """Gives each row its new token; what transformers calls a stopping criterion."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:  # ids [B, tokens so far]
        new = ids[:, -1].tolist()
        done = [row.take(token) for row, token in zip(self.rows, new, strict=True)]
        return torch.tensor(done, device=ids.device)


class _Row:
    """An answer as it grows."""

    def __init__(self, job: ChatJob, chat: VideoChat, prompt_tokens: int) -> None:
        self.job, self.prompt_tokens = job, prompt_tokens
        self._tokenizer, self._ends = chat.stage.language_tokenizer, chat.stage.conversation
        self._ids: list[int] = []
        self._given = ""
        self._done = False

    def take(self, token: int) -> bool:
        """Whether the answer has ended."""
        if self._done or self.job.is_over:
            self._done = True
        elif token in self._ends.stop_ids:
            self.end("stop")
        else:
            self._ids.append(token)
            text = self._text()
            if self._cut(text) < len(text):
                self.end("stop")
            else:  # the last word may still grow, be half a character or the start of a stop
                held = max((_overlap(text, s) for s in self.job.asked.stops), default=0)
                self._give(text[: min(max(0, text.rfind(" ")), len(text) - held)].rstrip())
        return self._done

    def end(self, reason: str) -> None:
        if self._done:
            return
        self._done = True
        text = self._text()
        self._give(text[: self._cut(text)].rstrip())
        self.job.tell(Finished(reason, self.prompt_tokens, len(self._ids)))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _cut(self, text: str) -> int:
        """Where the first stop begins."""
        places = [text.find(stop) for stop in self.job.asked.stops]
        return min((p for p in places if p >= 0), default=len(text))

    def _give(self, text: str) -> None:
        if len(text) > len(self._given):
            self.job.tell(text[len(self._given) :])
            self._given = text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of the stop that the text ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


# ---- embeddings


def embed_job(
    encoder: tuple[DualEncoder, Any],
    inputs: Sequence[str | Path],
    tell: Callable[[Any], None],
    deadline: float,
) -> Job:
    """Features [N, D] of texts and files, and the number of words' tokens."""

    def run(jobs: list[Job]) -> None:
        tell(_features(*encoder, inputs, jobs[0]))

    return Job(run, tell, deadline)


@torch.no_grad()
def _features(
    stage: DualEncoder, config: Any, inputs: Sequence[str | Path], job: Job
) -> tuple[Tensor, int]:
    texts = [x for x in inputs if isinstance(x, str)]
    found: dict[int, Tensor] = {}
    tokens = 0
    if texts:
        rows = iter(encode_texts(stage, texts, keep_hidden=False).features)
        found = {i: next(rows) for i, x in enumerate(inputs) if isinstance(x, str)}
        tokens = len(stage.tokenizer.encode(texts, stage.config.max_tokens).ids)
    for i, path in enumerate(inputs):
        if isinstance(path, Path) and not job.is_over:
            try:
                index = embed(stage, path, config.data.clip, seconds=float("inf"))
            except ValueError as error:
                raise unreadable(str(error).rpartition(f"{path}: ")[2]) from error
            found[i] = index.features[0]
    if job.is_over:
        raise ApiError(504, "the request took too long")
    return torch.stack([found[i].float() for i in range(len(inputs))]), tokens
