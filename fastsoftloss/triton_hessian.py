"""Hessian-vector products: the gradient's tangent along a direction v, which a gradient penalty asks for.

After reduce the sums of v, by which every moment has a tangent; finish gives the row gradient and its tangent; spread of the
one and of the other: (H v)_j is what dz_j changes by through the row's scalars, and v_j times what it changes by through its
own x_j. A row of two labels is one row twice, each with a complement of its own.

Tiles are [A, R, B], class a * B + b of row r. One that is the whole row is read once, with few classes of contiguous rows as
one run of memory; of longer rows a program reads tile after tile, once for each step.
"""

# ruff: noqa: F821, RUF005, SIM109 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    KL,
    LOGIT_VARIANCE,
    NONE,
    REVERSE_KL,
    SUM,
    VARIANCE,
    _across,
    _cross_entropy,
    _each_across,
    _exp,
    _finish,
    _finite,
    _keep_rows,
    _keep_totals,
    _left_out,
    _logits_of,
    _offset,
    _option,
    _penalty,
    _quotient,
    _row_labels,
    _scale,
    _scaled,
    _spread,
    _two_sum_error,
)
from fastsoftloss.triton_kernels import _dot, _load_run, _max, _store_run, _sum


@triton.jit
def _at(rows, c):
    """Pointers to classes c [A, R, B] of rows: (pointer, where each row begins, class stride)."""
    ptr, start, stride = rows
    lane = tl.expand_dims(tl.expand_dims(tl.arange(0, c.shape[2]), 0), 0)
    # by way of each lane's first: from there on the steps are constants, which take no register
    return ptr + (start + lane.to(tl.int64) * stride) + (c - lane).to(tl.int64) * stride


@triton.jit
def _read(logits, c, reads, K, DTYPE: tl.constexpr):
    """Logits [A, R, B], which lie as ``_at`` has them; -inf beyond the classes, 0 in a row that asks for nothing."""
    nothing = tl.where(reads, -float("inf"), 0.0)
    return tl.load(_at(logits, c), mask=(c < K) & reads, other=nothing).to(DTYPE)


@triton.jit
def _read_both(logits, direction, c, reads, K, DTYPE: tl.constexpr):
    """(z, v) of classes c, which lie as ``_at`` has them."""
    v = tl.load(_at(direction, c), mask=(c < K) & reads, other=0.0).to(DTYPE)
    return _read(logits, c, reads, K, DTYPE), v


@triton.jit
def _tile(whole, logits, direction, c, reads, K, DTYPE: tl.constexpr):
    """(z, v) of classes c: the whole row's, where it is given."""
    if whole is None:
        return _read_both(logits, direction, c, reads, K, DTYPE)
    else:
        return whole


@triton.jit
def _complement(z, c, y, base):
    """(who is of the complement of class y, x = z - base and e^x of those, 0 of the others)."""
    inside = (z != -float("inf")) & (c != y)
    x = tl.where(inside, z - base, 0.0)
    return inside, x, tl.where(inside, _exp(x), 0.0)


@triton.jit
def _penalty_along(n, inverse_n, inverse_s1, values, s2, v2, vx, mean_v, v, s, p_y, d, KIND: tl.constexpr):
    """The tangents of (A S1, P, E0, dz_y), which ``_penalty`` gives as ``values``; d: the margin's.

    s2, v2, vx: sums of e^2x, e^2x v and e^x x v; mean_v: of v by e^x; v: its sum.
    """
    _, a, p, _, _ = values
    a_v = tl.zeros_like(mean_v)
    p_v = a_v
    e0_v = a_v
    g_v = a_v
    if KIND == LOGIT_VARIANCE:
        e0_v = -p * _quotient(v, n)
    elif KIND == KL:
        a_v = -(vx * inverse_s1 + (1.0 + a) * mean_v)
        p_v = -p * mean_v
    elif KIND == CHI2 or KIND == VARIANCE:
        q2 = s2 * inverse_s1 * inverse_s1
        q2_v = 2.0 * (v2 * inverse_s1 * inverse_s1 - q2 * mean_v)
        if KIND == CHI2:
            a_v = -2.0 * n * q2_v
            p_v = -2.0 * p * mean_v
        else:
            k = 2.0 * s * s
            k_v = 2.0 * p_y * d  # over k
            v_q = (q2 - inverse_n) * inverse_n
            pull_v = p_y * (q2_v * inverse_n - s * d * v_q)  # of p_y v_q
            a_v = k_v * a + k * (pull_v - q2_v * inverse_n)
            p_v = (k_v - 2.0 * mean_v) * p
            g_v = -k * (k_v * p_y * v_q + pull_v)
    return a_v, p_v, e0_v, g_v


@triton.jit
def _finish_along(
    moments, sums, m, z_y, v_y, label, options, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """Moments and the sums of v -> (<dL/dz, v>, and of H v: that of the true class, what the complement shares, what each v meets).

    The last two are (A, P, E0) as spread takes them.
    """
    n, inverse_n, s1, s2, sx, sw = moments
    v1, v2, vx, dv, v, wv = sums
    _, w_y, sample, counted, good = label
    K, smoothing, diversity_weight, z_loss = options
    zero = tl.zeros_like(s1)
    s1 = tl.where(s1 == 0.0, 1.0, s1)
    margin = m - z_y
    error = _two_sum_error(m, -z_y, margin)
    _, _, _, a, _, _, ew, g_y = _finish(
        n, inverse_n, _finite(m), z_y, margin, error, s1, s2, sx, zero, zero, sw, zero, w_y, sample, counted, good,
        K, smoothing, 0.0, z_loss, 0, SMOOTH, Z_LOSS,
    )  # fmt: skip
    _, s, p_y, inverse_s1, _ = _cross_entropy(margin, error, s1)
    mean_v = v1 * inverse_s1
    d = mean_v - v_y
    lse_v = s * mean_v + p_y * v_y

    # cross-entropy: s q_j and -s change by s q_j (v_j - lse_v) and -s p_y d, in which nothing cancels where s or p_y is near 0
    slope = a * v1 + g_y * v_y
    a_v = -a * lse_v
    g_v = -a * s1 * (p_y * d)
    if SMOOTH:
        slope -= ew * wv
    w = tl.where(counted & good, w_y * sample, 0.0)
    if Z_LOSS:
        k = 2.0 * _option(z_loss, s1) * w * lse_v
        a_v += k * s * inverse_s1
        g_v += k * p_y

    p, e0, p_v, e0_v = zero, zero, zero, zero
    if KIND != 0:
        several = n > 1.0  # nothing to spread among fewer than two classes
        k = tl.where(several, _option(diversity_weight, s1) * w, 0.0)
        n = tl.where(several, n, 1.0)
        values = _penalty(n, inverse_n, s1, inverse_s1, s2, sx, zero, zero, s, p_y, KIND)
        d_av, d_pv, d_e0v, d_gv = _penalty_along(n, inverse_n, inverse_s1, values, s2, v2, vx, mean_v, v, s, p_y, d, KIND)
        _, d_a, d_p, d_e0, d_y = values
        if KIND == LOGIT_VARIANCE:
            slope += k * (d_p * dv)
        elif KIND == KL:
            slope += k * (d_a * mean_v + d_p * vx)
        elif KIND == REVERSE_KL:
            slope += k * (mean_v + d_e0 * v)
        else:
            slope += k * (d_a * mean_v + d_p * v2 + d_y * v_y)
        a += k * d_a * inverse_s1
        a_v += k * (d_av - d_a * mean_v) * inverse_s1
        p, p_v, e0_v = k * d_p, k * d_pv, k * d_e0v
        g_v += k * d_gv
    # what dz_j changes by with its own x
    if KIND == LOGIT_VARIANCE:
        p, e0 = zero, p
    elif KIND == KL:
        a += p
    else:
        p *= 2.0
    return slope, g_v, (a_v, p_v, e0_v), (a, p, e0)


@triton.jit
def _curvature(z, c, v, of_label, KIND: tl.constexpr):
    """What one label makes of H v. of_label: (its class, the base, and of H v what ``_finish_along`` gives)."""
    y, base, g_v, shared, own = of_label
    inside, x, e = _complement(z, c, y, base)
    if KIND == KL:
        x = tl.maximum(x, -1e4)  # e^x is 0 long before, and x P may not be infinite
    h = _spread(x, e, None, shared[0], shared[1], shared[2], 0.0, KIND, False)
    h += v * _spread(x, e, None, own[0], own[1], own[2], 0.0, KIND, False)
    h = tl.where(inside, h, shared[0] * 0.0)  # NaN in a NaN row
    return tl.where(c == y, g_v, h)


@triton.jit(do_not_specialize=["rows", "classes"])
def hessian(
    z_ptr, g_ptr, v_ptr, target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, upstream_ptr, slope_ptr, partials_ptr,
    shares_ptr, counter_ptr,
    rows, classes, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, u0, u1, u2, u3, uc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    DIMS: tl.constexpr, SHARES: tl.constexpr, A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """g_ptr: H v times the upstream gradient; slope_ptr: <dL/dz, v>, a row or summed as ``triton_kernels.resident`` sums the loss.

    u0..u3, uc: strides of v over the rows and classes. upstream_stride: 0 where one is that of all rows. P: elements of the run
    that logits, v and H v are each read and written by, all contiguous, or 0.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    end = K if A * B >= K else classes  # the same, but a number that is known would have the loops unrolled
    inf = float("inf")
    none = tl.zeros((R,), DTYPE)
    acc = none
    targets = (target_ptr, other_ptr, target_stride)
    samples = (sample_ptr, other_sample_ptr, sample_stride)
    options = (K, smoothing, diversity_weight, z_loss)
    column = tl.expand_dims(tl.expand_dims(tl.arange(0, A) * B, 1), 1) + tl.expand_dims(tl.expand_dims(tl.arange(0, B), 0), 0)  # [A, 1, B]
    scale_all = _scale(shares_ptr, None, None, SHARES, False, False, DTYPE)[0]
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        here = row < rows
        labels = _row_labels(targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES, DTYPE)
        upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=here, other=0.0)
        z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
        v_row = _offset(row, n1, n2, n3, u0, u1, u2, u3, DIMS)
        logits = (z_ptr, _across(z_row), sc)
        direction = (v_ptr, _across(v_row), uc)
        slope = none
        reads = _across(_left_out(labels)[2])
        whole = None
        if P != 0:
            logits_run = _load_run(z_ptr, tile, rows, K, A, R, B, P)[0].to(DTYPE)
            direction_run = _load_run(v_ptr, tile, rows, K, A, R, B, P)[0].to(DTYPE)
            asked = (column < K) & reads
            whole = (tl.where(asked, logits_run, tl.where(reads, -inf, 0.0)), tl.where(asked, direction_run, 0.0))
        elif A * B >= K:
            whole = _read_both(logits, direction, column, reads, K, DTYPE)
        found = ()
        for i in tl.static_range(len(labels)):
            live = labels[i][3] & labels[i][4]
            y = _across(labels[i][0])
            if whole is None:
                z_y, v_y = _logits_of(z_ptr, z_row, sc, labels, DTYPE)[i], _logits_of(v_ptr, v_row, uc, labels, DTYPE)[i]
            else:
                z_y, v_y = _sum(tl.where(column == y, whole[0], 0.0)), _sum(tl.where(column == y, whole[1], 0.0))

            # ---- the largest logit of the complement, and what its mean is near
            m, n, total = none - inf, none, none
            for k in range(0, end, A * B):
                c = column + k
                z = _read(logits, c, reads, K, DTYPE) if whole is None else whole[0]
                inside = (z != -inf) & (c != y)
                m = tl.maximum(m, _max(tl.where(inside, z, -inf)))
                if KIND != 0:
                    n += _sum(tl.where(inside, 1.0, 0.0).to(DTYPE))
                if KIND == LOGIT_VARIANCE:
                    total += _sum(tl.where(inside, z, 0.0))
            base = _finite(m)
            inverse_n = _quotient(none + 1.0, tl.maximum(n, 1.0))
            base_, about_ = _across(base), _across(total * inverse_n - base)

            # ---- reduce: the moments, and the sums of v that are their tangents
            sum1, sum2, sumx, sumw, dev = none, none, none, none, none
            v1, v2, vx, dv, v_all, wv = none, none, none, none, none, none
            for k in range(0, end, A * B):
                c = column + k
                z, v = _tile(whole, logits, direction, c, reads, K, DTYPE)
                inside, x, e = _complement(z, c, y, base_)
                if SMOOTH:
                    others = (c < K) & (c != y)
                    if weight_ptr is None:
                        sumw += _sum(tl.where(others, 1.0, 0.0).to(DTYPE))
                        wv += _sum(tl.where(others, v, 0.0))
                    else:
                        w = tl.load(weight_ptr + c, mask=others, other=0.0)
                        sumw += _sum(w)
                        wv += _sum(tl.where(others, w * v, 0.0))
                v = tl.where(inside, v, 0.0)
                ev = e * v
                sum1 += _sum(e)
                v1 += _dot(e, v, inside)
                if KIND == CHI2 or KIND == VARIANCE:
                    sum2 += _dot(e, e, inside)
                    v2 += _dot(e, ev, inside)
                if KIND == KL:
                    sumx += _dot(e, x, inside)
                    vx += _dot(ev, x, inside)
                if KIND == LOGIT_VARIANCE:
                    from_mean = tl.where(inside, x - about_, 0.0)
                    dev += _sum(from_mean)
                    dv += _dot(from_mean, v, inside)
                if KIND == LOGIT_VARIANCE or KIND == REVERSE_KL:
                    v_all += _sum(v)
            dv -= dev * inverse_n * v_all  # from the mean itself

            # ---- finish
            moments = (n, inverse_n, sum1, sum2, sumx, sumw)
            slope_i, g_v, shared, own = _finish_along(
                moments, (v1, v2, vx, dv, v_all, wv), m, z_y, v_y, labels[i], options, KIND, SMOOTH, Z_LOSS
            )
            # a mean's 1/0 where no row counts stays out of the gradient, and so does what comes from above for a row that does not
            slope += tl.where(live, slope_i * scale_all, 0.0)
            scale = tl.where(live, scale_all * upstream, 0.0)
            found = found + ((y, base_, _across(g_v * scale), _each_across(_scaled(shared, scale)), _each_across(_scaled(own, scale))),)
        if REDUCTION == NONE:
            _keep_rows(slope_ptr, None, row, rows, slope, slope, slope)
        else:
            acc += slope

        # ---- spread
        gradient = (g_ptr, _across(_offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)), tc)
        for k in range(0, end, A * B):
            c = column + k
            z, v = _tile(whole, logits, direction, c, reads, K, DTYPE)
            h = _curvature(z, c, v, found[0], KIND)
            if len(labels) == 2:
                h += _curvature(z, c, v, found[1], KIND)
            h = h.to(g_ptr.dtype.element_ty)
            if P != 0:
                _store_run(g_ptr, tile, rows, K, h, A, R, B, P)
            else:
                tl.store(_at(gradient, c), h, mask=(c < K) & _across(here))
    if REDUCTION != NONE:
        total = tl.sum(acc, 0)
        _keep_totals(partials_ptr, None, slope_ptr, None, counter_ptr, total, total, total, total, SUM)
