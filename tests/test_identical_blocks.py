"""What is the same in several scripts is the same to the byte."""

import ast
import itertools
import re
import subprocess
import sys

import pytest
import sync_blocks
from helpers import ATARI, BSUITE, ROOT, SCRIPTS


def files(*prefixes: str, among: list[str] = SCRIPTS) -> list[str]:
    return sorted(f"{name}.py" for name in among if name.startswith(prefixes))


MUZERO = "rosmo", "muzero_unplugged"
MODEL_BASED = files("morel", "combo")
BY_DOMAIN = {"atari": files("", among=ATARI), "bsuite": files("", among=BSUITE)}

# Which scripts must hold which block.
MANIFEST = {
    "torso": BY_DOMAIN,
    "network": {"atari": files(*MUZERO, among=ATARI), "bsuite": files(*MUZERO, among=BSUITE)},
    "CQL network": ["combo_atari.py", "cql_atari.py"],
    "value transform": files(*MUZERO, "crr", "cql", "combo"),
    "windows": files(*MUZERO),
    "improvement": {"rosmo": files("rosmo"), "muzero": files("muzero_unplugged")},
    "penalty and policy": files("cql", "combo"),
    "optimizer": files(*MUZERO, "crr", "cql", "bc", "combo"),
    "batch": files("", among=ATARI),
    "steps": files("", among=BSUITE),
    "train": files("", among=BSUITE),
    "data": BY_DOMAIN,
    "environment": [*files("", among=ATARI), "benchmark/prepare_atari.py"],
    "evaluate": BY_DOMAIN,
    "run folder": files(""),
    "checks": files(""),
    "processes": files("", among=ATARI),
    "main": {
        "atari": files(*MUZERO, "crr", "cql", "bc", among=ATARI),
        "bsuite": files("", among=BSUITE),
    },
    "signals": files(""),
    "entry": BY_DOMAIN,
    "world model": MODEL_BASED,
    "world model data": MODEL_BASED,
    "world model training": MODEL_BASED,
    "training": MODEL_BASED,
}


def families():
    for name, group in MANIFEST.items():
        for domain, members in group.items() if isinstance(group, dict) else {"": group}.items():
            yield pytest.param(name, members, id=f"{name} {domain}".strip())


@pytest.mark.parametrize(("name", "members"), families())
def test_block_is_identical_in_its_family(name, members):
    texts = {file: sync_blocks.blocks((ROOT / file).read_text()).get(name) for file in members}
    assert len(members) > 1, "a block of the manifest has no two scripts"
    assert None not in texts.values(), f"missing in {[f for f, t in texts.items() if t is None]}"
    assert len(set(texts.values())) == 1, f"{name} differs; see python tests/sync_blocks.py"
    siblings = sync_blocks.siblings(texts[members[0]])
    assert {path.relative_to(ROOT).as_posix() for path in siblings} == set(members)


@pytest.mark.parametrize("script", [*files(""), "benchmark/prepare_atari.py"])
def test_every_marker_belongs_to_a_block_of_the_manifest(script):
    text = (ROOT / script).read_text()
    found = sync_blocks.blocks(text)
    assert set(found) <= set(MANIFEST)
    markers = re.findall(r"^# --- (.+?)(?: \(identical in .+\))? ---$", text, re.MULTILINE)
    for name, following in itertools.pairwise(["", *markers, ""]):
        wrong = following.startswith("end ") and following != f"end {name}"
        assert not wrong, f"{following} stands behind {name or 'nothing'}"
    assert len(found) == sum(not marker.startswith("end ") for marker in markers)
    assert not re.search(r"^# --- end .*\s*(# --- |\Z)", text, re.MULTILINE), "ends by itself"


def unmarked(text: str) -> dict[tuple[str, str], int]:
    """Name and source of the functions and classes outside of blocks, with their lines' number.

    Of two lines or more: an init_state or a window_length of one line is no block.
    """
    for block in sync_blocks.blocks(text).values():
        text = text.replace(block, "\n" * block.count("\n"))
    kinds = ast.FunctionDef, ast.ClassDef
    nodes = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    sources = [(node, ast.get_source_segment(text, node)) for node in nodes]
    return {(node.name, x): node.end_lineno - node.lineno for node, x in sources}


def repeated(texts: dict[str, str], longest: int) -> dict[str, list[str]]:
    """The functions of more lines than `longest` that stand in two files outside of blocks."""
    owners = {}
    for file, text in texts.items():
        for key, lines in unmarked(text).items():
            if lines > longest:
                owners.setdefault(key, []).append(file)
    return {name: found for (name, _), found in owners.items() if len(found) > 1}


def test_what_is_identical_is_marked():
    """But for a few lines of glue, whose markers would be as long as themselves."""
    programs = [*files(""), "benchmark/prepare_atari.py"]
    assert repeated({file: (ROOT / file).read_text() for file in programs}, longest=7) == {}


def test_an_unmarked_copy_is_found():
    function = "def f(x):\n    y = x\n    return y\n"
    block = "# --- maths (identical in *.py) ---\n" + function + "# --- end maths ---\n"
    texts = {"a.py": "x = 1\n\n\n" + function, "b.py": function + "\n\nz = 2\n", "c.py": block}
    assert repeated(texts, longest=1) == {"f": ["a.py", "b.py"]}
    assert repeated({"a.py": function, "b.py": block, "c.py": block}, longest=1) == {}
    assert repeated({"a.py": function, "b.py": function.replace("y", "z")}, longest=1) == {}


def test_the_check_and_the_copy_see_a_changed_byte(tmp_path):
    block = "# --- maths (identical in a_*.py and b.py) ---\nx = {}\n\n\n"
    ends = {"a_one.py": "# --- end maths ---\nafter\n", "a_two.py": "# --- next (identical in"}
    values = {"a_one.py": 1, "a_two.py": "2\n\n\ndef f():\n    pass", "b.py": 1, "c.py": 3}
    for name, value in values.items():
        (tmp_path / name).write_text("before\n" + block.format(value) + ends.get(name, ""))
    changed = sync_blocks.sync(tmp_path / "a_one.py", "maths", root=tmp_path)
    assert {path.name: lost for path, lost in changed.items()} == {"a_two.py": {"f"}}
    assert (tmp_path / "a_two.py").read_text() == f"before\n{block.format(1)}{ends['a_two.py']}"
    assert "x = 3" in (tmp_path / "c.py").read_text()
    (tmp_path / "b.py").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"b\.py has no block"):
        sync_blocks.sync(tmp_path / "a_one.py", "maths", root=tmp_path)


def test_the_command_line_names_unknown_blocks():
    command = [sys.executable, "tests/sync_blocks.py", "--from", "rosmo_bsuite.py", "nonsense"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "has no block 'nonsense'" in result.stderr
