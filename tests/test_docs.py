"""README and docs: their links lead somewhere, and their commands have flags that exist."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT

import run  # first of all: submitit sets up logging anew, which closes a test's own stderr

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIABLES = {"$env": "catch", "$noise": "0.1", "$seed": "0"}  # of loops


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    found = set()
    for heading in headings:
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        others = sum(x == name or re.fullmatch(rf"{name}-\d+", x) is not None for x in found)
        found.add(f"{name}-{others}" if others else name)
    return found


@by_page
def test_every_internal_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert ROOT in [path, *path.parents], link
        if anchor:
            assert anchor in anchors(path), link


def commands(page: Path) -> list[list[str]]:
    """The words of each python, uv run or bash command of a page, program first."""
    text = page.read_text()
    lines = [
        line
        for language, code in FENCE.findall(text)
        if language in ("", "bash")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in lines:
        start = re.search(
            r"(?:^|\s)(?:python|uv run(?: --with \S+)?|bash) (?=\S+\.(?:py|sh)\b)", line
        )
        if start:
            rest = line[start.end() :]
            for name, value in VARIABLES.items():
                rest = rest.replace(name, value)
            words = shlex.split(rest, comments=True)
            found.append([word for word in words if word not in ("&&", ";")])
    return found


def parse(program: str, words: list[str]) -> None:
    """Ends with a SystemExit if the program does not know the words."""
    path = ROOT / program
    assert path.exists(), program
    name = path.stem
    if path.suffix == ".sh":
        for items in re.findall(
            r"^python benchmark/run.py ([\w ]+) \"\$@\"$", path.read_text(), re.M
        ):
            parse("benchmark/run.py", [*items.split(), *words])
    elif name in ("run", "report"):
        args, further = tyro.cli(run.Args, args=words, return_unknown_args=True)
        if args.items[0] not in ("compare", "curves"):
            args = dataclasses.replace(args, runs=run.Args.runs)  # not all of them are here
            for item in run.get_items(args).values():
                run.script_args(item, further)
    elif hasattr(module := importlib.import_module(name), "Args"):
        tyro.cli(module.Args, args=words)
    else:  # sync_blocks.py has argparse
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in path.read_text(), word


@by_page
def test_every_command_is_one_that_its_program_knows(page, capsys):
    for program, *words in commands(page):
        try:
            parse(program, words)
        except SystemExit as end:
            error = end.code if isinstance(end.code, str) else capsys.readouterr().err
            pytest.fail(f"{program} {shlex.join(words)}\n{error}")


def test_the_commands_are_found():
    found = {words[0] for page in PAGES for words in commands(page)}
    assert {"rosmo_atari.py", "benchmark/report.py", "benchmark/table1.sh"} < found
    assert len([words for page in PAGES for words in commands(page)]) > 80


def test_every_flag_in_the_text_exists():
    """Those that stand alone in a sentence: `--num-seeds`, `--dtype float32`."""
    programs = [*ROOT.glob("*_*.py"), *(ROOT / "benchmark").glob("*.py")]
    classes = [x for path in programs for x in ast.parse(path.read_text()).body]
    classes = [x for x in classes if isinstance(x, ast.ClassDef) and x.name == "Args"]
    fields = {"help", *(x.target.id for c in classes for x in c.body if hasattr(x, "target"))}
    for page in PAGES:
        for flag in re.findall(r"`--(?:no-)?([\w-]+)[^`\n]*`", FENCE.sub("", page.read_text())):
            assert flag.replace("-", "_") in fields, f"{page.name}: --{flag}"


def test_the_speeds_on_one_gpu_are_those_of_the_runs():
    page = ROOT / "docs" / "gpu.md"
    row = r"^\| .*\]\((\S+)\).* \| (\d+) to (\d+) \| (\S+) \| (\S+) to (\S+) \| (\S+)% \|"
    rows = re.findall(row, page.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for path, *numbers in rows:
        first, last, *written = map(float, numbers)
        lines = map(json.loads, (page.parent / path).read_text().splitlines())
        lines = [x for x in lines if "losses/total" in x and first <= x["update"] <= last]
        update, time = np.array([(x["update"], x["wall_time"]) for x in lines]).T
        rates = np.diff(update) / np.diff(time)
        waits = sum(x["seconds/data"] for x in lines[1:]) / (time[-1] - time[0])
        measured = [np.median(rates), rates.min(), rates.max(), 100 * waits]
        assert [f"{x:.1f}" for x in measured] == [f"{x:.1f}" for x in written], path
