"""The Triton backend's host side: tensors in, launches out. No host synchronisation; at most two launches forward, one backward."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastsoftloss import ops, reference
from fastsoftloss import triton_kernels as kernels
from fastsoftloss.triton_plan import MAX_ROW_DIMS, Plan, outputs, plan

_NONE, _MEAN = (ops.REDUCTIONS.index(name) for name in ("none", "mean"))
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
    """Logits as rows of classes: sizes and strides of the row dimensions, and what the kernels want to know of them."""

    def __init__(self, logits: Tensor, gradient: Tensor | None) -> None:
        def split(t: Tensor) -> tuple[int, list[int]]:
            stride = list(t.stride())
            return (stride[0], []) if t.dim() == 1 else (stride[1], stride[:1] + stride[2:])

        shape = list(logits.shape)
        sizes = [] if logits.dim() == 1 else shape[:1] + shape[2:]
        self.classes = shape[0] if logits.dim() == 1 else shape[1]
        self.class_stride, z = split(logits)
        self.g_class_stride, g = split(logits if gradient is None else gradient)
        if self.classes <= 1:
            self.class_stride = self.g_class_stride = 1
        self.sizes, (self.strides, self.g_strides) = collapse(sizes, z, g)
        self.rows = 1
        for size in self.sizes:
            self.rows *= size
        self.same = self.class_stride == self.g_class_stride and self.strides == self.g_strides
        pointers = (logits,) if gradient is None else (logits, gradient)
        self.aligned = all(t.data_ptr() % 16 == 0 for t in pointers)
        self.row_strides = self.strides if self.rows > 1 else [self.classes]
        if not self.same:
            self.row_strides = []  # not one run of memory

    def plan(self, logits: Tensor, spread: bool = False) -> Plan:
        return plan(
            self.rows,
            self.classes,
            self.class_stride,
            self.row_strides,
            logits.element_size(),
            self.aligned,
            _multiprocessors(logits.device),
            spread,
        )

    def arguments(self, gradient: bool) -> dict[str, int]:
        """Sizes and strides as the kernels name them; absent leading dimensions are of size 1."""
        pad = MAX_ROW_DIMS - len(self.sizes)
        sizes = [1] * pad + self.sizes
        out = {f"n{i}": sizes[i] for i in (1, 2, 3)}
        out |= {f"s{i}": s for i, s in enumerate([0] * pad + self.strides)}
        out["sc"] = self.class_stride
        if gradient:
            out |= {f"t{i}": s for i, s in enumerate([0] * pad + self.g_strides)}
            out["tc"] = self.g_class_stride
        return out

    @property
    def wide(self) -> bool:
        """Whether a class offset needs 64 bits."""
        return self.classes * max(self.class_stride, self.g_class_stride) >= _LIMIT_INT32


def _few_row_dims(logits: Tensor) -> Tensor:
    """The logits, or a contiguous copy where more row dimensions are left than the kernels unfold."""
    if logits.dim() <= MAX_ROW_DIMS + 1:
        return logits
    sizes, _ = collapse(logits.shape[:1] + logits.shape[2:], logits.stride()[:1] + logits.stride()[2:])
    return logits if len(sizes) <= MAX_ROW_DIMS else logits.contiguous()


def _flat(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor of target's shape as one dimension and its stride; a copy only where no one stride describes it."""
    if t is None:
        return None, 0
    t = t.reshape(-1)
    return t, t.stride(0)


def _options(label_smoothing: float, diversity: int, diversity_weight: float, z_loss: float) -> tuple[dict[str, float], dict[str, Any]]:
    """(run-time, compile-time) arguments of ``_finish``."""
    values = {"smoothing": label_smoothing, "diversity_weight": diversity_weight, "z_loss": z_loss}
    return values, {"KIND": diversity, "SMOOTH": label_smoothing != 0, "Z_LOSS": z_loss != 0}


def _resident(
    rows: _Rows,
    chosen: Plan,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    options: tuple[dict[str, float], dict[str, Any]],
    *,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
    rescale: bool = False,
    loss: Tensor | None = None,
    parts: Tensor | None = None,
    partials: Tensor | None = None,
    divisor: Tensor | None = None,
    shares: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    target, target_stride = _flat(target)  # type: ignore[assignment]
    sample_weight, sample_stride = _flat(sample_weight)
    upstream_stride = 0
    if upstream is not None:
        scalar = upstream.dim() == 0
        upstream, upstream_stride = _flat(upstream)
        upstream_stride = 0 if scalar else upstream_stride
    values, flags = options
    kernels.resident[(chosen.programs,)](
        logits, gradient, target, weight if rows.classes else None, sample_weight, upstream, loss, parts, partials, divisor, shares, counter,
        rows.rows, **rows.arguments(True), target_stride=target_stride, sample_stride=sample_stride, upstream_stride=upstream_stride,
        ignore_index=ignore_index, **values, K=rows.classes, **flags, REDUCTION=reduction,
        ACCESS=chosen.access, DIMS=len(rows.sizes), SAME=rows.same, WIDE=rows.wide, RESCALE=rescale,
        SHARES=1 if shares is None else shares.numel(),
        UPSTREAM_ROWS=upstream is not None and upstream.numel() > 1 and upstream_stride != 0,
        A=chosen.a, R=chosen.r, B=chosen.b, P=chosen.run, ALIGN=chosen.align, COPIES=max(1, 32 * chosen.warps // chosen.r),
        num_warps=chosen.warps,
    )  # fmt: skip


def _share_count(rows: int) -> int:
    """Programs that sum the mean's divisor: a power of 2, few enough for every program to read them all."""
    return 1 << max(0, min(8, (rows // 4096).bit_length()))


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    diversity: int,
    diversity_weight: float,
    z_loss: float,
    parts: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fastsoftloss::triton_cross_entropy``; see ``ops`` for its arguments."""
    dtype = reference.accumulation_dtype(logits.dtype)
    shape = target.shape if reduction == _NONE else torch.Size()
    moments_size, fused = outputs(logits, target, reduction)
    gradient = gradient and fused
    nothing = logits.new_empty(0, dtype=dtype)
    loss = logits.new_empty(shape, dtype=dtype)
    components = logits.new_empty((2, *shape), dtype=dtype) if parts else nothing
    dlogits = torch.empty_like(logits) if gradient else logits.new_empty(0)
    moments = logits.new_empty(moments_size, dtype=dtype)
    result = loss, components, dlogits, moments
    if target.numel() == 0:
        for t in (loss, components, moments):
            t.fill_(float("nan") if reduction == _MEAN else 0.0)
        return result

    logits = _few_row_dims(logits)
    rows = _Rows(logits, dlogits if gradient else None)
    chosen = rows.plan(logits)
    options = _options(label_smoothing, diversity, diversity_weight, z_loss)
    out_parts = components if parts else None
    with _on(logits.device):
        if not chosen.resident:
            _long_forward(rows, chosen, logits, target, weight, sample_weight, ignore_index, reduction, options, loss, out_parts, moments)
            return result
        arguments = (rows, chosen, logits, target, weight, sample_weight, ignore_index, reduction, options)
        dz = dlogits if gradient else None
        if reduction == _NONE:
            _resident(*arguments, gradient=dz, loss=loss, parts=out_parts)
            return result
        partials = logits.new_empty(4 * chosen.programs, dtype=dtype)
        if reduction == _MEAN and gradient:
            # the divisor comes first, since every gradient wants it; then the last program to finish sums the loss
            shares = logits.new_empty(_share_count(rows.rows), dtype=dtype)
            counter = torch.empty(1, dtype=torch.int32, device=logits.device)
            labels, target_stride = _flat(target)
            s, sample_stride = _flat(sample_weight)
            kernels.divisors[(shares.numel(),)](
                labels, weight if rows.classes else None, s, shares, counter, rows.rows, rows.classes, target_stride, sample_stride, ignore_index,
                BLOCK=1024, num_warps=4,
            )  # fmt: skip
            _resident(
                *arguments, gradient=dz, loss=loss, parts=out_parts, partials=partials, divisor=moments, shares=shares, counter=counter
            )
            return result
        _resident(*arguments, gradient=dz, loss=loss, parts=out_parts, partials=partials)
        divisor = moments if reduction == _MEAN else None
        kernels.total[(1,)](partials, divisor, loss, out_parts, chosen.programs, REDUCTION=reduction, BLOCK=1024, num_warps=4)
    return result


def _long_forward(
    rows: _Rows,
    chosen: Plan,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    options: tuple[dict[str, float], dict[str, Any]],
    loss: Tensor,
    parts: Tensor | None,
    saved: Tensor,
) -> None:
    t, target_stride = _flat(target)
    s, sample_stride = _flat(sample_weight)
    values, flags = options
    partial = saved.new_empty(9 * rows.rows * chosen.splits)
    place = rows.arguments(False)
    kernels.long_reduce[(chosen.programs,)](
        logits, t, weight, partial, rows.rows, rows.classes, **place, target_stride=target_stride, ignore_index=ignore_index,
        splits=chosen.splits, tiles=chosen.tiles, KIND=flags["KIND"], SMOOTH=flags["SMOOTH"], DIMS=len(rows.sizes),
        ALIGN=chosen.align, A=chosen.a, L=chosen.r, V=chosen.b, num_warps=chosen.warps,
    )  # fmt: skip
    width = triton.next_power_of_2(chosen.splits)
    block = max(1, 512 // width)
    kernels.long_finish[(-(-rows.rows // block) if reduction == _NONE else 1,)](
        logits, t, weight, s, partial, saved, loss, parts, rows.rows, rows.classes, **place,
        target_stride=target_stride, sample_stride=sample_stride, ignore_index=ignore_index, splits=chosen.splits, **values, **flags,
        REDUCTION=reduction, DIMS=len(rows.sizes), R=block, SPLITS=width, num_warps=4,
    )  # fmt: skip


def _gradient(
    dlogits: Tensor,
    upstream: Tensor,
    moments: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    diversity: int,
    diversity_weight: float,
    z_loss: float,
    rescale: bool,
) -> Tensor:
    if target.numel() == 0 or logits.numel() == 0:
        return dlogits
    logits = _few_row_dims(logits)
    rows = _Rows(logits, dlogits)
    options = _options(label_smoothing, diversity, diversity_weight, z_loss)
    chosen = rows.plan(logits, spread=True)
    with _on(logits.device):
        if chosen.resident:
            _resident(
                rows, chosen, logits, target, weight, sample_weight, ignore_index, reduction, options,
                gradient=dlogits, upstream=upstream, divisor=moments if reduction == _MEAN else None, rescale=rescale,
            )  # fmt: skip
            return dlogits
        t, target_stride = _flat(target)
        s, sample_stride = _flat(sample_weight)
        scalar = upstream.dim() == 0
        u, upstream_stride = _flat(upstream)
        values, flags = options
        kernels.long_spread[(chosen.programs,)](
            logits, dlogits, t, weight, s, u, moments, rows.rows, rows.classes, **rows.arguments(True),
            target_stride=target_stride, sample_stride=sample_stride, upstream_stride=0 if scalar else upstream_stride,
            ignore_index=ignore_index, **values, splits=chosen.splits, tiles=chosen.tiles, **flags, REDUCTION=reduction,
            DIMS=len(rows.sizes), SAME=rows.same, ALIGN=chosen.align, A=chosen.a, L=chosen.r, V=chosen.b, num_warps=chosen.warps,
        )  # fmt: skip
    return dlogits


def backward(upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The operator ``fastsoftloss::triton_cross_entropy_backward``: the gradient for ``upstream``, () or target's shape."""
    return _gradient(torch.empty_like(logits), upstream, moments, logits, *inputs, rescale=False)  # type: ignore[misc]


def rescale(dlogits: Tensor, upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor | None:
    """Make the forward's gradient that for ``upstream``, in place; on the device, nothing is done where that is 1.

    Written anew from the logits, which costs what a product in place would and rounds once. None where the forward
    has left no gradient.
    """
    if dlogits.shape != logits.shape:
        return None
    return _gradient(dlogits, upstream, moments, logits, *inputs, rescale=True)  # type: ignore[misc]
