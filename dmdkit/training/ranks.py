"""What the processes of a run agree on; in a single process all of it is trivial."""

import hashlib
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

    The states of all ranks are saved, and a run that goes on with as many ranks, on the
    same kind of device, goes on with the same numbers. Else a generator that the ranks
    share goes on as that of rank 0, and others are seeded anew from what was saved,
    each rank's differently.

    Args:
        generator: The generator whose state is saved and restored in place.
        shared: Whether it is alike on all ranks and has to stay so, as the one that
            draws the rungs.
    """

    def __init__(self, generator: torch.Generator, *, shared: bool = False) -> None:
        self.generator, self.shared = generator, shared

    def state_dict(self) -> dict[str, Any]:
        """Gives the generators' states; a collective call if there are ranks."""
        return {
            "device": self.generator.device.type,
            "ranks": gathered(_as_bytes(self.generator.get_state())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the generator where it was.

        Args:
            state: What `state_dict` gave, on any number of ranks.
        """
        states, (rank, ranks) = state["ranks"], rank_and_ranks()
        place = 0 if self.shared else rank
        same_device = state["device"] == self.generator.device.type
        if same_device and (self.shared or len(states) == ranks):
            self.generator.set_state(_from_bytes(states[place]))
        else:
            self.generator.manual_seed(_seed_from(states[0], place))


class GlobalRandomState:
    """PyTorch's own generators on every rank: the CPU's and those of CUDA devices.

    On another number of ranks they are seeded anew, differently on every rank, unless
    they were alike on several.
    """

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
        states, (rank, ranks) = state["cpu"], rank_and_ranks()
        alike = len(states) > 1 and len(set(states)) == 1
        if len(states) != ranks and not alike:
            torch.manual_seed(_seed_from(states[0], rank))
            return
        # Ranks alike on the CPU need not be so on their GPUs.
        place = rank if len(states) == ranks else 0
        torch.set_rng_state(_from_bytes(states[place]))
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                of_ranks = state[f"cuda{i}"]
                torch.cuda.set_rng_state(_from_bytes(of_ranks[place]), i)


def _seed_from(state: bytes, place: int) -> int:
    """A seed for one of several places, of the 32 bits that a CPU's generator reads."""
    seed = int.from_bytes(hashlib.sha256(state).digest()[:4])
    return (seed + place) % 2**32


def _as_bytes(state: torch.Tensor) -> bytes:
    # No tensor: what each rank has differently is saved as plain data.
    return state.numpy().tobytes()


def _from_bytes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
