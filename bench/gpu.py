"""Microbenchmarks on a GPU: forward and backward against ``F.cross_entropy``, ``torch.compile`` and Liger, where those are there.

    python bench/gpu.py --out results/gpu

Medians of CUDA events, the L2 cache flushed before each call; GB/s count one read and one write of the logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastsoftloss import Loss, backends

SIZES = ((1_048_576, 10), (262_144, 100), (32_768, 1000), (32_768, 1003), (8192, 4096), (4096, 32_000), (2048, 50_257), (1024, 128_256))
DTYPES = (torch.bfloat16, torch.float32)


def contenders() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"F.cross_entropy": F.cross_entropy}
    found["torch.compile"] = torch.compile(F.cross_entropy, dynamic=False)
    for name in ("cuda", "triton"):
        if name not in backends.missing():
            found[name] = Loss(backend=name)
            found[f"{name}, no penalty"] = Loss(backend=name, diversity=None)
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss  # type: ignore[import-not-found]

        found["liger"] = LigerCrossEntropyLoss()
    except ImportError:
        pass
    return found


def milliseconds(run: Callable[[], object], calls: int) -> float:
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(calls):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def plot(results: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DTYPES), figsize=(12, 4), sharey=True)
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for name in dict.fromkeys(r["name"] for r in results):
            mine = [r for r in results if r["name"] == name and r["dtype"] == str(dtype)]
            axis.plot([r["classes"] for r in mine], [r["gb_per_s"] for r in mine], marker="o", label=name)
        axis.set(xscale="log", xlabel="classes", title=str(dtype))
    axes[0].set_ylabel("GB/s, forward and backward")
    axes[-1].legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    for dtype in DTYPES:
        for rows, classes in SIZES:
            logits = torch.randn(rows, classes, device="cuda").to(dtype).requires_grad_()
            target = torch.randint(classes, (rows,), device="cuda")
            for name, loss in contenders().items():

                def step(loss: Callable[..., torch.Tensor] = loss, z: torch.Tensor = logits, y: torch.Tensor = target) -> None:
                    torch.autograd.grad(loss(z, y), z)

                ms = milliseconds(step, args.calls)
                gb = 2 * logits.numel() * logits.element_size() / ms / 1e6
                results.append({"name": name, "dtype": str(dtype), "rows": rows, "classes": classes, "ms": ms, "gb_per_s": gb})
                print(f"{dtype!s:15} {rows:>8} x {classes:<7} {name:20} {ms:8.3f} ms {gb:7.0f} GB/s", flush=True)
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    (args.out / "microbench.json").write_text(json.dumps(device | {"results": results}, indent=1) + "\n")
    plot(results, args.out / "microbench.png")


if __name__ == "__main__":
    main()
