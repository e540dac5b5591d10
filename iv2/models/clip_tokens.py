"""Tokenizers of the CLIP text tower: CLIP's byte pairs, or BERT's word pieces."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iv2.data.captions import Tokenizer
from iv2.models.text import PackedText

_START, _END = "<|startoftext|>", "<|endoftext|>"
# The list of merges as OpenAI published it; the rest of the file serves a larger vocabulary.
_MERGES, _NUM_MERGES = "bpe_simple_vocab_16e6.txt", 49152 - 256 - 2
# Apostrophe endings, words, single digits, and runs of what is neither.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Captions to [start] caption [end], from the files of a local folder.

    The folder has ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, or
    ``bpe_simple_vocab_16e6.txt(.gz)``: lower-case byte pairs.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: The folder has none of these.
        RuntimeError: The package tokenizers is not installed.
        ValueError: The vocabulary lacks the tokens for start and end.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise RuntimeError(
                "ClipTokenizer: tokenizers must be installed: pip install iv2[stage2]"
            ) from error
        folder = Path(folder)
        merges = [folder / f"{_MERGES}.gz", folder / _MERGES]
        pair = [folder / "vocab.json", folder / "merges.txt"]
        self._tokenizer: Any
        if (folder / "tokenizer.json").exists():
            self._files = [folder / "tokenizer.json"]
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._files[0]))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        elif all(path.exists() for path in pair):
            self._files = pair
            self._tokenizer = _byte_pairs(
                json.loads(pair[0].read_text(encoding="utf-8")), _read_merges(pair[1])
            )
        elif any(path.exists() for path in merges):
            self._files = [next(path for path in merges if path.exists())]
            joined = _read_merges(self._files[0])[:_NUM_MERGES]
            self._tokenizer = _byte_pairs(_published_vocabulary(joined), joined)
        else:
            raise FileNotFoundError(
                "ClipTokenizer: folder must hold tokenizer.json, vocab.json and merges.txt, "
                f"{_MERGES} or vocab.txt, got {folder}"
            )
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        ends = []
        for name in (_START, _END):
            number: int | None = self._tokenizer.token_to_id(name)
            if number is None:
                raise ValueError(f"ClipTokenizer: the vocabulary must have {name}: {folder}")
            ends.append(number)
        self.start_id, self.end_id = ends

    def encode(self, captions: Sequence[str], max_tokens: int = 77) -> PackedText:
        """[start] caption [end] of each; of a longer one the end is cut off before [end].

        Raises:
            ValueError: There are no captions, or max_tokens is below 2.
        """
        if max_tokens < 2:
            raise ValueError(f"ClipTokenizer: max_tokens must be at least 2, got {max_tokens}")
        found = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        return pack_rows(
            [[self.start_id, *row.ids[: max_tokens - 2], self.end_id] for row in found]
        )

    def save(self, folder: str | Path) -> None:
        """Copy the vocabulary into a folder."""
        for file in self._files:
            shutil.copy(file, folder)


def clip_tokenizer(folder: str | Path) -> ClipTokenizer | Tokenizer:
    """The tokenizer of a folder: word pieces where it holds ``vocab.txt`` alone, as toy worlds do.

    [CLS] and [SEP] stand for start and end then.

    Raises: as ``ClipTokenizer`` and ``iv2.data.captions.Tokenizer``.
    """
    words = (Path(folder) / "vocab.txt").exists()
    others = [_MERGES, f"{_MERGES}.gz", "tokenizer.json", "vocab.json"]
    if words and not any((Path(folder) / name).exists() for name in others):
        return Tokenizer(folder)
    return ClipTokenizer(folder)


def pack_rows(rows: Sequence[Sequence[int]]) -> PackedText:
    """Rows of token numbers, end to end.

    Raises:
        ValueError: There are none.
    """
    if not rows:
        raise ValueError("tokenize: captions must be at least one, got none")
    lengths = torch.tensor([0, *map(len, rows)])
    ids = torch.tensor([number for row in rows for number in row])
    return PackedText(ids, lengths.cumsum(0).int(), int(lengths.max()))


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs, after the line that names the version."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    if lines[0].startswith("#version") or lines[0].startswith('"bpe_simple_vocab'):
        lines = lines[1:]
    pairs = [line.split() for line in lines if line.strip()]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _letters() -> list[str]:
    """A printable letter for each byte: those that print as they are first, then the others."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def _published_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Letters, letters that end a word, merged pairs, start and end, numbered in this order."""
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["".join(pair) for pair in merges]
    return {word: i for i, word in enumerate([*words, _START, _END])}


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """CLIP's tokenizer: lower case, single spaces, byte pairs within words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    made = Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END, fuse_unk=False)
    )
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return made
