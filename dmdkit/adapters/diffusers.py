"""Networks of diffusers, seen as dmdkit sees a network.

This is the only package that imports diffusers. Nothing is patched: features come from
calling a UNet's own submodules.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from dmdkit._checked import describe
from dmdkit.diffusion.processes import expand_as
from dmdkit.types import Condition, Latent, NetworkOutput, Time, Want

FeaturePlace = Literal["mid", "encoder"]


class UNetNetwork(nn.Module):
    """A diffusers `UNet2DModel` as a network with features.

    The condition is a batch of class labels, integers [b], or None for a model without
    classes. The input is cast to the UNet's dtype; time is not.

    Args:
        unet: The UNet.
        features: Where features are read: "mid", the output of the middle block (DMD2,
            section F.1), or "encoder", its input: what official DMD2 reads on
            ImageNet-64.

    Raises:
        TypeError: If `unet` is no `UNet2DModel`.
        ValueError: If the place is unknown, classes are not given as labels, or the
            time embedding is a table.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(
        ...     sample_size=8,
        ...     in_channels=1,
        ...     out_channels=1,
        ...     block_out_channels=(32, 32),
        ...     down_block_types=("DownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "UpBlock2D"),
        ... )
        >>> network = UNetNetwork(unet)
        >>> x, c_noise = torch.zeros(2, 1, 8, 8), torch.zeros(2)
        >>> network(x, c_noise, None, want=("features",)).features.shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(self, unet: UNet2DModel, features: FeaturePlace = "mid") -> None:
        super().__init__()
        if not isinstance(unet, UNet2DModel):
            raise TypeError(
                f"unet: got {type(unet).__name__}, expected a diffusers UNet2DModel."
            )
        if features not in ("mid", "encoder"):
            raise ValueError(f"features: got {features!r}, expected 'mid', 'encoder'.")
        if unet.config["class_embed_type"] is not None:
            raise ValueError(
                f"unet: class_embed_type {unet.config['class_embed_type']!r} is not "
                "supported; use integer labels (num_class_embeds) or none."
            )
        if unet.config["time_embedding_type"] == "learned":
            raise ValueError(
                "unet: time_embedding_type 'learned' looks up whole numbers and is not "
                "supported; use 'positional' or 'fourier'."
            )
        self.unet, self.place = unet, features

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Latent,
            c_noise: Time,
            cond: Condition = None,
            *,
            want: Sequence[Want] | None = None,
        ) -> Any:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        """Answers with the output alone, or with what `want` names, in one pass.

        Args:
            x: The network's input, [b, c, h, w].
            c_noise: What it is fed as time, fp32 [b].
            cond: Class labels, integers [b], or None.
            want: Any of "output", "features". Features alone leave out the decoder.

        Returns:
            The output, or a `NetworkOutput` if `want` is given.

        Raises:
            TypeError: If the labels are no integers.
            ValueError: If labels are missing, or given to a model without classes, or
                not one a sample.
        """
        h, skips, emb = self._encode(x, c_noise, cond)
        before_mid = h
        h = self.unet.mid_block(h, emb) if self.unet.mid_block is not None else h
        features = h if self.place == "mid" else before_mid
        if want is None:
            return self._decode(h, skips, emb, c_noise)
        return NetworkOutput(
            output=self._decode(h, skips, emb, c_noise) if "output" in want else None,
            features=features if "features" in want else None,
        )

    def _encode(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        unet = self.unet
        self._check_labels(x, labels)
        dtype = unet.dtype
        emb = unet.time_embedding(unet.time_proj(c_noise).to(dtype))
        if labels is not None:
            classes: nn.Module = unet.class_embedding  # pyright: ignore[reportAssignmentType]
            emb = emb + classes(labels).to(dtype)
        x = x.to(dtype)
        if unet.config["center_input_sample"]:
            x = 2 * x - 1.0
        h, image = unet.conv_in(x), x
        skips: tuple[Tensor, ...] = (h,)
        for block in unet.down_blocks:
            if hasattr(block, "skip_conv"):
                h, residuals, image = block(
                    hidden_states=h, temb=emb, skip_sample=image
                )
            else:
                h, residuals = block(hidden_states=h, temb=emb)
            skips += tuple(residuals)
        return h, skips, emb

    def _decode(
        self, h: Tensor, skips: tuple[Tensor, ...], emb: Tensor, c_noise: Tensor
    ) -> Tensor:
        unet, image = self.unet, None
        for block in unet.up_blocks:
            count = len(block.resnets)  # pyright: ignore[reportArgumentType]
            if hasattr(block, "skip_conv"):
                h, image = block(h, skips[-count:], emb, image)
            else:
                h = block(h, skips[-count:], emb)
            skips = skips[:-count]
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        if image is not None:
            output = output + image
        if unet.config["time_embedding_type"] == "fourier":
            output = output / expand_as(c_noise, output)
        return output

    def _check_labels(self, x: Tensor, labels: Tensor | None) -> None:
        has_classes = self.unet.class_embedding is not None
        if has_classes != (labels is not None):
            raise ValueError(
                "cond: the UNet "
                + ("needs class labels, got None" if has_classes else "has no classes")
                + "; pass integers [b] for a class-conditional UNet, else None."
            )
        if labels is None:
            return
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise TypeError(f"cond: got {describe(labels)}, expected integer labels.")
        if labels.shape != x.shape[:1]:
            raise ValueError(
                f"cond: got {describe(labels)}, expected one label for each of "
                f"{x.shape[0]} samples."
            )
