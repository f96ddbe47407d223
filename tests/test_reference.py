"""Promise: the reference is the definition.

It is PyTorch's cross-entropy where there is no penalty, it agrees with DESIGN §2 written a second time (formula.py), its
gradients with the table's closed forms and with finite differences, to the second order.
"""

from __future__ import annotations

import itertools

import formula
import pytest
import torch
import torch.nn.functional as F
from conftest import DIVERSITIES, RELATIVE, assert_near
from torch import Tensor

from fastsoftloss import reference

SHAPES = [
    (7,),  # one sample, no batch
    (5, 7),
    (5, 1),  # one class: the loss is 0
    (5, 2),  # one class in the complement: no diversity
    (3, 4, 2),
    (2, 3, 4, 5),  # segmentation
    (2, 3, 1, 2, 2),
]


def sample(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = scale * torch.randn(shape, dtype=torch.float64)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return logits, torch.randint(shape[min(1, len(shape) - 1)], rows)


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z, torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64).reshape(loss.shape))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore", [-100, 0, None], ids=["default", "a class", "-1"])
def test_without_penalty_it_is_torch(shape, reduction, smoothing, weighted, ignore):
    logits, target = sample(shape)
    weight = torch.rand(shape[min(1, len(shape) - 1)], dtype=torch.float64) + 0.1 if weighted else None
    if ignore is None:
        ignore = -1
        target = torch.where(torch.rand(target.shape) < 0.3, -1, target)
    options = dict(weight=weight, ignore_index=ignore, reduction=reduction, label_smoothing=smoothing)
    z, same = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, cross_entropy, diversity = reference.cross_entropy(z, target, diversity=None, **options)
    expected = F.cross_entropy(same, target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(cross_entropy, expected.detach(), rtol=1e-13, atol=1e-14, equal_nan=True)
    assert diversity.nan_to_num().count_nonzero() == 0
    dz, dsame = gradient(loss, z), gradient(expected, same)
    # PyTorch's own gradient is NaN where every row is ignored and the mean is asked for: ours is zero, as for its batch in CI
    torch.testing.assert_close(dz, dsame, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.parametrize("masked", [0.0, 0.3], ids=["all classes", "masked"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_it_is_the_table(kind, classes, masked, smoothing, weighted, reduction):
    logits, target = sample((12, classes), 6.0)
    target[3] = -100
    hidden = torch.rand(logits.shape) < masked
    hidden.scatter_(1, target.clamp(min=0)[:, None], False)
    logits[hidden] = -torch.inf
    z = logits.requires_grad_()
    options = dict(reduction=reduction, label_smoothing=smoothing, diversity=kind, diversity_weight=0.7, z_loss=0.01)
    if weighted:
        options.update(weight=torch.rand(classes, dtype=torch.float64), sample_weight=torch.rand(12, dtype=torch.float64))
    loss, *parts = reference.cross_entropy(z, target, **options)
    table = formula.cross_entropy(z, target, **options)
    bound = RELATIVE[torch.float64]
    assert_near(loss, torch.tensor(table.loss), bound * table.loss_terms, "loss")
    assert_near(parts[0], torch.tensor(table.cross_entropy), bound * table.cross_entropy_terms, "cross-entropy")
    assert_near(parts[1], torch.tensor(table.diversity), bound * table.diversity_terms, "diversity")
    (dz,) = torch.autograd.grad(loss.sum(), z)
    assert_near(dz, torch.tensor(table.gradient), bound * table.gradient_terms, "gradient")


@pytest.mark.parametrize("margin", [-300.0, -80.0, -25.0, 0.0, 80.0])
def test_confident_rows_keep_their_digits(margin):
    """softplus(delta) and sigmoid(delta), where log_softmax would subtract."""
    z = torch.tensor([[0.0, -margin]], dtype=torch.float64, requires_grad=True)
    loss, *_ = reference.cross_entropy(z, torch.tensor([1]), diversity=None)
    (dz,) = torch.autograd.grad(loss, z)
    d = torch.tensor(margin, dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), d.exp().log1p() if margin < 0 else d + (-d).exp().log1p(), rtol=1e-15, atol=0)
    torch.testing.assert_close(dz[0], torch.stack([d.sigmoid(), -d.sigmoid()]), rtol=1e-15, atol=0)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.1},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.1},
    {"sample_weight": True},
    {"weight": True, "sample_weight": True, "label_smoothing": 0.2, "z_loss": 0.1},
]


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_finite_differences(kind, options):
    """First and second order, in logits and in both weights."""
    logits, target = sample((4, 5), 1.0)
    target[1] = -100
    logits[2, (target[2] + 1) % 5] = -torch.inf if not options.get("label_smoothing") else 0.3
    options = dict(options)
    extra = {
        name: (torch.rand(n, dtype=torch.float64) + 0.5).requires_grad_()
        for name, n in (("weight", 5), ("sample_weight", 4))
        if options.pop(name, 0)
    }

    # a finite difference of -inf is NaN: the masked class is not an input
    finite = torch.isfinite(logits)

    def f(free, *weights):
        z = torch.full_like(logits, -torch.inf).masked_scatter(finite, free)
        return reference.cross_entropy(z, target, diversity=kind, **dict(zip(extra, weights, strict=True)), **options)[0]

    inputs = (logits[finite].clone().requires_grad_(), *extra.values())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_one_and_two_classes_are_finite_to_the_second_order(kind):
    for classes, reduction in itertools.product([1, 2], ["none", "mean"]):
        logits, target = sample((3, classes))
        z = logits.requires_grad_()
        loss = reference.cross_entropy(z, target, diversity=kind, reduction=reduction, z_loss=0.1)[0]
        (dz,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        (ddz,) = torch.autograd.grad(dz.square().sum(), z)
        assert loss.isfinite().all() and dz.isfinite().all() and ddz.isfinite().all()
