"""Small networks that learn, with the interfaces that training needs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmdkit import (
    DiscreteVariancePreserving,
    EpsilonPrediction,
    NetworkWithHead,
    ScoreEstimator,
)
from dmdkit.types import NetworkOutput, Want

PROCESS = DiscreteVariancePreserving.scaled_linear()


class TinyNetwork(nn.Module):
    """Two layers that see x, time and a label; the hidden layer is a 1x1 map."""

    def __init__(self, dim: int = 3, hidden: int = 8, labels: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(labels, hidden)
        self.inner = nn.Linear(dim + 1, hidden)
        self.outer = nn.Linear(hidden, dim)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        time = c_noise.to(x.dtype)[:, None] / 1000
        h = self.inner(torch.cat((x, time), dim=1))
        h = torch.tanh(h if cond is None else h + self.embed(cond))
        if want is None:
            return self.outer(h)
        return NetworkOutput(
            output=self.outer(h) if "output" in want else None,
            features=h[:, :, None, None] if "features" in want else None,
        )


class TinyHead(nn.Module):
    """A linear layer on the 1x1 map, which keeps fp64."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.flatten(1)).squeeze(1)


def tiny_trio(
    head: nn.Module | None = None,
) -> tuple[ScoreEstimator, ScoreEstimator, ScoreEstimator]:
    """A teacher, a student and a critic with a head, all different, in fp64."""

    def estimator(network: nn.Module) -> ScoreEstimator:
        return ScoreEstimator(network, PROCESS, EpsilonPrediction()).double()

    torch.manual_seed(0)
    teacher = estimator(TinyNetwork()).requires_grad_(False)
    student = estimator(TinyNetwork())
    critic = estimator(NetworkWithHead(TinyNetwork(), head or TinyHead()))
    return teacher, student, critic
