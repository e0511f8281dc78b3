"""Real images that samples are held against, for `evaluate.py`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_images import ArrayImages, FolderImages, ImageSource
from evaluate_loop import rows_in_order
from evaluate_protocols import (
    KID_SUBSET,
    Distance,
    Reference,
    digits_pixels,
    naming,
)
from evaluate_settings import EXTRAS, Settings
from torch import Tensor

from dmdkit import FeatureStatistics
from dmdkit.training.ranks import on_first, rank_and_ranks

BATCH_SIZE = 64


def open_reference(distance: Distance, settings: Settings) -> Reference:
    """The real images of a protocol: statistics, on rank 0, and features if needed.

    Raises:
        ValueError: If they cannot be had, or are too few.
    """
    path = settings.reference
    with naming("reference"):
        if path is None:
            digits = ArrayImages(digits_pixels(), "digits")
            return of_images(distance, settings, digits, None)
        if path.is_dir():
            folder = FolderImages(path, "reference", real=True)
            cache = cache_of(path, distance, folder)
            return of_images(distance, settings, folder, cache)
        return of_file(distance, settings, path)


def require_enough(distance: Distance, count: int) -> None:
    """Refuses fewer images than features, whose covariance would be singular."""
    dim = distance.network.dim
    if count <= dim:
        raise ValueError(
            f"{count} images, {distance.protocol.name} has {dim} features and needs "
            "more images than these."
        )


def require_enough_for_kid(settings: Settings, count: int) -> None:
    """Refuses fewer images than a subset has."""
    if settings.kid and count < KID_SUBSET:
        raise ValueError(f"{count} images, --kid takes subsets of {KID_SUBSET}.")


def of_file(distance: Distance, settings: Settings, path: Path) -> Reference:
    """Statistics that are there; EDM's and clean-fid's do not say of what."""
    protocol, label = distance.protocol, distance.protocol.label(distance.network)
    asked = settings.reference_count
    try:
        statistics = FeatureStatistics.load(path, count=asked)
    except ValueError as error:
        if asked is not None or not f"{error}".startswith("count:"):
            raise
        if protocol.reference_samples is None:
            raise ValueError(
                f"{path} does not say how many images it is of; give --reference-count."
            ) from error
        statistics = FeatureStatistics.load(path, count=protocol.reference_samples)
    if statistics.dim != distance.network.dim:
        raise ValueError(
            f"{path} holds {statistics.dim} features, {protocol.name} has "
            f"{distance.network.dim}."
        )
    if statistics.features not in (None, label):
        raise ValueError(
            f"{path} holds features of {statistics.features}, expected those of "
            f"{label}."
        )
    require_enough(distance, statistics.count)
    about = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "count": statistics.count,
        "features": statistics.features or "the file does not say",
    }
    return Reference(statistics, None, about)


def cache_of(path: Path, distance: Distance, folder: FolderImages) -> Path:
    """Where the statistics of a folder are kept: a name that tells what they are of."""
    told = [distance.protocol.label(distance.network), folder.listing]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    return path.with_name(
        f"{path.resolve().name}-{distance.protocol.name}-{digest}.npz"
    )


def of_images(
    distance: Distance, settings: Settings, source: ImageSource, cache: Path | None
) -> Reference:
    """Statistics of images, kept in a file; features too, where they are needed."""
    require_enough(distance, source.count)
    require_enough_for_kid(settings, source.count)
    needed = any(getattr(settings, name) for name in EXTRAS)
    first = rank_and_ranks()[0] == 0
    statistics = distance.protocol.empty_statistics(distance.network)
    kept: list[Tensor] = []

    def read() -> bool:
        nonlocal statistics, kept
        found = read_cache(cache, needed)
        if found is not None:
            statistics, kept = found
        return found is not None

    if not on_first(read):
        title = f"real images, {distance.protocol.name}"
        for (rows,) in rows_in_order(source, [distance], BATCH_SIZE, title=title):
            if first:
                statistics.update(rows)
                kept += [rows] if needed else []
        on_first(lambda: write_cache(cache, statistics, kept))
    about: dict[str, Any] = {"images": source.title, "count": source.count}
    if cache is not None:
        about["statistics"] = cache.name
    return Reference(statistics, torch.cat(kept) if kept else None, about)


def read_cache(
    cache: Path | None, needed: bool
) -> tuple[FeatureStatistics, list[Tensor]] | None:
    """What an earlier evaluation kept, with features if they are needed."""
    if cache is None or not cache.is_file():
        return None
    features = cache.with_suffix(".npy")
    if not needed:
        return FeatureStatistics.load(cache), []
    if not features.is_file():
        return None
    found = torch.from_numpy(np.load(features, allow_pickle=False))
    return FeatureStatistics.load(cache), [found]


def write_cache(
    cache: Path | None, statistics: FeatureStatistics, features: list[Tensor]
) -> None:
    """Keeps statistics, and features if there are; a full disk costs the file only."""
    if cache is None:
        return
    try:
        if features:
            found = torch.cat(features).numpy()
            np.save(cache.with_suffix(".npy"), found, allow_pickle=False)
        unfinished = cache.with_name(f".{cache.stem}.partial.npz")
        statistics.save(unfinished)
        unfinished.replace(cache)
    except OSError as error:
        print(f"Note: {cache} could not be written ({error}); it is made anew then.")
