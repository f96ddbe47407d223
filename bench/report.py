"""Train, attack, and write the robustness report: report.md, report.json and one figure a data set.

    python bench/report.py --quick                   digits, under two minutes on 2 cores
    OMP_NUM_THREADS=1 python bench/report.py         MNIST-5k and digits, 4 seeds: about an hour on one core

Every run's checkpoint and figures are kept under --out: an interrupted report goes on where it stopped, and a second call with the same
options only writes the tables again. A configuration is LOSS[@WEIGHT_DECAY][+at], as in ce@3e-3, logit_variance:5@1e-3 or ce+at: +at
trains on PGD examples of 7 steps within --eps.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import arguments
import attack
import checkpoint
import data
import losses
import models
import overhead
import plots
import torch
import train
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from fastsoftloss import backends, functional

RADII = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
BINS = torch.linspace(-6, 0, 49)
FULL = {
    "mnist5k": [
        *("ce", "ce@1e-3", "ce@3e-3", "ce@1e-2", "ce@3e-2", "label_smoothing:0.1"),
        *("logit_variance:5", "logit_variance:5@3e-3", "logit_variance:50@1e-3", "kl:5", "kl:5@3e-3", "variance:5"),
        *("gce:0.333", "gce:0.333@1e-3"),
    ],
    "digits": [
        *("ce", "ce@1e-3", "ce@3e-3", "ce@1e-2"),
        *("logit_variance:1", "logit_variance:1@1e-3", "logit_variance:1@3e-3", "kl:5", "kl:5@1e-3", "gce:0.333", "gce:0.333@1e-3"),
        *("ce+at", "logit_variance:1+at"),
    ],
}
QUICK = {"digits": ["ce", "ce@1e-3", "logit_variance:1", "logit_variance:1@1e-3"]}


class Protocol(NamedTuple):
    """What the figures of a run depend on, beside its checkpoint."""

    eps: float
    limit: int
    effort: attack.Effort
    curve_limit: int


class Configuration(NamedTuple):
    """A training loss, a weight decay, and whether training is adversarial."""

    loss: str
    weight_decay: float
    adversarial: bool

    @classmethod
    def parse(cls, text: str) -> Configuration:
        plain = text.removesuffix("+at")
        loss, _, decay = plain.partition("@")
        losses.make(loss)
        try:
            return cls(loss, float(decay or 0), plain != text)
        except ValueError:
            raise SystemExit(f"configuration {text!r}: {decay!r} is no weight decay; write LOSS[@WEIGHT_DECAY][+at]") from None

    @property
    def label(self) -> str:
        name, _, number = self.loss.partition(":")
        name = {"ce": "CE", "gce": "GCE", "label_smoothing": "label smoothing"}.get(name, name)
        decay = f"+ wd {self.weight_decay:g}" if self.weight_decay else ""
        return " ".join(filter(None, (name, number, decay, "+ adversarial training" if self.adversarial else "")))

    @property
    def file(self) -> str:
        return f"{self.loss}@{self.weight_decay:g}{'+at' if self.adversarial else ''}".replace(":", "-")


def _ranking(score: Tensor, positive: Tensor) -> float | None:
    """Area under the ROC curve: the chance that a positive row scores above a negative one; None without both."""
    order = score.argsort()
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[order] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    p = int(positive.sum())
    n = len(score) - p
    return (float(rank[positive].sum()) - p * (p + 1) / 2) / (p * n) if p and n else None


def examine(net: nn.Module, x: Tensor, y: Tensor, protocol: Protocol, curve: bool) -> dict[str, Any]:
    """Every figure of one trained network."""
    effort, eps = protocol.effort, protocol.eps
    first = slice(protocol.limit)
    kept = attack.evaluate(net, x[first], y[first], eps, ("clean", "fgsm", "pgd", "strong"), effort, progress=True)
    accuracy = {name: float(rows.float().mean()) for name, rows in kept.items()}
    logits = attack.predict(net, x)
    accuracy["clean"] = float((logits.argmax(1) == y).float().mean())  # all test images: it costs nothing

    spread = functional.cross_entropy(logits, y, diversity="logit_variance", reduction="none", return_components=True).diversity
    correct = kept["clean"]
    survived, margin = kept["strong"][correct], -attack.margin(logits, y)[first][correct]
    log_q = logits.scatter(1, y.unsqueeze(1), -torch.inf).log_softmax(1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)
    counts = torch.histogram((log_q[others].cpu() / math.log(10)).clamp(float(BINS[0]), float(BINS[-1])), BINS).hist
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "diversity": float(spread.mean()),
        "strong_rows": kept["strong"].int().tolist(),
        "median_margin": float(margin.median()),
        "auc_diversity": _ranking(-spread[first][correct].cpu(), survived.cpu()),
        "auc_margin": _ranking(margin.cpu(), survived.cpu()),
        "histogram": {"edges": BINS.tolist(), "counts": counts.tolist()} if curve else None,
        "curve": {"0": accuracy["clean"]} if curve else None,
    }
    if curve:
        few = effort._replace(apgd_steps=min(20, effort.apgd_steps))
        for radius in tqdm(RADII, "radii", leave=False):
            alive = attack.predict(net, x[: protocol.curve_limit]).argmax(1) == y[: protocol.curve_limit]
            for one in (attack.pgd, attack.margin_pgd, attack.apgd_targeted):
                alive = attack.survivors(net, x[: protocol.curve_limit], y[: protocol.curve_limit], one, radius, few, alive)
            result["curve"][f"{radius:g}"] = float(alive.float().mean())
    return result


class Run(NamedTuple):
    """One network of the report: trained, examined, and kept under ``stem``.pt and ``stem``.json."""

    images: data.Data
    configuration: Configuration
    recipe: train.Recipe
    stem: Path

    def file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def network(self, device: str) -> nn.Module:
        return checkpoint.network(checkpoint.load(self.file(".pt"), device), device)

    def record(self, protocol: Protocol, device: str) -> dict[str, Any]:
        """Its figures: read where an earlier call with the same options wrote them, else measured now."""
        backend = backends.default(torch.device(device))
        identity = json.loads(json.dumps({"recipe": self.recipe.__dict__, "protocol": protocol, "backend": backend}))
        if self.file(".json").is_file():
            try:
                record = json.loads(self.file(".json").read_text())
            except ValueError:
                record = {}  # cut off while it was written
            if record.get("identity") == identity:
                return record
        begin = time.process_time()
        trainer = train.train(self.recipe, self.file(".pt"), device=device)
        x, y = self.images.x_test.to(device), self.images.y_test.to(device)
        record = {
            "identity": identity,
            "data": self.images.name,
            "label": self.configuration.label,
            **self.configuration._asdict(),
            "seed": self.recipe.seed,
            "commit": _commit(),
            "backend": backend,
            "train_ms_per_step": 1e3 * trainer.seconds / trainer.steps,
            **examine(self.network(device), x, y, protocol, curve=self.recipe.seed == 0),
        }
        record["cpu_seconds"] = time.process_time() - begin
        self.file(".json").write_text(json.dumps(record))
        return record


def _spread(values: Sequence[float], scale: float = 100) -> str:
    mean = scale * statistics.fmean(values)
    return f"{mean:.1f} ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _by_label(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in runs:
        grouped.setdefault(record["label"], []).append(record)
    return grouped


def accuracy_table(runs: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, one row a configuration."""
    lines = [
        "| training | clean | FGSM | PGD-20 | strong | diversity | survival from low diversity, AUC | from margin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, mine in _by_label(runs).items():
        cells = [_spread([record["accuracy"][name] for record in mine]) for name in ("clean", "fgsm", "pgd", "strong")]
        ranks = [[record[name] for record in mine if record[name] is not None] for name in ("auc_diversity", "auc_margin")]
        cells += [f"{statistics.fmean(record['diversity'] for record in mine):.2g}"]
        cells += [f"{statistics.fmean(values):.2f}" if values else "" for values in ranks]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _strong(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(record["accuracy"]["strong"] for record in runs)


def contest(runs: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The labels of plain cross-entropy and those of the penalties, whatever the weight decay, best strong accuracy first."""
    grouped = {label: mine for label, mine in _by_label(runs).items() if not mine[0]["adversarial"]}
    ranked = sorted(grouped, key=lambda label: _strong(grouped[label]), reverse=True)
    plain = [label for label in ranked if grouped[label][0]["loss"] == "ce"]
    return plain, [label for label in ranked if grouped[label][0]["loss"].partition(":")[0] in losses.PENALTIES]


def correlation(runs: list[dict[str, Any]]) -> str:
    """Does a network's low diversity go with its survival, over all networks, and among those of like diversity?"""
    groups = {
        f"all {len(runs)} networks": runs,
        "those of a diversity below 1": [record for record in runs if record["diversity"] < 1],
        "those above": [record for record in runs if record["diversity"] >= 1],
    }
    parts = []
    for name, mine in groups.items():
        if len(mine) > 2:
            rank = spearmanr([record["diversity"] for record in mine], [record["accuracy"]["strong"] for record in mine]).statistic
            parts.append(f"{rank:.2f} over {name}" + ("" if mine is runs else f" ({len(mine)})"))
    return f"Rank correlation (Spearman) of a network's diversity with its strong accuracy: {', '.join(parts)}." if parts else ""


def verdict(runs: list[dict[str, Any]]) -> str:
    """Each penalty against the best of the weight-decayed controls, seed by seed."""
    plain, penalised = contest(runs)
    if not plain or not penalised:
        return ""
    grouped = _by_label(runs)
    lines = [f"Against the best control, {plain[0]}, seed by seed:\n"]
    for label in penalised:
        pairs = [(mine, control) for mine in grouped[label] for control in grouped[plain[0]] if mine["seed"] == control["seed"]]
        strong, clean = ([m["accuracy"][name] - c["accuracy"][name] for m, c in pairs] for name in ("strong", "clean"))
        lines.append(f"- {label}: {_spread(strong)} points of strong accuracy, {_spread(clean)} of clean accuracy")
    return "\n".join(lines)


def autoattack_table(runs: list[dict[str, Any]], networks: dict[str, nn.Module], images: data.Data, protocol: Protocol, limit: int) -> str:
    """AutoAttack at its published strength against this report's ``strong``, on the contest's two finalists of seed 0."""
    plain, penalised = contest(runs)
    if not limit:
        return ""
    part = slice(min(limit, protocol.limit))
    lines = [
        f"AutoAttack at its published strength, seed 0, the first {len(images.y_test[part])} test images:\n",
        "| training | strong | AutoAttack |",
        "|---|---|---|",
    ]
    for label in plain[:1] + penalised[:1]:
        strong = next(record["strong_rows"] for record in runs if record["label"] == label and record["seed"] == 0)[part]
        device = next(networks[label].parameters()).device
        x, y = images.x_test[part].to(device), images.y_test[part].to(device)
        kept = attack.evaluate(networks[label], x, y, protocol.eps, ("autoattack",))["autoattack"]
        lines.append(f"| {label} | {100 * statistics.fmean(strong):.1f} | {100 * float(kept.float().mean()):.1f} |")
    return "\n".join(lines)


def _commit() -> str:
    """Of the checkout that this file is in; ``+`` where it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, two losses with and without weight decay, small attacks")
    parser.add_argument("--data", nargs="+", help="data sets (default: mnist5k digits; --quick: digits)")
    parser.add_argument("--configurations", nargs="+", metavar="LOSS[@WD][+at]", help="instead of the data set's default list")
    parser.add_argument("--seeds", type=arguments.positive, help="seeds 0 to SEEDS - 1 (default 4; --quick: 3)")
    parser.add_argument("--epochs", type=arguments.positive, default=20)
    parser.add_argument("--model", default="cnn", choices=models.NAMES)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--limit", type=arguments.positive, help="attack the first so many test images (default 300; --quick: 200)")
    parser.add_argument("--apgd-steps", type=arguments.positive, help="(default 50; --quick: 20; published: 100)")
    parser.add_argument("--queries", type=arguments.positive, help="of Square (default 500; --quick: 200; published: 5000)")
    parser.add_argument("--check", type=int, help="AutoAttack at published strength on so many images, seed 0 (default 100; --quick: 0)")
    parser.add_argument("--rounds", type=arguments.positive, default=100, help="steps to time for the loss's share (default 100)")
    parser.add_argument("--threads", type=arguments.positive, help="CPU threads (default: 1 for the CNN, else PyTorch's choice)")
    parser.add_argument("--device", type=arguments.device, default=arguments.default_device())
    parser.add_argument("--out", type=Path, default=Path("results/report"), help="folder to write, and to go on from")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _arguments()
    args = parser.parse_args(argv)
    preset = {"seeds": 3, "limit": 200, "apgd_steps": 20, "queries": 200, "check": 0} if args.quick else {}
    full = {"seeds": 4, "limit": 300, "apgd_steps": 50, "queries": 500, "check": 100}
    chosen = {name: getattr(args, name) if getattr(args, name) is not None else preset.get(name, full[name]) for name in full}
    effort = attack.Effort(apgd_steps=chosen["apgd_steps"], queries=chosen["queries"])
    protocol = Protocol(args.eps, chosen["limit"], effort, 100 if args.quick else 200)
    lists = QUICK if args.quick else FULL
    if args.threads is None and args.model == "cnn":
        args.threads = 1  # on nets this small a second thread waits more than it works
    if args.threads:
        torch.set_num_threads(args.threads)
    attack.require_library()
    plan = []
    for name in args.data or list(lists):
        images = data.load(name)
        for seed in range(chosen["seeds"]):
            for text in args.configurations or lists.get(name, FULL["mnist5k"]):
                one = Configuration.parse(text)
                recipe = train.Recipe(
                    images.name,
                    args.model,
                    one.loss,
                    one.weight_decay,
                    args.epochs,
                    adversarial_eps=args.eps if one.adversarial else 0.0,
                    seed=seed,
                )
                plan.append(Run(images, one, recipe, args.out / Path(name).stem / f"{one.file}-seed{seed}"))
    runs = [run.record(protocol, args.device) for run in tqdm(plan, "report")]
    write(args.out, plan, runs, protocol, chosen["check"], args)


def write(out: Path, plan: list[Run], runs: list[dict[str, Any]], protocol: Protocol, check: int, args: argparse.Namespace) -> None:
    """report.md, report.json and the figures; the table goes to the terminal too."""
    text = ["# Robustness report"]
    extra: dict[str, Any] = {}
    for name in dict.fromkeys(record["data"] for record in runs):
        mine = [record for record in runs if record["data"] == name]
        seeds = len({record["seed"] for record in mine})
        images = next(run.images for run in plan if run.images.name == name)
        networks = {run.configuration.label: run.network(args.device) for run in plan if run.images is images and run.recipe.seed == 0}
        figure = f"{Path(name).stem}.png"
        plots.draw(out / figure, f"{name}, {args.model}", mine, protocol.eps)
        text += [
            f"## {name}",
            (
                f"{len(images.y_train)} training images, {args.epochs} epochs, {seeds} seeds (mean ± standard deviation), in %. "
                f"L∞ ε = {protocol.eps:g}. Clean: all {len(images.y_test)} test images; attacks: the first "
                f"{min(protocol.limit, len(images.y_test))}. Strong: worst case over PGD-20, margin-PGD-20, APGD-CE and targeted APGD of "
                f"{protocol.effort.apgd_steps} steps, and Square of {protocol.effort.queries} queries. Diversity: mean variance of the "
                "non-true logits, clean images. AUC: the chance that of two correct test images the one that survives has the lower "
                "diversity (the larger margin)."
            ),
            accuracy_table(mine),
            verdict(mine),
            correlation(mine),
            autoattack_table(mine, networks, images, protocol, check),
            f"![{name}]({figure})",
        ]
        label, net = next(iter(networks.items()))
        x, y = images.x_test[: protocol.curve_limit].to(args.device), images.y_test[: protocol.curve_limit].to(args.device)
        stalled = attack.stall(net, x, y, protocol.eps, effort=protocol.effort)
        fresh = models.build(args.model, images.shape, images.classes).to(args.device)
        batch = train.Recipe().batch
        timed = overhead.measure(fresh, images.x_train[:batch].to(args.device), images.y_train[:batch].to(args.device), args.rounds)
        extra[name] = {"stall": stalled, "overhead": timed}
        text += [
            f"Attacks on the {label} net, the same classifier with its logits multiplied; accuracy on the first {len(y)} images:",
            attack.stall_table(stalled),
            f"A training step, batch {batch}:",
            overhead.table(timed),
        ]
    where = f"{_processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.device}"
    made = ", ".join(sorted({f"{record['commit']} ({record['backend']} kernels)" for record in runs}))
    minutes = sum(record["cpu_seconds"] for record in runs) / 60
    text.append(f"Training and attacks of the {len(runs)} networks took {minutes:.0f} CPU minutes ({where}), at commit {made}.")
    report = "\n\n".join(part for part in text if part)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report + "\n")
    for record in runs:
        del record["identity"], record["strong_rows"]
    summary = {
        "protocol": {**protocol._asdict(), "effort": protocol.effort._asdict()},
        "where": where,
        **extra,
        "runs": runs,
    }
    (out / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(report)
    print(f"\n{out / 'report.md'}, report.json and the figures are written.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from there") from None
