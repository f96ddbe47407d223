"""The functional form: shapes, arguments and reduction are settled here, then a backend runs."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastsoftloss import backends, ops, reference

_DIVERSITY_INDEX = {name: index for index, name in enumerate(ops.DIVERSITIES)}
_REDUCTION_INDEX = {name: index for index, name in enumerate(ops.REDUCTIONS)}
_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TARGETS = (torch.int64, torch.int32)

_functorch_depth = torch._C._functorch.get_dynamic_layer_stack_depth


def _transformed() -> bool:
    """Inside a function transform, which traces plain operators."""
    return _functorch_depth() > 0


# Dynamo asks while it traces, and guards the depth itself. What torch.compiler.assume_constant_result does, without
# importing Dynamo here, and torch 2.10's does not know the depth.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]

# class indices, class probabilities, or two class indices and the weight of the first
Target = Tensor | tuple[Tensor, Tensor, Tensor | float]


class LossComponents(NamedTuple):
    """``loss`` is differentiable; ``cross_entropy`` (label smoothing included) and ``diversity`` (before its weight) are
    detached and reduced as the loss is, so that loss = cross_entropy + diversity_weight * diversity (+ z-loss)."""

    loss: Tensor
    cross_entropy: Tensor
    diversity: Tensor


def _settle(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    diversity: str | None,
    diversity_weight: float,
    z_loss: float,
    return_components: bool = False,
) -> ops.Options:
    for name, value in (("label_smoothing", label_smoothing), ("diversity_weight", diversity_weight), ("z_loss", z_loss)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index!r}")
    if not isinstance(reduction, str) or reduction not in _REDUCTION_INDEX:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, ops.REDUCTIONS))}, got {reduction!r}")
    if not isinstance(diversity, (str, type(None))) or diversity not in _DIVERSITY_INDEX:
        raise ValueError(f"diversity must be None or one of {', '.join(map(repr, ops.DIVERSITIES[1:]))}, got {diversity!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}")
    if not abs(diversity_weight) < math.inf:
        raise ValueError(f"diversity_weight must be finite, got {diversity_weight!r}")
    if not abs(z_loss) < math.inf:
        raise ValueError(f"z_loss must be finite, got {z_loss!r}")
    if diversity_weight == 0 and not return_components:  # a penalty that nobody sees
        diversity = None
    return ops.Options(
        ignore_index,
        _REDUCTION_INDEX[reduction],
        float(label_smoothing),
        _DIVERSITY_INDEX[diversity],
        float(diversity_weight),
        float(z_loss),
    )


_settled = functools.lru_cache(_settle)


def options_of(*arguments: Any) -> ops.Options:
    """The operators' scalar arguments, from those of :func:`_settle`.

    Raises ValueError for an option that has no meaning, TypeError for one of another type.
    """
    if not torch.compiler.is_compiling():
        try:
            return _settled(*arguments)
        except TypeError:  # cannot be a key, so cannot be an option
            pass
    return _settle(*arguments)


def _check_tensors(logits: Tensor, target: Target, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    if logits.dtype not in _LOGITS:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have a class dimension: (K,), (N, K) or (N, K, d1, ...), got a scalar")
    shape = logits.shape
    rows = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    if isinstance(target, Tensor):
        if target.is_floating_point():
            _check_probabilities(target, logits, rows)
        else:
            _check_indices("target", target, logits, rows)
    else:
        _check_mixed(target, logits, rows)
    if weight is not None:
        classes = shape[1] if len(shape) > 1 else shape[0]
        if weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one for each class, got {tuple(weight.shape)}")
        _check_weight("weight", weight, logits)
    if sample_weight is not None:
        if sample_weight.shape != rows:
            raise ValueError(f"sample_weight must have the shape of target, {tuple(rows)}, got {tuple(sample_weight.shape)}")
        _check_weight("sample_weight", sample_weight, logits)


def _check_indices(name: str, target: Tensor, logits: Tensor, rows: torch.Size) -> None:
    if target.dtype not in _TARGETS:
        raise TypeError(f"{name} must be class indices of int64 or int32, got {target.dtype}")
    if target.shape != rows:
        raise ValueError(f"{name} must have shape {tuple(rows)} for logits of shape {tuple(logits.shape)}, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {target.device}")


def _check_probabilities(target: Tensor, logits: Tensor, rows: torch.Size) -> None:
    if target.dtype not in _LOGITS:
        raise TypeError(f"target as class probabilities must be float32, float64, bfloat16 or float16, got {target.dtype}")
    if target.shape != logits.shape:
        hint = "; class indices must be int64 or int32" if target.shape == rows else ""
        raise ValueError(
            f"target as class probabilities must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}{hint}"
        )
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits, {logits.device}, got {target.device}")


def _check_mixed(target: tuple[Tensor, Tensor, Tensor | float], logits: Tensor, rows: torch.Size) -> None:
    if not isinstance(target, tuple) or len(target) != 3 or not all(isinstance(t, Tensor) for t in target[:2]):
        raise TypeError(
            "target must be a tensor, or a tuple of two tensors of class indices and the weight of the first, "
            f"got {type(target).__name__}{f' of {len(target)}' if isinstance(target, (tuple, list)) else ''}"
        )
    *indices, mix = target
    for i, index in enumerate(indices):
        _check_indices(f"target[{i}]", index, logits, rows)
    if isinstance(mix, Tensor):
        if not mix.is_floating_point():
            raise TypeError(f"target[2], the weight of target[0], must be a number or a floating-point tensor, got {mix.dtype}")
        if mix.shape not in (rows, ()):
            raise ValueError(f"target[2] must be a number or have the shape of target[0], {tuple(rows)}, got {tuple(mix.shape)}")
        if mix.device != logits.device:
            raise ValueError(f"target[2] must be on the device of logits, {logits.device}, got {mix.device}")
    elif not isinstance(mix, (int, float)) and not isinstance(mix, numbers.Real):  # NumPy's are the latter
        raise TypeError(f"target[2], the weight of target[0], must be a number or a floating-point tensor, got {mix!r}")
    elif not 0 <= mix <= 1:
        raise ValueError(f"target[2], the weight of target[0], must be between 0 and 1, got {mix!r}")


def _check_weight(name: str, weight: Tensor, logits: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {weight.dtype}")
    if weight.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {weight.device}")


def _check_target_range(target: Target, classes: int, ignore_index: int, name: str = "target") -> None:
    if isinstance(target, tuple):
        for i, labels in enumerate(target[:2]):
            _check_target_range(labels, classes, ignore_index, f"target[{i}]")
        return
    if target.is_floating_point() or isinstance(target, FakeTensor):  # a fake has no values
        return
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        where = outside.nonzero()[0].tolist()
        index = ", ".join(map(str, where))
        raise IndexError(
            f"{name}[{index}] is {int(target[tuple(where)])}, which is outside [0, {classes}) and is not ignore_index={ignore_index}"
        )


@overload
def cross_entropy(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    diversity: str | None = ...,
    diversity_weight: float = ...,
    z_loss: float = ...,
    sample_weight: Tensor | None = ...,
    return_components: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    diversity: str | None = ...,
    diversity_weight: float = ...,
    z_loss: float = ...,
    sample_weight: Tensor | None = ...,
    return_components: Literal[True],
    backend: str | None = ...,
) -> LossComponents: ...


def cross_entropy(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    diversity: str | None = "logit_variance",
    diversity_weight: float = 1.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Tensor | LossComponents:
    """Cross-entropy plus a penalty on the diversity of the softmax over the non-true classes.

    The penalty is that of "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363. With
    ``diversity=None`` this is :func:`torch.nn.functional.cross_entropy` for index targets, save that a confident row
    keeps its full relative precision, and that the result is float32 for 16-bit logits.

    Args:
        logits: ``(K,)``, ``(N, K)`` or ``(N, K, d1, ...)``, any strides; float32, float64, bfloat16 or float16.
            A logit of -inf takes its class out of the row.
        target: one of

            * class indices, ``()``, ``(N,)`` or ``(N, d1, ...)``; int64 or int32;
            * class probabilities t, in the shape of the logits; float32, float64, bfloat16 or float16. The penalty is the
              expectation over the label, sum_k t_k w_k D_k with D_k over the classes other than k; the mean divides by
              the rows' number (by the summed ``sample_weight``), as PyTorch's does;
            * ``(y_a, y_b, mix)``: class indices twice and the weight of the first, a number in [0, 1] or a tensor, ``()``
              or of y_a's shape: mix * loss(y_a) + (1 - mix) * loss(y_b), as if the row were there twice with those
              sample weights, in the mean's divisor too. Mixup's target, at the price of class indices.
        weight: ``(K,)``, a factor for each class, as in PyTorch.
        ignore_index: rows with this target have a zero loss and a zero gradient, and do not count in the mean. Has no
            meaning for class probabilities.
        reduction: ``"mean"`` (over the summed weights of the rows that count), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1], as in PyTorch; the penalty takes the target as it was given.
        diversity: ``"logit_variance"``, ``"kl"``, ``"reverse_kl"``, ``"chi2"``, ``"variance"`` or ``None``.
        diversity_weight: factor of the penalty.
        z_loss: factor of the squared log-sum-exp of the row.
        sample_weight: the rows' shape; multiplies the row's class weight wherever that stands, in the mean's divisor too,
            so a weight of 2 is the row twice.
        return_components: give :class:`LossComponents` instead of the loss alone, from the same pass.
        backend: ``None`` chooses by device; ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` asks for one.
            The environment variable ``FASTSOFTLOSS_BACKEND``, read at import, overrides both.

    Returns:
        The loss, float32 (float64 for float64 logits): ``()``, or the shape of the rows, that of class indices, for ``reduction="none"``.

    Raises:
        ValueError: a shape, a device or an option that does not fit.
        TypeError: a dtype that is not supported, or an option of the wrong type.
        IndexError: a target outside ``[0, K)`` that is not ``ignore_index`` (CPU tensors; a RuntimeError inside
            ``torch.compile``; on a GPU the row's loss is NaN).
        RuntimeError: a backend that is not available here.
    """
    options = options_of(ignore_index, reduction, label_smoothing, diversity, diversity_weight, z_loss, return_components)
    return apply(logits, target, weight, sample_weight, options, return_components, backend)


def apply(
    logits: Tensor,
    target: Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: ops.Options,
    return_components: bool,
    backend: str | None,
) -> Tensor | LossComponents:
    """:func:`cross_entropy` with its options settled."""
    if backend is None and (quick := backends.quick) is not None and not torch.compiler.is_compiling():
        try:
            result = quick(logits, target, weight, sample_weight, options, return_components, False)
        except RuntimeError:  # what does not fit is told below, in full
            result = None
        if result is not None:
            return LossComponents(result[0], *result[1]) if return_components else result
    index = isinstance(target, Tensor) and not target.is_floating_point()
    if index and target.dtype is torch.uint8:  # type: ignore[union-attr]  # PyTorch takes it too
        target = target.long()  # type: ignore[union-attr]
    form = "index" if index else "mixture" if isinstance(target, tuple) else "probabilities"
    operators = backends.choose(backend, logits.device, form)
    compiling = torch.compiler.is_compiling()
    transformed = _transformed() or ops.forward_mode()
    weighted = weight is not None or sample_weight is not None
    # the CPU's kernel refuses what does not fit: the look for the reason is paid only then
    if (
        not index
        or operators is None
        or operators.rescale is not None
        or compiling
        or transformed
        or weighted
        or type(logits) is not Tensor
        or target.dim() == logits.dim()  # type: ignore[union-attr]  # which the operator takes for a packed mixture
    ):
        _check_tensors(logits, target, weight, sample_weight)
    packed = target
    if not index:
        packed, sample_weight = _pack(target, sample_weight, reference.accumulation_dtype(logits.dtype))
    # the kernels differentiate by the logits alone
    learned = (weighted or not index) and any(t is not None and t.requires_grad for t in (packed, weight, sample_weight))  # type: ignore[union-attr]
    if operators is None or transformed or learned:
        if logits.device.type == "cpu" and not (transformed or compiling):
            _check_target_range(target, logits.shape[min(1, logits.dim() - 1)], options.ignore_index)
        components = LossComponents(*ops.plain(logits, packed, weight, sample_weight, options))  # type: ignore[arg-type]
        return components if return_components else components.loss
    if weight is not None:
        weight = weight.to(reference.accumulation_dtype(logits.dtype)).contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.to(reference.accumulation_dtype(logits.dtype))
    try:
        loss, parts = ops.cross_entropy(operators, logits, packed, weight, sample_weight, options, return_components)  # type: ignore[arg-type]
    except RuntimeError:
        if index:
            _check_tensors(logits, target, weight, sample_weight)
        # the kernel stops at the first target out of range
        _check_target_range(target, logits.shape[min(1, logits.dim() - 1)], options.ignore_index)
        raise
    return loss if parts is None else LossComponents(loss, parts[0], parts[1])


def _pack(target: Target, sample_weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A target that is more than one label, as the operators take it, and what sample_weight becomes."""
    if isinstance(target, tuple):
        return reference.pack_mixture(target, sample_weight, dtype)
    # 16 bits are read as they are, but not in double's arithmetic
    return target.to(dtype) if torch.float64 in (dtype, target.dtype) else target, sample_weight
