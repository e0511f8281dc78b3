"""The denoising loss: its minimiser, its weights, and what it leaves alone."""

import pytest
import torch
from helpers_losses import (
    PROCESSES,
    FunctionDenoiser,
    GaussianDenoiser,
    column,
    generator,
    moment_matched,
    noise_levels,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmdkit import (
    DenoisingLoss,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasPreconditioning,
    KarrasWeight,
    ScoreEstimator,
    UniformTime,
    VarianceExploding,
    denoising_loss,
    snr_weight,
    unit_weight,
)

VE = VarianceExploding()


class Scale(nn.Module):
    """A network that scales its input: F(x) = weight x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, c_noise: Tensor, cond: object) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("name", PROCESSES)
def test_minimiser_on_gaussian_data_is_the_posterior_mean(name: str) -> None:
    """For jointly Gaussian x0 and x_t: E[x0|x_t] = m + cov/var (x_t - alpha m)."""
    process, _, times = PROCESSES[name]
    mean, std = 0.5, 0.8
    z, noise = moment_matched(torch.float64)
    x = mean + std * z
    for time in times:
        t = torch.full((4,), time)
        alpha, sigma = (v[0, 0] for v in noise_levels(process, t, x))
        slope = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        best = torch.stack((slope, mean - slope * alpha * mean)).requires_grad_()

        def loss_at(line: Tensor, t: Tensor = t) -> Tensor:
            denoiser = FunctionDenoiser(
                lambda x_t, *_: line[0] * x_t + line[1], process
            )
            return DenoisingLoss(UniformTime())(
                x, denoiser=denoiser, t=t, noise=noise
            ).loss

        lowest = loss_at(best)
        (gradient,) = torch.autograd.grad(lowest, best)
        torch.testing.assert_close(
            gradient, torch.zeros(2).double(), atol=1e-12, rtol=0
        )
        for away in ([0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]):
            assert loss_at(best + torch.tensor(away)) > lowest
        # What is left is the posterior variance.
        left = 1 / (1 / std**2 + alpha**2 / sigma**2)
        torch.testing.assert_close(lowest.detach(), left)
        denoiser = GaussianDenoiser(process, mean, std)
        out = DenoisingLoss(UniformTime())(x, denoiser=denoiser, t=t, noise=noise)
        torch.testing.assert_close(out.loss, lowest.detach())


def test_training_finds_the_posterior_mean() -> None:
    mean, std, sigma = 1.0, 0.5, 0.5
    line = torch.zeros(2, requires_grad=True)
    critic = FunctionDenoiser(lambda x_t, *_: line[0] * x_t + line[1])
    loss, source = DenoisingLoss(UniformTime()), generator()
    optimizer = torch.optim.SGD([line], lr=0.3)
    t = torch.full((512,), sigma)
    for _ in range(100):
        x = mean + std * torch.randn(512, 4, generator=source)
        out = loss(x, denoiser=critic, t=t, generator=source)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    # Equal precisions: half way between the prior mean and the observation.
    torch.testing.assert_close(line, torch.tensor([0.5, 0.5]), atol=0.03, rtol=0)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_loss_is_the_weighted_mean_of_each_samples_squared_error(
    shape: list[int], seed: int
) -> None:
    x, x0, x_t = (normal(*shape, seed=seed + i) for i in range(3))
    weight = normal(shape[0], seed=seed).exp()
    out = denoising_loss(x, x_t, torch.ones(shape[0]), x0, weight)
    errors = [((a - b) ** 2).mean() for a, b in zip(x, x0, strict=True)]
    terms = torch.stack([w * e for w, e in zip(weight, errors, strict=True)])
    torch.testing.assert_close(out.per_sample, terms)
    torch.testing.assert_close(out.loss, terms.sum() / shape[0])
    torch.testing.assert_close(out.metrics["error"], torch.stack(errors).mean())
    assert out.metrics["nonfinite"].item() == 0


def test_snr_weight_makes_it_the_squared_error_of_epsilon() -> None:
    process = DiscreteVariancePreserving.scaled_linear()
    critic = ScoreEstimator(Scale(), process, EpsilonPrediction())
    x, noise = normal(5, 3, 2, 2), normal(5, 3, 2, 2, seed=1)
    t = torch.tensor([0.0, 10.0, 300.0, 749.0, 999.0])
    out = DenoisingLoss(UniformTime(), snr_weight)(x, denoiser=critic, t=t, noise=noise)
    errors = (0.7 * out.x_t - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(out.per_sample, errors, rtol=1e-3, atol=1e-5)


def test_karras_weight_makes_it_the_squared_error_of_the_raw_network() -> None:
    """EDM chose lambda = 1 / c_out^2 (its Table 1), so F has unit weight."""
    data = 0.5
    critic = ScoreEstimator(Scale(), VE, KarrasPreconditioning(data))
    x, noise = normal(4, 6), normal(4, 6, seed=1)
    t = torch.tensor([0.002, 0.3, 2.0, 80.0])
    out = DenoisingLoss(UniformTime(), KarrasWeight(data))(
        x, denoiser=critic, t=t, noise=noise
    )
    s = t[:, None].double()
    x_t = x + s * noise
    total = s**2 + data**2
    raw = 0.7 * x_t / total.sqrt()
    wanted = (x - data**2 / total * x_t) * total.sqrt() / (s * data)
    errors = (raw - wanted).square().mean(dim=1).float()
    # At sigma = 0.002 the target is a difference of close numbers.
    torch.testing.assert_close(out.per_sample, errors, rtol=1e-2, atol=1e-3)


def test_weights_are_asked_for_the_process_and_times_of_the_draw() -> None:
    def weight(process: object, t: Tensor) -> Tensor:
        assert process == VE
        assert not torch.is_grad_enabled()
        return 10 * t

    x, denoiser = normal(3, 2), GaussianDenoiser(VE)
    out = DenoisingLoss(UniformTime(1.0, 2.0), weight)(x, denoiser=denoiser)
    error = (denoiser(out.x_t, out.t) - x).square().mean(dim=1)
    torch.testing.assert_close(out.per_sample, 10 * out.t * error)


def test_default_weight_is_one() -> None:
    assert DenoisingLoss(UniformTime()).weight is unit_weight


def test_no_gradient_reaches_x() -> None:
    slope = torch.tensor(0.5, requires_grad=True)
    x = normal(2, 3).requires_grad_()
    critic = FunctionDenoiser(lambda x_t, *_: slope * x_t)
    out = DenoisingLoss(UniformTime(0.5, 1.0))(x, denoiser=critic)
    of_x, of_slope = torch.autograd.grad(out.loss, (x, slope), allow_unused=True)
    assert of_x is None
    assert of_slope is not None
    expected = (2 * (0.5 * out.x_t - x) * out.x_t).mean()
    torch.testing.assert_close(of_slope, expected)
    x0 = out.x_t * slope
    pure = denoising_loss(x, out.x_t, out.t, x0, torch.ones(2))
    assert torch.autograd.grad(pure.loss, x, allow_unused=True) == (None,)


def test_all_but_the_loss_is_detached() -> None:
    slope = torch.tensor(0.5, requires_grad=True)
    critic = FunctionDenoiser(lambda x_t, *_: slope * x_t)
    out = DenoisingLoss(UniformTime(0.5, 1.0))(normal(2, 3), denoiser=critic)
    for name, value in out._asdict().items():
        if isinstance(value, Tensor):
            assert value.requires_grad == (name == "loss"), name
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("name", PROCESSES)
def test_given_times_and_noise_reproduce_the_drawn_ones(name: str) -> None:
    process, times, _ = PROCESSES[name]
    loss, x = DenoisingLoss(times), normal(6, 4)
    critic = GaussianDenoiser(process, 0.2)
    drawn = loss(x, denoiser=critic, generator=generator(3))
    again = loss(x, denoiser=critic, generator=generator(3))
    assert torch.equal(drawn.loss, again.loss)
    assert len(set(drawn.t.tolist())) > 1, "one time a sample"
    alpha, sigma = noise_levels(process, drawn.t, x)
    noise = (drawn.x_t - alpha * x) / sigma
    both = loss(x, denoiser=critic, t=drawn.t, noise=noise)
    torch.testing.assert_close(both.per_sample, drawn.per_sample, rtol=1e-3, atol=1e-4)


def test_noise_is_standard_normal_and_fresh_in_every_element() -> None:
    x = torch.zeros(200, 50)
    out = DenoisingLoss(UniformTime())(
        x, denoiser=GaussianDenoiser(VE), t=torch.ones(200), generator=generator()
    )
    assert abs(out.x_t.mean().item()) < 0.03
    assert abs(out.x_t.std().item() - 1) < 0.03
    assert abs(torch.corrcoef(out.x_t[:2])[0, 1].item()) < 0.5
    assert len(out.x_t.unique()) > 9_900


def test_the_condition_reaches_the_denoiser() -> None:
    cond = torch.tensor([1.0, 2.0])
    critic = FunctionDenoiser(lambda x_t, t, c: column(c, x_t).expand_as(x_t))
    out = DenoisingLoss(UniformTime())(torch.zeros(2, 3), cond, denoiser=critic)
    assert out.per_sample.tolist() == [1, 4]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_samples_and_estimates_are_flagged(bad: float) -> None:
    loss, t = DenoisingLoss(UniformTime()), torch.tensor([0.5, 2.0, 0.5])
    x = normal(3, 2)
    broken = x.clone()
    broken[0, 1] = bad
    out = loss(broken, denoiser=GaussianDenoiser(VE), t=t)
    assert out.finite.tolist() == [False, True, True]
    assert out.metrics["nonfinite"].item() == 1
    constant = loss(broken, denoiser=FunctionDenoiser(lambda x_t, *_: 0 * x), t=t)
    assert constant.finite.tolist() == [False, True, True]
    critic = FunctionDenoiser(lambda x_t, t, _: torch.where(t[:, None] > 1, bad, x_t))
    out = loss(x, denoiser=critic, t=t)
    assert out.finite.tolist() == [True, False, True]
    assert not torch.isfinite(out.loss)


def test_a_time_outside_the_process_is_flagged() -> None:
    t = torch.tensor([0.5, -1.0])
    out = DenoisingLoss(UniformTime())(normal(2, 2), denoiser=GaussianDenoiser(VE), t=t)
    assert out.finite.tolist() == [True, False]


def test_wrong_shapes_name_the_argument() -> None:
    x, t = normal(3, 2), torch.ones(3)
    loss, critic = DenoisingLoss(UniformTime()), GaussianDenoiser(VE)
    with pytest.raises(ValueError, match=r"`x0` is float32\[3, 1\], expected"):
        denoising_loss(x, x, t, x[:, :1], t)
    with pytest.raises(ValueError, match=r"`weight` is float32\[3, 1\], expected"):
        denoising_loss(x, x, t, x, t[:, None])
    with pytest.raises(ValueError, match=r"`t` is float32\[2\], expected"):
        loss(x, denoiser=critic, t=t[:2])
    with pytest.raises(TypeError, match=r"`t` is bfloat16\[3\], expected"):
        loss(x, denoiser=critic, t=t.bfloat16())
