"""A newcomer's path: the page "Getting started", followed from top to bottom.

In a copy of the repository, in a temporary folder, the page's `sh` blocks are run by
bash and its `python` blocks as one session, in order and to the letter. Two kinds of
lines are not: those that make .venv and install into it, since tests must not need a
network (.ci/run does that, in a clean clone); a .venv like theirs is there instead.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from helpers_docs import DOCS, ROOT

PAGE = DOCS / "getting-started.md"
COPIED = ("dmdkit", "examples", "docs", "Makefile", "pyproject.toml", "README.md")
SET_UP = re.compile(r"-m (venv|pip install)\b")
BLOCK = re.compile(r"^```(sh|python)\n((?:.*\n)*?)```", re.MULTILINE)
SHORT = "--iterations 10 --evaluate-every 10 --samples 80"
"""What the demo is told in the short form, over what the page says."""


def steps(page: Path, *, short: bool) -> list[tuple[str, str]]:
    """The page's blocks as (language, code)."""
    found = []
    for language, code in BLOCK.findall(page.read_text()):
        if language == "sh":
            code = re.sub(r"\\\n\s*", "", code)
            lines = [line for line in code.splitlines() if not SET_UP.search(line)]
            if short:  # the first look is the demo with other numbers
                lines = [line for line in lines if "--out runs/" not in line]
                lines = [
                    f"{line} {SHORT}"
                    if "examples/digits.py" in line and "--sample " not in line
                    else line
                    for line in lines
                ]
            code = "\n".join(lines)
        if code.strip():
            found.append((language, code))
    return found


def checkout(folder: Path) -> Path:
    """A copy of the repository with a .venv in which it is installed."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, target)
    venv = folder / ".venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True
    )
    python = venv / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run(
        [python, "-c", where], capture_output=True, text=True, check=True
    )
    # The copy as if it were installed; all else comes from the tests' environment.
    paths = f"{folder}\n{sysconfig.get_path('purelib')}\n"
    (Path(site.stdout.strip()) / "copy.pth").write_text(paths)
    return python


def follow(folder: Path, *, short: bool) -> dict[str, str]:
    """Follows the page; gives what its blocks printed, by their first lines."""
    python = checkout(folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    printed, session = {}, ""
    for language, code in steps(PAGE, short=short):
        if language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", code]
        else:
            session += code
            continue
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        printed[code.splitlines()[0]] = done.stdout
    done = subprocess.run(
        [python, "-W", "error::SyntaxWarning", "-c", session],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed["python"] = done.stdout
    return printed


def files_promised() -> list[str]:
    """The files that the page's first table says the demo writes."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def check(folder: Path, printed: dict[str, str]) -> None:
    promised = files_promised()
    assert len(promised) >= 5
    missing = [name for name in promised if not (folder / "demo" / name).exists()]
    assert missing == []
    assert (folder / "drawn" / "drawn.png").stat().st_size > 0
    assert "True" in printed["python"]


def test_the_page_is_one_path() -> None:
    languages = [language for language, _ in steps(PAGE, short=False)]
    assert languages.count("sh") >= 3
    assert languages.count("python") >= 3


def test_the_page_in_short(tmp_path: Path) -> None:
    check(tmp_path, follow(tmp_path, short=True))


@pytest.mark.slow
def test_the_page_to_the_letter(tmp_path: Path) -> None:
    start = time.monotonic()
    check(tmp_path, follow(tmp_path, short=False))
    print(f"{time.monotonic() - start:.0f} s")
