"""Schedulers of diffusers and ours: the same tables, noise, x0 and few-step samples."""

import math
from typing import Any

import pytest
import torch
from diffusers import schedulers
from helpers_diffusers import normal
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit import (
    BackwardSimulator,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    RectifiedFlow,
    SamplePrediction,
    ScoreEstimator,
    VelocityPrediction,
    VPrediction,
    few_step_times,
)
from dmdkit.adapters.diffusers import (
    parameterization_from_scheduler,
    process_from_scheduler,
)

# NumPy 2 asks of torch's tensors what Euler's scheduler does not expect.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

d: Any = schedulers

# SDXL's own; its noise schedule is that of SD1.5 too.
SDXL: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "scaled_linear": SDXL,
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
WITH_BETAS: dict[str, Any] = {
    "DDPM": d.DDPMScheduler,
    "DDIM": d.DDIMScheduler,
    "PNDM": d.PNDMScheduler,
    "Euler": d.EulerDiscreteScheduler,
    "Euler ancestral": d.EulerAncestralDiscreteScheduler,
    "LCM": d.LCMScheduler,
    "DPM-Solver": d.DPMSolverMultistepScheduler,
    "UniPC": d.UniPCMultistepScheduler,
}
with_betas = pytest.mark.parametrize("kind", WITH_BETAS)


@with_betas
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_the_schedulers_own(kind: str, schedule: str) -> None:
    scheduler = WITH_BETAS[kind](**SCHEDULES[schedule])
    process = process_from_scheduler(scheduler)
    assert isinstance(process, DiscreteVariancePreserving)
    table = torch.tensor(process.alphas_cumprod)
    torch.testing.assert_close(table, scheduler.alphas_cumprod, rtol=2e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_processes_of_one_configuration_are_equal(schedule: str) -> None:
    found = {
        process_from_scheduler(kind(**SCHEDULES[schedule]))
        for kind in WITH_BETAS.values()
    }
    assert len(found) == 1
    standard = DiscreteVariancePreserving.scaled_linear()
    assert (standard in found) == (schedule == "scaled_linear")


@pytest.mark.parametrize("kind", sorted(set(WITH_BETAS) - {"PNDM"}))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_ends_at_zero(kind: str, schedule: str) -> None:
    settings = SCHEDULES[schedule]
    scheduler = WITH_BETAS[kind](**settings, rescale_betas_zero_snr=True)
    process = process_from_scheduler(scheduler)
    assert isinstance(process, DiscreteVariancePreserving)
    assert process.alphas_cumprod[-1] == 0
    assert process.reaches_pure_noise
    assert process != process_from_scheduler(WITH_BETAS[kind](**settings))
    table, theirs = torch.tensor(process.alphas_cumprod), scheduler.alphas_cumprod
    torch.testing.assert_close(table[:-1], theirs[:-1], rtol=1e-4, atol=0)
    # The first is kept (Lin et al. 2023, section 3.1).
    assert process.alphas_cumprod[0] == pytest.approx(1 - float(scheduler.betas[0]))


def test_betas_that_were_trained_are_taken_as_they_are() -> None:
    betas = [0.1, 0.2, 0.4]
    scheduler = d.DDIMScheduler(num_train_timesteps=3, trained_betas=betas)
    process = process_from_scheduler(scheduler)
    assert isinstance(process, DiscreteVariancePreserving)
    assert process.alphas_cumprod == pytest.approx([0.9, 0.72, 0.432])


def test_epsilon_where_nothing_is_left_is_refused() -> None:
    scheduler = d.DDIMScheduler(**SDXL, rescale_betas_zero_snr=True)
    process = process_from_scheduler(scheduler)
    with pytest.raises(ValueError, match="EpsilonPrediction divides by alpha"):
        ScoreEstimator(nn.Identity(), process, EpsilonPrediction())


@pytest.mark.parametrize(
    "scheduler",
    [
        d.FlowMatchEulerDiscreteScheduler(),
        d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        d.FlowMatchHeunDiscreteScheduler(),
        d.FlowMatchLCMScheduler(),
        d.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0
        ),
    ],
    ids=lambda s: type(s).__name__,
)
def test_flow_matching_is_the_straight_line_whatever_its_shift(scheduler) -> None:
    assert process_from_scheduler(scheduler) == RectifiedFlow()
    for scale in (1, 1000):
        found = parameterization_from_scheduler(scheduler, time_scale=scale)
        assert found == VelocityPrediction(time_scale=scale)
    with pytest.raises(ValueError, match="time_scale: got None, which a flow"):
        parameterization_from_scheduler(scheduler)


def test_flow_noise_is_that_of_diffusers() -> None:
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, noise = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    timesteps = scheduler.timesteps[[0, 300, 900]]
    theirs = scheduler.scale_noise(x, timesteps, noise)
    ours = process_from_scheduler(scheduler).add_noise(x, noise, timesteps / 1000)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epsilon", EpsilonPrediction()),
        ("v_prediction", VPrediction()),
        ("sample", SamplePrediction()),
    ],
)
def test_predictions_are_told_by_name(name: str, expected: Any) -> None:
    scheduler = d.DDIMScheduler(prediction_type=name)
    assert parameterization_from_scheduler(scheduler) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_is_that_of_ddim(schedule: str) -> None:
    scheduler = d.DDIMScheduler(**SCHEDULES[schedule])
    x, noise = normal(4, 4, 2, 2), normal(4, 4, 2, 2, seed=1)
    t = torch.tensor([0, 20, 499, 999])
    theirs = scheduler.add_noise(x, noise, t)
    ours = process_from_scheduler(scheduler).add_noise(x, noise, t.float())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Fixed(nn.Module):
    """Predicts a smooth function of its input and time, with a weight or two."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        phase = c_noise.view(-1, 1, 1, 1) / 1000
        return (0.7 * x + phase).sin() + 0.1 * x.roll(1, -1)


def student(scheduler: Any) -> ScoreEstimator:
    process = process_from_scheduler(scheduler)
    return ScoreEstimator(Fixed(), process, parameterization_from_scheduler(scheduler))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_x0_is_what_ddim_reads_from_the_same_output(prediction: str) -> None:
    scheduler = d.DDIMScheduler(
        **SDXL, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(1000)
    x_t = normal(1, 4, 8, 8)
    for index in (0, 20, 399, 749, 999):
        t = torch.tensor([float(index)])
        output = Fixed()(x_t, t, None)
        theirs = scheduler.step(output, index, x_t).pred_original_sample
        ours = student(scheduler)(x_t, t, None)
        scale = float(theirs.abs().max())
        assert (ours - theirs).abs().max() < 1e-5 * max(scale, 1), index


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_few_step_sampling_is_that_of_the_lcm_scheduler(steps, prediction) -> None:
    teacher = d.DDIMScheduler(**SDXL, prediction_type=prediction)
    lcm = d.LCMScheduler.from_config(teacher.config, original_inference_steps=4)
    lcm.set_timesteps(steps)
    times = few_step_times(steps)
    assert lcm.timesteps.tolist() == list(times)

    noise = normal(2, 4, 8, 8)
    x, generator = noise, torch.Generator().manual_seed(3)
    for t in lcm.timesteps:
        output = Fixed()(x, t.float().expand(2), None)
        x = lcm.step(output, t, x, generator=generator, return_dict=False)[0]

    ours = BackwardSimulator(times).sample(
        student(lcm), noise, generator=torch.Generator().manual_seed(3)
    )
    assert (ours - x).abs().max() <= 1e-4
    assert not math.isclose(float(ours.std()), float(noise.std()), rel_tol=1e-3)


class Odd(d.DDIMScheduler):
    """Shifts its table behind its configuration's back, as CogVideoX does."""

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod = self.alphas_cumprod / (3 - 2 * self.alphas_cumprod)


def test_what_is_not_understood_is_refused() -> None:
    refused: list[tuple[Any, type[Exception], str]] = [
        (nn.Identity(), TypeError, "scheduler: got Identity, expected a diffusers sch"),
        (d.EDMEulerScheduler(), TypeError, "EDMEulerScheduler has no table of betas"),
        (
            d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            ValueError,
            "invert_sigmas runs time",
        ),
        (
            d.EulerDiscreteScheduler(timestep_type="continuous"),
            ValueError,
            "timestep_type 'continuous' is not supported",
        ),
        (
            d.DDPMScheduler(beta_schedule="sigmoid"),
            ValueError,
            "beta_schedule 'sigmoid' is not supported",
        ),
        (Odd(), ValueError, "the alphas_cumprod of Odd are not what its betas give"),
    ]
    for scheduler, error, message in refused:
        with as_in_a_script(), pytest.raises(error, match=message) as caught:
            process_from_scheduler(scheduler)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has prediction_type 'learned', expected eps"):
        parameterization_from_scheduler(d.DDIMScheduler(prediction_type="learned"))
