import pytest
import torch
from torch import nn

from dmdkit import linear_warmup


def rates(steps: int, count: int, *rate: float) -> list[list[float]]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in rate]
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": r} for p, r in zip(parameters, rate, strict=True)]
    )
    schedule = linear_warmup(optimizer, steps)
    used = []
    for _ in range(count):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return used


def test_step_n_of_the_first_ones_has_its_share_of_the_rate() -> None:
    used = rates(4, 7, 2.0)
    assert [u for (u,) in used] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])


def test_every_group_keeps_its_own_full_rate() -> None:
    used = rates(2, 3, 1.0, 3.0)
    assert used == [pytest.approx([0.5, 1.5])] + [pytest.approx([1.0, 3.0])] * 2


@pytest.mark.parametrize("steps", [0, 1])
def test_no_warm_up_is_the_full_rate_from_the_first_step(steps: int) -> None:
    assert rates(steps, 3, 2.0) == [[2.0]] * 3


def test_the_first_step_already_moves_the_weights() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    linear_warmup(optimizer, 500)
    weight.sum().backward()
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 1 / 500)


def test_a_schedule_continues_from_its_state() -> None:
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, linear_warmup(optimizer, 10)

    optimizer, schedule = build()
    for _ in range(3):
        optimizer.step()
        schedule.step()
    other_optimizer, other = build()
    other.load_state_dict(schedule.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other_optimizer):
        one.step()
    schedule.step()
    other.step()
    assert other_optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: got -1"):
        rates(-1, 1, 1.0)
