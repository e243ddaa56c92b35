"""Updates per second of the scripts of a domain, side by side in one process.

    python benchmark/throughput.py bsuite
    python benchmark/throughput.py atari --channels 16 --batch-size 16
    python benchmark/throughput.py atari --store data/atari/Pong-dqn-200k
    python benchmark/throughput.py atari --scripts rosmo_atari crr_atari

The update is the script's own, with the metrics that it logs: on BSuite on
made-up episodes of the size of cartpole's, on Atari on the batches of a store
or, without one, on one made-up batch. The scripts take turns, window by
window, so that a slow moment of the machine meets them all; figures are
medians over the windows. A device's peak is that of a large matrix product in
the same arithmetic, measured in the same run. On a CPU an Atari script makes
every core a device; here JAX_NUM_CPU_DEVICES is their number, or there is one.
`--out` puts the table into a page of results.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("rosmo", "muzero_unplugged", "crr", "cql", "bc")


@dataclasses.dataclass(frozen=True)
class Args:
    domain: Annotated[Literal["atari", "bsuite"], tyro.conf.Positional]
    scripts: tuple[str, ...] = ()  # scripts to measure; none: all but the model-based
    batch_size: int | None = None  # windows in a batch; None: the script's
    channels: int | None = None  # channels of the network (Atari); None: the script's
    dtype: Literal["float32", "bfloat16"] | None = None  # of the network; None: the script's
    store: Path | None = None  # store to load batches from (Atari)
    loader_threads: int = 4  # threads that decode its batches; as many, at least 4, are made ahead
    num_seeds: int = 1  # seeds trained side by side (BSuite)
    num_steps: int = 300_000  # steps of the made-up dataset (BSuite)
    updates: int = 20  # updates in a window
    windows: int = 5  # windows of every script
    compile_only: bool = False  # print parameters, FLOPs and memory of the compiled updates alone
    out: Path | None = None  # page of results, in which the table replaces the one of its title


class Step(NamedTuple):
    """The compiled update of a script."""

    run: Callable  # number of updates -> seconds that waited for data
    compilation: float  # seconds
    gflop: float  # of an update
    megabytes: float  # of temporary memory on a device
    parameters: int


def settings_of(script, args: Args):
    names = ("batch_size", "channels", "dtype", "num_seeds")
    fields = {field.name for field in dataclasses.fields(script.Args)} & set(names)
    changed = {name: value for name in fields if (value := getattr(args, name)) is not None}
    return script.check_args(dataclasses.replace(script.Args(), **changed), script.RANGES)


def compiled(function, *inputs, **static):
    """A jitted function compiled for its inputs -> (it, seconds, GFLOP, MB)."""
    start = time.perf_counter()
    program = function.lower(*inputs, **static).compile()
    seconds = time.perf_counter() - start
    megabytes = program.memory_analysis().temp_size_in_bytes / 1e6
    return program, seconds, count_gflop(function, *inputs, **static), megabytes


def count_gflop(function, *inputs, **static) -> float:
    """GFLOP of a jitted function, in which the compiler counts the body of a loop once."""
    # Counted as for a CPU, since XLA does not see into the libraries that a GPU's program calls.
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    like = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=cpu)  # noqa: E731
    one_device = static | ({"by_device": cpu} if "by_device" in static else {})
    return function.lower(*jax.tree.map(like, inputs), **one_device).cost_analysis()["flops"] / 1e9


def further_simulations(script, params, observation, network, settings) -> float:
    """GFLOP that the compiler misses in a search of the states of observations [B, T, ...].

    It counts the body of the search's loop, which expands a state below every root, once; and the
    draw of the roots' noise, a trifle, with the square of their number, which is taken off again.
    """
    if not hasattr(script, "search"):
        return 0.0

    def expand(params, state, action):
        state = network.apply(params, state, action, method="dynamics")
        return state, network.apply(params, state, method="prediction")

    encode = lambda *x: network.apply(*x, method="representation")  # noqa: E731
    state = jax.eval_shape(encode, params, observation)
    action = jax.ShapeDtypeStruct(observation.shape[:2], jnp.int32)
    shape = (math.prod(action.shape), network.num_actions)
    noise = count_gflop(jax.jit(lambda key: script.log_gamma(key, 0.3, shape)), jax.random.key(0))
    further = settings.num_simulations - 1
    return further * count_gflop(jax.jit(expand), params, state, action) - noise


def bsuite_step(script, args: Args, mesh) -> Step:
    rng, settings = np.random.default_rng(0), settings_of(script, args)
    is_last = np.arange(1, args.num_steps + 1) % 600 == 0
    is_last[-1] = True
    observation = rng.normal(size=(args.num_steps, 1, 6)).astype(np.float32)
    action = rng.integers(0, 3, args.num_steps).astype(np.int32)
    reward = np.ones(args.num_steps, np.float32)
    steps = script.Steps(observation, action, reward, is_last, is_last)
    network, by_device = script.make_network(3, settings), NamedSharding(mesh, P("data"))
    starts, num_starts = script.window_starts(is_last, 100.0, list(range(args.num_seeds)))
    keys = jax.random.split(jax.random.key(0), args.num_seeds)
    init = jax.jit(jax.vmap(script.init_state, (0, None, None, None)), static_argnums=(1, 3))
    states = init(keys, network, steps.observation[0], settings)
    data = (keys, steps, starts, num_starts)
    static = {"network": network, "args": settings, "by_device": by_device}
    states, data = jax.device_put((states, data), NamedSharding(mesh, P()))
    _, metrics = jax.eval_shape(lambda *x: script.update_seeds(*x, **static), states, *data)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
    sums = jax.device_put(sums, NamedSharding(mesh, P()))
    train, *facts = compiled(script.train, jnp.int32(1), states, sums, data, **static)
    shape = (settings.batch_size, script.window_length(settings), *steps.observation.shape[1:])
    one_seed = (jax.tree.map(lambda x: x[0], states.params), jnp.zeros(shape))
    facts[1] += len(keys) * further_simulations(script, *one_seed, network, settings)
    current = [states, sums]

    def run(num_updates: int) -> float:
        current[:] = train(jnp.int32(num_updates), *current, data)
        jax.block_until_ready(current)
        return 0.0

    return Step(run, *facts, sum(x.size for x in jax.tree.leaves(states.params)) // len(keys))


def atari_step(script, args: Args, mesh) -> Step:
    rng, settings = np.random.default_rng(0), settings_of(script, args)
    by_device, length = NamedSharding(mesh, P("data")), script.window_length(settings)
    shape, num_actions = (settings.batch_size, length), 9
    if args.store:
        store = open_store(script, args.store, settings)
        num_actions = store.meta["num_actions"]

        def load(step: int):
            batch = script.sample_batch(store, 0, step, settings.batch_size, length)
            return jax.device_put(batch, by_device)

        batches = script.load_batches(load, 0, args.loader_threads)
    else:
        is_last = rng.random(shape) < 0.01
        made_up = script.Batch(
            frames=rng.integers(0, 256, (shape[0], length + 3, 84, 84), dtype=np.uint8),
            history=np.full(shape, 3, np.uint8),
            action=rng.integers(0, num_actions, shape).astype(np.int32),
            reward=rng.random(shape).astype(np.float32),
            is_last=is_last,
            is_terminal=is_last,
        )
        batches = itertools.repeat(jax.device_put(made_up, by_device))
    network, key = script.make_network(num_actions, settings), jax.random.key(0)
    init = jax.jit(script.init_state, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, P()))
    state, static = init(key, network, settings), {"network": network, "args": settings}
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    update, *facts = compiled(script.update, state, key, next(batches), **static)
    observation = jax.ShapeDtypeStruct((*shape, 84, 84, 4), jnp.uint8)
    facts[1] += further_simulations(script, state.params, observation, network, settings)

    def run(num_updates: int) -> float:
        nonlocal state
        waited, previous = 0.0, None
        for _ in range(num_updates):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            state, metrics = update(state, key, batch)
            jax.block_until_ready(previous)
            previous = metrics
        jax.block_until_ready(state)
        return waited

    return Step(run, *facts, parameters)


def open_store(script, path: Path, settings):
    """The whole store at `path`, of whatever game and percent."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        whole = {"env_id": meta["env_id"], "data_percent": meta["percent"], "dataset": path}
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"There is no store {path}.") from None
    whole |= {"eval_episodes": 0, "final_eval_episodes": 0}  # nothing is played
    return script.open_store(dataclasses.replace(settings, **whole))


def matrix_peak(dtype: str, seconds: float = 2.0) -> float:
    """GFLOP/s of the matrix product of all devices together."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(jnp.matmul)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    inputs = [jax.device_put(matrix, device) for device in jax.devices()]
    jax.block_until_ready([product(x, x) for x in inputs])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        jax.block_until_ready([product(x, x) for x in inputs])
        count += len(inputs)
    return count * 2 * size**3 / (time.perf_counter() - start) / 1e9


def machine() -> str:
    """Processor and devices, in words."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{cores} core(s) of {processor}; {jax.device_count()} x {jax.devices()[0].device_kind}"


def write_section(path: Path, title: str, text: str) -> None:
    """Puts a section into a Markdown page, in the place of the one with the same title."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# Throughput\n"
    sections = re.split(r"(?m)^(?=## )", page)
    titles = [part.partition("\n")[0] for part in [*sections, title]]
    place = titles.index(title)
    sections[place : place + 1] = [f"{title}\n\n{text}"]
    part = path.with_name(f".{path.name}")  # a full disk leaves the page as it was
    part.write_text("\n".join(x.rstrip() + "\n" for x in sections), encoding="utf-8")
    part.replace(path)


def main(args: Args) -> None:
    paths = {k: Path(os.path.expanduser(v)) for k, v in vars(args).items() if isinstance(v, Path)}
    args = dataclasses.replace(args, **paths)
    for name, value in vars(args).items():
        if type(value) is int and value < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; give at least 1.")
    try:
        jax.devices(), jax.devices("cpu")  # which counts the FLOPs
    except (RuntimeError, AssertionError) as error:
        message = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} lacks a device or the CPU"
        reason = str(error) or "install jax for it, or give JAX_PLATFORMS=cuda,cpu."
        raise SystemExit(f"{message}, which counts the FLOPs: {reason}") from None
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise SystemExit(f"--out {args.out} is no page that can be written.")
    atari = ("channels", "store", "loader_threads")
    for name in {"atari": ("num_seeds", "num_steps"), "bsuite": atari}[args.domain]:
        if getattr(args, name) != getattr(Args, name):
            raise SystemExit(f"--{name.replace('_', '-')} is not for {args.domain}.")
    if args.loader_threads != Args.loader_threads and not args.store:
        raise SystemExit("--loader-threads is of no use without a --store.")
    if args.compile_only and args.out:
        raise SystemExit("--compile-only writes no page.")
    names = args.scripts or tuple(f"{method}_{args.domain}" for method in METHODS)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    make_step = {"atari": atari_step, "bsuite": bsuite_step}[args.domain]
    steps = {}
    for name in names:
        if not re.fullmatch(rf"({'|'.join(METHODS)})_{args.domain}", name):
            raise SystemExit(f"{name} is not one of {', '.join(METHODS)} with _{args.domain}.")
        steps[name] = make_step(importlib.import_module(name), args, mesh)
        x = steps[name]
        facts = f"{x.parameters:,} parameters, {x.gflop:.4g} GFLOP an update, {x.megabytes:.0f} MB"
        print(f"{name}: {facts}", flush=True)
    if args.compile_only:
        return
    rates, cores, waits = ({name: [] for name in names} for _ in range(3))
    for window in range(args.windows + 1):  # the first is not counted
        for name, step in steps.items():
            if args.store:  # batches that were made ahead while the others were timed
                step.run(max(4, args.loader_threads))
            start, cpu_start = time.perf_counter(), time.process_time()
            waited = step.run(args.updates)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if window:
                rates[name].append(args.updates / seconds)
                cores[name].append(cpu_seconds / seconds)
                waits[name].append(waited / seconds)
    on_cpu = jax.default_backend() == "cpu" or args.domain == "bsuite"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")  # as the scripts
    peak = matrix_peak(dtype)
    columns = ["Script", "Updates/s", "Lowest to highest", "Times the first", "Cores busy"]
    columns += ["Waits for data", "GFLOP an update", "Share of the peak", "Compilation, s"]
    columns += ["Memory, MB"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, step in steps.items():
        rate, first = np.median(rates[name]), np.median(rates[names[0]])
        share, facts = step.gflop * rate / peak, f"{step.compilation:.0f} | {step.megabytes:.0f}"
        table.append(
            f"| {name} | {rate:.4g} | {min(rates[name]):.4g} to {max(rates[name]):.4g} "
            f"| {rate / first:.2f} | {np.median(cores[name]):.1f} | {np.median(waits[name]):.1%} "
            f"| {step.gflop:.4g} | {share:.0%} | {facts} |"
        )
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "describe", "--always"]
    git += ["--dirty", "--abbrev=7", "--exclude=*"]
    found = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    commit = (found or "").strip() or "an unknown commit"
    words, options = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words)
        elif not word.startswith("--out="):
            options.append(word)
    command = shlex.join(["python", "benchmark/throughput.py", *options])
    title = shlex.join(options)
    if count := os.environ.get("JAX_NUM_CPU_DEVICES"):
        setting = f"JAX_NUM_CPU_DEVICES={count}"
        command, title = f"{setting} {command}", f"{setting} {title}"
    facts = f"`{command}` at {commit}, {time.strftime('%Y-%m-%d')}, on {machine()}, whose matrix "
    facts += f"product in {dtype} reaches {peak:,.0f} GFLOP/s."
    text = "\n".join([*table, "", facts])
    print(text)
    if args.out:
        write_section(args.out, f"## {title}", text)


def start(main: Callable, args: type, text: str) -> None:
    """main on the arguments of the command line; what a user can put right ends in a sentence."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(tyro.cli(args, description=text.replace("\n", "\n ")))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"{error}.") from None
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SystemExit("The memory is not enough: give a smaller --batch-size.") from None


if __name__ == "__main__":
    start(main, Args, __doc__ or "")
