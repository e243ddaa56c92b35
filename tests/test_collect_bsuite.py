"""The BSuite collector: its record against the real environments, its noise, its files."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from bsuite.environments.catch import Catch

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
    return data_dir / "catch-noise0.1-seed3.npz"


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
        "data_dir": str(dataset.parent), "overwrite": False,
    }  # fmt: skip
    assert header.pop("versions").keys() == {"jax", "bsuite", "numpy"}
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
    for paper in ("18000", "0.60", "-0.66"):
        assert paper in result.stdout
    path = tmp_path / "data/bsuite" / dataset.name
    assert [file.name for file in path.parent.iterdir()] == [dataset.name]
    with np.load(path) as again, np.load(dataset) as first:
        for name in NAMES:
            np.testing.assert_array_equal(again[name], first[name])
        versions = [json.loads(str(file["header"]))["versions"] for file in (again, first)]
    assert versions[0] == versions[1]


def test_seeds_give_different_data():
    first, second = (collector.collect(CATCH, 5, 0.0, seed)[0] for seed in (0, 1))
    assert (first["action"] != second["action"]).any()
    assert (first["observation"] != second["observation"]).any()


def test_existing_data_are_kept_unless_told(dataset, tmp_path, capsys):
    args = collector.Args(num_episodes=1, data_dir=tmp_path)
    path = tmp_path / "catch-noise0-seed0.npz"
    path.write_bytes(b"old")
    collector.main(args)
    assert path.read_bytes() == b"old"
    assert "exists" in capsys.readouterr().out
    args.overwrite = True
    collector.main(args)
    with np.load(path) as file:
        assert len(file["action"]) == 10


def test_interrupted_run_writes_nothing(script, tmp_path):
    arguments = ("--env-id", "mountain_car", "--data-dir", tmp_path / "data")
    process = script("benchmark/collect_bsuite.py", *arguments, wait=False)
    assert process.stdout.readline().startswith("Collecting")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "Interrupted: nothing was written.\n"
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_written_file_never_has_the_final_name(monkeypatch, tmp_path, error):
    def savez(file, **arrays):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez_compressed", savez)
    path = tmp_path / "catch-noise0-seed0.npz"
    path.write_bytes(b"old")
    args = collector.Args(num_episodes=1, data_dir=tmp_path, overwrite=True)
    is_os_error = isinstance(error, OSError)
    message = "No space left on device" if is_os_error else None
    with pytest.raises(SystemExit if is_os_error else KeyboardInterrupt, match=message):
        collector.main(args)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "pong"}, "Unknown --env-id pong.*cartpole, catch, mountain_car"),
        ({"noise": -0.1}, "--noise must .* not -0.1"),
        ({"noise": 1.5}, "--noise must .* not 1.5"),
        ({"noise": float("nan")}, "--noise must .* not nan"),
        ({"seed": -1}, "--seed must .* not -1"),
        ({"num_episodes": 0}, "--num-episodes must .* not 0"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        collector.main(collector.Args(**arguments, data_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_error_goes_to_stderr_without_traceback(script, tmp_path):
    (tmp_path / "file").touch()
    result = script("benchmark/collect_bsuite.py", "--data-dir", tmp_path / "file")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"Cannot make the folder {tmp_path / 'file'}: File exists.\n"
