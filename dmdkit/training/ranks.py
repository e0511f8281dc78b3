"""What the processes of a run agree on; in a single process all of it is trivial."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

Result = TypeVar("Result")


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without a process group.

    Returns:
        Rank, and number of ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, on every rank.

    Args:
        value: What this rank has; anything that can be pickled.
        group: The process group to go through; the default one if None.

    Returns:
        One value a rank.
    """
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value, group)
    return values


def on_any(flag: bool) -> bool:
    """Whether something is so on at least one rank; cheap enough for every iteration.

    Args:
        flag: Whether it is so here.

    Returns:
        The same answer on every rank.
    """
    if rank_and_ranks()[1] == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor(int(flag), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def everywhere(
    action: Callable[[], Result], group: dist.ProcessGroup | None = None
) -> list[Result]:
    """Does something on every rank; if it fails on one, all of them raise.

    Args:
        action: What each rank does; it must not wait for other ranks.
        group: The process group to go through; the default one if None.

    Returns:
        What it gave, by rank.

    Raises:
        OSError: If it failed on another rank; where it failed, that error itself.
    """
    if rank_and_ranks()[1] == 1:
        return [action()]
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as failure:
        error = failure
    outcomes = gathered((result, None if error is None else f"{error}"), group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise OSError(f"rank {rank}: {message}")
    return [result for result, _ in outcomes]


def on_first(
    action: Callable[[], Result], group: dist.ProcessGroup | None = None
) -> Result:
    """Does something on rank 0, and waits for it; if it fails, all ranks raise.

    Args:
        action: What rank 0 does.
        group: The process group to go through; the default one if None.

    Returns:
        What it gave there, on every rank.

    Raises:
        OSError: If it failed on rank 0; there, that error itself.
    """
    rank, _ = rank_and_ranks()
    done = everywhere(lambda: action() if rank == 0 else None, group)
    return done[0]  # pyright: ignore[reportReturnType]


class GeneratorState:
    """Makes a `torch.Generator` a part of a checkpoint, on all ranks.

    The states of all ranks are saved. A run that goes on with as many ranks goes on
    with the same numbers. On another number of ranks a generator that was alike on all
    stays so; where each rank had its own, new ones are derived from them.

    Args:
        generator: The generator whose state is saved and restored in place.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Gives the generators' states; a collective call if there are ranks."""
        return {"ranks": gathered(_as_bytes(self.generator.get_state()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the generator where it was.

        Args:
            state: What `state_dict` gave, on any number of ranks.
        """
        states, (rank, ranks) = state["ranks"], rank_and_ranks()
        self.generator.set_state(_from_bytes(states[rank % len(states)]))
        if len(set(states)) > 1 and len(states) != ranks:
            device = self.generator.device
            drawn = torch.randint(2**31, (), generator=self.generator, device=device)
            self.generator.manual_seed(int(drawn) + (rank << 32))


class GlobalRandomState:
    """PyTorch's own generators on every rank: the CPU's and those of CUDA devices."""

    def state_dict(self) -> dict[str, Any]:
        """Gives their states; a collective call if there are ranks."""
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            for i, value in enumerate(torch.cuda.get_rng_state_all()):
                state[f"cuda{i}"] = value
        return {k: gathered(_as_bytes(value)) for k, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts them where they were.

        Args:
            state: What `state_dict` gave, on any number of ranks and devices.
        """
        rank, _ = rank_and_ranks()
        own = {k: _from_bytes(of[rank % len(of)]) for k, of in state.items()}
        torch.set_rng_state(own["cpu"])
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in own:
                torch.cuda.set_rng_state(own[f"cuda{i}"], i)


def _as_bytes(state: torch.Tensor) -> bytes:
    # No tensor: what each rank has differently is saved as plain data.
    return state.numpy().tobytes()


def _from_bytes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
