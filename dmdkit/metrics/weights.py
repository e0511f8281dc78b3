"""Files of weights: found, told apart by their SHA-256, read as tensors alone."""

import hashlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class WeightFile(NamedTuple):
    """A file of weights that was found and checked.

    Attributes:
        path: The file.
        checksum: Its SHA-256, 64 hexadecimal digits.
    """

    path: Path
    checksum: str

    @property
    def label(self) -> str:
        """What stands for it in a network's name."""
        return f"sha256 {self.checksum[:16]}"


def find_weights(
    weights: str | Path | None,
    checksum: str | None,
    *,
    source: str,
    fetch: Callable[[], str | Path],
) -> WeightFile:
    """Finds a file of weights, and holds its SHA-256 against what is expected.

    A name such as `weights-6726825d.pth` carries the first digits of the SHA-256, as
    files for `torch.hub` do; they are checked too.

    Args:
        weights: The file; if None, `fetch` gets it.
        checksum: The SHA-256 that is expected, or its first digits, at least 8; None:
            only what the name says is checked.
        source: Which file it is and from where, for errors.
        fetch: The library's own loader: gives the path of the file in its cache.

    Returns:
        The file and its SHA-256.

    Raises:
        ValueError: If there is no such file, it cannot be fetched, or it is another.
    """
    if checksum is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", checksum):
        raise ValueError(
            f"checksum: got {checksum!r}, expected a SHA-256, 64 hexadecimal digits, "
            "or at least its first 8."
        )
    if weights is None:
        try:
            path = Path(fetch())
        except Exception as error:  # whatever the network between here and there does
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"weights: {source} cannot be fetched ({line}); fetch it where there "
                "is a network, and pass its path."
            ) from error
    else:
        path = Path(weights)
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}; expected {source}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    in_name = re.search(r"-([0-9a-f]{8,64})\.pth?$", path.name)
    for expected in (checksum, in_name and in_name[1]):
        if expected and not found.startswith(expected.lower()):
            raise ValueError(
                f"checksum: the SHA-256 of {path} is {found}, expected {expected}; the "
                "file is damaged or another."
            )
    return WeightFile(path, found)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads tensors by name, from safetensors or a pickle, executing nothing.

    Args:
        path: The file.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: If it is damaged, or holds anything else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} is damaged or holds more than tensors; nothing in it was "
            "executed."
        ) from error
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {path} cannot be read: {line}") from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(f"weights: {path} is no state dict, tensors by name.")
    return state
