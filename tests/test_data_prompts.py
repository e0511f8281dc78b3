import csv
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers_script import as_in_a_script
from hypothesis import given, settings
from hypothesis import strategies as st

from dmdkit.data import BatchStream, Prompts, read_prompts

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

TABLES = (".jsonl", ".csv", ".parquet")
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text.strip()
)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as the file's name says; all have the same columns."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2
        )
    else:
        path.write_text("".join(f"{row['prompt']}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".txt", *TABLES, ".JSONL"])
@settings(max_examples=20)
@given(texts=st.lists(TEXT, min_size=1, max_size=7))
def test_prompts_come_back(tmp_path_factory, suffix: str, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / f"p{suffix.lower()}"
    write(path, [{"id": i, "prompt": text} for i, text in enumerate(texts)])
    prompts = read_prompts(path.rename(path.with_suffix(suffix)))
    assert list(prompts) == [text.strip() for text in texts]
    assert (prompts.blank, prompts.below) == (0, 0)


@pytest.mark.parametrize("suffix", TABLES)
def test_rows_below_the_score_are_left_out_and_counted(tmp_path, suffix: str) -> None:
    scores = [6.25, 6.24, None, 7.0, float("nan"), 6.3]
    rows = [{"TEXT": f"p{i}", "score": score} for i, score in enumerate(scores)]
    path = write(tmp_path / f"p{suffix}", rows)
    options: dict[str, Any] = {"column": "TEXT", "aesthetic_column": "score"}
    prompts = read_prompts(path, min_aesthetic=6.25, **options)
    assert list(prompts) == ["p0", "p3", "p5"]
    assert (prompts.blank, prompts.below) == (0, 3)
    assert len(read_prompts(path, **options)) == 6, "no filter, no scores needed"
    with pytest.raises(ValueError, match="0 blank, 6 below min_aesthetic=8"):
        read_prompts(path, min_aesthetic=8, **options)


@pytest.mark.parametrize("suffix", [".txt", *TABLES])
def test_blank_prompts_are_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    texts = ["", "a", " \t", "b", ""]
    path = write(tmp_path / f"p{suffix}", [{"prompt": text} for text in texts])
    with pytest.warns(UserWarning, match="p.*: 3 blank prompts are left out"):
        prompts = read_prompts(path)
    assert (list(prompts), prompts.blank) == (["a", "b"], 3)
    write(path, [{"prompt": " "}])
    with pytest.raises(ValueError, match="holds no prompts: 1 blank"):
        read_prompts(path)


def test_the_ends_of_lines_and_marks_of_other_systems(tmp_path: Path) -> None:
    # U+2028 separates lines to str.splitlines, but not in a file.
    content = "\ufeffa\u2028b\r\nc\nd"
    (tmp_path / "p.txt").write_bytes(content.encode())
    assert list(read_prompts(tmp_path / "p.txt")) == ["a\u2028b", "c", "d"]
    (tmp_path / "p.csv").write_bytes('\ufeffprompt\r\n"a\nb"\r\n'.encode())
    assert list(read_prompts(tmp_path / "p.csv")) == ["a\nb"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a"}\r\n\r\n'.encode())
    assert list(read_prompts(tmp_path / "p.jsonl")) == ["a"]


GOOD = '{"prompt": "a", "aesthetic": 6}\n'
BAD_FILES = {
    "no file": ("gone.jsonl", None, "there is no file .*gone.jsonl"),
    "no text file": ("gone.txt", None, "there is no file .*gone.txt"),
    "a folder": (".", None, "is none of .jsonl, .csv, .parquet"),
    "pickle": ("p.pkl", "x", "p.pkl is none of .jsonl"),
    "empty": ("p.jsonl", "", "p.jsonl holds no prompts"),
    "empty text": ("p.txt", "", "p.txt holds no prompts"),
    "empty table": ("p.csv", "", "p.csv: there is no column 'prompt'; it has none"),
    "json": ("p.jsonl", GOOD + "\n{", "p.jsonl, line 3 is no JSON: Expecting"),
    "list": ("p.jsonl", GOOD + '["a"]', "p.jsonl, line 2 is no JSON object"),
    "column": ("p.jsonl", GOOD + '{"x": 1}', "line 2: there is no column 'prompt'"),
    "its columns": ("p.csv", "x,y\n1,2\n", "no column 'prompt'; it has 'x', 'y'"),
    "no text": ("p.jsonl", '{"prompt": 3}', "line 1: 'prompt' is int 3, expected text"),
    "surrogate": ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: 'prompt': .*surrogates"),
    "encoding": ("p.txt", b"\xff\xfe", "p.txt cannot be read: .*utf-8"),
    "binary": ("p.csv", b"prompt\n\xff", "p.csv cannot be read: .*utf-8"),
    "parquet": ("p.parquet", b"PAR", "p.parquet cannot be read: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / file)
    assert "\n" not in str(caught.value)


def test_scores_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "aesthetic": "high"}])
    with pytest.raises(ValueError, match="'aesthetic' is str 'high', expected a num"):
        read_prompts(path, min_aesthetic=5)
    path = write(tmp_path / "p.parquet", [{"prompt": "a"}])
    with pytest.raises(ValueError, match="no column 'aesthetic'; it has 'prompt'"):
        read_prompts(path, min_aesthetic=5)
    path = write(tmp_path / "p.txt", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"p.txt has no scores; pass None"):
        read_prompts(path, min_aesthetic=5)
    wrong: Any = "6.25"
    with as_in_a_script(), pytest.raises(TypeError, match="`min_aesthetic` is str"):
        read_prompts(path, min_aesthetic=wrong)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pyarrow is missing.*dmdkit\[train\]"):
        read_prompts(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_lists_of_text(workers: int) -> None:
    texts = [f"prompt {i} {'é' * i}" for i in range(8)]
    prompts = pickle.loads(pickle.dumps(Prompts(texts, blank=1, below=2)))
    assert (prompts.blank, prompts.below) == (1, 2)
    stream = BatchStream(prompts, 4, seed=0, workers=workers)
    batches = [next(stream) for _ in range(2)]
    stream.close()
    assert all(isinstance(batch, list) for batch in batches)
    assert sorted(batches[0] + batches[1]) == texts


def test_indices_and_prompts_that_are_refused() -> None:
    prompts = Prompts(["a", "", "b"])
    assert [prompts[1], prompts[2]] == ["", "b"]
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"{index}, expected 0 ... 2"):
            prompts[index]
    with pytest.raises(ValueError, match="there are none"):
        Prompts([])
    with pytest.raises(ValueError, match=r"prompt 2: .*surrogates"):
        Prompts(["a", "\udc00"])
