r"""Inputs for few-step students, and sampling from them: one loop (DMD2, 4.4 and 4.5).

A student with N times $t_1 > ... > t_N$ alternates denoising and fresh noise:
$x_{i+1} = \alpha_{i+1} G(x_i, t_i) + \sigma_{i+1} \epsilon$. Which of these inputs it
is trained on is a rung, 0 ... N - 1; a one-step student has one rung.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmdkit._checked import checked, describe
from dmdkit._random import check_generator, noise_like
from dmdkit.diffusion.processes import NoiseProcess, expand_as
from dmdkit.types import Condition, Denoiser, Latent, Time

Draws = Sequence[Tensor] | None


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
        """Gives the input for one iteration."""
        ...


def _check_times(times: tuple[float | int, ...]) -> None:
    if not isinstance(times, tuple) or not times:
        raise TypeError(f"times: got {times!r}, expected a tuple of numbers.")
    if any(b >= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"times: got {times}, expected falling values.")


def _check_rung(rung: int, rungs: int) -> None:
    if not 0 <= rung < rungs:
        raise ValueError(f"rung: got {rung}, expected 0 ... {rungs - 1}.")


def _draw_rung(
    rungs: int, rung: int | None, rung_generator: torch.Generator | None
) -> int:
    if rung is not None and rung_generator is not None:
        raise ValueError("rung: give either `rung` or `rung_generator`, not both.")
    if rung is not None:
        _check_rung(rung, rungs)
        return rung
    if rungs == 1:
        return 0
    if rung_generator is None:
        raise ValueError(
            "rung: with several times pass `rung`, or `rung_generator`, a CPU "
            "generator seeded alike on every rank, so that all take the same rung."
        )
    check_generator(rung_generator, "cpu")
    return int(torch.randint(rungs, (), generator=rung_generator))


def _fill(time: float | int, like: Tensor) -> Time:
    return torch.full((like.shape[0],), time, dtype=torch.float32, device=like.device)


def _check_draws(draws: Draws, count: int, like: Tensor) -> None:
    if draws is None:
        return
    if len(draws) != count:
        raise ValueError(f"draws: got {len(draws)} tensors, expected {count}.")
    for i, value in enumerate(draws):
        if value.shape != like.shape:
            raise ValueError(
                f"draws[{i}]: got shape {list(value.shape)}, expected that of noise, "
                f"{list(like.shape)}."
            )


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
        _check_times(self.times)

    def draw_rung(self, rung_generator: torch.Generator) -> int:
        """Draws a rung, uniform over the times.

        Args:
            rung_generator: A CPU generator, seeded alike on every rank.

        Returns:
            A number in 0 ... N - 1.
        """
        return _draw_rung(len(self.times), None, rung_generator)

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
        rung = _draw_rung(len(self.times), rung, rung_generator)
        _check_draws(draws, rung, noise)
        with torch.no_grad():
            own = iter(draws) if draws is not None else _fresh(noise, generator)
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
            draws: The fresh noise, N - 1 tensors, instead of drawing it.

        Returns:
            The samples, [b, ...].

        Raises:
            ValueError: If a shape or a time is wrong.
            TypeError: If a dtype or the student is wrong.
        """
        last = len(self.times) - 1
        _check_draws(draws, last, noise)
        own = iter(draws) if draws is not None else _fresh(noise, generator)

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
        t = _fill(self.times[0], noise)
        x_t = process.prior(noise, t)
        yield x_t, t, 0
        for i in range(1, last + 1):
            x0 = student(x_t, t, cond)
            t = _fill(self.times[i], noise)
            x_t = process.add_noise(x0, next(noises), t)
            yield x_t, t, i


def _fresh(like: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
    while True:
        yield noise_like(like, generator)


@dataclass(frozen=True)
class PerSampleSimulator:
    """Backward simulation with a rung for each sample, as CausVid has it.

    Every rank makes all N - 1 student calls, so no rung need be shared.

    Attributes:
        times: The student's times in falling order.
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        _check_times(self.times)

    @checked
    def __call__(
        self,
        student: Denoiser,
        noise: Latent,
        cond: Condition = None,
        *,
        rung: int | Tensor | None = None,
        rung_generator: torch.Generator | None = None,
        generator: torch.Generator | None = None,
        data: Latent | None = None,
    ) -> StudentInput:
        """Simulates all rungs and takes one for each sample, without gradients.

        Args:
            student: The student; called N - 1 times.
            noise: The noise of the inputs themselves, [b, ...]; pure noise at rung 0.
            cond: The condition.
            rung: The rungs, int64 [b], or one for all; drawn if None.
            rung_generator: Source of the rungs, on the CPU; each rank's own will do.
            generator: Source of the simulation's own noise, on the device of `noise`.
            data: Not looked at.

        Returns:
            The inputs, their times and rungs, [b].

        Raises:
            ValueError: If a shape, a time or a rung is wrong.
            TypeError: If a dtype or the student is wrong.
        """
        del data
        batch, rungs = noise.shape[0], len(self.times)
        if rung is None:
            check_generator(rung_generator, "cpu")
            rung = torch.randint(rungs, (batch,), generator=rung_generator)
        elif not isinstance(rung, Tensor):
            _check_rung(rung, rungs)
            rung = torch.full((batch,), rung)
        if rung.dtype != torch.int64 or rung.shape != (batch,):
            raise ValueError(
                f"rung: got {describe(rung)}, expected int64[{batch}], one a sample."
            )
        rung = rung.to(noise.device)
        simulator = BackwardSimulator(self.times)
        with torch.no_grad():
            times = torch.tensor(self.times, dtype=torch.float32, device=noise.device)
            t = times[rung]
            x_t = student.process.prior(noise, t)
            inputs = simulator._inputs(
                student, _fresh(noise, generator), cond, rungs - 1
            )
            before, before_t, _ = next(inputs)
            for i in range(1, rungs):
                x0 = student(before, before_t, cond)
                chosen = expand_as(rung == i, noise)
                x_t = torch.where(chosen, student.process.add_noise(x0, noise, t), x_t)
                before_t = _fill(self.times[i], noise)
                before = student.process.add_noise(
                    x0, noise_like(noise, generator), before_t
                )
        return StudentInput(x_t, t, rung)


@dataclass(frozen=True)
class NoisedData:
    """Noised real data as inputs: the mismatch that backward simulation removes.

    The ablation "without backward simulation" of DMD2, Table 4, and the default of
    several later codebases. At the first rung the input is pure noise all the same.

    Attributes:
        times: The student's times in falling order.
    """

    times: tuple[float | int, ...]

    def __post_init__(self) -> None:
        """Checks the times."""
        _check_times(self.times)

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
    ) -> StudentInput:
        """Noises real data to one rung.

        Args:
            student: Asked for its process only.
            noise: The noise, [b, ...].
            cond: Not looked at.
            rung: The rung; drawn from `rung_generator` if None.
            rung_generator: A CPU generator, seeded alike on every rank.
            generator: Not used: there is nothing else to draw.
            data: Real samples, [b, ...].

        Returns:
            The input and its times.

        Raises:
            ValueError: If `data` is missing or a shape, time or rung is wrong.
            TypeError: If a dtype or the student is wrong.
        """
        del cond, generator
        if data is None:
            raise ValueError("data: this policy noises real samples; pass them.")
        process: NoiseProcess = student.process
        rung = _draw_rung(len(self.times), rung, rung_generator)
        process.check_time(self.times[rung])
        t = _fill(self.times[rung], noise)
        with torch.no_grad():
            x_t = process.prior(noise, t)
            if rung > 0:
                x_t = process.add_noise(data, noise, t)
        return StudentInput(x_t, t, rung)
