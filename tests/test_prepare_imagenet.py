import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import prepare_imagenet as script
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dmdkit.data import open_images

# Python 3.12 warns of forks beside threads, of which BLAS has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

DIGITS = load_digits(return_X_y=True)[0]
SCRIPT = Path(script.__file__)
ODD = {
    "n01/c_cmyk.JPEG": ("CMYK", "JPEG"),
    "n02/c_grey.JPEG": ("L", "JPEG"),
    "n02/d_png.JPEG": ("RGB", "PNG"),
    "n03/c_alpha.JPEG": ("RGBA", "PNG"),
}


def picture(i: int, size: tuple[int, int]) -> Image.Image:
    """A digit in a tint, enlarged to a size."""
    pixels = DIGITS[i].reshape(8, 8)
    tint = np.random.default_rng(i).uniform(0.3, 1, size=3)
    image = Image.fromarray((pixels[..., None] * tint * 255 / 16).astype(np.uint8))
    return image.resize(size, Image.Resampling.BICUBIC)


def tree(folder: Path, each: int = 5) -> Path:
    """Three class folders of JPEGs of many sizes, the odd ones of ImageNet too."""
    for label, name in enumerate(("n01", "n02", "n03")):
        (folder / name).mkdir(parents=True)
        for i in range(each + label):
            size = (20 + 7 * (i % 6), 33 - 2 * (i % 6))
            picture(10 * label + i, size).save(folder / name / f"a_{i}.JPEG")
    for i, (name, (mode, kind)) in enumerate(ODD.items()):
        picture(40 + i, (25, 20)).convert(mode).save(folder / name, kind)
    (folder / "n01" / "notes.txt").write_text("no image")
    return folder


def prepare(source: Path, dest: Path, **options) -> None:
    settings = {"resolution": 8, "workers": 0, **options}
    script.main(script.Settings(source=source, dest=dest, **settings))


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_halving_takes_means_of_boxes(halvings: int) -> None:
    # A checkerboard of +d and -d on every scale: the mean of any 2x2 box is exact.
    small = np.random.default_rng(0).integers(90, 160, (8, 8, 3))
    large = small
    for d in (10, 20, 40)[:halvings]:
        large = large.repeat(2, 0).repeat(2, 1)
        rows, columns = np.mgrid[: len(large), : len(large)]
        large = large + d * (1 - 2 * ((rows + columns) % 2)).reshape(*rows.shape, 1)
    image = Image.fromarray(large.astype(np.uint8))
    assert np.array_equal(np.array(script.centre_crop(image, 8)), small)


def test_halving_stops_below_twice_the_resolution() -> None:
    # 31 is not halved but resized at once; 32 is halved, and then as it should be.
    rng = np.random.default_rng(0)
    for size, halvings in ((31, 0), (32, 1), (63, 1), (64, 2)):
        image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        expected = image
        for _ in range(halvings):
            half = expected.width // 2
            expected = expected.resize((half, half), Image.Resampling.BOX)
        expected = expected.resize((16, 16), Image.Resampling.BICUBIC)
        assert script.centre_crop(image, 16).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(5, 9), (8, 8), (100, 37), (64, 500), (17, 16)])
def test_one_colour_stays(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 100, 250))
    cropped = script.centre_crop(image, 8)
    assert cropped.size == (8, 8)
    assert cropped.getcolors() == [(64, (10, 100, 250))]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_centre_is_kept(axis: int) -> None:
    # 8 x 15: what is left over is 7; 3 go before and 4 after.
    pixels = np.zeros((8, 15, 3), np.uint8)
    pixels[:, 3:11] = np.arange(1, 9)[:, None]
    image = Image.fromarray(pixels if axis else pixels.transpose(1, 0, 2).copy())
    cropped = np.array(script.centre_crop(image, 8))[..., 0]
    expected = np.tile(np.arange(1, 9), (8, 1))
    assert np.array_equal(cropped if axis else cropped.T, expected)


def test_a_marked_pixel_is_where_it_was() -> None:
    # Twice as large as it will be: halved, and the middle of the longer side cut out.
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[4:6, 26:28] = 200
    cropped = np.array(script.centre_crop(Image.fromarray(pixels), 8))
    assert (cropped[2, 5] == 200).all()
    assert (cropped.sum((1, 2)) > 0).tolist() == [False] * 2 + [True] + [False] * 5


@pytest.mark.parametrize("name", ["set", "set.zip", "set.ZIP"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_made_can_be_opened(tmp_path: Path, capsys, name: str, workers) -> None:
    source, dest = tree(tmp_path / "train"), tmp_path / "out" / name
    prepare(source, dest, workers=workers)
    images = open_images(dest, resolution=8, classes=3)
    files = sorted(p for p in source.glob("*/*.JPEG"))
    assert images.names == tuple(
        f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(files))
    )
    for i, file in enumerate(files):
        with Image.open(file) as image:
            expected = np.array(script.centre_crop(image.convert("RGB"), 8))
        pixels, label = images[i]
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert label == ["n01", "n02", "n03"].index(file.parent.name)
    assert os.listdir(dest.parent) == [name], "nothing else is left"
    out = capsys.readouterr().out
    assert f"{len(files)} images of 8x8, 3 classes of 6 to 8 images, 0 skipped" in out
    assert "ImageNet has 1000 classes, SOURCE has 3" in out


def test_a_folder_and_a_zip_hold_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path / "train")
    for name, workers in (("set", 2), ("a.zip", 0), ("b.zip", 2)):
        prepare(source, tmp_path / name, workers=workers)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.external_attr >> 16 == 0o644, "readable when extracted"
            assert (tmp_path / "set" / info.filename).read_bytes() == archive.read(info)
        names = archive.namelist()
    files = [p for p in (tmp_path / "set").rglob("*") if p.is_file()]
    assert len(files) == len(names)


def test_odd_files_are_made_rgb(tmp_path: Path) -> None:
    image = picture(0, (16, 16))
    expected = np.array(script.centre_crop(image, 8)).astype(int)
    for mode, kind in ODD.values():
        image.convert(mode).save(tmp_path / "x.JPEG", kind, quality=100)
        png = script.to_png(tmp_path / "x.JPEG", 8)
        assert isinstance(png, bytes)
        with Image.open(io.BytesIO(png)) as made:
            assert (made.mode, made.format) == ("RGB", "PNG")
            got = np.array(made).astype(int)
        if mode == "L":
            assert (got == got[..., :1]).all()
        else:
            assert np.abs(got - expected).max() < 12


def spoil(source: Path) -> list[Path]:
    bad = [source / "n01" / "b_text.JPEG", source / "n02" / "a_0.JPEG"]
    bad[0].write_text("this is no image")
    bad[1].write_bytes(bad[1].read_bytes()[:-200])
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(source / "n03" / "b.png")
    return [*bad, source / "n03" / "b.png"]


@pytest.mark.parametrize("name", ["set", "set.zip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files(tmp_path: Path, capfd, name: str, workers: int) -> None:
    source, dest = tree(tmp_path / "train"), tmp_path / name
    good = len(list(source.glob("*/*.JPEG")))
    bad = spoil(source)
    with pytest.raises(SystemExit, match=r"b_text.JPEG: cannot identify") as caught:
        prepare(source, dest, workers=workers)
    assert "\n" not in str(caught.value)
    assert "--on-bad skip" in str(caught.value)
    assert not dest.exists()
    prepare(source, dest, workers=workers, on_bad="skip")
    output = "".join(capfd.readouterr())
    for file, what in zip(bad, ("identify", "truncated", "mode I;16"), strict=True):
        assert f"Skipped {file}: " in output
        assert what in output
    assert "3 skipped" in output
    images = open_images(dest, resolution=8, classes=3)
    assert len(images) == good - 1
    # A name is the place among all files, so that it does not depend on the bad ones.
    left_out = sorted([*source.glob("*/*.JPEG"), bad[2]]).index(bad[0])
    assert f"00000/img{left_out:08d}.png" not in images.names


def command(source: Path, dest: Path, *options: str) -> list[str]:
    arguments = [str(source), str(dest), "--resolution", "8", "--workers", "1"]
    return [sys.executable, str(SCRIPT), *arguments, *options]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    source, dest = tree(tmp_path / "train", each=150), tmp_path / "set"
    partial = tmp_path / "set.partial"
    process = subprocess.Popen(
        command(source, dest), stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(list(partial.glob("*/img*.png"))) < 40:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not dest.exists()
    done = sorted(partial.glob("*/img*.png"))
    assert len(done) < 300
    kept, torn = done[0], done[1]
    before = kept.stat().st_mtime_ns
    torn.write_bytes(torn.read_bytes()[:-5])
    (partial / "00000" / ".img00000400.png").write_bytes(b"half")
    subprocess.run(command(source, dest), check=True, capture_output=True)
    assert not partial.exists()
    assert (dest / "00000" / kept.name).stat().st_mtime_ns == before, "kept"
    prepare(source, tmp_path / "whole")
    contents = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (dest, tmp_path / "whole")
    ]
    assert contents[0] == contents[1]


def test_what_was_begun_otherwise_is_not_continued(tmp_path: Path) -> None:
    source, dest = tree(tmp_path / "train"), tmp_path / "set"
    (source / "n03" / "z.JPEG").write_text("no image")
    for options in ({"resolution": 8}, {"resolution": 9}):
        with pytest.raises(SystemExit) as caught:
            prepare(source, dest, **options)
    assert "was begun for" in str(caught.value)
    (source / "n03" / "z.JPEG").unlink()
    with pytest.raises(SystemExit, match="was begun for"):
        prepare(source, dest)
    assert json.loads((tmp_path / "set.partial" / "plan.json").read_text())


def test_sources_and_targets_that_are_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "train")
    with pytest.raises(SystemExit, match="no such folder"):
        prepare(tmp_path / "nowhere", tmp_path / "set")
    with pytest.raises(SystemExit, match="no class folders"):
        prepare(source / "n01", tmp_path / "set")
    for made in (source, source / "n01" / "notes.txt"):
        with pytest.raises(SystemExit, match="exists"):
            prepare(source, made)
    with pytest.raises(SystemExit, match="lies in SOURCE"):
        prepare(source, source / "small")
    for option, value in (("workers", -1), ("resolution", 0)):
        with pytest.raises(SystemExit, match=f"--{option} {value}"):
            prepare(source, tmp_path / "set", **{option: value})
    (source / "n04").mkdir()
    with pytest.raises(SystemExit, match="n04 holds no images"):
        prepare(source, tmp_path / "set")
    assert os.listdir(tmp_path) == ["train"]


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "nowhere", tmp_path / "set"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr
