"""Labelled images: EDM's data sets, and trees of class folders.

What is wrong with names and labels shows when a set is opened, what is wrong with
pixels when a file is read. Either way a file is refused, or left out with a warning
that names it; none is trained on in silence, and no mode is converted.
"""

import io
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dmdkit._checked import checked
from dmdkit.data.archives import Archive, open_archive
from dmdkit.data.labels import find_labels, summary

OnBad = Literal["refuse", "skip"]

_MODES = {1: "L", 3: "RGB"}


class BadImageError(ValueError):
    """A file that is no image as the set asks for; the message names it."""


class LabelledImage(NamedTuple):
    """An item of an `ImageDataset`.

    Attributes:
        pixels: uint8 [channels, resolution, resolution].
        label: The class; -1 in a set without labels.
    """

    pixels: Tensor
    label: int


class ImageDataset(Dataset[LabelledImage]):
    """Images and their labels; `open_images` makes it.

    It can be pickled, and read in several processes.

    Args:
        archive: Where the files are read.
        names: The images' names, as the archive knows them.
        labels: One label an image.
        resolution: Height and width; that of the first good image if None.
        channels: 3 for RGB, 1 for grey.
        on_bad: With "refuse", reading a bad image raises. With "skip" it warns and
            gives the next good image in order and its label, so that the length stays
            and an index always means the same.

    Attributes:
        names: The images' names.
        labels: Their labels.
        channels: Their channels.

    Raises:
        ValueError: If there is no image, or, when one is read, if it is bad.
    """

    def __init__(
        self,
        archive: Archive,
        names: Sequence[str],
        labels: Sequence[int],
        *,
        resolution: int | None = None,
        channels: int = 3,
        on_bad: OnBad = "refuse",
    ) -> None:
        if channels not in _MODES:
            raise ValueError(f"channels: got {channels}, expected 3 (RGB) or 1 (grey).")
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution: got {resolution}, expected >= 1.")
        if len(names) != len(labels) or not names:
            raise ValueError(
                f"names, labels: got {len(names)} and {len(labels)}, expected as many, "
                "and at least one."
            )
        self.names, self.labels = tuple(names), tuple(labels)
        self.channels = channels
        self._archive, self._on_bad, self._resolution = archive, on_bad, resolution
        if resolution is None:
            self._resolution = self[0][0].shape[-1]

    @property
    def resolution(self) -> int:
        """Height and width of every image."""
        assert self._resolution is not None
        return self._resolution

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LabelledImage:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 ... {len(self) - 1}.")
        for further in range(len(self)):
            candidate = (index + further) % len(self)
            try:
                pixels = self._read(self.names[candidate])
                return LabelledImage(pixels, self.labels[candidate])
            except BadImageError as error:
                if self._on_bad == "refuse":
                    raise
                warnings.warn(
                    f"{error} It is left out; the next one takes its place.",
                    stacklevel=2,
                )
        raise ValueError(f"path: {self._archive.path} holds no good image.")

    def _read(self, name: str) -> Tensor:
        from PIL.Image import DecompressionBombError

        try:
            return _decode(self._archive.read(name), self.channels, self._resolution)
        except (
            OSError,
            SyntaxError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
            DecompressionBombError,
        ) as error:
            # Pillow names the buffer it could not read: of no use to anyone.
            reason = str(error).partition(" <_io")[0].rstrip(".")
            raise BadImageError(f"{self._archive.path}: {name}: {reason}.") from error


def _decode(data: bytes, channels: int, resolution: int | None) -> Tensor:
    """Decodes a file to uint8 [c, h, w]; raises if it is not what is asked for."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        if image.mode != _MODES[channels]:
            raise ValueError(f"mode {image.mode}, expected {_MODES[channels]}")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{getattr(image, 'n_frames', 1)} frames, expected one")
        size = resolution or image.width
        if image.size != (size, size):
            raise ValueError(
                f"{image.width}x{image.height} pixels, expected {size}x{size}"
            )
        pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


@checked
def open_images(
    path: str | Path,
    *,
    resolution: int | None = None,
    classes: int | None = None,
    channels: int = 3,
    on_bad: OnBad = "refuse",
) -> ImageDataset:
    """Opens a data set of images, a folder or a zip file.

    With a `dataset.json` it is EDM's format: `{"labels": [["00000/img00000000.png",
    6], ...]}`, or `null` for a set without labels. Else, with images in folders, every
    folder is a class, whose label is its place in their alphabetical order. Else it is
    a set without labels. Images are PNG, JPEG and WebP files; other files, and hidden
    ones, are not looked at.

    Args:
        path: The folder or zip file.
        resolution: Height and width that every image must have; that of the first one
            if None.
        classes: How many classes there are. If given, every image must have a label
            below it, and a tree must have as many folders.
        channels: 3 for RGB, 1 for grey.
        on_bad: What to do with a bad file: "refuse" it, or "skip" it with a warning.
            A fault of names or labels is found now, and its file left out of the
            set; an image that cannot be used is found when it is read, and the next
            good one takes its place.

    Returns:
        The set, in alphabetical order of names.

    Raises:
        ValueError: If there is no such set, it is empty, its labels are missing or
            wrong, or an argument is out of range.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         (Path(folder) / name).mkdir()
        ...         Image.new("RGB", (8, 8)).save(Path(folder) / name / "0.png")
        ...     images = open_images(folder, resolution=8, classes=2)
        ...     pixels, label = images[1]
        >>> pixels.shape, label
        (torch.Size([3, 8, 8]), 1)

    Note:
        Source: DMD2's real images for ImageNet-64 are in EDM's format, without
        augmentation.
    """
    if classes is not None and classes < 1:
        raise ValueError(f"classes: got {classes}, expected >= 1 or None.")
    archive = open_archive(path)
    found = find_labels(archive, classes)
    if found.faults:
        text = f"path: faults in {archive.path}: {summary(found.faults)}"
        if on_bad == "refuse":
            raise ValueError(f'{text}. Repair it, or leave them out: on_bad="skip".')
        warnings.warn(f"{text}. They are left out.", stacklevel=3)
    if not found.labels:
        raise ValueError(f"path: {archive.path} holds no image that can be used.")
    return ImageDataset(
        archive,
        tuple(found.labels),
        tuple(found.labels.values()),
        resolution=resolution,
        channels=channels,
        on_bad=on_bad,
    )
