"""Promise: autograd can do with the loss what it can do with PyTorch's own.

Backward as often as wanted, with any upstream gradient, to the second order, through torch.func and torch.compile; and a
gradient that the kernel cannot give is never silently zero.
"""

from __future__ import annotations

import formula
import pytest
import torch
from conftest import BACKENDS, DIVERSITIES, RELATIVE, assert_near, assert_true, compute, truth
from torch import Tensor

from fastsoftloss import backends, functional, reference

pytestmark = pytest.mark.usefixtures("node")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLASSES = [10, 257, 40000]  # tile kernel, row kernel, classes shared between threads
KERNELS = [name for name in BACKENDS if name != "reference"]


def sample(classes: int = 10, dtype: torch.dtype = torch.float32, rows: int = 5) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_backward_twice_gives_the_same_bits(backend, classes, dtype):
    logits, target = sample(classes, dtype)
    z = logits.requires_grad_()
    loss = functional.cross_entropy(z, target, backend=backend)
    first, second, third = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)


def test_without_retain_graph_the_second_backward_raises(backend):
    logits, target = sample()
    loss = functional.cross_entropy(logits.requires_grad_(), target, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_handed_over_belongs_to_autograd(backend, dtype):
    """Gradient clipping, accumulation and zeroing write into .grad: a later backward must not see it."""
    logits, target = sample(dtype=dtype)
    z = logits.requires_grad_()
    loss = functional.cross_entropy(z, target, backend=backend)
    loss.backward(retain_graph=True)
    expected = z.grad.clone()
    z.grad.fill_(7)
    z.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(z.grad, expected)
    z.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(z.grad, expected)
    loss = functional.cross_entropy(z, target, backend=backend)
    for _ in range(2):  # what autograd.grad gives out is the buffer itself
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert torch.equal(gradient, expected)
        gradient.fill_(7)
    up = torch.tensor(2.0, dtype=loss.dtype)  # scaled in place, once
    loss = functional.cross_entropy(z, target, backend=backend)
    first, second = (torch.autograd.grad(loss, z, up, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [0.0, -1.0, 1 / 3, 8192.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", CLASSES)
def test_upstream_gradient(backend, dtype, upstream, reduction, classes):
    """16-bit gradients too are the truth rounded once: scaling what has been rounded already would round twice."""
    logits, target = sample(classes, dtype)
    shape = target.shape if reduction == "none" else ()
    up = torch.full(shape, upstream, dtype=reference.accumulation_dtype(dtype))
    got = compute(backend, logits, target, upstream=up, reduction=reduction)
    assert_true(got, logits, target, upstream=up, reduction=reduction)


def test_loss_scaling_keeps_float16_gradients_alive(backend):
    """A mean over 4096 rows of confident logits: without the scale all of it is below float16's smallest number."""
    logits = torch.zeros(4096, 10, dtype=torch.float16)
    logits[:, 0] = 14.0
    target = torch.zeros(4096, dtype=torch.int64)
    up = torch.tensor(65536.0)
    got = compute(backend, logits, target, upstream=up)
    assert got.gradient.count_nonzero() == got.gradient.numel()
    assert_true(got, logits, target, upstream=up)
    assert compute(backend, logits, target).gradient.count_nonzero() < got.gradient.numel()


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(backend, diversity, reduction):
    logits, target = sample(6, torch.float64)
    options = dict(diversity=diversity, reduction=reduction, label_smoothing=0.1, z_loss=0.1, weight=torch.rand(6) + 0.5)
    seconds = []
    for name in (backend, "reference"):
        z = logits.clone().requires_grad_()
        loss = functional.cross_entropy(z, target, backend=name, **options)
        up = torch.ones_like(loss).requires_grad_()
        (first,) = torch.autograd.grad(loss, z, up, create_graph=True)
        seconds.append((first, *torch.autograd.grad(first.pow(3).sum(), (z, up))))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_weights_that_want_a_gradient_get_it(backend, name):
    logits, target = sample()
    z, w = logits.requires_grad_(), (torch.rand(10 if name == "weight" else 5) + 0.5).requires_grad_()
    loss = functional.cross_entropy(z, target, label_smoothing=0.1, backend=backend, **{name: w})
    dz, dw = torch.autograd.grad(loss, (z, w))
    zt, wt = z.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    true = reference.cross_entropy(zt, target, label_smoothing=0.1, **{name: wt})[0]
    for got, expected in zip((dz, dw), torch.autograd.grad(true, (zt, wt)), strict=True):
        assert_near(got, expected, RELATIVE[torch.float32] * expected.abs().max().item())


@pytest.mark.parametrize("differentiable", [True, False], ids=["requires grad", "no grad"])
def test_forward_mode_is_right_or_raises(backend, differentiable):
    logits, target = sample()
    tangent = torch.randn_like(logits)
    expected = (truth(logits, target).gradient * tangent).sum()
    with torch.autograd.forward_ad.dual_level():
        z = torch.autograd.forward_ad.make_dual(logits.requires_grad_(differentiable), tangent)
        try:
            loss = functional.cross_entropy(z, target, backend=backend)
        except (RuntimeError, NotImplementedError):
            return
        got = torch.autograd.forward_ad.unpack_dual(loss).tangent
    assert got is not None, "the tangent was dropped in silence"
    torch.testing.assert_close(got.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_parts_are_detached(backend):
    logits, target = sample()
    parts = functional.cross_entropy(logits.requires_grad_(), target, return_components=True, backend=backend)
    assert parts.loss.requires_grad and not parts.cross_entropy.requires_grad and not parts.diversity.requires_grad
    torch.testing.assert_close(parts.loss.detach(), parts.cross_entropy + parts.diversity)


def arguments(dtype: torch.dtype, strided: bool, weighted: bool, reduction: int) -> tuple:
    logits, target = sample(6, dtype)
    if strided:
        logits = logits.t().contiguous().t()
    accumulated = reference.accumulation_dtype(dtype)
    weight = torch.rand(6, dtype=accumulated) if weighted else None
    sample_weight = torch.rand(5, dtype=accumulated) if weighted else None
    return logits, target, weight, sample_weight, -100, reduction, 0.1, 1, 1.0, 0.01


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "strided", "weighted", "reduction", "everything"),
    [
        (torch.float32, True, True, 0, True),
        (torch.float64, False, False, 1, True),
        (torch.float32, False, False, 2, False),  # the ahead-of-time check takes seconds a sample
        (torch.bfloat16, True, False, 1, False),
    ],
)
def test_the_operators_pass_opcheck(name, dtype, strided, weighted, reduction, everything):
    operators = backends.choose(name, torch.device(BACKENDS[name]))
    inputs = arguments(dtype, strided, weighted, reduction)
    leaf = (inputs[0].requires_grad_(), *inputs[1:])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", *["test_aot_dispatch_dynamic"] * everything]
    torch.library.opcheck(operators.forward, (*leaf, True, True), test_utils=checks)
    torch.library.opcheck(operators.forward, (*leaf, False, False), test_utils=checks[:3])
    upstream = torch.rand(5 if reduction == 0 else (), dtype=reference.accumulation_dtype(dtype)).requires_grad_()
    moments = operators.forward(*leaf, False, False)[3].detach()
    torch.library.opcheck(operators.backward, (upstream, moments, *leaf), test_utils=checks)


def test_torch_func_grad(backend):
    logits, target = sample()
    got = torch.func.grad(lambda z: functional.cross_entropy(z, target, backend=backend))(logits)
    bound = RELATIVE[torch.float32] * formula.cross_entropy(logits, target).gradient_terms
    assert_near(got, truth(logits, target).gradient, bound)


@pytest.mark.parametrize("name", KERNELS)
def test_torch_compile_without_a_graph_break(name):
    """`aot_eager`: tracing, fakes and the registered autograd; inductor would need a compiler and adds nothing of ours."""
    logits, target = sample()
    step = torch.compile(lambda z: functional.cross_entropy(2 * z, target, backend=name), fullgraph=True, backend="aot_eager")
    z = logits.clone().requires_grad_()
    loss = step(z)
    loss.backward()
    eager = logits.clone().requires_grad_()
    expected = functional.cross_entropy(2 * eager, target, backend=name)
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(z.grad, eager.grad)


def test_hooks_on_the_logits_run_once_under_create_graph() -> None:
    logits, target = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    gradients = []
    for loss in (functional.cross_entropy, torch.nn.functional.cross_entropy):
        hooked = logits * 1
        hooked.register_hook(lambda gradient: 2 * gradient)
        options = {"diversity": None} if loss is functional.cross_entropy else {}
        gradients.append(torch.autograd.grad(loss(hooked, target, **options), logits, create_graph=True)[0])
    torch.testing.assert_close(*gradients)


def test_a_batch_of_upstream_gradients_as_the_first_backward() -> None:
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))

    def rows(backend: str) -> torch.Tensor:
        return torch.autograd.functional.jacobian(
            lambda z: functional.cross_entropy(z, target, reduction="none", backend=backend), logits, vectorize=True
        )

    torch.testing.assert_close(rows("cpu"), rows("reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # handed over, and written anew
def test_an_ignored_row_is_zero_under_any_upstream_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    loss = functional.cross_entropy(logits, torch.full((5,), -100))
    (loss * loss).backward()
    assert logits.grad is not None and not logits.grad.any()


def test_a_penalty_of_no_weight_is_not_there_even_where_it_is_infinite() -> None:
    logits, target = torch.randn(5, 7), torch.randint(5, (5,))
    logits[:, 5:] = torch.finfo(torch.float32).min
    z = logits.clone().requires_grad_()
    loss = functional.cross_entropy(z, target, diversity_weight=0.0)
    (gradient,) = torch.autograd.grad(loss, z)
    true = torch.nn.functional.cross_entropy(z, target)
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(gradient, torch.autograd.grad(true, z)[0])
    parts = functional.cross_entropy(logits, target, diversity_weight=0.0, return_components=True)
    torch.testing.assert_close(parts.loss, true.detach())
