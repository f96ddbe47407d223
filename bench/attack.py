"""Attack checkpoints: L-infinity within eps, images in [0, 1], nothing known to be hidden from the attacker.

    python bench/attack.py results/ce.pt results/penalty.pt --attacks clean fgsm pgd strong --eps 0.1

    fgsm       one signed step                                                          arXiv:1412.6572
    pgd        20 signed steps up the cross-entropy from a random start                 arXiv:1706.06083
    margin-pgd the same up max_j z_j - z_y: no softmax between the attack and the net   arXiv:1608.04644
    apgd-ce    100 steps of self-tuned size up the cross-entropy                        arXiv:2003.01690
    apgd-t     the same towards each of the 9 likeliest wrong classes, up the DLR loss  arXiv:2003.01690
    square     random squares, no gradient                                              arXiv:1912.00049
    autoattack AutoAttack, standard version: apgd-ce, apgd-t, fab-t, square             arXiv:2003.01690
    strong     the worst case over pgd, margin-pgd, apgd-ce, apgd-t and square

The first three are here, the others pyautoattack's. Cross-entropy is climbed through fastsoftloss, whose gradient does not vanish on
confident rows; ``--stall`` shows what that changes on a model with large margins.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arguments
import checkpoint
import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastsoftloss import functional

Objective = Callable[[Tensor, Tensor], Tensor]
Attack = Callable[[nn.Module, Tensor, Tensor, float, "Effort"], Tensor]


class Effort(NamedTuple):
    """How hard to try; the defaults are the published strength of each attack."""

    pgd_steps: int = 20
    apgd_steps: int = 100
    targets: int = 9
    queries: int = 5000
    seed: int = 0


PUBLISHED = Effort()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """log CE of each row. In float64 its gradient stays of order 1 up to margins of 700, so nothing underflows on the way to
    the pixels either; the logarithm is monotone, so every signed step and every comparison is that of CE itself."""
    rows = functional.cross_entropy(logits.double(), target, diversity=None, reduction="none")
    return rows.clamp_min(torch.finfo(rows.dtype).tiny).log()


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """max over the wrong classes of z_j, less z_y: positive once the row is misclassified."""
    label = target.unsqueeze(1)
    return logits.scatter(1, label, -torch.inf).amax(1) - logits.gather(1, label).squeeze(1)


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.clamp(torch.minimum(torch.maximum(x_adv, x - eps), x + eps), 0, 1)


def input_gradient(net: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The gradient of the summed objective in ``x``, and the logits."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(x)
        (gradient,) = torch.autograd.grad(objective(logits, y).sum(), x)
    return gradient, logits.detach()


def fgsm(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED) -> Tensor:
    return project(x + eps * input_gradient(net, x, y, cross_entropy)[0].sign(), x, eps)


def pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    effort: Effort = PUBLISHED,
    objective: Objective = cross_entropy,
    start: Tensor | None = None,
) -> Tensor:
    """Signed steps of 2.5 eps / steps. An image keeps the last of its points that is misclassified, else the last of all.

    ``start``: x's shape, in [-1, 1], in units of eps; by default uniform from ``effort.seed``.
    """
    if start is None:
        start = torch.rand(x.shape, generator=torch.Generator().manual_seed(effort.seed)).to(x) * 2 - 1
    point = found = project(x + eps * start, x, eps)
    for _ in range(effort.pgd_steps):
        gradient, logits = input_gradient(net, point, y, objective)
        found = torch.where((logits.argmax(1) != y).view(-1, 1, 1, 1), point, found)
        point = project(point + 2.5 * eps / effort.pgd_steps * gradient.sign(), x, eps)
    with torch.no_grad():
        wrong_now, wrong_before = (net(candidate).argmax(1) != y for candidate in (point, found))
    return torch.where((wrong_before & ~wrong_now).view(-1, 1, 1, 1), found, point)


def margin_pgd(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED) -> Tensor:
    return pgd(net, x, y, eps, effort, margin)


def require_library() -> Any:
    try:
        import pyautoattack
        import pyautoattack.autopgd_base
        import pyautoattack.square
    except ImportError:
        raise SystemExit("APGD, Square and AutoAttack need pyautoattack: pip install pyautoattack") from None
    logging.getLogger("pyautoattack").setLevel(logging.ERROR)
    return pyautoattack


def _isolated(run: Callable[[], Tensor]) -> Tensor:
    """The library seeds PyTorch's own generators: put them back afterwards."""
    with torch.random.fork_rng():
        return run().detach()


def apgd_ce(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED, objective: Objective = cross_entropy) -> Tensor:
    base = require_library().autopgd_base
    attack = base.APGDAttack(net, n_iter=effort.apgd_steps, eps=eps, seed=effort.seed, loss="dlr", device=x.device, logger=_quiet)
    # the library's own 'ce' is F.cross_entropy, flat on confident rows; the loss that it calls 'dlr' is one that we can replace
    attack.dlr_loss = lambda logits, target: objective(logits, target).to(logits.dtype)
    return _isolated(lambda: attack.perturb(x, y))


def _targets(net: nn.Module, x: Tensor, most: int, name: str) -> int:
    """How many wrong classes a targeted attack can aim at."""
    classes = predict(net, x[:1]).shape[1]
    if classes < 4:
        raise SystemExit(f"{name} needs at least 4 classes (its loss looks at the fourth), and this model has {classes}: leave it out")
    return min(most, classes - 1)


def apgd_targeted(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED) -> Tensor:
    base = require_library().autopgd_base
    attack = base.APGDAttack_targeted(
        net,
        n_iter=effort.apgd_steps,
        eps=eps,
        seed=effort.seed,
        n_target_classes=_targets(net, x, effort.targets, "apgd-t"),
        device=x.device,
        logger=_quiet,
    )
    return _isolated(lambda: attack.perturb(x, y))


def square(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED) -> Tensor:
    attack = require_library().square.SquareAttack(
        net, n_queries=effort.queries, eps=eps, seed=effort.seed, resc_schedule=effort.queries != 5000, device=x.device
    )
    return _isolated(lambda: attack.perturb(x, y))


def autoattack(net: nn.Module, x: Tensor, y: Tensor, eps: float, effort: Effort = PUBLISHED) -> Tensor:
    attack = require_library().AutoAttack(net, eps=eps, seed=effort.seed, device=x.device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = _targets(net, x, PUBLISHED.targets, "autoattack")
    return _isolated(lambda: attack.run_standard_evaluation(x, y, batch_size=len(x))[0])


_quiet = logging.getLogger("bench.attack.library")
_quiet.setLevel(logging.ERROR)

STRONG: dict[str, Attack] = {"pgd": pgd, "margin-pgd": margin_pgd, "apgd-ce": apgd_ce, "apgd-t": apgd_targeted, "square": square}
ATTACKS: dict[str, Attack] = {"fgsm": fgsm, **STRONG, "autoattack": autoattack}
NAMES = ("clean", *ATTACKS, "strong")


def predict(net: nn.Module, x: Tensor, batch: int = 500) -> Tensor:
    """Logits (N, K), without gradient."""
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(batch)])


def survivors(net: nn.Module, x: Tensor, y: Tensor, attack: Attack, eps: float, effort: Effort, alive: Tensor, batch: int = 250) -> Tensor:
    """Which rows of ``alive`` (N,) bool the attack leaves correct. Only those are attacked: what is wrong already stays wrong.

    The attack's points are projected and judged here again, so that no library's slack counts as an attack.
    """
    alive = alive.clone()
    for rows in alive.nonzero().squeeze(1).split(batch):
        if not len(rows):  # the one part of nothing
            break
        x_adv = project(attack(net, x[rows], y[rows], eps, effort), x[rows], eps)
        alive[rows] = predict(net, x_adv).argmax(1) == y[rows]
    return alive


def evaluate(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    attacks: Sequence[str] = ("clean", "fgsm", "pgd", "strong"),
    effort: Effort = PUBLISHED,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Name of the attack -> (N,) bool, the images that are still classified as ``y``. ``strong`` also yields its parts, each
    against the survivors of those before it (the order of :data:`STRONG`), as ``strong/NAME``."""
    clean = predict(net, x).argmax(1) == y
    result: dict[str, Tensor] = {}
    for name in attacks:
        if name == "clean":
            result[name] = clean
        elif name == "strong":
            alive = clean
            for part, attack in tqdm(STRONG.items(), "strong", leave=False, disable=not progress):
                done = result.get("pgd") if part == "pgd" else None
                alive = survivors(net, x, y, attack, eps, effort, alive) if done is None else done
                result[f"strong/{part}"] = alive
            result[name] = alive
        elif name in ATTACKS:
            result[name] = survivors(net, x, y, ATTACKS[name], eps, effort, clean)
        else:
            raise SystemExit(f"attack {name!r} is unknown; attacks are {', '.join(NAMES)}")
    return result


class Scaled(nn.Module):
    """The same classifier with logits ``factor`` times as large: the margins of an over-confident net, at will."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


def _torch_float32(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _torch_log_float64(logits: Tensor, target: Tensor) -> Tensor:
    rows = F.cross_entropy(logits.double(), target, reduction="none")
    return rows.clamp_min(torch.finfo(rows.dtype).tiny).log()


def _ours_float32(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits, target, diversity=None, reduction="none")


OBJECTIVES: dict[str, Objective] = {
    "`F.cross_entropy`, float32": _torch_float32,
    "fastsoftloss, float32": _ours_float32,
    "log of `F.cross_entropy`, float64": _torch_log_float64,
    "log of fastsoftloss, float64": cross_entropy,
}


def stall(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, factors: Sequence[float] = (1, 3, 10, 30), effort: Effort = PUBLISHED
) -> list[dict[str, Any]]:
    """PGD and APGD through F.cross_entropy and through fastsoftloss, on the net with its logits multiplied by each factor.

    The classifier is the same for every factor, so a sound attack must not notice. For each: the median margin, the share of
    correct images whose loss, whose gradient in the true logit, and whose gradient in every pixel is exactly 0; the accuracy left.
    """
    rows = []
    for factor in factors:
        scaled = Scaled(net, factor)
        logits = predict(scaled, x)
        clean = logits.argmax(1) == y
        for name, objective in OBJECTIVES.items():
            z = logits[clean].requires_grad_()
            value = objective(z, y[clean])
            (dz,) = torch.autograd.grad(value.sum(), z)
            dx = torch.cat(
                [input_gradient(scaled, *part, objective)[0] for part in zip(x[clean].split(250), y[clean].split(250), strict=True)]
            )
            left = {
                one.__name__: survivors(scaled, x, y, partial(one, objective=objective), eps, effort, clean).float().mean()
                for one in (pgd, apgd_ce)
            }
            rows.append(
                {
                    "factor": factor,
                    "objective": name,
                    "median_margin": float(-margin(z.detach(), y[clean]).median()),
                    "zero_loss": float((value == 0).float().mean()),
                    "zero_true_logit": float((dz.gather(1, y[clean].unsqueeze(1)) == 0).float().mean()),
                    "zero_input": float((dx.flatten(1) == 0).all(1).float().mean()),
                    **{name: float(value) for name, value in left.items()},
                }
            )
    return rows


def stall_table(rows: list[dict[str, Any]]) -> str:
    """:func:`stall` as Markdown."""
    lines = [
        "| logits times | median margin | attack through | loss is 0 | dL/dz_y is 0 | dL/dx is 0 | under PGD | under APGD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['factor']:g} | {row['median_margin']:.1f} | {row['objective']} | {row['zero_loss']:.0%} | "
            f"{row['zero_true_logit']:.0%} | {row['zero_input']:.0%} | {row['pgd']:.1%} | {row['apgd_ce']:.1%} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files written by bench/train.py")
    parser.add_argument("--attacks", nargs="+", default=["clean", "fgsm", "pgd", "strong"], choices=NAMES, metavar="NAME")
    parser.add_argument("--eps", type=float, default=0.1, help="L-infinity radius, images in [0, 1] (default 0.1)")
    parser.add_argument("--limit", type=arguments.positive, help="attack the first so many test images only")
    parser.add_argument("--data", help="data set to attack (default: the checkpoint's own)")
    parser.add_argument("--pgd-steps", type=arguments.positive, default=PUBLISHED.pgd_steps)
    parser.add_argument("--apgd-steps", type=arguments.positive, default=PUBLISHED.apgd_steps)
    parser.add_argument(
        "--queries", type=arguments.positive, default=PUBLISHED.queries, help="queries of Square for each image (default 5000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=arguments.positive, help="CPU threads (default: PyTorch's choice; 1 is best for the small CNN)")
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--stall", action="store_true", help="instead: PGD through F.cross_entropy against PGD through fastsoftloss")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    effort = Effort(args.pgd_steps, args.apgd_steps, seed=args.seed, queries=args.queries)
    if {"apgd-ce", "apgd-t", "square", "autoattack", "strong"} & set(args.attacks) and not args.stall:
        require_library()  # say so before anything runs
    figures: dict[str, Any] = {}
    for path in tqdm(args.checkpoints, "checkpoints", disable=len(args.checkpoints) == 1):
        state = checkpoint.load(path, args.device)
        net = checkpoint.network(state, args.device)
        images = data.load(args.data or state["recipe"]["data"])
        if images.shape != tuple(state["shape"]):
            raise SystemExit(
                f"{path} takes images of {tuple(state['shape'])}, and {images.name} has {images.shape}: give a --data that fits"
            )
        x, y = images.x_test[: args.limit].to(args.device), images.y_test[: args.limit].to(args.device)
        if args.stall:
            figures[str(path)] = stall(net, x, y, args.eps, effort=effort)
            tqdm.write(f"{path}\n\n{stall_table(figures[str(path)])}\n")
        else:
            kept = evaluate(net, x, y, args.eps, args.attacks, effort, progress=True)
            figures[str(path)] = {name: float(rows.float().mean()) for name, rows in kept.items()}
    if not args.stall:
        print(f"| checkpoint | {' | '.join(args.attacks)} |\n|---|{'---|' * len(args.attacks)}")
        for name, row in figures.items():
            print(f"| {name} | {' | '.join(f'{100 * row[attack]:.1f}' for attack in args.attacks)} |")
    if args.json:
        args.json.write_text(json.dumps({"eps": args.eps, "effort": effort._asdict(), "accuracy": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
