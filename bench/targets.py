"""What a target costs that is no class index: forward and backward over ``F.cross_entropy`` with class indices and no penalty.

    python bench/targets.py                       # one thread, a minute
    python bench/targets.py --sizes 256x1000      # ROWSxCLASSES

Each cell is a ratio of medians over interleaved rounds in one process, as bench/microbench.py takes them; ! marks a size during which
other processes took a core more than 20 times a second.
"""

from __future__ import annotations

import argparse
import random

import contenders
import microbench
import torch

SIZES = ("128x10", "1024x10", "16384x10", "256x100", "256x1000", "4096x1000", "512x32000")
TIMES = " \N{MULTIPLICATION SIGN} "
LABELS = {"ours": "class indices"} | contenders.SOFT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxCLASSES")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(0)
    torch.manual_seed(0)
    print(f"{microbench.processor(torch.device('cpu'))}, {args.threads} thread(s), torch {torch.__version__}, float32\n")
    print("| rows \N{MULTIPLICATION SIGN} classes | " + " | ".join(LABELS.values()) + " |")
    print("|---" * (1 + len(LABELS)) + "|")
    for size in args.sizes:
        names = ["cross_entropy", *LABELS]
        case = microbench.measure(microbench.shape_of(size), torch.float32, torch.device("cpu"), names, args.seconds)
        ratios = [microbench.median(case, name) / microbench.median(case, "cross_entropy") for name in LABELS]
        mark = " !" if microbench.disturbed(case) else ""
        print(f"| {size.replace('x', TIMES)}{mark} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


if __name__ == "__main__":
    main()
