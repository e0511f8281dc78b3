"""The files of a folder of shards: their names, and what each must say of itself.

A folder holds `shards.json`, which says what the samples are; for every rank its files
`shard-RRRR-NNNNN.safetensors`, counted from 0; and, when a rank is done,
`finished-RRRR.json` with their number.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dmdkit.data.shard_columns import Column, kind_of, text_parts

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
            index = json.loads((file.metadata() or {}).get("dmdkit", "{}"))
            texts = index.pop("texts", [])
            lengths = {_texts_length(file, name) for name in texts}
            empty: dict[str, Column] = dict.fromkeys(texts, ())
            parts = {part for name in texts for part in text_parts(name)}
            for name in set(file.keys()) - parts:
                tensor = file.get_slice(name)
                lengths.add(_length(tensor))
                if tensor.get_shape():
                    empty[name] = tensor[:0]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"folder: {path} cannot be read: {error}.") from error
    if len(lengths) != 1 or 0 in lengths or not index:
        raise ValueError(f"folder: {path} was not written by ShardWriter.")
    return Shard(path, lengths.pop(), kind_of(empty), index)


def _length(tensor: Any) -> int:
    return next(iter(tensor.get_shape()), 0)


def _texts_length(file: Any, name: str) -> int:
    """How many texts there are; 0 if their bytes do not end where the last one does."""
    utf8, ends = (file.get_slice(part) for part in text_parts(name))
    count = _length(ends)
    whole = count and int(ends[count - 1 : count]) == _length(utf8)
    return count if whole else 0


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
