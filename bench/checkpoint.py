"""Checkpoints: written whole or not at all, read with one clear line where they are damaged."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn

FORMAT = 1
KEYS = {"format", "recipe", "shape", "classes", "step", "model", "optimizer", "scaler", "running", "seconds", "log"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` beside ``path`` and move it there, so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state that :func:`save` wrote; SystemExit with one line if the file is missing, damaged or something else."""
    if not path.is_file():
        raise SystemExit(f"no checkpoint at {path}: train one with bench/train.py --out {path}")
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError(f"{damaged} fails its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damage surfaces as whatever the layer that met it raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SystemExit(f"{path} is a damaged checkpoint ({reason[:90]}): delete it and train again") from None
    if not isinstance(state, dict) or not state.keys() >= KEYS or state["format"] != FORMAT:
        raise SystemExit(f"{path} is not a checkpoint of this bench/train.py: delete it and train again, or give another file")
    return state


def network(state: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """The trained network of a checkpoint, in evaluation mode, its parameters frozen."""
    net = models.build(state["recipe"]["model"], tuple(state["shape"]), state["classes"]).to(device)
    net.load_state_dict(state["model"])
    return net.eval().requires_grad_(False)
