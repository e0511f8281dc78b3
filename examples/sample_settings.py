"""What `sample.py` is told, and what drawing from classes and from text shares."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

CLASS_OPTIONS = ("count", "labels", "classes", "columns", "sampler")
TEXT_OPTIONS = (
    *("prompts", "prompt_file", "prompt_column", "images_per_prompt", "compare"),
    *("guidance", "resolution", "lora", "unet", "local_files_only"),
)


@dataclass(frozen=True)
class Settings:
    """Draws from students and teachers."""

    folder: tyro.conf.Positional[str]
    """A folder that dmdkit wrote, or a pipeline of SD1.x, SD2.x or SDXL: a folder, or a
    name on the hub."""
    grid: Path | None = None
    """Picture of rows of one class, or of one prompt, each."""
    out: Path | None = None
    """Where single images go: a folder of PNG files and their labels or prompts; for
    classes also an .npz file with `images` (uint8 [n, h, w, c]) and `labels`."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    steps: int | None = None
    """Of a teacher. None: 256 for classes, noise levels of its sampler, where n levels
    are 2n - 1 calls (511 for the rows of Table 1); 50 for text [DMD2, Fig. 6], the
    steps of DDIM, spaced as those of SD's and SDXL's own schedulers."""
    times: tuple[float, ...] = ()
    """Times at which a student is called, instead of its own; they make a student of
    what has none, such as an official release."""
    batch_size: int | None = None
    """None: 64 for classes, 4 for text."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the UNet; for text bf16 also halves the memory of its weights."""
    device: str = "auto"

    count: int = 64
    """Classes: how many images OUT gets."""
    labels: Literal["balanced", "random"] = "balanced"
    """Classes: image i has class i modulo the number of classes [official DMD2], or a
    random one [EDM]."""
    classes: tuple[int, ...] = ()
    """Classes: rows of the grid; none: eight classes, evenly spread."""
    columns: int = 8
    """Classes: images in a row of the grid."""
    sampler: Literal["auto", "student", "heun", "sde"] = "auto"
    """Classes: the student's own times; the teacher's ODE by Heun's method or its SDE
    [EDM, Algorithms 1 and 2]. auto: the student's if the folder has some, else heun."""

    prompts: tuple[str, ...] = ()
    """Text: the prompts."""
    prompt_file: Path | None = None
    """Text: a file of prompts: .txt, one a line, .jsonl, .csv or .parquet."""
    prompt_column: str = "prompt"
    """Text: the column of a table of prompts."""
    images_per_prompt: int = 1
    """Text: image i is of prompt i // this, rounded down."""
    guidance: float | None = None
    """Text: the teacher's scale of classifier-free guidance, 1: none. None: the
    defaults of diffusers' pipelines, 7.5 for SD and 5 for SDXL. DMD2 distils with 1.75
    and 8 [F.3, F.4], and shows SDXL at 6 and 8 [Table 6]."""
    resolution: int | None = None
    """Text: side of the images in pixels. None: what the UNet was made for."""
    lora: Path | None = None
    """Text: a LoRA student on FOLDER, the teacher: a folder that dmdkit wrote, or a
    .safetensors file in the layout of diffusers or kohya, which needs --times."""
    unet: Path | None = None
    """Text: weights in the place of FOLDER's UNet, such as an official release of DMD2:
    .bin or .safetensors. Needs --times."""
    compare: tuple[str, ...] = ()
    """Text: more students and teachers like FOLDER, a column each beside it in GRID,
    from the same noise. Students at their own times; --times, --lora and --unet are
    FOLDER's."""
    local_files_only: bool = False
    """Text: never ask the hub."""

    def check(self) -> None:
        """Refuses what cannot run."""
        if self.grid is None and self.out is None:
            raise SystemExit("--grid, --out: give one of them, or both.")
        for name in ("count", "columns", "steps", "batch_size", "images_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"{flag(name)} {value}: expected >= 1.")

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Refuses options that were given but do not apply."""
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise SystemExit(f"{flag(field.name)}: {reason}")


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def parts(count: int, size: int) -> Iterator[range]:
    """Splits 0 ... count - 1 into batches."""
    for i in range(0, count, size):
        yield range(i, min(i + size, count))


def noises(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device
) -> Iterator[Tensor]:
    """Gives noise [b, *shape] again and again, each image's from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.randn(*shape, generator=g) for g in generators]
        yield torch.stack(drawn).to(device)


def partial_of(out: Path) -> Path:
    """Where OUT is written until it is whole; nothing is there yet."""
    if out.exists():
        raise SystemExit(f"--out: {out} exists; remove it or name another.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial
