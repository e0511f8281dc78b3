"""Checkpoints: everything that a run is, written whole or not at all.

The format is that of `torch.distributed.checkpoint`. A checkpoint is a folder
`step-00001000`; it gets that name only when it is complete, with a manifest of the
files' checksums.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_with_path,
)

from dmdkit.training.checkpoint_files import (
    DamagedCheckpointError,
    checkpoints,
    explain,
    read_manifest,
    room_in,
    verify_checkpoint,
    write_whole,
)
from dmdkit.training.ranks import GlobalRandomState, gathered


@runtime_checkable
class Stateful(Protocol):
    """Anything with `state_dict` and `load_state_dict`: EMA, LR schedule, loader."""

    def state_dict(self) -> dict[str, Any]:
        """Gives the state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Takes a state."""
        ...


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
        states: Anything else by name: EMA, LR schedules, `GeneratorState`.
        keep: How many of the newest checkpoints to keep, at least 1; all if None.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If a name is unknown, or a number out of range.
        OSError: If the files cannot be written, on any rank; older checkpoints and
            what is trained stay as they are.
    """
    from torch.distributed.checkpoint import CheckpointException, state_dict_saver

    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(
            f"step, keep: got {step}, {keep}, expected step >= 0 and keep >= 1."
        )
    optimizers, states = optimizers or {}, states or {}
    started = {name: bool(optimizer.state) for name, optimizer in optimizers.items()}
    state = _gather(modules, optimizers, states)
    for name, optimizer in optimizers.items():
        if not started[name]:
            # PyTorch filled the empty state by a step, which would count.
            optimizer.state.clear()
            state[f"optimizer.{name}"]["state"] = {}

    def write(folder: Path) -> None:
        try:
            with one_process_is_meant():
                state_dict_saver.save(
                    state, checkpoint_id=folder, no_dist=not _distributed()
                )
        except CheckpointException as error:
            where = f"{folder}{room_in(folder)}"
            raise OSError(
                f"directory: could not write {where}: {explain(error)}"
            ) from error

    about = {"torch": torch.__version__, "parts": sorted(state)}
    return write_whole(Path(directory), step, write, about, keep)


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
    parts = _parts(modules, optimizers, states)
    if saved["parts"] != parts:
        raise ValueError(
            f"path: {path} holds {', '.join(saved['parts'])}; asked for "
            f"{', '.join(parts)}. Build the same parts as when it was saved."
        )
    for optimizer in optimizers.values():
        # Only an optimizer without state and gradients is filled by PyTorch.
        optimizer.zero_grad()
        optimizer.state.clear()
    state = _gather(modules, optimizers, states)
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    for name in optimizers:
        _leave_out_unsaved(state[f"optimizer.{name}"], f"optimizer.{name}", set(keys))
    try:
        with one_process_is_meant():
            state_dict_loader.load(
                state, checkpoint_id=path, no_dist=not _distributed()
            )
    except CheckpointException as error:
        raise ValueError(
            f"path: {path} does not fit what was built: {explain(error)}"
        ) from error
    _scatter(state, modules, optimizers, states)
    return int(saved["step"])


def _parts(*named: Mapping[str, Any]) -> list[str]:
    kinds = zip(("module", "optimizer", "state"), named, strict=True)
    return sorted(["random", *(f"{kind}.{name}" for kind, of in kinds for name in of)])


def _leave_out_unsaved(optimizer: dict[str, Any], prefix: str, keys: set[str]) -> None:
    """Drops the state of parameters that had none: they never got a gradient."""
    optimizer["state"] = {
        name: values
        for name, values in optimizer["state"].items()
        if any(f"{prefix}.state.{name}.{key}" in keys for key in values)
    }


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """Silences the warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gather(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as dcp_state

    unknown = set(optimizers) - set(modules)
    if unknown:
        raise ValueError(
            f"optimizers: {', '.join(sorted(unknown))} is no module; name an optimizer "
            f"like its module ({', '.join(modules)})."
        )
    state: dict[str, Any] = {"random": _split(GlobalRandomState().state_dict())}
    for name, module in modules.items():
        state[f"module.{name}"] = dcp_state.get_model_state_dict(module)
    for name, optimizer in optimizers.items():
        state[f"optimizer.{name}"] = dcp_state.get_optimizer_state_dict(
            modules[name], optimizer
        )
    for name, value in states.items():
        state[f"state.{name}"] = _split(value.state_dict())
    return state


def _split(state: Any) -> dict[str, Any]:
    """Takes the tensors out of a state, whose other content may change its shape."""
    leaves, _ = tree_flatten_with_path(state)
    tensors = {keystr(path): v for path, v in leaves if isinstance(v, Tensor)}
    rest = tree_map(lambda v: None if isinstance(v, Tensor) else v, state)
    return {"tensors": tensors, "rest": pickle.dumps(rest)}


def _join(parts: Mapping[str, Any]) -> Any:
    tensors = parts["tensors"]
    return tree_map_with_path(
        lambda path, v: tensors.get(keystr(path), v), pickle.loads(parts["rest"])
    )


def _scatter(
    state: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> None:
    from torch.distributed.checkpoint import state_dict as dcp_state

    for name, module in modules.items():
        dcp_state.set_model_state_dict(module, state[f"module.{name}"])
    for name, optimizer in optimizers.items():
        dcp_state.set_optimizer_state_dict(
            modules[name],
            optimizer,
            optim_state_dict=state[f"optimizer.{name}"],
            options=dcp_state.StateDictOptions(strict=False),
        )
    for name, value in states.items():
        value.load_state_dict(_join(state[f"state.{name}"]))
    # Last: gathering an optimizer's state may run a step and draw random numbers.
    GlobalRandomState().load_state_dict(_join(state["random"]))
