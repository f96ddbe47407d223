"""The microbenchmark's plots: time over the number of classes, and the share of the limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import contenders
import matplotlib as mpl

mpl.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import microbench

SHOWN = [name for name in contenders.LABELS if name not in ("floor", "engine")]


def _largest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One case for each number of classes, the one with the most logits, in order."""
    by_classes: dict[int, dict[str, Any]] = {}
    for case in results:
        best = by_classes.setdefault(case["shape"][1], case)
        if case["logits_bytes"] > best["logits_bytes"]:
            by_classes[case["shape"][1]] = case
    return [by_classes[classes] for classes in sorted(by_classes)]


def draw(report: dict[str, Any], folder: Path) -> None:
    """speed-{dtype}.png: a row of plots for each number of threads."""
    machine = report["machine"]
    for dtype in dict.fromkeys(case["dtype"] for case in report["results"]):
        mine = [case for case in report["results"] if case["dtype"] == dtype]
        counts = list(dict.fromkeys(case["threads"] for case in mine))
        figure, axes = plt.subplots(len(counts), 2, figsize=(12, 0.8 + 3.6 * len(counts)), layout="constrained", squeeze=False)
        for (time_, share), threads in zip(axes, counts, strict=True):
            cases = _largest([case for case in mine if case["threads"] == threads])
            for name in SHOWN:
                there = [case for case in cases if name in case["contenders"]]
                if not there:
                    continue
                style = {"marker": "o", "markersize": 3, "label": contenders.LABELS[name], "linewidth": 2.2 if name == "ours" else 1.2}
                classes = [case["shape"][1] for case in there]
                logits = [math.prod(case["shape"]) for case in there]
                quartiles = [[1e9 * v / n for v in case["contenders"][name]["both"]] for case, n in zip(there, logits, strict=True)]
                (drawn,) = time_.plot(classes, [q[1] for q in quartiles], **style)
                time_.fill_between(classes, [q[0] for q in quartiles], [q[2] for q in quartiles], color=drawn.get_color(), alpha=0.2)
                share.plot(classes, [microbench.limit(case, name) for case in there], **style)
            where = f"threads: {threads}" if machine["device"] == "cpu" else machine["processor"]
            time_.set(xscale="log", yscale="log", xlabel="classes", ylabel="ns a logit", title=f"forward + backward, {dtype}, {where}")
            share.set(xscale="log", xlabel="classes", ylabel="share", ylim=(0, None), title="of the bandwidth of a copy, minimum bytes")
            share.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        sizes = ", ".join(microbench.size_of(case) for case in _largest(mine))
        figure.suptitle(f"{machine['processor']}, torch {machine['torch']}; {sizes}; bands are quartiles", fontsize=9)
        figure.savefig(folder / f"speed-{dtype}.png", dpi=80)
        plt.close(figure)
