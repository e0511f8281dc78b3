"""The classification head on top of a denoiser's features (DMD2, section F.1)."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dmdkit._checked import checked
from dmdkit.types import FeatureMap, Logits


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in fp32, also under bf16 autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises in fp32, whatever the dtype of the input."""
        return super().forward(input.float())


class DiffusionGANHead(nn.Module):
    """Pools a feature map to one logit a sample.

    DMD2, section F.1: 4x4 convolutions of stride 2 down to a 4x4 map, one 4x4
    convolution of stride 4 down to a vector, each with group norm and SiLU, then a
    linear layer. For maps of 8x8, 16x16 and 32x32 this is the official head to the
    parameter. For any other size the map is halved while both its sides are at least 8,
    and the last convolution spans whatever is left (at most 7 on the shorter side).

    Features may come in any float dtype; they are cast to fp32, and group norm computes
    in fp32 also where autocast has the convolutions in bf16.

    Args:
        channels: The channels of the feature map: 768 (ImageNet-64), 1280 (SD1.5,
            SDXL).
        resolution: The height and width of the map, or one number for both.
        groups: The groups of group norm. After the last convolution a group sees only
            `channels / groups` numbers: of two, their order is all that is left, and
            little gradient comes through. None: 32, as official, from 256 channels
            on, else `channels // 8`.

    Raises:
        ValueError: If a number is out of range or `groups` does not divide `channels`.

    Examples:
        >>> import torch
        >>> head = DiffusionGANHead(channels=64, resolution=8)
        >>> head(torch.zeros(2, 64, 8, 8)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        channels: int,
        resolution: int | tuple[int, int],
        groups: int | None = None,
    ) -> None:
        super().__init__()
        if groups is None:
            groups = 32 if channels >= 256 else max(channels // 8, 1)
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        if channels < 1 or min(size) < 1 or groups < 1:
            raise ValueError(
                f"channels, resolution, groups: got {channels}, {resolution}, {groups},"
                " expected positive numbers."
            )
        if channels % groups or channels // groups < 2:
            raise ValueError(
                f"groups: {groups} must divide channels ({channels}) with at least two "
                "left for each; one alone would be normalised away on the last map."
            )
        self.channels, self.resolution = channels, size
        layers: list[nn.Module] = []

        def add(kernel: int | tuple[int, int], stride: int | tuple[int, int], pad: int):
            layers.append(nn.Conv2d(channels, channels, kernel, stride, pad))
            layers.append(GroupNorm32(groups, channels))
            layers.append(nn.SiLU())

        height, width = size
        while min(height, width) >= 8:
            add(kernel=4, stride=2, pad=1)
            height, width = height // 2, width // 2
        add(kernel=(height, width), stride=(height, width), pad=0)
        layers.append(nn.Conv2d(channels, 1, kernel_size=1))
        self.layers = nn.Sequential(*layers)

    if TYPE_CHECKING:

        def __call__(self, features: FeatureMap) -> Logits:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    @checked
    def forward(self, features: FeatureMap) -> Logits:
        """Gives one logit a sample; positive means real.

        Args:
            features: The feature map, [b, channels, height, width].

        Returns:
            The logits, fp32 [b].

        Raises:
            ValueError: If the map has another size than the head was made for.
        """
        expected = (self.channels, *self.resolution)
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"features: got {list(features.shape[1:])} a sample, the head was made "
                f"for {list(expected)}; set channels and resolution to the former."
            )
        # Contiguous, since oneDNN's bf16 convolutions to a 1x1 map are wrong for
        # channels last (pytorch/pytorch issue 163347).
        logits = self.layers(features.float().contiguous()).float().reshape(-1)
        return logits.clone()  # a view would make FSDP2 warn of changes in place
