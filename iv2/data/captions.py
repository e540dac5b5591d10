"""Captions as tokens: cleaning, the tokenizer of a local folder, and masking for MLM."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iv2.models.blocks import uniform_by_seed
from iv2.models.text import PackedText

# Apart from the draws of other parts, which use the same seeds.
_PARAPHRASE_SALT = 0x7061726170
_DROPPED = str.maketrans({c: None for c in ",.'!?\"()*#:;~"} | {"-": " ", "/": " "})


def clean_caption(text: str) -> str:
    """Lower case, without punctuation; hyphens and slashes become spaces, as published."""
    plain = text.lower().translate(_DROPPED).replace("<person>", "person")
    return " ".join(plain.split())


def choose_captions(batch: dict[str, Any], kind: str, *, training: bool) -> list[str]:
    """The captions of a kind, cleaned; in training one of a clip's wordings, by its seed.

    Args:
        batch: ``captions`` (a dict by kind for each sample), ``attributes``, ``seeds``, ``paths``.
        kind: Of the captions.
        training: Draw among the first and the paraphrases.

    Raises:
        ValueError: A sample has no caption of the kind; it is named.
    """
    chosen = []
    seeds = (batch["seeds"] + _PARAPHRASE_SALT).tolist()
    rows = zip(batch["captions"], batch["attributes"], seeds, batch["paths"], strict=True)
    for captions, attributes, seed, path in rows:
        if kind not in captions:
            raise ValueError(
                f"captions must have the kind {kind}, got {', '.join(captions) or 'none'}: {path}"
            )
        wordings = [captions[kind]]
        if training:
            wordings += attributes.get("paraphrases", {}).get(kind, [])
        # the low bits of a seed plus a constant would repeat those of other draws
        chosen.append(clean_caption(wordings[(seed >> 20) % len(wordings)]))
    return chosen


class Tokenizer:
    """WordPiece from a folder with vocab.txt (BERT's), or tokenizer.json.

    Raises:
        FileNotFoundError: The folder has neither.
        RuntimeError: The package tokenizers is not installed.
        ValueError: The vocabulary lacks a special token.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise RuntimeError(
                "Tokenizer: tokenizers must be installed: pip install iv2[stage2]"
            ) from error
        folder = Path(folder)
        whole, words = folder / "tokenizer.json", folder / "vocab.txt"
        self._tokenizer: Any
        if words.exists():
            self._file, self._tokenizer = words, _word_piece(words)
        elif whole.exists():
            self._file = whole
            self._tokenizer = tokenizers.Tokenizer.from_file(str(whole))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        else:
            raise FileNotFoundError(
                f"Tokenizer: folder must hold vocab.txt or tokenizer.json, got {folder}"
            )
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        special = {}
        for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"):
            number = self._tokenizer.token_to_id(name)
            if number is None:
                raise ValueError(f"Tokenizer: the vocabulary must have {name}: {folder}")
            special[name] = number
        self.pad_id, self.cls_id, self.sep_id, self.mask_id, _ = special.values()

    def encode(self, captions: Sequence[str], max_tokens: int = 32) -> PackedText:
        """[CLS] caption [SEP] of each; of a longer one the end is cut off before [SEP].

        Raises:
            ValueError: There are no captions, or max_tokens is below 2.
        """
        if not captions:
            raise ValueError("Tokenizer: captions must be at least one, got none")
        if max_tokens < 2:
            raise ValueError(f"Tokenizer: max_tokens must be at least 2, got {max_tokens}")
        found = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [[self.cls_id, *row.ids[: max_tokens - 2], self.sep_id] for row in found]
        lengths = torch.tensor([0, *map(len, rows)])
        ids = torch.tensor([number for row in rows for number in row])
        return PackedText(ids, lengths.cumsum(0).int(), int(lengths.max()))

    def save(self, folder: str | Path) -> None:
        """Copy the vocabulary into a folder."""
        shutil.copy(self._file, folder)

    def decode(self, ids: Tensor) -> str:
        """Words of tokens, special ones left out."""
        special = {self.pad_id, self.cls_id, self.sep_id, self.mask_id}
        return str(self._tokenizer.decode([i for i in ids.tolist() if i not in special]))


def _word_piece(vocabulary: Path) -> Any:
    """BERT's tokenizer of a vocab.txt, lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = vocabulary.read_text(encoding="utf-8").split("\n")
    numbers = {word: i for i, word in enumerate(words) if word}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def mask_tokens(
    text: PackedText, seeds: Tensor, tokenizer: Tokenizer, *, probability: float = 0.5
) -> tuple[PackedText, Tensor, Tensor]:
    """Mask tokens for the masked-language loss: 80 % become [MASK], 10 % any token, 10 % stay.

    Draws depend on the seed of a row and the place in it alone. [CLS] and [PAD] are never masked;
    [SEP] may be, as published.

    Args:
        text: B sequences.
        seeds: int64 [B].
        tokenizer: For the special tokens and the size of the vocabulary.
        probability: Of a token to be masked.

    Returns:
        The masked sequences, the rows [M] of masked tokens, and the tokens [M] that were there.
    """
    lengths = text.cu_seqlens.diff().long()
    draws = uniform_by_seed(seeds.to(text.ids.device), 3 * text.max_seqlen)  # [3 L, B]
    row = torch.arange(len(text), device=text.ids.device).repeat_interleave(lengths)
    chosen, kind, other = (draws[3 * text.positions + part, row] for part in range(3))
    may = (text.ids != tokenizer.cls_id) & (text.ids != tokenizer.pad_id)
    masked = may & (chosen < probability)
    ids = torch.where(masked & (kind < 0.8), tokenizer.mask_id, text.ids)
    any_token = (other * tokenizer.vocab_size).long()
    ids = torch.where(masked & (kind >= 0.8) & (kind < 0.9), any_token, ids)
    rows = masked.nonzero()[:, 0]
    return PackedText(ids, text.cu_seqlens, text.max_seqlen), rows, text.ids[rows]
