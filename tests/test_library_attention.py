from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from compare import check
from torch.nn.attention import SDPBackend

import iv2kernels as k
from bench.ops import attention as bench
from iv2kernels.library import attention as library
from iv2kernels.ops import attention as page

WRT = list(bench.WRT)


def fake_flash_attn():
    """What flash-attn computes, by our definition."""

    def dense(q, k, v, causal, softmax_scale):
        return page.reference(q, k, v, causal, softmax_scale, None)[0]

    def packed(q, k, v, starts, k_starts, longest, k_longest, causal, softmax_scale):
        lengths = page.Packed(starts, longest, k_starts, k_longest)
        return page.reference(q, k, v, causal, softmax_scale, lengths)[0]

    return SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)


@pytest.fixture
def _on_a_cpu(monkeypatch):
    """SDPA's FlashAttention has a twin for CPUs, cuDNN has none."""
    monkeypatch.setitem(library._BACKENDS, "cudnn", SDPBackend.MATH)
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())


def pair(impl, causal=False, scale=0.3, packed=None):
    return (
        lambda **i: library.attention(**i, causal=causal, scale=scale, packed=packed, impl=impl),
        lambda **i: page.reference(**i, causal=causal, scale=scale, packed=packed)[0],
    )


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("impl", ["torch", "cudnn", "flash_attn"])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_op(impl, causal):
    inputs = bench.inputs((2, 70, 4, 88), torch.bfloat16)
    check(*pair(impl, causal), inputs, WRT)
    inputs |= {name: inputs[name][:, :, ::2] for name in ("k", "v")}  # two heads share one
    check(*pair(impl, causal), inputs, WRT)


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("others", [{}, {"cu_seqlens_k": [0, 20, 60], "max_seqlen_k": 40}])
def test_packed_by_flash_attn(others):
    lengths = {n: torch.tensor(x).int() if isinstance(x, list) else x for n, x in others.items()}
    packed = k.Packed(torch.tensor([0, 30, 50]).int(), 30, **lengths)
    g = torch.Generator().manual_seed(0)
    keys = 60 if others else 50
    shapes = {"q": (50, 2, 64), "k": (keys, 2, 64), "v": (keys, 2, 64)}
    inputs = {n: torch.randn(s, generator=g).bfloat16() for n, s in shapes.items()}
    check(*pair("flash_attn", packed=packed), inputs, WRT)


def refusal(impl, q, keys=None, causal=False, packed=None, blocks=None, lse=False):
    return page._refuses(impl, q, q if keys is None else keys, causal, packed, blocks, lse)


def test_what_they_do_not_take():
    good = torch.empty(2, 70, 4, 88, dtype=torch.bfloat16)
    for impl in ("torch", "cudnn", "flash_attn"):
        assert refusal(impl, good) is None
        assert refusal(impl, good, causal=True) is None
        assert refusal(impl, good, good[:, :30]) is None
        for reason, arguments in (
            ("bfloat16 or float16, got torch.float32", {"q": good.float()}),
            ("in steps of 8, got 44", {"q": good[..., ::2]}),
            ("over equal lengths, got 70 and 30", {"keys": good[:, :30], "causal": True}),
            ("does not take blocks", {"blocks": k.all_blocks(70, 2)}),
            ("does not take return_lse", {"lse": True}),
            ("empty tensors", {"q": good[:0]}),
        ):
            assert reason in refusal(impl, **{"q": good} | arguments)
        wide = good[..., :1].expand(-1, -1, -1, 200)
        assert (refusal(impl, wide) is None) == (impl != "cudnn")
        starts = torch.tensor([0, 70]).int()
        packed, crossed = k.Packed(starts, 70), k.Packed(starts, 70, starts, 70)
        rows = good[0]
        assert (refusal(impl, rows, packed=packed, causal=True) is None) == (impl == "flash_attn")
        assert refusal(impl, rows, packed=crossed, causal=True)
    assert refusal("triton", good.float(), blocks=k.all_blocks(70, 2), lse=True) is None
    assert refusal("native", good, lse=True) is None
    assert "does not take blocks on a GPU" in refusal("native", good, blocks=k.all_blocks(70, 2))
