"""EDM's ADM network anew: random weights, its function, and files as NVIDIA's."""

import functools
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

State = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """An ADM network; the defaults are about the smallest that diffusers can be."""

    resolution: int = 4
    widths: tuple[int, ...] = (128,)
    blocks: int = 1
    attends: tuple[bool, ...] = (False,)
    classes: int = 0
    channels: int = 3
    augment: int = 0
    middle_attends: bool = True

    @property
    def resolutions(self) -> list[int]:
        return [self.resolution // 2**level for level in range(len(self.widths))]

    def stages(self) -> Iterator[tuple[str, int, int, bool, str]]:
        """Blocks in order: name, channels in and out, attention, resampling."""
        width = self.widths[0]
        skips = [width]
        for level, r in enumerate(self.resolutions):
            if level > 0:
                yield f"enc.{r}x{r}_down", width, width, False, "down"
                skips.append(width)
            for i in range(self.blocks):
                out = self.widths[level]
                yield f"enc.{r}x{r}_block{i}", width, out, self.attends[level], ""
                skips.append(width := out)
        for level, r in reversed(list(enumerate(self.resolutions))):
            if level == len(self.widths) - 1:
                yield f"dec.{r}x{r}_in0", width, width, self.middle_attends, ""
                yield f"dec.{r}x{r}_in1", width, width, False, ""
            else:
                yield f"dec.{r}x{r}_up", width, width, False, "up"
            for i in range(self.blocks + 1):
                out, into = self.widths[level], width + skips.pop()
                yield f"dec.{r}x{r}_block{i}", into, out, self.attends[level], ""
                width = out
        assert not skips


IMAGENET64 = Spec(64, (192, 384, 576, 768), 3, (False, True, True, True), 1000)
TINY = Spec(widths=(8,), middle_attends=False)
"""Nothing diffusers could be, but a file of a few kilobytes."""


def random_state(spec: Spec, seed: int = 0) -> State:
    """Weights by NVIDIA's names, none of them zero; calls share their tensors."""
    return dict(_random_state(spec, seed))


@functools.lru_cache(maxsize=16)
def _random_state(spec: Spec, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    state: State = {}

    def draw(name: str, *shape: int, bias: bool = True) -> None:
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=g) / math.sqrt(fan_in)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)

    def draw_norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=g)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=g)

    first, emb, finest = spec.widths[0], 4 * spec.widths[0], spec.resolution
    if spec.augment:
        draw("model.map_augment", first, spec.augment, bias=False)
    draw("model.map_layer0", emb, first)
    draw("model.map_layer1", emb, emb)
    if spec.classes:
        draw("model.map_label", emb, spec.classes, bias=False)
    draw(f"model.enc.{finest}x{finest}_conv", first, spec.channels, 3, 3)
    for stage, into, out, attends, resampling in spec.stages():
        name = f"model.{stage}"
        draw_norm(f"{name}.norm0", into)
        draw(f"{name}.conv0", out, into, 3, 3)
        draw(f"{name}.affine", 2 * out, emb)
        draw_norm(f"{name}.norm1", out)
        draw(f"{name}.conv1", out, out, 3, 3)
        if into != out:
            draw(f"{name}.skip", out, into, 1, 1)
        if resampling:
            for conv in ("conv0", "skip"):
                state[f"{name}.{conv}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if attends:
            draw_norm(f"{name}.norm2", out)
            draw(f"{name}.qkv", 3 * out, out, 1, 1)
            draw(f"{name}.proj", out, out, 1, 1)
    draw_norm("model.out_norm", first)
    draw("model.out_conv", spec.channels, first, 3, 3)
    return state


class ADM:
    """The network's function, from the papers, on NVIDIA's names, in the state's dtype.

    Dhariwal & Nichol 2021, section 3 and appendix A; Karras et al. 2022, Table 1 for
    the preconditioning and Table 8 for the network.
    """

    def __init__(self, spec: Spec, state: State, sigma_data: float = 0.5) -> None:
        self.spec, self.state, self.sigma_data = spec, state, sigma_data
        self.encoded: Tensor | None = None

    def weight(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.state[f"model.{name}.weight"], self.state.get(f"model.{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, *self.weight(name))

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weight(name)
        return functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """At most 32 groups, of at least four channels."""
        groups = min(32, x.shape[1] // 4)
        return functional.group_norm(x, groups, *self.weight(name), eps=1e-5)

    def resample(self, x: Tensor, how: str) -> Tensor:
        b, c, h, w = x.shape
        if how == "down":  # the mean of each 2x2
            return x.view(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
        if how == "up":  # each pixel four times
            x = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2)
            return x.reshape(b, c, 2 * h, 2 * w)
        return x

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).flatten(2)
        out = torch.empty_like(x).flatten(2)
        for head in range(c // 64):
            # The rows of a head are its channels, each as query, key and value.
            mine = rows[:, 192 * head : 192 * (head + 1)]
            q, k, v = mine[:, 0::3], mine[:, 1::3], mine[:, 2::3]
            weights = torch.softmax(q.transpose(1, 2) @ k / 8, dim=-1)
            out[:, 64 * head : 64 * (head + 1)] = v @ weights.transpose(1, 2)
        return x + self.conv(f"{name}.proj", out.view(b, c, h, w))

    def block(
        self, name: str, x: Tensor, emb: Tensor, attends: bool, how: str
    ) -> Tensor:
        h = self.resample(functional.silu(self.norm(f"{name}.norm0", x)), how)
        h = self.conv(f"{name}.conv0", h)
        scale, shift = self.linear(f"{name}.affine", emb)[..., None, None].chunk(2, 1)
        h = functional.silu(self.norm(f"{name}.norm1", h) * (1 + scale) + shift)
        x = self.resample(x, how)
        if f"model.{name}.skip.weight" in self.state:
            x = self.conv(f"{name}.skip", x)
        x = x + self.conv(f"{name}.conv1", h)
        return self.attention(name, x) if attends else x

    def network(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        half = self.spec.widths[0] // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = c_noise[:, None] * rates
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.linear("map_layer1", functional.silu(self.linear("map_layer0", emb)))
        if labels is not None:
            one_hot = functional.one_hot(labels, self.spec.classes).to(x.dtype)
            emb = emb + self.linear("map_label", one_hot)
        emb = functional.silu(emb)
        r = self.spec.resolution
        x = self.conv(f"enc.{r}x{r}_conv", x)
        skips = [x]
        for name, into, _, attends, how in self.spec.stages():
            if name.endswith("_in0"):
                self.encoded = x
            if name.startswith("dec.") and "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            assert x.shape[1] == into
            x = self.block(name, x, emb, attends, how)
            if name.startswith("enc."):
                skips.append(x)
        return self.conv("out_conv", functional.silu(self.norm("out_norm", x)))

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        dtype = self.state["model.out_conv.weight"].dtype
        x, sigma, data = x.to(dtype), sigma.to(dtype), self.sigma_data
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + data**2
        out = self.network(x / total.sqrt(), sigma.log() / 4, labels)
        return data**2 / total * x + s * data / total.sqrt() * out


@dataclass
class File:
    """What NVIDIA's pickle of a network holds; a test changes what it is about."""

    spec: Spec
    state: State
    sigma_data: float = 0.5
    wrapper: str = "EDMPrecond"
    network: str = "DhariwalUNet"
    source: str = "raise RuntimeError('the source was run')\n"
    change: Callable[[nn.Module], Any] = lambda wrapper: None
    """What a test does to the network before it is written."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What stands beside `ema`."""


class _Persistent(nn.Module):
    """Pickles as `torch_utils.persistence` makes objects do."""

    source = ""

    def __reduce__(self) -> Any:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": type(self).__name__,
            "state": dict(self.__dict__),
        }
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return rebuild, (meta,)


def _object(kind: str, file: File, **attributes: Any) -> nn.Module:
    module = type(kind, (_Persistent,), {"source": file.source})()
    easy_dict = sys.modules["dnnlib.util"].EasyDict
    kwargs = easy_dict(attributes, init=dict(init_weight=np.sqrt(1 / 3)))
    module.__dict__.update(attributes, _init_args=(), _init_kwargs=kwargs)
    return module


def build(file: File) -> nn.Module:
    """The network as a tree of modules that pickle as NVIDIA's."""
    spec = file.spec
    wrapper = _object(
        file.wrapper,
        file,
        img_resolution=spec.resolution,
        img_channels=spec.channels,
        label_dim=spec.classes,
        use_fp16=True,
        sigma_min=0,
        sigma_max=float("inf"),
        sigma_data=file.sigma_data,
    )
    wrapper.register_buffer("scratch", torch.zeros(3), persistent=False)
    network = _object(file.network, file, label_dropout=0)
    wrapper.add_module("model", network)
    noise = dict(num_channels=spec.widths[0], max_positions=10000, endpoint=False)
    network.add_module("map_noise", _object("PositionalEmbedding", file, **noise))
    network.add_module("enc", nn.ModuleDict())
    network.add_module("dec", nn.ModuleDict())
    for name, into, out, attends, _ in spec.stages():
        heads = out // 64 if attends else 0
        block = _object(
            "UNetBlock",
            file,
            **dict(in_channels=into, out_channels=out, num_heads=heads, dropout=0.1),
            **dict(skip_scale=1, adaptive_scale=True, emb_channels=4 * spec.widths[0]),
        )
        wrapper.get_submodule(f"model.{name[:3]}").add_module(name[4:], block)
    for key, tensor in file.state.items():
        name, _, kind = key.rpartition(".")
        parent, _, last = name.rpartition(".")
        owner = wrapper.get_submodule(parent)
        if last not in dict(owner.named_children()):
            owner.add_module(last, _leaf(parent, last, tensor, file))
        leaf = wrapper.get_submodule(name)
        if kind == "resample_filter":
            leaf.register_buffer(kind, tensor)
        else:
            leaf.register_parameter(kind, nn.Parameter(tensor, requires_grad=False))
    file.change(wrapper)
    return wrapper


def _leaf(parent: str, name: str, tensor: Tensor, file: File) -> nn.Module:
    if "norm" in name:
        groups = min(32, len(tensor) // 4)
        return _object("GroupNorm", file, num_groups=groups, eps=1e-5)
    if name.startswith(("map_", "affine")):
        return _object("Linear", file, out_features=len(tensor))
    resampled = name in ("conv0", "skip")
    return _object(
        "Conv2d",
        file,
        up=resampled and parent.endswith("_up"),
        down=resampled and parent.endswith("_down"),
        fused_resample=False,
    )


@contextmanager
def nvidia_modules() -> Iterator[None]:
    """The modules that NVIDIA's files name, there only while one is written."""

    class EasyDict(dict[str, Any]):
        pass

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError(f"{meta} was rebuilt")

    made: dict[str, types.ModuleType] = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    for module, thing in (
        ("torch_utils.persistence", _reconstruct_persistent_obj),
        ("dnnlib.util", EasyDict),
    ):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(made[module], thing.__name__, thing)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def dumps(file: File, protocol: int = 4) -> bytes:
    """The file's bytes."""
    with nvidia_modules():
        return pickle.dumps(_content(file), protocol)


def write(path: Path, file: File, protocol: int = 4) -> Path:
    """Writes the file."""
    with nvidia_modules(), path.open("wb") as out:
        pickle.dump(_content(file), out, protocol)
    return path


def _content(file: File) -> dict[str, Any]:
    easy_dict = sys.modules["dnnlib.util"].EasyDict
    loss = _object("EDMLoss", file, P_mean=-1.2, P_std=1.2)
    content = {
        "ema": build(file),
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": dict(easy_dict(path="imagenet.zip", max_size=np.int64(7))),
    }
    return content | file.extra
