"""Makes the notebooks from pages of the documentation, and runs them.

    python examples/notebooks/make.py              # writes them beside this file
    python examples/notebooks/make.py --execute    # runs them into runs/notebooks

A page's `python` and `sh` blocks become cells, but for those that install; blocks in
other languages (`py`, `shell`, `bash`) stay text. The pages are the only source: edit
them, then make the notebooks anew.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
PAGES = {
    "getting-started": Path("docs/getting-started.md"),
    "your-own-model": Path("docs/how-to/your-own-model.md"),
}

FENCE = re.compile(r"^( *)```(\w*).*\n((?:.*\n)*?)\1```\n?", re.MULTILINE)
INDENTED = re.compile(r'^(?:!!! \w+|===) "(.*)"\n((?: {4}.*\n|\n)+)', re.MULTILINE)
"""A box or a tab: a title and an indented text."""
SET_UP = re.compile(r"pip install|-m venv")
"""What whoever opens a notebook in this folder has behind them."""

FIRST = """# From here on everything is relative to the repository.
import os
from pathlib import Path

while not Path("pyproject.toml").exists():
    os.chdir("..")"""


def dedented(text: str, indent: str) -> str:
    """A block of a tab or a list without its indentation."""
    return re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def is_cell(language: str, code: str) -> bool:
    """Whether a block is run in the notebook."""
    return language == "python" or (language == "sh" and not SET_UP.search(code))


def parts(page: str) -> Iterator[tuple[str, str]]:
    """A page as ("text" | "python" | "sh", content), in order."""
    text, end = "", 0
    for block in FENCE.finditer(page):
        indent, language, code = block.groups()
        text += page[end : block.start()]
        end = block.end()
        code = dedented(code, indent).rstrip()
        if is_cell(language, code):
            yield "text", text
            yield language, code
            text = ""
        else:
            text += block[0]
    yield "text", text + page[end:]


def as_notebooks_have_it(text: str, page: Path) -> str:
    """Text without what only the site understands."""
    text = re.sub(r"<!-{2,3}.*?-{2,3}>\n*", "", text, flags=re.DOTALL)
    # [`Name`][dmdkit.path] is a link to the reference.
    text = re.sub(r"\[(`[^`]+`)\]\[dmdkit[\w.]*\]", r"\1", text)
    text = INDENTED.sub(lambda f: f"**{f[1]}**\n\n{dedented(f[2], '    ')}", text)
    # A name and its call are two code spans on the site.
    text = re.sub(r"(?<=\w)``(?=[(\[])", "", text)

    def link(found: re.Match[str]) -> str:
        target = found[1]
        if re.match(r"\w+:|#", target):
            return found[0]
        path = os.path.normpath(page.parent / target)
        return f"]({os.path.relpath(ROOT / path, FOLDER)})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text).strip()


def notebook_of(page: Path) -> Any:
    """The notebook of a page."""
    cells: list[Any] = [v4.new_code_cell(FIRST)]
    for kind, content in parts((ROOT / page).read_text()):
        if kind == "text":
            if text := as_notebooks_have_it(content, page):
                cells.append(v4.new_markdown_cell(text))
        else:
            start = "%%bash\n" if kind == "sh" else ""
            cells.append(v4.new_code_cell(start + content))
    cells[0], cells[1] = cells[1], cells[0]  # the title comes first
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def written(notebook: Any) -> str:
    """A notebook as it stands in its file."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def execute(notebook: Any) -> None:
    """Runs the cells, in place; a cell that fails stops it."""
    from nbclient import NotebookClient

    # Shell cells find the interpreter that runs this.
    NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": ROOT}}
    ).execute()


def main() -> None:
    """Writes or runs notebooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PAGES)}; none: all")
    parser.add_argument("--execute", action="store_true", help="run them as well")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "notebooks")
    given = parser.parse_args()
    for name in given.names or PAGES:
        if name not in PAGES:
            parser.error(f"{name}: expected one of {', '.join(PAGES)}")
        notebook, file = notebook_of(PAGES[name]), FOLDER / f"{name}.ipynb"
        if given.execute:
            file = given.out / file.name
            file.parent.mkdir(parents=True, exist_ok=True)
            execute(notebook)
        file.write_text(written(notebook))
        print(file)


if __name__ == "__main__":
    main()
