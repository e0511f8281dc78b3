"""Draws noise-image pairs of an EDM teacher, for the regression loss (DMD2, Eq. 3).

    python examples/imagenet_pairs.py teacher pairs --count 25000

The teacher's ODE is integrated by Heun's method, as for Table 3's first row. Pairs are
written in shards, and the same command continues where it was interrupted. To share
the work among GPUs, start it once for each with --rank 0 ... R - 1 and --ranks R.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from runs import device_of
from tqdm import tqdm

from dmdkit import HeunSampler, karras_sigmas
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.folders import load_denoiser
from dmdkit.data import ShardWriter


@dataclass(frozen=True)
class Settings:
    """Draws noise-image pairs of an EDM teacher."""

    teacher: tyro.conf.Positional[Path]
    """Folder that examples/convert_edm.py wrote."""
    out: tyro.conf.Positional[Path]
    """Folder of the shards."""
    count: int = 25_000
    """Pairs in all [ours: the paper does not say how many DMD's row had]."""
    steps: int = 256
    """Noise levels of Heun's method: 511 calls [Table 1]."""
    seed: int = 0
    batch_size: int = 100
    shard_size: int = 1000
    """Pairs in a file."""
    rank: int = 0
    ranks: int = 1
    precision: Literal["bf16", "fp32"] = "fp32"
    device: str = "auto"

    def check(self) -> None:
        """Refuses what cannot run."""
        for name in ("count", "steps", "batch_size", "shard_size", "ranks"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} {getattr(self, name)}: expected >= 1.")
        if not 0 <= self.rank < self.ranks:
            raise SystemExit(f"--rank {self.rank}: expected 0 ... {self.ranks - 1}.")


@torch.no_grad()
def main(settings: Settings) -> None:
    """Draws this rank's share of the pairs, from where it stopped."""
    settings.check()
    device = device_of(settings.device)
    try:
        teacher = load_denoiser(settings.teacher).to(device)
        writer = ShardWriter(
            settings.out,
            about={
                "what": "noise-image pairs of an EDM teacher",
                "teacher": settings.teacher.name,
                "sampler": "heun",
                "steps": settings.steps,
                "seed": settings.seed,
            },
            shard_size=settings.shard_size,
            rank=settings.rank,
            ranks=settings.ranks,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    network = teacher.network
    assert isinstance(network, UNetNetwork)
    config = network.unet.config
    shape = (config["in_channels"], *[config["sample_size"]] * 2)
    classes = config["num_class_embeds"] or 1
    sampler = HeunSampler(karras_sigmas(settings.steps))
    # Pair i of all belongs to rank i % ranks, and has a seed of its own.
    own = range(settings.rank, settings.count, settings.ranks)[writer.position :]
    bar = tqdm(total=len(own), desc="drawing", unit="pair")
    for start in range(0, len(own), settings.batch_size):
        part = own[start : start + settings.batch_size]
        generators = [torch.Generator().manual_seed(settings.seed + i) for i in part]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        labels = torch.cat(
            [torch.randint(classes, (1,), generator=g) for g in generators]
        )
        cond = labels.to(device) if config["num_class_embeds"] else None
        enabled = settings.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            images = sampler(teacher, noise.to(device), cond)
        writer.add(noise=noise, images=images.float().cpu(), labels=labels)
        bar.update(len(part))
    bar.close()
    writer.close()
    print(f"{settings.out} holds {writer.position} pairs of rank {settings.rank}.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
