"""How well images fit their prompts, through OpenCLIP."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dmdkit._checked import checked
from dmdkit.extras import require_extra
from dmdkit.metrics.features import Features, FrozenNetwork
from dmdkit.metrics.images import Pixels, pil_images
from dmdkit.metrics.weights import find_weights
from dmdkit.types import PerSample


class CLIPEncoder(FrozenNetwork):
    """Images and texts in one space, by a model of OpenCLIP in fp32.

    Args:
        model: OpenCLIP's name of the model.
        tag: OpenCLIP's name of its weights.
        weights: The file of the weights, `.bin`, `.pt` or `.safetensors`. If None,
            OpenCLIP fetches it from the hub, or finds it in its cache.
        checksum: The SHA-256 that the file must have, or its first digits.

    Attributes:
        model: The model's name.
        name: The model, the weights and the SHA-256 of their file.
        checksum: The whole SHA-256.
        dim: The number of features.

    Raises:
        ImportError: If open_clip is missing.
        ValueError: If the model or the weights are unknown, or the file is missing,
            damaged or another.
    """

    def __init__(
        self,
        model: str = "ViT-g-14",
        tag: str = "laion2b_s12b_b42k",
        *,
        weights: str | Path | None = None,
        checksum: str | None = None,
    ) -> None:
        super().__init__()
        require_extra("eval", "open_clip")
        import open_clip

        if model not in open_clip.list_models():
            raise ValueError(f"model: got {model!r}, expected one of open_clip's.")
        known: Any = open_clip.get_pretrained_cfg(model, tag)
        if weights is None and not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
            raise ValueError(f"tag: got {tag!r}, expected one of {tags or 'none'}.")
        hub, url = known.get("hf_hub"), known.get("url")
        where = f"https://huggingface.co/{hub}" if hub else url or "where it was made"
        file = find_weights(
            weights,
            checksum,
            source=f"OpenCLIP's {model}, {tag}, from {where}",
            fetch=lambda: open_clip.download_pretrained(known),
        )
        self.model = model
        self.name = f"{model}, {tag} ({file.label})"
        self.checksum = file.checksum
        try:
            made: Any = open_clip.create_model_and_transforms(
                model, pretrained=str(file.path), precision="fp32"
            )
        except Exception as error:  # unpickling, missing and misshapen tensors
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"weights: {file.path} is no {model}: {line}") from error
        self.network: Any = made[0]
        self._preprocess: Callable[[Image], Tensor] = made[2]
        self._tokenize = open_clip.get_tokenizer(model)
        self.dim: int = open_clip.get_model_config(model)["embed_dim"]  # pyright: ignore[reportOptionalSubscript]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    @checked
    def forward(self, images: Pixels) -> Features:
        """Gives the features of images, resized as the model's own transform does.

        So it is a feature network too.

        Args:
            images: uint8 [b, 3, h, w].

        Returns:
            The features, fp32 [b, dim], of any length.
        """
        ready = torch.stack([self._preprocess(image) for image in pil_images(images)])
        return self.network.encode_image(ready.to(self.device))

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Gives the features of texts; what is longer than the context is cut off.

        Args:
            texts: The texts.

        Returns:
            The features, fp32 [b, dim], of any length.
        """
        return self.network.encode_text(self._tokenize(list(texts)).to(self.device))

    def similarity(self, images: Tensor, texts: Sequence[str]) -> PerSample:
        """The cosine of the angle between each image and its text.

        Args:
            images: uint8 [b, 3, h, w].
            texts: One text an image.

        Returns:
            The cosines, fp32 [b].

        Raises:
            ValueError: If there are not as many texts as images.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"images, texts: {len(images)} and {len(texts)}, expected as many."
            )
        return cosine_similarity(self(images), self.of_texts(texts))
