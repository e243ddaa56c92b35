"""The data and evaluation of the Atari scripts: store, sampler, loader, importer, environment."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest

import collect_atari
import rosmo_atari as script

LENGTHS = (30, 25, 20, 40, 33, 70, 5, 61, 3)
PER_CHECKPOINT = 60  # gives the checkpoints 0 0 0 | 1 1 | 2 | 3 3 | 4
META = {"env_id": "Pong", "source": "run1", "percent": 100, "rom_sha256": None, "num_actions": 6}
META |= {"steps_per_checkpoint": PER_CHECKPOINT}


def make_episodes() -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "frames": np.repeat(rng.integers(1, 255, (n, 84, 6), dtype=np.uint8), 14, axis=2),
            "action": rng.integers(0, 6, n),
            "reward": rng.normal(scale=2, size=n).astype(np.float32).round(),
            "is_terminal": np.array(n % 2 == 1),
        }
        for n in LENGTHS
    ]


EPISODES = make_episodes()
LABELS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0)]


def write(path: Path, which=range(9), **meta) -> Path:
    with script.write_store(path, META | meta) as writer:
        for i in which:
            e = EPISODES[i]
            fields = e["frames"], e["action"], e["reward"], e["is_terminal"]
            writer.add(*fields, *LABELS[i], e["reward"].sum())
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("atari") / "Pong-run1-100pct")


@pytest.fixture
def copy(path, tmp_path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


# Sampler


def brute_force_states(episodes: list[dict]) -> tuple[np.ndarray, dict]:
    """Every state of the episodes, one by one, stacked as the environment stacks."""
    states, columns = [], {name: [] for name in script.STEP.names}
    for e in episodes:
        for t in range(len(e["action"])):
            stack = [e["frames"][t - k] if t >= k else np.zeros((84, 84)) for k in (3, 2, 1, 0)]
            states.append(np.stack(stack, -1))
            last = t == len(e["action"]) - 1
            row = (e["action"][t], e["reward"][t], t == 0, last, last and e["is_terminal"])
            for name, value in zip(script.STEP.names, row, strict=True):
                columns[name].append(value)
    return np.array(states, np.uint8), {name: np.array(c) for name, c in columns.items()}


@pytest.mark.parametrize(("percent", "which"), [(100, range(9)), (50, (0, 3, 5, 6, 7, 8))])
def test_batches_equal_brute_force(path, percent, which):
    store = script.open_store(path, "Pong", percent)
    states, columns = brute_force_states([EPISODES[i] for i in which])
    assert store.num_steps == len(states)
    seen = set()
    for step in range(8):
        batch = script.sample_batch(store, 3, step, 64, 11)
        start = np.random.default_rng((3, step)).integers(len(states), size=64)
        at = (start[:, None] + np.arange(11)) % len(states)
        seen.update(start.tolist())
        for t in range(11):
            stacked = script.stack_frames(batch.frames, batch.history, t)
            np.testing.assert_array_equal(stacked, states[at[:, t]])
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(batch, name), column[at])
    ends = np.flatnonzero(columns["is_last"])
    # The windows that matter were among them: first, last and second state, and round the end.
    assert seen & set(ends.tolist())
    assert seen & set((ends[:-1] + 1).tolist())
    assert seen & set((ends[:-1] + 2).tolist())
    assert max(seen) > len(states) - 11
    assert batch.action.dtype == np.int32
    assert batch.reward.dtype == np.float32


def test_batch_is_a_function_of_seed_and_step(path):
    store = script.open_store(path, "Pong")
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
    small = write(tmp_path / "small", (0, 3, 5, 6, 7, 8), percent=50)
    a = script.sample_batch(script.open_store(small, "Pong", 50), 0, 0, 64, 11)
    b = script.sample_batch(script.open_store(path, "Pong", 50), 0, 0, 64, 11)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


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
    batches = script.load_batches(lambda step: meeting.wait(timeout=5), 0, 8)
    assert {next(batches) for _ in range(8)} == set(range(8))
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
    time.sleep(0.2)
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert [next(batches) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(SystemExit, match="damaged"):
        next(batches)


# Store


def damage(folder: Path, name: str, how: str) -> None:
    data = (folder / name).read_bytes()
    middle = len(data) // 2
    if how == "missing":
        (folder / name).unlink()
    elif how == "changed":
        flipped = bytes([data[middle] ^ 1])
        (folder / name).write_bytes(data[:middle] + flipped + data[middle + 1 :])
    else:
        (folder / name).write_bytes(data[: {"truncated": middle, "empty": 0}[how]])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "changed"])
@pytest.mark.parametrize("name", ["frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy"])
def test_damaged_store(copy, name, how):
    damage(copy, name, how)
    with pytest.raises(SystemExit, match=r"is no whole store .*: delete it and run again\.$"):
        script.open_store(copy, "Pong")


@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_damaged_header(copy, how):
    damage(copy, "meta.json", how)
    with pytest.raises(SystemExit, match="is no whole store"):
        script.open_store(copy, "Pong")


def test_store_of_another_kind(copy, tmp_path):
    with pytest.raises(SystemExit, match="is 100% of Pong in format 1, not 100% of Qbert"):
        script.open_store(copy, "Qbert")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | {"version": 0}))
    with pytest.raises(SystemExit, match="in format 0"):
        script.open_store(copy, "Pong")
    (copy / "meta.json").write_text(json.dumps(meta | {"percent": 10}))
    with pytest.raises(SystemExit, match="is 10% of Pong"):
        script.open_store(copy, "Pong", 11)
    with pytest.raises(SystemExit, match="is no whole store"):
        script.open_store(write(tmp_path / "empty", ()), "Pong")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, chunks):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script.StoreWriter, "_write", full)
    with pytest.raises(SystemExit, match=r"The disk is full: .*Pong was not built"):
        write(tmp_path / "Pong")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"Pong cannot be written \(.*\); choose another folder"):
        write(tmp_path / "file" / "Pong")


def test_an_error_in_a_build_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), script.write_store(tmp_path / "Pong", META):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_two_builds_at_once(tmp_path):
    with script.write_store(tmp_path / "Pong", META):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=r"Another process is building .*Pong: run again"):
            write(tmp_path / "Pong")
        assert sorted(tmp_path.rglob("*")) == before  # the first build is untouched
    assert [p.name for p in tmp_path.iterdir()] == ["Pong"]


def test_killed_build_is_cleaned_up(path, tmp_path):
    code = (
        "import os, sys, signal, pathlib, rosmo_atari as s\n"
        "with s.write_store(pathlib.Path(sys.argv[1]), {}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "Pong")]
    killed = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(Path(script.__file__).parent)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert {p.name for p in tmp_path.iterdir()} == {".Pong.building", ".Pong.lock"}
    assert contents(write(tmp_path / "Pong")) == contents(path)
    assert [p.name for p in tmp_path.iterdir()] == ["Pong"]


# RL Unplugged. One worker does it all, since importing TensorFlow takes its time.


@pytest.fixture(scope="session")
def rlu(tmp_path_factory) -> SimpleNamespace:
    """Shards in RL Unplugged's format, and the same prepared by TFDS's own builder."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("rlu")
    recorder = collect_atari.Recorder(folder / "recorder", collect_atari.Args())
    for episode in EPISODES:
        recorder.add(episode)
    assert recorder.checkpoints(PER_CHECKPOINT) == LABELS
    shards = folder / "atari_episodes_ordered" / "Pong"
    collect_atari.write_rlu(shards, recorder, LABELS)
    builder_cls = tfds.builder_cls("rlu_atari_checkpoints_ordered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_cls, "_SHARDS", LABELS[-1][0] + 1)
        patch.setattr(builder_cls, "_INPUT_FILE_PREFIX", str(shards.parent))
        builder_cls(config="Pong_run_1", data_dir=folder / "tfds").download_and_prepare()
    return SimpleNamespace(
        folder=folder, shards=shards, tfds_dir=folder / "tfds", builder_cls=builder_cls
    )


@pytest.fixture
def args(rlu, tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.setattr(rlu.builder_cls, "_SHARDS", LABELS[-1][0] + 1)
    monkeypatch.setattr(script, "STEPS_PER_CHECKPOINT", PER_CHECKPOINT)
    fields = {"env_id": "Pong", "run": 1, "data_percent": 100, "data_dir": str(tmp_path)}
    return SimpleNamespace(**fields, dataset="", tfds_dir="", rlu_prefix=str(rlu.folder))


def test_both_paths_give_the_direct_store(rlu, args, path, tmp_path):
    streamed = script.get_store(args).path
    assert streamed == tmp_path / "atari" / "Pong-run1-100pct"
    args.data_dir, args.tfds_dir, args.rlu_prefix = f"{tmp_path}/2", str(rlu.tfds_dir), "gs://none"
    prepared = script.get_store(args).path
    assert contents(streamed) == contents(prepared) == contents(path)


@pytest.mark.parametrize("percent", [1, 33.3333333, 80])
def test_percent_is_the_same_on_every_path(rlu, args, path, tmp_path, percent):
    args.data_percent = percent
    streamed = script.get_store(args)
    assert streamed.path.name == f"Pong-run1-{percent}pct"
    args.data_dir, args.tfds_dir = f"{tmp_path}/2", str(rlu.tfds_dir)
    assert contents(streamed.path) == contents(script.get_store(args).path)
    from_whole = script.open_store(path, "Pong", percent)
    assert streamed.num_steps == from_whole.num_steps < sum(LENGTHS)
    assert streamed.episodes.tolist() == from_whole.episodes.tolist()
    for a, b in zip(
        *(script.sample_batch(s, 0, 0, 32, 5) for s in (streamed, from_whole)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_larger_store_serves_a_smaller_percent(args, tmp_path):
    write(tmp_path / "atari" / "Pong-run1-100pct")
    args.data_percent, args.rlu_prefix = 50, "/nowhere"
    store = script.get_store(args)
    assert store.path.name == "Pong-run1-100pct"
    assert store.num_steps == sum(LENGTHS[i] for i in (0, 3, 5, 6, 7, 8))
    args.run = 2  # but never one run another
    with pytest.raises(SystemExit, match="is missing"):
        script.get_store(args)


def copy_shards(rlu, tmp_path) -> Path:
    return Path(shutil.copytree(rlu.shards, tmp_path / "s/atari_episodes_ordered/Pong"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"run_1-00001-of-00005 is missing: copy it again\.$"),
        ("truncated", r"run_1-00001-of-00005 is damaged: copy it again\.$"),
        ("changed", r"run_1-00001-of-00005 is damaged: copy it again\.$"),
        ("empty", "run_1-00001-of-00005 has no episodes"),
    ],
)
def test_bad_shard(rlu, args, tmp_path, how, message):
    damage(copy_shards(rlu, tmp_path), "run_1-00001-of-00005", how)
    args.rlu_prefix = str(tmp_path / "s")
    with pytest.raises(SystemExit, match=message):
        script.get_store(args)
    assert list((tmp_path / "atari").iterdir()) == []


def test_shard_of_another_game_or_size(rlu, args, tmp_path):
    args.rlu_prefix = str(tmp_path / "s")
    recorder = collect_atari.Recorder(tmp_path / "recorder", collect_atari.Args())
    recorder.add(EPISODES[0] | {"action": np.full(30, 6)})  # Pong has six
    labels = [(i, 0) for i in range(5)]
    for _ in range(4):
        recorder.add(EPISODES[0])
    shards = tmp_path / "s/atari_episodes_ordered/Pong"
    collect_atari.write_rlu(shards, recorder, labels)
    with pytest.raises(SystemExit, match="has actions that Pong has not"):
        script.get_store(args)
    shutil.rmtree(shards)
    with pytest.MonkeyPatch.context() as patch:
        encode = cv2.imencode
        patch.setattr(cv2, "imencode", lambda end, x: encode(end, x[:80]))
        collect_atari.write_rlu(shards, recorder, labels)
    args.data_dir = f"{tmp_path}/2"
    for first in shards.glob("*-00000-*"):
        first.write_bytes(next(shards.glob("*-00001-*")).read_bytes())
    with pytest.raises(SystemExit, match="not an 84 x 84 grey PNG"):
        script.get_store(args)
    assert list((tmp_path / "2/atari").iterdir()) == []


def test_run_that_does_not_exist(args, tmp_path):
    args.run = 6
    with pytest.raises(SystemExit, match="RL Unplugged has no run 6 of Pong"):
        script.get_store(args)
    args.run, args.tfds_dir = 1, str(tmp_path)
    with pytest.raises(SystemExit, match="has no rlu_atari_checkpoints_ordered/Pong_run_1"):
        script.get_store(args)
    args.data_percent = 0
    with pytest.raises(SystemExit, match="--data-percent is 0"):
        script.get_store(args)


# Without RL Unplugged


@pytest.fixture
def offline(tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.setattr(script, "can_reach_rlu", lambda: False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fields = {"env_id": "Pong", "run": 1, "data_percent": 100, "data_dir": str(tmp_path)}
    return SimpleNamespace(**fields, dataset="", tfds_dir="", rlu_prefix="gs://rl_unplugged")


def test_fall_back_says_what_it_is_and_collects(offline, monkeypatch, tmp_path, capsys):
    commands = []

    def run(command, env):
        assert env["JAX_PLATFORMS"] == "cpu"
        commands.append(command)
        write(Path(command[command.index("--out") + 1]), source="dqn")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    store = script.get_store(offline)
    assert store.path == tmp_path / "atari" / "Pong-dqn-200k"
    assert commands[0][1].endswith("benchmark/collect_atari.py")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "NOT the paper's data" in said
    assert "gsutil" in said
    script.get_store(offline)
    assert len(commands) == 1
    offline.data_percent = 50
    assert script.get_store(offline).num_steps < store.num_steps


def test_copied_script_without_collector(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "rosmo_atari.py"))
    with pytest.raises(SystemExit, match=r"There is no .*collect_atari.py"):
        script.get_store(offline)


def test_failed_collector(offline, monkeypatch):
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="Collecting data failed"):
        script.get_store(offline)


def test_given_store(offline, path):
    offline.dataset = str(path)
    assert script.get_store(offline).path == path
    offline.dataset = f"{path}-typo"
    with pytest.raises(SystemExit, match=r"There is no store .*-typo"):
        script.get_store(offline)
    offline.env_id = "Breakuot"
    with pytest.raises(SystemExit, match=r"There is no game 'Breakuot'; .*Breakout"):
        script.get_store(offline)


def test_unreachable_bucket_is_told_from_an_answer(monkeypatch):
    def answer(error):
        def urlopen(url, timeout):
            raise error

        monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)
        return script.can_reach_rlu()

    assert answer(script.urllib.error.HTTPError("", 403, "", {}, None))
    assert not answer(script.urllib.error.URLError("no route"))
    assert not answer(TimeoutError())


# Environment and evaluation

SHORT = {"max_num_frames_per_episode": 160}


def test_every_game_of_the_paper_is_known():
    for env_id in script.REFERENCE_SCORES:
        script.game_name(env_id)
    assert script.game_name("UpNDown") == "up_n_down"
    assert script.normalized_score("Pong", 18.25) == 1
    assert script.normalized_score("Pong", -20.3) == 0
    assert script.normalized_score("Boxing", 1.0) is None


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
    frames = np.stack([s[3] for s in seen])
    with script.write_store(tmp_path / "s", META | {"env_id": "MsPacman"}) as writer:
        for id in range(2):
            writer.add(frames, np.zeros(41), np.zeros(41), False, 0, id, 0.0)
    store = script.open_store(tmp_path / "s", "MsPacman")
    batch = script.sample_batch(store, 0, 0, 200, 2)
    at = np.random.default_rng((0, 0)).integers(82, size=200) % 41
    stacked = np.asarray(script.stack_frames(batch.frames, batch.history, 0))
    np.testing.assert_array_equal(stacked, np.stack(seen)[at].transpose(0, 2, 3, 1))
    assert {0, 1, 2, 40} <= set(at.tolist())


def fire(observations, key):
    assert observations.shape[1:] == (84, 84, 4)
    assert observations.dtype == np.uint8
    return jax.random.randint(key, len(observations), 0, 6)


def test_evaluate_counts_the_first_episode_of_each_environment():
    """Against environments played one by one, with the actions that the evaluator chose."""
    actions = []

    def act(observations, key):
        actions.append(np.asarray(fire(observations, key)))
        return actions[-1]

    limits = {"max_num_frames_per_episode": 2400}  # Seaquest's agents die before, at other times
    returns = script.evaluate(act, "Seaquest", 4, 0, **limits)
    seeds = np.random.default_rng(0).integers(2**31, size=4, dtype=np.int32)
    alone, lengths = [], []
    for i in range(4):
        env = script.make_env("Seaquest", 1, **limits)
        env.reset(seed=seeds[i : i + 1])
        total, t, running = 0, 0, True
        while running:
            _, rewards, terminated, truncated, _ = env.step(actions[t][i : i + 1].astype(np.int32))
            total, t, running = total + rewards[0], t + 1, not (terminated[0] or truncated[0])
        alone.append(float(total))
        lengths.append(t)
    assert returns == alone
    assert len(set(lengths)) > 1  # so that some were over, and played on, before others
    assert max(lengths) == len(actions)


def test_evaluate_depends_on_the_seed():
    limits = {"max_num_frames_per_episode": 800}
    runs = [script.evaluate(fire, "MsPacman", 3, seed, **limits) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_video_shows_the_episode(tmp_path):
    steps = []

    def act(observations, key):
        steps.append(observations)
        return fire(observations, key)

    total = script.capture_video(act, "MsPacman", 0, tmp_path / "v.mp4", **SHORT)
    assert total >= 0
    video = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    pictures = []
    while (read := video.read())[0]:
        pictures.append(read[1])
    assert len(pictures) == len(steps) == 40
    grey = [cv2.cvtColor(cv2.resize(p, (84, 84)), cv2.COLOR_BGR2GRAY) for p in pictures]
    # The agent's newest frame is what the video shows, but for the scaling and the compression.
    difference = [
        np.abs(g.astype(int) - s[0, ..., 3]).mean() for g, s in zip(grey, steps, strict=True)
    ]
    assert np.median(difference) < 15 < np.abs(grey[0].astype(int) - grey[0].mean()).mean()
