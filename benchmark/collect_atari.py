# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "ale-py==0.12.1",
#     "filelock==4.3.1",
#     "flax==0.12.8",
#     "gymnasium==1.4.0",
#     "importlib-resources==7.1.0",
#     "jax==0.10.2",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "optax==0.2.8",
#     "tensorflow==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "zstandard==0.25.0",
# ]
# ///
"""Records an Atari dataset: the episodes of an online DQN that learns.

    python benchmark/collect_atari.py --env-id Pong --num-steps 200000

This is how RL Unplugged's data was made (Dopamine's DQN and environment, 50M
steps a run), at a size for a laptop; the flags go up to the original's. The
episodes go to a store that the training scripts read, and with `--format rlu`
also to shards in RL Unplugged's own format. The same command goes on after a
kill: the learner is saved every `--save-every` steps, and at Ctrl-C or
SIGTERM, and the replay memory is filled again from the recorded episodes. The
games that were running start anew, so a collection that was broken off
records other episodes than an unbroken one, which alone is a function of the
seed.

Where it differs from Dopamine's DQN:
1. Several environments are played side by side, and an episode enters the
   replay memory when it has ended. Those that run at the end are not recorded.
2. By default the network is narrower, targets are `n_step` returns, the
   exploration schedule, the target period and the learning rate are fit for
   200 thousand steps instead of 50 million.
3. The optimiser is Adam, as in Dopamine today; that DQN had RMSProp.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

import cv2
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import zstandard
from tqdm import tqdm

from prepare_atari import find_fault, make_env, rom_digest, run, write_store


@dataclasses.dataclass
class Args:
    # data
    env_id: str = "Pong"  # game, by RL Unplugged's name
    num_steps: int = 200_000  # agent steps (of 4 frames) to record; the last episode may exceed it
    num_checkpoints: int = 10
    """parts of the data, of each of which --data-percent takes the first episodes"""
    seed: int = 0  # seed of the network, the exploration, the sampling and the games
    data_dir: str = "data"  # the store is {data_dir}/atari/{env_id}-dqn-{thousands of steps}k
    out: str = ""  # path of the store, instead
    format: Literal["store", "rlu"] = "store"
    """rlu: also write {store}-rlu/atari_episodes_ordered/{env_id}/run_1-*, RL Unplugged's shards"""
    save_every: int = 10_000
    """steps between two saves of the learner, from which a killed collection goes on"""

    # environment
    num_envs: int = 8  # environments side by side
    max_frames: int = 108_000  # frames after which an episode is cut off

    # DQN
    width: float = 0.5  # width of the Nature network, 1 for the original
    learning_rate: float = 2.5e-4  # Adam's learning rate; Dopamine has 6.25e-5
    batch_size: int = 32  # transitions in an update
    discount: float = 0.99  # discount per step
    n_step: int = 3  # rewards in a target before the bootstrap; Dopamine's DQN has 1
    train_every: int = 4  # steps per update
    target_every: int = 2_000  # steps between two copies to the target network; Dopamine has 8000
    replay_size: int = 200_000  # steps in the replay memory, 7 kB each
    replay_start: int = 5_000  # steps before the first update
    epsilon_steps: int = 50_000  # steps over which epsilon falls linearly from 1
    epsilon: float = 0.01  # final exploration


NOT_COMPARED = {"data_dir", "out", "format", "save_every"}  # they change no number of a store
LIMITS = {  # least and greatest value of each number
    "num_steps": (1, 10**9),
    "num_checkpoints": (1, 10**6),
    "seed": (0, 2**64),
    "save_every": (1, 10**9),
    "num_envs": (1, 1024),
    "max_frames": (4, 108_000),
    "width": (1 / 32, 16),
    "learning_rate": (1e-9, 1),
    "batch_size": (1, 10**5),
    "discount": (0, 1),
    "n_step": (1, 100),
    "train_every": (1, 10**9),
    "target_every": (1, 10**9),
    "replay_size": (100, 10**7),
    "replay_start": (1, 10**9),
    "epsilon_steps": (1, 10**9),
    "epsilon": (0, 1),
}


class QNetwork(nn.Module):
    """Nature DQN: stacks uint8 [B, 84, 84, 4] -> values [B, A]."""

    num_actions: int
    width: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x / 255.0
        for features, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            features = int(features * self.width)
            x = nn.relu(nn.Conv(features, (kernel, kernel), stride, padding="VALID")(x))
        x = nn.relu(nn.Dense(int(512 * self.width))(x.reshape(len(x), -1)))
        return nn.Dense(self.num_actions)(x)


class Learner(flax.struct.PyTreeNode):
    params: Any
    target: Any
    opt_state: Any


def optimizer(args: Args) -> optax.GradientTransformation:
    return optax.adam(args.learning_rate, eps=1.5e-4)


@jax.jit(static_argnums=0)
def greedy(network: QNetwork, params: Any, stacks: jax.Array) -> jax.Array:
    return network.apply(params, stacks).argmax(-1)


@jax.jit(static_argnums=(0, 1), donate_argnums=2)
def update(network: QNetwork, tx: Any, learner: Learner, batch: dict) -> Learner:
    """One step on the Huber loss of n-step Q-learning."""
    bootstrap = network.apply(learner.target, batch["next"]).max(-1)
    td_target = batch["return"] + batch["discount"] * bootstrap

    def loss(params):
        q = network.apply(params, batch["stack"])
        q = jnp.take_along_axis(q, batch["action"][:, None], 1)[:, 0]
        return optax.huber_loss(q, td_target).mean()

    gradient = jax.grad(loss)(learner.params)
    updates, opt_state = tx.update(gradient, learner.opt_state, learner.params)
    return learner.replace(params=optax.apply_updates(learner.params, updates), opt_state=opt_state)


class Replay:
    """A ring of whole episodes, one after the other."""

    def __init__(self, size: int):
        self.frames = np.zeros((size, 84, 84), np.uint8)
        self.action, self.reward = np.zeros(size, np.int32), np.zeros(size, np.float32)
        self.is_terminal = np.zeros(size, bool)
        self.age, self.left = np.zeros((2, size), np.int32)  # steps since its start, to its end
        self.added = 0

    def add(self, episode: dict) -> None:
        length = len(episode["action"])
        at = (self.added + np.arange(length)) % len(self.action)
        self.frames[at], self.action[at] = episode["frames"], episode["action"]
        self.reward[at] = np.clip(episode["reward"], -1, 1)
        self.age[at], self.left[at] = np.arange(length), np.arange(length)[::-1]
        self.is_terminal[at] = (self.left[at] == 0) & bool(episode["is_terminal"])
        self.added += length

    def stack(self, at: np.ndarray) -> np.ndarray:
        """[B] -> [B, 84, 84, 4], zeros before the start of an episode."""
        stack = self.frames[(at[:, None] + np.arange(-3, 1)) % len(self.action)]
        stack[np.arange(3, -1, -1) > self.age[at][:, None]] = 0
        return stack.transpose(0, 2, 3, 1)

    def sample(self, rng: np.random.Generator, batch_size: int, n: int, discount: float) -> dict:
        """Transitions over n steps, or fewer at the end of an episode."""
        size = len(self.action)
        oldest, filled = max(0, self.added - size), min(self.added, size)
        # The last n steps are not drawn. The first 3 of a full ring lack their stack, and those in
        # an empty one are an episode's beginning, so that little is lost.
        at = (oldest + rng.integers(3, filled - n, size=4 * batch_size)) % size
        at = at[self.left[at] > 0][:batch_size]  # nothing follows a last step
        k = np.arange(n)
        steps = np.minimum(self.left[at], n)
        rewards = self.reward[(at[:, None] + k) % size] * discount**k
        end = (at + steps) % size
        return {
            "stack": self.stack(at),
            "action": self.action[at],
            "return": np.where(k < steps[:, None], rewards, 0).sum(1).astype(np.float32),
            "discount": np.where(self.is_terminal[end], 0, discount**steps).astype(np.float32),
            "next": self.stack(end),
        }


class Recorder:
    """The episodes so far, one file each, and the learner's last state, in one folder."""

    def __init__(self, folder: Path, args: Args):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "learner").exists():
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=1))
        try:
            before = dict(json.loads((folder / "args.json").read_text()))
        except (ValueError, TypeError):
            raise SystemExit(f"{folder}/args.json is damaged: delete {folder}.") from None
        if any(before.get(k) != v for k, v in vars(args).items() if k not in NOT_COMPARED):
            raise SystemExit(
                f"{folder} has a collection with other arguments that has not ended: give those of "
                "its args.json to go on with it, or delete it."
            )
        self.lengths, self.returns, self.num_steps = [], [], 0

    def add(self, episode: dict) -> None:
        frames = zstandard.ZstdCompressor().compress(episode["frames"].tobytes())
        path = self.folder / f"{len(self.lengths):06d}.npz"
        np.savez(path, **(episode | {"frames": np.frombuffer(frames, np.uint8)}))
        self.count(episode)

    def count(self, episode: dict) -> None:
        self.lengths.append(len(episode["action"]))
        self.num_steps += self.lengths[-1]
        self.returns.append(float(episode["reward"].sum()))

    def read(self, number: int) -> dict:
        with np.load(self.folder / f"{number:06d}.npz") as file:
            episode = dict(file)
        frames = zstandard.ZstdDecompressor().decompress(episode["frames"].tobytes())
        return episode | {"frames": np.frombuffer(frames, np.uint8).reshape(-1, 84, 84)}

    def save(self, learner: Learner) -> None:
        state = {"learner": learner, "num_episodes": len(self.lengths)}
        new = self.folder / "learner.new"
        new.write_bytes(flax.serialization.to_bytes(state))
        new.replace(self.folder / "learner")

    def restore(self, learner: Learner, replay: Replay) -> Learner:
        """The saved learner, if there is one; episodes after it are recorded again."""
        state = {"learner": learner, "num_episodes": 0}
        try:
            if (self.folder / "learner").exists():
                data = (self.folder / "learner").read_bytes()
                state = flax.serialization.from_bytes(state, data)
            for number in range(state["num_episodes"]):
                episode = self.read(number)
                self.count(episode)
                replay.add(episode)
        except (EOFError, ValueError, zipfile.BadZipFile) as error:  # after a crash of the machine
            message = f"{self.folder} is damaged ({error}): delete it and run again."
            raise SystemExit(message) from None
        return jax.tree.map(jnp.asarray, state["learner"])

    def checkpoints(self, num_steps: int) -> list[tuple[int, int]]:
        """(checkpoint, number in it) of each episode; a checkpoint ends when it has num_steps."""
        labels, checkpoint, number, steps = [], 0, 0, 0
        for length in self.lengths:
            labels.append((checkpoint, number))
            number, steps = number + 1, steps + length
            if steps >= num_steps:
                checkpoint, number, steps = checkpoint + 1, 0, 0
        return labels


@contextmanager
def noted_signals() -> Iterator[list]:
    """Notes SIGINT and SIGTERM: JAX may swallow an exception that a signal handler raises."""
    noted, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *_: noted.append(True)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if noted:
        raise KeyboardInterrupt


def collect(args: Args, recorder: Recorder, noted: Sequence = ()) -> None:
    """Plays and learns until `num_steps` are recorded, or a signal is noted."""
    env = make_env(args.env_id, args.num_envs, max_num_frames_per_episode=args.max_frames)
    network, tx = QNetwork(int(env.single_action_space.n), args.width), optimizer(args)
    params = network.init(jax.random.key(args.seed % 2**32), jnp.zeros((1, 84, 84, 4), jnp.uint8))
    replay = Replay(max(args.replay_size, 10 * args.n_step))
    learner = Learner(params, jax.tree.map(jnp.copy, params), tx.init(params))
    learner = recorder.restore(learner, replay)
    step = recorder.num_steps
    saved, recent = step, deque(recorder.returns[-20:], 20)
    # Environment i gets this seed plus i, which must be less than 2**31.
    observations, _ = env.reset(seed=(args.seed * 1_000_003 + step) % (2**31 - args.num_envs))
    playing = [[] for _ in range(args.num_envs)]  # (frame, action, reward) of each running episode
    over = np.zeros(args.num_envs, bool)  # the action of an environment at its end is ignored
    bar = tqdm(
        total=args.num_steps,
        initial=step,
        desc=args.env_id,
        unit="step",
        smoothing=0.05,
        disable=not sys.stderr.isatty(),
    )
    while recorder.num_steps < args.num_steps and not noted:
        rng = np.random.default_rng((args.seed, step))
        learning = max(0, step - args.replay_start)
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * learning / args.epsilon_steps)
        actions = rng.integers(network.num_actions, size=args.num_envs, dtype=np.int32)
        chosen = greedy(network, learner.params, observations.transpose(0, 2, 3, 1))
        actions = np.where(rng.random(args.num_envs) < epsilon, actions, chosen).astype(np.int32)
        frames = [frame.copy() for frame in observations[:, -1]]  # each is kept for itself
        observations, rewards, terminated, truncated, _ = env.step(actions)
        for i in np.flatnonzero(~over):
            playing[i].append((frames[i], actions[i], rewards[i]))
            if terminated[i] or truncated[i]:
                playing[i].append((observations[i, -1].copy(), 0, 0))
                columns = (np.array(column) for column in zip(*playing[i], strict=True))
                episode = dict(zip(("frames", "action", "reward"), columns, strict=True))
                episode |= {"is_terminal": np.array(terminated[i])}
                recorder.add(episode)
                replay.add(episode)
                recent.append(recorder.returns[-1])
                playing[i] = []
        over = terminated | truncated
        before, step = step, step + args.num_envs
        if replay.added >= max(args.replay_start, args.n_step + 32):
            for _ in range(before // args.train_every, step // args.train_every):
                batch = replay.sample(rng, args.batch_size, args.n_step, args.discount)
                learner = update(network, tx, learner, batch)
        if before // args.target_every < step // args.target_every:
            learner = learner.replace(target=jax.tree.map(jnp.copy, learner.params))
        bar.update(min(step, args.num_steps) - bar.n)  # the last episodes may go on beyond
        result = f"return {np.mean(recent):.1f}" if recent else "no episode yet"
        bar.set_postfix_str(result, refresh=False)
        if step - saved >= args.save_every:
            recorder.save(learner)
            saved = step
            if bar.disable:
                line = f"{args.env_id}: {step:,} of {args.num_steps:,} steps, {result}"
                print(line, file=sys.stderr, flush=True)
    recorder.save(learner)


def write_rlu(folder: Path, recorder: Recorder, labels: list[tuple[int, int]], facts: dict) -> None:
    """The recorded episodes as RL Unplugged's shards, one per checkpoint.

    facts: entries of a store's meta.json in which these shards differ from RL Unplugged's.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    kinds = {
        np.int64: lambda x: tf.train.Feature(int64_list=tf.train.Int64List(value=x)),
        np.float32: lambda x: tf.train.Feature(float_list=tf.train.FloatList(value=x)),
        bytes: lambda x: tf.train.Feature(bytes_list=tf.train.BytesList(value=x)),
    }
    folder.mkdir(parents=True)
    (folder / "collector.json").write_text(json.dumps(facts) + "\n")
    num_shards = labels[-1][0] + 1
    for shard, members in itertools.groupby(enumerate(labels), lambda item: item[1][0]):
        path = folder / f"run_1-{shard:05d}-of-{num_shards:05d}"
        with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
            for number, (checkpoint, id) in members:
                episode = recorder.read(number)
                reward, clipped = episode["reward"], np.clip(episode["reward"], -1, 1)
                discounts = np.ones(len(reward))
                discounts[-1] = not episode["is_terminal"]
                pngs = [cv2.imencode(".png", frame)[1].tobytes() for frame in episode["frames"]]
                features = {
                    "checkpoint_idx": kinds[np.int64]([checkpoint]),
                    "episode_idx": kinds[np.int64]([id]),
                    "episode_return": kinds[np.float32]([reward.sum()]),
                    "clipped_episode_return": kinds[np.float32]([clipped.sum()]),
                    "observations": kinds[bytes](pngs),
                    "actions": kinds[np.int64](episode["action"]),
                    "unclipped_rewards": kinds[np.float32](reward),
                    "clipped_rewards": kinds[np.float32](clipped),
                    "discounts": kinds[np.float32](discounts),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a number is out of its range."""
    for name, (least, greatest) in LIMITS.items():
        if not least <= (value := getattr(args, name)) <= greatest:
            flag = name.replace("_", "-")
            raise SystemExit(f"--{flag} is {value}; give {least} to {greatest}.")
    if args.replay_size < (least := args.n_step + 32):
        message = f"--replay-size {args.replay_size} holds no --n-step {args.n_step}"
        raise SystemExit(f"{message}: give at least {least}.")


def main(args: Args) -> None:
    check_args(args)
    if args.format == "rlu" and importlib.util.find_spec("tensorflow") is None:
        raise SystemExit("--format rlu needs the package tensorflow.")
    path = Path(args.out or f"{args.data_dir}/atari/{args.env_id}-dqn-{args.num_steps // 1000}k")
    path = Path(os.path.expanduser(path))
    shards = path.with_name(f"{path.name}-rlu") / "atari_episodes_ordered" / args.env_id
    recorded = path.with_name(f".{path.name}.collecting")
    if path.exists():
        if fault := find_fault(path, args.env_id, "dqn", 100):
            raise SystemExit(f"{path} {fault}.")
        before = json.loads((path / "meta.json").read_text()).get("collector", {})
        compared = before.keys() & vars(args).keys() - NOT_COMPARED
        changed = [k for k in vars(args) if k in compared and before[k] != getattr(args, k)]
        words = ", ".join(f"{k} {before[k]}, not {getattr(args, k)}" for k in changed)
        words = words or ("no shards" if args.format == "rlu" and not shards.exists() else "")
        if words:
            raise SystemExit(f"{path} exists already, with {words}: give another --out.")
        shutil.rmtree(recorded, ignore_errors=True)  # of a collection that was killed at its end
        print(f"{path} exists already: it is complete, there is nothing to collect.")
        return
    steps_per_checkpoint = max(1, args.num_steps // args.num_checkpoints)
    meta = {"env_id": args.env_id, "source": "dqn", "percent": 100}
    meta |= {"steps_per_checkpoint": steps_per_checkpoint, "rom_sha256": rom_digest(args.env_id)}
    meta |= {"num_actions": int(make_env(args.env_id, 1).single_action_space.n)}
    meta |= {"collector": dataclasses.asdict(args)}
    returns = []

    def episodes() -> Iterator[dict]:
        """Plays first; by then this process alone has the store."""
        recorder = Recorder(recorded, args)
        with noted_signals() as noted:
            collect(args, recorder, noted)
        returns.extend(recorder.returns)
        labels = recorder.checkpoints(steps_per_checkpoint)
        for number, (checkpoint, id) in enumerate(labels):
            yield recorder.read(number) | {"checkpoint": checkpoint, "id": id}
        if args.format == "rlu":  # before the store is complete, so that a kill loses no shards
            shutil.rmtree(shards, ignore_errors=True)
            facts = {k: meta[k] for k in ("source", "steps_per_checkpoint", "rom_sha256")}
            write_rlu(shards, recorder, labels, facts)

    write_store(path, meta, episodes())
    shutil.rmtree(recorded, ignore_errors=True)  # another process that waited may delete it, too
    num_steps = json.loads((path / "meta.json").read_text())["num_steps"]
    print(
        f"{path}: {num_steps:,} steps, {len(returns)} episodes, mean return "
        f"{np.mean(returns):.2f} (first 20: {np.mean(returns[:20]):.2f}, last 20: "
        f"{np.mean(returns[-20:]):.2f}), {(path / 'frames.bin').stat().st_size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    run(main, tyro.cli(Args, description=(__doc__ or "").replace("\n", "\n ")))
