"""The distribution matching loss against closed forms (DMD2, Eqs. 1 and 2)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_losses import (
    PROCESSES,
    FunctionDenoiser,
    GaussianDenoiser,
    generator,
    moment_matched,
    noise_levels,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dmdkit import (
    DistributionMatchingLoss,
    DistributionMatchingOutput,
    FlooredNormalizer,
    UniformTime,
    VarianceExploding,
    distribution_matching_gradient,
    distribution_matching_loss,
    gradient_surrogate,
    mean_absolute_error,
)

REAL, FAKE = (0.5, 0.8), (-0.4, 1.3)
VE = VarianceExploding()


def ones_like_samples(x: Tensor, x0_real: Tensor) -> Tensor:
    return torch.ones(x.shape[0], dtype=x.dtype)


def score(mean: float, std: float, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The score of the noisy marginal of N(mean, std^2), by differentiating it."""
    x_t = x_t.clone().requires_grad_()
    marginal = Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())
    (gradient,) = torch.autograd.grad(marginal.log_prob(x_t).sum(), x_t)
    return gradient


def estimates(
    shape: tuple[int, ...] = (3, 5), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A sample with a graph, its noisy version, times, and two estimates."""
    x = normal(*shape, seed=seed).requires_grad_()
    real, fake, x_t = (normal(*shape, seed=seed + i) for i in (1, 2, 3))
    return x, x_t, torch.ones(shape[0]), real, fake


@pytest.mark.parametrize("name", PROCESSES)
def test_gradient_is_the_weighted_difference_of_gaussian_scores(name: str) -> None:
    process, _, times = PROCESSES[name]
    x = (FAKE[0] + FAKE[1] * normal(len(times), 7)).double().requires_grad_()
    t, noise = torch.tensor(times), normal(len(times), 7, seed=1).double()
    out = DistributionMatchingLoss(UniformTime())(
        x,
        real=GaussianDenoiser(process, *REAL),
        fake=GaussianDenoiser(process, *FAKE),
        t=t,
        noise=noise,
    )
    alpha, sigma = noise_levels(process, t, x)
    x_t = alpha * x.detach() + sigma * noise
    s_real = score(*REAL, x_t, alpha, sigma)
    s_fake = score(*FAKE, x_t, alpha, sigma)
    # Eq. 1 read backwards (Tweedie) gives the teacher's estimate.
    teacher = (x_t + sigma**2 * s_real) / alpha
    spread = (x.detach() - teacher).abs().mean(dim=1, keepdim=True)
    expected = sigma**2 / alpha * (s_fake - s_real) / spread
    torch.testing.assert_close(out.x_t, x_t)
    torch.testing.assert_close(out.gradient, expected)
    out.loss.backward()
    torch.testing.assert_close(x.grad, expected / x.numel())


@pytest.mark.parametrize("name", PROCESSES)
def test_unnormalised_gradient_is_that_of_the_closed_form_kl(name: str) -> None:
    """The average of a quadratic over moment-matched pairs is its expectation."""
    process, _, times = PROCESSES[name]
    z, noise = moment_matched(torch.float64)
    for time in times:
        t = torch.full((4,), time)
        mean, std = (torch.tensor(v).double().requires_grad_() for v in FAKE)
        out = DistributionMatchingLoss(UniformTime(), normalizer=ones_like_samples)(
            mean + std * z,
            real=GaussianDenoiser(process, *REAL),
            fake=GaussianDenoiser(process, *FAKE),
            t=t,
            noise=noise,
        )
        got = torch.autograd.grad(out.loss, (mean, std))
        alpha, sigma = (v[0, 0] for v in noise_levels(process, t, z))
        kl = kl_divergence(
            Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()),
            Normal(alpha * REAL[0], (alpha**2 * REAL[1] ** 2 + sigma**2).sqrt()),
        )
        for ours, exact in zip(got, torch.autograd.grad(kl, (mean, std)), strict=True):
            torch.testing.assert_close(ours * alpha**2 / sigma**2, exact)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_gaussian_student_converges_to_the_teacher(name: str) -> None:
    process, times, _ = PROCESSES[name]
    loss = DistributionMatchingLoss(times)
    student = torch.tensor([-1.0, 0.3], requires_grad=True)
    target = Normal(*REAL)

    def divergence() -> float:
        mean, std = student.detach()
        return kl_divergence(Normal(mean, std), target).item()

    optimizer = torch.optim.Adam([student], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    source, history = generator(), [divergence()]
    for _ in range(200):
        x = student[0] + student[1] * torch.randn(32, 16, generator=source)
        critic = GaussianDenoiser(process, *student.detach())
        teacher = GaussianDenoiser(process, *REAL)
        out = loss(x, real=teacher, fake=critic, generator=source)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
        history.append(divergence())
    assert history[0] > 1 > history[20]
    assert history[-1] < 1e-3
    torch.testing.assert_close(student, torch.tensor(REAL), atol=0.02, rtol=0)


def test_equal_teacher_and_critic_give_exactly_zero() -> None:
    x = normal(4, 3).requires_grad_()
    denoiser = GaussianDenoiser(VE, *REAL)
    out = DistributionMatchingLoss(UniformTime(0.1, 2.0))(
        x, real=denoiser, fake=denoiser
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert torch.equal(out.gradient, torch.zeros_like(x))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert out.finite.all()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=30)
def test_surrogate_hands_over_the_gradient_to_the_last_bit(
    shape: list[int], seed: int
) -> None:
    x = (100 * normal(*shape, seed=seed)).requires_grad_()
    gradient = normal(*shape, seed=seed + 1).exp()
    gradient_surrogate(x, gradient).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, gradient / x.numel())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=30)
def test_surrogate_has_the_value_of_half_the_squared_distance(
    shape: list[int], seed: int
) -> None:
    x = normal(*shape, seed=seed, dtype=torch.float64).requires_grad_()
    gradient = normal(*shape, seed=seed + 1, dtype=torch.float64)
    target = (x - gradient).detach()
    half_mse = 0.5 * torch.nn.functional.mse_loss(x, target)
    loss = gradient_surrogate(x, gradient)
    torch.testing.assert_close(loss, half_mse)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (loss, half_mse))
    torch.testing.assert_close(ours, theirs)


def test_loss_is_half_the_mean_square_of_the_gradient() -> None:
    out = distribution_matching_loss(*estimates())
    torch.testing.assert_close(out.loss, (out.gradient**2).mean() / 2)


def test_normaliser_is_each_samples_own() -> None:
    x, _, _, real, fake = estimates()
    before = distribution_matching_gradient(x, real, fake)
    changed = [v.detach().clone() for v in (x, real, fake)]
    for factor, tensor in enumerate(changed, start=2):
        tensor[1] *= factor
    after = distribution_matching_gradient(*changed)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


def test_normaliser_averages_over_the_elements_of_a_sample() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    real = torch.tensor([[[0.0, 0.0], [6.0, 4.0]]])
    assert mean_absolute_error(x, real).tolist() == [(1 + 2 + 3 + 0) / 4]


def test_normaliser_has_no_floor() -> None:
    x, tiny = torch.zeros(1, 2), torch.full((1, 2), 1e-20)
    gradient = distribution_matching_gradient(x, tiny, 3 * tiny)
    torch.testing.assert_close(gradient, torch.full((1, 2), 2.0))


def test_floored_normaliser_stops_at_its_floor() -> None:
    x, near, far = torch.zeros(1, 2), torch.full((1, 2), 1e-3), torch.full((1, 2), 8.0)
    normalizer = FlooredNormalizer(floor=0.5)
    assert normalizer(x, near).tolist() == [0.5]
    assert normalizer(x, far).tolist() == [8.0]
    gradient = distribution_matching_gradient(x, near, near + 1, normalizer=normalizer)
    torch.testing.assert_close(gradient, torch.full((1, 2), 2.0))


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan")])
def test_floor_must_be_positive(floor: float) -> None:
    with pytest.raises(ValueError, match=r"floor: got .* expected > 0"):
        FlooredNormalizer(floor)


@pytest.mark.parametrize("difference", [0.0, 1.0])
def test_zero_normaliser_is_flagged_and_not_replaced(difference: float) -> None:
    x, x_t, t, real, _ = estimates()
    real[1] = x.detach()[1]
    fake = real + difference
    out = distribution_matching_loss(x, x_t, t, real, fake)
    assert out.finite.tolist() == [True, False, True]
    assert out.metrics["nonfinite"].item() == 1
    assert not torch.isfinite(out.gradient[1]).any()
    assert not torch.isfinite(out.loss)
    assert torch.isfinite(out.gradient[[0, 2]]).all()


def test_x_must_carry_a_gradient() -> None:
    x, x_t, t, real, fake = estimates()
    loss = DistributionMatchingLoss(UniformTime(0.1, 1.0))
    denoiser = GaussianDenoiser(VE)
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        loss(x.detach(), real=denoiser, fake=denoiser)
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        distribution_matching_loss(x.detach(), x_t, t, real, fake)


@pytest.mark.parametrize("name", PROCESSES)
def test_given_times_and_noise_reproduce_the_drawn_ones(name: str) -> None:
    process, times, _ = PROCESSES[name]
    loss, x = DistributionMatchingLoss(times), normal(6, 4).requires_grad_()
    networks: dict[str, Any] = {
        "real": GaussianDenoiser(process, *REAL),
        "fake": GaussianDenoiser(process, *FAKE),
    }
    drawn = loss(x, **networks, generator=generator(3))
    again = loss(x, **networks, generator=generator(3))
    other = loss(x, **networks, generator=generator(4))
    alpha, sigma = noise_levels(process, drawn.t, x)
    noise = (drawn.x_t - alpha * x.detach()) / sigma
    given_both = loss(x, **networks, t=drawn.t, noise=noise)
    assert torch.equal(drawn.gradient, again.gradient)
    assert not torch.equal(drawn.t, other.t)
    assert len(set(drawn.t.tolist())) > 1, "one time a sample"
    # Drawn noise is recovered from x_t only up to rounding.
    torch.testing.assert_close(
        given_both.gradient, drawn.gradient, rtol=1e-3, atol=1e-4
    )
    assert torch.equal(given_both.t, drawn.t)


def test_a_given_time_leaves_the_noise_to_be_drawn_and_the_other_way_round() -> None:
    loss, x = DistributionMatchingLoss(UniformTime(0.5, 1.0)), normal(2, 3)
    x.requires_grad_()
    networks: dict[str, Any] = {
        "real": GaussianDenoiser(VE, *REAL),
        "fake": GaussianDenoiser(VE),
    }
    t, noise = torch.tensor([7.0, 8.0]), normal(2, 3, seed=1)
    by_time = loss(x, **networks, t=t, generator=generator())
    assert torch.equal(by_time.t, t)
    assert not torch.allclose(by_time.x_t, x.detach() + t[:, None] * noise)
    by_noise = loss(x, **networks, noise=noise, generator=generator())
    expected = x.detach() + by_noise.t[:, None] * noise
    assert torch.equal(by_noise.x_t, expected)


def test_unequal_processes_are_named() -> None:
    process = PROCESSES["flow"][0]
    with pytest.raises(ValueError, match=r"fake: .* RectifiedFlow differs .* of real"):
        DistributionMatchingLoss(UniformTime())(
            normal(2, 3).requires_grad_(),
            real=GaussianDenoiser(VE),
            fake=GaussianDenoiser(process),
        )


def test_both_networks_get_the_noisy_sample_its_time_and_condition() -> None:
    seen: list[tuple[Tensor, Tensor, object, bool]] = []

    def spy(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append((x_t, t, cond, torch.is_grad_enabled()))
        return x_t / (1 + len(seen))

    x, cond = normal(2, 3).requires_grad_(), {"label": torch.tensor([1, 2])}
    network = FunctionDenoiser(spy)
    out = DistributionMatchingLoss(UniformTime(0.1, 1.0))(
        x, cond, real=network, fake=network
    )
    assert len(seen) == 2
    for x_t, t, condition, grad_enabled in seen:
        assert torch.equal(x_t, out.x_t)
        assert torch.equal(t, out.t)
        assert condition is cond
        assert not grad_enabled
    assert torch.equal(out.x0_real, out.x_t / 2)
    assert torch.equal(out.x0_fake, out.x_t / 3)


def test_only_the_loss_has_a_graph_and_only_to_x() -> None:
    weight = torch.ones(3, requires_grad=True)
    network = FunctionDenoiser(lambda x_t, t, cond: x_t * weight)
    other = FunctionDenoiser(lambda x_t, t, cond: x_t * weight.sin())
    x = normal(2, 3).requires_grad_()
    out = DistributionMatchingLoss(UniformTime(0.1, 1.0))(x, real=network, fake=other)
    for name, value in out._asdict().items():
        if isinstance(value, Tensor):
            assert value.requires_grad == (name == "loss"), name
    assert not any(value.requires_grad for value in out.metrics.values())
    assert torch.autograd.grad(out.loss, weight, allow_unused=True) == (None,)
    # The same for estimates that arrive with a graph.
    x_t = out.x_t
    pure = distribution_matching_loss(x, x_t, out.t, x_t * weight, x_t * weight.sin())
    assert not pure.x0_real.requires_grad
    assert not pure.x0_fake.requires_grad
    (gradient,) = torch.autograd.grad(pure.loss, weight, allow_unused=True)
    assert gradient is None


def test_a_guided_teacher_moves_samples_along_the_guidance() -> None:
    """With critic = teacher, g is the guidance term alone: (s - 1)(u - c) / w."""
    from dmdkit import ClassifierFreeGuidance

    def network(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return cond[:, None] * torch.ones_like(x_t)

    base, scale = FunctionDenoiser(network), 3.0
    guided = ClassifierFreeGuidance(base, torch.zeros_like, scale)
    x, c = torch.full((2, 3), 10.0, requires_grad=True), torch.tensor([1.0, 2.0])
    out = DistributionMatchingLoss(UniformTime(0.1, 1.0))(x, c, real=guided, fake=base)
    expected = (scale - 1) * (0 - c) / (10 - scale * c)
    torch.testing.assert_close(out.gradient, expected[:, None].expand(2, 3))


def test_metrics_are_what_they_are_documented_to_be() -> None:
    x, x_t, t, real, fake = estimates((4, 3, 2))
    out = distribution_matching_loss(x, x_t, t, real, fake)
    out.loss.backward()
    assert x.grad is not None
    sample = x.detach()
    expected = {
        "gradient_norm": x.grad.norm(),
        "normalizer": (sample - real).abs().mean(),
        "gap": (real - fake).abs().mean(),
        "nonfinite": torch.tensor(0),
        "student_mean": sample.mean(),
        "real_mean": real.mean(),
        "fake_mean": fake.mean(),
        "student_std": (sample - sample.mean()).square().mean().sqrt(),
        "real_std": (real - real.mean()).square().mean().sqrt(),
        "fake_std": (fake - fake.mean()).square().mean().sqrt(),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)


def test_a_single_number_has_finite_metrics() -> None:
    x, x_t, t, real, fake = estimates((1, 1))
    out = distribution_matching_loss(x, x_t, t, real, fake)
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "real", "fake"])
def test_nonfinite_samples_and_estimates_are_flagged(where: str, bad: float) -> None:
    x, x_t, t, real, fake = estimates()
    tensors = {"x": x.detach().clone(), "real": real, "fake": fake}
    tensors[where][2, 1] = bad
    out = distribution_matching_loss(
        tensors["x"].requires_grad_(), x_t, t, tensors["real"], tensors["fake"]
    )
    assert out.finite.tolist() == [True, True, False]
    assert out.metrics["nonfinite"].item() == 1


def test_a_nonfinite_network_or_time_is_flagged_by_sample() -> None:
    def overflow(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        return torch.where(t[:, None] > 1, torch.inf, x_t)

    x = normal(3, 2).requires_grad_()
    loss, good = DistributionMatchingLoss(UniformTime()), GaussianDenoiser(VE, *REAL)
    bad, t = FunctionDenoiser(overflow), torch.tensor([0.5, 2.0, 0.5])
    for real, fake in ((good, bad), (bad, good)):
        out: DistributionMatchingOutput = loss(x, real=real, fake=fake, t=t)
        assert out.finite.tolist() == [True, False, True]
    outside = torch.tensor([-1.0, 1.0, 1.0])
    out = loss(x, real=good, fake=GaussianDenoiser(VE, *FAKE), t=outside)
    assert out.finite.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, f: (x, r[:, :2], f), r"`x0_real` is float32\[3, 2\], expected"),
        (lambda x, r, f: (x, r, f[:2]), r"`x0_fake` is float32\[2, 5\], expected"),
        (lambda x, r, f: (x[0], r, f), r"`x0_real` is float32\[3, 5\], expected"),
    ],
)
def test_wrong_shapes_name_the_argument(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    message: str,
) -> None:
    x, _, _, real, fake = estimates()
    with pytest.raises(ValueError, match=message):
        distribution_matching_gradient(*change(x, real, fake))
