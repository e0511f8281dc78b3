"""An ordinary script, without any import hook, that gets everything wrong.

Prints one JSON object: for each mistake the error's type and message, or null.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dmdkit
from dmdkit import (
    ClassifierFreeGuidance,
    DenoisingLoss,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    DistributionMatchingLoss,
    EpsilonPrediction,
    KarrasPreconditioning,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
)
from dmdkit.types import NetworkOutput

# Nothing here is what its type says.
x: Any = torch.ones(2, 3)
t: Any = torch.tensor([3.0, 700.0])
mistake: Any = None


class Network(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any] = lambda x: 0 * x) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Any:
        return self.answer(x)


class Featured(Network):
    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Any, *, want: Any = None
    ) -> Any:
        return self.answer(x)


process: Any = DiscreteVariancePreserving.scaled_linear()


def answering(answer: Callable[[Tensor], Any], kind: type[Network] = Network) -> Any:
    return ScoreEstimator(kind(answer), process, EpsilonPrediction())


denoiser: Any = answering(lambda x: 0 * x)
other: Any = ScoreEstimator(Network(), RectifiedFlow(), VelocityPrediction())
shorter: Any = ScoreEstimator(
    Network(), DiscreteVariancePreserving.scaled_linear(steps=999), EpsilonPrediction()
)
guided: Any = ClassifierFreeGuidance(denoiser, lambda cond: mistake, 2.0, merged=True)
times = DiscreteUniformTime()
dm: Any = DistributionMatchingLoss(times)
critic: Any = DenoisingLoss(times)
gan: Any = DiffusionGANLoss(times)
grown = x.clone().requires_grad_()
meta = torch.ones(2, 3, device="meta")
some_logits = NetworkOutput(logits=torch.ones(2))


def with_head(head: torch.nn.Module, answer: Any = NetworkOutput) -> Any:
    class Own(torch.nn.Module):
        def forward(self, x: Any, c_noise: Any, cond: Any, *, want: Any = None) -> Any:
            return x if want is None else answer(output=x, features=x)

    network = dmdkit.NetworkWithHead(Own(), head)
    return dmdkit.ScoreEstimator(
        network, dmdkit.RectifiedFlow(), dmdkit.SamplePrediction()
    )


MISTAKES: dict[str, Callable[[], object]] = {
    "rank of x": lambda: denoiser(torch.tensor(1.0), t),
    "rank of t": lambda: denoiser(x, t[:, None]),
    "0-d t": lambda: denoiser(x, t[0]),
    "batch of t": lambda: denoiser(x, torch.ones(3)),
    "bf16 t": lambda: denoiser(x, t.bfloat16()),
    "fp64 t": lambda: denoiser(x, t.double()),
    "integer t": lambda: denoiser(x, t.long()),
    "number t": lambda: denoiser(x, 999),
    "None t": lambda: denoiser(x, None),
    "list x": lambda: denoiser([[1.0, 2.0]], t),
    "numpy x": lambda: denoiser(x.numpy(), t),
    "uint8 x": lambda: denoiser(x.byte(), t),
    "bool x": lambda: denoiser(x > 0, t),
    "complex x": lambda: denoiser(x.to(torch.complex64), t),
    "no t": lambda: denoiser(x),
    "option": lambda: denoiser(x, t, guidance=3.0),
    "score rank of t": lambda: denoiser.score(x, t[:, None]),
    "logits rank of t": lambda: denoiser.logits(x, t[:, None]),
    "guided rank of t": lambda: guided(x, t[:, None]),
    "guided batch by keyword": lambda: guided(x, t=torch.ones(5), cond=None),
    "noise shape": lambda: process.add_noise(x, torch.ones(2, 1), t),
    "noise batch": lambda: process.add_noise(x, torch.ones(3, 3), t),
    "noise dtype": lambda: process.add_noise(x, x.long(), t),
    "x0 list": lambda: process.add_noise([1.0], x, t),
    "prior t": lambda: VarianceExploding().prior(x, torch.ones(3)),
    "unit prior t": lambda: RectifiedFlow().prior(x, t.long()),
    "output channels": lambda: answering(lambda x: torch.cat((x, x), 1))(x, t),
    "output tuple": lambda: answering(lambda x: (x,))(x, t),
    "output None": lambda: answering(lambda x: None)(x, t),
    "no features": lambda: denoiser.features(x, t),
    "no logits": lambda: denoiser.logits(x, t),
    "no head": lambda: answering(lambda x: NetworkOutput(output=x), Featured).logits(
        x, t
    ),
    "features missing": lambda: answering(lambda x: some_logits, Featured).estimate(
        x, t, want=("logits", "features")
    ),
    "output for logits": lambda: answering(lambda x: x, Featured).logits(x, t),
    "unknown want": lambda: denoiser.estimate(x, t, want=("x1",)),
    "unknown want among known": lambda: [
        denoiser.estimate(x, t, want=("x0", "x0", "x0", "x0", "noise"))
        for _ in range(20)
    ],
    "empty want": lambda: denoiser.estimate(x, t, want=()),
    "string want": lambda: denoiser.estimate(x, t, want="x0"),
    "number want": lambda: denoiser.estimate(x, t, want=3),
    "None want": lambda: denoiser.estimate(x, t, want=None),
    "no want": lambda: denoiser.estimate(x, t),
    "network": lambda: ScoreEstimator(mistake, process, EpsilonPrediction()),
    "process": lambda: ScoreEstimator(Network(), "ddpm", EpsilonPrediction()),  # pyright: ignore[reportArgumentType]
    "process class": lambda: ScoreEstimator(
        Network(),
        VarianceExploding,  # pyright: ignore[reportArgumentType]
        SamplePrediction(),
    ),
    "parameterization": lambda: ScoreEstimator(Network(), process, "eps"),  # pyright: ignore[reportArgumentType]
    "singular": lambda: ScoreEstimator(
        Network(), RectifiedFlow(), KarrasPreconditioning()
    ),
    "table": lambda: DiscreteVariancePreserving([0.9, 0.5]),  # pyright: ignore[reportArgumentType]
    "time number": lambda: process.check_time(math.nan),
    "structure": lambda: guided(x, t, {"text": x, "pooled": (x, x)}),
    "real denoiser": lambda: dm(grown, real=Network(), fake=denoiser),
    "fake denoiser": lambda: dm(grown, real=denoiser, fake=nn.DataParallel(denoiser)),
    "no denoiser": lambda: critic(x, None),
    "processes": lambda: dm(grown, real=denoiser, fake=other),
    "tables": lambda: dm(grown, real=denoiser, fake=shorter),
    "no gradient": lambda: dm(x, real=denoiser, fake=denoiser),
    "gan no gradient": lambda: gan.generator(x, discriminator=denoiser),
    "discriminator": lambda: gan.generator(grown, discriminator=Network()),
    "loss t": lambda: critic(x, denoiser=denoiser, t=t[:, None]),
    "loss integer t": lambda: dm(grown, real=denoiser, fake=denoiser, t=t.long()),
    "loss noise": lambda: critic(x, denoiser=denoiser, noise=torch.ones(2, 4)),
    "loss x": lambda: critic(x.long(), denoiser=denoiser),
    "generator": lambda: critic(x, denoiser=denoiser, generator=3),
    "generator device": lambda: critic(
        meta, denoiser=denoiser, generator=torch.Generator()
    ),
    "loss option": lambda: critic(x, denoiser=denoiser, weight=3),
    "normalizer": lambda: dmdkit.distribution_matching_gradient(
        x,
        x,
        x,
        normalizer=3,  # pyright: ignore[reportArgumentType]
    ),
    "times tuple": lambda: dmdkit.DiffusionGANLoss((0.02, 0.98)),  # pyright: ignore[reportArgumentType]
    "times class": lambda: dmdkit.DenoisingLoss(dmdkit.UniformTime),  # pyright: ignore[reportArgumentType]
    "weight None": lambda: dmdkit.DenoisingLoss(dmdkit.UniformTime(), None),  # pyright: ignore[reportArgumentType]
    "normalizer field": lambda: dmdkit.DistributionMatchingLoss(
        dmdkit.UniformTime(),
        3,  # pyright: ignore[reportArgumentType]
    ),
    "unconditional": lambda: dmdkit.ClassifierFreeGuidance(denoiser, x, 2.0),
    "frozen": lambda: dmdkit.frozen(3).__enter__(),  # pyright: ignore[reportArgumentType]
    "head class": lambda: dmdkit.trainable_copy(denoiser, torch.nn.Linear),  # pyright: ignore[reportArgumentType]
    "outputs for losses": lambda: dmdkit.balanced_gan_weight(x, {}, x.sum()),  # pyright: ignore[reportArgumentType]
    "column of logits": lambda: with_head(torch.nn.Linear(3, 1)).logits(x, t),
    "dict for want": lambda: with_head(torch.nn.Linear(3, 1), dict).logits(x, t),
    "index for a flow": lambda: dmdkit.DenoisingLoss(DiscreteUniformTime(0, 1000))(
        x, denoiser=with_head(torch.nn.Identity())
    ),
}


def outcome(mistake: Callable[[], object]) -> list[str] | None:
    try:
        mistake()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def main() -> None:
    print(json.dumps({name: outcome(call) for name, call in MISTAKES.items()}))


if __name__ == "__main__":
    main()
