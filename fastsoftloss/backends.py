"""Which backends there are, which one serves a tensor, and why one is missing."""

from __future__ import annotations

import importlib
import os
import warnings

import torch

from fastsoftloss import ops

NAMES = ("cpu", "cuda", "triton", "reference")
_override = os.environ.get("FASTSOFTLOSS_BACKEND") or None

_ready: dict[str, ops.Operators] = {}
_missing: dict[str, str] = {}
_detail: dict[str, str] = {}
_warned: set[str] = set()


def _load_cpu() -> None:
    operators = ops.define("cross_entropy")
    try:
        kernels = importlib.import_module("fastsoftloss._C")
    except ImportError as error:
        _missing["cpu"] = (
            f"the C++ kernel is not built ({error}); install g++, then reinstall with `pip install --force-reinstall --no-deps .`"
        )
    else:
        _ready["cpu"] = operators
        _detail["cpu"] = f", {kernels.instruction_set()}"


_load_cpu()
_missing["cuda"] = "this version has no C++/CUDA kernels; the default on a GPU is the reference, in plain PyTorch"
_missing["triton"] = "this version has no Triton kernels; the default on a GPU is the reference, in plain PyTorch"


def missing() -> dict[str, str]:
    """The backends that cannot run here: name to reason and remedy."""
    return dict(_missing)


def detail(name: str) -> str:
    """What else there is to say of a backend that is built."""
    return _detail.get(name, "")


def serves(name: str, device: torch.device) -> bool:
    """Can the backend, if it is built, take tensors on this device?"""
    return name == "reference" or name == device.type


def default(device: torch.device) -> str:
    """The backend for tensors on ``device`` when none is named."""
    if device.type in _ready:
        return device.type
    if device.type in _missing and device.type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device.type)
        warnings.warn(f"fastsoftloss runs in plain PyTorch on {device.type}, several times slower: {_missing[device.type]}", stacklevel=4)
    return "reference"


def choose(name: str | None, device: torch.device) -> ops.Operators | None:
    """The operators that serve ``device``, or None for the reference.

    Raises ValueError for an unknown name or one that does not serve the device, RuntimeError for one that is not built.
    """
    name = _override or name or default(device)
    if name == "reference":
        return None
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name in _missing:
        raise RuntimeError(f"backend={name!r} is not available: {_missing[name]}")
    if not serves(name, device):
        raise ValueError(f"backend={name!r} does not serve tensors on {device}; it takes them on its own device")
    return _ready[name]
