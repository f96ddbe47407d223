"""The report: one command trains, attacks and writes; asked again, it goes on from what it has."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")

import bench_path  # noqa: F401

import overhead  # isort: skip
import report  # isort: skip


def test_writes_table_figure_and_json_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--epochs", "2", "--limit", "16", "--apgd-steps", "3", "--queries", "5", "--seeds", "2", "--rounds", "3"]
    options += ["--configurations", "ce", "kl:1@1e-3", "--device", "cpu", "--out", str(tmp_path)]
    report.main(options)
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.startswith(text.strip())
    assert "| CE |" in text and "| kl 1 + wd 0.001 |" in text and "Against the best control" in text
    summary = json.loads((tmp_path / "report.json").read_text())
    assert [(run["label"], run["seed"]) for run in summary["runs"]] == [
        (label, seed) for seed in (0, 1) for label in ("CE", "kl 1 + wd 0.001")
    ]
    for run in summary["runs"]:
        assert 0 <= run["accuracy"]["strong"] <= run["accuracy"]["pgd"] <= 1
    assert (tmp_path / "digits.png").stat().st_size < 150_000

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "digits").iterdir()}
    lost = tmp_path / "digits" / "ce@0-seed1.json"
    lost.write_text('{"cut')
    report.main(options)
    changed = {file for file, time in kept.items() if file.stat().st_mtime_ns != time}
    assert changed == {lost}
    again = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [{**run, "cpu_seconds": 0} for run in again] == [{**run, "cpu_seconds": 0} for run in summary["runs"]]


def test_configurations() -> None:
    one = report.Configuration.parse("logit_variance:5@3e-3+at")
    assert one == ("logit_variance:5", 3e-3, True)
    assert one.label == "logit_variance 5 + wd 0.003 + adversarial training"
    for text in ("nothing", "ce@much"):
        with pytest.raises(SystemExit, match=text.partition("@")[0]):
            report.Configuration.parse(text)


def test_correlation_is_of_ranks_and_by_group() -> None:
    runs = [{"diversity": d, "accuracy": {"strong": s}} for d, s in ((0.1, 0.7), (0.2, 0.6), (0.9, 0.5), (3, 0.1), (20, 0.2), (400, 0.3))]
    said = report.correlation(runs)
    assert "-0.77 over all 6" in said and "-1.00 over those of a diversity below 1 (3), 1.00 over those above (3)" in said


def test_overhead_shares(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--batches", "16", "--classes", "10", "--rounds", "3", "--size", "1", "8", "8", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(overhead.CRITERIA)
    assert all(line.startswith("| 16 | 10 |") for line in lines[2:])


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 20))
    inside = np.mean([low <= 1 <= high for low, high in map(overhead.interval, draws.tolist())])
    assert 0.95 <= inside < 0.97  # of 20 the 6th and the 15th: 95.9 %
    assert overhead.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)  # three cannot say it with 95 %: all that there is
