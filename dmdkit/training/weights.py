"""Weights alone out of a checkpoint: to begin a second phase, or to sample."""

from pathlib import Path

from torch import nn

from dmdkit.training.checkpoint import one_process_is_meant
from dmdkit.training.checkpoint_files import check_complete, explain
from dmdkit.training.checkpoint_state import Stateful, join_state, split_state


def saved_parameters(path: str | Path, module: str) -> frozenset[str]:
    """Names what a checkpoint holds of a module.

    Args:
        path: A checkpoint's folder.
        module: The module's name, as given to `save_checkpoint`.

    Returns:
        The names of its parameters and buffers; none if there is no such module.

    Raises:
        ValueError: If there is no complete checkpoint.
    """
    from torch.distributed.checkpoint import FileSystemReader

    check_complete(Path(path))
    prefix = f"module.{module}."
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    return frozenset(key.removeprefix(prefix) for key in keys if key.startswith(prefix))


def load_modules(path: str | Path, **modules: nn.Module) -> None:
    """Restores the weights of modules from a checkpoint, in place, and nothing else.

    A run's second phase starts from the weights of its first with new optimizers
    (DMD2, section F.2). For a whole run see `load_checkpoint`.

    Args:
        path: A checkpoint's folder.
        **modules: The modules by the name under which they were saved.

    Raises:
        ValueError: If there is no complete checkpoint, or a module's parameters are not
            those saved, by name or by shape.
    """
    from torch.distributed.checkpoint import CheckpointException, state_dict_loader
    from torch.distributed.checkpoint import state_dict as dcp_state

    for name, module in modules.items():
        saved = saved_parameters(path, name)
        wanted = set(dcp_state.get_model_state_dict(module))
        if wanted != saved:
            odd = sorted(wanted ^ saved)
            raise ValueError(
                f"{name}: {len(odd)} parameters are only in {path} or only in the "
                f"module, {', '.join(odd[:3])} among them; build it as it was saved."
            )
    state = {
        f"module.{name}": dcp_state.get_model_state_dict(module)
        for name, module in modules.items()
    }
    try:
        with one_process_is_meant():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise ValueError(
            f"path: {path} does not fit what was built: {explain(error)}"
        ) from error
    for name, module in modules.items():
        dcp_state.set_model_state_dict(module, state[f"module.{name}"])


def load_states(path: str | Path, **states: Stateful) -> None:
    """Restores states from a checkpoint, such as averages of weights, and nothing else.

    Args:
        path: A checkpoint's folder.
        **states: The states by the name under which they were saved.

    Raises:
        ValueError: If there is no complete checkpoint, or it holds no such state.
    """
    from torch.distributed.checkpoint import CheckpointException, state_dict_loader

    check_complete(Path(path))
    parts = {f"state.{name}": split_state(s.state_dict()) for name, s in states.items()}
    try:
        with one_process_is_meant():
            state_dict_loader.load(parts, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise ValueError(
            f"path: {path} holds no such state as {', '.join(states)}: {explain(error)}"
        ) from error
    for name, state in states.items():
        state.load_state_dict(join_state(parts[f"state.{name}"]))
