"""The study's tables, made from its files alone."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from study.cells import CELLS, LEARNING_RATE
from study.records import read
from study.teachers import names_of, seeds_of

Row = dict[str, str]
NAMES = {
    "held-out": "Real images, held out",
    "untrained": "Student, untrained",
    "untrained-four-step": "Four-step student, untrained",
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
    "four-step": "DMD2, four steps, guided teacher (all)",
    "four-step-no-gan": "four steps, without GAN",
    "four-step-no-dm": "four steps, without distribution matching",
    "four-step-no-simulation": "four steps, without backward simulation",
    "steps-2": "2 steps, teacher not guided",
    "steps-4": "4 steps, teacher not guided",
    "steps-8": "8 steps, teacher not guided",
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
        "held-out",
        "teacher-ode-7",
        "teacher-ode-17",
        "teacher-ode-35",
        "teacher-ode-63",
        "teacher-sde-63",
        "untrained",
        "dmd2",
        "dmd2-longer",
    ),
    "3": (
        "untrained",
        "dmd",
        "dmd-tuned",
        "no-regression",
        "no-regression-tuned",
        "ttur",
        "dmd2",
        "gan-alone",
        "gan-alone-tuned",
        "gan-ttur",
        "gan-ttur-tuned",
    ),
    "4": (
        "teacher-guided-35",
        "untrained-four-step",
        "four-step-no-gan",
        "four-step-no-dm",
        "four-step-no-dm-tuned",
        "four-step-no-simulation",
        "four-step",
    ),
    "8": ("no-regression", "asynchronous", "ttur", "ratio-10"),
    "B": (
        "held-out",
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
PAPER: dict[str, tuple[str, dict[str, str]]] = {
    "1": (
        "ImageNet, FID",
        {
            "teacher-ode-63": "2.32 (511 calls)",
            "teacher-sde-63": "1.36 (511 calls)",
            "dmd2": "1.51",
            "dmd2-longer": "1.28",
        },
    ),
    "3": (
        "ImageNet, FID",
        {
            "dmd": "2.62",
            "no-regression": "3.48",
            "ttur": "2.61",
            "dmd2": "1.51",
            "gan-alone": "2.56",
            "gan-ttur": "2.52",
        },
    ),
    "4": (
        "SDXL, FID / patch FID / CLIP",
        {
            "four-step-no-gan": "26.90 / 27.66 / 0.328",
            "four-step-no-dm": "13.77 / 27.96 / 0.307",
            "four-step-no-simulation": "20.66 / 24.21 / 0.332",
            "four-step": "19.32 / 20.86 / 0.332",
        },
    ),
}
"""What the paper reports of the same rows (arXiv 2405.14867, Tables 1, 3, 4)."""
TITLES = {"digits": "digits", "fashion": "Fashion-MNIST"}
COLUMNS: dict[str, tuple[str, int]] = {
    "frechet": ("Frechet distance ↓", 3),
    "frechet_held_out": ("Frechet, held out ↓", 3),
    "precision": ("Precision ↑", 3),
    "recall": ("Recall ↑", 3),
    "accuracy": ("Class accuracy ↑", 3),
    "nearest": ("Nearest training image", 2),
    "diversity": ("Diversity", 2),
    "class_recall": ("Recall in a class ↑", 3),
    "generator_updates": ("Student updates", 0),
    "seconds": ("CPU seconds", 0),
}
COMMON = (
    "frechet",
    "frechet_held_out",
    "precision",
    "recall",
    "accuracy",
    "nearest",
)
COLUMNS_OF = {
    "B": (*COMMON, "class_recall", "diversity"),
    "8": (*COMMON, "generator_updates", "seconds"),
    "shared": (*COMMON, "seconds"),
}


class Results:
    """The rows of a study, by data set and cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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


def label(cell: str) -> str:
    """What tables and pictures call a row."""
    name = NAMES[cell.removesuffix("-tuned")]
    if cell in CELLS and CELLS[cell].learning_rate != LEARNING_RATE:
        return f"{name}, learning rate {CELLS[cell].learning_rate:g}"
    return name


def table(results: Results, data: str, name: str) -> str:
    """One table in Markdown: medians and ranges over seeds."""
    columns = COLUMNS_OF.get(name, COMMON)
    paper, reported = PAPER.get(name, ("", {}))
    heads = ["", "Seeds", *(COLUMNS[column][0] for column in columns)]
    heads += [paper] * bool(paper)
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for cell in TABLES[name]:
        seeds = len(results.of(data, cell))
        if not seeds:
            continue
        numbers = [
            cell_text(results.values(data, cell, column), COLUMNS[column][1])
            for column in columns
        ]
        numbers += [reported.get(cell.removesuffix("-tuned"), "")] * bool(paper)
        lines.append("| " + " | ".join([label(cell), str(seeds), *numbers]) + " |")
    return "\n".join(lines) if len(lines) > 2 else "*Not trained yet.*"


def status(results: Results) -> str:
    """How much of the whole is there."""
    counts = {
        data: len([row for row in results.rows if row["data"] == data])
        for data in TITLES
    }
    whole = {
        data: sum(len(seeds_of(data, name)) for name in names_of(data))
        for data in TITLES
    }
    shown = ", ".join(
        f"{counts[data]} of {whole[data]} on {TITLES[data]}" for data in TITLES
    )
    if counts == whole:
        return f"The study is complete: {shown} (rows times seeds)."
    return f"The study is not complete yet: {shown} (rows times seeds)."


def search_table(results: Results) -> str:
    """Frechet distances of the search for learning rates, a row a cell."""
    rows = read(results.folder / "search.csv")
    rates = sorted({row["learning_rate"] for row in rows}, key=float)
    lines = [
        "| | " + " | ".join(f"{rate}" for rate in rates) + " |",
        "|" + " --- |" * (len(rates) + 1),
    ]
    found = {(r["cell"], r["learning_rate"]): float(r["frechet"]) for r in rows}
    for cell in NAMES:
        if (cell, rates[0]) in found:
            numbers = [f"{found[cell, rate]:.3f}" for rate in rates]
            lines.append("| " + " | ".join([NAMES[cell], *numbers]) + " |")
    return "\n".join(lines)


def critic_table(results: Results, data: str) -> str:
    """What `critic_steps.py` found for a data set."""
    lines = ["| Critic updates | Brightness | Contrast | |", "|" + " --- |" * 4]
    for row in read(results.folder / f"critic_steps_{data}.csv"):
        numbers = [f"{float(row[name]):.3f}" for name in ("brightness", "contrast")]
        verdict = "stable" if row["stable"] == "True" else "not stable"
        lines.append("| " + " | ".join([row["critic_steps"], *numbers, verdict]) + " |")
    return "\n".join(lines)


def fill_page(text: str, results: Results) -> str:
    """A page whose parts from `<!-- table data name -->` to `<!-- end -->` are new.

    So are those of `search`, `critic data` and `status`.
    """
    makers: dict[str, Callable[..., str]] = {
        "table": table,
        "search": search_table,
        "critic": critic_table,
        "status": status,
    }

    def fresh(match: re.Match[str]) -> str:
        kind, *names = match[1].split()
        return f"<!-- {match[1]} -->\n\n{makers[kind](results, *names)}\n\n<!-- end -->"

    pattern = r"<!-- ((?:table|search|critic|status)[ \w]*) -->\n.*?\n<!-- end -->"
    return re.sub(pattern, fresh, text, flags=re.DOTALL)
