"""Speed of the loss beside its peers, in one process: evaluation, forward, backward, both; memory; the cost of a call.

    python bench/microbench.py                                  # the README's sizes, 1 thread and all threads: minutes
    python bench/microbench.py --full --out results/speed       # every size, bfloat16 too
    python bench/microbench.py --sizes 512x100 --peers ours cross_entropy
    python bench/microbench.py --compare bench/speed/speed.json # what got slower beyond the spread; exit status 1 if anything did

Every round times a few calls of each contender in a row, after one that is not timed, so that what disturbs the machine disturbs
all of them. Figures are medians and quartiles over calls (CUDA events on a GPU). ``forward`` builds the graph; ``evaluation`` does
not. The logits come from a ring of tensors that together exceed the last cache, 64 at most: a small batch comes out of the layer
before it in cache, a large one does not. ``limit`` is the share of the copy's bandwidth, measured in the same rounds on the same
tensors, at which the bytes that must move went by: logits and targets read once, the gradient written once.
``floor`` is an autograd Function that computes nothing, called and differentiated in the same way: no loss written in Python can
be faster. ``!`` marks a case during which other processes took a core more than 20 times a second: with two threads such figures
are worth nothing, since one waits for the other. Memory is the most that one forward and backward allocate beyond their inputs,
over the bytes of the logits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import torch
from torch import Tensor

from fastsoftloss import backends

SIZES = ("1x10", "32x10", "128x10", "1024x10", "16384x10", "256x100", "65536x100", "256x1000", "1024x1000", "4096x1000", "512x32000")
SIZES += ("8x21x256x256",)
FULL = (*SIZES, "4096x32000", "2048x128256")
PHASES = ("evaluation", "forward", "backward", "both")
CALLS = 5  # of a contender in a row, each round
LONG = 0.02  # seconds; of a call that takes longer one in a row is enough
PATIENCE = 30.0  # seconds; a case that takes longer has fewer rounds than three

Quartiles = list[float]


def shape_of(size: str) -> tuple[int, ...]:
    shape = tuple(int(n) for n in size.lower().split("x"))
    if len(shape) < 2:
        raise SystemExit(f"a size is ROWSxCLASSES or BATCHxCLASSESx..., got {size!r}")
    return shape


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def _switches() -> int:
    """How often other processes took a core from this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Clock:
    """Marks in time, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _allocated(run: Any) -> int:
    """The most bytes that ``run`` holds at once of those that torch's CPU allocator gives it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler has a line to say each time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def peak(contender: contenders.Contender, logits: Tensor, target: Tensor) -> int:
    def run() -> None:
        contender.backward(contender.loss(logits, target))

    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        result = torch.cuda.max_memory_allocated() - before
    else:
        result = _allocated(run)
    logits.grad = None
    return result


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, names: list[str], seconds: float) -> dict[str, Any]:
    """One case: the quartiles of each contender's phases, in seconds, its peak in bytes, and the quartiles of a copy of the logits."""
    bytes_ = math.prod(shape) * dtype.itemsize
    count = min(64, max(2, math.ceil(2 * last_cache(device) / bytes_)))
    rows = shape[:1] + shape[2:]
    ring = itertools.cycle(
        [
            (torch.randn(shape, device=device, dtype=dtype, requires_grad=True), torch.randint(shape[1], rows, device=device))
            for _ in range(count)
        ]
    )
    logits, target = next(ring)
    sink = torch.empty_like(logits, requires_grad=False)
    peers = contenders.gather(logits, names)
    clock = _Clock(device)

    def step(peer: contenders.Contender) -> tuple[float, ...]:
        z, t = next(ring)
        begin = clock.mark()
        loss = peer.loss(z, t)
        middle = clock.mark()
        peer.backward(loss)
        end = clock.mark()
        z.grad = None
        return clock.seconds(begin, middle), clock.seconds(middle, end), clock.seconds(begin, end)

    def evaluate(peer: contenders.Contender) -> float:
        z, t = next(ring)
        with torch.no_grad():
            begin = clock.mark()
            peer.loss(z, t)
            return clock.seconds(begin, clock.mark())

    def copy() -> float:
        z, _ = next(ring)
        with torch.no_grad():
            begin = clock.mark()
            sink.copy_(z)
            return clock.seconds(begin, clock.mark())

    peaks, calls = {}, {}
    for name, peer in peers.items():  # compiles, and finds out how long a call is
        step(peer), evaluate(peer)
        peaks[name] = peak(peer, logits, target)
        calls[name] = CALLS if step(peer)[2] < LONG else 1
    samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in peers}
    copies: list[float] = []
    order = list(peers)
    begin, rounds, switched = time.perf_counter(), 0, _switches()
    while (spent := time.perf_counter() - begin) < seconds or (rounds < 3 and spent < PATIENCE):
        for name in random.sample(order, len(order)):
            # the first call is not counted: what ran before has left its own data in the caches, and its memory to the system
            for both in [step(peers[name]) for _ in range(1 + calls[name])][1:]:
                for phase, value in zip(PHASES[1:], both, strict=True):
                    samples[name][phase].append(value)
            samples[name]["evaluation"] += [evaluate(peers[name]) for _ in range(1 + calls[name])][1:]
        copies += [copy() for _ in range(1 + CALLS)][1:]
        rounds += 1

    switched = (_switches() - switched) / (time.perf_counter() - begin)

    def quartiles(values: list[float]) -> Quartiles:
        return [float(f"{v:.4g}") for v in np.percentile(values, [25, 50, 75])]

    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "logits_bytes": bytes_,
        "target_bytes": target.numel() * target.element_size(),
        "switches": float(f"{switched:.3g}"),
        "copy": quartiles(copies),
        "contenders": {
            name: {"peak_bytes": peaks[name], "calls": len(samples[name]["both"])} | {p: quartiles(samples[name][p]) for p in PHASES}
            for name in peers
        },
    }


def median(case: dict[str, Any], name: str, phase: str = "both") -> float:
    """Seconds; NaN for a contender that did not run."""
    return case["contenders"][name][phase][1] if name in case["contenders"] else math.nan


def limit(case: dict[str, Any], name: str, phase: str = "both") -> float:
    """The share of the copy's bandwidth at which the bytes that must move went by."""
    passes = {"evaluation": 1, "forward": 1, "backward": 2, "both": 2}[phase]
    minimum = passes * case["logits_bytes"] + case["target_bytes"]
    bandwidth = 2 * case["logits_bytes"] / case["copy"][1]
    return minimum / median(case, name, phase) / bandwidth


def disturbed(case: dict[str, Any]) -> bool:
    return bool(case["switches"] > 20)


def size_of(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["shape"]))


HEADER = (
    f"{'size':>14} {'dtype':>8} {'thr':>3} | {'ours us':>9} {'+-%':>4} {'eval':>9} {'forward':>9} {'backward':>9} | "
    f"{'/CE':>5} {'/CE+pen':>7} {'/c(CE)':>6} {'/c(CE+pen)':>10} {'floor/CE':>8} | "
    f"{'GB/s':>6} {'limit':>5} {'CE':>5} | {'memory':>6} {'CE':>4}"
)


def line(case: dict[str, Any]) -> str:
    """A row of the table on the screen: times in us, then ours over each peer (both passes), then the limit, then memory."""
    low, ours, high = case["contenders"]["ours"]["both"]
    phases = " ".join(f"{median(case, 'ours', phase) * 1e6:>9.1f}" for phase in PHASES[:3])
    over = [ours / median(case, name) for name in ("cross_entropy", "penalised", "compiled_cross_entropy", "compiled_penalised")]
    floor = median(case, "floor") / median(case, "cross_entropy")
    speed = (2 * case["logits_bytes"] + case["target_bytes"]) / ours / 1e9
    memory = [case["contenders"].get(name, {}).get("peak_bytes", math.nan) / case["logits_bytes"] for name in ("ours", "cross_entropy")]
    return (
        f"{size_of(case):>14} {case['dtype']:>8} {case['threads']:>3} | {ours * 1e6:>9.1f} {50 * (high - low) / ours:>4.0f} {phases} | "
        f"{over[0]:>5.2f} {over[1]:>7.2f} {over[2]:>6.2f} {over[3]:>10.2f} {floor:>8.2f} | "
        f"{speed:>6.1f} {limit(case, 'ours'):>5.2f} {limit(case, 'cross_entropy'):>5.2f} | {memory[0]:>6.1f} {memory[1]:>4.1f}"
        + (" !" if disturbed(case) else "")
    )


def call(case: dict[str, Any]) -> str:
    """What a call costs before there is anything to compute."""
    us = {name: f"{median(case, name) * 1e6:.1f}" for name in contenders.LABELS}
    return (
        f"a call, forward + backward at {size_of(case)}, threads {case['threads']}: ours {us['ours']} us, "
        f"F.cross_entropy {us['cross_entropy']}, a Function that computes nothing {us['floor']}, "
        f"the same without what Tensor.backward does in Python {us['engine']}"
    )


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, and the cases of ``old`` that it did not measure, if that is the same machine; in order."""
    if old["machine"] != new["machine"]:
        return new
    cases = {(case["dtype"], case["threads"], *case["shape"]): case for case in (*old["results"], *new["results"])}
    return new | {"results": sorted(cases.values(), key=lambda c: (c["dtype"] != "float32", c["dtype"], c["threads"], _place(c)))}


def _place(case: dict[str, Any]) -> tuple[int, ...]:
    """Sizes by classes, then by rows."""
    return (case["shape"][1], math.prod(case["shape"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", metavar="ROWSxCLASSES")
    parser.add_argument("--full", action="store_true", help="the largest sizes and bfloat16 too: 16 GB of memory")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--peers", nargs="+", default=list(contenders.LABELS), choices=list(contenders.LABELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size, dtype and thread count, compiling apart")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write speed.json and its plots there, over what it has of these cases")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what got slower since")
    args = parser.parse_args()
    device = torch.device(args.device)
    threads = args.threads or ([torch.get_num_threads()] if device.type == "cuda" else sorted({1, torch.get_num_threads()}))
    sizes = args.sizes or (FULL if args.full else SIZES)
    dtypes = args.dtypes or (["float32", "bfloat16"] if args.full else ["float32"])
    names = list(dict.fromkeys(["ours", *args.peers]))
    random.seed(0)
    torch.manual_seed(0)
    machine = {
        "processor": processor(device),
        "device": device.type,
        "cores": os.cpu_count(),
        "kernels": backends.default(device) + backends.detail(backends.default(device)).removeprefix(","),
        "torch": torch.__version__,
    }
    print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; CE is F.cross_entropy, c() torch.compile")
    print(HEADER)
    report: dict[str, Any] = {"machine": machine, "results": []}
    for dtype, count, size in itertools.product(dtypes, threads, sizes):
        torch.set_num_threads(count)
        case = measure(shape_of(size), getattr(torch, dtype), device, names, args.seconds)
        report["results"].append(case)
        print(line(case), flush=True)
    print("\n".join(call(case) for case in report["results"] if math.prod(case["shape"]) == case["shape"][1]))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        saved = args.out / "speed.json"
        kept = merged(json.loads(saved.read_text()), report) if saved.exists() else report
        saved.write_text(json.dumps(kept, indent=1) + "\n")
        import speed_plots

        speed_plots.draw(kept, args.out)
    if args.compare:
        import compare

        found = compare.slower(json.loads(args.compare.read_text()), report)
        print("\n".join(found) if found else "nothing got slower beyond the spread")
        return int(bool(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
