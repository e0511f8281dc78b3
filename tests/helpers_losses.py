"""What the tests of the losses share: analytic denoisers and toy networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmdkit import (
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    NoiseProcess,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    UniformTime,
    VarianceExploding,
)
from dmdkit.types import NetworkOutput, Want

PROCESSES = {
    "ve": (VarianceExploding(), UniformTime(0.1, 3.0), (0.2, 1.0, 2.5)),
    "vp": (
        DiscreteVariancePreserving.scaled_linear(),
        DiscreteUniformTime(20, 981),
        (20.0, 400.0, 980.0),
    ),
    "flow": (RectifiedFlow(), UniformTime(0.02, 0.98), (0.05, 0.5, 0.95)),
}
"""Each process with a distribution of times and a few times in its own units."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def column(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample, in front of the axes of `x`."""
    return values.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))


def noise_levels(process: NoiseProcess, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return column(process.alpha(t), x), column(process.sigma(t), x)


def moment_matched(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Four pairs whose moments up to the second are those of N(0, I), [4, 1] each."""
    pairs = torch.tensor([[a, b] for a in (-1, 1) for b in (-1, 1)], dtype=dtype)
    return pairs[:, :1], pairs[:, 1:]


@dataclass(frozen=True)
class GaussianDenoiser:
    """The posterior mean for data N(mean, std^2), by adding precisions."""

    process: NoiseProcess
    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None, /) -> Tensor:
        alpha, sigma = noise_levels(self.process, t, x_t)
        prior, evidence = 1 / self.std**2, alpha**2 / sigma**2
        observed = x_t / alpha
        return (prior * self.mean + evidence * observed) / (prior + evidence)


VE = VarianceExploding()


@dataclass(frozen=True)
class FunctionDenoiser:
    """Any function of (x_t, t, cond) as a denoiser."""

    function: Callable[[Tensor, Tensor, Any], Tensor]
    process: NoiseProcess = VE

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None, /) -> Tensor:
        return self.function(x_t, t, cond)


@dataclass(frozen=True)
class FunctionDiscriminator:
    """Any function of (x_t, t, cond) as a discriminator."""

    function: Callable[[Tensor, Tensor, Any], Tensor]
    process: NoiseProcess = VE

    def logits(self, x_t: Tensor, t: Tensor, cond: Any = None, /) -> Tensor:
        return self.function(x_t, t, cond)


class ToyNetwork(nn.Module):
    """An encoder, whose output are the features, and a decoder: [b, 2, 4, 4]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(2, 8, 3, padding=1)
        self.decoder = nn.Conv2d(8, 2, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.2, generator=generator(seed))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Any,
        *,
        want: Sequence[Want] | None = None,
        outputs: int | None = None,
        output_grad: bool = True,
    ) -> Tensor | NetworkOutput:
        shift = column(c_noise, x) / 10
        if cond is not None:
            shift = shift + column(cond, x)
        features = torch.tanh(self.encoder(x) + shift)
        if want is None:
            return self.decoder(features)
        output = None
        if "output" in want:
            with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
                output = self.decoder(features[:outputs])
        return NetworkOutput(output, features if "features" in want else None)


def toy_estimator(seed: int = 0) -> ScoreEstimator:
    return ScoreEstimator(ToyNetwork(seed), VarianceExploding(), SamplePrediction())


def has_gradient(module: nn.Module) -> bool:
    """Whether any parameter gathered a gradient other than zero."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return any(bool(grad.abs().sum() > 0) for grad in grads)
