"""The mathematics of noise: processes, parameterizations, times, weights, denoisers."""

from dmdkit.diffusion.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from dmdkit.diffusion.guidance import concatenate_conditions as concatenate_conditions
from dmdkit.diffusion.guidance import (
    guidance_scale_from_offset as guidance_scale_from_offset,
)
from dmdkit.diffusion.parameterizations import Coefficients as Coefficients
from dmdkit.diffusion.parameterizations import EpsilonPrediction as EpsilonPrediction
from dmdkit.diffusion.parameterizations import (
    KarrasPreconditioning as KarrasPreconditioning,
)
from dmdkit.diffusion.parameterizations import Parameterization as Parameterization
from dmdkit.diffusion.parameterizations import SamplePrediction as SamplePrediction
from dmdkit.diffusion.parameterizations import VelocityPrediction as VelocityPrediction
from dmdkit.diffusion.parameterizations import VPrediction as VPrediction
from dmdkit.diffusion.processes import (
    DiscreteVariancePreserving as DiscreteVariancePreserving,
)
from dmdkit.diffusion.processes import NoiseProcess as NoiseProcess
from dmdkit.diffusion.processes import RectifiedFlow as RectifiedFlow
from dmdkit.diffusion.processes import VarianceExploding as VarianceExploding
from dmdkit.diffusion.schedules import few_step_flow_times as few_step_flow_times
from dmdkit.diffusion.schedules import few_step_times as few_step_times
from dmdkit.diffusion.schedules import karras_sigmas as karras_sigmas
from dmdkit.diffusion.score import Estimate as Estimate
from dmdkit.diffusion.score import ScoreEstimator as ScoreEstimator
from dmdkit.diffusion.times import DiscreteUniformTime as DiscreteUniformTime
from dmdkit.diffusion.times import KarrasIndexTime as KarrasIndexTime
from dmdkit.diffusion.times import LogitNormalTime as LogitNormalTime
from dmdkit.diffusion.times import LogNormalTime as LogNormalTime
from dmdkit.diffusion.times import ShiftedTime as ShiftedTime
from dmdkit.diffusion.times import UniformTime as UniformTime
from dmdkit.diffusion.weights import KarrasWeight as KarrasWeight
from dmdkit.diffusion.weights import TimeWeight as TimeWeight
from dmdkit.diffusion.weights import snr_weight as snr_weight
from dmdkit.diffusion.weights import unit_weight as unit_weight
from dmdkit.diffusion.weights import v_weight as v_weight
from dmdkit.diffusion.weights import velocity_weight as velocity_weight
