"""The folder of a checkpoint: whole or not at all, and checked before it is read.

A checkpoint is written under a hidden name, put on disk, described by a manifest of
sizes and checksums, and only then given its own name, `step-00001000`.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import distributed as dist

from dmdkit.training.ranks import everywhere, on_first, rank_and_ranks

PREFIX = "step-"
MANIFEST = "manifest.json"
PATIENCE = 60.0
"""Seconds until a disk that ranks share has to show what another one wrote."""


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those that were written."""


def checkpoints(directory: str | Path) -> list[Path]:
    """Lists the complete checkpoints of a run, the oldest first.

    Args:
        directory: The folder of all checkpoints of a run; it need not exist.

    Returns:
        Their folders.
    """
    folder = Path(directory)
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else ()
    return sorted(path for path in found if (path / MANIFEST).is_file())


def check_complete(path: Path) -> None:
    """Raises `ValueError` unless a folder is a complete checkpoint.

    Args:
        path: The folder.

    Raises:
        ValueError: If it is none.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"path: there is no complete checkpoint in {path}.")


def write_whole(
    directory: Path,
    step: int,
    write: Callable[[Path], object],
    about: Mapping[str, Any],
    keep: int | None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint on all ranks, and removes the oldest.

    Args:
        directory: The folder of all checkpoints of a run, the same on all ranks.
        step: The step, for the name.
        write: Writes the files into a folder; called on every rank.
        about: What the manifest says beside the files.
        keep: How many of the newest stay; all if None.
        group: The process group to go through; the default one if None.

    Returns:
        The checkpoint.

    Raises:
        OSError: If it cannot be written on any rank; the older ones stay.
    """
    final = directory / f"{PREFIX}{step:08d}"
    partial = directory / f".{final.name}.partial"
    try:
        on_first(lambda: _begin(partial), group)
        write(partial)
        sums = everywhere(lambda: _settle(partial), group)
        files = {name: value for own in sums for name, value in own.items()}
        manifest = {"step": step, **about, "files": files}
        on_first(lambda: _publish(partial, final, manifest), group)
    except (Exception, KeyboardInterrupt):
        # What could not be finished takes no room on a disk that may be full.
        with suppress(OSError):
            if rank_and_ranks()[0] == 0:
                shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is not None:
        on_first(lambda: _remove_oldest(directory, keep, final), group)
    return final


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads what a checkpoint says of itself.

    Args:
        path: The checkpoint.

    Returns:
        The manifest.

    Raises:
        ValueError: If there is no complete checkpoint.
        DamagedCheckpointError: If the manifest is not understood.
    """
    check_complete(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        _ = manifest["step"], manifest["parts"], manifest["files"].items()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"path: {path / MANIFEST} is damaged ({error!r}); take an older checkpoint."
        ) from error
    return manifest


def verify_checkpoint(path: str | Path) -> None:
    """Holds the files of a checkpoint against its manifest, shared among the ranks.

    Args:
        path: The checkpoint.

    Raises:
        ValueError: If there is no complete checkpoint.
        DamagedCheckpointError: If a file is missing, or has other content than when it
            was written.
    """
    path = Path(path)
    files = sorted(read_manifest(path)["files"].items())
    rank, ranks = rank_and_ranks()
    own = everywhere(lambda: _first_fault(path, files[rank::ranks]))
    for fault in own:
        if fault is not None:
            raise DamagedCheckpointError(
                f"path: {fault}; the checkpoint is damaged, take an older one."
            )


def keep_checkpoint(
    path: str | Path, folder: str | Path, about: Mapping[str, Any] | None = None
) -> Path:
    """Keeps a checkpoint under another name, whatever becomes of the original.

    Such as the best one so far, while only the newest stay. Its files are linked where
    the disk can, else copied; what had the name before is replaced at the end. Rank 0
    alone calls it.

    Args:
        path: A complete checkpoint.
        folder: Its other name, such as `best`, in a folder that exists.
        about: Why it is kept, such as what it measured: numbers and texts, written to
            a file of that name, such as `best/best.json`.

    Returns:
        The folder, a checkpoint as `load_checkpoint` reads it.

    Raises:
        ValueError: If `path` is no complete checkpoint.
        OSError: If it cannot be written; what had the name before stays.
    """
    path, folder = Path(path), Path(folder)
    check_complete(path)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(path, partial, copy_function=_link_or_copy)
    text = json.dumps(dict(about or {}), indent=2)
    note = partial / f"{folder.name}.json"
    note.unlink(missing_ok=True)  # a link to that of PATH, if it was kept so itself
    note.write_text(f"{text}\n")
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def room_in(folder: Path) -> str:
    """How full the disk is: the likeliest cause, and PyTorch's error rarely says so.

    Args:
        folder: Where a checkpoint could not be written.

    Returns:
        Words to put behind its name.
    """
    if not folder.exists():
        return ", which has vanished"
    return f" ({shutil.disk_usage(folder).free / 2**30:.2f} GiB free)"


def explain(error: Any) -> str:
    """What went wrong, from a `CheckpointException`, in one line.

    Args:
        error: The exception.

    Returns:
        The messages of the ranks.
    """
    texts = (" ".join(str(failure).split()) for failure, _ in error.failures.values())
    return "; ".join(texts)


def _first_fault(path: Path, files: list[tuple[str, Any]]) -> str | None:
    for name, expected in files:
        try:
            if _describe(path / name) != expected:
                return f"{path / name} is not as it was written"
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
    return None


def _begin(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left_over in partial.parent.glob(f".{PREFIX}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(exist_ok=True)


def _settle(partial: Path) -> dict[str, Any]:
    """Puts this rank's files on disk and describes them."""
    rank, _ = rank_and_ranks()
    found = {}
    for file in sorted(partial.iterdir()):
        # DCP writes __RANK_NUMBER.distcp, and rank 0 all else.
        of_a_rank = file.name.startswith("__")
        if file.name.startswith(f"__{rank}_") or (rank == 0 and not of_a_rank):
            _flush(file)
            found[file.name] = _describe(file)
    return found


def require_visible(files: Iterable[Path]) -> None:
    """Waits until this rank sees what others wrote, as a network's disk may be late.

    Args:
        files: What is to be there.

    Raises:
        OSError: If one of them is not, after a minute.
    """
    until = time.monotonic() + PATIENCE
    for file in files:
        while not file.is_file():
            if time.monotonic() > until:
                raise OSError(
                    f"directory: {file}, which another rank wrote, is not on this "
                    "rank's disk; all ranks need one folder on a disk they share."
                )
            time.sleep(min(PATIENCE, 0.5))


def _publish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    require_visible(partial / name for name in manifest["files"])
    file = partial / MANIFEST
    file.write_text(json.dumps(manifest, indent=2) + "\n")
    _flush(file)
    _flush(partial)
    if final.exists():  # by a run that came past this step before
        _remove(final)
    partial.rename(final)
    _flush(final.parent)


def _remove_oldest(directory: Path, keep: int, newest: Path) -> None:
    for old in checkpoints(directory)[:-keep]:
        # A run that went back is behind the checkpoints it made before.
        if old != newest:
            _remove(old)


def _remove(folder: Path) -> None:
    """Takes the name away first: what is half removed is no checkpoint."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
