"""Tiny diffusers models of each family, what they are fed, and what hooks see."""

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from dmdkit.adapters.diffusers import (
    DiTNetwork,
    FluxNetwork,
    PixArtNetwork,
    SD3Network,
    TextCondition,
    TextMaskCondition,
    TextPooledCondition,
    sdxl_time_ids,
)

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
TEXT_UNETS: dict[str, dict[str, Any]] = {
    "as SD1.5": {
        **SMALL,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
    },
    "as SD2": {
        **SMALL,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "as SDXL": {
        **SMALL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 5 + 6 * 4,
    },
}


def text_unet(kind: str, **more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TEXT_UNETS[kind], **more}).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_inputs(kind: str, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Any]:
    """The input, whole times and the condition of a kind of UNet."""
    x, text = normal(batch, 4, 8, 8, seed=seed), normal(batch, 7, 6, seed=seed + 1)
    t = torch.tensor([999.0, 749.0, 20.0, 0.0])[:batch]
    if kind != "as SDXL":
        return x, t, TextCondition(text)
    pooled = normal(batch, 5, seed=seed + 2)
    return x, t, TextPooledCondition(text, pooled, sdxl_time_ids(batch, 64))


def call_text_unet(unet: UNet2DConditionModel, x: Tensor, t: Tensor, c: Any) -> Tensor:
    """Diffusers' own forward, with whole numbers as time, as its pipelines call it."""
    dtype = unet.dtype
    added = None
    if isinstance(c, TextPooledCondition):
        added = {"text_embeds": c.pooled.to(dtype), "time_ids": c.time_ids}
    return unet(x.to(dtype), t.long(), c.text.to(dtype), added_cond_kwargs=added).sample


def calls(*modules: nn.Module) -> list[nn.Module]:
    """A list that grows by each of the modules as it is called."""
    called: list[nn.Module] = []
    for module in modules:
        module.register_forward_hook(lambda m, args, output: called.append(m))
    return called


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss on the output in a module's parameters."""
    module.zero_grad()
    output.square().mean().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


SMALL_TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "num_layers": 3,
}
PIXART: dict[str, Any] = {
    **SMALL_TRANSFORMER,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 24,
    "caption_channels": 6,
    "sample_size": 8,
}
SD3: dict[str, Any] = {
    **SMALL_TRANSFORMER,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 6,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 12,
}
FLUX: dict[str, Any] = {
    **SMALL_TRANSFORMER,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "axes_dims_rope": (2, 2, 4),
}
TRANSFORMERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD3": (SD3Network, SD3),
    "SD3.5": (
        SD3Network,
        {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    ),
    "Flux schnell": (FluxNetwork, FLUX),
    "Flux dev": (FluxNetwork, {**FLUX, "guidance_embeds": True}),
    "PixArt sigma": (PixArtNetwork, PIXART),
    "PixArt alpha": (PixArtNetwork, {**PIXART, "use_additional_conditions": True}),
    "DiT": (
        DiTNetwork,
        {
            **SMALL_TRANSFORMER,
            "in_channels": 4,
            "out_channels": 8,
            "num_embeds_ada_norm": 10,
            "sample_size": 8,
        },
    ),
}
# What bf16 can hold times 1000, since diffusers rounds it.
GUIDANCE = {"Flux dev": 4.0}


def transformer(kind: str) -> Any:
    """A tiny transformer without a weight that is zero, as some are at first."""
    torch.manual_seed(0)
    network, config = TRANSFORMERS[kind]
    model = network.family(**config).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model


def transformer_network(kind: str, model: Any, features: int | None = None) -> Any:
    more = {"guidance": GUIDANCE[kind]} if kind in GUIDANCE else {}
    return TRANSFORMERS[kind][0](model, features, **more)


def transformer_inputs(
    kind: str, batch: int = 2, size: tuple[int, int] = (8, 8)
) -> tuple[Tensor, Tensor, Any]:
    """The input, times as the family wants them, and the condition."""
    x, text = normal(batch, 4, *size), normal(batch, 7, 6, seed=2)
    times = torch.tensor([749.0, 250.0, 20.0, 999.0])[:batch]
    if kind == "DiT":
        return x, times, torch.tensor([3, 10, 0, 1])[:batch]
    if kind.startswith("PixArt"):
        mask = (torch.arange(7) < torch.tensor([[3], [7], [1], [5]])[:batch]).long()
        sizes = torch.tensor([[64.0, 64.0]]).repeat(batch, 1), torch.ones(batch, 1)
        more = sizes if kind == "PixArt alpha" else ()
        return x, times, TextMaskCondition(text, mask, *more)
    if kind.startswith("Flux"):
        times = times / 1000
    return x, times, TextPooledCondition(text, normal(batch, 5, seed=3))


def call_transformer(kind: str, model: Any, x: Tensor, t: Tensor, c: Any) -> Tensor:
    """Diffusers' own forward, called as its pipelines do."""
    dtype, channels = model.dtype, x.shape[1]
    x = x.to(dtype)
    if kind == "DiT":
        return model(x, timestep=t.long(), class_labels=c).sample[:, :channels]
    text = c.text.to(dtype)
    if kind.startswith("PixArt"):
        added = {"resolution": c.resolution, "aspect_ratio": c.aspect_ratio}
        output = model(
            x,
            encoder_hidden_states=text,
            timestep=t.long(),
            added_cond_kwargs=added,
            encoder_attention_mask=c.mask,
        ).sample
        return output.chunk(2, dim=1)[0]
    pooled = c.pooled.to(dtype)
    if kind.startswith("SD3"):
        return model(x, text, pooled, t).sample
    b, _, height, width = x.shape
    guidance = torch.full((b,), GUIDANCE[kind]) if kind in GUIDANCE else None
    output = model(
        FluxPipeline._pack_latents(x, b, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            b, height // 2, width // 2, "cpu", torch.float32
        ),
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=guidance,
    ).sample
    return FluxPipeline._unpack_latents(output, height * 8, width * 8, 8)
