"""The flash_attn names that InternVideo2 code imports, over the ops of this package.

After ``install()``, code written against flash-attn 2 (the API of 2.6, the last whose
``unpad_input`` returns four values) imports and runs on a machine without it, a CPU included::

    from iv2kernels import compat

    compat.install()
    from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

Signatures, layouts and state-dict names are flash-attn's. What the ops do not compute (dropout,
windows, ALiBi, soft caps, paged keys) raises. Three things are wider than there: float32 is taken,
every run is deterministic, and tensors may be on the CPU. Nothing is replaced at import time, and
an installed flash_attn is never hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iv2kernels.ops.add_rms_norm import add_rms_norm
from iv2kernels.ops.attention import Packed, attention
from iv2kernels.ops.mlp import mlp

_VERSION = "2.6.3+iv2kernels"
_installed: dict[str, ModuleType] = {}

AttentionResult = Tensor | tuple[Tensor, Tensor, None]


def install() -> None:
    """Make ``import flash_attn`` find the names of this module; twice is once.

    Raises:
        RuntimeError: flash_attn is installed, or another module of that name is imported.
    """
    if _installed and sys.modules.get("flash_attn") is _installed["flash_attn"]:
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError(
            "install: flash_attn must be absent, got an installed one; import it directly"
        )
    _installed.clear()
    for name, contents in _MODULES.items():
        _installed[name] = _module(name, contents)
    for name, module in _installed.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_installed[parent], child, module)
    sys.modules.update(_installed)


def uninstall() -> None:
    """Undo ``install``; without it, nothing happens. Names imported meanwhile keep working."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()


def _module(name: str, contents: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name, __doc__)
    is_package = any(other.startswith(f"{name}.") for other in _MODULES)
    # A spec without a loader, as a namespace package has: find_spec returns it.
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []
    vars(module).update({key: globals()[key] for key in contents})
    if name == "flash_attn":
        vars(module)["__version__"] = _VERSION
    return module


def flash_attn_func(
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, kv_heads, head_dim]
    v: Tensor,  # [B, Nk, kv_heads, head_dim]
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Attend to all keys of the sample; ``causal`` is aligned to the bottom right.

    Args:
        q: Queries.
        k: Keys; kv_heads divides heads.
        v: Values.
        dropout_p: Must be 0.
        softmax_scale: Of the scores; None: head_dim ** -0.5.
        causal: A query sees keys up to its own position, counted from the end.
        window_size: Must be (-1, -1): no window.
        softcap: Must be 0.
        alibi_slopes: Must be None.
        deterministic: Always so.
        return_attn_probs: Also return lse [B, heads, Nq] in float32, and None: without dropout
            flash-attn has no probabilities to return either.

    Returns:
        o like q, or (o, lse, None).

    Raises:
        ValueError: An option is not supported, or shapes do not fit together.
        TypeError: Dtypes differ.
    """
    _check("flash_attn_func", dropout_p, window_size, softcap, alibi_slopes)
    return _attend(q, k, v, softmax_scale, causal, None, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """``flash_attn_func`` of the three parts of qkv, which are read in place."""
    _check("flash_attn_qkvpacked_func", dropout_p, window_size, softcap, alibi_slopes)
    q, k, v = _parts("flash_attn_qkvpacked_func", qkv, "[B, N, 3, heads, head_dim]")
    return _attend(q, k, v, softmax_scale, causal, None, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,  # [Tq, heads, head_dim]
    k: Tensor,  # [Tk, kv_heads, head_dim]
    v: Tensor,  # [Tk, kv_heads, head_dim]
    cu_seqlens_q: Tensor,  # [S + 1] int32
    cu_seqlens_k: Tensor,  # [S + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> AttentionResult:
    """``flash_attn_func`` of sequences laid end to end; lse is [heads, Tq].

    ``block_table`` must be None. See ``iv2kernels.Packed`` for the lengths.
    """
    name = "flash_attn_varlen_func"
    _check(name, dropout_p, window_size, softcap, alibi_slopes, block_table)
    packed = Packed(cu_seqlens_q, int(max_seqlen_q), cu_seqlens_k, int(max_seqlen_k))
    return _attend(q, k, v, softmax_scale, causal, packed, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,  # [T, 3, heads, head_dim]
    cu_seqlens: Tensor,  # [S + 1] int32
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """``flash_attn_varlen_func`` of the three parts of qkv, which are read in place."""
    name = "flash_attn_varlen_qkvpacked_func"
    _check(name, dropout_p, window_size, softcap, alibi_slopes)
    q, k, v = _parts(name, qkv, "[T, 3, heads, head_dim]")
    packed = Packed(cu_seqlens, int(max_seqlen))
    return _attend(q, k, v, softmax_scale, causal, packed, return_attn_probs)


def flash_attn_unpadded_func(
    q: Tensor,  # [Tq, heads, head_dim]
    k: Tensor,  # [Tk, kv_heads, head_dim]
    v: Tensor,  # [Tk, kv_heads, head_dim]
    cu_seqlens_q: Tensor,  # [S + 1] int32
    cu_seqlens_k: Tensor,  # [S + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> AttentionResult:
    """``flash_attn_varlen_func`` as flash-attn 1 called it."""
    _check("flash_attn_unpadded_func", dropout_p)
    packed = Packed(cu_seqlens_q, int(max_seqlen_q), cu_seqlens_k, int(max_seqlen_k))
    return _attend(q, k, v, softmax_scale, causal, packed, return_attn_probs)


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,  # [T, 3, heads, head_dim]
    cu_seqlens: Tensor,  # [S + 1] int32
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> AttentionResult:
    """``flash_attn_varlen_qkvpacked_func`` as flash-attn 1 called it."""
    _check("flash_attn_unpadded_qkvpacked_func", dropout_p)
    q, k, v = _parts("flash_attn_unpadded_qkvpacked_func", qkv, "[T, 3, heads, head_dim]")
    packed = Packed(cu_seqlens, int(max_seqlen))
    return _attend(q, k, v, softmax_scale, causal, packed, return_attn_probs)


def _check(
    op: str,
    dropout_p: float,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    if dropout_p != 0:
        raise ValueError(f"{op}: dropout_p must be 0, got {dropout_p}")
    if tuple(window_size) != (-1, -1):
        raise ValueError(f"{op}: window_size must be (-1, -1), got {tuple(window_size)}")
    if softcap != 0:
        raise ValueError(f"{op}: softcap must be 0, got {softcap}")
    for argument, value in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if value is not None:
            raise ValueError(f"{op}: {argument} must be None, got {list(value.shape)}")


def _parts(op: str, qkv: Tensor, expected: str) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dim() != expected.count(",") + 1 or qkv.shape[-3] != 3:
        raise ValueError(f"{op}: qkv must be {expected}, got {list(qkv.shape)}")
    q, k, v = qkv.unbind(-3)
    return q, k, v


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    packed: Packed | None,
    return_lse: bool,
) -> AttentionResult:
    o = attention(q, k, v, causal=causal, scale=scale, packed=packed, return_lse=return_lse)
    return (*o, None) if isinstance(o, tuple) else o


class FusedMLP(nn.Module):
    """``fc1``, GELU, ``fc2``, with the parameter names of flash_attn.modules.mlp.FusedMLP.

    Args:
        in_features: Width C.
        hidden_features: Width between the layers; None: 4 C.
        out_features: Width of the result; None: C.
        bias1: Whether fc1 has a bias.
        bias2: Whether fc2 has a bias.
        activation: "gelu_approx", the tanh form, or "gelu", the exact one.
        return_residual: Also return x.
        checkpoint_lvl: Taken and not used: the activation is recomputed, as with 1.
        heuristic: Taken and not used: it chooses between CUDA kernels.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("gelu_approx", "gelu"):
            raise ValueError(f"FusedMLP: activation must be gelu_approx or gelu, got {activation}")
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(  # [..., C] -> [..., C_out]
        self, x: Tensor, process_group: Any = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the two layers."""
        if process_group is not None:
            raise ValueError("FusedMLP: process_group must be None, got a group")
        approximate = "tanh" if self.activation == "gelu_approx" else "none"
        fc1, fc2 = self.fc1, self.fc2
        y = mlp(x, fc1.weight, _bias(fc1), fc2.weight, _bias(fc2), approximate=approximate)
        return (y, x) if self.return_residual else y


def _bias(layer: nn.Linear) -> Tensor:
    # torch declares it a Tensor even where bias=False makes it None.
    bias: Tensor | None = layer.bias
    return layer.weight.new_zeros(layer.out_features) if bias is None else bias


class DropoutAddRMSNorm(nn.Module):
    """Residual add, then RMSNorm, as flash_attn.ops.rms_norm.DropoutAddRMSNorm without dropout.

    Args:
        hidden_size: Width C.
        prenorm: Also return the sum.
        p: Dropout of the branch; a training module with one that is not 0 raises when called.
        eps: Added to the mean square.
        residual_in_fp32: Keep the stream in float32 from the call without residual on; later ones
            keep the dtype of theirs.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.epsilon = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x0: Tensor,  # [..., C]
        residual: Tensor | None = None,  # [..., C]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalised sum in x0's dtype, with prenorm also the sum."""
        if self.training and self.p != 0:
            raise ValueError(f"DropoutAddRMSNorm: p must be 0 in training, got {self.p}")
        y, r = add_rms_norm(x0, residual, self.weight, eps=self.epsilon)
        if residual is None and self.residual_in_fp32:
            r = x0.float()
        return (y, r) if self.prenorm else y


def index_first_axis(
    input: Tensor,  # [rows, ...]
    indices: Tensor,  # [M] int64
) -> Tensor:
    """``input[indices]``."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor,  # [B, N, ...]
    attention_mask: Tensor,  # [B, N], bool or integer, nonzero where valid
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lay the valid tokens of the samples end to end.

    Args:
        hidden_states: Padded samples.
        attention_mask: Which tokens are valid: 1, others 0.

    Returns:
        The valid tokens [T, ...], their indices int64 [T] among the B * N, cu_seqlens int32
        [B + 1], and the largest number of tokens of a sample.

    Raises:
        ValueError: attention_mask is not [B, N].
    """
    if attention_mask.dim() != 2 or attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"unpad_input: attention_mask must be {list(hidden_states.shape[:2])}, "
            f"got {list(attention_mask.shape)}"
        )
    valid = attention_mask != 0
    lengths = valid.sum(1)
    indices = valid.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(
    hidden_states: Tensor,  # [T, ...]
    indices: Tensor,  # [T] int64
    batch: int,
    seqlen: int,
) -> Tensor:
    """Undo ``unpad_input``: tokens to their places in [batch, seqlen, ...], zeros elsewhere."""
    zeros = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return zeros.index_copy(0, indices, hidden_states).view(batch, seqlen, *zeros.shape[1:])


_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
)
_MODULES: dict[str, tuple[str, ...]] = {
    "flash_attn": _FUNCTIONS,
    "flash_attn.flash_attn_interface": (
        *_FUNCTIONS,
        "flash_attn_unpadded_func",
        "flash_attn_unpadded_qkvpacked_func",
    ),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "unpad_input"),
    "flash_attn.modules": (),
    "flash_attn.modules.mlp": ("FusedMLP",),
    "flash_attn.ops": (),
    "flash_attn.ops.fused_dense": ("FusedMLP",),
    "flash_attn.ops.rms_norm": ("DropoutAddRMSNorm",),
}
