"""The search space of tune() in short: all of it is compiled by the gate, and a spill is seen."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton.language")

from triton.runtime.jit import JITFunction

from iv2kernels import dispatch, tiles
from iv2kernels.triton import attention_tiles, gemm
from tests.gates import space


def test_every_tile_is_among_what_is_compiled():
    found = {}
    with (
        mock.patch.object(dispatch, "why_not", return_value=None),
        mock.patch.object(JITFunction, "run"),
        tiles.recording() as seen,
    ):
        for case in space.CASES:
            space.call_of(case).both()
        found |= {(knob.kernel, knob.width): sizes for knob, sizes in seen.items()}
    for head_dim in (64, 88, 128):
        others = attention_tiles.alternatives(head_dim, torch.bfloat16)
        assert others
        for kernel in attention_tiles.Tiles._fields:
            expected = [tuple(getattr(choice, kernel)) for choice in others]
            for name in (f"attention_{kernel}", f"attention_{kernel}_norm"):
                assert found[name, head_dim][1:] == expected
    expected = [tuple(tile) for tile in gemm.alternatives(torch.bfloat16)]
    assert all(found["linear", width][1:] == expected for width in (384, 1152))


def test_a_tile_that_spills_is_seen():
    kernel = "attention_fwd ROWS=128"
    good = {"local": 0, "stack": 0}
    assert space.complaint(space.CASES[0], kernel, "sm_90", good) is None
    for key in good:
        text = space.complaint(space.CASES[0], kernel, "sm_90", good | {key: 8})
        assert text.startswith("attention 1x129x2x64 bfloat16, sm_90: attention_fwd ROWS=128 must")
