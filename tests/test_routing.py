"""Which loss reaches which module, on the generator's and on the critic's turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from helpers_losses import ToyNetwork, has_gradient, normal, toy_estimator
from torch import Tensor, nn

from dmdkit import (
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DistributionMatchingLoss,
    FeatureDiscriminator,
    NetworkWithHead,
    RegressionLoss,
    ScoreEstimator,
    UniformTime,
    frozen,
    trainable_copy,
)
from dmdkit.losses import GANDiscriminatorOutput
from dmdkit.types import Discriminator

TIMES = UniformTime(0.5, 2.0)


class Cast(NamedTuple):
    """The networks of a run, the student's sample with its graph, and data."""

    teacher: ScoreEstimator
    student: ScoreEstimator
    critic: ScoreEstimator
    separate_head: DiffusionGANHead
    x: Tensor
    data: Tensor

    @property
    def modules(self) -> dict[str, nn.Module]:
        network = self.critic.network
        assert isinstance(network, NetworkWithHead)
        trunk = network.network
        assert isinstance(trunk, ToyNetwork)
        return {
            "student": self.student,
            "encoder": trunk.encoder,
            "decoder": trunk.decoder,
            "head": network.head,
            "separate head": self.separate_head,
            "teacher": self.teacher,
        }

    @property
    def on_teacher(self) -> FeatureDiscriminator:
        return FeatureDiscriminator(
            self.teacher.features, self.separate_head, self.teacher.process
        )


@pytest.fixture
def run() -> Cast:
    teacher = toy_estimator()
    student = trainable_copy(teacher)
    critic = trainable_copy(toy_estimator(1), head=DiffusionGANHead(8, 4, groups=2))
    teacher.requires_grad_(False).eval()
    x = student(normal(4, 2, 4, 4), torch.full((4,), 2.0))
    data = normal(4, 2, 4, 4, seed=1)
    return Cast(teacher, student, critic, DiffusionGANHead(8, 4, groups=2), x, data)


def dm(run: Cast) -> Tensor:
    loss = DistributionMatchingLoss(TIMES)
    return loss(run.x, real=run.teacher, fake=run.critic).loss


def generator_side(discriminator: Callable[[Cast], Discriminator]):
    def loss(run: Cast) -> Tensor:
        gan = DiffusionGANLoss(TIMES)
        return gan.generator(run.x, discriminator=discriminator(run)).loss

    return loss


def discriminator_side(discriminator: Callable[[Cast], Discriminator]):
    def loss(run: Cast) -> Tensor:
        # The sample comes with its graph: the loss itself must cut it.
        return (
            DiffusionGANLoss(TIMES)
            .discriminator(
                run.x, None, run.data, None, discriminator=discriminator(run)
            )
            .loss
        )

    return loss


def denoising(run: Cast) -> Tensor:
    return DenoisingLoss(TIMES)(run.x, denoiser=run.critic).loss


def regression(run: Cast) -> Tensor:
    return RegressionLoss()(run.x, run.data).loss


def paper(run: Cast) -> ScoreEstimator:
    return run.critic


def on_teacher(run: Cast) -> FeatureDiscriminator:
    return run.on_teacher


STUDENT = {"student"}
TABLE = [
    # loss, what is frozen, what it reaches
    ("dm", dm, "critic", STUDENT),
    ("dm", dm, "", STUDENT),
    ("gan generator", generator_side(paper), "critic", STUDENT),
    ("gan generator", generator_side(paper), "", STUDENT | {"encoder", "head"}),
    ("gan generator on teacher", generator_side(on_teacher), "separate head", STUDENT),
    (
        "gan generator on teacher",
        generator_side(on_teacher),
        "",
        STUDENT | {"separate head"},
    ),
    ("regression", regression, "critic", STUDENT),
    ("regression", regression, "", STUDENT),
    ("denoising", denoising, "", {"encoder", "decoder"}),
    ("gan discriminator", discriminator_side(paper), "", {"encoder", "head"}),
    (
        "gan discriminator on teacher",
        discriminator_side(on_teacher),
        "",
        {"separate head"},
    ),
]


@contextmanager
def freezing(run: Cast, what: str) -> Iterator[None]:
    modules = {"critic": run.critic, **run.modules}
    with frozen(modules[what]) if what else nullcontext():
        yield


@pytest.mark.parametrize(
    ("loss", "what", "reached"),
    [row[1:] for row in TABLE],
    ids=[f"{row[0]}{', frozen ' + row[2] if row[2] else ''}" for row in TABLE],
)
def test_a_loss_reaches_exactly(
    run: Cast, loss: Callable[[Cast], Tensor], what: str, reached: set[str]
) -> None:
    with freezing(run, what):
        loss(run).backward()
    assert {n for n, m in run.modules.items() if has_gradient(m)} == reached
    for name, module in run.modules.items():
        if name not in reached:
            assert all(p.grad is None for p in module.parameters()), name


def test_generator_turn_then_critic_turn(run: Cast) -> None:
    """The loop of the paper: the sum of the losses on each turn, on one sample."""
    with frozen(run.critic):
        (dm(run) + generator_side(paper)(run)).backward()
    assert {n for n, m in run.modules.items() if has_gradient(m)} == STUDENT
    run.student.zero_grad()
    (denoising(run) + discriminator_side(paper)(run)).backward()
    reached = {n for n, m in run.modules.items() if has_gradient(m)}
    assert reached == {"encoder", "decoder", "head"}
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_dm_gradient_at_the_student_is_the_chain_rule(run: Cast) -> None:
    """What reaches the weights is g / n through the student, nothing else."""
    loss = DistributionMatchingLoss(TIMES)
    out = loss(run.x, real=run.teacher, fake=run.critic)
    parameters = list(run.student.parameters())
    got = torch.autograd.grad(out.loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(
        run.x, parameters, grad_outputs=out.gradient / run.x.numel()
    )
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_teacher_and_critic_build_no_graph_for_dm(run: Cast) -> None:
    """Their activations are not saved: nothing is recorded while they run."""
    modes: list[bool] = []
    for estimator in (run.teacher, run.critic):
        estimator.register_forward_hook(
            lambda *_: modes.append(torch.is_grad_enabled())
        )
    dm(run)
    assert modes == [False, False]


def test_gan_terms_of_generator_and_critic_are_adversaries(run: Cast) -> None:
    """A step of each moves the logits of the same noisy samples opposite ways."""
    gan, t, noise = DiffusionGANLoss(TIMES), torch.ones(4), normal(4, 2, 4, 4, seed=2)

    def logits() -> Tensor:
        with torch.no_grad():
            x = run.student(normal(4, 2, 4, 4), torch.full((4,), 2.0))
            return run.critic.logits(x + noise, t).mean()

    before = logits()
    with frozen(run.critic):
        out = gan.generator(run.x, discriminator=run.critic, t=t, noise=noise)
        out.loss.backward()
    torch.optim.SGD(run.student.parameters(), 0.01).step()
    assert logits() > before

    def judge() -> GANDiscriminatorOutput:
        x = run.student(normal(4, 2, 4, 4), torch.full((4,), 2.0))
        return gan.discriminator(
            x,
            None,
            run.data,
            None,
            discriminator=run.critic,
            t=t,
            noise=noise,
            t_real=t,
            noise_real=noise,
        )

    first = judge()
    first.loss.backward()
    torch.optim.SGD(run.critic.parameters(), 0.01).step()
    assert judge().loss < first.loss
