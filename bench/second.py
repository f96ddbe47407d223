"""Time of a gradient penalty: forward, backward with ``create_graph=True``, backward of the gradient's square.

    python bench/second.py --threads 1

Contenders: ours, whose second derivative is a kernel; ours with the second derivative in plain PyTorch (``plain``), as every backend but
``cpu`` has it; ``F.cross_entropy``, which has no penalty, and ours without one. Interleaved, medians, as ratios to the first. ``switches``
counts how often other processes took the core from this one, a second: above 20 the machine was not quiet.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsoftloss import backends, ops
from fastsoftloss.functional import options_of

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(fused: bool, diversity: str | None) -> Loss:
    operators = backends.choose("cpu", torch.device("cpu"))
    assert operators is not None
    operators = operators if fused else operators._replace(double_backward=None)
    options = options_of(-100, "mean", 0.0, diversity, 1.0 if diversity else 0.0, 0.0)
    return lambda logits, target: ops.cross_entropy(operators, logits, target, None, None, options, False)[0]


CONTENDERS: dict[str, Loss] = {
    "ours": ours(True, "logit_variance"),
    "plain": ours(False, "logit_variance"),
    "ours, no penalty": ours(True, None),
    "plain, no penalty": ours(False, None),
    "F.cross_entropy": F.cross_entropy,
}


def penalty(loss: Loss, logits: Tensor, target: Tensor) -> None:
    z = logits.requires_grad_()
    value = loss(z, target)
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    torch.autograd.grad(value + gradient.square().sum(), z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1024x10", "256x1000", "4096x1000"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        rows, classes = map(int, size.split("x"))
        logits, target = 3 * torch.randn(rows, classes), torch.randint(classes, (rows,))
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        began, switches = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        for i in range(-3, args.rounds):  # the first are not counted
            for name, loss in CONTENDERS.items():
                start = time.perf_counter()
                penalty(loss, logits, target)
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
        rate = (resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches) / (time.perf_counter() - began)
        median = {name: statistics.median(t) for name, t in times.items()}
        cells = ", ".join(f"{name} {1e6 * t:.0f} us ({t / median['ours']:.2f})" for name, t in median.items())
        print(f"{size}, {args.threads} threads: {cells}; {rate:.0f} switches a second", flush=True)


if __name__ == "__main__":
    main()
