"""The GAN head (DMD2, section F.1) and the modules that carry it."""

from typing import Any

import pytest
import torch
from helpers_losses import ToyNetwork, normal, toy_estimator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmdkit import (
    DiffusionGANHead,
    FeatureDiscriminator,
    NetworkWithHead,
    VarianceExploding,
    trainable_copy,
)
from dmdkit.types import Discriminator, Want


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("channels", "resolution", "convolutions", "millions"),
    [
        (768, 8, 2, 18.88),  # ImageNet-64
        (1280, 8, 2, 52.4),  # SD1.5
        (1280, 32, 4, 104.9),  # SDXL
    ],
)
def test_head_has_the_official_parameters(
    channels: int, resolution: int, convolutions: int, millions: float
) -> None:
    with torch.device("meta"):
        head = DiffusionGANHead(channels, resolution)
    # 4x4 convolutions with bias, two numbers a channel for group norm, a linear layer.
    each = 4 * 4 * channels * channels + channels + 2 * channels
    exact = convolutions * each + channels + 1
    assert count(head) == exact
    assert exact / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("resolution", "maps"),
    [
        (8, [(8, 8), (4, 4)]),
        (16, [(16, 16), (8, 8), (4, 4)]),
        (32, [(32, 32), (16, 16), (8, 8), (4, 4)]),
    ],
)
def test_official_sizes_go_down_to_4x4_and_then_to_a_vector(
    resolution: int, maps: list[tuple[int, int]]
) -> None:
    head = DiffusionGANHead(64, resolution, groups=8)
    shapes: list[tuple[int, int]] = []
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda module, args: shapes.append(tuple(args[0].shape[2:]))
            )
    assert head(normal(2, 64, resolution, resolution)).shape == (2,)
    assert shapes == [*maps, (1, 1)]
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    strided, last, linear = convolutions[:-2], convolutions[-2], convolutions[-1]
    assert all((c.kernel_size, c.stride) == ((4, 4), (2, 2)) for c in strided)
    assert (last.kernel_size, last.stride) == ((4, 4), (4, 4))
    assert (linear.kernel_size, linear.out_channels) == ((1, 1), 1)
    norms = [m for m in head.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == len(convolutions) - 1
    assert all(norm.num_groups == 8 for norm in norms)
    assert sum(isinstance(m, nn.SiLU) for m in head.modules()) == len(norms)


def groups_of(head: DiffusionGANHead) -> set[int]:
    return {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)}


def test_official_groups_are_32() -> None:
    for channels in (768, 1280):
        with torch.device("meta"):
            assert groups_of(DiffusionGANHead(channels, 8)) == {32}


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 8), (8, 1), (1, 1)])
def test_small_heads_have_fewer_groups(channels: int, groups: int) -> None:
    if channels == 1:
        with pytest.raises(ValueError, match="at least two left"):
            DiffusionGANHead(channels, 8)
        return
    assert groups_of(DiffusionGANHead(channels, 8)) == {groups}


@pytest.mark.parametrize("channels", [8, 64, 256])
def test_a_logit_follows_its_gradient(channels: int) -> None:
    """As it does not where two numbers are normalised to plus and minus one."""
    torch.manual_seed(0)
    head, features = DiffusionGANHead(channels, 4), normal(64, channels, 4, 4)
    features.requires_grad_()
    logits = head(features)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    norms = gradient.flatten(1).norm(dim=1)
    step = 0.1 * gradient / norms.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        change = head(features + step) - logits
    assert (change / (0.1 * norms)).mean() > 0.9
    assert norms.max() < 8 * norms.median()


@pytest.mark.parametrize(
    "resolution",
    [(8, 16), (16, 8), (16, 32), 1, 2, 4, 5, 6, 7, 9, 11, 12, (1, 8), (3, 5), (9, 23)],
)
def test_any_map_gives_one_logit_that_sees_the_whole_of_it(
    resolution: int | tuple[int, int],
) -> None:
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    head = DiffusionGANHead(4, resolution, groups=2)
    features = normal(3, 4, *size).requires_grad_()
    logits = head(features)
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits[1], features)
    assert (gradient[1].abs().sum(dim=0) > 0).all(), "a place that it does not see"
    assert (gradient[[0, 2]] == 0).all(), "samples must not mix"


@given(st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=20)
def test_every_size_works(height: int, width: int) -> None:
    head = DiffusionGANHead(4, (height, width), groups=1)
    assert head(torch.zeros(2, 4, height, width)).shape == (2,)


def test_different_features_give_different_logits() -> None:
    """Also on a 1x1 map, where group norm could normalise everything away."""
    head = DiffusionGANHead(8, 1, groups=4)
    logits = head(normal(5, 8, 1, 1))
    assert len(set(logits.tolist())) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_norm_is_fp32_under_autocast(dtype: torch.dtype) -> None:
    head = DiffusionGANHead(8, 8, groups=2)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                module.bias.fill_(50.0)  # a mean that bf16 statistics would drown in
    seen: list[tuple[nn.GroupNorm, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.GroupNorm)
        seen.append((module, args[0], output))

    for module in head.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(normal(2, 8, 8, 8).to(dtype))
    assert logits.dtype == torch.float32
    assert len(seen) == 2
    for module, given_map, output in seen:
        assert given_map.dtype == torch.bfloat16, "the convolutions are autocast"
        assert output.dtype == torch.float32
        grouped = given_map.double().reshape(2, 2, -1)
        mean, var = grouped.mean(-1, True), grouped.var(-1, correction=0, keepdim=True)
        exact = ((grouped - mean) / (var + module.eps).sqrt()).reshape(output.shape)
        torch.testing.assert_close(output.double(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_float_dtype_are_taken_in_fp32(dtype: torch.dtype) -> None:
    head, features = DiffusionGANHead(8, 2, groups=2), normal(2, 8, 2, 2).to(dtype)
    logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(features.float()))


@pytest.mark.parametrize("size", [4, 8])
def test_memory_format_does_not_matter_under_autocast(size: int) -> None:
    head, features = DiffusionGANHead(16, size, groups=4), normal(2, 16, size, size)
    exact = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            logits = head(features.to(memory_format=memory_format))
            torch.testing.assert_close(logits, exact, atol=0.03, rtol=0)


def test_a_map_of_another_size_is_refused() -> None:
    head = DiffusionGANHead(8, (4, 8), groups=2)
    for shape in ((8, 8, 4), (4, 4, 8), (8, 4, 4)):
        with pytest.raises(ValueError, match=r"features: got .* made for \[8, 4, 8\]"):
            head(torch.zeros(2, *shape))
    with pytest.raises(ValueError, match=r"`features` is float32\[2, 8\], expected"):
        head(torch.zeros(2, 8))
    with pytest.raises(TypeError, match="`features` is int64"):
        head(torch.zeros(2, 8, 4, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("channels", "resolution", "groups", "message"),
    [
        (0, 8, 1, "channels, resolution, groups: got 0, 8, 1"),
        (8, 0, 2, "channels, resolution, groups: got 8, 0, 2"),
        (8, (4, 0), 2, r"channels, resolution, groups: got 8, \(4, 0\), 2"),
        (8, 4, 0, "channels, resolution, groups: got 8, 4, 0"),
        (8, 4, 3, r"groups: 3 must divide channels \(8\)"),
        (32, 4, 32, r"groups: 32 must divide channels \(32\) with at least two"),
    ],
)
def test_impossible_heads_are_refused(
    channels: int, resolution: int | tuple[int, int], groups: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionGANHead(channels, resolution, groups)


def test_network_with_head_gives_what_is_wanted_in_one_pass() -> None:
    calls: list[object] = []
    network, head = ToyNetwork(), DiffusionGANHead(8, 4, groups=2)
    network.register_forward_hook(lambda *_: calls.append(0))
    both = NetworkWithHead(network, head)
    x, t = normal(3, 2, 4, 4), torch.ones(3)
    everything = network(x, t, None, want=("output", "features"))
    output, features = everything.output, everything.features
    calls.clear()
    assert torch.equal(both(x, t, None), output)
    wants: list[tuple[Want, ...]] = [
        ("output",),
        ("features",),
        ("logits",),
        ("output", "logits"),
        ("features", "logits"),
        ("output", "features", "logits"),
    ]
    for want in wants:
        calls.clear()
        given_out = both(x, t, None, want=want)
        assert len(calls) == 1, "one pass"
        expected = {"output": output, "features": features, "logits": head(features)}
        for name, value in expected.items():
            got = getattr(given_out, name)
            assert (got is None) == (name not in want)
            assert got is None or torch.equal(got, value)


def test_logits_alone_leave_out_the_decoder() -> None:
    network = ToyNetwork()
    ran: list[object] = []
    network.decoder.register_forward_hook(lambda *_: ran.append(0))
    both = NetworkWithHead(network, DiffusionGANHead(8, 4, groups=2))
    both(normal(1, 2, 4, 4), torch.ones(1), None, want=("logits",))
    assert not ran


def test_the_papers_discriminator_is_the_critic_with_its_head() -> None:
    head = DiffusionGANHead(8, 4, groups=2)
    teacher = toy_estimator()
    critic = trainable_copy(teacher, head=head)
    assert isinstance(critic, Discriminator)
    x_t, t = normal(3, 2, 4, 4), torch.ones(3)
    torch.testing.assert_close(critic.logits(x_t, t), head(teacher.features(x_t, t)))
    names = {name.split(".")[1] for name, _ in critic.named_parameters()}
    assert names == {"network", "head"}


def test_feature_discriminator_reads_the_features_of_any_origin() -> None:
    teacher = toy_estimator()
    head = DiffusionGANHead(8, 4, groups=2)
    judge = FeatureDiscriminator(teacher.features, head, teacher.process)
    assert isinstance(judge, Discriminator)
    assert judge.process == VarianceExploding()
    x_t, t = normal(3, 2, 4, 4), torch.ones(3)
    assert torch.equal(judge.logits(x_t, t), head(teacher.features(x_t, t)))
    cond = torch.tensor([1.0, 2.0, 3.0])
    own = FeatureDiscriminator(
        lambda x_t, t, cond: x_t.mean(dim=(2, 3)) + t[:, None] * cond[:, None],
        lambda features: features.sum(dim=1),
        VarianceExploding(),
    )
    expected = x_t.mean(dim=(2, 3)).sum(dim=1) + 2 * t * cond
    torch.testing.assert_close(own.logits(x_t, t, cond), expected)


def test_a_head_with_another_number_of_logits_is_refused() -> None:
    judge = FeatureDiscriminator(
        lambda x_t, t, cond: x_t, lambda features: features, VarianceExploding()
    )
    with pytest.raises(ValueError, match=r"head: it gave shape \[3, 2\] for 3 samples"):
        judge.logits(normal(3, 2), torch.ones(3))
