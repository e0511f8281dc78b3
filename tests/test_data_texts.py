"""Texts in shards, beside tensors; tests of shards in general are elsewhere."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_script import as_in_a_script
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmdkit.data import BatchStream, ShardedTensors, ShardWriter

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ABOUT = {"what": "captioned"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


def caption(i: int) -> str:
    """A caption of i characters of one to four bytes, with separators of lines."""
    return ("aé\n猫\x00🐈\u2028" * i)[:i]


def fill(folder: Path, count: int, **options: Any) -> ShardWriter:
    writer = ShardWriter(folder, **{"about": ABOUT, "shard_size": 4, **options})
    new = range(writer.position, count)
    writer.add(x=torch.tensor(new), captions=[caption(i) for i in new])
    return writer


@settings(max_examples=25)
@given(
    parts=st.lists(st.lists(TEXT, max_size=5), min_size=1).filter(any),
    shard_size=st.integers(1, 9),
    alone=st.booleans(),
)
def test_texts_come_back(tmp_path_factory, parts, shard_size: int, alone) -> None:
    folder = tmp_path_factory.mktemp("texts")
    writer = ShardWriter(folder, about=ABOUT, shard_size=shard_size)
    for part in parts:
        lengths = torch.tensor([len(text) for text in part], dtype=torch.int64)
        writer.add(text=part, **({} if alone else {"length": lengths}))
    writer.close()
    shards = pickle.loads(pickle.dumps(ShardedTensors(folder)))
    texts = [text for part in parts for text in part]
    items = [shards[i] for i in range(len(shards))]
    assert [item["text"] for item in items] == texts
    assert alone or [int(item["length"]) for item in items] == list(map(len, texts))


def test_a_file_holds_the_bytes_and_their_ends(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, about=ABOUT)
    writer.add(captions=("é", "", "ab"))
    writer.close()
    file = load_file(tmp_path / "shard-0000-00000.safetensors")
    assert file["captions.utf8"].tolist() == [0xC3, 0xA9, 97, 98]
    assert file["captions.ends"].tolist() == [2, 2, 4]
    assert ShardedTensors(tmp_path).kind == {"captions": "text"}


def test_an_interrupted_preparation_goes_on(tmp_path: Path) -> None:
    assert fill(tmp_path, 11).position == 8, "three samples were not yet written"
    writer = fill(tmp_path, 14)
    writer.close()
    shards = ShardedTensors(tmp_path)
    assert len(shards) == 14
    for i in range(14):
        assert (int(shards[i]["x"]), shards[i]["captions"]) == (i, caption(i))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_lists_of_texts(tmp_path: Path, workers: int) -> None:
    fill(tmp_path, 10).close()
    stream = BatchStream(ShardedTensors(tmp_path), 5, seed=0, workers=workers)
    batches = [next(stream) for _ in range(2)]
    stream.close()
    for batch in batches:
        assert batch["captions"] == [caption(i) for i in batch["x"].tolist()]


@pytest.mark.parametrize("first", ["texts", "tensors"])
def test_texts_and_tensors_of_one_name_do_not_mix(tmp_path: Path, first: str) -> None:
    columns: list[Any] = [["a", "b"], torch.ones(2, dtype=torch.uint8)]
    right, wrong = columns if first == "texts" else columns[::-1]
    writer = ShardWriter(tmp_path, about=ABOUT, shard_size=2)
    writer.add(captions=right)
    for resumed in (writer, ShardWriter(tmp_path, about=ABOUT)):
        with pytest.raises(ValueError, match=r"captions.*those before are .*captions"):
            resumed.add(captions=wrong)
        with pytest.raises(ValueError, match="those before"):
            resumed.add(captions=right, x=torch.ones(2))
    writer.close()
    assert len(ShardedTensors(tmp_path)) == 2


def test_columns_that_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, about=ABOUT, shard_size=1)
    wrong: Any
    for wrong in ("ab", ["a", 3], ["a", None], [b"a"]):
        with as_in_a_script(), pytest.raises(TypeError, match=r"captions is .*of str"):
            writer.add(captions=wrong)
    with pytest.raises(ValueError, match="as many samples in each"):
        writer.add(x=torch.ones(2), captions=["a"])
    with pytest.raises(ValueError, match=r"columns: captions: .* is no Unicode text"):
        writer.add(captions=["\ud800"])
    for part in ("captions.utf8", "captions.ends"):
        with pytest.raises(ValueError, match=r"are the names of the parts of captions"):
            writer.add(**{"captions": ["a"], part: torch.ones(1)})
    assert writer.position == 0
    writer.add(captions=["a"])
    assert writer.position == 1


@pytest.mark.parametrize("part", ["utf8", "ends"])
def test_damaged_texts_are_refused(tmp_path: Path, part: str) -> None:
    fill(tmp_path, 8).close()
    path, name = tmp_path / "shard-0000-00001.safetensors", f"captions.{part}"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    whole = load_file(path)
    message = r"shard-0000-00001.safetensors (was not written by|cannot be read)"
    for harm in (whole[name][:-1].clone(), None):
        tensors = {**whole, name: harm}
        kept = {k: v for k, v in tensors.items() if v is not None}
        save_file(kept, path, metadata)
        with pytest.raises(ValueError, match=message) as caught:
            ShardedTensors(tmp_path)
        assert "\n" not in str(caught.value)
