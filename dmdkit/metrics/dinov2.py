"""DINOv2, whose features favour no kind of generator as Inception's do."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dmdkit._checked import checked
from dmdkit.metrics.features import (
    Coloured,
    Features,
    FrozenNetwork,
    require_levels,
)
from dmdkit.metrics.weights import WeightFile, find_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2Features(FrozenNetwork):
    """The class token of DINOv2, through timm, of images of 224 pixels.

    The positional embedding is brought to 16 x 16 patches as DINOv2's own code does
    (bicubic, without antialiasing, with its offset of 0.1), where timm would smooth it.

    Source: Stein et al. 2023 (arXiv 2306.04675), who found that distances on these
    features follow human judgement, where Inception's favour GANs; ViT-L/14.

    Args:
        weights: timm's `model.safetensors`, or the authors' `.pth` file. If None,
            timm's file is fetched from the hub, or found in its cache.
        checksum: The SHA-256 that the file must have, or its first digits.
        model: timm's name of a DINOv2 without registers.

    Attributes:
        name: The network and the SHA-256 of its file.
        checksum: The whole SHA-256.
        dim: 1,024 for ViT-L.

    Raises:
        ValueError: If the file is missing, damaged or another, or the model is unknown.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        checksum: str | None = None,
        model: str = "vit_large_patch14_dinov2.lvd142m",
    ) -> None:
        super().__init__()
        import timm

        if "dinov2" not in model or not timm.is_model(model):
            raise ValueError(f"model: got {model!r}, expected a DINOv2 of timm.")
        file = find_weights(
            weights,
            checksum,
            source=f"model.safetensors from https://huggingface.co/timm/{model}",
            fetch=lambda: _hub_file(f"timm/{model}", "model.safetensors"),
        )
        self.name = f"{model} ({file.label})"
        self.checksum = file.checksum
        self.network: Any = _timm_network(model, file)
        self.dim: int = self.network.num_features
        shape = (1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).reshape(shape))
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).reshape(shape))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    @checked
    def forward(self, images: Coloured) -> Features:
        """Gives the features, fp32 [b, dim], on the network's device.

        Args:
            images: uint8 or floats in [0, 255], [b, 3, 224, 224].

        Returns:
            The features.

        Raises:
            ValueError: If they are of another size or outside [0, 255].
            TypeError: If there are not three channels.
        """
        require_levels(images, 224)
        levels = images.to(self.device, torch.float32)
        return self.network((levels - self.mean) / self.std)


def _hub_file(repository: str, name: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, name)


def _timm_network(model: str, file: WeightFile, size: int = 224) -> Any:
    import timm

    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay={"file": str(file.path)}
        )
    except Exception as error:  # unpickling, missing and misshapen tensors
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {file.path} is no {model}: {line}") from error
    token, patches = network.pos_embed[:, :1], network.pos_embed[:, 1:]
    network.set_input_size(img_size=(size, size))
    old, (new, _) = round(patches.shape[1] ** 0.5), network.patch_embed.grid_size
    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (new + 0.1) / old
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    embedding = torch.cat((token, grid.flatten(2).mT), 1)
    network.pos_embed = nn.Parameter(embedding.detach())
    return network
