"""What the CUDA kernels cost, counted: their PTX (sm_80) executed in ptxsim. Evidence: simulated; no figure here is a time.

    PTXSIM=folder python bench/cuda_sim.py        # writes bench/kernels_cuda.json

Bytes are those of 32-byte sectors, each read taken as a cache miss; the minimum is logits and labels read once, and the
gradient written once where there is one. Instructions are PTX thread instructions, moves not counted. What limits a
pass is a model from datasheet rates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import cuda_mode  # noqa: E402

from fastsoftloss import backends, ops  # noqa: E402

PASSES = ("forward", "backward", "fused")
CLASSES = (10, 100, 1000, 1003, 4096, 32000, 50257, 128256)
DTYPES = ("bfloat16", "float32")
GPUS = ("A100", "H100", "B200")
# mean, the default penalty
OPTIONS = (None, None, -100, ops.REDUCTIONS.index("mean"), 0.0, ops.DIVERSITIES.index("logit_variance"), 1.0, 0.0)


def figures(name: str, dtype: torch.dtype, rows: int, classes: int) -> dict[str, Any] | None:
    """Of one pass over rows x classes: bytes over the minimum, instructions and special functions an element, and what limits it.

    None where there is no such pass: the gradient of a long row is not written in its forward.
    """
    sim = cuda_mode.simulator()
    import cudasim  # type: ignore[import-not-found]
    import roofline  # type: ignore[import-not-found]

    operators = backends.choose("cuda", torch.device("cpu"))
    assert operators is not None
    generator = torch.Generator().manual_seed(classes)
    logits = (2 * torch.randn(rows, classes, generator=generator)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    # one multiprocessor: blocks have many rows each, as they do where a batch fills a device
    cudasim._runtime.cudasim_set(sim._callback, 1, 9, 0, 232448)
    try:
        sim.launches.clear()  # another test's
        outcome = operators.forward(logits, target, *OPTIONS, False, name == "fused")
        if name == "fused" and outcome[2].numel() == 0:
            return None
        if name == "backward":
            sim.launches.clear()
            operators.backward(torch.tensor(2.0), outcome[3], logits, target, *OPTIONS)
        launches = list(sim.launches)
    finally:
        cudasim._runtime.cudasim_set(sim._callback, 132, 9, 0, 232448)
        sim.launches.clear()
    minimum = logits.nbytes * (1 if name == "forward" else 2) + target.nbytes
    total: dict[str, Any] = {"opcodes": {}, "traffic": {}}
    for i, launch in enumerate(launches):
        for opcode, count in launch[-1]["opcodes"].items():
            total["opcodes"][opcode] = total["opcodes"].get(opcode, 0) + count
        total["traffic"] |= {(i, argument): ways for argument, ways in launch[-1]["traffic"].items()}
    reports = {gpu: roofline.report(total, logits.numel(), minimum, gpu) for gpu in GPUS}
    any_gpu = reports[GPUS[0]]
    return {
        "kernels": [launch[0].decode() if isinstance(launch[0], bytes) else launch[0] for launch in launches],
        "bytes_over_minimum": round(any_gpu["bytes_over_minimum"], 3),
        "instructions": round(any_gpu["instructions_per_element"], 2),
        "special": round(any_gpu["special_per_element"], 2),
        "model": {gpu: {"limiter": r["limiter"], "of_ideal": round(r["fraction_of_ideal"], 2)} for gpu, r in reports.items()},
    }


def rows_for(classes: int) -> int:
    return 8192 if classes <= 100 else max(16, 2_000_000 // classes)


def main() -> None:
    table = []
    for dtype in DTYPES:
        for classes in CLASSES:
            for name in PASSES:
                found = figures(name, getattr(torch, dtype), rows_for(classes), classes)
                if found:
                    table.append({"dtype": dtype, "classes": classes, "rows": rows_for(classes), "pass": name} | found)
                    print(*(f"{key}={value}" for key, value in table[-1].items() if key not in ("kernels", "model")), flush=True)
    evidence = "simulated: PTX for sm_80 executed in ptxsim, one multiprocessor; the model is from datasheet rates; no GPU was measured"
    (ROOT / "bench/kernels_cuda.json").write_text(json.dumps({"evidence": evidence, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
