"""The loss of many short rows, and of rows with any strides: a program holds whole rows in registers.

Reduce, finish (``triton_finish``) and spread in one kernel: one read of the logits, and of the gradient one write.
Tiles are [A, R, B]: class a * B + b of row r, so that a thread holds one row's a in registers and few threads share a row.
"""

# ruff: noqa: F821, RUF005, SIM102 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    KL,
    LOGIT_VARIANCE,
    NONE,
    VARIANCE,
    _across,
    _count,
    _each_across,
    _exp,
    _finite,
    _inverse_left,
    _is_any,
    _keep_rows,
    _keep_totals,
    _left_out,
    _logits_of,
    _offset,
    _place,
    _quotient,
    _row_labels,
    _row_scale,
    _scale,
    _scaled,
    _spread,
    _spread_holes,
    _two_sum_error,
)
from fastsoftloss.triton_mixture import _finish_labels

# how a tile reaches the logits
STRIDED = tl.constexpr(0)  # any strides
FLAT = tl.constexpr(2)  # whole rows of contiguous logits as one run of memory, exchanged into rows on chip


@triton.jit
def _sum(t):
    """[A, R, B] -> [R]"""
    return tl.sum(tl.sum(t, axis=0), axis=1)


@triton.jit
def _dot(a, b, inside):
    """Sum of a b over the complement, both finite and ``a`` 0 elsewhere.

    A product that is reduced across lanes at once would be contracted into the first exchange, which each lane rounds
    differently; a select stands between them.
    """
    if a.shape[0] == 1:
        return _sum(tl.where(inside, a * b, 0.0))
    else:
        return _sum(a * b)


@triton.jit
def _max(t):
    return tl.max(tl.max(t, axis=0), axis=1)


@triton.jit
def _fill(x, z):
    """x with 0 for the classes that are masked."""
    return tl.where(z != -float("inf"), x, 0.0)


@triton.jit
def _squares(x, mean, inside):
    """Sum of (x - mean)^2 where ``inside``."""
    d = tl.where(inside, x - _across(mean), 0.0)
    return _dot(d, d, inside)


@triton.jit
def _load_run(ptr, tile, rows, K, A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """(R rows of contiguous classes, by one run of memory and an exchange on chip; their classes), [A, R, B]; something beyond the classes."""
    flat = tl.arange(0, P)
    start = tl.cast(tile, tl.int64) * (R * K)
    left = rows - tile * R
    if left >= R:  # its own branch: a mask with a run-time bound would break up the 16-byte accesses
        run = tl.load(ptr + start + flat, mask=flat < R * K, other=0.0)
    else:
        run = tl.load(ptr + start + flat, mask=flat < left * K, other=0.0)
    j = tl.reshape(tl.arange(0, A * R * B), (A, R, B))
    c = (j // (R * B)) * B + j % B
    index = tl.where(c < K, (j // B) % R * K + c, 0)
    return tl.reshape(tl.gather(run, tl.reshape(index, (A * R * B,)), 0), (A, R, B)), c


@triton.jit
def _store_run(ptr, tile, rows, K, t, A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """The way back."""
    flat = tl.arange(0, P)
    r = flat // K
    k = flat % K
    back = tl.minimum((k // B) * (R * B) + r * B + k % B, A * R * B - 1)
    run = tl.gather(tl.reshape(t, (A * R * B,)), back, 0)
    start = tl.cast(tile, tl.int64) * (R * K)
    left = rows - tile * R
    if left >= R:
        tl.store(ptr + start + flat, run, mask=flat < R * K)
    else:
        tl.store(ptr + start + flat, run, mask=flat < left * K)


@triton.jit(do_not_specialize=["rows"])
def resident(
    z_ptr, g_ptr, target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr,
    divisor_ptr, shares_ptr, counter_ptr,
    rows, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    ACCESS: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Rows that one program holds in registers: one read of the logits, and of the gradient one write where g_ptr is given.

    loss_ptr, parts_ptr: where the row losses go, or with a reduction the total (written by the last program to finish
    if counter_ptr is given, else by ``total``). upstream_ptr: the gradient from above, () or one a row. other_ptr,
    other_sample_ptr: where a row has a second label, that and its weight.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    inf = float("inf")
    acc = tl.zeros((R,), DTYPE)
    acc_w = acc
    acc_ce = acc
    acc_div = acc
    scale_all, work_all = _scale(shares_ptr, divisor_ptr, upstream_ptr, SHARES, UPSTREAM_ROWS, RESCALE, DTYPE)

    targets = (target_ptr, other_ptr, target_stride)
    samples = (sample_ptr, other_sample_ptr, sample_stride)
    options = (K, smoothing, diversity_weight, z_loss)
    column = tl.expand_dims(tl.arange(0, A) * B, 1) + tl.expand_dims(tl.arange(0, B), 0)  # [A, B]
    column = tl.expand_dims(column, 1)  # [A, 1, B]
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale, work = _row_scale(scale_all, work_all, upstream_ptr, row, rows, upstream_stride, UPSTREAM_ROWS, RESCALE)
        if work:
            labels = _row_labels(targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES, DTYPE)
            out, there, live = _left_out(labels)
            scale = tl.where(live, scale, 0.0)  # with no row that counts the mean's 1/0 stays out of the gradient
            reads = _across(live)
            nothing = tl.where(reads, -inf, 0.0)  # a row that asks for no gradient is flat, not masked
            out = _each_across(out)
            z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
            g_row = _offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)
            # ---- load
            if ACCESS == FLAT:
                z, c = _load_run(z_ptr, tile, rows, K, A, R, B, P)
                exists = c < K
                z = tl.where(reads, tl.where(exists, z.to(DTYPE), -inf), 0.0)
            else:
                c = column
                exists = c < K
                step = c.to(tl.int64) * sc if WIDE else c * sc
                z = tl.load(z_ptr + _across(z_row) + step, mask=exists & reads, other=nothing).to(DTYPE)
            # ---- reduce
            if other_ptr is None:
                logits = (_sum(tl.where(c == out[0], z, 0.0)),)
            else:  # looked up: memory sectors that are near, and fewer instructions
                logits = _logits_of(z_ptr, z_row, sc, labels, DTYPE)
            is_out = _is_any(c, out)
            others = exists & (is_out == 0)
            z = tl.where(is_out, -inf, z)
            m = _max(z)
            base = _finite(m)
            x = z - _across(base)
            e = tl.where(exists, _exp(x), 0.0)
            s1_ = _sum(e)
            x = tl.where(others, x, 0.0)
            zero = tl.zeros_like(s1_)
            count = _count(there, zero)
            n = (zero + K) - count
            inverse_n = _inverse_left(K, there, zero)
            mean = zero
            m2 = zero
            s2_ = zero
            sx = zero
            sw = zero
            swx = zero
            w = None
            holes = False
            if KIND != 0 or SMOOTH:
                x1 = _sum(x)
                if SMOOTH:
                    if weight_ptr is not None:
                        w = tl.load(weight_ptr + c, mask=exists, other=0.0)
                        sw = _sum(tl.where(others, w, 0.0))
                        swx = _sum(tl.where(others, w * x, 0.0))
                    else:
                        sw = n
                        swx = x1
                # masked classes are rare: only where a sum shows one is anything asked of single elements
                holes = tl.max((x1 == -inf).to(tl.int32), 0) != 0
                if holes:
                    n = _sum((z != -inf).to(tl.float32)).to(DTYPE)
                    x = _fill(x, z)
                    x1 = _sum(x)
                    inverse_n = _quotient(zero + 1.0, tl.maximum(n, 1.0))
                mean = x1 * inverse_n
            if KIND == LOGIT_VARIANCE:
                if holes:
                    m2 = _squares(x, mean, z != -inf)
                else:
                    # a class left out stands in as x = 0, the maximum, whose square M2 exceeds
                    m2 = _squares(x, mean, exists) - count * (mean * mean)
            if KIND == KL:
                sx = _dot(e, x, others)
            if KIND == CHI2 or KIND == VARIANCE:
                s2_ = _dot(e, e, others)
            # ---- finish
            margins = ()
            for i in tl.static_range(len(labels)):
                d = m - logits[i]
                margins = margins + ((d, _two_sum_error(m, -logits[i], d)),)
            moments = (n, inverse_n, s1_, s2_, sx, mean, m2, sw, swx)
            loss, ce, div, weight, a, p, e0, ew, g_y = _finish_labels(
                moments, base, labels, there, logits, margins, options, KIND, SMOOTH, Z_LOSS
            )
            if loss_ptr is not None:
                if REDUCTION == NONE:
                    _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div)
                else:
                    acc += loss
                    acc_w += weight
                    acc_ce += ce
                    acc_div += div
            # ---- spread
            if g_ptr is not None:
                a, p, e0, ew = _across(a * scale), _across(p * scale), _across(e0 * scale), _across(ew * scale)
                dz = _spread(x, e, w, a, p, e0, ew, KIND, SMOOTH)
                if KIND != 0 or SMOOTH:
                    if holes:
                        dz = _spread_holes(dz, z, w, a, ew, SMOOTH)
                dz = _place(dz, c, out, _each_across(_scaled(g_y, scale)))
                dz = dz.to(g_ptr.dtype.element_ty)
                if ACCESS == FLAT:
                    _store_run(g_ptr, tile, rows, K, dz, A, R, B, P)
                else:
                    g_step = c.to(tl.int64) * tc if WIDE else c * tc
                    tl.store(g_ptr + _across(g_row) + g_step, dz, mask=exists & _across(row < rows))
    if loss_ptr is not None and REDUCTION != NONE:
        _keep_totals(
            partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr,
            tl.sum(acc, 0), tl.sum(acc_w, 0), tl.sum(acc_ce, 0), tl.sum(acc_div, 0), REDUCTION,
        )  # fmt: skip
