"""The pages of the site name what there is: names, options, files, links."""

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers_docs import (
    DOCS,
    ROOT,
    commands,
    external_links,
    pages,
    prose,
    spans,
)
from test_docstrings import package

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
EXAMPLES = ROOT / "examples"

HOSTS = {
    "arxiv.org",
    "cocodataset.org",
    "creativecommons.org",
    "download.pytorch.org",
    "github.com",
    "keepachangelog.com",
    "nvlabs-fi-cdn.nvidia.com",
    "semver.org",
    "ui.perfetto.dev",
}
"""Where links out of the site lead."""

OTHER_NAMES = {
    "LMDB",  # what others have
    "KSampler",
    "MALLOC_MMAP_THRESHOLD_",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "OMP_NUM_THREADS",
    "TEACHER",
    "FILE",
    "OUT",
    "FOLDER",
    "COMMAND",
    "CITATION",
    "CHANGELOG",
    "README",
    "NULL_CLASS",
    "TypeCheckError",
    "save_model",
}
"""Words in code spans that look like names of the package and are none."""

OTHER_OPTIONS = {
    *("editable", "index-url", "nproc-per-node", "max-restarts", "strict"),
    *("constraint", "break", "runs", "reason", "rater", "logdir", "networks", "rounds"),
    *("signals-to-handle", "shutdown-timeout"),
    "denoising",  # of the official scripts
}
"""Options of other programs, and of the scripts under tests/."""


@cache
def known_names() -> set[str]:
    """Every identifier in the package, the examples and the tests."""
    names = set(dir(builtins)) | OTHER_NAMES
    for folder in ("dmdkit", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(re.findall(r"[A-Za-z_]\w*", code_of(path)))
    return names


def code_of(path: Path) -> str:
    """A file's code without docstrings and comments, so that only real names count."""
    return ast.unparse(_Bare().visit(ast.parse(path.read_text())))


class _Bare(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value = ast.Constant("")
        return node


def named(span: str) -> str | None:
    """The dotted name in a span such as `A.b(c=1)`, if it looks like one of Python."""
    found = re.fullmatch(r"([A-Za-z_][\w.]*?)\.?(\(.*\)?|=.*)?", span)
    if found is None:
        return None
    name, called = found[1], (found[2] or "").startswith("(")
    last = name.rpartition(".")[2]
    camel = re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*[A-Z]\w*", last)
    upper = re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", last)
    ours = name.startswith(("dmd.", "dmdkit."))
    return name if camel or upper or ours or called else None


def references(text: str) -> Iterator[str]:
    """The names that a page links to on the API pages."""
    yield from re.findall(r"\]\[(dmdkit[\w.]*)\]", text)


@pytest.mark.parametrize("name", PAGES)
def test_names_in_code_spans_exist(name: str) -> None:
    wrong = []
    for span in spans(PAGES[name].read_text()):
        found = named(span)
        if found is None or re.search(r"\.(py|md|json|safetensors|txt|bin)$", found):
            continue
        parts = found.removeprefix("dmdkit.").removeprefix("dmd.").split(".")
        if not set(parts) <= known_names() | {"dmdkit", "dmd"}:
            wrong.append(span)
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_links_to_the_reference_lead_to_something(name: str) -> None:
    wrong = []
    for reference in references(prose(PAGES[name].read_text())):
        try:
            package()[reference.removeprefix("dmdkit.")]
        except KeyError:
            wrong.append(reference)
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    text = PAGES[name].read_text()
    found = re.findall(r"(?<![\w/.-])(?:examples|tests|docs|dmdkit)/[\w./-]+\w", text)
    with_suffix = {path for path in found if "." in path.rpartition("/")[2]}
    assert sorted(p for p in with_suffix if not (ROOT / p).exists()) == []


def closure(script: Path) -> Iterator[Path]:
    """A script of examples/ and the neighbours that it imports, and so on."""
    todo, seen = [script], set()
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        for node in ast.walk(tree_of(path)):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for module in names:
                file = module.replace(".", "/") + ".py"
                todo += [EXAMPLES / file, script.parent / file]


@cache
def options(script: Path) -> frozenset[str]:
    """The options of a script: fields of its dataclasses, arguments of argparse."""
    found = {"help"}
    for path in closure(script):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                fields = (n for n in node.body if isinstance(n, ast.AnnAssign))
                for field in fields:
                    option = ast.unparse(field.target).replace("_", "-")
                    found |= {option, f"no-{option}"}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value.startswith("--"):
                    found.add(node.value[2:].split()[0] if node.value[2:] else "")
    return frozenset(found)


@cache
def all_options() -> frozenset[str]:
    """The options of all examples."""
    return frozenset().union(*(options(path) for path in EXAMPLES.rglob("*.py")))


@cache
def tree_of(path: Path) -> ast.Module:
    """A file as Python reads it."""
    return ast.parse(path.read_text())


def called(command: str) -> Iterator[tuple[Path, list[str]]]:
    """The examples that a command runs, in quotes as well, with their options."""
    quoted = r'"([^"]*examples/[^"]*)"'
    for part in (re.sub(quoted, "", command), *re.findall(quoted, command)):
        if script := re.search(r"(?<!\S)(examples/[\w/]+\.py)(.*)", part):
            given = re.findall(r"(?<!\S)--([\w.-]+)", script[2])
            yield ROOT / script[1], [option.rpartition(".")[2] for option in given]


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_the_options_that_they_are_given(name: str) -> None:
    text = PAGES[name].read_text()
    wrong = []
    for command in [*commands(text), *spans(text)]:
        for script, given in called(command):
            known = options(script)
            if script.name == "plan.py":  # it takes those of the recipe as well
                recipes = ("imagenet_edm.py", "sd15.py", "sdxl.py")
                known = known.union(*(options(EXAMPLES / name) for name in recipes))
            wrong += [f"{script.name} --{it}" for it in given if it not in known]
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_options_in_prose_exist(name: str) -> None:
    known = all_options() | OTHER_OPTIONS
    wrong = []
    for span in spans(PAGES[name].read_text()):
        for option in re.findall(r"(?<!\S)--([a-z][a-z0-9.-]*)(?![\w])", span):
            if option.rpartition(".")[2] not in known:
                wrong.append(span)
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_presets_that_are_named_exist(name: str) -> None:
    presets = set()
    for script in ("imagenet_edm.py", "sd15.py", "sdxl.py"):
        for node in ast.walk(tree_of(EXAMPLES / script)):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROWS":
                assert isinstance(node.value, ast.Dict)
                presets |= {ast.literal_eval(key) for key in node.value.keys if key}
    asked = set(re.findall(r"--preset ([a-z0-9-]+)", PAGES[name].read_text()))
    assert sorted(asked - presets) == []


@pytest.mark.parametrize("name", PAGES)
def test_includes_are_as_the_site_reads_them(name: str) -> None:
    lines = PAGES[name].read_text().splitlines()
    told = [line.strip() for line in lines if re.match(r"\s*-+ ?8 ?<", line)]
    assert [x for x in told if not re.fullmatch(r'--8<-- "[\w./:-]+"', x)] == []


def test_links_of_the_readme_lead_to_files() -> None:
    text = prose((ROOT / "README.md").read_text())
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert sorted(t for t in targets if not (ROOT / t).exists()) == []


def test_links_out_of_the_site_lead_where_they_are_known_to() -> None:
    wrong = [
        url
        for url in external_links()
        if urlsplit(url).scheme != "https" or urlsplit(url).hostname not in HOSTS
    ]
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_issues_are_linked_by_their_own_numbers(name: str) -> None:
    pattern = r"\[(?:([\w.-]+/[\w.-]+))?#(\d+)\]\((\S+?)\)"
    links = re.findall(pattern, PAGES[name].read_text())
    wrong = [
        url
        for repository, number, url in links
        if not re.fullmatch(
            rf"https://github\.com/{repository or '.+'}/(issues|pull)/{number}", url
        )
        and urlsplit(url).scheme
    ]
    assert wrong == []


def test_the_paper_index_has_the_whole_paper() -> None:
    text = (DOCS / "paper-index.md").read_text()

    def numbered(heading: str) -> set[str]:
        part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        cells = re.findall(r"^\| ([^|]+) \|", part, re.MULTILINE)
        return {n.strip("() ") for cell in cells for n in cell.split(",")}

    def missing(heading: str, wanted: list[str]) -> list[str]:
        return sorted(set(wanted) - numbered(heading))

    assert missing("Equations", ["1", "2", "3", "4"]) == []
    assert missing("Tables", [str(n) for n in range(1, 7)]) == []
    assert missing("Figures", [str(n) for n in range(1, 14)]) == []
    sections = ["3", *(f"4.{n}" for n in range(1, 7)), "5", "5.2", "6", "7"]
    assert missing("Sections", sections) == []
    appendices = [*"ABCDEGHI", *(f"F.{n}" for n in range(1, 5))]
    assert missing("Appendices", appendices) == []


def test_the_model_of_one_s_own_takes_60_lines() -> None:
    page = (DOCS / "how-to" / "your-own-model.md").read_text()
    steps = page.split("\n## 1. ")[1].split("\n## It worked if")[0]
    blocks = re.findall(r"^```python\n((?:.*\n)*?)```", steps, re.MULTILINE)
    beside = ("flow_matching", "def distance")  # the teacher's training, the check
    own = [code for code in blocks if not any(word in code for word in beside)]
    lines = [line for code in own for line in code.splitlines() if line.strip()]
    assert 50 <= len(lines) <= 60
