"""Pictures and the table of the digits example."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from digits_common import CLASSES, SHAPE
from digits_evaluation import Draw, Evaluator, Row
from torch import Tensor

from dmdkit import HeunSampler, ScoreEstimator, karras_sigmas


def mosaic(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Lays images in [-1, 1] out in rows, as grey values in [0, 1]."""
    rows = []
    for row in images[:, 0].split(columns):
        padded = [torch.nn.functional.pad(x, (gap,) * 4, value=-1.0) for x in row]
        rows.append(torch.cat(padded, dim=1))
    return (torch.cat(rows, dim=0).clamp(-1, 1) + 1) / 2


def save_grid(images: Tensor, path: Path) -> None:
    """Writes images in rows of ten."""
    pixels = mosaic(images, columns=CLASSES)
    large = pixels.repeat_interleave(6, dim=0).repeat_interleave(6, dim=1)
    plt.imsave(path, large.numpy(), cmap="gray")


def save_samples(teacher: ScoreEstimator, draw: Draw, calls: int, path: Path) -> None:
    """Draws teacher and student from the same noise, one column a class."""
    each, noun = 6, "call" if calls == 1 else "calls"
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(each * CLASSES) % CLASSES
    noise = torch.randn(len(labels), *SHAPE, generator=generator)
    of_teacher = HeunSampler(karras_sigmas(32))(teacher, noise, labels)
    of_student = draw(noise, labels, generator)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, images, title in (
        (axes[0], of_teacher, "Teacher, 63 calls"),
        (axes[1], of_student, f"Student, {calls} {noun}, the same noise"),
    ):
        axis.imshow(mosaic(images, CLASSES).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_xticks([10 * i + 4.5 for i in range(CLASSES)], range(CLASSES))
        axis.set_yticks([])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_curves(
    points: list[dict[str, float]],
    teacher: Mapping[str, float],
    floor: float,
    real_brightness: float,
    path: Path,
) -> None:
    """Plots Frechet distance and brightness over training."""
    steps = [point["step"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(steps, [p["frechet"] for p in points], color="tab:red", label="student")
    for i, (calls, value) in enumerate(teacher.items()):
        left.axhline(
            value, color=f"C{i + 4}", ls="--", lw=1, label=f"teacher, {calls} calls"
        )
    left.axhline(floor, color="black", ls=":", lw=1, label="real, held out")
    left.set(
        yscale="log",
        xlabel="iterations (critic updates)",
        title="Frechet distance to the training images",
    )
    left.legend(fontsize=8)
    right.plot(steps, [p["brightness"] for p in points], color="tab:red")
    right.axhline(real_brightness, color="black", ls=":", lw=1, label="real")
    right.set(
        xlabel="iterations (critic updates)",
        title="Brightness of samples (mean pixel in [-1, 1])",
    )
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(
    teacher: Mapping[str, Row],
    student: Mapping[str, Row],
    seconds_per_call: float,
    evaluator: Evaluator,
    real_nearest: float,
) -> None:
    """Prints teacher, student and real images side by side."""
    print(
        f"\n{'':<18}{'calls':>6}{'Frechet':>10}{'held out':>10}{'accuracy':>10}"
        f"{'nearest':>9}{'s/1,000':>9}"
    )
    for name, rows in (("teacher (Heun)", teacher), ("student", student)):
        for calls, row in rows.items():
            print(
                f"{name:<18}{calls:>6}{row['frechet']:>10.3f}"
                f"{row['frechet_held_out']:>10.3f}{row['accuracy']:>10.4f}"
                f"{row['nearest']:>9.3f}{int(calls) * seconds_per_call:>9.2f}"
            )
    held_out = evaluator.accuracy(evaluator.held_out)
    print(
        f"{'real, held out':<18}{'':>6}{evaluator.floor:>10.3f}{'':>10}"
        f"{held_out:>10.4f}{real_nearest:>9.3f}"
    )
    print(
        "Frechet: to the training images, the smaller the better. Nearest: mean "
        "distance to the\nnearest training image; far below that of real held-out "
        "images means memorising."
    )
