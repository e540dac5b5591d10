"""The net under the kernels: planted faults are caught, and bfloat16 is a GPU's."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton import interpreter


@triton.jit
def _double_kernel(x, y, count, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < count + LIMIT, other=0.0) * 2, mask=i < count)


@triton.jit
def _sum_kernel(x, y, count, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + lane
    value = tl.load(x + i, mask=i < count, other=0.0)
    if ATOMIC:
        tl.atomic_add(y + lane, value)
    else:
        tl.store(y + lane, value)


@triton.jit
def _shift_kernel(x, y, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.num_programs(0) * BLOCK - 1
    tl.store(y + i, tl.load(x + tl.minimum(tl.maximum(i + AHEAD, 0), last)))


@triton.jit
def _one_address_kernel(y, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y + lane // 2, lane.to(tl.float32))


@triton.jit
def _bfloat16_kernel(x, y, sums, product, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(sums + at, tl.where(a > b, a + b * 3, -a))
    tl.store(product + at, tl.dot(a, tl.trans(b)).to(tl.bfloat16))


def test_right_kernels_pass_and_their_bytes_are_counted():
    x, y = torch.randn(100), torch.zeros(100)
    with interpreter.traffic() as moved:
        _double_kernel[(2,)](x, y, 100, BLOCK=64, LIMIT=0)
    assert torch.equal(y, 2 * x)
    assert moved == interpreter.Traffic(800, 800)
    sums = torch.zeros(64)
    with interpreter.traffic() as moved:
        _sum_kernel[(2,)](x, sums, 100, BLOCK=64, ATOMIC=True)
    assert torch.equal(sums, x[:64] + torch.nn.functional.pad(x[64:], (0, 28)))
    assert moved == interpreter.Traffic(400 + 2 * 256, 400 + 256)


def test_views_of_one_buffer_are_one_region():
    buffer = torch.randn(3, 40)
    whole, part = buffer.view(-1), buffer[1, :10]
    _double_kernel[(2,)](whole, part, 10, BLOCK=64, LIMIT=110)


@pytest.mark.parametrize("extra", [1, 28])
def test_a_load_out_of_bounds_is_caught(extra):
    x, y = torch.randn(100), torch.zeros(100)
    with pytest.raises(Exception, match=r"program \(1, 0, 0\) loads out of bounds in .* lanes"):
        _double_kernel[(2,)](x, y, 100, BLOCK=64, LIMIT=extra)


def test_a_store_out_of_bounds_is_caught():
    x, y = torch.randn(128), torch.zeros(100)
    with pytest.raises(Exception, match="stores out of bounds in 28 lanes, the first at byte 400"):
        _double_kernel[(2,)](x, y, 128, BLOCK=64, LIMIT=0)


def test_two_programs_that_write_one_place_are_caught():
    with pytest.raises(Exception, match="writes where another program of this launch wrote"):
        _sum_kernel[(2,)](torch.randn(100), torch.zeros(64), 100, BLOCK=64, ATOMIC=False)


@pytest.mark.parametrize(
    ("ahead", "fault"), [(-64, "loads what another .* wrote"), (64, "writes what another .* load")]
)
def test_a_program_that_meets_another_ones_data_is_caught(ahead, fault):
    x = torch.randn(128)
    with pytest.raises(Exception, match=fault):
        _shift_kernel[(2,)](x, x, BLOCK=64, AHEAD=ahead)
    _shift_kernel[(2,)](x, x, BLOCK=64, AHEAD=0)


def test_two_lanes_that_write_one_address_are_caught():
    with pytest.raises(Exception, match="stores two lanes to one address"):
        _one_address_kernel[(1,)](torch.zeros(64), BLOCK=64)


def test_bfloat16_is_computed_in_float32_and_rounded_to_nearest():
    x, y = torch.randn(2, 32, 32).bfloat16()
    x[0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3895e38])
    y[0, :4] = torch.tensor([1.0, 1.0, 1.0, 1.3e36])
    sums, product = torch.zeros(2, 32, 32).bfloat16()
    _bfloat16_kernel[(1,)](x, y, sums, product, BLOCK=32)
    expected = torch.where(x > y, x + y * 3, -x)
    assert torch.equal(sums.nan_to_num(7), expected.nan_to_num(7))
    exact = x[1:].double() @ y.double().t()
    torch.testing.assert_close(product[1:].double(), exact, atol=1e-2, rtol=2**-8)


def test_a_reduction_of_bfloat16_is_refused():
    @triton.jit
    def _kernel(x, y, BLOCK: tl.constexpr):
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))

    with pytest.raises(Exception, match="convert to float32 first"):
        _kernel[(1,)](torch.ones(8).bfloat16(), torch.ones(1), BLOCK=8)
