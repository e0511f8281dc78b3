"""What a shard holds of one name: a tensor, or texts.

A tensor is stored under its name. The texts of a name, say "captions", are stored as
two tensors, "captions.utf8" and "captions.ends", and the file's metadata lists it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmdkit._checked import describe
from dmdkit.data.texts import encode, pack

TEXT = "text"
Column = Tensor | Sequence[bytes]
"""Values of one name, one a sample: a tensor, or encoded texts."""


def check_columns(columns: Mapping[str, Tensor | Sequence[str]]) -> None:
    """Raises `TypeError` or `ValueError` if they are no columns of one length."""
    lengths: set[int | None] = set()
    for name, values in columns.items():
        if isinstance(values, Tensor):
            lengths.add(len(values) if values.ndim else None)
            continue
        if isinstance(values, str) or not all(isinstance(text, str) for text in values):
            raise TypeError(
                f"columns: {name} is {describe(values)}, expected a tensor or a list "
                "of str."
            )
        lengths.add(len(values))
        if columns.keys() & set(text_parts(name)):
            raise ValueError(
                f"columns: {' and '.join(text_parts(name))} are the names of the parts "
                f"of {name}; choose others."
            )
    if len(lengths) != 1 or None in lengths:
        listed = ", ".join(f"{k} {describe(v)}" for k, v in columns.items())
        raise ValueError(
            f"columns: got {listed or 'none'}; expected one or more, with as many "
            "samples in each along the first axis."
        )


def kind_of(columns: Mapping[str, Column | Sequence[str]]) -> dict[str, str]:
    """Says dtype and shape of one sample, or "text", by name in alphabetical order."""
    return {
        name: f"{str(v.dtype).removeprefix('torch.')}{list(v.shape[1:])}"
        if isinstance(v, Tensor)
        else TEXT
        for name, v in sorted(columns.items())
    }


def copied(name: str, values: Tensor | Sequence[str]) -> Column:
    """Copies a column to the CPU; raises `ValueError` if a text is no Unicode."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", copy=True)
    return [encode(text, f"columns: {name}") for text in values]


def joined(parts: Sequence[Any]) -> Column:
    """Joins the parts of a column, which are all of one kind."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return list(itertools.chain.from_iterable(parts))


def packed(columns: Mapping[str, Column]) -> tuple[dict[str, Tensor], list[str]]:
    """Answers a file's tensors, and which names are those of texts."""
    tensors: dict[str, Tensor] = {}
    texts: list[str] = []
    for name, values in columns.items():
        if isinstance(values, Tensor):
            tensors[name] = values.contiguous()
        else:
            texts.append(name)
            tensors.update(zip(text_parts(name), pack(values), strict=True))
    return tensors, texts


def text_parts(name: str) -> tuple[str, str]:
    """The names of the tensors that hold texts: their bytes, and where each ends."""
    return f"{name}.utf8", f"{name}.ends"


def read_text(file: Any, name: str, row: int) -> str:
    """Reads one text of an opened shard."""
    utf8, ends = (file.get_slice(part) for part in text_parts(name))
    start, end = [0, *ends[max(row - 1, 0) : row + 1].tolist()][-2:]
    return utf8[start:end].numpy().tobytes().decode() if start < end else ""
