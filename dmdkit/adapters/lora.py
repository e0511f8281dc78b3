"""Low-rank adapters: several networks to train on one copy of a teacher's weights."""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dmdkit._checked import describe
from dmdkit._random import check_generator
from dmdkit.types import Condition, Latent, NetworkOutput, Time, Want

OFFICIAL_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""The layers of a UNet that official DMD2 adapts when it trains a LoRA student."""

_NAME = "default"


class LoRANetwork(nn.Module):
    r"""A network whose weights are another's, plus a low-rank update of its own.

    Every adapted layer computes $W x + \frac{\alpha}{r} B A x$ (Hu et al. 2021, arXiv
    2106.09685, section 4.1). $W$ is the weight of `network` itself, not a copy, so the
    teacher, a LoRA student and a LoRA critic fit into the memory of one: the teacher is
    `network`, the others are made on it. What peft does with several adapters in one
    network, switching which is active, is not done here: each `LoRANetwork` walks its
    own tree of modules over the same weights. So their forwards and backwards can be
    mixed in any order, compiled, and with activation checkpointing: the non-reentrant
    one, which is diffusers' default, since the other gives the layers before the first
    adapter no gradient to carry.

    Parameters, state, averages, `frozen` and copies of it mean $A$ and $B$ alone. They
    are fp32, and so are their sum with a layer's output; under autocast their products
    are not. $B$ is 0 at first, hence the output is that of `network` to the last bit.
    A critic with a head is `NetworkWithHead(LoRANetwork(network), head)`.
    `trainable_copy` gives a second adapter on the same weights, starting from this one.

    Move or cast `network` first: that moves what all share, `to` on this module moves
    the adapter alone. Other settings of `network` (activation checkpointing, attention
    processors) are taken over as they are now; later ones are made on `.network`.
    DDP wraps this module as any other. FSDP2 cannot shard the shared weights.

    Attributes:
        adapter: $A$ and $B$ by the names of the layers, `....lora_A.weight`.
        rank: $r$.
        alpha: $\alpha$.

    Args:
        network: The teacher's network, frozen, such as a `UNetNetwork`; bf16 or not.
        rank: $r$, at least 1. Official DMD2 has 64.
        alpha: $\alpha$ > 0. Official DMD2 has 8.
        targets: The linear and convolutional layers to adapt: the ends of their names.
        generator: Draws $A$, on the device of the weights.

    Raises:
        TypeError: If `network` is no module, is wrapped or sharded, or a target is no
            linear or convolutional layer.
        ValueError: If the network is not frozen or has adapters already, no layer is a
            target, or a number is out of range.

    Examples:
        >>> from diffusers import UNet2DModel
        >>> from dmdkit.adapters.diffusers import UNetNetwork
        >>> unet = UNet2DModel(
        ...     block_out_channels=(32,),
        ...     down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",),
        ... )
        >>> teacher = UNetNetwork(unet).requires_grad_(False)
        >>> student, critic = (LoRANetwork(teacher, rank=4) for _ in range(2))
        >>> sum(p.numel() for p in student.parameters())
        28032
        >>> sum(p.numel() for p in teacher.parameters())
        220195

        A full-rank critic for a LoRA student, as in official DMD2: copy the teacher
        first, while its weights are fp32.

        >>> from dmdkit import DiscreteVariancePreserving, EpsilonPrediction
        >>> from dmdkit import ScoreEstimator, trainable_copy
        >>> noise = DiscreteVariancePreserving.scaled_linear()
        >>> real = ScoreEstimator(teacher, noise, EpsilonPrediction())
        >>> fake = trainable_copy(real)
        >>> few = ScoreEstimator(LoRANetwork(teacher, 4), noise, EpsilonPrediction())
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = 64,
        alpha: float | int = 8,
        targets: Sequence[str] = OFFICIAL_TARGETS,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(
                f"rank, alpha: got {rank}, {alpha}, expected rank >= 1 and a finite "
                "alpha > 0."
            )
        _check_base(network)
        _check_targets(network, targets)
        tree = copy.deepcopy(network, _shared(network))
        # On the meta device peft draws no random numbers and takes no memory.
        inject_adapter_in_model(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
                target_modules=list(targets),
                init_lora_weights=False,
            ),
            tree,
            _NAME,
            low_cpu_mem_usage=True,
        )
        self.rank, self.alpha = rank, alpha
        self.adapter = _adapter(tree)
        # Not as a submodule: the base is nobody's parameters.
        object.__setattr__(self, "_tree", tree)
        self.reset_parameters(generator)
        self.train()

    _tree: nn.Module

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Latent,
            c_noise: Time,
            cond: Condition = None,
            *,
            want: Sequence[Want] | None = None,
            **decoding: Any,
        ) -> Any:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    @property
    def network(self) -> nn.Module:
        """The adapted network; its weights are the base's, its settings its own."""
        return self._tree

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        r"""Draws $A$ anew and sets $B$ to 0, as peft does.

        Args:
            generator: Draws $A$, on the device of the weights.

        Raises:
            ValueError: If the generator lives on another device.
        """
        for name, parameter in self.adapter.named_parameters():
            if name.endswith("lora_B.weight"):
                nn.init.zeros_(parameter)
                continue
            check_generator(generator, parameter.device)
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Condition = None,
        *,
        want: Sequence[Want] | None = None,
        **decoding: Any,
    ) -> Tensor | NetworkOutput:
        """Answers as the base does, with other weights.

        Args:
            x: The network's input, [b, ...].
            c_noise: What it is fed as time, fp32 [b].
            cond: The condition.
            want: What to answer with; the output alone if None.
            **decoding: What else the base takes, such as `outputs`.

        Returns:
            The output, or a `NetworkOutput` if `want` is given.
        """
        if want is None:
            return self._tree(x, c_noise, cond)
        return self._tree(x, c_noise, cond, want=want, **decoding)

    def train(self, mode: bool = True) -> "LoRANetwork":
        """Sets the mode of this network, not of the base.

        Args:
            mode: Training, or evaluation.

        Returns:
            The network.
        """
        self._tree.train(mode)
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoRANetwork":
        own = set(self.adapter.modules())
        memo.update(_shared(self._tree, own))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _shared(network: nn.Module, but: set[nn.Module] | None = None) -> dict[int, Any]:
    """A memo by which a deep copy of modules keeps the very dicts of their tensors.

    So what is done to the tensors of one is done to those of the other, even where
    PyTorch replaces the tensor, as a cast does to a buffer.
    """
    return {
        id(tensors): tensors
        for module in network.modules()
        if but is None or module not in but
        for tensors in (module._parameters, module._buffers)
    }


def _adapter(tree: nn.Module) -> nn.Module:
    """Allocates peft's matrices, and gives them in a tree with the layers' names."""
    root = nn.Module()
    layers: list[tuple[str, Any]] = [
        (name, m) for name, m in tree.named_modules() if isinstance(m, LoraLayer)
    ]
    for name, layer in layers:
        weight: Tensor = layer.get_base_layer().weight
        double = weight.dtype == torch.float64
        parent = root
        for part in name.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        for kind in ("lora_A", "lora_B"):
            matrix: nn.Module = getattr(layer, kind)[_NAME]
            # Made in the dtype of the base, in which small updates would be lost.
            matrix.to_empty(device=weight.device).to(
                torch.float64 if double else torch.float32
            )
            parent.add_module(kind, matrix)
    return root


def _check_base(network: nn.Module) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network: got {describe(network)}, expected a module such as UNetNetwork."
        )
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if any(isinstance(m, wrapped) for m in network.modules()) or any(
        hasattr(p, "device_mesh") for p in network.parameters()
    ):
        raise TypeError(
            "network: it is wrapped or sharded; make the LoRANetwork on the plain one "
            "and wrap that."
        )
    if any(isinstance(m, LoRANetwork | LoraLayer) for m in network.modules()):
        raise ValueError(
            "network: it has adapters already; pass the one without, or fuse them."
        )
    if any(p.requires_grad for p in network.parameters()):
        raise ValueError(
            "network: its weights require gradients, but they are shared and must not "
            "be trained; call network.requires_grad_(False) first."
        )


def _check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    if isinstance(targets, str):
        raise TypeError(f"targets: got the string {targets!r}, expected a sequence.")
    found = {
        name: module
        for name, module in network.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    }
    if not found:
        raise ValueError(
            f"targets: no layer of {type(network).__name__} ends in any of "
            f"{', '.join(targets)}; give ends of names in network.named_modules()."
        )
    for name, module in found.items():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise TypeError(
                f"targets: {name} is a {type(module).__name__}, expected Linear or "
                "Conv2d layers; give longer ends of names."
            )
