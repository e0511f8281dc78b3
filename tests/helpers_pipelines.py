"""Tiny text-to-image pipelines, saved as diffusers' own folders, without a network.

Their parts are of the real classes, wired as in SD1.5 and SDXL; the weights are random.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dmdkit.data import LatentKind, ShardWriter, weights_digest

TOKENS = 77
SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SD15_UNET: dict[str, Any] = {
    **SMALL_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SDXL_UNET: dict[str, Any] = {
    **SMALL_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16 + 24,
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
SMALL_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
SD15_SCALING, SDXL_SCALING = 0.18215, 0.13025
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def save_sd15(folder: Path, *, seed: int = 0) -> Path:
    """Saves a pipeline of SD1.5's kind; latents are an eighth of the image's size."""
    torch.manual_seed(seed)
    words = tokenizer("<|endoftext|>")
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**SMALL_VAE, scaling_factor=SD15_SCALING),
        "text_encoder": CLIPTextModel(text_config(words, 16, "quick_gelu")),
        "tokenizer": words,
        "unet": UNet2DConditionModel(**SD15_UNET),
        "scheduler": DDIMScheduler(
            **SCHEDULE, clip_sample=False, set_alpha_to_one=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """Saves a pipeline of SDXL's kind: two text encoders, pooled text, time ids."""
    torch.manual_seed(seed)
    words, words_2 = tokenizer("<|endoftext|>"), tokenizer("!")
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**SMALL_VAE, scaling_factor=SDXL_SCALING),
        "text_encoder": CLIPTextModel(text_config(words, 16, "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(words_2, 24, "gelu")),
        "tokenizer": words,
        "tokenizer_2": words_2,
        "unet": UNet2DConditionModel(**SDXL_UNET),
        "scheduler": EulerDiscreteScheduler(**SCHEDULE),
    }
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_vae(folder: Path, *, seed: int = 0) -> Path:
    """Saves a VAE of TAESDXL's kind."""
    torch.manual_seed(seed)
    channels = (4, 4, 4, 4)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    vae.save_pretrained(folder)
    return folder


def save_latents(
    folder: Path, pipeline: Path, *, count: int = 12, resolution: int = 64
) -> Path:
    """Saves random latents with captions, as of the VAE of a pipeline's folder."""
    vae: Any = AutoencoderKL.from_pretrained(pipeline / "vae", local_files_only=True)
    kind = LatentKind(weights_digest(vae), vae.config["scaling_factor"], resolution)
    writer = ShardWriter(folder, about=kind.about())
    side = resolution // 8
    generator = torch.Generator().manual_seed(0)
    writer.add(
        latents=torch.randn(count, 4, side, side, generator=generator).half(),
        captions=[f"caption {i}" for i in range(count)],
    )
    writer.close()
    return folder


def save_prompts(file: Path, *, count: int = 6) -> Path:
    """Writes a file of prompts."""
    file.write_text("".join(f"prompt number {i}\n" for i in range(count)))
    return file


def tokenizer(pad_token: str) -> CLIPTokenizer:
    """Answers one token a byte: CLIP's alphabet, and no merges."""
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        model_max_length=TOKENS,
        pad_token=pad_token,
    )


def byte_letters() -> list[str]:
    """One printable letter for each byte, as in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in others]


def text_config(words: Any, width: int, activation: str) -> CLIPTextConfig:
    """Two layers of a width, for the words of a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
