"""Rows of more classes than a few threads hold, read in chunks [R, L, V]: V neighbouring classes for each of L lanes of R rows.

What keeps it near the memory's speed is what is not done for every logit. Means and exponents are offsets from the row's
``base``, the mean of its first chunk, in units of log(2), so that one x = z log2(e) - base serves both. A chunk asks for the true class, the row's ends
or masked classes only where there are some: a true class or a place beyond the ends stands in as the base itself, which
adds e^0 = 1 to S1 and nothing to the other sums, and that is taken out again; a row's first chunk has at least as many
classes as are taken out and a mean e^x >= 1, so nothing cancels. Where a sum shows that the base was no good
(masked classes, NaN, infinities, logits far above it, or all the same but for roundings), the row is read once more by ``_careful``.
"""

# ruff: noqa: F821, RUF005, RUF059, SIM102 (see triton_finish)
import triton
import triton.language as tl

from fastsoftloss.triton_finish import (
    CHI2,
    KL,
    LN2,
    LN2_LOW,
    LOG2E,
    LOGIT_VARIANCE,
    MEAN,
    NONE,
    REVERSE_KL,
    VARIANCE,
    _count,
    _finite,
    _fma,
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

# beyond it the exponents of some e^x, and of their products in a gradient, would come near the ends of float32
LIMIT = tl.constexpr(2.0**40)
# of float32 logits; times log2(e) it is a number, which that of the lowest number, often a mask, is not
LOWEST = tl.constexpr(-(2.0**127))
FIELDS = tl.constexpr(4)  # of a saved row gradient, beside one for each class left out


# ---------------------------------------------------------------- places


@triton.jit
def _of_rows(row_scalar):
    """[R] -> [R, 1, 1]"""
    return tl.expand_dims(tl.expand_dims(row_scalar, 1), 2)


@triton.jit
def _each_of_rows(values):
    of_rows = ()
    for i in tl.static_range(len(values)):
        of_rows = of_rows + (_of_rows(values[i]),)
    return of_rows


@triton.jit
def _positions(L: tl.constexpr, V: tl.constexpr):
    """[1, L, V]: the places of a chunk."""
    lane = tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
    return lane * V + tl.expand_dims(tl.expand_dims(tl.arange(0, V), 0), 1)


@triton.jit
def _window(z_row, K, START: tl.constexpr, ALIGN: tl.constexpr):
    """Where 16-byte accesses to a row may lie: (offset of place 0, its class, the first place of the row, the place behind its last).

    Every row starts at a multiple of START, and has whole 16-byte vectors if that is one. With START of half a memory sector (ALIGN) the places begin in the row before,
    so that no sector is asked for twice; with less they begin and end inside of the row, and leave edges.
    """
    if START == 0 or START >= ALIGN:
        begin = (z_row * 0).to(tl.int32)
        low = z_row if START == 0 else z_row // ALIGN * ALIGN  # says to the compiler what is so
        return low, begin, begin, begin + (K // (ALIGN // 2) * (ALIGN // 2) if START > 0 else K)
    elif START * 2 >= ALIGN:
        low = z_row // ALIGN * ALIGN
        begin = ((z_row - low) // START * START).to(tl.int32)
        return low, -begin, begin, begin + K // (ALIGN // 2) * (ALIGN // 2)
    else:
        low = (z_row + (ALIGN - 1)) // ALIGN * ALIGN
        end = ((z_row + K) // ALIGN - low // ALIGN).to(tl.int32) * ALIGN
        return low, (low - z_row).to(tl.int32), end * 0, end


@triton.jit
def _edges(first, end, K, ALIGN: tl.constexpr, L: tl.constexpr):
    """(classes of the edges [R, L, few], which there are): the row's head and tail that the window leaves."""
    few = tl.arange(0, 2 * ALIGN // L if L < 2 * ALIGN else 1)
    i = tl.expand_dims(tl.expand_dims(few, 0), 0) * L + tl.expand_dims(tl.expand_dims(tl.arange(0, L), 0), 2)
    c = tl.where(i < ALIGN, i, i - ALIGN + first + end)
    return c, tl.where(i < ALIGN, i < first, c < K)


@triton.jit
def _less(places, shift):
    """Each of ``places`` less shift."""
    less = ()
    for i in tl.static_range(len(places)):
        less = less + (places[i] - shift,)
    return less


@triton.jit
def _within(places, begin, end):
    """Whether each of ``places`` lies in begin..end."""
    within = ()
    for i in tl.static_range(len(places)):
        within = within + ((places[i] >= begin) & (places[i] < end),)
    return within


@triton.jit
def _chunk_of_each(places, B: tl.constexpr):
    """Which chunk of B places each of ``places`` is in, or -1."""
    chunks = ()
    for i in tl.static_range(len(places)):
        chunks = chunks + (tl.where(places[i] >= 0, places[i] // B, -1),)
    return chunks


@triton.jit
def _live_sample(label):
    """The sample weight of a label that asks for a gradient, else 0."""
    _, _, sample, counted, good = label
    return tl.where(counted & good, sample, 0.0)


# ---------------------------------------------------------------- reduce


@triton.jit
def _x(z, base):
    """z as the logarithm of base 2 of e^(z - base); float64 stays with natural logarithms. A constant in the base is one for all."""
    if z.dtype == tl.float64:
        return z - base
    else:
        return _fma(z, tl.full(z.shape, LOG2E, tl.float32), -base)


@triton.jit
def _raised(z):
    """z as ``_careful`` has it: not so low that it would pass for -inf in the units of x."""
    if z.dtype == tl.float64:
        return z
    else:
        return tl.where(z == -float("inf"), z, tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _raised_labels(logits, base):
    """Logits of the true classes beside others that are all as low as ``_raised`` has them."""
    result = ()
    for i in tl.static_range(len(logits)):
        result = result + (tl.where(base <= LOWEST, _raised(logits[i]), logits[i]),)
    return result


@triton.jit
def _power(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def _base(z):
    """The base that makes x = 0 of z."""
    if z.dtype == tl.float64:
        return z
    else:
        return z * LOG2E


@triton.jit
def _natural(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x * LN2


@triton.jit
def _natural2(x2):
    if x2.dtype == tl.float64:
        return x2
    else:
        return x2 * (LN2 * LN2)


@triton.jit
def _margin(z_y, base):
    """(the base less z_y, what that lost by rounding), in natural units."""
    x = _x(z_y, base)
    d = -_natural(x)
    if z_y.dtype == tl.float64:
        return d, _two_sum_error(base, -z_y, d)
    else:
        again = base + x  # what x lost, by explicit products: the compiler would contract others
        low = _fma(z_y, tl.full(z_y.shape, LOG2E, tl.float32), -again) - _two_sum_error(base, x, again)
        error = _fma(-x, tl.full(x.shape, LN2, tl.float32), -d) - (x * LN2_LOW + low * LN2)
        return d, tl.where(tl.abs(error) < 1.0, error, 0.0)  # infinities


@triton.jit
def _marked(base, odd):
    """The base with its last bit as ``odd``: 1 where the row was read carefully and may have masked classes.

    Any number near the logits is a good base, and the backward must know; another float a row would cost more than a bit.
    """
    if base.dtype == tl.float64:
        return ((base.to(tl.int64, bitcast=True) & -2) | odd).to(tl.float64, bitcast=True)
    else:
        return ((base.to(tl.int32, bitcast=True) & -2) | odd).to(tl.float32, bitcast=True)


@triton.jit
def _odd(base):
    if base.dtype == tl.float64:
        return (base.to(tl.int64, bitcast=True) & 1).to(tl.int32)
    else:
        return base.to(tl.int32, bitcast=True) & 1


@triton.jit
def _flat(n, base, m2, KIND: tl.constexpr):
    """Whether the logits differ by no more than the base was rounded by, so that M2 is a difference of what is left of that."""
    if KIND == LOGIT_VARIANCE:
        rounding = base * (2.0**-51 if base.dtype == tl.float64 else 2.0**-22)
        return m2 < n * (rounding * rounding)
    else:
        return n < 0.0


@triton.jit
def _row_sum(t):
    """[R, L, V] -> [R]"""
    return tl.sum(tl.sum(t, 2), 1)


@triton.jit
def _add(s1, s2, sx, d1, d2, x, e, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """Add a chunk to sums of its own shape."""
    s1 += e
    if KIND == CHI2 or KIND == VARIANCE:
        s2 = tl.fma(e, e, s2)
    if KIND == KL:
        sx = tl.fma(e, x, sx)
    if KIND != 0 or SMOOTH:
        d1 += x
    if KIND == LOGIT_VARIANCE:
        d2 = tl.fma(x, x, d2)
    return s1, s2, sx, d1, d2


@triton.jit
def _careful(
    z_ptr, weight_ptr, z_row, sc, out, live, start, stop,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, L: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The moments of classes start..stop of each row whatever its logits are, relative to a base near the complement's maximum, in three readings."""
    inf = float("inf")
    at = _of_rows(z_row)
    reads = _of_rows(live)
    out = _each_of_rows(out)
    p = _positions(L, V)
    zero = tl.zeros((z_row.shape[0], L, V), DTYPE)
    top = zero - inf
    for i in range(start, stop, L * V):
        c = p + i
        z = tl.load(z_ptr + at + c.to(tl.int64) * sc, mask=(c < stop) & (_is_any(c, out) == 0) & reads, other=-inf).to(DTYPE)
        top = tl.maximum(top, z)
    row_top = _raised(_finite(tl.max(tl.max(top, 2), 1)))
    row_base = _marked(_base(row_top), 1)
    row_middle = tl.zeros_like(row_top)
    if KIND == LOGIT_VARIANCE:  # what the base was rounded by: the mean of a flat row, exactly
        row_middle = _x(row_top, row_base)
    base = _of_rows(row_base)
    middle = _of_rows(row_middle)
    n = zero
    s1, s2, sx, d1, sw, swx = zero, zero, zero, zero, zero, zero
    for i in range(start, stop, L * V):
        c = p + i
        others = (c < stop) & (_is_any(c, out) == 0) & reads
        x = tl.load(z_ptr + at + c.to(tl.int64) * sc, mask=others, other=-inf).to(DTYPE)
        x = _x(_raised(x), base)
        e = _power(x)
        s1 += e
        if SMOOTH:
            if weight_ptr is not None:
                w = tl.load(weight_ptr + c, mask=others, other=0.0)
                sw += w
                swx += tl.where(others, w * x, 0.0)
            else:
                sw += tl.where(others, zero + 1.0, 0.0)
                swx += tl.where(others, x, 0.0)
        there = x != -inf
        x = tl.where(there, x, 0.0)
        n += tl.where(there, zero + 1.0, 0.0)
        s2 += e * e
        sx += e * x
        d1 += tl.where(there, x - middle, 0.0)
    n = _row_sum(n)
    mean = row_middle + _quotient(_row_sum(d1), tl.maximum(n, 1.0))
    m2 = zero
    if KIND == LOGIT_VARIANCE:
        for i in range(start, stop, L * V):
            c = p + i
            x = tl.load(z_ptr + at + c.to(tl.int64) * sc, mask=(c < stop) & (_is_any(c, out) == 0) & reads, other=-inf).to(DTYPE)
            x = _x(_raised(x), base)
            x = tl.where(x != -inf, x - _of_rows(mean), 0.0)
            m2 += x * x
    return n, row_base, _row_sum(s1), _row_sum(s2), _row_sum(sx), mean, _row_sum(m2), _row_sum(sw), _row_sum(swx)


# ---------------------------------------------------------------- a saved row gradient


@triton.jit
def _fields(row, rows, LABELS: tl.constexpr):
    """(where the fields of a row's gradient lie, which of 8 there are): side by side, since a row alone would waste a sector on each."""
    i = tl.expand_dims(tl.arange(0, 8), 0)
    return tl.expand_dims(row, 1).to(tl.int64) * (FIELDS + LABELS) + i, (tl.expand_dims(row, 1) < rows) & (i < FIELDS + LABELS)


@triton.jit
def _save(saved_ptr, row, rows, base, a, p, e0, g_y):
    """saved[row] = what the backward wants of a row: base, a, p, e0 and the gradient of each class left out."""
    nothing = tl.zeros_like(a)
    last = nothing
    if len(g_y) == 2:
        last = g_y[1]
    fields = tl.join(tl.join(tl.join(base, g_y[0]), tl.join(p, nothing)), tl.join(tl.join(a, last), tl.join(e0, nothing)))
    at, inside = _fields(row, rows, len(g_y))
    tl.store(saved_ptr + at, tl.reshape(fields, (row.shape[0], 8)), mask=inside)


@triton.jit
def _saved(saved_ptr, row, rows, LABELS: tl.constexpr):
    """(base, a, p, e0, dz of each class left out) as ``_save`` left them."""
    at, inside = _fields(row, rows, LABELS)
    fields = tl.load(saved_ptr + at, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(fields, (row.shape[0], 2, 2, 2)))
    bg, p_ = tl.split(even)
    a_, e0_ = tl.split(odd)
    base, g = tl.split(bg)
    p, _ = tl.split(p_)
    a, last = tl.split(a_)
    e0, _ = tl.split(e0_)
    if LABELS == 1:
        return base, a, p, e0, (g,)
    else:
        return base, a, p, e0, (g, last)


# ---------------------------------------------------------------- finish, spread


@triton.jit
def _finish_rows(
    n, inverse_n, base, s1, s2, sx, mean, m2, sw, swx, labels, there, logits, options,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """``_finish_labels`` of moments in the units of x; what the gradient multiplies with x is in them again."""
    margins = ()
    for i in tl.static_range(len(labels)):
        d, error = _margin(logits[i], base)
        margins = margins + ((tl.where(n == 0.0, -float("inf") - logits[i], d), error),)  # NaN where nothing at all is left
    base = tl.where(n == 0.0, 0.0, _natural(base))
    moments = (n, inverse_n, s1, s2, _natural(sx), _natural(mean), _natural2(m2), sw, _natural(swx))
    loss, ce, div, weight, a, q, e0, ew, g_y = _finish_labels(moments, base, labels, there, logits, margins, options, KIND, SMOOTH, Z_LOSS)
    if KIND == LOGIT_VARIANCE or KIND == KL:
        q = _natural(q)
    if KIND == LOGIT_VARIANCE and len(labels) == 1:  # of a flat row x q - mean q would be a rounding
        q = tl.where(m2 == 0.0, 0.0, q)
        e0 = tl.where(m2 == 0.0, 0.0, e0)
    return loss, ce, div, weight, a, q, e0, ew, g_y


@triton.jit
def _spread_any(
    z_ptr, g_ptr, weight_ptr, z_at, g_at, c, inside, reads, writes, out, base, a, q, e0, ew, g_y,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of classes c where ``inside``, whatever their logits are."""
    z = tl.load(z_ptr + z_at, mask=inside & reads, other=0.0).to(DTYPE)
    w = None
    if SMOOTH and weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=inside, other=0.0)
    x = _x(z, base)
    dz = _spread_holes(_spread(x, _power(x), w, a, q, e0, ew, KIND, SMOOTH), x, w, a, ew, SMOOTH)
    tl.store(g_ptr + g_at, _place(dz, c, out, g_y).to(g_ptr.dtype.element_ty), mask=inside & writes)


# ---------------------------------------------------------------- rows that fit on chip


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _chunks_of(places, stop, B: tl.constexpr):
    """Which chunks of B places hold any of ``places``, [R] each, for ``_holds``: a bit for each, or the chunk of the only one."""
    bits = places[0] * 0
    for i in tl.static_range(len(places)):
        chunk = places[i] // B
        there = (places[i] >= 0) & (places[i] < stop)
        bits |= tl.where(there, 1 << chunk, 0)
    if places[0].shape[0] == 1 and len(places) == 1:
        return tl.max(tl.where(there, chunk, -1), 0)
    else:
        return tl.reduce(bits, 0, _or)


@triton.jit
def _holds(chunks, i, ONE: tl.constexpr):
    if ONE:
        return chunks == i
    else:
        return (chunks >> i) & 1 != 0


@triton.jit(do_not_specialize=["rows"])
def resident_rows(
    z_ptr, g_ptr, target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, upstream_ptr, loss_ptr, parts_ptr, partials_ptr,
    divisor_ptr, shares_ptr, counter_ptr, saved_ptr,
    rows, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    K: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr,
    DIMS: tl.constexpr, SAME: tl.constexpr, RESCALE: tl.constexpr, UPSTREAM_ROWS: tl.constexpr, SHARES: tl.constexpr,
    START: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, R: tl.constexpr, L: tl.constexpr, V: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Rows of A chunks: one read of the logits, and of the gradient one write where g_ptr is given.

    loss_ptr, parts_ptr: where the row losses go, or with a reduction the total (written by the last program to finish
    if counter_ptr is given, else by ``total``). upstream_ptr: the gradient from above, () or one a row. saved_ptr: where
    the backward will look for each row's gradient. other_ptr, other_sample_ptr: where a row has a second label, that and its weight.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    B: tl.constexpr = L * V
    EDGES: tl.constexpr = START * 2 < ALIGN
    EDGE_SLOTS: tl.constexpr = (2 * ALIGN if L < 2 * ALIGN else L) if EDGES else 0
    HEAD: tl.constexpr = START < ALIGN and not EDGES
    MIN_END: tl.constexpr = K // ALIGN * ALIGN - ALIGN if EDGES else K
    # up the true class: a memory sector more, fewer instructions
    LOOK: tl.constexpr = K >= 2048 or (g_ptr is not None and not EDGES) or other_ptr is not None
    ONE: tl.constexpr = R == 1 and other_ptr is None
    inf = float("inf")
    acc = tl.zeros((R,), DTYPE)
    acc_w = acc
    acc_ce = acc
    acc_div = acc
    scale_all, work_all = _scale(shares_ptr, divisor_ptr, upstream_ptr, SHARES, UPSTREAM_ROWS, RESCALE, DTYPE)

    targets = (target_ptr, other_ptr, target_stride)
    samples = (sample_ptr, other_sample_ptr, sample_stride)
    options = (K, smoothing, diversity_weight, z_loss)
    p = _positions(L, V)
    for tile in range(program, tl.cdiv(rows, R), programs):
        row = tile * R + tl.arange(0, R)
        scale, work = _row_scale(scale_all, work_all, upstream_ptr, row, rows, upstream_stride, UPSTREAM_ROWS, RESCALE)
        if work:
            labels = _row_labels(targets, samples, weight_ptr, row, rows, ignore_index, K, COPIES, DTYPE)
            out, there, live = _left_out(labels)
            scale = tl.where(live, scale, 0.0)  # with no row that counts the mean's 1/0 stays out of the gradient
            reads = _of_rows(live)  # a row that asks for no gradient is flat
            z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
            low, first, begin, end = _window(z_row, K, START, ALIGN)
            places = _less(out, first)  # of the classes left out
            if LOOK:
                logits = _logits_of(z_ptr, z_row, 1, labels, DTYPE)
            holds = _chunks_of(places, A * B, B)
            z_at = z_ptr + (_of_rows(low) + p)
            places_ = _each_of_rows(places)
            first_, begin_, end_ = _of_rows(first), _of_rows(begin), _of_rows(end)
            # ---- load
            chunks = ()
            for i in tl.static_range(A):
                inside = reads
                if i == 0 and HEAD:
                    inside = inside & (p >= begin_)
                if (i + 1) * B > MIN_END:
                    inside = inside & (p + i * B < end_)
                chunks = chunks + (tl.load(z_at + i * B, mask=inside, other=0.0),)
            if EDGES:
                edge_c, edge_there = _edges(first_, end_, K, ALIGN, L)
                edge_others = edge_there & (_is_any(edge_c, places_, -first_) == 0)
                edge_z = tl.load(z_ptr + _of_rows(z_row) + edge_c, mask=edge_there & reads, other=0.0).to(DTYPE)
            # ---- reduce
            z = chunks[0].to(DTYPE)
            in_first = _within(places, begin, B)
            inverse_n = _inverse_left(B, in_first, 0.0)
            if HEAD:  # a row begins at place 0 or START
                inverse_n = tl.where(begin > 0, _inverse_left(B - START, in_first, 0.0), inverse_n)
            if LOOK:
                z_sum = z * 0.0
                base = _row_sum(z)
                for i in tl.static_range(len(labels)):
                    base -= tl.where(in_first[i], logits[i], 0.0)
            else:
                z_sum = tl.where(p == places_[0], z, 0.0)
                base = _row_sum(tl.where(p == places_[0], 0.0, z))
            base = _marked(_base(base * inverse_n), 0)
            base_ = _of_rows(base)
            s1_, s2_, sx, d1, d2 = z, z, z, z, z
            xs = ()
            es = ()
            for i in tl.static_range(A):
                z = chunks[i].to(DTYPE)
                x = _x(z, base_)
                if i == 0 and HEAD:
                    x = tl.where(p >= begin_, x, 0.0)
                if (i + 1) * B > MIN_END:
                    x = tl.where(p + i * B < end_, x, 0.0)
                if _holds(holds, i, ONE):
                    if not LOOK and i > 0:
                        z_sum += tl.where(p == places_[0] - i * B, z, 0.0)
                    x = tl.where(_is_any(p, places_, i * B), 0.0, x)
                e = _power(x)
                if i == 0:  # an addition of 0 is not folded away
                    s1_, s2_, sx, d1, d2 = e, e * e, e * x, x, x * x
                else:
                    s1_, s2_, sx, d1, d2 = _add(s1_, s2_, sx, d1, d2, x, e, KIND, SMOOTH)
                xs = xs + (x,)
                es = es + (e,)
            s1_, s2_, sx, d1, d2 = tl.sum(s1_, 2), tl.sum(s2_, 2), tl.sum(sx, 2), tl.sum(d1, 2), tl.sum(d2, 2)
            if EDGES:
                edge_x = tl.where(edge_others, _x(edge_z, base_), 0.0)
                edge_e = _power(edge_x)
                s1_ += tl.sum(edge_e, 2)
                # a bare product would be contracted into the first exchange between lanes, and each lane would round it differently
                s2_ += tl.sum(tl.where(edge_others, edge_e * edge_e, 1.0), 2)
                sx += tl.sum(tl.where(edge_others, edge_e * edge_x, 0.0), 2)
                d1 += tl.sum(edge_x, 2)
                d2 += tl.sum(tl.where(edge_others, edge_x * edge_x, 0.0), 2)
            s1_, s2_, sx, d1, d2 = tl.sum(s1_, 1), tl.sum(s2_, 1), tl.sum(sx, 1), tl.sum(d1, 1), tl.sum(d2, 1)
            if not LOOK:
                z_sum = tl.sum(z_sum, 2)
                if EDGES:
                    z_sum += tl.sum(tl.where(edge_there & (edge_others == 0), edge_z, 0.0), 2)
                logits = (tl.sum(z_sum, 1),)
            count = _count(there, s1_)
            s1_ -= count + (A * B + EDGE_SLOTS - K)
            s2_ -= count + (A * B + EDGE_SLOTS - K)
            n = K - count
            inverse_n = _inverse_left(K, there, tl.zeros_like(s1_))
            mean = d1 * inverse_n
            m2 = d2 - d1 * mean
            sw = n
            swx = d1
            if SMOOTH and weight_ptr is not None:
                sw = tl.zeros_like(z)
                swx = sw
                for i in tl.static_range(A):
                    others = (p + i * B >= begin_) & (p + i * B < end_) & (_is_any(p + i * B, places_) == 0)
                    w = tl.load(weight_ptr + (p + i * B + first_), mask=others, other=0.0)
                    sw += w
                    swx += w * xs[i]
                sw = _row_sum(sw)
                swx = _row_sum(swx)
                if EDGES:
                    w = tl.load(weight_ptr + edge_c, mask=edge_others, other=0.0)
                    sw += _row_sum(w)
                    swx += _row_sum(w * edge_x)
            good_base = (tl.abs(d1) < inf) & (s1_ < LIMIT) & (_flat(n, base, m2, KIND) == 0)
            careful = tl.max(good_base.to(tl.int32) ^ 1, 0) != 0
            if careful:
                n, base, s1_, s2_, sx, mean, m2, sw, swx = _careful(z_ptr, weight_ptr, z_row, 1, out, live, 0, K, KIND, SMOOTH, L, V, DTYPE)
                inverse_n = 1.0 / tl.maximum(n, 1.0)
                logits = _raised_labels(logits, base)
            # ---- finish
            loss, ce, div, weight, a, q, e0, ew, g_y = _finish_rows(
                n, inverse_n, base, s1_, s2_, sx, mean, m2, sw, swx, labels, there, logits, options, KIND, SMOOTH, Z_LOSS
            )
            if loss_ptr is not None:
                if REDUCTION == NONE:
                    _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div)
                else:
                    acc += loss
                    acc_w += weight
                    acc_ce += ce
                    acc_div += div
            if saved_ptr is not None:
                _save(saved_ptr, row, rows, base, a, q, e0, g_y)
            # ---- spread
            if g_ptr is not None:
                a, q, e0, ew, g_y = (
                    _of_rows(a * scale),
                    _of_rows(q * scale),
                    _of_rows(e0 * scale),
                    _of_rows(ew * scale),
                    _each_of_rows(_scaled(g_y, scale)),
                )
                g_row = _offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS)
                g_at = _of_rows(g_row)
                writes = _of_rows(row < rows)
                if careful:
                    for start in range(0, K, B):
                        _spread_any(
                            z_ptr, g_ptr, weight_ptr, _of_rows(z_row) + (p + start), g_at + (p + start) * tc, p + start, p + start < K, reads, writes,
                            _each_of_rows(out), _of_rows(base), a, q, e0, ew, g_y, KIND, SMOOTH, DTYPE,
                        )  # fmt: skip
                else:
                    w = None
                    # where the strides are the same a step is a constant, and a part of the instruction
                    g_to = g_ptr + (_of_rows(low) + p if SAME else g_at + (p + first_) * tc)
                    for i in tl.static_range(A):
                        inside = writes
                        if i == 0 and HEAD:
                            inside = inside & (p >= begin_)
                        if (i + 1) * B > MIN_END:
                            inside = inside & (p + i * B < end_)
                        if SMOOTH and weight_ptr is not None:
                            w = tl.load(weight_ptr + (p + i * B + first_), mask=inside, other=0.0)
                        dz = _spread(xs[i], es[i], w, a, q, e0, ew, KIND, SMOOTH)
                        if _holds(holds, i, ONE):
                            dz = _place(dz, p, places_, g_y, i * B)
                        tl.store(g_to + i * B * (1 if SAME else tc), dz.to(g_ptr.dtype.element_ty), mask=inside)
                    if EDGES:
                        if SMOOTH and weight_ptr is not None:
                            w = tl.load(weight_ptr + edge_c, mask=edge_there, other=0.0)
                        own = g_y[0]
                        if other_ptr is not None:
                            own = tl.where(edge_c == places_[1] + first_, g_y[1], own)
                        dz = tl.where(edge_others, _spread(edge_x, edge_e, w, a, q, e0, ew, KIND, SMOOTH), own)
                        tl.store(g_ptr + g_at + edge_c * tc, dz.to(g_ptr.dtype.element_ty), mask=edge_there & writes)
    if loss_ptr is not None and REDUCTION != NONE:
        _keep_totals(
            partials_ptr, divisor_ptr, loss_ptr, parts_ptr, counter_ptr,
            tl.sum(acc, 0), tl.sum(acc_w, 0), tl.sum(acc_ce, 0), tl.sum(acc_div, 0), REDUCTION,
        )  # fmt: skip


# ---------------------------------------------------------------- rows that do not fit


@triton.jit
def _read(z_ptr, at, place, sc, inside, ALIGN: tl.constexpr, DTYPE: tl.constexpr):
    """A chunk of logits; ALIGN 0: with any class stride."""
    if ALIGN > 0:
        return tl.load(z_ptr + at + place, mask=inside, other=0.0).to(DTYPE)
    else:
        return tl.load(z_ptr + at + place.to(tl.int64) * sc, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _lanes(t):
    """[1, L, V] -> [L]"""
    return tl.sum(tl.sum(t, 2), 0)


@triton.jit
def _lane_counts(begin, end, places, L: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr):
    """[L]: how many of each lane's V places lie in begin..end, the ``places`` left out."""
    at = tl.arange(0, L) * V
    n = tl.minimum(tl.maximum(end - at, 0), V) - tl.minimum(tl.maximum(begin - at, 0), V)
    for i in tl.static_range(len(places)):
        n -= ((places[i] >= begin) & (places[i] < end) & (places[i] - at >= 0) & (places[i] - at < V)).to(tl.int32)
    return n.to(DTYPE)


@triton.jit
def _fold(n, base, s1, s2, sx, d1, d2, block_n, block, KIND: tl.constexpr):
    """Add a block's sums to those of each lane and move the lane's base to its mean so far.

    From a base that is not the mean, M2 = D2 - D1^2/n loses digits by D2/M2, which is bounded by the block's size over
    that of what the base is the mean of.
    """
    n += block_n
    s1 += _lanes(block[0])
    s2 += _lanes(block[1])
    sx += _lanes(block[2])
    d1 += _lanes(block[3])
    d2 += _lanes(block[4])
    if KIND == LOGIT_VARIANCE:
        moved = _marked(base + d1 / tl.maximum(n, 1.0), 0)
        shift = base - moved
        d2 += shift * (d1 + (d1 + n * shift))
        d1 += n * shift
        s1 *= _power(shift)
        base = moved
    return n, base, s1, s2, sx, d1, d2


@triton.jit
def _merge(n, m, s1, s2, sx, mean, m2, sw, swx, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """Moments of lanes or splits [..., parts] -> [...], each relative to its base m."""
    AXIS: tl.constexpr = len(n.shape) - 1
    empty = n == 0.0
    top = tl.max(tl.where(empty, -float("inf"), m), AXIS, keep_dims=True)
    top = _marked(_finite(top), tl.max(_odd(m), AXIS, keep_dims=True))
    shift = tl.where(empty, 0.0, m - top)
    shrink = tl.where(empty, 0.0, _power(shift))
    count = tl.sum(n, AXIS, keep_dims=True)
    total = tl.sum(count, AXIS)
    nothing = total * 0.0
    sum2, sumx, centre, squares, sumw, sumwx = nothing, nothing, nothing, nothing, nothing, nothing
    # a bare product would be contracted into the first exchange between lanes, and each lane would round it differently
    if KIND == KL:
        gone = empty | (shrink == 0.0)  # and s1 * shift may be beyond all numbers
        sumx = tl.sum(tl.where(gone, 0.0, shrink * (sx + s1 * shift)), AXIS)
    if KIND == CHI2 or KIND == VARIANCE:
        sum2 = tl.sum(tl.where(empty, 0.0, s2 * (shrink * shrink)), AXIS)
    if KIND == LOGIT_VARIANCE or KIND == REVERSE_KL:
        start = _finite(tl.max(tl.where(empty, -float("inf"), mean + shift), AXIS, keep_dims=True))  # means that are the same stay so
        above = tl.sum(tl.where(empty, 0.0, n * (mean + shift - start)), AXIS, keep_dims=True)
        middle = start + _quotient(above, tl.maximum(count, 1.0))
        centre = tl.sum(middle, AXIS)
    if KIND == LOGIT_VARIANCE:
        gap = mean + shift - middle
        squares = tl.sum(tl.where(empty, 0.0, m2 + n * (gap * gap)), AXIS)
    if SMOOTH:
        sumw = tl.sum(sw, AXIS)
        sumwx = tl.sum(tl.where(empty, swx, swx + sw * shift), AXIS)
    sum1 = tl.sum(tl.where(empty, 0.0, s1 * shrink), AXIS)
    return total, tl.max(top, AXIS), sum1, sum2, sumx, centre, squares, sumw, sumwx


@triton.jit(do_not_specialize=["rows", "K", "splits", "chunks"])
def long_reduce(
    z_ptr, target_ptr, other_ptr, weight_ptr, moments_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, target_stride, ignore_index, splits, chunks,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, DIMS: tl.constexpr, START: tl.constexpr, ALIGN: tl.constexpr,
    L: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """moments[field, row, split]: the moments of ``chunks`` chunks of a row's complement, one program a row and split.

    TILE chunks are read at a time, BLOCK of them summed between two moves of the lanes' bases.
    """
    program = tl.program_id(0)
    row = program // splits + tl.arange(0, 1)
    split = program % splits
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    B: tl.constexpr = L * V
    inf = float("inf")
    labels = _row_labels((target_ptr, other_ptr, target_stride), (None, None, 0), None, row, rows, ignore_index, K, 0, DTYPE)
    out, _, live = _left_out(labels)
    one = tl.zeros((1,), DTYPE)
    n, m, sum1, sum2, sumx, mean, m2, sw, swx = one, one, one, one, one, one, one, one, one
    if tl.max(live.to(tl.int32), 0) != 0:
        z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
        low, first, begin, end = _window(z_row, K, START, ALIGN)
        at, first_, begin_, end_ = _of_rows(low), _of_rows(first), _of_rows(begin), _of_rows(end)
        places = _less(out, first)
        places_ = _each_of_rows(places)
        stop_place = tl.max(end, 0)
        p = _positions(L, V)
        from_chunk = split * chunks
        to_chunk = min(from_chunk + chunks, tl.cdiv(stop_place, B))
        last = split == splits - 1

        zero = tl.zeros((1, L, V), DTYPE)
        lane = tl.zeros((L,), DTYPE)
        # the first chunk gives the base
        q = p + from_chunk * B
        others = (q >= begin_) & (q < end_)
        z = _read(z_ptr, at, q, sc, others, ALIGN, DTYPE)
        others = others & (_is_any(q, places_) == 0)
        z = tl.where(others, z, 0.0)
        from_place = from_chunk * B
        block_n = _lane_counts(begin - from_place, tl.minimum(end - from_place, B), _less(places, from_place), L, V, DTYPE)
        base = tl.sum(_row_sum(z), 0) / tl.maximum(tl.sum(block_n, 0), 1.0) + lane
        base = _marked(_base(base), 0)
        x = tl.where(others, _x(z, tl.expand_dims(tl.expand_dims(base, 0), 2)), 0.0)
        block = _add(zero, zero, zero, zero, zero, x, tl.where(others, _power(x), 0.0), KIND, SMOOTH)
        lane_n = lane
        lane_1, lane_2, lane_x, lane_d1, lane_d2 = lane, lane, lane, lane, lane
        whole = from_chunk + 1 + max(min(to_chunk, tl.min(end, 0) // B) - from_chunk - 1, 0) // TILE * TILE
        step = 1 if ALIGN > 0 else tl.cast(sc, tl.int64)
        lane_at = p if ALIGN > 0 else p.to(tl.int64) * sc
        for start in range(from_chunk + 1, whole, BLOCK):
            base_ = tl.expand_dims(tl.expand_dims(base, 0), 2)
            for tile in range(start, min(start + BLOCK, whole), TILE):
                z_at = z_ptr + (at + tl.cast(tile, tl.int64) * B * step) + lane_at
                xs = ()
                for i in tl.static_range(TILE):
                    xs = xs + (_x(tl.load(z_at + i * B * step).to(DTYPE), base_),)
                for k in tl.static_range(len(places)):
                    chunk = tl.max(tl.where(places[k] >= 0, places[k] // B, -1), 0)
                    if (chunk >= tile) & (chunk < tile + TILE):
                        rest = ()
                        for i in tl.static_range(TILE):
                            rest = rest + (tl.where(p == places_[k] - (tile + i) * B, 0.0, xs[i]),)
                        xs = rest
                        stand_in = (tl.arange(0, L) == places[k] % B // V).to(DTYPE)
                        block_n -= stand_in
                        lane_1 -= stand_in
                        lane_2 -= stand_in
                for i in tl.static_range(TILE):
                    block = _add(block[0], block[1], block[2], block[3], block[4], xs[i], _power(xs[i]), KIND, SMOOTH)
                block_n += TILE * V
            lane_n, base, lane_1, lane_2, lane_x, lane_d1, lane_d2 = _fold(
                lane_n, base, lane_1, lane_2, lane_x, lane_d1, lane_d2, block_n, block, KIND
            )
            block = (zero, zero, zero, zero, zero)
            block_n = lane
        base_ = tl.expand_dims(tl.expand_dims(base, 0), 2)
        for chunk in range(whole, to_chunk):
            q = p + chunk * B
            others = (q >= begin_) & (q < end_)
            z = _read(z_ptr, at, q, sc, others, ALIGN, DTYPE)
            others = others & (_is_any(q, places_) == 0)
            x = tl.where(others, _x(z, base_), 0.0)
            block = _add(block[0], block[1], block[2], block[3], block[4], x, tl.where(others, _power(x), 0.0), KIND, SMOOTH)
            block_n += _lane_counts(begin - chunk * B, end - chunk * B, _less(places, chunk * B), L, V, DTYPE)
        if START * 2 < ALIGN:
            if (split == 0) | last:
                c = tl.where(p < ALIGN, p, p - ALIGN + first_ + end_)
                others = tl.where(p < ALIGN, (p < first_) & (split == 0), (c < K) & last) & (_is_any(c, _each_of_rows(out)) == 0)
                x = tl.where(others, _x(_read(z_ptr, _of_rows(z_row), c, sc, others, ALIGN, DTYPE), base_), 0.0)
                block = _add(block[0], block[1], block[2], block[3], block[4], x, tl.where(others, _power(x), 0.0), KIND, SMOOTH)
                block_n += _lanes(tl.where(others, zero + 1.0, 0.0))
        lane_n, base, lane_1, lane_2, lane_x, lane_d1, lane_d2 = _fold(
            lane_n, base, lane_1, lane_2, lane_x, lane_d1, lane_d2, block_n, block, KIND
        )
        lane_mean = lane_d1 / tl.maximum(lane_n, 1.0)
        bad = ((tl.abs(lane_d1) < inf) & (lane_1 < LIMIT)) == 0
        start = tl.max(first, 0) + from_chunk * B
        stop = tl.max(first, 0) + min(to_chunk * B, stop_place)
        if split == 0:
            start = 0
        if last:
            stop = K
        moments = _merge(lane_n, base, lane_1, lane_2, lane_x, lane_mean, lane_d2 - lane_d1 * lane_mean, lane_n, lane_d1, KIND, SMOOTH)
        n, m, sum1 = one + moments[0], one + moments[1], one + moments[2]
        sum2, sumx, mean = one + moments[3], one + moments[4], one + moments[5]
        m2, sw, swx = one + moments[6], one + moments[7], one + moments[8]
        bad = (tl.max(bad.to(tl.int32), 0) != 0) | (tl.max(_flat(n, m, m2, KIND).to(tl.int32), 0) != 0)
        if bad | (SMOOTH and weight_ptr is not None):
            n, m, sum1, sum2, sumx, mean, m2, sw, swx = _careful(
                z_ptr, weight_ptr, z_row, sc, out, live, start, stop, KIND, SMOOTH, L, V, DTYPE
            )
    at = moments_ptr + tl.cast(program, tl.int64) + tl.arange(0, 1)
    field = tl.cast(rows, tl.int64) * splits
    tl.store(at, n)
    tl.store(at + field, m)
    tl.store(at + 2 * field, sum1)
    tl.store(at + 3 * field, sum2)
    tl.store(at + 4 * field, sumx)
    tl.store(at + 5 * field, mean)
    tl.store(at + 6 * field, m2)
    tl.store(at + 7 * field, sw)
    tl.store(at + 8 * field, swx)


@triton.jit(do_not_specialize=["rows", "K", "splits"])
def long_finish(
    z_ptr, target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, moments_ptr, divisor_ptr, saved_ptr, loss_ptr, parts_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, target_stride, sample_stride, ignore_index, splits,
    smoothing: "fp64", diversity_weight: "fp64", z_loss: "fp64",
    KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, REDUCTION: tl.constexpr, DIMS: tl.constexpr,
    R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits' moments, keep each row's gradient for the backward, and give the loss; one program where there is a reduction."""
    DTYPE: tl.constexpr = moments_ptr.dtype.element_ty
    acc = tl.zeros((R,), DTYPE)
    acc_w = acc
    acc_ce = acc
    acc_div = acc
    targets = (target_ptr, other_ptr, target_stride)
    samples = (sample_ptr, other_sample_ptr, sample_stride)
    options = (K, smoothing, diversity_weight, z_loss)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        labels = _row_labels(targets, samples, weight_ptr, row, rows, ignore_index, K, 0, DTYPE)
        left_out = _left_out(labels)[1]
        logits = _logits_of(z_ptr, _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS), sc, labels, DTYPE)
        split = tl.expand_dims(tl.arange(0, SPLITS), 0)
        there = (tl.expand_dims(row, 1) < rows) & (split < splits)
        at = moments_ptr + tl.expand_dims(row, 1).to(tl.int64) * splits + split
        field = tl.cast(rows, tl.int64) * splits
        n, m, sum1, sum2, sumx, mean, m2, sw, swx = _merge(
            tl.load(at, mask=there, other=0.0),
            tl.load(at + field, mask=there, other=-float("inf")),
            tl.load(at + 2 * field, mask=there, other=0.0),
            tl.load(at + 3 * field, mask=there, other=0.0),
            tl.load(at + 4 * field, mask=there, other=0.0),
            tl.load(at + 5 * field, mask=there, other=0.0),
            tl.load(at + 6 * field, mask=there, other=0.0),
            tl.load(at + 7 * field, mask=there, other=0.0),
            tl.load(at + 8 * field, mask=there, other=0.0),
            KIND,
            SMOOTH,
        )
        loss, ce, div, weight, a, q, e0, ew, g_y = _finish_rows(
            n,
            1.0 / tl.maximum(n, 1.0),
            m,
            sum1,
            sum2,
            sumx,
            mean,
            m2,
            sw,
            swx,
            labels,
            left_out,
            _raised_labels(logits, m),
            options,
            KIND,
            SMOOTH,
            Z_LOSS,
        )
        _save(saved_ptr, row, rows, m, a, q, e0, g_y)
        if REDUCTION == NONE:
            _keep_rows(loss_ptr, parts_ptr, row, rows, loss, ce, div)
        else:
            acc += loss
            acc_w += weight
            acc_ce += ce
            acc_div += div
    if REDUCTION != NONE:
        result = tl.sum(acc, 0)
        ce = tl.sum(acc_ce, 0)
        div = tl.sum(acc_div, 0)
        if REDUCTION == MEAN:
            divisor = tl.sum(acc_w, 0)
            tl.store(divisor_ptr, divisor)
            result = result / divisor
            ce = ce / divisor
            div = div / divisor
        tl.store(loss_ptr, result)
        if parts_ptr is not None:
            tl.store(parts_ptr, ce)
            tl.store(parts_ptr + 1, div)


@triton.jit(do_not_specialize=["rows", "K", "splits", "chunks"])
def spread_rows(
    z_ptr, g_ptr, target_ptr, other_ptr, weight_ptr, sample_ptr, other_sample_ptr, upstream_ptr, divisor_ptr, saved_ptr,
    rows, K, n1, n2, n3, s0, s1, s2, s3, sc, t0, t1, t2, t3, tc, target_stride, sample_stride, upstream_stride,
    ignore_index, smoothing: "fp64", splits, chunks,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, REDUCTION: tl.constexpr, DIMS: tl.constexpr,
    SAME: tl.constexpr, START: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, L: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``chunks`` chunks of R rows each from the row gradients that the forward has kept."""
    program = tl.program_id(0)
    split = program % splits
    row = program // splits * R + tl.arange(0, R)
    DTYPE: tl.constexpr = saved_ptr.dtype.element_ty
    B: tl.constexpr = L * V
    samples = (sample_ptr, other_sample_ptr, sample_stride)
    labels = _row_labels((target_ptr, other_ptr, target_stride), samples, None, row, rows, ignore_index, K, 0, DTYPE)
    out, _, live = _left_out(labels)
    scale = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride, mask=row < rows, other=0.0)
    if REDUCTION == MEAN:
        scale = scale / tl.load(divisor_ptr)
    scale = tl.where(live, scale, 0.0)
    base, a, q, e0, g_y = _saved(saved_ptr, row, rows, len(labels))
    holes = tl.max(_odd(base), 0) != 0
    ew = scale * 0.0
    if SMOOTH:
        sample = _live_sample(labels[0])
        if other_ptr is not None:
            sample += _live_sample(labels[1])
        ew = scale * sample * (smoothing / K).to(DTYPE)
    base, a, q, e0, ew, g_y = (
        _of_rows(base),
        _of_rows(a * scale),
        _of_rows(q * scale),
        _of_rows(e0 * scale),
        _of_rows(ew),
        _each_of_rows(_scaled(g_y, scale)),
    )
    reads = _of_rows(live)
    writes = _of_rows(row < rows)
    z_row = _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS)
    g_row = _of_rows(_offset(row, n1, n2, n3, t0, t1, t2, t3, DIMS))
    low, first, begin, end = _window(z_row, K, START, ALIGN)
    at, first_, begin_, end_ = _of_rows(low), _of_rows(first), _of_rows(begin), _of_rows(end)
    places = _less(out, first)
    places_ = _each_of_rows(places)
    chunks_ = _chunk_of_each(places, B)
    p = _positions(L, V)
    from_chunk = split * chunks
    to_chunk = min(from_chunk + chunks, tl.cdiv(tl.max(end, 0), B))
    # a chunk that the row begins or ends in is taken by itself
    head = from_chunk + tl.where((START < ALIGN) & (split == 0), 1, 0)
    whole = max(min(to_chunk, tl.min(end, 0) // B) - head, 0) // TILE * TILE
    for tile in range(head, head + whole, TILE):
        w = None
        z_at = z_ptr + (at + tl.cast(tile, tl.int64) * B * (1 if ALIGN > 0 else sc))
        g_at = g_ptr + (at + tl.cast(tile, tl.int64) * B if ALIGN > 0 and SAME else g_row + (tl.cast(tile, tl.int64) * B + first_) * tc)
        for i in tl.static_range(TILE):
            z = tl.load(z_at + (p + i * B if ALIGN > 0 else (p + i * B).to(tl.int64) * sc), mask=reads, other=0.0).to(DTYPE)
            if SMOOTH and weight_ptr is not None:
                w = tl.load(weight_ptr + (tile * B + first_) + (p + i * B))
            x = _x(z, base)
            dz = _spread(x, _power(x), w, a, q, e0, ew, KIND, SMOOTH)
            if holes:
                dz = _spread_holes(dz, x, w, a, ew, SMOOTH)
            if tl.max(_is_any(tile + i, chunks_).to(tl.int32), 0) != 0:
                dz = _place(dz, p, places_, g_y, (tile + i) * B)
            tl.store(
                g_at + (p + i * B if ALIGN > 0 and SAME else (p + i * B).to(tl.int64) * tc), dz.to(g_ptr.dtype.element_ty), mask=writes
            )
    rest = to_chunk - from_chunk - whole
    g_shift = at if ALIGN > 0 and SAME else g_row + first_.to(tl.int64) * tc
    for i in range(0, rest):
        q_ = p + tl.where(i < head - from_chunk, from_chunk + i, whole + from_chunk + i) * B
        z_to = at + (q_ if ALIGN > 0 else q_.to(tl.int64) * sc)
        g_to = g_shift + (q_ if ALIGN > 0 and SAME else q_.to(tl.int64) * tc)
        _spread_any(
            z_ptr, g_ptr, weight_ptr, z_to, g_to, q_ + first_, (q_ >= begin_) & (q_ < end_), reads, writes, _each_of_rows(out), base, a, q, e0, ew, g_y,
            KIND, SMOOTH, DTYPE,
        )  # fmt: skip
    if START * 2 < ALIGN:
        if split == 0:
            c, inside = _edges(first_, end_, K, ALIGN, L)
            _spread_any(
                z_ptr, g_ptr, weight_ptr, _of_rows(z_row) + c, g_row + c.to(tl.int64) * tc, c, inside, reads, writes, _each_of_rows(out),
                base, a, q, e0, ew, g_y, KIND, SMOOTH, DTYPE,
            )  # fmt: skip
