"""What the text-to-image examples share: pipelines by name, and their pictures."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from torch import Tensor

from dmdkit.adapters.pipelines import TextPipeline


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
