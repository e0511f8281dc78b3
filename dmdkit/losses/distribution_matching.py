r"""The distribution matching gradient and its surrogate loss (DMD2, Eq. 2).

With the score of Eq. 1, $s = -(x_t - \alpha_t \mu) / \sigma_t^2$, the difference of two
scores at one $x_t$ is $s_\mathrm{fake} - s_\mathrm{real} = \alpha_t (\mu_\mathrm{fake}
- \mu_\mathrm{real}) / \sigma_t^2$. DMD weighs times so that the gradient becomes

$$ g = \frac{\mu_\mathrm{fake}(x_t, t) - \mu_\mathrm{real}(x_t, t)}{\mathrm{mean} |x -
\mu_\mathrm{real}(x_t, t)|} $$

with the mean taken over one sample, as official DMD2 code has it (the normalisation is
that of DMD, arXiv 2311.18828, section 3.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from dmdkit._checked import checked
from dmdkit.diffusion.processes import expand_as
from dmdkit.losses.common import (
    Metrics,
    draw,
    finite_samples,
    per_sample_mean,
    require_equal_processes,
    require_function,
    require_gradient,
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

Normalizer: TypeAlias = Callable[[Latent, Latent], PerSample]
"""Gives the divisor of the gradient from x and the teacher's estimate, one a sample."""


def mean_absolute_error(x: Latent, x0_real: Latent) -> PerSample:
    r"""The official normaliser: mean $|x - \mu_\mathrm{real}|$ over one sample.

    Nothing is added and nothing clamped; a sample on which teacher and student agree to
    the last bit gives zero, then a non-finite gradient, which is flagged.

    Args:
        x: Generated samples, [b, ...].
        x0_real: The teacher's estimates, [b, ...].

    Returns:
        One divisor a sample, [b].
    """
    return per_sample_mean((x - x0_real).abs())


@dataclass(frozen=True)
class FlooredNormalizer:
    """`mean_absolute_error`, but never below a floor, as some later codebases do.

    Attributes:
        floor: The smallest divisor, > 0.
    """

    floor: float | int = 1e-5

    def __post_init__(self) -> None:
        """Checks the floor."""
        if not self.floor > 0:
            raise ValueError(f"floor: got {self.floor}, expected > 0.")

    def __call__(self, x: Latent, x0_real: Latent) -> PerSample:
        """Gives the divisors.

        Args:
            x: Generated samples, [b, ...].
            x0_real: The teacher's estimates, [b, ...].

        Returns:
            One divisor a sample, [b].
        """
        return mean_absolute_error(x, x0_real).clamp(min=self.floor)


class DistributionMatchingOutput(NamedTuple):
    r"""The result of a distribution matching loss; all but `loss` is detached.

    Attributes:
        loss: The surrogate; its gradient at x is `gradient / x.numel()`.
        gradient: The normalised gradient $g$, [b, ...].
        x_t: The noisy samples that both networks saw, [b, ...].
        t: Their times, [b].
        x0_real: The teacher's estimates, [b, ...].
        x0_fake: The critic's estimates, [b, ...].
        finite: Which samples and their gradients are finite, bool [b].
        metrics: Scalars by name: `gradient_norm` (norm of the loss's gradient at x),
            `normalizer` (mean divisor), `gap` (mean |real - fake|: how far the critic
            is from the teacher; it rises while the critic leaves the teacher, then
            falls slowly; no proof of good samples),
            `nonfinite` (number of samples), and `student_mean`, `student_std`,
            `real_mean`, `real_std`, `fake_mean`, `fake_std` of x and the estimates.
    """

    loss: Scalar
    gradient: Latent
    x_t: Latent
    t: Time
    x0_real: Latent
    x0_fake: Latent
    finite: Flags
    metrics: Metrics


@checked
def distribution_matching_gradient(
    x: Latent,
    x0_real: Latent,
    x0_fake: Latent,
    *,
    normalizer: Normalizer = mean_absolute_error,
) -> Latent:
    r"""The normalised gradient $g = (\mu_\mathrm{fake} - \mu_\mathrm{real}) / w$.

    Args:
        x: Generated samples, [b, ...].
        x0_real: The teacher's estimates at one x_t, [b, ...].
        x0_fake: The critic's estimates at the same x_t, [b, ...].
        normalizer: Gives $w$, one a sample.

    Returns:
        The gradient, detached, [b, ...], in fp32 or better.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If a dtype is no float.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, x0_real, x0_fake = (v.detach().to(dtype) for v in (x, x0_real, x0_fake))
    return (x0_fake - x0_real) / expand_as(normalizer(x, x0_real), x)


@checked
def gradient_surrogate(x: Latent, gradient: Latent) -> Scalar:
    r"""A loss whose gradient at x is `gradient / x.numel()`, to the last bit.

    Its value is $\frac12 \mathrm{mean}(g^2)$, that of the official
    `0.5 * mse(x, stopgrad(x - g))`; but since x - (x - g) rounds, the gradient is
    handed over directly. The value is a size, not a distance: it need not fall.

    Args:
        x: Generated samples with a graph, [b, ...].
        gradient: The gradient wanted, [b, ...].

    Returns:
        The loss.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If a dtype is no float.

    Examples:
        >>> import torch
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> gradient_surrogate(x, torch.tensor([[4.0, -2.0]])).backward()
        >>> x.grad
        tensor([[ 2., -1.]])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    gradient = gradient.detach().to(dtype)
    carrier = x.to(dtype)
    value = 0.5 * gradient.square().mean()
    # Divided before it is multiplied: 1 / numel would round on its own.
    return value + ((carrier - carrier.detach()) * (gradient / x.numel())).sum()


@checked
def distribution_matching_loss(
    x: Latent,
    x_t: Latent,
    t: Time,
    x0_real: Latent,
    x0_fake: Latent,
    *,
    normalizer: Normalizer = mean_absolute_error,
) -> DistributionMatchingOutput:
    """The loss of given estimates: the pure function in `DistributionMatchingLoss`.

    Args:
        x: Generated samples with a graph, [b, ...].
        x_t: The noisy samples that both networks saw, [b, ...].
        t: Their times, fp32 [b].
        x0_real: The teacher's estimates, [b, ...].
        x0_fake: The critic's estimates, [b, ...].
        normalizer: Gives the divisor, one a sample.

    Returns:
        The loss, its gradient, flags and metrics.

    Raises:
        ValueError: If a shape is wrong or x carries no gradient.
        TypeError: If a dtype is wrong.
    """
    require_gradient("x", x)
    x0_real, x0_fake = x0_real.detach(), x0_fake.detach()
    gradient = distribution_matching_gradient(
        x, x0_real, x0_fake, normalizer=normalizer
    )
    finite = finite_samples(x, gradient)
    clean = x.detach().to(gradient.dtype)
    metrics = {
        "gradient_norm": gradient.norm() / gradient.numel(),
        "normalizer": normalizer(clean, x0_real.to(gradient.dtype)).mean(),
        "gap": (x0_real.to(gradient.dtype) - x0_fake.to(gradient.dtype)).abs().mean(),
        "nonfinite": (~finite).sum(),
    }
    for name, value in (("student", clean), ("real", x0_real), ("fake", x0_fake)):
        value = value.to(gradient.dtype)
        metrics[f"{name}_mean"] = value.mean()
        metrics[f"{name}_std"] = value.std(correction=0)
    return DistributionMatchingOutput(
        gradient_surrogate(x, gradient),
        gradient,
        x_t.detach(),
        t,
        x0_real,
        x0_fake,
        finite,
        metrics,
    )


@dataclass(frozen=True)
class DistributionMatchingLoss:
    """Moves generated samples along the difference of two scores (DMD2, Eq. 2).

    Both networks are called without gradients: the loss reaches nothing but x.

    Attributes:
        times: The distribution of t; official DMD2 draws index 20 ... 980.
        normalizer: Gives the divisor of the gradient, one a sample.

    Examples:
        >>> import torch
        >>> from dmdkit import DistributionMatchingLoss, KarrasIndexTime
        >>> loss = DistributionMatchingLoss(times=KarrasIndexTime(20, 981))
    """

    times: TimeSampler
    normalizer: Normalizer = mean_absolute_error

    def __post_init__(self) -> None:
        """Checks what it will call."""
        require_times(self.times)
        require_function("normalizer", self.normalizer, "a function of x and x0_real")

    @checked
    def __call__(
        self,
        x: Latent,
        cond: Condition = None,
        *,
        real: Denoiser,
        fake: Denoiser,
        t: Time | None = None,
        noise: Latent | None = None,
        generator: torch.Generator | None = None,
    ) -> DistributionMatchingOutput:
        """Noises x, asks teacher and critic, and gives the surrogate loss.

        Args:
            x: Generated samples with a graph, [b, ...].
            cond: The condition of x, for both networks.
            real: The teacher, guided or not.
            fake: The critic, never guided in DMD2.
            t: Times, fp32 [b]; drawn from `times` if None.
            noise: Standard normal noise, [b, ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            The loss, its gradient, both estimates, flags and metrics.

        Raises:
            ValueError: If a shape is wrong, x carries no gradient, or the processes of
                `real` and `fake` differ.
            TypeError: If a dtype or a network is wrong.
        """
        require_gradient("x", x)
        process = require_equal_processes(real=real.process, fake=fake.process)
        with torch.no_grad():
            x_t, t, _ = draw(x.detach(), process, self.times, t, noise, generator)
            x0_real, x0_fake = real(x_t, t, cond), fake(x_t, t, cond)
        return distribution_matching_loss(
            x, x_t, t, x0_real, x0_fake, normalizer=self.normalizer
        )
