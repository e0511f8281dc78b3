r"""Encodes captioned images as latents: the real images of a text-to-image GAN loss.

    python examples/prepare_latents.py images latents --pretrained sdxl-base \
        --metadata images/metadata.jsonl

SOURCE is a folder of images. METADATA (.jsonl, .csv or .parquet) has a row for each
with its file name, caption, aesthetic score and unsafe flag; without it, a .txt file
beside each image is its caption. As in DMD2 (appendix F), images are left out whose
score is below 5.5, that are unsafe, or whose shorter side is below 1024 pixels.

Latents are drawn from what the VAE answers, multiplied by its scaling factor, and
written in shards. Every image has a seed of its own. The same command continues where
it was interrupted. To share the work among GPUs, start it once for each with --rank 0
... R - 1 and --ranks R. `dmdkit.data.open_latents` reads them; `latents-0000.png` shows
what some of them are decoded to.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from captioned_images import CaptionedImage, Columns, Pixels, find_images, too_small
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from runs import device_of, grid_of, save_png, to_pixels
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dmdkit.data import LatentKind, ShardWriter, weights_digest
from dmdkit.data.shard_files import INDEX, finished_file, shard_files

SHEET, THUMBNAIL = 16, 256
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """Encodes captioned images as latents."""

    source: tyro.conf.Positional[Path]
    """Folder of images."""
    dest: tyro.conf.Positional[Path]
    """Folder of the shards."""
    pretrained: str
    """A pipeline of diffusers whose VAE is used: a folder, or a name on the hub."""
    subfolder: str = "vae"
    """Where the VAE is in it; "": it is a VAE alone."""
    local_files_only: bool = False
    """Never ask the hub."""
    metadata: Path | None = None
    """.jsonl, .csv or .parquet file with a row for each image. None: captions are in
    .txt files beside the images."""
    columns: Columns = field(default_factory=Columns)
    min_size: int = 1024
    """Least shorter side of the original [DMD2, F]; smaller ones are left out."""
    min_aesthetic: float | None = 5.5
    """Least aesthetic score [DMD2, F]. None: no such filter."""
    resolution: int = 1024
    """Height and width of the square that is encoded."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """How latents are stored [official DMD2: fp16]."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the VAE."""
    seed: int = 0
    """The image of row i is encoded with seed + i."""
    batch_size: int = 8
    shard_size: int = 1000
    """Latents in a file, a multiple of the batch size."""
    rank: int = 0
    ranks: int = 1
    workers: int = min(4, os.cpu_count() or 1)
    """Processes that read images; 0: this one."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with an unreadable image: stop, or name it and leave it out."""
    device: str = "auto"

    def check(self) -> None:
        """Refuses what cannot run."""
        least = {"resolution": 1, "batch_size": 1, "shard_size": 1, "ranks": 1}
        for name, value in {**least, "workers": 0, "min_size": 0, "seed": 0}.items():
            if getattr(self, name) < value:
                flag = name.replace("_", "-")
                raise SystemExit(
                    f"--{flag} {getattr(self, name)}: expected >= {value}."
                )
        if not 0 <= self.rank < self.ranks:
            raise SystemExit(f"--rank {self.rank}: expected 0 ... {self.ranks - 1}.")
        if self.shard_size % self.batch_size:
            # Else a continued run would put other images together in a batch.
            raise SystemExit(
                f"--shard-size {self.shard_size}: expected a multiple of --batch-size "
                f"{self.batch_size}."
            )
        if not self.source.is_dir():
            raise SystemExit(f"SOURCE {self.source}: there is no such folder.")
        if (self.columns.width is None) != (self.columns.height is None):
            raise SystemExit("--columns.width, --columns.height: pass both or none.")
        filters = self.min_aesthetic is not None or self.columns.unsafe is not None
        if self.metadata is None and filters:
            raise SystemExit(
                "Without --metadata there are no scores and flags; pass it, or "
                "--min-aesthetic None --columns.unsafe None."
            )


def load_vae(settings: Settings, device: torch.device) -> Any:
    """Loads the VAE in fp32."""
    name = settings.pretrained
    try:
        vae: Any = AutoencoderKL.from_pretrained(
            name,
            subfolder=settings.subfolder or None,
            local_files_only=settings.local_files_only,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"--pretrained {name}: {reason}") from error
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if settings.resolution % factor:
        raise SystemExit(
            f"--resolution {settings.resolution}: expected a multiple of {factor}."
        )
    return vae.eval().requires_grad_(False).to(device)


def kind_of(settings: Settings, vae: Any) -> LatentKind:
    """What the latents will be."""
    return LatentKind(
        vae=weights_digest(vae),
        scaling_factor=vae.config["scaling_factor"],
        resolution=settings.resolution,
        dtype=str(DTYPES[settings.dtype]).removeprefix("torch."),
        shift_factor=vae.config["shift_factor"] or 0.0,
    )


def encode(
    vae: Any, pixels: Tensor, seeds: Sequence[int], *, kind: LatentKind, precision: str
) -> Tensor:
    """Draws a latent for each image, uint8 [b, 3, h, w], from a seed of its own."""
    x = pixels.to(vae.device).float() / 127.5 - 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        posterior = vae.encode(x).latent_dist
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = posterior.mean.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    z = posterior.mean.float() + posterior.std.float() * noise.to(x.device)
    return ((z - kind.shift_factor) * kind.scaling_factor).cpu()


def decode(vae: Any, latents: Tensor, kind: LatentKind) -> Tensor:
    """Decodes latents one by one to small pictures, uint8 [b, 3, h, w]."""
    z = latents.float().to(vae.device) / kind.scaling_factor + kind.shift_factor
    images = [vae.decode(z[i : i + 1]).sample.cpu() for i in range(len(z))]
    size = min(THUMBNAIL, kind.resolution)
    return to_pixels(
        torch.nn.functional.interpolate(torch.cat(images), size=size, mode="area")
    )


def last_row(folder: Path, rank: int) -> int:
    """The row of the last image that is safely on disk; -1 if there is none."""
    files = shard_files(folder, rank)
    return int(load_file(files[-1])["rows"][-1]) if files else -1


def print_left_out(left_out: Counter[str], before: str) -> None:
    """Prints how many images were left out, by reason."""
    for reason, count in sorted(left_out.items()):
        print(f"{before}: left out {count} {reason}.")


def digest_of(images: Sequence[CaptionedImage]) -> str:
    """Names images and captions, so that others are not taken for them."""
    listing = "\n".join(map(repr, images))
    return hashlib.sha256(listing.encode()).hexdigest()


class Preparation:
    """One rank's share of the images, encoded batch by batch."""

    def __init__(
        self, settings: Settings, images: Sequence[CaptionedImage], vae: Any
    ) -> None:
        self.settings, self.vae, self.kind = settings, vae, kind_of(settings, vae)
        self.writer = ShardWriter(
            settings.dest,
            about={
                **self.kind.about(),
                "pretrained": Path(settings.pretrained).name,
                "precision": settings.precision,
                "seed": settings.seed,
                "min_size": settings.min_size,
                "images": digest_of(images),
            },
            shard_size=settings.shard_size,
            rank=settings.rank,
            ranks=settings.ranks,
        )
        done = last_row(settings.dest, settings.rank)
        own = images[settings.rank :: settings.ranks]
        self.todo = [image for image in own if image.row > done]
        self.left_out: Counter[str] = Counter()
        self.batch: list[tuple[CaptionedImage, Tensor]] = []

    def run(self) -> None:
        """Encodes what is left to do."""
        settings = self.settings
        # The columns speak of the original, whatever the size of the file.
        min_size = 0 if settings.columns.width else settings.min_size
        pixels = Pixels(
            settings.source,
            self.todo,
            resolution=settings.resolution,
            min_size=min_size,
        )
        loader = DataLoader(pixels, batch_size=None, num_workers=settings.workers)
        bar = tqdm(total=len(self.todo), desc="encoding", unit="image")
        for image, found in zip(self.todo, loader, strict=True):
            if isinstance(found, Tensor):
                self.add(image, found)
            elif found is None:
                self.left_out[too_small(min_size)] += 1
            else:
                self.refuse_or_skip(image, found, bar)
            bar.update()
        self.flush()
        bar.close()
        self.writer.close()

    def add(self, image: CaptionedImage, pixels: Tensor) -> None:
        """Takes an image; encodes when a batch is full."""
        self.batch.append((image, pixels))
        if len(self.batch) == self.settings.batch_size:
            self.flush()

    def refuse_or_skip(self, image: CaptionedImage, fault: str, bar: Any) -> None:
        """Stops at a bad image, or names it."""
        path = self.settings.source / image.file
        if self.settings.on_bad == "refuse":
            raise SystemExit(
                f"{path}: {fault}. Repair it, or leave such files out with --on-bad "
                "skip."
            )
        bar.write(f"Skipped {path}: {fault}.")
        self.left_out["unreadable"] += 1

    def flush(self) -> None:
        """Encodes the images that wait, and hands their latents to the writer."""
        if not self.batch:
            return
        images = [image for image, _ in self.batch]
        latents = encode(
            self.vae,
            torch.stack([pixels for _, pixels in self.batch]),
            [self.settings.seed + image.row for image in images],
            kind=self.kind,
            precision=self.settings.precision,
        ).to(DTYPES[self.settings.dtype])
        finite = latents.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            path = self.settings.source / images[finite.index(False)].file
            raise SystemExit(
                f"{path}: its latent is not finite; try --precision fp32 --dtype fp32."
            )
        self.writer.add(
            latents=latents,
            captions=[image.caption for image in images],
            rows=torch.tensor([image.row for image in images]),
        )
        self.batch = []


@torch.no_grad()
def main(settings: Settings) -> None:
    """Encodes this rank's share of the images, from where it stopped."""
    settings.check()
    device = device_of(settings.device)
    try:
        images, left_out = find_images(
            settings.source,
            settings.metadata,
            settings.columns,
            min_size=settings.min_size,
            min_aesthetic=settings.min_aesthetic,
        )
        print_left_out(left_out, str(settings.metadata or settings.source))
        if not images:
            raise SystemExit(f"SOURCE {settings.source}: no captioned image is left.")
        vae = load_vae(settings, device)
        preparation = Preparation(settings, images, vae)
        preparation.run()
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    rank, dest = settings.rank, settings.dest
    print_left_out(preparation.left_out, f"{settings.source}, in this run")
    if not preparation.writer.position:
        # An empty set would stand in the way of the next try.
        for path in (finished_file(dest, rank), dest / INDEX):
            path.unlink(missing_ok=True)
        raise SystemExit(
            f"{dest}: no image was left, so nothing was written; see --min-size "
            f"({settings.min_size}, whatever --resolution is) and --min-aesthetic."
        )
    print(f"{dest} holds {preparation.writer.position} latents of rank {rank}.")
    if files := shard_files(dest, rank):
        pictures = decode(vae, load_file(files[0])["latents"][:SHEET], preparation.kind)
        save_png(grid_of(pictures, columns=4), dest / f"latents-{rank:04d}.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command continues.") from None
