from __future__ import annotations

import pytest
import torch
from shim import ORDERS, Kernels, address

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = [torch.bfloat16, torch.float16]


def launch(name, a, out, b=None, dtype=torch.float32, order="random"):
    kernels = Kernels("plain", order, "primitives")
    kernels.launch(name, address(a), address(b), address(out), a.numel(), CODES[dtype], 0)
    return out


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_torchs(dtype):
    bits = torch.randint(-(2**31), 2**31, (20_000,)).int()
    near_one = torch.randn(4000)
    x = torch.cat([bits.view(torch.float32), near_one, near_one * 1e-6, near_one * 1e-7])
    x = torch.cat(
        [x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504, 65519.9, 65520, 1e-8])]
    )
    got = launch("convert", x, torch.empty(len(x), dtype=dtype), dtype=dtype)
    expected = x.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_widens_as_torchs(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got = launch("widen", x, torch.empty(len(x)), dtype=dtype)
    assert torch.equal(got.nan_to_num(7.0), x.float().nan_to_num(7.0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_matrix_product_of_fragments(dtype, order):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    got = launch("multiply", a, torch.empty(16, 8), b, dtype, order)
    torch.testing.assert_close(got.double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_exchange(order):
    x = torch.randint(1000, (32,), dtype=torch.int32)
    up, fifth, odd, count = launch("lanes", x, torch.empty(4, 32, dtype=torch.int32), order=order)
    assert torch.equal(up, torch.cat([x[:3], x[:-3]]))
    assert (fifth == x[5]).all()
    assert torch.equal(odd, x % 2)
    assert count[0] == (x % 2).tolist().index(1)
    assert (count[1:] == (x % 2).sum()).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 96, 1000])
def test_block_sums(size, order):
    x = torch.randn(size)
    got = launch("sums", x, torch.empty(4), order=order).double()
    expected = torch.stack([x.double().sum(), x.double().square().sum()]).repeat(2)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
