"""What the tests of processes and denoisers share: schedules and oracles by hand."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmdkit import (
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasPreconditioning,
    NoiseProcess,
    Parameterization,
    RectifiedFlow,
    SamplePrediction,
    VarianceExploding,
    VelocityPrediction,
    VPrediction,
)

Levels = Callable[[float], tuple[float, float]]
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The clean sample from (x_t, alpha, sigma), all fp64."""


@functools.cache
def scaled_linear_table() -> tuple[float, ...]:
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return tuple(np.cumprod(1 - betas).tolist())


def discrete_levels(t: float) -> tuple[float, float]:
    kept = scaled_linear_table()[int(t)]
    return math.sqrt(kept), math.sqrt(1 - kept)


@dataclass(frozen=True)
class Schedule:
    """A process of the library, and its alpha and sigma written down anew."""

    process: NoiseProcess
    levels: Levels
    times: tuple[float, ...]
    """Times at which something of the sample is left."""

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma in fp64, with as many axes as `x`."""
        pairs = torch.tensor([self.levels(v) for v in t.tolist()], dtype=torch.float64)
        return tuple(c.view(-1, *[1] * (x.ndim - 1)) for c in pairs.unbind(1))  # pyright: ignore[reportReturnType]


SCHEDULES = {
    "ve": Schedule(VarianceExploding(), lambda t: (1.0, t), (0.01, 0.5, 2.0, 5.0)),
    "vp": Schedule(
        DiscreteVariancePreserving.scaled_linear(),
        discrete_levels,
        (0.0, 20.0, 399.0, 999.0),
    ),
    "flow": Schedule(
        RectifiedFlow(), lambda t: (1.0 - t, t), (0.02, 0.25, 0.6875, 0.98)
    ),
}

SIGMA_DATA = 0.7
PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": EpsilonPrediction(),
    "v": VPrediction(),
    "flow": VelocityPrediction(time_scale=1000),
    "x0": SamplePrediction(),
    "edm": KarrasPreconditioning(sigma_data=SIGMA_DATA),
}


def defined(target: str, schedule: str) -> bool:
    """Epsilon and EDM have no x0 at the end of the flow, where alpha is 0."""
    return schedule != "flow" or target not in ("eps", "edm")


class Oracle(nn.Module):
    """A network that answers exactly what a perfect one of its kind would.

    It sees only what a network sees, its scaled input and `c_noise`, and does its sums
    in fp64 from the definition of its target.
    """

    def __init__(self, target: str, schedule: Schedule, denoise: Denoise) -> None:
        super().__init__()
        self.target, self.schedule, self.denoise = target, schedule, denoise

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        del cond
        x64, seen = x.double(), c_noise.double()
        if self.target == "edm":
            return self.edm(x64, seen).to(x.dtype)
        t = seen / 1000 if self.target == "flow" else seen
        alpha, sigma = self.schedule.at(t.float(), x)
        x0 = self.denoise(x64, alpha, sigma)
        noise = (x64 - alpha * x0) / sigma
        answers = {
            "eps": noise,
            "v": alpha * noise - sigma * x0,
            "flow": noise - x0,
            "x0": x0,
        }
        return answers[self.target].to(x.dtype)

    def edm(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Karras et al., Table 1, solved for F; it sees a variance exploding world."""
        sigma = (4 * c_noise).exp().view(-1, *[1] * (x.ndim - 1))
        total = sigma**2 + SIGMA_DATA**2
        y = x * total.sqrt()
        skip = SIGMA_DATA**2 / total
        out = sigma * SIGMA_DATA / total.sqrt()
        return (self.denoise(y, torch.ones_like(sigma), sigma) - skip * y) / out


def spread(values: tuple[float, ...], batch: int) -> Tensor:
    """Times for a batch, no two neighbours alike."""
    return torch.tensor([values[i % len(values)] for i in range(batch)])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
