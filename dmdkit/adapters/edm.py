"""NVIDIA's EDM networks of images: from a file to a denoiser.

Nothing in a file is executed. The weights that NVIDIA released are under CC BY-NC-SA
4.0, and what is distilled from them inherits these terms.
"""

import hashlib
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from dmdkit.adapters.diffusers import FeaturePlace, UNetNetwork
from dmdkit.adapters.edm_pickle import EDMCheckpoint as EDMCheckpoint
from dmdkit.adapters.edm_pickle import EDMSettings as EDMSettings
from dmdkit.adapters.edm_pickle import read_edm_pickle as read_edm_pickle
from dmdkit.adapters.edm_unet import PREFIX, adm_config, without_prefix
from dmdkit.adapters.edm_unet import edm_to_unet as edm_to_unet
from dmdkit.adapters.edm_unet import edm_unet_config as edm_unet_config
from dmdkit.adapters.weight_files import read_state_dict
from dmdkit.diffusion import KarrasPreconditioning, ScoreEstimator, VarianceExploding

_STATE_DICTS = (".pth", ".pt", ".bin")


def read_edm(path: str | Path, *, sha256: str | None = None) -> EDMCheckpoint:
    """Reads an EDM network with ADM architecture from a file, executing nothing in it.

    Args:
        path: NVIDIA's pickle (`.pkl`), or a state dict by NVIDIA's names, with or
            without the prefix `model.`: `.safetensors`, or `.pth`, `.pt`, `.bin` (the
            format in which official DMD2's ImageNet student was released).
        sha256: The file's checksum in hexadecimal, to be compared before it is read.

    Returns:
        The weights and settings. Of a state dict these are derived from its shapes, and
        `sigma_data` is 0.5, which is EDM's value for every data set.

    Raises:
        ValueError: If there is no such file, its suffix is unknown, its checksum is
            another, it is damaged, or holds something else.

    Examples:
        >>> from dmdkit.adapters.edm import edm_denoiser, edm_to_unet, read_edm
        >>> def teacher(path):
        ...     state, settings = read_edm(path)
        ...     return edm_denoiser(edm_to_unet(state), settings.sigma_data)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".pkl", ".safetensors", *_STATE_DICTS):
        raise ValueError(
            f"path: {path} has the suffix {suffix!r}, expected .pkl, .safetensors, "
            f"{', '.join(_STATE_DICTS)}."
        )
    if sha256 is not None and (found := file_sha256(path)) != sha256.strip().lower():
        raise ValueError(
            f"sha256: the checksum of {path} is {found}, expected {sha256}; the file "
            "is damaged or another one."
        )
    if suffix == ".pkl":
        checkpoint = read_edm_pickle(path)
        derived = _settings(checkpoint.state, checkpoint.settings.sigma_data)
        if derived != checkpoint.settings:
            raise ValueError(
                f"path: {path} says {checkpoint.settings}, its weights {derived}."
            )
        return checkpoint
    state = read_state_dict(path, "path")
    try:
        settings = _settings(state)
    except ValueError as error:
        raise ValueError(f"path: {path} was refused: {error}") from error
    return EDMCheckpoint(
        {PREFIX + name: tensor for name, tensor in without_prefix(state).items()},
        settings,
    )


def file_sha256(path: str | Path) -> str:
    """The checksum of a file.

    Args:
        path: The file.

    Returns:
        Its SHA-256 in hexadecimal, 64 digits.

    Raises:
        ValueError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def edm_denoiser(
    unet: UNet2DModel,
    sigma_data: float | int = 0.5,
    features: FeaturePlace = "encoder",
) -> ScoreEstimator:
    """An EDM network as a denoiser: time is sigma, the condition a batch of labels.

    Source: Karras et al. 2022 (arXiv 2206.00364), Table 1, last column.

    Args:
        unet: The UNet, as `edm_to_unet` or `imagenet64_unet` gives it.
        sigma_data: The standard deviation of the data, > 0.
        features: Where features are read: "encoder", before the middle block, as
            official DMD2 does on ImageNet-64, or "mid", after it.

    Returns:
        The denoiser, which holds `unet` itself.
    """
    return ScoreEstimator(
        UNetNetwork(unet, features),
        VarianceExploding(),
        KarrasPreconditioning(sigma_data),
    )


def imagenet64_unet() -> UNet2DModel:
    """EDM's network of ImageNet-64, 295,899,267 parameters, with random weights.

    Source: Karras et al. 2022 (arXiv 2206.00364), Table 8, and section F of DMD2.

    Returns:
        The UNet in fp32, of 64x64 images with 3 channels and 1000 classes.
    """
    return UNet2DModel(
        **adm_config(
            resolution=64,
            channels=3,
            widths=(192, 384, 576, 768),
            blocks=3,
            attends=(False, True, True, True),
            classes=1000,
        )
    )


def _settings(state: dict[str, Tensor], sigma_data: float = 0.5) -> EDMSettings:
    config = edm_unet_config(state)
    return EDMSettings(
        resolution=config["sample_size"],
        channels=config["in_channels"],
        classes=config["num_class_embeds"] or 0,
        sigma_data=sigma_data,
    )
