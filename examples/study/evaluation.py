"""What is measured of samples in the study, the same for every cell and teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from study.datasets import Data, balanced_labels
from torch import Tensor

from dmdkit import FeatureStatistics, frechet_distance, nearest_distance
from dmdkit.metrics import precision_recall

SAMPLES = 5000
"""Samples behind every Frechet distance."""
NEAREST_SAMPLES = 500
"""Samples whose nearest training image is looked for."""
NEIGHBOUR_IMAGES = 2000
"""At most as many samples and real images for precision and recall."""
BATCH = 500

Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Noise, labels and a generator to samples."""


@dataclass(frozen=True)
class Measured:
    """All numbers of one set of samples.

    Attributes:
        frechet: Distance of classifier features to those of the training images.
        precision: Share of samples among real ones (k = 3, features).
        recall: Share of real images among samples.
        accuracy: Share of samples that the classifier takes for their class.
        frechet_held_out: Distance to the held-out images; None of themselves.
        nearest: Mean pixel distance to the nearest training image: small is copying.
        diversity: Mean distance of features of two samples of one class.
        class_recall: Recall within each class, averaged.
        brightness: Mean of all pixels.
    """

    frechet: float
    precision: float
    recall: float
    accuracy: float
    frechet_held_out: float | None
    nearest: float
    diversity: float
    class_recall: float
    brightness: float


class Evaluator:
    """Holds the real images' features, and measures samples against them."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.classifier = data.load_classifier()
        self.images, self.labels, held_out, held_out_labels = data.images
        self.features = self._features(self.images)
        self.train = self._statistics(self.features)
        self.held_out = self._statistics(self._features(held_out))
        self.held_out_images, self.held_out_labels = held_out, held_out_labels

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(x) for x in images.split(BATCH)])

    def _statistics(self, features: Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(self.data.features)
        statistics.update(features)
        return statistics

    def draw(self, draw: Draw, samples: int, seed: int) -> Tensor:
        """Class-balanced samples, in batches."""
        generator = torch.Generator().manual_seed(seed)
        parts = balanced_labels(self.data, samples).split(BATCH)
        shape = self.data.shape
        return torch.cat(
            [
                draw(torch.randn(len(c), *shape, generator=generator), c, generator)
                for c in parts
            ]
        )

    def frechet(self, images: Tensor) -> float:
        """The Frechet distance to the training images."""
        return frechet_distance(self._statistics(self._features(images)), self.train)

    def measure(self, images: Tensor, labels: Tensor | None = None) -> Measured:
        """Every number of samples; without labels they are class-balanced."""
        if labels is None:
            labels = balanced_labels(self.data, len(images))
        features = self._features(images)
        statistics = self._statistics(features)
        with torch.no_grad():
            guesses = self.classifier.classify(features.relu()).argmax(1)
        some = NEIGHBOUR_IMAGES
        near = precision_recall(features[:some], self.features[:some])
        within = [
            (features[labels == c][:200], self.features[self.labels == c][:200])
            for c in range(self.data.classes)
        ]
        recalls = [precision_recall(made, real).recall for made, real in within]
        spread = [torch.pdist(made).mean().item() for made, _ in within]
        return Measured(
            frechet=frechet_distance(statistics, self.train),
            precision=near.precision,
            recall=near.recall,
            accuracy=(guesses == labels).double().mean().item(),
            frechet_held_out=frechet_distance(statistics, self.held_out),
            nearest=self.nearest(images),
            diversity=sum(spread) / len(spread),
            class_recall=sum(recalls) / len(recalls),
            brightness=images.mean().item(),
        )

    def measure_held_out(self) -> Measured:
        """Every number of the held-out images, but their distance to themselves."""
        measured = self.measure(self.held_out_images, self.held_out_labels)
        return replace(measured, frechet_held_out=None)

    def held_out_by_class(self, rows: int) -> Tensor:
        """The first held-out images of each class, in the order of samples."""
        images, labels = self.held_out_images, self.held_out_labels
        columns = [images[labels == c][:rows] for c in range(self.data.classes)]
        return torch.stack(columns, 1).flatten(0, 1)

    def nearest(self, images: Tensor) -> float:
        """The mean distance to the nearest training image, of the first samples."""
        some = images[:NEAREST_SAMPLES].flatten(1)
        return nearest_distance(some, self.images.flatten(1)).mean().item()
