"""Checkpoints: everything that a run is, written whole or not at all.

The format is that of `torch.distributed.checkpoint`. A checkpoint is a folder
`step-00001000`; it gets that name only when it is complete, with a manifest of the
files' checksums.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from dmdkit.training.checkpoint_files import (
    DamagedCheckpointError,
    checkpoints,
    explain,
    read_manifest,
    room_in,
    verify_checkpoint,
    write_whole,
)
from dmdkit.training.checkpoint_state import (
    Stateful,
    gather_state,
    leave_out_unsaved,
    names_of_parts,
    scatter_state,
    state_to_save,
)
from dmdkit.training.ranks import gathered, rank_and_ranks


def save_checkpoint(
    directory: str | Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    states: Mapping[str, Stateful] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint, complete or not at all. All ranks must call it.

    Args:
        directory: The folder of all checkpoints of a run, one for all ranks.
        step: The step at which the run will continue, >= 0.
        modules: Networks by name.
        optimizers: Optimizers by the name of the module whose parameters they hold.
        states: Anything else by name: EMA, LR schedules, `GeneratorState`; of several
            ranks those of rank 0.
        keep: How many of the newest checkpoints to keep, at least 1; all if None.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If a name is unknown, or a number out of range.
        TypeError: If one of `states` has no state, as a bare `torch.Generator`.
        OSError: If the files cannot be written, on any rank; older checkpoints and
            what is trained stay as they are.
    """
    check_numbers(step, keep)
    state = state_to_save(modules, optimizers or {}, states or {})
    return write_state(Path(directory), step, state, keep)


def check_numbers(step: int, keep: int | None) -> None:
    """Refuses numbers that no checkpoint has.

    Args:
        step: The step at which the run will continue.
        keep: How many of the newest checkpoints to keep.

    Raises:
        ValueError: If one is out of range.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(
            f"step, keep: got {step}, {keep}, expected step >= 0 and keep >= 1."
        )


def write_state(
    directory: Path,
    step: int,
    state: dict[str, Any],
    keep: int | None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes what was gathered, on all ranks.

    Args:
        directory: The folder of all checkpoints of a run.
        step: The step, for the name.
        state: State by part.
        keep: How many of the newest stay; all if None.
        group: The process group to go through; the default one if None.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: If the files cannot be written, on any rank.
    """
    from torch.distributed.checkpoint import CheckpointException, state_dict_saver

    def write(folder: Path) -> None:
        try:
            with one_process_is_meant():
                state_dict_saver.save(
                    state,
                    checkpoint_id=folder,
                    process_group=group,
                    no_dist=rank_and_ranks()[1] == 1,
                )
        except CheckpointException as error:
            if any(
                isinstance(e, KeyboardInterrupt) for e, _ in error.failures.values()
            ):
                raise KeyboardInterrupt from error
            where = f"{folder}{room_in(folder)}"
            raise OSError(
                f"directory: could not write {where}: {explain(error)}"
            ) from error

    about = {"torch": torch.__version__, "parts": sorted(state)}
    return write_whole(directory, step, write, about, keep, group)


def load_checkpoint(
    path: str | Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    states: Mapping[str, Stateful] | None = None,
) -> int:
    """Restores everything from a checkpoint, in place, if it is undamaged.

    It may be of another number of ranks, replicated or sharded: every rank takes its
    part. All ranks must call it.

    Args:
        path: A checkpoint's folder, such as `checkpoints(directory)[-1]`.
        modules: Networks by name, as they were saved.
        optimizers: Optimizers by the name of their module.
        states: Anything else by name.

    Returns:
        The step at which to continue.

    Raises:
        ValueError: If there is no checkpoint, or its parts are not those asked for, by
            name or by shape.
        DamagedCheckpointError: If a file is missing, or not as it was written.
    """
    verify_checkpoint(path)
    return _load(Path(path), modules, optimizers or {}, states or {})


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
        path: The checkpoint that was loaded.
        step: The step at which to continue.
    """

    path: Path
    step: int


def load_newest_checkpoint(
    directory: str | Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    states: Mapping[str, Stateful] | None = None,
) -> Resumed | None:
    """Restores everything from the newest checkpoint that is undamaged.

    Args:
        directory: The folder of all checkpoints of a run.
        modules: Networks by name, as they were saved.
        optimizers: Optimizers by the name of their module.
        states: Anything else by name.

    Returns:
        The checkpoint and its step; None if there is none at all. A warning names each
        newer one that is damaged and was passed over.

    Raises:
        ValueError: If all are damaged, or the checkpoint's parts are not those asked
            for.
    """
    found = gathered(checkpoints(directory))[0]
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}", stacklevel=2)
            continue
        return Resumed(path, _load(path, modules, optimizers or {}, states or {}))
    if found:
        raise DamagedCheckpointError(
            f"directory: all {len(found)} checkpoints in {directory} are damaged."
        )
    return None


def _load(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> int:
    from torch.distributed.checkpoint import (
        CheckpointException,
        FileSystemReader,
        state_dict_loader,
    )

    saved = read_manifest(path)
    parts = names_of_parts(modules, optimizers, states)
    if saved["parts"] != parts:
        raise ValueError(
            f"path: {path} holds {', '.join(saved['parts'])}; asked for "
            f"{', '.join(parts)}. Build the same parts as when it was saved."
        )
    for optimizer in optimizers.values():
        # Only an optimizer without state and gradients is filled by PyTorch.
        optimizer.zero_grad()
        optimizer.state.clear()
    state = gather_state(modules, optimizers, states)
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    for name in optimizers:
        leave_out_unsaved(state[f"optimizer.{name}"], f"optimizer.{name}", set(keys))
    try:
        with one_process_is_meant():
            state_dict_loader.load(
                state, checkpoint_id=path, no_dist=rank_and_ranks()[1] == 1
            )
    except CheckpointException as error:
        raise ValueError(
            f"path: {path} does not fit what was built: {explain(error)}"
        ) from error
    scatter_state(state, modules, optimizers, states)
    return int(saved["step"])


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """Silences the warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
