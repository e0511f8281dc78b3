"""Adapters as files that diffusers, ComfyUI and others load, and the way back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmdkit._checked import describe
from dmdkit.adapters.lora import LoRANetwork

Layout = Literal["diffusers", "kohya"]

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a folder."""

_METADATA = "lora_adapter_metadata"
_NOT_PLAIN = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")


class _Layer(NamedTuple):
    """The two matrices of a layer."""

    a: Tensor
    b: Tensor


def save_lora(
    network: LoRANetwork,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> Path:
    r"""Writes the adapter of a network as a safetensors file.

    - "diffusers": peft's names, with rank and $\alpha$ in the metadata, without which
      diffusers takes $\alpha$ to be the rank. To load: `pipe.load_lora_weights(folder)`
      or `unet.load_lora_adapter(folder, prefix="unet", use_safetensors=True)`.
    - "kohya": `lora_unet_...` names with an `.alpha` for each layer, as official DMD2
      releases its LoRAs, for ComfyUI, A1111 and others; diffusers loads it too.

    Args:
        network: The network, on a `UNetNetwork`; for "diffusers" also on the network of
            a transformer.
        path: A file that ends in .safetensors, or a folder, in which the file gets the
            name that diffusers looks for.
        layout: The names in the file.
        dtype: The numbers in the file; released LoRAs are mostly fp16.

    Returns:
        The file.

    Raises:
        TypeError: If the network is no `LoRANetwork`.
        ValueError: If the layout is unknown or does not exist for the network.
        OSError: If the file cannot be written; one that was there stays as it was.

    Examples:
        An average of the weights:

        ```python
        with ema.applied_to(network):
            save_lora(network, "student", dtype=torch.float16)
        pipe.load_lora_weights("student")
        ```
    """
    if layout not in ("diffusers", "kohya"):
        raise ValueError(f"layout: got {layout!r}, expected 'diffusers' or 'kohya'.")
    root, layers = _layers(network)
    if layout == "kohya" and root != "unet":
        raise ValueError(f"layout: 'kohya' has no names for a {root}; use 'diffusers'.")
    state, metadata = {}, {"format": "pt"}
    for name, matrices in layers.items():
        for key, matrix in zip(_keys(layout, root, name), matrices, strict=True):
            state[key] = matrix.detach().to("cpu", dtype).contiguous()
        if layout == "kohya":
            state[_alpha_key(name)] = torch.tensor(float(network.alpha))
    if layout == "diffusers":
        config = {
            f"{root}.r": network.rank,
            f"{root}.lora_alpha": network.alpha,
            f"{root}.target_modules": list(layers),
        }
        metadata[_METADATA] = json.dumps(config)
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(state, partial, metadata)
    partial.chmod(mode)  # safetensors leaves files to their owner alone
    partial.replace(file)
    return file


def load_lora(network: LoRANetwork, path: str | Path) -> None:
    r"""Reads an adapter into a network, in place: all of it, and nothing else.

    Either layout of `save_lora` is understood. The official SDXL LoRAs of DMD2 are
    "kohya", of the default rank, $\alpha$ and targets.

    Args:
        network: A network of the file's layers, rank and $\alpha$.
        path: A .safetensors file, or a folder that `save_lora` wrote into.

    Raises:
        TypeError: If the network is no `LoRANetwork`.
        ValueError: If the file's layers, shapes, $\alpha$ or kind of adapter are not
            those of the network, which is then left as it was.
        OSError: If there is no such file.
    """
    root, layers = _layers(network)
    file = _file(path)
    given, metadata = _read(file)
    layout = "kohya" if any(".lora_down." in key for key in given) else "diffusers"
    alphas = {
        name: float(given.pop(_alpha_key(name)))
        for name in layers
        if layout == "kohya" and _alpha_key(name) in given
    }
    if layout == "diffusers" and f"{root}.lora_alpha" in metadata:
        _refuse_what_is_not_plain(file, root, metadata)
        alphas = dict.fromkeys(layers, float(metadata[f"{root}.lora_alpha"]))
    keys = {name: _keys(layout, root, name) for name in layers}
    odd = sorted(set(given) ^ {key for pair in keys.values() for key in pair})
    if odd:
        raise ValueError(
            f"path: {len(odd)} names are only in {file} or only in the network, "
            f"{', '.join(odd[:3])} among them; make the LoRANetwork on the model and "
            "with the targets that the file was made for."
        )
    for name, matrices in layers.items():
        for key, matrix in zip(keys[name], matrices, strict=True):
            if given[key].shape != matrix.shape:
                raise ValueError(
                    f"path: {key} in {file} is {describe(given[key])}, expected the "
                    f"shape {list(matrix.shape)}; the rank is the first number of A "
                    "and the second of B, the others are the model's."
                )
    # In both layouts a file that does not say alpha means the rank.
    found = {alphas.get(name, float(network.rank)) for name in layers}
    if found != {float(network.alpha)}:
        raise ValueError(
            f"path: {file} has alpha {', '.join(f'{v:g}' for v in sorted(found))}, the "
            f"network {network.alpha:g}; make the LoRANetwork with that of the file."
        )
    with torch.no_grad():
        for name, matrices in layers.items():
            for key, matrix in zip(keys[name], matrices, strict=True):
                matrix.copy_(given[key])


def _layers(network: LoRANetwork) -> tuple[str, dict[str, _Layer]]:
    """The attribute of the network that holds diffusers' model, and its layers."""
    if not isinstance(network, LoRANetwork):
        raise TypeError(
            f"network: got {describe(network)}, expected a LoRANetwork; take it out of "
            "ScoreEstimator, NetworkWithHead or DDP (.network, .module)."
        )
    matrices: dict[str, Tensor] = dict(network.adapter.named_parameters())
    ending = ".lora_A.weight"
    names = [k.removesuffix(ending) for k in matrices if k.endswith(ending)]
    roots = {name.split(".")[0] for name in names}
    if roots not in ({"unet"}, {"transformer"}):
        raise ValueError(
            f"network: it is made on a {type(network.network).__name__}, expected a "
            "UNetNetwork or the network of a transformer, whose names files have."
        )
    root = roots.pop()
    return root, {
        name.removeprefix(f"{root}."): _Layer(
            matrices[f"{name}.lora_A.weight"], matrices[f"{name}.lora_B.weight"]
        )
        for name in names
    }


def _keys(layout: Layout, root: str, name: str) -> tuple[str, str]:
    """The names of a layer's matrices A and B in a file."""
    if layout == "diffusers":
        return f"{root}.{name}.lora_A.weight", f"{root}.{name}.lora_B.weight"
    flat = f"lora_{root}_{name.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


def _alpha_key(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}.alpha"


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"path: there is no file {file}.")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            about = (opened.metadata() or {}).get(_METADATA, "{}")
    except SafetensorError as error:
        raise ValueError(f"path: {file} is no safetensors file ({error}).") from error
    return tensors, json.loads(about)


def _refuse_what_is_not_plain(
    file: Path, root: str, metadata: Mapping[str, Any]
) -> None:
    for option in _NOT_PLAIN:
        if value := metadata.get(f"{root}.{option}"):
            raise ValueError(
                f"path: {file} has {option} {value!r}, expected a plain LoRA of one "
                "rank and alpha."
            )
