"""Paths and small datasets for the tests. Nothing here needs a network, a GPU or an account."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmark"))

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def write_catch_dataset(path: Path, num_episodes: int, seed: int = 0) -> Path:
    """Random play on catch in the format of benchmark/collect_bsuite.py."""
    from bsuite.environments.catch import Catch

    environment, rng = Catch(seed=seed), np.random.default_rng(seed)
    steps = {name: [] for name in ("observation", "action", "reward", "is_last")}
    for _ in range(num_episodes):
        timestep = environment.reset()
        while True:
            last = timestep.last()
            action = 0 if last else int(rng.integers(3))
            steps["observation"].append(timestep.observation)
            steps["action"].append(action)
            steps["is_last"].append(last)
            timestep = None if last else environment.step(action)
            steps["reward"].append(0.0 if last else timestep.reward)
            if last:
                break
    arrays = {name: np.asarray(x) for name, x in steps.items()}
    arrays["observation"] = arrays["observation"].astype(np.float32)
    arrays["action"] = arrays["action"].astype(np.int32)
    arrays["reward"] = arrays["reward"].astype(np.float32)
    arrays["is_first"] = np.roll(arrays["is_last"], 1)
    arrays["is_terminal"] = arrays["is_last"]
    header = json.dumps({"schema": 1, "env_id": "catch", "noise": 0.0})
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, header=np.array(header), **arrays)
    return path


def pytest_collection_modifyitems(items):
    """The longest tests begin, so that no worker waits for another at the end."""
    items.sort(key=lambda item: "test_runs" not in item.path.name)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Or they would hold gigabytes by the end."""
    yield
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
    return write_catch_dataset(tmp_path_factory.mktemp("data") / "catch.npz", num_episodes=100)


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory):
    """Every pixel of a frame is 40 (a + 1), a the last action, 0 at first; r_t = a_t / 4."""
    import morel_atari as morel

    path, rng = tmp_path_factory.mktemp("store") / "Pong-dqn-toy", np.random.default_rng(0)
    meta = {"env_id": "Pong", "source": "dqn", "percent": 100.0, "num_actions": 6}
    meta |= {"steps_per_checkpoint": 100, "rom_sha256": morel.rom_digest("Pong")}
    with morel.write_store(path, meta) as writer:
        for i in range(8):
            action = rng.integers(0, 6, 25 + i)
            shade = np.concatenate([[0], 40 * (action[:-1] + 1)]).astype(np.uint8)
            frames = np.broadcast_to(shade[:, None, None], (len(action), 84, 84))
            writer.add(frames, action, action / 4, i % 2 == 0, 0, i, float(action.sum() / 4))
    return morel.open_store(path, "Pong")


@pytest.fixture(scope="session")
def asterix_store(tmp_path_factory) -> Path:
    """Five short episodes of random frames in the native format."""
    import rosmo_atari

    path, rng = tmp_path_factory.mktemp("store") / "Asterix-dqn-test", np.random.default_rng(0)
    meta = {"env_id": "Asterix", "source": "dqn", "percent": 100.0, "num_actions": 9}
    meta |= {"steps_per_checkpoint": 100, "rom_sha256": rosmo_atari.rom_digest("Asterix")}
    with rosmo_atari.write_store(path, meta) as writer:
        for i in range(5):
            frames = rng.integers(0, 256, (30 + i, 84, 84), dtype=np.uint8)
            action = rng.integers(0, 9, len(frames))
            reward = rng.normal(size=len(frames)).astype(np.float32)
            writer.add(frames, action, reward, i % 2 == 0, i // 2, i, float(reward.sum()))
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One folder of compiled programs for all workers, so that each program is compiled once."""
    return tmp_path_factory.getbasetemp().parent / "compilation-cache"


@pytest.fixture
def script(cache_dir, tmp_path):
    """Starts a script of the suite as a user would: script("rosmo_bsuite.py", "--seed", 1)."""

    def start(name: str, *arguments, wait: bool = True, **environment):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": str(cache_dir)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return start
