"""Chooses the study's learning rates, on a seed that no table reports.

    python examples/study/search.py

Every cell named here is trained at several learning rates. A cell keeps the rate of the
full method unless another one of these ends at least a quarter nearer to the training
images (`BETTER`); then `cells.py` has it a second time, at the best of them. The same
command resumes.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse
from study.cells import CELLS, LEARNING_RATE, Cell
from study.datasets import DATA
from study.distil import train
from study.evaluation import SAMPLES, Evaluator
from study.records import append, commit_of, read
from study.run import DataName
from tqdm import tqdm

SEED = 100
BETTER = 0.75
RATES = (4e-6, 2e-5, 1e-4, LEARNING_RATE)
SEARCHED = (
    "dmd2",
    "ttur",
    "no-regression",
    "dmd",
    "gan-alone",
    "gan-ttur",
    "four-step",
    "four-step-no-dm",
)
COLUMNS = (
    "data,cell,learning_rate,seed,budget,frechet,frechet_held_out,precision,recall,"
    "accuracy,generator_updates,seconds,commit"
).split(",")


@dataclass(frozen=True)
class Settings:
    """Trains cells at several learning rates on a seed of its own."""

    data: DataName = "digits"
    rates: tuple[float, ...] = RATES
    cells: tuple[str, ...] = SEARCHED
    budget: int = 600
    """Critic updates."""
    workers: int = 2
    """Runs at a time, one thread each."""
    out: Path = Path("runs/study")
    """Where search.csv goes."""

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        for name in ("budget", "workers"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: expected >= 1.")
        for name in self.cells:
            if name not in CELLS:
                known = ", ".join(sorted(CELLS))
                raise SystemExit(f"--cells {name}: expected some of {known}.")


def trials_of(settings: Settings) -> list[Cell]:
    """Every variant to train."""
    return [
        replace(CELLS[name], learning_rate=rate)
        for name in settings.cells
        for rate in settings.rates
    ]


def key_of(data: str, cell: Cell, budget: int) -> dict[str, str]:
    """What tells one trial from another, as search.csv has it."""
    return {
        "data": data,
        "cell": cell.name,
        "learning_rate": f"{cell.learning_rate:g}",
        "seed": str(SEED),
        "budget": str(budget),
    }


def perform(data_name: str, cell: Cell, budget: int) -> dict[str, str]:
    """Trains and measures one variant, in its own process."""
    torch.set_num_threads(1)
    data = DATA[data_name]
    evaluator = Evaluator(data)
    trained = train(data, cell, SEED, budget, lambda _: {})
    measured = evaluator.measure(evaluator.draw(trained.run.draw, SAMPLES, SEED))
    return {
        "frechet": f"{measured.frechet:.5g}",
        "frechet_held_out": f"{measured.frechet_held_out:.5g}",
        "precision": f"{measured.precision:.5g}",
        "recall": f"{measured.recall:.5g}",
        "accuracy": f"{measured.accuracy:.5g}",
        "generator_updates": str(trained.generator_updates),
        "seconds": f"{trained.seconds:.1f}",
    }


def main(settings: Settings) -> None:
    """Runs the trials that search.csv lacks."""
    path, commit = settings.out / "search.csv", commit_of()
    settings.out.mkdir(parents=True, exist_ok=True)
    done = read(path)
    left = {}
    for cell in trials_of(settings):
        key = key_of(settings.data, cell, settings.budget)
        if not any(key.items() <= row.items() for row in done):
            left[tuple(key.items())] = cell
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, mp_context=context) as pool:
        waiting = {
            pool.submit(perform, settings.data, cell, settings.budget): key
            for key, cell in left.items()
        }
        for made in tqdm(as_completed(waiting), total=len(waiting), desc="search"):
            row = {**dict(waiting[made]), **made.result(), "commit": commit}
            append(path, COLUMNS, [row])
            tqdm.write(
                f"{row['cell']}, learning rate {row['learning_rate']}: Frechet "
                f"distance {row['frechet']}, recall {row['recall']}"
            )
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main(parse(Settings))
