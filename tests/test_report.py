"""Tables and figures from the folders of made-up runs."""

import base64
import csv
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import ROOT
from helpers import ATARI_DATA, BSUITE_DATA, UPDATES, write_run
from scipy.stats import mannwhitneyu, trim_mean

import paper
import prepare_atari
import report
import run
import throughput
import throughput_loader


@pytest.fixture(autouse=True)
def few_bootstraps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no data
    monkeypatch.setattr(report, "BOOTSTRAPS", 100)
    monkeypatch.setattr(report, "CURVE_BOOTSTRAPS", 20)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by the names of their files."""
    saved, savefig = {}, report.Figure.savefig

    def save(self, path, **options):
        saved[path.name] = self
        savefig(self, path, **options)

    monkeypatch.setattr(report.Figure, "savefig", save)
    return saved


def shown(figure) -> list:
    return [axes for axes in figure.axes if axes.get_visible()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def note(figure) -> str:
    return figure.legends[0].get_title().get_text().replace("\n", " ")


def lines(axes) -> dict[str, float]:
    """The heights of the lines of known returns."""
    return {x.get_label(): x.get_ydata()[0] for x in axes.lines if x.get_label() in report.LINES}


def make(tmp_path, *items, further=(), **options):
    options = {"total_updates": UPDATES, "runs": (tmp_path / "runs",)} | options
    args = report.Args(items, **options, out=tmp_path / "out")
    report.main(args, list(further))
    return tmp_path / "out"


def rows(page: str, head: str) -> dict[str, list[str]]:
    """The table of a page under the heading `head`, by the first column."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {cell[0]: cell[1:] for cell in cells}


def numbers(text: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"-?[\d,]*\.\d+", text)]


def test_known_normalised_scores():
    assert report.normalized_score("Pong", -20.3) == 0
    assert report.normalized_score("Pong", 18.25) == 1
    assert report.normalized_score("mountain_car", -1000.0) == 0
    assert report.normalized_score("cartpole", 1001.0) == 1
    assert report.normalized_score("catch", 0.17) == pytest.approx(0.5)
    assert np.isnan(report.normalized_score("AirRaid", 11.0))


def test_table_has_mean_and_std_of_the_runs_and_names_what_is_missing(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", "rosmo_bsuite", [1.0, 0.5], noise=0.3)
    write_run(runs / "b", "muzero_unplugged_bsuite", [-1.0], noise=0.3)
    write_run(runs / "c", "rosmo_bsuite", [9.0], noise=0.3, batch_size=64)  # another cell
    write_run(runs / "d", "rosmo_bsuite", [9.0], noise=0.5, finished=False)
    out = make(tmp_path, "table1")
    page = (out / "table1.md").read_text()
    assert "| ROSMO |  |  | 0.750 ± 0.250 (2 seeds) |  |" in page
    assert "| MuZero Unplugged |  |  | -1.000 (1 seed) |  |" in page
    assert "2 of 8 cells are finished, 2 of them with fewer than 5 seeds." in page
    assert "Not finished: ROSMO, noise ε = 0, 0.1 and 0.5 on catch; " in page
    data = "2,000 episodes, 18,000 transitions, mean return 0.72"
    assert "Not the paper's setting: 2,000 updates, not 200,000." in page
    where = f"1 x cpu | {data} | `{runs / 'a'}` |"
    assert f"| ROSMO | catch, noise ε = 0.3 | 2 | 2,000 | 0123456 | {where}" in page
    with (out / "table1.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(row["return"]) for row in lines] == [1.0, 0.5, -1.0]
    scores = [1.0, 1.16 / 1.66, -0.34 / 1.66]
    assert [float(row["normalized_score"]) for row in lines] == pytest.approx(scores)


def test_aggregate_is_the_interquartile_mean_over_seeds_and_tasks(tmp_path):
    scores = np.random.default_rng(0).random((3, 4))
    for task, row in zip(paper.TASKS, scores, strict=True):
        folder, (random, online) = tmp_path / "runs" / task, paper.REFERENCE_RETURNS[task]
        returns = random + row * (online - random)
        write_run(folder, "rosmo_bsuite", returns, env_id=task, data_percent=10)
    write_run(tmp_path / "runs" / "e", "rosmo_bsuite", [1.0], env_id="catch", data_percent=1)
    out = make(tmp_path, "figure2a")
    expected = np.sort(scores.ravel())[3:9].mean()  # the middle half of twelve
    page = (out / "figure2a.md").read_text()
    share_1, share_10, *_ = rows(page, "IQM")["ROSMO"]
    mean, low, high = numbers(share_10)
    assert mean == pytest.approx(expected, abs=5e-4)
    assert scores.min() <= low <= mean <= high <= scores.max()
    assert share_1 == ""  # one task of three at 1% is no cell
    assert (make(tmp_path, "figure2a") / "figure2a.md").read_text() == page
    assert rows(page, "catch")["ROSMO"][0] == "1.000 (1 seed)"
    assert rows(page, "cartpole")["ROSMO"][0] == ""
    assert (out / "figure2a.png").read_bytes()[:4] == b"\x89PNG"


def test_of_two_runs_of_a_cell_the_one_with_more_seeds_counts(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [5.0])
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0, 2.0])
    out = make(tmp_path, "table1", "figure9")
    assert "| ROSMO | 1.500 ± 0.500 (2 seeds) |" in (out / "table1.md").read_text()
    assert (out / "figure9.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_have_a_legend_when_the_first_cell_is_empty(tmp_path, figures):
    write_run(tmp_path / "runs" / "a", "muzero_unplugged_bsuite", [1.0], noise=0.3)
    make(tmp_path, "figure9")
    known = ["online DQN", "data", "random play"]
    assert legend(figures["figure9.png"]) == ["MuZero Unplugged", *known]


def test_a_legend_of_long_names_is_as_wide_as_its_figure(tmp_path):
    figure, (axes,) = report.panels(1)
    lines = {f"MOReL, quantile 0.{i * '9'}, long": axes.plot([i])[0] for i in range(1, 8)}
    report.finish(figure, lines, "a note", tmp_path / "figure.png")
    (drawn,) = figure.legends
    assert drawn.get_window_extent().width <= figure.bbox.width
    assert legend(figure) == list(lines)


def test_table_2_has_the_curves_of_all_methods_on_each_task(tmp_path, figures):
    for i, script in enumerate(("bc", "crr", "cql", "muzero_unplugged", "rosmo")):
        for task in paper.TASKS:
            folder = tmp_path / "runs" / f"{i}{task}"
            write_run(folder, f"{script}_bsuite", [0.5, 0.7], env_id=task)
    page = (make(tmp_path, "table2", seeds=(0, 1)) / "table2.md").read_text()
    assert rows(page, "task")["catch"] == ["0.600 ± 0.100"] * 5
    assert "15 of 15 cells are finished.\n" in page
    assert "Not the paper's setting: 2,000 updates, not 200,000; seeds 0, 1." in page
    assert "![Table 2: the five methods on BSuite](table2.png)" in page
    panels = shown(figures["table2.png"])
    assert [axes.get_title() for axes in panels] == list(paper.TASKS)
    assert legend(figures["table2.png"])[:5] == list(paper.METHODS)
    for task, axes in zip(paper.TASKS, panels, strict=True):
        assert len(axes.lines) == 5 + 3
        random, online = paper.REFERENCE_RETURNS[task]
        assert lines(axes) == {"random play": random, "online DQN": online, "data": 0.72}


def test_lines_of_known_returns_do_not_stretch_a_panel():
    """A line that is far away is named at the edge, also in panels that share their limits."""
    _, (axes, other) = report.panels(2)
    axes.plot([0, 1], [230, 380])
    other.sharey(axes)
    other.plot([0, 1], [260, 240])
    known = [("online DQN", 4171.53), ("random play", 247.97)]
    for one in (axes, other):
        report.draw_references(one, known)
        assert lines(one) == dict(known)
        low, high = one.get_ylim()
        assert 200 < low < 230
        assert 380 < high < 420
        assert [text.get_text() for text in one.texts] == ["↑ online DQN 4,172", ""]
    near = report.panels(1)[1][0]
    near.plot([0, 1], [0.4, 0.9])
    report.draw_references(near, [("online DQN", 1.0), ("random play", -0.66)])
    assert near.get_ylim()[1] > 1
    assert [text.get_text() for text in near.texts] == ["", "↓ random play -0.66"]


def test_figures_say_what_is_averaged_what_is_shaded_and_how_much_is_missing(tmp_path, figures):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0, 0.5], noise=0.3)
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0, 0.5], data_percent=10)
    out = make(tmp_path, "figure9", "figure2a")
    words = "Single evaluations, mean over seeds. Shaded: the standard deviation over seeds, but "
    words += "not beyond the lowest and the highest seed. 1 of 8 cells, 1 of them with fewer than "
    words += "5 seeds."
    assert note(figures["figure9.png"]) == words
    assert f"\n{words} Lines: mean returns of random play, " in (out / "figure9.md").read_text()
    words = "IQM over seeds and tasks. Bars: 95% stratified bootstrap intervals. 1 of 24 cells, 1 "
    words += "of them with fewer than 5 seeds."
    assert note(figures["figure2a.png"]) == words
    assert f"\n{words} Lines: scores of random play and " in (out / "figure2a.md").read_text()
    cells = {("ROSMO", 0.0, "catch"): report.put_together(run.read_runs((tmp_path / "runs",))[:1])}
    long = cells["ROSMO", 0.0, "catch"]._replace(updates=np.arange(50))
    words = report.figure_note(paper.ITEMS["figure9"], {("ROSMO", 0.0, "catch"): long})
    assert words.startswith("Moving averages over 3 evaluations, mean over seeds. Shaded: ")


def test_panels_and_values_without_a_run_are_left_out(tmp_path, figures):
    """Of a task that is in several panels, the limits are the same."""
    for i, (task, width) in enumerate((("catch", 32), ("catch", 256), ("cartpole", 256))):
        arguments = {"env_id": task, "data_percent": 10, "dynamics_hidden": width}
        write_run(tmp_path / "runs" / str(i), "rosmo_bsuite", [1.0, i], **arguments)
    make(tmp_path, "figure10", "figure2b")
    panels = shown(figures["figure10.png"])
    titles = ["catch, 32 hidden units", "catch, 256 hidden units", "cartpole, 256 hidden units"]
    assert [axes.get_title() for axes in panels] == titles
    assert panels[0].get_ylim() == panels[1].get_ylim() != panels[2].get_ylim()
    panels = shown(figures["figure2b.png"])
    assert [axes.get_title() for axes in panels] == ["catch", "cartpole"]
    for axes in panels:
        assert [text.get_text() for text in axes.get_xticklabels()] == ["32", "256"]


@pytest.mark.parametrize("item", paper.ITEMS.values(), ids=paper.ITEMS)
def test_methods_of_a_figure_have_colors_of_their_own(item):
    colors = {method: report.color(item, method) for method in item.methods}
    assert len(set(colors.values())) == len(colors)
    assert colors.get("ROSMO", "C0") == "C0"


def test_the_labels_of_own_runs_have_colors_of_their_own():
    labels = ("ROSMO", "CRR", *"abcdefg")
    item = paper.Item("", "curves", dict.fromkeys(labels), ("catch",), (0,))
    assert len({report.color(item, label) for label in labels}) == len(labels)


def test_the_same_runs_have_the_same_interval_on_every_page():
    rng = np.random.default_rng(0)
    a, b, mean = rng.random((5, 3)), rng.random((5, 3)), lambda x: np.array([x.mean()])
    alone, beside = report.intervals({"a": a}, mean), report.intervals({"b": b, "a": a}, mean)
    np.testing.assert_array_equal(alone["a"], beside["a"])


def test_known_returns_stand_on_the_page(tmp_path):
    """Of Tables 5 and 6. The numbers of Table 1 are in a picture, those of Table 8 are not."""
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0])
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0], noise=0.3, data=OTHER_DATA)
    write_run(tmp_path / "runs" / "c", "rosmo_atari", [1.0], env_id="Pong", data=STORE)
    out = make(tmp_path, "table1", "table8")
    page = (out / "table1.md").read_text()
    assert "The paper's own numbers of this item are not copied here." in page
    known = rows(page, "mean return")
    assert known["catch"] == ["-0.66", "1.00", "0.72", "0.71"]
    assert known["catch, noise ε = 0.3"] == ["-0.66", "1.00", "0.50", "0.25"]
    page = (out / "table8.md").read_text()
    assert "not copied here" not in page
    assert rows(page, "mean return")["Pong"] == ["-20.30", "18.25", "512.50", "-"]


def test_learning_curves_of_runs_are_drawn_anew(tmp_path, figures, capsys):
    folder = tmp_path / "runs" / "a"
    write_run(folder, "rosmo_bsuite", [1.0, 0.5, 0.0])
    write_run(tmp_path / "runs" / "b", "bc_bsuite", [1.0], finished=False)
    report.main(report.Args(("curves", str(tmp_path / "runs"))), [])
    assert capsys.readouterr().out == f"See {folder / 'learning_curve.png'}.\n"
    assert not (tmp_path / "runs" / "b" / "learning_curve.png").exists()
    (axes,) = shown(figures["learning_curve.png"])
    name, *path = axes.get_title().split("\n")
    assert (name, "".join(path)) == ("ROSMO on catch", str(folder))
    assert [x.get_ydata()[0] for x in axes.lines[:4]] == [0.0, -0.5, -1.0, -0.5]  # the mean last
    assert lines(axes) == {"random play": -0.66, "online DQN": 1.0, "data": 0.72}
    assert legend(figures["learning_curve.png"])[:2] == ["mean of the seeds", "a seed"]


def test_runs_with_other_seeds_are_put_together(tmp_path):
    changed = (f"{4:040}-dirty",)
    parts = [("a", 0, 1.0, "1"), ("b", 2, 3.0, "22"), ("c", 0, 9.0, "3"), ("d", 1, 2.0, changed)]
    for folder, seed, score, commits in parts:
        run = (tmp_path / "runs" / folder, "rosmo_bsuite", [score])
        write_run(*run, seed=seed, commits=commits)
    out = make(tmp_path, "table1")
    page = (out / "table1.md").read_text()
    assert "| ROSMO | 2.000 ± 0.816 (3 seeds) |" in page
    assert (
        "| ROSMO | catch, noise ε = 0 | 3 | 2,000 | 1, 2, 0000000-dirty |" in page
    )  # not the other seed 0's
    with (out / "table1.csv").open() as file:
        returns = {int(row["seed"]): float(row["return"]) for row in csv.DictReader(file)}
    assert returns == {0: 1.0, 1: 2.0, 2: 3.0}
    assert (
        "| ROSMO | 1.500 ± 0.500 |"
        in (make(tmp_path, "table1", seeds=(0, 1)) / "table1.md").read_text()
    )


OTHER_DATA = BSUITE_DATA | {"mean_return": 0.5}
TRANSITIONS = "2,000 episodes, 18,000 transitions"
STORE = {"source": "rlu", "episodes": 99, "steps": 60984, "mean_return": 512.5, "rom": "aa"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (BSUITE_DATA, OTHER_DATA, f"differ in mean return: {TRANSITIONS}, mean return 0.72 with"),
        (BSUITE_DATA, BSUITE_DATA | {"transitions": 17_000}, "differ in steps"),
        (BSUITE_DATA, BSUITE_DATA | {"crc32": 4321}, "differ in checksum"),
        (
            "2000 episodes, 18000 transitions, mean return 0.72",
            OTHER_DATA,
            f"differ in mean return: {TRANSITIONS}, mean return 0.72 with",
        ),
    ],
)
def test_runs_with_other_data_are_refused(tmp_path, first, second, message):
    """Also of old runs, which wrote less down; the page of --mix says so."""
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0], data=first)
    write_run(tmp_path / "runs" / "b", "muzero_unplugged_bsuite", [1.0], data=second)
    write_run(tmp_path / "runs" / "c", "rosmo_bsuite", [1.0], noise=0.1, data=OTHER_DATA)
    with pytest.raises(SystemExit, match=message) as end:
        make(tmp_path, "table1")
    assert "Choose folders with --runs, or give --mix." in str(end.value)
    assert not list((tmp_path / "out").iterdir())
    page = (make(tmp_path, "table1", mix=True) / "table1.md").read_text()
    assert f"Mixed runs: the whole data of catch {message}" in page
    assert f"table1 --total-updates 2000 --runs {tmp_path / 'runs'} --mix --out" in page


def test_seeds_of_a_cell_with_other_data_are_refused(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0], seed=0)
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0], seed=1, data=OTHER_DATA)
    with pytest.raises(SystemExit, match="the whole data of catch differ in mean return"):
        make(tmp_path, "table1")
    page = (make(tmp_path, "table1", mix=True) / "table1.md").read_text()
    words = "2,000 episodes, 18,000 transitions, mean return"
    assert f"| {words} 0.72; {words} 0.50 |" in page


def test_local_data_and_rl_unplugged_do_not_mix(tmp_path):
    """Nor over games, of which the numbers themselves say nothing."""
    write_run(tmp_path / "runs" / "a", "bc_atari", [1.0], env_id="Pong", data=STORE)
    other = STORE | {"source": "dqn", "episodes": 7}
    write_run(tmp_path / "runs" / "b", "bc_atari", [1.0], env_id="Asterix", data=other)
    message = "the data's source differs: dqn with BC on Asterix; rlu with BC on Pong"
    with pytest.raises(SystemExit, match=message):
        make(tmp_path, "table8")
    page = (make(tmp_path, "table8", env_ids=("Asterix",)) / "table8.md").read_text()
    assert "data of a local online DQN, not of RL Unplugged." in page


def test_runs_with_another_evaluation_are_left_out_and_named(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0])
    folder = tmp_path / "runs" / "b"
    write_run(folder, "muzero_unplugged_bsuite", [1.0], final_eval_episodes=5)
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    assert f"Left out, as they differ: {folder}: final_eval_episodes 5, not 100." in page
    assert rows(page, "catch")["MuZero Unplugged"][0] == ""
    further = ["--final-eval-episodes", "5"]
    page = (make(tmp_path, "table1", further=further) / "table1.md").read_text()
    assert rows(page, "catch")["MuZero Unplugged"][0] == "1.000 (1 seed)"
    assert "2,000 updates, not 200,000; `--final-eval-episodes 5`." in page
    write_run(tmp_path / "runs" / "c", "muzero_unplugged_bsuite", [1.0])
    folder = tmp_path / "runs" / "d"  # of a seed that the cell lacks
    write_run(folder, "muzero_unplugged_bsuite", [1.0], seed=1, final_eval_episodes=7)
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    assert f"Left out, as they differ: {folder}: final_eval_episodes 7, not 100." in page


def test_greedy_actions_have_a_report_of_their_own(tmp_path, capsys):
    folder = tmp_path / "runs" / "a"
    write_run(folder, "rosmo_bsuite", [1.0, 1.0])
    write_run(tmp_path / "runs" / "b", "muzero_unplugged_bsuite", [0.5])  # which did not tell them
    write_run(tmp_path / "runs" / "c", "bc_bsuite", [0.5])  # nor did this, of another item
    greedy = {"final/returns_greedy": [-1.0, 0.0]}
    change_lines(folder, lambda line: greedy if "final/returns" in line else {})
    page = (make(tmp_path, "table1", greedy=True) / "table1.md").read_text()
    assert rows(page, "catch")["ROSMO"] == ["-0.500 ± 0.000 (2 seeds)", "", "", ""]
    assert rows(page, "catch")["MuZero Unplugged"] == [""] * 4
    assert "Final returns and scores are of greedy actions" in page
    assert "Runs that have none count as not finished: 1." in page
    with pytest.raises(SystemExit, match="--greedy is not for compare"):
        report.main(report.Args(("compare", f"a={folder}"), greedy=True), [])
    assert page.rstrip().endswith(f" --greedy --out {tmp_path / 'out'}`.")
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    assert page.rstrip().endswith(f" --out {tmp_path / 'out'}`.")
    with pytest.raises(SystemExit, match="--greedy would write over the pages"):
        report.main(report.Args(("table1",), greedy=True), [])
    with pytest.raises(SystemExit):
        make(tmp_path, "table1", methods=("MuZero Unplugged",), greedy=True)
    assert ". 1 lack greedy returns." in capsys.readouterr().err


def test_runs_that_are_left_out_are_counted(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0])
    for i in range(12):
        folder = tmp_path / "runs" / f"b{i}"
        write_run(folder, "muzero_unplugged_bsuite", [1.0], final_eval_episodes=5, seed=i % 5)
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    (line,) = (x for x in page.splitlines() if x.startswith("Left out, as they differ: "))
    assert line.count("final_eval_episodes 5") == 10
    assert line.endswith("; and 2 more.")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0] * 5)
    for words in (("table1",), ("compare", "a=~/runs/a"), ("curves", "~/runs")):
        args = report.Args(words, out=None if words[0] == "curves" else Path("~/out"))
        args = args if words[1:] else dataclasses.replace(args, runs=(Path("~/runs"),))
        report.main(dataclasses.replace(args, total_updates=None if words[1:] else UPDATES), [])
    assert {"table1.md", "compare.md"} < {x.name for x in (tmp_path / "out").iterdir()}
    assert (tmp_path / "runs" / "a" / "learning_curve.png").exists()


def test_what_morel_imagines_is_on_the_page(tmp_path):
    folder = tmp_path / "runs" / "a"
    options = {"env_id": "MsPacman", "total_updates": 1250, "halt_penalty": -10.0}
    write_run(folder, "morel_atari", [5.0], **options)
    path = folder / "metrics.jsonl"
    first = {"charts/threshold": 0.03, "charts/halt_rate_logged": 0.01}
    lines = [first | {"charts/halt_rate_random": 0.02, "update": 0, "seed": 0}]
    lines.append({"update": 10, "seed": 0, "charts/episodes": 0.0})
    for update, episodes, halts, imagined in ((20, 2.0, 0.5, -4.0), (40, 1.0, 0.25, 1.5)):
        line = {"charts/halt_rate": halts, "charts/episode_return": imagined}
        line |= {"charts/episodes": episodes, "eval/returns": [update, update + 2.0]}
        lines.append(line | {"update": update, "seed": 0})
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + path.read_text())
    page = (make(tmp_path, "table7") / "table7.md").read_text()
    found = rows(page.partition("## Imagined episodes")[2], "")["MOReL"]
    assert found[:5] == ["MsPacman", "0", "0.0300", "1.0%", "2.0%"]
    # 10 updates of 2 episodes and 20 of one; -4 + 0.5 * 10 and 1.5 + 0.25 * 10
    assert found[5:7] == ["15 of 40", "1.00 to 4.00"]
    # the deviation of 20, 22, 40, 42 is 11.60
    assert found[7] == "31.00 ± 5.80"
    path.write_text(path.read_text().replace('"charts/threshold": 0.03, ', ""))  # it was not finite
    page = (make(tmp_path, "table7") / "table7.md").read_text()
    assert rows(page.partition("## Imagined episodes")[2], "")["MOReL"][2] == "nan"


def test_intervals_are_those_of_a_bootstrap_by_hand(tmp_path, monkeypatch):
    """Of two seeds on one task, one draw in four has each alone and two have both."""
    monkeypatch.setattr(report, "BOOTSTRAPS", 2000)
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [0.17, 1.0])  # scores 0.5 and 1
    write_run(tmp_path / "runs" / "b", "muzero_unplugged_bsuite", [0.17, 0.17])
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    rosmo = rows(page, "method")["ROSMO"]
    assert rosmo[0] == "noise ε = 0"
    assert [numbers(x) for x in rosmo[1:]] == [*[[0.75, 0.5, 1.0]] * 2, [0.25, 0.0, 0.5]]
    chance = rows(page, "probability of improvement")["ROSMO > MuZero Unplugged"]
    # One seed is better and one the same; with one score that differs one method is the better.
    assert chance[1] == "0.750 [0.500, 1.000], p = 1.000"
    assert "of a stratified bootstrap; p: exact two-sided permutation test. The words" in page


def test_a_p_value_below_all_draws_is_said_so(tmp_path):
    for task in ("catch", "mountain_car", "cartpole"):
        low, high = np.array(paper.REFERENCE_RETURNS[task]) @ [[0.9, 0.1], [0.1, 0.9]]
        for script, start in (("rosmo", high), ("bc", low)):
            folder = tmp_path / "runs" / f"{script}-{task}"
            write_run(folder, f"{script}_bsuite", [*(start + np.arange(5) / 1000)], env_id=task)
    page = (make(tmp_path, "table2", methods=("ROSMO", "BC")) / "table2.md").read_text()
    assert rows(page, "probability of improvement")["ROSMO > BC"][0].endswith(", p < 0.001")


def test_p_values_are_those_of_all_exchanges_of_seeds():
    rng = np.random.default_rng(0)
    x, y = rng.random((3, 2)) + np.array([0.2, 0.9]), rng.random((3, 2))
    distances = []
    for first in itertools.product(itertools.combinations(range(6), 3), repeat=2):
        order = np.array([[*i, *({*range(6)} - {*i})] for i in first])
        z = np.concatenate([x, y])[order.T, [0, 1]]
        distances.append(abs(report.improvement_probability(z[:3], z[3:])[0] - 0.5))
    exact = np.mean(np.array(distances) >= distances[0] - 1e-9)
    assert 0.02 < exact < 0.3  # the methods differ, but not in every pair
    assert report.permutation_p(x, y) == pytest.approx(exact)
    x, y = rng.normal(size=(2, 5, 1)) + np.array([1, 0])[:, None, None]
    exact = mannwhitneyu(x[:, 0], y[:, 0], method="exact").pvalue
    assert report.permutation_p(x, y) == pytest.approx(exact)
    exact = mannwhitneyu(x[:3, 0], y[:, 0], method="exact").pvalue
    assert report.permutation_p(x[:3], y) == pytest.approx(exact)
    y = np.array([1.0, 0.98, 0.98, 0.96, 0.9])  # five ones and four lower ones: the ones of y, too
    assert report.permutation_p(np.ones((5, 1)), y[:, None]) == pytest.approx(12 / 252)


def test_aggregates_of_several_tasks_by_hand():
    rng = np.random.default_rng(0)
    scores = rng.random((4, 3)) * 2
    assert report.AGGREGATES["IQM"](scores) == pytest.approx(np.sort(scores.ravel())[3:9].mean())
    assert report.AGGREGATES["median"](scores) == pytest.approx(np.median(scores.mean(axis=0)))
    gap = np.maximum(1 - scores, 0).mean()
    assert report.AGGREGATES["optimality gap"](scores) == pytest.approx(gap)
    other = rng.random((5, 3))
    pairs = [[(x > y) for x in a for y in b] for a, b in zip(scores.T, other.T, strict=True)]
    assert report.improvement_probability(scores, other) == pytest.approx(np.mean(pairs))
    assert report.improvement_probability(scores, scores) == pytest.approx(0.5)


def test_the_iqm_of_returns_is_over_all_episodes(monkeypatch):
    """Its interval draws whole seeds."""
    monkeypatch.setattr(report, "BOOTSTRAPS", 2000)
    episodes = np.stack([np.arange(8.0), 100 + np.arange(8.0)])
    middle, low, high = report.pooled_iqm(episodes)
    assert middle == pytest.approx(np.mean([4, 5, 6, 7, 100, 101, 102, 103]))
    assert (low, high) == (3.5, 103.5)


def test_curves_are_iqms_at_every_evaluation():
    returns = np.random.default_rng(0).random((3, 2, 5, 4))
    middle, low, high = report.curve(returns)
    expected = [trim_mean(returns[:, :, t].ravel(), 0.25) for t in range(5)]
    assert middle == pytest.approx(expected)
    assert np.all((low <= middle) & (middle <= high))
    alone = report.curve(returns[:1])
    assert alone[1:] == pytest.approx(np.stack([alone[0]] * 2))  # one seed has no interval
    # The band is that of the moving average, in which what alternates cancels out.
    up_and_down = np.resize([1.0, -1.0], 50)
    _, low, high = report.curve(np.stack([up_and_down, -up_and_down])[:, None, :, None])
    assert report.window(50) == 3
    assert low == pytest.approx(-1 / 3)
    assert high == pytest.approx(1 / 3)


def test_hours_of_a_world_model_are_not_those_of_its_policy(tmp_path):
    write_run(tmp_path / "runs", "morel_atari", [1.0], data=ATARI_DATA, total_updates=1250)
    page = (make(tmp_path, "table7") / "table7.md").read_text()
    assert "The hours of MOReL and COMBO are without those of the world model." in page


def test_bands_do_not_pass_the_best_seed():
    result = report.Result([], *[np.arange(3)] * 4, np.arange(1), np.zeros((3, 1, 1)), None)
    result = result._replace(returns=np.array([1.0, 1.0, -1.0])[:, None, None])
    mean, low, high = report.cell_curve(paper.ITEMS["figure9"], "catch", result)
    assert (mean[0], high[0]) == (pytest.approx(1 / 3), 1.0)
    assert low[0] == pytest.approx(1 / 3 - np.std([1, 1, -1]))


def test_table8_stands_beside_the_paper_s(tmp_path):
    for i, (game, value) in enumerate((("Pong", 10.0), ("Gravitar", 700.0))):
        data = STORE | {"episodes": i + 1}
        write_run(tmp_path / "runs" / game, "rosmo_atari", [value], env_id=game, data=data)
    page = (make(tmp_path, "table8", "figure3") / "table8.md").read_text()
    assert "| Pong | ROSMO | 10.00 | 20.45 ± 0.36 | -10.45 (-51%) |" in page
    assert "| Gravitar | ROSMO | 700.00 | 753.57 ± 64.82 | -53.57 (-7%) |" in page
    assert "| Pong | BC |" not in page
    assert "2 of 60 cells are finished, 2 of them with fewer than 3 seeds." in page
    assert "; ROSMO on Amidar, Asterix, Breakout, " in page


def test_figure3_tells_when_the_level_is_reached(tmp_path):
    for game in ("Pong", "Breakout"):
        random, online = paper.REFERENCE_RETURNS[game]
        value = random + 1.6 * (online - random) + 1
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{game}{seed}"
            data = STORE | {"episodes": len(game)}
            write_run(folder, "rosmo_atari", [value], env_id=game, seed=seed, data=data)
    options = {"env_ids": ("Pong", "Breakout"), "methods": ("ROSMO",)}
    out = make(tmp_path, "figure3", **options)
    page = (out / "figure3.md").read_text()
    assert rows(page, "method")["ROSMO"] == ["1,000", "1.00", "1"]
    assert "| IQM | ROSMO |" not in page  # the paper's is over all games
    assert "Not the paper's setting: 2,000 updates, not 200,000; on Pong, Breakout." in page
    games = report.ITEMS["figure3"]._replace(tasks=("Pong", "Breakout"))
    cells = {("ROSMO", None, game): None for game in games.tasks}
    estimates = {("ROSMO", None): np.full((3, 4), 1.5)}
    assert report.paper_table(games, cells, estimates)[4] == (
        "| IQM | ROSMO | 1.50 | 1.94 | -0.44 (-23%) |"
    )
    assert (out / "figure3.png").exists()
    assert (out / "figure3-profiles.png").exists()
    assert "Hours are those of training" in page
    page = (make(tmp_path, "figure3", env_ids=("Pong", "Qbert")) / "figure3.md").read_text()
    assert "Hours are" not in page  # there is no curve of two games
    assert "No curves against" not in page


def test_cells_of_fewer_seeds_are_marked(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0, 0.5, 0.0])
    write_run(tmp_path / "runs" / "b", "rosmo_bsuite", [1.0, 0.5], noise=0.1)
    page = (make(tmp_path, "table1") / "table1.md").read_text()
    texts = ["0.500 ± 0.408 (3 seeds)", "0.750 ± 0.250 (2 seeds)"]
    assert rows(page, "catch")["ROSMO"][:2] == texts
    page = (make(tmp_path, "table1", seeds=(0, 1, 2)) / "table1.md").read_text()
    assert rows(page, "catch")["ROSMO"][:2] == ["0.500 ± 0.408", texts[1]]
    assert "2 of 8 cells are finished, 1 of them with fewer than 3 seeds." in page


def test_seeds_that_a_task_lacks_are_named(tmp_path):
    for task, returns in (("catch", [1.0, 0.5]), ("mountain_car", [-100.0]), ("cartpole", [9.0])):
        write_run(tmp_path / "runs" / task, "rosmo_bsuite", returns, env_id=task)
    page = (make(tmp_path, "figure2a") / "figure2a.md").read_text()
    sentence = (
        "Over all tasks, each counts with as many seeds as the task with the fewest has: ROSMO"
    )
    assert sentence in page
    page = (make(tmp_path, "figure2a", seeds=(0,)) / "figure2a.md").read_text()
    assert "as many seeds as" not in page


def test_single_seeds_have_no_interval_anywhere(tmp_path):
    for script in ("rosmo", "bc"):
        for game in ("Pong", "Breakout"):
            folder = tmp_path / "runs" / f"{script}{game}"
            data = STORE | {"episodes": len(game)}
            write_run(folder, f"{script}_atari", [9.0], env_id=game, data=data)
    page = (make(tmp_path, "table8", env_ids=("Pong", "Breakout")) / "table8.md").read_text()
    assert rows(page, "probability of improvement")["ROSMO > BC"] == ["0.500"]
    assert "Over seeds and all tasks together. The words" in page
    assert "bootstrap" not in page.split("## Normalised scores")[1]


def test_games_without_references_are_drawn_as_returns(tmp_path, figures):
    write_run(tmp_path / "runs" / "a", "rosmo_atari", [9.0], env_id="AirRaid", data_percent=10.0)
    out = make(tmp_path, "figure4a", env_ids=("AirRaid",))
    assert "![Figure 4(a)" in (out / "figure4a.md").read_text()
    (axes,) = shown(figures["figure4a.png"])
    assert figures["figure4a.png"].get_supylabel() == "return, AirRaid"
    assert axes.lines[0].get_ydata().tolist() == [8.0, 8.0]


def test_curves_of_scores_are_drawn_as_scores(tmp_path, figures):
    random, online = paper.REFERENCE_RETURNS["MsPacman"]
    value = random + 0.5 * (online - random) + 1  # its evaluations are lower by 1
    write_run(tmp_path / "runs" / "a", "rosmo_atari", [value], env_id="MsPacman", data=STORE)
    make(tmp_path, "figure4d")
    (axes,) = shown(figures["figure4d.png"])
    assert axes.lines[0].get_ydata() == pytest.approx([0.5, 0.5])
    known = lines(axes)
    assert (known["online DQN"], known["random play"]) == (1, 0)


def test_hours_that_differ_widely_are_drawn_on_a_logarithmic_axis(tmp_path, figures):
    for name in ("rosmo", "muzero_unplugged"):
        write_run(tmp_path / "runs" / name, f"{name}_bsuite", [1.0])
    make(tmp_path, "figure9")
    assert figures["figure9-time.png"].axes[0].get_xscale() == "linear"
    slow = tmp_path / "runs" / "muzero_unplugged"
    change_lines(slow, lambda line: {"wall_time": 20 * line.get("wall_time", 0)})
    make(tmp_path, "figure9")
    assert figures["figure9-time.png"].axes[0].get_xscale() == "log"


def test_hours_are_drawn_if_all_runs_tell_what_evaluation_took(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0])
    write_run(tmp_path / "runs" / "b", "muzero_unplugged_bsuite", [1.0])
    assert "figure9-time.png" in (make(tmp_path, "figure9") / "figure9.md").read_text()
    change_lines(tmp_path / "runs" / "b", lambda line: {"seconds/update": 0.0})
    page = (make(tmp_path, "figure9") / "figure9.md").read_text()
    assert "No curves against wall-clock: not all runs tell what evaluation took." in page
    assert rows(page.partition("## Time")[2], "hours of a run")["ROSMO"][-1] == "1 x cpu"
    assert "figure9-time.png" not in page


def test_hours_of_processes_with_other_numbers_of_seeds_are_not_compared(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0, 1.0])
    write_run(tmp_path / "runs" / "b", "muzero_unplugged_bsuite", [1.0])
    page = (make(tmp_path, "figure9") / "figure9.md").read_text()
    why = "No curves against wall-clock: runs train other numbers of seeds side by side."
    assert why in page
    assert "figure9-time.png" not in page


def test_single_seeds_are_marked(tmp_path, figures):
    for beta in (0.1, 0.3):
        folder, small = tmp_path / "runs" / str(beta), paper.SMALL
        write_run(folder, "crr_atari", [300.0], env_id="Breakout", beta=beta, **small)
    page = (make(tmp_path, "sweep_crr_atari") / "sweep_crr_atari.md").read_text()
    assert "One seed in each cell: there is no interval, and a difference may be chance." in page
    assert rows(page, "Breakout")["CRR"] == ["300.000", "300.000", ""]
    assert note(figures["sweep_crr_atari.png"]) == (
        "Single evaluations. One seed in each cell. 2 of 3 cells."
    )
    assert "±" not in page
    assert "[" not in page.split("## Runs")[0].replace("![", "")


def change_lines(folder, change) -> None:
    """Writes the metrics of a run anew, each line | change(line)."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x | change(x)) + "\n" for x in lines))


def test_the_caption_says_what_the_table_has(tmp_path):
    """The mean of these returns is 25, their IQM 0."""
    folder = tmp_path / "runs" / "a"
    write_run(folder, "rosmo_atari", [25.0], env_id="Pong", data=STORE)
    returns = {"final/returns": [0.0] * 15 + [100.0] * 5}
    change_lines(folder, lambda line: returns if "final/returns" in line else {})
    page = (make(tmp_path, "table8", env_ids=("Pong",)) / "table8.md").read_text()
    assert rows(page, "task")["Pong"][-1] == "0.000 (1 seed)"
    assert "\nIQM of the final returns, 20 episodes. One seed in each cell" in page
    assert "mean return, 20 episodes" not in page


def test_runs_without_a_final_evaluation_have_curves_alone(tmp_path):
    folder = tmp_path / "runs" / "a"
    write_run(folder, "rosmo_bsuite", [1.0, 0.5], final_eval_episodes=0)
    text = (folder / "metrics.jsonl").read_text()
    text = re.sub(r'"final/returns": .*}', '"final/returns": []}', text)
    (folder / "metrics.jsonl").write_text(text)
    further = ["--final-eval-episodes", "0"]
    page = (make(tmp_path, "figure9", further=further) / "figure9.md").read_text()
    assert "1 of 8 cells are finished, " in page
    assert rows(page, "catch")["ROSMO"] == [""] * 4
    assert "No run has a final evaluation." in page
    assert (tmp_path / "out" / "figure9.png").exists()


def test_pages_are_written_where_the_terminal_knows_ascii_alone(tmp_path):
    write_run(tmp_path / "a", "rosmo_bsuite", [1.0, 0.0])
    words = [sys.executable, str(ROOT / "benchmark" / "report.py"), "compare", "A=a"]
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = {"capture_output": True, "text": True, "env": os.environ | ascii_alone}
    result = subprocess.run(words, cwd=tmp_path, **options)
    assert result.returncode == 0, result.stderr
    assert "0.500 ± 0.500" in (tmp_path / "runs/report/compare.md").read_text("utf-8")


def test_one_file_holds_all_pages_with_their_images(tmp_path):
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0, 0.0])
    make(tmp_path, "table1")
    text = (make(tmp_path, "figure9") / "report.html").read_text()
    assert text.index('id="table1"') < text.index('id="figure9"')
    assert "<td>0.500 ± 0.500 (2 seeds)</td>" in text
    images = re.findall(r'src="([^"]+)"', text)
    assert len(images) == 2  # against updates and against hours
    for image in images:
        content = base64.b64decode(image.removeprefix("data:image/png;base64,"))
        assert content[:4] == b"\x89PNG"
    assert not re.search(r'(href|src)="(?!#|data:)', text)


def test_settings_that_vary_under_one_label_are_named(tmp_path):
    """Also if another label's script has no such argument."""
    write_run(tmp_path / "a" / "x", "rosmo_bsuite", [1.0], seed=0)
    write_run(tmp_path / "a" / "y", "rosmo_bsuite", [0.5], seed=1, behavior_coef=0.0)
    write_run(tmp_path / "b", "bc_bsuite", [0.0, 0.2])
    report.main(report.Args(("compare", "mine=a", "bc=b")), [])
    page = (tmp_path / "runs/report/compare.md").read_text()
    assert "behavior_coef: mine 0.0 or 0.2; " in page
    for folder, model in (("c", "one-world-model"), ("d", "other-world-model")):
        write_run(tmp_path / folder, "combo_atari", [0.0], world_model=model)
    report.main(report.Args(("compare", "c=c", "d=d")), [])
    page = (tmp_path / "runs/report/compare.md").read_text()
    assert 'world_model: c "one-world-model", d "other-world-model"' in page


def test_a_mean_is_that_of_the_returns(tmp_path):
    write_run(tmp_path / "a", "rosmo_bsuite", [1.0])
    change_lines(
        tmp_path / "a", lambda x: {"final/return_mean": 50.0} if "final/returns" in x else {}
    )
    (one,) = run.read_runs((tmp_path,))
    assert one.final == [1.0]


def test_a_figure_names_all_its_moving_averages(tmp_path):
    item = paper.ITEMS["figure9"]
    write_run(tmp_path / "a", "rosmo_bsuite", [1.0, 2.0])
    (short,) = run.read_runs((tmp_path,))
    long = short._replace(updates=np.arange(100))
    words = report.figure_note(
        item, {1: report.put_together([short]), 2: report.put_together([long])}
    )
    assert words.startswith("Moving averages over 1 or 5 evaluations")


def test_own_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a" / "x", "rosmo_bsuite", [1.0], seed=0, batch_size=64)
    write_run(tmp_path / "a" / "y", "rosmo_bsuite", [0.5], seed=1, batch_size=64)
    write_run(tmp_path / "b", "rosmo_bsuite", [0.0, 0.2])
    args = report.Args(("compare", "small batch=a", "default=b"))
    report.main(args, [])
    page = (tmp_path / "runs/report/compare.md").read_text()
    assert rows(page, "task")["catch"] == ["0.750 ± 0.250", "0.100 ± 0.100"]
    assert "Arguments that differ: batch_size: small batch 64, default 128." in page
    for name, steps in (("f", 4), ("g", 16)):  # an argument that the other has not
        script = "muzero_unplugged_bsuite"
        write_run(tmp_path / name, script, [0.1], seed=0, num_simulations=steps)
    report.main(report.Args(("compare", "default=b", "4=f", "16=g")), [])
    page = (tmp_path / "runs/report/compare.md").read_text()
    assert "num_simulations: 4 4, 16 16" in page
    write_run(tmp_path / "b" / "later", "rosmo_bsuite", [0.0], seed=2, finished=False)
    report.main(args, [])
    page = (tmp_path / "runs/report/compare.md").read_text()
    assert "Left out, as not finished: b/later." in page
    write_run(tmp_path / "c", "rosmo_bsuite", [0.0], final_eval_episodes=7)
    with pytest.raises(SystemExit, match="final_eval_episodes differs: 100 with b on"):
        report.main(report.Args(("compare", "b=b", "c=c")), [])
    write_run(tmp_path / "a" / "z", "rosmo_bsuite", [0.5], seed=1)
    with pytest.raises(SystemExit, match="small holds several runs of the same seed"):
        report.main(report.Args(("compare", "small=a")), [])
    write_run(tmp_path / "d" / "x", "rosmo_bsuite", [1.0], seed=0)
    write_run(tmp_path / "d" / "y", "rosmo_bsuite", [0.5], seed=1)
    lines = (tmp_path / "d" / "y" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "d" / "y" / "metrics.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(SystemExit, match=r"d/x and .*d/y were evaluated at other updates"):
        report.main(report.Args(("compare", "d=d")), [])
    (tmp_path / "d" / "y" / "metrics.jsonl").write_text(lines[-1] + "\n")  # no evaluations
    report.main(report.Args(("compare", "d=d/y", "default=b")), [])
    assert (
        rows((tmp_path / "runs/report/compare.md").read_text(), "task")["catch"][0]
        == "0.500 (1 seed)"
    )
    write_run(tmp_path / "e", "rosmo_bsuite", [0.0], eval_greedy=True)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    del config["args"]["eval_greedy"]  # of an old run, which had the default
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="eval_greedy differs: False with b on"):
        report.main(report.Args(("compare", "b=b", "e=e")), [])
    with pytest.raises(SystemExit, match="nowhere is not LABEL=FOLDER"):
        report.main(report.Args(("compare", "nowhere")), [])


def test_old_runs_count(tmp_path):
    """Their arguments are others: some are gone, and some are new and count as their defaults."""
    folder = tmp_path / "runs" / "bsuite"
    write_run(folder, "rosmo_bsuite", [0.5, 0.7], data="2000 episodes, as a sentence", noise=0.1)
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["behavior_advantage"]
    config["args"] |= {"compilation_cache": True, "wandb_entity": None}
    (folder / "config.json").write_text(json.dumps(config))
    lines = (folder / "metrics.jsonl").read_text()
    lines = lines.replace('"final/returns"', '"final/normalized_score": 99.0, "final/returns"')
    (folder / "metrics.jsonl").write_text(lines)
    folder = tmp_path / "runs" / "atari"
    data = {"env_id": "Breakout", "source": "dqn", "num_episodes": 99, "num_steps": 60984}
    small = paper.SMALL | {"env_id": "Breakout"}
    write_run(folder, "crr_atari", [400.0], data=data, beta=0.3, **small)
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["clip_rewards"]
    config["args"] |= {"rlu_prefix": "gs://rl_unplugged", "run": 1, "capture_video": False}
    (folder / "config.json").write_text(json.dumps(config))

    out = make(tmp_path, "table1", "sweep_crr_atari")
    page = (out / "table1.md").read_text()
    assert rows(page, "catch")["ROSMO"] == ["", "0.600 ± 0.100 (2 seeds)", "", ""]
    assert "| 1 x cpu | 2000 episodes, as a sentence |" in page
    assert "99.0" not in (out / "table1.csv").read_text()
    page = (out / "sweep_crr_atari.md").read_text()
    assert rows(page, "Breakout")["CRR"] == ["", "400.000", ""]
    assert "| dqn, 99 episodes, 60,984 steps |" in page


def test_data_of_atari_in_words():
    words = "dqn, 99 episodes, 60,984 steps, mean return 512.50"
    assert report.describe(ATARI_DATA) == words


def test_without_a_run_it_says_so(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit, match="1"):
        make(tmp_path, "figure2c")
    message = f"No run of figure2c with 2,000 updates in {tmp_path / 'runs'}.\n"
    assert capsys.readouterr().err == message
    assert not list((tmp_path / "out").iterdir())
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0])
    make(tmp_path, "figure2c", "table1")
    assert (tmp_path / "out" / "table1.md").exists()


@pytest.mark.parametrize("name", paper.ITEMS)
def test_runs_of_the_printed_commands_fill_every_cell(tmp_path, monkeypatch, capsys, name):
    """Of two games or tasks, with one seed or two."""
    item = paper.ITEMS[name]
    (tmp_path / "runs").mkdir()
    options = {"env_ids": item.tasks[:2], "seeds": item.seeds[:2], "total_updates": UPDATES}
    run.main(run.Args((name,), **options, runs=(tmp_path / "runs",), dry_run=True), [])
    for i, line in enumerate(capsys.readouterr().out.splitlines()):
        _, script, *words = line.split()
        module = importlib.import_module(Path(script).stem)
        args = vars(tyro.cli(module.Args, args=words))
        data = None if "num_seeds" in args else STORE | {"episodes": len(args["env_id"])}
        data = data and data | {"steps": int(args["data_percent"])}
        returns = [1.0, 2.0][: args.get("num_seeds", 1)]
        write_run(tmp_path / "runs" / str(i), module.__name__, returns, data=data, **args)
    out = make(tmp_path, name, **options)
    page = (out / f"{name}.md").read_text()
    cells = len(list(item.cells(options["env_ids"])))
    assert f"{cells} of {cells} cells are finished.\n" in page
    assert page.startswith(f"# {item.title}\n")
    assert (out / f"{name}.png").exists() == (item.form != "table")
    assert (out / f"{name}-time.png").exists() == (item.form in ("curves", "table and curves"))
    if item.argument and "_" in item.argument:
        assert item.argument not in page  # but words


def test_throughput_replaces_the_section_of_its_title_alone(tmp_path):
    path = tmp_path / "page.md"
    for title in ("## bsuite", "## bsuite --num-seeds 5", "## bsuite"):
        throughput.write_section(path, title, "text")
    titles = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert titles == ["# Throughput", "## bsuite", "## bsuite --num-seeds 5"]


def test_a_store_of_any_game_and_percent_is_measured(tmp_path):
    episode = helpers.random_episode(np.random.default_rng(0), 20, 3, is_terminal=True)
    meta = {"env_id": "Square", "source": "mine", "percent": 10.0, "num_actions": 3}
    meta |= {"steps_per_checkpoint": 100, "rom_sha256": None}
    prepare_atari.write_store(tmp_path / "store", meta, [episode])
    script = throughput_loader.script
    store = throughput.open_store(script, tmp_path / "store", script.Args())
    assert len(store.index) == 20


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        (throughput, {"domain": "bsuite", "windows": 0}, "--windows is 0; give at least 1"),
        (throughput, {"domain": "atari", "store": Path("no")}, "There is no store no"),
        (throughput, {"domain": "atari", "channels": 1}, "--channels is 1; give at least 2"),
        (throughput, {"domain": "bsuite", "channels": 16}, "--channels is not for bsuite"),
        (throughput, {"domain": "bsuite", "store": Path("no")}, "--store is not for bsuite"),
        (throughput, {"domain": "atari", "loader_threads": 8}, "is of no use without a --store"),
        (throughput, {"domain": "atari", "compile_only": True, "out": Path("x.md")}, "no page"),
        (throughput_loader, {"store": Path("no"), "threads": 0}, "--threads is 0; give at least 1"),
        (throughput_loader, {"store": Path("no")}, "There is no store no"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(tool, options, message):
    with pytest.raises(SystemExit, match=message):
        tool.main(tool.Args(**options))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["table99"], {}, "There is no table99; the items are .*figure2a"),
        (["compare"], {}, "Give LABEL=FOLDER"),
        (["compare", "x=runs"], {"seeds": (0,)}, "compare draws the folders that are named"),
        (["curves", "runs"], {"env_ids": ("catch",)}, "curves draws the folders that are named"),
        (["curves", "runs"], {"out": Path("pages")}, "curves draws the folders that are named"),
        (["compare", "x=a"], {"runs": (Path("b"),)}, "compare draws the folders that are named"),
        (["compare", "x=a", "--mixx"], {}, "compare has no option --mixx"),
        (["compare", "data=a"], {}, "the line of data is called so; choose another label"),
        (["curves"], {}, "Give folders with finished runs"),
        (["curves", "nowhere"], {}, "There is no folder nowhere"),
        (["compare", "=runs"], {}, "is not LABEL=FOLDER"),
        (["compare", "unset="], {}, "is not LABEL=FOLDER"),
        (["compare", "caf\udce9=runs"], {}, "a label has printable characters"),
        (["compare", "$x_{$=runs"], {}, "a label has printable characters, without \\$"),
        (["compare", "<b>=runs"], {}, "a label has printable characters"),
        (["compare", "lr=1=runs"], {}, "a finished run in 1=runs; a label ends at the first '='"),
        (["table1"], {"runs": (Path("nowhere"),)}, "--runs: there is no folder nowhere"),
    ],
)
def test_words_that_own_runs_do_not_know(tmp_path, monkeypatch, words, options, message):
    write_run(tmp_path / "runs", "bc_bsuite", [1.0])
    monkeypatch.chdir(tmp_path)
    further = [word for word in words if word.startswith("--")]
    words = tuple(word for word in words if word not in further)
    with pytest.raises(SystemExit, match=message):
        report.main(report.Args(words, **options), further)


def test_pages_and_figures_that_cannot_be_written_whole_leave_those_before(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_run(tmp_path / name, "bc_bsuite", [1.0, 2.0, 3.0], learning_rate=0.1 * ord(name))
    compare = ("compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}")
    commands = report.Args(compare, out=tmp_path / "out"), report.Args(("curves", str(tmp_path)))
    for args in commands:
        report.main(args, [])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"compare.md", "compare.png", "learning_curve.png"} <= {path.name for path in files}

    def fill_the_disk(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Figure, "savefig", fill_the_disk)
    for args in commands:
        with pytest.raises(OSError, match="No space"):
            report.main(args, [])
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["my_bsuite", "bc_bsuite.v2"])
def test_runs_of_a_script_that_is_half_written_are_compared(tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text("def main(")
    write_run(tmp_path / "a", "rosmo_bsuite", [1.0])
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace("rosmo_bsuite.py", f"{name}.py"))
    report.main(report.Args(("compare", f"mine={tmp_path / 'a'}"), out=tmp_path), [])
    assert "| task | mine |" in (tmp_path / "compare.md").read_text()


def test_runs_of_a_renamed_script_are_compared(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "rosmo_bsuite", [1.0], learning_rate=0.1 * len(name))
        path = tmp_path / name / "config.json"
        path.write_text(path.read_text().replace("rosmo_bsuite.py", f"my_{name}_bsuite.py"))
    words = ("compare", f"one | two={tmp_path / 'a'}", f"b={tmp_path / 'b'}")
    report.main(report.Args(words, out=tmp_path, mix=True), [])
    page = (tmp_path / "compare.md").read_text()
    assert "script: one | two" in page
    assert r"| task | one \| two | b |" in page
    assert page.rstrip().endswith(f" --mix --out {tmp_path}`.")


def test_an_item_that_is_refused_does_not_stop_the_others(tmp_path, capsys):
    for name, data in (("bc", BSUITE_DATA), ("crr", BSUITE_DATA | {"crc32": 2})):
        write_run(tmp_path / "runs" / name, f"{name}_bsuite", [1.0] * 3, data=data, seed=4)
    runs = tmp_path / "runs"
    write_run(runs / "rosmo", "rosmo_bsuite", [1.0] * 5, noise=0.1, data=BSUITE_DATA)
    options = {"total_updates": UPDATES, "runs": (runs,), "out": tmp_path}
    further = ["--data-dir", "data", "--overwrite"]
    with pytest.raises(SystemExit, match="1"):
        report.main(report.Args(("table2", "table1"), **options), [])
    assert "table2 would mix runs that cannot be compared" in capsys.readouterr().err
    assert not (tmp_path / "table2.md").exists()
    assert "1 of 8 cells" in (tmp_path / "table1.md").read_text()
    assert "table1" in (tmp_path / "report.html").read_text()
    report.main(report.Args(("table2",), **options, mix=True), further[:2])
    page = (tmp_path / "table2.md").read_text()
    assert "2 of 15 cells are finished, 2 of them with fewer than 5 seeds" in page  # seed 4 alone
    assert "--data-dir" not in page.partition("## Runs")[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [('final/returns": [2.0]', 'final/returns": [2, 2]'), ('"update": 1000,', '"update": 1500,')],
)
def test_runs_with_other_evaluations_are_not_put_together(tmp_path, old, new):
    """Of other numbers of episodes, or at other updates."""
    for seed, returns in ((0, [1.0]), (1, [2.0])):
        write_run(tmp_path / "runs" / str(seed), "bc_bsuite", returns, seed=seed)
    path = tmp_path / "runs/1/metrics.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit, match="were evaluated at other updates or episodes"):
        report.put_together(run.read_runs((tmp_path,)))


def test_old_runs_do_not_hide_that_new_ones_differ(tmp_path):
    old = "2000 episodes, 18000 transitions, mean return 0.72"
    for name, data in (("rosmo", old), ("bc", BSUITE_DATA), ("crr", BSUITE_DATA | {"crc32": 2})):
        write_run(tmp_path / "runs" / name, f"{name}_bsuite", [1.0], data=data)
    with pytest.raises(SystemExit, match=r"differ in checksum: .* with BC; .* with CRR"):
        make(tmp_path, "table2")


def test_old_runs_rounded_the_mean_return(tmp_path):
    old, new = "2000 episodes, 18000 transitions, mean return 635.14", 635.14501953125
    write_run(tmp_path / "runs" / "a", "rosmo_bsuite", [1.0], data=old)
    data = BSUITE_DATA | {"mean_return": new}
    write_run(tmp_path / "runs" / "b", "bc_bsuite", [1.0], data=data)
    page = (make(tmp_path, "table2") / "table2.md").read_text()
    assert "Mixed runs" not in page
    assert " or 635" not in page
    write_run(tmp_path / "runs" / "c", "crr_bsuite", [1.0], data=old.replace("14", "16"))
    with pytest.raises(SystemExit, match="the whole data of catch differ in mean return"):
        make(tmp_path, "table2")


def test_clipped_rewards_of_the_published_data_are_no_points_of_the_game(tmp_path):
    data = {"source": "run1", "episodes": 9, "steps": 99, "mean_return": 12.34}
    write_run(tmp_path / "runs" / "a", "rosmo_atari", [1.0], env_id="Pong", data=data)
    page = (make(tmp_path, "table8") / "table8.md").read_text()
    assert rows(page, "mean return")["Pong"] == ["-20.30", "18.25", "-", "-"]
    assert "The published data are left out: their rewards may be clipped to -1..1." in page


def test_moving_averages_stand_at_their_last_evaluation(tmp_path, figures):
    write_run(tmp_path / "a", "rosmo_bsuite", [1.0])
    (one,) = run.read_runs((tmp_path,))
    one = one._replace(updates=np.arange(50), returns=np.arange(50.0).reshape(1, 50, 1))
    report.draw_run(one)  # over three evaluations
    line = shown(figures["learning_curve.png"])[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(2, 50))
    np.testing.assert_allclose(line.get_ydata(), np.arange(1, 49))


def test_moving_averages_of_a_page_stand_at_their_last_evaluation(tmp_path, figures):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "rosmo_atari", [1.0], env_id="Pong", seed=seed)
    one = report.put_together(run.read_runs((tmp_path,)))
    x = np.arange(50)  # averages are over three
    one = one._replace(updates=x, hours=10.0 * np.array([x, x]), returns=np.ones((2, 50, 4)) * 0.5)
    one.returns[..., :3] = 0  # a run's mean return is 1/8
    item = paper.ITEMS["figure6"]._replace(methods={"ROSMO": None}, tasks=("Pong",))
    cells = {("ROSMO", None, "Pong"): one}
    for against, scale in (("updates", 1), ("hours", 10)):
        report.draw_curves(item, cells, tmp_path / f"{against}.png", against, "")
        line = shown(figures[f"{against}.png"])[0].lines[0]
        np.testing.assert_array_equal(line.get_xdata(), scale * np.arange(2, 50))
    curves = report.pooled_curves(item, cells, ("Pong",))
    updates, hours, iqm, _ = curves["ROSMO"]
    np.testing.assert_array_equal([10 * updates, hours], [10 * np.arange(2, 50)] * 2)
    np.testing.assert_allclose(iqm[0], report.normalized_score("Pong", 1 / 8))
    report.draw_pooled(item, curves, tmp_path / "pooled.png", True, "")
    ends = [axes.lines[0].get_xdata()[-1] for axes in shown(figures["pooled.png"])]
    assert ends == [49, 490]


def test_hours_of_a_page_are_means_over_runs(tmp_path):
    for seed, seconds in enumerate((1800.0, 5400.0)):
        write_run(tmp_path / str(seed), "rosmo_atari", [1.0], env_id="Pong", seed=seed)
        change_lines(tmp_path / str(seed), lambda x, s=seconds: {"seconds/update": s})
    item = paper.ITEMS["figure6"]._replace(methods={"ROSMO": None}, tasks=("Pong",))
    cells = {("ROSMO", None, "Pong"): report.put_together(run.read_runs((tmp_path,)))}
    page = "\n".join(report.time_table(item, cells))  # a run has three lines
    hours = rows(page, "hours of a run")["ROSMO"][1:5]
    assert hours == ["0.000", "0.000", "3.000", "0.000"]


def test_no_report_is_made_before_the_runs(tmp_path, capsys):
    for options in ({"dry_run": True}, {"launcher": "slurm"}):
        make(tmp_path, "table1", **options)
        assert "The report can be made when the runs are finished." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_argument_of_an_evaluation_is_compared():
    modules = map(importlib.import_module, helpers.SCRIPTS)
    names = {field.name for module in modules for field in dataclasses.fields(module.Args)}
    names = {x for x in names if x.startswith(("eval_", "final_eval_"))}
    assert report.EVALUATION == names - {"eval_every"}


def test_panels_and_profiles_show_the_scores(tmp_path, figures):
    scores = np.random.default_rng(0).random((3, 4))
    for task, row in zip(paper.TASKS, scores, strict=True):
        folder, (random, online) = tmp_path / "runs" / task, paper.REFERENCE_RETURNS[task]
        returns = random + row * (online - random)
        write_run(folder, "rosmo_bsuite", returns, env_id=task, data_percent=10)
    make(tmp_path, "figure2a")
    panels = shown(figures["figure2a.png"])
    assert [axes.get_title() for axes in panels] == ["all tasks", *paper.TASKS]
    expected = [np.sort(scores.ravel())[3:9].mean()]
    expected += [np.sort(row)[1:3].mean() for row in scores]
    drawn = [axes.lines[0].get_ydata()[0] for axes in panels]
    assert drawn == pytest.approx(expected)
    for axes, iqm in zip(panels, expected, strict=True):
        (_, low), (_, high) = axes.collections[0].get_segments()[0]
        assert low < iqm < high
    line = shown(figures["figure2a-profiles.png"])[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert y == pytest.approx([(scores > tau).mean() for tau in x])


def test_curves_against_hours_have_hours(tmp_path, figures):
    folder = tmp_path / "runs" / "a"
    write_run(folder, "rosmo_bsuite", [1.0])
    path = folder / "metrics.jsonl"
    lines = [json.loads(x) | {"seconds/update": 1800.0} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = (make(tmp_path, "figure9") / "figure9.md").read_text()
    axes, against = (shown(figures[f"figure9{x}.png"])[0].lines[0] for x in ("", "-time"))
    assert axes.get_xdata().tolist() == [1000, 2000]
    assert against.get_xdata() == pytest.approx([1.0, 2.0])
    hours = rows(page, "hours of a run")["ROSMO"][1:6]
    assert hours == ["1", "0.000", "0.000", "1.500", "0.000"]


@pytest.mark.usefixtures("hurry")
def test_throughput_is_measured_on_bsuite(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "matrix_peak", lambda _: 1.0)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "bsuite"])
    page, sizes = tmp_path / "page.md", {"updates": 2, "windows": 1}
    throughput.main(throughput.Args("bsuite", ("bc_bsuite",), num_steps=1200, out=page, **sizes))
    lines = [x for x in page.read_text().splitlines() if x.startswith("| ")]
    assert [x.split(" | ")[0] for x in lines[1:]] == ["| bc_bsuite"]
    assert float(lines[1].split(" | ")[1]) > 0


@pytest.mark.usefixtures("hurry")
def test_throughput_is_measured_on_atari(monkeypatch, asterix_store, capsys):
    helpers.without_blocks(monkeypatch, "bc_atari")
    monkeypatch.setattr(throughput, "matrix_peak", lambda _: 1.0)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "atari"])
    sizes = {"updates": 2, "windows": 1, "channels": 4, "batch_size": 4}
    args = throughput.Args("atari", ("bc_atari",), store=asterix_store, **sizes)
    throughput.main(args)
    throughput.main(dataclasses.replace(args, store=None, compile_only=True))
    out = capsys.readouterr().out
    (row,) = (x.split(" | ") for x in out.splitlines() if x.startswith("| bc_atari"))
    rate, (low, high) = float(row[1]), map(float, row[2].split(" to "))
    assert 0 < low == rate == high  # one window
    assert float(row[7].rstrip("%")) == pytest.approx(100 * float(row[6]) * rate, rel=0.01, abs=0.6)
    assert out.count(" parameters, ") == 2  # compile_only's as well


@pytest.mark.usefixtures("hurry")
def test_every_simulation_counts(monkeypatch):
    """The compiler counts the body of the search's loop once, and the roots' noise too high."""
    script = importlib.import_module("muzero_unplugged_bsuite")
    network = script.make_network(3, script.Args())
    observation, key = jnp.zeros((128, 9, 1, 6)), jax.random.key(0)
    params = script.init_state(key, network, observation[0, 0], script.Args()).params
    state = network.apply(params, observation, method="representation")
    prediction = network.apply(params, state, method="prediction")

    def search(num_simulations: int) -> float:
        args = script.Args(num_simulations=num_simulations)
        search = jax.jit(lambda *x: script.search(*x, 0.25, network, args))
        counted = throughput.count_gflop(search, params, state, prediction, key)
        return counted + throughput.further_simulations(script, params, observation, network, args)

    def layers(*widths: int) -> float:
        """GFLOP of the products of dense layers for one state below every root."""
        return sum(2 * 128 * 9 * a * b for a, b in itertools.pairwise(widths)) / 1e9

    one = layers(32 + 3, 32, 256, 32) + layers(32, 32) + layers(32, 3 + 20 + 20)
    assert search(1) == pytest.approx(one, rel=0.2)  # the rest are not products
    assert search(9) - search(1) == pytest.approx(8 * one, rel=0.1)


def test_the_loader_is_measured(asterix_store, capsys):
    throughput_loader.main(throughput_loader.Args(asterix_store, seconds=0.2, batch_size=4))
    out = capsys.readouterr().out
    assert ": 160 steps, " in out
    assert float(re.search(r"thread\(s\): ([\d.]+) batches of 4 per second", out)[1]) > 0


@pytest.mark.parametrize("options", [{"dataset": Path("other")}, {"rlu_run": 2}])
def test_runs_of_other_data_are_left_out_and_named(tmp_path, options):
    write_run(tmp_path / "runs" / "a", "rosmo_atari", [1.0], env_id="Pong", data=STORE)
    write_run(tmp_path / "runs" / "b", "bc_atari", [1.0], env_id="Pong", data=STORE, **options)
    page = (make(tmp_path, "table8") / "table8.md").read_text()
    (name,) = options
    assert f"runs/b: {name} " in page
