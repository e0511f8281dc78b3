"""Two losses from one pass of the critic, where official DMD2 makes a pass for each.

Official code draws a time and a noise for every term (DMD2, Eqs. 2 to 4, its scripts).
Here two terms read the same noisy sample. On the critic's turn each keeps its own
expectation, for both draw from one distribution; only their errors are now correlated.
On the generator's turn the GAN term takes the times of distribution matching, 20 ...
980 in place of 0 ... 999: an approximation.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dmdkit._checked import checked, describe
from dmdkit.diffusion.guidance import concatenate_conditions
from dmdkit.diffusion.score import ScoreEstimator
from dmdkit.losses.adversarial import (
    DiffusionGANLoss,
    GANDiscriminatorOutput,
    GANGeneratorOutput,
    discriminator_output,
    generator_output,
)
from dmdkit.losses.common import draw, require_equal_processes, require_gradient
from dmdkit.losses.denoising import DenoisingLoss, DenoisingOutput, denoising_loss
from dmdkit.losses.distribution_matching import (
    DistributionMatchingLoss,
    DistributionMatchingOutput,
    distribution_matching_loss,
)
from dmdkit.types import Condition, Denoiser, Latent, RealLatent, RealTime, Time


class SharedCriticOutput(NamedTuple):
    """Both losses of the critic's turn, unweighted.

    Attributes:
        denoising: That of denoising.
        discriminator: That of telling real from generated.
    """

    denoising: DenoisingOutput
    discriminator: GANDiscriminatorOutput


class SharedGeneratorOutput(NamedTuple):
    """Both losses of the generator's turn, unweighted.

    Attributes:
        distribution_matching: That of distribution matching.
        gan: That of being taken for real.
    """

    distribution_matching: DistributionMatchingOutput
    gan: GANGeneratorOutput


def _require_loss(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{name}: got {describe(value)}, expected a {kind.__name__}, whose times "
            "and weights are taken."
        )


@dataclass(frozen=True)
class SharedCriticLoss:
    """The critic's denoising and the discriminator's loss from one pass.

    The fake branch reads the noisy samples that are denoised, and real samples go
    through the network in the same batch: the encoder sees both, the decoder the
    generated ones alone. With the same draws, losses and gradients are those of
    `DenoisingLoss` and `DiffusionGANLoss.discriminator`.

    Attributes:
        denoising: The critic's loss.
        gan: The discriminator's loss; its times must be those of `denoising`.

    Raises:
        ValueError: If the two draw their times from different distributions.
        TypeError: If one of them is another loss.

    Examples:
        >>> from dmdkit import DenoisingLoss, DiffusionGANLoss, DiscreteUniformTime
        >>> times = DiscreteUniformTime()
        >>> loss = SharedCriticLoss(DenoisingLoss(times), DiffusionGANLoss(times))
    """

    denoising: DenoisingLoss
    gan: DiffusionGANLoss

    def __post_init__(self) -> None:
        """Checks that one draw can serve both."""
        _require_loss("denoising", self.denoising, DenoisingLoss)
        _require_loss("gan", self.gan, DiffusionGANLoss)
        if self.denoising.times != self.gan.times:
            raise ValueError(
                f"gan: it draws its times from {self.gan.times}, denoising from "
                f"{self.denoising.times}; one draw serves both, so give both the same."
            )

    @checked
    def __call__(
        self,
        x: Latent,
        cond: Condition,
        real: RealLatent,
        real_cond: Condition,
        *,
        critic: ScoreEstimator,
        t: Time | None = None,
        noise: Latent | None = None,
        t_real: RealTime | None = None,
        noise_real: RealLatent | None = None,
        generator: torch.Generator | None = None,
    ) -> SharedCriticOutput:
        """Denoises x, and tells it from real samples.

        Args:
            x: Generated samples, [b, ...]; detached here, so that no gradient reaches
                the student.
            cond: Their condition.
            real: Real samples, [b', ...].
            real_cond: Their own condition, of the structure of `cond`.
            critic: The network to train, with its head.
            t: Times of generated samples, fp32 [b]; drawn if None.
            noise: Noise of generated samples, [b, ...]; drawn if None.
            t_real: Times of real samples, fp32 [b']; drawn if None.
            noise_real: Noise of real samples, [b', ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            Both losses.

        Raises:
            ValueError: If a shape is wrong, or the conditions cannot be joined.
            TypeError: If a dtype is wrong, or the network takes no shared pass (see
                `dmdkit.types.FeatureNetwork`).
        """
        process, times = critic.process, self.gan.times
        with torch.no_grad():
            x_t, t, _ = draw(x.detach(), process, times, t, noise, generator)
            real_t, t_real, _ = draw(
                real, process, times, t_real, noise_real, generator
            )
            weight = self.denoising.weight(process, t)
        given = critic.estimate(
            torch.cat((x_t, real_t)),
            torch.cat((t, t_real)),
            _joined(cond, real_cond),
            want=("x0", "logits"),
            outputs=len(x),
        )
        x0, logits = _both(given)
        fake, told = logits.split((len(x), len(real)))
        return SharedCriticOutput(
            denoising_loss(x, x_t, t, x0, weight),
            discriminator_output(x, real, fake, told, t, t_real),
        )


@dataclass(frozen=True)
class SharedGeneratorLoss:
    """Distribution matching and the generator's GAN loss from one pass of the critic.

    The critic's encoder serves both; its decoder runs without a graph. With the same
    draws, losses and gradients are those of `DistributionMatchingLoss` and
    `DiffusionGANLoss.generator`. The times are those of distribution matching for the
    GAN as well, which official DMD2 draws from a wider range.

    Attributes:
        distribution_matching: The loss whose times and normaliser are taken.

    Examples:
        >>> from dmdkit import DiscreteUniformTime, DistributionMatchingLoss
        >>> matching = DistributionMatchingLoss(DiscreteUniformTime(20, 981))
        >>> loss = SharedGeneratorLoss(matching)
    """

    distribution_matching: DistributionMatchingLoss

    def __post_init__(self) -> None:
        """Checks the loss."""
        name = "distribution_matching"
        _require_loss(name, self.distribution_matching, DistributionMatchingLoss)

    @checked
    def __call__(
        self,
        x: Latent,
        cond: Condition = None,
        *,
        real: Denoiser,
        critic: ScoreEstimator,
        t: Time | None = None,
        noise: Latent | None = None,
        generator: torch.Generator | None = None,
    ) -> SharedGeneratorOutput:
        """Noises x once, and asks the teacher, and the critic for both answers.

        Call it within `frozen(critic)`, so that nothing gathers in the critic.

        Args:
            x: Generated samples with a graph, [b, ...].
            cond: The condition of x, for both networks.
            real: The teacher, guided or not.
            critic: The critic with its head, never guided in DMD2.
            t: Times, fp32 [b]; drawn if None.
            noise: Standard normal noise, [b, ...]; drawn if None.
            generator: Source of what is drawn, on the device of x.

        Returns:
            Both losses.

        Raises:
            ValueError: If a shape is wrong, x carries no gradient, or the processes of
                `real` and `critic` differ.
            TypeError: If a dtype is wrong, or the network takes no shared pass (see
                `dmdkit.types.FeatureNetwork`).
        """
        require_gradient("x", x)
        matching = self.distribution_matching
        process = require_equal_processes(real=real.process, critic=critic.process)
        x_t, t, _ = draw(x, process, matching.times, t, noise, generator)
        with torch.no_grad():
            x0_real = real(x_t, t, cond)
        given = critic.estimate(x_t, t, cond, want=("x0", "logits"), output_grad=False)
        x0_fake, logits = _both(given)
        return SharedGeneratorOutput(
            distribution_matching_loss(
                x, x_t, t, x0_real, x0_fake, normalizer=matching.normalizer
            ),
            generator_output(x, logits, t),
        )


def _joined(cond: Condition, real_cond: Condition) -> Condition:
    try:
        return concatenate_conditions(cond, real_cond)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"real_cond: got {describe(real_cond)}, which cannot be joined with cond, "
            f"{describe(cond)}; a shared pass takes both in one batch, so give them "
            "one structure."
        ) from error


def _both(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert given.x0 is not None
    assert given.logits is not None
    return given.x0, given.logits
