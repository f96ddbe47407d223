"""The forms a target comes in, one of each for the tests that hold for all."""

from __future__ import annotations

from typing import Any

import torch

FORMS = ("index", "mixture", "probabilities")


def target_of(form: str, rows: int, classes: int, dtype: torch.dtype = torch.float32) -> Any:
    """A target of ``form`` for ``(rows, classes)`` logits; weights and probabilities in ``dtype``."""
    if form == "probabilities":
        return torch.randn(rows, classes, dtype=dtype).softmax(1)
    if form == "mixture":
        return torch.randint(classes, (rows,)), torch.randint(classes, (rows,)), torch.rand(rows, dtype=dtype)
    return torch.randint(classes, (rows,))
