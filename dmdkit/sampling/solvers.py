r"""Many-step samplers for teachers: baselines, and pairs for the regression loss.

With $\hat\epsilon = (x_t - \alpha \mu) / \sigma$, a step from $(\alpha, \sigma)$ to
$(\alpha', \sigma')$ along the probability flow is $x + \Delta\alpha\, \mu +
\Delta\sigma\, \hat\epsilon$: for variance exploding noise this is EDM's Euler step, for
variance preserving noise DDIM (arXiv 2010.02502), for rectified flow the velocity step.
The last step goes to clean data, where it is the denoiser's estimate itself.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.diffusion.processes import VarianceExploding, expand_as
from dmdkit.sampling.common import check_times, fill, given_or_fresh_noise
from dmdkit.types import Condition, Denoiser, Latent


def _levels(
    denoiser: Denoiser, t: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at a time, or those of clean data."""
    if t is None:
        return expand_as(fill(1, like), like), expand_as(fill(0, like), like)
    process = denoiser.process
    return expand_as(process.alpha(t), like), expand_as(process.sigma(t), like)


def _start(denoiser: Denoiser, times: tuple[float | int, ...], noise: Tensor) -> Tensor:
    for time in times:
        denoiser.process.check_time(time)
    if float(denoiser.process.sigma(torch.tensor([float(times[-1])]))) == 0:
        raise ValueError(
            f"times: the last one, {times[-1]}, is clean data; leave it out, the last "
            "step goes there anyway."
        )
    return denoiser.process.prior(noise, fill(times[0], noise))


@dataclass(frozen=True)
class EulerSampler:
    """First-order integration of the probability flow; DDIM for discrete processes.

    Attributes:
        times: The times of the calls in falling order, clean data left out: one call
            each (see `karras_sigmas`, `few_step_times`, `few_step_flow_times`).
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        check_times(self.times)

    @checked
    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, noise: Latent, cond: Condition = None
    ) -> Latent:
        """Integrates from noise to samples.

        Args:
            denoiser: The teacher, guided or not.
            noise: Standard normal noise, [b, ...].
            cond: The condition.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If a shape or a time is wrong.
            TypeError: If a dtype or the denoiser is wrong.
        """
        x = _start(denoiser, self.times, noise)
        for now, then in zip(self.times, (*self.times[1:], None), strict=True):
            t = fill(now, x)
            alpha, sigma = _levels(denoiser, t, x)
            t_then = None if then is None else fill(then, x)
            alpha_then, sigma_then = _levels(denoiser, t_then, x)
            x0 = denoiser(x, t, cond)
            x = alpha_then * x0 + sigma_then * (x - alpha * x0) / sigma
        return x


@dataclass(frozen=True)
class HeunSampler:
    """Second-order integration of the probability flow: n times, 2n - 1 calls.

    Source: Karras et al. 2022 (arXiv 2206.00364), Algorithm 1; here for any process.

    Attributes:
        times: The times in falling order, clean data left out: `karras_sigmas(9)` is
            EDM's sampler at 17 calls, `karras_sigmas(256)` at 511.
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        check_times(self.times)

    @property
    def calls(self) -> int:
        """How often the denoiser is called."""
        return 2 * len(self.times) - 1

    @checked
    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, noise: Latent, cond: Condition = None
    ) -> Latent:
        """Integrates from noise to samples.

        Args:
            denoiser: The teacher, guided or not.
            noise: Standard normal noise, [b, ...].
            cond: The condition.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If a shape or a time is wrong.
            TypeError: If a dtype or the denoiser is wrong.
        """
        x = _start(denoiser, self.times, noise)
        for now, then in zip(self.times, (*self.times[1:], None), strict=True):
            t_then = None if then is None else fill(then, x)
            x = _heun_step(denoiser, x, fill(now, x), t_then, cond)
        return x


def _heun_step(
    denoiser: Denoiser, x: Tensor, t: Tensor, t_then: Tensor | None, cond: Condition
) -> Tensor:
    alpha, sigma = _levels(denoiser, t, x)
    alpha_then, sigma_then = _levels(denoiser, t_then, x)
    x0 = denoiser(x, t, cond)
    noise = (x - alpha * x0) / sigma
    if t_then is None:
        return x0
    guess = x + (alpha_then - alpha) * x0 + (sigma_then - sigma) * noise
    x0_then = denoiser(guess, t_then, cond)
    noise_then = (guess - alpha_then * x0_then) / sigma_then
    return (
        x
        + (alpha_then - alpha) * (x0 + x0_then) / 2
        + (sigma_then - sigma) * (noise + noise_then) / 2
    )


@dataclass(frozen=True)
class StochasticSampler:
    r"""EDM's stochastic sampler: Heun steps with noise added before each.

    Source: Karras et al. 2022 (arXiv 2206.00364), Algorithm 2; the defaults are those
    of its Table 5 for ImageNet-64, with 256 times the SDE row of DMD2's Table 1.

    Attributes:
        times: Sigmas in falling order, clean data left out.
        churn: $S_\mathrm{churn}$ >= 0: how much noise, over the whole trajectory.
        s_min: No noise is added below this sigma >= 0.
        s_max: No noise is added above this sigma >= `s_min`.
        s_noise: Scales the noise added.
    """

    times: tuple[float | int, ...]
    churn: float | int = 40
    s_min: float | int = 0.05
    s_max: float | int = 50
    s_noise: float | int = 1.003

    def __post_init__(self) -> None:
        """Checks the times and the noise."""
        check_times(self.times)
        if not (self.churn >= 0 and 0 <= self.s_min <= self.s_max):
            raise ValueError(
                "churn, s_min, s_max: expected churn >= 0 and 0 <= s_min <= s_max."
            )

    @checked
    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        generator: torch.Generator | None = None,
        draws: Iterable[Tensor] | None = None,
    ) -> Latent:
        """Draws samples.

        Args:
            denoiser: The teacher, guided or not; its process must be variance
                exploding.
            noise: Standard normal noise to start from, [b, ...].
            cond: The condition.
            generator: Source of the noise added, on the device of `noise`.
            draws: The noise added, tensors of the shape of `noise` taken as they are
                needed, instead of drawing it.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If the process is another, or a shape or a time is wrong.
            TypeError: If a dtype or the denoiser is wrong.
        """
        if not isinstance(denoiser.process, VarianceExploding):
            raise ValueError(
                f"denoiser: its process is {type(denoiser.process).__name__}, but this "
                "sampler is defined for VarianceExploding."
            )
        x = _start(denoiser, self.times, noise)
        fresh = given_or_fresh_noise(draws, x, generator)
        most = min(self.churn / len(self.times), math.sqrt(2) - 1)
        for now, then in zip(self.times, (*self.times[1:], None), strict=True):
            gamma = most if self.s_min <= now <= self.s_max else 0.0
            raised = now * (1 + gamma)
            if gamma > 0:
                spread = math.sqrt(raised**2 - now**2) * self.s_noise
                x = x + spread * next(fresh)
            t_then = None if then is None else fill(then, x)
            x = _heun_step(denoiser, x, fill(raised, x), t_then, cond)
        return x


@dataclass(frozen=True)
class AncestralSampler:
    r"""DDPM's ancestral sampler: the exact posterior $q(x_s \mid x_t, x_0 = \mu)$.

    Source: Ho et al. 2020 (arXiv 2006.11239), Eqs. 6 and 7, for any spacing of times
    and any process (Kingma et al. 2021, arXiv 2107.00630, Eq. 25).

    Attributes:
        times: The times in falling order, clean data left out: one call each.
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        check_times(self.times)

    @checked
    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        generator: torch.Generator | None = None,
        draws: Iterable[Tensor] | None = None,
    ) -> Latent:
        """Draws samples.

        Args:
            denoiser: The teacher, guided or not.
            noise: Standard normal noise to start from, [b, ...].
            cond: The condition.
            generator: Source of the noise of every step, on the device of `noise`.
            draws: That noise, tensors of the shape of `noise` taken as they are needed,
                instead of drawing it.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If a shape or a time is wrong.
            TypeError: If a dtype or the denoiser is wrong.
        """
        x = _start(denoiser, self.times, noise)
        fresh = given_or_fresh_noise(draws, x, generator)
        for now, then in itertools.pairwise(self.times):
            t = fill(now, x)
            x0 = denoiser(x, t, cond)
            alpha, sigma = _levels(denoiser, t, x)
            alpha_then, sigma_then = _levels(denoiser, fill(then, x), x)
            ratio = alpha / alpha_then
            added = sigma.square() - ratio.square() * sigma_then.square()
            mean = (
                ratio * sigma_then.square() * x + alpha_then * added * x0
            ) / sigma.square()
            spread = (added.sqrt() * sigma_then) / sigma
            x = mean + spread * next(fresh)
        return denoiser(x, fill(self.times[-1], x), cond)
