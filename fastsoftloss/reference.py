"""The definition of the loss in plain PyTorch: the oracle of the tests and the fallback without a kernel.

Source of the penalty: Wang, Li, Jiang, Zhang, Zhao, Gong, "Distribution-restrained Softmax Loss for the Model
Robustness", arXiv:2303.12363. Here the true class never enters a sum: with the complement C = {j != y, z_j > -inf}, its
log-sum-exp c and the margin delta = c - z_y, cross-entropy is softplus(delta), and 1 - p_y = sigmoid(delta) keeps its
relative precision at every margin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this margin softplus(x) is x to the last bit of float64: e^-40 is 4e-18.
_SOFTPLUS_LINEAR = 40.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the result: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _diversity(kind: str | None, x: Tensor, inside: Tensor, count: Tensor, log_s1: Tensor, s: Tensor) -> Tensor:
    """D of each row. x: (..., K) logits less their complement's maximum; inside: (..., K), the complement.

    Written as sums of squares and of q log(n q), so that a nearly flat complement does not cancel to noise.
    """
    if kind is None:
        return torch.zeros_like(count)
    n = count.clamp(min=1).unsqueeze(-1)
    x = torch.where(inside, x, 0.0)
    log_nq = torch.where(inside, x - log_s1.unsqueeze(-1) + n.log(), 0.0)
    q = torch.where(inside, (x - log_s1.unsqueeze(-1)).exp(), 0.0)
    if kind == "logit_variance":
        centred = torch.where(inside, x - x.sum(-1, keepdim=True) / n, 0.0)
        d = centred.square().sum(-1) / n.squeeze(-1)
    elif kind == "kl":
        d = (q * log_nq).sum(-1)
    elif kind == "reverse_kl":
        d = -log_nq.sum(-1) / n.squeeze(-1)
    else:
        spread = torch.where(inside, q - 1 / n, 0.0).square().sum(-1)
        d = spread * n.squeeze(-1) if kind == "chi2" else s.square() * spread / n.squeeze(-1)
    return torch.where(count > 1, d, 0.0)


class _Rows(NamedTuple):
    """What a reduction is made of, each with the shape of the rows."""

    loss: Tensor
    cross_entropy: Tensor
    diversity: Tensor
    weight: Tensor  # what the mean divides by
    counted: Tensor  # bool


class _Options(NamedTuple):
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    diversity: str | None
    diversity_weight: float
    z_loss: float

    def total(self, ce: Tensor, d: Tensor, lse_weight: Tensor, lse: Tensor) -> Tensor:
        loss = ce
        if self.diversity is not None and self.diversity_weight != 0:
            loss = loss + self.diversity_weight * d
        if self.z_loss != 0:
            loss = loss + self.z_loss * lse_weight * lse.square()
        return loss


class _Complement(NamedTuple):
    """The classes ``inside``, all but one: their number n, their largest logit m, logits less m, log S1, and the margin."""

    inside: Tensor
    n: Tensor
    m: Tensor
    x: Tensor
    log_s1: Tensor
    delta: Tensor

    def diversity(self, kind: str | None) -> Tensor:
        return _diversity(kind, self.x, self.inside, self.n, self.log_s1, torch.sigmoid(self.delta))


def _complement(z: Tensor, inside: Tensor, z_y: Tensor) -> _Complement:
    # c as the pair (m, log S1); m carries no gradient, since every term made of it is unchanged by a shift
    count = inside.sum(-1).to(z.dtype)
    masked = torch.where(inside, z, -torch.inf).detach()
    m = torch.where(count > 0, masked.amax(-1), 0.0)
    x = z - m.unsqueeze(-1)
    s1 = torch.where(inside, x, -torch.inf).exp().sum(-1)
    log_s1 = torch.where(count > 0, s1, 1.0).log()
    delta = (m - z_y) + torch.where(count > 0, log_s1, -torch.inf)
    return _Complement(inside, count, m, x, log_s1, delta)


def _poisoned(z: Tensor) -> tuple[Tensor, Tensor]:
    """As PyTorch: NaN, +inf and a row of -inf alone are NaN throughout. The logits, and 1 or NaN for each row."""
    bad = z.isnan().any(-1) | (z == torch.inf).any(-1) | (z == -torch.inf).all(-1)
    poison = torch.where(bad, torch.nan, 1.0).to(z.dtype)
    return z * poison.unsqueeze(-1), poison


def _index_rows(z: Tensor, target: Tensor, row_weight: Tensor | None, o: _Options) -> _Rows:
    classes, weight = z.shape[-1], o.weight
    if classes == 0:  # every row is ignored or out of range: a class that is never looked at stands in
        z, weight = F.pad(z, (0, 1)), None
    target = target.long()
    counted = target != o.ignore_index
    outside = counted & ((target < 0) | (target >= classes))
    y = torch.where(counted & ~outside, target, 0).unsqueeze(-1)
    z, poison = _poisoned(torch.where((counted & ~outside).unsqueeze(-1), z, 0.0))

    is_label = torch.zeros_like(z, dtype=torch.bool).scatter(-1, y, True)
    z_y = z.gather(-1, y).squeeze(-1)
    c = _complement(z, ~is_label & (z != -torch.inf), z_y)
    log1p_odds = F.softplus(c.delta, threshold=_SOFTPLUS_LINEAR)
    # each from what is near it: z_y less m may have lost one of the two
    others_lead, of_others = c.delta > 0, c.log_s1 + F.softplus(-c.delta, threshold=_SOFTPLUS_LINEAR)
    lse = torch.where(others_lead, c.m + of_others, z_y + log1p_odds)
    lse_less_m = torch.where(others_lead, of_others, (z_y - c.m) + log1p_odds)

    w = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
    w_y = w.gather(-1, y).squeeze(-1)
    ce = w_y * log1p_odds
    if o.label_smoothing > 0:
        # lse - z_j over all classes: +inf where a class is masked, as in PyTorch
        smooth = torch.where(is_label, 0.0, w * (lse_less_m.unsqueeze(-1) - c.x)).sum(-1) + w_y * log1p_odds
        ce = (1 - o.label_smoothing) * ce + o.label_smoothing / z.shape[-1] * smooth
    row_weight = torch.ones_like(z_y) if row_weight is None else row_weight.to(z.dtype).expand_as(z_y)
    w_y = torch.where(counted, w_y * row_weight, 0.0)
    ce = torch.where(counted, ce * row_weight, 0.0)
    ce = torch.where(outside, torch.nan, ce)
    d = w_y * c.diversity(o.diversity) * poison
    return _Rows(o.total(ce, d, w_y, lse), ce, d, w_y, counted)


def _left_out(kind: str | None, z: Tensor, x: Tensor, hi: Tensor, lo: Tensor, present: Tensor) -> Tensor:
    """(..., K): for each class k, D of the classes without k.

    Leaving k out of a sum is a subtraction, and cancels where k is most of the sum: of sums of exps that is the largest
    logit alone, of squares about the mean the largest or the smallest. For these two (``hi`` and ``lo``, one-hot) D is
    computed from their own complement; the others are left out of sums R that these two have never entered.

    x: z less the largest logit, 0 at ``hi``; all else may be taken away from it, for it has e^x = 1.
    """
    others = present & ~hi & ~lo
    n = (present.sum(-1, keepdim=True).to(z.dtype) - 1).clamp(min=1)
    e = torch.where(others, x.exp(), 0.0)
    x_lo = torch.where(lo, x, 0.0).sum(-1, keepdim=True)
    e_lo = torch.where(lo, x, -torch.inf).exp().sum(-1, keepdim=True)
    s1 = 1 + e_lo + (e.sum(-1, keepdim=True) - e)
    s2 = 1 + e_lo.square() + (e.square().sum(-1, keepdim=True) - e.square())
    mean = torch.where(others, x, 0.0).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=1)
    d = torch.where(others, x - mean, 0.0)
    d_hi, d_lo = -mean, x_lo - mean
    mean_left = (d_hi + d_lo - d) / n  # less `mean`
    if kind == "logit_variance":
        value = (d.square().sum(-1, keepdim=True) + d_hi.square() + d_lo.square() - d.square()) / n - mean_left.square()
    elif kind == "kl":
        ex = e * torch.where(others, x, 0.0)
        value = n.log() - s1.log() + (ex.sum(-1, keepdim=True) - ex + e_lo * x_lo) / s1
    elif kind == "reverse_kl":
        value = s1.log() - n.log() - mean - mean_left
    elif kind == "chi2":
        value = n * s2 / s1.square() - 1
    else:
        value = (s2 - s1.square() / n) / n / (1 + e_lo + e.sum(-1, keepdim=True)).square()
    result = torch.where(others, value, 0.0)
    for one in (hi, lo):
        z_one = torch.where(one, z, 0.0).sum(-1)
        own = _complement(z, present & ~one, z_one).diversity(kind).unsqueeze(-1)
        result = torch.where(one, own, result)
    return result


def _probability_rows(z: Tensor, t: Tensor, row_weight: Tensor | None, o: _Options) -> _Rows:
    classes, weight = z.shape[-1], o.weight
    if classes == 0:
        z, t, weight = F.pad(z, (0, 1)), F.pad(t, (0, 1)), None
    z, poison = _poisoned(z)
    present = z != -torch.inf
    one_hot = torch.zeros_like(present)
    hi = one_hot.scatter(-1, z.argmax(-1, keepdim=True), True)
    lo = one_hot.scatter(-1, torch.where(present & ~hi, z, torch.inf).argmin(-1, keepdim=True), True) & present & ~hi
    z_hi = torch.where(hi, z, 0.0).sum(-1)
    below = torch.where(hi, 0.0, z - z_hi.unsqueeze(-1))  # the largest itself is 0, and has no gradient that must cancel
    x = torch.where(present, below, 0.0)
    s = torch.where(present & ~hi, x, -torch.inf).exp().sum(-1)
    log1p_s = s.log1p()

    w = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
    u = w * t
    v = u if o.label_smoothing == 0 else w * ((1 - o.label_smoothing) * t + o.label_smoothing / z.shape[-1])
    # -log p_k; a class that is masked costs +inf, and nothing where it is not asked for: 0 log 0 is 0
    surprise = torch.where(present | (v != 0), log1p_s.unsqueeze(-1) - below, 0.0)
    ce = (v * surprise).sum(-1)
    d = torch.zeros_like(ce) if o.diversity is None else (u * _left_out(o.diversity, z, x, hi, lo, present)).sum(-1) * poison
    row_weight = torch.ones_like(ce) if row_weight is None else row_weight.to(z.dtype).expand_as(ce)
    ce, d = ce * row_weight, d * row_weight
    loss = o.total(ce, d, u.sum(-1) * row_weight, z_hi + log1p_s)
    return _Rows(loss, ce, d, row_weight, torch.full_like(row_weight, classes > 0, dtype=torch.bool))


def pack_mixture(target: tuple[Tensor, Tensor, Tensor | float], sample_weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(y_a, y_b, mix)`` as two label tensors in one, (2, *rows), and the sample weight of each: a mixture is every row
    twice, once for each label, with the mixing weight's share of the row's weight."""
    first, second, mix = target
    if first.dtype != second.dtype:
        first, second = first.long(), second.long()
    if isinstance(mix, Tensor):
        mix = mix.to(dtype)
        weights = torch.stack((mix, 1 - mix))
        weights = weights if mix.dim() else weights.view(2, *[1] * first.dim())
    else:  # a factor is an input of a compiled graph, what a tensor is made of a constant
        one = torch.ones((), dtype=dtype, device=first.device)
        weights = torch.stack((one * mix, one * (1 - mix))).view(2, *[1] * first.dim())
    if sample_weight is not None:
        weights = weights * sample_weight.to(dtype)
    return torch.stack((first, second)), weights.expand(2, *first.shape)


def form_of(logits: Tensor, target: Tensor) -> str:
    """What a target is, a mixture as :func:`pack_mixture` gives it."""
    if target.is_floating_point():
        return "probabilities"
    return "mixture" if target.dim() == logits.dim() else "index"


def _mixed_rows(z: Tensor, target: Tensor, row_weight: Tensor | None, o: _Options) -> _Rows:
    a, b = (_index_rows(z, target[i], None if row_weight is None else row_weight[i], o) for i in range(2))
    return _Rows(a.loss + b.loss, a.cross_entropy + b.cross_entropy, a.diversity + b.diversity, a.weight + b.weight, a.counted | b.counted)


def _reduced(rows: _Rows, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    loss, ce, d = rows.loss, rows.cross_entropy.detach(), rows.diversity.detach()
    if reduction == "none":
        return loss, ce, d
    if reduction == "sum":
        return loss.sum(), ce.sum(), d.sum()
    # an all-ignored batch is NaN with a zero gradient: 0 / 0 in value, never in the derivative
    safe = torch.where(rows.counted.any(), rows.weight.sum(), 1.0)
    nan = torch.where(rows.counted.any(), 0.0, torch.nan).to(loss.dtype)
    return loss.sum() / safe + nan, ce.sum() / safe + nan, d.sum() / safe + nan


def cross_entropy(
    logits: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor | float],
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    diversity: str | None = "logit_variance",
    diversity_weight: float = 1.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two parts ``(loss, cross_entropy, diversity)``, each reduced by ``reduction``.

    Shapes, dtypes, arguments and the three forms of a target are those of
    :func:`fastsoftloss.functional.cross_entropy`, which checks them first; here they are taken as good, save that a
    target outside ``[0, K)`` gives its row a NaN loss. A mixture may also come as :func:`pack_mixture` gives it.
    Differentiable to any order in ``logits``, ``weight`` and ``sample_weight``, in class probabilities and in the weight
    of a mixture.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    z = z.movedim(1, -1) if z.dim() > 1 else z
    options = _Options(weight, ignore_index, label_smoothing, diversity, diversity_weight, z_loss)
    if isinstance(target, tuple):
        target, sample_weight = pack_mixture(target, sample_weight, z.dtype)
    form = form_of(logits, target)
    if form == "mixture":
        rows = _mixed_rows(z, target, sample_weight, options)
    elif form == "probabilities":
        t = target.to(z.dtype)
        rows = _probability_rows(z, t.movedim(1, -1) if t.dim() > 1 else t, sample_weight, options)
    else:
        rows = _index_rows(z, target, sample_weight, options)
    return _reduced(rows, reduction)
