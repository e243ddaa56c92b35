# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "ale-py==0.12.1", "filelock==4.3.1", "gymnasium==1.4.0", "importlib-resources==7.1.0",
#   "numpy==2.4.6", "opencv-python-headless==5.0.0.93", "tensorflow==2.21.0",
#   "tensorflow-datasets==4.9.10", "tqdm==4.70.1", "tyro==1.0.17", "zstandard==0.25.0",
#   "flax==0.12.8", "jax==0.10.2", "optax==0.2.8",  # of collect_atari.py, the fall-back
# ]
# ///
"""Makes the Atari scripts' data: RL Unplugged, or DQN Replay, as a store.

    python benchmark/prepare_atari.py --env-id MsPacman --percent 10
    python benchmark/prepare_atari.py --env-id MsPacman --rlu-prefix rlu
    python benchmark/prepare_atari.py --env-id MsPacman --dqn-replay dqn

The first streams RL Unplugged, the others read a copy of it in the folder
rlu, and a copy of DQN Replay. Shards are imported in parallel, and each
finished one is kept: after a kill or a lost connection the same command goes
on with the others. Without a connection and without a store, collect_atari.py
records a small dataset instead. docs/atari_data.md has the format; data of
your own become a store with `write_store`.
"""

import contextlib
import dataclasses
import difflib
import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

try:
    import cv2
    import filelock
    import numpy as np
    import tyro
    import zstandard
    from ale_py import roms
    from ale_py.vector_env import AtariVectorEnv
    from tqdm import tqdm
except ModuleNotFoundError as error:  # of a script's environment, in which it trains
    command = f"uv run {shlex.join(sys.argv)}"
    raise SystemExit(f"There is no {error.name} here to make data with; run: {command}") from None


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str  # game, by RL Unplugged's name
    rlu_run: int = 1  # run of the online DQN, 1 to 5
    percent: float = 100.0  # of each checkpoint, the episodes that start in this part of its steps
    data_dir: Path = Path("data")  # the store is {data_dir}/atari/{env_id}-run{run}-{percent}pct
    out: Path | None = None  # path of the store, instead
    rlu_prefix: str = "gs://rl_unplugged"  # bucket or folder with RL Unplugged's raw shards
    tfds_dir: Path | None = None  # TFDS folder with RL Unplugged; None: TFDS's own, if there
    dqn_replay: Path | None = None  # folder of the DQN Replay dataset, {env_id}/{run}/replay_logs
    workers: int | None = None  # processes, each of about 0.9 GB; None: one for each core


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


# --- end environment ---


def rom_digest(env_id: str) -> str:
    """SHA-256 of the ROM that is played here."""
    return hashlib.sha256(Path(roms.get_rom_path(game_name(env_id))).read_bytes()).hexdigest()


STORE_VERSION = 2
CHUNK = 16  # consecutive frames that are compressed together
STEP = np.dtype(
    [("action", "u1"), ("reward", "f4"), ("is_last", "?"), ("is_terminal", "?"), ("age", "u2")]
)
EPISODE = np.dtype(
    [("checkpoint", "i8"), ("id", "i8"), ("start", "i8"), ("length", "i8"), ("return", "f4")]
)
FIELDS = ("frames", "action", "reward", "is_terminal", "checkpoint", "id")  # of an episode
META = ("env_id", "source", "percent", "num_actions", "steps_per_checkpoint", "rom_sha256")
STEPS_PER_CHECKPOINT = 1_000_000  # RL Unplugged's
SHARDS = (49, 50)  # of a run of RL Unplugged, one a checkpoint
LOCAL_STEPS = 200_000  # collected when RL Unplugged cannot be reached
MAX_STEPS = 27_000  # where Dopamine cuts an episode off
RETRY_WAITS = (5, 30)  # seconds before the second and the third try
FULL = (errno.ENOSPC, errno.EDQUOT)
COUNTER: Any = None  # steps imported by all workers, for the progress bar


class StoreWriter:
    """Writes the files of a store, or of a part of one, into a new folder."""

    def __init__(self, folder: Path, num_actions: int):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.folder, self.num_actions = folder, num_actions
        self.blob, self.blob_crc32 = open(folder / "frames.bin", "wb"), 0
        self.compressor = zstandard.ZstdCompressor(level=3)
        self.rest = np.empty((0, 84, 84), np.uint8)  # frames that do not fill a chunk yet
        self.offsets, self.steps, self.episodes = [0], [], []
        self.rows = self.num_steps = 0  # with and without padding

    def add(self, frames, action, reward, is_terminal, checkpoint=0, id=None) -> None:
        """One episode, as `write_store` describes it."""
        frames, action, reward = np.asarray(frames), np.asarray(action), np.asarray(reward)
        check_episode(frames, action, reward, is_terminal, self.num_actions)
        for name, number in (("checkpoint", checkpoint), ("id", 0 if id is None else id)):
            if np.ndim(number) or np.asarray(number).dtype.kind not in "iu":
                raise ValueError(f"{name} is {number!r}; it must be an integer.")
        last = self.episodes[-1] if self.episodes else (checkpoint, -1)
        if checkpoint < last[0]:
            raise ValueError(f"checkpoint {checkpoint} comes after {last[0]}; sort the episodes.")
        if checkpoint > last[0]:
            self._pad()
            last = (checkpoint, -1)
        length = len(frames)
        steps = np.zeros(length, STEP)
        steps["action"][:-1], steps["reward"] = action[:-1], reward
        steps["is_last"][-1], steps["is_terminal"][-1] = True, is_terminal
        steps["age"] = np.minimum(np.arange(length), 65535)
        total = reward.sum(dtype=np.float64)
        id = last[1] + 1 if id is None else id
        self.episodes.append((checkpoint, id, self.rows, length, total))
        self.num_steps += length
        self._write(steps, frames)

    def append(self, part: Path) -> None:
        """All that another writer has put into the folder `part`."""
        episodes, offsets = np.load(part / "episodes.npy"), np.load(part / "frames_offsets.npy")
        with open(part / "frames.bin", "rb") as blob:
            while data := blob.read(1 << 24):
                self._write_blob(data)
        self.offsets += (offsets[1:] + self.offsets[-1]).tolist()
        self.steps.append(np.load(part / "steps.npy"))
        self.num_steps += int(episodes["length"].sum())
        episodes["start"] += self.rows
        self.episodes += episodes.tolist()
        self.rows += len(self.steps[-1])

    def finish(self, meta: dict | None = None) -> None:
        """Ends the files. meta: that of a whole store; its file comes last."""
        self._pad()
        self.blob.close()
        crc32 = {"frames.bin": self.blob_crc32}
        for name, array in (
            ("frames_offsets.npy", np.array(self.offsets, np.int64)),
            ("steps.npy", np.concatenate([np.empty(0, STEP), *self.steps])),
            ("episodes.npy", np.array(self.episodes, EPISODE)),
        ):
            np.save(data := io.BytesIO(), array)  # np.save into a file hides that a disk is full
            (self.folder / name).write_bytes(data.getbuffer())
            crc32[name] = zlib.crc32(data.getbuffer())
        if meta is not None:
            counts = {"num_steps": self.num_steps, "num_episodes": len(self.episodes)}
            meta = {"version": STORE_VERSION} | meta | counts | {"crc32": crc32}
            (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def _pad(self) -> None:
        """Zeros up to the end of the chunk, since each checkpoint starts with a chunk."""
        missing = -self.rows % CHUNK
        self._write(np.zeros(missing, STEP), np.zeros((missing, 84, 84), np.uint8))

    def _write(self, steps: np.ndarray, frames: np.ndarray) -> None:
        self.steps.append(steps)
        self.rows += len(steps)
        while len(frames):
            room = CHUNK - len(self.rest)
            self.rest, frames = np.concatenate([self.rest, frames[:room]]), frames[room:]
            if len(self.rest) == CHUNK:
                data = self.compressor.compress(self.rest.tobytes())
                data += zlib.crc32(data).to_bytes(4, "little")
                self._write_blob(data)
                self.offsets.append(self.offsets[-1] + len(data))
                self.rest = self.rest[:0]

    def _write_blob(self, data: bytes) -> None:
        self.blob.write(data)
        self.blob_crc32 = zlib.crc32(data, self.blob_crc32)


def is_whole(part: Path) -> bool:
    """Whether the folder has all that was written to it; a crash of the machine may lose some."""
    try:
        names = ("steps.npy", "episodes.npy", "frames_offsets.npy")
        arrays = [np.load(part / name) for name in names]
        return (part / "frames.bin").stat().st_size == arrays[-1][-1]
    except (OSError, ValueError, EOFError):
        return False


def check_episode(frames, action, reward, is_terminal, num_actions: int) -> None:
    """Raises a ValueError of one sentence for an episode that is not as `write_store` asks."""
    if frames.dtype != np.uint8 or frames.ndim != 3 or frames.shape[1:] != (84, 84):
        shape = list(frames.shape)
        raise ValueError(f"frames are {frames.dtype} {shape}; they must be uint8 [T, 84, 84].")
    if len(frames) < 2:
        raise ValueError(f"an episode has {len(frames)} states; it must have 2 at least.")
    for name, array, kinds in (("action", action, "iu"), ("reward", reward, "iuf")):
        if array.shape != (len(frames),) or array.dtype.kind not in kinds:
            wanted = f"{'integers' if name == 'action' else 'numbers'} [{len(frames)}]"
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; it must be {wanted}.")
    used = action[:-1]
    if not 0 <= (wrong := used.min()) or not (wrong := used.max()) < num_actions:
        raise ValueError(f"action {wrong} is not one of 0 to {num_actions - 1}: another game?")
    if not (np.abs(reward) <= np.finfo(np.float32).max).all():
        raise ValueError("reward has a number that float32 does not hold, or NaN.")
    if reward[-1] != 0:
        raise ValueError("the last reward is not 0; the last row is the state after the last one.")
    if np.ndim(is_terminal) or bool(is_terminal) != is_terminal:
        raise ValueError(f"is_terminal is {is_terminal!r}; it must be True or False.")


def check_meta(meta: dict) -> None:
    if missing := [name for name in META if name not in meta]:
        raise ValueError(f"meta lacks {', '.join(missing)}.")
    try:
        json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"meta must be of Python's own types: {error}.") from None
    for name in ("env_id", "source"):
        if not isinstance(meta[name], str):
            raise ValueError(f"{name} is {meta[name]!r}; it must be a text.")
    for name in ("num_actions", "percent", "steps_per_checkpoint"):
        if not isinstance(meta[name], (int, float)):
            raise ValueError(f"{name} is {meta[name]!r}; it must be a number.")
    if not 1 <= meta["num_actions"] <= 256 or not isinstance(meta["num_actions"], int):
        raise ValueError(f"num_actions is {meta['num_actions']}; it must be an integer, 1 to 256.")
    if not 0 < meta["percent"] <= 100:
        raise ValueError(f"percent is {meta['percent']}; it must be above 0 and at most 100.")
    if not meta["steps_per_checkpoint"] >= 1:
        raise ValueError(f"steps_per_checkpoint is {meta['steps_per_checkpoint']}; 1 at least.")


def write_store(path: Path, meta: dict, episodes: Iterable[dict]) -> None:
    """Builds the store `path`, or nothing if an error comes: the way for data of your own.

    Each episode has T states, T - 1 actions and rewards, T >= 2:
      frames       uint8 [T, 84, 84], grey, one per step of 4 emulator frames
      action       integers [T], what followed each frame; the last one is not used
      reward       numbers [T], what followed each action, not clipped; the last one is 0
      is_terminal  True if the last frame is a terminal state, False if the play was cut off there
      checkpoint   the part of the data it is from, 0 by default; episodes come in its order
      id           its number in the checkpoint, counted from 0 by default
    `meta` has env_id, source (a name for the data), percent (100), num_actions (ALE's minimal
    set), steps_per_checkpoint (of which --data-percent takes a part) and rom_sha256 (or None).
    A ValueError says in one sentence what is wrong.
    """
    check_meta(meta)
    with building(Path(path)) as folder:
        if any(folder.glob("part-?????")):
            message = f"{folder} holds parts of an import: choose another path"
            raise SystemExit(f"{message}, or delete that folder.")
        try:
            writer = StoreWriter(folder / "store", meta["num_actions"])
            for episode in episodes:
                if not isinstance(episode, Mapping):
                    raise ValueError(f"an episode is a {type(episode).__name__}, not a dict.")
                if not {*FIELDS[:4]} <= episode.keys() <= {*FIELDS}:
                    wanted = f"{', '.join(FIELDS[:4])}, and may have {' and '.join(FIELDS[4:])}"
                    raise ValueError(f"an episode has {', '.join(episode)}; it must have {wanted}.")
                writer.add(**episode)
            if not writer.episodes:
                raise ValueError("there are no episodes.")
            writer.finish(meta)
            writer.folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Busy(SystemExit):
    """Another process builds the store at `path` and holds the lock, or has just built it."""

    def __init__(self, message: str, path: Path, lock: Path):
        super().__init__(message)
        self.path, self.lock = path, lock


@contextlib.contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yields the hidden folder beside `path` that its store is built in; no one else has it."""
    lock = path.with_name(f".{path.name}.lock")
    folder = path.with_name(f".{path.name}.building")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=0):
            try:
                if path.exists():
                    raise Busy(f"{path} exists already: choose another path.", path, lock)
                folder.mkdir(exist_ok=True)
                yield folder
            finally:
                remove(lock)
    except filelock.Timeout:
        message = f"Another process is building {path}: run again when it is done."
        raise Busy(message, path, lock) from None
    except OSError as error:
        raise SystemExit(f"{path} was not built: {why(error)}") from None


def remove(lock: Path) -> None:
    """Of a lock that is held; Windows lets no one, and removes it when it is given back."""
    with contextlib.suppress(PermissionError):
        lock.unlink(missing_ok=True)


def why(error: OSError) -> str:
    if error.errno in FULL:
        return "the disk is full; free some space or choose another folder."
    return f"{error}."


def find_fault(path: Path, env_id: str, source: str, percent: float) -> str | None:
    """Why `path` does not serve `percent` of this data, or None if it does. Reads no frames."""
    if not any((path / name).exists() for name in ("meta.json", "frames.bin")):
        return "is no store; choose another path"
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["version"] != STORE_VERSION:
            return f"is of format {meta['version']}; choose another path"
        if (meta["env_id"], meta["source"]) != (env_id, source) or meta["percent"] < percent:
            content = f"{meta['percent']:g}% of {meta['env_id']}-{meta['source']}"
            return f"is {content}, not {percent:g}% of {env_id}-{source}; choose another path"
        for name in ("frames_offsets.npy", "steps.npy", "episodes.npy"):
            if zlib.crc32(np.memmap(path / name, np.uint8, "r")) != meta["crc32"][name]:
                return f"has a damaged {name}; delete it and run again"
        if (path / "frames.bin").stat().st_size != np.load(path / "frames_offsets.npy")[-1]:
            return "has a damaged frames.bin; delete it and run again"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"is no whole store ({error}); delete it and run again, or choose another path"
    return None


# Readers: each yields the episodes of one shard, as `write_store` describes them.


def read_rlu(prefix: str, env_id: str, run: int, shard: str) -> Iterator[dict]:
    """A raw shard of RL Unplugged, through the parser of TFDS's builder."""
    tfds = import_tfds()
    builder_cls = tfds.builder_cls("rlu_atari_checkpoints_ordered")
    builder = builder_cls(config=f"{env_id}_run_{run}")
    file = f"{prefix}/atari_episodes_ordered/{env_id}/{shard}"
    yield from (e for _, episode in builder.generate_examples_one_file(file) for e in rlds(episode))


def read_tfds(prepared: Path, shard: str) -> Iterator[dict]:
    """A split of RL Unplugged that TFDS has prepared."""
    tfds = import_tfds()
    dataset = tfds.builder_from_directory(prepared).as_dataset(
        split=shard,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),  # keeps the order
    )
    yield from (e for episode in tfds.as_numpy(dataset) for e in rlds(episode))


def rlds(episode: dict) -> Iterator[dict]:
    """An RLDS episode, whose last action and reward are void; none if it has a single state."""
    steps = episode["steps"]
    if len(steps["action"]) < 2:
        return
    pngs = (np.frombuffer(png, np.uint8) for png in steps["observation"])
    frames = [cv2.imdecode(png, cv2.IMREAD_UNCHANGED) for png in pngs]
    if any(frame is None or frame.shape != (84, 84) for frame in frames):
        raise ValueError("a frame is not an 84 x 84 grey PNG: it is damaged")
    yield {
        "frames": np.stack(frames),
        "action": steps["action"],
        "reward": np.append(steps["reward"][:-1], np.float32(0)),
        "is_terminal": bool(steps["is_terminal"][-1]),
        "checkpoint": int(episode["checkpoint_id"]),
        "id": int(episode["episode_id"]),
    }


def import_tfds() -> Any:
    """TFDS, with a TensorFlow that sees no GPU and does not say so."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("NO_GCE_CHECK", "true")  # the bucket is public
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds

        tf.config.set_visible_devices([], "GPU")
    except ImportError as error:
        message = "RL Unplugged's files need the packages tensorflow and tensorflow-datasets"
        raise SystemExit(f"{message}: {error}.") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return tfds


def read_dqn_replay(logs: Path, shard: str) -> Iterator[dict]:
    """One file of each kind of the DQN Replay dataset: Dopamine's replay memory, once full.

    A row is (frame, action, reward, terminal), and the state after an episode's last action is not
    in it. It is taken to look like the state before: a row with that frame again ends the episode,
    so that no action and no reward is lost. `terminal` also stands where Dopamine's limit of 27,000
    steps cut an episode off; one of that length is not terminal here. Where a file begins or ends
    in the midst of an episode, each piece is an episode; the first piece is cut off, and its last
    action and reward, whose next state is in another file, are void. Left out are the blank rows
    (three at most) that Dopamine puts before an episode, and rows beyond `add_count`, which are of
    another file. The rewards are clipped to -1..1: the agent recorded them so.
    """

    def load(kind: str) -> np.ndarray:
        with gzip.open(logs / f"{kind}_{shard}") as file:
            return np.load(file)

    action, reward, terminal = (load(f"$store$_{k}") for k in ("action", "reward", "terminal"))
    num_rows = int(load("add_count")) % len(action) or len(action)
    ends = np.flatnonzero(terminal[:num_rows]) + 1
    with gzip.open(logs / f"$store$_observation_{shard}") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (len(action), 84, 84) or dtype != np.uint8:
            raise ValueError(f"observation is {dtype} {list(shape)}, action {list(action.shape)}")
        bounds = np.unique([0, *ends, num_rows])
        for id, (start, end) in enumerate(pairwise(bounds.tolist())):
            data = file.read((end - start) * 84 * 84)
            if len(data) < (end - start) * 84 * 84:
                raise EOFError
            frames = np.frombuffer(data, np.uint8).reshape(-1, 84, 84)
            rows = slice(start, end)
            blank = ~frames[:3].any((1, 2)) & (action[rows][:3] == 0) & (reward[rows][:3] == 0)
            skip = 3 if blank.all() else int(blank.argmin())
            frames, rows = frames[skip:], slice(start + skip, end)
            ended, length = bool(terminal[end - 1]), len(frames)
            if ended and length:
                frames = np.concatenate([frames, frames[-1:]])
            if len(frames) >= 2:
                yield {
                    "frames": frames,
                    "action": np.append(action[rows], 0)[: len(frames)],
                    "reward": np.append(reward[rows][: len(frames) - 1], np.float32(0)),
                    "is_terminal": ended and length < MAX_STEPS,
                    "checkpoint": int(shard.split(".")[1]),
                    "id": id,
                }
        while file.read(1 << 24):  # to the end, where the checksum is
            pass


# Import: shards in parallel, each into a part that is kept.


def import_shard(read: Callable, shard: str, part: Path, limit: float, num_actions: int) -> str:
    """Writes a shard's episodes to the folder `part`, until they hold `limit` steps."""
    for pause in (*RETRY_WAITS, None):
        writer = None
        try:
            writer = StoreWriter(part.with_suffix(".unfinished"), num_actions)
            for episode in read(shard):
                writer.add(**episode)
                count(len(episode["action"]))
                if writer.num_steps >= limit:
                    break
            if not writer.episodes:
                message = f"{shard} has no episodes: it is damaged or was not fully copied."
                raise SystemExit(message)
            writer.finish()
            writer.folder.rename(part)
            return f"{shard}: {writer.num_steps:,} steps, {len(writer.episodes):,} episodes"
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__}  # without importing TensorFlow
            text = str(error).split("\n")[0]
            if names & {"FileNotFoundError", "NotFoundError"}:
                raise SystemExit(f"{shard} is not where it should be: {text}") from None
            damaged = {"DataLossError", "BadGzipFile", "EOFError", "error"}
            if names & damaged:
                raise SystemExit(f"{shard} is damaged: copy it again.") from None
            if isinstance(error, ValueError):
                raise SystemExit(f"{shard} cannot be used: {str(error).rstrip('.')}.") from None
            if isinstance(error, OSError) and error.errno in FULL:
                raise SystemExit(f"{part.parent} is kept as it is: {why(error)}") from None
            if not names & {"OpError", "OSError"}:
                raise
            if pause is None:
                raise SystemExit(f"{shard} cannot be read: {text}") from None
            print(f"{shard}: {text}; next try in {pause} s", file=sys.stderr, flush=True)
            count(-writer.num_steps if writer else 0)
            time.sleep(pause)


def count(steps: int) -> None:
    if COUNTER:
        with COUNTER.get_lock():
            COUNTER.value += steps


def start_worker(parent: int, counter: Any) -> None:
    global COUNTER
    COUNTER = counter
    end_with(parent)
    cv2.setNumThreads(1)


def end_with(parent: int) -> None:
    """Ends this process soon after the process `parent`, which has started it, is gone."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def import_store(
    path: Path, meta: dict, read: Callable, shards: list[str], workers: int | None
) -> None:
    """Builds a store of `shards`, put in the order of checkpoints; goes on with a broken one."""
    limit = meta["percent"] / 100 * meta["steps_per_checkpoint"]
    limit = limit if meta["percent"] < 100 else float("inf")
    with building(path) as folder:
        plan = json.dumps({"meta": meta, "shards": shards})
        if not any(part.suffix == "" for part in folder.glob("part-*")):  # finished ones
            (folder / "plan.json").write_text(plan)
        elif (folder / "plan.json").read_text() != plan:
            message = f"{folder} holds parts of an import with other arguments"
            raise SystemExit(f"{message}: give those again, or delete that folder.")
        parts = [folder / f"part-{i:05d}" for i in range(len(shards))]
        for part in parts:
            if part.exists() and not is_whole(part):
                shutil.rmtree(part)
        tasks = [
            (read, shard, part, limit, meta["num_actions"])
            for shard, part in zip(shards, parts, strict=True)
            if not part.exists()
        ]
        kept = [np.load(part / "episodes.npy")["length"].sum() for part in parts if part.exists()]
        bar = tqdm(
            total=int(min(limit, meta["steps_per_checkpoint"]) * len(shards)),
            initial=int(sum(kept)),
            unit="step",
            unit_scale=True,
            desc=path.name,
            disable=not sys.stderr.isatty(),
        )
        start = time.time()
        with bar, contextlib.closing(run_tasks(tasks, workers, bar)) as lines:
            for i, line in enumerate(lines, len(kept) + 1):
                if bar.disable:
                    progress = f"{i} of {len(shards)} shards, {time.time() - start:.0f} s"
                    print(f"{path.name}: {line} ({progress})", file=sys.stderr, flush=True)
        checkpoints = {part: np.load(part / "episodes.npy")["checkpoint"] for part in parts}
        parts.sort(key=lambda part: checkpoints[part].min())
        if (np.diff(np.concatenate([checkpoints[part] for part in parts])) < 0).any():
            message = f"The episodes of {path.name}'s shards are not in the order of checkpoints"
            raise SystemExit(f"{message}: a shard must not begin before another ends.")
        writer = StoreWriter(folder / "store", meta["num_actions"])
        for part in parts:
            writer.append(part)
        writer.finish(meta)
        writer.folder.rename(path)
        shutil.rmtree(folder, ignore_errors=True)  # another start may find the store and do so, too
    size = (path / "frames.bin").stat().st_size
    print(
        f"{path}: {writer.num_steps:,} steps, {len(writer.episodes):,} episodes, "
        f"{size / 1e6:,.0f} MB, {size / writer.num_steps:.0f} bytes a frame"
    )


def run_tasks(tasks: list[tuple], workers: int | None, bar: tqdm) -> Iterator[str]:
    """import_shard(*task) for each task, in processes; yields their results as they come."""
    if not tasks:
        return
    context, first, pending = multiprocessing.get_context("spawn"), bar.n, set()
    counter = context.Value("q", 0)
    options = dict(mp_context=context, initializer=start_worker, initargs=(os.getpid(), counter))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(min(workers or cores, len(tasks)), **options) as pool:
        try:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what the processes inherit
            pending = {pool.submit(import_shard, *task) for task in tasks}
            signal.signal(signal.SIGINT, handler)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(first + counter.value - bar.n)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            message = "A worker was killed; is there too little memory? The same command goes on."
            raise SystemExit(message) from None
        finally:
            if pending:  # an error or Ctrl-C: wait for no shard
                for process in multiprocessing.active_children():
                    process.kill()


# Sources: the reader, the names of the shards, and the name of the source.


def shard_folder(args: Args) -> Path:
    """Where the shards of --rlu-prefix lie, if it is a folder."""
    return Path(os.path.expanduser(args.rlu_prefix)) / "atari_episodes_ordered" / args.env_id


def find_source(args: Args) -> tuple[Callable, list[str]] | None:
    """The reader of the data that `args` ask for and the names of its shards; None: no source."""
    env_id, run, prefix = args.env_id, args.rlu_run, args.rlu_prefix
    if args.dqn_replay:
        logs = args.dqn_replay / env_id / str(run) / "replay_logs"
        pattern = r"\$store\$_observation_ckpt\.(\d+)\.gz"
        numbers = sorted(int(m[1]) for m in match_names(logs, pattern))
        check_complete(logs, numbers, range(numbers[-1] + 1), "$store$_observation_ckpt.{}.gz")
        if len(numbers) < min(SHARDS):
            whole = f"a whole run has {min(SHARDS)} or more"
            print(f"{logs} has {len(numbers)} checkpoints; {whole}.", file=sys.stderr)
        return partial(read_dqn_replay, logs), [f"ckpt.{number}.gz" for number in numbers]
    tfds_dir = args.tfds_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    prepared = Path(os.path.expanduser(tfds_dir)) / "rlu_atari_checkpoints_ordered"
    # Beside the versions there may be folders incomplete.* of a preparation that was broken off.
    prepared = max(prepared.glob(f"{env_id}_run_{run}/[0-9]*.*.*/"), default=None)
    if prepared and (args.tfds_dir or prefix == Args.rlu_prefix):
        splits = import_tfds().builder_from_directory(prepared).info.splits
        return partial(read_tfds, prepared), sorted(splits)
    if args.tfds_dir:
        raise SystemExit(f"{tfds_dir} has no rlu_atari_checkpoints_ordered/{env_id}_run_{run}.")
    if not prefix.startswith("gs://"):
        prefix, folder = os.path.expanduser(prefix), shard_folder(args)
        matches = match_names(folder, rf"run_{run}-(\d+)-of-(\d+)")
        totals = {m[2] for m in matches}
        if len(totals) > 1:
            raise SystemExit(f"{folder} has shards of {' and of '.join(sorted(totals))}.")
        names, total = {int(m[1]): m[0] for m in matches}, totals.pop()
        local = int(total) not in SHARDS or (folder / "collector.json").exists()
        if local and not args.out:
            message = f"{folder} is not RL Unplugged's, of 50 shards, but other data"
            raise SystemExit(f"{message}; give its store a path of its own with --out.")
        if local and args.percent < 100:
            message = f"{folder} is not RL Unplugged's"
            raise SystemExit(f"{message}: import all of it, without --percent.")
        name = f"run_{run}-{{:0{len(total)}d}}-of-{total}"
        check_complete(folder, names, range(int(total)), name)
        return partial(read_rlu, prefix, env_id, run), [names[i] for i in sorted(names)]
    if not can_reach_rlu():
        return None
    builder_cls = import_tfds().builder_cls("rlu_atari_checkpoints_ordered")
    if f"{env_id}_run_{run}" not in builder_cls.builder_configs:
        raise SystemExit(f"RL Unplugged has no {env_id}.")
    n = builder_cls(config=f"{env_id}_run_{run}").num_shards()
    shards = [f"run_{run}-{i:05d}-of-{n:05d}" for i in range(n)]
    return partial(read_rlu, prefix, env_id, run), shards


def match_names(folder: Path, pattern: str) -> list[re.Match]:
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    matches = [m for name in names if (m := re.fullmatch(pattern, name))]
    if not matches:
        name = pattern.replace(r"(\d+)", "*").replace("\\", "")
        raise SystemExit(f"There are no files {name} in {folder}.")
    return matches


def check_complete(folder: Path, found: Iterable[int], wanted: range, name: str) -> None:
    if missing := [name.format(i) for i in wanted if i not in set(found)]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}: copy what is missing.")


def can_reach_rlu() -> bool:
    """False, and the reason on stderr, without a connection to the published data."""
    url = "https://storage.googleapis.com/rl_unplugged"
    try:
        urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError:  # an answer all the same
        return True
    except Exception as error:  # also of a proxy's address that is none
        print(f"{url}: {getattr(error, 'reason', error)}", file=sys.stderr)
        return False
    return True


def fall_back(args: Args) -> None:
    """Without RL Unplugged, a small online DQN records data under a name of their own."""
    path = args.data_dir / "atari" / f"{args.env_id}-dqn-{LOCAL_STEPS // 1000}k"
    print(
        f"RL Unplugged cannot be reached: this is NOT the paper's data but {path}, {LOCAL_STEPS:,} "
        "steps of a small online DQN. For the paper's data, run again with a connection, or copy "
        f"gs://rl_unplugged/atari_episodes_ordered/{args.env_id}/run_{args.rlu_run}-* (gsutil -m "
        f"cp) into FOLDER/atari_episodes_ordered/{args.env_id}/ and add --rlu-prefix FOLDER.",
        flush=True,
    )
    if not path.exists():
        collector = Path(__file__).with_name("collect_atari.py")
        if not collector.exists():
            raise SystemExit(f"There is no {collector} to collect data with: get them as above.")
        command = [sys.executable, str(collector), "--env-id", args.env_id]
        command += ["--num-steps", str(LOCAL_STEPS), "--out", str(path)]
        # On the CPU, since a script that has started this tool may hold the accelerator.
        changes = {"JAX_PLATFORMS": "cpu", "ROSMO_PARENT": str(os.getpid())}
        if status := subprocess.run(command, env=os.environ | changes).returncode:
            killed = f"{collector} was killed; is there too little memory?"
            raise SystemExit(status if status > 0 else killed)  # else it has said why
    if fault := find_fault(path, args.env_id, "dqn", args.percent):
        raise SystemExit(f"{path} {fault}.")


def main(args: Args) -> None:
    """Sees to it that the store that `args` ask for is there, or ends in one sentence."""
    paths = {k: Path(os.path.expanduser(v)) for k, v in vars(args).items() if isinstance(v, Path)}
    args = dataclasses.replace(args, **paths)
    num_actions = int(make_env(args.env_id, 1).single_action_space.n)
    if not 0 < args.percent <= 100:
        raise SystemExit(f"--percent is {args.percent}; it must be above 0 and at most 100.")
    if not 1 <= args.rlu_run <= 5:
        raise SystemExit(f"--rlu-run is {args.rlu_run}; RL Unplugged has the runs 1 to 5.")
    if args.workers is not None and args.workers < 1:
        raise SystemExit(f"--workers is {args.workers}; give at least 1.")
    given = [x for x in ("tfds_dir", "dqn_replay") if getattr(args, x)]
    given += ["rlu_prefix"] * (args.rlu_prefix != Args.rlu_prefix)
    if len(given) > 1:
        flags = " and ".join(f"--{x.replace('_', '-')}" for x in given)
        raise SystemExit(f"{flags} name several sources: give one.")
    collected = shard_folder(args) / "collector.json"  # what collect_atari.py says of its shards
    try:
        facts = {**json.loads(collected.read_text())} if collected.exists() else {}
    except (ValueError, TypeError):
        raise SystemExit(f"{collected} is damaged: put it back, or collect again.") from None
    source = facts.get("source", f"{'replay' if args.dqn_replay else 'run'}{args.rlu_run}")
    folder, start = args.data_dir / "atari", f"{args.env_id}-{source}-"
    percent = np.format_float_positional(args.percent, trim="-")
    path = args.out or folder / f"{start}{percent}pct"
    for store in [path] if args.out else [path, *sorted(folder.glob(f"{start}*pct"))]:
        if store.exists():  # the first part of a larger one is the same data
            fault = find_fault(store, args.env_id, source, args.percent)
            if not fault:
                parts = store.with_name(f".{store.name}.building")
                shutil.rmtree(parts, ignore_errors=True)  # a kill may have left them
                print(f"{store} is there already.")
                return
            if store == path:
                raise SystemExit(f"{store} {fault}.")
    found = find_source(args)
    if found:
        meta = {"env_id": args.env_id, "source": source, "percent": args.percent}
        meta |= {"num_actions": num_actions, "steps_per_checkpoint": STEPS_PER_CHECKPOINT}
        import_store(path, meta | {"rom_sha256": None} | facts, *found, args.workers)
    elif args.out or path.with_name(f".{path.name}.building").exists():
        raise SystemExit("RL Unplugged cannot be reached: run again with a connection.")
    else:
        fall_back(args)


def run(main: Callable, args: Any) -> None:
    """main(args) as a program: a signal or a fault of the disk ends it in one sentence."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    parent = os.environ.pop("ROSMO_PARENT", None)  # set by what starts this program
    if parent and os.name == "posix":
        end_with(int(parent))
    try:
        while True:
            try:
                main(args)
                break
            except Busy as busy:  # of several runs that lack one store, one makes it
                if not parent:
                    raise
                print("Another process is building the store: waiting for it.", flush=True)
                with filelock.FileLock(busy.lock):  # then it is there, or goes on from its parts
                    if busy.path.exists():  # and no one needs the lock any more
                        remove(busy.lock)
        print(end="", flush=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("Stopped; the same command goes on with what is finished.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"That did not work: {why(error)}") from None


if __name__ == "__main__":
    run(main, tyro.cli(Args, description=(__doc__ or "").replace("\n", "\n ")))
