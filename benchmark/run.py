"""Runs the cells of the paper's tables and figures that are missing.

    python benchmark/run.py table1 --total-updates 50000
    python benchmark/run.py table8 --env-ids Pong Breakout --workers 4
    python benchmark/run.py table8 --launcher slurm --slurm partition=gpu
    python benchmark/run.py table8 --dry-run

A cell with a finished run below --runs is skipped, and a stopped run goes on.
Further arguments are handed to those scripts of the item that have them
(--channels 16). Every run has a log of its own; what failed is listed at the
end. Ctrl-C lets all runs write their checkpoints.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

import cloudpickle
import jax
import numpy as np
import submitit
import tyro
from submitit.core.utils import FailedJobError, FailedSubmissionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paper import ITEMS, Item
from prepare_atari import can_reach_rlu

PYTHON = sys.executable


@dataclasses.dataclass(frozen=True)
class Args:
    items: Annotated[tuple[str, ...], tyro.conf.Positional]  # tables and figures of the paper

    # cells
    methods: tuple[str, ...] | None = None  # some of the methods, as reports name them
    seeds: tuple[int, ...] | None = None  # seeds of every cell; None: the item's
    env_ids: tuple[str, ...] | None = None  # tasks or games, also others; None: the item's
    total_updates: int | None = None  # updates of every run; None: the item's
    runs: tuple[Path, ...] = (Path("runs"), Path("benchmark/results"))
    """folders with runs; of two of a cell that share a seed, the one with more seeds counts"""
    mix: bool = False
    """run and draw together what learned from different data; with `compare`, also what was
    evaluated differently"""

    # how they are run
    dry_run: bool = False  # print the commands, and run nothing
    workers: int | None = None
    """runs side by side, each with a GPU or (on Linux) its share of the cores where JAX has no
    GPU; None: one for each GPU, or one; with SLURM, the most that run at a time"""
    launcher: Literal["local", "slurm"] = "local"
    """here, or as a SLURM job array that is put into the queue again when it is preempted"""
    slurm: tuple[str, ...] = ()
    """options of sbatch, such as partition=gpu time=1440 (in minutes) gpus_per_node=1"""
    logs: Path = Path("runs/logs")  # folder of the logs, {item}/{run}.log

    # report.py alone, which takes all of these, so that one command line fits both
    out: Path | None = None
    """folder of the results; None: benchmark/results, of own runs runs/report"""
    greedy: bool = False  # final returns of greedy actions, not of sampled ones; needs an --out


# Reading runs
# ------------

# Arguments that tell two runs of a cell apart, or that change no number of a run.
NOT_COMPARED = {
    *("seed", "num_seeds", "log_every", "checkpoint_every", "run_dir", "overwrite", "track"),
    *("data_dir", "loader_threads", "world_model"),
    # of older scripts
    *("capture_video", "compilation_cache", "rlu_prefix", "tfds_dir"),
    *("wandb_entity", "wandb_project_name"),
}
# Others of older scripts, with the value with which a run is as one of today's scripts.
GONE = {"run": 1, "truncation_as_termination": False}

PARTS = ("compilation", "data", "update", "evaluation")


class Run(NamedTuple):
    folder: Path
    config: dict
    seeds: np.ndarray  # [seeds]
    final: np.ndarray  # [seeds], mean return of the final evaluation; nan if it has no episodes
    final_returns: np.ndarray  # [seeds, episodes]
    greedy_returns: np.ndarray  # [seeds, episodes], with greedy actions
    updates: np.ndarray  # [evaluations]
    returns: np.ndarray  # [seeds, evaluations, episodes]
    hours: np.ndarray  # [seeds, evaluations], since the start, without known ones of evaluation
    seconds: dict[str, float]  # of the parts of the work; old runs do not tell, and have zeros


def read_lines(folder: Path) -> list[dict]:
    """The whole lines of metrics.jsonl; a kill may have cut the last one short."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(x) for x in text[: text.rfind("\n") + 1].splitlines()]


def read_run(folder: Path) -> Run | None:
    """Reads the folder of a run; None if it is not finished."""
    config = json.loads((folder / "config.json").read_text())
    if missing := {"args", "data", "script", "starts"} - config.keys():
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")
    words = [config["script"], config["args"]["env_id"], *(x["device"] for x in config["starts"])]
    words += [x.get("commit") or "" for x in config["starts"]]
    if not isinstance(data := config["data"], str):
        facts = data_facts(data)
        known = type(facts.get("episodes")) is type(facts.get("steps")) is int
        words += [facts.get("source", "") if known else None]
    if not all(isinstance(x, str) for x in words):
        raise ValueError("config.json is damaged")
    lines = read_lines(folder)
    final = {x["seed"]: x for x in lines if "final/returns" in x}
    first, count = config["args"]["seed"], config["args"].get("num_seeds", 1)
    seeds = range(first, first + count)
    if set(final) != set(seeds) or final[first]["update"] != config["args"]["total_updates"]:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    for line in lines:
        seconds = {part: seconds[part] + line.get(f"seconds/{part}", 0.0) for part in PARTS}
        line["hours"] = (line.get("wall_time", np.nan) - seconds["evaluation"]) / 3600
    curves = [[x for x in lines if x["seed"] == s and "eval/return_mean" in x] for s in seeds]
    returns = [[x.get("eval/returns", [x["eval/return_mean"]]) for x in curve] for curve in curves]
    run = Run(
        folder,
        config,
        np.array(seeds),
        np.array([np.mean(final[s]["final/returns"] or np.nan) for s in seeds], float),
        *(
            np.array([final[s].get(name, []) for s in seeds], float).reshape(count, -1)
            for name in ("final/returns", "final/returns_greedy")
        ),
        np.array([x["update"] for x in curves[0]], int),
        np.array(returns, float).reshape(count, len(curves[0]), -1 if curves[0] else 0),
        np.array([[x["hours"] for x in curve] for curve in curves], float),
        seconds,
    )
    numbers = (run.final_returns, run.greedy_returns, run.updates, run.returns, run.hours)
    if not all(np.isfinite(x).all() for x in numbers):
        raise ValueError("metrics.jsonl is damaged")
    return run


def read_runs(folders: tuple[Path, ...], unfinished: list[str] | None = None) -> list[Run]:
    """All finished runs below the folders, also behind links, those of the most seeds first.

    The folders of the others, but for world models, are appended to `unfinished`.
    """
    seen, runs, others = set(), [], [] if unfinished is None else unfinished
    for folder in folders:
        for path, inner, files in os.walk(folder, followlinks=True):
            inner.sort()
            if (real := os.path.realpath(path)) in seen:  # by another link, maybe to what is above
                inner.clear()
            elif {"config.json", "metrics.jsonl"} <= set(files):
                try:
                    if one := read_run(Path(path)):
                        runs.append(one)
                    elif not path.endswith("-world-model"):
                        others.append(path)
                except Exception as error:  # whatever is in these files
                    print(f"{path} cannot be read as a run: {error!r}", file=sys.stderr)
            seen.add(real)
    return sorted(runs, key=lambda run: -len(run.final))


def plain(args: Any) -> dict:
    """Arguments as they stand in config.json."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def different(run: Run, args: Any) -> dict[str, tuple]:
    """Arguments of a run that are not those wanted: name -> (the run's, the wanted).

    An argument that an old run does not know has its default. One that the script does not know
    makes it another run, but for `GONE`. A world model counts where one is wanted.
    """
    theirs, ours = plain(type(args)()) | run.config["args"], plain(args)
    unknown = {k for k in theirs.keys() - ours.keys() if GONE.get(k, ...) != theirs[k]}
    names = (ours.keys() | unknown) - NOT_COMPARED
    if ours.get("world_model"):
        theirs["world_model"] = theirs["world_model"] or f"{run.folder}-world-model"
        names.add("world_model")
    pairs = {k: (theirs[k], ours.get(k)) for k in names if theirs[k] != ours.get(k)}
    for name in {"dataset", "world_model"} & pairs.keys():
        if len({os.path.abspath(path or os.devnull) for path in pairs[name]}) == 1:
            del pairs[name]
    return pairs


def data_facts(data: dict | str) -> dict:
    """Source, size and checksums of a run's data, as far as it wrote them down."""
    if isinstance(data, str):  # old runs on BSuite
        match = re.match(r"(\d+) episodes, (\d+) transitions, mean return (\S+)", data)
        if not match:
            return {}
        return {"episodes": int(match[1]), "steps": int(match[2]), "mean return": float(match[3])}
    facts = {"source": data.get("source")}
    facts["episodes"] = data.get("episodes", data.get("num_episodes"))
    facts["steps"] = data.get("transitions", data.get("steps", data.get("num_steps")))
    facts["rom"] = data.get("rom", data.get("rom_sha256"))
    if "mean_return" in data:
        facts |= {"mean return": data["mean_return"], "checksum": data.get("crc32")}
        facts["checksum of frames"] = data.get("frames_crc32")
    return {k: v for k, v in facts.items() if v is not None}


ROUNDING = 0.006  # old runs wrote the data's mean return with two digits


def differing(facts: dict, others: dict) -> list[str]:
    """Names of the facts that cannot be of the same data."""
    distance = abs(facts.get("mean return", 0) - others.get("mean return", 0))
    known = [k for k in facts.keys() & others.keys() if facts[k] != others[k]]
    return sorted(k for k in known if k != "mean return" or distance > ROUNDING)


def is_fall_back(config: dict) -> bool:
    """Whether a run learned from local data since RL Unplugged could not be reached."""
    data = config["data"]
    local = isinstance(data, dict) and data.get("source") == "dqn"
    return local and not config["args"].get("dataset")


def find_runs(runs: list[Run], args: Any, seeds: tuple[int, ...] | None = None) -> list[Run]:
    """Runs with these arguments of a script, each with one of `seeds` that those before it lack.

    Runs on local data count as long as there is no store of RL Unplugged.
    """
    script, found = importlib.import_module(type(args).__module__), []
    has_store = hasattr(script, "find_store") and script.find_store(args)
    for run in sorted(runs, key=lambda run: is_fall_back(run.config)):
        if run.config["script"] != f"{script.__name__}.py" or different(run, args):
            continue
        if has_store and is_fall_back(run.config):
            continue
        wanted = set(run.seeds) & set(run.seeds if seeds is None else seeds)
        if wanted - {seed for other in found for seed in other.seeds}:
            found.append(run)
    return found


# Cells
# -----


def split_options(further: list[str]) -> list[tuple[str, list[str]]]:
    """The options of a command line: the name of each as an attribute, and its words."""
    if further and not further[0].startswith("--"):
        raise SystemExit(f"There is no {further[0]}: options begin with --.")
    options = []
    for word in further:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
            options.append((name, []))
        options[-1][1].append(word)
    return options


def script_args(item: Item, further: list[str]) -> dict[str, Any]:
    """Arguments of each script of an item: the further ones that it has, and else its defaults."""
    options, parsed, used = split_options(further), {}, set()
    if any(name == "overwrite" for name, _ in options):
        raise SystemExit("--overwrite is for single runs: delete the folders of these instead.")
    own = {"env_id", "seed", "num_seeds", "run_dir", item.argument}
    own |= item.common.keys()
    free = ("total_updates", "log_", "eval_", "final_")
    for script, arguments in item.methods.values():
        module = importlib.import_module(script)
        words, fixed = [], {x for x in own | arguments.keys() if x and not x.startswith(free)}
        for name, option in options:
            if name in fixed:
                advice = {"env_id": "--env-ids", "seed": "--seeds", "num_seeds": "--seeds"}
                instead = f": give {advice[name]}" if name in advice else ""
                raise SystemExit(f"{option[0]} is set by the item itself{instead}.")
            if name in module.Args.__dataclass_fields__:
                words += option
                used.add(option[0])
        parsed[script] = tyro.cli(module.Args, args=words)
    if unknown := [option[0] for _, option in options if option[0] not in used]:
        raise SystemExit(f"No script of this item has {', '.join(unknown)}.")
    return parsed


def check_env_id(script: Any, env_id: str) -> None:
    if hasattr(script, "game_name"):
        script.game_name(env_id)  # ends the program if there is no such game
    elif env_id not in script.ENVIRONMENTS:
        tasks = ", ".join(script.ENVIRONMENTS)
        raise SystemExit(f"There is no task {env_id!r}; the tasks are {tasks}.")


def cell_args(item: Item, args: Args, further: list[str]) -> Iterator[tuple]:
    """Yields each cell and the arguments of its script, those of the first seed."""
    parsed = script_args(item, further)
    for script, env_id in itertools.product(parsed, args.env_ids or ()):
        check_env_id(importlib.import_module(script), env_id)
    if "dataset" in item.common and not {*(args.env_ids or ())} <= {*item.tasks}:
        raise SystemExit(f"--env-ids: the dataset of this item is of {', '.join(item.tasks)}.")
    given = {name for name, _ in split_options(further)}
    for cell in item.cells(args.env_ids):
        arguments = {k: v for k, v in cell.arguments.items() if k not in given}
        updates, own = args.total_updates or item.total_updates, arguments.get("total_updates")
        arguments["total_updates"] = min(updates, own) if own else updates
        arguments = vars(parsed[cell.script]) | arguments
        paths = {k: expand(x) for k, x in arguments.items() if isinstance(x, Path)}
        yield cell, dataclasses.replace(parsed[cell.script], **arguments | paths)


def expand(path: Path) -> Path:
    return Path(os.path.expanduser(path))  # which leaves a ~ if there is no home


def expand_paths(args: Args) -> Args:
    """The arguments, with ~ in paths expanded."""
    runs, out = tuple(map(expand, args.runs)), args.out and expand(args.out)
    return dataclasses.replace(args, runs=runs, logs=expand(args.logs), out=out)


def get_items(args: Args) -> dict[str, Item]:
    """The items that the arguments name."""
    for name in ("methods", "env_ids", "seeds", "runs"):
        if getattr(args, name) == ():
            raise SystemExit(f"--{name.replace('_', '-')}: name one or more.")
    for name, least in (("workers", 1), ("total_updates", 1), ("seeds", 0)):
        given = getattr(args, name)
        if given is not None and np.min(given) < least:
            words = " ".join(map(str, np.atleast_1d(given)))
            raise SystemExit(f"--{name.replace('_', '-')} {words}: give {least} or more.")
    if absent := [str(x) for x in args.runs if x not in Args.runs and not x.is_dir()]:
        raise SystemExit(f"--runs: there is no folder {', '.join(absent)}.")
    if args.slurm and args.launcher != "slurm":
        raise SystemExit("--slurm has no use without --launcher slurm.")
    unknown = [name for name in args.items if name not in ITEMS]
    if unknown or not args.items:
        what = f"There is no {', '.join(unknown)}; the" if unknown else "Name items first; the"
        raise SystemExit(f"{what} items are {', '.join(ITEMS)}.")
    for name in ("seeds", "env_ids"):
        if len(given := getattr(args, name) or ()) > len(set(given)):
            raise SystemExit(f"--{name.replace('_', '-')} {' '.join(map(str, given))}: one twice.")
    items = {name: ITEMS[name] for name in args.items}
    for name, item in items.items() if args.methods else ():
        if absent := set(args.methods) - item.methods.keys():
            methods = ", ".join(map(repr, item.methods))
            raise SystemExit(f"{name} has no {', '.join(absent)}; its methods are {methods}.")
        methods = {k: v for k, v in item.methods.items() if k in args.methods}
        items[name] = item._replace(methods=methods)
    return items


def data_here(args: Any) -> dict:
    """Facts of the data that a run would learn from; none if a store is still to be made."""
    script = importlib.import_module(type(args).__module__)
    if not hasattr(script, "find_store"):
        return data_facts(script.describe(script.load_dataset(args)))
    if args.dataset or script.find_store(args):
        jax.config.update("jax_platforms", "cpu")  # opening starts JAX; the runs need the GPU
        return data_facts(script.open_store(args).facts)
    return {}


def data_group(args: Any) -> tuple:
    """What tells one dataset from another; runs on BSuite draw their shares themselves."""
    names = ["env_id", "dataset", "noise", "truncation_as_termination"]
    names += [] if hasattr(args, "num_seeds") else ["data_percent"]
    return tuple(getattr(args, name, None) for name in names)


def refuse_other_data(item: Item, runs: list[Run], args: Args, further: list[str]) -> None:
    """Ends the program if runs would learn from other data than finished runs to compare with."""
    wanted, cells, here = {*(args.seeds or item.seeds)}, [], {}
    for _, script_args in cell_args(item, args, further):
        cells.append((data_group(script_args), script_args, find_runs(runs, script_args, wanted)))
    lacking = {group for group, _, found in cells if wanted - {s for x in found for s in x.seeds}}
    for group, script_args, found in cells:
        for run in found if group in lacking else []:
            ours = here[group] if group in here else here.setdefault(group, data_here(script_args))
            theirs = data_facts(run.config["data"])
            if names := differing(ours, theirs):
                message = f"{run.folder} learned from other data than those here: their "
                message += f"{', '.join(names)} differ, and the report would refuse to mix them"
                raise SystemExit(f"{message}. Name other folders with --runs, or give --mix.")


class Job(NamedTuple):
    name: str
    command: list[str]  # without the interpreter
    after: str | None = None  # the job that makes what this one needs


def command(args: Any) -> list[str]:
    """The words with which a script is started: every argument that is not its default."""
    path = ROOT / f"{type(args).__module__}.py"
    words = [os.path.relpath(path), "--env-id", args.env_id, "--seed", str(args.seed)]
    for field in dataclasses.fields(args):
        name, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        if field.name in ("env_id", "seed") or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        else:
            words += [name, str(value)]
    return words


def slug(*parts) -> str:
    text = "-".join(str(part) for part in parts if part not in (None, ""))
    return re.sub(r"[^\w.=+-]+", "-", text.replace(" = ", "="), flags=re.ASCII).strip("-")


def stretches(seeds: list[int]) -> list[tuple[int, int]]:
    """Seeds as stretches of consecutive ones, (first, number)."""
    parts = np.split(x := np.sort(seeds), np.flatnonzero(np.diff(x) > 1) + 1)
    return [(int(part[0]), len(part)) for part in parts if len(part)]


def missing_jobs(
    item: Item, runs: list[Run], args: Args, further: list[str]
) -> tuple[list[Job], int]:
    """The runs of an item that are missing, and how many runs there would be in all.

    On BSuite one process trains all seeds of a cell, on Atari one.
    """
    jobs, total, folders = [], 0, {}
    seeds = args.seeds or item.seeds
    whole = next(x for x in ITEMS.values() if x.title == item.title)  # with all methods
    needed = {method for method, _ in item.needs.values()}
    given = {name for name, _ in split_options(further)} - NOT_COMPARED - {"total_updates"}

    def folder_of(arguments, seed: int) -> Path:
        """The folder of a run that another run must know."""
        updates, default = arguments.total_updates, type(arguments).total_updates
        length = () if updates == default else ("total-updates", updates)
        data = arguments.dataset.name if "dataset" in item.common else arguments.env_id
        values = {k: v for k, v in vars(arguments).items() if k in given}
        changed = {k: v for k, v in values.items() if v != getattr(type(arguments), k)}
        variant = [f"{k.replace('_', '-')}={v}" for k, v in changed.items()]
        name, script = slug(data, *variant, *length), type(arguments).__module__
        folder = Path("runs", script, name, f"seed{seed}")
        # It is still to be made, or is damaged.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / "config.json").read_text())
            if is_fall_back(config) and importlib.import_module(script).find_store(arguments):
                return folder.with_name(f"seed{seed}-rlu")  # local data keep theirs
        return folder

    for cell, cell_arguments in cell_args(item, args, further):
        found = find_runs(runs, cell_arguments, seeds)
        done = {int(seed) for run in found for seed in run.seeds}
        together = "num_seeds" in type(cell_arguments).__dataclass_fields__
        groups = stretches if together else (lambda seeds: [(seed, 1) for seed in seeds])
        total += len(groups([s for s in seeds if s in done]))
        for first, count in groups([s for s in seeds if s not in done]):
            more, after = {"seed": first} | ({"num_seeds": count} if together else {}), None
            label = f"{item.argument}={cell.value}".replace("_", "-") if item.argument else None
            last = f"-{first + count - 1}" if count > 1 else ""
            name = slug(cell.method, cell.task, label, f"seed{'s' * (count > 1)}{first}{last}")
            if cell.method in needed:
                more["run_dir"] = folder_of(cell_arguments, first)
                made = Path(f"{more['run_dir']}-world-model")
                folders[cell.method, cell.task, first] = (name, made)
            method, argument = item.needs.get(cell.method, (None, None))
            if method and getattr(cell_arguments, argument) is None:
                after, made = folders.get((method, cell.task, first), (None, None))
                if made is None:  # of a finished run
                    theirs = next(
                        other_args
                        for other, other_args in cell_args(whole, args, further)
                        if (other.method, other.task) == (method, cell.task)
                    )
                    models = [
                        Path(run.config["args"].get(argument) or f"{run.folder}-world-model")
                        for run in find_runs(runs, theirs, (first,))
                    ]
                    models.append(Path(f"{folder_of(theirs, first)}-world-model"))
                    made = next((x for x in models if (x / "members.msgpack").exists()), None)
                more |= {argument: made} if made else {}
            words = command(dataclasses.replace(cell_arguments, **more))
            jobs.append(Job(name, words, after))
            total += 1
    return jobs, total


# Running them
# ------------


class Command:
    """What a job does: a script with its output in a log. Whoever ends the job ends the script.

    A script that gets SIGTERM writes a checkpoint and ends, and the same command goes on.
    """

    def __init__(self, words, log, environment=None, cores=None):
        self.words, self.log, self.cores = words, Path(log).absolute(), cores
        self.environment = environment or {}  # beside the one of the moment
        self.folder, self.pid, self.stopped = os.getcwd(), None, False

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        if parent := multiprocessing.parent_process():  # run.py, but in a job of SLURM
            os.setsid()  # what kills run.py's group leaves this one, which then notices
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        early = []  # SIGUSR2 from SLURM before the script's number is known
        preempt = signal.signal(signal.SIGUSR2, lambda number, _: early.append(number))
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                cwd=self.folder,
                start_new_session=True,  # a Ctrl-C on the terminal is not for it
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        self.pid = process.pid
        signal.signal(signal.SIGUSR2, preempt)
        for number in early:
            os.kill(os.getpid(), number)
        if self.stopped:  # before there was a script
            self.stop()
        while process.poll() is None:
            if not self.stopped and parent and not parent.is_alive():
                self.stop()
            time.sleep(0.2)
        if process.returncode < 0:
            with self.log.open("a") as log:
                log.write(f"It was killed by signal {-process.returncode}.\n")
        if process.returncode:
            sys.exit(process.returncode)

    def stop(self, *_) -> None:
        self.stopped = True
        if self.pid:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGTERM)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """submitit calls it in a signal handler when SLURM is about to end the job."""
        self.stop()
        if self.pid:
            with contextlib.suppress(ChildProcessError):  # it has just ended
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.pid, self.stopped = None, False
        return submitit.helpers.DelayedSubmission(self)


def demand_gpu() -> dict[str, str]:
    """Environment of a run for which there is a GPU. If that fails, JAX would take the CPU."""
    return {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cuda,cpu"}


def visible_gpus() -> list[str]:
    """Those that runs may have, found without a GPU being taken: none without JAX's plugin."""
    plugins = [importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)]
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any(plugins):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        visible = ",".join(x for x in lines if x.strip().isdecimal())  # not that there is no driver
    return [x.strip() for x in (visible or "").split(",") if x.strip() not in ("", "-1")]


def last_line(log: Path) -> str:
    """The last line with words; tyro writes its errors in a box that ends with its advice."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip("│ ") for line in text.splitlines() if re.search(r"\w", line)]
    lines = [line for line in lines if not line.startswith("For full helptext")]
    return lines[-1] if lines else "it wrote nothing"


def run_here(jobs: list[Job], total: int, args: Args, logs: Path) -> bool:
    """Runs the jobs, some side by side; False if one fails. A signal ends the program."""
    if os.name != "posix":
        raise SystemExit("Runs start on Linux or macOS only: start those of --dry-run by hand.")
    gpus = visible_gpus()
    workers = args.workers or len(gpus) or 1
    if gpus and workers > len(gpus):
        raise SystemExit(f"--workers {workers}: there are {len(gpus)} GPUs, one for each run.")
    get_cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = sorted(get_cores(0))
    logs.mkdir(parents=True, exist_ok=True)
    context, stopping = multiprocessing.get_context("spawn"), False
    terminal = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # to all that was started in it
    signals, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(n, lambda number, _: signals.append(number)) for n in numbers]
    waiting, running, ended = list(jobs), {}, {}  # by slot: (job, process), by name: error
    done = total - len(jobs)
    bar = tqdm(total=total, initial=done, unit="run", disable=not sys.stderr.isatty())

    def say(text: str) -> None:
        if bar.disable:
            print(f"[{done + len(ended)} of {total}] {text}", flush=True)
        else:
            bar.write(text)

    def ready() -> Job | None:
        """The next job whose needs are there; what lacks them for good has failed."""
        for job in list(waiting):
            if ended.get(job.after) and not has_world_model(job):
                waiting.remove(job)
                ended[job.name] = f"not started, as {job.after} failed"
                bar.update()
            elif job.after is None or job.after in ended:
                waiting.remove(job)
                return job
        return None

    try:
        while running or (waiting and not signals):
            for slot in range(workers):
                if slot in running or signals or not (job := ready()):
                    continue
                share = set(cores[slot % len(cores) :: workers])
                task = Command(
                    [PYTHON, *job.command],
                    logs / f"{job.name}.log",
                    demand_gpu() | {"CUDA_VISIBLE_DEVICES": gpus[slot]} if gpus else None,
                    share if workers > 1 and not gpus else None,
                )
                kept = {n: signal.signal(n, signal.SIG_IGN) for n in terminal}  # inherited
                process = context.Process(target=task)
                process.start()
                running[slot] = job, process
                for number, handler in kept.items():
                    signal.signal(number, handler)
                say(f"started  {job.name}")
            for slot, (job, process) in list(running.items()):
                if process.exitcode is not None:
                    error = last_line(logs / f"{job.name}.log") if process.exitcode else None
                    ended[job.name] = error
                    del running[slot]
                    bar.update()
                    how = "finished" if not error else "stopped" if signals else "failed"
                    say(f"{how:8} {job.name}")
            if signals and not stopping:
                stopping = True
                say(f"Stopping {len(running)} run(s), which write their checkpoints.")
                for _, process in running.values():
                    process.terminate()
            time.sleep(0.2)
    finally:
        for _, process in running.values():  # after an error; they end before this program does
            process.terminate()
        bar.close()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if signals:
        left = len(waiting) + sum(error is not None for error in ended.values())
        print(f"Stopped with {left} run(s) to do; the same command goes on.", file=sys.stderr)
        raise SystemExit(130)
    if failed := {name: error for name, error in ended.items() if error}:
        print(f"{len(failed)} of {len(jobs)} run(s) failed:", file=sys.stderr)
        for name, error in failed.items():
            print(f"  {logs / name}.log: {error}", file=sys.stderr)
    return not failed


def has_world_model(job: Job) -> bool:
    """Whether the world model of another run that the job takes is there."""
    folder = dict(itertools.pairwise(job.command)).get("--world-model")
    return bool(folder) and Path(folder, "members.msgpack").exists()


def missing_stores(jobs: list[Job]) -> dict[Path, str]:
    """What makes the stores of RL Unplugged that jobs lack, by the local data taken otherwise."""
    percents = {}
    for job in jobs:
        script = importlib.import_module(Path(job.command[0]).stem)
        args = tyro.cli(script.Args, args=job.command[1:])
        if hasattr(args, "rlu_run") and not args.dataset and not script.find_store(args):
            store = args.env_id, args.rlu_run, args.data_dir  # a larger part serves a smaller one
            percents[store] = max(args.data_percent, percents.get(store, 0))
    return {
        data_dir / "atari" / f"{env_id}-dqn-200k": (
            f"python benchmark/prepare_atari.py --env-id {env_id} --rlu-run {run} "
            f"--percent {percent:g} --data-dir {shlex.quote(str(data_dir))}"
        )
        for (env_id, run, data_dir), percent in percents.items()
    }


def check_stores(jobs: list[Job]) -> None:
    """Ends where runs would make local data for want of RL Unplugged; says if they take such."""
    stores = missing_stores(jobs)
    if not stores or can_reach_rlu():  # then the runs make the stores
        return
    if commands := [command for path, command in stores.items() if not path.exists()]:
        message = "Data are missing, and RL Unplugged cannot be reached. Make them first, on a host"
        message += " with a connection; without one these record local data, NOT the paper's:"
        raise SystemExit("\n  ".join([message, *commands]))
    paths = ", ".join(map(str, stores))
    print(f"RL Unplugged cannot be reached: the runs learn from {paths}, NOT the paper's data.")


def submit(jobs: list[Job], args: Args, logs: Path, item: str, arrays: dict[str, str]) -> None:
    """Hands the jobs to SLURM: an array, and one for those that need others, after these.

    arrays: by the name of a job the array that it is in; those of the jobs are added.
    """
    if not (shutil.which("sbatch") and shutil.which("srun")):
        message = "--launcher slurm needs sbatch and srun"
        raise SystemExit(f"{message}: start this on a host that submits jobs.")
    executor = submitit.SlurmExecutor(logs / "submitit", max_num_timeout=1000)
    atari = any("_atari.py" in job.command[0] for job in jobs)
    options = {"job_name": item, "time": 24 * 60, "signal_delay_s": 300, "stderr_to_stdout": True}
    given = {}
    for option in args.slurm:
        name, _, value = option.partition("=")
        given[name.replace("-", "_")] = int(value) if value.isdigit() else value or True
    if "cpus_per_gpu" not in given:
        options["cpus_per_task"] = 8 if atari else 2
    on_gpu = atari and os.environ.get("JAX_PLATFORMS") != "cpu"
    if on_gpu and not {"gres", "gpus", "gpus_per_task"} & given.keys():
        options["gpus_per_node"] = 1
    options |= given
    if type(own := options.pop("srun_args", "")) is not str:
        raise SystemExit(f"--slurm srun_args={own}: give the options of srun.")
    cpus = options.get("cpus_per_task")  # which srun of SLURM 22.05 to 23.02 does not inherit
    options["srun_args"] = [f"--cpus-per-task={cpus}"] * bool(cpus) + shlex.split(own)
    if type(options["time"]) is not int:  # submitit reckons with it at the end of a task
        raise SystemExit(f"--slurm time={options['time']}: give a whole number of minutes.")
    if commands := missing_stores(jobs).values():  # tasks would hold GPUs while one makes it
        message = "Data are missing; make them first, on a host with a connection (or give the "
        message += "--dataset and --env-ids of local data):"
        raise SystemExit("\n  ".join([message, *commands]))
    known = submitit.SlurmExecutor._valid_parameters()
    extra = {k: options.pop(k) for k in list(options) if k not in known} | {"requeue": True}
    options |= {"array_parallelism": args.workers} if args.workers else {}
    for wave in ([job for job in jobs if not job.after], [job for job in jobs if job.after]):
        if not wave:
            continue
        if needed := {arrays[job.after] for job in wave if job.after}:
            # A script says so itself if what it needs is not there.
            options["dependency"] = f"afterany:{':'.join(sorted(needed))}"
        try:
            executor.update_parameters(**options, additional_parameters=extra)
            with executor.batch():
                gpu = demand_gpu() if on_gpu else None
                tasks = [
                    executor.submit(Command([PYTHON, *job.command], logs / f"{job.name}.log", gpu))
                    for job in wave
                ]
            array = tasks[0].job_id.partition("_")[0]
        except (FailedJobError, FailedSubmissionError, TypeError, IndexError) as error:
            text = " ".join(str(error).split()) or "sbatch was killed"
            raise SystemExit(f"The job was not submitted: {text}; see --slurm.") from None
        arrays |= {job.name: array for job in wave}
        print(f"Submitted job {array} of {len(wave)} run(s): squeue -j {array}, logs in {logs}.")


def main(args: Args, further: list[str]) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs need no path to this file
    args = expand_paths(args)
    items, planned, arrays, well = get_items(args), set(), {}, True
    runs = read_runs(args.runs)
    for item in items.values():  # what is wrong with any of them shows before the first run
        list(cell_args(item, args, further))
        if not (args.dry_run or args.mix):
            refuse_other_data(item, runs, args, further)
    if args.launcher == "local" and not args.dry_run:
        check_stores(
            [x for item in items.values() for x in missing_jobs(item, runs, args, further)[0]]
        )
    for name, item in items.items():
        missing, total = missing_jobs(item, runs, args, further)
        jobs = [job for job in missing if tuple(job.command) not in planned]
        planned |= {tuple(job.command) for job in jobs}
        here = {job.name for job in jobs} | arrays.keys()  # else it has been run before
        jobs = [job if job.after in here else job._replace(after=None) for job in jobs]
        if args.dry_run:
            for job in jobs:
                print(shlex.join(["python", *job.command]))
            continue
        text, shared = f"{total - len(missing)} of {total} runs", len(missing) - len(jobs)
        text += f" were finished, {shared} are of an item before" if shared else " are finished"
        print(f"{name}: {text}.", flush=True)
        logs = args.logs / (item.of or name)
        if jobs and args.launcher == "slurm":
            submit(jobs, args, logs, name, arrays)
        elif jobs:
            well &= run_here(jobs, total, args, logs)
    if not well:
        words = shlex.join(["benchmark/report.py", *sys.argv[1:]])
        raise SystemExit(f"The same command tries them again; what is finished: python {words}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    text = (__doc__ or "").replace("\n", "\n ")
    try:
        main(*tyro.cli(Args, description=text, return_unknown_args=True))
    except OSError as error:  # a full disk, a folder that cannot be written
        raise SystemExit(f"{error}: put that right, then the same command goes on.") from None
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None
