"""Images as metrics take them: cropped, resized, and the variety among them.

What a metric does to an image before its features is a part of its definition: another
resize gives other numbers (Parmar et al. 2022, arXiv 2104.11222).
"""

from collections.abc import Callable
from itertools import combinations
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dmdkit._checked import checked
from dmdkit.types import PerSample

Pixels: TypeAlias = UInt8[Tensor, "b c h w"]
"""Images of 256 levels, [b, 3, h, w]."""
Squares: TypeAlias = UInt8[Tensor, "b c s s"]
"""Images as wide as they are high."""


@checked
def centre_crop(pixels: Pixels, size: int | None = None) -> Squares:
    """Cuts the middle out of images, without resizing.

    For the patch FID of SDXL students the middle is 299 pixels wide, of images in their
    own resolution (DMD2, section 5; official evaluation code).

    Args:
        pixels: Images, [b, c, h, w].
        size: Width and height of the middle; the smaller side if None. Half of an odd
            margin is rounded to the even number, as torchvision does.

    Returns:
        The middles, [b, c, size, size].

    Raises:
        ValueError: If an image is smaller.
    """
    height, width = pixels.shape[-2:]
    size = min(height, width) if size is None else size
    if not 1 <= size <= min(height, width):
        raise ValueError(
            f"size: got {size} for images of {height}x{width}, expected 1 ... "
            f"{min(height, width)}; nothing is resized here."
        )
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[..., top : top + size, left : left + size]


@checked
def centre_patch(pixels: Pixels, size: int = 299) -> UInt8[Tensor, "b c hh ww"]:
    """Cuts the middle out of images that are large enough, and leaves others whole.

    The patch FID of the official code does so: some of COCO's images have a side below
    299, and are resized whole.

    Args:
        pixels: Images, [b, c, h, w].
        size: Width and height of the middle.

    Returns:
        The middles, [b, c, size, size], or the images.
    """
    return centre_crop(pixels, size) if min(pixels.shape[-2:]) >= size else pixels


@checked
def lanczos_resize(pixels: Pixels, size: int) -> Squares:
    """Resizes as PIL does with its Lanczos filter, to 256 levels.

    The COCO evaluation of SD1.5 takes images of 256 pixels so (official code).

    Args:
        pixels: Images, [b, 3, h, w] or [b, 1, h, w].
        size: Width and height, >= 1.

    Returns:
        The images, [b, c, size, size], on the CPU.

    Raises:
        ValueError: If the size is out of range, or the channels are not 1 or 3.
    """
    return _resize(pixels, size, Image.Resampling.LANCZOS)


@checked
def bicubic_resize(pixels: Pixels, size: int) -> Squares:
    """Resizes as PIL does with its bicubic filter, to 256 levels.

    Distances on DINOv2 take images of 224 pixels so (Stein et al. 2023, arXiv
    2306.04675, official code).

    Args:
        pixels: Images, [b, 3, h, w] or [b, 1, h, w].
        size: Width and height, >= 1.

    Returns:
        The images, [b, c, size, size], on the CPU.

    Raises:
        ValueError: If the size is out of range, or the channels are not 1 or 3.
    """
    return _resize(pixels, size, Image.Resampling.BICUBIC)


def pil_images(pixels: Tensor) -> list[Image.Image]:
    """Images of 256 levels, [b, 3, h, w] or [b, 1, h, w], as PIL has them."""
    arrays = pixels.cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in arrays]


def _resize(pixels: Tensor, size: int, kind: Image.Resampling) -> Tensor:
    _require(pixels, size)
    resized = [np.array(x.resize((size, size), kind)) for x in pil_images(pixels)]
    stacked = torch.tensor(np.stack(resized)).reshape(len(pixels), size, size, -1)
    return stacked.permute(0, 3, 1, 2).contiguous()


@checked
def clean_resize(pixels: Pixels, size: int = 299) -> Float[Tensor, "b c s s"]:
    """Resizes as clean-fid does: PIL's bicubic filter on floats, each channel alone.

    The filter has support as wide as the scale asks for (no aliasing), and nothing is
    rounded to 256 levels; what overshoots is cut off at 0 and 255.

    Source: Parmar et al. 2022 (arXiv 2104.11222), section 3.

    Args:
        pixels: Images, [b, 3, h, w] or [b, 1, h, w].
        size: Width and height; 299 is what Inception takes.

    Returns:
        The images, fp32 in [0, 255], [b, c, size, size], on the CPU.

    Raises:
        ValueError: If the size is out of range, or the channels are not 1 or 3.
    """
    _require(pixels, size)
    channels = []
    for channel in pixels.cpu().flatten(0, 1).numpy():
        opened = Image.fromarray(channel.astype(np.float32))
        scaled = opened.resize((size, size), Image.Resampling.BICUBIC)
        channels.append(torch.tensor(np.asarray(scaled)))
    resized = torch.stack(channels).clamp(0, 255)
    return resized.reshape(*pixels.shape[:2], size, size)


def _require(pixels: Tensor, size: int) -> None:
    if size < 1:
        raise ValueError(f"size: got {size}, expected >= 1.")
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"pixels: {pixels.shape[1]} channels, expected 1 or 3.")


@checked
def pairwise_diversity(
    images: Float[Tensor, "b k c h w"],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> PerSample:
    """The mean distance among the images of each prompt.

    With LPIPS and four images a prompt it is the diversity of DMD2's Appendix B: a
    student that draws one image for a prompt again and again has 0.

    Args:
        images: k images for each of b prompts, in [-1, 1], [b, k, c, h, w].
        distance: Gives the distances of two batches, [b], such as `LPIPSDistance`.

    Returns:
        The mean over the k (k - 1) / 2 pairs, [b].

    Raises:
        ValueError: If there are fewer than two images a prompt.
    """
    count = images.shape[1]
    if count < 2:
        raise ValueError(f"images: {count} a prompt, expected at least 2.")
    pairs = combinations(range(count), 2)
    return torch.stack([distance(images[:, i], images[:, j]) for i, j in pairs]).mean(0)
