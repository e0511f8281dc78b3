import json
import multiprocessing
import os
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
from torch import Tensor

import dmdkit.data.shards as shards_module
from dmdkit.data import BatchStream, ShardedTensors, ShardWriter

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ABOUT: dict[str, str | int | float] = {"what": "pairs", "steps": 8, "scale": 0.5}


def samples(first: int, last: int) -> dict[str, Tensor]:
    """Samples that tell their number, of several shapes and dtypes."""
    i = torch.arange(first, last)
    return {
        "noise": i[:, None].float() + torch.tensor([0.25, 0.5]),
        "images": i.to(torch.bfloat16)[:, None, None].expand(-1, 2, 3),
        "labels": i,
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def one(i: int) -> dict[str, Tensor]:
    return {name: tensor[0] for name, tensor in samples(i, i + 1).items()}


def fill(folder: Path, count: int = 10, **options: Any) -> None:
    writer = ShardWriter(folder, **{"about": ABOUT, "shard_size": 4, **options})
    if writer.position < count:
        writer.add(**samples(writer.position, count))
    writer.close()


@settings(max_examples=25)
@given(
    parts=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum),
    shard_size=st.integers(1, 9),
)
def test_what_is_added_comes_back(tmp_path_factory, parts, shard_size: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer, done = ShardWriter(folder, about=ABOUT, shard_size=shard_size), 0
    for part in parts:
        writer.add(**samples(done, done + part))
        done += part
        assert writer.position == done // shard_size * shard_size
    writer.close()
    assert writer.position == done
    shards = ShardedTensors(folder)
    assert len(shards) == done
    assert all(same(shards[i], one(i)) for i in range(done))
    assert shards.about == ABOUT


def test_files_are_numbered_and_say_what_they_are(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    names = [f"shard-0000-{i:05d}.safetensors" for i in range(3)]
    others = ["finished-0000.json", "shards.json"]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *others])
    assert [len(load_file(tmp_path / name)["labels"]) for name in names] == [4, 4, 2]
    index = json.loads((tmp_path / "shards.json").read_text())
    assert index == {"about": ABOUT, "ranks": 1}
    with safe_open(tmp_path / names[1], framework="pt") as file:
        assert json.loads(file.metadata()["dmdkit"]) == index


def test_tensors_are_copied_when_they_are_added(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, about=ABOUT)
    x = torch.zeros(2, 3, requires_grad=True)
    writer.add(x=x)
    with torch.no_grad():
        x += 1
    writer.add(x=x)
    writer.close()
    values = [ShardedTensors(tmp_path)[i]["x"][0].item() for i in range(4)]
    assert values == [0, 0, 1, 1]


def test_an_item_is_its_own_tensor(tmp_path: Path) -> None:
    fill(tmp_path)
    shards = ShardedTensors(tmp_path)
    item = shards[5]
    for tensor in item.values():
        tensor += 100
    assert same(shards[5], one(5))
    assert item["noise"].untyped_storage().nbytes() == 8, "not the whole shard's"


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_in_workers(tmp_path: Path, workers: int) -> None:
    fill(tmp_path, 10)
    shards = ShardedTensors(tmp_path)
    assert same(shards[0], one(0))
    shards = pickle.loads(pickle.dumps(shards))
    stream = BatchStream(shards, 5, seed=0, workers=workers)
    batches = [next(stream) for _ in range(2)]
    stream.close()
    numbers = torch.cat([batch["labels"] for batch in batches])
    assert sorted(numbers.tolist()) == list(range(10))
    for batch in batches:
        for j, i in enumerate(batch["labels"].tolist()):
            assert same({name: tensor[j] for name, tensor in batch.items()}, one(i))


def test_every_rank_has_files_of_its_own(tmp_path: Path) -> None:
    writers = [
        ShardWriter(tmp_path, about=ABOUT, shard_size=2, rank=rank, ranks=3)
        for rank in range(3)
    ]
    for rank in (2, 0):
        writers[rank].add(**samples(10 * rank, 10 * rank + 3))
    writers[0].close()
    writers[1].close()
    with pytest.raises(ValueError, match=r"rank 2 of .* is not finished"):
        ShardedTensors(tmp_path)
    writers[2].close()
    shards = ShardedTensors(tmp_path)
    numbers = [shards[i]["labels"].item() for i in range(len(shards))]
    assert numbers == [0, 1, 2, 20, 21, 22]
    assert [writer.position for writer in writers] == [3, 0, 3]


def prepare(folder: Path, when: str = "never", countdown: int = 0) -> None:
    """Writes 22 samples; ends `when` the countdown is over, as if killed."""
    save, replace = shards_module.save_file, Path.replace

    def perhaps_die(now: str) -> None:
        nonlocal countdown
        countdown -= now == when
        if countdown < 0:
            os._exit(9)

    def save_in_parts(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        perhaps_die("within")
        path.write_bytes(whole)

    def replace_shard(self: Path, target: Any) -> Path:
        is_shard = "shard-" in self.name
        perhaps_die("before the name" if is_shard else "")
        path = replace(self, target)
        perhaps_die("after the name" if is_shard else "")
        return path

    setattr(shards_module, "save_file", save_in_parts)  # noqa: B010
    setattr(Path, "replace", replace_shard)  # noqa: B010
    writer = ShardWriter(folder, about=ABOUT, shard_size=4)
    for i in range(writer.position, 22, 3):
        writer.add(**samples(i, min(i + 3, 22)))
        perhaps_die("between")
    writer.close()
    os._exit(0)


@pytest.mark.parametrize(
    ("when", "countdown"),
    [
        ("within", 0),
        ("within", 2),
        ("before the name", 1),
        ("after the name", 1),
        ("after the name", 5),
        ("between", 2),
        ("between", 5),
    ],
)
def test_a_killed_preparation_goes_on(tmp_path: Path, when: str, countdown) -> None:
    def run(*arguments: Any) -> int | None:
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=prepare, args=(tmp_path, *arguments))
        process.start()
        process.join()
        return process.exitcode

    assert run(when, countdown) == 9
    with pytest.raises(ValueError, match="not finished"):
        ShardedTensors(tmp_path)
    whole = sum(len(load_file(f)["labels"]) for f in tmp_path.glob("shard-*"))
    # The writer goes on after what is whole, and clears away what is not.
    assert ShardWriter(tmp_path, about=ABOUT).position == whole
    assert not list(tmp_path.glob(".*"))
    assert run() == 0
    shards = ShardedTensors(tmp_path)
    assert len(shards) == 22
    assert all(same(shards[i], one(i)) for i in range(22))


def test_a_finished_preparation_can_be_run_again_and_added_to(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    fill(tmp_path, 10)
    assert len(ShardedTensors(tmp_path)) == 10
    writer = ShardWriter(tmp_path, about=ABOUT, shard_size=1)
    writer.add(**samples(writer.position, 11))
    with pytest.raises(ValueError, match="not finished"):
        ShardedTensors(tmp_path)
    fill(tmp_path, 13)
    shards = ShardedTensors(tmp_path)
    assert [shards[i]["labels"].item() for i in range(len(shards))] == list(range(13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"about": {**ABOUT, "steps": 9}}, "with steps = 8, now it is 9; use"),
        ({"about": {}}, "steps = 8, now it is None"),
        ({"ranks": 2}, "with ranks = 1, now it is 2; use"),
    ],
)
def test_another_preparation_is_refused(tmp_path: Path, options, message) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match=message):
        fill(tmp_path, 20, **options)
    assert len(ShardedTensors(tmp_path)) == 10


def test_the_writer_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, about=ABOUT, shard_size=4)
    for wrong in ({}, {"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.ones(())}):
        with pytest.raises(ValueError, match="as many samples in each"):
            writer.add(**wrong)
    writer.add(x=torch.ones(4, 2))
    others = (torch.ones(2), torch.ones(1, 3), torch.ones(1, 2, dtype=torch.half))
    for resumed in (writer, ShardWriter(tmp_path, about=ABOUT)):
        for wrong in others:
            with pytest.raises(ValueError, match=r"those before are .*float32\[2\]"):
                resumed.add(x=wrong)
        with pytest.raises(ValueError, match="those before"):
            resumed.add(y=torch.ones(1, 2))
    writer.close()
    assert len(ShardedTensors(tmp_path)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"ranks": 0},
        {"about": {"scale": float("nan")}},
    ],
)
def test_arguments_out_of_range(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected (shard_size|a finite number)"):
        ShardWriter(tmp_path / "new", **{"about": ABOUT, **wrong})
    assert not (tmp_path / "new").exists()


def test_what_it_is_about_is_text_and_numbers(tmp_path: Path) -> None:
    about: Any = {"times": [1, 2]}
    with as_in_a_script(), pytest.raises(TypeError, match=r"'times'.*strings and num"):
        ShardWriter(tmp_path, about=about)


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard-0000-{number:05d}.safetensors"


def resave(path: Path, **tensors: Tensor) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **tensors}, path, metadata)


def truncate(folder: Path) -> None:
    with shard(folder, 1).open("r+b") as file:
        file.truncate(shard(folder, 1).stat().st_size - 1)


def lose_a_key(folder: Path) -> None:
    with safe_open(shard(folder, 1), framework="pt") as file:
        metadata = file.metadata()
    save_file({"noise": torch.zeros(4, 2)}, shard(folder, 1), metadata)


def swap_in_a_stranger(folder: Path) -> None:
    fill(folder / "other", about={**ABOUT, "steps": 9})
    shard(folder / "other", 1).rename(shard(folder, 1))


DAMAGES = {
    "no index": (lambda f: (f / "shards.json").unlink(), "holds no shards"),
    "bad index": (lambda f: (f / "shards.json").write_text("{"), "shards.json is not"),
    "gap": (lambda f: shard(f, 1).unlink(), "shard-0000-00001.safetensors is missing"),
    "lost end": (
        lambda f: shard(f, 2).unlink(),
        "holds 2 shards of rank 0, expected 3",
    ),
    "truncated": (truncate, "shard-0000-00001.safetensors cannot be read"),
    "no shard": (
        lambda f: shard(f, 1).write_bytes(b"text"),
        "shard-0000-00001.safetensors cannot be read",
    ),
    "foreign": (
        lambda f: save_file({"x": torch.zeros(4)}, shard(f, 1)),
        "shard-0000-00001.safetensors was not written by ShardWriter",
    ),
    "unequal": (
        lambda f: resave(shard(f, 1), labels=torch.zeros(3)),
        "shard-0000-00001.safetensors was not written by ShardWriter",
    ),
    "key": (lose_a_key, "shard-0000-00001.safetensors holds"),
    "dtype": (
        lambda f: resave(shard(f, 1), labels=torch.zeros(4)),
        "shard-0000-00001.safetensors holds .*float32",
    ),
    "shape": (
        lambda f: resave(shard(f, 1), noise=torch.zeros(4, 3)),
        "shard-0000-00001.safetensors holds .*3",
    ),
    "stranger": (swap_in_a_stranger, "shard-0000-00001.safetensors holds .*elsewhere"),
    "bad end": (
        lambda f: (f / "finished-0000.json").write_text("3"),
        "finished-0000.json is not understood",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, 10)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        ShardedTensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_preparation_is_no_data_set(tmp_path: Path) -> None:
    ShardWriter(tmp_path, about=ABOUT).close()
    with pytest.raises(ValueError, match="no samples"):
        ShardedTensors(tmp_path)


def test_indices_out_of_range(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=str(index)):
            ShardedTensors(tmp_path)[index]


def test_shards_are_not_written_among_other_things(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("a photo")
    with pytest.raises(ValueError, match=r"holds photo\.png and no shards\.json"):
        ShardWriter(tmp_path, about={"what": "numbers"})
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
