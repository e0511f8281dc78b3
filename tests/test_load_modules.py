from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import TinyHead, TinyNetwork
from torch import nn

from dmdkit import (
    ExponentialMovingAverage,
    NetworkWithHead,
    load_modules,
    load_states,
    save_checkpoint,
    saved_parameters,
)


def network(seed: int, hidden: int = 8) -> TinyNetwork:
    torch.manual_seed(seed)
    return TinyNetwork(hidden=hidden)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(
        torch.equal(mine[name], other[name]) for name in mine
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    modules = {"student": network(0), "critic": network(1)}
    optimizers = {"student": torch.optim.AdamW(modules["student"].parameters())}
    return save_checkpoint(tmp_path, step=7, modules=modules, optimizers=optimizers)


def test_weights_are_taken_and_nothing_else(checkpoint: Path) -> None:
    student, critic = network(2), network(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_modules(checkpoint, student=student, critic=critic)
    assert same(student, network(0))
    assert same(critic, network(1))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_module_is_its_module(checkpoint: Path, tmp_path: Path) -> None:
    student = network(2)
    compiled: Any = torch.compile(student)
    load_modules(checkpoint, student=compiled)
    assert same(student, network(0))
    path = save_checkpoint(tmp_path / "2", step=1, modules={"student": compiled})
    other = network(3)
    load_modules(path, student=other)
    assert same(other, student)


def test_one_module_alone(checkpoint: Path) -> None:
    student = network(2)
    load_modules(checkpoint, student=student)
    assert same(student, network(0))


def test_a_critic_gets_its_head_in_a_second_phase(checkpoint: Path) -> None:
    critic = NetworkWithHead(network(2), TinyHead())
    head = {name: value.clone() for name, value in critic.head.state_dict().items()}
    load_modules(checkpoint, critic=critic.network)
    assert same(critic.network, network(1))
    assert all(torch.equal(critic.head.state_dict()[n], v) for n, v in head.items())


def test_what_is_saved_has_names(checkpoint: Path) -> None:
    assert saved_parameters(checkpoint, "critic") == set(network(1).state_dict())
    assert saved_parameters(checkpoint, "crit") == set()


def test_what_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"critic: 10 parameters .* embed\.weight"):
        load_modules(checkpoint, critic=NetworkWithHead(network(2), nn.Identity()))
    with pytest.raises(ValueError, match="does not fit what was built"):
        load_modules(checkpoint, critic=network(2, hidden=9))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_modules(tmp_path / "nowhere", critic=network(2))


def test_an_average_is_taken_and_nothing_else(tmp_path: Path) -> None:
    student, fresh = network(0), network(3)
    average = ExponentialMovingAverage(student, (0.5,))
    average.update(network(1))
    states = {"student_ema": average}
    path = save_checkpoint(
        tmp_path, step=7, modules={"student": student}, states=states
    )
    found = ExponentialMovingAverage(fresh, (0.5,))
    before = torch.get_rng_state()
    load_states(path, student_ema=found)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(fresh, network(3))
    found.copy_to(fresh)
    average.copy_to(student)
    assert same(fresh, student)
    with pytest.raises(ValueError, match="holds no such state as critic_ema"):
        load_states(path, critic_ema=found)
    other = ExponentialMovingAverage(network(0), (0.9,))
    with pytest.raises(ValueError, match="holds no such state as student_ema"):
        load_states(path, student_ema=other)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_states(tmp_path / "none", student_ema=found)
