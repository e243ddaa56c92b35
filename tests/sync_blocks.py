"""Copies blocks from one script to its siblings, and names what these lose.

    python tests/sync_blocks.py --from rosmo_atari.py evaluate data

A block starts at a line "# --- NAME (identical in FILES) ---" and goes to the next such line, or
to "# --- end NAME ---" where the script's own code follows, or to the end of the file. FILES are
file name patterns at the top of the repository, joined by commas or "and".
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^# --- (?P<name>[\w ]+) \(identical in (?P<files>[^)]+)\) ---\n.*?\n(?=\n*(# --- |\Z))",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> dict[str, str]:
    """The blocks of a file by name, with their first markers."""
    return {match["name"]: match[0] for match in BLOCK.finditer(text)}


def siblings(block: str, root: Path = ROOT) -> list[Path]:
    """The files that a block's first line names and that exist."""
    patterns = re.split(r", | and ", BLOCK.match(block)["files"])
    return sorted({path for pattern in patterns for path in root.glob(pattern)})


def definitions(block: str) -> set[str]:
    return set(re.findall(r"^(?:def|class) (\w+)", block, re.MULTILINE))


def sync(source: Path, name: str, root: Path = ROOT) -> dict[Path, set[str]]:
    """Copies a block to its siblings; returns the files that changed, and what they lost."""
    found = blocks(source.read_text())
    if name not in found:
        raise SystemExit(f"{source.name} has no block {name!r}; it has {', '.join(found)}.")
    changed = {}
    for path in siblings(found[name], root):
        text = path.read_text()
        theirs = blocks(text).get(name)
        if theirs is None:
            raise SystemExit(f"{path.name} has no block {name!r}; put its marker in first.")
        if theirs != found[name]:
            path.write_text(text.replace(theirs, found[name]))
            changed[path] = definitions(theirs) - definitions(found[name])
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", required=True, type=Path)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    for name in arguments.names:
        for path, lost in sync(ROOT / arguments.source, name).items():
            print(f"{name} -> {path.name}{', without ' * bool(lost)}{', '.join(sorted(lost))}")
