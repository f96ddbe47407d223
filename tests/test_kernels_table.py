"""bench/kernels.py: what it says of a kernel, with the simulator and without, and that it names the rows where a peer is below ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import bench_path

import families  # isort: skip
import kernels  # isort: skip

COMPILED = {"launches", "kernel", "threads", "registers", "spilled", "shared", "load", "store", "plan"}
SIMULATED = {"bytes_over_minimum", "instructions", "special", "A100", "H100", "B200"}


def run(folder: Path, **environment: str) -> tuple[dict[str, Any], str, str]:
    """In a process of its own, since it takes Triton's driver."""
    command = [sys.executable, bench_path.BENCH / "kernels.py", "--classes", "10", "--dtypes", "bfloat16", "--out", folder]
    command += ["--families", "ours", "ours_ce"]  # the others take minutes to compile
    clean = {k: v for k, v in os.environ.items() if k not in ("PTXSIM", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "kernels.json").read_text()), (folder / "kernels.md").read_text(), done.stderr


def test_without_the_simulator_the_compilers_columns_remain(tmp_path: Path) -> None:
    report, text, messages = run(tmp_path)
    assert "PTXSIM does not name the folder of ptxsim" in messages
    mine = [row for row in report["kernels"] if row["family"] == "ours"]
    assert [row["phase"] for row in mine] == ["forward", "backward", "both"]
    for row in mine:
        assert set(row) >= COMPILED and not set(row) & SIMULATED
        assert row["spilled"] == 0 and row["registers"] > 16 and row["load"] == "<= 16"
    assert report["accuracy"] == [] or all("C++" in a["label"] or "CPU" in a["label"] for a in report["accuracy"])
    assert "No GPU was used" in text and "| 10 | fastsoftloss, Triton | `" in text


def test_with_the_simulator(tmp_path: Path) -> None:
    folder = os.environ.get("PTXSIM")
    if not folder:
        pytest.skip("the environment variable PTXSIM does not name a folder with ptxsim")
    report, text, _ = run(tmp_path, PTXSIM=folder)
    for row in report["kernels"]:
        assert set(row) >= SIMULATED
        assert row["bytes_over_minimum"] >= 1 and row["instructions"] > 1
        assert all(0 < row[gpu]["share"] <= 1 for gpu in ("A100", "H100", "B200"))
    ours = {a["regime"]: a for a in report["accuracy"] if a["family"] == "ours_ce"}
    torch_ = {a["regime"]: a for a in report["accuracy"] if a["family"] == "torch"}
    assert ours["ordinary"]["loss_error"] < 1e-5 and ours["confident"]["loss_error"] < 1e-5
    assert torch_["confident"]["loss_error"] > 0.1
    assert "simulated" in text and "modelled" in text
    assert (tmp_path / "kernels.png").stat().st_size < 250_000


def test_every_peer_that_is_below_ours_is_named() -> None:
    def row(family: str, traffic: float, instructions: float, penalty: bool = True) -> dict[str, Any]:
        about = {"family": family, "label": family, "penalty": penalty, "dtype": "bfloat16", "classes": 10, "phase": "both"}
        return about | {"bytes_over_minimum": traffic, "instructions": instructions}

    ours = [row("ours", 1.1, 50.0), row("ours_ce", 1.1, 40.0, False)]
    assert kernels.losses([*ours, row("peer", 1.1, 50.0), row("worse", 3.0, 90.0)]) == []
    (found,) = kernels.losses([*ours, row("peer", 1.1, 45.0, False)])
    assert found == "bfloat16, 10 classes, both: peer 45 instructions, ours 50, which without the penalty, as the peer, are 40"
    assert len(kernels.losses([*ours, row("peer", 1.0, 45.0)])) == 2


def test_errors_are_those_of_the_loss_and_the_gradient() -> None:
    logits, target = kernels.batch(8, 10, "float32", "confident")
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf).amax(1)
    torch.testing.assert_close(logits.gather(1, target.unsqueeze(1)).squeeze(1) - others, torch.full((8,), kernels.GAP))
    _, weight, run_torch = families.CPU["torch"]
    found = kernels.errors(run_torch(logits, target), logits, target, weight)
    assert found["loss"] == 0 and found["loss_error"] == 1 and found["true_loss"] > 0
    assert found["loss_dtype"] == "float32"


def test_families_measured_anew_replace_the_saved_ones() -> None:
    def part(*rows: tuple[str, int, int]) -> dict[str, Any]:
        rows_ = [{"family": family, "dtype": "bfloat16", "classes": k, "value": value} for family, k, value in rows]
        return {"kernels": rows_, "accuracy": rows_, "missing": {}}

    old = part(("ours", 10, 1), ("ours", 100, 1), ("liger", 10, 1)) | {"missing": {"flash": "why"}}
    old["versions"], versions = {"torch": "2.1"}, {"torch": "2.0"}
    merged = kernels.merged(old, part(("ours", 10, 2)) | {"missing": {"liger": "why"}, "versions": versions})
    assert merged["versions"] == {"torch": "2.0, 2.1"}  # what either was measured under
    assert kernels.merged(merged, part() | {"versions": versions})["versions"] == merged["versions"]
    assert [(r["family"], r["classes"], r["value"]) for r in merged["kernels"]] == [("ours", 10, 2), ("liger", 10, 1), ("ours", 100, 1)]
    assert merged["missing"] == {"flash": "why"}
