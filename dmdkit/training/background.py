"""Checkpoints that are written while training goes on."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from dmdkit.training.checkpoint import check_numbers, write_state
from dmdkit.training.checkpoint_state import Stateful, state_to_save
from dmdkit.training.ranks import rank_and_ranks


class BackgroundCheckpoints:
    """Saves as `save_checkpoint` does, but writes in a thread of its own.

    `save` copies everything into the CPU's memory, which therefore has to hold it once
    more, and returns; training may change everything at once. One checkpoint is written
    at a time: the next `save` waits, and so does the end of a `with` block. An error of
    writing is raised by whatever waits. All ranks make and call it alike; they speak
    through a process group of its own, so that training's is free.

    Example:
        ```python
        with BackgroundCheckpoints() as background:
            for step in range(iterations):
                ...
                background.save("run", step=step + 1, modules=modules, keep=2)
        ```
    """

    def __init__(self) -> None:
        several = rank_and_ranks()[1] > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> "BackgroundCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being written."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def save(
        self,
        directory: str | Path,
        *,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer] | None = None,
        states: Mapping[str, Stateful] | None = None,
        keep: int | None = None,
    ) -> None:
        """Copies everything and has it written.

        Args:
            directory: As for `save_checkpoint`, and so are the others.
            step: The step at which the run will continue, >= 0.
            modules: Networks by name.
            optimizers: Optimizers by the name of their module.
            states: Anything else by name.
            keep: How many of the newest checkpoints to keep, at least 1; all if None.

        Raises:
            ValueError: If a name is unknown, or a number out of range.
            TypeError: If one of `states` has no state, as a bare `torch.Generator`.
            OSError: If the checkpoint before could not be written.
        """
        check_numbers(step, keep)
        self.wait()
        state = _copied(state_to_save(modules, optimizers or {}, states or {}))
        self._writing = self._thread.submit(
            write_state, Path(directory), step, state, keep, self._group
        )

    def wait(self) -> Path | None:
        """Waits until what was saved last is written.

        Returns:
            The checkpoint's folder; None if nothing was being written.

        Raises:
            OSError: If it could not be written, on any rank.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    plain = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    copied = DefaultStager(plain).stage(state)
    assert isinstance(copied, dict)
    return copied
