"""Speed of the loss, forward and backward through Python, as a ratio to ``F.cross_entropy`` in the same process.

    python bench/microbench.py                        # the sizes of the README, 1 thread and all threads
    python bench/microbench.py --sizes 512x100 --json speed.json

Every round times a few calls of each contender in a row, after one that is not timed, so that what disturbs the machine
disturbs all of them; the figures are medians over all calls. ``floor`` is an autograd Function that computes nothing, called
and differentiated in the same way: no loss written in Python can be faster. ``copy`` is the fraction of the bandwidth of
``Tensor.copy_`` in the same run that our forward and backward reach together, counted as two passes over the logits: one
read, one write.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastsoftloss import Loss

CALLS = 5  # of a contender in a row, each round
SIZES = ("128x10", "1024x10", "16384x10", "256x100", "256x1000", "4096x1000", "512x32000")


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.gradient = torch.empty_like(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx, upstream):
        return ctx.__dict__.pop("gradient")


def penalised_in_torch(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same loss in torch operators, as one would write it: no attention to precision."""
    others = logits.masked_fill(F.one_hot(target, logits.shape[1]).bool(), 0.0)
    n = logits.shape[1] - 1
    mean = others.sum(1, keepdim=True) / n
    spread = ((logits - mean).square().sum(1) - (logits.gather(1, target[:, None]) - mean).square().squeeze(1)) / n
    return F.cross_entropy(logits, target) + spread.mean()


def measure(rows: int, classes: int, seconds: float) -> dict[str, float]:
    """Median seconds of a forward and a backward by contender, and of a copy of the logits."""
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(classes, (rows,))
    source, sink = torch.randn(rows, classes), torch.empty(rows, classes)

    def both(loss: Callable[..., torch.Tensor], *args: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            loss(logits, *args).backward()

        return run

    contenders: dict[str, Callable[[], object]] = {
        "ours": both(Loss(), target),
        "cross_entropy": both(F.cross_entropy, target),
        "penalised_in_torch": both(penalised_in_torch, target),
        "floor": both(_Nothing.apply),
        "copy": lambda: sink.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, run in contenders.items():
            run()  # what ran before has left its own data in the caches
            for _ in range(CALLS):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxCLASSES")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each size and thread count")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{processor()}, {torch.get_num_threads()} threads at most; torch {torch.__version__}; float32; forward + backward, medians")
    print(f"{'rows x classes':>16} {'threads':>7} {'ours us':>10} {'/ CE':>6} {'/ CE+penalty':>12} {'floor / CE':>10} {'copy':>6}")
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.sizes:
            rows, classes = map(int, size.lower().split("x"))
            t = measure(rows, classes, args.seconds)
            results.append({"rows": rows, "classes": classes, "threads": threads, "seconds": t})
            print(
                f"{size:>16} {threads:>7} {t['ours'] * 1e6:>10.1f} {t['ours'] / t['cross_entropy']:>6.2f} "
                f"{t['ours'] / t['penalised_in_torch']:>12.2f} {t['floor'] / t['cross_entropy']:>10.2f} {t['copy'] / t['ours']:>6.2f}"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"processor": processor(), "torch": torch.__version__, "dtype": "float32", "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
