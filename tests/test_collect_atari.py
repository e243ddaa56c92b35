"""The collector of Atari data: what it records, and that a kill loses nothing that was saved."""

import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import collect_atari
import rosmo_atari

# One worker does it all, so that the collection runs once.

pytestmark = pytest.mark.usefixtures("hurry")
TINY = ["--env-id", "Pong", "--num-steps", "400", "--num-checkpoints", "4", "--num-envs", "2"]
TINY += ["--max-frames", "160", "--width", "0.1", "--replay-start", "80", "--save-every", "40"]
TINY += ["--target-every", "80", "--replay-size", "200", "--epsilon-steps", "100"]


def command(out: Path, *more: str) -> list[str]:
    script = Path(collect_atari.__file__)
    return [sys.executable, str(script), *TINY, "--out", str(out), *more]


def episodes_of(store: rosmo_atari.Store) -> list[dict]:
    """Reads a store back, episode by episode."""
    bounds = np.concatenate([[0], store.ends])
    return [
        {"steps": store.steps[a:b], "frames": rosmo_atari.read_frames(store, np.arange(a, b))}
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.fixture(scope="session")
def killed_and_resumed(tmp_path_factory) -> Path:
    """A collection that was killed with SIGKILL after its first save, and started again."""
    out = tmp_path_factory.mktemp("collect") / "Pong-tiny"
    folder = out.with_name(".Pong-tiny.collecting")
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE)
    deadline = time.time() + 240
    while len(list(folder.glob("*.npz"))) < 4 or not (folder / "learner").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()  # an interrupted collection is never taken for a whole one
    first = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")}
    saved = collect_atari.flax.serialization.msgpack_restore((folder / "learner").read_bytes())
    other = subprocess.run(command(out, "--seed", "1"), capture_output=True, text=True)
    assert other.returncode == 1
    assert "collection with other arguments" in other.stderr
    assert {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")} == first
    shutil.copytree(folder, out.parent / "kept")
    for name in sorted(first)[saved["num_episodes"] :]:
        (out.parent / "kept" / name).unlink()  # recorded after the last save: recorded again
    resumed = subprocess.run(command(out), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "mean return" in resumed.stdout
    return out


def test_resumed_collection_is_whole(killed_and_resumed):
    names = {p.name for p in killed_and_resumed.parent.iterdir()}
    assert names == {"Pong-tiny", "kept"}
    store = rosmo_atari.open_store(killed_and_resumed, "Pong")
    assert store.num_steps >= 400
    assert store.meta["steps_per_checkpoint"] == 100
    assert store.meta["rom_sha256"] == rosmo_atari.rom_digest("Pong")
    # Episodes of 160 frames are 40 steps and the state after them.
    assert set(store.episodes["length"]) == {41}
    assert store.episodes["checkpoint"].tolist()[:7] == [0, 0, 0, 1, 1, 1, 2]
    assert store.episodes["id"].tolist()[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert rosmo_atari.open_store(killed_and_resumed, "Pong", 1).num_steps == 41 * 4
    for episode in episodes_of(store):
        steps = episode["steps"]
        assert np.flatnonzero(steps["is_first"]).tolist() == [0]
        assert np.flatnonzero(steps["is_last"]).tolist() == [40]
        assert not steps["is_terminal"].any()  # cut off, not over
        assert steps["action"].max() < 6
        assert (steps["action"][-1], steps["reward"][-1]) == (0, 0)
        assert episode["frames"].any(axis=(1, 2)).all()


def test_saved_episodes_survive_the_kill(killed_and_resumed):
    kept = sorted((killed_and_resumed.parent / "kept").glob("*.npz"))
    recorder = SimpleNamespace(folder=killed_and_resumed.parent / "kept")
    store = rosmo_atari.open_store(killed_and_resumed, "Pong")
    assert kept
    for number, episode in zip(range(len(kept)), episodes_of(store), strict=False):
        recorded = collect_atari.Recorder.read(recorder, number)
        np.testing.assert_array_equal(recorded["frames"], episode["frames"])
        np.testing.assert_array_equal(recorded["action"], episode["steps"]["action"])


def test_finished_collection_is_not_overwritten(killed_and_resumed):
    with pytest.raises(SystemExit, match="exists already"):
        collect_atari.main(collect_atari.Args(out=str(killed_and_resumed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 0}, "--num-envs is 0; give at least 1"),
        ({"epsilon_steps": 0}, "--epsilon-steps is 0; give at least 1"),
        ({"width": 0.01}, "--width is 0.01; give at least 0.03125"),
    ],
)
def test_bad_arguments_give_one_sentence(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        collect_atari.main(collect_atari.Args(out=str(tmp_path / "store"), **change))
    assert not list(tmp_path.iterdir())


def test_recorded_play_can_be_replayed(tmp_path):
    """The recorded actions, given to the same game, give the recorded frames and rewards."""
    args = collect_atari.Args(
        env_id="Breakout", num_steps=120, num_envs=1, max_frames=800, width=0.1, n_step=1
    )
    recorder = collect_atari.Recorder(tmp_path / "r", args)
    collect_atari.collect(args, recorder)
    episode = recorder.read(0)
    env = collect_atari.make_env("Breakout", 1, max_num_frames_per_episode=800)
    observations, _ = env.reset(seed=args.seed)
    for t in range(len(episode["action"]) - 1):
        np.testing.assert_array_equal(observations[0, -1], episode["frames"][t])
        action = episode["action"][t : t + 1].astype(np.int32)
        observations, rewards, terminated, truncated, _ = env.step(action)
        assert rewards[0] == episode["reward"][t]
    np.testing.assert_array_equal(observations[0, -1], episode["frames"][-1])
    assert terminated[0] or truncated[0]
    assert bool(episode["is_terminal"]) == terminated[0]


def make_episode(first: int, length: int, is_terminal: bool) -> dict:
    """Frame t of the episode is filled with first + t, and so is the reward: +-(first + t)."""
    t = first + np.arange(length)
    return {
        "frames": np.broadcast_to(t[:, None, None].astype(np.uint8), (length, 84, 84)),
        "action": t,
        "reward": np.where(np.arange(length) < length - 1, np.where(t % 2, 5, -5), 0),
        "is_terminal": np.array(is_terminal),
    }


@pytest.mark.parametrize("size", [60, 23])
@pytest.mark.parametrize("n", [1, 3])
def test_replay_against_brute_force(size, n):
    replay, slots, discount = collect_atari.Replay(size), [], 0.5
    for first, length, terminal in ((1, 7, True), (11, 9, False), (31, 2, True), (41, 12, True)):
        replay.add(make_episode(first, length, terminal))
        slots += [(first, length, terminal, t) for t in range(length)]
    whole = slots[-size:]  # what an overwritten ring still holds
    seen = set()
    for i in range(40):
        batch = replay.sample(np.random.default_rng(i), 16, n, discount)
        for b, action in enumerate(batch["action"]):
            seen.add(int(action))
            first, length, terminal, t = next(s for s in whole if s[0] + s[3] == action)
            steps = min(n, length - 1 - t)
            assert steps > 0
            rewards = [np.sign(5 if (first + t + k) % 2 else -5) for k in range(steps)]
            expected = sum(discount**k * r for k, r in enumerate(rewards))
            assert batch["return"][b] == pytest.approx(expected)
            ended = terminal and t + steps == length - 1
            assert batch["discount"][b] == (0 if ended else discount**steps)
            for name, at in (("stack", t), ("next", t + steps)):
                stack = [first + at - k if at >= k else 0 for k in (3, 2, 1, 0)]
                assert batch[name][b, 0, 0].tolist() == stack
    assert len(seen) >= min(size, len(slots)) - 4 - 3 - n  # nothing but ends and edges left out


def test_update_learns_the_value_of_a_single_state():
    network, args = collect_atari.QNetwork(3, 0.1), collect_atari.Args(learning_rate=3e-3)
    tx = collect_atari.optimizer(args)
    stack = np.full((8, 84, 84, 4), 128, np.uint8)
    params = network.init(jax.random.key(0), stack)
    learner = collect_atari.Learner(params, jax.tree.map(jnp.copy, params), tx.init(params))
    batch = {"stack": stack, "action": np.full(8, 1), "return": np.ones(8, np.float32)}
    batch |= {"discount": np.zeros(8, np.float32), "next": stack}
    for _ in range(100):
        learner = collect_atari.update(network, tx, learner, batch)
    values = network.apply(learner.params, stack)
    assert values[:, 1] == pytest.approx(np.ones(8), abs=0.05)
    assert collect_atari.greedy(network, learner.params, stack).tolist() == [1] * 8
