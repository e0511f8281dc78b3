"""Classifier-free guidance: the formula, its calls, and conditions of any structure."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers_diffusion import SCHEDULES, discrete_levels, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_map

from dmdkit import (
    ClassifierFreeGuidance,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    NoiseProcess,
    RectifiedFlow,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
    concatenate_conditions,
    guidance_scale_from_offset,
)
from dmdkit.types import Denoiser


@dataclass
class Text:
    """A condition as a user's own code may have it."""

    tokens: Tensor
    pooled: Tensor | None


register_dataclass(Text)

NULL = 10
CONDITIONS: dict[str, tuple[Any, Any]] = {
    "labels": (torch.tensor([1, 2, 3]), torch.full((3,), NULL)),
    "tensor": (randn(3, 4), torch.zeros(3, 4)),
    "dict": (
        {"text": randn(3, 2, 4), "pooled": randn(3, 4, seed=1)},
        {"text": torch.zeros(3, 2, 4), "pooled": torch.zeros(3, 4)},
    ),
    "tuple": (
        (torch.tensor([1, 2, 3]), randn(3, 2)),
        (torch.full((3,), NULL), randn(3, 2, seed=4)),
    ),
    "none leaf": (
        {"text": randn(3, 2), "extra": None},
        {"text": torch.zeros(3, 2), "extra": None},
    ),
    "dataclass": (Text(randn(3, 2), None), Text(torch.zeros(3, 2), None)),
    "nested": (
        [Text(randn(3, 2), randn(3, 1)), {"labels": torch.tensor([4, 5, 6])}],
        [Text(randn(3, 2), randn(3, 1)), {"labels": torch.full((3,), NULL)}],
    ),
    "none": (None, None),
}


def summary(cond: Any, x: Tensor) -> Tensor:
    """A number a sample from every leaf of a condition, and weights that tell apart."""
    total = torch.zeros(len(x))
    leaves: list[Tensor] = []
    tree_map(lambda leaf: leaves.append(leaf) if leaf is not None else None, cond)
    for i, leaf in enumerate(leaves):
        total = total + (i + 1) * leaf.float().reshape(len(x), -1).sum(1)
    return total


class Conditional(nn.Module):
    """Predicts from sample, time and every leaf of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.conditions: list[Any] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        self.batches.append(len(x))
        self.conditions.append(cond)
        per_sample = summary(cond, x) + c_noise / 1000
        return (x + per_sample.view(-1, *[1] * (x.ndim - 1))).tanh()


def denoiser(process: NoiseProcess | None = None) -> ScoreEstimator:
    if process is None:
        process = SCHEDULES["vp"].process
    return ScoreEstimator(Conditional(), process, EpsilonPrediction())


@pytest.mark.parametrize("merged", [False, True], ids=["sequential", "merged"])
@pytest.mark.parametrize("scale", [0, 0.5, 1.75, 8])
@pytest.mark.parametrize("shape", [(3, 3), (3, 2, 4, 3), (3, 2, 2, 2, 3)], ids=str)
def test_guiding_x0_is_guiding_epsilon(
    shape: tuple[int, ...], scale: float, merged: bool
) -> None:
    labels, null = CONDITIONS["labels"]
    network = Conditional()
    guided = ClassifierFreeGuidance(
        ScoreEstimator(network, SCHEDULES["vp"].process, EpsilonPrediction()),
        unconditional=lambda cond: torch.full_like(cond, NULL),
        scale=scale,
        merged=merged,
    )
    x_t, t = randn(*shape), torch.tensor([20.0, 499.0, 999.0])
    found = guided(x_t, t, labels)
    # Ho & Salimans 2022 with s = 1 + w, in the space of the network's epsilon.
    conditional, unconditional = network(x_t, t, labels), network(x_t, t, null)
    noise = (1 - scale) * unconditional.double() + scale * conditional.double()
    for i, index in enumerate(t.tolist()):
        alpha, sigma = discrete_levels(index)
        expected = (x_t[i].double() - sigma * noise[i]) / alpha
        torch.testing.assert_close(found[i].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONDITIONS)
def test_merged_equals_sequential_for_every_condition(name: str) -> None:
    cond, null = CONDITIONS[name]
    answers = []
    for merged in (False, True):
        inner = denoiser()
        guided = ClassifierFreeGuidance(inner, lambda given: null, 3.0, merged)
        answers.append(guided(randn(3, 2), torch.tensor([5.0, 6.0, 700.0]), cond))
        assert inner.network.batches == ([6] if merged else [3, 3])
    torch.testing.assert_close(answers[0], answers[1])


def test_merged_order_is_unconditional_first_and_leaves_keep_their_type() -> None:
    inner = denoiser()
    guided = ClassifierFreeGuidance(
        inner, lambda cond: Text(torch.zeros_like(cond.tokens), None), 2.0, merged=True
    )
    labels = torch.tensor([4, 5, 6])
    guided(randn(3, 2), torch.ones(3), Text(labels, None))
    (seen,) = inner.network.conditions  # pyright: ignore[reportGeneralTypeIssues]
    assert isinstance(seen, Text)
    assert seen.tokens.tolist() == [0, 0, 0, 4, 5, 6]
    assert seen.tokens.dtype == torch.int64
    assert seen.pooled is None


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_is_one_call_of_the_plain_denoiser(
    scale: float, merged: bool
) -> None:
    def never(cond: Any) -> Any:
        raise AssertionError("asked for the unconditional condition")

    inner = denoiser()
    x_t, t = randn(3, 2), torch.ones(3)
    labels = CONDITIONS["labels"][0]
    found = ClassifierFreeGuidance(inner, never, scale, merged)(x_t, t, labels)
    assert inner.network.batches == [3]
    assert torch.equal(found, inner(x_t, t, labels))


@given(weight=st.floats(-0.9, 20), seed=st.integers(0, 9))
def test_offset_convention_converts(weight: float, seed: int) -> None:
    cond, null = CONDITIONS["tensor"]
    flow = ScoreEstimator(Conditional(), RectifiedFlow(), VelocityPrediction())
    x_t, t = randn(3, 2, seed=seed), torch.tensor([0.1, 0.5, 1.0])
    c, u = flow(x_t, t, cond), flow(x_t, t, null)
    scale = guidance_scale_from_offset(weight)
    found = ClassifierFreeGuidance(flow, lambda given: null, scale)(x_t, t, cond)
    torch.testing.assert_close(found, c + weight * (c - u), atol=1e-4, rtol=1e-4)


def test_no_offset_is_no_guidance() -> None:
    assert guidance_scale_from_offset(0) == 1
    assert guidance_scale_from_offset(0.75) == 1.75


@pytest.mark.parametrize(
    ("scale", "c", "u", "expected"),
    [(0, 3.0, 1.0, 1.0), (0.5, 3.0, 1.0, 2.0), (2, 3.0, 1.0, 5.0), (8, 3.0, 1.0, 17.0)],
)
def test_formula_by_hand(scale: float, c: float, u: float, expected: float) -> None:
    @dataclass
    class Constant:
        process: NoiseProcess

        def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None, /) -> Tensor:
            return torch.full_like(x_t, c if cond is not None else u)

    guided = ClassifierFreeGuidance(Constant(RectifiedFlow()), lambda cond: None, scale)
    found = guided(torch.zeros(2, 3), torch.ones(2), torch.ones(2))
    assert torch.equal(found, torch.full((2, 3), expected))


def test_a_guided_denoiser_is_a_denoiser_of_the_same_process() -> None:
    inner = denoiser(DiscreteVariancePreserving((0.9, 0.5)))
    guided = ClassifierFreeGuidance(inner, lambda cond: cond, 2.0)
    assert guided.process is inner.process
    assert isinstance(guided, Denoiser)
    twice = ClassifierFreeGuidance(guided, lambda cond: cond, 3.0)
    x_t, t = randn(2, 3), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(twice(x_t, t, None), inner(x_t, t, None))


@pytest.mark.parametrize(
    ("cond", "null"),
    [
        ({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}),
        ({"a": torch.ones(2), "b": (torch.ones(2), None)}, (torch.ones(2), None)),
        ((torch.ones(2), torch.ones(2)), [torch.ones(2), torch.ones(2)]),
        (torch.ones(2), (torch.ones(2),)),
        (Text(torch.ones(2), None), {"tokens": torch.ones(2), "pooled": None}),
    ],
    ids=["missing key", "nested", "list for tuple", "tuple", "dataclass"],
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_different_structure_is_one_readable_line(
    cond: Any, null: Any, merged: bool
) -> None:
    guided = ClassifierFreeGuidance(denoiser(), lambda given: null, 2.0, merged=merged)
    with pytest.raises(ValueError, match=r"^cond: its structure is .*") as caught:
        guided(torch.ones(2, 3), torch.ones(2), cond)
    message = str(caught.value)
    assert "\n" not in message
    assert "`unconditional` must answer" in message
    assert type(cond).__name__.lower() in message.split("counterpart")[0].lower() or (
        isinstance(cond, Tensor)
    )


@pytest.mark.parametrize(
    ("cond", "null", "error", "message"),
    [
        (torch.ones(2), None, TypeError, "cond: cannot concatenate None and float32.2"),
        (
            {"a": "cat"},
            {"a": "cat"},
            TypeError,
            "cond: .*str 'cat'.*batch-first tensor",
        ),
        ([3], [4], TypeError, "cond: cannot concatenate int 4 and int 3"),
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"cond: .*\[2, 4\].*\[2, 3\]"),
        (torch.ones(2, 3), torch.ones(2), ValueError, "cond: cannot concatenate"),
        (torch.tensor(3), torch.tensor(4), ValueError, "cond: cannot concatenate"),
        (torch.ones(2), torch.tensor(4), ValueError, "cond: cannot concatenate"),
    ],
    ids=["None", "string", "number", "length", "rank", "no batch", "one without batch"],
)
def test_leaves_that_cannot_be_joined_are_named(
    cond: Any, null: Any, error: type[Exception], message: str
) -> None:
    guided = ClassifierFreeGuidance(denoiser(), lambda given: null, 2.0, merged=True)
    with pytest.raises(error, match=f"^{message}") as caught:
        guided(torch.ones(2, 3), torch.ones(2), cond)
    assert "\n" not in str(caught.value)


def test_a_number_is_no_unconditional_class_but_none_may_be_the_networks_own() -> None:
    asked: list[Any] = []

    def plain(x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        asked.append(cond)
        return x_t

    plain.process = VarianceExploding()  # pyright: ignore[reportFunctionMemberAccess]
    given: Any = plain
    x_t, t, cond = torch.ones(2, 3), torch.ones(2), torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"unconditional: it answered with int 10"):
        ClassifierFreeGuidance(given, lambda c: 10, 2.0)(x_t, t, cond)
    assert asked == []
    ClassifierFreeGuidance(given, lambda c: None, 2.0)(x_t, t, cond)
    assert asked == [None, cond]


def test_concatenation_keeps_order_and_type() -> None:
    joined = concatenate_conditions(
        {"labels": torch.tensor([1]), "none": None, "x": (torch.zeros(1, 2),)},
        {"labels": torch.tensor([2]), "none": None, "x": (torch.ones(1, 2),)},
    )
    assert joined["labels"].tolist() == [1, 2]
    assert joined["none"] is None
    assert joined["x"][0].tolist() == [[0, 0], [1, 1]]
    assert concatenate_conditions(None, None) is None
