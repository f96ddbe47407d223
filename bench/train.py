"""Train one network with one loss; the same command resumes where a run was cut off.

    python bench/train.py --data digits --loss logit_variance:1 --out results/penalty.pt
    python bench/train.py --data mnist5k --loss ce --weight-decay 3e-3 --epochs 30 --out results/ce.pt
    torchrun --nproc_per_node 2 bench/train.py --data cifar10 --model resnet18 --augment --optimizer sgd --lr 0.1 --epochs 100 \\
        --precision bf16 --out results/r18.pt

Step t depends on the state before it, the recipe and t alone: its batch and its random numbers come from generators seeded with
(seed, t). So a run that was killed and resumed ends bit for bit where an unbroken one does (same machine, device, threads and
ranks), and R ranks see between them the batches that one rank sees (on CPUs, a ResNet's batch statistics are each rank's own).
Beside OUT.pt stands OUT.csv, one row an epoch.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arguments
import attack
import checkpoint
import data
import losses
import models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained parameters depend on."""

    data: str = "digits"
    model: str = "cnn"
    loss: str = "ce"
    weight_decay: float = 0.0
    epochs: int = 30
    batch: int = 128
    lr: float = 2e-3
    optimizer: str = "adam"
    precision: str = "fp32"
    adversarial_eps: float = 0.0
    adversarial_steps: int = 7
    augment: bool = False
    seed: int = 0


class Group:
    """The ranks that torchrun started, or this process alone."""

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, totals: Tensor) -> Tensor:
        """Add up over the ranks; the first keeps the sum, the others start again from 0."""
        if self.size > 1:
            dist.all_reduce(totals)
            if not self.first:
                totals.zero_()
        return totals

    def close(self) -> None:
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _seed(recipe: Recipe, step: int, purpose: int) -> int:
    """32 bits, all that PyTorch's CPU generator looks at: plain arithmetic on the three would give some seeds the same stream."""
    return int.from_bytes(hashlib.blake2s(f"{recipe.seed}/{purpose}/{step}".encode(), digest_size=4).digest(), "little")


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine to 0."""
    warm = max(1, steps // 20)
    return recipe.lr * (
        min(1.0, (step + 1) / warm) if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


def _optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":  # weight decay as an L2 term of the loss, in both
        return torch.optim.Adam(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    raise SystemExit(f"optimizer must be adam or sgd, got {recipe.optimizer!r}")


class Trainer:
    """One run: ``step()`` until ``done``; ``state()`` and ``restore()`` between any two steps."""

    def __init__(self, recipe: Recipe, images: data.Data, group: Group) -> None:
        self.recipe, self.images, self.group = recipe, images, group
        device = group.device
        self.x, self.y = images.x_train.to(device), images.y_train.to(device)
        self.batch = min(recipe.batch, len(self.y))
        if self.batch % group.size:
            raise SystemExit(f"a batch of {self.batch} cannot be shared evenly by {group.size} ranks: give another --batch")
        if recipe.precision not in PRECISIONS:
            raise SystemExit(f"precision must be one of {', '.join(PRECISIONS)}, got {recipe.precision!r}")
        self.per_epoch = len(self.y) // self.batch
        self.steps = recipe.epochs * self.per_epoch
        self.criterion = losses.make(recipe.loss)
        torch.manual_seed(_seed(recipe, 0, 2))
        self.net = models.build(recipe.model, images.shape, images.classes).to(device)
        if group.size > 1 and device.type == "cuda":  # the statistics of the whole batch, as one rank has them
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        self.wrapped = DistributedDataParallel(self.net) if group.size > 1 else self.net
        self.optimizer = _optimizer(recipe, self.net)
        self.dtype = PRECISIONS[recipe.precision]
        # only float16 has too short a range for small gradients
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.done_steps = 0
        self.running = torch.zeros(3, dtype=torch.float64, device=device)  # summed loss, correct, rows of the epoch so far
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def done(self) -> bool:
        return self.done_steps >= self.steps

    def _rows(self, step: int) -> Tensor:
        epoch, within = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self.recipe, epoch, 1))
            self._order = epoch, torch.randperm(len(self.y), generator=generator)
        return self._order[1][within * self.batch : (within + 1) * self.batch]

    def _mine(self, whole: Tensor) -> Tensor:
        """This rank's share of something drawn for the whole batch."""
        return whole[self.group.rank :: self.group.size]

    def _autocast(self) -> Any:
        return torch.autocast(self.group.device.type, self.dtype) if self.dtype else nullcontext()

    def _attacked(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        self.net.eval().requires_grad_(False)  # no gradient for the weights, no update of running statistics
        with self._autocast():
            x = attack.pgd(self.net, x, y, self.recipe.adversarial_eps, attack.Effort(self.recipe.adversarial_steps), start=start)
        self.net.train().requires_grad_(True)
        return x

    def step(self) -> None:
        begin = time.perf_counter()
        recipe, device = self.recipe, self.group.device
        torch.manual_seed(_seed(recipe, self.done_steps, 0))
        rows = self._rows(self.done_steps)
        x, y = self.x[rows.to(device)], self.y[self._mine(rows).to(device)]
        if recipe.augment:
            x = data.crop_and_flip(x)
        x = self._mine(x)
        self.net.train()
        if recipe.adversarial_eps > 0:
            start = self._mine(torch.rand(self.batch, *self.images.shape) * 2 - 1).to(device)
            x = self._attacked(x, y, start)
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(recipe, self.done_steps, self.steps)
        with self._autocast():
            logits = self.wrapped(x)
        loss = self.criterion(logits, y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.running += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum(), torch.tensor(len(y), device=device)])
        self.done_steps += 1
        self.seconds += time.perf_counter() - begin
        if self.done_steps % self.per_epoch == 0:
            self._close_epoch()

    def _close_epoch(self) -> None:
        total, correct, rows = self.group.sum(self.running).tolist()
        self.running.zero_()
        if not self.group.first:
            return
        if not math.isfinite(total):
            raise SystemExit(f"the loss is {total} after epoch {self.done_steps // self.per_epoch}: give a smaller --lr or penalty weight")
        self.net.eval()
        hits = attack.predict(self.net, self.images.x_test.to(self.group.device)).argmax(1).cpu() == self.images.y_test
        self.log.append(
            {
                "epoch": self.done_steps // self.per_epoch,
                "step": self.done_steps,
                "loss": total / rows,
                "train_accuracy": correct / rows,
                "test_accuracy": float(hits.float().mean()),
                "seconds": self.seconds,
            }
        )

    def state(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "shape": list(self.images.shape),
            "classes": self.images.classes,
            "step": self.done_steps,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "running": self.running,
            "seconds": self.seconds,
            "log": self.log,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done_steps, self.seconds, self.log = state["step"], state["seconds"], list(state["log"])
        if self.group.first:  # the other ranks' part is in it already
            self.running.copy_(state["running"])


def _save(trainer: Trainer, path: Path) -> None:
    checkpoint.save(path, trainer.state())
    if trainer.log:
        rows = io.StringIO()
        writer = csv.DictWriter(rows, trainer.log[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(trainer.log)
        part = path.with_suffix(".csv.part")
        part.write_text(rows.getvalue())
        part.replace(path.with_suffix(".csv"))


def train(
    recipe: Recipe,
    path: Path | None = None,
    *,
    device: str = "cpu",
    save_every: int = 200,
    progress: bool = True,
    stop_at: int | None = None,
) -> Trainer:
    """Train to the end, from ``path`` if it holds a run of the same recipe, writing it every ``save_every`` steps.

    ``stop_at``: leave, saved, after so many steps in all, as an interrupted run does.
    """
    torch.backends.cudnn.deterministic = True  # a resumed run must not pick other kernels than an unbroken one
    images = data.load(recipe.data)
    group = Group(device)
    trainer = Trainer(recipe, images, group)
    if path is not None and path.exists():
        state = checkpoint.load(path, group.device)
        if state["recipe"] != asdict(recipe):
            changed = ", ".join(f"{k}={v!r}" for k, v in state["recipe"].items() if asdict(recipe).get(k) != v)
            raise SystemExit(f"{path} was trained with {changed}: give another --out, or delete it to train afresh")
        trainer.restore(state)
    last = trainer.steps if stop_at is None else min(stop_at, trainer.steps)
    hide = not (progress and group.first)
    with tqdm(total=trainer.steps, initial=trainer.done_steps, desc=path.stem if path else recipe.loss, disable=hide, leave=False) as bar:
        while trainer.done_steps < last and not _interrupted:
            trainer.step()
            bar.update()
            if trainer.done_steps % save_every == 0 or trainer.done_steps == last:
                group.sum(trainer.running)
                if path is not None and group.first:
                    _save(trainer, path)
    if _interrupted and path is not None and group.first:
        _save(trainer, path)
        raise SystemExit(f"stopped at step {trainer.done_steps} of {trainer.steps}; the same command goes on from there")
    group.close()
    trainer.net.eval()
    return trainer


_interrupted: list[int] = []


def catch_signals() -> None:
    """Let the step under way end and be saved on SIGINT or SIGTERM; a second one ends at once."""

    def note(number: int, frame: Any) -> None:
        _interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def _arguments() -> argparse.ArgumentParser:
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=default.data, help="digits (default), mnist5k, cifar10, cifar100, a .npz file or a folder of images"
    )
    parser.add_argument("--model", default=default.model, choices=models.NAMES)
    parser.add_argument("--loss", default=default.loss, metavar="NAME[:NUMBER]", help=losses.HELP)
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay, help="L2 term of the optimiser (default 0)")
    parser.add_argument("--epochs", type=arguments.positive, default=default.epochs)
    parser.add_argument("--batch", type=arguments.positive, default=default.batch, help="rows a step, over all ranks (default 128)")
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--optimizer", default=default.optimizer, choices=("adam", "sgd"))
    parser.add_argument("--precision", default=default.precision, choices=tuple(PRECISIONS), help="of the forward and backward pass")
    parser.add_argument("--adversarial-eps", type=float, default=0.0, help="train on PGD examples within this L-infinity radius (0: off)")
    parser.add_argument("--adversarial-steps", type=arguments.positive, default=default.adversarial_steps)
    parser.add_argument("--augment", action="store_true", help="random crop and mirror, as usual for CIFAR")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--out", type=arguments.new_checkpoint, required=True, help="checkpoint to write, and to resume from")
    parser.add_argument("--save-every", type=arguments.positive, default=200, metavar="STEPS")
    parser.add_argument("--threads", type=arguments.positive, help="CPU threads (default: PyTorch's choice; 1 is best for the small CNN)")
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = vars(_arguments().parse_args(argv))
    out, device, save_every, threads = (args.pop(name) for name in ("out", "device", "save_every", "threads"))
    if threads:
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # ranks cannot agree on a step to stop after; they resume from the last save
        catch_signals()
    trainer = train(Recipe(**args), out, device=device, save_every=save_every)
    if trainer.group.first:
        last = trainer.log[-1]
        print(f"{out}: test accuracy {last['test_accuracy']:.2%}, {1e3 * trainer.seconds / trainer.steps:.2f} ms a step")


if __name__ == "__main__":
    main()
