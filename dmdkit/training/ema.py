"""Exponential moving averages of a module's weights, several rates at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps fp32 averages of the trainable weights of a module, by name.

    Update once a generator step, not once an iteration. Official DMD2 uses none, so
    the recipes have it off by default.

    Args:
        module: The student's network.
        decays: One or more rates in [0, 1).

    Raises:
        ValueError: If there is no rate or one is out of range.

    Examples:
        >>> import torch
        >>> student = torch.nn.Linear(2, 2)
        >>> ema = ExponentialMovingAverage(student, decays=(0.99, 0.999))
        >>> ema.update(student)
        >>> with ema.applied_to(student, decay=0.999):
        ...     samples = student(torch.zeros(1, 2))
    """

    def __init__(
        self, module: nn.Module, decays: Sequence[float | int] = (0.999,)
    ) -> None:
        if not decays or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(
                f"decays: got {tuple(decays)}, expected one or more rates in [0, 1)."
            )
        self.averages: dict[float | int, dict[str, Tensor]] = {
            decay: {
                name: p.detach().to(torch.float32, copy=True)
                for name, p in module.named_parameters()
                if p.requires_grad
            }
            for decay in decays
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves every average towards the module's weights.

        Args:
            module: The module that the averages were made of.

        Raises:
            ValueError: If it lacks one of their parameters.
        """
        for decay, average in self.averages.items():
            weights = [p.detach().float() for p in self._matching(module, average)]
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module, decay: float | int | None = None) -> None:
        """Writes an average into a module.

        Args:
            module: The module that the averages were made of, or a copy of it.
            decay: Which average; the only one if None.

        Raises:
            ValueError: If there is no such average or the module lacks a parameter.
        """
        average = self._average(decay)
        for parameter, value in zip(
            self._matching(module, average), average.values(), strict=True
        ):
            parameter.copy_(value)

    @contextmanager
    def applied_to(
        self, module: nn.Module, decay: float | int | None = None
    ) -> Iterator[None]:
        """Puts an average into a module for a while, for sampling or export.

        Args:
            module: The module that the averages were made of.
            decay: Which average; the only one if None.

        Yields:
            Nothing.

        Raises:
            ValueError: If there is no such average or the module lacks a parameter.
        """
        parameters = self._matching(module, self._average(decay))
        kept = [p.detach().clone() for p in parameters]
        try:
            self.copy_to(module, decay)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Gives the averages, by rate and name."""
        return {str(decay): dict(named) for decay, named in self.averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes averages of the same rates and names.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: If rates or names differ.
        """
        own = self.state_dict()
        if {k: set(v) for k, v in own.items()} != {k: set(v) for k, v in state.items()}:
            raise ValueError(
                f"state: its rates {list(state)} or parameter names are not those of "
                f"this average ({list(own)})."
            )
        for decay, named in own.items():
            for name, value in named.items():
                value.copy_(state[decay][name])

    def _average(self, decay: float | int | None) -> dict[str, Tensor]:
        if decay is None and len(self.averages) == 1:
            decay = next(iter(self.averages))
        if decay is None or decay not in self.averages:
            raise ValueError(
                f"decay: got {decay}, expected one of {tuple(self.averages)}."
            )
        return self.averages[decay]

    @staticmethod
    def _matching(module: nn.Module, average: dict[str, Tensor]) -> list[nn.Parameter]:
        parameters = dict(module.named_parameters())
        missing = [name for name in average if name not in parameters]
        if missing:
            raise ValueError(
                f"module: it has no parameter {missing[0]!r}; give the module that the "
                "averages were made of."
            )
        return [parameters[name] for name in average]
