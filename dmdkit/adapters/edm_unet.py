"""NVIDIA's ADM network as a diffusers `UNet2DModel`, tensor by tensor.

ADM is the UNet of Dhariwal & Nichol 2021 (arXiv 2105.05233) as Karras et al. 2022
(arXiv 2206.00364, Table 8) train it. Both networks are the same function; only names
and a few layouts differ.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

PREFIX = "model."
"""EDM's preconditioning wraps its network under this name."""

_HEAD_WIDTH, _GROUPS = 64, 32
_QKV = ("to_q", "to_k", "to_v")
_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
}
_ATTENTION = {
    "group_norm": "norm2",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj",
}


def adm_config(
    *,
    resolution: int,
    channels: int,
    widths: tuple[int, ...],
    blocks: int,
    attends: tuple[bool, ...],
    classes: int,
) -> dict[str, Any]:
    """The arguments of the diffusers `UNet2DModel` that is EDM's ADM network.

    Args:
        resolution: Height and width of the images.
        channels: Their channels.
        widths: Channels of each level, the finest first.
        blocks: Blocks a level in the encoder; the decoder has one more.
        attends: For each level whether its blocks attend, 64 channels a head.
        classes: Number of classes, 0 for none.

    Returns:
        The arguments by name.
    """
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": tuple(
            "AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]
        ),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": _HEAD_WIDTH,
        "norm_num_groups": _GROUPS,
        # Without it diffusers leaves out the norm before the middle attention.
        "attn_norm_num_groups": _GROUPS,
        "norm_eps": 1e-5,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": classes or None,
    }


def edm_unet_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derives the arguments of `UNet2DModel` from names and shapes alone.

    Args:
        state: A state dict of EDM's ADM network, by NVIDIA's names, with or without
            the prefix `model.`. Shapes do not say how wide its attention heads are;
            they are taken for ADM's, 64 channels.

    Returns:
        The arguments by name.

    Raises:
        ValueError: If it is no ADM network, or one that diffusers cannot express: fewer
            than 128 channels (fewer than 32 groups in a norm), a first level of other
            channels than the time embedding's.
    """
    state = without_prefix(state)
    if any("_aux_" in name for name in state):
        raise ValueError(
            "state: it is EDM's SongUNet (DDPM++, NCSN++), only its ADM network "
            "(DhariwalUNet) is supported."
        )
    levels = _levels(state)
    resolutions = sorted(levels, reverse=True)
    if not levels or min(levels.values()) != max(levels.values()):
        raise ValueError(
            "state: it is no ADM network of EDM, which has enc.{r}x{r}_block{i} with "
            f"as many blocks on every level; it starts with {_some(state)}."
        )
    if any(fine != 2 * coarse for fine, coarse in itertools.pairwise(resolutions)):
        raise ValueError(f"state: {resolutions} are not levels that halve each time.")
    finest = resolutions[0]
    firsts = [f"enc.{r}x{r}_block0" for r in resolutions]
    widths = tuple(_size(state, f"{first}.conv1.weight") for first in firsts)
    attends = tuple(f"{first}.qkv.weight" in state for first in firsts)
    channels = _size(state, f"enc.{finest}x{finest}_conv.weight", axis=1)
    time_channels = _size(state, "map_layer0.weight", axis=1)
    if widths[0] != time_channels:
        raise ValueError(
            f"state: the first level has {widths[0]} channels and the time embedding "
            f"{time_channels}; UNet2DModel needs them alike (channel_mult[0] = 1)."
        )
    if any(width < 4 * _GROUPS or width % _GROUPS for width in widths):
        raise ValueError(
            f"state: levels of {widths} channels; UNet2DModel has 32 groups in every "
            "norm, as ADM has only from 128 channels on, in multiples of 32."
        )
    # The middle block always attends.
    wide = zip(widths, (*attends[:-1], True), strict=True)
    if any(width % _HEAD_WIDTH for width, a in wide if a):
        raise ValueError(
            f"state: levels of {widths} channels attend, and a head has 64 of them."
        )
    label = "map_label.weight"
    return adm_config(
        resolution=finest,
        channels=channels,
        widths=widths,
        blocks=levels[finest],
        attends=attends,
        classes=_size(state, label, axis=1) if label in state else 0,
    )


def edm_to_unet(state: Mapping[str, Tensor]) -> UNet2DModel:
    """Converts the weights of EDM's ADM network; the function stays the same.

    What EDM calls c_noise is the UNet's timestep; labels are integers. The embedding of
    training augmentations, `map_augment`, is left out, as official DMD2 does.

    Args:
        state: A state dict as for `edm_unet_config`.

    Returns:
        The UNet in fp32, in evaluation mode. It shares memory with those tensors that
        are fp32 and laid out alike.

    Raises:
        ValueError: If `edm_unet_config` does, a tensor is missing, left over or of
            another shape, or a resampling filter is not the 2x2 box.
    """
    state = without_prefix(state)
    config = edm_unet_config(state)
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    sources = _sources(config)
    left = {name for name in state if name != "map_augment.weight"}
    missing: list[str] = []
    misshapen: list[str] = []
    converted: dict[str, Tensor] = {}
    for name, expected in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        source = f"{sources[module]}.{kind}"
        if source not in state:
            missing.append(source)
            continue
        left.discard(source)
        tensor = _as_unet_has_it(module, state[source], source)
        if tensor.shape == expected.shape:
            converted[name] = tensor
        else:
            misshapen.append(f"{source} {list(state[source].shape)}")
    for name in _filters(config):
        if name not in state:
            missing.append(name)
            continue
        left.discard(name)
        _check_filter(name, state[name])
    for problem, names in (
        ("are missing", dict.fromkeys(missing)),
        ("are left over", left),
        ("have another shape than ADM's", dict.fromkeys(misshapen)),
    ):
        if names:
            raise ValueError(f"state: {len(names)} tensors {problem}: {_some(names)}.")
    unet.load_state_dict(converted, assign=True)
    return unet.eval()


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the leading `model.` in its names, if all have it."""
    if all(name.startswith(PREFIX) for name in state):
        return {name.removeprefix(PREFIX): state[name] for name in state}
    return dict(state)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")


def _levels(state: Mapping[str, Tensor]) -> dict[int, int]:
    """Blocks of the encoder at each resolution."""
    found: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(r"enc\.(\d{1,5})x(\d{1,5})_block(\d{1,4})\.", name):
            height, width, block = (int(number) for number in match.groups())
            if height != width:
                raise ValueError(f"state: {name} is not square, as EDM's images are.")
            found.setdefault(height, set()).add(block)
    return {resolution: len(blocks) for resolution, blocks in found.items()}


def _size(state: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    if name not in state:
        raise ValueError(f"state: it is no ADM network of EDM: {name} is missing.")
    if state[name].ndim <= axis:
        raise ValueError(f"state: {name} has the shape {list(state[name].shape)}.")
    return state[name].shape[axis]


def _resolutions(config: Mapping[str, Any]) -> list[int]:
    levels = len(config["block_out_channels"])
    return [config["sample_size"] // 2**level for level in range(levels)]


def _sources(config: Mapping[str, Any]) -> dict[str, str]:
    """NVIDIA's name for each module of the UNet that has weights."""
    resolutions, blocks = _resolutions(config), config["layers_per_block"]
    last, coarsest = len(resolutions) - 1, resolutions[-1]
    sources = {
        "time_embedding.linear_1": "map_layer0",
        "time_embedding.linear_2": "map_layer1",
        "class_embedding": "map_label",
        "conv_in": f"enc.{resolutions[0]}x{resolutions[0]}_conv",
        "conv_norm_out": "out_norm",
        "conv_out": "out_conv",
    }

    def add(name: str, resnet: str, attention: str | None = None) -> None:
        sources.update({f"{resnet}.{k}": f"{name}.{v}" for k, v in _BLOCK.items()})
        if attention is not None:
            pairs = _ATTENTION.items()
            sources.update({f"{attention}.{k}": f"{name}.{v}" for k, v in pairs})

    middle = "mid_block"
    add(
        f"dec.{coarsest}x{coarsest}_in0",
        f"{middle}.resnets.0",
        f"{middle}.attentions.0",
    )
    add(f"dec.{coarsest}x{coarsest}_in1", f"{middle}.resnets.1")
    for level, r in enumerate(resolutions):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        if level > 0:
            add(f"enc.{r}x{r}_down", f"down_blocks.{level - 1}.downsamplers.0")
        if level < last:
            add(f"dec.{r}x{r}_up", f"up_blocks.{last - level - 1}.upsamplers.0")
        for side, block, count in (("enc", down, blocks), ("dec", up, blocks + 1)):
            for i in range(count):
                name = f"{side}.{r}x{r}_block{i}"
                add(name, f"{block}.resnets.{i}", f"{block}.attentions.{i}")
    return sources


def _filters(config: Mapping[str, Any]) -> list[str]:
    resolutions = _resolutions(config)
    blocks = [f"enc.{r}x{r}_down" for r in resolutions[1:]]
    blocks += [f"dec.{r}x{r}_up" for r in resolutions[:-1]]
    return [f"{b}.{conv}.resample_filter" for b in blocks for conv in ("conv0", "skip")]


def _check_filter(name: str, tensor: Tensor) -> None:
    box = torch.full((1, 1, 2, 2), 0.25)
    if tensor.shape != box.shape or not torch.equal(tensor.float(), box):
        raise ValueError(
            f"state: {name} is not the 2x2 box, all 0.25, with which UNet2DModel "
            "resamples."
        )


def _as_unet_has_it(module: str, tensor: Tensor, source: str) -> Tensor:
    """Lays a tensor out as diffusers does, in fp32."""
    if not tensor.is_floating_point():
        raise ValueError(f"state: {source} is {tensor.dtype}, expected floating point.")
    part = module.split(".")[-1]
    if tensor.ndim == 4 and part in (*_QKV, "0") and ".attentions." in module:
        tensor = tensor.flatten(1)  # EDM's 1x1 convolution is diffusers' linear layer
    if part in _QKV and tensor.ndim > 0:
        tensor = tensor[_QKV.index(part) :: 3]  # rows are (head, channel, {q, k, v})
    if part == "class_embedding" and tensor.ndim == 2:
        tensor = tensor.t()
    return tensor.detach().float().contiguous()
