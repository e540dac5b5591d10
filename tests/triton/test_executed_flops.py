"""Products that attention multiplies, over those that it must: what cutting head_dim costs."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

import iv2kernels as k

# Of two matrices: forward has two, the pass over queries three, that over keys four.
FORWARD, BACKWARD = 2, 3 + 4
MOST = 1.15


@pytest.fixture
def executed(monkeypatch):
    """Flops of tl.dot, counted as they run."""
    count = [0]
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        count[0] += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return count


@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (80, 80), (88, 96), (128, 128)])
def test_head_dim_is_cut_and_not_padded_to_a_power_of_two(executed, head_dim, width):
    tokens = 128  # whole tiles: of what is left over others tell
    x = torch.randn(1, tokens, 1, head_dim).bfloat16().requires_grad_()
    useful = 2 * tokens**2 * head_dim
    o = k.attention(x, x, x, impl="triton")
    forward = executed[0] / (FORWARD * useful)
    o.backward(o.detach())
    both = executed[0] / ((FORWARD + BACKWARD) * useful)
    assert forward == both == width / head_dim
    assert forward <= MOST
