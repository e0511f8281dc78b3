"""Distributions of times against their quantiles, and few-step times."""

import copy
import math
import pickle
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from helpers_diffusion import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmdkit import (
    DenoisingLoss,
    DiscreteUniformTime,
    DiscreteVariancePreserving,
    KarrasIndexTime,
    LogitNormalTime,
    LogNormalTime,
    NoiseProcess,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    ShiftedTime,
    UniformTime,
    VarianceExploding,
    few_step_flow_times,
    few_step_times,
    karras_sigmas,
)
from dmdkit.types import TimeSampler

DRAWS = 40_000
SAMPLERS: list[TimeSampler] = [
    UniformTime(0.25, 0.75),
    DiscreteUniformTime(20, 981),
    KarrasIndexTime(20, 981),
    LogNormalTime(),
    LogitNormalTime(),
    ShiftedTime(UniformTime(), 3.0),
]
normal = NormalDist()


def draw(times: TimeSampler, batch: int = DRAWS, seed: int = 0) -> Tensor:
    return times(batch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("times", "cdf"),
    [
        (UniformTime(), lambda t: t),
        (UniformTime(0.02, 0.98), lambda t: (t - 0.02) / 0.96),
        (LogNormalTime(), lambda t: normal.cdf((math.log(t) + 1.2) / 1.2)),
        (LogNormalTime(0.5, 2), lambda t: normal.cdf((math.log(t) - 0.5) / 2)),
        (LogitNormalTime(), lambda t: normal.cdf(math.log(t / (1 - t)))),
        (
            LogitNormalTime(-0.5, 2),
            lambda t: normal.cdf((math.log(t / (1 - t)) + 0.5) / 2),
        ),
        # Solving y = s t / (1 + (s - 1) t) for t.
        (ShiftedTime(UniformTime(), 5), lambda y: y / (5 - 4 * y)),
        # The shift moves the logit by ln s, hence the mean of a logit-normal.
        (
            ShiftedTime(LogitNormalTime(0.3), 3.0),
            lambda t: normal.cdf(math.log(t / (1 - t)) - 0.3 - math.log(3)),
        ),
    ],
    ids=lambda value: (
        ""
        if callable(value) and not hasattr(value, "__dataclass_fields__")
        else str(value)
    ),
)
def test_draws_follow_their_distribution(
    times: TimeSampler, cdf: Callable[[float], float]
) -> None:
    # Kolmogorov and Smirnov: D sqrt(n) is below 1.95 with probability 0.999.
    levels = torch.tensor([cdf(t) for t in draw(times).sort().values.tolist()])
    expected = (torch.arange(DRAWS) + 0.5) / DRAWS
    assert (levels - expected).abs().max().item() * math.sqrt(DRAWS) < 1.95


@pytest.mark.parametrize(
    ("low", "high", "smallest", "largest"),
    [(20, 981, 20, 980), (0, 1000, 0, 999), (7, 8, 7, 7)],
)
def test_official_index_ranges_are_inclusive(
    low: int, high: int, smallest: int, largest: int
) -> None:
    t = draw(DiscreteUniformTime(low, high))
    count = largest - smallest + 1
    assert t.unique().tolist() == list(range(smallest, largest + 1))
    assert t.mean().item() == pytest.approx((smallest + largest) / 2, abs=0.02 * count)
    counts = t.long().bincount()[smallest:].double()
    chi_square = ((counts - DRAWS / count) ** 2 / (DRAWS / count)).sum().item()
    assert chi_square < count - 1 + 5 * math.sqrt(2 * count)


def test_default_indices_are_those_of_the_critic() -> None:
    assert DiscreteUniformTime() == DiscreteUniformTime(0, 1000)
    assert KarrasIndexTime() == KarrasIndexTime(0, 1000)


def test_karras_grid_has_edm_values() -> None:
    values = {0: 0.002, 20: 0.00323, 100: 0.0168, 250: 0.170, 500: 2.527}
    values |= {750: 17.62, 980: 72.05, 999: 80.0}
    rising = karras_sigmas(1000)[::-1]
    for index, expected in values.items():
        assert rising[index] == pytest.approx(expected, rel=3e-3)
        only = KarrasIndexTime(index, index + 1)
        assert draw(only, 1).item() == pytest.approx(rising[index], rel=1e-6)


def test_karras_grid_is_even_in_its_root() -> None:
    for rho in (1, 3, 7):
        levels = karras_sigmas(9, 0.1, 30, rho)
        roots = torch.tensor(levels, dtype=torch.float64) ** (1 / rho)
        steps = roots.diff()
        torch.testing.assert_close(steps, steps.mean().expand(8))
        assert (levels[0], levels[-1]) == pytest.approx((30, 0.1))
    assert karras_sigmas(1) == pytest.approx((80.0,))


@pytest.mark.parametrize(
    ("low", "high", "ends"), [(20, 981, (0.00323, 72.05)), (0, 1000, (0.002, 80.0))]
)
def test_karras_draws_are_uniform_in_the_index(
    low: int, high: int, ends: tuple[float, float]
) -> None:
    sigmas = draw(KarrasIndexTime(low, high))
    assert sigmas.min().item() == pytest.approx(ends[0], rel=3e-3)
    assert sigmas.max().item() == pytest.approx(ends[1], rel=3e-3)
    assert sigmas.unique().numel() == high - low
    below = (sigmas < 0.170).double().mean().item()  # index 250
    assert below == pytest.approx((250 - low) / (high - low), abs=0.01)


def test_karras_range_and_numbers_are_arguments() -> None:
    times = KarrasIndexTime(0, 3, steps=3, sigma_min=1, sigma_max=9, rho=1)
    assert sorted(set(draw(times).tolist())) == [1.0, 5.0, 9.0]


@given(shift=st.floats(0.1, 20), t=st.floats(0.001, 0.999))
def test_a_shift_multiplies_the_noise_to_signal_ratio(shift: float, t: float) -> None:
    # Esser et al. 2024, section 5.3.2: sigma / alpha grows by the factor s.
    class Fixed:
        def __call__(
            self,
            batch: int,
            *,
            device: torch.device | str | None = None,
            generator: torch.Generator | None = None,
        ) -> Tensor:
            return torch.full((batch,), t, dtype=torch.float32)

    start = torch.tensor(t).double().item()
    shifted = ShiftedTime(Fixed(), shift)(2)
    expected = shift * start / (1 - start)
    expected = expected / (1 + expected)
    assert shifted.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert shifted.dtype == torch.float32


def test_four_steps_of_a_thousand() -> None:
    assert few_step_times(4) == (999, 749, 499, 249)
    assert few_step_times(1) == (999,)


@pytest.mark.parametrize("n", [3, 4, 6, 7, 8, 999])
def test_steps_are_the_first_of_the_official_list(n: int) -> None:
    official = list(range(1000 - 1, 0, -(1000 // n)))
    assert list(few_step_times(n)) == official[:n]
    assert all(type(t) is float for t in few_step_times(n))
    for t in few_step_times(n):
        SCHEDULES["vp"].process.check_time(t)


def test_steps_equal_trailing_timesteps_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for n in (1, 2, 4, 5, 8):
        scheduler.set_timesteps(n)
        assert list(few_step_times(n)) == scheduler.timesteps.tolist()


@given(shift=st.floats(0.001, 1000))
def test_no_shift_leads_beyond_one(shift: float) -> None:
    assert few_step_flow_times(4, shift)[0] == 1
    near = torch.cat((torch.linspace(0, 1, 1001), 1 - torch.logspace(-7, -1, 200)))
    shifted = ShiftedTime(lambda *_, **__: near, shift)(1)
    assert shifted[0] == 0
    assert shifted.max() == 1
    assert ShiftedTime(UniformTime(), shift).ends == (0, 1)


def test_a_shift_moves_the_ends() -> None:
    assert ShiftedTime(UniformTime(0.25, 0.5), 3).ends == pytest.approx((0.5, 0.75))
    assert ShiftedTime(LogNormalTime(), 3).ends == ()


def test_flow_steps_with_shift_five() -> None:
    times = [1000 * t for t in few_step_flow_times(4, shift=5)]
    assert times == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert few_step_flow_times(4) == (1.0, 0.75, 0.5, 0.25)
    assert few_step_flow_times(1, 3) == (1.0,)


def test_flow_steps_equal_shifted_sigmas_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for n, shift in ((3, 3.0), (4, 5.0), (8, 0.5)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)])
        expected = torch.as_tensor(scheduler.sigmas)[:-1].tolist()
        assert few_step_flow_times(n, shift) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("times", SAMPLERS, ids=str)
def test_time_samplers_are_reproducible_values(times: TimeSampler) -> None:
    first = draw(times, 5)
    assert (first.shape, first.dtype) == ((5,), torch.float32)
    assert torch.equal(first, draw(times, 5))
    assert not torch.equal(first, draw(times, 5, seed=1))
    for twin in (copy.deepcopy(times), pickle.loads(pickle.dumps(times))):
        assert twin == times
        assert hash(twin) == hash(times)
        assert torch.equal(draw(twin, 5), first)
    assert isinstance(times, TimeSampler)
    assert times(2, device="meta").is_meta
    assert times(3).device == torch.get_default_device()
    with torch.device("meta"):
        assert times(3).is_meta
    assert len({*SAMPLERS, times}) == len(SAMPLERS)


@pytest.mark.parametrize("times", SAMPLERS, ids=str)
def test_a_generator_of_another_device_is_named(times: TimeSampler) -> None:
    with pytest.raises(ValueError, match=r"^generator: it lives on cpu, .* on meta"):
        times(2, device="meta", generator=torch.Generator())
    with torch.device("meta"), pytest.raises(ValueError, match=r"^generator: "):
        times(2, generator=torch.Generator(device="cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformTime(1, 1), "low, high: got 1, 1, expected low < high"),
        (lambda: DiscreteUniformTime(5, 5), "low, high: got 5, 5"),
        (lambda: DiscreteUniformTime(-1, 5), "low: got -1, expected an index >= 0"),
        (lambda: DiscreteUniformTime(-5, 0), "low: got -5"),
        (lambda: KarrasIndexTime(3, 2), "low, high: got 3, 2"),
        (lambda: KarrasIndexTime(-1, 2), "low, high: got -1, 2, .* within 0 ... 1000"),
        (lambda: KarrasIndexTime(0, 11, steps=10), "low, high: got 0, 11, .* 10"),
        (lambda: LogNormalTime(std=0), "std: got 0, expected > 0"),
        (lambda: LogitNormalTime(std=-1), "std: got -1, expected > 0"),
        (lambda: ShiftedTime(UniformTime(), 0), "shift: got 0, expected > 0"),
        (lambda: karras_sigmas(0), "steps: got 0, expected at least 1"),
        (lambda: karras_sigmas(2, 0), "sigma_min, sigma_max: got 0, 80.0"),
        (lambda: karras_sigmas(2, 3, 2), "sigma_min, sigma_max: got 3, 2"),
        (lambda: few_step_times(0), "n: got 0, expected 1 ... 1000"),
        (lambda: few_step_times(11, 10), "n: got 11, expected 1 ... 10"),
        (lambda: few_step_flow_times(0), "n: got 0, expected at least 1"),
        (lambda: few_step_flow_times(4, 0), "shift: got 0, expected > 0"),
    ],
)
def test_impossible_numbers_are_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


class Zero(torch.nn.Module):
    def forward(self, x: Tensor, c_noise: Tensor, cond: None) -> Tensor:
        return 0 * x


def test_the_ends_are_the_most_extreme_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for times in (
        UniformTime(0.2, 0.7),
        DiscreteUniformTime(3, 9),
        LogitNormalTime(0, 3),
        KarrasIndexTime(20, 40),
    ):
        low, high = times.ends
        drawn = times(20_000, generator=generator)
        assert low <= drawn.min() <= low + 0.02
        assert high - 0.02 <= drawn.max() <= high


VP = DiscreteVariancePreserving.scaled_linear()


@pytest.mark.parametrize(
    ("times", "process", "message"),
    [
        (UniformTime(0.02, 0.98), RectifiedFlow(), None),
        (UniformTime(0.02, 0.98), VP, "continuous times; Discrete.* whole indices"),
        (UniformTime(), VP, "continuous times; Discrete.* whole indices"),
        (LogNormalTime(), VP, "continuous times; Discrete.* whole indices"),
        (ShiftedTime(UniformTime(), 3), VP, "continuous times; Discrete.* whole"),
        (
            DiscreteUniformTime(0, 1000),
            DiscreteVariancePreserving((0.9, 0.5)),
            "draws what is no time of Discrete.*got 999",
        ),
        (DiscreteUniformTime(0, 2), DiscreteVariancePreserving((0.9, 0.5)), None),
        (DiscreteUniformTime(0, 1000), RectifiedFlow(), "whole indices; Rect.* cont"),
        (DiscreteUniformTime(20, 981), VarianceExploding(), "whole.*; Var.* cont"),
        (KarrasIndexTime(), RectifiedFlow(), "draws what is no time of Rectified"),
        (ShiftedTime(UniformTime(0, 2), 3), RectifiedFlow(), "draws what is no time"),
        (KarrasIndexTime(), VarianceExploding(), None),
        (LogNormalTime(), VarianceExploding(), None),
        (lambda batch, **_: torch.full((batch,), 5.0), VP, None),
        (lambda batch, **_: torch.full((batch,), 5.0), VarianceExploding(), None),
    ],
)
def test_a_loss_refuses_times_of_another_process(
    times: TimeSampler, process: NoiseProcess, message: str | None
) -> None:
    denoiser = ScoreEstimator(Zero(), process, SamplePrediction())
    if message is None:
        out = DenoisingLoss(times)(torch.ones(2, 3), denoiser=denoiser)
        assert out.finite.all()
    else:
        with pytest.raises(ValueError, match=rf"times: .* {message}"):
            DenoisingLoss(times)(torch.ones(2, 3), denoiser=denoiser)
