"""Finish for rows of one label, or of two and their weights: mixup's target.

The loss of two labels is that of the one and that of the other, each with its own weight. They leave out classes of their
own, so neither's moments hold for both: the classes that are neither, the rest, are reduced once, each label's complement
is the rest with the other label's class merged in, and both go through ``_finish``. Their row gradients, brought back to
the base of the rest, add up; the two classes themselves get what either label has for them.
"""

import triton
import triton.language as tl

from fastsoftloss.triton_finish import LOGIT_VARIANCE, _exp_exact, _finish, _lower, _spread, _spread_holes, _two_sum_error, _with


@triton.jit
def _pair(first, second):
    """[R] of each label -> [R, 2]: lanes that share a row share its labels, so that each goes through all this for one alone."""
    is_first = tl.expand_dims(tl.arange(0, 2), 0) == 0
    return tl.where(is_first, tl.expand_dims(first, 1), tl.expand_dims(second, 1))


@triton.jit
def _with_class(rest, margin, z, w, more):
    """The moments of the rest and, where ``more``, a class with logit z and weight w, about z where that is above the rest's base.

    margin: the base less z, and what that lost by rounding. Returns (moments, whether z is the base now, how far the rest's
    base lies above it, e^that, x and e^x of the class).
    """
    n, s1, s2, sx, mean, m2, sw, swx = rest
    d, error = margin
    there = more & (z != -float("inf"))
    over = there & (d < 0.0)
    h = _exp_exact(-tl.abs(d), tl.where(over, error, -error))
    f = tl.where(over, h, 1.0)
    e = tl.where(there, tl.where(over, 1.0 + (z - z), h), 0.0)  # NaN of an infinity
    x = tl.where(there & (over == 0), -d, 0.0)
    d = tl.where(over & (n > 0.0), d, 0.0)
    one = tl.where(there, 1.0, 0.0).to(s1.dtype)
    inverse_n = 1.0 / tl.maximum(n + one, 1.0)
    mean, m2 = _with(n, mean + d, m2, one, x, inverse_n)
    sx = tl.where(f > 0.0, f * (sx + d * s1), 0.0) + e * x  # of a rest that is out of sight d may be beyond all numbers
    swx += d * sw + tl.where(more, w * tl.where(there, x, -float("inf")), 0.0)
    sw += tl.where(more, w, 0.0)
    return (n + one, inverse_n, f * s1 + e, f * f * s2 + e * e, sx, mean, m2, sw, swx), over, d, f, x, e


@triton.jit
def _finish_one(moments, base, label, z, margin, options, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr):
    n, inverse_n, s1, s2, sx, mean, m2, sw, swx = moments
    _, w, sample, counted, good = label
    d, error = margin
    K, smoothing, diversity_weight, z_loss = options
    return _finish(
        n, inverse_n, base, z, d, error, s1, s2, sx, mean, m2, sw, swx, w, sample, counted, good, K, smoothing, diversity_weight, z_loss,
        KIND, SMOOTH, Z_LOSS,
    )  # fmt: skip


@triton.jit
def _finish_pair(
    rest, base, labels, there, logits, margins, options, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """``_finish_labels`` of two."""
    n, _, s1, s2, sx, mean, m2, sw, swx = rest
    (y, w, sample, counted, good), (_, w_, sample_, counted_, good_) = labels
    rest = (
        tl.expand_dims(n, 1), tl.expand_dims(s1, 1), tl.expand_dims(s2, 1), tl.expand_dims(sx, 1), tl.expand_dims(mean, 1),
        tl.expand_dims(m2, 1), tl.expand_dims(sw, 1), tl.expand_dims(swx, 1),
    )  # fmt: skip
    z, other_z = _pair(logits[0], logits[1]), _pair(logits[1], logits[0])
    other_w = _pair(w_, w)
    label = (y, _pair(w, w_), _pair(sample, sample_), _pair(counted, counted_), _pair(good, good_))
    d, error = _pair(margins[0][0], margins[1][0]), _pair(margins[0][1], margins[1][1])
    other_margin = (_pair(margins[1][0], margins[0][0]), _pair(margins[1][1], margins[0][1]))
    both = tl.expand_dims(there[0] & there[1], 1)  # else they are one class, or there is but one

    moments, over, down, f, x, e = _with_class(rest, other_margin, other_z, other_w, both)
    top = other_z - z
    margin = (tl.where(over, top, d), tl.where(over, _two_sum_error(other_z, -z, top), error))
    base = tl.where(over, other_z, tl.expand_dims(base, 1))
    loss, ce, div, a, p, e0, ew, g = _finish_one(moments, base, label, z, margin, options, KIND, SMOOTH, Z_LOSS)

    if KIND == LOGIT_VARIANCE:  # of a flat row x p - mean p would be a rounding
        flat = moments[6] == 0.0
        p, e0 = tl.where(flat, 0.0, p), tl.where(flat, 0.0, e0)
    to_other = _spread_holes(_spread(x, e, other_w, a, p, e0, ew, KIND, SMOOTH), other_z, other_w, a, ew, SMOOTH)
    _, a, p, e0 = _lower((0.0, a, p, e0), down, f, KIND)

    # nothing of a label that does not count, whatever the row is; and a bare product would be contracted into the sum of both,
    # which the lanes that have one label and the other would round differently
    counted = label[3]
    live = counted & label[4]
    loss, ce, div = tl.where(counted, loss, 0.0), tl.where(counted, ce, 0.0), tl.where(live, div, 0.0)
    a, p, e0, ew = tl.where(live, a, 0.0), tl.where(live, p, 0.0), tl.where(live, e0, 0.0), tl.where(live, ew, 0.0)
    g = tl.where(live, g, 0.0)
    to_other = tl.where(both, to_other, g)  # both: and so both are live
    is_first = tl.expand_dims(tl.arange(0, 2), 0) == 0
    gradients = (tl.sum(tl.where(is_first, g, to_other), 1), tl.sum(tl.where(is_first, to_other, g), 1))
    weight = labels[0][1] * labels[0][2] + labels[1][1] * labels[1][2]
    return tl.sum(loss, 1), tl.sum(ce, 1), tl.sum(div, 1), weight, tl.sum(a, 1), tl.sum(p, 1), tl.sum(e0, 1), tl.sum(ew, 1), gradients


@triton.jit
def _finish_labels(
    moments, base, labels, there, logits, margins, options, KIND: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """``_finish`` of one label or two: (loss, cross-entropy, D), the weight, (A, P, E0, EW), and the gradient of each class left out.

    moments: of the classes that are none of them, about ``base``. there: as ``_left_out`` has it. logits: of each label.
    margins: the base less that, -inf where no other class is left, and what it lost by rounding.
    """
    if len(labels) == 1:
        loss, ce, div, a, p, e0, ew, g = _finish_one(moments, base, labels[0], logits[0], margins[0], options, KIND, SMOOTH, Z_LOSS)
        return loss, ce, div, labels[0][1] * labels[0][2], a, p, e0, ew, (g,)
    else:
        return _finish_pair(moments, base, labels, there, logits, margins, options, KIND, SMOOTH, Z_LOSS)
