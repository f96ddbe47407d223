"""The Triton backend's host side: tensors in, launches out. No host synchronisation; at most two launches forward, one backward."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastsoftloss import ops, reference
from fastsoftloss import triton_finish as finish
from fastsoftloss import triton_kernels as kernels
from fastsoftloss import triton_rows as long
from fastsoftloss.triton_hessian import hessian
from fastsoftloss.triton_plan import (
    MAX_ROW_DIMS,
    ROWS,
    HessianPlan,
    Plan,
    SoftPlan,
    chunks_at_a_time,
    hessian_plan,
    outputs,
    plan,
    soft_plan,
)
from fastsoftloss.triton_soft import soft

_NONE, _MEAN, _SUM = (ops.REDUCTIONS.index(name) for name in ("none", "mean", "sum"))
_LIMIT_INT32 = 2**31


def runs_on_cpu() -> bool:
    """Whether CPU tensors can be served: in Triton's interpreter, or behind a driver that takes them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    try:
        return bool(triton.runtime.driver.active.get_active_torch_device().type == "cpu")
    except Exception:
        return False


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # on a CPU few, so that programs have more than one tile there too
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _compiled(chosen: Plan | SoftPlan | HessianPlan) -> dict[str, int | None]:
    """How a plan's kernel is compiled; AMD's compiler takes no limit of registers."""
    return {"num_warps": chosen.warps} | ({} if torch.version.hip else {"maxnreg": chosen.registers})


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def collapse(sizes: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Join neighbouring dimensions where every one of ``strides`` allows: (sizes, strides of each)."""
    joined: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if joined and all(k[-1] == s[i] * size for k, s in zip(kept, strides, strict=True)):
            joined[-1] *= size
            for k, s in zip(kept, strides, strict=True):
                k[-1] = s[i]
        else:
            joined.append(size)
            for k, s in zip(kept, strides, strict=True):
                k.append(s[i])
    return joined or [1], [k or [0] for k in kept]


class _Rows:
    """Logits as rows of classes: sizes and strides of the row dimensions, and what the kernels want to know of them.

    Strides are those of the logits, of the gradient and, where they are given, of class probabilities.
    """

    def __init__(self, logits: Tensor, gradient: Tensor | None, probabilities: Tensor | None = None) -> None:
        k = min(1, logits.dim() - 1)  # the class dimension
        operands = (logits, logits if gradient is None else gradient) + (() if probabilities is None else (probabilities,))
        strides = [t.stride() for t in operands]
        self.classes = logits.shape[k]
        self.class_strides = [s[k] if self.classes > 1 else 1 for s in strides]
        self.sizes, self.strides = collapse(*((*s[:k], *s[k + 1 :]) for s in (logits.shape, *strides)))
        self.rows = 1
        for size in self.sizes:
            self.rows *= size
        self.same = self.class_strides[0] == self.class_strides[1] and self.strides[0] == self.strides[1]
        pointers = (logits,) if gradient is None else (logits, gradient)
        self.aligned = all(t.data_ptr() % 16 == 0 for t in pointers)
        self.row_strides = self.strides[0] if self.rows > 1 else [self.classes]

    def plan(self, logits: Tensor, gradient: bool = False, kept: bool = False, labels: int = 1) -> Plan:
        return plan(
            self.rows,
            self.classes,
            self.class_strides[0],
            self.row_strides,
            logits.element_size(),
            self.aligned,
            _multiprocessors(logits.device),
            gradient,
            kept,
            self.same,
            labels,
        )

    def arguments(self, names: str) -> dict[str, int]:
        """Sizes and strides as the kernels name them: s of the logits, t of the gradient, u of class probabilities."""
        absent = MAX_ROW_DIMS - len(self.sizes)  # leading dimensions, of size 1
        out = {f"n{i}": n for i, n in enumerate([1] * absent + self.sizes) if i > 0}
        for name, strides, class_stride in zip(names, self.strides, self.class_strides, strict=False):
            out |= {f"{name}{i}": s for i, s in enumerate([0] * absent + strides)}
            out[f"{name}c"] = class_stride
        return out

    @property
    def wide(self) -> bool:
        """Whether a class offset needs 64 bits."""
        return self.classes * max(self.class_strides) >= _LIMIT_INT32


def _flat(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor of target's shape as one dimension and its stride; a copy only where no one stride describes it."""
    if t is None:
        return None, 0
    t = t.reshape(-1)
    return t, t.stride(0)


class _Call(NamedTuple):
    """What the operators have in common, in the order of the schema."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    diversity: int
    diversity_weight: float
    z_loss: float

    @property
    def form(self) -> str:
        return ops.form_of(self.logits, self.target)

    def _pair(self, t: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
        """What ``t`` has for each row's label, for its other one in a mixture, and the stride of both."""
        first, other = (t, None) if t is None or self.form != "mixture" else t.unbind()
        flat, stride = _flat(first)
        return flat, _flat(other)[0], stride

    def labels(self) -> dict[str, Any]:
        target, other, stride = self._pair(self.target)
        weight = self.weight if self.logits.numel() else None
        return {"target_ptr": target, "other_ptr": other, "target_stride": stride, "weight_ptr": weight, "ignore_index": self.ignore_index}

    def samples(self) -> dict[str, Any]:
        sample_weight, other, stride = self._pair(self.sample_weight)
        return {"sample_ptr": sample_weight, "other_sample_ptr": other, "sample_stride": stride}

    def values(self) -> dict[str, Any]:
        """The options of ``_finish``."""
        return {
            "smoothing": self.label_smoothing,
            "diversity_weight": self.diversity_weight,
            "z_loss": self.z_loss,
            "Z_LOSS": self.z_loss != 0,
            "REDUCTION": self.reduction,
        }

    def kinds(self) -> dict[str, Any]:
        smooth = self.label_smoothing != 0 and self.logits.numel() > 0  # shared among K classes, and there may be none
        return {"KIND": self.diversity, "SMOOTH": smooth}


def _share_count(rows: int) -> int:
    """Programs that sum the mean's divisor: a power of 2, few enough for every program to read them all."""
    return 1 << max(0, min(8, (rows // 4096).bit_length()))


def _above(upstream: Tensor) -> dict[str, Any]:
    """The gradient from above: a scalar is one for all rows."""
    flat, stride = _flat(upstream)
    return {"upstream_ptr": flat, "upstream_stride": 0 if upstream.dim() == 0 else stride}


def _resident(
    call: _Call, rows: _Rows, chosen: Plan, gradient: Tensor | None, above: dict[str, Any], rescale: bool = False, **pointers: Tensor | None
) -> None:
    """Launch the kernel for rows that fit; ``pointers`` are those of its outputs that are wanted."""
    shares = pointers.get("shares_ptr")
    outputs = {f"{name}_ptr": None for name in ("loss", "parts", "partials", "divisor", "shares", "counter")} | pointers
    own: dict[str, Any]
    if chosen.access == ROWS:
        kernel = long.resident_rows
        own = {"saved_ptr": None, "SAME": rows.same, "START": chosen.start, "ALIGN": chosen.align, "L": chosen.b, "V": chosen.vector}
    else:
        kernel = kernels.resident
        own = {"ACCESS": chosen.access, "WIDE": rows.wide, "B": chosen.b, "P": chosen.run}
    kernel[(chosen.programs,)](
        z_ptr=call.logits, g_ptr=gradient, rows=rows.rows, K=rows.classes, DIMS=len(rows.sizes), **rows.arguments("st"),
        **call.labels(), **call.samples(), **call.values(), **call.kinds(), **above, **(own | outputs),
        RESCALE=rescale, SHARES=1 if shares is None else shares.numel(),
        UPSTREAM_ROWS=above["upstream_stride"] != 0, A=chosen.a, R=chosen.r, COPIES=max(1, 32 * chosen.warps // chosen.r),
        **_compiled(chosen),
    )  # fmt: skip


_NOTHING_ABOVE: dict[str, Any] = {"upstream_ptr": None, "upstream_stride": 0}


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fastsoftloss::triton_cross_entropy``; see ``ops`` for its arguments."""
    *common, parts, gradient = inputs
    call = _Call(*common)
    logits, target, reduction = call.logits, call.target, call.reduction
    dtype = reference.accumulation_dtype(logits.dtype)
    rows_shape = ops.rows_of(logits)
    shape = rows_shape if reduction == _NONE else torch.Size()
    moments_size, gradient = outputs(logits, target, reduction, gradient)
    nothing = logits.new_empty(0, dtype=dtype)
    loss = logits.new_empty(shape, dtype=dtype)
    components = logits.new_empty((2, *shape), dtype=dtype) if parts else nothing
    dlogits = torch.empty_like(logits) if gradient else logits.new_empty(0)
    moments = logits.new_empty(moments_size, dtype=dtype)
    result = loss, components, dlogits, moments
    if rows_shape.numel() == 0 or (call.form == "probabilities" and logits.numel() == 0):
        for t in (loss, components, moments):
            t.fill_(float("nan") if reduction == _MEAN else 0.0)
        return result

    call, rows, chosen, dz = _prepare(call, dlogits if gradient else None)
    with _on(logits.device):
        _forward(call, rows, chosen, dz, moments, {"loss_ptr": loss, "parts_ptr": components if parts else None})
    if dz is not None and dz is not dlogits:
        dlogits.copy_(dz)
    return result


def _forward(call: _Call, rows: _Rows, chosen: Plan | SoftPlan, dz: Tensor | None, moments: Tensor, pointers: dict[str, Any]) -> None:
    if isinstance(chosen, SoftPlan):
        launch = functools.partial(_soft, call, rows, chosen, dz, _NOTHING_ABOVE)
    elif not chosen.resident:
        _long_forward(call, rows, chosen, moments, pointers)
        return
    else:
        if chosen.keeps and moments.numel() > 1:
            pointers["saved_ptr"] = moments[1:]
        launch = functools.partial(_resident, call, rows, chosen, dz, _NOTHING_ABOVE)
    if call.reduction == _NONE:
        launch(**pointers)
        return
    pointers["partials_ptr"] = partials = moments.new_empty(4 * chosen.programs)
    if call.reduction == _MEAN and dz is not None:
        # the divisor comes first, since every gradient wants it; then the last program to finish sums the loss
        shares, counter = _shares(call, rows)
        launch(divisor_ptr=moments, shares_ptr=shares, counter_ptr=counter, **pointers)
        return
    launch(**pointers)
    divisor = moments if call.reduction == _MEAN else None
    finish.total[(1,)](
        partials, divisor, pointers["loss_ptr"], pointers["parts_ptr"], chosen.programs, REDUCTION=call.reduction, BLOCK=1024, num_warps=4
    )


def _shares(call: _Call, rows: _Rows) -> tuple[Tensor, Tensor]:
    """What the mean divides by, in a few parts, and a counter of programs at 0."""
    dtype = reference.accumulation_dtype(call.logits.dtype)
    if call.form == "probabilities":
        every = call.logits.new_full((1,), rows.rows, dtype=dtype) if call.sample_weight is None else call.sample_weight.sum().view(1)
        return every, torch.zeros(1, dtype=torch.int32, device=call.logits.device)
    shares = call.logits.new_empty(_share_count(rows.rows), dtype=dtype)
    counter = torch.empty(1, dtype=torch.int32, device=call.logits.device)
    finish.divisors[(shares.numel(),)](
        out_ptr=shares, counter_ptr=counter, rows=rows.rows, K=rows.classes, **call.labels(), **call.samples(), BLOCK=1024, num_warps=4
    )
    return shares, counter


def _long_forward(call: _Call, rows: _Rows, chosen: Plan, moments: Tensor, pointers: dict[str, Tensor | None]) -> None:
    partial = moments.new_empty(9 * rows.rows * chosen.splits)
    place: dict[str, Any] = rows.arguments("s") | {"rows": rows.rows, "K": rows.classes, "DIMS": len(rows.sizes), "splits": chosen.splits}
    long.long_reduce[(chosen.programs,)](
        z_ptr=call.logits, moments_ptr=partial, chunks=chosen.a, **place, **call.labels(), **call.kinds(),
        START=chosen.start, ALIGN=chosen.align, L=chosen.b, V=chosen.vector, TILE=chunks_at_a_time(call.logits.element_size()), BLOCK=32,
        **_compiled(chosen),
    )  # fmt: skip
    width = triton.next_power_of_2(chosen.splits)
    block = max(1, (256 if call.form == "mixture" else 512) // width)  # rows; more labels would spill
    long.long_finish[(-(-rows.rows // block) if call.reduction == _NONE else 1,)](
        z_ptr=call.logits, moments_ptr=partial, divisor_ptr=moments, saved_ptr=moments[1:], **pointers, **place,
        **call.labels(), **call.samples(), **call.values(), **call.kinds(), R=block, SPLITS=width, num_warps=4,
    )  # fmt: skip


def _soft(
    call: _Call,
    rows: _Rows,
    chosen: SoftPlan,
    gradient: Tensor | None,
    above: dict[str, Any],
    rescale: bool = False,
    **pointers: Tensor | None,
) -> None:
    """``_resident`` for class probabilities."""
    shares = pointers.get("shares_ptr")
    outputs = {f"{name}_ptr": None for name in ("loss", "parts", "partials", "divisor", "shares", "counter")} | pointers
    sample_weight, stride = _flat(call.sample_weight)
    soft[(chosen.programs,)](
        z_ptr=call.logits, g_ptr=gradient, target_ptr=call.target, weight_ptr=call.weight, sample_ptr=sample_weight, sample_stride=stride,
        rows=rows.rows, classes=rows.classes, K=rows.classes, DIMS=len(rows.sizes), **rows.arguments("stu"),
        **call.values(), **call.kinds(), **above, **outputs,
        RESCALE=rescale, SHARES=1 if shares is None else shares.numel(),
        UPSTREAM_ROWS=above["upstream_stride"] != 0, A=chosen.a, R=chosen.r, L=chosen.b, V=chosen.vector, **_compiled(chosen),
    )  # fmt: skip


def _prepare(call: _Call, dlogits: Tensor | None) -> tuple[_Call, _Rows, Plan | SoftPlan, Tensor | None]:
    """The call as rows that the kernels can walk, the plan for them, and where the gradient is written: ``dlogits``, or a
    contiguous copy, as of all else, where more row dimensions are left than the kernels unfold."""
    probabilities = call.target if call.form == "probabilities" else None
    if call.logits.dim() > MAX_ROW_DIMS + 1:
        # the same decision whether the gradient is wanted or not: the backward finds what the forward has kept
        like = torch.empty_like(call.logits, device="meta") if dlogits is None else dlogits
        if len(_Rows(call.logits, like, probabilities).sizes) > MAX_ROW_DIMS:
            dlogits = None if dlogits is None else dlogits.contiguous()
            call = call._replace(logits=call.logits.contiguous())
            if probabilities is not None:
                probabilities = probabilities.contiguous()
                call = call._replace(target=probabilities)
    rows = _Rows(call.logits, dlogits, probabilities)
    if probabilities is None:
        return call, rows, rows.plan(call.logits, dlogits is not None, labels=2 if call.form == "mixture" else 1), dlogits
    strides = rows.strides if rows.rows > 1 else []
    itemsize, multiprocessors = call.logits.element_size(), _multiprocessors(call.logits.device)
    chosen = soft_plan(rows.rows, rows.classes, rows.class_strides, strides, itemsize, multiprocessors, call.diversity)
    return call, rows, chosen, dlogits


def _gradient(dlogits: Tensor, upstream: Tensor, moments: Tensor, inputs: Sequence[Any], rescale: bool) -> Tensor:
    call = _Call(*inputs)
    if call.target.numel() == 0 or call.logits.numel() == 0:
        return dlogits
    call, rows, chosen, dz = _prepare(call, dlogits)
    assert dz is not None
    with _on(dlogits.device):
        _backward(call, rows, chosen, dz, upstream, moments, rescale)
    return dlogits if dz is dlogits else dlogits.copy_(dz)


def _backward(call: _Call, rows: _Rows, chosen: Plan | SoftPlan, dz: Tensor, upstream: Tensor, moments: Tensor, rescale: bool) -> None:
    divisor = moments if call.reduction == _MEAN else None
    if isinstance(chosen, SoftPlan):
        _soft(call, rows, chosen, dz, _above(upstream), rescale, divisor_ptr=divisor)
        return
    if not chosen.keeps or moments.numel() <= 1:
        _resident(call, rows, chosen, dz, _above(upstream), rescale, divisor_ptr=divisor)
        return
    chosen = rows.plan(call.logits, gradient=True, kept=True)
    long.spread_rows[(chosen.programs,)](
        z_ptr=call.logits, g_ptr=dz, divisor_ptr=moments, saved_ptr=moments[1:], rows=rows.rows, K=rows.classes,
        splits=chosen.splits, chunks=chosen.a, smoothing=call.label_smoothing, REDUCTION=call.reduction,
        DIMS=len(rows.sizes), **rows.arguments("st"), **call.labels(), **call.samples(), **call.kinds(), **_above(upstream),
        SAME=rows.same, START=chosen.start, ALIGN=chosen.align, R=chosen.r, L=chosen.b, V=chosen.vector,
        TILE=chunks_at_a_time(call.logits.element_size()), **_compiled(chosen),
    )  # fmt: skip


def backward(upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The operator ``fastsoftloss::triton_cross_entropy_backward``: the gradient for ``upstream``, () or target's shape."""
    return _gradient(torch.empty_like(logits), upstream, moments, (logits, *inputs), rescale=False)


def rescale(dlogits: Tensor, upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor | None:
    """Make the forward's gradient that for ``upstream``, in place; on the device, nothing is done where that is 1.

    Written anew from the logits, which costs what a product in place would and rounds once. None where the forward
    has left no gradient.
    """
    if dlogits.shape != logits.shape:
        return None
    return _gradient(dlogits, upstream, moments, (logits, *inputs), rescale=True)


def double_backward(grad: Tensor, upstream: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The operator ``fastsoftloss::triton_cross_entropy_double_backward``: (<dL/dz, v>, H v times ``upstream``), v = ``grad``.

    Raises RuntimeError where ``grad`` has not the shape and dtype of the logits or ``upstream`` not the shape of the loss, and for
    class probabilities.
    """
    call = _Call(*inputs)
    logits = call.logits
    shape = ops.rows_of(logits) if call.reduction == _NONE else torch.Size()
    dtype = reference.accumulation_dtype(logits.dtype)
    if grad.shape != logits.shape or grad.dtype != logits.dtype:
        raise RuntimeError("the gradient of dlogits must have the shape, the dtype and the device of logits")
    if upstream.shape != shape or upstream.dtype != dtype:
        raise RuntimeError("the upstream gradient must have the shape and the dtype of the loss")
    if call.form == "probabilities":
        raise RuntimeError("class probabilities have no fused second derivative")
    dlogits = torch.empty_like(logits)
    slope = logits.new_empty(shape, dtype=dtype)
    if logits.numel() == 0:
        return slope.zero_(), dlogits
    rows, dz = _Rows(logits, dlogits, grad), dlogits
    if len(rows.sizes) > MAX_ROW_DIMS:  # as in _prepare
        call, dz, grad = call._replace(logits=logits.contiguous()), dlogits.contiguous(), grad.contiguous()
        rows = _Rows(call.logits, dz, grad)
    with _on(logits.device):
        _hessian(call, rows, grad, upstream, slope, dz)
    return slope, dlogits if dz is dlogits else dlogits.copy_(dz)


def _hessian(call: _Call, rows: _Rows, grad: Tensor, upstream: Tensor, slope: Tensor, dz: Tensor) -> None:
    contiguous = call.logits.is_contiguous() and dz.is_contiguous() and grad.is_contiguous() and rows.class_strides[0] == 1
    aligned = rows.aligned and grad.data_ptr() % 16 == 0
    multiprocessors, labels = _multiprocessors(call.logits.device), 2 if call.form == "mixture" else 1
    chosen = hessian_plan(rows.rows, rows.classes, contiguous and aligned, call.logits.element_size(), multiprocessors, labels)
    if call.diversity_weight == 0:
        call = call._replace(diversity=0)
    shares, counter = _shares(call, rows) if call.reduction == _MEAN else (None, None)
    partials = None if call.reduction == _NONE else slope.new_empty(2 * chosen.programs)
    hessian[(chosen.programs,)](
        z_ptr=call.logits, g_ptr=dz, v_ptr=grad, slope_ptr=slope, partials_ptr=partials, shares_ptr=shares, counter_ptr=counter,
        rows=rows.rows, classes=rows.classes, K=rows.classes, DIMS=len(rows.sizes), **rows.arguments("stu"),
        **call.labels(), **call.samples(), **call.values(), **call.kinds(), **_above(upstream),
        SHARES=1 if shares is None else shares.numel(), A=chosen.a, R=chosen.r, B=chosen.b, P=chosen.run,
        COPIES=max(1, 32 * chosen.warps // chosen.r), **_compiled(chosen),
    )  # fmt: skip
    if call.reduction == _SUM:
        finish.total[(1,)](partials, None, slope, None, chosen.programs, REDUCTION=_SUM, BLOCK=1024, num_warps=4)
