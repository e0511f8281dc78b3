"""Released and trained weights of DMD2's official code: a bare UNet in one file.

The weights that its authors released are under a non-commercial licence, and so is what
is made from them.
"""

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from dmdkit._checked import describe
from dmdkit.adapters.weight_files import read_state_dict

_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
_PREFIXES = ("module.", "feedforward_model.")
_SHOWN = 3


def load_unet_weights(
    unet: UNet2DConditionModel | UNet2DModel, file: str | Path
) -> None:
    """Reads the weights of a UNet from one file, in place: all of them, and no others.

    For what official DMD2 released for SDXL (`dmd2_sdxl_4step_unet_fp16.bin`, to be
    called at 999, 749, 499, 249, and the one-step file, at 399) and for the generator
    in its checkpoints, `pytorch_model.bin`. Where every name begins with `module.` or
    with `feedforward_model.`, that is left off. Nothing in a file is executed.

    Args:
        unet: A UNet of diffusers with the file's configuration, that of the teacher.
            It keeps its dtype and device; the weights are cast.
        file: A state dict by diffusers' names: `.safetensors`, or `.bin`, `.pt`,
            `.pth`.

    Raises:
        TypeError: If `unet` is no UNet of diffusers.
        ValueError: If there is no such file, its suffix is unknown, it is damaged, or
            holds anything else than the UNet's weights: code, a LoRA, other names or
            shapes, numbers that are not finite in the UNet's dtype. The UNet is then
            left as it was.

    Examples:
        >>> import torch
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from diffusers import UNet2DModel
        >>> config = {
        ...     "block_out_channels": (32,),
        ...     "down_block_types": ("DownBlock2D",),
        ...     "up_block_types": ("UpBlock2D",),
        ... }
        >>> trained, unet = UNet2DModel(**config).half(), UNet2DModel(**config)
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "pytorch_model.bin"
        ...     torch.save(trained.state_dict(), file)
        ...     load_unet_weights(unet, file)
        >>> unet.conv_in.weight.equal(trained.conv_in.weight.float())
        True
    """
    if not isinstance(unet, UNet2DConditionModel | UNet2DModel):
        raise TypeError(
            f"unet: got {describe(unet)}, expected a UNet2DConditionModel or a "
            "UNet2DModel of diffusers, out of its UNetNetwork or wrapper."
        )
    file = Path(file)
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"file: {file} has the suffix {file.suffix!r}, expected "
            f"{', '.join(_SUFFIXES)}."
        )
    given = _without_prefix(read_state_dict(file, "file"))
    if any(".lora_" in name or name.startswith("lora_") for name in given):
        raise ValueError(
            f"file: {file} is a LoRA, no whole UNet; read it with load_lora of "
            "dmdkit.adapters.lora_files, or --lora of examples/sample.py."
        )
    own: dict[str, Tensor] = unet.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("unet: it is on the meta device; call to_empty first.")
    _check_names_and_shapes(file, given, own)
    _check_numbers(file, given, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _check_names_and_shapes(
    file: Path, given: dict[str, Tensor], own: dict[str, Tensor]
) -> None:
    faults = []
    if missing := [name for name in own if name not in given]:
        faults.append(f"lacks {_some(missing)}")
    if extra := [name for name in given if name not in own]:
        faults.append(f"has {_some(extra)}, which the UNet lacks")
    shapes = [
        f"{name} ({list(given[name].shape)}, expected {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if shapes:
        faults.append(f"has another shape for {_some(shapes)}")
    if faults:
        raise ValueError(
            f"file: {file} {'; '.join(faults)}; take the UNet of the teacher that the "
            "file was distilled from."
        )


def _check_numbers(
    file: Path, given: dict[str, Tensor], own: dict[str, Tensor]
) -> None:
    for name, tensor in own.items():
        value = given[name]
        if value.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"file: {name} in {file} is {describe(value)}, expected "
                f"{str(tensor.dtype).removeprefix('torch.')} or the like."
            )
        if not bool(value.to(tensor.dtype).isfinite().all()):
            raise ValueError(
                f"file: {name} in {file} is not finite as {tensor.dtype}; the file is "
                "of a run that diverged, or needs a UNet in a wider dtype."
            )


def _some(names: list[str]) -> str:
    """The number of names, and the first few of them."""
    shown = ", ".join(names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)}: {shown}{more}"
