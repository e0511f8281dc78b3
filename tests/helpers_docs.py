"""What the tests of the documentation look at: pages, names, links.

python tests/helpers_docs.py lists the links that lead out of the site; no test fetches
them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dmdkit"
DOCS = ROOT / "docs"


def pages() -> list[Path]:
    """README and every page of the site."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def exported(init: Path) -> Iterator[str]:
    """The public names of an `__init__.py`: what it imports as `X as X`."""
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if a.name == a.asname)


def documented() -> set[str]:
    """Full names on the API pages: `::: a.b` and the `members` listed under it."""
    names: set[str] = set()
    for page in (DOCS / "api").glob("*.md"):
        root = ""
        for line in page.read_text().splitlines():
            if directive := re.match(r"::: (\S+)", line):
                root = directive[1]
                names.add(root)
            elif member := re.match(r"\s+- (\w+)$", line):
                names.add(f"{root}.{member[1]}")
    return names


FENCED = re.compile(r"^( *)```.*\n(?:.*\n)*?\1```", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
URL = re.compile(r"https?://[^\s)>\]\"'`]+")


def prose(text: str) -> str:
    """A page without its code blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.DOTALL)


def spans(text: str) -> list[str]:
    """The code spans of a page's prose."""
    return SPAN.findall(prose(text))


def commands(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, comments left out."""
    found = []
    for block in re.finditer(
        r"^( *)```(?:ba)?sh\n((?:.*\n)*?)\1```", text, re.MULTILINE
    ):
        joined = re.sub(r"\\\n\s*", "", block[2])
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
        found += [line for line in lines if line]
    return found


def external_links() -> dict[str, list[str]]:
    """Every address outside of the site, and the pages that have it."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for url in sorted(set(URL.findall(page.read_text()))):
            name = str(page.relative_to(ROOT))
            found.setdefault(url.rstrip(".,;"), []).append(name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    for address, where in external_links().items():
        print(address, *where)
