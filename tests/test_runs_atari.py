"""Runs of the Atari scripts: artefacts, kills and signals, devices and processes, bad input.

The run folder is that of the BSuite scripts to the byte; test_runs_bsuite.py tests it. `main` is
the same in five scripts, so that most tests take the quickest one, bc_atari.py. It is the one that
runs with residual blocks.
"""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from types import SimpleNamespace
from unittest.mock import MagicMock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ATARI, checkpoints, metrics
from tqdm import tqdm

import bc_atari
import combo_atari
import rosmo_atari

pytestmark = pytest.mark.usefixtures("hurry")
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below those that the system gives away, and others than those of another suite's workers.
PORTS = itertools.count(20_000 + (37 * os.getppid() + 200 * WORKER) % 12_000)


def free_port() -> int:
    """Another suite on this machine may use some."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise AssertionError


@pytest.fixture(autouse=True, scope="module")
def without_blocks():
    with pytest.MonkeyPatch.context() as patch:
        helpers.without_blocks(patch, *(name for name in ATARI if name != "bc_atari"))
        yield


@pytest.mark.parametrize("name", ATARI)
def test_a_run_leaves_all_its_artefacts(whole, name):
    folder = whole(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == f"{name}.py"
    assert config["data"]["source"] == "dqn"
    assert config["data"]["episodes"] == 5
    assert config["data"]["steps"] == 160
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.stem for path in checkpoints(folder)] == ["5", "8"]
    written = metrics(folder)
    assert [x["update"] for x in written if "losses/total" in x] == [2, 4, 6, 8]
    assert [x["update"] for x in written if "eval/returns" in x] == [4, 8]
    final = written[-1]
    assert 0 <= final["final/return_mean"] == np.mean(final["final/returns"]) < 3000
    assert len(final["final/returns"]) == len(final["final/returns_greedy"]) == 1


@pytest.fixture
def waited(monkeypatch):
    """What the loss is for which a run waits."""
    losses, wait = [], jax.block_until_ready

    def record(metrics):
        losses.append(float(metrics["losses/total"]))
        return wait(metrics)

    monkeypatch.setattr(jax, "block_until_ready", record)
    return losses


def test_lines_have_the_means_of_their_updates(in_process, monkeypatch, tmp_path, waited):
    def update(state, *_):
        values = {"losses/total": jnp.float32(state.step), "charts/yes": state.step >= 0}
        return state._replace(step=state.step + 1), values

    monkeypatch.setattr(bc_atari, "update", update)
    monkeypatch.setattr(bc_atari, "evaluate", lambda *_: [0.0, 1.0, 5.0])
    assert in_process("bc_atari").returncode == 0
    lines = metrics(tmp_path / "run")
    assert [x["losses/total"] for x in lines if "losses/total" in x] == [0.5, 2.5, 4.5, 6.5]
    assert [x["charts/yes"] for x in lines if "charts/yes" in x] == [1] * 4  # of booleans, too
    # For the sums twice and at every line, elsewhere for the update before: one batch waits.
    assert waited == [0, 0 + 1, 1, 2 + 3, 3, 4 + 5, 5, 6 + 7]
    for name in ("eval/return_mean", "final/return_mean", "final/return_mean_greedy"):
        assert {x[name] for x in lines if name in x} == {2}


@pytest.mark.parametrize("name", ["morel_atari", "combo_atari"])
def test_the_training_of_both_phases_logs_means_and_lets_one_batch_wait(name, waited):
    module = importlib.import_module(name)
    args = SimpleNamespace(total_updates=8, eval_every=8, log_every=4, checkpoint_every=8)
    args = SimpleNamespace(**vars(args), loader_threads=1, seed=0)
    run = MagicMock(args=args, stopping=False, seconds=Counter(), writes=False)
    values = lambda done: {"losses/total": jnp.float32(done), "charts/odd": jnp.bool_(done % 2)}  # noqa: E731
    update = lambda state, batch, done: (state, values(done))  # noqa: E731
    evaluate = lambda done, state: (state, "", False)  # noqa: E731
    module.train(run, 0, None, None, update, lambda step: step, evaluate, module.mean_metrics)
    logged = [call.args[2] for call in run.log.call_args_list]
    assert [tuple(x.values()) for x in logged] == [(0.5, 1.5), (0.5, 5.5)]
    assert waited == [0, 0 + 1, 1, 0 + 1 + 2 + 3, 3, 4, 5, 4 + 5 + 6 + 7]


@pytest.mark.parametrize("name", ATARI)
def test_every_metric_is_in_the_table_of_its_page(whole, name):
    folders = [whole(name)]
    if name == "morel_atari":  # its page has the world model's metrics as well
        folders.append(folders[0].with_name("run-world-model"))
    lines = [x for f in folders for x in (f / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in json.loads(line) if "/" in key}
    assert logged == helpers.documented_metrics(name)


# Kills and signals


@pytest.mark.parametrize("name", ATARI)
def test_a_killed_run_goes_on_to_the_numbers_of_a_whole_one(whole, killed, in_process, name):
    folder = killed(name, 6)
    assert [path.stem for path in checkpoints(folder)] == ["4", "5"]
    assert '"update": 6' in (folder / "metrics.jsonl").read_text()
    result = in_process(name, folder="killed")
    assert "Going on from update 5 in run." in result.stdout
    assert metrics(folder) == metrics(whole(name))


def test_a_signal_stops_the_training_with_a_checkpoint(started, tmp_path):
    """And comes before the first evaluation, so that the games' length does not matter."""
    endless = ["--run-dir", "run", "--total-updates", 10**8, "--eval-every", 10**8]
    process = started("bc_atari", *endless, wait=False)
    for line in process.stdout:
        if line.startswith("update 2:"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode == 130
    (message,) = [line for line in stderr.splitlines() if line]
    update = re.fullmatch(r"Stopped at update ([\d,]+); the same command goes on\.", message)[1]
    assert checkpoints(tmp_path / "run")[-1].stem == update.replace(",", "")


@pytest.mark.parametrize("which", [1, 2, 3, 4])  # 2 and two final ones
def test_a_signal_breaks_off_an_evaluation(whole, in_process, monkeypatch, tmp_path, which):
    """The one with the number `which`, after two steps; it comes again."""
    evaluate, count, steps = bc_atari.evaluate, [], []

    def interrupted(act, *arguments):
        count.append(None)

        def policy(observations, key):
            if len(count) == which:
                steps.append(None)
                if len(steps) == 2:
                    in_process.interrupt()
            return act(observations, key)

        return evaluate(policy, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bc_atari, "evaluate", interrupted)
        result = in_process("bc_atari")
    assert result.returncode == 130
    assert f"Stopped at update {min(4 * which, 8)}; the same command goes on." in result.stderr
    assert len(steps) == 2
    assert checkpoints(tmp_path / "run")[-1].stem == str(min(4 * which, 8))
    assert in_process("bc_atari").returncode == 0
    assert metrics(tmp_path / "run") == metrics(whole("bc_atari"))


INTERVALS = ["--log-every", 3, "--eval-every", 5, "--checkpoint-every", 7, "--total-updates", 17]


def test_intervals_of_any_kind_end_the_same_wherever_they_are_interrupted(
    whole, in_process, monkeypatch, tmp_path
):
    """test_morel.py and test_combo.py do the same for the loop of the model-based scripts."""
    expected = metrics(whole("bc_atari", *INTERVALS))
    assert [x["update"] for x in expected if "losses/total" in x] == [3, 6, 9, 12, 15]
    assert [x["update"] for x in expected if "eval/returns" in x] == [5, 10, 15, 17]
    update, calls = bc_atari.update, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) in (4, 8):
            in_process.interrupt()
        return update(*arguments)

    monkeypatch.setattr(bc_atari, "update", interrupted)
    stops = []
    while (result := in_process("bc_atari", *INTERVALS)).returncode == 130:
        stops.append(int(re.search(r"Stopped at update (\d+);", result.stderr)[1]))
    assert result.returncode == 0, result.stderr
    assert stops == [4, 8]  # between all of them
    assert len(calls) == 17
    assert metrics(tmp_path / "run") == expected


@pytest.mark.parametrize("name", ["bc_bsuite", "bc_atari"])
def test_what_takes_long_is_said_before(in_process, monkeypatch, name):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)
            self.evaluation, self.counted = options.get("desc") == "evaluation", 0

        def update(self, n=1):
            self.counted += int(n)

    monkeypatch.setattr(importlib.import_module(name), "tqdm", Bar)
    result = in_process(name)
    assert result.returncode == 0, result.stderr
    first, *_, last = [x for x in result.stdout.splitlines() if x.startswith("update ")]
    assert first == "update 0: compiling"
    episodes = 1 if name == "bc_atari" else 3
    assert f"final evaluation: {episodes} sampled, {episodes} greedy episodes" in last
    episodes *= 1 if name == "bc_atari" else 2  # seeds
    final = [x for x in bars if x.evaluation][-2:]
    assert [(x.total, x.counted) for x in final] == 2 * [(episodes, episodes)]


def test_neither_evaluations_nor_a_final_one(in_process, tmp_path):
    result = in_process("bc_atari", "--eval-episodes", 0, "--final-eval-episodes", 0)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert not [x for x in lines if "eval/returns" in x]
    assert lines[-1] == {"update": 8, "seed": 0, "final/returns": [], "final/returns_greedy": []}


# Data


def test_the_data_count_and_not_their_path(whole, in_process, asterix_store, tmp_path):
    shutil.copytree(whole("bc_atari"), tmp_path / "run")
    moved = tmp_path / "moved"
    moved.symlink_to(asterix_store)
    assert "This run is finished" in in_process("bc_atari", "--dataset", moved).stdout
    rng = np.random.default_rng(1)
    episodes = [helpers.random_episode(rng, 30, 9, is_terminal=True) for _ in range(5)]
    other = helpers.write_store(tmp_path / "other", "Asterix", episodes, 9)
    result = in_process("bc_atari", "--dataset", other)
    assert result.returncode == 1
    assert re.search(r"holds something else \(data \{.*\} -> \{.*\}\); give anoth", result.stderr)
    assert "\n" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "MsPackman"], "There is no game 'MsPackman'; the nearest names: MsPacman"),
        (["--env-id", "Breakout"], "cannot be used as a store of Breakout: .*it is of Asterix"),
        (["--dataset", "nowhere"], "nowhere cannot be used as a store of Asterix: "),
        (["--data-percent", "0"], "--data-percent is 0"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(in_process, tmp_path, arguments, message):
    result = in_process("bc_atari", *arguments)
    assert result.returncode == 1
    assert re.search(message, result.stderr)
    assert "\n" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(in_process, monkeypatch, tmp_path):
    update = bc_atari.update

    def broken(state, *arguments):
        state, metrics = update(state, *arguments)
        broken = int(state.step) > 4
        return state, metrics | {"losses/total": metrics["losses/total"] / (0.0 if broken else 1)}

    monkeypatch.setattr(bc_atari, "update", broken)
    result = in_process("bc_atari")
    assert result.returncode == 1
    assert "not finite by update 5; checkpoints before it are kept" in result.stderr
    assert checkpoints(tmp_path / "run")[-1].stem == "4"


@pytest.mark.parametrize(("name", "module"), [("bc_atari", bc_atari), ("combo_atari", combo_atari)])
def test_updates_that_would_take_weeks_say_so_once(in_process, monkeypatch, name, module):
    """A second is thirty years here."""
    assert "An update of" not in in_process(name, folder="quick").stdout
    clock = SimpleNamespace(monotonic=lambda: 1e9 * time.monotonic(), time=time.time)
    monkeypatch.setattr(module, "time", clock)
    output = in_process(name, folder="slow").stdout
    runs = 2 if name == "combo_atari" else 1  # the world model's is one, too
    slow = r"An update of .* takes \S+ s here, all up to [\d,]+ days"
    assert len(re.findall(slow, output)) == runs


@pytest.mark.parametrize(
    ("seconds", "done", "told"), [(20, 2, True), (2, 2, False), (20, 3, False)]
)
def test_what_is_slow(seconds, done, told, capsys):
    args = rosmo_atari.Args(total_updates=200_000)
    took = {"seconds/update": seconds}
    rosmo_atari.tell_if_slow(SimpleNamespace(seconds=took, args=args, writes=True, dir="a"), done)
    expected = "An update of a takes 20.0 s here, all up to 46 days; the README has small"
    assert capsys.readouterr().out.startswith(expected) == told


# Several devices and processes


def two_processes(started, name: str, *each: list, blocks=True, **shared):
    """A run of two processes, by default with two devices each; `each` has one's arguments."""
    shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    shared = {"JAX_NUM_CPU_DEVICES": "2"} | shared
    processes = [
        started(name, *arguments, wait=False, blocks=blocks, **shared, JAX_PROCESS_ID=str(i))
        for i, arguments in enumerate(each)
    ]
    outputs = [process.communicate(timeout=helpers.PATIENCE) for process in processes]
    codes = [process.returncode for process in processes]
    return [
        subprocess.CompletedProcess([], *x)
        for x in zip(codes, *zip(*outputs, strict=True), strict=True)
    ]


# The first leaves when the other has left, not three seconds later.
QUICK = """import os, time
leave, left, sleep = os._exit, {left!r}, time.sleep
if os.environ["JAX_PROCESS_ID"] == "1":
    os._exit = lambda status: open(left, "w") and leave(status)
else:
    wait = lambda: [sleep(0.05) for _ in iter(lambda: os.path.exists(left), True)]
    time.sleep = lambda seconds: wait() if seconds == 3 else sleep(seconds)
"""


def quick(folder, code: str = "") -> dict:
    (folder / "sitecustomize.py").write_text(QUICK.format(left=str(folder / "left")) + code)
    return {"PYTHONPATH": str(folder)}


NOT_PLAYED = ["--eval-episodes", 0, "--final-eval-episodes", 0]


def assert_same_losses(one, other, devices: int):
    """Of two runs, of which only one may have been evaluated."""
    config = json.loads((other / "config.json").read_text())
    assert config["starts"][0]["device"].startswith(f"{devices} x")
    assert "ale_py" in config["starts"][0]
    losses = [[x for x in metrics(folder) if "losses/total" in x] for folder in (one, other)]
    assert losses[0]
    helpers.assert_close(*losses)


@pytest.mark.parametrize(("name", "devices"), [("rosmo_atari", 4), ("combo_atari", 2)])
def test_several_devices_give_the_numbers_of_one(whole, started, tmp_path, name, devices):
    model, flags = whole(name).with_name("run-world-model"), {"JAX_NUM_CPU_DEVICES": str(devices)}
    options = [*NOT_PLAYED, "--run-dir", "several"]
    result = started(name, *options, blocks=False, **flags)
    assert result.returncode == 0, result.stderr
    assert_same_losses(whole(name), tmp_path / "several", devices)
    if name == "combo_atari":  # the world model of both
        assert_same_losses(model, tmp_path / "several-world-model", devices)


def test_many_updates_without_a_line_do_not_hang(whole, started, tmp_path):
    """The devices of a CPU hang if 32 programs wait for one of them."""
    every = ["--log-every", 8, "--eval-every", 8, "--checkpoint-every", 8, "--total-updates", 8]
    model = ["--world-model", whole("morel_atari").with_name("run-world-model")]
    options = [*NOT_PLAYED, *every, *model, "--minibatches", 4, "--epochs", 8, "--run-dir", "many"]
    result = started("morel_atari", *options, blocks=False, JAX_NUM_CPU_DEVICES="2")
    assert result.returncode == 0, result.stderr
    first, *_, last = metrics(tmp_path / "many")
    assert last["update"] == 8
    helpers.assert_close([first], metrics(whole("morel_atari"))[:1])  # the threshold and what halts


@pytest.mark.parametrize(
    ("name", "each"), [("cql_atari", 2), ("combo_atari", 1), ("morel_atari", 1)]
)
def test_several_processes_give_the_numbers_of_one(whole, started, tmp_path, name, each):
    """The first plays, while the others wait."""
    model = ["--world-model", whole(name).with_name("run-world-model")]
    both = 2 * [["--run-dir", "two", *(model if name == "morel_atari" else [])]]
    flags = {"JAX_NUM_CPU_DEVICES": str(each)}
    results = two_processes(started, name, *both, blocks=False, **flags)
    assert [x.returncode for x in results] == [0, 0], results
    assert_same_losses(whole(name), tmp_path / "two", 2 * each)
    helpers.assert_close(metrics(whole(name)), metrics(tmp_path / "two"))


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ([[], ["--seed", 1]], "The processes of this run have different arguments"),
        (2 * [["--run-dir", "other"]], "other holds something else"),
    ],
)
def test_several_processes_end_together(started, tmp_path, each, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for result in two_processes(started, "bc_atari", *each, **quick(tmp_path)):
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_the_first_process_leaves_last(started, tmp_path):
    """JAX aborts the others when it goes."""
    slow = f"""import os, time
leave, left, sleep = os._exit, {str(tmp_path / "left")!r}, time.sleep
if os.environ["JAX_PROCESS_ID"] == "1":
    os._exit = lambda status: sleep(1) or open(left, "w") and leave(status)
else:  # the first one's seconds begin when the other leaves, also on a busy machine
    wait = lambda _: [sleep(0.1) for _ in iter(lambda: os.path.exists(left), True)]
    time.sleep = lambda seconds: (wait(seconds), sleep(1))
"""
    (tmp_path / "sitecustomize.py").write_text(slow)
    nowhere, path = ["--dataset", "nowhere"], {"PYTHONPATH": str(tmp_path)}
    for result in two_processes(started, "bc_atari", *2 * [nowhere], **path):
        assert result.returncode == 1
        assert "nowhere cannot be used as a store of Asterix" in result.stderr
        assert "Traceback" not in result.stderr


def test_several_processes_end_when_one_meets_an_error_that_nobody_foresaw(started, tmp_path):
    code = """
if os.environ["JAX_PROCESS_ID"] == "1":
    import threading, zstandard
    whole, main = zstandard.ZstdDecompressor, threading.main_thread()
    broken = lambda: (whole if threading.current_thread() is main else None)()  # for batches
    zstandard.ZstdDecompressor = broken
"""
    # With one device each the processes are connected by now, and the first waits in an update.
    names = {"JAX_NUM_CPU_DEVICES": "1"} | quick(tmp_path, code)
    both = 2 * [["--run-dir", "run"]]
    names |= {"blocks": False}
    first, second = two_processes(started, "bc_atari", *both, **names)
    assert first.returncode != 0
    assert second.returncode == 1
    assert second.stderr.count("TypeError: 'NoneType' object is not callable") == 1


def test_several_processes_end_when_the_first_cannot_write(started, tmp_path):
    """The others, which wait for it, do so in whatever way JAX ends them."""
    (tmp_path / "file").touch()
    first, second = two_processes(started, "bc_atari", *2 * [["--run-dir", "file/run"]])
    assert first.returncode == 1
    assert "Not a directory" in first.stderr
    assert second.returncode != 0


@pytest.mark.parametrize(
    "given",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:x", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_process_without_its_siblings_says_what_it_lacks(in_process, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    result = in_process("bc_atari")
    assert result.returncode == 1
    assert "needs all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_that_waits_for_its_siblings(started, number):
    port = free_port()
    names = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    process = started("bc_atari", wait=False, JAX_PROCESS_ID="0", **names)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    else:
        pytest.fail("it does not wait for the others")
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode in (-number, 130)


def test_a_seed_has_batches_and_games_of_its_own_and_final_evaluations_sample_first(
    in_process, monkeypatch, tmp_path
):
    games, batches, sample = [], [], bc_atari.sample_batch

    def evaluate(policy, env_id, number, seed, frames):
        greedy = policy(np.zeros((number, 84, 84, 4), np.uint8), jax.random.key(0))
        games.append((seed, frames, greedy))
        return [1.0] * number

    def sample_batch(store, seed, step, *inputs):
        batches.append((seed, step))
        return sample(store, seed, step, *inputs)

    def update(state, *_):
        return state._replace(step=state.step + 1), {"losses/total": jnp.float32(0)}

    monkeypatch.setattr(bc_atari, "act", lambda params, x, key, greedy, *_: greedy)
    monkeypatch.setattr(bc_atari, "evaluate", evaluate)
    monkeypatch.setattr(bc_atari, "sample_batch", sample_batch)
    monkeypatch.setattr(bc_atari, "update", update)
    for seed in (0, 1):
        options = ["--seed", seed, *["--eval-greedy"] * (seed == 0)]
        assert in_process("bc_atari", *options, folder=str(seed)).returncode == 0
        assert {x for x, _ in batches} == set(range(seed + 1))
        assert set(itertools.product([seed], range(8))) <= set(batches)
    seeds, frames, greedy = zip(*games, strict=True)
    assert greedy == (True, True, False, True, False, False, False, True)
    assert len(set(seeds)) == 4  # of two seeds at two updates
    assert set(frames) == {40}


@pytest.mark.parametrize("name", ["bc_atari"])
def test_a_signal_to_another_process_stops_this_one_too(in_process, monkeypatch, tmp_path, name):
    module, updates, notes = importlib.import_module(name), [], []
    update, save = module.update, module.Run.save

    def counted(*inputs):
        updates.append(None)
        return update(*inputs)

    def all_processes(value):  # the other one gets the signal in the third update
        notes.append("asked")
        return [value, len(updates) >= 3] if type(value) is bool else [value]

    def noted(*inputs):
        save(*inputs)
        notes.append("saved")

    monkeypatch.setattr(module, "update", counted)
    monkeypatch.setattr(module.Run, "save", noted)
    monkeypatch.setattr(module, "all_processes", all_processes)
    result = in_process(name)
    assert result.returncode == 130
    assert "Stopped at update 3; the same command goes on." in result.stderr
    assert checkpoints(tmp_path / "run")[-1].stem == "3"
    assert notes[-2:] == ["saved", "asked"]  # the others wait until the first has saved


def test_processes_are_joined_by_their_variables_or_by_slurm(monkeypatch):
    joined, settings = [], {}
    config = SimpleNamespace(jax_num_cpu_devices=1, update=settings.__setitem__)
    distributed = SimpleNamespace(initialize=lambda *given: joined.append(given))
    fake = SimpleNamespace(config=config, distributed=distributed)
    monkeypatch.setattr(bc_atari, "jax", fake)
    monkeypatch.setattr(bc_atari, "prepare_jax", lambda: None)
    monkeypatch.setattr(bc_atari, "all_processes", lambda value: [value])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    bc_atari.join_processes(bc_atari.Args())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    bc_atari.join_processes(bc_atari.Args())
    assert joined == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    bc_atari.join_processes(bc_atari.Args())
    for name, value in zip(names, ("host:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    bc_atari.join_processes(bc_atari.Args())
    assert joined == [(), ("host:1", 2, 1)]
    assert settings == {"jax_enable_preemption_service": False}  # SIGTERM stays ours


@pytest.mark.parametrize(("tasks", "devices"), [("1", 4), ("2", 2), ("4", 1)])
def test_the_tasks_of_slurm_share_the_batch_that_the_cores_share(monkeypatch, tasks, devices):
    config = {"jax_num_cpu_devices": -1}
    fake = SimpleNamespace(update=config.__setitem__, jax_num_cpu_devices=-1)
    distributed = SimpleNamespace(initialize=lambda *_: None)
    monkeypatch.setattr(bc_atari, "jax", SimpleNamespace(config=fake, distributed=distributed))
    monkeypatch.setattr(bc_atari, "prepare_jax", lambda: None)
    monkeypatch.setattr(bc_atari, "all_processes", lambda value: [value])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    bc_atari.join_processes(bc_atari.Args(batch_size=4))
    assert config["jax_num_cpu_devices"] == devices


@pytest.mark.parametrize("name", ATARI)
def test_processes_that_see_different_checkpoints_end(in_process, monkeypatch, name):
    other = lambda value: [value, 5] if value == 0 else [value]  # noqa: E731
    monkeypatch.setattr(importlib.import_module(name), "all_processes", other)
    result = in_process(name)
    assert result.returncode == 1
    assert "The processes see different files in run: all must share it." in result.stderr


def test_a_signal_to_one_of_two_processes_stops_both(started, tmp_path):
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    shared |= {"JAX_NUM_CPU_DEVICES": "1", "blocks": False, "wait": False}
    endless = ["--run-dir", "run", "--total-updates", 10**8, "--eval-every", 10**8]
    endless += ["--log-every", 5, "--checkpoint-every", 10**8]
    both = [started("bc_atari", *endless, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]
    for line in both[0].stdout:
        if line.startswith("update 5:"):
            break
    both[1].terminate()
    outputs = [process.communicate(timeout=helpers.PATIENCE) for process in both]
    assert [process.returncode for process in both] == [130, 130], outputs
    newest = int(checkpoints(tmp_path / "run")[-1].stem)
    assert newest > 0
    assert newest % 5 == 0  # the next line of the log
