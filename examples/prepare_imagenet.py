"""Makes ImageNet-64 from the original training images, in EDM's data set format.

    python examples/prepare_imagenet.py ILSVRC/Data/CLS-LOC/train imagenet-64x64.zip

SOURCE holds a folder for each class (n01440764, ...); the label is its place in their
alphabetical order. Images are centre-cropped as in ADM (Dhariwal and Nichol 2021), as
EDM's teachers were trained on. DEST is a folder, or a zip if its name ends so, and
appears when it is whole. The same command continues an interrupted folder.
`dmdkit.data.open_images` reads it.
"""

import hashlib
import io
import json
import os
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from PIL import Image
from prepared_images import FolderSink, Sink, ZipSink, map_in_order
from tqdm import tqdm

CLASSES = 1000
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
MODES = ("RGB", "L", "CMYK", "YCbCr", "RGBA", "LA", "P", "1")
LABELS = "dataset.json"


@dataclass(frozen=True)
class Settings:
    """Makes a data set of small images from ImageNet's training images."""

    source: tyro.conf.Positional[Path]
    """Folder of class folders."""
    dest: tyro.conf.Positional[Path]
    """Folder, or .zip, to make."""
    resolution: int = 64
    """Height and width of the images made."""
    workers: int = os.cpu_count() or 1
    """Processes that crop; 0: this one."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with an unreadable image: stop, or name it and leave it out."""

    def __post_init__(self) -> None:
        """Refuses what cannot run."""
        if self.resolution < 1:
            raise SystemExit(f"--resolution {self.resolution}: expected >= 1.")
        if self.workers < 0:
            raise SystemExit(f"--workers {self.workers}: expected >= 0.")
        if not self.source.is_dir():
            raise SystemExit(f"SOURCE {self.source}: there is no such folder.")
        if self.dest.exists():
            raise SystemExit(f"DEST {self.dest} exists; remove it or name another.")
        if self.dest.resolve().is_relative_to(self.source.resolve()):
            raise SystemExit(
                f"DEST {self.dest} lies in SOURCE, where every folder is a class; name "
                "another."
            )


class Source(NamedTuple):
    """An image: its file below SOURCE, its name in DEST, its label."""

    file: str
    name: str
    label: int


def find_sources(folder: Path) -> list[Source]:
    """Lists all images, by class folder and name; an image's name is its place."""
    folders = sorted(f.name for f in folder.iterdir() if f.is_dir())
    folders = [name for name in folders if not name.startswith(".")]
    sources: list[Source] = []
    for label, name in enumerate(folders):
        files = sorted(entry.name for entry in os.scandir(folder / name))
        files = [file for file in files if file.lower().endswith(SUFFIXES)]
        if not files:
            raise SystemExit(
                f"SOURCE: the class folder {folder / name} holds no images; every "
                "folder is a class."
            )
        for file in files:
            place = f"{len(sources):08d}"
            target = f"{place[:5]}/img{place}.png"
            sources.append(Source(f"{name}/{file}", target, label))
    if not sources:
        raise SystemExit(
            f"SOURCE {folder} holds no class folders with images (n01440764/*.JPEG); "
            "name the folder that does."
        )
    return sources


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Crops as ADM does.

    While the shorter side is at least twice the resolution, the image is halved with a
    box filter. Then it is resized, bicubically, so that the shorter side has the
    resolution, and its centre cut out.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize(
            (image.width // 2, image.height // 2), Image.Resampling.BOX
        )
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def to_png(path: Path, resolution: int) -> bytes | str:
    """Crops a file: the PNG, or what is wrong with it.

    The kind of file is seen from its content, not its name: one of ImageNet's JPEGs is
    a PNG, and some are grey or CMYK.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            if image.mode not in MODES:
                return f"mode {image.mode}, expected one of {', '.join(MODES)}"
            cropped = centre_crop(image.convert("RGB"), resolution)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error).partition(" <_io")[0]
    png = io.BytesIO()
    cropped.save(png, "PNG")
    return png.getvalue()


def plan_of(settings: Settings, sources: list[Source]) -> dict[str, Any]:
    """What a folder is begun for."""
    listing = "\n".join(source.file for source in sources)
    return {
        "resolution": settings.resolution,
        "images": len(sources),
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }


def prepare(settings: Settings) -> None:
    """Makes the data set and prints what it holds."""
    sources = find_sources(settings.source)
    is_zip = settings.dest.suffix.lower() == ".zip"
    sink: Sink = (
        ZipSink(settings.dest)
        if is_zip
        else FolderSink(settings.dest, plan_of(settings, sources))
    )
    done = {source.name for source in sources if sink.has(source.name)}
    todo = [source for source in sources if source.name not in done]
    bad: set[str] = set()
    bar = tqdm(total=len(sources), initial=len(done), desc="cropping", unit="image")
    crop = partial(to_png, resolution=settings.resolution)
    paths = [settings.source / source.file for source in todo]
    with bar, closing(map_in_order(crop, paths, settings.workers)) as pngs:
        for source, png in zip(todo, pngs, strict=True):
            if isinstance(png, bytes):
                sink.write(source.name, png)
            elif settings.on_bad == "refuse":
                raise SystemExit(
                    f"{settings.source / source.file}: {png}. Repair it, or leave such "
                    "files out with --on-bad skip."
                )
            else:
                bad.add(source.name)
                bar.write(f"Skipped {settings.source / source.file}: {png}.")
            bar.update()
    good = [source for source in sources if source.name not in bad]
    if not good:
        raise SystemExit(f"SOURCE {settings.source}: no image could be read.")
    labels = [[source.name, source.label] for source in good]
    sink.write(LABELS, json.dumps({"labels": labels}).encode())
    sink.finish()
    summarize(settings, sources, good)


def summarize(settings: Settings, sources: list[Source], good: list[Source]) -> None:
    """Prints how many images there are, and their size."""
    counts = Counter(source.label for source in good)
    counts.update(dict.fromkeys((source.label for source in sources), 0))
    files = settings.dest.rglob("*") if settings.dest.is_dir() else [settings.dest]
    size = sum(file.stat().st_size for file in files if file.is_file())
    print(
        f"{settings.dest}: {len(good)} images of {settings.resolution}x"
        f"{settings.resolution}, {len(counts)} classes of {min(counts.values())} to "
        f"{max(counts.values())} images, {len(sources) - len(good)} skipped, "
        f"{size / 1e6:.1f} MB."
    )
    if len(counts) != CLASSES:
        print(f"Note: ImageNet has {CLASSES} classes, SOURCE has {len(counts)}.")


def main(settings: Settings) -> None:
    """Makes the data set; errors are one line."""
    try:
        prepare(settings)
    except BrokenProcessPool:
        raise SystemExit(
            "A worker was ended from outside, perhaps for lack of memory; try fewer "
            "--workers."
        ) from None
    except OSError as error:
        raise SystemExit(f"{error}.") from error


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. The same command continues a folder; a zip starts anew."
        ) from None
