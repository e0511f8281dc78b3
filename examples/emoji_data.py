"""Renders Noto Color Emoji to the pictures that the emoji example ships.

    python examples/emoji_data.py --font NotoColorEmoji.ttf

Every emoji of one code point becomes a picture of 32x32 pixels on white; its Unicode
name is its prompt. It writes `examples/emoji_sheet.png`, all pictures row by row,
`emoji_names.txt`, a name a line, and a sidecar that says where they come from. The
example reads these three: nobody needs the font. The Debian package
`fonts-noto-color-emoji` has it.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emoji_common import NAMES_FILE, SHEET_FILE, SIZE, parse
from PIL import Image, ImageDraw, ImageFont

CODE_POINTS = range(0x2190, 0x1FB00)
"""Symbols, dingbats and pictographs; before them there are letters and digits."""
BITMAP_SIZE = 109
"""The one size that the font's pictures have."""
CANVAS = (136, 128)
NO_PICTURES = (
    "regional indicator",  # letters
    "unified ideograph",  # characters; the names are hexadecimal numbers
    "emoji modifier",  # skin tones and hair: parts of other emoji
    "emoji component",
)
LONGEST_NAME = 55
"""Bytes; one name has 78 and would only make the tables wide."""
COLUMNS = 42


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
        "what": f"{len(names)} emoji of one code point, {SIZE}x{SIZE} pixels on white",
        "font": font.getname()[0],
        "version": font_version(settings.font),
        "licence": "SIL Open Font License 1.1 (the font); Apache-2.0 (the images of "
        "github.com/googlefonts/noto-emoji)",
        "prompts": "Unicode names, lower case",
        "left_out": [*NO_PICTURES, f"names of more than {LONGEST_NAME} bytes"],
        "command": "python examples/emoji_data.py --font NotoColorEmoji.ttf",
    }
    settings.sheet.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(
        f"Wrote {len(names)} emoji to {settings.sheet} "
        f"({settings.sheet.stat().st_size / 1e6:.2f} MB)."
    )


def render(font: ImageFont.FreeTypeFont) -> Iterator[tuple[str, np.ndarray]]:
    """Gives names and pictures, uint8 [32, 32, 3], of what the font has."""
    for code_point in CODE_POINTS:
        name = unicodedata.name(chr(code_point), "").lower()
        if not name or len(name.encode()) > LONGEST_NAME:
            continue
        if any(part in name for part in NO_PICTURES):
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
