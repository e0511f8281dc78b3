"""Distributions of the times that the losses draw.

Each is a value called as `times(batch, device=..., generator=...)` and gives one fp32
time a sample in the units of the process that it is meant for. The losses hold its
`ends`, and whether it gives `whole` indices, against the process, and raise
`ValueError` where these do not fit; what cannot be seen so (a `LogNormalTime` for a
flow) gives NaN, which the losses flag.

Official DMD2 draws the time of every loss independently: index 20 ... 980 for
distribution matching, 0 ... 999 for the critic and the GAN.
"""

from dataclasses import dataclass

import torch

from dmdkit._random import indices, normal, uniform
from dmdkit.diffusion.schedules import karras_sigmas, shifted
from dmdkit.diffusion.tables import DeviceTable
from dmdkit.types import Time, TimeSampler

Device = torch.device | str | None
Generator = torch.Generator | None


def _check_range(low: float | int, high: float | int) -> None:
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high.")


@dataclass(frozen=True)
class UniformTime:
    """Times uniform in [low, high).

    Attributes:
        low: The lower end.
        high: The upper end.
    """

    whole = False
    low: float | int = 0.0
    high: float | int = 1.0

    def __post_init__(self) -> None:
        """Checks the range."""
        _check_range(self.low, self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest time, which losses hold against the process."""
        return float(self.low), float(self.high)

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one time for each of `batch` samples, fp32 [b]."""
        return self.low + (self.high - self.low) * uniform(batch, device, generator)


@dataclass(frozen=True)
class DiscreteUniformTime:
    """Whole indices uniform in low ... high - 1, as `torch.randint` counts.

    Official DMD2 is `DiscreteUniformTime(20, 981)` for distribution matching and
    `DiscreteUniformTime(0, 1000)` for the critic and the GAN.

    Attributes:
        low: The smallest index, >= 0.
        high: One more than the largest index, > `low`.
    """

    whole = True
    low: int = 0
    high: int = 1000

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.low < 0:
            raise ValueError(f"low: got {self.low}, expected an index >= 0.")
        _check_range(self.low, self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest time, which losses hold against the process."""
        return float(self.low), float(self.high - 1)

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one index for each of `batch` samples, fp32 [b]."""
        return indices(self.low, self.high, batch, device, generator).float()


@dataclass(frozen=True)
class KarrasIndexTime:
    """Sigmas of a rising Karras grid, uniform in the index low ... high - 1.

    Official DMD2 on ImageNet-64 is `KarrasIndexTime(20, 981)` for distribution
    matching and `KarrasIndexTime(0, 1000)` for the critic and the GAN, on 1000 levels
    with index 0 the smallest.

    Attributes:
        low: The smallest index, >= 0.
        high: One more than the largest index, <= `steps`.
        steps: The number of levels, >= `high`.
        sigma_min: The smallest level.
        sigma_max: The largest level.
        rho: The grid's exponent.
    """

    whole = False
    low: int = 0
    high: int = 1000
    steps: int = 1000
    sigma_min: float | int = 0.002
    sigma_max: float | int = 80.0
    rho: float | int = 7.0

    def __post_init__(self) -> None:
        """Checks the range and prepares the grid."""
        _check_range(self.low, self.high)
        if self.low < 0 or self.high > self.steps:
            raise ValueError(
                f"low, high: got {self.low}, {self.high}, expected indices within "
                f"0 ... {self.steps}."
            )
        sigmas = karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho)
        object.__setattr__(self, "_sigmas", DeviceTable(sigmas[::-1]))

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest time, which losses hold against the process."""
        table: DeviceTable = self._sigmas  # pyright: ignore[reportAttributeAccessIssue]
        return table.values[self.low], table.values[self.high - 1]

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one sigma for each of `batch` samples, fp32 [b]."""
        index = indices(self.low, self.high, batch, device, generator)
        table: DeviceTable = self._sigmas  # pyright: ignore[reportAttributeAccessIssue]
        return table.beside(index)[index]


@dataclass(frozen=True)
class LogNormalTime:
    r"""EDM's training distribution: $\ln \sigma \sim N(\mathrm{mean}, \mathrm{std}^2)$.

    Source: Karras et al. 2022 (arXiv 2206.00364), Table 1 (P_mean, P_std).

    Attributes:
        mean: The mean of ln(sigma).
        std: Its standard deviation, > 0.
    """

    whole = False
    mean: float | int = -1.2
    std: float | int = 1.2

    def __post_init__(self) -> None:
        """Checks the spread."""
        if not self.std > 0:
            raise ValueError(f"std: got {self.std}, expected > 0.")

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one sigma for each of `batch` samples, fp32 [b]."""
        return (self.mean + self.std * normal(batch, device, generator)).exp()


@dataclass(frozen=True)
class LogitNormalTime:
    r"""SD3's training distribution: $\mathrm{logit}\, t \sim N(\mathrm{mean}, \mathrm{std}^2)$.

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 19.

    Attributes:
        mean: The mean of logit(t).
        std: Its standard deviation, > 0.
    """  # noqa: E501

    whole = False
    mean: float | int = 0.0
    std: float | int = 1.0

    def __post_init__(self) -> None:
        """Checks the spread."""
        if not self.std > 0:
            raise ValueError(f"std: got {self.std}, expected > 0.")

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest time, which losses hold against the process."""
        return 0.0, 1.0

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one time in (0, 1) for each of `batch` samples, fp32 [b]."""
        return (self.mean + self.std * normal(batch, device, generator)).sigmoid()


@dataclass(frozen=True)
class ShiftedTime:
    r"""Another distribution on [0, 1], shifted: $t' = s t / (1 + (s - 1) t)$.

    Source: Esser et al. 2024 (arXiv 2403.03206), Eq. 23.

    Attributes:
        times: The distribution before the shift, on [0, 1].
        shift: The shift s > 0; above 1 it favours noise.
    """

    whole = False
    times: TimeSampler
    shift: float | int

    def __post_init__(self) -> None:
        """Checks the shift."""
        if not self.shift > 0:
            raise ValueError(f"shift: got {self.shift}, expected > 0.")

    @property
    def ends(self) -> tuple[float, ...]:
        """Those of `times`, shifted; none if it has none."""
        return tuple(
            shifted(end, self.shift) for end in getattr(self.times, "ends", ())
        )

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one time for each of `batch` samples, fp32 [b]."""
        t = self.times(batch, device=device, generator=generator)
        return shifted(t, self.shift)
