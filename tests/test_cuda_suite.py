"""The suite once more with BACKENDS = {"cuda": ...}: on a GPU where there is one, else over the CPU's memory with every launch
executed in ptxsim (tests/cuda_mode.py; evidence: simulated). A process of its own, so that the backends do not meet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# On a simulator the long rows at every margin take an hour; what is left still meets every kernel. "Every block" is of the
# CPU's scan over targets.
LEFT_OUT = (
    "32769",
    "40000",
    "million",
    "4097",
    "every_block",
    "(penalties_that and 1000)",
    "(order_of_rows and 5000)",
    "(two_losses and dtype1-5000)",
    "flat_rows_of_many",
    "(hard_labels_in and 150)",
    "(the_expectation and dtype1)",
)
SIMULATED = " and not ".join(["(cuda or other_backends)", *LEFT_OUT])


def test_the_suite_on_this_backend() -> None:
    if os.environ.get("FASTSOFTLOSS_TEST_BACKEND"):
        pytest.skip("this is that process")
    import cuda_mode

    if not torch.cuda.is_available():
        cuda_mode.simulator_folder()
        cuda_mode.built()
    names = ["test_exactness", "test_kernel", "test_bad_input", "test_autograd"]
    if not torch.cuda.is_available():  # its tensors are on the CPU
        names.append("test_soft_targets")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cuda" if torch.cuda.is_available() else SIMULATED,
    ]
    environment = os.environ | {"FASTSOFTLOSS_TEST_BACKEND": "cuda", "FASTSOFTLOSS_CHECK": "1"}
    files = [str(HERE / f"{name}.py") for name in names]
    done = subprocess.run([*command, *files], check=False, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
