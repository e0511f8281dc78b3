"""What makes data sets of images: work in processes, and folders that are continued."""

import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
PLAN = "plan.json"
CHUNK = 32

Item = TypeVar("Item")
Made = TypeVar("Made")


def partial_of(dest: Path) -> Path:
    """Where a data set is made before it gets its name."""
    return dest.with_name(f"{dest.name}.partial")


def map_in_order(
    function: Callable[[Item], Made], items: Sequence[Item], workers: int
) -> Generator[Made]:
    """Calls a function for each item, in worker processes that are never far ahead.

    Args:
        function: Can be pickled.
        items: What it is called with.
        workers: How many processes; 0: this one.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers)
    waiting: deque[Future[list[Made]]] = deque()
    try:
        for i in range(0, len(items), CHUNK):
            waiting.append(pool.submit(_each, function, items[i : i + CHUNK]))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """What a worker is asked for at once."""
    return [function(item) for item in items]


class Sink(Protocol):
    """Where the files of a data set go."""

    def has(self, name: str) -> bool:
        """Whether a file is there, and whole, from an earlier run."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file."""
        ...

    def finish(self) -> None:
        """Gives the data set its name."""
        ...


class FolderSink:
    """A folder that is continued if it is there and was begun for the same plan."""

    def __init__(self, dest: Path, plan: Mapping[str, Any]) -> None:
        self.partial, self.dest = partial_of(dest), dest
        self.partial.mkdir(parents=True, exist_ok=True)
        file = self.partial / PLAN
        if not file.is_file():
            self.write(PLAN, json.dumps(plan).encode())
        elif (found := json.loads(file.read_text())) != plan:
            raise SystemExit(
                f"{self.partial} was begun for {found}, now it is {plan}; remove it "
                "to start anew."
            )

    def has(self, name: str) -> bool:
        end = PNG_END if name.endswith(".png") else b""
        try:
            with (self.partial / name).open("rb") as file:
                file.seek(-max(len(end), 1), os.SEEK_END)
                return file.read().endswith(end)
        except OSError:
            return False

    def write(self, name: str, data: bytes) -> None:
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    def finish(self) -> None:
        (self.partial / PLAN).unlink()
        self.partial.rename(self.dest)


class ZipSink:
    """A zip without compression, which PNGs do not need; begun anew each time."""

    def __init__(self, dest: Path) -> None:
        self.partial, self.dest = partial_of(dest), dest
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.zip = zipfile.ZipFile(self.partial, "w", zipfile.ZIP_STORED)

    def has(self, name: str) -> bool:
        return False

    def write(self, name: str, data: bytes) -> None:
        # ZipInfo's own date, so that the same images make the same file.
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o644 << 16
        self.zip.writestr(info, data)

    def finish(self) -> None:
        self.zip.close()
        self.partial.rename(self.dest)
