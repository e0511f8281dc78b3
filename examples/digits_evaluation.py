"""How good are samples of digits? Distances, accuracy, memorising.

    python examples/digits_evaluation.py

draws from the shipped teacher at several numbers of calls, over three noise seeds, and
writes `examples/digits_teacher_rows.json`, which `digits.py` shows beside the student.
About ten minutes on one CPU core.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from digits_common import (
    CLASSES,
    FEATURES,
    HERE,
    SHAPE,
    Digits,
    load_classifier,
    load_digits,
    load_teacher,
    parse,
)
from torch import Tensor
from tqdm import tqdm

from dmdkit import (
    FeatureStatistics,
    HeunSampler,
    ScoreEstimator,
    frechet_distance,
    karras_sigmas,
    nearest_distance,
)

ROWS_FILE = HERE / "digits_teacher_rows.json"
SEEDS = (1, 2, 3)
SAMPLES = 5000
BATCH = 500
HEUN_TIMES = {7: 4, 17: 9, 35: 18, 63: 32}
"""Calls of Heun's method to the number of its times."""

Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Noise, labels and a generator to samples."""


class Row(TypedDict):
    """One row of the table: averages over seeds, and each seed's Frechet distance."""

    frechet: float
    frechet_by_seed: list[float]
    frechet_held_out: float
    accuracy: float
    nearest: float


class Evaluator:
    """Holds the real images' statistics, and measures samples against them."""

    def __init__(self) -> None:
        self.classifier = load_classifier()
        self.train, self.held_out = load_digits()
        self.train_statistics = self._statistics(self.train.images)
        self.held_out_statistics = self._statistics(self.held_out.images)

    @torch.no_grad()
    def _statistics(self, images: Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(FEATURES)
        for batch in images.split(BATCH):
            statistics.update(self.classifier.features(batch))
        return statistics

    @property
    def floor(self) -> float:
        """The Frechet distance of held-out real images to the training images."""
        return frechet_distance(self.held_out_statistics, self.train_statistics)

    def frechet(self, images: Tensor) -> float:
        """The Frechet distance of samples to the training images."""
        return frechet_distance(self._statistics(images), self.train_statistics)

    @torch.no_grad()
    def accuracy(self, data: Digits) -> float:
        """The share of samples that the classifier takes for their class."""
        guesses = [self.classifier(x).argmax(1) for x in data.images.split(BATCH)]
        return (torch.cat(guesses) == data.labels).float().mean().item()

    def nearest(self, images: Tensor) -> float:
        """The mean distance to the nearest training image."""
        reference = self.train.images.flatten(1)
        return nearest_distance(images.flatten(1), reference).mean().item()

    def row(
        self,
        draw: Draw,
        seeds: tuple[int, ...] = SEEDS,
        samples: int = SAMPLES,
        name: str = "student",
    ) -> Row:
        """Draws class-balanced samples over some seeds, and measures them."""
        frechet, held_out, accuracy, nearest = [], [], [], []
        for seed in tqdm(seeds, desc=f"evaluating {name}", leave=False):
            data = draw_many(draw, samples, seed)
            statistics = self._statistics(data.images)
            frechet.append(frechet_distance(statistics, self.train_statistics))
            held_out.append(frechet_distance(statistics, self.held_out_statistics))
            accuracy.append(self.accuracy(data))
            nearest.append(self.nearest(data.images))
        n = len(seeds)
        return Row(
            frechet=sum(frechet) / n,
            frechet_by_seed=frechet,
            frechet_held_out=sum(held_out) / n,
            accuracy=sum(accuracy) / n,
            nearest=sum(nearest) / n,
        )


def draw_many(draw: Draw, samples: int, seed: int) -> Digits:
    """Draws class-balanced samples in batches."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    images = [
        draw(torch.randn(len(part), *SHAPE, generator=generator), part, generator)
        for part in labels.split(BATCH)
    ]
    return Digits(torch.cat(images), labels)


@torch.no_grad()
def seconds_per_call(denoiser: ScoreEstimator) -> float:
    """The time of one call for 1,000 images, here and now: the median of five."""
    noise, t = torch.randn(1000, *SHAPE), torch.full((1000,), 80.0)
    labels, seconds = torch.arange(1000) % CLASSES, []
    for _ in range(6):
        started = time.perf_counter()
        denoiser(noise, t, labels)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def teacher_rows(
    evaluator: Evaluator, seeds: tuple[int, ...] = SEEDS, samples: int = SAMPLES
) -> dict[str, Row]:
    """Measures the shipped teacher by Heun's method at several numbers of calls."""
    teacher = load_teacher()
    rows = {}
    for calls, times in HEUN_TIMES.items():
        sampler = HeunSampler(karras_sigmas(times))
        rows[str(calls)] = evaluator.row(
            lambda noise, labels, _, sampler=sampler: sampler(teacher, noise, labels),
            seeds,
            samples,
            f"teacher, {calls} calls",
        )
    return rows


@dataclass(frozen=True)
class Settings:
    """Measures the shipped digits teacher."""

    samples: int = SAMPLES
    seeds: tuple[int, ...] = SEEDS
    threads: int = 1
    file: Path = ROWS_FILE
    """Where the rows go."""


def main(settings: Settings) -> None:
    """Measures the teacher and writes its rows."""
    torch.set_num_threads(settings.threads)
    evaluator = Evaluator()
    rows = teacher_rows(evaluator, settings.seeds, settings.samples)
    about = {
        "what": "the shipped digits teacher by Heun's method, by number of calls",
        "command": "python examples/digits_evaluation.py",
        "samples": settings.samples,
        "seeds": list(settings.seeds),
        "rows": rows,
    }
    settings.file.write_text(json.dumps(about, indent=2) + "\n")
    for calls, row in rows.items():
        print(
            f"{calls:>3} calls: Frechet distance {row['frechet']:.3f} "
            f"({row['frechet_held_out']:.3f} to held out), accuracy "
            f"{row['accuracy']:.4f}, nearest {row['nearest']:.3f}"
        )
    print(f"Real held-out images: {evaluator.floor:.3f}. Wrote {settings.file}.")


if __name__ == "__main__":
    main(parse(Settings))
