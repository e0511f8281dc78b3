"""What every loss shares: the look of its result, flags and checks."""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dmdkit._checked import describe
from dmdkit._random import noise_like
from dmdkit.diffusion.processes import NoiseProcess
from dmdkit.types import Flags, Latent, PerSample, Time, TimeSampler

Metrics: TypeAlias = dict[str, Tensor]
"""Detached scalars on the device, by documented names."""


class Draw(NamedTuple):
    """A noisy batch as a loss drew it."""

    x_t: Latent
    t: Time
    noise: Latent


def draw(
    x: Latent,
    process: NoiseProcess,
    times: TimeSampler,
    t: Time | None,
    noise: Latent | None,
    generator: torch.Generator | None,
) -> Draw:
    """Noises `x` at given or drawn times with given or drawn noise."""
    if t is None:
        _check_units(times, process)
        t = times(x.shape[0], device=x.device, generator=generator)
    if noise is None:
        noise = noise_like(x, generator)
    return Draw(process.add_noise(x, noise, t), t, noise)


def _check_units(times: TimeSampler, process: NoiseProcess) -> None:
    whole = getattr(times, "whole", process.whole_times)
    if whole != process.whole_times:
        kinds = {True: "whole indices", False: "continuous times"}
        raise ValueError(
            f"times: {times} draws {kinds[whole]}; {type(process).__name__} has "
            f"{kinds[process.whole_times]}."
        )
    for end in getattr(times, "ends", ()):
        try:
            process.check_time(end)
        except ValueError as error:
            raise ValueError(
                f"times: {times} draws what is no time of {type(process).__name__}; "
                f"{error}"
            ) from None


def per_sample_mean(values: Tensor) -> PerSample:
    """Averages over every axis but the batch, [b]."""
    return values.reshape(values.shape[0], -1).mean(dim=1)


def finite_samples(*tensors: Tensor) -> Flags:
    """Flags the samples whose every value, in every tensor, is finite: bool [b]."""
    flags = [torch.isfinite(x.detach()).reshape(x.shape[0], -1).all(1) for x in tensors]
    return torch.stack(flags).all(dim=0)


def require_function(name: str, value: object, hint: str) -> None:
    """Raises `TypeError` unless a value can be called and is no class."""
    if not callable(value) or inspect.isclass(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {hint}.")


def require_times(times: TimeSampler) -> None:
    """Raises `TypeError` unless `times` can be drawn from."""
    require_function("times", times, "a time sampler such as UniformTime(0.02, 0.98)")


def require_gradient(name: str, x: Tensor) -> None:
    """Raises `ValueError` if nothing could be learned through `x`."""
    if not x.requires_grad:
        raise ValueError(
            f"{name}: it carries no gradient, so this loss could train nothing; run "
            "the student with gradients enabled and do not detach its sample."
        )


def require_equal_processes(**processes: NoiseProcess) -> NoiseProcess:
    """Gives the one process of several networks, or raises `ValueError`."""
    (first_name, first), *others = processes.items()
    for name, process in others:
        if process != first:
            raise ValueError(
                f"{name}: its process {type(process).__name__} differs from the "
                f"{type(first).__name__} of {first_name} (type or numbers); give every "
                "network in one loss the same process."
            )
    return first


Distance: TypeAlias = Callable[[Latent, Latent], PerSample]
"""A distance between two batches, one number a sample."""
