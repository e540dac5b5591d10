"""Conversations as tokens, and tiles of large videos."""

from __future__ import annotations

import pytest
import torch
from tiny_stage2 import write_vocabulary
from tiny_stage3 import said

from iv2.data.tiles import tile_grid, tiles
from iv2.models.language import tiny_tokenizer
from iv2.stages.conversation import Conversation, ConversationTooLongError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(write_vocabulary(tmp_path_factory.mktemp("words")))


def words(tokenizer, tokens, only_answers=False):
    names = tokenizer.convert_ids_to_tokens(tokens.ids)
    named = ["V" if v else n for n, v in zip(names, tokens.in_video, strict=True)]
    rows = zip(named, tokens.is_answer, strict=True)
    return " ".join(n for n, counted in rows if counted or not only_answers)


def test_chat_template_with_a_video_and_two_rounds(tokenizer):
    conversation = Conversation(tokenizer, num_queries=2)
    messages = said("red bar", "green cross", "up", "left", system="blue")
    tokens = conversation.tokens(messages, views=2, note="two")
    assert words(tokenizer, tokens) == (
        "<|system|> blue <|end|> <|user|> <Video> V V </Video> <Video> V V </Video> two red bar "
        "<|end|> <|assistant|> green cross <|end|> <|user|> up <|end|> <|assistant|> left <|end|>"
    )
    assert words(tokenizer, tokens, only_answers=True) == "green cross <|end|> left <|end|>"
    assert not any(v and a for v, a in zip(tokens.in_video, tokens.is_answer, strict=True))


def test_text_alone_and_a_question_without_answer(tokenizer):
    conversation = Conversation(tokenizer, num_queries=2)
    tokens = conversation.tokens(said("red", "up", "left"))
    assert words(tokenizer, tokens) == (
        "<|user|> red <|end|> <|assistant|> up <|end|> <|user|> left <|end|> <|assistant|>"
    )
    assert words(tokenizer, tokens, only_answers=True) == "up <|end|>"
    # what training shows before an answer is what is there when one is asked for
    whole = conversation.tokens(said("red", "up", "left", "two"))
    assert whole.ids[: len(tokens)] == tokens.ids
    # a caption has no question
    tokens = conversation.tokens(said("", "red bar"), views=1)
    assert words(tokenizer, tokens) == (
        "<|user|> <Video> V V </Video> <|end|> <|assistant|> red bar <|end|>"
    )


def test_published_mistral_format(tokenizer):
    """Text as the published data sets build it, with the ids of any tokenizer."""
    conversation = Conversation(tokenizer, "mistral", num_queries=3)
    rendered = []
    conversation._encode = lambda parts, dropped: rendered.append(parts)
    conversation.tokens(said("q1", "a1", "q2", "a2", system="look"), views=1, note="8 frames")
    end = tokenizer.eos_token
    (parts,) = rendered
    text = "".join(text for text, _ in parts).replace("\ue000", "")
    assert text == (
        f"look [INST] <Video></Video> 8 frames [/INST] [INST] q1 [/INST] a1 {end} "
        f"[INST] q2 [/INST] a2 {end}"
    )
    assert [text for text, counted in parts if counted] == [f" a1 {end}", f" a2 {end}"]


def test_early_rounds_are_dropped_and_answers_never_cut(tokenizer):
    conversation = Conversation(tokenizer, num_queries=2)
    messages = said("red", "red bar", "green", "green cross", "blue", "left", system="two")
    full = conversation.tokens(messages, views=1)
    assert full.dropped == 0
    exact = conversation.tokens(messages, views=1, max_tokens=len(full))
    assert exact == full
    shorter = conversation.tokens(messages, views=1, max_tokens=len(full) - 1)
    assert shorter.dropped == 1
    assert words(tokenizer, shorter) == (
        "<|system|> two <|end|> <|user|> <Video> V V </Video> green <|end|> <|assistant|> "
        "green cross <|end|> <|user|> blue <|end|> <|assistant|> left <|end|>"
    )
    last = conversation.tokens(messages, views=1, max_tokens=13)
    assert last.dropped == 2
    assert words(tokenizer, last, only_answers=True) == "left <|end|>"
    with pytest.raises(ConversationTooLongError, match="at most 12 tokens, got 13 in the last"):
        conversation.tokens(messages, views=1, max_tokens=12)


@pytest.mark.parametrize(
    ("messages", "got"),
    [
        ([], "none"),
        ([{"role": "assistant", "content": "a"}], "assistant"),
        ([{"role": "user", "content": "a"}] * 2, "user, user"),
        ([*said("a", "b"), {"role": "system", "content": "c"}], "user, assistant, system"),
    ],
)
def test_roles_must_alternate(tokenizer, messages, got):
    with pytest.raises(ValueError, match=f"roles must be user and assistant .* got {got}$"):
        Conversation(tokenizer).tokens(messages)


def test_unusable_templates_are_refused(tokenizer, tmp_path):
    fresh = tiny_tokenizer(write_vocabulary(tmp_path))
    fresh.chat_template = None
    with pytest.raises(ValueError, match="must have a chat template, got none"):
        Conversation(fresh)
    fresh.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    with pytest.raises(ValueError, match="must end an answer with a token"):
        Conversation(fresh)
    fresh.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="must take these messages: no system here"):
        Conversation(fresh)
    # it forgets what was thought in earlier answers
    fresh.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content if loop.last else 'x' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    with pytest.raises(ValueError, match="chat template must "):
        Conversation(fresh)


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((448, 448), 6, (2, 2)),
        ((100, 100), 6, (1, 1)),  # as square, but four tiles would be mostly invented
        ((720, 1280), 6, (1, 2)),
        ((448, 672), 6, (2, 3)),
        ((1280, 400), 6, (3, 1)),
        ((448, 672), 2, (1, 2)),
        ((448, 672), 1, (1, 1)),
    ],
)
def test_the_grid_of_the_nearest_aspect_ratio(size, most, grid):
    assert tile_grid(*size, most=most) == grid


def test_tiles_are_parts_in_reading_order_and_then_the_whole():
    frames = torch.zeros(2, 28, 42, 3, dtype=torch.uint8)
    for row in range(2):
        for column in range(3):
            value = 30 * (3 * row + column + 1)
            frames[:, 14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)] = value
    frames[1] += 5
    views = tiles(frames, most=6, side=14)
    assert views.shape == (7, 2, 14, 14, 3)
    assert views.dtype == torch.uint8
    for i in range(6):  # no resizing here: 2 x 3 tiles of 14 are the frames
        assert (views[i, 0] == 30 * (i + 1)).all()
        assert (views[i, 1] == 30 * (i + 1) + 5).all()
    # the whole: its corners are the tiles' values
    assert views[6, 0, 1, 0, 0] == pytest.approx(30, abs=3)
    assert views[6, 0, 13, 13, 0] == pytest.approx(180, abs=3)
    assert torch.equal(tiles(frames, most=1, side=14)[0], views[6])
    # stretched without padding: no black appears
    assert tiles(torch.full((1, 30, 47, 3), 200, dtype=torch.uint8), side=14).min() == 200
    with pytest.raises(TypeError, match=r"frames must be uint8, got torch\.float32"):
        tiles(frames.float())
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\]"):
        tiles(frames[0])
