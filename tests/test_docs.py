"""The documentation names everything that is public."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dmdkit"
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SOURCES = sorted(
    path for folder in ("dmdkit", "examples") for path in (ROOT / folder).rglob("*.py")
)


def exported(init: Path) -> Iterator[str]:
    """The public names of an `__init__.py`: what it imports as `X as X`."""
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if a.name == a.asname)


def documented() -> set[str]:
    """Full names on the API pages: `::: a.b` and the `members` listed under it."""
    names: set[str] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        root = ""
        for line in page.read_text().splitlines():
            if directive := re.match(r"::: (\S+)", line):
                root = directive[1]
                names.add(root)
            elif member := re.match(r"\s+- (\w+)$", line):
                names.add(f"{root}.{member[1]}")
    return names


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_api_pages_name_every_export(subpackage: str) -> None:
    public = {
        f"dmdkit.{subpackage}.{name}"
        for name in exported(PACKAGE / subpackage / "__init__.py")
    }
    assert sorted(public - documented()) == []


def test_top_level_names_are_documented_in_their_subpackage() -> None:
    known = {name.rpartition(".")[2] for name in documented()}
    assert sorted(set(exported(PACKAGE / "__init__.py")) - known) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.name))
def test_annotations_are_objects(source: Path) -> None:
    futures = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    assert futures == [], "annotations as strings cannot be checked at run time"
