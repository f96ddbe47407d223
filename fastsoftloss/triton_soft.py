"""Rows whose target is class probabilities.

The loss is the one expected over the label, sum_k u_k loss(k) with u = w t. D_k leaves class k out, and taken from the sums
over the whole row that is a subtraction, which cancels where k is most of a sum: of exps only the largest logit is, of
squares about the mean only the largest or the smallest. So these two, ``hi`` and ``lo``, stay out of the sums over the
rest; their own complements are merged from it, and every other class is left out of the whole. The penalty's gradient is
that of one RowGradient, the expectation of all, less at class k what k's own has no business giving it.

A program reads its rows in tiles [A, R, B], class a * B + b of row r, and where one tile is not the whole row once more for
each step; the rows of a program are few enough for a cache to hold them.
"""

# ruff: noqa: F821, SIM109 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    KL,
    LOGIT_VARIANCE,
    NONE,
    REVERSE_KL,
    VARIANCE,
    _across,
    _exp,
    _exp_exact,
    _keep_rows,
    _keep_totals,
    _log_sum,
    _lower,
    _offset,
    _option,
    _penalty,
    _row_scale,
    _row_weights,
    _scale,
    _spread,
    _two_sum_error,
    _with,
)
from fastsoftloss.triton_kernels import _max, _sum


@triton.jit
def _root(a, b):
    """e^((a - b) / 2), a <= b, the rounding of a - b put back; 0 where a is -inf."""
    d = a - b
    there = d > -1e30
    return tl.where(there, _exp_exact(tl.where(there, 0.5 * d, 0.0), tl.where(there, 0.5 * _two_sum_error(a, -b, d), 0.0)), 0.0)


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
def _read_target(target, c, reads, K, SMOOTH: tl.constexpr, DTYPE: tl.constexpr):
    """(u, v) of classes c: w t, and the same with label smoothing.

    target: (probabilities, which lie as ``_at`` has them, label smoothing's factor and share, class weights).
    """
    probabilities, smooth, weight_ptr = target
    w = None
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=c < K, other=0.0)
    u = tl.load(_at(probabilities, c), mask=(c < K) & reads, other=0.0).to(DTYPE)
    if w is not None:
        u *= w
    if SMOOTH:
        if w is None:
            return u, smooth[0] * u + tl.where(c < K, smooth[1], 0.0)
        else:
            return u, smooth[0] * u + smooth[1] * w
    else:
        return u, u


@triton.jit
def _read_tile(logits, target, ends, c, reads, K, SMOOTH: tl.constexpr, DTYPE: tl.constexpr):
    """(z, u, v, who is of the rest, x = z - m and e^x of those, 0 of the others) of classes c. ends: (hi, lo, m)."""
    hi, lo, m = ends
    z = _read(logits, c, reads, K, DTYPE)
    u, v = _read_target(target, c, reads, K, SMOOTH, DTYPE)
    rest = (z != -float("inf")) & (c != hi) & (c != lo)
    x = tl.where(rest, z - m, 0.0)
    return z, u, v, rest, x, tl.where(rest, _exp(x), 0.0)


@triton.jit
def _of(n, inverse_n, s1, s2, sx, mean, m2, s, p_y, KIND: tl.constexpr):
    """``_penalty`` with A itself."""
    s1 = tl.where(n > 1.0, s1, 1.0)  # of one class it may be anything, and has no spread
    inverse_s1 = 1.0 / s1
    div, a, p, e0, g_y = _penalty(n, inverse_n, s1, inverse_s1, s2, sx, mean, m2, s, p_y, KIND)
    if KIND != LOGIT_VARIANCE:  # a product with 0 is not left out by itself
        a *= inverse_s1
    return div, a, p, e0, g_y


@triton.jit
def _slope(of, x, e, KIND: tl.constexpr):
    """What the row gradient of ``_of`` gives a class with x and e^x."""
    return _spread(x, e, None, of[1], of[2], of[3], 0.0, KIND, False)


@triton.jit
def _without(x, e, whole_row, KIND: tl.constexpr):
    """``_of`` all classes but one, which is neither the largest nor the smallest."""
    n, inverse_left, s1, s2, sx, mean, m2, p_hi = whole_row
    d = x - mean
    left = s1 - e
    s2 -= e * e
    sx -= e * x
    m2 -= d * d * (n * inverse_left)
    return _of(n - 1.0, inverse_left, left, s2, sx, mean - d * inverse_left, m2, left * p_hi, e * p_hi, KIND)


@triton.jit
def _add(sums, u, of):
    """sums + u of: D, and A, P, E0 of its row gradient. Of classes [A, R, B] their sum."""
    div, a, p, e0 = u * of[0], u * of[1], u * of[2], u * of[3]
    if len(u.shape) == 3:
        div, a, p, e0 = _sum(div), _sum(a), _sum(p), _sum(e0)
    return sums[0] + div, sums[1] + a, sums[2] + p, sums[3] + e0


@triton.jit(do_not_specialize=["rows", "classes"])
def soft(
    z_ptr, g_ptr, target_ptr, weight_ptr, sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr, divisor_ptr, shares_ptr, counter_ptr,
    rows, classes, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, u0, u1, u2, u3, uc, sample_stride, upstream_stride,
    smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    DIMS: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The loss, and the gradient where g_ptr is given; pointers as ``triton_kernels.resident`` has them.

    u0..u3, uc: strides of the probabilities over the rows and classes.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    ENDS: tl.constexpr = KIND == LOGIT_VARIANCE or KIND == REVERSE_KL
    end = K if A * B >= K else classes  # the same, but a number that is known would have the loops unrolled
    inf = float("inf")
    none = tl.zeros((R,), DTYPE)
    column = tl.expand_dims(tl.expand_dims(tl.arange(0, A) * B, 1), 1) + tl.expand_dims(tl.expand_dims(tl.arange(0, B), 0), 0)  # [A, 1, B]
    acc, acc_w, acc_ce, acc_div = none, none, none, none
    scale_all, work_all = _scale(shares_ptr, divisor_ptr, upstream_ptr, SHARES, UPSTREAM_ROWS, RESCALE, DTYPE)
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale, work = _row_scale(scale_all, work_all, upstream_ptr, row, rows, upstream_stride, UPSTREAM_ROWS, RESCALE)
        if work:
            here = row < rows
            sample = _row_weights(None, sample_ptr, row, rows, sample_stride, row, here, DTYPE)[1]
            reads = _across(here)
            eps = _option(smoothing, none)
            probabilities = (target_ptr, _across(_offset(row, n1, n2, n3, u0, u1, u2, u3, DIMS)), uc)
            target = (probabilities, (_across(1.0 - eps), _across(eps * (1.0 / max(K, 1)))), weight_ptr)
            logits = (z_ptr, _across(_offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)), sc)

            # ---- the two largest logits, the smallest, and what the mean of the others is near
            z_hi, second, z_lo, total, n = none - inf, none - inf, none + inf, none, none
            hi = tl.full((R,), K, tl.int32)
            lo = tl.full((R,), -1, tl.int32)
            for i in range(0, end, A * B):
                c = column + i
                z = _read(logits, c, reads, K, DTYPE)
                there = z != -inf
                top = _max(z)
                at = tl.min(tl.min(tl.where(z == _across(top), c, K), axis=0), axis=1)
                second = tl.maximum(tl.maximum(second, tl.minimum(top, z_hi)), _max(tl.where(c == _across(at), -inf, z)))
                hi = tl.where(top > z_hi, at, hi)
                z_hi = tl.maximum(z_hi, top)
                n += _sum(tl.where(there, 1.0, 0.0).to(DTYPE))
                if ENDS:
                    bottom = -_max(tl.where(there, -z, -inf))
                    at = _max(tl.where(there & (z == _across(bottom)), c, -1))
                    lo = tl.where((bottom <= z_lo) & (at >= 0), at, lo)
                    z_lo = tl.minimum(z_lo, bottom)
                    total += _sum(tl.where(there, z, 0.0))
            n_lo = none
            if ENDS:
                n_lo = tl.where(n > 1.0, 1.0, 0.0).to(DTYPE)
                lo = tl.where(n > 1.0, lo, -1)
                z_lo = tl.where(n > 1.0, z_lo, -inf)
            else:
                z_lo = none - inf
            n_rest = n - 1.0 - n_lo
            m = tl.where(n_rest > 0.0, second, z_hi)
            inverse_rest = 1.0 / tl.maximum(n_rest, 1.0)
            about = none
            if ENDS:
                about = (total - z_hi - tl.where(n_lo > 0.0, z_lo, 0.0)) * inverse_rest - m

            # ---- reduce: the moments of the rest about m, and the sums over the labels
            hi_, lo_, about_ = _across(hi), _across(lo), _across(about)
            ends = (hi_, lo_, _across(m))
            sum1, sum2, sumx, dev1, dev2 = none, none, none, none, none
            u, v_others, vx = none, none, none
            for i in range(0, end, A * B):
                c = column + i
                z, u_k, v_k, rest, x, e = _read_tile(logits, target, ends, c, reads, K, SMOOTH, DTYPE)
                sum1 += _sum(e)
                if KIND == CHI2 or KIND == VARIANCE:
                    sum2 += _sum(e * e)
                if KIND == KL:
                    sumx += _sum(e * x)
                if ENDS:
                    from_mean = tl.where(rest, x - about_, 0.0)
                    dev1 += _sum(from_mean)
                    dev2 += _sum(from_mean * from_mean)
                v_k = tl.where(c == hi_, 0.0, v_k)
                v_others += _sum(v_k)
                vx += _sum(tl.where(v_k == 0.0, 0.0, v_k * (z - ends[2])))  # 0 log 0 is 0, and log 0 is -inf
                if Z_LOSS:
                    u += _sum(u_k)
            u_hi, v_hi = _read_target(target, hi_, reads, K, SMOOTH, DTYPE)
            u_hi, v_hi, u_lo, v_lo = _sum(u_hi), _sum(v_hi), none, none
            if ENDS:
                u_lo, v_lo = _read_target(target, tl.maximum(lo_, 0), reads, K, SMOOTH, DTYPE)
                u_lo, v_lo = tl.where(n_lo > 0.0, _sum(u_lo), 0.0), tl.where(n_lo > 0.0, _sum(v_lo), 0.0)

            # ---- finish: cross-entropy, from the largest class's margin
            d = m - z_hi
            root = _root(m, z_hi)
            f = root * root
            below = root * (root * sum1)  # where f itself may be out of range
            root = _root(z_lo, z_hi)
            e_lo = root * root
            x_lo = tl.where(n_lo > 0.0, z_lo - z_hi, 0.0)
            odds = below + e_lo
            whole = 1.0 + odds
            p_hi = 1.0 / whole
            s_hi = odds * p_hi
            log1p = _log_sum(odds, whole, odds > 1.0)
            lse = z_hi + log1p
            v = v_others + v_hi
            ce = v * log1p - vx - v_others * d
            loss = ce
            pull = v
            g_hi = tl.where(odds > 1.0, v * p_hi - v_hi, v_others - v * s_hi)  # the one that does not cancel
            if Z_LOSS:
                slope = 2.0 * _option(z_loss, none) * u * lse
                loss += 0.5 * slope * lse
                pull += slope
                g_hi += slope * p_hi
            g_lo = pull * e_lo * p_hi - v_lo
            a, p, e0, div = pull * f * p_hi, none, none, none

            # ---- finish: the penalty expected over the labels that are neither hi nor lo
            weigh = _option(diversity_weight, none)
            weighs = diversity_weight != 0.0  # only looked at: an infinite penalty times 0 must not appear
            several = n > 2.0  # nothing to spread among fewer than two classes besides the label
            u_hi = tl.where(several, u_hi, 0.0)
            u_lo = tl.where(several, u_lo, 0.0)
            if KIND != 0:
                shift = dev1 * inverse_rest
                mean = about + shift  # of the rest, about m
                dev = dev2 - n_rest * shift * shift
                inverse_n = 1.0 / tl.maximum(n, 1.0)
                inverse_left = 1.0 / tl.maximum(n - 1.0, 1.0)
                mean_lo, dev_lo = _with(n_rest, mean + d, dev, 1.0, 0.0, inverse_left)  # of all but the smallest, about z_hi
                mean_all, dev_all = _with(n_rest + 1.0, mean_lo, dev_lo, n_lo, x_lo, inverse_n)
                sum2_all = 1.0 + f * f * sum2
                sumx_all = f * (sumx + d * sum1)
                whole_row = (
                    _across(n), _across(inverse_left), _across(whole), _across(sum2_all), _across(sumx_all),
                    _across(mean_all), _across(dev_all), _across(p_hi),
                )  # fmt: skip
                d_, f_, several_ = _across(d), _across(f), _across(several)
                most = (none, none, none, none)
                for i in range(0, end, A * B):
                    z, u_k, v_k, rest, x, e = _read_tile(logits, target, ends, column + i, reads, K, SMOOTH, DTYPE)
                    most = _add(most, tl.where(rest & several_, u_k, 0.0), _without(x + d_, f_ * e, whole_row, KIND))
                if weighs:
                    g_lo += weigh * _slope(most, x_lo, e_lo, KIND)
                if ENDS:
                    # the smallest's complement, about z_hi: the rest and the largest
                    of_lo = _of(n - 1.0, inverse_left, 1.0 + below, none, none, mean_lo, dev_lo, none, none, KIND)
                    most = _add(most, u_lo, of_lo)
                # the largest's complement, about m: the rest and the smallest
                x_k = tl.where(n_lo > 0.0, z_lo - m, 0.0)
                root = _root(z_lo, m)
                e_k = root * root
                mean_k, dev_k = _with(n_rest, mean, dev, n_lo, x_k, inverse_left)
                of_hi = _of(n - 1.0, inverse_left, sum1 + e_k, sum2, sumx, mean_k, dev_k, s_hi, p_hi, KIND)
                if weighs:
                    g_hi += weigh * (u_hi * of_hi[4] + _slope(most, none, none + 1.0, KIND))
                    g_lo += weigh * (u_hi * _slope(of_hi, x_k, e_k, KIND))
                div, a_, p_, e0_ = _add(_lower(most, d, f, KIND), u_hi, of_hi)
                if weighs:
                    a += weigh * a_
                    p += weigh * p_
                    e0 += weigh * e0_
                    loss += weigh * div

            # NaN and +inf make the whole row NaN, as in PyTorch
            on = tl.where((sum1 != sum1) | (z_hi == inf) | (z_hi == -inf), float("nan"), sample)
            if loss_ptr is not None:
                loss = tl.where(here, loss * on, 0.0)
                ce = tl.where(here, ce * on, 0.0)
                div = tl.where(here, div * on, 0.0)
                if REDUCTION == NONE:
                    _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div)
                else:
                    acc += loss
                    acc_w += sample
                    acc_ce += ce
                    acc_div += div

            # ---- spread
            if g_ptr is not None:
                scale = tl.where(here, scale * on, 0.0)
                row_gradient = (None, _across(a), _across(p), _across(e0))
                g_hi_, g_lo_, scale_ = _across(g_hi), _across(g_lo), _across(scale)
                gradient = (g_ptr, _across(_offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)), tc)
                for i in range(0, end, A * B):
                    c = column + i
                    z, u_k, v_k, rest, x, e = _read_tile(logits, target, ends, c, reads, K, SMOOTH, DTYPE)
                    dz = _slope(row_gradient, x, e, KIND)
                    if KIND != 0:
                        x += d_
                        e *= f_
                        of_k = _without(x, e, whole_row, KIND)
                        if weighs:
                            dz -= tl.where(several_, _across(weigh) * u_k, 0.0) * (_slope(of_k, x, e, KIND) - of_k[4])
                    dz = tl.where(rest, dz, 0.0) - v_k
                    dz = tl.where(c == hi_, g_hi_, tl.where(c == lo_, g_lo_, dz)) * scale_
                    tl.store(_at(gradient, c), dz.to(g_ptr.dtype.element_ty), mask=(c < K) & _across(here))
    if loss_ptr is not None and REDUCTION != NONE:
        _keep_totals(
            partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr,
            tl.sum(acc, 0), tl.sum(acc_w, 0), tl.sum(acc_ce, 0), tl.sum(acc_div, 0), REDUCTION,
        )  # fmt: skip
