"""The files of a folder of shards: their names, and what each must say of itself.

A folder holds `shards.json`, which says what the samples are; for every rank its files
`shard-RRRR-NNNNN.safetensors`, counted from 0; and, when a rank is done,
`finished-RRRR.json` with their number.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "shards.json"
_NAME = re.compile(r"shard-(\d{4})-(\d{5})\.safetensors")


class Index(NamedTuple):
    """What a folder of shards is for."""

    about: dict[str, Any]
    ranks: int


class Shard(NamedTuple):
    """A file: its samples, their kind, and the index of the folder it was made for."""

    path: Path
    length: int
    kind: dict[str, str]
    index: Any


def read_index(folder: Path) -> Index:
    """Reads `shards.json`, or raises `ValueError`."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        return Index(dict(content["about"]), int(content["ranks"]))
    except FileNotFoundError:
        raise ValueError(f"folder: {folder} holds no shards ({INDEX}).") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} is not understood: {error!r}.") from error


def read_shard(path: Path) -> Shard:
    """Reads what a shard holds, or raises `ValueError`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_slice(name) for name in sorted(file.keys())}
            shapes = {name: s.get_shape() for name, s in tensors.items()}
            empty = {name: s[:0] for name, s in tensors.items() if shapes[name]}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"folder: {path} cannot be read: {error}.") from error
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths or "dmdkit" not in metadata:
        raise ValueError(f"folder: {path} was not written by ShardWriter.")
    return Shard(path, lengths.pop(), kind_of(empty), json.loads(metadata["dmdkit"]))


def kind_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Says dtype and shape of one sample, by name in alphabetical order."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape[1:])}"
        for name, tensor in sorted(tensors.items())
    }


def require_index(shard: Shard, index: Index) -> None:
    """Raises `ValueError` if a shard belongs to another folder."""
    if shard.index != index._asdict():
        raise ValueError(
            f"folder: {shard.path} holds {shard.index}, its folder {index._asdict()}; "
            "it belongs elsewhere."
        )


def shard_files(folder: Path, rank: int) -> list[Path]:
    """Lists a rank's shards in their order, or raises `ValueError` at a gap."""
    names = sorted(p.name for p in folder.glob(f"shard-{rank:04d}-*.safetensors"))
    for number, name in enumerate(names):
        match = _NAME.fullmatch(name)
        if match is None or int(match[2]) != number:
            missing = f"shard-{rank:04d}-{number:05d}.safetensors"
            raise ValueError(f"folder: {folder / missing} is missing, {name} is there.")
    return [folder / name for name in names]


def finished_file(folder: Path, rank: int) -> Path:
    """Where the end of a rank is marked."""
    return folder / f"finished-{rank:04d}.json"


def shard_name(rank: int, number: int) -> str:
    """The name of a rank's shard."""
    return f"shard-{rank:04d}-{number:05d}.safetensors"


def read_finished(folder: Path, rank: int) -> int:
    """Reads how many shards a finished rank has, or raises `ValueError`."""
    path = finished_file(folder, rank)
    try:
        return int(json.loads(path.read_text())["shards"])
    except FileNotFoundError:
        raise ValueError(
            f"folder: rank {rank} of {folder} is not finished; run its preparation to "
            "the end."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} is not understood: {error!r}.") from error
