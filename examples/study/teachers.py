"""The teacher's rows: how it is drawn from, by number of calls."""

from dataclasses import dataclass

import torch
from study.cells import GUIDANCE, cells_of
from study.datasets import Data
from study.evaluation import Draw
from torch import Tensor

from dmdkit import (
    ClassifierFreeGuidance,
    HeunSampler,
    ScoreEstimator,
    StochasticSampler,
    karras_sigmas,
)


@dataclass(frozen=True)
class Teacher:
    """One way to draw from a teacher."""

    calls: int
    """Calls of the network to one sample."""
    tables: tuple[str, ...]
    stochastic: bool = False
    """EDM's stochastic sampler, else Heun's method."""
    guidance: float = 1.0
    data: tuple[str, ...] = ("digits", "fashion")

    @property
    def table(self) -> str:
        """The tables in one word, as the results have them."""
        return "+".join(self.tables)

    @property
    def times(self) -> int:
        """Heun's method calls twice at each time but the last."""
        return (self.calls + 1) // 2


TEACHERS = {
    **{f"teacher-ode-{calls}": Teacher(calls, ("1",)) for calls in (7, 17, 63)},
    "teacher-ode-35": Teacher(35, ("1", "3", "steps", "B")),
    "teacher-sde-63": Teacher(63, ("1",), stochastic=True),
    "teacher-guided-35": Teacher(35, ("4",), guidance=GUIDANCE, data=("digits",)),
}


def draw_teacher(data: Data, teacher: Teacher) -> Draw:
    """A function from noise and labels to the teacher's samples."""
    network = data.load_teacher()
    denoiser: ScoreEstimator | ClassifierFreeGuidance = network
    if teacher.guidance != 1:
        denoiser = ClassifierFreeGuidance(
            network, lambda c: torch.full_like(c, data.null_class), teacher.guidance
        )
    sigmas = karras_sigmas(teacher.times)

    def draw(noise: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if teacher.stochastic:
            sampler = StochasticSampler(sigmas)
            return sampler(denoiser, noise, labels, generator=generator)
        return HeunSampler(sigmas)(denoiser, noise, labels)

    return draw


def names_of(data: str) -> tuple[str, ...]:
    """All rows of a data set: its teachers, then its cells, as they are run."""
    drawn = (name for name, teacher in TEACHERS.items() if data in teacher.data)
    return (*drawn, *(cell.name for cell in cells_of(data)))
