"""What every backend must agree on with the definition in float64, and within which bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsoftloss import functional, ops, reference

DIVERSITIES = ops.DIVERSITIES
# relative to the loss, and to each gradient element; float64 is held to what its own arithmetic gives
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}
# of the largest gradient element of the row: where terms of different sign meet, their rounding stays
FLOOR = {torch.float32: 3e-7, torch.float64: 1e-14}


def _spacing(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each |t| to the next number of ``dtype``."""
    info = torch.finfo(dtype)
    exponent = t.abs().clamp(min=info.tiny).log2().floor()
    return torch.exp2(exponent) * info.eps


def gradient_bound(want: Tensor, dtype: torch.dtype, ulps: float, class_dim: int) -> Tensor:
    """The error allowed for each element of a gradient that is ``want`` in float64."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    finite = torch.where(want.isfinite(), want.abs(), 0.0)
    bound = BOUND[arithmetic] * finite + FLOOR[arithmetic] * finite.amax(class_dim, keepdim=True) + 1e-37
    if dtype.itemsize < 4:
        bound = bound + ulps * _spacing(want, dtype)
    return bound


def agree(
    backend: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    upstream: Tensor | float | None = None,
    ulps: float = 0.5,
    alone: bool = True,
    **options: object,
) -> None:
    """Assert that loss, parts and gradient of ``backend`` are those of the reference in float64.

    ``upstream``: the gradient from above, by default 1. ``ulps``: of rounding allowed to a 16-bit gradient.
    ``alone``: ask for the loss without gradient and parts too.
    """
    arithmetic = reference.accumulation_dtype(logits.dtype)
    z = logits.detach().requires_grad_()
    got = functional.cross_entropy(z, target, weight, backend=backend, return_components=True, **options)  # type: ignore[call-overload]
    assert got.loss.dtype == arithmetic
    by_itself = None
    if alone:  # it may be summed in another order
        by_itself = functional.cross_entropy(logits.detach(), target, weight, backend=backend, **options)  # type: ignore[call-overload]
        assert by_itself.shape == got.loss.shape
    exact = logits.detach().double().requires_grad_()
    sample_weight = options.pop("sample_weight", None)
    want = functional.cross_entropy(
        exact,
        target,
        None if weight is None else weight.double(),
        backend="reference",
        return_components=True,
        sample_weight=None if sample_weight is None else sample_weight.double(),  # type: ignore[attr-defined]
        **options,
    )  # type: ignore[call-overload]
    tolerance = BOUND[arithmetic]
    values = list(zip(got._fields, got, want, strict=True)) + ([] if by_itself is None else [("loss alone", by_itself, want.loss)])
    for name, a, b in values:
        # D is a difference of logarithms or of sums near 1 for some penalties, and the parts add up to the loss
        scale = sum(t.detach().abs().nan_to_num(0, 0, 0) for t in want) if name != "cross_entropy" else 0.0
        error = (a.detach().double() - b.detach()).abs()
        allowed = tolerance * (b.detach().abs() + 0.1 * scale) + 1e-37
        good = (a.detach().double() == b) | (a.isnan() & b.isnan()) | (error <= allowed)
        assert good.all(), (
            f"{name}: {a[~good].tolist()[:4] if a.dim() else a.item()} is not {b[~good].tolist()[:4] if b.dim() else b.item()}"
        )

    up = torch.ones((), dtype=arithmetic) if upstream is None else torch.as_tensor(upstream, dtype=arithmetic)
    up = up.expand(got.loss.shape)
    if not logits.numel():
        return
    got.loss.backward(up)
    want.loss.backward(up.double())
    assert z.grad is not None and exact.grad is not None
    if logits.stride() == torch.empty_like(logits).stride():
        assert z.grad.stride() == logits.stride()
    class_dim = min(1, logits.dim() - 1)
    bound = gradient_bound(exact.grad, logits.dtype, ulps, class_dim)
    a, b = z.grad.double(), exact.grad
    if logits.dtype.itemsize < 4:  # what the dtype cannot hold
        b = torch.where(b.abs() > torch.finfo(logits.dtype).max, b.to(logits.dtype).double(), b)
    good = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= bound)
    assert good.all(), f"gradient: {a[~good].tolist()[:4]} is not {b[~good].tolist()[:4]}, at {(~good).nonzero()[:4].tolist()}"
