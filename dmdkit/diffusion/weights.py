r"""Weights that turn the mean squared error of $x_0$ into that of another target.

With $x_t$ given, every prediction is affine in $x_0$, so its squared error is that of
$x_0$ times a number that depends on time alone (Salimans & Ho 2022, arXiv 2202.00512).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.types import PerSample, Time

TimeWeight: TypeAlias = Callable[[NoiseProcess, Time], PerSample]
"""A weight of the squared error of x0, one a sample."""


def unit_weight(process: NoiseProcess, t: Time) -> PerSample:
    """The plain squared error of x0: one.

    Args:
        process: The noise process in whose units `t` is.
        t: Times, fp32 [b].

    Returns:
        Ones, fp32 [b].
    """
    return torch.ones_like(process.alpha(t))


def snr_weight(process: NoiseProcess, t: Time) -> PerSample:
    r"""$\alpha^2/\sigma^2$: the squared error of x0 becomes that of epsilon.

    The critic's loss of official DMD2 on SD1.5 and SDXL.

    Args:
        process: The noise process in whose units `t` is.
        t: Times, fp32 [b].

    Returns:
        The weights, fp32 [b].
    """
    return (process.alpha(t) / process.sigma(t)).square()


def velocity_weight(process: NoiseProcess, t: Time) -> PerSample:
    r"""$((\alpha + \sigma)/\sigma)^2$: the squared error of x0 becomes that of $u$.

    For rectified flow, where $\alpha + \sigma = 1$, it is $1/\sigma^2$.

    Args:
        process: The noise process in whose units `t` is.
        t: Times, fp32 [b].

    Returns:
        The weights, fp32 [b].
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    return ((alpha + sigma) / sigma).square()


def v_weight(process: NoiseProcess, t: Time) -> PerSample:
    r"""$((\alpha^2 + \sigma^2)/\sigma)^2$: the squared error of x0 becomes that of $v$.

    For a variance preserving process, where $\alpha^2 + \sigma^2 = 1$, it is
    $1/\sigma^2$.

    Args:
        process: The noise process in whose units `t` is.
        t: Times, fp32 [b].

    Returns:
        The weights, fp32 [b].
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    return ((alpha.square() + sigma.square()) / sigma).square()


@dataclass(frozen=True)
class KarrasWeight:
    r"""EDM's weight $\lambda = 1/\hat\sigma^2 + 1/\sigma_d^2$, $\hat\sigma = \sigma/\alpha$.

    The critic's loss of official DMD2 on ImageNet-64 (there with sigma uniform in the
    Karras index, not log-normal as EDM trains). Source: Karras et al. 2022 (arXiv
    2206.00364), Table 1.

    Attributes:
        sigma_data: The standard deviation of the data, > 0.
    """  # noqa: E501

    sigma_data: float | int = 0.5

    def __post_init__(self) -> None:
        """Checks that the data have a spread."""
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data: got {self.sigma_data}, expected > 0.")

    def __call__(self, process: NoiseProcess, t: Time) -> PerSample:
        """Gives the weights.

        Args:
            process: The noise process in whose units `t` is.
            t: Times, fp32 [b].

        Returns:
            The weights, fp32 [b].
        """
        return snr_weight(process, t) + self.sigma_data**-2
