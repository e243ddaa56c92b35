"""Tables and figures from the folders of made-up runs."""

import csv
import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT

import report

UPDATES = 2000


def write_run(
    folder, script, returns, scores, finished=True, commits=("0123456789abcdef",), **arguments
):
    """A run of two evaluations whose seeds ended with these returns and normalised scores."""
    counts = {"total_updates": UPDATES, "log_every": 1000}
    if script.endswith("bsuite"):
        counts["num_seeds"] = len(returns)
    args = importlib.import_module(script).Args(**(counts | arguments))
    config = {"args": dataclasses.asdict(args), "script": f"{script}.py", "data": "made up"}
    config["starts"] = [{"commit": commit, "device": "1 x cpu"} for commit in commits]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    lines = []
    for seed, (value, score) in enumerate(zip(returns, scores, strict=True), args.seed):
        for update in (1000, 2000):
            lines.append({"update": update, "seed": seed, "eval/return_mean": value - 1})
        final = {"final/returns": [value], "final/return_mean": value}
        lines.append({"update": 2000, "seed": seed, **final, "final/normalized_score": score})
    text = "".join(json.dumps(line) + "\n" for line in (lines if finished else lines[:-1]))
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(autouse=True)
def few_bootstraps(monkeypatch):
    monkeypatch.setattr(report, "BOOTSTRAPS", 100)


def make(tmp_path, *items, num_seeds=None):
    args = report.Args(items, UPDATES, num_seeds, (tmp_path / "runs",), tmp_path / "out")
    report.main(args)
    return tmp_path / "out"


def test_table_has_mean_and_std_of_the_runs_and_names_what_is_missing(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", "rosmo_bsuite", [1.0, 0.5], [1.0, 0.7], noise=0.3)
    write_run(runs / "b", "muzero_unplugged_bsuite", [-1.0], [-0.2], noise=0.3)
    write_run(runs / "c", "rosmo_bsuite", [9.0], [9.0], noise=0.3, batch_size=64)  # another cell
    write_run(runs / "d", "rosmo_bsuite", [9.0], [9.0], noise=0.5, finished=False)
    out = make(tmp_path, "table1")
    page = (out / "table1.md").read_text()
    assert "| ROSMO |  |  | 0.750 ± 0.250 |  |" in page
    assert "| MuZero Unplugged |  |  | -1.000 ± 0.000 |  |" in page
    assert "Not run at 2,000 updates: ROSMO, noise 0.0, catch" in page
    assert "ROSMO, noise 0.5, catch" in page
    assert "| ROSMO | catch, noise 0.3 | 2 | 2,000 | 0123456 | 1 x cpu | made up |" in page
    with (out / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["return"]) for row in rows] == [1.0, 0.5, -1.0]


def test_aggregate_is_the_interquartile_mean_over_seeds_and_tasks(tmp_path):
    scores = np.random.default_rng(0).random((3, 4))
    for task, row in zip(report.TASKS, scores, strict=True):
        folder = tmp_path / "runs" / task
        write_run(folder, "rosmo_bsuite", row, row, env_id=task, data_percent=10)
    write_run(tmp_path / "runs" / "e", "rosmo_bsuite", [1.0], [1.0], env_id="catch", data_percent=1)
    out = make(tmp_path, "figure2a")
    expected = np.sort(scores.ravel())[3:9].mean()  # the middle half of twelve
    page = (out / "figure2a.md").read_text()
    row, *tasks = [line for line in page.splitlines() if line.startswith("| ROSMO | ")]
    mean, low, high = (
        float(x)
        for x in row.split("|")[3].replace("[", "").replace("]", "").replace(",", "").split()
    )
    assert mean == pytest.approx(expected, abs=5e-4)
    assert scores.min() <= low <= mean <= high <= scores.max()
    assert row.split("|")[2].strip() == ""  # one task of three at 1% is no cell
    assert (make(tmp_path, "figure2a") / "figure2a.md").read_text() == page
    assert [x.startswith("| ROSMO | 1.000 ± 0.000 |") for x in tasks[:3]] == [True, False, False]
    assert (out / "figure2a.png").read_bytes()[:4] == b"\x89PNG"


def test_of_two_runs_of_a_cell_the_one_with_more_seeds_counts(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [5.0], [5.0])
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0, 2.0], [1.0, 2.0])
    out = make(tmp_path, "table1", "figure9")
    assert "| ROSMO | 1.500 ± 0.500 |" in (out / "table1.md").read_text()
    assert (out / "figure9.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_have_a_legend_when_the_first_cell_is_empty(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    write_run(tmp_path / "runs" / "a", "muzero_unplugged_bsuite", [1.0], [1.0], noise=0.3)
    make(tmp_path, "figure9")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MuZero Unplugged"]


def test_runs_with_other_seeds_are_put_together(tmp_path):
    parts = [("a", 0, 1.0, "1"), ("b", 2, 3.0, "22"), ("c", 0, 9.0, "3"), ("d", 1, 2.0, "42")]
    for folder, seed, score, commits in parts:
        run = (tmp_path / "runs" / folder, "rosmo_bsuite", [score], [score])
        write_run(*run, seed=seed, commits=commits)
    out = make(tmp_path, "table1")
    page = (out / "table1.md").read_text()
    assert "| ROSMO | 2.000 ± 0.816 |" in page
    assert "| ROSMO | catch, noise 0.0 | 3 | 2,000 | 1, 2, 4 |" in page  # not the other seed 0's
    with (out / "table1.csv").open() as file:
        rows = {int(row["seed"]): float(row["return"]) for row in csv.DictReader(file)}
    assert rows == {0: 1.0, 1: 2.0, 2: 3.0}
    assert (
        "| ROSMO | 1.500 ± 0.500 |"
        in (make(tmp_path, "table1", num_seeds=2) / "table1.md").read_text()
    )


def test_without_a_run_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"No run of figure2c with 2,000 updates in .*runs"):
        make(tmp_path, "figure2c")
    assert not list((tmp_path / "out").iterdir())


SHELL_SCRIPTS = [path for path in (ROOT / "benchmark").glob("*.sh") if "report" in path.read_text()]


@pytest.mark.parametrize("name", sorted(path.name for path in SHELL_SCRIPTS))
def test_shell_scripts_start_runs_that_their_report_finds(tmp_path, name):
    """The commands are recorded by a stand-in for python, and its runs fill every cell."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
    fake.chmod(0o755)
    command = ["bash", str(ROOT / "benchmark" / name), "--total-updates", str(UPDATES)]
    command += [] if "atari" in name else ["--num-seeds", "2"]
    subprocess.run(command, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    *commands, last = (tmp_path / "commands").read_text().splitlines()
    commands = [line for line in commands if not line.startswith("benchmark/")]
    for i, line in enumerate(commands):
        script, *options = line.split()
        module = importlib.import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=options)
        scores = [1.0] * getattr(args, "num_seeds", 1)
        write_run(tmp_path / "runs" / str(i), module.__name__, scores, scores, **vars(args))
    script, *options = last.split()
    assert script == "benchmark/report.py"
    args = tyro.cli(report.Args, args=options)
    assert args.total_updates == UPDATES
    out = make(tmp_path, *args.items, num_seeds=args.num_seeds)
    for item in args.items:
        assert "Not run" not in (out / f"{item}.md").read_text()


def test_the_command_line_names_the_items():
    command = [sys.executable, "benchmark/report.py", "table99"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "figure2a" in result.stderr + result.stdout
