"""Weights of the x0 error, by computing the other target's error itself."""

import pytest
import torch
from helpers_diffusion import SCHEDULES, Schedule, randn, spread
from torch import Tensor

from dmdkit import (
    KarrasPreconditioning,
    KarrasWeight,
    NoiseProcess,
    RectifiedFlow,
    TimeWeight,
    VarianceExploding,
    snr_weight,
    unit_weight,
    v_weight,
    velocity_weight,
)

EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def errors(schedule: Schedule, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Times, squared error of x0 and that of the target, for one noisy sample each."""
    t = spread(schedule.times, 4)
    x0, noise = randn(4, 3, 2).double(), randn(4, 3, 2, seed=1).double()
    guess = randn(4, 3, 2, seed=2).double()
    alpha, sigma = schedule.at(t, x0)
    x_t = alpha * x0 + sigma * noise

    def seen_as(target: str, x0: Tensor) -> Tensor:
        noise = (x_t - alpha * x0) / sigma  # what would have been added to this x0
        if target == "v":
            return alpha * noise - sigma * x0
        return noise - x0 if target == "velocity" else noise

    difference = seen_as(target, guess) - seen_as(target, x0)
    return t, per_sample((guess - x0) ** 2), per_sample(difference**2)


@EVERY
@pytest.mark.parametrize(
    ("weight", "target"),
    [(snr_weight, "epsilon"), (v_weight, "v"), (velocity_weight, "velocity")],
)
def test_weighted_x0_error_is_the_error_of_the_target(
    schedule: Schedule, weight: TimeWeight, target: str
) -> None:
    t, error, expected = errors(schedule, target)
    found = weight(schedule.process, t).double() * error
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


@EVERY
def test_unit_weight_is_one(schedule: Schedule) -> None:
    t = torch.tensor(schedule.times)
    assert torch.equal(unit_weight(schedule.process, t), torch.ones(len(t)))


@EVERY
def test_karras_weight_is_the_plain_error_of_the_network(schedule: Schedule) -> None:
    # Karras et al. 2022, Eq. 8: lambda c_out^2 = 1, for any sigma and any sigma_data.
    t = torch.tensor(schedule.times)
    for sigma_data in (0.5, 1.0, 2.0):
        c = KarrasPreconditioning(sigma_data).coefficients(schedule.process, t)
        product = KarrasWeight(sigma_data)(schedule.process, t) * c.c_out**2
        torch.testing.assert_close(product, torch.ones(len(t)), rtol=1e-5, atol=0)


def test_karras_weight_is_edm_lambda() -> None:
    # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 by hand at sigma_data = 0.5.
    t = torch.tensor([0.5, 1.0, 2.0])
    expected = torch.tensor([8.0, 5.0, 4.25])
    torch.testing.assert_close(KarrasWeight()(VarianceExploding(), t), expected)


def test_flow_weight_is_finite_at_pure_noise() -> None:
    t = torch.ones(1)
    found = [w(RectifiedFlow(), t).item() for w in (velocity_weight, v_weight)]
    assert found == [1.0, 1.0]
    assert snr_weight(RectifiedFlow(), t).item() == 0


@pytest.mark.parametrize(
    "weight", [snr_weight, velocity_weight, v_weight, KarrasWeight()]
)
@pytest.mark.parametrize(
    ("process", "outside"),
    [(s.process, t) for s, t in zip(SCHEDULES.values(), (-1.0, 0.5, 1.5), strict=True)],
    ids=SCHEDULES,
)
def test_a_time_outside_gives_nan(
    weight: TimeWeight, process: NoiseProcess, outside: float
) -> None:
    values = weight(process, torch.tensor([outside, 1.0]))
    assert values.isnan().tolist() == [True, False]
    assert values.dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [0, -1])
def test_karras_weight_needs_a_spread(sigma_data: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_data: got .*expected > 0"):
        KarrasWeight(sigma_data)
