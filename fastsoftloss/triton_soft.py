"""Rows whose target is class probabilities.

The loss is the one expected over the label, sum_k u_k loss(k) with u = w t. D_k leaves class k out, and taken from the sums
over the whole row that is a subtraction, which cancels where k is most of a sum: of exps only the largest logit is, of
squares about the mean only the largest or the smallest. So these two, ``hi`` and ``lo``, stay out of the sums over the
rest; their own complements are merged from it, and every other class is left out of the whole. The penalty's gradient is
that of one RowGradient, the expectation of all, less at class k what k's own has no business giving it.

Nobody asks where they are: hi is what exceeds the second largest, m, and lo what the second smallest exceeds, and if there are two
of a kind neither is most of anything. In the sums each stands in as the value it is clamped to, which is taken out again.
The variance of the logits has sums over the labels in closed form, u, u d and u d^2; the other penalties divide by what
each class leaves, and go through them one by one.

A program reads its rows in tiles [A, R, L, V], class (a L + l) V + v of row r: once where a tile is the row, else once more for
each step; the rows of a program are few enough for a cache to hold them.
"""

# ruff: noqa: F821, SIM108, SIM109 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    INTERPRETED,
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


@triton.jit
def _rows(row_scalar):
    """[R] -> [1, R, 1, 1]"""
    return tl.expand_dims(_across(row_scalar), 3)


@triton.jit
def _sum(t):
    """[A, R, L, V] -> [R]"""
    return tl.sum(tl.sum(tl.sum(t, 0), 2), 1)


@triton.jit
def _larger(a, a_, b, b_):
    """The two largest of two pairs in descending order; NaN is nothing."""
    return tl.maximum(a, b), tl.maximum(tl.maximum(tl.minimum(a, b), a_), b_)


@triton.jit
def _smaller(a, a_, b, b_):
    """The two smallest of two pairs in ascending order."""
    return tl.minimum(a, b), tl.minimum(tl.minimum(tl.maximum(a, b), a_), b_)


@triton.jit
def _two_largest(z):
    """[A, R, L, V] -> [R] each; the second is NaN where there is but one."""
    if INTERPRETED:  # whose reductions of pairs take a second each
        top = tl.max(tl.max(tl.max(z, 0), 2), 1)
        is_top = z == _rows(top)
        other = tl.where(is_top, -float("inf"), z)
        return top, tl.where(_sum(tl.where(is_top, 1.0, 0.0)) > 1.0, top, tl.max(tl.max(tl.max(other, 0), 2), 1))
    else:
        t = tl.reduce((z, tl.full(z.shape, float("nan"), z.dtype)), 0, _larger)
        return tl.reduce(tl.reduce(t, 2, _larger), 1, _larger)


@triton.jit
def _two_smallest(z):
    if INTERPRETED:
        top, second = _two_largest(-z)
        return -top, -second
    else:
        t = tl.reduce((z, tl.full(z.shape, float("nan"), z.dtype)), 0, _smaller)
        return tl.reduce(tl.reduce(t, 2, _smaller), 1, _smaller)


@triton.jit
def _root(a, b):
    """e^((a - b) / 2), a <= b, the rounding of a - b put back; 0 where a is -inf."""
    d = a - b
    there = d > -1e30
    return tl.where(there, _exp_exact(tl.where(there, 0.5 * d, 0.0), tl.where(there, 0.5 * _two_sum_error(a, -b, d), 0.0)), 0.0)


@triton.jit
def _at(rows, c, V: tl.constexpr):
    """Pointers to classes c [A, R, L, V] of rows: (pointer, where each row begins, a multiple of V, class stride)."""
    ptr, start, stride = rows
    lane = tl.expand_dims(tl.expand_dims(tl.expand_dims(tl.arange(0, c.shape[2]) * V, 0), 0), 3)
    # by way of each lane's first: from there on the steps are constants, which take no register
    return ptr + (start // V * V + lane.to(tl.int64) * stride) + (c - lane).to(tl.int64) * stride


@triton.jit
def _read(place, c, reads, K, HELD: tl.constexpr, V: tl.constexpr, SMOOTH: tl.constexpr, DTYPE: tl.constexpr):
    """(z, u, v) of classes c: the logit, w t, and the same with label smoothing; beyond the classes -inf and 0.

    place: (logits, probabilities, which lie as ``_at`` has them, label smoothing's factor and share, class weights, a tile that is HELD).
    """
    logits, probabilities, smooth, weight_ptr, held = place
    if HELD:
        return held
    else:
        exists = c < K
        z = tl.load(_at(logits, c, V), mask=exists & reads, other=0.0).to(DTYPE)
        z = tl.where(exists, z, -float("inf"))
        w = None
        if weight_ptr is not None:
            w = tl.load(weight_ptr + c, mask=exists, other=0.0)
        u = tl.load(_at(probabilities, c, V), mask=exists & reads, other=0.0).to(DTYPE)
        if w is not None:
            u *= w
        v = u
        if SMOOTH:
            if w is None:
                v = smooth[0] * u + tl.where(exists, smooth[1], 0.0)
            else:
                v = smooth[0] * u + smooth[1] * w
        return z, u, v


@triton.jit
def _live(z, c, K, HOLES: tl.constexpr):
    """Which classes there are."""
    if HOLES:
        return z != -float("inf")
    else:
        return c < K


@triton.jit
def _below(z, m, live):
    """(z less m, of hi as of m itself, NaN of NaN; e^that) of the classes there are, else 0."""
    x = tl.where(live, tl.minimum(z, m, propagate_nan=tl.PropagateNan.ALL) - m, 0.0)
    return x, tl.where(live, _exp(x), 0.0)


@triton.jit
def _of_rest(u, x, low, live, HOLES: tl.constexpr):
    """u, 0 at hi, and that of lo and of masked classes 0 too."""
    u = tl.where(x < low, 0.0, u)
    if HOLES:
        u = tl.where(live, u, 0.0)
    return u


@triton.jit
def _ends(place, column, reads, end, K, HELD: tl.constexpr, HOLES: tl.constexpr, LO: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr):
    """(n, the two largest logits, the two smallest) of the classes there are; without LO the smallest alone."""
    A: tl.constexpr = column.shape[0]
    B: tl.constexpr = column.shape[2] * V
    inf = float("inf")
    none = tl.zeros((reads.shape[1],), DTYPE)
    n, z_hi, m, z_lo, low = none, none - inf, none - inf, none + inf, none + inf
    for i in range(0, end, A * B):
        c = column + i
        z, _, _ = _read(place, c, reads, K, HELD, V, False, DTYPE)
        top, next_ = _two_largest(z)
        z_hi, m = _larger(z_hi, m, top, next_)
        live = _live(z, c, K, HOLES)
        if HOLES:
            n += _sum(tl.where(live, 1.0, 0.0).to(DTYPE))
        z = tl.where(live, z, inf)
        if LO:
            bottom, next_ = _two_smallest(z)
            z_lo, low = _smaller(z_lo, low, bottom, next_)
        elif not HOLES:
            z_lo = tl.minimum(z_lo, tl.min(tl.min(tl.min(z, 0), 2), 1))
    if not HOLES:
        n += K
    return n, z_hi, m, z_lo, low


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
    """sums + u of: D, and A, P, E0 of its row gradient. Of classes [A, R, L, V] their sum."""
    div, a, p, e0 = u * of[0], u * of[1], u * of[2], u * of[3]
    if len(u.shape) == 4:
        div, a, p, e0 = _sum(div), _sum(a), _sum(p), _sum(e0)
    return sums[0] + div, sums[1] + a, sums[2] + p, sums[3] + e0


@triton.jit
def _loss(
    place, gradient, ends, column, reads, end, scale, sample, diversity_weight, z_loss, K,
    HELD: tl.constexpr, HOLES: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    V: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(loss, cross-entropy, D) of rows, and their gradient written where its pointer is given.

    ends: of ``_ends``. HELD: of ``_read``. HOLES: classes may be masked.
    """
    A: tl.constexpr = column.shape[0]
    B: tl.constexpr = column.shape[2] * V
    LO: tl.constexpr = KIND == LOGIT_VARIANCE or KIND == REVERSE_KL
    inf = float("inf")
    n, z_hi, m, z_lo, low = ends
    none = tl.zeros_like(n)
    several = n > 2.0  # nothing to spread among fewer than two classes besides the label
    m = tl.where(n > 1.0, m, z_hi)
    low = tl.where(several, low - m, -inf)  # as x; -inf: nothing is out at this end
    n_lo = none
    if LO:
        n_lo = tl.where(several, 1.0, 0.0).to(DTYPE)
    n_rest = n - 1.0 - n_lo
    m_, low_ = _rows(m), _rows(low)

    # ---- reduce: the moments of all but hi about m, of their logits of the rest, and the sums over the labels
    sum1, sum2, sumx, total = none - 1.0, none - 1.0, none, tl.where(n_lo > 0.0, -low, 0.0)  # less what stands in
    v_hi, v_others, vx, u_hi, u_others, u_rest, u_masked = none, none, none, none, none, none, none
    for i in range(0, end, A * B):
        c = column + i
        z, u_k, v_k = _read(place, c, reads, K, HELD, V, SMOOTH, DTYPE)
        live = _live(z, c, K, HOLES)
        x, e = _below(z, m_, live)
        sum1 += _sum(e)
        if KIND == CHI2 or KIND == VARIANCE:
            sum2 += _sum(e * e)
        if KIND == KL:
            sumx += _sum(e * x)
        is_hi = z > m_
        others = tl.where(is_hi, 0.0, v_k)
        v_hi += _sum(tl.where(is_hi, v_k, 0.0))
        v_others += _sum(others)
        if HOLES:
            vx += _sum(tl.where(others == 0.0, 0.0, others * (z - m_)))  # 0 log 0 is 0, and log 0 is -inf
        else:
            vx += _sum(others * x)
        if SMOOTH and (KIND != 0 or Z_LOSS):
            u_hi += _sum(tl.where(is_hi, u_k, 0.0))
            others = tl.where(is_hi, 0.0, u_k)
            u_others += _sum(others)
        if LO:
            total += _sum(tl.maximum(x, low_))
            u_rest += _sum(_of_rest(others, x, low_, live, HOLES))
            if HOLES:
                u_masked += _sum(tl.where(live, 0.0, others))
    if not SMOOTH:
        u_hi, u_others = v_hi, v_others

    # ---- finish: cross-entropy, from the largest class's margin
    d = m - z_hi
    root = _root(m, z_hi)
    f = root * root
    odds = root * (root * sum1)  # where f itself may be out of range
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
        slope = 2.0 * _option(z_loss, none) * (u_others + u_hi) * lse
        loss += 0.5 * slope * lse
        pull += slope
        g_hi += slope * p_hi
    g_lo = none
    a, p, e0, div = pull * f * p_hi, none, none, none
    own, own0 = none, none

    # ---- finish: the penalty expected over the labels that are neither hi nor lo
    weigh = _option(diversity_weight, none)
    weighs = diversity_weight != 0.0  # only looked at: an infinite penalty times 0 must not appear
    d_, f_ = _rows(d), _rows(f)
    if KIND != 0:
        u_hi = tl.where(several, u_hi, 0.0)
        inverse_n = 1.0 / tl.maximum(n, 1.0)
        inverse_left = 1.0 / tl.maximum(n - 1.0, 1.0)
        mean = total / tl.maximum(n_rest, 1.0)  # of the rest, about m
        mean_ = _rows(mean)
        x_lo = tl.where(n_lo > 0.0, z_lo - z_hi, 0.0)
        dev, u_d, u_dd = none, none, none
        if KIND == LOGIT_VARIANCE:
            from_low = tl.where(n_lo > 0.0, low - mean, 0.0)
            dev = -mean * mean - from_low * from_low  # what stands in, for hi and for lo
            for i in range(0, end, A * B):
                c = column + i
                z, u_k, _ = _read(place, c, reads, K, HELD, V, SMOOTH, DTYPE)
                live = _live(z, c, K, HOLES)
                x, _ = _below(z, m_, live)
                from_mean = tl.where(live, tl.maximum(x, low_) - mean_, 0.0)
                dev += _sum(from_mean * from_mean)
                u_k = _of_rest(tl.where(z > m_, 0.0, u_k), x, low_, live, HOLES) * from_mean
                u_d += _sum(u_k)
                u_dd += _sum(u_k * from_mean)
            dev = tl.maximum(dev, 0.0, propagate_nan=tl.PropagateNan.ALL)
        mean_lo, dev_lo = _with(n_rest, mean + d, dev, 1.0, 0.0, inverse_left)  # of all but the smallest, about z_hi
        mean_all, dev_all = _with(n_rest + 1.0, mean_lo, dev_lo, n_lo, x_lo, inverse_n)
        sum2_all = 1.0 + f * f * sum2
        sumx_all = f * (sumx + d * sum1)
        whole_row = (
            _rows(n), _rows(inverse_left), _rows(whole), _rows(sum2_all), _rows(sumx_all), _rows(mean_all), _rows(dev_all), _rows(p_hi),
        )  # fmt: skip
        several_ = _rows(several)
        most = (none, none, none, none)
        if KIND == LOGIT_VARIANCE:
            u_rest = tl.where(several, u_rest, 0.0)
            off = mean_all - (mean + d)
            about_all = u_d - off * u_rest
            left = u_rest * dev_all - (u_dd - off * (u_d + about_all)) * (n * inverse_left)
            p_ = 2.0 * inverse_left * u_rest
            most = (left * inverse_left, none, p_, 2.0 * inverse_left * inverse_left * about_all - p_ * mean_all)
            own = -2.0 * n * inverse_left * inverse_left
            own0 = own * (d - mean_all)
        else:
            for i in range(0, end, A * B):
                c = column + i
                z, u_k, _ = _read(place, c, reads, K, HELD, V, SMOOTH, DTYPE)
                live = _live(z, c, K, HOLES)
                x, e = _below(z, m_, live)
                rest = live & (z <= m_) & several_
                if LO:
                    rest = rest & (x >= low_)
                most = _add(most, tl.where(rest, u_k, 0.0), _without(x + d_, f_ * e, whole_row, KIND))
        if LO:
            rest_at_lo = _slope(most, x_lo, none, KIND)  # wanted of the variance alone
            # the smallest's complement, about z_hi: the rest and the largest
            root = _root(z_lo, z_hi)
            of_lo = _of(n - 1.0, inverse_left, whole - root * root, none, none, mean_lo, dev_lo, none, none, KIND)
            most = _add(most, tl.where(several, u_others - u_masked - u_rest, 0.0), of_lo)
        # the largest's complement, about m: the rest and the smallest
        x_k = tl.where(n_lo > 0.0, z_lo - m, 0.0)
        mean_k, dev_k = _with(n_rest, mean, dev, n_lo, x_k, inverse_left)
        of_hi = _of(n - 1.0, inverse_left, sum1, sum2, sumx, mean_k, dev_k, s_hi, p_hi, KIND)
        if weighs:
            g_hi += weigh * (u_hi * of_hi[4] + _slope(most, none, none + 1.0, KIND))
            if KIND == LOGIT_VARIANCE:
                g_lo = weigh * (rest_at_lo + u_hi * _slope(of_hi, x_k, none, KIND))
        div, a_, p_, e0_ = _add(_lower(most, d, f, KIND), u_hi, of_hi)
        if weighs:
            a += weigh * a_
            p += weigh * p_
            e0 += weigh * e0_
            loss += weigh * div

    # NaN and +inf make the whole row NaN, as in PyTorch
    on = tl.where((sum1 != sum1) | (z_hi == inf) | (z_hi == -inf), float("nan"), sample)

    # ---- spread
    if gradient[0] is not None:
        scale = scale * on
        weigh = tl.where(several & weighs, weigh * scale, 0.0)
        row_gradient = (None, _rows(a * scale), _rows(p * scale), _rows(e0 * scale))
        own_, own0_, g_lo_, g_hi_ = _rows(own * weigh), _rows(own0 * weigh), _rows(g_lo * scale), _rows(g_hi * scale)
        scale_, weigh_ = _rows(scale), _rows(weigh)
        for i in range(0, end, A * B):
            c = column + i
            z, u_k, v_k = _read(place, c, reads, K, HELD, V, SMOOTH, DTYPE)
            live = _live(z, c, K, HOLES)
            x, e = _below(z, m_, live)
            if KIND == LOGIT_VARIANCE:
                is_lo = x < low_
                dz = e * row_gradient[1] + tl.where(is_lo, g_lo_, x * row_gradient[2] + row_gradient[3])
                if HOLES:
                    dz = tl.where(live, dz, 0.0)
                    is_lo = is_lo | (live == 0)
                if SMOOTH:
                    dz += tl.where(is_lo, 0.0, x * own_ + own0_) * u_k - scale_ * v_k
                else:
                    dz += tl.where(is_lo, -scale_, x * own_ + (own0_ - scale_)) * u_k
            else:
                dz = _slope(row_gradient, x, e, KIND)
                if KIND != 0:
                    x += d_
                    e *= f_
                    of_k = _without(x, e, whole_row, KIND)
                    if weighs:
                        dz -= tl.where(several_, weigh_ * u_k, 0.0) * (_slope(of_k, x, e, KIND) - of_k[4])
                dz = tl.where(live, dz, 0.0) - scale_ * v_k
            dz = tl.where(z > m_, g_hi_, dz)
            tl.store(_at(gradient, c, V), dz.to(gradient[0].dtype.element_ty), mask=(c < K) & reads)
    return loss * on, ce * on, div * on


@triton.jit(do_not_specialize=["rows", "classes"])
def soft(
    z_ptr, g_ptr, target_ptr, weight_ptr, sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr, divisor_ptr, shares_ptr, counter_ptr,
    rows, classes, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, u0, u1, u2, u3, uc, sample_stride, upstream_stride,
    smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    DIMS: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The loss, and the gradient where g_ptr is given; pointers as ``triton_kernels.resident`` has them.

    u0..u3, uc: strides of the probabilities over the rows and classes. Every row of logits, probabilities and gradient begins
    at a multiple of V.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    LO: tl.constexpr = KIND == LOGIT_VARIANCE or KIND == REVERSE_KL
    HELD: tl.constexpr = A * L * V >= K
    end = K if HELD else classes  # the same, but a number that is known would have the loops unrolled
    none = tl.zeros((R,), DTYPE)
    column = tl.expand_dims(tl.expand_dims(tl.arange(0, A) * (L * V), 1), 2) + tl.expand_dims(tl.expand_dims(tl.arange(0, L) * V, 0), 2)
    column = tl.expand_dims(column + tl.expand_dims(tl.expand_dims(tl.arange(0, V), 0), 0), 1)  # [A, 1, L, V]
    acc, acc_w, acc_ce, acc_div = none, none, none, none
    scale_all, work_all = _scale(shares_ptr, divisor_ptr, upstream_ptr, SHARES, UPSTREAM_ROWS, RESCALE, DTYPE)
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale, work = _row_scale(scale_all, work_all, upstream_ptr, row, rows, upstream_stride, UPSTREAM_ROWS, RESCALE)
        if work:
            here = row < rows
            sample = _row_weights(None, sample_ptr, row, rows, sample_stride, row, here, DTYPE)[1]
            reads = _rows(here)
            eps = _option(smoothing, none)
            logits = (z_ptr, _rows(_offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)), sc)
            probabilities = (target_ptr, _rows(_offset(row, n1, n2, n3, u0, u1, u2, u3, DIMS)), uc)
            gradient = (g_ptr, _rows(_offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)), tc)
            place = (logits, probabilities, (_rows(1.0 - eps), _rows(eps * (1.0 / max(K, 1)))), weight_ptr, None)
            if HELD:
                place = (logits, probabilities, place[2], weight_ptr, _read(place, column, reads, K, False, V, SMOOTH, DTYPE))
            ends = _ends(place, column, reads, end, K, HELD, not HELD, LO, V, DTYPE)
            scale = tl.where(here, scale, 0.0)
            # masked classes are rare: only where the smallest logit shows one is anything asked of single elements
            sound = False
            if HELD:
                sound = tl.max((ends[3] == -float("inf")).to(tl.int32), 0) == 0
            if sound:
                loss, ce, div = _loss(
                    place, gradient, ends, column, reads, end, scale, sample, diversity_weight, z_loss, K,
                    HELD, False, KIND, SMOOTH, Z_LOSS, V, DTYPE,
                )  # fmt: skip
            else:
                if HELD:
                    ends = _ends(place, column, reads, end, K, HELD, True, LO, V, DTYPE)
                loss, ce, div = _loss(
                    place, gradient, ends, column, reads, end, scale, sample, diversity_weight, z_loss, K,
                    HELD, True, KIND, SMOOTH, Z_LOSS, V, DTYPE,
                )  # fmt: skip
            if loss_ptr is not None:
                loss, ce, div = tl.where(here, loss, 0.0), tl.where(here, ce, 0.0), tl.where(here, div, 0.0)
                if REDUCTION == NONE:
                    _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div)
                else:
                    acc += loss
                    acc_w += sample
                    acc_ce += ce
                    acc_div += div
    if loss_ptr is not None and REDUCTION != NONE:
        _keep_totals(
            partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr,
            tl.sum(acc, 0), tl.sum(acc_w, 0), tl.sum(acc_ce, 0), tl.sum(acc_div, 0), REDUCTION,
        )  # fmt: skip
