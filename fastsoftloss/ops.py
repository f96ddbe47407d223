"""The registered operators: one forward, one backward, each with a schema, a fake and an autograd formula.

A backend is a pair of operators with the same schema, so that compile, export and autograd know them all alike; it may
have a third, the backward's own.
Eager calls go through :class:`_CrossEntropy`, a plain autograd Function over the same operators, since
``torch.library``'s generated one costs more time than the kernel at small batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsoftloss import reference

DIVERSITIES = (None, "logit_variance", "kl", "reverse_kl", "chi2", "variance")  # the order of csrc/row_loss.h
REDUCTIONS = ("none", "mean", "sum")
FORMS = ("index", "mixture", "probabilities")  # of a target, as form_of tells them
form_of = reference.form_of

_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, int ignore_index, int reduction, "
    "float label_smoothing, int diversity, float diversity_weight, float z_loss"
)
# target: class indices of the rows' shape, or class probabilities of the logits', or a mixture as reference.pack_mixture
# gives it, with its sample_weight. loss: () or the rows' shape; parts: (2, *loss.shape), cross-entropy and diversity,
# or (0,); dlogits: for an upstream gradient of 1, or (0,); moments: what the backend's own backward wants to find again,
# or (0,)
_FORWARD = f"({_ARGUMENTS}, bool parts, bool gradient) -> (Tensor loss, Tensor parts, Tensor dlogits, Tensor moments)"
_BACKWARD = f"(Tensor upstream, Tensor moments, {_ARGUMENTS}) -> Tensor dlogits"
# grad: of the backward's dlogits, v. dupstream: <dL/dz, v>; dlogits: H v, times upstream
_DOUBLE_BACKWARD = f"(Tensor grad, Tensor upstream, {_ARGUMENTS}) -> (Tensor dupstream, Tensor dlogits)"

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor

_library = torch.library.Library("fastsoftloss", "DEF")  # type: ignore[no-untyped-call]


class Options(NamedTuple):
    """The operators' scalar arguments, in the order of the schema."""

    ignore_index: int
    reduction: int
    label_smoothing: float
    diversity: int
    diversity_weight: float
    z_loss: float


class Operators(NamedTuple):
    """A backend's forward and backward, and how it takes over a gradient that the forward has already written.

    ``rescale(dlogits, upstream, moments, *inputs)`` turns the gradient for an upstream of 1 into the one for
    ``upstream``, in place, or returns None where only the backward can do so without rounding twice. A backend without
    it has its upstream in host memory, where looking costs nothing, and kernels that refuse arguments which do not fit.
    """

    forward: Any
    backward: Any
    rescale: Callable[..., Tensor | None] | None
    forms: tuple[str, ...] = ("index",)  # that its kernels take; the others go to the reference
    double_backward: Any = None  # of class indices and mixtures, or None where plain PyTorch differentiates
    # :func:`cross_entropy` of plain tensors in C++, with the operators written in; None for what it does not take
    eager: Callable[..., Any] | None = None

    def twice(self, logits: Tensor, target: Tensor) -> bool:
        """Is there a kernel for the second derivative?"""
        return self.double_backward is not None and form_of(logits, target) != "probabilities"


def rows_of(logits: Tensor) -> torch.Size:
    """The shape of the rows, which is that of class indices."""
    shape = logits.shape
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def plain(
    logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, by the operators' arguments: loss, cross-entropy, diversity."""
    return reference.cross_entropy(
        logits,
        target,
        weight,
        options.ignore_index,
        REDUCTIONS[options.reduction],
        options.label_smoothing,
        diversity=DIVERSITIES[options.diversity],
        diversity_weight=options.diversity_weight,
        z_loss=options.z_loss,
        sample_weight=sample_weight,
    )


def _check_devices(*tensors: Tensor | None) -> None:
    """One meta tensor among others is enough for a fake to be called, and its result must not pass for a real one."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def _leaf(t: Tensor) -> Tensor:
    # a view: differentiating by the caller's own tensor would run its hooks once more
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _plain_gradient(upstream: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The gradient by plain PyTorch; itself differentiable where gradients are on, and in forward mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        z = _leaf(logits)
        (dlogits,) = torch.autograd.grad(plain(z, *inputs)[0], z, upstream, create_graph=again)
    return dlogits


def forward_mode() -> bool:
    """Inside forward-mode AD, whose tangents, of an upstream gradient too, the operators would drop. Dynamo guards what it reads here."""
    return forward_ad._current_level >= 0


def _gradient_in_forward_mode(backward: Any, upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The gradient with the tangent that ``upstream`` gives it."""
    if not _is_wrapped(upstream):
        return _plain_gradient(upstream, logits, *inputs)
    # a function transform does not record what the plain way differentiates, but the gradient is linear in upstream
    one = torch.ones(upstream.shape, dtype=upstream.dtype, device=upstream.device)
    with torch._C._AutoDispatchBelowAutograd():
        dlogits: Tensor = backward(one, moments, logits, *inputs[:3], *inputs[3])
    return (dlogits.to(upstream.dtype) * _over_classes(upstream, logits)).to(logits.dtype)


def cpu_gradient_in_forward_mode(
    upstream: Tensor, moments: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, *options: Any
) -> Tensor:
    """The same by the arguments of the CPU's operator, for csrc/autograd.cpp."""
    backward = torch.ops.fastsoftloss.cross_entropy_backward.default
    return _gradient_in_forward_mode(backward, upstream, moments, logits, target, weight, sample_weight, Options(*options))


def _over_classes(upstream: Tensor, logits: Tensor) -> Tensor:
    """Of one value, or one a row, what multiplies logits."""
    return upstream if upstream.dim() == 0 or logits.dim() == 1 else upstream.unsqueeze(1)


def _plain_double_backward(grad: Tensor, upstream: Tensor, logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The same once more; itself differentiable where gradients are on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        g, z = _leaf(upstream), _leaf(logits)
        return torch.autograd.grad(_plain_gradient(g, z, *inputs), (g, z), grad, create_graph=again)


def _is_plain(upstream: Tensor) -> bool:
    """Not a batch of gradients, nor a fake, nor traced: with those only the backward knows what to do."""
    traced = torch._C._len_torch_dispatch_stack() > 0
    return type(upstream) is Tensor and not traced and not _is_wrapped(upstream) and not _is_batched(upstream)


def _rescale_on_host(dlogits: Tensor, upstream: Tensor) -> Tensor | None:
    """:attr:`Operators.rescale` where reading ``upstream`` costs nothing."""
    if not _is_plain(upstream):
        return None
    if upstream.dim() == 0:
        factor = upstream.item()
        if factor == 1:
            return dlogits
        finite = math.isfinite(factor)
    else:
        finite = bool(upstream.isfinite().all())
    # not finite: an ignored row's gradient is 0, and 0 * NaN is not. 16 bits: a second rounding, and in float16 an
    # underflow that loss scaling is there to avoid
    if not finite or dlogits.element_size() < 4:
        return None
    return dlogits.mul_(_over_classes(upstream, dlogits))


def _no_moments(logits: Tensor, target: Tensor, reduction: int, gradient: bool) -> tuple[int, bool]:
    return 0, gradient


def define(
    name: str,
    rescale: Callable[..., Tensor | None] | None = None,
    outputs: Callable[[Tensor, Tensor, int, bool], tuple[int, bool]] = _no_moments,
    forms: tuple[str, ...] = ("index",),
    double_backward: Any = None,
) -> Operators:
    """Define ``fastsoftloss::{name}`` and ``fastsoftloss::{name}_backward``; their kernels are registered beside them.

    ``outputs(logits, target, reduction, gradient)`` gives the size of ``moments``, and whether the forward writes the gradient.
    ``double_backward``: the operator of the second derivative, as :func:`define_double_backward` gives it.
    """
    _library.define(f"{name}{_FORWARD}")  # type: ignore[no-untyped-call]
    _library.define(f"{name}_backward{_BACKWARD}")  # type: ignore[no-untyped-call]
    forward = getattr(torch.ops.fastsoftloss, name).default
    backward = getattr(torch.ops.fastsoftloss, f"{name}_backward").default

    def fake_forward(logits, target, weight, sample_weight, ignore_index, reduction, *rest):  # type: ignore[no-untyped-def]
        *_, parts, gradient = rest
        _check_devices(logits, target, weight, sample_weight)
        dtype = reference.accumulation_dtype(logits.dtype)
        shape = rows_of(logits) if REDUCTIONS[reduction] == "none" else ()
        size, fused = outputs(logits, target, reduction, gradient)
        return (
            logits.new_empty(shape, dtype=dtype),
            logits.new_empty((2, *shape) if parts else 0, dtype=dtype),
            torch.empty_like(logits) if fused else logits.new_empty(0),
            logits.new_empty(size, dtype=dtype),
        )

    def fake_backward(upstream, moments, logits, target, weight, sample_weight, *_):  # type: ignore[no-untyped-def]
        _check_devices(upstream, moments, logits, target, weight, sample_weight)
        return torch.empty_like(logits)

    torch.library.register_fake(f"fastsoftloss::{name}", fake_forward, lib=_library)
    torch.library.register_fake(f"fastsoftloss::{name}_backward", fake_backward, lib=_library)

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:4], output[3])
        ctx.options = inputs[4:10]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def forward_gradient(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * 12
        *inputs, moments = ctx.saved_tensors
        if forward_mode():
            return _gradient_in_forward_mode(backward, upstream, moments, *inputs, Options(*ctx.options)), *(None,) * 11
        return backward(upstream, moments, *inputs, *ctx.options), *(None,) * 11

    def save_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
        upstream, _, *tensors = inputs[:6]
        ctx.save_for_backward(upstream, *tensors)
        ctx.options = Options(*inputs[6:])

    def backward_gradient(ctx, grad):  # type: ignore[no-untyped-def]
        upstream, logits, target, *weights = ctx.saved_tensors
        if operators.twice(logits, target) and not forward_mode():
            dupstream, dz = operators.double_backward(grad, upstream, logits, target, *weights, *ctx.options)
        else:
            dupstream, dz = _plain_double_backward(grad, upstream, logits, target, *weights, ctx.options)
        return dupstream, None, dz, *(None,) * 9

    torch.library.register_autograd(f"fastsoftloss::{name}", forward_gradient, setup_context=save, lib=_library)
    torch.library.register_autograd(f"fastsoftloss::{name}_backward", backward_gradient, setup_context=save_backward, lib=_library)
    operators = Operators(forward, backward, rescale, forms, double_backward)
    return operators


def define_double_backward(name: str) -> Any:
    """Define ``fastsoftloss::{name}_double_backward``, the derivative of ``fastsoftloss::{name}_backward``."""
    _library.define(f"{name}_double_backward{_DOUBLE_BACKWARD}")  # type: ignore[no-untyped-call]

    def fake(grad, upstream, logits, target, weight, sample_weight, *_):  # type: ignore[no-untyped-def]
        _check_devices(grad, upstream, logits, target, weight, sample_weight)
        return upstream.new_empty(upstream.shape), torch.empty_like(logits)

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:6])
        ctx.options = Options(*inputs[6:])

    def third(ctx, *grads):  # type: ignore[no-untyped-def]
        v, upstream, logits, *inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = _leaf(v), _leaf(upstream), _leaf(logits)
            second = _plain_double_backward(*leaves, *inputs, ctx.options)
            return *torch.autograd.grad(second, leaves, grads, create_graph=again), *(None,) * 9

    torch.library.register_fake(f"fastsoftloss::{name}_double_backward", fake, lib=_library)
    torch.library.register_autograd(f"fastsoftloss::{name}_double_backward", third, setup_context=save, lib=_library)
    return getattr(torch.ops.fastsoftloss, f"{name}_double_backward").default


def define_rescale(name: str) -> None:
    """Define ``fastsoftloss::{name}_rescale``, a backend's own kernel behind :attr:`Operators.rescale`."""
    _library.define(f"{name}_rescale(Tensor(a!) dlogits, Tensor upstream, Tensor moments, {_ARGUMENTS}) -> ()")  # type: ignore[no-untyped-call]

    def fake(dlogits, *inputs):  # type: ignore[no-untyped-def]
        _check_devices(dlogits, *inputs[:6])

    torch.library.register_fake(f"fastsoftloss::{name}_rescale", fake, lib=_library)


def implement(name: str, kernel: Callable[..., Any], devices: Sequence[str]) -> None:
    """Register a kernel written in Python for ``fastsoftloss::{name}``."""
    for device in devices:
        _library.impl(name, kernel, device)  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """The eager path: the forward writes the gradient for an upstream of 1, the first backward hands it over."""

    @staticmethod
    def forward(ctx, logits, target, weight, sample_weight, operators, options, parts):  # type: ignore[no-untyped-def]
        # float16 is trained with loss scaling, under which a gradient written now would underflow and be written again
        gradient = logits.dtype is not torch.float16
        with torch._C._AutoDispatchBelowAutograd():
            loss, components, dlogits, moments = operators.forward(logits, target, weight, sample_weight, *options, parts, gradient)
        ctx.save_for_backward(logits, target, weight, sample_weight, moments)
        ctx.operators, ctx.options = operators, options
        if gradient:
            ctx.dlogits = dlogits
        if not parts:
            return loss
        ctx.mark_non_differentiable(components)
        ctx.set_materialize_grads(False)
        return loss, components

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * 7
        operators = ctx.operators
        if forward_mode():
            *inputs, moments = ctx.saved_tensors
            return _gradient_in_forward_mode(operators.backward, upstream, moments, *inputs, ctx.options), *(None,) * 6
        if torch.is_grad_enabled():
            *inputs, moments = ctx.saved_tensors
            if operators.twice(*inputs[:2]):  # through autograd, which records it
                return operators.backward(upstream, moments, *inputs, *ctx.options), *(None,) * 6
            return _plain_gradient(upstream, *inputs, ctx.options), *(None,) * 6
        dlogits = ctx.__dict__.pop("dlogits", None)  # handed over once: autograd may write into it from now on
        if dlogits is not None and operators.rescale is None:
            dlogits = _rescale_on_host(dlogits, upstream)
            if dlogits is not None:
                return dlogits, None, None, None, None, None, None
        *inputs, moments = ctx.saved_tensors
        if dlogits is not None:
            dlogits = operators.rescale(dlogits, upstream, moments, *inputs, *ctx.options) if _is_plain(upstream) else None
        if dlogits is None:
            with torch._C._AutoDispatchBelowAutograd():
                dlogits = operators.backward(upstream, moments, *inputs, *ctx.options)
        return dlogits, None, None, None, None, None, None


# Function.apply without what it does for function transforms, which do not come here
_apply = super(torch.autograd.Function, _CrossEntropy).apply


def cross_entropy(
    operators: Operators,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its parts where asked for. Arguments are taken as checked."""
    if torch.compiler.is_compiling():  # its own machinery differentiates the operator by its registered formula
        loss, components, _, _ = operators.forward(logits, target, weight, sample_weight, *options, parts, False)
        return loss, components if parts else None
    if operators.eager is not None:
        result = operators.eager(logits, target, weight, sample_weight, options, parts, True)
        if result is not None:
            return result if parts else (result, None)
    if logits.requires_grad and torch.is_grad_enabled():
        result = _apply(logits, target, weight, sample_weight, operators, options, parts)  # type: ignore[no-untyped-call]
        return result if parts else (result, None)
    with torch._C._AutoDispatchBelowAutograd():
        loss, components, _, _ = operators.forward(logits, target, weight, sample_weight, *options, parts, False)
    return loss, components if parts else None
