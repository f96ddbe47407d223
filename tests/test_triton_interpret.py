"""What is asked of every backend, of Triton in its interpreter, which must be chosen before Triton is imported: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["test_triton_agreement", "test_compile", "test_derivatives", "test_module", "test_features"])
def test_interpreted(name: str) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is interpreted already")
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-x",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        str(here / f"{name}.py"),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, check=False, cwd=here.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
