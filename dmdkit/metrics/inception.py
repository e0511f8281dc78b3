"""The Inception network of FID, of 2015-12-05."""

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdkit._checked import checked
from dmdkit.extras import require_extra
from dmdkit.metrics.features import (
    Coloured,
    Features,
    FrozenNetwork,
    require_levels,
)
from dmdkit.metrics.weights import find_weights, read_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    f"{INCEPTION_FILE}"
)


class InceptionFeatures(FrozenNetwork):
    """The 2,048 pooled features of Inception-v3 of 2015-12-05, those of FID.

    Images of 256 levels and of any size are resized to 299 inside, as TensorFlow 1 did:
    bilinear, without antialiasing. That is EDM's protocol. Floats in [0, 255] must be
    of 299 pixels and are taken as they are, after `clean_resize`. That is clean-fid's.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, such
            tensors as `.safetensors`, or NVIDIA's TorchScript file
            `inception-2015-12-05.pt`, which clean-fid reads. A TorchScript file is a
            program: run only one that you trust. If None, `torch.hub` fetches
            torch-fidelity's file, or finds it in its cache.
        checksum: The SHA-256 that the file must have, or its first digits.

    Attributes:
        name: The network and the SHA-256 of its file.
        checksum: The whole SHA-256.

    Raises:
        ImportError: If torch-fidelity is missing.
        ValueError: If the file is missing, damaged or another.

    Note:
        Both files are conversions of one TensorFlow graph, and should agree to
        rounding; the project's tests, which have neither, do not show it. Their names
        differ, so that statistics of one are refused beside those of the other.
        EDM's `.pkl` of the network holds code in a pickle, and is not read.
    """

    dim: int = 2048

    def __init__(
        self, weights: str | Path | None = None, *, checksum: str | None = None
    ) -> None:
        super().__init__()
        file = find_weights(
            weights,
            checksum,
            source=f"{INCEPTION_FILE} from {INCEPTION_URL}",
            fetch=_hub_inception,
        )
        self.name = f"inception-2015-12-05 ({file.label})"
        self.checksum = file.checksum
        self._scripted = _is_torchscript(file.path)
        self.network: Any = (
            _load_torchscript(file.path)
            if self._scripted
            else _fidelity_inception(file.path)
        )
        self.requires_grad_(False).eval()

    @torch.no_grad()
    @checked
    def forward(self, images: Coloured) -> Features:
        """Gives the features, fp32 [b, 2048], on the network's device.

        Args:
            images: uint8 [b, 3, h, w]; or floats in [0, 255], [b, 3, 299, 299].

        Returns:
            The features.

        Raises:
            ValueError: If floats are of another size or outside [0, 255].
            TypeError: If there are not three channels.
        """
        images = images.to(self.device)
        if images.is_floating_point():
            require_levels(images, 299)
            images = images.float()
            if self._scripted:
                return self._pooled(self.network.layers((images - 128) / 128))
        elif self._scripted:
            return self._pooled(self.network(images, return_features=True))
        else:
            from torch_fidelity.interpolate_compat_tensorflow import (
                interpolate_bilinear_2d_like_tensorflow1x,
            )

            images = interpolate_bilinear_2d_like_tensorflow1x(
                images.float(), size=(299, 299), align_corners=False
            )
        return self._pooled(self.network((images - 128) / 128))

    def _pooled(self, features: Tensor) -> Tensor:
        return features.reshape(-1, self.dim).float()


def _hub_inception() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), "6726825d")
    return path


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torchscript(path: Path) -> Any:
    with warnings.catch_warnings():
        # TorchScript is the form in which NVIDIA publishes the network.
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        return torch.jit.load(path, map_location="cpu")


def _fidelity_inception(path: Path) -> nn.Module:
    """torch-fidelity's network up to its pool, from normalised images of 299."""
    require_extra("eval", "torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import (
        FeatureExtractorInceptionV3,
    )

    # The network unpickles what it is given without restraint, so that it is given
    # tensors alone.
    state = io.BytesIO()
    torch.save(read_tensors(path), state)
    state.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=state
        )
    except RuntimeError as error:
        raise ValueError(
            f"weights: {path} holds other tensors than Inception's."
        ) from error
    # Its own forward takes images of 256 levels only. Its parts stand in the order in
    # which it calls them; the last one, `fc`, comes after the pool.
    return nn.Sequential(*list(network.children())[:-1])
