import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import captioned_images as images_of
import numpy as np
import prepare_latents as script
import pytest
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from helpers_pipelines import SD15_SCALING, SDXL_SCALING, save_sd15, save_sdxl
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from dmdkit.data import LatentKind, ShardedTensors, open_latents, weights_digest

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

DIGITS = load_digits(return_X_y=True)[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("pipelines") / "sd15")


def picture(i: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A digit in a tint, enlarged to a size."""
    tint = np.random.default_rng(i).uniform(0.3, 1, size=3)
    pixels = DIGITS[i].reshape(8, 8, 1) * tint * 255 / 16
    return Image.fromarray(pixels.astype(np.uint8)).resize(size)


def collection(folder: Path, count: int = 10, **columns: list[Any]) -> Path:
    """Images and their metadata, with more columns or others."""
    (folder / "part").mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"part/{i:02d}.png"
        picture(i, (40 + i, 48 - i)).save(folder / name)
        row = {"file_name": name, "caption": f"picture {i}, 猫"}
        row |= {"aesthetic": 6.0, "unsafe": False}
        rows.append(row | {name: values[i] for name, values in columns.items()})
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(source: Path, dest: Path, pipeline: Path, *more: str) -> ShardedTensors:
    options = ["--pretrained", str(pipeline), "--local-files-only", "--device", "cpu"]
    options += ["--resolution", "32", "--min-size", "36", "--workers", "0"]
    options += ["--batch-size", "2", "--shard-size", "4"]
    if (source / "metadata.jsonl").exists():
        options += ["--metadata", str(source / "metadata.jsonl")]
    arguments = [str(source), str(dest), *options, *more]
    script.main(tyro.cli(script.Settings, args=arguments))
    return ShardedTensors(dest)


def load_vae(pipeline: Path) -> Any:
    return AutoencoderKL.from_pretrained(pipeline, subfolder="vae").eval()


def items(shards: ShardedTensors) -> Iterator[dict[str, Any]]:
    return (shards[i] for i in range(len(shards)))


def rows(shards: ShardedTensors) -> list[int]:
    return [int(item["rows"]) for item in items(shards)]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_latents_are_drawn_as_diffusers_draws_them(
    tmp_path: Path, pipeline: Path, workers: str
) -> None:
    source = collection(tmp_path / "images")
    options = ("--seed", "5", "--dtype", "fp32", "--workers", workers)
    prepare(source, tmp_path / "latents", pipeline, *options)
    vae = load_vae(pipeline)
    latents = open_latents(
        tmp_path / "latents",
        vae=weights_digest(vae),
        scaling_factor=SD15_SCALING,
        resolution=32,
        dtype="float32",
    )
    assert len(latents) == 10
    for i in range(10):
        with Image.open(source / f"part/{i:02d}.png") as image:
            square = np.array(images_of.centre_square(image, 32))
        x = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1
        generator = torch.Generator().manual_seed(5 + i)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.sample(generator) * vae.config.scaling_factor
        latent, caption = latents[i]
        torch.testing.assert_close(latent, z[0], rtol=1e-4, atol=1e-5)
        assert caption == f"picture {i}, 猫"


def test_the_picture_shows_the_images_on_disk(tmp_path: Path, pipeline: Path) -> None:
    prepare(collection(tmp_path / "images", 5), tmp_path / "latents", pipeline)
    assert sorted(os.listdir(tmp_path / "latents")) == [
        "finished-0000.json",
        "latents-0000.png",
        *(f"shard-0000-{i:05d}.safetensors" for i in range(2)),
        "shards.json",
    ]
    with Image.open(tmp_path / "latents" / "latents-0000.png") as image:
        # The first shard holds four: one row of four, framed by two pixels.
        assert image.size == (4 * 34 + 2, 34 + 2)
        assert np.array(image).std() > 1


class ExactVAE:
    """Its latents are the pixels themselves, without noise."""

    device = torch.device("cpu")

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=x, std=torch.zeros_like(x))
        )

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decoding_undoes_encoding(precision: str) -> None:
    kind = LatentKind("exact", 0.4, resolution=16, shift_factor=0.3)
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, 3, 16, 16)
    pixels = torch.cat([pixels, pixels.flip(-1)])
    z = script.encode(ExactVAE(), pixels, [0, 1], kind=kind, precision=precision)
    assert z[0, 0, 0, 0].item() == pytest.approx((-1 - 0.3) * 0.4)
    assert z[0, 0, -1, -1].item() == pytest.approx((1 - 0.3) * 0.4)
    assert torch.equal(script.decode(ExactVAE(), z, kind), pixels)


def test_sdxl_has_a_factor_of_its_own(tmp_path: Path) -> None:
    pipeline = save_sdxl(tmp_path / "sdxl")
    prepare(collection(tmp_path / "images", 2), tmp_path / "latents", pipeline)
    kind = open_latents(tmp_path / "latents").kind
    assert (kind.scaling_factor, kind.dtype) == (SDXL_SCALING, "float16")


def test_filters_leave_out_and_count(tmp_path: Path, pipeline: Path, capsys) -> None:
    source = collection(
        tmp_path / "images",
        10,
        aesthetic=[5.5, 5.4, None, *[6] * 7],
        unsafe=[0, 0, 0, True, 0.5, "true", None, 0.4, "False", False],
    )
    # The shorter sides are 40 + i or 48 - i; 40 is that of the first, 39 of the last.
    shards = prepare(source, tmp_path / "a", pipeline, "--min-size", "40")
    assert rows(shards) == [0, 7, 8]
    out = capsys.readouterr().out
    assert "left out 2 of an aesthetic score below 5.5" in out
    assert "left out 4 unsafe" in out
    assert "left out 1 of a shorter side below 40" in out
    assert "holds 3 latents of rank 0" in out
    none = ("--min-aesthetic", "None", "--columns.unsafe", "None")
    assert rows(prepare(source, tmp_path / "b", pipeline, *none)) == list(range(10))


def test_nothing_left_is_an_error_and_no_obstacle(
    tmp_path: Path, pipeline: Path
) -> None:
    source = collection(tmp_path / "images", 3)
    wrong = r"no image was left, so nothing was written; see --min-size \(1000,"
    with pytest.raises(SystemExit, match=wrong):
        prepare(source, tmp_path / "a", pipeline, "--min-size", "1000")
    assert len(prepare(source, tmp_path / "a", pipeline)) == 3


def test_sizes_and_names_of_columns_of_its_own(tmp_path: Path, pipeline: Path) -> None:
    source = collection(
        tmp_path / "images",
        4,
        TEXT=["a", " ", None, "d"],
        WIDTH=[2000, 2000, 2000, 2000],
        HEIGHT=[1024, 1024, 1024, 1023],
    )
    sizes = ("--min-size", "1024", "--columns.width", "WIDTH")
    options = (*sizes, "--columns.height", "HEIGHT", "--columns.caption", "TEXT")
    shards = prepare(source, tmp_path / "latents", pipeline, *options)
    assert [item["captions"] for item in items(shards)] == ["a"]


def test_metadata_of_strings(tmp_path: Path, pipeline: Path) -> None:
    source = collection(tmp_path / "images", 4)
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "aesthetic", "unsafe"])
        writer.writerow(["part/00.png", "first", "5.5", "0"])
        writer.writerow(["part/01.png", "second", "5.49", "0"])
        writer.writerow(["part/02.png", "third", "7", "1"])
        writer.writerow(["part/03.png", "fourth", "6", "False"])
    shards = prepare(source, tmp_path / "a", pipeline, "--metadata", str(table))
    assert [item["captions"] for item in items(shards)] == ["first", "fourth"]


def test_captions_beside_images(tmp_path: Path, pipeline: Path, capsys) -> None:
    source = collection(tmp_path / "images", 5)
    (source / "metadata.jsonl").unlink()
    for i in (0, 2, 3):
        (source / f"part/{i:02d}.txt").write_text(f" picture {i}\n" if i else "\n")
    none = ("--min-aesthetic", "None", "--columns.unsafe", "None")
    shards = prepare(source, tmp_path / "latents", pipeline, *none)
    assert [item["captions"] for item in items(shards)] == ["picture 2", "picture 3"]
    assert rows(shards) == [2, 3]
    assert "left out 3 without a caption" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Without --metadata there are no scores"):
        prepare(source, tmp_path / "other", pipeline)


def test_an_interrupted_run_goes_on(tmp_path: Path, pipeline: Path) -> None:
    source = collection(tmp_path / "images", 11)
    prepare(source, tmp_path / "whole", pipeline)
    # It ends at a file that cannot be read, when two shards are on disk.
    good = (source / "part/09.png").read_bytes()
    (source / "part/09.png").write_bytes(good[:-40])
    with pytest.raises(SystemExit, match=r"09.png: .*leave such .*--on-bad skip"):
        prepare(source, tmp_path / "parts", pipeline)
    assert len(list((tmp_path / "parts").glob("shard-*"))) == 2
    (source / "part/09.png").write_bytes(good)
    for _ in range(2):
        prepare(source, tmp_path / "parts", pipeline)
        folders = [tmp_path / "whole", tmp_path / "parts"]
        contents = [{p.name: p.read_bytes() for p in f.iterdir()} for f in folders]
        assert contents[0] == contents[1]


def test_bad_images_are_named_and_skipped(tmp_path: Path, pipeline, capsys) -> None:
    source = collection(tmp_path / "images", 9)
    (source / "part/01.png").write_bytes(b"text")
    (source / "part/02.png").unlink()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(source / "part/04.png")
    picture(5).save(source / "part/05.png", "GIF")
    faults = {1: "cannot identify", 2: "No such file", 4: "mode I;16", 5: "cannot ide"}
    for _ in range(2):
        shards = prepare(source, tmp_path / "latents", pipeline, "--on-bad", "skip")
        assert rows(shards) == [0, 3, 6, 7, 8]
    output = "".join(capsys.readouterr())
    for i, fault in faults.items():
        assert f"Skipped {source}/part/{i:02d}.png: " in output
        assert fault in output
    assert "in this run: left out 4 unreadable" in output


def test_ranks_share_the_images(tmp_path: Path, pipeline: Path) -> None:
    source = collection(tmp_path / "images", 7)
    alone = prepare(source, tmp_path / "alone", pipeline, "--dtype", "fp32")
    share = ("--dtype", "fp32", "--ranks", "2", "--rank")
    with pytest.raises(ValueError, match=r"rank 0 of .* is not finished"):
        prepare(source, tmp_path / "shared", pipeline, *share, "1")
    shared = prepare(source, tmp_path / "shared", pipeline, *share, "0")
    assert rows(shared) == [0, 2, 4, 6, 1, 3, 5]
    for item in items(shared):
        other = alone[int(item["rows"])]
        assert item["captions"] == other["captions"]
        # Other images were beside it in its batch.
        torch.testing.assert_close(item["latents"], other["latents"])


def test_another_preparation_is_not_continued(tmp_path: Path, pipeline: Path) -> None:
    source, dest = collection(tmp_path / "images", 4), tmp_path / "latents"
    prepare(source, dest, pipeline)
    for other in (("--resolution", "40"), ("--seed", "1"), ("--dtype", "bf16")):
        with pytest.raises(SystemExit, match="was begun with"):
            prepare(source, dest, pipeline, *other)
    metadata = source / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture 3", "another"))
    with pytest.raises(SystemExit, match="was begun with"):
        prepare(source, dest, pipeline)


def test_latents_that_are_not_finite(tmp_path: Path, pipeline, monkeypatch) -> None:
    latents = torch.zeros(2, 4, 4, 4)
    latents[1, 0, 0, 0] = 1e6  # too large for fp16
    monkeypatch.setattr(script, "encode", lambda *_, **__: latents)
    with pytest.raises(SystemExit, match=r"01.png: its latent is not finite"):
        prepare(collection(tmp_path / "images", 2), tmp_path / "latents", pipeline)


# What diffusers asks of the hub's library is no longer known there.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resolution", "30"), "--resolution 30: expected a multiple of 8"),
        (("--shard-size", "3"), "--shard-size 3: expected a multiple of --batch-size"),
        (("--batch-size", "0"), "--batch-size 0: expected >= 1"),
        (("--workers", "-1"), "--workers -1: expected >= 0"),
        (("--rank", "1"), "--rank 1: expected 0 ... 0"),
        (("--pretrained", "nowhere/at-all"), "--pretrained nowhere/at-all: "),
        (("--pretrained", "/no/such/folder"), "--pretrained /no/such/folder: "),
        (("--subfolder", "no"), "--pretrained .*sd15: .*no"),
        (("--columns.width", "w"), "--columns.height: pass both or none"),
        (("--columns.caption", "text"), "no column 'text'; it has 'file_name'"),
        (("--metadata", "gone.csv"), "there is no file gone.csv"),
        (("--min-aesthetic", "7"), "no captioned image is left"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, pipeline, options, message: str) -> None:
    source = collection(tmp_path / "images", 1)
    with pytest.raises(SystemExit, match=message) as caught:
        prepare(source, tmp_path / "latents", pipeline, *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "latents").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, pipeline: Path) -> None:
    with pytest.raises(SystemExit, match="images: there is no such folder"):
        prepare(tmp_path / "images", tmp_path / "latents", pipeline)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (41, 16), (17, 16)])
def test_the_centre_is_kept(size: tuple[int, int]) -> None:
    # A ramp about the centre, which resizing leaves a ramp about zero.
    x, y = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size))
    ramp = np.stack([128 + 5 * x, 128 + 5 * y, 0 * x], axis=-1).clip(0, 255)
    image = Image.fromarray(ramp.round().astype(np.uint8))
    square = np.array(images_of.centre_square(image, 8)).astype(float)
    assert square.shape == (8, 8, 3)
    expected = 128 + 10 * (np.arange(8) - 3.5)
    # Away from the border, where the filter is cut off.
    assert np.abs(square[2:6, 2:6, 0] - expected[2:6]).max() <= 1.5
    assert np.abs(square[2:6, 2:6, 1] - expected[2:6, None]).max() <= 1.5


def test_images_are_turned_upright_and_laid_on_white(tmp_path: Path) -> None:
    upright = picture(3, (20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # it must be turned clockwise to be upright
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    turned = images_of.read_square(tmp_path / "turned.png", 20, 0)
    assert isinstance(turned, Tensor)
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), np.array(upright))
    for mode in ("RGBA", "LA"):
        clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0)).convert(mode)
        clear.save(tmp_path / f"{mode}.png")
        pixels = images_of.read_square(tmp_path / f"{mode}.png", 8, 0)
        assert isinstance(pixels, Tensor)
        assert (pixels == 255).all()
    assert images_of.read_square(tmp_path / "RGBA.png", 8, 20) is not None
    assert images_of.read_square(tmp_path / "RGBA.png", 8, 21) is None
