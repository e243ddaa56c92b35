# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "ale-py==0.12.1", "filelock==4.3.1", "flax==0.12.8", "gymnasium==1.4.0", "jax==0.10.2",
#   "matplotlib==3.11.2", "numpy==2.4.6", "optax==0.2.8", "tqdm==4.70.1", "tyro==1.0.17",
#   "wandb==0.31.0", "zstandard==0.25.0",
# ]
# ///
"""CRR on Atari (Wang et al., 2020), a baseline of ROSMO (Liu et al., 2023).

Critic regularized regression learns a critic Q by one-step temporal
differences under its own policy, and clones the logged actions with a weight
that grows with their advantage, min(exp(A/β), 20) or 1[A > 0]. The network is
that of Fig. 5(c), and Q is categorical like ROSMO's value.

    python crr_atari.py --env-id MsPacman
    python crr_atari.py --weight binary         # clone where A > 0
    python crr_atari.py --num-action-samples 4  # V from samples, as in acme

Where ROSMO's paper refers to acme, this file does the following.
1. Batches are transitions drawn with replacement. A last step has no action and counts as zero;
   a terminal one is not bootstrapped, a truncated one is (--truncation-as-termination: it is not).
2. V and the bootstrap are exact means of Q under π (acme: over four samples for V, which is
   --num-action-samples 4, and over one for the bootstrap).
3. The advantage comes from the network that is trained, the bootstrap from a copy of its policy and
   critic, made every 100 updates (acme).
4. γ = 0.99 and β = 1 are acme's; rewards are clipped to [-1, 1] (--no-clip-rewards).
5. Optimiser and batch size are ROSMO's, not acme's (Adam at 3e-4): AdamW, a warm-up of 1,000
   updates, a tenth of the learning rate every 100,000, weight decay on kernels only.
"""

import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

# --- signals (identical in *_atari.py and *_bsuite.py) ---
if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until the run handles it
    # A user's settings of these may ask for what is not installed, or change a seed's numbers.
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    os.environ |= {"JAX_ENABLE_X64": "0", "JAX_DEFAULT_PRNG_IMPL": "threefry2x32"}
    os.environ |= {"JAX_THREEFRY_PARTITIONABLE": "1", "JAX_RANDOM_SEED_OFFSET": "0"}
# --- end signals ---

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import zstandard
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from flax import serialization
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # run
    env_id: str = "MsPacman"  # game, by RL Unplugged's name
    seed: int = 0  # seed of the parameters, the batches and the evaluation
    total_updates: int = 200_000  # number of updates
    log_every: int = 200  # updates over which the logged losses are averaged
    checkpoint_every: int = 10_000  # updates between two checkpoints; evaluations save, too
    run_dir: Path | None = None  # folder of the run; None: runs/{script}/{game}[-changes]/seed{n}
    overwrite: bool = False  # start again in a folder that holds a run, and delete that run
    track: bool = False  # mirror the metrics to Weights & Biases

    # data
    rlu_run: int = 1  # run of RL Unplugged, 1 to 5
    data_percent: float = 100.0  # learn from the first p% of the data of each checkpoint of the DQN
    data_dir: Path = Path("data")  # folder of the datasets, which are made when they are missing
    dataset: Path | None = None  # store to open; None: the one in data_dir, made if it is missing
    loader_threads: int = 4  # threads that decode batches; as many, at least 4, are made ahead
    truncation_as_termination: bool = False  # treat every last step as terminal

    # model (Table 3, D.2.1)
    channels: int = 64  # channels of the residual blocks; the rest of the network scales with it
    num_bins: int = 601  # bins of the categorical Q: 601 reach to ±58,000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the network (auto: bfloat16 on accelerators); the rest is always float32"""

    # optimisation (ROSMO's, Table 3)
    batch_size: int = 512  # transitions in a batch, over all devices
    learning_rate: float = 7e-4  # AdamW's learning rate after 1,000 updates of warm-up
    learning_rate_decay: float = 0.1  # factor on the learning rate every 100,000 updates
    weight_decay: float = 1e-4  # AdamW's weight decay, on kernels only (dense and convolutional)
    max_grad_norm: float = 5.0  # largest global norm of the gradient

    # algorithm
    target_update_every: int = 100  # updates between two copies to the target network
    discount: float = 0.99  # discount factor γ
    weight: Literal["exp", "binary"] = "exp"  # of a logged action, min(exp(A/β), 20) or 1[A > 0]
    beta: float = 1.0  # β, temperature of the exponential weight
    num_action_samples: int | None = None  # actions sampled from π for V; None: the exact mean
    clip_rewards: bool = True  # clip rewards to [-1, 1]

    # evaluation
    eval_every: int = 1_000  # updates between two evaluations
    eval_episodes: int = 2  # episodes of each evaluation during training
    final_eval_episodes: int = 100  # episodes of the final evaluation, and as many greedy ones
    eval_max_frames: int = 108_000  # frames of the game after which an episode is cut off
    eval_greedy: bool = False  # take the most probable action in evaluations during training


# --- torso (identical in *_atari.py) ---
# The authors': no biases, weights from a truncated normal of standard deviation 0.88 / √fan_in.
WEIGHTS = {
    "use_bias": False,
    "kernel_init": nn.initializers.variance_scaling(0.774, "fan_in", "truncated_normal"),
}


def conv(channels: int, dtype: Any, stride: int = 1, kernel: int = 3) -> nn.Conv:
    return nn.Conv(channels, (kernel, kernel), stride, dtype=dtype, **WEIGHTS)


def layer_norm(dtype: Any) -> nn.LayerNorm:
    """Over rows, columns and channels, with a scale and an offset for each channel."""
    return nn.LayerNorm(reduction_axes=(-3, -2, -1), feature_axes=-1, epsilon=1e-5, dtype=dtype)


def average_pool(x):
    """Halves rows and columns; the mean leaves out what lies beyond the border."""
    window = {"window_shape": (3, 3), "strides": (2, 2), "padding": "SAME"}
    total = partial(nn.pool, init=0.0, reduce_fn=jax.lax.add, **window)
    return (total(x) / total(jnp.ones((*x.shape[-3:-1], 1)))).astype(x.dtype)


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
            x = nn.Dense(2 * self.channels, dtype=self.dtype, **WEIGHTS)(x)
            x = nn.relu(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x))
        # In float32: a value is a small sum of large terms of both signs.
        exact = partial(nn.Dense, dtype=jnp.float32, precision="highest")
        return exact(self.outputs, kernel_init=nn.initializers.zeros)(x)


# --- end torso ---


class Critic(nn.Module):
    """ROSMO's dynamics function with a head for Q instead of a next state."""

    channels: int
    num_bins: int
    dtype: Any

    @nn.compact
    def __call__(self, state, action):
        """States [..., 6, 6, channels] and one-hot actions [..., actions] -> logits [..., bins]."""
        action = jnp.broadcast_to(action[..., None, None, :], (*state.shape[:-1], action.shape[-1]))
        x = nn.relu(layer_norm(self.dtype)(state))
        x = jnp.concatenate([x, action.astype(x.dtype)], axis=-1)
        x = conv(self.channels, self.dtype)(x) + state
        for _ in range(2):
            x = ResidualBlock(self.channels, self.dtype)(x)
        return Head(self.channels, self.num_bins, self.dtype)(x)


class CRRNetwork(nn.Module):
    """One representation for a policy and a critic with the dynamics' blocks (D.2.1, Fig. 5c)."""

    num_actions: int
    num_bins: int
    channels: int
    dtype: Any

    def setup(self):
        self.h = Representation(self.channels, self.dtype)
        self.f = [ResidualBlock(self.channels, self.dtype) for _ in range(2)]
        self.policy = Head(self.channels, self.num_actions, self.dtype)
        self.q = Critic(self.channels, self.num_bins, self.dtype)

    def representation(self, observation):
        """Observations uint8 [..., 84, 84, 4] -> states [..., 6, 6, channels]."""
        return self.h(observation)

    def policy_logits(self, state):
        """States [..., 6, 6, channels] -> logits [..., actions], float32."""
        for block in self.f:
            state = block(state)
        return self.policy(state)

    def q_logits(self, state):
        """States [..., 6, 6, channels] -> logits of Q for every action [..., actions, bins]."""
        shape = (*state.shape[:-3], self.num_actions, *state.shape[-3:])
        state = jnp.broadcast_to(state[..., None, :, :, :], shape)
        return self.q(state, jnp.eye(self.num_actions))

    def __call__(self, observation):
        state = self.representation(observation)
        return self.policy_logits(state), self.q_logits(state)


# --- value transform (identical in rosmo_*.py, muzero_*.py, crr_*.py, cql_*.py, combo_*.py) ---
def transform(x):
    """h(x) = sign(x)(√(|x| + 1) - 1) + εx, ε = 0.001 (Appendix A.2 has εx inside the bracket)."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + 0.001 * x


def inverse_transform(y):
    """The inverse of h. Its usual form, (√(1 + 4εu) - 1) / 2ε, would cancel digits."""
    u = jnp.abs(y) + 1 + 0.001
    return jnp.sign(y) * ((2 * u / (1 + jnp.sqrt(1 + 4 * 0.001 * u))) ** 2 - 1)


def two_hot(x, num_bins: int):
    """φ(h(x)): [...] -> probabilities [..., bins] on the two around h(x); bin i: i - limit."""
    limit = (num_bins - 1) // 2
    y = jnp.clip(transform(x), -limit, limit)
    return jnp.maximum(0, 1 - jnp.abs(y[..., None] - (jnp.arange(num_bins) - limit)))


def to_scalar(logits):
    """Logits [..., bins] -> values [...], the expectation mapped back through h."""
    num_bins = logits.shape[-1]
    p, middle = jax.nn.softmax(logits), (num_bins - 1) / 2
    # Opposite bins are subtracted first: a plain sum's large terms leave errors of 1e-5.
    mean = jnp.sum((p - p[..., ::-1]) * (jnp.arange(num_bins) - middle), axis=-1) / 2
    return inverse_transform(mean + middle - (num_bins - 1) // 2)


# --- batch (identical in *_atari.py) ---
class Batch(NamedTuple):
    """Windows of T consecutive steps, and the three frames before each window."""

    frames: Any  # uint8 [B, 3 + T, 84, 84]
    history: Any  # uint8 [B, T], how many frames before the step's are of its episode, 3 at most
    action: Any  # int32 [B, T]
    reward: Any  # float32 [B, T], unclipped; follows the action
    is_last: Any  # bool [B, T]; the action and the reward of a last step mean nothing
    is_terminal: Any  # bool [B, T]; a last step that is not terminal was cut off


def stack_frames(frames: jax.Array, history: jax.Array) -> jax.Array:
    """Observations [B, T, 84, 84, 4], newest frame last, zeros before an episode's start."""
    own = jnp.arange(3, -1, -1) <= history[..., None]  # [B, T, 4]
    stack = jnp.stack([frames[:, i : i + history.shape[1]] for i in range(4)], axis=-1)
    return jnp.where(own[:, :, None, None], stack, 0)


# --- end batch ---


def regression_weight(advantage, args: Args):
    """Weight of log π(a|s) for logged actions with advantages [B] (Wang et al., Eq. 3 and 4)."""
    if args.weight == "binary":
        return jnp.where(advantage > 0, 1.0, 0.0)
    return jnp.exp(jnp.minimum(advantage / args.beta, math.log(20)))


def crr_loss(params, target_params, batch: Batch, key, network: CRRNetwork, args: Args):
    """Sum of the critic's and the policy's loss on windows of two steps -> (loss, metrics)."""
    action, moving = batch.action[:, 0], ~batch.is_last[:, 0]  # [B]
    is_terminal = batch.is_last if args.truncation_as_termination else batch.is_terminal
    stacks = stack_frames(batch.frames, batch.history)  # [B, 2, 84, 84, 4]
    observation, next_observation = jnp.moveaxis(stacks, 1, 0)
    reward = jnp.clip(batch.reward, -1, 1) if args.clip_rewards else batch.reward
    logged = action[:, None]

    # y = r + γ Σ π'(a'|s') Q'(s', a'), with the target network's policy and critic.
    next_state = network.apply(target_params, next_observation, method="representation")
    next_policy = jax.nn.softmax(network.apply(target_params, next_state, method="policy_logits"))
    next_q = to_scalar(network.apply(target_params, next_state, method="q_logits"))
    bootstrap = jnp.where(is_terminal[:, 1], 0.0, jnp.sum(next_policy * next_q, axis=-1))
    y = reward[:, 0] + args.discount * bootstrap  # [B]

    state = network.apply(params, observation, method="representation")
    q_logits = network.apply(params, state, method="q_logits")  # [B, actions, bins]
    q_logits_logged = jnp.take_along_axis(q_logits, logged[..., None], axis=1)[:, 0]
    critic_loss = optax.softmax_cross_entropy(q_logits_logged, two_hot(y, args.num_bins))

    # A = Q(s, a) - V(s), V the mean of Q under π.
    logits = network.apply(params, state, method="policy_logits")
    log_policy = jax.nn.log_softmax(logits)
    q = to_scalar(q_logits)  # [B, actions]
    if args.num_action_samples is None:
        value = jnp.sum(jnp.exp(log_policy) * q, axis=-1)
    else:
        samples = jax.random.categorical(key, logits, shape=(args.num_action_samples, len(action)))
        value = jnp.mean(jnp.take_along_axis(q, samples.T, axis=-1), axis=-1)
    q_logged = jnp.take_along_axis(q, logged, axis=-1)[:, 0]
    advantage = jax.lax.stop_gradient(q_logged - value)
    weight = regression_weight(advantage, args)  # [B]
    log_prob = jnp.take_along_axis(log_policy, logged, axis=-1)[:, 0]
    assert weight.shape == log_prob.shape == y.shape == moving.shape  # or they would broadcast

    losses = {
        "losses/critic": jnp.mean(critic_loss * moving),
        "losses/policy": jnp.mean(-weight * log_prob * moving),
    }
    metrics = losses | {
        "losses/total": sum(losses.values()),
        "charts/q": jnp.mean(q_logged * moving),
        "charts/q_target": jnp.mean(y * moving),
        "charts/advantage": jnp.mean(advantage * moving),
        "charts/weight": jnp.mean(weight * moving),
        "charts/weight_p95": jnp.nanpercentile(jnp.where(moving, weight, jnp.nan), 95),
        "charts/policy_entropy": jnp.mean(jax.scipy.special.entr(jnp.exp(log_policy)).sum(axis=-1)),
    }
    return metrics["losses/total"], metrics


class TrainState(NamedTuple):
    params: Any
    target_params: Any
    opt_state: Any
    step: Any  # int32, updates done


def make_network(num_actions: int, args: Args) -> CRRNetwork:
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = auto if args.dtype == "auto" else args.dtype
    return CRRNetwork(num_actions, args.num_bins, args.channels, jnp.dtype(dtype))


# --- optimizer (identical in rosmo_*.py, muzero_unplugged_*.py, bc_*.py and c*_*.py) ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    learning_rate = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, 1_000, 100_000, args.learning_rate_decay, staircase=True
    )
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, weight_decay=args.weight_decay, mask=is_weight)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


# --- end optimizer ---


def init_state(key, network: CRRNetwork, args: Args) -> TrainState:
    params = network.init(key, jnp.zeros((84, 84, 4), jnp.uint8))
    target_params = jax.tree.map(jnp.copy, params)
    return TrainState(params, target_params, make_optimizer(args).init(params), jnp.int32(0))


@jax.jit(static_argnames=("network", "args"), donate_argnames="state")
def update(state: TrainState, key, batch: Batch, network: CRRNetwork, args: Args):
    """One update -> (state, metrics); the batch is sharded over devices, the state replicated."""
    # The key belongs to the step, so that a resumed run draws the same actions.
    key = jax.random.fold_in(key, state.step)
    gradient, metrics = jax.grad(crr_loss, has_aux=True)(
        state.params, state.target_params, batch, key, network, args
    )
    metrics["charts/grad_norm"] = optax.tree.norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    params, step = optax.apply_updates(state.params, delta), state.step + 1
    target = optax.periodic_update(params, state.target_params, step, args.target_update_every)
    return TrainState(params, target, opt_state, step), metrics


@jax.jit(static_argnames=("greedy", "network", "args"))
def act(params, observation, key, greedy: bool, network: CRRNetwork, args: Args):
    """Actions [E] for observations [E, ...], sampled from π or its most probable ones."""
    state = network.apply(params, observation, method="representation")
    logits = network.apply(params, state, method="policy_logits")
    return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)


def window_length(args: Args) -> int:
    return 2


# --- data (identical in *_atari.py) ---
CHUNK = 16  # consecutive frames that are compressed together


class Store(NamedTuple):
    """Episodes on disk, or some of them: docs/atari_data.md tells the format."""

    meta: dict
    blob: memoryview  # zstd chunks of CHUNK frames each, with a CRC-32 at their ends
    offsets: np.ndarray  # of the chunks in the blob
    steps: np.ndarray  # action, reward, is_last, is_terminal of every frame, its age in its episode
    episodes: np.ndarray  # id, checkpoint, start, length and return of those selected
    index: np.ndarray  # rows of `steps` that belong to these episodes, in order
    facts: dict  # what a run writes down of them, and compares when it goes on


def find_store(args) -> Path | None:
    """The smallest store of a run of RL Unplugged that holds --data-percent of it, if any does."""
    run, found = f"{args.env_id}-run{args.rlu_run}", {}
    for path in (args.data_dir / "atari").glob(f"{run}-*pct"):
        if name := re.fullmatch(rf"{run}-(\d+(?:\.\d+)?)pct", path.name):
            found[float(name[1])] = path
    return found.get(min((p for p in found if p >= args.data_percent), default=None))


def make_store(args) -> Path:
    """The store of RL Unplugged that benchmark/prepare_atari.py makes, or local data."""
    tool = Path(__file__).resolve().parent / "benchmark" / "prepare_atari.py"
    local = args.data_dir / "atari" / f"{args.env_id}-dqn-200k"  # without a connection
    command = [str(tool), "--env-id", args.env_id, "--rlu-run", str(args.rlu_run)]
    command += ["--percent", str(args.data_percent), "--data-dir", str(args.data_dir)]
    if jax.process_count() == 1 and tool.exists():
        # The tool leaves the accelerator alone, ends with this process, and says what it lacks.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "ROSMO_PARENT": str(os.getpid())}
        if status := subprocess.run([sys.executable, *command], env=environment).returncode:
            raise SystemExit(status if status > 0 else f"{tool} was killed.")
    elif local.exists():
        print(f"No store of RL Unplugged: this is NOT its data, but {local}.", flush=True)
    else:
        words = shlex.join([f"benchmark/{tool.name}", *command[1:]])
        message = f"The data are missing; make them first: python {words}"
        raise SystemExit(f"{message}, in this script's repository; or give a --dataset.")
    return find_store(args) or local


def open_store(args) -> Store:
    """The store that the arguments name, or else the one in --data-dir; made if it is missing."""
    plays = args.eval_episodes > 0 or args.final_eval_episodes > 0  # else no simulator is needed
    actions = make_env(args.env_id, 1).single_action_space.n if plays else None
    path = args.dataset or find_store(args) or make_store(args)
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["version"] != 2:
            raise ValueError(f"it is of format {meta['version']}, not of 2")
        for name, crc32 in meta["crc32"].items():  # each chunk of frames has a checksum of its own
            if name.endswith(".npy") and zlib.crc32((path / name).read_bytes()) != crc32:
                raise ValueError(f"{name} is damaged")
        names = ("frames_offsets.npy", "steps.npy", "episodes.npy")
        offsets, steps, episodes = (np.load(path / name) for name in names)
        blob = memoryview(np.memmap(path / "frames.bin", np.uint8, "r"))
        if len(blob) != offsets[-1]:
            raise ValueError("frames.bin is not whole")
        game, num_actions, source = (meta[name] for name in ("env_id", "num_actions", "source"))
        if (most := steps["action"].max()) >= num_actions or game != args.env_id:
            raise ValueError(f"it is of {game} with {num_actions} actions, the largest {most}")
        if args.rlu_run != 1 and source.startswith("run") and source != f"run{args.rlu_run}":
            raise ValueError(f"it is {source} of RL Unplugged, not --rlu-run {args.rlu_run}")
        if plays and actions != num_actions:
            raise ValueError(f"it has {num_actions} actions, and the game has another number")
        if meta["percent"] < args.data_percent:
            raise ValueError(f"it has {meta['percent']:g}% of the data: lower --data-percent")
        # p% of a checkpoint are its episodes from the start until they hold p% of its steps.
        first = np.searchsorted(episodes["checkpoint"], episodes["checkpoint"])
        before = episodes["start"] - episodes["start"][first]
        limit = args.data_percent / 100 * meta["steps_per_checkpoint"]
        episodes = episodes[(before < limit) | (args.data_percent == 100)]
        index = np.concatenate([np.arange(e["start"], e["start"] + e["length"]) for e in episodes])
        facts = {"episodes": len(episodes), "steps": len(index), "source": source}
        facts["mean_return"] = float(episodes["return"].mean())
        facts["crc32"] = zlib.crc32(steps[index])
        store = Store(meta, blob, offsets, steps, episodes, index, facts)
        some = index[:: len(index) // 100 + 1]  # to read all of the frames takes minutes
        facts["frames_crc32"] = zlib.crc32(read_frames(store, some))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, OSError) or type(error) is ValueError else repr(error)
        message = f"{path} cannot be used as a store of {args.env_id}: {reason}"
        raise SystemExit(f"{message}. Give another --dataset, or make it again.") from None
    if len({*all_processes(facts["crc32"] ^ facts["frames_crc32"])}) > 1:
        raise SystemExit("The processes of this run see different data: all must read one store.")
    return store


def read_frames(store: Store, index: np.ndarray) -> np.ndarray:
    """Frames [N, 84, 84] of the steps `index` [N]; runs of consecutive steps are read together."""
    frames = np.empty((len(index), 84, 84), np.uint8)
    decompressor = zstandard.ZstdDecompressor()
    new_run = (np.diff(index) != 1) | (index[1:] % CHUNK == 0)
    bounds = [0, *np.flatnonzero(new_run) + 1, len(index)]
    for first, end in itertools.pairwise(bounds):
        chunk, skip = divmod(index[first], CHUNK)
        record = store.blob[store.offsets[chunk] : store.offsets[chunk + 1]]
        if zlib.crc32(record[:-4]) != int.from_bytes(record[-4:], "little"):
            game = store.meta["env_id"]
            raise SystemExit(f"A chunk of frames.bin is damaged: make the store of {game} again.")
        data = np.frombuffer(decompressor.decompress(record[:-4]), np.uint8)
        frames[first:end] = data.reshape(CHUNK, 84, 84)[skip : skip + end - first]
    return frames


def sample_batch(
    store: Store, seed: int, step: int, batch_size: int, length: int, rows: Any = slice(None)
) -> Batch:
    """Batch number `step`, or those `rows` of it: windows that start anywhere.

    A window goes on into the next episode where its own ends, and from the last to the first.
    """
    rng, num_steps = np.random.default_rng((seed, step)), len(store.index)
    start = rng.integers(num_steps, size=batch_size)[rows]
    index = store.index[(start[:, None] + np.arange(-3, length)) % num_steps]  # [B, 3 + T]
    steps = store.steps[index[:, 3:]]
    names = ("reward", "is_last", "is_terminal")
    return Batch(
        frames=read_frames(store, index.ravel()).reshape(*index.shape, 84, 84),
        history=np.minimum(steps["age"], 3).astype(np.uint8),
        action=steps["action"].astype(np.int32),
        **{name: np.ascontiguousarray(steps[name]) for name in names},
    )


def load_batches(load: Callable, first: int, num_threads: int) -> Iterator:
    """Yields load(first), load(first + 1), ... in order, made ahead by threads."""
    ahead = max(4, num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        pending = deque(pool.submit(load, step) for step in range(first, first + ahead))
        for step in itertools.count(first + ahead):
            batch = pending.popleft().result()
            pending.append(pool.submit(load, step))
            yield batch


# --- environment (identical in *_atari.py and benchmark/prepare_atari.py) ---
def game_name(env_id: str) -> str:
    """ALE's name of the game that RL Unplugged calls `env_id`: MsPacman -> ms_pacman."""
    names = {rom.title().replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    if env_id not in names:
        near = difflib.get_close_matches(env_id, names, cutoff=0)
        raise SystemExit(f"There is no game {env_id!r}; the nearest names: {', '.join(near)}.")
    return names[env_id]


def make_env(env_id: str, num_envs: int, **kwargs: Any) -> AtariVectorEnv:
    """Dopamine's environment: sticky actions, minimal action set, no tricks at the reset."""
    settings = dict(repeat_action_probability=0.25, noop_max=0, use_fire_reset=False)
    return AtariVectorEnv(game_name(env_id), num_envs, reward_clipping=False, **settings, **kwargs)


# --- evaluate (identical in *_atari.py) ---
def evaluate(
    act: Callable, env_id: str, num_episodes: int, seed: int, max_frames: int = 108_000
) -> list[float] | None:
    """Raw returns of `num_episodes` episodes played side by side, or None if `act` returns None.

    `act` takes observations uint8 [E, 84, 84, 4] (newest frame last, zeros before the first) and a
    key, and returns actions [E]. An episode is cut off after `max_frames` frames of the emulator.
    """
    if num_episodes == 0:
        return []
    env = make_env(env_id, num_episodes, max_num_frames_per_episode=max_frames)
    key = jax.random.key(seed)
    seeds = np.random.default_rng(seed).integers(2**31, size=num_episodes, dtype=np.int32)
    observations, _ = env.reset(seed=seeds)
    returns, running = np.zeros(num_episodes), np.ones(num_episodes, bool)
    actions, size = np.zeros(num_episodes, np.int32), num_episodes
    with tqdm(total=num_episodes, desc="evaluation", unit="game", leave=False, disable=None) as bar:
        while running.any():
            if 8 * running.sum() <= size:  # the last few go on in a smaller batch
                size = int(running.sum())
            rows = np.resize(np.flatnonzero(running), size)  # with repeats: a new size compiles
            act_key, key = jax.random.split(key)
            chosen = act(np.ascontiguousarray(observations[rows].transpose(0, 2, 3, 1)), act_key)
            if chosen is None:
                return None
            actions[rows] = chosen
            observations, rewards, terminated, truncated, _ = env.step(actions)
            returns += running * rewards
            ended = running & (terminated | truncated)
            running &= ~ended
            bar.update(ended.sum())
    return returns.tolist()


# --- run folder (identical in *_atari.py and *_bsuite.py) ---
# What a resumed run may change (files are compared by content), and what the folder's name omits.
NOT_COMPARED = {"run_dir", "overwrite", "track", "data_dir", "dataset", "loader_threads"}
NOT_COMPARED |= {"checkpoint_every", "world_model"}
NOT_NAMED = NOT_COMPARED - {"dataset", "world_model"} | {"env_id", "seed", "num_seeds"}


class Run:
    """The folder of a run: config.json, metrics.jsonl, checkpoints/ and learning_curve.png.

    The same command finds its folder again and goes on from the last checkpoint in it.
    """

    def __init__(self, args, seeds: list[int], data: dict):
        """Opens the folder. Ends the program if it holds something else or this run is finished."""
        self.args, self.seeds, self.stopping = args, seeds, False
        self.started, self.seconds = time.monotonic(), Counter()
        self.writes = jax.process_index() == 0  # of the processes of a run on several hosts
        defaults = vars(type(args)())
        changed = [(k, v) for k, v in vars(args).items() if v != defaults[k] and k not in NOT_NAMED]
        variant = "".join(f"-{k.replace('_', '-')}={getattr(v, 'name', v)}" for k, v in changed)
        if len(variant) > 160:  # a name has 255 bytes at most
            variant = f"{variant[:150]}-{zlib.crc32(variant.encode()):08x}"
        if data.get("source") == "dqn" and not args.dataset:  # not the paper's data
            variant += "-dqn"
        name = f"seed{seeds[0]}" if len(seeds) == 1 else f"seeds{seeds[0]}-{seeds[-1]}"
        self.dir = args.run_dir or Path("runs", Path(__file__).stem, args.env_id + variant, name)
        config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "data": data}
        self.config = json.loads(json.dumps(config | {"starts": []}, default=str))
        self.compare(defaults)
        if self.writes:
            self.keep()
        lines = [] if args.overwrite else self.lines()
        final = [line["update"] for line in lines if "final/returns" in line]
        if final == [args.total_updates] * len(seeds):
            print(f"This run is finished: see {self.dir}, or give --overwrite to start again.")
            raise SystemExit(0)
        self.saved, self.checkpoint = self.load()
        if len(lines) < self.checkpoint["lines"]:
            message = f"{self.dir}/metrics.jsonl has lost lines of the updates until {self.saved:,}"
            raise SystemExit(f"{message}: put them back, or give --overwrite to start again.")
        if self.writes:
            self.open()
        hide = not (self.writes and sys.stderr.isatty())
        self.bar = tqdm(initial=self.saved, total=args.total_updates, unit="update", disable=hide)
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)

    def compare(self, defaults: dict) -> None:
        """Ends the program if the folder holds something else than this run."""
        files = [*self.dir.glob("*"), *self.dir.glob("checkpoints/*")]
        if not {path.name for path in files} - {"lock", "checkpoints", "tmp", ".DS_Store"}:
            return
        try:
            now, before = self.config, json.loads((self.dir / "config.json").read_text())
            # A longer run begins as the shorter one. An argument that an older version of the
            # script did not have counts as its default. Of the data what both say is compared.
            theirs = json.loads(json.dumps(defaults, default=str)) | before["args"]
            theirs |= {"script": before["script"], "data": now["data"] | before["data"]}
            ours = now["args"] | {"script": now["script"], "data": before["data"] | now["data"]}
            theirs["total_updates"] = max(theirs["total_updates"], ours["total_updates"])
            pairs = [(k, theirs[k], ours[k]) for k in ours if k not in NOT_COMPARED]
            changes = ", ".join(f"{k} {a} -> {b}" for k, a, b in pairs if a != b)
            mine, starts = theirs["script"] == ours["script"], [*before["starts"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            changes, starts = f"or its config.json is damaged: {error!r}", []
            mine = (self.dir / "lock").exists() and (self.dir / "checkpoints").is_dir()
        if not mine or (changes and not self.args.overwrite):
            message = f"{self.dir} holds something else ({changes}); give another --run-dir"
            advice = ", or --overwrite to delete the run in it" if mine else ""
            raise SystemExit(f"{message}{advice}.")
        self.config["starts"] = [] if self.args.overwrite else starts

    def keep(self) -> None:
        """Locks the folder for this process; ends the program if another process has it."""
        (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.dir.absolute() / "lock", is_singleton=True)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            message = f"Another process is writing to {self.dir}"
            raise SystemExit(f"{message}; wait for it, or give another --run-dir.") from None

    def open(self) -> None:
        """Writes down how the run was started; --overwrite deletes the run before it."""
        import matplotlib.figure  # noqa: F401  if it is missing, now and not after training

        if self.args.overwrite:
            old = [self.dir / name for name in ("metrics.jsonl", "learning_curve.png")]
            for path in [*old, *self.checkpoints()]:
                path.unlink(missing_ok=True)
        git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).resolve().parent)]
        git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
        start = {"commit": (found or "").strip() or None, "time": time.time()}
        start["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        packages = ("jax", "jaxlib", "flax", "optax", "numpy", "mctx", "ale_py", "bsuite")
        start |= {name: version(name) for name in packages if name in sys.modules}
        self.config["starts"].append(start)
        self.write("config.json", json.dumps(self.config, indent=2).encode())
        print(f"Run: {self.dir}, on {start['device']}.", flush=True)
        if self.args.track:
            import wandb

            options = {"id": f"{self.config['starts'][0]['time']:.6f}", "resume": "allow"}
            options["project"] = os.environ.get("WANDB_PROJECT", "rosmo-suite")
            options["reinit"] = "create_new"  # beside another run of this process
            options["settings"] = {"finish_timeout": 240}  # it would wait for ever without network
            try:
                self.wandb = wandb.init(dir=self.dir, config=self.config, **options)
            except Exception as error:  # of several kinds
                advice = "log in with 'wandb login', or set WANDB_MODE=offline"
                raise SystemExit(f"wandb: {' '.join(str(error).split())}; {advice}.") from None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder; a kill leaves it as it was or as it will be."""
        temporary = self.dir / "checkpoints" / "tmp"
        temporary.write_bytes(content)
        temporary.replace(self.dir / name)

    def lines(self) -> list[dict]:
        """The metrics written so far, but for a last line that a kill cut short."""
        path = self.dir / "metrics.jsonl"
        try:
            text = path.read_text() if path.exists() else ""
            return [{**json.loads(x)} for x in text[: text.rfind("\n") + 1].splitlines()]
        except (ValueError, TypeError):
            message = f"{path} is damaged: put it back, or give --overwrite to start again."
            raise SystemExit(message) from None

    def checkpoints(self) -> list[Path]:
        paths = [x for x in self.dir.glob("checkpoints/*.msgpack") if x.stem.isdecimal()]
        return sorted(paths, key=lambda path: int(path.stem))

    def load(self) -> tuple[int, dict]:
        """Updates done and content of the newest whole checkpoint, or of the start."""
        for path in [] if self.args.overwrite else self.checkpoints()[::-1]:
            data = path.read_bytes()
            if data[4:] and zlib.crc32(data[4:]).to_bytes(4, "little") == data[:4]:
                return int(path.stem), serialization.msgpack_restore(data[4:])
            print(f"{path} is damaged: it is not used.", file=sys.stderr)
        return 0, {"state": None, "sums": None, "lines": 0, "wall_time": 0.0}

    def restore(self, state):
        """(done, state, sums) of the checkpoint, or else (0, state, None)."""
        saved, self.checkpoint = self.checkpoint, None  # it may be large
        if self.saved:
            ours = serialization.to_state_dict(state)
            if jax.tree.map(np.shape, ours) != jax.tree.map(np.shape, saved["state"]):
                message = f"{self.dir} has checkpoints of another network; give another --run-dir"
                raise SystemExit(f"{message}, or --overwrite to delete the run in it.")
            state = serialization.from_state_dict(state, saved["state"])
            print(f"Going on from update {self.saved:,} in {self.dir}.", flush=True)
        self.started -= saved["wall_time"]
        if self.writes:  # metrics that were logged after it are dropped: they come again, the same
            lines = self.lines()[: saved["lines"]]
            self.write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode())
        return self.saved, state, saved["sums"]

    def save(self, done: int, state, sums: dict | None) -> None:
        """Writes a checkpoint; sums: of the metrics since the last line of the log."""
        self.check_finite(done, sums or {})
        if self.writes and done != self.saved:
            saved = {"state": serialization.to_state_dict(state), "sums": sums}
            saved |= {"lines": len(self.lines()), "wall_time": time.monotonic() - self.started}
            content = serialization.msgpack_serialize(jax.device_get(saved))
            crc32 = zlib.crc32(content).to_bytes(4, "little")
            self.write(f"checkpoints/{done}.msgpack", crc32 + content)
            for path in self.checkpoints():  # the last two are kept
                if int(path.stem) not in (self.saved, done):
                    path.unlink()
        self.saved = done

    def log(self, done: int, seed: int, values: dict) -> None:
        """Appends a line to metrics.jsonl, with the seconds of each part of the work since."""
        self.check_finite(done, values)
        if self.writes:
            values = {k: np.asarray(x).tolist() for k, x in values.items() if np.isfinite(x).all()}
            line = {"update": done, "seed": seed, "wall_time": time.monotonic() - self.started}
            with (self.dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line | values | self.seconds) + "\n")
            self.seconds.clear()
            if self.args.track:
                prefix = f"seed{seed}/" if len(self.seeds) > 1 else ""
                self.wandb.log({prefix + name: x for name, x in values.items()}, step=done)

    def check_finite(self, done: int, metrics: dict) -> None:
        for name in ("losses/total", "charts/grad_norm"):
            if not np.isfinite(metrics.get(name, 0.0)).all():
                message = f"{name} is not finite by update {done:,}; checkpoints before it are kept"
                raise SystemExit(f"{message}. Try a lower learning rate.")

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Counts the seconds of a part of the work for the log."""
        start = time.monotonic()
        yield
        self.seconds[f"seconds/{part}"] += time.monotonic() - start

    def show(self, done: int, status: str) -> None:
        """Progress: on a terminal a bar, elsewhere a line."""
        self.bar.set_postfix_str(status)
        if self.writes and self.bar.disable:
            print(f"update {done:,}: {status}", flush=True)

    def interrupt(self, number: int, _) -> None:
        if self.stopping and number == signal.SIGINT:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.stopping = True

    def exit(self) -> None:
        self.bar.close()
        self.plot()
        but = " without --overwrite" if self.args.overwrite else ""
        print(f"Stopped at update {self.saved:,}; the same command{but} goes on.", file=sys.stderr)
        self.end_mirror(130)
        raise SystemExit(130)

    def finish(self, done: int, sampled, greedy) -> None:
        """Draws the curve and logs the final returns [seeds, episodes], which ends the run."""
        self.bar.close()
        self.plot()
        for seed, returns, returns_greedy in zip(self.seeds, sampled, greedy, strict=True):
            final = {"final/returns": returns, "final/returns_greedy": returns_greedy}
            if len(returns):
                mean, mean_greedy = np.mean(returns), np.mean(returns_greedy)
                final |= {"final/return_mean": mean, "final/return_mean_greedy": mean_greedy}
                data = self.config["data"]["mean_return"]
                print(f"Final return {mean:.2f}, greedy {mean_greedy:.2f} (data {data:.2f}).")
            self.log(done, seed, final)
        self.stopping = True  # from here on Ctrl-C does not wait
        print(f"See {self.dir}.")
        self.end_mirror(0)

    def end_mirror(self, status: int) -> None:
        """Sends what Weights & Biases has not got yet."""
        if self.args.track and self.writes:
            try:
                self.wandb.finish(exit_code=status)
            except (Exception, KeyboardInterrupt):
                rest = f"wandb sync {self.dir}/wandb/*run-*"
                print(f"Not all was sent: '{rest}' sends the rest.", file=sys.stderr)

    def plot(self) -> None:
        """Draws learning_curve.png: the evaluations' mean returns, each seed's and their mean."""
        lines = self.lines() if self.writes else []
        if not (lines := [line for line in lines if "eval/return_mean" in line]):
            return
        from matplotlib.figure import Figure  # without pyplot's global state

        updates = [x["update"] for x in lines if x["seed"] == self.seeds[0]]
        returns = [[x["eval/return_mean"] for x in lines if x["seed"] == s] for s in self.seeds]
        n = 1 + len(updates) // 25  # evaluations in the moving average
        curves = np.transpose([np.convolve(row, np.ones(n) / n, "valid") for row in returns])
        axes = (figure := Figure((7, 4.5), layout="constrained")).subplots()
        axes.plot(updates[n - 1 :], curves, color="C0", alpha=0.25, linewidth=1)
        axes.plot(updates[n - 1 :], curves.mean(axis=1), label=f"mean of {len(self.seeds)} seed(s)")
        axes.axhline(self.config["data"]["mean_return"], color="C1", linestyle="--", label="data")
        title = f"{Path(__file__).stem} on {self.args.env_id}"
        axes.set(xlabel="updates", ylabel=f"return, mean of {n} evaluation(s)", title=title)
        axes.legend()
        figure.savefig(self.dir / "learning_curve.png", dpi=120)


# --- end run folder ---


# Bounds of the numeric arguments; other integers go from 1 to 1e9, other floats from 0 to 1e9.
TINY = 1e-30
RANGES = {"seed": (0, 2**32 - 1), "data_percent": (TINY, 100), "num_bins": (3, 10**6)}
RANGES |= {"learning_rate": (TINY, 1), "max_grad_norm": (TINY, 1e9), "discount": (0, 1)}
RANGES |= {"learning_rate_decay": (TINY, 1), "channels": (2, 10**6), "eval_max_frames": (4, 10**9)}
RANGES |= {"eval_episodes": (0, 10**6), "final_eval_episodes": (0, 10**6), "rlu_run": (1, 5)}
RANGES |= {"beta": (TINY, 1e9), "num_action_samples": (1, 10_000), "loader_threads": (1, 256)}


# --- checks (identical in *_atari.py and *_bsuite.py) ---
def check_args(args, ranges: dict[str, tuple[float, float]]):
    """The arguments, with ~ in paths expanded. A number out of its range ends the program."""
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if type(value) in (int, float):
            least, most = ranges.get(name, (1 if type(value) is int else 0, 1e9))
            if not least <= value <= most:
                low = "more than 0" if least == TINY else f"at least {least:g}"
                raise SystemExit(f"--{flag} is {value}; give {low} and at most {most:.10g}.")
        if name.endswith("batch_size") and value % jax.device_count():
            message = f"--{flag} {value} cannot be shared by {jax.device_count()} devices"
            raise SystemExit(f"{message}; give a multiple.")
    paths = {k: Path(os.path.expanduser(x)) for k, x in vars(args).items() if isinstance(x, Path)}
    return dataclasses.replace(args, **paths)


def prepare_jax() -> None:
    """Demands a device; keeps compiled programs in the user's cache folder, if there is one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        message = f"JAX finds no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        reason = str(error) or "install jax for it, or unset it."
        raise SystemExit(f"{message}: {reason}") from None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # On GPUs processes tune a program together; one that has it cached keeps the others waiting.
    keeps = jax.process_count() == 1 or jax.default_backend() != "gpu"
    if keeps and not (jax.config.jax_compilation_cache_dir or cache.startswith("~")):
        jax.config.update("jax_compilation_cache_dir", f"{cache}/rosmo-suite")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# --- processes (identical in *_atari.py) ---
def join_processes(args, *shared: int) -> None:
    """Splits a CPU into devices; joins the processes of a run, which all start this script.

    The devices are at most one a core, and all processes' together divide every batch size and all
    of `shared`.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, number, index = given = [os.environ.get(name, "") for name in names]
    joins = number.isdecimal() and index.isdecimal() and int(index) < int(number)
    if any(given) and not (re.fullmatch(r".+:\d+", address) and joins):
        message = f"A run of several processes needs all of {', '.join(names)}"
        raise SystemExit(f"{message}; the first is HOST:PORT, the last counts from 0.")
    tasks = int(number or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if jax.config.jax_num_cpu_devices < 0:  # not set by JAX's own JAX_NUM_CPU_DEVICES
        sizes = [value for name, value in vars(args).items() if name.endswith("batch_size")]
        share = math.gcd(*sizes, *shared) // tasks
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        numbers = [n for n in range(1, cores + 1) if share % n == 0]
        jax.config.update("jax_num_cpu_devices", max(numbers))
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM for itself
    if address or tasks > 1:
        jax.distributed.initialize(*((address, int(number), int(index)) if address else ()))
    prepare_jax()
    if len({*all_processes(zlib.crc32(repr(args).encode()))}) > 1:
        raise SystemExit("The processes of this run have different arguments: give all the same.")


def all_processes(value: int) -> list[int]:
    """The value of every process; all of them must call it."""
    return multihost_utils.process_allgather(np.uint32(value)).tolist()


def device_mesh() -> Mesh:
    """All devices along the axis `data`, in the order of processes, as the rows of a batch."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def tell_if_slow(run, done: int) -> None:
    """Says after the second update of a run if all of them may take more than a week."""
    seconds = run.seconds["seconds/update"]
    days = seconds * run.args.total_updates / 86_400
    if run.writes and done == 2 and days > 7:
        took = f"An update of {run.dir} takes {seconds:,.1f} s here, all up to {days:,.0f} days"
        print(f"{took}; the README has small settings ('Atari on a laptop').", flush=True)


# --- main (identical in rosmo_atari.py, muzero_*_atari.py, bc_atari.py and c[rq]*_atari.py) ---
def main(args: Args) -> None:
    join_processes(args)
    args = check_args(args, RANGES)
    store = open_store(args)
    run = Run(args, [args.seed], store.facts)
    if len({*all_processes(run.saved)}) > 1:
        raise SystemExit(f"The processes see different files in {run.dir}: all must share it.")
    network = make_network(store.meta["num_actions"], args)
    mesh = device_mesh()
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    init_key, key = jax.random.split(jax.random.key(args.seed))
    state = jax.jit(init_state, static_argnums=(1, 2))(init_key, network, args)
    done, state, sums = run.restore(state)
    state, sums = jax.device_put((state, sums), replicated)
    rows = np.split(np.arange(args.batch_size), jax.process_count())[jax.process_index()]

    def load(step: int) -> Batch:
        batch = sample_batch(store, args.seed, step, args.batch_size, window_length(args), rows)
        return jax.make_array_from_process_local_data(by_device, batch)

    def play(num_episodes: int, greedy: bool) -> list[float] | None:
        if run.stopping:
            return None
        seed = int(np.random.default_rng((args.seed, done, 1)).integers(2**31))  # no batch has it
        params = jax.tree.map(lambda x: x.addressable_data(0), state.params)

        def policy(observation, key):
            return None if run.stopping else act(params, observation, key, greedy, network, args)

        with run.time("evaluation"):
            return evaluate(policy, args.env_id, num_episodes, seed, args.eval_max_frames)

    run.show(done, "compiling")
    # One program for all metrics: a CPU's devices hang where 32 programs wait.
    add = jax.jit(partial(jax.tree.map, lambda x, y: jnp.float32(x) + y))
    batches = load_batches(load, done, args.loader_threads)
    metrics, played = None, ""
    while True:
        ends = done == args.total_updates
        evaluates = ends or (done > 0 and args.eval_episodes > 0 and done % args.eval_every == 0)
        agrees = evaluates or done % args.log_every == 0 or jax.process_count() == 1
        stops = agrees and any(all_processes(run.stopping))  # all ask at the same updates
        if stops or evaluates or done % args.checkpoint_every == 0:
            run.save(done, state, sums)
        if evaluates and run.writes and not stops:
            if returns := play(args.eval_episodes, args.eval_greedy):
                mean = np.mean(returns)
                run.log(done, args.seed, {"eval/return_mean": mean, "eval/returns": returns})
                played = f", return {mean:.1f}"
        if (stops or evaluates) and any(all_processes(stops or run.stopping)):  # all wait here
            run.exit()
        if ends:
            break
        with run.time("data"):
            batch = next(batches)
        with run.time("update" if metrics else "compilation"):
            previous, done = metrics, done + 1
            state, metrics = update(state, key, batch, network, args)
            sums = add(sums, metrics) if sums else metrics
            logs = done % args.log_every == 0
            jax.block_until_ready(sums if logs or done < 3 else previous)  # at most one batch waits
        run.bar.update()
        tell_if_slow(run, done)
        if logs:
            means = {name: value / args.log_every for name, value in jax.device_get(sums).items()}
            run.log(done, args.seed, means)
            run.show(done, f"loss {means['losses/total']:.3f}{played}")
            sums = None
    if number := args.final_eval_episodes:
        run.show(done, f"final evaluation: {number} sampled, {number} greedy episodes")
    finals = [play(number, greedy) for greedy in (False, True)] if run.writes else []
    if any(all_processes(None in finals)):  # the others wait for the first
        run.exit()
    if run.writes:
        run.finish(done, *([returns] for returns in finals))


# --- entry (identical in *_atari.py) ---
if __name__ == "__main__":
    status: Any = 130
    but = " without --overwrite" if "--overwrite" in sys.argv else ""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    try:
        head = (__doc__ or "").split("\n\nWhere")[0].replace("\n", "\n ")  # or tyro joins lines
        main(tyro.cli(Args, description=head))
        status = 0
    except KeyboardInterrupt:
        print(f"Stopped; the same command{but} goes on from the last checkpoint.", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that cannot be written, a closed pipe
        status = f"{error}: put that right, then the same command{but} goes on."
    except ModuleNotFoundError as error:
        status = f"{error}: install it, or all that stands at the top of this script."
    except Exception as error:
        status, reason = traceback.format_exc(), str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            advice = "give smaller batches or a smaller network (--help), or end what else uses it"
            status = f"The memory is not enough: {advice}. {reason}".strip()
    except SystemExit as end:
        status = end.code
    if status and jax.distributed.is_initialized():  # the other processes do not wait for this one
        if isinstance(status, str):
            print(status, file=sys.stderr, flush=True)
        time.sleep(3 * (jax.process_index() == 0))  # its end aborts those that have not ended
        os._exit(status if isinstance(status, int) else 1)
    raise SystemExit(status)
