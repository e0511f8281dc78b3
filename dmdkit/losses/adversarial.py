r"""The diffusion GAN loss: real or generated, told apart after noise (DMD2, Eq. 4).

With the logit $\ell$ of the discriminator $D = \mathrm{sigmoid}(\ell)$, official code
minimises the standard non-saturating form. It is followed here, for the paper's Eq. 4
prints $-\log D$ of generated samples where that form has $\log(1 - D)$:
$\mathrm{softplus}(\ell_\mathrm{fake}) + \mathrm{softplus}(-\ell_\mathrm{real})$ for the
discriminator and $\mathrm{softplus}(-\ell_\mathrm{fake})$ for the generator.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from dmdkit._checked import checked
from dmdkit.losses.common import (
    Metrics,
    draw,
    finite_samples,
    require_gradient,
    require_times,
)
from dmdkit.types import (
    Condition,
    Discriminator,
    Flags,
    Latent,
    Logits,
    RealLatent,
    RealTime,
    Scalar,
    Time,
    TimeSampler,
)


class GANGeneratorOutput(NamedTuple):
    """The generator's side; all but `loss` is detached.

    Attributes:
        loss: The loss.
        logits: The logits of generated samples, [b].
        t: Their times, [b].
        finite: Which samples and their logits are finite, bool [b].
        metrics: Scalars by name: `fooled` (share of samples taken for real),
            `nonfinite` (number of samples).
    """

    loss: Scalar
    logits: Logits
    t: Time
    finite: Flags
    metrics: Metrics


class GANDiscriminatorOutput(NamedTuple):
    """The discriminator's side; all but `loss` is detached.

    Attributes:
        loss: The loss.
        logits_fake: The logits of generated samples, [b].
        logits_real: The logits of real samples, [b'].
        t: The times of generated samples, [b].
        t_real: The times of real samples, [b'].
        finite: Which generated samples and their logits are finite, bool [b].
        finite_real: Which real samples and their logits are, bool [b'].
        metrics: Scalars by name: `accuracy` (share told right; 0.5 is even), `fake` and
            `real` (mean logits), `nonfinite` (number of samples).
    """

    loss: Scalar
    logits_fake: Logits
    logits_real: Logits
    t: Time
    t_real: Time
    finite: Flags
    finite_real: Flags
    metrics: Metrics


@checked
def gan_generator_loss(logits_fake: Logits) -> Scalar:
    r"""$\mathrm{mean}\ \mathrm{softplus}(-\ell_\mathrm{fake})$.

    Args:
        logits_fake: Logits of generated samples, [b].

    Returns:
        The loss.

    Raises:
        ValueError: If the logits are not one a sample.
    """
    return softplus(-_at_least_fp32(logits_fake)).mean()


@checked
def gan_discriminator_loss(logits_fake: Logits, logits_real: torch.Tensor) -> Scalar:
    r"""Tells generated from real samples.

    $\mathrm{mean}\ \mathrm{softplus}(\ell_\mathrm{fake}) + \mathrm{mean}\
    \mathrm{softplus}(-\ell_\mathrm{real})$.

    Args:
        logits_fake: Logits of generated samples, [b].
        logits_real: Logits of real samples, [b']; the two batches may differ in size.

    Returns:
        The loss.

    Raises:
        ValueError: If the logits are not one a sample.
    """
    if logits_real.ndim != 1:
        raise ValueError(
            f"logits_real: got shape {list(logits_real.shape)}, expected one logit a "
            "sample, [b]."
        )
    fake, real = _at_least_fp32(logits_fake), _at_least_fp32(logits_real)
    return softplus(fake).mean() + softplus(-real).mean()


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_output(x: Latent, logits: torch.Tensor, t: Time) -> GANGeneratorOutput:
    """The generator's side of given logits."""
    finite = finite_samples(x, logits)
    metrics = {
        "fooled": (logits.detach() > 0).float().mean(),
        "nonfinite": (~finite).sum(),
    }
    return GANGeneratorOutput(
        gan_generator_loss(logits), logits.detach(), t, finite, metrics
    )


def discriminator_output(
    x: Latent,
    real: RealLatent,
    logits_fake: torch.Tensor,
    logits_real: torch.Tensor,
    t: Time,
    t_real: RealTime,
) -> GANDiscriminatorOutput:
    """The discriminator's side of given logits."""
    finite = finite_samples(x, logits_fake)
    finite_real = finite_samples(real, logits_real)
    told_right = torch.cat((logits_fake < 0, logits_real > 0))
    metrics = {
        "accuracy": told_right.float().mean(),
        "fake": logits_fake.detach().mean(),
        "real": logits_real.detach().mean(),
        "nonfinite": (~finite).sum() + (~finite_real).sum(),
    }
    return GANDiscriminatorOutput(
        gan_discriminator_loss(logits_fake, logits_real),
        logits_fake.detach(),
        logits_real.detach(),
        t,
        t_real,
        finite,
        finite_real,
        metrics,
    )


@dataclass(frozen=True)
class DiffusionGANLoss:
    """Both sides of the GAN on noisy samples (DMD2, section 4.3).

    Every branch draws its own times and noise, as official DMD2 does. The paper's
    discriminator is the critic with a head: `trainable_copy(teacher, head=...)`.

    Attributes:
        times: The distribution of t; official DMD2 draws index 0 ... 999.
    """

    times: TimeSampler

    def __post_init__(self) -> None:
        """Checks what it will call."""
        require_times(self.times)

    @checked
    def generator(
        self,
        x: Latent,
        cond: Condition = None,
        *,
        discriminator: Discriminator,
        t: Time | None = None,
        noise: Latent | None = None,
        generator: torch.Generator | None = None,
    ) -> GANGeneratorOutput:
        """The generator's side: be taken for real.

        The gradient flows through the discriminator to x; call it within
        `frozen(critic)`, so that nothing gathers in the critic on the way.

        Args:
            x: Generated samples with a graph, [b, ...].
            cond: Their condition.
            discriminator: The network that tells real from generated.
            t: Times, fp32 [b]; drawn from `times` if None.
            noise: Standard normal noise, [b, ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            The loss, flags and metrics.

        Raises:
            ValueError: If a shape is wrong or x carries no gradient.
            TypeError: If a dtype or the network is wrong.
        """
        require_gradient("x", x)
        x_t, t, _ = draw(x, discriminator.process, self.times, t, noise, generator)
        return generator_output(x, discriminator.logits(x_t, t, cond), t)

    @checked
    def discriminator(
        self,
        x: Latent,
        cond: Condition,
        real: RealLatent,
        real_cond: Condition,
        *,
        discriminator: Discriminator,
        t: Time | None = None,
        noise: Latent | None = None,
        t_real: RealTime | None = None,
        noise_real: RealLatent | None = None,
        generator: torch.Generator | None = None,
    ) -> GANDiscriminatorOutput:
        """The discriminator's side: tell real from generated.

        Args:
            x: Generated samples, [b, ...]; detached here, so that no gradient reaches
                the student.
            cond: Their condition.
            real: Real samples, [b', ...].
            real_cond: Their own condition.
            discriminator: The network to train.
            t: Times of generated samples, fp32 [b]; drawn from `times` if None.
            noise: Noise of generated samples, [b, ...]; drawn if None.
            t_real: Times of real samples, fp32 [b']; drawn if None.
            noise_real: Noise of real samples, [b', ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            The loss, flags and metrics.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype or the network is wrong.
        """
        process = discriminator.process
        with torch.no_grad():
            x_t, t, _ = draw(x.detach(), process, self.times, t, noise, generator)
            real_t, t_real, _ = draw(
                real, process, self.times, t_real, noise_real, generator
            )
        logits_fake = discriminator.logits(x_t, t, cond)
        logits_real = discriminator.logits(real_t, t_real, real_cond)
        return discriminator_output(x, real, logits_fake, logits_real, t, t_real)
