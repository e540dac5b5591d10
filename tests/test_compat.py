from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from torch import nn

import iv2kernels as k
from iv2kernels import compat

OPTIONS = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
OPTIONS += ["deterministic", "return_attn_probs"]
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
OLD = ["dropout_p", "softmax_scale", "causal", "return_attn_probs", "deterministic"]


@pytest.fixture
def flash_attn():
    compat.install()
    yield importlib.import_module("flash_attn")
    compat.uninstall()


def sdpa(q, k, v, **options):  # [B, N, heads, head_dim]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


class Block(nn.Module):
    """An encoder block as released code writes it: the fused branch of each of its parts."""

    def __init__(self, dim, heads):
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
        from flash_attn.modules.mlp import FusedMLP
        from flash_attn.ops.rms_norm import DropoutAddRMSNorm

        super().__init__()
        self.attend, self.pad, self.unpad = flash_attn_varlen_qkvpacked_func, pad_input, unpad_input
        self.heads = heads
        self.norm1 = DropoutAddRMSNorm(dim, eps=1e-6, prenorm=True)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = DropoutAddRMSNorm(dim, eps=1e-6, prenorm=True)
        self.mlp = FusedMLP(in_features=dim, hidden_features=3 * dim, heuristic=1)

    def attention(self, x, mask):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        if mask is None:
            cu_seqlens = torch.arange(0, (batch + 1) * tokens, step=tokens, dtype=torch.int32)
            o = self.attend(qkv.flatten(0, 1), cu_seqlens, tokens, 0.0, causal=False)
            return self.proj(o.view(batch, tokens, dim))
        rows, indices, cu_seqlens, longest = self.unpad(qkv, mask)
        o = self.attend(rows, cu_seqlens, longest, 0.0, softmax_scale=None, causal=False)
        return self.proj(self.pad(o.flatten(1), indices, batch, tokens))

    def forward(self, x, residual=None, mask=None):
        x, residual = self.norm1(x, residual)
        x, residual = self.norm2(self.attention(x, mask), residual)
        return self.mlp(x), residual


def expected_block(block, x, residual, mask=None):
    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    batch, tokens, dim = x.shape
    residual = x if residual is None else x + residual
    qkv = block.qkv(norm(residual, block.norm1.weight)).view(batch, tokens, 3, block.heads, -1)
    seen = None if mask is None else mask[:, None, None, :].bool()
    o = sdpa(*qkv.unbind(2), attn_mask=seen).reshape(batch, tokens, dim)
    if mask is not None:
        o = o * mask[..., None]
    residual = residual + block.proj(o)
    h = block.mlp.fc1(norm(residual, block.norm2.weight))
    return block.mlp.fc2(F.gelu(h, approximate="tanh")), residual


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_released_block_runs(flash_attn, masked, first):
    block = Block(48, 3)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0, 1] * 4 + [1]]) if masked else None
    x = torch.randn(3, 9, 48, requires_grad=True)
    residual = None if first else torch.randn(3, 9, 48, requires_grad=True)
    leaves = [x, *block.parameters(), *(() if first else (residual,))]
    results = []
    for f in (block, lambda *args: expected_block(block, *args)):
        y, r = f(x, residual, mask)
        results.append((y, r, *torch.autograd.grad((y.square() + r).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention(flash_attn, causal, dtype):
    q = torch.randn(2, 5, 4, 16, dtype=dtype)
    key, value = torch.randn(2, 2, 9, 2, 16, dtype=dtype).unbind(0)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4) if causal else None
    expected = sdpa(q, key, value, attn_mask=mask, scale=0.3)
    o, lse, probs = flash_attn.flash_attn_func(
        q, key, value, softmax_scale=0.3, causal=causal, return_attn_probs=True
    )
    truth = sdpa(q.double(), key.double(), value.double(), attn_mask=mask, scale=0.3)
    assert_as_accurate("o", o, expected, truth)
    assert lse.shape == (2, 4, 5)
    assert probs is None
    qkv = torch.randn(2, 7, 3, 4, 16, dtype=dtype)
    got = flash_attn.flash_attn_qkvpacked_func(qkv, causal=causal)
    expected, truth = (sdpa(*x.unbind(2), is_causal=causal) for x in (qkv, qkv.double()))
    assert_as_accurate("qkvpacked", got, expected, truth)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention(flash_attn, causal):
    from flash_attn import flash_attn_interface as interface

    q, key, value = torch.randn(11, 4, 8), torch.randn(15, 2, 8), torch.randn(15, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 5, 11]).int(), torch.tensor([0, 6, 7, 15]).int()
    args = (q, key, value, cu_q, cu_k, 6, 8)
    got = interface.flash_attn_varlen_func(*args, causal=causal)
    for i in range(3):
        a, b, c, d = *cu_q[i : i + 2].tolist(), *cu_k[i : i + 2].tolist()
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a) if causal else None
        one = sdpa(q[None, a:b], key[None, c:d], value[None, c:d], attn_mask=mask)
        torch.testing.assert_close(got[a:b], one[0])
    old = interface.flash_attn_unpadded_func(*args, 0.0, causal=causal)
    assert torch.equal(old, got)
    qkv = torch.randn(11, 3, 4, 8)
    packed = interface.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 6, causal=causal)
    apart = interface.flash_attn_varlen_func(*qkv.unbind(1), cu_q, cu_q, 6, 6, causal=causal)
    assert torch.equal(packed, apart)
    old = interface.flash_attn_unpadded_qkvpacked_func(qkv, cu_q, 6, 0.0, None, causal)
    assert torch.equal(old, packed)


def test_padding(flash_attn):
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

    x = torch.randn(3, 4, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    rows, indices, cu_seqlens, longest = unpad_input(x, mask)
    assert indices.tolist() == [0, 2, 8, 9, 10]
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert (cu_seqlens.dtype, indices.dtype, longest) == (torch.int32, torch.int64, 3)
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert torch.equal(rows, index_first_axis(x.flatten(0, 1), indices))
    padded = pad_input(rows, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    padded.sum().backward()
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).float())
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask must be \[3, 4\], got"):
        unpad_input(x, mask[:, 1:])


@pytest.mark.parametrize("activation", ["gelu_approx", "gelu"])
def test_mlp(flash_attn, activation):
    from flash_attn.modules.mlp import FusedMLP
    from flash_attn.ops import fused_dense

    assert fused_dense.FusedMLP is FusedMLP
    mlp = FusedMLP(8, activation=activation, return_residual=True, dtype=torch.float64)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert mlp.fc1.weight.shape == (32, 8)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y, same = mlp(x)
    assert same is x
    approximate = "tanh" if activation == "gelu_approx" else "none"
    torch.testing.assert_close(y, mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate)))
    bare = FusedMLP(8, 5, 3, bias1=False, bias2=False, activation=activation)
    assert list(bare.state_dict()) == ["fc1.weight", "fc2.weight"]
    x = x.float()
    expected = bare.fc2(F.gelu(bare.fc1(x), approximate=approximate))
    torch.testing.assert_close(bare(x), expected)
    with pytest.raises(ValueError, match="activation must be gelu_approx or gelu, got relu"):
        FusedMLP(8, activation="relu")
    with pytest.raises(ValueError, match="process_group must be None"):
        bare(x, process_group=object())
    assert pickle.loads(pickle.dumps(bare))(x).equal(bare(x))


def test_norm(flash_attn):
    from flash_attn.ops.rms_norm import DropoutAddRMSNorm

    x, residual = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8)
    norm = DropoutAddRMSNorm(8, prenorm=True, residual_in_fp32=True)
    assert list(norm.state_dict()) == ["weight"]
    y, r = norm(x)
    assert (y.dtype, r.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(r, x.float())
    y, r = norm(x, residual)
    torch.testing.assert_close(r, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (8,), eps=1e-5).bfloat16())
    _, r = DropoutAddRMSNorm(8, prenorm=True)(x)
    assert r.dtype == torch.bfloat16
    assert torch.equal(DropoutAddRMSNorm(8)(x, residual), y)
    norm = DropoutAddRMSNorm(8, p=0.1)
    with pytest.raises(ValueError, match=r"DropoutAddRMSNorm: p must be 0 in training, got 0\.1"):
        norm(x)
    assert torch.equal(norm.eval()(x, residual), y)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_attn_func", ["q", "k", "v", *OPTIONS]),
        ("flash_attn_qkvpacked_func", ["qkv", *OPTIONS]),
        ("flash_attn_varlen_func", ["q", "k", "v", *VARLEN, *OPTIONS, "block_table"]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen", *OPTIONS]),
        ("flash_attn_unpadded_func", ["q", "k", "v", *VARLEN, *OLD]),
        ("flash_attn_unpadded_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen", *OLD]),
        ("unpad_input", ["hidden_states", "attention_mask"]),
        ("pad_input", ["hidden_states", "indices", "batch", "seqlen"]),
    ],
)
def test_signatures_are_those_of_flash_attn(name, arguments):
    assert list(inspect.signature(getattr(compat, name)).parameters) == arguments


def test_what_cannot_be_honoured_raises():
    q = torch.randn(1, 3, 2, 8)
    qkv = torch.randn(1, 3, 3, 2, 8)
    refused = {
        r"dropout_p must be 0, got 0\.1": {"dropout_p": 0.1},
        r"window_size must be \(-1, -1\), got \(4, 0\)": {"window_size": (4, 0)},
        r"softcap must be 0, got 30\.0": {"softcap": 30.0},
        r"alibi_slopes must be None, got \[2\]": {"alibi_slopes": torch.ones(2)},
    }
    cu = torch.tensor([0, 3]).int()
    calls = {
        "flash_attn_func": (q, q, q),
        "flash_attn_qkvpacked_func": (qkv,),
        "flash_attn_varlen_func": (q[0], q[0], q[0], cu, cu, 3, 3),
        "flash_attn_varlen_qkvpacked_func": (qkv[0], cu, 3),
    }
    for name, args in calls.items():
        f = getattr(compat, name)
        f(*args, deterministic=True)
        for message, options in refused.items():
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                f(*args, **options)
    with pytest.raises(ValueError, match=r"block_table must be None, got \[1, 1\]"):
        compat.flash_attn_varlen_func(*calls["flash_attn_varlen_func"], block_table=cu[None, :1])
    with pytest.raises(ValueError, match="flash_attn_unpadded_func: dropout_p must be 0, got 1"):
        compat.flash_attn_unpadded_func(*calls["flash_attn_varlen_func"], 1)
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3, heads, head_dim\], got"):
        compat.flash_attn_qkvpacked_func(qkv[0])
    with pytest.raises(ValueError, match=r"qkv must be \[T, 3, heads, head_dim\], got \[3, 2,"):
        compat.flash_attn_varlen_qkvpacked_func(qkv[0, :, :2], cu, 3)


def test_install_and_uninstall():
    assert importlib.util.find_spec("flash_attn") is None
    compat.uninstall()
    compat.install()
    first = sys.modules["flash_attn"]
    compat.install()
    assert sys.modules["flash_attn"] is first
    for name in compat._MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.name == name
        assert importlib.import_module(name).__name__ == name
    assert first.__version__.startswith("2.6")
    assert first.bert_padding.unpad_input is compat.unpad_input
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
        importlib.import_module("flash_attn.layers.rotary")
    compat.uninstall()
    compat.uninstall()
    assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
    assert importlib.util.find_spec("flash_attn") is None


def test_an_installed_flash_attn_is_not_hidden(monkeypatch, tmp_path):
    message = "install: flash_attn must be absent, got an installed one"
    with monkeypatch.context() as patch:
        real = ModuleType("flash_attn")
        real.__spec__ = ModuleSpec("flash_attn", None)
        patch.setitem(sys.modules, "flash_attn", real)
        with pytest.raises(RuntimeError, match=message):
            compat.install()
        compat.uninstall()
        assert sys.modules["flash_attn"] is real
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=message):
        compat.install()
    assert "flash_attn" not in sys.modules


def test_compiles():
    qkv = torch.randn(2, 5, 3, 2, 8)
    f = torch.compile(compat.flash_attn_qkvpacked_func, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(qkv), compat.flash_attn_qkvpacked_func(qkv))
    assert torch.equal(f(qkv), k.attention(*qkv.unbind(2)))
