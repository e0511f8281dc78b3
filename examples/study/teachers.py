"""Rows without training: the teacher by number of calls, the student at its start."""

from dataclasses import dataclass
from typing import Literal

import torch
from study.cells import CELLS, GUIDANCE, SEEDS, cells_of
from study.datasets import Data
from study.evaluation import Draw
from study.families import student_times
from torch import Tensor

from dmdkit import (
    BackwardSimulator,
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
    sampler: Literal["ode", "sde", "student"] = "ode"
    """Heun's method, EDM's stochastic sampler, or the student's few steps: what a
    student gives before it is trained, as it starts with the teacher's weights."""
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


HELD_OUT = "held-out"
"""The row of real images that are not among those of training."""
TEACHERS = {
    **{f"teacher-ode-{calls}": Teacher(calls, ("1",)) for calls in (7, 17, 63)},
    "teacher-ode-35": Teacher(35, ("1", "3", "steps", "B")),
    "teacher-sde-63": Teacher(63, ("1",), sampler="sde"),
    "teacher-guided-35": Teacher(35, ("4",), guidance=GUIDANCE, data=("digits",)),
    "untrained": Teacher(1, ("1", "3"), sampler="student"),
    "untrained-four-step": Teacher(4, ("4",), sampler="student", data=("digits",)),
}


def draw_teacher(data: Data, teacher: Teacher) -> Draw:
    """A function from noise and labels to the teacher's samples."""
    network = data.load_teacher()
    denoiser: ScoreEstimator | ClassifierFreeGuidance = network
    if teacher.guidance != 1:
        denoiser = ClassifierFreeGuidance(
            network, lambda c: torch.full_like(c, data.null_class), teacher.guidance
        )

    def draw(noise: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if teacher.sampler == "student":
            student = BackwardSimulator(student_times("edm", teacher.calls))
            return student.sample(network, noise, labels, generator=generator)
        sigmas = karras_sigmas(teacher.times)
        if teacher.sampler == "sde":
            sampler = StochasticSampler(sigmas)
            return sampler(denoiser, noise, labels, generator=generator)
        return HeunSampler(sigmas)(denoiser, noise, labels)

    return draw


def names_of(data: str) -> tuple[str, ...]:
    """All rows of a data set: real images, its teachers, its cells, as they are run."""
    drawn = (name for name, teacher in TEACHERS.items() if data in teacher.data)
    return (HELD_OUT, *drawn, *(cell.name for cell in cells_of(data)))


def seeds_of(data: str, name: str, seeds: int | None = None) -> range:
    """The seeds of a row, from 1: as many as are named, but one of real images."""
    return range(1, 2 if name == HELD_OUT else (seeds or SEEDS[data]) + 1)


def table_of(name: str) -> str:
    """The tables of a row in one word, as the results have them."""
    return "1" if name == HELD_OUT else (CELLS | TEACHERS)[name].table
