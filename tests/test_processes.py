"""Noise processes: their numbers, their domains, and that they are values."""

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from helpers_diffusion import SCHEDULES, randn, spread
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmdkit import (
    DiscreteVariancePreserving,
    KarrasIndexTime,
    NoiseProcess,
    RectifiedFlow,
    VarianceExploding,
)

# The last axis, and others, are as long as the batch: a wrong broadcast would pass.
SHAPES = [(3,), (3, 3), (4, 2, 4, 4), (3, 2, 4, 5, 3)]


def small_table() -> DiscreteVariancePreserving:
    return DiscreteVariancePreserving((0.9, 0.5, 0.1))


def scheduler(kind: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        **options,
    )


def test_values_of_stable_diffusion() -> None:
    process = DiscreteVariancePreserving.scaled_linear()
    kept = {20: 0.9813, 249: 0.6754, 399: 0.4261, 499: 0.2777, 749: 0.0566}
    kept |= {980: 0.00584, 999: 0.00466}
    t = torch.tensor([float(i) for i in kept])
    expected = torch.tensor(list(kept.values()))
    torch.testing.assert_close(process.alpha(t) ** 2, expected, atol=5e-5, rtol=0)
    end = process.alpha(torch.tensor([980.0, 999.0])) ** 2
    torch.testing.assert_close(end, expected[-2:], atol=5e-6, rtol=0)
    amplification = 1 / process.alpha(torch.tensor([999.0, 399.0]))
    assert [round(a, 2) for a in amplification.tolist()] == [14.65, 1.53]
    assert process.steps == 1000


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_equals_diffusers_schedulers(kind: str) -> None:
    theirs = scheduler(kind)
    index = torch.arange(1000)
    x0, noise = randn(1000, 1000, seed=1), randn(1000, 1000, seed=2)
    expected = theirs.add_noise(x0, noise, index)
    for process in (
        DiscreteVariancePreserving.scaled_linear(),
        DiscreteVariancePreserving.from_alphas_cumprod(theirs.alphas_cumprod),
        DiscreteVariancePreserving.from_betas(theirs.betas),
    ):
        alpha, sigma = process.alpha(index.float()), process.sigma(index.float())
        torch.testing.assert_close(
            alpha, theirs.alphas_cumprod.sqrt(), atol=1e-6, rtol=5e-6
        )
        torch.testing.assert_close(
            sigma, (1 - theirs.alphas_cumprod).sqrt(), atol=2e-6, rtol=0
        )
        ours = process.add_noise(x0, noise, index.float())
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_zero_terminal_snr_of_diffusers() -> None:
    theirs = scheduler("DDIMScheduler", rescale_betas_zero_snr=True)
    process = DiscreteVariancePreserving.from_alphas_cumprod(theirs.alphas_cumprod)
    assert process.reaches_pure_noise
    assert not DiscreteVariancePreserving.scaled_linear().reaches_pure_noise
    last = torch.tensor([999.0])
    assert (process.alpha(last).item(), process.sigma(last).item()) == (0.0, 1.0)


def test_rectified_flow_equals_diffusers_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = torch.as_tensor(theirs.timesteps)[[0, 100, 500, 999]]
    x0, noise = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    expected = theirs.scale_noise(x0, times, noise)  # pyright: ignore[reportArgumentType]
    ours = RectifiedFlow().add_noise(x0, noise, times / 1000)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_meets_each_sample_at_its_own_time(
    name: str, shape: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    t = spread(schedule.times, shape[0])
    x0, noise = randn(*shape), randn(*shape, seed=1)
    x_t = schedule.process.add_noise(x0, noise, t)
    assert x_t.shape == shape
    for i, (alpha, sigma) in enumerate(map(schedule.levels, t.tolist())):
        expected = alpha * x0[i].double() + sigma * noise[i].double()
        torch.testing.assert_close(x_t[i].double(), expected, atol=1e-5, rtol=1e-5)


def test_prior_is_scaled_for_ve_and_unit_noise_for_vp_and_flow() -> None:
    noise = randn(2, 3, 2)
    ve = VarianceExploding().prior(noise, torch.tensor([80.0, 2.0]))
    torch.testing.assert_close(ve[0], 80 * noise[0])
    torch.testing.assert_close(ve[1], 2 * noise[1])
    vp = SCHEDULES["vp"].process
    assert torch.equal(vp.prior(noise, torch.tensor([999.0, 399.0])), noise)
    flow = RectifiedFlow().prior(noise, torch.tensor([1.0, 0.4]))
    assert torch.equal(flow, noise)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    index=st.integers(0, 3),
)
def test_adding_noise_is_linear(name: str, a: float, b: float, index: int) -> None:
    process, t = SCHEDULES[name].process, SCHEDULES[name].times[index]
    times = torch.full((2,), t)
    x, y, e, f = (randn(2, 3, seed=s) for s in range(4))
    together = process.add_noise(a * x + b * y, a * e + b * f, times)
    apart = a * process.add_noise(x, e, times) + b * process.add_noise(y, f, times)
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_noised_in_fp32(
    name: str, dtype: torch.dtype
) -> None:
    process = SCHEDULES[name].process
    t = torch.tensor(SCHEDULES[name].times)
    x0, noise = randn(4, 3).to(dtype), randn(4, 3, seed=1)
    x_t = process.add_noise(x0, noise, t)
    assert torch.equal(x_t, process.add_noise(x0.float(), noise, t))
    double = process.add_noise(x0.double(), noise.double(), t)
    assert (x_t.dtype, double.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("process", "outside"),
    [
        (VarianceExploding(), (-0.1, -80.0, math.inf, -math.inf, math.nan)),
        (small_table(), (-1, 3, 0.5, 1.999, 1e30, math.inf, -math.inf, math.nan)),
        (RectifiedFlow(), (-1e-6, 1.0001, math.inf, -math.inf, math.nan)),
    ],
    ids=["ve", "vp", "flow"],
)
def test_times_outside_are_nan_in_tensors_and_errors_in_python(
    process: NoiseProcess, outside: tuple[float, ...]
) -> None:
    t = torch.tensor([*outside, 1.0])
    for values in (process.alpha(t), process.sigma(t)):
        assert values.dtype == torch.float32
        assert values.isnan().tolist() == [True] * len(outside) + [False]
    for number in outside:
        with pytest.raises(ValueError, match=f"time: got {re.escape(str(number))}, ex"):
            process.check_time(number)


@pytest.mark.parametrize(
    ("process", "inside"),
    [
        (VarianceExploding(), (0, 0.002, 80.0, 1000)),
        (small_table(), (0, 1.0, 2)),
        (RectifiedFlow(), (0, 0.5, 1)),
    ],
    ids=["ve", "vp", "flow"],
)
def test_the_ends_of_the_domain_belong_to_it(
    process: NoiseProcess, inside: tuple[float, ...]
) -> None:
    t = torch.tensor([float(number) for number in inside])
    assert process.alpha(t).isfinite().all()
    assert process.sigma(t).isfinite().all()
    for number in inside:
        process.check_time(number)


def test_processes_are_values() -> None:
    unlike: list[NoiseProcess] = [
        VarianceExploding(),
        RectifiedFlow(),
        small_table(),
        DiscreteVariancePreserving((0.9, 0.5, 0.2)),
        DiscreteVariancePreserving((0.9, 0.5)),
    ]
    assert len({*unlike, *map(copy.copy, unlike)}) == len(unlike)
    for process in unlike:
        process.alpha(torch.zeros(1))  # a copy of the table on a device is no number
        for twin in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
            assert twin == process
            assert hash(twin) == hash(process)
            one = torch.ones(1)
            assert torch.equal(twin.sigma(one), process.sigma(one))
        assert process != "something else"


def test_tables_from_every_source_are_equal() -> None:
    betas = [0.1, 0.5, 1.0]
    expected = DiscreteVariancePreserving((0.9, 0.45, 0.0))
    for source in (betas, tuple(betas), torch.tensor(betas, dtype=torch.float64)):
        assert DiscreteVariancePreserving.from_betas(source) == expected
    table = [0.9, 0.45, 0]
    for source in (table, tuple(table), torch.tensor(table, dtype=torch.float64)):
        made = DiscreteVariancePreserving.from_alphas_cumprod(source)
        assert made == expected
        assert all(type(value) is float for value in made.alphas_cumprod)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((0.5, 0.9), "must fall"),
        ((0.9, 0.9), "must fall"),
        ((1.1, 0.9), "in .0, 1."),
        ((0.9, -0.1), "in .0, 1."),
        ((0.9, math.nan), "in .0, 1."),
    ],
)
def test_a_wrong_table_is_refused(table: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^alphas_cumprod: .*{message}"):
        DiscreteVariancePreserving(table)


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^alphas_cumprod: .*expected a tuple"):
        DiscreteVariancePreserving(())


def draw_sigma(times: KarrasIndexTime) -> float:
    return times(1, generator=torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_fake_tensors_give_fake_tensors_and_leave_nothing_behind(warm: bool) -> None:
    table, karras = small_table(), KarrasIndexTime(0, 1, steps=1)
    if warm:
        table.alpha(torch.ones(1))
        draw_sigma(karras)
    with FakeTensorMode():
        t = torch.ones(5)
        for process in (table, VarianceExploding(), RectifiedFlow()):
            x_t = process.add_noise(torch.ones(5, 2), torch.ones(5, 2), t)
            assert isinstance(x_t, FakeTensor)
            assert x_t.shape == (5, 2)
        assert isinstance(karras(3), FakeTensor)
    assert table.alpha(torch.ones(1)).item() == pytest.approx(math.sqrt(0.5))
    assert draw_sigma(karras) == pytest.approx(80.0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functorch_transforms_leave_nothing_behind(transform: str) -> None:
    table = small_table()
    t, x = torch.ones(2), randn(2, 3)
    alpha = math.sqrt(0.5)
    if transform == "grad":
        slope = torch.func.grad(lambda y: table.add_noise(y, x, t).sum())(x)
        torch.testing.assert_close(slope, torch.full((2, 3), alpha))
    elif transform == "vmap":
        values = torch.func.vmap(table.alpha)(torch.ones(4, 2))
        torch.testing.assert_close(values, torch.full((4, 2), alpha))
    else:
        slope = torch.func.jvp(lambda y: table.add_noise(y, x, t), (x,), (x,))[1]
        torch.testing.assert_close(slope, alpha * x)
    assert is_plain(table.alpha(t))
    for kept in vars(table).values():
        assert all(is_plain(copy) for copy in getattr(kept, "_copies", {}).values())


def is_plain(x: torch.Tensor) -> bool:
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def test_meta_tensors_give_meta_tensors() -> None:
    t = torch.ones(4, device="meta")
    x = torch.ones(4, 3, device="meta")
    for process in (small_table(), VarianceExploding(), RectifiedFlow()):
        for result in (process.alpha(t), process.sigma(t), process.prior(x, t)):
            assert result.is_meta
        assert process.add_noise(x, x, t).shape == (4, 3)
    assert KarrasIndexTime()(4, device="meta").is_meta


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_table_first_used_without_gradients_serves_training(mode: Any) -> None:
    table, t = small_table(), torch.ones(2)
    with mode():
        table.alpha(t)
        table.sigma(t)
    x = randn(2, 3).requires_grad_()
    loss = table.add_noise(x, x.detach(), t).square().sum()
    loss.backward()
    assert x.grad is not None
    expected = 2 * math.sqrt(0.5) * table.add_noise(x.detach(), x.detach(), t)
    torch.testing.assert_close(x.grad, expected)
    for kept in vars(table).values():
        for tensor in getattr(kept, "_copies", {}).values():
            assert not tensor.is_inference()


def test_a_table_is_copied_to_a_device_once() -> None:
    table, t = small_table(), torch.ones(2)
    seen = []
    for _ in range(3):
        table.alpha(t)
        seen.append(vars(table)["_alphas"].beside(t).data_ptr())
    assert len(set(seen)) == 1
