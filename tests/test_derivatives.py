"""Promise: every derivative that PyTorch can take of its own loss, it can take of this one, and it is the right one.

The second order for every option, forward mode, torch.func, and upstream gradients of any layout. What backward itself
promises is in test_autograd.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BACKENDS, DIVERSITIES
from forms import FORMS, target_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from triton_mode import INTERPRETED

from fastsoftloss import functional

F64 = torch.float64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum", "diversity_weight": 0.3},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": True, "sample_weight": True},
    "all": {"weight": True, "sample_weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "reduction": "none"},
}


def sample(form: str, rows: int = 4, classes: int = 5, dtype: torch.dtype = F64) -> tuple[Tensor, Any]:
    return 2 * torch.randn(rows, classes, dtype=dtype), target_of(form, rows, classes, dtype)


def with_weights(options: dict[str, Any], rows: int = 4, classes: int = 5) -> dict[str, Any]:
    sizes = {"weight": classes, "sample_weight": rows}
    return {name: torch.rand(sizes[name], dtype=F64) + 0.5 if name in sizes else value for name, value in options.items()}


def exactly(dtype: torch.dtype) -> dict[str, float]:
    """Two ways to a number of order 1 through some dozen roundings."""
    return {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # which test_reference.py asks
@pytest.mark.parametrize(
    ("form", "options"),
    [(form, name) for form in FORMS for name in OPTIONS if name in ("plain", "all") or (form == "index" and not INTERPRETED)],
)
@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_first_and_second_order_by_finite_differences(backend, form, diversity, options):
    logits, target = sample(form)
    options = with_weights(OPTIONS[options])

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, target, diversity=diversity, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_forward_mode(backend, form, diversity):
    logits, target = sample(form)
    tangent = torch.randn_like(logits)
    options = dict(diversity=diversity, label_smoothing=0.1, z_loss=0.1, backend=backend)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(z, target, **options), z)
    with forward_ad.dual_level():
        loss = functional.cross_entropy(forward_ad.make_dual(logits, tangent), target, **options)
        got = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(got, (gradient * tangent).sum(), **exactly(F64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_over_a_gradient_of_a_loss_made_before(backend, form, dtype, reduction):
    """The tangent of an upstream gradient, and of the direction of H v, in which both are linear; by a second backward too."""
    logits, target = sample(form, dtype=torch.float32)
    z = logits.to(dtype).requires_grad_()
    loss = functional.cross_entropy(z, target, reduction=reduction, backend=backend)
    upstream, tangent = torch.rand_like(loss), torch.rand_like(loss)
    gradient = lambda of: torch.autograd.grad(loss, z, of, retain_graph=True)[0]  # noqa: E731
    with forward_ad.dual_level():
        got = [forward_ad.unpack_dual(gradient(forward_ad.make_dual(upstream, tangent))) for _ in range(2)]
    got.append(torch.func.jvp(gradient, (upstream,), (tangent,)))
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for primal, along in got:
        torch.testing.assert_close(primal, gradient(upstream), **near)
        torch.testing.assert_close(along, gradient(tangent), **near)

    (g,) = torch.autograd.grad(functional.cross_entropy(z, target, backend=backend), z, create_graph=True)
    v, v_tangent = torch.rand_like(z), torch.rand_like(z)
    hessian = lambda of: torch.autograd.grad(g, z, of, retain_graph=True)[0]  # noqa: E731
    with forward_ad.dual_level():
        primal, along = forward_ad.unpack_dual(hessian(forward_ad.make_dual(v, v_tangent)))
    torch.testing.assert_close(primal, hessian(v), **near)
    torch.testing.assert_close(along, hessian(v_tangent), **near)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_function_transforms(backend, form, dtype):
    """Against autograd, row by row."""
    logits, target = sample(form, dtype=dtype)

    def rows(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, target, reduction="none", backend=backend)

    def one(z: Tensor, t: Any) -> Tensor:
        return functional.cross_entropy(z, t, backend=backend)

    z = logits.clone().requires_grad_()
    values = rows(z)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    tangent = torch.randn_like(logits)
    got, along = torch.func.jvp(rows, (logits,), (tangent,))
    torch.testing.assert_close(got, values, **exactly(dtype))
    torch.testing.assert_close(along, (gradient * tangent).sum(1), **exactly(dtype))
    back, pull = torch.func.vjp(rows, logits)
    torch.testing.assert_close(pull(torch.ones_like(back))[0], gradient, **exactly(dtype))
    jacobian = torch.diag_embed(gradient.t()).permute(1, 2, 0)
    torch.testing.assert_close(torch.func.jacrev(rows)(logits), jacobian, **exactly(dtype))
    torch.testing.assert_close(torch.func.jacfwd(rows)(logits), jacobian, **exactly(dtype))
    per_row = pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) and t.dim() else None, target)
    torch.testing.assert_close(torch.func.vmap(one, (0, per_row))(logits, target), values, **exactly(dtype))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one), (0, per_row))(logits, target), gradient, **exactly(dtype))
    hessian = torch.func.hessian(lambda z: rows(z).sum())(logits)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda z: rows(z).sum(), logits), **exactly(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_per_sample_gradients_of_a_model(backend, form):
    """As differential privacy wants them: one gradient of the parameters for each sample."""
    model, (inputs, target) = torch.nn.Linear(3, 5, dtype=F64), (torch.randn(4, 3, dtype=F64), target_of(form, 4, 5, F64))
    parameters = dict(model.named_parameters())
    per_row = pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) and t.dim() else None, target)

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Any) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), t, backend=backend)

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, per_row))(parameters, inputs, target)
    for row in range(4):
        alone = pytree.tree_map(lambda t, row=row: t[row : row + 1] if isinstance(t, Tensor) and t.dim() else t, target)
        gradients = torch.autograd.grad(loss(parameters, inputs[row : row + 1], alone), list(parameters.values()))
        for name, expected in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(together[name][row], expected, **exactly(F64))


LAYOUTS = {
    "expanded": lambda rows: torch.tensor(0.7).expand(rows),
    "every other": lambda rows: torch.rand(2 * rows)[::2],
    "a column": lambda rows: torch.rand(rows, 3)[:, 1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_of_any_layout_and_logits_untouched(backend, form, layout, dtype):
    logits, target = sample(form, 9, 7, torch.float32)
    logits = logits.to(dtype)
    before, upstream = logits.clone(), LAYOUTS[layout](9)
    z = logits.requires_grad_()
    loss = functional.cross_entropy(z, target, reduction="none", backend=backend)
    handed, *written = (torch.autograd.grad(loss, z, upstream, retain_graph=True)[0] for _ in range(3))
    (expected,) = torch.autograd.grad(loss, z, upstream.contiguous().clone())
    assert torch.equal(written[0], expected) and torch.equal(written[1], expected)
    torch.testing.assert_close(handed, expected)  # the forward's own gradient, times the upstream one: a rounding more
    assert torch.equal(logits.detach(), before), "the logits were written to"
    if layout == "expanded":  # what .sum().backward() sends
        z.grad = None
        (0.7 * functional.cross_entropy(z, target, reduction="none", backend=backend).sum()).backward()
        torch.testing.assert_close(z.grad, expected)
