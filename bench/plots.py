"""The report's figure: accuracy over eps, the softmax over the non-true classes, and diversity against survival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np


def draw(path: Path, title: str, runs: list[dict[str, Any]], eps: float) -> None:
    """``runs``: the report's records of one data set; ``label`` names a configuration, ``seed`` its repetition."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    colour = dict(zip(labels, plt.get_cmap("tab10" if len(labels) <= 10 else "tab20")(np.arange(len(labels)) % 20), strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for label in labels:
        mine = [run for run in runs if run["label"] == label]
        curved = [run for run in mine if run["curve"]]
        if curved:
            radii = sorted(curved[0]["curve"], key=float)
            left.plot(
                [float(r) for r in radii],
                [100 * np.mean([run["curve"][r] for run in curved]) for r in radii],
                "o-",
                markersize=3,
                color=colour[label],
                label=label,
            )
        right.scatter(
            [run["diversity"] for run in mine],
            [100 * run["accuracy"]["strong"] for run in mine],
            s=22,
            color=colour[label],
            label=label,
        )
    left.axvline(eps, color="0.7", linewidth=0.8, linestyle=":")
    left.set(xlabel="L∞ radius ε", ylabel="accuracy, %", title="worst of PGD, margin-PGD and targeted APGD, seed 0", ylim=(0, 100))
    left.legend(fontsize=7, frameon=False)

    for label in labels:
        shown = [run for run in runs if run["label"] == label and run["histogram"]]
        if not shown:
            continue
        edges = np.array(shown[0]["histogram"]["edges"])
        counts = np.sum([run["histogram"]["counts"] for run in shown], axis=0)
        middle.stairs(counts / counts.sum(), edges, color=colour[label], label=label, linewidth=1.4)
    middle.set(
        xlabel="log10 of the softmax over the non-true classes",
        ylabel="share of classes",
        title="the complement, clean test images, seed 0",
    )
    middle.legend(fontsize=7, frameon=False)

    right.set(
        xscale="log",
        xlabel="mean variance of the non-true logits",
        ylabel="accuracy under strong attacks, %",
        title=f"diversity against survival, one point a model, ε = {eps:g}",
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
