"""Ordinary mishaps end in one sentence and a status that is not zero, never in a traceback."""

import importlib
import json
import signal
from types import SimpleNamespace

import helpers
import pytest

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
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["Stopped."]


@pytest.mark.parametrize("name", ["rosmo_bsuite", "rosmo_atari"])
def test_an_accelerator_that_is_not_there(started, name):
    result = started(name, JAX_PLATFORMS="cuda")
    assert result.returncode == 1
    assert_one_sentence(result.stderr)
    assert "JAX finds no device of JAX_PLATFORMS=cuda" in result.stderr


def test_memory_that_is_not_enough(started):
    result = started("bc_bsuite", "--batch-size", 10**9)
    assert result.returncode == 1
    assert_one_sentence(result.stderr)
    assert "The memory is not enough: give a smaller --batch-size" in result.stderr


@by_script
def test_a_home_in_paths_is_expanded(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = importlib.import_module(name)
    args = module.Args(run_dir=module.Path("~/run"), dataset=module.Path("~/data"))
    args = module.check_args(args, module.RANGES)
    assert (args.run_dir, args.dataset) == (tmp_path / "run", tmp_path / "data")


@by_script
@pytest.mark.parametrize("reason", ["no home", "the user's own folder"])
def test_programs_are_kept_in_no_folder_but_the_users(name, reason, monkeypatch):
    module, changes, own = importlib.import_module(name), [], reason != "no home"
    config = SimpleNamespace(update=lambda *change: changes.append(change))
    config.jax_compilation_cache_dir = "/own" if own else None
    monkeypatch.setattr(module.jax, "config", config)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(module.os.path, "expanduser", lambda path: "/home" if own else path)
    module.prepare_jax()
    assert changes == []


def test_a_tool_with_closed_streams(script, tmp_path):
    """The line that opens others stands in all of them."""
    options = ["--num-episodes", 2, "--out", tmp_path / "catch.npz"]
    result = script("benchmark/collect_bsuite.py", *options, shell="exec >&- 2>&-")
    assert result.returncode == 0
    assert (tmp_path / "catch.npz").exists()
    texts = [(helpers.ROOT / "benchmark" / f"{name}.py").read_text() for name in TOOLS]
    assert {text.count("sys.stdout, sys.stderr = (x or open(os.devnull") for text in texts} == {1}


@pytest.mark.parametrize("name", ["rosmo_bsuite", "morel_atari"])
def test_help_where_a_terminal_knows_ascii_alone(script, name):
    result = script(f"{name}.py", "--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "--total-updates" in result.stdout


def test_watching_a_run(in_process, tmp_path, monkeypatch, capsys):
    import watch

    helpers.without_blocks(monkeypatch, "bc_atari")
    in_process("bc_atari", "--eval-episodes", 0, "--final-eval-episodes", 0)
    run = tmp_path / "run"
    watch.main(watch.Args(run, seed=3, greedy=True, max_frames=40))
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
    for text in ("{}", "[]", '{"script": "bc_atari.py"}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is no run with a whole checkpoint"):
            watch.load_agent(tmp_path / "other")
    path = run / "config.json"
    path.write_text(path.read_text().replace("bc_atari.py", "my_bc_atari.py"))
    newest.write_bytes(whole)
    with pytest.raises(SystemExit, match=r"is a run of my_bc_atari.py: put that script beside"):
        watch.load_agent(run)
    config = json.dumps({"script": "rosmo_bsuite.py", "args": {}})
    (tmp_path / "other" / "config.json").write_text(config)
    with pytest.raises(SystemExit, match="only Atari has pictures"):
        watch.load_agent(tmp_path / "other")
