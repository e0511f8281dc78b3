"""Which files of an archive are images, and what their labels are."""

import json
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from dmdkit.data.archives import Archive

UNLABELLED = -1
_LABELS = "dataset.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMED = 3


class Found(NamedTuple):
    """Labels by name, and the names of files at fault by what is wrong."""

    labels: dict[str, int]
    faults: dict[str, list[str]]


def find_labels(archive: Archive, classes: int | None) -> Found:
    """Finds images and labels in the format that the names show.

    Args:
        archive: The files.
        classes: How many classes there must be, or None.

    Returns:
        The images that have a good label, and what is wrong with the others.

    Raises:
        ValueError: If there are no labels where classes are asked for, `dataset.json`
            is not understood, or there are more or fewer class folders than classes.
    """
    names = archive.names()
    images = [name for name in names if name.lower().endswith(_SUFFIXES)]
    stored_twice = _repeated(images)
    images = [name for name in images if name not in stored_twice]
    in_folders = any("/" in name for name in images)
    labels = _read_labels(archive) if _LABELS in names else None
    if labels is not None:
        labels = [entry for entry in labels if entry[0] not in stored_twice]
        found = _check_labels(images, labels, classes)
    elif in_folders and _LABELS not in names:
        found = _label_by_folder(archive, names, images, classes)
    elif classes is None:
        found = Found(dict.fromkeys(images, UNLABELLED), {})
    else:
        raise ValueError(
            f"path: {archive.path} has no labels, expected {classes} classes; give it "
            f"a {_LABELS} or a folder for each class, or pass classes=None."
        )
    faults = {"stored twice": list(stored_twice), **found.faults}
    return Found(found.labels, {what: which for what, which in faults.items() if which})


def _read_labels(archive: Archive) -> list[Any] | None:
    where = f"path: {archive.path}: {_LABELS}"
    try:
        content = json.loads(archive.read(_LABELS))
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where} cannot be read: {error}.") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f'{where} has no "labels"; expected them, or null.')
    labels = content["labels"]
    if labels is not None and not (
        isinstance(labels, list)
        and all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            for entry in labels
        )
    ):
        raise ValueError(f'{where}: "labels" must be a list of [name, label] or null.')
    return labels


def _check_labels(images: list[str], entries: list[Any], classes: int | None) -> Found:
    """Holds EDM's labels against the files that are there."""
    there, labels = set(images), dict(entries)
    labelled_twice = _repeated(name for name, _ in entries)
    good: dict[str, int] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    for name in images:
        if name not in labels:
            faults["without a label"].append(name)
    for name in sorted(labels):
        label = labels[name]
        if name not in there:
            faults["labelled but not there as images"].append(name)
        elif name in labelled_twice:
            faults["labelled twice"].append(name)
        elif not isinstance(label, int) or isinstance(label, bool):
            faults["with a label that is no whole number"].append(f"{name}: {label!r}")
        elif label < 0:
            faults["with a negative label"].append(f"{name}: {label}")
        elif classes is not None and label >= classes:
            faults[f"with a label not below {classes}"].append(f"{name}: {label}")
        else:
            good[name] = label
    return Found(good, faults)


def _label_by_folder(
    archive: Archive, names: list[str], images: list[str], classes: int | None
) -> Found:
    """Takes the topmost folders as classes; an empty one keeps its number."""
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    if classes is not None and len(folders) != classes:
        raise ValueError(
            f"path: {archive.path} has {len(folders)} class folders, expected "
            f"{classes}; with another number of folders the labels would be shifted."
        )
    number = {folder: i for i, folder in enumerate(folders)}
    labels = {n: number[n.partition("/")[0]] for n in images if "/" in n}
    filled = set(labels.values())
    faults = {
        "in no class folder": [name for name in images if "/" not in name],
        "empty class folders": [f for f in folders if number[f] not in filled],
    }
    return Found(labels, faults)


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def summary(faults: dict[str, list[str]]) -> str:
    """Names the first files of each fault, and how many there are."""
    parts = []
    for what, names in faults.items():
        more = ", ..." if len(names) > _NAMED else ""
        listed = ", ".join(names[:_NAMED]) + more
        parts.append(f"{len(names)} {what} ({listed})")
    return "; ".join(parts)
