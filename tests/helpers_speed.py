"""The recipes on small networks and random data, for what is the same in all."""

from pathlib import Path
from typing import Any

import imagenet_edm
import sd15
import sdxl
import torch
from distillation import Distillation
from runs import parse
from text_to_image import TextDistillation

FAST = "--workers 0 --device cpu --precision fp32 --batch-size 2".split()
SDXL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 5 + 6 * 4,
}
SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}


def build(recipe: str, teacher: Path, *options: str) -> Distillation:
    """A recipe on a small network; its data are random numbers."""
    module: Any = {"imagenet": imagenet_edm, "sd15": sd15, "sdxl": sdxl}[recipe]
    torch.manual_seed(0)
    given = [*FAST, "--learning-rate", "1e-3", *options]
    if recipe == "imagenet":
        given += ["--teacher", str(teacher)]
        return imagenet_edm.build(parse(module.Settings, module.PRESETS, given))
    given += ["--random-init", "--gan"]
    config = SDXL if recipe == "sdxl" else SD15
    return TextDistillation(parse(module.Settings, module.PRESETS, given), config)
