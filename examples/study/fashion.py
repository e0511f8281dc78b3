"""Fashion-MNIST at 16x16 pixels: the harder data of the study, its networks and files.

The images come from Debian's package `dataset-fashion-mnist` where it is installed,
else torchvision downloads them to `runs/data`.
"""

import gzip
from pathlib import Path

import torch
from digits_common import load_weights
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dmdkit import KarrasPreconditioning, ScoreEstimator, VarianceExploding
from dmdkit.adapters.diffusers import UNetNetwork

HERE = Path(__file__).parent
TEACHER_FILE = HERE / "fashion_teacher.safetensors"
CLASSIFIER_FILE = HERE / "fashion_classifier.safetensors"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DOWNLOADS = Path("runs/data")

CLASSES = 10
NULL_CLASS = 10
SIZE = 16
FEATURES = 64
SIGMA_DATA = 0.64
"""About the standard deviation of the training images (0.6435)."""

UNET_CONFIG = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": CLASSES + 1,  # the last one is the null class
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "attn_norm_num_groups": 16,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}


def load_images(train: bool) -> tuple[Tensor, Tensor]:
    """Gives the images in [-1, 1], [n, 1, 16, 16], and their classes, [n]."""
    part = "train" if train else "t10k"
    if DEBIAN.is_dir():
        pixels = _idx(DEBIAN / f"{part}-images-idx3-ubyte.gz", header=16)
        labels = _idx(DEBIAN / f"{part}-labels-idx1-ubyte.gz", header=8)
        pixels = pixels.reshape(-1, 28, 28)
    else:
        from torchvision.datasets import FashionMNIST

        try:
            downloaded = FashionMNIST(DOWNLOADS, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(
                "Fashion-MNIST: neither Debian's package dataset-fashion-mnist is "
                f"installed nor can it be downloaded ({error})."
            ) from error
        pixels, labels = downloaded.data, downloaded.targets
    images = interpolate(
        pixels[:, None].float(), size=SIZE, mode="bilinear", antialias=True
    )
    return images / 127.5 - 1, labels.long()


def _idx(path: Path, header: int) -> Tensor:
    """The bytes of a gzipped IDX file after its header."""
    content = bytearray(gzip.decompress(path.read_bytes())[header:])
    return torch.frombuffer(content, dtype=torch.uint8)


def build_denoiser(dropout: float = 0.0) -> ScoreEstimator:
    """An EDM denoiser with fresh weights."""
    from diffusers import UNet2DModel

    network = UNetNetwork(UNet2DModel(**UNET_CONFIG, dropout=dropout))
    return ScoreEstimator(
        network, VarianceExploding(), KarrasPreconditioning(SIGMA_DATA)
    )


def load_teacher() -> ScoreEstimator:
    """The shipped teacher, frozen."""
    teacher = build_denoiser()
    load_weights(teacher.network, TEACHER_FILE)
    return teacher.requires_grad_(False).eval()


class Classifier(nn.Module):
    """A small convolutional network; its features measure distances of samples."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, 32, 1),
            *block(32, 64, 2),
            *block(64, 64, 1),
            *block(64, 64, 2),
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
