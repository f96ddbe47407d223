"""Promise: the loss compiles and exports like an operator of PyTorch's own.

One graph forward and backward, static or dynamic, none the more for another batch size; torch.export, AOTInductor, fake tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BACKENDS
from forms import FORMS, target_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fastsoftloss import Loss, functional

CLASSES = 6
# what the reference is made of compiles too: the first test asks, and the transforms, whose graph it is whatever the backend
KERNELS = [name for name in BACKENDS if name != "reference"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def gradient(function: Any, logits: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    z = logits.clone().requires_grad_()
    loss = function(z, target)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


class Model(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.loss = Loss(torch.rand(CLASSES) + 0.5, diversity="kl", label_smoothing=0.1, backend=backend)

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        return self.loss(logits, target)


@pytest.mark.parametrize(
    ("backend", "form"),
    [*((name, form) for name in KERNELS for form in FORMS), *([("reference", "index")] if "reference" in BACKENDS else [])],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_graph_forward_and_backward(backend, form, dynamic):
    """`aot_eager`: the tracing, the fakes and the registered autograd, which are ours; inductor has a test of its own."""

    def loss(z: Tensor, target: Any) -> Tensor:
        return functional.cross_entropy(z * 2, target, reduction="none", z_loss=0.1, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        logits, target = torch.randn(rows, CLASSES), target_of(form, rows, CLASSES)
        for got, expected in zip(gradient(compiled, logits, target), gradient(loss, logits, target), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_another_batch_size_is_no_other_graph(backend, form, dynamic):
    """Left to itself, Dynamo takes the first size as fixed and the second as a pattern: two graphs, and never a third."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Model(backend), fullgraph=True, dynamic=dynamic, backend=counter)
    frames = []
    for rows in (5, 9, 16, 33, 64, 7):
        gradient(compiled, torch.randn(rows, CLASSES), target_of(form, rows, CLASSES))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0 if dynamic else 1]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_another_mixing_weight_is_no_other_graph(backend, dynamic):
    """A number drawn for each batch, as mixup does: one graph for the first, where Dynamo takes it as fixed, and one for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    loss = lambda z, target: functional.cross_entropy(z, target, backend=backend)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    logits, (first, second, _) = torch.randn(5, CLASSES), target_of("mixture", 5, CLASSES)
    for mix in (0.3, 0.4, 0.55, 0.7, 0.82, 0.9, 0.95, 0.01, 0.6):
        got, expected = (gradient(one, logits, (first, second, mix)) for one in (compiled, loss))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_loss_in_forward_mode(backend, form):
    """Compiled before there was a dual number."""
    loss = lambda z, target: functional.cross_entropy(z, target, backend=backend)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    for function in (compiled, loss):
        function(logits, target)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits).sin())
        got, expected = (forward_ad.unpack_dual(function(dual, target)).tangent for function in (compiled, loss))
    assert got is not None
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_inductor(form):
    """The default backend, where the C++ compiler is there."""
    loss = lambda z, target: functional.cross_entropy(z.sin(), target, backend="cpu")  # noqa: E731
    logits, target = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    got = gradient(torch.compile(loss, fullgraph=True), logits, target)
    for a, b in zip(got, gradient(loss, logits, target), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_and_parts(backend, form):
    def parts(z: Tensor, target: Any) -> functional.LossComponents:
        return functional.cross_entropy(z, target, return_components=True, backend=backend)

    logits, target = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    with torch.no_grad():
        got = torch.compile(parts, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(tuple(got), tuple(parts(logits, target)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("form", "transform"), [("index", "grad"), ("index", "jvp"), *((form, "per sample") for form in FORMS)])
def test_function_transforms_under_compile(backend, form, transform):
    def loss(z: Tensor, target: Any) -> Tensor:
        return functional.cross_entropy(z, target, backend=backend)

    def run(z: Tensor, target: Any) -> Tensor:
        if transform == "grad":
            return torch.func.grad(loss)(z, target)
        if transform == "per sample":
            return torch.func.vmap(torch.func.grad(loss))(z, target)
        return torch.func.jvp(lambda z: loss(z, target), (z,), (torch.ones_like(z),))[1]

    logits, target = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(got, run(logits, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_export_with_a_dynamic_batch(backend, form):
    model, rows = Model(backend), torch.export.Dim("rows", min=2, max=4096)
    example = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    shapes = torch.utils._pytree.tree_map(lambda t: {0: rows} if isinstance(t, Tensor) and t.dim() else None, example)
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    logits, target = torch.randn(11, CLASSES), target_of(form, 11, CLASSES)
    torch.testing.assert_close(program.module()(logits, target), model(logits, target), rtol=1e-6, atol=1e-7)
    kernels = [node for node in program.graph.nodes if str(node.target).startswith("fastsoftloss.")]
    assert len(kernels) == 1, "the graph holds the operator, not what it is made of"


class EveryForm(Model):
    def forward(self, logits: Tensor, *targets: Any) -> list[Tensor]:  # type: ignore[override]
        return [self.loss(logits, target) for target in targets]


def test_ahead_of_time(tmp_path):
    """AOTInductor: a shared library that runs without Dynamo, one for all forms of a target since each takes half a minute."""
    model = EveryForm("cpu")
    example = torch.randn(5, CLASSES), *(target_of(form, 5, CLASSES) for form in FORMS)
    package = torch._inductor.aoti_compile_and_package(torch.export.export(model, example), package_path=str(tmp_path / "loss.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*example), model(*example))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fake_tensors(backend, form, reduction):
    """No value is looked at: memory planning and tracing run the loss on tensors that have none."""
    with FakeTensorMode():
        logits = torch.empty(5, CLASSES, 3, dtype=torch.bfloat16).requires_grad_()
        target = target_of(form, 5, CLASSES)
        shape = lambda t: t.unsqueeze(-1).expand(*t.shape, 3) if isinstance(t, Tensor) else t  # noqa: E731
        target = torch.utils._pytree.tree_map(shape, target)
        loss, *parts = functional.cross_entropy(logits, target, reduction=reduction, return_components=True, backend=backend)
        loss.sum().backward()
    assert loss.dtype is torch.float32 and loss.shape == ((5, 3) if reduction == "none" else ())
    assert all(part.shape == loss.shape for part in parts)
    assert logits.grad is not None and logits.grad.shape == logits.shape and logits.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_the_second_derivative_under_compile(name, form):
    """Dynamo differentiates outside the graph here: the compiled loss inside a gradient penalty."""
    compiled = torch.compile(lambda z, t: functional.cross_entropy(z, t, backend=name), fullgraph=True, backend="eager")
    logits, target = torch.randn(5, CLASSES), target_of(form, 5, CLASSES)
    results = []
    for loss in (compiled, lambda z, t: functional.cross_entropy(z, t, backend="reference")):
        z = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(z, target), z, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), z)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
