"""Files of weights, read without executing anything in them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_state_dict(file: Path, argument: str) -> dict[str, Tensor]:
    """Reads tensors by name from a `.safetensors` file or a PyTorch pickle.

    Args:
        file: The file.
        argument: What it was given as, for errors.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: If there is no such file, it is damaged, or holds anything else.
    """
    if not file.is_file():
        raise ValueError(f"{argument}: there is no file {file}.")
    try:
        is_pickle = file.suffix.lower() != ".safetensors"
        state: Any = _read_pickle(file) if is_pickle else load_file(file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{argument}: {file} is damaged or holds more than tensors, and nothing in "
            "it was executed; write the state_dict() with torch.save, or as "
            "safetensors."
        ) from error
    except (
        *(SafetensorError, ArithmeticError, AttributeError, EOFError, LookupError),
        *(OSError, RuntimeError, TypeError, ValueError),
    ) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{argument}: {file} cannot be read: {line}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor)
        for name, tensor in state.items()
    ):
        raise ValueError(f"{argument}: {file} is no state dict, tensors by name.")
    return state


def _read_pickle(file: Path) -> Any:
    # Files before PyTorch 1.6 are no zip archives and cannot be mapped.
    return torch.load(
        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
    )
