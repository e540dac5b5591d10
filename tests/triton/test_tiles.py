"""Every tile that tune() may choose, or some GPU has by default, keeps the accuracy rule."""

from __future__ import annotations

import pytest
import torch
from compare import check

import iv2kernels as k
from bench.ops import attention as bench
from bench.ops import linear as linear_bench
from bench.ops import spatiotemporal_attention as norm_bench
from iv2kernels import tiles
from iv2kernels.ops import attention as op
from iv2kernels.ops import linear as linear_op
from iv2kernels.ops import spatiotemporal_attention as norm_op
from iv2kernels.triton import attention_tiles
from iv2kernels.triton.attention_tiles import alternatives


def choices(call, index):
    """What to choose so that each kernel that a call launches has its alternative `index`."""
    with tiles.recording() as seen:
        call()
    return {knob: sizes[1 + index] for knob, sizes in seen.items() if len(sizes) > 1 + index}


def attention_call(head_dim, norm):
    """The kernel, its reference, inputs and what to differentiate."""
    if norm:
        inputs = norm_bench.inputs((1, 70, 1, head_dim), torch.bfloat16)
        kernel = lambda **i: k.spatiotemporal_attention(**i, impl="triton")  # noqa: E731
        reference = lambda **i: norm_op.reference(**i, scale=head_dim**-0.5, eps=1e-6)  # noqa: E731
        return kernel, reference, inputs, norm_bench.WRT
    inputs, scale = bench.inputs((1, 70, 1, head_dim), torch.bfloat16), head_dim**-0.5
    kernel = lambda **i: k.attention(**i, causal=True, impl="triton")  # noqa: E731
    reference = lambda **i: op.reference(**i, causal=True, scale=scale, packed=None)[0]  # noqa: E731
    return kernel, reference, inputs, bench.WRT


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "index"),
    [(n, i) for n in (64, 88) for i in range(len(alternatives(n, torch.bfloat16)))],
)
def test_attention(monkeypatch, head_dim, index, norm):
    kernel, reference, inputs, wrt = attention_call(head_dim, norm)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    chosen = choices(lambda: kernel(**leaves).sum().backward(), index)
    assert len(chosen) == 3
    assert all(("_norm" in knob.kernel) == norm for knob in chosen)
    monkeypatch.setattr(tiles, "CHOSEN", chosen)
    check(kernel, reference, inputs, wrt)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_attention_by_where_tensor_cores_read(monkeypatch, registers, norm):
    monkeypatch.setattr(attention_tiles, "_operands_in_registers", lambda: registers)
    assert attention_tiles.tiles_for(64, torch.bfloat16).dkdv.step == (32 if registers else 64)
    check(*attention_call(64, norm))


@pytest.mark.parametrize("index", range(3))
def test_linear(monkeypatch, index):
    inputs = linear_bench.inputs((70, 96, 200), torch.bfloat16)

    def kernel(**i):
        return k.linear(**i, impl="triton")

    chosen = choices(lambda: kernel(**inputs), index)
    assert [knob.width for knob in chosen] == [200]
    monkeypatch.setattr(tiles, "CHOSEN", chosen)
    check(kernel, linear_op.reference, inputs, linear_bench.WRT)


def test_float32_and_wide_heads_have_their_default_alone():
    assert alternatives(88, torch.float32) == alternatives(200, torch.bfloat16) == ()
