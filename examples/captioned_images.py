"""Captioned images on their way to latents: found, filtered and cropped."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from dmdkit.data.archives import FolderArchive
from dmdkit.data.tables import Row, read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNSAFE = 0.5
FLAGS = {"true": True, "yes": True, "false": False, "no": False}


class CaptionedImage(NamedTuple):
    """An image that passed the filters so far; `row` is its place among all."""

    row: int
    file: str
    caption: str


class Found(NamedTuple):
    """The images that are left, and how many are not, by reason."""

    images: list[CaptionedImage]
    left_out: Counter[str]


@dataclass(frozen=True)
class Columns:
    """What the columns of the metadata are called."""

    file: str = "file_name"
    """Below SOURCE."""
    caption: str = "caption"
    aesthetic: str = "aesthetic"
    """Read unless --min-aesthetic None."""
    unsafe: str | None = "unsafe"
    """A flag (true, 1), or a probability, unsafe from 0.5. None: no such filter."""
    width: str | None = None
    """Of the original; None: the file is the original."""
    height: str | None = None

    def read(self, *, with_aesthetic: bool) -> list[str]:
        """The columns that the metadata must have."""
        optional = (self.unsafe, self.width, self.height)
        found = [self.file, self.caption, *(name for name in optional if name)]
        return [*found, self.aesthetic] if with_aesthetic else found


def find_images(
    folder: Path,
    metadata: Path | None,
    columns: Columns,
    *,
    min_size: int,
    min_aesthetic: float | None,
) -> Found:
    """Lists the images with a caption that the filters let pass, in order.

    Args:
        folder: The images.
        metadata: A row for each image; None: captions are in .txt files beside images.
        columns: Names of the metadata's columns.
        min_size: Least shorter side in the width and height columns, if there are any.
        min_aesthetic: Least aesthetic score, if not None.

    Raises:
        ValueError: If the metadata is not understood.
    """
    if metadata is None:
        rows: Iterator[tuple[str, str, str]] = _beside(folder)
    else:
        read = columns.read(with_aesthetic=min_aesthetic is not None)
        rows = (
            (
                row.text(columns.file),
                row.text(columns.caption),
                _reason_against(row, columns, min_size, min_aesthetic),
            )
            for row in read_rows(metadata, read)
        )
    found = Found([], Counter())
    for number, (file, caption, reason) in enumerate(rows):
        reason = reason or ("" if caption else "without a caption")
        if reason:
            found.left_out[reason] += 1
        else:
            found.images.append(CaptionedImage(number, file, caption))
    return found


def _beside(folder: Path) -> Iterator[tuple[str, str, str]]:
    names = FolderArchive(folder).names()
    present = set(names)
    for name in names:
        if name.lower().endswith(SUFFIXES):
            text = f"{name.rpartition('.')[0]}.txt"
            content = (folder / text).read_text("utf-8") if text in present else ""
            yield name, content.strip(), ""


def _reason_against(
    row: Row, columns: Columns, min_size: int, min_aesthetic: float | None
) -> str:
    if min_aesthetic is not None:
        score = row.number(columns.aesthetic)
        if score is None or score < min_aesthetic:
            return f"of an aesthetic score below {min_aesthetic}"
    if columns.unsafe is not None and _is_unsafe(row, columns.unsafe):
        return "unsafe"
    for side in (columns.width, columns.height):
        if side is not None and (row.number(side) or 0) < min_size:
            return too_small(min_size)
    return ""


def _is_unsafe(row: Row, column: str) -> bool:
    """Whether a row is flagged; one without an answer is."""
    flag = FLAGS.get(str(row.values[column]).strip().lower())
    if flag is not None:
        return flag
    number = row.number(column)
    return number is None or number >= UNSAFE


def too_small(min_size: int) -> str:
    """What images are that the filter of sizes leaves out."""
    return f"of a shorter side below {min_size}"


class Pixels(Dataset["Tensor | str | None"]):
    """What `read_square` gives for each image; read in workers."""

    def __init__(
        self,
        folder: Path,
        images: Sequence[CaptionedImage],
        *,
        resolution: int,
        min_size: int,
    ) -> None:
        self.folder, self.images = folder, images
        self.resolution, self.min_size = resolution, min_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str | None:
        path = self.folder / self.images[index].file
        return read_square(path, self.resolution, self.min_size)


def read_square(path: Path, resolution: int, min_size: int) -> Tensor | str | None:
    """Reads a file, turned upright, on white, as a square cut from its centre.

    Returns:
        Pixels, uint8 [3, resolution, resolution]; None if the shorter side of the
        image is below `min_size`; what is wrong with the file if it cannot be read.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            if min(image.size) < min_size:
                return None
            if image.mode.startswith(("I", "F")):
                return f"mode {image.mode}, expected 8 bits a channel"
            upright = on_white(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error).partition(" <_io")[0].rstrip(".")
    pixels = np.array(centre_square(upright, resolution))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def on_white(image: Image.Image) -> Image.Image:
    """Makes an image RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the largest square in the centre, by Lanczos' filter."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box)
