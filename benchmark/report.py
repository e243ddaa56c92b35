"""Draws the paper's tables and figures from finished runs.

    python benchmark/report.py table1 figure9
    python benchmark/report.py figure2a --total-updates 50000

Every run below --runs counts whose arguments are those of a cell and the defaults otherwise. A cell
without a finished run stays empty and is listed. For each item, --out gets a page with the numbers
and where they come from ({item}.md), the numbers alone ({item}.csv) and, of a figure, {item}.png.
"""

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TASKS = ("catch", "mountain_car", "cartpole")
FIVE = {
    "BC": ("bc_bsuite", {}),
    "CRR": ("crr_bsuite", {}),
    "CQL": ("cql_bsuite", {}),
    "MuZero Unplugged": ("muzero_unplugged_bsuite", {}),
    "ROSMO": ("rosmo_bsuite", {}),
}
BOTH = {"ROSMO": ("rosmo_bsuite", {}), "MuZero Unplugged": ("muzero_unplugged_bsuite", {})}
DEPTHS = {"depth N": None, "depth 2": 2, "depth 1": 1}
WIDTHS = (32, 128, 256, 512, 1024)


class Item(NamedTuple):
    """Cells: every method, with every value of a parameter, on every task."""

    title: str
    form: Literal["table", "aggregate", "curves"]
    parameter: str
    values: tuple
    tasks: tuple[str, ...] = TASKS
    methods: dict[str, tuple[str, dict]] = BOTH  # label: script, arguments
    common: tuple[tuple[str, Any], ...] = ()  # arguments of every cell
    claim: str = ""  # the paper's

    def label(self, value) -> str:
        return value if self.parameter == "env_id" else f"{self.parameter} {value}"


NOISES = (0.0, 0.1, 0.3, 0.5)
SMALL = (
    ("dataset", Path("data/atari/MsPacman-dqn-60k")),
    ("channels", 16),
    ("batch_size", 16),
    ("eval_episodes", 5),
    ("final_eval_episodes", 20),
)
LOW_DATA = (("data_percent", 10.0),)
BOOTSTRAPS = 2000
ITEMS = {
    "table1": Item(
        "Table 1: catch, data of a noisy environment",
        *("table", "noise", NOISES, TASKS[:1]),
        claim="ROSMO is much less sensitive to the noise than MuZero Unplugged.",
    ),
    "figure9": Item(
        "Figure 9: catch, data of a noisy environment", "curves", "noise", NOISES, TASKS[:1]
    ),
    "table2": Item(
        "Table 2: the five methods on BSuite",
        *("table", "env_id", TASKS, ("BSuite",), FIVE),
        claim="ROSMO is best on catch and mountain_car, with the lowest standard deviation; "
        "CRR is slightly better on cartpole.",
    ),
    "figure2a": Item(
        "Figure 2(a): shares of the data",
        *("aggregate", "data_percent", (1.0, 10.0, 30.0, 100.0)),
        claim="ROSMO is above MuZero Unplugged everywhere, which is poor at 1%.",
    ),
    "figure2b": Item(
        "Figure 2(b): widths of the dynamics function, 10% of the data",
        *("aggregate", "dynamics_hidden", WIDTHS),
        common=LOW_DATA,
        claim="MuZero Unplugged is best at 1024 and falls with less; ROSMO is flat and higher.",
    ),
    "figure10": Item(
        "Figure 10: widths of the dynamics function, 10% of the data",
        *("curves", "dynamics_hidden", WIDTHS),
        common=LOW_DATA,
    ),
    "figure2c": Item(
        "Figure 2(c): simulations and depth of the search",
        *("aggregate", "num_simulations", (2, 4, 16, 32)),
        methods={k: ("muzero_unplugged_bsuite", {"max_depth": v}) for k, v in DEPTHS.items()},
        claim="MuZero Unplugged fails at few simulations and with many and deep ones; limiting "
        "the depth helps.",
    ),
    "atari_small": Item(
        "Five methods on MsPacman, small",
        *("curves", "env_id", ("MsPacman",), ("Atari",)),
        methods={k: (v.replace("bsuite", "atari"), a) for k, (v, a) in FIVE.items()},
        common=SMALL,
        claim="On MsPacman at the paper's size: ROSMO 5,020, MuZero Unplugged 4,539, CRR 3,737, "
        "BC 2,733, CQL 2,142 (Table 8).",
    ),
    "sweep_crr": Item(
        "CRR's β on catch",
        *("table", "beta", (0.1, 0.3, 1.0, 3.0), TASKS[:1]),
        methods={"exp": ("crr_bsuite", {})},
    ),
    "sweep_crr_weight": Item(
        "CRR's weight on catch, β = 1",
        *("table", "weight", ("exp", "binary"), TASKS[:1]),
        methods={"CRR": ("crr_bsuite", {})},
        common=(("beta", 1.0),),
    ),
    "sweep_cql": Item(
        "CQL's α and learning rate on catch",
        *("table", "cql_alpha", (0.01, 0.05, 0.1, 0.5, 1.0, 4.0), TASKS[:1]),
        methods={f"{rate:g}": ("cql_bsuite", {"learning_rate": rate}) for rate in (7e-4, 5e-5)},
    ),
    "sweep_crr_atari": Item(
        "CRR's β on MsPacman, small",
        *("curves", "beta", (0.1, 0.3, 1.0), ("MsPacman",)),
        methods={"CRR": ("crr_atari", {})},
        common=SMALL,
    ),
    "sweep_crr_weight_atari": Item(
        "CRR's weight on MsPacman, small, β = 1",
        *("curves", "weight", ("exp", "binary"), ("MsPacman",)),
        methods={"CRR": ("crr_atari", {})},
        common=SMALL,
    ),
    "sweep_cql_atari": Item(
        "CQL's α on MsPacman, small",
        *("curves", "cql_alpha", (0.1, 1.0, 4.0), ("MsPacman",)),
        methods={"CQL": ("cql_atari", {})},
        common=SMALL,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    items: Annotated[tuple[Literal[tuple(ITEMS)], ...], tyro.conf.Positional]
    """tables and figures of the paper"""
    total_updates: int = 200_000
    """updates of the runs that count"""
    num_seeds: int | None = None
    """seeds of a cell that count, the first ones [default: all]"""
    runs: tuple[Path, ...] = (Path("runs"), Path("benchmark/results"))
    """folders that hold runs; of two runs of a cell with a seed in common the one with more seeds
    counts"""
    out: Path = Path("benchmark/results")
    """folder of the results"""


class Run(NamedTuple):
    config: dict
    commits: tuple[str, ...]  # those that the run was started and continued with
    seeds: np.ndarray  # [seeds]
    final: np.ndarray  # [seeds], mean return of the final evaluation
    score: np.ndarray  # [seeds], normalised
    updates: np.ndarray  # [evaluations]
    returns: np.ndarray  # [seeds, evaluations]


def read_run(folder: Path) -> Run | None:
    """Reads the folder of a run; None if it is not finished."""
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    final = {x["seed"]: x for x in lines if "final/returns" in x}
    first, count = config["args"]["seed"], config["args"].get("num_seeds", 1)
    seeds = range(first, first + count)
    if set(final) != set(seeds) or final[first]["update"] != config["args"]["total_updates"]:
        return None
    curves = [[x for x in lines if x["seed"] == s and "eval/return_mean" in x] for s in seeds]
    commits = tuple((start.get("commit") or "unknown")[:7] for start in config["starts"])
    return Run(
        config,
        commits,
        np.array(seeds),
        np.array([final[s]["final/return_mean"] for s in seeds]),
        np.array([final[s]["final/normalized_score"] for s in seeds]),
        np.array([x["update"] for x in curves[0]]),
        np.array([[x["eval/return_mean"] for x in curve] for curve in curves]),
    )


def read_runs(folders: tuple[Path, ...]) -> list[Run]:
    paths = [p.parent for folder in folders for p in sorted(folder.rglob("config.json"))]
    runs = [read_run(path) for path in paths if (path / "metrics.jsonl").exists()]
    return sorted((run for run in runs if run), key=lambda run: -len(run.final))


def find_run(
    runs: list[Run], script: str, arguments: dict, num_seeds: int | None = None
) -> Run | None:
    """The runs of a script with these arguments and else its defaults, their seeds put together."""
    module = importlib.import_module(script)
    irrelevant = {
        *module.NOT_COMPARED.split(),
        *"seed num_seeds log_every checkpoint_every".split(),
    }
    wanted = json.loads(json.dumps(dataclasses.asdict(module.Args(**arguments)), default=str))
    parts = []
    for run in runs:
        args = run.config["args"]
        if run.config["script"] != f"{script}.py" or any(
            args.get(k) != v for k, v in wanted.items() if k not in irrelevant
        ):
            continue
        if not any(set(run.seeds) & set(part.seeds) for part in parts):
            parts.append(run)
    if not parts:
        return None
    order = np.argsort(np.concatenate([run.seeds for run in parts]))[:num_seeds]
    arrays = ("seeds", "final", "score", "returns")
    arrays = {k: np.concatenate([getattr(run, k) for run in parts])[order] for k in arrays}
    commits = [commit for run in parts for commit in run.commits]
    return parts[0]._replace(**arrays, commits=tuple(dict.fromkeys(commits)))


def find_cells(item: Item, runs: list[Run], args: Args) -> dict[tuple, Run | None]:
    """Runs, by (method, value, task)."""
    cells = {}
    for method, (script, arguments) in item.methods.items():
        for value in item.values:
            for task in item.tasks:
                cell = dict(item.common) | arguments | {"env_id": task, item.parameter: value}
                cell["total_updates"] = args.total_updates
                cells[method, value, task] = find_run(runs, script, cell, args.num_seeds)
    return cells


def interquartile_means(
    item: Item, cells: dict, tasks: tuple[str, ...]
) -> dict[tuple, tuple[float, float, float]]:
    """IQM over seeds and tasks of the normalised score, with a 95% stratified bootstrap interval.

    Returns:
      (estimate, low, high) by (method, value), where each of `tasks` has a run.
    """
    scores = {}
    for method in item.methods:
        for value in item.values:
            column = [cells[method, value, task] for task in tasks]
            if None not in column:
                count = min(len(run.seeds) for run in column)
                scores[method, value] = np.stack([run.score[:count] for run in column], axis=1)
    if not scores:
        return {}
    aggregate = lambda x: np.array([metrics.aggregate_iqm(x)])  # noqa: E731
    # rliable draws from NumPy's global state, even if it is given another.
    np.random.seed(0)  # noqa: NPY002
    means, intervals = library.get_interval_estimates(scores, aggregate, reps=BOOTSTRAPS)
    return {k: (float(means[k][0]), *map(float, intervals[k][:, 0])) for k in scores}


def draw_aggregate(item: Item, cells: dict, path: Path) -> None:
    """One panel for all tasks, where they have been run, and one for each."""
    groups = {"all tasks": item.tasks} | {task: (task,) for task in item.tasks}
    panels = {name: interquartile_means(item, cells, tasks) for name, tasks in groups.items()}
    panels = {name: estimates for name, estimates in panels.items() if estimates}
    figure = Figure((0.8 + 3.2 * len(panels), 3.6), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, estimates) in zip(row, panels.items(), strict=True):
        for i, method in enumerate(item.methods):
            values = [value for value in item.values if (method, value) in estimates]
            if values:
                mean, low, high = np.transpose([estimates[method, value] for value in values])
                positions = [item.values.index(value) for value in values]
                axes.plot(positions, mean, color=f"C{i}", marker="o", label=method)
                axes.fill_between(positions, low, high, color=f"C{i}", alpha=0.2)
        axes.set_xticks(range(len(item.values)), item.values)
        axes.set(xlabel=item.parameter, title=name)
    row[0].set_ylabel("IQM of the normalised score")
    row[0].legend()
    figure.suptitle(item.title, wrap=True)
    figure.savefig(path, dpi=120)


def draw_curves(item: Item, cells: dict, path: Path) -> None:
    """A row of panels for each task, one for each value: mean and deviation over the seeds."""
    size = (3.2 * len(item.values), 2.6 * len(item.tasks) + 0.6)
    figure = Figure(size, layout="constrained")
    shape = (len(item.tasks), len(item.values))
    grid = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False)
    drawn = {}  # a line of each method that has a run
    for row, task in zip(grid, item.tasks, strict=True):
        for axes, value in zip(row, item.values, strict=True):
            for i, method in enumerate(item.methods):
                if (run := cells[method, value, task]) is None:
                    continue
                n = 1 + len(run.updates) // 25  # evaluations in the moving average
                smooth = [np.convolve(x, np.ones(n) / n, "valid") for x in run.returns]
                mean, std, x = np.mean(smooth, axis=0), np.std(smooth, axis=0), run.updates[n - 1 :]
                drawn[method] = axes.plot(x, mean, color=f"C{i}")[0]
                axes.fill_between(x, mean - std, mean + std, color=f"C{i}", alpha=0.2)
        row[0].set_ylabel(f"{task}, return")
    for top, bottom, value in zip(grid[0], grid[-1], item.values, strict=True):
        top.set_title(item.label(value))
        bottom.set_xlabel("updates")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def write_page(name: str, item: Item, cells: dict, estimates: dict, args: Args) -> None:
    rows = []  # of the .csv
    for (method, value, task), run in cells.items():
        if run:
            rows += [
                (method, value, task, seed, final, score)
                for seed, final, score in zip(run.seeds, run.final, run.score, strict=True)
            ]
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", item.parameter, "task", "seed", "return", "normalized_score"))
        writer.writerows(rows)

    lines = [f"# {item.title}", ""]
    runs = {k: run for k, run in cells.items() if run}
    text = {k: f"{run.final.mean():.3f} ± {run.final.std():.3f}" for k, run in runs.items()}
    text |= {
        (*k, "IQM"): f"{m:.3f} [{low:.3f}, {high:.3f}]" for k, (m, low, high) in estimates.items()
    }
    for head in (*(["IQM"] if estimates else []), *item.tasks):
        lines += ["| " + " | ".join([head, *map(item.label, item.values)]) + " |"]
        lines += ["|" + "---|" * (1 + len(item.values))]
        for method in item.methods:
            row = [text.get((method, value, head), "") for value in item.values]
            lines += ["| " + " | ".join([method, *row]) + " |"]
        lines += [""]
    counts = sorted({run.config["args"]["final_eval_episodes"] for run in runs.values()})
    caption = "Mean and standard deviation over seeds of the final mean return, "
    caption += f"{' or '.join(map(str, counts))} episodes."
    if estimates:
        caption += " IQM of the normalised score over seeds and tasks, 95% stratified bootstrap."
    lines += [caption, ""]
    if item.claim:
        lines += [f"The paper's claim: {item.claim}", ""]
    if item.form != "table":
        lines += [f"![{item.title}]({name}.png)", ""]
    missing = [f"{m}, {item.label(v)}, {t}" for (m, v, t), run in cells.items() if not run]
    if missing:
        lines += [f"Not run at {args.total_updates:,} updates: {'; '.join(missing)}.", ""]
    lines += ["## Runs", ""]
    lines += [
        "| Method | Cell | Seeds | Updates | Commit | Device | Data |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, value, task), run in cells.items():
        if run:
            device, data = run.config["starts"][0]["device"], run.config["data"]
            if not isinstance(data, str):  # the facts of an Atari store
                data = "{env_id}-{source}, {num_episodes:,} episodes, {num_steps:,} steps".format(
                    **data
                )
            lines.append(
                f"| {method} | {task}, {item.label(value)} | {len(run.seeds)} | "
                f"{args.total_updates:,} | {', '.join(run.commits)} | {device} | {data} |"
            )
    command = f"python benchmark/report.py {name} --total-updates {args.total_updates}"
    command += f" --num-seeds {args.num_seeds}" if args.num_seeds else ""
    lines += ["", f"Made by `{command}`."]
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")


def main(args: Args) -> None:
    if not args.items:
        raise SystemExit(f"Name at least one of {', '.join(ITEMS)}.")
    runs = read_runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.items:
        item = ITEMS[name]
        cells = find_cells(item, runs, args)
        if not any(cells.values()):
            where = ", ".join(map(str, args.runs))
            raise SystemExit(f"No run of {name} with {args.total_updates:,} updates in {where}.")
        estimates = interquartile_means(item, cells, item.tasks) if item.form != "table" else {}
        if item.form == "aggregate":
            draw_aggregate(item, cells, args.out / f"{name}.png")
        elif item.form == "curves":
            draw_curves(item, cells, args.out / f"{name}.png")
        write_page(name, item, cells, estimates, args)
        done = sum(run is not None for run in cells.values())
        print(f"{name}: {done} of {len(cells)} cells, see {args.out / name}.md.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
