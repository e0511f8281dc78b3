import itertools
import math
from typing import Any

import pytest
import torch
from helpers_sampling import Gaussian, Recorder
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit import (
    AncestralSampler,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    EulerSampler,
    HeunSampler,
    RectifiedFlow,
    ScoreEstimator,
    StochasticSampler,
    VarianceExploding,
    VelocityPrediction,
    few_step_flow_times,
    few_step_times,
    karras_sigmas,
)

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
VP = DiscreteVariancePreserving.scaled_linear()


def quarter_circle(steps: int) -> DiscreteVariancePreserving:
    """Alpha and sigma on a circle, from an angle of nearly 0 to 1.45 (of pi/2)."""
    angles = ((i + 1) / steps * 1.45 for i in range(steps))
    return DiscreteVariancePreserving(tuple(math.cos(angle) ** 2 for angle in angles))


def every(process: DiscreteVariancePreserving, n: int) -> tuple[float, ...]:
    gap = process.steps // n
    return tuple(float(process.steps - 1 - i * gap) for i in range(n))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


class SomeNetwork(nn.Module):
    """Some smooth function of x and time, in place of a trained network."""

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return torch.sin(x) * (1 + t.reshape(-1, 1, 1, 1) / 1000) + 0.1


CIRCLE = quarter_circle(640)
GRIDS = {
    "ve": (VarianceExploding(), lambda n: karras_sigmas(n, 0.002, 20.0)),
    "flow": (RectifiedFlow(), few_step_flow_times),
    "vp": (CIRCLE, lambda n: every(CIRCLE, n)),
}


@pytest.mark.parametrize("kind", [EulerSampler, HeunSampler, AncestralSampler])
@pytest.mark.parametrize(("process", "grid"), GRIDS.values(), ids=GRIDS)
def test_a_sampler_asks_at_its_times_alone(kind, process, grid) -> None:
    denoiser = Recorder(process)
    kind(grid(5))(denoiser, draw(2, 3))
    times = [pytest.approx(t) for t in grid(5)]
    twice = [t for time in times[1:] for t in (time, time)]
    assert denoiser.times == (
        [times[0], *twice] if kind is HeunSampler else list(times)
    )
    assert not any(denoiser.graph)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_heun_calls_the_denoiser_one_time_less_than_twice_a_step(n: int) -> None:
    denoiser, sampler = Gaussian(VarianceExploding()), HeunSampler(karras_sigmas(n))
    sampler(denoiser, draw(2, 3))
    assert denoiser.calls == sampler.calls == 2 * n - 1


def test_heun_at_17_and_511_calls_is_edm_s_number_of_steps() -> None:
    assert HeunSampler(karras_sigmas(9)).calls == 17
    assert HeunSampler(karras_sigmas(256)).calls == 511


@pytest.mark.parametrize(("process", "grid"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("kind", "order"), [(EulerSampler, 1), (HeunSampler, 2)])
def test_the_error_falls_with_the_order_of_the_solver(
    process, grid, kind, order
) -> None:
    noise = draw(16, 2, dtype=torch.float64)
    errors = []
    for n in (20, 40, 80, 160):
        denoiser = Gaussian(process, mean=0.7, spread=0.5)
        times = grid(n)
        t = torch.full((16,), times[0], dtype=torch.float32)
        exact = denoiser.flow_endpoint(process.prior(noise, t), times[0])
        errors.append((kind(times)(denoiser, noise) - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[0] > 1e-4
    assert orders[-1] == pytest.approx(order, abs=0.25)
    assert orders[-2] == pytest.approx(order, abs=0.35)


def test_one_step_is_the_denoiser_s_estimate() -> None:
    noise = draw(2, 3)
    denoiser = Gaussian(VarianceExploding(), mean=1.0, spread=0.5)
    expected = denoiser(80 * noise, torch.full((2,), 80.0))
    for kind in (EulerSampler, HeunSampler, AncestralSampler):
        torch.testing.assert_close(kind((80.0,))(denoiser, noise), expected)


def test_euler_is_ddim_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(
        {**STABLE_DIFFUSION, "set_alpha_to_one": 1}
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    network, noise = SomeNetwork(), draw(2, 3, 4, 4)
    x = noise
    for t in scheduler.timesteps:
        epsilon = network(x, t.float().expand(2))
        x = scheduler.step(epsilon, int(t), x, eta=0.0, return_dict=False)[0]
    teacher = ScoreEstimator(network, VP, EpsilonPrediction())
    ours = EulerSampler(few_step_times(4))(teacher, noise)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_flow_matching_scheduler_of_diffusers(shift: float) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    network, noise = SomeNetwork(), draw(2, 3, 4, 4)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x, return_dict=False)[0]
    teacher = ScoreEstimator(
        network, RectifiedFlow(), VelocityPrediction(time_scale=1000)
    )
    ours = EulerSampler(few_step_flow_times(6, shift))(teacher, noise)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_heun_is_the_second_algorithm_row_of_edm_written_out() -> None:
    # Karras et al. 2022, Algorithm 1, for sigma(t) = t and s(t) = 1, in the paper's
    # own terms: d = (x - D(x; t)) / t, a trial step, the mean of two slopes.
    network = SomeNetwork()
    denoise = ScoreEstimator(network, VarianceExploding(), EpsilonPrediction())
    noise, grid = draw(2, 3, 4, 4), [*karras_sigmas(6), 0.0]
    x = grid[0] * noise
    for now, then in itertools.pairwise(grid):
        slope = (x - denoise(x, torch.full((2,), now))) / now
        trial = x + (then - now) * slope
        if then > 0:
            other = (trial - denoise(trial, torch.full((2,), then))) / then
            trial = x + (then - now) * (slope + other) / 2
        x = trial
    ours = HeunSampler(karras_sigmas(6))(denoise, noise)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_without_churn_the_stochastic_sampler_is_heun() -> None:
    denoiser, noise = Recorder(VarianceExploding()), draw(2, 3)
    times = karras_sigmas(7)
    stochastic = StochasticSampler(times, churn=0)(denoiser, noise)
    assert torch.equal(stochastic, HeunSampler(times)(denoiser, noise))
    outside = StochasticSampler(times, s_min=100, s_max=200)(denoiser, noise)
    assert torch.equal(outside, stochastic)


def test_churn_raises_sigma_within_its_range_and_is_capped() -> None:
    denoiser, times = Recorder(VarianceExploding()), (80.0, 10.0, 1.0, 0.01)
    StochasticSampler(times, churn=1)(denoiser, draw(1, 2), generator=seeded(0))
    # gamma = churn / N = 1/4 at 10 and 1; 80 and 0.01 are outside [0.05, 50].
    assert denoiser.times == pytest.approx([80, 10, 12.5, 1, 1.25, 0.01, 0.01])
    denoiser = Recorder(VarianceExploding())
    StochasticSampler(times, churn=400)(denoiser, draw(1, 2), generator=seeded(0))
    assert denoiser.times[2] == pytest.approx(10 * math.sqrt(2))


def test_churn_adds_the_noise_that_the_raised_sigma_lacks() -> None:
    denoiser = Recorder(VarianceExploding(), answer=lambda x, t: torch.zeros_like(x))
    sampler = StochasticSampler((10.0,), churn=0.25, s_noise=1.5)
    sampler(denoiser, torch.zeros(200, 500), generator=seeded(0))
    x, t = denoiser.inputs[0]
    assert t[0] == pytest.approx(12.5)
    # 12.5^2 - 10^2 = 7.5^2, times s_noise.
    assert x.std().item() == pytest.approx(1.5 * 7.5, rel=0.01)


def test_stochastic_samples_have_the_variance_of_the_data() -> None:
    denoiser = Gaussian(VarianceExploding(), mean=0.5, spread=0.6)
    times = karras_sigmas(160)
    sampler = StochasticSampler(times, s_noise=1)
    noise = draw(10_000, 1, dtype=torch.float64)
    x = sampler(denoiser, noise, generator=seeded(1))
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.6, rel=0.02)
    # What it forgets of its first noise is what tells it from Heun's ODE.
    together = torch.cat((x, noise), dim=1).T
    ode = torch.cat((HeunSampler(times)(denoiser, noise), noise), dim=1).T
    assert torch.corrcoef(together)[0, 1] < 0.5
    assert torch.corrcoef(ode)[0, 1] > 0.99
    again = sampler(denoiser, noise, generator=seeded(1))
    assert torch.equal(x, again)


@pytest.mark.parametrize(("process", "grid"), GRIDS.values(), ids=GRIDS)
def test_ancestral_samples_have_the_distribution_of_the_data(process, grid) -> None:
    denoiser = Gaussian(process, mean=0.5, spread=0.6)
    noise = draw(10_000, 1)
    x = AncestralSampler(grid(320))(denoiser, noise, generator=seeded(1))
    assert x.mean().item() == pytest.approx(0.5, abs=0.025)
    assert x.std().item() == pytest.approx(0.6, rel=0.03)


@pytest.mark.parametrize(
    ("process", "t", "s"),
    [(VarianceExploding(), 5.0, 2.0), (RectifiedFlow(), 0.8, 0.5), (VP, 700.0, 400.0)],
    ids=["ve", "flow", "vp"],
)
def test_an_ancestral_step_is_the_posterior_of_two_gaussians(process, t, s) -> None:
    # Given x0, (x_s, x_t) are jointly Gaussian: x_t = r x_s + noise of variance
    # sigma_t^2 - r^2 sigma_s^2, so condition by the rule for two Gaussians.
    a_t, a_s = (process.alpha(torch.tensor([v])).item() for v in (t, s))
    v_t, v_s = (process.sigma(torch.tensor([v])).item() ** 2 for v in (t, s))
    r, x0 = a_t / a_s, 0.3
    covariance = r * v_s  # of x_s and x_t given x0
    x_t = process.prior(torch.full((1,), 1.7), torch.tensor([t])).item()
    mean = a_s * x0 + covariance / v_t * (x_t - a_t * x0)
    variance = v_s - covariance**2 / v_t
    denoiser = Recorder(process, answer=lambda x, t: torch.full_like(x, x0))
    noise = torch.full((200_000, 1), 1.7)
    AncestralSampler((t, s))(denoiser, noise, generator=seeded(0))
    x_s = denoiser.inputs[1][0]
    assert x_s.mean().item() == pytest.approx(mean, abs=5 * (variance / 2e5) ** 0.5)
    assert x_s.var().item() == pytest.approx(variance, rel=0.02)


def ddpm_of_diffusers(steps: int) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler: Any = DDPMScheduler.from_config(
        {**STABLE_DIFFUSION, "variance_type": "fixed_small"}
    )
    scheduler.set_timesteps(steps)
    return scheduler


def test_ancestral_sampling_is_the_ddpm_loop_of_diffusers() -> None:
    scheduler, network = ddpm_of_diffusers(4), SomeNetwork()
    x = noise = draw(2, 3, 4, 4)
    generator = seeded(2)
    for t in scheduler.timesteps:
        epsilon = network(x, t.float().expand(2))
        x = scheduler.step(epsilon, int(t), x, generator, return_dict=False)[0]
    teacher = ScoreEstimator(network, VP, EpsilonPrediction())
    ours = AncestralSampler(few_step_times(4))(teacher, noise, generator=seeded(2))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [999, 600, 200, 20, 1])
def test_an_ancestral_step_is_one_of_the_thousand_of_ddpm(t: int) -> None:
    scheduler, network = ddpm_of_diffusers(1000), SomeNetwork()
    x = draw(2, 3, 4, 4)
    epsilon = network(x, torch.full((2,), float(t)))
    theirs = scheduler.step(epsilon, t, x, seeded(3), return_dict=False)[0]
    teacher = ScoreEstimator(network, VP, EpsilonPrediction())
    denoiser = Recorder(VP, answer=lambda x_t, time: teacher(x_t, time))
    AncestralSampler((t, t - 1))(denoiser, x, generator=seeded(3))
    torch.testing.assert_close(denoiser.inputs[1][0], theirs, rtol=1e-4, atol=1e-4)


def test_the_karras_grid_has_the_numbers_of_edm() -> None:
    sigmas = karras_sigmas(1000)[::-1]
    known = {0: 0.002, 20: 0.00323, 100: 0.0168, 250: 0.170, 500: 2.527}
    known |= {750: 17.62, 980: 72.05, 999: 80.0}
    for index, sigma in known.items():
        assert sigmas[index] == pytest.approx(sigma, rel=4e-3)
    # Its 1/rho-th powers are evenly spaced, from the largest to the smallest.
    roots = [sigma ** (1 / 5) for sigma in karras_sigmas(11, 0.1, 10, rho=5)]
    gaps = [a - b for a, b in itertools.pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * 10)
    assert gaps[0] > 0
    assert karras_sigmas(1) == pytest.approx((80,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_samples_are_fp32_or_better(dtype: torch.dtype) -> None:
    teacher = ScoreEstimator(SomeNetwork(), VP, EpsilonPrediction())
    for kind in (EulerSampler, HeunSampler, AncestralSampler):
        x = kind((900.0, 400.0))(teacher, torch.randn(2, 1, 2, 2, dtype=dtype))
        assert x.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    "kind", [EulerSampler, HeunSampler, StochasticSampler, AncestralSampler]
)
def test_bad_times_are_named(kind) -> None:
    with pytest.raises(TypeError, match="times: got"):
        kind(())
    with pytest.raises(ValueError, match="falling"):
        kind((1.0, 80.0))
    with pytest.raises(ValueError, match="finite sigma"):
        kind((80.0, -1.0))(Gaussian(VarianceExploding()), draw(1, 2))
    with pytest.raises(ValueError, match=r"times: the last one, 0(\.0)?, is clean"):
        kind((80.0, 0.0))(Gaussian(VarianceExploding()), draw(1, 2))
    with as_in_a_script(), pytest.raises(TypeError, match="`denoiser` is builtin"):
        kind((80.0, 1.0))(torch.tanh, draw(1, 2))


def test_the_stochastic_sampler_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="process is RectifiedFlow"):
        StochasticSampler((1.0, 0.5))(Gaussian(RectifiedFlow()), draw(1, 2))
    with pytest.raises(ValueError, match="churn"):
        StochasticSampler((80.0,), churn=-1)
    with pytest.raises(ValueError, match="s_min"):
        StochasticSampler((80.0,), s_min=3, s_max=2)


@pytest.mark.parametrize(
    ("sampler", "process"),
    [
        (StochasticSampler(karras_sigmas(6)), VarianceExploding()),
        (AncestralSampler(few_step_times(4)), VP),
    ],
)
def test_noise_handed_over_is_noise_drawn(sampler: Any, process: Any) -> None:
    noise = torch.randn(3, 2)
    drawn = sampler(
        Recorder(process), noise, generator=torch.Generator().manual_seed(1)
    )
    same = torch.Generator().manual_seed(1)
    endless = (torch.randn(3, 2, generator=same) for _ in itertools.count())
    assert torch.equal(sampler(Recorder(process), noise, draws=endless), drawn)


def test_noise_handed_over_is_checked() -> None:
    sampler, noise = AncestralSampler(few_step_times(4)), torch.randn(3, 2)
    with pytest.raises(ValueError, match="draws: it ended after 2 tensors"):
        sampler(Recorder(VP), noise, draws=[noise, noise])
    with pytest.raises(ValueError, match=r"draws: tensor 1 has shape \[2\]"):
        sampler(Recorder(VP), noise, draws=[noise, noise[0]])
