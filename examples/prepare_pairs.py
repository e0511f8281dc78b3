"""Draws noise-image pairs of a text-to-image teacher, for the regression loss.

    python examples/prepare_pairs.py stabilityai/stable-diffusion-xl-base-1.0 pairs \
        --prompts prompts.txt

As for the one-step SDXL student (DMD2, section F.4): 10,000 pairs of noise and the
latent that the guided teacher makes of it by its ODE, which is DDIM in the terms of
SD1.5's scheduler and Euler's method in those of SDXL's. Pairs are written in shards
with their prompts, and the same command continues where it was interrupted. To share
the work among GPUs, start it once for each with --rank 0 ... R - 1 and --ranks R.
`pairs-0000.png` shows some of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from distillation import autocast, require_at_least
from runs import device_of, grid_of, option, save_png, to_pixels
from safetensors.torch import load_file
from text_models import LatentSpace, decode, latent_space, open_pipeline
from torch import Tensor
from tqdm import tqdm

from dmdkit import ClassifierFreeGuidance, EulerSampler
from dmdkit.adapters.pipelines import (
    TextPipeline,
    encode_prompts,
    teacher_from_pipeline,
    unconditional_of,
)
from dmdkit.data import ShardWriter, read_prompts, weights_digest
from dmdkit.data.shard_files import shard_files

SHEET, THUMBNAIL = 16, 256


@dataclass(frozen=True)
class Settings:
    """Draws noise-image pairs of a text-to-image teacher."""

    pretrained: tyro.conf.Positional[str]
    """The teacher: a pipeline of diffusers, a folder or a name on the hub."""
    out: tyro.conf.Positional[Path]
    """Folder of the shards."""
    prompts: Path
    """.txt, .jsonl, .csv or .parquet file; pair i is of prompt i, from the first again
    if there are fewer."""
    prompt_column: str = "prompt"
    """Of a table of prompts."""
    local_files_only: bool = False
    """Never ask the hub."""
    count: int = 10_000
    """Pairs in all [F.4]."""
    steps: int = 50
    """Calls of the guided teacher [scripts]."""
    spacing: Literal["trailing", "leading"] = "trailing"
    """Timesteps: from the last down, 999, 979, ... [scripts], or up from the first, 1,
    21, ... [SD1.5's and SDXL's own schedulers]."""
    guidance_scale: float = 8.0
    """In the convention in which 1 is none [F.4; SD1.5: 1.75 is trained, F.3]."""
    resolution: int | None = None
    """Height and width of the images; None is what the UNet was made for."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """How pairs are stored [scripts: fp16]."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of network calls."""
    seed: int = 0
    """Pair i is drawn from seed + i."""
    batch_size: int = 8
    """[scripts]."""
    shard_size: int = 1000
    """Pairs in a file."""
    rank: int = 0
    ranks: int = 1
    device: str = "auto"

    def check(self) -> None:
        """Refuses what cannot run."""
        sizes = ("count", "steps", "batch_size", "shard_size", "ranks")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 0, "seed")
        if not 0 <= self.rank < self.ranks:
            raise SystemExit(f"--rank {self.rank}: expected 0 ... {self.ranks - 1}.")
        if self.steps > 1000:
            raise SystemExit(f"--steps {self.steps}: expected at most 1000.")


def timesteps(steps: int, spacing: str) -> tuple[int, ...]:
    """The times of the calls in falling order, as diffusers spaces them."""
    if spacing == "trailing":
        return tuple(round(1000 - i * 1000 / steps) - 1 for i in range(steps))
    return tuple(1 + i * (1000 // steps) for i in reversed(range(steps)))


class Drawing:
    """The guided teacher: from prompts and seeds to noise and latents."""

    def __init__(self, settings: Settings, pipeline: TextPipeline) -> None:
        self.settings, self.pipeline = settings, pipeline
        self.device = device_of(settings.device)
        pipeline.to(self.device)
        self.teacher = ClassifierFreeGuidance(
            teacher_from_pipeline(pipeline),
            unconditional_of(pipeline),
            settings.guidance_scale,
        )
        self.sampler = EulerSampler(timesteps(settings.steps, settings.spacing))
        self.space: LatentSpace = latent_space(
            pipeline.unet.config, pipeline, settings.resolution
        )

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One pair a prompt, each from its own seed: noise and latents."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack(
            [torch.randn(self.space.shape, generator=g) for g in generators]
        )
        dtype = torch.float16 if self.settings.dtype == "fp16" else torch.float32
        # The student will see the noise as it is stored.
        noise = noise.to(dtype)
        cond = encode_prompts(self.pipeline, prompts, self.space.resolution)
        with autocast(self.settings.precision, self.device):
            latents = self.sampler(self.teacher, noise.to(self.device).float(), cond)
        if not bool(latents.isfinite().all()):
            raise SystemExit(
                f"The latents of seeds {list(seeds)} are not finite; nothing of them "
                "was written. Try --precision fp32."
            )
        return noise, latents.to("cpu", dtype)


def about(settings: Settings, pipeline: TextPipeline, texts: Sequence[str]) -> Any:
    """What the pairs are, so that others are not put among them."""
    return {
        "what": "noise-image pairs of a text-to-image teacher",
        "teacher": weights_digest(pipeline.unet),
        "vae": weights_digest(pipeline.vae),
        "prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "sampler": f"euler, {settings.spacing}",
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "resolution": settings.resolution or 0,
        "precision": settings.precision,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }


def show(folder: Path, rank: int, vae: Any) -> Path | None:
    """Decodes some of a rank's pairs to a picture."""
    files = shard_files(folder, rank)
    if not files:
        return None
    images = decode(vae, load_file(files[0])["latents"][:SHEET]).cpu()
    if images.shape[-1] > THUMBNAIL:
        images = torch.nn.functional.interpolate(images, size=THUMBNAIL, mode="area")
    path = folder / f"pairs-{rank:04d}.png"
    save_png(grid_of(to_pixels(images), columns=4), path)
    return path


@torch.no_grad()
def main(settings: Settings) -> None:
    """Draws this rank's share of the pairs, from where it stopped."""
    settings.check()
    with option("prompts"):
        texts = list(read_prompts(settings.prompts, column=settings.prompt_column))
    pipeline = open_pipeline(
        settings.pretrained, "pretrained", local_files_only=settings.local_files_only
    )
    try:
        drawing = Drawing(settings, pipeline)
        writer = ShardWriter(
            settings.out,
            about=about(settings, pipeline, texts),
            shard_size=settings.shard_size,
            rank=settings.rank,
            ranks=settings.ranks,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    # Pair i of all belongs to rank i % ranks.
    own = range(settings.rank, settings.count, settings.ranks)[writer.position :]
    bar = tqdm(total=len(own), desc="drawing", unit="pair")
    for start in range(0, len(own), settings.batch_size):
        part = own[start : start + settings.batch_size]
        prompts = [texts[i % len(texts)] for i in part]
        noise, latents = drawing(prompts, [settings.seed + i for i in part])
        writer.add(noise=noise, latents=latents, prompts=prompts)
        bar.update(len(part))
    bar.close()
    writer.close()
    print(f"{settings.out} holds {writer.position} pairs of rank {settings.rank}.")
    if path := show(settings.out, settings.rank, pipeline.vae):
        print(f"Some of them are in {path}.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command continues.") from None
