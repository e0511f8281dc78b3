r"""Inputs for few-step students, and sampling from them: one loop (DMD2, 4.4 and 4.5).

A student with N times $t_1 > ... > t_N$ alternates denoising and fresh noise:
$x_{i+1} = \alpha_{i+1} G(x_i, t_i) + \sigma_{i+1} \epsilon$. Which of these inputs it
is trained on is a rung, 0 ... N - 1; a one-step student has one rung.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.sampling.common import (
    Draws,
    check_draws,
    check_times,
    draw_rung,
    fill,
    fresh_noise,
)
from dmdkit.types import Condition, Denoiser, Latent, Time


class StudentInput(NamedTuple):
    """What a student is trained on.

    Attributes:
        x_t: The noisy input, [b, ...].
        t: Its times, fp32 [b].
        rung: The rung of the batch, or of each sample, [b].
    """

    x_t: Latent
    t: Time
    rung: int | Tensor


@runtime_checkable
class InputPolicy(Protocol):
    """What chooses a student's training inputs.

    `BackwardSimulator`, `PerSampleSimulator` and `NoisedData` can be exchanged.
    """

    def __call__(
        self,
        student: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        rung: int | None = None,
        rung_generator: torch.Generator | None = None,
        generator: torch.Generator | None = None,
        data: Latent | None = None,
    ) -> StudentInput:
        """Gives the input for one iteration.

        Args:
            student: The student.
            noise: The noise of the input, [b, ...].
            cond: The condition.
            rung: The rung; drawn if None.
            rung_generator: A CPU generator, seeded alike on every rank.
            generator: Source of any other noise, on the device of `noise`.
            data: Real samples, [b, ...], for a policy that noises them.

        Returns:
            The input, its times and its rung.
        """
        ...


@dataclass(frozen=True)
class BackwardSimulator:
    """Backward simulation: training inputs as inference will see them (DMD2, 4.5).

    One rung is shared by the batch, and by all ranks if they share its generator, so
    that all make the same number of student calls. The simulated trajectory starts from
    noise of its own and takes fresh noise at every step, as in official DMD2:
    correlated noise gives artifacts. `sample` is the same loop run to the end.

    Attributes:
        times: The student's times in falling order: (999, 749, 499, 249) for SDXL,
            (999,) for SD1.5, (80,) for ImageNet-64 (see `few_step_times`).

    Examples:
        >>> import torch
        >>> from dmdkit import BackwardSimulator, few_step_times
        >>> simulator = BackwardSimulator(few_step_times(4))
        >>> shared = torch.Generator().manual_seed(0)  # alike on every rank
        >>> simulator.draw_rung(shared)
        0
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        check_times(self.times)

    def draw_rung(self, rung_generator: torch.Generator) -> int:
        """Draws a rung, uniform over the times.

        Args:
            rung_generator: A CPU generator, seeded alike on every rank.

        Returns:
            A number in 0 ... N - 1.
        """
        return draw_rung(len(self.times), None, rung_generator)

    @checked
    def __call__(
        self,
        student: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        rung: int | None = None,
        rung_generator: torch.Generator | None = None,
        generator: torch.Generator | None = None,
        data: Latent | None = None,
        draws: Draws = None,
    ) -> StudentInput:
        """Simulates the student's own input at one rung, without gradients.

        Args:
            student: The student; called exactly `rung` times.
            noise: The noise of the input itself, [b, ...]; pure noise at rung 0.
            cond: The condition.
            rung: The rung; drawn from `rung_generator` if None.
            rung_generator: A CPU generator, seeded alike on every rank.
            generator: Source of the simulation's own noise, on the device of `noise`.
            data: Not looked at: simulation needs no real data.
            draws: The simulation's own noise, `rung` tensors of the shape of `noise`,
                instead of drawing it.

        Returns:
            The input and its times.

        Raises:
            ValueError: If a shape, a time or the rung is out of range, or neither
                `rung` nor `rung_generator` is given for several times.
            TypeError: If a dtype or the student is wrong.
        """
        del data
        rung = draw_rung(len(self.times), rung, rung_generator)
        check_draws(draws, rung, noise)
        with torch.no_grad():
            own = iter(draws) if draws is not None else fresh_noise(noise, generator)
            fresh = [*(next(own) for _ in range(rung)), noise]
            for x_t, t, _ in self._inputs(student, iter(fresh), cond, rung):
                reached = StudentInput(x_t, t, rung)
        return reached  # pyright: ignore[reportPossiblyUnboundVariable]

    @checked
    def sample(
        self,
        student: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        generator: torch.Generator | None = None,
        draws: Draws = None,
    ) -> Latent:
        """Draws from the student: the loop of DMD2, section 4.4, to the end.

        Args:
            student: The student; called once a time.
            noise: Standard normal noise to start from, [b, ...].
            cond: The condition.
            generator: Source of the fresh noise, on the device of `noise`.
            draws: The fresh noise, N - 1 tensors of the shape of `noise`, instead of
                drawing it.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If a shape or a time is wrong.
            TypeError: If a dtype or the student is wrong.
        """
        last = len(self.times) - 1
        check_draws(draws, last, noise)
        own = iter(draws) if draws is not None else fresh_noise(noise, generator)

        def all_noise() -> Iterator[Tensor]:
            yield noise
            yield from own

        with torch.no_grad():
            *_, (x_t, t, _) = self._inputs(student, all_noise(), cond, last)
            return student(x_t, t, cond)

    def _inputs(
        self, student: Denoiser, noises: Iterator[Tensor], cond: Condition, last: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yields the student's inputs at rungs 0 ... last, calling it in between."""
        process: NoiseProcess = student.process
        for time in self.times:
            process.check_time(time)
        noise = next(noises)
        t = fill(self.times[0], noise)
        x_t = process.prior(noise, t)
        yield x_t, t, 0
        for i in range(1, last + 1):
            x0 = student(x_t, t, cond)
            t = fill(self.times[i], noise)
            x_t = process.add_noise(x0, next(noises), t)
            yield x_t, t, i
