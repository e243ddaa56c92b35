"""The store of the Atari data: its writer, its sources, and an import that is broken off."""

import errno
import gzip
import http.client
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import helpers
import numpy as np
import pytest
from helpers import contents, read_store, wait_until_gone

import collect_atari
import prepare_atari

LENGTHS = (30, 25, 20, 40, 33, 70, 5, 61, 3)
PER_CHECKPOINT = 60
LABELS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0)]
META = {"env_id": "Pong", "source": "run1", "percent": 100.0, "num_actions": 6}
META |= {"steps_per_checkpoint": PER_CHECKPOINT, "rom_sha256": None}


def make_episodes() -> list[dict]:
    rng, episodes = np.random.default_rng(0), []
    for length, (checkpoint, id) in zip(LENGTHS, LABELS, strict=True):
        stripes = rng.integers(1, 255, (length, 84, 6), dtype=np.uint8)
        reward = rng.normal(scale=2, size=length).astype(np.float32).round()
        reward[-1] = 0
        episode = {"frames": np.repeat(stripes, 14, axis=2), "reward": reward}
        episode |= {"action": np.append(rng.integers(0, 6, length - 1), 0)}
        episode |= {"is_terminal": length % 2 == 1, "checkpoint": checkpoint, "id": id}
        episodes.append(episode)
    return episodes


EPISODES = make_episodes()


def write(path: Path, which=range(9), **meta) -> Path:
    prepare_atari.write_store(path, META | meta, [EPISODES[i] for i in which])
    return path


def assert_equal(read: list[dict], episodes: list[dict]) -> None:
    assert len(read) == len(episodes)
    for a, b in zip(read, episodes, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def ends_with(message: str):
    return pytest.raises(SystemExit, match=message)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("atari") / "Pong-run1-100pct")


# Writer


def test_store_is_as_the_contract_says(path):
    assert_equal(read_store(path), EPISODES)
    names = {"frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy"}
    assert {p.name for p in path.iterdir()} == {*names, "meta.json"}
    meta = json.loads((path / "meta.json").read_text())
    assert set(meta) == {*META, "version", "num_steps", "num_episodes", "crc32"}
    assert set(meta["crc32"]) == names
    assert np.load(path / "steps.npy").dtype.itemsize == 9
    assert not prepare_atari.find_fault(path, "Pong", "run1", 100)


def test_meta_comes_last(path, tmp_path, monkeypatch):
    before, write_text = {}, Path.write_text

    def watch(file, text):
        assert file.name == "meta.json"
        before.update(contents(file.parent))
        write_text(file, text)

    monkeypatch.setattr(Path, "write_text", watch)
    write(tmp_path / "Pong")
    meta = {"meta.json": (path / "meta.json").read_bytes()}
    assert before | meta == contents(path)
    assert not meta.keys() & before.keys()


def test_age_saturates(tmp_path):
    length = 65_540
    frames = np.broadcast_to(np.uint8(0), (length, 84, 84))
    zeros = np.zeros(length, np.int64)
    episode = {"frames": frames, "action": zeros, "reward": zeros, "is_terminal": True}
    prepare_atari.write_store(tmp_path / "Pong", META, [episode])
    age = np.load(tmp_path / "Pong/steps.npy")["age"]
    assert age[65_530:65_540].tolist() == [*range(65_530, 65_536), *[65_535] * 4]


def test_numbers_in_a_checkpoint_are_counted(tmp_path):
    episodes = [{k: v for k, v in e.items() if k != "id"} for e in EPISODES]
    prepare_atari.write_store(tmp_path / "Pong", META, episodes)
    assert np.load(tmp_path / "Pong/episodes.npy")["id"].tolist() == [id for _, id in LABELS]


GOOD = EPISODES[6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": GOOD["frames"] / 255}, r"frames are float64 \[5, 84, 84\]; they must be uint8"),
        ({"frames": GOOD["frames"][:, :80]}, r"frames are uint8 \[5, 80, 84\]"),
        ({"frames": GOOD["frames"][..., None]}, r"frames are uint8 \[5, 84, 84, 1\]"),
        ({"action": np.full(5, 300)}, "action 300 is not one of 0 to 5"),
        ({"action": np.full(5, -1)}, "action -1 is not one of 0 to 5"),
        ({"action": np.full(5, 6)}, "action 6 is not one of 0 to 5"),
        ({"action": np.zeros(5)}, r"action is float64 \[5\]; it must be integers \[5\]"),
        ({"action": np.zeros(4, int)}, r"action is int64 \[4\]; it must be integers \[5\]"),
        ({"reward": np.zeros((5, 1))}, r"reward is float64 \[5, 1\]; it must be numbers \[5\]"),
        ({"reward": np.array([0, np.nan, 0, 0, 0])}, "or NaN"),
        ({"reward": np.array([0, np.inf, 0, 0, 0])}, "float32 does not hold"),
        ({"reward": np.array([0, 1e39, 0, 0, 0])}, "float32 does not hold"),
        ({"reward": np.array(list("00000"))}, "reward is <U1"),
        ({"reward": np.ones(5)}, "the last reward is not 0"),
        ({"is_terminal": np.zeros(5, bool)}, "is_terminal is array"),
        ({"checkpoint": -1}, "checkpoint -1 comes after 0; sort"),
        ({"checkpoint": 0.7}, "checkpoint is 0.7; it must be an integer"),
        ({"checkpoint": None}, "checkpoint is None; it must be an integer"),
        ({"id": "7"}, "id is '7'; it must be an integer"),
    ],
)
def test_an_episode_of_another_kind_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare_atari.write_store(tmp_path / "Pong", META, [EPISODES[0], GOOD | change])
    assert list(tmp_path.iterdir()) == []


def test_the_last_action_is_not_looked_at(tmp_path):
    """RLDS calls it invalid."""
    episodes = [GOOD | {"action": np.append(GOOD["action"][:-1], last)} for last in (-1, 0)]
    for name, episode in zip("ab", episodes, strict=True):
        prepare_atari.write_store(tmp_path / name, META, [episode])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_refusals(tmp_path):
    store = tmp_path / "Pong"
    seven = [GOOD | {"action": np.full(5, 7)}]
    with pytest.raises(ValueError, match="action 7 is not one of 0 to 2"):
        prepare_atari.write_store(store, META | {"num_actions": 3}, seven)
    one = {k: v[:1] if np.ndim(v) else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match="has 1 states; it must have 2"):
        prepare_atari.write_store(store, META, [one])
    with pytest.raises(ValueError, match="there are no episodes"):
        prepare_atari.write_store(store, META, [])
    meta = {k: v for k, v in META.items() if k not in ("num_actions", "rom_sha256")}
    with pytest.raises(ValueError, match="meta lacks num_actions, rom_sha256"):
        prepare_atari.write_store(store, meta, EPISODES)
    with pytest.raises(ValueError, match=r"meta must be of Python's own types: .* int64"):
        write(store, num_actions=np.int64(3))
    with pytest.raises(ValueError, match="percent is '10'; it must be a number"):
        write(store, percent="10")
    with pytest.raises(ValueError, match="source is 2023; it must be a text"):
        write(store, source=2023)
    with pytest.raises(ValueError, match="an episode is a tuple, not a dict"):
        prepare_atari.write_store(store, META, [(1, 2)])
    for episode in ({k: v for k, v in GOOD.items() if k != "reward"}, GOOD | {"rewards": 0}):
        with pytest.raises(ValueError, match=r"an episode has frames, .*; it must have frames, "):
            prepare_atari.write_store(store, META, [episode])
    numbers = {"num_actions": (300, 6.0), "percent": (0,), "steps_per_checkpoint": (0,)}
    for name, value in ((k, v) for k, values in numbers.items() for v in values):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            write(store, **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_an_episode_may_be_any_mapping_as_of_np_load(path, tmp_path):
    def saved():
        for i, episode in enumerate(EPISODES):
            np.savez(tmp_path / f"{i}.npz", **episode)
            with np.load(tmp_path / f"{i}.npz") as file:
                yield file

    prepare_atari.write_store(tmp_path / "Pong", META, saved())
    assert contents(tmp_path / "Pong") == contents(path)


def test_a_store_is_never_overwritten(path):
    before = contents(path)
    with ends_with("exists already"):
        write(path)
    assert contents(path) == before


def test_an_error_in_a_build_leaves_nothing(tmp_path):
    def episodes():
        yield EPISODES[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare_atari.write_store(tmp_path / "Pong", META, episodes())
    assert list(tmp_path.iterdir()) == []


def test_two_builds_at_once(tmp_path):
    def episodes():
        yield EPISODES[0]
        before = sorted(tmp_path.rglob("*"))
        with ends_with(r"Another process is building .*Pong: run again"):
            write(tmp_path / "Pong")
        assert sorted(tmp_path.rglob("*")) == before  # the first build is untouched
        yield EPISODES[1]

    prepare_atari.write_store(tmp_path / "Pong", META, episodes())
    assert [p.name for p in tmp_path.iterdir()] == ["Pong"]


def test_a_script_s_second_build_waits_for_the_first(tmp_path, monkeypatch, capsys):
    """As several runs start at once that lack one store; a user's ends in a sentence."""
    path, calls = tmp_path / "Pong", []

    def main(args):
        calls.append(path.exists())
        if not path.exists():
            write(path)

    def episodes():
        with ends_with("Another process is building .*Pong: run again"):
            prepare_atari.run(main, None)
        second = threading.Thread(target=prepare_atari.run, args=(main, None))
        monkeypatch.setenv("ROSMO_PARENT", str(os.getpid()))
        second.start()
        while "waiting for it" not in capsys.readouterr().out:
            time.sleep(0.02)
        yield from EPISODES
        threads.append(second)

    threads = []
    monkeypatch.setattr(prepare_atari.signal, "signal", lambda *_: None)  # of a thread
    monkeypatch.setattr(prepare_atari, "end_with", lambda parent: None)
    prepare_atari.write_store(path, META, episodes())
    threads[0].join(timeout=helpers.PATIENCE)
    assert calls == [False, False, True]
    assert [p.name for p in tmp_path.iterdir()] == ["Pong"]


def test_a_script_takes_the_store_that_was_built_while_it_looked_for_its_source(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ROSMO_PARENT", str(os.getpid()))
    monkeypatch.setattr(prepare_atari, "end_with", lambda parent: None)
    monkeypatch.setattr(prepare_atari.signal, "signal", lambda *_: None)
    write(tmp_path / "Pong")
    calls = []

    def main(args):
        calls.append(args)
        if len(calls) == 1:  # it was not there when it looked
            write(tmp_path / "Pong")

    prepare_atari.run(main, None)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["Pong"]


def test_full_disk_and_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with ends_with(r"Pong was not built: .*(exists|Not a directory)"):
        write(tmp_path / "file" / "Pong")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_atari.StoreWriter, "_write_blob", full)
    with ends_with("Pong was not built: the disk is full; free some space"):
        write(tmp_path / "Pong")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Import, with readers that take no time


DRIVER = """
import functools, os, pickle, sys, time
from pathlib import Path
sys.path.insert(0, {tool!r})
import prepare_atari

EPISODES, META = pickle.loads(Path(__file__).with_name("episodes").read_bytes())

def read(log, stop, workers, shard):
    with open(log, "a") as file:
        file.write(f"{{shard}} {{os.getpid()}}\\n")
    pids = lambda: {{line.split()[1] for line in open(log)}}
    while workers > 1 and not stop and len(pids()) < 2:
        time.sleep(0.02)  # until a second worker reads, too
    for episode in EPISODES:
        if episode["checkpoint"] == int(shard):
            yield episode
    if shard == stop:
        Path(log).with_name("waits").touch()
        time.sleep(300)

if __name__ == "__main__":
    path, log, stop, workers = sys.argv[1:]
    options = META, functools.partial(read, log, stop, int(workers)), list("01234"), int(workers)
    if workers == "0":
        make = lambda _: prepare_atari.write_store(Path(path), META, EPISODES)
    else:
        make = lambda _: prepare_atari.import_store(Path(path), *options)
    prepare_atari.run(make, None)
"""


@pytest.fixture
def driver(tmp_path):
    """driver(stop, workers=1): starts an import that stops, without end, in the shard `stop`."""
    tool = str(Path(prepare_atari.__file__).parent)
    (tmp_path / "driver.py").write_text(DRIVER.format(tool=tool))
    (tmp_path / "episodes").write_bytes(pickle.dumps((EPISODES, META)))

    def start(stop: str = "", workers: int = 1, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words = [str(tmp_path / "atari/Pong"), str(tmp_path / "log"), stop, str(workers)]
        command = [sys.executable, str(tmp_path / "driver.py"), *words]
        process = subprocess.Popen(command, **pipes, **options)
        deadline = time.time() + helpers.PATIENCE
        while stop and not (tmp_path / "waits").exists():
            assert time.time() < deadline
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        return process

    return start


def log_of(tmp_path) -> list[tuple[str, int]]:
    lines = (line.split() for line in (tmp_path / "log").read_text().splitlines())
    return [(shard, int(pid)) for shard, pid in lines]


def test_killed_import_goes_on_with_the_unfinished_shard(driver, path, tmp_path):
    process = driver(stop="1")
    process.kill()
    process.wait()
    wait_until_gone(pid for _, pid in log_of(tmp_path))  # its worker ends with it
    assert not (tmp_path / "atari/Pong").exists()
    building = tmp_path / "atari/.Pong.building"
    assert {p.name for p in building.iterdir()} == {
        "plan.json", "part-00000", "part-00001.unfinished"
    }  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in (building / "part-00000").iterdir()}
    stdout, stderr = (resumed := driver()).communicate()
    assert resumed.returncode == 0, stderr
    assert [shard for shard, _ in log_of(tmp_path)] == ["0", "1", "1", "2", "3", "4"]
    assert len(before) == 4
    assert contents(tmp_path / "atari/Pong") == contents(path)
    assert [p.name for p in (tmp_path / "atari").iterdir()] == ["Pong"]
    assert stderr.count(b"\n") == 4  # no bar, but a line for each shard
    assert b"4: 3 steps, 1 episodes (" in stderr  # two may end between two looks, in any order
    assert b"(5 of 5 shards" in stderr
    assert b"287 steps, 9 episodes" in stdout


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_import_at_once(driver, path, tmp_path, sent):
    process = driver(stop="2", workers=2)
    process.send_signal(sent)
    started = time.time()
    _, stderr = process.communicate()
    assert time.time() - started < 60  # the shard takes five minutes
    assert process.returncode == 130
    assert stderr.decode().splitlines()[-1].startswith("Stopped; the same command goes on")
    assert b"Traceback" not in stderr
    wait_until_gone(pid for _, pid in log_of(tmp_path))
    parts = {p.name for p in (tmp_path / "atari/.Pong.building").glob("part-?????")}
    assert parts & {"part-00000", "part-00001"}  # of the worker that came to the third shard
    _, stderr = (resumed := driver(workers=2)).communicate()
    assert resumed.returncode == 0, stderr
    assert contents(tmp_path / "atari/Pong") == contents(path)


def test_killed_worker_is_told(driver, tmp_path):
    process = driver(stop="1")
    os.kill(log_of(tmp_path)[-1][1], signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert b"A worker was killed; is there too little memory?" in stderr
    assert b"Traceback" not in stderr


def test_parallel_is_serial(driver, path, tmp_path):
    _, stderr = (process := driver(workers=3)).communicate()
    assert process.returncode == 0, stderr
    assert len({pid for _, pid in log_of(tmp_path)}) > 1
    assert contents(tmp_path / "atari/Pong") == contents(path)


class Flaky:
    """A reader that raises `error` after its first episode, `times` times, and then works."""

    def __init__(self, error: Exception, times: int):
        self.error, self.times, self.calls = error, times, []

    def __call__(self, shard: str):
        self.calls.append(shard)
        yield EPISODES[0] | {"checkpoint": int(shard), "id": 0}
        if self.calls.count("1") <= self.times and shard == "1":
            raise self.error
        yield EPISODES[1] | {"checkpoint": int(shard), "id": 1}


@pytest.fixture
def in_process(monkeypatch):
    """Shards are imported by a thread, so that what a test changes holds for it."""
    monkeypatch.setattr(
        prepare_atari, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(prepare_atari, "RETRY_WAITS", (0, 0))


def op_error(name: str) -> Exception:
    """As TensorFlow's, without TensorFlow."""
    return type(name, (type("OpError", (Exception,), {}),), {})("no answer\n[[node]]")


def import_two(path: Path, reader: Flaky) -> None:
    prepare_atari.import_store(path, META, reader, ["0", "1"], 1)


@pytest.mark.parametrize("error", [ConnectionError("no answer"), op_error("UnavailableError")])
@pytest.mark.usefixtures("in_process")
def test_transient_errors_are_tried_again(tmp_path, error, capsys):
    import_two(tmp_path / "a", flaky := Flaky(error, 2))
    assert flaky.calls == ["0", "1", "1", "1"]
    assert capsys.readouterr().err.count("1: no answer; next try in 0 s\n") == 2
    import_two(tmp_path / "b", Flaky(error, 0))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with ends_with("^1 cannot be read: no answer$"):
        import_two(tmp_path / "c", flaky := Flaky(error, 3))
    assert flaky.calls == ["0", "1", "1", "1"]
    import_two(tmp_path / "c", flaky := Flaky(error, 0))
    assert flaky.calls == ["1"]  # the other one was kept
    assert contents(tmp_path / "c") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (op_error("NotFoundError"), "^1 is not where it should be: no answer$"),
        (op_error("DataLossError"), "^1 is damaged: copy it again"),
        (EOFError(), "^1 is damaged"),
        (zlib.error("bad"), "^1 is damaged"),
        (ValueError("a frame is not"), "^1 cannot be used: a frame is not"),
        (OSError(errno.ENOSPC, "full"), "kept as it is: the disk is full"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_other_errors_are_told_at_once(tmp_path, error, message):
    flaky = Flaky(error, 9)
    with ends_with(message):
        import_two(tmp_path / "a", flaky)
    assert flaky.calls == ["0", "1"]


@pytest.mark.usefixtures("in_process")
def test_checkpoints_stand_in_order_whatever_the_shards_are_called(tmp_path):
    """Selecting a percentage needs them so."""
    names = {"a": ["1", "0"], "b": ["0", "1"]}
    for folder, shards in names.items():
        read = Flaky(EOFError(), 0)
        prepare_atari.import_store(tmp_path / folder, META, read, shards, 1)
    found, expected = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert found == expected
    both = lambda _: iter([EPISODES[0] | {"checkpoint": i, "id": 0} for i in (0, 1)])  # noqa: E731
    with ends_with("^The episodes of c's shards are not in the order of checkpoints"):
        prepare_atari.import_store(tmp_path / "c", META, both, ["0", "1"], 1)


@pytest.mark.usefixtures("in_process")
def test_a_broken_import_is_kept_from_one_with_other_arguments(tmp_path):
    with ends_with("damaged"):
        import_two(tmp_path / "a", Flaky(EOFError(), 9))
    with ends_with("holds parts of an import with other arguments: give those again, or delete"):
        prepare_atari.import_store(tmp_path / "a", META | {"percent": 50}, None, ["0", "1"], 1)
    import_two(tmp_path / "a", flaky := Flaky(EOFError(), 0))
    assert flaky.calls == ["1"]


@pytest.mark.usefixtures("in_process")
def test_another_build_leaves_the_parts_of_an_import(tmp_path):
    with ends_with("damaged"):
        import_two(tmp_path / "a", Flaky(EOFError(), 9))
    with ends_with("holds parts of an import: choose another path, or delete that folder"):
        write(tmp_path / "a")
    import_two(tmp_path / "a", flaky := Flaky(EOFError(), 0))
    assert flaky.calls == ["1"]


@pytest.mark.usefixtures("in_process")
def test_an_import_without_a_finished_part_gives_way_to_one_with_other_arguments(tmp_path):
    (tmp_path / ".a.building" / "part-00000.unfinished").mkdir(parents=True)
    (tmp_path / ".a.building" / "plan.json").write_text("of other arguments")
    import_two(tmp_path / "a", Flaky(EOFError(), 0))


@pytest.mark.parametrize("name", ["frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy"])
@pytest.mark.usefixtures("in_process")
def test_a_part_that_a_crash_has_emptied_is_made_again(tmp_path, name):
    with ends_with("damaged"):
        import_two(tmp_path / "a", Flaky(EOFError(), 9))
    (tmp_path / ".a.building/part-00000" / name).write_bytes(b"")
    import_two(tmp_path / "a", flaky := Flaky(EOFError(), 0))
    assert flaky.calls == ["0", "1"]
    import_two(tmp_path / "b", Flaky(EOFError(), 0))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("limit", [2000, 600])
def test_limit_of_the_disk_ends_in_a_sentence(driver, tmp_path, limit):
    """A limit on the size of files fails a write as a full disk does, in whichever file it is."""

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    _, stderr = (process := driver(workers=0, preexec_fn=set_limit)).communicate()
    assert process.returncode == 1
    assert stderr.count(b"\n") == 1, stderr
    assert b"Pong was not built: " in stderr
    assert list((tmp_path / "atari").iterdir()) == []


# RL Unplugged


@pytest.fixture(scope="session")
def rlu(tmp_path_factory) -> SimpleNamespace:
    """Shards in RL Unplugged's format, and the same prepared by TFDS's own builder."""
    tfds = prepare_atari.import_tfds()
    folder = tmp_path_factory.mktemp("rlu")
    recorder = SimpleNamespace(read=EPISODES.__getitem__)
    shards = folder / "atari_episodes_ordered" / "Pong"
    write_rlu(shards, recorder, LABELS)
    builder_cls = tfds.builder_cls("rlu_atari_checkpoints_ordered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_cls, "_SHARDS", LABELS[-1][0] + 1)
        patch.setattr(builder_cls, "_INPUT_FILE_PREFIX", str(shards.parent))
        builder_cls(config="Pong_run_1", data_dir=folder / "tfds").download_and_prepare()
    return SimpleNamespace(folder=folder, shards=shards, tfds_dir=folder / "tfds")


def write_rlu(shards, recorder, labels) -> None:
    """Shards that pass as RL Unplugged's own."""
    collect_atari.write_rlu(shards, recorder, labels, {})
    (shards / "collector.json").unlink()


@pytest.fixture
def make(tmp_path, monkeypatch, in_process):
    """make(**args): prepare_atari.main for Pong, in tmp_path; returns its folder of stores."""
    monkeypatch.setattr(prepare_atari, "STEPS_PER_CHECKPOINT", PER_CHECKPOINT)
    monkeypatch.setattr(prepare_atari, "SHARDS", range(1, 6))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))

    def main(**args) -> Path:
        args = {"env_id": "Pong", "data_dir": tmp_path / "data"} | args
        prepare_atari.main(prepare_atari.Args(**args))
        return args["data_dir"] / "atari"

    return main


def test_both_paths_give_the_direct_store(rlu, make, path, tmp_path):
    streamed = make(rlu_prefix=str(rlu.folder)) / "Pong-run1-100pct"
    prepared = make(tfds_dir=rlu.tfds_dir, out=tmp_path / "out")
    assert contents(streamed) == contents(tmp_path / "out") == contents(path)
    assert [p.name for p in prepared.iterdir()] == ["Pong-run1-100pct"]


def test_a_preparation_of_tfds_that_was_broken_off_is_not_read(rlu, make, path, tmp_path):
    shutil.copytree(rlu.tfds_dir, tmp_path / "tfds")
    (config,) = tmp_path.glob("tfds/*/Pong_run_1")
    (config / "incomplete.ABC123_1.1.0").mkdir()
    assert contents(make(tfds_dir=tmp_path / "tfds") / "Pong-run1-100pct") == contents(path)


@pytest.mark.parametrize("percent", [1, 33.3333333, 50])
def test_percent_is_the_same_on_every_path(rlu, make, path, tmp_path, percent):
    options = {"percent": percent, "workers": 1}
    streamed = make(rlu_prefix=str(rlu.folder), **options) / f"Pong-run1-{percent}pct"
    prepared = make(tfds_dir=rlu.tfds_dir, data_dir=tmp_path / "2", **options) / streamed.name
    assert contents(streamed) == contents(prepared)
    chosen, before = [], {}
    for episode, length in zip(EPISODES, LENGTHS, strict=True):
        if before.setdefault(episode["checkpoint"], 0) < percent / 100 * PER_CHECKPOINT:
            chosen.append(episode)
        before[episode["checkpoint"]] += length
    assert_equal(read_store(streamed), chosen)
    assert percent != 50 or len(chosen) == 6


def test_the_command(rlu, path, tmp_path):
    """As a user would start it; 100% here means more steps, and gives the same files."""
    command = [sys.executable, prepare_atari.__file__, "--env-id", "Pong", "--workers", "1"]
    command += ["--rlu-prefix", str(rlu.folder), "--out", str(store := tmp_path / "store")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert len(first.stderr.splitlines()) == 5, first.stderr
    for name, data in contents(path).items():
        assert name == "meta.json" or (store / name).read_bytes() == data
    again = subprocess.run([*command, "--percent", "10"], capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout == f"{store} is there already.\n"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"^run_1-00001-of-00005 is damaged: copy it again\.$"),
        ("changed", r"^run_1-00001-of-00005 is damaged: copy it again\.$"),
        ("empty", "^run_1-00001-of-00005 has no episodes"),
    ],
)
def test_bad_shard(rlu, make, path, tmp_path, how, message):
    folder = tmp_path / "s/atari_episodes_ordered/Pong"
    shutil.copytree(rlu.shards, folder)
    helpers.damage(folder / "run_1-00001-of-00005", how)
    with ends_with(message):
        make(rlu_prefix=str(tmp_path / "s"))
    shutil.copy(rlu.shards / "run_1-00001-of-00005", folder)  # the same command goes on
    assert contents(make(rlu_prefix=str(tmp_path / "s")) / "Pong-run1-100pct") == contents(path)


def test_missing_shards_are_named(rlu, make, tmp_path):
    folder = tmp_path / "s/atari_episodes_ordered/Pong"
    shutil.copytree(rlu.shards, folder)
    for i in (1, 4):
        (folder / f"run_1-0000{i}-of-00005").unlink()
    with ends_with("Pong lacks run_1-00001-of-00005, run_1-00004-of-00005: copy what is missing"):
        make(rlu_prefix=str(tmp_path / "s"))
    shutil.copy(folder / "run_1-00000-of-00005", folder / "run_1-00000-of-00003")
    with ends_with("has shards of 00003 and of 00005"):
        make(rlu_prefix=str(tmp_path / "s"))
    with ends_with(r"There are no files run_2-\*-of-\* in"):
        make(rlu_prefix=str(tmp_path / "s"), rlu_run=2)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("marked", [False, True])
def test_shards_of_local_play_are_not_taken_for_the_papers(
    marked, rlu, make, path, tmp_path, monkeypatch
):
    """Which has another number of them, and no file of the collector's beside them."""
    shutil.copytree(rlu.folder / "atari_episodes_ordered", tmp_path / "s/atari_episodes_ordered")
    if marked:
        (tmp_path / "s/atari_episodes_ordered/Pong/collector.json").write_text("{}")
    else:
        monkeypatch.setattr(prepare_atari, "SHARDS", (49, 50))
    with ends_with("is not RL Unplugged's, of 50 shards, but other data; give its store a path"):
        make(rlu_prefix=str(tmp_path / "s"))
    make(rlu_prefix=str(tmp_path / "s"), out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)
    with ends_with("is not RL Unplugged's: import all of it, without --percent"):
        make(rlu_prefix=str(tmp_path / "s"), out=tmp_path / "half", percent=50)
    for text in ('{"source": "dq', "[1]", "") if marked else ():
        (tmp_path / "s/atari_episodes_ordered/Pong/collector.json").write_text(text)
        with ends_with("collector.json is damaged: put it back, or collect again"):
            make(rlu_prefix=str(tmp_path / "s"), out=tmp_path / "more")


def test_shard_of_another_game_or_size(rlu, make, tmp_path, monkeypatch):
    shards, encode = tmp_path / "s/atari_episodes_ordered/Pong", cv2.imencode
    recorder = SimpleNamespace(read=lambda _: EPISODES[0] | {"action": np.full(30, 6)})
    write_rlu(shards, recorder, [(0, 0)])
    with ends_with("^run_1-00000-of-00001 cannot be used: action 6 is not one of 0 to 5"):
        make(rlu_prefix=str(tmp_path / "s"))
    shutil.rmtree(shards)
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imencode", lambda end, x: encode(end, x[:80]))
        write_rlu(shards, SimpleNamespace(read=EPISODES.__getitem__), [(0, 0)])
    with ends_with("a frame is not an 84 x 84 grey PNG"):
        make(rlu_prefix=str(tmp_path / "s"))


# The DQN Replay dataset


def replay_rows(episodes: list[dict], padding: int = 3) -> list[tuple]:
    """(frame, action, reward, terminal), as Dopamine adds them; blank rows before an episode."""
    rows = []
    for e in episodes:
        rows += [(np.zeros((84, 84), np.uint8), 0, 0, 0)] * padding
        rows += list(zip(e["frames"][:-1], e["action"], e["reward"], [0] * 999, strict=False))
        rows[-1] = (*rows[-1][:3], 1)
    return rows


def write_replay(folder: Path, number: int, rows: list[tuple], count: int) -> None:
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    kinds = {"observation": "u1", "action": "i4", "reward": "f4", "terminal": "u1"}
    arrays = {f"$store${k}": c.astype(t) for (k, t), c in zip(kinds.items(), columns, strict=True)}
    arrays |= {"add_count": np.array(count)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        name = name.replace("$store$", "$store$_")
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb", 1) as file:
            np.save(file, array)


def as_replayed(e: dict, checkpoint: int, id: int) -> dict:
    """Of a terminal episode, whose terminal frame the dataset has not."""
    frames = np.concatenate([e["frames"][:-1], e["frames"][-2:-1]])
    terminal = {"is_terminal": True, "checkpoint": checkpoint, "id": id}
    return e | {"frames": frames} | terminal


@pytest.mark.parametrize("padding", [3, 0])
def test_dqn_replay(make, tmp_path, monkeypatch, capsys, padding):
    logs = tmp_path / "dqn/Pong/1/replay_logs"
    rows = replay_rows(EPISODES[:5], padding)
    # The first file ends in the third episode, and its last row is of another time.
    cut = LENGTHS[0] + LENGTHS[1] - 2 + 3 * padding + 7
    stale = (np.full((84, 84), 9, np.uint8), 5, 5, 1)
    write_replay(logs, 0, [*rows[:cut], stale], cut)
    write_replay(logs, 1, rows[cut:], 2 * (len(rows) - cut))
    monkeypatch.setattr(prepare_atari, "MAX_STEPS", 39)  # the fourth episode was cut off there
    monkeypatch.setattr(prepare_atari, "SHARDS", (49, 50))
    store = make(dqn_replay=tmp_path / "dqn", workers=1) / "Pong-replay1-100pct"
    assert "has 2 checkpoints; a whole run has 49 or more." in capsys.readouterr().err
    a, b, c, d, e = EPISODES[:5]
    first = {k: c[k][:7] for k in ("frames", "action", "reward")}
    first["action"], first["reward"] = (np.append(first[k][:6], 0) for k in ("action", "reward"))
    first |= {"is_terminal": False, "checkpoint": 0, "id": 2}
    rest = as_replayed({k: c[k][7:] for k in ("frames", "action", "reward")}, 1, 0)
    expected = [as_replayed(a, 0, 0), as_replayed(b, 0, 1), first, rest, as_replayed(d, 1, 1)]
    expected[-1]["is_terminal"] = False
    assert_equal(read_store(store), [*expected, as_replayed(e, 1, 2)])
    total = sum(x["reward"].sum() for x in read_store(store))
    lost = c["reward"][6]  # of the action at the end of the file
    assert total == sum(x["reward"].sum() for x in EPISODES[:5]) - lost
    assert json.loads((store / "meta.json").read_text())["source"] == "replay1"
    make(dqn_replay=tmp_path / "dqn", percent=50, out=tmp_path / "half")
    assert_equal(read_store(tmp_path / "half"), [expected[i] for i in (0, 3, 4)])


@pytest.mark.parametrize("how", ["truncated", "changed", "empty"])
def test_damaged_dqn_replay(make, tmp_path, how):
    logs = tmp_path / "dqn/Pong/1/replay_logs"
    write_replay(logs, 0, replay_rows(EPISODES[:2]), 59)
    helpers.damage(logs / "$store$_observation_ckpt.0.gz", how)
    with ends_with(r"^ckpt\.0\.gz is damaged|^ckpt\.0\.gz cannot be used"):
        make(dqn_replay=tmp_path / "dqn")
    (logs / "$store$_reward_ckpt.0.gz").unlink()
    with ends_with(r"^ckpt\.0\.gz is not where it should be"):
        make(dqn_replay=tmp_path / "dqn")
    write_replay(logs, 2, replay_rows(EPISODES[:2]), 59)
    with ends_with(r"lacks \$store\$_observation_ckpt.1.gz: copy"):
        make(dqn_replay=tmp_path / "dqn")
    with ends_with("There are no files"):
        make(dqn_replay=tmp_path / "dqn", rlu_run=2)


# What is there, and what cannot be had


def test_larger_store_serves_a_smaller_percent(make, tmp_path, capsys):
    write(tmp_path / "data/atari/Pong-run1-80pct", percent=80)
    make(percent=50, rlu_prefix="nowhere")
    assert "Pong-run1-80pct is there already" in capsys.readouterr().out
    for more in ({"percent": 81}, {"rlu_run": 2}):  # but never one run another
        with ends_with("There are no files"):
            make(rlu_prefix="nowhere", **more)
    store = tmp_path / "data/atari/Pong-run1-80pct"
    with ends_with("is 80% of Pong-run1, not 100% of Pong-run1; choose another path"):
        make(out=store)
    with ends_with("is 80% of Pong-run1, not 10% of Pong-run2; choose another path"):
        make(out=store, percent=10, rlu_run=2)
    with ends_with("is 80% of Pong-run1, not 10% of Breakout-run1"):
        make(out=store, percent=10, env_id="Breakout")


@pytest.mark.parametrize("name", ["frames.bin", "frames_offsets.npy", "steps.npy", "episodes.npy"])
def test_damaged_store_is_told(make, path, tmp_path, name):
    shutil.copytree(path, tmp_path / "copy")
    helpers.damage(tmp_path / "copy" / name, "truncated")
    with ends_with(f"has a damaged {name}; delete it and run again"):
        make(out=tmp_path / "copy")
    (tmp_path / "copy/meta.json").unlink()
    with ends_with("is no whole store .*; delete it and run again"):
        make(out=tmp_path / "copy")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"env_id": "Breakuot"}, "There is no game 'Breakuot'; .*Breakout"),
        ({"percent": 0}, "--percent is 0"),
        ({"dqn_replay": Path("a"), "tfds_dir": Path("b")}, "--tfds-dir and --dqn-replay name sev"),
        ({"dqn_replay": Path("a"), "rlu_prefix": "b"}, "--dqn-replay and --rlu-prefix name sev"),
        ({"percent": float("nan")}, "--percent is nan"),
        ({"rlu_run": 6}, "--rlu-run is 6; RL Unplugged has the runs 1 to 5"),
        ({"workers": 0}, "--workers is 0"),
        ({"tfds_dir": Path("nowhere")}, "nowhere has no rlu_atari_checkpoints_ordered/Pong_run_1"),
    ],
)
def test_bad_arguments(make, args, message):
    with ends_with(message):
        make(**args)


@pytest.fixture
def offline(make, monkeypatch):
    monkeypatch.setattr(prepare_atari, "can_reach_rlu", lambda: False)
    return make


def test_fall_back_says_what_it_is_and_collects(offline, monkeypatch, tmp_path, capsys):
    commands, status = [], 0

    def run(command, env):
        assert env["JAX_PLATFORMS"] == "cpu"
        assert env["ROSMO_PARENT"] == str(os.getpid())
        commands.append(command)
        if not status:
            write(Path(command[command.index("--out") + 1]), source="dqn")
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(prepare_atari.subprocess, "run", run)
    status = 3
    with ends_with("3"):
        offline()
    status = -signal.SIGKILL
    with ends_with(r"collect_atari\.py was killed; is there too little memory"):
        offline()
    status = 0
    capsys.readouterr()
    folder = offline()
    assert [p.name for p in folder.iterdir()] == ["Pong-dqn-200k"]
    assert commands[0][1].endswith("collect_atari.py")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "NOT the paper's data" in said
    assert "gsutil" in said
    offline(percent=50)
    assert len(commands) == 3
    with ends_with("run again with a connection"):
        offline(out=tmp_path / "out")
    begun = folder / ".Pong-run1-100pct.building"  # of an import that lost its connection
    begun.mkdir()
    with ends_with("run again with a connection"):
        offline()
    begun.rmdir()
    helpers.damage(folder / "Pong-dqn-200k/steps.npy", "truncated")
    with ends_with("has a damaged steps.npy"):
        offline()


@pytest.mark.parametrize(("env_id", "number"), [("Pong", 50), ("Gravitar", 49)])
def test_shards_of_the_bucket(make, monkeypatch, rlu, env_id, number):
    imports = []
    monkeypatch.setattr(prepare_atari, "can_reach_rlu", lambda: True)
    monkeypatch.setattr(prepare_atari, "import_store", lambda *args: imports.append(args))
    make(env_id=env_id, rlu_run=2)
    path, meta, reader, shards, _ = imports[0]
    assert path.name == f"{env_id}-run2-100pct"
    assert (meta["source"], meta["rom_sha256"]) == ("run2", None)
    assert shards == [f"run_2-{i:05d}-of-{number:05d}" for i in range(number)]
    assert reader.args == ("gs://rl_unplugged", env_id, 2)
    with ends_with("RL Unplugged has no Tennis"):
        make(env_id="Tennis")


def test_closed_pipe_ends_in_a_sentence(path):
    command = [sys.executable, prepare_atari.__file__, "--env-id", "Pong", "--out", str(path)]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert closed.returncode == 1
    assert closed.stderr == "That did not work: [Errno 32] Broken pipe.\n"


def test_copied_tool_without_collector(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare_atari, "__file__", str(tmp_path / "prepare_atari.py"))
    with ends_with(r"There is no .*collect_atari.py"):
        offline()


def test_unreachable_bucket_is_told_from_an_answer(monkeypatch, capsys):
    def answer(error):
        def urlopen(url, timeout):
            raise error

        monkeypatch.setattr(prepare_atari.urllib.request, "urlopen", urlopen)
        return prepare_atari.can_reach_rlu()

    assert answer(prepare_atari.urllib.error.HTTPError("", 403, "", {}, None))
    assert capsys.readouterr().err == ""
    assert not answer(prepare_atari.urllib.error.URLError("no route"))
    assert not answer(TimeoutError("timed out"))
    assert not answer(http.client.InvalidURL("nonnumeric port"))  # of a proxy
    said = ["no route", "timed out", "nonnumeric port"]
    url = "https://storage.googleapis.com/rl_unplugged"
    assert capsys.readouterr().err == "".join(f"{url}: {reason}\n" for reason in said)


def test_a_lock_that_cannot_be_removed_while_it_is_held(tmp_path, monkeypatch):
    """As on Windows."""
    unlink = Path.unlink

    def refuse(self, missing_ok=False):
        if self.suffix == ".lock":
            raise PermissionError(13, "another process uses the file")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert write(tmp_path / "store").exists()


def test_an_episode_of_a_single_state_is_left_out():
    steps = {"observation": [b""], "action": np.zeros(1, int), "reward": np.zeros(1)}
    steps |= {"is_terminal": np.ones(1, bool)}
    episode = {"steps": steps, "checkpoint_id": 0, "episode_id": 0}
    assert list(prepare_atari.rlds(episode)) == []


def test_a_preparation_of_tfds_that_is_there_is_taken(rlu, make, path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(rlu.tfds_dir))
    monkeypatch.setattr(prepare_atari, "can_reach_rlu", lambda: False)
    assert contents(make() / "Pong-run1-100pct") == contents(path)


def test_what_a_kill_left_beside_a_whole_store_goes(make, tmp_path):
    left = tmp_path / "data/atari/.Pong-run1-80pct.building"
    write(left.with_name("Pong-run1-80pct"), percent=80)
    left.mkdir()
    make(percent=50, rlu_prefix="nowhere")
    assert not left.exists()


def test_sizes_of_the_published_data():
    """A million steps a checkpoint, and episodes of 27,000 steps at most."""
    assert (prepare_atari.STEPS_PER_CHECKPOINT, prepare_atari.MAX_STEPS) == (1_000_000, 27_000)
