"""Any causal language model of transformers, from a local folder; needs transformers and peft."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iv2kernels import Packed, attention, linear_cross_entropy

# Where a run keeps config.json and tokenizer: it has a config.json of its own.
SAVED = "language_model"
# Around the embeddings of a video, as published.
VIDEO_START, VIDEO_END = "<Video>", "</Video>"
_TINY_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_TINY_END = "<|end|>"
_TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# The name under which transformers knows _attend.
_ATTENTION = "iv2"
# Rows whose logits stand at once where the head has LoRA: 16 MB of them at 32,000 words.
_LOGIT_ROWS = 128
# Models whose logits are more than hidden states times a matrix.
_REFUSED = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


@dataclass(frozen=True)
class LanguageConfig:
    """Which language model, and what of it is trained."""

    # Folder as transformers writes it (config.json, tokenizer, weights), or a .gguf file; for a
    # tiny one, a folder with vocab.txt.
    folder: str = ""
    # Weights: those of the folder; fresh ones of the sizes in its config.json; or a tiny Llama.
    weights: Literal["pretrained", "fresh", "tiny"] = "pretrained"
    # What is trained: nothing, LoRA, or everything.
    trained: Literal["frozen", "lora", "full"] = "frozen"
    # How messages become text: the model's own chat template, or that of the published models.
    format: Literal["chat", "mistral"] = "chat"
    # Rank of LoRA.
    lora_rank: int = 16
    # Numerator of LoRA's scale.
    lora_alpha: int = 32
    # Dropout of LoRA's input.
    lora_dropout: float = 0.1
    # Linear layers that have it.
    lora_layers: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "lm_head"),
    )
    # Recompute layers in backward, where the model is trained.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ValueError(f"LanguageConfig: lora_rank must be positive, got {self.lora_rank}")
        if self.trained == "lora" and not self.lora_layers:
            raise ValueError("LanguageConfig: lora_layers must name at least one layer, got none")


@dataclass(frozen=True)
class Language:
    """A model and what turns text into its tokens."""

    # A causal model of transformers; with LoRA, of peft.
    lm: nn.Module
    # Of transformers.
    tokenizer: Any


def build_language(
    config: LanguageConfig, saved: str | Path = "", dtype: torch.dtype = torch.float32
) -> Language:
    """Load or make a language model and its tokenizer; nothing is downloaded.

    Args:
        config: Which.
        saved: Folder with the tokenizer and config.json that ``save_language`` wrote, for weights
            that are not of a folder's; the tokenizer is taken from it in any case.
        dtype: Of the parameters.

    Raises:
        RuntimeError: transformers, peft or gguf is not installed.
        FileNotFoundError: There is no such folder or file.
        ValueError: Nothing is named, or the logits of such a model are no plain product.
    """
    transformers, peft = _packages()
    source = Path(saved) if saved else Path(config.folder)
    if not config.folder and not saved:
        raise ValueError("LanguageConfig: folder must be that of a language model, got nothing")
    if config.weights == "tiny" and not saved:
        tokenizer = tiny_tokenizer(source)
        lm = transformers.LlamaForCausalLM(_tiny_sizes(transformers, tokenizer))
    else:
        tokenizer = _local(transformers.AutoTokenizer, source)
        if config.weights == "pretrained":
            lm = _local(transformers.AutoModelForCausalLM, Path(config.folder), dtype=dtype)
        else:
            sizes = _local(transformers.AutoConfig, source)
            lm = transformers.AutoModelForCausalLM.from_config(sizes)
    for name, plain in _REFUSED.items():
        value = getattr(lm.config, name, plain)
        if value not in (None, plain):
            raise ValueError(
                f"build_language: {name} of the language model must be {plain}, got {value}"
            )
    if lm._supports_sdpa and lm._supports_attention_backend:
        interface = transformers.AttentionInterface, transformers.AttentionMaskInterface
        masks = interface[1]()
        interface[0].register(_ATTENTION, _attend)
        interface[1].register(_ATTENTION, masks["sdpa"])
        lm.set_attn_implementation(_ATTENTION)
    if config.trained == "lora":
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_layers),
        )
        with warnings.catch_warnings():  # peft asks transformers in words of an older one
            warnings.simplefilter("ignore", FutureWarning)
            lm = peft.get_peft_model(lm, lora, autocast_adapter_dtype=False)
    else:
        lm.requires_grad_(config.trained == "full")
    if config.checkpoint:
        model = base(lm)
        # the second is what older versions of transformers have
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    for parameter in lm.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return Language(lm, tokenizer)


def _local(kind: Any, path: Path, **extra: Any) -> Any:
    """``kind.from_pretrained`` of a folder or of a .gguf file."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"build_language: folder must be a .gguf file, got {path}")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                "build_language: gguf must be installed for .gguf files: pip install iv2[stage3]"
            ) from error
        path, extra = path.parent, {**extra, "gguf_file": path.name}
    elif not (path / "config.json").exists():
        raise FileNotFoundError(
            f"build_language: folder must hold config.json and a tokenizer, got {path}"
        )
    return kind.from_pretrained(path, local_files_only=True, **extra)


def _tiny_sizes(transformers: Any, tokenizer: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # From nothing it learns to repeat what it read: with a head of its own, and BERT's 0.02,
        # that takes three times the steps.
        tie_word_embeddings=True,
        initializer_range=0.08,
    )


def tiny_tokenizer(folder: str | Path) -> Any:
    """A tokenizer of transformers from a vocab.txt, with roles, an end and a chat template.

    Raises:
        FileNotFoundError: The folder has no vocab.txt.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    transformers, _ = _packages()
    path = Path(folder) / "vocab.txt"
    if not path.exists():
        raise FileNotFoundError(
            f"tiny_tokenizer: folder must hold vocab.txt or be of a run, got {folder}"
        )
    words = [word for word in path.read_text(encoding="utf-8").split("\n") if word]
    numbers = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token=_TINY_END
    )
    extra = [*_TINY_ROLES, VIDEO_START, VIDEO_END]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.chat_template = _TINY_TEMPLATE
    return tokenizer


def save_language(lm: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write the tokenizer and config.json, not the weights, below the folder of a run."""
    tokenizer.save_pretrained(Path(folder) / SAVED)
    base(lm).config.save_pretrained(Path(folder) / SAVED)


def base(lm: nn.Module) -> Any:
    """The causal model of transformers, without peft around it; LoRA stays inside."""
    wrapped: Any = lm
    return wrapped.get_base_model() if hasattr(lm, "get_base_model") else lm


def hidden_states(
    lm: nn.Module,
    inputs: Tensor,  # [T, C]
    packed: Packed,
) -> Tensor:
    """Last hidden states [T, C] of sequences laid end to end, each seeing itself alone.

    Where a model's attention is more than a softmax of scaled products, or a sequence is longer
    than its window, the sequences are padded for it instead; the result is the same.

    Args:
        lm: The model.
        inputs: Embeddings, sequence after sequence.
        packed: Where each begins.
    """
    model = base(lm)
    trunk: Any = getattr(model, model.base_model_prefix)
    lengths = packed.cu_seqlens_q.diff().tolist()
    if not _packs(model, packed.max_seqlen_q):
        # no token sees what comes after it: padding is at the right, and needs no mask
        rows = nn.utils.rnn.pad_sequence(list(torch.split(inputs, lengths)), batch_first=True)
        found = trunk(inputs_embeds=rows, use_cache=False).last_hidden_state
        return torch.cat([row[:n] for row, n in zip(found, lengths, strict=True)])
    positions = torch.cat([torch.arange(n, device=inputs.device) for n in lengths])
    out = trunk(
        inputs_embeds=inputs[None],
        position_ids=positions[None],
        # a mask of four axes is taken as it is: without one, that of [T, T] would be made
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device),
        use_cache=False,
        packed=packed,
    )
    states: Tensor = out.last_hidden_state[0]
    return states


def _packs(model: Any, longest: int) -> bool:
    """Whether its attention can be ours, for training."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        config._attn_implementation == _ATTENTION
        and not getattr(config, "attn_logit_softcapping", None)
        and not (model.training and getattr(config, "attention_dropout", 0.0))
        and (window is None or longest <= window)
    )


def _attend(
    module: nn.Module,
    q: Tensor,  # [1, heads, T, head_dim]
    k: Tensor,  # [1, kv_heads, T, head_dim]
    v: Tensor,  # [1, kv_heads, T, head_dim]
    mask: Tensor | None,
    *,
    packed: Packed | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: PyTorch's, but for packed sequences."""
    if packed is None:  # generation
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, mask, **rest)
    # under autocast rotary embedding leaves float32
    rows = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))
    out = attention(*rows, causal=True, scale=rest.get("scaling"), packed=packed)
    assert isinstance(out, Tensor)
    return out[None], None


def next_token_loss(
    lm: nn.Module,
    hidden: Tensor,  # [M, C]
    targets: Tensor,  # [M]
) -> Tensor:
    """Mean cross-entropy of the tokens that follow; the logits are not stored.

    ``linear_cross_entropy`` of the head. One with LoRA, whose gradient is not that of a plain
    product, gives the logits of some rows at a time instead, and again in backward.
    """
    head: Any = base(lm).get_output_embeddings()
    if not hasattr(head, "lora_A"):
        return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, reduction="sum")

    parts = zip(torch.split(hidden, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True)
    losses = [checkpoint(total, x, y, use_reentrant=False) for x, y in parts]
    return torch.stack(losses).sum() / len(targets)


def plain_name(name: str) -> str:
    """A name without what versions of peft put into it."""
    name = name.replace("lm.base_model.model.", "lm.")
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def _packages() -> tuple[Any, Any]:
    try:
        import peft
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "build_language: transformers and peft must be installed: pip install iv2[stage3]"
        ) from error
    return transformers, peft
