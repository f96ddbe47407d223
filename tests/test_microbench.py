"""The microbenchmark: one command gives table, JSON and plots; a comparison names what got slower, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

import bench_path  # noqa: F401

import compare  # isort: skip
import contenders  # isort: skip
import microbench  # isort: skip

QUICK = ["--sizes", "1x10", "4x6", "2x3x4x4", "--threads", "1", "--seconds", "0", "--device", "cpu"]
PEERS = ["ours", "cross_entropy", "penalised", "floor", "engine"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["microbench.py", *QUICK, "--peers", *PEERS, *arguments])
    return microbench.main()


def test_table_json_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["1x10", "4x6", "2x3x4x4"]
    assert "a call, forward + backward at 1x10" in printed
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert [case["shape"] for case in report["results"]] == [[1, 10], [4, 6], [2, 3, 4, 4]]
    for case in report["results"]:
        assert set(case["contenders"]) == set(PEERS)
        assert case["logits_bytes"] == 4 * torch.Size(case["shape"]).numel()
        for name, contender in case["contenders"].items():
            assert contender["calls"] >= 3
            for phase in microbench.PHASES:
                low, middle, high = contender[phase]
                assert 0 < low <= middle <= high
            assert contender["both"][1] >= max(contender["forward"][0], contender["backward"][0])
            assert contender["peak_bytes"] >= case["logits_bytes"] * (3 if name == "penalised" else 1)
    assert (tmp_path / "speed-float32.png").stat().st_size < 150_000
    # against itself: the same machine, and all but surely within the spread of a run that took no time
    run(monkeypatch, "--compare", str(tmp_path / "speed.json"))
    assert "two machines" not in capsys.readouterr().out


def test_the_peer_with_the_penalty_is_our_loss() -> None:
    logits = torch.randn(6, 5, 3, dtype=torch.float64)
    target = torch.randint(5, (6, 3))
    peers = contenders.gather(logits, ["ours", "penalised"])
    torch.testing.assert_close(peers["ours"].loss(logits, target), peers["penalised"].loss(logits, target))


def report(ours: float, cross_entropy: float) -> dict[str, Any]:
    times = {name: [0.98 * t, t, 1.02 * t] for name, t in (("ours", ours), ("cross_entropy", cross_entropy))}
    case = {"shape": [8, 10], "dtype": "float32", "threads": 1}
    return {
        "machine": {"processor": "one"},
        "results": [case | {"contenders": {name: dict.fromkeys(microbench.PHASES, t) for name, t in times.items()}}],
    }


def test_compare_names_what_got_slower() -> None:
    old = report(100e-6, 50e-6)
    assert compare.slower(old, report(100e-6, 50e-6)) == []
    assert compare.slower(old, report(103e-6, 50e-6)) == []  # within the quartiles of both
    assert compare.slower(old, report(60e-6, 50e-6)) == []
    assert compare.slower(old, report(120e-6, 60e-6)) == []  # the machine is slower, not we
    assert len(compare.slower(old, report(120e-6, 40e-6))) == 4  # a yardstick that got faster forgives nothing
    new = report(100e-6, 50e-6)
    new["results"][0]["contenders"]["ours"]["backward"] = [118e-6, 120e-6, 121e-6]
    (found,) = compare.slower(old, new)
    assert found == "slower: 8x10 float32, threads 1, backward: 100.0 -> 120.0 us (+20%; cross_entropy +0%)"


def test_compare_says_what_it_cannot_compare() -> None:
    old, new = report(1e-6, 1e-6), report(9e-6, 1e-6)
    other = copy.deepcopy(new)
    other["results"][0]["shape"] = [8, 11]
    assert compare.slower(old, other) == []
    other["machine"] = {"processor": "another"}
    (found,) = compare.slower(old, other)
    assert "two machines" in found


def test_cases_measured_anew_replace_the_saved_ones() -> None:
    old, new = report(1e-6, 1e-6), report(2e-6, 1e-6)
    other = copy.deepcopy(old["results"][0])
    other["shape"] = [8, 5]
    old["results"].append(other)
    merged = microbench.merged(old, new)
    assert merged["results"] == [other, new["results"][0]]
    new["machine"] = {"processor": "another"}
    assert microbench.merged(old, new) is new
