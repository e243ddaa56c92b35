# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "ale-py==0.12.1", "flax==0.12.8", "gymnasium==1.4.0", "importlib-resources==7.1.0",
#   "jax==0.10.2", "matplotlib==3.11.2", "numpy==2.4.6", "opencv-python-headless==5.0.0.93",
#   "optax==0.2.8", "orbax-checkpoint==0.12.8", "tensorflow==2.21.0",
#   "tensorflow-datasets==4.9.10", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0",
#   "zstandard==0.25.0",
# ]
# ///
"""Behavior cloning on Atari, a baseline of ROSMO (Liu et al., 2023).

Behavior cloning fits a policy to the logged actions by maximum likelihood: no rewards, no model, no
improvement on the data. It is the floor of the comparison (Section 4.2), with ROSMO's network up to
the policy (Fig. 5b).

    python bc_atari.py --env-id MsPacman                   # the paper's setting
    python bc_atari.py --env-id MsPacman --data-percent 1  # 1% of the data

Where the paper is silent this file does the following.
1. Batches are single steps drawn with replacement; a last step has no action and counts as zero.
2. The optimiser is ROSMO's: AdamW, a warm-up of 1,000 updates, a tenth of the learning rate every
   100,000 updates, weight decay on weight matrices only.
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when jax is imported

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
import zstandard
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # run
    env_id: str = "MsPacman"
    """game, by RL Unplugged's name"""
    seed: int = 0
    """seed of the parameters, the batches and the evaluation"""
    total_updates: int = 200_000
    """number of updates"""
    log_every: int = 200
    """updates over which the logged losses are averaged"""
    checkpoint_every: int = 10_000
    """updates between two checkpoints"""
    run_dir: Path | None = None
    """folder of this run [default: runs/{script}/{env-id}[-variant]/seed{n}]"""
    overwrite: bool = False
    """start again in a folder that holds a run, and delete that run"""
    compilation_cache: bool = True
    """keep compiled programs in the user's cache folder"""
    capture_video: bool = False
    """record one episode of the trained agent as video.mp4, also when the run is finished"""
    track: bool = False
    """mirror the metrics to Weights & Biases"""
    wandb_project_name: str = "rosmo-suite"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """user or team in Weights & Biases"""

    # data
    run: int = 1
    """run of RL Unplugged, 1 to 5"""
    data_percent: float = 100.0
    """learn from this part of each checkpoint of the data, from its start"""
    data_dir: Path = Path("data")
    """folder of the datasets; the game's store is built in {data_dir}/atari when it is missing"""
    dataset: Path | None = None
    """open this store instead, for example one that benchmark/collect_atari.py wrote"""
    tfds_dir: Path | None = None
    """TFDS folder with RL Unplugged prepared [default: TFDS's own, if it has the game]"""
    rlu_prefix: str = "gs://rl_unplugged"
    """bucket, or local folder, that holds RL Unplugged's raw shards"""
    loader_threads: int = 4
    """threads that decode batches"""

    # model (Table 3, D.2.1)
    channels: int = 64
    """channels of the residual blocks; the rest of the network scales with it"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the network (auto: bfloat16 on accelerators); the rest is always float32"""

    # optimisation (Table 3)
    batch_size: int = 512
    """transitions in a batch, over all devices"""
    learning_rate: float = 7e-4
    """AdamW's learning rate after warm-up"""
    learning_rate_decay: float = 0.1
    """factor on the learning rate every 100,000 updates"""
    weight_decay: float = 1e-4
    """AdamW's weight decay, on weight matrices only"""
    max_grad_norm: float = 5.0
    """largest global norm of the gradient"""

    # evaluation
    eval_every: int = 1_000
    """updates between two evaluations, a multiple of --log-every"""
    eval_episodes: int = 2
    """episodes of each evaluation during training"""
    final_eval_episodes: int = 100
    """episodes of the final evaluation"""
    eval_greedy: bool = False
    """take the most probable action in evaluations during training"""


# --- environment (identical in *_atari.py and benchmark/*_atari.py) ---
def game_name(env_id: str) -> str:
    """ALE's name of the game that RL Unplugged calls `env_id`: MsPacman -> ms_pacman."""
    names = {rom.title().replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    if env_id not in names:
        near = difflib.get_close_matches(env_id, names, cutoff=0)
        raise SystemExit(f"There is no game {env_id!r}; the nearest names: {', '.join(near)}.")
    return names[env_id]


def rom_digest(env_id: str) -> str:
    """SHA-256 of the ROM that is played here; part of every result, since ROMs differ."""
    return hashlib.sha256(Path(roms.get_rom_path(game_name(env_id))).read_bytes()).hexdigest()


def make_env(env_id: str, num_envs: int, **kwargs: Any) -> AtariVectorEnv:
    """Dopamine's environment: sticky actions, minimal action set, no tricks at the reset."""
    settings = dict(
        repeat_action_probability=0.25,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
        episodic_life=False,
        full_action_space=False,
        max_num_frames_per_episode=108_000,
    )
    return AtariVectorEnv(game_name(env_id), num_envs, **(settings | kwargs))


# --- end environment ---


# --- evaluate (identical in *_atari.py) ---
# Random and online DQN score of the paper's games, from RL Unplugged.
REFERENCE_SCORES = {
    "Amidar": (3.19, 1556.96),
    "Asterix": (279.06, 4131.77),
    "Breakout": (1.33, 157.86),
    "Frostbite": (71.99, 1643.65),
    "Gravitar": (213.71, 310.56),
    "Jamesbond": (27.63, 777.73),
    "MsPacman": (247.97, 4171.53),
    "Phoenix": (873.03, 5122.3),
    "Pong": (-20.3, 18.25),
    "Qbert": (155.01, 12275.13),
    "Riverraid": (1504.25, 12798.88),
    "Seaquest": (81.78, 3233.47),
}


def normalized_score(env_id: str, score: float) -> float | None:
    """(score - random) / (online DQN - random), or None where these are not known."""
    random, online = REFERENCE_SCORES.get(env_id, (None, None))
    return None if random is None else (score - random) / (online - random)


def evaluate(
    act: Callable, env_id: str, num_episodes: int, seed: int, **kwargs: Any
) -> list[float]:
    """Raw returns of `num_episodes` episodes, played side by side, each in its own environment.

    `act` takes observations uint8 [E, 84, 84, 4] (newest frame last, zeros before the first) and
    a key, and returns actions [E]; `kwargs` change `make_env`'s settings.
    """
    env = make_env(env_id, num_episodes, **kwargs)
    key = jax.random.key(seed)
    seeds = np.random.default_rng(seed).integers(2**31, size=num_episodes, dtype=np.int32)
    observations, _ = env.reset(seed=seeds)
    returns, running = np.zeros(num_episodes), np.ones(num_episodes, bool)
    while running.any():
        act_key, key = jax.random.split(key)
        actions = act(np.ascontiguousarray(observations.transpose(0, 2, 3, 1)), act_key)
        observations, rewards, terminated, truncated, _ = env.step(np.asarray(actions, np.int32))
        returns += running * rewards
        running &= ~(terminated | truncated)
    return returns.tolist()


def capture_video(act: Callable, env_id: str, seed: int, path: str | Path, **kwargs: Any) -> float:
    """Plays one episode, writes what the screen shows to `path` (mp4), and returns its return."""
    # The screen comes from a twin in colour: same seed and actions, so it plays the same episode.
    env = make_env(env_id, 1, **kwargs)
    twin = make_env(env_id, 1, grayscale=False, img_height=210, img_width=160, **kwargs)
    key = jax.random.key(seed)
    (observations, _), (screen, _) = env.reset(seed=seed), twin.reset(seed=seed)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"vp09"), 15, (320, 420))
    total, running = 0.0, True
    while running:
        picture = cv2.resize(screen[0, -1], (320, 420), interpolation=cv2.INTER_NEAREST)
        video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        act_key, key = jax.random.split(key)
        actions = act(np.ascontiguousarray(observations.transpose(0, 2, 3, 1)), act_key)
        actions = np.asarray(actions, np.int32)
        observations, rewards, terminated, truncated, _ = env.step(actions)
        screen, *_ = twin.step(actions)
        total, running = total + float(rewards[0]), not (terminated[0] or truncated[0])
    video.release()
    return total


# --- end evaluate ---


# --- store writer (identical in *_atari.py and benchmark/*_atari.py) ---
STORE_VERSION = 1
CHUNK = 16  # consecutive frames that are compressed together
STEP = np.dtype(
    [("action", "u1"), ("reward", "f4"), ("is_first", "?"), ("is_last", "?"), ("is_terminal", "?")]
)
EPISODE = np.dtype([("checkpoint", "i8"), ("id", "i8"), ("length", "i8"), ("return", "f4")])


class StoreWriter:
    """Writes episodes, in order of their checkpoints, into an empty folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.blob = open(folder / "frames.bin", "wb")
        self.blob_crc32, self.offsets = 0, [0]
        self.steps, self.episodes = [], []
        self.rest = np.empty((0, 84, 84), np.uint8)  # frames that do not fill a chunk yet

    def add(self, frames, action, reward, is_terminal, checkpoint, id, episode_return) -> None:
        """One episode: frames uint8 [T, 84, 84], action and (unclipped) reward [T], scalars.

        `is_terminal`: the last frame is a terminal state, else the episode was cut off there.
        """
        steps = np.zeros(len(frames), STEP)
        steps["action"], steps["reward"] = action, reward
        steps["is_first"][0], steps["is_last"][-1], steps["is_terminal"][-1] = 1, 1, is_terminal
        self.steps.append(steps)
        self.episodes.append((checkpoint, id, len(frames), episode_return))
        frames = np.concatenate([self.rest, frames])
        whole = len(frames) // CHUNK * CHUNK
        self._write([frames[i : i + CHUNK] for i in range(0, whole, CHUNK)])
        self.rest = frames[whole:]

    def _write(self, chunks: list[np.ndarray]) -> None:
        compressor = zstandard.ZstdCompressor(level=3)
        for chunk in chunks:
            data = compressor.compress(chunk.tobytes())
            self.blob.write(data)
            self.blob_crc32 = zlib.crc32(data, self.blob_crc32)
            self.offsets.append(self.offsets[-1] + len(data))

    def finish(self, meta: dict) -> None:
        self._write([self.rest] if len(self.rest) else [])
        self.blob.close()
        crc32 = {"frames.bin": self.blob_crc32}
        episodes = np.array(self.episodes, EPISODE)
        for name, array in (
            ("frames_offsets.npy", np.array(self.offsets)),
            ("steps.npy", np.concatenate([np.empty(0, STEP), *self.steps])),
            ("episodes.npy", episodes),
        ):
            np.save(self.folder / name, array)
            crc32[name] = zlib.crc32((self.folder / name).read_bytes())
        counts = {"num_steps": int(episodes["length"].sum()), "num_episodes": len(episodes)}
        meta = {"version": STORE_VERSION} | meta | counts | {"crc32": crc32}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))


@contextlib.contextmanager
def write_store(path: Path, meta: dict) -> Iterator[StoreWriter]:
    """Builds a store beside `path`, renamed when the block ends; after an error nothing stays."""
    lock_path, folder = (path.with_name(f".{path.name}.{end}") for end in ("lock", "building"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(lock_path, "w")
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}); choose another folder."
        raise SystemExit(message) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock.fileno()).st_nlink > 0  # else its last holder has just removed it
        except BlockingIOError:
            held = False
        if not held:
            raise SystemExit(f"Another process is building {path}: run again when it is done.")
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed: we hold the lock
        try:
            folder.mkdir()
            writer = StoreWriter(folder)
            yield writer
            writer.finish(meta)
            if not path.exists():  # else another build came first
                folder.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SystemExit(
                f"The disk is full: {path} was not built; free some space or choose another folder."
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


# --- end store writer ---


# --- data (identical in *_atari.py) ---
STEPS_PER_CHECKPOINT = 1_000_000  # RL Unplugged's
LOCAL_STEPS = 200_000  # collected here when RL Unplugged cannot be reached


class Store(NamedTuple):
    """A dataset of episodes on disk, or the first part of each of its checkpoints."""

    path: Path
    meta: dict
    blob: memoryview  # zstd chunks of CHUNK frames each
    offsets: np.ndarray  # of the chunks in the blob
    steps: np.ndarray  # STEP, in the order of the frames
    episodes: np.ndarray  # EPISODE, those selected
    ends: np.ndarray  # position after each selected episode, counted in selected steps
    shifts: np.ndarray  # index in `steps` minus position, per selected episode
    num_steps: int  # selected


class Batch(NamedTuple):
    """Windows of T consecutive states, each with the three frames before its first state."""

    frames: np.ndarray  # uint8 [B, 3 + T, 84, 84]
    history: np.ndarray  # uint8 [B, T], earlier frames of the state's own episode, 3 at most
    action: np.ndarray  # int32 [B, T]
    reward: np.ndarray  # float32 [B, T], unclipped; follows the action
    is_first: np.ndarray  # bool [B, T]
    is_last: np.ndarray  # bool [B, T]; the action and the reward of a last step mean nothing
    is_terminal: np.ndarray  # bool [B, T]; a last step that is not terminal was cut off


def first_percent(episodes: np.ndarray, percent: float, steps_per_checkpoint: int) -> np.ndarray:
    """Which episodes (EPISODE [N]) are in the first `percent` of the steps of their checkpoint."""
    before = np.cumsum(episodes["length"]) - episodes["length"]
    _, first = np.unique(episodes["checkpoint"], return_index=True)
    before -= before[first][np.searchsorted(first, np.arange(len(episodes)), side="right") - 1]
    return (before < percent / 100 * steps_per_checkpoint) | (percent >= 100)


def open_store(path: Path, env_id: str, percent: float = 100) -> Store:
    """Opens a store for reading, or says in one sentence why it cannot be used."""
    if not path.is_dir():
        raise SystemExit(f"There is no store {path}.")
    try:
        meta = json.loads((path / "meta.json").read_text())
        if (
            meta["version"] != STORE_VERSION
            or meta["env_id"] != env_id
            or meta["percent"] < percent
        ):
            raise SystemExit(
                f"{path} is {meta['percent']:g}% of {meta['env_id']} in format {meta['version']}, "
                f"not {percent:g}% of {env_id} in format {STORE_VERSION}: use another store."
            )
        for name, crc32 in meta["crc32"].items():
            if zlib.crc32(np.memmap(path / name, np.uint8, "r")) != crc32:
                raise ValueError(f"{name} is damaged")
        offsets, steps, episodes = (
            np.load(path / name) for name in ("frames_offsets.npy", "steps.npy", "episodes.npy")
        )
        blob = memoryview(np.memmap(path / "frames.bin", np.uint8, "r"))
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path} is no whole store ({error}): delete it and run again.") from None
    selected = first_percent(episodes, percent, meta["steps_per_checkpoint"])
    starts = (np.cumsum(episodes["length"]) - episodes["length"])[selected]
    ends = np.cumsum(episodes["length"][selected])
    shifts = starts - ends + episodes["length"][selected]
    return Store(path, meta, blob, offsets, steps, episodes[selected], ends, shifts, int(ends[-1]))


def read_frames(store: Store, index: np.ndarray) -> np.ndarray:
    """Frames [N, 84, 84] of the steps `index` [N]; runs of consecutive steps are read together."""
    frames = np.empty((len(index), 84, 84), np.uint8)
    decompressor = zstandard.ZstdDecompressor()
    new_run = (np.diff(index) != 1) | (index[1:] % CHUNK == 0)
    bounds = np.concatenate([[0], np.flatnonzero(new_run) + 1, [len(index)]])
    chunk, skip = np.divmod(index[bounds[:-1]], CHUNK)
    for lo, hi, a, b, s in zip(
        *(bounds[:-1], bounds[1:], store.offsets[chunk], store.offsets[chunk + 1], skip),
        strict=True,
    ):
        data = np.frombuffer(decompressor.decompress(store.blob[a:b]), np.uint8)
        frames[lo:hi] = data.reshape(-1, 84, 84)[s : s + hi - lo]
    return frames


def sample_batch(
    store: Store, seed: int, step: int, batch_size: int, length: int, rows: slice = slice(None)
) -> Batch:
    """Batch number `step`: windows that start anywhere, or those `rows` of it.

    A window goes on into the next episode where its own ends, and from the last to the first.
    """
    start = np.random.default_rng((seed, step)).integers(store.num_steps, size=batch_size)[rows]
    position = (start[:, None] + np.arange(-3, length)) % store.num_steps  # [B, 3 + T]
    episode = np.searchsorted(store.ends, position, side="right")
    index = position + store.shifts[episode]
    age = position - store.ends[episode] + store.episodes["length"][episode]
    steps = store.steps[index[:, 3:]]
    return Batch(
        frames=read_frames(store, index.ravel()).reshape(*index.shape, 84, 84),
        history=np.minimum(age[:, 3:], 3).astype(np.uint8),
        action=steps["action"].astype(np.int32),
        **{name: np.ascontiguousarray(steps[name]) for name in STEP.names[1:]},
    )


def stack_frames(frames: jax.Array, history: jax.Array, time: int) -> jax.Array:
    """The states at window position `time`, [B, 84, 84, 4], newest frame last.

    Frames from before the start of the state's episode are zero, as in the environment.
    """
    own = jnp.arange(3, -1, -1) <= history[:, time, None]  # [B, 4]
    stack = jnp.where(own[:, :, None, None], frames[:, time : time + 4], 0)
    return jnp.moveaxis(stack, 1, -1)


def load_batches(
    load: Callable, first: int, num_threads: int, ahead: int | None = None
) -> Iterator:
    """Yields load(first), load(first + 1), ... in order, made by threads.

    ahead: how many are made before they are asked for [default: four, or one for each thread]
    """
    ahead, pool = ahead or max(4, num_threads), ThreadPoolExecutor(num_threads)
    try:
        pending = deque(pool.submit(load, step) for step in range(first, first + ahead))
        for step in itertools.count(first + ahead):
            batch = pending.popleft().result()
            pending.append(pool.submit(load, step))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def decode_pngs(pngs: np.ndarray) -> np.ndarray:
    frames = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) for png in pngs]
    if any(frame is None or frame.shape != (84, 84) for frame in frames):
        raise SystemExit("The data has a frame that is not an 84 x 84 grey PNG: it is damaged.")
    return np.stack(frames)


def import_rlu(
    path: Path, env_id: str, run: int, percent: float, rlu_prefix: str, prepared: Path | None
) -> None:
    """Builds a store from RL Unplugged: from a `prepared` TFDS folder, or else its raw shards."""
    os.environ.setdefault("NO_GCE_CHECK", "true")  # the bucket is public
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    num_actions = int(make_env(env_id, 1).single_action_space.n)
    meta = {"env_id": env_id, "source": f"run{run}", "percent": percent, "rom_sha256": None}
    meta |= {"num_actions": num_actions, "steps_per_checkpoint": STEPS_PER_CHECKPOINT}
    if prepared:
        builder = tfds.builder_from_directory(prepared)
        settings = dict(
            decoders={"steps": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(interleave_cycle_length=1),  # keeps the order
        )
        splits = {s: builder.as_dataset(split=s, **settings) for s in sorted(builder.info.splits)}
        shards = {name: tfds.as_numpy(dataset) for name, dataset in splits.items()}
    else:
        builder_cls = tfds.builder_cls("rlu_atari_checkpoints_ordered")
        if f"{env_id}_run_{run}" not in builder_cls.builder_configs:
            raise SystemExit(f"RL Unplugged has no run {run} of {env_id}: see --env-id and --run.")
        builder = builder_cls(config=f"{env_id}_run_{run}", data_dir=path.parent)
        builder._INPUT_FILE_PREFIX = f"{rlu_prefix}/atari_episodes_ordered"
        n = builder.num_shards()
        files = [f"{builder.get_file_prefix()}-{i:05d}-of-{n:05d}" for i in range(n)]
        shards = {f: (e for _, e in builder.generate_examples_one_file(f)) for f in files}
    limit = percent / 100 * STEPS_PER_CHECKPOINT
    bar = tqdm(total=int(limit * len(shards)), unit="step", desc=path.name)
    with write_store(path, meta) as writer, ThreadPoolExecutor() as pool, bar:
        for name, episodes in shards.items():
            num_steps = 0
            try:
                for episode in episodes:
                    steps = episode["steps"]
                    if steps["action"].max() >= num_actions:
                        raise SystemExit(f"{name} has actions that {env_id} has not: another game?")
                    pngs = np.array_split(steps["observation"], len(steps["action"]) // 64 + 1)
                    writer.add(
                        np.concatenate(list(pool.map(decode_pngs, pngs))),
                        *(steps["action"], steps["reward"], bool(steps["is_terminal"][-1])),
                        *(episode[k] for k in ("checkpoint_id", "episode_id", "episode_return")),
                    )
                    num_steps += len(steps["action"])
                    bar.update(len(steps["action"]))
                    if percent < 100 and num_steps >= limit:
                        break
            except tf.errors.OpError as error:
                if isinstance(error, tf.errors.NotFoundError | tf.errors.DataLossError):
                    missing = isinstance(error, tf.errors.NotFoundError)
                    raise SystemExit(
                        f"{name} is {'missing' if missing else 'damaged'}: copy it again."
                    ) from None
                raise SystemExit(f"{name} cannot be read: {error.message}") from None
            if not num_steps:
                raise SystemExit(f"{name} has no episodes: it is damaged or was not fully copied.")


def get_store(args: Any) -> Store:
    """The store that the arguments ask for; it is built first where it is missing."""
    env_id, percent, folder = args.env_id, args.data_percent, Path(args.data_dir) / "atari"
    game_name(env_id)  # an unknown game ends here
    if not 0 < percent <= 100:
        raise SystemExit(f"--data-percent is {percent}; it must be above 0 and at most 100.")
    if args.dataset:
        return open_store(Path(args.dataset), env_id, percent)
    names = {
        float(p.name.split("-")[-1][:-3]): p for p in folder.glob(f"{env_id}-run{args.run}-*pct")
    }
    if larger := [p for p in names if p >= percent]:  # its first part is the same data
        return open_store(names[min(larger)], env_id, percent)
    part = np.format_float_positional(percent, trim="-")
    path = folder / f"{env_id}-run{args.run}-{part}pct"
    tfds_dir = args.tfds_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    prepared = Path(tfds_dir).expanduser() / "rlu_atari_checkpoints_ordered"
    prepared = max(prepared.glob(f"{env_id}_run_{args.run}/*.*.*/"), default=None)
    if args.tfds_dir and not prepared:
        raise SystemExit(
            f"{tfds_dir} has no rlu_atari_checkpoints_ordered/{env_id}_run_{args.run}."
        )
    if prepared or not args.rlu_prefix.startswith("gs://") or can_reach_rlu():
        import_rlu(path, env_id, args.run, percent, args.rlu_prefix, prepared)
        return open_store(path, env_id, percent)
    path = folder / f"{env_id}-dqn-{LOCAL_STEPS // 1000}k"
    print(
        f"RL Unplugged cannot be reached: this is NOT the paper's data but {path}, {LOCAL_STEPS:,} "
        "steps of a small online DQN. For the paper's data, run again with a connection, or copy "
        f"gs://rl_unplugged/atari_episodes_ordered/{env_id}/run_{args.run}-* (gsutil -m cp) into "
        f"FOLDER/atari_episodes_ordered/{env_id}/ and add --rlu-prefix FOLDER.",
        flush=True,
    )
    if not path.exists():
        collector = Path(__file__).resolve().parent / "benchmark" / "collect_atari.py"
        if not collector.exists():
            raise SystemExit(
                f"There is no {collector} to collect data with: get the data as above."
            )
        command = [sys.executable, str(collector), "--env-id", env_id]
        command += ["--num-steps", str(LOCAL_STEPS), "--out", str(path)]
        cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # this process holds the accelerator
        if subprocess.run(command, env=cpu).returncode:
            raise SystemExit("Collecting data failed, as said above; the same command goes on.")
    return open_store(path, env_id, percent)


def can_reach_rlu() -> bool:
    try:
        urllib.request.urlopen("https://storage.googleapis.com/rl_unplugged", timeout=10)
    except urllib.error.HTTPError:  # an answer all the same
        return True
    except OSError:
        return False
    return True


# --- end data ---


# --- torso (identical in *_atari.py) ---
def conv(channels: int, dtype: Any, stride: int = 1, kernel: int = 3) -> nn.Conv:
    return nn.Conv(channels, (kernel, kernel), stride, use_bias=False, dtype=dtype)


def layer_norm(dtype: Any) -> nn.LayerNorm:
    """Over rows, columns and channels, with a scale and an offset for each channel."""
    return nn.LayerNorm(reduction_axes=(-3, -2, -1), feature_axes=-1, dtype=dtype)


def average_pool(x):
    """Halves rows and columns; the mean leaves out what lies beyond the border."""
    pool = partial(nn.avg_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    return pool(x) / pool(jnp.ones((*x.shape[-3:-1], 1), x.dtype))


class ResidualBlock(nn.Module):
    """Pre-activation residual block with layer normalisation."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = conv(self.channels, self.dtype)(nn.relu(layer_norm(self.dtype)(x)))
        return x + conv(self.channels, self.dtype)(nn.relu(layer_norm(self.dtype)(y)))


class Representation(nn.Module):
    """D.2.1, with 64 channels: uint8 [..., 84, 84, 4] -> [..., 6, 6, 64]."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, observation):
        x = observation.astype(self.dtype) / 255
        x = conv(self.channels // 2, self.dtype, stride=2)(x)  # 42 x 42
        x = ResidualBlock(self.channels // 2, self.dtype)(x)
        x = conv(self.channels, self.dtype, stride=2)(x)  # 21 x 21
        for _ in range(2):
            x = ResidualBlock(self.channels, self.dtype)(x)
        x = ResidualBlock(self.channels, self.dtype)(average_pool(x))  # 11 x 11
        x = average_pool(x)  # 6 x 6
        for _ in range(6):
            x = ResidualBlock(self.channels, self.dtype)(x)
        return x


class Head(nn.Module):
    channels: int
    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """States [..., 6, 6, channels] -> logits [..., outputs], float32, zero at first."""
        x = nn.relu(layer_norm(self.dtype)(x))
        x = conv(2 * self.channels, self.dtype, kernel=1)(x)
        x = nn.relu(layer_norm(self.dtype)(x))
        x = x.reshape(*x.shape[:-3], -1)
        for _ in range(2):
            x = nn.Dense(2 * self.channels, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(nn.LayerNorm(dtype=self.dtype)(x))
        # In float32, because a value is a small difference of many large logits' weights.
        options = {"kernel_init": nn.initializers.zeros, "precision": "highest"}
        return nn.Dense(self.outputs, dtype=jnp.float32, **options)(x)


# --- end torso ---


class BCNetwork(nn.Module):
    """The representation and the prediction function, up to the policy (D.2.1, Fig. 5b)."""

    num_actions: int
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, observation):
        """Observations uint8 [..., 84, 84, 4] -> policy logits [..., actions], float32."""
        x = Representation(self.channels, self.dtype)(observation)
        for _ in range(2):
            x = ResidualBlock(self.channels, self.dtype)(x)
        return Head(self.channels, self.num_actions, self.dtype)(x)


def bc_loss(params, batch: Batch, network: BCNetwork, args: Args):
    """-log π(a|s) of logged transitions, steps [B, 1].

    Returns:
      The loss and a dictionary of scalars to log.
    """
    action, moving = batch.action[:, 0], ~batch.is_last[:, 0]  # [B]
    logits = network.apply(params, stack_frames(batch.frames, batch.history, 0))  # [B, actions]
    log_prob = jax.nn.log_softmax(logits)
    loss = -jnp.mean(jnp.take_along_axis(log_prob, action[:, None], axis=-1)[:, 0] * moving)
    metrics = {
        "losses/total": loss,
        "charts/accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == action) & moving),
        "charts/policy_entropy": -jnp.mean(jnp.sum(jnp.exp(log_prob) * log_prob, axis=-1)),
    }
    return loss, metrics


METRICS = (
    "losses/total",
    "charts/accuracy",
    "charts/policy_entropy",
    "charts/grad_norm",
)


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    step: Any  # int32, updates done
    sums: Any  # of the metrics since the last multiple of log_every


def make_network(num_actions: int, args: Args) -> BCNetwork:
    on_cpu = jax.default_backend() == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    return BCNetwork(num_actions, args.channels, jnp.dtype(dtype))


# --- optimizer (identical in rosmo_*.py, muzero_unplugged_*.py, bc_*.py and c*_*.py) ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    learning_rate = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, 1_000, 100_000, args.learning_rate_decay, staircase=True
    )
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, weight_decay=args.weight_decay, mask=is_weight)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


# --- end optimizer ---


def init_state(key, network: BCNetwork, args: Args) -> TrainState:
    params = network.init(key, jnp.zeros((84, 84, 4), jnp.uint8))
    sums = {name: jnp.float32(0) for name in METRICS}
    return TrainState(params, make_optimizer(args).init(params), jnp.int32(0), sums)


@partial(jax.jit, static_argnames=("network", "args"), donate_argnames="state")
def update(state: TrainState, batch: Batch, network: BCNetwork, args: Args):
    """One update -> (state, loss); the batch is shared out to the devices, the state is not."""
    gradient, metrics = jax.grad(bc_loss, has_aux=True)(state.params, batch, network, args)
    metrics["charts/grad_norm"] = optax.global_norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    params, step = optax.apply_updates(state.params, delta), state.step + 1
    first = state.step % args.log_every == 0
    sums = {name: jnp.where(first, 0, state.sums[name]) + metrics[name] for name in METRICS}
    return TrainState(params, opt_state, step, sums), metrics["losses/total"]


@partial(jax.jit, static_argnames=("greedy", "network", "args"))
def act(params, observation, key, greedy: bool, network: BCNetwork, args: Args):
    """Actions [E] for observations [E, ...], sampled from π or its most probable ones."""
    logits = network.apply(params, observation)
    return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)


# --- run folder (identical in *_atari.py and *_bsuite.py) ---
# Arguments that change no number of a run, and those that do not name its folder.
NOT_COMPARED = (
    "run_dir overwrite compilation_cache capture_video track wandb_project_name wandb_entity "
    "data_dir tfds_dir rlu_prefix loader_threads"
)
NOT_NAMED = (
    f"{NOT_COMPARED} env_id seed num_seeds total_updates log_every checkpoint_every eval_every "
    "eval_episodes final_eval_episodes"
)


class Run:
    """The folder of a run: config.json, metrics.jsonl, checkpoints/ and learning_curve.png.

    The same command finds its folder again and goes on from the last checkpoint in it.
    """

    def __init__(self, args, seeds: list[int], source: str = ""):
        """Finds the folder, whose name ends with the source of the data if that needs telling.

        Ends the program if the folder holds something else; writes nothing.
        """
        self.args, self.seeds, self.stopping, self.wandb = args, seeds, False, None
        self.writes = jax.process_index() == 0  # of the processes of a run on several hosts
        fields = [f for f in dataclasses.fields(args) if f.name not in NOT_NAMED.split()]
        changed = {f.name: v for f in fields if (v := getattr(args, f.name)) != f.default}
        values = {k: v.name if isinstance(v, Path) else v for k, v in changed.items()}
        variant = "".join(f"-{k.replace('_', '-')}={v}" for k, v in values.items()) + source
        name = f"seed{seeds[0]}" if len(seeds) == 1 else f"seeds{seeds[0]}-{seeds[-1]}"
        self.dir = args.run_dir or Path("runs", Path(__file__).stem, args.env_id + variant, name)
        self.config = {"args": json.loads(json.dumps(dataclasses.asdict(args), default=str))}
        if not (self.dir / "config.json").exists():
            names = {path.name for path in self.dir.glob("*")}
            failed_start = {"lock"} <= names <= {"lock", "checkpoints", "config.tmp"}
            if (names and not failed_start) or self.dir.is_file():
                raise SystemExit(f"{self.dir} is not the folder of a run; give another --run-dir.")
            return
        config = json.loads((self.dir / "config.json").read_text())
        if config.get("script") != Path(__file__).name:
            raise SystemExit(f"{self.dir} is not a run of this script; give another --run-dir.")
        if args.overwrite:
            return
        now, before = self.config["args"], config["args"]
        pairs = [(k, before.get(k), now.get(k)) for k in before | now]
        changes = [f"{k} {a} -> {b}" for k, a, b in pairs if a != b and k not in NOT_COMPARED]
        # A longer run begins as the shorter one did, so it may go on from there.
        shorter = before["total_updates"]
        if shorter < args.total_updates and shorter % args.eval_every == 0:
            changes = [change for change in changes if not change.startswith("total_updates")]
        if changes:
            message = f"{self.dir} holds a run with other arguments ({', '.join(changes)})"
            raise SystemExit(f"{message}; give another --run-dir, or --overwrite to delete it.")
        self.config = config | self.config

    def start(self, state, data, **facts):
        """Opens the folder; returns (update, state), those of the last checkpoint if any.

        data: what the run learns from; a run does not go on with other data.
        """
        data = json.loads(json.dumps(data))
        if self.config.setdefault("data", data) != data:
            message = f"{self.dir} holds a run on other data than these arguments give now"
            raise SystemExit(f"{message}; give another --run-dir, or --overwrite to delete it.")
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        if shutil.which("git"):
            here = Path(__file__).resolve().parent
            commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout
            facts["commit"] = commit.strip() or None
        facts["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if self.writes:
            print(f"Run: {self.dir}, on {facts['device']}.", flush=True)
        facts["versions"] = {p: version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")}
        self.config["starts"] = [*self.config.get("starts", []), facts]
        self.config["script"] = Path(__file__).name
        self.config.setdefault("wandb_id", f"{time.time_ns():x}")
        try:
            if self.writes:
                self.take_folder()
                if self.args.overwrite:
                    for path in self.dir.iterdir():  # what is half deleted is still a run's
                        if path.name not in ("lock", "config.json"):
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            if self.writes:
                (self.dir / "config.tmp").write_text(json.dumps(self.config, indent=2))
                (self.dir / "config.tmp").replace(self.dir / "config.json")
        except OSError as error:
            message = f"The folder {self.dir} cannot be written ({error.strerror})"
            raise SystemExit(f"{message}; give another --run-dir.") from None
        best = {"get_metric_fn": lambda metrics: metrics["score"], "n": 1}
        best = BestN(**best, keep_checkpoints_without_metrics=False)
        keep = AnyPreservationPolicy([LatestN(2), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, cleanup_tmp_directories=True
        )
        self.checkpoints = ocp.CheckpointManager(
            self.dir.resolve() / "checkpoints", options=options
        )
        update, wall_time = self.checkpoints.latest_step() or 0, 0.0
        if update:
            items = {"state": ocp.args.StandardRestore(state), "extra": ocp.args.JsonRestore()}
            saved = self.checkpoints.restore(update, args=ocp.args.Composite(**items))
            state, wall_time = saved.state, saved.extra["wall_time"]
            print(f"Going on from update {update:,} in {self.dir}.", flush=True)
        if self.writes:
            lines = [x for x in self.lines() if x["update"] <= update and "final/returns" not in x]
            (self.dir / "metrics.tmp").write_text("".join(json.dumps(x) + "\n" for x in lines))
            (self.dir / "metrics.tmp").replace(self.dir / "metrics.jsonl")
        self.metrics = (self.dir / "metrics.jsonl").open("a") if self.writes else io.StringIO()
        self.started = time.monotonic() - wall_time
        if self.args.track and self.writes:
            import wandb

            project, entity = self.args.wandb_project_name, self.args.wandb_entity
            same = {"id": self.config["wandb_id"], "resume": "allow", "dir": self.dir}
            self.wandb = wandb.init(project=project, entity=entity, config=self.config, **same)
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        return update, state

    def take_folder(self) -> None:
        """Makes the folder and keeps it for this process; ends the program if another has it."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = (self.dir / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"Another process is writing to {self.dir}"
            raise SystemExit(f"{message}; wait for it, or give another --run-dir.") from None
        except OSError:
            pass  # a file system without locks

    def interrupt(self, *_) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print("\nStopping at the next checkpoint; Ctrl-C again stops now.", file=sys.stderr)

    def lines(self) -> list[dict]:
        """The metrics written so far, but for a last line that a kill cut short."""
        path = self.dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def is_finished(self) -> bool:
        final = [x for x in self.lines() if "final/returns" in x]
        done = len(final) == len(self.seeds) and final[0]["update"] == self.args.total_updates
        return done and not self.args.overwrite

    def log(self, update: int, seed: int, values: dict) -> None:
        """Appends one line to metrics.jsonl; a loss that is not finite ends the program."""
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        line = {"update": update, "seed": seed, "wall_time": time.monotonic() - self.started}
        self.metrics.write(json.dumps(line | values) + "\n")
        self.metrics.flush()
        if self.wandb:
            prefix = f"seed{seed}/" if len(self.seeds) > 1 else ""
            self.wandb.log({prefix + name: value for name, value in values.items()}, step=update)
        self.check_loss(update, values.get("losses/total", 0.0))

    def check_loss(self, update: int, loss: float) -> None:
        if not math.isfinite(loss):
            self.close()
            message = f"The loss is {loss} by update {update:,}; the last checkpoint is kept"
            raise SystemExit(f"{message}. Try a lower --learning-rate.")

    def save(self, update: int, state, score: float | None) -> None:
        """Writes a checkpoint in the background; the last two and the best score are kept."""
        metrics = None if score is None else {"score": score}
        extra = {"wall_time": time.monotonic() - self.started}
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(extra)}
        self.checkpoints.save(update, args=ocp.args.Composite(**items), metrics=metrics)

    def exit(self, update: int) -> None:
        self.close()
        but = " without --overwrite" if self.args.overwrite else ""
        print(f"Stopped at update {update:,}; the same command{but} goes on.", file=sys.stderr)
        raise SystemExit(130)

    def plot(self, references: dict[str, float]) -> None:
        """Draws learning_curve.png: the evaluations' mean returns, each seed's and their mean."""
        from matplotlib.figure import Figure  # without pyplot's global state

        lines = [line for line in self.lines() if "eval/return_mean" in line]
        returns = [[x["eval/return_mean"] for x in lines if x["seed"] == s] for s in self.seeds]
        updates = [x["update"] for x in lines if x["seed"] == self.seeds[0]]
        n = 1 + len(updates) // 25  # evaluations in the moving average
        curves = np.transpose([np.convolve(row, np.ones(n) / n, "valid") for row in returns])
        axes = (figure := Figure((7, 4.5), layout="constrained")).subplots()
        axes.plot(updates[n - 1 :], curves, color="C0", alpha=0.25, linewidth=1)
        axes.plot(updates[n - 1 :], curves.mean(axis=1), label=f"mean of {len(self.seeds)} seed(s)")
        for i, (name, value) in enumerate(references.items()):
            axes.axhline(value, color=f"C{i + 1}", linestyle="--", linewidth=1, label=name)
        title = f"{Path(__file__).stem} on {self.args.env_id}"
        axes.set(xlabel="updates", ylabel=f"return, mean of {n} evaluation(s)", title=title)
        axes.legend()
        figure.savefig(self.dir / "learning_curve.png", dpi=120)

    def close(self) -> None:
        self.checkpoints.close()  # waits for those that are still being written
        self.metrics.close()
        if self.wandb:
            self.wandb.finish()
        if self.writes:
            self.lock.close()


# --- end run folder ---


def check_args(args: Args) -> None:
    """Ends the program with one sentence if an argument is out of its range."""
    leasts = {"seed": 0, "channels": 2}
    for name, value in vars(args).items():
        if type(value) is int and value < (least := leasts.get(name, 1)):
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; give at least {least}.")
    if args.eval_every % args.log_every:
        raise SystemExit(
            f"--eval-every {args.eval_every} must be a multiple of --log-every {args.log_every}."
        )
    if args.batch_size % jax.device_count():
        raise SystemExit(
            f"--batch-size {args.batch_size} cannot be shared by {jax.device_count()} devices; "
            "give a multiple."
        )


def join_processes() -> None:
    """Joins the other processes of a run on several hosts, each of which starts this script."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if all(name in os.environ for name in names):
        address, number, index = (os.environ[name] for name in names)
        jax.distributed.initialize(address, int(number), int(index))
    elif any(name in os.environ for name in names):
        raise SystemExit(f"A run of several processes needs all of {', '.join(names)}.")
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        jax.distributed.initialize()


def warn_if_slow(seconds: float, args: Args) -> None:
    days = seconds * args.total_updates / 86400
    if days > 1:
        tqdm.write(
            f"An update takes {seconds:.1f} s here, all {args.total_updates:,} would take "
            f"{days:.0f} days: use an accelerator, or see 'Atari on a laptop' in the README for "
            "small settings (--channels, --batch-size, --total-updates).",
            file=sys.stderr,
        )


def main(args: Args) -> None:
    join_processes()
    check_args(args)
    if args.compilation_cache:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", f"{cache}/rosmo-suite")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # The first process builds a store that is missing. Devices would not wait for it so long.
    wait_for_all = partial(ocp.multihost.get_barrier_sync_fn(), timeout_ms=24 * 3_600_000)
    try:
        store = get_store(args) if jax.process_index() == 0 else None
    finally:  # after an error, too: the others then meet it themselves
        wait_for_all(key="store")
    store = store or get_store(args)
    wait_for_all(key="opened")
    local = store.meta["source"] == "dqn" and args.dataset is None
    run = Run(args, [args.seed], source="-dqn" if local else "")
    video = run.dir / "video.mp4"
    if run.is_finished() and (video.exists() or not args.capture_video):
        print(f"This run is finished: see {run.dir}, or give --overwrite to start again.")
        return
    mean_return = store.episodes["return"].mean()
    print(
        f"Data: {store.path}: {len(store.episodes):,} episodes, {store.num_steps:,} steps, "
        f"mean return {mean_return:.2f}.",
        flush=True,
    )
    network = make_network(store.meta["num_actions"], args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    init_key = jax.random.key(args.seed)
    state = jax.jit(init_state, static_argnums=(1, 2), out_shardings=replicated)(
        init_key, network, args
    )
    data = {k: v for k, v in store.meta.items() if k != "crc32"}
    facts = {"dtype": str(network.dtype), "rom": rom_digest(args.env_id)}
    done, state = run.start(state, data, **facts)

    share = args.batch_size // jax.process_count()
    rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    length = 1

    def load(step: int) -> Batch:
        batch = sample_batch(store, args.seed, step, args.batch_size, length, rows)
        return Batch(*(jax.make_array_from_process_local_data(by_device, x) for x in batch))

    def policy(greedy: bool) -> Callable:
        params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
        return partial(act, params, greedy=greedy, network=network, args=args)

    def play(num_episodes: int, greedy: bool) -> np.ndarray:
        seed = int(np.random.default_rng((args.seed, done)).integers(2**31))
        return np.array(evaluate(policy(greedy), args.env_id, num_episodes, seed))

    bar = tqdm(
        total=args.total_updates, initial=done, disable=not (run.writes and sys.stderr.isatty())
    )
    batches = load_batches(load, done, args.loader_threads)
    played, loss, waited = "", None, 0.0
    window_start, window_first = time.perf_counter(), done
    while done < args.total_updates:
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        previous_loss = loss
        state, loss = update(state, batch, network, args)
        done += 1
        jax.block_until_ready(previous_loss)  # so that at most one batch waits on the device
        bar.update()
        if done == 2 and window_first == 0:
            warn_if_slow(time.perf_counter() - before, args)
        if done % args.log_every == 0:
            metrics = {k: v / args.log_every for k, v in jax.device_get(state.sums).items()}
            seconds = time.perf_counter() - window_start
            metrics["charts/updates_per_second"] = (done - window_first) / seconds
            metrics["charts/data_wait"] = waited / seconds  # share of the time
            run.log(done, args.seed, metrics)
            status = f"loss {metrics['losses/total']:.3f}{played}"
            bar.set_postfix_str(status)
            if bar.disable and run.writes:
                print(f"update {done:,}: {status}", flush=True)
        score = None
        if (done % args.eval_every == 0 or done == args.total_updates) and run.writes:
            returns = play(args.eval_episodes, args.eval_greedy)
            score, played = returns.mean(), f", return {returns.mean():.1f}"
            run.log(done, args.seed, {"eval/return_mean": score, "eval/returns": returns})
        stopping = run.stopping
        if jax.process_count() > 1:  # they agree to stop, at a line of the log
            agreed = done % args.log_every == 0 and multihost_utils.process_allgather(stopping)
            stopping = bool(np.any(agreed))
        if stopping or done % args.checkpoint_every == 0 or done == args.total_updates:
            run.check_loss(done, float(loss))
            run.save(done, state, score)
        if stopping:
            run.exit(done)
        if done % args.log_every == 0:
            waited, window_start, window_first = 0.0, time.perf_counter(), done
    batches.close()
    bar.close()
    if run.writes:
        sampled = play(args.final_eval_episodes, greedy=False)
        greedy = play(args.final_eval_episodes, greedy=True)
        score = normalized_score(args.env_id, sampled.mean())
        final = {"final/return_mean": sampled.mean(), "final/return_mean_greedy": greedy.mean()}
        final |= {"final/returns": sampled, "final/returns_greedy": greedy}
        if args.capture_video:
            capture_video(policy(False), args.env_id, args.seed, video)
            if run.wandb:
                import wandb

                run.wandb.log({"video": wandb.Video(str(video), format="mp4")})
        random_score, online_score = REFERENCE_SCORES.get(args.env_id, (None, None))
        lines = {"data": mean_return, "random policy": random_score, "online DQN": online_score}
        run.plot({name: value for name, value in lines.items() if value is not None})
        run.log(done, args.seed, final | {"final/normalized_score": score})  # it is finished
        print(
            f"Final return of {args.final_eval_episodes} episodes: {sampled.mean():.2f} "
            f"(data {mean_return:.2f}), greedy {greedy.mean():.2f}; see {run.dir}."
        )
    wait_for_all(key="evaluated")
    run.close()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        message = (
            "Stopped; the same command (but for --overwrite) goes on from the last checkpoint."
        )
        print(message, file=sys.stderr)
        raise SystemExit(130) from None
