"""How strongly each term of a loss pulls at the generated sample.

The distribution matching loss is a mean over all elements, the GAN's over samples only:
their balance moves with the number of elements of a sample (channels, height, width),
not with the batch, so a GAN weight does not carry over from one model to another. The
author's advice for a new model is to start where both gradients at the generated sample
have the same norm, and to search from there (tianweiy/DMD2, issue 73).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.losses.common import require_gradient
from dmdkit.types import Latent, Scalar


@checked
def gradient_norms(x: Latent, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each term's gradient at the generated sample.

    Args:
        x: Generated samples from which the losses were computed, [b, ...].
        losses: Terms by name, unweighted. Their graphs are kept, so that they can still
            be backpropagated.

    Returns:
        One norm a term, detached scalars.

    Raises:
        ValueError: If x carries no gradient, or a loss does not depend on it.
    """
    require_gradient("x", x)
    norms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"losses: {name!r} does not depend on x.")
        norms[name] = gradient.norm()
    return norms


@checked
def balanced_gan_weight(
    x: Latent, distribution_matching: Scalar, gan: Scalar
) -> Scalar:
    """The GAN weight at which both terms pull equally at the generated sample.

    The upper end of a search, to be measured over some batches after the critic has
    settled: at the very first step critic and teacher agree. It rises when the
    discriminator's gradient is small; do not follow it upwards.

    Args:
        x: Generated samples from which both losses were computed, [b, ...].
        distribution_matching: The distribution matching loss.
        gan: The generator's GAN loss, unweighted.

    Returns:
        The ratio of the norms, a detached scalar.

    Raises:
        ValueError: If x carries no gradient, or a loss does not depend on it.
    """
    norms = gradient_norms(x, {"dm": distribution_matching, "gan": gan})
    return norms["dm"] / norms["gan"]
