"""Adapters with something in them, and the same mathematics with merged weights."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers_diffusers import SMALL, TEXT_UNETS, text_unet
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.types import NetworkOutput, Want

RANK, ALPHA = 3, 2
SOME = ("to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj")
"""A third of the official targets, linear and convolutional, for quick tests."""

SDXL: dict[str, Any] = {
    **{k: v for k, v in TEXT_UNETS["as SDXL"].items() if k not in SMALL},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The settings of the true SDXL, for the meta device."""


def base(kind: str = "as SDXL", dtype: torch.dtype = torch.float32) -> UNetNetwork:
    """A frozen teacher's network, in the mode for training."""
    return UNetNetwork(text_unet(kind)).to(dtype).requires_grad_(False).train()


def fill(network: LoRANetwork, seed: int) -> LoRANetwork:
    """Gives both matrices numbers that change the output by about half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return network


def adapted(network: nn.Module, seed: int = 0, **more: Any) -> LoRANetwork:
    return fill(
        LoRANetwork(network, **{"rank": RANK, "alpha": ALPHA, "targets": SOME, **more}),
        seed,
    )


class PooledHead(nn.Module):
    """A linear layer on the mean of the tiny UNets' features, which keeps fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.tanh().mean(dim=(2, 3))).squeeze(1)


class Merged(nn.Module):
    """A network of its own, computing with W + alpha / r B A: no peft, no sharing."""

    def __init__(self, network: nn.Module, like: LoRANetwork) -> None:
        super().__init__()
        self.scale = like.alpha / like.rank
        own = {n: p.detach().clone() for n, p in like.adapter.named_parameters()}
        self.names = list(own)
        self.matrices = nn.ParameterList(own.values())
        self.base = (copy.deepcopy(network),)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Any = None,
        *,
        want: Sequence[Want] | None = None,
    ) -> Tensor | NetworkOutput:
        (network,) = self.base
        weights: dict[str, Tensor] = dict(network.named_parameters())
        matrices = dict(zip(self.names, self.matrices, strict=True))
        for name, a in matrices.items():
            if name.endswith("lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                b = matrices[f"{layer}.lora_B.weight"].flatten(1)
                weight = weights[f"{layer}.weight"]
                update = (b @ a.flatten(1)).reshape(weight.shape)
                weights[f"{layer}.weight"] = weight + self.scale * update
        given = {} if want is None else {"want": want}
        return functional_call(network, weights, (x, c_noise, cond), given)


def _reentrant(module: nn.Module, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


CHECKPOINTING: dict[str, Callable[[UNetNetwork], object]] = {
    "no checkpointing": lambda network: None,
    "checkpointing": lambda network: network.unet.enable_gradient_checkpointing(),
    "reentrant": lambda network: network.unet.enable_gradient_checkpointing(_reentrant),
}


def storages(*modules: nn.Module) -> dict[int, int]:
    """The bytes of every tensor that modules hold, each once."""
    held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}


def gradients(network: nn.Module) -> list[Tensor]:
    found = [p.grad for p in network.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]
