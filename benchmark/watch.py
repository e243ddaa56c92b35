# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "ale-py==0.12.1", "filelock==4.3.1", "flax==0.12.8", "gymnasium==1.4.0", "jax==0.10.2",
#   "matplotlib==3.11.2", "mctx==0.0.71", "numpy==2.4.6", "opencv-python-headless==5.0.0.93",
#   "optax==0.2.8", "tqdm==4.70.1", "tyro==1.0.17", "zstandard==0.25.0",
# ]
# ///
"""Plays an episode with the agent of an Atari run and writes video.mp4.

python benchmark/watch.py runs/rosmo_atari/MsPacman/seed0
python benchmark/watch.py runs/rosmo_atari/MsPacman/seed0 --greedy --seed 3
"""

import importlib.util
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # one frame at a time is no work for an accelerator
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import jax
import numpy as np
import tyro
from flax import serialization
from flax.errors import FlaxError


@dataclass(frozen=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]  # folder of the run
    greedy: bool = False  # take the most probable action
    seed: int = 0  # seed of the game and of the actions
    max_frames: int = 108_000  # frames of the game after which the episode is cut off
    out: Path | None = None  # file to write instead of video.mp4 in the run's folder


def load_agent(run: Path) -> tuple[ModuleType, str, Callable]:
    """The script of a run, its game, and its agent as of the last checkpoint.

    The agent is act(observations, key, greedy): uint8 [E, 84, 84, 4] and a key -> actions [E].
    """
    try:
        config = json.loads((run / "config.json").read_text())
        name = config["script"].removesuffix(".py")
        if "num_seeds" in config["args"]:
            raise SystemExit(f"{run} is a run of {name}.py on BSuite; only Atari has pictures.")
        paths = [x for x in run.glob("checkpoints/*.msgpack") if x.stem.isdecimal()]
        content, arguments = None, dict(config["args"])
        for path in sorted(paths, key=lambda path: int(path.stem)):  # the run may delete the first
            data = path.read_bytes() if path.exists() else b""
            if data and zlib.crc32(data[4:]).to_bytes(4, "little") == data[:4]:
                content = data[4:]
        if content is None:
            raise ValueError("it has none" if not paths else "they are damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{run} is no run with a whole checkpoint ({error}).") from None
    try:
        script = importlib.import_module(name)
        for needed in ("prepare_jax", "Args", "make_env", "make_network", "act"):
            getattr(script, needed)
    except (Exception, SystemExit) as error:  # a user's script, elsewhere or half written
        message = f"{run} is a run of {name}.py: put that script beside benchmark/"
        raise SystemExit(f"{message}, as it was ({error}).") from None
    script.prepare_jax()
    known = {field.name for field in fields(script.Args)} & set(arguments)
    args = script.Args(**{name: arguments[name] for name in known})
    num_actions = int(script.make_env(args.env_id, 1).single_action_space.n)
    state = serialization.msgpack_restore(content)["state"]
    if "params" not in state:
        raise SystemExit(f"{run} is a world model; give the folder of its policy.")
    params = state["params"]
    network = script.make_network(num_actions, args)
    agent = partial(script.act, params, network=network, args=args)
    try:
        stack = jax.ShapeDtypeStruct((1, 84, 84, 4), np.uint8)
        jax.eval_shape(partial(agent, greedy=True), stack, jax.random.key(0))
    except (FlaxError, TypeError, ValueError) as error:
        message = f"{run} has the checkpoint of another network than {name}.py makes"
        raise SystemExit(f"{message}: {str(error).partition(chr(10))[0]}") from None
    return script, args.env_id, agent


def record(
    act: Callable, make_env: Callable, env_id: str, seed: int, greedy: bool, path: Path
) -> float:
    """Plays one episode, writes what the screen shows to `path` (mp4), and returns its return."""
    # The screen comes from a twin in colour: same seed and actions, so it plays the same episode.
    env = make_env(env_id, 1)
    twin = make_env(env_id, 1, grayscale=False, img_height=210, img_width=160)
    key = jax.random.key(seed)
    (observations, _), (screen, _) = env.reset(seed=seed), twin.reset(seed=seed)
    part = path.with_name(f".{path.name}")  # a name that ends in .mp4, as OpenCV asks
    video = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"vp09"), 15, (320, 420))
    if not video.isOpened():
        raise SystemExit(f"{path} cannot be written; give another --out.")
    total, num_frames, over = 0.0, 0, False
    try:
        while True:
            picture = cv2.resize(screen[0, -1], (320, 420), interpolation=cv2.INTER_NEAREST)
            video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            num_frames += 1
            if over:
                break
            act_key, key = jax.random.split(key)
            stack = np.ascontiguousarray(observations.transpose(0, 2, 3, 1))
            actions = np.asarray(act(stack, act_key, greedy=greedy), np.int32)
            observations, rewards, terminated, truncated, _ = env.step(actions)
            screen, *_ = twin.step(actions)
            total += float(rewards[0])
            over = terminated[0] or truncated[0]
        video.release()
        if cv2.VideoCapture(str(part)).get(cv2.CAP_PROP_FRAME_COUNT) != num_frames:
            raise SystemExit(f"{path} was not written whole: is the disk full?")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return total


def main(args: Args) -> None:
    if not 0 <= args.seed < 2**31:
        raise SystemExit(f"--seed is {args.seed}; give one from 0 to {2**31 - 1}.")
    if not 4 <= args.max_frames <= 10**9:
        raise SystemExit(f"--max-frames is {args.max_frames}; give at least 4.")
    run = Path(os.path.expanduser(args.run))
    script, env_id, act = load_agent(run)
    path = Path(os.path.expanduser(args.out or run / "video.mp4"))
    if path.is_dir() or path.suffix != ".mp4":
        raise SystemExit(f"--out is {path}; it must be a file whose name ends in .mp4.")
    make_env = partial(script.make_env, max_num_frames_per_episode=args.max_frames)
    episode_return = record(act, make_env, env_id, args.seed, args.greedy, path)
    print(f"{path}: an episode of {env_id}, return {episode_return:g}.")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=(__doc__ or "").replace("\n", "\n ")))
    except KeyboardInterrupt:
        print("Stopped; there is no video of it.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, a folder that cannot be written
        raise SystemExit(f"{error}.") from None
