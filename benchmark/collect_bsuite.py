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

An online DQN (double Q-learning, squared loss) learns on a real bsuite
environment, and every episode from the first to the last of its training is
recorded. With probability --noise the environment executes a uniformly random
action in place of the agent's; the recorded action, from which the DQN also
learns, is the agent's, so that the noise belongs to the environment.

    python benchmark/collect_bsuite.py --env-id catch --noise 0.1 --seed 0

writes data/bsuite/catch-noise0.1-seed0.npz, whose format is in
docs/bsuite_data.md, and prints its rows of Tables 5 and 6 beside the paper's.
The same seed and versions give the same data on x86 processors with AVX2
under Linux: docs/bsuite_data.md has the checksums.

    python benchmark/collect_bsuite.py --env-id catch --from-rlds IN --out OUT

converts a TFDS/RLDS folder instead, such as the authors'. This needs
tensorflow-datasets and tensorflow.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and " avx2 " in cpu.read_text():  # add numbers in one order on all of these
        flags = "--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ |= {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from bsuite.environments.cartpole import Cartpole
from bsuite.environments.catch import Catch
from bsuite.environments.mountain_car import MountainCar
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # run
    env_id: str = "catch"  # the bsuite task: cartpole, catch or mountain_car
    seed: int = 0  # seeds the environment, its noise, the network, the exploration and the replay
    overwrite: bool = False  # collect again even if the dataset exists

    # data
    noise: float = 0.0
    """the probability that a uniformly random action is executed in place of the agent's"""
    num_episodes: int | None = None
    """episodes to record; the paper's (cartpole 1000, catch 2000, mountain_car 500) if not given"""
    from_rlds: Path | None = None  # convert this TFDS/RLDS folder instead of collecting
    data_dir: Path = Path("data")  # the folder of the datasets
    out: Path | None = None
    """the file to write; None:
    {data-dir}/bsuite/{env-id}-noise{noise}-seed{seed}[-{n}episodes].npz"""


RANGES = {  # least, most
    "seed": (0, 2**32 - 1),
    "noise": (0, 1),
    "num_episodes": (1, 100_000),
}


# The schedules are chosen so that the mean returns of the records come close to Table 5 at noise 0;
# all noise levels share them. The exploration rate falls linearly to EPSILON over the first
# episodes, the learning rate to zero over all of them. The loss is the square: with a Huber loss
# DQN did not learn cartpole in 1000 episodes.
class Task(NamedTuple):
    make: Callable[..., Any]
    num_episodes: int
    max_steps: int  # transitions in the longest possible episode
    input_scale: tuple[float, ...]  # brings the inputs of the network (not the data) to order one
    first_epsilon: float
    epsilon_episodes: int
    train_period: int  # transitions per update


TASKS = {
    "cartpole": Task(Cartpole, 1000, 1001, (1,), 1.0, 150, 2),
    "catch": Task(Catch, 2000, 9, (1,), 1.0, 400, 2),
    "mountain_car": Task(MountainCar, 500, 1000, (1, 14, 1), 0.5, 10, 1),
}
NUM_ACTIONS = 3  # in each task
HIDDEN = 64
DISCOUNT = 0.99
BATCH_SIZE = 32
MIN_REPLAY = 500
TARGET_PERIOD = 100  # updates
EPSILON = 0.05
LEARNING_RATE = 1e-3
EVAL_EPISODES = 100
OPTIMIZER = optax.scale_by_adam()

PAPER_TABLE5 = {  # transitions, mean return
    ("cartpole", 0.0): (630_262, 629.71),
    ("cartpole", 0.1): (779_491, 779.01),
    ("cartpole", 0.3): (787_350, 786.86),
    ("cartpole", 0.5): (527_528, 526.75),
    ("catch", 0.0): (18_000, 0.71),
    ("catch", 0.1): (18_000, 0.60),
    ("catch", 0.3): (18_000, 0.25),
    ("catch", 0.5): (18_000, -0.04),
    ("mountain_car", 0.0): (82_342, -164.68),
    ("mountain_car", 0.1): (147_116, -294.23),
    ("mountain_car", 0.3): (138_262, -276.52),
    ("mountain_car", 0.5): (167_688, -335.37),
}
PAPER_TABLE6 = {  # random agent, online DQN agent
    "cartpole": (64.83, 1001.0),
    "catch": (-0.66, 1.0),
    "mountain_car": (-1000.0, -102.16),
}
CHECKSUMS = {  # CRC-32 of seed 0's data, as in a run's config.json
    ("cartpole", 0.0): 471618534,
    ("cartpole", 0.1): 3287650305,
    ("cartpole", 0.3): 1550256846,
    ("cartpole", 0.5): 200905177,
    ("catch", 0.0): 3956084652,
    ("catch", 0.1): 2868715720,
    ("catch", 0.3): 1641915462,
    ("catch", 0.5): 1103909284,
    ("mountain_car", 0.0): 4254251187,
    ("mountain_car", 0.1): 2239953748,
    ("mountain_car", 0.3): 3542290890,
    ("mountain_car", 0.5): 4088760960,
}


# JAX may swallow an exception that a signal handler raises. The handler therefore only takes note.
stop = SimpleNamespace(signalled=False, parent=None)


def take_signal(*_) -> None:
    stop.signalled = True


def check_stop() -> None:
    """Raises KeyboardInterrupt after Ctrl-C or SIGTERM, or when the script that waits has ended."""
    if stop.signalled or stop.parent not in (None, os.getppid()):
        raise KeyboardInterrupt


def init_params(rng: np.random.Generator, sizes: tuple[int, ...]):
    return [
        ((rng.standard_normal((i, o)) / np.sqrt(i)).astype(np.float32), np.zeros(o, np.float32))
        for i, o in pairwise(sizes)
    ]


# One function for both: it acts in numpy, where a step costs no JAX dispatch, and learns in JAX.
def q_values(params, x):
    *hidden, (w_out, b_out) = params
    for w, b in hidden:
        x = x @ w + b
        x = x * (x > 0)
    return x @ w_out + b_out


def td_loss(params, target_params, batch):
    inputs, action, reward, discount, next_inputs = batch
    q = jnp.take_along_axis(q_values(params, inputs), action[:, None], 1)[:, 0]  # [B]
    best = q_values(params, next_inputs).argmax(-1)  # double Q-learning
    next_q = jnp.take_along_axis(q_values(target_params, next_inputs), best[:, None], 1)[:, 0]
    target = jax.lax.stop_gradient(reward + discount * next_q)
    return optax.l2_loss(q, target).mean()


@jax.jit
def update(params, target_params, opt_state, learning_rate, batch):
    grads = jax.grad(td_loss)(params, target_params, batch)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state


def collect(task: Task, num_episodes: int, noise: float, seed: int, report=lambda returns: None):
    """Returns the steps of all episodes in RLDS form, their returns and the last greedy policy."""
    streams = np.random.SeedSequence(seed).spawn(4)
    init_rng, explore_rng, noise_rng, replay_rng = map(np.random.default_rng, streams)
    env = task.make(seed=seed)
    shape = env.observation_spec().shape
    scale = np.asarray(task.input_scale, np.float32)

    # The whole record is the replay: transition j leads from step `transitions[j]` to the next.
    size = num_episodes * (task.max_steps + 1)
    steps = {"observation": np.zeros((size, *shape), np.float32)}
    steps |= {"action": np.zeros(size, np.int32), "reward": np.zeros(size, np.float32)}
    steps |= {name: np.zeros(size, bool) for name in ("is_first", "is_last", "is_terminal")}
    observation, action, reward, is_first, is_last, is_terminal = steps.values()
    transitions = np.zeros(size, np.int64)
    n = t = num_updates = 0  # n steps, t transitions
    returns = []

    params = init_params(init_rng, (int(np.prod(shape)), HIDDEN, HIDDEN, NUM_ACTIONS))
    target_params, opt_state, acting = params, OPTIMIZER.init(params), params

    def greedy(observation: np.ndarray) -> int:
        return int(q_values(acting, (observation * scale).ravel()).argmax())

    def inputs(index: np.ndarray) -> np.ndarray:
        return (observation[index] * scale).reshape(len(index), -1)

    for episode in range(num_episodes):
        fraction = min(episode / task.epsilon_episodes, 1.0)
        epsilon = task.first_epsilon + fraction * (EPSILON - task.first_epsilon)
        learning_rate = LEARNING_RATE * (1 - episode / num_episodes)
        start, step = n, env.reset()
        observation[n], is_first[n] = step.observation, True
        while not step.last():
            check_stop()
            explore = explore_rng.random() < epsilon
            chosen = explore_rng.integers(NUM_ACTIONS) if explore else greedy(observation[n])
            replaced = noise_rng.random() < noise
            step = env.step(noise_rng.integers(NUM_ACTIONS) if replaced else chosen)
            action[n], reward[n], transitions[t] = chosen, step.reward, n
            n, t = n + 1, t + 1
            observation[n], is_last[n] = step.observation, step.last()
            is_terminal[n] = step.last() and step.discount == 0
            if t >= MIN_REPLAY and t % task.train_period == 0:
                i = transitions[replay_rng.integers(t, size=BATCH_SIZE)]
                discount = DISCOUNT * (1 - is_terminal[i + 1].astype(np.float32))
                batch = (inputs(i), action[i], reward[i], discount, inputs(i + 1))
                params, opt_state = update(params, target_params, opt_state, learning_rate, batch)
                acting = jax.tree.map(np.asarray, params)
                num_updates += 1
                if num_updates % TARGET_PERIOD == 0:
                    target_params = params
        returns.append(float(reward[start:n].sum()))
        n += 1
        report(returns)
    return {name: array[:n] for name, array in steps.items()}, returns, greedy


def evaluate(task: Task, policy: Callable[[np.ndarray], int], seed: int) -> float:
    """The policy's mean return in the environment without noise."""
    env, total = task.make(seed=seed), 0.0
    for _ in range(EVAL_EPISODES):
        step = env.reset()
        while not step.last():
            check_stop()
            step = env.step(policy(step.observation))
            total += step.reward
    return total / EVAL_EPISODES


KINDS = {  # NumPy's kinds of the arrays of an RLDS dataset: float, int, unsigned, bool
    "observation": ("fiu", "a number"),
    "action": ("iu", "an integer"),
    "reward": ("fiu", "a number"),
    "is_last": ("b", "a bool"),
    "is_terminal": ("b", "a bool"),
}


def read_rlds(folder: Path) -> list[dict[str, np.ndarray]]:
    """The episodes of a prepared TFDS dataset: the fields of their steps, each [T + 1, ...]."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow_datasets as tfds

        dataset = tfds.builder_from_directory(folder).as_dataset(split="all")
        whole = dataset.map(lambda episode: episode["steps"].batch(2**31 - 1).get_single_element())
        episodes = []
        for episode in tfds.as_numpy(whole):
            check_stop()
            episodes.append({name: np.asarray(x) for name, x in episode.items()})
    except ImportError:
        sys.exit("--from-rlds needs the packages tensorflow-datasets and tensorflow.")
    except Exception as error:  # a damaged folder can raise almost anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        sys.exit(f"{folder} cannot be read as a TFDS/RLDS dataset: {reason.rstrip('.')}.")
    if not episodes:
        sys.exit(f"{folder} holds no episodes.")
    return episodes


def convert(folder: Path, task: Task) -> dict[str, np.ndarray]:
    """The steps of all episodes of a TFDS/RLDS folder, checked, as `collect` returns them.

    What RLDS calls void, the action of a last step, becomes zero. A reward there is not void, but
    that of a dataset which has T steps where RLDS has T + 1: zeroing would lose it.
    """
    episodes = read_rlds(folder)
    if "is_last" in episodes[0]:  # an end is terminal unless the data say something else
        episodes = [{"is_terminal": episode["is_last"]} | episode for episode in episodes]
    if missing := [name for name in KINDS if name not in episodes[0]]:
        sys.exit(f"{folder} is not in RLDS form: its steps have no {', '.join(missing)}.")
    lengths = np.array([len(episode["is_last"]) for episode in episodes])
    ends = np.cumsum(lengths) - 1  # the last row of each episode
    starts = ends - lengths + 1

    def refuse(what: str, row: int, advice: str = "") -> NoReturn:
        episode = np.searchsorted(ends, row)
        where = f"first in row {row - starts[episode]} of episode {episode}, both counted from 0"
        sys.exit(f"{folder}: {what} ({where}){advice}.")

    for name, (kinds, word) in KINDS.items():
        shape = task.make().observation_spec().shape if name == "observation" else ()
        for start, episode in zip(starts, episodes, strict=True):
            array = episode[name]
            if array.dtype.kind not in kinds:
                refuse(f"{name} is {array.dtype} where {word} is needed", start)
            if array.shape[1:] != shape:
                refuse(f"{name} has the shape {array.shape[1:]} where {shape} is needed", start)
    observation, action, reward, is_last, is_terminal = (
        np.concatenate([episode[name] for episode in episodes]) for name in KINDS
    )
    with np.errstate(over="ignore"):
        observation, reward = observation.astype(np.float32), reward.astype(np.float32)
    last = np.isin(np.arange(len(action)), ends)
    finite = np.isfinite(observation).reshape(len(observation), -1).all(axis=1)
    unknown = (action < 0) | (action >= NUM_ACTIONS)
    single = np.isin(np.arange(len(action)), ends[lengths == 1])
    for wrong, what in (
        (is_last & ~last, "is_last is set before the end of an episode"),
        (last & ~is_last, "is_last is not set at the end of an episode"),
        (is_terminal & ~is_last, "is_terminal is set where is_last is not"),
        (single, "an episode has one row, and so no transition"),
        (~finite, "an observation is not a finite float32"),
        (~np.isfinite(reward), "a reward is not a finite float32"),
        (unknown & ~last, f"an action is not one of the task's, 0 to {NUM_ACTIONS - 1}"),
    ):
        if wrong.any():
            refuse(what, wrong.argmax())
    if reward[ends].any():
        what = "the last row of an episode has a reward, as in data of D4RL or d3rlpy, where RLDS "
        what += "has one row more, the final observation without action and reward"
        row = ends[reward[ends] != 0][0]
        refuse(what, row, "; append this row to every episode, and move is_last to it")
    if action[ends].any():
        which = np.flatnonzero(action[ends])
        names = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
        print(
            f"Warning: {folder}: the last rows of {len(which)} episodes ({names}) have an action, "
            "which RLDS calls void: it is set to 0.",
            file=sys.stderr,
        )
    return {
        "observation": observation,
        "action": np.where(last, 0, action).astype(np.int32),
        "reward": reward,
        "is_first": np.isin(np.arange(len(action)), starts),
        "is_last": is_last,
        "is_terminal": is_terminal,
    }


def write(
    path: Path, steps: dict[str, np.ndarray], header: dict[str, Any], overwrite: bool
) -> None:
    """Writes under a temporary name first: a file under the final name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **steps, header=np.array(json.dumps(header, default=str)))
        check_stop()
        if path.exists() and not overwrite:
            raise FileExistsError  # another process has written it meanwhile
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(num_episodes: int) -> Callable[[list[float]], None]:
    """Reports the mean of the last 20 returns: a bar on a terminal, ten lines elsewhere."""
    bar = tqdm(total=num_episodes, unit="episode", disable=not sys.stderr.isatty())

    def report(returns: list[float]) -> None:
        done, recent = len(returns), f"recent mean return {np.mean(returns[-20:]):.2f}"
        if not bar.disable:
            bar.set_postfix_str(recent, refresh=False)
            bar.update()
        elif done * 10 // num_episodes > (done - 1) * 10 // num_episodes:
            print(f"episode {done}/{num_episodes}, {recent}", flush=True)
        if done == num_episodes:
            bar.close()

    return report


def print_tables(header: dict[str, Any]) -> None:
    def row(title, *cells):
        cells = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells]
        print(f"{title:24}" + "".join(f"{cell:>13}" for cell in cells))

    env_id, noise = header["env_id"], header["noise"]
    transitions, mean_return = PAPER_TABLE5.get((env_id, noise), ("-", "-"))
    random_return, online_return = PAPER_TABLE6[env_id]
    row("Table 5", "transitions", "paper", "mean return", "paper")
    row(
        f"{env_id}, noise {noise:g}",
        *(header["num_transitions"], transitions, header["mean_return"], mean_return),
    )
    row("Table 6", "random", "paper", "online DQN", "paper")
    row(env_id, header["random_return"], random_return, header["online_return"], online_return)


def compare(args: Args, steps: dict[str, np.ndarray]) -> None:
    """Warns if the data of a command of docs/bsuite_data.md are not those that the page has."""
    theirs = CHECKSUMS.get((args.env_id, args.noise))
    if theirs is None or (args.seed, args.num_episodes) != (0, None):
        return
    names = ("observation", "action", "reward", "is_last", "is_terminal")
    crc32 = zlib.crc32(b"".join(steps[name].tobytes() for name in names))
    if crc32 != theirs:
        print(
            f"Warning: the data have the CRC-32 {crc32}, those of docs/bsuite_data.md {theirs}: "
            "another kind of processor, or other versions of packages. Results can differ.",
            file=sys.stderr,
        )


def check_args(args: Args) -> None:
    """Ends the program with one sentence if an argument makes no sense."""
    if args.env_id not in TASKS:
        sys.exit(f"Unknown --env-id {args.env_id}: it must be one of {', '.join(TASKS)}.")
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:  # nan is in no range
            option = name.replace("_", "-")
            sys.exit(f"--{option} must be from {least} to {most}, not {value}.")
    if args.from_rlds is None:
        return
    if args.out is None:
        sys.exit("--from-rlds needs --out, the file to write.")
    if (args.seed, args.noise, args.num_episodes) != (0, 0.0, None):
        sys.exit("--seed, --noise and --num-episodes have no use with --from-rlds.")
    if not args.from_rlds.is_dir():
        sys.exit(f"There is no folder {args.from_rlds}.")


def compare_file(path: Path, args: Args) -> str:
    """How a file differs from the one that is asked for, in words; empty if it does not."""
    asked = {"env_id": args.env_id, "source": "rlds" if args.from_rlds else "collect_bsuite"}
    if args.from_rlds:
        asked["from_rlds"] = str(args.from_rlds)
    else:
        asked |= {"noise": args.noise, "seed": args.seed}
        asked["num_episodes"] = args.num_episodes or TASKS[args.env_id].num_episodes
    try:
        with np.load(path) as file:
            there = json.loads(str(file["header"]))
            there = there.get("arguments", {}) | there
            pairs = [(k, there.get(k), v) for k, v in asked.items()]
            differing = ", ".join(f"{k} {a}, not {b}" for k, a, b in pairs if a != b)
            if not (differing or args.from_rlds):
                compare(args, file)
        return differing
    except Exception as error:  # a damaged file can raise almost anything
        return f"other content ({error!r})"


def open_path(args: Args) -> Path | None:
    """The file to write, in a folder that can be written; None if the file is there already."""
    part = f"-{args.num_episodes}episodes" if args.num_episodes else ""
    name = f"{args.env_id}-noise{args.noise:g}-seed{args.seed}{part}.npz"
    path = args.out or args.data_dir / "bsuite" / name
    if path.is_dir():
        sys.exit(f"{path} is a folder; --out must be a file.")
    if path.exists() and not args.overwrite:
        if differing := compare_file(path, args):
            sys.exit(
                f"{path} exists already, with {differing}: give another --out, or --overwrite."
            )
        print(f"{path} exists already; --overwrite replaces it.")
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        sys.exit(f"Cannot write to the folder {path.parent}: {error.strerror}.")
    return path


def main(args: Args) -> None:
    started = time.time()
    paths = {k: Path(os.path.expanduser(v)) for k, v in vars(args).items() if isinstance(v, Path)}
    paths |= {"from_rlds": paths["from_rlds"].resolve()} if args.from_rlds else {}
    args = dataclasses.replace(args, **paths)
    check_args(args)
    path = open_path(args)
    if path is None:
        return
    task = TASKS[args.env_id]
    versions = {
        name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "bsuite", "numpy")
    }
    header = {"schema": 1, "env_id": args.env_id, "versions": versions}
    header["arguments"] = dataclasses.asdict(args)
    if args.from_rlds:
        print(f"Converting {args.from_rlds}: {path}", flush=True)
        steps = convert(args.from_rlds, task)
        starts = np.flatnonzero(steps["is_first"])
        returns = np.add.reduceat(steps["reward"].astype(float), starts).tolist()
        header |= {"source": "rlds"}
    else:
        jax.config.update("jax_platforms", "cpu")  # the network is too small for an accelerator
        num_episodes = args.num_episodes or task.num_episodes
        print(
            f"Collecting {num_episodes} episodes of {args.env_id}, noise {args.noise:g}: {path}",
            flush=True,
        )
        report = progress(num_episodes)
        steps, returns, greedy = collect(task, num_episodes, args.noise, args.seed, report)
        eval_seed, policy_seed = np.random.SeedSequence((args.seed, 1)).generate_state(2)
        rng = np.random.default_rng(policy_seed)
        header |= {
            "source": "collect_bsuite",
            "noise": args.noise,
            "seed": args.seed,
            "random_return": evaluate(task, lambda _: rng.integers(NUM_ACTIONS), eval_seed),
            "online_return": evaluate(task, greedy, eval_seed),
        }
    header |= {
        "num_episodes": len(returns),
        "num_transitions": len(steps["action"]) - len(returns),
        "mean_return": float(np.mean(returns)),
        "returns": returns,
    }
    try:
        write(path, steps, header, args.overwrite)
    except FileExistsError:
        print(f"{path} was written by another process meanwhile: that one is kept.")
        return
    except OSError as error:
        sys.exit(f"Cannot write {path}: {error.strerror or error}.")
    if not args.from_rlds:
        print_tables(header)
        compare(args, steps)
    print(
        f"{path}: {len(returns)} episodes, {header['num_transitions']} transitions, "
        f"mean return {header['mean_return']:.2f}, {path.stat().st_size / 1e6:.1f} MB "
        f"in {time.time() - started:.0f} s"
    )


def run() -> None:
    """Runs the command line; ends with status 130 when it is stopped."""
    signal.signal(signal.SIGINT, take_signal)
    signal.signal(signal.SIGTERM, take_signal)
    if parent := os.environ.pop("ROSMO_PARENT", None):  # set by what starts this program
        stop.parent = int(parent) if os.name == "posix" else None
    try:
        main(tyro.cli(Args, description=(__doc__ or "").replace("\n", "\n ")))
    except KeyboardInterrupt:
        below_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{below_bar}Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a closed pipe, a full disk
        sys.exit(f"{error}: put that right, then run the same command again.")


if __name__ == "__main__":
    run()
