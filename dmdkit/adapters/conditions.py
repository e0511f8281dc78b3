"""What text-to-image networks are conditioned on, and its unconditional counterparts.

Each condition is a NamedTuple of batch-first tensors, hence a pytree: it can be
concatenated, split, scattered and moved without being looked into.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

from dmdkit._checked import describe


class TextCondition(NamedTuple):
    """A prompt as SD1.x and SD2.x see it.

    Attributes:
        text: The text encoder's hidden states, [b, n, d].
    """

    text: Float[Tensor, "b n d"]


class TextPooledCondition(NamedTuple):
    """A prompt as SDXL, SD3 and Flux see it.

    Attributes:
        text: The text encoders' hidden states, [b, n, d].
        pooled: The pooled text embedding, [b, p].
        time_ids: SDXL's sizes in pixels, fp32 [b, 6], see `sdxl_time_ids`; None for
            SD3 and Flux.
    """

    text: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b p"]
    time_ids: Float32[Tensor, "b 6"] | None = None


class TextMaskCondition(NamedTuple):
    """A prompt as PixArt sees it.

    Attributes:
        text: The text encoder's hidden states, [b, n, d].
        mask: Which of the n tokens are the prompt's, 1 or 0, [b, n].
        resolution: Height and width in pixels, fp32 [b, 2]; None unless the network
            asks for it (PixArt-alpha at 1024 px).
        aspect_ratio: Height over width, fp32 [b, 1]; None likewise.
    """

    text: Float[Tensor, "b n d"]
    mask: Integer[Tensor, "b n"]
    resolution: Float32[Tensor, "b 2"] | None = None
    aspect_ratio: Float32[Tensor, "b 1"] | None = None


Text = TypeVar("Text", TextCondition, TextPooledCondition, TextMaskCondition)


@dataclass(frozen=True, eq=False)
class EmptyPrompt:
    """Answers a condition with that of the empty prompt: `unconditional` of guidance.

    SD1.x, SD2.x (DMD2, section F.3), SD3, PixArt. What is no text (time ids, sizes)
    stays as it is. Keep the tensors on the device of the conditions: elsewhere, every
    call copies them there.

    Attributes:
        text: The encoded empty prompt, [1, n, d].
        pooled: Its pooled embedding, [1, p], if the condition has one.
        mask: Its mask, [1, n], if the condition has one.

    Examples:
        >>> import torch
        >>> without_text = EmptyPrompt(torch.zeros(1, 77, 768))
        >>> without_text(TextCondition(torch.ones(4, 77, 768))).text.shape
        torch.Size([4, 77, 768])
    """

    text: Float[Tensor, "1 n d"]
    pooled: Float[Tensor, "1 p"] | None = None
    mask: Integer[Tensor, "1 n"] | None = None

    def __post_init__(self) -> None:
        """Checks that there is one empty prompt."""
        for name, rank in (("text", 3), ("pooled", 2), ("mask", 2)):
            value = getattr(self, name)
            if value is None and name != "text":
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {describe(value)}, expected a tensor.")
            if value.ndim != rank or len(value) != 1:
                raise ValueError(
                    f"{name}: got {describe(value)}, expected one encoded prompt of "
                    f"rank {rank}, with a batch axis of length 1."
                )

    def __call__(self, cond: Text) -> Text:
        """Gives the empty prompt for every sample of a condition.

        Args:
            cond: The condition, of a batch of b.

        Returns:
            A condition of the same kind and batch.

        Raises:
            TypeError: If the condition is none of this module's.
            ValueError: If it has other parts than the empty prompt.
        """
        if not isinstance(
            cond, TextCondition | TextPooledCondition | TextMaskCondition
        ):
            raise TypeError(f"cond: got {describe(cond)}, expected a text condition.")
        parts = {}
        for name in ("text", "pooled", "mask"):
            theirs, ours = getattr(cond, name, None), getattr(self, name)
            if (theirs is None) != (ours is None):
                one, other = ("has", "has none") if ours is None else ("lacks", "has")
                raise ValueError(
                    f"cond: {type(cond).__name__} {one} `{name}`, the empty prompt "
                    f"{other}; make the EmptyPrompt from the same encoders' outputs."
                )
            if theirs is not None:
                every = ours.to(theirs).expand(len(theirs), *ours.shape[1:])
                # In memory as a condition is, so that one compiled graph takes both.
                parts[name] = every.contiguous()
        return cond._replace(**parts)


def zero_text(cond: TextPooledCondition) -> TextPooledCondition:
    """Answers a condition with zeros for text and pooled text, and the same time ids.

    It is the `unconditional` of guidance for SDXL (DMD2, section F.4).

    Args:
        cond: SDXL's condition.

    Returns:
        Its unconditional counterpart.

    Raises:
        TypeError: If the condition has no pooled text.
    """
    if not isinstance(cond, TextPooledCondition):
        raise TypeError(
            f"cond: got {describe(cond)}, expected a TextPooledCondition; SD1.x and "
            "SD2.x take an EmptyPrompt instead."
        )
    return cond._replace(
        text=torch.zeros_like(cond.text), pooled=torch.zeros_like(cond.pooled)
    )


def sdxl_time_ids(
    batch: int,
    size: int | tuple[int, int],
    device: torch.device | str | None = None,
) -> Float32[Tensor, "b 6"]:
    """SDXL's micro-conditioning for images that were neither scaled nor cropped.

    Source: Podell et al. 2023 (arXiv 2307.01952), section 2.2.

    Args:
        batch: The number of samples.
        size: The side of the images in pixels, or (height, width).
        device: Where the tensor goes.

    Returns:
        (height, width, 0, 0, height, width) a sample: the original size, the crop's
        corner and the target size; fp32 [batch, 6].

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> sdxl_time_ids(1, 1024).tolist()
        [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]
    """
    height, width = (size, size) if isinstance(size, int) else size
    if batch < 1 or height < 1 or width < 1:
        raise ValueError(
            f"batch, size: got {batch}, {size}, expected positive whole numbers."
        )
    # Filled where they are: a copy from the host would wait for the device.
    ids = torch.zeros(batch, 6, dtype=torch.float32, device=device)
    ids[:, 0::4], ids[:, 1::4] = height, width
    return ids
