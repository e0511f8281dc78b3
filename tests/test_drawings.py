"""The diagrams of the documentation are what their sources draw."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[1] / "docs"
KEPT = DOCS / "assets" / "concepts"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    monkeypatch.setattr("drawing.ASSETS", tmp_path)
    for name in ("iteration", "blocks"):
        importlib.import_module(name).main()
    yield tmp_path
    for name in ("iteration", "blocks", "drawing"):
        del sys.modules[name]


def test_diagrams_are_those_of_their_sources(drawn: Path) -> None:
    made = {path.name: path.read_text() for path in drawn.iterdir()}
    assert len(made) == 4
    assert made == {name: (KEPT / name).read_text() for name in made}


@pytest.mark.parametrize("picture", sorted(KEPT.iterdir()), ids=lambda p: p.stem)
def test_a_drawing_can_stand_in_a_page(picture: Path) -> None:
    text = picture.read_text()
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label"), "what the picture shows, for who cannot see it"
    assert "\n\n" not in text, "a blank line ends the block of HTML"
    assert "currentColor" in text, "nothing would follow the page's light or dark"


def test_every_drawing_is_shown() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "concepts").glob("*.md"))
    shown = {path.name for path in KEPT.iterdir() if f"concepts/{path.name}" in pages}
    assert shown == {path.name for path in KEPT.iterdir()}
