"""Sampling: few-step students by backward simulation, teachers by ODE and SDE."""

from dmdkit.sampling.policies import NoisedData as NoisedData
from dmdkit.sampling.policies import PerSampleSimulator as PerSampleSimulator
from dmdkit.sampling.simulation import BackwardSimulator as BackwardSimulator
from dmdkit.sampling.simulation import InputPolicy as InputPolicy
from dmdkit.sampling.simulation import StudentInput as StudentInput
from dmdkit.sampling.solvers import AncestralSampler as AncestralSampler
from dmdkit.sampling.solvers import EulerSampler as EulerSampler
from dmdkit.sampling.solvers import HeunSampler as HeunSampler
from dmdkit.sampling.solvers import StochasticSampler as StochasticSampler
