"""Promise: a soft target is the expectation over its labels.

Class probabilities give sum_k t_k loss(k), penalty included, and PyTorch's cross-entropy where there is none; a mixture of
two labels gives mix * loss(y_a) + (1 - mix) * loss(y_b); a hard label in soft clothes gives the hard result, at every margin.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DIVERSITIES, named, rounding
from torch import Tensor

from fastsoftloss import backends, functional, reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
# relative to the row's largest element; what the arithmetic gives for index targets, and as much again for the sums over labels
BOUND = {F32: 2e-5, F64: 1e-11}


def by_hard_labels(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    """The definition, row by row: every class in turn as the hard label, in float64. (N, K) only; rows of t add up to 1."""
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    rows, classes = t.shape
    every = torch.arange(classes).repeat(rows)
    each = functional.cross_entropy(z.repeat_interleave(classes, 0), every, reduction="none", backend="reference", **options)
    each = each.view(rows, classes)
    return torch.where(t == 0, 0.0, t * torch.where(t == 0, 0.0, each)).sum(1)  # 0 times infinity is 0


def by_parts(z: Tensor, target: tuple[Tensor, Tensor, Any], **options: Any) -> Tensor:
    first, second, mix = target
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    a, b = (functional.cross_entropy(z, y, reduction="none", backend="reference", **options) for y in (first, second))
    mix = mix.double() if isinstance(mix, Tensor) else mix
    return mix * a + (1 - mix) * b


def near(got: Tensor, true: Tensor, bound: float, dtype: torch.dtype = F64, dim: int | None = None) -> None:
    """|got - true| within ``bound`` of |true|, or of the largest along ``dim``, and half a unit in the last place of ``dtype``."""
    size = true.abs() if dim is None else true.abs().amax(dim, keepdim=True)
    ulp = torch.as_tensor(rounding(true, dtype)) if dtype in (BF16, F16) else 1e-35
    wrong = ~((got.double() - true).abs() <= bound * size + ulp)
    assert not wrong.any(), f"{got[wrong][:4].tolist()} for {true[wrong][:4].tolist()} at {wrong.nonzero()[:4].tolist()}"


def check(backend: str, logits: Tensor, target: Any, **options: Any) -> None:
    """Losses and gradients of each row against the definition in float64 on the same logits."""
    z = logits.clone().requires_grad_()
    got = functional.cross_entropy(z, target, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    exact = logits.double().requires_grad_()
    true = by_parts(exact, target, **options) if isinstance(target, tuple) else by_hard_labels(exact, target.double(), **options)
    (true_gradient,) = torch.autograd.grad(true.sum(), exact)
    assert got.dtype is (F64 if logits.dtype is F64 else F32) and gradient.dtype is logits.dtype
    bound = BOUND[got.dtype]
    near(got.detach(), true.detach(), bound)
    near(gradient, true_gradient, bound, logits.dtype, 1)


def probabilities(rows: int, classes: int, dtype: torch.dtype = F64, sparse: bool = False) -> Tensor:
    t = torch.randn(rows, classes, dtype=F64).mul(2).softmax(1)
    if sparse:
        t = torch.where(torch.rand(rows, classes) < 0.7, 0.0, t) + F.one_hot(torch.randint(classes, (rows,)), classes)
    return (t / t.sum(1, keepdim=True)).to(dtype)


def mixture(rows: int, classes: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    first, second = torch.randint(classes, (2, rows)).unbind()
    second[::3] = first[::3]  # the same label twice
    return first, second, torch.rand(rows, dtype=dtype)


@pytest.mark.parametrize("far", [-1e4, -1e9])
def test_the_z_loss_of_labels_with_all_others_far_below(backend, far):
    logits = torch.full((2, 10), far)
    logits[:, 4] = torch.tensor([-2.28, 3.5])
    label, other = torch.tensor([4, 4]), torch.tensor([4, 7])
    for target in ((label, other, 0.3), 0.3 * F.one_hot(label, 10) + 0.7 * F.one_hot(other, 10)):
        check(backend, logits, target, diversity=None, z_loss=1e-2)


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_a_penalty_that_is_only_looked_at(backend, kind):
    logits, target = 3 * torch.randn(4, 6), probabilities(4, 6).float()
    outcomes = []
    for options in ({"diversity": kind, "diversity_weight": 0.0}, {"diversity": kind}, {"diversity": None}):
        z = logits.clone().requires_grad_()
        parts = functional.cross_entropy(z, target, reduction="none", return_components=True, backend=backend, **options)
        outcomes.append((parts, torch.autograd.grad(parts.loss.sum(), z)[0]))
    (looked, slope), (counted, _), (without, true_slope) = outcomes
    near(looked.diversity, counted.diversity.double(), BOUND[F32])
    near(looked.loss, without.loss.detach().double(), BOUND[F32])
    near(slope, true_slope.double(), BOUND[F32], dim=1)


SHAPES = [(7,), (5, 7), (5, 1), (5, 2), (3, 4, 2), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_penalty_it_is_torch(backend, shape, reduction, smoothing, weighted):
    classes = shape[min(1, len(shape) - 1)]
    logits, target = 3 * torch.randn(shape, dtype=F64), torch.rand(shape, dtype=F64)  # nothing says that they add up to 1
    weight = torch.rand(classes, dtype=F64) + 0.1 if weighted else None
    results = []
    for loss, extra in ((functional.cross_entropy, {"diversity": None, "backend": backend}), (F.cross_entropy, {})):
        z = logits.clone().requires_grad_()
        value = loss(z, target, weight, reduction=reduction, label_smoothing=smoothing, **extra)
        results.append((value.detach(), torch.autograd.grad(value.sum(), z)[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 17, 130])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_probabilities_are_the_expectation_over_the_label(backend, kind, classes, dtype):
    for sparse, options in ((False, {}), (True, dict(label_smoothing=0.1, z_loss=0.01, weight=torch.rand(classes, dtype=dtype) + 0.1))):
        logits = (4 * torch.randn(9, classes, dtype=F64)).to(dtype)
        check(backend, logits, probabilities(9, classes, dtype, sparse), diversity=kind, diversity_weight=0.7, **options)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 130, 5000])  # 5000: two parts of a row
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_mixture_is_the_two_losses(backend, kind, classes, dtype):
    options = dict(label_smoothing=0.1, z_loss=0.01, weight=torch.rand(classes, dtype=dtype) + 0.1)
    for extra in ({}, options):
        logits = (4 * torch.randn(9, classes, dtype=F64)).to(dtype)
        target = mixture(9, classes, dtype)
        check(backend, logits, target, diversity=kind, diversity_weight=0.7, **extra)
        check(backend, logits, (*target[:2], 0.3), diversity=kind, diversity_weight=0.7, **extra)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("classes", [2, 5, 300])  # a tile, one with masked classes, a row
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_nan_is_no_extreme_of_its_row(backend, kind, classes, dtype):
    """Wherever it stands among masked classes, all of the row is NaN, as in PyTorch, and only of that."""
    for place in {classes - 1, classes - 8, 1} & set(range(classes)):
        logits = torch.randn(2, classes, dtype=dtype)
        logits[0, 1:] = -INF
        logits[0, place] = NAN
        z = logits.requires_grad_()
        target = torch.full((2, classes), 1 / classes, dtype=dtype)
        options = dict(reduction="none", diversity=kind, return_components=True, backend=backend)
        loss, cross_entropy, _ = functional.cross_entropy(z, target, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        for of in (loss, cross_entropy, gradient):
            assert of[0].isnan().all() and not of[1].isnan().any()


@pytest.mark.parametrize("kind", ["logit_variance", "kl"])
def test_the_largest_logits_far_from_the_rest_of_a_long_row(backend, kind):
    """Each in another part of it."""
    logits = torch.randn(2, 4500)
    logits[:, 7], logits[:, 4400] = 150.0, 140.0
    check(backend, logits, (torch.tensor([7, 11]), torch.tensor([4400, 7]), 0.3), diversity=kind)


@pytest.mark.parametrize("kind", [None, "logit_variance"])
def test_flat_rows_of_many_classes(backend, kind):
    """The largest class gets p - t, not 1 - t less 1 - p."""
    logits, target = torch.randn(2, 2000) * 0.3, (torch.randn(2, 2000) * 0.3).softmax(1)
    gradients = []
    for z, t, name in ((logits, target, backend), (logits.double(), target.double(), "reference")):
        z = z.detach().requires_grad_()
        gradients.append(torch.autograd.grad(functional.cross_entropy(z, t, diversity=kind, backend=name), z)[0])
    # the plain formula, which autograd differentiates, has terms near 1
    near(gradients[0], gradients[1], 1e-3 if backend == "reference" else BOUND[F32], dim=1)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("margin", [80.0, 95.0, 110.0])
def test_two_classes_far_apart(backend, kind, margin):
    for row in ([0.0, -margin], [0.0, -INF, -margin, -INF]):
        logits, target = torch.tensor([row]), torch.where(torch.tensor([row]) > -INF, 0.5, 0.0)
        check(backend, logits, target, diversity=kind)


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("classes", [5, 150])
@pytest.mark.parametrize(("margin", "offset"), [(-80.0, 0), (-25.0, 0), (0.0, 0), (3.0, 0), (80.0, 0), (-5.0, 1e4), (25.0, 1e4)])
def test_hard_labels_in_soft_clothes_at_every_margin(backend, kind, classes, margin, offset):
    """The one class that is all of a sum is left out of it here, at the top and at the bottom."""
    logits = torch.randn(6, classes)
    y = torch.randint(classes, (6,))
    logits[torch.arange(6), y] += margin
    logits = logits + offset
    hard = [r.detach() for r in loss_and_gradient(logits, y, kind, backend)]
    other = (y + 1) % classes
    one_hot = F.one_hot(y, classes).float()
    for soft in (one_hot, (y, other, 1.0), (other, y, 0.0), (y, y, 0.4)):
        loss, gradient = loss_and_gradient(logits, soft, kind, backend)
        near(loss, hard[0].double(), 2e-5)
        near(gradient, hard[1].double(), 2e-5, dim=1)


def loss_and_gradient(logits: Tensor, target: Any, kind: str | None, backend: str) -> tuple[Tensor, Tensor]:
    z = logits.clone().requires_grad_()
    loss = functional.cross_entropy(z, target, reduction="none", diversity=kind, backend=backend)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def test_a_confident_hard_label_keeps_its_loss_and_gradient(backend):
    """cross_entropy gives 0 and 0 there."""
    logits = torch.tensor([[25.0, 0.0, 0.0]])
    loss, gradient = loss_and_gradient(logits, torch.tensor([[1.0, 0.0, 0.0]]), None, backend)
    true = 2 * torch.tensor(-25.0, dtype=F64).exp()
    torch.testing.assert_close(loss.double(), true.log1p()[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double()[0, 0], -true / (1 + true), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["mixture", "probabilities"])
@pytest.mark.parametrize("kind", [None, "logit_variance", "kl"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("classes", [10, 300])
def test_16_bits(backend, form, kind, dtype, classes):
    logits = (3 * torch.randn(9, classes)).to(dtype)
    target = mixture(9, classes, F32) if form == "mixture" else probabilities(9, classes, F32)
    check(backend, logits, target, diversity=kind)
    if form == "probabilities":  # in 16 bits too, which no longer add up to 1: as given
        z, t = logits.clone(), target.to(dtype)
        got = functional.cross_entropy(z, t, reduction="none", diversity=kind, backend=backend)
        near(got, functional.cross_entropy(z.double(), t.double(), reduction="none", diversity=kind, backend="reference"), 2e-5)


LAYOUTS = {
    "images": lambda k: torch.randn(2, k, 3, 5),
    "channels last": lambda k: torch.randn(2, k, 3, 5).to(memory_format=torch.channels_last),
    "cropped": lambda k: torch.randn(2, k, 5, 8)[..., 1:-1, 2:7],
    "transposed": lambda k: torch.randn(k, 6).t(),
    "every other class": lambda k: torch.randn(6, 2 * k)[:, ::2],
    "classes cut out": lambda k: torch.randn(6, k + 3)[:, 2:-1],
    "one row for all": lambda k: torch.randn(1, k).expand(6, k),
    "a vector": lambda k: torch.randn(k),
}


@pytest.mark.parametrize("form", ["mixture", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [5, 300])
def test_any_strides_of_logits_target_and_upstream(backend, form, layout, classes):
    logits = LAYOUTS[layout](classes)
    rows = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    if form == "mixture":
        target: Any = (*torch.randint(classes, (2, *rows)).unbind(), torch.rand(*rows, 2)[..., 0])
        target[0].view(-1)[:1] = -100
        plain = tuple(t.contiguous() for t in target)
    else:
        target = LAYOUTS[layout](classes).softmax(min(1, logits.dim() - 1))
        target = target.transpose(0, -1).contiguous().transpose(0, -1)
        plain = target.contiguous()
    sample_weight, upstream = torch.rand(*rows, 2)[..., 1], torch.rand(*rows, 2)[..., 0]
    results = []
    for z, t, dtype in ((logits, target, F32), (logits.contiguous(), plain, F64)):
        z = z.to(dtype).detach().requires_grad_() if dtype is F64 else z.detach().requires_grad_()
        options = dict(sample_weight=sample_weight.to(dtype), reduction="none", backend=backend if dtype is F32 else "reference")
        loss = functional.cross_entropy(z, t if dtype is F32 or form == "mixture" else t.double(), **options)
        results.append((loss.detach(), torch.autograd.grad(loss, z, upstream.to(dtype))[0]))
    (loss, gradient), (true, true_gradient) = results
    near(loss, true, 2e-5)
    near(gradient, true_gradient, 2e-5, dim=min(1, logits.dim() - 1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_of_a_mixture_divides_by_what_counts(backend, reduction):
    """As if every row were there twice: class weights, sample weights and ignored labels come in by their share."""
    logits, weight = torch.randn(8, 6), torch.rand(6) + 0.1
    first, second, mix = torch.randint(6, (8,)), torch.randint(6, (8,)), torch.rand(8)
    first[2] = second[3] = first[4] = second[4] = -100
    sample_weight = torch.rand(8)
    options = dict(weight=weight, reduction=reduction, label_smoothing=0.1, backend=backend)
    got = functional.cross_entropy(logits, (first, second, mix), sample_weight=sample_weight, **options)
    twice = torch.cat((sample_weight * mix, sample_weight * (1 - mix)))
    expected = functional.cross_entropy(logits.repeat(2, 1), torch.cat((first, second)), sample_weight=twice, **options)
    torch.testing.assert_close(got, expected)
    plain = functional.cross_entropy(logits, (first.clamp(0), second.clamp(0), 0.3), diversity=None, backend=backend)
    expected = 0.3 * F.cross_entropy(logits, first.clamp(0)) + 0.7 * F.cross_entropy(logits, second.clamp(0))
    torch.testing.assert_close(plain, expected)


def test_all_of_a_mixture_ignored(backend):
    z = torch.randn(3, 4, requires_grad=True)
    nothing = torch.full((3,), -100)
    loss = functional.cross_entropy(z, (nothing, nothing, 0.5), backend=backend)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isnan() and not gradient.any()
    assert functional.cross_entropy(z, (nothing, nothing, 0.5), reduction="sum", backend=backend) == 0


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_masked_classes_and_bad_rows(backend, kind):
    """Where PyTorch has NaN for 0 log 0, a masked class that is not asked for costs nothing; asked for, it costs infinity."""
    logits, target = torch.randn(8, 6), probabilities(8, 6, F32)
    logits[:3, 2] = -INF
    logits[1, 3:] = -INF
    target[:3, 2:] = 0
    target[:3] /= target[:3].sum(1, keepdim=True)
    logits[3, 1], logits[4, 1], logits[5] = NAN, INF, -INF
    logits[6, 0] = -INF
    z = logits.clone().requires_grad_()
    loss = functional.cross_entropy(z, target, reduction="none", diversity=kind, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    true = by_hard_labels(logits[:3].double(), target[:3].double(), diversity=kind)
    near(loss[:3].detach(), true, 2e-5)
    assert gradient[:3].isfinite().all() and (gradient[:3][logits[:3] == -INF] == 0).all()
    assert loss[3:6].isnan().all() and gradient[3:6].isnan().all()
    assert loss[6].isposinf() and loss[7].isfinite() and gradient[7].isfinite().all()
    pair = (torch.tensor([0] * 8), torch.tensor([1] * 8), torch.full((8,), 0.25))
    got = functional.cross_entropy(logits, pair, reduction="none", diversity=kind, backend=backend)
    true = by_parts(logits.double(), pair, diversity=kind)
    assert torch.equal(got.isnan(), true.isnan()) and torch.equal(got.isinf(), true.isinf())
    near(got[true.isfinite()], true[true.isfinite()], 2e-5)


# the other penalties' sums of logits are no number in float32; a tile, a row, and one in parts, of which chi2 leaves a difference
@pytest.mark.parametrize(
    ("kind", "classes"), [(kind, k) for kind in (None, "kl", "chi2", "variance") for k in (6, 200, 4200) if kind != "chi2" or k == 6]
)
def test_a_mixture_whose_other_classes_are_masked_by_the_lowest_number(backend, kind, classes):
    logits = torch.tensor([[1.0, 0.5, *[torch.finfo(F32).min] * (classes - 2)]])
    check(backend, logits, (torch.tensor([0]), torch.tensor([1]), 0.25), diversity=kind)


def test_an_ignored_label_of_a_row_that_costs_infinity(backend):
    """Label smoothing asks for the masked class: an infinite loss, of the label that counts."""
    logits = torch.tensor([[1.0, 0.5, -INF, 0.2]])
    for pair in ((0, -100), (-100, 0)):
        z = logits.clone().requires_grad_()
        target = (torch.tensor(pair[:1]), torch.tensor(pair[1:]), 0.5)
        loss = functional.cross_entropy(z, target, label_smoothing=0.1, reduction="none", diversity=None, backend=backend)
        assert loss.isposinf() and torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("kind", DIVERSITIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_class_costs_its_probability_times_infinity(backend, kind, smoothing):
    """As PyTorch has it, whatever the sign: a sum of probabilities that cancel is no 0 log 0."""
    logits, target = torch.randn(5, 6), torch.rand(5, 6)
    logits[:, 1:3] = -INF
    target[:, 1:3] = torch.tensor([[0.25, 0.5], [-0.25, -0.5], [NAN, 0.25], [0.25, -0.25], [-0.5, 0.25]])
    loss = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing, diversity=kind, backend=backend)
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert loss.tolist()[:2] == [INF, -INF] and loss[2:].isnan().all()


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_targets_that_are_learned_get_their_gradient(backend, kind):
    logits, t = torch.randn(4, 5, dtype=F64, requires_grad=True), probabilities(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, t: functional.cross_entropy(z, t, diversity=kind, backend=backend), (logits, t))
    y, mix = torch.randint(5, (2, 4)), torch.rand(4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, m: functional.cross_entropy(z, (*y, m), diversity=kind, backend=backend), (logits, mix))
    if kind is None:
        results = []
        for loss, extra in ((functional.cross_entropy, {"diversity": None}), (F.cross_entropy, {})):
            results.append(torch.autograd.grad(loss(logits, t, label_smoothing=0.1, **extra), (logits, t)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["mixture", "probabilities"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (0, 200)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(backend, form, shape, reduction):
    z = torch.zeros(shape, requires_grad=True)
    rows = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    target = (rows, rows, 0.5) if form == "mixture" else torch.zeros(shape)
    got = functional.cross_entropy(z, target, reduction=reduction, backend=backend)
    torch.testing.assert_close(got, F.cross_entropy(z, torch.zeros(shape), reduction=reduction), equal_nan=True)
    assert torch.autograd.grad(got.sum(), z)[0].shape == shape


@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_classes(backend, shape, reduction):
    """A sum of nothing: 0, and a mean of no row that counts."""
    z = torch.zeros(shape, requires_grad=True)
    parts = functional.cross_entropy(z, torch.zeros(shape), reduction=reduction, return_components=True, backend=backend)
    for part in parts:
        torch.testing.assert_close(part.detach(), F.cross_entropy(z.detach(), torch.zeros(shape), reduction=reduction), equal_nan=True)
    assert torch.autograd.grad(parts.loss.sum(), z)[0].shape == shape


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("form", ["mixture", "probabilities"])
def test_reductions_and_parts(backend, form, reduction):
    logits = torch.randn(9, 7)
    target = mixture(9, 7, F32) if form == "mixture" else probabilities(9, 7, F32)
    sample_weight = torch.rand(9)
    options = dict(sample_weight=sample_weight, diversity="kl", diversity_weight=0.3, backend=backend, return_components=True)
    rows = functional.cross_entropy(logits, target, reduction="none", **options)
    got = functional.cross_entropy(logits, target, reduction=reduction, **options)
    for part, values in zip(got, rows, strict=True):
        expected = {"none": values, "sum": values.sum(), "mean": values.sum() / sample_weight.sum()}[reduction]
        torch.testing.assert_close(part, expected)
    torch.testing.assert_close(got.loss, got.cross_entropy + 0.3 * got.diversity)


@pytest.mark.parametrize("form", ["mixture", "probabilities"])
@pytest.mark.parametrize(("dtype", "strided", "reduction"), [(F32, True, 0), (F64, False, 1), (BF16, False, 2)])
def test_the_operators_pass_opcheck(form, dtype, strided, reduction):
    operators = backends.choose("cpu", torch.device("cpu"))
    accumulated = reference.accumulation_dtype(dtype)
    logits, sample_weight = torch.randn(5, 6).to(dtype), torch.rand(5, dtype=accumulated)
    target: Any = probabilities(5, 6, accumulated)
    if form == "mixture":
        target, sample_weight = reference.pack_mixture(mixture(5, 6, accumulated), sample_weight, accumulated)
    if strided:
        logits, target = logits.t().contiguous().t(), target.t().contiguous().t()
    inputs = (logits.requires_grad_(), target, torch.rand(6, dtype=accumulated), sample_weight, -100, reduction, 0.1, 2, 1.0, 0.01)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", *["test_aot_dispatch_dynamic"] * (dtype is F64)]
    torch.library.opcheck(operators.forward, (*inputs, True, True), test_utils=checks)
    upstream = torch.rand(5 if reduction == 0 else (), dtype=accumulated).requires_grad_()
    torch.library.opcheck(operators.backward, (upstream, torch.empty(0, dtype=accumulated), *inputs), test_utils=checks)


@pytest.mark.parametrize("form", ["mixture", "probabilities"])
@pytest.mark.parametrize(("rows", "classes"), [(4000, 10), (200, 1000), (2, 40000)])
def test_the_bits_are_the_same_for_every_number_of_threads(form, rows, classes):
    logits = torch.randn(rows, classes)
    target = mixture(rows, classes, F32) if form == "mixture" else torch.randn(rows, classes).softmax(1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        z = logits.clone().requires_grad_()
        loss = functional.cross_entropy(z, target, diversity="kl", backend="cpu")
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        dict(target=torch.rand(3, 4)),
        dict(target=torch.rand(5, 3)),
        dict(target=torch.rand(3)),
        dict(target=torch.rand(3, 5).double()),
        dict(target=torch.rand(3, 5) > 0.5),
        dict(target=torch.zeros(3, 3).long(), sample_weight=torch.ones(3, 3)),
        dict(target=torch.zeros(2, 4).long(), sample_weight=torch.ones(2, 4)),
        dict(target=torch.zeros(2, 3).long(), sample_weight=torch.ones(3)),
        dict(target=torch.full((2, 3), 5), sample_weight=torch.ones(2, 3)),
        dict(target=torch.tensor([[0, 1, 2], [0, -1, 2]]), sample_weight=torch.ones(2, 3)),
        dict(target=torch.rand(3, 5), sample_weight=torch.ones(2, 3)),
    ],
    ids=named,
)  # fmt: skip
def test_the_operators_raise_and_never_crash(changes):
    operators = backends.choose("cpu", torch.device("cpu"))
    arguments = dict(
        logits=LOGITS, target=Y, weight=None, sample_weight=None, ignore_index=-100, reduction=0,
        label_smoothing=0.0, diversity=1, diversity_weight=1.0, z_loss=0.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError):
        operators.forward(**arguments | changes, parts=True, gradient=True)
    with pytest.raises(RuntimeError):
        operators.backward(upstream=torch.ones(3), moments=torch.empty(0), **arguments | changes)


Y = torch.tensor([0, 1, 2])
LOGITS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"target as class probabilities must have the shape of logits, \(3, 5\), got \(3, 4\)"),
        (torch.zeros(3), ValueError, r"must have the shape of logits, \(3, 5\), got \(3,\); class indices must be int64 or int32"),
        (torch.zeros(3, 5, device="meta"), ValueError, "target must be on the device of logits"),
        (torch.zeros(3, 5).cfloat(), TypeError, "target must be class indices of int64 or int32, got torch.complex64"),
        ([Y, Y, 0.5], TypeError, "target must be a tensor, or a tuple of two tensors .* got list of 3"),
        ((Y, Y), TypeError, "target must be a tensor, or a tuple of two .* got tuple of 2"),
        ((Y, 0.5, Y), TypeError, "target must be a tensor, or a tuple of two tensors"),
        (None, TypeError, "target must be a tensor, or a tuple of two tensors .* got NoneType"),
        ((Y.float(), Y, 0.5), TypeError, r"target\[0\] must be class indices of int64 or int32, got torch.float32"),
        ((Y, Y[:2], 0.5), ValueError, r"target\[1\] must have shape \(3,\) for logits of shape \(3, 5\), got \(2,\)"),
        ((Y, Y.to("meta"), 0.5), ValueError, r"target\[1\] must be on the device of logits"),
        ((Y, Y, 1.5), ValueError, r"target\[2\], the weight of target\[0\], must be between 0 and 1, got 1.5"),
        ((Y, Y, NAN), ValueError, r"must be between 0 and 1, got nan"),
        ((Y, Y, "half"), TypeError, r"target\[2\], .* must be a number or a floating-point tensor, got 'half'"),
        ((Y, Y, Y), TypeError, r"target\[2\], .* must be a number or a floating-point tensor, got torch.int64"),
        ((Y, Y, torch.rand(2)), ValueError, r"target\[2\] must be a number or have the shape of target\[0\], \(3,\), got \(2,\)"),
        ((Y, torch.tensor([0, 7, 1]), 0.5), IndexError, r"target\[1\]\[1\] is 7, which is outside \[0, 5\)"),
        ((torch.tensor([0, -1, 1]), Y, 0.5), IndexError, r"target\[0\]\[1\] is -1, which is outside \[0, 5\)"),
    ],
)  # fmt: skip
def test_a_clear_error(backend, target, error, message):
    with pytest.raises(error, match=message):
        functional.cross_entropy(LOGITS, target, backend=backend)
