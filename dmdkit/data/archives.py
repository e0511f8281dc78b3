"""Folders and zip files, read alike: names with slashes, and the bytes behind them."""

import os
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Archive(Protocol):
    """Files by name; a name that ends in a slash is a folder, listed at least if empty.

    Attributes:
        path: Where it lies.
    """

    path: Path

    def names(self) -> list[str]:
        """Lists all names in alphabetical order, hidden ones left out."""
        ...

    def read(self, name: str) -> bytes:
        """Gives the content of a file."""
        ...


def open_archive(path: str | Path) -> Archive:
    """Opens a folder or a zip file.

    Args:
        path: Where it lies.

    Returns:
        Its files.

    Raises:
        ValueError: If there is neither, or the zip file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return FolderArchive(path)
    if not path.is_file():
        raise ValueError(f"path: there is no folder and no zip file {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"path: {path} is no zip file, or an incomplete one; pass a folder or a "
            "whole zip."
        )
    return ZipArchive(path)


class FolderArchive:
    """The files below a folder, links followed.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Lists all names in alphabetical order, hidden ones left out."""
        found: list[str] = []
        for folder, subfolders, files in os.walk(self.path, followlinks=True):
            below = Path(folder).relative_to(self.path).as_posix()
            prefix = "" if below == "." else f"{below}/"
            found += [prefix + file for file in files]
            if prefix and not files and not subfolders:
                found.append(prefix)
        return sorted(name for name in found if not _hidden(name))

    def read(self, name: str) -> bytes:
        """Gives the content of a file."""
        return (self.path / name).read_bytes()


class ZipArchive:
    """The files in a zip; every process opens it for itself, when it first reads.

    Args:
        path: The zip file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._process = 0

    def names(self) -> list[str]:
        """Lists all names in alphabetical order, hidden ones left out."""
        with zipfile.ZipFile(self.path) as file:
            return sorted(name for name in file.namelist() if not _hidden(name))

    def read(self, name: str) -> bytes:
        """Gives the content of a file."""
        # A forked process shares its parent's file position: it needs its own handle.
        if self._zip is None or self._process != os.getpid():
            self._zip, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._zip.read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
