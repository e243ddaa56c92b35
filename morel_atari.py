# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "ale-py==0.12.1", "filelock==4.3.1", "flax==0.12.8", "gymnasium==1.4.0", "jax==0.10.2",
#   "matplotlib==3.11.2", "numpy==2.4.6", "optax==0.2.8", "tqdm==4.70.1", "tyro==1.0.17",
#   "wandb==0.31.0", "zstandard==0.25.0",
# ]
# ///
"""MOReL on Atari (Kidambi et al., 2020), a baseline of ROSMO.

MOReL learns an ensemble of world models from logged episodes. The members
disagree where the data do not reach: there the pessimistic MDP halts with a
penalty, so that a policy that PPO trains inside it is kept on known ground. A
member is a recurrent state-space model with categorical latents (DreamerV2:
Hafner et al., 2021).

    python morel_atari.py --env-id MsPacman     # world model, then policy
    python morel_atari.py --world-model FOLDER  # of another run

The world model is a run of its own in {run folder}-world-model: config.json,
metrics.jsonl, checkpoints/, members.msgpack (the trained ensemble) and
world_model.png, real frames above open-loop predictions.

Where ROSMO's paper is silent, this is our reconstruction; F.1 gives the world model pydreamer's
values, and of MOReL it names the parts alone.
1. Frames stay 84 x 84; the decoder's kernels are 7, 6, 6, 6 for that size, and it predicts the
   difference from a learned image, at first the data's mean. The model sees intensity / 255 - 0.5.
2. The members differ in their initial parameters and batches. Each gradient is clipped on its own.
3. Windows start at any step and go on into the next episode, where the state is reset; a window
   that starts inside an episode begins with an empty state and the action before it.
4. Training ends when the loss on held-out episodes has not fallen by 0.5% for 10,000 updates. The
   ensemble is that of the evaluation with the lowest held-out loss.
5. Logged rewards are clipped to [-1, 1] (--no-clip-rewards), predicted ones are not.
6. AdamW decays kernels only.
7. Members share no latent coordinates, so that they are compared in what they predict: the next
   frame and the reward. The prior's mode stands for its distribution.
8. The policy sees four frames, logged ones at first and then decoded ones, rounded to the game's
   256 greys, and is evaluated without the model.
9. One member, drawn for each episode, gives frame, reward and end; the others filter its frames.
10. An update is an iteration of PPO with CleanRL's values for Atari, but 64 rows and no clipping of
    the value loss. A row is one imagined episode after another; minibatches take equally from all.
11. The policy starts at random or, with --bc-updates, imitates the data first.
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
    seed: int = 0  # seed of the parameters, the batches, the imagined episodes and the evaluation
    total_updates: int = 1_250  # number of updates of the policy, each an iteration of PPO
    log_every: int = 10  # updates (of model and policy) over which the logged losses are averaged
    checkpoint_every: int = 50  # updates of the policy between checkpoints; evaluations save, too
    run_dir: Path | None = None  # folder of the run; None: runs/{script}/{game}[-changes]/seed{n}
    overwrite: bool = False
    """start again in a folder that holds a run, and delete that run and its world model"""
    track: bool = False  # mirror the metrics to Weights & Biases

    # data
    rlu_run: int = 1  # run of RL Unplugged, 1 to 5
    data_percent: float = 100.0  # learn from the first p% of the data of each checkpoint of the DQN
    data_dir: Path = Path("data")  # folder of the datasets, which are made when they are missing
    dataset: Path | None = None  # store to open; None: the one in data_dir, made if it is missing
    loader_threads: int = 4  # threads that decode batches; as many, at least 4, are made ahead
    clip_rewards: bool = True  # clip rewards to [-1, 1]
    heldout_percent: float = 5.0  # percentage of the episodes held out from the world model

    # world model
    world_model: Path | None = None  # {run folder}-world-model of another run; None: the run's own
    members: int = 4  # E, members of the ensemble of world models
    deter: int = 1024  # world model: size of the recurrent state h
    hidden: int = 1000  # world model: units of the layers around the recurrent state
    latents: int = 32  # world model: categorical variables of the latent state z
    classes: int = 32  # world model: classes of each latent variable
    depth: int = 48  # world model: channels of its first convolution; all others scale with it
    head_units: int = 400  # world model: units of the layers of the reward's and terminal's heads
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the networks (auto: bfloat16 on accelerators); the rest is always float32"""

    # world model: training
    model_updates: int = 200_000  # world model: largest number of updates of a member
    model_batch_size: int = 32  # world model: windows in a member's batch, over all devices
    model_length: int = 48  # T, steps of a window of the world model
    model_learning_rate: float = 3e-4  # world model: AdamW's learning rate
    model_weight_decay: float = 0.01  # world model: AdamW's weight decay, on kernels only
    model_max_grad_norm: float = 200.0  # world model: largest global norm of a member's gradient
    kl_coef: float = 0.1  # β, weight of the KL divergence in the loss of the world model
    kl_balance: float = 0.8  # world model: share of the KL's gradient that moves the prior
    model_eval_every: int = 1_000  # world model: updates between evaluations, which save, too
    model_eval_batches: int = 8  # world model: batches of held-out windows in an evaluation
    model_patience: int = 10_000
    """world model: updates without enough improvement of the held-out loss before training ends"""
    model_min_improvement: float = 0.005  # world model: least relative improvement that counts

    # policy: pessimistic MDP
    discrepancy: Literal["frame", "block"] = "frame"
    """imagined episodes: discrepancy of whole frames, or of the worst block of 7 x 7 pixels"""
    halt_quantile: float = 0.999  # part of the steps of replayed logged episodes that do not halt
    halt_batches: int = 16  # batches of replayed logged episodes from which the threshold is taken
    halt_penalty: float = -10.0  # imagined episodes: reward of a step that halts
    horizon: int = 50  # imagined episodes: steps after which one is cut off
    warm_up: int = 16  # imagined episodes: logged frames that the members filter, up to the start
    starts: int = 4  # imagined episodes: starts for each row in an update; used again if too few

    # policy: network (D.2.1)
    channels: int = 64  # channels of the policy's blocks; the rest of its network scales with it

    # policy: behavior cloning
    bc_updates: int = 0  # updates of the policy that imitate logged actions, before those of PPO
    bc_batch_size: int = 256  # logged steps in a batch of behavior cloning, over all devices
    bc_learning_rate: float = 7e-4  # Adam's learning rate for behavior cloning

    # policy: PPO
    batch_size: int = 64  # PPO: rows of imagined episodes, over all devices
    rollout_length: int = 128  # PPO: steps of each row in an update
    epochs: int = 4  # PPO: passes over an update's steps
    minibatches: int = 4  # PPO: gradient steps of a pass
    learning_rate: float = 2.5e-4  # PPO: Adam's learning rate at first
    anneal_updates: int = 1_250  # PPO: updates over which the learning rate falls to zero
    max_grad_norm: float = 0.5  # PPO: largest global norm of the gradient
    discount: float = 0.99  # policy: discount factor γ
    gae_lambda: float = 0.95  # λ of PPO's generalised advantage
    clip_ratio: float = 0.1  # PPO: ε, the probability ratio is clipped to [1 - ε, 1 + ε]
    entropy_coef: float = 0.01  # PPO: weight of the entropy
    value_coef: float = 0.5  # PPO: weight of the value's loss

    # policy: evaluation in the game
    eval_every: int = 50  # updates of the policy between two evaluations
    eval_episodes: int = 2  # episodes of each evaluation during training
    final_eval_episodes: int = 100  # episodes of the final evaluation, and as many greedy ones
    eval_max_frames: int = 108_000  # frames of the game after which an episode is cut off
    eval_greedy: bool = False  # take the most probable action in evaluations during training


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


def model_windows(batch: Batch, clip_rewards: bool) -> Windows:
    """Windows of T from a batch of T + 1: an action and its reward go to the step after them."""
    is_first = batch.history[:, 1:] == 0
    reward = batch.reward[:, :-1] * ~is_first
    return Windows(
        frame=batch.frames[:, 4:],
        action=batch.action[:, :-1] * ~is_first - is_first,  # -1 at a first frame
        reward=reward.clip(-1, 1) if clip_rewards else reward,
        is_first=is_first,
        terminal=batch.is_terminal[:, 1:],
    )


def to_image(frame):
    """Frames uint8 [...] -> intensity / 255 - 0.5, float32."""
    return frame.astype(jnp.float32) / 255 - 0.5


def to_frame(image):
    """The inverse of `to_image`, rounded and clipped: float32 [...] -> uint8 [...]."""
    return jnp.round(jnp.clip(image + 0.5, 0, 1) * 255).astype(jnp.uint8)


class WorldModel(nn.Module):
    """A member: a recurrent state-space model with categorical latents, encoder and decoders."""

    num_actions: int
    deter: int
    hidden: int
    latents: int
    classes: int
    depth: int
    head_units: int
    dtype: Any

    def setup(self):
        dense = partial(nn.Dense, self.hidden, dtype=self.dtype)
        logits = partial(nn.Dense, self.latents * self.classes, dtype=jnp.float32)
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
        """What states [...] look like."""
        latent = state.latent.reshape(*state.latent.shape[:-2], -1)
        x = jnp.concatenate([state.deter, latent], axis=-1)
        return Decoded(self.decoder(x), self.reward_head(x), self.terminal_head(x))

    def __call__(self, state: State, action, frame):
        """One filtered step, for `init`."""
        deter = self.advance(state, action)
        posterior = self.posterior(deter, self.encode(frame))
        return self.prior(deter), posterior, self.decode(State(deter, draw_latent(posterior)))


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

    As a sub-pixel convolution, whose channels become 2 x 2 pixels: the same but for a bias of each
    of the four, and faster on a CPU, which also takes a padded input better than a padded
    convolution, whose gradient is slow.
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
        x = nn.elu(nn.Dense(7 * 7 * 4 * self.depth, dtype=self.dtype)(x))  # 1 x 1 to 7 x 7
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
    return State(jnp.zeros((*shape, network.deter), jnp.float32), latent)


def imagine(network: WorldModel, params, state: State, action, key=None) -> State:
    """s_{t+1} from states and actions [...] alone: the prior's mode or, with a key, a sample."""
    deter = network.apply(params, state, action, method="advance")
    return State(deter, draw_latent(network.apply(params, deter, method="prior"), key))


def observe(network: WorldModel, params, windows: Windows, key=None):
    """Filters windows [B, T] with the posterior (its mode, or samples if there is a key).

    The state is empty before a window and at every first frame.

    Returns:
      The states [B, T], and the prior's and the posterior's logits [B, T, latents, classes].
    """
    batch_size, length = windows.action.shape
    embedding = network.apply(params, windows.frame, method="encode")
    keys = None if key is None else jax.random.split(key, length)
    empty = empty_state(network, batch_size)

    def step(state, inputs):
        action, is_first, embedding, key = inputs
        state = jax.tree.map(partial(jax.vmap(jnp.where), is_first), empty, state)
        deter = network.apply(params, state, action, method="advance")
        logits = network.apply(params, deter, embedding, method="posterior")
        state = State(deter, draw_latent(logits, key))
        return state, (state, logits)

    inputs = (windows.action, windows.is_first, embedding)
    inputs = (*(jnp.moveaxis(x, 1, 0) for x in inputs), keys)
    _, outputs = jax.lax.scan(step, empty, inputs)
    states, posterior = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)
    return states, network.apply(params, states.deter, method="prior"), posterior


def balanced_kl(posterior, prior, balance: float):
    """KL(posterior ‖ prior) of logits [..., latents, classes] -> [...].

    The prior gets the share `balance` of its gradient.
    """
    log_q, log_p = jax.nn.log_softmax(posterior), jax.nn.log_softmax(prior)
    kl = partial(optax.losses.kl_divergence_with_log_targets, axis=(-2, -1))  # (log p, log q)
    stop = jax.lax.stop_gradient
    return balance * kl(log_p, stop(log_q)) + (1 - balance) * kl(stop(log_p), log_q)


def world_model_loss(params, windows: Windows, key, network: WorldModel, args: Args):
    """-log p(o, r, terminal | s) + β KL(posterior ‖ prior), per step of [B, T] -> (loss, parts)."""
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


class MemberState(NamedTuple):
    params: Any
    opt_state: Any
    step: Any  # int32, updates done


class ModelState(NamedTuple):
    """Of the ensemble in training."""

    members: list[MemberState]
    best: list  # parameters of each, at the evaluation with the lowest held-out loss
    best_loss: Any  # float32, that loss
    best_update: Any  # int32, the evaluation's
    reference: Any  # float32, held-out loss of the last evaluation that was better by enough
    improved: Any  # int32, its update


def make_world_model(num_actions: int, args: Args) -> WorldModel:
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = auto if args.dtype == "auto" else args.dtype
    sizes = (args.deter, args.hidden, args.latents, args.classes, args.depth, args.head_units)
    return WorldModel(num_actions, *sizes, jnp.dtype(dtype))


def model_optimizer(args: Args) -> optax.GradientTransformation:
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(
        args.model_learning_rate, eps=1e-5, weight_decay=args.model_weight_decay, mask=is_weight
    )
    return optax.chain(optax.clip_by_global_norm(args.model_max_grad_norm), adamw)


def init_members(key, network: WorldModel, num_members: int) -> list:
    """Parameters of the members, each drawn on its own: as a vmap it would compile for minutes."""
    inputs = (empty_state(network), jnp.int32(0), jnp.zeros((84, 84), jnp.uint8))
    # Runs once a member, so it is compiled without optimisation, which takes longer than the run.
    init = jax.jit(network.init, compiler_options={"xla_backend_optimization_level": 0})
    return [init(member_key, *inputs) for member_key in jax.random.split(key, num_members)]


copy = jax.jit(partial(jax.tree.map, jnp.copy))


def init_model(key, background, network: WorldModel, args: Args) -> ModelState:
    """The ensemble before its first update.

    background: image [84, 84]. Most of a frame never changes: the decoder starts from it.
    """
    members = []
    for params in init_members(key, network, args.members):
        params["params"]["decoder"]["background"] = jnp.asarray(background.ravel())
        members.append(MemberState(params, model_optimizer(args).init(params), jnp.int32(0)))
    best = [copy(member.params) for member in members]  # updates donate theirs
    never = (jnp.float32(jnp.inf), jnp.int32(0))
    return ModelState(members, best, *never, *never)


@jax.jit(static_argnames=("network", "args"), donate_argnames="state")
def update_member(state: MemberState, windows: Windows, key, network: WorldModel, args: Args):
    """One update of a member on windows [B, T] -> (state, metrics)."""
    # The key belongs to the step, so that a resumed run draws the same latents.
    key = jax.random.fold_in(key, state.step)
    gradient, losses = jax.grad(world_model_loss, has_aux=True)(
        state.params, windows, key, network, args
    )
    delta, opt_state = model_optimizer(args).update(gradient, state.opt_state, state.params)
    metrics = {f"losses/{name}": value for name, value in losses.items()}
    metrics["charts/grad_norm"] = optax.tree.norm(gradient)
    params = optax.apply_updates(state.params, delta)
    return MemberState(params, opt_state, state.step + 1), metrics


def update_model(state: ModelState, windows: list[Windows], keys, network, args: Args):
    """One update of each member on windows of its own -> (state, the members' mean metrics).

    They take turns: a vmap makes grouped convolutions of theirs, with which a CPU needs almost
    twice as long.
    """
    updated = []
    for inputs in zip(state.members, windows, keys, strict=True):
        updated.append(update_member(*inputs, network, args))
        jax.block_until_ready(updated[-2:-1])  # or programs queue up: a CPU's devices hang at 32
    members, metrics = zip(*updated, strict=True)
    return state._replace(members=list(members)), mean_of(metrics)


@jax.jit
def mean_of(metrics) -> dict:
    """The mean of each metric in a sequence of dictionaries."""
    return jax.tree.map(lambda *x: sum(x) / len(x), *metrics)


def note_evaluation(state: ModelState, loss: float, update: int, args: Args) -> ModelState:
    """Keeps the best parameters, and the loss and update from which the patience counts."""
    now = (jnp.float32(loss), jnp.int32(update))
    if loss < float(state.reference) * (1 - args.model_min_improvement):
        state = state._replace(reference=now[0], improved=now[1])
    if loss < float(state.best_loss):
        best = [copy(member.params) for member in state.members]
        state = state._replace(best=best, best_loss=now[0], best_update=now[1])
    return state


CONTEXT, AHEAD = 5, 15  # frames that an evaluation filters and then predicts


def predict_frames(network: WorldModel, params, windows: Windows) -> jax.Array:
    """Images [B, AHEAD, 84, 84] of a member after CONTEXT frames of windows [B, T].

    Open loop: it sees the logged actions alone, and every latent of them is the prior's mode.
    """
    states, _, _ = observe(network, params, jax.tree.map(lambda x: x[:, :CONTEXT], windows))

    def step(state, action):
        state = imagine(network, params, state, action)
        return state, state

    action = windows.action[:, CONTEXT : CONTEXT + AHEAD].T
    _, states = jax.lax.scan(step, jax.tree.map(lambda x: x[:, -1], states), action)
    images = network.apply(params, states, method="decode").image
    return jnp.moveaxis(images, 0, 1)


@jax.jit(static_argnames=("network", "args"))
def evaluate_member(params, windows: Windows, key, network: WorldModel, args: Args):
    """Held-out losses and prediction errors of a member on windows [B, T].

    Returns:
      Two dictionaries to log: the mean losses and, as sums over the windows inside one episode,
      the mean squared errors of a pixel, for predictions and for copies of the last frame; the
      number of these windows; the predictions, uint8 [B, AHEAD, 84, 84].
    """
    _, losses = world_model_loss(params, windows, key, network, args)
    predicted = predict_frames(network, params, windows)
    image = to_image(windows.frame[:, : CONTEXT + AHEAD])
    inside = ~jnp.any(windows.is_first[:, 1 : CONTEXT + AHEAD], axis=1)  # [B]
    errors = {}
    for name, guess in (("error", predicted), ("copy_error", image[:, CONTEXT - 1, None])):
        squares = jnp.mean((guess - image[:, CONTEXT:]) ** 2, axis=(2, 3))  # [B, AHEAD]
        for step in (1, 5, AHEAD):
            errors[f"heldout/{name}_{step}"] = jnp.sum(squares[:, step - 1] * inside)
    losses = {f"heldout/{name}": x for name, x in losses.items()}
    return losses, errors, jnp.sum(inside), to_frame(predicted)


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


def make_network(num_actions: int, args: Args) -> PolicyNetwork:
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if args.dtype == "auto" else args.dtype)
    return PolicyNetwork(num_actions, args.channels, dtype)


class Imagined(NamedTuple):
    """Rows [B] of imagined episodes, side by side; where one ends, the next begins."""

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
    """Steps of the rows of imagined episodes, [B, T]."""

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


def start_episodes(model: WorldModel, members, windows: Windows, member) -> Imagined:
    """Episodes in the worlds of `member` [B] from the last frames of windows [B, warm_up]."""
    # One member after the other: a vmap makes grouped convolutions, which devices do not share.
    states = jax.lax.map(lambda p: observe(model, p, windows)[0], members)  # [E, B, warm_up, ...]
    newest_first = windows.is_first[:, ::-1]
    history = jnp.where(newest_first.any(axis=1), jnp.argmax(newest_first, axis=1), 3)
    frames = stack_frames(windows.frame[:, -4:], history[:, None])[:, 0]
    state = jax.tree.map(lambda x: x[:, :, -1].swapaxes(0, 1), states)
    zeros = jnp.zeros(member.shape)
    return Imagined(state, frames, member, zeros.astype(jnp.int32), zeros)


def imagined_step(
    model: WorldModel, members, env: Imagined, action, threshold, args: Args
) -> tuple[Imagined, Outcome]:
    """A step of the pessimistic MDP with actions int32 [B]; members [E, ...].

    All members predict. The episode's own supplies frame, reward and end, the others filter the
    frame. A discrepancy above the threshold halts.
    """

    def predict(params, state):
        state = imagine(model, params, state, action)
        return state, model.apply(params, state, method="decode")

    before = jax.tree.map(lambda x: x.swapaxes(0, 1), env.state)  # [E, B, ...]
    predicted, decoded = jax.lax.map(lambda x: predict(*x), (members, before))
    state, by_row = jax.tree.map(lambda x: x.swapaxes(0, 1), (predicted, decoded))  # [B, E, ...]
    own = pick(by_row, env.member)
    frame = to_frame(own.image)  # [B, 84, 84]

    def filtered(params, deter):
        embedding = model.apply(params, frame, method="encode")
        return draw_latent(model.apply(params, deter, embedding, method="posterior"))

    latent = jax.lax.map(lambda x: filtered(*x), (members, predicted.deter)).swapaxes(0, 1)
    is_own = jnp.arange(args.members) == env.member[:, None]  # [B, E]
    state = State(state.deter, jnp.where(is_own[..., None, None], state.latent, latent))

    disc = discrepancy(decoded.image, decoded.reward, {"frame": 84, "block": 7}[args.discrepancy])
    halted = disc > threshold
    reward = jnp.where(halted, args.halt_penalty, own.reward)
    terminated = halted | (own.terminal_logit > 0)  # p > 1/2
    frames = jnp.concatenate([env.frames[..., 1:], frame[..., None]], axis=-1)
    env = Imagined(state, frames, env.member, env.steps + 1, env.reward_sum + reward)
    ended = terminated | (env.steps >= args.horizon)
    return env, Outcome(reward, halted, terminated, ended, disc)


@jax.jit(static_argnames=("model", "args"))
def replay(members, windows: Windows, action, model: WorldModel, args: Args):
    """Imagined episodes from windows [B, warm_up] with given actions [B, horizon]; nothing halts.

    Returns:
      The discrepancies [B, horizon]; nan after a predicted end, and where an action is -1.
    """
    member = jnp.arange(len(action)) % args.members
    env = start_episodes(model, members, windows, member)

    def step(carry, action):
        env, running = carry
        env, outcome = imagined_step(model, members, env, action, jnp.inf, args)
        disc = jnp.where(running & (action >= 0), outcome.discrepancy, jnp.nan)
        return (env, running & ~outcome.terminated), disc

    return jax.lax.scan(step, (env, jnp.full(len(action), True)), action.T)[1].T


def advantages(steps: Transitions, args: Args):
    """Generalised advantages [B, T]: a cut-off step is bootstrapped, a terminated one is not."""
    going_on = args.discount * ~steps.terminated
    delta = steps.reward + going_on * steps.next_value - steps.value  # δ = r + γ v(s') - v(s)

    def step(advantage, inputs):
        delta, ended = inputs
        advantage = delta + args.discount * args.gae_lambda * ~ended * advantage
        return advantage, advantage

    last = jnp.zeros_like(delta[:, 0])  # nothing is known past the update's last step
    return jax.lax.scan(step, last, (delta.T, steps.ended.T), reverse=True)[1].T


def ppo_loss(params, steps: Transitions, advantage, policy: PolicyNetwork, args: Args):
    """The loss of PPO on steps and advantages [...] -> (loss, metrics)."""
    logits, value = policy.apply(params, steps.frames)
    log_probs = jax.nn.log_softmax(logits)  # [..., actions]
    log_prob = jnp.take_along_axis(log_probs, steps.action[..., None], axis=-1)[..., 0]
    log_ratio = log_prob - steps.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_ratio, 1 + args.clip_ratio)
    value_loss = jnp.mean((value - steps.value - advantage) ** 2) / 2
    scaled = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    policy_loss = -jnp.mean(jnp.minimum(ratio * scaled, clipped * scaled))
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


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    env: Imagined  # from which the next update goes on
    threshold: Any  # of the discrepancy: a quantile along logged episodes, by measure_halting
    world_model_crc32: Any  # of the members in which it learns
    step: Any  # int32, updates done


def make_optimizer(args: Args) -> optax.GradientTransformation:
    steps = float(args.anneal_updates * args.epochs * args.minibatches)  # an int32 ends at 2e9
    adam = optax.adam(optax.linear_schedule(args.learning_rate, 0.0, steps), eps=1e-5)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)


def init_state(key, policy: PolicyNetwork, model: WorldModel, args: Args) -> TrainState:
    """The state before the first update, which starts all imagined episodes."""
    params = policy.init(key, jnp.zeros((84, 84, 4), jnp.uint8))
    frames = jnp.zeros((args.batch_size, 84, 84, 4), jnp.uint8)
    zeros = jnp.zeros(args.batch_size, jnp.int32)
    state = empty_state(model, args.batch_size, args.members)
    env = Imagined(state, frames, member=zeros, steps=zeros, reward_sum=jnp.zeros(args.batch_size))
    opt_state = make_optimizer(args).init(params)
    return TrainState(params, opt_state, env, jnp.float32(0), jnp.uint32(0), jnp.int32(0))


def rollout(params, env: Imagined, starts: Imagined, key, step: Callable, policy, args: Args):
    """Goes on with the episodes `env` [B] for T steps; where one ends it takes a start [B, N].

    Args:
      step: (env, action) -> (env, Outcome).
      key: draws the actions.

    Returns:
      The episodes then, Transitions [B, T], and a dictionary of metrics, of which "ended" are sums
      over the episodes that ended.
    """
    # Logits and values: [B, actions] and [B] of the episodes, [B, N, ...] and [B, N] of the starts.
    outputs, start_outputs = (policy.apply(params, x.frames) for x in (env, starts))

    def one_step(carry, key):
        env, (logits, value), used = carry
        action = jax.random.categorical(key, logits)
        after, outcome = step(env, action)
        outputs = policy.apply(params, after.frames)
        steps = Transitions(
            frames=env.frames,
            action=action,
            log_prob=pick(jax.nn.log_softmax(logits), action),
            value=value,
            reward=outcome.reward,
            terminated=outcome.terminated,
            ended=outcome.ended,
            next_value=outputs[1],
        )
        start = pick((starts, start_outputs), used % starts.member.shape[1])
        if_ended = partial(jax.vmap(jnp.where), outcome.ended)
        env, outputs = jax.tree.map(if_ended, start, (after, outputs))
        used += outcome.ended
        return (env, outputs, used), (steps, outcome, after.steps, after.reward_sum)

    keys, carry = jax.random.split(key, args.rollout_length), (env, outputs, env.steps * 0)
    (env, *_), (steps, outcome, lengths, returns) = jax.lax.scan(one_step, carry, keys)
    metrics = {
        "charts/discrepancy": jnp.mean(outcome.discrepancy),
        "charts/episodes": jnp.sum(outcome.ended, dtype=float),
        "ended": {
            "charts/halt_rate": jnp.sum(outcome.halted, dtype=float),
            "charts/episode_length": jnp.sum(lengths * outcome.ended, dtype=float),
            "charts/episode_return": jnp.sum(returns * outcome.ended),
        },
    }
    return env, jax.tree.map(lambda x: x.swapaxes(0, 1), steps), metrics


@jax.jit(static_argnames=("policy", "model", "args"), donate_argnames="state")
def collect(state: TrainState, windows: Windows, members, key, policy, model, args: Args):
    """The first half of an update: imagined steps in the members [E, ...].

    windows [B · starts, warm_up] end at the starts of the episodes that begin in this update. They
    and the episodes are sharded over the devices.

    Returns:
      The state, the steps and their advantages [B, T], the order in which `learn` takes them, and
      a dictionary of metrics.
    """
    # The key belongs to the step, so that a resumed run draws the same.
    start_key, key = jax.random.split(jax.random.fold_in(key, state.step))
    rollout_key, order_key = jax.random.split(key)
    member = jax.random.randint(start_key, (len(windows.action),), 0, args.members)
    starts = start_episodes(model, members, windows, member)
    starts = jax.tree.map(lambda x: x.reshape(-1, args.starts, *x.shape[1:]), starts)
    begin = state.step == 0
    env = jax.tree.map(lambda new, old: jnp.where(begin, new[:, -1], old), starts, state.env)
    step = partial(imagined_step, model, members, threshold=state.threshold, args=args)
    env, steps, metrics = rollout(state.params, env, starts, rollout_key, step, policy, args)
    advantage = advantages(steps, args)  # [B, T]
    unexplained = jnp.var(advantage) / jnp.maximum(jnp.var(steps.value + advantage), 1e-8)
    metrics["charts/explained_variance"] = 1 - unexplained
    order = minibatches(order_key, *advantage.shape, args)
    return state._replace(env=env, step=state.step + 1), steps, advantage, order, metrics


def minibatches(key, batch_size: int, length: int, args: Args):
    """Indices of the steps [B, T] in each minibatch: [epochs · minibatches, B, T / minibatches].

    The steps are shuffled within a row, whose device has them.
    """
    order = jnp.broadcast_to(jnp.arange(length), (args.epochs, batch_size, length))
    order = jax.random.permutation(key, order, axis=2, independent=True)
    order = order.reshape(args.epochs, batch_size, args.minibatches, -1).swapaxes(1, 2)
    return order.reshape(-1, *order.shape[2:])


@jax.jit(static_argnames=("policy", "args"), donate_argnames="state")
def learn(state: TrainState, steps: Transitions, advantage, index, policy, args: Args):
    """A gradient step on the minibatch `index` [B, M] of steps [B, T] -> (state, metrics)."""
    batch = pick((steps, advantage), index)
    gradient, metrics = jax.grad(ppo_loss, has_aux=True)(state.params, *batch, policy, args)
    metrics["charts/grad_norm"] = optax.tree.norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, delta)
    return state._replace(params=params, opt_state=opt_state), metrics


def update(state: TrainState, windows: Windows, members, key, policy, model, args: Args):
    """One update of the policy, arguments as of `collect` -> (state, metrics).

    Its gradient steps are no `lax.scan`: there a CPU needs ten times as long for the gradient of a
    convolution.
    """
    inputs = (state, windows, members, key, policy, model, args)
    state, steps, advantage, order, metrics = collect(*inputs)
    parts = []
    for index in order:
        state, part = learn(state, steps, advantage, index, policy, args)
        parts.append(part)
        jax.block_until_ready(parts[-2:-1])  # or programs queue up: a CPU's devices hang at 32
    return state, metrics | mean_of(parts)


def mean_ppo_metrics(sums: dict, updates: int) -> dict:
    """Means over the updates; for metrics of episodes over those that ended, if any did."""
    means = {name: x / updates for name, x in sums.items() if name != "ended"}
    episodes = sums["charts/episodes"]
    return means | {name: x / episodes for name, x in sums["ended"].items() if episodes}


@jax.jit(static_argnames=("greedy", "network", "args"))
def act(params, observation, key, greedy: bool, network: PolicyNetwork, args: Args):
    """Actions [N] for observations [N, ...]: samples of the policy, or its most probable action."""
    logits, _ = network.apply(params, observation)
    return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)


@jax.jit(static_argnames=("policy", "args"), donate_argnames=("params", "opt_state"))
def clone(params, opt_state, batch: Batch, policy: PolicyNetwork, args: Args):
    """One update of behavior cloning on logged steps [B, 1] -> (params, opt_state, loss)."""

    def bc_loss(params):
        logits, _ = policy.apply(params, stack_frames(batch.frames, batch.history)[:, 0])
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.action, axis=-1)
        return -jnp.mean(log_prob * ~batch.is_last)  # a last step has no action

    loss, gradient = jax.value_and_grad(bc_loss)(params)
    delta, opt_state = optax.adam(args.bc_learning_rate).update(gradient, opt_state)
    return optax.apply_updates(params, delta), opt_state, loss


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


# --- world model data (identical in morel_atari.py and combo_atari.py) ---
def split_store(store: Store, heldout_percent: float, seed: int) -> tuple[Store, Store]:
    """The store in two, episodes to learn from and some, drawn at random, to hold out."""
    num_episodes = len(store.episodes)
    count = max(1, round(num_episodes * heldout_percent / 100))
    if count >= num_episodes:
        message = f"{heldout_percent:g}% of {num_episodes} episodes cannot be held out"
        raise SystemExit(f"{message}: give more data or a lower --heldout-percent.")
    order = np.random.default_rng(seed).permutation(num_episodes)
    heldout = np.isin(np.arange(num_episodes), order[:count])
    inside = np.repeat(heldout, store.episodes["length"])  # of every step, whether it is held out
    training = store._replace(episodes=store.episodes[~heldout], index=store.index[~inside])
    return training, store._replace(episodes=store.episodes[heldout], index=store.index[inside])


def sample_windows(
    store: Store, number: int, length: int, num_members: int, args: Args
) -> list[Windows]:
    """This process's part of windows [B, T] for each member, number `number` of the store."""
    size = num_members * args.model_batch_size
    batch = sample_batch(store, args.seed, number, size, length + 1, process_rows(size))
    windows = model_windows(batch, args.clip_rewards)
    return [jax.tree.map(lambda x, i=i: x[i::num_members], windows) for i in range(num_members)]


# --- end world model data ---


def sample_starts(
    store: Store, entropy: tuple[int, ...], count: int, args: Args
) -> tuple[Windows, np.ndarray]:
    """This process's part of windows [N, warm_up] that end where imagined episodes start.

    Half of them end with the first frame of an episode, half anywhere but with a last one. Also
    the logged actions [N, horizon] that follow, -1 from the end of the episode on.
    """
    rng, num_steps = np.random.default_rng(entropy), len(store.index)
    ends = np.cumsum(store.episodes["length"])  # positions in the index, as are those below
    first = rng.choice(ends - store.episodes["length"], count)
    position = np.where(rng.random(count) < 0.5, first, rng.integers(num_steps, size=count))
    position -= np.isin(position, ends - 1)  # nothing follows an episode's last frame
    position = position[process_rows(count), None]

    before = store.index[(position + np.arange(-args.warm_up, 1)) % num_steps]  # [N, 1 + warm_up]
    frames, steps = read_frames(store, before[:, 1:].ravel()), store.steps[before]
    is_first = steps["age"][:, 1:] == 0
    frames = frames.reshape(*is_first.shape, 84, 84)
    action = np.where(is_first, -1, steps["action"][:, :-1].astype(np.int32))
    windows = Windows(frames, action, None, is_first, None)  # a filter sees no reward and no end
    after = store.steps[store.index[(position + np.arange(args.horizon)) % num_steps]]
    over = np.cumsum(after["is_last"], axis=1) > 0
    return windows, np.where(over, -1, after["action"].astype(np.int32))


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


# --- training (identical in morel_atari.py and combo_atari.py) ---
def train(run: Run, done: int, state, sums, update, load, evaluate, means, saved=lambda x: x):
    """Trains until `total_updates` of the run are done or an evaluation says that it is enough.

    Args:
      done, state, sums: where `Run.restore` says that it goes on.
      update: (state, batch, updates done) -> (state, metrics).
      load: number of a batch -> the batch on the devices.
      evaluate: (updates done, state) -> (state, what to show of it, whether it is enough).
      means: (sums of the metrics, number of updates) -> what is logged.
      saved: the part of the state that a checkpoint holds.

    Returns:
      The number of updates done, and the state.
    """
    args = run.args
    run.show(done, "compiling")
    # One program for all metrics: a CPU's devices hang where 32 programs wait.
    add = jax.jit(partial(jax.tree.map, lambda x, y: jnp.float32(x) + y))
    batches, metrics, shown = load_batches(load, done, args.loader_threads), None, ""
    while True:
        enough = done == args.total_updates
        evaluates = done > 0 and (done % args.eval_every == 0 or enough)
        agrees = evaluates or done % args.log_every == 0 or jax.process_count() == 1
        stops = agrees and any(all_processes(run.stopping))
        if stops or evaluates or done % args.checkpoint_every == 0:
            run.save(done, jax.tree.map(whole, saved(state)), sums)
        if evaluates and not stops:
            state, shown, stale = evaluate(done, state)
            enough |= stale
        if (stops or evaluates) and any(all_processes(stops or run.stopping)):  # all wait here
            run.exit()
        if enough:
            break
        with run.time("data"):
            batch = next(batches)
        with run.time("update" if metrics else "compilation"):
            previous = metrics
            state, metrics = update(state, batch, done)
            done += 1
            sums = add(sums, metrics) if sums else metrics
            logs = done % args.log_every == 0
            jax.block_until_ready(sums if logs or done < 3 else previous)  # at most one batch waits
        run.bar.update()
        tell_if_slow(run, done)
        if logs:
            logged = means(jax.device_get(sums), args.log_every)
            run.log(done, args.seed, logged)
            run.show(done, f"loss {logged['losses/total']:.3f}{shown}")
            sums = None
    batches.close()
    return done, state


def whole(x):
    """An array in one piece, also if several processes share it out; all of them must call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_replicated or x.is_fully_addressable):
        return multihost_utils.process_allgather(x, tiled=True)
    return x


def mean_metrics(sums: dict, updates: int) -> dict:
    return {name: x / updates for name, x in sums.items()}


def process_rows(count: int) -> slice:
    """This process's part of the rows of a batch."""
    share = count // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def play(run: Run, num_episodes: int, greedy: bool, done: int, params, network, args: Args):
    """Returns of episodes in the game, or None once a signal came."""
    if run.stopping:
        return None
    seed = int(np.random.default_rng((args.seed, done, 1)).integers(2**31))  # no batch has it
    params = jax.tree.map(lambda x: x.addressable_data(0), params)

    def policy(observation, key):
        return None if run.stopping else act(params, observation, key, greedy, network, args)

    with run.time("evaluation"):
        return evaluate(policy, args.env_id, num_episodes, seed, args.eval_max_frames)


def evaluate_agent(run: Run, done: int, params, network, args: Args) -> str:
    """An evaluation during training -> what to show of it."""
    inputs = (args.eval_episodes, args.eval_greedy, done, params, network, args)
    if not (run.writes and (returns := play(run, *inputs))):
        return ""
    mean = np.mean(returns)
    run.log(done, args.seed, {"eval/return_mean": mean, "eval/returns": returns})
    return f", return {mean:.1f}"


def finish_run(run: Run, done: int, params, network, args: Args) -> None:
    """The final evaluations, in the first process."""
    number, inputs = args.final_eval_episodes, (done, params, network, args)
    if number:
        run.show(done, f"final evaluation: {number} sampled, {number} greedy episodes")
    finals = [play(run, number, greedy, *inputs) for greedy in (False, True)] if run.writes else []
    if any(all_processes(None in finals)):  # the others wait for the first
        run.exit()
    if run.writes:
        run.finish(done, *([returns] for returns in finals))


# --- world model training (identical in morel_atari.py and combo_atari.py) ---
MODEL_ARGS = "env_id members deter hidden latents classes depth head_units clip_rewards".split()


class ModelRun(Run):
    """The world model's run. Signals reach the newest run, which passes them on to the policy's."""

    def __init__(self, run: Run, args: Args):
        self.policy_run = run
        super().__init__(args, run.seeds, run.config["data"])
        self.bar.set_description("world model")
        self.stopping = run.stopping

    def open(self) -> None:
        if self.args.overwrite:
            (self.dir / "members.msgpack").unlink(missing_ok=True)
        super().open()

    def interrupt(self, *arguments) -> None:
        self.policy_run.interrupt(*arguments)
        self.stopping = True


def get_world_model(run: Run, store: Store, network: WorldModel, put, replicated, args: Args):
    """Parameters of the ensemble, each leaf [members, ...], and their CRC-32: loaded, or trained.

    Ends the program if the run would go on with another world model than it has learned from.
    """
    folder = args.world_model or Path(f"{run.dir}-world-model")
    exists = not args.overwrite and any(all_processes((folder / "members.msgpack").exists()))
    if args.world_model or run.saved or exists:  # what the policy has learned from must be there
        content = load_world_model(folder, args, run.config["data"])
    else:
        content = train_world_model(run, folder, store, network, put, replicated, args)
    saved, crc32 = run.checkpoint["state"], zlib.crc32(content)
    if saved and (before := int(saved.get("world_model_crc32", crc32))) != crc32:
        change = f"its checksum {before:08x} -> {crc32:08x}"
        message = f"{run.dir} holds a run with another world model ({change})"
        raise SystemExit(f"{message}; give that one, or --overwrite to start again.")
    run.started = time.monotonic()  # the policy's time begins
    run.bar.unpause()
    members = serialization.msgpack_restore(content).values()
    members = jax.tree.map(lambda *x: np.stack(x), *members)
    return jax.device_put(members, replicated), np.uint32(crc32)


def load_world_model(folder: Path, args: Args, data: dict) -> bytes:
    """The ensemble in the folder of a world model, serialized; ends the program if none fits."""
    ours, defaults = json.loads(json.dumps([vars(args), vars(Args())], default=str))
    try:
        config = json.loads((folder / "config.json").read_text())
        theirs = defaults | config["args"]
        their_data = data | {"crc32": None} | config["data"]  # an old one has no frames_crc32
        content = (folder / "members.msgpack").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"There is no trained world model in {folder}.") from None
    other = "--world-model"
    # Other arguments of its training have no effect: a value that is not the default must be its
    # own, but for the batch size, which the devices of this run have to share.
    training = {x for x in ours if x.startswith(("model_", "kl_", "heldout_"))}
    training -= {"model_share", "model_batch_size"}
    names = MODEL_ARGS + [name for name in sorted(training) if ours[name] != defaults[name]]
    if not args.world_model:  # the run's own, of an earlier start
        names = [x for x in ours if x not in NOT_COMPARED | {"total_updates", "eval_every"}]
        other = "--run-dir"
    pairs = [(name, theirs[name], ours[name]) for name in names]
    pairs += [(f"data of {x}", their_data.get(x), data.get(x)) for x in ("crc32", "frames_crc32")]
    if changes := ", ".join(f"{name} {a}" for name, a, b in pairs if a != b):
        message = f"{folder} is a world model with {changes}"
        raise SystemExit(f"{message}: give the same, or another {other}.")
    crc32, content = content[:4], content[4:]
    if not content or zlib.crc32(content) != int.from_bytes(crc32, "little"):
        raise SystemExit(f"{folder}/members.msgpack is damaged: copy or train it again.")
    return content


def train_world_model(
    run: Run, folder: Path, store: Store, network: WorldModel, put, replicated, args: Args
) -> bytes:
    """Trains the ensemble in a run of its own -> its parameters, as `load_world_model`."""
    changed = {"run_dir": folder, "total_updates": args.model_updates}
    changed |= dict.fromkeys(("eval_every", "checkpoint_every"), args.model_eval_every)
    model_run = ModelRun(run, dataclasses.replace(args, **changed))
    if len({*all_processes(model_run.saved)}) > 1:
        raise SystemExit(f"The processes see different files in {folder}: all must share it.")
    training, heldout = split_store(store, args.heldout_percent, args.seed)
    # The first two are the policy's.
    _, _, init_key, *keys = jax.random.split(jax.random.key(args.seed), 5)
    update_keys, eval_keys = (jax.random.split(key, args.members) for key in keys)
    frames = sample_batch(training, args.seed, 0, 512, 1).frames[:, 3]
    state = init_model(init_key, np.mean(to_image(frames), axis=0), network, args)
    done, *state_and_sums = model_run.restore(state)
    state, sums = jax.device_put(state_and_sums, replicated)
    length = max(args.model_length, CONTEXT + AHEAD)  # also where shorter windows are learned
    numbers = range(args.model_eval_batches)
    batches = [sample_windows(heldout, number, length, 1, args)[0] for number in numbers]

    def load(step: int) -> list[Windows]:
        return put(sample_windows(training, step, args.model_length, args.members, args))

    def update(state: ModelState, windows: list[Windows], step: int):
        return update_model(state, windows, update_keys, network, args)

    def evaluate(done: int, state: ModelState):
        with model_run.time("evaluation"):
            metrics = evaluate_model(model_run, state, batches, eval_keys, network, put, args)
        loss = metrics["heldout/total"]
        model_run.check_finite(done, {"losses/total": loss})
        model_run.log(done, args.seed, metrics)
        state = note_evaluation(state, loss, done, args)
        stale = done - int(state.improved) >= args.model_patience
        return state, f", held-out {loss:.3f}", stale

    done, state = train(model_run, done, state, sums, update, load, evaluate, mean_metrics)
    final = {"final/updates": done, "final/best_update": int(state.best_update)}
    model_run.log(done, args.seed, final | {"final/heldout_total": float(state.best_loss)})
    content = serialization.to_bytes(jax.device_get(state.best))
    model_run.bar.close()
    if model_run.writes:  # it is finished
        model_run.write("members.msgpack", zlib.crc32(content).to_bytes(4, "little") + content)
        model_run.end_mirror(0)
    return content


def evaluate_model(
    run: Run, state: ModelState, heldout: list[Windows], keys, network, put, args: Args
) -> dict:
    """Held-out metrics, means of the members; also draws world_model.png of the first."""
    outputs = []
    for windows in heldout:
        on_devices = put(windows)
        for member, key in zip(state.members, keys, strict=True):
            output = evaluate_member(member.params, on_devices, key, network, args)
            *sums, predicted = multihost_utils.process_allgather(output, tiled=True)
            if any(all_processes(run.stopping)):
                run.exit()
            if not outputs and run.writes:
                draw_predictions(windows, predicted, run.dir / "world_model.png")
            outputs.append(sums)
    losses, errors, inside = jax.tree.map(lambda *x: sum(x), *outputs)
    means = {name: x / len(outputs) for name, x in losses.items()}
    return means | {name: x / inside for name, x in errors.items() if inside}


def draw_predictions(windows: Windows, predicted: np.ndarray, path: Path) -> None:
    """Draws world_model.png: three times real frames above open-loop predictions of them.

    windows [B, T], predicted uint8 [B, AHEAD, 84, 84]; those inside one episode first.
    """
    from matplotlib.figure import Figure  # without pyplot's global state

    steps = np.array([-1, 0, 1, 2, 3, 5, 7, 10, 12, 15])  # after the last frame that was filtered
    crossing = windows.is_first[:, 1 : CONTEXT + AHEAD].any(axis=1)
    chosen = np.argsort(crossing, kind="stable")[:3]
    frames = np.stack([windows.frame[chosen, : CONTEXT + AHEAD]] * 2, axis=1)  # real, predicted
    frames[:, 1, CONTEXT:] = predicted[chosen]
    frames = frames[:, :, CONTEXT - 1 + steps]  # [N, 2, 10, 84, 84]
    tiles = np.pad(frames, [(0, 0)] * 3 + [(0, 4)] * 2, constant_values=255)
    picture = tiles.transpose(0, 1, 3, 2, 4).reshape(-1, 88 * len(steps))
    axes = (figure := Figure((10, 2 * len(chosen) + 0.3), layout="constrained")).subplots()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks(42 + 88 * np.arange(len(steps)), [f"{x:+d}" if x else "0, seen" for x in steps])
    axes.set_yticks(42 + 88 * np.arange(2 * len(chosen)), ["real", "predicted"] * len(chosen))
    figure.savefig(path, dpi=120)


# --- end world model training ---


# Bounds of the numeric arguments; other integers go from 1 to 1e9, other floats from 0 to 1e9.
TINY = 1e-30
RANGES = {"seed": (0, 2**32 - 1), "data_percent": (TINY, 100), "heldout_percent": (TINY, 99)}
RANGES |= {"members": (2, 10**6), "model_learning_rate": (TINY, 1), "kl_balance": (0, 1)}
RANGES |= {"model_max_grad_norm": (TINY, 1e9), "model_min_improvement": (0, 0.5)}
RANGES |= {"halt_quantile": (0, 1), "halt_penalty": (-1e15, 0), "warm_up": (4, 10**6)}
RANGES |= {"channels": (2, 10**6), "bc_updates": (0, 10**9), "bc_learning_rate": (TINY, 1)}
RANGES |= {"learning_rate": (TINY, 1), "max_grad_norm": (TINY, 1e9), "rlu_run": (1, 5)}
RANGES |= {"discount": (0, 1), "gae_lambda": (0, 1)}
RANGES |= {"eval_episodes": (0, 10**6), "final_eval_episodes": (0, 10**6)}
RANGES |= {"eval_max_frames": (4, 10**9), "loader_threads": (1, 256)}


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


# --- end processes ---


def check_policy_args(args: Args) -> None:
    """Ends the program with one sentence if arguments do not go together."""
    if args.total_updates > args.anneal_updates:
        message = f"--total-updates {args.total_updates} is more than --anneal-updates"
        raise SystemExit(f"{message} {args.anneal_updates}, after which the learning rate is zero.")
    if args.rollout_length % args.minibatches:
        message = f"--rollout-length {args.rollout_length} must be a multiple of --minibatches"
        raise SystemExit(f"{message} {args.minibatches}.")


def measure_halting(run: Run, store: Store, members, model: WorldModel, put, args: Args):
    """The threshold of the discrepancy, from replays of logged episodes.

    Logs how many of these it would halt, and of those with random actions; draws discrepancy.png.
    """
    parts, rows = {"logged": [], "random": []}, process_rows(args.batch_size)
    for i in range(args.halt_batches):
        windows, logged = sample_starts(store, (args.seed, i, 1), args.batch_size, args)
        rng, shape = np.random.default_rng((args.seed, i, 2)), (args.batch_size, args.horizon)
        random = rng.integers(store.meta["num_actions"], size=shape, dtype=np.int32)[rows]
        for name, actions in (("logged", logged), ("random", random)):
            disc = replay(members, *put((windows, actions)), model, args)
            parts[name].append(multihost_utils.process_allgather(disc, tiled=True))
        if any(all_processes(run.stopping)):
            run.exit()
    replays = {name: np.concatenate(x) for name, x in parts.items()}  # [N, horizon]
    threshold = np.nanquantile(replays["logged"], args.halt_quantile)
    rates = {name: np.mean(np.any(x > threshold, axis=1)) for name, x in replays.items()}
    metrics = {f"charts/halt_rate_{name}": rate for name, rate in rates.items()}
    run.log(0, args.seed, {"charts/threshold": threshold} | metrics)
    if run.writes:
        draw_discrepancies(replays, threshold, run.dir / "discrepancy.png")
        halted = ", ".join(f"{rate:.1%} of those with {x} actions" for x, rate in rates.items())
        print(f"Replays in which a discrepancy exceeds {threshold:.4f}: {halted}.", flush=True)
        if rates["random"] < min(2 * rates["logged"], (1 + rates["logged"]) / 2):
            print("So the members hardly tell unknown actions from logged ones.", flush=True)
    return threshold


def draw_discrepancies(replays: dict, threshold: float, path: Path) -> None:
    """Draws discrepancy.png, histograms of the discrepancies of replays, and the threshold."""
    from matplotlib.figure import Figure  # without pyplot's global state

    bins = np.linspace(0, 1.05 * max(map(np.nanmax, replays.values())), 100)
    axes = (figure := Figure((7, 4.5), layout="constrained")).subplots()
    for name, disc in replays.items():
        axes.hist(disc[disc >= 0], bins, density=True, alpha=0.6, label=f"{name} actions")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xlabel="discrepancy of the members", ylabel="density", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def clone_behavior(run: Run, params, store: Store, policy: PolicyNetwork, put, args: Args):
    """The policy's parameters after --bc-updates; a run that is stopped in these repeats them."""
    size, loss = args.bc_batch_size, 0.0
    opt_state = optax.adam(args.bc_learning_rate).init(params)

    def load(step: int) -> Batch:
        return put(sample_batch(store, args.seed, step, size, 1, process_rows(size)))

    batches = load_batches(load, 0, args.loader_threads)
    for i in range(args.bc_updates):
        previous = loss
        params, opt_state, loss = clone(params, opt_state, next(batches), policy, args)
        jax.block_until_ready(previous)  # so that at most one batch waits on the device
        logs = (i + 1) % args.log_every == 0
        if (logs or jax.process_count() == 1) and any(all_processes(run.stopping)):
            run.exit()
        if logs:
            run.check_finite(0, {"losses/total": loss})
            run.show(0, f"behavior cloning {i + 1:,} of {args.bc_updates:,}, loss {loss:.3f}")
    batches.close()
    run.check_finite(0, {"losses/total": loss})
    return params


def main(args: Args) -> None:
    join_processes(args)
    args = check_args(args, RANGES)
    check_policy_args(args)
    store = open_store(args)
    facts = store.facts
    if args.world_model:  # the run must be one with these members; also before it is deleted
        crc32 = zlib.crc32(load_world_model(args.world_model, args, facts))
        facts = facts | {"world_model_crc32": crc32}
    run = Run(args, [args.seed], facts)
    if len({*all_processes(run.saved)}) > 1:
        raise SystemExit(f"The processes see different files in {run.dir}: all must share it.")
    run.bar.set_description("policy")
    num_actions = store.meta["num_actions"]
    model, policy = make_world_model(num_actions, args), make_network(num_actions, args)
    mesh = device_mesh()
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    put = partial(jax.make_array_from_process_local_data, by_device)  # from this process's part
    members, crc32 = get_world_model(run, store, model, put, replicated, args)

    init_key, key = jax.random.split(jax.random.key(args.seed))
    shardings = TrainState(*[replicated] * len(TrainState._fields))._replace(env=by_device)
    init = jax.jit(init_state, static_argnums=(1, 2, 3), out_shardings=shardings)
    state = init(init_key, policy, model, args)._replace(world_model_crc32=crc32)
    done, state, sums = run.restore(state)
    state, sums = jax.device_put((state, sums), (shardings, replicated))
    if done == 0:
        with run.time("preparation"):
            threshold = measure_halting(run, store, members, model, put, args)
            params = clone_behavior(run, state.params, store, policy, put, args)
        state = state._replace(params=params, threshold=jax.device_put(threshold, replicated))

    def load(step: int) -> Windows:
        """Starts for update number `step`."""
        windows, _ = sample_starts(store, (args.seed, step), args.batch_size * args.starts, args)
        return put(windows)

    def learner(state: TrainState, windows: Windows, step: int):
        return update(state, windows, members, key, policy, model, args)

    def evaluate(done: int, state: TrainState):
        return state, evaluate_agent(run, done, state.params, policy, args), False

    done, state = train(run, done, state, sums, learner, load, evaluate, mean_ppo_metrics)
    finish_run(run, done, state.params, policy, args)


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
