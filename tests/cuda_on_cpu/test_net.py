"""The net catches what it is there for: each mistake of faults.cu, and nothing without it."""

from __future__ import annotations

import pytest
import torch
from shim import ORDERS, Failed, Kernels, address

SIZES = {
    "no_wait": 256,
    "racing_blocks": 3,
    "no_warp_barrier": 32,
    "unaligned_word": 128,
    "column_reads": 1024,
    "bank_conflicts": 1024,
}
EXPECTED = {
    "beyond_the_end": lambda x: 2 * x,
    "beyond_shared": lambda x: x + 1,
    "no_barrier": lambda x: x.flip(0),
    "no_second_barrier": lambda x: torch.cat([x[1:], torch.zeros(1)]),
    "no_warp_barrier": lambda x: x.view(-1, 2).flip(1).flatten(),
    "no_wait": lambda x: x,
    "racing_blocks": lambda x: x,
    "divergent_barrier": lambda x: x,
    "unset_shared": lambda x: x.flip(0),
    "unaligned_word": lambda x: x,
    "column_reads": lambda x: x,
    "bank_conflicts": lambda x: x.view(32, 32).t().flatten(),
}


def run(name: str, fault: bool, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives, and what it should."""
    size = SIZES.get(name, 64)
    x = torch.randn(size + 4)[:size]  # there is something behind the end
    y = torch.zeros(size)
    kernels.launch(name, address(x), address(y), size, int(fault), 0)
    return y, EXPECTED[name](x)


@pytest.mark.parametrize("kind", ["plain", "ucontext", "asan", "tsan"])
@pytest.mark.parametrize("name", EXPECTED)
def test_nothing_is_found_in_sound_kernels(name, kind):
    got, expected = run(name, False, Kernels(kind, "random", "faults"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("asan", "beyond_the_end", "heap-buffer-overflow.*beyond_the_end"),
        ("asan", "beyond_shared", "use-after-poison.*beyond_shared"),
        ("tsan", "no_barrier", "data race.*no_barrier"),
        ("tsan", "no_second_barrier", "data race.*no_second_barrier"),
        ("tsan", "no_warp_barrier", "data race.*no_warp_barrier"),
        ("tsan", "racing_blocks", "data race.*racing_blocks"),
        ("plain", "divergent_barrier", "deadlock|returned while others wait|after a thread"),
        ("plain", "unaligned_word", "an access of 16 bytes is not aligned"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_mistake_is_reported(kind, name, message, order):
    with pytest.raises(Failed, match=rf"(?s){message}"):
        run(name, True, Kernels(kind, order, "faults"))


@pytest.mark.parametrize("name", ["no_barrier", "no_wait", "unset_shared"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_mistake_gives_nan(name, order):
    got, _ = run(name, True, Kernels("plain", order, "faults"))
    assert got.isnan().any()


def test_a_missing_barrier_can_leave_the_result_right():
    # only ThreadSanitizer and another order see it
    right = {}
    for order in ORDERS:
        got, expected = run("no_second_barrier", True, Kernels("plain", order, "faults"))
        right[order] = torch.equal(got, expected)
    assert right == {"forward": True, "reverse": False, "random": False}


def test_counters_see_uncoalesced_reads():
    kernels = Kernels(kernels="faults")
    counts = [kernels.counted(lambda f=fault: run("column_reads", f, kernels)) for fault in (0, 1)]
    assert (counts[0].read, counts[0].written) == (4096, 4096)
    assert (counts[1].read, counts[1].written) == (8 * 4096, 4096)


def test_counters_see_bank_conflicts():
    kernels = Kernels(kernels="faults")
    counts = [
        kernels.counted(lambda f=fault: run("bank_conflicts", f, kernels)) for fault in (0, 1)
    ]
    assert counts[0].bank_conflicts == 0
    assert counts[1].bank_conflicts == 32 * 31


def test_counters_see_barriers_and_shared_memory():
    kernels = Kernels(kernels="faults")
    counts = kernels.counted(lambda: run("no_second_barrier", False, kernels))
    assert (counts.barriers, counts.shared_bytes) == (2, 256)
    assert kernels.counted(lambda: run("no_wait", False, kernels)).shared_bytes == 1024
