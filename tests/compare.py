"""The accuracy rule: an implementation is judged against float64, relative to eager's own error.

A result passes when its relative L2 error to the float64 reference is at most 1.5 x the error of
the reference run in the result's own dtype (1.75 x for float32 of Triton or on a GPU), and its
worst row's error at most 4 x eager's worst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from implementation import IMPL
from torch import Tensor

FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-4, torch.float16: 1e-5}


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative L2 error, and the worst row's error relative to the mean norm of a row."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(got).all(), "not finite"
    if truth.numel() == 0:
        return 0.0, 0.0
    rows = (got - truth).reshape(-1, truth.shape[-1] if truth.dim() else 1).norm(dim=1)
    scale = truth.norm().clamp_min(1e-30)
    return (rows.norm() / scale).item(), (rows.max() * len(rows) ** 0.5 / scale).item()


def assert_as_accurate(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Fails, naming the tensor, unless `got` is as close to the truth as eager is."""
    # A GPU without tensor cores adds products one after the other, where BLAS keeps several sums.
    one_chain = (IMPL == "triton" or got.is_cuda) and got.dtype == torch.float32
    most = 1.75 if one_chain else 1.5
    # With few elements, how close eager comes is luck: the floor is higher.
    floor = FLOOR[got.dtype] * (1 if truth.numel() >= 256 else 4)
    error, worst = errors(got, truth)
    eager_error, eager_worst = errors(eager, truth)
    assert error <= max(most * eager_error, floor), (
        f"{name}: error {error:.2e}, eager {eager_error:.2e}"
    )
    # A single row has no averaging: the floor of its error is higher.
    assert worst <= max(4 * eager_worst, 8 * floor), (
        f"{name}: worst row {worst:.2e}, eager {eager_worst:.2e}"
    )


def run(
    f: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor | None],
    wrt: Sequence[str],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of f by name; the loss weighs each output by fixed random numbers.

    With a dtype, floating inputs are converted first (float64: the truth).
    """
    args = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype)
            value.requires_grad_(name in wrt)
        args[name] = value
    outputs = f(**args)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(i)
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            # rounded once, so that every dtype sees the same gradient
            weights = weights.to(output.device, torch.bfloat16).double()
            loss = loss + (output.double() * weights).sum()
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    if wrt:
        grads = torch.autograd.grad(loss, [args[name] for name in wrt])
        results |= {f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return results


def check(
    f: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor | None],
    wrt: Sequence[str],
) -> None:
    """f against the float64 reference, relative to the reference in the inputs' own dtype."""
    got, eager = run(f, inputs, wrt), run(reference, inputs, wrt)
    truth = run(reference, inputs, wrt, torch.float64)
    for name, value in got.items():
        if value.is_floating_point():
            assert_as_accurate(name, value, eager[name], truth[name])
        else:
            assert torch.equal(value, eager[name]), name


def check_or_close(
    f: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    wrt: Sequence[str],
    enough: bool,
) -> None:
    """As check when there is `enough` to average over, else within an absolute tolerance.

    Of a handful of numbers the error is luck, and a true gradient may be 0 (attention to one key).
    """
    if enough:
        check(f, reference, inputs, wrt)
        return
    got, truth = run(f, inputs, wrt), run(reference, inputs, wrt, torch.float64)
    eps = torch.finfo(inputs[wrt[0]].dtype).eps
    for name, value in got.items():
        tolerance = 100 * eps * (1 + truth[name].abs().max().item())
        torch.testing.assert_close(value.double(), truth[name].double(), atol=tolerance, rtol=0)
