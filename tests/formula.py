"""DESIGN §2 once more, row by row in float64 NumPy: each loss and each gradient as the list of the terms it is the sum of.

The sum of a list is the value; the sum of its absolute values, times the relative error of one term, bounds the error of any
implementation that computes every term well. The tests take their tolerances from there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
PENALTIES = ("logit_variance", "kl", "reverse_kl", "chi2", "variance")


class Result(NamedTuple):
    """Losses and gradient, and beside each the sum of the absolute values of its terms."""

    loss: Array
    cross_entropy: Array
    diversity: Array
    gradient: Array
    loss_terms: Array
    cross_entropy_terms: Array
    diversity_terms: Array
    gradient_terms: Array
    curvature_terms: Array


def _complement(z: Array, y: int, kind: str | None) -> tuple[float, float, list[float], list[Array]]:
    """c, s, the terms of D and those of dD/dz."""
    inside = z > -np.inf
    inside[y] = False
    n = inside.sum()
    if n == 0:
        return -np.inf, 0.0, [], []
    m = z[inside].max()
    x = np.where(inside, z - m, -np.inf)
    log_s1 = np.log(np.exp(x).sum())
    c = m + log_s1
    q = np.exp(x) / np.exp(x).sum()
    s = np.exp(-np.logaddexp(0, z[y] - c))
    label = np.arange(len(z)) == y
    if kind is None or n == 1:
        return c, s, [], []
    x0 = np.where(inside, x, 0.0)
    mean, q2, log_s1n = x0.sum() / n, (q * q).sum(), log_s1 - np.log(n)
    # the relative error of S1 is the absolute error of its logarithm: beside its own size a logarithm counts as 1
    if kind == "logit_variance":
        return c, s, [np.where(inside, x0 - mean, 0.0).var() * len(z) / n], [2 / n * x0, np.where(inside, -2 / n * mean, 0.0)]
    if kind == "kl":  # log q_j + H = x_j - sum q x, taken through a logarithm or not
        mean_x = (q * x0).sum()
        return c, s, [mean_x, -log_s1n + 1, -1.0], [q * (x0 + 1), -q, -q * mean_x]
    if kind == "reverse_kl":
        return c, s, [log_s1n + 1, -1.0, -mean], [q, np.where(inside, -1 / n, 0.0)]
    if kind == "chi2":
        return c, s, [n * q2, -1.0], [2 * n * q * q, -2 * n * q * q2]
    left, right = s * s / n * q2, s * s / n / n
    both = [2 * (1 - s) * left, -2 * (1 - s) * right]  # 2 s^2 (1 - s) V_q
    return c, s, [left, -right], [*[q * t - label * t for t in both], -2 * left * q, 2 * s * s / n * q * q]


def _row(
    z: Array, y: int, w_y: float, w: Array | None, smoothing: float, kind: str | None, diversity_weight: float, z_loss: float
) -> tuple[list[float], list[float], list[float], list[Array]]:
    """The terms of the cross-entropy, of D, of the z-loss, and of the gradient."""
    top = z[np.isfinite(z)].max(initial=-np.inf)
    top = top if np.isfinite(top) else 0.0
    z = z - top  # a sum with a logit of 1e4 has an error of 1e-12 even in float64
    c, s, value, slope = _complement(z, y, kind)
    one_hot = (np.arange(len(z)) == y).astype(float)
    ce = np.logaddexp(0, c - z[y])
    lse = z[y] + ce if s < 0.5 else c + np.logaddexp(0, z[y] - c)
    p = np.where(one_hot > 0, np.exp(z[y] - lse), np.exp(z - lse))
    pull = np.where(one_hot > 0, -s, p)  # p - one_hot without the subtraction
    cross_entropy, gradient = [(1 - smoothing) * w_y * ce], [(1 - smoothing) * w_y * pull]
    if smoothing:
        w = np.ones(len(z)) if w is None else w
        surprise = np.where(one_hot > 0, ce, lse - z)
        cross_entropy += [*(smoothing / len(z) * w * (surprise + 1)), *(-smoothing / len(z) * w)]
        gradient += [smoothing / len(z) * w.sum() * p, -smoothing / len(z) * w]
    of_lse = []
    if z_loss:  # lse is itself a sum, of a largest logit and a logarithm: rounded in their magnitude, not in its own
        lse = lse + top
        magnitude = abs(top) + np.log(len(z)) + 1
        of_lse = [z_loss * w_y * lse * t for t in (lse + magnitude, -magnitude)]
        gradient += [2 * z_loss * w_y * t * p for t in (lse + magnitude, -magnitude)]
    gradient += [diversity_weight * w_y * t for t in slope]
    return cross_entropy, [w_y * t for t in value], of_lse, gradient


def _change(*factors: tuple[Any, Any]) -> Any:
    """The size of what a product changes by, each factor a size and the size of its own change."""
    return sum(change * math.prod(size for j, (size, _) in enumerate(factors) if j != i) for i, (_, change) in enumerate(factors))


def _row_along(
    v: Array, z: Array, y: int, w_y: float, w: Array | None, smoothing: float, kind: str | None, diversity_weight: float, z_loss: float
) -> Array:
    """The summed absolute values of the terms of H v: each factor of a term of `_row`'s gradient differentiated in turn."""
    label = np.arange(len(z)) == y
    inside = (z > -np.inf) & ~label
    n, a, a_y = inside.sum(), np.where(inside, abs(v), 0.0), abs(v[y])
    c, s, _, _ = _complement(z, y, None)
    p, top = np.exp(-np.logaddexp(0, c - z[y])), z[inside].max(initial=-np.inf)
    x = np.where(inside, z - top, -np.inf)
    q = np.exp(x) / np.exp(x).sum() if n else np.zeros(len(z))
    mean_v = (q * a).sum()
    of_margin = s * p * (mean_v + a_y)
    of_s, of_p, of_q = (s, of_margin), (p, of_margin), (q, q * (a + mean_v))
    of_all = (np.where(label, p, s * q), np.where(label, of_margin, _change(of_s, of_q)))
    keep = w_y * (1 - smoothing) + smoothing / len(z) * (len(z) if w is None else w.sum())
    total = keep * of_all[1]
    if z_loss:
        lse = max(z[y], top) + np.log1p(np.exp(-abs(c - z[y]))) if n else z[y]
        magnitude = abs(z[np.isfinite(z)].max()) + np.log(len(z)) + 1  # as in _row
        total = total + 2 * z_loss * w_y * _change((abs(lse) + 2 * magnitude, s * mean_v + p * a_y), of_all)
    if kind is None or n < 2:
        return total
    of_x = (np.where(inside, abs(x), 0.0), a)
    of_q2 = ((q * q).sum(), 2 * (q * of_q[1]).sum())
    of_mean_x = ((q * of_x[0]).sum(), _change(of_q, of_x).sum())
    if kind == "logit_variance":
        d = np.where(inside, 2 / n * (a + a.mean() * len(z) / n), 0.0)
    elif kind == "kl":
        d = _change(of_q, of_x) + of_q[1] + _change(of_q, of_mean_x)
    elif kind == "reverse_kl":
        d = of_q[1]
    elif kind == "chi2":
        d = 2 * n * (_change(of_q, of_q) + _change(of_q, of_q2))
    else:
        both = 2 / n * (_change(of_s, of_s, of_p, of_q2, of_q) + _change(of_s, of_s, of_p, of_q) / n)
        own = 2 / n * (_change(of_s, of_s, of_p, of_q2) + _change(of_s, of_s, of_p) / n)
        d = np.where(label, own, both + 2 / n * (_change(of_s, of_s, of_q2, of_q) + _change(of_s, of_s, of_q, of_q)))
    return total + diversity_weight * w_y * d


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    diversity: str | None = "logit_variance",
    diversity_weight: float = 1.0,
    z_loss: float = 0.0,
    sample_weight: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    direction: torch.Tensor | None = None,
) -> Result:
    """Shapes and arguments of ``fastsoftloss.functional.cross_entropy``; the gradient is for ``upstream``, 1 by default.

    ``curvature_terms`` are those of the Hessian times ``direction``.
    """
    class_last = logits.detach().double().movedim(min(1, logits.dim() - 1), -1)
    rows = class_last.reshape(-1, class_last.shape[-1]).numpy()
    y = target.detach().long().reshape(-1).numpy()
    w = None if weight is None else weight.detach().double().numpy()
    r = np.ones(len(y)) if sample_weight is None else sample_weight.detach().double().reshape(-1).numpy()
    counted = y != ignore_index
    w_y = np.array([(1.0 if w is None else w[k]) if k != ignore_index else 0.0 for k in y])
    divisor = (w_y * r)[counted].sum() if reduction == "mean" else 1.0
    up = np.ones(len(y)) if upstream is None else upstream.detach().double().expand(target.shape if reduction == "none" else ()).numpy()
    up = np.broadcast_to(up.reshape(-1), (len(y),))

    values, sizes = np.zeros((3, len(y))), np.zeros((3, len(y)))
    gradient, gradient_size, curvature = np.zeros(rows.shape), np.zeros(rows.shape), np.zeros(rows.shape)
    along = None if direction is None else direction.detach().double().movedim(min(1, logits.dim() - 1), -1).reshape(rows.shape).numpy()
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        for i in np.flatnonzero(counted):
            ce, d, of_lse, slope = _row(rows[i], y[i], w_y[i], w, label_smoothing, diversity, diversity_weight, z_loss)
            parts = [*ce, *(diversity_weight * t for t in d), *of_lse], ce, d
            values[:, i] = [r[i] * sum(part) for part in parts]
            sizes[:, i] = [abs(r[i]) * sum(map(abs, part)) for part in parts]
            gradient[i] = r[i] * up[i] / divisor * sum(slope)
            gradient_size[i] = abs(r[i] * up[i] / divisor) * sum(map(abs, slope))
            if along is not None:
                terms = _row_along(along[i], rows[i], y[i], w_y[i], w, label_smoothing, diversity, diversity_weight, z_loss)
                curvature[i] = abs(r[i] * up[i] / divisor) * terms
        shape = target.shape
        if reduction != "none":
            values, sizes, shape = values.sum(1) / divisor, sizes.sum(1) / abs(divisor), ()

    def like_logits(a: Array) -> Array:
        return np.moveaxis(a.reshape(class_last.shape), -1, min(1, logits.dim() - 1))

    v, t = (tuple(part.reshape(shape) for part in a) for a in (values, sizes))
    return Result(*v, like_logits(gradient), *t, like_logits(gradient_size), like_logits(curvature))
