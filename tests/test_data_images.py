import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_script import as_in_a_script
from PIL import Image
from sklearn.datasets import load_digits

from dmdkit.data import BadImageError, ImageDataset, open_images

COUNT = 12


def digits() -> tuple[list[np.ndarray], list[int]]:
    """Digits in ten tints, 8x8 RGB, and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    grey = pixels[:COUNT].reshape(-1, 8, 8, 1) / 16
    tints = np.random.default_rng(0).uniform(0.2, 1, size=(COUNT, 1, 1, 3))
    images = (255 * grey * tints).round().astype(np.uint8)
    return list(images), [int(c) for c in classes[:COUNT]]


def png(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def edm_files() -> dict[str, bytes]:
    """The content of a data set in EDM's format, in two subfolders."""
    images, labels = digits()
    names = [f"{i // 8:05d}/img{i:08d}.png" for i in range(COUNT)]
    # In no order: a label belongs to its name, not to its place in the list.
    entries = [[n, c] for n, c in zip(names, labels, strict=True)][::-1]
    files = dict(zip(names, map(png, images), strict=True))
    return {**files, "dataset.json": json.dumps({"labels": entries}).encode()}


def write(files: dict[str, bytes], path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def items(images: ImageDataset) -> list[tuple[list, int]]:
    return [(images[i].pixels.tolist(), images[i].label) for i in range(len(images))]


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_edm_sets_give_back_what_was_stored(tmp_path: Path, name: str) -> None:
    images = open_images(write(edm_files(), tmp_path / name), classes=10)
    pixels, labels = digits()
    assert len(images) == COUNT
    assert (images.resolution, images.channels) == (8, 3)
    assert list(images.labels) == labels
    for i, (expected, c) in enumerate(zip(pixels, labels, strict=True)):
        got, label = images[i]
        assert got.dtype == torch.uint8
        assert torch.equal(got, torch.from_numpy(expected).permute(2, 0, 1))
        assert label == c


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_a_tree_of_classes_is_numbered_by_alphabet(tmp_path: Path, name: str) -> None:
    images, _ = digits()
    files = {
        "n02/b.webp": png(images[2], "WEBP", lossless=True),
        "n01/z.png": png(images[1]),
        "n10/deeper/c.PNG": png(images[3]),
        "n01/a.png": png(images[0]),
        "n01/.hidden.png": b"",
        "__MACOSX/n01/a.png": b"",
        "README.txt": b"not an image",
    }
    found = open_images(write(files, tmp_path / name), classes=3)
    assert list(found.labels) == [0, 0, 1, 2]
    for i in range(len(found)):
        expected = torch.from_numpy(images[i]).permute(2, 0, 1)
        assert torch.equal(found[i].pixels, expected)


def test_a_tree_is_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    pixels, labels = digits()
    files = {
        f"{c}/{i}.png": png(p)
        for i, (p, c) in enumerate(zip(pixels, labels, strict=True))
    }
    write(files, tmp_path)
    ours, theirs = open_images(tmp_path), ImageFolder(str(tmp_path))
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        (pixels, label), (image, expected) = ours[i], theirs[i]
        assert label == expected
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize("labels", [None, "absent"])
def test_a_set_without_labels(tmp_path: Path, labels: str | None) -> None:
    files = {f"{i}.png": png(image) for i, image in enumerate(digits()[0])}
    if labels is None:
        files["dataset.json"] = b'{"labels": null}'
    write(files, tmp_path)
    images = open_images(tmp_path)
    assert len(images) == COUNT
    assert set(images.labels) == {-1}
    with pytest.raises(ValueError, match="has no labels, expected 10 classes"):
        open_images(tmp_path, classes=10, on_bad="skip")


def test_grey_images(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    write({"a.png": png(grey)}, tmp_path)
    pixels, _ = open_images(tmp_path, channels=1)[0]
    assert torch.equal(pixels, torch.from_numpy(grey)[None])


def test_a_zip_is_opened_once_a_process(tmp_path: Path, monkeypatch) -> None:
    images = open_images(write(edm_files(), tmp_path / "set.zip"), resolution=8)
    images = pickle.loads(pickle.dumps(images))
    opened: list[zipfile.ZipFile] = []

    class Watched(zipfile.ZipFile):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr("zipfile.ZipFile", Watched)
    expected = items(images)
    assert len(opened) == 1, "lazily, and then kept"
    # A forked child has its parent's handle, and with it the parent's file position.
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert items(images) == expected
    assert len(opened) == 2


def spoiled() -> dict[str, tuple[bytes, str]]:
    """Files that are no 8x8 RGB images, and what is to be said of them."""
    good = png(digits()[0][0])
    rgb = np.zeros((8, 8, 3), np.uint8)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    frames = [Image.fromarray(rgb + i) for i in (0, 9)]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    palette = io.BytesIO()
    Image.fromarray(rgb).convert("P").save(palette, "PNG")
    return {
        "truncated": (good[:-30], "truncated"),
        "header": (good[:20], "Truncated"),
        "bit": (bytes(flipped), "broken"),
        "empty": (b"", "identify"),
        "text": (b"this is no image", "identify"),
        "gif": (png(rgb, "GIF"), "identify"),
        "large": (png(np.zeros((9, 9, 3), np.uint8)), "9x9 pixels, expected 8x8"),
        "oblong": (png(np.zeros((8, 9, 3), np.uint8)), "9x8 pixels, expected 8x8"),
        "grey": (png(rgb[..., 0]), "mode L, expected RGB"),
        "deep": (png(rgb[..., 0].astype(np.uint16)), "mode I;16, expected RGB"),
        "bilevel": (png(rgb[..., 0] > 0), "mode 1, expected RGB"),
        "alpha": (png(np.zeros((8, 8, 4), np.uint8)), "mode RGBA, expected RGB"),
        "palette": (palette.getvalue(), "mode P, expected RGB"),
        "animated": (animated.getvalue(), "mode RGB|2 frames, expected one"),
    }


@pytest.mark.parametrize("kind", spoiled())
@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_a_bad_image_is_never_given(tmp_path: Path, name: str, kind: str) -> None:
    files = edm_files()
    bad = "00000/img00000003.png"
    files[bad], what = spoiled()[kind]
    path = write(files, tmp_path / name)
    refusing = open_images(path, resolution=8, classes=10)
    with pytest.raises(BadImageError, match=what) as caught:
        refusing[3]
    assert bad in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)
    others = items(open_images(write(edm_files(), tmp_path / "good")))
    skipping = open_images(path, resolution=8, classes=10, on_bad="skip")
    with pytest.warns(UserWarning, match=what) as warned:
        pixels, label = skipping[3]
    assert bad in str(warned[0].message)
    assert (pixels.tolist(), label) == others[4]
    for i in {*range(COUNT)} - {3}:
        for images in (refusing, skipping):
            assert (images[i][0].tolist(), images[i][1]) == others[i]


def test_after_the_last_comes_the_first(tmp_path: Path) -> None:
    files = edm_files()
    good = items(open_images(write(files, tmp_path / "good")))
    for i in (COUNT - 2, COUNT - 1, 0):
        files[f"{i // 8:05d}/img{i:08d}.png"] = b"spoiled"
    images = open_images(
        write(files, tmp_path / "set.zip"), resolution=8, on_bad="skip"
    )
    with pytest.warns(UserWarning, match="next one takes its place"):
        pixels, label = images[COUNT - 2]
    assert (pixels.tolist(), label) == good[1]


def test_a_set_of_bad_images_ends(tmp_path: Path) -> None:
    write({"a.png": b"", "b.png": b""}, tmp_path)
    images = open_images(tmp_path, resolution=8, on_bad="skip")
    expected = pytest.raises(ValueError, match="no good image")
    with pytest.warns(UserWarning, match="identify"), expected:
        images[1]


def test_the_first_good_image_gives_the_resolution(tmp_path: Path) -> None:
    size = [np.zeros((n, n, 3), np.uint8) for n in (6, 8)]
    write({"a.png": b"", "b.png": png(size[0]), "c.png": png(size[1])}, tmp_path)
    with pytest.raises(ValueError, match=r"a\.png"):
        open_images(tmp_path)
    with pytest.warns(UserWarning, match=r"a\.png"):
        images = open_images(tmp_path, on_bad="skip")
    assert images.resolution == 6
    with pytest.warns(UserWarning, match=r"c\.png.*8x8.*expected 6x6|a\.png") as warned:
        images[2]
    assert len(warned) == 2


def test_a_file_that_went_away_is_a_bad_image(tmp_path: Path) -> None:
    write(edm_files(), tmp_path)
    images = open_images(tmp_path)
    (tmp_path / images.names[5]).unlink()
    with pytest.raises(BadImageError, match="img00000005"):
        images[5]


def test_a_chunk_that_is_none_is_noticed(tmp_path: Path) -> None:
    # Large enough for two chunks; Pillow has another error for the second one's type.
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = bytearray(png(pixels))
    data[data.rindex(b"IDAT")] ^= 128
    write({"a.png": bytes(data)}, tmp_path)
    with pytest.raises(BadImageError, match=r"a\.png: broken PNG"):
        open_images(tmp_path)


def test_a_damaged_zip_is_noticed(tmp_path: Path) -> None:
    path = write(edm_files(), tmp_path / "set.zip")
    images = open_images(path, resolution=8)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(images.names[2])
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 50] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadImageError, match=r"img00000002.*CRC"):
        images[2]
    path.write_bytes(bytes(data[:-10]))
    with pytest.raises(ValueError, match="incomplete"):
        open_images(path)


def relabelled(change: dict[str, Any], **extra: bytes) -> dict[str, bytes]:
    """EDM's set with some entries changed; the key `k` means the k-th image."""
    files = edm_files()
    entries = dict(json.loads(files["dataset.json"])["labels"])
    for key, label in change.items():
        name = f"00000/img0000000{key}.png" if len(key) == 1 else key
        entries.pop(name, None)
        if label != "remove":
            entries[name] = label
    labels = json.dumps({"labels": [*map(list, entries.items())]}).encode()
    return {**files, "dataset.json": labels, **extra}


FAULTS = {
    "unlabelled": ({"3": "remove"}, "1 without a label (00000/img00000003.png)", {3}),
    "missing": ({"nowhere.png": 1}, "1 labelled but not there as images", set()),
    "fraction": ({"3": 1.5}, "no whole number (00000/img00000003.png: 1.5)", {3}),
    "text": ({"3": "1"}, "no whole number (00000/img00000003.png: '1')", {3}),
    "truth": ({"3": True}, "no whole number (00000/img00000003.png: True)", {3}),
    "one-hot": ({"3": [0, 1]}, "no whole number (00000/img00000003.png: [0, 1])", {3}),
    "negative": ({"3": -1}, "1 with a negative label (00000/img00000003.png: -1)", {3}),
    "large": (
        {"3": 10},
        "1 with a label not below 10 (00000/img00000003.png: 10)",
        {3},
    ),
    "many": (
        dict.fromkeys("23456", "remove"),
        "5 without a label (00000/img00000002.png, 00000/img00000003.png, "
        "00000/img00000004.png, ...)",
        {2, 3, 4, 5, 6},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_labels_at_fault(tmp_path: Path, name: str, fault: str) -> None:
    change, what, out = FAULTS[fault]
    path = write(relabelled(change), tmp_path / name)
    with pytest.raises(ValueError, match="faults in") as caught:
        open_images(path, classes=10)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="left out") as warned:
        images = open_images(path, classes=10, on_bad="skip")
    assert what in str(warned[0].message)
    good = items(open_images(write(edm_files(), tmp_path / "good")))
    assert items(images) == [x for i, x in enumerate(good) if i not in out]


def test_an_image_labelled_twice(tmp_path: Path) -> None:
    files = edm_files()
    entries = json.loads(files["dataset.json"])["labels"]
    files["dataset.json"] = json.dumps({"labels": [*entries, entries[2]]}).encode()
    write(files, tmp_path)
    with pytest.raises(ValueError, match="1 labelled twice"):
        open_images(tmp_path)
    with pytest.warns(UserWarning, match="1 labelled twice"):
        images = open_images(tmp_path, on_bad="skip")
    assert len(images) == COUNT - 1
    assert entries[2][0] not in images.names


def test_an_image_stored_twice(tmp_path: Path) -> None:
    path = write(edm_files(), tmp_path / "set.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(match="Dup"):
        archive.writestr("00000/img00000001.png", png(digits()[0][5]))
    with pytest.raises(ValueError, match="1 stored twice"):
        open_images(path)
    with pytest.warns(UserWarning, match="1 stored twice") as warned:
        images = open_images(path, on_bad="skip")
    assert "not there" not in str(warned[0].message)
    assert len(images) == COUNT - 1


def test_an_image_of_a_tree_stored_twice(tmp_path: Path) -> None:
    image = png(digits()[0][0])
    path = write({"a/1.png": image, "b/1.png": image}, tmp_path / "set.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/2.png", image)
        with pytest.warns(match="Duplicate"):
            archive.writestr("a/1.png", png(digits()[0][5]))
    with pytest.warns(UserWarning, match=r"1 stored twice \(a/1\.png\)"):
        images = open_images(path, on_bad="skip")
    assert images.names == ("a/2.png", "b/1.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"[]", 'no "labels"'),
        (b'{"label": null}', 'no "labels"'),
        (b'{"labels": {"a.png": 1}}', "list of"),
        (b'{"labels": [["a.png"]]}', "list of"),
        (b'{"labels": [[1, "a.png"]]}', "list of"),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)
def test_label_files_that_are_none(tmp_path: Path, content: bytes, message) -> None:
    write({**edm_files(), "dataset.json": content}, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_images(tmp_path, on_bad="skip")
    assert "dataset.json" in str(caught.value)


def test_trees_at_fault(tmp_path: Path) -> None:
    image = png(digits()[0][0])
    write({"a/1.png": image, "c/1.png": image, "stray.png": image}, tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no class folder \(stray.png\).*\(b\)"):
        open_images(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        images = open_images(tmp_path, classes=3, on_bad="skip")
    assert list(images.labels) == [0, 2], "an empty class keeps its number"
    with pytest.raises(ValueError, match="3 class folders, expected 4"):
        open_images(tmp_path, classes=4, on_bad="skip")


@pytest.mark.parametrize("name", ["set", "set.zip"])
@pytest.mark.parametrize("labels", [b'{"labels": null}', b'{"labels": []}'])
def test_empty_sets(tmp_path: Path, name: str, labels: bytes) -> None:
    path = write({"dataset.json": labels}, tmp_path / name)
    with pytest.raises(ValueError, match="holds no image"):
        open_images(path)


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder and no zip"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "a.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="is no zip file"):
        open_images(tmp_path / "a.zip")


@pytest.mark.parametrize(
    "wrong", [{"resolution": 0}, {"classes": 0}, {"channels": 4}, {"on_bad": "ignore"}]
)
def test_arguments_out_of_range(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write(edm_files(), tmp_path)
    with as_in_a_script(), pytest.raises(ValueError, match=next(iter(wrong))):
        open_images(tmp_path, **wrong)


def test_indices_out_of_range(tmp_path: Path) -> None:
    images = open_images(write(edm_files(), tmp_path / "set"))
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=str(index)):
            images[index]
