from typing import Any

import pytest
import torch
from helpers_sampling import Recorder
from helpers_script import as_in_a_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmdkit import (
    BackwardSimulator,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    InputPolicy,
    NoisedData,
    PerSampleSimulator,
    RectifiedFlow,
    ScoreEstimator,
    VarianceExploding,
    few_step_flow_times,
    few_step_times,
    karras_sigmas,
)

VP = DiscreteVariancePreserving.scaled_linear()
TIMES = {
    "vp": (VP, few_step_times(4)),
    "ve": (VarianceExploding(), karras_sigmas(4)),
    "flow": (RectifiedFlow(), few_step_flow_times(4)),
}
cases = pytest.mark.parametrize(("process", "times"), TIMES.values(), ids=TIMES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


@cases
@pytest.mark.parametrize("rung", range(4))
def test_the_student_is_called_as_often_as_the_rung_says(process, times, rung) -> None:
    student, noise = Recorder(process), draw(3, 2, 4, 4)
    x_t, t, reached = BackwardSimulator(times)(student, noise, rung=rung)
    assert student.times == pytest.approx(times[:rung])
    assert reached == rung
    assert x_t.shape == noise.shape
    assert t.dtype == torch.float32
    assert t.tolist() == pytest.approx([times[rung]] * 3)
    assert torch.isfinite(x_t).all()


def test_a_simulated_input_carries_no_graph_and_none_is_built() -> None:
    class Student(nn.Module):
        process = VP

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.grad_modes = nn.Parameter(torch.ones(())), []

        def forward(self, x_t, t, cond=None):
            self.grad_modes.append(torch.is_grad_enabled())
            return self.scale * x_t

    student = Student()
    noise = draw(2, 3).requires_grad_()
    for rung in range(4):
        x_t, t, _ = BackwardSimulator(few_step_times(4))(student, noise, rung=rung)
        assert not (x_t.requires_grad and rung > 0)
        assert x_t.grad_fn is None
        assert not t.requires_grad
    per_sample = PerSampleSimulator(few_step_times(4))(student, noise)
    assert per_sample.x_t.grad_fn is None
    assert not BackwardSimulator((999.0,)).sample(student, noise).requires_grad
    assert not any(student.grad_modes)
    assert torch.is_grad_enabled()


def test_real_data_change_nothing_in_a_simulated_input() -> None:
    noise = draw(2, 3)
    for policy in (BackwardSimulator(TIMES["vp"][1]), PerSampleSimulator((999, 499))):
        one, other = (
            policy(
                Recorder(VP),
                noise,
                rung=1,
                generator=seeded(1),
                data=data,
            ).x_t
            for data in (None, torch.full((2, 3), 1e3))
        )
        assert torch.equal(one, other)


@cases
def test_training_inputs_are_those_that_sampling_meets(process, times) -> None:
    draws = [draw(3, 2, seed=i) for i in range(4)]
    sampled = Recorder(process)
    samples = BackwardSimulator(times).sample(sampled, draws[0], draws=draws[1:])
    assert torch.equal(samples, torch.tanh(sampled.inputs[-1][0]))
    for rung in range(4):
        given = BackwardSimulator(times)(
            Recorder(process), draws[rung], rung=rung, draws=draws[:rung]
        )
        assert torch.equal(given.x_t, sampled.inputs[rung][0])
        assert torch.equal(given.t, sampled.inputs[rung][1])


@cases
def test_sampling_replays_from_its_generator(process, times) -> None:
    first, second, other = (Recorder(process) for _ in range(3))
    simulator, noise = BackwardSimulator(times), draw(3, 2)
    simulator.sample(first, noise, generator=seeded(7))
    simulator.sample(second, noise, generator=seeded(7))
    simulator.sample(other, noise, generator=seeded(8))
    assert first.times == pytest.approx(times)
    for a, b in zip(first.inputs, second.inputs, strict=True):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(first.inputs[1][0], other.inputs[1][0])


def test_the_generator_alone_decides_the_simulated_trajectory() -> None:
    # The first noise of the generator starts the loop, the next ones renoise.
    stream = seeded(5)
    own = [torch.randn(2, 3, generator=stream) for _ in range(3)]
    by_generator, by_draws = Recorder(VP), Recorder(VP)
    simulator, noise = BackwardSimulator(few_step_times(4)), draw(2, 3, seed=9)
    a = simulator(by_generator, noise, rung=3, generator=seeded(5))
    b = simulator(by_draws, noise, rung=3, draws=own)
    assert torch.equal(a.x_t, b.x_t)
    for one, two in zip(by_generator.inputs, by_draws.inputs, strict=True):
        assert torch.equal(one[0], two[0])


def test_the_first_input_is_pure_noise() -> None:
    noise = draw(2, 3)
    vp = BackwardSimulator(few_step_times(4))(Recorder(VP), noise, rung=0)
    assert torch.equal(vp.x_t, noise)
    one_step = BackwardSimulator((399.0,))(Recorder(VP), noise)
    assert torch.equal(one_step.x_t, noise)
    assert one_step.rung == 0
    ve = BackwardSimulator((80.0,))(Recorder(VarianceExploding()), noise)
    assert torch.equal(ve.x_t, 80 * noise)
    flow = BackwardSimulator((1.0, 0.5))(Recorder(RectifiedFlow()), noise, rung=0)
    assert torch.equal(flow.x_t, noise)


def test_every_noise_of_a_trajectory_is_fresh_and_apart_from_the_outer_one() -> None:
    # A student that answers zero leaves sigma * noise at every rung.
    student = Recorder(VP, answer=lambda x_t, t: torch.zeros_like(x_t))
    noise = draw(100, 1000, seed=3)
    x_t, _, _ = BackwardSimulator(few_step_times(4))(
        student, noise, rung=3, generator=seeded(4)
    )
    # The cumulative products of Stable Diffusion at 749, 499, 249.
    sigmas = [1.0] + [(1 - a) ** 0.5 for a in (0.0566, 0.2777, 0.6754)]
    noises = [x for x, _ in student.inputs] + [x_t]
    units = torch.stack(
        [x.flatten() / s for x, s in zip(noises, sigmas, strict=True)]
        + [noise.flatten()]
    )
    torch.testing.assert_close(units[3], noise.flatten(), rtol=1e-3, atol=1e-3)
    correlation = torch.corrcoef(units[[0, 1, 2, 4]])
    # 1e5 independent pairs correlate by 1 / sqrt(1e5) = 0.003.
    assert (correlation - torch.eye(4)).abs().max() < 0.016
    assert (units.std(dim=1) - 1).abs().max() < 0.02


def test_renoising_follows_the_process_with_numbers_of_the_paper() -> None:
    # x_i+1 = sqrt(abar) x0 + sqrt(1 - abar) eps (DMD2, section 4.4), abar[749] = .0566.
    student = Recorder(VP, answer=lambda x_t, t: torch.full_like(x_t, 2.0))
    x_t, _, _ = BackwardSimulator((999, 749))(student, torch.ones(1, 1), rung=1)
    expected = 0.0566**0.5 * 2 + (1 - 0.0566) ** 0.5
    assert x_t.item() == pytest.approx(expected, abs=1e-3)


def test_the_rung_is_uniform_and_the_same_for_equal_generators() -> None:
    simulator = BackwardSimulator(few_step_times(4))
    one, other = seeded(0), seeded(0)
    rungs = [simulator.draw_rung(one) for _ in range(2000)]
    assert rungs == [simulator.draw_rung(other) for _ in range(2000)]
    counts = torch.bincount(torch.tensor(rungs), minlength=4)
    # Binomial(2000, 1/4): 500 +- 19.
    assert (counts - 500).abs().max() < 90
    reached = {
        simulator(Recorder(VP), draw(1, 2), rung_generator=one).rung for _ in range(50)
    }
    assert reached == {0, 1, 2, 3}


def test_a_one_step_student_consumes_no_randomness() -> None:
    generator, shared = seeded(0), seeded(1)
    before = generator.get_state(), shared.get_state()
    BackwardSimulator((999.0,))(
        Recorder(VP), draw(1, 2), rung_generator=shared, generator=generator
    )
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(shared.get_state(), before[1])


@cases
def test_one_rung_for_all_samples_is_backward_simulation(process, times) -> None:
    noise = draw(3, 2, 4, 4)
    for rung in range(4):
        student = Recorder(process)
        per_sample = PerSampleSimulator(times)(
            student, noise, rung=rung, generator=seeded(2)
        )
        shared = BackwardSimulator(times)(
            Recorder(process), noise, rung=rung, generator=seeded(2)
        )
        assert torch.equal(per_sample.x_t, shared.x_t)
        assert torch.equal(per_sample.t, shared.t)
        assert student.times == pytest.approx(times[:-1])


@cases
@settings(max_examples=10, deadline=None)
@given(rungs=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0))
def test_each_sample_has_the_input_of_its_own_rung(process, times, rungs, seed) -> None:
    rung = torch.tensor(rungs)
    noise = draw(len(rungs), 4, seed=seed % 2**32)
    x_t, t, reached = PerSampleSimulator(times)(
        Recorder(process), noise, rung=rung, generator=seeded(seed % 2**32)
    )
    assert isinstance(reached, torch.Tensor)
    assert torch.equal(reached, rung)
    for i, own in enumerate(rungs):
        alone = BackwardSimulator(times)(
            Recorder(process), noise, rung=own, generator=seeded(seed % 2**32)
        )
        assert torch.equal(x_t[i], alone.x_t[i])
        assert t[i] == alone.t[i]


def test_rungs_a_sample_are_drawn_uniformly_from_their_generator() -> None:
    noise = torch.zeros(4000, 1)
    one, again = (
        PerSampleSimulator(few_step_times(4))(
            Recorder(VP), noise, rung_generator=seeded(0)
        )
        for _ in range(2)
    )
    assert isinstance(one.rung, torch.Tensor)
    assert isinstance(again.rung, torch.Tensor)
    assert torch.equal(one.rung, again.rung)
    # Binomial(4000, 1/4): 1000 +- 27.
    assert (torch.bincount(one.rung, minlength=4) - 1000).abs().max() < 130


@cases
def test_noised_data_is_the_forward_process_on_real_data(process, times) -> None:
    student, noise, data = Recorder(process), draw(3, 2), draw(3, 2, seed=1)
    for rung in range(4):
        x_t, t, reached = NoisedData(times)(student, noise, rung=rung, data=data)
        assert reached == rung
        t_all = torch.full((3,), times[rung], dtype=torch.float32)
        assert torch.equal(t, t_all)
        first = process.prior(noise, t_all)
        noisy = process.add_noise(data, noise, t_all)
        assert torch.equal(x_t, first if rung == 0 else noisy)
    assert not student.inputs
    drawn = {
        NoisedData(times)(student, noise, rung_generator=g, data=data).rung
        for g in [seeded(0)]
        for _ in range(40)
    }
    assert drawn == {0, 1, 2, 3}


def test_the_three_policies_can_be_exchanged() -> None:
    times = few_step_times(2)
    policies: list[InputPolicy] = [
        BackwardSimulator(times),
        PerSampleSimulator(times),
        NoisedData(times),
    ]
    for policy in policies:
        x_t, t, _ = policy(
            Recorder(VP),
            draw(2, 3),
            None,
            rung_generator=seeded(0),
            generator=seeded(1),
            data=draw(2, 3),
        )
        assert x_t.shape == (2, 3)
        assert t.shape == (2,)


class Epsilon(nn.Module):
    """Some function of x and t that stands for a noise-predicting network."""

    def forward(self, x, t, cond=None):
        return torch.sin(x) * (1 + t.reshape(-1, 1, 1, 1) / 1000) + 0.1


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_equals_the_lcm_scheduler_of_diffusers(steps: int) -> None:
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    scheduler: Any = LCMScheduler.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "clip_sample": False,
            "set_alpha_to_one": True,
        },
        original_inference_steps=4,
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249][:steps]
    network, noise = Epsilon(), draw(2, 3, 4, 4)
    x, denoised, generator = noise, noise, seeded(11)
    for t in scheduler.timesteps:
        epsilon = network(x, t.float().expand(2))
        x, denoised = scheduler.step(epsilon, t, x, generator, return_dict=False)
    student = ScoreEstimator(network, VP, EpsilonPrediction())
    ours = BackwardSimulator(few_step_times(4)[:steps]).sample(
        student, noise, generator=seeded(11)
    )
    torch.testing.assert_close(ours, denoised, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() > 1


@pytest.mark.parametrize("kind", [BackwardSimulator, PerSampleSimulator, NoisedData])
def test_times_must_be_a_falling_tuple(kind) -> None:
    for times in ((), [999, 749], 999):
        with as_in_a_script(), pytest.raises(TypeError, match=r"times: got .* a tuple"):
            kind(times)
    with pytest.raises(ValueError, match="falling"):
        kind((249.0, 999.0))
    with pytest.raises(ValueError, match="falling"):
        kind((249.0, 249.0))


def test_what_is_wrong_with_a_call_is_said() -> None:
    simulator, student = BackwardSimulator(few_step_times(4)), Recorder(VP)
    noise = draw(2, 3)
    with pytest.raises(ValueError, match=r"rung: got 4, expected 0 \.\.\. 3"):
        simulator(student, noise, rung=4)
    with pytest.raises(ValueError, match="rung: got -1"):
        simulator(student, noise, rung=-1)
    with pytest.raises(ValueError, match="seeded alike on every rank"):
        simulator(student, noise)
    with pytest.raises(ValueError, match="not both"):
        simulator(student, noise, rung=1, rung_generator=seeded(0))
    with pytest.raises(ValueError, match="draws: got 1 tensors, expected 2"):
        simulator(student, noise, rung=2, draws=[noise])
    with pytest.raises(ValueError, match=r"draws\[0\]: got shape \[3\]"):
        simulator(student, noise, rung=1, draws=[noise[0]])
    with pytest.raises(ValueError, match="draws: got 4 tensors, expected 3"):
        simulator.sample(student, noise, draws=[noise] * 4)
    with pytest.raises(ValueError, match="data: this policy noises real samples"):
        NoisedData(few_step_times(4))(student, noise, rung=1)
    with pytest.raises(ValueError, match="whole index"):
        BackwardSimulator((999.5,))(student, noise)
    with pytest.raises(ValueError, match="whole index"):
        NoisedData((1000,))(student, noise, data=noise)
    with as_in_a_script():
        with pytest.raises(TypeError, match=r"`noise` is int64\[2, 3\], expected"):
            simulator(student, noise.long(), rung=1)
        with pytest.raises(TypeError, match="`student` is builtin_function_or_method"):
            simulator(torch.tanh, noise, rung=1)  # pyright: ignore[reportArgumentType]


def test_a_rung_out_of_range_never_counts_from_the_end() -> None:
    simulator, noise = PerSampleSimulator(few_step_times(4)), draw(2, 3)
    for rung in (-1, 4):
        with pytest.raises(ValueError, match=f"rung: got {rung}, expected 0 ... 3"):
            simulator(Recorder(VP), noise, rung=rung)
        with pytest.raises(ValueError, match=f"rung: got {rung}, expected 0 ... 3"):
            simulator(Recorder(VP), noise, rung=torch.tensor([2, rung]))
    with pytest.raises(ValueError, match=r"rung: got int64\[3\], expected"):
        simulator(Recorder(VP), noise, rung=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"rung: got float32\[2\], expected"):
        simulator(Recorder(VP), noise, rung=torch.tensor([0.0, 1.0]))
