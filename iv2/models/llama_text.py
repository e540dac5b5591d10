"""A LLaMA with LoRA as the text tower of the CLIP variant; needs transformers and peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iv2.models.clip_tokens import pack_rows
from iv2.models.text import PackedText

# Padding is id 0 in published files. No token sees what comes after it: any id would do.
_PAD = 0
# Where a run keeps config.json and tokenizer: it has a config.json of its own.
_SAVED = "language_model"
# In front of names, by who saved them: peft, InternVL and InternVideo2, a causal model.
_WRAPPERS = ("text_encoder.", "base_model.model.", "transformer.", "model.")


@dataclass(frozen=True)
class LlamaTextConfig:
    """LoRA and prompt; the sizes of the language model are in the config.json of its folder."""

    # Width of the features.
    out_dim: int = 768
    # What stands before each caption.
    prompt: str = "summarize:"
    # Rank of LoRA; 0: none.
    lora_rank: int = 16
    # Numerator of LoRA's scale.
    lora_alpha: int = 32
    # Dropout of LoRA's input, where it is trained.
    lora_dropout: float = 0.1
    # Linear layers that have it.
    lora_layers: tuple[str, ...] = ("q_proj", "v_proj")


class LlamaTokenizer:
    """The tokenizer of a language model's folder, a prompt before each caption.

    Args:
        folder: With config.json and the tokenizer, or that ``save`` wrote to.
        prompt: What stands before each caption.

    Raises:
        RuntimeError: transformers or peft is not installed.
        FileNotFoundError: There is no config.json.
        ValueError: There is no end-of-text token.
    """

    def __init__(self, folder: str | Path, prompt: str = "") -> None:
        transformers, _ = _packages()
        folder = Path(folder)
        if (folder / _SAVED).is_dir():
            folder = folder / _SAVED
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"LlamaTokenizer: folder must hold config.json and a tokenizer, got {folder}"
            )
        self.prompt = prompt
        self.model_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"LlamaTokenizer: there must be an end-of-text token, got none: {folder}"
            )

    def encode(self, captions: Sequence[str], max_tokens: int = 80) -> PackedText:
        """Prompt and caption, the longer ones cut, between the tokens of start and end.

        Raises:
            ValueError: There are no captions.
        """
        tokenizer: Any = self._tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = max_tokens - len(start) - 1
        rows = []
        for caption in captions:
            ids = tokenizer(self.prompt + caption, add_special_tokens=False)["input_ids"]
            rows.append([*start, *ids[:room], tokenizer.eos_token_id])
        return pack_rows(rows)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and the config.json into a folder, below that of a run."""
        self._tokenizer.save_pretrained(Path(folder) / _SAVED)
        self.model_config.save_pretrained(Path(folder) / _SAVED)


class LlamaTextEncoder(nn.Module):
    """A causal language model of transformers whose last token is the feature.

    The names are those of InternVL-C and InternVideo2-CLIP: ``transformer.*``, with LoRA inside,
    and ``text_projection``.

    Hu et al., LoRA, 2021, arXiv:2106.09685; Chen et al., InternVL, 2023, arXiv:2312.14238.

    Args:
        config: LoRA and prompt.
        folder: With the model's config.json and its tokenizer; its weights are not read.

    Raises: as ``LlamaTokenizer``.
    """

    def __init__(self, config: LlamaTextConfig, folder: str | Path) -> None:
        super().__init__()
        transformers, peft = _packages()
        self.tokenizer = LlamaTokenizer(folder, config.prompt)
        self.config, self.embed_dim = config, config.out_dim
        sizes = self.tokenizer.model_config
        self.transformer = transformers.AutoModel.from_config(sizes)
        if config.lora_rank:
            lora = peft.LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(config.lora_layers),
            )
            self.transformer = peft.inject_adapter_in_model(lora, self.transformer)
        width = sizes.hidden_size
        self.text_projection = nn.Parameter(torch.empty(width, config.out_dim))
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, text: PackedText) -> Tensor:
        """Features [B, out_dim]."""
        lengths = text.cu_seqlens.diff().long()
        places = torch.arange(text.max_seqlen, device=text.ids.device)
        seen = places < lengths[:, None]
        ids = torch.full(seen.shape, _PAD, device=text.ids.device)
        ids[seen] = text.ids
        hidden: Tensor = self.transformer(
            input_ids=ids, attention_mask=seen.long(), use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(text), device=ids.device)
        return hidden[rows, lengths - 1] @ self.text_projection

    def _apply(self, fn: Any, recurse: bool = True) -> LlamaTextEncoder:
        """As torch's; the frequencies of rotary embedding, which are buffers, stay float32."""
        owners = [
            m
            for m in self.transformer.modules()
            if next(m.buffers(recurse=False), None) is not None
        ]
        kept = [dict(module.named_buffers(recurse=False)) for module in owners]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, buffers in zip(owners, kept, strict=True):
            for name, exact in buffers.items():
                setattr(module, name, exact.to(module.get_buffer(name).device))
        return self

    def plain_name(self, name: str) -> str:
        """A name without wrappers, the adapter's own name, and the ``base_layer`` of newer peft."""
        stripped = True
        while stripped:
            stripped = False
            for wrapper in _WRAPPERS:
                if name.startswith(wrapper):
                    name, stripped = name.removeprefix(wrapper), True
        return name.replace(".base_layer.", ".").replace(".default.", ".")


def _packages() -> tuple[Any, Any]:
    try:
        import peft
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "LlamaTextEncoder: transformers and peft must be installed: pip install iv2[clip]"
        ) from error
    return transformers, peft
