"""The study's files: one line a cell and seed, one line a point of the curves."""

import csv
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from study.teachers import table_of
from torch import Tensor

RESULTS = (
    "data,table,cell,seed,budget,frechet,precision,recall,accuracy,"
    "generator_updates,seconds,commit"
).split(",")
MEASURES = (
    "data,cell,seed,frechet_held_out,nearest,diversity,class_recall,brightness,"
    "critic_updates"
).split(",")
CURVES = (
    "data,cell,seed,critic_updates,generator_updates,seconds,frechet,brightness,contrast"
).split(",")


class Task(NamedTuple):
    """One training of a cell, or one drawing from a teacher."""

    data: str
    cell: str
    seed: int
    budget: int
    """Critic updates; 0 where nothing is trained."""


class Records:
    """Reads and extends the files of a folder.

    Args:
        folder: Where they are; made with the first result if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = read(folder / "results.csv")

    def has(self, task: Task) -> bool:
        """Whether a task is done, with its budget."""
        return any(
            (row["data"], row["cell"], int(row["seed"]), int(row["budget"])) == task
            for row in self.results
        )

    def require_budget(self, budget: int) -> None:
        """Refuses to mix cells of several budgets, which no table tells apart."""
        found = {int(row["budget"]) for row in self.results} - {0, budget}
        if found:
            raise SystemExit(
                f"--budget {budget}: {self.folder} has cells of {min(found)} critic "
                "updates; name another --out."
            )

    def seconds_of(self, task: Task) -> float | None:
        """The median CPU seconds of the tasks of a cell that are done, if any."""
        found = [
            float(row["seconds"])
            for row in self.results
            if (row["data"], row["cell"]) == (task.data, task.cell)
            and int(row["budget"]) == task.budget
        ]
        return statistics.median(found) if found else None

    def add(self, task: Task, outcome: dict[str, Any], commit: str) -> None:
        """Writes what `perform` gave; the line in results.csv comes last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        key = {"data": task.data, "cell": task.cell, "seed": task.seed}
        measured = {
            name: "" if x is None else f"{x:.5g}"
            for name, x in outcome["measured"].items()
        }
        points = [
            {name: f"{x:.5g}" for name, x in point.items()}
            for point in outcome["curve"]
        ]
        append(
            self.folder / "curves.csv", CURVES, [{**key, **point} for point in points]
        )
        measures = {**key, **measured, "critic_updates": outcome["critic_updates"]}
        append(self.folder / "measures.csv", MEASURES, [measures])
        if outcome["grid"] is not None:
            save_grid(outcome["grid"], self.grid_file(task.data, task.cell))
        row = {
            **key,
            **measured,
            "table": table_of(task.cell),
            "budget": task.budget,
            "generator_updates": outcome["generator_updates"],
            "seconds": f"{outcome['seconds']:.1f}",
            "commit": commit,
        }
        append(self.folder / "results.csv", RESULTS, [row])
        self.results.append({name: str(row[name]) for name in RESULTS})

    def grid_file(self, data: str, cell: str) -> Path:
        """Where samples of a cell are shown."""
        return self.folder / "samples" / f"{data}_{cell}.png"

    def line(self, task: Task) -> str:
        """One line about a task that is done."""
        row = next(
            row
            for row in reversed(self.results)
            if (row["data"], row["cell"], int(row["seed"])) == task[:3]
        )
        return (
            f"{task.data} {task.cell} seed {task.seed}: Frechet distance "
            f"{row['frechet']}, accuracy {row['accuracy']}, {row['seconds']} s"
        )


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Adds rows to a file, which gets its header with the first."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(
            file, columns, extrasaction="ignore", lineterminator="\n"
        )
        if new:
            writer.writeheader()
        writer.writerows(rows)


def save_grid(images: Tensor, path: Path) -> None:
    """Images in rows of ten classes, in [-1, 1], at twice their size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = images[:, 0].unflatten(0, (-1, 10))
    page = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    pixels = ((page.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    size = (2 * pixels.shape[1], 2 * pixels.shape[0])
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def commit_of() -> str:
    """The commit of the code that runs, with a plus if files were changed since."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(here), *arguments)
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/dmdkit", ":/examples/**/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
