"""Promise: an eager call on the CPU is the same loss whoever differentiates it.

csrc/autograd.cpp does for plain tensors what functional.py and ops._CrossEntropy do in Python; here both run, and every bit agrees.
What is not plain goes the long way, and a bad argument is refused in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DIVERSITIES, NODES
from forms import FORMS, target_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fastsoftloss import Loss, backends, functional
from fastsoftloss.functional import cross_entropy

pytestmark = pytest.mark.skipif("C++" not in NODES, reason="csrc/autograd.cpp is not built for this torch")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call a function with the node in Python."""

    def run(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(backends, "quick", None)
            patch.setattr(backends, "_best", {})
            patch.setitem(backends._ready, "cpu", backends._ready["cpu"]._replace(eager=None))
            return function(*arguments, **options)

    yield run


def is_quick(loss: Tensor) -> bool:
    return loss.grad_fn is not None and "CppNode" in loss.grad_fn.name()


def outcome(logits: Tensor, target: Any, upstream: float = 1.0, **options: Any) -> tuple[list[Tensor], bool]:
    z = logits.detach().requires_grad_()
    loss, *parts = functional.cross_entropy(z, target, return_components=True, **options)
    alone = functional.cross_entropy(z, target, **options)
    gradients = [torch.autograd.grad(one, z, torch.full_like(one, upstream), retain_graph=True)[0] for one in (loss, loss, alone)]
    with torch.no_grad():
        value = functional.cross_entropy(z, target, **options)
    return [loss, alone, value, *parts, *gradients], is_quick(alone)


def check(in_python: Any, quick: bool, *arguments: Any, **options: Any) -> None:
    got, by_cpp = outcome(*arguments, **options)
    expected, by_python = in_python(outcome, *arguments, **options)
    assert by_cpp is quick and not by_python
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(in_python, form, diversity, reduction):
    options = dict(diversity=diversity, reduction=reduction, label_smoothing=0.1, z_loss=0.01, weight=torch.rand(6) + 0.5)
    check(in_python, True, torch.randn(5, 6), target_of(form, 5, 6), **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("upstream", [1.0, -0.3, 65536.0, torch.inf])  # as it is, rescaled, beyond float16, where 0 * it is NaN
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_dtype_and_upstream(in_python, form, dtype, upstream, reduction):
    target = target_of(form, 5, 6, F64 if dtype is F64 else F32)
    check(in_python, True, torch.randn(5, 6).to(dtype), target, upstream, reduction=reduction)


def images(target: Any) -> Any:
    return pytree.tree_map(lambda t: t.unsqueeze(-1).expand(*t.shape, 3) if isinstance(t, Tensor) else t, target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["one row", "no rows", "images", "class stride", "one class", "long rows"])
def test_every_shape(in_python, form, shape):
    rows, classes = {"no rows": (0, 6), "one class": (5, 1), "long rows": (2, 40000)}.get(shape, (5, 6))
    logits, target = torch.randn(rows, classes), target_of(form, rows, classes)
    if shape == "one row":
        logits, target = logits[0], pytree.tree_map(lambda t: t[0], target)
    elif shape == "images":
        logits, target = logits.unsqueeze(-1).repeat(1, 1, 3), images(target)
    elif shape == "class stride":
        logits = logits.t().contiguous().t()
    check(in_python, True, logits, target)


@pytest.mark.parametrize(
    ("quick", "target"),
    [
        (True, (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 0.25)),
        (True, (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 1)),
        (True, (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.tensor(0.25))),
        (True, (torch.tensor([0, -100, -100]), torch.tensor([2, 1, -100]), torch.rand(3))),
        (True, (torch.tensor([0, 1, 2]).int(), torch.tensor([2, 1, 0]).int(), 0.25)),
        (True, torch.tensor([0, -100, 2]).int()),
        # what Python converts first, and then hands to the same node
        (True, torch.tensor([0, 1, 2], dtype=torch.uint8)),
        (True, (torch.tensor([0, 1, 2]).int(), torch.tensor([2, 1, 0]), 0.25)),
        (True, (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.rand(3).double())),
        (True, torch.rand(3, 4).double()),
    ],
)
def test_every_form_of_a_target(in_python, quick, target):
    check(in_python, quick, torch.randn(3, 4), target)


@pytest.mark.parametrize(
    "options",
    [
        dict(weight=torch.rand(4).double()),
        dict(weight=torch.rand(8)[::2]),
        dict(sample_weight=torch.rand(3)),
        dict(sample_weight=torch.rand(3).half()),
        dict(diversity_weight=0.0),
        dict(ignore_index=2**62),  # beyond what a double holds
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_kind(in_python, form, options):
    check(in_python, True, torch.randn(3, 4), target_of(form, 3, 4), **options)


class Subclass(Tensor):
    pass


def test_what_is_not_plain_goes_the_long_way():
    z, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    expected = functional.cross_entropy(z, y)
    assert is_quick(expected) and is_quick(Loss()(z, y))
    for logits, target, options in (
        (z.as_subclass(Subclass), y, {}),
        (z, y.as_subclass(Subclass), {}),
        (z, y, {"weight": torch.ones(4, requires_grad=True)}),
        (z, y, {"sample_weight": torch.ones(3, requires_grad=True)}),
        (z, (y, y, torch.tensor(0.5, requires_grad=True)), {}),
        (z, torch.nn.functional.one_hot(y, 4).float().requires_grad_(), {}),
        (z, y, {"backend": "reference"}),
    ):
        loss = functional.cross_entropy(logits, target, **options)
        assert not is_quick(loss)
        torch.testing.assert_close(loss.as_subclass(Tensor), expected)


def test_components_are_asked_for_by_any_true_value():
    for wanted in (True, 1, "yes"):
        assert len(functional.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), return_components=wanted)) == 3  # type: ignore[call-overload]


def test_a_torch_function_mode_sees_the_operator():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    z = torch.randn(3, 4, requires_grad=True)
    with Mode():
        functional.cross_entropy(z, torch.tensor([0, 1, 2]))
    assert any("cross_entropy" in name for name in seen)


def test_two_labels_for_logits_of_two_rows_are_no_index_target():
    """Packed as a mixture is, they have the shape of one."""
    z = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"target\[0\] must have shape \(2,\)"):
        functional.cross_entropy(z, (torch.tensor(0), torch.tensor(1), 0.5))
    for mix in (-0.5, 1.5, float("nan"), "half", None):
        with pytest.raises((ValueError, TypeError), match=r"target\[2\], the weight of target\[0\], must be"):
            functional.cross_entropy(z, (torch.tensor([0, 1]), torch.tensor([1, 0]), mix))


def test_no_reference_is_left_behind():
    """A leak of one object a call, or one too few, shows after some thousand."""
    import gc
    import sys

    z, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    mixed = (y, y, 0.5)

    def some() -> None:
        for _ in range(2000):
            functional.cross_entropy(z, y).backward()
            functional.cross_entropy(z, mixed, return_components=True)
            with pytest.raises(IndexError):
                functional.cross_entropy(z, y + 2)

    some()
    gc.collect()
    before = [sys.getrefcount(one) for one in (z, y, mixed, None)], len(gc.get_objects())
    some()
    gc.collect()
    after = [sys.getrefcount(one) for one in (z, y, mixed, None)], len(gc.get_objects())
    assert all(abs(a - b) < 100 for a, b in zip(before[0], after[0], strict=True)) and abs(before[1] - after[1]) < 100


@pytest.mark.parametrize("form", FORMS)
def test_under_a_dispatch_mode_the_operators_are_seen(form):
    """Fake tensors have no values, and a tracer would take what was packed out of its sight for a constant."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    logits, target = torch.randn(5, 6), target_of(form, 5, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(functional.cross_entropy(logits, target), FakeTensor)


def test_a_mixing_weight_that_is_a_negated_view():
    mix = torch.tensor([0.2 - 0.3j]).conj().imag
    logits, labels = torch.randn(1, 6), torch.tensor([3])
    assert mix.is_neg()
    expected = functional.cross_entropy(logits, (labels, labels - 1, mix.resolve_neg()))
    assert torch.equal(functional.cross_entropy(logits, (labels, labels - 1, mix)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_is_of_operators(form):
    """Recorded, and run on other tensors: by the JIT's tracer, and by make_fx forward and backward."""
    first, second = ((torch.randn(4, 6), target_of(form, 4, 6)) for _ in range(2))

    def step(z, target):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(z, target), z)[0]

    traced = torch.jit.trace(cross_entropy, first, check_trace=False)
    torch.testing.assert_close(traced(*second), cross_entropy(*second))
    graph = make_fx(step, tracing_mode="real")(*first)
    torch.testing.assert_close(graph(*second), step(*second))
