"""`evaluate.py` as its users call it, and tiny networks and images for it."""

import json
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import tyro
from evaluate_settings import Settings
from PIL import Image
from torch import Tensor

from dmdkit.metrics import CallableFeatures


def run(*options: str | Path | int) -> None:
    evaluate.main(tyro.cli(Settings, args=list(map(str, options))))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def refused(match: str, *options: str | Path | int) -> None:
    with pytest.raises(SystemExit, match=match) as error:
        run(*options)
    assert "\n" not in str(error.value)


def corners(x: Tensor) -> Tensor:
    """Six numbers of an image: the colours of two opposite quarters."""
    x = x.float() / 255
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    return torch.cat((x[..., :h, :w].mean((2, 3)), x[..., h:, w:].mean((2, 3))), 1)


TINY = CallableFeatures(corners, "corners", 6)


def save_photos(
    folder: Path, count: int, size: tuple[int, int] | None = None, seed: int = 0
) -> Path:
    """Smooth coloured images, as JPEG of many sizes, or as PNG of one."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        small = generator.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        shape = size or (int(generator.integers(300, 340)), 310)
        image = Image.fromarray(small).resize(shape, Image.Resampling.BICUBIC)
        if size is None and i == 1:
            image = image.convert("L")  # as a few of COCO's are
        image.save(folder / f"{i}.{'jpg' if size is None else 'png'}")
    return folder
