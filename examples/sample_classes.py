"""Draws from class-conditional students and teachers, for `sample.py`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from runs import device_of, grid_of, save_png, to_pixels
from sample_settings import TEXT_OPTIONS, Settings, noises, partial_of, parts
from torch import Tensor
from tqdm import tqdm

from dmdkit import (
    BackwardSimulator,
    HeunSampler,
    StochasticSampler,
    karras_sigmas,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.folders import Sidecar, load_denoiser, read_sidecar

STEPS, BATCH_SIZE = 256, 64


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
        if self.classes and sidecar.about.get("null_class") == self.classes - 1:
            self.classes -= 1  # which means none of them
        self.sampler = choose_sampler(settings, sidecar)
        self.bf16 = settings.precision == "bf16"

    @torch.no_grad()
    def pixels(self, seeds: list[int], labels: list[int] | None) -> Tensor:
        """Draws one image a seed, uint8 [b, c, h, w]."""
        draws = noises(self.shape, seeds, self.device)
        noise = next(draws)
        cond = None if labels is None else torch.tensor(labels, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self.run(noise, cond, draws)
        finite = images.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            seed = seeds[finite.index(False)]
            raise ValueError(
                f"The image of seed {seed} is not finite; try --precision fp32."
            )
        return to_pixels(images).cpu()

    def run(
        self, noise: Tensor, cond: Tensor | None, draws: Iterator[Tensor]
    ) -> Tensor:
        """Calls the sampler with as much noise as it needs."""
        denoiser, sampler = self.denoiser, self.sampler
        if isinstance(sampler, HeunSampler):
            return sampler(denoiser, noise, cond)
        if isinstance(sampler, StochasticSampler):
            return sampler(denoiser, noise, cond, draws=draws)
        fresh = [next(draws) for _ in sampler.times[1:]]
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
    return kind(karras_sigmas(settings.steps or STEPS))


def label_of(settings: Settings, classes: int, i: int) -> int:
    """The class of image i of OUT."""
    if settings.labels == "balanced":
        return i % classes
    # Not the generator of its noise, whose first numbers are the image's.
    return int(np.random.default_rng((settings.seed, i)).integers(classes))


def save_grid(drawing: Drawing, settings: Settings, path: Path) -> None:
    """Draws rows of one class each."""
    rows: list[int | None] = [None] * 8
    if drawing.classes:
        spread = range(0, drawing.classes, max(drawing.classes // 8, 1))
        rows = list(settings.classes or spread[:8])
    pictures = []
    for i, row in enumerate(tqdm(rows, desc="rows")):
        first = settings.seed + i * settings.columns
        for part in parts(settings.columns, settings.batch_size or BATCH_SIZE):
            labels = None if row is None else [row] * len(part)
            pictures.append(drawing.pixels([first + j for j in part], labels))
    save_png(grid_of(torch.cat(pictures), settings.columns), path)
    print(f"Wrote {path}: classes {rows} from top to bottom.")


def save_images(drawing: Drawing, settings: Settings, out: Path) -> None:
    """Draws single images to a folder or an .npz file, whole or not at all."""
    partial = partial_of(out)
    as_npz, kept, labels = out.suffix == ".npz", [], []
    if not as_npz:
        partial.mkdir(parents=True)
    bar = tqdm(total=settings.count, desc="drawing", unit="image")
    for part in parts(settings.count, settings.batch_size or BATCH_SIZE):
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


def draw_classes(settings: Settings) -> None:
    """Draws a grid, single images, or both."""
    settings.refuse(
        TEXT_OPTIONS,
        f"{settings.folder} is a class-conditional model; this is for text-to-image "
        "pipelines.",
    )
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
