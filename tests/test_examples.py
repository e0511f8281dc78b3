"""The examples, small, through their own command line."""

import json
import re
from pathlib import Path
from typing import Any

import custom_loop
import digits
import digits_classifier
import digits_teacher
import numpy as np
import pytest
import sample
import torch
import tyro
from digits_common import (
    CLASSIFIER_FILE,
    TEACHER_FILE,
    load_digits,
    load_teacher,
    network_of,
)
from torch import Tensor

from dmdkit import Monitor, NonFiniteError
from dmdkit.extras import require_extra

SMALL = ["--iterations", "6", "--batch-size", "8", "--samples", "80"]
SMALL += ["--evaluate-every", "3", "--critic-steps", "2"]


def settings(out: Path, *options: str) -> digits.Settings:
    return tyro.cli(digits.Settings, args=[*SMALL, "--out", str(out), *options])


def sample_main(*options: str) -> None:
    sample.main(tyro.cli(sample.Settings, args=list(options)))


def student_weights(out: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "student" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    digits.main(settings(out))
    return out


def test_the_demo_writes_what_it_promises(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("frechet", "frechet_held_out", "accuracy", "nearest"):
        assert set(summary[name]["teacher"]) == {"7", "17", "35", "63"}
        assert set(summary[name]["student"]) == {"1"}
    assert summary["seeds"] == {"training": 0, "evaluation": [1, 2, 3]}
    assert summary["samples"] == 80
    assert summary["generator_updates"] == 3
    assert summary["floor"] > 0
    assert summary["train_seconds"] > 0
    for picture in ("samples.png", "curves.png"):
        assert (run_folder / picture).stat().st_size > 10_000


def test_a_killed_run_resumes_to_the_same_bits(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digits.Distillation.iterate

    def killed(self: Any, step: int, monitor: Monitor) -> dict[str, Tensor]:
        if step == 4:  # the last checkpoint is that of step 3
            raise KeyboardInterrupt
        return whole(self, step, monitor)

    monkeypatch.setattr(digits.Distillation, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        digits.main(settings(tmp_path))
    monkeypatch.undo()
    digits.main(settings(tmp_path, "--resume"))
    uninterrupted, resumed = student_weights(run_folder), student_weights(tmp_path)
    assert all(torch.equal(uninterrupted[k], resumed[k]) for k in uninterrupted)


def test_a_run_is_not_continued_as_another(run_folder: Path) -> None:
    with pytest.raises(SystemExit, match="started with steps = 1, now it is 4"):
        digits.main(settings(run_folder, "--resume", "--steps", "4"))
    with pytest.raises(SystemExit, match="started with gan = True, now it is False"):
        digits.main(settings(run_folder, "--resume", "--no-gan"))


def test_a_new_run_leaves_no_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    old = tmp_path / "checkpoints" / "step-00000099"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"settings\.json, .* is missing"):
        digits.main(settings(tmp_path, "--resume"))
    digits.main(settings(tmp_path, "--iterations", "1"))
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000001"]


def test_an_exported_student_can_be_drawn_from(
    run_folder: Path, tmp_path: Path
) -> None:
    digits.main(settings(tmp_path, "--sample", str(run_folder / "student")))
    assert (tmp_path / "drawn.png").stat().st_size > 1_000


def test_the_student_in_a_runs_folder_is_named(
    run_folder: Path, tmp_path: Path
) -> None:
    inside = re.escape(str(run_folder / "student"))
    with pytest.raises(SystemExit, match=f"did you mean {inside}"):
        sample_main(str(run_folder), "--grid", str(tmp_path / "grid.png"))


def test_no_student_is_asked_for_the_null_class(
    run_folder: Path, tmp_path: Path
) -> None:
    student = str(run_folder / "student")
    sample_main(student, "--out", str(tmp_path / "drawn.npz"), "--count", "12")
    with np.load(tmp_path / "drawn.npz") as drawn:
        assert drawn["labels"].tolist() == [*range(10), 0, 1]
    with pytest.raises(SystemExit, match="--classes 10: the model has 10 classes"):
        sample_main(student, "--grid", str(tmp_path / "g.png"), "--classes", "10")


def test_multi_step_without_gan_and_with_accumulation(tmp_path: Path) -> None:
    options = ("--steps", "4", "--no-gan", "--micro-batches", "2")
    digits.main(settings(tmp_path, *options))
    about = json.loads((tmp_path / "student" / "dmdkit.json").read_text())
    assert len(about["times"]) == 4
    assert about["times"][0] == pytest.approx(80)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["frechet"]["student"]) == {"4"}


def test_a_sick_teacher_stops_the_run_before_any_step(tmp_path: Path) -> None:
    run = digits.Distillation(settings(tmp_path))
    with torch.no_grad():
        network_of(run.teacher).unet.conv_out.weight.fill_(torch.nan)
    before = [p.clone() for p in run.student.parameters()]
    with pytest.raises(NonFiniteError, match=r"dm is not finite for sample 0 \(t = "):
        run.iterate(0, Monitor())
    assert all(
        torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True)
    )


def test_a_gradient_that_is_not_finite_stops_both_steps(tmp_path: Path) -> None:
    run = digits.Distillation(settings(tmp_path))
    for name, trained in run.trained.items():
        for p in trained.denoiser.parameters():
            p.grad = torch.full_like(p, torch.inf if name == "critic" else 1.0)
    before = [p.clone() for p in run.student.parameters()]
    with pytest.raises(NonFiniteError, match="gradient of the critic is not finite"):
        run.update("student", "critic")
    assert all(
        torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--micro-batches", "3"), "--micro-batches 3"),
        (("--micro-batches", "0"), "--micro-batches 0"),
        (("--samples", "64"), "--samples 64"),
        (("--iterations", "0"), "--iterations 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    tmp_path: Path, options: tuple[str, ...], names: str
) -> None:
    with pytest.raises(SystemExit, match=names) as error:
        settings(tmp_path, *options)
    assert "\n" not in str(error.value)


def test_resume_and_sample_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        digits.main(settings(tmp_path, "--resume"))
    with pytest.raises(SystemExit, match=r"there is no dmdkit\.json"):
        digits.main(settings(tmp_path, "--sample", str(tmp_path)))


def test_the_teacher_trains_resumes_and_writes_its_sidecar(tmp_path: Path) -> None:
    def train(*options: str) -> None:
        args = ["--batch-size", "8", "--evaluate-every", "2", *options]
        args += ["--out", str(tmp_path / "out"), "--file", str(tmp_path / "t.st")]
        digits_teacher.main(tyro.cli(digits_teacher.Settings, args=args))

    train("--iterations", "2")
    train("--iterations", "4", "--resume")
    about = json.loads((tmp_path / "t.json").read_text())
    assert about["step"] in (2, 4)
    assert about["parameters"] == sum(p.numel() for p in load_teacher().parameters())


def test_the_classifier_trains(tmp_path: Path) -> None:
    args = ["--iterations", "3", "--file", str(tmp_path / "c.st")]
    digits_classifier.main(tyro.cli(digits_classifier.Settings, args=args))
    assert (tmp_path / "c.json").is_file()


def test_shipped_weights_are_small_and_training_data_apart() -> None:
    assert TEACHER_FILE.stat().st_size <= 2e6
    assert CLASSIFIER_FILE.stat().st_size <= 2e6
    train, held_out = load_digits()
    assert len(train.images) + len(held_out.images) == 1797
    assert train.images.min() == -1
    assert train.images.max() == 1
    # Two of scikit-learn's digits may coincide; the split must not be the cause.
    copies = (
        torch.cdist(held_out.images.flatten(1), train.images.flatten(1)) == 0
    ).sum()
    assert copies <= 1


def in_a_mode(samples: Tensor) -> tuple[float, int]:
    distance, mode = torch.cdist(samples, custom_loop.MODES).min(dim=1)
    inside = distance < 3 * custom_loop.SPREAD
    return inside.float().mean().item(), mode[inside].unique().numel()


@pytest.mark.parametrize("setup", custom_loop.SETUPS)
def test_custom_loop_moves_the_student_to_the_circle_of_modes(setup: str) -> None:
    def off_the_circle(iterations: int) -> float:
        samples = custom_loop.distil(setup, iterations, batch=64)
        return abs(samples.norm(dim=1).mean().item() - 2)

    assert off_the_circle(iterations=250) < 0.5 * off_the_circle(iterations=1)


@pytest.mark.slow
@pytest.mark.parametrize("setup", custom_loop.SETUPS)
def test_custom_loop_hits_every_mode(setup: str) -> None:
    share, modes = in_a_mode(custom_loop.distil(setup))
    assert share > 0.3
    assert modes == 8


def test_custom_loop_is_short() -> None:
    assert custom_loop.__file__ is not None
    assert len(Path(custom_loop.__file__).read_text().splitlines()) <= 100


def test_a_missing_extra_is_an_error_that_says_what_to_type() -> None:
    require_extra("train", "tyro", "matplotlib")
    with pytest.raises(ImportError, match=r"nosuch is missing; type: pip"):
        require_extra("eval", "torch", "nosuch")
