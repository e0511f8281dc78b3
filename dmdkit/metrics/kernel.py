"""The kernel distance of two sets of features (KID)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.types import Scalar


class KernelDistance(NamedTuple):
    """The kernel distance over random subsets.

    Attributes:
        mean: Mean over the subsets; unbiased, so that it may be below zero.
        std: Standard deviation over the subsets.
    """

    mean: float
    std: float


@checked
def squared_mmd(a: Float[Tensor, " n f"], b: Float[Tensor, " m f"]) -> Scalar:
    r"""The unbiased squared maximum mean discrepancy with the kernel of KID.

    The kernel is $k(x, y) = (x \cdot y / f + 1)^3$ for f features.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012,
    Eq. 3.

    Args:
        a: Features of one set, [n, f].
        b: Features of the other, [m, f].

    Returns:
        The estimate, fp64; below zero by chance where the sets are alike.

    Raises:
        ValueError: If a set has fewer than two samples or the numbers of features
            differ.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a, b: {len(a)} and {len(b)} samples, expected at least 2.")
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values, n = kernel(x, x), len(x)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


@checked
def kernel_distance(
    a: Float[Tensor, " n f"],
    b: Float[Tensor, " m f"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """The kernel inception distance: `squared_mmd` of random subsets, averaged.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; subsets of 1,000, 100
    of them, as torch-fidelity and torchmetrics take them.

    Args:
        a: Features of one set, [n, f].
        b: Features of the other, [m, f].
        subsets: How many, at least 1.
        subset_size: Samples of each set in a subset, drawn without repetition.
        generator: Draws the subsets, on the CPU.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: If a set is smaller than a subset, or a number out of range.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"subsets, subset_size: got {subsets}, {subset_size}, expected at least 1 "
            "and 2."
        )
    if min(len(a), len(b)) < subset_size:
        raise ValueError(
            f"a, b: {len(a)} and {len(b)} samples, fewer than subset_size "
            f"{subset_size}; take a smaller one, and say so with the number."
        )

    def drawn(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)]

    found = torch.stack([squared_mmd(drawn(a), drawn(b)) for _ in range(subsets)])
    return KernelDistance(found.mean().item(), found.std(correction=0).item())
