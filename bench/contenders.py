"""What is timed side by side: ``Loss()``, its peers on this device, and two floors that no loss called from Python can go below."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import losses
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsoftloss import Loss, backends

# targets that are no class indices, which a contender draws for itself: what bench/targets.py times
SOFT = {
    "mixture": "(y_a, y_b, mix)",
    "gathers": "class indices and two gathers",
    "probabilities": "class probabilities",
    "probabilities:kl": "the same, kl",
    "probabilities:reverse_kl": "reverse_kl",
    "probabilities:chi2": "chi2",
    "probabilities:variance": "variance",
    "probabilities:None": "no penalty",
    "cross_entropy_probabilities": "F.cross_entropy of class probabilities",
    "mixup": "F.cross_entropy twice, mixed",
}
LABELS = {
    "ours": "Loss(), penalty included",
    "triton": "the same, backend='triton'",
    "cross_entropy": "F.cross_entropy, no penalty",
    "penalised": "CE + penalty, torch operators",
    "compiled_cross_entropy": "torch.compile(CE), no penalty",
    "compiled_penalised": "torch.compile(CE + penalty)",
    "liger": "Liger, no penalty",
    "quack": "quack, no penalty",
    "apex": "apex, no penalty",
    "floor": "a Function that computes nothing",
    "engine": "the same without Tensor.backward",
}


class Contender(NamedTuple):
    loss: Callable[[Tensor, Tensor], Any]
    backward: Callable[[Any], object] = Tensor.backward


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.gradient = torch.empty_like(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx, upstream):
        return ctx.__dict__.pop("gradient"), None


def _engine(loss: Tensor) -> None:
    # what Tensor.backward calls at its end
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _soft(name: str, logits: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    other = torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:], device=logits.device)
    mix = torch.rand(other.shape, device=logits.device)
    target = torch.randn_like(logits, dtype=torch.float32).softmax(1)
    if name == "mixture":
        ours = Loss()
        return lambda z, y: ours(z, (y, other, mix))
    if name == "mixup":
        return lambda z, y: 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(z, other)
    if name == "cross_entropy_probabilities":
        return lambda z, y: F.cross_entropy(z, target)
    kind = name.partition(":")[2] or "logit_variance"
    soft = Loss(diversity=None if kind == "None" else kind)
    return lambda z, y: soft(z, target)


def _gathers(logits: Tensor) -> Contender:
    """What a mixture is to cost no more than."""
    ours, index = Loss(), torch.randint(logits.shape[1], (logits.shape[0], 1, *logits.shape[2:]), device=logits.device)
    upstream = (None, *[torch.ones_like(index, dtype=logits.dtype)] * 2)
    return Contender(
        lambda z, y: (ours(z, y), z.gather(1, y.unsqueeze(1)), z.gather(1, index)), lambda of: torch.autograd.backward(of, upstream)
    )


def _compiled(loss: Callable[[Tensor, Tensor], Tensor], threads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """For this one shape and this many threads: the generated code has both written in."""
    from torch._inductor import config

    config.cpp.threads = threads
    return torch.compile(loss, dynamic=False)


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # its gradient takes the logits' place: later rounds, of this contender and the others, find other numbers, as many bytes
    return lambda logits, target: LigerCrossEntropyFunction.apply(logits, target, None, -100, 0.0, 0.0, "mean")[0]


def _quack() -> Callable[[Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    return lambda logits, target: cross_entropy(logits, target, reduction="mean")


def _apex() -> Callable[[Tensor, Tensor], Tensor]:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    return lambda logits, target: SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100).mean()


def gather(logits: Tensor, names: list[str]) -> dict[str, Contender]:
    """Those of ``names`` that can take such logits here, made anew: what is compiled is compiled for this shape."""
    torch.compiler.reset()
    threads = torch.get_num_threads()
    penalised = losses.TorchLogitVariance()
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: Contender(Loss()),
        "cross_entropy": lambda: Contender(F.cross_entropy),
        "penalised": lambda: Contender(penalised),
        "compiled_cross_entropy": lambda: Contender(_compiled(F.cross_entropy, threads)),
        "compiled_penalised": lambda: Contender(_compiled(penalised, threads)),
        "floor": lambda: Contender(_Nothing.apply),
        "engine": lambda: Contender(_Nothing.apply, _engine),
    }
    makers |= {name: lambda name=name: Contender(_soft(name, logits)) for name in SOFT}
    makers["gathers"] = lambda: _gathers(logits)
    if logits.is_cuda and backends.default(logits.device) != "triton" and "triton" not in backends.missing():
        makers["triton"] = lambda: Contender(Loss(backend="triton"))
    if logits.is_cuda and logits.dim() == 2:
        packages = {"liger": ("liger_kernel", _liger), "quack": ("quack", _quack), "apex": ("apex", _apex)}
        for name, (package, make) in packages.items():
            if importlib.util.find_spec(package):
                makers[name] = lambda make=make: Contender(make())
    return {name: make() for name, make in makers.items() if name in names}
