"""What a checkpoint holds: the state of everything that a run is, by name."""

import pickle
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_with_path,
)

from dmdkit.training.ranks import GlobalRandomState, rank_and_ranks


@runtime_checkable
class Stateful(Protocol):
    """Anything with `state_dict` and `load_state_dict`: EMA, LR schedule, loader.

    Where the state differs between ranks, that of rank 0 is saved and all ranks get it.
    What each rank has of its own must be gathered in `state_dict`, as `GeneratorState`
    does.
    """

    def state_dict(self) -> dict[str, Any]:
        """Gives the state.

        Returns:
            It, as a checkpoint can hold it.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Takes a state.

        Args:
            state: What `state_dict` gave.

        Returns:
            Anything; it is not looked at.
        """
        ...


def names_of_parts(*named: Mapping[str, Any]) -> list[str]:
    """Names what a checkpoint of modules, optimizers and states holds.

    Args:
        named: Modules, optimizers and states by name.

    Returns:
        The names, sorted.
    """
    kinds = zip(("module", "optimizer", "state"), named, strict=True)
    return sorted(["random", *(f"{kind}.{name}" for kind, of in kinds for name in of)])


def leave_out_unsaved(optimizer: dict[str, Any], prefix: str, keys: set[str]) -> None:
    """Drops the state of parameters that had none: they never got a gradient.

    Args:
        optimizer: The state of an optimizer, changed in place.
        prefix: Its name in the checkpoint.
        keys: Everything that was saved.
    """
    optimizer["state"] = {
        name: values
        for name, values in optimizer["state"].items()
        if any(f"{prefix}.state.{name}.{key}" in keys for key in values)
    }


def require_states(states: Mapping[str, Any]) -> None:
    """Refuses what has no state to be saved.

    Args:
        states: What was given, by name.

    Raises:
        TypeError: If one has none; a bare `torch.Generator` is to be wrapped.
    """
    for name, value in states.items():
        if isinstance(value, torch.Generator):
            raise TypeError(
                f"states: {name} is a torch.Generator; wrap it, "
                "dmdkit.GeneratorState(generator)."
            )
        if not isinstance(value, Stateful):
            raise TypeError(
                f"states: {name} is a {type(value).__name__}, expected something with "
                "state_dict and load_state_dict."
            )


def gather_state(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> dict[str, Any]:
    """Gathers the state of everything; a collective call if there are ranks.

    An optimizer that never stepped gets an empty state, for files to be read into.

    Args:
        modules: Networks by name.
        optimizers: Optimizers by the name of their module.
        states: Anything else by name.

    Returns:
        State by part, as `torch.distributed.checkpoint` saves it.

    Raises:
        ValueError: If an optimizer's name is no module's.
        TypeError: If one of `states` has no state.
    """
    from torch.distributed.checkpoint import state_dict as dcp_state

    unknown = set(optimizers) - set(modules)
    if unknown:
        raise ValueError(
            f"optimizers: {', '.join(sorted(unknown))} is no module; name an optimizer "
            f"like its module ({', '.join(modules)})."
        )
    require_states(states)
    state: dict[str, Any] = {"random": split_state(GlobalRandomState().state_dict())}
    for name, module in modules.items():
        state[f"module.{name}"] = dcp_state.get_model_state_dict(module)
    for name, optimizer in optimizers.items():
        state[f"optimizer.{name}"] = dcp_state.get_optimizer_state_dict(
            modules[name], optimizer
        )
    for name, value in states.items():
        state[f"state.{name}"] = split_state(value.state_dict())
    return state


def state_to_save(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> dict[str, Any]:
    """Gathers the state of everything, and leaves optimizers as they were.

    Args:
        modules: Networks by name.
        optimizers: Optimizers by the name of their module.
        states: Anything else by name.

    Returns:
        State by part.

    Raises:
        ValueError: If an optimizer's name is no module's.
        TypeError: If one of `states` has no state.
    """
    started = {name: bool(optimizer.state) for name, optimizer in optimizers.items()}
    state = gather_state(modules, optimizers, states)
    for name, optimizer in optimizers.items():
        if not started[name]:
            # PyTorch filled the empty state by a step, which would count.
            optimizer.state.clear()
            state[f"optimizer.{name}"]["state"] = {}
    if rank_and_ranks()[0] > 0:
        for name in ("random", *(f"state.{name}" for name in states)):
            state[name] = {"tensors": _sharded(state[name]["tensors"])}
    return state


def _sharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which this rank has a part; others are rank 0's to save."""
    from torch.distributed.tensor import DTensor

    return {name: x for name, x in tensors.items() if isinstance(x, DTensor)}


def split_state(state: Any) -> dict[str, Any]:
    """Takes the tensors out of a state, whose other content may change its shape.

    Args:
        state: What a `state_dict` gave.

    Returns:
        Its tensors by name, and the rest, pickled.
    """
    leaves, _ = tree_flatten_with_path(state)
    tensors = {keystr(path): v for path, v in leaves if isinstance(v, Tensor)}
    rest = tree_map(lambda v: None if isinstance(v, Tensor) else v, state)
    return {"tensors": tensors, "rest": pickle.dumps(rest)}


def join_state(parts: Mapping[str, Any]) -> Any:
    """Puts together what `split_state` took apart.

    Args:
        parts: Tensors and the rest.

    Returns:
        The state.
    """
    tensors = parts["tensors"]
    return tree_map_with_path(
        lambda path, v: tensors.get(keystr(path), v), pickle.loads(parts["rest"])
    )


def scatter_state(
    state: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    states: Mapping[str, Stateful],
) -> None:
    """Puts a state that was read into everything, in place.

    Args:
        state: State by part.
        modules: Networks by name.
        optimizers: Optimizers by the name of their module.
        states: Anything else by name.
    """
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
        value.load_state_dict(join_state(state[f"state.{name}"]))
    # Last: gathering an optimizer's state may run a step and draw random numbers.
    GlobalRandomState().load_state_dict(join_state(state["random"]))
