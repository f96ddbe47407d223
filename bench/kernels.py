"""What the GPU kernels do, without a GPU: ours beside the peers, over classes and dtype. Registers, spills, shared memory, access
widths; and, simulated, traffic, instructions and accuracy.

    PTXSIM=FOLDER python bench/kernels.py                      # writes bench/kernels/kernels.{json,md,png}: minutes
    python bench/kernels.py --families ours --dtypes bfloat16  # anew; all else stays as it was saved

PTXSIM names the folder of ptxsim, which executes the compiled PTX (sm_80) on the CPU; without it the columns of the compiler remain.
torch.compile's kernels need a CUDA build of torch; Liger and flash-attn appear where they are installed.

Columns: *launches* of the phase and the *kernel* that moves the most, with its threads a program, registers, spilled bytes a thread and
bytes of shared memory (cuobjdump); bytes a load and a store in most of its traffic; *bytes* in 32-byte sectors over the minimum (logits
and targets read once, and the gradient written once in backward and both); PTX instructions and special functions (exp2, log2, 1/x,
...) a logit; and the share of a GPU's limit, the minimum bytes at the datasheet's bandwidth, that a model of three floors (memory,
issue slots, special functions; roofline.py of ptxsim) leaves. No figure here is a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import inductor
import offline
import torch
from torch import Tensor
from tqdm import tqdm

from fastsoftloss import reference

CLASSES = (10, 100, 1000, 1003, 4096, 32000, 128256)
DTYPES = ("bfloat16", "float16", "float32")
PHASES = ("forward", "backward", "both")
OURS = {"ours": "ours_ce", "cuda": "cuda_ce"}  # with the penalty: the same without
REGIMES = ("ordinary", "confident")
GAP = 25.0  # of a confident row's true logit over all others
EVIDENCE = (
    "Compiled for sm_80 and simulated: PTX executed on the CPU, every read taken to miss the caches. "
    "Shares of a GPU's limit are a model from datasheet rates. No GPU was used and nothing here is a time."
)


def rows_of(classes: int, family: str) -> int:
    """Enough logits for what a launch costs anyway to fade. Ours share programs between rows, as the peers with one program a row
    do not, so it takes ours more rows until every program has its work."""
    if classes <= 100:
        return 4096 if family in (*OURS, *OURS.values()) else 2048
    return max(8, 600_000 // classes)


def few(classes: int) -> int:
    """Enough for errors alone."""
    return min(64, max(8, 600_000 // classes))


def batch(rows: int, classes: int, dtype: str, regime: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    if regime == "confident":
        logits.scatter_(1, target.unsqueeze(1), logits.amax(1, keepdim=True) + GAP)
    return logits.to(getattr(torch, dtype)), target


def errors(result: families.Result, logits: Tensor, target: Tensor, diversity_weight: float | None) -> dict[str, Any]:
    """Relative error of the loss, and of the gradient (the worst element over its row's largest), against float64."""
    z = logits.double().requires_grad_()
    diversity = None if diversity_weight is None else "logit_variance"
    loss = reference.cross_entropy(z, target, diversity=diversity, diversity_weight=diversity_weight or 0.0)[0]
    (gradient,) = torch.autograd.grad(loss, z)
    far = (result.gradient.double() - gradient).abs().amax(1) / gradient.abs().amax(1)
    return {
        "loss": result.loss.double().item(),
        "true_loss": loss.item(),
        "loss_dtype": str(result.loss.dtype).removeprefix("torch."),
        "loss_error": abs(result.loss.double() / loss - 1).item(),
        "gradient_error": far.max().item(),
    }


def measure(classes: Sequence[int], dtypes: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    launches = offline.record()
    there, missing = {}, {}
    for name, family in ((name, families.FAMILIES[name]) for name in names):
        reason = family.missing()
        if reason:
            missing[name] = f"{family.label}: {reason}"
        else:
            there[name] = (family, family.make(launches))
    print("\n".join(missing.values()), file=sys.stderr)
    figures, accuracy = [], []
    cases = [(k, dtype, name) for dtype in dtypes for k in classes for name in there]
    generated = [case for case in cases if case[2].startswith("inductor")]
    inductor.prefetch((rows_of(k, name), k, dtype, name.removeprefix("inductor_")) for k, dtype, name in generated)
    for k, dtype, name in (progress := tqdm(cases, leave=False)):
        family, run = there[name]
        progress.set_description(f"{family.label}, {k} classes, {dtype}")
        about = {"family": name, "label": family.label, "penalty": family.diversity_weight is not None, "dtype": dtype, "classes": k}
        for regime in REGIMES if offline.simulated() else REGIMES[:1]:
            rows = rows_of(k, name) if regime == "ordinary" or name.startswith("inductor") else few(k)  # generated code is of one size
            logits, target = batch(rows, k, dtype, regime)
            result = run(logits, target)
            launches.clear()
            if offline.simulated():
                accuracy.append(about | {"rows": rows, "regime": regime} | errors(result, logits, target, family.diversity_weight))
            for phase in PHASES if regime == "ordinary" else ():
                if phase not in result.phases:
                    continue
                minimum = logits.nbytes * (1 if phase == "forward" else 2) + target.nbytes
                row = about | {"rows": rows, "phase": phase} | offline.columns(result.phases[phase], logits.numel(), minimum)
                figures.append(row | ({"plan": family.plan(logits)} if family.plan else {}))
    for name, (label, weight, run) in families.CPU.items():
        for k, dtype, regime in ((k, dtype, regime) for k in classes for dtype in dtypes for regime in REGIMES):
            rows = rows_of(k, name) if regime == "ordinary" else few(k)
            logits, target = batch(rows, k, dtype, regime)
            about = {"family": name, "label": label, "penalty": weight is not None, "dtype": dtype, "classes": k, "rows": rows}
            accuracy.append(about | {"regime": regime} | errors(run(logits, target), logits, target, weight))
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"evidence": EVIDENCE, "versions": versions, "missing": missing, "kernels": figures, "accuracy": accuracy}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, and what ``old`` has of families, dtypes and classes that ``new`` did not measure."""
    families_ = list(families.FAMILIES) + list(families.CPU)
    result = dict(new)
    result["versions"] = {
        name: ", ".join(sorted({*old.get("versions", {}).get(name, version).split(", "), version}))
        for name, version in new.get("versions", {}).items()
    }
    for part in ("kernels", "accuracy"):
        measured = {(row["family"], row["dtype"], row["classes"]) for row in new[part]}
        rows = new[part] + [row for row in old[part] if (row["family"], row["dtype"], row["classes"]) not in measured]
        result[part] = sorted(rows, key=lambda row: (DTYPES.index(row["dtype"]), row["classes"], families_.index(row["family"])))
    there = {row["family"] for row in result["kernels"]}
    result["missing"] = {name: reason for name, reason in (old["missing"] | new["missing"]).items() if name not in there}
    return result


# ---------------------------------------------------------------- tables


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def kernel_table(figures: list[dict[str, Any]]) -> str:
    lines = [
        "| classes | kernels of | kernel | launches | threads | registers | spilled | shared | load / store, bytes | bytes / minimum | "
        "instructions | special | A100 | H100 | B200 |",
        "|---" * 15 + "|",
    ]
    for row in figures:
        cells = [row["classes"], row["label"], f"`{row['kernel']}`", *(row[c] for c in ("launches", "threads", "registers", "spilled"))]
        cells += [row["shared"], f"{row['load']} / {row['store']}"]
        if "instructions" in row:
            cells += [f"{row['bytes_over_minimum']:.2f}", number(row["instructions"]), f"{row['special']:.2f}"]
            cells += [f"{row[gpu]['share']:.0%} {row[gpu]['limiter']}" for gpu in offline.GPUS]
        else:
            cells += ["-"] * 6
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def accuracy_table(accuracy: list[dict[str, Any]]) -> str:
    lines = [
        "| classes | loss of | loss is | error of the loss | of the gradient | confident: of the loss | of the gradient |",
        "|---" * 7 + "|",
    ]
    found = {(a["classes"], a["family"], a["regime"]): a for a in accuracy}
    for (k, family, regime), one in sorted(found.items(), key=lambda item: item[0][0]):
        if regime == "ordinary":
            two = found[k, family, "confident"]
            figures = [one["loss_error"], one["gradient_error"], two["loss_error"], two["gradient_error"]]
            lines.append(f"| {k} | {one['label']} | {one['loss_dtype']} | " + " | ".join(f"{e:.1e}" for e in figures) + " |")
    return "\n".join(lines)


def losses(figures: list[dict[str, Any]]) -> list[str]:
    """A line for each peer that is below one of ours in bytes or instructions, by more than the last digit shown."""
    by_case = {(row["family"], row["dtype"], row["classes"], row["phase"]): row for row in figures if "instructions" in row}
    found = []
    for (family, *case), row in by_case.items():
        for with_penalty, without in OURS.items():
            ours, alike = by_case.get((with_penalty, *case)), by_case.get((without, *case))
            if ours is None or alike is None or family in (*OURS, *OURS.values()):
                continue
            for column, digit in (("bytes_over_minimum", 0.005), ("instructions", 0.05)):
                if row[column] < ours[column] - digit:
                    dtype, k, phase = case
                    found.append(
                        f"{dtype}, {k} classes, {phase}: {row['label']} {number(row[column])} {column.replace('_', ' ')}, "
                        f"{ours['label']} {number(ours[column])}"
                        + ("" if row["penalty"] else f", which without the penalty, as the peer, are {number(alike[column])}")
                    )
    return found


def markdown(report: dict[str, Any]) -> str:
    parts = ["# GPU kernels, without a GPU", report["evidence"], " ".join(f"{k} {v}." for k, v in report["versions"].items())]
    parts += [f"Not here: {reason}" for reason in report["missing"].values()]
    for dtype in dict.fromkeys(row["dtype"] for row in report["kernels"]):
        for phase in PHASES:
            mine = [row for row in report["kernels"] if (row["dtype"], row["phase"]) == (dtype, phase)]
            parts += [f"## {dtype}, {phase} (compiled; simulated; the shares of A100, H100 and B200 modelled)", kernel_table(mine)]
        mine = [a for a in report["accuracy"] if a["dtype"] == dtype]
        if mine:
            parts += [f"## {dtype}, errors against float64 on the same logits (simulated, and executed on the CPU)", accuracy_table(mine)]
    planned = {(row["dtype"], row["classes"]): row["plan"] for row in report["kernels"] if "plan" in row}
    if planned:
        fields = list(next(iter(planned.values())))
        lines = ["| | classes | " + " | ".join(fields) + " |", "|---" * (2 + len(fields)) + "|"]
        lines += ["| " + " | ".join(map(str, (*case, *plan.values()))) + " |" for case, plan in planned.items()]
        parts += ["## Launch plans of the Triton kernels: 4096 rows on 132 multiprocessors", "\n".join(lines)]
    below = losses(report["kernels"])
    parts += ["## Where a peer is below ours", "\n".join(f"* {line}" for line in below) if below else "Nowhere."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"), choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=list(families.FAMILIES), choices=list(families.FAMILIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "kernels", metavar="FOLDER")
    args = parser.parse_args()
    if not offline.simulated():
        print("PTXSIM does not name the folder of ptxsim: no traffic, instructions, accuracy and model", file=sys.stderr)
    saved = args.out / "kernels.json"
    report = measure(args.classes, args.dtypes, args.families)
    if saved.exists():
        report = merged(json.loads(saved.read_text()), report)
    text = markdown(report)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "kernels.md").write_text(text)
    if offline.simulated():
        import kernel_plots

        kernel_plots.draw(report, args.out / "kernels.png")


if __name__ == "__main__":
    main()
