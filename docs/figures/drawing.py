"""Boxes, arrows and words as SVG that goes into a page as it is.

Text and lines without a colour of their own take that of the page (`currentColor`), so
one drawing reads on light and on dark.
"""

from html import escape
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets" / "concepts"

RED, GREEN, BLUE, ORANGE = "#e5534b", "#3a9d5d", "#4c84d8", "#d98a1f"
PAGE = "currentColor"


class Drawing:
    """A drawing of a size, to which things are added from back to front."""

    def __init__(self, name: str, width: int, height: int, says: str) -> None:
        self.name, self.width, self.height, self.says = name, width, height, says
        self.parts: list[str] = []
        self._colours: set[str] = set()

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: str,
        colour: str = PAGE,
        dashed: bool = False,
    ) -> None:
        """A rounded box with centred lines; the first is bold."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
            f'fill="{colour}" fill-opacity="0.1" stroke="{colour}" '
            f'stroke-width="1.5"{dash}/>'
        )
        rows = lines.split("\n")
        top = y + height / 2 - 9.5 * (len(rows) - 1)
        for i, row in enumerate(rows):
            self.text(x + width / 2, top + 19 * i, row, bold=i == 0)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        colour: str = PAGE,
        bold: bool = False,
        size: float = 14,
        anchor: str = "middle",
    ) -> None:
        """One line around a point; `a_b` sets b as a subscript."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y + size * 0.35:g}" text-anchor="{anchor}" '
            f'font-size="{size:g}" fill="{colour}"{weight}>{_subscripts(words)}</text>'
        )

    def arrow(
        self,
        *points: tuple[float, float],
        colour: str = PAGE,
        dashed: bool = False,
        width: float = 1.6,
    ) -> None:
        """A line through points with a head at its end; dashed for gradients."""
        self._colours.add(colour)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            f'{dash} marker-end="url(#{self._head(colour)})"/>'
        )

    def dots(self, points: list[tuple[float, float]], colour: str, radius: float = 3):
        """Small discs."""
        self.parts += [
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{colour}"/>'
            for x, y in points
        ]

    def save(self) -> None:
        """Writes `docs/assets/concepts/NAME.svg`."""
        heads = "".join(
            f'<marker id="{self._head(colour)}" viewBox="0 0 10 10" refX="9" refY="5" '
            f'markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" '
            f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
            for colour in sorted(self._colours)
        )
        body = "\n".join(self.parts)
        ASSETS.mkdir(parents=True, exist_ok=True)
        (ASSETS / f"{self.name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} '
            f'{self.height}" width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{escape(self.says)}" font-family="inherit">\n'
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )

    def _head(self, colour: str) -> str:
        return f"{self.name}-{colour.lstrip('#')}"


def _subscripts(words: str) -> str:
    first, *rest = words.split("_")
    parts = [escape(first)]
    for piece in rest:
        sub = piece.split(" ")[0]
        sub = sub.rstrip(",)")
        after = escape(piece[len(sub) :])
        parts.append(
            f'<tspan dy="4" font-size="75%">{escape(sub)}</tspan>'
            f'<tspan dy="-4">{after or "&#8203;"}</tspan>'
        )
    return "".join(parts)
