"""Measures the checkpoints of a run as they appear, for `evaluate.py`.

It ends when the run has written its summary.json and every checkpoint is measured, or
when none has appeared for a time. Between looks it sleeps.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from digits import student_times
from digits_common import load_teacher
from evaluate_baselines import published
from evaluate_protocols import naming
from evaluate_report import numbers_of
from evaluate_settings import Settings, as_json, is_distance
from text_models import open_pipeline

from dmdkit import (
    ExponentialMovingAverage,
    ScoreEstimator,
    checkpoints,
    keep_checkpoint,
    load_modules,
    load_states,
)
from dmdkit.adapters.folders import load_denoiser, save_denoiser
from dmdkit.adapters.lora import LoRANetwork
from dmdkit.adapters.pipelines import (
    save_lora_student,
    save_pipeline,
    teacher_from_pipeline,
)
from dmdkit.training.ranks import on_first, rank_and_ranks

LINES, PLOT, WORK = "evaluation.jsonl", "evaluation.png", ".watched"
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "black")
WHAT = ("protocol", "count", "seeds", "labels", "reference", "prompt_file", "precision")
"""Settings that make numbers another thing."""


class Run:
    """The folder of a recipe's run.

    Raises:
        ValueError: If there is none, or it is of another program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "settings.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no settings.json; name the OUT of a run that has begun."
            )
        self.settings: dict[str, Any] = json.loads(file.read_text())
        if self.settings.get("random_init"):
            raise ValueError(f"{folder} is of random weights (--random-init).")
        if self.kind is None:
            raise ValueError(
                f"{folder} is of no recipe that this can read: digits, ImageNet-64, "
                "SD1.5, SDXL."
            )

    @property
    def kind(self) -> str | None:
        """Which recipe it is of, by what only that one has."""
        told = self.settings
        if "pretrained" in told:
            return "text"
        if "teacher" in told:
            return "edm"
        digits = "critic_learning_rate" in told and "guidance" not in told
        return "digits" if digits else None

    def checkpoints(self) -> list[Path]:
        """Those that are there and complete, the oldest first."""
        return checkpoints(self.folder / "checkpoints")

    def over(self) -> bool:
        """Whether it has ended; one that goes on removes its summary first."""
        return (self.folder / "summary.json").is_file()


def step_of(checkpoint: Path) -> int:
    """The iterations after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def student_settings(settings: Settings, run: Run, student: Path) -> Settings:
    """What measures an exported student."""
    if run.kind == "text" and run.settings["lora"] != "none":
        teacher = run.settings["pretrained"]
        return replace(settings, watch=None, student=teacher, lora=student)
    return replace(settings, watch=None, student=str(student))


def export(run: Run, checkpoint: Path, folder: Path) -> None:
    """Writes the student of a checkpoint as its run would: averaged, if it averages."""
    told = run.settings
    if run.kind == "text":
        export_text(told, checkpoint, folder)
        return
    if run.kind == "digits":
        student, times = load_teacher(), student_times(told["steps"])
    else:
        student, times = load_denoiser(told["teacher"]), tuple(told["times"])
    load_student(checkpoint, student, told.get("ema"))
    save_denoiser(folder, student, times=times)


def load_student(checkpoint: Path, student: ScoreEstimator, ema: float | None) -> None:
    """Takes a student's weights from a checkpoint, or their average."""
    network = student.network.requires_grad_(True)
    load_modules(checkpoint, student=network)
    if ema is not None:
        average = ExponentialMovingAverage(network, (ema,))
        load_states(checkpoint, student_ema=average)
        average.copy_to(network)
    network.requires_grad_(False)


def export_text(told: Mapping[str, Any], checkpoint: Path, folder: Path) -> None:
    """Writes a text-to-image student: a pipeline, or its adapter."""
    pipeline = open_pipeline(
        told["pretrained"], "watch", local_files_only=told["local_files_only"]
    )
    student = teacher_from_pipeline(pipeline)
    about: dict[str, Any] = {
        "times": tuple(told["times"]),
        "teacher": told["pretrained"],
        "licence": told["licence"],
        "about": {"resolution": told["resolution"]} if told["resolution"] else {},
    }
    if told["lora"] == "none":
        load_student(checkpoint, student, told["ema"])
        save_pipeline(folder, pipeline, student, **about)
        return
    student.requires_grad_(False)
    network = LoRANetwork(student.network, told["lora_rank"], told["lora_alpha"])
    adapted = ScoreEstimator(network, student.process, student.parameterization)
    load_student(checkpoint, adapted, told["ema"])
    save_lora_student(folder, adapted, **about)


# -- watching


def watch(settings: Settings, evaluation: Any) -> None:
    """Measures every checkpoint until the run has ended."""
    assert settings.watch is not None
    with naming("watch"):
        run = Run(settings.watch)
        lines = read_lines(run.folder / LINES, settings)
    seen = {line["step"] for line in lines}
    first, last_new = rank_and_ranks()[0] == 0, time.monotonic()
    try:
        while True:
            over, checkpoint = on_first(lambda: (run.over(), next_one(run, seen)))
            if checkpoint is not None:
                line = measure(settings, evaluation, run, checkpoint)
                seen.add(step_of(checkpoint))
                last_new = time.monotonic()
                if first and line is not None:
                    lines.append(line)
                    write_line(run.folder / LINES, line)
                    plot(lines, settings.protocol, run.folder / PLOT)
                continue
            if over:
                break
            late = on_first(lambda since=last_new: time.monotonic() - since)
            if late > settings.watch_timeout:
                if first:
                    print(f"No new checkpoint for {late:.0f} s.")
                break
            time.sleep(settings.watch_every)
    finally:
        if first:
            shutil.rmtree(run.folder / WORK, ignore_errors=True)
    if first:
        summarize(run, lines, over)


def next_one(run: Run, seen: set[int]) -> Path | None:
    """The oldest checkpoint that is not measured yet."""
    return next((c for c in run.checkpoints() if step_of(c) not in seen), None)


def measure(
    settings: Settings, evaluation: Any, run: Run, checkpoint: Path
) -> dict[str, Any] | None:
    """Measures a checkpoint; None if the run has removed it meanwhile."""
    work = run.folder / WORK
    step = step_of(checkpoint)

    def take() -> bool:
        work.mkdir(exist_ok=True)
        try:
            # Linked, so that the run may remove its own.
            kept = keep_checkpoint(checkpoint, work / "checkpoint")
        except (OSError, ValueError):
            print(f"Step {step}: its run has removed it before it could be read.")
            return False
        with naming("watch"):
            export(run, kept, work / "student")
        return True

    if not on_first(take):
        return None
    content = evaluation.run(
        replace(student_settings(settings, run, work / "student"), json=None)
    )
    numbers = numbers_of(content)
    if rank_and_ranks()[0] == 0:
        said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(f"Step {step}: {said}", flush=True)
    comparable = all(result["comparable"] for result in content["results"].values())
    return {
        "step": step,
        **numbers,
        "comparable": comparable,
        "weights": content["model"]["weights"],
        "what": what_of(settings),
    }


def what_of(settings: Settings) -> dict[str, Any]:
    """What the numbers of a line are."""
    told = as_json(settings)
    return {name: told[name] for name in WHAT}


def read_lines(file: Path, settings: Settings) -> list[dict[str, Any]]:
    """What was measured before; refuses numbers of something else."""
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for name, value in what_of(settings).items():
        for line in lines:
            if line["what"][name] != value:
                raise ValueError(
                    f"{file} has numbers of {name} = {line['what'][name]}, now it is "
                    f"{value}; move it away."
                )
    return lines


def write_line(file: Path, line: Mapping[str, Any]) -> None:
    """Adds a line."""
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")


def summarize(run: Run, lines: Sequence[Mapping[str, Any]], over: bool) -> None:
    """Prints how it ended, and the best of each number."""
    ended = "The run has ended" if over else "The run goes on, or was stopped"
    print(f"{ended}; {len(lines)} checkpoints are measured.")
    if lines:
        print(f"Numbers are in {run.folder / LINES}, the plot in {run.folder / PLOT}.")


def plot(
    lines: Sequence[Mapping[str, Any]], protocols: Sequence[str], file: Path
) -> None:
    """Plots quality against iterations, a panel for each protocol."""
    lines = sorted(lines, key=lambda line: line["step"])
    rows = published(protocols, latency=False)
    figure, axes = plt.subplots(
        1,
        len(protocols),
        figsize=(1 + 5 * len(protocols), 3.8),
        layout="constrained",
        squeeze=False,
    )
    for axis, name in zip(axes[0], protocols, strict=True):
        steps, values = zip(*((x["step"], x[name]) for x in lines), strict=True)
        axis.plot(steps, values, "o-", color="tab:red", markersize=4, label="student")
        for i, row in enumerate(r for r in rows if name in r.numbers):
            calls = "" if row.calls is None else f", {row.calls} calls"
            axis.axhline(
                row.numbers[name],
                color=COLOURS[i % len(COLOURS)],
                ls=("--", ":")[i % 2],
                lw=1,
                label=f"{row.method}{calls}",
            )
        axis.set(xlabel="iterations (critic updates)", title=name)
        if is_distance(name):
            axis.set(yscale="log", ylabel="Fréchet distance")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    unfinished = file.with_name(f".{file.name}")
    figure.savefig(unfinished, dpi=150, format="png")
    plt.close(figure)
    unfinished.replace(file)
