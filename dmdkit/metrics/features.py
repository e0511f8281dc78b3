"""What a feature network is, and functions of one's own as feature networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dmdkit._checked import describe

Features: TypeAlias = Float[Tensor, "b f"]
"""One vector an image."""
Coloured: TypeAlias = UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
"""RGB images in 0 ... 255: of 256 levels, or as a resize without rounding gave them."""


@runtime_checkable
class ImageFeatures(Protocol):
    """A feature network has `.name` and `.dim`, and is called as `features(images)`.

    The name tells the network and its weights from all others: statistics of features
    with different names are never compared.
    """

    @property
    def name(self) -> str:
        """Which network, with which weights."""
        ...

    @property
    def dim(self) -> int:
        """How many features it gives an image."""
        ...

    def __call__(self, images: Tensor, /) -> Features:
        """Gives the features of images.

        Args:
            images: Images that a protocol has prepared, [b, c, h, w].

        Returns:
            The features, floats [b, dim].
        """
        ...


@dataclass(frozen=True)
class CallableFeatures:
    """A function or network of one's own as a feature network.

    Attributes:
        function: From images, as the protocol prepares them, to features [b, dim].
        name: Tells it and its weights from all others.
        dim: How many features it gives.

    Examples:
        >>> import torch
        >>> means = CallableFeatures(lambda x: x.float().mean((2, 3)), "means", 3)
        >>> means(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 3])
    """

    function: Callable[[Tensor], Tensor]
    name: str
    dim: int

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Gives the features of images.

        Args:
            images: Images as the protocol prepares them, [b, c, h, w].

        Returns:
            The features, floats [b, dim].

        Raises:
            ValueError: If the function gives another shape or no floats.
        """
        features, shape = self.function(images), (len(images), self.dim)
        if features.shape != shape or not features.is_floating_point():
            raise ValueError(
                f"function: {self.name} gave {describe(features)}, expected floats "
                f"{list(shape)}."
            )
        return features


class FrozenNetwork(nn.Module):
    """A network that is only looked through, in evaluation mode.

    Attributes:
        device: Where it is, and where its inputs are taken to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it is, and where its inputs are taken to."""
        return self._place.device

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stays in evaluation mode."""
        del mode
        return super().train(False)

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> Tensor:
            """The signature of `forward`, which `nn.Module` hides."""
            ...


def require_levels(images: Tensor, size: int) -> None:
    """Refuses images of another size, and floats outside of 0 ... 255."""
    if images.shape[-2:] != (size, size):
        height, width = images.shape[-2:]
        raise ValueError(
            f"images: {height}x{width} pixels, expected {size}x{size}; the protocol's "
            "preparation resizes them."
        )
    if images.is_floating_point() and len(images):
        low, high = (float(x) for x in images.aminmax())
        if not (0 <= low and high <= 255):
            raise ValueError(
                f"images: values {low:g} ... {high:g}, expected 0 ... 255; nothing is "
                "clamped."
            )
