"""Converts NVIDIA's EDM network into a folder that the recipes read.

    python examples/convert_edm.py edm-imagenet-64x64-cond-adm.pkl teacher

Takes NVIDIA's pickle, or a state dict by NVIDIA's names (.safetensors, .pth, .pt, .bin)
such as official DMD2's ImageNet student. Nothing in the file is executed. The folder
holds an ordinary diffusers UNet, and dmdkit.json beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from dmdkit.adapters.edm import edm_denoiser, edm_to_unet, file_sha256, read_edm
from dmdkit.adapters.folders import require_replaceable, save_denoiser
from dmdkit.extras import require_extra

require_extra("train", "tyro")

SAMPLER_SIGMAS = (0.002, 80.0)
"""The range of noise of EDM's sampler [Karras et al. 2022, Table 1]."""


@dataclass(frozen=True)
class Settings:
    """Converts NVIDIA's EDM network into a folder that the recipes read."""

    source: tyro.conf.Positional[Path]
    """NVIDIA's file."""
    folder: tyro.conf.Positional[Path]
    """Where the network goes. A network written there before is replaced."""
    sha256: str | None = None
    """The checksum that the file must have."""
    sigma_data: float | None = None
    """The data's standard deviation; none: the file's, or 0.5 if it does not say."""


def main(settings: Settings) -> None:
    """Reads, converts and writes, and says what it was."""
    require_replaceable(settings.folder)
    checksum = file_sha256(settings.source)
    state, found = read_edm(settings.source, sha256=settings.sha256)
    sigma_data = settings.sigma_data
    unet = edm_to_unet(state)
    estimator = edm_denoiser(
        unet, found.sigma_data if sigma_data is None else sigma_data
    )
    low, high = SAMPLER_SIGMAS
    save_denoiser(
        settings.folder,
        estimator,
        about={
            "source": settings.source.name,
            "sha256": checksum,
            "sigma_min": low,
            "sigma_max": high,
        },
    )
    widths = unet.config["block_out_channels"]
    multipliers = ", ".join(f"{width / widths[0]:g}" for width in widths)
    parameters = sum(p.numel() for p in unet.parameters())
    size = sum(f.stat().st_size for f in settings.folder.iterdir())
    classes = f"{found.classes} classes" if found.classes else "unconditional"
    print(f"source      {settings.source}, sha256 {checksum}")
    print(f"images      {found.resolution}x{found.resolution}, {classes}")
    print(f"channels    {widths[0]} times {multipliers}")
    print(f"parameters  {parameters:,}")
    print(f"written to  {settings.folder}, {size / 1e6:,.1f} MB in fp32")
    print(
        "licence     NVIDIA's EDM weights are under CC BY-NC-SA 4.0: what is distilled "
        "from them inherits these terms."
    )


def run() -> None:
    """The command line; what is wrong is said in one line."""
    try:
        main(tyro.cli(Settings))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error).splitlines()[0]) from None


if __name__ == "__main__":
    run()
