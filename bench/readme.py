"""Write the README's section on speed from bench/speed/speed.json and bench/kernels/kernels.json.

    python bench/microbench.py --full --out bench/speed && python bench/kernels.py && python bench/readme.py

Every figure of the section is one of these files, losses as well as wins.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import contenders
import kernels
import microbench

HERE = Path(__file__).parent
BEGIN, END = "<!-- what follows is written by bench/readme.py -->\n", "<!-- end -->"
COMMAND = __doc__.splitlines()[2].strip()
PEERS = ("cross_entropy", "penalised", "compiled_cross_entropy", "compiled_penalised")


def _by_case(report: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(dtype, size) -> its cases, by threads."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in report["results"]:
        found.setdefault((case["dtype"], microbench.size_of(case)), []).append(case)
    return {key: sorted(cases, key=lambda case: case["threads"]) for key, cases in found.items()}


def _each(values: list[str]) -> str:
    return " / ".join("-" if value == "nan" else value for value in values)


def _size(case: dict[str, Any]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, case["shape"]))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def _over_ce(case: dict[str, Any], phase: str = "both") -> float:
    """NaN where either did not run."""
    return microbench.median(case, "ours", phase) / microbench.median(case, "cross_entropy", phase)


def speed_table(cases: dict[tuple[str, str], list[dict[str, Any]]], dtype: str) -> str:
    threads = sorted({case["threads"] for both in cases.values() for case in both})
    lines = [
        f"| {dtype} | ours, µs (threads: {' / '.join(map(str, threads))}) | ± % | over CE | over CE + penalty | over compiled CE "
        "| over compiled CE + penalty | evaluation, over CE | share of a copy's bandwidth | CE's |",
        "|---" * 10 + "|",
    ]
    for (kind, _), both in cases.items():
        if kind != dtype:
            continue
        quartiles = [case["contenders"]["ours"]["both"] for case in both]
        cells = [_size(both[0]), _each([_us(q[1]) for q in quartiles])]
        cells += [_each([f"{50 * (q[2] - q[0]) / q[1]:.0f}" for q in quartiles])]
        for peer in PEERS:
            cells.append(_each([f"{microbench.median(case, 'ours') / microbench.median(case, peer):.2f}" for case in both]))
        cells.append(_each([f"{_over_ce(case, 'evaluation'):.2f}" for case in both]))
        cells += [_each([f"{microbench.limit(case, name):.2f}" for case in both]) for name in ("ours", "cross_entropy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(report: dict[str, Any]) -> list[str]:
    machine, cases = report["machine"], _by_case(report)
    several = [case for both in cases.values() for case in both]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['kernels']}, torch {machine['torch']}"
    parts = [
        f"**Measured** on the CPU ({where}): forward and backward of `Loss()`, its penalty included. CE is `F.cross_entropy` without a "
        "penalty, the others compute ours too or are compiled by `torch.compile`. Medians; ± is half the distance of the quartiles. The "
        "bytes that must move are logits and targets read once and the gradient written once, their share that of a `copy_` of the same "
        "tensors in the same run."
    ]
    busy = [case for case in several if microbench.disturbed(case)]
    if busy:
        parts.append(
            f"The machine was **not quiet**: in {len(busy)} of {len(several)} cases other processes took a core from the benchmark "
            "more than 20 times a second. The contenders of a case are interleaved, so ratios suffer less than times."
        )
    parts += [speed_table(cases, dtype) for dtype in dict.fromkeys(dtype for dtype, _ in cases)]
    lost = [case for case in several if _over_ce(case) > 1]
    named = ", ".join(f"{_size(case)} {case['dtype']} {case['threads']} ({_over_ce(case):.2f})" for case in lost)
    parts.append(
        f"`Loss()` takes less time than `F.cross_entropy` without a penalty in {len(several) - len(lost)} of {len(several)} cases"
        + (f", and **more** in {len(lost)} (size, number of threads, ratio): {named}." if lost else ".")
    )
    for case in several:
        if math.prod(case["shape"]) == case["shape"][1] and case["dtype"] == "float32" and "engine" in case["contenders"]:
            us = {name: _us(microbench.median(case, name)) for name in contenders.LABELS if name in case["contenders"]}
            ours = [_us(microbench.median(case, "ours", phase)) for phase in ("evaluation", "forward", "backward")]
            parts.append(
                f"What a call costs before there is anything to compute ({_size(case)}, threads: {case['threads']}): ours {us['ours']} µs "
                f"(forward {ours[1]}, or {ours[0]} where nothing is differentiated, backward {ours[2]}), `F.cross_entropy` "
                f"{us['cross_entropy']}; an autograd Function in Python that computes nothing {us['floor']}, of which the Python in "
                f"`Tensor.backward`, which each of them pays, is {int(us['floor']) - int(us['engine'])}. Below some ten thousand "
                "logits this is what the table shows."
            )
    largest = max(several, key=lambda case: case["logits_bytes"])
    memory = {name: c["peak_bytes"] / largest["logits_bytes"] for name, c in largest["contenders"].items()}
    parts.append(
        f"Memory beyond the inputs at {_size(largest)} {largest['dtype']}, in sizes of the logits: "
        + ", ".join(f"{label} {memory[name]:.1f}" for name, label in contenders.LABELS.items() if name in memory and name != "engine")
        + "."
    )
    parts += [f"![time and share of the limit over the classes, {dtype}](bench/speed/speed-{dtype}.png)" for dtype in ("float32",)]
    return parts


def gpu_table(figures: list[dict[str, Any]], dtype: str) -> str:
    mine = [row for row in figures if row["phase"] == "both" and row["dtype"] == dtype and "instructions" in row]
    labels = {row["family"]: row["label"] for row in mine}
    found = {(row["classes"], row["family"]): row for row in mine}
    lines = ["| classes | " + " | ".join(labels.values()) + " |", "|---" * (1 + len(labels)) + "|"]
    for k in dict.fromkeys(row["classes"] for row in mine):
        cells = []
        for family in labels:
            row = found.get((k, family))
            cells.append(
                f"{row['bytes_over_minimum']:.2f} · {kernels.number(row['instructions'])} · {row['H100']['share']:.0%}" if row else "-"
            )
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_accuracy(accuracy: list[dict[str, Any]], dtype: str, classes: int) -> str:
    mine = {(a["label"], a["regime"]): a for a in accuracy if a["dtype"] == dtype and a["classes"] == classes}
    lines = ["| loss of | its dtype | loss | gradient | confident: loss | gradient |", "|---" * 6 + "|"]
    for (label, regime), a in mine.items():
        if regime == "ordinary":
            b = mine[label, "confident"]
            errors = [a["loss_error"], a["gradient_error"], b["loss_error"], b["gradient_error"]]
            lines.append(f"| {label} | {a['loss_dtype']} | " + " | ".join(f"{e:.0e}" for e in errors) + " |")
    return "\n".join(lines)


def gpu(report: dict[str, Any]) -> list[str]:
    figures = report["kernels"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    below = kernels.losses([row for row in figures if row["phase"] == "both"])
    spilled = max(row["spilled"] for row in figures if row["family"].startswith(("ours", "cuda")))
    largest = max(row["classes"] for row in figures)
    parts = [
        "**Simulated and modelled, not measured**: the GPU kernels. There was no GPU, so no time is given. What follows is PTX for sm_80 "
        f"executed on the CPU, one step of training in bfloat16 ({versions}). Each cell: bytes moved over the minimum · PTX instructions "
        "a logit · share of an H100's memory limit in a model from datasheet rates. All kernels and phases, A100 and B200, "
        f"registers (ours spill {spilled} bytes) and access widths are in [bench/kernels/kernels.md](bench/kernels/kernels.md). "
        "A dash was not run.",
        gpu_table(figures, "bfloat16"),
        "Liger, flash-attn and *torch.compile, CE* compute no penalty. "
        + ("In these figures peers are below ours here:" if below else "No peer is below ours in bytes or instructions of a whole step."),
    ]
    parts += ["\n".join(f"* {line}" for line in below)] if below else []
    parts += [
        f"Relative errors against float64 on the same logits, bfloat16, {largest} classes (simulated; the CPU's own). The gradient's "
        "is the worst element over its row's largest, and half a unit in bfloat16's last place is 2e-03 to 4e-03. *Confident*: the true "
        f"logit {kernels.GAP:g} above all others; an error of 1e+00 is a loss, or a gradient, of 0.",
        gpu_accuracy(report["accuracy"], "bfloat16", largest),
        "![instructions, bytes and the modelled share of the limit over the classes](bench/kernels/kernels.png)",
    ]
    return parts


def _wrapped(part: str) -> str:
    """Prose in the README's width; tables, lists and pictures as they are."""
    if part.startswith(("|", "!", "* ")):
        return part
    return "\n".join(textwrap.wrap(part, 140, break_long_words=False, break_on_hyphens=False))


def section(speed_report: dict[str, Any], kernel_report: dict[str, Any]) -> str:
    parts = [f"`{COMMAND}` makes this section.", *speed(speed_report), *gpu(kernel_report)]
    return "\n\n".join(map(_wrapped, parts)) + "\n\n"


def read() -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((HERE / "speed/speed.json").read_text()), json.loads((HERE / "kernels/kernels.json").read_text())


def replace(text: str, new: str) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n" + new + END + after


if __name__ == "__main__":
    readme = HERE.parent / "README.md"
    readme.write_text(replace(readme.read_text(), section(*read())))
