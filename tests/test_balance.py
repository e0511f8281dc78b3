"""The balance of gradients at the generated sample."""

import pytest
import torch
from helpers_losses import FunctionDiscriminator, normal
from torch import Tensor

from dmdkit import (
    DiffusionGANLoss,
    UniformTime,
    balanced_gan_weight,
    distribution_matching_loss,
    gradient_norms,
)


def pooled(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
    """A discriminator whose gradient at x is spread over the whole sample."""
    return x_t.sin().flatten(1).mean(dim=1)


def terms(x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Both generator losses at `x`, each sample with the same numbers."""
    real, fake = (normal(*x.shape[1:], seed=seed + i).expand(x.shape) for i in (0, 1))
    t = torch.ones(len(x))
    judge = FunctionDiscriminator(pooled)
    gan = DiffusionGANLoss(UniformTime()).generator(
        x, discriminator=judge, t=t, noise=torch.zeros_like(x)
    )
    dm = distribution_matching_loss(x, x, t, real, fake)
    return {"dm": dm.loss, "gan": gan.loss}


def test_norms_are_those_of_separate_backward_passes() -> None:
    x = normal(3, 2, 4).requires_grad_()
    losses = terms(x)
    norms = gradient_norms(x, losses)
    assert x.grad is None, "nothing may gather on the way"
    for name, loss in losses.items():
        x.grad = None
        loss.backward()  # the graphs are still there
        assert x.grad is not None
        torch.testing.assert_close(norms[name], (x.grad**2).sum().sqrt(), msg=name)
        assert not norms[name].requires_grad


def test_norms_of_an_inner_sample() -> None:
    """As in training: x comes out of a student, and is no leaf."""
    weight = torch.ones(4, requires_grad=True)
    x = normal(3, 4) * weight
    losses = terms(x)
    leaf = x.detach().requires_grad_()
    expected = gradient_norms(leaf, terms(leaf))
    torch.testing.assert_close(gradient_norms(x, losses), expected)
    assert weight.grad is None
    sum(losses.values(), torch.zeros(())).backward()
    assert weight.grad is not None


def test_at_the_balanced_weight_both_terms_pull_equally() -> None:
    x = normal(3, 2, 4).requires_grad_()
    losses = terms(x)
    weight = balanced_gan_weight(x, losses["dm"], losses["gan"])
    assert not weight.requires_grad
    assert weight > 0
    norms = gradient_norms(x, {"dm": losses["dm"], "gan": weight * losses["gan"]})
    torch.testing.assert_close(norms["dm"], norms["gan"])


def test_each_elements_pull_is_divided_by_the_number_of_elements() -> None:
    """The same g in a sample of n elements: norm |g| / n, sqrt(n) / n of one."""
    for n in (1, 4, 16, 64):
        x = torch.zeros(1, n, requires_grad=True)
        out = distribution_matching_loss(
            x, x, torch.ones(1), torch.ones(1, n), torch.full((1, n), 4.0)
        )
        norm = gradient_norms(x, {"dm": out.loss})["dm"]
        torch.testing.assert_close(norm, torch.tensor(3 * n**0.5 / n))


def test_balance_moves_with_the_sample_and_not_with_the_batch() -> None:
    """A logit that reads one place: its pull stays while each dm element's fades."""

    def first(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        return x_t[:, 0]

    def weight(batch: int, n: int) -> Tensor:
        x, t = torch.zeros(batch, n, requires_grad=True), torch.ones(batch)
        real, fake = torch.ones(batch, n), torch.full((batch, n), 4.0)
        dm = distribution_matching_loss(x, x, t, real, fake).loss
        judge = FunctionDiscriminator(first)
        gan = DiffusionGANLoss(UniformTime()).generator(
            x, discriminator=judge, t=t, noise=torch.zeros_like(x)
        )
        return balanced_gan_weight(x, dm, gan.loss)

    # |g| sqrt(bn) / (bn) over sqrt(b) (1/2) / b, with |g| = 3 everywhere.
    for batch in (1, 2, 8):
        for n in (1, 4, 16):
            torch.testing.assert_close(weight(batch, n), torch.tensor(6 / n**0.5))


def test_a_loss_must_depend_on_x() -> None:
    x = normal(2, 2).requires_grad_()
    stranger = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="losses: 'gan' does not depend on x"):
        gradient_norms(x, {"dm": x.sum(), "gan": stranger * 2})
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        gradient_norms(x.detach(), {"dm": x.sum()})
