"""Training losses by name: ``name`` or ``name:number``, as in ``ce``, ``label_smoothing:0.1``, ``logit_variance:5``, ``gce:0.333``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsoftloss import Loss

PENALTIES = ("logit_variance", "kl", "reverse_kl", "chi2", "variance")
HELP = "ce, label_smoothing:S, gce:ALPHA, " + ", ".join(f"{name}:WEIGHT" for name in PENALTIES)


class GuidedComplementEntropy(nn.Module):
    """-mean(p_y^alpha * H(q)) / log K, with q the softmax over the non-true classes; (N, K) and (N,) to a scalar.

    Chen et al., "Improving Adversarial Robustness via Guided Complement Entropy", arXiv:1903.09799; alpha = 1/3 there.
    It replaces cross-entropy. Here in log-space, so that no small number has to be added anywhere.
    """

    def __init__(self, alpha: float = 1 / 3) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        z = logits.float()
        others = z.scatter(1, target.unsqueeze(1), -torch.inf)
        log_q = others.log_softmax(1)
        q = log_q.exp()
        entropy = -(q * log_q.masked_fill(log_q == -torch.inf, 0)).sum(1)
        log_p_true = F.logsigmoid(z.gather(1, target.unsqueeze(1)).squeeze(1) - others.logsumexp(1))
        return -((self.alpha * log_p_true).exp() * entropy).mean() / math.log(z.shape[1])


class TorchLogitVariance(nn.Module):
    """``logit_variance`` as one writes it with torch operators: what the fused loss is timed against. Not a named training loss."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        others = torch.ones_like(logits, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
        n = logits.shape[1] - 1
        mean = torch.where(others, logits, 0).sum(1, keepdim=True) / n
        variance = torch.where(others, logits - mean, 0).square().sum(1) / n
        return F.cross_entropy(logits, target) + self.weight * variance.mean()


def make(spec: str) -> nn.Module:
    """The loss (logits (N, K), target (N,)) -> scalar that ``spec`` names; SystemExit with one line if none does."""
    name, _, number = spec.partition(":")
    try:
        value = float(number) if number else None
    except ValueError:
        raise SystemExit(f"loss {spec!r}: {number!r} is not a number; losses are {HELP}") from None
    if name == "ce" and value is None:
        return nn.CrossEntropyLoss()
    if name == "label_smoothing":
        return nn.CrossEntropyLoss(label_smoothing=0.1 if value is None else value)
    if name == "gce":
        return GuidedComplementEntropy(1 / 3 if value is None else value)
    if name in PENALTIES:
        return Loss(diversity=name, diversity_weight=1.0 if value is None else value)
    raise SystemExit(f"loss {spec!r} is unknown; losses are {HELP}")
