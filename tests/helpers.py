"""What several test files need: names, small runs, random inputs and small datasets."""

import dataclasses
import importlib
import json
import math
import os
import re
import time
import zlib
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sync_blocks import blocks

ROOT = Path(__file__).resolve().parent.parent
ATARI = sorted(path.stem for path in ROOT.glob("*_atari.py"))
BSUITE = sorted(path.stem for path in ROOT.glob("*_bsuite.py"))
SCRIPTS = ATARI + BSUITE
BASELINES = ("bc", "crr", "cql")
LOSSES = {"rosmo": "rosmo_loss", "muzero_unplugged": "muzero_loss"}
LOSSES |= {name: f"{name}_loss" for name in BASELINES}

PATIENCE = 240  # seconds for what a busy machine does late; a hang ends after ten minutes

# Runs
# ----
# The episodes of Asterix are the shortest of all games.
TINY_ATARI = "--env-id Asterix --channels 4 --batch-size 4 --log-every 2 --eval-every 4 "
TINY_ATARI += "--checkpoint-every 5 --total-updates 8 --eval-episodes 1 --final-eval-episodes 1"
TINY_ATARI += " --eval-max-frames 40"
TINY_BSUITE = "--env-id catch --num-seeds 2 --batch-size 16 --log-every 10 --eval-every 20 "
TINY_BSUITE += "--checkpoint-every 65 --total-updates 120 --eval-episodes 3 "
TINY_BSUITE += "--final-eval-episodes 3"
SHORT = ["--unroll-steps", 1, "--td-steps", 1]
WORLD_MODEL = "--members 2 --deter 16 --hidden 16 --latents 4 --classes 4 --depth 2 --head-units 16"
WORLD_MODEL += " --model-length 6 --model-batch-size 2 --model-updates 2 --model-eval-every 2"
WORLD_MODEL += " --model-eval-batches 8 --heldout-percent 30"
IMAGINED = "--rollout-length 4 --minibatches 2 --epochs 1 --horizon 3 --starts 2 --halt-batches 1"
IMAGINED += " --bc-updates 2 --bc-batch-size 4"
ROLLOUTS = "--rollout-every 3 --rollout-starts 4 --rollout-length 3 --rollout-generations 2"
LESS = {
    "rosmo_bsuite": SHORT,
    "muzero_unplugged_bsuite": [*SHORT, "--num-simulations", 2],
    "rosmo_atari": SHORT,
    "muzero_unplugged_atari": [*SHORT, "--num-simulations", 2],
    "morel_atari": [*WORLD_MODEL.split(), *IMAGINED.split()],
    "combo_atari": [*WORLD_MODEL.split(), *ROLLOUTS.split()],
}


def tiny(name: str) -> list:
    """Arguments with which a run of the script takes seconds; they lack --dataset."""
    if name.endswith("_bsuite"):
        return [*TINY_BSUITE.split(), *LESS.get(name, [])]
    bins = [] if name in ("bc_atari", "morel_atari") else ["--num-bins", 21]
    return [*TINY_ATARI.split(), *bins, *LESS.get(name, [])]


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run without the times that it took."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = lambda key: key == "wall_time" or key.startswith("seconds/")  # noqa: E731
    return [{k: v for k, v in row.items() if not timed(k)} for row in rows]


def damage(path: Path, how: str) -> None:
    """Spoils a file: missing, empty, truncated or changed by a bit."""
    data = path.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b""
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": data[:middle], "changed": changed}[how])


def documented_metrics(name: str) -> set[str]:
    """The metrics in the tables of docs/metrics.md and of the page of the script's method."""
    method, domain = name.rsplit("_", 1)
    found = set()
    for page in ("metrics", method):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for cell, meaning in re.findall(r"^\| (`.*?`) \| (.*)", text, re.MULTILINE):
            if domain == "atari" or not meaning.startswith("Atari:"):
                found |= set(re.findall(r"`(\w+/\w+)`", cell))
    return found


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoints/*.msgpack"), key=lambda path: int(path.stem))


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    """Metrics of the same run, but for the order in which numbers are added up."""
    import pytest

    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("losses/", "charts/")):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key


def save_world_model(folder: Path, args, members, data: dict) -> None:
    """A folder as the training of a world model leaves it; members: leaves [members, ...]."""
    import jax
    from flax import serialization

    folder.mkdir(exist_ok=True)
    parts = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), members) for i in range(args.members)]
    content = serialization.to_bytes(parts)
    crc32 = zlib.crc32(content).to_bytes(4, "little")
    (folder / "members.msgpack").write_bytes(crc32 + content)
    config = {"args": vars(args), "data": data}
    (folder / "config.json").write_text(json.dumps(config, default=str))


UPDATES = 2000
BSUITE_DATA = {"episodes": 2000, "transitions": 18000, "mean_return": 0.7182, "crc32": 1234}
ATARI_DATA = {
    "source": "dqn", "episodes": 99, "steps": 60984, "mean_return": 512.5,
    "crc32": 1234,
}  # fmt: skip


def write_run(
    folder, script, returns, finished=True, commits=("0123456789abcdef",), data=None, **arguments
):
    """A run of two evaluations whose seeds ended with these returns."""
    counts = {"total_updates": UPDATES, "log_every": 1000}
    if script.endswith("bsuite"):
        counts["num_seeds"] = len(returns)
    args = importlib.import_module(script).Args(**(counts | arguments))
    data = data or (BSUITE_DATA if script.endswith("bsuite") else ATARI_DATA)
    config = {"args": dataclasses.asdict(args), "script": f"{script}.py", "data": data}
    config["starts"] = [{"commit": commit, "device": "1 x cpu"} for commit in commits]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    lines = []
    for seed, value in enumerate(returns, args.seed):
        for update in (1000, 2000):
            line = {"update": update, "seed": seed, "wall_time": 3.6 * update}
            line["seconds/update"] = 1.8 * update
            lines.append(line | {"eval/return_mean": value - 1})
        final = {"final/returns": [value], "final/return_mean": value}
        lines.append({"update": args.total_updates, "seed": seed, **final})
    text = "".join(json.dumps(line) + "\n" for line in (lines if finished else lines[:-1]))
    (folder / "metrics.jsonl").write_text(text)


def contents(path: Path) -> dict[str, bytes]:
    """Of the files of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def read_store(path: Path) -> list[dict]:
    """A store's episodes, read frame by frame: a reading of the format of its own."""
    import zstandard

    meta = json.loads((path / "meta.json").read_text())
    assert meta["version"] == 2
    for name, crc32 in meta["crc32"].items():
        assert zlib.crc32((path / name).read_bytes()) == crc32
    blob = (path / "frames.bin").read_bytes()
    arrays = ("frames_offsets.npy", "steps.npy", "episodes.npy")
    offsets, steps, episodes = (np.load(path / name) for name in arrays)
    assert offsets[0] == 0
    assert offsets[-1] == len(blob)
    assert len(steps) == 16 * (len(offsets) - 1)
    frames = []
    for chunk in range(len(offsets) - 1):
        data = blob[offsets[chunk] : offsets[chunk + 1]]
        data, crc32 = data[:-4], int.from_bytes(data[-4:], "little")
        assert zlib.crc32(data) == crc32
        data = zstandard.ZstdDecompressor().decompress(data)
        assert len(data) == 16 * 84 * 84
        frames += list(np.frombuffer(data, np.uint8).reshape(16, 84, 84))
    inside, checkpoint, result = np.zeros(len(steps), bool), None, []
    for e in episodes:
        rows = np.arange(e["start"], e["start"] + e["length"])
        if e["checkpoint"] != checkpoint:
            assert e["start"] % 16 == 0
        else:
            assert inside[e["start"] - 1]
        checkpoint = e["checkpoint"]
        inside[rows] = True
        own = steps[rows]
        assert own["age"].tolist() == np.minimum(np.arange(len(rows)), 65535).tolist()
        assert np.flatnonzero(own["is_last"]).tolist() == [len(rows) - 1]
        assert not own["is_terminal"][:-1].any()
        assert (own["action"][-1], own["reward"][-1]) == (0, 0)
        assert math.isclose(e["return"], own["reward"].sum(), rel_tol=1e-6)
        result.append(
            {
                "frames": np.stack([frames[i] for i in rows]),
                "action": own["action"],
                "reward": own["reward"],
                "is_terminal": bool(own["is_terminal"][-1]),
                "checkpoint": int(e["checkpoint"]),
                "id": int(e["id"]),
            }
        )
    assert not steps[~inside].view(np.uint8).any()
    assert not np.array(frames)[~inside].any()
    assert meta["num_steps"] == inside.sum()
    assert meta["num_episodes"] == len(episodes)
    return result


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # it has just gone, or this system has no /proc
        return Path("/proc").exists()


def wait_until_gone(pids) -> None:
    deadline = time.time() + PATIENCE
    while not all(map(is_gone, pids)):
        assert time.time() < deadline
        time.sleep(0.05)


# Inputs
# ------


def with_noise(params, seed: int, scale: float = 0.1):
    """Parameters with heads that are not zero, so that every gradient can flow."""
    import jax

    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = (scale * rng.normal(size=x.shape).astype(np.float32) for x in leaves)
    return tree.unflatten([np.asarray(x) + y for x, y in zip(leaves, noise, strict=True)])


def random_steps(batch_size: int, length: int, seed: int = 0, num_actions: int = 3):
    """BSuite's windows on catch with all kinds of ends in all kinds of places."""
    import rosmo_bsuite

    rng = np.random.default_rng(seed)
    shape = (batch_size, length)
    is_last = rng.random(shape) < 0.25
    return rosmo_bsuite.Steps(
        rng.normal(size=(*shape, 10, 5)).astype(np.float32),
        rng.integers(0, num_actions, shape).astype(np.int32),
        rng.normal(size=shape).astype(np.float32) * ~is_last,
        is_last,
        is_last & (rng.random(shape) < 0.6),
    )


def random_batch(batch_size: int, length: int, seed: int = 0, num_actions: int = 4):
    """The same on Atari."""
    import rosmo_atari

    rng = np.random.default_rng(seed)
    shape = (batch_size, length)
    is_last = rng.random(shape) < 0.2
    return rosmo_atari.Batch(
        frames=rng.integers(0, 256, (batch_size, 3 + length, 84, 84), dtype=np.uint8),
        history=rng.integers(0, 4, shape).astype(np.uint8),
        action=rng.integers(0, num_actions, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32),
        is_last=is_last,
        is_terminal=is_last & (rng.random(shape) < 0.6),
    )


def layer_norm(x, axes, scale=1.0, bias=0.0, epsilon=1e-5):
    """Layer normalisation over `axes` in plain numbers."""
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def two_hot_cross_entropy(value: float, logits) -> float:
    """-Σ φ(h(value)) log softmax(logits), in plain numbers."""
    from scipy.special import log_softmax

    y = math.copysign(math.sqrt(abs(value) + 1) - 1, value) + 0.001 * value
    zero = (len(logits) - 1) // 2
    y, log_probs = min(max(y, -zero), zero), log_softmax(np.asarray(logits, float))
    low = min(math.floor(y), zero - 1)
    return -((low + 1 - y) * log_probs[low + zero] + (y - low) * log_probs[low + 1 + zero])


# Datasets
# --------


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
    header = json.dumps({"schema": 1, "env_id": "catch"})
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, header=np.array(header), **arrays)
    return path


def write_store(path: Path, env_id: str, episodes: list[dict], num_actions: int, **meta) -> Path:
    """A store of format 2; the episodes are those of benchmark/prepare_atari.py's write_store."""
    import prepare_atari

    meta = {"source": "dqn", "percent": 100.0, "steps_per_checkpoint": 100} | meta
    meta |= {"env_id": env_id, "num_actions": num_actions}
    meta |= {"rom_sha256": prepare_atari.rom_digest(env_id)}
    prepare_atari.write_store(path, meta, episodes)
    return path


def open_store(path: Path, env_id: str, percent: float = 100.0):
    import rosmo_atari

    return rosmo_atari.open_store(
        rosmo_atari.Args(env_id=env_id, dataset=path, data_percent=percent)
    )


def random_episode(rng: np.random.Generator, length: int, num_actions: int, **more) -> dict:
    """An episode of random frames for write_store."""
    reward = rng.normal(size=length).astype(np.float32)
    reward[-1] = 0
    frames = rng.integers(0, 256, (length, 84, 84), dtype=np.uint8)
    action = rng.integers(0, num_actions, length)
    return {"frames": frames, "action": action, "reward": reward} | more


# Scripts
# -------


def script_and_args(name: str, **settings):
    """A script's module and its arguments, with those of the settings that it has."""
    module = importlib.import_module(name)
    fields = module.Args.__dataclass_fields__
    return module, module.Args(**{k: v for k, v in settings.items() if k in fields})


@lru_cache
def compiled_init(network):
    """The same function for equal networks, which else would be compiled at every call."""
    import jax

    return jax.jit(network.init)


def make_params(module, network, seed: int, scale: float = 0.1):
    """Random parameters of a script's network without a head of zeros."""
    import jax
    import jax.numpy as jnp

    atari = module.__name__.endswith("_atari")
    inputs = [jnp.zeros((84, 84, 4), jnp.uint8) if atari else jnp.zeros((10, 5))]
    inputs += [jnp.int32(0)] if module.__name__.startswith(("rosmo", "muzero")) else []
    params = compiled_init(network)(jax.random.key(seed), *inputs)
    return with_noise(params, seed, scale)


def without_blocks(patch, *names: str) -> None:
    """Takes the residual blocks from scripts, as their compilation is most of the work of a test.

    Each is x -> x. They are the same to the byte in all scripts; bc_atari.py runs with them.
    """
    for name in names:
        patch.setattr(importlib.import_module(name), "ResidualBlock", lambda *_: lambda x: x)


def with_small_representation(patch, *names: str) -> None:
    """Takes the representation from scripts, of one convolution in place of its ten blocks."""
    import flax.linen as nn

    class Representation(nn.Module):
        channels: int
        dtype: Any

        @nn.compact
        def __call__(self, observation):
            x = observation.astype(self.dtype) / 255
            return nn.Conv(self.channels, (14, 14), 14, dtype=self.dtype)(x)  # 6 x 6

    for name in names:
        patch.setattr(importlib.import_module(name), "Representation", Representation)


def copy_without_blocks(name: str, folder: Path) -> Path:
    """The same for a script that is started as a process."""
    path = folder / f"{name}.py"
    if not path.exists():  # else a process may be reading it
        text = (ROOT / path.name).read_text()
        torso = blocks(text)["torso"]
        path.write_text(text.replace(torso, f"{torso}ResidualBlock = lambda *_: lambda x: x\n"))
    return path


def noting(make_env, seen: list):
    """make_env whose environments note the observations that they give."""

    def make(*inputs, **options):
        env = make_env(*inputs, **options)
        note = lambda result: seen.append(result[0].copy()) or result  # noqa: E731
        return SimpleNamespace(
            reset=lambda **seeds: note(env.reset(**seeds)),
            step=lambda actions: note(env.step(actions)),
            single_action_space=env.single_action_space,
        )

    return make


def train_seeds(module, steps, args, network, seeds: list[int], num_updates: int):
    """A BSuite script's states [seeds] and the sums of its metrics after some updates."""
    import jax
    import jax.numpy as jnp

    mesh = jax.make_mesh((1,), ("data",), axis_types=(module.AxisType.Auto,))
    by_device = module.NamedSharding(mesh, module.P("data"))
    init = jax.jit(module.init_state, static_argnums=(1, 3))
    states = [init(jax.random.key(s), network, steps.observation[0], args) for s in seeds]
    states = jax.tree.map(lambda *x: np.stack(x), *states)  # jnp compiles it for each shape
    keys = jnp.stack([jax.random.key(s) for s in seeds])
    data = keys, steps, *module.window_starts(steps.is_last, args.data_percent, seeds)
    options = {"network": network, "args": args, "by_device": by_device}
    _, sums = jax.eval_shape(partial(module.update_seeds, **options), states, *data)
    sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), sums)
    return jax.device_get(module.train(num_updates, states, sums, data, **options))
