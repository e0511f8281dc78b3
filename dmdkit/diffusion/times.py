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
from typing import TypeVar

import torch

from dmdkit._random import indices, normal, uniform
from dmdkit.diffusion.tables import DeviceTable
from dmdkit.types import Time, TimeSampler

Device = torch.device | str | None
Generator = torch.Generator | None
Number = TypeVar("Number", float, torch.Tensor)


def karras_sigmas(
    steps: int,
    sigma_min: float | int = 0.002,
    sigma_max: float | int = 80.0,
    rho: float | int = 7.0,
) -> tuple[float, ...]:
    r"""EDM's grid of noise levels, from the largest to the smallest.

    $\sigma_i = (\sigma_{\max}^{1/\rho} + \frac{i}{n-1} (\sigma_{\min}^{1/\rho} -
    \sigma_{\max}^{1/\rho}))^\rho$.

    Source: Karras et al. 2022 (arXiv 2206.00364), Eq. 5, without the final zero.

    Args:
        steps: The number of levels, at least 1 (one level is `sigma_max`).
        sigma_min: The smallest level, > 0.
        sigma_max: The largest level, > `sigma_min`.
        rho: How strongly the levels gather at the small end.

    Returns:
        The levels in falling order.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [round(sigma, 3) for sigma in karras_sigmas(3)]
        [80.0, 2.515, 0.002]
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, expected "
            "0 < sigma_min < sigma_max."
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = (i / max(steps - 1, 1) for i in range(steps))
    return tuple((high + r * (low - high)) ** rho for r in ramp)


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
            _shifted(end, self.shift) for end in getattr(self.times, "ends", ())
        )

    def __call__(
        self, batch: int, *, device: Device = None, generator: Generator = None
    ) -> Time:
        """Draws one time for each of `batch` samples, fp32 [b]."""
        t = self.times(batch, device=device, generator=generator)
        return _shifted(t, self.shift)


def few_step_times(n: int, steps: int = 1000) -> tuple[float, ...]:
    """The times of an n-step student of a discrete process.

    DMD2, section 4.4: 999, 749, 499, 249 for four steps of 1000. The official code
    takes every (steps // n)-th index down from the last; where `n` does not divide
    `steps` its list is longer than n and only the first n are used, as here.

    Args:
        n: The number of student calls, 1 ... `steps`.
        steps: The number of indices of the process.

    Returns:
        The times in falling order.

    Raises:
        ValueError: If `n` is out of range.

    Examples:
        >>> few_step_times(4)
        (999.0, 749.0, 499.0, 249.0)
    """
    if not 1 <= n <= steps:
        raise ValueError(f"n: got {n}, expected 1 ... {steps}.")
    return tuple(float(steps - 1 - i * (steps // n)) for i in range(n))


def few_step_flow_times(n: int, shift: float | int = 1.0) -> tuple[float, ...]:
    r"""The times of an n-step student of a rectified flow, shifted.

    Uniform before the shift: $u_i = 1 - i/n$, $t_i = s u_i / (1 + (s - 1) u_i)$.

    Args:
        n: The number of student calls, at least 1.
        shift: The shift s > 0, as in `ShiftedTime`.

    Returns:
        The times in falling order, from 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> few_step_flow_times(4, shift=5)
        (1.0, 0.9375, 0.8333333333333334, 0.625)
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1.")
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, expected > 0.")
    uniform_times = (1 - i / n for i in range(n))
    return tuple(_shifted(u, shift) for u in uniform_times)


def _shifted(t: Number, shift: float | int) -> Number:
    # s t / (1 + (s - 1) t), as it is exactly 1 at t = 1 and never above.
    return t / (t + (1 - t) / shift)
