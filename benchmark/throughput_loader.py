"""How fast, and in how much memory, the Atari loader makes batches from a store.

    python benchmark/throughput_loader.py --store data/atari/MsPacman-dqn-60k

The figure per CPU second is that of one core, whatever else the machine does.
`--tfdata` also measures a tf.data pipeline in the manner of the published
loaders on the same steps: PNG frames decoded one by one, stacks of four as
windows with shift 1, trajectories of 11 states, a shuffle buffer, batches of
512.
"""

import importlib.util
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the loader needs no accelerator

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rosmo_atari as script
from throughput import open_store, start


@dataclass
class Args:
    store: Path  # folder of the store
    seconds: float = 20  # time per measurement
    batch_size: int = 512  # windows per batch
    length: int = 11  # states per window; three frames before them are read as well
    threads: int = 1  # loader threads
    tfdata: bool = False  # also measure the tf.data pipeline
    tfdata_steps: int = 4000
    """steps of the store that the tf.data pipeline reads, over and over"""


def peak_mb() -> float:
    """The most memory that this process has held, with the parts of the store that are mapped."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def rate(batches: Iterable, seconds: float, warm_up: int) -> tuple[float, float]:
    """Batches per second and per CPU second, after `warm_up` of them."""
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    start, cpu_start, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(iterator)
        count += 1
    return count / (time.perf_counter() - start), count / (time.process_time() - cpu_start)


def tfdata_pipeline(store: script.Store, args: Args) -> Iterable:
    import tensorflow as tf

    frames = script.read_frames(store, store.index[: args.tfdata_steps])
    pngs = [cv2.imencode(".png", frame)[1].tobytes() for frame in frames]
    steps = store.steps[store.index[: args.tfdata_steps]]
    columns = {name: np.ascontiguousarray(steps[name]) for name in steps.dtype.names}
    data = tf.data.Dataset.from_tensor_slices((pngs, columns)).repeat()
    data = data.map(lambda png, step: (tf.io.decode_png(png, 1)[..., 0], step))

    def windows(size, shift):
        def flatten(frame, step):
            parts = {name: value.batch(size) for name, value in step.items()}
            return tf.data.Dataset.zip((frame.batch(size), parts))

        return lambda data: data.window(size, shift, drop_remainder=True).flat_map(flatten)

    data = windows(4, 1)(data).map(
        lambda stack, step: (tf.transpose(stack, (1, 2, 0)), {k: v[-1] for k, v in step.items()})
    )
    data = windows(args.length, args.length)(data).shuffle(1000)
    return data.batch(args.batch_size).prefetch(4).as_numpy_iterator()


def main(args: Args) -> None:
    args = script.check_args(args, {"seconds": (0.1, 1e6)})
    if args.tfdata and not importlib.util.find_spec("tensorflow"):
        raise SystemExit("--tfdata needs tensorflow: pip install -r requirements.txt")
    before, start = peak_mb(), time.perf_counter()
    store = open_store(script, args.store, script.Args())
    opened = time.perf_counter() - start
    size = sum(file.stat().st_size for file in args.store.iterdir())
    print(
        f"{args.store.name}: {len(store.index):,} steps, {size / 1e6:.1f} MB, "
        f"{store.offsets[-1] / store.meta['num_steps']:.0f} bytes per frame, "
        f"{size / store.meta['num_steps']:.0f} per step with all else; opened in {opened:.2f} s"
    )

    def load(step):
        return script.sample_batch(store, 0, step, args.batch_size, args.length)

    wall, cpu = rate(script.load_batches(load, 0, args.threads), args.seconds, warm_up=5)
    print(
        f"loader, {args.threads} thread(s): {wall:.1f} batches of {args.batch_size} per second, "
        f"{cpu:.1f} per CPU second; peak memory {before:.0f} MB before, {peak_mb():.0f} MB now"
    )
    if args.tfdata:
        wall, tf_cpu = rate(tfdata_pipeline(store, args), args.seconds, warm_up=1)
        print(
            f"tf.data: {wall:.2f} per second, {tf_cpu:.2f} per CPU second: {cpu / tf_cpu:.0f} times"
        )


if __name__ == "__main__":
    start(main, Args, __doc__ or "")
