"""What torch.compile generates for a GPU, made to run on CPU tensors: its output modules, with CUDA's names taken out.

The modules come from ``inductor_offline.py`` in the simulator's folder (a CUDA build of torch; no GPU): cross-entropy, and cross-entropy
+ 0.1 x the variance of the non-true logits in torch operators. Where the generated code leaves several configurations to the autotuner,
the one with the fewest simulated instructions is taken, which favours the peer.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import offline
import torch
from torch import Tensor

WEIGHT = {"ce": None, "lv": 0.1}  # of the penalty


def missing() -> str | None:
    if not offline.simulated():
        return "torch.compile's kernels are emitted by the simulator's own script (PTXSIM)"
    if torch.version.cuda is None:
        return "torch.compile's CUDA kernels need a CUDA build of torch (no GPU)"
    return None


def _emit(rows: int, classes: int, dtype: str, which: str) -> tuple[str, str]:
    """Kept in the temporary folder: generating takes longer than all else."""
    folder = Path(tempfile.gettempdir()) / f"fastsoftloss-inductor-{torch.__version__}-{rows}"
    files = [folder / f"{which}_{dtype}_{classes}_{way}.py" for way in ("fwd", "bwd")]
    if not all(file.exists() for file in files):
        with tempfile.TemporaryDirectory() as fresh:
            script = Path(os.environ["PTXSIM"]) / "inductor_offline.py"
            command = [sys.executable, script, str(classes), dtype, str(rows), which, str(offline.CAPABILITY)]
            done = subprocess.run(command, env=os.environ | {"OUT": fresh}, cwd=fresh, capture_output=True, text=True)
            folder.mkdir(exist_ok=True)
            for file in files:
                if not (Path(fresh) / file.name).exists():
                    raise RuntimeError(f"{which} {dtype} {rows} x {classes}: {done.stdout[-500:]}{done.stderr[-1500:]}")
                shutil.move(Path(fresh) / file.name, file)
    forward, backward = (file.read_text() for file in files)
    return forward, backward


_emitter = ThreadPoolExecutor(1)  # a process of its own at a time, beside the simulations of this one
_emitted: dict[tuple[int, int, str, str], Future[tuple[str, str]]] = {}


def prefetch(cases: Iterable[tuple[int, int, str, str]]) -> None:
    """Have the code of these (rows, classes, dtype, which) generated, in this order."""
    for case in cases:
        if case not in _emitted:
            _emitted[case] = _emitter.submit(_emit, *case)


class _Kernel:
    """A generated kernel: launched in the best of its configurations."""

    def __init__(self, tuner: Any, launches: list[offline.Launch]) -> None:
        self.tuner, self.launches, self.best = tuner, launches, None

    def _launch(self, config: Any, *args: Any) -> offline.Launch:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        names = self.tuner.fn.arg_names
        grid = GridExpr.from_meta(self.tuner.inductor_meta, config, mode="python").eval_slow(dict(zip(names, args, strict=False)))
        self.tuner.fn[grid](*args, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages)
        return self.launches[-1]

    def run(self, *args: Any, stream: Any = None) -> None:
        if self.best is None and len(self.tuner.configs) > 1:

            def trial(config: Any) -> int:
                launch = self._launch(config, *(a.clone() if isinstance(a, Tensor) else a for a in args))
                self.launches.pop()
                return sum(launch.stats["opcodes"].values()) if launch.stats else 0

            self.best = min(self.tuner.configs, key=trial)
        self._launch(self.best or self.tuner.configs[0], *args)


def _on_cpu(source: str, launches: list[offline.Launch]) -> Callable[[list[Any]], tuple[Any, ...]]:
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None
    kernels: dict[str, _Kernel] = {}

    # triton_per_fused_{every operator}_0: longer than Triton's own file names can be
    source = re.sub(r"\b(triton_[a-z]+_fused)\w*(_\d+)\b", r"\1\2", source)

    def kernel(match: re.Match[str]) -> str:
        name, code = match.groups()
        kernels[name] = _Kernel(getattr(offline.load_module(code), name), launches)
        return ""

    source = re.sub(r"^\w+ = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", kernel, source, flags=re.S | re.M)
    for cuda, cpu in (
        (r"with torch\.cuda\._DeviceGuard\(\d\):", "if True:"),
        (r"torch\.cuda\.set_device\(\d\)", "pass"),
        (r"get_raw_stream\(\d\)", "None"),
        (r"^from torch\._C import _cuda_getCurrentRawStream.*$", ""),
        (r"empty_strided_cuda\(", "empty_strided_cpu("),
        (r"^async_compile\..*$|^del async_compile$", ""),
        (r"^ *assert_(size_stride|alignment)\w*\(.*\)$", ""),
        (r"^empty_strided_p2p = .*$", ""),
    ):
        source = re.sub(cuda, cpu, source, flags=re.M)
    module = offline.load_module(source)
    vars(module).update(kernels)
    return module.call


def compiled(rows: int, classes: int, dtype: torch.dtype, which: str, launches: list[offline.Launch]) -> tuple[Any, Any]:
    """(forward, backward) of the generated code: (logits, target) -> (loss, saved), then saved -> gradient for an upstream of 1."""
    case = (rows, classes, str(dtype).removeprefix("torch."), which)
    prefetch([case])
    forward_, backward_ = (_on_cpu(source, launches) for source in _emitted[case].result())

    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, list[Any]]:
        loss, *saved = forward_([logits, target])
        return loss, saved

    def backward(loss: Tensor, saved: list[Any]) -> Tensor:
        gradients = backward_([*saved, torch.ones_like(loss)])
        return next(itertools.filterfalse(lambda g: g is None, gradients))

    return forward, backward
