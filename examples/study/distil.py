"""One training run of the study: a cell, a data set, a seed."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from study.cells import Cell
from study.datasets import Data
from study.families import family, in_family, student_times
from torch import Tensor, nn

from dmdkit import (
    BackwardSimulator,
    ClassifierFreeGuidance,
    DenoisingLoss,
    DiffusionGANHead,
    DiffusionGANLoss,
    DistributionMatchingLoss,
    ExponentialMovingAverage,
    HeunSampler,
    Monitor,
    NoisedData,
    NonFiniteError,
    RegressionLoss,
    ScoreEstimator,
    SharedCriticLoss,
    SharedGeneratorLoss,
    TTURScheduler,
    frozen,
    karras_sigmas,
    trainable_copy,
)

PAIRS = 4096
PAIR_CALLS = 18
"""Times of the teacher's Heun sampler that makes pairs (35 calls)."""


@dataclass(frozen=True)
class Training:
    """What is the same for every cell."""

    batch_size: int = 32
    average_over: float = 100.0
    """Critic updates over which the student's weights are averaged (EMA): the
    estimator that every number is of."""
    discriminator_weight: float = 1e-2
    max_gradient_norm: float = 10.0


class Run:
    """Networks, optimizers and losses of one cell, and its iteration."""

    def __init__(
        self, data: Data, cell: Cell, seed: int, training: Training | None = None
    ) -> None:
        self.data, self.cell = data, cell
        self.training = training or Training()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.rung_generator = torch.Generator().manual_seed(seed)
        self.images, self.labels, *_ = data.images

        teacher = in_family(data.load_teacher(), cell.family, data.sigma_data)
        head = DiffusionGANHead(channels=64, resolution=4, groups=8)
        self.student = trainable_copy(teacher)
        self.critic = trainable_copy(teacher, head=head if cell.gan_weight else None)
        self.teacher: ScoreEstimator | ClassifierFreeGuidance = teacher
        if cell.guidance != 1:
            self.teacher = ClassifierFreeGuidance(
                teacher, lambda c: torch.full_like(c, data.null_class), cell.guidance
            )
        chosen = family(cell.family, data.sigma_data)
        self.dm_loss = DistributionMatchingLoss(chosen.dm_times)
        self.critic_loss = DenoisingLoss(chosen.times, chosen.weight)
        self.gan_loss = DiffusionGANLoss(chosen.times)
        self.shared_critic_loss = SharedCriticLoss(self.critic_loss, self.gan_loss)
        self.shared_generator_loss = SharedGeneratorLoss(self.dm_loss)
        self.regression_loss = RegressionLoss()
        times = student_times(cell.family, cell.steps)
        self.sampler = BackwardSimulator(times)
        self.inputs = self.sampler if cell.backward_simulation else NoisedData(times)
        self.ttur = TTURScheduler(cell.critic_steps)
        self.pairs, self.preparation = None, 0.0
        if cell.regression_weight:
            self.pairs, self.preparation = pairs_of(data)

        rate = cell.learning_rate
        if cell.pretraining:
            rate /= 4  # DMD2, F.2: 2e-6, then 5e-7 with the GAN
        self.optimizers = {
            "student": _adamw(self.student, rate),
            "critic": _adamw(self.critic, rate * cell.critic_rate),
        }
        decay = math.exp(-cell.critic_steps / self.training.average_over)
        self.average = ExponentialMovingAverage(self.student.network, (decay,))
        self.monitor = Monitor()
        self.generator_updates = 0

    def iterate(self, step: int) -> None:
        """One critic update, and on the generator's turn one of the student."""
        cell, size = self.cell, self.training.batch_size
        turn = self.ttur.generator_turn(step)
        real = None
        labels = torch.randint(self.data.classes, (size,), generator=self.generator)
        if not cell.backward_simulation:
            real, labels = self._real(size)  # noised data come with their own labels
        noise = torch.randn(size, *self.data.shape, generator=self.generator)
        x_t, t, _ = self.inputs(
            self.student,
            noise,
            labels,
            rung_generator=self.rung_generator,
            generator=self.generator,
            data=real,
        )
        with torch.set_grad_enabled(turn):
            x = self.student(x_t, t, labels)
        losses: dict[str, Any] = {}
        if turn:
            with frozen(self.critic.network):
                total, losses = self._generator_losses(x, labels)
                total.backward()
        total, critic_losses = self._critic_losses(x.detach(), labels)
        total.backward()
        self.monitor.require_finite(**losses, **critic_losses)
        self._update("student", "critic") if turn else self._update("critic")
        if turn:
            self.generator_updates += 1
            self.average.update(self.student.network)

    def _generator_losses(
        self, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        cell, generator = self.cell, self.generator
        losses: dict[str, Any] = {}
        total = torch.zeros(())
        if cell.shared_generator_pass:
            both = self.shared_generator_loss(
                x, labels, real=self.teacher, critic=self.critic, generator=generator
            )
            losses = {"dm": both.distribution_matching, "gan": both.gan}
            total = both.distribution_matching.loss + cell.gan_weight * both.gan.loss
            return total, losses
        if cell.distribution_matching:
            losses["dm"] = self.dm_loss(
                x, labels, real=self.teacher, fake=self.critic, generator=generator
            )
            total = total + losses["dm"].loss
        if cell.gan_weight:
            losses["gan"] = self.gan_loss.generator(
                x, labels, discriminator=self.critic, generator=generator
            )
            total = total + cell.gan_weight * losses["gan"].loss
        if self.pairs is not None:
            noise, pair_labels, targets = self.pairs
            rows = torch.randint(len(noise), (len(x),), generator=self.generator)
            t = torch.full((len(x),), self.sampler.times[0])
            start = self.student.process.prior(noise[rows], t)
            made = self.student(start, t, pair_labels[rows])
            losses["regression"] = self.regression_loss(made, targets[rows])
            total = total + cell.regression_weight * losses["regression"].loss
        return total, losses

    def _critic_losses(
        self, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        weight = self.training.discriminator_weight
        if self.cell.shared_critic_pass:
            both = self.shared_critic_loss(
                x,
                labels,
                *self._real(len(x)),
                critic=self.critic,
                generator=self.generator,
            )
            losses = {"critic": both.denoising, "discriminator": both.discriminator}
            return both.denoising.loss + weight * both.discriminator.loss, losses
        losses: dict[str, Any] = {
            "critic": self.critic_loss(
                x, labels, denoiser=self.critic, generator=self.generator
            )
        }
        total = losses["critic"].loss
        if self.cell.gan_weight:
            losses["discriminator"] = self.gan_loss.discriminator(
                x,
                labels,
                *self._real(len(x)),
                discriminator=self.critic,
                generator=self.generator,
            )
            total = total + weight * losses["discriminator"].loss
        return total, losses

    def _real(self, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.images), (size,), generator=self.generator)
        return self.images[rows], self.labels[rows]

    def _update(self, *names: str) -> None:
        networks = {"student": self.student, "critic": self.critic}
        for name in names:
            norm = nn.utils.clip_grad_norm_(
                networks[name].parameters(), self.training.max_gradient_norm
            )
            if not bool(norm.isfinite()):
                raise NonFiniteError(f"the gradient of the {name} is not finite.")
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def draw(self, noise: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Samples from the average of the student's weights."""
        with self.average.applied_to(self.student.network):
            return self.draw_last(noise, labels, generator)

    def draw_last(
        self, noise: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Samples from the last weights."""
        return self.sampler.sample(self.student, noise, labels, generator=generator)


def _adamw(denoiser: ScoreEstimator, learning_rate: float) -> torch.optim.AdamW:
    """At a constant rate, with the paper's betas and weight decay."""
    return torch.optim.AdamW(
        denoiser.parameters(), learning_rate, betas=(0.9, 0.999), weight_decay=0.01
    )


Pairs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Noise, labels, and what the teacher's ODE makes of them."""


@functools.cache
def pairs_of(data: Data) -> tuple[Pairs, float]:
    """The pairs of DMD's regression, one set for all seeds, and their CPU seconds."""
    started = time.process_time()
    pairs = make_pairs(data, PAIRS)
    return pairs, time.process_time() - started


def make_pairs(data: Data, count: int) -> Pairs:
    """Draws noise and labels, and solves the teacher's ODE from them."""
    generator = torch.Generator().manual_seed(1_000_000)
    noise = torch.randn(count, *data.shape, generator=generator)
    labels = torch.randint(data.classes, (count,), generator=generator)
    teacher, sampler = data.load_teacher(), HeunSampler(karras_sigmas(PAIR_CALLS))
    parts = zip(noise.split(256), labels.split(256), strict=True)
    return noise, labels, torch.cat([sampler(teacher, n, c) for n, c in parts])


@dataclass
class Trained:
    """A run that has ended."""

    run: Run
    seconds: float = 0.0
    """CPU time of the training on one thread, making all pairs included."""
    critic_updates: int = 0
    generator_updates: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


def train(
    data: Data,
    cell: Cell,
    seed: int,
    budget: int,
    measure: Callable[[Run], dict[str, float]],
    every: int | None = None,
    training: Training | None = None,
) -> Trained:
    """Trains a cell, in two stages if it has them, and measures as it goes.

    Args:
        data: The data set.
        cell: The cell.
        seed: Of weights of the head, batches, noise and times.
        budget: Critic updates of one stage of length 1.
        measure: Gives the numbers of a point of the curves.
        every: Critic updates between points; None is a point at the end alone.
        training: What is the same for all cells.

    Returns:
        The trained student and its curves.
    """
    stages = [(cell, cell.budgets)]
    if cell.pretraining:
        first = replace(cell, gan_weight=0.0, pretraining=0.0)
        stages.insert(0, (first, cell.pretraining))
    done, seconds, updates = 0, 0.0, 0
    curve: list[dict[str, float]] = []
    run: Run | None = None
    before: Run | None = None
    for stage, budgets in stages:
        run = Run(data, stage, seed, training)
        seconds += run.preparation
        if before is not None:
            _take_over(run, before)
            updates += before.generator_updates
        iterations = round(budgets * budget)
        for step in range(iterations):
            if every and step % every == 0:
                curve.append(_point(run, done, updates, seconds, measure))
            started = time.process_time()
            run.iterate(step)
            seconds += time.process_time() - started
            done += 1
        before = run
    assert run is not None
    curve.append(_point(run, done, updates, seconds, measure))
    return Trained(run, seconds, done, updates + run.generator_updates, curve)


def _take_over(run: Run, before: Run) -> None:
    """Goes on with the networks of the stage before; the head is new."""
    with before.average.applied_to(before.student.network):
        run.student.network.load_state_dict(before.student.network.state_dict())
    body = run.critic.network.network
    assert isinstance(body, nn.Module)  # of the critic with a head
    body.load_state_dict(before.critic.network.state_dict())
    run.average = ExponentialMovingAverage(
        run.student.network, tuple(run.average.averages)
    )


def _point(
    run: Run,
    done: int,
    updates: int,
    seconds: float,
    measure: Callable[[Run], dict[str, float]],
) -> dict[str, float]:
    return {
        "critic_updates": done,
        "generator_updates": updates + run.generator_updates,
        "seconds": round(seconds, 2),
        **measure(run),
    }
