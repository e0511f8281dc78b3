"""The losses: pure functions of tensors, and a frozen dataclass around each."""

from dmdkit.losses.adversarial import DiffusionGANLoss as DiffusionGANLoss
from dmdkit.losses.adversarial import GANDiscriminatorOutput as GANDiscriminatorOutput
from dmdkit.losses.adversarial import GANGeneratorOutput as GANGeneratorOutput
from dmdkit.losses.adversarial import gan_discriminator_loss as gan_discriminator_loss
from dmdkit.losses.adversarial import gan_generator_loss as gan_generator_loss
from dmdkit.losses.balance import balanced_gan_weight as balanced_gan_weight
from dmdkit.losses.balance import gradient_norms as gradient_norms
from dmdkit.losses.denoising import DenoisingLoss as DenoisingLoss
from dmdkit.losses.denoising import DenoisingOutput as DenoisingOutput
from dmdkit.losses.denoising import denoising_loss as denoising_loss
from dmdkit.losses.distribution_matching import (
    DistributionMatchingLoss as DistributionMatchingLoss,
)
from dmdkit.losses.distribution_matching import (
    DistributionMatchingOutput as DistributionMatchingOutput,
)
from dmdkit.losses.distribution_matching import FlooredNormalizer as FlooredNormalizer
from dmdkit.losses.distribution_matching import (
    distribution_matching_gradient as distribution_matching_gradient,
)
from dmdkit.losses.distribution_matching import (
    distribution_matching_loss as distribution_matching_loss,
)
from dmdkit.losses.distribution_matching import gradient_surrogate as gradient_surrogate
from dmdkit.losses.distribution_matching import (
    mean_absolute_error as mean_absolute_error,
)
from dmdkit.losses.regression import FeatureDistance as FeatureDistance
from dmdkit.losses.regression import HuberDistance as HuberDistance
from dmdkit.losses.regression import LPIPSDistance as LPIPSDistance
from dmdkit.losses.regression import RegressionLoss as RegressionLoss
from dmdkit.losses.regression import RegressionOutput as RegressionOutput
from dmdkit.losses.regression import squared_distance as squared_distance
from dmdkit.losses.shared import SharedCriticLoss as SharedCriticLoss
from dmdkit.losses.shared import SharedCriticOutput as SharedCriticOutput
from dmdkit.losses.shared import SharedGeneratorLoss as SharedGeneratorLoss
from dmdkit.losses.shared import SharedGeneratorOutput as SharedGeneratorOutput
