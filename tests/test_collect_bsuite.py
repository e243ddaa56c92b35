"""The BSuite collector: its record against the real environments, its noise, its files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from bsuite.environments.catch import Catch
from conftest import ROOT
from helpers import PATIENCE

import collect_bsuite as collector

NAMES = ["observation", "action", "reward", "is_first", "is_last", "is_terminal"]
CATCH = collector.TASKS["catch"]


class RecordingCatch(Catch):
    """Catch that remembers the executed actions."""

    executed: list[int]

    def __init__(self, seed):
        super().__init__(seed=seed)
        RecordingCatch.executed = []

    def step(self, action):
        RecordingCatch.executed.append(int(action))
        return super().step(action)


class TruncatedCatch(Catch):
    """Catch whose episodes are cut off (discount 1), not terminated."""

    def step(self, action):
        timestep = super().step(action)
        return timestep._replace(discount=1.0) if timestep.last() else timestep


def recorded_actions(steps):
    return steps["action"][~steps["is_last"]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """80 episodes, long enough for the DQN to start learning."""
    data_dir = tmp_path_factory.mktemp("bsuite")
    collector.main(collector.Args(noise=0.1, seed=3, num_episodes=80, data_dir=data_dir))
    return data_dir / "bsuite" / "catch-noise0.1-seed3-80episodes.npz"


def test_file_holds_the_documented_arrays(dataset):
    with np.load(dataset) as file:
        arrays = {name: file[name] for name in file.files}
    assert sorted(arrays) == sorted([*NAMES, "header"])
    n = 80 * 10
    assert arrays["observation"].shape == (n, 10, 5)
    assert all(arrays[name].shape == (n,) for name in NAMES[1:])
    dtypes = [arrays[name].dtype for name in NAMES]
    assert dtypes == [np.float32, np.int32, np.float32, bool, bool, bool]

    step = np.arange(n) % 10
    np.testing.assert_array_equal(arrays["is_first"], step == 0)
    np.testing.assert_array_equal(arrays["is_last"], step == 9)
    np.testing.assert_array_equal(arrays["is_terminal"], arrays["is_last"])
    assert set(recorded_actions(arrays)) == {0, 1, 2}
    assert not arrays["action"][arrays["is_last"]].any()
    assert not arrays["reward"][step != 8].any()
    assert set(arrays["reward"][step == 8]) == {-1, 1}


def test_header_describes_the_arrays(dataset):
    with np.load(dataset) as file:
        assert file["header"].shape == ()
        header, reward = json.loads(str(file["header"])), file["reward"]
    returns = reward.reshape(80, 10).sum(1).tolist()
    arguments = {
        "env_id": "catch", "seed": 3, "noise": 0.1, "num_episodes": 80,
        "data_dir": str(dataset.parent.parent), "overwrite": False, "from_rlds": None, "out": None,
    }  # fmt: skip
    assert header.pop("versions").keys() == {"jax", "jaxlib", "optax", "bsuite", "numpy"}
    assert -1 <= header.pop("random_return") < 0
    assert -1 <= header.pop("online_return") <= 1
    assert header == {
        "schema": 1, "source": "collect_bsuite", "env_id": "catch", "noise": 0.1, "seed": 3,
        "num_episodes": 80, "num_transitions": 720, "mean_return": pytest.approx(np.mean(returns)),
        "returns": returns, "arguments": arguments,
    }  # fmt: skip


def replay(env, steps):
    """Observations and rewards when the recorded actions are executed."""
    timestep, observations, rewards = env.reset(), [], []
    for action, is_last in zip(steps["action"], steps["is_last"], strict=True):
        observations.append(timestep.observation)
        assert timestep.last() == is_last
        timestep = env.reset() if is_last else env.step(int(action))
        rewards.append(0.0 if is_last else timestep.reward)
    return np.asarray(observations), np.asarray(rewards)


@pytest.mark.parametrize(
    ("env_id", "num_episodes"), [("cartpole", 12), ("catch", 60), ("mountain_car", 2)]
)
def test_without_noise_the_record_replays_in_the_environment(env_id, num_episodes):
    task = collector.TASKS[env_id]
    steps, returns, _ = collector.collect(task, num_episodes, noise=0.0, seed=5)
    observations, rewards = replay(task.make(seed=5), steps)
    np.testing.assert_array_equal(steps["observation"], observations)
    np.testing.assert_array_equal(steps["reward"], rewards)
    assert len(returns) == steps["is_first"].sum() == steps["is_last"].sum() == num_episodes
    assert sum(returns) == pytest.approx(rewards.sum())


def test_terminal_is_only_an_end_with_discount_zero():
    task = CATCH._replace(make=TruncatedCatch)
    steps, _, _ = collector.collect(task, 3, noise=0.0, seed=0)
    assert steps["is_last"].sum() == 3
    assert not steps["is_terminal"].any()


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_noise_replaces_executed_actions_and_not_recorded_ones(monkeypatch, noise):
    monkeypatch.setattr(collector, "MIN_REPLAY", np.inf)  # the agent explores at random, forever
    task = CATCH._replace(make=RecordingCatch, first_epsilon=1.0, epsilon_episodes=10**9)
    recorded = recorded_actions(collector.collect(task, 300, noise, seed=0)[0])
    executed = np.asarray(RecordingCatch.executed)
    noiseless = recorded_actions(collector.collect(task, 300, 0.0, seed=0)[0])
    np.testing.assert_array_equal(recorded, noiseless)
    # A third of the random replacements are the agent's action by chance.
    assert np.mean(executed != recorded) == pytest.approx(noise * 2 / 3, abs=0.04)
    np.testing.assert_allclose(np.bincount(executed) / len(executed), 1 / 3, atol=0.04)


def test_dqn_learns_from_the_recorded_transitions(monkeypatch):
    batches, update = [], collector.update

    def spy(params, target_params, opt_state, learning_rate, batch):
        batches.append(batch)
        return update(params, target_params, opt_state, learning_rate, batch)

    monkeypatch.setattr(collector, "update", spy)
    steps, _, _ = collector.collect(CATCH, 70, noise=1.0, seed=0)
    transitions = set()
    for i in np.flatnonzero(~steps["is_last"]):
        o, next_o = steps["observation"][i].tobytes(), steps["observation"][i + 1].tobytes()
        discount = 0.0 if steps["is_terminal"][i + 1] else collector.DISCOUNT
        transitions.add((o, int(steps["action"][i]), float(steps["reward"][i]), discount, next_o))
    assert len(batches) == (70 * 9 - collector.MIN_REPLAY) // CATCH.train_period + 1
    for o, a, r, d, next_o in batches:
        for row in zip(o, a, r, d.round(6), next_o, strict=True):
            key = (row[0].tobytes(), int(row[1]), float(row[2]), float(row[3]), row[4].tobytes())
            assert (*key[:3], round(key[3], 6), key[4]) in transitions


def test_td_loss_is_double_q_learning():
    rng = np.random.default_rng(0)
    params, target_params = (collector.init_params(rng, (4, 8, 8, 3)) for _ in range(2))
    o, next_o = rng.standard_normal((2, 5, 4)).astype(np.float32)
    action, reward = rng.integers(3, size=5), rng.standard_normal(5).astype(np.float32)
    discount = np.array([0.9, 0.9, 0.0, 0.9, 0.0], np.float32)
    loss = 0.0
    for i in range(5):
        best = collector.q_values(params, next_o[i]).argmax()
        z = reward[i] + discount[i] * collector.q_values(target_params, next_o[i])[best]
        loss += 0.5 * (collector.q_values(params, o[i])[action[i]] - z) ** 2 / 5
    batch = tuple(map(jnp.asarray, (o, action, reward, discount, next_o)))
    assert collector.td_loss(params, target_params, batch) == pytest.approx(loss, rel=1e-5)


def test_dqn_learns_catch():
    _, returns, greedy = collector.collect(CATCH, 600, noise=0.0, seed=0)
    assert np.mean(returns[:50]) < 0
    assert np.mean(returns[-50:]) > 0.5
    assert collector.evaluate(CATCH, greedy, seed=1) > 0.9


def test_command_line_gives_the_same_data_again(dataset, script, tmp_path):
    result = script(
        "benchmark/collect_bsuite.py", "--noise", 0.1, "--seed", 3, "--num-episodes", 80
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("recent mean return") == 10  # ten plain lines, not a bar
    assert result.stderr == ""
    for paper in ("18000", "0.60", "-0.66"):
        assert paper in result.stdout
    path = tmp_path / "data/bsuite" / dataset.name
    assert [file.name for file in path.parent.iterdir()] == [dataset.name]
    with np.load(path) as again, np.load(dataset) as first:
        for name in NAMES:
            np.testing.assert_array_equal(again[name], first[name])
        versions = [json.loads(str(file["header"]))["versions"] for file in (again, first)]
    assert versions[0] == versions[1]


CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPU.exists() or " avx2 " not in CPU.read_text(), reason="for AVX2 on Linux")
def test_the_data_of_the_page_come_again(script, tmp_path):
    result = script("benchmark/collect_bsuite.py", "--env-id", "catch")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    with np.load(tmp_path / "data/bsuite/catch-noise0-seed0.npz") as file:
        names = ("observation", "action", "reward", "is_last", "is_terminal")
        crc32 = zlib.crc32(b"".join(file[name].tobytes() for name in names))
    assert crc32 == collector.CHECKSUMS["catch", 0.0]


def test_the_page_has_the_checksums_that_the_collector_compares():
    page = (ROOT / "docs" / "bsuite_data.md").read_text()
    for (env_id, noise), crc32 in collector.CHECKSUMS.items():
        (row,) = (x for x in page.splitlines() if x.startswith(f"| {env_id} | {noise:g} |"))
        assert row.endswith(f" | {crc32} |")


def test_other_data_than_those_of_the_page_are_named(capsys):
    steps = collector.collect(CATCH, 1, 0.0, 0)[0]
    collector.compare(collector.Args(), steps)
    assert "Warning: the data have the CRC-32 " in capsys.readouterr().err
    for args in (collector.Args(seed=1), collector.Args(num_episodes=1), collector.Args(noise=0.2)):
        collector.compare(args, steps)
    assert capsys.readouterr().err == ""


def test_seeds_give_different_data():
    first, second = (collector.collect(CATCH, 5, 0.0, seed)[0] for seed in (0, 1))
    assert (first["action"] != second["action"]).any()
    assert (first["observation"] != second["observation"]).any()


def test_data_that_came_meanwhile_are_kept(tmp_path, monkeypatch, capsys):
    args, path = collector.Args(num_episodes=1, data_dir=tmp_path), tmp_path / "first.npz"
    args.out = path
    monkeypatch.setattr(np, "savez_compressed", lambda *x, **y: path.write_bytes(b"other"))
    collector.main(args)
    assert path.read_bytes() == b"other"
    assert "was written by another process meanwhile: that one is kept." in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [path]


def test_existing_data_are_kept_unless_told(dataset, tmp_path, capsys):
    args = collector.Args(num_episodes=1, data_dir=tmp_path)
    path = tmp_path / "bsuite" / "catch-noise0-seed0-1episodes.npz"
    path.parent.mkdir()
    header = {"env_id": "catch", "source": "collect_bsuite", "noise": 0, "seed": 0}
    header["num_episodes"] = 1
    np.savez(path, header=json.dumps(header))
    old = path.read_bytes()
    collector.main(args)
    assert path.read_bytes() == old
    assert "exists already; --overwrite replaces it." in capsys.readouterr().out
    args.overwrite = True
    collector.main(args)
    with np.load(path) as file:
        assert len(file["action"]) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_writes_nothing(script, tmp_path, number):
    arguments = ("--env-id", "mountain_car", "--data-dir", tmp_path / "data")
    process = script("benchmark/collect_bsuite.py", *arguments, wait=False)
    assert process.stdout.readline().startswith("Collecting")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stderr == "Interrupted: nothing was written.\n"
    assert list((tmp_path / "data" / "bsuite").iterdir()) == []


def run_with(code: str, *arguments):
    """Runs the collector's command line after this code, in a process of its own."""
    code = f"import os, signal, numpy, collect_bsuite as collector\n{code}\ncollector.run()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmark")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_ctrl_c_counts_where_an_exception_would_be_swallowed(tmp_path):
    """As in a callback of JAX."""
    code = """
update = collector.update
def interrupted_update(*args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    return update(*args)
collector.update = interrupted_update
"""
    result = run_with(code, "--num-episodes", 80, "--data-dir", tmp_path)
    assert result.returncode == 130
    assert result.stderr == "Interrupted: nothing was written.\n"
    assert list((tmp_path / "bsuite").iterdir()) == []


def test_ctrl_c_while_writing_leaves_nothing_half_written(tmp_path):
    code = """
savez = numpy.savez_compressed
def interrupted_savez(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    savez(*args, **kwargs)
numpy.savez_compressed = interrupted_savez
"""
    result = run_with(code, "--num-episodes", 1, "--data-dir", tmp_path)
    assert result.returncode == 130
    assert result.stderr == "Interrupted: nothing was written.\n"
    assert list((tmp_path / "bsuite").iterdir()) == []


def test_it_ends_with_the_process_that_started_it(tmp_path):
    collect = ["benchmark/collect_bsuite.py", "--env-id", "mountain_car", "--data-dir", tmp_path]
    command = [sys.executable, *map(str, collect)]
    code = f"""
import os, subprocess
subprocess.run({command!r}, env=os.environ | {{"ROSMO_PARENT": str(os.getpid())}})
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    assert parent.stdout.readline().startswith("Collecting")
    parent.kill()
    _, stderr = parent.communicate(
        timeout=PATIENCE
    )  # the collector holds the other end of the pipes
    assert stderr == "Interrupted: nothing was written.\n"
    assert list((tmp_path / "bsuite").iterdir()) == []


def test_full_disk_is_one_sentence(tmp_path):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    result = run_with(code, "--num-episodes", 400, "--data-dir", tmp_path)
    assert result.returncode == 1
    path = tmp_path / "bsuite" / "catch-noise0-seed0-400episodes.npz"
    assert result.stderr == f"Cannot write {path}: File too large.\n"
    assert list((tmp_path / "bsuite").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_written_file_never_has_the_final_name(monkeypatch, tmp_path, error):
    def savez(file, **arrays):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez_compressed", savez)
    path = tmp_path / "bsuite" / "catch-noise0-seed0-1episodes.npz"
    path.parent.mkdir()
    path.write_bytes(b"old")
    args = collector.Args(num_episodes=1, data_dir=tmp_path, overwrite=True)
    is_os_error = isinstance(error, OSError)
    message = "No space left on device" if is_os_error else None
    with pytest.raises(SystemExit if is_os_error else KeyboardInterrupt, match=message):
        collector.main(args)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "pong"}, "Unknown --env-id pong.*cartpole, catch, mountain_car"),
        ({"noise": -0.1}, "--noise must be from 0 to 1, not -0.1"),
        ({"noise": 1.5}, "--noise must .* not 1.5"),
        ({"noise": float("nan")}, "--noise must .* not nan"),
        ({"noise": float("inf")}, "--noise must .* not inf"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, not -1"),
        ({"seed": 2**32}, "--seed must .* not 4294967296"),
        ({"num_episodes": 0}, "--num-episodes must be from 1 to 100000, not 0"),
        ({"num_episodes": 10**9}, "--num-episodes must .* not 1000000000"),
        ({"from_rlds": ROOT}, "--from-rlds needs --out"),
        ({"from_rlds": ROOT, "out": ROOT / "x.npz", "noise": 0.1}, "no use with --from-rlds"),
        ({"from_rlds": ROOT / "none", "out": ROOT / "x.npz"}, "There is no folder .*none"),
        ({"out": ROOT}, "is a folder; --out must be a file"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        collector.main(collector.Args(**arguments, data_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_every_numeric_argument_has_a_range():
    types = collector.Args.__annotations__
    numeric = {name for name, kind in types.items() if kind in (int, float, int | None)}
    assert numeric == set(collector.RANGES)


def test_error_goes_to_stderr_without_traceback(script, tmp_path):
    (tmp_path / "file").touch()
    result = script("benchmark/collect_bsuite.py", "--data-dir", tmp_path / "file")
    assert result.returncode == 1
    assert result.stdout == ""
    folder = tmp_path / "file/bsuite"
    assert result.stderr == f"Cannot write to the folder {folder}: Not a directory.\n"


def test_folder_that_cannot_be_written_is_refused_before_work(monkeypatch, tmp_path):
    def no_file(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(collector.tempfile, "TemporaryFile", no_file)
    monkeypatch.setattr(collector, "collect", None)
    message = f"Cannot write to the folder {tmp_path / 'bsuite'}: Permission denied."
    with pytest.raises(SystemExit, match=message):
        collector.main(collector.Args(data_dir=tmp_path))


def test_paths_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    collector.main(collector.Args(num_episodes=1, data_dir=collector.Path("~/data")))
    assert (tmp_path / "data" / "bsuite" / "catch-noise0-seed0-1episodes.npz").exists()
    assert not (tmp_path / "~").exists()


# Conversion of TFDS/RLDS folders.


def catch_episodes(num_episodes=3):
    """Episodes as `read_rlds` returns them, of random play."""
    steps, *_ = collector.collect(CATCH, num_episodes, noise=1.0, seed=0)
    return [
        {name: x[i : i + 10].copy() for name, x in steps.items()}
        for i in range(0, len(steps["action"]), 10)
    ]


def convert(monkeypatch, episodes):
    monkeypatch.setattr(collector, "read_rlds", lambda folder: episodes)
    return collector.convert(collector.Path("FOLDER"), CATCH)


def test_conversion_keeps_whole_episodes(monkeypatch, capsys):
    episodes = catch_episodes()
    for episode in episodes:  # other kinds that lose nothing
        episode["action"] = episode["action"].astype(np.int64)
        episode["reward"] = episode["reward"].astype(np.float64)
        episode["observation"] = episode["observation"].astype(np.uint8)
        del episode["is_terminal"]
    steps = convert(monkeypatch, episodes)
    expected, *_ = collector.collect(CATCH, 3, noise=1.0, seed=0)
    assert steps.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(steps[name], array)
        assert steps[name].dtype == array.dtype
    assert capsys.readouterr().err == ""


def test_void_actions_become_zero_with_a_warning(monkeypatch, capsys):
    episodes = catch_episodes(8)
    for episode in episodes[1:]:
        episode["action"][-1] = -1  # of no task
    steps = convert(monkeypatch, episodes)
    assert not steps["action"][steps["is_last"]].any()
    assert capsys.readouterr().err == (
        "Warning: FOLDER: the last rows of 7 episodes (1, 2, 3, 4, 5, ...) have an action, which "
        "RLDS calls void: it is set to 0.\n"
    )


def test_episodes_of_t_rows_are_refused(monkeypatch):
    """D4RL and d3rlpy keep the last action and its reward in the last row."""
    rows = [{name: x[:-1] for name, x in episode.items()} for episode in catch_episodes()]
    for episode in rows:
        episode["is_last"][-1] = episode["is_terminal"][-1] = True
    with pytest.raises(SystemExit) as refusal:
        convert(monkeypatch, rows)
    assert str(refusal.value) == (
        "FOLDER: the last row of an episode has a reward, as in data of D4RL or d3rlpy, where RLDS "
        "has one row more, the final observation without action and reward (first in row 8 of "
        "episode 0, both counted from 0); append this row to every episode, and move is_last to it."
    )


def put(name, row, value):
    def fault(episode):
        episode[name][row] = value

    return fault


def change(name, function):
    def fault(episode):
        episode[name] = function(episode[name])

    return fault


def leave_one_row(episode):
    episode.update({name: x[-1:] for name, x in episode.items()})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (put("is_last", 4, True), "is_last is set before the end of an episode (first in row 4"),
        (put("is_last", 9, False), "is_last is not set at the end of an episode (first in row 9"),
        (put("is_terminal", 2, True), "is_terminal is set where is_last is not (first in row 2"),
        (leave_one_row, "an episode has one row, and so no transition (first in row 0"),
        (put("observation", 3, np.nan), "an observation is not a finite float32 (first in row 3"),
        (put("reward", 3, np.inf), "a reward is not a finite float32 (first in row 3"),
        (put("reward", 9, np.nan), "a reward is not a finite float32 (first in row 9"),
        (
            change("reward", lambda x: x.astype(np.float64) + 1e300 * (np.arange(10) == 5)),
            "a reward is not a finite float32 (first in row 5",
        ),
        (put("action", 5, 3), "an action is not one of the task's, 0 to 2 (first in row 5"),
        (put("action", 6, -1), "an action is not one of the task's, 0 to 2 (first in row 6"),
        (
            change("action", lambda x: x.astype(np.int64) + 2**32 * (np.arange(10) == 2)),
            "an action is not one of the task's, 0 to 2 (first in row 2",
        ),
        (
            change("action", lambda x: x + np.float32(0.7)),
            "action is float64 where an integer is needed (first in row 0",
        ),
        (
            change("is_last", lambda x: x.astype(np.float32)),
            "is_last is float32 where a bool is needed (first in row 0",
        ),
        (
            change("reward", lambda x: x[:, None]),
            "reward has the shape (1,) where () is needed (first in row 0",
        ),
        (
            change("observation", lambda x: x[..., None]),
            "observation has the shape (10, 5, 1) where (10, 5) is needed (first in row 0",
        ),
        (
            change("observation", lambda x: np.array([{}] * 10)),
            "observation is object where a number is needed (first in row 0",
        ),
    ],
)
def test_faulty_episodes_are_refused_in_a_sentence(monkeypatch, fault, message):
    episodes = catch_episodes()
    fault(episodes[1])
    with pytest.raises(SystemExit) as refusal:
        convert(monkeypatch, episodes)
    assert str(refusal.value) == f"FOLDER: {message} of episode 1, both counted from 0)."


def test_steps_without_a_field_are_refused(monkeypatch):
    episodes = [{"observation": np.zeros((10, 10, 5)), "reward": np.zeros(10)}]
    message = "FOLDER is not in RLDS form: its steps have no action, is_last, is_terminal."
    with pytest.raises(SystemExit, match=message):
        convert(monkeypatch, episodes)


def test_a_tfds_folder_becomes_a_file(tmp_path, capsys):
    """RLDS through TFDS's own writer and reader, as in the authors' released data."""
    import tensorflow_datasets as tfds

    episodes = catch_episodes(5)
    step_features = {
        "observation": tfds.features.Tensor(shape=(10, 5), dtype=np.float32),
        "action": np.int64,
        "reward": np.float32,
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "discount": np.float32,
    }
    features = {"steps": tfds.features.Dataset(step_features), "episode_id": np.int64}
    rows = [episode | {"discount": np.ones(10, np.float32)} for episode in episodes]
    builder = tfds.dataset_builders.AdhocBuilder(
        name="catch",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": [(i, {"steps": x, "episode_id": i}) for i, x in enumerate(rows)]},
        data_dir=str(tmp_path),
    )
    builder.download_and_prepare()
    out = tmp_path / "new" / "catch.npz"
    args = collector.Args(from_rlds=collector.Path(builder.data_path), out=out)
    collector.main(args)
    assert f"{out}: 5 episodes, 45 transitions, mean return" in capsys.readouterr().out
    with np.load(out) as file:
        header, arrays = json.loads(str(file["header"])), {name: file[name] for name in NAMES}
    # TFDS writes the episodes in the order of a hash of their keys.
    read = [{name: x[i : i + 10] for name, x in arrays.items()} for i in range(0, 50, 10)]
    theirs, ours = (
        sorted([episode[name].tobytes() for name in NAMES] for episode in both)
        for both in (read, episodes)
    )
    assert theirs == ours
    assert (header["schema"], header["source"], header["env_id"]) == (1, "rlds", "catch")
    assert header["returns"] == [float(episode["reward"].sum()) for episode in read]
    assert (header["num_episodes"], header["num_transitions"]) == (5, 45)
    assert header["mean_return"] == pytest.approx(np.mean(header["returns"]))

    collector.main(args)
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=rf"exists already, with from_rlds .*, not {tmp_path.resolve()}"
    ):
        collector.main(dataclasses.replace(args, from_rlds=tmp_path))
    with pytest.raises(SystemExit, match=r"cannot be read as a TFDS/RLDS dataset: .*\.$"):
        collector.read_rlds(tmp_path / "new")


def test_the_collector_compares_its_data_with_those_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(collector.TASKS, "catch", CATCH._replace(num_episodes=1))
    for _ in ("new", "there already"):
        collector.main(collector.Args(data_dir=tmp_path))
        assert "Warning: the data have the CRC-32 " in capsys.readouterr().err


def test_a_file_of_something_else_is_not_taken_for_the_one_asked_for(tmp_path):
    out = tmp_path / "catch.npz"
    args = collector.Args(num_episodes=1, out=out)
    collector.main(args)
    content = out.read_bytes()
    changes = ({"env_id": "cartpole"}, {"noise": 0.3}, {"seed": 1}, {"num_episodes": 2})
    for change in changes:
        ((name, value),) = change.items()
        with pytest.raises(SystemExit, match=rf"exists already, with .*{name} \S+, not {value}"):
            collector.main(dataclasses.replace(args, **change))
    collector.main(args)
    assert out.read_bytes() == content
    out.write_bytes(b"")
    with pytest.raises(SystemExit, match="exists already, with other content"):
        collector.main(args)


def test_a_closed_pipe_ends_a_collection_in_a_sentence(script, tmp_path):
    command = ["benchmark/collect_bsuite.py", "--num-episodes", 200, "--out", tmp_path / "x.npz"]
    process = script(*command, wait=False)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == 1
    assert "Traceback" not in stderr
    assert "Broken pipe: put that right, then run the same command again." in stderr
