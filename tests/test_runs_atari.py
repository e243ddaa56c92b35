"""Runs of the Atari scripts as a user starts them: artefacts, resume, several devices."""

import importlib
import json
import re
import signal
import socket
import time
from functools import partial

import cv2
import pytest
import tyro
from conftest import ROOT

import rosmo_atari

pytestmark = pytest.mark.usefixtures("hurry")
SCRIPTS = sorted(path.name for path in ROOT.glob("*_atari.py"))
# The episodes of Asterix are the shortest of all games whose scores are known.
TINY = "--env-id Asterix --channels 4 --batch-size 4 --log-every 2 --eval-every 4 "
TINY += "--checkpoint-every 4 --total-updates 8 --eval-episodes 1 --final-eval-episodes 1"
TINY = TINY.split()
BINS = ["--num-bins", 21]
LESS = {name: [*BINS, "--unroll-steps", 1, "--td-steps", 1] for name in SCRIPTS}
LESS["muzero_unplugged_atari.py"] += ["--num-simulations", 2]
LESS |= {"bc_atari.py": [], "crr_atari.py": BINS, "cql_atari.py": BINS}
WORLD_MODEL = "--members 2 --deter 16 --hidden 16 --latents 4 --classes 4 --depth 2"
WORLD_MODEL += " --head-units 16 --model-length 6 --model-batch-size 2 --model-updates 2"
WORLD_MODEL += " --model-eval-every 2 --model-eval-batches 8 --heldout-percent 30"
IMAGINED = "--rollout-length 4 --minibatches 2 --epochs 1 --horizon 3 --starts 2 --halt-batches 1"
IMAGINED += " --bc-updates 2 --bc-batch-size 4"
LESS["morel_atari.py"] = [*WORLD_MODEL.split(), *IMAGINED.split()]
ROLLOUTS = "--rollout-every 3 --rollout-starts 4 --rollout-length 3 --rollout-generations 2"
LESS["combo_atari.py"] = [*BINS, *WORLD_MODEL.split(), *ROLLOUTS.split()]
SPEED = ("wall_time", "charts/updates_per_second", "charts/data_wait")


def lines(folder) -> list[dict]:
    """The metrics of a run without the time that it took."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


@pytest.fixture
def atari(script, asterix_store):
    """Starts rosmo_atari.py on the small store: atari("--seed", 1)."""

    def start(*arguments, wait=True, **environment):
        options = [*TINY, *LESS["rosmo_atari.py"], "--dataset", asterix_store, *arguments]
        return script("rosmo_atari.py", *options, wait=wait, **environment)

    return start


def check_artefacts(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["source"] == "dqn"
    assert config["starts"][0]["rom"] == rosmo_atari.rom_digest("Asterix")
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    written = lines(folder)
    assert [x["update"] for x in written if "losses/total" in x] == [2, 4, 6, 8]
    assert [x["update"] for x in written if "eval/returns" in x] == [4, 8]
    final = written[-1]
    assert 0 <= final["final/return_mean"] < 3000
    assert final["final/normalized_score"] == pytest.approx(
        rosmo_atari.normalized_score("Asterix", final["final/return_mean"])
    )
    if config["script"] == "morel_atari.py":  # its page has the world model's metrics as well
        written += lines(folder.with_name(f"{folder.name}-world-model"))
    page = (ROOT / "docs" / f"{config['script'].rsplit('_', 1)[0]}.md").read_text()
    documented = set(re.findall(r"^\| `(\w+/\w+)`", page, re.MULTILINE))
    assert {name for line in written for name in line if "/" in name} | set(SPEED[1:]) == documented


def test_a_run_leaves_all_its_artefacts(atari, tmp_path):
    result = atari()
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("runs/*/Asterix-*/seed0")
    check_artefacts(folder)
    final = lines(folder)[-1]
    assert not (folder / "video.mp4").exists()
    atari("--capture-video")  # of the finished run, which is evaluated again
    assert lines(folder)[-1] == final
    video, num_frames = cv2.VideoCapture(str(folder / "video.mp4")), 0
    while video.read()[0]:
        num_frames += 1
    assert num_frames > 100
    assert "This run is finished" in atari("--capture-video").stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "rosmo_atari.py"])
def test_the_siblings_leave_the_same_and_go_on_exactly(
    name, asterix_store, cache_dir, tmp_path, monkeypatch
):
    """In this process and with short games, which is quicker; the rest is as in rosmo_atari.py."""
    module, handlers = importlib.import_module(name.removesuffix(".py")), {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    short = partial(module.evaluate, max_num_frames_per_episode=400)

    def short_and_stopped(*arguments):
        handlers[signal.SIGINT]()
        return short(*arguments)

    def run(folder: str, evaluate) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(module, "evaluate", evaluate)
        options = [*TINY, *LESS[name], "--dataset", asterix_store, "--run-dir", "run"]
        module.main(tyro.cli(module.Args, args=[str(option) for option in options]))

    run("whole", short)
    with pytest.raises(SystemExit, match="130"):
        run("stopped", short_and_stopped)  # by the first evaluation
    assert [x["update"] for x in lines(tmp_path / "stopped" / "run")] == [2, 4, 4]
    run("stopped", short)
    for folder in ("whole", "stopped"):
        check_artefacts(tmp_path / folder / "run")
    assert lines(tmp_path / "stopped" / "run") == lines(tmp_path / "whole" / "run")


def test_kill_and_resume_give_the_numbers_of_a_whole_run(atari, tmp_path):
    longer = ["--total-updates", 40, "--eval-every", 40]
    whole = atari("--run-dir", "whole", *longer)
    assert whole.returncode == 0, whole.stderr
    process = atari("--run-dir", "killed", *longer, wait=False)
    while not (tmp_path / "killed" / "checkpoints" / "8").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert '"update": 40' not in (tmp_path / "killed" / "metrics.jsonl").read_text()
    resumed = atari("--run-dir", "killed", *longer)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"Going on from update \d+ in", resumed.stdout)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_ctrl_c_stops_at_any_update_and_the_run_goes_on_from_it(atari, tmp_path):
    endless = ["--run-dir", "run", "--total-updates", 10_000, "--eval-every", 10_000]
    endless += ["--log-every", 1000, "--checkpoint-every", 10_000]
    process = atari(*endless, wait=False)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    update = int(re.search(r"Stopped at update ([\d,]+);", stderr)[1].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / str(update)).is_dir()


def two_processes(atari, *arguments, timeout: float) -> tuple[list[int], list[tuple[str, str]]]:
    """A run of two processes with two devices each: their exit statuses and (stdout, stderr)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    shared["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes = [atari(*arguments, wait=False, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], outputs


def test_several_devices_and_several_processes_give_the_numbers_of_one(atari, tmp_path):
    assert atari("--run-dir", "one").returncode == 0
    statuses, outputs = two_processes(atari, "--run-dir", "four", timeout=300)
    assert statuses == [0, 0], outputs
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["starts"][0]["device"].startswith("4 x")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "four"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("losses/", "charts/")):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key


def test_several_processes_end_together_without_a_store(atari):
    """The first does not keep the others waiting for a store that it cannot open."""
    statuses, outputs = two_processes(atari, "--dataset", "nowhere", timeout=100)
    assert statuses == [1, 1]
    assert all("There is no store nowhere" in stderr for _, stderr in outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "MsPackman"], "MsPacman"),
        (["--env-id", "Breakout"], "not 100% of Breakout"),
        (["--dataset", "nowhere"], "There is no store nowhere"),
        (["--data-percent", "0"], "--data-percent is 0"),
        (["--channels", "0"], "--channels is 0"),
        (["--eval-every", "3"], "must be a multiple"),
        (["--learning-rate", "1e30", "--total-updates", "40"], "The loss is"),
    ],
)
def test_bad_input_gives_one_sentence(
    asterix_store, cache_dir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    options = [*TINY, *LESS["rosmo_atari.py"], "--dataset", asterix_store, *arguments]
    with pytest.raises(SystemExit, match=message) as end:
        rosmo_atari.main(tyro.cli(rosmo_atari.Args, args=[str(option) for option in options]))
    assert isinstance(end.value.code, str)  # goes to stderr, and the exit status is 1


def test_a_machine_without_an_accelerator_says_what_the_paper_would_take(capsys):
    rosmo_atari.warn_if_slow(20.0, rosmo_atari.Args())
    assert "would take 46 days" in capsys.readouterr().err
    rosmo_atari.warn_if_slow(0.1, rosmo_atari.Args())
    assert capsys.readouterr().err == ""
