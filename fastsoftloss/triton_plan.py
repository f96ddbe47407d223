"""The launch plan of the Triton backend: one pure function of shape, strides, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastsoftloss import ops

STRIDED, ALIGNED, FLAT = 0, 1, 2  # as in triton_kernels
MAX_ROW_DIMS = 4

_KEPT = 5  # floats a row that a long row's backward finds again
_MEAN = ops.REDUCTIONS.index("mean")

_VECTOR_BYTES = 16
_SECTOR_BYTES = 32
_FLAT_CLASSES = 256  # beyond, a row alone fills its memory sectors well enough


class Plan(NamedTuple):
    """How a call is laid out on the device.

    ``resident``: a row stays in one program's registers, so that its gradient is written in the forward's pass.
    Tiles are ``[a, r, b]``: class a * b + b of row r. Where a row does not fit, ``splits`` programs share it and
    each takes ``tiles`` tiles of ``a * b * r`` classes, r being the lanes.
    """

    resident: bool
    access: int
    a: int
    r: int
    b: int
    run: int  # elements of the padded flat run; 0 where access is not FLAT
    align: int  # elements between aligned starts
    warps: int
    programs: int
    splits: int
    tiles: int


def fits(classes: int, itemsize: int) -> bool:
    """Whether one program holds a row of this many classes; a property of the dtype alone, so that shapes decide it."""
    return classes <= (4096 if itemsize == 8 else 8192)


def outputs(logits: Tensor, target: Tensor, reduction: int) -> tuple[int, bool]:
    """(size of ``moments``, whether the forward can write the gradient too)."""
    if fits(logits.shape[min(1, logits.dim() - 1)], logits.element_size()):
        return int(reduction == _MEAN), True
    return 1 + _KEPT * target.numel(), False


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def plan(
    rows: int,
    classes: int,
    class_stride: int,
    row_strides: Sequence[int],
    itemsize: int,
    aligned: bool,
    multiprocessors: int,
    spread: bool = False,
) -> Plan:
    """The plan for ``rows`` x ``classes`` logits.

    Args:
        class_stride, row_strides: in elements, row dimensions collapsed as far as strides allow.
        itemsize: bytes of a logit.
        aligned: the first logit lies at a multiple of 16 bytes.
        multiprocessors: of the device.
        spread: for rows that do not fit, the pass that writes the gradient.
    """
    vector = _VECTOR_BYTES // itemsize
    align = _SECTOR_BYTES // itemsize
    by_vector = class_stride == 1 and aligned
    if not fits(classes, itemsize):
        b = vector if by_vector else 1
        warps = 4
        a = (32 if itemsize < 8 else 16) // b
        lanes = 32 * warps
        all_tiles = -(-classes // (a * lanes * b))
        wanted = (8 if spread else 4) * multiprocessors
        splits = min(all_tiles, max(1, -(-wanted // max(rows, 1))))
        tiles = -(-all_tiles // splits)
        splits = -(-all_tiles // tiles)
        return Plan(
            False, ALIGNED if by_vector else STRIDED, a, lanes, b, 0, align if by_vector else 0, warps, rows * splits, splits, tiles
        )

    run = 0
    if by_vector and tuple(row_strides) == (classes,) and 1 <= classes <= _FLAT_CLASSES and itemsize < 8:
        access, warps = FLAT, 2
        b = _pow2(-(-classes // 32))
        a, r = _pow2(-(-classes // b)), 32 * warps // b
        run = _pow2(r * classes)
    elif by_vector and classes >= 2 * align:
        access = ALIGNED
        lanes = max(8, _pow2(-(-classes // (32 if itemsize < 8 else 16))))  # more elements a thread would spill
        warps, r = max(1, lanes // 32), max(1, 32 // lanes)
        b = lanes * vector
        a = _pow2(-(-classes // b))
    else:
        access, warps = STRIDED, 4
        padded = _pow2(classes)
        size = 4096 if itemsize < 8 else 2048
        if class_stride == 1:
            b = min(padded, 128)
            r = max(1, size // 2 // padded)
        else:
            r = max(1, min(128, size // padded))
            b = min(padded, 128 // r)
        a = padded // b
        warps = max(4, min(32, padded * r // 32 // (32 if itemsize < 8 else 16)))
    programs = min(-(-rows // r), multiprocessors * max(1, 32 // warps))
    return Plan(True, access, a, r, b, run, align, warps, programs, 1, 1)
