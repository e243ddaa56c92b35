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
"""COMBO on Atari (Yu et al., 2021), a baseline of ROSMO: CQL on data and in a world model.

COMBO is CQL on a mix of logged transitions and of short rollouts of a learned world model: Q is
pushed down on all actions, in logged and in predicted states, and up on those taken. The world
model is MOReL's, an ensemble of recurrent state-space models with categorical latents
(DreamerV2: Hafner et al., 2021); the rest is cql_atari.py, from which only the mix differs.

    python combo_atari.py --env-id MsPacman                         # the paper's setting
    python combo_atari.py --env-id MsPacman --world-model FOLDER    # of another run, or of MOReL's
    python combo_atari.py --env-id MsPacman --push-up real          # COMBO's own penalty

The world model is a run of its own in {run folder}-world-model; morel_atari.py says how it learns.
The paper gives half of a batch from the model, rollouts of 10 steps and one random member for each;
the rest is our reconstruction.
1. Every 400 updates 2,048 rollouts are added, and those of the last five times are kept. An equal
   number for each member starts at random logged frames, after the member has filtered the 15
   frames before.
2. Inside the model Q acts, ε-greedy with ε = 0.05, on four frames: logged ones at first, then
   predicted ones, rounded to the 256 greys of the game. Latents are samples.
3. A rollout ends where the member says terminal with a probability above 0.5, without a bootstrap.
   Nothing after that is ever drawn. Its last step is bootstrapped as any other.
4. The penalty pushes Q up on the actions of the mix: CQL with nothing changed but the mix. COMBO's
   paper has logged actions only (--push-up real): a difference of Q between real and predicted
   frames, which has no lower bound.
5. A checkpoint holds the actions of the rollouts; a run that goes on predicts their frames again.
6. Everything else is as in cql_atari.py.
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
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, deque
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
    """start again in a folder that holds a run, and delete that run and its world model"""
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
    clip_rewards: bool = True
    """clip rewards to [-1, 1]"""
    heldout_percent: float = 5.0
    """part of the episodes that the world model does not learn from"""
    truncation_as_termination: bool = False
    """treat every last step as terminal"""

    # world model
    world_model: Path | None = None
    """take the ensemble from this folder, {run folder}-world-model of another run"""
    members: int = 4
    """E, members of the ensemble"""
    deter: int = 1024
    """size of the recurrent state h"""
    hidden: int = 1000
    """units of the layers around the recurrent state"""
    latents: int = 32
    """categorical variables of the latent state z"""
    classes: int = 32
    """classes of each"""
    depth: int = 48
    """channels of the encoder's first convolution; the rest of both scales with it"""
    head_units: int = 400
    """units of the four layers of the reward's and of the terminal's head"""

    # training of the world model
    model_updates: int = 200_000
    """largest number of updates"""
    model_batch_size: int = 32
    """windows in a member's batch, over all devices"""
    model_length: int = 48
    """T, steps of a window"""
    model_learning_rate: float = 3e-4
    """AdamW's learning rate"""
    model_weight_decay: float = 0.01
    """AdamW's weight decay, on weight matrices only"""
    model_max_grad_norm: float = 200.0
    """largest global norm of a member's gradient"""
    kl_coef: float = 0.1
    """weight of the KL divergence"""
    kl_balance: float = 0.8
    """share of its gradient that moves the prior towards the posterior"""
    model_eval_every: int = 1_000
    """updates between two evaluations on held-out episodes, each with a checkpoint"""
    model_eval_batches: int = 8
    """batches of held-out windows, the same in each evaluation"""
    model_patience: int = 10_000
    """updates without enough improvement of the held-out loss after which training ends"""
    model_min_improvement: float = 0.005
    """enough improvement, as a part of the held-out loss"""

    # network of Q (Table 3, D.2.1)
    channels: int = 64
    """channels of the residual blocks; the rest of the network scales with it"""
    num_bins: int = 601
    """bins of the categorical Q"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the networks (auto: bfloat16 on accelerators); the rest is always float32"""

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
    target_update_every: int = 2_000
    """updates between two copies of the parameters to the target network"""

    # rollouts of the world model
    rollout_every: int = 400
    """updates between two generations of rollouts"""
    rollout_starts: int = 2048
    """rollouts in a generation, shared out evenly to the members"""
    rollout_length: int = 10
    """steps of a rollout"""
    rollout_generations: int = 5
    """generations that are kept"""
    rollout_warm_up: int = 16
    """logged frames that a member filters, up to the one from which a rollout starts"""
    rollout_epsilon: float = 0.05
    """probability of a random action in rollouts"""

    # algorithm
    discount: float = 0.99
    """discount factor γ"""
    cql_alpha: float = 1.0
    """α, weight of the conservative penalty"""
    model_share: float = 0.5
    """part of a batch that comes from rollouts"""
    push_up: Literal["mix", "real"] = "mix"
    """transitions whose action the penalty pushes up: all, or logged ones"""

    # evaluation
    eval_every: int = 1_000
    """updates between two evaluations, a multiple of --log-every"""
    eval_episodes: int = 2
    """episodes of each evaluation during training"""
    final_eval_episodes: int = 100
    """episodes of the final evaluation"""
    eval_greedy: bool = False
    """take no random action in evaluations during training"""
    eval_epsilon: float = 0.001
    """probability of a random action in evaluations"""


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


# --- world model (identical in morel_atari.py and combo_atari.py) ---
class State(NamedTuple):
    """What a member knows of the game: the state s = (h, z) of a recurrent state-space model."""

    deter: jax.Array  # h [..., deter]
    latent: jax.Array  # z [..., latents, classes], one-hot


class Decoded(NamedTuple):
    """What a member says of states [...]; all float32."""

    image: jax.Array  # [..., 84, 84], intensity / 255 - 0.5
    reward: jax.Array  # [...], of the transition that led to the state
    terminal_logit: jax.Array  # [...], of the state being terminal


class Windows(NamedTuple):
    """T consecutive frames, each with what came before it."""

    frame: jax.Array  # uint8 [..., T, 84, 84], o_t
    action: jax.Array  # int32 [..., T], a_{t-1}; -1 at the first frame of an episode
    reward: jax.Array  # float32 [..., T], r_{t-1}; 0 there
    is_first: jax.Array  # bool [..., T]
    terminal: jax.Array  # bool [..., T], o_t is terminal


def to_image(frame):
    """Frames uint8 [...] -> intensity / 255 - 0.5, float32."""
    return frame.astype(jnp.float32) / 255 - 0.5


def to_frame(image):
    """The inverse of `to_image`, rounded and clipped: float32 [...] -> uint8 [...]."""
    return jnp.round(jnp.clip(image + 0.5, 0, 1) * 255).astype(jnp.uint8)


class Layer(nn.Module):
    """Linear, layer normalisation, ELU."""

    units: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.units, use_bias=False, dtype=self.dtype)(x)
        return nn.elu(nn.LayerNorm(dtype=self.dtype)(x))


class Encoder(nn.Module):
    """Frames uint8 [..., 84, 84] -> [..., 3 · 3 · 8 depth]."""

    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, frame):
        x = to_image(frame)[..., None]
        for i in range(4):  # 41 x 41, 19 x 19, 8 x 8, 3 x 3
            channels = self.depth * 2**i
            x = nn.elu(nn.Conv(channels, (4, 4), 2, padding="VALID", dtype=self.dtype)(x))
        return x.reshape(*x.shape[:-3], -1)


class Upsample(nn.Module):
    """Transposed convolution, kernel 6, stride 2: [..., n, n, C] -> [..., 2n + 4, 2n + 4, C'].

    As a convolution that gives the pixels of 2 x 2 blocks: the same, and faster on a CPU, which
    also takes a padded input better than a padded convolution, whose gradient is slow.
    """

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (2, 2), (2, 2), (0, 0)])
        x = nn.Conv(4 * self.channels, (3, 3), padding="VALID", dtype=self.dtype)(x)
        *batch, rows, columns, _ = x.shape
        x = x.reshape(*batch, rows, columns, 2, 2, self.channels).swapaxes(-4, -3)
        return x.reshape(*batch, 2 * rows, 2 * columns, self.channels)


class Decoder(nn.Module):
    """Features [..., F] -> images float32 [..., 84, 84]: differences from a learned image."""

    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, features):
        x = nn.Dense(32 * self.depth, dtype=self.dtype)(features)
        x = nn.elu(nn.Dense(7 * 7 * 4 * self.depth, dtype=self.dtype)(x))  # kernel 7 from 1 x 1
        x = x.reshape(*x.shape[:-1], 7, 7, 4 * self.depth)
        x = nn.elu(Upsample(2 * self.depth, self.dtype)(x))  # 18 x 18
        x = nn.elu(Upsample(self.depth, self.dtype)(x))  # 40 x 40
        x = Upsample(1, self.dtype)(x)[..., 0].astype(jnp.float32)  # 84 x 84
        background = self.param("background", nn.initializers.zeros, (84 * 84,))  # not decayed
        return x + background.reshape(84, 84)


class ScalarHead(nn.Module):
    """Features [..., F] -> float32 [...]."""

    units: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = Layer(self.units, self.dtype)(x)
        return nn.Dense(1, dtype=jnp.float32)(x)[..., 0]


class WorldModel(nn.Module):
    """A member: a recurrent state-space model with categorical latents, encoder and decoders.

    Inputs may have any leading axes.
    """

    num_actions: int
    deter: int
    hidden: int
    latents: int
    classes: int
    depth: int
    head_units: int
    dtype: Any

    def setup(self):
        def dense(**settings):
            return nn.Dense(self.hidden, dtype=self.dtype, **settings)

        def logits():
            return nn.Dense(self.latents * self.classes, dtype=jnp.float32)

        self.encoder = Encoder(self.depth, self.dtype)
        self.latent_input, self.action_input = dense(), dense(use_bias=False)
        self.input_norm = nn.LayerNorm(dtype=self.dtype)
        self.gru = nn.GRUCell(self.deter, dtype=self.dtype)
        self.prior_layer, self.prior_logits = Layer(self.hidden, self.dtype), logits()
        self.deter_input, self.embedding_input = dense(), dense(use_bias=False)
        self.posterior_norm, self.posterior_logits = nn.LayerNorm(dtype=self.dtype), logits()
        self.decoder = Decoder(self.depth, self.dtype)
        self.reward_head = ScalarHead(self.head_units, self.dtype)
        self.terminal_head = ScalarHead(self.head_units, self.dtype)

    def encode(self, frame):
        """Frames uint8 [..., 84, 84] -> the posterior's part of them [..., hidden]."""
        return self.embedding_input(self.encoder(frame))

    def advance(self, state: State, action):
        """h_t = GRU(h_{t-1}, z_{t-1}, a_{t-1}): states, actions [...] -> [..., deter]."""
        action = jax.nn.one_hot(action, self.num_actions, dtype=self.dtype)  # -1: zeros
        latent = state.latent.reshape(*state.latent.shape[:-2], -1)
        x = self.input_norm(self.latent_input(latent) + self.action_input(action))
        return self.gru(state.deter, nn.elu(x))[0]

    def prior(self, deter):
        """p(z_t | h_t): [..., deter] -> logits [..., latents, classes]."""
        logits = self.prior_logits(self.prior_layer(deter))
        return logits.reshape(*logits.shape[:-1], self.latents, self.classes)

    def posterior(self, deter, embedding):
        """q(z_t | h_t, o_t): [..., deter], [..., hidden] -> logits [..., latents, classes]."""
        x = nn.elu(self.posterior_norm(self.deter_input(deter) + embedding))
        logits = self.posterior_logits(x)
        return logits.reshape(*logits.shape[:-1], self.latents, self.classes)

    def decode(self, state: State) -> Decoded:
        latent = state.latent.reshape(*state.latent.shape[:-2], -1)
        features = jnp.concatenate([state.deter, latent], axis=-1)
        heads = (self.decoder, self.reward_head, self.terminal_head)
        return Decoded(*(head(features) for head in heads))

    def __call__(self, state: State, action, frame):
        deter = self.advance(state, action)
        posterior = self.posterior(deter, self.encode(frame))
        return self.prior(deter), posterior, self.decode(State(deter, draw_latent(posterior)))


def draw_latent(logits, key=None):
    """The mode of logits [..., latents, classes] or, with a key, a sample, one-hot.

    Straight-through: its gradient is that of the probabilities.
    """
    index = jnp.argmax(logits, -1) if key is None else jax.random.categorical(key, logits)
    probs = jax.nn.softmax(logits)
    return jax.nn.one_hot(index, logits.shape[-1]) + (probs - jax.lax.stop_gradient(probs))


def empty_state(network: WorldModel, *shape: int) -> State:
    """The state [*shape] before an episode: zeros."""
    latent = jnp.zeros((*shape, network.latents, network.classes), jnp.float32)
    return State(jnp.zeros((*shape, network.deter), network.dtype), latent)


def imagine(network: WorldModel, params, state: State, action, key=None) -> State:
    """s_{t+1} from states and actions [...] alone: the prior's mode or, with a key, a sample."""
    deter = network.apply(params, state, action, method="advance")
    return State(deter, draw_latent(network.apply(params, deter, method="prior"), key))


def observe(network: WorldModel, params, windows: Windows, key=None, state: State | None = None):
    """Filters windows [B, T] with the posterior (its mode, or samples if there is a key).

    Args:
      state: before the windows, [B] [default: empty]. It is reset at every first frame.

    Returns:
      The states [B, T], and the prior's and the posterior's logits [B, T, latents, classes].
    """
    batch_size, length = windows.action.shape
    embedding = network.apply(params, windows.frame, method="encode")
    keys = None if key is None else jax.random.split(key, length)
    empty = empty_state(network, batch_size)

    def step(state, inputs):
        action, is_first, embedding, key = inputs
        state = jax.tree.map(
            lambda x: jnp.where(is_first.reshape(-1, *[1] * (x.ndim - 1)), 0, x), state
        )
        deter = network.apply(params, state, action, method="advance")
        logits = network.apply(params, deter, embedding, method="posterior")
        state = State(deter, draw_latent(logits, key))
        return state, (state, logits)

    inputs = (windows.action, windows.is_first, embedding)
    inputs = (*(jnp.moveaxis(x, 1, 0) for x in inputs), keys)
    _, outputs = jax.lax.scan(step, empty if state is None else state, inputs)
    states, posterior = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)
    return states, network.apply(params, states.deter, method="prior"), posterior


def kl_divergence(p_logits, q_logits):
    """KL(p ‖ q) of independent categoricals: logits [..., latents, classes] -> [...]."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=(-2, -1))


def balanced_kl(posterior, prior, balance: float):
    """KL(posterior ‖ prior), of whose gradient the prior gets the share `balance`."""
    stop = jax.lax.stop_gradient
    to_prior = kl_divergence(stop(posterior), prior)
    return balance * to_prior + (1 - balance) * kl_divergence(posterior, stop(prior))


def world_model_loss(params, windows: Windows, key, network: WorldModel, args: Args):
    """-log p(o, r, terminal | s) + β KL(posterior ‖ prior) of a member, per step of windows [B, T].

    Returns:
      Their sum and a dictionary of scalars to log.
    """
    states, prior, posterior = observe(network, params, windows, key)
    decoded = network.apply(params, states, method="decode")
    image_error = jnp.sum((decoded.image - to_image(windows.frame)) ** 2, axis=(-2, -1))  # [B, T]
    terminal_loss = optax.sigmoid_binary_cross_entropy(decoded.terminal_logit, windows.terminal)
    kl = balanced_kl(posterior, prior, args.kl_balance)  # [B, T]
    losses = {
        "image": jnp.mean(image_error) / 2,
        "reward": jnp.mean((decoded.reward - windows.reward) ** 2) / 2,
        "terminal": jnp.mean(terminal_loss),
        "kl": args.kl_coef * jnp.mean(kl),
    }
    total = sum(losses.values())
    return total, losses | {"total": total}


# --- end world model ---


# --- world model data (identical in morel_atari.py and combo_atari.py) ---
def select_episodes(store: Store, selected: np.ndarray) -> Store:
    """The store with those of its episodes for which `selected` [episodes] is true."""
    length = store.episodes["length"]
    starts, length = (store.shifts + store.ends - length)[selected], length[selected]
    ends = np.cumsum(length)
    shifts = starts - ends + length
    episodes, num_steps = store.episodes[selected], int(ends[-1])
    return store._replace(episodes=episodes, ends=ends, shifts=shifts, num_steps=num_steps)


def split_store(store: Store, heldout_percent: float, seed: int) -> tuple[Store, Store]:
    """The store in two, episodes to learn from and some, drawn at random, to hold out."""
    num_episodes = len(store.episodes)
    count = max(1, round(num_episodes * heldout_percent / 100))
    if count >= num_episodes:
        raise SystemExit(
            f"{heldout_percent:g}% of the {num_episodes} episodes of {store.path} cannot be held "
            "out: give more data or a lower --heldout-percent."
        )
    order = np.random.default_rng(seed).permutation(num_episodes)
    heldout = np.isin(np.arange(num_episodes), order[:count])
    return select_episodes(store, ~heldout), select_episodes(store, heldout)


def model_windows(batch: Batch, clip_rewards: bool) -> Windows:
    """Windows of T from a batch of T + 1: an action and its reward go to the step after them."""
    is_first = batch.is_first[:, 1:]
    reward = np.where(is_first, 0, batch.reward[:, :-1]).astype(np.float32)
    return Windows(
        frame=batch.frames[:, 4:],
        action=np.where(is_first, -1, batch.action[:, :-1]),
        reward=np.clip(reward, -1, 1) if clip_rewards else reward,
        is_first=is_first,
        terminal=batch.is_terminal[:, 1:],
    )


# --- end world model data ---


# --- world model training (identical in morel_atari.py and combo_atari.py) ---
MODEL_METRICS = (
    *("losses/image", "losses/reward", "losses/terminal", "losses/kl", "losses/total"),
    "charts/grad_norm",
)
CONTEXT, HORIZON = 5, 15  # frames that an evaluation filters and then predicts
MODEL_SIZES = "members deter hidden latents classes depth head_units clip_rewards".split()


class ModelState(NamedTuple):
    """Of a member."""

    params: Any
    opt_state: Any
    step: Any  # int32, updates done
    sums: Any  # of the metrics since the last multiple of log_every


def make_world_model(num_actions: int, args: Args) -> WorldModel:
    on_cpu = jax.default_backend() == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    sizes = (args.deter, args.hidden, args.latents, args.classes, args.depth, args.head_units)
    return WorldModel(num_actions, *sizes, jnp.dtype(dtype))


def model_optimizer(args: Args) -> optax.GradientTransformation:
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    settings = dict(eps=1e-5, weight_decay=args.model_weight_decay, mask=is_weight)
    adamw = optax.adamw(args.model_learning_rate, **settings)
    return optax.chain(optax.clip_by_global_norm(args.model_max_grad_norm), adamw)


def init_member(key, network: WorldModel):
    frame = jnp.zeros((84, 84), jnp.uint8)
    return network.init(key, empty_state(network), jnp.int32(0), frame)


def init_members(key, network: WorldModel, num_members: int):
    """Parameters of the members, each drawn on its own: as a vmap it would compile for minutes."""
    # Runs a few times only, so that a program made in a hurry is the quickest.
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(partial(init_member, network=network), compiler_options=options)
    members = [init(member_key) for member_key in jax.random.split(key, num_members)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


@partial(jax.jit, static_argnames=("network", "args"), donate_argnames="state")
def update_member(
    state: ModelState, windows: Windows, key, network: WorldModel, args: Args
) -> tuple[ModelState, jax.Array]:
    """One update of a member on windows [B, T] -> (state, loss).

    The members take turns: a vmap makes grouped convolutions of theirs, with which a CPU needs
    almost twice as long.
    """
    # The key belongs to the step, so that a resumed run draws the same latents.
    key = jax.random.fold_in(key, state.step)
    gradient, losses = jax.grad(world_model_loss, has_aux=True)(
        state.params, windows, key, network, args
    )
    delta, opt_state = model_optimizer(args).update(gradient, state.opt_state, state.params)
    metrics = {f"losses/{name}": value for name, value in losses.items()}
    metrics["charts/grad_norm"] = optax.global_norm(gradient)
    first = state.step % args.log_every == 0
    sums = {name: jnp.where(first, 0, state.sums[name]) + metrics[name] for name in MODEL_METRICS}
    params = optax.apply_updates(state.params, delta)
    return ModelState(params, opt_state, state.step + 1, sums), losses["total"]


def mean_of_members(trees: list[dict]) -> dict:
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *jax.device_get(trees))


def predict_frames(network: WorldModel, params, windows: Windows) -> jax.Array:
    """Images [B, HORIZON, 84, 84] of a member after CONTEXT frames of windows [B, T].

    Open loop: it sees the logged actions, and every latent is the prior's mode.
    """
    states, _, _ = observe(network, params, jax.tree.map(lambda x: x[:, :CONTEXT], windows))

    def step(state, action):
        state = imagine(network, params, state, action)
        return state, state

    action = windows.action[:, CONTEXT : CONTEXT + HORIZON].T
    _, states = jax.lax.scan(step, jax.tree.map(lambda x: x[:, -1], states), action)
    images = network.apply(params, states, method="decode").image
    return jnp.moveaxis(images, 0, 1)


@partial(jax.jit, static_argnames=("network", "args"))
def evaluate_member(params, windows: Windows, key, network: WorldModel, args: Args):
    """Held-out losses and prediction errors of a member on windows [B, T].

    Returns:
      Sums of the losses over the windows; sums over the windows inside one episode (and their
      number) of the mean squared error of a pixel, for predictions and for copies of the last
      frame; the predictions, uint8 [B, HORIZON, 84, 84].
    """
    _, losses = world_model_loss(params, windows, key, network, args)
    predicted = predict_frames(network, params, windows)
    image = to_image(windows.frame[:, : CONTEXT + HORIZON])
    inside = ~jnp.any(windows.is_first[:, 1 : CONTEXT + HORIZON], axis=1)  # [B]
    error = jnp.mean((predicted - image[:, CONTEXT:]) ** 2, axis=(2, 3))  # [B, H]
    copy_error = jnp.mean((image[:, CONTEXT - 1, None] - image[:, CONTEXT:]) ** 2, axis=(2, 3))
    sums = {f"heldout/{k}": x * windows.action.shape[0] for k, x in losses.items()}
    for name, errors in (("error", error), ("copy_error", copy_error)):
        for step in (1, 5, HORIZON):
            sums[f"heldout/{name}_{step}"] = jnp.sum(errors[:, step - 1] * inside)
    return sums, jnp.sum(inside), to_frame(predicted)


def draw_predictions(windows: Windows, predicted: np.ndarray, path: Path, count: int = 4) -> None:
    """Writes world_model.png: real frames above the context and the predictions that follow it.

    windows [B, T], predicted uint8 [B, HORIZON, 84, 84]; those inside one episode first.
    """
    crossing = windows.is_first[:, 1 : CONTEXT + HORIZON].any(axis=1)
    rows = []
    for i in np.argsort(crossing, kind="stable")[:count]:
        real = windows.frame[i, : CONTEXT + HORIZON]
        for frames in (real, np.concatenate([real[:CONTEXT], predicted[i]])):
            frames = np.pad(frames, ((0, 0), (1, 1), (1, 1)), constant_values=64)
            line = np.full((86, 6), 255, np.uint8)  # between context and predictions
            rows.append(np.hstack([*frames[:CONTEXT], line, *frames[CONTEXT:]]))
        rows.append(np.full((8, rows[0].shape[1]), 255, np.uint8))
    cv2.imwrite(str(path), np.vstack(rows))


def warn_if_slow(seconds: float, args: Args) -> None:
    days = seconds * args.model_updates / 86400
    if days > 1:
        tqdm.write(
            f"An update of the world model takes {seconds:.1f} s here, {args.model_updates:,} take "
            f"{days:.0f} days: use an accelerator, or a smaller --depth, --deter, --members, "
            "--model-batch-size, --model-length or --model-updates.",
            file=sys.stderr,
        )


def last_improvement(reference: np.ndarray, loss: float, step: int, least: float) -> np.ndarray:
    """(loss, step) of the last evaluation whose loss was lower than the one before by `least`."""
    return np.array([loss, step]) if loss < reference[0] * (1 - least) else reference


def load_world_model(folder: Path, network: WorldModel, sharding: NamedSharding, args: Args):
    """The members in the folder of a world model, or one sentence about why they are not there."""
    if not (folder / "members").is_dir() or not (folder / "config.json").exists():
        raise SystemExit(f"There is no trained world model in {folder}; see --world-model.")
    theirs = json.loads((folder / "config.json").read_text())["args"]
    ours = vars(args)
    changes = [f"{k} {theirs.get(k)}" for k in MODEL_SIZES if theirs.get(k) != ours[k]]
    if theirs["env_id"] != args.env_id:
        raise SystemExit(f"{folder} is a world model of {theirs['env_id']}, not of {args.env_id}.")
    if changes:
        raise SystemExit(f"{folder} is a world model with {', '.join(changes)}: give the same.")
    like = jax.eval_shape(partial(init_member, network=network), jax.random.key(args.seed))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((args.members, *x.shape), x.dtype, sharding=sharding), like
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve() / "members", like)


def checksum(params) -> int:
    """CRC-32 of parameters: a policy's run does not go on with another world model."""
    crc = 0
    for leaf in jax.tree.leaves(params):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return crc


def train_world_model(
    args: Args, store: Store, network: WorldModel, mesh: jax.sharding.Mesh, folder: Path
):
    """Trains the ensemble in a run of its own -> parameters, each leaf [members, ...].

    The same arguments find the folder again, and go on or load what is finished.
    """
    run_args = dataclasses.replace(args, run_dir=folder, total_updates=args.model_updates)
    run = Run(run_args, [args.seed])
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    if (folder / "members").is_dir() and not args.overwrite:
        return load_world_model(folder, network, replicated, args)
    learn, heldout = split_store(store, args.heldout_percent, args.seed)
    init_key, update_key, eval_key = jax.random.split(jax.random.key(args.seed), 3)
    update_keys, eval_keys = (jax.random.split(k, args.members) for k in (update_key, eval_key))

    params = init_members(init_key, network, args.members)
    # Most of a frame never changes: the decoder starts from the mean of some frames.
    frames = sample_batch(learn, args.seed, 0, 512, 1).frames[:, 3]
    background = np.tile(np.mean(to_image(frames), axis=0).ravel(), (args.members, 1))
    params["params"]["decoder"]["background"] = jnp.asarray(background)
    states = []
    for i in range(args.members):
        member = jax.tree.map(operator.itemgetter(i), params)
        sums = {name: jnp.float32(0) for name in MODEL_METRICS}
        states += [ModelState(member, model_optimizer(args).init(member), jnp.int32(0), sums)]
    states = jax.device_put(states, replicated)
    reference = np.array([np.inf, 0])  # held-out loss and update of the last improvement
    data = {k: v for k, v in store.meta.items() if k != "crc32"}
    done, (states, reference) = run.start((states, reference), data, dtype=str(network.dtype))

    share = args.model_batch_size // jax.process_count()

    def windows(store: Store, step: int, length: int, members: int) -> list[Windows]:
        """This process's part of windows [B, T] for each member, number `step` of the store."""
        rows = members * share * jax.process_index()
        rows, size = slice(rows, rows + members * share), members * args.model_batch_size
        batch = sample_batch(store, args.seed, step, size, length + 1, rows)
        x = model_windows(batch, args.clip_rewards)
        return [
            jax.tree.map(operator.itemgetter(slice(i, None, members)), x) for i in range(members)
        ]

    def put(tree):
        return jax.tree.map(partial(jax.make_array_from_process_local_data, by_device), tree)

    length = max(args.model_length, CONTEXT + HORIZON)
    heldout = [windows(heldout, i, length, 1)[0] for i in range(args.model_eval_batches)]

    def heldout_metrics() -> dict:
        """Of the parameters now; also draws world_model.png."""
        total, count = Counter(), 0
        for i, x in enumerate(heldout):
            x_on_device, outputs = put(x), []
            for state, key in zip(states, eval_keys, strict=True):
                y = evaluate_member(state.params, x_on_device, key, network, args)
                outputs += [multihost_utils.process_allgather(y, tiled=True)]
            total.update(mean_of_members([sums for sums, *_ in outputs]))
            _, inside, predicted = outputs[0]
            count += inside
            if i == 0 and run.writes:
                draw_predictions(x, predicted, folder / "world_model.png")
        windows = args.model_batch_size * args.model_eval_batches
        counts = {k: count if "error" in k else windows for k in total}
        return {k: v / counts[k] for k, v in total.items() if counts[k]}

    bar = tqdm(
        desc="world model",
        total=args.model_updates,
        initial=done,
        disable=not (run.writes and sys.stderr.isatty()),
    )
    load = lambda step: put(windows(learn, step, args.model_length, args.members))  # noqa: E731
    batches = load_batches(load, done, args.loader_threads)
    evaluated, losses, waited = "", None, 0.0
    window_start, window_first = time.perf_counter(), done
    while done < args.model_updates and done - reference[1] < args.model_patience:
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        previous_losses, losses = losses, [None] * args.members
        for i, x in enumerate(batch):
            states[i], losses[i] = update_member(states[i], x, update_keys[i], network, args)
        done += 1
        jax.block_until_ready(previous_losses)  # so that at most one batch waits on the device
        bar.update()
        if done == 2 and window_first == 0:
            warn_if_slow(time.perf_counter() - before, args)
        if done % args.log_every == 0:
            sums = mean_of_members([state.sums for state in states])
            metrics = {name: value / args.log_every for name, value in sums.items()}
            seconds = time.perf_counter() - window_start
            metrics["charts/updates_per_second"] = (done - window_first) / seconds
            metrics["charts/data_wait"] = waited / seconds  # share of the time
            run.log(done, args.seed, metrics)
            status = f"loss {metrics['losses/total']:.3f}{evaluated}"
            bar.set_postfix_str(status)
            if bar.disable and run.writes:
                print(f"world model, update {done:,}: {status}", flush=True)
        score = None
        if done % args.model_eval_every == 0 or done == args.model_updates:
            metrics = heldout_metrics()
            score = -metrics["heldout/total"]
            reference = last_improvement(reference, -score, done, args.model_min_improvement)
            run.log(done, args.seed, metrics)
            evaluated = f", held-out {-score:.3f}"
            if run.wandb:
                import wandb

                picture = wandb.Image(str(folder / "world_model.png"))
                run.wandb.log({"world_model": picture}, step=done)
        stopping = run.stopping
        if jax.process_count() > 1:  # they agree to stop, at a line of the log
            agreed = done % args.log_every == 0 and multihost_utils.process_allgather(stopping)
            stopping = bool(np.any(agreed))
        if stopping or score is not None:
            run.check_loss(done, float(sum(losses)))
            run.save(done, (states, reference), score)
        if stopping:
            run.exit(done)
        if done % args.log_every == 0 or score is not None:
            waited, window_start, window_first = 0.0, time.perf_counter(), done
    batches.close()
    bar.close()
    evaluations = [(x["heldout/total"], x["update"]) for x in run.lines() if "heldout/total" in x]
    total, best = min(evaluations, default=(0.0, 0))
    best = int(multihost_utils.broadcast_one_to_all(np.int32(best)))  # the first process wrote them
    run.checkpoints.wait_until_finished()
    saved = {"state": ocp.args.StandardRestore((states, reference))}
    saved = run.checkpoints.restore(best, args=ocp.args.Composite(**saved))
    params = jax.tree.map(lambda *x: jnp.stack(x), *(state.params for state in saved.state[0]))
    final = {"final/updates": done, "final/best_update": best, "final/heldout_total": total}
    run.log(done, args.seed, final)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "members", params)
    if run.stopping:
        run.exit(done)
    run.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # until the next run takes over
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return params


# --- end world model training ---


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


# --- CQL network (identical in cql_atari.py and combo_atari.py) ---
class CQLNetwork(nn.Module):
    """The representation and the prediction function with a head for Q (D.2.1, Fig. 5d)."""

    num_actions: int
    num_bins: int
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, observation):
        """Observations uint8 [..., 84, 84, 4] -> logits of Q [..., actions, bins], float32."""
        x = Representation(self.channels, self.dtype)(observation)
        for _ in range(2):
            x = ResidualBlock(self.channels, self.dtype)(x)
        x = Head(self.channels, self.num_actions * self.num_bins, self.dtype)(x)
        return x.reshape(*x.shape[:-1], self.num_actions, self.num_bins)


def make_network(num_actions: int, args: Args) -> CQLNetwork:
    on_cpu = jax.default_backend() == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    return CQLNetwork(num_actions, args.num_bins, args.channels, jnp.dtype(dtype))


# --- end CQL network ---


# --- value transform (identical in rosmo_*.py, muzero_*.py, crr_*.py, cql_*.py, combo_*.py) ---
def transform(x):
    """h(x) = sign(x)(√(|x| + 1) - 1) + εx, ε = 0.001 (Appendix A.2, where a bracket slipped)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + 0.001 * x


def inverse_transform(y):
    """The inverse of h, written without the difference of near numbers in its usual form."""
    u = jnp.abs(y) + 1 + 0.001
    return jnp.sign(y) * ((2 * u / (1 + jnp.sqrt(1 + 4 * 0.001 * u))) ** 2 - 1)


def two_hot(x, num_bins: int):
    """φ(h(x)): values [...] -> probabilities [..., bins] of the two integers nearest to h(x)."""
    limit = (num_bins - 1) // 2
    y = jnp.clip(transform(x), -limit, limit)
    return jnp.maximum(0, 1 - jnp.abs(y[..., None] - (jnp.arange(num_bins) - limit)))


def to_scalar(logits):
    """Logits [..., bins] -> values [...], the expectation mapped back through h."""
    num_bins = logits.shape[-1]
    support = jnp.arange(num_bins) - (num_bins - 1) // 2
    return inverse_transform(jnp.sum(jax.nn.softmax(logits) * support, axis=-1))


# --- end value transform ---


# --- cross entropy (identical in crr_*.py, cql_*.py and combo_atari.py) ---
def cross_entropy(target, logits):
    """-Σ target log softmax(logits) over the last axis."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


# --- end cross entropy ---


# --- conservative penalty (identical in cql_*.py and combo_atari.py) ---
def conservative_gap(q, action):
    """log Σ exp Q(s, ·) - Q(s, a): values [B, actions], logged actions [B] -> [B]."""
    return jax.nn.logsumexp(q, axis=-1) - jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]


# --- end conservative penalty ---


def model_rows(args: Args) -> int:
    """Transitions of a batch that come from rollouts."""
    return round(args.batch_size * args.model_share)


def combo_loss(params, target_params, batch: Batch, network: CQLNetwork, args: Args):
    """The loss of Q-learning and the penalty on transitions, windows of two steps.

    The last `model_rows` transitions come from the model. With --push-up mix this is CQL's loss.

    Returns:
      Their sum and a dictionary of scalars to log.
    """
    action, moving = batch.action[:, 0], ~batch.is_last[:, 0]  # [B]
    observation, next_observation = (stack_frames(batch.frames, batch.history, t) for t in (0, 1))
    reward = jnp.clip(batch.reward, -1, 1) if args.clip_rewards else batch.reward
    next_q = jnp.max(to_scalar(network.apply(target_params, next_observation)), axis=-1)
    bootstrap = jnp.where(batch.is_terminal[:, 1], 0.0, next_q)
    y = jax.lax.stop_gradient(reward[:, 0] + args.discount * bootstrap)  # [B]

    logits = network.apply(params, observation)  # [B, actions, bins]
    logits_logged = jnp.take_along_axis(logits, action[:, None, None], axis=1)[:, 0]
    td_loss = cross_entropy(two_hot(y, args.num_bins), logits_logged)
    q = to_scalar(logits)  # [B, actions]
    gap = conservative_gap(q, action)
    q_logged = jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]

    # mean_mix log Σ exp Q(s, ·) - mean_real Q(s, a), both as a mean over the mix
    is_real = jnp.arange(args.batch_size) < args.batch_size - model_rows(args)  # [B]
    push_up = is_real / jnp.mean(is_real) if args.push_up == "real" else 1.0
    penalty = gap + (1 - push_up) * q_logged  # log Σ exp Q(s, ·) - push_up · Q(s, a)

    losses = {
        "losses/td": jnp.mean(td_loss * moving),
        "losses/conservative": args.cql_alpha * jnp.mean(penalty * moving),
    }
    total = sum(losses.values())
    metrics = losses | {
        "losses/total": total,
        "charts/q": jnp.mean(q_logged * moving),
        "charts/q_target": jnp.mean(y * moving),
        "charts/q_min": jnp.min(jnp.where(moving[:, None], q, jnp.inf)),
        "charts/gap": jnp.mean(gap * moving),
        "charts/model_share": jnp.sum(moving & ~is_real) / jnp.sum(moving),
    }
    for name, rows in (("real", moving & is_real), ("model", moving & ~is_real)):
        for part, values in (("q", q_logged), ("gap", gap), ("reward", reward[:, 0])):
            metrics[f"charts/{part}_{name}"] = jnp.sum(values * rows) / jnp.maximum(1, rows.sum())
    return total, metrics


METRICS = (
    "losses/td",
    "losses/conservative",
    "losses/total",
    "charts/q",
    "charts/q_real",
    "charts/q_model",
    "charts/q_target",
    "charts/q_min",
    "charts/gap",
    "charts/gap_real",
    "charts/gap_model",
    "charts/reward_real",
    "charts/reward_model",
    "charts/model_share",
    "charts/grad_norm",
)


class Starts(NamedTuple):
    """What a rollout needs of the data: N for each of E members."""

    windows: Windows  # [N, E, W], up to the frame o_0 from which the rollout starts
    frames: Any  # uint8 [N, E, 4, 84, 84], o_0 and the three before it
    history: Any  # uint8 [N, E, 1], how many of those are of the episode
    is_last: Any  # bool [N, E], the episode ends at o_0


class Rollouts(NamedTuple):
    """The last G generations of rollouts of L steps, a ring; N of each of E members."""

    frames: Any  # uint8 [G, N, E, 4 + L, 84, 84], the first state's stack, then o_1 .. o_L
    action: Any  # int32 [G, N, E, L], a_0 .. a_{L-1}
    reward: Any  # float32 [G, N, E, L], follows the action
    counts: Any  # bool [G, N, E, L], the rollout had not ended before the action
    terminal: Any  # bool [G, N, E, L], it ends after the action


def empty_rollouts(args: Args) -> Rollouts:
    """Rollouts that do not count."""
    rollouts = (args.rollout_starts // args.members, args.members)
    shape = (args.rollout_generations, *rollouts, args.rollout_length)
    frames = jnp.zeros((*shape[:3], 4 + args.rollout_length, 84, 84), jnp.uint8)
    types = (jnp.int32, jnp.float32, bool, bool)
    return Rollouts(frames, *(jnp.zeros(shape, dtype) for dtype in types))


def load_starts(store: Store, generation: int, args: Args, rows: slice = slice(None)) -> Starts:
    """The starts of a generation, or those `rows` of it: any steps of the data, drawn at random."""
    number = 2**31 + generation  # far from the numbers of the batches
    length = args.rollout_warm_up + 1
    batch = sample_batch(store, args.seed, number, args.rollout_starts, length, rows)
    windows = model_windows(batch, args.clip_rewards)
    starts = Starts(windows, batch.frames[:, -4:], batch.history[:, -1:], batch.is_last[:, -1])
    return jax.tree.map(lambda x: x.reshape(-1, args.members, *x.shape[1:]), starts)


def epsilon_greedy(q, key, epsilon: float):
    """Actions [B] with the highest of the values [B, actions]; the part `epsilon` is random."""
    best, random_key = jnp.argmax(q, axis=-1), jax.random.fold_in(key, 1)
    explore = jax.random.bernoulli(key, epsilon, best.shape)
    return jnp.where(explore, jax.random.randint(random_key, best.shape, 0, q.shape[-1]), best)


@partial(jax.jit, static_argnames=("network", "world_model", "args"), donate_argnames="rollouts")
def add_rollouts(
    rollouts: Rollouts,
    starts: Starts,
    slot,
    replay,
    params,
    members,
    key,
    network: CQLNetwork,
    world_model: WorldModel,
    args: Args,
) -> tuple[Rollouts, jax.Array]:
    """Predicts a generation and puts it into a slot of the ring.

    Args:
      replay: takes the actions that are in the slot, whatever Q would do now.
      params: of Q.
      members: parameters of the world model, each leaf [E, ...].
      key: belongs to the generation.

    Returns:
      The rollouts, and the share of the generation's steps that come after an end.
    """

    def roll_out(member, starts, given, key):
        """Rollouts [N] of one member; given [N, L]: the actions of a replay."""
        filter_key, key = jax.random.split(key)
        states, _, _ = observe(world_model, member, starts.windows, filter_key)
        stack = stack_frames(starts.frames, starts.history, 0)  # [N, 84, 84, 4]

        def step(carry, inputs):
            state, stack, running = carry
            given, key = inputs
            act_key, latent_key = jax.random.split(key)
            q = to_scalar(network.apply(params, stack))
            chosen = epsilon_greedy(q, act_key, args.rollout_epsilon)
            action = jnp.where(replay, given, chosen)
            state = imagine(world_model, member, state, action, latent_key)
            decoded = world_model.apply(member, state, method="decode")
            frame, terminal = to_frame(decoded.image), decoded.terminal_logit > 0  # p > 0.5
            stack = jnp.concatenate([stack[..., 1:], frame[..., None]], axis=-1)
            outputs = (frame, action, decoded.reward, running, terminal)
            return (state, stack, running & ~terminal), outputs

        carry = (jax.tree.map(lambda x: x[:, -1], states), stack, ~starts.is_last)
        inputs = (given.T, jax.random.split(key, args.rollout_length))
        _, outputs = jax.lax.scan(step, carry, inputs)
        frames, *steps = (jnp.moveaxis(x, 0, 1) for x in outputs)
        return Rollouts(jnp.concatenate([jnp.moveaxis(stack, -1, 1), frames], axis=1), *steps)

    given, keys = rollouts.action[slot], jax.random.split(key, args.members)
    new = jax.vmap(roll_out, in_axes=(0, 1, 1, 0), out_axes=1)(members, starts, given, keys)
    rollouts = jax.tree.map(lambda x, y: x.at[slot].set(y), rollouts, new)
    return rollouts, jnp.mean(~new.counts)


def mix_batch(real: Batch, rollouts: Rollouts, key, args: Args) -> Batch:
    """Logged transitions [B - M], then M that are drawn from those of the rollouts that count."""
    order = jnp.cumsum(rollouts.counts)
    rank = jax.random.randint(key, (model_rows(args),), 0, order[-1])
    index = jnp.searchsorted(order, rank, side="right")
    *rollout, time = index = jnp.unravel_index(index, rollouts.counts.shape)
    window = (*(i[:, None] for i in rollout), time[:, None] + jnp.arange(5))  # [M, 5]
    pair = lambda now, after: jnp.stack([now, after], axis=1)  # noqa: E731
    none, terminal = jnp.zeros(time.shape, bool), rollouts.terminal[index]
    model = Batch(
        frames=rollouts.frames[window],
        history=jnp.full((*time.shape, 2), 3, jnp.uint8),  # the zeros before an episode are there
        action=pair(rollouts.action[index], 0 * time),
        reward=pair(rollouts.reward[index], 0.0 * time),
        is_first=pair(none, none),
        is_last=pair(~rollouts.counts[index], terminal),
        is_terminal=pair(none, terminal),
    )
    return jax.tree.map(lambda *x: jnp.concatenate(x), real, model)


class TrainState(NamedTuple):
    params: Any
    target_params: Any
    opt_state: Any
    step: Any  # int32, updates done
    sums: Any  # of the metrics since the last multiple of log_every


# --- optimizer (identical in rosmo_*.py, muzero_unplugged_*.py, bc_*.py and c*_*.py) ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    learning_rate = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, 1_000, 100_000, args.learning_rate_decay, staircase=True
    )
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, weight_decay=args.weight_decay, mask=is_weight)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


# --- end optimizer ---


def init_state(key, network: CQLNetwork, args: Args) -> TrainState:
    params = network.init(key, jnp.zeros((84, 84, 4), jnp.uint8))
    sums = {name: jnp.float32(0) for name in METRICS}
    return TrainState(params, params, make_optimizer(args).init(params), jnp.int32(0), sums)


@partial(jax.jit, static_argnames=("network", "args"), donate_argnames="state")
def update(state: TrainState, batch: Batch, network: CQLNetwork, args: Args):
    """One update -> (state, loss); the batch is shared out to the devices, the state is not."""
    gradient, metrics = jax.grad(combo_loss, has_aux=True)(
        state.params, state.target_params, batch, network, args
    )
    metrics["charts/grad_norm"] = optax.global_norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    params, step = optax.apply_updates(state.params, delta), state.step + 1
    target_params = optax.periodic_update(
        params, state.target_params, step, args.target_update_every
    )
    first = state.step % args.log_every == 0
    sums = {name: jnp.where(first, 0, state.sums[name]) + metrics[name] for name in METRICS}
    return TrainState(params, target_params, opt_state, step, sums), metrics["losses/total"]


@partial(jax.jit, static_argnames=("greedy", "network", "args"))
def act(params, observation, key, greedy: bool, network: CQLNetwork, args: Args):
    """Actions [E] for observations [E, ...] with the highest Q; if not greedy, a few are random."""
    q = to_scalar(network.apply(params, observation))
    return epsilon_greedy(q, key, 0.0 if greedy else args.eval_epsilon)


def check_args(args: Args) -> None:
    """Ends the program with one sentence if an argument is out of its range."""
    leasts = {"seed": 0, "channels": 2, "num_bins": 3}
    for name, value in vars(args).items():
        if type(value) is int and value < (least := leasts.get(name, 1)):
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; give at least {least}.")
    if not 0 <= args.discount <= 1:
        raise SystemExit(f"--discount is {args.discount:g}; give a factor from 0 to 1.")
    if not 0 < args.heldout_percent < 100:
        raise SystemExit(
            f"--heldout-percent is {args.heldout_percent}; give a share between 0 and 100."
        )
    if args.model_patience < args.model_eval_every:
        raise SystemExit(
            f"--model-patience {args.model_patience} is less than --model-eval-every "
            f"{args.model_eval_every}: no update would be evaluated."
        )
    if not 0 <= args.kl_balance <= 1 or args.kl_coef < 0:
        raise SystemExit("--kl-balance must be from 0 to 1 and --kl-coef at least 0.")
    if args.cql_alpha < 0 or not 0 <= args.eval_epsilon <= 1 or not 0 <= args.rollout_epsilon <= 1:
        raise SystemExit(
            "--cql-alpha must be at least 0, --eval-epsilon and --rollout-epsilon from 0 to 1."
        )
    if not 0 < model_rows(args) < args.batch_size:
        raise SystemExit(
            f"--model-share {args.model_share} of --batch-size {args.batch_size} leaves no logged "
            "or no predicted transitions; cql_atari.py is COMBO without the latter."
        )
    if args.eval_every % args.log_every:
        raise SystemExit(
            f"--eval-every {args.eval_every} must be a multiple of --log-every {args.log_every}."
        )
    if args.rollout_starts % args.members:
        raise SystemExit(
            f"--rollout-starts {args.rollout_starts} must be a multiple of --members "
            f"{args.members}."
        )
    for name, number in (
        ("--model-batch-size", args.model_batch_size),
        ("--batch-size times --model-share", model_rows(args)),
        ("--batch-size times 1 - --model-share", args.batch_size - model_rows(args)),
        ("--rollout-starts / --members", args.rollout_starts // args.members),
    ):
        if number % jax.device_count():
            raise SystemExit(
                f"{name} is {number}, which cannot be shared by {jax.device_count()} devices; "
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


def warn_if_updates_are_slow(seconds: float, args: Args) -> None:
    days = seconds * args.total_updates / 86400
    if days > 1:
        tqdm.write(
            f"An update of Q takes {seconds:.1f} s here, all {args.total_updates:,} would take "
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
    world_model = make_world_model(store.meta["num_actions"], args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    if args.world_model:
        members = load_world_model(args.world_model, world_model, replicated, args)
    else:
        folder = Path(f"{run.dir}-world-model")
        members = train_world_model(args, store, world_model, mesh, folder)

    init_key = jax.random.key(args.seed)  # Q starts as in cql_atari.py
    rollout_key, mix_key = jax.random.split(jax.random.fold_in(init_key, 1))
    state = jax.jit(init_state, static_argnums=(1, 2), out_shardings=replicated)(
        init_key, network, args
    )
    ring = NamedSharding(mesh, P(None, "data"))
    rollouts = jax.jit(empty_rollouts, static_argnums=0, out_shardings=ring)(args)
    mix = jax.jit(mix_batch, static_argnames="args", out_shardings=by_device)
    data = {k: v for k, v in store.meta.items() if k != "crc32"}
    data["world_model_crc32"] = checksum(members)
    facts = {"dtype": str(network.dtype), "rom": rom_digest(args.env_id)}
    # The actions are all of the rollouts that cannot be predicted again: Q has changed since.
    done, (state, actions) = run.start((state, rollouts.action), data, **facts)
    rollouts = rollouts._replace(action=actions)

    def rows_of(number: int) -> slice:
        share = number // jax.process_count()
        return slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def put(tree):
        return jax.tree.map(partial(jax.make_array_from_process_local_data, by_device), tree)

    logged, length = args.batch_size - model_rows(args), 2

    def load(step: int) -> Batch:
        batch = sample_batch(store, args.seed, step, logged, length, rows_of(logged))
        if args.truncation_as_termination:
            batch = batch._replace(is_terminal=batch.is_last)
        return put(batch)

    def load_generation(generation: int) -> Starts:
        return put(load_starts(store, generation, args, rows_of(args.rollout_starts)))

    def predict(generation: int, replay: bool) -> tuple[Rollouts, jax.Array]:
        key = jax.random.fold_in(rollout_key, generation)
        slot = generation % args.rollout_generations
        inputs = (rollouts, next(starts), slot, replay, state.params, members, key)
        return add_rollouts(*inputs, network, world_model, args)

    def policy(greedy: bool) -> Callable:
        params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
        return partial(act, params, greedy=greedy, network=network, args=args)

    def play(num_episodes: int, greedy: bool) -> np.ndarray:
        seed = int(np.random.default_rng((args.seed, done)).integers(2**31))
        return np.array(evaluate(policy(greedy), args.env_id, num_episodes, seed))

    bar = tqdm(
        desc="Q",
        total=args.total_updates,
        initial=done,
        disable=not (run.writes and sys.stderr.isatty()),
    )
    generations = -(-done // args.rollout_every)  # that were made before
    oldest = max(0, generations - args.rollout_generations)
    starts = load_batches(load_generation, oldest, 1, ahead=1)
    for generation in range(oldest, generations):
        rollouts, masked = predict(generation, replay=True)
    batches = load_batches(load, done, args.loader_threads)
    played, loss, waited = "", None, 0.0
    window_start, window_first = time.perf_counter(), done
    while done < args.total_updates:
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        if done % args.rollout_every == 0:
            rollouts, masked = predict(done // args.rollout_every, replay=False)
        previous_loss = loss
        batch = mix(batch, rollouts, jax.random.fold_in(mix_key, done), args=args)
        state, loss = update(state, batch, network, args)
        done += 1
        jax.block_until_ready(previous_loss)  # so that at most one batch waits on the device
        bar.update()
        if done == 2 and window_first == 0:
            warn_if_updates_are_slow(time.perf_counter() - before, args)
        if done % args.log_every == 0:
            metrics = {k: v / args.log_every for k, v in jax.device_get(state.sums).items()}
            metrics["charts/masked"] = masked
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
            run.save(done, (state, rollouts.action), score)
        if stopping:
            run.exit(done)
        if done % args.log_every == 0:
            waited, window_start, window_first = 0.0, time.perf_counter(), done
    batches.close()
    starts.close()
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
