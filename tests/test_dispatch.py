from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import iv2kernels as k
from iv2kernels import _C, dispatch
from iv2kernels.ops import attention


def test_the_argument_beats_use_and_use_beats_the_default():
    x = torch.ones(1)
    assert dispatch.choose("add_rms_norm", x) == "native"
    with k.use("reference"):
        assert dispatch.choose("add_rms_norm", x) == "reference"
        assert dispatch.choose("add_rms_norm", x, "native") == "native"
        with k.use(None):
            assert dispatch.choose("add_rms_norm", x) == "native"
    assert dispatch.choose("add_rms_norm", x) == "native"


def test_rows_of_a_table_may_need_many_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "_SCALAR_ONLY", [False])
    prefer = {"cpu": (dispatch.From(100, "native"),)}
    monkeypatch.setitem(dispatch.PREFER, "siglip_loss", prefer)
    assert dispatch.choose("siglip_loss", torch.ones(100, 8)) == "native"
    assert dispatch.choose("siglip_loss", torch.ones(99, 8)) == "reference"
    assert dispatch.choose("siglip_loss", torch.ones(99, 8), "native") == "native"
    assert dispatch.default("siglip_loss", "cpu", torch.float32) == "native"
    assert dispatch.choose("siglip_loss", torch.ones(())) == "reference"


def test_use_is_of_one_thread():
    seen = []
    with k.use("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(dispatch.choose("add_rms_norm", torch.ones(1)))
        )
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_a_choice_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match="implementation triton cannot run: Triton"):
        k.rms_norm(torch.ones(2, 4), torch.ones(4), impl="triton")
    with k.use("native"), pytest.raises(RuntimeError, match=r"got torch\.float64"):
        k.rms_norm(torch.ones(2, 4).double(), torch.ones(4))
    with pytest.raises(RuntimeError, match="no native kernel for meta tensors"):
        k.rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4), impl="native")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="impl must be one of reference, native, triton, torch"):
        k.use("fast").__enter__()
    with pytest.raises(ValueError, match="op must be one of add_rms_norm, attention"):
        k.available("flash")
    with pytest.raises(ValueError, match="set_isa: name must be one of scalar"):
        _C.set_isa("sse9")
    assert k.available("add_rms_norm")["native"] == "yes"


def test_kernels_refuse_a_wrong_number_of_arguments():
    message = "add_rms_norm_fwd: expected 15 arguments, and on a GPU a stream, got 2"
    with pytest.raises(TypeError, match=message):
        _C.add_rms_norm_fwd(0, 1)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_variables():
    code = "import iv2kernels as k, torch; from iv2kernels import _C, dispatch; "
    code += "print(_C.isa(), dispatch.choose('add_rms_norm', torch.ones(1)))"
    assert run(code, IV2_ISA="scalar").stdout.split() == ["scalar", "reference"]
    assert run(code, IV2_IMPL="reference").stdout.split()[1] == "reference"
    assert (
        "IV2_ISA must be one of scalar" in run("from iv2kernels import _C", IV2_ISA="neon").stderr
    )
    assert "IV2_IMPL must be one of reference" in run("import iv2kernels", IV2_IMPL="x").stderr


def test_triton_is_not_imported_and_says_what_it_needs():
    code = "import sys, iv2kernels as k; print('triton' in sys.modules); "
    reason = "print(k.available('add_rms_norm', {!r})['triton'])"
    plain = run(code + reason.format("cpu")).stdout
    assert plain.startswith("False\n")
    missing = "import sys; sys.modules['triton'] = None; import importlib.util as u; "
    missing += "find = u.find_spec; u.find_spec = lambda n: None if n == 'triton' else find(n); "
    for device in ("cpu", "cuda"):
        done = run(missing + code + reason.format(device))
        assert "pip install triton" in done.stdout, done.stderr
    if k.available("add_rms_norm", "cuda")["triton"] != "yes":
        return
    assert "need TRITON_INTERPRET=1, set before triton is imported" in plain
    assert run(code + reason.format("cpu"), TRITON_INTERPRET="1").stdout == "False\nyes\n"
    late = "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; "
    assert "set before triton is" in run(late + code + reason.format("cpu")).stdout
    assert run(code + reason.format("cuda")).stdout == "False\nyes\n"


def test_what_a_gpu_prefers():
    has_triton = k.available("add_rms_norm", "cuda")["triton"] == "yes"
    native = "native" if _C.cuda_kernels() else "reference"  # a build without csrc/cuda
    expected = "triton" if has_triton else native
    assert dispatch.default("add_rms_norm", "cuda", torch.bfloat16) == expected
    assert dispatch.default("add_rms_norm", "cuda", torch.float64) == "reference"
    assert dispatch.default("masks", "cuda", torch.int64) == native


def test_libraries_are_for_a_gpu_and_attention(monkeypatch):
    monkeypatch.setattr(dispatch, "_NO_TRITON", {"cuda": "no Triton", "cpu": "no Triton"})
    monkeypatch.setattr(dispatch, "_NATIVE_ON_CUDA", set())  # a build may have it
    assert dispatch.default("attention", "cuda", torch.bfloat16) == "torch"
    takes_lse = {"torch": "no", "cudnn": "no", "flash_attn": "no"}.get
    assert dispatch.default("attention", "cuda", torch.bfloat16, 1, takes_lse) == "reference"
    on_cpu = k.available("attention")
    for name in dispatch.LIBRARIES:
        assert on_cpu[name] == f"attention calls {name} for cuda tensors, got cpu"
    assert k.available("linear", "cuda")["torch"] == "linear calls torch for cpu tensors, got cuda"
    assert k.available("mlp")["cudnn"] == "mlp has no implementation cudnn in this build"
    monkeypatch.setattr(dispatch, "_HAS_FLASH_ATTN", False)
    assert k.available("attention", "cuda")["flash_attn"] == "flash-attn is not installed"


def test_native_attention_on_a_gpu_takes_some_calls_only(monkeypatch):
    monkeypatch.setattr(dispatch, "_NATIVE_ON_CUDA", {"attention"})
    monkeypatch.setitem(dispatch._NO_TRITON, "cuda", "Triton is not installed")
    monkeypatch.setitem(dispatch.PREFER["attention"], "cuda", ("triton", "native"))
    blocks = k.all_blocks(6, 6)
    with FakeTensorMode():
        q, odd = (torch.empty(1, 6, 2, n, device="cuda").bfloat16() for n in (64, 72))
    calls = [
        (q, None, "native", None),
        (q, blocks, "reference", "it does not take blocks on a GPU"),
        (odd, None, "reference", "it takes head_dim 64, 88 or 128 on a GPU, got 72"),
        (
            q.float(),
            None,
            "reference",
            r"native attention takes bfloat16 or float16 on a GPU, got torch\.float32",
        ),
    ]
    for x, lists, expected, _ in calls:
        refuses = partial(
            attention._refuses, q=x, k=x, causal=False, packed=None, blocks=lists, lse=False
        )
        assert dispatch.choose("attention", x, None, refuses) == expected
    for x, lists, _, reason in calls[1:]:
        with pytest.raises(RuntimeError, match=f"native cannot run: {reason}"):
            k.attention(x, x, x, blocks=lists, impl="native")


def test_one_openmp_runtime():
    code = (
        "import iv2kernels as k, torch; k.rms_norm(torch.ones(64, 64), torch.ones(64)); "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l}))"
    )
    assert run(code).stdout.strip() == "1"
