"""What only a GPU can tell: right there, on any stream, in graphs, without a wait, compiled.

The ops' own tests run there too: `IV2_TEST_GPU=triton pytest tests/ops`; `make gpu` runs all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import assert_as_accurate

from bench.cases import Call, accuracy
from bench.ops import attention as attention_bench
from iv2kernels import _C, dispatch
from iv2kernels.native import attention as native_attention
from iv2kernels.ops import attention as attention_page
from tests.gpu.kernels import call_of, case_of, kernels

pytestmark = pytest.mark.gpu
KERNELS = kernels()
IDS = [f"{op}-{impl}" for op, impl in KERNELS]
every_kernel = pytest.mark.parametrize(("op", "impl"), KERNELS, ids=IDS)
# cycles of a kernel that only waits: about a second
LONG = 2_000_000_000


def results(call: Call) -> list[torch.Tensor]:
    """Outputs, and gradients where there are any."""
    found: list[torch.Tensor] = []
    for part in (call.forward(), call.both()):
        found += part if isinstance(part, tuple) else (part,)
    return found


def assert_same(impl: str, got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if impl in dispatch.LIBRARIES:  # some add with atomics
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
        else:
            assert torch.equal(a, b)


@every_kernel
def test_matches_float64_with_arguments_there_alone(op: str, impl: str) -> None:
    call = call_of(op, impl)
    _, wrong = accuracy(case_of(op), call)
    assert wrong is None, wrong
    assert all(x.is_cuda for x in results(call))


@every_kernel
def test_in_a_graph_as_outside(op: str, impl: str) -> None:
    call = call_of(op, impl)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call)
    for x in call.inputs.values():
        if torch.is_tensor(x) and x.is_floating_point() and x.dim() > 1:
            x.copy_(x.flip(0))
    expected = results(call)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(impl, captured, expected)


@every_kernel
def test_on_the_current_stream_alone(op: str, impl: str) -> None:
    call, side = call_of(op, impl), torch.cuda.Stream()
    expected = results(call)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        results(call)  # takes the stream's memory
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(side):
        got = results(call)
        done = side.record_event()
    done.synchronize()
    waited = busy.query()
    torch.cuda.synchronize()
    assert not waited, "it waited for another stream"
    assert_same(impl, got, expected)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.usefixtures("_no_waiting")
@every_kernel
def test_waits_for_nothing(op: str, impl: str) -> None:
    call = call_of(op, impl)
    results(call)
    torch.cuda.set_sync_debug_mode("error")
    results(call)


@every_kernel
def test_compiled_as_not(op: str, impl: str) -> None:
    call = call_of(op, impl)
    torch.compiler.reset()
    compiled = Call(torch.compile(call.function, fullgraph=True), call.inputs, call.wrt)
    assert_same(impl, results(compiled), results(call))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_kernel
def test_on_the_tensors_gpu_not_the_current_one(op: str, impl: str) -> None:
    expected, call = results(call_of(op, impl)), call_of(op, impl)
    there = case_of(op, "cuda:1").inputs()
    got = results(Call(call.function, there, call.wrt))
    assert all(x.device.index == 1 for x in got)
    assert_same(impl, [x.to("cuda:0") for x in got], expected)


@pytest.mark.skipif("attention_fwd" not in _C.cuda_kernels(), reason="csrc/cuda is not built")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 417, 16, 88), (1, 1025, 6, 64), (1, 411, 25, 128)])
def test_forward_of_attention_in_cuda(
    shape: tuple[int, int, int, int], dtype: torch.dtype, causal: bool
) -> None:
    inputs = {name: x.cuda() for name, x in attention_bench.inputs(shape, dtype).items()}
    scale = shape[3] ** -0.5
    sizes = (None, None, shape[1], shape[1])
    got = native_attention.attention_fwd(*inputs.values(), *sizes, causal, scale)
    eager = attention_page.reference(**inputs, causal=causal, scale=scale, packed=None)
    wide = {name: x.double() for name, x in inputs.items()}
    truth = attention_page.reference(**wide, causal=causal, scale=scale, packed=None)
    for name, *values in zip(("o", "lse"), got, eager, truth, strict=True):
        assert_as_accurate(name, *values)


@pytest.mark.skipif("masks_draw" not in _C.cuda_kernels(), reason="csrc/cuda is not built")
def test_masks_are_those_of_the_cpu() -> None:
    call = call_of("masks", "native")
    on_cpu = case_of("masks", "cpu")
    expected = on_cpu.call(**on_cpu.inputs(), impl="native")
    assert torch.equal(call.forward().cpu(), expected)


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


# Races in shared memory are looked for in what we wrote; Triton's barriers are its compiler's.
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("tool", "impl"),
    [
        ("memcheck", "native"),
        ("racecheck", "native"),
        ("synccheck", "native"),
        ("memcheck", "triton"),
    ],
)
def test_under_compute_sanitizer(tool: str, impl: str) -> None:
    if impl not in dict.fromkeys(known for _, known in KERNELS):
        pytest.skip(f"this build has no {impl} kernels for a GPU")
    done = subprocess.run(
        [
            *(str(sanitizer()), "--tool", tool, "--error-exitcode", "99"),
            *(sys.executable, "-m", "tests.gpu.kernels", impl),
        ],
        cwd=Path(__file__).parents[2],
        # each tensor an allocation of its own, with its own end
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
