"""Tensors and texts in numbered safetensors files: noise-image pairs, latents."""

import bisect
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from dmdkit._checked import describe
from dmdkit.data.shard_columns import (
    TEXT,
    Column,
    check_columns,
    copied,
    joined,
    kind_of,
    packed,
    read_text,
)
from dmdkit.data.shard_files import (
    INDEX,
    Index,
    finished_file,
    read_finished,
    read_index,
    read_shard,
    require_index,
    shard_files,
    shard_name,
)

About = Mapping[str, str | int | float]


class ShardWriter:
    """Writes samples in shards, so that an interrupted preparation can go on.

    A shard gets its name only when it is whole and on disk. `position` says how many
    samples of this rank are: make the next ones from there. What was added after them
    is lost with an interruption, and nothing else. `close` writes the last, smaller
    shard and marks the rank as finished; only then the folder can be read.

    Args:
        folder: The folder of the shards; it is made.
        about: What the samples are, as strings and numbers. A folder takes samples of
            one kind only.
        shard_size: Samples in a file.
        rank: This process, 0 ... ranks - 1; each writes files of its own.
        ranks: How many processes write.

    Attributes:
        position: Samples of this rank that are safely on disk.

    Raises:
        TypeError: If a value of `about` is no string and no number.
        ValueError: If the folder holds shards of something else or of other ranks, one
            is missing or damaged, or a number is out of range.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from dmdkit.data import ShardedTensors
        >>> with TemporaryDirectory() as folder:
        ...     writer = ShardWriter(folder, about={"what": "squares"}, shard_size=4)
        ...     for i in range(writer.position, 6):
        ...         writer.add(x=torch.tensor([i**2]))
        ...     writer.close()
        ...     shards = ShardedTensors(folder)
        ...     len(shards), shards[5]["x"]
        (6, tensor(25))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        about: About,
        shard_size: int = 1000,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if shard_size < 1 or not 0 <= rank < ranks or ranks > 10_000:
            raise ValueError(
                f"shard_size, rank, ranks: got {shard_size}, {rank}, {ranks}, expected "
                "shard_size >= 1 and 0 <= rank < ranks <= 10000."
            )
        _check_about(about)
        self.folder, self.shard_size, self.rank = Path(folder), shard_size, rank
        self._index = Index(dict(about), ranks)
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f".*.rank-{rank:04d}.partial"):
            partial.unlink()
        self._claim()
        shards = [read_shard(path) for path in shard_files(self.folder, rank)]
        for shard in shards:
            require_index(shard, self._index)
        self.position = sum(shard.length for shard in shards)
        self._shards = len(shards)
        self._kind = shards[0].kind if shards else None
        self._buffer: list[dict[str, Column]] = []
        self._waiting = 0

    def add(self, **columns: Tensor | Sequence[str]) -> None:
        """Adds samples; they are written when a shard is full.

        Args:
            **columns: Tensors by name, [b, ...], which are copied to the CPU, and lists
                of texts, as many samples in each, always of the same names, shapes and
                dtypes.

        Raises:
            TypeError: If one is neither a tensor nor a list of str.
            ValueError: If they do not go together, or not with those before, or a text
                is no Unicode text.
        """
        check_columns(columns)
        kind = kind_of(columns)
        if self._kind not in (None, kind):
            raise ValueError(f"columns: got {kind}, those before are {self._kind}.")
        added = {name: copied(name, values) for name, values in columns.items()}
        self._kind = kind
        self._buffer.append(added)
        self._waiting += len(next(iter(added.values())))
        while self._waiting >= self.shard_size:
            self._write(self.shard_size)

    def close(self) -> None:
        """Writes the samples that are left, and marks this rank as finished.

        More can be added afterwards; then it has to be closed again.
        """
        if self._waiting:
            self._write(self._waiting)
        content = {"shards": self._shards, "samples": self.position}
        self._write_whole(finished_file(self.folder, self.rank), _as_json(content))

    def _claim(self) -> None:
        """Writes down what the folder is for, or holds it against what is there."""
        if not (self.folder / INDEX).is_file():
            if strange := sorted(self.folder.glob("[!.]*")):
                raise ValueError(
                    f"folder: {self.folder} holds {strange[0].name} and no {INDEX}; "
                    "shards want a folder of their own."
                )
            self._write_whole(self.folder / INDEX, _as_json(self._index._asdict()))
        found = read_index(self.folder)
        if found != self._index:
            before = {**found.about, "ranks": found.ranks}
            now = {**self._index.about, "ranks": self._index.ranks}
            changed = [
                f"{name} = {before.get(name)}, now it is {now.get(name)}"
                for name in {**before, **now}
                if before.get(name) != now.get(name)
            ]
            raise ValueError(
                f"folder: {self.folder} was begun with {'; with '.join(changed)}; use "
                "the same, or another folder."
            )

    def _write(self, count: int) -> None:
        whole = {
            name: joined([part[name] for part in self._buffer])
            for name in self._buffer[0]
        }
        shard = {name: v[:count] for name, v in whole.items()}
        tensors, texts = packed(shard)
        # The names are the user's own, so one entry holds all of dmdkit's.
        content = {**self._index._asdict(), **({"texts": texts} if texts else {})}
        metadata = {"dmdkit": json.dumps(content)}
        path = self.folder / shard_name(self.rank, self._shards)
        finished_file(self.folder, self.rank).unlink(missing_ok=True)
        self._write_whole(path, lambda partial: save_file(tensors, partial, metadata))
        self._shards += 1
        self.position += count
        self._waiting -= count
        self._buffer = [{name: v[count:] for name, v in whole.items()}]

    def _write_whole(self, path: Path, write: Callable[[Path], object]) -> None:
        """Writes a file under another name, which it loses when it is on disk."""
        partial = path.with_name(f".{path.name}.rank-{self.rank:04d}.partial")
        write(partial)
        if (self.folder / INDEX).is_file():
            # safetensors leaves files to their owner alone, whatever the umask.
            partial.chmod((self.folder / INDEX).stat().st_mode)
        _flush(partial)
        partial.replace(path)
        _flush(self.folder)


class ShardedTensors(Dataset[dict[str, Any]]):
    """Samples from the shards of all ranks, read one by one as they are asked for.

    An item is a dict of the tensors of one sample, and its texts as str, by name. The
    files are memory-mapped when they are first needed. It can be pickled, and read in
    several processes.

    Args:
        folder: The folder that `ShardWriter` wrote.

    Attributes:
        about: What the samples are, as `ShardWriter` was told.
        kind: Dtype and shape of a sample's tensors, such as "float16[4, 8, 8]", and
            "text" for texts, by name.

    Raises:
        ValueError: If a rank is not finished, a shard is missing, damaged or of another
            folder, or it holds tensors of other names, shapes or dtypes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.about = index.about
        shards = []
        for rank in range(index.ranks):
            files, expected = (
                shard_files(self.folder, rank),
                read_finished(self.folder, rank),
            )
            if len(files) != expected:
                raise ValueError(
                    f"folder: {self.folder} holds {len(files)} shards of rank {rank}, "
                    f"expected {expected}; the last one it should have is "
                    f"{shard_name(rank, expected - 1)}."
                )
            shards += [read_shard(path) for path in files]
        if not shards:
            raise ValueError(f"folder: {self.folder} holds no samples.")
        for shard in shards:
            require_index(shard, index)
            if shard.kind != shards[0].kind:
                raise ValueError(
                    f"folder: {shard.path} holds {shard.kind}, but "
                    f"{shards[0].path.name} {shards[0].kind}."
                )
        self._paths = [shard.path for shard in shards]
        self._ends = list(itertools.accumulate(shard.length for shard in shards))
        self.kind = shards[0].kind
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 ... {len(self) - 1}.")
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        if number not in self._opened:
            self._opened[number] = safe_open(self._paths[number], framework="pt")
        file = self._opened[number]
        # A slice shares the memory of the file's map: what is changed in it would stay.
        return {
            name: read_text(file, name, row)
            if kind == TEXT
            else file.get_slice(name)[row : row + 1][0].clone()
            for name, kind in self.kind.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


def _check_about(about: About) -> None:
    for name, value in about.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise TypeError(
                f"about: got {name!r}: {describe(value)}, expected strings and numbers."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"about: {name} is {value}, expected a finite number.")


def _as_json(content: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
