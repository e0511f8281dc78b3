"""Makes the page of a preference study of two models: which image do people prefer?

    python examples/sample.py student --prompt-file prompts.txt --out student-images
    python examples/sample.py teacher --prompt-file prompts.txt --out teacher-images
    python examples/preference_study.py student-images teacher-images study

OUT gets two files. `study.html` is for the raters: one page without a network, with
every pair of images in a random left/right order, that keeps the answers and saves them
to a file. It does not say which model an image is of. `study.json` does, and stays with
the author; `preference_rates.py` makes rates of it and the raters' files.

As in the paper [DMD2, section 5.2 and appendix H] a rater chooses one image for each of
two questions, which is more visually appealing and which better represents the prompt;
there is no tie. The questions are in the words of section 5.2: those of Figure 13 are
in a picture. The paper has one pair for each of 128 prompts, the subset of PartiPrompts
that LADD took, and asks five raters about each pair; they are from Prolific, gave their
consent and were paid 12 dollars an hour. Here all raters see all pairs, so five raters
are five answers a pair, at two or three of them a minute.

`study.html?rater=CODE` fills in a rater's name. Look at all images before others do.
"""

import base64
import hashlib
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from captioned_images import on_white
from PIL import Image
from preference_rates import KEY, STUDY_FORMAT, study_id
from sample_settings import partial_of
from tqdm import tqdm

from dmdkit.data.tables import read_rows

PROMPTS = 128
QUESTIONS = {
    "quality": "Which image is more visually appealing?",
    "alignment": "Which image better represents the text prompt?",
}
TEMPLATE, MARK = Path(__file__).with_suffix(".html"), "{{study}}"
PAGE = "study.html"
LARGEST_SIDE = 16383  # of WebP


@dataclass(frozen=True)
class Settings:
    """Makes the page of a preference study of two models."""

    a: tyro.conf.Positional[Path]
    """Images of one model and their prompts.jsonl, as `sample.py --out` writes them."""
    b: tyro.conf.Positional[Path]
    """Images of the other model for the same prompts, line by line."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    name_a: str | None = None
    """What the rates call the model of A. None: the folder's name."""
    name_b: str | None = None
    seed: int = 0
    """Of the order of the pairs and of their sides."""
    max_side: int = 1024
    """Larger images are shown reduced to this side."""
    quality: int | None = 95
    """Of the WebP images in the page, 1 ... 100; None: without loss, some times as
    large."""

    def check(self) -> None:
        """Refuses what cannot run."""
        if not 1 <= self.max_side <= LARGEST_SIDE:
            raise SystemExit(
                f"--max-side {self.max_side}: expected 1 ... {LARGEST_SIDE}."
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise SystemExit(f"--quality {self.quality}: expected 1 ... 100, or None.")
        a, b = self.names.values()
        if not a or not b or a == b:
            raise SystemExit(
                f"--name-a, --name-b: got {a!r} and {b!r}, expected two names."
            )

    @property
    def names(self) -> dict[str, str]:
        """What the models are called."""
        a, b = self.a.resolve().name, self.b.resolve().name
        return {
            "a": a if self.name_a is None else self.name_a,
            "b": b if self.name_b is None else self.name_b,
        }


class Drawn(NamedTuple):
    """An image of a folder, and what it was drawn from."""

    file: Path
    prompt: str


def read_folder(name: str, folder: Path) -> list[Drawn]:
    """Lists the images of a folder that `sample.py` wrote, in its order."""
    listing = folder / "prompts.jsonl"
    if not listing.is_file():
        raise SystemExit(
            f"{name}: there is no {listing}; name a folder that sample.py --out wrote."
        )
    try:
        drawn = [
            Drawn(folder / row.text("file"), row.text("prompt"))
            for row in read_rows(listing, ("file", "prompt"))
        ]
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from error
    if not drawn:
        raise SystemExit(f"{name}: {listing} lists no images.")
    for number, (file, prompt) in enumerate(drawn, 1):
        if not file.is_file() or not prompt:
            what = f"there is no image {file}" if prompt else "it has no prompt"
            raise SystemExit(f"{name}: {listing}, line {number}: {what}.")
    twice = len(drawn) - len({file for file, _ in drawn})
    if twice:
        raise SystemExit(f"{name}: {listing} lists {twice} images twice.")
    return drawn


def require_same_prompts(a: list[Drawn], b: list[Drawn]) -> None:
    """Refuses folders that cannot be compared line by line."""
    for number, (one, other) in enumerate(zip(a, b, strict=False), 1):
        if one.prompt != other.prompt:
            raise SystemExit(
                f"A, B: prompts.jsonl differs in line {number}: {one.prompt!r} and "
                f"{other.prompt!r}; draw both from the same prompts."
            )
    if len(a) != len(b):
        raise SystemExit(
            f"A, B: {len(a)} and {len(b)} images, expected as many; draw both from the "
            "same prompts."
        )


def order_and_sides(count: int, seed: int) -> list[tuple[int, str]]:
    """In which order pairs are shown, and which model is on the left.

    Each model is on the left in half of the pairs; of an odd number, chance decides
    about the last one.
    """
    rng = random.Random(seed)
    order = list(range(count))
    rng.shuffle(order)
    first = ["a", "b"]
    rng.shuffle(first)
    sides = [first[i % 2] for i in range(count)]
    rng.shuffle(sides)
    return list(zip(order, sides, strict=True))


def to_webp(path: Path, max_side: int, quality: int | None) -> bytes:
    """Encodes an image anew: pixels alone, without what the file says of its origin."""
    try:
        data = io.BytesIO(path.read_bytes())
        with Image.open(data, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            pixels = on_white(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <_io")[0].rstrip(".")
        raise ValueError(f"{path}: {reason}.") from error
    pixels.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    pixels.info.clear()  # such as a colour profile
    encoded = io.BytesIO()
    lossless = quality is None
    # In lossless mode the quality is the effort.
    pixels.save(encoded, "WEBP", lossless=lossless, quality=80 if lossless else quality)
    return encoded.getvalue()


def page_of(study: Mapping[str, Any]) -> str:
    """Puts a study into the template."""
    template = TEMPLATE.read_text("utf-8")
    assert template.count(MARK) == 1
    # A prompt may hold "</script>": in JSON "<" can be written otherwise.
    return template.replace(MARK, json.dumps(study).replace("<", r"\u003c"))


def make(settings: Settings) -> None:
    """Writes page and key, and says what they are for."""
    settings.check()
    partial = partial_of(settings.out)
    a, b = read_folder("A", settings.a), read_folder("B", settings.b)
    require_same_prompts(a, b)
    pairs: list[dict[str, Any]] = []
    shown: list[dict[str, str]] = []
    order = order_and_sides(len(a), settings.seed)
    for place, (index, left) in enumerate(tqdm(order, desc="pairs", unit="pair"), 1):
        files = {"a": a[index].file, "b": b[index].file}
        images = {
            name: to_webp(file, settings.max_side, settings.quality)
            for name, file in files.items()
        }
        pair = {"id": f"{place:04d}", "prompt": a[index].prompt}
        right = "b" if left == "a" else "a"
        shown.append(
            {**pair, "left": data_uri(images[left]), "right": data_uri(images[right])}
        )
        sources = {name: about_file(file) for name, file in files.items()}
        pairs.append({**pair, "left": left, **sources})
    key = {
        "format": STUDY_FORMAT,
        "names": settings.names,
        "seed": settings.seed,
        "images": {"max_side": settings.max_side, "quality": settings.quality},
        "questions": QUESTIONS,
        "pairs": pairs,
    }
    key = {"study": study_id(key), **key}
    questions = [{"key": name, "text": text} for name, text in QUESTIONS.items()]
    page = page_of({"study": key["study"], "questions": questions, "pairs": shown})
    partial.mkdir(parents=True)
    (partial / PAGE).write_text(page, "utf-8")
    text = json.dumps(key, indent=1, ensure_ascii=False)
    (partial / KEY).write_text(text + "\n", "utf-8")
    partial.rename(settings.out)
    summarize(settings, key, len(page))


def data_uri(webp: bytes) -> str:
    """An image as an address that needs no file."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def about_file(file: Path) -> dict[str, str]:
    """An image's name and checksum, for the key."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def summarize(settings: Settings, key: Mapping[str, Any], size: int) -> None:
    """Says what was made, and what to do with it."""
    a, b = settings.names.values()
    count = len(key["pairs"])
    on_left = sum(pair["left"] == "a" for pair in key["pairs"])
    print(
        f"Study {key['study'][:8]}: {count} pairs of {a} and {b}; on the left is "
        f"{a} in {on_left}, {b} in {count - on_left}."
    )
    print(f"  {settings.out / PAGE}, {size / 1e6:.1f} MB: give it to the raters.")
    print(f"  {settings.out / KEY}: keep it, it says which image is whose.")
    if count != PROMPTS:
        print(f"Note: the paper's study has {PROMPTS} pairs, this one has {count}.")


def main(settings: Settings) -> None:
    """Makes the study; errors are one line."""
    try:
        make(settings)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{error}") from error


if __name__ == "__main__":
    main(tyro.cli(Settings))
