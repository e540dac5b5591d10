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

from iv2.data.audio import SoundConfig, read_fbank
from iv2.data.clips import interval_indices, sparse_test_indices, tsn_indices
from iv2.data.dataset import ClipConfig
from iv2.data.decode import Video
from iv2.data.tiles import tiles
from iv2.data.transforms import Box, View, look
from iv2.models.language import base
from iv2.stages.conversation import Message, Tokens
from iv2.stages.stage3 import Stage3, load_stage3

# A file, uint8 frames [T, H, W, 3], those with the filter banks [F, bins] of their sound, or
# nothing: a question about nothing seen.
Source = str | Path | Tensor | tuple[Tensor, Tensor] | None

_AT_ONCE = 16  # views in a pass through the video encoder


@dataclass(frozen=True)
class Views:
    """What is looked at of a video."""

    # uint8 [V, T, H, W, 3] | float [V, 3, T, H, W]
    pixels: Tensor
    # What is said of them, empty unless there are several segments.
    note: str
    # Filter banks [V, F, bins] of the sound of each, None where nothing is heard.
    sounds: Tensor | None = None


# Tokens, and the embeddings [V, Q, C] of what is seen and heard.
Prompt = tuple[Tokens, Tensor | None]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    # Longest answer, in tokens.
    max_new_tokens: int = 128
    # 0 takes the likeliest token each time; otherwise tokens are drawn.
    temperature: float = 0.0
    # Of the likeliest tokens, as many as have this probability together are drawn from.
    top_p: float = 1.0


class VideoChat:
    """Answers questions about videos.

    A model with an audio tower hears the files that have a sound, each segment its own: of segments
    longer than ``clip.sound.seconds`` what comes first.

    Examples::

        chat = VideoChat.load("runs/stage3-tiny")
        print(chat.ask("clip.mp4", "what moves ?"))
        chat.ask("clip.mp4", "and where ?", history=[("what moves ?", "a red bar")])

    Args:
        stage: In evaluation mode.
        clip: Frames and size that the model was trained with.
        system: The system's message; empty for none.
        seconds: Longest segment; a longer video is seen in equal segments, each with its own
            embeddings and sound, and their times in the prompt. 0: any video is one.
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

    @property
    def sound(self) -> SoundConfig | None:
        """What it hears of a sound; None: nothing."""
        return None if self.stage.model.audio_encoder is None else self.clip.sound

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
        prompt = self.prompt(self.views(video), question, history, max_new_tokens)
        streamer = None if stream is None else _Streamer(self.stage.language_tokenizer, stream)
        sampling = Sampling(max_new_tokens, temperature)
        return self._texts(self.generate([prompt], sampling, streamer=streamer))[0]

    def answers(
        self,
        pairs: Sequence[tuple[Source, str]],
        *,
        prefix: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answers to one question about each of several videos, as one batch.

        The other arguments and the errors are those of ``ask``.

        Args:
            pairs: Videos and questions.
            prefix: What each answer begins with, before the model goes on.
            max_new_tokens: Longest answer after it, in tokens.
            temperature: As ``ask`` takes it.
        """
        prompts = [
            self.prompt(self.views(video), question, (), max_new_tokens, prefix)
            for video, question in pairs
        ]
        if not prompts:
            return []
        return self._texts(self.generate(prompts, Sampling(max_new_tokens, temperature)), prefix)

    def views(self, video: Source) -> Views | None:
        """Segments and tiles of a video, as the encoders take them.

        Raises:
            DecodeError: The video, or its sound, cannot be read.
            ValueError: Filter banks are given to a model without an audio tower.
        """
        if video is None:
            return None
        if isinstance(video, tuple):
            if self.sound is None:
                raise ValueError("VideoChat: video must be without sound for this model, got some")
            frames, fbank = video
            seen = self._look(frames[self._numbers(len(frames))])
            return Views(seen, "", fbank[None].expand(len(seen), -1, -1))
        if isinstance(video, Tensor):
            return Views(self._look(video[self._numbers(len(video))]), "")
        with Video(str(video)) as file:
            count = 1
            if self.seconds:
                count = max(1, math.ceil(file.info().duration / self.seconds - 1e-6))
            edges = [file.num_frames * i // count for i in range(count + 1)]
            edges = sorted(set(edges))  # fewer frames than segments
            size = None if self.stage.config.tiles else self.clip.short_side or None
            segments = [
                self._look(file.frames([low + i for i in self._numbers(high - low)], size))
                for low, high in pairwise(edges)
            ]
            times = [*(file.times[low] for low in edges[:-1]), file.info().duration]
        parts = [f"{a:.1f}-{b:.1f}" for a, b in pairwise(times)]
        note = f"The video is in {len(parts)} segments, of seconds {', '.join(parts)}."
        views = [len(segment) for segment in segments]
        # a file that is seen as one is heard from its beginning to its end, as in training
        spans = [*pairwise([None, *times[1:-1], None])]
        sounds = self._hear(str(video), spans, views)
        return Views(torch.cat(segments), note if len(parts) > 1 else "", sounds)

    def _hear(
        self, path: str, spans: Sequence[tuple[float | None, float | None]], views: Sequence[int]
    ) -> Tensor | None:
        """Filter banks of the segments, once a view; zeros where the sound is over."""
        config = self.sound
        if config is None:
            return None
        found = [read_fbank(path, start, end, config) for start, end in spans]
        if all(one is None for one in found):
            return None
        silence = torch.zeros(config.num_frames, config.num_mel_bins)
        rows = [silence if one is None else one for one in found]
        return torch.stack(rows).repeat_interleave(torch.tensor(views), 0)

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

    def prompt(
        self,
        views: Views | None,
        question: str,
        history: Sequence[tuple[str, str]],
        max_new_tokens: int,
        prefix: str = "",
    ) -> Prompt:
        """What ``generate`` takes: tokens, and the embeddings [V, Q, C] of the views.

        The arguments and the errors are those of ``ask`` and ``answers``.
        """
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
            prefix=prefix,
        )
        if views is None:
            return tokens, None
        device = stage.model.project_up.weight.device
        pixels = torch.split(views.pixels, _AT_ONCE)
        sounds: Sequence[Tensor | None] = [None] * len(pixels)
        if views.sounds is not None:
            sounds = torch.split(views.sounds.to(device), _AT_ONCE)
        with torch.no_grad():
            found = [
                stage.see(part[None].to(device), [messages], fbank=sound)
                for part, sound in zip(pixels, sounds, strict=True)
            ]
        return tokens, torch.cat(found)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **watched: Any) -> Tensor:
        """Tokens [B, L] after each of several prompts, as one batch.

        Args:
            prompts: From ``prompt``.
            sampling: How tokens are chosen.
            **watched: ``streamer`` and ``stopping_criteria``, as ``generate`` of transformers takes
                them.
        """
        import transformers

        model, stops = self.stage.model, self.stage.conversation.stop_ids
        device = model.project_up.weight.device
        longest = max(len(tokens) for tokens, _ in prompts)
        inputs, seen = [], torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, (tokens, video) in enumerate(prompts):  # padded at the left
            ids = torch.tensor([tokens.ids], device=device)
            places = torch.tensor([tokens.in_video], device=device)
            own = model.embed_text(ids, video, places)[0]
            inputs.append(torch.nn.functional.pad(own, (0, 0, longest - len(tokens), 0)))
            seen[row, longest - len(tokens) :] = 1
        drawn: dict[str, Any] = {}
        if sampling.temperature > 0:
            drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
        config: Any = transformers.GenerationConfig
        found: Tensor = base(model.lm).generate(
            inputs_embeds=torch.stack(inputs),
            attention_mask=seen,
            generation_config=config(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.temperature > 0,
                eos_token_id=stops,
                pad_token_id=stops[0],
                **drawn,
            ),
            **watched,
        )
        return found

    def _texts(self, ids: Tensor, prefix: str = "") -> list[str]:
        stops = self.stage.conversation.stop_ids
        return [_text(self.stage.language_tokenizer, row, stops, prefix) for row in ids.tolist()]


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


def _text(tokenizer: Any, ids: list[int], stops: list[int], prefix: str) -> str:
    """The words before the token that ends the answer, behind what the answer had to begin with."""
    end = next((i for i, number in enumerate(ids) if number in stops), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    if not prefix:
        return text.strip()
    # The tokenizer knows whether a blank is between the two.
    begun = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    before = str(tokenizer.decode(begun, skip_special_tokens=True))
    whole = str(tokenizer.decode([*begun, *ids[:end]], skip_special_tokens=True))
    return prefix + (whole.removeprefix(before) if whole.startswith(before) else text).rstrip()


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
