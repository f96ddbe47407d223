"""Promise: `Loss` lives in a training loop as any module does.

Mixed precision, loss scaling, channels_last, activation checkpointing, copies, pickles, state, `.to()`, repr and subclasses.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from forms import FORMS, target_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fastsoftloss import Loss, functional


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_it_in_float32(backend, form, dtype):
    """As cross_entropy does: the 16-bit logits of an autocast layer come in, a float32 loss comes out, 16 bits go back."""
    layer, inputs, target = nn.Linear(4, 6), torch.randn(8, 4), target_of(form, 8, 6)
    with torch.autocast("cpu", dtype):
        logits = layer(inputs)
        loss = Loss(backend=backend)(logits, target)
    assert logits.dtype is dtype and loss.dtype is torch.float32
    (got,) = torch.autograd.grad(loss, layer.weight)
    outside = Loss(backend=backend)(logits.detach().requires_grad_(), target)
    assert torch.equal(loss, outside)
    assert got.dtype is torch.float32 and got.isfinite().all() and got.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_scaler_takes_its_scale_back(backend, form):
    """The step is that without a scaler; an overflow is seen, and the step left out."""
    inputs, target = torch.randn(8, 4), target_of(form, 8, 6)
    weights = []
    for scale in (None, 2.0**12):
        torch.manual_seed(0)
        layer = nn.Linear(4, 6)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        loss = Loss(backend=backend)(layer(inputs), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(layer.weight.detach().clone())
    torch.testing.assert_close(*weights)
    scaler.scale(Loss(backend=backend)(layer(inputs) * torch.inf, target)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, weights[1]) and scaler.get_scale() < 2.0**12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_in_either_memory_format(backend, form, layout):
    """The same loss, and a gradient in the format of the logits, so that the convolution before it copies nothing."""
    logits = torch.randn(2, 6, 3, 4)
    target = target_of(form, 24, 6)
    image = lambda t: t.view(2, 3, 4, *t.shape[1:]).movedim(-1, 1) if t.dim() > 1 else t.view(2, 3, 4)  # noqa: E731
    shaped = torch.utils._pytree.tree_map(lambda t: image(t) if isinstance(t, Tensor) and t.dim() else t, target)
    z = logits.to(memory_format=layout).requires_grad_()
    loss = Loss(backend=backend)(z, shaped)
    (gradient,) = torch.autograd.grad(loss, z)
    flat = logits.movedim(1, -1).reshape(24, 6).requires_grad_()
    expected = Loss(backend=backend)(flat, target)
    (rows,) = torch.autograd.grad(expected, flat)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, rows.view(2, 3, 4, 6).movedim(-1, 1))
    if backend != "reference":
        assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, form, reentrant):
    """The forward runs again inside the backward, loss included, and the gradient is the same to the bit."""
    torch.manual_seed(0)
    layer, inputs, target, criterion = nn.Linear(4, 6), torch.randn(8, 4), target_of(form, 8, 6), Loss(backend=backend)

    def step(x: Tensor) -> Tensor:
        return criterion(layer(x).relu(), target)

    gradients = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=reentrant)):
        layer.zero_grad()
        run(inputs.clone().requires_grad_()).backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def full() -> Loss:
    return Loss(torch.rand(6) + 0.5, 1, "sum", 0.1, diversity="kl", diversity_weight=0.3, z_loss=0.01, backend="reference")


def through_file(module: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
def test_copies_and_pickles(again):
    loss, logits, target = full(), torch.randn(8, 6), torch.randint(6, (8,))
    other = again(loss)
    assert type(other) is Loss and repr(other) == repr(loss)
    assert torch.equal(other(logits, target), loss(logits, target))
    if again is not copy.copy:
        other.weight.zero_()
        assert loss.weight.all(), "a copy with the original's weight"


def test_the_weight_is_a_buffer():
    loss = full()
    assert list(loss.state_dict()) == ["weight"] == [name for name, _ in loss.named_buffers()] and not list(loss.parameters())
    other = Loss(torch.ones(6))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.weight, loss.weight)
    assert Loss().state_dict() == {}
    with pytest.raises(RuntimeError, match="weight"):
        Loss().load_state_dict(loss.state_dict())


def test_to_moves_the_weight():
    loss = full()
    assert loss.to(torch.float64).weight.dtype is torch.float64
    assert loss.half().weight.dtype is torch.float16  # a model's .half() takes its criterion along
    logits, target = torch.randn(8, 6), torch.randint(6, (8,))
    torch.testing.assert_close(loss(logits, target), Loss(loss.weight.float(), *(1, "sum", 0.1), **options_of(loss))(logits, target))
    assert loss.to("meta").weight.is_meta
    with pytest.raises(ValueError, match="weight must be on the device of logits, cpu, got meta"):
        loss(logits, target)


def options_of(loss: Loss) -> dict[str, Any]:
    return {name: getattr(loss, name) for name in ("diversity", "diversity_weight", "z_loss", "backend")}


def test_repr_says_every_option_and_is_python():
    assert eval(repr(Loss(diversity="chi2", z_loss=0.5)), {"Loss": Loss}).z_loss == 0.5
    text = repr(full())
    for name in ("ignore_index=1", "reduction='sum'", "label_smoothing=0.1", "diversity='kl'", "diversity_weight=0.3", "z_loss=0.01"):
        assert name in text
    assert "weight=(6,)" in text and "weight=" not in repr(Loss()).replace("diversity_weight=", "")


def test_a_subclass_with_state_of_its_own(backend):
    class Warmed(Loss):
        """A penalty that grows with the step."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

        def forward(self, logits: Tensor, target: Any, sample_weight: Tensor | None = None) -> Tensor:
            self.step += 1
            self.diversity_weight = min(1.0, float(self.step) / 10)
            return super().forward(logits, target, sample_weight)

    loss, logits, target = Warmed(diversity="kl", backend=backend), torch.randn(8, 6), torch.randint(6, (8,))
    for step in range(1, 4):
        expected = functional.cross_entropy(logits, target, diversity="kl", diversity_weight=step / 10, backend=backend)
        assert torch.equal(loss(logits, target), expected)
    assert list(loss.state_dict()) == ["step"] and "Warmed(" in repr(loss)


def test_a_weight_that_became_something_else(backend):
    """What a module's attribute may be replaced by."""
    logits, target = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
    weight = torch.rand(3) + 0.5
    expected = Loss(weight, backend=backend)(logits, target)
    fixed, learned, bound, gone = (Loss(weight, backend=backend) for _ in range(4))
    fixed.weight = nn.Parameter(weight, requires_grad=False)
    learned.weight = nn.Parameter(weight)
    parametrize.register_parametrization(bound, "weight", nn.Identity())
    for loss in (fixed, learned, bound):
        torch.testing.assert_close(loss(logits, target), expected)
    learned(logits, target).backward()
    assert learned.weight.grad is not None and learned.weight.grad.any()
    del gone.weight
    gone.weight = None
    torch.testing.assert_close(gone(logits, target), Loss(backend=backend)(logits, target))
