"""Draws from a student, or from the teacher it was distilled from.

    python examples/sample.py runs/imagenet_edm/student --grid samples.png
    python examples/sample.py runs/imagenet_edm/student --out samples.npz --count 50000
    python examples/sample.py teacher --out samples --count 50000 --sampler sde

Takes any folder that dmdkit wrote: an exported student, a converted teacher. Every
image has a seed of its own, so it is the same in whatever batch it is drawn.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from runs import device_of, grid_of, save_png, to_pixels
from torch import Tensor
from tqdm import tqdm

from dmdkit import (
    BackwardSimulator,
    HeunSampler,
    ScoreEstimator,
    StochasticSampler,
    karras_sigmas,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.folders import Sidecar, load_denoiser, read_sidecar


@dataclass(frozen=True)
class Settings:
    """Draws from a student or a teacher."""

    folder: tyro.conf.Positional[Path]
    """A folder that dmdkit wrote."""
    grid: Path | None = None
    """Picture of rows of one class each."""
    out: Path | None = None
    """Where single images go: a folder of PNG files and their labels, or an .npz file
    with `images` (uint8 [n, h, w, c]) and `labels`."""
    count: int = 64
    """How many images OUT gets."""
    labels: Literal["balanced", "random"] = "balanced"
    """Image i has class i modulo the number of classes [official DMD2], or a random one
    [EDM]."""
    classes: tuple[int, ...] = ()
    """Rows of the grid; none: eight classes, evenly spread."""
    columns: int = 8
    """Images in a row of the grid."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    sampler: Literal["auto", "student", "heun", "sde"] = "auto"
    """The student's own times; the teacher's ODE by Heun's method or its SDE [EDM,
    Algorithms 1 and 2]. auto: the student's if the folder has some, else heun."""
    steps: int = 256
    """Noise levels of the teacher's samplers: n levels are 2n - 1 calls, 511 for the
    rows of Table 1."""
    times: tuple[float, ...] = ()
    """Noise levels at which a student is called, instead of its own."""
    batch_size: int = 64
    precision: Literal["bf16", "fp32"] = "fp32"
    device: str = "auto"

    def check(self) -> None:
        """Refuses what cannot run."""
        if self.grid is None and self.out is None:
            raise SystemExit("--grid, --out: give one of them, or both.")
        for name in ("count", "columns", "steps", "batch_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 1.")


class Drawing:
    """A denoiser and its sampler: from seeds and labels to pixels."""

    def __init__(self, settings: Settings) -> None:
        self.device = device_of(settings.device)
        sidecar = read_sidecar(settings.folder)
        self.denoiser = load_denoiser(settings.folder).to(self.device)
        network = self.denoiser.network
        assert isinstance(network, UNetNetwork)
        config = network.unet.config
        self.shape = (config["in_channels"], *[config["sample_size"]] * 2)
        self.classes: int = config["num_class_embeds"] or 0
        self.sampler = choose_sampler(settings, sidecar)
        self.bf16 = settings.precision == "bf16"

    @torch.no_grad()
    def pixels(self, seeds: list[int], labels: list[int] | None) -> Tensor:
        """Draws one image a seed, uint8 [b, c, h, w]."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self.noise(generators)
        cond = None if labels is None else torch.tensor(labels, device=self.device)
        draws = (self.noise(generators) for _ in itertools.count())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self.run(self.denoiser, noise, cond, draws)
        return to_pixels(images).cpu()

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        """The next noise of every image, from its own generator."""
        drawn = [torch.randn(self.shape, generator=g) for g in generators]
        return torch.stack(drawn).to(self.device)

    def run(
        self,
        denoiser: ScoreEstimator,
        noise: Tensor,
        cond: Tensor | None,
        draws: Iterator[Tensor],
    ) -> Tensor:
        """Calls the sampler with as much noise as it needs."""
        sampler = self.sampler
        if isinstance(sampler, HeunSampler):
            return sampler(denoiser, noise, cond)
        if isinstance(sampler, StochasticSampler):
            return sampler(denoiser, noise, cond, draws=draws)
        fresh = list(itertools.islice(draws, len(sampler.times) - 1))
        return sampler.sample(denoiser, noise, cond, draws=fresh)


def choose_sampler(
    settings: Settings, sidecar: Sidecar
) -> BackwardSimulator | HeunSampler | StochasticSampler:
    """The sampler that was asked for, or the one that fits the folder."""
    name = settings.sampler
    times = settings.times or sidecar.times
    if name == "auto":
        name = "student" if times else "heun"
    if name == "student":
        if not times:
            raise SystemExit(
                f"--sampler student: {settings.folder} holds a teacher, which has no "
                "times of its own; take heun or sde, or give --times."
            )
        return BackwardSimulator(times)
    kind = HeunSampler if name == "heun" else StochasticSampler
    return kind(karras_sigmas(settings.steps))


def label_of(settings: Settings, classes: int, i: int) -> int:
    """The class of image i of OUT."""
    if settings.labels == "balanced":
        return i % classes
    # Not the generator of its noise, whose first numbers are the image's.
    generator = torch.Generator().manual_seed(settings.seed + i + 2**32)
    return int(torch.randint(classes, (), generator=generator))


def save_grid(drawing: Drawing, settings: Settings, path: Path) -> None:
    """Draws rows of one class each."""
    rows: list[int | None] = [None] * 8
    if drawing.classes:
        spread = range(0, drawing.classes, max(drawing.classes // 8, 1))
        rows = list(settings.classes or spread[:8])
    pictures = []
    for i, row in enumerate(tqdm(rows, desc="rows")):
        first = settings.seed + i * settings.columns
        for part in parts(settings.columns, settings.batch_size):
            labels = None if row is None else [row] * len(part)
            pictures.append(drawing.pixels([first + j for j in part], labels))
    save_png(grid_of(torch.cat(pictures), settings.columns), path)
    print(f"Wrote {path}: classes {rows} from top to bottom.")


def parts(count: int, size: int) -> Iterator[range]:
    """Splits 0 ... count - 1 into batches."""
    for i in range(0, count, size):
        yield range(i, min(i + size, count))


def save_images(drawing: Drawing, settings: Settings, out: Path) -> None:
    """Draws single images to a folder or an .npz file, whole or not at all."""
    if out.exists():
        raise SystemExit(f"--out: {out} exists; remove it or name another.")
    partial = out.with_name(f".{out.name}.partial")
    as_npz, kept, labels = out.suffix == ".npz", [], []
    shutil.rmtree(partial, ignore_errors=True)
    if not as_npz:
        partial.mkdir(parents=True)
    bar = tqdm(total=settings.count, desc="drawing", unit="image")
    for part in parts(settings.count, settings.batch_size):
        own = [label_of(settings, drawing.classes, i) for i in part if drawing.classes]
        pixels = drawing.pixels([settings.seed + i for i in part], own or None)
        labels += own
        if as_npz:
            kept.append(pixels.permute(0, 2, 3, 1).numpy())
        for i, image in zip(part, () if as_npz else pixels, strict=not as_npz):
            save_png(image, partial / f"{i:06d}.png")
        bar.update(len(part))
    bar.close()
    if as_npz:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, images=np.concatenate(kept), labels=np.array(labels))
    else:
        (partial / "labels.txt").write_text("".join(f"{x}\n" for x in labels))
    partial.rename(out)
    print(f"Wrote {settings.count} images to {out}.")


def main(settings: Settings) -> None:
    """Draws a grid, single images, or both."""
    settings.check()
    try:
        drawing = Drawing(settings)
        outside = [c for c in settings.classes if not 0 <= c < drawing.classes]
        if outside:
            raise SystemExit(
                f"--classes {outside[0]}: the model has {drawing.classes} classes."
            )
        if settings.grid is not None:
            save_grid(drawing, settings, settings.grid)
        if settings.out is not None:
            save_images(drawing, settings, settings.out)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(tyro.cli(Settings))
