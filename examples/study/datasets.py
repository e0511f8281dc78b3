"""The two data sets of the study, with what each needs: images, teacher, classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import digits_common as digits
import torch
from study import fashion
from torch import Tensor

from dmdkit import ScoreEstimator

Classifier: TypeAlias = digits.Classifier | fashion.Classifier


@dataclass(frozen=True)
class Data:
    """One data set; both have ten classes, and an eleventh label for none of them."""

    name: str
    shape: tuple[int, int, int]
    sigma_data: float
    load: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]
    """Gives training images and labels, held-out images and labels."""
    load_teacher: Callable[[], ScoreEstimator]
    load_classifier: Callable[[], Classifier]
    classes: int = 10
    null_class: int = 10
    features: int = 64

    @cached_property
    def images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `load` gives, read once."""
        return self.load()


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, held_out = digits.load_digits()
    return train.images, train.labels, held_out.images, held_out.labels


def _fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*fashion.load_images(train=True), *fashion.load_images(train=False))


DIGITS = Data(
    "digits",
    digits.SHAPE,
    digits.load_sigma_data(),
    _digits,
    digits.load_teacher,
    digits.load_classifier,
)
FASHION = Data(
    "fashion",
    (1, fashion.SIZE, fashion.SIZE),
    fashion.SIGMA_DATA,
    _fashion,
    fashion.load_teacher,
    fashion.load_classifier,
)
DATA = {data.name: data for data in (DIGITS, FASHION)}


def balanced_labels(data: Data, count: int) -> Tensor:
    """Labels 0 ... 9 over and over, [count]."""
    return torch.arange(count) % data.classes
