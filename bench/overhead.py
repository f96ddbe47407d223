"""What the loss costs of a training step: CrossEntropyLoss, Loss, and the same penalty written with torch operators.

    python bench/overhead.py --batches 128 1024 --classes 10 100 1000

Measured both ways, medians over interleaved rounds: the loss alone, forward and backward down to the logits; and what a whole step
(forward, loss, backward, optimiser) gains over one whose gradient in the logits is given for free.
"""

from __future__ import annotations

import argparse
import json
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

CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "CrossEntropyLoss()": nn.CrossEntropyLoss,
    "Loss()": Loss,
    "penalty in torch operators": losses.TorchLogitVariance,
}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(net: nn.Module, x: Tensor, y: Tensor, rounds: int = 50, progress: bool = False) -> list[dict[str, Any]]:
    """One row for each of :data:`CRITERIA`: times in seconds of a step of ``net`` (Adam) on the batch ``x``, ``y``."""
    optimizer = torch.optim.Adam(net.train().parameters(), 1e-6)
    criteria = {name: make().to(x.device) for name, make in CRITERIA.items()}
    with torch.no_grad():
        logits = net(x)
    free = torch.randn_like(logits) / len(y)
    whole: dict[str, list[float]] = {name: [] for name in ("nothing", *criteria)}
    alone: dict[str, list[float]] = {name: [] for name in criteria}
    for turn in tqdm(range(rounds + 3), "timing", leave=False, disable=not progress):
        for name in random.sample(list(whole), len(whole)):  # what ran before leaves its mark on the caches
            begin = _clock(x.device)
            optimizer.zero_grad(set_to_none=True)
            out = net(x)
            if name == "nothing":
                out.backward(free)
            else:
                criteria[name](out, y).backward()
            optimizer.step()
            if turn >= 3:  # the first rounds warm up caches and allocators
                whole[name].append(_clock(x.device) - begin)
        for name, criterion in random.sample(list(criteria.items()), len(criteria)):
            z = logits.clone().requires_grad_()
            begin = _clock(x.device)
            criterion(z, y).backward()
            if turn >= 3:
                alone[name].append(_clock(x.device) - begin)
    base = statistics.median(whole["nothing"])
    rows = []
    for name in criteria:
        step, loss = statistics.median(whole[name]), statistics.median(alone[name])
        rows.append({"loss": name, "step_s": step, "loss_s": loss, "share_alone": loss / step, "share_in_step": (step - base) / step})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of :func:`measure`'s rows; batch and classes are shown where the rows tell them."""
    sized = "batch" in rows[0]
    lines = [
        f"| {'batch | classes | ' if sized else ''}loss | a step, ms | the loss alone, µs | its share of the step | "
        "over a loss-free step |",
        "|---" * (7 if sized else 5) + "|",
    ]
    for row in rows:
        size = f"{row['batch']} | {row['classes']} | " if sized else ""
        lines.append(
            f"| {size}`{row['loss']}` | {1e3 * row['step_s']:.2f} | {1e6 * row['loss_s']:.0f} | {row['share_alone']:.1%} | "
            f"{row['share_in_step']:+.1%} |".replace("`penalty in torch operators`", "penalty in torch operators")
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
