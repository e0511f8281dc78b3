"""Networks that give features for all samples and an output for the first ones."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from helpers_diffusers import (
    TEXT_UNETS,
    TRANSFORMERS,
    normal,
    text_inputs,
    text_unet,
    transformer,
    transformer_inputs,
    transformer_network,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from dmdkit import DiffusionGANHead, NetworkWithHead, frozen
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.lora import LoRANetwork

Inputs = tuple[Tensor, Tensor, Any]
ADM: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 3,
    "layers_per_block": 1,
}
FOURIER: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


class Case(NamedTuple):
    """A network, what it is fed, and the last block that only an output needs."""

    network: nn.Module
    inputs: Inputs
    last: nn.Module


def labelled(place: Any) -> Case:
    torch.manual_seed(0)
    unet = UNet2DModel(**ADM).eval()
    inputs = normal(4, 3, 8, 8), torch.arange(4.0), torch.tensor([0, 1, 2, 0])
    return Case(UNetNetwork(unet, place), inputs, unet.up_blocks[-1])


def fourier() -> Case:
    torch.manual_seed(0)
    unet = UNet2DModel(**FOURIER).eval()
    inputs = normal(4, 3, 16, 16), torch.arange(1, 5.0), None
    return Case(UNetNetwork(unet), inputs, unet.up_blocks[-1])


def text(kind: str, place: Any = "mid") -> Case:
    unet = text_unet(kind)
    return Case(UNetNetwork(unet, place), text_inputs(kind, 4), unet.up_blocks[-1])


def adapted() -> Case:
    case = text("as SDXL")
    network = LoRANetwork(case.network.requires_grad_(False), 2)
    tree: Any = network.network
    return Case(network, case.inputs, tree.unet.up_blocks[-1])


def of_transformer(kind: str) -> Case:
    network = transformer_network(kind, transformer(kind), 0)
    return Case(network, transformer_inputs(kind, 4), network.blocks[-1])


CASES: dict[str, Callable[[], Case]] = {
    "labels, mid": lambda: labelled("mid"),
    "labels, encoder": lambda: labelled("encoder"),
    "skips, fourier time": fourier,
    "as SDXL, encoder": lambda: text("as SDXL", "encoder"),
    "adapter": adapted,
    **{kind: lambda kind=kind: text(kind) for kind in TEXT_UNETS},
    **{kind: lambda kind=kind: of_transformer(kind) for kind in TRANSFORMERS},
}
cases = pytest.mark.parametrize("name", CASES)


def part(inputs: Inputs, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda x: x[rows], inputs)


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@cases
def test_a_joined_pass_gives_what_two_passes_give(name: str) -> None:
    network, inputs, last = CASES[name]()
    sizes: list[int] = []
    last.register_forward_hook(lambda _, a, out: sizes.append(len(first_of(out))))
    given = network(*inputs, want=("output", "features"), outputs=3)
    assert sizes == [3]
    assert len(given.features) == 4
    ours = gradients(network, given.output.square().sum() + given.features.sum())
    output = network(*part(inputs, slice(3)))
    features = [
        network(*part(inputs, rows), want=("features",)).features
        for rows in (slice(3), slice(3, 4))
    ]
    close(given.output, output)
    close(given.features, torch.cat(features))
    total = output.square().sum() + sum(f.sum() for f in features)
    theirs = gradients(network, total)
    assert ours.keys() == theirs.keys()
    # Of some weights the gradient is zero but for rounding: all are held together.
    close(flat(ours.values()), flat(theirs.values()))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[-1]


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


@cases
def test_an_output_without_gradient_saves_nothing_beyond_the_features(
    name: str,
) -> None:
    network, (x, t, cond), _ = CASES[name]()
    x.requires_grad_()

    def saved(**wanted: Any) -> tuple[int, Any]:
        sizes: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.numel()
            return value

        with saved_tensors_hooks(keep, lambda value: value):
            given = network(x, t, cond, **wanted)
        return sum(sizes.values()), given

    with frozen(network):
        both: Any = {"want": ("output", "features")}
        lean, given = saved(**both, output_grad=False)
        alone, features = saved(want=("features",))
        full, usual = saved(**both)
    assert not given.output.requires_grad
    assert torch.equal(given.output, usual.output)
    assert torch.equal(given.features, features.features)
    assert lean == alone < full
    (ours,) = torch.autograd.grad(given.features.sum(), x)
    (theirs,) = torch.autograd.grad(features.features.sum(), x)
    assert torch.equal(ours, theirs)


def test_features_before_the_middle_block_leave_it_out() -> None:
    network, inputs, _ = labelled("encoder")
    unet: Any = network.unet
    called: list[int] = []
    unet.mid_block.register_forward_pre_hook(lambda _, a: called.append(len(a[0])))
    network(*inputs, want=("features",))
    assert called == []
    network(*inputs, want=("output", "features"), outputs=1)
    assert called == [1]


def test_the_head_sees_all_samples_of_a_joined_pass() -> None:
    network, inputs, _ = text("as SDXL")
    torch.manual_seed(1)
    whole = NetworkWithHead(network, DiffusionGANHead(16, 4, groups=4))
    given = whole(*inputs, want=("output", "logits"), outputs=1)
    assert given.output.shape == (1, 4, 8, 8)
    close(given.logits, whole(*inputs, want=("logits",)).logits)
