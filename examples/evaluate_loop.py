"""Batches of images shared among processes, and rows kept through interruptions.

Process r of R takes batches r, r + R, ... Rows come back in the images' order on all of
them, so that numbers do not depend on how many there are, to the bit.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from evaluate_images import ImageSource
from evaluate_protocols import Measure, naming
from sample_settings import parts
from torch import Tensor
from tqdm import tqdm

from dmdkit.training.ranks import everywhere, on_first, rank_and_ranks

SECONDS = 60.0
"""Between writings of rows."""
Rows = list[Tensor]
"""Of a batch, one tensor a measure."""


def rows_of(source: ImageSource, measures: Sequence[Measure], batch: range) -> Rows:
    """The rows of a batch by each measure."""
    with naming(source.option):
        images = source.images(batch)
        return [measure.rows(images, source, batch) for measure in measures]


def rows_in_order(
    source: ImageSource,
    measures: Sequence[Measure],
    batch_size: int,
    *,
    title: str,
    done: int = 0,
) -> Iterator[Rows]:
    """Gives the rows of all batches but those done, on every process."""
    batches = list(parts(source.count, batch_size))
    rank, ranks = rank_and_ranks()

    def own(first: int) -> Rows | None:
        if first + rank >= len(batches):
            return None
        return rows_of(source, measures, batches[first + rank])

    left = batches[done:]
    bar = tqdm(
        total=source.count,
        initial=source.count - sum(map(len, left)),
        desc=title,
        unit="image",
        disable=rank > 0,
    )
    with bar:
        for first in range(done, len(batches), ranks):
            for i, rows in enumerate(everywhere(lambda first=first: own(first))):
                if rows is not None:
                    yield rows
                    bar.update(len(batches[first + i]))


class KeptRows:
    """What was measured already, in files, until the result is written.

    Args:
        file: The file of the result; the folder beside it is `<file>.partial`. None:
            nothing is kept.
        identity: What the rows depend on.

    Raises:
        ValueError: If the folder is of something else.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self.folder = None if file is None else file.with_name(f"{file.name}.partial")
        on_first(lambda: self._begin(json.loads(json.dumps(identity))))

    def _begin(self, identity: dict[str, Any]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "identity.json"
        if not file.is_file():
            file.write_text(json.dumps(identity, indent=2) + "\n")
            return
        found = json.loads(file.read_text())
        for name, value in identity.items():
            if found.get(name) != value:
                raise ValueError(
                    f"--json: {self.folder} was begun with {name} = {found.get(name)}, "
                    f"now it is {value}; remove it, or name another file."
                )

    def all_rows(
        self,
        number: int,
        source: ImageSource,
        measures: Sequence[Measure],
        batch_size: int,
        title: str,
    ) -> list[Tensor]:
        """The rows of a set, those kept and the others: of each measure, on rank 0."""
        kept: list[Rows] = []
        fresh: list[Rows] = []

        def read() -> int:
            kept.extend(self._read(number))
            return len(kept)

        done, saved = on_first(read), time.monotonic()
        first = rank_and_ranks()[0] == 0
        rows = rows_in_order(source, measures, batch_size, title=title, done=done)
        try:
            for found in rows:
                if first:
                    kept.append(found)
                    fresh.append(found)
                if fresh and time.monotonic() - saved > SECONDS:
                    self._write(number, len(kept), fresh)
                    fresh, saved = [], time.monotonic()
        finally:
            if fresh:
                self._write(number, len(kept), fresh)
        if not first:
            return []
        return [torch.cat(column) for column in zip(*kept, strict=True)]

    def _read(self, number: int) -> list[Rows]:
        files = sorted(self.folder.glob(f"{number:02d}-*.pt")) if self.folder else []
        return [rows for file in files for rows in torch.load(file, weights_only=True)]

    def _write(self, number: int, end: int, rows: list[Rows]) -> None:
        if self.folder is None:
            return
        file = self.folder / f"{number:02d}-{end:08d}.pt"
        unfinished = self.folder / f".{file.name}"
        torch.save(rows, unfinished)
        unfinished.replace(file)

    def remove(self) -> None:
        """Removes the files: the result is written (rank 0)."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
