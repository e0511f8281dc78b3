"""The documentation names everything that is public."""

import ast
from pathlib import Path

import pytest
from helpers_docs import PACKAGE, ROOT, documented, exported

SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SOURCES = sorted(
    path for folder in ("dmdkit", "examples") for path in (ROOT / folder).rglob("*.py")
)


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
