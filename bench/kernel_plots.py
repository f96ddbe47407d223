"""The plots of bench/kernels.py: instructions, bytes and the modelled share of a GPU's limit over the number of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen needed

import matplotlib.pyplot as plt


def draw(report: dict[str, Any], path: Path) -> None:
    rows = [row for row in report["kernels"] if row["phase"] == "both"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(len(dtypes), 3, figsize=(15, 0.9 + 3.8 * len(dtypes)), layout="constrained", squeeze=False)
    for (instructions, traffic, share), dtype in zip(axes, dtypes, strict=True):
        for family in dict.fromkeys(row["family"] for row in rows):
            mine = sorted((row for row in rows if (row["family"], row["dtype"]) == (family, dtype)), key=lambda row: row["classes"])
            if not mine:
                continue
            classes = [row["classes"] for row in mine]
            style = {"marker": "o", "markersize": 3, "linewidth": 2.2 if family == "ours" else 1.2}
            label = f"{mine[0]['label']}" + ("" if mine[0]["penalty"] or "no penalty" in mine[0]["label"] else ", no penalty")
            instructions.plot(classes, [row["instructions"] for row in mine], label=label, **style)
            traffic.plot(classes, [row["bytes_over_minimum"] for row in mine], **style)
            share.plot(classes, [100 * row["H100"]["share"] for row in mine], **style)
        instructions.set(yscale="log", ylabel="PTX instructions a logit", title=f"{dtype}, forward + backward: simulated")
        traffic.set(ylabel="bytes over the minimum", title="traffic: simulated", ylim=(0, 6))
        share.set(ylabel="% of the H100's memory limit", title="model from datasheet rates, no GPU time", ylim=(0, 105))
        for plot in (instructions, traffic, share):
            plot.set(xscale="log", xlabel="classes")
        traffic.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("PTX for sm_80 executed on the CPU (simulated) and a roofline model; no GPU was used", fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)
