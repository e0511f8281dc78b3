"""Fidelity and variety by nearest neighbours of features."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.types import PerSample


class PrecisionRecall(NamedTuple):
    """How much of one set is within the neighbourhoods of another.

    Attributes:
        precision: Share of samples within a real one's neighbourhood: fidelity.
        recall: Share of real ones within a sample's neighbourhood: variety.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How samples lie in the neighbourhoods of real ones.

    Attributes:
        density: In how many neighbourhoods a sample is, of k expected; above 1 where
            samples crowd.
        coverage: Share of real ones with a sample in their neighbourhood.
    """

    density: float
    coverage: float


@checked
def precision_recall(
    samples: Float[Tensor, " n f"], real: Float[Tensor, " m f"], *, neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall.

    The neighbourhood of a point reaches to its k-th nearest other point of its own set.
    Both numbers depend on the sizes of the sets: compare only numbers of the same.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), Eqs. 1 to 3; k = 3 there.

    Args:
        samples: Features of samples, [n, f].
        real: Features of real images, [m, f].
        neighbours: k, at least 1.

    Returns:
        Precision and recall, 0 to 1.

    Raises:
        ValueError: If a set has no more points than `neighbours`.
    """
    of_real, of_samples = _radii(real, neighbours), _radii(samples, neighbours)
    within_real = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = 0
    for start, distances in _rows(real, samples):
        radii = of_real[start : start + len(distances)]
        within_real |= (distances <= radii[:, None]).any(0)
        recalled += int((distances <= of_samples[None]).any(1).sum())
    return PrecisionRecall(within_real.double().mean().item(), recalled / len(real))


@checked
def density_coverage(
    samples: Float[Tensor, " n f"], real: Float[Tensor, " m f"], *, neighbours: int = 5
) -> DensityCoverage:
    """Density and coverage, which outliers of a set disturb less.

    Source: Naeem et al. 2020 (arXiv 2002.09797), Eqs. 3 and 4; k = 5 there.

    Args:
        samples: Features of samples, [n, f].
        real: Features of real images, [m, f].
        neighbours: k, at least 1.

    Returns:
        Density, >= 0, and coverage, 0 to 1.

    Raises:
        ValueError: If `real` has no more points than `neighbours`, or there are no
            samples.
    """
    if len(samples) == 0:
        raise ValueError("samples: it is empty.")
    radii = _radii(real, neighbours)
    inside, covered = 0, 0
    for start, distances in _rows(real, samples):
        within = distances <= radii[start : start + len(distances), None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    density = inside / (neighbours * len(samples))
    return DensityCoverage(density, covered / len(real))


@checked
def nearest_distance(
    samples: Float[Tensor, " b f"],
    reference: Float[Tensor, " n f"],
    *,
    skip_identical: bool = False,
) -> PerSample:
    """The Euclidean distance of each sample to the nearest of a reference set.

    Held against the distances of held-out real samples it shows memorising: a student
    that copies training images is nearer to them than real images are.

    Args:
        samples: Flattened samples or features, [b, f].
        reference: The reference set, [n, f].
        skip_identical: Leaves out distances of exactly 0, to hold a set against itself.

    Returns:
        The distances, fp64 [b].

    Raises:
        ValueError: If the shapes do not match or the reference is empty.
    """
    if reference.shape[0] == 0:
        raise ValueError("reference: it is empty.")
    rows = []
    for chunk in samples.double().split(1024):
        distances = torch.cdist(
            chunk, reference.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        if skip_identical:
            distances = distances.masked_fill(distances == 0, math.inf)
        rows.append(distances.min(dim=1).values)
    return torch.cat(rows)


CHUNK = 1024
"""Rows of distances at a time."""


def _rows(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Distances of every point of a to all of b, in chunks of rows with their start."""
    b = b.double()
    for i, part in enumerate(a.double().split(CHUNK)):
        yield (
            i * CHUNK,
            torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist"),
        )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """The distance of each point to its k-th nearest other."""
    if neighbours < 1 or len(points) <= neighbours:
        raise ValueError(
            f"neighbours: got {neighbours} with sets of {len(points)} points, expected "
            "at least 1 and fewer than points."
        )
    found = []
    for start, distances in _rows(points, points):
        rows = torch.arange(len(distances), device=points.device)
        distances[rows, start + rows] = torch.inf  # not itself
        found.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)
