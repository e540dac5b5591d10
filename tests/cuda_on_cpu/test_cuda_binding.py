from __future__ import annotations

import re

import builds
import pytest
import torch

from iv2kernels import _C

LISTED = re.findall(
    r"K\((\w+), \w+\)",
    (builds.ROOT / "csrc" / "kernels.h").read_text().split("#define IV2_CUDA_KERNELS(K)")[1],
)


def test_a_build_has_all_kernels_or_none():
    assert LISTED
    assert _C.cuda_kernels() == (LISTED if _C.build_info()["cuda"] else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without a GPU")
def test_a_launch_without_a_gpu_says_so():
    rows, dim = 1, 8
    fields = (0,) * 8 + (rows, dim, 1, 0, 0, 1e-6, 0)
    reason = "CUDA: .*(driver|device)" if _C.cuda_kernels() else "this build has no CUDA kernel"
    with pytest.raises(RuntimeError, match=f"add_rms_norm_fwd: {reason}"):
        _C.add_rms_norm_fwd(*fields, 0)
    with pytest.raises(RuntimeError, match="rope3d_fwd: this build has no CUDA kernel"):
        _C.rope3d_fwd(*(0,) * 21, 0)


def test_the_number_of_arguments_is_checked():
    with pytest.raises(TypeError, match="15 arguments, and on a GPU a stream, got 17"):
        _C.add_rms_norm_fwd(*(0,) * 17)
