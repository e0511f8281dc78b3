"""Makes the prompts and real images of the paper's COCO evaluations.

    python examples/prepare_coco.py annotations_trainval2014.zip val2014.zip coco

Both zips are COCO's own (https://cocodataset.org, 2014); the captions may also be the
captions_val2014.json in the first, and the images a folder. OUT gets:

    coco30k/prompts.jsonl     30,000 prompts, of as many images              [Table 5]
    coco30k/references/       all 40,504 images at 256 pixels, PNG
    coco10k/prompts.jsonl     10,000 prompts, and the image of each          [Table 2]
    coco10k/images/           these images as they are: image i is of prompt i
    coco.json, SHA256SUMS     what all this is made of; `sha256sum -c SHA256SUMS`

References are cropped to the square in the centre and resized by Lanczos' filter to 256
levels, as official DMD2 does before clean-fid; the protocol's own crop and resize leave
them as they are. The 10,000 images stay whole, since they are taken at 512 pixels and
for the patch FID cut out at their own resolution.

The 10,000 pairs are those of official DMD2, chosen by a pandas script with NumPy's seed
123: the same numbers are drawn here. How the 30,000 prompts were chosen is not
published; those drawn here, a caption each of random images, repeat from --seed. The
official list is main/coco_eval/captions_coco14_test.txt in the repository of DMD2: give
it as --prompt-file for numbers to be compared with the paper's.

The same command continues an interrupted run. About 6 GB, and ten minutes on two cores.
"""

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
import tyro
from coco_captions import (
    Caption,
    draw_pairs,
    draw_prompts,
    opened,
    read_captions,
    read_file,
)
from PIL import Image
from prepared_images import PLAN, FolderSink, map_in_order
from tqdm import tqdm

from dmdkit.data import read_prompts
from dmdkit.data.archives import Archive, open_archive
from dmdkit.metrics import centre_crop, lanczos_resize

SUMS, ABOUT = "SHA256SUMS", "coco.json"
REFERENCE_SIZE = 256


@dataclass(frozen=True)
class Settings:
    """Makes the prompts and real images of the paper's COCO evaluations."""

    captions: tyro.conf.Positional[Path]
    """annotations_trainval2014.zip, or the captions_val2014.json in it."""
    images: tyro.conf.Positional[Path]
    """val2014.zip, or the folder of its images."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    references: int = 40_504
    """Images that there must be [G]."""
    prompts: int = 30_000
    """Prompts for SD1.5 [G]."""
    pairs: int = 10_000
    """Prompts, with their images, for SDXL [G]."""
    seed: int = 0
    """Of the prompts for SD1.5."""
    pairs_seed: int = 123
    """Of the pairs for SDXL [official code]."""
    prompt_file: Path | None = None
    """The prompts for SD1.5, instead of drawn ones: .txt, one a line, .jsonl, .csv or
    .parquet."""
    prompt_column: str = "prompt"
    """Of a table of prompts."""
    workers: int = os.cpu_count() or 1
    """Processes that crop; 0: this one."""

    def check(self) -> None:
        """Refuses what cannot run."""
        for name in ("references", "prompts", "pairs"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: expected >= 1.")
        for name in ("seed", "pairs_seed", "workers"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 0.")
        if self.out.exists():
            raise SystemExit(f"OUT {self.out} exists; remove it or name another.")


class Job(NamedTuple):
    """A file to make: of which file of COCO, its name in OUT, and how."""

    source: str
    name: str
    kind: Literal["square", "whole"]


# -- prompts


def lines_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows, each with a prompt, as a file of JSON lines."""
    for row in rows:
        if not row["prompt"].strip():
            raise SystemExit(f"CAPTIONS: caption {row['caption_id']} is blank.")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode()


def prompts_of(
    settings: Settings, captions: Sequence[Sequence[Caption]]
) -> list[dict[str, Any]]:
    """The prompts for SD1.5, drawn or given."""
    if settings.prompt_file is None:
        drawn = draw_prompts(captions, settings.prompts, settings.seed)
        return [caption._asdict() for caption in drawn]
    try:
        given = read_prompts(settings.prompt_file, column=settings.prompt_column)
    except ValueError as error:
        raise SystemExit(f"--prompt-file: {error}") from error
    if len(given) != settings.prompts:
        raise SystemExit(
            f"--prompt-file: {settings.prompt_file} holds {len(given)} prompts, "
            f"--prompts says {settings.prompts}."
        )
    return [{"prompt": prompt} for prompt in given]


# -- images


@cache
def archive_of(path: Path) -> Archive:
    """The images; a worker opens them once."""
    return open_archive(path)


def make_file(job: Job, images: Path) -> bytes | str:
    """Makes one file: its content, or what is wrong with the image."""
    torch.set_num_threads(1)  # a forked process must not start a pool of threads
    data = read_file(archive_of(images), job.source)
    if isinstance(data, str):
        return data
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error).partition(" <_io")[0].rstrip(".")
    return data if job.kind == "whole" else to_reference(pixels)


def to_reference(pixels: np.ndarray) -> bytes:
    """Cuts out the middle of an image, uint8 [h, w, 3], at 256 pixels: a PNG."""
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = lanczos_resize(centre_crop(batch), REFERENCE_SIZE)[0]
    png = io.BytesIO()
    image = Image.fromarray(square.permute(1, 2, 0).numpy())
    image.save(png, "PNG", compress_level=1)  # a quarter of the time of 6
    return png.getvalue()


def jobs_of(
    settings: Settings, captions: Sequence[Sequence[Caption]], pairs: Sequence[Caption]
) -> list[Job]:
    """All files to make of images; refuses images that are not there."""
    archive = opened("IMAGES", settings.images)
    where = {name.rpartition("/")[2]: name for name in archive.names()}
    files = [found[0].coco_file for found in captions]
    missing = [file for file in files if file not in where]
    if missing:
        raise SystemExit(
            f"IMAGES {settings.images}: {len(missing)} of {len(files)} images are "
            f"missing, such as {missing[0]}; expected COCO's val2014."
        )
    return [
        Job(where[file], f"coco30k/references/{Path(file).stem}.png", "square")
        for file in files
    ] + [
        Job(where[pair.coco_file], f"coco10k/images/{pair_file(i)}", "whole")
        for i, pair in enumerate(pairs)
    ]


def pair_file(index: int) -> str:
    """The name of the image of a prompt, like those of `sample.py --out`."""
    return f"{index:06d}.jpg"


# -- all of it


def require_counts(settings: Settings, captions: Sequence[Sequence[Caption]]) -> None:
    """Refuses captions of another set of images."""
    found = len(captions)
    if found != settings.references:
        raise SystemExit(
            f"CAPTIONS {settings.captions}: of {found} images, --references says "
            f"{settings.references}."
        )
    for name in ("prompts", "pairs"):
        if getattr(settings, name) > found and not (
            name == "prompts" and settings.prompt_file
        ):
            raise SystemExit(
                f"--{name} {getattr(settings, name)}: there are {found} images, and "
                "one caption of each is drawn."
            )


def prepare(settings: Settings) -> None:
    """Makes everything and prints what there is."""
    settings.check()
    data, captions = read_captions(settings.captions)
    require_counts(settings, captions)
    prompts = lines_of(prompts_of(settings, captions))
    pairs = draw_pairs(captions, settings.pairs, settings.pairs_seed)
    pair_rows = lines_of(
        [{"file": pair_file(i), **pair._asdict()} for i, pair in enumerate(pairs)]
    )
    jobs = jobs_of(settings, captions, pairs)
    drawn = settings.prompt_file is None
    about = {
        "captions": {"sha256": sha256(data)},
        "references": {"count": len(captions), "size": REFERENCE_SIZE},
        "prompts": {
            "count": settings.prompts,
            "sha256": sha256(prompts),
            "seed": settings.seed if drawn else None,
            "file": None if settings.prompt_file is None else settings.prompt_file.name,
        },
        "pairs": {
            "count": settings.pairs,
            "sha256": sha256(pair_rows),
            "seed": settings.pairs_seed,
        },
    }
    sink = FolderSink(settings.out, about)
    make_images(settings, jobs, sink)
    sink.write("coco30k/prompts.jsonl", prompts)
    sink.write("coco10k/prompts.jsonl", pair_rows)
    sums = checksums(sink.partial)
    sink.write(SUMS, sums)
    versions = {"python": platform.python_version(), "pillow": PIL.__version__}
    about |= {"sha256sums": sha256(sums), "versions": versions}
    sink.write(ABOUT, (json.dumps(about, indent=2) + "\n").encode())
    sink.finish()
    summarize(settings)


def make_images(settings: Settings, jobs: Sequence[Job], sink: FolderSink) -> None:
    """Makes the files of images that are not there from an earlier run."""
    todo = [job for job in jobs if not sink.has(job.name)]
    make = partial(make_file, images=settings.images)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="image")
    with bar, closing(map_in_order(make, todo, settings.workers)) as contents:
        for job, content in zip(todo, contents, strict=True):
            if isinstance(content, str):
                raise SystemExit(
                    f"IMAGES {settings.images}: {job.source}: {content}; get it anew, "
                    "and the same command goes on."
                )
            sink.write(job.name, content)
            bar.update()


def checksums(folder: Path) -> bytes:
    """The checksums of all files, as `sha256sum` writes them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{sha256(path.read_bytes())}  {path.relative_to(folder).as_posix()}\n"
        for path in tqdm(files, desc="checksums", unit="file")
        if path.name not in (PLAN, SUMS, ABOUT) and not path.name.startswith(".")
    ]
    return "".join(lines).encode()


def sha256(data: bytes) -> str:
    """The checksum of a file's content."""
    return hashlib.sha256(data).hexdigest()


def summarize(settings: Settings) -> None:
    """Prints what was made."""
    size = sum(f.stat().st_size for f in settings.out.rglob("*") if f.is_file())
    print(
        f"{settings.out}: {settings.references} references of {REFERENCE_SIZE}x"
        f"{REFERENCE_SIZE}, {settings.prompts} prompts, {settings.pairs} pairs of "
        f"prompt and image, {size / 1e9:.2f} GB."
    )
    paper = Settings(Path(), Path(), Path())
    for name in ("references", "prompts", "pairs"):
        here, there = getattr(settings, name), getattr(paper, name)
        if here != there:
            print(f"Note: the paper has {there} {name}, here are {here}.")
    if settings.prompt_file is None:
        print(
            "Note: the prompts of coco30k were drawn here; for the official ones see "
            "--prompt-file."
        )


def main(settings: Settings) -> None:
    """Makes everything; errors are one line."""
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
        raise SystemExit("Interrupted. The same command goes on.") from None
