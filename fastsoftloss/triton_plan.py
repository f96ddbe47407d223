"""The launch plan of the Triton backend: one pure function of shape, strides, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastsoftloss import ops

STRIDED, ROWS, FLAT = 0, 1, 2  # as in triton_kernels; ROWS: by triton_rows
MAX_ROW_DIMS = 4

_KEPT = 4  # floats a row, and one for each label, that the backward finds again, triton_rows.FIELDS
_MEAN = ops.REDUCTIONS.index("mean")

_VECTOR_BYTES = 16
_SECTOR_BYTES = 32
_FLAT_CLASSES = 256  # beyond, a row alone fills its memory sectors well enough
_CHUNK_CLASSES = 128  # fewer do not fill a chunk
_REGISTERS = 255  # that a thread can have
_ALL_REGISTERS = 65536  # of a multiprocessor


_CLOSED = tuple(ops.DIVERSITIES.index(d) for d in (None, "logit_variance"))


class Plan(NamedTuple):
    """How a call is laid out on the device.

    ``resident``: a row stays in one program's registers, so that its gradient is written in the forward's pass.
    FLAT and STRIDED tiles are ``[a, r, b]``: class a * b + b of row r. ROWS, and rows that do not fit, are read in chunks
    ``[r, b, vector]``: ``vector`` neighbours for each of b lanes, ``a`` chunks in all, or where ``splits`` programs share
    a row ``a`` chunks each.
    """

    resident: bool
    access: int
    a: int
    r: int
    b: int
    vector: int
    run: int  # elements of the padded flat run; 0 where access is not FLAT
    align: int  # elements of a memory sector; 0: no access wider than an element
    start: int  # elements that every row's first is a multiple of: align, half of it (and so are the classes), or 1
    warps: int
    registers: int | None  # a thread may use; with no limit ptxas spills one or two where that fits one more program on a multiprocessor
    programs: int
    splits: int

    @property
    def keeps(self) -> bool:
        """Whether the forward keeps row gradients for the backward; edges would be fetched by too many accesses of their own."""
        return not self.resident or (self.access == ROWS and self.start > 1)


class SoftPlan(NamedTuple):
    """For class probabilities: tiles ``[a, r, b, vector]``, class (a * b + b) * vector + vector of row r, as many as the row asks for."""

    a: int
    r: int
    b: int
    vector: int
    warps: int
    registers: int  # as of ``Plan``
    programs: int


def fits(classes: int, itemsize: int, labels: int = 1) -> bool:
    """Whether one program holds a row of this many classes; a property of dtype and form alone, so that shapes decide it."""
    most = 4096 if itemsize == 8 else 16384
    return classes <= (most if labels == 1 else most // 4)  # strided rows of two labels and more classes would spill


def chunks_at_a_time(itemsize: int) -> int:
    """Chunks of a row that does not fit that are read together; more doubles would spill."""
    return 4 if itemsize < 8 else 2


def outputs(logits: Tensor, target: Tensor, reduction: int, gradient: bool) -> tuple[int, bool]:
    """(size of ``moments``, whether the forward writes the gradient too)."""
    classes = logits.shape[min(1, logits.dim() - 1)]
    form = ops.form_of(logits, target)
    if form == "probabilities":  # read anew for the gradient, whatever their length
        return int(reduction == _MEAN), gradient
    labels = 2 if form == "mixture" else 1
    if classes <= _FLAT_CLASSES or (gradient and fits(classes, logits.element_size(), labels)):
        return int(reduction == _MEAN), gradient
    return 1 + (_KEPT + labels) * (target.numel() // labels), False


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
    gradient: bool = False,
    kept: bool = False,
    same: bool = True,
    labels: int = 1,
) -> Plan:
    """The plan for ``rows`` x ``classes`` logits.

    Args:
        class_stride, row_strides: in elements, row dimensions collapsed as far as strides allow.
        itemsize: bytes of a logit.
        aligned: the first logit lies at a multiple of 16 bytes.
        multiprocessors: of the device.
        gradient: this pass writes it.
        kept: from row gradients that the forward has kept.
        same: the gradient has the strides of the logits.
        labels: of a row, two in a mixture.
    """
    vector = _VECTOR_BYTES // itemsize
    align = _SECTOR_BYTES // itemsize
    by_vector = class_stride == 1 and aligned
    whole = classes % vector == 0
    start = next(n for n in (align, vector, 1) if n == 1 or (whole and all(s % n == 0 for s in row_strides)))
    resident = fits(classes, itemsize, labels)
    # places of a row in its memory sectors: those of its edges left out, those of the row before taken in
    places = classes // align * align if start == 1 else classes + (vector if start < align else 0)
    if kept or not resident:
        if not by_vector:
            vector, align, start, places = 1, 0, 0, classes
        lanes = min(128, max(8, _pow2(-(-classes // 128)))) if kept and by_vector else 128
        r = max(1, 32 // lanes) if kept else 1
        chunks = max(1, -(-places // (lanes * vector)))
        wanted = (8 if kept else 4) * multiprocessors
        splits = min(-(-chunks // 8), max(1, -(-wanted * r // max(rows, 1))))
        each = -(-chunks // splits)
        splits = -(-chunks // each)
        warps, registers = max(1, lanes // 32), None if kept else 128
        return Plan(resident, ROWS, each, r, lanes, vector, 0, align, start, warps, registers, -(-rows // r) * splits, splits)

    run = 0
    if by_vector and same and tuple(row_strides) == (classes,) and 1 <= classes <= _FLAT_CLASSES and itemsize < 8:
        access, warps, registers, vector = FLAT, 2, _REGISTERS, 1
        b = _pow2(-(-classes // 32))
        a, r = _pow2(-(-classes // b)), 32 * warps // b
        run = _pow2(r * classes)
    elif by_vector and classes >= _CHUNK_CLASSES:
        access = ROWS
        # more elements a thread would spill; without a gradient they stay as they were read
        each = (64 if itemsize < 8 else 16) if gradient else 256 // itemsize
        vector = 8 if itemsize < 8 else vector
        b = max(8, _pow2(-(-classes // each)))
        warps, r = max(1, b // 32), max(1, 32 // b)
        a = -(-places // (b * vector))
        registers = _REGISTERS
    else:
        access, vector = STRIDED, 1
        padded = _pow2(classes)
        size = 4096 if itemsize < 8 else 2048
        if class_stride == 1:
            b = min(padded, 128)
            r = max(1, size // 2 // padded)
        else:
            r = max(1, min(128, size // padded))
            b = min(padded, 128 // r)
        a = padded // b
        each = (32 if itemsize < 8 else 16) // labels  # of two there is more to hold beside the elements
        warps = max(4, min(32, padded * r // 32 // each))
        registers = min(168 if itemsize < 8 and labels == 1 else _REGISTERS, _ALL_REGISTERS // (32 * warps))
    programs = min(-(-rows // r), multiprocessors * max(1, 32 // warps))
    return Plan(True, access, a, r, b, vector, run, align, start, warps, registers, programs, 1)


def soft_plan(
    rows: int,
    classes: int,
    class_strides: Sequence[int],
    row_strides: Sequence[Sequence[int]],
    itemsize: int,
    multiprocessors: int,
    diversity: int,
) -> SoftPlan:
    """The plan for ``rows`` x ``classes`` logits and class probabilities.

    Args:
        class_strides, row_strides: of every tensor that has the shape of the logits, as of ``plan``.
        diversity: its place in ``ops.DIVERSITIES``.
    """
    vector = _VECTOR_BYTES // max(itemsize, 4) if all(s == 1 for s in class_strides) else 1
    while any(s % vector for s in (classes, *(s for strides in row_strides for s in strides))):
        vector //= 2
    # elements a thread; more would spill, and so would those of which more is held than the sums that make the variance's expectation
    each = 8 if itemsize == 8 else 32 if diversity in _CLOSED else 16
    b = min(256, max(2 // vector, 1, _pow2(-(-classes // each))))  # of single ones the classes would be dealt out to threads as neighbours
    a = min(each // vector, _pow2(-(-classes // (b * vector))))
    warps = max(1, b // 32)
    r = max(1, 32 // b)
    return SoftPlan(a, r, b, vector, warps, _REGISTERS, min(-(-rows // r), 32 // warps * multiprocessors))


class HessianPlan(NamedTuple):
    """For the second derivative: tiles as of ``SoftPlan``, by runs as of ``Plan``."""

    a: int
    r: int
    b: int
    run: int
    warps: int
    registers: int
    programs: int


def hessian_plan(rows: int, classes: int, contiguous: bool, itemsize: int, multiprocessors: int, labels: int = 1) -> HessianPlan:
    """The plan for ``rows`` x ``classes`` logits and as many numbers of v; ``contiguous``: both, and what is written."""
    each = (32 if itemsize < 8 else 8) // labels  # elements a thread; more would spill
    flat = contiguous and classes <= _FLAT_CLASSES and itemsize < 8
    b = _pow2(-(-classes // each))
    if not flat:
        b = min(256, max(2, b))
    a = min(each, _pow2(-(-classes // b)))
    warps = max(2 if flat else 4, b // 32)
    r = 32 * warps // b
    programs = min(-(-rows // r), 32 // warps * multiprocessors)
    return HessianPlan(a, r, b, _pow2(r * classes) if flat else 0, warps, _REGISTERS, programs)
