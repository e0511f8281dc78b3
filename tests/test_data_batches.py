import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from dmdkit.data import BadImageError, BatchStream, open_images
from dmdkit.training import Stateful, load_checkpoint, save_checkpoint

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

N = 23


class Numbers(Dataset[int]):
    """Item i is i."""

    def __init__(self, length: int = N) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def take(stream: BatchStream, batches: int) -> list[list[int]]:
    return [next(stream).tolist() for _ in range(batches)]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@given(
    length=st.integers(1, 30),
    batch=st.integers(1, 70),
    seed=st.integers(0, 2**70),
)
def test_every_epoch_holds_everything_once(length: int, batch: int, seed: int) -> None:
    stream = BatchStream(Numbers(length), batch, seed=seed)
    seen = flat(take(stream, 4 * length // batch + 1))
    for start in range(0, len(seen) - length + 1, length):
        assert sorted(seen[start : start + length]) == list(range(length))
    last = seen[len(seen) - len(seen) % length :]
    assert len(set(last)) == len(last)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(seen[start : start + N])
        for seed in (0, 1, 2**40)
        for seen in [flat(take(BatchStream(Numbers(), N, seed=seed), 3))]
        for start in (0, N, 2 * N)
    }
    assert len(orders) == 9
    again = flat(take(BatchStream(Numbers(), 5, seed=0), 9))
    assert tuple(again[:N]) in orders
    assert again[:N] != list(range(N))


def test_every_order_is_as_likely() -> None:
    counts = Counter(
        tuple(next(BatchStream(Numbers(3), 3, seed=seed)).tolist())
        for seed in range(1200)
    )
    assert len(counts) == 6
    # The standard deviation of a count of mean 200 is below 13.
    assert all(abs(count - 200) < 65 for count in counts.values())


def test_randomness_of_pytorch_is_left_alone() -> None:
    before = torch.get_rng_state()
    orders = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        orders.append(take(BatchStream(Numbers(), 4, seed=0), 6))
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("total", [4, 8, 60])
def test_ranks_share_the_batch_of_one_rank(ranks: int, total: int) -> None:
    whole = take(BatchStream(Numbers(), total, seed=3), 9)
    streams = [
        BatchStream(Numbers(), total // ranks, seed=3, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    parts = [take(stream, 9) for stream in streams]
    joined = [[i for part in parts for i in part[j]] for j in range(9)]
    assert joined == whole
    assert {stream.samples for stream in streams} == {9 * total}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    stream = BatchStream(Numbers(), 4, seed=1, workers=workers)
    assert take(stream, 20) == take(BatchStream(Numbers(), 4, seed=1), 20)
    stream.close()


@pytest.mark.parametrize("consumed", [0, 1, 7])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (4, 0)])
def test_a_stream_goes_on_elsewhere(consumed: int, ranks: int, workers: int) -> None:
    whole = flat(take(BatchStream(Numbers(), 8, seed=5), 20))
    first = [
        BatchStream(Numbers(), 4, seed=5, rank=rank, ranks=2, workers=2 * rank)
        for rank in range(2)
    ]
    for stream in first:
        take(stream, consumed)
    states = [stream.state_dict() for stream in first]
    assert states[0] == states[1]
    assert states[0]["samples"] == 8 * consumed, "not what workers have read ahead"
    streams = [
        BatchStream(
            Numbers(), 12 // ranks, seed=5, rank=rank, ranks=ranks, workers=workers
        )
        for rank in range(ranks)
    ]
    for stream in streams:
        # A stream that is under way forgets where it was.
        take(stream, 2)
        stream.load_state_dict(pickle.loads(pickle.dumps(states[0])))
    parts = [take(stream, 5) for stream in streams]
    seen = [i for j in range(5) for part in parts for i in part[j]]
    assert seen == whole[8 * consumed : 8 * consumed + 60]
    for stream in (*first, *streams):
        stream.close()


def test_a_state_changes_no_more() -> None:
    stream = BatchStream(Numbers(), 4, seed=5)
    state = stream.state_dict()
    take(stream, 1)
    assert state["samples"] == 0
    assert stream.state_dict()["samples"] == 4


def test_it_is_a_part_of_a_checkpoint(tmp_path) -> None:
    stream, other = (BatchStream(Numbers(), 4, seed=5) for _ in range(2))
    assert isinstance(stream, Stateful)
    take(stream, 3)
    path = save_checkpoint(tmp_path, step=3, modules={}, states={"images": stream})
    load_checkpoint(path, modules={}, states={"images": other})
    assert take(other, 8) == take(stream, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 24}, "length 24, this one has 23"),
        ({"seed": 1}, "seed 1, this one has 5"),
        ({"samples": -4}, "expected what state_dict gives"),
        ({"more": 1}, "expected what state_dict gives: samples, length, seed"),
    ],
)
def test_states_of_others_are_refused(change: dict[str, int], message: str) -> None:
    stream = BatchStream(Numbers(), 4, seed=5)
    expected = take(BatchStream(Numbers(), 4, seed=5), 3)
    take(stream, 1)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})
    assert take(stream, 2) == expected[1:], "nothing was taken over"


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"workers": -1},
        {"seed": -1},
        {"rank": -1},
        {"rank": 2, "ranks": 2},
        {"ranks": 0},
    ],
)
def test_arguments_out_of_range(wrong: dict[str, int]) -> None:
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, **wrong}
    with pytest.raises(ValueError, match="expected batch_size >= 1"):
        BatchStream(Numbers(), **arguments)
    with pytest.raises(ValueError, match="empty"):
        BatchStream(Numbers(0), 4, seed=0)


class Pair(NamedTuple):
    pixels: Tensor
    label: int


class Structured(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.full((3, 2, 2), index, dtype=torch.uint8)
        return {"image": Pair(pixels, index), "x": torch.tensor(0.5 * index)}


@pytest.mark.parametrize("workers", [0, 1])
def test_items_are_collated(workers: int) -> None:
    stream = BatchStream(Structured(), 4, seed=0, workers=workers)
    [indices] = take(BatchStream(Numbers(), 4, seed=0), 1)
    batch = next(stream)
    expected = torch.tensor(indices)
    assert batch["image"].pixels.dtype == torch.uint8
    assert batch["image"].pixels.shape == (4, 3, 2, 2)
    assert torch.equal(batch["image"].pixels[:, 0, 0, 0], expected.to(torch.uint8))
    assert torch.equal(batch["image"].label, expected)
    assert torch.equal(batch["x"], 0.5 * expected)
    stream.close()


class OddError(Exception):
    """An exception that cannot be pickled, as some libraries have them."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Broken(Numbers):
    """Item 7 fails as long as `error` is there."""

    error: Exception | None = BadImageError("set.zip: 00000/img7.png: truncated.")

    def __getitem__(self, index: int) -> int:
        if index == 7 and self.error is not None:
            raise self.error
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_out_as_they_were(workers: int) -> None:
    dataset = Broken()
    good = take(BatchStream(Numbers(), 4, seed=0), 9)
    before = next(j for j, batch in enumerate(good) if 7 in batch)
    stream = BatchStream(dataset, 4, seed=0, workers=workers)
    assert take(stream, before) == good[:before]
    for _ in range(2):
        with pytest.raises(BadImageError) as caught:
            next(stream)
        assert str(caught.value) == "set.zip: 00000/img7.png: truncated."
        assert "in __getitem__" in "".join(traceback.format_exception(caught.value))
        assert stream.samples == 4 * before, "the batch was not given"
    dataset.error = None
    assert take(stream, 3) == good[before : before + 3], "and is read again"
    stream.close()


def test_errors_that_cannot_travel_come_as_text() -> None:
    dataset = Broken()
    dataset.error = OddError("one", "other")
    stream = BatchStream(dataset, N, seed=0, workers=1)
    with pytest.raises(RuntimeError) as caught:
        next(stream)
    assert str(caught.value) == "OddError: one and other"


def test_no_worker_is_left() -> None:
    stream = BatchStream(Numbers(), 4, seed=0, workers=2)
    take(stream, 2)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []
    stream.close()
    assert take(stream, 1) == take(BatchStream(Numbers(), 4, seed=0), 3)[2:]
    del stream
    assert multiprocessing.active_children() == []


SAVING = """
import signal, sys, time
from dmdkit.data import BatchStream

told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
stream = BatchStream(list(range(9)), 2, seed=0, workers=2)
for _ in range(2):  # so that both workers have begun
    next(stream)
print("reading", flush=True)
while not told:
    time.sleep(0.01)
time.sleep(0.5)  # time enough for workers to die, if they are to
for _ in range(9):
    next(stream)
print("saved", flush=True)
"""


def test_workers_outlive_a_signal_to_the_whole_group() -> None:
    """As torchrun and schedulers send it: the run still reads, saves and ends."""
    command = [sys.executable, "-c", SAVING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
        assert process.wait(20) == 0


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_images_are_the_same_through_workers(tmp_path, name: str) -> None:
    from test_data_images import edm_files, write

    images = open_images(write(edm_files(), tmp_path / name), classes=10)
    next(iter(BatchStream(images, 1, seed=0)))  # so that workers inherit a handle
    streams = [BatchStream(images, 5, seed=2, workers=workers) for workers in (0, 2)]
    for _ in range(6):
        (a, of_a), (b, of_b) = (next(stream) for stream in streams)
        assert a.shape == (5, 3, 8, 8)
        assert torch.equal(a, b)
        assert torch.equal(of_a, of_b)
    streams[1].close()
