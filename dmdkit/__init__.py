"""Improved Distribution Matching Distillation (DMD2, arXiv 2405.14867), in pieces."""

import importlib.metadata

from dmdkit.diffusion import ClassifierFreeGuidance as ClassifierFreeGuidance
from dmdkit.diffusion import Coefficients as Coefficients
from dmdkit.diffusion import DiscreteUniformTime as DiscreteUniformTime
from dmdkit.diffusion import DiscreteVariancePreserving as DiscreteVariancePreserving
from dmdkit.diffusion import EpsilonPrediction as EpsilonPrediction
from dmdkit.diffusion import Estimate as Estimate
from dmdkit.diffusion import KarrasIndexTime as KarrasIndexTime
from dmdkit.diffusion import KarrasPreconditioning as KarrasPreconditioning
from dmdkit.diffusion import KarrasWeight as KarrasWeight
from dmdkit.diffusion import LogitNormalTime as LogitNormalTime
from dmdkit.diffusion import LogNormalTime as LogNormalTime
from dmdkit.diffusion import NoiseProcess as NoiseProcess
from dmdkit.diffusion import Parameterization as Parameterization
from dmdkit.diffusion import RectifiedFlow as RectifiedFlow
from dmdkit.diffusion import SamplePrediction as SamplePrediction
from dmdkit.diffusion import ScoreEstimator as ScoreEstimator
from dmdkit.diffusion import ShiftedTime as ShiftedTime
from dmdkit.diffusion import TimeWeight as TimeWeight
from dmdkit.diffusion import UniformTime as UniformTime
from dmdkit.diffusion import VarianceExploding as VarianceExploding
from dmdkit.diffusion import VelocityPrediction as VelocityPrediction
from dmdkit.diffusion import VPrediction as VPrediction
from dmdkit.diffusion import concatenate_conditions as concatenate_conditions
from dmdkit.diffusion import few_step_flow_times as few_step_flow_times
from dmdkit.diffusion import few_step_times as few_step_times
from dmdkit.diffusion import guidance_scale_from_offset as guidance_scale_from_offset
from dmdkit.diffusion import karras_sigmas as karras_sigmas
from dmdkit.diffusion import snr_weight as snr_weight
from dmdkit.diffusion import unit_weight as unit_weight
from dmdkit.diffusion import v_weight as v_weight
from dmdkit.diffusion import velocity_weight as velocity_weight
from dmdkit.discriminators import DiffusionGANHead as DiffusionGANHead
from dmdkit.discriminators import FeatureDiscriminator as FeatureDiscriminator
from dmdkit.discriminators import NetworkWithHead as NetworkWithHead
from dmdkit.losses import DenoisingLoss as DenoisingLoss
from dmdkit.losses import DenoisingOutput as DenoisingOutput
from dmdkit.losses import DiffusionGANLoss as DiffusionGANLoss
from dmdkit.losses import DistributionMatchingLoss as DistributionMatchingLoss
from dmdkit.losses import DistributionMatchingOutput as DistributionMatchingOutput
from dmdkit.losses import FeatureDistance as FeatureDistance
from dmdkit.losses import FlooredNormalizer as FlooredNormalizer
from dmdkit.losses import GANDiscriminatorOutput as GANDiscriminatorOutput
from dmdkit.losses import GANGeneratorOutput as GANGeneratorOutput
from dmdkit.losses import HuberDistance as HuberDistance
from dmdkit.losses import LPIPSDistance as LPIPSDistance
from dmdkit.losses import RegressionLoss as RegressionLoss
from dmdkit.losses import RegressionOutput as RegressionOutput
from dmdkit.losses import balanced_gan_weight as balanced_gan_weight
from dmdkit.losses import denoising_loss as denoising_loss
from dmdkit.losses import (
    distribution_matching_gradient as distribution_matching_gradient,
)
from dmdkit.losses import distribution_matching_loss as distribution_matching_loss
from dmdkit.losses import gan_discriminator_loss as gan_discriminator_loss
from dmdkit.losses import gan_generator_loss as gan_generator_loss
from dmdkit.losses import gradient_norms as gradient_norms
from dmdkit.losses import gradient_surrogate as gradient_surrogate
from dmdkit.losses import mean_absolute_error as mean_absolute_error
from dmdkit.losses import squared_distance as squared_distance
from dmdkit.metrics import FeatureStatistics as FeatureStatistics
from dmdkit.metrics import frechet_distance as frechet_distance
from dmdkit.metrics import nearest_distance as nearest_distance
from dmdkit.sampling import AncestralSampler as AncestralSampler
from dmdkit.sampling import BackwardSimulator as BackwardSimulator
from dmdkit.sampling import EulerSampler as EulerSampler
from dmdkit.sampling import HeunSampler as HeunSampler
from dmdkit.sampling import InputPolicy as InputPolicy
from dmdkit.sampling import NoisedData as NoisedData
from dmdkit.sampling import PerSampleSimulator as PerSampleSimulator
from dmdkit.sampling import StochasticSampler as StochasticSampler
from dmdkit.sampling import StudentInput as StudentInput
from dmdkit.training import DamagedCheckpointError as DamagedCheckpointError
from dmdkit.training import ExponentialMovingAverage as ExponentialMovingAverage
from dmdkit.training import GeneratorState as GeneratorState
from dmdkit.training import Monitor as Monitor
from dmdkit.training import NonFiniteError as NonFiniteError
from dmdkit.training import Stateful as Stateful
from dmdkit.training import TTURCounts as TTURCounts
from dmdkit.training import TTURScheduler as TTURScheduler
from dmdkit.training import all_finite as all_finite
from dmdkit.training import checkpoints as checkpoints
from dmdkit.training import explain_nonfinite as explain_nonfinite
from dmdkit.training import frozen as frozen
from dmdkit.training import image_statistics as image_statistics
from dmdkit.training import linear_warmup as linear_warmup
from dmdkit.training import load_checkpoint as load_checkpoint
from dmdkit.training import load_modules as load_modules
from dmdkit.training import load_newest_checkpoint as load_newest_checkpoint
from dmdkit.training import save_checkpoint as save_checkpoint
from dmdkit.training import saved_parameters as saved_parameters
from dmdkit.training import trainable_copy as trainable_copy

__version__ = importlib.metadata.version("dmdkit")
