"""Random numbers that are saved by some ranks and go on by as many, more or fewer.

Ranks are played one after the other; `test_distributed.py` has two real ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdkit import GeneratorState
from dmdkit.training import ranks as module
from dmdkit.training.ranks import GlobalRandomState

Play = Callable[[int, int], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Makes this process a rank of several; what it gathers is its own alone."""

    def be(rank: int, ranks: int) -> None:
        monkeypatch.setattr(module, "rank_and_ranks", lambda: (rank, ranks))
        monkeypatch.setattr(module, "gathered", lambda value: [value])

    return be


def saved_by(play: Play, seeds: list[int], kind: str, shared: bool) -> dict[str, Any]:
    """The state that ranks with these seeds save together."""
    parts = []
    for rank, seed in enumerate(seeds):
        play(rank, len(seeds))
        if kind == "global":
            torch.manual_seed(seed)
            parts.append(GlobalRandomState().state_dict())
        else:
            generator = torch.Generator().manual_seed(seed)
            parts.append(GeneratorState(generator, shared=shared).state_dict())
    return {
        key: value if isinstance(value, str) else [part[key][0] for part in parts]
        for key, value in parts[0].items()
    }


def drawn_by(
    play: Play, ranks: int, state: dict[str, Any], kind: str, shared: bool
) -> list[Tensor]:
    """What each of some ranks draws after it took a state."""
    drawn = []
    for rank in range(ranks):
        play(rank, ranks)
        if kind == "global":
            torch.manual_seed(77)
            GlobalRandomState().load_state_dict(state)
            drawn.append(torch.randn(8))
        else:
            generator = torch.Generator().manual_seed(77)
            GeneratorState(generator, shared=shared).load_state_dict(state)
            drawn.append(torch.randn(8, generator=generator))
    return drawn


def fresh(seed: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(seed))


def different(drawn: list[Tensor]) -> bool:
    return len({tuple(x.tolist()) for x in drawn}) == len(drawn)


@pytest.mark.parametrize("kind", ["own", "global"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 2), (3, 1)])
def test_other_ranks_than_saved_get_noise_of_their_own(
    play: Play, kind: str, before: int, after: int
) -> None:
    state = saved_by(play, list(range(5, 5 + before)), kind, shared=False)
    drawn = drawn_by(play, after, state, kind, shared=False)
    old = [fresh(5 + rank) for rank in range(before)]
    assert different([*drawn, *old])
    again = drawn_by(play, after, state, kind, shared=False)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize("kind", ["own", "global"])
def test_as_many_ranks_go_on_where_each_was(play: Play, kind: str) -> None:
    state = saved_by(play, [5, 6, 7], kind, shared=False)
    drawn = drawn_by(play, 3, state, kind, shared=False)
    for rank, x in enumerate(drawn):
        assert torch.equal(x, fresh(5 + rank))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (3, 1)])
def test_what_ranks_share_they_go_on_sharing(
    play: Play, before: int, after: int
) -> None:
    state = saved_by(play, [5] * before, "own", shared=True)
    for x in drawn_by(play, after, state, "own", shared=True):
        assert torch.equal(x, fresh(5))


def test_global_numbers_alike_on_several_ranks_stay_alike(play: Play) -> None:
    state = saved_by(play, [5, 5], "global", shared=False)
    for x in drawn_by(play, 3, state, "global", shared=False):
        assert torch.equal(x, fresh(5))


def test_ranks_alike_on_the_cpu_keep_their_own_gpus(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved_by(play, [5, 5], "global", shared=False)
    taken: list[Tensor] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda v, _: taken.append(v))
    for rank in range(2):
        play(rank, 2)
        GlobalRandomState().load_state_dict({**state, "cuda0": [b"\x01", b"\x02"]})
    assert [int(x) for x in taken] == [1, 2]


@pytest.mark.parametrize("shared", [False, True])
def test_the_state_of_a_gpu_seeds_the_cpu_s(play: Play, shared: bool) -> None:
    state = {"device": "cuda", "ranks": [bytes(16), bytes(16)]}
    drawn = drawn_by(play, 2, state, "own", shared)
    assert torch.equal(*drawn) == shared
    other = {"device": "cuda", "ranks": [bytes(15) + b"1", bytes(16)]}
    assert not torch.equal(drawn[0], drawn_by(play, 2, other, "own", shared)[0])
