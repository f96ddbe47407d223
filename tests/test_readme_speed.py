"""The README's section on speed is what its command writes from the saved figures."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("tqdm")

import bench_path

import readme  # isort: skip

README = (bench_path.BENCH.parent / "README.md").read_text()


def test_the_readme_agrees_with_the_saved_figures() -> None:
    assert readme.replace(README, readme.section(*readme.read())) == README


def test_losses_are_named() -> None:
    speed, _ = readme.read()
    text = "\n".join(readme.speed(speed))
    slower = [case for case in speed["results"] if case["contenders"]["ours"]["both"][1] > case["contenders"]["cross_entropy"]["both"][1]]
    assert ("**more** in" in text) == bool(slower)
    assert f"in {len(speed['results']) - len(slower)} of {len(speed['results'])} cases" in text
    for case in slower:
        assert f"{readme._size(case)} {case['dtype']} {case['threads']} (" in text


def test_what_was_not_measured_says_so() -> None:
    _, kernels = readme.read()
    text = "\n".join(readme.gpu(kernels))
    assert text.startswith("**Simulated and modelled, not measured**") and "no time is given" in text
    assert " ms" not in text and "µs" not in text
