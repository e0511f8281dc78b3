"""Both sides of the GAN against the paper's Eq. 4 and Goodfellow et al. 2014."""

import math

import pytest
import torch
from helpers_losses import (
    FunctionDiscriminator,
    column,
    generator,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from dmdkit import (
    DiffusionGANLoss,
    UniformTime,
    VarianceExploding,
    gan_discriminator_loss,
    gan_generator_loss,
)

LOGITS = st.lists(st.floats(-15, 15), min_size=1, max_size=6)


def mean_logit(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
    return x_t.flatten(1).mean(dim=1)


def exact(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(LOGITS)
@settings(max_examples=30)
def test_generator_side_is_minus_log_d_of_generated(fake: list[float]) -> None:
    """The second term of Eq. 4: E[-log D(F(G(z)))]."""
    loss = gan_generator_loss(exact(fake)).item()
    terms = [-math.log(1 / (1 + math.exp(-logit))) for logit in fake]
    assert loss == pytest.approx(sum(terms) / len(terms))


@given(LOGITS, LOGITS)
@settings(max_examples=30)
def test_discriminator_side_is_the_log_likelihood_of_both(
    fake: list[float], real: list[float]
) -> None:
    """-E[log D(real)] - E[log(1 - D(fake))], the batches of any size."""
    loss = gan_discriminator_loss(exact(fake), exact(real)).item()
    of_fake = [-math.log(1 - 1 / (1 + math.exp(-logit))) for logit in fake]
    of_real = [-math.log(1 / (1 + math.exp(-logit))) for logit in real]
    expected = sum(of_fake) / len(fake) + sum(of_real) / len(real)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    far = torch.tensor([1000.0])
    assert gan_generator_loss(-far).item() == 1000
    assert gan_generator_loss(far).item() == 0
    assert gan_discriminator_loss(far, -far).item() == 2000
    assert gan_discriminator_loss(-far, far).item() == 0


def test_undecided_discriminator_costs_two_log_two() -> None:
    loss = gan_discriminator_loss(torch.zeros(3), torch.zeros(5))
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_the_optimal_logit_reaches_the_jensen_shannon_divergence() -> None:
    """Goodfellow et al. 2014, Theorem 1, on three outcomes: 2 log 2 - 2 JS(p, q)."""
    p, q = exact([2 / 8, 5 / 8, 1 / 8]), exact([4 / 8, 1 / 8, 3 / 8])
    counts_p, counts_q = (8 * p).long(), (8 * q).long()
    outcomes = torch.arange(3)
    real, fake = (
        outcomes.repeat_interleave(counts_p),
        outcomes.repeat_interleave(counts_q),
    )
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    logits = (p / q).log().requires_grad_()
    loss = gan_discriminator_loss(logits[fake], logits[real])
    torch.testing.assert_close(loss.detach(), 2 * math.log(2) - 2 * js)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.zeros(3).double(), atol=1e-12, rtol=0)
    for outcome in range(3):
        for away in (-0.1, 0.1):
            other = logits.detach().clone()
            other[outcome] += away
            assert gan_discriminator_loss(other[fake], other[real]) > loss


def test_the_optimal_logit_for_two_gaussians() -> None:
    p, q = Normal(exact([0.5]), exact([0.8])), Normal(exact([-0.4]), exact([1.3]))
    # Midpoints of equal probability for the loss, a fine grid for the divergence.
    levels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    real, fake = p.icdf(levels), q.icdf(levels)

    def logit(x: Tensor) -> Tensor:
        return p.log_prob(x) - q.log_prob(x)

    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    a, b = p.log_prob(grid).exp(), q.log_prob(grid).exp()
    middle = (a + b) / 2
    js = torch.trapezoid(torch.xlogy(a, a / middle) + torch.xlogy(b, b / middle), grid)
    loss = gan_discriminator_loss(logit(fake), logit(real)).item()
    assert loss == pytest.approx(2 * math.log(2) - js.item(), abs=1e-4)


@given(st.floats(-30, 30))
@settings(max_examples=30)
def test_generator_gradient_does_not_saturate(value: float) -> None:
    """d/dl -log sigmoid(l) = D - 1: down everywhere, -1 where the generator loses."""
    logit = exact([value]).requires_grad_()
    gan_generator_loss(logit).backward()
    assert logit.grad is not None
    slope = logit.grad.item()
    assert slope == pytest.approx(1 / (1 + math.exp(-value)) - 1)
    assert slope < 0
    if value < -10:
        # The saturating form log(1 - D) would have -D here, nearly nothing.
        assert slope < -0.99


def test_generator_step_raises_the_logit() -> None:
    x = normal(4, 3).requires_grad_()
    loss = DiffusionGANLoss(UniformTime(0.1, 1.0))
    judge = FunctionDiscriminator(mean_logit)
    t, noise = torch.ones(4), normal(4, 3, seed=1)
    before = loss.generator(x, discriminator=judge, t=t, noise=noise)
    before.loss.backward()
    assert x.grad is not None
    stepped = (x - x.grad).detach().requires_grad_()
    after = loss.generator(stepped, discriminator=judge, t=t, noise=noise)
    assert (after.logits > before.logits).all()


def test_the_gradient_at_x_goes_through_the_noise() -> None:
    """x_t = alpha x + sigma eps: by the chain rule alpha (D - 1) dl/dx_t / b."""
    from dmdkit import RectifiedFlow

    x, noise = normal(2, 3).requires_grad_(), normal(2, 3, seed=1)
    t = torch.tensor([0.25, 0.75])
    judge = FunctionDiscriminator(mean_logit, RectifiedFlow())
    loss = DiffusionGANLoss(UniformTime())
    out = loss.generator(x, discriminator=judge, t=t, noise=noise)
    x_t = (1 - t)[:, None] * x.detach() + t[:, None] * noise
    torch.testing.assert_close(out.logits, x_t.mean(dim=1))
    slope = (out.logits.sigmoid() - 1) * (1 - t) / 3 / 2
    (gradient,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(gradient, slope[:, None].expand(2, 3))


def test_given_times_and_noise_reproduce_the_drawn_ones() -> None:
    loss = DiffusionGANLoss(UniformTime(0.5, 2.0))
    seen: list[Tensor] = []

    def spy(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append(x_t)
        return mean_logit(x_t, t, cond)

    judge = FunctionDiscriminator(spy)
    x, real = normal(3, 4).requires_grad_(), normal(5, 4, seed=1)
    drawn = loss.generator(x, discriminator=judge, generator=generator(3))
    noise = (seen[-1] - x).detach() / drawn.t[:, None]
    again = loss.generator(x, discriminator=judge, t=drawn.t, noise=noise)
    torch.testing.assert_close(again.logits, drawn.logits)
    seeded = loss.generator(x, discriminator=judge, generator=generator(3))
    assert torch.equal(seeded.logits, drawn.logits)

    seen.clear()
    both = loss.discriminator(
        x, None, real, None, discriminator=judge, generator=generator(3)
    )
    again = loss.discriminator(
        x,
        None,
        real,
        None,
        discriminator=judge,
        t=both.t,
        noise=(seen[0] - x).detach() / both.t[:, None],
        t_real=both.t_real,
        noise_real=(seen[1] - real) / both.t_real[:, None],
    )
    torch.testing.assert_close(again.loss, both.loss)
    torch.testing.assert_close(again.logits_real, both.logits_real)


def test_every_branch_draws_its_own_times_and_noise() -> None:
    loss = DiffusionGANLoss(UniformTime(0.5, 2.0))
    noises: list[Tensor] = []
    x = normal(64, 16)

    def spy(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        noises.append((x_t.detach() - x) / t[:, None])
        return mean_logit(x_t, t, cond)

    judge, source = FunctionDiscriminator(spy), generator()
    one = loss.generator(x.requires_grad_(), discriminator=judge, generator=source)
    x = x.detach()
    two = loss.discriminator(x, None, x, None, discriminator=judge, generator=source)
    times = torch.stack((one.t, two.t, two.t_real))
    flat = torch.stack([noise.flatten() for noise in noises])
    for values in (times, flat):
        correlation = torch.corrcoef(values) - torch.eye(3)
        assert correlation.abs().max() < 0.4
    torch.testing.assert_close(flat.std(dim=1), torch.ones(3), atol=0.1, rtol=0)
    # A given time of one branch is not taken for the other.
    fixed = torch.ones(64)
    out = loss.discriminator(x, None, x, None, discriminator=judge, t=fixed)
    assert not torch.equal(out.t_real, fixed)


def test_each_batch_has_its_own_size_and_condition() -> None:
    judge = FunctionDiscriminator(lambda x_t, t, cond: cond * torch.ones_like(t))
    out = DiffusionGANLoss(UniformTime()).discriminator(
        torch.zeros(2, 3),
        torch.tensor([1.0, -2.0]),
        torch.zeros(3, 3),
        torch.tensor([3.0, 4.0, -5.0]),
        discriminator=judge,
    )
    assert out.logits_fake.tolist() == [1, -2]
    assert out.logits_real.tolist() == [3, 4, -5]
    assert out.metrics["accuracy"].item() == pytest.approx(3 / 5)
    assert out.metrics["fake"].item() == pytest.approx(-1 / 2)
    assert out.metrics["real"].item() == pytest.approx(2 / 3)


def test_fooled_is_the_share_taken_for_real() -> None:
    judge = FunctionDiscriminator(lambda x_t, t, cond: x_t[:, 0] - x_t[:, 0] + cond)
    out = DiffusionGANLoss(UniformTime()).generator(
        normal(4, 2).requires_grad_(),
        torch.tensor([1.0, -1.0, 0.5, 2.0]),
        discriminator=judge,
    )
    assert out.metrics["fooled"].item() == 0.75


def test_no_gradient_of_the_discriminator_side_reaches_either_batch() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    judge = FunctionDiscriminator(lambda x_t, *_: weight * x_t.mean(dim=1))
    x, real = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    out = DiffusionGANLoss(UniformTime()).discriminator(
        x, None, real, None, discriminator=judge
    )
    gradients = torch.autograd.grad(out.loss, (x, real, weight), allow_unused=True)
    assert gradients[:2] == (None, None)
    assert gradients[2] is not None


def test_all_but_the_loss_is_detached() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    judge = FunctionDiscriminator(lambda x_t, *_: weight * x_t.mean(dim=1))
    loss, x = DiffusionGANLoss(UniformTime()), normal(2, 3).requires_grad_()
    for out in (
        loss.generator(x, discriminator=judge),
        loss.discriminator(x, None, x, None, discriminator=judge),
    ):
        for name, value in out._asdict().items():
            if isinstance(value, Tensor):
                assert value.requires_grad == (name == "loss"), name
        assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_samples_and_logits_are_flagged(bad: float) -> None:
    loss, good = DiffusionGANLoss(UniformTime(0.5, 1.0)), normal(3, 2)
    broken = good.clone()
    broken[1, 0] = bad
    # Also where the discriminator hides them.
    bounded = FunctionDiscriminator(lambda x_t, *_: x_t.nan_to_num().tanh().mean(dim=1))
    plain = FunctionDiscriminator(mean_logit)
    for judge in (plain, bounded):
        one = loss.generator(broken.clone().requires_grad_(), discriminator=judge)
        assert one.finite.tolist() == [True, False, True]
        assert one.metrics["nonfinite"].item() == 1
        two = loss.discriminator(broken, None, good, None, discriminator=judge)
        assert two.finite.tolist() == [True, False, True]
        assert two.finite_real.tolist() == [True, True, True]
        three = loss.discriminator(good, None, broken, None, discriminator=judge)
        assert three.finite.tolist() == [True, True, True]
        assert three.finite_real.tolist() == [True, False, True]
        assert three.metrics["nonfinite"].item() == 1
    # A network that breaks at one time.
    t = torch.tensor([0.5, 0.5, 2.0])
    fragile = FunctionDiscriminator(lambda x_t, t, _: torch.where(t > 1, bad, t))
    four = loss.generator(good.requires_grad_(), discriminator=fragile, t=t)
    assert four.finite.tolist() == [True, True, False]
    five = loss.discriminator(good, None, good, None, discriminator=fragile, t_real=t)
    assert five.finite_real.tolist() == [True, True, False]
    assert five.finite.all()


def test_x_of_the_generator_side_must_carry_a_gradient() -> None:
    judge = FunctionDiscriminator(mean_logit)
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        DiffusionGANLoss(UniformTime()).generator(normal(2, 3), discriminator=judge)


def test_wrong_shapes_are_refused() -> None:
    judge = FunctionDiscriminator(mean_logit)
    loss, x = DiffusionGANLoss(UniformTime()), normal(2, 3)
    with pytest.raises(ValueError, match=r"`real` is float32\[2, 4\].* x \[2, 3\]"):
        loss.discriminator(x, None, normal(2, 4), None, discriminator=judge)
    with pytest.raises(ValueError, match=r"logits_real: got shape \[2, 1\]"):
        gan_discriminator_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"`logits_fake` is float32\[2, 1\], expected"):
        gan_generator_loss(torch.zeros(2, 1))
    wide = FunctionDiscriminator(lambda x_t, *_: column(x_t[:, 0], x_t))
    with pytest.raises(ValueError, match=r"`logits_fake` is float32\[2, 1\], expected"):
        loss.generator(x.requires_grad_(), discriminator=wide)


def test_something_without_logits_is_no_discriminator() -> None:
    with pytest.raises(TypeError, match=r"`discriminator` is VarianceExploding"):
        DiffusionGANLoss(UniformTime()).generator(
            normal(2, 3).requires_grad_(),
            discriminator=VarianceExploding(),  # pyright: ignore[reportArgumentType]
        )
