"""The CUDA backend's operators as Python sees them; the kernels and their host code are csrc/cuda and csrc/ops_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsoftloss import ops

# as in csrc/cuda/plan.h: properties of the shape alone, so that a fake tensor has them
FUSED_CLASSES, KEPT_CLASSES = 16384, 1024
KEPT = {"index": 6, "mixture": 7, "probabilities": 0}  # floats a row, by the target's form
_MEAN = ops.REDUCTIONS.index("mean")


def outputs(logits: Tensor, target: Tensor, reduction: int, gradient: bool) -> tuple[int, bool]:
    """(size of ``moments``, whether the forward can write the gradient too)."""
    classes = logits.shape[min(1, logits.dim() - 1)]
    floats = KEPT[ops.form_of(logits, target)] * ops.rows_of(logits).numel()
    return 1 + floats if classes > KEPT_CLASSES else int(reduction == _MEAN), gradient and classes <= FUSED_CLASSES


def rescale(dlogits: Tensor, upstream: Tensor, moments: Tensor, logits: Tensor, *inputs: Any) -> Tensor | None:
    """Make the forward's gradient that for ``upstream``, in place; on the device, nothing is done where that is 1.

    Written anew from the logits, which rounds once. None where the forward has left no gradient.
    """
    if dlogits.shape != logits.shape:
        return None
    torch.ops.fastsoftloss.cuda_cross_entropy_rescale(dlogits, upstream, moments, logits, *inputs)
    return dlogits
