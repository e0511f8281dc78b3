"""COCO's captions, and which of them the paper's evaluations take."""

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmdkit.data.archives import Archive, open_archive

CAPTIONS = "captions_val2014.json"


class Caption(NamedTuple):
    """A caption, its id, and the file of its image."""

    prompt: str
    caption_id: int
    coco_file: str


def opened(option: str, path: Path) -> Archive:
    """Opens a folder or zip, or says in one line why not."""
    try:
        return open_archive(path)
    except ValueError as error:
        reason = str(error).removeprefix("path: ")
        raise SystemExit(f"{option}: {reason}") from error


def read_file(archive: Archive, name: str) -> bytes | str:
    """The content of a file, or what is wrong with it."""
    try:
        return archive.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return str(error).rstrip(".")


def read_captions(path: Path) -> tuple[bytes, list[list[Caption]]]:
    """Reads the captions of every image, in the file's order, and the file itself."""
    data = caption_bytes(path)
    try:
        content = json.loads(data)
        files = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
        captions: dict[int, list[Caption]] = {image: [] for image in files}
        listed = len(content["images"])
        for a in content["annotations"]:
            image, number, text = int(a["image_id"]), int(a["id"]), a["caption"]
            if image not in files:
                raise ValueError(f"caption {number} is of no image: {image}")
            if not isinstance(text, str):
                raise ValueError(f"caption {number} is no text")
            captions[image].append(Caption(text, number, files[image]))
    except KeyError as error:
        raise SystemExit(
            f"CAPTIONS {path}: no {error}; expected COCO's {CAPTIONS}."
        ) from error
    except (TypeError, ValueError) as error:
        raise SystemExit(f"CAPTIONS {path}: {error}.") from error
    twice = listed - len(set(files.values()))
    without = [files[image] for image, found in captions.items() if not found]
    if twice or without:
        what = f"{without[0]} has no caption" if without else f"{twice} images twice"
        raise SystemExit(f"CAPTIONS {path}: {what}.")
    return data, list(captions.values())


def caption_bytes(path: Path) -> bytes:
    """Finds the file of captions: itself, or in a zip or folder of annotations."""
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise SystemExit(f"CAPTIONS {path}: there is no such file.")
        return path.read_bytes()
    archive = opened("CAPTIONS", path)
    names = [n for n in archive.names() if n.rpartition("/")[2] == CAPTIONS]
    if len(names) != 1:
        raise SystemExit(f"CAPTIONS {path}: it holds {len(names)} files {CAPTIONS}.")
    found = read_file(archive, names[0])
    if isinstance(found, str):
        raise SystemExit(f"CAPTIONS {path}: {names[0]}: {found}.")
    return found


def draw_prompts(
    captions: Sequence[Sequence[Caption]], count: int, seed: int
) -> list[Caption]:
    """Draws images without replacement, and one caption of each."""
    rng = np.random.RandomState(seed)  # its numbers never change
    chosen = rng.permutation(len(captions))[:count]
    return [captions[i][rng.randint(len(captions[i]))] for i in chosen]


def draw_pairs(
    captions: Sequence[Sequence[Caption]], count: int, seed: int
) -> list[Caption]:
    """Draws images and a caption of each, as official DMD2's pandas script does.

    All captions, image by image, are shuffled; the first one of each image is kept; of
    these some are drawn. `DataFrame.sample` takes the start of a permutation.
    """
    rng = np.random.RandomState(seed)
    all_captions = [caption for found in captions for caption in found]
    first: dict[str, Caption] = {}
    for i in rng.permutation(len(all_captions)):
        first.setdefault(all_captions[i].coco_file, all_captions[i])
    kept = list(first.values())
    return [kept[i] for i in rng.permutation(len(kept))[:count]]
