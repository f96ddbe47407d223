"""What the loss costs of a training step: CrossEntropyLoss, Loss, and the same penalty written with torch operators.

    python bench/overhead.py --batches 128 1024 --classes 10 100 1000

Two ways, over interleaved rounds in random order: the loss alone, forward and backward down to the logits; and whole steps (forward,
loss, backward, optimiser), each against CrossEntropyLoss's step of the same round, the median of those differences with its 95 %
confidence interval.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arguments
import losses
import models
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastsoftloss import Loss

PLAIN = "CrossEntropyLoss()"
CRITERIA: dict[str, Callable[[], nn.Module]] = {
    PLAIN: nn.CrossEntropyLoss,
    "Loss()": Loss,
    "penalty in torch operators": losses.TorchLogitVariance,
}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interval(sample: Sequence[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with a probability of at least 95 %, whatever the distribution."""
    n = len(sample)
    tail, k = 0.5**n, 0  # the chance that at most k of n lie below the median
    while tail + math.comb(n, k + 1) * 0.5**n <= 0.025:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    ordered = sorted(sample)
    return ordered[k], ordered[n - 1 - k]


def measure(net: nn.Module, x: Tensor, y: Tensor, rounds: int = 50, progress: bool = False) -> list[dict[str, Any]]:
    """One row for each of :data:`CRITERIA`: times in seconds of a step of ``net`` (Adam) on the batch ``x``, ``y``."""
    optimizer = torch.optim.Adam(net.train().parameters(), 1e-6)
    criteria = {name: make().to(x.device) for name, make in CRITERIA.items()}
    with torch.no_grad():
        logits = net(x)
    steps: dict[str, list[float]] = {name: [] for name in criteria}
    alone: dict[str, list[float]] = {name: [] for name in criteria}
    for turn in tqdm(range(rounds + 3), "timing", leave=False, disable=not progress):
        for name in random.sample(list(criteria), len(criteria)):  # what ran before leaves its mark on the caches
            begin = _clock(x.device)
            optimizer.zero_grad(set_to_none=True)
            criteria[name](net(x), y).backward()
            optimizer.step()
            if turn >= 3:  # the first rounds warm up caches and allocators
                steps[name].append(_clock(x.device) - begin)
        for name in random.sample(list(criteria), len(criteria)):
            z = logits.clone().requires_grad_()
            begin = _clock(x.device)
            criteria[name](z, y).backward()
            if turn >= 3:
                alone[name].append(_clock(x.device) - begin)
    rows = []
    for name in criteria:
        slower = [step / plain - 1 for step, plain in zip(steps[name], steps[PLAIN], strict=True)]
        rows.append(
            {
                "loss": name,
                "step_s": statistics.median(steps[name]),
                "step_quartiles_s": statistics.quantiles(steps[name], n=4)[::2],
                "loss_s": statistics.median(alone[name]),
                "loss_quartiles_s": statistics.quantiles(alone[name], n=4)[::2],
                "slower": statistics.median(slower),
                "slower_95": interval(slower),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of :func:`measure`'s rows; batch and classes are shown where the rows tell them."""
    sized = "batch" in rows[0]
    lines = [
        f"| {'batch | classes | ' if sized else ''}loss | a step, ms (quartiles) | longer than with CrossEntropyLoss (95 %) | "
        "the loss alone, µs (quartiles) | its share of the step |",
        "|---" * (7 if sized else 5) + "|",
    ]
    for row in rows:
        size = f"{row['batch']} | {row['classes']} | " if sized else ""
        name = row["loss"] if " " in row["loss"] else f"`{row['loss']}`"
        (first, third), (low, high) = row["step_quartiles_s"], row["loss_quartiles_s"]
        longer = "" if row["loss"] == PLAIN else "{:+.1%} ({:+.1%} to {:+.1%})".format(row["slower"], *row["slower_95"])
        lines.append(
            f"| {size}{name} | {1e3 * row['step_s']:.2f} ({1e3 * first:.2f} to {1e3 * third:.2f}) | {longer} | "
            f"{1e6 * row['loss_s']:.0f} ({1e6 * low:.0f} to {1e6 * high:.0f}) | {row['loss_s'] / row['step_s']:.1%} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=arguments.positive, nargs="+", default=[128, 1024])
    parser.add_argument("--classes", type=arguments.positive, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--model", default="cnn", choices=models.NAMES)
    parser.add_argument("--size", type=int, nargs=3, default=[1, 28, 28], metavar=("C", "H", "W"))
    parser.add_argument("--rounds", type=arguments.positive, default=50)
    parser.add_argument("--threads", type=arguments.positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    shape = tuple(args.size)
    for batch in args.batches:
        for classes in args.classes:
            net = models.build(args.model, shape, classes).to(args.device)
            x = torch.rand(batch, *shape, device=args.device)
            y = torch.randint(classes, (batch,), device=args.device)
            rows += [{"batch": batch, "classes": classes, **row} for row in measure(net, x, y, args.rounds, progress=True)]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "device": args.device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
