"""Tables and plots of the study, made from its files alone.

    python examples/study/report.py --out examples/study --page docs/study.md

The page's tables stand between two comments and are replaced; its words are left alone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse
from study.figures import figure_8, figure_9, figure_diversity, figure_samples
from study.tables import TABLES, Results, fill_page, table


@dataclass(frozen=True)
class Settings:
    """Makes the study's plots and tables."""

    out: Path = Path("runs/study")
    """The folder of results.csv; plots go beside it."""
    page: Path | None = None
    """A page whose tables are made anew, and its plots in assets/ beside it."""


def write_report(out: Path, page: Path | None = None) -> None:
    """Writes the plots, prints the tables, and fills the page's if one is given."""
    results = Results(out)
    assets = out / "plots" if page is None else page.parent / "assets"
    figures: dict[str, Callable[[Results, str, Path], None]] = {
        "brightness": figure_8,
        "frechet": figure_9,
        "diversity": figure_diversity,
    }
    for data in results.data():
        for name, draw in figures.items():
            if data == "fashion" and name != "frechet":
                continue
            if any(row["data"] == data for row in results.curves):
                draw(results, data, assets / f"study_{data}_{name}.png")
        figure_samples(out, data, assets / f"study_{data}_samples.png")
        if page is None:
            for name in TABLES:
                if any(results.of(data, cell) for cell in TABLES[name]):
                    print(f"\n{data}, {name}\n\n{table(results, data, name)}")
    if page is not None:
        page.write_text(fill_page(page.read_text(), results))
    print(f"\nWrote plots to {assets}" + (f", and {page}." if page else "."))


def main(settings: Settings) -> None:
    """Makes the report."""
    if not (settings.out / "results.csv").is_file():
        raise SystemExit(
            f"--out {settings.out}: it has no results.csv; run.py makes it."
        )
    if settings.page is not None and not settings.page.is_file():
        raise SystemExit(f"--page {settings.page}: there is no such file.")
    write_report(settings.out, settings.page)


if __name__ == "__main__":
    main(parse(Settings))
