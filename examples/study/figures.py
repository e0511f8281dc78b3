"""The study's figures, made from its files alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from study.tables import COLUMNS, TABLES, Results, label

mpl.use("Agg")

import matplotlib.pyplot as plt

SAMPLE_ROWS = 2
"""Rows of samples of a cell in the picture of all."""
COLOURS = {
    "no-regression": "tab:red",
    "ttur": "tab:green",
    "ratio-10": "tab:pink",
    "asynchronous": "tab:cyan",
    "dmd": "tab:blue",
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
        axes.plot(*zip(*middle, strict=True), color=colour, label=label(cell))


def figure_8(results: Results, data: str, path: Path) -> None:
    """Brightness over training at several numbers of critic updates."""
    figure, axes = plt.subplots(figsize=(10, 4))
    cells = ("no-regression", "asynchronous", "dmd", "ttur", "ratio-10")
    _draw(axes, results, data, cells, "critic_updates", "brightness")
    axes.set(xlabel="critic updates", ylabel="brightness of samples")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    _save(figure, path)


def figure_9(results: Results, data: str, path: Path) -> None:
    """Frechet distance over training, against student updates and CPU seconds."""
    figure, both = plt.subplots(1, 2, figsize=(13, 4), sharey=True)
    cells = ("no-regression", "asynchronous", "dmd", "ttur", "ratio-10")
    against = {"generator_updates": "student updates", "seconds": "CPU seconds"}
    for axes, (x, title) in zip(both, against.items(), strict=True):
        _draw(axes, results, data, cells, x, "frechet")
        axes.set(xlabel=title, yscale="log")
        axes.grid(alpha=0.3, which="both")
    both[0].set_ylabel("Frechet distance")
    both[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
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
    columns = ("frechet", "frechet_held_out", "class_recall", "nearest")
    figure, all_axes = plt.subplots(1, len(columns), figsize=(13, 3.4))
    for axes, column in zip(all_axes, columns, strict=True):
        for i, cell in enumerate(weights.values()):
            values = results.values(data, cell, column)
            axes.plot([i] * len(values), values, ".", color="tab:blue", alpha=0.4)
            if values:
                axes.plot(i, statistics.median(values), "_", color="black", ms=16)
        lines = {"teacher": ("teacher-ode-35", "--"), "held out": ("held-out", ":")}
        for name, (row, style) in lines.items():
            if values := results.values(data, row, column):
                middle = statistics.median(values)
                axes.axhline(middle, color="gray", ls=style, label=name)
                axes.legend(fontsize=7)
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
    cells = dict.fromkeys(cell for cells in TABLES.values() for cell in cells)
    shown = [
        cell for cell in cells if (folder / "samples" / f"{data}_{cell}.png").is_file()
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
        axes.set_title(label(cell), fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
