"""Runs of the BSuite scripts as a user starts them: artefacts, resume, bad input."""

import fcntl
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tyro
from conftest import ROOT, write_catch_dataset

SCRIPTS = sorted(path.name for path in ROOT.glob("*_bsuite.py"))
TINY = "--env-id catch --num-seeds 2 --batch-size 16 --log-every 10 "
TINY += "--eval-every 20 --checkpoint-every 40 --total-updates 120 --final-eval-episodes 3"
TINY = TINY.split()


def lines(folder) -> list[dict]:
    """The metrics of a run without the time that it took."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(x) | {"wall_time": None} for x in text.splitlines()]


@pytest.fixture
def bsuite(script, catch_dataset):
    """Starts rosmo_bsuite.py on the small dataset: bsuite("--seed", 1)."""

    def start(*arguments, wait=True, **environment):
        options = [*TINY, "--dataset", catch_dataset, *arguments]
        return script("rosmo_bsuite.py", *options, wait=wait, **environment)

    return start


@pytest.fixture
def in_process(catch_dataset, cache_dir, tmp_path, monkeypatch, capsys):
    """The same in the process of the tests, which is quicker: in_process("--seed", 1)."""
    module = importlib.import_module("rosmo_bsuite")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    handlers = []  # kept as signal.signal keeps them, and with them what a run forgets to close
    monkeypatch.setattr(signal, "signal", lambda *handler: handlers.append(handler))

    def start(*arguments, dataset=catch_dataset):
        options = [*TINY, *(["--dataset", dataset] if dataset else []), *arguments]
        status, message = 0, ""
        try:
            module.main(tyro.cli(module.Args, args=[str(option) for option in options]))
        except SystemExit as end:  # the interpreter writes a text to stderr and returns 1
            is_text = isinstance(end.code, str)
            status, message = (1, end.code) if is_text else (end.code, "")
        stdout, stderr = capsys.readouterr()
        return subprocess.CompletedProcess(options, status, stdout, stderr + message)

    return start


def check_artefacts(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["total_updates"] == 120
    assert config["starts"][0]["versions"]["jax"]
    assert "100 episodes" in config["data"]
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    steps = {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
    assert {80, 120} <= steps
    assert len(steps) <= 3  # the last two and the best
    written = lines(folder)
    for seed in (0, 1):
        mine = [x for x in written if x["seed"] == seed]
        assert [x["update"] for x in mine if "losses/total" in x] == list(range(10, 121, 10))
        assert [x["update"] for x in mine if "eval/returns" in x] == list(range(20, 121, 20))
        assert len(mine[-1]["final/returns"]) == 3
        assert mine[-1]["final/return_mean"] == np.mean(mine[-1]["final/returns"])
        assert "final/return_mean_greedy" in mine[-1]
    losses = [x["losses/total"] for x in written if "losses/total" in x]
    assert losses[0] != losses[1]  # the first of two seeds
    algorithm = config["script"].rsplit("_", 1)[0]
    page = (ROOT / "docs" / f"{algorithm}.md").read_text()
    documented = set(re.findall(r"^\| `(\w+/\w+)` \| (?!Atari:)", page, re.MULTILINE))
    assert {name for line in written for name in line if "/" in name} == documented


def test_a_run_leaves_all_its_artefacts_and_is_not_run_twice(bsuite, tmp_path):
    result = bsuite("--learning-rate", 0.001)
    assert result.returncode == 0, result.stderr
    assert "see runs/" in result.stdout
    (folder,) = tmp_path.glob("runs/*/catch-dataset=*/seeds0-1")
    assert "learning-rate=0.001" in str(folder)
    check_artefacts(folder)
    written = lines(folder)
    again = bsuite("--learning-rate", 0.001)
    assert again.returncode == 0
    assert "This run is finished" in again.stdout
    assert lines(folder) == written


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "rosmo_bsuite.py"])
def test_the_siblings_leave_the_same_and_go_on_exactly(
    name, catch_dataset, cache_dir, tmp_path, monkeypatch
):
    """In this process, which is quicker. Their run folders are rosmo_bsuite.py's to the byte."""
    module = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    handlers = []  # kept as signal.signal keeps them, and with them what a run forgets to close
    monkeypatch.setattr(signal, "signal", lambda *handler: handlers.append(handler))

    def run(folder: str, total_updates: int) -> None:
        options = ["--run-dir", tmp_path / folder, "--total-updates", total_updates]
        options = [*TINY, "--dataset", catch_dataset, *options]
        module.main(tyro.cli(module.Args, args=[str(option) for option in options]))

    run("whole", 120)
    run("stopped", 40)
    run("stopped", 120)
    for folder in ("whole", "stopped"):
        check_artefacts(tmp_path / folder)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_kill_and_resume_give_the_numbers_of_a_whole_run(bsuite, tmp_path):
    longer = ["--total-updates", 2000, "--checkpoint-every", 200]
    whole = bsuite("--run-dir", "whole", *longer)
    assert whole.returncode == 0, whole.stderr
    process = bsuite("--run-dir", "killed", *longer, wait=False)
    while not (tmp_path / "killed" / "checkpoints" / "200").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert '"update": 2000' not in (tmp_path / "killed" / "metrics.jsonl").read_text()
    resumed = bsuite("--run-dir", "killed", *longer)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"Going on from update [\d,]+ in", resumed.stdout)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_ctrl_c_writes_a_checkpoint_and_exits_with_130(bsuite, tmp_path):
    options = ["--run-dir", "run", "--total-updates", 100_000, "--overwrite"]
    process = bsuite(*options, wait=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and "eval/returns" in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    update = int(re.search(r"Stopped at update ([\d,]+);", stderr)[1].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / str(update)).is_dir()
    assert lines(tmp_path / "run")[-1]["update"] == update
    assert "the same command without --overwrite goes on" in stderr


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(in_process, tmp_path):
    result = in_process("--run-dir", "run", "--learning-rate", "1e30")
    assert result.returncode == 1
    assert re.search(r"The loss is (nan|inf) by update \d+", result.stderr)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_folder_with_other_arguments_is_left_alone(in_process, tmp_path):
    assert in_process("--run-dir", "run", "--total-updates", 20).returncode == 0
    before = lines(tmp_path / "run")
    result = in_process("--run-dir", "run", "--total-updates", 20, "--learning-rate", 0.1)
    assert result.returncode == 1
    assert "learning_rate 0.0007 -> 0.1" in result.stderr
    assert "--overwrite" in result.stderr
    assert lines(tmp_path / "run") == before
    (tmp_path / "run" / "video.mp4").touch()
    other = in_process("--run-dir", "run", "--total-updates", 20, "--seed", 7, "--overwrite")
    assert other.returncode == 0, other.stderr
    assert not (tmp_path / "run" / "video.mp4").exists()
    assert {x["seed"] for x in lines(tmp_path / "run")} == {7, 8}


def test_a_folder_that_another_process_writes_to_is_left_alone(in_process, tmp_path):
    assert in_process("--run-dir", "run", "--total-updates", 20).returncode == 0
    before = lines(tmp_path / "run")
    with open(tmp_path / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in (["--total-updates", 40], ["--overwrite"]):
            result = in_process("--run-dir", "run", *options)
            assert result.returncode == 1
            assert "Another process is writing to run" in result.stderr
            assert lines(tmp_path / "run") == before
    assert in_process("--run-dir", "run", "--total-updates", 40).returncode == 0


@pytest.mark.parametrize("name", ["chapter1.tex", "config.json", "checkpoints/1/weights.bin"])
def test_a_folder_that_is_not_a_run_is_never_deleted(in_process, tmp_path, name):
    (tmp_path / "thesis" / name).parent.mkdir(parents=True)
    (tmp_path / "thesis" / name).write_text('{"model": "someone else\'s"}')
    result = in_process("--run-dir", "thesis", "--overwrite")
    assert result.returncode == 1
    assert re.search("is not (the folder of a run|a run of this script)", result.stderr)
    assert (tmp_path / "thesis" / name).exists()


def test_a_folder_whose_first_start_failed_is_used_again(in_process, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "config.tmp").write_text('{"args": ')  # no space was left
    assert in_process("--run-dir", "run", "--total-updates", 20).returncode == 0


def test_a_run_is_finished_when_its_curve_is_drawn(in_process, monkeypatch):
    """Else a kill between the two would leave a finished run without a curve."""
    module, finished = importlib.import_module("rosmo_bsuite"), []
    monkeypatch.setattr(module.Run, "plot", lambda run, _: finished.append(run.is_finished()))
    for _ in range(2):
        result = in_process("--run-dir", "run", "--total-updates", 20)
    assert finished == [False]
    assert "This run is finished" in result.stdout


def test_a_longer_run_goes_on_from_a_shorter_one_and_equals_it(in_process, tmp_path):
    assert in_process("--run-dir", "at-once", "--total-updates", 80).returncode == 0
    assert in_process("--run-dir", "longer", "--total-updates", 40).returncode == 0
    result = in_process("--run-dir", "longer", "--total-updates", 80)
    assert "Going on from update 40" in result.stdout
    assert lines(tmp_path / "longer") == lines(tmp_path / "at-once")
    assert (
        "total_updates 80 -> 40" in in_process("--run-dir", "longer", "--total-updates", 40).stderr
    )


def test_a_run_does_not_go_on_with_other_data(in_process, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, num_episodes in ((first, 20), (second, 30)):
        write_catch_dataset(folder / "bsuite" / "catch-noise0-seed0.npz", num_episodes)
    run = ["--run-dir", "run", "--total-updates"]
    assert in_process(*run, 20, "--data-dir", first, dataset=None).returncode == 0
    result = in_process(*run, 40, "--data-dir", second, dataset=None)
    assert result.returncode == 1
    assert "holds a run on other data" in result.stderr


def test_an_unwritable_run_folder(in_process, tmp_path):
    (tmp_path / "file").write_text("")
    result = in_process("--run-dir", "file/run")
    assert result.returncode == 1
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "pong"], "catch"),  # tyro lists the known ones
        (["--noise", "1.5"], "--noise is 1.5"),
        (["--data-percent", "0"], "--data-percent is 0"),
        (["--data-percent", "0.1"], "of 100 episodes leaves none"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--eval-every", "15"], "must be a multiple"),
        (["--dataset", "nowhere.npz"], "There is no dataset at nowhere.npz"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(in_process, tmp_path, arguments, message):
    result = in_process(*arguments)
    assert result.returncode in (1, 2)
    assert message in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()


DAMAGES = ["truncated", "foreign", "other-task", "not-finite", "empty", "actions", "shape"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_datasets_give_one_sentence(catch_dataset, in_process, tmp_path, damage):
    with np.load(catch_dataset) as file:
        arrays = dict(file)
    path = tmp_path / "damaged.npz"
    if damage == "truncated":
        path.write_bytes(catch_dataset.read_bytes()[:5000])
    elif damage == "foreign":
        np.savez(path, x=np.zeros(3))
    elif damage == "other-task":
        arrays["header"] = np.array(str(arrays["header"]).replace("catch", "cartpole"))
        np.savez(path, **arrays)
    elif damage == "not-finite":
        arrays["reward"] = arrays["reward"] * np.nan
        np.savez(path, **arrays)
    elif damage == "actions":
        np.savez(path, **arrays | {"action": arrays["action"] + 2})
    elif damage == "shape":
        np.savez(path, **arrays | {"observation": arrays["observation"][:, :, :4]})
    elif damage == "empty":
        np.savez(path, **{k: v if k == "header" else v[:0] for k, v in arrays.items()})
    result = in_process(dataset=path)
    assert result.returncode == 1
    assert "is not a whole dataset of catch" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_several_devices_give_the_numbers_of_one(bsuite, tmp_path):
    four = "--xla_force_host_platform_device_count=4"
    assert bsuite("--run-dir", "one", "--total-updates", 20).returncode == 0
    result = bsuite("--run-dir", "four", "--total-updates", 20, XLA_FLAGS=four)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["starts"][0]["device"].startswith("4 x")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "four"), strict=True):
        for name in a:
            if name.startswith(("losses/", "charts/")):
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


def test_wandb_mirror_works_offline(bsuite, tmp_path):
    result = bsuite("--run-dir", "run", "--total-updates", 20, "--track", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    wandb_id = json.loads((tmp_path / "run" / "config.json").read_text())["wandb_id"]
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{wandb_id}/run-{wandb_id}.wandb"))


def test_a_missing_dataset_is_collected(script, tmp_path):
    """The whole road of a newcomer, with a collection that is cut short for the test."""
    options = ["--env-id", "catch", "--noise", 0.25, "--num-seeds", 1, *TINY[4:]]
    process = script("rosmo_bsuite.py", *options, wait=False)
    out = ""
    for line in process.stdout:
        out += line
        if line.startswith("Collecting"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert "There is no dataset at data/bsuite/catch-noise0.25-seed0.npz yet" in out
    assert not (tmp_path / "data" / "bsuite" / "catch-noise0.25-seed0.npz").exists()


def test_a_copied_script_names_the_command_that_makes_its_data(tmp_path):
    shutil.copy(ROOT / "rosmo_bsuite.py", tmp_path)
    command = [sys.executable, "rosmo_bsuite.py", "--env-id", "mountain_car", "--noise", "0.3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    expected = "python benchmark/collect_bsuite.py --env-id mountain_car --noise 0.3 --seed 0"
    assert expected in result.stderr


def test_a_tfds_folder_holds_the_same_steps(catch_dataset, tmp_path):
    """RLDS through TFDS's own writer and reader, as in the authors' released data."""
    import tensorflow_datasets as tfds

    import rosmo_bsuite

    args = rosmo_bsuite.Args(dataset=catch_dataset)
    steps, _ = rosmo_bsuite.load_dataset(args)
    ends = np.flatnonzero(steps.is_last)[:5] + 1
    step_features = {
        "observation": tfds.features.Tensor(shape=(10, 5), dtype=np.float32),
        "action": np.int64,
        "reward": np.float32,
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "discount": np.float32,
    }

    def generate():
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            rows = {name: x[start:end] for name, x in steps._asdict().items()}
            first = np.arange(end - start) == 0
            rows |= {"is_first": first, "discount": np.ones(end - start, np.float32)}
            yield i, {"steps": rows, "episode_id": i}

    features = {"steps": tfds.features.Dataset(step_features), "episode_id": np.int64}
    builder = tfds.dataset_builders.AdhocBuilder(
        name="catch",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": list(generate())},
        data_dir=str(tmp_path),
    )
    builder.download_and_prepare()
    read = rosmo_bsuite.read_rlds(builder.data_path)
    assert len(read.action) == ends[-1]
    # TFDS writes the episodes in the order of a hash of their keys.
    ours = {s.observation.tobytes() + s.action.tobytes() for s in episodes(steps, ends)}
    theirs = {s.observation.tobytes() + s.action.tobytes() for s in episodes(read, read.is_last)}
    assert ours == theirs


def episodes(steps, ends):
    if np.asarray(ends).dtype == bool:
        ends = np.flatnonzero(ends) + 1
    return [type(steps)(*(x[a:b] for x in steps)) for a, b in zip([0, *ends], ends, strict=False)]
