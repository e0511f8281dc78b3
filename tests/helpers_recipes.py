"""Small teachers and data sets for the recipes: in folders, as users have them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from digits_common import load_teacher
from PIL import Image

from dmdkit.adapters.edm import edm_denoiser
from dmdkit.adapters.edm_unet import adm_config
from dmdkit.adapters.folders import save_denoiser


def save_digits_teacher(folder: Path) -> Path:
    """The shipped teacher of 8x8 digits, as a folder."""
    save_denoiser(folder, load_teacher(), about={"source": "digits"})
    return folder


def save_adm_teacher(folder: Path) -> Path:
    """ADM in small: 16 pixels, two levels of 128 channels, ten classes."""
    torch.manual_seed(0)
    config = adm_config(
        resolution=16,
        channels=3,
        widths=(128, 128),
        blocks=1,
        attends=(False, True),
        classes=10,
    )
    save_denoiser(folder, edm_denoiser(UNet2DModel(**config)), about={"source": "test"})
    return folder


def save_digit_images(folder: Path, side: int, channels: int, count: int = 60) -> Path:
    """scikit-learn's digits in EDM's format: PNG files and dataset.json."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    labels = []
    for i in range(count):
        name = f"{i // 1000:05d}/img{i:08d}.png"
        image = Image.fromarray((pixels[i].reshape(8, 8) * 15.9).astype(np.uint8))
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        if channels == 3:
            image = image.convert("RGB")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
        labels.append([name, int(classes[i])])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder
