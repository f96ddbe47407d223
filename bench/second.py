"""Time of a gradient penalty: forward, backward with ``create_graph=True``, backward of the gradient's square.

    python bench/second.py --threads 1

Contenders: ours, whose second derivative is a kernel; ours with the second derivative in plain PyTorch (``plain``);
``F.cross_entropy``, which has no penalty, and ours without one. Interleaved, medians, as ratios to the first. ``switches`` counts how
often other processes took the core from this one, a second: above 20 the machine was not quiet.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsoftloss import ops
from fastsoftloss.functional import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(diversity: str | None) -> Loss:
    return lambda logits, target: cross_entropy(logits, target, diversity=diversity)


def penalty(loss: Loss, logits: Tensor, target: Tensor) -> None:
    z = logits.requires_grad_()
    value = loss(z, target)
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    torch.autograd.grad(value + gradient.square().sum(), z)


def in_plain(loss: Loss, logits: Tensor, target: Tensor) -> None:
    with mock.patch.object(ops.Operators, "twice", return_value=False):
        penalty(loss, logits, target)


CONTENDERS: dict[str, tuple[Callable[[Loss, Tensor, Tensor], None], Loss]] = {
    "ours": (penalty, ours("logit_variance")),
    "plain": (in_plain, ours("logit_variance")),
    "ours, no penalty": (penalty, ours(None)),
    "plain, no penalty": (in_plain, ours(None)),
    "F.cross_entropy": (penalty, F.cross_entropy),
}


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
            for name, (run, loss) in CONTENDERS.items():
                start = time.perf_counter()
                run(loss, logits, target)
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
        rate = (resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches) / (time.perf_counter() - began)
        median = {name: statistics.median(t) for name, t in times.items()}
        cells = ", ".join(f"{name} {1e6 * t:.0f} us ({t / median['ours']:.2f})" for name, t in median.items())
        print(f"{size}, {args.threads} threads: {cells}; {rate:.0f} switches a second", flush=True)


if __name__ == "__main__":
    main()
