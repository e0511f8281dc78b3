"""Texts as two tensors: what workers share without copies, and what shards hold."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PackedTexts(NamedTuple):
    """Texts in UTF-8, one after the other.

    Attributes:
        utf8: Their bytes, uint8 [total].
        ends: Where each ends, int64 [n].
    """

    utf8: Tensor
    ends: Tensor

    def text(self, index: int) -> str:
        """Gives the text of an index, 0 ... n - 1."""
        start = int(self.ends[index - 1]) if index else 0
        return self.utf8[start : int(self.ends[index])].numpy().tobytes().decode()


def pack(encoded: Iterable[bytes]) -> PackedTexts:
    """Packs texts that `encode` gave."""
    data, ends = bytearray(), []
    for text in encoded:
        data += text
        ends.append(len(data))
    utf8 = torch.from_numpy(np.frombuffer(data, dtype=np.uint8))
    return PackedTexts(utf8, torch.tensor(ends, dtype=torch.int64))


def encode(text: str, where: str) -> bytes:
    """Encodes a text, or raises `ValueError` that says where it stands."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text!r} is no Unicode text: {error.reason}."
        ) from error
