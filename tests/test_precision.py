"""fp32 arithmetic in the losses, fp32 weights in training, whatever computes."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from helpers_losses import (
    FunctionDenoiser,
    FunctionDiscriminator,
    GaussianDenoiser,
    column,
    generator,
    normal,
)
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dmdkit import (
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DistributionMatchingLoss,
    HuberDistance,
    KarrasIndexTime,
    KarrasPreconditioning,
    KarrasWeight,
    RegressionLoss,
    ScoreEstimator,
    UniformTime,
    VarianceExploding,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    frozen,
    gan_discriminator_loss,
    gan_generator_loss,
    trainable_copy,
)
from dmdkit.adapters.diffusers import UNetNetwork

BF16 = torch.bfloat16
TIMES = KarrasIndexTime(300, 900)
Function = Callable[..., Tensor]


def dm(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    return distribution_matching_loss(x, x, torch.ones(len(x)), real, fake).loss


def dm_with_networks(x: Tensor, *_: Tensor) -> Tensor:
    ve, noise = VarianceExploding(), normal(*x.shape, seed=5)
    networks = GaussianDenoiser(ve, 0.3), GaussianDenoiser(ve, -0.2, 0.7)
    return DistributionMatchingLoss(UniformTime())(
        x, real=networks[0], fake=networks[1], t=torch.ones(len(x)), noise=noise
    ).loss


def denoising(x0: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    one = torch.ones(len(x))
    return denoising_loss(x, x, one, x0, one * 0.3).loss


def gan_generator(x: Tensor, *_: Tensor) -> Tensor:
    return gan_generator_loss(x[:, 0])


def gan_discriminator(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    return gan_discriminator_loss(x[:, 0], x[:, 1]) + gan_discriminator_loss(
        other[:, 0], x[:, 2]
    )


def regression(x: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    return (
        RegressionLoss()(x, target).loss
        + RegressionLoss(HuberDistance(0.5))(x, target).loss
    )


@pytest.mark.parametrize(
    "loss",
    [dm, dm_with_networks, denoising, gan_generator, gan_discriminator, regression],
)
def test_bf16_inputs_give_the_fp32_gradient_to_bf16_rounding(loss: Function) -> None:
    low = [normal(5, 7, seed=i).to(BF16) for i in range(3)]
    high = [tensor.float() for tensor in low]
    low[0].requires_grad_()
    high[0].requires_grad_()
    of_low, of_high = loss(*low), loss(*high)
    assert of_low.dtype == torch.float32
    assert torch.equal(of_low, of_high)
    (gradient,) = torch.autograd.grad(of_low, low[0])
    (exact,) = torch.autograd.grad(of_high, high[0])
    assert gradient.dtype == BF16
    # Terms meet in bf16 where x enters a loss twice.
    torch.testing.assert_close(gradient, exact.to(BF16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("loss", [dm, denoising, regression])
def test_fp64_inputs_keep_their_precision(loss: Function) -> None:
    tensors = [normal(5, 7, seed=i, dtype=torch.float64) for i in range(3)]
    tensors[0].requires_grad_()
    assert loss(*tensors).dtype == torch.float64


def test_metrics_of_bf16_estimates_are_fp32() -> None:
    x, real, fake = (normal(64, 64, seed=i) for i in range(3))
    x.requires_grad_()
    out = distribution_matching_loss(x, x, torch.ones(64), real.to(BF16), fake.to(BF16))
    gap = (real.to(BF16).double() - fake.to(BF16).double()).abs().mean()
    torch.testing.assert_close(out.metrics["gap"].double(), gap, rtol=1e-5, atol=0)
    assert out.metrics["real_mean"].dtype == torch.float32


def tiny_unet(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def tiny_teacher(seed: int = 0) -> ScoreEstimator:
    network = UNetNetwork(tiny_unet(seed))
    return ScoreEstimator(network, VarianceExploding(), KarrasPreconditioning())


class Networks(NamedTuple):
    """A run's networks, as small as diffusers has them."""

    teacher: ScoreEstimator
    student: ScoreEstimator
    critic: ScoreEstimator


def networks(dtype: torch.dtype = torch.float32) -> Networks:
    teacher = tiny_teacher().to(dtype)
    student = trainable_copy(teacher)
    # Another start, so that teacher and critic differ.
    other = tiny_teacher(1).to(dtype)
    critic = trainable_copy(other, head=DiffusionGANHead(16, 4, groups=4))
    return Networks(teacher.requires_grad_(False), student, critic)


def sample(student: ScoreEstimator, batch: int = 2) -> Tensor:
    return student(80 * normal(batch, 1, 8, 8), torch.full((batch,), 80.0))


def all_losses(run: Networks) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every loss at fixed draws, with the module that it trains."""
    draws: dict[str, Any] = {
        "t": torch.tensor([0.4, 1.5]),
        "noise": normal(2, 1, 8, 8, seed=3),
    }
    real = normal(2, 1, 8, 8, seed=4)
    gan = DiffusionGANLoss(TIMES)
    with frozen(run.critic):
        x = sample(run.student)
        dm = DistributionMatchingLoss(TIMES)(
            x, real=run.teacher, fake=run.critic, **draws
        )
        generated = gan.generator(x, discriminator=run.critic, **draws)
    clean = x.detach()
    denoised = DenoisingLoss(TIMES, KarrasWeight())(clean, denoiser=run.critic, **draws)
    told = gan.discriminator(
        clean,
        None,
        real,
        None,
        discriminator=run.critic,
        t_real=draws["t"],
        noise_real=draws["noise"],
        **draws,
    )
    fitted = RegressionLoss()(x, real)
    return {
        "dm": (run.student, dm.loss),
        "gan generator": (run.student, generated.loss),
        "regression": (run.student, fitted.loss),
        "denoising": (run.critic, denoised.loss),
        "gan discriminator": (run.critic, told.loss),
    }


def gradients(run: Networks, name: str) -> tuple[Tensor, list[Tensor]]:
    module, loss = all_losses(run)[name]
    with frozen(run.critic) if module is run.student else nullcontext():
        loss.backward()
    return loss.detach(), [p.grad for p in module.parameters() if p.grad is not None]


LOSSES = ("dm", "gan generator", "regression", "denoising", "gan discriminator")


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    run = networks()
    checkpointed = copy.deepcopy(run)
    recomputed: list[object] = []
    for estimator in (checkpointed.student, checkpointed.critic):
        unet = next(m for m in estimator.modules() if isinstance(m, UNet2DModel))
        unet.enable_gradient_checkpointing()
        first = unet.get_submodule("down_blocks.0.resnets.0")
        first.register_forward_pre_hook(lambda *_: recomputed.append(0))
    plain_loss, plain = gradients(run, name)
    loss, ours = gradients(checkpointed, name)
    torch.testing.assert_close(loss, plain_loss)
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    forwards = len(recomputed)
    all_losses(checkpointed)
    assert forwards > len(recomputed) - forwards, "nothing was recomputed"


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_autocast_networks_train_fp32_weights(name: str) -> None:
    run = networks()
    _, exact = gradients(copy.deepcopy(run), name)
    run.teacher.to(BF16)
    seen: set[torch.dtype] = set()
    for module in run.critic.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    with torch.autocast("cpu", dtype=BF16):
        loss, ours = gradients(run, name)
    assert seen <= {BF16}
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in ours)
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (ours, exact))
    assert torch.cosine_similarity(a, b, dim=0) > 0.98


def test_under_autocast_the_losses_compute_in_fp32() -> None:
    """What the networks gave is all that is rounded."""
    run = networks()
    run.teacher.to(BF16)
    with torch.autocast("cpu", dtype=BF16):
        x = sample(run.student)
        out = DistributionMatchingLoss(TIMES)(x, real=run.teacher, fake=run.critic)
        den = DenoisingLoss(TIMES, KarrasWeight())(x, denoiser=run.critic)
        gan = DiffusionGANLoss(TIMES).generator(x, discriminator=run.critic)
    for value in (x, out.x_t, out.x0_real, out.x0_fake, out.gradient, den.x0):
        assert value.dtype == torch.float32
    expected = distribution_matching_gradient(x, out.x0_real, out.x0_fake)
    assert torch.equal(out.gradient, expected)
    torch.testing.assert_close(out.loss, out.gradient.square().mean() / 2)
    (g,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    assert torch.equal(g, out.gradient / x.numel())
    weight = den.t**-2 + 0.5**-2
    error = (den.x0 - x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(den.per_sample, (weight * error).detach())
    assert gan.logits.dtype == torch.float32
    torch.testing.assert_close(gan.loss, (1 + (-gan.logits).exp()).log().mean())


RATES = (2e-6, 5e-7, 1e-5, 5e-5)
"""ImageNet-64; its second phase and SDXL; SD1.5; SDXL with LoRA."""

Moved = dict[tuple[float, str, str], float]
"""By rate, by the weights' dtype, by role."""


@pytest.fixture(scope="module")
def moved() -> Moved:
    """Which share of the weights with a gradient 50 steps of DMD2 have changed.

    The teacher was bf16 from the start, and all compute is under bf16 autocast. The
    gradients are those of one run; each rate steps its own copy of the weights by them,
    one as `trainable_copy` made them, and for comparison one in bf16.
    """
    with pytest.warns(UserWarning, match="starts from weights in torch.bfloat16"):
        run = networks(BF16)
    roles = {"student": run.student, "critic": run.critic}
    copies: dict[tuple[float, str, str], Tensor] = {}
    for rate in RATES:
        for role, module in roles.items():
            weights = parameters_to_vector(module.parameters()).detach()
            copies[rate, "as copied", role] = weights.clone()
            copies[rate, "bf16", role] = weights.to(BF16)
    before = {key: weights.clone() for key, weights in copies.items()}
    optimizers = {
        key: torch.optim.AdamW([weights], lr=key[0], weight_decay=0.01)
        for key, weights in copies.items()
    }
    dm_loss, gan = DistributionMatchingLoss(TIMES), DiffusionGANLoss(TIMES)
    critic_loss, source = DenoisingLoss(TIMES, KarrasWeight()), generator()
    for _ in range(50):
        z, real = (torch.randn(2, 1, 8, 8, generator=source) for _ in range(2))
        with torch.autocast("cpu", dtype=BF16):
            x = run.student(80 * z, torch.full((2,), 80.0))
            with frozen(run.critic):
                dm = dm_loss(x, real=run.teacher, fake=run.critic, generator=source)
                fool = gan.generator(x, discriminator=run.critic, generator=source)
                (dm.loss + 3e-3 * fool.loss).backward()
            x = x.detach()
            fit = critic_loss(x, denoiser=run.critic, generator=source)
            tell = gan.discriminator(
                x, None, real, None, discriminator=run.critic, generator=source
            )
            (fit.loss + 1e-2 * tell.loss).backward()
        for role, module in roles.items():
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            gradient = torch.cat([grad.flatten() for grad in grads])
            for key, optimizer in optimizers.items():
                if key[2] == role:
                    copies[key].grad = gradient.to(copies[key].dtype)
                    optimizer.step()
            new = copies[2e-6, "as copied", role]
            vector_to_parameters(new.clone(), module.parameters())
            module.zero_grad()
    shares: Moved = {}
    for key, weights in copies.items():
        assert weights.grad is not None
        felt = weights.grad != 0
        assert felt.float().mean() > 0.9
        shares[key] = (weights != before[key])[felt].float().mean().item()
    return shares


@pytest.mark.parametrize("role", ["student", "critic"])
@pytest.mark.parametrize("rate", RATES)
def test_trainable_copies_move_at_each_recipes_rate(
    moved: Moved, rate: float, role: str
) -> None:
    assert moved[rate, "as copied", role] > 0.99


@pytest.mark.parametrize("role", ["student", "critic"])
def test_bf16_weights_would_not(moved: Moved, role: str) -> None:
    shares = [moved[rate, "bf16", role] for rate in sorted(RATES)]
    assert all(share < 0.3 for share in shares)
    assert all(a < b for a, b in pairwise(shares))


SHAPES = [(3, 3), (4, 4, 2, 4), (2, 3, 4, 2, 2), (3, 2, 2, 3)]
"""[b, d], [b, c, h, w], [b, c, t, h, w]; mis-broadcasting hides where axes equal b."""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_samples_one_by_one(shape: tuple[int, ...]) -> None:
    ve, times = VarianceExploding(), UniformTime()
    x, noise, other, noise_other = (normal(*shape, seed=i) for i in range(4))
    b = shape[0]
    t = torch.linspace(0.3, 2.0, b)
    cond = torch.linspace(-1, 1, b)

    def shifted(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return GaussianDenoiser(ve, 0.2)(x_t, t) + column(cond, x_t)

    def logit(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return (x_t.flatten(1).cumsum(1).sin().sum(1) + t) * cond

    real, fake = FunctionDenoiser(shifted), GaussianDenoiser(ve, -0.3, 0.6)
    judge = FunctionDiscriminator(logit)

    def losses(some: slice) -> dict[str, Tensor]:
        part = x[some].clone().requires_grad_()
        draws: dict[str, Any] = {"t": t[some], "noise": noise[some]}
        dm = DistributionMatchingLoss(times)(
            part, cond[some], real=real, fake=fake, **draws
        )
        den = DenoisingLoss(times, KarrasWeight())(
            part, cond[some], denoiser=real, **draws
        )
        gan = DiffusionGANLoss(times)
        one = gan.generator(part, cond[some], discriminator=judge, **draws)
        two = gan.discriminator(
            part,
            cond[some],
            other[some],
            cond[some],
            discriminator=judge,
            t_real=t[some],
            noise_real=noise_other[some],
            **draws,
        )
        fits = [RegressionLoss(d)(part, other[some]) for d in (HuberDistance(0.5),)]
        (pull,) = torch.autograd.grad(dm.loss + one.loss, part)
        return {
            "dm": dm.gradient,
            "denoising": den.per_sample,
            "gan generator": one.logits,
            "gan fake": two.logits_fake,
            "gan real": two.logits_real,
            "regression": fits[0].per_sample,
            # Both losses are means over the batch.
            "gradient": pull * part.shape[0],
        }

    whole = losses(slice(None))
    alone = [losses(slice(i, i + 1)) for i in range(b)]
    for name, value in whole.items():
        parts = torch.cat([one[name] for one in alone])
        assert value.shape == parts.shape, name
        torch.testing.assert_close(value, parts, msg=name)
