"""Import first: puts bench/ on the path, as running a script there does, and keeps its small nets on one thread."""

import sys
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
torch.set_num_threads(1)
