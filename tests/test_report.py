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
from rliable import metrics

import collect_bsuite
import report

UPDATES = 2000
BSUITE_DATA = {"episodes": 2000, "transitions": 18000, "mean_return": 0.7182, "crc32": 1234}
ATARI_DATA = {
    "env_id": "MsPacman", "source": "dqn", "episodes": 99, "steps": 60984, "mean_return": 512.5,
    "crc32": 1234,
}  # fmt: skip


def write_run(
    folder, script, returns, finished=True, commits=("0123456789abcdef",), data=None, **arguments
):
    """A run of two evaluations whose seeds ended with these returns."""
    counts = {"total_updates": UPDATES, "log_every": 1000}
    if script.endswith("bsuite"):
        counts["num_seeds"] = len(returns)
    args = importlib.import_module(script).Args(**(counts | arguments))
    data = data or (BSUITE_DATA if script.endswith("bsuite") else ATARI_DATA)
    config = {"args": dataclasses.asdict(args), "script": f"{script}.py", "data": data}
    config["starts"] = [{"commit": commit, "device": "1 x cpu"} for commit in commits]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    lines = []
    for seed, value in enumerate(returns, args.seed):
        for update in (1000, 2000):
            lines.append({"update": update, "seed": seed, "eval/return_mean": value - 1})
        final = {"final/returns": [value], "final/return_mean": value}
        lines.append({"update": 2000, "seed": seed, **final})
    text = "".join(json.dumps(line) + "\n" for line in (lines if finished else lines[:-1]))
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(autouse=True)
def few_bootstraps(monkeypatch):
    monkeypatch.setattr(report, "BOOTSTRAPS", 100)


def make(tmp_path, *items, num_seeds=None):
    args = report.Args(items, UPDATES, num_seeds, (tmp_path / "runs",), tmp_path / "out")
    report.main(args)
    return tmp_path / "out"


def test_known_normalised_scores():
    assert report.normalized_score("Pong", -20.3) == 0
    assert report.normalized_score("Pong", 18.25) == 1
    assert report.normalized_score("mountain_car", -1000.0) == 0
    assert report.normalized_score("cartpole", 1001.0) == 1
    assert report.normalized_score("catch", 0.17) == pytest.approx(0.5)
    assert report.normalized_score("RoadRunner", 11.0) is None
    assert report.REFERENCE_RETURNS == collect_bsuite.PAPER_TABLE6


TABLE8 = {  # BC, CRR, CQL, MuZero Unplugged, ROSMO
    "Amidar": (30.4, 22.1, 51.3, 76.5, 38.4),
    "Asterix": (2633, 6344, 26890, 29062, 25740),
    "Breakout": (85, 219, 418, 390, 441),
    "Frostbite": (586, 2854, 3337, 4051, 3996),
    "Gravitar": (400, 345, 52, 793, 754),
    "Jamesbond": (402, 513, 102, 602, 639),
    "MsPacman": (2733, 3737, 2142, 4539, 5020),
    "Phoenix": (5902, 5954, 3510, 6104, 21550),
    "Pong": (15.0, 19.1, 18.8, 18.5, 20.5),
    "Qbert": (7498, 12618, 13114, 13121, 15849),
    "Riverraid": (9614, 12280, 14887, 15157, 19399),
    "Seaquest": (1087, 3879, 2238, 6745, 6643),
}


def test_the_paper_s_scores_give_the_paper_s_interquartile_means():
    scores = [[report.normalized_score(game, x) for x in row] for game, row in TABLE8.items()]
    means = [metrics.aggregate_iqm(column[None]) for column in np.transpose(scores)]
    assert np.round(means, 2).tolist() == [0.60, 1.13, 0.84, 1.53, 1.91]


def test_table_has_mean_and_std_of_the_runs_and_names_what_is_missing(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", "rosmo_bsuite", [1.0, 0.5], noise=0.3)
    write_run(runs / "b", "muzero_unplugged_bsuite", [-1.0], noise=0.3)
    write_run(runs / "c", "rosmo_bsuite", [9.0], noise=0.3, batch_size=64)  # another cell
    write_run(runs / "d", "rosmo_bsuite", [9.0], noise=0.5, finished=False)
    out = make(tmp_path, "table1")
    page = (out / "table1.md").read_text()
    assert "| ROSMO |  |  | 0.750 ± 0.250 |  |" in page
    assert "| MuZero Unplugged |  |  | -1.000 ± 0.000 |  |" in page
    assert "Not run at 2,000 updates: ROSMO, noise 0.0, catch" in page
    assert "ROSMO, noise 0.5, catch" in page
    data = "2000 episodes, 18000 transitions, mean return 0.72"
    assert f"| ROSMO | catch, noise 0.3 | 2 | 2,000 | 0123456 | 1 x cpu | {data} |" in page
    with (out / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["return"]) for row in rows] == [1.0, 0.5, -1.0]
    scores = [1.0, 1.16 / 1.66, -0.34 / 1.66]
    assert [float(row["normalized_score"]) for row in rows] == pytest.approx(scores)


def test_aggregate_is_the_interquartile_mean_over_seeds_and_tasks(tmp_path):
    scores = np.random.default_rng(0).random((3, 4))
    for task, row in zip(report.TASKS, scores, strict=True):
        folder, (random, online) = tmp_path / "runs" / task, report.REFERENCE_RETURNS[task]
        returns = random + row * (online - random)
        write_run(folder, "rosmo_bsuite", returns, env_id=task, data_percent=10)
    write_run(tmp_path / "runs" / "e", "rosmo_bsuite", [1.0], env_id="catch", data_percent=1)
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
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [5.0])
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0, 2.0])
    out = make(tmp_path, "table1", "figure9")
    assert "| ROSMO | 1.500 ± 0.500 |" in (out / "table1.md").read_text()
    assert (out / "figure9.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_have_a_legend_when_the_first_cell_is_empty(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    write_run(tmp_path / "runs" / "a", "muzero_unplugged_bsuite", [1.0], noise=0.3)
    make(tmp_path, "figure9")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MuZero Unplugged"]


def test_runs_with_other_seeds_are_put_together(tmp_path):
    parts = [("a", 0, 1.0, "1"), ("b", 2, 3.0, "22"), ("c", 0, 9.0, "3"), ("d", 1, 2.0, "42")]
    for folder, seed, score, commits in parts:
        run = (tmp_path / "runs" / folder, "rosmo_bsuite", [score])
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


def test_a_cell_with_seeds_of_different_data_names_both(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0], seed=0)
    write_run(
        tmp_path / "runs" / "b",
        *("rosmo_bsuite", [1.0]),
        seed=1,
        data=BSUITE_DATA | {"mean_return": 0.5},
    )
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    words = "2000 episodes, 18000 transitions, mean return"
    assert f"| {words} 0.72; {words} 0.50 |" in page


def test_old_runs_count(tmp_path):
    """Their arguments are others: some are gone, and some are new and count as their defaults."""
    folder = tmp_path / "runs" / "bsuite"
    write_run(folder, "rosmo_bsuite", [0.5, 0.7], data="2000 episodes, as a sentence", noise=0.1)
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["behavior_advantage"]
    config["args"] |= {"compilation_cache": True, "wandb_entity": None, "abolished": 3}
    (folder / "config.json").write_text(json.dumps(config))
    lines = (folder / "metrics.jsonl").read_text()
    lines = lines.replace('"final/returns"', '"final/normalized_score": 99.0, "final/returns"')
    (folder / "metrics.jsonl").write_text(lines)
    folder = tmp_path / "runs" / "atari"
    data = {"env_id": "MsPacman", "source": "dqn", "num_episodes": 99, "num_steps": 60984}
    write_run(folder, "crr_atari", [400.0], data=data, beta=0.3, **dict(report.SMALL))
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["clip_rewards"]
    config["args"] |= {"rlu_prefix": "gs://rl_unplugged", "run": 1, "capture_video": False}
    (folder / "config.json").write_text(json.dumps(config))

    out = make(tmp_path, "table1", "sweep_crr_atari")
    page = (out / "table1.md").read_text()
    assert "| ROSMO |  | 0.600 ± 0.100 |  |  |" in page
    assert "| 1 x cpu | 2000 episodes, as a sentence |" in page
    assert "99.0" not in (out / "table1.csv").read_text()
    page = (out / "sweep_crr_atari.md").read_text()
    assert "| CRR |  | 400.000 ± 0.000 |  |" in page
    assert "| MsPacman-dqn, 99 episodes, 60,984 steps |" in page


def test_data_of_atari_in_words():
    words = "MsPacman-dqn, 99 episodes, 60,984 steps, mean return 512.50"
    assert report.describe(ATARI_DATA) == words


def test_a_run_that_is_being_written_is_not_finished(tmp_path):
    """The last line of its metrics is cut short."""
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [0.5], finished=False)
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0])
    with (tmp_path / "runs" / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2000, "see')
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    assert "| ROSMO | 1.000 ± 0.000 |" in page


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
        returns = [1.0] * getattr(args, "num_seeds", 1)
        write_run(tmp_path / "runs" / str(i), module.__name__, returns, **vars(args))
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
