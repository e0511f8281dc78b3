"""Compiles denoisers without a graph break, in a process without any import hook.

Prints one JSON object: for each case the largest difference to the eager results.
"""

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmdkit import (
    ClassifierFreeGuidance,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasIndexTime,
    KarrasPreconditioning,
    NoiseProcess,
    Parameterization,
    RectifiedFlow,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
)
from dmdkit.types import NetworkOutput


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Any, *, want: Any = None
    ) -> Any:
        output = self.linear(x) * c_noise[:, None].tanh() + cond["label"][:, None]
        return output if want is None else NetworkOutput(output, logits=output.sum(1))


def null(cond: Any) -> Any:
    return {"label": torch.zeros_like(cond["label"])}


def largest(call: Callable[..., Tensor], network: nn.Module, *inputs: Any) -> float:
    """Compares results and gradients of one call, eager and compiled."""

    def results(f: Callable[..., Tensor]) -> list[Tensor]:
        network.zero_grad()
        result = f(*inputs)
        result.square().sum().backward()
        return [result.detach(), *(p.grad.clone() for p in network.parameters())]  # pyright: ignore[reportOptionalMemberAccess]

    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    pairs = zip(compiled, results(call), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def cases() -> dict[str, float]:
    found: dict[str, float] = {}
    x, cond = torch.randn(2, 3), {"label": torch.tensor([1, 2])}
    kinds: list[tuple[str, NoiseProcess, Parameterization, list[float]]] = [
        ("vp", vp(), EpsilonPrediction(), [20.0, 999.0]),
        ("ve", VarianceExploding(), KarrasPreconditioning(), [0.5, 80.0]),
        ("flow", RectifiedFlow(), VelocityPrediction(), [0.3, 1.0]),
    ]
    for name, process, parameterization, times in kinds:
        t, network = torch.tensor(times), Network()
        denoiser = ScoreEstimator(network, process, parameterization)
        found[name] = largest(denoiser, network, x, t, cond)
        guided = ClassifierFreeGuidance(denoiser, null, 3.0, merged=name != "ve")
        found[f"{name} guided"] = largest(guided, network, x, t, cond)
    return found


def vp() -> DiscreteVariancePreserving:
    return DiscreteVariancePreserving.scaled_linear()


def warm_cases() -> dict[str, float]:
    """A table that is already on the device, put there in every mode of autograd."""
    found: dict[str, float] = {}
    x, t = torch.randn(2, 3), torch.tensor([20.0, 999.0])
    cond = {"label": torch.tensor([1, 2])}
    for mode in (torch.enable_grad, torch.inference_mode):
        process, network = vp(), Network()
        with mode():
            process.add_noise(x, x, t)
        denoiser = ScoreEstimator(network, process, EpsilonPrediction())
        found[f"warm {mode.__name__}"] = largest(denoiser, network, x, t, cond)

    def several(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        given = denoiser.estimate(x, t, cond, want=("x0", "score", "logits"))
        assert given.x0 is not None
        assert given.score is not None
        assert given.logits is not None
        return given.x0 + given.score + given.logits[:, None]

    process, network = vp(), Network()
    denoiser = ScoreEstimator(network, process, EpsilonPrediction())
    found["several"] = largest(several, network, x, t, cond)
    return found


def kept_by_tracing() -> dict[str, float]:
    """A table first used inside a compiled function serves eager code afterwards."""
    process, karras = vp(), KarrasIndexTime(0, 1, steps=1)
    t = torch.tensor([20.0, 999.0])
    inside = torch.compile(process.alpha, fullgraph=True, backend="aot_eager")(t)
    drawn = torch.compile(lambda: karras(2), fullgraph=True, backend="aot_eager")()
    return {
        "alpha afterwards": (inside - process.alpha(t)).abs().max().item(),
        "draw afterwards": (drawn - karras(2)).abs().max().item(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    print(json.dumps({**cases(), **warm_cases(), **kept_by_tracing()}))
