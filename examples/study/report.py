"""Tables and plots of the study, made from its files alone.

    python examples/study/report.py --out examples/study --page docs/study.md

The page's tables stand between two comments and are replaced; its words are left alone.
"""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse
from study.cells import SEEDS
from study.records import read
from study.teachers import names_of

mpl.use("Agg")

import matplotlib.pyplot as plt

Row = dict[str, str]
SAMPLE_ROWS = 2
"""Rows of samples of a cell in the picture of all."""
NAMES = {
    "teacher-ode-7": "Teacher, ODE, 7 calls",
    "teacher-ode-17": "Teacher, ODE, 17 calls",
    "teacher-ode-35": "Teacher, ODE, 35 calls",
    "teacher-ode-63": "Teacher, ODE, 63 calls",
    "teacher-sde-63": "Teacher, SDE, 63 calls",
    "teacher-guided-35": "Teacher with guidance, 35 calls",
    "dmd2": "DMD2 (all)",
    "dmd2-longer": "DMD2, two stages, longer",
    "dmd": "DMD: with regression, 1 critic update",
    "no-regression": "without regression, 1 critic update",
    "ttur": "+ TTUR: 5 critic updates",
    "gan-alone": "GAN alone, 1 critic update",
    "gan-ttur": "GAN alone + TTUR",
    "ratio-10": "10 critic updates",
    "asynchronous": "1 critic update, 5 x its learning rate",
    "four-step": "DMD2, four steps (all)",
    "four-step-no-gan": "four steps, without GAN",
    "four-step-no-dm": "four steps, without distribution matching",
    "four-step-no-simulation": "four steps, without backward simulation",
    "steps-2": "2 steps",
    "steps-4": "4 steps",
    "steps-8": "8 steps",
    "vp": "variance preserving, epsilon",
    "flow": "rectified flow, velocity",
    "gan-weight-0.003": "GAN weight 0.003",
    "gan-weight-0.01": "GAN weight 0.01",
    "gan-weight-0.1": "GAN weight 0.1",
    "gan-weight-0.3": "GAN weight 0.3",
    "shared-critic-pass": "one pass on the critic's turn",
    "shared-both-passes": "one pass on both turns",
}
TABLES: dict[str, tuple[str, ...]] = {
    "1": (
        "teacher-ode-7",
        "teacher-ode-17",
        "teacher-ode-35",
        "teacher-ode-63",
        "teacher-sde-63",
        "dmd2",
        "dmd2-longer",
    ),
    "3": ("dmd", "no-regression", "ttur", "dmd2", "gan-alone", "gan-ttur"),
    "4": (
        "teacher-guided-35",
        "four-step-no-gan",
        "four-step-no-dm",
        "four-step-no-simulation",
        "four-step",
    ),
    "8": ("no-regression", "asynchronous", "ttur", "ratio-10"),
    "B": (
        "teacher-ode-35",
        "ttur",
        "gan-weight-0.003",
        "gan-weight-0.01",
        "dmd2",
        "gan-weight-0.1",
        "gan-weight-0.3",
    ),
    "steps": ("dmd2", "steps-2", "steps-4", "steps-8", "teacher-ode-35"),
    "families": ("dmd2", "vp", "flow"),
    "shared": ("dmd2", "shared-critic-pass", "shared-both-passes"),
}
TITLES = {"digits": "digits", "fashion": "Fashion-MNIST"}
COLUMNS: dict[str, tuple[str, int]] = {
    "frechet": ("Frechet distance ↓", 3),
    "precision": ("Precision ↑", 3),
    "recall": ("Recall ↑", 3),
    "accuracy": ("Class accuracy ↑", 3),
    "nearest": ("Nearest training image", 2),
    "diversity": ("Diversity ↑", 2),
    "class_recall": ("Recall in a class ↑", 3),
    "generator_updates": ("Student updates", 0),
    "seconds": ("CPU seconds", 0),
}
COMMON = ("frechet", "precision", "recall", "accuracy", "nearest")
COLUMNS_OF = {
    "B": ("frechet", "diversity", "class_recall", "recall", "accuracy", "nearest"),
    "8": (*COMMON, "generator_updates", "seconds"),
    "shared": (*COMMON, "seconds"),
}


@dataclass(frozen=True)
class Settings:
    """Makes the study's plots and tables."""

    out: Path = Path("runs/study")
    """The folder of results.csv; plots go beside it."""
    page: Path | None = None
    """A page whose tables are made anew, and its plots in assets/ beside it."""


class Results:
    """The rows of a study, by data set and cell."""

    def __init__(self, folder: Path) -> None:
        rows = read(folder / "results.csv")
        more = {_key(row): row for row in read(folder / "measures.csv")}
        self.rows = [{**more.get(_key(row), {}), **row} for row in rows]
        self.curves = read(folder / "curves.csv")

    def of(self, data: str, cell: str) -> list[Row]:
        """The rows of a cell, one a seed."""
        return [r for r in self.rows if (r["data"], r["cell"]) == (data, cell)]

    def data(self) -> list[str]:
        """The data sets that have rows."""
        return sorted({row["data"] for row in self.rows})

    def values(self, data: str, cell: str, column: str) -> list[float]:
        """One number a seed."""
        return [float(row[column]) for row in self.of(data, cell) if row.get(column)]

    def curve(
        self, data: str, cell: str, x: str, y: str
    ) -> list[tuple[list[float], list[float]]]:
        """The curves of a cell, one a seed."""
        points: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.curves:
            if (row["data"], row["cell"]) == (data, cell):
                xs, ys = points.setdefault(row["seed"], ([], []))
                xs.append(float(row[x]))
                ys.append(float(row[y]))
        return list(points.values())


def _key(row: Row) -> tuple[str, str, str]:
    return row["data"], row["cell"], row["seed"]


def cell_text(values: Sequence[float], digits: int) -> str:
    """The median and the range of some seeds: `0.21 (0.19 ... 0.25)`."""
    if not values:
        return ""
    shown = [
        f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    ]
    if len(set(shown)) == 1:
        return shown[0]
    return f"{shown[0]} ({shown[1]} ... {shown[2]})"


def table(results: Results, data: str, name: str) -> str:
    """One table in Markdown: medians and ranges over seeds."""
    columns = COLUMNS_OF.get(name, COMMON)
    heads = ["", "Seeds", *(COLUMNS[column][0] for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for cell in TABLES[name]:
        seeds = len(results.of(data, cell))
        if not seeds:
            continue
        numbers = [
            cell_text(results.values(data, cell, column), COLUMNS[column][1])
            for column in columns
        ]
        label = NAMES[cell]
        lines.append("| " + " | ".join([label, str(seeds), *numbers]) + " |")
    return "\n".join(lines) if len(lines) > 2 else "*Not trained yet.*"


def status(results: Results) -> str:
    """How much of the whole is there."""
    counts = {
        data: len([row for row in results.rows if row["data"] == data])
        for data in SEEDS
    }
    whole = {data: seeds * len(names_of(data)) for data, seeds in SEEDS.items()}
    shown = ", ".join(
        f"{counts[data]} of {whole[data]} on {TITLES[data]}" for data in SEEDS
    )
    if counts == whole:
        return f"The study is complete: {shown} (rows times seeds)."
    return f"The study is being run, and tables fill: {shown} (rows times seeds)."


def fill_page(text: str, results: Results) -> str:
    """A page whose `<!-- table data name -->` ... `<!-- end -->` and status are new."""

    def fresh(match: re.Match[str]) -> str:
        kind, *names = match[1].split()
        made = table(results, *names) if kind == "table" else status(results)
        return f"<!-- {match[1]} -->\n\n{made}\n\n<!-- end -->"

    pattern = r"<!-- (table \w+ \w+|status) -->\n.*?\n<!-- end -->"
    return re.sub(pattern, fresh, text, flags=re.DOTALL)


COLOURS = {
    "no-regression": "tab:red",
    "ttur": "tab:green",
    "ratio-10": "tab:pink",
    "asynchronous": "tab:cyan",
    "dmd": "tab:blue",
    "dmd2": "black",
}


def _draw(
    axes: plt.Axes, results: Results, data: str, cells: Sequence[str], x: str, y: str
) -> None:
    """Every seed's curve thin, their median thick."""
    for cell in cells:
        curves = results.curve(data, cell, x, y)
        if not curves:
            continue
        colour = COLOURS[cell]
        for xs, ys in curves:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
        shortest = min(len(xs) for xs, _ in curves)
        middle = [
            (
                statistics.median(xs[i] for xs, _ in curves),
                statistics.median(ys[i] for _, ys in curves),
            )
            for i in range(shortest)
        ]
        axes.plot(*zip(*middle, strict=True), color=colour, label=NAMES[cell])


def figure_8(results: Results, data: str, path: Path) -> None:
    """Brightness over training at several numbers of critic updates."""
    figure, axes = plt.subplots(figsize=(7, 4))
    cells = ("no-regression", "asynchronous", "ttur", "ratio-10")
    _draw(axes, results, data, cells, "critic_updates", "brightness")
    axes.set(xlabel="critic updates", ylabel="brightness of samples")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def figure_9(results: Results, data: str, path: Path) -> None:
    """Frechet distance over training, against student updates and CPU seconds."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    cells = ("no-regression", "asynchronous", "dmd", "ttur", "ratio-10")
    labels = {"generator_updates": "student updates", "seconds": "CPU seconds"}
    for axes, (x, label) in zip(both, labels.items(), strict=True):
        _draw(axes, results, data, cells, x, "frechet")
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both")
    both[0].set_ylabel("Frechet distance")
    both[0].legend(fontsize=8)
    _save(figure, path)


def figure_diversity(results: Results, data: str, path: Path) -> None:
    """Diversity and Frechet distance against the GAN's weight."""
    weights = {
        0.0: "ttur",
        0.003: "gan-weight-0.003",
        0.01: "gan-weight-0.01",
        0.03: "dmd2",
        0.1: "gan-weight-0.1",
        0.3: "gan-weight-0.3",
    }
    columns = ("frechet", "diversity", "class_recall", "nearest")
    figure, all_axes = plt.subplots(1, len(columns), figsize=(13, 3.4))
    for axes, column in zip(all_axes, columns, strict=True):
        for i, cell in enumerate(weights.values()):
            values = results.values(data, cell, column)
            axes.plot([i] * len(values), values, ".", color="tab:blue", alpha=0.4)
            if values:
                axes.plot(i, statistics.median(values), "_", color="black", ms=16)
        teacher = results.values(data, "teacher-ode-35", column)
        if teacher:
            axes.axhline(
                statistics.median(teacher), color="gray", ls="--", label="teacher"
            )
            axes.legend(fontsize=8)
        axes.set_xticks(range(len(weights)), [f"{w:g}" for w in weights])
        axes.set(xlabel="GAN weight", title=COLUMNS[column][0])
    _save(figure, path)


def spaced(grid: Any) -> Any:
    """The first rows of a grid of ten columns, with white between the images."""
    side = grid.shape[1] // 10
    images = grid[: SAMPLE_ROWS * side].reshape(SAMPLE_ROWS, side, 10, side)
    gap = (0, max(side // 8, 1))
    images = np.pad(images, ((0, 0), gap, (0, 0), gap), constant_values=1)
    return images.reshape(SAMPLE_ROWS * images.shape[1], -1)


def figure_samples(folder: Path, data: str, path: Path) -> None:
    """Sample grids of the first seed, side by side."""
    shown = [
        cell for cell in NAMES if (folder / "samples" / f"{data}_{cell}.png").is_file()
    ]
    columns = 3
    rows = -(-len(shown) // columns)
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(11, 1.15 * rows), squeeze=False
    )
    for axes in all_axes.flat:
        axes.axis("off")
    for axes, cell in zip(all_axes.flat, shown, strict=False):
        grid = plt.imread(folder / "samples" / f"{data}_{cell}.png")
        axes.imshow(spaced(grid), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(NAMES[cell], fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


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
