"""The runs of an item: which are missing, how they are started, stopped and handed to SLURM.

A stand-in for the Python interpreter takes the scripts' place, so that a run takes no time.
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import submitit
from conftest import ROOT
from helpers import write_run

import bc_atari
import bc_bsuite
import combo_atari
import paper
import report
import run

# Writes its words down and ends; fails on mountain_car; goes on after a signal only.
STAND_IN = """#!/bin/bash
trap 'echo saved >> {0}/saved; exit 130' TERM
echo "$@" >> {0}/commands
echo "$CUDA_VISIBLE_DEVICES $JAX_PLATFORMS" >> {0}/devices
echo "it says something"
case "$*" in *mountain_car*) echo "it says why"; exit 1;; esac
[ -e {0}/wait ] && [ ! -e {0}/saved ] && while true; do sleep 0.05; done
exit 0
"""
DRIVER = "import run, sys, tyro; run.PYTHON = sys.argv.pop(1); "
DRIVER += "run.main(*tyro.cli(run.Args, return_unknown_args=True))"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where there are no data."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(tmp_path))
    path.chmod(0o755)
    monkeypatch.setattr(run, "PYTHON", str(path))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield path
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*words, **options) -> None:
    """run.py in this process; a stopped or failed one raises SystemExit."""
    words = [*map(str, words)]
    run.main(*run.tyro.cli(run.Args, args=words, return_unknown_args=True))


def process(stand_in: Path, *words) -> subprocess.Popen:
    """run.py as a process, whose runs the stand-in is."""
    command = [sys.executable, "-c", DRIVER, str(stand_in), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmark")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for(path: Path, lines: int = 1) -> list[str]:
    for _ in range(20 * helpers.PATIENCE):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return path.read_text().splitlines()
        time.sleep(0.05)
    raise AssertionError(f"{path} does not come")


@pytest.mark.parametrize("name", paper.ITEMS)
def test_dry_run_prints_the_commands_of_every_item(name, tmp_path, capsys):
    start(name, "--dry-run", "--runs", tmp_path)
    lines, item = capsys.readouterr().out.splitlines(), paper.ITEMS[name]
    seeds = 1 if item.tasks[0] in paper.TASKS else len(item.seeds)
    assert len(lines) == len(set(lines)) == len(list(item.cells())) * seeds
    assert all(line.startswith("python ") and ".py --env-id " in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_the_commands_printed_are_those_run(stand_in, tmp_path, capsys):
    words = ["table1", "--total-updates", 7, "--seeds", 0, 1, "--methods", "ROSMO"]
    words += ["--batch-size", 64, "--workers", 2, "--runs", "runs"]
    start(*words, "--dry-run")
    printed = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    start(*words)
    done = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert sorted(done) == sorted(printed)
    assert len(done) == 4
    assert all("--batch-size 64" in " ".join(x) and "--num-seeds 2" in " ".join(x) for x in done)
    out = capsys.readouterr().out
    assert "table1: 0 of 4 runs are finished." in out
    assert "[4 of 4] finished" in out
    logs = sorted((tmp_path / "runs/logs/table1").glob("*.log"))
    names = [f"ROSMO-catch-noise={noise}-seeds0-1.log" for noise in (0.0, 0.1, 0.3, 0.5)]
    assert [path.name for path in logs] == names
    assert all(path.read_text() == "it says something\n" for path in logs)
    assert {path.suffix for path in (tmp_path / "runs/logs/table1").iterdir()} == {".log"}


def test_one_that_fails_does_not_stop_the_others(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "table2", "--methods", "BC"])
    with pytest.raises(SystemExit) as end:
        start("table2", "--methods", "BC", "--total-updates", 7)
    assert end.value.code.endswith("finished: python benchmark/report.py table2 --methods BC")
    assert len((tmp_path / "commands").read_text().splitlines()) == 3
    out, err = capsys.readouterr()
    assert out.count("finished BC") == 2
    assert "failed   BC-mountain_car-seeds0-4" in out
    assert err.splitlines() == [
        "1 of 3 run(s) failed:",
        "  runs/logs/table2/BC-mountain_car-seeds0-4.log: it says why",
    ]


def test_a_killed_one_says_so(stand_in, tmp_path, capsys):
    stand_in.write_text("#!/bin/sh\necho update 3,000\nkill -9 $$\n")
    with pytest.raises(SystemExit):
        start("table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 7)
    assert "BC-catch-seeds0-4.log: It was killed by signal 9." in capsys.readouterr().err


def test_a_failed_run_does_not_stop_the_next_item(stand_in, tmp_path):
    words = ["table2", "table1", "--methods", "ROSMO", "--total-updates", 7]
    with pytest.raises(SystemExit, match="The same command tries them again"):
        start(*words)
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) == 3 + 3  # both have catch without noise


def test_every_run_has_a_gpu_of_its_own(stand_in, tmp_path, monkeypatch):
    """And none takes the CPU instead where JAX cannot use it, unless the user wants it to."""
    monkeypatch.setattr(run, "visible_gpus", lambda: ["3", "7"])
    words = ["table2", "--methods", "BC", "CRR", "--env-ids", "catch", "--total-updates", 7]
    for given, seen in (("", "cuda,cpu"), ("cuda", "cuda")):
        monkeypatch.setenv("JAX_PLATFORMS", given)
        start(*words)
        lines = (tmp_path / "devices").read_text().splitlines()
        assert sorted(lines[-2:]) == [f"3 {seen}", f"7 {seen}"]
    with pytest.raises(SystemExit, match="--workers 3: there are 2 GPUs"):
        start("table2", "--workers", 3)


def test_gpus_are_found_without_taking_one(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run.visible_gpus() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    names = []
    monkeypatch.setattr(run.importlib.util, "find_spec", names.append)
    assert run.visible_gpus() == []  # where JAX cannot use them
    assert names == ["jax_cuda12_plugin", "jax_cuda13_plugin"]
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name)
    assert run.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert run.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert run.visible_gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed, as there is no driver.\nexit 9\n")
    assert run.visible_gpus() == []


def test_gpus_that_the_user_hides_stay_hidden(stand_in, tmp_path, monkeypatch):
    stand_in.write_text(f"#!/bin/sh\necho ${{CUDA_VISIBLE_DEVICES-unset}} >> {tmp_path}/devices\n")
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 7]
    for value, seen in (("", ""), ("-1", "-1"), (None, "unset")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value or "")
        if value is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        start(*words)
        assert (tmp_path / "devices").read_text().splitlines()[-1] == seen


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGKILL"])
def test_a_stopped_one_goes_on(stand_in, tmp_path, name):
    """Its runs write their checkpoints, also when it is killed. A terminal signals to all."""
    number = getattr(signal, name)
    (tmp_path / "wait").touch()
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "cartpole", "--total-updates", 7]
    first = process(stand_in, *words)
    wait_for(tmp_path / "commands")
    (os.kill if name == "SIGTERM" else os.killpg)(first.pid, number)
    out, err = first.communicate(timeout=helpers.PATIENCE)
    assert wait_for(tmp_path / "saved") == ["saved"]
    assert len((tmp_path / "commands").read_text().splitlines()) == 1
    if name in ("SIGTERM", "SIGINT"):
        assert first.returncode == 130
        assert "Stopping 1 run(s), which write their checkpoints." in out
        assert "Stopped with 2 run(s) to do; the same command goes on." in err
    start(*words)
    lines = (tmp_path / "commands").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1] != lines[2]


def test_finished_seeds_are_not_run_again(tmp_path, capsys):
    write_run(tmp_path / "a", "bc_bsuite", [1.0, 1.0], seed=2)
    write_run(tmp_path / "b", "bc_bsuite", [1.0], seed=0, batch_size=64)  # another cell
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "--dry-run", "--runs", tmp_path]
    start(*words, "--total-updates", 2000)
    first, second = capsys.readouterr().out.splitlines()
    assert "--seed 0 --num-seeds 2 " in first
    assert "--seed 4 --num-seeds 1 " in second
    start(*words, "--total-updates", 2000, "--seeds", 2, 3)
    assert capsys.readouterr().out == ""
    write_run(tmp_path / "c", "bc_atari", [1.0], env_id="Pong", seed=1)
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "--dry-run", "--runs", tmp_path]
    start(*words, "--total-updates", 2000)
    seeds = [line.split("--seed ")[1][0] for line in capsys.readouterr().out.splitlines()]
    assert seeds == ["0", "2"]


def test_finished_runs_are_found_behind_links_and_under_a_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = tmp_path / "store"  # the script has expanded the ~
    write_run(tmp_path / "disk" / "a", "bc_atari", [1.0], env_id="Pong", dataset=dataset)
    (tmp_path / "runs").mkdir()
    for name in ("bc_atari", "again"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "disk")
    assert len(run.read_runs((tmp_path / "runs", tmp_path))) == 1
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "--seeds", 0, "--dry-run"]
    start(*words, "--runs", tmp_path / "runs", "--total-updates", 2000, "--dataset=~/store")
    assert capsys.readouterr().out == ""


def test_items_share_cells(tmp_path, capsys):
    start("table8", "figure3", "--dry-run", "--runs", tmp_path, "--env-ids", "Pong", "--seeds", 0)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_runs_of_an_item_before_are_not_called_finished(stand_in, capsys):
    start("table1", "figure9", "--methods", "ROSMO", "--total-updates", 7)
    out = capsys.readouterr().out
    assert "table1: 0 of 4 runs are finished." in out
    assert "figure9: 0 of 4 runs were finished, 4 are of an item before." in out


def test_a_folder_that_is_no_run_stops_nothing(tmp_path, capsys):
    for name, content in (("a", "[]"), ("b", '{"args": 3}'), ("c", '{"args": {"seed": "x"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "d" / "config.json").mkdir(parents=True)
    (tmp_path / "d" / "metrics.jsonl").write_text("")
    write_run(tmp_path / "e", "bc_bsuite", [1.0])
    assert [x.folder.name for x in run.read_runs((tmp_path,))] == ["e"]
    assert capsys.readouterr().err.count("cannot be read as a run") == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"data": None}),
        ("config.json", {"data": {"source": "mine"}}),
        ("config.json", {"data": {"episodes": 3, "mean_return": 1.0}}),
        ("config.json", {"starts": [{"commit": "a"}]}),
        ("config.json", {"starts": [{"commit": "a", "device": None}]}),
        ("config.json", {"script": 3}),
        ("config.json", {"starts": [{"commit": 3, "device": "cpu"}]}),
        ("config.json", {"data": {"episodes": "3", "transitions": 9}}),
        ("config.json", {"data": {"episodes": 3, "transitions": 9, "source": []}}),
        ("metrics.jsonl", {"final/returns": [None]}),
        ("metrics.jsonl", {"final/returns": [10**400]}),
        ("metrics.jsonl", {"final/returns": "x"}),
    ],
)
def test_a_damaged_run_is_named_and_left_out(tmp_path, capsys, name, change):
    write_run(tmp_path / "a", "bc_bsuite", [1.0])
    *before, last = (tmp_path / "a" / name).read_text().splitlines()
    if name == "config.json":
        before, last = [], "".join([*before, last])
    text = "\n".join([*before, json.dumps(json.loads(last) | change)]) + "\n"
    (tmp_path / "a" / name).write_text(text)
    assert run.read_runs((tmp_path,)) == []
    assert "a cannot be read as a run" in capsys.readouterr().err


def test_the_evaluation_of_a_method_can_be_changed(tmp_path, capsys):
    words = ["table7_small", "--methods", "MOReL", "--runs", tmp_path, "--eval-every", 40]
    (line,) = commands_of(capsys, *words)
    assert "--eval-every 40" in line


def test_further_arguments_reach_the_scripts_that_have_them(tmp_path, capsys):
    words = ["table8", "--dry-run", "--runs", tmp_path, "--env-ids", "Pong", "--seeds", 0]
    start(*words, "--num-bins", 21, "--eval-greedy", "--no-clip-rewards")
    lines = capsys.readouterr().out.splitlines()
    assert sum("--num-bins 21" in line for line in lines) == 4  # not BC
    assert sum("--no-clip-rewards" in line for line in lines) == 2  # CRR and CQL
    assert all("--eval-greedy" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table9"], "There is no table9; the items are table1, table2, figure2a"),
        ([], "Name items first; the items are"),
        (["table2", "--overwrite"], "--overwrite is for single runs: delete the folders"),
        (["table8", "--chanels", "3"], "No script of this item has --chanels"),
        (["figure2a", "--data-percent", "5"], "--data-percent is set by the item itself"),
        (["table2", "--num-seeds", "3"], "--num-seeds is set by the item itself: give --seeds"),
        (["table2", "--methods", "PPO"], "table2 has no PPO; its methods are 'BC', 'CRR'"),
        (["figure4d", "--policy-coef", "2"], "--policy-coef is set by the item itself"),
        (["table8", "--run-dir", "x"], "--run-dir is set by the item itself"),
        (["table2", "--workers", "0"], "--workers 0: give 1 or more"),
        (["table2", "--total-updates", "0"], "--total-updates 0: give 1 or more"),
        (["table2", "--seeds", "3", "-1"], "--seeds 3 -1: give 0 or more"),
        (["table2", "--seeds"], "--seeds: name one or more"),
        (["table2", "--slurm", "partition=gpu"], "--slurm has no use without --launcher slurm"),
        (["table8", "--env-ids"], "--env-ids: name one or more"),
        (["table8", "--methods"], "--methods: name one or more"),
        (["table8", "--runs", "nowhere"], "--runs: there is no folder nowhere"),
        (["table2", "--seeds", "0", "0"], "--seeds 0 0: one twice"),
        (["table8", "--env-ids", "Pong", "Pong"], "--env-ids Pong Pong: one twice"),
        (["atari_small", "--env-ids", "Pong"], "the dataset of this item is of Breakout"),
    ],
)
def test_wrong_words_end_in_a_sentence(tmp_path, words, message):
    runs = [] if "--runs" in words else ["--runs", tmp_path]
    with pytest.raises(SystemExit, match=message):
        start(*words, "--dry-run", *runs)


def commands_of(capsys, *words) -> list[str]:
    start(*words, "--dry-run")
    return capsys.readouterr().out.splitlines()


def test_seeds_that_two_runs_share_count_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for first in (0, 2):
        write_run(tmp_path / str(first), "bc_bsuite", [1.0, 2.0, 3.0], seed=first)
    runs = run.find_runs(
        run.read_runs((tmp_path,)),
        run.importlib.import_module("bc_bsuite").Args(total_updates=2000),
    )
    assert [[*x.seeds] for x in runs] == [[0, 1, 2], [2, 3, 4]]
    assert [*report.put_together(runs).final] == [1, 2, 3, 2, 3]
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 2000]
    assert commands_of(capsys, *words, "--runs", tmp_path) == []


def test_runs_of_other_data_are_refused_before_anything_runs(stand_in, catch_dataset, tmp_path):
    """The report would refuse to mix them; without them, or with --mix, the runs begin."""
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 2000]
    words += ["--dataset", catch_dataset, "--runs"]
    steps = bc_bsuite.load_dataset(bc_bsuite.Args(dataset=catch_dataset))
    facts = bc_bsuite.describe(steps)
    write_run(tmp_path / "b", "bc_bsuite", [1.0], data=facts, dataset=catch_dataset)
    facts = facts | {"crc32": 1}
    write_run(tmp_path / "a", "bc_bsuite", [1.0], data=facts, dataset=catch_dataset)
    with pytest.raises(SystemExit, match="their checksum differ") as end:
        start(*words, tmp_path / "a")
    assert end.value.code.endswith("Name other folders with --runs, or give --mix.")
    assert not (tmp_path / "commands").exists()
    words[5:5] = ["cartpole", "--seeds", 0]  # of catch nothing is left to run
    start(*words, tmp_path / "a")
    assert len((tmp_path / "commands").read_text().splitlines()) == 1
    del words[5:8]
    start(*words, tmp_path / "a", "--mix")
    (tmp_path / "commands").unlink()
    start(*words, tmp_path / "b")
    assert len((tmp_path / "commands").read_text().splitlines()) == 1


def test_stores_of_other_data_are_refused(asterix_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = bc_atari.Args(env_id="Asterix", dataset=asterix_store)
    run.jax.config.update("jax_platforms", None)
    facts = run.data_here(args)
    assert run.jax.config.jax_platforms == "cpu"  # the accelerator stays free for the runs
    assert facts["episodes"] == 5
    assert run.data_here(bc_atari.Args()) == {}  # nothing is there, and nothing is made
    options = {"env_id": "Asterix", "dataset": asterix_store, "total_updates": 2000}
    write_run(tmp_path / "a", "bc_atari", [1.0], data=facts | {"steps": 3}, **options)
    words = ["table8", "--methods", "BC", "--env-ids", "Asterix", "--total-updates", 2000]
    with pytest.raises(SystemExit, match="their steps differ"):
        start(*words, "--dataset", asterix_store, "--runs", tmp_path / "a")


def test_runs_on_local_data_give_way_to_rl_unplugged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    local = {"source": "dqn", "episodes": 1, "steps": 2, "mean_return": 1.0, "crc32": 3}
    write_run(tmp_path / "runs" / "a", "bc_atari", [1.0], env_id="Pong", data=local)
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "--seeds", 0]
    words += ["--total-updates", 2000]
    assert commands_of(capsys, *words) == []  # all that can be had
    args = run.importlib.import_module("bc_atari").Args(env_id="Pong", total_updates=2000)
    assert len(run.find_runs(run.read_runs((tmp_path / "runs",)), args)) == 1
    (tmp_path / "data/atari/Pong-run1-100pct").mkdir(parents=True)
    assert len(commands_of(capsys, *words)) == 1
    assert run.find_runs(run.read_runs((tmp_path / "runs",)), args) == []
    theirs = local | {"source": "run1"}
    write_run(tmp_path / "runs" / "b", "bc_atari", [2.0], env_id="Pong", data=theirs)
    assert commands_of(capsys, *words) == []
    (found,) = run.find_runs(run.read_runs((tmp_path / "runs",)), args)
    assert found.final == [2.0]


def test_a_method_s_own_number_of_updates_is_the_most(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["table7", "--methods", "MOReL", "--seeds", 0, "--total-updates"]
    for given, updates, folder in ((50_000, None, ""), (7, 7, "-total-updates-7")):
        (line,) = commands_of(capsys, *words, given, "--loader-threads", 8)
        assert (f"--total-updates {updates}" in line) == (updates is not None)
        assert f"--run-dir runs/morel_atari/MsPacman{folder}/seed0 " in f"{line} "
    for given in (
        ["--deter", 128, "--no-clip-rewards", "--channels", 64],
        ["--no-clip-rewards", "--deter=128"],
    ):  # the same settings
        (line,) = commands_of(capsys, *words[:-1], *given)
        folder = "runs/morel_atari/MsPacman-clip-rewards=False-deter=128/seed0"
        assert f"--run-dir {folder} " in f"{line} "


def test_combo_alone_takes_the_world_model_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/morel_atari/MsPacman/seed0-world-model"
    folder.mkdir(parents=True)
    words = ["table7", "--methods", "COMBO", "--seeds", 0]
    assert "--world-model" not in commands_of(capsys, *words)[0]
    (folder / "members.msgpack").touch()
    assert (
        "--world-model runs/morel_atari/MsPacman/seed0-world-model"
        in commands_of(capsys, *words)[0]
    )


def test_local_data_keep_the_folder_that_was_made_from_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["table7", "--methods", "MOReL", "COMBO", "--seeds", 0]
    local = {
        "episodes": 1,
        "steps": 1,
        "source": "dqn",
        "mean_return": 0.0,
        "crc32": 1,
        "rom": None,
    }
    write_run(tmp_path / "runs/morel_atari/MsPacman/seed0", "morel_atari", [1.0], data=local)
    (tmp_path / "data/atari/MsPacman-run1-100pct").mkdir(parents=True)
    morel, combo = commands_of(capsys, *words)
    assert "--run-dir runs/morel_atari/MsPacman/seed0-rlu " in f"{morel} "
    assert "--world-model runs/morel_atari/MsPacman/seed0-rlu-world-model" in combo


def test_an_option_with_one_dash_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"There is no -x: options begin with --\."):
        start("table2", "-x", 3, "--dry-run")


def test_the_reason_of_a_failure_is_not_its_frame(tmp_path):
    log = tmp_path / "log"
    log.write_text("so\n╭─ Error ─╮\n│ it is x │\n│ ─────── │\n│ For full helptext │\n╰──╯\n")
    assert run.last_line(log) == "it is x"
    log.write_text("╰──╯\n")
    assert run.last_line(log) == "it wrote nothing"


def test_signals_are_the_program_s_again_after_an_item(stand_in, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    start("table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 7)
    assert signal.getsignal(signal.SIGINT) is before


def test_combo_is_run_where_morel_fails_after_its_world_model(stand_in, tmp_path, capsys):
    (tmp_path / "data/atari/MsPacman-run1-100pct").mkdir(parents=True)
    words = ["table7", "--methods", "COMBO", "MOReL", "--seeds", 0, "--total-updates", 7]
    folder = tmp_path / "runs/morel_atari/MsPacman-total-updates-7/seed0-world-model"
    stand_in.write_text(
        f"""#!/bin/bash
        echo $@ >> {tmp_path}/commands
        case "$1" in *morel*) [ -e {folder} ] && touch {folder}/members.msgpack; exit 1;; esac
        """
    )
    for made in (False, True):
        if made:
            folder.mkdir(parents=True)
        with pytest.raises(SystemExit, match="The same command tries them again"):
            start(*words)
        err = capsys.readouterr().err
        assert ("COMBO-MsPacman-seed0.log: not started, as MOReL" in err) == (not made)
        assert ("combo_atari.py" in (tmp_path / "commands").read_text()) == made


def test_combo_waits_for_morel_and_takes_its_world_model(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "can_reach_rlu", lambda: True)
    words = ["table7", "--methods", "COMBO", "MOReL", "--seeds", 0, "--total-updates", 7]
    start(*words, "--workers", 2)
    first, second = (tmp_path / "commands").read_text().splitlines()
    folder = "runs/morel_atari/MsPacman-total-updates-7/seed0"
    assert "morel_atari.py" in first
    assert f"--run-dir {folder}" in first
    assert "combo_atari.py" in second
    assert f"--world-model {folder}-world-model" in second
    assert "[1 of 2] finished MOReL-MsPacman-seed0" in capsys.readouterr().out
    start("table7", "--methods", "COMBO", "--seeds", 0, "--dry-run")
    assert "--world-model" not in capsys.readouterr().out  # it makes one
    write_run(tmp_path / "runs" / "mine", "morel_atari", [1.0], total_updates=1000)
    start(*words[:-1], 1000, "--dry-run")
    assert "--world-model" not in capsys.readouterr().out  # its world model is elsewhere
    for name in ("runs/mine-world-model", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "members.msgpack").touch()
    start(*words[:-1], 1000, "--dry-run")
    (line,) = capsys.readouterr().out.splitlines()
    assert "--world-model runs/mine-world-model" in line
    start("table7", "--methods", "COMBO", *words[4:-1], 1000, "--dry-run")
    assert "--world-model runs/mine-world-model" in capsys.readouterr().out
    start(*words[:-1], 1200, "--world-model", "given", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--world-model ")[1] for line in lines] == ["given"] * 2
    options = {"seed": 1, "world_model": Path("theirs"), "total_updates": 1000}
    write_run(tmp_path / "runs" / "other", "morel_atari", [1.0], **options)
    start(*words[:-3], 1, "--total-updates", 1000, "--dry-run")
    assert capsys.readouterr().out.endswith("--world-model theirs\n")


SLURM = {
    "sbatch": 'cp "$1" {0}/script; echo "Submitted batch job 42"',
    "srun": "echo $$ > {0}/pid; while [[ $1 == --* ]]; do [ $1 = --output ] && shift; shift; done; "
    'exec "$@"',
    "scontrol": "echo $@ >> {0}/requeued",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for SLURM's programs. Returns what starts a task of the submitted array."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text.format(tmp_path)}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def task(index: int) -> subprocess.Popen:
        names = {"SLURM_JOB_ID": 43 + index, "SLURM_ARRAY_JOB_ID": 42, "SLURM_ARRAY_TASK_ID": index}
        names |= {"SLURM_NTASKS": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_NODEID": 0}
        names |= {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_JOB_NODELIST": "localhost"}
        environment = os.environ | {k: str(v) for k, v in names.items()}
        return subprocess.Popen(["bash", tmp_path / "script"], env=environment)

    return task


def test_slurm_gets_an_array_that_is_queued_again(stand_in, slurm, tmp_path, monkeypatch, capsys):
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "--total-updates", 7]
    words += ["--launcher", "slurm", "--workers", 2, "--slurm", "partition=gpu", "time=600"]
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(SystemExit, match="Data are missing; make them first") as end:
        start(*words)
    assert end.value.code.endswith("--env-id Pong --rlu-run 1 --percent 100 --data-dir data")
    assert not (tmp_path / "script").exists()
    (tmp_path / "data/atari/Pong-run1-100pct").mkdir(parents=True)
    start(*words, "qos=low")
    assert "Submitted job 42 of 3 run(s): squeue -j 42" in capsys.readouterr().out
    script = (tmp_path / "script").read_text()
    for line in ("array=0-2%2", "requeue", "partition=gpu", "time=600", "signal=USR2@300"):
        assert f"#SBATCH --{line}\n" in script
    for line in ("qos=low", "gpus-per-node=1", "job-name=table8", "cpus-per-task=8"):
        assert f"#SBATCH --{line}\n" in script
    assert " --cpus-per-task=8 " in next(x for x in script.splitlines() if x.startswith("srun "))
    for own in (["gres=gpu:a100:1"], ["gpus_per_task=1", "cpus_per_gpu=4"]):
        start(*words, *own)
        script = (tmp_path / "script").read_text()
        assert all(f"#SBATCH --{x.replace('_', '-')}\n" in script for x in own)
        assert "gpus-per-node" not in script  # SLURM takes one or the other
        assert ("cpus-per-task" in script) == (len(own) == 1)
    start(*words, "srun_args=--exclusive --mpi=none")
    script = (tmp_path / "script").read_text()
    assert " --cpus-per-task=8 --exclusive --mpi=none " in script
    assert "#SBATCH --signal=USR2@300\n" in script
    with pytest.raises(SystemExit, match="--slurm srun_args=5: give the options of srun"):
        start(*words, "srun_args=5")
    start(*words, "cpus_per_gpu=4", "gpus_per_task=1", "srun_args=--exclusive")
    assert " --exclusive " in (tmp_path / "script").read_text()
    start(*words, "signal_delay_s=600")
    assert "#SBATCH --signal=USR2@600\n" in (tmp_path / "script").read_text()
    assert "#SBATCH --gpus-per-node=1\n" in script
    assert not (tmp_path / "commands").exists()
    assert slurm(1).wait(helpers.PATIENCE) == 0
    (line,) = (tmp_path / "commands").read_text().splitlines()
    assert "bc_atari.py --env-id Pong --seed 1 --total-updates 7" in line
    log = tmp_path / "runs/logs/table8/BC-Pong-seed1.log"
    assert log.read_text() == "it says something\n"
    assert (tmp_path / "devices").read_text() == " cuda,cpu\n"  # no CPU in the place of a GPU
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # unless that is wanted
    start(*words)
    assert "gpus" not in (tmp_path / "script").read_text()
    assert slurm(1).wait(helpers.PATIENCE) == 0
    assert (tmp_path / "devices").read_text().splitlines()[1:] == [" cpu"]


waitid = pytest.mark.skipif(not hasattr(os, "waitid"), reason="for SLURM, which is not on macOS")


@waitid
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_preempted_job_saves_and_goes_on(stand_in, slurm, tmp_path, number):
    """SIGUSR2 comes before the time limit, and the job asks to be queued again; at SIGTERM SLURM
    does that itself."""
    (tmp_path / "wait").touch()
    (tmp_path / "data/atari/Pong-run1-100pct").mkdir(parents=True)
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "--total-updates", 7]
    start(*words, "--launcher", "slurm")
    task = slurm(0)
    wait_for(tmp_path / "commands")
    os.kill(int((tmp_path / "pid").read_text()), number)
    assert task.wait(helpers.PATIENCE) != 0
    assert (tmp_path / "saved").read_text() == "saved\n"
    if number == signal.SIGUSR2:
        assert (tmp_path / "requeued").read_text() == "requeue 42_0\n"
    assert slurm(0).wait(helpers.PATIENCE) == 0
    first, second = (tmp_path / "commands").read_text().splitlines()
    assert first == second


@waitid
def test_a_job_that_is_preempted_while_it_starts_its_script_stops_it(
    stand_in, tmp_path, monkeypatch
):
    (tmp_path / "wait").touch()
    job = run.Command([str(stand_in), "x"], tmp_path / "log")
    popen = subprocess.Popen

    def preempted(*words, **options):
        process = popen(*words, **options)
        wait_for(tmp_path / "commands")
        os.kill(os.getpid(), signal.SIGUSR2)
        return process

    monkeypatch.setattr(run.subprocess, "Popen", preempted)
    before = signal.signal(signal.SIGUSR2, lambda *_: exit(job.checkpoint() is None))
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_slurm_starts_what_needs_another_after_it(stand_in, slurm, tmp_path, capsys):
    (tmp_path / "data/atari/MsPacman-run1-100pct").mkdir(parents=True)
    words = ["table7", "--methods", "MOReL", "COMBO", "--total-updates", 7]
    start(*words, "--launcher", "slurm")
    assert capsys.readouterr().out.count("Submitted job 42 of 3 run(s)") == 2
    assert "#SBATCH --dependency=afterany:42\n" in (tmp_path / "script").read_text()


def test_slurm_starts_what_needs_another_item_s_run_after_it(stand_in, slurm, tmp_path, capsys):
    """Three arrays: table7_small's MOReL, what needs it there, and what needs it in morel_small."""
    sbatch = 'cat "$1" >> {0}/script; n=$(grep -c "^#!" {0}/script); echo "Submitted batch job $n"'
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/bash\n{sbatch.format(tmp_path)}\n")
    start("table7_small", "morel_small", "--launcher", "slurm")
    script = (tmp_path / "script").read_text()
    assert capsys.readouterr().out.count("Submitted job") == script.count("#!") == 3
    assert script.count("#SBATCH --dependency=afterany:1\n") == 2


def test_slurm_s_own_form_of_a_time_is_refused(stand_in, slurm, tmp_path):
    """submitit would fail at the end of a task, and not put it into the queue again."""
    words = ["table8", "--total-updates", 7, "--launcher", "slurm", "--slurm", "time=24:00:00"]
    with pytest.raises(SystemExit, match="--slurm time=24:00:00: give a whole number of minutes"):
        start(*words)
    assert not (tmp_path / "script").exists()


@pytest.mark.parametrize(
    ("sbatch", "options", "message"),
    [
        (
            "echo 'sbatch: error: no such partition' >&2; exit 1",
            ["partition=x"],
            "no such partition",
        ),
        ("echo nothing", ["partition=x"], "Could not make sense of sbatch output"),
        ("kill -9 $$", ["partition=x"], "sbatch was killed"),
        (SLURM["sbatch"], ["setup=module load"], "can only concatenate list"),
    ],
)
def test_a_job_that_is_refused_ends_in_one_sentence(
    stand_in, slurm, tmp_path, sbatch, options, message
):
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/bash\n{sbatch.format(tmp_path)}\n")
    with pytest.raises(SystemExit, match=f"^The job was not submitted: .*{message}.*--slurm"):
        start("table2", "--methods", "BC", "--launcher", "slurm", "--slurm", *options)


@pytest.mark.parametrize(
    ("item", "env_id", "message"),
    [
        ("table8", "pong", "There is no game 'pong'; the nearest names: Pong"),
        ("table2", "Catch", "There is no task 'Catch'; the tasks are catch, cartpole, mountain"),
    ],
)
def test_a_task_that_there_is_not_ends_before_any_run(stand_in, tmp_path, item, env_id, message):
    for option in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=message):
            start(item, "--env-ids", env_id, *option)
    assert not (tmp_path / "commands").exists()


def test_what_is_wrong_with_a_later_item_shows_before_the_first_run(stand_in, tmp_path):
    with pytest.raises(SystemExit, match="--data-percent is set by the item itself"):
        start("table1", "figure2a", "--data-percent", 10)
    assert not (tmp_path / "commands").exists()


@pytest.mark.parametrize("there", [(), ("sbatch",)])
def test_without_slurm_it_says_so(stand_in, monkeypatch, tmp_path, there):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="--launcher slurm needs sbatch and srun"):
        start("table2", "--launcher", "slurm")


@waitid
def test_a_job_whose_script_has_just_ended_can_be_preempted(tmp_path):
    job = run.Command(["true"], tmp_path / "log")
    before = signal.getsignal(signal.SIGTERM)
    try:
        job()
        assert job.checkpoint() is not None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_links_that_go_in_circles_are_followed_once(tmp_path):
    write_run(tmp_path / "runs/a", "rosmo_bsuite", [0.5])
    for name in ("above", "again"):
        (tmp_path / "runs/a" / name).symlink_to(tmp_path / "runs")
    assert len(run.read_runs((tmp_path / "runs", tmp_path / "runs/a"))) == 1


def test_a_run_that_is_being_written_is_not_finished(tmp_path):
    """The last line of its metrics is cut short."""
    write_run(tmp_path / "a", "rosmo_bsuite", [0.5], finished=False)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2000, "see')
    assert run.read_run(tmp_path / "a") is None


def test_hours_are_those_without_evaluation(tmp_path):
    """The seconds of a line are those since the last one, of all seeds."""
    folder = tmp_path / "a"
    write_run(folder, "rosmo_bsuite", [0.5, 0.7])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):  # in order of the updates
        line |= {"wall_time": 3600.0 * (i + 1)}
        line |= {"seconds/evaluation": 1800.0 * (i < 4), "seconds/update": 900.0 * (i < 4)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    result = run.read_run(folder)
    hours = {x["update"]: [] for x in lines}
    for i, line in enumerate(lines):
        if "eval/return_mean" in line:
            hours[line["update"]].append((i + 1) - 0.5 * min(i + 1, 4))
    expected = [[hours[1000][s], hours[2000][s]] for s in (0, 1)]
    assert result.hours.tolist() == expected
    assert result.seconds["evaluation"] == 7200
    assert result.seconds["update"] == 3600
    assert result.seconds["data"] == 0


def test_runs_side_by_side_share_the_cores(stand_in, monkeypatch):
    tasks = []

    class Process:
        exitcode = 0

        def __init__(self, target):
            tasks.append(target)

        def start(self):
            pass

    context = SimpleNamespace(Process=Process)
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    words = ["table2", "--methods", "BC", "CRR", "--env-ids", "catch", "--total-updates", 7]
    start(*words, "--workers", 2)
    start(*words)
    monkeypatch.setattr(run, "visible_gpus", lambda: ["3", "7"])
    start(*words)
    cores = [{0, 2, 4}, {1, 3}, None, None, None, None]
    gpus = [x.environment.get("CUDA_VISIBLE_DEVICES") for x in tasks]
    assert gpus == [None] * 4 + ["3", "7"]
    assert [x.cores for x in tasks] == cores


def test_an_argument_that_the_script_does_not_have_makes_another_run(tmp_path):
    """But for those that older scripts had, with the value that is today's way."""
    write_run(tmp_path / "a", "bc_bsuite", [1.0])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    args = bc_bsuite.Args(total_updates=2000)
    for more, differs in (
        ({"compilation_cache": False, "wandb_entity": "me", "run": 1}, {}),
        ({"run": 2}, {"run": (2, None)}),
        ({"entropy_bonus": 0.5}, {"entropy_bonus": (0.5, None)}),
    ):
        text = json.dumps(config | {"args": config["args"] | more})
        (tmp_path / "a" / "config.json").write_text(text)
        (one,) = run.read_runs((tmp_path,))
        assert run.different(one, args) == differs


def test_paths_are_compared_by_what_they_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = combo_atari.Args(env_id="Pong", total_updates=2000, dataset=Path("d"))
    write_run(tmp_path / "a", "combo_atari", [1.0], env_id="Pong", dataset="d")
    write_run(tmp_path / "b", "combo_atari", [1.0], env_id="Pong", dataset="d", world_model="m")
    own, given = run.read_runs((Path("a"), Path("b")))
    for one in (own, given):
        assert run.different(one, args) == {}
        assert run.different(one, dataclasses.replace(args, dataset=tmp_path / "d")) == {}
        other = dataclasses.replace(args, dataset=Path("e"))
        assert run.different(one, other) == {"dataset": ("d", "e")}
        assert run.different(one, dataclasses.replace(args, dataset=None)) == {
            "dataset": ("d", None)
        }
    for one, model in ((own, "a-world-model"), (given, "m")):
        for path in (Path(model), tmp_path / model):
            assert run.different(one, dataclasses.replace(args, world_model=path)) == {}
        other = dataclasses.replace(args, world_model=Path("other"))
        assert [*run.different(one, other)] == ["world_model"]


def test_what_changes_no_number_is_not_compared(tmp_path):
    changes = {"log_every": 7, "checkpoint_every": 7, "track": True, "data_dir": tmp_path}
    write_run(tmp_path / "a", "bc_atari", [1.0], env_id="Pong", loader_threads=8, **changes)
    (one,) = run.read_runs((tmp_path,))
    args = bc_atari.Args(env_id="Pong", total_updates=2000)
    assert run.different(one, args) == {}
    other = dataclasses.replace(args, batch_size=64)
    assert run.different(one, other) == {"batch_size": (512, 64)}


def test_one_store_serves_every_share_of_its_data(stand_in, slurm):
    with pytest.raises(SystemExit) as end:
        start("figure4a", "--total-updates", 7, "--launcher", "slurm")
    (command,) = end.value.code.splitlines()[1:]
    assert "--percent 10 " in command


@pytest.mark.parametrize("reached", [False, True])
def test_without_rl_unplugged_no_run_makes_local_data(
    stand_in, tmp_path, monkeypatch, capsys, reached
):
    """Where they are already, it says that they are not the paper's."""
    monkeypatch.setattr(run, "can_reach_rlu", lambda: reached)
    words = ["table8", "--methods", "BC", "--env-ids", "Pong", "Breakout", "--total-updates", 7]
    words += ["--data-dir", "d", "--seeds", 0]
    local = [tmp_path / f"d/atari/{game}-dqn-200k" for game in ("Pong", "Breakout")]
    local[0].mkdir(parents=True)
    if not reached:
        with pytest.raises(SystemExit, match="RL Unplugged cannot be reached") as end:
            start(*words)
        (command,) = end.value.code.splitlines()[1:]
        assert (
            "prepare_atari.py --env-id Breakout --rlu-run 1 --percent 100 --data-dir d" in command
        )
        assert not (tmp_path / "commands").exists()
        local[1].mkdir()
    start(*words)
    out, names = capsys.readouterr().out, "d/atari/Pong-dqn-200k, d/atari/Breakout-dqn-200k"
    assert (f"the runs learn from {names}, NOT the paper's data" in out) == (not reached)
    assert len((tmp_path / "commands").read_text().splitlines()) == 2


def test_bsuite_asks_slurm_for_two_cores_and_a_day(stand_in, slurm, tmp_path):
    start("table2", "--methods", "BC", "--total-updates", 7, "--launcher", "slurm")
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --cpus-per-task=2\n" in script
    assert "#SBATCH --time=1440\n" in script
    assert "gpu" not in script
    (job, *_) = (tmp_path / "runs/logs/table2/submitit").glob("*_submitted.pkl")
    job = submitit.core.utils.DelayedSubmission.load(job)
    assert job._timeout_countdown > 100  # time limits are no failures


def test_real_data_come_before_local_ones(tmp_path):
    local = {"source": "dqn", "episodes": 1, "steps": 2, "mean_return": 1.0, "crc32": 3}
    for name, source, value in (("a", "dqn", 1.0), ("b", "run1", 2.0)):
        data = local | {"source": source}
        write_run(tmp_path / "runs" / name, "bc_atari", [value], env_id="Pong", data=data)
    args = bc_atari.Args(env_id="Pong", total_updates=2000)
    assert [x.final for x in run.find_runs(run.read_runs((tmp_path / "runs",)), args)] == [2.0]


def test_a_log_is_continued_and_finished_seeds_are_counted(stand_in, tmp_path, capsys):
    words = ["table2", "--methods", "BC", "--env-ids", "catch", "--total-updates", 7]
    start(*words)
    start(*words)
    log = tmp_path / "runs/logs/table2/BC-catch-seeds0-4.log"
    assert log.read_text() == "it says something\n" * 2
    write_run(tmp_path / "runs/a", "bc_bsuite", [1.0], total_updates=2000)
    capsys.readouterr()
    start(*words[:-1], 2000, "--mix")
    assert "table2: 1 of 2 runs are finished." in capsys.readouterr().out
