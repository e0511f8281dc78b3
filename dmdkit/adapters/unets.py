"""The UNets of diffusers, seen as dmdkit sees a network.

Nothing is patched or hooked: features come from calling a UNet's own submodules.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from dmdkit._checked import describe
from dmdkit.adapters.conditions import TextCondition, TextPooledCondition
from dmdkit.adapters.inputs import check_condition, check_time, input_dtype
from dmdkit.diffusion.processes import expand_as
from dmdkit.types import Condition, Latent, NetworkOutput, Time, Want

FeaturePlace = Literal["mid", "encoder"]

TEXT_ONLY: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}
"""What a `UNet2DConditionModel` may have set, so that text is its only condition."""


class _Encoded(NamedTuple):
    """What the decoder needs from the encoder."""

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    text: Tensor | None

    def first(self, count: int) -> "_Encoded":
        """That of the first samples of the batch."""
        h, skips, emb, text = self
        return _Encoded(
            h[:count],
            tuple(skip[:count] for skip in skips),
            emb[:count],
            None if text is None else text[:count],
        )


class UNetNetwork(nn.Module):
    """A UNet of diffusers as a network with features.

    The condition depends on the UNet:

    - `UNet2DModel`: a batch of class labels, integers [b], or None for a model without
      classes.
    - `UNet2DConditionModel` (SD1.x, SD2.x): a `TextCondition`.
    - `UNet2DConditionModel` with `addition_embed_type` "text_time" (SDXL): a
      `TextPooledCondition` with time ids.

    The input, text and pooled text are cast to the UNet's dtype; time and time ids stay
    fp32. A whole number embeds to the same bits in fp32 and as an integer; a fraction
    is embedded as it is, not rounded to an index. Wrap, shard and compile this module,
    not the UNet inside it, whose `forward` is never called. Under DDP, a backward that
    goes through features alone leaves the decoder without gradients and needs
    `find_unused_parameters=True`; together with one through the output it does not.

    Args:
        unet: The UNet.
        features: Where features are read: "mid", the output of the middle block (DMD2,
            section F.1), or "encoder", its input: what official DMD2 reads on
            ImageNet-64.

    Raises:
        TypeError: If `unet` is neither of the two models.
        ValueError: If the place is unknown, or the UNet needs what it cannot be given
            here: a look-up of times, classes beside text or other than labels, images
            (IP-Adapter, Kandinsky), GLIGEN's boxes, a guidance embedding (LCM).

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

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        features: FeaturePlace = "mid",
    ) -> None:
        super().__init__()
        if features not in ("mid", "encoder"):
            raise ValueError(f"features: got {features!r}, expected 'mid', 'encoder'.")
        if isinstance(unet, UNet2DConditionModel):
            _refuse_more_than_text(unet)
        elif isinstance(unet, UNet2DModel):
            _refuse_more_than_labels(unet)
        else:
            raise TypeError(
                f"unet: got {type(unet).__name__}, expected a diffusers UNet2DModel or "
                "UNet2DConditionModel."
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
            outputs: int | None = None,
            output_grad: bool = True,
        ) -> Any:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition = None,
        *,
        want: Sequence[Want] | None = None,
        outputs: int | None = None,
        output_grad: bool = True,
    ) -> Tensor | NetworkOutput:
        """Answers with the output alone, or with what `want` names, in one pass.

        Args:
            x: The network's input, [b, c, h, w].
            c_noise: What it is fed as time, fp32 [b].
            cond: Class labels, a `TextCondition`, a `TextPooledCondition` or None,
                whichever belongs to the UNet.
            want: Any of "output", "features". Features alone leave out the decoder.
            outputs: How many samples, the first of the batch, get an output; the
                decoder runs for these. None is all.
            output_grad: Whether the output has a graph; if not, only features do.

        Returns:
            The output, or a `NetworkOutput` if `want` is given.

        Raises:
            TypeError: If the condition is of the wrong kind, or time is bf16.
            ValueError: If the condition is missing, not wanted or of another batch.
        """
        encoded = self._encode(x, c_noise, cond)
        if self.place == "mid":
            encoded = encoded._replace(h=self._middle(encoded))
        output, features = None, encoded.h
        if want is None or "output" in want:
            if outputs is not None:
                encoded = encoded.first(outputs)
                x, c_noise = x[:outputs], c_noise[:outputs]
            with torch.set_grad_enabled(output_grad and torch.is_grad_enabled()):
                if self.place == "encoder":
                    encoded = encoded._replace(h=self._middle(encoded))
                output = self._decode(encoded, x, c_noise)
        if want is None:
            assert output is not None
            return output
        return NetworkOutput(output, features if "features" in want else None)

    def _encode(self, x: Tensor, c_noise: Tensor, cond: Condition) -> _Encoded:
        unet = self.unet
        check_time(c_noise)
        x = x.to(input_dtype(unet, unet.conv_in))
        if isinstance(unet, UNet2DConditionModel):
            emb, text = _embed_text(unet, x, c_noise, cond)
        else:
            emb, text = _embed_labels(unet, x, c_noise, cond), None
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
                h, residuals = block(hidden_states=h, temb=emb, **_text(block, text))
            skips += tuple(residuals)
        return _Encoded(h, skips, emb, text)

    def _middle(self, encoded: _Encoded) -> Tensor:
        block, (h, _, emb, text) = self.unet.mid_block, encoded
        return h if block is None else block(h, emb, **_text(block, text))

    def _decode(self, encoded: _Encoded, x: Tensor, c_noise: Tensor) -> Tensor:
        unet, image = self.unet, None
        h, skips, emb, text = encoded
        sizes_are_odd = isinstance(unet, UNet2DConditionModel) and any(
            side % 2**unet.num_upsamplers for side in x.shape[-2:]
        )
        for block in unet.up_blocks:
            count = len(block.resnets)  # pyright: ignore[reportArgumentType]
            residuals, skips = skips[-count:], skips[:-count]
            if hasattr(block, "skip_conv"):
                h, image = block(h, residuals, emb, image)
                continue
            more = _text(block, text)
            if sizes_are_odd and skips:
                more["upsample_size"] = skips[-1].shape[2:]
            h = block(
                hidden_states=h, res_hidden_states_tuple=residuals, temb=emb, **more
            )
        if unet.conv_norm_out is not None and unet.conv_act is not None:
            h = unet.conv_act(unet.conv_norm_out(h))
        output = unet.conv_out(h)
        if image is not None:
            output = output + image
        if isinstance(unet, UNet2DModel) and (
            unet.config["time_embedding_type"] == "fourier"
        ):
            output = output / expand_as(c_noise, output)
        return output


def _text(block: nn.Module, text: Tensor | None) -> dict[str, Any]:
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": text} if attends else {}


def _embed_labels(
    unet: UNet2DModel, x: Tensor, c_noise: Tensor, labels: Condition
) -> Tensor:
    has_classes = unet.class_embedding is not None
    if has_classes != (labels is not None):
        raise ValueError(
            "cond: the UNet "
            + ("needs class labels, got None" if has_classes else "has no classes")
            + "; pass integers [b] for a class-conditional UNet, else None."
        )
    emb = unet.time_embedding(unet.time_proj(c_noise).to(x.dtype))
    if labels is None:
        return emb
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError(f"cond: got {describe(labels)}, expected integer labels.")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"cond: got {describe(labels)}, expected one label for each of "
            f"{x.shape[0]} samples."
        )
    classes: nn.Module = unet.class_embedding  # pyright: ignore[reportAssignmentType]
    return emb + classes(labels).to(x.dtype)


def _embed_text(
    unet: UNet2DConditionModel, x: Tensor, c_noise: Tensor, cond: Condition
) -> tuple[Tensor, Tensor]:
    is_sdxl = unet.config["addition_embed_type"] == "text_time"
    width = unet.config["encoder_hid_dim"] or unet.config["cross_attention_dim"]
    check_condition(
        cond,
        TextPooledCondition if is_sdxl else TextCondition,
        x,
        width if isinstance(width, int) else None,
    )
    text = cond.text.to(x.dtype)
    added: dict[str, Tensor] = {}
    if is_sdxl:
        if cond.time_ids is None:
            raise ValueError("cond.time_ids: got None; SDXL wants sdxl_time_ids(...).")
        added = {"text_embeds": cond.pooled.to(x.dtype), "time_ids": cond.time_ids}
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=c_noise))
    more = unet.get_aug_embed(
        emb=emb, encoder_hidden_states=text, added_cond_kwargs=added
    )
    emb = emb if more is None else emb + more
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    text = unet.process_encoder_hidden_states(
        encoder_hidden_states=text, added_cond_kwargs=added
    )
    return emb, text


def _refuse_more_than_labels(unet: UNet2DModel) -> None:
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


def _refuse_more_than_text(unet: UNet2DConditionModel) -> None:
    for option, supported in TEXT_ONLY.items():
        if (value := unet.config[option]) not in supported:
            raise ValueError(
                f"unet: {option} {value!r} is not supported, only "
                f"{' or '.join(map(repr, supported))}; the UNet is given time and text."
            )
