"""COCO's evaluation sets from a tiny COCO of the same layout."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import coco_captions
import numpy as np
import prepare_coco as script
import pytest
from coco_captions import Caption, draw_pairs, draw_prompts, read_captions
from PIL import Image
from torchvision.transforms import CenterCrop

from dmdkit.data import open_images, read_prompts
from dmdkit.metrics import centre_crop, lanczos_resize

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

COUNT = 30
SIZES = ((323, 240), (241, 333), (300, 403), (280, 300), (64, 90), (256, 256))
# Drawn from the captions below by pandas 3.1.1 with NumPy's seed 123, in the steps of
# the official script: merge, sample(frac=1), drop_duplicates, sample(10).
BY_PANDAS = [1060, 1078, 1035, 1131, 1121, 1136, 1074, 1046, 1085, 1108]


def annotations() -> dict[str, list[dict[str, Any]]]:
    """Five captions of each of 30 images; neither is in the order of its ids."""
    rng = np.random.RandomState(5)
    ids = [100 + 7 * int(i) for i in rng.permutation(COUNT)]
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in ids]
    captions = [
        {"image_id": image, "id": 1000 + k, "caption": f"Caption {k} of {image}. "}
        for k, image in enumerate(i for i in ids for _ in range(5))
    ]
    shuffled = [captions[i] for i in rng.permutation(len(captions))]
    return {"images": images, "annotations": shuffled}


def picture(i: int) -> Image.Image:
    width, height = SIZES[i % len(SIZES)]
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("L") if i == 3 else image


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's two zips, and the same unpacked."""
    top = tmp_path_factory.mktemp("coco")
    content = annotations()
    (top / "annotations").mkdir()
    (top / "val2014").mkdir()
    file = top / "annotations" / coco_captions.CAPTIONS
    file.write_text(json.dumps(content))
    (top / "annotations" / "instances_val2014.json").write_text("{}")
    for i, image in enumerate(content["images"]):
        picture(i).save(top / "val2014" / image["file_name"], "JPEG", quality=90)
    for name, folder in (
        ("annotations_trainval2014.zip", "annotations"),
        ("val2014.zip", "val2014"),
    ):
        with zipfile.ZipFile(top / name, "w") as archive:
            for path in sorted((top / folder).iterdir()):
                archive.write(path, f"{folder}/{path.name}")
    return top


def prepare(coco: Path, out: Path, **options: Any) -> Path:
    settings = {
        "captions": coco / "annotations_trainval2014.zip",
        "images": coco / "val2014.zip",
        **{"references": COUNT, "prompts": 12, "pairs": 10, "workers": 0},
        **options,
    }
    script.main(script.Settings(out=out, **settings))
    return out


@pytest.fixture(scope="module")
def made(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(coco, tmp_path_factory.mktemp("made") / "out")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- which captions


def test_pairs_are_those_that_pandas_draws(coco: Path) -> None:
    _, captions = read_captions(coco / "annotations" / coco_captions.CAPTIONS)
    drawn = draw_pairs(captions, 10, 123)
    assert [caption.caption_id for caption in drawn] == BY_PANDAS


def test_captions_are_in_the_order_of_the_file(coco: Path) -> None:
    data, captions = read_captions(coco / "annotations_trainval2014.zip")
    content = json.loads(data)
    assert [found[0].coco_file for found in captions] == [
        image["file_name"] for image in content["images"]
    ]
    for image, found in zip(content["images"], captions, strict=True):
        of_image = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert [c.caption_id for c in found] == [a["id"] for a in of_image]
        assert [c.prompt for c in found] == [a["caption"] for a in of_image]


@pytest.mark.parametrize("draw", [draw_prompts, draw_pairs])
def test_images_are_drawn_once_and_everything_alike_often(draw) -> None:
    captions = [
        [Caption(f"{i} {j}", 3 * i + j, str(i)) for j in range(3)] for i in range(4)
    ]
    counts, first = np.zeros(12), np.zeros(4)
    for seed in range(600):
        drawn = draw(captions, 3, seed)
        assert len({caption.coco_file for caption in drawn}) == 3
        assert drawn == draw(captions, 3, seed)
        counts[[caption.caption_id for caption in drawn]] += 1
        first[int(drawn[0].coco_file)] += 1
    assert np.abs(counts - 150).max() < 50, "150 expected, deviation 11"
    assert np.abs(first - 150).max() < 50


# -- what is made


def test_prompts(made: Path, coco: Path) -> None:
    by_id = {a["id"]: a for a in annotations()["annotations"]}
    prompts, pairs = (
        rows(made / name / "prompts.jsonl") for name in ("coco30k", "coco10k")
    )
    assert len(prompts) == 12
    assert [row["caption_id"] for row in pairs] == BY_PANDAS
    for row in (*prompts, *pairs):
        caption = by_id[row["caption_id"]]
        assert row["prompt"] == caption["caption"]
        assert row["coco_file"] == f"COCO_val2014_{caption['image_id']:012d}.jpg"
    read = read_prompts(made / "coco10k" / "prompts.jsonl")
    assert list(read) == [row["prompt"].strip() for row in pairs]


def test_pairs_have_the_image_of_their_prompt(made: Path, coco: Path) -> None:
    folder = made / "coco10k" / "images"
    pairs = rows(made / "coco10k" / "prompts.jsonl")
    assert sorted(p.name for p in folder.iterdir()) == [row["file"] for row in pairs]
    for row in pairs:
        original = (coco / "val2014" / row["coco_file"]).read_bytes()
        assert (folder / row["file"]).read_bytes() == original


def test_references_are_cropped_and_resized(made: Path, coco: Path) -> None:
    images = open_images(made / "coco30k" / "references", resolution=256)
    assert len(images) == COUNT
    for i, name in enumerate(images.names):
        # As the official code does, with torchvision and PIL alone.
        with Image.open(coco / "val2014" / f"{Path(name).stem}.jpg") as image:
            rgb = image.convert("RGB")
        square = CenterCrop(min(rgb.size))(rgb)
        expected = square.resize((256, 256), Image.Resampling.LANCZOS)
        pixels = images[i].pixels
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
        again = lanczos_resize(centre_crop(pixels[None]), 256)[0]
        assert again.equal(pixels), "the protocol leaves it as it is"


def test_checksums_and_seeds_are_recorded(made: Path, coco: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    lines = (made / "SHA256SUMS").read_text().splitlines()
    sums = {name: found for found, name in (line.split("  ") for line in lines)}
    files = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    assert sums.keys() == files - {"SHA256SUMS", "coco.json"}
    assert len(sums) == COUNT + 10 + 2
    assert all(digest(made / name) == found for name, found in sums.items())
    about = json.loads((made / "coco.json").read_text())
    captions = coco / "annotations" / coco_captions.CAPTIONS
    assert about["captions"]["sha256"] == digest(captions)
    assert about["sha256sums"] == digest(made / "SHA256SUMS")
    assert about["pairs"] == {
        "count": 10,
        "seed": 123,
        "sha256": sums["coco10k/prompts.jsonl"],
    }
    assert about["prompts"]["seed"] == 0
    assert about["prompts"]["sha256"] == sums["coco30k/prompts.jsonl"]


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_and_zips_give_the_same(
    made: Path, coco: Path, tmp_path: Path, workers: int, capsys
) -> None:
    options = {
        "captions": coco / "annotations" / coco_captions.CAPTIONS,
        "images": coco / "val2014",
    }
    out = prepare(coco, tmp_path / "out", workers=workers, **options)
    for name in ("SHA256SUMS", "coco.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    said = capsys.readouterr().out
    assert "30 references of 256x256, 12 prompts, 10 pairs of prompt and image" in said
    assert "the paper has 30000 prompts, here are 12" in said
    assert "the prompts of coco30k were drawn here" in said


def test_seeds(made: Path, coco: Path, tmp_path: Path) -> None:
    out = prepare(coco, tmp_path / "out", seed=1, pairs_seed=4)
    for name in ("coco30k", "coco10k"):
        one, other = (rows(top / name / "prompts.jsonl") for top in (made, out))
        assert [r["caption_id"] for r in one] != [r["caption_id"] for r in other]


def test_prompts_of_ones_own(made: Path, coco: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "captions_coco14_test.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(40)))
    with pytest.raises(SystemExit, match="holds 40 prompts, --prompts says 12"):
        prepare(coco, tmp_path / "out", prompt_file=file)
    out = prepare(coco, tmp_path / "out", prompt_file=file, prompts=40)
    found = rows(out / "coco30k" / "prompts.jsonl")
    assert found == [{"prompt": f"prompt {i}"} for i in range(40)]
    about = json.loads((out / "coco.json").read_text())
    assert about["prompts"]["file"] == file.name
    assert about["prompts"]["seed"] is None
    pairs = "coco10k/prompts.jsonl"
    assert (out / pairs).read_bytes() == (made / pairs).read_bytes()
    assert "--prompt-file" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--prompt-file: .*there is no file"):
        prepare(coco, tmp_path / "b", prompt_file=tmp_path / "nowhere.txt")


# -- what goes wrong


def spoiled(coco: Path, top: Path) -> Path:
    """The images as a folder of links, so that one can be replaced."""
    folder = top / "images"
    folder.mkdir()
    for path in (coco / "val2014").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_it_and_the_same_command_goes_on(
    made: Path, coco: Path, tmp_path: Path, workers: int
) -> None:
    images, out = spoiled(coco, tmp_path), tmp_path / "out"
    bad = images / annotations()["images"][17]["file_name"]
    whole = bad.read_bytes()
    bad.unlink()
    for content, message in (
        (b"this is no image", "cannot identify image file"),
        (whole[: len(whole) // 2], "truncated"),
    ):
        bad.write_bytes(content)
        with pytest.raises(SystemExit, match=f"{bad.name}: .*{message}") as caught:
            prepare(coco, out, images=images, workers=workers)
        assert "\n" not in str(caught.value)
        assert not out.exists()
    done = sorted((tmp_path / "out.partial" / "coco30k/references").glob("C*.png"))
    assert done
    assert len(done) < COUNT
    before = done[0].stat().st_mtime_ns
    done[-1].write_bytes(done[-1].read_bytes()[:-3])  # torn
    bad.write_bytes(whole)
    prepare(coco, out, images=images, workers=workers)
    assert (out / "coco30k/references" / done[0].name).stat().st_mtime_ns == before
    assert (out / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p != images] == ["out"]


def test_a_zip_whose_bytes_changed(coco: Path, tmp_path: Path) -> None:
    data = bytearray((coco / "val2014.zip").read_bytes())
    name = annotations()["images"][4]["file_name"]
    with zipfile.ZipFile(coco / "val2014.zip") as archive:
        start = archive.getinfo(f"val2014/{name}").header_offset
    data[start + 400] ^= 255
    (tmp_path / "val2014.zip").write_bytes(data)
    with pytest.raises(SystemExit, match=f"val2014/{name}: Bad CRC-32"):
        prepare(coco, tmp_path / "out", images=tmp_path / "val2014.zip")


def test_what_was_begun_otherwise_is_not_continued(coco: Path, tmp_path: Path) -> None:
    images, out = spoiled(coco, tmp_path), tmp_path / "out"
    bad = images / annotations()["images"][17]["file_name"]
    bad.unlink()
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="cannot identify"):
        prepare(coco, out, images=images)
    with pytest.raises(SystemExit, match="was begun for") as caught:
        prepare(coco, out, images=images, pairs=9)
    assert "\n" not in str(caught.value)


def test_captions_that_are_refused(coco: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(SystemExit, match=message) as caught:
            prepare(coco, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))

    def changed(change) -> Path:
        content = annotations()
        change(content)
        file = tmp_path / coco_captions.CAPTIONS
        file.write_text(json.dumps(content))
        return file

    first = annotations()["images"][0]
    for change, message in (
        (lambda c: c["images"].pop(), "is of no image: "),
        (lambda c: c["annotations"].clear(), f"{first['file_name']} has no caption"),
        (lambda c: c["images"].append(first), "1 images twice"),
        (lambda c: c["annotations"][0].pop("caption"), "no 'caption'; expected COCO's"),
        (lambda c: c.pop("images"), "no 'images'"),
        (lambda c: c["annotations"][0].update(caption=3), "is no text"),
        (lambda c: [a.update(caption=" ") for a in c["annotations"]], "is blank"),
    ):
        refused(message, captions=changed(change))
    (tmp_path / coco_captions.CAPTIONS).write_text("{")
    refused("CAPTIONS .*Expecting", captions=tmp_path / coco_captions.CAPTIONS)
    refused("no such file", captions=tmp_path / "nowhere.json")
    refused("no folder and no zip", captions=tmp_path / "nowhere.zip")
    refused("holds 0 files captions_val2014.json", captions=coco / "val2014.zip")
    refused("of 30 images, --references says 40504", references=40_504)
    refused("--prompts 31: there are 30 images", prompts=31)
    refused("--pairs 31: there are 30 images", pairs=31)
    for option in ("references", "prompts", "pairs"):
        refused(f"--{option} 0: expected >= 1", **{option: 0})
    refused("--pairs-seed -1", pairs_seed=-1)
    refused("--workers -1", workers=-1)


def test_images_that_are_refused(coco: Path, tmp_path: Path) -> None:
    def refused(message: str, images: Path) -> None:
        with pytest.raises(SystemExit, match=message):
            prepare(coco, tmp_path / "out", images=images)

    (tmp_path / "empty").mkdir()
    refused("30 of 30 images are missing, such as COCO_val2014_", tmp_path / "empty")
    images = spoiled(coco, tmp_path)
    next(images.iterdir()).unlink()
    refused("1 of 30 images are missing", images)
    refused("IMAGES: there is no folder and no zip file", tmp_path / "nowhere.zip")
    (tmp_path / "half.zip").write_bytes((coco / "val2014.zip").read_bytes()[:9999])
    refused("no zip file, or an incomplete one", tmp_path / "half.zip")
    with pytest.raises(SystemExit, match=r"OUT .* exists"):
        prepare(coco, tmp_path / "empty")


def test_the_command(coco: Path, tmp_path: Path) -> None:
    arguments = [coco / "annotations_trainval2014.zip", coco / "val2014.zip"]
    done = subprocess.run(
        [sys.executable, script.__file__, *map(str, arguments), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "of 30 images, --references says 40504" in done.stderr
