"""Endless shuffled batches that can be taken up again anywhere."""

import os
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info


class BatchStream:
    """An endless, shuffled, resumable stream of batches for a training loop.

    The epochs of a data set, each in an order that depends on seed and epoch alone,
    make one endless sequence. Global batch j is its samples j B R ... (j + 1) B R - 1
    for batches of B on R ranks, and rank r takes the r-th part: together the ranks see
    what one rank would see with batches of B R. Nothing comes twice in an epoch; a
    batch may hold the end of one epoch and the beginning of the next.

    Its state is the number of samples that all ranks have taken with `next`, whatever
    workers have read ahead: it continues on another number of ranks or workers, or with
    another batch size, with the sample that comes next.

    Args:
        dataset: A data set with a length, whose items PyTorch's `default_collate` can
            put together. It is read in the workers, if there are any.
        batch_size: Samples of one batch on one rank, B.
        seed: Of the order; 0 or more.
        rank: This rank, 0 ... ranks - 1.
        ranks: How many ranks share the stream, R.
        workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches are put in pinned memory for a GPU.

    Attributes:
        samples: How many samples all ranks have taken.

    Raises:
        ValueError: If a number is out of range, or the data set is empty.

    Examples:
        >>> import torch
        >>> stream = BatchStream(torch.arange(10), batch_size=4, seed=0)
        >>> batches = [next(stream) for _ in range(5)]
        >>> sorted(torch.cat(batches).tolist()[:10])
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or workers < 0 or seed < 0 or not 0 <= rank < ranks:
            raise ValueError(
                f"batch_size, workers, seed, rank, ranks: got {batch_size}, {workers}, "
                f"{seed}, {rank}, {ranks}; expected batch_size >= 1, workers and seed "
                ">= 0, and 0 <= rank < ranks."
            )
        if len(dataset) == 0:
            raise ValueError("dataset: it is empty.")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.workers, self.pin_memory = workers, pin_memory
        self.samples = 0
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Any:
        """Gives this rank's part of the next global batch, collated.

        What the data set raises, in a worker too, comes out here as it was. The batch
        is then not counted, and would be read again.
        """
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        if isinstance(batch, _Failure):
            self.close()
            raise batch.error
        self.samples += self.batch_size * self.ranks
        return batch

    def close(self) -> None:
        """Ends the workers; a further `next` starts new ones."""
        # The loader's iterator ends its workers when nothing refers to it.
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Gives how far the stream is, over all ranks, and of what it is."""
        length = len(self.dataset)
        return {"samples": self.samples, "length": length, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where a stream of the same data and seed was.

        Args:
            state: What `state_dict` gave, on any number of ranks and workers.

        Raises:
            ValueError: If it is no such state, or of another data set's length or seed.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or int(state["samples"]) < 0:
            raise ValueError(
                f"state: got {dict(state)}, expected what state_dict gives: "
                f"{', '.join(own)}."
            )
        for name in ("length", "seed"):
            if state[name] != own[name]:
                raise ValueError(
                    f"state: it is of a stream of {name} {state[name]}, this one has "
                    f"{own[name]}; use the same data and seed."
                )
        self.close()
        self.samples = int(state["samples"])

    def _loader(self) -> DataLoader[Any]:
        # To PyTorch a whole batch is one item, its list of indices one index.
        return DataLoader(
            _Batches(self.dataset),
            batch_size=None,
            sampler=_Indices(
                length=len(self.dataset),
                seed=self.seed,
                start=self.samples + self.rank * self.batch_size,
                take=self.batch_size,
                stride=self.batch_size * self.ranks,
            ),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # Else the workers' seeds would be drawn from PyTorch's own generator.
            generator=torch.Generator(),
            worker_init_fn=_leave_the_group,
        )


def _leave_the_group(worker: int) -> None:
    """Spares a worker the signals that a scheduler or torchrun sends to a whole group.

    The process that reads from it may want to save first, and ends it afterwards.
    """
    del worker
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


@dataclass(frozen=True)
class _Indices:
    """One rank's places in the endless sequence, as lists of the data set's indices.

    Attributes:
        length: Samples of an epoch.
        seed: Of the order.
        start: Where the rank's first batch begins.
        take: Samples of a batch.
        stride: From one batch to the next.
    """

    length: int
    seed: int
    start: int
    take: int
    stride: int

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        begin = self.start
        while True:
            indices: list[int] = []
            for place in range(begin, begin + self.take):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = _order(self.seed, epoch, self.length)
                indices.append(int(order[place % self.length]))
            yield indices
            begin += self.stride


def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker."""

    error: Exception


class _Batches(Dataset[Any]):
    """Whole batches of a data set, by their lists of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Any:
        try:
            return default_collate([self.dataset[index] for index in indices])
        except Exception as error:
            # PyTorch would hand on the text of the traceback in place of the message.
            return _Failure(_portable(error) if get_worker_info() else error)


def _portable(error: Exception) -> Exception:
    """The error as another process can take it, with its traceback as a note."""
    text = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"Raised in a worker:\n{text}")
    return error


def _as_it_is(batch: Any) -> Any:
    return batch
