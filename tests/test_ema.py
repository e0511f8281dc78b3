import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmdkit import ExponentialMovingAverage


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
    return module


def put(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


@settings(max_examples=20, deadline=None)
@given(
    decay=st.floats(0, 0.999),
    values=st.lists(st.floats(-2, 2), min_size=1, max_size=8),
)
def test_an_average_is_a_geometric_series(decay: float, values: list[float]) -> None:
    module = one_weight(1.0)
    ema = ExponentialMovingAverage(module, (decay,))
    for value in values:
        put(module, value)
        ema.update(module)
    n = len(values)
    expected = decay**n * 1.0 + sum(
        (1 - decay) * decay ** (n - 1 - i) * value for i, value in enumerate(values)
    )
    torch.testing.assert_close(
        ema.averages[decay]["weight"],
        torch.full((2,), expected),
        rtol=1e-5,
        atol=1e-5,
    )


def test_several_rates_go_side_by_side() -> None:
    module = one_weight(0.0)
    ema = ExponentialMovingAverage(module, (0.5, 0.9, 0))
    put(module, 1.0)
    ema.update(module)
    ema.update(module)
    # 1 - decay^2, from 0 towards 1.
    for decay, expected in ((0.5, 0.75), (0.9, 0.19), (0, 1.0)):
        value = ema.averages[decay]["weight"]
        torch.testing.assert_close(value, torch.full((2,), expected))


def test_the_shadow_of_bf16_weights_is_fp32() -> None:
    module = one_weight(1.0, torch.bfloat16)
    ema = ExponentialMovingAverage(module, (0.999,))
    put(module, 2.0)
    for _ in range(10):
        ema.update(module)
    average = ema.averages[0.999]["weight"]
    assert average.dtype == torch.float32
    # In bf16 an update by 0.001 from 1 would be rounded away.
    torch.testing.assert_close(average, torch.full((2,), 2 - 0.999**10))
    with ema.applied_to(module):
        assert module.get_parameter("weight").dtype == torch.bfloat16
        assert module.get_parameter("weight")[0].item() == 1.0078125
    assert module.get_parameter("weight")[0].item() == 2.0


def test_the_average_is_a_copy_and_the_module_stays_as_it_is() -> None:
    module = one_weight(1.0)
    ema = ExponentialMovingAverage(module, (0.5,))
    put(module, 3.0)
    assert ema.averages[0.5]["weight"].tolist() == [1.0, 1.0]
    ema.update(module)
    assert module.get_parameter("weight").tolist() == [3.0, 3.0]
    assert module.get_parameter("weight").requires_grad
    assert not ema.averages[0.5]["weight"].requires_grad


def test_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    ema = ExponentialMovingAverage(module)
    assert set(ema.averages[0.999]) == {"1.weight", "1.bias"}


def test_applied_to_restores_to_the_last_bit_also_after_an_error() -> None:
    module = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(module, (0.9,))
    put(module, 5.0)
    before = copy.deepcopy(module.state_dict())
    with ema.applied_to(module):
        assert torch.equal(module.weight, ema.averages[0.9]["weight"])
        assert not torch.equal(module.weight, before["weight"])
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())

    def fail() -> None:
        with ema.applied_to(module):
            raise RuntimeError("while sampling")

    with pytest.raises(RuntimeError, match="while sampling"):
        fail()
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())


def test_copy_to_writes_the_average_of_the_rate_asked_for() -> None:
    module = one_weight(0.0)
    ema = ExponentialMovingAverage(module, (0.5, 0.9))
    put(module, 1.0)
    ema.update(module)
    other = one_weight(7.0)
    ema.copy_to(other, decay=0.9)
    torch.testing.assert_close(
        other.get_parameter("weight"), nn.Parameter(torch.full((2,), 0.1))
    )


def test_a_state_makes_the_round_trip() -> None:
    module = nn.Linear(2, 2)
    ema = ExponentialMovingAverage(module, (0.5, 0.9))
    put(module, 1.0)
    ema.update(module)
    other = ExponentialMovingAverage(nn.Linear(2, 2), (0.5, 0.9))
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    for one in (ema, other):
        put(module, -1.0)
        one.update(module)
    for decay in (0.5, 0.9):
        for name, value in ema.averages[decay].items():
            assert torch.equal(value, other.averages[decay][name])


def test_what_is_wrong_is_named() -> None:
    module = nn.Linear(2, 2)
    for decays in ((), (1.0,), (-0.1,), (0.5, 1.5)):
        with pytest.raises(ValueError, match="decays: got"):
            ExponentialMovingAverage(module, decays)
    ema = ExponentialMovingAverage(module, (0.5, 0.9))
    with pytest.raises(ValueError, match=r"decay: got None, expected one of \(0.5, 0"):
        ema.copy_to(module)
    with (
        pytest.raises(ValueError, match=r"decay: got 0.7"),
        ema.applied_to(module, 0.7),
    ):
        pass
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        ema.update(nn.Sequential(module))
    with pytest.raises(ValueError, match="state: its rates"):
        ema.load_state_dict({"0.5": {}})
    with pytest.raises(ValueError, match="parameter names"):
        ema.load_state_dict({"0.5": {"weight": 1}, "0.9": {"weight": 1}})
