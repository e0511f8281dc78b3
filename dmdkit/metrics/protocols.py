"""The paper's numbers, each as one object that says how it is taken.

A protocol is its resize, its quantisation, its features, its reference and its number
of samples; another choice of any of them gives numbers that cannot be compared. What a
protocol measures carries the number of samples beside it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dmdkit._checked import describe
from dmdkit.metrics.features import ImageFeatures
from dmdkit.metrics.results import Measured
from dmdkit.metrics.statistics import FeatureStatistics, frechet_distance

Preparation: TypeAlias = Sequence[Callable[[Tensor], Tensor]]
"""What is done to images before the network, in this order; most often `Step`s."""
Images: TypeAlias = Tensor | Sequence[Tensor]
"""A batch, uint8 [b, c, h, w], or single images, uint8 [c, h, w], of any sizes."""


@dataclass(frozen=True)
class Step:
    """A step of a preparation: one of the crops and resizes, and its size.

    Attributes:
        function: Such as `lanczos_resize`.
        size: Its size in pixels; None: its own default.

    Examples:
        >>> from dmdkit.metrics import centre_crop, lanczos_resize
        >>> print(Step(centre_crop), Step(lanczos_resize, 256))
        centre_crop lanczos_resize(256)
    """

    function: Callable[..., Tensor]
    size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Crops or resizes images.

        Args:
            images: Images of 256 levels or in [0, 255], [b, c, h, w].

        Returns:
            The images cropped or resized, [b, c, size, size].
        """
        return self.function(images, *([] if self.size is None else [self.size]))

    def __str__(self) -> str:
        """Says it in short."""
        name = getattr(self.function, "__name__", str(self.function))
        return name if self.size is None else f"{name}({self.size})"


def prepare_images(images: Images, steps: Preparation) -> Tensor:
    """Takes images of 256 levels through the steps of a preparation.

    Args:
        images: A batch, uint8 [b, c, h, w], or single images, uint8 [c, h, w], which
            may have different sizes where the steps give them one.
        steps: The steps, in order.

    Returns:
        The batch, as the last step leaves it.

    Raises:
        ValueError: If single images still differ in size, or there are none.
        TypeError: If they are not uint8.
    """
    batches = [images] if isinstance(images, Tensor) else [x[None] for x in images]
    ready = []
    for batch in batches:
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            message = (
                f"images: {describe(batch)}, expected uint8[b, c, h, w], or a list of "
                "uint8[c, h, w]"
            )
            raise (ValueError if batch.dtype == torch.uint8 else TypeError)(message)
        for step in steps:
            batch = step(batch)
        ready.append(batch)
    shapes = sorted({tuple(x.shape[1:]) for x in ready})
    if len(shapes) != 1:
        found = ", ".join("x".join(map(str, shape)) for shape in shapes) or "none"
        raise ValueError(f"images: got {found}, expected all of one mode and size.")
    return torch.cat(ready)


@dataclass(frozen=True)
class DistanceProtocol:
    """A Frechet distance: of which features of which images, and from what.

    Attributes:
        name: Its name.
        samples: How many samples it takes.
        prepare: What is done to images of 256 levels before the network, real ones and
            samples alike, in this order.
        network: Opens the feature network: `network(weights, checksum=...)`.
        reference: The real images, in words.
        reference_samples: How many they are; None: as many as the data set has.
        resolution: Width and height that images must have; None: any.
        seeds: The first seed of each set of samples; image i of a set has its own seed,
            this plus i.
        source: Where all this is from.
    """

    name: str
    samples: int
    prepare: tuple[Callable[[Tensor], Tensor], ...]
    network: Callable[..., ImageFeatures]
    reference: str
    reference_samples: int | None = None
    resolution: int | None = None
    seeds: tuple[int, ...] = (0,)
    source: str = ""

    def features_of(
        self, batches: Iterable[Images], network: ImageFeatures
    ) -> Iterator[Tensor]:
        """Gives the features of images batch by batch, fp32 [b, dim] on the CPU.

        Args:
            batches: Batches of images of 256 levels, or lists of single ones.
            network: The feature network.

        Yields:
            Features, to update statistics with, and to keep for `kernel_distance`,
            `precision_recall` or `density_coverage`.

        Raises:
            ValueError: If images differ in size where nothing resizes them, or have
                not the protocol's resolution.
            TypeError: If they are not uint8.
        """
        for images in batches:
            if self.resolution is not None:
                _require_resolution(self, images)
            yield network(prepare_images(images, self.prepare)).float().cpu()

    def empty_statistics(self, network: ImageFeatures) -> FeatureStatistics:
        """Gives statistics of nothing yet, that know which features they are of.

        Args:
            network: The feature network.

        Returns:
            Empty statistics.
        """
        return FeatureStatistics(network.dim, self.label(network))

    def statistics(
        self, batches: Iterable[Images], network: ImageFeatures
    ) -> FeatureStatistics:
        """Gathers the statistics of images, real ones or samples.

        Args:
            batches: Batches of images of 256 levels, or lists of single ones; on
                several ranks those of this one.
            network: The feature network.

        Returns:
            The statistics, on several ranks to be merged by `merged_ranks`.

        Raises:
            ValueError: If images do not fit the protocol, or features are not finite.
            TypeError: If they are not uint8.
        """
        statistics = self.empty_statistics(network)
        for features in self.features_of(batches, network):
            statistics.update(features)
        return statistics

    def distance(
        self, samples: FeatureStatistics, reference: FeatureStatistics
    ) -> Measured:
        """Gives the Frechet distance, and what it is of.

        Args:
            samples: Statistics of samples, from `statistics`.
            reference: Statistics of real images: from there, or from a file that the
                protocol's source provides.

        Returns:
            The distance.

        Raises:
            ValueError: If the features are not the same, or one of the sets is no
                larger than their number.
        """
        for name, statistics in (("samples", samples), ("reference", reference)):
            if statistics.count <= statistics.dim:
                raise ValueError(
                    f"{name}: {statistics.count} images, {self.name} with its "
                    f"{statistics.dim} features needs more images than features."
                )
        return Measured(
            self.name,
            frechet_distance(samples, reference),
            samples.count,
            self.samples,
            samples.features or reference.features or "unknown",
            reference.count,
            self.reference_samples,
        )

    def label(self, network: ImageFeatures) -> str:
        """Names its features: network, weights and preparation.

        Args:
            network: The feature network.

        Returns:
            The name, by which statistics are told apart.
        """
        steps = ", ".join(map(_named, self.prepare)) or "as it is"
        return f"{network.name}, each image {steps}"


def describe_protocol(protocol: Any) -> dict[str, Any]:
    """Everything that a protocol states, in words and numbers that JSON can hold.

    Args:
        protocol: A protocol of any kind.

    Returns:
        Its attributes by name; steps and networks by their names.
    """
    return {f.name: _plain(getattr(protocol, f.name)) for f in fields(protocol)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _named(value) if callable(value) else value


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _require_resolution(protocol: DistanceProtocol, images: Images) -> None:
    size = protocol.resolution
    for image in [images] if isinstance(images, Tensor) else images:
        if image.shape[-2:] != (size, size):
            height, width = image.shape[-2:]
            raise ValueError(
                f"images: {height}x{width} pixels, {protocol.name} takes {size}x{size} "
                "and resizes nothing before the network."
            )
