"""What simulation and solvers share: times, rungs, draws."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dmdkit._random import check_generator, noise_like
from dmdkit.types import Time

Draws = Sequence[Tensor] | None


def check_times(times: tuple[float | int, ...]) -> None:
    """Raises unless the times are a tuple of falling numbers."""
    if not isinstance(times, tuple) or not times:
        raise TypeError(
            f"times: got {times!r}, expected a tuple of at least one number."
        )
    if any(b >= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"times: got {times}, expected falling values.")


def check_rung(rung: int, rungs: int) -> None:
    """Raises `ValueError` unless the rung is one of so many."""
    if not 0 <= rung < rungs:
        raise ValueError(f"rung: got {rung}, expected 0 ... {rungs - 1}.")


def draw_rung(
    rungs: int, rung: int | None, rung_generator: torch.Generator | None
) -> int:
    """Gives the rung, or draws one from a generator shared by ranks."""
    if rung is not None and rung_generator is not None:
        raise ValueError("rung: give either `rung` or `rung_generator`, not both.")
    if rung is not None:
        check_rung(rung, rungs)
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


def fill(time: float | int, like: Tensor) -> Time:
    """Gives one time to every sample, fp32 [b]."""
    return torch.full((like.shape[0],), time, dtype=torch.float32, device=like.device)


def check_draws(draws: Draws, count: int, like: Tensor) -> None:
    """Raises `ValueError` unless there are `count` tensors of the shape of `like`."""
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


def fresh_noise(like: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Draws noise, again and again."""
    while True:
        yield noise_like(like, generator)


def given_or_fresh_noise(
    draws: Iterable[Tensor] | None, like: Tensor, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Takes noise from `draws` as it is needed, or draws it if that is None."""
    if draws is None:
        yield from fresh_noise(like, generator)
        return
    taken = 0
    for value in draws:
        if value.shape != like.shape:
            raise ValueError(
                f"draws: tensor {taken} has shape {list(value.shape)}, expected that "
                f"of noise, {list(like.shape)}."
            )
        yield value
        taken += 1
    raise ValueError(f"draws: it ended after {taken} tensors, more are needed.")
