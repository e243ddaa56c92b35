# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "bsuite==0.3.6", "filelock==4.3.1", "flax==0.12.8", "jax==0.10.2", "matplotlib==3.11.2",
#   "numpy==2.4.6", "optax==0.2.8", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0",
# ]
# ///
"""Conservative Q-learning on BSuite (Kumar et al., 2020), a baseline of ROSMO.

CQL is Q-learning with a penalty that pushes Q down on all actions and up on
the logged one, α [log Σ exp Q(s, ·) - Q(s, a)], so that actions the data do
not cover stay unattractive. The network is that of Fig. 5(d), and Q is
categorical like ROSMO's value.

    python cql_bsuite.py --env-id catch  # five seeds
    python cql_bsuite.py --cql-alpha 0   # plain Q-learning

Where ROSMO's paper refers to the official code, this file does the following.
1. Batches are transitions drawn with replacement. A last step has no action and counts as zero;
   a terminal one is not bootstrapped, a truncated one is (--truncation-as-termination: it is not).
2. The loss of Q is the cross entropy with the two-hot target, where the official code has a sum
   of quantile losses. A cross entropy is flatter, so that the official α need not suit it.
3. The target network is copied every 2,000 updates and γ is 0.99 (official code). Targets stop at
   ±9 of h-space, ±97 in units of reward: cartpole's and mountain_car's reach ±100 at this γ.
4. The final evaluation's two policies are ε-greedy with ε = 0.001 (official code) and greedy.
5. Optimiser and batch size are ROSMO's, not the official code's (Adam at 5e-5): AdamW, a warm-up
   of 1,000 updates, a tenth of the learning rate every 100,000, weight decay on weight matrices.
"""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
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
from bsuite.environments.cartpole import Cartpole
from bsuite.environments.catch import Catch
from bsuite.environments.mountain_car import MountainCar
from filelock import FileLock, Timeout
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    # run
    env_id: Literal["catch", "cartpole", "mountain_car"] = "catch"  # BSuite task
    seed: int = 0  # first seed of training and evaluation
    num_seeds: int = 5  # number of consecutive seeds, all trained in this process
    total_updates: int = 200_000  # number of updates of every seed
    log_every: int = 1_000  # updates over which the logged losses are averaged
    checkpoint_every: int = 10_000  # updates between two checkpoints; evaluations save, too
    run_dir: Path | None = None  # folder; None: runs/{script}/{task}[-changes]/seeds{first}-{last}
    overwrite: bool = False  # start again in a folder that holds a run, and delete that run
    track: bool = False  # mirror the metrics to Weights & Biases

    # data
    noise: float = 0.0  # probability of a random action when the data were collected (Appendix E)
    data_percent: float = 100.0  # share of the episodes to learn from; every seed draws its own
    data_dir: Path = Path("data")  # folder of the datasets, which are collected when missing
    dataset: Path | None = None  # file to open; None: the one in data_dir, made if it is missing
    truncation_as_termination: bool = False  # treat every last step as terminal

    # model (Table 4)
    num_bins: int = 20  # bins of the categorical Q: 20 reach to ±97
    dtype: Literal["float32", "bfloat16"] = "float32"  # arithmetic of the network; the rest float32

    # optimisation (ROSMO's, Table 4)
    batch_size: int = 128  # transitions in a batch
    learning_rate: float = 7e-4  # AdamW's learning rate after 1,000 updates of warm-up
    learning_rate_decay: float = 0.1  # factor on the learning rate every 100,000 updates
    weight_decay: float = 1e-4  # AdamW's weight decay, on weight matrices only
    max_grad_norm: float = 5.0  # largest global norm of the gradient

    # algorithm
    target_update_every: int = 2_000  # updates between two copies to the target network
    discount: float = 0.99  # discount factor γ
    cql_alpha: float = 1.0  # α, weight of the conservative penalty

    # evaluation
    eval_every: int = 1_000  # updates between two evaluations
    eval_episodes: int = 2  # episodes of each evaluation during training
    final_eval_episodes: int = 100  # episodes of the final evaluation, and as many greedy ones
    eval_greedy: bool = False  # take no random action in evaluations during training
    eval_noise: bool = False  # evaluate with --noise instead of without noise
    eval_epsilon: float = 0.001  # probability of a random action in evaluations


# --- torso (identical in *_bsuite.py) ---
class MLP(nn.Module):
    """Dense layers with relu between them: [..., n] -> [..., features[-1]], not activated."""

    features: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x):
        # As in the authors' code: truncated normal, of standard deviation 0.88 / √fan_in.
        init = nn.initializers.variance_scaling(0.774, "fan_in", "truncated_normal")
        for i, width in enumerate(self.features):
            x = nn.Dense(width, dtype=self.dtype, kernel_init=init)(nn.relu(x) if i else x)
        return x


def output_layer(outputs: int) -> nn.Dense:
    """Zero at first; in float32, as a value is a small sum of large terms of both signs."""
    exact = partial(nn.Dense, dtype=jnp.float32, precision="highest")
    return exact(outputs, kernel_init=nn.initializers.zeros)


# --- end torso ---


class CQLNetwork(nn.Module):
    """The representation and the prediction function with a head for Q (Table 4, Fig. 5d)."""

    num_actions: int
    num_bins: int
    dtype: str

    @nn.compact
    def __call__(self, observation):
        """Observations [..., rows, columns] -> logits of Q [..., actions, bins], float32."""
        x = observation.reshape(*observation.shape[:-2], -1)
        x = nn.relu(MLP((32,), self.dtype)(MLP((64, 64, 32), self.dtype)(x)))
        x = output_layer(self.num_actions * self.num_bins)(x)
        return x.reshape(*x.shape[:-1], self.num_actions, self.num_bins)


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


# --- penalty and policy (identical in cql_*.py and combo_atari.py) ---
def conservative_gap(q, action):
    """CQL(H)'s log Σ exp Q(s, ·) - Q(s, a): values [B, actions], actions taken [B] -> [B]."""
    return jax.nn.logsumexp(q, axis=-1) - jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]


def epsilon_greedy(q, key, epsilon: float):
    """Actions [B] with the highest Q of [B, actions]; with probability `epsilon`, random ones."""
    explore_key, random_key = jax.random.split(key)
    best = jnp.argmax(q, axis=-1)
    explore = jax.random.bernoulli(explore_key, epsilon, best.shape)
    return jnp.where(explore, jax.random.randint(random_key, best.shape, 0, q.shape[-1]), best)


# --- steps (identical in *_bsuite.py) ---
class Steps(NamedTuple):
    """Steps of episodes in RLDS form; an episode's last has no action and no reward, only zeros."""

    observation: Any  # [..., rows, columns] float32
    action: Any  # [...] int32
    reward: Any  # [...] float32, received after the action
    is_last: Any  # [...] bool
    is_terminal: Any  # [...] bool


# --- end steps ---


def cql_loss(params, target_params, batch: Steps, network: CQLNetwork, args: Args):
    """Sum of Q-learning's loss and the penalty on windows of two steps -> (loss, metrics)."""
    action, moving = batch.action[:, 0], ~batch.is_last[:, 0]  # [B]
    is_terminal = batch.is_last if args.truncation_as_termination else batch.is_terminal
    observation, next_observation = jnp.moveaxis(batch.observation, 1, 0)
    next_q = jnp.max(to_scalar(network.apply(target_params, next_observation)), axis=-1)
    bootstrap = jnp.where(is_terminal[:, 1], 0.0, next_q)
    y = batch.reward[:, 0] + args.discount * bootstrap  # [B]

    logits = network.apply(params, observation)  # [B, actions, bins]
    logits_taken = jnp.take_along_axis(logits, action[:, None, None], axis=1)[:, 0]
    td_loss = optax.softmax_cross_entropy(logits_taken, two_hot(y, args.num_bins))
    q = to_scalar(logits)  # [B, actions]
    gap = conservative_gap(q, action)
    assert y.shape == gap.shape == moving.shape  # or they would broadcast

    losses = {
        "losses/td": jnp.mean(td_loss * moving),
        "losses/conservative": args.cql_alpha * jnp.mean(gap * moving),
    }
    metrics = losses | {
        "losses/total": sum(losses.values()),
        "charts/q": jnp.mean(to_scalar(logits_taken) * moving),
        "charts/q_target": jnp.mean(y * moving),
        "charts/q_min": jnp.min(jnp.where(moving[:, None], q, jnp.inf)),
        "charts/gap": jnp.mean(gap * moving),
    }
    return metrics["losses/total"], metrics


class TrainState(NamedTuple):
    params: Any
    target_params: Any
    opt_state: Any
    step: Any  # int32, updates done


def make_network(num_actions: int, args: Args) -> CQLNetwork:
    return CQLNetwork(num_actions, args.num_bins, args.dtype)


# --- optimizer (identical in rosmo_*.py, muzero_unplugged_*.py, bc_*.py and c*_*.py) ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    learning_rate = optax.warmup_exponential_decay_schedule(
        0.0, args.learning_rate, 1_000, 100_000, args.learning_rate_decay, staircase=True
    )
    is_weight = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, weight_decay=args.weight_decay, mask=is_weight)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


# --- end optimizer ---


def init_state(key, network: CQLNetwork, observation, args: Args) -> TrainState:
    params = network.init(key, observation)
    return TrainState(params, params, make_optimizer(args).init(params), jnp.int32(0))


def update(state: TrainState, key, batch: Steps, network: CQLNetwork, args: Args):
    """One update of a seed on transitions, windows [B, 2] -> (state, metrics)."""
    # Nothing is drawn at random here; `key` is an argument as in the other scripts.
    gradient, metrics = jax.grad(cql_loss, has_aux=True)(
        state.params, state.target_params, batch, network, args
    )
    metrics["charts/grad_norm"] = optax.tree.norm(gradient)
    delta, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.params)
    params, step = optax.apply_updates(state.params, delta), state.step + 1
    target = optax.periodic_update(params, state.target_params, step, args.target_update_every)
    return TrainState(params, target, opt_state, step), metrics


@jax.jit(static_argnames=("greedy", "network", "args"))
def act(params, observation, key, greedy: bool, network: CQLNetwork, args: Args):
    """Actions [E] for observations [E, ...], ε-greedy in Q or, if greedy, with the highest Q."""
    q = to_scalar(network.apply(params, observation))
    return epsilon_greedy(q, key, 0.0 if greedy else args.eval_epsilon)


def window_length(args: Args) -> int:
    return 2


# --- train (identical in *_bsuite.py) ---
def sample_windows(key, steps: Steps, starts, num_starts, batch_size: int, length: int) -> Steps:
    """Draws windows of consecutive steps, [batch_size, length]; they may cross episode ends."""
    start = starts[jax.random.randint(key, (batch_size,), 0, num_starts)]
    index = (start[:, None] + jnp.arange(length)) % len(steps.action)
    return jax.tree.map(lambda x: x[index], steps)


def update_seeds(states, keys, steps: Steps, starts, num_starts, network, args, by_device):
    """One update of every seed -> (states, metrics); all but the steps have a leading seed axis."""

    def update_seed(state, key, starts, num_starts):
        # The key belongs to the seed and the step, so that a resumed run draws the same batches.
        batch_key, key = jax.random.split(jax.random.fold_in(key, state.step))
        length = window_length(args)
        batch = sample_windows(batch_key, steps, starts, num_starts, args.batch_size, length)
        batch = jax.lax.with_sharding_constraint(batch, by_device)
        return update(state, key, batch, network, args)

    return jax.vmap(update_seed)(states, keys, starts, num_starts)


@jax.jit(static_argnames=("network", "args", "by_device"))
def train(num_updates: int, states, sums, data, network, args, by_device):
    """`num_updates` updates of every seed -> (states, sums + metrics).

    data: (keys, steps, starts, num_starts); windows of a seed begin at the first num_starts of its
    starts. by_device: how the devices share a batch.
    """

    def body(_, carry):
        states, sums = carry
        states, metrics = update_seeds(states, *data, network, args, by_device)
        return states, jax.tree.map(jnp.add, sums, metrics)

    return jax.lax.fori_loop(0, num_updates, body, (states, sums))


# --- data (identical in *_bsuite.py) ---
ENVIRONMENTS = {"catch": Catch, "cartpole": Cartpole, "mountain_car": MountainCar}


def load_dataset(args) -> Steps:
    """All steps of the arguments' dataset; benchmark/collect_bsuite.py collects what is missing."""
    path = args.dataset or args.data_dir / f"bsuite/{args.env_id}-noise{args.noise:g}-seed0.npz"
    if not path.exists():
        tool = Path(__file__).resolve().parent / "benchmark" / "collect_bsuite.py"
        command = [str(tool), f"--env-id={args.env_id}", f"--noise={args.noise}", f"--out={path}"]
        if args.dataset or not tool.exists():
            words = shlex.join([f"benchmark/{tool.name}", *command[1:]])
            advice = f"give another --dataset, or make it: python {words}"
            raise SystemExit(f"There is no dataset {path}; {advice}, in the repository's folder.")
        # JAX_PLATFORMS: this process holds the accelerator. ROSMO_PARENT: the tool ends with it.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "ROSMO_PARENT": str(os.getpid())}
        if status := subprocess.run([sys.executable, *command], env=environment).returncode:
            raise SystemExit(status if status > 0 else f"{tool} was killed.")  # else it said why
    try:
        with np.load(path) as file:
            header = json.loads(str(file["header"]))
            if (header.get("schema"), header.get("env_id")) != (1, args.env_id):
                raise ValueError(f"its header, {header}, does not say schema 1 and this env_id")
            if (noise := header.get("noise", args.noise)) != args.noise:
                raise ValueError(f"it was collected with --noise {noise:g}: give that, too")
            return check_steps(Steps(*(file[name] for name in Steps._fields)), args.env_id)
    except Exception as error:  # a damaged file can raise almost anything
        message = f"{path} cannot be used as a dataset of {args.env_id}: {error}"
        raise SystemExit(f"{message}. Give another --dataset, or make it again.") from None


def check_steps(steps: Steps, env_id: str) -> Steps:
    """The steps in the types of Steps, if they are whole episodes; else raises ValueError."""
    environment = ENVIRONMENTS[env_id]()
    shape, num_actions = environment.observation_spec().shape, environment.action_spec().num_values

    def demand(holds, fault: str) -> None:
        if not np.all(holds):
            by_row = isinstance(holds, np.ndarray) and holds.shape == action.shape
            raise ValueError(fault + f" (first in row {np.argmin(holds)})" * by_row)

    observation, action, reward, last, terminal = steps
    demand([x.shape == (len(action),) for x in steps[1:]], "all but observation are [N] with one N")
    demand(len(shape) == 2, "an observation must have two axes; give a vector the shape (1, n)")
    wanted = [len(action), *shape]
    demand([*observation.shape] == wanted, f"observation is {[*observation.shape]}, not {wanted}")
    demand([x.dtype.kind in "biuf" for x in (observation, reward)], "it is not all real numbers")
    demand(action.dtype.kind in "iu", "action is not of integers")
    demand((action >= 0) & (action < num_actions), f"action goes from 0 to {num_actions - 1}")
    demand([x.dtype == bool for x in steps[3:]], "is_last and is_terminal are not bool")
    demand(last[-1:].any(), "it does not end with an episode's last step")
    demand(last | ~terminal, "is_terminal is set where is_last is not")
    demand(~(last & np.roll(last, 1)), "it has an episode without a transition")
    largest = np.array([np.abs(observation).max(), np.abs(reward).max()], float)
    demand(largest < 1e38, "it has numbers that are not finite in float32")
    advice = "an episode of T states has T rows, the last without action and reward"
    demand(~last | ((reward == 0) & (action == 0)), f"last rows are not void: {advice}")
    dtypes = (np.float32, np.int32, np.float32, bool, bool)
    return Steps(*(x.astype(dtype) for x, dtype in zip(steps, dtypes, strict=True)))


def describe(steps: Steps) -> dict:
    """What a run writes down of its data, and compares when it goes on."""
    episodes = int(steps.is_last.sum())
    facts = {"episodes": episodes, "transitions": len(steps.action) - episodes}
    facts["mean_return"] = float(steps.reward.sum() / episodes)
    return facts | {"crc32": zlib.crc32(b"".join(x.tobytes() for x in steps))}


def window_starts(is_last: np.ndarray, data_percent: float, seeds: list[int]):
    """Every step of each seed's random p% of the episodes may start a window.

    Returns:
      The steps' indices [seeds, most of any seed], padded with zeros, and their numbers [seeds].
    """
    episode, num_episodes = np.cumsum(is_last) - is_last, int(is_last.sum())
    num_chosen = int(round(num_episodes * data_percent / 100, 6))
    if num_chosen == 0:
        raise SystemExit(f"--data-percent {data_percent:g} of {num_episodes} episodes leaves none.")
    chosen = [np.random.default_rng(s).permutation(num_episodes)[:num_chosen] for s in seeds]
    starts = [np.flatnonzero(np.isin(episode, c)) for c in chosen]
    num_starts = np.array([len(indices) for indices in starts], np.int32)
    pad = [np.pad(x, (0, max(num_starts) - len(x))) for x in starts]
    return np.stack(pad).astype(np.int32), num_starts


# --- evaluate (identical in *_bsuite.py) ---
def evaluate(
    act: Callable, env_id: str, seeds: list[int], done: int, num_episodes: int, noise: float
) -> np.ndarray | None:
    """Plays complete episodes in the real environment, those of all seeds side by side.

    Args:
      act: maps observations [seeds, episodes, ...] and the time step to actions [seeds, episodes],
        or to None, which breaks off.
      done: updates; with the seed and the episode it determines the initial states.
      noise: probability that an action is replaced by a uniformly random one.

    Returns:
      Undiscounted returns, float64 [seeds, episodes], or None if it was broken off.
    """
    shape = (len(seeds), num_episodes)
    rngs = [np.random.default_rng((s, done, e)) for s in seeds for e in range(num_episodes)]
    environments = [ENVIRONMENTS[env_id](seed=int(rng.integers(2**31))) for rng in rngs]
    num_actions = ENVIRONMENTS[env_id]().action_spec().num_values
    timesteps = [environment.reset() for environment in environments]
    returns, running, t = np.zeros(len(rngs)), np.ones(len(rngs), bool), 0
    with tqdm(total=len(rngs), desc="evaluation", unit="episode", leave=False, disable=None) as bar:
        while running.any():
            observations = np.stack([timestep.observation for timestep in timesteps])
            actions = act(observations.reshape(*shape, *observations.shape[1:]), t)
            if actions is None:
                return None
            actions = np.asarray(actions).ravel()
            for i in np.flatnonzero(running):
                action = rngs[i].integers(num_actions) if rngs[i].random() < noise else actions[i]
                timesteps[i] = environments[i].step(int(action))
                returns[i] += timesteps[i].reward
                running[i] = not timesteps[i].last()
                bar.update(timesteps[i].last())
            t += 1
    return returns.reshape(shape)


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
RANGES = {"seed": (0, 2**31), "data_percent": (TINY, 100), "num_bins": (3, 10**6)}
RANGES |= {"learning_rate": (TINY, 1), "max_grad_norm": (TINY, 1e9), "discount": (0, 1)}
RANGES |= {"learning_rate_decay": (TINY, 1), "noise": (0, 1)}
RANGES |= {"eval_episodes": (0, 10**6), "final_eval_episodes": (0, 10**6), "num_seeds": (1, 10_000)}
RANGES |= {"eval_epsilon": (0, 1)}


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


# --- main (identical in *_bsuite.py) ---
def main(args: Args) -> None:
    prepare_jax()
    args = check_args(args, RANGES)
    steps = load_dataset(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    starts, num_starts = window_starts(steps.is_last, args.data_percent, seeds)
    run = Run(args, seeds, describe(steps))
    network = make_network(ENVIRONMENTS[args.env_id]().action_spec().num_values, args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_device, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in seeds]
    init_keys, train_keys, act_keys = jnp.stack(keys).T
    init = jax.jit(jax.vmap(init_state, (0, None, None, None)), static_argnums=(1, 3))
    done, states, sums = run.restore(init(init_keys, network, steps.observation[0], args))
    data = jax.device_put((train_keys, steps, starts, num_starts), replicated)
    _, metrics = jax.eval_shape(lambda x: update_seeds(x, *data, network, args, by_device), states)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), metrics)
    states, sums = jax.device_put((states, sums or zeros), replicated)

    @jax.jit(static_argnames="greedy")
    def act_seeds(params, observation, done, t, greedy):
        fold = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, done), t))
        policy = partial(act, greedy=greedy, network=network, args=args)
        return jax.vmap(policy)(params, observation, fold(act_keys))

    def play(number: int, greedy: bool) -> np.ndarray | None:  # [seeds, episodes]
        def policy(observation, t):
            return None if run.stopping else act_seeds(states.params, observation, done, t, greedy)

        noise = args.noise if args.eval_noise else 0.0
        with run.time("evaluation"):
            return evaluate(policy, args.env_id, seeds, done, number, noise)

    run.show(done, "compiling")
    longest, part, played = 1, "compilation", ""
    while True:
        ends = done == args.total_updates
        evaluates = ends or (done > 0 and args.eval_episodes > 0 and done % args.eval_every == 0)
        if run.stopping or evaluates or done % args.checkpoint_every == 0:
            run.save(done, states, sums)
        if evaluates and args.eval_episodes:
            if (returns := play(args.eval_episodes, args.eval_greedy)) is not None:
                for seed, row in zip(seeds, returns, strict=True):
                    run.log(done, seed, {"eval/return_mean": row.mean(), "eval/returns": row})
                played = f", return {returns.mean():.2f}"
        if run.stopping and run.saved == done:  # else it came after the lines that save
            run.exit()
        if ends:
            break
        # As many updates as take half a second, but not past a line, an evaluation or a checkpoint.
        stations = (args.log_every, args.eval_every, args.checkpoint_every, args.total_updates)
        number = min(longest, *(every - done % every for every in stations))
        before = time.monotonic()
        with run.time(part):
            states, sums = train(number, states, sums, data, network, args, by_device)
            jax.block_until_ready(sums)
        if time.monotonic() - before < 0.5 or part == "compilation":
            longest = max(longest, 2 * number)
        done, part = done + number, "update"
        run.bar.update(number)
        if done % args.log_every == 0:
            means = {name: np.asarray(x) / args.log_every for name, x in sums.items()}  # [seeds]
            for i, seed in enumerate(seeds):
                run.log(done, seed, {name: x[i] for name, x in means.items()})
            run.show(done, f"loss {means['losses/total'].mean():.3f}{played}")
            sums = jax.device_put(zeros, replicated)
    if number := args.final_eval_episodes:
        run.show(done, f"final evaluation: {number} sampled, {number} greedy episodes of a seed")
    sampled, greedy = (play(number, greedy) for greedy in (False, True))
    if sampled is None or greedy is None:
        run.exit()
    run.finish(done, sampled, greedy)


# --- entry (identical in *_bsuite.py) ---
if __name__ == "__main__":
    but = " without --overwrite" if "--overwrite" in sys.argv else ""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    try:
        head = (__doc__ or "").split("\n\nWhere")[0].replace("\n", "\n ")  # or tyro joins lines
        main(tyro.cli(Args, description=head))
    except KeyboardInterrupt:
        print(f"Stopped; the same command{but} goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, a folder that cannot be written, a closed pipe
        raise SystemExit(f"{error}: put that right, then the same command{but} goes on.") from None
    except ModuleNotFoundError as error:
        message = f"{error}: install it, or all that stands at the top of this script."
        raise SystemExit(message) from None
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "give a smaller --batch-size, network or dataset, or end what else uses it"
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"The memory is not enough: {advice}. {reason}".strip()) from None
