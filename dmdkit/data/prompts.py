"""Prompts to distil on, from text files and tables."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch.utils.data import Dataset

from dmdkit._checked import checked
from dmdkit.data.tables import SUFFIXES, Row, read_rows
from dmdkit.data.texts import encode, pack


class Prompts(Dataset[str]):
    """Prompts by index; `read_prompts` reads them from a file.

    PyTorch collates a batch of them to a list of str. They lie in memory as one block
    of bytes, which worker processes share: millions are no burden.

    Args:
        prompts: The prompts, in their order.
        blank: How many others were left out because there was no text.
        below: How many others were left out for their aesthetic score.

    Attributes:
        blank: As the argument.
        below: As the argument.

    Raises:
        ValueError: If there are none, or one is no Unicode text.

    Examples:
        >>> from dmdkit.data import BatchStream
        >>> prompts = Prompts(["a cat", "a dog", "a bird"])
        >>> prompts[1]
        'a dog'
        >>> sorted(next(BatchStream(prompts, batch_size=3, seed=0)))
        ['a bird', 'a cat', 'a dog']
    """

    def __init__(
        self, prompts: Iterable[str], *, blank: int = 0, below: int = 0
    ) -> None:
        self._texts = pack(
            encode(prompt, f"prompt {number}")
            for number, prompt in enumerate(prompts, 1)
        )
        self.blank, self.below = blank, below
        if not len(self):
            raise ValueError("prompts: there are none.")

    def __len__(self) -> int:
        return len(self._texts.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 ... {len(self) - 1}.")
        return self._texts.text(index)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@checked
def read_prompts(
    path: str | Path,
    *,
    column: str = "prompt",
    min_aesthetic: float | int | None = None,
    aesthetic_column: str = "aesthetic",
) -> Prompts:
    r"""Reads prompts from a file, in its order, without white space around them.

    Args:
        path: A .txt file with a prompt on each line, or a table: a .jsonl file with a
            JSON object on each line, a .csv file with a header, or a .parquet file.
            Text is in UTF-8.
        column: The table's column of prompts.
        min_aesthetic: If given, rows whose aesthetic score is lower, or missing, are
            left out; their number is the attribute `below` of the answer.
        aesthetic_column: The table's column of aesthetic scores.

    Returns:
        The prompts. Blank ones are left out with a warning that says how many; their
        number is the attribute `blank`.

    Raises:
        ValueError: If there is no such file, it is not understood, a column is
            missing, a prompt is no text or a score no number, no prompt is left, or
            `min_aesthetic` is given for a .txt file.
        ImportError: If it is a .parquet file and pyarrow is not installed.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "prompts.jsonl"
        ...     rows = ['{"text": "a cat", "aesthetic": 6.5}']
        ...     rows += ['{"text": "a dog", "aesthetic": 6.0}']
        ...     _ = file.write_text("\n".join(rows))
        ...     prompts = read_prompts(file, column="text", min_aesthetic=6.25)
        >>> list(prompts), prompts.below
        (['a cat'], 1)

    Note:
        Source: DMD2, appendix F: the prompts of LAION-Aesthetics with a score of 6.25
        or more.
    """
    path = Path(path)
    is_text = path.suffix.lower() == ".txt"
    if is_text and min_aesthetic is not None:
        raise ValueError(
            f"min_aesthetic: {path} has no scores; pass None, or a table "
            f"({', '.join(SUFFIXES)})."
        )
    columns = [column] if min_aesthetic is None else [column, aesthetic_column]
    blank = below = 0

    def kept() -> Iterator[str]:
        nonlocal blank, below
        for row in _lines(path, column) if is_text else read_rows(path, columns):
            prompt = row.text(column)
            if not prompt:
                blank += 1
                continue
            if min_aesthetic is not None:
                score = row.number(aesthetic_column)
                if score is None or score < min_aesthetic:
                    below += 1
                    continue
            yield prompt

    texts = list(kept())
    if not texts:
        raise ValueError(
            f"path: {path} holds no prompts: {blank} blank, {below} below "
            f"min_aesthetic={min_aesthetic}."
        )
    if blank:
        warnings.warn(f"{path}: {blank} blank prompts are left out.", stacklevel=3)
    return Prompts(texts, blank=blank, below=below)


def _lines(path: Path, column: str) -> Iterator[Row]:
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield Row(f"{path}, line {number}", {column: line})
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {path} cannot be read: {error}.") from error
