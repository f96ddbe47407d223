"""The definition of the loss in plain PyTorch: the oracle of the tests and the fallback without a kernel.

Source of the penalty: Wang, Li, Jiang, Zhang, Zhao, Gong, "Distribution-restrained Softmax Loss for the Model
Robustness", arXiv:2303.12363. Here the true class never enters a sum: with the complement C = {j != y, z_j > -inf}, its
log-sum-exp c and the margin delta = c - z_y, cross-entropy is softplus(delta), and 1 - p_y = sigmoid(delta) keeps its
relative precision at every margin.
"""

from __future__ import annotations

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


def cross_entropy(
    logits: Tensor,
    target: Tensor,
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

    Shapes, dtypes and arguments are those of :func:`fastsoftloss.functional.cross_entropy`, which checks them first;
    here they are taken as good, save that a target outside ``[0, K)`` gives its row a NaN loss. Differentiable to any
    order in ``logits``, ``weight`` and ``sample_weight``.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    z = z.movedim(1, -1) if z.dim() > 1 else z
    classes = z.shape[-1]
    if classes == 0:  # every row is ignored or out of range: a class that is never looked at stands in
        z, weight = F.pad(z, (0, 1)), None
    target = target.long()
    counted = target != ignore_index
    outside = counted & ((target < 0) | (target >= classes))
    y = torch.where(counted & ~outside, target, 0).unsqueeze(-1)
    z = torch.where((counted & ~outside).unsqueeze(-1), z, 0.0)
    # as PyTorch: NaN, +inf and a row of -inf alone are NaN throughout
    bad = z.isnan().any(-1) | (z == torch.inf).any(-1) | (z == -torch.inf).all(-1)
    poison = torch.where(bad, torch.nan, 1.0).to(z.dtype)
    z = z * poison.unsqueeze(-1)

    is_label = torch.zeros_like(z, dtype=torch.bool).scatter(-1, y, True)
    inside = ~is_label & (z != -torch.inf)
    count = inside.sum(-1).to(z.dtype)
    z_y = z.gather(-1, y).squeeze(-1)

    # c as the pair (m, log S1); m carries no gradient, since every term below is unchanged by a shift
    masked = torch.where(inside, z, -torch.inf).detach()
    m = torch.where(count > 0, masked.amax(-1), 0.0)
    x = z - m.unsqueeze(-1)
    s1 = torch.where(inside, x, -torch.inf).exp().sum(-1)
    log_s1 = torch.where(count > 0, s1, 1.0).log()
    delta = (m - z_y) + torch.where(count > 0, log_s1, -torch.inf)
    log1p_odds = F.softplus(delta, threshold=_SOFTPLUS_LINEAR)
    lse_less_m = torch.where(delta > 0, log_s1 + F.softplus(-delta, threshold=_SOFTPLUS_LINEAR), (z_y - m) + log1p_odds)
    d = _diversity(diversity, x, inside, count, log_s1, torch.sigmoid(delta))

    w = torch.ones_like(z) if weight is None else weight.to(z.dtype).expand_as(z)
    w_y = w.gather(-1, y).squeeze(-1)
    ce = w_y * log1p_odds
    if label_smoothing > 0:
        # lse - z_j over all classes: +inf where a class is masked, as in PyTorch
        smooth = torch.where(is_label, 0.0, w * (lse_less_m.unsqueeze(-1) - x)).sum(-1) + w_y * log1p_odds
        ce = (1 - label_smoothing) * ce + label_smoothing / z.shape[-1] * smooth
    row_weight = torch.ones_like(z_y) if sample_weight is None else sample_weight.to(z.dtype).expand_as(z_y)
    w_y = torch.where(counted, w_y * row_weight, 0.0)
    ce = torch.where(counted, ce * row_weight, 0.0)
    ce = torch.where(outside, torch.nan, ce)
    d = w_y * d * poison
    loss = ce
    if diversity is not None and diversity_weight != 0:
        loss = loss + diversity_weight * d
    if z_loss != 0:
        loss = loss + z_loss * w_y * (m + lse_less_m).square()

    if reduction == "none":
        return loss, ce.detach(), d.detach()
    if reduction == "sum":
        return loss.sum(), ce.detach().sum(), d.detach().sum()
    total = w_y.sum()
    # an all-ignored batch is NaN with a zero gradient: 0 / 0 in value, never in the derivative
    safe = torch.where(counted.any(), total, 1.0)
    nan = torch.where(counted.any(), 0.0, torch.nan).to(z.dtype)
    return loss.sum() / safe + nan, ce.detach().sum() / safe + nan, d.detach().sum() / safe + nan
