"""What the text-to-image examples share: pipelines, latents, networks at full size."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from torch import Tensor

from dmdkit.adapters.conditions import (
    TextCondition,
    TextPooledCondition,
    sdxl_time_ids,
)
from dmdkit.adapters.pipelines import TextPipeline

TOKENS = 77
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""The UNet of SD1.5: 859,520,964 parameters."""
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The UNet of SDXL: 2,567,463,684 parameters."""
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""The text encoder of SD1.5, and the first of SDXL: 123,060,480 parameters."""
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
"""The second text encoder of SDXL: 694,659,840 parameters."""
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
"""The VAE of SD1.5 and of SDXL: 83,653,863 parameters."""


def open_pipeline(
    source: str,
    option: str,
    *,
    local_files_only: bool = False,
    **parts: Any,
) -> TextPipeline:
    """Opens a pipeline of SD1.x, SD2.x or SDXL from a folder or the hub, in fp32.

    `option` is what messages call it: "pretrained" for an option of the command line,
    "FOLDER" for an argument. `parts` replaces components, such as `unet=None` to leave
    one out.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    name = option if option.isupper() else f"--{option}"
    local = local_files_only or Path(source).is_dir()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            local_files_only=local,
            **parts,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(
            f"{name} {source}: it is no folder of a pipeline, nor could it be read "
            f"from the hub: {reason}"
        ) from error
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise SystemExit(
            f"{name} {source}: it is a {type(pipeline).__name__}, expected a "
            "pipeline of SD1.x, SD2.x or SDXL."
        )
    pipeline.set_progress_bar_config(disable=True)
    # Else every prompt of more than 77 tokens, which are cut, would be printed.
    logging.set_verbosity_error()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part.dtype != torch.float32:
            part.float()  # text encoders come in the precision of their file
    return pipeline


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decodes scaled latents one by one to images in [-1, 1], [b, 3, h, w]."""
    weight = next(vae.parameters())
    z = latents.to(weight) / vae.config["scaling_factor"]
    z = z + (vae.config.get("shift_factor") or 0.0)
    return torch.cat([vae.decode(z[i : i + 1]).sample.float() for i in range(len(z))])


def config_of(source: str, part: str, default: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a pipeline's part: the folder's, if it is one, or another.

    So networks of random weights have the shape of a local teacher.
    """
    file = Path(source) / part / "config.json"
    if not file.is_file():
        return default
    config = json.loads(file.read_text())
    return {k: v for k, v in config.items() if not k.startswith("_")}


def parts_beside(source: str, kind: type) -> dict[str, int]:
    """Parameters of what a pipeline has beside its UNet, counted without memory."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def text(part: str, default: dict[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig(**config_of(source, part, default))

    with torch.device("meta"):
        found = {
            "vae": count(AutoencoderKL(**config_of(source, "vae", VAE))),
            "text_encoder": count(CLIPTextModel(text("text_encoder", CLIP_L))),
        }
        if issubclass(kind, StableDiffusionXLPipeline):
            second = CLIPTextModelWithProjection(text("text_encoder_2", CLIP_BIG_G))
            found["text_encoder_2"] = count(second)
    return found


class LatentSpace(NamedTuple):
    """What the UNet works on."""

    channels: int
    side: int
    resolution: int
    """Height and width of the images, in pixels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """One latent."""
        return self.channels, self.side, self.side


def latent_space(
    config: Any, pipeline: TextPipeline | None, resolution: int | None
) -> LatentSpace:
    """The latents of a UNet at a resolution; without a pipeline an eighth of it."""
    factor: int = 8 if pipeline is None else pipeline.vae_scale_factor
    if resolution is None:
        resolution = int(config["sample_size"]) * factor
    least = factor << len(config["block_out_channels"]) - 1
    if resolution < least or resolution % least:
        raise SystemExit(f"--resolution {resolution}: expected a multiple of {least}.")
    return LatentSpace(config["in_channels"], resolution // factor, resolution)


def random_unet(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> UNet2DConditionModel:
    """A UNet of random weights, made where it is to be and in the dtype it is to have.

    A CPU takes a minute to draw those of SDXL.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return UNet2DConditionModel(**config)
    finally:
        torch.set_default_dtype(before)


def random_condition(
    config: Any, count: int, resolution: int, generator: torch.Generator | None = None
) -> TextCondition | TextPooledCondition:
    """What text encoders could have given a UNet of this kind."""
    device = None if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, device=device)

    text = normal(TOKENS, config["cross_attention_dim"])
    if config["addition_embed_type"] is None:
        return TextCondition(text)
    ids = 6 * config["addition_time_embed_dim"]
    pooled = normal(config["projection_class_embeddings_input_dim"] - ids)
    return TextPooledCondition(
        text, pooled, sdxl_time_ids(count, resolution, text.device)
    )
