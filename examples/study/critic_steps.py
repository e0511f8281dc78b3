"""How many critic updates does a new data set need? Appendix C's advice as a tool.

    python examples/study/critic_steps.py --data digits

DMD2 recommends the smallest number of critic updates at which general statistics of the
student's images are stable. This runs short trials at several numbers, without a GAN,
watches brightness and contrast, and names the smallest that is stable. With a data set
and a teacher of your own, replace `DATA[...]` by a `Data` of yours.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

from digits_common import parse
from study.cells import CELLS
from study.datasets import DATA, Data
from study.distil import Run, train
from study.evaluation import Evaluator
from study.records import append, commit_of
from study.run import DataName

mpl.use("Agg")

import matplotlib.pyplot as plt

STATISTICS = ("brightness", "contrast")
COLUMNS = ("critic_steps", *STATISTICS, "stable", "student_updates", "seed", "commit")
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """Runs short trials and names the smallest stable number of critic updates."""

    data: DataName = "digits"
    critic_steps: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers to try."""
    student_updates: int = 60
    """Updates of the student in each trial."""
    tolerance: float = 0.3
    """A trial is stable if no statistic wanders more than this share of its spread
    among real images, in the second half. Chosen on digits, where 2 updates wander by
    1.1 and 5 by 0.2."""
    samples: int = 500
    """Images behind each statistic, always from the same noise."""
    seed: int = 0
    out: Path = Path("runs/critic_steps")
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        if not self.critic_steps or min(self.critic_steps) < 1:
            raise SystemExit("--critic-steps: expected numbers >= 1.")
        if self.student_updates < 8:
            raise SystemExit(
                f"--student-updates {self.student_updates}: expected >= 8."
            )
        if not self.tolerance > 0:
            raise SystemExit(f"--tolerance {self.tolerance}: expected > 0.")


def real_spread(images: torch.Tensor) -> dict[str, float]:
    """Each statistic's standard deviation from one real image to another."""
    flat = images.flatten(1)
    return {
        "brightness": flat.mean(dim=1).std().item(),
        "contrast": flat.std(dim=1).std().item(),
    }


def wander(curve: Curve, name: str, spread: float) -> float:
    """How much a statistic still moves, in shares of its spread among real images.

    The standard deviation around its straight trend over the second half: drifting
    towards the teacher is progress, coming and going is not.
    """
    values = [point[name] for point in curve[len(curve) // 2 :]]
    steps = list(range(len(values)))
    slope, intercept = statistics.linear_regression(steps, values)
    rest = [v - intercept - slope * s for s, v in zip(steps, values, strict=True)]
    return statistics.pstdev(rest) / spread


def smallest_stable(
    wanders: dict[int, dict[str, float]], tolerance: float
) -> int | None:
    """The smallest number of critic updates whose every statistic is stable."""
    stable = [steps for steps, by in wanders.items() if max(by.values()) <= tolerance]
    return min(stable, default=None)


def trial(data: Data, evaluator: Evaluator, steps: int, settings: Settings) -> Curve:
    """Trains without a GAN, and gives the statistics after each student update."""

    def measure(run: Run) -> dict[str, float]:
        images = evaluator.draw(run.draw_last, settings.samples, settings.seed)
        return {
            "brightness": images.mean().item(),
            "contrast": images.flatten(1).std(dim=1).mean().item(),
        }

    cell = replace(CELLS["ttur"], critic_steps=steps)
    budget = steps * settings.student_updates
    return train(data, cell, settings.seed, budget, measure, every=steps).curve


def plot(curves: dict[int, Curve], data: Data, path: Path) -> None:
    """Both statistics over the student's updates."""
    images = data.images[0]
    real = {
        "brightness": images.mean().item(),
        "contrast": images.flatten(1).std(dim=1).mean().item(),
    }
    figure, both = plt.subplots(1, 2, figsize=(11, 4))
    for axes, name in zip(both, STATISTICS, strict=True):
        for steps, curve in curves.items():
            updates = [point["generator_updates"] for point in curve]
            values = [point[name] for point in curve]
            axes.plot(updates, values, label=f"{steps} critic updates")
        axes.axhline(real[name], color="gray", ls="--", label="real images")
        axes.set(xlabel="student updates", title=name)
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(settings: Settings) -> None:
    """Runs the trials, prints a table, names a number, and draws the curves."""
    torch.set_num_threads(settings.threads)
    data = DATA[settings.data]
    evaluator, spread = Evaluator(data), real_spread(data.images[0])
    curves: dict[int, Curve] = {}
    for steps in tqdm(settings.critic_steps, desc="trials"):
        curves[steps] = trial(data, evaluator, steps, settings)
    wanders = {
        steps: {name: wander(curve, name, spread[name]) for name in STATISTICS}
        for steps, curve in curves.items()
    }
    path = settings.out / f"critic_steps_{data.name}.csv"
    plot(curves, data, path.with_suffix(".png"))
    path.unlink(missing_ok=True)
    rest = {
        "student_updates": settings.student_updates,
        "seed": settings.seed,
        "commit": commit_of(),
    }

    print(f"{'critic updates':>14}" + "".join(f"{name:>12}" for name in STATISTICS))
    for steps, by_name in wanders.items():
        row = "".join(f"{by_name[name]:>12.3f}" for name in STATISTICS)
        stable = max(by_name.values()) <= settings.tolerance
        print(f"{steps:>14}{row}  {'stable' if stable else 'not stable'}")
        found = {**by_name, "critic_steps": steps, "stable": stable, **rest}
        append(path, COLUMNS, [found])
    smallest = smallest_stable(wanders, settings.tolerance)
    if smallest is None:
        print(
            f"None of them is stable to {settings.tolerance:g}: try more critic "
            "updates, a lower learning rate of the student, or a larger batch."
        )
    else:
        print(f"The smallest that is stable: --critic-steps {smallest}.")
    print(f"Wrote {path} and its picture.")


if __name__ == "__main__":
    main(parse(Settings))
