"""A picture of pictures: a column each with a title, a row each with a label."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

GAP = 8
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def labelled_grid(
    columns: Sequence[Tensor], titles: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """Lays columns of pictures out side by side, pixel by pixel as they are.

    Args:
        columns: Pictures, uint8 [rows, 3, h, w], all of one size.
        titles: One for each column; broken between words and at line ends.
        labels: One for each row, to its left.

    Returns:
        The picture. The pictures of row r begin at one height, those of a column at one
        distance from the left; text is never cut, it makes rows higher.
    """
    height, width = columns[0].shape[-2:]
    font = ImageFont.truetype(FONT, max(11, width // 28))
    cell, margin = max(width, 80), max(width // 2, 160)
    headings = [wrap(title, font, cell) for title in titles]
    captions = [wrap(label, font, margin) for label in labels]
    top = max(text_height(heading, font) for heading in headings) + 2 * GAP
    rows = [max(height, text_height(caption, font)) + GAP for caption in captions]
    size = margin + 2 * GAP + len(columns) * (cell + GAP), top + sum(rows)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, (column, heading) in enumerate(zip(columns, headings, strict=True)):
        left, y = margin + 2 * GAP + i * (cell + GAP), top
        draw.multiline_text((left, GAP), heading, "black", font)
        for image, row in zip(column, rows, strict=True):
            picture.paste(to_pil_image(image), (left, y))
            y += row
    y = top
    for caption, row in zip(captions, rows, strict=True):
        draw.multiline_text((GAP, y), caption, "black", font)
        y += row
    return picture


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Breaks text into lines of at most so many pixels, words only if they must."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width:
                fits = max(fitting(line, font, width), 1)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return "\n".join(lines)


def fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many letters of a word fit."""
    return max(
        (n for n in range(len(word)) if font.getlength(word[:n]) <= width), default=0
    )


def text_height(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Height of lines of text in pixels."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(measure.multiline_textbbox((0, 0), text, font)[3]) + 1
