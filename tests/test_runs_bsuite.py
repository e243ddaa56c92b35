"""Runs of the BSuite scripts: artefacts, kills and signals, damage, other data, bad input.

The folder and the `main` of all five are the same to the byte, so that most tests take the
quickest one, bc_bsuite.py.
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from time import time
from types import SimpleNamespace

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from flax import serialization
from helpers import BSUITE, ROOT, checkpoints, metrics

import bc_bsuite
import rosmo_bsuite

pytestmark = pytest.mark.usefixtures("hurry")
SHORT = ["--total-updates", 60]


@pytest.fixture
def short(whole, tmp_path):
    """A copy of a run of 60 updates; 120 are to come."""
    return shutil.copytree(whole("bc_bsuite", *SHORT), tmp_path / "run")


@pytest.mark.parametrize("name", BSUITE)
def test_a_run_leaves_all_its_artefacts(whole, name):
    folder = whole(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == f"{name}.py"
    assert config["args"]["total_updates"] == 120
    assert config["data"]["episodes"] == 100
    assert config["data"]["transitions"] == 900
    (start,) = config["starts"]
    versions = {"jax", "jaxlib", "flax", "optax", "numpy", "bsuite"}
    assert {"commit", "time", "device", *versions} <= set(start)
    assert "mctx" in start or not name.startswith("muzero")
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.stem for path in checkpoints(folder)] == ["100", "120"]  # of 20, 40, ...
    assert not (folder / "checkpoints" / "tmp").exists()
    written = metrics(folder)
    for seed in (0, 1):
        mine = [x for x in written if x["seed"] == seed]
        assert [x["update"] for x in mine if "losses/total" in x] == list(range(10, 121, 10))
        assert [x["update"] for x in mine if "eval/returns" in x] == list(range(20, 121, 20))
        assert len(mine[-1]["final/returns"]) == 3
        assert mine[-1]["final/return_mean"] == np.mean(mine[-1]["final/returns"])
        assert "final/return_mean_greedy" in mine[-1]
    losses = [x["losses/total"] for x in written if "losses/total" in x]
    assert losses[0] != losses[1]  # the first of two seeds


def test_lines_have_the_means_of_their_updates_and_of_their_seeds(
    in_process, monkeypatch, tmp_path, catch_dataset
):
    given = []

    def train(number, states, sums, data, *_):
        given.append(data)
        return states, {k: x + number * np.arange(1.0, 3.0) for k, x in sums.items()}

    def evaluate(act, env_id, seeds, *_):
        return np.add.outer(seeds, [0.0, 1.0, 5.0])

    monkeypatch.setattr(bc_bsuite, "train", train)
    monkeypatch.setattr(bc_bsuite, "evaluate", evaluate)
    assert in_process("bc_bsuite", *SHORT, "--data-percent", 50).returncode == 0
    seen = set()
    for line in metrics(tmp_path / "run"):
        seed = line["seed"]
        for name, value in line.items():
            if name.startswith(("losses/", "charts/")):
                assert value == 1 + seed
            elif "/return_mean" in name:
                assert value == seed + 2
            elif "/returns" in name:
                assert value == [seed, seed + 1, seed + 5]
        seen |= line.keys()
    assert {"losses/total", "eval/return_mean", "final/returns", "final/return_mean_greedy"} <= seen
    steps = bc_bsuite.load_dataset(bc_bsuite.Args(dataset=catch_dataset))
    starts = bc_bsuite.window_starts(steps.is_last, 50.0, [0, 1])
    jax.tree.map(np.testing.assert_array_equal, given[0][2:], starts)


@pytest.mark.parametrize("name", BSUITE)
def test_every_metric_is_in_the_table_of_its_page(whole, name):
    lines = (whole(name) / "metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line) if "/" in key}
    assert logged == helpers.documented_metrics(name)


# Kills and signals


@pytest.mark.parametrize("name", ["bc_bsuite", "rosmo_bsuite"])  # without and with a target
def test_a_killed_run_goes_on_to_the_numbers_of_a_whole_one(whole, killed, in_process, name):
    folder = killed(name, 70)
    assert [path.stem for path in checkpoints(folder)] == ["60", "65"]
    assert '"update": 70' in (folder / "metrics.jsonl").read_text()
    result = in_process(name, folder="killed")
    assert "Going on from update 65 in run." in result.stdout
    assert metrics(folder) == metrics(whole(name))
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == 2


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(short, whole, in_process):
    newest = checkpoints(short)[-1]
    (short / "checkpoints" / "tmp").write_bytes(newest.read_bytes()[:100])
    newest.unlink()
    assert "Going on from update 40" in in_process("bc_bsuite").stdout
    assert metrics(short) == metrics(whole("bc_bsuite"))


def test_a_signal_stops_the_training_with_a_checkpoint(started, tmp_path):
    """SIGTERM; in test_runs_atari.py it is Ctrl-C."""
    endless = ["--run-dir", "run", "--total-updates", 10**8, "--overwrite", "--eval-every", 10**8]
    process = started("bc_bsuite", *endless, wait=False)
    for line in process.stdout:
        if line.startswith("update 10:"):
            break
    process.terminate()
    _, stderr = process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode == 130
    (message,) = [line for line in stderr.splitlines() if line]
    update = re.fullmatch(
        r"Stopped at update ([\d,]+); the same command without --overwrite goes on\.", message
    )[1]
    assert checkpoints(tmp_path / "run")[-1].stem == update.replace(",", "")


@pytest.mark.parametrize("which", [1, 6, 7, 8])  # 6 and two final ones
def test_a_signal_breaks_off_an_evaluation(whole, in_process, monkeypatch, tmp_path, which):
    """The one with the number `which`, after two steps; it comes again."""
    evaluate, count, steps = bc_bsuite.evaluate, [], []

    def interrupted(act, *arguments):
        count.append(None)

        def policy(observations, t):
            if len(count) == which:
                steps.append(t)
                if t == 1:
                    in_process.interrupt()
            return act(observations, t)

        return evaluate(policy, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bc_bsuite, "evaluate", interrupted)
        result = in_process("bc_bsuite")
    assert result.returncode == 130
    done = min(20 * which, 120)
    assert f"Stopped at update {done}; the same command goes on." in result.stderr
    assert steps == [0, 1]
    assert checkpoints(tmp_path / "run")[-1].stem == str(done)
    assert in_process("bc_bsuite").returncode == 0
    assert metrics(tmp_path / "run") == metrics(whole("bc_bsuite"))


def test_a_second_signal_does_not_wait(in_process, monkeypatch):
    """If it is Ctrl-C; SIGTERM may come by two ways, as from a scheduler."""

    def interrupted(act, *arguments):
        in_process.interrupt()
        in_process.interrupt()
        with pytest.raises(KeyboardInterrupt):
            in_process.handlers[signal.SIGINT](signal.SIGINT, None)

    monkeypatch.setattr(bc_bsuite, "evaluate", interrupted)
    assert in_process("bc_bsuite").returncode == 130


def test_a_metric_of_any_type_is_averaged(in_process, monkeypatch, tmp_path):
    loss = bc_bsuite.bc_loss

    def with_more(*inputs):
        total, values = loss(*inputs)
        return total, values | {"charts/yes": jnp.bool_(True), "charts/two": jnp.int8(2)}

    monkeypatch.setattr(bc_bsuite, "bc_loss", with_more)
    assert in_process("bc_bsuite", "--weight-decay", 0.3).returncode == 0  # compiled anew
    lines = [x for x in metrics(tmp_path / "run") if "charts/yes" in x]
    assert {(x["charts/yes"], x["charts/two"]) for x in lines} == {(1.0, 2.0)}


INTERVALS = ["--log-every", 7, "--eval-every", 11, "--checkpoint-every", 13, "--total-updates", 45]


def test_intervals_of_any_kind_end_the_same_wherever_they_are_interrupted(
    whole, in_process, monkeypatch, tmp_path
):
    expected = metrics(whole("bc_bsuite", *INTERVALS))
    mine = [x for x in expected if x["seed"] == 0]
    assert [x["update"] for x in mine if "losses/total" in x] == [7, 14, 21, 28, 35, 42]
    assert [x["update"] for x in mine if "eval/returns" in x] == [11, 22, 33, 44, 45]
    train, stops = bc_bsuite.train, []

    def interrupted(number, states, *arguments):
        done = int(states.step[0]) + number
        if done in (3, 22, 23) and done not in stops:
            stops.append(done)
            in_process.interrupt()
        return train(number, states, *arguments)

    monkeypatch.setattr(bc_bsuite, "train", interrupted)
    for stop in (3, 22, 23):  # 3 and 23 are between all of them
        result = in_process("bc_bsuite", *INTERVALS)
        assert result.returncode == 130
        assert f"Stopped at update {stop};" in result.stderr
    assert in_process("bc_bsuite", *INTERVALS).returncode == 0
    assert metrics(tmp_path / "run") == expected


def test_a_signal_never_waits_for_a_second_of_updates(in_process, monkeypatch):
    """An update takes a tenth of a second; a line of 65 leaves one when 8 are done at a time."""
    train, clock, numbers = bc_bsuite.train, [0.0], []

    def timed(number, *arguments):
        clock[0] += number / 10
        numbers.append(number)
        return train(number, *arguments)

    monkeypatch.setattr(bc_bsuite, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time))
    monkeypatch.setattr(bc_bsuite, "train", timed)
    intervals = ["--log-every", 65, "--eval-every", 1_000, "--checkpoint-every", 1_000]
    result = in_process("bc_bsuite", *intervals, "--total-updates", 300)
    assert result.returncode == 0, result.stderr
    assert sum(numbers) == 300
    assert max(numbers) == 8


def test_neither_evaluations_nor_a_final_one(in_process, tmp_path):
    none = ["--eval-episodes", 0, "--final-eval-episodes", 0, *SHORT]
    result = in_process("bc_bsuite", *none)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert not [x for x in lines if "eval/returns" in x]
    assert [x["final/returns"] for x in lines[-2:]] == [[], []]
    assert "This run is finished" in in_process("bc_bsuite", *none).stdout


# Damage


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "all"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(short, whole, in_process, how):
    older, newest = checkpoints(short)
    helpers.damage(newest, "changed" if how == "all" else how)
    if how == "all":
        helpers.damage(older, "changed")
    result = in_process("bc_bsuite")
    said = ["60", "40"] if how == "all" else ["60"]
    lines = result.stderr.splitlines()
    assert [re.match(r"run/checkpoints/(\d+)\.msgpack is damaged", x)[1] for x in lines] == said
    assert ("Going on from update 40 in run." in result.stdout) == (how != "all")
    assert metrics(short) == metrics(whole("bc_bsuite"))


def test_a_checkpoint_stays_beside_damaged_ones_of_later_updates(short, in_process, monkeypatch):
    for path in checkpoints(short):
        helpers.damage(path, "changed")
    train = bc_bsuite.train

    def interrupted(*arguments):
        in_process.interrupt()
        return train(*arguments)

    monkeypatch.setattr(bc_bsuite, "train", interrupted)
    assert "Stopped at update 1;" in in_process("bc_bsuite").stderr
    assert "Stopped at update 2;" in in_process("bc_bsuite").stderr
    assert [path.stem for path in checkpoints(short)] == ["1", "2"]


@pytest.mark.parametrize("how", ["halved", "empty", "deleted"])
def test_metrics_that_were_lost_end_in_one_sentence(short, whole, in_process, how):
    path = short / "metrics.jsonl"
    text = path.read_text()
    path.write_text({"halved": text[: len(text) // 2]}.get(how, ""))
    if how == "deleted":
        path.unlink()
    config = (short / "config.json").read_bytes()
    result = in_process("bc_bsuite", "--total-updates", 1_000)
    assert result.returncode == 1
    assert (short / "config.json").read_bytes() == config
    assert "run/metrics.jsonl has lost lines of the updates until 60: put them" in result.stderr
    assert "\n" not in result.stderr
    path.write_text(text)  # as it says
    assert in_process("bc_bsuite").returncode == 0
    assert metrics(short) == metrics(whole("bc_bsuite"))


@pytest.mark.parametrize("line", [b"nothing", b"\xff", b"null", b"[]"])
def test_damaged_metrics_end_in_one_sentence(short, in_process, line):
    with (short / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    result = in_process("bc_bsuite")
    assert result.returncode == 1
    assert result.stderr.startswith("run/metrics.jsonl is damaged: put it back, or give")
    assert "\n" not in result.stderr


@pytest.mark.parametrize("text", ["", "nothing", "{}", "[]", '{"args": {}}', '{"args": 1}', None])
def test_a_damaged_config_ends_in_one_sentence(short, in_process, text):
    (short / "config.json").write_text(text or "")
    if text is None:
        (short / "config.json").unlink()
    result = in_process("bc_bsuite")
    assert result.returncode == 1
    assert "run holds something else (or its config.json is damaged: " in result.stderr
    assert result.stderr.count("\n") == 0
    assert result.stderr.endswith("--overwrite to delete the run in it.")
    assert len(checkpoints(short)) == 2


def test_an_argument_that_came_later_counts_as_its_default(short, in_process):
    path = short / "config.json"
    config = json.loads(path.read_text())
    del config["args"]["weight_decay"]
    path.write_text(json.dumps(config))
    assert "This run is finished" in in_process("bc_bsuite", *SHORT).stdout
    del config["args"]["batch_size"]
    path.write_text(json.dumps(config))
    result = in_process("bc_bsuite", *SHORT)
    assert "something else (batch_size 128 -> 16); give another --run-dir" in result.stderr


def test_an_argument_of_a_copy_may_be_of_any_type(short, in_process, monkeypatch):
    new = [("hidden", tuple[int, ...], (64, 32)), ("init", Path, Path("x"))]
    bases = (bc_bsuite.Args,)
    args = dataclasses.make_dataclass("Args", new, bases=bases, frozen=True)
    monkeypatch.setattr(bc_bsuite, "Args", args)
    assert "This run is finished" in in_process("bc_bsuite", *SHORT).stdout


class Linear(nn.Module):
    """A network of one layer."""

    layer: str

    @nn.compact
    def __call__(self, observation):
        return nn.Dense(3, name=self.layer)(observation.reshape(*observation.shape[:-2], -1))


@pytest.mark.parametrize(
    "network", [bc_bsuite.BCNetwork(4, "float32"), Linear("Dense_0"), Linear("new")]
)
def test_a_copied_script_with_another_network_does_not_go_on(
    short, in_process, monkeypatch, network
):
    before = metrics(short)
    monkeypatch.setattr(bc_bsuite, "make_network", lambda *_: network)
    result = in_process("bc_bsuite")
    assert result.returncode == 1
    assert "run has checkpoints of another network; give another --run-dir" in result.stderr
    assert metrics(short) == before


# Other arguments, other data, other processes


def test_a_finished_run_is_not_run_twice_and_others_are_left_alone(short, in_process):
    before = metrics(short)
    assert "This run is finished: see run," in in_process("bc_bsuite", *SHORT).stdout
    result = in_process("bc_bsuite", *SHORT, "--learning-rate", 0.1, "--num-seeds", 3)
    assert result.returncode == 1
    assert "(num_seeds 2 -> 3, learning_rate 0.0007 -> 0.1)" in result.stderr
    assert "total_updates 60 -> 40" in in_process("bc_bsuite", "--total-updates", 40).stderr
    assert metrics(short) == before
    assert (short / "learning_curve.png").exists()
    none = ["--eval-episodes", 0, "--final-eval-episodes", 0]
    other = in_process("bc_bsuite", *SHORT, *none, "--seed", 7, "--overwrite")
    assert other.returncode == 0, other.stderr
    assert not (short / "learning_curve.png").exists()  # the other run's
    assert {x["seed"] for x in metrics(short)} == {7, 8}
    assert [path.stem for path in checkpoints(short)] == ["60"]
    assert len(json.loads((short / "config.json").read_text())["starts"]) == 1


def test_a_longer_run_goes_on_from_a_shorter_one_and_equals_it(short, whole, in_process):
    assert "Going on from update 60" in in_process("bc_bsuite").stdout
    assert metrics(short) == metrics(whole("bc_bsuite"))


def test_a_run_goes_on_with_checkpoints_at_other_updates(short, whole, in_process):
    """And beside a copy of one."""
    shutil.copy(checkpoints(short)[-1], short / "checkpoints" / "60-copy.msgpack")
    assert in_process("bc_bsuite", "--checkpoint-every", 17).returncode == 0
    assert metrics(short) == metrics(whole("bc_bsuite"))


def test_the_data_count_and_not_their_path(short, catch_dataset, in_process, tmp_path):
    moved = shutil.copy(catch_dataset, tmp_path / "moved.npz")
    assert "is finished" in in_process("bc_bsuite", *SHORT, "--dataset", moved).stdout
    with np.load(moved) as file:
        arrays = dict(file)
    moving = np.flatnonzero(~arrays["is_last"])
    arrays["action"][moving[-1]] = (arrays["action"][moving[-1]] + 1) % 3  # one action is another
    np.savez(moved, **arrays)
    result = in_process("bc_bsuite", *SHORT, "--dataset", moved)
    assert result.returncode == 1
    assert re.search(r"holds something else \(data \{.*crc32.*\} -> \{.*crc32.*\}\)", result.stderr)
    assert "\n" not in result.stderr


def test_a_folder_that_another_process_writes_to_is_left_alone(short, in_process):
    before = metrics(short)
    with FileLock(short / "lock"):
        for options in ([], ["--overwrite"]):
            result = in_process("bc_bsuite", *options)
            assert result.returncode == 1
            assert "Another process is writing to run; wait for it, or give" in result.stderr
            assert metrics(short) == before
            assert len(checkpoints(short)) == 2


def test_what_another_process_ends_with_before_it_lets_go_of_the_folder_stays(
    short, in_process, monkeypatch, tmp_path
):
    whole = shutil.copytree(short, tmp_path / "whole")
    checkpoints(short)[-1].unlink()
    lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(lines[:-1]))
    keep = bc_bsuite.Run.keep

    def wait_and_keep(run):
        shutil.copytree(whole, short, dirs_exist_ok=True)
        keep(run)

    monkeypatch.setattr(bc_bsuite.Run, "keep", wait_and_keep)
    assert "This run is finished" in in_process("bc_bsuite", *SHORT).stdout
    assert metrics(short) == metrics(whole)


def test_a_folder_with_something_else_is_never_deleted(in_process, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("Once upon a time")
    for options in ([], ["--overwrite"]):
        result = in_process("bc_bsuite", *SHORT, *options)
        assert result.returncode == 1
        assert "run holds something else" in result.stderr
        assert [path.name for path in folder.iterdir()] == ["chapter1.tex"]
    (folder / "chapter1.tex").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "500.msgpack").write_text("of another program")
    for options in ([], ["--overwrite"]):
        result = in_process("bc_bsuite", *SHORT, *options)
        assert "run holds something else" in result.stderr
        assert [path.name for path in folder.glob("*/*")] == ["500.msgpack"]


def test_a_folder_whose_first_start_failed_is_used_again(in_process, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / ".DS_Store").touch()  # macOS shows a folder
    (tmp_path / "run" / "checkpoints" / "tmp").write_text('{"args": ')  # no space was left
    assert in_process("bc_bsuite", "--total-updates", 20).returncode == 0


def test_a_run_is_finished_when_its_curve_is_drawn(in_process, monkeypatch):
    """Else a kill between the two would leave a finished run without a curve."""
    finished = []

    def plot(run):
        finished.append(any("final/returns" in line for line in run.lines()))

    monkeypatch.setattr(bc_bsuite.Run, "plot", plot)
    for _ in range(2):
        result = in_process("bc_bsuite", "--total-updates", 20)
    assert finished == [False]
    assert "This run is finished" in result.stdout


def test_the_folder_is_named_after_what_changes_the_run(in_process, tmp_path):
    def folder(source="file", **changes):
        args, data = bc_bsuite.Args(**changes), {"mean_return": 0.0, "source": source}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(signal, "signal", lambda *_: None)
            return str(bc_bsuite.Run(args, [0, 1], data).dir)

    assert folder() == "runs/bc_bsuite/catch/seeds0-1"
    assert folder(learning_rate=0.1, dataset=tmp_path / "x.npz", eval_greedy=True) == (
        "runs/bc_bsuite/catch-dataset=x.npz-learning-rate=0.1-eval-greedy=True/seeds0-1"
    )
    for changes in ({"checkpoint_every": 3}, {"data_dir": tmp_path}):
        assert folder(**changes, overwrite=True) == "runs/bc_bsuite/catch/seeds0-1"
    changes = {"total_updates": 7, "eval_episodes": 3}  # a run of any other number has its own
    assert folder(**changes) == "runs/bc_bsuite/catch-total-updates=7-eval-episodes=3/seeds0-1"
    long = folder(dataset=tmp_path / ("x" * 200))
    assert max(map(len, long.split("/"))) < 180
    assert long != folder(dataset=tmp_path / ("x" * 199 + "y"))
    assert folder("dqn") == "runs/bc_bsuite/catch-dqn/seeds0-1"  # not the paper's data
    assert folder("dqn", dataset=tmp_path / "x") == "runs/bc_bsuite/catch-dataset=x/seeds0-1"


# One sentence


def one_sentence(process, *parts: str) -> None:
    """A process has ended with a status that is not zero and one line on stderr."""
    assert process.returncode not in (0, -signal.SIGKILL), process.stderr
    (line,) = process.stderr.splitlines()
    assert all(part in line for part in parts), line


def test_a_folder_that_cannot_be_written(started, tmp_path):
    (tmp_path / "file").write_text("")
    result = started("bc_bsuite", "--run-dir", "file/run")
    advice = "put that right, then the same command goes on."
    one_sentence(result, "Not a directory", "file/run", advice)


def test_a_full_disk(started, tmp_path):
    """Files of more than 100 or 200 kB cannot be written, which the checkpoints have.

    Who gave --overwrite is told to go on without it: it would delete what there is.
    """
    result = started("bc_bsuite", "--run-dir", "run", "--overwrite", shell="ulimit -f 200")
    advice = "put that right, then the same command without --overwrite goes on."
    one_sentence(result, "File too large", advice)
    assert checkpoints(tmp_path / "run") == []


def test_a_closed_pipe(started, tmp_path):
    process = started("bc_bsuite", "--run-dir", "run", "--total-updates", 10**8, wait=False)
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=helpers.PATIENCE)
    one_sentence(
        subprocess.CompletedProcess([], process.returncode, "", stderr), "Broken pipe", "goes on"
    )


@pytest.mark.parametrize("metric", ["losses/total", "charts/grad_norm"])
@pytest.mark.parametrize("when", ["log", "save"])
def test_a_number_that_is_not_finite_ends_the_run(in_process, monkeypatch, tmp_path, when, metric):
    train, calls = bc_bsuite.train, []

    def broken(*arguments):
        states, sums = train(*arguments)
        calls.append(arguments[0])
        if sum(calls) > 40:
            sums = sums | {metric: sums[metric] * np.nan}
        return states, sums

    monkeypatch.setattr(bc_bsuite, "train", broken)
    intervals = ["--log-every", 10 if when == "log" else 100]
    result = in_process("bc_bsuite", *intervals)
    assert result.returncode == 1
    assert re.search(
        rf"{metric} is not finite by update (50|60); checkpoints before it are kept", result.stderr
    )
    assert checkpoints(tmp_path / "run")[-1].stem == "40"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "pong"], "catch"),  # tyro lists the known ones
        (["--noise", "1.5"], "--noise is 1.5"),
        (["--data-percent", "0.1"], "of 100 episodes leaves none"),
        (["--dataset", "nowhere.npz"], "There is no dataset nowhere.npz"),
        (["--env-id", "cartpole"], "does not say schema 1 and this env_id"),
    ],
)
def test_bad_input_writes_nothing(in_process, tmp_path, arguments, message):
    result = in_process("bc_bsuite", *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "foreign", "schema", "rewards"])
def test_damaged_datasets_give_one_sentence(catch_dataset, tmp_path, how):
    path = tmp_path / "damaged.npz"
    shutil.copy(catch_dataset, path)
    with np.load(path) as file:
        arrays = dict(file)
    if how == "foreign":
        np.savez(path, x=np.zeros(3))
    elif how == "schema":
        np.savez(path, **arrays | {"header": np.array('{"schema": 2, "env_id": "catch"}')})
    elif how == "rewards":
        np.savez(path, **arrays | {"reward": np.ones_like(arrays["reward"])})
    else:
        helpers.damage(path, how)
    with pytest.raises(SystemExit, match="cannot be used as a dataset of catch: ") as end:
        rosmo_bsuite.load_dataset(rosmo_bsuite.Args(dataset=path))
    assert "\n" not in end.value.code


# Several devices, Weights & Biases, missing data


def test_several_devices_give_the_numbers_of_one(whole, started, tmp_path):
    options = ["--run-dir", "four", "--total-updates", 20]
    flags = {"JAX_NUM_CPU_DEVICES": "4"}
    result = started("bc_bsuite", *options, **flags)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["starts"][0]["device"].startswith("4 x")
    one = [x for x in metrics(whole("bc_bsuite")) if x["update"] <= 20]
    four = [x for x in metrics(tmp_path / "four") if "final/returns" not in x]
    helpers.assert_close(one, four)


def test_pictures_are_drawn_from_a_notebook_and_with_closed_streams(started, tmp_path):
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # not installed here
    result = started("bc_bsuite", "--run-dir", "run", shell="exec >&- 2>&-", **backend)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_wandb_mirror_works_offline(started, tmp_path):
    options = ["--run-dir", "run", "--total-updates", 20, "--track"]
    result = started("bc_bsuite", *options, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    id = f"{config['starts'][0]['time']:.6f}"
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))


def test_ctrl_c_stops_the_collection_of_a_missing_dataset(script, tmp_path):
    options = ["--env-id", "catch", "--noise", 0.25, "--num-seeds", 1]
    process = script("bc_bsuite.py", *options, wait=False)
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert "catch-noise0.25-seed0.npz" in line
    assert not (tmp_path / "data" / "bsuite" / "catch-noise0.25-seed0.npz").exists()


def test_a_copied_script_names_the_command_that_makes_its_data(tmp_path):
    shutil.copy(ROOT / "bc_bsuite.py", tmp_path)
    command = [sys.executable, "bc_bsuite.py", "--env-id", "mountain_car", "--noise", "0.3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    one_sentence(
        result, "--noise=0.3 --out=data/bsuite/mountain_car-noise0.3-seed0.npz, in the repository"
    )


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_clock_of_a_run_that_goes_on_counts_on(short, in_process):
    path = checkpoints(short)[-1]
    saved = serialization.msgpack_restore(path.read_bytes()[4:]) | {"wall_time": 1000.0}
    content = serialization.msgpack_serialize(saved)
    path.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
    assert in_process("bc_bsuite").returncode == 0
    times = [x["wall_time"] for x in written(short) if x["update"] > 60]
    assert times == sorted(times)
    assert 1000 < times[0] < times[-1] < 1300


def test_the_seconds_of_the_parts_are_counted_once(whole):
    lines = written(whole("bc_bsuite"))
    parts = [{k: v for k, v in x.items() if k.startswith("seconds/")} for x in lines]
    assert 0 < sum(sum(x.values()) for x in parts) <= lines[-1]["wall_time"]
    evaluations = [i for i, x in enumerate(lines) if "eval/returns" in x and x["seed"] == 0]
    assert all("seconds/evaluation" in parts[i] and not parts[i + 1] for i in evaluations)


def test_weights_and_biases_get_every_number_but_the_times(in_process, monkeypatch, tmp_path):
    logged, log = [], lambda values, step: logged.append((step, values))
    run = SimpleNamespace(log=log, finish=lambda exit_code: logged.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Error=OSError))
    assert in_process("bc_bsuite", *SHORT, "--track").returncode == 0
    names = ("update", "seed")
    assert logged.pop() == 0  # the mirror is ended
    assert logged == [
        (x["update"], {f"seed{x['seed']}/{k}": v for k, v in x.items() if k not in names})
        for x in metrics(tmp_path / "run")
    ]


def test_weights_and_biases_are_told_of_a_stop_and_may_fail(in_process, monkeypatch):
    def finish(exit_code):
        print("status", exit_code)
        raise OSError("no network")

    stops = iter((True,))  # the first line of the log comes with a signal
    log = lambda *_, **__: in_process.interrupt() if next(stops, False) else None  # noqa: E731
    run = SimpleNamespace(log=log, finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    for status in (130, 0):
        result = in_process("bc_bsuite", *SHORT, "--track")
        assert result.returncode == status
        assert f"status {status}" in result.stdout
        assert "Not all was sent: 'wandb sync run/wandb/*run-*' sends the rest." in result.stderr


def test_a_number_that_is_not_finite_is_left_out(in_process, monkeypatch, tmp_path):
    train = bc_bsuite.train

    def broken(*arguments):
        states, sums = train(*arguments)
        return states, sums | {"charts/accuracy": sums["charts/accuracy"] * np.nan}

    monkeypatch.setattr(bc_bsuite, "train", broken)
    assert in_process("bc_bsuite", *SHORT).returncode == 0
    lines = [x for x in metrics(tmp_path / "run") if "losses/total" in x]
    assert len(lines) == 12
    assert not any("charts/accuracy" in x for x in lines)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_curve_is_the_moving_average_of_the_evaluations(monkeypatch, tmp_path):
    drawn, save = [], lambda figure, *_, **__: drawn.extend(figure.axes[0].lines)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    rows = [{"update": u, "seed": s, "eval/return_mean": u + s} for u in range(50) for s in (0, 1)]
    run = SimpleNamespace(lines=lambda: rows, seeds=[0, 1], dir=tmp_path, writes=True)
    run.args, run.config = bc_bsuite.Args(), {"data": {"mean_return": 7.0}}
    bc_bsuite.Run.plot(run)
    first, second, mean, data = [line.get_ydata() for line in drawn]
    for line, more in ((first, 0), (second, 1), (mean, 0.5)):  # over three evaluations
        np.testing.assert_allclose(line, np.arange(1, 49) + more)
    assert [*drawn[2].get_xdata()] == [*range(2, 50)]
    assert set(data) == {7.0}


@pytest.mark.parametrize("name", ["bc_bsuite", "bc_atari"])
def test_every_seed_begins_with_weights_of_its_own(name, in_process, monkeypatch):
    module, found = importlib.import_module(name), []
    if name == "bc_atari":
        helpers.without_blocks(monkeypatch, name)

    def note(run, state):
        largest = max(jax.tree.leaves(state.params), key=np.size)
        found.extend(np.asarray(largest).reshape(len(run.seeds), -1))
        raise SystemExit(7)

    monkeypatch.setattr(module.Run, "restore", note)
    for seed in (0, 1):  # on BSuite 0 and 1, 1 and 2
        assert in_process(name, "--seed", seed, folder=str(seed)).returncode == 7
    assert np.abs(found[0] - found[1]).max() > 0.01
    if name == "bc_bsuite":
        np.testing.assert_array_equal(found[1], found[2])


def test_the_project_of_wandb_and_its_refusal(in_process, monkeypatch, tmp_path):
    given = []

    def init(**options):
        given.append(options)
        raise ValueError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=OSError))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git itself has it, for its tests
    for project in (None, "mine"):
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        if project:
            monkeypatch.setenv("WANDB_PROJECT", project)
        result = in_process("bc_bsuite", "--track", folder=str(project))
        assert result.returncode == 1
        assert "wandb: no key; log in with 'wandb login'" in result.stderr
    assert [x["project"] for x in given] == ["rosmo-suite", "mine"]
    config = json.loads((tmp_path / "mine/run/config.json").read_text())
    assert bool(config["starts"][0]["commit"]) == (ROOT / ".git").exists()


def test_what_changes_no_number_may_change(in_process, tmp_path):
    assert in_process("bc_bsuite", "--total-updates", 20).returncode == 0
    result = in_process("bc_bsuite", "--total-updates", 20, "--track", "--data-dir", tmp_path)
    assert "This run is finished" in result.stdout


def test_a_stopped_run_draws_its_curve(in_process, monkeypatch):
    drawn = []
    monkeypatch.setattr(bc_bsuite.Run, "plot", lambda run: drawn.append(run))
    evaluate = bc_bsuite.evaluate

    def interrupted(*inputs):
        in_process.interrupt()
        return evaluate(*inputs)

    monkeypatch.setattr(bc_bsuite, "evaluate", interrupted)
    assert in_process("bc_bsuite").returncode == 130
    assert len(drawn) == 1


def test_a_style_of_the_user_s_own_does_not_lose_a_run(started, tmp_path):
    (tmp_path / "own").write_text("text.usetex: True\n")
    names = {"MATPLOTLIBRC": str(tmp_path / "own"), "PATH": str(Path(sys.executable).parent)}
    result = started("bc_bsuite", "--run-dir", "run", "--total-updates", 40, **names)  # no LaTeX
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_a_run_whose_data_lack_a_fact_that_came_later_goes_on(short, in_process):
    path = short / "config.json"
    config = json.loads(path.read_text())
    del config["data"]["mean_return"]
    path.write_text(json.dumps(config))
    assert in_process("bc_bsuite").returncode == 0


def test_a_folder_of_other_software_is_not_deleted(in_process, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text('{"model_type": "bert"}\n')
    result = in_process("bc_bsuite", "--overwrite")
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("give another --run-dir.")
    assert "bert" in (tmp_path / "run" / "config.json").read_text()


def test_settings_of_jax_do_not_change_the_numbers(whole, started, tmp_path):
    settings = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    settings |= {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7"}
    result = started("bc_bsuite", "--run-dir", "run", "--total-updates", 20, **settings)
    assert result.returncode == 0, result.stderr
    folders = whole("bc_bsuite"), tmp_path / "run"
    losses = [[x for x in metrics(folder) if "losses/total" in x] for folder in folders]
    assert losses[1] == losses[0][:4]  # of two seeds at two updates
