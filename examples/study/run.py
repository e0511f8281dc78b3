"""Runs or resumes the study: the paper's tables and figures at small scale, on a CPU.

    python examples/study/run.py --dry-run   # what is left, and how long it would take
    python examples/study/run.py             # everything that is not in OUT yet
    python examples/study/run.py --quick     # a taste, in some minutes

Every finished cell is written at once, so an interrupted study goes on with the same
command and loses the cells that were being trained. It ends with the plots and tables
of `report.py`.
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse
from study.cells import CELLS
from study.datasets import DATA, Data
from study.distil import PAIRS, Run, Trained, make_pairs, train
from study.evaluation import SAMPLES, Evaluator
from study.records import Records, Task, commit_of
from study.report import write_report
from study.teachers import HELD_OUT, TEACHERS, draw_teacher, names_of, seeds_of
from tqdm import tqdm

DataName = Literal["digits", "fashion"]
CURVE_SAMPLES = 500
CURVE_SEED = 10_000
GRID_ROWS = 6


@dataclass(frozen=True)
class Settings:
    """Runs or resumes the study."""

    data: tuple[DataName, ...] = ("digits", "fashion")
    cells: tuple[str, ...] = ()
    """Only these cells; all of `cells.py` if empty."""
    seeds: int | None = None
    """Training seeds of a cell. None: five on digits, three on Fashion-MNIST."""
    budget: int = 600
    """Critic updates of a cell, the same for all."""
    workers: int = 2
    """Runs at a time, one thread each."""
    out: Path = Path("runs/study")
    """Where results.csv, measures.csv, curves.csv and sample grids go."""
    quick: bool = False
    """Digits alone, one seed, some cells, a sixth of the budget, into OUT/quick."""
    dry_run: bool = False
    """Only say what is left and how long it would take."""

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        for name in ("seeds", "budget", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {value}: expected >= 1.")
        known = {*CELLS, *TEACHERS, HELD_OUT}
        for name in self.cells:
            if name not in known:
                raise SystemExit(
                    f"--cells {name}: expected some of {', '.join(sorted(known))}."
                )


QUICK_CELLS = ("held-out", "teacher-ode-17", "dmd2", "ttur", "no-regression")
QUICK_BUDGET = 100


def tasks_of(settings: Settings) -> list[Task]:
    """Everything to train and to measure, the first seeds of all cells first."""
    tasks = []
    for name in settings.data:
        for cell in settings.cells or names_of(name):
            if cell not in names_of(name):
                continue
            budget = settings.budget if cell in CELLS else 0
            seeds = seeds_of(name, cell, settings.seeds)
            tasks += [Task(name, cell, seed, budget) for seed in seeds]
    return sorted(tasks, key=lambda task: task.seed)


_evaluators: dict[str, Evaluator] = {}


def _evaluator(data: Data) -> Evaluator:
    """The evaluator of a data set, made once in each process."""
    if data.name not in _evaluators:
        _evaluators[data.name] = Evaluator(data)
    return _evaluators[data.name]


def perform(task: Task) -> dict[str, Any]:
    """Trains a cell, or draws from a teacher, and measures it, in its own process."""
    torch.set_num_threads(1)
    data = DATA[task.data]
    evaluator = _evaluator(data)
    trained = None
    if task.cell == HELD_OUT:
        images = evaluator.held_out_by_class(GRID_ROWS)
        measured = evaluator.measure_held_out()
    else:
        if task.cell in TEACHERS:
            draw = draw_teacher(data, TEACHERS[task.cell])
        else:
            trained = train_cell(task, data, evaluator)
            draw = trained.run.draw
        images = evaluator.draw(draw, SAMPLES, seed=task.seed)
        measured = evaluator.measure(images)
    return {
        "measured": asdict(measured),
        "generator_updates": trained.generator_updates if trained else 0,
        "critic_updates": trained.critic_updates if trained else 0,
        "seconds": trained.seconds if trained else 0.0,
        "curve": trained.curve if trained else [],
        "grid": images[: GRID_ROWS * data.classes] if task.seed == 1 else None,
    }


def train_cell(task: Task, data: Data, evaluator: Evaluator) -> Trained:
    """Trains one cell; those of the figures with twenty points of their curves."""

    def measure(run: Run) -> dict[str, float]:
        images = evaluator.draw(run.draw, CURVE_SAMPLES, CURVE_SEED)
        last = evaluator.draw(run.draw_last, CURVE_SAMPLES, CURVE_SEED)
        return {
            "frechet": evaluator.frechet(images),
            "brightness": last.mean().item(),
            "contrast": last.flatten(1).std(dim=1).mean().item(),
        }

    cell = CELLS[task.cell]
    every = max(task.budget // 20, 1) if cell.has_curve else None
    return train(data, cell, task.seed, task.budget, measure, every)


def seconds_of(task: Task, records: Records) -> float:
    """How long a task takes: as others of its cell took, else by a short trial."""
    known = records.seconds_of(task)
    if known is not None:
        return known
    data = DATA[task.data]
    if task.cell == HELD_OUT:
        return 1.0
    if task.cell in TEACHERS:
        return 5.0 * TEACHERS[task.cell].calls / 17
    cell = CELLS[task.cell]
    preparation = 0.0
    if cell.regression_weight:
        started = time.process_time()
        make_pairs(data, PAIRS // 16)
        preparation = 16 * (time.process_time() - started)
    run = Run(data, replace(cell, regression_weight=0.0), seed=0)
    started = time.process_time()
    for step in range(10):
        run.iterate(step)
    each = (time.process_time() - started) / 10
    return each * task.budget * (cell.pretraining + cell.budgets) + preparation


def main(settings: Settings) -> None:
    """Runs what is left, and writes the report."""
    if settings.quick:
        settings = Settings(
            data=("digits",),
            cells=settings.cells or QUICK_CELLS,
            seeds=1,
            budget=QUICK_BUDGET,
            workers=settings.workers,
            out=settings.out / "quick",
            dry_run=settings.dry_run,
        )
    torch.set_num_threads(1)
    records = Records(settings.out)
    records.require_budget(settings.budget)
    tasks = tasks_of(settings)
    left = [task for task in tasks if not records.has(task)]
    print(f"{len(tasks) - len(left)} of {len(tasks)} are done; {len(left)} are left.")
    costs: dict[tuple[str, str], float] = {}
    for task in tqdm(left, desc="estimating", leave=False):
        if (task.data, task.cell) not in costs:
            costs[task.data, task.cell] = seconds_of(task, records)
    if settings.dry_run:
        print_plan(left, costs, settings.workers)
        return
    run_all(left, costs, records, settings)
    write_report(settings.out)


def print_plan(
    left: list[Task], costs: dict[tuple[str, str], float], workers: int
) -> None:
    """The runs that are left and an estimate of their time."""
    for (data, cell), seconds in costs.items():
        count = sum((task.data, task.cell) == (data, cell) for task in left)
        print(f"{data:8} {cell:24} {count} x {seconds / 60:5.1f} min")
    total = sum(costs[task.data, task.cell] for task in left)
    print(f"{total / 3600:.1f} hours of one core, {total / 3600 / workers:.1f} here.")


def run_all(
    left: list[Task],
    costs: dict[tuple[str, str], float],
    records: Records,
    settings: Settings,
) -> None:
    """Runs the tasks in processes of their own, and keeps each result at once."""
    commit = commit_of()
    total = sum(costs[task.data, task.cell] for task in left)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(settings.workers, mp_context=context) as pool,
        tqdm(total=round(total), unit="s", desc="study") as bar,
    ):
        waiting = {pool.submit(perform, task): task for task in left}
        try:
            for done in as_completed(waiting):
                task = waiting[done]
                records.add(task, done.result(), commit)
                bar.update(round(costs[task.data, task.cell]))
                bar.write(records.line(task))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    try:
        main(parse(Settings))
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command goes on with what is left."
        ) from None
