"""What the Triton kernels share: a row's labels, weights and place, finish (moments -> loss and row gradient), the formula
of spread, and the totals.

The definition is in ``reference.py``. The true class never enters a sum, and means are offsets from a logit near the
complement's, the base: x = z - base, S1 = sum e^x, S2 = sum e^2x, SX = sum e^x x, so nothing cancels. The gradient of a row is
dz_j = e^x (A + P e^x) + E0 - EW w_j, or with P x in place of P e^x (kl) or P x in place of E0 (logit_variance); a new
penalty is one case in ``_penalty``.
"""

# ruff: noqa: RUF005 (Triton has no tuple of stars)
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471824645996)
LN2_LOW = tl.constexpr(-1.904654323148236e-09)  # log(2) less its float32
LOG2E_LOW = tl.constexpr(1.9259629911266175e-8)  # log2(e) less its float32
NOWHERE = tl.constexpr(-(2**20))  # a class that is not there, nor a place of a row
TO_WHOLE = tl.constexpr(1.5 * 2**23 + 127)  # added to a float32 it leaves a whole number in the last bits, biased as exponents are

# the order of ops.DIVERSITIES and of ops.REDUCTIONS
LOGIT_VARIANCE = tl.constexpr(1)
KL = tl.constexpr(2)
REVERSE_KL = tl.constexpr(3)
CHI2 = tl.constexpr(4)
VARIANCE = tl.constexpr(5)
NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SUM = tl.constexpr(2)


# ---------------------------------------------------------------- scalars


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * LOG2E)


@triton.jit
def _fma(a, b, c):
    """a b + c, rounded once; the interpreter's own rounds twice."""
    if INTERPRETED and a.dtype == tl.float32:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


# A row's own exponential, logarithm and reciprocal are arithmetic: with ten classes a special function a row is a tenth of one
# a logit, and where many threads share a row each of them does this.


@triton.jit
def _exp_exact(x, low):
    """e^(x + low), x <= 0 and low a rounding of it, to the last digits of float32; 0 below e^-88."""
    if x.dtype == tl.float64:
        return tl.exp(x) * (1.0 + low)
    else:
        x = tl.maximum(x, -88.0, propagate_nan=tl.PropagateNan.ALL)
        log2e = tl.full(x.shape, LOG2E, tl.float32)
        shifted = _fma(x, log2e, tl.full(x.shape, TO_WHOLE, tl.float32))
        f = _fma(x, log2e, -(shifted - TO_WHOLE))
        f += x * LOG2E_LOW
        f += low * LOG2E
        p = 0.0001534581242594868 * f + 0.0013399930903688073
        p = p * f + 0.009618489071726799
        p = p * f + 0.05550328642129898
        p = p * f + 0.24022646248340607
        p = p * f + 0.6931471824645996
        return (p * f + 1.0) * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log_sum(v, u, more):
    """log u, u = 1 + v or ``more`` than that, at least 1; with full relative precision for a tiny v."""
    if v.dtype == tl.float64:
        rounded = tl.where(u == 1.0, 1.0, u - 1.0)
        return tl.where(more, tl.log(u), tl.where(u == 1.0, v, tl.log(u) * (v / rounded)))
    else:
        bits = u.to(tl.int32, bitcast=True)
        more = more | (v > 1.0)
        exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - (2**23 + 127)  # a conversion would be a special function
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
        return tl.where(more, exponent, 0.0) * LN2 + _log1p_near_zero(tl.where(more, fraction, v))


@triton.jit
def _log1p_near_zero(v):
    """log(1 + v) in float32 for 0 <= v <= 1: v times a polynomial of relative error 5e-9."""
    p = -0.0032439809292554855 * v + 0.019851261749863625
    p = p * v - 0.056959159672260284
    p = p * v + 0.10603617131710052
    p = p * v - 0.15305569767951965
    p = p * v + 0.19675931334495544
    p = p * v - 0.24954132735729218
    p = p * v + 0.3332996368408203
    p = p * v - 0.4999990165233612
    return (p * v + 1.0) * v


@triton.jit
def _reciprocal(x):
    """1/x, 2^-120 < x < 2^120: a guess from the bits of x, within 5%, by three times and then twice the digits."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        one = tl.full(x.shape, 1.0, tl.float32)
        y = (0x7EF31000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        error = _fma(-x, y, one)
        y = _fma(y, _fma(error, error, error), y)
        return _fma(y, _fma(-x, y, one), y)


@triton.jit
def _quotient(a, b):
    """a/b rounded once: of a mean, for float32's own division is off by two units, and that beside the mean of logits far from it."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _two_sum_error(a, b, total):
    """What ``total`` = a + b lost by rounding."""
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    return tl.where(tl.abs(error) < 1e30, error, 0.0)  # infinities


@triton.jit
def _option(value, like):
    """A scalar option in the dtype of the arithmetic."""
    return tl.full(like.shape, value, like.dtype)


# ---------------------------------------------------------------- rows


@triton.jit
def _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr):
    """Where a row starts: its index unfolded over DIMS row dimensions."""
    row = tl.cast(row, tl.int64)
    if DIMS == 1:
        return row * s3
    offset = (row % n3) * s3
    row = row // n3
    if DIMS == 2:
        return offset + row * s2
    offset += (row % n2) * s2
    row = row // n2
    if DIMS == 3:
        return offset + row * s1
    return offset + (row % n1) * s1 + (row // n1) * s0


@triton.jit
def _labels(target_ptr, row, rows, stride, ignore_index, K):
    """(true class, does the row count, is its label good); a label that is not good reads as class 0."""
    if row.shape[0] == 1:  # a scalar: a tensor would be loaded once for every layout that it is used in
        only = tl.max(row, 0)
        t = tl.load(target_ptr + only.to(tl.int64) * stride, mask=only < rows, other=0).to(tl.int64) + tl.zeros((1,), tl.int64)
    else:
        t = tl.load(target_ptr + row.to(tl.int64) * stride, mask=row < rows, other=0).to(tl.int64)
    counted = (row < rows) & (t != ignore_index)
    good = (t >= 0) & (t < K)
    return tl.where(counted & good, t, 0).to(tl.int32), counted, good


@triton.jit
def _labels_once(target_ptr, row, rows, stride, ignore_index, K, COPIES: tl.constexpr):
    """``_labels`` by one load: a load of fewer elements than threads is repeated for every layout it is used in."""
    if row.shape[0] == 1:
        return _labels(target_ptr, row, rows, stride, ignore_index, K)
    copy = tl.expand_dims(tl.arange(0, COPIES), 0)
    first = (tl.expand_dims(row, 1) < rows) & (copy == 0)
    at = tl.expand_dims(row, 1).to(tl.int64) * stride + copy
    t = tl.load(target_ptr + at, mask=first, other=0).to(tl.int64)
    # >= 0: the class; -1: ignored; -2: out of range
    t = tl.where(t == ignore_index, -1, tl.where((t >= 0) & (t < K), t, -2)).to(tl.int32)
    t = tl.sum(tl.where(first, t, 0), 1)
    t = tl.where(row < rows, t, -1)
    return tl.maximum(t, 0), t != -1, t >= 0


@triton.jit
def _row_weights(weight_ptr, sample_ptr, row, rows, stride, y, counted, DTYPE: tl.constexpr):
    """(class weight, sample weight) of each row; their product is 0 where the row does not count."""
    w = tl.full(row.shape, 1.0, DTYPE)
    sample = tl.where(counted, w, 0.0)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + y, mask=counted, other=0.0)
    if sample_ptr is not None:
        sample = tl.load(sample_ptr + row.to(tl.int64) * stride, mask=counted, other=0.0)
    return w, sample


@triton.jit
def _row_labels(targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES: tl.constexpr, DTYPE: tl.constexpr):
    """The labels of each row, one or two: a tuple of (true class, class weight, sample weight, does it count, is it good).

    targets, samples: (pointer to the one label's, pointer to the other's or None, stride). COPIES: of ``_labels_once``, or 0.
    """
    labels = ()
    for i in tl.static_range(1 if targets[1] is None else 2):
        if COPIES == 0:
            y, counted, good = _labels(targets[i], row, rows, targets[2], ignore_index, K)
        else:
            y, counted, good = _labels_once(targets[i], row, rows, targets[2], ignore_index, K, COPIES)
        w, sample = _row_weights(weight_ptr, samples[i], row, rows, samples[2], y, counted, DTYPE)
        labels = labels + ((y, w, sample, counted, good),)
    return labels


@triton.jit
def _left_out(labels):
    """(the classes that a row's reduction leaves out, its labels; which of them there are; whether any label asks for a gradient).

    A label that is not good, or the same as the first, is NOWHERE; a row's only one always leaves a class out.
    """
    y, _, _, counted, good = labels[0]
    live = counted & good
    if len(labels) == 1:
        return (y,), (tl.full(y.shape, 1, tl.int1),), live
    else:
        other, _, _, other_counted, other_good = labels[1]
        other_live = other_counted & other_good
        there = other_live & ((live == 0) | (y != other))
        return (tl.where(live, y, NOWHERE), tl.where(there, other, NOWHERE)), (live, there), live | other_live


@triton.jit
def _logits_of(z_ptr, z_row, sc, labels, DTYPE: tl.constexpr):
    """The logit of each label, 0 of one that asks for nothing."""
    logits = ()
    for i in tl.static_range(len(labels)):
        y, _, _, counted, good = labels[i]
        logits = logits + (tl.load(z_ptr + (z_row + y.to(tl.int64) * sc), mask=counted & good, other=0.0).to(DTYPE),)
    return logits


@triton.jit
def _count(there, like):
    """How many classes are left out, in the dtype of ``like``."""
    zero = tl.zeros_like(like)
    n = tl.where(there[0], zero + 1.0, zero)
    if len(there) == 2:
        n += tl.where(there[1], zero + 1.0, zero)
    return n


@triton.jit
def _inverse_left(N: tl.constexpr, there, zero):
    """1/n of N classes without those that are left out, or 1 where there are none."""
    less = zero + 1 / max(N - 1, 1)
    if len(there) == 1:
        return tl.where(there[0], less, zero + 1 / max(N, 1))
    else:
        return tl.where(there[0] & there[1], zero + 1 / max(N - 2, 1), tl.where(there[0] | there[1], less, zero + 1 / max(N, 1)))


@triton.jit
def _is_any(c, classes, shift=0):
    """Whether c + shift is one of one or two classes."""
    if len(classes) == 1:
        return c == classes[0] - shift
    else:
        return (c == classes[0] - shift) | (c == classes[1] - shift)


@triton.jit
def _place(dz, c, classes, gradients, shift=0):
    """dz with the classes' own gradients in their places, c + shift."""
    for i in tl.static_range(len(classes)):
        dz = tl.where(c == classes[i] - shift, gradients[i], dz)
    return dz


@triton.jit
def _across(row_scalar):
    """[R] -> [1, R, 1]; the scalar of a program's only row stays one."""
    if len(row_scalar.shape) == 0:
        return row_scalar
    else:
        return tl.expand_dims(tl.expand_dims(row_scalar, 0), 2)


@triton.jit
def _each_across(values):
    across = ()
    for i in tl.static_range(len(values)):
        across = across + (_across(values[i]),)
    return across


@triton.jit
def _scaled(values, scale):
    scaled = ()
    for i in tl.static_range(len(values)):
        scaled = scaled + (values[i] * scale,)
    return scaled


@triton.jit
def _finite(m):
    """A maximum that can be subtracted: 0 where the complement is empty."""
    return tl.where(m == -float("inf"), 0.0, m)


# ---------------------------------------------------------------- finish


@triton.jit
def _cross_entropy(delta_high, delta_low, s1):
    """(CE, 1 - p_y, p_y, 1/S1, lse less the larger of the base and the true logit) of the margin delta_high + delta_low + log S1.

    e^margin is taken as others : own, of which the larger is S1 or 1, so that one exponential, one logarithm and one reciprocal give all.
    """
    over = delta_high > 0
    h = _exp_exact(-0.5 * tl.abs(delta_high), 0.5 * tl.where(over, -delta_low, delta_low))
    small = tl.where(over, 1.0, s1) * h * h
    others = tl.where(over, s1, small)
    own = tl.where(over, small, 1.0)
    both = others + own
    r = _reciprocal(s1 * both)
    lse = _log_sum(others, both, over)
    ce = lse + tl.where(over, delta_high + delta_low, 0.0)
    return ce, others * (s1 * r), own * (s1 * r), both * r, lse


@triton.jit
def _penalty(n, inverse_n, s1, inverse_s1, s2, sx, mean, m2, s, p_y, KIND: tl.constexpr):
    """(D, and of its row gradient A S1, P, E0, dz_y) of complements of n classes, each of a class with probability p_y = 1 - s."""
    zero = tl.zeros_like(s1)
    a = zero
    p = zero
    e0 = zero
    g_y = zero
    if KIND == LOGIT_VARIANCE:
        div = m2 * inverse_n
        p = 2.0 * inverse_n + zero
        e0 = -p * mean
    elif KIND == KL:
        a = -sx * inverse_s1
        div = -a - tl.log(s1 * inverse_n)
        p = inverse_s1
    elif KIND == REVERSE_KL:
        div = tl.log(s1 * inverse_n) - mean
        a = zero + 1.0
        e0 = zero - inverse_n
    else:
        q2 = s2 * inverse_s1 * inverse_s1
        if KIND == CHI2:
            div = n * q2 - 1.0
            a = -2.0 * n * q2
            p = 2.0 * n * inverse_s1 * inverse_s1
        else:
            v_q = (q2 - inverse_n) * inverse_n
            div = s * s * v_q
            k = 2.0 * s * s
            a = k * (p_y * v_q - q2 * inverse_n)
            p = k * inverse_n * inverse_s1 * inverse_s1
            g_y = -k * p_y * v_q
    return div, a, p, e0, g_y


@triton.jit
def _finish(
    n, inverse_n, base, z_y, d, error, s1, s2, sx, mean, m2, sw, swx, w_y, sample, counted, good, K, smoothing, diversity_weight, z_loss,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Moments of rows -> (loss, cross-entropy, D) and the row gradient (A, P, E0, EW, dz_y), all weighted.

    mean and M2 are those of x = z - base; d + error is the base less the true class's logit, -inf where the complement is
    empty. EW w_j is what label smoothing takes from each class, the masked ones too.
    """
    zero = tl.zeros_like(s1)
    s1 = tl.where(s1 == 0.0, 1.0, s1)
    ce, s, p_y, inverse_s1, lse_less_larger = _cross_entropy(d, error, s1)
    bad = (s != s) | (z_y == float("inf"))

    # cross-entropy with its smoothing
    own = w_y + zero  # what the true class pulls at, and with it (pull) every class
    pull = own
    g_y = zero
    ew = zero
    ce = w_y * ce
    if SMOOTH:
        lse_less_base = lse_less_larger + tl.where(d > 0, 0.0, tl.where(d == -float("inf"), z_y - base, -d))
        eps = _option(smoothing, s1)
        ew = eps / K
        ce = (1.0 - eps) * ce + ew * (sw * lse_less_base - swx + ce)
        own = (1.0 - eps + ew) * w_y
        pull = own + ew * sw
        g_y = ew * sw * p_y
    g_y -= own * s
    loss = ce
    a = pull * s

    if Z_LOSS:
        lse = tl.where(d > 0, base, z_y) + lse_less_larger
        k = 2.0 * _option(z_loss, s1) * w_y * lse
        loss += 0.5 * k * lse
        a += k * s
        g_y += k * p_y

    p = zero
    e0 = zero
    div = zero
    if KIND != 0:
        several = n > 1.0  # nothing to spread among fewer than two classes
        k = tl.where(several, _option(diversity_weight, s1) * w_y, 0.0)
        div, d_a, d_p, d_e0, d_y = _penalty(tl.where(several, n, 1.0), inverse_n, s1, inverse_s1, s2, sx, mean, m2, s, p_y, KIND)
        p = k * d_p
        e0 = k * d_e0
        if KIND != LOGIT_VARIANCE:  # a product with 0 is not left out by itself
            a += k * d_a
        if KIND == VARIANCE:
            g_y += k * d_y
        div = tl.where(several, div, 0.0) * w_y
        loss += _option(diversity_weight, s1) * div
    a = a * inverse_s1

    # as PyTorch: a logit of NaN or +inf makes a row NaN; so does a label out of range, whose gradient is zero
    nan = float("nan")
    # (a row that does not count is flat by here: nothing of it is infinite)
    g = tl.where(counted & good, tl.where(bad, nan, sample), 0.0)
    on = tl.where(counted & (good == 0), nan, g)
    return loss * on, ce * on, div * g, a * g, p * g, e0 * g, ew * g, g_y * g


@triton.jit
def _with(n, mean, m2, more, x, inverse_n):
    """(mean, sum of squares about it) of n classes and ``more``, 1 or 0, at x; inverse_n: of their number."""
    d = x - mean
    step = d * more * inverse_n
    return mean + step, m2 + n * d * step


@triton.jit
def _lower(of, d, f, KIND: tl.constexpr):
    """(D, A, P, E0) about a base that is lower by -d, with f = e^d."""
    div, a, p, e0 = of
    if KIND == LOGIT_VARIANCE:
        e0 += p * d
    elif KIND == KL:
        a += tl.where(f > 0.0, p * d, 0.0)  # which may be infinite, and f takes all away
        p *= f
    else:
        p *= f * f
    return div, a * f, p, e0


# ---------------------------------------------------------------- spread


@triton.jit
def _spread(x, e, w, a, p, e0, ew, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """The gradient of a tile where x and e^x are those of the complement; the row's scalars broadcast against it."""
    dz = a
    rest = e0
    if KIND == CHI2 or KIND == VARIANCE:
        dz = e * p + a
    if KIND == KL:
        dz = x * p + a
    if KIND == LOGIT_VARIANCE:
        rest = x * p + e0
    if SMOOTH:
        if w is None:
            rest -= ew
        else:
            rest -= ew * w
    if KIND == LOGIT_VARIANCE or KIND == REVERSE_KL or SMOOTH:
        return e * dz + rest
    else:
        return e * dz


@triton.jit
def _spread_holes(dz, x, w, a, ew, SMOOTH: tl.constexpr):
    """The gradient of masked classes, of which x is -inf: nothing but what label smoothing takes; NaN in a NaN row."""
    masked = a * 0.0
    if SMOOTH:
        if w is None:
            masked -= ew
        else:
            masked -= ew * w
    return tl.where(x != -float("inf"), dz, masked)


# ---------------------------------------------------------------- losses and totals


@triton.jit
def _scale(
    shares_ptr, divisor_ptr, upstream_ptr, SHARES: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, RESCALE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """([1]: what all gradients are multiplied by, whether any is to be written).

    The mean's divisor is summed from its shares, or as the forward left it. RESCALE: the forward's gradient stands where
    nothing comes from above but 1.
    """
    scale = tl.full((1,), 1.0, DTYPE)
    work = tl.program_id(0) >= 0
    if shares_ptr is not None:
        scale = 1.0 / tl.sum(tl.load(shares_ptr + tl.arange(0, SHARES)), 0, keep_dims=True)
    elif divisor_ptr is not None and upstream_ptr is not None:
        scale = 1.0 / tl.load(divisor_ptr + tl.arange(0, 1))
    if upstream_ptr is not None and not UPSTREAM_ROWS:
        up = tl.load(upstream_ptr)
        scale = scale * up
        if RESCALE:
            work = up != 1.0
    return scale, work


@triton.jit
def _row_scale(scale, work, upstream_ptr, row, rows, stride, UPSTREAM_ROWS: tl.constexpr, RESCALE: tl.constexpr):
    """``_scale`` for each row, by what comes from above for it."""
    scale = tl.zeros(row.shape, scale.dtype) + scale
    if upstream_ptr is not None and UPSTREAM_ROWS:
        up = tl.load(upstream_ptr + row.to(tl.int64) * stride, mask=row < rows, other=1.0)
        scale = scale * up
        if RESCALE:
            work = tl.max((up != 1.0).to(tl.int32), 0) != 0
    return scale, work


@triton.jit
def _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div):
    """Write what there is to know of each row."""
    tl.store(loss_ptr + row, loss, mask=row < rows)
    if parts_ptr is not None:
        tl.store(parts_ptr + row, ce, mask=row < rows)
        tl.store(parts_ptr + rows + row, div, mask=row < rows)


@triton.jit
def _keep_totals(
    partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr, loss, w, ce, div, REDUCTION: tl.constexpr
):  # fmt: skip
    """Write this program's sums; if counter_ptr is given, the last program to do so sums them all."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials_ptr + program, loss)
    tl.store(partials_ptr + programs + program, w)
    if parts_ptr is not None:
        tl.store(partials_ptr + 2 * programs + program, ce)
        tl.store(partials_ptr + 3 * programs + program, div)
    if counter_ptr is not None:
        tl.debug_barrier()  # all of this program's partial results, before it is counted
        done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        if done == programs - 1:
            _total(partials_ptr, divisor_ptr, loss_ptr, parts_ptr, programs, REDUCTION, 256)


@triton.jit
def _total(partials_ptr, divisor_ptr, loss_ptr, parts_ptr, programs, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the programs' partial results, always in the same order, and write the reduced loss."""
    i = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    ce = loss
    div = loss
    w = loss
    for start in range(0, programs, BLOCK):
        k = start + i
        inside = k < programs
        loss += tl.load(partials_ptr + k, mask=inside, other=0.0, cache_modifier=".cg")
        w += tl.load(partials_ptr + programs + k, mask=inside, other=0.0, cache_modifier=".cg")
        if parts_ptr is not None:
            ce += tl.load(partials_ptr + 2 * programs + k, mask=inside, other=0.0, cache_modifier=".cg")
            div += tl.load(partials_ptr + 3 * programs + k, mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.sum(loss, 0)
    divisor = tl.sum(w, 0)
    if REDUCTION == MEAN:
        total = total / divisor
        if divisor_ptr is not None:
            tl.store(divisor_ptr, divisor)
    tl.store(loss_ptr, total)
    if parts_ptr is not None:
        ce = tl.sum(ce, 0)
        div = tl.sum(div, 0)
        if REDUCTION == MEAN:
            ce = ce / divisor
            div = div / divisor
        tl.store(parts_ptr, ce)
        tl.store(parts_ptr + 1, div)


@triton.jit(do_not_specialize=["programs"])
def total(partials_ptr, divisor_ptr, loss_ptr, parts_ptr, programs, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the partial results of all programs -> loss, parts and the mean's divisor."""
    _total(partials_ptr, divisor_ptr, loss_ptr, parts_ptr, programs, REDUCTION, BLOCK)


@triton.jit(do_not_specialize=["rows", "K"])
def divisors(
    target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, out_ptr, counter_ptr,
    rows, K, target_stride, sample_stride, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[program]: its share of the summed weights of the labels that count, which the mean divides by."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    targets = (target_ptr, other_ptr)
    samples = (sample_ptr, other_sample_ptr)
    acc = tl.zeros((BLOCK,), DTYPE)
    for start in range(program * BLOCK, rows, programs * BLOCK):
        row = start + tl.arange(0, BLOCK)
        for i in tl.static_range(1 if other_ptr is None else 2):
            if start + BLOCK <= rows:  # its own branch: a mask with a run-time bound would break up the 16-byte loads
                t = tl.load(targets[i] + row.to(tl.int64) * target_stride).to(tl.int64)
            else:
                t = tl.load(targets[i] + row.to(tl.int64) * target_stride, mask=row < rows, other=0).to(tl.int64)
            counted = (row < rows) & (t != ignore_index)
            y = tl.where(counted & (t >= 0) & (t < K), t, 0)
            w, sample = _row_weights(weight_ptr, samples[i], row, rows, sample_stride, y, counted, DTYPE)
            acc += w * sample
    tl.store(out_ptr + program, tl.sum(acc, 0))
    if program == 0:
        tl.store(counter_ptr, 0)
