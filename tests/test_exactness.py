"""Promise: exact to float32 at every margin and every offset; 16-bit logits cost the rounding of the output and no more.

For margins from -80 to 80 and logit offsets up to +-1e4 the loss and each gradient element above 1e-35 are within 1e-5 of
float64 on the same float32 logits, plus 3e-7 of the row's largest gradient element, where terms of different sign meet.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_true, compute, rounding, truth
from torch import Tensor

RTOL, OF_THE_LARGEST, SMALLEST = 1e-5, 3e-7, 1e-35

CLASSES = [
    2,  # one class in the complement
    3,
    10,  # tile kernel
    256,  # the last of the tile kernel
    257,  # the first of the row kernel, with a tail of one class
    1000,
    4097,  # a second part of one class
    32769,  # classes shared between threads
]
OFFSETS = [0.0, -37.5, -1e4, 1e4]
SPREADS = [0.0, 1e-3, 1.0, 10.0]  # of the complement: at 1e4 a float32 has steps of 1e-3
MARGINS = np.linspace(-80, 80, 33)


def grid(classes: int) -> list[tuple[float, float]]:
    """Offset and spread; for long rows the extremes only, since the rest takes minutes."""
    every = list(itertools.product(OFFSETS, SPREADS))
    return every if classes < 4000 else [(0.0, 10.0), (0.0, 0.0), (-1e4, 1e-3), (1e4, 1.0)]


def rows_at(margins: np.ndarray, classes: int, offset: float, spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A row a margin: a random complement, and the true class where log(p/(1 - p)) is minus the margin."""
    target = torch.randint(classes, (len(margins),))
    z = offset + spread * torch.randn(len(margins), classes, dtype=torch.float64)
    c = z.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    z.scatter_(1, target[:, None], (c - torch.from_numpy(margins))[:, None])
    return z.to(dtype), target


def assert_promised(logits: Tensor, target: Tensor, backend: str, **options) -> None:
    got = compute(backend, logits, target, reduction="none", **options)
    true = truth(logits, target, reduction="none", **options)
    loss, gradient = true.loss.numpy(), true.gradient.numpy()
    seen = loss > SMALLEST  # a row of 16-bit logits may be far outside the margins of the promise
    assert_near(got.loss, true.loss, np.where(seen, RTOL * loss, SMALLEST), "loss")
    assert (got.loss.numpy()[seen] != 0).all(), "a loss of 0 where the truth is not"
    seen = np.abs(gradient) > SMALLEST
    bound = RTOL * np.abs(gradient) + OF_THE_LARGEST * np.abs(gradient).max(1, keepdims=True)
    assert_near(got.gradient, true.gradient, np.where(seen, bound, SMALLEST + bound) + rounding(true.gradient, logits.dtype), "gradient")
    if logits.dtype is torch.float32:
        assert (got.gradient.numpy()[seen] != 0).all(), "a gradient of 0 where the truth is not"


@pytest.mark.parametrize("diversity", [None, "logit_variance"])
@pytest.mark.parametrize("classes", CLASSES)
def test_every_margin_and_offset(backend, classes, diversity):
    for offset, spread in grid(classes):
        logits, target = rows_at(MARGINS[:: 1 if classes < 1000 else 16], classes, offset, spread)
        assert_promised(logits, target, backend, diversity=diversity)


@pytest.mark.parametrize("diversity", ["kl", "reverse_kl", "chi2", "variance"])
@pytest.mark.parametrize("classes", CLASSES)
def test_penalties_that_are_a_difference(backend, classes, diversity):
    """log n - H, n Q2 - 1 and the like: each of the two terms has a relative error of a few eps, so the difference has an
    error of a few eps times the sum of their magnitudes, however small it is itself; `formula` adds those magnitudes up."""
    for offset, spread in grid(classes):
        logits, target = rows_at(MARGINS[:: 4 if classes < 1000 else 16], classes, offset, spread)
        options = dict(reduction="none", diversity=diversity)
        assert_true(compute(backend, logits, target, **options), logits, target, **options)


@pytest.mark.parametrize("classes", [3, 10, 257, 5000, 40000])  # tile, tile, row, two parts, shared between threads
def test_a_nearly_flat_complement_far_from_zero(backend, classes):
    """The steps of float32 at 1e4 are all that the complement varies by: sums of squares, and sums of the logits, lose it."""
    for step in (1, 3):
        logits, target = rows_at(np.array([-80.0, -30.0, 0.0]), classes, 1e4, 0.0)
        moved = logits + step * 2.0**-10 * torch.randint(2, logits.shape)
        logits = moved.scatter(1, target[:, None], logits.gather(1, target[:, None]))
        assert_promised(logits, target, backend)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("diversity", [None, "logit_variance"])
def test_confident_rows_over_a_wide_complement(backend, classes, diversity):
    """The gradient's factor of an exponential underflows about a low logit, its product with the exponential does not."""
    spread = torch.linspace(-30, 0, classes, dtype=torch.float64)
    logits = torch.stack([spread + top for top in (60.0, 75.0, 80.0)])
    target = torch.full((3,), classes - 1)
    logits[:, -1] = logits[:, :-1].logsumexp(1) + torch.tensor([60.0, 75.0, 80.0])
    assert_promised(logits.float(), target, backend, diversity=diversity)


def test_a_gap_of_25(backend):
    logits = torch.zeros(1, 10)
    logits[0, 4] = 25.0
    target = torch.tensor([4])
    z = logits.clone().requires_grad_()
    theirs = F.cross_entropy(z, target)
    assert theirs.item() == 0
    assert torch.autograd.grad(theirs, z)[0].count_nonzero() < 10  # theirs rounds p_y - 1 away
    ours = compute(backend, logits, target)
    expected = math.log1p(9 * math.exp(-25))  # 1.25e-10
    assert abs(ours.loss.item() - expected) <= RTOL * expected
    assert abs(ours.gradient[0, 4].item() + 9 * math.exp(-25)) <= RTOL * expected


@pytest.mark.parametrize("far", [-1e4, -1e9])
def test_a_label_with_all_others_far_below(backend, far):
    """As a mask leaves it: the z-loss is of the label's own logit, which the margin has rounded away."""
    for classes in (2, 10, 300):
        logits, target = torch.full((2, classes), far), torch.tensor([1, 0])
        logits[[0, 1], target] = torch.tensor([-2.28, 3.5])
        options = dict(reduction="none", diversity=None, z_loss=0.01)
        assert_true(compute(backend, logits, target, **options), logits, target, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("diversity", [None, "logit_variance"])
def test_16_bit_logits_cost_the_output_rounding_alone(backend, classes, dtype, diversity):
    """The true gradient rounded once is within half a unit in the last place of 16 bits; nothing but float32's own error adds."""
    for offset in (0.0, -37.5, 1e4):
        for spread in (1.0, 10.0):
            logits, target = rows_at(MARGINS[:: 4 if classes < 1000 else 16], classes, offset, spread, dtype)
            assert_promised(logits, target, backend, diversity=diversity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diversity", [None, "logit_variance"])
def test_a_million_classes(backend, dtype, diversity):
    for offset, spread in ((0.0, 3.0), (1e4, 1.0)):
        logits, target = rows_at(np.array([-80.0, -3.0, 40.0]), 1_000_000, offset, spread, dtype)
        assert_promised(logits, target, backend, diversity=diversity)
