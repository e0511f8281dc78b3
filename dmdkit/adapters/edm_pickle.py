"""Reads the pickles of NVIDIA's EDM networks without executing anything in them.

Such a file carries the Python source of its network, which loading it in the usual way
runs. Here that source is ignored: objects become records of their attributes, and a
record is only ever looked at.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dmdkit.adapters.restricted_pickle import (
    PickleReader,
    Record,
    Storage,
    quoted,
    read_legacy_storage,
    rebuild_tensor,
)

_WRAPPER, _NETWORK = "EDMPrecond", "DhariwalUNet"
_TORCH_MODULES = (
    "container.ModuleDict",
    "container.ModuleList",
    "container.Sequential",
    "linear.Linear",
    "conv.Conv2d",
    "normalization.GroupNorm",
)
_KINDS = {name.partition(".")[2] for name in _TORCH_MODULES} | {
    *(_WRAPPER, _NETWORK, "PositionalEmbedding", "UNetBlock")
}
_DEPTH = 8
"""Modules within modules; EDM's networks have five levels."""
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    Warning,
)
"""What reading senseless data can end in, beside ValueError."""


@dataclass(frozen=True)
class EDMSettings:
    """What is to be known of an EDM network beside its weights.

    The range of noise is not among it: EDM's network takes every sigma, and 0.002 to 80
    is the range of its sampler (Karras et al. 2022, Table 1).

    Attributes:
        resolution: Height and width of its images, >= 1.
        channels: Their channels, >= 1.
        classes: How many classes it knows, >= 0; 0 for an unconditional network.
        sigma_data: The data's standard deviation > 0, as its preconditioning has it.
    """

    resolution: int
    channels: int
    classes: int
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, least in (("resolution", 1), ("channels", 1), ("classes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more.")
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data: got {self.sigma_data}, expected > 0.")


class EDMCheckpoint(NamedTuple):
    """An EDM network as data.

    Attributes:
        state: Parameters and persistent buffers by NVIDIA's names, all of which start
            with `model.`; on the CPU, in the file's dtypes.
        settings: What the weights do not say.
    """

    state: dict[str, Tensor]
    settings: EDMSettings


def read_edm_pickle(path: str | Path) -> EDMCheckpoint:
    """Reads a file such as `edm-imagenet-64x64-cond-adm.pkl`, executing nothing in it.

    Peak memory is about twice the weights. Dropout and the augmentation's embedding do
    not count as differences: a network is used without them.

    Args:
        path: The file. Its exponential moving average, `ema`, is read.

    Returns:
        The weights and what they do not say.

    Raises:
        ValueError: If there is no such file, it uses a name or an opcode beyond the few
            that such a file needs, it is damaged, or its network is no ADM network
            (`DhariwalUNet`) in EDM's preconditioning (`EDMPrecond`) as it was released.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}.")
    size = path.stat().st_size
    try:
        # A map, so that the file is not held beside its tensors.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content[:1] != b"\x80":
                raise ValueError("it is no pickle; look whether the download is whole")
            data = PickleReader(content, _constructors(size)).read()
        return _checkpoint(data, size)
    except _DAMAGE as error:
        raise ValueError(
            f"path: {path} is damaged or no EDM pickle: {_line(error)}."
        ) from error
    except ValueError as error:
        raise ValueError(f"path: {path} was refused: {_line(error)}.") from error


def _line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:300].removesuffix(".")


def _constructors(size: int) -> dict[str, Callable[..., Any]]:
    """What stands for each name that a file of `size` bytes may use."""
    left = 2 * size  # text that stands for bytes counts twice

    def spend(amount: int) -> None:
        # A file may name the same bytes again and again; a real one never does.
        nonlocal left
        left -= amount
        if left < 0:
            raise ValueError("it makes more data than it holds")

    def encode(text: str, encoding: str) -> bytes:
        """How protocols before 3 write bytes."""
        if encoding != "latin1":
            raise ValueError(f"the encoding {quoted(encoding)} is not allowed")
        spend(len(text))
        return text.encode("latin1")

    def storage(data: bytes) -> Storage:
        spend(len(data))
        return read_legacy_storage(data)

    def persistent(meta: dict[str, Any]) -> Record:
        # meta["module_src"] is the source that is not run.
        if not isinstance(meta["class_name"], str):
            raise ValueError("a class has no name")
        return Record(meta["class_name"], meta["state"])

    def tensor_itself(data: Tensor, *ignored: Any) -> Tensor:
        return data

    def listed(items: Any = ()) -> Any:
        return items

    def inert(kind: str) -> Callable[..., Record]:
        return lambda *ignored: Record(kind)

    table: dict[str, Callable[..., Any]] = {
        "_codecs.encode": encode,
        "collections.OrderedDict": lambda: {},
        "dnnlib.util.EasyDict": lambda: {},
        "numpy.dtype": inert("dtype"),
        "torch.storage._load_from_bytes": storage,
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": tensor_itself,
        "torch._utils._rebuild_parameter_with_state": tensor_itself,
        "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    }
    for module in ("builtins", "__builtin__"):
        table |= {f"{module}.set": listed, f"{module}.frozenset": listed}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{module}.scalar"] = inert("numpy scalar")
    for name in _TORCH_MODULES:
        table[f"torch.nn.modules.{name}"] = inert(name.partition(".")[2])
    return table


def _checkpoint(data: Any, size: int) -> EDMCheckpoint:
    if not isinstance(data, dict) or not isinstance(data.get("ema"), Record):
        raise ValueError("it holds no network under the name 'ema'")
    wrapper: Record = data["ema"]
    network = _submodules(wrapper).get("model") if wrapper.kind == _WRAPPER else None
    if not (isinstance(network, Record) and network.kind == _NETWORK):
        inner = f" around {quoted(network.kind)}" if isinstance(network, Record) else ""
        raise ValueError(
            f"its network is {quoted(wrapper.kind)}{inner}, only {_NETWORK} (ADM) in "
            f"{_WRAPPER} is supported"
        )
    settings = EDMSettings(
        resolution=_number(wrapper, "img_resolution", int),
        channels=_number(wrapper, "img_channels", int),
        classes=_number(wrapper, "label_dim", int),
        sigma_data=_number(wrapper, "sigma_data", float),
    )
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in _modules(wrapper, "", seen):
        _verify(name, module)
        for key, tensor in _tensors(module):
            state[f"{name}.{key}" if name else key] = tensor
    if sum(tensor.nbytes for tensor in state.values()) > size:
        raise ValueError("its tensors overlap")
    return EDMCheckpoint(state, settings)


def _modules(module: Record, name: str, seen: set[int]) -> Iterator[tuple[str, Record]]:
    """A module and all within it, each once."""
    if id(module) in seen:
        raise ValueError(f"the module {quoted(name)} appears twice")
    seen.add(id(module))
    yield name, module
    for key, child in _submodules(module).items():
        if child is None:
            continue
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"a module within {quoted(name)} has no proper name")
        if not isinstance(child, Record):
            raise ValueError(f"{quoted(key)} within {quoted(name)} is no module")
        if name.count(".") + 2 > _DEPTH:
            raise ValueError(f"{quoted(name)} is nested too deeply")
        yield from _modules(child, f"{name}.{key}" if name else key, seen)


def _submodules(module: Record) -> dict[Any, Any]:
    return _part(module, "_modules")


def _part(module: Record, name: str) -> dict[Any, Any]:
    part = module.state.get(name) if isinstance(module.state, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"a {quoted(module.kind)} has no {name}")
    return part


def _tensors(module: Record) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` would give of a module itself."""
    temporary = module.state.get("_non_persistent_buffers_set", [])
    for part in ("_parameters", "_buffers"):
        for key, tensor in _part(module, part).items():
            if tensor is None or (part == "_buffers" and key in temporary):
                continue
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"a {quoted(module.kind)} has a {part} of no tensor")
            yield key, tensor


def _verify(name: str, module: Record) -> None:
    """Raises if a module differs from ADM in what its weights do not show."""
    if module.kind not in _KINDS:
        raise ValueError(f"{name} is {quoted(module.kind)}, which ADM does not have")
    expected: dict[str, float | int] = {}
    match module.kind:
        case "PositionalEmbedding":
            expected = {"max_positions": 10000, "endpoint": False}
        case "GroupNorm":
            channels = len(_part(module, "_parameters")["weight"])
            expected = {"num_groups": min(32, channels // 4), "eps": 1e-5}
        case "Conv2d":
            block = name.split(".")[-2]
            resamples = "resample_filter" in dict(_tensors(module))
            expected = {
                "up": resamples and block.endswith("_up"),
                "down": resamples and block.endswith("_down"),
                "fused_resample": False,
            }
        case "UNetBlock":
            attends = _submodules(module).get("qkv") is not None
            width = len(_part(_submodules(module)["norm1"], "_parameters")["weight"])
            if attends and width % 64 != 0:
                raise ValueError(f"{name} attends over {width} channels, no n * 64")
            heads = width // 64 if attends else 0
            expected = {"num_heads": heads, "skip_scale": 1, "adaptive_scale": True}
    for attribute, value in expected.items():
        # What a module does not say is left to the weights' names and shapes.
        if attribute not in module.state:
            continue
        found = _number(module, attribute, float)
        if found != value:
            raise ValueError(
                f"{name} has {attribute} {found:g}, ADM has {float(value):g}"
            )


def _number(module: Record, attribute: str, kind: Callable[[Any], Any]) -> Any:
    if attribute not in module.state:
        raise ValueError(f"a {quoted(module.kind)} does not say its {attribute}")
    value = module.state[attribute]
    if not isinstance(value, int | float) or kind(value) != value:
        raise ValueError(
            f"the {attribute} of a {quoted(module.kind)} is a {type(value).__name__}, "
            "no plain number"
        )
    return kind(value)
