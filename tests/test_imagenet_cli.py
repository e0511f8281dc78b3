"""From NVIDIA's file to samples, as a user would: convert, train, kill, draw."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import convert_edm
import evaluate_watch
import imagenet_edm
import imagenet_pairs
import numpy as np
import pytest
import sample
import torch
import tyro
from helpers_edm import File, Spec, random_state, write
from helpers_recipes import save_adm_teacher, save_digit_images, save_digits_teacher
from PIL import Image
from runs import parse
from safetensors.torch import load_file
from torch import Tensor

from dmdkit import checkpoints
from dmdkit.adapters.folders import read_sidecar

EXAMPLES = Path(__file__).parents[1] / "examples"
SPEC = Spec(16, (128, 128), 1, (False, True), classes=10)
FAST = "--workers 0 --device cpu --precision fp32 --checkpoint-every 5".split()


def train(*options: str | Path) -> None:
    given = [*FAST, *map(str, options)]
    imagenet_edm.main(parse(imagenet_edm.Settings, imagenet_edm.PRESETS, given))


def draw(*options: str | Path) -> None:
    sample.main(tyro.cli(sample.Settings, args=list(map(str, options))))


def student_weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "diffusion_pytorch_model.safetensors")


def command(script: str, *options: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *map(str, options)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("cli")
    pickle = write(top / "edm.pkl", File(SPEC, random_state(SPEC)))
    settings = [str(pickle), str(top / "teacher")]
    convert_edm.main(tyro.cli(convert_edm.Settings, args=settings))
    images = save_digit_images(top / "images", side=16, channels=3)
    return {"teacher": top / "teacher", "images": images}


def inputs(folders: dict[str, Path]) -> list[str | Path]:
    return ["--teacher", folders["teacher"], "--images", folders["images"]]


def test_convert_train_kill_resume_draw(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options = [*inputs(folders), "--batch-size", "2", "--iterations", "20"]
    options += ["--seed", "3", "--ema", "0.9", "--learning-rate", "1e-4"]
    options += ["--times", "80", "5"]  # so that rungs are drawn
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("imagenet_edm.py", *FAST, *options, "--out", killed),
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not checkpoints(killed / "checkpoints") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "summary.json").exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(*options, "--out", killed, "--resume", "--workers", "1")
        train(*options, "--out", whole)
    finally:
        torch.set_num_threads(threads)
    uninterrupted, resumed = student_weights(whole), student_weights(killed)
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(v, resumed[k]) for k, v in uninterrupted.items())

    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["seconds_per_iteration"]) == {"generator_turn", "critic_turn"}
    assert summary["peak_memory_gib"] > 0
    assert summary["student_updates"] == 4
    assert summary["parameters"] == sum(v.numel() for v in uninterrupted.values())
    # The log of both runs has the same numbers but for times.
    logs = [
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (whole, killed)
    ]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if not k.endswith("_turn")} == {
            k: v for k, v in other.items() if not k.endswith("_turn")
        }
    assert list((whole / "tensorboard").glob("events.*"))
    with Image.open(whole / "samples" / "00000020.png") as picture:
        assert picture.size == (8 * 18 + 2, 4 * 18 + 2)

    sidecar = read_sidecar(whole / "student")
    assert sidecar.times == (80.0, 5.0)
    assert sidecar.about["iterations"] == 20
    assert sidecar.about["teacher"]["source"] == "edm.pkl"
    draw(whole / "student", "--grid", tmp_path / "grid.png", "--columns", "3")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 18 + 2, 8 * 18 + 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_scheduler_s_signal_saves_and_ends_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    given: list[str | Path] = ["--preset", "long-phase1", "--batch-size", "2"]
    given += ["--teacher", save_digits_teacher(tmp_path / "teacher")]
    given += ["--iterations", "9", "--seed", "3"]
    train(*given, "--out", tmp_path / "whole")
    iterate = imagenet_edm.ImageNetDistillation.iterate

    def told(self: Any, step: int) -> Any:
        if step == 6:
            os.kill(os.getpid(), number)
        return iterate(self, step)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet_edm.ImageNetDistillation, "iterate", told)
        with pytest.raises(SystemExit) as stopped:
            train(*given, "--out", tmp_path / "run")
    assert stopped.value.code is None  # success
    assert f"Stopped by {number.name} after iteration 7" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000007"
    assert not (tmp_path / "run" / "summary.json").exists()
    train(*given, "--out", tmp_path / "run", "--resume")
    one, other = (student_weights(tmp_path / out) for out in ("whole", "run"))
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def drawn(path: Path) -> tuple[np.ndarray, list[int]]:
    with np.load(path) as file:
        return file["images"], file["labels"].tolist()


@pytest.mark.parametrize("sampler", ["student", "heun", "sde"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(
    tmp_path: Path, sampler: str
) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    common = [folder, "--sampler", sampler, "--steps", "3", "--count", "7"]
    if sampler == "student":
        common += ["--times", "80", "2"]
    draw(*common, "--batch-size", "7", "--out", tmp_path / "a.npz")
    draw(*common, "--batch-size", "3", "--out", tmp_path / "b.npz")
    (a, labels), (b, _) = drawn(tmp_path / "a.npz"), drawn(tmp_path / "b.npz")
    assert a.shape == (7, 8, 8, 1)
    assert a.dtype == np.uint8
    assert labels == list(range(7))
    # Rounding to 256 levels may fall either way where sums have another order.
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    # Image i has seed + i; its class is kept by asking for the same number.
    draw(*common, "--seed", "11", "--out", tmp_path / "c.npz")
    c, _ = drawn(tmp_path / "c.npz")
    assert np.abs(a.astype(int) - c.astype(int)).max() > 10
    draw(*common, "--out", tmp_path / "pngs")
    names = sorted(path.name for path in (tmp_path / "pngs").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(7)), "labels.txt"]
    with Image.open(tmp_path / "pngs" / "000003.png") as picture:
        pixels = np.asarray(picture).reshape(8, 8, -1)[..., :1]
    assert np.abs(pixels.astype(int) - a[3].astype(int)).max() <= 1


def test_random_labels_are_edm_s_convention(tmp_path: Path) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    common = [folder, "--times", "80", "--count", "300", "--labels", "random"]
    draw(*common, "--out", tmp_path / "a.npz")
    _, labels = drawn(tmp_path / "a.npz")
    counts = np.bincount(labels, minlength=11)
    assert counts.sum() == 300
    assert len(counts) == 11
    assert counts.min() > 5  # 27 expected, deviation 5
    assert labels != [i % 11 for i in range(300)]


def test_pairs_are_the_teacher_s_and_train_a_student(tmp_path: Path) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")

    def pairs(*options: str) -> None:
        given = [str(folder), str(tmp_path / "pairs"), "--steps", "3", *options]
        imagenet_pairs.main(tyro.cli(imagenet_pairs.Settings, args=given))

    pairs("--count", "10", "--shard-size", "4", "--batch-size", "3")
    from dmdkit import HeunSampler, karras_sigmas
    from dmdkit.adapters.folders import load_denoiser
    from dmdkit.data import ShardedTensors

    found = ShardedTensors(tmp_path / "pairs")
    assert len(found) == 10
    items = [found[i] for i in (6, 7, 8)]  # drawn as one batch
    noise, images, labels = (
        torch.stack([item[name] for item in items])
        for name in ("noise", "images", "labels")
    )
    expected = HeunSampler(karras_sigmas(3))(load_denoiser(folder), noise, labels)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(noise[0], noise[1])

    given: list[str | Path] = ["--preset", "table3-dmd", "--teacher", folder]
    given += ["--pairs", tmp_path / "pairs", "--regression-distance", "squared"]
    given += ["--iterations", "2", "--batch-size", "4", "--out", tmp_path / "run"]
    train(*given)
    line = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["regression/loss"] > 0


def test_phase_two_starts_from_the_best_of_phase_one(tmp_path: Path) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    images = save_digit_images(tmp_path / "images", side=8, channels=1)
    # A command that finds every student worse than the one before.
    script = tmp_path / "worse.py"
    script.write_text("import sys; print('{\"fid\": ' + sys.argv[2] + '}')")
    evaluate = f"{sys.executable} {script} {{student}} {{step}}"
    common: list[str | Path] = ["--teacher", folder, "--batch-size", "4"]
    first, second = tmp_path / "first", tmp_path / "second"
    options: list[str | Path] = ["--iterations", "15", "--learning-rate", "1e-3"]
    options += ["--keep", "1", "--evaluate", evaluate, "--out", first]
    train("--preset", "long-phase1", *common, *options)
    best = json.loads((first / "best" / "best.json").read_text())
    assert best == {"step": 5, "fid": 5}
    assert [path.name for path in checkpoints(first / "checkpoints")] == [
        "step-00000015"
    ]
    log = [json.loads(s) for s in (first / "log.jsonl").read_text().splitlines()]
    assert [x["evaluation/fid"] for x in log if "evaluation/fid" in x] == [5, 10, 15]

    settings: list[str | Path] = [
        "--preset",
        "long-phase2",
        *common,
        "--images",
        images,
    ]
    settings += ["--start-from", first / "best", "--out", second, *FAST]
    run = imagenet_edm.ImageNetDistillation(
        parse(imagenet_edm.Settings, imagenet_edm.PRESETS, list(map(str, settings)))
    )
    from dmdkit import load_modules

    expected = imagenet_edm.build_networks(run.settings)
    load_modules(
        first / "best",
        student=expected.student.network,
        critic=expected.critic.network.network,  # pyright: ignore[reportArgumentType]
    )
    for name in ("student", "critic"):
        got = getattr(run.networks, name).state_dict()
        for key, value in getattr(expected, name).state_dict().items():
            assert torch.equal(got[key], value), key
    start = imagenet_edm.build_networks(
        imagenet_edm.replace(run.settings, start_from=None)
    )
    assert not torch.equal(
        next(start.student.parameters()), next(run.networks.student.parameters())
    )


def test_the_best_is_still_the_best_after_a_resume(tmp_path: Path) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    script, out = tmp_path / "fid.py", tmp_path / "run"
    # The best comes second, after its own checkpoint was written.
    script.write_text(
        "import sys; print('{\"fid\": %d}' % {5: 5, 10: 2}.get(int(sys.argv[2]), 3))"
    )
    given: list[str | Path] = ["--preset", "long-phase1", "--teacher", folder]
    given += ["--batch-size", "2", "--out", out, "--evaluate"]
    given += [f"{sys.executable} {script} {{student}} {{step}}"]
    train(*given, "--iterations", "10")
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 10
    train(*given, "--iterations", "15", "--resume")
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 10


def test_an_evaluation_without_the_number_of_best_stops_the_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_digits_teacher(tmp_path / "teacher"), tmp_path / "run"
    script = tmp_path / "score.py"
    script.write_text("print('{\"score\": 2.0}')")
    given: list[str | Path] = ["--preset", "long-phase1", "--teacher", folder]
    given += ["--batch-size", "2", "--out", out, "--iterations", "15"]
    given += ["--evaluate", f"{sys.executable} {script} {{student}}"]
    with pytest.raises(SystemExit, match="--best fid: the evaluation gave score; name"):
        train(*given)
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000005"]
    train(*given, "--best", "score", "--resume")
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 10
    capsys.readouterr()
    train(*given, "--iterations", "16", "--resume")  # only its end is evaluated
    assert "--best fid: the evaluation gave score; name" in capsys.readouterr().out
    assert (out / "summary.json").is_file()


def test_a_finished_run_stays_as_it_is_or_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = save_digits_teacher(tmp_path / "teacher"), tmp_path / "run"
    given: list[str | Path] = ["--preset", "long-phase1", "--teacher", folder]
    given += ["--batch-size", "2", "--out", out, "--log-every", "2"]
    train(*given, "--iterations", "6")
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    # The student learns in the first and the sixth iteration.
    assert [(x["step"], "dm/gap" in x) for x in lines] == [
        (2, True),
        (4, False),
        (6, True),
    ]
    summary = (out / "summary.json").read_text()
    train(*given, "--iterations", "6", "--resume")
    assert "had its 6 iterations already" in capsys.readouterr().out
    assert (out / "summary.json").read_text() == summary
    with pytest.raises(SystemExit, match="--iterations 5: the run has made 6"):
        train(*given, "--iterations", "5", "--resume")
    assert read_sidecar(out / "student").about["iterations"] == 6
    over: list[bool] = []
    iterate = imagenet_edm.ImageNetDistillation.iterate

    def watched(self: imagenet_edm.ImageNetDistillation, step: int) -> object:
        over.append(evaluate_watch.Run(out).over())
        return iterate(self, step)

    assert evaluate_watch.Run(out).over()
    monkeypatch.setattr(imagenet_edm.ImageNetDistillation, "iterate", watched)
    train(*given, "--iterations", "7", "--resume")
    assert over == [False], "the summary of before is no end of a run that goes on"
    assert read_sidecar(out / "student").about["iterations"] == 7


class FakeWandb(ModuleType):
    """What the log calls of Weights & Biases, kept."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **given: Any) -> "FakeWandb":
        self.started.append(given)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Image(pixels: np.ndarray) -> tuple[int, ...]:  # noqa: N802
        return pixels.shape


def test_weights_and_biases_see_numbers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", client)
    given: list[str | Path] = ["--preset", "long-phase1", "--batch-size", "2"]
    given += ["--teacher", save_digits_teacher(tmp_path / "teacher")]
    given += ["--out", tmp_path / "run", "--wandb", "dmd2", "--log-every", "2"]
    train(*given, "--iterations", "2")
    train(*given, "--iterations", "4", "--resume")
    first, second = client.started
    assert first["project"] == "dmd2"
    assert first["id"] == second["id"]  # a resumed run goes on in the same curves
    numbers = [(step, v) for step, v in client.logged if "critic/error" in v]
    assert [step for step, _ in numbers] == [2, 4]
    pictures = [v["samples"] for _, v in client.logged if "samples" in v]
    assert pictures == [(4 * 10 + 2, 8 * 10 + 2, 3)] * 2
    assert client.finished == 2


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_tracker_is_said_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="type: pip install wandb"):
        train("--random-init", "--images", tmp_path, "--wandb", "dmd2")


def test_an_evaluation_that_fails_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    train(
        "--preset=long-phase1",
        f"--teacher={folder}",
        "--batch-size=2",
        "--iterations=5",
        f"--out={tmp_path / 'run'}",
        "--evaluate=false {student}",
    )
    assert "The evaluation at step 5 gave no numbers" in capsys.readouterr().out
    assert (tmp_path / "run" / "student").is_dir()


def lines(error: pytest.ExceptionInfo[SystemExit]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--teacher: give a folder, or --random-init"),
        ("--teacher T --random-init", "one of them"),
        ("--teacher T", "--images: missing; --gan needs it, or --no-gan"),
        ("--teacher T --preset table3-dmd", "--pairs: missing; --regression needs it"),
        ("--teacher T --no-gan --no-distribution-matching", "no loss at all"),
        ("--teacher T --images I --preset long-phase2", "--start-from: missing"),
        ("--teacher T --images I --batch-size 401", "--micro-batch-size 40: the next"),
        ("--teacher T --images I --evaluate fid.py", "it does not say {student}"),
        ("--teacher T --images I --evaluate no/{student}", "there is no program no/"),
        ("--teacher T --images I --device foo", "--device foo: expected auto"),
        ("--teacher T --images I --batch-size 0", "--batch-size: 0; expected >= 1"),
        ("--teacher T --images I --keep 0", "--keep: 0; expected >= 1"),
        ("--teacher T --images I --workers -1", "--workers: -1; expected >= 0"),
        ("--teacher nowhere --images I", "there is no dmdkit.json in nowhere"),
        ("--teacher T --images nowhere", "nowhere"),
        ("--teacher T --images I --resume", "--resume: there is no checkpoint"),
        ("--teacher T --images I --start-from x", "no complete checkpoint in x"),
        ("--teacher T --images I --times 80 -1", "--times: time: got -1.0, expected"),
        ("--teacher T --images I --device cuda:9", "--device cuda:9: this machine"),
    ],
)
def test_what_cannot_run_is_said_in_one_line(
    folders: dict[str, Path], tmp_path: Path, options: str, message: str
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = {"T": str(folders["teacher"]), "I": str(folders["images"])}
    given = [names.get(word, word) for word in options.split()]
    with pytest.raises(SystemExit) as error:
        train(*given, "--out", tmp_path / "run")
    assert message in lines(error)


def test_runs_are_not_mixed_up(tmp_path: Path) -> None:
    folder = save_digits_teacher(tmp_path / "teacher")
    common: list[str | Path] = ["--preset", "table3-ttur", "--teacher", folder]
    common += ["--batch-size", "2", "--iterations", "5", "--out", tmp_path / "run"]
    train(*common)
    with pytest.raises(SystemExit, match="holds a run with checkpoints") as error:
        train(*common)
    lines(error)
    with pytest.raises(SystemExit, match=r"learning_rate = 2e-06, now it is 0\.1"):
        train(*common, "--resume", "--learning-rate", "0.1")


def test_images_of_another_size_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher = save_adm_teacher(tmp_path / "teacher")
    images = save_digit_images(tmp_path / "images", side=8, channels=3)
    with pytest.raises(SystemExit, match=r"img0\d+\.png") as error:
        train("--teacher", teacher, "--images", images, "--out", tmp_path / "run")
    assert "16" in lines(error)


def test_unknown_options_and_presets_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for given in (["--preset", "table4"], ["--gan-wieght", "1"]):
        with pytest.raises(SystemExit):
            parse(imagenet_edm.Settings, imagenet_edm.PRESETS, given)
        assert given[0].strip("-") in capsys.readouterr().err


def test_help_shows_the_preset_s_values_and_sources(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(
            imagenet_edm.Settings,
            imagenet_edm.PRESETS,
            ["--preset", "long-phase2", "--help"],
        )
    text: Any = capsys.readouterr().out
    assert "5e-07" in text
    assert "[F.2]" in text
