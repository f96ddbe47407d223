"""Promise: the second derivative of labels and mixtures is a kernel's, and as exact as the gradient.

H v and <dL/dz, v> against float64 on the same logits, for every option, margin, dtype and layout; what a derivative must not
look at; the bits for every thread count; the order after it. Finite differences are in test_derivatives.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import formula
import numpy as np
import pytest
import torch
from conftest import BACKENDS, DIVERSITIES, SMALLEST, assert_near, rounding
from test_exactness import rows_at
from torch import Tensor

from fastsoftloss import backends, functional, reference

KERNELS = [name for name in ("cpu", "triton") if name in BACKENDS]  # cuda takes Triton's
if not KERNELS:
    pytest.skip("neither backend that has a kernel for it is here", allow_module_level=True)

CLASSES = [
    1,  # no complement
    2,  # no diversity
    3,
    10,  # tile kernel
    256,  # the last of the tile kernel, where its classes fit one buffer
    257,  # the first of the row kernel, with a tail of one class; with a class stride, the tile kernel in two looks
    320,  # whole blocks of 64
    4096,  # one part, whose exps are kept
    4097,  # a second part of one class
]
# How many exponentials, each up to 88 u (708 u) off as `RELATIVE` has it, a term of H v is a product of: s p q v of the
# cross-entropy, with a mean over the complement; chi2's q_j Q2 v; variance's s^2 p Q2 q_j v.
EXPONENTIALS = {"chi2": 5, "variance": 8}


def relative(dtype: torch.dtype, diversity: str | None) -> float:
    one, unit = (708, 2.0**-53) if dtype is torch.float64 else (88, 2.0**-24)
    return (EXPONENTIALS.get(diversity or "", 4) * one + 80) * unit


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Second(NamedTuple):
    curvature: Tensor  # of the logits: H v, times the upstream gradient
    slope: Tensor  # of the upstream gradient: <dL/dz, v>


def second(backend: str, logits: Tensor, target: Any, v: Tensor, upstream: Tensor | None = None, **options: Any) -> Second:
    z = logits.detach().requires_grad_()
    loss = functional.cross_entropy(z, target, backend=backend, **options)
    up = (torch.ones_like(loss) if upstream is None else upstream.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss, z, up, create_graph=True)
    return Second(*torch.autograd.grad(gradient, (z, up), v))


def softplus(x: Tensor, threshold: float = 0.0) -> Tensor:
    return torch.where(x > 0, x + (-x.clamp(min=0)).exp().log1p(), x.clamp(max=0).exp().log1p())


def sigmoid(x: Tensor) -> Tensor:
    e = x.clamp(max=0).exp()
    return torch.where(x > 0, 1 / (1 + (-x.clamp(min=0)).exp()), e / (1 + e))


@pytest.fixture(autouse=True)
def exact_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch differentiates its own two twice by s (1 - s), a difference: at a margin of 25 even in float64 no truth."""
    monkeypatch.setattr(torch.nn.functional, "softplus", softplus)
    monkeypatch.setattr(torch, "sigmoid", sigmoid)


def true_second(logits: Tensor, target: Any, v: Tensor, upstream: Tensor | None = None, **options: Any) -> Second:
    for name in ("weight", "sample_weight"):
        if options.get(name) is not None:
            options[name] = options[name].double()
    return second("reference", logits.double(), target, v.double(), None if upstream is None else upstream.double(), **options)


def terms_of(logits: Tensor, target: Any, v: Tensor, upstream: Tensor | None, **options: Any) -> tuple[Any, Any]:
    """Of H v and of <dL/dz, v>, the sums of the terms' absolute values. A mixture is a row twice."""
    if isinstance(target, tuple):
        labels, weights = reference.pack_mixture(target, options.pop("sample_weight", None), torch.float64)
        both, twice = torch.cat([logits, logits]), torch.cat([v, v])
        up = torch.cat([upstream, upstream]) if upstream is not None and upstream.dim() else upstream
        curvature, slope = terms_of(both, labels.flatten(0, 1), twice, up, sample_weight=weights.flatten(0, 1), **options)
        return sum(np.split(curvature, 2)), sum(np.split(slope, 2)) if slope.ndim else slope
    curvature = formula.cross_entropy(logits, target, upstream=upstream, direction=v, **options).curvature_terms
    size = formula.cross_entropy(logits, target, **options).gradient_terms * abs(np.nan_to_num(v.double().numpy()))
    return curvature, size.sum(min(1, logits.dim() - 1)) if options["reduction"] == "none" else size.sum()


def assert_second(backend: str, logits: Tensor, target: Any, v: Tensor, upstream: Tensor | None = None, **options: Any) -> None:
    before, direction = logits.clone(), v.clone()
    options.setdefault("reduction", "mean")
    got = second(backend, logits, target, v, upstream, **options)
    assert torch.equal(logits.nan_to_num(nan=0.5), before.nan_to_num(nan=0.5)), "the logits were written to"
    assert torch.equal(v.nan_to_num(nan=0.5), direction.nan_to_num(nan=0.5)), "the direction was written to"
    true = true_second(logits, target, v, upstream, **options)
    curvature, slope = terms_of(logits, target, v, upstream, **options)
    dtype = reference.accumulation_dtype(logits.dtype)
    off = relative(dtype, options.get("diversity", "logit_variance")) + relative(torch.float64, options.get("diversity", "logit_variance"))
    assert got.curvature.dtype is logits.dtype and got.curvature.stride() == torch.empty_like(logits).stride() and got.slope.dtype is dtype
    error = off * curvature + SMALLEST[dtype] * (1 + np.max(curvature, initial=0))
    assert_near(got.curvature, true.curvature, error + rounding(true.curvature, logits.dtype), "H v")
    assert_near(got.slope, true.slope, off * slope + SMALLEST[dtype] * (1 + np.max(slope, initial=0)), "<dL/dz, v>")


def mixed(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    first, other = torch.randint(classes, (2, rows))
    other[0] = first[0]  # one class after all
    return first, other, torch.rand(rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"reduction": "none", "diversity_weight": 0.3},
    "smoothing": {"reduction": "sum", "label_smoothing": 0.1},
    "all": {"weight": True, "sample_weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "reduction": "none"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["index", "mixture"])
@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_option_dtype_and_size(backend, classes, diversity, form, dtype):
    rows = 19 if classes <= 256 else 3  # a tile and three rows
    accumulated = reference.accumulation_dtype(dtype)
    for name, options in OPTIONS.items():
        if classes > 1000 and name == "rows":
            continue
        options = {key: value for key, value in options.items() if value is not True}
        if name == "all":
            options |= {"weight": torch.rand(classes, dtype=accumulated) + 0.5, "sample_weight": torch.rand(rows, dtype=accumulated) + 0.5}
        logits, v = (3 * torch.randn(rows, classes)).to(dtype), torch.randn(rows, classes).to(dtype)
        if form == "mixture":
            target: Any = mixed(rows, classes)
        else:
            target = torch.randint(classes, (rows,))
            if name != "plain":
                target[1], logits[1] = -100, torch.nan  # what is ignored is not looked at
        upstream = torch.rand(rows if options.get("reduction") == "none" else (), dtype=accumulated)
        assert_second(backend, logits, target, v, upstream, diversity=diversity, **options)


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("classes", [2, 3, 10, 257, 4097, 40000])  # no diversity, tiles, a row, two parts, many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_margin(backend, classes, diversity, dtype):
    """H v is a product with 1 - p_y where the row is sure, and with p_y where it is wrong: neither may be a rounded difference."""
    for offset, spread in ((0.0, 1.0), (-1e4, 1e-3), (1e4, 10.0)):
        logits, target = rows_at(np.array([-80.0, -25.0, -1.0, 0.0, 3.0, 25.0, 80.0]), classes, offset, spread, dtype)
        assert_second(backend, logits, target, torch.randn(logits.shape).to(dtype), reduction="none", diversity=diversity)


def test_no_curvature_is_0_by_rounding(backend):
    """p_y and 1 - p_y round to 1 from a margin of 17 on. By the formula, s q_j (v_j - v' + p d) and -s p d with d = v' - v_y."""
    logits, target = rows_at(np.array([-80.0, -25.0, 25.0, 80.0]), 10, 0.0, 1.0)
    v = torch.randn(4, 10)
    got = second(backend, logits, target, v, reduction="none", diversity=None).curvature
    z, along, y = logits.double(), v.double(), target[:, None]
    rest = z.scatter(1, y, -torch.inf)
    delta = rest.logsumexp(1, keepdim=True) - z.gather(1, y)
    s, p, q = sigmoid(delta), sigmoid(-delta), rest.softmax(1)
    mean = (q * along).sum(1, keepdim=True)
    d = mean - along.gather(1, y)
    true = (s * q * (along - mean + p * d)).scatter(1, y, -s * p * d)
    assert got.count_nonzero() == got.numel()
    torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-6 * s.min().item())


LAYOUTS = {
    "matrix": lambda new: new(17, 10),
    "vector": lambda new: new(10),
    "vector, every other class": lambda new: new(20)[::2],
    "transposed": lambda new: new(10, 17).t(),
    "wide, transposed": lambda new: new(300, 17).t(),
    "every other class": lambda new: new(17, 300)[:, ::2],
    "every third row": lambda new: new(51, 150)[::3],
    "images": lambda new: new(2, 10, 3, 5),
    "channels last": lambda new: new(2, 10, 3, 5).contiguous(memory_format=torch.channels_last),
    "cropped": lambda new: new(2, 10, 4, 7)[..., 1:-1, 1:-1],
}
DIRECTIONS = {
    "its own": lambda shape, dtype: torch.randn(shape).to(dtype),
    "one number": lambda shape, dtype: torch.randn(()).to(dtype).expand(shape),
    "one row": lambda shape, dtype: torch.randn(1, *shape[1:]).to(dtype).expand(shape),
    "backwards": lambda shape, dtype: torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1]),
    "every other": lambda shape, dtype: torch.randn(*shape, 2).to(dtype)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_layout_of_logits_direction_and_upstream(backend, layout, direction, dtype):
    logits = LAYOUTS[layout](lambda *shape: (2 * torch.randn(shape)).to(dtype))
    rows = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    target = torch.randint(logits.shape[min(1, logits.dim() - 1)], (*rows, 2))[..., 0]
    v = DIRECTIONS[direction](logits.shape, dtype)
    accumulated = reference.accumulation_dtype(dtype)
    for upstream in (torch.rand((), dtype=accumulated).expand(rows), torch.rand(*rows, 2, dtype=accumulated)[..., 1]):
        assert_second(backend, logits, target, v, upstream, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("classes", [10, 257])
@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("form", ["index", "mixture"])
def test_masked_classes(backend, classes, diversity, form):
    """A masked class has no gradient, whatever v says there; smoothing gives it one, of which the loss's slope knows."""
    logits, v = 3 * torch.randn(5, classes), torch.randn(5, classes)
    logits[0, 3:7] = logits[1, 1:] = -torch.inf  # row 1 has but one class
    zeros = torch.zeros(5, dtype=torch.int64)
    target = (zeros, torch.tensor([1, 0, 2, 3, 4]), torch.rand(5)) if form == "mixture" else zeros
    for smoothing in (0.0, 0.1):
        for weight in (None, torch.rand(classes) + 0.5):
            assert_second(backend, logits, target, v, reduction="none", diversity=diversity, label_smoothing=smoothing, weight=weight)
    v[0, 3], v[0, 4] = torch.nan, torch.inf
    assert_second(backend, logits, target, v, reduction="none", diversity=diversity)


@pytest.mark.parametrize("diversity", [None, "kl", "reverse_kl", "chi2", "variance"])  # a variance with it is no number in float32
@pytest.mark.parametrize("form", ["index", "mixture"])
def test_a_class_masked_by_the_lowest_number(backend, diversity, form):
    logits, v = torch.randn(4, 10), torch.randn(4, 10)
    logits[:, 9] = torch.finfo(torch.float32).min
    target = mixed(4, 9) if form == "mixture" else torch.tensor([0, 1, 2, 3])
    assert_second(backend, logits, target, v, reduction="none", diversity=diversity, diversity_weight=100.0)


@pytest.mark.parametrize("classes", [10, 257])
def test_a_poisoned_row_is_nan_and_no_other_is(backend, classes):
    for bad in (torch.nan, torch.inf):
        logits, v = torch.randn(5, classes), torch.randn(5, classes)
        logits[1, 3] = logits[2, 0] = bad
        logits[3] = -torch.inf
        got = second(backend, logits, torch.zeros(5, dtype=torch.int64), v, reduction="none")
        assert got.curvature.isnan().all(1).tolist() == got.slope.isnan().tolist() == [False, True, True, True, False]
        assert got.curvature[::4].isfinite().all()
    logits, v = torch.randn(5, classes), torch.randn(5, classes)
    v[1, 3] = torch.nan
    got = second(backend, logits, torch.zeros(5, dtype=torch.int64), v, reduction="none")
    assert got.curvature.isnan().all(1).tolist() == got.slope.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_to_differentiate(backend, shape, reduction):
    logits = torch.empty(shape)
    target = torch.full(shape[:1] if len(shape) > 1 else (), -100)
    got = second(backend, logits, target, torch.empty(shape), reduction=reduction)
    assert got.curvature.shape == shape and not got.slope.any()
    everything = second(backend, torch.randn(3, 5), torch.full((3,), -100), torch.randn(3, 5), reduction=reduction)
    assert not everything.curvature.any() and not everything.slope.any()


@pytest.mark.parametrize("shape", [(1000, 10), (300, 1000), (2, 40000)])  # tiles, rows, rows of many parts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_bits_for_every_thread_count_and_every_run(backend, shape, dtype):
    logits, v, target = 5 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    target[::7] = -100
    for strides in (logits, logits.t().contiguous().t()):
        for reduction in ("mean", "none"):
            runs = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                runs.append(second(backend, strides, target, v, reduction=reduction))
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("form", ["index", "mixture"])
@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_the_third_order_is_the_definition(backend, form, diversity):
    logits, v = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    target = mixed(4, 5) if form == "mixture" else torch.randint(5, (4,))
    results = []
    for name in (backend, "reference"):
        z, along = logits.clone().requires_grad_(), v.clone().requires_grad_()
        loss = functional.cross_entropy(z, target, backend=name, diversity=diversity, reduction="none", label_smoothing=0.1, z_loss=0.1)
        up = torch.linspace(0.5, 2, 4, dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(loss, z, up, create_graph=True)
        both = torch.autograd.grad(gradient, (z, up), along, create_graph=True)
        third = torch.autograd.grad(both, (z, up, along), [t.detach().cos() for t in both], create_graph=True)
        results.append((*third, *torch.autograd.grad(third[0].square().sum(), (z, up, along))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_batch_of_directions(backend, vectorize):
    logits, target = torch.randn(4, 5), torch.randint(5, (4,))

    def hessian(name: str) -> Tensor:
        return torch.autograd.functional.hessian(lambda z: functional.cross_entropy(z, target, backend=name), logits, vectorize=vectorize)

    torch.testing.assert_close(hessian(backend), hessian("reference"))


@pytest.mark.usefixtures("node")
def test_a_batch_of_upstream_gradients_that_is_differentiated_again(backend):
    logits, target = torch.randn(4, 5), torch.randint(5, (4,))
    results = []
    for name in (backend, "reference"):
        z, up = logits.clone().requires_grad_(), torch.eye(4).requires_grad_()
        loss = functional.cross_entropy(z, target, reduction="none", backend=name)
        (rows,) = torch.autograd.grad(loss, z, up, is_grads_batched=True, create_graph=True)
        results.append((rows, *torch.autograd.grad(rows.pow(3).sum(), (z, up))))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("node")
def test_the_gradient_under_create_graph_is_the_kernel_s(backend):
    logits, target = torch.randn(9, 10), torch.randint(10, (9,))
    z = logits.requires_grad_()
    loss = functional.cross_entropy(z, target, backend=backend)
    (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(gradient, expected) and gradient.requires_grad


def arguments(dtype: torch.dtype, mixture: bool, reduction: int) -> tuple[Any, ...]:
    logits, up = torch.randn(5, 6).to(dtype), torch.rand(5 if reduction == 0 else (), dtype=reference.accumulation_dtype(dtype))
    target, weights = torch.randint(6, (5,)), None
    if mixture:
        target, weights = reference.pack_mixture(mixed(5, 6), None, up.dtype)
    return torch.randn_like(logits), up, logits, target, None, weights, -100, reduction, 0.1, 1, 1.0, 0.01


@pytest.mark.parametrize(
    ("dtype", "mixture", "reduction", "everything"),
    [(torch.float32, False, 0, True), (torch.float64, True, 1, False), (torch.bfloat16, False, 2, False)],
)
def test_the_operator_passes_opcheck(backend, dtype, mixture, reduction, everything):
    operators = backends.choose(backend, torch.device("cpu"))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", *["test_aot_dispatch_dynamic"] * everything]
    grad, upstream, logits, *inputs = arguments(dtype, mixture, reduction)
    leaves = (t.requires_grad_() for t in (grad, upstream, logits))
    torch.library.opcheck(operators.double_backward, (*leaves, *inputs), test_utils=checks)


def test_what_does_not_fit_is_refused(backend):
    operator = backends.choose(backend, torch.device("cpu")).double_backward
    grad, upstream, logits, target, *rest = arguments(torch.float32, False, 0)
    for wrong in (grad[:, 1:], grad.double(), grad[0]):
        with pytest.raises(RuntimeError, match="the gradient of dlogits must have the shape"):
            operator(wrong, upstream, logits, target, *rest)
    with pytest.raises(RuntimeError, match="the upstream gradient must have the shape"):
        operator(grad, upstream[:-1], logits, target, *rest)
    with pytest.raises(RuntimeError, match="class probabilities have no fused second derivative"):
        operator(grad, upstream, logits, torch.rand(5, 6), *rest)
    outside = target.index_fill(0, torch.tensor([2]), 6)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"target of row 2 is outside \[0, 6\)"):
            operator(grad, upstream, logits, outside, *rest)
    else:  # which does not wait to find out: the gradient of such a row is 0
        slope, curvature = operator(grad, upstream, logits, outside, *rest)
        assert not slope[2] and not curvature[2].any() and slope[3] and curvature[3].all()
