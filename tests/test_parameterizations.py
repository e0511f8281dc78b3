"""Every prediction is one affine map, and all maps lead to one clean sample."""

import math

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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmdkit import (
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasPreconditioning,
    NoiseProcess,
    Parameterization,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
    VPrediction,
)

PAIRS = [(t, s) for t in PARAMETERIZATIONS for s in SCHEDULES if defined(t, s)]


def clipped(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Some denoiser that is linear in nothing."""
    return (alpha * x_t / (alpha**2 + sigma**2)).tanh() + 0.3 * sigma / (alpha + sigma)


@pytest.mark.parametrize(("target", "name"), PAIRS)
def test_one_denoiser_in_every_parameterization_gives_one_x0(
    target: str, name: str
) -> None:
    schedule = SCHEDULES[name]
    t = spread(schedule.times, 4)
    x_t = schedule.process.add_noise(randn(4, 3, 4), randn(4, 3, 4, seed=1), t)
    denoiser = ScoreEstimator(
        Oracle(target, schedule, clipped), schedule.process, PARAMETERIZATIONS[target]
    )
    expected = clipped(x_t.double(), *schedule.at(t, x_t))
    torch.testing.assert_close(
        denoiser(x_t, t, None), expected.float(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("target", [t for t in PARAMETERIZATIONS if t not in ("edm",)])
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    share=st.floats(0.05, 1),
    x0=st.floats(-2, 2),
)
def test_the_right_prediction_of_a_known_sample_gives_it_back(
    target: str, name: str, share: float, x0: float
) -> None:
    schedule = SCHEDULES[name]
    if not defined(target, name):
        share = min(share, 0.95)
    t = {"ve": 5 * share, "vp": float(round(999 * share)), "flow": share}[name]
    t = torch.tensor([t]).item()
    alpha, sigma = schedule.levels(t)
    noise = 0.7
    prediction = {
        "eps": noise,
        "v": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "x0": x0,
    }[target]
    c = PARAMETERIZATIONS[target].coefficients(schedule.process, torch.tensor([t]))
    x_t = alpha * x0 + sigma * noise
    found = c.c_skip.item() * x_t + c.c_out.item() * prediction
    assert found == pytest.approx(x0, abs=5e-5)
    assert c.c_in.item() == 1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_edm_keeps_input_and_target_at_unit_variance(schedule: Schedule) -> None:
    # Karras et al. 2022, section 5: what defines the coefficients, for data of std d.
    d = 0.7
    t = torch.tensor(schedule.times)
    c = KarrasPreconditioning(sigma_data=d).coefficients(schedule.process, t)
    alpha, sigma = (
        torch.tensor([schedule.levels(v)[i] for v in schedule.times]) for i in (0, 1)
    )
    one = torch.ones(len(t))
    variance_in = c.c_in**2 * (alpha**2 * d**2 + sigma**2)
    torch.testing.assert_close(variance_in, one, atol=1e-5, rtol=0)
    # The target (x0 - c_skip x_t) / c_out, with x0 and noise independent.
    variance_target = (
        (1 - c.c_skip * alpha) ** 2 * d**2 + (c.c_skip * sigma) ** 2
    ) / c.c_out**2
    torch.testing.assert_close(variance_target, one, atol=1e-4, rtol=0)
    # c_skip makes c_out least: the target's covariance with x_t is zero.
    covariance = (1 - c.c_skip * alpha) * alpha * d**2 - c.c_skip * sigma**2
    torch.testing.assert_close(covariance, 0 * one, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        (4 * c.c_noise).exp(), sigma / alpha, atol=1e-6, rtol=1e-5
    )


def test_edm_values_at_official_constants() -> None:
    # By hand from Karras et al. 2022, Table 1, at sigma = sigma_data = 0.5.
    c = KarrasPreconditioning().coefficients(
        VarianceExploding(), torch.tensor([0.5, 80.0])
    )
    assert c.c_in[0].item() == pytest.approx(math.sqrt(2))
    assert c.c_skip[0].item() == pytest.approx(0.5)
    assert c.c_out[0].item() == pytest.approx(0.5 / math.sqrt(2))
    assert c.c_noise[0].item() == pytest.approx(-0.17328679)
    assert c.c_noise[1].item() == pytest.approx(1.09550666)


@pytest.mark.parametrize(
    ("parameterization", "fed"),
    [
        (EpsilonPrediction(), 999.0),
        (VPrediction(), 999.0),
        (SamplePrediction(), 999.0),
        (VelocityPrediction(), 999.0),
        (EpsilonPrediction(time_scale=0.5), 499.5),
        (VPrediction(time_scale=0.5), 499.5),
        (SamplePrediction(time_scale=0.5), 499.5),
        (VelocityPrediction(time_scale=0.5), 499.5),
        (KarrasPreconditioning(time_scale=1), 2.682),
    ],
    ids=str,
)
def test_what_the_network_is_fed_as_time(
    parameterization: Parameterization, fed: float
) -> None:
    # ln(sigma / alpha) at index 999 is ln(sqrt(1 / 0.00466 - 1)) = 2.68.
    process = SCHEDULES["vp"].process
    c = parameterization.coefficients(process, torch.tensor([999.0]))
    assert c.c_noise.dtype == torch.float32
    assert c.c_noise.item() == pytest.approx(fed, rel=1e-3)


@pytest.mark.parametrize(
    "process", [RectifiedFlow(), DiscreteVariancePreserving((0.9, 0.5, 0.0))], ids=str
)
@pytest.mark.parametrize("singular", [EpsilonPrediction(), KarrasPreconditioning()])
def test_no_x0_where_nothing_is_left_is_an_error_at_construction(
    process: NoiseProcess, singular: Parameterization
) -> None:
    with pytest.raises(ValueError, match=r"^parameterization: .*divides by alpha.*"):
        ScoreEstimator(torch.nn.Identity(), process, singular)
    with pytest.raises(ValueError, match=type(process).__name__):
        singular.check(process)


@pytest.mark.parametrize(
    "regular", [VPrediction(), VelocityPrediction(), SamplePrediction()]
)
def test_pure_noise_has_an_x0_in_v_velocity_and_sample(
    regular: Parameterization,
) -> None:
    last = DiscreteVariancePreserving((0.9, 0.5, 0.0))
    for process, t in ((RectifiedFlow(), 1.0), (last, 2.0)):
        regular.check(process)
        c = regular.coefficients(process, torch.tensor([t]))
        # x_t is the noise e, so v = -x0, u = e - x0: x0 = -v = e - u.
        expected = {
            VPrediction: (0.0, -1.0),
            VelocityPrediction: (1.0, -1.0),
            SamplePrediction: (0.0, 1.0),
        }[type(regular)]
        assert (c.c_skip.item(), c.c_out.item()) == expected


@pytest.mark.parametrize("sigma_data", [0, -0.5, math.nan])
def test_data_without_spread_are_refused(sigma_data: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_data: got .*expected > 0"):
        KarrasPreconditioning(sigma_data=sigma_data)


def test_parameterizations_are_values() -> None:
    assert len({*PARAMETERIZATIONS.values(), *PARAMETERIZATIONS.values()}) == 5
    assert EpsilonPrediction() == EpsilonPrediction(1)
    assert EpsilonPrediction() != EpsilonPrediction(1000)
    assert EpsilonPrediction() != VPrediction()
