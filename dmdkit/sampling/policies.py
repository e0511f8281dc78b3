"""Other inputs for few-step students than those of DMD2's section 4.5."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmdkit._checked import checked, describe
from dmdkit._random import check_generator
from dmdkit.diffusion.processes import NoiseProcess, expand_as
from dmdkit.sampling.common import (
    Draws,
    check_draws,
    check_rung,
    check_times,
    draw_rung,
    fill,
    fresh_noise,
)
from dmdkit.sampling.simulation import StudentInput
from dmdkit.types import Condition, Denoiser, Latent


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
        check_times(self.times)

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
        draws: Draws = None,
    ) -> StudentInput:
        """Simulates all rungs and takes one for each sample, without gradients.

        Args:
            student: The student; called N - 1 times.
            noise: The noise of the inputs themselves, [b, ...]; pure noise at rung 0.
            cond: The condition.
            rung: The rungs, int64 [b], or one for all; drawn if None. On the CPU,
                where their range can be checked without waiting for a device.
            rung_generator: Source of the rungs, on the CPU; each rank's own will do.
            generator: Source of the simulation's own noise, on the device of `noise`.
            data: Not looked at.
            draws: The simulation's own noise, N - 1 tensors of the shape of `noise`,
                instead of drawing it.

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
            check_rung(rung, rungs)
            rung = torch.full((batch,), rung)
        if rung.dtype != torch.int64 or rung.shape != (batch,):
            raise ValueError(
                f"rung: got {describe(rung)}, expected int64[{batch}], one a sample."
            )
        if rung.device.type == "cpu":
            check_rung(int(rung.min()), rungs)
            check_rung(int(rung.max()), rungs)
        rung = rung.to(noise.device)
        check_draws(draws, rungs - 1, noise)
        process: NoiseProcess = student.process
        for time in self.times:
            process.check_time(time)
        own = iter(draws) if draws is not None else fresh_noise(noise, generator)
        with torch.no_grad():
            times = torch.tensor(self.times, dtype=torch.float32, device=noise.device)
            t = times[rung]
            x_t = process.prior(noise, t)
            x0 = None
            for i in range(1, rungs):
                before_t, fresh = fill(self.times[i - 1], noise), next(own)
                before = (
                    process.prior(fresh, before_t)
                    if x0 is None
                    else process.add_noise(x0, fresh, before_t)
                )
                x0 = student(before, before_t, cond)
                chosen = expand_as(rung == i, noise)
                x_t = torch.where(chosen, process.add_noise(x0, noise, t), x_t)
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
        check_times(self.times)

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
        rung = draw_rung(len(self.times), rung, rung_generator)
        process.check_time(self.times[rung])
        t = fill(self.times[rung], noise)
        with torch.no_grad():
            x_t = process.prior(noise, t)
            if rung > 0:
                x_t = process.add_noise(data, noise, t)
        return StudentInput(x_t, t, rung)
