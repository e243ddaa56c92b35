"""Ordinary mishaps end in one sentence and a status that is not zero, never in a traceback."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
import tyro
import watch
from flax import serialization

import bc_atari
import bc_bsuite

pytestmark = pytest.mark.usefixtures("hurry")
TOOLS = sorted(path.stem for path in (helpers.ROOT / "benchmark").glob("*.py"))
TOOLS.remove("paper")  # it is no program
by_script = pytest.mark.parametrize("name", helpers.SCRIPTS)


def assert_one_sentence(stderr: str) -> None:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("rosmo_bsuite.py", signal.SIGINT),
        ("rosmo_atari.py", signal.SIGTERM),
        *((f"benchmark/{name}.py", signal.SIGINT) for name in TOOLS),
    ],
)
def test_a_signal_while_packages_are_imported(script, name, number):
    process = script(name, wait=False, PYTHONPROFILEIMPORTTIME="1")
    while "numpy" not in process.stderr.readline():  # its import has begun
        assert process.poll() is None
    process.send_signal(number)
    _, stderr = process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode == -number
    assert all(line.startswith("import time:") for line in stderr.splitlines())


@pytest.mark.parametrize("name", ["rosmo_bsuite", "rosmo_atari"])
def test_an_accelerator_that_is_not_there(started, name):
    result = started(name, JAX_PLATFORMS="cuda")
    assert result.returncode == 1
    assert_one_sentence(result.stderr)
    assert "JAX finds no device of JAX_PLATFORMS=cuda" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="macOS grants memory that is not there")
def test_memory_that_is_not_enough(started):
    result = started("bc_bsuite", "--batch-size", 10**9)
    assert result.returncode == 1
    assert_one_sentence(result.stderr)
    assert "The memory is not enough: give a smaller --batch-size" in result.stderr
    assert re.search(r"RESOURCE_EXHAUSTED|Unable to allocate", result.stderr)  # how much it was


@pytest.mark.parametrize("name", ["bc_bsuite", "bc_atari"])
def test_a_package_that_is_missing_is_named_before_training(started, name, tmp_path):
    """Matplotlib is needed at the end alone."""
    (tmp_path / "matplotlib").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\")"
    (tmp_path / "matplotlib" / "__init__.py").write_text(missing)
    result = started(name, "--run-dir", tmp_path / "run", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert_one_sentence(result.stderr)
    assert "No module named 'matplotlib': install it" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@by_script
def test_a_home_in_paths_is_expanded(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = importlib.import_module(name)
    args = module.Args(run_dir=module.Path("~/run"), dataset=module.Path("~/data"))
    args = module.check_args(args, module.RANGES)
    assert (args.run_dir, args.dataset) == (tmp_path / "run", tmp_path / "data")


@pytest.mark.parametrize(
    ("given", "home", "own", "gpus", "folder"),
    [
        ("/given", "/home", None, 1, "/given/rosmo-suite"),
        (None, "/home", None, 1, "/home/.cache/rosmo-suite"),
        (None, "~", None, 1, None),  # no home
        (None, "/home", "/own", 1, None),
        (None, "/home", None, 0, "/home/.cache/rosmo-suite"),
        (None, "/home", None, 2, None),
    ],
)
def test_programs_are_kept_in_the_user_s_cache(given, home, own, gpus, folder, monkeypatch):
    """Not of several processes, each with a GPU."""
    changes = {}
    config = SimpleNamespace(update=changes.__setitem__, jax_compilation_cache_dir=own)
    monkeypatch.setattr(bc_bsuite.jax, "config", config)
    monkeypatch.setattr(bc_bsuite.jax, "process_count", lambda: gpus or 2)
    monkeypatch.setattr(bc_bsuite.jax, "default_backend", lambda: "gpu" if gpus else "cpu")
    monkeypatch.setattr(bc_bsuite.os.path, "expanduser", lambda path: path.replace("~", home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    bc_bsuite.prepare_jax()
    assert changes.get("jax_compilation_cache_dir") == folder
    assert ("jax_persistent_cache_min_compile_time_secs" in changes) == (folder is not None)


def test_a_tool_with_closed_streams(script, tmp_path):
    """The line that opens others stands in all of them."""
    options = ["--num-episodes", 2, "--out", tmp_path / "catch.npz"]
    result = script("benchmark/collect_bsuite.py", *options, shell="exec >&- 2>&-")
    assert result.returncode == 0
    assert (tmp_path / "catch.npz").exists()
    texts = [(helpers.ROOT / "benchmark" / f"{name}.py").read_text() for name in TOOLS]
    assert {text.count("sys.stdout, sys.stderr = (x or open(os.devnull") for text in texts} == {1}


@pytest.mark.parametrize("name", ["rosmo_bsuite", "morel_atari"])
def test_help_without_docstrings(script, name):
    result = script(f"{name}.py", "--help", PYTHONOPTIMIZE="2")
    assert result.returncode == 0, result.stderr
    texts = [path.read_text() for path in helpers.ROOT.glob("*.py")]
    texts += [path.read_text() for path in (helpers.ROOT / "benchmark").glob("*.py")]
    assert not any("__doc__." in text for text in texts)


@pytest.mark.parametrize("name", ["rosmo_bsuite", "morel_atari"])
def test_help_where_a_terminal_knows_ascii_alone(script, name):
    result = script(f"{name}.py", "--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "--total-updates" in result.stdout


def test_watching_a_run(in_process, tmp_path, monkeypatch, capsys):
    helpers.without_blocks(monkeypatch, "bc_atari")
    make_network = bc_atari.make_network
    in_process("bc_atari", "--eval-episodes", 0, "--final-eval-episodes", 0)
    run = tmp_path / "run"
    act, whole = watch.load_agent(run)[2], (run / "checkpoints" / "8.msgpack").read_bytes()
    params = serialization.msgpack_restore(whole[4:])["state"]["params"]
    jax.tree.map(np.testing.assert_array_equal, act.args[0], params)
    watch.main(watch.Args(run, seed=3, greedy=True, max_frames=40))
    with monkeypatch.context() as patch:
        patch.setattr(bc_atari, "make_network", lambda _, args: make_network(7, args))
        with pytest.raises(SystemExit, match=r"another network than bc_atari\.py makes"):
            watch.load_agent(run)
    assert (run / "video.mp4").stat().st_size > 1_000
    assert "an episode of Asterix, return " in capsys.readouterr().out
    video = (run / "video.mp4").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(watch.cv2, "VideoCapture", lambda _: SimpleNamespace(get=lambda _: 1.0))
        with pytest.raises(SystemExit, match="was not written whole: is the disk full"):
            watch.main(watch.Args(run, max_frames=40))
    assert (run / "video.mp4").read_bytes() == video  # the one before is kept
    assert not list(run.glob(".video*"))
    with pytest.raises(SystemExit, match="is no run with a whole checkpoint"):
        watch.load_agent(tmp_path)
    newest = max(run.glob("checkpoints/*.msgpack"), key=lambda path: int(path.stem))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    (run / "checkpoints" / "1.msgpack").symlink_to("gone")  # as a run in progress deletes it
    assert watch.load_agent(run)[1] == "Asterix"  # of the one before
    (run / "checkpoints" / "1.msgpack").unlink()
    for path in run.glob("checkpoints/*.msgpack"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="is no run with a whole checkpoint"):
        watch.load_agent(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints" / "1.msgpack").write_bytes(bytes(4))  # whole, and empty
    path = tmp_path / "other" / "config.json"
    for text in ("{}", "[]", '{"script": "bc_atari.py"}', '{"script": 3}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is no run with a whole checkpoint"):
            watch.load_agent(tmp_path / "other")
    path = run / "config.json"
    path.write_text(path.read_text().replace("bc_atari.py", "my_bc_atari.py"))
    newest.write_bytes(whole)
    with pytest.raises(SystemExit, match=r"is a run of my_bc_atari\.py: put that .*No module"):
        watch.load_agent(run)
    path.write_text(path.read_text().replace("my_bc_atari.py", "paper.py"))
    with pytest.raises(SystemExit, match="no attribute 'prepare_jax'"):
        watch.load_agent(run)
    config = json.dumps({"script": "idea.py", "args": {"num_seeds": 1}})
    (tmp_path / "other" / "config.json").write_text(config)
    with pytest.raises(SystemExit, match="only Atari has pictures"):
        watch.load_agent(tmp_path / "other")


def test_a_folder_or_a_file_of_another_kind_is_no_video(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "load_agent", lambda run: (bc_atari, "Asterix", None))
    for out in (tmp_path, tmp_path / "video.gif"):
        with pytest.raises(SystemExit, match=r"must be a file whose name ends in \.mp4"):
            watch.main(watch.Args(tmp_path, out=out))


def test_an_episode_is_played_with_the_seed_and_as_greedily_as_told(tmp_path):
    calls, resets = [], []

    def act(observations, key, greedy):
        calls.append((jax.random.key_data(key).tolist(), greedy))
        return np.zeros(1, np.int32)

    def make_env(*inputs, **options):
        env = bc_atari.make_env(*inputs, max_num_frames_per_episode=8, **options)
        reset = lambda seed: resets.append(seed) or env.reset(seed=seed)  # noqa: E731
        return SimpleNamespace(reset=reset, step=env.step)

    for seed, greedy in ((0, False), (3, True)):
        watch.record(act, make_env, "Asterix", seed, greedy, tmp_path / "video.mp4")
    assert resets == [0, 0, 3, 3]
    assert [greedy for _, greedy in calls] == [False, False, True, True]
    assert calls[0][0] != calls[2][0]


def test_a_video_has_the_screen_at_every_step_and_the_return_is_the_sum(tmp_path, monkeypatch):
    frame, pictures, keys = np.arange(4 * 84 * 84, dtype=np.uint8).reshape(1, 4, 84, 84), [], []
    make_writer = watch.cv2.VideoWriter

    def make_env(env_id, number, **options):
        t = itertools.count(1)

        def show(i):  # in colour redder and redder
            red = np.broadcast_to(np.uint8([50 * i, 0, 0]), (1, 4, 210, 160, 3))
            return red if "img_width" in options else frame

        def step(actions):
            i = next(t)
            end = np.array([i == 3])
            return show(i + 1), np.array([float(i)]), end, np.array([False]), {}

        return SimpleNamespace(reset=lambda seed: (show(1), {}), step=step)

    def act(observations, key, greedy):
        np.testing.assert_array_equal(observations[0], np.moveaxis(frame[0], 0, -1))
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return np.zeros(1, np.int32)

    def noting(*inputs):
        video = make_writer(*inputs)
        write = lambda x: pictures.append(x[0, 0].tolist()) or video.write(x)  # noqa: E731
        return SimpleNamespace(isOpened=video.isOpened, release=video.release, write=write)

    monkeypatch.setattr(watch.cv2, "VideoWriter", noting)
    assert watch.record(act, make_env, "Pong", 0, False, tmp_path / "video.mp4") == 1 + 2 + 3
    # Blue, green, red; the last one is what the last action led to.
    assert pictures == [[0, 0, 50], [0, 0, 100], [0, 0, 150], [0, 0, 200]]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed is -1; give"),
        ({"max_frames": 3}, "--max-frames is 3; give at least 4"),
    ],
)
def test_numbers_out_of_range_are_not_watched(options, message):
    with pytest.raises(SystemExit, match=message):
        watch.main(watch.Args(Path("nowhere"), **options))


def test_a_world_model_is_not_watched(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    content = serialization.msgpack_serialize({"state": {"members": {}}})
    crc32 = zlib.crc32(content).to_bytes(4, "little")
    (tmp_path / "checkpoints/1.msgpack").write_bytes(crc32 + content)
    config = {"script": "bc_atari.py", "args": {"env_id": "Pong"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="is a world model; give the folder of its policy"):
        watch.load_agent(tmp_path)


@pytest.mark.parametrize("name", ["bc_bsuite", "bc_atari"])
def test_a_program_that_calls_main_goes_on(
    name, tmp_path, cache_dir, catch_dataset, asterix_store, monkeypatch
):
    """With the folder of a run that has ended, and Ctrl-C interrupts it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    module = importlib.import_module(name)
    dataset = catch_dataset if name == "bc_bsuite" else asterix_store
    options = [*helpers.tiny(name), "--dataset", dataset, "--run-dir", tmp_path / "run"]
    args = tyro.cli(module.Args, args=[str(option) for option in options])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    evaluate, ends = module.evaluate, []  # kept, as a notebook keeps the last error

    def interrupt(*inputs):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*inputs)

    try:
        for play, status in ((interrupt, 130), (evaluate, None), (evaluate, 0), (evaluate, 0)):
            monkeypatch.setattr(module, "evaluate", play)
            with pytest.raises(SystemExit) if status is not None else nullcontext() as end:
                module.main(args)
            assert end is None or end.value.code == status
            ends.append(end)
            if status != 0:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_notebook_runs_a_script(tmp_path, catch_dataset, cache_dir):
    """Its streams are not those of a terminal."""
    script = helpers.ROOT / "bc_bsuite.py"
    arguments = [script, *helpers.tiny("bc_bsuite"), "--dataset", catch_dataset]
    code = f"""import io, runpy, sys
class Stream(io.TextIOBase):
    write = lambda self, text: len(text)
sys.stdout, sys.argv = Stream(), {[str(x) for x in arguments]}
runpy.run_path(sys.argv[0], run_name="__main__")"""
    options = {"cwd": tmp_path, "env": os.environ | {"XDG_CACHE_HOME": str(cache_dir)}}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr


TWICE = """import json, signal
dumps = json.dumps
def signal_and_dump(x, **options):
    if isinstance(x, dict) and "losses/total" in x:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    return dumps(x, **options)
json.dumps = signal_and_dump
"""


@pytest.mark.parametrize("name", ["bc_bsuite", "bc_atari"])
def test_a_second_ctrl_c_ends_in_one_sentence(started, tmp_path, name):
    (tmp_path / "sitecustomize.py").write_text(TWICE)
    result = started(name, "--run-dir", "run", PYTHONPATH=str(tmp_path))
    assert result.returncode == 130
    assert result.stderr == "Stopped; the same command goes on from the last checkpoint.\n"
