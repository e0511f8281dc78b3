"""What is done to images before their features are taken, by separate derivations."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dmdkit.metrics import (
    centre_crop,
    clean_resize,
    lanczos_resize,
    pairwise_diversity,
)


def random_pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def keys(x: float) -> float:
    """The cubic of Keys (1981) with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def lanczos3(x: float) -> float:
    if x == 0:
        return 1.0
    if abs(x) >= 3:
        return 0.0
    return 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2


def weights(kernel: Callable[[float], float], old: int, new: int) -> np.ndarray:
    """The matrix of a resize whose filter is as wide as the scale asks for."""
    scale = old / new
    wide = max(scale, 1.0)
    rows = np.array(
        [
            [kernel((j + 0.5 - (i + 0.5) * scale) / wide) for j in range(old)]
            for i in range(new)
        ]
    )
    return rows / rows.sum(1, keepdims=True)


def resized(kernel: Callable[[float], float], pixels: Tensor, size: int) -> np.ndarray:
    height, width = pixels.shape[-2:]
    down, across = weights(kernel, height, size), weights(kernel, width, size)
    return down @ pixels.double().numpy() @ across.T


@pytest.mark.parametrize(("shape", "size"), [((40, 40), 13), ((9, 14), 23)])
def test_clean_resize_is_an_antialiased_cubic(
    shape: tuple[int, int], size: int
) -> None:
    pixels = random_pixels(2, 3, *shape)
    expected = resized(keys, pixels, size).clip(0, 255)
    found = clean_resize(pixels, size)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < 1e-3
    assert (found != found.round()).any()  # nothing is rounded to levels
    pixels_overshoot = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    pixels_overshoot[..., 4:] = 255
    assert clean_resize(pixels_overshoot, 16).min() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_lanczos_resize_is_within_rounding_of_its_kernel(channels: int) -> None:
    pixels = random_pixels(2, channels, 40, 40)
    found = lanczos_resize(pixels, 16)
    assert found.shape == (2, channels, 16, 16)
    expected = resized(lanczos3, pixels, 16).clip(0, 255)
    # Two passes, each rounded to a level.
    assert np.abs(found.double().numpy() - expected).max() < 1.5
    assert np.abs(found.double().numpy() - expected).mean() < 0.5


def test_the_middle_is_cut_out() -> None:
    pixels = random_pixels(2, 3, 20, 31)
    found = centre_crop(pixels, 15)
    for i, j in ((0, 0), (14, 14), (3, 7)):
        assert torch.equal(found[..., i, j], pixels[..., 2 + i, 8 + j])
    assert centre_crop(pixels).shape == (2, 3, 20, 20)
    with pytest.raises(ValueError, match="size: got 21 for images of 20x31"):
        centre_crop(pixels, 21)


def test_diversity_is_the_mean_over_pairs() -> None:
    levels = torch.tensor([[0.0, 0.1, 0.5], [0.2, 0.2, 0.2]])
    images = levels[:, :, None, None, None].expand(2, 3, 3, 4, 4)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))

    found = pairwise_diversity(images, distance)
    assert found.tolist() == pytest.approx([(0.1 + 0.5 + 0.4) / 3, 0.0])
    with pytest.raises(ValueError, match="1 a prompt"):
        pairwise_diversity(images[:, :1], distance)


@pytest.mark.parametrize("resize", [lanczos_resize, clean_resize])
def test_what_cannot_be_resized(resize: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="size: got 0"):
        resize(random_pixels(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="2 channels"):
        resize(random_pixels(1, 2, 8, 8), 4)
