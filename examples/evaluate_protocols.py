"""Protocols by name, and what they measure: rows of images, then numbers of all rows.

A measure turns a batch of images to a row of numbers each, on any process; and all rows
of a set of images to its result, on the first process.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from digits_common import (
    CLASSIFIER_FILE,
    FEATURES,
    SHAPE,
    load_classifier,
    load_digits,
)
from evaluate_images import ImageSource
from evaluate_settings import NetworkName, ProtocolName, Settings
from runs import to_pixels
from torch import Tensor, nn

from dmdkit import FeatureStatistics, LPIPSDistance
from dmdkit.metrics import (
    CLIP_SCORE,
    CLIP_SCORE_BIGG,
    COCO10K_512,
    COCO30K_256,
    FD_DINOV2,
    IMAGENET64_EDM,
    LPIPS_DIVERSITY,
    PATCH_FID_299,
    CallableFeatures,
    CLIPEncoder,
    CLIPScoreProtocol,
    DistanceProtocol,
    DiversityProtocol,
    ImageFeatures,
    Measured,
    class_accuracy,
    density_coverage,
    kernel_distance,
    precision_recall,
)
from dmdkit.metrics.weights import find_weights

KID_SUBSET = 1000


def digits_features(
    weights: Path | None = None, *, checksum: str | None = None
) -> CallableFeatures:
    """The 64 features of the shipped classifier of digits."""
    del weights, checksum  # it is in the repository
    digest = hashlib.sha256(CLASSIFIER_FILE.read_bytes()).hexdigest()
    classifier = load_classifier()
    return CallableFeatures(
        lambda pixels: classifier.features(pixels.cpu().float() / 127.5 - 1),
        f"digits classifier (sha256 {digest[:16]})",
        FEATURES,
    )


DIGITS = DistanceProtocol(
    name="digits",
    samples=5000,
    prepare=(),
    network=digits_features,
    reference="the 1,437 digits of scikit-learn that teacher and classifier learnt",
    reference_samples=1437,
    resolution=SHAPE[-1],
    seeds=(0, 5000, 10_000),
    source="examples/digits_evaluation.py, but of images of 256 levels",
)
"""The digits of this repository: everything that the others do, on a CPU."""

AnyProtocol = DistanceProtocol | CLIPScoreProtocol | DiversityProtocol
PROTOCOLS: dict[ProtocolName, AnyProtocol] = {
    "imagenet64_edm": IMAGENET64_EDM,
    "coco30k_256": COCO30K_256,
    "coco10k_512": COCO10K_512,
    "patch_fid_299": PATCH_FID_299,
    "fd_dinov2": FD_DINOV2,
    "clip_score": CLIP_SCORE,
    "clip_score_bigg": CLIP_SCORE_BIGG,
    "lpips_diversity": LPIPS_DIVERSITY,
    "digits": DIGITS,
}


def images_of(protocol: AnyProtocol) -> int:
    """How many images a set has."""
    if isinstance(protocol, DiversityProtocol):
        return protocol.prompts * protocol.images_per_prompt
    return protocol.samples


def seeds_of(protocol: AnyProtocol) -> tuple[int, ...]:
    """The first seed of each set."""
    return protocol.seeds if isinstance(protocol, DistanceProtocol) else (0,)


class Reference(NamedTuple):
    """Real images as a distance takes them."""

    statistics: FeatureStatistics
    features: Tensor | None
    """All of them, [n, dim], where a number asks for them."""
    about: dict[str, Any]


class Result(NamedTuple):
    """What a set of images gave."""

    measured: Measured
    extras: dict[str, Any]


class Measure(Protocol):
    """What is measured of images."""

    @property
    def protocol(self) -> AnyProtocol: ...

    def rows(self, images: Any, source: ImageSource, batch: range) -> Tensor:
        """Numbers of a batch of images, on the CPU."""
        ...

    def result(self, rows: Tensor, source: ImageSource) -> Result:
        """The result of a set, of the rows of all its batches."""
        ...


@dataclass(frozen=True)
class Distance:
    """A Frechet distance, and what else can be said of the same features."""

    protocol: DistanceProtocol
    network: ImageFeatures
    settings: Settings
    device: torch.device
    reference: Reference | None = None

    def rows(self, images: Any, source: ImageSource, batch: range) -> Tensor:
        """Features, [b, dim]."""
        (features,) = self.protocol.features_of([images], self.network)
        return finite(features, source, batch)

    def result(self, rows: Tensor, source: ImageSource) -> Result:
        """The distance; the features are those of the images in their order."""
        assert self.reference is not None
        statistics = self.protocol.empty_statistics(self.network)
        for part in rows.split(4096):
            statistics.update(part)
        with naming("reference"):
            measured = self.protocol.distance(statistics, self.reference.statistics)
        return Result(measured, self.extras(rows, source))

    def extras(self, rows: Tensor, source: ImageSource) -> dict[str, Any]:
        """The other numbers that were asked for."""
        settings, found = self.settings, {}
        if settings.accuracy:
            assert source.labels is not None
            with torch.no_grad():
                logits = load_classifier().classify(rows.relu())
            labels = torch.tensor(source.labels)
            with naming(source.option):
                found["accuracy"] = class_accuracy(logits, labels).value
        assert self.reference is not None
        if self.reference.features is None:
            return found
        samples = rows.to(self.device)
        real = self.reference.features.to(self.device)
        if settings.kid:
            generator = torch.Generator().manual_seed(0)
            kid = kernel_distance(samples, real, generator=generator)
            found |= {"kid": kid.mean, "kid_std": kid.std}
        if settings.precision_recall:
            found |= precision_recall(samples, real)._asdict()
        if settings.density_coverage:
            found |= density_coverage(samples, real)._asdict()
        return found


@dataclass(frozen=True)
class Score:
    """A CLIP score."""

    protocol: CLIPScoreProtocol
    network: CLIPEncoder

    def rows(self, images: Any, source: ImageSource, batch: range) -> Tensor:
        """Cosines, [b]."""
        prompts = source.prompts_of(batch)
        scores = self.protocol.scores(images, prompts, self.network)
        return finite(scores, source, batch)

    def result(self, rows: Tensor, source: ImageSource) -> Result:
        """Their mean."""
        del source
        return Result(self.protocol.measured(rows, self.network), {})


@dataclass(frozen=True)
class Diversity:
    """The LPIPS among the images of a prompt."""

    protocol: DiversityProtocol
    network: LPIPSDistance

    def rows(self, images: Any, source: ImageSource, batch: range) -> Tensor:
        """A number for each prompt, [b / images a prompt]."""
        each = self.protocol.images_per_prompt
        starts = range(0, len(batch), each)
        scores = [
            self.protocol.score(images[i : i + each], self.network) for i in starts
        ]
        return finite(torch.tensor(scores), source, batch[::each])

    def result(self, rows: Tensor, source: ImageSource) -> Result:
        """Their mean."""
        del source
        return Result(self.protocol.measured(rows), {})


def finite(rows: Tensor, source: ImageSource, batch: Sequence[int]) -> Tensor:
    """Refuses rows that are not finite, by the name of their image."""
    good = rows.isfinite().reshape(len(rows), -1).all(1).tolist()
    if not all(good):
        name = source.name_of(batch[good.index(False)])
        raise ValueError(f"the features of {name} are not finite.")
    return rows


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Says in an error which option it is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"--{option}: {error}") from error


class Networks:
    """The networks that measure, each opened once."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.opened: dict[Any, Any] = {}

    def of(self, protocol: AnyProtocol) -> Any:
        """The network of a protocol."""
        if isinstance(protocol, DiversityProtocol):
            return self._open("lpips", protocol.backbone, self._lpips)
        if isinstance(protocol, CLIPScoreProtocol):
            name = "clip_bigg" if protocol.name == "clip_score_bigg" else "clip"
            return self._open(name, name, lambda _, **given: protocol.network(**given))
        name = "dinov2" if protocol.name == "fd_dinov2" else "inception"
        return self._open(
            name, protocol.network, lambda network, **given: network(**given)
        )

    def _open(self, name: NetworkName, key: Any, opener: Callable[..., Any]) -> Any:
        if key not in self.opened:
            given = {
                "weights": self.settings.weights.get(name),
                "checksum": self.settings.checksums.get(name),
            }
            try:
                network = opener(key, **given)
            except ValueError as error:
                option = "checksums" if f"{error}".startswith("checksum") else "weights"
                raise ValueError(f"--{option} {name}: {error}") from error
            if isinstance(network, nn.Module):
                network = network.to(self.device)
            self.opened[key] = network
        return self.opened[key]

    @staticmethod
    def _lpips(
        backbone: str, weights: Path | None, checksum: str | None
    ) -> LPIPSDistance:
        source = f"torchvision's {backbone}"
        if weights is None and checksum is not None:
            raise ValueError(f"checksum: there is no file; name that of {source}.")
        if weights is not None:
            find_weights(weights, checksum, source=source, fetch=lambda: weights)
        try:
            return LPIPSDistance(backbone, weights)
        except OSError as error:  # without a network
            raise ValueError(
                f"weights: {source} could not be loaded ({error}); name a file of it."
            ) from error

    def named(self) -> list[dict[str, Any]]:
        """Name and SHA-256 of all of them."""
        return [
            {
                "name": getattr(network, "name", type(network).__name__),
                "checksum": getattr(network, "checksum", None),
            }
            for network in self.opened.values()
        ]


def measure_of(
    name: ProtocolName, settings: Settings, networks: Networks, device: torch.device
) -> Distance | Score | Diversity:
    """Opens what a protocol measures with; a distance has no reference yet."""
    protocol = PROTOCOLS[name]
    network = networks.of(protocol)
    if isinstance(protocol, DiversityProtocol):
        return Diversity(protocol, network)
    if isinstance(protocol, CLIPScoreProtocol):
        return Score(protocol, network)
    return Distance(protocol, network, settings, device)


def digits_pixels() -> Tensor:
    """The real digits of 256 levels, [n, 1, 8, 8]."""
    return to_pixels(load_digits()[0].images)
