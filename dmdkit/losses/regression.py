r"""The regression loss on noise-image pairs of the teacher (DMD2, Eq. 3).

DMD needs it throughout; DMD2 keeps it only to warm up the one-step SDXL student
(section F.4).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from dmdkit._checked import checked
from dmdkit.losses.common import (
    Distance,
    Metrics,
    finite_samples,
    per_sample_mean,
    require_gradient,
)
from dmdkit.types import Flags, Latent, PerSample, Scalar


def squared_distance(a: Latent, b: Latent) -> PerSample:
    """The mean squared difference of each sample, [b].

    Args:
        a: Samples, [b, ...].
        b: Other samples of the same shape.

    Returns:
        One distance a sample.
    """
    return per_sample_mean((a - b).square())


@dataclass(frozen=True)
class HuberDistance:
    """Quadratic for small differences, linear for large ones; the mean of a sample.

    Attributes:
        delta: Where one becomes the other, > 0.
    """

    delta: float | int = 1.0

    def __post_init__(self) -> None:
        """Checks the threshold."""
        if not self.delta > 0:
            raise ValueError(f"delta: got {self.delta}, expected > 0.")

    def __call__(self, a: Latent, b: Latent) -> PerSample:
        """Gives the distances.

        Args:
            a: Samples, [b, ...].
            b: Other samples of the same shape.

        Returns:
            One distance a sample, [b].
        """
        return per_sample_mean(
            huber_loss(a, b, reduction="none", delta=float(self.delta))
        )


@dataclass(frozen=True)
class FeatureDistance:
    """The mean squared difference of a network's features.

    Attributes:
        features: A network or function from samples to features, or to a sequence of
            them; its own gradients should be off.
    """

    features: Callable[[Tensor], Any]

    def __call__(self, a: Latent, b: Latent) -> PerSample:
        """Gives one distance a sample, [b], summed over the features given."""
        of_a, of_b = self.features(a), self.features(b)
        if isinstance(of_a, Tensor):
            of_a, of_b = (of_a,), (of_b,)
        distances = [squared_distance(u, v) for u, v in zip(of_a, of_b, strict=True)]
        return torch.stack(distances).sum(dim=0)


class LPIPSDistance(nn.Module):
    """LPIPS of images in [-1, 1], through the lpips package.

    Args:
        backbone: "vgg", "alex" or "squeeze".
        weights: A file with the state dict of the backbone's `features`, as torchvision
            publishes it (`.pth` or `.safetensors`). If None, torchvision loads its own,
            which needs its cache or the network. The linear heads ship with lpips.

    Raises:
        ValueError: If the backbone is unknown, or the file is missing or fits another.

    Note:
        Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1. Official DMD2 takes
        the piq package's LPIPS on whole decoded images for the SDXL warm-up.
    """

    def __init__(
        self, backbone: str = "vgg", weights: str | Path | None = None
    ) -> None:
        super().__init__()
        known = ("vgg", "alex", "squeeze")
        if backbone not in known:
            raise ValueError(f"backbone: got {backbone!r}, expected one of {known}.")
        import lpips

        with warnings.catch_warnings():
            # lpips calls torchvision's models in the way of torchvision 0.12.
            warnings.filterwarnings("ignore", module="torchvision.models._utils")
            self.lpips = lpips.LPIPS(
                net=backbone,
                verbose=False,
                pnet_rand=weights is not None,
                pretrained=True,
                eval_mode=True,
            )
        if weights is not None:
            self._load_backbone(Path(weights))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPSDistance":
        """Stays in evaluation mode: the heads' dropout would make the distance random.

        Args:
            mode: Not looked at.

        Returns:
            The module.
        """
        del mode
        return super().train(False)

    if TYPE_CHECKING:

        def __call__(self, a: Latent, b: Latent) -> PerSample:
            """The signature of `forward`, which `nn.Module` hides."""
            ...

    def forward(self, a: Latent, b: Latent) -> PerSample:
        """Gives one distance a sample, [b].

        Args:
            a: Images in [-1, 1], [b, 3, h, w].
            b: Other images of the same shape.

        Returns:
            The distances; gradients flow to both arguments.
        """
        return self.lpips(a, b).reshape(-1)

    def _load_backbone(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"weights: there is no file {path}.")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        # torchvision numbers the layers of `features`; lpips keeps the numbers, in
        # slices: features.17.weight is slice4.17.weight.
        named = {key.removeprefix("features."): value for key, value in state.items()}
        backbone: nn.Module = self.lpips.net
        own = {key: key.partition(".")[2] for key in backbone.state_dict()}
        if any(
            name not in named or named[name].shape != backbone.state_dict()[key].shape
            for key, name in own.items()
        ):
            raise ValueError(
                f"weights: {path} is not the state dict of this backbone's features."
            )
        backbone.load_state_dict({key: named[name] for key, name in own.items()})


class RegressionOutput(NamedTuple):
    """The result of a regression loss; all but `loss` is detached.

    Attributes:
        loss: The mean distance.
        per_sample: The distances, [b].
        finite: Which samples, targets and distances are finite, bool [b].
        metrics: Scalars by name: `nonfinite` (number of samples).
    """

    loss: Scalar
    per_sample: PerSample
    finite: Flags
    metrics: Metrics


@dataclass(frozen=True)
class RegressionLoss:
    """The distance of a student's samples to the teacher's from the same noise.

    Attributes:
        distance: A distance with one number a sample: `squared_distance`,
            `HuberDistance`, `FeatureDistance`, `LPIPSDistance`, or your own.
    """

    distance: Distance = squared_distance

    @checked
    def __call__(self, x: Latent, target: Latent) -> RegressionOutput:
        """Gives the mean distance.

        Args:
            x: The student's samples with a graph, [b, ...].
            target: The teacher's samples from the same noise, [b, ...].

        Returns:
            The loss, flags and metrics.

        Raises:
            ValueError: If a shape is wrong, x carries no gradient, or the distance does
                not answer with one number a sample.
            TypeError: If a dtype is wrong.
        """
        require_gradient("x", x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        distances = self.distance(x.to(dtype), target.detach().to(dtype))
        if distances.shape != x.shape[:1]:
            raise ValueError(
                f"distance: it gave shape {list(distances.shape)} for "
                f"{x.shape[0]} samples, expected one number a sample."
            )
        finite = finite_samples(x, target, distances)
        return RegressionOutput(
            distances.mean(),
            distances.detach(),
            finite,
            {"nonfinite": (~finite).sum()},
        )
