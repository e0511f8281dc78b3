"""Freezing for a while, and trainable copies."""

import copy
import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers_losses import ToyNetwork, has_gradient, normal, toy_estimator
from torch import nn

from dmdkit import (
    ClassifierFreeGuidance,
    DiffusionGANHead,
    NetworkWithHead,
    SamplePrediction,
    ScoreEstimator,
    VarianceExploding,
    frozen,
    trainable_copy,
)

X, T = normal(3, 2, 4, 4), torch.ones(3)


def flags(*modules: nn.Module) -> list[bool]:
    return [p.requires_grad for module in modules for p in module.parameters()]


def partly_frozen() -> ToyNetwork:
    network = ToyNetwork()
    network.decoder.requires_grad_(False)
    return network


def test_gradients_flow_through_a_frozen_module_but_not_into_it() -> None:
    network, x = ToyNetwork(), X.clone().requires_grad_()
    with frozen(network):
        assert not any(flags(network))
        network(x, T, None).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(flags(network))


def test_every_flag_is_restored_and_a_frozen_teacher_never_wakes() -> None:
    critic, teacher = partly_frozen(), ToyNetwork().requires_grad_(False)
    before = flags(critic, teacher)
    assert set(before) == {True, False}
    for _ in range(2):
        with frozen(critic, teacher):
            assert not any(flags(critic, teacher))
        assert flags(critic, teacher) == before


def test_flags_are_restored_after_an_exception() -> None:
    critic = partly_frozen()
    before = flags(critic)
    with pytest.raises(RuntimeError, match="boom"), frozen(critic):
        raise RuntimeError("boom")
    assert flags(critic) == before


def test_nested_freezing_ends_with_the_outermost() -> None:
    critic, other = partly_frozen(), ToyNetwork()
    before = flags(critic, other)
    with frozen(critic):
        with frozen(critic, other):
            assert not any(flags(critic, other))
        assert not any(flags(critic))
        assert all(flags(other))
    assert flags(critic, other) == before


def test_a_module_named_twice_or_within_another_is_restored() -> None:
    critic = NetworkWithHead(partly_frozen(), DiffusionGANHead(8, 4, groups=2))
    before = flags(critic)
    with frozen(critic, critic.head, critic):
        assert not any(flags(critic))
    assert flags(critic) == before


def test_freezing_nothing_is_allowed() -> None:
    with frozen(), frozen(nn.SiLU()):
        pass


def test_a_copy_is_trainable_fp32_and_its_own() -> None:
    teacher = toy_estimator().requires_grad_(False).eval()
    student = trainable_copy(teacher)
    assert all(flags(student))
    assert all(m.training for m in student.modules())
    assert not any(flags(teacher))
    assert not teacher.training
    assert student.process == teacher.process
    assert student.parameterization == teacher.parameterization
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    before = teacher(X, T)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(X, T), before)
    assert not torch.equal(student(X, T), before)


def test_a_copy_stays_fp32_when_the_teacher_is_cast_afterwards() -> None:
    teacher = toy_estimator()
    weights = copy.deepcopy(teacher.state_dict())
    student = trainable_copy(teacher)
    teacher.to(torch.bfloat16)
    for name, value in student.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_copy_does_not_inherit_gradients() -> None:
    teacher = toy_estimator()
    teacher(X, T).sum().backward()
    assert all(p.grad is None for p in trainable_copy(teacher).parameters())


def test_shared_parameters_stay_shared() -> None:
    teacher = toy_estimator()
    network = teacher.network
    assert isinstance(network, ToyNetwork)
    network.twin = network.encoder
    student = trainable_copy(teacher)
    assert student.network.twin is student.network.encoder
    assert student.network.encoder is not network.encoder


def test_a_copy_with_a_head_is_one_network() -> None:
    teacher, head = toy_estimator(), DiffusionGANHead(8, 4, groups=2).bfloat16()
    critic = trainable_copy(teacher, head=head.requires_grad_(False).eval())
    assert isinstance(critic.network, NetworkWithHead)
    assert critic.network.head is head
    assert all(flags(critic))
    assert head.training
    assert all(p.dtype == torch.float32 for p in critic.parameters())
    assert torch.equal(critic(X, T), teacher(X, T))
    assert critic.logits(X, T).shape == (3,)
    critic.logits(X, T).sum().backward()
    assert has_gradient(head)
    assert not has_gradient(teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_starting_from_rounded_weights_is_warned_about(dtype: torch.dtype) -> None:
    teacher = toy_estimator().to(dtype)
    with pytest.warns(
        UserWarning, match=f"starts from weights in {dtype}; copy before"
    ):
        student = trainable_copy(teacher)
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_dropout_is_warned_about_by_name() -> None:
    teacher = toy_estimator()
    teacher.network.drop = nn.Dropout2d(0.1)
    with pytest.warns(UserWarning, match=r"estimator: network\.drop drops out"):
        trainable_copy(teacher)
    teacher.network.drop = nn.Dropout(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainable_copy(teacher)


@pytest.mark.parametrize(
    "wrong",
    [
        ToyNetwork(),
        ClassifierFreeGuidance(toy_estimator(), lambda cond: cond, 2.0),
        nn.DataParallel(toy_estimator()),
    ],
    ids=["network", "guidance", "wrapped estimator"],
)
def test_only_an_estimator_is_copied(wrong: object) -> None:
    message = f"estimator: got {type(wrong).__name__}, expected a ScoreEstimator"
    # The library's own check, not that of the tests' import hook.
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(trainable_copy)(wrong)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def estimator_of(network: nn.Module) -> ScoreEstimator:
    return ScoreEstimator(network, VarianceExploding(), SamplePrediction())


MESSAGE = "estimator: its network is wrapped or sharded; copy first"


def test_a_data_parallel_network_is_not_copied() -> None:
    with pytest.raises(TypeError, match=MESSAGE):
        trainable_copy(estimator_of(nn.DataParallel(ToyNetwork())))
    inner = NetworkWithHead(nn.DataParallel(ToyNetwork()), nn.Identity())
    with pytest.raises(TypeError, match=MESSAGE):
        trainable_copy(estimator_of(inner))


@pytest.mark.usefixtures("one_process")
def test_a_distributed_or_sharded_network_is_not_copied() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wrapped = nn.parallel.DistributedDataParallel(ToyNetwork())
    with pytest.raises(TypeError, match=MESSAGE):
        trainable_copy(estimator_of(wrapped))
    sharded = ToyNetwork()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=MESSAGE):
        trainable_copy(estimator_of(sharded))
