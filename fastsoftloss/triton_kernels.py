"""The loss as Triton kernels, in three steps: reduce (a row's complement -> moments), finish (moments -> loss and row
gradient) and spread (row gradient -> dlogits).

The definition is in ``reference.py``. The true class never enters a sum, and means are offsets from the complement's
maximum m, so nothing cancels: x = z - m, S1 = sum e^x, S2 = sum e^2x, SX = sum e^x x. The gradient of a row is
dz_j = e^x (A + B e^x + T x) + E0 + E1 x - EW w_j for every penalty; a new penalty is one case in ``_finish``.

Tiles are [A, R, B]: class a * B + b of row r, so that a thread holds one row's a in registers and few threads share a row.
"""

# ruff: noqa: F821, RUF059, SIM102 (a dtype as a string, NaN tests, and tests of compile-time beside run-time values are Triton's way)
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-8)  # log2(e) less its float32

# the order of ops.DIVERSITIES and of ops.REDUCTIONS
LOGIT_VARIANCE = tl.constexpr(1)
KL = tl.constexpr(2)
REVERSE_KL = tl.constexpr(3)
CHI2 = tl.constexpr(4)
VARIANCE = tl.constexpr(5)
NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)

# how a tile reaches the logits
STRIDED = tl.constexpr(0)  # any strides
ALIGNED = tl.constexpr(1)  # class stride 1, any row stride: 16-byte accesses between two edges
FLAT = tl.constexpr(2)  # whole rows of contiguous logits as one run of memory, exchanged into rows on chip


# ---------------------------------------------------------------- scalars


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * LOG2E)


@triton.jit
def _exp_exact(x):
    """e^x to the last digits of float32 for a large |x| too: the product with log2(e) keeps its low part."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    high = x * LOG2E
    low = tl.where(tl.abs(x) < 1e4, tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -high) + x * LOG2E_LOW, 0.0)
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def _log1p(v):
    """log(1 + v), v >= 0, with full relative precision for a tiny v."""
    if v.dtype == tl.float64:
        u = 1.0 + v
        return tl.where(u == 1.0, v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, u - 1.0)))
    t = v / (2.0 + v)  # log(1 + v) = 2 atanh(t), t <= 1/3 where the series is used
    t2 = t * t
    series = 1.0 / 17
    for i in tl.static_range(8):
        series = series * t2 + 1.0 / (15 - 2 * i)
    return tl.where(v <= 1.0, 2.0 * t * series, tl.log(1.0 + v))


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
    t = tl.load(target_ptr + row.to(tl.int64) * stride, mask=row < rows, other=0).to(tl.int64)
    counted = (row < rows) & (t != ignore_index)
    good = (t >= 0) & (t < K)
    return tl.where(counted & good, t, 0).to(tl.int32), counted, good


@triton.jit
def _labels_once(target_ptr, row, rows, stride, ignore_index, K, COPIES: tl.constexpr):
    """``_labels`` by one load: a load of fewer elements than threads is repeated for every layout it is used in."""
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
def _across(row_scalar):
    """[R] -> [1, R, 1]; the scalar of a program's only row stays one."""
    if len(row_scalar.shape) == 0:
        return row_scalar
    else:
        return tl.expand_dims(tl.expand_dims(row_scalar, 0), 2)


# ---------------------------------------------------------------- reduce


@triton.jit
def _sum(t):
    """[A, R, B] -> [R]"""
    return tl.sum(tl.sum(t, axis=0), axis=1)


@triton.jit
def _dot(a, b, inside):
    """Sum of a b over the complement, both finite and ``a`` 0 elsewhere; see ``_merge_lanes`` for the select."""
    if a.shape[0] == 1:
        return _sum(tl.where(inside, a * b, 0.0))
    else:
        return _sum(a * b)


@triton.jit
def _max(t):
    return tl.max(tl.max(t, axis=0), axis=1)


@triton.jit
def _finite(m):
    """A maximum that can be subtracted: 0 where the complement is empty."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _count(z):
    return _sum((z != -float("inf")).to(tl.float32))


@triton.jit
def _fill(x, z):
    """x with 0 for the classes that are masked."""
    return tl.where(z != -float("inf"), x, 0.0)


@triton.jit
def _squares(x, mean, inside):
    """Sum of (x - mean)^2 where ``inside``."""
    d = tl.where(inside, x - _across(mean), 0.0)
    return _dot(d, d, inside)


# ---------------------------------------------------------------- finish


@triton.jit
def _finish(
    n, m, s1, s2, sx, mean, m2, sw, swx, z_y, w_y, sample, counted, good, K, smoothing, diversity_weight, z_loss,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Moments of rows -> (loss, cross-entropy, D) and the row gradient (A, B, T, E0, E1, EW, dz_y), all weighted.

    m is the complement's maximum, mean and M2 those of x = z - m. EW w_j is what label smoothing takes from each class,
    the masked ones too.
    """
    zero = tl.zeros_like(s1)
    base = _finite(m)
    d = m - z_y
    error = _two_sum_error(m, -z_y, d)
    h = _exp_exact(-0.5 * tl.abs(d))
    over = d > 0  # the true class is not the most likely
    s1 = tl.where(s1 == 0.0, 1.0, s1)
    log_s1 = tl.log(s1)
    v = tl.where(over, h / s1 * h * (1.0 - error), h * s1 * h * (1.0 + error))
    log1p = _log1p(v)
    ce = log1p + tl.where(over, d + (error + log_s1), 0.0)
    s = tl.where(over, 1.0, v) / (1.0 + v)  # 1 - p_y
    p_y = tl.where(over, v, 1.0) / (1.0 + v)
    lse_less_m = tl.where(over, log_s1, z_y - base) + log1p
    bad = (v != v) | (z_y == float("inf"))

    # cross-entropy with its smoothing
    pull = w_y + zero  # what multiplies the gradient of the log-sum-exp
    g_y = zero
    ew = zero
    if SMOOTH:
        eps = _option(smoothing, s1)
        ew = eps / K
        ce = w_y * ce
        ce = (1.0 - eps) * ce + ew * (sw * lse_less_m - swx + ce)
        pull = (1.0 - eps) * w_y + ew * (sw + w_y)
        g_y = ew * sw
    else:
        ce = w_y * ce
    g_y -= pull * s
    loss = ce
    a = pull * s

    if Z_LOSS:
        lse = base + lse_less_m
        k = 2.0 * _option(z_loss, s1) * w_y * lse
        loss += 0.5 * k * lse
        a += k * s
        g_y += k * p_y

    # the penalty: nothing to spread among fewer than two classes
    b = zero
    t = zero
    e0 = zero
    e1 = zero
    div = zero
    if KIND != 0:
        k = tl.where(n > 1.0, _option(diversity_weight, s1) * w_y, 0.0)
        n = tl.where(n > 1.0, n, 1.0)
        if KIND == LOGIT_VARIANCE:
            div = m2 / n
            e1 = 2.0 * k / n
            e0 = -e1 * mean
        elif KIND == KL:
            r = sx / s1
            div = r - tl.log(s1 / n)
            t = k / s1
            a -= k * r
        elif KIND == REVERSE_KL:
            div = tl.log(s1 / n) - mean
            a += k
            e0 = -k / n
        else:
            q2 = s2 / (s1 * s1)
            if KIND == CHI2:
                div = n * q2 - 1.0
                a -= 2.0 * k * n * q2
                b = 2.0 * k * n / (s1 * s1)
            else:
                v_q = (q2 - 1.0 / n) / n
                div = s * s * v_q
                k = 2.0 * k * s * s
                a += k * (p_y * v_q - q2 / n)
                b = k / n / (s1 * s1)
                g_y -= k * p_y * v_q
        div = tl.where(n > 1.0, div, 0.0) * w_y
        loss += _option(diversity_weight, s1) * div
    a = a / s1

    # as PyTorch: a logit of NaN or +inf makes a row NaN; so does a label out of range, whose gradient is zero
    nan = float("nan")
    ce = tl.where(counted, tl.where(bad | (good == 0), nan, ce * sample), 0.0)
    div = tl.where(counted & good, tl.where(bad, nan, div * sample), 0.0)
    loss = tl.where(counted, tl.where(bad | (good == 0), nan, loss * sample), 0.0)
    live = counted & good
    g = tl.where(bad, nan, sample)
    a = tl.where(live, a * g, 0.0)
    b = tl.where(live, b * g, 0.0)
    t = tl.where(live, t * g, 0.0)
    e0 = tl.where(live, e0 * g, 0.0)
    e1 = tl.where(live, e1 * g, 0.0)
    ew = tl.where(live, ew * g, 0.0)
    g_y = tl.where(live, g_y * g, 0.0)
    return loss, ce, div, a, b, t, e0, e1, ew, g_y


# ---------------------------------------------------------------- spread


@triton.jit
def _spread(x, e, w, a, b, t, e0, e1, ew, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """The gradient of a tile [A, R, B] where x and e^x are those of the complement; the row's scalars are [R]."""
    dz = _across(a)
    if KIND == CHI2 or KIND == VARIANCE:
        dz = e * _across(b) + dz
    if KIND == KL:
        dz = x * _across(t) + dz
    rest = _across(e0)
    if KIND == LOGIT_VARIANCE:
        rest = x * _across(e1) + rest
    if SMOOTH:
        if w is None:
            rest -= _across(ew)
        else:
            rest -= _across(ew) * w
    if KIND == LOGIT_VARIANCE or KIND == REVERSE_KL or SMOOTH:
        return e * dz + rest
    else:
        return e * dz


@triton.jit
def _spread_holes(dz, z, w, a, ew, SMOOTH: tl.constexpr):
    """The gradient of masked classes: nothing but what label smoothing takes; NaN in a NaN row."""
    masked = _across(a * 0.0)
    if SMOOTH:
        if w is None:
            masked -= _across(ew)
        else:
            masked -= _across(ew) * w
    return tl.where(z != -float("inf"), dz, masked)


# ---------------------------------------------------------------- totals


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
    target_ptr, weight_ptr, sample_ptr, out_ptr, counter_ptr, rows, K, target_stride, sample_stride, ignore_index, BLOCK: tl.constexpr
):
    """out[program]: its share of the summed weights of the rows that count, which the mean divides by."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK,), DTYPE)
    for start in range(program * BLOCK, rows, programs * BLOCK):
        row = start + tl.arange(0, BLOCK)
        if start + BLOCK <= rows:  # its own branch: a mask with a run-time bound would break up the 16-byte loads
            t = tl.load(target_ptr + row.to(tl.int64) * target_stride).to(tl.int64)
        else:
            t = tl.load(target_ptr + row.to(tl.int64) * target_stride, mask=row < rows, other=0).to(tl.int64)
        counted = (row < rows) & (t != ignore_index)
        y = tl.where(counted & (t >= 0) & (t < K), t, 0)
        w, sample = _row_weights(weight_ptr, sample_ptr, row, rows, sample_stride, y, counted, DTYPE)
        acc += w * sample
    tl.store(out_ptr + program, tl.sum(acc, 0))
    if program == 0:
        tl.store(counter_ptr, 0)


# ---------------------------------------------------------------- rows that fit on chip


@triton.jit(do_not_specialize=["rows"])
def resident(
    z_ptr, g_ptr, target_ptr, weight_ptr, sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr, divisor_ptr, shares_ptr, counter_ptr,
    rows, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    ACCESS: tl.constexpr, DIMS: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Rows that one program holds in registers: one read of the logits, and of the gradient one write where g_ptr is given.

    loss_ptr, parts_ptr: where the row losses go, or with a reduction the total (written by the last program to finish
    if counter_ptr is given, else by ``total``). upstream_ptr: the gradient from above, () or one a row.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    WEIGHTED: tl.constexpr = weight_ptr is not None
    inf = float("inf")
    acc = tl.zeros((R,), DTYPE)
    acc_w = acc
    acc_ce = acc
    acc_div = acc
    inverse = tl.full((1,), 1.0, DTYPE)
    if shares_ptr is not None:
        inverse = 1.0 / tl.sum(tl.load(shares_ptr + tl.arange(0, SHARES)), 0, keep_dims=True)
    elif divisor_ptr is not None and upstream_ptr is not None:
        inverse = 1.0 / tl.load(divisor_ptr + tl.arange(0, 1))

    work = True
    if upstream_ptr is not None and not UPSTREAM_ROWS:
        up = tl.load(upstream_ptr)
        inverse = inverse * up
        if RESCALE:  # the forward's gradient stands where nothing comes from above but 1
            work = up != 1.0

    column = tl.expand_dims(tl.arange(0, A) * B, 1) + tl.expand_dims(tl.arange(0, B), 0)  # [A, B]
    column = tl.expand_dims(column, 1)  # [A, 1, B]
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale = tl.zeros((R,), DTYPE) + inverse
        if upstream_ptr is not None and UPSTREAM_ROWS:
            up = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=row < rows, other=1.0)
            scale = scale * up
            if RESCALE:
                work = tl.max((up != 1.0).to(tl.int32), 0) != 0
        if work:
            y, counted, good = _labels_once(target_ptr, row, rows, target_stride, ignore_index, K, COPIES)
            w_y, sample = _row_weights(weight_ptr, sample_ptr, row, rows, sample_stride, y, counted, DTYPE)
            live = counted & good
            scale = tl.where(live, scale, 0.0)  # with no row that counts the mean's 1/0 stays out of the gradient
            reads = _across(live)
            nothing = tl.where(reads, -inf, 0.0)  # a row that asks for no gradient is flat, not masked
            label = _across(y)
            z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
            g_row = _offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)
            # ---- load
            if ACCESS == FLAT:
                flat = tl.arange(0, P)
                start = tl.cast(tile, tl.int64) * (R * K)
                count = (rows - tile * R) * K
                whole = count >= R * K
                if whole:  # its own branch: a mask with a run-time bound would break up the 16-byte loads
                    run = tl.load(z_ptr + start + flat, mask=flat < R * K, other=0.0)
                else:
                    run = tl.load(z_ptr + start + flat, mask=flat < count, other=0.0)
                j = tl.reshape(tl.arange(0, A * R * B), (A, R, B))
                c = (j // (R * B)) * B + j % B
                index = tl.where(c < K, (j // B) % R * K + c, 0)
                z = tl.reshape(tl.gather(run, tl.reshape(index, (A * R * B,)), 0), (A, R, B)).to(DTYPE)
                exists = c < K
                z = tl.where(reads, tl.where(exists, z, -inf), 0.0)
            elif ACCESS == ALIGNED:
                # 16-byte accesses need a start that is a multiple of ALIGN; what lies before and behind is the edge
                low = (z_row + (ALIGN - 1)) // ALIGN * ALIGN
                high = (z_row + K) // ALIGN * ALIGN
                first = _across((low - z_row).to(tl.int32))
                length = (high // ALIGN - low // ALIGN).to(tl.int32) * ALIGN
                exists = (column < K // ALIGN * ALIGN - 2 * ALIGN) | (column < _across(length))  # most of it known when compiled
                z_at = _across(low) + column
                c = column + first
                z = tl.load(z_ptr + z_at, mask=exists & reads, other=nothing).to(DTYPE)
                edge = tl.expand_dims(tl.expand_dims(tl.arange(0, 2 * ALIGN), 0), 0)
                head = edge < ALIGN
                edge_c = tl.where(head, edge, edge - ALIGN + first + _across(length))
                edge_exists = tl.where(head, edge < first, edge_c < K)
                edge_z = tl.load(z_ptr + _across(z_row) + edge_c, mask=edge_exists & reads, other=nothing).to(DTYPE)
            else:
                c = column
                exists = c < K
                step = c.to(tl.int64) * sc if WIDE else c * sc
                z = tl.load(z_ptr + _across(z_row) + step, mask=exists & reads, other=nothing).to(DTYPE)
            # ---- reduce
            if ACCESS == ALIGNED:
                is_y = column == label - first
                is_y = is_y & exists
            else:
                is_y = c == label
            others = exists & (is_y == 0)
            z_y = _sum(tl.where(is_y, z, 0.0))
            z = tl.where(is_y, -inf, z)
            m = _max(z)
            if ACCESS == ALIGNED:
                edge_is_y = (edge_c == label) & edge_exists
                edge_others = edge_exists & (edge_c != label)
                z_y += _sum(tl.where(edge_is_y, edge_z, 0.0))
                edge_z = tl.where(edge_is_y, -inf, edge_z)
                m = tl.maximum(m, _max(edge_z))
            base = _finite(m)
            x = z - _across(base)
            e = _exp(x)
            s1_ = _sum(e)
            x = tl.where(others, x, 0.0)
            if ACCESS == ALIGNED:
                edge_x = edge_z - _across(base)
                edge_e = _exp(edge_x)
                s1_ += _sum(edge_e)
                edge_x = tl.where(edge_others, edge_x, 0.0)
            zero = tl.zeros_like(s1_)
            n = zero + (K - 1)
            mean = zero
            m2 = zero
            s2_ = zero
            sx = zero
            sw = zero
            swx = zero
            w = None
            edge_w = None
            holes = False
            if KIND != 0 or SMOOTH:
                x1 = _sum(x)
                if ACCESS == ALIGNED:
                    x1 += _sum(edge_x)
                if SMOOTH:
                    if WEIGHTED:
                        w = tl.load(weight_ptr + c, mask=exists, other=0.0)
                        sw = _sum(tl.where(others, w, 0.0))
                        swx = _sum(tl.where(others, w * x, 0.0))
                        if ACCESS == ALIGNED:
                            edge_w = tl.load(weight_ptr + edge_c, mask=edge_exists, other=0.0)
                            sw += _sum(tl.where(edge_others, edge_w, 0.0))
                            swx += _sum(tl.where(edge_others, edge_w * edge_x, 0.0))
                    else:
                        sw = n
                        swx = x1
                # masked classes are rare: only where a sum shows one is anything asked of single elements
                holes = tl.max((x1 == -inf).to(tl.int32), 0) != 0
                if holes:
                    n = _count(z).to(DTYPE)
                    x = _fill(x, z)
                    x1 = _sum(x)
                    if ACCESS == ALIGNED:
                        n += _count(edge_z).to(DTYPE)
                        edge_x = _fill(edge_x, edge_z)
                        x1 += _sum(edge_x)
                mean = x1 / tl.where(n == 0.0, 1.0, n)
            if KIND == LOGIT_VARIANCE:
                if holes:
                    m2 = _squares(x, mean, z != -inf)
                else:
                    # the true class stands in as x = 0, the maximum, whose square M2 exceeds
                    m2 = _squares(x, mean, exists) - mean * mean
                if ACCESS == ALIGNED:
                    # the edges' one element a thread is not worth a branch
                    m2 += _squares(edge_x, mean, edge_z != -inf) + tl.where(holes | (_sum(edge_is_y.to(tl.int32)) == 0), 0.0, mean * mean)
            if KIND == KL:
                sx = _dot(e, x, others)
                if ACCESS == ALIGNED:
                    sx += _dot(edge_e, edge_x, edge_others)
            if KIND == CHI2 or KIND == VARIANCE:
                s2_ = _dot(e, e, others)
                if ACCESS == ALIGNED:
                    s2_ += _dot(edge_e, edge_e, edge_others)
            # ---- finish
            loss, ce, div, a, b, t, e0, e1, ew, g_y = _finish(
                n, m, s1_, s2_, sx, mean, m2, sw, swx, z_y, w_y, sample, counted, good, K, smoothing, diversity_weight, z_loss,
                KIND, SMOOTH, WEIGHTED, Z_LOSS,
            )  # fmt: skip
            if loss_ptr is not None:
                if REDUCTION == NONE:
                    tl.store(loss_ptr + row, loss, mask=row < rows)
                    if parts_ptr is not None:
                        tl.store(parts_ptr + row, ce, mask=row < rows)
                        tl.store(parts_ptr + rows + row, div, mask=row < rows)
                else:
                    acc += loss
                    acc_w += w_y * sample
                    acc_ce += ce
                    acc_div += div
            # ---- spread
            if g_ptr is not None:
                a, b, t, e0, e1, ew, g_y = a * scale, b * scale, t * scale, e0 * scale, e1 * scale, ew * scale, g_y * scale
                dz = _spread(x, e, w, a, b, t, e0, e1, ew, KIND, SMOOTH)
                if KIND != 0 or SMOOTH:
                    if holes:
                        dz = _spread_holes(dz, z, w, a, ew, SMOOTH)
                dz = tl.where(is_y, _across(g_y), dz)
                dz = dz.to(g_ptr.dtype.element_ty)
                there = _across(row < rows)
                if ACCESS == FLAT:
                    r = flat // K
                    k = flat % K
                    back = tl.minimum((k // B) * (R * B) + r * B + k % B, A * R * B - 1)
                    run = tl.gather(tl.reshape(dz, (A * R * B,)), back, 0)
                    if whole:
                        tl.store(g_ptr + start + flat, run, mask=flat < R * K)
                    else:
                        tl.store(g_ptr + start + flat, run, mask=flat < count)
                elif ACCESS == ALIGNED:
                    edge_dz = _spread(edge_x, edge_e, edge_w, a, b, t, e0, e1, ew, KIND, SMOOTH)
                    edge_dz = tl.where(edge_is_y, _across(g_y), _spread_holes(edge_dz, edge_z, edge_w, a, ew, SMOOTH))
                    if SAME:
                        g_at = z_at
                    else:
                        g_at = _across(g_row) + c
                    tl.store(g_ptr + g_at, dz, mask=exists & there)
                    edge_at = _across(g_row) + edge_c
                    tl.store(g_ptr + edge_at, edge_dz.to(g_ptr.dtype.element_ty), mask=edge_exists & there)
                else:
                    g_step = c.to(tl.int64) * tc if WIDE else c * tc
                    tl.store(g_ptr + _across(g_row) + g_step, dz, mask=exists & there)
    if loss_ptr is not None and REDUCTION != NONE:
        tl.store(partials_ptr + program, tl.sum(acc, 0))
        tl.store(partials_ptr + programs + program, tl.sum(acc_w, 0))
        if parts_ptr is not None:
            tl.store(partials_ptr + 2 * programs + program, tl.sum(acc_ce, 0))
            tl.store(partials_ptr + 3 * programs + program, tl.sum(acc_div, 0))
        if counter_ptr is not None:
            tl.debug_barrier()  # all of this program's partial results, before it is counted
            done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
            if done == programs - 1:
                _total(partials_ptr, divisor_ptr, loss_ptr, parts_ptr, programs, REDUCTION, 256)


# ---------------------------------------------------------------- rows that do not fit


@triton.jit
def _absorb(n, m, s1, s2, sx, mean, m2, sw, swx, z, c, y, exists, w, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """Merge a tile z [A, lanes, B], -inf outside the complement, into the moments of each lane, relative to its maximum m.

    c: the tile's classes, y the true one among them, ``exists``: which are there at all.
    """
    inf = float("inf")
    top = tl.maximum(m, _max(z))
    base = _finite(top)
    shift = tl.where(m == -inf, 0.0, m - base)
    shrink = _exp(m - base)
    x = z - _across(base)
    e = _exp(x)
    s1_ = _sum(e)
    if KIND == CHI2 or KIND == VARIANCE:
        s2 = s2 * (shrink * shrink) + _dot(e, e, exists)
    if KIND != 0 or SMOOTH:
        n_ = tl.zeros_like(s1) + z.shape[0] * z.shape[2]
        x1 = _sum(x)
        sw_ = n_
        swx_ = x1
        # only where the sum shows something masked, the true class or the row's end is anything asked of single elements
        holes = tl.max((x1 == -inf).to(tl.int32), 0) != 0
        if holes:
            if SMOOTH:
                if w is None:
                    others = exists & (c != y)
                    sw_ = _sum(others.to(tl.float32)).to(s1.dtype)
                    swx_ = _sum(tl.where(others, x, 0.0))
            n_ = _count(z).to(s1.dtype)
            x1 = _sum(_fill(x, z))
        if SMOOTH:
            if w is not None:
                others = exists & (c != y)
                sw_ = _sum(tl.where(others, w, 0.0))
                swx_ = _sum(tl.where(others, w * x, 0.0))
            swx = swx + sw * shift + swx_
            sw += sw_
        if KIND == KL:
            sx_ = tl.zeros_like(s1)
            if holes:
                sx_ = _dot(e, _fill(x, z), exists)
            else:
                sx_ = _dot(e, x, exists)
            sx = shrink * (sx + s1 * shift) + sx_
        if KIND == LOGIT_VARIANCE or KIND == REVERSE_KL:
            mean_ = x1 / tl.where(n_ == 0.0, 1.0, n_)
            gap = mean_ - (mean + shift)
            part = n_ / tl.where(n + n_ == 0.0, 1.0, n + n_)
            if KIND == LOGIT_VARIANCE:
                if holes:
                    m2_ = _squares(x, mean_, z != -inf)
                else:
                    d = x - _across(mean_)
                    m2_ = _dot(d, d, exists)
                m2 += m2_ + gap * gap * (n * part)
            mean = mean + shift + gap * part
        n += n_
    return n, top, s1 * shrink + s1_, s2, sx, mean, m2, sw, swx


@triton.jit
def _beside(t, AXIS: tl.constexpr):
    """What a reduction along AXIS left, so that it broadcasts against what was reduced; of one dimension a scalar is left."""
    if AXIS == 0:
        return t
    else:
        return tl.expand_dims(t, AXIS)


@triton.jit
def _merge_lanes(n, m, s1, s2, sx, mean, m2, sw, swx, AXIS: tl.constexpr):
    """Moments of lanes or of splits, merged along AXIS, the last."""
    top = tl.max(m, AXIS)
    empty = m == -float("inf")
    shift = tl.where(empty, 0.0, m - _beside(_finite(top), AXIS))
    shrink = tl.where(empty, 0.0, _exp(shift))
    # a bare product would be contracted into the first exchange between lanes, and each lane would round it differently
    sx = tl.sum(tl.where(empty, 0.0, shrink * (sx + s1 * shift)), AXIS)
    s2 = tl.sum(tl.where(empty, 0.0, s2 * (shrink * shrink)), AXIS)
    s1 = tl.sum(tl.where(empty, 0.0, s1 * shrink), AXIS)
    count = tl.sum(n, AXIS)
    centre = tl.sum(tl.where(empty, 0.0, n * (mean + shift)), AXIS) / tl.where(count == 0.0, 1.0, count)
    gap = mean + shift - _beside(centre, AXIS)
    m2 = tl.sum(m2 + n * (gap * gap), AXIS)
    swx = tl.sum(swx + sw * shift, AXIS)
    return count, top, s1, s2, sx, centre, m2, tl.sum(sw, AXIS), swx


@triton.jit(do_not_specialize=["rows", "K", "splits", "tiles"])
def long_reduce(
    z_ptr, target_ptr, weight_ptr, moments_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, target_stride, ignore_index, splits, tiles,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    A: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """moments[field, row, split]: the moments of ``tiles`` tiles of a row's complement, one program a row and split.

    ALIGN > 0: class stride 1, in 16-byte accesses between two edges; 0: any class stride.
    """
    program = tl.program_id(0)
    row = program // splits
    split = program % splits
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    TILE: tl.constexpr = A * L * V
    inf = float("inf")
    y, counted, good = _labels(target_ptr, row, rows, target_stride, ignore_index, K)
    live = counted & good
    zero = tl.zeros((L,), DTYPE)
    moments = (zero, zero - inf, zero, zero, zero, zero, zero, zero, zero)
    n, m, s1_, s2_, sx, mean, m2, sw, swx = moments
    if live:
        z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
        a = tl.expand_dims(tl.expand_dims(tl.arange(0, A), 1), 2)
        lane = tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
        v = tl.expand_dims(tl.expand_dims(tl.arange(0, V), 0), 1)
        i = a * (L * V) + lane * V + v
        low = z_row
        length = K
        if ALIGN > 0:
            low = (z_row + (ALIGN - 1)) // ALIGN * ALIGN
            length = ((z_row + K) // ALIGN - low // ALIGN).to(tl.int32) * ALIGN
        first = (low - z_row).to(tl.int32)
        for start in range(split * tiles * TILE, min((split + 1) * tiles * TILE, length), TILE):
            exists = i < length - start
            at = low + start
            if ALIGN > 0:
                z = tl.load(z_ptr + at + i, mask=exists, other=-inf).to(DTYPE)
            else:
                z = tl.load(z_ptr + z_row + (tl.cast(start, tl.int64) + i) * sc, mask=exists, other=-inf).to(DTYPE)
            label = y - first - start  # the true class's place in this tile
            if (label >= 0) & (label < TILE):
                z = tl.where(i == label, -inf, z)
            w = None
            if SMOOTH and weight_ptr is not None:
                w = tl.load(weight_ptr + (first + start) + i, mask=exists, other=0.0)
            n, m, s1_, s2_, sx, mean, m2, sw, swx = _absorb(n, m, s1_, s2_, sx, mean, m2, sw, swx, z, i, label, exists, w, KIND, SMOOTH)
        if ALIGN > 0:
            if split == 0:
                j = tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
                c = tl.where(j < ALIGN, j, j - ALIGN + first + length)
                exists = tl.where(j < ALIGN, j < first, c < K)
                z = tl.load(z_ptr + z_row + c, mask=exists & (c != y), other=-inf).to(DTYPE)
                w = None
                if SMOOTH and weight_ptr is not None:
                    w = tl.load(weight_ptr + c, mask=exists, other=0.0)
                n, m, s1_, s2_, sx, mean, m2, sw, swx = _absorb(n, m, s1_, s2_, sx, mean, m2, sw, swx, z, c, y, exists, w, KIND, SMOOTH)
    n, m, s1_, s2_, sx, mean, m2, sw, swx = _merge_lanes(n, m, s1_, s2_, sx, mean, m2, sw, swx, 0)
    at = moments_ptr + tl.cast(program, tl.int64)
    field = tl.cast(rows, tl.int64) * splits
    tl.store(at, n)
    tl.store(at + field, m)
    tl.store(at + 2 * field, s1_)
    tl.store(at + 3 * field, s2_)
    tl.store(at + 4 * field, sx)
    tl.store(at + 5 * field, mean)
    tl.store(at + 6 * field, m2)
    tl.store(at + 7 * field, sw)
    tl.store(at + 8 * field, swx)


@triton.jit
def _label_logit(z_ptr, row, y, live, n1, n2, n3, s0, s1, s2, s3, sc, DIMS: tl.constexpr, DTYPE: tl.constexpr):
    at = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS) + y.to(tl.int64) * sc
    return tl.load(z_ptr + at, mask=live, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=["rows", "K", "splits"])
def long_finish(
    z_ptr, target_ptr, weight_ptr, sample_ptr, moments_ptr, saved_ptr, loss_ptr, parts_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, target_stride, sample_stride, ignore_index, splits,
    smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr, DIMS: tl.constexpr,
    R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits' moments, keep what the backward wants, and give the loss; one program where there is a reduction.

    saved: the mean's divisor, then m[rows], S1[rows], n[rows], the penalty's moment [rows] and sum w [rows].
    """
    DTYPE: tl.constexpr = moments_ptr.dtype.element_ty
    WEIGHTED: tl.constexpr = weight_ptr is not None
    acc = tl.zeros((R,), DTYPE)
    acc_w = acc
    acc_ce = acc
    acc_div = acc
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        y, counted, good = _labels(target_ptr, row, rows, target_stride, ignore_index, K)
        w_y, sample = _row_weights(weight_ptr, sample_ptr, row, rows, sample_stride, y, counted, DTYPE)
        z_y = _label_logit(z_ptr, row, y, counted & good, n1, n2, n3, s0, s1, s2, s3, sc, DIMS, DTYPE)
        split = tl.expand_dims(tl.arange(0, SPLITS), 0)
        there = (tl.expand_dims(row, 1) < rows) & (split < splits)
        at = moments_ptr + tl.expand_dims(row, 1).to(tl.int64) * splits + split
        field = tl.cast(rows, tl.int64) * splits
        n, m, s1_, s2_, sx, mean, m2, sw, swx = _merge_lanes(
            tl.load(at, mask=there, other=0.0),
            tl.load(at + field, mask=there, other=-float("inf")),
            tl.load(at + 2 * field, mask=there, other=0.0),
            tl.load(at + 3 * field, mask=there, other=0.0),
            tl.load(at + 4 * field, mask=there, other=0.0),
            tl.load(at + 5 * field, mask=there, other=0.0),
            tl.load(at + 6 * field, mask=there, other=0.0),
            tl.load(at + 7 * field, mask=there, other=0.0),
            tl.load(at + 8 * field, mask=there, other=0.0),
            1,
        )
        loss, ce, div, a, b, t, e0, e1, ew, g_y = _finish(
            n, m, s1_, s2_, sx, mean, m2, sw, swx, z_y, w_y, sample, counted, good, K, smoothing, diversity_weight, z_loss,
            KIND, SMOOTH, WEIGHTED, Z_LOSS,
        )  # fmt: skip
        inside = row < rows
        keep = saved_ptr + 1 + row.to(tl.int64)
        tl.store(keep, m, mask=inside)
        tl.store(keep + rows, s1_, mask=inside)
        tl.store(keep + 2 * rows, n, mask=inside)
        tl.store(keep + 3 * rows, sx if KIND == KL else (s2_ if KIND == CHI2 or KIND == VARIANCE else mean), mask=inside)
        tl.store(keep + 4 * rows, sw, mask=inside)
        if REDUCTION == NONE:
            tl.store(loss_ptr + row, loss, mask=inside)
            if parts_ptr is not None:
                tl.store(parts_ptr + row, ce, mask=inside)
                tl.store(parts_ptr + rows + row, div, mask=inside)
        else:
            acc += loss
            acc_w += w_y * sample
            acc_ce += ce
            acc_div += div
    if REDUCTION != NONE:
        result = tl.sum(acc, 0)
        ce = tl.sum(acc_ce, 0)
        div = tl.sum(acc_div, 0)
        if REDUCTION == MEAN:
            divisor = tl.sum(acc_w, 0)
            tl.store(saved_ptr, divisor)
            result = result / divisor
            ce = ce / divisor
            div = div / divisor
        tl.store(loss_ptr, result)
        if parts_ptr is not None:
            tl.store(parts_ptr, ce)
            tl.store(parts_ptr + 1, div)


@triton.jit(do_not_specialize=["rows", "K", "splits", "tiles"])
def long_spread(
    z_ptr, g_ptr, target_ptr, weight_ptr, sample_ptr, upstream_ptr, saved_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64", splits, tiles,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr, DIMS: tl.constexpr,
    SAME: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The gradient of ``tiles`` tiles of a row from the moments that the forward kept; one program a row and split."""
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    DTYPE: tl.constexpr = saved_ptr.dtype.element_ty
    WEIGHTED: tl.constexpr = weight_ptr is not None
    TILE: tl.constexpr = A * L * V
    inf = float("inf")
    y, counted, good = _labels(target_ptr, row, rows, target_stride, ignore_index, K)
    w_y, sample = _row_weights(weight_ptr, sample_ptr, row, rows, sample_stride, y, counted, DTYPE)
    live = counted & good
    z_y = _label_logit(z_ptr, row, y, live, n1, n2, n3, s0, s1, s2, s3, sc, DIMS, DTYPE)
    scale = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride)
    if REDUCTION == MEAN:
        scale = scale / tl.load(saved_ptr)
    scale = tl.where(live, scale, 0.0)
    keep = saved_ptr + 1 + row.to(tl.int64)
    m = tl.load(keep)
    s1_ = tl.load(keep + rows)
    n = tl.load(keep + 2 * rows)
    moment = tl.load(keep + 3 * rows)
    sw = tl.load(keep + 4 * rows)
    zero = tl.zeros_like(m)
    _, _, _, a_, b_, t_, e0, e1, ew, g_y = _finish(
        n, m, s1_, moment, moment, moment, zero, sw, zero, z_y, w_y, sample, counted, good, K, smoothing, diversity_weight, z_loss,
        KIND, SMOOTH, WEIGHTED, Z_LOSS,
    )  # fmt: skip
    a_, b_, t_, e0, e1, ew, g_y = a_ * scale, b_ * scale, t_ * scale, e0 * scale, e1 * scale, ew * scale, g_y * scale
    base = _finite(m)
    holes = (n != K - 1) | (live == 0)
    z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
    g_row = _offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)
    a = tl.expand_dims(tl.expand_dims(tl.arange(0, A), 1), 2)
    lane = tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
    v = tl.expand_dims(tl.expand_dims(tl.arange(0, V), 0), 1)
    i = a * (L * V) + lane * V + v
    low = z_row
    length = K
    if ALIGN > 0:
        low = (z_row + (ALIGN - 1)) // ALIGN * ALIGN
        length = ((z_row + K) // ALIGN - low // ALIGN).to(tl.int32) * ALIGN
    first = (low - z_row).to(tl.int32)
    for start in range(split * tiles * TILE, min((split + 1) * tiles * TILE, length), TILE):
        exists = i < length - start
        at = low + start
        if ALIGN > 0:
            z = tl.load(z_ptr + at + i, mask=exists & live, other=-inf).to(DTYPE)
        else:
            z = tl.load(z_ptr + z_row + (tl.cast(start, tl.int64) + i) * sc, mask=exists & live, other=-inf).to(DTYPE)
        w = None
        if SMOOTH and weight_ptr is not None:
            w = tl.load(weight_ptr + (first + start) + i, mask=exists, other=0.0)
        x = z - base
        dz = _spread(x, _exp(x), w, a_, b_, t_, e0, e1, ew, KIND, SMOOTH)
        if KIND != 0 or SMOOTH:
            if holes:
                dz = _spread(_fill(x, z), _exp(x), w, a_, b_, t_, e0, e1, ew, KIND, SMOOTH)
                dz = _spread_holes(dz, z, w, a_, ew, SMOOTH)
        here = y - first - start
        if (here >= 0) & (here < TILE):
            dz = tl.where(i == here, g_y, dz)
        dz = dz.to(g_ptr.dtype.element_ty)
        if ALIGN > 0 and SAME:
            tl.store(g_ptr + at + i, dz, mask=exists)
        else:
            tl.store(g_ptr + g_row + (tl.cast(start, tl.int64) + first + i) * tc, dz, mask=exists)
    if ALIGN > 0:
        if split == 0:
            j = tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
            c = tl.where(j < ALIGN, j, j - ALIGN + first + length)
            exists = tl.where(j < ALIGN, j < first, c < K)
            z = tl.load(z_ptr + z_row + c, mask=exists & live, other=-inf).to(DTYPE)
            w = None
            if SMOOTH and weight_ptr is not None:
                w = tl.load(weight_ptr + c, mask=exists, other=0.0)
            x = z - base
            dz = _spread(_fill(x, z), _exp(x), w, a_, b_, t_, e0, e1, ew, KIND, SMOOTH)
            dz = tl.where(c == y, g_y, _spread_holes(dz, z, w, a_, ew, SMOOTH))
            tl.store(g_ptr + g_row + c.to(tl.int64) * tc, dz.to(g_ptr.dtype.element_ty), mask=exists)
