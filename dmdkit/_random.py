"""Draws of random numbers that say what is wrong with a generator."""

import torch
from torch import Tensor


def check_generator(
    generator: torch.Generator | None, device: torch.device | str | None
) -> None:
    """Raises `ValueError` if a generator cannot draw on the device."""
    if generator is None:
        return
    wanted = torch.get_default_device() if device is None else torch.device(device)
    if generator.device.type != wanted.type:
        raise ValueError(
            f"generator: it lives on {generator.device}, the draw is on {wanted}; "
            f"make it with torch.Generator('{wanted}')."
        )


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws standard normal noise of the shape of `x`, in fp32 or better."""
    check_generator(generator, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.randn(x.shape, dtype=dtype, device=x.device, generator=generator)


def uniform(
    batch: int, device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:
    """Draws fp32 uniform numbers in [0, 1), one a sample."""
    check_generator(generator, device)
    return torch.rand(batch, device=device, generator=generator)


def normal(
    batch: int, device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:
    """Draws fp32 standard normal numbers, one a sample."""
    check_generator(generator, device)
    return torch.randn(batch, device=device, generator=generator)


def indices(
    low: int,
    high: int,
    batch: int,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws whole numbers from low ... high - 1, one a sample."""
    check_generator(generator, device)
    return torch.randint(low, high, (batch,), device=device, generator=generator)
