"""Types of command-line arguments that the scripts share; what does not fit ends in argparse's one line."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import torch


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def device(text: str) -> str:
    """A device that PyTorch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # CUDA's absence is an assertion
        raise ArgumentTypeError(f"{text!r} is not to be had here ({str(error).splitlines()[0]})") from None
    return text


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_checkpoint(text: str) -> Path:
    """Where a checkpoint may be written: the log goes beside it, to the same name with .csv."""
    path = Path(text)
    if path.suffix != ".pt" or path.is_dir():
        raise ArgumentTypeError(f"must be a file whose name ends in .pt, got {text!r}")
    return path
