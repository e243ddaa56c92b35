"""Updates per second of a script's training step, compilation excluded.

    python benchmark/throughput.py rosmo_bsuite
    python benchmark/throughput.py rosmo_bsuite --num-seeds 5

The step is the script's own, with the metrics that it logs, on made-up data of the size of the
cartpole dataset (BSuite). The figure is the median of several windows of updates.
"""

import dataclasses
import importlib
import resource
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclasses.dataclass(frozen=True)
class Args:
    scripts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """scripts to measure in turn, such as rosmo_bsuite"""
    batch_size: int | None = None
    """windows in a batch [default: the script's]"""
    num_seeds: int = 1
    """seeds trained side by side (BSuite)"""
    num_steps: int = 300_000
    """steps in the made-up dataset (BSuite)"""
    updates: int = 200
    """updates in a window"""
    windows: int = 9
    """windows, of which the median is quoted"""


def bsuite_step(script, args: Args):
    """Returns run(num_updates), which trains all seeds on made-up cartpole episodes."""
    rng = np.random.default_rng(0)
    is_last = np.arange(1, args.num_steps + 1) % 600 == 0
    is_last[-1] = True
    steps = script.Steps(
        rng.normal(size=(args.num_steps, 1, 6)).astype(np.float32),
        rng.integers(0, 3, args.num_steps).astype(np.int32),
        np.ones(args.num_steps, np.float32),
        is_last,
        is_last,
    )
    settings = script.Args(env_id="cartpole", num_seeds=args.num_seeds)
    if args.batch_size:
        settings = dataclasses.replace(settings, batch_size=args.batch_size)
    network = script.make_network(3, settings)
    seeds = list(range(args.num_seeds))
    starts, num_starts = script.window_starts(is_last, 100.0, seeds)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init = jax.jit(script.init_state, static_argnums=(1, 3))
    states = [init(key, network, steps.observation[0], settings) for key in keys]
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=axis_types)
    train = script.make_train(network, mesh, settings)
    current = jax.tree.map(lambda *x: jnp.stack(x), *states)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    current, *data = jax.device_put((current, keys, steps, starts, num_starts), replicated)

    def run(num_updates: int) -> None:
        nonlocal current
        current, metrics = train(num_updates, current, *data)
        jax.device_get(metrics)

    return run


def main(args: Args) -> None:
    steps = {}
    for name in args.scripts:
        if not name.endswith("_bsuite"):
            raise SystemExit(
                f"There is no measurement of {name}; give a script such as rosmo_bsuite."
            )
        steps[name] = bsuite_step(importlib.import_module(name), args)
        steps[name](args.updates)  # compiles
    rates = {name: [] for name in steps}
    for _ in range(args.windows):  # in turn, so that a slow moment of the machine meets them all
        for name, run in steps.items():
            start = time.perf_counter()
            run(args.updates)
            rates[name].append(args.updates / (time.perf_counter() - start))
    first = np.median(rates[args.scripts[0]])
    for name, values in rates.items():
        low, median, high = np.min(values), np.median(values), np.max(values)
        print(
            f"{name}: {median:.1f} updates/s of {args.num_seeds} seed(s) "
            f"({low:.1f} to {high:.1f} over {args.windows} windows of {args.updates}), "
            f"{median / first:.2f} of {args.scripts[0]}"
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    device = jax.devices()[0]
    print(
        f"{jax.device_count()} x {device.device_kind}, peak memory of the process {memory:.2f} GiB"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
