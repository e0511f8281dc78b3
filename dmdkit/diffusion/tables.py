"""Tables of Python numbers with a copy on each device that asks for one."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor


def _outlives_its_context(x: Tensor) -> bool:
    fake = isinstance(x, FakeTensor) or x.is_meta
    return not (fake or is_functorch_wrapped_tensor(x))


class DeviceTable:
    """A tuple of floats that can be indexed by tensors on any device.

    The fp32 copy is made once a device. Copies made while tracing, or for fake, meta or
    functorch tensors, are not kept: they would not outlive their context.
    """

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values
        self._copies: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.values, self._copies = state["values"], {}

    def beside(self, x: Tensor) -> Tensor:
        """Gives the whole table where `x` is, fp32 [n]; fake if `x` is fake."""
        copy = self._copies.get(x.device)
        if copy is None or isinstance(x, FakeTensor):
            # Outside inference mode, else the copy could not be saved for a backward.
            with torch.inference_mode(False):
                copy = x.new_tensor(self.values, dtype=torch.float32)
            if not torch.compiler.is_compiling() and _outlives_its_context(copy):
                self._copies[x.device] = copy
        return copy

    def at_index(self, t: Tensor) -> Tensor:
        """Gives the values at whole numbers `t` in 0 ... n - 1, and NaN elsewhere."""
        last = len(self.values) - 1
        is_index = (t == t.round()) & (t >= 0) & (t <= last)
        values = self.beside(t)[torch.where(is_index, t, 0).long()]
        return torch.where(is_index, values, torch.nan)
