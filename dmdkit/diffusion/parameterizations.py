r"""What a network predicts, as one affine map to the clean sample.

$$ x_0 = c_\mathrm{skip}\, x_t + c_\mathrm{out}\, F(c_\mathrm{in} x_t,
c_\mathrm{noise}, c) $$

Four coefficients stand for each parameterization; with $x_t = \alpha x_0 + \sigma
\epsilon$ every row below is the prediction solved for $x_0$. The form is EDM's
(Karras et al. 2022, Eq. 7).
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.types import PerSample, Time


class Coefficients(NamedTuple):
    """The affine map at one time a sample; each fp32 [b].

    Attributes:
        c_in: What the noisy sample is multiplied by before the network sees it.
        c_skip: The share of the noisy sample in the estimate.
        c_out: The share of the network's output.
        c_noise: What the network is fed as time.
    """

    c_in: PerSample
    c_skip: PerSample
    c_out: PerSample
    c_noise: PerSample


class Parameterization(abc.ABC):
    """A way to read a network's output."""

    divides_by_alpha: ClassVar[bool] = False
    """Whether the map is singular where nothing of the sample is left."""

    @abc.abstractmethod
    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        """Gives the four coefficients at times `t`.

        Args:
            process: The noise process in whose units `t` is.
            t: Times, fp32 [b].

        Returns:
            The coefficients, each fp32 [b].
        """

    def check(self, process: NoiseProcess) -> None:
        """Refuses a process at some time of which the map has no value.

        Args:
            process: The process.

        Raises:
            ValueError: If it divides by alpha, and the process reaches alpha = 0.
        """
        if self.divides_by_alpha and process.reaches_pure_noise:
            raise ValueError(
                f"parameterization: {type(self).__name__} divides by alpha, and "
                f"{type(process).__name__} reaches alpha = 0; predict v, velocity or "
                "the sample instead."
            )


@dataclass(frozen=True)
class EpsilonPrediction(Parameterization):
    r"""The network predicts the noise: $x_0 = (x_t - \sigma F) / \alpha$.

    Source: Ho et al. 2020 (arXiv 2006.11239), Eq. 15; SD1.5 and SDXL.

    Attributes:
        time_scale: The network is fed `t * time_scale`: 1 for UNets conditioned on the
            index, 1000 for flow transformers that expect 0 ... 1000.
    """

    divides_by_alpha: ClassVar[bool] = True
    time_scale: float | int = 1

    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        r"""$c_\mathrm{skip} = 1/\alpha$, $c_\mathrm{out} = -\sigma/\alpha$."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        one = torch.ones_like(alpha)
        return Coefficients(one, 1 / alpha, -sigma / alpha, t * self.time_scale)


@dataclass(frozen=True)
class VPrediction(Parameterization):
    r"""The network predicts $v = \alpha \epsilon - \sigma x_0$.

    $x_0 = (\alpha x_t - \sigma F) / (\alpha^2 + \sigma^2)$; the denominator is 1 for a
    variance preserving process. Source: Salimans & Ho 2022 (arXiv 2202.00512).

    Attributes:
        time_scale: The network is fed `t * time_scale`: 1 for UNets conditioned on the
            index, 1000 for flow transformers that expect 0 ... 1000.
    """

    time_scale: float | int = 1

    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        r"""$c_\mathrm{skip} = \alpha/(\alpha^2+\sigma^2)$, and so on."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm = alpha.square() + sigma.square()
        one = torch.ones_like(alpha)
        return Coefficients(one, alpha / norm, -sigma / norm, t * self.time_scale)


@dataclass(frozen=True)
class VelocityPrediction(Parameterization):
    r"""The network predicts the flow's velocity $u = \epsilon - x_0$.

    $x_0 = (x_t - \sigma F) / (\alpha + \sigma)$; the denominator is 1 for rectified
    flow. Source: Lipman et al. 2022 (arXiv 2210.02747); SD3, Flux.

    Attributes:
        time_scale: The network is fed `t * time_scale`: 1 for UNets conditioned on the
            index, 1000 for flow transformers that expect 0 ... 1000.
    """

    time_scale: float | int = 1

    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        r"""$c_\mathrm{skip} = 1/(\alpha+\sigma)$, and so on."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm = alpha + sigma
        one = torch.ones_like(alpha)
        return Coefficients(one, 1 / norm, -sigma / norm, t * self.time_scale)


@dataclass(frozen=True)
class SamplePrediction(Parameterization):
    """The network predicts the clean sample itself.

    Attributes:
        time_scale: The network is fed `t * time_scale`: 1 for UNets conditioned on the
            index, 1000 for flow transformers that expect 0 ... 1000.
    """

    time_scale: float | int = 1

    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        r"""$c_\mathrm{skip} = 0$, $c_\mathrm{out} = 1$."""
        one = torch.ones_like(process.alpha(t))
        return Coefficients(one, torch.zeros_like(one), one, t * self.time_scale)


@dataclass(frozen=True)
class KarrasPreconditioning(Parameterization):
    r"""EDM's preconditioning, with $\hat\sigma = \sigma/\alpha$ on $x_t / \alpha$.

    For $\alpha = 1$ it is Karras et al. 2022 (arXiv 2206.00364), Table 1:
    $c_\mathrm{skip} = \sigma_d^2 / (\sigma^2 + \sigma_d^2)$, $c_\mathrm{out} = \sigma
    \sigma_d / \sqrt{\sigma^2 + \sigma_d^2}$, $c_\mathrm{in} = 1 / \sqrt{\sigma^2 +
    \sigma_d^2}$, $c_\mathrm{noise} = \ln(\sigma) / 4$.

    Attributes:
        sigma_data: The standard deviation of the data, > 0.
        time_scale: The network is fed $\ln(\hat\sigma)$ times this; EDM's is 1/4.
    """

    divides_by_alpha: ClassVar[bool] = True
    sigma_data: float | int = 0.5
    time_scale: float | int = 0.25

    def __post_init__(self) -> None:
        """Checks that the data have a spread."""
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data: got {self.sigma_data}, expected > 0.")

    def coefficients(self, process: NoiseProcess, t: Time) -> Coefficients:
        """EDM's four coefficients, for any process that keeps some signal."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        data = self.sigma_data
        norm = sigma.square() + (alpha * data).square()
        return Coefficients(
            c_in=norm.rsqrt(),
            c_skip=alpha * data**2 / norm,
            c_out=sigma * data * norm.rsqrt(),
            c_noise=(sigma / alpha).log() * self.time_scale,
        )
