r"""Noise processes: $x_t = \alpha_t x_0 + \sigma_t \epsilon$ (DMD2, section 3).

A process is a value: equal to another with the same numbers, hashable, picklable. Its
time has its own units: sigma for `VarianceExploding`, the index for
`DiscreteVariancePreserving`, [0, 1] for `RectifiedFlow`.
"""

import abc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.diffusion.tables import DeviceTable
from dmdkit.types import Latent, PerSample, Time


def expand_as(coefficient: Tensor, x: Tensor) -> Tensor:
    """Gives per-sample coefficients the rank of `x`, so that they meet axis `b` only.

    Args:
        coefficient: One number a sample, [b].
        x: The samples that they will multiply, [b, ...].

    Returns:
        The coefficients as [b, 1, ..., 1].
    """
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


class NoiseProcess(abc.ABC):
    r"""The forward process $q(x_t \mid x_0) = N(\alpha_t x_0, \sigma_t^2 I)$.

    A time outside the process's domain gives NaN coefficients, which the losses flag:
    tensors are never read back to the host to look at their values. A time known as a
    Python number is checked with `check_time`.

    Attributes:
        whole_times: Whether its times are whole indices.
    """

    whole_times: ClassVar[bool] = False

    @abc.abstractmethod
    def alpha(self, t: Time) -> PerSample:
        r"""The scale $\alpha_t$ of the clean sample.

        Args:
            t: Times, fp32 [b].

        Returns:
            One number a sample, fp32 [b]; NaN for what is no time of the process.
        """

    @abc.abstractmethod
    def sigma(self, t: Time) -> PerSample:
        r"""The standard deviation $\sigma_t$ of the noise.

        Args:
            t: Times, fp32 [b].

        Returns:
            One number a sample, fp32 [b]; NaN for what is no time of the process.
        """

    @property
    @abc.abstractmethod
    def reaches_pure_noise(self) -> bool:
        r"""Whether some time has $\alpha_t = 0$, where nothing of $x_0$ is left."""

    @abc.abstractmethod
    def check_time(self, t: float | int) -> None:
        """Refuses what is not a time of this process.

        Args:
            t: The number.

        Raises:
            ValueError: If it is none.
        """

    @checked
    def add_noise(self, x0: Latent, noise: Latent, t: Time) -> Latent:
        r"""Draws $x_t = \alpha_t x_0 + \sigma_t \epsilon$ for a given noise.

        Args:
            x0: Clean samples, [b, ...].
            noise: Standard normal noise of the same shape.
            t: Times in the process's own units, fp32 [b].

        Returns:
            The noisy samples, in fp32 or better whatever the dtype of `x0`.

        Raises:
            ValueError: If the shapes differ.
            TypeError: If a dtype is wrong, such as a bf16 time.
        """
        dtype = torch.promote_types(x0.dtype, torch.float32)
        alpha, sigma = expand_as(self.alpha(t), x0), expand_as(self.sigma(t), x0)
        return alpha * x0.to(dtype) + sigma * noise.to(dtype)

    @checked
    def prior(self, noise: Latent, t: Time) -> Latent:
        """A student's first input: unit noise, also where alpha is not quite zero.

        SD1.5 and SDXL students see pure noise at t = 999, and the one-step SDXL
        student at t = 399 (DMD2, section F.4).

        Args:
            noise: Standard normal noise, [b, ...].
            t: The time at which the student is conditioned, fp32 [b].

        Returns:
            The student's input, [b, ...].
        """
        del t
        return noise


@dataclass(frozen=True)
class VarianceExploding(NoiseProcess):
    r"""EDM's process: $x_t = x_0 + \sigma \epsilon$, time is $\sigma \ge 0$.

    Source: Karras et al. 2022 (arXiv 2206.00364), section 2.
    """

    def alpha(self, t: Time) -> PerSample:
        """One, for every sigma."""
        return torch.where((t >= 0) & t.isfinite(), 1.0, torch.nan).to(t.dtype)

    def sigma(self, t: Time) -> PerSample:
        """The time itself."""
        return torch.where((t >= 0) & t.isfinite(), t, torch.nan)

    @property
    def reaches_pure_noise(self) -> bool:
        """No finite sigma drowns the sample altogether."""
        return False

    def check_time(self, t: float | int) -> None:
        """Raises `ValueError` unless `t` is finite and not negative."""
        if not (math.isfinite(t) and t >= 0):
            raise ValueError(f"time: got {t}, expected a finite sigma >= 0.")

    @checked
    def prior(self, noise: Latent, t: Time) -> Latent:
        """A student's first input: noise scaled by sigma, as in official DMD2.

        Args:
            noise: Standard normal noise, [b, ...].
            t: The sigma at which the student is conditioned, fp32 [b].

        Returns:
            `sigma * noise`, [b, ...].
        """
        return expand_as(self.sigma(t), noise) * noise


@dataclass(frozen=True)
class DiscreteVariancePreserving(NoiseProcess):
    r"""DDPM's process: $\alpha_t^2 = \bar\alpha_t$, $\sigma_t^2 = 1 - \bar\alpha_t$.

    Time is the index 0 ... N - 1 as a whole number in fp32; any other number gives NaN.

    Source: Ho et al. 2020 (arXiv 2006.11239), Eq. 4.

    Attributes:
        alphas_cumprod: The products $\bar\alpha_t$, one an index, falling within [0, 1]
            from nearly 1 to nearly (or exactly) 0.

    Raises:
        TypeError: If they are no tuple.
        ValueError: If one lies outside [0, 1], or they do not fall.
    """

    whole_times = True
    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks the table and prepares its copies on devices."""
        values = self.alphas_cumprod
        if not isinstance(values, tuple) or not values:
            raise TypeError(
                f"alphas_cumprod: got {type(values).__name__}, expected a tuple of "
                "floats; use DiscreteVariancePreserving.from_alphas_cumprod."
            )
        if not all(0 <= value <= 1 for value in values):
            raise ValueError("alphas_cumprod: every value must lie in [0, 1].")
        if any(b >= a for a, b in itertools.pairwise(values)):
            raise ValueError("alphas_cumprod: values must fall from one to the next.")
        alphas = tuple(math.sqrt(value) for value in values)
        sigmas = tuple(math.sqrt(1 - value) for value in values)
        object.__setattr__(self, "_alphas", DeviceTable(alphas))
        object.__setattr__(self, "_sigmas", DeviceTable(sigmas))

    @classmethod
    def from_alphas_cumprod(
        cls, values: Sequence[float | int] | Tensor
    ) -> "DiscreteVariancePreserving":
        """Takes the table of a scheduler.

        Args:
            values: The cumulative products, such as `scheduler.alphas_cumprod`.

        Returns:
            The process with that table.
        """
        numbers = values.tolist() if isinstance(values, Tensor) else values
        return cls(tuple(float(value) for value in numbers))

    @classmethod
    def from_betas(
        cls, betas: Sequence[float | int] | Tensor
    ) -> "DiscreteVariancePreserving":
        r"""Builds the table from $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$.

        Args:
            betas: The variance added at each index, each in (0, 1].

        Returns:
            The process with that table.
        """
        numbers = betas.tolist() if isinstance(betas, Tensor) else betas
        product, table = 1.0, []
        for beta in numbers:
            product *= 1 - float(beta)
            table.append(product)
        return cls(tuple(table))

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float | int = 0.00085,
        beta_end: float | int = 0.012,
        steps: int = 1000,
    ) -> "DiscreteVariancePreserving":
        """Stable Diffusion's schedule: linear in the square root of beta.

        Args:
            beta_start: The first beta; the default is that of SD1.5 and SDXL.
            beta_end: The last beta.
            steps: The number of indices.

        Returns:
            The process of SD1.5 and SDXL, by default.
        """
        roots = np.linspace(beta_start**0.5, beta_end**0.5, steps)
        return cls.from_betas((roots**2).tolist())

    @property
    def steps(self) -> int:
        """The number of indices."""
        return len(self.alphas_cumprod)

    def alpha(self, t: Time) -> PerSample:
        r"""$\sqrt{\bar\alpha_t}$ at whole indices, NaN elsewhere."""
        table: DeviceTable = self._alphas  # pyright: ignore[reportAttributeAccessIssue]
        return table.at_index(t)

    def sigma(self, t: Time) -> PerSample:
        r"""$\sqrt{1 - \bar\alpha_t}$ at whole indices, NaN elsewhere."""
        table: DeviceTable = self._sigmas  # pyright: ignore[reportAttributeAccessIssue]
        return table.at_index(t)

    @property
    def reaches_pure_noise(self) -> bool:
        """True for a schedule with zero terminal signal-to-noise ratio."""
        return self.alphas_cumprod[-1] == 0

    def check_time(self, t: float | int) -> None:
        """Raises `ValueError` unless `t` is a whole index of the table."""
        if not (0 <= t < self.steps and t == int(t)):
            raise ValueError(
                f"time: got {t}, expected a whole index in 0 ... {self.steps - 1}."
            )


@dataclass(frozen=True)
class RectifiedFlow(NoiseProcess):
    r"""Flow matching's straight line: $x_t = (1 - t) x_0 + t \epsilon$, $t \in [0, 1]$.

    Source: Liu et al. 2022 (arXiv 2209.03003); Lipman et al. 2022 (arXiv 2210.02747).
    Timestep shift is not part of the process: see `ShiftedTime` and
    `few_step_flow_times`.
    """

    def alpha(self, t: Time) -> PerSample:
        r"""$1 - t$ in [0, 1], NaN elsewhere."""
        return torch.where((t >= 0) & (t <= 1), 1 - t, torch.nan)

    def sigma(self, t: Time) -> PerSample:
        r"""$t$ in [0, 1], NaN elsewhere."""
        return torch.where((t >= 0) & (t <= 1), t, torch.nan)

    @property
    def reaches_pure_noise(self) -> bool:
        """At t = 1 nothing of the sample is left."""
        return True

    def check_time(self, t: float | int) -> None:
        """Raises `ValueError` unless `t` lies in [0, 1]."""
        if not 0 <= t <= 1:
            raise ValueError(f"time: got {t}, expected a number in [0, 1].")
