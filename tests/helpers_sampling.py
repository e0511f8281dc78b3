"""Denoisers that are known exactly, or that remember what they were asked."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmdkit import NoiseProcess


@dataclass
class Recorder:
    """A student that keeps its inputs and answers with a simple function of them."""

    process: NoiseProcess
    answer: Callable[[Tensor, Tensor], Tensor] = lambda x_t, t: torch.tanh(x_t)
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    graph: list[bool] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None, /) -> Tensor:
        self.inputs.append((x_t.clone(), t.clone()))
        self.graph.append(torch.is_grad_enabled())
        return self.answer(x_t, t)

    @property
    def times(self) -> list[float]:
        return [t[0].item() for _, t in self.inputs]


@dataclass
class Gaussian:
    """The exact denoiser of N(mean, spread^2 I), from alpha and sigma in closed form.

    p(x0 | x_t) is proportional to exp(-(x0 - m)^2 / 2 s^2 - (x_t - a x0)^2 / 2 v), with
    v = sigma^2: a Gaussian whose precision is 1/s^2 + a^2/v.
    """

    process: NoiseProcess
    mean: float = 0.0
    spread: float = 1.0
    calls: int = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: object = None, /) -> Tensor:
        self.calls += 1
        a = self.process.alpha(t).double().reshape(-1, *[1] * (x_t.ndim - 1))
        v = self.process.sigma(t).double().reshape(a.shape).square()
        precision = self.spread**-2 + a.square() / v
        return (self.mean / self.spread**2 + a * x_t / v) / precision

    def flow_endpoint(self, x_t: Tensor, t: float) -> Tensor:
        """Where the probability flow takes x_t: it keeps every quantile."""
        time = torch.tensor([t])
        a = self.process.alpha(time).double().item()
        sigma = self.process.sigma(time).double().item()
        deviation = (a**2 * self.spread**2 + sigma**2) ** 0.5
        return self.mean + self.spread * (x_t - a * self.mean) / deviation
