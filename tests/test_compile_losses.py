"""A student's call and each loss compile to one graph and compute the same.

The tests' import hook wraps functions in what Dynamo cannot trace, so this file runs
itself as a script in a process of its own.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from helpers_losses import ToyNetwork, normal
from torch import Tensor

from dmdkit import (
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    DistributionMatchingLoss,
    EpsilonPrediction,
    KarrasIndexTime,
    KarrasPreconditioning,
    KarrasWeight,
    ScoreEstimator,
    VarianceExploding,
    snr_weight,
    trainable_copy,
)

SETTINGS = {
    "edm": (
        VarianceExploding(),
        KarrasPreconditioning(),
        KarrasIndexTime(20, 981),
        KarrasWeight(),
        (80.0, 0.5, 3.0),
    ),
    "sd": (
        DiscreteVariancePreserving.scaled_linear(),
        EpsilonPrediction(),
        DiscreteUniformTime(20, 981),
        snr_weight,
        (999.0, 40.0, 500.0),
    ),
}
LOSSES = ("dm", "denoising", "gan generator", "gan discriminator")


def functions(setting: str) -> dict[str, tuple[ScoreEstimator, Callable[[], Tensor]]]:
    """Each loss behind a call of the student, and the network that it trains.

    Times and noise are given to the first two, and drawn by the others.
    """
    process, parameterization, times, weight, (start, *given) = SETTINGS[setting]
    teacher = ScoreEstimator(ToyNetwork(), process, parameterization)
    student = trainable_copy(teacher)
    other = ScoreEstimator(ToyNetwork(1), process, parameterization)
    critic = trainable_copy(other, head=DiffusionGANHead(8, 4, groups=2))
    teacher.requires_grad_(False)
    z, noise, real = (normal(2, 2, 4, 4, seed=i) for i in range(3))
    t, first = torch.tensor(given), torch.full((2,), start)
    draws: dict[str, Any] = {"t": t, "noise": noise}
    dm, gan = DistributionMatchingLoss(times), DiffusionGANLoss(times)
    denoising = DenoisingLoss(times, weight)

    def sample() -> Tensor:
        return student(process.prior(z, first), first)

    def critic_loss() -> Tensor:
        return denoising(sample(), denoiser=critic, **draws).loss

    def discriminator_loss() -> Tensor:
        return gan.discriminator(sample(), None, real, None, discriminator=critic).loss

    def dm_loss() -> Tensor:
        return dm(sample(), real=teacher, fake=critic, **draws).loss

    def generator_loss() -> Tensor:
        return gan.generator(sample(), discriminator=critic).loss

    return {
        "dm": (student, dm_loss),
        "denoising": (critic, critic_loss),
        "gan generator": (student, generator_loss),
        "gan discriminator": (critic, discriminator_loss),
    }


def values(network: ScoreEstimator, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and the gradients of what it trains."""
    network.zero_grad()
    torch.manual_seed(0)
    value = loss()
    value.backward()
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return [value.detach(), *grads]


def compare(setting: str) -> None:
    for name, (network, loss) in functions(setting).items():
        torch.compiler.reset()
        # The one with a backward of its own; tracing to one graph is what may fail.
        backend = "aot_eager" if name == "dm" else "eager"
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        eager, ours = values(network, loss), values(network, compiled)
        assert len(ours) == len(eager) > 1
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        print(f"{setting}: {name} agrees")


def test_losses_compile_to_one_graph() -> None:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    agreed = [f"{setting}: {name} agrees" for setting in SETTINGS for name in LOSSES]
    assert done.stdout.splitlines() == agreed


if __name__ == "__main__":
    for setting in SETTINGS:
        compare(setting)
