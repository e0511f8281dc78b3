"""Tables of Python numbers with a copy on each device that asks for one."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class DeviceTable:
    """A tuple of floats that can be indexed by tensors on any device.

    The fp32 copy is made once a device. Copies made while tracing, or of fake or meta
    tensors, are not kept: they would not outlive their context.
    """

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values
        self._copies: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.values, self._copies = state["values"], {}

    def on(self, device: torch.device) -> Tensor:
        """Gives the whole table on a device, fp32 [n]."""
        copy = self._copies.get(device)
        if copy is None:
            # Outside inference mode, else the copy could not be saved for a backward.
            with torch.inference_mode(False):
                copy = torch.tensor(self.values, dtype=torch.float32, device=device)
            kept = not (isinstance(copy, FakeTensor) or copy.is_meta)
            if kept and not torch.compiler.is_compiling():
                self._copies[device] = copy
        return copy

    def at_index(self, t: Tensor) -> Tensor:
        """Gives the values at whole numbers `t` in 0 ... n - 1, and NaN elsewhere."""
        last = len(self.values) - 1
        index = t.round().clamp(0, last)
        values = self.on(t.device)[index.long()]
        return torch.where(index == t, values, torch.nan)
