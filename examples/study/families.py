r"""One teacher in three families: EDM, variance preserving with epsilon, and flow.

Noise processes differ by a scale: $x_t/\alpha_t$ of any of them is EDM's noisy sample
at $\sigma_t/\alpha_t$. So a network trained as EDM's can be asked in another family's
terms, and trained further in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dmdkit import (
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasIndexTime,
    KarrasPreconditioning,
    KarrasWeight,
    RectifiedFlow,
    ScoreEstimator,
    UniformTime,
    VarianceExploding,
    VelocityPrediction,
    few_step_times,
    karras_sigmas,
    snr_weight,
    velocity_weight,
)
from dmdkit.diffusion.parameterizations import Parameterization
from dmdkit.diffusion.processes import NoiseProcess, expand_as
from dmdkit.diffusion.weights import TimeWeight
from dmdkit.types import Condition, NetworkOutput, TimeSampler, Want

FamilyName = Literal["edm", "vp", "flow"]
LAST_FLOW_TIME = 80 / 81
"""Where sigma/alpha is 80, EDM's largest noise."""


class Reexpressed(nn.Module):
    """An EDM network that answers in the terms of another family."""

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float,
        process: NoiseProcess,
        parameterization: Parameterization,
    ) -> None:
        super().__init__()
        self.network = network
        self.edm = KarrasPreconditioning(sigma_data)
        self.process, self.parameterization = process, parameterization

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition = None,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        """Answers as `UNetNetwork` does; both families here have c_in = 1."""
        t, process = c_noise, self.process
        alpha, sigma = process.alpha(t), process.sigma(t)
        edm = self.edm.coefficients(VarianceExploding(), sigma / alpha)
        scaled = x / expand_as(alpha, x)
        given = self.network(
            expand_as(edm.c_in, x) * scaled, edm.c_noise, cond, want=want
        )
        output = given.output if want is not None else given
        if output is None:
            return given
        x0 = expand_as(edm.c_skip, x) * scaled + expand_as(edm.c_out, x) * output
        own = self.parameterization.coefficients(process, t)
        output = (x0 - expand_as(own.c_skip, x) * x) / expand_as(own.c_out, x)
        return output if want is None else given._replace(output=output)


@dataclass(frozen=True)
class Family:
    """What a family trains with: its times and its critic's weight."""

    dm_times: TimeSampler
    times: TimeSampler
    """Of the critic and the GAN."""
    weight: TimeWeight


def family(name: FamilyName, sigma_data: float) -> Family:
    """The conventions of official DMD2 for EDM and SD; uniform times for flow."""
    if name == "edm":
        return Family(
            KarrasIndexTime(20, 981), KarrasIndexTime(), KarrasWeight(sigma_data)
        )
    if name == "vp":
        return Family(
            DiscreteUniformTime(20, 981), DiscreteUniformTime(0, 1000), snr_weight
        )
    return Family(
        UniformTime(0.02, 0.98), UniformTime(0.001, LAST_FLOW_TIME), velocity_weight
    )


def in_family(
    teacher: ScoreEstimator, name: FamilyName, sigma_data: float
) -> ScoreEstimator:
    """The EDM teacher in the terms of a family, frozen as it was."""
    if name == "edm":
        return teacher
    process, parameterization = (
        (DiscreteVariancePreserving.scaled_linear(), EpsilonPrediction())
        if name == "vp"
        else (RectifiedFlow(), VelocityPrediction())
    )
    network = Reexpressed(teacher.network, sigma_data, process, parameterization)
    return ScoreEstimator(network, process, parameterization).eval()


def student_times(name: FamilyName, steps: int) -> tuple[float, ...]:
    """The student's times in falling order, from (about) pure noise."""
    if name == "edm":
        return karras_sigmas(steps + 1)[:-1]
    if name == "vp":
        return few_step_times(steps)
    return tuple(LAST_FLOW_TIME * (1 - i / steps) for i in range(steps))
