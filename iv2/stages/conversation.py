"""Conversations as tokens: templates, the places of videos, and which tokens are learnt.

Messages are ``{"role": "system" | "user" | "assistant", "content": text}``, the system's at most
once and first, then user and assistant in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iv2.models.language import VIDEO_END, VIDEO_START

Message = dict[str, str]

# In rendered text, where the embeddings of a view go: of a private area, so in no text.
_PLACE = "\ue000"
_SPAN = f"{VIDEO_START}{_PLACE}{VIDEO_END}"


class ConversationTooLongError(ValueError):
    """The last round alone is longer than allowed."""


@dataclass(frozen=True)
class Tokens:
    """A conversation for a language model."""

    # Token numbers; 0 where the embedding of a video stands.
    ids: list[int]
    # Where the embeddings of the videos stand, view after view.
    in_video: list[bool]
    # Tokens that are learnt: those of answers and the token that ends each.
    is_answer: list[bool]
    # Early rounds that did not fit.
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Conversation:
    """Turns messages into tokens for one language model.

    ``chat`` is the model's own chat template; the views stand at the beginning of the first user
    message that is kept, each in its own ``<Video> </Video>``. ``mistral`` is that of the published
    models: the instruction and the views in a first ``[INST]``, then each round in its own.

    Args:
        tokenizer: Of transformers.
        template: Which of the two.
        num_queries: Embeddings of a view.

    Raises:
        ValueError: There is no chat template, or nothing in it ends an answer.
    """

    def __init__(
        self, tokenizer: Any, template: Literal["chat", "mistral"] = "chat", num_queries: int = 96
    ) -> None:
        self.tokenizer, self.template, self.num_queries = tokenizer, template, num_queries
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("Conversation: tokenizer must have a chat template, got none")
        answer = {"role": "assistant", "content": "a"}
        probe = self.tokens([{"role": "user", "content": "a"}, answer])
        self.stop_ids = sorted({probe.ids[-1], tokenizer.eos_token_id} - {None})

    def tokens(
        self,
        messages: Sequence[Message],
        views: int = 0,
        *,
        note: str = "",
        max_tokens: int = 0,
        prefix: str = "",
    ) -> Tokens:
        """The tokens of a conversation; if it ends with the user, up to where the answer begins.

        No answer is ever cut: early rounds are left out as long as it is too long.

        Args:
            messages: The conversation.
            views: Views of its video; 0: there is none.
            note: What is said of the video behind its views, such as the times of its frames.
            max_tokens: Most tokens and embeddings; 0: any number.
            prefix: How the answer begins, after a conversation that ends with the user.

        Raises:
            ConversationTooLongError: The last round alone is too long.
            ValueError: Roles do not alternate, there is a prefix of no answer, or the chat template
                cannot be used.
        """
        system, rounds = _rounds(messages)
        if prefix and len(rounds[-1]) > 1:
            raise ValueError(f"Conversation: prefix must be empty after an answer, got {prefix!r}")
        if prefix:
            rounds[-1].append(prefix)
        render = self._chat if self.template == "chat" else self._mistral
        for dropped in range(len(rounds)):
            parts = render(system, rounds[dropped:], views, note)
            if prefix:
                parts[-1] = (self._begun(parts[-1][0], prefix), False)
            found = self._encode(parts, dropped)
            if not max_tokens or len(found) <= max_tokens:
                return found
        raise ConversationTooLongError(
            f"Conversation: messages must be at most {max_tokens} tokens, got {len(found)} in the "
            "last round alone"
        )

    def _chat(
        self, system: str, rounds: list[list[str]], views: int, note: str
    ) -> list[tuple[str, bool]]:
        """Text in parts, and whether each is an answer."""
        messages = [{"role": "system", "content": system}] if system else []
        parts: list[tuple[str, bool]] = []
        done = ""
        for number, (question, *answers) in enumerate(rounds):
            if views and number == 0:
                question = "\n".join(filter(None, (_SPAN * views + note, question)))
            messages.append({"role": "user", "content": question})
            before = self._apply(messages, prompt=True)
            if not before.startswith(done):
                self._refuse("must leave what was said before as it was")
            parts.append((before[len(done) :], False))
            for answer in answers:
                messages.append({"role": "assistant", "content": answer})
                after = self._apply(messages, prompt=False)
                if not after.startswith(before):
                    self._refuse("must begin an answer as it asks for one")
                body = after[len(before) :].rstrip()
                if body == answer.strip():
                    self._refuse("must end an answer with a token")
                parts.append((body, True))
                done = before + body
        return parts

    def _begun(self, answer: str, prefix: str) -> str:
        """The rendered answer without what ends it."""
        if prefix not in answer:
            self._refuse("must leave an answer as it is")
        return answer[: answer.index(prefix) + len(prefix)]

    def _apply(self, messages: list[Message], *, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError as error:
            raise ValueError(
                f"Conversation: chat template must take these messages: {error}"
            ) from error

    def _refuse(self, expected: str) -> None:
        raise ValueError(f"Conversation: chat template {expected}; this model's does not")

    def _mistral(
        self, system: str, rounds: list[list[str]], views: int, note: str
    ) -> list[tuple[str, bool]]:
        tokenizer = self.tokenizer
        text = (tokenizer.bos_token or "") + (f"{system} " if system else "")
        if views:
            text += f"[INST] {_SPAN * views}{f' {note}' if note else ''} [/INST]"
        parts = []
        for question, *answers in rounds:
            # captions are published without a question, and so without its brackets
            text += f" [INST] {question} [/INST]" if question else ""
            parts.append((text, False))
            # the end token is that of the tokenizer, </s> for Mistral
            parts += [(f" {answer} {tokenizer.eos_token}", True) for answer in answers]
            text = ""
        return parts

    def _encode(self, parts: list[tuple[str, bool]], dropped: int) -> Tokens:
        ids: list[int] = []
        in_video: list[bool] = []
        is_answer: list[bool] = []
        for text, counted in parts:
            for number, piece in enumerate(text.split(_PLACE)):
                if number:  # a place stood here
                    ids += [0] * self.num_queries
                    in_video += [True] * self.num_queries
                    is_answer += [False] * self.num_queries
                new = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += new
                in_video += [False] * len(new)
                is_answer += [counted] * len(new)
        return Tokens(ids, in_video, is_answer, dropped)


def _rounds(messages: Sequence[Message]) -> tuple[str, list[list[str]]]:
    """The system's message, and rounds of a question and, but perhaps in the last, an answer."""
    system = ""
    rest = list(messages)
    for message in rest:
        content = message.get("content")
        if not isinstance(content, str) or _PLACE in content:
            raise ValueError(f"Conversation: content must be text, got {content!r}")
    if rest and rest[0].get("role") == "system":
        system = rest.pop(0)["content"]
    roles = [message.get("role") for message in rest]
    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(
            "Conversation: roles must be user and assistant in turn, after at most one system, "
            f"got {', '.join(map(str, roles)) or 'none'}"
        )
    contents = [message["content"] for message in rest]
    return system, [contents[i : i + 2] for i in range(0, len(contents), 2)]
