"""Fixtures for the tests. Nothing here needs a network, a GPU or an account."""

import gc
import importlib
import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.exit("The tests need Linux or macOS: signals, shells and links are tested.", 1)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # but where a test says more
# XLA compiles with these in half the time; the programs are as quick.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    os.environ.pop(f"JAX_{name}", None)
os.environ.pop("SLURM_STEP_NUM_TASKS", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores both
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
gc.set_threshold(200_000, 50, 1000)  # tracing makes many objects, and hardly any garbage
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmark"))

import helpers  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest tests begin, so that no worker waits for another at the end."""
    items.sort(key=lambda item: "test_runs" not in item.path.name)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Or they would hold gigabytes by the end."""
    yield
    gc.collect()
    if "jax" in sys.modules:  # not every module of tests needs it
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def hurry():
    """Programs are compiled without most of XLA's optimisations, also those of started scripts.

    For tests that run each program a few times, where the optimisations cost more than they save.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def catch_dataset(tmp_path_factory) -> Path:
    return helpers.write_catch_dataset(tmp_path_factory.mktemp("data") / "catch.npz", 100)


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory) -> Path:
    """Every pixel of a frame is 40 (a + 1), a the last action, 0 at first; r_t = a_t / 4."""
    rng, episodes = np.random.default_rng(0), []
    for i in range(8):
        action = rng.integers(0, 6, 25 + i)
        action[-1] = 0
        shade = np.concatenate([[0], 40 * (action[:-1] + 1)]).astype(np.uint8)
        frames = np.broadcast_to(shade[:, None, None], (len(action), 84, 84))
        episode = {"frames": frames, "action": action, "reward": action / 4}
        episodes.append(episode | {"is_terminal": i % 2 == 0})
    path = tmp_path_factory.mktemp("store") / "Pong-dqn-toy"
    return helpers.write_store(path, "Pong", episodes, 6)


@pytest.fixture(scope="session")
def asterix_store(tmp_path_factory) -> Path:
    """Five short episodes of random frames."""
    rng = np.random.default_rng(0)
    ends = [{"is_terminal": i % 2 == 0, "checkpoint": i // 2} for i in range(5)]
    episodes = [helpers.random_episode(rng, 30 + i, 9, **end) for i, end in enumerate(ends)]
    path = tmp_path_factory.mktemp("store") / "Asterix-dqn-test"
    return helpers.write_store(path, "Asterix", episodes, 9)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One folder of compiled programs for all workers, so that each program is compiled once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compilation-cache"


@pytest.fixture
def script(cache_dir, tmp_path):
    """Starts a script of the suite as a user would: script("rosmo_bsuite.py", "--seed", 1)."""
    processes = []

    def start(name: str | Path, *arguments, wait: bool = True, shell: str = "", **environment):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        if shell:  # what the shell that starts it does before
            command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": str(cache_dir)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    yield start
    for process in processes:
        if process.poll() is None:  # the test has failed
            process.kill()
            process.communicate()


@pytest.fixture
def started(script, catch_dataset, asterix_store, tmp_path):
    """A tiny run as a user starts it: started("rosmo_bsuite", "--seed", 1)."""

    def start(name: str, *arguments, blocks: bool = True, **options):
        dataset = catch_dataset if name.endswith("_bsuite") else asterix_store
        arguments = [*helpers.tiny(name), "--dataset", dataset, *arguments]
        program = f"{name}.py" if blocks else helpers.copy_without_blocks(name, tmp_path)
        return script(program, *arguments, **options)

    return start


class InProcess:
    """The same in the process of the tests, which is quicker: in_process("rosmo_bsuite", ...).

    The folder of a run is base/{folder}/run: it is always called "run", so that runs with equal
    arguments share their programs. `handlers` has the signal handlers of the run that is going on.
    """

    def __init__(self, base: Path, cache_dir: Path, datasets: dict[str, Path], draws: bool):
        self.base, self.cache_dir, self.datasets, self.draws = base, cache_dir, datasets, draws
        self.handlers = {}

    def __call__(self, name: str, *arguments, folder: str = "."):
        module, domain = importlib.import_module(name), name.rsplit("_", 1)[1]
        (self.base / folder).mkdir(exist_ok=True, parents=True)
        options = [*helpers.tiny(name), "--dataset", self.datasets[domain], "--run-dir", "run"]
        options = [str(option) for option in (*options, *arguments)]
        status, message, out, err = 0, "", io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.base / folder)
            patch.setenv("XDG_CACHE_HOME", str(self.cache_dir))
            patch.setattr(signal, "signal", self.handlers.__setitem__)
            if not self.draws:
                patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
            gc.freeze()  # what is there before the run, which would be looked through after it
            try:
                module.main(tyro.cli(module.Args, args=options))
            except SystemExit as end:  # the interpreter writes a text to stderr and returns 1
                is_text = isinstance(end.code, str)
                status, message = (1, end.code) if is_text else (end.code or 0, "")
            finally:
                self.handlers.clear()
                gc.collect()  # of the run, whose lock goes with it
                gc.unfreeze()
        return subprocess.CompletedProcess(
            options, status, out.getvalue(), err.getvalue() + message
        )

    def interrupt(self, *_) -> None:
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)


@pytest.fixture
def in_process(tmp_path, cache_dir, catch_dataset, asterix_store) -> InProcess:
    datasets = {"atari": asterix_store, "bsuite": catch_dataset}
    return InProcess(tmp_path, cache_dir, datasets, draws=False)


@pytest.fixture(scope="module")
def in_process_of_module(tmp_path_factory, cache_dir, catch_dataset, asterix_store) -> InProcess:
    """For runs that several tests of a module look at or copy; with their curves."""
    datasets = {"atari": asterix_store, "bsuite": catch_dataset}
    return InProcess(tmp_path_factory.mktemp("runs"), cache_dir, datasets, draws=True)


@pytest.fixture(scope="module")
def whole(in_process_of_module):
    """The folder of a finished run of a script: whole("bc_atari")."""

    def folder(name: str, *arguments):
        place = "-".join(map(str, (name, *arguments)))
        if not (in_process_of_module.base / place).exists():
            result = in_process_of_module(name, *arguments, folder=place)
            assert result.returncode == 0, result.stderr
        return in_process_of_module.base / place / "run"

    return folder


KILLED = """
import os, signal, sys, tyro
sys.path.insert(0, {root!r})
import {name} as module

log, last = module.Run.log, {last}

def log_and_die(run, done, seed, values):
    log(run, done, seed, values)
    if done >= last:
        with open(run.dir / "metrics.jsonl", "a") as file:
            file.write('{{"update": 1')  # a line that is cut short
        os.kill(os.getpid(), signal.SIGKILL)

module.Run.log = log_and_die
module.main(tyro.cli(module.Args))
"""


class Killed(BaseException):
    pass


@pytest.fixture
def killed(in_process, cache_dir, tmp_path, catch_dataset, asterix_store):
    """Runs a script until it kills itself when it has logged update `last`: killed(name, last).

    Its folder is tmp_path/{folder}/run, as in `in_process`. Only one script of each domain is
    killed as a process; the others, which have the same run folder, are left in this one.
    """

    def leave(name: str, last: int, *arguments, folder: str = "killed") -> Path:
        module = importlib.import_module(name)
        log = module.Run.log

        def log_and_leave(run, done, seed, values):
            log(run, done, seed, values)
            if done >= last:
                with (run.dir / "metrics.jsonl").open("a") as file:
                    file.write('{"update": 1')  # a line that is cut short
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.Run, "log", log_and_leave)
            try:
                in_process(name, *arguments, folder=folder)
            except Killed:
                pass  # without a name, which would keep the lock of the run
            else:
                pytest.fail(f"{name} has not logged update {last}")
        gc.collect()
        return tmp_path / folder / "run"

    def run(name: str, last: int, *arguments, folder: str = "killed") -> Path:
        if name not in ("bc_atari", "bc_bsuite"):
            return leave(name, last, *arguments, folder=folder)
        (tmp_path / folder).mkdir()
        dataset = catch_dataset if name.endswith("_bsuite") else asterix_store
        options = [*helpers.tiny(name), "--dataset", dataset, "--run-dir", "run", *arguments]
        code = KILLED.format(root=str(ROOT), name=name, last=last)
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, options)],
            cwd=tmp_path / folder,
            env=os.environ | {"XDG_CACHE_HOME": str(cache_dir)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr
        return tmp_path / folder / "run"

    return run
