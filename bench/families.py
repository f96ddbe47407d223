"""The GPU kernels that are laid side by side: ours, and the peers that compile without a GPU.

A family is made once in a process and then run on logits and labels on the CPU. It gives the launches of each phase, and the loss and
gradient that came out: ``forward`` is an evaluation, ``backward`` stands alone, ``both`` is a step of training with an upstream
gradient of 1. Counted are the kernels; the few torch operators that Liger (a mask, a maximum, two sums over the rows) and flash-attn
(a mean) run beside theirs are not, which favours them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import inductor
import offline
import torch
import torch.nn.functional as F
from offline import Launch
from torch import Tensor

from fastsoftloss import functional, triton_plan

TESTS = Path(__file__).parents[1] / "tests"
sys.path.append(str(TESTS))  # where the CUDA backend's simulated build is


class Result(NamedTuple):
    phases: dict[str, list[Launch]]
    loss: Tensor
    gradient: Tensor


Run = Callable[[Tensor, Tensor], Result]


class Family(NamedTuple):
    label: str
    diversity_weight: float | None  # of the penalty that it computes
    make: Callable[[list[Launch]], Run]
    missing: Callable[[], str | None]  # why it cannot be made here
    plan: Callable[[Tensor], dict[str, Any]] | None = None


def _during(launches: list[Launch], run: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    start = len(launches)
    result = run()
    return result, launches[start:]


def _step(loss_of: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.clone().requires_grad_()
    loss = loss_of(z, target)
    loss.backward()
    return loss.detach(), z.grad  # type: ignore[return-value]


# ---------------------------------------------------------------- fastsoftloss


def _ours(backend: str, diversity: str | None, prepare: Callable[[list[Launch]], None]) -> Callable[[list[Launch]], Run]:
    def make(launches: list[Launch]) -> Run:
        prepare(launches)
        operators = functional.backends.choose(backend, torch.device("cpu"))
        options = functional.options_of(-100, "mean", 0.0, diversity, 1.0, 0.0)

        def loss_of(logits: Tensor, target: Tensor) -> Tensor:
            return functional.cross_entropy(logits, target, diversity=diversity, backend=backend)

        def run(logits: Tensor, target: Tensor) -> Result:
            inputs = (logits, target, None, None, *options)
            (_, _, _, moments), forward = _during(launches, lambda: operators.forward(*inputs, False, False))
            _, backward = _during(launches, lambda: operators.backward(torch.tensor(2.0), moments, *inputs))
            (loss, gradient), both = _during(launches, lambda: _step(loss_of, logits, target))
            return Result({"forward": forward, "backward": backward, "both": both}, loss, gradient)

        return run

    return make


def _triton_prepared(launches: list[Launch]) -> None:
    from fastsoftloss import triton_backend

    # one multiprocessor: programs have many rows each, as they do where a batch fills a device
    triton_backend._multiprocessors = lambda device: 1


def _cuda_prepared(launches: list[Launch]) -> None:
    """The library's own launchers over a CUDA runtime without a GPU, as the tests have it."""
    cuda_mode = importlib.import_module("cuda_mode")
    sim = cuda_mode.simulator()
    importlib.import_module("cudasim")._load_runtime().cudasim_set(sim._callback, 1, 8, 0, 166912)  # one multiprocessor, as above
    resources = offline.resources_of_cubins(cuda_mode.SOURCES, cuda_mode.nvcc(), cuda_mode.NVCC_FLAGS)

    class Into(list[Any]):
        def append(self, launch: Any) -> None:
            super().append(launch)
            name, grid, block, shared, stats = launch
            plain = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True).stdout.strip() or name
            plain = plain.split("<")[0].split("::")[-1].split()[-1]
            launches.append(Launch(plain, grid, math.prod(block), shared, *resources[name], "", stats))

    sim.launches = Into()


def _cuda_missing() -> str | None:
    if not (TESTS / "cuda_mode.py").exists():
        return "this version has no C++/CUDA kernels"
    if not offline.simulated():
        return "its launchers run over the simulator's CUDA runtime (PTXSIM)"
    return None if shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc").exists() else "there is no nvcc"


def _plan(logits: Tensor) -> dict[str, Any]:
    """Of a batch of these rows, 4096 of them, on 132 multiprocessors."""
    classes = logits.shape[1]
    return triton_plan.plan(4096, classes, 1, [classes], logits.element_size(), True, 132)._asdict()


# ---------------------------------------------------------------- peers


def _installed(package: str, command: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(package) else f"not installed: {command}"


def _liger(launches: list[Launch]) -> Run:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction, cross_entropy_forward

    def run(logits: Tensor, target: Tensor) -> Result:
        _, forward = _during(
            launches, lambda: cross_entropy_forward(logits.clone(), target, None, -100, 0.0, 0.0, "mean", None, return_z_loss=False)
        )
        step = _during(
            launches, lambda: _step(lambda z, t: LigerCrossEntropyFunction.apply(z, t, None, -100, 0.0, 0.0, "mean")[0], logits, target)
        )
        (loss, gradient), both = step
        return Result({"forward": forward, "both": both}, loss, gradient)

    return run


def _flash(launches: list[Launch]) -> Run:
    # the package itself imports its CUDA extension; this file of it needs none
    spec = importlib.util.find_spec("flash_attn")
    file = Path(spec.submodule_search_locations[0]) / "ops/triton/cross_entropy.py"  # type: ignore[index, union-attr]
    module_spec = importlib.util.spec_from_file_location("flash_attn_cross_entropy", file)
    module = importlib.util.module_from_spec(module_spec)  # type: ignore[arg-type]
    module_spec.loader.exec_module(module)  # type: ignore[union-attr]
    torch.cuda.device = lambda index: contextlib.nullcontext()  # it enters the logits' device, which is none here

    def run(logits: Tensor, target: Tensor) -> Result:
        z = logits.clone().requires_grad_()
        losses, forward = _during(launches, lambda: module.cross_entropy_loss(z, target)[0])
        _, backward = _during(launches, lambda: losses.mean().backward())
        return Result({"forward": forward, "backward": backward, "both": forward + backward}, losses.detach().mean(), z.grad)  # type: ignore[arg-type]

    return run


def _inductor(which: str) -> Callable[[list[Launch]], Run]:
    def make(launches: list[Launch]) -> Run:
        def run(logits: Tensor, target: Tensor) -> Result:
            forward_, backward_ = inductor.compiled(*logits.shape, logits.dtype, which, launches)
            (loss, saved), forward = _during(launches, lambda: forward_(logits, target))
            gradient, backward = _during(launches, lambda: backward_(loss, saved))
            return Result({"forward": forward, "backward": backward, "both": forward + backward}, loss, gradient)

        return run

    return make


def _here() -> str | None:
    return functional.backends.missing().get("triton")


FLASH = "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps flash-attn"
FAMILIES = {
    "ours": Family("fastsoftloss, Triton", 1.0, _ours("triton", "logit_variance", _triton_prepared), _here, _plan),
    "ours_ce": Family("fastsoftloss, Triton, no penalty", None, _ours("triton", None, _triton_prepared), _here, _plan),
    "cuda": Family("fastsoftloss, CUDA", 1.0, _ours("cuda", "logit_variance", _cuda_prepared), _cuda_missing),
    "cuda_ce": Family("fastsoftloss, CUDA, no penalty", None, _ours("cuda", None, _cuda_prepared), _cuda_missing),
    "liger": Family("Liger", None, _liger, _installed("liger_kernel", "pip install --no-deps liger-kernel")),
    "flash": Family("flash-attn", None, _flash, _installed("flash_attn", FLASH)),
    "inductor_ce": Family("torch.compile, CE", None, _inductor("ce"), inductor.missing),
    "inductor_lv": Family("torch.compile, CE + penalty", inductor.WEIGHT["lv"], _inductor("lv"), inductor.missing),
}


# ---------------------------------------------------------------- accuracy alone: what runs on the CPU as it is


def on_cpu(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    return lambda logits, target: Result({}, *_step(loss_of, logits, target))


CPU = {
    "cpu": ("fastsoftloss, C++ on the CPU", 1.0, on_cpu(lambda z, t: functional.cross_entropy(z, t, backend="cpu"))),
    "cpu_ce": ("fastsoftloss, C++, no penalty", None, on_cpu(lambda z, t: functional.cross_entropy(z, t, diversity=None, backend="cpu"))),
    "torch": ("F.cross_entropy on the CPU", None, on_cpu(F.cross_entropy)),
}
