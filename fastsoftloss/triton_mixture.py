"""Rows with two labels and their weights: mixup's target.

The loss is that of the one label and that of the other, each with its own weight. The two leave out classes of their own, so
neither's moments hold for both: those of the classes that are neither, the rest, are reduced once, each label's complement
is the rest with the other label's class merged in, and both go through ``_finish``. Their row gradients, brought to one
base, add up to that of the rest; the two classes themselves get what either label has for them.

A program reads its rows in tiles [A, R, B], class a * B + b of row r; where one tile is the whole row it is read once and kept,
and of few contiguous classes as a run of memory.
"""

# ruff: noqa: F821, SIM109 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    KL,
    LOGIT_VARIANCE,
    NONE,
    VARIANCE,
    _across,
    _exp,
    _exp_exact,
    _finish,
    _finite,
    _keep_rows,
    _keep_totals,
    _labels_once,
    _offset,
    _quotient,
    _row_scale,
    _row_weights,
    _scale,
    _spread,
    _spread_holes,
    _two_sum_error,
)
from fastsoftloss.triton_kernels import _load_run, _max, _store_run, _sum
from fastsoftloss.triton_soft import _at, _lower, _read, _with


@triton.jit
def _label(logits, targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES: tl.constexpr, DTYPE: tl.constexpr):
    """(class or -1, its logit, class weight, sample weight, does it count, is it good) of one label of each row.

    targets, samples: (pointer, stride).
    """
    y, counted, good = _labels_once(targets[0], row, rows, targets[1], ignore_index, K, COPIES)
    w, sample = _row_weights(weight_ptr, samples[0], row, rows, samples[1], y, counted, DTYPE)
    live = counted & good
    z_ptr, start, stride = logits
    z = tl.load(z_ptr + start + y.to(tl.int64) * stride, mask=live, other=0.0).to(DTYPE)
    return tl.where(live, y, -1), z, w, sample, counted, good


@triton.jit
def _read_rest(logits, c, reads, y_a, y_b, K, DTYPE: tl.constexpr):
    """Logits of classes c [A, R, B]; -inf for the labels and beyond the classes, 0 in a row that asks for nothing."""
    return tl.where((c == y_a) | (c == y_b), -float("inf"), _read(logits, c, reads, K, DTYPE))


@triton.jit
def _exp_difference(a, base):
    """e^(a - base), a <= base, the rounding of the difference put back."""
    d = a - base
    return _exp_exact(d, _two_sum_error(a, -base, d))


@triton.jit
def _with_class(rest, z, w, more):
    """The moments of the rest and, where ``more``, one class with logit z and weight w; their base, and what brings both to it.

    rest: (n, maximum, S1, S2, Sx, mean, M2, Sw, Swx), the sums about the maximum.
    """
    n, m, s1, s2, sx, mean, m2, sw, swx = rest
    z_there = tl.where(more, z, -float("inf"))
    there = z_there != -float("inf")
    top = tl.maximum(m, z_there, propagate_nan=tl.PropagateNan.ALL)
    base = _finite(top)
    f = _exp_difference(m, base)
    g = _exp_difference(z_there, base)
    d = tl.where(n > 0.0, m - base, 0.0)
    x = tl.where(there, z - base, 0.0)
    one = tl.where(there, 1.0, 0.0).to(s1.dtype)
    inverse_n = _quotient(tl.full(n.shape, 1.0, s1.dtype), tl.maximum(n + one, 1.0))
    mean, m2 = _with(n, mean + d, m2, one, x, inverse_n)
    sx = tl.where(f > 0.0, f * (sx + d * s1), 0.0) + g * x  # of a rest that is out of sight d may be beyond all numbers
    swx += d * sw + tl.where(more, w * (z_there - base), 0.0)
    sw += tl.where(more, w, 0.0)
    return (n + one, inverse_n, top, f * s1 + g, f * f * s2 + g * g, sx, mean, m2, sw, swx), base, d, f, x, g


@triton.jit
def _loss_of(moments, base, label, options, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr):
    """``_finish`` of one label's own complement; nothing of a label that does not count, whatever the row is."""
    K, smoothing, diversity_weight, z_loss = options
    n, inverse_n, top, s1, s2, sx, mean, m2, sw, swx = moments
    y, z, w, sample, counted, good = label
    d = top - z
    loss, ce, div, a, p, e0, ew, g_y = _finish(
        n, inverse_n, base, z, d, _two_sum_error(top, -z, d), s1, s2, sx, mean, m2, sw, swx,
        w, sample, counted, good, K, smoothing, diversity_weight, z_loss, KIND, SMOOTH, Z_LOSS,
    )  # fmt: skip
    live = y >= 0
    a, p, e0, ew, g_y = (
        tl.where(live, a, 0.0),
        tl.where(live, p, 0.0),
        tl.where(live, e0, 0.0),
        tl.where(live, ew, 0.0),
        tl.where(live, g_y, 0.0),
    )
    return tl.where(counted, loss, 0.0), tl.where(counted, ce, 0.0), tl.where(live, div, 0.0), a, p, e0, ew, g_y


@triton.jit
def _of_other(of, w, z, x, e, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """What a label's row gradient (A, P, E0, EW) gives to the class of the other, which has logit z, and x and e^x about its base."""
    a, p, e0, ew = of
    return _spread_holes(_spread(x, e, w, a, p, e0, ew, KIND, SMOOTH), z, w, a, ew, SMOOTH)


@triton.jit(do_not_specialize=["rows", "classes"])
def mixture(
    z_ptr, g_ptr, target_ptr, weight_ptr, sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr, divisor_ptr, shares_ptr, counter_ptr,
    rows, classes, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, sample_step, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    DIMS: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """The loss, and the gradient where g_ptr is given; pointers as ``triton_kernels.resident`` has them.

    target_ptr: a label of every row, then the other of every row; sample_ptr the same, sample_step apart.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    WHOLE: tl.constexpr = A * B >= K
    end = K if WHOLE else classes  # the same, but a number that is known would have the loops unrolled
    inf = float("inf")
    none = tl.zeros((R,), DTYPE)
    column = tl.expand_dims(tl.expand_dims(tl.arange(0, A) * B, 1), 1) + tl.expand_dims(tl.expand_dims(tl.arange(0, B), 0), 0)  # [A, 1, B]
    acc, acc_w, acc_ce, acc_div = none, none, none, none
    scale_all, work_all = _scale(shares_ptr, divisor_ptr, upstream_ptr, SHARES, UPSTREAM_ROWS, RESCALE, DTYPE)
    targets = (target_ptr, target_stride)
    other_targets = (target_ptr + tl.cast(rows, tl.int64) * target_stride, target_stride)
    samples = (sample_ptr, sample_stride)
    other_samples = samples
    if sample_ptr is not None:
        other_samples = (sample_ptr + sample_step, sample_stride)
    options = (K, smoothing, diversity_weight, z_loss)
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale, work = _row_scale(scale_all, work_all, upstream_ptr, row, rows, upstream_stride, UPSTREAM_ROWS, RESCALE)
        if work:
            start = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
            at = (z_ptr, start, sc)
            first = _label(at, targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES, DTYPE)
            second = _label(at, other_targets, other_samples, weight_ptr, row, rows, ignore_index, K, COPIES, DTYPE)
            y_a, z_a, w_a, sample_a = first[0], first[1], first[2], first[3]
            y_b, z_b, w_b, sample_b = second[0], second[1], second[2], second[3]
            live = (y_a >= 0) | (y_b >= 0)
            apart = y_a != y_b
            reads, label_a, label_b = _across(live), _across(y_a), _across(y_b)
            logits = (z_ptr, _across(start), sc)

            # ---- reduce: the rest, about its maximum
            if P > 0:
                kept, places = _load_run(z_ptr, tile, rows, K, A, R, B, P)
                kept = tl.where((places == label_a) | (places == label_b) | (places >= K), -inf, kept.to(DTYPE))
                kept = tl.where(reads, kept, 0.0)
            else:
                places = column
                kept = _read_rest(logits, places, reads, label_a, label_b, K, DTYPE)
            m = _max(kept)
            for i in range(A * B, end, A * B):
                m = tl.maximum(m, _max(_read_rest(logits, places + i, reads, label_a, label_b, K, DTYPE)))
            base = _across(_finite(m))
            n, sum1, sum2, sumx, total, sw, swx = none, none, none, none, none, none, none
            for i in range(0, end, A * B):
                c = places + i
                z = kept if WHOLE else _read_rest(logits, c, reads, label_a, label_b, K, DTYPE)
                there = z != -inf
                x = z - base
                e = _exp(x)
                x = tl.where(there, x, 0.0)
                sum1 += _sum(e)
                n += _sum(tl.where(there, 1.0, 0.0).to(DTYPE))
                total += _sum(x)
                if KIND == KL:
                    sumx += _sum(e * x)
                if KIND == CHI2 or KIND == VARIANCE:
                    sum2 += _sum(e * e)
                if SMOOTH:
                    others = (c < K) & (c != label_a) & (c != label_b)
                    w = tl.where(others, 1.0, 0.0).to(DTYPE)
                    if weight_ptr is not None:
                        w = tl.load(weight_ptr + c, mask=others, other=0.0)
                    sw += _sum(w)
                    swx += _sum(tl.where(others, w * (z - base), 0.0))
            mean = _quotient(total, tl.maximum(n, 1.0))
            m2 = none
            if KIND == LOGIT_VARIANCE:
                for i in range(0, end, A * B):
                    z = kept if WHOLE else _read_rest(logits, places + i, reads, label_a, label_b, K, DTYPE)
                    d = tl.where(z != -inf, z - base - _across(mean), 0.0)
                    m2 += _sum(d * d)

            # ---- finish: each label's own complement, and what both have for the rest
            rest = (n, m, sum1, sum2, sumx, mean, m2, sw, swx)
            of_a, base_a, d_a, f_a, x_b, e_b = _with_class(rest, z_b, w_b, apart & (y_b >= 0))
            of_b, base_b, d_b, f_b, x_a, e_a = _with_class(rest, z_a, w_a, apart & (y_a >= 0))
            loss_a, ce_a, div_a, a_a, p_a, e0_a, ew_a, g_a = _loss_of(of_a, base_a, first, options, KIND, SMOOTH, Z_LOSS)
            loss_b, ce_b, div_b, a_b, p_b, e0_b, ew_b, g_b = _loss_of(of_b, base_b, second, options, KIND, SMOOTH, Z_LOSS)
            if loss_ptr is not None:
                if REDUCTION == NONE:
                    _keep_rows(loss_ptr, parts_ptr, row, rows, loss_a + loss_b, ce_a + ce_b, div_a + div_b)
                else:
                    acc += loss_a + loss_b
                    acc_w += w_a * sample_a + w_b * sample_b
                    acc_ce += ce_a + ce_b
                    acc_div += div_a + div_b

            # ---- spread
            if g_ptr is not None:
                scale = tl.where(live, scale, 0.0)  # with no row that counts the mean's 1/0 stays out of the gradient
                on_a = tl.where(apart, _of_other((a_b, p_b, e0_b, ew_b), w_a, z_a, x_a, e_a, KIND, SMOOTH), g_b)
                on_b = tl.where(apart, _of_other((a_a, p_a, e0_a, ew_a), w_b, z_b, x_b, e_b, KIND, SMOOTH), g_a)
                g_a, g_b = _across((g_a + on_a) * scale), _across((g_b + on_b) * scale)
                _, a_a, p_a, e0_a = _lower((none, a_a, p_a, e0_a), d_a, f_a, KIND)
                _, a_b, p_b, e0_b = _lower((none, a_b, p_b, e0_b), d_b, f_b, KIND)
                a, p, e0 = _across((a_a + a_b) * scale), _across((p_a + p_b) * scale), _across((e0_a + e0_b) * scale)
                ew = _across((ew_a + ew_b) * scale)
                gradient = (g_ptr, _across(_offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)), tc)
                for i in range(0, end, A * B):
                    c = places + i
                    z = kept if WHOLE else _read_rest(logits, c, reads, label_a, label_b, K, DTYPE)
                    w = None
                    if SMOOTH and weight_ptr is not None:
                        w = tl.load(weight_ptr + c, mask=c < K, other=0.0)
                    x = z - base
                    dz = _spread_holes(_spread(x, _exp(x), w, a, p, e0, ew, KIND, SMOOTH), z, w, a, ew, SMOOTH)
                    dz = tl.where(c == label_a, g_a, tl.where(c == label_b, g_b, dz))
                    dz = dz.to(g_ptr.dtype.element_ty)
                    if P > 0:
                        _store_run(g_ptr, tile, rows, K, dz, A, R, B, P)
                    else:
                        tl.store(_at(gradient, c), dz, mask=(c < K) & _across(row < rows))
    if loss_ptr is not None and REDUCTION != NONE:
        _keep_totals(
            partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr,
            tl.sum(acc, 0), tl.sum(acc_w, 0), tl.sum(acc_ce, 0), tl.sum(acc_div, 0), REDUCTION,
        )  # fmt: skip
