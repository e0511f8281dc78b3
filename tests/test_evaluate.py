"""`evaluate.py` end to end: digits, tiny networks by every protocol, and refusals."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import evaluate_protocols
import numpy as np
import pytest
import torch
import tyro
from digits_common import FEATURES, load_classifier, load_digits, load_teacher
from evaluate_baselines import BASELINES, published
from evaluate_images import ArrayImages
from evaluate_loop import KeptRows, rows_in_order
from evaluate_models import Model, calls_of, seconds_an_image
from evaluate_protocols import PROTOCOLS
from evaluate_report import commit
from evaluate_settings import SamplerName, Settings
from helpers_evaluate import TINY, corners, read, refused, run, save_photos
from helpers_recipes import save_adm_teacher
from PIL import Image
from runs import run_evaluation, to_pixels
from test_parallel_recipes import EXAMPLES, torchrun
from torch import Tensor

from dmdkit import (
    BackwardSimulator,
    FeatureStatistics,
    HeunSampler,
    StochasticSampler,
    frechet_distance,
    karras_sigmas,
)
from dmdkit.adapters.folders import load_denoiser, save_denoiser
from dmdkit.metrics import (
    CallableFeatures,
    density_coverage,
    precision_recall,
    prepare_images,
)

FAST = ["--device", "cpu", "--batch-size", "16"]
SMALL = [*FAST, "--protocol", "digits", "--count", "80"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one call: the teacher itself, which is a bad one."""
    folder = tmp_path_factory.mktemp("student") / "student"
    save_denoiser(folder, load_teacher(), times=(80.0,))
    return folder


@pytest.fixture(scope="module")
def measured(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the student, with everything that digits can say."""
    file = tmp_path_factory.mktemp("measured") / "result.json"
    run(*SMALL, *EXTRAS, "--student", student, "--json", file)
    return file


EXTRAS = ["--accuracy", "--precision-recall", "--density-coverage"]


# Digits, end to end


@torch.no_grad()
def by_hand(seed: int, count: int = 80) -> tuple[Tensor, Tensor]:
    """The features of the student's images, and of the real ones."""
    noise = torch.stack(
        [
            torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed + i))
            for i in range(count)
        ]
    )
    labels = torch.arange(count) % 10
    images = BackwardSimulator((80.0,)).sample(load_teacher(), noise, labels)
    classifier = load_classifier()
    return tuple(
        classifier.features(to_pixels(x).float() / 127.5 - 1)
        for x in (images, load_digits()[0].images)
    )  # pyright: ignore[reportReturnType]


def test_a_student_s_numbers_are_those_by_hand(measured: Path) -> None:
    content = read(measured)
    result = content["results"]["digits"]
    assert [row["value"] for row in result["by_set"]] == [
        result["single"],
        *(row["value"] for row in result["by_set"][1:]),
    ]
    distances = []
    for seed, row in zip((0, 5000, 10_000), result["by_set"], strict=True):
        samples, real = by_hand(seed)
        statistics = [FeatureStatistics(FEATURES) for _ in range(2)]
        for of, features in zip(statistics, (samples, real), strict=True):
            of.update(features)
        distances.append(frechet_distance(*statistics))
        assert row["value"] == pytest.approx(distances[-1], rel=1e-3)
        logits = load_classifier().classify(samples.relu())
        right = logits.argmax(1) == torch.arange(80) % 10
        assert row["accuracy"] == pytest.approx(right.float().mean().item())
        wanted = precision_recall(samples, real)._asdict()
        wanted |= density_coverage(samples, real)._asdict()
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=0.02)
    assert result["minimum"] == pytest.approx(min(distances), rel=1e-3)
    assert result["mean"] == pytest.approx(sum(distances) / 3, rel=1e-3)
    assert (result["samples"], result["samples_expected"]) == (80, 5000)
    assert (result["reference"], result["comparable"]) == (1437, False)


def test_a_result_says_everything_to_repeat_it(measured: Path, student: Path) -> None:
    content = read(measured)
    assert content["settings"]["student"] == str(student)
    assert content["protocols"]["digits"]["seeds"] == [0, 5000, 10_000]
    assert content["networks"][0]["name"].startswith("digits classifier (sha256 ")
    assert content["model"]["weights"].startswith("sha256:")
    assert content["model"]["calls"] == 1
    assert content["versions"]["torch"] == torch.__version__
    assert content["commit"] is None or len(content["commit"].split()[0]) == 40
    assert commit() == content["commit"]
    assert not list(measured.parent.glob("*.partial"))


def test_it_is_repeated_to_the_same_numbers(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--repeat", measured, "--json", tmp_path / "again.json", "--device", "cpu")
    assert f"The same numbers as in {measured}" in capsys.readouterr().out
    assert read(tmp_path / "again.json")["results"] == read(measured)["results"]
    content = read(measured)
    content["results"]["digits"]["single"] *= 1 + 1e-9
    content["versions"]["torch"] = "1.0"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as error:
        run("--repeat", tmp_path / "other.json", "--device", "cpu")
    assert error.value.code == 1
    said = capsys.readouterr().out
    assert "Another number: digits.single: " in said
    assert "(1.0e-09 of it)" in said
    assert "Changed: versions.torch: 1.0 before, now " in said
    refused("--count: --repeat takes it from", "--repeat", measured, "--count", 3)
    (tmp_path / "none.json").write_text("{}")
    refused("--repeat: .*none.json is no result", "--repeat", tmp_path / "none.json")
    content["settings"]["colour"] = 1
    (tmp_path / "odd.json").write_text(json.dumps(content))
    refused("--repeat: its setting 'colour'", "--repeat", tmp_path / "odd.json")


def test_two_processes_give_the_numbers_of_one(
    measured: Path, student: Path, tmp_path: Path
) -> None:
    file = tmp_path / "two.json"
    command = [EXAMPLES / "evaluate.py", *SMALL, *EXTRAS, "--student", student]
    done = torchrun(*command, "--json", file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(file)["ranks"] == 2
    assert read(file)["results"] == read(measured)["results"]
    assert done.stdout.count("minimum of 3") == 1


def test_images_on_disk_are_those_drawn(
    measured: Path, student: Path, tmp_path: Path
) -> None:
    told = Settings(protocol=("digits",), student=str(student), device="cpu", count=80)
    source = evaluate.open_sets(told, [])[1][0]
    batches = [source.images(range(i, i + 16)) for i in range(0, 80, 16)]
    pixels = torch.cat(batches).numpy()  # pyright: ignore[reportArgumentType]
    (tmp_path / "drawn").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[0]).save(tmp_path / "drawn" / f"{i}.png")
    words = "".join(f"{label}\n" for label in source.labels or ())
    (tmp_path / "drawn" / "labels.txt").write_text(words)
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=np.array(source.labels))
    last: dict[str, Any] = {
        "images": pixels.transpose(0, 2, 3, 1),
        "labels": np.array(source.labels),
    }
    np.savez(tmp_path / "b.npz", **last)
    options = [*FAST, "--protocol", "digits", "--accuracy"]
    options += ["--json", tmp_path / "result.json", "--images"]
    run(*options, *(tmp_path / name for name in ("drawn", "a.npz", "b.npz")))
    rows = read(tmp_path / "result.json")["results"]["digits"]["by_set"]
    first = read(measured)["results"]["digits"]["by_set"][0]
    expected = {name: first[name] for name in ("value", "accuracy")}
    assert rows == [expected] * 3
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.full(80, 10))
    refused("--images: labels: 10 ... 10, exp", *options, tmp_path / "a.npz")


def test_what_was_measured_outlives_an_interruption(
    measured: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, drawn = tmp_path / "result.json", []
    kind = evaluate_protocols.Distance
    whole = kind.rows

    def interrupted(self: Any, images: Any, source: Any, batch: range) -> Tensor:
        if source.title.endswith("seed 5000") and batch.start == 32:
            raise KeyboardInterrupt
        drawn.append((source.title, batch.start))
        return whole(self, images, source, batch)

    monkeypatch.setattr(kind, "rows", interrupted)
    command = [*SMALL, *EXTRAS, "--student", student, "--json", file]
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    assert not file.exists()
    refused(
        r"--json: .*result.json.partial was begun with labels = balanced, now it is "
        "random; remove it",
        *[*command, "--labels", "random"],
    )
    monkeypatch.setattr(kind, "rows", whole)
    counted: list[Any] = []
    monkeypatch.setattr(
        kind, "rows", lambda *x: (counted.append(x[2].title), whole(*x))[1]
    )
    run(*command)
    assert read(file)["results"] == read(measured)["results"]
    # Three of the second set's batches were left, and one to see that all fits.
    assert counted.count(f"{title(student)}, seed 5000") == 3
    assert counted.count(f"{title(student)}, seed 0") == 1
    assert not (tmp_path / "result.json.partial").exists()


def title(student: Path) -> str:
    return "/".join(student.parts[-2:])


def test_numbers_in_a_line_for_recipes(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*SMALL, "--student", student, "--seeds", 0, "--accuracy", "--numbers")
    said = capsys.readouterr().out.splitlines()
    numbers = json.loads(said[-1])
    assert set(numbers) == {"digits", "accuracy"}
    assert any("digits teacher (Heun)" in line for line in said)
    assert any("80 of 5,000 against 1,437: not comparable" in line for line in said)


def test_a_recipe_s_evaluation_is_none_of_torchrun_s_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("SHARDING", "1")
    file = tmp_path / "numbers.py"
    names = '("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID")'
    file.write_text(
        "import json, os\n"
        f"left = [name for name in {names} if name in os.environ]\n"
        'print(json.dumps({"left": len(left), "own": int(os.environ["SHARDING"])}))'
    )
    command = f"{sys.executable} {file} {{student}}"
    assert run_evaluation(command, tmp_path, 1) == {"left": 0, "own": 1}


def test_a_teacher_and_its_baselines(tmp_path: Path) -> None:
    options = [*SMALL, "--teacher", "digits", "--seeds", 7, "--json"]
    run(*options, tmp_path / "r.json", "--sampler", "edm-ode", "--steps", 3)
    content = read(tmp_path / "r.json")
    assert content["model"]["calls"] == 5
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    image = HeunSampler(karras_sigmas(3))(load_teacher(), noise, torch.tensor([0]))
    model = evaluate.open_sets(
        tyro.cli(
            Settings,
            args="--protocol digits --teacher digits --steps 3 --device cpu".split(),
        ),
        [],
    )[0]
    assert model is not None
    assert torch.equal(model.draw(range(1), 7), to_pixels(image))


def test_the_paper_s_baselines() -> None:
    assert {"auto", *BASELINES} == set(SamplerName.__args__)
    for name, kind in (("edm-ode", HeunSampler), ("edm-sde", StochasticSampler)):
        assert calls_of(kind(karras_sigmas(BASELINES[name].steps))) == 511
    rows = {row.method: row for row in published(["imagenet64_edm"], latency=False)}
    assert rows["EDM (teacher, ODE)"].numbers == {"imagenet64_edm": 2.32}
    rows = {
        r.method: r for r in published(["coco10k_512", "clip_score"], latency=False)
    }
    assert rows["SDXL (teacher, cfg 6)"].numbers["patch_fid_299"] == 21.38
    assert {r.source for r in published([], latency=True)} == {"the paper's Table 5"}


def test_latency_is_a_median_after_a_warm_up() -> None:
    drawn: list[tuple[range, int]] = []

    def draw(batch: range, seed: int) -> Tensor:
        drawn.append((batch, seed))
        return torch.zeros(len(batch), 3, 8, 8)

    settings = Settings(latency=3, latency_batch_size=2, device="cpu")
    found = seconds_an_image(Model(draw, "m", 1, 4, {}), settings)
    assert len(drawn) == 2 + 3
    assert {len(batch) for batch, _ in drawn} == {2}
    assert found["batch_size"] == 2
    assert found["timed_batches"] == 3
    assert found["seconds_an_image"] > 0


# Tiny networks through every other protocol


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives protocols a network of six features, and perhaps other values."""

    def patch(*names: Any, **values: Any) -> None:
        for name in names:
            own = replace(
                PROTOCOLS[name], network=lambda weights=None, checksum=None: TINY
            )
            monkeypatch.setitem(PROTOCOLS, name, replace(own, **values))

    return patch


def tensors(folder: Path) -> list[Tensor]:
    files = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    return [
        torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1)
        for f in files
    ]


def expected_distance(name: Any, samples: Path, real: Path) -> float:
    statistics = []
    for folder in (samples, real):
        found = FeatureStatistics(6)
        found.update(corners(prepare_images(tensors(folder), PROTOCOLS[name].prepare)))
        statistics.append(found)
    return frechet_distance(*statistics)


def test_coco_and_patch_fid_of_the_same_images(
    tiny: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("coco10k_512", "patch_fid_299")
    tiny(*names, reference_samples=14)
    images = save_photos(tmp_path / "images", 12, (320, 320))
    real = save_photos(tmp_path / "real", 14, seed=1)
    options = ["--protocol", *names, "--images", images, "--reference", real]
    options += ["--device", "cpu", "--precision-recall", "--json", tmp_path / "r.json"]
    run(*options)
    content = read(tmp_path / "r.json")
    for name in names:
        result = content["results"][name]
        expected = expected_distance(name, images, real)
        assert result["single"] == pytest.approx(expected, rel=1e-5)
        assert 0 <= result["by_set"][0]["precision"] <= 1
    assert "SDXL (teacher, cfg 8)" in capsys.readouterr().out
    # Statistics and features are kept, and not made again.
    kept = sorted(path.name for path in tmp_path.glob("real-*"))
    assert [name.rpartition("-")[0] for name in kept] == [
        f"real-{name}" for name in names for _ in range(2)
    ]
    (real / "0.jpg").write_bytes((real / "0.jpg").read_bytes())  # as long as before
    whole = evaluate_protocols.Distance.rows
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluate_protocols.Distance,
            "rows",
            lambda *x: (seen.append(x[2].option), whole(*x))[1],
        )
        run(*options)
    assert set(seen) == {"images"}
    assert read(tmp_path / "r.json")["results"] == content["results"]
    # Another folder has another file.
    (real / "0.jpg").write_bytes((real / "2.jpg").read_bytes())
    run(*options)
    assert len(list(tmp_path.glob("real-*"))) == 8


def test_statistics_of_other_programs_and_of_other_features(
    tiny: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("coco30k_256")
    images = save_photos(tmp_path / "images", 9, (64, 64))
    options = [*FAST, "--protocol", "coco30k_256", "--images", images, "--reference"]
    np.savez(tmp_path / "edm.npz", mu=np.zeros(6), sigma=np.eye(6))
    run(*options, tmp_path / "edm.npz")
    said = capsys.readouterr().out
    assert "edm.npz does not say which features it is of" in said
    assert "9 of 30,000 against 40,504: not comparable" in said
    other = FeatureStatistics(6, "others")
    other.update(torch.randn(20, 6))
    other.save(tmp_path / "other.npz")
    refused(
        "--reference: .*other.npz holds features of others, expected those of corners",
        *[*options, tmp_path / "other.npz"],
    )
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    refused("--reference: .* holds 7 features", *options, tmp_path / "wide.npz")
    more = [*options, tmp_path / "other.npz", "--reference-count", 7]
    refused("--reference: count: got 7, .* is of 20", *more)
    np.savez(tmp_path / "none.npz", images=np.zeros(6))
    refused("--reference: .*none.npz holds no statis", *options, tmp_path / "none.npz")
    refused("--reference: .* is no zip|--reference: ", *options, tmp_path / "none")
    few = save_photos(tmp_path / "few", 6)
    refused("--reference: 6 images, coco30k_256 has 6 features", *options, few)
    protocol = ["--protocol", "fd_dinov2", "--images", images, *FAST]
    tiny("fd_dinov2")
    refused(
        "--reference: .* does not say how many images it is of; give --reference-count",
        *[*protocol, "--reference", tmp_path / "edm.npz"],
    )


def test_imagenet_by_three_seeds_as_edm_reports_it(
    tiny: Callable[..., None], tmp_path: Path
) -> None:
    tiny("imagenet64_edm", resolution=16, samples=8, seeds=(0, 8, 16))
    save_adm_teacher(tmp_path / "teacher")
    teacher = load_denoiser(tmp_path / "teacher")
    save_denoiser(tmp_path / "student", teacher, times=(80.0, 2.0))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(6), sigma=np.eye(6) / 99)
    options = [*FAST, "--protocol", "imagenet64_edm", "--reference"]
    options += [tmp_path / "edm.npz", "--json", tmp_path / "r.json"]
    for source in (["--student", tmp_path / "student", "--labels", "random"],):
        run(*options, *source)
        result = read(tmp_path / "r.json")["results"]["imagenet64_edm"]
        values = [row["value"] for row in result["by_set"]]
        assert len(set(values)) == 3
        assert result["single"] == values[0]
        assert result["minimum"] == min(values)
        assert result["reference"] == 1_281_167
    model = read(tmp_path / "r.json")["model"]
    assert model["calls"] == 2
    # Image i of a set is that of seed + i: a set of nine begins with the set of eight.
    settings = tyro.cli(
        Settings,
        args=["--protocol", "imagenet64_edm", "--student", f"{tmp_path / 'student'}"],
    )
    drawn = evaluate.open_sets(replace(settings, device="cpu", reference=Path("x")), [])
    first, second = drawn[1][:2]
    one = torch.cat([first.images(range(i, i + 1)) for i in range(3)])  # pyright: ignore[reportArgumentType]
    three: Any = first.images(range(3))
    assert (one.int() - three.int()).abs().max() <= 1
    assert not torch.equal(three, second.images(range(3)))  # pyright: ignore[reportArgumentType]


# Refusals


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("images") / "images", 9, (40, 40))


SHORT = {
    "D": "--protocol digits",
    "C": "--protocol coco10k_512",
    "L": "--protocol lpips_diversity",
    "T": "--teacher digits",
    "S": "--student x",
    "X": "--teacher x",
    "R": "--reference .",
}
SETTINGS_REFUSED = {
    "S": "--protocol: missing; give one of them, or --lat",
    "D digits": "--protocol: one of them is named twice",
    "D": "--images, --student, --teacher, --watch: give one",
    "D --student a --teacher b": "--images, --student, --teacher, --watch: give one",
    "D --images x --seeds 1": "--seeds: --images are there",
    "D S --sampler edm-ode": "--sampler: it is a teacher's",
    "D S --count 0": "--count 0: expected >= 1",
    "D S --latency -1": "--latency -1: expected >= 0",
    "D clip_score S": "--protocol digits: it takes other images",
    "--protocol clip_score --accuracy S": "--accuracy: only the protocol digits",
    "D R S": "--reference: digits has its own",
    "C S": "--reference: missing; coco10k_512 is a dist",
    "--protocol clip_score --kid S": "--kid: clip_score has no real images",
    "C patch_fid_299 --reference x.npz S": "--reference: x.npz holds the stat",
    "C --reference x.npz --kid S": "--kid: x.npz holds statistics; give a folder",
    "C --reference x S": "--reference: there is no x; name a folder",
    "C R --reference-count 3 S": "--reference-count: a folder is counted",
    "D S": "--student x: there is no such folder",
    "D --teacher x/y": "--prompt-file: missing; x/y draws from prompts",
    "D T --times 3": "--times: they are a student's",
    "D T --sampler sd15-pndm": "--sampler sd15-pndm: it draws from prompts",
    "D T --guidance 3": "--guidance: digits draws from classes",
    "D T --count 64": "--count: 64 images, digits has 64 features",
    "D T --count 80 --kid": "--kid: 80 images, expected at least 1000",
    "D --images none": "--images: none is no folder and no .npz",
    "D --images none.npz": "--images: none.npz cannot be read",
    "D --watch none": "--watch: none has no settings.json",
    "D --watch x --watch-every 0": "--watch-timeout, --watch-every: expected > 0",
    "D --watch x --latency 3": "--latency: --watch takes students as",
    "D T --device tpu3": "--device tpu3: expected auto, cuda or cpu",
    "C R X --weights inception x": "--weights inception: weights: there is no file x",
    "C R X --checksums inception abc": "--checksums inception: checksum: got 'abc'",
    "L X --checksums lpips 01234567": "--checksums lpips: checksum: there is no",
    "L X --weights lpips x": "--weights lpips: weights: there is no file x",
}


@pytest.mark.parametrize("options", SETTINGS_REFUSED)
def test_settings_that_are_refused(
    options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = " ".join(SHORT.get(word, word) for word in options.split()).split()
    refused(SETTINGS_REFUSED[options], "--device", "cpu", *words)


def test_images_that_are_refused(
    images: Path, tiny: Callable[..., None], tmp_path: Path
) -> None:
    tiny("coco30k_256", reference_samples=None)
    np.savez(tmp_path / "real.npz", mu=np.zeros(6), sigma=np.eye(6), count=99)
    options = [*FAST, "--protocol", "coco30k_256", "--reference"]
    options += [tmp_path / "real.npz", "--images"]
    folder = tmp_path / "images"

    def anew() -> Path:
        for path in folder.glob("*"):
            path.unlink()
        folder.mkdir(exist_ok=True)
        for path in images.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    run(*options, anew())
    (tmp_path / "empty").mkdir()
    refused("--images: .*empty holds no PNG or JPEG", *options, tmp_path / "empty")
    Image.new("RGB", (41, 40)).save(anew() / "3.png")
    refused(
        r"--images: .* holds 8 images of RGB 40x40 and 1 of RGB 41x40, expected all",
        *[*options, folder],
    )
    for mode in ("L", "RGBA", "P", "I;16"):
        Image.new(mode, (40, 40)).save(anew() / "3.png")
        refused(f"3.png is of mode {mode}, expected RGB of 8", *options, folder)
    whole = (images / "3.png").read_bytes()
    (anew() / "3.png").write_bytes(whole[: len(whole) // 2])
    refused("--images: .*3.png is damaged", *options, folder)
    (anew() / "3.png").write_bytes(b"no image")
    refused("--images: .*3.png is no PNG or JPEG image", *options, folder)
    anew()
    for path in [folder / f"{i}.png" for i in range(3, 9)]:
        path.unlink()
    refused("--images: 3 images, coco30k_256 has 6 features", *options, folder)
    refused("--count 7: .*images has 9 images", *options, images, "--count", 7)

    pixels = np.zeros((9, 16, 16, 3), np.uint8)
    for match, arrays in {
        r"holds float32\[9, 16, 16, 3\], expected uint8 \[n, h, w, 3\] in 0 ": {
            "images": pixels.astype(np.float32)
        },
        r"holds uint8\[9, 16, 16, 4\], expected 3 channels": {
            "images": np.zeros((9, 16, 16, 4), np.uint8)
        },
        r"holds \['x'\], expected images or arr_0": {"x": pixels},
        "has 4 labels for 9 images": {"images": pixels, "labels": np.zeros(4, int)},
        r"has labels float64\[9\], expected whole": {
            "images": pixels,
            "labels": np.zeros(9),
        },
        r"holds uint8\[0, ": {"images": pixels[:0]},
    }.items():
        np.savez(tmp_path / "x.npz", **arrays)
        refused(f"--images: .*x.npz {match}", *options, tmp_path / "x.npz")
    digits = [*FAST, "--protocol", "digits", "--images"]
    refused("is of mode RGB, expected L", *digits, images)
    np.savez(tmp_path / "x.npz", images=np.zeros((80, 8, 8, 1), np.uint8))
    refused(
        "--accuracy: .*x.npz has no labels", *digits, tmp_path / "x.npz", "--accuracy"
    )
    np.savez(tmp_path / "x.npz", images=np.zeros((80, 9, 9, 1), np.uint8))
    refused("--images: .*9x9 pixels, digits takes 8x8", *digits, tmp_path / "x.npz")
    (anew() / "labels.txt").write_text("one two")
    refused("labels.txt holds more than numbers", *options, folder)


def test_features_that_are_not_finite_are_named(
    images: Path, tiny: Callable[..., None], tmp_path: Path
) -> None:
    broken = CallableFeatures(
        lambda x: corners(x).where(torch.arange(len(x))[:, None] != 4, math.nan), "n", 6
    )
    tiny("coco30k_256")
    with pytest.MonkeyPatch.context() as patch:
        own = replace(PROTOCOLS["coco30k_256"], network=lambda *_, **__: broken)
        patch.setitem(PROTOCOLS, "coco30k_256", own)
        np.savez(tmp_path / "real.npz", mu=np.zeros(6), sigma=np.eye(6))
        refused(
            r"--images: the features of .*4\.png are not finite",
            *[*FAST, "--protocol", "coco30k_256", "--images", images],
            *["--reference", tmp_path / "real.npz"],
        )


def test_a_model_that_draws_nan(student: Path, tmp_path: Path) -> None:
    broken = load_denoiser(student)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    save_denoiser(tmp_path / "broken", broken, times=(80.0,))
    options = [*SMALL, "--student", tmp_path / "broken"]
    refused("--student: The image of seed 0 is not finite; try", *options)
    refused("it is a student; give it as --stud", *SMALL, "--teacher", student)
    save_denoiser(tmp_path / "teacher", load_teacher())
    refused("it holds no student's times", *SMALL, "--student", tmp_path / "teacher")


def test_batches_come_in_order_whatever_was_done() -> None:
    class Sum:
        protocol: Any = None

        def rows(self, images: Any, source: Any, batch: range) -> Tensor:
            return images.flatten(1).sum(1).float()

        def result(self, rows: Tensor, source: Any) -> Any: ...

    pixels = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    source = ArrayImages(pixels, "x")
    found = [r for (r,) in rows_in_order(source, [Sum()], 4, title="t", done=1)]
    assert torch.cat(found).tolist() == [4, 5, 6, 7, 8, 9]
    kept = KeptRows(None, {})
    (rows,) = kept.all_rows(0, source, [Sum()], 3, "t")
    assert rows.tolist() == list(range(10))
