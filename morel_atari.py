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
"""MOReL on Atari (Kidambi et al., 2020), a baseline of ROSMO.

MOReL learns an ensemble of world models from logged episodes. The members disagree where the data
do not reach: there the pessimistic MDP halts with a penalty, so that a policy that PPO trains
inside it is kept on known ground. A member is a recurrent state-space model with categorical
latents (DreamerV2: Hafner et al., 2021).

    python morel_atari.py --env-id MsPacman                         # the paper's setting
    python morel_atari.py --env-id MsPacman --world-model FOLDER    # of another run

The world model is a run of its own in {run folder}-world-model: config.json, metrics.jsonl,
checkpoints/, members/ (the trained ensemble) and world_model.png, real frames above open-loop
predictions. The paper (F.1) names the parts, not their sizes: the rest is our reconstruction.
1. Frames stay 84 x 84; the decoder's kernels are 7, 6, 6, 6 for that size, and it predicts the
   difference from a learned image, at first the data's mean. The model sees intensity / 255 - 0.5.
2. The members differ in their first parameters and in their batches. Each is clipped on its own.
3. Windows start at any step and go on into the next episode, where the state is reset; a window
   that starts inside an episode begins with an empty state and the action before it.
4. Training ends when the loss on held-out episodes has not fallen by 0.5% for 10,000 updates. The
   ensemble is that of the evaluation with the lowest held-out loss.
5. Rewards are clipped to [-1, 1] (--no-clip-rewards).
6. AdamW decays weight matrices only.
7. Members share no latent coordinates, so that they are compared in what they predict: the next
   frame and the reward. The prior's mode stands for its distribution.
8. The policy sees four decoded frames, as in the game, and is evaluated without the model.
9. The episode's own member fixes frame, reward and end; the others filter its frames.
10. An update is an iteration of PPO with CleanRL's values for Atari. A minibatch has as many steps
    of each imagined episode as any other.
11. The policy starts at random or, with --bc-updates, imitates the data first.
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
    """seed of the parameters, the batches, the imagined episodes and the evaluation"""
    total_updates: int = 1_250
    """number of updates of the policy, each an iteration of PPO"""
    log_every: int = 10
    """updates, of the world model and of the policy, over which the logged losses are averaged"""
    checkpoint_every: int = 50
    """updates of the policy between two checkpoints"""
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the networks (auto: bfloat16 on accelerators); the rest is always float32"""

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

    # pessimistic MDP
    discrepancy: Literal["frame", "block"] = "frame"
    """members are compared on whole frames, or on the 7 x 7 block where they differ most"""
    halt_quantile: float = 0.999
    """part of the steps of replayed logged episodes that do not halt"""
    halt_batches: int = 16
    """batches of such replays from which the threshold is taken"""
    halt_penalty: float = -10.0
    """reward of a step that halts"""
    horizon: int = 50
    """steps after which an imagined episode is cut off"""
    warm_up: int = 16
    """logged frames that the members filter, up to the one from which an episode starts"""
    starts: int = 4
    """starts for each imagined episode in an update; used again if more are needed"""

    # policy (D.2.1)
    channels: int = 64
    """channels of the residual blocks; the rest of the policy's network scales with it"""

    # behavior cloning
    bc_updates: int = 0
    """updates for which the policy imitates the logged actions, before PPO"""
    bc_batch_size: int = 256
    """logged steps in a batch, over all devices"""
    bc_learning_rate: float = 7e-4
    """Adam's learning rate"""

    # PPO
    batch_size: int = 64
    """imagined episodes side by side, over all devices"""
    rollout_length: int = 128
    """steps of each in an update"""
    epochs: int = 4
    """passes over these steps"""
    minibatches: int = 4
    """gradient steps of a pass"""
    learning_rate: float = 2.5e-4
    """Adam's learning rate at first"""
    anneal_updates: int = 1_250
    """updates over which it falls to zero, at least --total-updates"""
    max_grad_norm: float = 0.5
    """largest global norm of the gradient"""
    discount: float = 0.99
    """discount factor γ"""
    gae_lambda: float = 0.95
    """λ of the generalised advantage"""
    clip_ratio: float = 0.1
    """ε, change of an action's probability ratio beyond which its gradient is cut"""
    entropy_coef: float = 0.01
    """weight of the entropy"""
    value_coef: float = 0.5
    """weight of the value's loss"""

    # evaluation
    eval_every: int = 50
    """updates of the policy between two evaluations, a multiple of --log-every"""
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


class PolicyNetwork(nn.Module):
    """Policy and value on the representation of the other methods (D.2.1)."""

    num_actions: int
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, observation):
        """Observations uint8 [..., 84, 84, 4] -> logits [..., actions], values [...], float32."""
        x = Representation(self.channels, self.dtype)(observation)
        logits = Head(self.channels, self.num_actions, self.dtype)(x)
        return logits, Head(self.channels, 1, self.dtype)(x)[..., 0]


class Imagined(NamedTuple):
    """Imagined episodes [B], side by side."""

    state: State  # [B, E, ...], of every member
    frames: jax.Array  # uint8 [B, 84, 84, 4], what the policy sees, newest last
    member: jax.Array  # int32 [B], k, the member in whose world the episode takes place
    steps: jax.Array  # int32 [B], since the start
    reward_sum: jax.Array  # float32 [B], of these steps


class Outcome(NamedTuple):
    """What a step of the pessimistic MDP led to, [B]."""

    reward: jax.Array
    halted: jax.Array  # bool
    terminated: jax.Array  # bool, halted or in a terminal state
    ended: jax.Array  # bool, terminated or cut off at the horizon
    discrepancy: jax.Array


class Transitions(NamedTuple):
    """Steps of imagined episodes [B, T]."""

    frames: jax.Array  # uint8 [B, T, 84, 84, 4], before the step
    action: jax.Array  # int32
    log_prob: jax.Array  # log π(a|s) when it was taken
    value: jax.Array  # v(s)
    reward: jax.Array
    terminated: jax.Array  # bool
    ended: jax.Array  # bool
    next_value: jax.Array  # v(s') of the state that the step led to


def pick(tree, index):
    """x[b, index[b]] of every leaf [B, N, ...], for indices [B, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


def discrepancy(image, reward, block: int):
    """max_{i<j} ‖f_i - f_j‖, f = [vec(x) / √pixels, r], of the members' predictions -> [...].

    Args:
      image: [E, ..., 84, 84]; reward: [E, ...].
      block: side of x, the block of the image where the distance is largest; 84 is all of it.
    """
    image = image.reshape(*image.shape[:-2], 84 // block, block, 84 // block, block)
    i, j = np.triu_indices(len(reward), 1)  # the pairs
    squares = jnp.mean((image[i] - image[j]) ** 2, axis=(-3, -1))  # [pairs, ..., rows, columns]
    squares += ((reward[i] - reward[j]) ** 2)[..., None, None]
    return jnp.sqrt(jnp.max(squares, axis=(0, -2, -1)))


def start_episodes(network: WorldModel, params, windows: Windows, member) -> Imagined:
    """Episodes in the worlds of `member` [B] from the last frames of windows [B, warm_up]."""
    states = jax.vmap(lambda p: observe(network, p, windows)[0], out_axes=1)(params)
    # Frames from before the start of the game's episode are zero, as in the environment.
    later = jnp.cumsum(windows.is_first[:, ::-1], axis=1)[:, ::-1] - windows.is_first
    own = (later == 0)[:, -4:, None, None]
    frames = jnp.moveaxis(jnp.where(own, windows.frame[:, -4:], 0), 1, -1)
    steps = jnp.zeros_like(member)
    state = jax.tree.map(lambda x: x[:, :, -1], states)
    return Imagined(state, frames, member, steps, steps.astype(jnp.float32))


def imagined_step(
    network: WorldModel, params, env: Imagined, action, threshold, args: Args
) -> tuple[Imagined, Outcome]:
    """A step of the pessimistic MDP with actions int32 [B]; params [E, ...] are the members'.

    All members predict. The episode's own supplies frame, reward and end, the others filter the
    frame. A discrepancy above the threshold halts.
    """

    def predict(params, state):
        state = imagine(network, params, state, action)
        return state, network.apply(params, state, method="decode")

    predicted, decoded = jax.vmap(predict, in_axes=(0, 1))(params, env.state)  # [E, B, ...]
    by_episode = jax.tree.map(lambda x: x.swapaxes(0, 1), (predicted, decoded))
    state, own = by_episode[0], pick(by_episode[1], env.member)
    frame = to_frame(own.image)  # [B, 84, 84]

    def filtered(params, deter):
        embedding = network.apply(params, frame, method="encode")
        return draw_latent(network.apply(params, deter, embedding, method="posterior"))

    latent = jax.vmap(filtered, out_axes=1)(params, predicted.deter)  # [B, E, ...]
    decides = jnp.arange(args.members) == env.member[:, None]  # [B, E]
    state = State(state.deter, jnp.where(decides[..., None, None], state.latent, latent))

    disc = discrepancy(decoded.image, decoded.reward, {"frame": 84, "block": 7}[args.discrepancy])
    halted = disc > threshold
    reward = jnp.where(halted, args.halt_penalty, own.reward)
    terminated = halted | (own.terminal_logit > 0)  # p > 1/2
    frames = jnp.concatenate([env.frames[..., 1:], frame[..., None]], axis=-1)
    env = Imagined(state, frames, env.member, env.steps + 1, env.reward_sum + reward)
    ended = terminated | (env.steps >= args.horizon)
    return env, Outcome(reward, halted, terminated, ended, disc)


def sample_starts(
    store: Store, entropy: tuple[int, ...], count: int, rows: slice, args: Args
) -> tuple[Windows, np.ndarray]:
    """Windows [N, warm_up] that end where imagined episodes start, `rows` of `count` of them.

    Half of them end with the first frame of an episode, half anywhere but with a last one. Also
    the logged actions [N, horizon] that follow, -1 from the end of the episode on.
    """
    rng = np.random.default_rng(entropy)
    first = rng.choice(store.ends - store.episodes["length"], count)
    position = np.where(rng.random(count) < 0.5, first, rng.integers(store.num_steps, size=count))
    position -= np.isin(position, store.ends - 1)  # nothing follows an episode's last frame

    def index(offsets):
        offset = (position[rows, None] + offsets) % store.num_steps
        return offset + store.shifts[np.searchsorted(store.ends, offset, side="right")]

    before = index(np.arange(-args.warm_up, 1))  # [N, 1 + warm_up]
    frames, steps = read_frames(store, before[:, 1:].ravel()), store.steps[before]
    is_first = steps["is_first"][:, 1:]
    reward = np.where(is_first, 0, steps["reward"][:, :-1]).astype(np.float32)
    windows = Windows(
        frame=frames.reshape(*is_first.shape, 84, 84),
        action=np.where(is_first, -1, steps["action"][:, :-1].astype(np.int32)),
        reward=reward,
        is_first=is_first,
        terminal=steps["is_terminal"][:, 1:],
    )
    after = store.steps[index(np.arange(args.horizon))]
    over = np.cumsum(after["is_last"], axis=1) > 0
    return windows, np.where(over, -1, after["action"].astype(np.int32))


@partial(jax.jit, static_argnames=("network", "args"))
def replay(params, windows: Windows, action, network: WorldModel, args: Args):
    """Imagined episodes from windows [B, warm_up] with given actions [B, horizon]; nothing halts.

    Returns:
      The discrepancies [B, horizon], and whether the episode was still running (not so where an
      action is -1).
    """
    member = jnp.arange(len(action)) % args.members
    env = start_episodes(network, params, windows, member)

    def step(carry, action):
        env, running = carry
        env, outcome = imagined_step(network, params, env, action, jnp.inf, args)
        valid = running & (action >= 0)
        return (env, running & ~outcome.terminated), (outcome.discrepancy, valid)

    _, outputs = jax.lax.scan(step, (env, jnp.full(len(action), True)), action.T)
    return jax.tree.map(jnp.transpose, outputs)


def halt_threshold(logged, quantile: float) -> float:
    """The quantile of the discrepancies of running steps; logged: (discrepancy, running)."""
    disc, running = logged
    return float(np.quantile(disc[running], quantile))


def halt_rate(replays, threshold: float) -> float:
    """Part of the replays (discrepancy, running) [N, horizon] that the threshold would halt."""
    disc, running = replays
    return float(np.mean(np.any((disc > threshold) & running, axis=1)))


def draw_discrepancies(logged, random, threshold: float, path: Path) -> None:
    """Draws discrepancy.png, histograms of replays (discrepancy, running), and the threshold."""
    from matplotlib.figure import Figure  # without pyplot's global state

    samples = [disc[running] for disc, running in (logged, random)]
    bins = np.linspace(0, max(threshold, *(x.max() for x in samples)) * 1.05, 100)
    axes = (figure := Figure((7, 4.5), layout="constrained")).subplots()
    for sample, label in zip(samples, ("logged actions", "random actions"), strict=True):
        axes.hist(sample, bins, density=True, alpha=0.6, label=label)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xlabel="discrepancy of the members", ylabel="density", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


@partial(jax.jit, static_argnames=("policy", "args"), donate_argnames=("params", "opt_state"))
def clone(params, opt_state, batch: Batch, policy: PolicyNetwork, args: Args):
    """One update of behavior cloning on logged steps [B, 1] -> (params, opt_state, loss)."""

    def bc_loss(params):
        logits, _ = policy.apply(params, stack_frames(batch.frames, batch.history, 0))
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.action, axis=-1)
        return -jnp.mean(log_prob * ~batch.is_last)  # a last step has no action

    loss, gradient = jax.value_and_grad(bc_loss)(params)
    delta, opt_state = optax.adam(args.bc_learning_rate).update(gradient, opt_state)
    return optax.apply_updates(params, delta), opt_state, loss


def advantages(steps: Transitions, args: Args):
    """Generalised advantages [B, T]: a cut-off step is bootstrapped, a terminated one is not."""
    going_on = args.discount * ~steps.terminated
    delta = steps.reward + going_on * steps.next_value - steps.value  # δ = r + γ v(s') - v(s)

    def step(advantage, inputs):
        delta, ended = inputs
        advantage = delta + args.discount * args.gae_lambda * ~ended * advantage
        return advantage, advantage

    last = jnp.zeros_like(delta[:, 0])
    return jax.lax.scan(step, last, (delta.T, steps.ended.T), reverse=True)[1].T


def ppo_loss(params, steps: Transitions, advantage, policy: PolicyNetwork, args: Args):
    """The loss of PPO on steps and advantages [...].

    Returns:
      It and a dictionary of scalars to log.
    """
    logits, value = policy.apply(params, steps.frames)
    log_probs = jax.nn.log_softmax(logits)  # [..., actions]
    log_prob = jnp.take_along_axis(log_probs, steps.action[..., None], axis=-1)[..., 0]
    log_ratio = log_prob - steps.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_ratio, 1 + args.clip_ratio)
    value_loss = jnp.mean((value - steps.value - advantage) ** 2) / 2
    advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
    total = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    return total, {
        "losses/policy": policy_loss,
        "losses/value": value_loss,
        "losses/total": total,
        "charts/entropy": entropy,
        "charts/approx_kl": jnp.mean(ratio - 1 - log_ratio),
        "charts/clip_fraction": jnp.mean(jnp.abs(ratio - 1) > args.clip_ratio),
    }


EPISODE_METRICS = ("charts/halt_rate", "charts/episode_length", "charts/episode_return")
HALTING = ("charts/threshold", "charts/halt_rate_logged", "charts/halt_rate_random")
METRICS = (
    *("losses/policy", "losses/value", "losses/total"),
    *("charts/entropy", "charts/approx_kl", "charts/clip_fraction", "charts/grad_norm"),
    *("charts/explained_variance", "charts/discrepancy", "charts/episodes", *EPISODE_METRICS),
)


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    env: Imagined  # from which the next update goes on
    halting: Any  # the threshold of the discrepancy and how often it halts replays
    step: Any  # int32, updates done
    sums: Any  # of the metrics since the last multiple of log_every


def make_optimizer(args: Args) -> optax.GradientTransformation:
    steps = args.anneal_updates * args.epochs * args.minibatches
    adam = optax.adam(optax.linear_schedule(args.learning_rate, 0.0, steps), eps=1e-5)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)


def init_state(key, policy: PolicyNetwork, network: WorldModel, args: Args) -> TrainState:
    """The state before the first update, which starts all imagined episodes."""
    params = policy.init(key, jnp.zeros((84, 84, 4), jnp.uint8))
    frames, zeros = jnp.zeros((args.batch_size, 84, 84, 4), jnp.uint8), jnp.zeros(args.batch_size)
    counts = (zeros.astype(jnp.int32), zeros.astype(jnp.int32), zeros)
    env = Imagined(empty_state(network, args.batch_size, args.members), frames, *counts)
    sums, halting = ({name: jnp.float32(0) for name in names} for names in (METRICS, HALTING))
    return TrainState(params, make_optimizer(args).init(params), env, halting, jnp.int32(0), sums)


def rollout(params, env: Imagined, starts: Imagined, key, step: Callable, policy, args: Args):
    """Goes on with the episodes `env` [B] for T steps; where one ends it takes a start [B, N].

    Args:
      step: (env, action) -> (env, Outcome).
      key: draws the actions.

    Returns:
      The episodes then, Transitions [B, T], and a dictionary of metrics.
    """
    # Logits [B, 1 + N, actions] and values [B, 1 + N] of the episodes and of the starts.
    first = policy.apply(params, jnp.concatenate([env.frames[:, None], starts.frames], axis=1))
    outputs, start_outputs = tuple(x[:, 0] for x in first), tuple(x[:, 1:] for x in first)

    def one_step(carry, key):
        env, (logits, value), used = carry
        action = jax.random.categorical(key, logits)
        after, outcome = step(env, action)
        outputs = policy.apply(params, after.frames)
        log_prob = pick(jax.nn.log_softmax(logits), action)
        steps = Transitions(
            *(env.frames, action, log_prob, value, outcome.reward, outcome.terminated),
            *(outcome.ended, outputs[1]),
        )
        ended = outcome.ended
        metrics = {
            "charts/discrepancy": jnp.mean(outcome.discrepancy) / args.rollout_length,
            "charts/episodes": jnp.sum(ended),
            "charts/halt_rate": jnp.sum(outcome.halted),
            "charts/episode_length": jnp.sum(after.steps * ended),
            "charts/episode_return": jnp.sum(after.reward_sum * ended),
        }
        start = pick((starts, start_outputs), used % starts.member.shape[1])
        env, outputs = jax.tree.map(
            lambda new, old: jnp.where(ended.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            *(start, (after, outputs)),
        )
        return (env, outputs, used + ended), (steps, metrics)

    keys, carry = jax.random.split(key, args.rollout_length), (env, outputs, env.steps * 0)
    (env, *_), (steps, metrics) = jax.lax.scan(one_step, carry, keys)
    return env, jax.tree.map(lambda x: x.swapaxes(0, 1), steps), jax.tree.map(jnp.sum, metrics)


@partial(jax.jit, static_argnames=("policy", "network", "args"), donate_argnames="state")
def collect(
    state: TrainState,
    windows: Windows,
    model,
    key,
    policy: PolicyNetwork,
    network: WorldModel,
    args: Args,
) -> tuple[TrainState, Transitions, jax.Array, jax.Array]:
    """The first half of an update: imagined steps in the members `model` [E, ...].

    windows [B, starts, warm_up]: before the starts of the episodes that begin in it. They and the
    episodes are shared out to the devices.

    Returns:
      The state, the steps and their advantages [B, T], and the order in which `learn` takes them.
    """
    # The key belongs to the step, so that a resumed run draws the same.
    start_key, key = jax.random.split(jax.random.fold_in(key, state.step))
    rollout_key, order_key = jax.random.split(key)
    shape = windows.is_first.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), windows)
    member = jax.random.randint(start_key, (math.prod(shape),), 0, args.members)
    starts = start_episodes(network, model, flat, member)
    starts = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), starts)
    begin = state.step == 0
    env = jax.tree.map(lambda new, old: jnp.where(begin, new[:, -1], old), starts, state.env)
    threshold = state.halting["charts/threshold"]
    step = partial(imagined_step, network, model, threshold=threshold, args=args)
    env, steps, metrics = rollout(state.params, env, starts, rollout_key, step, policy, args)
    advantage = advantages(steps, args)  # [B, T]
    unexplained = jnp.var(advantage) / jnp.maximum(jnp.var(steps.value + advantage), 1e-8)
    metrics["charts/explained_variance"] = 1 - unexplained
    first = state.step % args.log_every == 0
    sums = {k: jnp.where(first, 0, v) + metrics.get(k, 0.0) for k, v in state.sums.items()}
    state = state._replace(env=env, step=state.step + 1, sums=sums)
    return state, steps, advantage, minibatches(order_key, *advantage.shape, args)


def minibatches(key, batch_size: int, length: int, args: Args):
    """Indices of the steps [B, T] in each minibatch: [epochs · minibatches, B, T / minibatches].

    The steps are shuffled within an episode, whose device has them.
    """
    order = jnp.broadcast_to(jnp.arange(length), (args.epochs, batch_size, length))
    order = jax.random.permutation(key, order, axis=2, independent=True)
    order = order.reshape(args.epochs, batch_size, args.minibatches, -1).swapaxes(1, 2)
    return order.reshape(-1, *order.shape[2:])


@partial(jax.jit, static_argnames=("policy", "args"), donate_argnames="state")
def learn(
    state: TrainState, steps: Transitions, advantage, index, policy: PolicyNetwork, args: Args
) -> tuple[TrainState, jax.Array]:
    """A gradient step of PPO on the minibatch `index` [B, M] of steps [B, T] -> (state, loss)."""
    batch = pick((steps, advantage), index)
    gradient, metrics = jax.grad(ppo_loss, has_aux=True)(state.params, *batch, policy, args)
    metrics["charts/grad_norm"] = optax.global_norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    parts = args.epochs * args.minibatches
    sums = state.sums | {name: state.sums[name] + x / parts for name, x in metrics.items()}
    params = optax.apply_updates(state.params, delta)
    return state._replace(params=params, opt_state=opt_state, sums=sums), metrics["losses/total"]


def update(state: TrainState, windows: Windows, model, key, policy, network, args: Args):
    """One update of the policy, arguments as of `collect` -> (state, loss).

    Its gradient steps are no `lax.scan`: there a CPU needs ten times as long for the gradient of a
    convolution.
    """
    state, steps, advantage, order = collect(state, windows, model, key, policy, network, args)
    for index in order:
        state, loss = learn(state, steps, advantage, index, policy, args)
    return state, loss


def mean_metrics(sums: dict, args: Args) -> dict:
    """Means over the updates; of what belongs to episodes over those that ended, if any did."""
    episodes = sums["charts/episodes"]
    counts = {k: episodes if k in EPISODE_METRICS else args.log_every for k in METRICS}
    return {k: sums[k] / counts[k] for k in METRICS if counts[k]}


@partial(jax.jit, static_argnames=("greedy", "policy"))
def act(params, observation, key, greedy: bool, policy: PolicyNetwork):
    """Actions [E] for observations [E, ...]: samples of the policy, or its most probable action."""
    logits, _ = policy.apply(params, observation)
    return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)


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


def check_args(args: Args) -> None:
    """Ends the program with one sentence if an argument is out of its range."""
    # Members are compared in pairs, and the policy sees four frames.
    leasts = {"seed": 0, "bc_updates": 0, "members": 2, "warm_up": 4, "channels": 2}
    for name, value in vars(args).items():
        if type(value) is int and value < (least := leasts.get(name, 1)):
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; give at least {least}.")
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
    if not 0 < args.halt_quantile < 1:
        raise SystemExit(f"--halt-quantile is {args.halt_quantile}; give a part between 0 and 1.")
    if not (0 <= args.discount <= 1 and 0 <= args.gae_lambda <= 1):
        raise SystemExit("--discount and --gae-lambda must be from 0 to 1.")
    if args.total_updates > args.anneal_updates:
        raise SystemExit(
            f"--total-updates {args.total_updates} is more than --anneal-updates "
            f"{args.anneal_updates}, when the learning rate is zero."
        )
    for name, divisor in (("eval_every", "log_every"), ("rollout_length", "minibatches")):
        if getattr(args, name) % getattr(args, divisor):
            raise SystemExit(
                f"--{name.replace('_', '-')} {getattr(args, name)} must be a multiple of "
                f"--{divisor.replace('_', '-')} {getattr(args, divisor)}."
            )
    for name in ("model_batch_size", "bc_batch_size", "batch_size"):
        if getattr(args, name) % jax.device_count():
            raise SystemExit(
                f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared by "
                f"{jax.device_count()} devices; give a multiple."
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
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    network = make_world_model(store.meta["num_actions"], args)
    if args.world_model:
        model = load_world_model(args.world_model, network, replicated, args)
    else:
        model = train_world_model(args, store, network, mesh, Path(f"{run.dir}-world-model"))

    policy = PolicyNetwork(store.meta["num_actions"], args.channels, network.dtype)
    init_key, update_key = jax.random.split(jax.random.key(args.seed))
    shardings = TrainState(*[replicated] * len(TrainState._fields))._replace(env=by_device)
    state = jax.jit(init_state, static_argnums=(1, 2, 3), out_shardings=shardings)(
        init_key, policy, network, args
    )
    data = {k: v for k, v in store.meta.items() if k != "crc32"}
    data["world_model_crc32"] = checksum(model)
    facts = {"dtype": str(network.dtype), "rom": rom_digest(args.env_id)}
    done, state = run.start(state, data, **facts)

    def starts(number: tuple[int, ...], each: int) -> tuple[Windows, np.ndarray]:
        """This process's part of `each` starts for every episode of the batch."""
        share = args.batch_size * each // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return sample_starts(store, number, args.batch_size * each, rows, args)

    def put(tree):
        return jax.tree.map(partial(jax.make_array_from_process_local_data, by_device), tree)

    def load(step: int) -> Windows:
        windows, _ = starts((args.seed, step), args.starts)
        return put(jax.tree.map(lambda x: x.reshape(-1, args.starts, *x.shape[1:]), windows))

    def measure_halting() -> dict:
        """The threshold, from replays, and what it would halt; also draws discrepancy.png."""
        replays = []
        for i in range(args.halt_batches):
            windows, logged = starts((args.seed, i, 1), 1)
            rng, shape = np.random.default_rng((args.seed, i, 2)), (args.batch_size, args.horizon)
            random = rng.integers(policy.num_actions, size=shape, dtype=np.int32)
            random = np.split(random, jax.process_count())[jax.process_index()]
            for actions in (logged, random):
                outputs = replay(model, *put((windows, actions)), network, args)
                replays.append(multihost_utils.process_allgather(outputs, tiled=True))
        logged, random = (
            [np.concatenate(x) for x in zip(*replays[i::2], strict=True)] for i in range(2)
        )
        threshold = halt_threshold(logged, args.halt_quantile)
        if run.writes:
            draw_discrepancies(logged, random, threshold, run.dir / "discrepancy.png")
        if run.wandb:
            import wandb

            picture = wandb.Image(str(run.dir / "discrepancy.png"))
            run.wandb.log({"discrepancy": picture}, step=0)
        rates = [halt_rate(x, threshold) for x in (logged, random)]
        print(
            f"Discrepancies above {threshold:.4f} halt: {rates[0]:.1%} of the imagined episodes "
            f"with logged actions, {rates[1]:.1%} of those with random actions.",
            flush=True,
        )
        return dict(zip(HALTING, map(np.float32, (threshold, *rates)), strict=True))

    def clone_behavior(params):
        """The policy after --bc-updates; a run that is stopped during these begins them again."""
        opt_state = optax.adam(args.bc_learning_rate).init(params)
        share = args.bc_batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        load = lambda step: put(sample_batch(store, args.seed, step, args.bc_batch_size, 1, rows))  # noqa: E731
        batches = load_batches(load, 0, args.loader_threads)
        hide = not (run.writes and sys.stderr.isatty())
        loss = None
        for i in (bar := tqdm(range(args.bc_updates), desc="behavior cloning", disable=hide)):
            previous_loss = loss
            params, opt_state, loss = clone(params, opt_state, next(batches), policy, args)
            jax.block_until_ready(previous_loss)  # so that at most one batch waits on the device
            if (i + 1) % args.log_every == 0:
                bar.set_postfix_str(f"loss {loss:.3f}")
            if run.stopping and jax.process_count() == 1:
                run.exit(done)
        batches.close()
        run.check_loss(done, float(loss))
        return params

    if done == 0:
        state = state._replace(halting=jax.device_put(measure_halting(), replicated))
        if args.bc_updates:
            state = state._replace(params=clone_behavior(state.params))

    def current_policy(greedy: bool) -> Callable:
        params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
        return partial(act, params, greedy=greedy, policy=policy)

    def play(num_episodes: int, greedy: bool) -> np.ndarray:
        seed = int(np.random.default_rng((args.seed, done)).integers(2**31))
        return np.array(evaluate(current_policy(greedy), args.env_id, num_episodes, seed))

    bar = tqdm(
        desc="policy",
        total=args.total_updates,
        initial=done,
        disable=not (run.writes and sys.stderr.isatty()),
    )
    batches = load_batches(load, done, args.loader_threads)
    played, loss, waited = "", None, 0.0
    window_start, window_first = time.perf_counter(), done
    while done < args.total_updates:
        before = time.perf_counter()
        windows = next(batches)
        waited += time.perf_counter() - before
        previous_loss = loss
        state, loss = update(state, windows, model, update_key, policy, network, args)
        done += 1
        jax.block_until_ready(previous_loss)  # so that at most one batch waits on the device
        bar.update()
        if done % args.log_every == 0:
            metrics = mean_metrics(jax.device_get(state.sums), args)
            if done == args.log_every:
                metrics |= jax.device_get(state.halting)
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
            capture_video(current_policy(False), args.env_id, args.seed, video)
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
