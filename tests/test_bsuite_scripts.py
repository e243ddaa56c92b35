"""What the five BSuite scripts have in common: data, evaluation, `main`."""

import dataclasses
import importlib
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from helpers import SCRIPTS

import bc_bsuite
import collect_bsuite
import rosmo_bsuite as rosmo

pytestmark = pytest.mark.usefixtures("hurry")


def test_the_environments_are_those_of_their_names():
    modules = {name: made.__module__ for name, made in rosmo.ENVIRONMENTS.items()}
    assert modules == {name: f"bsuite.environments.{name}" for name in collect_bsuite.TASKS}


def test_evaluation_shows_each_observation_and_draws_noise_at_its_rate(monkeypatch):
    def follow(boards, t):  # [1, E, 10, 5], the paddle in the last row
        ball, paddle = boards[..., :-1, :].any(-2).argmax(-1), boards[..., -1, :].argmax(-1)
        return 1 + np.sign(ball - paddle)

    play = partial(rosmo.evaluate, follow, "catch", [0, 1], 0, 50)
    assert (play(0.0) == 1).all()
    assert play(1.0).mean() < 0 < play(0.25).mean() < 1
    taken = []

    class Recorded(rosmo.Catch):
        def step(self, action):
            taken.append(action)
            return super().step(action)

    monkeypatch.setitem(rosmo.ENVIRONMENTS, "catch", Recorded)
    rosmo.evaluate(lambda boards, t: np.ones(boards.shape[:2]), "catch", [0], 0, 200, 0.25)
    assert np.mean(np.array(taken) != 1) == pytest.approx(0.25 * 2 / 3, abs=0.04)


def test_an_evaluation_is_broken_off_and_may_have_no_episodes():
    times = []

    def three_times(boards, t):
        times.append(t)
        return np.zeros(boards.shape[:2], int) if t < 3 else None

    assert rosmo.evaluate(three_times, "catch", [0, 1], 0, 2, 0.0) is None
    assert times == [0, 1, 2, 3]
    assert rosmo.evaluate(three_times, "catch", [0, 1], 0, 0, 0.0).shape == (2, 0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_acting_is_one_program(name):
    """Who loads an agent acts step by step; a search that is not compiled takes seconds of each."""
    assert hasattr(importlib.import_module(name).act, "lower")


def test_evaluations_depend_on_the_seed_the_update_and_the_episode_alone():
    def play(seeds, done, episodes):
        first = []

        def act(boards, t):
            first.append(boards[..., 0, :].argmax(-1))  # where the ball falls
            return np.zeros(boards.shape[:2], int)

        rosmo.evaluate(act, "catch", seeds, done, episodes, 0.0)
        return first[0].tolist()

    both = play([0, 1], 7, 20)
    assert play([1], 7, 20)[0] == both[1] != both[0]
    assert play([0], 7, 5)[0] == both[0][:5]
    assert play([0], 8, 20)[0] != both[0]
    assert len(set(both[0])) > 1


def test_final_evaluations_sample_then_take_the_best_and_need_no_noise(
    in_process, tmp_path, monkeypatch
):
    noises = []

    def act(params, observation, key, greedy, network, args):
        return jnp.full(len(observation), int(greedy))

    def evaluate(policy, env_id, seeds, done, num_episodes, noise):
        noises.append(noise)
        return np.array(policy(np.zeros((len(seeds), num_episodes, 10, 5), np.float32), 0))

    monkeypatch.setattr(bc_bsuite, "act", act)
    monkeypatch.setattr(bc_bsuite, "evaluate", evaluate)
    options = ["--noise", 0.5, "--total-updates", 20, "--eval-greedy"]
    assert in_process("bc_bsuite", *options).returncode == 0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [x["eval/return_mean"] for x in lines if "eval/returns" in x] == [1, 1]
    assert [x["final/return_mean"] for x in lines if "final/returns" in x] == [0, 0]
    assert [x["final/return_mean_greedy"] for x in lines if "final/returns" in x] == [1, 1]
    assert noises == [0, 0, 0]
    options = ["--noise", 0.5, "--total-updates", 20, "--eval-noise"]
    assert in_process("bc_bsuite", *options, folder="noisy").returncode == 0
    assert noises[3:] == [0.5, 0.5, 0.5]
    text = (tmp_path / "noisy" / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [x["eval/return_mean"] for x in lines if "eval/returns" in x] == [0, 0]  # sampled


# Data. An episode of T states has T rows.

ROWS = {"observation": np.zeros((8, 10, 5)), "action": np.array([0, 1, 2, 0, 1, 2, 0, 0])}
ROWS |= {"reward": np.array([0, 0.5, -1, 0, 1, 1, 1, 0]), "is_last": np.arange(8) % 4 == 3}
ROWS |= {"is_terminal": np.arange(8) == 3}


def check(**changes):
    arrays = ROWS | changes
    return rosmo.check_steps(rosmo.Steps(*(arrays[x] for x in rosmo.Steps._fields)), "catch")


def at(name: str, index: int, value) -> dict:
    array = ROWS[name].copy()
    array[index] = value
    return {name: array}


def test_whole_episodes_are_taken_in_the_types_of_the_suite():
    steps = check(action=ROWS["action"].astype(np.uint8))
    dtypes = [x.dtype for x in steps]
    assert dtypes == [np.float32, np.int32, np.float32, np.dtype(bool), np.dtype(bool)]
    for name, array in ROWS.items():
        np.testing.assert_array_equal(getattr(steps, name), array)


def test_a_missing_dataset_is_made_by_the_tool(catch_dataset, tmp_path, monkeypatch):
    commands = []

    def run(command, env):
        assert (env["JAX_PLATFORMS"], env["ROSMO_PARENT"]) == ("cpu", str(os.getpid()))
        commands.append(command)
        path = tyro.cli(collect_bsuite.Args, args=command[2:]).out
        path.parent.mkdir(parents=True)
        shutil.copy(catch_dataset, path)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(rosmo.subprocess, "run", run)
    args = rosmo.Args(env_id="catch", noise=0.25, data_dir=tmp_path)
    for _ in range(2):  # the second time it is there
        assert len(rosmo.load_dataset(args).action) == 1_000
    ((_, tool, *words),) = commands
    assert tool.endswith("benchmark/collect_bsuite.py")
    given = tyro.cli(collect_bsuite.Args, args=words)
    assert (given.env_id, given.noise) == ("catch", 0.25)
    with pytest.raises(SystemExit, match="1"):  # the tool has said why
        rosmo.load_dataset(rosmo.Args(env_id="catch", noise=0.5, data_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (at("reward", 3, 1.0), "last rows are not void: an episode of T states has T rows"),
        (at("action", 3, 1), r"last rows are not void.*\(first in row 3\)"),
        ({"action": ROWS["action"][:, None]}, r"all but observation are \[N\] with one N"),
        ({"reward": ROWS["reward"][:, None]}, r"all but observation are \[N\] with one N"),
        ({"is_last": ROWS["is_last"][:, None]}, r"all but observation are \[N\] with one N"),
        ({"reward": ROWS["reward"][:7]}, r"all but observation are \[N\] with one N"),
        ({"observation": np.zeros((8, 50))}, r"observation is \[8, 50\], not \[8, 10, 5\]"),
        ({"observation": np.zeros((7, 10, 5))}, "observation is"),
        ({"observation": ROWS["observation"] * 1j}, "it is not all real numbers"),
        ({"reward": ROWS["reward"] * 1j}, "it is not all real numbers"),
        ({"reward": ROWS["reward"].astype("m8[s]")}, "it is not all real numbers"),
        ({"reward": ROWS["reward"].astype(str)}, "it is not all real numbers"),
        ({"action": ROWS["action"] * 1.0}, "action is not of integers"),
        (at("action", 1, 3), "action goes from 0 to 2 \\(first in row 1\\)"),
        (at("action", 1, -1), "action goes from 0 to 2"),
        (at("action", 1, 2**32 + 1), "action goes from 0 to 2"),  # 1 in an int32
        ({"is_last": ROWS["is_last"] * 1}, "is_last and is_terminal are not bool"),
        ({"is_terminal": ROWS["is_terminal"] * 1.0}, "is_last and is_terminal are not bool"),
        (at("is_last", 7, False), "does not end with an episode's last step"),
        ({k: v[:0] for k, v in ROWS.items()}, "does not end with an episode's last step"),
        (at("is_terminal", 2, True), "is_terminal is set where is_last is not"),
        (at("is_last", 6, True), "an episode without a transition"),
        (at("is_last", 0, True), "an episode without a transition"),  # the first one
        ({k: v[3:4] for k, v in ROWS.items()}, "an episode without a transition"),
        (at("reward", 1, np.nan), "numbers that are not finite"),
        (at("observation", 1, np.inf), "numbers that are not finite"),
        (at("observation", 1, 1e39), "numbers that are not finite in float32"),
        (at("reward", 1, -1e39), "numbers that are not finite in float32"),
    ],
)
def test_other_steps_are_refused(changes, fault):
    if fault.startswith("action goes from 0 to 2"):
        changes = {name: array.astype(np.int64) for name, array in changes.items()}
    with pytest.raises(ValueError, match=fault):
        check(**changes)


def test_a_dataset_is_known_by_all_of_its_numbers():
    facts = rosmo.describe(check())
    assert {k: v for k, v in facts.items() if k != "crc32"} == {
        "episodes": 2, "transitions": 6, "mean_return": 1.25,
    }  # fmt: skip
    swapped = rosmo.describe(check(action=ROWS["action"][[1, 0, *range(2, 8)]]))
    assert swapped["crc32"] != facts["crc32"]
    assert json.loads(json.dumps(facts)) == facts


def test_actions_are_drawn_anew_for_every_seed_update_and_step(in_process, monkeypatch):
    drawn = []

    def act(params, observation, key, greedy, network, args):
        return jax.random.randint(key, (len(observation),), 0, 2**30)

    def evaluate(policy, env_id, seeds, done, number, noise):
        boards = np.zeros((len(seeds), number, 10, 5), np.float32)
        drawn.extend(x for t in range(2) for x in np.ravel(policy(boards, t)[:, 0]))
        return np.zeros((len(seeds), number))

    monkeypatch.setattr(bc_bsuite, "act", act)
    monkeypatch.setattr(bc_bsuite, "evaluate", evaluate)
    assert in_process("bc_bsuite", "--total-updates", 40).returncode == 0
    assert len(set(drawn[:8])) == 8  # two evaluations, steps and seeds


def test_the_noise_of_a_dataset_is_that_of_the_arguments(catch_dataset, tmp_path):
    with np.load(catch_dataset) as file:
        arrays = dict(file)
    arrays["header"] = json.dumps({"schema": 1, "env_id": "catch", "noise": 0.5})
    np.savez(tmp_path / "noisy.npz", **arrays)
    args = rosmo.Args(dataset=tmp_path / "noisy.npz", noise=0.1)
    with pytest.raises(SystemExit, match=r"it was collected with --noise 0\.5: give that, too"):
        rosmo.load_dataset(args)
    rosmo.load_dataset(dataclasses.replace(args, noise=0.5))
