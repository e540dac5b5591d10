from __future__ import annotations

import html

import pytest
import torch

from bench.ops import add_rms_norm, attention
from tests.gates import cuda_resources, report
from tests.gates.bounds import DATASHEETS, bound, bounds


def test_the_slower_of_work_and_memory_bounds():
    # H100: 989.4 TFLOP/s, 66.9 in float32, 3.35 TB/s
    assert bound(989_400_000, 1, "bfloat16", "sm_90") == (pytest.approx(1.0), "tensor cores")
    assert bound(66_900_000, 1, "float32", "sm_90") == (pytest.approx(1.0), "cores")
    assert bound(1, 3_350_000, "bfloat16", "sm_90") == (pytest.approx(1.0), "memory")


def test_attention_is_bound_by_tensor_cores_and_a_norm_by_memory():
    rows = list(bounds("sm_90", ["attention", "add_rms_norm"], ["bfloat16"]))
    batch, tokens, heads, head_dim = attention.GPU_SHAPES[2]
    forward, backward = (r for r in rows if r.shape == f"{batch}x{tokens}x{heads}x{head_dim}")
    flops = 4 * batch * heads * head_dim * tokens**2
    assert forward.microseconds == pytest.approx(flops / 989.4e6)
    assert backward.microseconds == pytest.approx(2.5 * forward.microseconds)
    assert forward.by == backward.by == "tensor cores"
    norms = [r for r in rows if r.op == "add_rms_norm"]
    assert {r.by for r in norms} == {"memory"}
    assert len(norms) == 2 * len(add_rms_norm.GPU_SHAPES)
    assert norms[0].microseconds == pytest.approx(4 * 2 * 64 * 417 * 384 / 3.35e6)


@pytest.mark.parametrize("arch", DATASHEETS)
def test_every_op_has_a_bound(arch):
    rows = list(bounds(arch, report.ON_GPUS, report.DTYPES))
    assert {row.op for row in rows} == set(report.ON_GPUS)
    assert min(row.microseconds for row in rows) > 0
    without = {op for op in report.ON_GPUS if all(r.part == "forward" for r in rows if r.op == op)}
    assert without == {"masks", "hard_negatives"}  # they have no backward


def test_a_page_with_all_kernels(tmp_path, capsys):
    out = tmp_path / "gates.html"
    assert report.main(["rope3d", "--arch", "sm_90", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("in µs; no measurement")
    assert len([line for line in printed if line.startswith("rope3d")]) == 4
    text = out.read_text()
    assert "nothing here was measured" in text
    assert all(html.escape(name) in text for name in cuda_resources.load()[1])
    assert all(sheet.name in text for sheet in DATASHEETS.values())


def test_dtypes_have_sizes_as_torch_has():
    float32, bfloat16 = (
        next(iter(bounds("sm_90", ["add_rms_norm"], [name]))) for name in ("float32", "bfloat16")
    )
    assert float32.microseconds / bfloat16.microseconds == torch.float32.itemsize / 2
