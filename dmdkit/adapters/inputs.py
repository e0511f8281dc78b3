"""What every adapter of a diffusers network looks at before it calls the network."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dmdkit._checked import describe


def input_dtype(model: ModelMixin, first: nn.Module) -> torch.dtype:
    """The dtype in which a network computes.

    `model.dtype` walks over all modules, 4 ms for SDXL, so the first layer is asked;
    not if it only stores its weights in 8 bits, as diffusers' layerwise casting does.

    Args:
        model: The network.
        first: Its layer that the input goes into.

    Returns:
        The dtype to cast the input to.
    """
    weight: Tensor = first.weight  # pyright: ignore[reportAssignmentType]
    return model.dtype if weight.dtype.itemsize == 1 else weight.dtype


def check_condition(cond: Any, kind: Any, x: Tensor, width: int | None = None) -> None:
    """Raises unless `cond` is of one kind and of the batch of `x`.

    Args:
        cond: What came.
        kind: The NamedTuple that the network wants.
        x: The network's input, [b, ...].
        width: The last axis of the text that the network wants; None if it is unknown.

    Raises:
        TypeError: If it is of another kind, or a part is no tensor.
        ValueError: If a part is of another batch, or the text of another width.
    """
    if not isinstance(cond, kind):
        raise TypeError(
            f"cond: got {describe(cond)}, expected a {kind.__name__}"
            f"({', '.join(kind._fields)}), which is what this network is fed."
        )
    parts: Mapping[str, Any] = cond._asdict()
    for name, part in parts.items():
        if part is None and name in kind._field_defaults:
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"cond.{name}: got {describe(part)}, expected a tensor.")
        if part.ndim < 1 or len(part) != len(x):
            raise ValueError(
                f"cond.{name}: got {describe(part)}, expected {len(x)} in the first "
                "axis, the batch of x."
            )
    if width is not None and cond.text.shape[-1] != width:
        raise ValueError(
            f"cond.text: got {describe(cond.text)}, expected {width} in the last axis; "
            "use the text encoders that the network was trained with."
        )


def check_time(c_noise: Tensor) -> None:
    """Raises `TypeError` if the time has lost its precision on the way.

    Args:
        c_noise: What a network is fed as time, [b].

    Raises:
        TypeError: If it is no fp32 or better.
    """
    if c_noise.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"c_noise: got {describe(c_noise)}, expected float32, since bf16(749) is "
            "748; under FSDP2 set MixedPrecisionPolicy(cast_forward_inputs=False)."
        )
