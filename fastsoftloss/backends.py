"""Which backends there are, which one serves a tensor, and why one is missing."""

from __future__ import annotations

import importlib
import os

import torch

from fastsoftloss import ops

NAMES = ("cpu", "cuda", "triton", "reference")
_override = os.environ.get("FASTSOFTLOSS_BACKEND") or None

_ready: dict[str, ops.Operators] = {}
_missing: dict[str, str] = {}


def _load_cpu() -> None:
    operators = ops.define("cross_entropy")
    try:
        importlib.import_module("fastsoftloss._C")
    except ImportError as error:
        _missing["cpu"] = (
            f"the C++ kernel is not built ({error}); install g++ and run "
            "`pip install --force-reinstall --no-deps --no-build-isolation .` in the source tree"
        )
    else:
        _ready["cpu"] = operators


def _load_triton() -> None:
    try:
        backend = importlib.import_module("fastsoftloss.triton_backend")
    except ImportError as error:
        _missing["triton"] = f"the package triton cannot be imported ({error}); `pip install triton` (3.5 or later)"
    else:
        _ready["triton"] = backend.define()


_load_cpu()
_load_triton()
_missing["cuda"] = "the C++/CUDA kernels are not part of this version; use backend='reference' on a GPU"


def missing() -> dict[str, str]:
    """The backends that cannot run here: name to reason and remedy."""
    return dict(_missing)


def choose(name: str | None, device: torch.device) -> ops.Operators | None:
    """The operators that serve ``device``, or None for the reference.

    Raises ValueError for an unknown name or one that does not serve the device, RuntimeError for one that is not built.
    """
    name = _override or name
    if name is None:
        return _ready.get({"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference"))
    if name == "reference":
        return None
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name not in _ready:
        raise RuntimeError(f"backend={name!r} is not available: {_missing[name]}")
    if name == "triton":
        if device.type == "cpu" and not importlib.import_module("fastsoftloss.triton_backend").runs_on_cpu():
            raise ValueError("backend='triton' serves GPU tensors, or CPU tensors under TRITON_INTERPRET=1; logits are on cpu")
        return _ready[name]
    if name != device.type:
        raise ValueError(f"backend={name!r} serves tensors on its own device, and logits are on {device}")
    return _ready[name]
