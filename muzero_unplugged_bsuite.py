# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "bsuite==0.3.6", "flax==0.12.8", "jax==0.10.2", "matplotlib==3.11.2", "numpy==2.4.6",
#   "optax==0.2.8", "orbax-checkpoint==0.12.8", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0",
#   "mctx==0.0.71",
# ]
# ///
"""MuZero Unplugged on BSuite (Schrittwieser et al., 2021), as ROSMO's paper compares with it.

MuZero Unplugged learns MuZero's latent model from logged episodes. At every state of a window it
searches the model's tree with N simulations (Eq. 2); the visits of the root's actions are the
target of the policy (Eq. 4), and their mean value bootstraps the target of the value (Eq. 3).

    python muzero_unplugged_bsuite.py --env-id catch                        # N = 4, five seeds
    python muzero_unplugged_bsuite.py --env-id catch --num-simulations 20 --max-depth 2  # Fig. 2(c)
    python muzero_unplugged_bsuite.py --env-id catch --policy-target mpo    # MZU-Q

Where the paper is silent, or differs from the authors' code, this file does the following.
1. Windows start at any step; past the end of an episode they hold an absorbing state: random
   actions, zero reward and value, uniform policy target (authors' code).
2. An episode that ends without a terminal state is bootstrapped; the rest of the window is ignored
   (--truncation-as-termination: the authors' code).
3. Eq. 3 is taken literally; mctx's root value, in the authors' code, counts the network's own value
   as one more visit. Roots that no target needs are not searched.
4. MZU-Q fills in the Q of actions that were not visited with the value of the state.
5. The learning rate warms up for 1,000 updates, then falls tenfold every 100,000; AdamW decays
   weights only; the gradient is halved at every unrolled state (authors' code).
6. The 20 bins are the integers -9 to 10, and targets stop at 9 (authors' code).
7. The search has MuZero's Dirichlet noise at the root and Q scaled to [0, 1] among siblings, for
   targets and for acting; actions are sampled from its policy (authors' code). The final evaluation
   reports the greedy policy beside it; --eval-dirichlet-fraction 0 acts without the noise.
"""

import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when jax is imported

import flax.linen as nn
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from bsuite.environments.cartpole import Cartpole
from bsuite.environments.catch import Catch
from bsuite.environments.mountain_car import MountainCar
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # run
    env_id: Literal["catch", "cartpole", "mountain_car"] = "catch"
    """BSuite task"""
    seed: int = 0
    """first seed of training and evaluation"""
    num_seeds: int = 5
    """number of consecutive seeds, all trained in this process"""
    total_updates: int = 200_000
    """number of updates of every seed"""
    log_every: int = 200
    """updates over which the logged losses are averaged"""
    checkpoint_every: int = 10_000
    """updates between two checkpoints, a multiple of --eval-every"""
    run_dir: Path | None = None
    """folder of this run [default: runs/{script}/{env-id}[-variant]/seeds{first}-{last}]"""
    overwrite: bool = False
    """start again in a folder that holds a run, and delete that run"""
    compilation_cache: bool = True
    """keep compiled programs in the user's cache folder"""
    track: bool = False
    """mirror the metrics to Weights & Biases"""
    wandb_project_name: str = "rosmo-suite"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """user or team in Weights & Biases"""

    # data
    noise: float = 0.0
    """probability of a random action when the data were collected (Appendix E)"""
    data_percent: float = 100.0
    """share of the episodes to learn from; every seed draws its own"""
    data_dir: Path = Path("data")
    """where datasets are kept"""
    dataset: Path | None = None
    """.npz file or TFDS/RLDS folder [default: the task's in --data-dir, collected if missing]"""
    truncation_as_termination: bool = False
    """treat every last step as terminal"""

    # model (Table 4)
    dynamics_hidden: int = 256
    """width of the middle layer of the dynamics function (Fig. 2b)"""
    num_bins: int = 20
    """bins of the categorical value and reward"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of the network; parameters and losses are always float32"""

    # optimisation (Table 4)
    batch_size: int = 128
    """windows in a batch"""
    learning_rate: float = 7e-4
    """AdamW's learning rate after warm-up"""
    learning_rate_decay: float = 0.1
    """factor on the learning rate every 100,000 updates"""
    weight_decay: float = 1e-4
    """AdamW's weight decay, on weight matrices only"""
    max_grad_norm: float = 5.0
    """largest global norm of the gradient"""
    target_update_every: int = 200
    """updates between two copies of the parameters to the target network"""

    # algorithm
    discount: float = 0.997**4
    """discount factor γ"""
    unroll_steps: int = 5
    """K, steps that the model is unrolled for the loss (Fig. 4c: 1)"""
    td_steps: int = 3
    """n, rewards in the value target (Eq. 3)"""
    num_simulations: int = 4
    """N, simulations of a search"""
    max_depth: int | None = None
    """depth of the tree at which a simulation ends [default: N]"""
    policy_target: Literal["visits", "mpo"] = "visits"
    """visit counts (Eq. 4), or π exp(Q/τ) (mpo: MZU-Q)"""
    mpo_temperature: float = 0.1
    """τ of MZU-Q"""
    dirichlet_fraction: float = 0.25
    """share of Dirichlet noise in the prior of a root, for targets"""
    policy_coef: float = 1.0
    """weight of the policy loss"""
    value_coef: float = 0.25
    """weight of the value loss"""

    # evaluation
    eval_every: int = 1_000
    """updates between two evaluations"""
    eval_episodes: int = 2
    """episodes of each evaluation during training"""
    final_eval_episodes: int = 100
    """episodes of the final evaluation"""
    eval_greedy: bool = False
    """take the most probable action in evaluations during training"""
    eval_dirichlet_fraction: float = 0.25
    """the same noise in evaluations"""
    eval_noise: bool = False
    """evaluate with --noise instead of without noise"""


# --- evaluate (identical in *_bsuite.py) ---
ENVIRONMENTS = {"catch": Catch, "cartpole": Cartpole, "mountain_car": MountainCar}
# Average return of a random policy and of the online DQN (Table 6).
REFERENCE_RETURNS = {
    "catch": (-0.66, 1.0),
    "cartpole": (64.83, 1001.0),
    "mountain_car": (-1000.0, -102.16),
}


def evaluate(act, env_id: str, seeds: list[int], update: int, num_episodes: int, noise: float):
    """Plays complete episodes in the real environment, those of all seeds side by side.

    Args:
      act: maps observations [seeds, episodes, ...] and the time step to actions [seeds, episodes].
      update: with the seed and the episode it determines the initial states.
      noise: probability that an action is replaced by a uniformly random one.

    Returns:
      Undiscounted returns, float64 [seeds, episodes].
    """
    shape = (len(seeds), num_episodes)
    rngs = [np.random.default_rng((s, update, e)) for s in seeds for e in range(num_episodes)]
    environments = [ENVIRONMENTS[env_id](seed=int(rng.integers(2**31))) for rng in rngs]
    num_actions = environments[0].action_spec().num_values
    observations = np.stack([environment.reset().observation for environment in environments])
    returns = np.zeros(len(environments))
    playing, t = range(len(environments)), 0
    while playing:
        actions = np.asarray(act(observations.reshape(*shape, *observations.shape[1:]), t)).ravel()
        still_playing = []
        for i in playing:
            random_action = noise > 0 and rngs[i].random() < noise
            action = rngs[i].integers(num_actions) if random_action else actions[i]
            timestep = environments[i].step(int(action))
            observations[i] = timestep.observation
            returns[i] += timestep.reward
            if not timestep.last():
                still_playing.append(i)
        playing, t = still_playing, t + 1
    return returns.reshape(shape)


def normalized_score(env_id: str, mean_return: float) -> float:
    """0 for the random policy, 1 for the online DQN (the paper's footnote 2)."""
    random_return, online_return = REFERENCE_RETURNS[env_id]
    return (mean_return - random_return) / (online_return - random_return)


# --- end evaluate ---


# --- data (identical in *_bsuite.py) ---
class Steps(NamedTuple):
    """Steps of episodes in RLDS form: the last one holds no action and no reward, only zeros."""

    observation: Any  # [..., rows, columns] float32
    action: Any  # [...] int32
    reward: Any  # [...] float32, received after the action
    is_last: Any  # [...] bool
    is_terminal: Any  # [...] bool


def load_dataset(args) -> tuple[Steps, str]:
    """Loads all steps of the arguments' dataset and describes it; collects it if it is missing."""
    path = args.dataset
    if path is None:
        path = args.data_dir / "bsuite" / f"{args.env_id}-noise{args.noise:g}-seed0.npz"
        if not path.exists():
            collect_dataset(path, args)
    if not path.exists():
        raise SystemExit(f"There is no dataset at {path}: check --dataset.")
    try:
        steps = read_rlds(path) if path.is_dir() else read_npz(path, args.env_id)
        check_steps(steps, ENVIRONMENTS[args.env_id]())
    except ImportError:
        raise SystemExit("A TFDS folder needs tensorflow-datasets and tensorflow.") from None
    except Exception as error:  # a damaged file can raise almost anything
        message = f"{path} is not a whole dataset of {args.env_id} ({error})"
        advice = "give another one" if args.dataset else "delete it to have it collected again"
        raise SystemExit(f"{message}; {advice}.") from None
    # Behavior cloning bootstraps nothing, so that it has no such argument.
    if hasattr(args, "truncation_as_termination") and args.truncation_as_termination:
        steps = steps._replace(is_terminal=steps.is_last)
    episodes, mean = steps.is_last.sum(), steps.reward.sum() / steps.is_last.sum()
    transitions = len(steps.action) - episodes
    return steps, f"{episodes} episodes, {transitions} transitions, mean return {mean:.2f}"


def collect_dataset(path: Path, args) -> None:
    """Makes the data as the authors did, with an online DQN (Appendix E)."""
    collector = Path(__file__).resolve().parent / "benchmark" / "collect_bsuite.py"
    options = ["--env-id", args.env_id, "--noise", f"{args.noise:g}", "--seed", "0"]
    options += ["--data-dir", str(path.parent)]
    if not collector.exists():
        raise SystemExit(
            f"There is no dataset at {path}. Give --dataset, or make it in the suite's repository "
            f"with: python benchmark/collect_bsuite.py {' '.join(options)}"
        )
    print(f"There is no dataset at {path} yet: an online DQN collects it now.", flush=True)
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # this process holds the accelerator
    if subprocess.run([sys.executable, collector, *options], env=cpu).returncode:
        raise SystemExit("The data were not collected; the message above says why.")


def read_npz(path: Path, env_id: str) -> Steps:
    """Reads a file of benchmark/collect_bsuite.py; raises if it is something else."""
    with np.load(path) as file:
        header = json.loads(str(file["header"]))
        if (header["schema"], header["env_id"]) != (1, env_id):
            raise ValueError(f"it says {header['env_id']}, schema {header['schema']}")
        return cast_steps(Steps(*(file[name] for name in Steps._fields)))


def read_rlds(path: Path) -> Steps:
    """Reads every episode of a prepared TFDS dataset in RLDS form, such as the authors'."""
    import tensorflow_datasets as tfds  # brings TensorFlow: needed for this format alone

    builder = tfds.builder_from_directory(path)
    episodes = []
    for episode in tfds.as_numpy(builder.as_dataset(split="all")):
        rows = list(episode["steps"])
        rows = [row | {"is_terminal": row.get("is_terminal", row["is_last"])} for row in rows]
        episodes.append(Steps(*(np.stack([row[f] for row in rows]) for f in Steps._fields)))
    return cast_steps(Steps(*map(np.concatenate, zip(*episodes, strict=True))))


def cast_steps(steps: Steps) -> Steps:
    dtypes = (np.float32, np.int32, np.float32, np.bool_, np.bool_)
    return Steps(*map(np.asarray, steps, dtypes))


def check_steps(steps: Steps, environment) -> None:
    """Raises ValueError where the arrays cannot be complete episodes of the environment."""
    if len({len(x) for x in steps}) != 1 or not steps.is_last[-1:].any():
        raise ValueError("its arrays do not hold complete episodes")
    if steps.observation.shape[1:] != environment.observation_spec().shape:
        raise ValueError(f"its observations have shape {steps.observation.shape[1:]}")
    if not (0 <= steps.action).all() or steps.action.max() >= environment.action_spec().num_values:
        raise ValueError("it has actions that the task has not")
    if not (np.isfinite(steps.observation).all() and np.isfinite(steps.reward).all()):
        raise ValueError("it holds numbers that are not finite")


def window_starts(is_last: np.ndarray, data_percent: float, seeds: list[int]):
    """Every step of each seed's random p% of the episodes may start a window.

    Returns:
      The steps' indices [seeds, most of any seed], padded with zeros, and their numbers [seeds].
    """
    episode, num_episodes = np.cumsum(is_last) - is_last, int(is_last.sum())
    num_chosen = int(num_episodes * data_percent / 100)
    if num_chosen == 0:
        raise SystemExit(f"--data-percent {data_percent:g} of {num_episodes} episodes leaves none.")
    chosen = [np.random.default_rng(s).permutation(num_episodes)[:num_chosen] for s in seeds]
    starts = [np.flatnonzero(np.isin(episode, c)) for c in chosen]
    num_starts = np.array([len(indices) for indices in starts], np.int32)
    pad = [np.pad(x, (0, max(num_starts) - len(x))) for x in starts]
    return np.stack(pad).astype(np.int32), num_starts


def sample_windows(key, steps: Steps, starts, num_starts, batch_size: int, length: int) -> Steps:
    """Draws windows of consecutive steps, [batch_size, length]; they may cross episode ends."""
    start = starts[jax.random.randint(key, (batch_size,), 0, num_starts)]
    index = (start[:, None] + jnp.arange(length)) % len(steps.action)
    return jax.tree.map(lambda x: x[index], steps)


# --- end data ---


# --- torso (identical in *_bsuite.py) ---
class MLP(nn.Module):
    features: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.features):
            x = nn.Dense(width, dtype=self.dtype)(nn.relu(x) if i else x)
        return x


# --- end torso ---


# --- network (identical in rosmo_bsuite.py and muzero_unplugged_bsuite.py) ---
class Prediction(NamedTuple):
    """What the prediction function f says of states [...]."""

    policy_logits: jax.Array  # [..., actions]
    value_logits: jax.Array  # [..., bins]
    reward_logits: jax.Array  # [..., bins], of the transition that led to the state


class MuZeroNetwork(nn.Module):
    """Representation h, dynamics g and prediction f (Table 4).

    Inputs may have any leading axes. The compiler drops the heads that a caller does not use.
    """

    num_actions: int
    num_bins: int
    dynamics_hidden: int
    dtype: str

    def setup(self):
        self.h = MLP((64, 64, 32), self.dtype)
        self.g = MLP((32, self.dynamics_hidden, 32), self.dtype)
        self.f = MLP((32,), self.dtype)
        head = partial(nn.Dense, kernel_init=nn.initializers.zeros, dtype=jnp.float32)
        self.policy, self.value, self.reward = map(
            head, (self.num_actions, self.num_bins, self.num_bins)
        )

    def representation(self, observation):
        """h: observations [..., rows, columns] -> states [..., 32]."""
        return self.h(observation.reshape(*observation.shape[:-2], -1))

    def dynamics(self, state, action):
        """g: states [..., 32], actions [...] -> next states [..., 32]."""
        action = jax.nn.one_hot(action, self.num_actions, dtype=state.dtype)
        return self.g(jnp.concatenate([state, action], axis=-1))

    def prediction(self, state) -> Prediction:
        """f: states [..., 32] -> policy, value and reward logits, float32."""
        x = nn.relu(self.f(state))
        return Prediction(self.policy(x), self.value(x), self.reward(x))

    def __call__(self, observation, action) -> Prediction:
        return self.prediction(self.dynamics(self.representation(observation), action))


# --- end network ---


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


# --- windows (identical in rosmo_*.py and muzero_unplugged_*.py) ---
def window_positions(is_last, is_terminal):
    """Places each position of windows [batch, time] in the episode in which its window starts.

    Returns:
      moving: a logged action leads on from here; absorbing: at or past a terminal state; known:
      everywhere but past a truncated end. All are bool [batch, time].
    """
    ended = jnp.cumsum(is_last, axis=1)
    inside = ended - is_last == 0
    absorbing = jnp.cumsum(inside & is_terminal, axis=1) > 0
    return ended == 0, absorbing, inside | absorbing


def value_target(reward, value, moving, absorbing, discount: float, td_steps: int):
    """z, the n-step return (Eq. 8): rewards and values [B, T] -> [B, T - n].

    Each backup adds one logged reward. It stops where the episode does, with the value of a
    truncated end and with zero at a terminal one.
    """
    value = jnp.where(absorbing, 0.0, value)
    z = value
    for t in range(reward.shape[1] - 1, reward.shape[1] - 1 - td_steps, -1):
        z = jnp.where(moving[:, :t], reward[:, :t] + discount * z[:, 1:], value[:, :t])
    return z


def cross_entropy(target, logits):
    """-Σ target log softmax(logits) over the last axis (Eq. 12-14)."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def scale_gradient(x, scale: float):
    return x * scale + jax.lax.stop_gradient(x) * (1 - scale)


# --- end windows ---


# --- search (identical in muzero_unplugged_*.py) ---
def search(network, params, state, prediction, key, noise: float, args):
    """Searches the tree below latent states [...] with N simulations (Eq. 2).

    Returns:
      The policy [..., actions], Eq. 4 with T = 1 or π exp(Q/τ), and the value in Eq. 3 [...].
    """

    def model(params, _, action, state):
        state = network.apply(params, state, action, method="dynamics")
        prediction = network.apply(params, state, method="prediction")
        reward, value = to_scalar(prediction.reward_logits), to_scalar(prediction.value_logits)
        step = {"reward": reward, "discount": jnp.full_like(value, args.discount), "value": value}
        return mctx.RecurrentFnOutput(prior_logits=prediction.policy_logits, **step), state

    shape = prediction.policy_logits.shape[:-1]
    value = to_scalar(prediction.value_logits)
    root = {"prior_logits": prediction.policy_logits, "value": value, "embedding": state}
    root = mctx.RootFnOutput(**{k: x.reshape(-1, *x.shape[len(shape) :]) for k, x in root.items()})
    options = {"max_depth": args.max_depth, "dirichlet_fraction": noise}
    output = mctx.muzero_policy(params, key, root, model, args.num_simulations, **options)
    tree = output.search_tree.summary()
    policy, value = tree.visit_probs, jnp.sum(tree.visit_probs * tree.qvalues, axis=-1)
    if args.policy_target == "mpo":
        q = jnp.where(tree.visit_counts > 0, tree.qvalues, root.value[:, None])
        policy = jax.nn.softmax(jax.nn.log_softmax(root.prior_logits) + q / args.mpo_temperature)
    return policy.reshape(*shape, -1), value.reshape(shape)


# --- end search ---


def muzero_loss(params, target_params, batch: Steps, key, network: MuZeroNetwork, args: Args):
    """The loss of Eq. 1 on windows of K + 1 + n steps.

    Returns:
      The total loss and a dictionary of scalars to log.
    """
    roots, num_actions = args.unroll_steps + 1, network.num_actions
    positions = window_positions(batch.is_last, batch.is_terminal)  # [B, K+1+n]
    moving, absorbing, known = (x[:, :roots] for x in positions)  # [B, K+1]
    action_key, search_key = jax.random.split(key)

    # Unroll the online network from the encoding of the first observation.
    random_action = jax.random.randint(action_key, moving.shape, 0, num_actions)
    action = jnp.where(moving, batch.action[:, :roots], random_action)  # [B, K+1]
    states = [network.apply(params, batch.observation[:, 0], method="representation")]
    for k in range(args.unroll_steps):
        next_state = network.apply(params, states[k], action[:, k], method="dynamics")
        states.append(scale_gradient(next_state, 0.5))
    prediction = network.apply(params, jnp.stack(states, axis=1), method="prediction")

    # Improve with the target network.
    target_state = network.apply(target_params, batch.observation, method="representation")
    target = network.apply(target_params, target_state, method="prediction")
    value = to_scalar(target.value_logits)  # [B, K+1+n]
    # Search the roots of the K + 1 policy targets, and those that bootstrap the value targets.
    searched = np.union1d(np.arange(roots), np.arange(roots) + args.td_steps)
    root = jax.tree.map(lambda x: x[:, searched], (target_state, target))
    noise = args.dirichlet_fraction
    p, root_value = search(network, target_params, *root, search_key, noise, args)
    value = value.at[:, searched].set(root_value)
    z = value_target(batch.reward, value, *positions[:2], args.discount, args.td_steps)  # [B, K+1]
    p = jnp.where(absorbing[..., None], 1 / num_actions, p[:, :roots])

    # Eq. 12-14, averaged over the unrolled steps; a reward belongs to the action before it.
    reward_target = jnp.where(moving, batch.reward[:, :roots], 0.0)[:, :-1]
    reward_loss = cross_entropy(
        two_hot(reward_target, args.num_bins), prediction.reward_logits[:, 1:]
    )
    value_loss = cross_entropy(two_hot(z, args.num_bins), prediction.value_logits)
    policy_loss = cross_entropy(p, prediction.policy_logits)

    losses = {
        "losses/reward": jnp.mean(reward_loss * known[:, 1:]),
        "losses/value": jnp.mean(value_loss * known) * args.value_coef,
        "losses/policy": jnp.mean(policy_loss * known) * args.policy_coef,
    }
    total = sum(losses.values())
    policy = jax.nn.softmax(prediction.policy_logits)
    metrics = losses | {
        "losses/total": total,
        "charts/value": jnp.mean(to_scalar(prediction.value_logits)),
        "charts/value_target": jnp.mean(z),
        "charts/target_entropy": jnp.mean(jax.scipy.special.entr(p).sum(axis=-1)),
        "charts/policy_entropy": jnp.mean(cross_entropy(policy, prediction.policy_logits)),
    }
    return total, metrics


class TrainState(NamedTuple):
    params: Any
    target_params: Any
    opt_state: Any
    step: Any  # int32, updates done


def make_network(num_actions: int, args: Args) -> MuZeroNetwork:
    return MuZeroNetwork(num_actions, args.num_bins, args.dynamics_hidden, args.dtype)


# --- optimizer (identical in rosmo_*.py, muzero_unplugged_*.py, bc_*.py and c*_*.py) ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    learning_rate = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, 1_000, 100_000, args.learning_rate_decay, staircase=True
    )
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, weight_decay=args.weight_decay, mask=is_weight)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


# --- end optimizer ---


def init_state(key, network: MuZeroNetwork, observation, args: Args) -> TrainState:
    params = network.init(key, observation, jnp.int32(0))
    return TrainState(params, params, make_optimizer(args).init(params), jnp.int32(0))


def make_train(network: MuZeroNetwork, mesh, args: Args):
    """Returns train(num_updates, state, key, steps, starts, num_starts) -> (state, metrics).

    Every argument but num_updates and steps has a leading axis for the seeds; so have the
    metrics, [seeds, num_updates]. The batches are shared out to the devices of the mesh.
    """
    optimizer, by_device = make_optimizer(args), NamedSharding(mesh, PartitionSpec("data"))
    length = args.unroll_steps + 1 + args.td_steps

    def update(state: TrainState, key, steps: Steps, starts, num_starts):
        # The key belongs to the seed and the step, so that a resumed run draws the same batches.
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = sample_windows(batch_key, steps, starts, num_starts, args.batch_size, length)
        batch = jax.lax.with_sharding_constraint(batch, by_device)
        gradient, metrics = jax.grad(muzero_loss, has_aux=True)(
            state.params, state.target_params, batch, loss_key, network, args
        )
        metrics["charts/grad_norm"] = optax.global_norm(gradient)
        delta, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params, step = optax.apply_updates(state.params, delta), state.step + 1
        target_params = optax.periodic_update(
            params, state.target_params, step, args.target_update_every
        )
        return TrainState(params, target_params, opt_state, step), metrics

    def train_seed(num_updates, state, *data):
        return jax.lax.scan(lambda s, _: update(s, *data), state, length=num_updates)

    def train(num_updates, *state_and_data):
        seed_axes = (0, 0, None, 0, 0)
        return jax.vmap(partial(train_seed, num_updates), seed_axes)(*state_and_data)

    return jax.jit(train, static_argnums=0)


def act(greedy: bool, network: MuZeroNetwork, args: Args, params, observation, key):
    """Actions [E] for observations [E, ...], from the policy that the search finds."""
    state = network.apply(params, observation, method="representation")
    prediction = network.apply(params, state, method="prediction")
    search_key, key = jax.random.split(key)
    noise = args.eval_dirichlet_fraction
    p, _ = search(network, params, state, prediction, search_key, noise, args)
    return jnp.argmax(p, axis=-1) if greedy else jax.random.categorical(key, jnp.log(p))


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
    leasts = {"seed": 0, "num_bins": 3}
    for name, value in vars(args).items():
        if type(value) is int and value < (least := leasts.get(name, 1)):
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; give at least {least}.")
        if name.endswith("dirichlet_fraction") and not 0 <= value <= 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {value:g}; give a share from 0 to 1.")
    if not 0 <= args.discount <= 1:
        raise SystemExit(f"--discount is {args.discount:g}; give a factor from 0 to 1.")
    if args.mpo_temperature <= 0:
        raise SystemExit(f"--mpo-temperature is {args.mpo_temperature:g}; give more than 0.")
    if not 0 <= args.noise <= 1:
        raise SystemExit(f"--noise is {args.noise:g}; give a probability from 0 to 1.")
    if not 0 < args.data_percent <= 100:
        raise SystemExit(f"--data-percent is {args.data_percent:g}; give more than 0, at most 100.")
    if args.eval_every % args.log_every or args.checkpoint_every % args.eval_every:
        raise SystemExit(
            f"--checkpoint-every {args.checkpoint_every} must be a multiple of --eval-every "
            f"{args.eval_every}, and that one of --log-every {args.log_every}."
        )
    if args.batch_size % jax.device_count():
        raise SystemExit(
            f"--batch-size {args.batch_size} cannot be shared by {jax.device_count()} devices; "
            "give a multiple."
        )


def main(args: Args) -> None:
    check_args(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    run = Run(args, seeds)
    if run.is_finished():
        print(f"This run is finished: see {run.dir}, or give --overwrite to start again.")
        return
    if args.compilation_cache:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", f"{cache}/rosmo-suite")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    steps, source = load_dataset(args)
    mean_return = steps.reward.sum() / steps.is_last.sum()
    starts, num_starts = window_starts(steps.is_last, args.data_percent, seeds)
    name, share = args.dataset or f"{args.env_id}, noise {args.noise:g}", args.data_percent
    part = "" if share == 100 else f"; each seed learns from {share:g}% of the episodes"
    print(f"Data: {name}: {source}{part}.", flush=True)

    network = make_network(ENVIRONMENTS[args.env_id]().action_spec().num_values, args)
    keys = jnp.stack([jax.random.split(jax.random.key(seed), 3) for seed in seeds])
    init_keys, train_keys, act_keys = keys.T
    init = jax.jit(init_state, static_argnums=(1, 3))
    states = [init(key, network, steps.observation[0], args) for key in init_keys]
    update, states = run.start(jax.tree.map(lambda *x: jnp.stack(x), *states), source)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    states, *data = jax.device_put((states, train_keys, steps, starts, num_starts), replicated)
    train = make_train(network, mesh, args)

    @partial(jax.jit, static_argnums=0)
    def act_seeds(greedy, params, observation, update, t):
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, update), t))(
            act_keys
        )
        return jax.vmap(partial(act, greedy, network, args))(params, observation, keys)

    def play(num_episodes: int, greedy: bool) -> np.ndarray:  # [seeds, episodes]
        policy = lambda observation, t: act_seeds(greedy, states.params, observation, update, t)  # noqa: E731
        noise = args.noise if args.eval_noise else 0.0
        return evaluate(policy, args.env_id, seeds, update, num_episodes, noise)

    bar = tqdm(total=args.total_updates, initial=update, disable=not sys.stderr.isatty())
    while update < args.total_updates:
        num_updates = min(args.eval_every, args.total_updates - update)
        states, metrics = train(num_updates, states, *data)
        metrics = jax.device_get(metrics)  # each [seeds, num_updates]
        for first in range(0, num_updates, args.log_every):
            window = {name: x[:, first : first + args.log_every] for name, x in metrics.items()}
            end = update + min(first + args.log_every, num_updates)
            for i, seed in enumerate(seeds):
                run.log(end, seed, {name: x[i].mean() for name, x in window.items()})
        update += num_updates
        returns = play(args.eval_episodes, args.eval_greedy)
        for seed, row in zip(seeds, returns, strict=True):
            run.log(update, seed, {"eval/return_mean": row.mean(), "eval/returns": row})
        status = f"loss {metrics['losses/total'].mean():.3f}, return {returns.mean():.2f}"
        bar.set_postfix_str(status)
        bar.update(num_updates)
        if bar.disable:
            print(f"update {update:,}: {status}", flush=True)
        if run.stopping or update % args.checkpoint_every == 0 or update == args.total_updates:
            run.save(update, states, returns.mean())
        if run.stopping:
            run.exit(update)
    bar.close()

    sampled = play(args.final_eval_episodes, greedy=False)
    greedy = play(args.final_eval_episodes, greedy=True)
    random_return, online_return = REFERENCE_RETURNS[args.env_id]
    references = {"random policy (Table 6)": random_return, "online DQN (Table 6)": online_return}
    run.plot({"data": mean_return} | references)
    for i, seed in enumerate(seeds):
        score = normalized_score(args.env_id, sampled[i].mean())
        means = {"return_mean": sampled[i].mean(), "return_mean_greedy": greedy[i].mean()}
        final = means | {"returns": sampled[i], "returns_greedy": greedy[i]}
        final["normalized_score"] = score
        run.log(update, seed, {f"final/{name}": value for name, value in final.items()})
    run.close()
    means = sampled.mean(axis=1)
    print(
        f"Final return of {len(seeds)} seeds: {means.mean():.3f} (std {means.std():.3f}, lowest "
        f"{means.min():.3f}), greedy {greedy.mean():.3f}; see {run.dir}."
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        message = (
            "Stopped; the same command (but for --overwrite) goes on from the last checkpoint."
        )
        print(message, file=sys.stderr)
        raise SystemExit(130) from None
