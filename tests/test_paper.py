"""The paper's items as data."""

import importlib
import os
import shutil
import subprocess

import numpy as np
import pytest
import tyro
from conftest import ROOT
from rliable import metrics

import bc_atari
import collect_bsuite
import paper
import report
import run

OWN = {k: item for k, item in paper.ITEMS.items() if item.of is None}


def test_every_table_and_figure_is_there():
    names = "table1 table2 table7 table8 figure2a figure2b figure2c figure3 figure4a figure4b"
    names += " figure4c figure4d figure6 figure7 figure8 figure9 figure10 atari_small"
    names += " table7_small morel_small"
    assert set(names.split()) <= paper.ITEMS.keys()
    for item in paper.ITEMS.values():
        assert item.title
        assert (item.argument is None) == (item.values == (None,))
        assert bool(item.axis) == bool(item.argument)
        if item.of:
            assert list(item.cells()) == list(paper.ITEMS[item.of].cells())


@pytest.mark.parametrize("name", OWN)
def test_cells_are_valid_arguments_of_their_scripts(name):
    """Their commands give these arguments, and the scripts' own checks find no fault in them."""
    for cell, args in run.cell_args(OWN[name], run.Args((name,)), []):
        script = importlib.import_module(cell.script)
        words = run.command(args)
        assert words[0].endswith(f"{cell.script}.py")
        assert tyro.cli(script.Args, args=words[1:]) == args
        script.check_args(args, script.RANGES)
        fields = {k: v for k, v in cell.arguments.items() if k != "total_updates"}
        assert {k: getattr(args, k) for k in fields} == fields


def arguments(name: str) -> list[dict]:
    """What the cells of an item set, without the task and what all BSuite runs have."""
    cells = [cell.arguments for cell in paper.ITEMS[name].cells()]
    return [{k: v for k, v in x.items() if k not in ("env_id", "log_every")} for x in cells]


def test_settings_of_the_figures_are_the_paper_s():
    assert all(x["data_percent"] == 10 for x in arguments("figure2b"))
    assert paper.ITEMS["figure2a"].values == (1, 10, 30, 100)
    assert paper.ITEMS["figure2b"].values == (32, 128, 256, 512, 1024)
    assert paper.ITEMS["figure2c"].values == (2, 4, 16, 32)
    assert {x.get("max_depth") for x in arguments("figure2c")} == {None, 1, 2}
    assert {x["noise"] for x in arguments("table1")} == {0.0, 0.1, 0.3, 0.5}
    assert [x["data_percent"] for x in arguments("figure4a")] == [10, 1, 10, 1]
    assert arguments("figure4b") == [
        {"num_samples": 4},
        {"num_simulations": 4},
        {"num_simulations": 4, "policy_target": "mpo"},
    ]
    assert [x["unroll_steps"] for x in arguments("figure4c")] == [5, 1, 5, 1]
    assert arguments("figure4d") == [{}, {"behavior_coef": 0.0}, {"policy_coef": 0.0}]
    assert all(x["data_percent"] == 1 for x in arguments("figure8"))
    assert not any(arguments("table8") + arguments("table2"))
    for name, item in OWN.items():
        if not (name.startswith("sweep") or name.endswith("_small")):
            assert item.total_updates == 200_000
            assert len(item.seeds) == (3 if item.tasks[0] in paper.GAMES else 5)


def test_numbers_of_the_paper():
    assert {k: paper.REFERENCE_RETURNS[k] for k in paper.TASKS} == collect_bsuite.PAPER_TABLE6
    assert paper.TABLE5 == collect_bsuite.PAPER_TABLE5
    games = paper.REFERENCE_RETURNS.keys() - {*paper.TASKS}
    assert len(games) == 46
    assert all(bc_atari.game_name(game) for game in games)
    assert all(random < online for random, online in paper.REFERENCE_RETURNS.values())
    item = paper.ITEMS["table8"]
    assert item.numbers.keys() == {cell[:3] for cell in item.cells()}
    assert item.numbers["ROSMO", None, "Phoenix"] == (21550.476, 2689.643)
    assert item.numbers["BC", None, "Pong"] == (14.976, 1.571)
    for method in ("MuZero Unplugged", "ROSMO"):
        assert paper.TABLE7[method] == item.numbers[method, None, "MsPacman"]
    best = [max(row, key=lambda x: x[0]) == row[-1] for row in paper.TABLE8.values()]
    assert sum(best) == 7


def test_the_paper_s_scores_give_the_paper_s_interquartile_means():
    """Table 8's give those of Fig. 3, and .60 for BC."""
    scores = [
        [report.normalized_score(game, x) for x, _ in row] for game, row in paper.TABLE8.items()
    ]
    means = [metrics.aggregate_iqm(column[None]) for column in np.transpose(scores)]
    assert np.round(means, 2).tolist() == [0.60, 1.13, 0.84, 1.53, 1.91]
    theirs = [paper.FIGURE3[method] for method in paper.METHODS[1:]]
    assert means[1:] == pytest.approx(theirs, rel=0.08)


def test_labels_are_words():
    items = paper.ITEMS
    assert items["figure2a"].label(10.0) == "10% of the data"
    assert items["figure2c"].label(16) == "N = 16"
    assert items["table2"].label(None) == ""


@pytest.mark.parametrize("name", [x for x in paper.ITEMS if not x.startswith("sweep")])
def test_every_item_has_a_shell_script(name):
    text = (ROOT / "benchmark" / f"{name}.sh").read_text()
    assert f'python benchmark/run.py {name} "$@"\n' in text
    assert f'python benchmark/report.py {name} "$@"\n' in text
    assert "# Cost: " in text


@pytest.mark.parametrize("name", ["sweep_baselines", "sweep_baselines_atari"])
def test_sweeps_share_shell_scripts(name):
    *_, first, second = (ROOT / "benchmark" / f"{name}.sh").read_text().splitlines()
    items = [x for x in paper.ITEMS if x.startswith("sweep")]
    items = [x for x in items if x.endswith("_atari") == name.endswith("_atari")]
    assert first == f'python benchmark/run.py {" ".join(items)} "$@"'
    assert second == first.replace("run.py", "report.py")


@pytest.mark.parametrize(
    "name", ["atari_small", "table7_small", "morel_small", "sweep_baselines_atari"]
)
def test_data_are_collected_when_runs_need_them_alone(name, tmp_path):
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=lambda *_: ["results"])
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$1" >> {tmp_path}/calls
case "$*" in *wrong*) exit 1;; *--help*) echo usage;; *finished*) ;; *--dry-run*) echo python;; esac
"""
    )
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, tools in (
        ([], "run collect_atari run report"),
        (["--dry-run"], "run run report"),
        (["--help"], "run run report"),
        (["finished"], "run run report"),
        (["wrong"], "run"),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        script = tmp_path / "benchmark" / f"{name}.sh"
        status = subprocess.run(["bash", script, *words], env=environment).returncode
        assert status == (words == ["wrong"])
        calls = (tmp_path / "calls").read_text().split()
        assert calls == [f"benchmark/{tool}.py" for tool in tools.split()]


RESULTS = ROOT / "benchmark" / "results"
PAGES = [x for x in sorted(RESULTS.rglob("*.md")) if x.stem in paper.ITEMS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS)))
def test_pages_of_results_have_the_claims_of_today(page):
    claim = paper.ITEMS[page.stem].claim
    assert not claim or f"The paper's claim: {claim}" in page.read_text().splitlines()


def test_no_number_of_table_8_has_changed():
    sums = np.sum([*paper.TABLE8.values()], axis=0)
    expected = [[30986.452, 3999.976], [48785.31, 2783.619], [66761.858, 12693.238]]
    expected += [[80659.786, 9300.307], [100090.476, 9047.763]]
    np.testing.assert_allclose(sums, expected, atol=5e-4)
