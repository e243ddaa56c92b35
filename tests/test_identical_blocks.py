"""What is the same in several scripts is the same to the byte."""

import subprocess
import sys

import pytest
import sync_blocks
from conftest import ROOT

SCRIPTS = sorted(path.name for path in (*ROOT.glob("*_atari.py"), *ROOT.glob("*_bsuite.py")))
BSUITE = [name for name in SCRIPTS if name.endswith("_bsuite.py")]
ATARI = [name for name in SCRIPTS if name.endswith("_atari.py")]
MUZERO = [name for name in SCRIPTS if name.startswith(("rosmo", "muzero_unplugged"))]
CATEGORICAL = sorted(
    MUZERO + [name for name in SCRIPTS if name.startswith(("crr", "cql", "combo"))]
)
MODEL_BASED = [name for name in SCRIPTS if name.startswith(("morel", "combo"))]

# Which scripts must hold which block.
MANIFEST = {
    "run folder": SCRIPTS,
    "evaluate": {"bsuite": BSUITE, "atari": ATARI},
    "data": {"bsuite": BSUITE, "atari": ATARI},
    "network": {
        "bsuite": [name for name in MUZERO if name in BSUITE],
        "atari": [name for name in MUZERO if name in ATARI],
    },
    "value transform": CATEGORICAL,
    "windows": MUZERO,
    "policy targets": [name for name in SCRIPTS if name.startswith("rosmo")],
    "search": [name for name in SCRIPTS if name.startswith("muzero_unplugged")],
    "cross entropy": [name for name in SCRIPTS if name.startswith(("crr", "cql", "combo"))],
    "conservative penalty": [name for name in SCRIPTS if name.startswith(("cql", "combo"))],
    "CQL network": ["cql_atari.py", "combo_atari.py"],
    "optimizer": [name for name in SCRIPTS if not name.startswith("morel")],
    "torso": {"bsuite": BSUITE, "atari": ATARI},
    "environment": [*ATARI, "benchmark/collect_atari.py"],
    "store writer": [*ATARI, "benchmark/collect_atari.py"],
    "world model": MODEL_BASED,
    "world model data": MODEL_BASED,
    "world model training": MODEL_BASED,
}


def families():
    for name, files in MANIFEST.items():
        for domain, members in files.items() if isinstance(files, dict) else {"": files}.items():
            yield pytest.param(name, members, id=f"{name} {domain}".strip())


@pytest.mark.parametrize(("name", "files"), families())
def test_block_is_identical_in_its_family(name, files):
    texts = {file: sync_blocks.blocks((ROOT / file).read_text()).get(name) for file in files}
    assert files, "a block of the manifest has no script"
    assert None not in texts.values(), f"missing in {[f for f, t in texts.items() if t is None]}"
    assert len(set(texts.values())) == 1, f"{name} differs; see python tests/sync_blocks.py"
    text = texts[files[0]]
    siblings = {path.relative_to(ROOT).as_posix() for path in sync_blocks.siblings(text)}
    assert siblings == set(files)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_marker_belongs_to_a_block_of_the_manifest(script):
    text = (ROOT / script).read_text()
    found = sync_blocks.blocks(text)
    assert text.count("\n# --- ") == 2 * len(found), "a marker without its pair"
    assert set(found) <= set(MANIFEST)


def test_the_check_and_the_copy_see_a_changed_byte(tmp_path):
    block = "# --- maths (identical in a_*.py and b.py) ---\nx = {}\n# --- end maths ---\n"
    for name, value in (("a_one.py", 1), ("a_two.py", 2), ("b.py", 1), ("c.py", 3)):
        (tmp_path / name).write_text("before\n" + block.format(value) + "after\n")
    changed = sync_blocks.sync(tmp_path / "a_one.py", "maths", root=tmp_path)
    assert [path.name for path in changed] == ["a_two.py"]
    assert (tmp_path / "a_two.py").read_text() == (tmp_path / "a_one.py").read_text()
    assert "x = 3" in (tmp_path / "c.py").read_text()
    (tmp_path / "b.py").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"b\.py has no block"):
        sync_blocks.sync(tmp_path / "a_one.py", "maths", root=tmp_path)


def test_the_command_line_names_unknown_blocks():
    command = [sys.executable, "tests/sync_blocks.py", "--from", "rosmo_bsuite.py", "nonsense"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "has no block 'nonsense'" in result.stderr
