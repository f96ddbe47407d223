"""The forms a target comes in, one of each for the tests that hold for all."""

from __future__ import annotations

from typing import Any

import torch

FORMS = ("index",)


def target_of(form: str, rows: int, classes: int, dtype: torch.dtype = torch.float32) -> Any:
    """A target of ``form`` for ``(rows, classes)`` logits; weights and probabilities in ``dtype``."""
    return torch.randint(classes, (rows,))
