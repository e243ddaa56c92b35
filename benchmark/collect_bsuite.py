# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "jax==0.10.2",
#     "optax==0.2.8",
#     "bsuite==0.3.6",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Collect the BSuite datasets of the ROSMO paper (Appendix E, Tables 5 and 6).

An online DQN learns on a real bsuite environment, and every episode from the first to the last
of its training is recorded. With probability --noise the environment executes a uniformly random
action in place of the agent's; the recorded action, from which the DQN also learns, is the
agent's, so that the noise belongs to the environment.

    python benchmark/collect_bsuite.py --env-id catch --noise 0.1 --seed 0

writes data/bsuite/catch-noise0.1-seed0.npz, whose format is in docs/bsuite_data.md, and prints
its rows of Tables 5 and 6 beside the paper's. The same seed gives the same data.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from bsuite.environments.cartpole import Cartpole
from bsuite.environments.catch import Catch
from bsuite.environments.mountain_car import MountainCar
from tqdm import tqdm

SCHEMA = 1


@dataclasses.dataclass
class Args:
    # run
    env_id: str = "catch"
    """the bsuite task: cartpole, catch or mountain_car"""
    noise: float = 0.0
    """the probability that a uniformly random action is executed in place of the agent's"""
    seed: int = 0
    """seeds the environment, its noise, the network, the exploration and the replay"""
    num_episodes: int | None = None
    """episodes to record; the paper's (cartpole 1000, catch 2000, mountain_car 500) if not given"""
    # data
    data_dir: Path = Path("data/bsuite")
    """the folder of the datasets"""
    overwrite: bool = False
    """collect again even if the dataset exists"""


# Chosen so that the recorded mean returns come close to Table 5 at noise 0; the same for all noise
# levels. Exploration falls linearly from `epsilon_start` over `epsilon_episodes` to `epsilon_end`
# and the learning rate linearly to a tenth over the run. `observation_scale` brings the inputs of
# the network (never the data) to the order of one.
class Task(NamedTuple):
    make: Callable[..., Any]
    num_actions: int
    max_steps: int  # transitions in the longest possible episode
    num_episodes: int
    epsilon_start: float
    epsilon_end: float
    epsilon_episodes: int
    train_period: int
    learning_rate: float
    observation_scale: tuple[float, ...]
    eval_episodes: int


TASKS = {
    "cartpole": Task(Cartpole, 3, 1001, 1000, 1.0, 0.05, 100, 4, 1e-3, (1, 1, 1, 1, 1, 1), 30),
    "catch": Task(Catch, 3, 9, 2000, 1.0, 0.05, 400, 1, 1e-3, (1,), 100),
    "mountain_car": Task(MountainCar, 3, 1000, 500, 1.0, 0.05, 10, 4, 1e-3, (1, 14, 1), 100),
}
DISCOUNT = 0.99
BATCH_SIZE = 32
REPLAY_CAPACITY = 50_000
MIN_REPLAY = 500
TARGET_PERIOD = 100  # updates
HIDDEN = 64

PAPER_TABLE5 = {  # env_id -> {noise: (transitions, mean return)}
    "cartpole": {
        0.0: (630_262, 629.71),
        0.1: (779_491, 779.01),
        0.3: (787_350, 786.86),
        0.5: (527_528, 526.75),
    },
    "catch": {0.0: (18_000, 0.71), 0.1: (18_000, 0.60), 0.3: (18_000, 0.25), 0.5: (18_000, -0.04)},
    "mountain_car": {
        0.0: (82_342, -164.68),
        0.1: (147_116, -294.23),
        0.3: (138_262, -276.52),
        0.5: (167_688, -335.37),
    },
}
PAPER_TABLE6 = {  # env_id -> (random policy, online DQN)
    "cartpole": (64.83, 1001.0),
    "catch": (-0.66, 1.0),
    "mountain_car": (-1000.0, -102.16),
}


# Q-network: the same function acts in numpy, a JAX dispatch per step being far slower, and learns
# in JAX.
def q_values(params, x):
    *hidden, (w_out, b_out) = params
    for w, b in hidden:
        x = x @ w + b
        x = x * (x > 0)
    return x @ w_out + b_out


def init_params(rng: np.random.Generator, sizes: tuple[int, ...]):
    return [
        ((rng.standard_normal((i, o)) / np.sqrt(i)).astype(np.float32), np.zeros(o, np.float32))
        for i, o in pairwise(sizes)
    ]


def td_loss(params, target_params, batch):
    observation, action, reward, discount, next_observation = batch
    q = jnp.take_along_axis(q_values(params, observation), action[:, None], 1)[:, 0]  # [B]
    best = q_values(params, next_observation).argmax(-1)  # double Q-learning
    next_q = jnp.take_along_axis(q_values(target_params, next_observation), best[:, None], 1)[:, 0]
    target = reward + discount * next_q
    return optax.huber_loss(q, jax.lax.stop_gradient(target)).mean()


@partial(jax.jit, static_argnums=0)
def update(optimizer, params, target_params, opt_state, batch):
    grads = jax.grad(td_loss)(params, target_params, batch)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def collect(task: Task, num_episodes: int, noise: float, seed: int, report):
    """Returns the steps of all episodes in RLDS form, their returns and the last Q-network."""
    streams = np.random.SeedSequence(seed).spawn(4)
    init_rng, explore_rng, noise_rng, replay_rng = map(np.random.default_rng, streams)
    env = task.make(seed=seed)
    shape = env.observation_spec().shape
    scale = np.asarray(task.observation_scale, np.float32)

    # The record is the replay: transition j leads from step transitions[j] to the step after it.
    size = num_episodes * (task.max_steps + 1)
    observation = np.zeros((size, *shape), np.float32)
    action, reward = np.zeros(size, np.int32), np.zeros(size, np.float32)
    is_first, is_last, is_terminal = (np.zeros(size, bool) for _ in range(3))
    transitions = np.zeros(size, np.int64)
    n = t = 0  # steps and transitions so far
    returns = []

    params = init_params(init_rng, (int(np.prod(shape)), HIDDEN, HIDDEN, task.num_actions))
    target_params, acting, num_updates = params, params, 0
    optimizer = optax.adam(task.learning_rate)
    opt_state = optimizer.init(params)

    def inputs(index):
        return (observation[index] * scale).reshape(len(index), -1)

    for episode in range(num_episodes):
        fraction = min(episode / task.epsilon_episodes, 1.0)
        epsilon = task.epsilon_start + fraction * (task.epsilon_end - task.epsilon_start)
        start, step = n, env.reset()
        observation[n], is_first[n] = step.observation, True
        while not step.last():
            if explore_rng.random() < epsilon:
                chosen = int(explore_rng.integers(task.num_actions))
            else:
                chosen = int(q_values(acting, (observation[n] * scale).ravel()).argmax())
            executed = chosen
            if noise_rng.random() < noise:
                executed = int(noise_rng.integers(task.num_actions))
            step = env.step(executed)
            action[n], reward[n], transitions[t] = chosen, step.reward, n
            n, t = n + 1, t + 1
            observation[n], is_last[n] = step.observation, step.last()
            is_terminal[n] = step.last() and step.discount == 0
            if t >= MIN_REPLAY and t % task.train_period == 0:
                i = transitions[replay_rng.integers(max(0, t - REPLAY_CAPACITY), t, BATCH_SIZE)]
                discount = DISCOUNT * (1 - is_terminal[i + 1].astype(np.float32))
                batch = (inputs(i), action[i], reward[i], discount, inputs(i + 1))
                params, opt_state = update(optimizer, params, target_params, opt_state, batch)
                acting = jax.tree.map(np.asarray, params)
                num_updates += 1
                if num_updates % TARGET_PERIOD == 0:
                    target_params = params
        returns.append(float(reward[start:n].sum()))
        n += 1
        report(returns)
    steps = {
        "observation": observation,
        "action": action,
        "reward": reward,
        "is_first": is_first,
        "is_last": is_last,
        "is_terminal": is_terminal,
    }
    return {name: array[:n] for name, array in steps.items()}, returns, acting


def evaluate(task: Task, policy: Callable[[np.ndarray], int], episodes: int, seed: int) -> float:
    """The policy's mean return without noise."""
    env, total = task.make(seed=seed), 0.0
    for _ in range(episodes):
        step = env.reset()
        while not step.last():
            step = env.step(policy(step.observation))
            total += step.reward
    return total / episodes


def write(path: Path, steps: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """Writes under a temporary name first: a file under the final name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **steps, header=np.array(json.dumps(header)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(num_episodes: int) -> Callable[[list[float]], None]:
    """Reports the mean of the last 20 returns: a bar on a terminal, ten lines elsewhere."""
    bar = tqdm(total=num_episodes, unit="episode", disable=not sys.stderr.isatty())

    def report(returns: list[float]) -> None:
        done, recent = len(returns), f"{np.mean(returns[-20:]):.2f}"
        if not bar.disable:
            bar.set_postfix({"recent mean return": recent}, refresh=False)
            bar.update()
        elif done * 10 // num_episodes > (done - 1) * 10 // num_episodes:
            print(f"episode {done}/{num_episodes}, recent mean return {recent}", flush=True)
        if done == num_episodes:
            bar.close()

    return report


def main(args: Args) -> None:
    if args.env_id not in TASKS:
        sys.exit(f"Unknown --env-id {args.env_id}; it must be one of {', '.join(sorted(TASKS))}.")
    if not 0 <= args.noise <= 1:
        sys.exit(f"--noise must be a probability between 0 and 1, not {args.noise:g}.")
    if not 0 <= args.seed < 2**32:
        sys.exit(f"--seed must be between 0 and {2**32 - 1}, not {args.seed}.")
    task = TASKS[args.env_id]
    num_episodes = task.num_episodes if args.num_episodes is None else args.num_episodes
    if num_episodes < 1:
        sys.exit(f"--num-episodes must be at least 1, not {num_episodes}.")
    path = args.data_dir / f"{args.env_id}-noise{args.noise:g}-seed{args.seed}.npz"
    if path.exists() and not args.overwrite:
        print(f"{path} exists already; --overwrite collects it again.")
        return
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"Cannot make the folder {args.data_dir}: {error.strerror}.")

    jax.config.update("jax_platforms", "cpu")  # these networks are too small for an accelerator
    started = time.time()
    print(f"Collecting {num_episodes} episodes of {args.env_id}, noise {args.noise:g}, to {path}")
    steps, returns, params = collect(
        task, num_episodes, args.noise, args.seed, progress(num_episodes)
    )

    eval_seed, policy_seed = np.random.SeedSequence((args.seed, 1)).generate_state(2)
    rng = np.random.default_rng(policy_seed)
    scale = np.asarray(task.observation_scale, np.float32)
    random_return = evaluate(task, lambda _: rng.integers(task.num_actions), 100, eval_seed)
    online_return = evaluate(
        task,
        lambda observation: q_values(params, (observation * scale).ravel()).argmax(),
        task.eval_episodes,
        eval_seed,
    )
    header = {
        "schema": SCHEMA,
        "source": "collect_bsuite",
        "env_id": args.env_id,
        "noise": args.noise,
        "seed": args.seed,
        "num_episodes": num_episodes,
        "num_transitions": len(steps["action"]) - num_episodes,
        "mean_return": float(np.mean(returns)),
        "returns": returns,
        "random_return": random_return,
        "online_return": online_return,
        "arguments": {**dataclasses.asdict(args), "data_dir": str(args.data_dir)},
        "versions": {m: metadata.version(m) for m in ("jax", "bsuite", "numpy")},
    }
    try:
        write(path, steps, header)
    except OSError as error:
        sys.exit(f"Cannot write {path}: {error.strerror}.")

    transitions, mean = PAPER_TABLE5[args.env_id].get(args.noise, ("-", "-"))
    random_paper, online_paper = PAPER_TABLE6[args.env_id]
    print(f"{'Table 5':24}{'episodes':>10}{'transitions':>13}{'mean return':>13}{'paper':>18}")
    print(
        f"{args.env_id + f' (noise {args.noise:g})':24}{num_episodes:>10}"
        f"{header['num_transitions']:>13}{header['mean_return']:>13.2f}{transitions:>10}{mean:>8}"
    )
    print(f"{'Table 6':24}{'random policy':>14}{'paper':>10}{'online DQN':>14}{'paper':>10}")
    print(
        f"{args.env_id:24}{random_return:>14.2f}{random_paper:>10}"
        f"{online_return:>14.2f}{online_paper:>10}"
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.time() - started:.0f} s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)
