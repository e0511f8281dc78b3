"""The regression loss (DMD2, Eq. 3) and its distances."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_losses import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmdkit import (
    FeatureDistance,
    HuberDistance,
    LPIPSDistance,
    RegressionLoss,
    squared_distance,
)

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SHAPES, st.integers(0, 1000))
@settings(max_examples=25)
def test_squared_distance_is_the_mean_square_of_each_sample(
    shape: list[int], seed: int
) -> None:
    x, target = (
        normal(*shape, seed=seed).requires_grad_(),
        normal(*shape, seed=seed + 1),
    )
    out = RegressionLoss()(x, target)
    expected = [((a - b) ** 2).mean() for a, b in zip(x, target, strict=True)]
    torch.testing.assert_close(out.per_sample, torch.stack(expected).detach())
    torch.testing.assert_close(out.loss, ((x - target) ** 2).mean())
    (gradient,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(gradient, (2 * (x - target) / x.numel()).detach())


@given(st.floats(-5, 5), st.floats(0.1, 3))
@settings(max_examples=25)
def test_huber_is_quadratic_inside_and_linear_outside(
    difference: float, delta: float
) -> None:
    a, b = torch.full((1, 3), difference).double(), torch.zeros(1, 3).double()
    size = abs(a[0, 0].item())
    inside = size**2 / 2
    outside = delta * (size - delta / 2)
    expected = inside if size <= delta else outside
    assert HuberDistance(delta)(a, b).tolist() == pytest.approx([expected])


def test_huber_threshold_must_be_positive() -> None:
    with pytest.raises(ValueError, match="delta: got 0, expected > 0"):
        HuberDistance(0)


def test_feature_distance_of_the_identity_is_the_squared_distance() -> None:
    a, b = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    same = FeatureDistance(lambda x: x)(a, b)
    torch.testing.assert_close(same, squared_distance(a, b))


def test_feature_distance_adds_the_features_given() -> None:
    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x[:, :1] - x[:, 1:2]

    a, b = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 2)
    expected = [(36 + 4) / 2 + 4, 0]
    assert FeatureDistance(features)(a, b).tolist() == expected


def test_gradient_flows_through_features_but_not_to_the_target() -> None:
    network = nn.Linear(3, 2).requires_grad_(False)
    x, target = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    out = RegressionLoss(FeatureDistance(network))(x, target)
    of_x, of_target = torch.autograd.grad(out.loss, (x, target), allow_unused=True)
    assert of_target is None
    expected = (x - target) @ network.weight.T @ network.weight / 2
    torch.testing.assert_close(of_x, expected.detach())


def test_all_but_the_loss_is_detached() -> None:
    out = RegressionLoss()(normal(2, 3).requires_grad_(), normal(2, 3, seed=1))
    assert out.loss.requires_grad
    assert not out.per_sample.requires_grad
    assert not out.metrics["nonfinite"].requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "distance",
    [
        squared_distance,
        HuberDistance(),
        FeatureDistance(lambda x: x.nan_to_num().tanh()),
    ],
)
def test_nonfinite_samples_targets_and_distances_are_flagged(
    distance: Callable[[Tensor, Tensor], Tensor], bad: float
) -> None:
    good, broken = normal(3, 2), normal(3, 2, seed=1)
    broken[1, 0] = bad
    loss = RegressionLoss(distance)
    for x, target in ((good, broken), (broken, good)):
        out = loss(x.clone().requires_grad_(), target)
        assert out.finite.tolist() == [True, False, True]
        assert out.metrics["nonfinite"].item() == 1
    out = RegressionLoss(lambda a, b: (a - b).mean(dim=1) / torch.tensor([1, 1, 0]))(
        good.clone().requires_grad_(), good
    )
    assert out.finite.tolist() == [True, True, False]


def test_a_distance_must_answer_with_one_number_a_sample() -> None:
    x = normal(3, 2).requires_grad_()
    for distance, shape in (
        (lambda a, b: (a - b).abs().mean(), r"\[\]"),
        (lambda a, b: (a - b).abs(), r"\[3, 2\]"),
        (lambda a, b: (a - b).abs().mean(dim=1, keepdim=True), r"\[3, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"distance: it gave shape {shape} for 3"):
            RegressionLoss(distance)(x, x)


def test_bad_input_is_named() -> None:
    x = normal(3, 2)
    with pytest.raises(ValueError, match="x: it carries no gradient"):
        RegressionLoss()(x, x)
    with pytest.raises(ValueError, match=r"`target` is float32\[3, 1\], expected"):
        RegressionLoss()(x.requires_grad_(), x[:, :1].detach())
    with pytest.raises(TypeError, match=r"`target` is int64\[3, 2\], expected"):
        RegressionLoss()(x, x.detach().long())


def backbone(name: str) -> nn.Module:
    """A torchvision model with random weights, drawn again for their spread."""
    import torchvision

    makers = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}
    # Nothing but `features` is wanted, and the classifiers are large.
    with torch.device("meta"):
        model = getattr(torchvision.models, makers[name])(weights=None)
    model = model.features
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else p.numel()
            p.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
    return model


def save(model: nn.Module, path: Path, prefix: str = "") -> Path:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def lpips_with(
    model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> nn.Module:
    """The lpips package's own, which takes `model` for torchvision's trained one."""
    import lpips

    class Trained:
        features = model

    maker = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}[name]
    monkeypatch.setattr(
        f"lpips.pretrained_networks.tv.{maker}", lambda pretrained: Trained
    )
    return lpips.LPIPS(net=name, verbose=False)


@pytest.mark.parametrize(
    ("name", "suffix", "prefix"),
    [
        ("alex", ".pth", "features."),
        ("alex", ".safetensors", ""),
        ("squeeze", ".pth", ""),
        ("squeeze", ".safetensors", "features."),
        pytest.param("vgg", ".pth", "features.", marks=pytest.mark.slow),
        pytest.param("vgg", ".safetensors", "features.", marks=pytest.mark.slow),
    ],
)
def test_lpips_from_a_file_is_the_lpips_package(
    name: str,
    suffix: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = backbone(name)
    path = save(model, tmp_path / f"weights{suffix}", prefix)
    ours = LPIPSDistance(name, path)
    theirs = lpips_with(model, name, monkeypatch)
    a = normal(2, 3, 64, 64).clamp(-1, 1)
    b = normal(2, 3, 64, 64, seed=1).clamp(-1, 1)
    expected = theirs(a, b).flatten()
    assert expected.shape == (2,)
    assert expected.min() > 1e-3
    torch.testing.assert_close(ours(a, b), expected, rtol=0, atol=0)
    # Without a file it takes what torchvision gives.
    torch.testing.assert_close(LPIPSDistance(name)(a, b), expected, rtol=0, atol=0)


def test_lpips_is_a_distance_with_a_gradient(tmp_path: Path) -> None:
    path = save(backbone("squeeze"), tmp_path / "squeeze.pth")
    distance = LPIPSDistance("squeeze", path)
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.lpips.training, "its dropout must be off"
    a, b = normal(2, 3, 32, 32).tanh(), normal(2, 3, 32, 32, seed=1).tanh()
    assert distance(a, a).tolist() == [0, 0]
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a, b)[:1], distance(a[:1], b[:1]))
    x = a.clone().requires_grad_()
    out = RegressionLoss(distance)(x, b)
    torch.testing.assert_close(out.loss, distance(a, b).mean())
    out.loss.backward()
    assert x.grad is not None
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    closer = (x - 1e-2 * x.grad / x.grad.norm()).detach()
    assert distance(closer, b).mean() < distance(a, b).mean()


def test_lpips_names_what_is_wrong_with_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backbone: got 'resnet', expected one of"):
        LPIPSDistance("resnet")
    with pytest.raises(ValueError, match=r"weights: there is no file .*gone\.pth"):
        LPIPSDistance("squeeze", tmp_path / "gone.pth")
    message = r"weights: .* is not the state dict of this backbone's features"
    other = save(backbone("alex"), tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=message):
        LPIPSDistance("squeeze", other)
    model = backbone("squeeze")
    model[0] = nn.Conv2d(3, 63, 3)  # pyright: ignore[reportIndexIssue]
    misshapen = save(model, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=message):
        LPIPSDistance("squeeze", misshapen)
