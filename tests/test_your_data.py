"""The code of docs/your_data.md and docs/runs.md runs as it stands there, with smaller sizes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
from conftest import ROOT
from helpers import BSUITE, metrics

import rosmo_atari

DATA, RUNS = ((ROOT / "docs" / name).read_text() for name in ("your_data.md", "runs.md"))
FRAMES, VECTORS = DATA.split("## Vectors")
SMALL = "--batch-size 4 --log-every 2 --total-updates 4 "
TINY = SMALL + "--channels 4 --num-bins 21 --unroll-steps 1 --td-steps 1"
pytestmark = pytest.mark.usefixtures("hurry")


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a language, or those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The folder of a user whose scripts have the changes of the page."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "benchmark").symlink_to(ROOT / "benchmark")
    helpers.copy_without_blocks("rosmo_atari", folder)  # else it is compiled for long
    shutil.copy(ROOT / "rosmo_bsuite.py", folder)
    apply(*blocks(VECTORS, "diff"), folder)
    return folder


def apply(diff: str, folder: Path) -> None:
    command = ["git", "apply", "--whitespace=nowarn", "--verbose"]
    result = subprocess.run(command, input=diff, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "rosmo_bsuite" not in diff or "offset" not in result.stderr  # the page's line numbers


def python(folder: Path, cache_dir: Path, *words: str) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache_dir)}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, *words], timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", BSUITE)
def test_every_script_has_the_lines_that_change(name, tmp_path):
    (diff,) = blocks(VECTORS, "diff")
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    apply(diff.replace("rosmo_bsuite", name), tmp_path)
    compile((tmp_path / f"{name}.py").read_text(), name, "exec")


def test_own_frames(clone, cache_dir):
    write, act = blocks(FRAMES, "python")
    python(clone, cache_dir, "-c", write)
    (command,) = blocks(FRAMES)
    # The folder of the run is that of the page's arguments.
    (run,) = re.findall(r'Path\("(runs/.*?)"\)', act)
    words = [*shlex.split(command)[1:], *shlex.split(TINY), "--run-dir", run]
    python(clone, cache_dir, *words)
    config = json.loads((clone / run / "config.json").read_text())
    assert config["data"]["source"] == "mine"
    assert config["data"]["episodes"] == 100
    lines = metrics(clone / run)
    assert np.isfinite([x["losses/total"] for x in lines if "losses/total" in x]).all()
    assert lines[-1]["final/returns"] == []
    assert python(clone, cache_dir, "-c", act).strip() in {"[0]", "[1]", "[2]"}


def test_own_vectors(clone, cache_dir):
    (write,) = blocks(VECTORS, "python")
    written = python(clone, cache_dir, "-c", write)
    (command,) = blocks(VECTORS)
    words = [*shlex.split(command)[1:], *shlex.split(SMALL), "--final-eval-episodes", "3"]
    assert "CartPole-v1" in python(clone, cache_dir, *words)
    (folder,) = clone.glob("runs/rosmo_bsuite/*/seed0")
    final = metrics(folder)[-1]
    assert len(final["final/returns"]) == 3
    assert 3 * 8 < sum(final["final/returns"]) <= 3 * 500
    config = json.loads((folder / "config.json").read_text())
    mean = config["data"]["mean_return"]
    assert f"mean return {mean:.2f}" in written

    # Without a simulator, as the last lines of the page say.
    text = (clone / "rosmo_bsuite.py").read_text().replace("import gymnasium\n", "")
    text = re.sub(r"    def __init__\(self, seed.*?(?=    def observation)", "", text, flags=re.S)
    text = re.sub(r"    def reset\(self\):.*?\n\n\n(?=ENVIRONMENTS)", "\n\n", text, flags=re.S)
    text = text.replace("*self.env.observation_space.shape", "4")
    text = text.replace("int(self.env.action_space.n)", "2")
    assert "self.env" not in text
    assert "gymnasium.make" not in text
    (clone / "without_bsuite.py").write_text(text)
    words = ["without_bsuite.py", *words[1:], "--eval-episodes", "0", "--final-eval-episodes", "0"]
    python(clone, cache_dir, *words)
    (folder,) = clone.glob("runs/without_bsuite/*/seed0")
    assert metrics(folder)[-1]["final/returns"] == []


@pytest.mark.parametrize("name", ["rosmo_atari", "rosmo_bsuite"])
def test_a_trained_agent_is_loaded_and_acts(name, in_process, tmp_path, monkeypatch, capsys):
    (code,) = (x for x in blocks(RUNS, "python") if f"runs/{name}/" in x)
    (run,) = re.findall(r'Path\("(runs/.*?)"\)', code)
    helpers.without_blocks(monkeypatch, "rosmo_atari")
    options = ["--total-updates", 4, "--eval-episodes", 0, "--final-eval-episodes", 0]
    options += ["--num-seeds", 1] if name == "rosmo_bsuite" else []
    assert in_process(name, *options, "--run-dir", run).returncode == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmark")])
    if name == "rosmo_atari":  # whose games are long
        monkeypatch.setattr(rosmo_atari, "evaluate", partial(rosmo_atari.evaluate, max_frames=40))
    capsys.readouterr()
    exec(compile(code, "runs.md", "exec"), {})
    returns = np.ravel(json.loads(capsys.readouterr().out))
    assert len(returns) == (2 if name == "rosmo_atari" else 1)
    assert (returns >= (0 if name == "rosmo_atari" else -1)).all()
