import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_script import as_in_a_script
from torch import Tensor, nn

from dmdkit.data import (
    BatchStream,
    LatentDataset,
    LatentKind,
    LatentSample,
    ShardedTensors,
    ShardWriter,
    open_latents,
    weights_digest,
)

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

KIND: dict[str, Any] = {"vae": "sha256:0", "scaling_factor": 0.13025, "resolution": 64}


def latents(first: int, count: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Latents that tell their number."""
    i = torch.arange(first, first + count, dtype=dtype)
    return i[:, None, None, None].expand(-1, 4, 8, 8)


def fill(
    folder: Path,
    first: int = 0,
    count: int = 5,
    stored: torch.dtype = torch.float16,
    **other: Any,
) -> Path:
    kind = LatentKind(**{**KIND, **other})
    about = {**kind.about(), "source": str(folder)}
    writer = ShardWriter(folder, about=about, shard_size=3)
    captions = [f"image {i}" for i in range(first, first + count)]
    rows = torch.arange(count)
    writer.add(latents=latents(first, count, stored), captions=captions, rows=rows)
    writer.close()
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_come_with_their_captions(tmp_path: Path, workers: int) -> None:
    found = open_latents(fill(tmp_path), **KIND, dtype="float16")
    assert (len(found), found.shape) == (5, (4, 8, 8))
    assert found.kind == LatentKind(**KIND)
    stream = BatchStream(pickle.loads(pickle.dumps(found)), 5, seed=1, workers=workers)
    batch = next(stream)
    stream.close()
    assert isinstance(batch, LatentSample)
    assert batch.latent.dtype == torch.float16
    assert batch.latent.shape == (5, 4, 8, 8)
    numbers = batch.latent[:, 0, 0, 0].int().tolist()
    assert sorted(numbers) == list(range(5))
    assert batch.caption == tuple(f"image {i}" for i in numbers)


def test_equal_kinds_follow_one_another(tmp_path: Path) -> None:
    folders = [fill(tmp_path / str(i), 10 * i, 2 + i) for i in range(3)]
    found = open_latents(folders, **KIND)
    captions = [found[i].caption for i in range(len(found))]
    numbers = [0, 1, 10, 11, 12, 20, 21, 22, 23]
    assert captions == [f"image {i}" for i in numbers]
    assert [int(found[i].latent[0, 0, 0]) for i in range(len(found))] == numbers
    for index in (-1, 9):
        with pytest.raises(IndexError, match=f"{index}, expected 0 ... 8"):
            found[index]


OTHERS: dict[str, Any] = {
    "vae": "sha256:1",
    "scaling_factor": 0.18215,
    "resolution": 512,
    "dtype": "float32",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_expectations_are_refused(tmp_path: Path, name: str) -> None:
    folder, own = fill(tmp_path / "a"), {**KIND, "dtype": "float16"}
    message = rf"a holds latents of {name} {own[name]!r}, expected {OTHERS[name]!r}"
    with pytest.raises(ValueError, match=message) as caught:
        open_latents(folder, **{name: OTHERS[name]})
    assert "\n" not in str(caught.value)
    assert len(open_latents(folder, **{name: own[name]})) == 5


@pytest.mark.parametrize("name", [*OTHERS, "shift_factor"])
def test_different_kinds_are_not_mixed(tmp_path: Path, name: str) -> None:
    value = {**OTHERS, "shift_factor": 0.0609}[name]
    stored = torch.float32 if name == "dtype" else torch.float16
    other = fill(tmp_path / "b", stored=stored, **{name: value})
    message = rf"b holds latents of {name} {value!r}, \S*a of .*; only equal ones"
    with pytest.raises(ValueError, match=message):
        open_latents([fill(tmp_path / "a"), other])
    assert len(open_latents([other])) == 5


def test_different_shapes_are_not_mixed(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    writer = ShardWriter(tmp_path / "b", about=LatentKind(**KIND).about())
    writer.add(latents=torch.zeros(1, 4, 4, 4).half(), captions=["a"])
    writer.close()
    message = r"of shape 'float16\[4, 4, 4\]', .* of 'float16\[4, 8, 8\]'"
    with pytest.raises(ValueError, match=message):
        open_latents([tmp_path / "a", tmp_path / "b"])


def test_other_shards_are_refused(tmp_path: Path) -> None:
    kind, x = LatentKind(**KIND), latents(0, 2)
    captions = ["a", "b"]
    wrong: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "pairs": ({"what": "pairs"}, {"latents": x, "captions": captions}),
        "entry": (
            {k: v for k, v in kind.about().items() if k != "vae"},
            {"latents": x, "captions": captions},
        ),
        "latents": (kind.about(), {"captions": captions}),
        "captions": (kind.about(), {"latents": x}),
        "tensors": (kind.about(), {"latents": x, "captions": torch.zeros(2)}),
        "dtype": (kind.about(), {"latents": x.float(), "captions": captions}),
    }
    for name, (about, columns) in wrong.items():
        writer = ShardWriter(tmp_path / name, about=about)
        writer.add(**columns)
        writer.close()
        with pytest.raises(ValueError, match=f"{name} holds no latents with captions"):
            open_latents(tmp_path / name)
        assert len(ShardedTensors(tmp_path / name)) == 2
    with pytest.raises(ValueError, match="parts: there are none"):
        LatentDataset([])
    with pytest.raises(ValueError, match="holds no shards"):
        open_latents(tmp_path)
    resolution: Any = "64"
    with as_in_a_script(), pytest.raises(TypeError, match="`resolution` is str '64'"):
        open_latents(tmp_path, resolution=resolution)


def test_a_digest_is_of_names_shapes_and_values() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    bias, weight = struct.pack("<f", 0.5), struct.pack("<2f", 1, -2)
    content = b"bias [1] " + bias + b"weight [1, 2] " + weight
    digest = weights_digest(layer)
    assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert weights_digest(layer.half()) == digest, "these numbers are exact in fp16"
    assert weights_digest(nn.Sequential(layer)) != digest
    with torch.no_grad():
        layer.bias.fill_(0.25)
    assert weights_digest(layer) != digest
