"""What protocols measure: a number never stands without what it is of."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from dmdkit._checked import checked


class Measured(NamedTuple):
    """A number that a protocol gave, with what it is of.

    Attributes:
        protocol: The protocol's name.
        value: The number.
        samples: How many samples, or prompts, it is of.
        expected: How many the protocol asks for. A Frechet distance falls with the
            number of samples: numbers of two numbers of samples cannot be compared.
        features: What it is of: network, weights, preparation.
        reference: How many reference images it is against; None: there are none.
        expected_reference: How many the protocol asks for; None: any.
    """

    protocol: str
    value: float
    samples: int
    expected: int
    features: str
    reference: int | None = None
    expected_reference: int | None = None

    @property
    def complete(self) -> bool:
        """Whether it is of as many images as the protocol asks for."""
        asked = self.expected_reference in (None, self.reference)
        return asked and self.samples == self.expected

    def __str__(self) -> str:
        """Says it with the number of samples, and what they lack."""
        said = _count(self.samples, self.expected)
        if self.reference is not None:
            said += f" against {_count(self.reference, self.expected_reference)}"
        lacking = "" if self.complete else ": not comparable"
        return f"{self.protocol} {self.value:.4g} ({said}{lacking})"


def _count(got: int, expected: int | None) -> str:
    return f"{got:,}" if expected in (None, got) else f"{got:,} of {expected:,}"


class OverSeeds(NamedTuple):
    """A distance for each of several sets of samples; `over_seeds` makes it.

    Attributes:
        by_seed: What was measured, a set each.
        labels: How the classes were drawn: as many samples of each [official DMD2], or
            at random [EDM].
    """

    by_seed: tuple[Measured, ...]
    labels: Literal["balanced", "random"]

    @property
    def single(self) -> Measured:
        """That of the first set, as official DMD2 reports it."""
        return self.by_seed[0]

    @property
    def minimum(self) -> Measured:
        """The smallest, as EDM reports it of three; optimistic by their spread."""
        return min(self.by_seed, key=lambda measured: measured.value)

    @property
    def mean(self) -> float:
        """The mean over the sets."""
        return sum(measured.value for measured in self.by_seed) / len(self.by_seed)


def over_seeds(
    by_seed: Sequence[Measured], labels: Literal["balanced", "random"]
) -> OverSeeds:
    """Lays the distances of several sets of samples side by side.

    Args:
        by_seed: What was measured, in the order of the protocol's seeds.
        labels: How the classes of the samples were drawn.

    Returns:
        All of them, the first, the smallest and the mean.

    Raises:
        ValueError: If there are none, or they differ in more than the value.
    """
    if len({measured._replace(value=0.0) for measured in by_seed}) != 1:
        raise ValueError(
            f"by_seed: {len(by_seed)} results of unlike protocols, features or numbers "
            "of samples, expected at least one, and all alike."
        )
    return OverSeeds(tuple(by_seed), labels)


class Accuracy(NamedTuple):
    """How many images a classifier takes for what they should be.

    Attributes:
        value: Their share, 0 to 1.
        samples: Of how many images.
    """

    value: float
    samples: int


@checked
def class_accuracy(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Accuracy:
    """The share of images whose largest logit is that of their class.

    Args:
        logits: A classifier's logits, [b, classes].
        labels: The classes that were asked for, [b].

    Returns:
        The share, and the number of images.

    Raises:
        ValueError: If there are none, a class is out of range, or a logit not finite.
    """
    if not len(logits):
        raise ValueError("logits: there are none.")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits: some are not finite.")
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels: {low} ... {high}, expected 0 ... {logits.shape[1] - 1}."
        )
    right = logits.argmax(1) == labels.to(logits.device)
    return Accuracy(right.double().mean().item(), len(logits))


def mean_score(name: str, scores: Tensor, expected: int, features: str) -> Measured:
    """The mean of scores as a result; refuses none, and what is not finite."""
    if not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError("scores: there are none, or some are not finite.")
    return Measured(
        name, scores.double().mean().item(), scores.numel(), expected, features
    )
