"""Updates per second of a script's training step, compilation excluded.

    python benchmark/throughput.py rosmo_bsuite
    python benchmark/throughput.py rosmo_bsuite --num-seeds 5
    python benchmark/throughput.py rosmo_atari --batch-size 8 --updates 5
    python benchmark/throughput.py rosmo_atari --store data/atari/Pong-dqn-200k
    python benchmark/throughput.py rosmo_bsuite muzero_unplugged_bsuite    # side by side
    python benchmark/throughput.py loader --store data/atari/Pong-dqn-200k # throughput_loader.py

The step is the script's own, with the metrics that it logs: on BSuite on made-up data of the size
of the cartpole dataset, on Atari on the batches of a store or, without one, on one made-up batch.
The figure is the median of several windows of updates.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import re
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
    store: Path | None = None
    """store to load batches from (Atari)"""
    channels: int | None = None
    """channels of the network (Atari) [default: the script's]"""
    dtype: str | None = None
    """of activations: bfloat16 or float32 (Atari) [default: the script's]"""
    loader_threads: int = 4
    """threads that decode batches of the store (Atari)"""
    compile_only: bool = False
    """print memory and FLOPs of the compiled update and stop (Atari)"""
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


# Dense bfloat16 peak in FLOP/s by the name of the device.
PEAK = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12}


def atari_step(script, args: Args):
    """Returns run(num_updates), which gives its share of waiting, and the FLOPs of an update."""
    settings = script.Args()
    for name in ("batch_size", "channels", "dtype"):
        if value := getattr(args, name):
            settings = dataclasses.replace(settings, **{name: value})
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # The baselines learn from transitions, behavior cloning from single steps.
    length = getattr(settings, "unroll_steps", 1) + 1 + getattr(settings, "td_steps", 0)
    length = 1 if script.__name__ == "bc_atari" else length
    if args.store:
        env_id = json.loads((args.store / "meta.json").read_text())["env_id"]
        store = script.open_store(args.store, env_id)
        num_actions = store.meta["num_actions"]

        def load(step: int):
            batch = script.sample_batch(store, 0, step, settings.batch_size, length)
            return jax.device_put(batch, by_device)

        batches = script.load_batches(load, 0, args.loader_threads)
    else:
        rng, shape, num_actions = np.random.default_rng(0), (settings.batch_size, length), 9
        is_last = rng.random(shape) < 0.01
        made_up = script.Batch(
            frames=rng.integers(0, 256, (shape[0], length + 3, 84, 84), dtype=np.uint8),
            history=np.full(shape, 3, np.uint8),
            action=rng.integers(0, num_actions, shape).astype(np.int32),
            reward=rng.random(shape).astype(np.float32),
            is_first=np.roll(is_last, 1, axis=1),
            is_last=is_last,
            is_terminal=is_last,
        )
        batches = itertools.repeat(jax.device_put(made_up, by_device))
    network = script.make_network(num_actions, settings)
    init = jax.jit(script.init_state, static_argnums=(1, 2), out_shardings=replicated)
    key = jax.random.key(0)
    current = init(key, network, settings)
    parameters = sum(x.size for x in jax.tree.leaves(current.params))
    keys = {"key": key} if "key" in inspect.signature(script.update).parameters else {}
    options, batch = keys | {"network": network, "args": settings}, next(batches)
    update = script.update.lower(current, batch=batch, **options).compile()
    memory = update.memory_analysis()
    # Counted as for a CPU, since XLA does not see into the libraries that a GPU's program calls.
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu)  # noqa: E731
    on_cpu = jax.tree.map(shape, (current, batch, keys))
    lowered = script.update.lower(on_cpu[0], batch=on_cpu[1], **(options | on_cpu[2]))
    flops = lowered.cost_analysis()["flops"]
    print(
        f"{script.__name__}: {parameters:,} parameters, {num_actions} actions, batch "
        f"{settings.batch_size}, {network.dtype}: {flops / 1e12:.3g} TFLOP an update, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporary memory on a device",
        flush=True,
    )

    def run(num_updates: int) -> float:
        nonlocal current
        start, waited, previous = time.perf_counter(), 0.0, None
        for _ in range(num_updates):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            current, loss = update(current, batch=batch, **keys)
            jax.block_until_ready(previous)
            previous = loss
        jax.block_until_ready(previous)
        return waited / (time.perf_counter() - start)

    return run, flops


def main(args: Args) -> None:
    steps, flops = {}, {}
    for name in args.scripts:
        if not re.fullmatch(r"\w+_(atari|bsuite)", name):
            raise SystemExit(f"There is no script {name}; give one such as rosmo_bsuite.")
        if name == "morel_atari":
            raise SystemExit("morel_atari learns from a world model; its metrics tell its speed.")
        script = importlib.import_module(name)
        if name.endswith("_atari"):
            steps[name], flops[name] = atari_step(script, args)
        else:
            steps[name] = bsuite_step(script, args)
        if not args.compile_only:
            steps[name](args.updates)  # compiles
    if args.compile_only:
        return
    rates, waits = {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(args.windows):  # in turn, so that a slow moment of the machine meets them all
        for name, run in steps.items():
            start = time.perf_counter()
            waits[name].append(run(args.updates))
            rates[name].append(args.updates / (time.perf_counter() - start))
    first = np.median(rates[args.scripts[0]])
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    peak = sum(value for name, value in PEAK.items() if name in device) * jax.device_count()
    for name, values in rates.items():
        low, median, high = np.min(values), np.median(values), np.max(values)
        spread = f"{low:.2f} to {high:.2f} over {args.windows} windows of {args.updates}"
        remark = f" of {args.num_seeds} seed(s)"
        if name in flops:
            remark = f", waiting for data {np.median(waits[name]):.1%}"
        if name in flops and peak and "muzero" not in name:  # XLA counts its search's body once
            share = flops[name] * median / peak
            remark += f", {share:.1%} of the bfloat16 peak of {peak / 1e12:.0f} TFLOP/s"
        ratio = f", {median / first:.2f} times {args.scripts[0]}" if len(rates) > 1 else ""
        print(f"{name}: {median:.2f} updates/s{remark}{ratio} ({spread})")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"{device}, peak memory of the process {memory:.2f} GiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["loader"]:
        import throughput_loader

        throughput_loader.main(tyro.cli(throughput_loader.Args, args=sys.argv[2:]))
    else:
        main(tyro.cli(Args, description=__doc__))
