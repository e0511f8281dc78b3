"""Renders Noto Color Emoji to the pictures that the emoji example ships.

    python examples/emoji_data.py --font NotoColorEmoji.ttf

Plants, food, animals, faces and vehicles become pictures of 32x32 pixels on white; an
emoji's Unicode name is its prompt. It writes `examples/emoji_sheet.png`, all pictures
row by row, `emoji_names.txt`, a name a line, and a sidecar that says where they come
from. The example reads these three: nobody needs the font. The Debian package
`fonts-noto-color-emoji` has it.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from emoji_common import NAMES_FILE, SHEET_FILE, SIZE, parse
from PIL import Image, ImageDraw, ImageFont

CODE_POINTS = (
    range(0x1F300, 0x1F380),  # weather, plants, food
    range(0x1F400, 0x1F440),  # animals
    range(0x1F600, 0x1F650),  # faces
    range(0x1F680, 0x1F6A5),  # vehicles
    range(0x1F910, 0x1F918),  # faces
    range(0x1F920, 0x1F930),  # faces
    range(0x1F950, 0x1F970),  # food
    range(0x1F970, 0x1F97B),  # faces
    range(0x1F980, 0x1F9AE),  # animals
    range(0x1F9C0, 0x1F9CC),  # food
    range(0x1FAB0, 0x1FAB9),  # animals and plants
    range(0x1FAD0, 0x1FADC),  # food
    range(0x1FAE0, 0x1FAE9),  # faces
)
"""Where Unicode keeps pictures of things; arrows, clocks, letters are elsewhere."""
BITMAP_SIZE = 109
"""The one size that the font's pictures have."""
CANVAS = (136, 128)
COLUMNS = 25


@dataclass(frozen=True)
class Settings:
    """Renders the emoji of a font."""

    font: Path
    """Noto Color Emoji with bitmaps (CBDT), a .ttf file."""
    sheet: Path = SHEET_FILE
    names: Path = NAMES_FILE


def main(settings: Settings) -> None:
    """Renders, lays out, writes."""
    if not settings.font.is_file():
        raise SystemExit(f"--font: there is no file {settings.font}.")
    try:
        font = ImageFont.truetype(
            str(settings.font), BITMAP_SIZE, layout_engine=ImageFont.Layout.BASIC
        )
    except OSError as error:
        raise SystemExit(
            f"--font: {settings.font} is no font with bitmaps of {BITMAP_SIZE} pixels "
            f"({error}); use NotoColorEmoji.ttf."
        ) from error
    rendered = list(render(font))
    if not rendered:
        raise SystemExit(f"--font: {settings.font} holds no colour emoji.")
    names, pictures = zip(*rendered, strict=True)
    save_sheet(np.stack(pictures), settings.sheet)
    settings.names.write_text("".join(f"{name}\n" for name in names))
    about = {
        "what": f"{len(names)} emoji (plants, food, animals, faces, vehicles), {SIZE}x"
        f"{SIZE} pixels on white",
        "font": font.getname()[0],
        "version": font_version(settings.font),
        "licence": "SIL Open Font License 1.1 (the font); Apache-2.0 (the images of "
        "github.com/googlefonts/noto-emoji)",
        "prompts": "Unicode names, lower case",
        "command": "python examples/emoji_data.py --font NotoColorEmoji.ttf",
    }
    settings.sheet.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(
        f"Wrote {len(names)} emoji to {settings.sheet} "
        f"({settings.sheet.stat().st_size / 1e6:.2f} MB)."
    )


def render(font: ImageFont.FreeTypeFont) -> Iterator[tuple[str, np.ndarray]]:
    """Gives names and pictures, uint8 [32, 32, 3], of what the font has."""
    for code_point in chain(*CODE_POINTS):
        name = unicodedata.name(chr(code_point), "").lower()
        if not name:
            continue
        picture = Image.new("RGBA", CANVAS, (0, 0, 0, 0))
        ImageDraw.Draw(picture).text(
            (0, 0), chr(code_point), font=font, embedded_color=True
        )
        pixels = np.asarray(picture)
        is_blank = pixels[..., 3].max() == 0 or pixels[..., :3].std() < 1
        if is_blank:
            continue
        white = Image.new("RGBA", CANVAS, (255, 255, 255, 255))
        white.alpha_composite(picture)
        small = white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        yield name, np.asarray(small)


def save_sheet(pictures: np.ndarray, path: Path) -> None:
    """Lays pictures, uint8 [n, 32, 32, 3], out row by row in one PNG."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet[: len(pictures)] = pictures
    sheet = sheet.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2)
    Image.fromarray(sheet.reshape(rows * SIZE, COLUMNS * SIZE, 3)).save(
        path, optimize=True
    )


def font_version(path: Path) -> str:
    """What the font's table of names says (record 5 of an OpenType font)."""
    data = path.read_bytes()
    tables = int.from_bytes(data[4:6])
    for i in range(tables):
        entry = data[12 + 16 * i : 28 + 16 * i]
        if entry[:4] == b"name":
            start = int.from_bytes(entry[8:12])
            return _name_record(data[start : start + int.from_bytes(entry[12:16])], 5)
    return "unknown"


def _name_record(table: bytes, wanted: int) -> str:
    count, strings = int.from_bytes(table[2:4]), int.from_bytes(table[4:6])
    for i in range(count):
        record = table[6 + 12 * i : 18 + 12 * i]
        platform, name_id = int.from_bytes(record[:2]), int.from_bytes(record[6:8])
        if name_id == wanted:
            length, offset = (int.from_bytes(record[k : k + 2]) for k in (8, 10))
            raw = table[strings + offset :][:length]
            return raw.decode("latin-1" if platform == 1 else "utf-16-be")
    return "unknown"


if __name__ == "__main__":
    main(parse(Settings))
