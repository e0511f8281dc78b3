"""What the digits examples share: data, networks, files.

The data are scikit-learn's handwritten digits: 1,797 images of 8x8 pixels and ten
classes, in the package itself. 80 % train teacher, student and classifier; 20 % are
held out.
"""

import json
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmdkit import KarrasPreconditioning, ScoreEstimator, VarianceExploding
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.extras import require_extra

require_extra("train", "tyro", "matplotlib", "sklearn")

SettingsType = TypeVar("SettingsType")
HERE = Path(__file__).parent
TEACHER_FILE = HERE / "digits_teacher.safetensors"
CLASSIFIER_FILE = HERE / "digits_classifier.safetensors"

CLASSES = 10
NULL_CLASS = 10
SHAPE = (1, 8, 8)
FEATURES = 64

UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": CLASSES + 1,  # the last one is the null class
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "attn_norm_num_groups": 16,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}


def parse(settings: type[SettingsType]) -> SettingsType:
    """Reads a settings dataclass from the command line."""
    import tyro

    return tyro.cli(settings)


class Digits(NamedTuple):
    """Images in [-1, 1], [n, 1, 8, 8], and their classes, [n]."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Gives the training set and the held-out set, the same split every time."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, classes = load(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, *SHAPE) / 8 - 1
    labels = torch.from_numpy(classes).long()
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=classes, random_state=0
    )
    return (
        Digits(images[train], labels[train]),
        Digits(images[held_out], labels[held_out]),
    )


def build_denoiser(sigma_data: float, dropout: float = 0.0) -> ScoreEstimator:
    """An EDM denoiser for the digits with fresh weights (0.76 M parameters)."""
    from diffusers import UNet2DModel

    network = UNetNetwork(UNet2DModel(**UNET_CONFIG, dropout=dropout))
    return ScoreEstimator(
        network, VarianceExploding(), KarrasPreconditioning(sigma_data)
    )


def save_weights(module: nn.Module, path: Path, about: dict[str, object]) -> None:
    """Writes weights in fp16, and a sidecar that says where they come from."""
    state = {k: v.detach().half().contiguous() for k, v in module.state_dict().items()}
    save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


def load_weights(module: nn.Module, path: Path) -> dict[str, object]:
    """Reads weights and gives their sidecar."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: train it with the script of that name.")
    module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return json.loads(path.with_suffix(".json").read_text())


def load_sigma_data() -> float:
    """The standard deviation of the training images, as the teacher was trained."""
    return json.loads(TEACHER_FILE.with_suffix(".json").read_text())["sigma_data"]


def load_teacher() -> ScoreEstimator:
    """The shipped teacher, frozen."""
    teacher = build_denoiser(load_sigma_data())
    load_weights(teacher.network, TEACHER_FILE)
    return teacher.requires_grad_(False).eval()


def network_of(denoiser: ScoreEstimator) -> UNetNetwork:
    """The network of a denoiser without a head."""
    network = denoiser.network
    assert isinstance(network, UNetNetwork)
    return network


class Classifier(nn.Module):
    """A small convolutional network; its features measure distances of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
        )
        self.classify = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Features before the last activation, [b, 64]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, [b, 10]."""
        return self.classify(self.features(images).relu())


def load_classifier() -> Classifier:
    """The shipped classifier, frozen."""
    classifier = Classifier()
    load_weights(classifier, CLASSIFIER_FILE)
    return classifier.requires_grad_(False).eval()
