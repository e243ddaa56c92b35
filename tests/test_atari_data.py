"""What the Atari scripts share: reading stores, batches, the loader, environment, evaluation.

benchmark/prepare_atari.py writes the stores; test_prepare_atari.py tests it.
"""

import dataclasses
import inspect
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from helpers import write_store

import bc_bsuite
import rosmo_atari as script

LENGTHS = (30, 25, 20, 40, 33, 70, 5, 61, 3)
CHECKPOINTS = (0, 0, 0, 1, 1, 2, 3, 3, 4)
PER_CHECKPOINT = 60
HALF = (0, 3, 5, 6, 7, 8)  # those of which a checkpoint's first half has the first step
# The fields of a store's steps that do not depend on its way of padding.
COLUMNS = ("action", "reward", "is_last", "is_terminal")


def make_episodes() -> list[dict]:
    rng = np.random.default_rng(0)
    episodes = []
    for n, checkpoint in zip(LENGTHS, CHECKPOINTS, strict=True):
        more = {"is_terminal": n % 2 == 1, "checkpoint": checkpoint}
        episode = helpers.random_episode(rng, n, 6, **more)
        frames = np.repeat(rng.integers(1, 255, (n, 84, 6), dtype=np.uint8), 14, axis=2)
        action = np.append(episode["action"][:-1], 0)
        episodes.append(episode | {"frames": frames, "action": action})
    return episodes


EPISODES = make_episodes()


def write(path: Path, which=range(9), **meta) -> Path:
    meta = {"source": "run1", "steps_per_checkpoint": PER_CHECKPOINT} | meta
    return write_store(path, "Pong", [EPISODES[i] for i in which], 6, **meta)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("atari") / "Pong-run1-100pct")


@pytest.fixture
def copy(path, tmp_path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def open_store(path: Path, percent: float = 100.0, env_id: str = "Pong"):
    return helpers.open_store(path, env_id, percent)


# Sampler


def brute_force_states(episodes: list[dict]) -> tuple[np.ndarray, dict]:
    """Every state of the episodes, one by one, stacked as the environment stacks."""
    states, columns = [], {name: [] for name in COLUMNS}
    for e in episodes:
        for t in range(len(e["action"])):
            stack = [e["frames"][t - k] if t >= k else np.zeros((84, 84)) for k in (3, 2, 1, 0)]
            states.append(np.stack(stack, -1))
            last = t == len(e["action"]) - 1
            row = (e["action"][t], e["reward"][t], last, last and e["is_terminal"])
            for name, value in zip(COLUMNS, row, strict=True):
                columns[name].append(value)
    return np.array(states, np.uint8), {name: np.array(c) for name, c in columns.items()}


@pytest.mark.parametrize(("percent", "which"), [(100, range(9)), (50, HALF)])
def test_batches_equal_brute_force(path, percent, which):
    store = open_store(path, percent)
    states, columns = brute_force_states([EPISODES[i] for i in which])
    assert len(store.index) == len(states)
    seen = set()
    for step in range(8):
        batch = script.sample_batch(store, 3, step, 64, 11)
        start = np.random.default_rng((3, step)).integers(len(states), size=64)
        at = (start[:, None] + np.arange(11)) % len(states)
        seen.update(start.tolist())
        stacked = script.stack_frames(batch.frames, batch.history)
        np.testing.assert_array_equal(stacked, states[at])
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(batch, name), column[at])
    ends = np.flatnonzero(columns["is_last"])
    # The windows that matter were among them: first, last and second state, and round the end.
    assert seen & set(ends.tolist())
    assert seen & set((ends[:-1] + 1).tolist())
    assert seen & set((ends[:-1] + 2).tolist())
    assert max(seen) > len(states) - 11
    dtypes = {name: str(x.dtype) for name, x in batch._asdict().items()}
    assert dtypes == {
        "frames": "uint8", "history": "uint8", "action": "int32", "reward": "float32",
        "is_last": "bool", "is_terminal": "bool",
    }  # fmt: skip


def test_batch_is_a_function_of_seed_and_step(path):
    store = open_store(path)
    batch = script.sample_batch(store, 0, 5, 16, 4)
    script.sample_batch(store, 0, 6, 16, 4)
    for a, b in zip(batch, script.sample_batch(store, 0, 5, 16, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    for seed, step in ((1, 5), (0, 6)):
        assert (script.sample_batch(store, seed, step, 16, 4).frames != batch.frames).any()
    halves = [script.sample_batch(store, 0, 5, 16, 4, r) for r in (slice(0, 8), slice(8, 16))]
    for whole, first, second in zip(batch, *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([first, second]))


def test_smaller_percent_is_the_same_from_a_larger_store(path, tmp_path):
    small = open_store(write(tmp_path / "small", HALF, percent=50), 50)
    large = open_store(path, 50)
    batches = [script.sample_batch(store, 0, 0, 64, 11) for store in (small, large)]
    for x, y in zip(*batches, strict=True):
        np.testing.assert_array_equal(x, y)
    assert small.facts == large.facts != open_store(path).facts


def test_all_of_a_store_is_read_if_all_of_the_data_are_asked_for(tmp_path):
    """Also where a checkpoint has more than RL Unplugged's million of steps."""
    store = open_store(write(tmp_path / "store", steps_per_checkpoint=10))
    assert len(store.index) == sum(LENGTHS)
    assert len(open_store(tmp_path / "store", 99.9).episodes) == len(HALF)  # these start early


def test_the_data_are_known_by_what_is_learned_from(path, tmp_path):
    facts = open_store(path).facts
    assert facts["episodes"] == 9
    assert facts["steps"] == sum(LENGTHS)
    assert facts["source"] == "run1"
    mean = np.mean([e["reward"].sum(dtype=np.float64) for e in EPISODES])
    assert facts["mean_return"] == pytest.approx(mean, rel=1e-5)
    assert json.loads(json.dumps(facts)) == facts
    other = [EPISODES[0] | {"action": (EPISODES[0]["action"] + 1) % 6}, *EPISODES[1:]]
    meta = {"source": "run1", "steps_per_checkpoint": PER_CHECKPOINT}
    changed = open_store(write_store(tmp_path / "other", "Pong", other, 6, **meta))
    assert changed.facts["crc32"] != facts["crc32"]
    other = [episode | {"frames": 255 - episode["frames"]} for episode in EPISODES]
    inverted = open_store(write_store(tmp_path / "inverted", "Pong", other, 6, **meta)).facts
    assert [name for name in facts if facts[name] != inverted[name]] == ["frames_crc32"]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_loader_keeps_the_order_and_starts_anywhere(num_threads):
    def load(step):
        time.sleep(0.01 * (step % 3))  # later ones are ready first
        return step

    batches = script.load_batches(load, 7, num_threads)
    assert [next(batches) for _ in range(12)] == list(range(7, 19))
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_loader_keeps_all_of_its_threads_busy():
    meeting = threading.Barrier(8)  # passed when eight wait in it
    batches = script.load_batches(lambda step: meeting.wait(timeout=helpers.PATIENCE), 0, 8)
    assert {next(batches) for _ in range(8)} == set(range(8))
    meeting.abort()  # those that wait already
    batches.close()


def test_loader_stays_ahead_by_four_and_passes_errors_on():
    made = []

    def load(step):
        made.append(step)
        if step == 5:
            raise SystemExit("damaged")
        return step

    batches = script.load_batches(load, 0, 2)
    assert next(batches) == 0
    until = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)  # in which no further one begins
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert [next(batches) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(SystemExit, match="damaged"):
        next(batches)


# Store


REFUSED = (
    r"copy cannot be used as a store of Pong: .*\. Give another --dataset, or make it again\.$"
)


FILES = ("meta.json", "frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy")
DAMAGES = [*itertools.product(FILES, ("missing", "truncated", "empty", "changed"))]
DAMAGES.remove(("meta.json", "changed"))  # one letter of a text


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_damaged_store(copy, name, how):
    """Frames have checksums of their own, and are read when they are needed."""
    helpers.damage(copy / name, how)
    if (name, how) == ("frames.bin", "changed"):
        with pytest.raises(SystemExit, match=r"A chunk of frames\.bin is damaged"):
            open_store(copy)  # which samples them
        return
    with pytest.raises(SystemExit, match=REFUSED) as end:
        open_store(copy)
    assert "\n" not in end.value.code
    assert how != "missing" or f"No such file or directory: '{copy / name}'" in end.value.code


def test_memory_that_is_not_enough_is_no_fault_of_the_store(copy, monkeypatch):
    def load(path):
        raise MemoryError

    monkeypatch.setattr(script.np, "load", load)
    with pytest.raises(MemoryError):  # of which the script's entry speaks
        open_store(copy)


@pytest.mark.parametrize(
    ("meta", "fault"),
    [
        ({"env_id": "Qbert"}, "it is of Qbert with 6 actions"),
        ({"num_actions": 4}, "it is of Pong with 4 actions"),
        ({"num_actions": 18}, "it has 18 actions, and the game has another number"),
        ({"percent": 10}, "it has 10% of the data"),
        ({"version": 1}, "version|format"),
        ({"crc32": [1]}, "AttributeError"),
        ({"source": None}, "KeyError.'source'"),
    ],
)
def test_a_store_of_another_kind(copy, meta, fault):
    before = json.loads((copy / "meta.json").read_text())
    changed = {name: value for name, value in (before | meta).items() if value is not None}
    (copy / "meta.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match=rf"as a store of Pong: .*({fault})"):
        open_store(copy, 11)


def test_a_store_with_chunks_of_another_length(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_atari.CHUNK", 32)
    path = write(tmp_path / "copy")
    with pytest.raises(SystemExit, match=REFUSED.replace(".*", "cannot reshape array .*", 1)):
        open_store(path)


def test_a_store_of_another_run_than_the_one_that_is_given(copy):
    """Which is not named where it is the default."""
    meta = json.loads((copy / "meta.json").read_text()) | {"source": "run3"}
    (copy / "meta.json").write_text(json.dumps(meta))
    args = script.Args(env_id="Pong", dataset=copy)
    for given in (1, 3):
        assert script.open_store(dataclasses.replace(args, rlu_run=given)).facts["source"] == "run3"
    with pytest.raises(SystemExit, match="it is run3 of RL Unplugged, not --rlu-run 2"):
        script.open_store(dataclasses.replace(args, rlu_run=2))


def test_without_evaluations_the_game_need_not_be_one_of_ale(copy):
    meta = json.loads((copy / "meta.json").read_text()) | {"env_id": "Mine"}
    args = script.Args(env_id="Mine", dataset=copy, eval_episodes=0, final_eval_episodes=0)
    (copy / "meta.json").write_text(json.dumps(meta | {"num_actions": 7}))
    script.open_store(args)
    with pytest.raises(SystemExit, match="There is no game 'Mine'"):
        script.open_store(dataclasses.replace(args, final_eval_episodes=1))
    (copy / "meta.json").write_text(json.dumps(meta | {"num_actions": 4}))
    with pytest.raises(SystemExit, match="it is of Mine with 4 actions"):
        script.open_store(args)


def test_the_smallest_store_that_has_enough_is_taken(tmp_path, path):
    args = script.Args(env_id="Pong", data_dir=tmp_path, data_percent=5)
    assert script.find_store(args) is None
    for name in (
        *("Pong-run1-100pct", "Pong-run1-20pct", "Pong-run1-2.5pct", "Pong-run2-5pct"),
        *("Pong-run1-foopct", "Pong-run12-5pct"),  # of someone else
    ):
        (tmp_path / "atari" / name).mkdir(parents=True)
    assert script.find_store(args).name == "Pong-run1-20pct"
    for percent, run, name in ((1, 1, "run1-2.5pct"), (50, 1, "run1-100pct"), (5, 2, "run2-5pct")):
        args = script.Args(env_id="Pong", data_dir=tmp_path, data_percent=percent, rlu_run=run)
        assert script.find_store(args).name == f"Pong-{name}"
    assert script.find_store(script.Args(env_id="Pong", data_dir=tmp_path, rlu_run=2)) is None
    assert script.find_store(script.Args(env_id="Qbert", data_dir=tmp_path)) is None


def test_a_missing_store_is_made_by_the_tool(tmp_path, monkeypatch):
    commands = []

    def run(command, env):
        assert env["JAX_PLATFORMS"] == "cpu"
        commands.append(command)
        write(tmp_path / "atari" / "Pong-run3-50pct", HALF, percent=50, source="run3")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    args = script.Args(env_id="Pong", rlu_run=3, data_percent=50, data_dir=tmp_path)
    assert len(script.open_store(args).episodes) == 6
    ((_, tool, *options),) = commands
    assert tool.endswith("benchmark/prepare_atari.py")
    expected = ["--env-id", "Pong", "--rlu-run", "3", "--percent", "50", "--data-dir"]
    assert options == [*expected, str(tmp_path)]
    script.open_store(args)
    assert len(commands) == 1


def test_what_the_tool_recorded_instead_is_taken(tmp_path, monkeypatch):
    """When RL Unplugged cannot be reached; the tool has said so."""

    def run(command, env):
        write(tmp_path / "atari" / "Pong-dqn-200k", source="dqn")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    store = script.open_store(script.Args(env_id="Pong", data_dir=tmp_path))
    assert store.facts["source"] == "dqn"


def test_a_tool_that_fails_or_is_not_there_ends_the_script(tmp_path, monkeypatch):
    args = script.Args(env_id="Pong", data_dir=tmp_path)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match="3"):
        script.open_store(args)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "rosmo_atari.py"))
    command = r"python .*prepare_atari\.py --env-id Pong --rlu-run 1 --percent 100"
    with pytest.raises(SystemExit, match=f"The data are missing; make them first: {command}"):
        script.open_store(args)
    monkeypatch.undo()
    monkeypatch.setattr(script.jax, "process_count", lambda: 2)  # on several hosts
    with pytest.raises(SystemExit, match="The data are missing; make them first"):
        script.open_store(args)
    write(tmp_path / "atari" / "Pong-dqn-200k", source="dqn")  # as the command does offline
    monkeypatch.setattr(script, "all_processes", lambda value: [value])
    assert script.open_store(args).facts["source"] == "dqn"
    with pytest.raises(SystemExit, match=r"There is no game 'Breakuot'; .*Breakout"):
        script.open_store(script.Args(env_id="Breakuot", data_dir=tmp_path))


def test_processes_that_see_different_data_end(tmp_path, monkeypatch):
    write(tmp_path / "store")
    args, seen = script.Args(env_id="Pong", dataset=tmp_path / "store"), []
    monkeypatch.setattr(script, "all_processes", lambda value: seen.append(value) or [value] * 2)
    script.open_store(args)
    monkeypatch.setattr(script, "all_processes", lambda value: [value, value + 1])
    with pytest.raises(SystemExit, match="see different data: all must read one store"):
        script.open_store(args)
    write(tmp_path / "other", which=range(8))
    monkeypatch.setattr(script, "all_processes", lambda value: [*seen, value])
    with pytest.raises(SystemExit, match="see different data"):
        script.open_store(dataclasses.replace(args, dataset=tmp_path / "other"))


# Environment and evaluation

SHORT = {"max_num_frames_per_episode": 160}


def test_the_environment_has_the_settings_of_dopamine(monkeypatch):
    """Those that are given, and those that are ALE's defaults."""
    bind = inspect.signature(script.AtariVectorEnv).bind
    monkeypatch.setattr(script, "AtariVectorEnv", bind)
    bound = script.make_env("MsPacman", 3)
    bound.apply_defaults()
    settings = {"repeat_action_probability": 0.25, "noop_max": 0, "use_fire_reset": False}
    settings |= {"reward_clipping": False, "episodic_life": False, "continuous": False}
    settings |= {"full_action_space": False, "max_num_frames_per_episode": 108_000}
    settings |= {"frameskip": 4, "maxpool": True, "stack_num": 4, "grayscale": True}
    settings |= {"img_height": 84, "img_width": 84}
    assert (bound.arguments["game"], bound.arguments["num_envs"]) == ("ms_pacman", 3)
    assert settings.items() <= bound.arguments.items()


def test_environment_stacks_as_the_loader_does(tmp_path):
    """Recorded frames, sampled and stacked, are the observations that the agent saw."""
    env = script.make_env("MsPacman", 1, **SHORT)
    observations, _ = env.reset(seed=np.array([3], np.int32))
    seen, running = [observations[0]], True
    while running:
        observations, _, terminated, truncated, _ = env.step(np.array([len(seen) % 9]))
        seen.append(observations[0].copy())
        running = not (terminated[0] or truncated[0])
    assert len(seen) == 41
    assert not seen[0][:3].any()
    assert seen[0][3].any()
    episode = {"frames": np.stack([s[3] for s in seen]), "action": np.zeros(41, int)}
    episode |= {"reward": np.zeros(41), "is_terminal": False}
    path = write_store(tmp_path / "s", "MsPacman", [episode, episode], 9)
    batch = script.sample_batch(open_store(path, env_id="MsPacman"), 0, 0, 200, 2)
    at = np.random.default_rng((0, 0)).integers(82, size=200) % 41
    stacked = np.asarray(script.stack_frames(batch.frames, batch.history))[:, 0]
    np.testing.assert_array_equal(stacked, np.stack(seen)[at].transpose(0, 2, 3, 1))
    assert {0, 1, 2, 40} <= set(at.tolist())


def test_the_environment_repeats_actions_keeps_rewards_and_plays_all_lives():
    """Eight games with the same actions: sticky ones alone can make them differ."""
    env = script.make_env("Riverraid", 8)
    first, infos = env.reset(seed=np.arange(8, dtype=np.int32))
    assert (first == first[0]).all()
    all_lives, over = infos["lives"].copy(), np.zeros(8, bool)
    differ, highest, lost = False, 0.0, False
    for t in range(400):
        frames, reward, terminated, _, infos = env.step(np.full(8, t // 3 % 5, np.int32))
        over |= terminated
        differ |= bool((frames != frames[0]).any())
        highest = max(highest, reward.max())
        lost |= bool(((infos["lives"] < all_lives) & ~over).any())
    env.close()
    assert differ
    assert highest > 1
    assert lost


def fire(observations, key):
    assert observations.shape[1:] == (84, 84, 4)
    assert observations.dtype == np.uint8
    return jax.random.randint(key, len(observations), 0, 6)


def test_evaluate_counts_the_first_episode_of_each_environment(monkeypatch):
    """Against environments played one by one, with the actions that the evaluator chose."""
    make_env, actions, sizes = script.make_env, [], []

    def recorded(env_id, num_envs, **kwargs):
        env = make_env(env_id, num_envs)
        step = lambda chosen: actions.append(chosen.copy()) or env.step(chosen)  # noqa: E731
        return SimpleNamespace(reset=env.reset, step=step)

    def act(observations, key):
        sizes.append(len(observations))
        return fire(observations, key)

    monkeypatch.setattr(script, "make_env", recorded)
    returns = script.evaluate(act, "Asterix", 9, 0)
    seeds = np.random.default_rng(0).integers(2**31, size=9, dtype=np.int32)
    alone, lengths = [], []
    for i in range(9):
        env = make_env("Asterix", 1)
        env.reset(seed=seeds[i : i + 1])
        total, t, running = 0, 0, True
        while running:
            _, rewards, terminated, truncated, _ = env.step(actions[t][i : i + 1])
            total, t, running = total + rewards[0], t + 1, not (terminated[0] or truncated[0])
        alone.append(float(total))
        lengths.append(t)
    assert returns == alone
    assert max(lengths) == len(actions)
    before_last = sorted(lengths)[-2]  # the last one goes on alone
    assert sizes == [9] * before_last + [1] * (max(lengths) - before_last)
    assert before_last < max(lengths)


def test_evaluate_shows_each_game_its_own_frames_and_draws_anew(monkeypatch):
    seen, keys = [], []

    def act(observations, key):
        np.testing.assert_array_equal(np.moveaxis(observations, -1, 1), seen[-1])
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return np.array([0, 1, 2])

    monkeypatch.setattr(script, "make_env", helpers.noting(script.make_env, seen))
    script.evaluate(act, "MsPacman", 3, 0, max_frames=80)
    assert len(set(keys)) == len(keys) == 20


def test_evaluate_depends_on_the_seed_and_can_be_broken_off():
    runs = [script.evaluate(fire, "MsPacman", 3, seed, max_frames=800) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    steps = []

    def stop(observations, key):
        steps.append(None)
        return fire(observations, key) if len(steps) < 5 else None

    assert script.evaluate(stop, "MsPacman", 3, 0) is None
    assert len(steps) == 5
    assert script.evaluate(stop, "MsPacman", 0, 0) == []


@pytest.mark.parametrize("frames", [4, 40])
def test_evaluate_cuts_an_episode_off_after_so_many_frames(frames):
    steps = []
    act = lambda observations, key: steps.append(None) or fire(observations, key)  # noqa: E731
    assert len(script.evaluate(act, "MsPacman", 2, 0, max_frames=frames)) == 2
    assert len(steps) == frames // 4


def test_a_killed_tool_is_named_and_knows_its_parent(tmp_path, monkeypatch):
    seen = []
    ended = lambda command, env: seen.append(env) or SimpleNamespace(returncode=-9)  # noqa: E731
    monkeypatch.setattr(script.subprocess, "run", ended)
    with pytest.raises(SystemExit, match=r"prepare_atari\.py was killed"):
        script.open_store(script.Args(env_id="Pong", data_dir=tmp_path))
    assert seen[0]["ROSMO_PARENT"] == str(os.getpid())
    with pytest.raises(SystemExit, match=r"collect_bsuite\.py was killed"):
        bc_bsuite.load_dataset(bc_bsuite.Args(data_dir=tmp_path))
