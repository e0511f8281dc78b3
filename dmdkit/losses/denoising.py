r"""Denoising score matching: the critic's loss (DMD2, section 3), and the teachers'.

$\mathbb{E}\, w(t) \| \mu(x_t, t) - x_0 \|^2$; the weight makes it the squared error of
epsilon, v or a velocity (see `dmdkit.diffusion.weights`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dmdkit._checked import checked
from dmdkit.diffusion.weights import TimeWeight, unit_weight
from dmdkit.losses.common import (
    Metrics,
    draw,
    finite_samples,
    per_sample_mean,
    require_function,
    require_times,
)
from dmdkit.types import (
    Condition,
    Denoiser,
    Flags,
    Latent,
    PerSample,
    Scalar,
    Time,
    TimeSampler,
)


class DenoisingOutput(NamedTuple):
    """The result of a denoising loss; all but `loss` is detached.

    Attributes:
        loss: The weighted mean squared error.
        per_sample: Its terms, one a sample, [b].
        x_t: The noisy samples, [b, ...].
        t: Their times, [b].
        x0: The estimates, [b, ...].
        finite: Which samples have a finite loss, bool [b].
        metrics: Scalars by name: `error` (unweighted mean squared error of x0),
            `nonfinite` (number of samples).
    """

    loss: Scalar
    per_sample: PerSample
    x_t: Latent
    t: Time
    x0: Latent
    finite: Flags
    metrics: Metrics


@checked
def denoising_loss(
    x: Latent, x_t: Latent, t: Time, x0: Latent, weight: PerSample
) -> DenoisingOutput:
    """The loss of given estimates: the pure function in `DenoisingLoss`.

    Args:
        x: Clean samples, [b, ...]; no gradient reaches them.
        x_t: The noisy samples that were denoised, [b, ...].
        t: Their times, fp32 [b].
        x0: The estimates with a graph, [b, ...].
        weight: The weight of each sample, [b].

    Returns:
        The loss, flags and metrics.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If a dtype is wrong.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    error = per_sample_mean((x0.to(dtype) - x.detach().to(dtype)).square())
    weighted = weight * error
    finite = finite_samples(weighted)
    metrics = {"error": error.detach().mean(), "nonfinite": (~finite).sum()}
    return DenoisingOutput(
        weighted.mean(),
        weighted.detach(),
        x_t.detach(),
        t,
        x0.detach(),
        finite,
        metrics,
    )


@dataclass(frozen=True)
class DenoisingLoss:
    """Trains a denoiser on samples: the critic on the student's (DMD2, section 3).

    Attributes:
        times: The distribution of t; official DMD2 draws index 0 ... 999.
        weight: The weight of the squared error of x0: `snr_weight` (mean squared error
            of epsilon) for SD1.5 and SDXL, `KarrasWeight` for EDM.
    """

    times: TimeSampler
    weight: TimeWeight = unit_weight

    def __post_init__(self) -> None:
        """Checks what it will call."""
        require_times(self.times)
        require_function("weight", self.weight, "a function such as snr_weight")

    @checked
    def __call__(
        self,
        x: Latent,
        cond: Condition = None,
        *,
        denoiser: Denoiser,
        t: Time | None = None,
        noise: Latent | None = None,
        generator: torch.Generator | None = None,
    ) -> DenoisingOutput:
        """Noises x, denoises it, and gives the weighted squared error.

        Args:
            x: Clean samples, [b, ...]; detached here, so that no gradient reaches the
                student.
            cond: Their condition.
            denoiser: The network to train.
            t: Times, fp32 [b]; drawn from `times` if None.
            noise: Standard normal noise, [b, ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            The loss, flags and metrics.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype or the network is wrong.
        """
        process = denoiser.process
        with torch.no_grad():
            x_t, t, _ = draw(x.detach(), process, self.times, t, noise, generator)
            weight = self.weight(process, t)
        return denoising_loss(x, x_t, t, denoiser(x_t, t, cond), weight)
