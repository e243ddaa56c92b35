"""The collector of Atari data: what it records, and that a kill loses nothing that was saved."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from helpers import PATIENCE, contents, noting, read_store, wait_until_gone

import collect_atari
import prepare_atari

pytestmark = pytest.mark.usefixtures("hurry")
TINY = ["--env-id", "Pong", "--num-steps", "400", "--num-checkpoints", "4", "--num-envs", "2"]
TINY += ["--max-frames", "160", "--width", "0.1", "--replay-start", "80", "--save-every", "40"]
TINY += ["--target-every", "80", "--replay-size", "200", "--epsilon-steps", "100"]


def command(out: Path, *more: str) -> list[str]:
    script = Path(collect_atari.__file__)
    return [sys.executable, str(script), *TINY, "--out", str(out), *more]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory, hurry, cache_dir) -> Path:
    """A collection that was killed with SIGKILL after its first save, and started again."""
    out = tmp_path_factory.mktemp("collect") / "Pong-tiny"
    folder = out.with_name(".Pong-tiny.collecting")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(cache_dir)}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, env=os.environ | cache)
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
    others = tyro.cli(collect_atari.Args, args=[*TINY, "--out", str(out), "--seed", "1"])
    with pytest.raises(SystemExit, match="collection with other arguments"):
        collect_atari.Recorder(folder, others)
    assert {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")} == first
    shutil.copytree(folder, out.parent / "kept")
    for name in sorted(first)[saved["num_episodes"] :]:
        (out.parent / "kept" / name).unlink()  # recorded after the last save: recorded again
    resumed = subprocess.run(command(out), capture_output=True, text=True, env=os.environ | cache)
    assert resumed.returncode == 0, resumed.stderr
    assert "mean return" in resumed.stdout
    return out


def test_resumed_collection_is_whole(killed_and_resumed):
    names = {p.name for p in killed_and_resumed.parent.iterdir()}
    assert names == {"Pong-tiny", "kept"}
    meta = json.loads((killed_and_resumed / "meta.json").read_text())
    assert meta["num_steps"] >= 400
    assert meta["steps_per_checkpoint"] == 100
    assert meta["rom_sha256"] == prepare_atari.rom_digest("Pong")
    assert meta["collector"]["max_frames"] == 160
    assert (meta["source"], meta["percent"], meta["num_actions"]) == ("dqn", 100, 6)
    episodes = read_store(killed_and_resumed)  # a reader of the format, which has its own checks
    labels = [(e["checkpoint"], e["id"]) for e in episodes]
    assert labels[:7] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    for episode in episodes:
        # Episodes of 160 frames are 40 steps and the state after them.
        assert len(episode["action"]) == 41
        assert not episode["is_terminal"]  # cut off, not over
        assert episode["action"].max() < 6
        assert episode["frames"].any(axis=(1, 2)).all()


def test_saved_episodes_survive_the_kill(killed_and_resumed):
    kept = sorted((killed_and_resumed.parent / "kept").glob("*.npz"))
    recorder = SimpleNamespace(folder=killed_and_resumed.parent / "kept")
    assert kept
    for number, episode in zip(range(len(kept)), read_store(killed_and_resumed), strict=False):
        recorded = collect_atari.Recorder.read(recorder, number)
        for name in ("frames", "action", "reward"):
            np.testing.assert_array_equal(recorded[name], episode[name])


def test_a_td_target_is_the_return_and_the_best_value_of_the_target():
    network, tx, rng = collect_atari.QNetwork(3, 0.1), optax.sgd(1.0), np.random.default_rng(0)
    stack, following = rng.integers(0, 256, (2, 1, 84, 84, 4), dtype=np.uint8)
    params, target = (network.init(jax.random.key(i), stack) for i in range(2))
    error = 0.3 + 0.5 * network.apply(target, following).max() - network.apply(params, stack)[0, 1]
    batch = {"stack": stack, "next": following, "action": np.array([1])}
    batch |= {"return": np.float32([0.3]), "discount": np.float32([0.5])}
    learner = collect_atari.Learner(jax.tree.map(jnp.copy, params), target, tx.init(params))
    before = params["params"]["Dense_1"]["bias"]
    after = collect_atari.update(network, tx, learner, batch).params["params"]["Dense_1"]["bias"]
    assert 0.01 < abs(error) < 1  # where Huber's loss is a square
    np.testing.assert_allclose(after - before, [0, error, 0], atol=1e-5)


def test_the_agent_sees_what_the_environments_show(tmp_path, monkeypatch):
    seen, asked = [], []

    def greedy(network, params, stacks):
        np.testing.assert_array_equal(np.moveaxis(stacks, -1, 1), seen[-1])
        asked.append(None)
        return np.array([2, 3])

    monkeypatch.setattr(collect_atari, "make_env", noting(collect_atari.make_env, seen))
    monkeypatch.setattr(collect_atari, "greedy", greedy)
    args = collect_atari.Args(num_steps=20, num_envs=2, max_frames=40, width=0.1, replay_size=100)
    collect_atari.collect(args, collect_atari.Recorder(tmp_path / "r", args))
    assert len(asked) == len(seen) - 1 > 5


def test_what_changes_no_number_may_change_before_a_collection_goes_on(tmp_path, monkeypatch):
    args = collect_atari.Args(out="data/atari/Pong-dqn-200k")  # as prepare_atari.py starts it
    collect_atari.Recorder(tmp_path / "r", args)
    (tmp_path / "r/learner").touch()
    config = (tmp_path / "r/args.json").read_bytes()
    with monkeypatch.context() as patch:  # a disk that is still full when it starts again
        patch.setattr(Path, "write_text", lambda file, _: file.write_bytes(b""))
        for change in ({}, {"out": ""}, {"format": "rlu"}, {"save_every": 5_000}):
            collect_atari.Recorder(tmp_path / "r", dataclasses.replace(args, **change))
    assert (tmp_path / "r/args.json").read_bytes() == config
    with pytest.raises(SystemExit, match="collection with other arguments"):
        collect_atari.Recorder(tmp_path / "r", dataclasses.replace(args, n_step=1))


@pytest.mark.parametrize("name", ["learner", "000000.npz"])
@pytest.mark.parametrize("length", [0, 100])
def test_a_collection_that_a_crash_has_damaged_ends_in_a_sentence(tmp_path, name, length):
    recorder = collect_atari.Recorder(tmp_path / "r", collect_atari.Args())
    recorder.add(make_episode(0, 5, True) | {"frames": np.zeros((5, 84, 84), np.uint8)})
    learner = collect_atari.Learner({"w": np.zeros(99)}, {"w": np.zeros(99)}, ())
    recorder.save(learner)
    file = tmp_path / "r" / name
    file.write_bytes(file.read_bytes()[:length])
    recorder = collect_atari.Recorder(tmp_path / "r", collect_atari.Args())
    with pytest.raises(SystemExit, match=r"r is damaged \(.*\): delete it and run again"):
        recorder.restore(learner, collect_atari.Replay(100))


def test_finished_collection_is_not_overwritten(killed_and_resumed, tmp_path, capsys):
    meta = (killed_and_resumed / "meta.json").read_bytes()
    same = collect_atari.Args(**json.loads(meta)["collector"])
    left = killed_and_resumed.with_name(".Pong-tiny.collecting")
    left.mkdir()  # as by a kill after the store was made
    collect_atari.main(same)
    assert "exists already: it is complete" in capsys.readouterr().out
    assert not left.exists()
    for change, words in (
        ({"seed": 7}, "with seed 0, not 7: give another --out"),
        ({"seed": 7, "max_frames": 400}, "with seed 0, not 7, max_frames 160, not 400"),
        ({"format": "rlu"}, "with no shards: give another --out"),
    ):
        with pytest.raises(SystemExit, match=words):
            collect_atari.main(dataclasses.replace(same, **change))
    assert (killed_and_resumed / "meta.json").read_bytes() == meta
    with pytest.raises(SystemExit, match="not 100% of Qbert-dqn; choose another path"):
        collect_atari.main(collect_atari.Args(env_id="Qbert", out=str(killed_and_resumed)))
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit, match="is no store; choose another path"):
        collect_atari.main(collect_atari.Args(out=str(tmp_path)))
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_envs": 0}, "--num-envs is 0; give 1 to 1024"),
        ({"epsilon_steps": 0}, "--epsilon-steps is 0; give 1 to"),
        ({"width": 0.01}, "--width is 0.01; give 0.03125 to"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan; give 1e-09 to 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; give"),
        ({"epsilon": 5.0}, "--epsilon is 5.0; give 0 to 1"),
        ({"epsilon": -0.1}, "--epsilon is -0.1; give"),
        ({"discount": 7.0}, "--discount is 7.0; give 0 to 1"),
        ({"replay_size": 1}, "--replay-size is 1; give 100 to"),
        ({"n_step": 100_000}, "--n-step is 100000; give 1 to 100"),
        ({"n_step": 100, "replay_size": 100}, "100 holds no --n-step 100: give at least 132"),
        ({"seed": -1}, "--seed is -1; give 0 to"),
        ({"num_steps": 10**12}, "--num-steps is 1000000000000; give 1 to 1000000000"),
    ],
)
def test_bad_arguments_give_one_sentence(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        collect_atari.main(collect_atari.Args(out=str(tmp_path / "store"), **change))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    args = collect_atari.Args(out=str(tmp_path / "Pong-dqn"), format="rlu", num_steps=400)
    with pytest.raises(SystemExit, match="--format rlu needs the package tensorflow"):
        collect_atari.main(args)
    with pytest.raises(SystemExit, match="need the packages tensorflow and tensorflow-datasets"):
        prepare_atari.import_tfds()
    assert list(tmp_path.iterdir()) == []


def test_every_number_has_limits():
    numbers = {k for k, v in vars(collect_atari.Args()).items() if isinstance(v, int | float)}
    assert set(collect_atari.LIMITS) == numbers
    collect_atari.check_args(collect_atari.Args())


def test_a_memory_learns_as_soon_as_it_can(tmp_path, monkeypatch):
    """Of episodes of two states, one of them the last."""
    batches = []

    def update(network, tx, learner, batch):
        batches.append(batch)
        return learner

    monkeypatch.setattr(collect_atari, "update", update)
    options = {"num_steps": 200, "num_envs": 2, "max_frames": 4, "width": 0.1, "n_step": 1}
    args = collect_atari.Args(**options, replay_size=100, replay_start=1)
    recorder = collect_atari.Recorder(tmp_path / "r", args)
    collect_atari.collect(args, recorder)
    assert sum(recorder.lengths) >= 200
    assert batches


@pytest.mark.parametrize("seed", [2147, 2148, 2**31, 2**63, 2**64])
def test_any_seed_works(tmp_path, seed):
    options = {"num_steps": 20, "num_envs": 2, "max_frames": 40, "width": 0.1, "seed": seed}
    args = collect_atari.Args(**options, replay_size=100)
    recorder = collect_atari.Recorder(tmp_path / "r", args)
    collect_atari.collect(args, recorder)
    assert sum(recorder.lengths) >= 20
    saved = collect_atari.flax.serialization.msgpack_restore((tmp_path / "r/learner").read_bytes())
    assert saved["num_episodes"] == len(recorder.lengths)  # a kill while the store is written


def test_signal_ends_a_collection(tmp_path):
    """With one sentence, status 130 and no bar, as nobody is watching."""
    process = subprocess.Popen(
        command(tmp_path / "Pong", "--num-steps", "100000"), stderr=subprocess.PIPE, text=True
    )
    lines = [process.stderr.readline() for _ in range(2)]
    assert all(line.startswith("Pong: ") and line.endswith("return 0.0\n") for line in lines[1:])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "%|" not in stderr
    assert stderr.splitlines()[-1].startswith("Stopped; the same command goes on")


def test_a_signal_whose_exception_is_swallowed_ends_a_collection(tmp_path, monkeypatch):
    def swallowing(network, params, observations):  # as JAX does in its callbacks
        if len(steps) == 5:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        steps.append(True)
        return np.zeros(len(observations), np.int32)

    steps, handler = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(collect_atari, "greedy", swallowing)
    with pytest.raises(KeyboardInterrupt):
        collect_atari.main(tyro.cli(collect_atari.Args, args=[*TINY, "--data-dir", str(tmp_path)]))
    assert len(steps) == 6
    assert signal.getsignal(signal.SIGINT) is handler


def test_collection_ends_with_its_parent(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "environment = os.environ | {'ROSMO_PARENT': str(os.getpid())}\n"
        "log = open(sys.argv[1], 'w+')\n"  # a pipe would break with the parent, and end the child
        "child = subprocess.Popen(sys.argv[2:], stderr=log, env=environment)\n"
        "while not os.path.getsize(sys.argv[1]):\n"
        "    time.sleep(0.1)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)"
    )
    words = [tmp_path / "log", *command(tmp_path / "Pong", "--num-steps", "100000000")]
    parent = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    wait_until_gone([child])


def test_rlu_shards_become_the_same_store(killed_and_resumed, tmp_path, monkeypatch):
    """As many shards as the data has, and prepare_atari.py reads them."""
    args = collect_atari.Args(out=str(tmp_path / "Pong-dqn"), format="rlu", num_steps=400)
    episodes = read_store(killed_and_resumed)

    def collect(args, recorder, _):
        for episode in episodes:
            recorder.add({k: np.array(v) for k, v in episode.items()})

    monkeypatch.setattr(collect_atari, "collect", collect)
    args.num_checkpoints = 4
    collect_atari.main(args)
    marker, *shards = sorted((tmp_path / "Pong-dqn-rlu/atari_episodes_ordered/Pong").iterdir())
    assert marker.name == "collector.json"  # that these are not RL Unplugged's
    number = len({e["checkpoint"] for e in episodes})
    assert [p.name for p in shards] == [f"run_1-{i:05d}-of-{number:05d}" for i in range(number)]
    prefix, store = str(tmp_path / "Pong-dqn-rlu"), tmp_path / "imported"
    _, names = prepare_atari.find_source(prepare_atari.Args("Pong", rlu_prefix=prefix, out=store))
    reader = partial(prepare_atari.read_rlu, prefix, "Pong", 1)
    found = [e for name in names for e in reader(name)]
    meta = json.loads((tmp_path / "Pong-dqn/meta.json").read_text())
    prepare_atari.write_store(store, {k: meta[k] for k in prepare_atari.META}, found)
    new, old, direct = (contents(p) for p in (store, tmp_path / "Pong-dqn", killed_and_resumed))
    for name in ("frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy"):
        assert new[name] == old[name] == direct[name]
    shutil.rmtree(store)
    for _ in range(2):  # the second time it is there already
        prepare_atari.main(prepare_atari.Args("Pong", rlu_prefix=prefix, out=store, workers=1))
    found = json.loads((store / "meta.json").read_text())
    for name in ("source", "steps_per_checkpoint", "rom_sha256"):
        assert found[name] == meta[name], name  # not RL Unplugged's


def test_a_signal_loses_no_episode(tmp_path):
    args = collect_atari.Args(
        env_id="Breakout", num_steps=400, num_envs=1, max_frames=160, width=0.1, n_step=1
    )

    class Noted(list):
        """After 100 steps."""

        def __bool__(self):
            self.append(0)
            return len(self) > 100

    recorder = collect_atari.Recorder(tmp_path / "r", args)
    collect_atari.collect(args, recorder, Noted())
    assert len(recorder.lengths) > 0
    data = (tmp_path / "r" / "learner").read_bytes()
    saved = collect_atari.flax.serialization.msgpack_restore(data)
    assert saved["num_episodes"] == len(recorder.lengths)


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


def test_an_unbroken_collection_is_a_function_of_its_seed(tmp_path):
    def frames(name: str, seed: int) -> list:
        options = {"num_steps": 20, "num_envs": 2, "max_frames": 40, "width": 0.1, "seed": seed}
        args = collect_atari.Args(**options, replay_size=100)
        recorder = collect_atari.Recorder(tmp_path / name, args)
        collect_atari.collect(args, recorder)
        episodes = map(recorder.read, range(len(recorder.lengths)))
        return [(e["action"].tolist(), e["frames"].sum(axis=(1, 2)).tolist()) for e in episodes]

    assert frames("a", 0) == frames("b", 0) != frames("c", 1)


def test_a_collection_explores_less_and_less_learns_and_copies_its_target(tmp_path, monkeypatch):
    updates, options = [], {"num_steps": 400, "num_envs": 2, "max_frames": 160, "width": 0.1}
    options |= {"replay_size": 400, "replay_start": 80, "epsilon_steps": 100, "epsilon": 0.0}
    args = collect_atari.Args(**options, train_every=4, target_every=80, n_step=1)

    def update(network, tx, learner, batch):
        updates.append(round(float(jax.tree.leaves(learner.target)[0].ravel()[0])))
        return learner.replace(params=jax.tree.map(lambda x: x + 1, learner.params))

    monkeypatch.setattr(collect_atari, "update", update)
    monkeypatch.setattr(collect_atari, "greedy", lambda network, params, stacks: np.full(2, 5))
    recorder = collect_atari.Recorder(tmp_path / "r", args)
    collect_atari.collect(args, recorder)
    first, *_, last = [recorder.read(i)["action"][:-1] for i in range(len(recorder.lengths))]
    assert set(first.tolist()) > {5} == set(last.tolist())
    copies = sorted(set(updates))
    assert len(copies) > 2
    assert set(np.diff(copies[1:])) == {80 // 4}


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_damaged_arguments_of_a_collection_end_in_a_sentence(tmp_path, text):
    (tmp_path / "learner").touch()
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(SystemExit, match=r"args\.json is damaged: delete"):
        collect_atari.Recorder(tmp_path, collect_atari.Args())


def test_a_collection_goes_on_with_its_learner_and_its_memory(tmp_path):
    args, episode = collect_atari.Args(), make_episode(0, 5, True)
    episode["frames"] = np.zeros((5, 84, 84), np.uint8)
    recorder = collect_atari.Recorder(tmp_path / "r", args)
    recorder.add(episode)
    ones, zeros = {"w": np.ones(3)}, {"w": np.zeros(3)}
    recorder.save(collect_atari.Learner(ones, ones, ()))
    recorder.add(episode)  # is recorded again
    recorder, replay = collect_atari.Recorder(tmp_path / "r", args), collect_atari.Replay(100)
    learner = recorder.restore(collect_atari.Learner(zeros, zeros, ()), replay)
    assert learner.params["w"].tolist() == learner.target["w"].tolist() == [1, 1, 1]
    assert (recorder.lengths, recorder.num_steps, replay.added) == ([5], 5, 5)
