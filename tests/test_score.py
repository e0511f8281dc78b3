"""The score estimator: closed forms for Gaussian data, and what a network may give."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_diffusion import (
    PARAMETERIZATIONS,
    SCHEDULES,
    Oracle,
    Schedule,
    defined,
    randn,
    spread,
)
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from dmdkit import (
    DiscreteVariancePreserving,
    EpsilonPrediction,
    Estimate,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
    VPrediction,
)
from dmdkit.types import Denoiser, Discriminator, NetworkOutput, Want

PAIRS = [(t, s) for t in PARAMETERIZATIONS for s in SCHEDULES if defined(t, s)]
MEAN, STD = 0.8, 0.6
SHAPES = [(4,), (3, 3), (4, 2, 4, 4), (3, 2, 4, 5, 3)]


def gaussian(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean for data N(MEAN, STD^2), as a sum weighted by precisions."""
    of_data, of_noise = 1 / STD**2, alpha**2 / sigma**2
    return (of_data * MEAN + of_noise * x_t / alpha) / (of_data + of_noise)


def estimator(target: str, schedule: Schedule, denoise: Any) -> ScoreEstimator:
    network = Oracle(target, schedule, denoise)
    return ScoreEstimator(network, schedule.process, PARAMETERIZATIONS[target])


def score_of(density: Any, x_t: Tensor) -> Tensor:
    x = x_t.double().requires_grad_()
    density(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(("target", "name"), PAIRS)
def test_score_of_gaussian_data_is_that_of_the_noisy_density(
    target: str, name: str
) -> None:
    schedule = SCHEDULES[name]
    t = spread(schedule.times, 4)
    x_t = randn(4, 3, 4)
    alpha, sigma = schedule.at(t, x_t)
    density = Normal(alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt())
    expected = score_of(density.log_prob, x_t)
    denoiser = estimator(target, schedule, gaussian)
    torch.testing.assert_close(
        denoiser(x_t, t, None),
        gaussian(x_t.double(), alpha, sigma).float(),
        atol=1e-5,
        rtol=1e-5,
    )
    # x0 is known to fp32, and the score divides what is left of it by sigma^2.
    error = (denoiser.score(x_t, t).double() - expected).abs() * sigma**2
    assert error.max().item() < 1e-5
    assert (expected * sigma**2).abs().max().item() > 0.5


@pytest.mark.parametrize(("target", "name"), PAIRS)
def test_score_of_correlated_data_is_that_of_the_noisy_density(
    target: str, name: str
) -> None:
    schedule = SCHEDULES[name]
    mean = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    root = randn(3, 3, seed=5).double()
    covariance = root @ root.T + 0.1 * torch.eye(3)

    def posterior_mean(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        rows = []  # the joint Gaussian of (x0, x_t), conditioned on x_t
        for x, a, s in zip(x_t, alpha.flatten(), sigma.flatten(), strict=True):
            seen = a**2 * covariance + s**2 * torch.eye(3)
            rows.append(mean + a * covariance @ torch.linalg.solve(seen, x - a * mean))
        return torch.stack(rows)

    def log_density(x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, a, s in zip(x, alpha.flatten(), sigma.flatten(), strict=True):
            noisy = MultivariateNormal(
                a * mean, a**2 * covariance + s**2 * torch.eye(3)
            )
            total = total + noisy.log_prob(row)
        return total

    t = spread(schedule.times, 4)
    x_t = randn(4, 3)
    alpha, sigma = schedule.at(t, x_t)
    found = estimator(target, schedule, posterior_mean).score(x_t, t)
    error = (found.double() - score_of(log_density, x_t)).abs() * sigma**2
    assert error.max().item() < 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_each_sample_is_denoised_at_its_own_time(
    name: str, target: str, shape: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    t, x_t = spread(schedule.times, shape[0]), randn(*shape)
    denoiser = estimator(target, schedule, gaussian)
    x0, score = denoiser(x_t, t, None), denoiser.score(x_t, t)
    assert x0.shape == score.shape == shape
    for i in range(shape[0]):
        alpha, sigma = schedule.levels(t[i].item())
        of_data, of_noise = STD**-2, (alpha / sigma) ** 2
        x = x_t[i].double()
        expected = (of_data * MEAN + of_noise * x / alpha) / (of_data + of_noise)
        torch.testing.assert_close(x0[i].double(), expected, atol=1e-5, rtol=1e-5)
        residual = alpha * expected - x
        torch.testing.assert_close(
            score[i].double() * sigma**2, residual, atol=1e-5, rtol=1e-5
        )


class Featured(nn.Module):
    """A network that can be asked, and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Any,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        self.asked.append(want)
        output = self.scale * x
        if want is None:
            return output
        return NetworkOutput(
            output if "output" in want else None,
            x[:, :, None, None] * 2 if "features" in want else None,
            x.sum(1) + c_noise + (0 if cond is None else cond),
        )


def featured() -> ScoreEstimator:
    return ScoreEstimator(Featured(), VarianceExploding(), VPrediction())


def test_several_quantities_cost_one_pass_and_equal_those_asked_alone() -> None:
    denoiser, x, t = featured(), randn(3, 2), torch.tensor([0.5, 1.0, 2.0])
    cond = torch.tensor([1.0, 2.0, 3.0])
    every = denoiser.estimate(x, t, cond, want=("score", "logits", "x0", "features"))
    assert denoiser.network.asked == [("output", "features", "logits")]
    assert every.x0 is not None
    assert every.score is not None
    assert torch.equal(every.x0, denoiser(x, t, cond))
    assert torch.equal(every.score, denoiser.score(x, t, cond))
    for name in ("features", "logits"):
        alone = getattr(denoiser, name)(x, t, cond)
        assert torch.equal(getattr(every, name), alone)
    assert torch.equal(denoiser.logits(x, t, cond), x.sum(1) + t + cond)
    assert torch.equal(denoiser.features(x, t), 2 * x[:, :, None, None])


@pytest.mark.parametrize("name", Estimate._fields)
def test_what_was_not_asked_for_is_none(name: Any) -> None:
    given = featured().estimate(randn(3, 2), torch.ones(3), want=[name, name])
    present = {field for field in given._fields if getattr(given, field) is not None}
    assert present == {name}


def test_discriminating_asks_for_logits_alone() -> None:
    denoiser = featured()
    denoiser.logits(randn(3, 2), torch.ones(3))
    denoiser.features(randn(3, 2), torch.ones(3))
    assert denoiser.network.asked == [("logits",), ("features",)]


class Plain(nn.Module):
    """A network that predicts and can give nothing else."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        return 0.5 * x


def test_a_plain_network_gives_x0_and_score_in_one_call() -> None:
    denoiser = ScoreEstimator(Plain(), VarianceExploding(), SamplePrediction())
    x, t = randn(3, 2), torch.full((3,), 2.0)
    given = denoiser.estimate(x, t, want=("x0", "score"))
    assert given.x0 is not None
    assert given.score is not None
    torch.testing.assert_close(given.x0, x / 2)
    torch.testing.assert_close(given.score, -(x - x / 2) / 4)  # Eq. 1 by hand


def test_gradients_reach_the_network_and_the_sample() -> None:
    denoiser = featured()
    x = randn(3, 2).requires_grad_()
    denoiser(x, torch.tensor([0.5, 1.0, 2.0]), None).sum().backward()
    assert x.grad is not None
    # v: x0 = (x - sigma F) / (1 + sigma^2) with F = x / 2.
    slope = torch.tensor([0.75 / 1.25, 0.5 / 2, 0.0 / 5])[:, None].expand(3, 2)
    torch.testing.assert_close(x.grad, slope)
    scale = denoiser.network.scale
    assert isinstance(scale, nn.Parameter)
    assert scale.grad is not None
    assert scale.grad.abs() > 0


class Half(nn.Module):
    """A network that computes and answers in bf16, as under autocast."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        assert c_noise.dtype == torch.float32
        return 0.5 * x.bfloat16()


@pytest.mark.parametrize(
    ("sample", "estimate"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_affine_map_is_fp32_or_better(
    sample: torch.dtype, estimate: torch.dtype
) -> None:
    process = DiscreteVariancePreserving.scaled_linear()
    denoiser = ScoreEstimator(Half(), process, EpsilonPrediction())
    x = randn(2, 3).to(sample)
    x0 = denoiser(x, torch.tensor([399.0, 999.0]), None)
    assert x0.dtype == estimate
    alpha = torch.tensor([0.4261**0.5, 0.00466**0.5])[:, None]
    sigma = (1 - alpha**2).sqrt()
    noise = (0.5 * x.bfloat16()).float()
    expected = (x.float() - sigma * noise) / alpha
    torch.testing.assert_close(x0.float(), expected, atol=2e-2, rtol=1e-3)
    score = denoiser.score(x, torch.tensor([399.0, 999.0]))
    assert score.dtype == estimate


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_an_estimator_can_be_copied(copied: str) -> None:
    denoiser = featured()
    twin = (
        copy.deepcopy(denoiser)
        if copied == "deepcopy"
        else pickle.loads(pickle.dumps(denoiser))
    )
    assert twin.process == denoiser.process
    assert twin.parameterization == denoiser.parameterization
    x, t = randn(3, 2), torch.ones(3)
    assert torch.equal(twin(x, t, None), denoiser(x, t, None))
    assert twin.network is not denoiser.network


def test_an_estimator_registers_the_network_alone() -> None:
    process = DiscreteVariancePreserving.scaled_linear()
    denoiser = ScoreEstimator(Featured(), process, EpsilonPrediction())
    denoiser(randn(2, 3), torch.tensor([3.0, 4.0]), None)
    assert set(denoiser.state_dict()) == {"network.scale"}
    assert list(denoiser.buffers()) == []
    assert isinstance(denoiser, Denoiser)
    assert isinstance(denoiser, Discriminator)


class Broken(nn.Module):
    """A network whose own mistake must stay visible."""

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Any,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor:
        raise TypeError("my own mistake")


def test_an_error_inside_the_network_is_not_disguised() -> None:
    denoiser = ScoreEstimator(Broken(), RectifiedFlow(), VelocityPrediction())
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        denoiser.logits(randn(2, 3), torch.ones(2))


def test_denoisers_compile_without_a_graph_break() -> None:
    # In its own process: the import hook over the tests cannot be traced.
    script = Path(__file__).with_name("script_compile.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 11
    assert {name: d for name, d in differences.items() if not d < 1e-3} == {}


class Answers(nn.Module):
    """A network that answers with whatever it was made with."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Any,
        *,
        want: Sequence[Want] | None = None,
    ) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("network", "want", "kind", "message"),
    [
        (Plain(), (), ValueError, r"want: got \[\], expected one or more"),
        (
            Plain(),
            ("logits", "x0"),
            TypeError,
            r"network: .*cannot give output, logits",
        ),
        (
            Answers(NetworkOutput()),
            ("features",),
            TypeError,
            "asked for features, it di",
        ),
        (Answers(torch.ones(2)), ("logits",), TypeError, "network: asked for logits"),
        (Answers(None), ("x0",), TypeError, "network: its output is None"),
        (Answers(torch.ones(2)), ("x0",), ValueError, "network: .* expected the same"),
        (Answers(torch.ones(1, 3)), ("x0",), ValueError, r"float32\[1, 3\] for an inp"),
    ],
)
def test_a_network_that_cannot_give_what_is_asked_is_told(
    network: nn.Module, want: Any, kind: type[Exception], message: str
) -> None:
    denoiser = ScoreEstimator(network, RectifiedFlow(), VelocityPrediction())
    with pytest.raises(kind, match=message):
        denoiser.estimate(randn(2, 3), torch.ones(2), want=want)


def test_a_finer_answer_than_the_sample_is_not_rounded() -> None:
    third = torch.full((2, 3), 1 / 3)
    denoiser = ScoreEstimator(Answers(third), VarianceExploding(), SamplePrediction())
    x0 = denoiser(randn(2, 3).bfloat16(), torch.ones(2), None)
    assert torch.equal(x0, third)
