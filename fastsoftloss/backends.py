"""Which backends there are, which one serves a tensor, and why one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastsoftloss import cuda_backend, ops, triton_plan

NAMES = ("cpu", "cuda", "triton", "reference")
_DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device, the best first
devices = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}  # by backend, all that it serves
_override = os.environ.get("FASTSOFTLOSS_BACKEND") or None

_ready: dict[str, ops.Operators] = {}
_missing: dict[str, str] = {}
_detail: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()  # (device, form)


def _eager() -> Callable[..., Any] | None:
    """csrc/autograd.cpp, where it was built for this very torch and this Python."""
    version = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    try:
        return importlib.import_module(f"fastsoftloss._autograd_{version}").cross_entropy  # type: ignore[no-any-return]
    except ImportError:
        return None


def _load_cpu() -> None:
    operators = ops.define("cross_entropy", forms=ops.FORMS, double_backward=ops.define_double_backward("cross_entropy"))
    try:
        kernels = importlib.import_module("fastsoftloss._C")
    except ImportError as error:
        remedy = "install g++, then `pip install --force-reinstall --no-deps .` in the source tree"
        _missing["cpu"] = f"the C++ kernel is not built ({error}); {remedy}"
    else:
        _ready["cpu"] = operators._replace(eager=_eager())
        _detail["cpu"] = f", {kernels.instruction_set()}, autograd in {'Python' if _ready['cpu'].eager is None else 'C++'}"


def enable_cuda() -> None:
    """The operators' kernels are registered."""
    _ready["cuda"] = _cuda
    _missing.pop("cuda", None)


def _load_cuda() -> None:
    try:
        importlib.import_module("fastsoftloss._C_cuda")
    except ImportError as error:
        remedy = "install the CUDA toolkit's nvcc, then `pip install --force-reinstall --no-deps --no-build-isolation .` in the source tree"
        _missing["cuda"] = f"the CUDA kernels are not built ({error}); {remedy}, or use backend='triton'"
    else:
        enable_cuda()


def _load_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        _missing["triton"] = "the package triton is not installed; `pip install 'triton>=3.5'`"
        return

    def later(function: str) -> Callable[..., Any]:  # importing triton takes longer than all the rest, and not every process needs it
        return lambda *args: getattr(importlib.import_module("fastsoftloss.triton_backend"), function)(*args)

    second = ops.define_double_backward("triton_cross_entropy")
    _ready["triton"] = ops.define("triton_cross_entropy", later("rescale"), triton_plan.outputs, ops.FORMS, second)
    ops.implement("triton_cross_entropy", later("forward"), ("CUDA", "CPU"))
    ops.implement("triton_cross_entropy_backward", later("backward"), ("CUDA", "CPU"))
    ops.implement("triton_cross_entropy_double_backward", later("double_backward"), ("CUDA", "CPU"))


_load_cpu()
_load_triton()
_cuda = ops.define(
    "cuda_cross_entropy",
    cuda_backend.rescale,
    cuda_backend.outputs,
    tuple(cuda_backend.KEPT),
    _ready["triton"].double_backward if "triton" in _ready else None,  # CUDA tensors of either backend
)
ops.define_rescale("cuda_cross_entropy")
_load_cuda()

# what is chosen where nobody asks for a backend, known beforehand
quick = None if _override or "cpu" not in _ready else _ready["cpu"].eager
_best = {} if _override else {device: _ready[names[0]] for device, names in _DEFAULTS.items() if names[0] in _ready}


def missing() -> dict[str, str]:
    """The backends that cannot run here: name to reason and remedy."""
    return dict(_missing)


def detail(name: str) -> str:
    """What else there is to say of a backend that is built."""
    return _detail.get(name, "")


def serves(name: str, device: torch.device) -> bool:
    """Can the backend, if it is there, take tensors on this device? Triton takes those on the CPU in its interpreter."""
    if name == "triton" and device.type == "cpu":
        if torch.compiler.is_compiling():  # asking would break the graph; the operator finds out when it runs
            return True
        return bool(importlib.import_module("fastsoftloss.triton_backend").runs_on_cpu())
    return name == "reference" or device.type in devices[name]


def default(device: torch.device, form: str = "index") -> str:
    """The backend for tensors on ``device`` and a target of this form when none is named."""
    names = _DEFAULTS.get(device.type, ())
    for name in names:
        if name in _ready and form in _ready[name].forms:
            return name
    if names and (device.type, form) not in _warned and not torch.compiler.is_compiling():
        _warned.add((device.type, form))
        reasons = "; ".join(f"{name}: {_missing.get(name, 'it has no kernel for this form')}" for name in names)
        where = f"on {device.type} for a target of the form {form!r}"
        warnings.warn(f"fastsoftloss runs in plain PyTorch {where}, several times slower. {reasons}", stacklevel=4)
    return "reference"


def choose(name: str | None, device: torch.device, form: str = "index") -> ops.Operators | None:
    """The operators that serve ``device`` and targets of this form, or None for the reference.

    Raises ValueError for an unknown name or one that does not serve the device, RuntimeError for one that is not built.
    """
    if name is None and (best := _best.get(device.type)) and form in best.forms:
        return best
    name = _override or name or default(device, form)
    if name == "reference":
        return None
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name in _missing:
        raise RuntimeError(f"backend={name!r} is not available: {_missing[name]}")
    if not serves(name, device):
        hint = "; it does in Triton's interpreter, with TRITON_INTERPRET=1" if name == "triton" else ""
        raise ValueError(f"backend={name!r} does not serve tensors on {device}{hint}")
    return _ready[name] if form in _ready[name].forms else None
