"""Images that are there already: folders and .npz files, for `evaluate.py`."""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB"}


class ImageSource(ABC):
    """A set of images in an order, each of which can be had again and again."""

    option = "images"
    """The option that it comes from."""
    title: str
    count: int
    labels: list[int] | None = None
    prompts: Sequence[str] | None = None
    images_per_prompt = 1
    """Image i is of prompt i // this, rounded down."""

    @abstractmethod
    def images(self, batch: range) -> Tensor | list[Tensor]:
        """Images of 256 levels: a batch, or single ones of any sizes."""

    def prompts_of(self, batch: range) -> list[str]:
        """The prompt of each image."""
        assert self.prompts is not None
        return [self.prompts[i // self.images_per_prompt] for i in batch]

    def name_of(self, index: int) -> str:
        """What an image is called in errors."""
        return f"image {index}"


class DrawnImages(ImageSource):
    """Images that a model draws, each from its own seed."""

    def __init__(
        self, draw: Callable[[range], Tensor], count: int, title: str, option: str
    ) -> None:
        self.draw, self.count, self.title, self.option = draw, count, title, option

    def images(self, batch: range) -> Tensor:
        """Draws a batch, uint8 [b, c, h, w]."""
        return self.draw(batch)


class ArrayImages(ImageSource):
    """Images in an array, uint8 [n, c, h, w]."""

    def __init__(self, pixels: Tensor, title: str) -> None:
        self.pixels, self.count, self.title = pixels, len(pixels), title

    def images(self, batch: range) -> Tensor:
        """Gives a batch."""
        return self.pixels[batch.start : batch.stop]


class FolderImages(ImageSource):
    """Image files of a folder and those below it, in the order of their numbers.

    Args:
        folder: The folder.
        option: What messages call it.
        channels: 3: RGB, 1: grey.
        real: Whether they are real images, which may be of any sizes, and grey among
            coloured ones, as in COCO.
    """

    def __init__(
        self, folder: Path, option: str, *, channels: int = 3, real: bool = False
    ) -> None:
        self.folder, self.option, self.title = folder, option, str(folder)
        self.channels, self.real = channels, real
        found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        visible = (p for p in found if not _hidden(p.relative_to(folder)))
        self.files = sorted(visible, key=_by_number)
        self.count = len(self.files)
        if not self.files:
            raise ValueError(f"{folder} holds no PNG or JPEG file.")
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Looks at the heads of all files, so that none surprises later."""
        kinds: Counter[tuple[str, tuple[int, int]]] = Counter()
        bar = tqdm(self.files, desc=f"looking at --{self.option}", leave=False)
        for path in bar:
            with _opened(path) as image:
                self._require_mode(path, image.mode)
                kinds[image.mode, image.size] += 1
        if len(kinds) > 1 and not self.real:
            (first, most), *_, (last, number) = kinds.most_common()
            raise ValueError(
                f"{self.folder} holds {most} images of {_kind(first)} and {number} of "
                f"{_kind(last)}, expected all alike."
            )
        self.listing = {
            "files": [p.relative_to(self.folder).as_posix() for p in self.files],
            "sizes": [p.stat().st_size for p in self.files],
        }

    def _require_mode(self, path: Path, mode: str) -> None:
        taken = ("L", "RGB") if self.real else (MODES[self.channels],)
        if mode not in taken:
            raise ValueError(
                f"{path} is of mode {mode}, expected {' or '.join(taken)} of 8 bits."
            )

    def images(self, batch: range) -> Tensor | list[Tensor]:
        """Reads a batch: single images if they are real, else a tensor."""
        read = [self._read(self.files[i]) for i in batch]
        return read if self.real else torch.stack(read)

    def _read(self, path: Path) -> Tensor:
        with _opened(path) as image:
            try:
                pixels = np.array(image.convert(MODES[self.channels]))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{path} is damaged: {error}.") from error
        pixels = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy())

    def name_of(self, index: int) -> str:
        """Its path."""
        return str(self.files[index])

    def read_labels(self) -> None:
        """Reads labels.txt, as sample.py writes it, if there is one."""
        file = self.folder / "labels.txt"
        if file.is_file():
            words = file.read_text().split()
            if not all(word.isdigit() for word in words):
                raise ValueError(f"{file} holds more than numbers of classes.")
            self.labels = [int(word) for word in words]

    def read_prompts(self) -> None:
        """Reads prompts.jsonl, as sample.py writes it, if there is one."""
        file = self.folder / "prompts.jsonl"
        if not file.is_file():
            return
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        try:
            prompts = {row["file"]: row["prompt"] for row in rows}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not one of sample.py: no {error}.") from error
        names = self.listing["files"]
        for missing, what in (
            (sorted(prompts.keys() - set(names)), "no image for the prompt of"),
            (sorted(set(names) - prompts.keys()), "no prompt for"),
        ):
            if missing:
                raise ValueError(
                    f"{self.folder} has {what} {missing[0]} and "
                    f"{len(missing) - 1} others."
                )
        self.prompts = [prompts[name] for name in names]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _by_number(path: Path) -> list[Any]:
    """2.png before 10.png."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.as_posix())]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=("PNG", "JPEG"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no PNG or JPEG image, or damaged.") from error


def _kind(kind: tuple[str, tuple[int, int]]) -> str:
    mode, (width, height) = kind
    return f"{mode} {width}x{height}"


def read_array(path: Path, *, channels: int) -> ArrayImages:
    """Reads images, and perhaps their labels, from an .npz file.

    Raises:
        ValueError: If there are none, or they are of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = {key: file[key] for key in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}.") from error
    pixels = names.get("images", names.get("arr_0"))
    if pixels is None:
        raise ValueError(f"{path} holds {list(names)}, expected images or arr_0.")
    kind = f"{pixels.dtype}{list(pixels.shape)}"
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
        raise ValueError(
            f"{path} holds {kind}, expected uint8 [n, h, w, {channels}] in 0 ... 255."
        )
    if pixels.shape[-1] == channels:
        pixels = pixels.transpose(0, 3, 1, 2)
    elif pixels.shape[1] != channels:
        raise ValueError(f"{path} holds {kind}, expected {channels} channels.")
    source = ArrayImages(torch.from_numpy(pixels.copy()), str(path))
    labels = names.get("labels", names.get("arr_1"))
    if labels is not None and labels.size:
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{path} has labels {labels.dtype}{list(labels.shape)}, expected "
                "whole numbers [n]."
            )
        source.labels = labels.tolist()
    return source


def open_images(path: Path, *, channels: int) -> ImageSource:
    """Opens a folder or an .npz file of images, with labels and prompts beside them.

    Raises:
        ValueError: If there is neither, or its images are of another kind.
    """
    if path.suffix == ".npz":
        source: ImageSource = read_array(path, channels=channels)
    elif path.is_dir():
        source = FolderImages(path, "images", channels=channels)
        source.read_labels()
        source.read_prompts()
    else:
        raise ValueError(f"{path} is no folder and no .npz file.")
    if source.labels is not None and len(source.labels) != source.count:
        raise ValueError(
            f"{path} has {len(source.labels)} labels for {source.count} images."
        )
    return source
