"""`iv2 chat` and `iv2 caption`: questions about videos, answered by a stage-3 model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iv2.data.clips import interval_indices, sparse_test_indices, tsn_indices
from iv2.data.decode import Video
from iv2.data.loader import ClipConfig
from iv2.data.transforms import Box, View, look
from iv2.models.language import base
from iv2.stages.conversation import Message, Tokens
from iv2.stages.stage3 import Stage3, load_stage3
from iv2.stages.tiles import tiles

# A file, uint8 frames [T, H, W, 3], or nothing: a question about nothing seen.
Source = str | Path | Tensor | None

_AT_ONCE = 16  # views in a pass through the video encoder


@dataclass(frozen=True)
class Views:
    """What is looked at of a video."""

    # uint8 [V, T, H, W, 3] | float [V, 3, T, H, W]
    pixels: Tensor
    # What is said of them, empty unless there are several segments.
    note: str


class VideoChat:
    """Answers questions about videos.

    Examples::

        chat = VideoChat.load("runs/stage3-tiny")
        print(chat.ask("clip.mp4", "what moves ?"))
        chat.ask("clip.mp4", "and where ?", history=[("what moves ?", "a red bar")])

    Args:
        stage: In evaluation mode.
        clip: Frames and size that the model was trained with.
        system: The system's message; empty for none.
        seconds: Longest segment; a longer video is seen in equal segments, each with its own
            embeddings and their times in the prompt. 0: any video is one.
    """

    def __init__(
        self, stage: Stage3, clip: ClipConfig, *, system: str = "", seconds: float = 0.0
    ) -> None:
        self.stage, self.clip, self.system, self.seconds = stage, clip, system, seconds

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        *,
        weights: str | Path = "",
        lm: str | Path = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VideoChat:
        """The model of a run; arguments and errors are those of ``load_stage3``.

        Args:
            run_dir: Folder of the run.
            weights: A file to load instead of its model.safetensors.
            lm: Folder of the pretrained language model; empty takes the run's.
            device: Where it runs.
            dtype: Of the parameters.
        """
        stage, config = load_stage3(run_dir, weights=weights, lm=lm, device=device)
        stage.model.to(dtype)
        return cls(stage, config.data.clip)

    def ask(
        self,
        video: Source,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The answer to a question.

        Args:
            video: What is asked about.
            question: The question.
            history: Questions and answers before it; early ones are left out when they are too
                long for the language model.
            max_new_tokens: Longest answer, in tokens.
            temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, with
                torch's generator.
            stream: Called with each new piece of the answer.

        Raises:
            DecodeError: The video cannot be read.
            ValueError: The question is too long for the language model.
        """
        prompt = self._prompt(self.views(video), question, history, max_new_tokens)
        streamer = None if stream is None else _Streamer(self.stage.language_tokenizer, stream)
        return self._generate([prompt], max_new_tokens, temperature, streamer)[0]

    def answers(
        self,
        pairs: Sequence[tuple[Source, str]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answers to one question about each of several videos, as one batch.

        Args and errors are those of ``ask``.
        """
        prompts = [self._prompt(self.views(v), q, (), max_new_tokens) for v, q in pairs]
        return self._generate(prompts, max_new_tokens, temperature, None) if prompts else []

    def views(self, video: Source) -> Views | None:
        """Segments and tiles of a video, as the encoder takes them."""
        if video is None:
            return None
        if isinstance(video, Tensor):
            return Views(self._look(video[self._numbers(len(video))]), "")
        with Video(str(video)) as file:
            count = 1
            if self.seconds:
                count = max(1, math.ceil(file.info().duration / self.seconds - 1e-6))
            edges = [file.num_frames * i // count for i in range(count + 1)]
            edges = sorted(set(edges))  # fewer frames than segments
            size = None if self.stage.config.tiles else self.clip.short_side or None
            seen = [
                self._look(file.frames([low + i for i in self._numbers(high - low)], size))
                for low, high in pairwise(edges)
            ]
            times = [*(file.times[low] for low in edges[:-1]), file.info().duration]
        parts = [f"{a:.1f}-{b:.1f}" for a, b in pairwise(times)]
        note = f"The video is in {len(parts)} segments, of seconds {', '.join(parts)}."
        return Views(torch.cat(seen), note if len(parts) > 1 else "")

    def _numbers(self, frames: int) -> list[int]:
        """Frames of a segment by the rule of training, without its draws."""
        count = self.clip.num_frames
        if self.clip.sampling == "tsn":
            return tsn_indices(frames, count)
        rule = interval_indices if self.clip.sampling == "interval" else sparse_test_indices
        return rule(frames, count)

    def _look(self, frames: Tensor) -> Tensor:
        """Views of one segment: its tiles, or the whole of its frames."""
        if self.stage.config.tiles:
            side = self.stage.model.vision_encoder.config.img_size
            return tiles(frames, self.stage.config.tiles, side)
        crop, (_, height, width, _) = self.clip.crop, frames.shape
        view = View(Box(0, 0, height, width), (crop.size, crop.size), False, crop.interpolation)
        dtype = torch.float32 if self.clip.normalise else torch.uint8
        return look(frames, view, dtype=dtype)[None]

    def _prompt(
        self,
        views: Views | None,
        question: str,
        history: Sequence[tuple[str, str]],
        max_new_tokens: int,
    ) -> tuple[Tokens, Tensor | None]:
        """Tokens, and the embeddings [V, Q, C] of the views."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for before, answer in history:
            messages.append({"role": "user", "content": before})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
        stage = self.stage
        room = getattr(base(stage.model.lm).config, "max_position_embeddings", 0)
        if room and room <= max_new_tokens:
            raise ValueError(
                f"VideoChat: max_new_tokens must be below the language model's {room}, "
                f"got {max_new_tokens}"
            )
        tokens = stage.conversation.tokens(
            messages,
            0 if views is None else len(views.pixels),
            note="" if views is None else views.note,
            max_tokens=room - max_new_tokens if room else 0,
        )
        if views is None:
            return tokens, None
        device = stage.model.project_up.weight.device
        with torch.no_grad():
            found = [
                stage.see(part[None].to(device), [messages])
                for part in torch.split(views.pixels, _AT_ONCE)
            ]
        return tokens, torch.cat(found)

    @torch.no_grad()
    def _generate(
        self,
        prompts: list[tuple[Tokens, Tensor | None]],
        max_new_tokens: int,
        temperature: float,
        streamer: Any,
    ) -> list[str]:
        model, tokenizer = self.stage.model, self.stage.language_tokenizer
        device = model.project_up.weight.device
        longest = max(len(tokens) for tokens, _ in prompts)
        inputs, seen = [], torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, (tokens, video) in enumerate(prompts):  # padded at the left
            ids = torch.tensor([tokens.ids], device=device)
            places = torch.tensor([tokens.in_video], device=device)
            own = model.embed_text(ids, video, places)[0]
            inputs.append(torch.nn.functional.pad(own, (0, 0, longest - len(tokens), 0)))
            seen[row, longest - len(tokens) :] = 1
        stops = self.stage.conversation.stop_ids
        drawn = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
        ids = base(model.lm).generate(
            inputs_embeds=torch.stack(inputs),
            attention_mask=seen,
            generation_config=_plain_config(
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                eos_token_id=stops,
                pad_token_id=stops[0],
                **drawn,
            ),
            streamer=streamer,
        )
        return [_text(tokenizer, row.tolist(), stops) for row in ids]


def dialogue(
    chat: VideoChat,
    video: Source,
    questions: Iterable[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
) -> None:
    """Print the answers to questions as they grow; each knows those before it.

    Args:
        chat: The model.
        video: What is asked about.
        questions: One after the other; the end of the terminal's input ends them.
        max_new_tokens: Longest answer, in tokens.
        temperature: As ``VideoChat.ask`` takes it.
    """
    history: list[tuple[str, str]] = []
    try:
        for question in questions:
            answer = chat.ask(
                video,
                question,
                history,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stream=lambda text: print(text, end="", flush=True),
            )
            print()
            history.append((question, answer))
    except (EOFError, KeyboardInterrupt):
        print()


def _plain_config(**fields: Any) -> Any:
    import transformers

    kind: Any = transformers.GenerationConfig
    return kind(**fields)


def _text(tokenizer: Any, ids: list[int], stops: list[int]) -> str:
    """The words before the token that ends the answer."""
    end = next((i for i, number in enumerate(ids) if number in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


class _Streamer:
    """Gives each new piece of text on; what ``generate`` of transformers calls a streamer."""

    def __init__(self, tokenizer: Any, give: Callable[[str], None]) -> None:
        self._tokenizer, self._give = tokenizer, give
        self._ids: list[int] = []
        self._given = ""

    def put(self, value: Tensor) -> None:
        if value.dim() > 1:  # the prompt
            return
        self._ids += value.tolist()
        self._advance(last=False)

    def end(self) -> None:
        self._advance(last=True)

    def _advance(self, *, last: bool) -> None:
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()
        if not last:  # the last word may still grow, or be half a character
            text = text[: max(text.rfind(" "), len(self._given))]
        if text.startswith(self._given) and len(text) > len(self._given):
            self._give(text[len(self._given) :])
            self._given = text
