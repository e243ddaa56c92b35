"""Draws the paper's tables and figures from finished runs.

    python benchmark/report.py table1 figure9 --total-updates 50000
    python benchmark/report.py figure2a --total-updates 50000 --mix
    python benchmark/report.py compare mine=runs/a/seed0 theirs=runs/b/seed0
    python benchmark/report.py curves benchmark/results

It takes the arguments of run.py, further ones included, and counts the runs
of which run.py says that they are finished; a cell without one stays empty
and is listed. For each item, --out gets a page with the numbers and where
they come from ({item}.md), the numbers alone ({item}.csv) and the figures
({item}.png, ...); report.html holds these pages with their images. Runs of
different data are not drawn together, unless --mix is given; of an item, runs
of another evaluation are left out and named. Runs keep raw returns only; their
scores are normalised here. `curves` draws learning_curve.png anew in the
folders of all finished runs below those named that were evaluated twice or
more, with lines of random play and of the online DQN.
"""

import base64
import csv
import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

if __name__ == "__main__":  # a closed stream becomes os.devnull
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal knows ASCII alone
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback

import numpy as np
import tyro
from markdown_it import MarkdownIt

# A user's own may ask for what is not installed here.
os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rliable import library, metrics
from scipy.stats import rankdata, trim_mean

import run
from paper import ALGORITHMS, ITEMS, REFERENCE_RETURNS, TABLE5, Item
from run import Args

BOOTSTRAPS = 2000
CURVE_BOOTSTRAPS = 200
RESULTS, OWN_RESULTS = Path("benchmark/results"), Path("runs/report")  # where pages go
# Arguments that say how a run is evaluated; these, and those that say on what it learns.
EVALUATION = {"eval_episodes", "final_eval_episodes", "eval_max_frames", "eval_greedy"}
EVALUATION |= {"eval_noise", "eval_epsilon", "eval_dirichlet_fraction"}
PROTOCOL = EVALUATION | {"dataset", "rlu_run"}


class Result(NamedTuple):
    """What the runs of a cell ended with, over their seeds."""

    runs: list[run.Run]
    seeds: np.ndarray  # [seeds]
    final: np.ndarray  # [seeds], mean return of the final evaluation
    final_returns: np.ndarray  # [seeds, episodes]
    score: np.ndarray  # [seeds], normalised; nan where the references are not known
    updates: np.ndarray  # [evaluations]
    returns: np.ndarray  # [seeds, evaluations, episodes]
    hours: np.ndarray  # [seeds, evaluations]


def normalized_score(env_id: str, score):
    """(score - random) / (online DQN - random), or nan where these are not known."""
    random, online = REFERENCE_RETURNS.get(env_id, (np.nan, np.nan))
    return (score - random) / (online - random)


def settings(one: run.Run) -> dict:
    """A run's arguments; those that came after an old run have their defaults."""
    script = one.config["script"]
    if not (run.ROOT / script).exists():  # a copy with another name
        return one.config["args"]
    try:
        module = importlib.import_module(script.removesuffix(".py"))
        return run.plain(module.Args()) | one.config["args"]
    except (Exception, SystemExit):  # a user's script, of another kind or half written
        return one.config["args"]


def put_together(runs: list[run.Run], seeds: tuple[int, ...] | None = None) -> Result | None:
    """The runs of a cell as one; None if there are none."""
    if not runs:
        return None
    all_seeds = np.concatenate([x.seeds for x in runs])
    first = np.unique(all_seeds, return_index=True)[1]  # of a seed that two runs have
    order = [i for i in first if seeds is None or all_seeds[i] in seeds]
    if len({(*x.updates, x.returns.shape[2], x.final_returns.shape[1]) for x in runs}) > 1:
        folders = " and ".join(str(x.folder) for x in runs)
        raise SystemExit(f"{folders} were evaluated at other updates or episodes: move one away.")
    names = ("final", "final_returns", "returns", "hours")
    final, final_returns, returns, hours = (
        np.concatenate([getattr(x, name) for x in runs])[order] for name in names
    )
    score = normalized_score(runs[0].config["args"]["env_id"], final)
    rest = (score, runs[0].updates, returns, hours)
    return Result(runs, all_seeds[order], final, final_returns, *rest)


# What the runs learned from
# --------------------------


def describe(data: dict | str) -> str:
    """What a run learned from, in words; old runs on BSuite kept the words themselves."""
    if isinstance(data, str) and not run.data_facts(data):
        return data
    facts = {"source": "", "mean return": None} | run.data_facts(data)
    unit = "transitions" if "transitions" in data else "steps"
    text = f"{facts['episodes']:,} episodes, {facts['steps']:,} {unit}"
    text += f", mean return {facts['mean return']:.2f}" if facts["mean return"] is not None else ""
    return f"{facts['source']}, {text}" if facts["source"] else text


def conflicts(item: Item, cells: dict[tuple, Result | None]) -> list[str]:
    """Sentences on runs that learned from different data, or are evaluated differently."""
    groups, protocols, sources, found = {}, {}, {}, []
    for (method, value, task), result in cells.items():
        for one in result.runs if result else []:
            args, facts = settings(one), run.data_facts(one.config["data"])
            # A run on BSuite describes the whole dataset, one on Atari its share of it.
            share = None if "num_seeds" in args else args.get("data_percent")
            cut_off = args.get("truncation_as_termination", False)
            key = (task, args.get("noise"), cut_off, share)
            name = f"{method} {item.label(value)}".strip()
            text = describe(one.config["data"])
            groups.setdefault(key, []).append((name, facts, text))
            sources.setdefault(facts.get("source", "?"), []).append(f"{name} on {task}")
            protocol = {k: args[k] for k in sorted(EVALUATION & args.keys())}
            for k, v in protocol.items():
                protocols.setdefault(k, {}).setdefault(str(v), []).append(f"{name} on {task}")
    for (task, _, _, share), members in groups.items():
        pairs = itertools.combinations(members, 2)  # old runs do not tell everything
        for (name, facts, text), (other, other_facts, other_text) in pairs:
            if names := run.differing(facts, other_facts):
                data = "the data" if share else "the whole data"
                found.append(
                    f"{data} of {task} differ in {', '.join(names)}: {text} with {name}; "
                    f"{other_text} with {other}"
                )
                break
    sources.pop("?", None)
    for what, values in {"the data's source": sources, **protocols}.items():
        if len(values) > 1:
            words = "; ".join(f"{v} with {names[0]}" for v, names in values.items())
            found.append(f"{what} differs: {words}")
    return found


def left_out(seeds: tuple[int, ...], cells: dict, runs: list, wanted: dict) -> list[str]:
    """Finished runs with a cell's missing seeds but other data or evaluation, and what differs."""
    lines = []
    for key, result in cells.items():
        lacking = {*seeds} - {*(result.seeds if result else ())}
        for one in runs:
            script_args = wanted[key]
            script = f"{type(script_args).__module__}.py"
            if one.config["script"] != script or not lacking & {*one.seeds}:
                continue
            difference = run.different(one, script_args)
            if difference and difference.keys() <= PROTOCOL:
                words = ", ".join(f"{k} {a}, not {b}" for k, (a, b) in difference.items())
                lines.append(f"{one.folder}: {words}")
    return list(dict.fromkeys(lines))


# Statistics
# ----------


def intervals(scores: dict, aggregate: Callable, bootstraps: int | None = None) -> dict:
    """aggregate(scores) and its 95% stratified bootstrap interval, arrays [3, ...], by key."""
    found, reps = {}, bootstraps or BOOTSTRAPS
    for key, values in scores.items():
        # rliable draws from NumPy's global state, even if it is given another. The same runs have
        # the same interval on every page.
        np.random.seed(0)  # noqa: NPY002
        estimates, bounds = library.get_interval_estimates({key: values}, aggregate, reps=reps)
        found[key] = np.stack([estimates[key], *bounds[key]])
    return found


AGGREGATES = {
    "IQM": metrics.aggregate_iqm,
    "mean": metrics.aggregate_mean,
    "median": metrics.aggregate_median,
    "optimality gap": metrics.aggregate_optimality_gap,
}


def score_matrices(item: Item, cells: dict, tasks: tuple[str, ...]) -> dict[tuple, np.ndarray]:
    """Normalised scores [seeds, tasks] by (method, value), where each task has a run."""
    scores = {}
    for method in item.methods:
        for value in item.values:
            column = [cells[method, value, task] for task in tasks]
            if None not in column and not any(np.isnan(x.score).any() for x in column):
                count = min(len(x.seeds) for x in column)
                scores[method, value] = np.stack([x.score[:count] for x in column], axis=1)
    return scores


def aggregates(scores: dict[tuple, np.ndarray]) -> dict[tuple, np.ndarray]:
    """IQM, mean, median and optimality gap with intervals, [3, 4], by key."""
    every = lambda x: np.array([aggregate(x) for aggregate in AGGREGATES.values()])  # noqa: E731
    return intervals(scores, every)


def improvement_probability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y) over pairs of seeds, mean over tasks; ties count half. [seeds, tasks] -> [1]."""
    difference = x[:, None] - y[None]
    return np.array([np.mean((difference > 0) + 0.5 * (difference == 0))])


def permutation_p(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sided p-value of improvement_probability: all exchanges of seeds within the tasks.

    The probability is linear in the sum of x's ranks among both, over all tasks (Mann-Whitney).
    """
    n, total = len(x), len(x) + len(y)
    twice = (2 * rankdata(np.concatenate([x, y]), axis=0)).astype(int)  # ties share half ranks
    chances = np.ones(1)  # of each sum of n ranks a task
    for ranks in twice.T:
        ways = np.zeros((n + 1, ranks.sum() + 1))  # to choose k of the ranks with a sum
        ways[0, 0] = 1
        for rank in ranks:
            ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank]
        chances = np.convolve(chances, ways[n] / ways[n].sum())
    distance = np.abs(np.arange(len(chances)) - n * (total + 1) * x.shape[1])
    return chances[distance >= distance[twice[:n].sum()]].sum()


def pooled_iqm(episodes: np.ndarray) -> np.ndarray:
    """IQM [3] of returns [seeds, episodes], all together, with an interval over seeds."""
    pick = lambda i: np.array([trim_mean(episodes[i[:, 0]].ravel(), 0.25)])  # noqa: E731
    return intervals({"": np.arange(len(episodes))[:, None]}, pick)[""][:, 0]


def curve(returns: np.ndarray) -> np.ndarray:
    """Smoothed IQM of values [seeds, tasks, evaluations, episodes] and its interval, [3, ...]."""
    num_seeds, num_tasks, length, _ = returns.shape

    def pick(index):
        values = returns[index, np.arange(num_tasks)]  # [seeds, tasks, evaluations, episodes]
        values = np.moveaxis(values, 2, -1).reshape(-1, length)
        return smooth(trim_mean(values, 0.25, axis=0))

    index = np.repeat(np.arange(num_seeds)[:, None], num_tasks, axis=1)
    return intervals({"": index}, pick, CURVE_BOOTSTRAPS)[""]


# Figures
# -------


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over the last axis, evaluations."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window(values.shape[-1]), axis=-1)
    return windows.mean(axis=-1)


def window(evaluations: int) -> int:
    return 1 + evaluations // 25


def cell_curve(item: Item, task: str, result: Result) -> np.ndarray:
    """Middle, low and high of a cell's learning curve, [3, evaluations less the average's]."""
    scale = (lambda x: normalized_score(task, x)) if item.unit != "return" else (lambda x: x)
    if item.average == "IQM":
        values = curve(scale(result.returns[:, None]))
    else:
        values = scale(smooth(result.returns.mean(axis=2)))
        mean, std = values.mean(axis=0), values.std(axis=0)
        low = np.maximum(mean - std, values.min(axis=0))  # no seed is beyond
        values = np.stack([mean, low, np.minimum(mean + std, values.max(axis=0))])
    return values


def draw_line(axes, x, values: np.ndarray, color: str, several: bool):
    """A line [3, points] with its band, if it has several seeds."""
    line = axes.plot(x, values[0], color=color, marker="o" if len(x) < 6 else None)[0]
    if several:
        axes.fill_between(x, values[1], values[2], color=color, alpha=0.15, linewidth=0)
    return line


COLORS = {"ROSMO": "C0", "MuZero Unplugged": "C1", "BC": "C2", "CRR": "C3", "CQL": "C4"}
MORE_COLORS = ("C9", "C5", "C6", "C8", "C0", "C1", "C2", "C3", "C4")  # C7 is the lines' grey
LINES = {"random play": ":", "data": "--", "online DQN": "-."}


def color(item: Item, method: str) -> str:
    """One of the five has its own in all figures, and no other method of a figure has it."""
    others = [name for name in item.methods if name not in COLORS]
    taken = {COLORS[name] for name in item.methods if name in COLORS}
    free = [x for x in MORE_COLORS if x not in taken]
    return COLORS.get(method) or free[others.index(method) % len(free)]


def is_published(one: run.Run) -> bool:
    """Whether a run learned from RL Unplugged or DQN Replay, whose rewards may be clipped."""
    source = run.data_facts(one.config["data"]).get("source", "")
    return re.fullmatch(r"(run|replay)\d", source) is not None


def references(task: str, runs: list[run.Run], normalized: bool) -> list[tuple[str, float]]:
    """Mean returns, or scores, of random play, the online DQN and the runs' data, where known."""
    facts = [run.data_facts(x.config["data"]) for x in runs if not is_published(x)]
    means = sorted({x["mean return"] for x in facts if "mean return" in x})
    apart = [y for x, y in itertools.pairwise([-np.inf, *means]) if y - x > run.ROUNDING]
    found = [("data", round(mean, 2)) for mean in apart]
    if task in REFERENCE_RETURNS:
        found += zip(("random play", "online DQN"), REFERENCE_RETURNS[task], strict=True)
    found.sort(key=lambda x: -x[1])
    return [(k, normalized_score(task, v)) for k, v in found] if normalized else found


def draw_references(axes, known: list[tuple[str, float]]) -> None:
    """Lines at known returns. The panel stays cut to its curves; what is beyond is named there."""
    low, high = axes.get_ylim()
    alone = axes.get_autoscaley_on()  # not of a panel that has its limits from another one
    if alone:
        near = 0.25 * (high - low)
        inside = [value for _, value in known if low - near < value < high + near]
        low, high = min([low, *inside]), max([high, *inside])
    above = [f"↑ {name} {value:,.4g}" for name, value in known if value > high]
    below = [f"↓ {name} {value:,.4g}" for name, value in known if value < low]
    if alone:  # with room for these words
        line = 0.09 * (high - low)
        axes.set_ylim(low - line * (0.3 + len(below)), high + line * (0.3 + len(above)))
    for name, value in known:
        axes.axhline(value, color="0.45", linewidth=1, linestyle=LINES[name], zorder=1, label=name)
    style = {"transform": axes.transAxes, "fontsize": "small", "color": "0.3"}
    axes.text(0.02, 0.97, "\n".join(above), va="top", **style)
    axes.text(0.98, 0.03, "\n".join(below), ha="right", **style)


@contextmanager
def replacing(out: Path, *old: str) -> Iterator[Path]:
    """A folder to write into. When all is written its files move to `out`; other `old` ones go."""
    with TemporaryDirectory(prefix=".", dir=out) as folder:
        yield Path(folder)
        new = list(Path(folder).iterdir())
        for path in new:
            path.replace(out / path.name)
        for name in {*old} - {path.name for path in new}:
            (out / name).unlink(missing_ok=True)


def panels(count: int, width: float = 3.6) -> tuple[Figure, list]:
    """A figure of so many panels that can be read at a page's width, and their axes."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = Figure((max(width * columns, 5.6), 2.6 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def finish(figure: Figure, drawn: dict, note: str, path: Path) -> None:
    """Saves a figure with its legend: what was drawn, the lines of known returns, and a note."""
    for axes in figure.axes:
        drawn |= {x.get_label(): x for x in axes.lines if x.get_label() in LINES}
    width = figure.get_figwidth()
    style = {"title": textwrap.fill(note, int(15 * width)), "title_fontsize": "small"}
    style |= {"frameon": False, "loc": "outside upper center"}
    for columns in range(int(width / 1.8), 0, -1):  # as many as there is room for
        legend = figure.legend(drawn.values(), drawn.keys(), ncols=columns, **style)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.savefig(path, dpi=120)


def draw_curves(item: Item, cells: dict, path: Path, against: str, note: str) -> None:
    """Panels of learning curves against updates or hours; those without a run are left out."""
    tasks = dict.fromkeys(task for _, _, task in cells)
    shown = [
        (value, task)
        for value in item.values
        for task in tasks
        if any(cells[method, value, task] for method in item.methods)
    ]
    figure, grid = panels(len(shown))
    several, drawn, first = len({task for _, task in shown}) > 1, {}, {}
    hours = [x.hours[:, -1].mean() for x in cells.values() if x and len(x.updates)]
    for axes, (value, task) in zip(grid, shown, strict=True):
        if first.setdefault(task, axes) is not axes:
            axes.sharey(first[task])
        for method in item.methods:
            result = cells[method, value, task]
            if result and len(result.updates):  # else it was trained without evaluations
                n = window(len(result.updates))
                x = (result.updates if against == "updates" else result.hours.mean(axis=0))[n - 1 :]
                line = cell_curve(item, task, result)
                style = (color(item, method), len(result.seeds) > 1)
                drawn[method] = draw_line(axes, x, line, *style)
        if against == "hours" and max(hours) > 5 * min(hours):  # cells that differ widely
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_minor_formatter("")
        else:
            axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(thousands)
        words = (task if several or not item.argument else "", item.label(value))
        axes.set_title(", ".join(filter(None, words)), fontsize="medium")
    for axes, (value, task) in zip(grid, shown, strict=True):
        results = [cells[method, value, task] for method in item.methods]
        runs = [one for result in results if result for one in result.runs]
        draw_references(axes, references(task, runs, item.unit != "return"))
    figure.supxlabel(against, fontsize="medium")
    task = "" if several or not item.argument else f", {shown[0][1]}"  # else it is in the titles
    figure.supylabel(f"{item.unit}{task}", fontsize="medium")
    finish(figure, drawn, note, path)


def thousands(x: float, _) -> str:
    return f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"


def draw_run(one: run.Run) -> None:
    """learning_curve.png of a run: the moving averages of its seeds' returns, and their mean."""
    task, n = one.config["args"]["env_id"], window(len(one.updates))
    curves, x = smooth(one.returns.mean(axis=2)), one.updates[n - 1 :]
    figure, (axes,) = panels(1, 7)
    several = len(curves) > 1
    if several:
        seeds = axes.plot(x, curves.T, color="C0", alpha=0.3, linewidth=1)
    mean = draw_line(axes, x, curves.mean(axis=0)[None], "C0", False)
    drawn = {"mean of the seeds": mean, "a seed": seeds[0]} if several else {"one seed": mean}
    draw_references(axes, references(task, [one], False))
    stem = one.config["script"].removesuffix("_atari.py").removesuffix("_bsuite.py")
    names = {v: k for k, v in ALGORITHMS.items()} | {"morel": "MOReL", "combo": "COMBO"}
    folder = textwrap.fill(str(one.folder), 80)
    name = names.get(stem, one.config["script"])
    axes.set_title(f"{name} on {task}\n{folder}", fontsize="medium")
    axes.xaxis.set_major_formatter(thousands)
    axes.set(xlabel="updates", ylabel="return")
    note = f"Moving averages over {n} evaluations." if n > 1 else "Single evaluations."
    with replacing(one.folder) as new:
        finish(figure, drawn, note, new / "learning_curve.png")


def pooled_curves(item: Item, cells: dict, tasks: tuple[str, ...]) -> dict[str, tuple]:
    """(updates, hours, IQM [3, ...] over all tasks, seeds), by method that has all tasks."""
    curves = {}
    for method in item.methods:
        row = [cells[method, None, task] for task in tasks]
        known = all(task in REFERENCE_RETURNS for task in tasks)
        if known and None not in row and all(len(x.updates) for x in row):
            count = min(len(x.seeds) for x in row)
            scores = [
                normalized_score(task, x.returns[:count].mean(axis=2, keepdims=True))
                for task, x in zip(tasks, row, strict=True)
            ]
            n = window(len(row[0].updates))
            hours = np.mean([x.hours[:count] for x in row], axis=(0, 1))[n - 1 :]
            line = curve(np.stack(scores, axis=1))
            curves[method] = (row[0].updates[n - 1 :], hours, line, count)
    return curves


NORMALIZED = [("online DQN", 1.0), ("random play", 0.0)]


def draw_pooled(item: Item, curves: dict, path: Path, with_time: bool, note: str) -> None:
    """Curves over all tasks [3, evaluations], against updates and, if known, against hours."""
    figure, row = panels(1 + with_time, 4.8)
    drawn = {}
    for axes, (i, label) in zip(row, enumerate(("updates", "hours")), strict=False):
        for method, points in curves.items():
            style = (color(item, method), points[3] > 1)
            drawn[method] = draw_line(axes, points[i], points[2], *style)
        if item.level:
            line = axes.axhline(item.level[0], color="0.7", linewidth=0.8)
            drawn[f"{item.level[0]:.0%} of the online DQN"] = line
        draw_references(axes, NORMALIZED)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(label)
    row[0].xaxis.set_major_formatter(thousands)
    row[0].set_ylabel("IQM of the normalised score")
    finish(figure, drawn, note, path)


def draw_aggregate(item: Item, cells: dict, estimates: dict, path: Path, note: str) -> None:
    """One panel for all tasks, where they have been run, and one for each; values with a run."""
    tasks = list(dict.fromkeys(task for *_, task in cells))
    scores = {task: score_matrices(item, cells, (task,)) for task in tasks}
    shown = {"all tasks": estimates} if len(tasks) > 1 and estimates else {}
    shown |= {task: aggregates(values) for task, values in scores.items() if values}
    finished = {value for estimates in shown.values() for _, value in estimates}
    ticks = [value for value in item.values if value in finished]
    figure, grid = panels(len(shown))
    drawn = {}
    for axes, (name, estimates) in zip(grid, shown.items(), strict=True):
        if axes is not grid[0]:
            axes.sharey(grid[0])
        for i, method in enumerate(item.methods):
            values = [value for value in ticks if (method, value) in estimates]
            if values:
                points = np.transpose([estimates[method, value][:, 0] for value in values])
                aside = 0.1 * (i - (len(item.methods) - 1) / 2)  # no method hides another
                x = [ticks.index(value) + aside for value in values]
                style = {"color": color(item, method), "marker": "os^D"[i % 4], "markersize": 5}
                drawn[method] = axes.plot(x, points[0], **style)[0]
                axes.vlines(x, points[1], points[2], color=style["color"], linewidth=2, alpha=0.5)
        labels = [f"{x:g}" if isinstance(x, float) else x for x in ticks]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        axes.set_title(name, fontsize="medium")
    for axes in grid:
        draw_references(axes, NORMALIZED)
    figure.supxlabel(item.axis, fontsize="medium")
    figure.supylabel("IQM of the normalised score", fontsize="medium")
    finish(figure, drawn, note, path)


def draw_profiles(item: Item, scores: dict, path: Path) -> None:
    """Share of the runs whose score is above τ, a panel for each value."""
    values = [v for v in item.values if any(key[1] == v for key in scores)]
    every = np.concatenate([x.ravel() for x in scores.values()])
    tau = np.linspace(min(0.0, every.min()), max(1.0, every.max()), 61)
    above = lambda x: (x[..., None] > tau).mean(axis=(0, 1))  # noqa: E731
    profiles = intervals(scores, above, min(BOOTSTRAPS, 500))
    figure, grid = panels(len(values))
    drawn = {}
    for axes, value in zip(grid, values, strict=True):
        for method in item.methods:
            if (method, value) in scores:
                line, several = profiles[method, value], len(scores[method, value]) > 1
                drawn[method] = draw_line(axes, tau, line, color(item, method), several)
        axes.set_title(item.label(value), fontsize="medium")
    figure.supxlabel("normalised score τ", fontsize="medium")
    figure.supylabel("share of the runs above τ", fontsize="medium")
    finish(figure, drawn, "Shaded: 95% stratified bootstrap intervals.", path)


# Pages
# -----


def table(head: list, rows: list[list]) -> list[str]:
    rows = [[str(x).replace("|", "\\|") for x in row] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return [first, "|" + "---|" * len(head), *others, ""]


def swept(item: Item, *text) -> list:
    """Cells of a table that items without a swept argument do not have."""
    return list(text) if item.argument else []


def with_interval(estimate, several: bool = True) -> str:
    middle, low, high = estimate
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]" if several else f"{middle:.3f}"


def returns_text(item: Item, result: Result | None, asked: int) -> str:
    """The final return of a cell, and its number of seeds if it is not the one asked for."""
    if result is None or not result.final_returns.size:  # none, or without a final evaluation
        return ""
    count = len(result.seeds)
    if item.average == "IQM":
        text = with_interval(pooled_iqm(result.final_returns), count > 1)
    else:
        text = f"{result.final.mean():.3f}"
        text += f" ± {result.final.std():.3f}" if count > 1 else ""
    return text + few_seeds(count, asked)


def few_seeds(count: int, asked: int) -> str:
    return "" if count == asked else f" ({count} seed{'s' * (count > 1)})"


def result_tables(item: Item, cells: dict, tasks: tuple[str, ...]) -> list[str]:
    """Final returns: a table for each task, or one of all where nothing is swept."""
    text = {key: returns_text(item, result, len(item.seeds)) for key, result in cells.items()}
    if item.argument is None:
        rows = [[task, *(text[m, None, task] for m in item.methods)] for task in tasks]
        return table(["task", *item.methods], rows)
    lines = []
    for task in tasks:
        if not any(result for key, result in cells.items() if key[2] == task):
            continue
        rows = [[m, *(text[m, v, task] for v in item.values)] for m in item.methods]
        lines += table([task, *map(item.label, item.values)], rows)
    return lines


def reference_table(cells: dict) -> list[str]:
    """Mean returns of random play, the online DQN and the data, here and in the paper."""
    found = {}
    for (_, _, task), result in cells.items():
        for one in result.runs if result else []:
            found.setdefault((task, one.config["args"].get("noise")), []).append(one)
    rows = []
    for (task, noise), runs in found.items():
        here = [f"{value:,.2f}" for name, value in references(task, runs, False) if name == "data"]
        known = [f"{value:,.2f}" for value in REFERENCE_RETURNS.get(task, ())] or ["-", "-"]
        theirs = f"{TABLE5[task, noise][1]:,.2f}" if (task, noise) in TABLE5 else "-"
        name = f"{task}, noise ε = {noise:g}" if noise else task
        rows.append([name, *known, " or ".join(here) or "-", theirs])
    head = ["mean return", "random play", "online DQN", "data here", "data in the paper"]
    source = "Random play and the online DQN: Table 6 on BSuite, RL Unplugged's returns on Atari."
    if any(is_published(x) for r in cells.values() if r for x in r.runs):
        source += " The published data are left out: their rewards may be clipped to -1..1."
    return [*table(head, rows), source, ""]


def paper_table(item: Item, cells: dict, estimates: dict) -> list[str]:
    """Our numbers beside the paper's, where its text has them."""
    rows = []
    for (method, value, task), (theirs, spread) in item.numbers.items():
        if task == "IQM":
            whole = (method, value) in estimates and {key[2] for key in cells} == {*item.tasks}
            ours = estimates[method, value][0, 0] if whole else None
        else:
            result = cells.get((method, value, task))
            evaluated = result is not None and result.final_returns.size
            ours = result.final.mean() if evaluated else None
            if evaluated and item.average == "IQM":
                ours = trim_mean(result.final_returns.ravel(), 0.25)
        if ours is not None:
            difference = f"{ours - theirs:+,.2f} ({(ours - theirs) / abs(theirs):+.0%})"
            paper = f"{theirs:,.2f}" + ("" if np.isnan(spread) else f" ± {spread:,.2f}")
            rows.append([task, method, f"{ours:,.2f}", paper, difference])
    head = ["task", "method", "here", "paper", "difference"]
    title = "## Beside the paper's numbers" if rows else "## Reference returns"
    return [title, "", *(table(head, rows) if rows else [])]


def level_table(item: Item, curves: dict, with_time: bool) -> list[str]:
    """When each method's curve reaches the item's level for the first time."""
    level, hours = item.level
    rows = []
    for method, (updates, time, line, _) in curves.items():
        reached = np.flatnonzero(line[0] >= level)
        first = reached[0] if len(reached) else None
        rows.append([method, f"{updates[first]:,}" if len(reached) else "never"])
        rows[-1].append(f"{time[first]:.2f}" if len(reached) and with_time else "-")
        rows[-1].append(f"{hours[method]:g}" if method in hours else "-")
    head = ["method", f"updates until {level:.0%}", "hours here", "hours in the paper (TPUv3-8)"]
    return table(head, rows)


def statistics(item: Item, scores: dict, tasks: tuple, estimates: dict) -> list[str]:
    """Aggregate metrics, and probabilities that one method's seed is better than another's."""
    if not any(x.size > 1 for x in scores.values()):
        return []
    rows = []
    for (method, value), seeds in scores.items():
        columns = dict(zip(AGGREGATES, estimates[method, value].T, strict=True))
        if len(tasks) == 1:  # of the tasks' means
            del columns["median"]
        texts = [with_interval(x, len(seeds) > 1) for x in columns.values()]
        rows.append([method, *swept(item, item.label(value)), *texts])
    lines = ["## Normalised scores", ""]
    lines += table(["method", *swept(item, item.axis), *columns], rows)
    best = "ROSMO" if "ROSMO" in item.methods else next(iter(item.methods))
    pairs = {
        (f"{best} > {m}", v): [scores[best, v], x]
        for (m, v), x in scores.items()
        if m != best and (best, v) in scores
    }
    if pairs:
        chances, rows = intervals(pairs, improvement_probability), []
        for (name, value), both in pairs.items():
            chance = with_interval(chances[name, value][:, 0], max(map(len, both)) > 1)
            if min(map(len, both)) > 1:
                p = permutation_p(*both)
                chance += f", p = {p:.3f}" if p >= 0.001 else ", p < 0.001"
            rows.append([name, *swept(item, item.label(value)), chance])
        lines += table(["probability of improvement", *swept(item, item.axis), ""], rows)
    names = "all tasks together" if len(tasks) > 1 else tasks[0]
    several = any(len(x) > 1 for x in scores.values())
    bounds = ", with 95% intervals of a stratified bootstrap" if several else ""
    test = "; p: exact two-sided permutation test" if any(", p" in line for line in lines) else ""
    lines += [f"Over seeds and {names}{bounds}{test}. The words: docs/metrics.md, Scores.", ""]
    return lines


def time_table(item: Item, cells: dict) -> list[str]:
    """Hours of a run by the part of the work, where the runs tell."""
    rows, several = [], len({task for _, _, task in cells}) > 1
    for method in item.methods:
        for value in item.values:
            runs = [x for k, r in cells.items() if r and k[:2] == (method, value) for x in r.runs]
            runs = [x for x in runs if any(x.seconds.values())]
            if runs:
                mean = [np.mean([x.seconds[part] for x in runs]) / 3600 for part in run.PARTS]
                label = swept(item, item.label(value))
                label += [", ".join({x.config["args"]["env_id"]: 0 for x in runs})] * several
                devices = dict.fromkeys(s["device"] for x in runs for s in x.config["starts"])
                label.append(" or ".join(map(str, sorted({len(x.seeds) for x in runs}))))
                rows.append([method, *label, *(f"{x:.3f}" for x in mean), ", ".join(devices)])
    head = ["hours of a run", *swept(item, item.axis), *["mean over"] * several, "seeds at once"]
    head += ["compilation", "data wait", "update", "evaluation", "device"]
    note = "Means over runs. A run trains the seeds at once side by side: rows with other numbers "
    note += "of them, or other tasks, do not compare."
    return ["## Time", "", *table(head, rows), note, ""] if rows else []


def halting_table(cells: dict) -> list[str]:
    """Of MOReL: the threshold, which replays it halts, and the imagined episodes of PPO.

    A line of metrics.jsonl has means over its updates, and lacks those over episodes if none ended.
    Its mean return without penalties is `charts/episode_return` - `charts/halt_rate` · penalty.
    """
    rows = []
    for (method, _, task), result in cells.items():
        for one in result.runs if result else []:
            lines = run.read_lines(one.folder)
            for first in [x for x in lines if "charts/halt_rate_logged" in x]:
                threshold = first.get("charts/threshold", np.nan)
                row = [method, task, str(first["seed"]), f"{threshold:.4f}"]
                row += [f"{first[f'charts/halt_rate_{x}']:.1%}" for x in ("logged", "random")]
                training = [x for x in lines if "charts/episodes" in x]
                steps = np.diff([0, *(x["update"] for x in training)])
                names = ("charts/episodes", "charts/halt_rate", "charts/episode_return")
                ended = [[n, *map(x.get, names)] for n, x in zip(steps, training, strict=True)]
                updates, each, rate, paid = np.array(ended, float).reshape(-1, 4).T
                halted = np.nansum(updates * each * rate)
                row.append(f"{halted:,.0f} of {(updates * each).sum():,.0f}")
                pays = (paid - rate * one.config["args"].get("halt_penalty", np.nan))[each > 0]
                row.append(f"{pays.min():.2f} to {pays.max():.2f}" if pays.size else "-")
                for name in ("eval/returns", "final/returns", "final/returns_greedy"):
                    returns = [x for line in lines for x in line.get(name, [])]
                    text = f"{np.mean(returns):.2f}" if returns else "-"
                    if returns[1:]:
                        text += f" ± {np.std(returns, ddof=1) / np.sqrt(len(returns)):.2f}"
                    row.append(text)
                rows.append(row)
    head = ["", "task", "seed", "threshold", "logged replays that halt", "random ones"]
    head += ["imagined episodes that halt", "mean imagined return without penalties, by line"]
    head += ["return of the evaluations", "final", "greedy"]
    note = "Returns in the game ± standard error over all episodes of a column."
    return ["## Imagined episodes", "", *table(head, rows), note, ""] if rows else []


def caption(item: Item, found: list[Result], estimates: dict) -> str:
    """What the tables of a page hold."""
    counts = sorted({r.final_returns.shape[1] for r in found} - {0})
    episodes = f"{' or '.join(map(str, counts))} episodes"
    if not counts:
        text = "No run has a final evaluation."
    elif all(len(r.seeds) == 1 for r in found):
        what = "IQM of the final returns" if item.average == "IQM" else "Final mean return"
        text = f"{what}, {episodes}. One seed in each cell: there is no interval, and "
        text += "a difference may be chance."
    elif item.average == "IQM":
        text = f"IQM of the returns of all seeds' final {episodes}, with its 95% bootstrap "
        text += "interval over seeds."
    else:
        text = "Mean and standard deviation (over n, not n - 1) of the seeds' final mean returns, "
        text += f"{episodes} each."
    if estimates and not item.form.startswith("table"):
        text += " The first table has the interquartile mean (IQM) of the normalised score over "
        text += "seeds and tasks, and its 95% stratified bootstrap interval if there are several."
    return text


def with_few_seeds(item: Item, found: list[Result]) -> str:
    few = sum(len(r.seeds) < len(item.seeds) for r in found)
    return f", {few} of them with fewer than {len(item.seeds)} seeds" if few else ""


def figure_note(item: Item, cells: dict) -> str:
    """What a figure of an item shows: averages, what is shaded, and how much is missing."""
    found = [result for result in cells.values() if result]
    single = all(len(r.seeds) == 1 for r in found)
    sizes = sorted({window(len(r.updates)) for r in found})
    average = f"Moving averages over {' or '.join(map(str, sizes))} evaluations"
    average = average if sizes[-1] > 1 else "Single evaluations"
    if item.form == "aggregate":
        text = "IQM over seeds and tasks. "
        text += "One seed in each cell." if single else "Bars: 95% stratified bootstrap intervals."
    elif single:
        text = f"{average}. One seed in each cell."
    elif item.form == "pooled curves":
        text = f"{average}. Shaded: 95% stratified bootstrap intervals."
    elif item.average == "IQM":
        text = f"{average}, IQM over seeds and episodes. Shaded: 95% intervals over seeds."
    else:
        text = f"{average}, mean over seeds. Shaded: the standard deviation over seeds, but not "
        text += "beyond the lowest and the highest seed."
    few = with_few_seeds(item, found)
    if len(found) < len(cells) or few:
        text += f" {len(found)} of {len(cells)} cells{few}."
    return text


def not_run(item: Item, cells: dict) -> str:
    """The cells without a run, those of a method with the same values together."""
    groups = {}
    for (method, value, task), result in cells.items():
        if result is None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            groups.setdefault((method, task), []).append(text)
    tasks = {}
    for (method, task), values in groups.items():
        tasks.setdefault((method, tuple(values)), []).append(task)
    words = []
    for (method, values), names in tasks.items():
        with_values = "" if len(values) == len(item.values) else f", {item.column}"
        *first, last = values
        with_values = with_values.format(f"{', '.join(first)} and {last}" if first else last)
        words.append(f"{method}{with_values} on {', '.join(names)}")
    return "; ".join(words)


def runs_table(item: Item, cells: dict) -> list[str]:
    rows = []
    for (method, value, task), result in cells.items():
        if result:
            configs = [x.config for x in result.runs]
            starts = [start for config in configs for start in config["starts"]]
            commits = [start.get("commit") or "unknown" for start in starts]
            commits = dict.fromkeys(x[:7] + "-dirty" * x.endswith("-dirty") for x in commits)
            devices = dict.fromkeys(start["device"] for start in starts)
            texts = dict.fromkeys(describe(config["data"]) for config in configs)
            updates = dict.fromkeys(f"{config['args']['total_updates']:,}" for config in configs)
            folders = [f"`{x.folder}`" for x in result.runs]
            cell = ", ".join(filter(None, (task, item.label(value))))
            row = [method, cell, len(result.seeds), "; ".join(updates), ", ".join(commits)]
            rows.append([*row, "; ".join(devices), "; ".join(texts), ", ".join(folders)])
    head = ["Method", "Cell", "Seeds", "Updates", "Commit", "Device", "Data", "Folder"]
    return ["## Runs", "", *table(head, rows)]


def write_csv(item: Item, cells: dict, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("task", "seed", "return", "normalized_score")
        writer.writerow(("method", item.argument or "value", *names))
        for (method, value, task), result in cells.items():
            if result:
                rows = zip(result.seeds, result.final, result.score, strict=True)
                writer.writerows((method, value, task, *row) for row in rows)


FIGURES = ("", "-time", "-profiles")  # that a page may have


def write_page(
    name: str, item: Item, cells: dict, tasks: tuple, notes: list, words: list[str], out: Path
) -> None:
    """{name}.md, {name}.csv and the figures of an item; `words` are the command's."""
    found = [result for result in cells.values() if result]
    scores = score_matrices(item, cells, tasks)
    estimates = aggregates(scores)
    devices = {s["device"] for r in found for x in r.runs for s in x.config["starts"]}
    told = all(any(x.seconds.values()) for r in found for x in r.runs)  # what evaluation took
    sizes = {len(x.seeds) for r in found for x in r.runs}  # trained side by side
    with_time = len(devices) == len(sizes) == 1 and told
    curves, extra, note = {}, [], figure_note(item, cells)
    has_curves = any(len(r.updates) for r in found) and "curves" in item.form
    images = {"": item.title}
    if item.form == "aggregate" and any(score_matrices(item, cells, (t,)) for t in tasks):
        draw_aggregate(item, cells, estimates, out / f"{name}.png", note)
    elif item.form == "pooled curves" and (curves := pooled_curves(item, cells, tasks)):
        draw_pooled(item, curves, out / f"{name}.png", with_time, note)
        extra = level_table(item, curves, with_time) if item.level else []
    elif item.form != "pooled curves" and has_curves:
        draw_curves(item, cells, out / f"{name}.png", "updates", note)
        if with_time:
            draw_curves(item, cells, out / f"{name}-time.png", "hours", note)
            images["-time"] = f"{item.title}, against wall-clock"
    has_curves = has_curves and (item.form != "pooled curves" or bool(curves))
    several = any(len(x) > 1 for x in scores.values())
    summary = item.of is None or item.form == "pooled curves"
    if len(tasks) > 1 and scores and several and summary:
        draw_profiles(item, scores, out / f"{name}-profiles.png")
        images["-profiles"] = "Performance profiles: share of the runs above a score"

    lines = [f"# {item.title}", ""]
    if item.claim:
        lines += [f"The paper's claim: {item.claim}", ""]
    if estimates and not item.form.startswith("table"):
        text = {k: with_interval(estimates[k][:, 0], len(x) > 1) for k, x in scores.items()}
        text = {k: text[k] + few_seeds(len(x), len(item.seeds)) for k, x in scores.items()}
        rows = [[m, *(text.get((m, v), "") for v in item.values)] for m in item.methods]
        lines += table(["IQM", *(item.label(v) or "all tasks" for v in item.values)], rows)
    lines += extra + result_tables(item, cells, tasks)
    lines += [caption(item, found, estimates), ""]
    short = [key for key, x in scores.items() for t in tasks if len(cells[*key, t].seeds) > len(x)]
    if short:
        names = dict.fromkeys(f"{m} {item.label(v)}".strip() for m, v in short)
        text = "Over all tasks, each counts with as many seeds as the task with the fewest has"
        lines += [f"{text}: {', '.join(names)}.", ""]
    for suffix, text in images.items():
        if (out / f"{name}{suffix}.png").exists():
            lines += [f"![{text}]({name}{suffix}.png)", ""]
    if (out / f"{name}.png").exists():
        known = "scores of random play and of the online DQN"
        if has_curves and item.form != "pooled curves":
            known = "mean returns" if item.unit == "return" else "scores"
            known += " of random play, of the online DQN and, where runs tell it and the data are "
            known += "not the published ones, of the data (on BSuite of the whole dataset)"
        lines += [f"{note} Lines: {known}; those beyond a panel are named at its edge.", ""]
    if has_curves and with_time:
        lines += ["Hours are those of training, without evaluation.", ""]
    if any("model_updates" in settings(x) for r in found for x in r.runs):
        lines += ["The hours of MOReL and COMBO are without those of the world model.", ""]
    if has_curves and not with_time:
        why = "not all runs tell what evaluation took"
        why = "runs train other numbers of seeds side by side" if len(sizes) > 1 else why
        why = f"the devices differ ({', '.join(sorted(devices))})" if len(devices) > 1 else why
        lines += [f"No curves against wall-clock: {why}.", ""]
    lines += [f"{len(found)} of {len(cells)} cells are finished{with_few_seeds(item, found)}.", ""]
    if len(found) < len(cells):
        lines[-2] += f" Not finished: {not_run(item, cells)}."
    for text in notes:
        lines += [text, ""]
    if item.claim and not item.numbers and not name.endswith("_small"):
        lines += ["The paper's own numbers of this item are not copied here.", ""]
    lines += paper_table(item, cells, estimates)
    lines += reference_table(cells)
    lines += statistics(item, scores, tasks, estimates) if summary else []
    lines += halting_table(cells) + time_table(item, cells) + runs_table(item, cells)
    lines += [f"Made by `{shlex.join(words)}`."]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_csv(item, cells, out / f"{name}.csv")


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 0 1rem;
       color: #222; background: #fff; }
nav a { display: inline-block; margin: 0 .8rem .3rem 0; }
h1 { font-size: 1.5rem; margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h2 { font-size: 1.1rem; }
.scroll { overflow-x: auto; }
.scroll img { max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
code { background: #f2f2f2; overflow-wrap: anywhere; }
"""


def write_html(out: Path) -> None:
    """report.html: the pages of items and of compare, with the images in the file."""
    order = [*ITEMS, "compare"]
    pages = sorted(
        (path for path in out.glob("*.md") if path.stem in order),
        key=lambda path: order.index(path.stem),
    )
    markdown, parts, links = MarkdownIt("commonmark", {"html": False}).enable("table"), [], []

    def embed(match) -> str:
        path = out / match[1]
        if not path.exists():
            return match[0]
        data = path.read_bytes()
        width = int.from_bytes(data[16:20], "big") // 2  # narrower it could not be read
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        return f'style="min-width:{width}px" src="{source}"'

    for path in pages:
        text = path.read_text(encoding="utf-8", errors="replace")
        text, _, runs = text.partition("## Runs\n")
        html = markdown.render(text)
        html += f"<details><summary>Runs</summary>{markdown.render(runs)}</details>"
        html = re.sub(r'src="([^"]+\.png)"', embed, html)
        html = html.replace("<table>", '<div class="scroll"><table>')
        html = html.replace("</table>", "</table></div>")
        html = html.replace("<p><img", '<p class="scroll"><img')
        parts.append(f'<section id="{path.stem}">{html}</section>')
        title = text.partition("\n")[0].removeprefix("# ").partition(":")[0]
        links.append(f'<a href="#{path.stem}">{title}</a>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page = f"<!doctype html><html lang=en><head>{head}<title>ROSMO suite: results</title>"
    page += f"<style>{STYLE}</style></head><body><nav>{''.join(links)}</nav>"
    page += f"{''.join(parts)}</body></html>\n"
    with replacing(out) as new:
        (new / "report.html").write_text(page, encoding="utf-8")


# Commands
# --------


def refuse_conflicts(item: Item, cells: dict, mix: bool, name: str) -> list[str]:
    """Ends the program if runs cannot be compared; with --mix, notes for the page."""
    found = conflicts(item, cells)
    if found and not mix:
        message = f"{name} would mix runs that cannot be compared: {'; and '.join(found)}"
        raise SystemExit(f"{message}. Choose folders with --runs, or give --mix.")
    return [f"Mixed runs: {text}." for text in found]


def draw_item(name: str, item: Item, runs: list, args: Args, further: list[str]) -> bool:
    """Writes an item's page; False if there is no run of it."""
    wanted = {tuple(cell[:3]): a for cell, a in run.cell_args(item, args, further)}
    seeds = args.seeds or item.seeds
    if args.greedy:
        ungreedy = [x for x in runs if not x.greedy_returns.size]
        untold = sum(any(run.find_runs([x], a, seeds) for a in wanted.values()) for x in ungreedy)
        greedy = [(x, x.greedy_returns) for x in runs if x.greedy_returns.size]
        runs = [x._replace(final=y.mean(axis=1), final_returns=y) for x, y in greedy]
    cells = {key: put_together(run.find_runs(runs, a, seeds), seeds) for key, a in wanted.items()}
    nearly = left_out(seeds, cells, runs, wanted)
    updates = sorted({a.total_updates for a in wanted.values()})
    if not any(cells.values()):
        where = ", ".join(map(str, args.runs))
        message = f"No run of {name} with {updates[-1]:,} updates in {where}."
        message += f" {untold} lack greedy returns." if args.greedy and untold else ""
        message += f" These do not count: {'; '.join(nearly)}." if nearly else ""
        print(message, file=sys.stderr)
        return False
    notes = refuse_conflicts(item, cells, args.mix, name)
    if nearly:
        more = f"; and {len(nearly) - 10} more" if len(nearly) > 10 else ""
        notes.append(f"Left out, as they differ: {'; '.join(nearly[:10])}{more}.")
    if args.greedy:
        notes.append(
            "Final returns and scores are of greedy actions, curves of the evaluations in training."
        )
        notes[-1] += f" Runs that have none count as not finished: {untold}." if untold else ""
    other, asked = [], args.total_updates or item.total_updates
    if asked != item.total_updates:
        other.append(f"{asked:,} updates, not {item.total_updates:,}")
    tasks = args.env_ids or item.tasks
    other += [f"on {', '.join(tasks)}"] if set(tasks) != set(item.tasks) else []
    if args.seeds and set(args.seeds) != set(item.seeds):
        other.append(f"seeds {', '.join(map(str, args.seeds))}")
    item = item._replace(seeds=seeds)
    options = [words for k, words in run.split_options(further) if k not in run.NOT_COMPARED]
    other += [f"`{shlex.join(itertools.chain(*options))}`"] if options else []
    sources = {
        run.data_facts(x.config["data"]).get("source") for r in cells.values() if r for x in r.runs
    }
    other += ["data of a local online DQN, not of RL Unplugged"] if "dqn" in sources else []
    if other and not name.endswith("_small") and not name.startswith("sweep"):
        notes.append(f"Not the paper's setting: {'; '.join(other)}.")
    if item.form == "curves" and not set(tasks) <= REFERENCE_RETURNS.keys():
        item = item._replace(unit="return")  # for want of the references
    words = ["python", "benchmark/report.py", name]
    for option in ("methods", "seeds", "env_ids", "total_updates"):
        value = getattr(args, option)
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{option.replace('_', '-')}", *map(str, values)] if value else []
    if args.runs != run.Args.runs:
        words += ["--runs", *map(str, args.runs)]
    words += ["--mix"] * args.mix + further
    words += ["--greedy"] * args.greedy
    words += ["--out", str(args.out)] if args.out.resolve() != RESULTS.resolve() else []
    with replacing(args.out, *(f"{name}{suffix}.png" for suffix in FIGURES)) as out:
        write_page(name, item, cells, tasks, notes, words, out)
    done = sum(result is not None for result in cells.values())
    print(f"{name}: {done} of {len(cells)} cells, see {args.out}/{name}.md.")
    return True


def compare(pairs: tuple[str, ...], args: Args) -> None:
    """Draws folders of runs side by side, each under its label."""
    if not pairs:
        raise SystemExit("Give LABEL=FOLDER for each setting to compare.")
    cells, tasks, unfinished = {}, {}, []
    for pair in pairs:
        label, _, folder = pair.partition("=")
        if not label.isprintable() or {*"$<*[]`"} & {*label}:
            raise SystemExit(f"{pair!a}: a label has printable characters, without $ < * [ ] `.")
        if label in LINES:
            raise SystemExit(f"{pair}: the line of {label} is called so; choose another label.")
        named = label and folder
        runs = run.read_runs((Path(os.path.expanduser(folder)),), unfinished) if named else []
        if not runs:
            message = f"{pair} is not LABEL=FOLDER with a finished run in {folder or 'the folder'}"
            raise SystemExit(f"{message}; a label ends at the first '='.")
        for one in runs:
            tasks.setdefault(one.config["args"]["env_id"], {}).setdefault(label, []).append(one)
    labels = list(dict.fromkeys(pair.partition("=")[0] for pair in pairs))
    varies = {}
    for task, by_label in tasks.items():
        for label in labels:
            runs = by_label.get(label, [])
            seeds = [int(seed) for one in runs for seed in one.seeds]
            if len(seeds) != len(set(seeds)):
                message = f"{label} holds several runs of the same seed"
                raise SystemExit(f"{message}; name a folder of one setting.")
            cells[label, None, task] = put_together(runs)
            for one in runs:
                known = settings(one) | {"script": one.config["script"]}
                for k in known.keys() - (run.NOT_COMPARED - {"world_model"}) - {"env_id"}:
                    varies.setdefault(k, {}).setdefault(label, set()).add(json.dumps(known[k]))
    title, most = f"Own runs: {', '.join(labels)}", max(len(x.seeds) for x in cells.values() if x)
    item = Item(title, "curves", dict.fromkeys(labels), tuple(tasks), tuple(range(most)))
    notes = refuse_conflicts(item, cells, args.mix, "compare")
    lines = []
    for name, by_label in sorted(varies.items()):
        if len(set().union(*by_label.values())) > 1:
            words = ", ".join(f"{label} {' or '.join(sorted(x))}" for label, x in by_label.items())
            lines.append(f"{name}: {words}")
    notes += [f"Arguments that differ: {'; '.join(lines)}."] if lines else []
    notes += [f"Left out, as not finished: {', '.join(unfinished)}."] if unfinished else []
    words = ["python", "benchmark/report.py", "compare", *pairs] + ["--mix"] * args.mix
    words += ["--out", str(args.out)] if args.out.resolve() != OWN_RESULTS.resolve() else []
    with replacing(args.out, *(f"compare{suffix}.png" for suffix in FIGURES)) as out:
        write_page("compare", item, cells, tuple(tasks), notes, words, out)


def main(args: Args, further: list[str]) -> None:
    if args.dry_run or args.launcher == "slurm":
        print("The report can be made when the runs are finished.", file=sys.stderr)
        return
    is_compare, is_curves = args.items[:1] == ("compare",), args.items[:1] == ("curves",)
    chosen = args.methods or args.env_ids or args.seeds or args.total_updates
    chosen = chosen or args.runs != Args.runs or (is_curves and args.out)
    if is_compare or is_curves:
        if args.greedy:
            raise SystemExit(f"--greedy is not for {args.items[0]}.")
        if further:
            raise SystemExit(f"{args.items[0]} has no option {further[0]}.")
        if chosen:
            raise SystemExit(f"{args.items[0]} draws the folders that are named, whole.")
    if is_curves:
        folders = tuple(Path(os.path.expanduser(x)) for x in args.items[1:])
        if absent := [str(x) for x in folders if not x.is_dir()]:
            raise SystemExit(f"There is no folder {', '.join(absent)}.")
        runs = run.read_runs(folders)
        if not (runs := [one for one in runs if len(one.updates) > 1]):
            raise SystemExit("Give folders with finished runs of two evaluations or more.")
        for one in runs:
            draw_run(one)
            print(f"See {one.folder / 'learning_curve.png'}.")
        return
    if args.greedy and not args.out:
        raise SystemExit("--greedy would write over the pages of sampled actions: give an --out.")
    args = run.expand_paths(args)
    out = args.out or (OWN_RESULTS if is_compare else RESULTS)
    args = dataclasses.replace(args, out=out)
    out.mkdir(parents=True, exist_ok=True)
    if is_compare:
        compare(args.items[1:], args)
    else:
        items, runs = run.get_items(args), run.read_runs(args.runs)
        drawn, refused = 0, False
        for name, item in items.items():
            try:
                drawn += draw_item(name, item, runs, args, further)
            except SystemExit as refusal:  # the other items are drawn all the same
                if len(items) == 1:
                    raise
                print(refusal, file=sys.stderr)
                refused = True
        if not drawn:
            raise SystemExit(1)
    write_html(out)
    print(f"See {out / 'report.html'}.")
    if not is_compare and refused:
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    text = (__doc__ or "").replace("\n", "\n ")
    try:
        main(*tyro.cli(Args, description=text, return_unknown_args=True))
    except OSError as error:  # a full disk, a folder that cannot be written
        raise SystemExit(f"{error}: put that right, then give the same command again.") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
