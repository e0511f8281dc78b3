"""The notebooks are made of pages, and run."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers_docs import ROOT
from notebooks.make import FOLDER, PAGES, as_notebooks_have_it, notebook_of, written
from notebooks.make import parts as parts_of

MAKE = ROOT / "examples" / "notebooks" / "make.py"


@pytest.mark.parametrize("name", PAGES)
def test_a_notebook_is_what_its_page_makes(name: str) -> None:
    made, there = written(notebook_of(PAGES[name])), FOLDER / f"{name}.ipynb"
    assert there.read_text() == made, "type: python examples/notebooks/make.py"


@pytest.mark.parametrize("name", PAGES)
def test_every_python_block_is_a_cell_in_order(name: str) -> None:
    page = (ROOT / PAGES[name]).read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    cells = [c.source for c in notebook_of(PAGES[name]).cells if c.cell_type == "code"]
    python = [cell for cell in cells[1:] if not cell.startswith("%%bash")]
    assert python == [block.rstrip() for block in blocks]


def test_blocks_are_cells_or_text_by_their_language() -> None:
    page = "\n".join(
        (
            "# T",
            "```sh\npython -m pip install x\n```",
            "```sh\necho 1\n```",
            "```shell\necho 2\n```",
            "```python\na = 1\n```",
            "```py\nb = 2\n```",
            "",
        )
    )
    found = [(kind, text.strip()) for kind, text in parts_of(page)]
    assert [part for part in found if part[0] != "text"] == [
        ("sh", "echo 1"),
        ("python", "a = 1"),
    ]
    assert "pip install x" in found[0][1]
    assert "echo 2" in found[2][1]
    assert "b = 2" in found[4][1]


def test_text_has_nothing_that_only_the_site_understands() -> None:
    text = as_notebooks_have_it(
        "<!--- skip: next -->\nSee [`Monitor`][dmdkit.training.Monitor]`()` and\n"
        '[a page](../faq.md#x).\n\n!!! note "Mind"\n    Two\n    lines.\n\nEnd',
        Path("docs/how-to/page.md"),
    )
    assert text == (
        "See `Monitor()` and\n[a page](../../docs/faq.md#x).\n\n"
        "**Mind**\n\nTwo\nlines.\n\nEnd"
    )


def test_the_model_of_one_s_own_runs_as_a_notebook(tmp_path: Path) -> None:
    command = [sys.executable, MAKE, "your-own-model", "--execute", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / "your-own-model.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    # One print may come in several pieces.
    printed = "".join(output.text for cell in cells for output in cell.outputs)
    last = printed.splitlines()[-2:]
    assert last[0].startswith("student, 1 call ")
    assert last[1].startswith("average ")


@pytest.mark.slow
def test_getting_started_runs_as_a_notebook(tmp_path: Path) -> None:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("its shell cells need .venv, which `make setup` makes")
    command = [sys.executable, MAKE, "getting-started", "--execute", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_page_is_refused() -> None:
    command = [sys.executable, MAKE, "no-page"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-page: expected one of getting-started" in done.stderr
