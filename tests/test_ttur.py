import pytest
import torch
from helpers_script import as_in_a_script
from helpers_training import tiny_trio
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmdkit import (
    BackwardSimulator,
    DenoisingLoss,
    DiffusionGANLoss,
    DiscreteUniformTime,
    DistributionMatchingLoss,
    TTURCounts,
    TTURScheduler,
    few_step_times,
    frozen,
)

RUNGS = few_step_times(4)
EVENTS_OF_OFFICIAL_DMD2 = [
    # Generator first; the critic on the same sample, from before the generator's
    # step, at every iteration.
    "0: generate with gradient",
    "0: generator loss",
    "0: generator step",
    "0: critic loss on the sample of 0, student of 0 steps",
    "0: critic step",
    "1: generate without gradient",
    "1: critic loss on the sample of 1, student of 1 steps",
    "1: critic step",
    "2: generate without gradient",
    "2: critic loss on the sample of 2, student of 1 steps",
    "2: critic step",
    "3: generate with gradient",
    "3: generator loss",
    "3: generator step",
    "3: critic loss on the sample of 3, student of 1 steps",
    "3: critic step",
    "4: generate without gradient",
    "4: critic loss on the sample of 4, student of 2 steps",
    "4: critic step",
]
EVENTS_WITH_EXCLUSIVE_TURNS = [
    "0: generate with gradient",
    "0: generator loss",
    "0: generator step",
    "1: generate without gradient",
    "1: critic loss on the sample of 1, student of 1 steps",
    "1: critic step",
    "2: generate without gradient",
    "2: critic loss on the sample of 2, student of 1 steps",
    "2: critic step",
    "3: generate with gradient",
    "3: generator loss",
    "3: generator step",
    "4: generate without gradient",
    "4: critic loss on the sample of 4, student of 2 steps",
    "4: critic step",
]


class Draws:
    """Everything random in one step on a batch of eight, to be sliced."""

    def __init__(self, step: int, batch: int = 8, dim: int = 3) -> None:
        g = torch.Generator().manual_seed(step)

        def noise() -> Tensor:
            return torch.randn(batch, dim, dtype=torch.float64, generator=g)

        def time() -> Tensor:
            return torch.randint(20, 980, (batch,), generator=g).float()

        self.rung = int(torch.randint(4, (), generator=g))
        self.labels = torch.randint(4, (batch,), generator=g)
        self.real_labels = torch.randint(4, (batch,), generator=g)
        self.real, self.noise = noise(), noise()
        self.simulation = [noise() for _ in range(self.rung)]
        self.noises = [noise() for _ in range(5)]
        self.times = [time() for _ in range(5)]


class Loop:
    """The loop of DMD2 as a user writes it, accumulating over micro-batches."""

    def __init__(
        self,
        ttur: TTURScheduler,
        *,
        micro_batches: int = 1,
        generator_rate: float = 0.5,
        critic_rate: float = 0.5,
        step_at_once: bool = False,
    ) -> None:
        self.ttur, self.micro_batches = ttur, micro_batches
        # Stepping the generator before the critic's backward, as official code does.
        self.step_at_once = step_at_once
        self.teacher, self.student, self.critic = tiny_trio()
        self.of_student = torch.optim.SGD(self.student.parameters(), generator_rate)
        self.of_critic = torch.optim.SGD(self.critic.parameters(), critic_rate)
        times = DiscreteUniformTime(20, 981)
        self.dm, self.gan = DistributionMatchingLoss(times), DiffusionGANLoss(times)
        self.denoising = DenoisingLoss(times)
        self.events: list[str] = []
        self.student_steps = 0

    def run(self, steps: int) -> "Loop":
        for step in range(steps):
            self._step(step)
        return self

    def _step(self, step: int) -> None:
        draws, n = Draws(step), self.micro_batches
        generator_turn = self.ttur.generator_turn(step)
        for part in torch.arange(8).chunk(n):
            x = self._generate(step, draws, part)
            if generator_turn:
                before = self._critic_gradients()
                (self._generator_loss(step, x, draws, part) / n).backward()
                for one, other in zip(before, self._critic_gradients(), strict=True):
                    assert torch.equal(one, other)
                if self.step_at_once:
                    self._step_generator(step)
            if self.ttur.critic_turn(step):
                (self._critic_loss(step, x.detach(), draws, part) / n).backward()
        if generator_turn and not self.step_at_once:
            self._step_generator(step)
        if self.ttur.critic_turn(step):
            self.of_critic.step()
            self.of_critic.zero_grad()
            self.events.append(f"{step}: critic step")

    def _step_generator(self, step: int) -> None:
        self.of_student.step()
        self.of_student.zero_grad()
        self.student_steps += 1
        self.events.append(f"{step}: generator step")

    def _generate(self, step: int, draws: Draws, part: Tensor) -> Tensor:
        self.made_at = step, self.student_steps
        labels = draws.labels[part]
        x_t, t, _ = BackwardSimulator(RUNGS)(
            self.student,
            draws.noise[part],
            labels,
            rung=draws.rung,
            draws=[noise[part] for noise in draws.simulation],
        )
        learns = self.ttur.generator_turn(step)
        with torch.set_grad_enabled(learns):
            x = self.student(x_t, t, labels)
        word = "with" if x.requires_grad else "without"
        self.events.append(f"{step}: generate {word} gradient")
        return x

    def _generator_loss(
        self, step: int, x: Tensor, draws: Draws, part: Tensor
    ) -> Tensor:
        labels = draws.labels[part]
        t, noise = [v[part] for v in draws.times], [v[part] for v in draws.noises]
        with frozen(self.critic):
            dm = self.dm(
                x, labels, real=self.teacher, fake=self.critic, t=t[0], noise=noise[0]
            )
            gan = self.gan.generator(
                x, labels, discriminator=self.critic, t=t[1], noise=noise[1]
            )
        self.events.append(f"{step}: generator loss")
        return dm.loss + 0.1 * gan.loss

    def _critic_loss(self, step: int, x: Tensor, draws: Draws, part: Tensor) -> Tensor:
        labels = draws.labels[part]
        t, noise = [v[part] for v in draws.times], [v[part] for v in draws.noises]
        denoising = self.denoising(
            x, labels, denoiser=self.critic, t=t[2], noise=noise[2]
        )
        gan = self.gan.discriminator(
            x,
            labels,
            draws.real[part],
            draws.real_labels[part],
            discriminator=self.critic,
            t=t[3],
            noise=noise[3],
            t_real=t[4],
            noise_real=noise[4],
        )
        made, steps = self.made_at
        self.events.append(
            f"{step}: critic loss on the sample of {made}, student of {steps} steps"
        )
        return denoising.loss + 0.1 * gan.loss

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._parameters()])

    def _critic_gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self.critic.parameters()]
        return [torch.zeros(()) if g is None else g.clone() for g in gradients]

    def _parameters(self):
        yield from self.student.parameters()
        yield from self.critic.parameters()


def test_the_order_of_one_run_is_that_of_official_dmd2() -> None:
    loop = Loop(TTURScheduler(3), step_at_once=True).run(5)
    assert loop.events == EVENTS_OF_OFFICIAL_DMD2


def test_exclusive_turns_leave_the_critic_out_on_the_generator_s() -> None:
    ttur = TTURScheduler(3, critic_on_generator_turn=False)
    assert Loop(ttur).run(5).events == EVENTS_WITH_EXCLUSIVE_TURNS


def test_eight_micro_batches_equal_one_batch() -> None:
    start = Loop(TTURScheduler(3)).weights()
    whole = Loop(TTURScheduler(3)).run(7).weights()
    parts = Loop(TTURScheduler(3), micro_batches=8).run(7).weights()
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    assert (whole - start).abs().max() > 1e-2


def test_accumulating_before_the_steps_equals_the_official_order() -> None:
    official = Loop(TTURScheduler(3), step_at_once=True).run(7).weights()
    accumulated = Loop(TTURScheduler(3)).run(7).weights()
    torch.testing.assert_close(accumulated, official, rtol=0, atol=0)


def test_stepping_at_once_with_micro_batches_would_be_something_else() -> None:
    whole = Loop(TTURScheduler(3)).run(7).weights()
    wrong = Loop(TTURScheduler(3), micro_batches=8, step_at_once=True).run(7)
    assert (wrong.weights() - whole).abs().max() > 1e-4


def test_asynchronous_learning_rates_need_one_critic_step_and_two_optimizers() -> None:
    # Appendix C's alternative: both networks at every iteration, the critic faster.
    slow = Loop(TTURScheduler(1), generator_rate=0.1, critic_rate=0.1)
    fast = Loop(TTURScheduler(1), generator_rate=0.1, critic_rate=0.5)
    before = slow.weights()
    moved, moved_fast = slow.run(1).weights() - before, fast.run(1).weights() - before
    n = sum(p.numel() for p in slow.student.parameters())
    assert moved[:n].norm() > 0
    torch.testing.assert_close(moved_fast[:n], moved[:n])
    torch.testing.assert_close(moved_fast[n:], 5 * moved[n:])
    slow.run(3)
    assert sum("generator step" in event for event in slow.events) == 4
    assert sum("critic step" in event for event in slow.events) == 4


def test_five_means_five_to_one_and_exclusively_four_to_one() -> None:
    inclusive = TTURScheduler(5)
    assert inclusive.counts(200_000) == TTURCounts(40_000, 40_000, 200_000)
    exclusive = TTURScheduler(5, critic_on_generator_turn=False)
    assert exclusive.counts(200_000) == TTURCounts(40_000, 40_000, 160_000)
    assert [inclusive.generator_turn(step) for step in range(6)] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert TTURScheduler() == inclusive


@given(ratio=st.integers(2, 12), step=st.integers(0, 60), inclusive=st.booleans())
def test_counts_are_those_of_counting(ratio: int, step: int, inclusive: bool) -> None:
    ttur = TTURScheduler(ratio, critic_on_generator_turn=inclusive)
    counts = ttur.counts(step)
    assert counts.generator_updates == sum(map(ttur.generator_turn, range(step)))
    assert counts.critic_updates == sum(map(ttur.critic_turn, range(step)))
    assert counts.cycles * ratio <= step < (counts.cycles + 1) * ratio
    # Whoever resumes is told the same as whoever never stopped.
    assert ttur.generator_turn(step) == ttur.generator_turn(step + ratio)
    assert ttur.generator_turn(step) or ttur.critic_turn(step)


def test_bad_ratios_are_named() -> None:
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        TTURScheduler(0)
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        TTURScheduler(1, critic_on_generator_turn=False)
    with as_in_a_script(), pytest.raises(TypeError, match=r"got 2\.5, expected a"):
        TTURScheduler(2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="critic_steps: got True"):
        TTURScheduler(True)
    with pytest.raises(ValueError, match="step: got -1"):
        TTURScheduler().counts(-1)
