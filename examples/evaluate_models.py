"""Students and teachers that draw what is measured, for `evaluate.py`."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sample_settings
import torch
from digits_common import CLASSES, load_teacher
from evaluate_baselines import BASELINES
from evaluate_settings import Settings
from runs import device_of
from sample import kind_of
from sample_classes import Drawing, label_of
from sample_settings import TEXT_OPTIONS
from torch import Tensor
from tqdm import tqdm

from dmdkit import HeunSampler, ScoreEstimator, StochasticSampler
from dmdkit.adapters.folders import read_sidecar, save_denoiser
from dmdkit.data import weights_digest

SHIPPED = "digits"
"""The name of the teacher in this repository."""
WARM_UP = 2


class Model(NamedTuple):
    """A model and its sampler: from a range of images and a first seed to pixels."""

    draw: Callable[[range, int], Tensor]
    title: str
    calls: int
    batch_size: int
    """What is usual."""
    about: dict[str, Any]
    label: Callable[[int, int], int] | None = None
    """The class of an image, given the first seed."""


def open_model(settings: Settings, prompts: Sequence[str], each: int) -> Model:
    """Opens the student or teacher; `each` is images a prompt."""
    if settings.teacher == SHIPPED:
        with tempfile.TemporaryDirectory() as folder:
            save_denoiser(folder, load_teacher())
            return class_model(settings, folder)
    name, option = source_of(settings)
    if kind_of(name, option) == "text":
        # transformers, which only text needs, takes seconds to import.
        from evaluate_text import text_model

        return text_model(settings, prompts, each)
    return class_model(settings, name)


def source_of(settings: Settings) -> tuple[str, str]:
    """The folder or name that was given, and its option."""
    if settings.student is not None:
        return settings.student, "--student"
    return settings.teacher or "", "--teacher"


def require_kind(settings: Settings, times: tuple[float, ...] | None) -> None:
    """Refuses a teacher for a student, and the other way round."""
    name, option = source_of(settings)
    if settings.student is not None:
        if not (times or settings.times):
            raise SystemExit(
                f"{option} {name}: it holds no student's times; give a teacher as "
                "--teacher, or the student's --times."
            )
        settings.refuse(("steps", "guidance"), "a student has none; see --times.")
    elif times:
        raise SystemExit(f"{option} {name}: it is a student; give it as --student.")
    else:
        settings.refuse(("times",), "they are a student's; give it as --student.")


def told_to_sample(settings: Settings, folder: str, **more: Any) -> Any:
    """The settings as those of `sample.py`."""
    baseline = BASELINES.get(settings.sampler)
    steps, guidance = settings.steps, settings.guidance
    if baseline is not None:
        steps = steps or baseline.steps
        guidance = baseline.guidance if guidance is None else guidance
    same = ("times", "precision", "device", "labels", "resolution", "lora", "unet")
    given = {name: getattr(settings, name) for name in same}
    return sample_settings.Settings(
        folder=folder,
        steps=steps,
        guidance=guidance,
        local_files_only=settings.local_files_only,
        **given,
        **more,
    )


def class_model(settings: Settings, folder: str) -> Model:
    """Opens a class-conditional student or teacher."""
    baseline, name = BASELINES.get(settings.sampler), source_of(settings)[0]
    if baseline is not None and baseline.is_text:
        raise SystemExit(
            f"--sampler {settings.sampler}: it draws from prompts, {name} from classes."
        )
    require_kind(settings, read_sidecar(folder).times)
    kind = "student" if settings.student else baseline.kind if baseline else "heun"
    told = told_to_sample(settings, folder, sampler=kind)
    told.refuse(TEXT_OPTIONS, f"{name} draws from classes, not from prompts.")
    drawing = Drawing(told)
    classes = drawing.classes
    if classes and "digits" in settings.protocol:
        classes = CLASSES  # one more means none

    def label(index: int, seed: int) -> int:
        return label_of(replace(told, seed=seed), classes, index)

    def draw(batch: range, seed: int) -> Tensor:
        labels = [label(i, seed) for i in batch] if classes else None
        return drawing.pixels([seed + i for i in batch], labels)

    return Model(
        draw,
        title_of(settings),
        calls_of(drawing.sampler),
        64,
        {"weights": digest_of(drawing.denoiser), "sampler": f"{drawing.sampler}"},
        label if classes else None,
    )


def calls_of(sampler: Any) -> int:
    """How often a sampler calls its denoiser."""
    calls = len(sampler.times)
    second_order = isinstance(sampler, HeunSampler | StochasticSampler)
    return 2 * calls - 1 if second_order else calls


def digest_of(denoiser: Any) -> str:
    """The checksum of a denoiser's weights, guided or not."""
    inner = denoiser if isinstance(denoiser, ScoreEstimator) else denoiser.denoiser
    return weights_digest(inner.network)


def title_of(settings: Settings) -> str:
    """The model in a word or two."""
    name = settings.lora or settings.unet or source_of(settings)[0]
    title = "/".join(Path(str(name)).parts[-2:])
    return title if settings.sampler == "auto" else f"{title} {settings.sampler}"


def seconds_an_image(model: Model, settings: Settings) -> dict[str, Any]:
    """The time of an image, from prompt or class to pixels: a median, warmed up."""
    device, size = device_of(settings.device), settings.latency_batch_size
    seconds = []
    for i in tqdm(range(WARM_UP + settings.latency), desc="latency", leave=False):
        wait_for(device)
        began = time.perf_counter()
        model.draw(range(i * size, (i + 1) * size), 0)
        wait_for(device)
        seconds.append((time.perf_counter() - began) / size)
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "seconds_an_image": statistics.median(seconds[WARM_UP:]),
        "batch_size": size,
        "timed_batches": settings.latency,
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": settings.precision,
    }


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
